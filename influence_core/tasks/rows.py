"""Where a task's rows come from: a dataset of the Hub, a directory or a file; which are held out; which is which."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from influence_core.errors import UserError, first_line
from influence_core.tasks.bars import bars_of_datasets
from influence_core.tasks.columns import Wanted, check_columns, find_columns, notes_on_columns, only_wanted
from influence_core.tasks.csv_cells import column_types, is_csv, with_numbers
from influence_core.tasks.example import is_main_process
from influence_core.tasks.loading import load_from
from influence_core.tasks.nested import longer_lists, with_nested
from influence_core.tasks.reading import (
    PLACE_FLAG,
    Places,
    are_lines,
    config_names,
    load_rows,
    make_builder,
    places_of,
    rows_by_file,
    split_names,
    unread_files,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

HELD_OUT = 10  # one row of so many is held out, where nothing else is for validation


@dataclass(frozen=True)
class Part:
    """Rows for training or for validation."""

    rows: "Dataset"
    places: Places  # of each row

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> "Part":
        """Some of the rows."""
        return Part(self.rows.select(indices), self.places.select(indices))


class RowSource:
    """The rows of "train" and "validation", their columns called as the task calls them.

    Args:
        place: a Hub id, a directory in the Hub's layout, or a file.
        config: of a dataset that has several; None: the `usual` one, where the dataset has it.
        splits: {"train", "validation": the split or part of one that was asked for, or None}
        wanted: {the task's name of a column: what it has to be, and how it may be named}
        holds_out_the_end: the last rows are held out where there is no validation split, else rows from everywhere.
    """

    def __init__(
        self, place: str, config: str | None, usual: str | None, splits: Mapping[str, str | None],
        wanted: Mapping[str, Wanted], holds_out_the_end: bool,
    ):  # fmt: skip
        self.place, self.given_config, self.usual = place, config, usual
        self.splits, self.wanted, self.holds_out_the_end = splits, wanted, holds_out_the_end
        self._parts: dict[str, Part] = {}
        self._files: dict[str, list[tuple[str, int]]] = {}  # by split
        self._said: set[str] = set()

    def part(self, split: str) -> Part:
        """Loaded and checked once.

        Raises:
            UserError: there are no such rows, or not of the columns that are wanted.
        """
        if split not in self._parts:
            if split != "train":
                self.part("train")
            self._parts |= self._held_out() if self._holds_out else {split: self._whole(split)}
            if split == "validation":
                self._note_overlap()
        return self._parts[split]

    def name(self, split: str, first: int, last: int | None = None) -> str:
        """Such as "row 7", or "rows 7 to 9"; with the file or the split of the dataset, where there are several."""
        part = self.part(split)
        of_first, start = self._place(part, first)
        of_last, end = self._place(part, first if last is None else last)
        if of_first != of_last:
            return f"row {start} of {of_first} to row {end} of {of_last}"
        rows = f"row {start}" if start == end else f"rows {start} to {end}"
        return rows + (f" of {of_first}" if of_first else "")

    def _place(self, part: Part, index: int) -> tuple[str | None, int]:
        """(the file or the split that a row is in, where there are several; its number there)"""
        places = part.places
        of_split, number = places[index]
        if of_split not in self._files:
            with bars_of_datasets(self.place):
                self._files[of_split] = rows_by_file(self.place, self._builder, of_split)
        for file, rows in self._files[of_split]:
            if number < rows:
                return file, number
            number -= rows
        return of_split if len(places.splits) > 1 else None, number

    @cached_property
    def config(self) -> str | None:
        if self.given_config:
            return self.given_config
        names, default = self._from_place(lambda: config_names(self.place))
        if self.usual in names:
            return self.usual
        if len(names) > 1 and default is None:
            raise UserError(f"{self.place} has several configurations, name one with --dataset_config: "
                            f"{', '.join(names)}")  # fmt: skip
        return None

    @cached_property
    def _builder(self) -> "DatasetBuilder":
        builder = self._load("train", lambda name: make_builder(self.place, self.config))
        unread = unread_files(self.place, builder)
        if unread:
            shown = ", ".join(unread[:4]) + (f", … ({len(unread)} in all)" if len(unread) > 4 else "")
            self._say(f"Note: files of {self.place} that are not read, as others are of another kind: {shown}")
        return builder

    @property
    def _holds_out(self) -> bool:
        return not self.splits["validation"] and "validation" not in split_names(self._builder)

    def _load(self, split: str, load):
        name = self.splits[split] or split
        config = f" --dataset_config {self.config}" if self.config else ""
        details = f" (--{split}_split {name}{config})"
        return self._from_place(lambda: load(name), details)

    def _from_place(self, load: Callable[[], Any], details: str = "") -> Any:
        with bars_of_datasets(self.place):
            return load_from(self.place, PLACE_FLAG, load, details, local="directory or file")

    def _whole(self, split: str) -> Part:
        part = self._read(split)
        try:
            part.rows.data.validate(full=True)
        except ValueError as error:  # of bytes that their reader took for text without a look
            raise UserError(
                f"{self.place} holds text that is not UTF-8 ({first_line(error)}): save it as UTF-8"
            ) from None
        return part

    def _read(self, split: str) -> Part:
        name = self.splits[split] or split
        rows = self._load(split, lambda name: load_rows(self.place, self._builder, name))
        columns, notes = find_columns(column_types(rows, self._builder), self.wanted, self.place)
        self._say(*notes)
        if split == "train":  # a column is the same in all splits, whether it was named or found
            self.wanted = {wanted: replace(each, given=columns[wanted]) for wanted, each in self.wanted.items()}
        kinds = {column: self.wanted[wanted].kind for wanted, column in columns.items()}
        nested = [column for column in kinds if column not in rows.column_names]
        self._say(*(f"Note: {note} of {self.place}" for note in longer_lists(rows, nested)))
        rows = self._from_place(lambda: with_nested(rows, nested, self.place))
        if is_csv(self._builder):
            rows = with_numbers(rows, [column for column, kind in kinds.items() if kind.may_be_number])
        part = Part(rows, self._load(split, lambda name: places_of(self.place, self._builder, name, len(rows))))
        if are_lines(self._builder):  # a blank one separates others
            lines = rows["text"][:]
            kept = [n for n, line in enumerate(lines) if all(kind.takes(line) for kind in kinds.values())]
            if len(kept) < len(part):
                self._say(f"Note: {len(part) - len(kept)} blank lines of {self.place} are left out")
                part = part.select(kept)
        check_columns(part.rows, kinds, self.place, lambda row: self._where(part, name, row))
        if split == "train":
            self._say(*(f"Note: {note} of {self.place}" for note in notes_on_columns(part.rows, kinds)))
        return Part(only_wanted(part.rows, columns), part.places)

    def _where(self, part: Part, split: str, row: int) -> str:
        """Such as "row 7 of the train split", and where it is in its file, where there are several."""
        of, number = self._place(part, row)
        return f"row {row} of the {split} split" + (f", row {number} of {of}," if of else "")

    def _held_out(self) -> dict[str, Part]:
        whole = self._whole("train")
        if len(whole) < 2:
            raise UserError(f"{self.place} has no validation split, and too few rows ({len(whole)}) to hold one out")
        number = -(-len(whole) // HELD_OUT)
        if self.holds_out_the_end:
            which, held_out = "the last", range(len(whole) - number, len(whole))
        else:
            which, held_out = f"every {HELD_OUT}th,", range((len(whole) - 1) % HELD_OUT, len(whole), HELD_OUT)
        self._say(f"Note: {self.place} has no validation split: {which} {number} of its {len(whole)} rows are held out")
        numbers = {"train": [row for row in range(len(whole)) if row not in held_out], "validation": held_out}
        return {split: whole.select(each) for split, each in numbers.items()}

    def _note_overlap(self) -> None:
        if both := self._parts["train"].places.num_common(self._parts["validation"].places):
            self._say(f"Note: {both} rows are in the training set and among the queries")

    def _say(self, *notes: str) -> None:
        """Once, however many splits it is true of."""
        for note in notes:
            if note not in self._said and is_main_process():
                print(note)
            self._said.add(note)


class UnfitRow(Exception):
    """A row that no example can be made of.

    Args:
        index: among those that were to be made into examples together.
        reason: what is wrong, after the name of the row.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index, self.reason = index, reason


class Examples(Sequence):
    """The examples of some rows, a part of them made when one of its examples is first asked for.

    Args:
        make: examples of rows, one each; may raise UnfitRow.
        name: of a row, by its index.
    """

    def __init__(
        self,
        rows,
        rows_at_once: int,
        make: Callable[[list[dict]], list[Any]],
        name: Callable[[int], str] = "row {}".format,
    ):
        self.rows, self.rows_at_once, self.make, self.name = rows, rows_at_once, make, name
        self.made: dict[int, list[Any]] = {}

    def part(self, number: int) -> list[Any]:
        if number not in self.made:
            rows = self.rows[number * self.rows_at_once : (number + 1) * self.rows_at_once]
            if not isinstance(rows, list):  # a Dataset gives columns
                rows = [dict(zip(rows, values)) for values in zip(*rows.values())]
            try:
                self.made[number] = self.make(rows)
            except UnfitRow as error:
                name = self.name(number * self.rows_at_once + error.index)
                raise UserError(f"{name} {error.reason}: mend such rows or leave them out") from None
        return self.made[number]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        if isinstance(index, range):  # of a slice
            return [self[each] for each in index]
        return self.part(index // self.rows_at_once)[index % self.rows_at_once]
