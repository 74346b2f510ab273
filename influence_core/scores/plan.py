"""How many preconditioned query gradients stay in memory, and so how many passes over the training set there are.

Every resident query shares a pass. Where memory holds all queries for all layers, there is one pass. Where it does
not, the work is split by layers first, then by queries: a pass for a group of layers needs no backward pass below the
group and makes per-sample gradients of the group alone, while a pass for a tile of queries repeats everything.

For two parts the count is, with P parameters and T positions, an example: 9 PT by layers against 12 PT by queries.
"""

from dataclasses import dataclass, replace

from influence_core.errors import UserError
from influence_core.factors.eigendecomposition import WIDE
from influence_core.factors.lambdas import lambda_chunk
from influence_core.layers import TrackedLayer
from influence_core.losses import CHUNK_BYTES
from influence_core.probing import Probe
from influence_core.units import gigabytes

GRADIENT_BUFFER_BYTES = 512 << 20  # at most, of the per-sample gradients of a layer made at once
# At most, of the query gradients of a layer preconditioned at once: on a CPU so few that they stay in its cache between
# the four products.
PRECONDITIONED_BYTES = {"cpu": 6 << 20, "cuda": 512 << 20}
SCORED_AT_ONCE = 64  # training examples: their products with all resident queries read these only once


@dataclass(frozen=True)
class Work:
    """The size of an analysis, in examples, bytes an example, and dtypes' bytes."""

    num_train: int
    num_queries: int
    num_strategies: int
    train_batch_size: int
    query_batch_size: int
    factor_batch_size: int
    train: Probe  # of one training example
    query: Probe  # of one query
    operand_bytes: int  # of a stored query gradient's number
    product_bytes: int  # of a number as it enters a product (more than stored where bfloat16 is emulated)
    num_in_eigenbasis: int  # strategies
    num_with_lambda: int
    num_preconditioned: int  # those that are either or both: all but the identity
    sum_bytes: int = 4
    device_type: str = "cpu"
    num_processes: int = 1  # that share the training examples
    num_workers: int = 1  # eigendecompositions at once

    @property
    def num_rows(self) -> int:
        """Preconditioned gradients: one for each query and strategy."""
        return self.num_queries * self.num_strategies

    def num_lambdas(self, layer: TrackedLayer) -> int:
        """Strategies that need one at a layer."""
        return self.num_with_lambda if layer.is_kronecker else self.num_preconditioned


