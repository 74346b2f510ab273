"""Parts of a column's cells as columns of their own: "choices.text" of a struct, "endings.0" of a list."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from influence_core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray, DataType

NESTED = "."  # between a column and a part of its cells
MOST_DIGITS = 6  # of a place in a list
# Here and below pyarrow, which comes with datasets, is imported only where it is needed: it takes long.


def nested_type(types: Mapping[str, "DataType"], path: str) -> "DataType | None":
    """Of a part of a column's cells; None where there is no such part.

    Args:
        types: of the columns.
    """
    from pyarrow.types import is_struct

    column, parts = _split(types, path)
    found = types.get(column)
    for part in parts:
        if found is None or _is_json(found):  # which may hold anything
            return found
        if is_struct(found) and found.get_field_index(part) >= 0:
            found = found.field(part).type
        elif _is_list(found) and _is_place(part):
            found = found.value_type
        else:
            return None
    return found


def nested_names(column: str, kind: "DataType") -> list[str]:
    """How the column, or the parts of its cells, may be named."""
    from pyarrow.types import is_struct

    if is_struct(kind):
        return [name for field in kind for name in nested_names(column + NESTED + field.name, field.type)]
    if _is_list(kind):
        return nested_names(f"{column}{NESTED}0", kind.value_type)
    return [f"{column}{NESTED}…" if _is_json(kind) else column]


def with_nested(rows: "Dataset", paths: Sequence[str], source: str) -> "Dataset":
    """The rows, with parts of their cells as columns: null where a list is too short.

    Raises:
        UserError: such parts are of different kinds, as no column is.
    """
    import pyarrow
    from datasets import Dataset, concatenate_datasets

    if not paths:
        return rows
    columns = {}
    for path in paths:
        name, parts = _split(rows.column_names, path)
        column = rows.data.column(name)
        if _passes_json(column.type, parts):
            columns[path] = _parts_of_json(rows, name, parts, f"{path!r} of {source}")
            continue
        for part in parts:
            column = _part(column, part)
        columns[path] = column
    return concatenate_datasets([rows, Dataset(pyarrow.table(columns))], axis=1)


def longer_lists(rows: "Dataset", paths: Sequence[str]) -> list[str]:
    """What to say of lists of which only the first places are among the paths."""
    import pyarrow.compute as pc

    places: dict[str, list[int]] = {}
    for path in paths:
        parent, _, place = path.rpartition(NESTED)
        if _is_place(place):
            places.setdefault(parent, []).append(int(place))
    notes = []
    for parent, named in places.items():
        name, parts = _split(rows.column_names, parent)
        column = rows.data.column(name)
        if _passes_json(column.type, parts):
            continue
        for part in parts:
            column = _part(column, part)
        if len(named) > 1 and _is_list(column.type):
            longer = pc.sum(pc.greater(pc.list_value_length(column), max(named) + 1)).as_py()
            if longer:
                notes.append(f"{longer} rows have more parts than the {max(named) + 1} that are named ({parent!r})")
    return notes


def cell_of(row: Mapping[str, Any], path: str) -> Any:
    """The part of a row that `with_nested` would make a cell of, or the cell of a column's own name.

    Raises:
        LookupError: there is none.
    """
    column, parts = _split(row, path)
    value = row[column]
    for part in parts:
        if isinstance(value, list) and _is_place(part):
            value = value[int(part)]
        elif isinstance(value, Mapping):
            value = value[part]
        else:
            raise LookupError(path)
    return value


def _split(columns: Sequence[str] | Mapping[str, Any], path: str) -> tuple[str, list[str]]:
    """(the column, what follows); a column's own name may have dots."""
    pieces = path.split(NESTED)
    for number in range(len(pieces), 0, -1):
        if (name := NESTED.join(pieces[:number])) in columns:
            return name, pieces[number:]
    return path, []


def _part(column: "ChunkedArray", part: str) -> "ChunkedArray":
    import pyarrow.compute as pc
    from pyarrow.types import is_struct

    if is_struct(column.type):
        return pc.struct_field(column, part)
    start = int(part)
    return pc.list_element(pc.list_slice(column, start, start + 1, return_fixed_size_list=True), 0)


def _passes_json(kind: "DataType", parts: Sequence[str]) -> bool:
    """Whether a part of a cell is in one of no fixed shape, or is one."""
    from pyarrow.types import is_struct

    for part in parts:
        if _is_json(kind):
            return True
        kind = kind.field(part).type if is_struct(kind) else kind.value_type
    return _is_json(kind)


def _parts_of_json(rows: "Dataset", name: str, parts: Sequence[str], what: str) -> "ChunkedArray":
    """Of cells that have not the same fields in all rows, which datasets keeps as JSON."""
    import pyarrow

    values = []
    for value in rows.with_format(None)[name]:
        for part in parts:
            if isinstance(value, list):
                value = value[int(part)] if _is_place(part) and int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        values.append(value)
    kinds = sorted({type(value).__name__ for value in values if value is not None})
    if len(kinds) > 1:
        raise UserError(f"{what} is not of one kind in all rows, but {' and '.join(kinds)}: write all alike")
    if {"dict", "list"} & {*kinds}:
        raise UserError(f"{what} is a {kinds[0]}: name the part of it that is meant")
    return pyarrow.chunked_array([pyarrow.array(values)])


def _is_place(part: str) -> bool:
    return part.isdecimal() and len(part) <= MOST_DIGITS


def _is_json(kind: "DataType") -> bool:
    from pyarrow import BaseExtensionType

    return isinstance(kind, BaseExtensionType)


def _is_list(kind: "DataType") -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
