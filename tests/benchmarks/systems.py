"""What the benchmarks run: model and data of a setting, our analysis with its timings, and how scores agree."""

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from influence_core.analysis import analyze, probe_example
from influence_core.batches import order_examples
from influence_core.experiments.checkpoints import read_training_record
from influence_core.runtime import Runtime
from influence_core.study import Study
from tests.benchmarks.peer import STAGES
from tests.benchmarks.tasks import BENCHMARKED, BenchmarkedTask

PAIRWISE = "Compute Pairwise Score"
STAGE_OF = {"covariance": "Fit Covariance", "eigendecomposition": "Perform Eigendecomposition", "lambda": "Fit Lambda"}


@dataclass
class Setting:
    """Model and data of a comparison, and a directory for what both systems store."""

    task: BenchmarkedTask
    model: nn.Module
    train: list
    queries: list
    directory: Path

    @property
    def device(self) -> torch.device:
        return self.model.device

    def part(self, num_train: int, num_queries: int) -> "Setting":
        """The same with the first training examples and queries only."""
        return replace(self, train=self.train[:num_train], queries=self.queries[:num_queries])


def make_setting(arguments, directory: Path) -> Setting:
    """From the flags; those of the task come from the checkpoint where there is one."""
    task_class = BENCHMARKED[arguments.task]
    flags = task_class.flag_names()
    if arguments.checkpoint_dir:
        record = read_training_record(arguments.checkpoint_dir)
        vars(arguments).update({flag: record.get(flag) for flag in flags})
    torch.manual_seed(arguments.seed)
    task = task_class(**{flag: getattr(arguments, flag) for flag in flags})
    model = task.load_model(arguments.checkpoint_dir).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # Of this process, so for both systems, whichever comes first.
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    train, queries = list(task.load_dataset("train")), list(task.load_dataset("validation"))
    if len(train) < (arguments.num_train or 0):
        sys.exit(f"the data has {len(train)} training examples, and --num_train asks for {arguments.num_train}")
    queries += train[arguments.num_train :]  # a small corpus has few; time does not depend on which they are
    return Setting(task, model, train[: arguments.num_train], queries[: arguments.num_queries], directory)


@dataclass
class OurRun:
    """One analysis by the core; seconds and FLOPs by the name of the action."""

    scores: Tensor
    seconds: dict[str, float]
    planned_bytes: int
    flops: dict[str, float]
    product_flops: dict[str, float]  # of these, those outside the forward and backward passes
    table: str  # of all stages, those that load and save too
    pass_seconds: dict[str, float] = field(default_factory=dict)  # of the passes alone


def run_ours(arguments, setting: Setting, train: list, time_passes: bool = False) -> OurRun:
    runtime = Runtime.start(
        use_half_precision=arguments.half, use_compile=arguments.compile, seed=arguments.seed, use_tf32=arguments.tf32
    )
    study = Study(setting.task, setting.model, train, setting.directory / "ours", runtime, overwrite=True)
    scores = analyze(
        study,
        [arguments.strategy],
        setting.queries,
        damping=arguments.damping,
        query_batch_size=arguments.query_batch_size,
        train_batch_size=arguments.train_batch_size,
        factor_batch_size=arguments.factor_batch_size,
    )
    seconds = {stage: study.profiler.total(stage) for stage in (*STAGES, PAIRWISE)}
    flops = {STAGE_OF.get(stage, PAIRWISE): count for stage, count in study.planned_flops.items()}
    of_train, of_queries = (
        len(data) * (probe.forward_flops + probe.backward_flops)
        for data, loss in ((train, study.fisher_loss), (setting.queries, setting.task.measurement))
        for probe in [probe_example(study, data, loss, study.layers)]
    )
    passes = {"Fit Covariance": of_train, "Fit Lambda": of_train, PAIRWISE: of_train + of_queries}
    products = {stage: count - passes.get(stage, 0) for stage, count in flops.items()}
    run_again = 1 - study.num_kept / len(train)  # the Lambda pass takes what the covariance pass kept
    flops["Fit Lambda"] = products.get("Fit Lambda", 0) + run_again * of_train
    table = study.profiler.table()
    run = OurRun(scores[arguments.strategy], seconds, study.planned_memory, flops, products, table)
    if time_passes:
        fisher = _pass_seconds(study, train, study.fisher_loss, arguments.factor_batch_size)
        pairwise = _pass_seconds(study, train, setting.task.train_loss, arguments.train_batch_size)
        pairwise += _pass_seconds(study, setting.queries, setting.task.measurement, arguments.query_batch_size)
        run.pass_seconds = {"Fit Covariance": fisher, "Fit Lambda": run_again * fisher, PAIRWISE: pairwise}
        run.pass_seconds["Perform Eigendecomposition"] = 0.0
    return run


def _pass_seconds(study: Study, dataset, loss, batch_size: int) -> float:
    """Forward and backward over the dataset, with nothing done to what is captured."""
    order = order_examples(study.lengths(dataset), study.runtime)
    study.runtime.synchronize()
    start = time.perf_counter()
    with study.gradient_pass(loss) as run:
        for _, captured in study.captures(run, dataset, order, batch_size, "loss"):
            captured.clear()
    study.runtime.synchronize()
    return time.perf_counter() - start


def matrix_product_peak(device, half) -> float:
    """GFLOP/s of a large product here and now."""
    dtype = torch.bfloat16 if half and device.type == "cuda" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    runtime, times = Runtime(device=device), []
    for _ in range(7):
        runtime.synchronize()
        start = time.perf_counter()
        a @ a
        runtime.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times) / 1e9


def relative_difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def agreement(ours: Tensor, theirs: Tensor, our_directory: Path, their_factors: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences of factors, and how the scores correlate."""
    factors = next(our_directory.glob("factors_*"))
    result = {"scores": relative_difference(ours, theirs)}
    for kind, tensors in their_factors.items():
        mine = load_file(factors / f"{kind}.safetensors")
        result[kind] = max(relative_difference(mine[name], tensor) for name, tensor in tensors.items())
    result["pearson"] = float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]).double())[0, 1])
    result["mean_query_spearman"] = float(sum(spearmanr(a, b).statistic for a, b in zip(ours, theirs)) / len(ours))
    return result
