"""Cells of .csv files: texts, as no type is written with them, and numbers where all of a column are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features
    from pyarrow import ChunkedArray, DataType


def is_csv(builder: "DatasetBuilder") -> bool:
    """Whether the rows are those of .csv files."""
    from datasets.packaged_modules.csv.csv import CsvConfig

    return isinstance(builder.config, CsvConfig)


def texts_of(files: Sequence[str], builder: "DatasetBuilder") -> "Features":
    """The columns of .csv files, as texts: pandas would guess their types, and make 7 of "007".

    Raises:
        ValueError: they have not the same columns, or cells that no header names.
    """
    from datasets import Features, Value

    columns = {file: _header(file, builder.config.pd_read_csv_kwargs) for file in files}
    first = files[0]
    for file in files[1:]:
        if sorted(columns[file]) != sorted(columns[first]):
            raise ValueError(f"{file} has the columns {', '.join(columns[file])}, and {first} others: "
                             f"{', '.join(columns[first])}")  # fmt: skip
    return Features(dict.fromkeys(columns[first], Value("string")))


def _header(file: str, options: dict) -> list[str]:
    import pandas

    try:
        first = pandas.read_csv(file, **options | {"nrows": 1, "chunksize": None})
    except Exception as error:
        error.add_note(f"'{file}' with error")  # as datasets says it
        raise
    if not isinstance(first.index, pandas.RangeIndex):  # pandas made one of cells that the header does not name
        raise more_cells(file)
    return list(first.columns)


def more_cells(source: str) -> ValueError:
    """Of rows whose first cells would be lost."""
    return ValueError(f"the rows of {source} have more cells than its header names: quote cells with commas")


def column_types(rows: "Dataset", builder: "DatasetBuilder") -> dict[str, "DataType"]:
    """Of the columns; in a .csv file, those whose every cell is a number hold numbers."""
    types = {field.name: field.type for field in rows.data.schema}
    if not is_csv(builder):
        return types
    return {column: _as_numbers(rows.data.column(column)).type for column in types}


def with_numbers(rows: "Dataset", columns: Sequence[str]) -> "Dataset":
    """The rows, with numbers in those of the columns that hold nothing else."""
    import pyarrow
    from datasets import Dataset, concatenate_datasets

    numbers = pyarrow.table({column: _as_numbers(rows.data.column(column)) for column in columns})
    return concatenate_datasets([rows.remove_columns(columns), Dataset(numbers)], axis=1) if columns else rows


def _as_numbers(column: "ChunkedArray") -> "ChunkedArray":
    """Texts that are all whole numbers, all numbers, or all true or false, as such; any others as they are."""
    import pyarrow
    import pyarrow.compute as pc

    if not pyarrow.types.is_string(column.type):
        return column
    for kind in (pyarrow.int64(), pyarrow.float64(), pyarrow.bool_()):
        try:
            return pc.cast(pc.utf8_trim_whitespace(column), kind)
        except pyarrow.ArrowInvalid:
            pass
    return column
