"""Side by side with kronfluence 1.0.1: same weights, tokens and labels; agreement, then time, stage by stage.

    python -m tests.benchmarks.compare_with_kronfluence --checkpoint_dir DIR --num_train 256 --num_queries 64

First both systems run once with the same labels, and factors and scores are compared. Then both run `--repeats` times
in turn, each sampling labels online as it does by itself, and medians are compared. The peer scores at query batches
of `--peer_query_batch_sizes` (0: all queries in one, its best). The checkpoint is one of wikitext_gpt2/train.py;
without one, a GPT-2 of `--config_overrides` with random weights. Both get the same model object, and so the same
activation kernel.
"""

import argparse
import inspect
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from scipy.stats import spearmanr

from influence_core.analysis import analyze
from influence_core.experiments.arguments import read_training_record
from influence_core.labels import LabelSampler
from influence_core.runtime import Runtime
from influence_core.study import Study
from tests.benchmarks.peer import STAGES, Peer
from wikitext_gpt2.task import WikiTextTask


class FixedLabelsTask(WikiTextTask):
    """The task with labels sampled beforehand, carried by each example."""

    def collate(self, examples):
        batch = super().collate(examples)
        if "sampled_labels" in examples[0]:
            batch["sampled_labels"] = torch.stack([example["sampled_labels"] for example in examples])
        return batch

    def train_loss(self, model, batch, sample_labels=None):
        if sample_labels is None or "sampled_labels" not in batch:
            return super().train_loss(model, batch, sample_labels)
        return self.next_token_loss(model, batch["input_ids"], batch["sampled_labels"])


def sample_all_labels(model, examples, seed):
    """Each example with "sampled_labels" [positions - 1] from the model's own distribution."""
    sampler = LabelSampler(seed)
    labelled = []
    for index, example in enumerate(examples):
        with torch.no_grad():
            logits = model(example["input_ids"][None].to(model.device), use_cache=False).logits[0, :-1]
        uniforms = sampler.uniforms(torch.tensor([index]), len(logits))[0].to(logits.device)
        labelled.append({**example, "sampled_labels": sampler.sample(logits, uniforms).cpu()})
    return labelled


def run_ours(task, model, train, queries, arguments, directory, compile):
    """(seconds by stage, scores, factors directory)"""
    runtime = Runtime.start(use_half_precision=arguments.half, use_compile=compile, seed=arguments.seed)
    study = Study(task, model, train, directory, runtime, overwrite=True)
    scores = analyze(
        study,
        [arguments.strategy],
        queries,
        damping=arguments.damping,
        query_batch_size=arguments.query_batch_size,
        train_batch_size=arguments.train_batch_size,
        factor_batch_size=arguments.factor_batch_size,
    )
    seconds = {stage: study.profiler.total(stage) for stage in (*STAGES, "Compute Pairwise Score")}
    return seconds, scores[arguments.strategy], next(directory.glob("factors_*"), None)


def matrix_product_peak(device, half):
    """GFLOP/s of a large product here and now."""
    a = torch.randn(
        2048, 2048, device=device, dtype=torch.bfloat16 if half and device.type == "cuda" else torch.float32
    )
    times = []
    for _ in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / median(times) / 1e9


