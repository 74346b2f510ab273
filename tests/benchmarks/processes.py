"""One process against several, each with one thread: the speed-up, and how far factors and scores differ.

    python -m tests.benchmarks.processes swag_roberta --num_processes 1 2 3 -- --checkpoint_dir DIR --num_queries 64 …

runs `<example>/analyze.py` with the flags after `--`, in turn, `--repeats` times. Times are those of the stage table.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from safetensors.torch import load_file

from tests.benchmarks.systems import relative_difference

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
    seconds = {number: {stage: [] for stage in STAGES} for number in arguments.num_processes}
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(arguments.repeats):
            for number in arguments.num_processes:
                output_dir = Path(directory, str(number))
                for stage, value in analyze(arguments.example, number, output_dir, flags).items():
                    seconds[number][stage].append(value)
                results[number] = stored(output_dir)
    first = arguments.num_processes[0]
    print(f"{'stage':<28}" + "".join(f"{number:>6} proc." for number in seconds) + "   speed-up")
    for stage in STAGES:
        times = [median(seconds[number][stage]) for number in seconds]
        speed_ups = ", ".join(f"{times[0] / time:.2f}x" if time else "-" for time in times[1:])
        print(f"{stage:<28}" + "".join(f"{time:>10.2f}s" for time in times) + f"   {speed_ups}")
    for number in arguments.num_processes[1:]:
        for name, tensors in results[first].items():
            difference = max(relative_difference(results[number][name][key], tensor) for key, tensor in tensors.items())
            print(f"{number} processes against {first}, largest relative difference of {name}: {difference:.2g}")


def analyze(example: str, num_processes: int, output_dir: Path, flags: list[str]) -> dict[str, float]:
    """Seconds of each stage, by the table that the script prints."""
    launcher, ddp = [sys.executable], []
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc-per-node={num_processes}"]
        ddp = ["--use_ddp"]
    command = [*launcher, f"{example}/analyze.py", "--output_dir", str(output_dir), "--overwrite", *ddp, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    rows = re.findall(r"^\| ([\w ]+?) +\| [^|]+\| [^|]+\| ([\d.e+-]+) ", done.stdout, re.MULTILINE)
    table = {stage: float(value) for stage, value in rows}
    return {stage: table[stage] for stage in STAGES}


def stored(output_dir: Path) -> dict[str, dict]:
    """Factors that do not depend on the sign or order of eigenvectors, and scores: {name: {layer or name: tensor}}."""
    paths = [*output_dir.rglob("*_covariance.safetensors"), *output_dir.rglob("pairwise_scores.safetensors")]
    return {f"{path.parent.name}/{path.stem}": load_file(path) for path in sorted(paths)}


if __name__ == "__main__":
    main()
