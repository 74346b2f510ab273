"""Side by side with kronfluence 1.0.1: same weights, tokens and labels; agreement, then time and memory by stage.

    python -m tests.benchmarks.compare_with_kronfluence --setting A
    python -m tests.benchmarks.compare_with_kronfluence --setting C --repeats 5
    python -m tests.benchmarks.compare_with_kronfluence --checkpoint_dir DIR --num_train 256 --num_queries 64

First both systems run once with the same labels, and factors and scores are compared. Then both run `--repeats` times
in turn, each sampling labels online as it does by itself, and medians are compared. The peer scores at query batches
of `--peer_query_batch_sizes` (0: all queries in one, its best). `floor` is what our stage must take: its forward and
backward passes alone, timed in the same run, and its counted products at the measured rate of a large product. Peak
memory is that of a fresh process for each system, with the peer's largest query batch.

Without a checkpoint of train.py the model is of `--config_overrides` with random weights. Both get the same model
object, and so the same activation kernel. In setting C the peer's rows are padded to 128 tokens, as in the example
that the setting follows; ours are padded to the longest of their batch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from influence_core.runtime import Runtime
from influence_core.tasks.demo_corpus import DEMO_CORPUS
from tests.benchmarks.peer import Peer
from tests.benchmarks.systems import (
    PAIRWISE,
    OurRun,
    agreement,
    make_setting,
    matrix_product_peak,
    run_ours,
)
from tests.benchmarks.tasks import BENCHMARKED

GPT2 = "n_head={},n_layer={},n_embd={},n_positions={}"
SETTINGS = {
    "A": {
        "task": "wikitext_gpt2", "dataset_name_or_path": DEMO_CORPUS, "vocab_size": 8192, "block_size": 128,
        "config_overrides": GPT2.format(4, 4, 256, 128), "num_train": 256, "num_queries": 128,
    },
    "B": {
        "task": "wikitext_gpt2", "dataset_name_or_path": DEMO_CORPUS, "vocab_size": 8192, "block_size": 256,
        "config_overrides": GPT2.format(12, 2, 768, 256) + ",vocab_size=50257", "num_train": 48, "num_queries": 16,
    },
    "C": {
        "task": "swag_roberta", "dataset_name_or_path": "../shared/data/swag", "dataset_config": "regular",
        "tokenizer_name_or_path": "../shared/models/roberta-tokenizer", "max_length": 128,
        "config_overrides": "num_hidden_layers=4,hidden_size=256,num_attention_heads=4,intermediate_size=1024,"
        "type_vocab_size=1",
        "num_train": 256, "num_queries": 64,
    },
    "D": {
        "task": "dailymail_t5", "dataset_name_or_path": "../shared/data/cnn_dailymail", "dataset_config": "3.0.0",
        "tokenizer_name_or_path": "../shared/models/t5-tokenizer", "max_source_length": 256, "max_target_length": 32,
        "config_overrides": "num_layers=2,d_model=256,d_ff=1024,num_heads=4", "num_train": 128, "num_queries": 32,
    },
    "GPU": {
        "task": "wikitext_gpt2", "tokens": "benchmark_inputs/wikitext2.safetensors", "block_size": 512,
        "config_overrides": "n_layer=12", "num_train": 4656, "num_queries": 481, "num_compared": 64, "repeats": 1,
        "num_peer_train": 256, "query_batch_size": 32, "train_batch_size": 64, "factor_batch_size": 64,
        "peer_query_batch_sizes": [32],
    },
}  # fmt: skip


def parse(argv: list[str] | None = None):
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--setting", choices=SETTINGS, default="A", help="sizes that the README reports; flags override")
    first.add_argument("--task", choices=BENCHMARKED)
    chosen, _ = first.parse_known_args(argv)
    defaults = SETTINGS[chosen.setting]
    parser = argparse.ArgumentParser(
        parents=[first], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    BENCHMARKED[chosen.task or defaults["task"]].add_arguments(parser)
    parser.add_argument("--checkpoint_dir")
    parser.add_argument("--num_train", type=int)
    parser.add_argument("--num_queries", type=int)
    parser.add_argument("--query_batch_size", type=int, default=16)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--factor_batch_size", type=int, default=16)
    parser.add_argument("--peer_query_batch_sizes", type=int, nargs="+", default=[8, 0])
    parser.add_argument("--strategy", default="ekfac")
    parser.add_argument("--damping", type=float, default=1e-8)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--num_compared", type=int, help="training examples whose factors and scores are compared, and "
                        "half as many queries (default: all)")  # fmt: skip
    parser.add_argument("--num_peer_train", type=int, help="time the peer on so many training examples and on twice as "
                        "many, and go on in a straight line to --num_train")  # fmt: skip
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; 0: agreement only")
    parser.add_argument("--seed", type=int, default=1004)
    parser.add_argument("--out", type=Path, default=Path("benchmark_results/compare_with_kronfluence.json"))
    parser.add_argument("--skip_memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--peak_memory_of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def main():
    arguments = parse()
    with tempfile.TemporaryDirectory() as directory:
        setting = make_setting(arguments, Path(directory))
        peer = make_peer(arguments, setting)
        if arguments.peak_memory_of:
            print(*measure_peak(arguments, setting, peer))
            return
        result = {"agreement": compare_scores(arguments, setting, peer)}
        if arguments.repeats:
            result |= time_stages(arguments, setting, peer)
            print_times(result)
            if not arguments.skip_memory:
                result["peak_bytes"] = peak_memory_of_both()
    result["arguments"] = {key: str(value) for key, value in vars(arguments).items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def make_peer(arguments, setting) -> Peer:
    return Peer(
        setting.task, setting.model, setting.directory / "peer", arguments.strategy, arguments.damping,
        arguments.half, arguments.compile,
    )  # fmt: skip


def compare_scores(arguments, setting, peer):
    """Factors and scores of both systems from the same labels."""
    if arguments.num_compared:
        setting = setting.part(arguments.num_compared, arguments.num_compared // 2)
    labelled = setting.task.sample_all_labels(setting.model, setting.train, arguments.seed)
    ours = run_ours(arguments, setting, labelled)
    peer.task.online = False
    peer.fit(labelled, arguments.factor_batch_size)
    _, theirs = peer.score(setting.queries, labelled, len(setting.queries), arguments.train_batch_size)
    result = agreement(ours.scores, theirs, setting.directory / "ours", peer.factors())
    for name, value in result.items():
        print(f"{name:<22} {value:.3g}" if value < 0.9 else f"{name:<22} {value:.8f}")
    return result


def time_stages(arguments, setting, peer):
    """The stage table of interleaved runs."""
    peer.task.online = True
    measured = []
    for _ in range(arguments.repeats):
        peak = matrix_product_peak(setting.device, arguments.half)
        run = run_ours(arguments, setting, setting.train, time_passes=True)
        measured.append((peak, run, peer_seconds(arguments, setting, peer)))
    return stage_table(measured)


def stage_table(measured: list[tuple[float, OurRun, dict[str, float]]]):
    """{"stages": {stage: seconds of both, FLOPs, floor}, "gflops": the measured peak}, medians.

    Args:
        measured: of each repeat the measured peak, our run and the peer's seconds.
    """
    rows: dict[str, dict[str, list[float]]] = {}

    def note(stage, **values):
        for name, value in values.items():
            rows.setdefault(stage, {}).setdefault(name, []).append(value)

    for _, run, theirs in measured:
        for stage, seconds in theirs.items():
            action = stage.split(",")[0]
            note(stage, ours=run.seconds[action], theirs=seconds, passes=run.pass_seconds[action])
        best = min(seconds for stage, seconds in theirs.items() if stage.startswith(PAIRWISE))
        factors = sum(seconds for stage, seconds in theirs.items() if not stage.startswith(PAIRWISE))
        note("Whole, peer at its best", ours=sum(run.seconds.values()), theirs=factors + best)
    gflops = median(peak for peak, *_ in measured)
    stages = {}
    for stage, row in rows.items():
        medians = {name: median(values) for name, values in row.items()}
        stages[stage] = {**medians, "ratio": medians["theirs"] / medians["ours"], "all": row}
        action = stage.split(",")[0]
        if action in run.flops:
            stages[stage]["gflops"] = run.flops[action] / medians["ours"] / 1e9
            stages[stage]["floor"] = medians["passes"] + run.product_flops[action] / gflops / 1e9
    return {"stages": stages, "gflops": gflops}


def peer_seconds(arguments, setting, peer) -> dict[str, float]:
    """Of each stage, the pairwise one once for each query batch size; beyond --num_peer_train on a straight line.

    On parts it decomposes once, or not at all after the agreement: that takes as long for any number of examples.
    """
    part = arguments.num_peer_train

    def measure(num_train: int) -> dict[str, float]:
        train = setting.train[:num_train]
        seconds = peer.fit(train, arguments.factor_batch_size, decompose=part is None)
        for size in arguments.peer_query_batch_sizes:
            stage = f"{PAIRWISE}, peer's batch {size or 'all'}"
            query_batch_size = size or arguments.num_queries
            seconds[stage], _ = peer.score(setting.queries, train, query_batch_size, arguments.train_batch_size)
        return seconds

    if part is None:
        return measure(arguments.num_train)
    warm_up = setting.train[: arguments.factor_batch_size]
    peer.fit(warm_up, arguments.factor_batch_size, decompose=False)
    for size in arguments.peer_query_batch_sizes:
        peer.score(setting.queries[: size or None], warm_up, size or arguments.num_queries, arguments.train_batch_size)
    small, large = measure(part), measure(2 * part)
    steps = arguments.num_train / part - 2
    return {stage: large[stage] + steps * (large[stage] - small[stage]) for stage in large}


def print_times(result):
    """One line a stage; `modelled`, where rows have it, is what roofline.py says of ours."""
    print(
        f"\n{'stage':<40} {'ours (s)':>8} {'theirs':>8} {'ratio':>6} {'GFLOP/s':>8} {'of peak':>8} {'ours/floor':>10}"
        + f" {'modelled':>9}" * any("modelled" in row for row in result["stages"].values())
    )
    for stage, row in result["stages"].items():
        line = f"{stage:<40} {row['ours']:>8.2f} {row['theirs']:>8.2f} {row['ratio']:>7.2f}x"
        of_peak = ""
        if "gflops" in row:
            of_peak = (
                f" {row['gflops']:>8.0f} {row['gflops'] / result['gflops']:>8.0%} {row['ours'] / row['floor']:>10.2f}"
            )
        modelled = f" {row['modelled']:>9.2f}" if "modelled" in row else ""
        print(f"{line}{of_peak:<28}{modelled}".rstrip())
    print(f"matrix-product peak in this run: {result['gflops']:.0f} GFLOP/s")


def peak_memory_of_both() -> dict[str, int]:
    """Bytes, each in a process of its own with the same flags, and what that process of ours had planned."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    command = [sys.executable, "-m", "tests.benchmarks.compare_with_kronfluence", *sys.argv[1:], "--peak_memory_of"]
    peaks = {}
    for system in ("ours", "theirs"):
        done = subprocess.run([*command, system], capture_output=True, text=True, check=True)
        peaks[system], *planned = map(int, done.stdout.splitlines()[-1].split())
        print(
            f"peak memory, {system}: {peaks[system] / 1e9:.2f} GB"
            + (f", {planned[0] / 1e9:.2f} planned" if planned else "")
        )
        if planned:
            peaks["planned"] = planned[0]
    return peaks


def measure_peak(arguments, setting, peer) -> list[int]:
    """[bytes that one system takes at most in this process, and that were planned], the peer with its largest batch."""
    train, planned = setting.train[: arguments.num_peer_train], []
    if arguments.peak_memory_of == "ours":
        planned = [run_ours(arguments, setting, train).planned_bytes]
    else:
        query_batch_size = max(size or arguments.num_queries for size in arguments.peer_query_batch_sizes)
        peer.fit(train, arguments.factor_batch_size)
        peer.score(setting.queries, train, query_batch_size, arguments.train_batch_size)
    return [Runtime(device=setting.device).peak_memory(), *planned]


if __name__ == "__main__":
    main()