@dataclass(frozen=True)
class Plan:
    """The layers and queries that are resident in each pass, and what that takes."""

    layer_groups: list[list[TrackedLayer]]
    query_tiles: list[range]
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
    smallest = max([*fit_peaks(layers, work).values(), *(max(_peaks([layer], work, 1).values()) for layer in layers)])
    if smallest > budget:
        raise UserError(
            f"{gigabytes(in_use + max(budget, -in_use))} of memory is too little: {gigabytes(in_use)} is in use, "
            f"and at least {gigabytes(smallest)} more is needed for batches of {work.factor_batch_size} "
            f"(--factor_batch_size), {work.query_batch_size} (--query_batch_size) and {work.train_batch_size} "
            "(--train_batch_size) examples; raise --memory_budget_gb, or use a smaller model"
        )
    plans = []
    num_tiles = 1
    while num_tiles <= work.num_queries and all(num_tiles <= plan.num_passes for plan in plans):
        tile_size = -(-work.num_queries // num_tiles)
        tiles = [
            range(start, min(start + tile_size, work.num_queries)) for start in range(0, work.num_queries, tile_size)
        ]
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
    for at_once in range(SCORED_AT_ONCE // batch * batch, batch, -batch):
        peak = max(_peaks(group, work, tile_size, at_once)["training pass"] for group in plan.layer_groups)
        takes_little = peak <= highest or (at_once - batch) * work.train.captured_bytes <= plan.resident_bytes / 2
        if peak <= budget and takes_little:
            peaks = {**plan.peak_bytes, "training pass": peak}
            held_bytes = at_once * work.train.captured_bytes
            return replace(plan, scored_at_once=at_once, held_bytes=held_bytes, peak_bytes=peaks)
    return plan


def gradient_chunk(layer: TrackedLayer, itemsize: int) -> int:
    """Per-sample gradients of a layer that are made at once, at most."""
    return max(1, GRADIENT_BUFFER_BYTES // (layer.num_parameters * itemsize))


def preconditioning_chunk(layer: TrackedLayer, itemsize: int, device_type: str) -> int:
    """Query gradients of a layer that are preconditioned at once, at most."""
    return max(1, PRECONDITIONED_BYTES[device_type] // (layer.num_parameters * itemsize))


def _fill_groups(
    layers: list[TrackedLayer], work: Work, tile_size: int, budget: int
) -> list[list[TrackedLayer]] | None:
    """Consecutive layers into as few groups as fit, of about equal size; None if a single layer does not fit."""

    def fits(group: list[TrackedLayer]) -> bool:
        return max(_peaks(group, work, tile_size).values()) <= budget

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


def _peaks(group: list[TrackedLayer], work: Work, tile_size: int, scored_at_once: int = 1) -> dict[str, int]:
    """Bytes beyond what is in use, for the stages that the plan can shape."""
    resident = tile_size * work.num_strategies * sum(layer.num_parameters for layer in group) * work.operand_bytes
    scores = work.num_rows * -(-work.num_train // work.num_processes) * work.sum_bytes
    logits = 3 * CHUNK_BYTES[work.device_type]
    scored_at_once = max(scored_at_once, work.train_batch_size)
    query_buffer = train_buffer = 0  # numbers, in gradients of a layer that are at hand at once
    for layer in group:
        at_once = preconditioning_chunk(layer, work.sum_bytes, work.device_type)
        query_buffer = max(query_buffer, min(work.query_batch_size, at_once) * layer.num_parameters)
        at_once = gradient_chunk(layer, work.product_bytes)
        train_buffer = max(train_buffer, min(scored_at_once, at_once) * layer.num_parameters)
    factors = factor_bytes(group, work, preconditioners=True)
    scratch = scratch_bytes(group, work)
    # A query's gradient is held by its parts, as a matrix, and twice while it is rotated.
    query = (
        work.query_batch_size * work.query.num_bytes
        + work.query.fixed_bytes
        + query_buffer * (work.product_bytes + 3 * work.sum_bytes)
    )
    train = (
        work.train_batch_size * work.train.num_bytes
        + work.train.fixed_bytes
        + (scored_at_once - work.train_batch_size) * work.train.captured_bytes
        + train_buffer * work.product_bytes
    )
    return {
        "query gradients": resident + scores + factors + query + logits + scratch,
        "training pass": resident + scores + train + logits + scratch,
    }


def scratch_bytes(layers: list[TrackedLayer], work: Work) -> int:
    """Of a gradient's sums, where products have fewer digits."""
    return (work.product_bytes < work.sum_bytes) * work.sum_bytes * max(layer.scratch_numbers for layer in layers)


def factor_bytes(layers: list[TrackedLayer], work: Work, preconditioners: bool = False) -> int:
    """Bytes of all strategies' factors: those that are stored, or what the preconditioners hold."""
    squares = _squares(layers)
    matrices = squares * (bool(work.num_in_eigenbasis) if preconditioners else 2 * work.num_in_eigenbasis)
    vectors = sum(
        layer.num_parameters * (work.num_strategies if preconditioners else work.num_lambdas(layer)) for layer in layers
    )
    return (matrices + vectors) * work.sum_bytes


def _squares(layers: list[TrackedLayer]) -> int:
    """Numbers in the covariances of all layers that have them."""
    return sum(size * size for layer in layers if layer.is_kronecker for size in layer.shape)


def fit_peaks(layers: list[TrackedLayer], work: Work) -> dict[str, int]:
    """Bytes beyond what is in use, of the factor stages."""
    peaks = {}
    squares = _squares(layers) * work.sum_bytes
    kronecker = [layer for layer in layers if layer.is_kronecker]
    batch = work.factor_batch_size * work.train.num_bytes + work.train.fixed_bytes + 3 * CHUNK_BYTES[work.device_type]
    if work.num_in_eigenbasis and kronecker:
        peaks["covariance"] = squares + batch
        widths = [size for layer in kronecker for size in layer.shape]
        at_once = [size**2 * (1 if size >= WIDE else work.num_workers) for size in widths]
        peaks["eigendecomposition"] = squares + 5 * 8 * max(at_once)
    with_lambda = [layer for layer in layers if work.num_lambdas(layer)]
    if with_lambda:
        lambda_matrices = sum(layer.num_parameters for layer in with_lambda) * work.sum_bytes
        buffer = work.sum_bytes * max(
            min(work.factor_batch_size, lambda_chunk(layer, work.sum_bytes, work.device_type)) * layer.num_parameters
            for layer in with_lambda
        )
        peaks["lambda"] = squares * bool(work.num_in_eigenbasis) + lambda_matrices + batch + 2 * buffer
        peaks["lambda"] += scratch_bytes(with_lambda, work)
    return peaks


def fit_flops(layers: list[TrackedLayer], work: Work) -> dict[str, float]:
    """FLOPs of the factor stages: the passes, and the products that the factors need."""
    one_pass = work.train.forward_flops + work.train.backward_flops
    flops = {}
    kronecker = [layer for layer in layers if layer.is_kronecker]
    if work.num_in_eigenbasis and kronecker:
        products = sum(
            work.train.positions[layer.name] * layer.shape[1] ** 2
            + work.train.active_positions[layer.name] * layer.shape[0] ** 2
            for layer in kronecker
        )
        flops["covariance"] = work.num_train * (one_pass + products)  # half of 2 t d^2, by symmetry
        flops["eigendecomposition"] = 9.0 * sum(d**3 for layer in kronecker for d in layer.shape)
    with_lambda = [layer for layer in layers if work.num_lambdas(layer)]
    if with_lambda:
        products = sum(layer.gradient_flops(work.train.active_positions) for layer in with_lambda)
        if work.num_in_eigenbasis:
            products += sum(_rotation_flops(layer, work.train) for layer in with_lambda)
        flops["lambda"] = work.num_train * (one_pass + products)
    return flops


def plan_flops(plan: Plan, layers: list[TrackedLayer], work: Work) -> dict[str, float]:
    """FLOPs of every stage of the analysis."""
    return {**fit_flops(layers, work), "pairwise": plan.pairwise_flops}


def _rotation_flops(layer: TrackedLayer, probe: Probe) -> float:
    """Of one example's gradient into the eigenbasis, where the layer has one."""
    if not layer.is_kronecker:
        return 0.0
    (o, i), t = layer.shape, probe.active_positions[layer.name]
    return min(2 * t * (o * o + i * i), 2 * o * i * (o + i))


def _cost(groups: list[list[TrackedLayer]], tiles: list[range], layers: list[TrackedLayer], work: Work) -> Plan:
    parameters = sum(layer.num_parameters for layer in layers)

    def gradient_flops(probe: Probe) -> float:
        """Of one example, all groups: a whole forward pass, the backward pass down to the group, its gradients."""
        flops, below = 0.0, 0
        for group in groups:
            flops += probe.forward_flops + probe.backward_flops * (1 - below / parameters)
            flops += sum(layer.gradient_flops(probe.active_positions) for layer in group)
            below += sum(layer.num_parameters for layer in group)
        return flops

    rotations = sum(_rotation_flops(layer, work.query) for layer in layers) * bool(work.num_in_eigenbasis)
    kronecker = [layer for layer in layers if layer.is_kronecker]
    rotations_back = sum(2 * layer.num_parameters * sum(layer.shape) for layer in kronecker) * work.num_in_eigenbasis
    flops = work.num_queries * (gradient_flops(work.query) + rotations + rotations_back)
    flops += work.num_train * (len(tiles) * gradient_flops(work.train) + 2 * work.num_rows * parameters)
    peaks = fit_peaks(layers, work)
    for group in groups:
        for stage, peak in _peaks(group, work, len(tiles[0])).items():
            peaks[stage] = max(peak, peaks.get(stage, 0))
    resident = max(sum(layer.num_parameters for layer in group) for group in groups)
    return Plan(groups, tiles, resident * len(tiles[0]) * work.num_strategies * work.operand_bytes, peaks, flops)
