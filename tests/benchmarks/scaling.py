"""Is the cost linear? Time against the number of training examples and of queries, measured and drawn.

    python -m tests.benchmarks.scaling --settings A B C

Each setting of compare_with_kronfluence is run whole, and with halves and quarters of its training examples or of its
queries. figure/scaling.png shows seconds against the size; the largest ratio of a doubling is printed. `--draw_only`
draws the stored result again.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib.figure import Figure

from influence_core.experiments.figures import COLOURS, MARKERS, STYLE
from tests.benchmarks.compare_with_kronfluence import parse
from tests.benchmarks.systems import make_setting, run_ours

SHARES = (0.25, 0.5, 1.0)
AXES = {"num_train": "training examples", "num_queries": "queries"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["A", "B", "C"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmark_results/scaling.json"))
    parser.add_argument("--figure", type=Path, default=Path("figure/scaling.png"))
    parser.add_argument("--draw_only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.draw_only:
        result = {name: measure(name, arguments.repeats) for name in arguments.settings}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    result = json.loads(arguments.out.read_text())
    for name, axes in result.items():
        for axis, points in axes.items():
            doublings = [later / earlier for (_, earlier), (_, later) in zip(points, points[1:])]
            print(f"setting {name}: doubling the {AXES[axis]} multiplies the time by at most {max(doublings):.2f}")
    draw(result, arguments.figure)


def measure(name: str, repeats: int) -> dict[str, list[tuple[int, float]]]:
    """{"num_train" or "num_queries": [(size, median seconds of the whole analysis)]}, the other one being whole."""
    arguments = parse(["--setting", name])
    with tempfile.TemporaryDirectory() as directory:
        setting = make_setting(arguments, Path(directory))
        seconds: dict[tuple[int, int], list[float]] = {}
        for _ in range(repeats):
            for axis in AXES:
                for share in SHARES:
                    sizes = {key: int(getattr(arguments, key) * (share if key == axis else 1)) for key in AXES}
                    if share < 1 or axis == "num_train":  # the whole is measured once for both axes
                        run = run_ours(arguments, setting.part(**sizes), setting.train[: sizes["num_train"]])
                        seconds.setdefault(tuple(sizes.values()), []).append(sum(run.seconds.values()))
    whole = tuple(getattr(arguments, key) for key in AXES)
    points = {axis: [] for axis in AXES}
    for number, axis in enumerate(AXES):
        for sizes, times in seconds.items():
            if sizes[1 - number] == whole[1 - number]:
                points[axis].append((sizes[number], median(times)))
        points[axis].sort()
    return points


def draw(result: dict, path: Path) -> None:
    """One panel for each axis; the dashed lines have slope one."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, (axis, label) in zip(figure.subplots(1, 2), AXES.items()):
            for number, (name, points) in enumerate(result.items()):
                sizes, seconds = zip(*points[axis])
                axes.plot(
                    sizes, seconds, MARKERS[number], color=COLOURS[number], label=f"setting {name}", linestyle="-"
                )
                line = [seconds[0] * size / sizes[0] for size in sizes]
                axes.plot(sizes, line, color=COLOURS[number], linestyle="--", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xlabel(f"number of {label}")
            axes.set_ylabel("seconds of the whole analysis")
            axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
