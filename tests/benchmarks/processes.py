"""One process against several, each with one thread: the speed-up, and how far factors and scores differ.

    python -m tests.benchmarks.processes swag_roberta --num_processes 1 2 3 -- --checkpoint_dir DIR --num_queries 64 …

runs `<example>/analyze.py` with the flags after `--`, in turn, `--repeats` times. Times are those of the stage table.
Beside them stands the most that the machine gives: as many independent analyses at once, each in one process, against
one alone (cores share caches and memory, so two cores rarely do twice the work of one).

Scores are compared twice: as they are, and with the eigenvectors of the first number of processes. EKFAC's Lambda
belongs to the very eigenvectors, and where two eigenvalues are nearly equal rounding decides how theirs are turned.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from safetensors.torch import load_file

STAGES = ("Fit Covariance", "Perform Eigendecomposition", "Fit Lambda", "Compute Pairwise Score", "Total")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", help="folder of analyze.py")
    parser.add_argument("--num_processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=3)
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    first, *others = arguments.num_processes
    seconds = {number: {stage: [] for stage in STAGES} for number in arguments.num_processes}
    at_once = {number: [] for number in {1, *arguments.num_processes} if number <= os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        directories = {number: Path(name, str(number)) for number in arguments.num_processes}
        for _ in range(arguments.repeats):
            for number, directory in directories.items():
                for stage, value in analyze(arguments.example, number, directory, [*flags, "--overwrite"]).items():
                    seconds[number][stage].append(value)
            for number, times in at_once.items():
                times.append(side_by_side(arguments.example, number, Path(name), flags))
        print_times(seconds)
        for number, times in at_once.items():
            most = number * median(at_once[1]) / median(times)
            print(f"{number} independent analyses at once do {most:.2f}x the work of one in the same time")
        for number in others:
            shared = share_eigenvectors(directories[first], Path(name, f"{number}_shared"))
            analyze(arguments.example, number, shared, flags)
            compare(number, first, directories[number], directories[first], "")
            compare(number, first, shared, directories[first], " with the same eigenvectors")


def print_times(seconds: dict[int, dict[str, list[float]]]) -> None:
    print(f"{'stage':<28}" + "".join(f"{number:>6} proc." for number in seconds) + "   speed-up")
    for stage in STAGES:
        times = [median(seconds[number][stage]) for number in seconds]
        speed_ups = ", ".join(f"{times[0] / time:.2f}x" if time else "-" for time in times[1:])
        print(f"{stage:<28}" + "".join(f"{time:>10.2f}s" for time in times) + f"   {speed_ups}")


def compare(number: int, first: int, directory: Path, expected_directory: Path, how: str) -> None:
    from tests.benchmarks.systems import relative_difference  # imports the peer, which others do without

    results = stored(directory)
    for name, tensors in stored(expected_directory).items():
        difference = max(relative_difference(results[name][key], tensor) for key, tensor in tensors.items())
        print(f"{number} processes against {first}{how}, largest relative difference of {name}: {difference:.2g}")


def share_eigenvectors(source: Path, target: Path) -> Path:
    """A directory with the covariances and eigendecompositions of another; what follows from them is to be made."""
    for path in source.glob("factors_*/*"):
        if "lambda" not in path.name:
            (target / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.parent.name)
    return target


def command(example: str, num_processes: int, output_dir: Path, flags: list[str]) -> list[str]:
    launcher, ddp = [sys.executable], []
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc-per-node={num_processes}"]
        ddp = ["--use_ddp"]
    return [*launcher, f"{example}/analyze.py", "--output_dir", str(output_dir), *ddp, *flags]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}


def analyze(example: str, num_processes: int, output_dir: Path, flags: list[str]) -> dict[str, float]:
    """Seconds of each stage, by the table that the script prints."""
    done = subprocess.run(
        command(example, num_processes, output_dir, flags), env=ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return stage_seconds(done.stdout)


def stage_seconds(printed: str) -> dict[str, float]:
    rows = re.findall(r"^\| ([\w ]+?) +\| [^|]+\| [^|]+\| ([\d.e+-]+) ", printed, re.MULTILINE)
    table = {stage: float(value) for stage, value in rows}
    return {stage: table[stage] for stage in STAGES}


def side_by_side(example: str, number: int, directory: Path, flags: list[str]) -> float:
    """Seconds of an analysis (the mean of `number` that run at once), whole, by their stage tables."""
    jobs = [
        subprocess.Popen(
            command(example, 1, directory / f"alone_{job}", [*flags, "--overwrite"]),
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for job in range(number)
    ]  # fmt: skip
    return sum(stage_seconds(job.communicate()[0])["Total"] for job in jobs) / number


def stored(output_dir: Path) -> dict[str, dict]:
    """Factors that do not depend on the sign or order of eigenvectors, and scores: {name: {layer or name: tensor}}."""
    paths = [*output_dir.rglob("*_covariance.safetensors"), *output_dir.rglob("pairwise_scores.safetensors")]
    return {f"{path.parent.name}/{path.stem}": load_file(path) for path in sorted(paths)}


if __name__ == "__main__":
    main()
