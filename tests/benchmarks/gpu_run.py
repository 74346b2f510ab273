"""The parts of gpu_run.sh, each in a process of its own: one that fails, or hangs, costs no other one.

    bash tests/benchmarks/gpu_run.sh [bf16|tf32] [OUT] [--overwrite] [--minutes 9] [--without_gpu] [flags]

Other flags are those of compare_with_kronfluence.py, on top of its setting GPU. A try without a GPU, in two minutes:

    bash tests/benchmarks/gpu_run.sh bf16 OUT --without_gpu --config_overrides n_layer=1,n_embd=24,n_head=2
        --block_size 16 --num_train 16 --num_queries 8 --num_compared 8 --num_peer_train 4 --factor_batch_size 4
        --train_batch_size 4 --query_batch_size 4 --peer_query_batch_sizes 4

Ends with 0 if all parts are there, 1 if one failed or is left for another call, 2 if nothing can be run here.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from influence_core.files import write_json

# Seconds of an H100 that each part is thought to take; not run on a GPU yet.
PARTS = {
    "bf16": {"tests": 60, "ours": 130, "agreement": 130, "peer": 140, "roofline": 20, "compile": 150},
    "tf32": {"ours": 170, "agreement": 140, "peer": 180, "roofline": 20},
}
FLAGS = {"bf16": ["--half"], "tf32": ["--tf32"]}
PRINTING = {"tests": "pytest", "roofline": "tests.benchmarks.roofline"}  # {part whose output is its result: needs it}
IF_TIME_IS_LEFT = {"compile"}


def main():
    words = sys.argv[1:]
    precisions = [words.pop(0)] if words and words[0] in PARTS else list(PARTS)
    out = Path(words.pop(0) if words and not words[0].startswith("-") else "benchmark_results")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--overwrite", action="store_true", help="run parts again that OUT has")
    parser.add_argument("--minutes", type=float, default=9, help="for each precision: no part starts that would not "
                        "end in time by its estimate, and one that does not is stopped")  # fmt: skip
    parser.add_argument("--without_gpu", action="store_true", help="try it on the CPU, where tf32 is plain float32")
    arguments, flags = parser.parse_known_args(words)
    made_by = {"device": "CPU" if arguments.without_gpu else gpu_name(), "flags": flags}
    if not made_by["device"]:
        refuse("there is no GPU (nvidia-smi names none); --without_gpu tries it on the CPU")
    if not find_spec("kronfluence"):
        refuse("there is no kronfluence: python -m tests.benchmarks.gpu_inputs packs it into benchmark_inputs/")
    for precision in precisions:
        prepare(out / precision, PARTS[precision], made_by, arguments.overwrite)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the part that runs, too
    complete = []
    for precision in precisions:
        end = time.monotonic() + 60 * arguments.minutes
        complete.append(run_parts(precision, out / precision, made_by, end))
        subprocess.run([sys.executable, "-m", "tests.benchmarks.gpu_table", out / precision], check=False)
    sys.exit(0 if all(complete) else 1)


def refuse(why: str):
    print(f"gpu_run: {why}", file=sys.stderr)
    sys.exit(2)


def gpu_name() -> str:
    """Of the GPU; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout.strip()


def prepare(directory: Path, parts, made_by: dict, overwrite: bool) -> None:
    """What is there goes, or is of the same flags and GPU: figures of others would not belong beside these."""
    for path in (directory / f"{part}.json" for part in parts):
        if overwrite:
            path.unlink(missing_ok=True)
        elif path.exists() and json.loads(path.read_text())["made_by"] != made_by:
            refuse(f"{path} is of other flags or another GPU: --overwrite, or another OUT")


def run_parts(precision: str, directory: Path, made_by: dict, end: float) -> bool:
    """Run the parts that the directory does not have, one after the other; whether it has all that it must, then."""
    complete = True
    with tempfile.TemporaryDirectory() as work:
        for part, estimate in PARTS[precision].items():
            path = directory / f"{part}.json"
            if path.exists():
                how = f"has been run: {path}"
            elif part in PRINTING and not find_spec(PRINTING[part]):
                how = f"left out, there is no {PRINTING[part]} here"
            elif time.monotonic() + estimate > end:
                how = f"left for another call, the {estimate} s of its estimate are not left in this one"
                complete &= part in IF_TIME_IS_LEFT
            else:
                print(f"== {precision} {part}", flush=True)
                measured = None if part in PRINTING else Path(work, f"{part}.json")
                how = run_part(command(part, precision, work, made_by), measured, path, made_by, end)
                complete &= path.exists()
            print(f"== {precision} {part}: {how}", flush=True)
    return complete


def command(part: str, precision: str, work: str, made_by: dict) -> list[str]:
    if part == "tests":  # they need nothing of conftest.py, which imports datasets
        return [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    if part == "roofline":
        return [sys.executable, "-m", PRINTING[part], "--card", "H100", "--precision", precision]
    flags = ["--compile"] if part == "compile" else []
    if made_by["device"] != "CPU" or precision != "tf32":
        flags += FLAGS[precision]
    return [sys.executable, "-m", "tests.benchmarks.gpu_parts", part, work, *flags, *made_by["flags"]]


def run_part(command: list[str], measured: Path | None, path: Path, made_by: dict, end: float) -> str:
    """How it went. What it left in the file `measured`, or where that is None what it printed, is in `path` if well."""
    start = time.monotonic()
    output = None if measured else subprocess.PIPE
    try:
        done = subprocess.run(command, stdout=output, text=True, timeout=end - start, check=False)
    except subprocess.TimeoutExpired:
        return f"FAILED: stopped after {time.monotonic() - start:.0f} s, the time of this call was over"
    if output:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        return f"FAILED with exit status {done.returncode}"
    result = json.loads(measured.read_text()) if measured else {"output": done.stdout.splitlines()}
    seconds = time.monotonic() - start
    write_json(path, {"made_by": made_by, "seconds": seconds, **result})
    return f"took {seconds:.0f} s"


if __name__ == "__main__":
    main()
