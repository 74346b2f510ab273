"""Parts of a column's cells as columns of their own: "choices.text" of a struct, "endings.0" of a list."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import DataType

NESTED = "."  # between a column and a part of its cells


def nested_type(types: Mapping[str, "DataType"], path: str) -> "DataType | None":
    """Of a part of a column's cells; None where there is no such part."""
    from pyarrow.types import is_struct  # here and below: it comes with datasets, which takes long to import

    column, *parts = path.split(NESTED)
    found = types.get(column)
    for part in parts:
        if found is not None and is_struct(found) and found.get_field_index(part) >= 0:
            found = found.field(part).type
        elif found is not None and _is_list(found) and part.isdecimal():
            found = found.value_type
        else:
            return None
    return found


def nested_names(column: str, kind: "DataType") -> list[str]:
    """How the column, or the parts of its cells, may be named."""
    from pyarrow import types

    if types.is_struct(kind):
        return [name for field in kind for name in nested_names(column + NESTED + field.name, field.type)]
    return nested_names(f"{column}{NESTED}0", kind.value_type) if _is_list(kind) else [column]


def with_nested(rows: "Dataset", paths: Sequence[str]) -> "Dataset":
    """The rows, with parts of their cells as columns: null where a list is too short."""
    import pyarrow
    import pyarrow.compute as pc
    from datasets import Dataset, concatenate_datasets

    columns = {}
    for path in paths:
        name, *parts = path.split(NESTED)
        column = rows.data.column(name)
        for part in parts:
            if pyarrow.types.is_struct(column.type):
                column = pc.struct_field(column, part)
            else:
                start = int(part)
                column = pc.list_element(pc.list_slice(column, start, start + 1, return_fixed_size_list=True), 0)
        columns[path] = column
    return concatenate_datasets([rows, Dataset(pyarrow.table(columns))], axis=1) if columns else rows


def _is_list(kind: "DataType") -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
