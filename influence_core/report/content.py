"""What the page says, without how it looks. All text is as it may be shown: see `influence_core.text.visible`."""

from dataclasses import dataclass, field
from typing import Any

from influence_core.report.charts import BarChart, Histogram, LineChart


@dataclass(frozen=True)
class ShownSegment:
    """A row of tokens, as a text; where it is too long for the page, the part around its strongest tokens."""

    title: str
    is_right: bool
    text: str
    num_before: int = 0  # tokens that are left out before and after the text
    num_after: int = 0


@dataclass(frozen=True)
class Text:
    """A query or a training example."""

    index: int
    segments: list[ShownSegment]
    beginning: str  # some words of it
    origin: str | None
    topic: str | None


@dataclass(frozen=True)
class Shown:
    """A training example among those that a query shows."""

    pair: int  # its place in the page's data
    index: int  # in the training set
    rank: int  # by score, from 1 of the highest
    score: float
    share: float  # of the largest magnitude that this query shows
    duplicate: str | None  # of the query: what is known of that
    before: str  # words around its strongest token, where that is known
    strongest: str
    after: str


@dataclass(frozen=True)
class Query:
    name: str
    text: Text
    top: list[Shown]
    bottom: list[Shown]  # the lowest first
    histogram: Histogram


@dataclass(frozen=True)
class Table:
    """Rows of the overview; a first row of heads, and which columns are numbers is seen by the cells."""

    heads: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A part of the overview."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[BarChart | LineChart | Histogram] = field(default_factory=list)
    examples: list["Listed"] = field(default_factory=list)


@dataclass(frozen=True)
class Listed:
    """A training example in the overview."""

    index: int
    figures: str  # what it is listed for
    beginning: str
    queries: list[int] = field(default_factory=list)  # of the page, that have it among their highest


@dataclass(frozen=True)
class Page:
    """All of it.

    Args:
        data: for page.js, JSON values that hold no text: see pairs.py.
    """

    title: str
    asked: list[tuple[str, str]]  # what was asked, by name
    scale: str  # what a score's size means
    measured: str  # what is asked about a query
    aim: str  # what the model does well where that is low
    about: str  # which data and queries these are
    unshaded: str | None  # why no tokens are shaded, and what would
    queries: list[Query]
    num_queries: int  # that have scores
    num_train: int
    texts: dict[int, Text]  # of the training examples that are shown
    sections: list[Section]
    others: list[tuple[str, str]]  # (name, file) of the pages of other scores
    data: dict[str, Any]
