"""Pairwise influence scores: every query against every training example.

    score[q, t] = grad f(z_q)^T (F + damping)^-1 grad L(z_t),   summed over the tracked layers

The query side is preconditioned once and stays in memory, flattened to [queries, parameters of a layer]; one pass over
the training set then makes per-sample gradients, and each layer's scores are one matrix product
[queries, parameters] @ [parameters, batch], accumulated in float32. Positive: training on t lowers f of q.

Source: Grosse et al. 2023, arXiv:2308.03296, eq. 8 and section 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from influence_core.batches import plan_batches, share
from influence_core.factors.strategies import Damping, Preconditioner, find_strategy
from influence_core.fingerprints import dataset_fingerprint
from influence_core.layers import TrackedLayer
from influence_core.passes import Captured
from influence_core.scores.plan import Plan, gradient_chunk
from influence_core.storage import StageStore, Tensors
from influence_core.study import Study
from influence_core.task import EXAMPLE_INDEX

SCORES = "all_modules"  # name of the stored tensor [queries, training examples]


def pairwise_score_store(
    study: Study,
    strategy_name: str,
    query_dataset: Sequence[Any],
    damping: Damping,
    factor_stores: dict[str, StageStore] | None = None,
) -> StageStore:
    """Where a strategy's scores lie; without `factor_stores` only what is known before fitting is compared."""
    settings = {
        "strategy": strategy_name,
        "query_dataset": dataset_fingerprint(query_dataset),
        "num_queries": len(query_dataset),
        "damping": damping if strategy_name != "identity" else None,
    }
    if factor_stores is not None:
        settings["factors"] = {stage: store.checksum() for stage, store in factor_stores.items()}
    return study.score_store(study.result_name(strategy_name), **settings)


def compute_pairwise_scores(
    study: Study,
    factor_stores: dict[str, dict[str, StageStore]],
    query_dataset: Sequence[Any],
    plan: Plan,
    damping: Damping,
    query_batch_size: int,
    train_batch_size: int,
) -> dict[str, Tensor]:
    """Scores of each strategy, all from the same passes; stored, or read where finished ones are stored.

    Args:
        factor_stores: {strategy: what fit_factors returned for it}.
    Returns:
        {strategy: [queries, training examples] in the precision's sum_dtype (float32), on the CPU}.
    """
    stores = {
        name: pairwise_score_store(study, name, query_dataset, damping, factors)
        for name, factors in factor_stores.items()
    }
    todo = []
    for name, store in stores.items():
        with study.stage(store) as unfinished:
            if unfinished:
                todo.append(name)
    if todo:
        made_by = [stores[name].settings for name in todo]
        job = _PairwiseJob(study, todo, factor_stores, query_dataset, plan, damping, query_batch_size, train_batch_size)
        scores = job.run(stores[todo[0]], made_by)
        with study.profiler("Save Pairwise Score"):
            counts = {"num_queries": len(query_dataset), "num_train": len(study.train_dataset)}
            for name, block in zip(todo, scores):
                stores[name].save_columns(
                    "pairwise_scores", SCORES, block, job.columns, counts["num_train"], counts, study.runtime
                )
    with study.profiler("Load Pairwise Score"):
        return {name: store.load()["pairwise_scores"][SCORES] for name, store in stores.items()}


