"""Where a task's rows come from: a dataset of the Hub, a directory or a file; which are held out; which is which."""

import glob
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
PANDAS_INDEX = "__index_level_0__"  # a column of cells that no header names
PLACE_FLAG = "--dataset_name_or_path"
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Part:
    """Rows for training or for validation."""

    rows: "Dataset"
    places: Sequence[tuple[str, int]]  # of each row: split of the dataset, number in it from 0

    def __len__(self) -> int:
        return len(self.places)

    def select(self, indices: Sequence[int]) -> "Part":
        """Some of the rows."""
        return Part(self.rows.select(indices), [self.places[index] for index in indices])


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
            if split != "train":
                self.part("train")
            self._parts |= self._held_out() if self._holds_out else {split: self._whole(split)}
            if split == "validation":
                self._note_overlap()
        return self._parts[split]

    def name(self, split: str, first: int, last: int | None = None) -> str:
        """Such as "row 7", or "rows 7 to 9"; with the split of the dataset, where the task's is made of several."""
        places = self.part(split).places
        (of_first, start), (of_last, end) = places[first], places[first if last is None else last]
        if len({name for name, _ in places}) == 1:
            return f"row {start}" if start == end else f"rows {start} to {end}"
        return f"row {start} of {of_first}" + (f" to {end} of {of_last}" if (start, of_first) != (end, of_last) else "")

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
        return load_from(self.place, PLACE_FLAG, load, details, local="directory or file")

    def _whole(self, split: str) -> Part:
        name = self.splits[split] or split
        rows = self._load(split, lambda name: load_rows(self.place, self._builder, name))
        if PANDAS_INDEX in rows.column_names and isinstance(self._builder.config, csv_config()):
            raise UserError(f"the rows of {self.place} have more cells than its header names: quote cells with commas")
        columns, notes = find_columns(rows, self.wanted, self.place)
        self._say(*notes)
        if split == "train":  # a column is the same in all splits, whether it was named or found
            self.wanted = {wanted: replace(each, given=columns[wanted]) for wanted, each in self.wanted.items()}
        kinds = {column: self.wanted[wanted].kind for wanted, column in columns.items()}
        part = Part(rows, self._load(split, lambda name: places_of(self.place, self._builder, name, len(rows))))
        if are_lines(self._builder):  # a blank one separates others
            lines = rows["text"][:]
            kept = [n for n, line in enumerate(lines) if all(kind.takes(line) for kind in kinds.values())]
            if len(kept) < len(part):
                self._say(f"Note: {len(part) - len(kept)} blank lines of {self.place} are left out")
                part = part.select(kept)
        check_columns(part.rows, kinds, self.place, name)
        return Part(only_wanted(part.rows, columns), part.places)

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
        train, queries = (set(self._parts[split].places) for split in ("train", "validation"))
        if both := len(train & queries):
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
        self.num_parts = -(-len(rows) // rows_at_once)

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


# ------------------------------------------------------------------------------------------ with the datasets library


def config_names(place: str) -> tuple[list[str], str | None]:
    """(the configurations of a dataset, the one that is meant where none is named); none of a file."""
    # Here and below: only where it is needed, as it takes long to import.
    from datasets import get_dataset_config_names, get_dataset_default_config_name

    if Path(place).is_file():
        return [], None
    return get_dataset_config_names(place), get_dataset_default_config_name(place)


def csv_config() -> type:
    """Of builders that read .csv files."""
    from datasets.packaged_modules.csv.csv import CsvConfig

    return CsvConfig


def make_builder(place: str, config: str | None) -> "DatasetBuilder":
    """What reads a file, a directory or a dataset of the Hub."""
    from datasets import load_dataset_builder

    if not Path(place).is_file():
        return load_dataset_builder(place, config)
    suffix = Path(place).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{PLACE_FLAG} {place} is no file of {', '.join(READERS)}")
    return load_dataset_builder(READERS[suffix], config, data_files={"train": glob.escape(place)})


def split_names(builder: "DatasetBuilder") -> list[str]:
    """The splits of a dataset; a file is all "train"."""
    return list(getattr(builder.config, "data_files", None) or builder.info.splits or {})


def are_lines(builder: "DatasetBuilder") -> bool:
    """Whether the rows are the lines of texts."""
    return hasattr(builder.config, "keep_linebreaks")


def unread_files(place: str, builder: "DatasetBuilder") -> list[str]:
    """Files of a directory that hold data and are of no split: it reads files of one kind only."""
    if not Path(place).is_dir():
        return []
    splits = (getattr(builder.config, "data_files", None) or {}).values()
    read = {Path(file).resolve() for files in splits for file in files}
    found = (path for path in sorted(Path(place).glob("*")) if path.suffix.lower() in READERS)
    return [path.name for path in found if read and path.is_file() and path.resolve() not in read]


def places_of(place: str, builder: "DatasetBuilder", split: str, num_rows: int) -> list[tuple[str, int]]:
    """(split of the dataset, number in it) of each row of a split or of parts such as "train[:10%]+test"."""
    from datasets import ReadInstruction

    if re.fullmatch(r"\w+", split):
        return [(split, number) for number in range(num_rows)]
    names = dict.fromkeys(re.findall(r"(?:^|\+)\s*(\w+)", split))
    lengths = {name: len(load_rows(place, builder, name)) for name in names}
    parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    return [
        (part.splitname, number)
        for part in parts
        for number in range(part.from_ or 0, part.to or lengths[part.splitname])
    ]


def load_rows(place: str, builder: "DatasetBuilder", split: str) -> "Dataset":
    """The rows of a split, or of parts such as "train[:10%]+test"."""
    from datasets import load_dataset

    files, options = None, {}
    if isinstance(builder.config, csv_config()):
        options |= {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are texts
    if Path(place).exists():
        # Else datasets reads all splits, and casts their cells to the types of the first one's: 7 to "7", and a text
        # beside a 7 to one in quotation marks.
        found = builder.config.data_files or {}
        names = re.findall(r"(?:^|\+)\s*(\w+)", split)
        files = {name: found[name] for name in names if name in found} or None
    if are_lines(builder):  # which are joined again
        options |= {"keep_linebreaks": True, "encoding": "utf-8-sig"}
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
