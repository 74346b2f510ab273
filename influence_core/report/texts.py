"""Examples as texts that fit into the page: whole, or the part of each row around its strongest tokens."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from influence_core.report.codes import LENGTH_BYTES, VALUE_BYTES, encode_lengths
from influence_core.report.content import ShownSegment, Text
from influence_core.tasks.example import ExampleTask
from influence_core.tasks.pieces import PieceReader
from influence_core.text import visible

LONGEST_NAME = 200  # characters of a title, an origin, a topic
BEGINNING = 120  # characters


@dataclass
class Row:
    """One segment of an example, cut into pieces."""

    title: str
    is_right: bool
    pieces: list[str]
    starts: np.ndarray  # [pieces], number of the first token of each, in the order of `token_rows`
    end: int  # number of the token after the last
    costs: np.ndarray  # [pieces], bytes in the page, without values
    lengths: list[int]  # of each piece, as JavaScript counts characters
    weights: np.ndarray = field(init=False)  # [pieces], how strong each is, over all pairs
    num_pairs: int = 0
    window: slice = field(init=False)  # the pieces that are shown

    def __post_init__(self):
        self.weights = np.zeros(len(self.pieces))
        self.window = slice(0, len(self.pieces))

    def values(self, of_tokens: np.ndarray) -> np.ndarray:
        """[pieces], sums of the tokens' values."""
        own = of_tokens[self.starts[0] : self.end] if len(self.starts) else of_tokens[:0]
        return np.add.reduceat(own, self.starts - self.starts[0]) if len(own) else np.zeros(0)

    def window_of(self, most: int) -> slice:
        """The strongest stretch of so many pieces."""
        num = len(self.pieces)
        if num <= most:
            return slice(0, num)
        sums = np.concatenate([[0.0], np.cumsum(self.weights)])
        within = sums[most:] - sums[:-most]
        best = int(within.argmax())
        return slice(best, best + most)

    def cost(self, most: int) -> float:
        """Bytes in the page with at most so many pieces."""
        window = self.window_of(most)
        shown = window.stop - window.start
        return float(self.costs[window].sum()) + shown * (LENGTH_BYTES + VALUE_BYTES * self.num_pairs)

    def num_tokens(self, pieces: slice) -> int:
        """Of some pieces."""
        ends = np.append(self.starts, self.end)
        return int(ends[pieces.stop] - ends[pieces.start])

    def shown(self) -> ShownSegment:
        before, after = slice(0, self.window.start), slice(self.window.stop, len(self.pieces))
        text = "".join(self.pieces[self.window])
        return ShownSegment(self.title, self.is_right, text, self.num_tokens(before), self.num_tokens(after))


@dataclass
class Example:
    """A query or a training example, with the rows that are its text."""

    index: int
    rows: list[Row]
    tokens: Mapping[str, Sequence]  # as `token_rows` has them
    described: str
    origin: str | None
    topic: str | None

    def text(self) -> Text:
        """As the page shows it."""
        beginning = one_line(self.described)
        beginning = beginning[:BEGINNING] + "…" * (len(beginning) > BEGINNING)
        return Text(self.index, [row.shown() for row in self.rows], beginning, self.origin, self.topic)

    def lengths(self) -> list[str]:
        """Of the shown pieces, for each segment."""
        return [encode_lengths(row.lengths[row.window]) for row in self.rows]


class ExampleReader:
    """Makes texts of a task's examples; each split is a sequence of them."""

    def __init__(self, task: ExampleTask):
        self.task = task
        tokenizer = getattr(task, "tokenizer", None)
        self.pieces = None if tokenizer is None else PieceReader(tokenizer)

    def read(self, split: str, index: int, example: Any) -> Example:
        task = self.task
        tokens = task.token_rows(example) if self.pieces is not None else {}
        described = visible(task.describe(example))
        rows = self._rows(example, tokens) if tokens else [_row("", False, [described], np.array([0]), 0)]
        origin, topic = task.origin(split, index), task.topic(example)
        return Example(index, rows, tokens, described, short(origin), short(topic))

    def told(self, text: str) -> Example:
        """What stands in the place of an example, and is none."""
        return Example(0, [_row("", False, [text], np.array([0]), 0)], {}, text, None, None)

    def _rows(self, example: Any, tokens: Mapping[str, Sequence]) -> list[Row]:
        firsts, first = {}, 0
        for stream, rows in tokens.items():
            for number, row in enumerate(rows):
                firsts[stream, number] = first
                first += len(row)
        made = []
        for segment in self.task.segments(example):
            ids = np.asarray(tokens[segment.stream][segment.row]).tolist()
            pieces = self.pieces.read(ids)
            counts = np.array([piece.num_tokens for piece in pieces], dtype=np.int64)
            starts = firsts[segment.stream, segment.row] + np.cumsum(counts) - counts
            end = firsts[segment.stream, segment.row] + len(ids)
            texts = visible_pieces([piece.text for piece in pieces])
            made.append(_row(short(segment.title), segment.is_right, texts, starts, end))
        return made


def fit(rows: Sequence[Row], budget: float) -> int | None:
    """Choose the rows' windows so that all fit into so many bytes, all of one number of pieces, at least one.

    Returns:
        that number; None where every row is shown whole.
    """
    longest = max((len(row.pieces) for row in rows), default=0)
    if sum(row.cost(longest) for row in rows) <= budget:
        for row in rows:
            row.window = slice(0, len(row.pieces))
        return None
    low, high = 1, longest  # low fits, or nothing does
    while high - low > 1:
        middle = (low + high) // 2
        if sum(row.cost(middle) for row in rows) <= budget:
            low = middle
        else:
            high = middle
    for row in rows:
        row.window = row.window_of(low)
    return low


def one_line(text: str) -> str:
    return " ".join(text.split())


def short(text: str | None) -> str | None:
    """A name as it may be shown."""
    if text is None:
        return None
    text = visible(one_line(str(text)))
    return text if len(text) <= LONGEST_NAME else text[:LONGEST_NAME] + "…"


def visible_pieces(pieces: list[str]) -> list[str]:
    """The pieces of what is visible of their text: whether a character is shown as an escape depends on others."""
    text = "".join(pieces)
    shown = visible(text)
    if shown == text:
        return pieces
    parts, end = [], 0
    for piece in pieces:
        start = end
        for character in piece:
            end += 1 if shown[end] == character else len(ascii(character)) - 2  # its escape, less the quotes
        parts.append(shown[start:end])
    return parts


def _row(title: str, is_right: bool, pieces: list[str], starts: np.ndarray, end: int) -> Row:
    sizes = [_sizes(piece) for piece in pieces]
    costs, lengths = np.array([size for size, _ in sizes], dtype=float), [length for _, length in sizes]
    return Row(title, is_right, pieces, starts, end, costs, lengths)


@cache
def _sizes(piece: str) -> tuple[int, int]:
    """(bytes in the page, characters as JavaScript counts them)"""
    return len(html.escape(piece).encode()), len(piece.encode("utf-16-le")) // 2
