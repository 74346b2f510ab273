"""The page of one strategy's scores: put together, rendered, written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence_core.files import write_whole
from influence_core.report.analysed import Analysed
from influence_core.report.codes import rounded
from influence_core.report.content import Page
from influence_core.report.layers import by_depth, by_kind
from influence_core.report.overview import experiments, influential, self_influence
from influence_core.report.queries import Pair, Shelf, find_pairs, make_query, pair_data, read_pairs
from influence_core.report.render import render
from influence_core.report.run import asked, run_sections
from influence_core.report.texts import fit, short
from influence_core.scores.parts import SHOWN_EACH
from influence_core.tasks.example import ExampleTask

FLAG = "--compute_per_token_scores"
PAGE_BYTES, PAGE_QUERIES = 5_000_000, 50  # at most, for so many queries; in proportion for more
TEXT_SHARE = 0.85  # of these, for texts, tokens and values, at first: the rest is seen when the page is made
MARGIN = 5_000  # bytes


def write_page(
    path: Path,
    task: ExampleTask,
    query_dataset: Sequence[Any],
    train_dataset: Sequence[Any],
    analysed: Analysed,
    num_queries: int,
    flags: Mapping[str, Any],
    others: Sequence[tuple[str, str]] = (),
    origins: Sequence[str] | None = None,
) -> None:
    """Write the page of these scores, whole or not at all.

    Args:
        num_queries: the first so many are shown, at most.
        flags: of the script, for what was asked.
        others: (name, file) of pages of other scores beside this one.
        origins: where each query is from, if not of the validation split.
    Raises:
        UserError: it can't be written.
    """
    draft = Draft(task, query_dataset, train_dataset, analysed, num_queries, flags, others, origins)
    limit = PAGE_BYTES * max(1.0, draft.num_queries / PAGE_QUERIES)
    budget = limit * TEXT_SHARE
    while True:
        text = render(draft.page(budget)).encode()
        if len(text) <= limit or budget <= 0:
            break
        budget -= len(text) - limit + MARGIN
    write_whole(path, lambda temporary: Path(temporary).write_bytes(text))


class Draft:
    """What the page says, but for how much of the texts it has room for; arguments as `write_page` has them."""

    def __init__(self, task, query_dataset, train_dataset, analysed, num_queries, flags=None, others=(), origins=None):
        self.task, self.analysed = task, analysed
        self.others = [(short(name), file) for name, file in others]
        self.num_queries = min(num_queries, len(analysed.scores))
        self.shelf = Shelf(task, query_dataset, train_dataset, origins, analysed.are_summed)
        self.pairs = find_pairs(analysed, self.num_queries, SHOWN_EACH)
        read_pairs(self.shelf, self.pairs)
        self.asked = asked(analysed, flags or {})
        self.sections = [
            *influential(analysed, self.shelf, SHOWN_EACH, self.num_queries),
            *self_influence(analysed, self.shelf, SHOWN_EACH),
            *experiments(analysed),
            *run_sections(analysed),
        ]
        self.of_query: dict[int, list[tuple[int, Pair]]] = {}
        for number, pair in enumerate(self.pairs):
            self.of_query.setdefault(pair.query, []).append((number, pair))
        self.queries = [make_query(self.shelf, analysed, own, SHOWN_EACH) for own in self.of_query.values()]

    def page(self, text_bytes: float = float("inf")) -> Page:
        """With texts, tokens and values of at most so many bytes."""
        fit(self.shelf.rows, text_bytes)
        shelf, analysed = self.shelf, self.analysed
        layers = [] if analysed.parts is None else analysed.parts.layers
        data = {
            "depths": by_depth(layers).names,
            "kinds": by_kind(layers).names,
            "queries": [shelf.query(index).lengths() for index in self.of_query],
            "examples": {str(index): shelf.train[index].lengths() for index in sorted(shelf.train)},
            "pairs": [pair_data(shelf, pair) for pair in self.pairs],
            "scores": [rounded(float(analysed.scores[pair.query, pair.index]), 6) for pair in self.pairs],
        }
        has_tokens = any(pair.train_values is not None for pair in self.pairs)
        return Page(
            title=short(f"{self.task.name}: influence by {analysed.name}"),
            asked=self.asked,
            scale=_scale(analysed),
            measured=self.task.measured,
            aim=self.task.aim,
            about=self._about(),
            unshaded=None if has_tokens else f"No tokens are shaded: add {FLAG} to analyze.py, and they are.",
            queries=[replace(query, text=shelf.query(query.text.index).text()) for query in self.queries],
            num_queries=len(self.analysed.scores),
            num_train=len(shelf.train_dataset),
            texts={index: shelf.train[index].text() for index in sorted(shelf.train)},
            sections=self.sections,
            others=self.others,
            data=data,
        )

    def _about(self) -> str:
        """Which model, data and queries."""
        known, num_queries = dict(self.asked), len(self.shelf.query_dataset)
        queries = f"{num_queries:,} queries"
        if self.analysed.are_summed:
            queries += ", summed"
        elif self.num_queries < num_queries:
            queries += f", of which the first {self.num_queries:,} are here"
        whose = "of your own" if self.shelf.origins is not None else "that the model was not trained on"
        sizes = f"{len(self.shelf.train_dataset):,} training examples; {queries} ({whose})"
        data = f"{known['Data']}: {sizes}" if "Data" in known else sizes
        return f"{data}. Model: {known['Model']}."


def _scale(analysed: Analysed) -> str:
    if analysed.scale is None:
        return "Their size has no unit: only their order means something."
    return (
        f"Trust the order, not the size: divided by {analysed.scale:,.6g} a score would be the change if the example "
        "were left out of training, and what retraining does is often many times smaller."
    )
