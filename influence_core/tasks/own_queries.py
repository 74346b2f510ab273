"""Queries of the user's own: rows given by hand, made into examples as the dataset's rows are, each by itself."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_core.errors import UserError, first_line
from influence_core.tasks.columns import Kind, Text, shown
from influence_core.tasks.example import ExampleTask
from influence_core.tasks.nested import cell_of

Fields = Mapping[str, tuple[str, Kind]]  # see ExampleTask.row_fields
TEXT_FLAG, FILE_FLAG = "--query_text", "--query_file"


@dataclass(frozen=True)
class OwnQueries:
    """Examples, the rows that they are made of, and where each is from, such as "line 3 of mine.jsonl"."""

    examples: Sequence[Any]
    rows: Sequence[Mapping[str, Any]]
    origins: Sequence[str]
    source: str  # of them all

    def first(self, number: int) -> "OwnQueries":
        """The first so many."""
        return OwnQueries(self.examples[:number], self.rows[:number], self.origins[:number], self.source)


def read_queries(task: ExampleTask, texts: Sequence[str] | None, file: str | None) -> OwnQueries:
    """The queries of --query_text or --query_file.

    Raises:
        UserError: an example of the task is more than a text; the file can't be read; a row is none of the task's.
    """
    fields = task.row_fields()
    if texts:
        if len(fields) > 1 or not all(isinstance(kind, Text) for _, kind in fields.values()):
            raise UserError(
                f"{TEXT_FLAG}: an example here is more than a text: give {FILE_FLAG}, a file of JSON lines with the "
                f"fields {', '.join(name for name, _ in fields.values())}"
            )
        (column,) = fields
        rows, origins = [{column: text} for text in texts], _numbered(f"text {{}} of {TEXT_FLAG}", len(texts))
        for row, origin in zip(rows, origins):
            _check_row(row, row.keys(), origin)
    else:
        rows, origins = _read_lines(Path(file), fields)
    source = TEXT_FLAG if texts else file
    return OwnQueries(task.examples_of(rows, origins.__getitem__), rows, origins, source)


def _numbered(name: str, number: int) -> list[str]:
    return [name.format(each + 1) for each in range(number)]


def _read_lines(path: Path, fields: Fields) -> tuple[list[dict], list[str]]:
    """(rows, with the task's names for their cells; which line each is)"""
    try:
        if not path.is_file():
            raise UserError(f"{FILE_FLAG} {path} is {'no file' if path.exists() else 'not there'}")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{FILE_FLAG} {path} can't be read: {error.strerror}") from None
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    rows, origins = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            origin = f"line {number} of {path}"
            rows.append(_row(line, fields, origin))
            origins.append(origin)
    if not rows:
        raise UserError(f"{FILE_FLAG} {path} is empty: write a line of JSON for each query, with the fields "
                        f"{', '.join(name for name, _ in fields.values())}")  # fmt: skip
    return rows, origins


def _row(line: bytes, fields: Fields, origin: str) -> dict[str, Any]:
    try:
        cells = json.loads(line.decode())
    except UnicodeDecodeError:
        raise UserError(f"{origin} is no text in UTF-8: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise UserError(f"{origin} is no JSON ({what}): write each query as a line of its own, "
                        f"{_pattern(fields)}") from None  # fmt: skip
    if not isinstance(cells, dict):
        raise UserError(f"{origin} is {shown(cells)} and no JSON object: write {_pattern(fields)}")
    row = {}
    for column, (name, kind) in fields.items():
        try:
            value = cell_of(cells, name)
        except LookupError:
            if not kind.takes(None):
                have = f", only {', '.join(cells)}" if cells else ""
                raise UserError(f"{origin} has no field {name!r}{have}: write {_pattern(fields)}") from None
            value = None
        if not kind.takes(value):
            raise UserError(f"{origin} has {shown(value)} as {name!r}, which has to be {kind}")
        row[column] = value
    _check_row(row, [column for column, (_, kind) in fields.items() if isinstance(kind, Text)], origin)
    return row


def _check_row(row: Mapping[str, Any], columns: Sequence[str], origin: str) -> None:
    """Refuse what JSON may write and no file of text holds; and a row without a word, of which nothing can be asked."""
    texts = [row[column] or "" for column in columns]
    if not all(map(_is_text, texts)):
        raise UserError(f"{origin} holds half of a pair of surrogates, which is no character")
    if not any(text.strip() for text in texts):
        raise UserError(f"{origin} has no text: it takes some to ask about")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pattern(fields: Fields) -> str:
    """How a row is written."""
    return "{" + ", ".join(f'"{name}": …' for name, _ in fields.values()) + "}"
