"""How many preconditioned query gradients stay in memory, and so how many passes over the training set there are.

Every resident query shares a pass. Where memory holds all queries for all layers, there is one pass. Where it does
not, the work is split by layers first, then by queries: a pass for a group of layers needs no backward pass below the
group and makes per-sample gradients of the group alone, while a pass for a tile of queries repeats everything.

For two parts the count is, with P parameters and T positions, an example: 9 PT by layers against 12 PT by queries.
"""

from dataclasses import dataclass, replace

from influence_core.errors import UserError
from influence_core.layers import TrackedLayer
from influence_core.scores.cost import Work, fit_flops, fit_peaks, largest_share, pairwise_flops, pass_peaks
from influence_core.units import gigabytes

# Training examples whose products with all resident queries read these only once: on a GPU, which takes 14 ms to read
# 40 GB of them, as many as make that little beside the products.
SCORED_AT_ONCE = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class Plan:
    """The layers and queries that are resident in each pass, and what that takes."""

    layer_groups: list[list[TrackedLayer]]
    query_tiles: list[range]  # rows of the scores: queries, or their sum alone
    resident_bytes: int  # of query gradients, the largest pass
    peak_bytes: dict[str, int]  # beyond what is in use before, by stage
    pairwise_flops: float
    scored_at_once: int = 1  # training examples that are held until they are scored, if a batch has fewer
    held_bytes: float = float("inf")  # of what was captured of them; beyond, fewer are scored at once
    kept_bytes: int = 0  # that the covariance pass may keep for the Lambda pass
    kept_share: float = 0.0  # for how many of the training examples these bytes suffice

    @property
    def num_passes(self) -> int:
        return len(self.layer_groups) * len(self.query_tiles)


def make_plan(layers: list[TrackedLayer], work: Work, budget: int, in_use: int = 0) -> Plan:
    """The plan with the fewest FLOPs among those that fit.

    Args:
        layers: in the order of the forward pass.
        budget: bytes that may be taken beyond the `in_use` bytes that are.
    Raises:
        UserError: the factor stages, or one layer with one query, do not fit.
    """
    smallest = max(
        [*fit_peaks(layers, work).values(), *(max(pass_peaks([layer], work, 1).values()) for layer in layers)]
    )
    if smallest > budget:
        raise UserError(
            f"{gigabytes(in_use + max(budget, -in_use))} of memory is too little: {gigabytes(in_use)} is in use, "
            f"and at least {gigabytes(smallest)} more is needed for batches of {work.factor_batch_size} "
            f"(--factor_batch_size), {work.query_batch_size} (--query_batch_size) and {work.train_batch_size} "
            "(--train_batch_size) examples; raise --memory_budget_gb, or use a smaller model"
        )
    plans = []
    num_tiles = 1
    while num_tiles <= work.num_gradients and all(num_tiles <= plan.num_passes for plan in plans):
        tile_size = -(-work.num_gradients // num_tiles)
        starts = range(0, work.num_gradients, tile_size)
        tiles = [range(start, min(start + tile_size, work.num_gradients)) for start in starts]
        groups = _fill_groups(layers, work, tile_size, budget)
        if groups is not None:
            plans.append(_cost(groups, tiles, layers, work))
            if len(groups) == 1:
                break
        num_tiles += 1
    best = min(plans, key=lambda plan: (plan.pairwise_flops, plan.num_passes))
    return _keep_captures(_score_many_at_once(best, work, budget), work)


def _keep_captures(plan: Plan, work: Work) -> Plan:
    """Keep what the covariance pass captured for the Lambda pass, as far as the peak is that of another stage."""
    stages = [stage for stage in ("covariance", "eigendecomposition", "lambda") if stage in plan.peak_bytes]
    if not {"covariance", "lambda"} <= set(stages):
        return plan
    room = max(plan.peak_bytes.values()) - max(plan.peak_bytes[stage] for stage in stages)
    of_all = work.train.captured_bytes * -(-work.num_train // work.num_processes)
    kept = min(room, of_all)
    peaks = {stage: peak + kept * (stage in stages) for stage, peak in plan.peak_bytes.items()}
    return replace(plan, kept_bytes=kept, kept_share=kept / max(of_all, 1), peak_bytes=peaks)


def _score_many_at_once(plan: Plan, work: Work, budget: int) -> Plan:
    """Hold several training batches until they are scored together, where that takes little beside the rest."""
    batch, tile_size = work.train_batch_size, len(plan.query_tiles[0])
    highest = max(plan.peak_bytes.values())  # of all stages
    captured = max(map(work.train.captured_of, plan.layer_groups))
    for at_once in range(SCORED_AT_ONCE[work.device_type] // batch * batch, batch, -batch):
        peak = max(pass_peaks(group, work, tile_size, at_once)["training pass"] for group in plan.layer_groups)
        takes_little = peak <= highest or (at_once - batch) * captured <= plan.resident_bytes / 2
        if peak <= budget and takes_little:
            peaks = {**plan.peak_bytes, "training pass": peak}
            held_bytes = at_once * captured
            return replace(plan, scored_at_once=at_once, held_bytes=held_bytes, peak_bytes=peaks)
    return plan


def _fill_groups(
    layers: list[TrackedLayer], work: Work, tile_size: int, budget: int
) -> list[list[TrackedLayer]] | None:
    """Consecutive layers into as few groups as fit, of about equal size; None if a single layer does not fit."""

    def fits(group: list[TrackedLayer]) -> bool:
        return max(pass_peaks(group, work, tile_size).values()) <= budget

    def fill(limit: float) -> list[list[TrackedLayer]] | None:
        groups: list[list[TrackedLayer]] = [[]]
        for layer in layers:
            grown = [*groups[-1], layer]
            if groups[-1] and (not fits(grown) or sum(x.num_parameters for x in grown) > limit):
                groups.append([layer])
            else:
                groups[-1] = grown
        return groups if all(map(fits, groups)) else None

    groups = fill(float("inf"))
    if groups is None or len(groups) == 1:
        return groups
    even = 1.1 * sum(layer.num_parameters for layer in layers) / len(groups)
    balanced = fill(even)
    return balanced if balanced is not None and len(balanced) == len(groups) else groups


def plan_flops(plan: Plan, layers: list[TrackedLayer], work: Work) -> dict[str, float]:
    """FLOPs of every stage of the analysis."""
    return {**fit_flops(layers, work), "pairwise": plan.pairwise_flops}


def _cost(groups: list[list[TrackedLayer]], tiles: list[range], layers: list[TrackedLayer], work: Work) -> Plan:
    peaks = fit_peaks(layers, work)
    for group in groups:
        for stage, peak in pass_peaks(group, work, len(tiles[0])).items():
            peaks[stage] = max(peak, peaks.get(stage, 0))
    resident = max(sum(layer.num_parameters for layer in largest_share(group, work)) for group in groups)
    resident_bytes = resident * len(tiles[0]) * work.num_strategies * work.operand_bytes
    return Plan(groups, tiles, resident_bytes, peaks, pairwise_flops(groups, len(tiles), work))
