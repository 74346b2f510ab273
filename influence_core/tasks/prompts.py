"""What a row begins with, before answer, target or ending: the text of one column, or of several joined."""

from collections.abc import Mapping, Sequence
from typing import Any

from influence_core.tasks.columns import Kind, Text
from influence_core.tasks.rows import UnfitRow

PROMPT_FLAG = "--prompt_column"


class Prompt:
    """The columns that it is made of, and how.

    Args:
        flag: by which the user names the dataset's columns.
        own: the task's own columns, where none is named.
        given: by the flag; of several, such as an instruction and its input, those that are blank or missing in a row
            are left out.
    """

    def __init__(self, flag: str, own: Sequence[str], given: Sequence[str] | str | None):
        is_named = bool(given)
        given = [given] if isinstance(given, str) else list(given or own)
        self.is_own = given == list(own)
        self.given = given
        self.names = [*own, *map("part {}".format, range(len(own), len(given)))][: len(given)]
        kind = Text() if self.is_own or len(given) == 1 else Text(may_be_missing=True)
        self.columns: dict[str, Kind] = dict.fromkeys(self.names, kind)
        self.named_columns = {
            name: (flag, column if is_named else None, len(own) == 1) for name, column in zip(self.names, given)
        }

    def texts(self, rows: Sequence[Mapping[str, Any]], separator: str) -> list[str]:
        """Of each row; UnfitRow where all of several columns are blank."""
        for index, row in enumerate(rows):
            if len(self.names) > 1 and not any((row[name] or "").strip() for name in self.names):
                raise UnfitRow(index, f"has nothing in any of {', '.join(map(repr, self.given))}")
        return [self.text(row, separator) for row in rows]

    def text(self, row: Mapping[str, Any], separator: str) -> str:
        """Of a row."""
        if len(self.names) == 1:
            return row[self.names[0]]
        return separator.join(row[name] for name in self.names if (row[name] or "").strip())
