"""What the columns of a dataset have to hold, and where one does not: found in Arrow's columns before any work."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from influence_core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray

SHOWN_CHARACTERS = 40  # of a wrong value


class Kind(ABC):
    """What every cell of a column has to be; no kind takes a null."""

    @abstractmethod
    def takes_all(self, column: "ChunkedArray") -> bool:
        """Whether all cells are so, told from the column as a whole; where it says no, cells are looked at singly."""

    @abstractmethod
    def takes(self, value: Any) -> bool:
        """Whether a cell is so."""

    def looks_right(self, value: Any) -> bool:
        """Whether a wrong cell would be right but for its type, that a worse one gave to the whole column."""
        return False


@dataclass(frozen=True)
class Text(Kind):
    """A string."""

    may_be_blank: bool = True

    def takes_all(self, column):
        import pyarrow.compute as pc  # here and below: it comes with datasets, which takes long to import
        from pyarrow import types

        if column.null_count or not (types.is_string(column.type) or types.is_large_string(column.type)):
            return False
        return self.may_be_blank or not pc.any(pc.equal(pc.utf8_trim_whitespace(column), "")).as_py()

    def takes(self, value):
        return isinstance(value, str) and (self.may_be_blank or bool(value.strip()))

    def __str__(self):
        return "a text" if self.may_be_blank else "a text that is not blank"


@dataclass(frozen=True)
class Label(Kind):
    """A class: a whole number from 0 on; or, where `classes` are names instead of their number, one of these."""

    classes: int | tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Empty where only the number of classes is known."""
        return () if isinstance(self.classes, int) else tuple(self.classes)

    @property
    def num_classes(self) -> int:
        return len(self.names) or self.classes

    def index(self, value: int | str) -> int:
        """The class of a cell."""
        return self.names.index(value) if isinstance(value, str) else value

    def takes_all(self, column):
        import pyarrow.compute as pc
        from pyarrow import types

        if column.null_count or not types.is_integer(column.type):
            return False
        ends = pc.min_max(column).as_py()
        return not len(column) or 0 <= ends["min"] <= ends["max"] < self.num_classes

    def takes(self, value):
        if isinstance(value, str):
            return value in self.names
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self.num_classes

    def looks_right(self, value):
        return isinstance(value, str) and value.strip().isdecimal() and self.takes(int(value))

    def __str__(self):
        names = f", or one of {', '.join(self.names)}" if self.names else ""
        return f"a whole number from 0 to {self.num_classes - 1}{names}"


def check_columns(rows: "Dataset", kinds: Mapping[str, Kind], source: str, split: str) -> None:
    """Raise UserError for a column that is not there, or a cell that is not of its column's kind: by row, from 0."""
    missing = [column for column in kinds if column not in rows.column_names]
    if missing:
        raise UserError(f"{source} has no column {missing[0]!r}, only {', '.join(rows.column_names)}")
    for column, kind in kinds.items():
        # Without a mapping of indices, the table that rows are taken from: if all of that is right, so are they.
        if kind.takes_all(rows.data.column(column)):
            continue
        wrong = [(row, value) for row, value in enumerate(_cells(rows, column)) if not kind.takes(value)]
        if wrong:
            # A null first: in a column of whole numbers it makes floats of all others.
            row, value = min(wrong, key=lambda each: (each[1] is not None, kind.looks_right(each[1])))
            others = f" ({len(wrong) - 1} more rows are wrong)" if len(wrong) > 1 else ""
            raise UserError(
                f"{source}: row {row} of the {split} split has {_shown(value)} as {column!r}, which has to be "
                f"{kind}{others}: mend such rows or leave them out"
            )


def _cells(rows: "Dataset", column: str) -> Iterator[Any]:
    for part in rows.with_format(None).select_columns(column).iter(1000):
        yield from part[column]


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    text = repr(value)
    if len(text) > SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + "…"
    return f"{text} ({type(value).__name__})"
