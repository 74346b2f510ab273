"""The plan as a person reads it, before the work begins."""

from dataclasses import replace

from torch import nn

from influence_core.coverage import describe_coverage
from influence_core.layers import TrackedLayer
from influence_core.scores.cost import Work, factor_bytes, fit_peaks, pass_peaks
from influence_core.scores.plan import Plan, plan_flops
from influence_core.sharded_units import describe_units
from influence_core.sharding import local
from influence_core.units import gigabytes


def describe_plan(
    plan: Plan, model: nn.Module, layers: list[TrackedLayer], work: Work, in_use: int, budget: int
) -> str:
    """The plan as a person reads it, before the work begins."""
    flops = plan_flops(plan, layers, work)
    stages = ", ".join(f"{stage} {gigabytes(in_use + peak)}" for stage, peak in plan.peak_bytes.items())
    passes = f"{plan.num_passes} over the training set"
    if plan.num_passes > 1:
        passes += f" ({len(plan.layer_groups)} groups of layers x {len(plan.query_tiles)} tiles of queries)"
    if plan.scored_at_once > work.train_batch_size:
        passes += f", up to {plan.scored_at_once} examples scored at once"
    kept = ""
    if plan.kept_bytes:
        kept = f", less passes of {plan.kept_share:.0%} of lambda ({gigabytes(plan.kept_bytes)} kept)"
    disk = factor_bytes(layers, work) + work.num_rows * work.num_train * 4
    queries = f"the sum of {work.num_queries} queries" if work.sum_queries else f"{work.num_queries} queries"
    rows = {
        "tracked": describe_coverage(model, layers),
        "scores": f"{queries} x {work.num_train} training examples"
        + (f" x {work.num_strategies} strategies" if work.num_strategies > 1 else ""),
        "passes": passes,
        "queries": f"{gigabytes(plan.resident_bytes)} of preconditioned gradients stay in memory"
        + (" (of the sum alone)" if work.sum_queries else ""),
        "memory": f"{gigabytes(in_use + max(plan.peak_bytes.values()))} at the peak ({stages}); "
        f"{gigabytes(in_use)} in use, {gigabytes(budget)} more may be taken",
        "disk": f"{gigabytes(disk)} of factors and scores",
        "work": ", ".join(f"{stage} {count / 1e12:.3g}" for stage, count in flops.items()) + f" TFLOP{kept}",
    }
    if work.num_shares > 1:
        rows = {"sharded": _describe_shards(plan, model, layers, work, in_use)} | rows
    return "Plan\n" + "\n".join(f"  {name:<8} {text}" for name, text in rows.items())


def _describe_shards(plan: Plan, model: nn.Module, layers: list[TrackedLayer], work: Work, in_use: int) -> str:
    """What each process has of the model, and what one process alone would need."""
    num_bytes = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    alone = replace(work, num_shares=1, num_processes=1, gathered_bytes=0)
    peaks = [*fit_peaks(layers, alone).values(), *pass_peaks(layers, alone, len(plan.query_tiles[0])).values()]
    part = sum(local(parameter).nbytes for parameter in model.parameters())
    needed = in_use + num_bytes - part + max(peaks)
    return (
        f"a part of {gigabytes(part)} of the model's {gigabytes(num_bytes)} in each of "
        f"{work.num_shares} processes, gathered by units ({describe_units(model)}); one process alone would need "
        f"{gigabytes(needed)}"
    )
