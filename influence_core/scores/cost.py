"""What the stages of an analysis take, counted before they run: bytes, and floating-point operations."""

from dataclasses import dataclass

from influence_core.exchange import LAYERS_AT_ONCE, share_out
from influence_core.factors.eigendecomposition import MATRICES, num_at_once
from influence_core.factors.lambdas import lambda_chunk
from influence_core.layers import TrackedLayer
from influence_core.losses import CHUNK_BYTES
from influence_core.probing import Probe

# At most, of the per-sample gradients of a layer made at once: those that are read together with the resident queries.
GRADIENT_BUFFER_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}
POST_PROCESSED_COPIES = 4  # of a gradient: by its parts, as a matrix, as the task leaves it, by its parts again
# At most, of the query gradients of a layer preconditioned at once: on a CPU so few that they stay in its cache between
# the four products.
PRECONDITIONED_BYTES = {"cpu": 6 << 20, "cuda": 512 << 20}


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
    num_shares: int = 1  # of the layers, each with a process; then each goes through all training examples
    gathered_bytes: int = 0  # of sharded parameters, during a pass
    post_processed: int = 0  # gradients an example that a task post-processes, those of a batch all at once
    sum_queries: bool = False  # to one gradient

    @property
    def num_gradients(self) -> int:
        """Of queries, to be preconditioned: each one's, or their sum."""
        return 1 if self.sum_queries else self.num_queries

    @property
    def num_rows(self) -> int:
        """Preconditioned gradients: of each strategy."""
        return self.num_gradients * self.num_strategies

    @property
    def num_scored(self) -> int:
        """Training examples that a process has scores of."""
        return self.num_train if self.num_shares > 1 else -(-self.num_train // self.num_processes)

    def exchanged(self, probe: Probe, batch_size: int, layers: list[TrackedLayer]) -> int:
        """Bytes of what processes send each other of their batches, and get, at once."""
        if self.num_shares == 1:
            return 0
        at_once = min(1.0, LAYERS_AT_ONCE * self.num_shares / len(layers))
        return int(2 * at_once * batch_size * probe.captured_of(layers))

    def num_lambdas(self, layer: TrackedLayer) -> int:
        """Strategies that need one at a layer."""
        return self.num_with_lambda if layer.is_kronecker else self.num_preconditioned


def largest_share(layers: list[TrackedLayer], work: Work) -> list[TrackedLayer]:
    """Of these layers, those of the process that has the most."""
    if work.num_shares == 1:
        return layers
    shares = share_out(layers, work.num_shares)
    return max(shares, key=lambda share: sum(layer.num_parameters for layer in share))


def gradient_chunk(layer: TrackedLayer, itemsize: int, device_type: str) -> int:
    """Per-sample gradients of a layer that are made at once, at most."""
    return max(1, GRADIENT_BUFFER_BYTES[device_type] // (layer.num_parameters * itemsize))


def preconditioning_chunk(layer: TrackedLayer, itemsize: int, device_type: str) -> int:
    """Query gradients of a layer that are preconditioned at once, at most."""
    return max(1, PRECONDITIONED_BYTES[device_type] // (layer.num_parameters * itemsize))


def pass_peaks(group: list[TrackedLayer], work: Work, tile_size: int, scored_at_once: int = 1) -> dict[str, int]:
    """Bytes beyond what is in use, for the stages that the plan can shape."""
    exchanged = {
        "query gradients": work.exchanged(work.query, work.query_batch_size, group),
        "training pass": work.exchanged(work.train, work.train_batch_size, group),
    }
    group = largest_share(group, work)
    resident = tile_size * work.num_strategies * sum(layer.num_parameters for layer in group) * work.operand_bytes
    scores = work.num_rows * work.num_scored * work.sum_bytes
    logits = 3 * CHUNK_BYTES[work.device_type]
    scored_at_once = max(scored_at_once, work.train_batch_size)
    query_buffer = train_buffer = 0  # numbers, in gradients of a layer that are at hand at once
    for layer in group:
        at_once = preconditioning_chunk(layer, work.sum_bytes, work.device_type)
        at_once = min(at_once, work.num_gradients, work.query_batch_size)
        query_buffer = max(query_buffer, at_once * layer.num_parameters)
        at_once = gradient_chunk(layer, work.product_bytes, work.device_type)
        train_buffer = max(train_buffer, min(scored_at_once, at_once) * layer.num_parameters)
    factors = factor_bytes(group, work, preconditioners=True)
    scratch = scratch_bytes(group, work)
    largest = max(layer.num_parameters for layer in group)
    whole = [batch * _post_processed_bytes(largest, work) for batch in (work.query_batch_size, work.train_batch_size)]
    # A query's gradient is held by its parts, as a matrix, and twice while it is rotated.
    query = (
        work.query_batch_size * work.query.num_bytes
        + work.query.fixed_bytes
        + query_buffer * (work.product_bytes + 3 * work.sum_bytes)
    )
    train = (
        work.train_batch_size * work.train.num_bytes
        + work.train.fixed_bytes
        + (scored_at_once - work.train_batch_size) * work.train.captured_of(group)
        + train_buffer * work.product_bytes
        + 2 * work.num_rows * scored_at_once * work.sum_bytes  # scores of these examples, and a product to add
    )
    sums = work.sum_queries * sum(layer.num_parameters for layer in group) * work.sum_bytes
    peaks = {
        "query gradients": resident + sums + scores + factors + query + logits + scratch + whole[0],
        "training pass": resident + scores + train + logits + scratch + whole[1],
    }
    return {stage: peak + exchanged[stage] + work.gathered_bytes for stage, peak in peaks.items()}


def _post_processed_bytes(num_parameters: int, work: Work) -> int:
    """Of one example's gradients of a layer, where a task post-processes them."""
    return POST_PROCESSED_COPIES * work.post_processed * num_parameters * work.product_bytes


def scratch_bytes(layers: list[TrackedLayer], work: Work) -> int:
    """Of a gradient's sums, where products have fewer digits."""
    return (work.product_bytes < work.sum_bytes) * work.sum_bytes * max(layer.scratch_numbers for layer in layers)


def factor_bytes(layers: list[TrackedLayer], work: Work, preconditioners: bool = False) -> int:
    """Bytes of all strategies' factors: those that are stored, or what the preconditioners hold."""
    squares = sum(layer.num_covariances for layer in layers)
    matrices = squares * (bool(work.num_in_eigenbasis) if preconditioners else 2 * work.num_in_eigenbasis)
    vectors = sum(
        layer.num_parameters * (work.num_strategies if preconditioners else work.num_lambdas(layer)) for layer in layers
    )
    return (matrices + vectors) * work.sum_bytes


def fit_peaks(layers: list[TrackedLayer], work: Work) -> dict[str, int]:
    """Bytes beyond what is in use, of the factor stages."""
    peaks = {}
    exchanged = work.exchanged(work.train, work.factor_batch_size, layers)
    layers = largest_share(layers, work)
    squares = sum(layer.num_covariances for layer in layers) * work.sum_bytes
    kronecker = [layer for layer in layers if layer.is_kronecker]
    batch = work.factor_batch_size * work.train.num_bytes + work.train.fixed_bytes + 3 * CHUNK_BYTES[work.device_type]
    batch += exchanged + work.gathered_bytes
    if work.num_in_eigenbasis and kronecker:
        peaks["covariance"] = squares + batch
        widths = [size for layer in kronecker for size in layer.shape]
        at_once = [size**2 * num_at_once(size, work.device_type, work.num_workers) for size in widths]
        peaks["eigendecomposition"] = squares + MATRICES * 8 * max(at_once)
    with_lambda = [layer for layer in layers if work.num_lambdas(layer)]
    if with_lambda:
        lambda_matrices = sum(layer.num_parameters for layer in with_lambda) * work.sum_bytes
        buffer = work.sum_bytes * max(
            min(work.factor_batch_size, lambda_chunk(layer, work.sum_bytes, work.device_type)) * layer.num_parameters
            for layer in with_lambda
        )
        peaks["lambda"] = squares * bool(work.num_in_eigenbasis) + lambda_matrices + batch + 2 * buffer
        peaks["lambda"] += scratch_bytes(with_lambda, work)
        largest = max(layer.num_parameters for layer in with_lambda)
        peaks["lambda"] += work.factor_batch_size * _post_processed_bytes(largest, work)
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


def _rotation_flops(layer: TrackedLayer, probe: Probe) -> float:
    """Of one example's gradient into the eigenbasis, where the layer has one."""
    if not layer.is_kronecker:
        return 0.0
    (o, i), t = layer.shape, probe.active_positions[layer.name]
    return min(2 * t * (o * o + i * i), 2 * o * i * (o + i))


def pairwise_flops(groups: list[list[TrackedLayer]], num_tiles: int, work: Work) -> float:
    """FLOPs of the queries' gradients and of the passes over the training set, by groups of layers."""
    layers = [layer for group in groups for layer in group]
    parameters = sum(layer.num_parameters for layer in layers)

    def gradient_flops(probe: Probe) -> float:
        """Of one example, all groups: a whole forward pass, the backward pass down to the group, its gradients."""
        flops, below = 0.0, 0
        for group in groups:
            flops += probe.forward_flops + probe.backward_flops * (1 - below / parameters)
            flops += sum(layer.gradient_flops(probe.active_positions) for layer in group)
            below += sum(layer.num_parameters for layer in group)
        return flops

    kronecker = [layer for layer in layers if layer.is_kronecker]
    rotations_back = sum(2 * layer.num_parameters * sum(layer.shape) for layer in kronecker)
    rotations = sum(_rotation_flops(layer, work.query) for layer in layers)
    if work.sum_queries:  # a whole gradient, of many positions
        rotations = rotations_back
    preconditioning = rotations * bool(work.num_in_eigenbasis) + rotations_back * work.num_in_eigenbasis
    of_queries = work.num_queries * gradient_flops(work.query) + work.num_gradients * preconditioning
    return of_queries + work.num_train * (num_tiles * gradient_flops(work.train) + 2 * work.num_rows * parameters)
