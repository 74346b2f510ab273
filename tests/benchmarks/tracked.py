"""What `--track all` costs beside `--track blocks`: seconds of each stage, FLOPs as counted, and peak memory.

    python -m tests.benchmarks.tracked --setting A --repeats 3

Medians of interleaved runs of a setting of compare_with_kronfluence; each peak is of a process of its own.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from influence_core.experiments.flags import TRACKED
from influence_core.runtime import Runtime
from influence_core.units import gigabytes
from tests.benchmarks.compare_with_kronfluence import parse
from tests.benchmarks.systems import OurRun, make_setting, run_ours

PEAK_OF = "--peak_of"  # an argument of the processes that measure memory


def main() -> None:
    argv = sys.argv[1:]
    if PEAK_OF in argv:
        tracked = argv.pop(argv.index(PEAK_OF) + 1)
        argv.remove(PEAK_OF)
        run(parse(argv), [tracked])
        print(Runtime().peak_memory())
        return
    arguments = parse(argv)
    runs = run(arguments, list(TRACKED) * arguments.repeats)
    seconds = {
        tracked: {stage: median(each.seconds[stage] for each in of_kind) for stage in of_kind[0].seconds}
        for tracked, of_kind in runs.items()
    }
    print(f"{'':<28}" + "".join(f"{tracked:>12}" for tracked in TRACKED) + f"{'ratio':>9}{'by FLOPs':>10}")
    flops = {tracked: of_kind[0].flops for tracked, of_kind in runs.items()}
    for stage in [*seconds[TRACKED[0]], "whole"]:
        times, counts = (
            [sum(x.values()) if stage == "whole" else x.get(stage, 0.0) for x in map(each.get, TRACKED)]
            for each in (seconds, flops)
        )
        ratios = [b / a if a else float("nan") for a, b in (times, counts)]
        print(f"{stage:<28}" + "".join(f"{x:>10.2f} s" for x in times) + f"{ratios[0]:>9.2f}{ratios[1]:>10.2f}")
    for tracked in TRACKED:
        command = [sys.executable, "-m", "tests.benchmarks.tracked", *argv, PEAK_OF, tracked]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(f"peak memory, {tracked}: {gigabytes(peak)} (planned {gigabytes(runs[tracked][0].planned_bytes)})")


def run(arguments, order: list[str]) -> dict[str, list[OurRun]]:
    """Runs of each way to track, in this order."""
    runs: dict[str, list[OurRun]] = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        setting = make_setting(arguments, Path(directory))
        for tracked in order:
            setting.task.tracked_kinds = tracked
            runs.setdefault(tracked, []).append(run_ours(arguments, setting, setting.train))
    return runs


if __name__ == "__main__":
    main()
