"""The page of one strategy's scores: put together, rendered, written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from influence_core.files import write_whole
from influence_core.report.analysed import Analysed
from influence_core.report.content import Page
from influence_core.report.layers import by_depth, by_kind
from influence_core.report.overview import experiments, influential, self_influence
from influence_core.report.queries import Pair, Shelf, find_pairs, fit_into_page, make_query, pair_data
from influence_core.report.render import render
from influence_core.report.run import asked, run_sections
from influence_core.scores.parts import SHOWN_EACH
from influence_core.tasks.example import ExampleTask

FLAG = "--compute_per_token_scores"


def write_page(
    path: Path,
    task: ExampleTask,
    query_dataset: Sequence[Any],
    train_dataset: Sequence[Any],
    analysed: Analysed,
    num_queries: int,
    flags: Mapping[str, Any],
    others: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page of these scores, whole or not at all.

    Args:
        num_queries: the first so many are shown, at most.
        flags: of the script, for what was asked.
        others: (name, file) of pages of other scores beside this one.
    Raises:
        UserError: it can't be written.
    """
    page = make_page(task, query_dataset, train_dataset, analysed, num_queries, flags, others)
    text = render(page)
    write_whole(path, lambda temporary: Path(temporary).write_text(text, "utf-8", newline="\n"))


def make_page(task, query_dataset, train_dataset, analysed, num_queries, flags, others=()) -> Page:
    """What the page says; see `write_page`."""
    num_queries = min(num_queries, len(query_dataset))
    shelf = Shelf(task, query_dataset, train_dataset)
    pairs = find_pairs(analysed, num_queries, SHOWN_EACH)
    sections = [*influential(analysed, shelf, SHOWN_EACH), *self_influence(analysed, shelf, SHOWN_EACH)]
    sections += [*experiments(analysed), *run_sections(analysed)]
    most_pieces = fit_into_page(shelf, pairs, num_queries)
    of_query: dict[int, list[tuple[int, Pair]]] = {}
    for number, pair in enumerate(pairs):
        of_query.setdefault(pair.query, []).append((number, pair))
    layers = [] if analysed.parts is None else analysed.parts.layers
    has_tokens = any(pair.train_values is not None for pair in pairs)
    data = {
        "mostPieces": most_pieces,
        "depths": by_depth(layers).names,
        "kinds": by_kind(layers).names,
        "queries": [shelf.query(index).lengths() for index in of_query],
        "examples": {str(index): shelf.train[index].lengths() for index in sorted(shelf.train)},
        "pairs": [pair_data(shelf, pair) for pair in pairs],
        "scores": [float(analysed.scores[pair.query, pair.index]) for pair in pairs],
    }
    return Page(
        title=f"{task.name}: influence by {analysed.name}",
        asked=asked(analysed, flags),
        scale=_scale(analysed),
        measured=task.measured,
        unshaded=None if has_tokens else f"No tokens are shaded: add {FLAG} to analyze.py, and they are.",
        queries=[make_query(shelf, analysed, own, SHOWN_EACH) for own in of_query.values()],
        num_queries=len(query_dataset),
        num_train=len(train_dataset),
        texts={index: shelf.train[index].text() for index in sorted(shelf.train)},
        sections=sections,
        others=list(others),
        data=data,
    )


def _scale(analysed: Analysed) -> str:
    if analysed.scale is None:
        return "Their size has no unit: only their order means something."
    return (
        f"A score divided by {analysed.scale:,.6g} is the change that is predicted if the example were left out of "
        "training: trust the order more than the size."
    )
