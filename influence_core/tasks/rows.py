"""Where a task's rows come from: a dataset of the Hub, a directory or a file; which are held out; which is which."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_core.errors import UserError
from influence_core.tasks.columns import Wanted, check_columns, find_columns, only_wanted
from influence_core.tasks.example import is_main_process
from influence_core.tasks.loading import load_from, overheard

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

HELD_OUT = 10  # one row of so many is held out, where nothing else is for validation
PLACE_FLAG = "--dataset_name_or_path"
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Part:
    """Rows for training or for validation."""

    rows: "Dataset"
    numbers: Sequence[int]  # of each row in its split, from 0

    def __len__(self) -> int:
        return len(self.numbers)


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
        self._said: set[str] = set()

    def part(self, split: str) -> Part:
        """Loaded and checked once.

        Raises:
            UserError: there are no such rows, or not of the columns that are wanted.
        """
        if split not in self._parts:
            self._parts |= self._held_out() if self._holds_out else {split: self._whole(split)}
        return self._parts[split]

    @cached_property
    def config(self) -> str | None:
        if self.given_config or not self.usual:
            return self.given_config
        names = self._from_place(lambda: config_names(self.place))
        return self.usual if self.usual in names else None

    @cached_property
    def _builder(self) -> "DatasetBuilder":
        return self._load("train", lambda name: make_builder(self.place, self.config))

    @property
    def _holds_out(self) -> bool:
        return not self.splits["validation"] and "validation" not in split_names(self._builder)

    def _load(self, split: str, load):
        name = self.splits[split] or split
        config = f" --dataset_config {self.config}" if self.config else ""
        details = f" (--{split}_split {name}{config})"
        return self._from_place(lambda: load(name), details)

    def _from_place(self, load: Callable[[], Any], details: str = "") -> Any:
        return load_from(self.place, PLACE_FLAG, load, details, local="directory or file")

    def _whole(self, split: str) -> Part:
        name = self.splits[split] or split
        rows = self._load(split, lambda name: load_rows(self.place, self._builder, name))
        columns, notes = find_columns(rows, self.wanted, self.place)
        self._say(*notes)
        kinds = {column: self.wanted[wanted].kind for wanted, column in columns.items()}
        numbers: Sequence[int] = range(len(rows))
        if are_lines(self._builder):  # a blank one separates others
            lines = rows["text"][:]
            numbers = [n for n in numbers if all(kind.takes(lines[n]) for kind in kinds.values())]
            if len(numbers) < len(rows):
                self._say(f"Note: {len(rows) - len(numbers)} blank lines of {self.place} are left out")
            rows = rows.select(numbers)
        check_columns(rows, kinds, self.place, name)
        return Part(only_wanted(rows, columns), numbers)

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
        return {
            split: Part(whole.rows.select(each), [whole.numbers[index] for index in each])
            for split, each in numbers.items()
        }

    def _say(self, *notes: str) -> None:
        """Once, however many splits it is true of."""
        for note in notes:
            if note not in self._said and is_main_process():
                print(note)
            self._said.add(note)


class Examples(Sequence):
    """The examples of some rows, a part of them made when one of its examples is first asked for."""

    def __init__(self, rows, rows_at_once: int, make: Callable[[list[dict]], list[Any]]):
        self.rows, self.rows_at_once, self.make = rows, rows_at_once, make
        self.made: dict[int, list[Any]] = {}
        self.num_parts = -(-len(rows) // rows_at_once)

    def part(self, number: int) -> list[Any]:
        if number not in self.made:
            rows = self.rows[number * self.rows_at_once : (number + 1) * self.rows_at_once]
            if not isinstance(rows, list):  # a Dataset gives columns
                rows = [dict(zip(rows, values)) for values in zip(*rows.values())]
            self.made[number] = self.make(rows)
        return self.made[number]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        if isinstance(index, range):  # of a slice
            return [self[each] for each in index]
        return self.part(index // self.rows_at_once)[index % self.rows_at_once]


# ------------------------------------------------------------------------------------------ with the datasets library


def config_names(place: str) -> list[str]:
    """The configurations of a dataset; none of a file."""
    from datasets import get_dataset_config_names  # only where it is needed: it takes long to import

    return [] if Path(place).is_file() else get_dataset_config_names(place)


def make_builder(place: str, config: str | None) -> "DatasetBuilder":
    """What reads a file, a directory or a dataset of the Hub."""
    from datasets import load_dataset_builder

    if not Path(place).is_file():
        return load_dataset_builder(place, config)
    suffix = Path(place).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{PLACE_FLAG} {place} is no file of {', '.join(READERS)}")
    return load_dataset_builder(READERS[suffix], config, data_files={"train": place})


def split_names(builder: "DatasetBuilder") -> list[str]:
    """The splits of a dataset; a file is all "train"."""
    return list(getattr(builder.config, "data_files", None) or builder.info.splits or {})


def are_lines(builder: "DatasetBuilder") -> bool:
    """Whether the rows are the lines of texts."""
    return hasattr(builder.config, "keep_linebreaks")


def load_rows(place: str, builder: "DatasetBuilder", split: str) -> "Dataset":
    """The rows of a split, or of parts such as "train[:10%]+test"."""
    from datasets import load_dataset

    files, options = None, {}
    if Path(place).exists():
        # Else datasets reads all splits, and casts their cells to the types of the first one's: 7 to "7", and a text
        # beside a 7 to one in quotation marks.
        found = builder.config.data_files or {}
        names = re.findall(r"(?:^|\+)\s*(\w+)", split)
        files = {name: found[name] for name in names if name in found} or None
    if are_lines(builder):  # which are joined again
        options["keep_linebreaks"] = True
    if Path(place).is_file():
        place, files = READERS[Path(place).suffix.lower()], files or builder.config.data_files
    # Which file it is stands in what datasets logs of an error, not in the error.
    with overheard("datasets", lambda record: record.levelno >= logging.ERROR) as logged:
        try:
            return load_dataset(place, builder.config.name, data_files=files, split=split, **options)
        except Exception as error:
            for message in logged:
                error.add_note(message)
            raise
