"""The figures of the experiments, each drawn from a stored JSON result alone."""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from influence_core.files import write_whole

# Okabe and Ito's palette: its colours stay apart for every kind of colour vision.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
PANELS_IN_A_ROW = 3
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def draw_lds(result_path: Path, figure_path: Path) -> Path:
    """Mean LDS of each method with its interval, each query as a dot, and the noise ceiling."""
    result = json.loads(Path(result_path).read_text())
    methods = sorted(result["methods"].items(), key=lambda item: -item[1]["lds"])
    rng = np.random.default_rng(0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, 1.3 + 1.1 * len(methods)), 4.2), layout="constrained")
        axes = figure.add_subplot()
        for position, (_, row) in enumerate(methods):
            colour, mean = COLOURS[position % len(COLOURS)], row["lds"]
            errors = [[max(0, mean - row["interval"][0])], [max(0, row["interval"][1] - mean)]]
            axes.bar(position, mean, 0.62, color=colour, alpha=0.85, yerr=errors, capsize=5, zorder=2)
            spread = position + rng.uniform(-0.22, 0.22, len(row["per_query"]))
            axes.scatter(spread, row["per_query"], 7, color="black", alpha=0.25, linewidths=0, zorder=3)
        if result["ceiling"] is not None:
            axes.axhline(
                result["ceiling"], color="black", linestyle="--", label=f"noise ceiling {result['ceiling']:.2f}"
            )
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        axes.axhline(0, color="black", linewidth=0.8)
        labels = [f"{_in_lines(name)}\n{row['lds']:.3f}" for name, row in methods]
        axes.set_xticks(range(len(methods)), labels)
        axes.set_ylabel("linear datamodeling score\n(Spearman, mean over queries)")
        axes.set_xlabel(
            f"{result['num_queries']} queries (dots), {result['num_subsets']} subsets x {result['num_repeats']} "
            "retrainings; error bars: 95 % interval",
            fontsize=9,
        )
        return _save(figure, figure_path)


def draw_counterfactual(result_path: Path, figure_path: Path) -> Path:
    """Each metric against the number of examples removed, one line a method."""
    result = json.loads(Path(result_path).read_text())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 5 * len(result["metrics"]), 4.2), layout="constrained")
        panels = figure.subplots(1, len(result["metrics"]), squeeze=False)[0]
        for axes, (metric, methods) in zip(panels, result["metrics"].items()):
            for number, (name, rows) in enumerate(methods.items()):
                errors = [error or 0 for error in rows["standard_error"]]
                look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                look |= {"linestyle": "--" if name == "random" else "-", "label": name, "capsize": 4}
                axes.errorbar(result["removal_sizes"], rows["mean"], errors, **look)
            axes.set_xlabel(f"number of training sequences removed (of {result['num_train']})")
            axes.set_ylabel(f"{metric} ({result['num_queries']} queries)")
            axes.set_xticks(result["removal_sizes"])
        panels[0].legend(title=f"removed by (error bars: standard error of {result['num_repeats']})", title_fontsize=9)
        return _save(figure, figure_path)


def draw_calibration(result_path: Path, figure_path: Path) -> Path:
    """Actual against predicted changes of every query over the subsets, a panel a method."""
    methods = json.loads(Path(result_path).read_text())["calibration"]
    with matplotlib.rc_context(STYLE):
        num_columns = min(len(methods), PANELS_IN_A_ROW)
        num_rows = -(-len(methods) // num_columns)
        figure = Figure(figsize=(0.6 + 4.2 * num_columns, 4.4 * num_rows), layout="constrained")
        panels = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes in panels.flat[len(methods) :]:
            axes.remove()
        for number, (axes, (name, row)) in enumerate(zip(panels.flat, methods.items())):
            predicted, actual = np.ravel(row["predicted"]), np.ravel(row["actual"])
            look = {"color": COLOURS[number % len(COLOURS)], "linewidths": 0}
            axes.scatter(predicted, actual, 6, alpha=np.clip(500 / len(actual), 0.15, 1), **look)
            ends = np.array([predicted.min(), predicted.max()])
            axes.plot(ends, row["slope"] * ends, color="black", label=f"median slope {row['slope']:.3g}")
            shown = np.clip(ends, actual.min(), actual.max())  # or the points would be a line
            axes.plot(shown, shown, color="black", linewidth=0.8, linestyle="--", label="equal")
            axes.locator_params(nbins=6)
            axes.ticklabel_format(scilimits=(-3, 3))
            axes.set_xlabel("predicted change of the measurement")
            axes.set_title(f"{name}: median $R^2$ {row['r_squared']:.2f}", fontsize=11)
            axes.legend(loc="upper left", fontsize=9)
        for axes in panels[:, 0]:
            axes.set_ylabel("actual change, from the subsets' mean")
        return _save(figure, figure_path)


def draw_half_precision(result_path: Path, figure_path: Path) -> Path:
    """One query's scores in bfloat16 against those in float32."""
    result = json.loads(Path(result_path).read_text())
    full, half = np.array(result["float32"]), np.array(result["bfloat16"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.8), layout="constrained")
        axes = figure.add_subplot()
        ends = [min(full.min(), half.min()), max(full.max(), half.max())]
        axes.plot(ends, ends, color="black", linewidth=0.8, linestyle="--", label="equal")
        label = f"query {result['shown_query']}: {len(full)} training sequences"
        axes.scatter(full, half, 12, color=COLOURS[0], alpha=0.6, linewidths=0, label=label)
        axes.locator_params(nbins=6)
        axes.ticklabel_format(scilimits=(-3, 3))
        axes.set_xlabel(f"{result['strategy']} score, float32")
        axes.set_ylabel(f"{result['strategy']} score, bfloat16")
        num_queries = len(result["per_query"])
        title = f"average Spearman correlation {result['mean_spearman']:.4f} ({num_queries} queries)"
        axes.set_title(title, fontsize=11, pad=16)
        axes.legend(loc="upper left")
        return _save(figure, figure_path)


def _in_lines(name: str) -> str:
    """A path by its parts, none of them long."""
    return "/\n".join(part if len(part) < 14 else f"…{part[-12:]}" for part in name.split("/"))


def _save(figure: Figure, path: Path) -> Path:
    kind = path.suffix.removeprefix(".")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150, format=kind, metadata={"Software": None}))
    return path
