"""Which columns of a dataset a task reads, and what they have to hold: found in Arrow's columns before any work."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from influence_core.errors import UserError
from influence_core.tasks.nested import nested_names, nested_type

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray, DataType

SHOWN_CHARACTERS = 40  # of a wrong value


class Kind(ABC):
    """What every cell of a column has to be; no kind takes a null."""

    @abstractmethod
    def takes_all(self, column: "ChunkedArray") -> bool:
        """Whether all cells are so, told from the column as a whole; where it says no, cells are looked at singly."""

    @abstractmethod
    def takes(self, value: Any) -> bool:
        """Whether a cell is so."""

    @abstractmethod
    def is_type(self, column: "DataType") -> bool:
        """Whether a column of this type may be meant, as far as types tell."""

    def looks_right(self, value: Any) -> bool:
        """Whether a wrong cell would be right but for its type, that a worse one gave to the whole column."""
        return False

    @property
    def may_be_number(self) -> bool:
        """Whether a text of digits is to be read as a number."""
        return False

    def objection(self, cells: Iterable[Any]) -> str | None:
        """What is wrong with a column whose cells are all right."""
        return None

    def note(self, column: "ChunkedArray") -> str | None:
        """What a person should know of a column that is right."""
        return None

    def remedy(self, cells: Iterable[Any]) -> str:
        """What is to be done about cells of which some are wrong."""
        return "mend such rows or leave them out"


@dataclass(frozen=True)
class Text(Kind):
    """A string; where it may be missing, a null is as good as an empty one."""

    may_be_blank: bool = True
    may_be_missing: bool = False

    def takes_all(self, column):
        import pyarrow.compute as pc  # here and below: it comes with datasets, which takes long to import

        if not self.is_type(column.type) or (column.null_count and not self.may_be_missing):
            return False
        return self.may_be_blank or not pc.any(pc.equal(pc.utf8_trim_whitespace(column), "")).as_py()

    def is_type(self, column):
        from pyarrow import types

        return types.is_string(column) or types.is_large_string(column)

    def takes(self, value):
        if value is None:
            return self.may_be_missing
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

    def is_type(self, column):
        from pyarrow import types

        return types.is_integer(column) or (bool(self.names) and types.is_string(column))

    def takes(self, value):
        if isinstance(value, str):
            return value in self.names
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self.num_classes

    def looks_right(self, value):
        return isinstance(value, str) and value.strip().isdecimal() and self.takes(int(value))

    @property
    def may_be_number(self):
        return not any(name.isdecimal() for name in self.names)

    def note(self, column):
        import pyarrow.compute as pc

        if len(column) and not any(self.index(value) == 0 for value in pc.unique(column).to_pylist()):
            return "no row is of class 0, from which classes count"
        return None

    def remedy(self, cells):
        numbers = {int(cell) for cell in cells if str(cell).isdecimal()}
        if min(numbers, default=0) == 1 and max(numbers) == self.num_classes:
            return "they seem to count from 1: subtract 1 from all"
        return super().remedy(cells)

    def __str__(self):
        names = f", or one of {', '.join(self.names)}" if self.names else ""
        return f"a whole number from 0 to {self.num_classes - 1}{names}"


@dataclass(frozen=True)
class Ending(Label):
    """One of several endings: by its number from 0, which may be written as a text, or by its letter from A."""

    @property
    def letters(self) -> str:
        return ascii_uppercase[: self.num_classes]

    def index(self, value):
        if not isinstance(value, str):
            return value
        return int(value) if value.isdecimal() else self.letters.index(value.upper())

    def is_type(self, column):
        from pyarrow import types

        return types.is_integer(column) or types.is_string(column)

    def objection(self, cells):
        written = {isinstance(cell, str) and not cell.isdecimal() for cell in cells}
        return "letters in some rows and numbers in others: write all alike" if len(written) > 1 else None

    def takes(self, value):
        if isinstance(value, str) and value.isdecimal():
            return super().takes(int(value))
        return super().takes(value) or (isinstance(value, str) and len(value) == 1 and value.upper() in self.letters)

    def __str__(self):
        return f"{super().__str__()}, or a letter from A to {self.letters[-1]}"


@dataclass(frozen=True)
class Wanted:
    """A column that a task reads."""

    kind: Kind
    flag: str | None = None  # by which it may be named
    given: str | None = None  # by that flag
    may_be_found: bool = True  # by its type, where it is not named


def find_columns(
    types: Mapping[str, "DataType"], wanted: Mapping[str, Wanted], source: str
) -> tuple[dict[str, str], list[str]]:
    """({the task's name of a column: the dataset's}, notes of what was not named).

    What a flag names; else the column of the task's own name; else the only one left whose type fits, which for a
    label has to be the only one at all: any number might be one. A flag may also name a part of a column's cells.

    Args:
        types: of the dataset's columns.
    Raises:
        UserError: there is no such column, or it could be one of several.
    """
    names = ", ".join(name for column, kind in types.items() for name in nested_names(column, kind))
    found: dict[str, str] = {}
    for name, each in wanted.items():
        if each.given is not None and each.given not in types and nested_type(types, each.given) is None:
            raise UserError(f"{source} has no column {each.given!r} ({each.flag}), only {names}{_hint(types)}")
        if each.given is not None or name in types:
            found[name] = each.given or name
    twice = [column for column in found.values() if list(found.values()).count(column) > 1]
    if twice:
        named = ", ".join(str(wanted[name].flag or name) for name, column in found.items() if column == twice[0])
        raise UserError(f"the column {twice[0]!r} of {source} is wanted twice ({named}): name another for one of them")
    fitting = {
        name: [column for column, kind in types.items() if column not in found.values() and each.kind.is_type(kind)]
        for name, each in wanted.items()
        if name not in found
    }
    notes = []
    for name, columns in fitting.items():
        flag = wanted[name].flag
        others = [column for column in types if column not in found.values()]
        is_clear = len(columns) == 1 and (columns == others or not isinstance(wanted[name].kind, Label))
        if (
            flag is None
            or not is_clear
            or not wanted[name].may_be_found
            or sum(columns == other for other in fitting.values()) > 1
        ):
            remedy = "" if flag is None else f": name the one that is meant with {flag}"
            raise UserError(f"{source} has no column {name!r}, only {names}{_hint(types) or remedy}")
        found[name] = columns[0]
        notes.append(f"Note: {flag} is {columns[0]!r}, the only column of {source} that it could be")
    return found, notes


def _hint(types: Mapping[str, Any]) -> str:
    """Where a header was not taken apart."""
    whole = next(iter(types)) if len(types) == 1 else ""
    separator = next((each for each in (";", "\t", "|") if each in whole), None)
    return "" if separator is None else f": its cells are separated by {separator!r}, write them with commas or as .tsv"


def only_wanted(rows: "Dataset", columns: Mapping[str, str]) -> "Dataset":
    """The rows with these columns, called as the task calls them, and their topic."""
    kept = [column for column in ("topic",) if column in rows.column_names and column not in columns.values()]
    rows = rows.select_columns([*columns.values(), *kept])
    return rows.rename_columns({column: name for name, column in columns.items() if name != column})


def notes_on_columns(rows: "Dataset", kinds: Mapping[str, Kind]) -> list[str]:
    """What a person should know of columns that are right."""
    notes = {column: kind.note(rows.data.column(column)) for column, kind in kinds.items()}
    return [f"{note} ({column!r})" for column, note in notes.items() if note]


def check_columns(rows: "Dataset", kinds: Mapping[str, Kind], source: str, where: Callable[[int], str]) -> None:
    """Raise UserError for a cell that is not of its column's kind.

    Args:
        where: a row is, as a person finds it.
    """
    for column, kind in kinds.items():
        # Without a mapping of indices, the table that rows are taken from: if all of that is right, so are they.
        if kind.takes_all(rows.data.column(column)):
            continue
        wrong = [(row, value) for row, value in enumerate(_cells(rows, column)) if not kind.takes(value)]
        # In a column of whole numbers, a null makes floats of all others, and a word makes texts of them.
        wrong = [each for each in wrong if not kind.looks_right(each[1])] or wrong
        if wrong:
            row, value = min(wrong, key=lambda each: each[1] is not None)
            others = f" ({len(wrong) - 1} more rows are wrong)" if len(wrong) > 1 else ""
            raise UserError(
                f"{source}: {where(row)} has {shown(value)} as {column!r}, which has to be {kind}{others}: "
                f"{kind.remedy(_cells(rows, column))}"
            )
        if objection := kind.objection(_cells(rows, column)):
            raise UserError(f"{source}: {column!r} has {objection}")


def _cells(rows: "Dataset", column: str) -> Iterator[Any]:
    for part in rows.with_format(None).select_columns(column).iter(1000):
        yield from part[column]


def shown(value: Any) -> str:
    """A wrong value, as a message names it."""
    if value is None:
        return "nothing (null)"
    text = repr(value)
    if len(text) > SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + "…"
    return f"{text} ({type(value).__name__})"
