"""What the datasets library reads: files, directories and datasets of the Hub, which splits and rows they have."""

import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from influence_core.errors import UserError
from influence_core.tasks.csv_cells import is_csv, more_cells, texts_of
from influence_core.tasks.loading import overheard

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

PLACE_FLAG = "--dataset_name_or_path"
PANDAS_INDEX = "__index_level_0__"  # a column of cells that no header names
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def config_names(place: str) -> tuple[list[str], str | None]:
    """(the configurations of a dataset, the one that is meant where none is named); none of a file."""
    # Here and below: only where it is needed, as it takes long to import.
    from datasets import get_dataset_config_names, get_dataset_default_config_name

    if Path(place).is_file():
        return [], None
    return get_dataset_config_names(place), get_dataset_default_config_name(place)


def make_builder(place: str, config: str | None) -> "DatasetBuilder":
    """What reads a file, a directory or a dataset of the Hub."""
    from datasets import load_dataset_builder

    if not Path(place).is_file():
        return load_dataset_builder(place, config)
    suffix = Path(place).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{PLACE_FLAG} {place} is no file of {', '.join(READERS)}")
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return load_dataset_builder(READERS[suffix], config, data_files={"train": glob.escape(place)}, **options)


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


@dataclass(frozen=True)
class Places:
    """Where rows are from: each of one of these splits, at a number in it, from 0."""

    splits: list[str]
    split_of: np.ndarray  # [rows], index of `splits`
    numbers: np.ndarray  # [rows]

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.splits[self.split_of[index]], int(self.numbers[index])

    def select(self, indices: Sequence[int]) -> "Places":
        """Those of some rows."""
        return Places(self.splits, self.split_of[list(indices)], self.numbers[list(indices)])

    def num_common(self, other: "Places") -> int:
        """Rows that are here and there."""
        return sum(
            len(np.intersect1d(self._numbers_in(split), other._numbers_in(split)))
            for split in {*self.splits} & {*other.splits}
        )

    def _numbers_in(self, split: str) -> np.ndarray:
        return self.numbers[self.split_of == self.splits.index(split)]


def places_of(place: str, builder: "DatasetBuilder", split: str, num_rows: int) -> Places:
    """Of the rows of a split, or of parts such as "train[:10%]+test"."""
    from datasets import ReadInstruction

    if re.fullmatch(r"\w+", split):
        return Places([split], np.zeros(num_rows, dtype=np.int8), np.arange(num_rows))
    names = list(dict.fromkeys(re.findall(r"(?:^|\+)\s*(\w+)", split)))
    lengths = {name: len(load_rows(place, builder, name)) for name in names}
    parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    numbers = [np.arange(part.from_ or 0, part.to or lengths[part.splitname]) for part in parts]
    split_of = [np.full(len(each), names.index(part.splitname), dtype=np.int8) for part, each in zip(parts, numbers)]
    return Places(names, np.concatenate(split_of), np.concatenate(numbers))


def rows_by_file(place: str, builder: "DatasetBuilder", split: str) -> list[tuple[str, int]]:
    """(file, how many rows it has), in the order of a split's rows; empty but for a directory that has several.

    Empty also where they can't be counted: a row then has no name but its number in the split.
    """
    files = (getattr(builder.config, "data_files", None) or {}).get(split, []) if Path(place).is_dir() else []
    if len(files) < 2:
        return []
    try:
        filled = [file for file in files if os.path.getsize(file)]
        rows = [len(load_rows(place, builder, split, {split: [file]})) for file in filled]
    except Exception:  # of files of which one alone can't be read, as one that has a header only
        return []
    return [(os.path.relpath(file, place), number) for file, number in zip(filled, rows)]


def load_rows(
    place: str, builder: "DatasetBuilder", split: str, files: Mapping[str, Sequence[str]] | None = None
) -> "Dataset":
    """The rows of a split, or of parts such as "train[:10%]+test"; all cells of a .csv file are texts.

    Args:
        files: of the splits, if not all.
    """
    from datasets import load_dataset

    options, patterns = {}, None
    if is_csv(builder):
        options |= {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are texts
    if Path(place).exists():
        # Else datasets reads all splits, and casts their cells to the types of the first one's: 7 to "7", and a text
        # beside a 7 to one in quotation marks.
        found = builder.config.data_files or {}
        names = re.findall(r"(?:^|\+)\s*(\w+)", split)
        patterns = {name: found[name] for name in names if name in found} or None
        if files is not None:
            patterns = {name: list(map(glob.escape, each)) for name, each in files.items()}
        if is_csv(builder):
            read = files or patterns or found
            options["features"] = texts_of([file for each in read.values() for file in each], builder)
    if are_lines(builder):  # which are joined again
        options |= {"keep_linebreaks": True, "encoding": "utf-8-sig"}
    if Path(place).is_file():
        if is_csv(builder):
            options["sep"] = builder.config.sep
        place, patterns = READERS[Path(place).suffix.lower()], patterns or builder.config.data_files
    # Which file it is stands in what datasets logs of an error, not in the error.
    with overheard("datasets", lambda record: record.levelno >= logging.ERROR) as logged:
        try:
            rows = load_dataset(place, builder.config.name, data_files=patterns, split=split, **options)
            if is_csv(builder) and PANDAS_INDEX in rows.column_names:
                raise more_cells(place)
            return rows
        except Exception as error:
            for message in logged:
                error.add_note(message)
            raise
