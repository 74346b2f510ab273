"""Memory of each process, and bytes that it sends, where parameters are sharded; beside one process and --use_ddp.

    python -m tests.benchmarks.sharding wikitext_gpt2 --num_processes 1 2 4 -- --checkpoint_dir DIR --num_train 8 …

runs `<example>/analyze.py` with the flags after `--`: alone, with --use_fsdp, and with --use_ddp where asked (--ddp).
Peaks are of each process's resident memory; "of its own" leaves out pages of files, which processes share. Bytes are of
what rank 0 sends to others, by stage, counted at torch's collectives (an all-gather sends its part to each of the
others): those of parameters, and those of what layers captured.

    python -m tests.benchmarks.sharding --make DIR --like CHECKPOINT n_layer=20,n_embd=1024,…

writes a model of random weights of another size beside a copy of a checkpoint's tokenizer.
"""

import argparse
import collections
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.processes import ENVIRONMENT, command, stage_seconds
from tests.test_torchrun import process_of_rank

COUNTED = "COUNT_SENT_BYTES"  # environment: a file to write them to


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", nargs="?", help="folder of analyze.py")
    parser.add_argument("--num_processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ddp", action="store_true", help="with --use_ddp too")
    parser.add_argument("--make", nargs=3, metavar=("DIR", "CHECKPOINT", "OVERRIDES"))
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    if arguments.make:
        make(*arguments.make)
        return
    for number in arguments.num_processes:
        for how in ["--use_fsdp", "--use_ddp"][: 1 + arguments.ddp] if number > 1 else [""]:
            measure(arguments.example, number, how, flags)


def measure(example: str, number: int, how: str, flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        counts = Path(name, "sent.json")
        line = [each if each != "--use_ddp" else how for each in command(example, number, Path(name, "out"), flags)]
        script = line.index(f"{example}/analyze.py")
        line[script : script + 1] = ["-m", "tests.benchmarks.sharding", f"{example}/analyze.py"]
        if number > 1:
            line.insert(script, "--no-python")
            line.insert(script + 1, sys.executable)
        environment = ENVIRONMENT | {COUNTED: str(counts)}
        with open(Path(name, "log"), "w+") as log:
            job = subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT)
            peaks = watch(job, number)
            log.seek(0)
            printed = log.read()
        if job.returncode:
            sys.exit(printed[-3000:])
        sent = json.loads(counts.read_text()) if counts.exists() else {}
    print(f"{number} processes {how}")
    for rank, (resident, own) in sorted(peaks.items()):
        print(f"  process {rank}: {resident / 1e9:.2f} GB at the peak, {own / 1e9:.2f} GB of its own")
    for stage, seconds in stage_seconds(printed).items():
        bytes_sent = ", ".join(f"{kind} {count / 1e9:.3f} GB" for kind, count in sent.get(stage, {}).items())
        print(f"  {stage:<28}{seconds:>9.2f} s  {bytes_sent}")
    print(*(f"  {row}" for row in printed.splitlines() if row.startswith(("  sharded", "  memory", "Peak"))), sep="\n")


def watch(job: subprocess.Popen, number: int) -> dict[int, tuple[int, int]]:
    """{rank: (peak of resident bytes, of those that are no file's)} until the job ends."""
    peaks: dict[int, tuple[int, int]] = {}
    while job.poll() is None:
        for rank in range(number):
            process = job.pid if number == 1 else process_of_rank(rank, job.pid)
            try:
                rows = Path(f"/proc/{process}/status").read_text().splitlines()
            except OSError:
                continue
            values = {row.split(":")[0]: int(row.split()[1]) << 10 for row in rows if row.endswith("kB")}
            before = peaks.get(rank, (0, 0))
            peaks[rank] = max(before[0], values.get("VmHWM", 0)), max(before[1], values.get("RssAnon", 0))
        time.sleep(0.05)
    return peaks


def make(directory: str, like: str, overrides: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(like, directory, ignore=shutil.ignore_patterns("*.safetensors", "training.json", "step-*"))
    config = AutoConfig.from_pretrained(like)
    for key, value in (each.split("=") for each in overrides.split(",")):
        setattr(config, key, int(value))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def run_counting(script: str) -> None:
    """Run a script as a process of the job, with the bytes counted that rank 0 sends."""
    import torch.distributed as dist

    from influence_core.profiler import Profiler

    sent: dict[str, dict[str, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    stage = ["before"]

    def counting(name: str, kind: str, size) -> None:
        original = getattr(dist, name, None)

        def wrapper(*arguments, **keywords):
            sent[stage[0]][kind] += size(*arguments, **keywords)
            return original(*arguments, **keywords)

        if original is not None:
            setattr(dist, name, wrapper)

    def gather(output, part, *_, **__):
        return part.nbytes * (dist.get_world_size() - 1)

    counting("all_gather_into_tensor", "parameters", gather)
    counting("all_gather_single", "parameters", gather)
    counting("all_to_all_single", "captured", lambda output, part, *_, **__: part.nbytes)
    counting(
        "all_reduce",
        "sums",
        lambda part, *_, **__: 2 * part.nbytes * (dist.get_world_size() - 1) // dist.get_world_size(),
    )
    original = Profiler.__call__

    def entered(self, action):
        stage[0] = action
        return original(self, action)

    Profiler.__call__ = entered
    sys.argv = [script, *sys.argv[2:]]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if os.environ.get("RANK", "0") == "0":
            Path(os.environ[COUNTED]).write_text(json.dumps(sent))


if __name__ == "__main__":
    if COUNTED in os.environ:
        run_counting(sys.argv[1])
    else:
        main()