class _PairwiseJob:
    """The passes of one computation."""

    def __init__(
        self, study, strategy_names, factor_stores, query_dataset, plan, damping, query_batch_size, train_batch_size
    ):
        self.study, self.runtime = study, study.runtime
        self.strategy_names, self.factor_stores = strategy_names, factor_stores
        self.query_dataset, self.plan, self.damping = query_dataset, plan, damping
        self.query_batch_size = query_batch_size
        self.buffer: Tensor | None = None
        self.train_batches = plan_batches(len(study.train_dataset), train_batch_size, study.runtime)
        self.columns = share(len(study.train_dataset), study.runtime)  # this process's training examples
        self.scores = torch.zeros(
            len(strategy_names),
            len(query_dataset),
            len(self.columns),
            dtype=study.runtime.precision.sum_dtype,
            device=study.runtime.device,
        )

    def run(self, progress_store: StageStore, made_by: list[dict[str, Any]]) -> Tensor:
        """[strategies, queries, this process's training examples], on the CPU.

        Progress counts only for the same settings of every strategy.
        """
        runtime, plan = self.runtime, self.plan
        partition = {
            "rank": runtime.rank,
            "world_size": runtime.world_size,
            "strategies": self.strategy_names,
            "made_by": made_by,
            "batches": [len(batch) for batch in self.train_batches],
            "layers": [len(group) for group in plan.layer_groups],
            "queries": [len(tile) for tile in plan.query_tiles],
        }
        done = 0
        progress = progress_store.load_progress(partition)
        if progress is not None:
            done, tensors = progress
            self.scores.copy_(tensors["scores"])
            num_steps = len(self.train_batches) * plan.num_passes
            runtime.print(f"Compute Pairwise Score: going on after {done} of {num_steps} batches")
        clock = self.study.progress_clock()
        passes = [(group, tile) for group in plan.layer_groups for tile in plan.query_tiles]
        for number, (group, tile) in enumerate(passes):
            first = number * len(self.train_batches)
            done_here = min(max(done - first, 0), len(self.train_batches))
            if done_here == len(self.train_batches) and runtime.world_size == 1:
                continue
            label = f" (pass {number + 1} of {len(passes)})" if len(passes) > 1 else ""
            preconditioners = self._load_preconditioners(group)
            with self.study.profiler("Compute Pairwise Score"):
                resident = self._preconditioned_queries(group, tile, preconditioners, label)
                del preconditioners
                for step in self._training_pass(group, tile, resident, done_here, label):
                    if clock.is_due():
                        self.study.check_losses()
                        progress_store.save_progress(partition, first + step, {"scores": self.scores})
        return self.scores.cpu()

    def _load_preconditioners(self, group: list[TrackedLayer]) -> dict[str, Preconditioner]:
        """By layer. A file that several strategies have in common (by its checksum) is read once."""
        names = {layer.name for layer in group}
        read: dict[str, dict[str, Tensors]] = {}
        kinds: list[dict[str, Tensors]] = []  # for each strategy: {kind: {layer: tensor}}
        for strategy_name in self.strategy_names:
            kinds.append({})
            for stage, action in (("eigendecomposition", "Load Eigendecomposition"), ("lambda", "Load Lambda")):
                store = self.factor_stores[strategy_name].get(stage)
                if store is None:
                    continue
                if store.checksum() not in read:
                    with self.study.profiler(action):
                        tensors = store.load(names)
                        read[store.checksum()] = {
                            kind: {name: tensor.to(self.runtime.device) for name, tensor in by_layer.items()}
                            for kind, by_layer in tensors.items()
                        }
                kinds[-1] |= read[store.checksum()]
        strategies = [find_strategy(name) for name in self.strategy_names]
        return {
            layer.name: Preconditioner(
                layer,
                [
                    (strategy, {kind: by_layer[layer.name] for kind, by_layer in factors.items()})
                    for strategy, factors in zip(strategies, kinds)
                ],
                self.damping,
                self.runtime.precision.sum_dtype,
            )
            for layer in group
        }

    def _preconditioned_queries(
        self, group: list[TrackedLayer], tile: range, preconditioners: dict[str, Preconditioner], label: str
    ) -> dict[str, Tensor]:
        """{layer: [strategies * queries of the tile, parameters of the layer]}, as operands of products."""
        study, runtime, precision = self.study, self.runtime, self.runtime.precision
        resident = {
            layer.name: torch.zeros(
                len(self.strategy_names), len(tile), layer.num_parameters,
                dtype=precision.operand_dtype, device=runtime.device,
            )
            for layer in group
        }  # fmt: skip
        batches = plan_batches(len(tile), self.query_batch_size, runtime)
        batches = [[tile[index] for index in batch] for batch in batches]
        with (
            runtime.progress(sum(map(len, batches)), f"Query gradients{label}") as bar,
            study.gradient_pass(study.task.measurement, group) as run,
        ):
            captures = study.captures(run, self.query_dataset, batches, "measurement")
            for batch, captured in captures:
                first = int(batch[EXAMPLE_INDEX][0]) - tile.start
                for layer in group:
                    preconditioner = preconditioners[layer.name]
                    for rows, gradients in self._preconditioned(layer, preconditioner, captured.pop(layer.name)):
                        where = slice(first + rows.start, first + rows.stop)
                        for block, matrices in zip(resident[layer.name], gradients):
                            block[where] = layer.to_flat(matrices)
                bar.update(len(batch[EXAMPLE_INDEX]))
        runtime.all_reduce(resident.values())  # each process filled the rows of its own queries
        return {name: block.flatten(0, 1) for name, block in resident.items()}

    def _training_pass(
        self, group: list[TrackedLayer], tile: range, resident: dict[str, Tensor], done: int, label: str
    ):
        """Add the group's scores, batch by batch; yields the number of batches done."""
        study, precision = self.study, self.runtime.precision
        batches = self.train_batches[done:]
        total = sum(map(len, self.train_batches))
        with (
            self.runtime.progress(
                total, f"Compute Pairwise Score{label}", initial=total - sum(map(len, batches))
            ) as bar,
            study.gradient_pass(study.task.train_loss, group) as run,
        ):
            captures = study.captures(run, study.train_dataset, batches, "training loss")
            for step, (_, captured) in enumerate(captures, done):
                indices = self.train_batches[step]
                first = indices[0] - self.columns.start
                block = self.scores[:, tile.start : tile.stop, first : first + len(indices)]
                for layer in group:
                    for rows, gradients in self._flat_gradients(layer, captured.pop(layer.name)):
                        product = precision.matmul(resident[layer.name], gradients.t())
                        block[:, :, rows] += product.unflatten(0, block.shape[:2])
                bar.update(len(indices))
                yield step + 1

    def _preconditioned(self, layer: TrackedLayer, preconditioner: Preconditioner, captured: Captured):
        """(rows, an iterator over strategies of [rows, out, in(+1)]), a few rows at a time."""
        if self.study.task.post_processes:
            for rows, gradients in self._flat_gradients(layer, captured):
                yield rows, preconditioner.of_gradients(layer.to_matrix(gradients))
            return
        for rows in self._chunks(layer, captured):
            yield rows, preconditioner.of_positions(captured.activations[rows], captured.output_gradients[rows])

    def _chunks(self, layer: TrackedLayer, captured: Captured):
        """Rows whose gradients are made at once."""
        chunk = gradient_chunk(layer, self.runtime.precision.product_dtype.itemsize)
        for start in range(0, len(captured.activations), chunk):
            yield slice(start, min(start + chunk, len(captured.activations)))

    def _flat_gradients(self, layer: TrackedLayer, captured: Captured):
        """(rows, per-sample gradients [rows, parameters] as operands of products), a few at a time."""
        precision, task = self.runtime.precision, self.study.task
        if task.post_processes:
            gradients = layer.to_matrix(layer.flat_gradients(captured.activations, captured.output_gradients))
            gradients = layer.to_flat(task.post_process_per_sample_gradient(layer.name, gradients))
            yield slice(0, len(gradients)), precision.operand(gradients)
            return
        for rows in self._chunks(layer, captured):
            activations, output_gradients = captured.activations[rows], captured.output_gradients[rows]
            gradients = layer.flat_gradients(activations, output_gradients, out=self._buffer(layer, activations))
            yield rows, precision.operand(gradients)

    def _buffer(self, layer: TrackedLayer, activations: Tensor) -> Tensor:
        """[rows, parameters] to write into, the same memory each time: on a CPU, fresh pages cost like a product."""
        size = len(activations) * layer.num_parameters
        if self.buffer is None or self.buffer.numel() < size:
            self.buffer = activations.new_empty(size)
        return self.buffer[:size].view(len(activations), layer.num_parameters)
