"""The overview: what was asked, which examples stand out over all queries, what experiments say of the scores."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from influence_core.report.analysed import Analysed
from influence_core.report.charts import bar_chart, figure, histogram, line_chart
from influence_core.report.content import Listed, Section, Table
from influence_core.report.queries import Shelf
from influence_core.report.texts import short

FEW_QUERIES = 10  # fewer have hardly any example in common
UNREADABLE = "What it says can't be read: it is of another version of this program."


def influential(analysed: Analysed, shelf: Shelf, num_each: int, num_shown: int) -> list[Section]:
    """The training examples with the largest sums of scores, and those that most queries have among their highest."""
    scores = analysed.scores
    num_queries, num_train = scores.shape
    num_top = min(num_each, num_train)
    sums = scores.sum(0, dtype=np.float64)
    tops = np.argsort(-scores, axis=1, kind="stable")[:, :num_top]
    counts = np.bincount(tops.ravel(), minlength=num_train)

    def said(index: int) -> str:
        queries = "1 query" if counts[index] == 1 else f"{counts[index]} queries"
        return f"sum {figure(sums[index])}, among the top {num_top} of {queries}"

    def listed(indices: np.ndarray) -> list[Listed]:
        of_page = {index: np.flatnonzero((tops[:num_shown] == index).any(1)).tolist() for index in indices.tolist()}
        return [replace(each, queries=of_page[each.index]) for each in _listed(shelf, list(of_page), said)]

    by_sum, by_count = (np.argsort(-values, kind="stable")[:num_each] for values in (sums, counts))
    sections = [
        Section(
            "Most influential over all queries",
            [f"The training examples with the largest sum of scores over all {num_queries:,} queries."],
            examples=listed(by_sum),
        ),
        Section(
            "Most often among the highest",
            [f"The training examples that most queries have among their top {num_top}."],
            examples=listed(by_count),
        ),
    ]
    return sections[: 2 if num_queries >= FEW_QUERIES else num_queries > 1]


def self_influence(analysed: Analysed, shelf: Shelf, num_each: int) -> list[Section]:
    """The training examples with the highest scores of their own, where these are stored."""
    values = analysed.self_influence
    if values is None:
        return []
    order = np.argsort(-values, kind="stable")[:num_each].tolist()
    median = float(np.median(values))

    def said(index: int) -> str:
        times = f", {values[index] / median:.3g} times the median" if median > 0 else ""
        return f"{figure(values[index])}{times}"

    notes = ["Each training example's score for itself. It is high where the model had to bend for one example: look "
             "here for what is mislabelled, damaged or odd."]  # fmt: skip
    chart = histogram("Self-influence of all training examples", values, [(index, True) for index in order])
    return [Section("Self-influence outliers", notes, charts=[chart], examples=_listed(shelf, order, said))]


def _listed(shelf: Shelf, indices: Sequence[int], said) -> list[Listed]:
    return [Listed(index, said(index), shelf.of_training(index).text().beginning) for index in indices]


def experiments(analysed: Analysed) -> list[Section]:
    """What retraining said, where it was done."""
    sections = []
    for name, title, read in (
        ("lds", "Do the scores predict retraining? (LDS)", _lds),
        ("counterfactual", "What removing the highest does", _counterfactual),
    ):
        if name not in analysed.results:
            continue
        result = analysed.results[name]
        try:
            section = read(title, result)
            sections.append(_of_other_data(title, analysed, result) or section)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):  # somebody else's file
            sections.append(Section(title, [UNREADABLE]))
    return sections


def _of_other_data(title: str, analysed: Analysed, result: Mapping[str, Any]) -> Section | None:
    """A note in place of a result that is not of this model and its data, or of earlier scores of this name."""
    stored = result.get("settings", {}).get("scores", {})
    ours = {key: analysed.settings.get(key) for key in ("model", "train_dataset")}
    known = [{key: each.get(key) for key in ours} for each in stored.values() if each]
    own = stored.get(analysed.name) or {}
    is_earlier = any(own.get(key) != analysed.settings.get(key) for key in ("damping", "factors", "checkpoints") if own)
    if analysed.settings and (ours not in known or is_earlier):
        return Section(title, ["There is a result in the output directory, of another model or other data than these "
                               "scores', or of earlier ones: run that script again."])  # fmt: skip
    return None


def _lds(title: str, result: Mapping[str, Any]) -> Section:
    methods = sorted(result["methods"].items(), key=lambda item: -item[1]["lds"])
    rows = [
        [short(name), f"{row['lds']:.3f}", f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}",
         f"{row['median']:.3f}", f"{row['min']:.3f}", f"{row['max']:.3f}"]
        for name, row in methods
    ]  # fmt: skip
    ceiling = result["ceiling"]
    notes = [
        f"The linear datamodeling score: the rank correlation between what scores predict for random subsets of the "
        f"training set and what retraining on them did; mean over {result['num_queries']} queries, "
        f"{result['num_subsets']} subsets x {result['num_repeats']} retrainings. A perfect prediction would reach "
        + ("1." if ceiling is None else f"{ceiling:.3f}, for the noise of retraining itself.")
    ]
    chart = bar_chart(
        "Mean LDS, with its 95 % interval",
        [(short(name), row["lds"], tuple(row["interval"])) for name, row in methods],
        ceiling,
        "ceiling",
    )
    tables = [Table(["scores", "mean LDS", "95 % interval", "median", "min", "max"], rows)]
    if calibration := result.get("calibration"):
        notes.append("Calibration: the slope of actual against predicted changes; 1 would make score / N a size.")
        tables.append(
            Table(
                ["scores", "slope", "R²"],
                [[short(name), f"{row['slope']:.3g}", f"{row['r_squared']:.3f}"] for name, row in calibration.items()],
            )
        )
    return Section(title, notes, tables, [chart])


def _counterfactual(title: str, result: Mapping[str, Any]) -> Section:
    sizes, tables, charts = result["removal_sizes"], [], []
    for metric, methods in result["metrics"].items():
        rows = []
        for name, row in methods.items():
            cells = (
                f"{mean:.4g}" + (f" ± {error:.2g}" if error is not None else "")
                for mean, error in zip(row["mean"], row["standard_error"])
            )
            rows.append([short(name), *cells])
        tables.append(Table([f"{short(metric)}, removed:", *map(str, sizes)], rows))
        lines = [(short(name), row["mean"]) for name, row in methods.items()]
        charts.append(line_chart(short(metric), sizes, lines, "training examples removed"))
    notes = [
        f"The model retrained without the training examples of the highest scores, summed over the first "
        f"{result['num_queries']} queries, and without random ones; mean ± standard error of "
        f"{result['num_repeats']} retrainings."
    ]
    return Section(title, notes, tables, charts)