def relative_difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def agreement(ours, theirs, our_directory, their_factors):
    """Largest relative differences of factors, and how the scores correlate."""
    from safetensors.torch import load_file

    result = {"scores": relative_difference(ours, theirs)}
    for kind, tensors in their_factors.items():
        mine = load_file(our_directory / f"{kind}.safetensors")
        result[kind] = max(relative_difference(mine[name], tensor) for name, tensor in tensors.items())
    result["pearson"] = float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]).double())[0, 1])
    result["mean_query_spearman"] = float(sum(spearmanr(a, b).statistic for a, b in zip(ours, theirs)) / len(ours))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    WikiTextTask.add_arguments(parser)
    parser.add_argument("--checkpoint_dir")
    parser.add_argument("--num_train", type=int, default=256)
    parser.add_argument("--num_queries", type=int, default=64)
    parser.add_argument("--query_batch_size", type=int, default=16)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--factor_batch_size", type=int, default=16)
    parser.add_argument("--peer_query_batch_sizes", type=int, nargs="+", default=[8, 0])
    parser.add_argument("--strategy", default="ekfac")
    parser.add_argument("--damping", type=float, default=1e-8)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; 0: agreement only")
    parser.add_argument("--seed", type=int, default=1004)
    parser.add_argument("--out", type=Path, default=Path("benchmark_results/compare_with_kronfluence.json"))
    parser.set_defaults(
        dataset_name_or_path="pydoc_data.topics",
        block_size=128,
        vocab_size=8192,
        config_overrides="n_layer=4,n_embd=256,n_head=4,n_positions=128",
    )
    arguments = parser.parse_args()
    if arguments.checkpoint_dir:
        vars(arguments).update(
            {k: v for k, v in read_training_record(arguments.checkpoint_dir).items() if k in TASK_FLAGS}
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    task = FixedLabelsTask(**{flag: getattr(arguments, flag) for flag in TASK_FLAGS})
    model = task.load_model(arguments.checkpoint_dir).to(device).eval()
    train = task.load_dataset("train", range(arguments.num_train))
    queries = task.load_dataset("validation", range(arguments.num_queries))

    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        peer = Peer(
            model, task.tracked_layer_names(model), directory / "peer", arguments.strategy, arguments.damping,
            arguments.half, arguments.compile,
        )  # fmt: skip
        labelled = sample_all_labels(model, train, arguments.seed)
        _, ours, factors = run_ours(task, model, labelled, queries, arguments, directory / "ours", arguments.compile)
        peer.task.online = False
        peer.fit(labelled, arguments.factor_batch_size)
        _, theirs = peer.score(queries, labelled, arguments.num_queries, arguments.train_batch_size)
        result = {"agreement": agreement(ours, theirs, factors, peer.factors())}
        for name, value in result["agreement"].items():
            print(f"{name:<22} {value:.3g}" if value < 0.9 else f"{name:<22} {value:.8f}")

        peer.task.online = True
        rows: dict[str, dict[str, list[float]]] = {}
        peaks = []
        for _ in range(arguments.repeats):
            peaks.append(matrix_product_peak(device, arguments.half))
            seconds, *_ = run_ours(task, model, train, queries, arguments, directory / "ours", arguments.compile)
            pairwise = seconds.pop("Compute Pairwise Score")
            for stage, theirs in peer.fit(train, arguments.factor_batch_size).items():
                row = rows.setdefault(stage, {"ours": [], "theirs": []})
                row["ours"].append(seconds[stage])
                row["theirs"].append(theirs)
            for size in arguments.peer_query_batch_sizes:
                theirs, _ = peer.score(queries, train, size or arguments.num_queries, arguments.train_batch_size)
                row = rows.setdefault(f"Pairwise, peer's batch {size or 'all'}", {"ours": [], "theirs": []})
                row["ours"].append(pairwise)
                row["theirs"].append(theirs)

    result["stages"] = {}
    if rows:
        print_times(rows, result, peaks)
    result["arguments"] = {key: str(value) for key, value in vars(arguments).items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def print_times(rows, result, peaks):
    """The table of medians; also noted in the result."""
    print(f"\n{'stage':<28} {'ours (s)':>9} {'theirs (s)':>10} {'ratio':>6}")
    for stage, row in rows.items():
        ours, theirs = median(row["ours"]), median(row["theirs"])
        result["stages"][stage] = {"ours": ours, "theirs": theirs, "ratio": theirs / ours, "all": row}
        print(f"{stage:<28} {ours:>9.2f} {theirs:>10.2f} {theirs / ours:>5.2f}x")
    result["matrix_product_gflops"] = median(peaks)
    print(f"matrix-product peak in this run: {result['matrix_product_gflops']:.0f} GFLOP/s")


TASK_FLAGS = tuple(inspect.signature(WikiTextTask).parameters)

if __name__ == "__main__":
    main()
