"""The queries of the page, each with its highest and lowest training examples, and what their scores are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from influence_core.report.analysed import Analysed
from influence_core.report.charts import histogram
from influence_core.report.codes import encode_values, rounded
from influence_core.report.content import Query, Shown
from influence_core.report.duplicates import describe_duplicate, same_tokens, shared_words
from influence_core.report.layers import by_depth, by_kind
from influence_core.report.texts import Example, ExampleReader, Row, one_line, short
from influence_core.scores.parts import shown_pairs
from influence_core.tasks.example import ExampleTask

BEFORE, AFTER = 24, 90  # characters on either side of the strongest token


@dataclass
class Pair:
    """A query and a training example that it shows."""

    query: int
    index: int
    train_values: np.ndarray | None = None  # by token, and the last of what has no position
    query_values: np.ndarray | None = None
    layer_sums: np.ndarray | None = None  # by depth, then by kind


@dataclass
class Shelf:
    """All examples that the page shows, read once."""

    task: ExampleTask
    query_dataset: Sequence[Any]
    train_dataset: Sequence[Any]
    origins: Sequence[str] | None = None  # of the queries, where they are no examples of the validation split
    are_summed: bool = False  # the queries, to one
    queries: dict[int, Example] = field(default_factory=dict)
    train: dict[int, Example] = field(default_factory=dict)

    def __post_init__(self):
        self._reader = ExampleReader(self.task)

    def query(self, index: int) -> Example:
        if index not in self.queries:
            self.queries[index] = self._read_query(index)
        return self.queries[index]

    def _read_query(self, index: int) -> Example:
        if self.are_summed:
            return self._reader.told(f"All {len(self.query_dataset):,} queries together: their gradients are summed.")
        example = self._reader.read("validation", index, self.query_dataset[index])
        return example if self.origins is None else replace(example, origin=short(self.origins[index]))

    def of_training(self, index: int) -> Example:
        if index not in self.train:
            self.train[index] = self._reader.read("train", index, self.train_dataset[index])
        return self.train[index]

    @property
    def rows(self) -> list[Row]:
        """Of all examples."""
        return [row for example in (*self.queries.values(), *self.train.values()) for row in example.rows]


def find_pairs(analysed: Analysed, num_queries: int, num_each: int) -> list[Pair]:
    """Those to show, with what is known of their scores; of each query the highest first."""
    pairs = [Pair(*pair) for pair in shown_pairs(torch.from_numpy(analysed.scores), num_queries, num_each)]
    parts = analysed.parts
    if parts is None:
        return pairs
    rows = {pair: row for row, pair in enumerate(parts.pairs)}
    by_layer = parts.by_layer.double().numpy()
    sums = np.concatenate([groups.sums(by_layer) for groups in (by_depth(parts.layers), by_kind(parts.layers))], axis=1)
    for pair in pairs:
        row = rows.get((pair.query, pair.index))
        if row is not None:
            pair.layer_sums = sums[row]
            if parts.train_tokens is not None:
                pair.train_values = parts.train_tokens[row].double().numpy()
            if parts.query_tokens is not None:
                pair.query_values = parts.query_tokens[row].double().numpy()
    return pairs


def weigh(rows: Sequence[Row], values: np.ndarray | None) -> None:
    """Note which pieces a pair's values are strong at."""
    if values is not None and (strongest := np.abs(values).max(initial=0)):
        for row in rows:
            row.weights += np.abs(row.values(values)) / strongest
            row.num_pairs += 1


def read_pairs(shelf: Shelf, pairs: Sequence[Pair]) -> None:
    """Put the examples on the shelf, and note where they are strong."""
    for pair in pairs:
        weigh(shelf.of_training(pair.index).rows, pair.train_values)
        weigh(shelf.query(pair.query).rows, pair.query_values)


def pair_data(shelf: Shelf, pair: Pair) -> list:
    """What page.js draws of a pair: [training side, query side, layers]; 0 in place of what is not known."""
    sides = [
        _side(shelf.of_training(pair.index).rows, pair.train_values),
        _side(shelf.query(pair.query).rows, pair.query_values),
    ]
    return [*sides, 0 if pair.layer_sums is None else encode_values(pair.layer_sums)]


def _side(rows: Sequence[Row], values: np.ndarray | None) -> Any:
    """[strongest, codes, sum of what has no position, sums of what each row leaves out, or 0]"""
    if values is None:
        return 0
    by_row = [row.values(values) for row in rows]
    shown = [of_row[row.window] for row, of_row in zip(rows, by_row)]
    cut = [len(kept) < len(of_row) for of_row, kept in zip(by_row, shown)]
    left_out = [rounded(float(of_row.sum() - kept.sum())) for of_row, kept in zip(by_row, shown)] if any(cut) else 0
    rest = float(values.sum() - sum(of_row.sum() for of_row in by_row))
    negligible = abs(rest) < 1e-5 * np.abs(values).sum()
    return [*encode_values(np.concatenate(shown)), 0 if negligible else rounded(rest), left_out]


def make_query(shelf: Shelf, analysed: Analysed, pairs: Sequence[tuple[int, Pair]], num_each: int) -> Query:
    """One query of the page.

    Args:
        pairs: all of this query's with their numbers, the highest score first.
    """
    example = shelf.query(pairs[0][1].query)
    scores = analysed.scores[example.index]
    order = np.argsort(-scores, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    largest = max(abs(float(scores[pair.index])) for _, pair in pairs) or 1.0
    shown = [_shown(shelf, example, pair, number, int(rank[pair.index]), float(scores[pair.index]), largest)
             for number, pair in pairs]  # fmt: skip
    num_top = min(num_each, -(-len(shown) // 2))
    top, bottom = shown[:num_top], shown[num_top:][::-1]
    marked = [(each.index, each.rank <= num_top) for each in shown]
    name = "The sum of all queries" if shelf.are_summed else f"Query {example.index}"
    title = f"Scores of all {len(scores):,} training examples for {name[0].lower()}{name[1:]}"
    return Query(name, example.text(), top, bottom, histogram(title, scores, marked))


def _shown(shelf: Shelf, query: Example, pair: Pair, number: int, rank: int, score: float, largest: float) -> Shown:
    example = shelf.of_training(pair.index)
    is_same = same_tokens(query.tokens, example.tokens)
    duplicate = describe_duplicate(shared_words(query.described, example.described), is_same)
    return Shown(number, pair.index, rank, score, score / largest, duplicate, *_around(example, pair))


def _around(example: Example, pair: Pair) -> tuple[str, str, str]:
    """Words before the strongest token, itself, and words after it; without tokens, how the text begins."""
    if pair.train_values is None:
        return example.text().beginning, "", ""
    rows = [(row, values) for row in example.rows if len(values := np.abs(row.values(pair.train_values)))]
    if not rows:
        return example.text().beginning, "", ""
    row, values = max(rows, key=lambda each: each[1].max())
    best = int(values.argmax())
    before, after = "".join(row.pieces[:best]), "".join(row.pieces[best + 1 : best + 1 + AFTER])
    if len(before) > BEFORE:  # from the start of a word
        before = "…" + before[-BEFORE:].partition(" ")[2] if " " in before[-BEFORE:] else "…" + before[-BEFORE:]
    strongest = one_line(row.pieces[best])
    return _tidy(before + " " * row.pieces[best][:1].isspace()), strongest or "⏎", _tidy(after[:AFTER])


def _tidy(text: str) -> str:
    """In one line, with a space where one was at the ends."""
    line = one_line(text)
    return " " * text[:1].isspace() + line + " " * (text[-1:].isspace() and bool(line))
