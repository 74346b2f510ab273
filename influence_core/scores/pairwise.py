"""Pairwise influence scores: every query against every training example.

    score[q, t] = grad f(z_q)^T (F + damping)^-1 grad L(z_t),   summed over the tracked layers

The query side is preconditioned once and stays in memory, flattened to [queries, parameters of a layer] (of its weight,
and of its bias); one pass over the training set then makes per-sample gradients, and each layer's scores are one matrix
product [queries, parameters] @ [parameters, batch], accumulated in float32. Positive: training on t lowers f of q.

Scores are linear in the query's gradient: those of a sum of queries take one gradient, summed over queries before it is
preconditioned.

Source: Grosse et al. 2023, arXiv:2308.03296, eq. 8 and section 3.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from influence_core.batches import order_examples, share, shares
from influence_core.captured import Captured, captured_bytes
from influence_core.errors import UserError
from influence_core.factors.preconditioners import load_preconditioners
from influence_core.factors.strategies import Damping, Preconditioner
from influence_core.layers import Parts, TrackedLayer
from influence_core.memory import in_halves, slices
from influence_core.scores.cost import preconditioning_chunk
from influence_core.scores.gradients import PerSampleGradients
from influence_core.scores.overflow import REMEDY, overflow
from influence_core.scores.plan import Plan
from influence_core.scores.query_sum import preconditioned_sum
from influence_core.scores.stored import SCORES, pairwise_score_store, score_scale
from influence_core.storage import StageStore
from influence_core.study import Study


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
        {strategy: [queries, training examples] in the precision's sum_dtype (float32), on the CPU}; with
        `Study.sum_queries`, [1, training examples].
    """
    stores = {
        name: pairwise_score_store(study, name, query_dataset, damping, factors)
        for name, factors in factor_stores.items()
    }
    todo = study.unfinished(stores)
    if todo:
        job = _PairwiseJob(study, todo, factor_stores, query_dataset, plan, damping, query_batch_size, train_batch_size)
        scores = job.run(stores[todo[0]], lambda: [stores[name].settings for name in todo])
        with study.profiler("Save Pairwise Score"):
            num_train = len(study.train_dataset)
            for name, block in reversed(list(zip(todo, scores))):  # last the first, whose store has the progress
                counts = {"num_queries": len(query_dataset), "num_train": num_train}
                counts["scale"] = score_scale(name, num_train, factor_stores[name])
                stores[name].save_columns(
                    "pairwise_scores", SCORES, block, job.columns, num_train, counts, study.runtime
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
        self.query_batch_size, self.train_batch_size = query_batch_size, train_batch_size
        self.gradients = PerSampleGradients(study)
        num_train = len(study.train_dataset)
        self.columns = share(num_train, study.runtime)  # this process's training examples
        # Of sharded parameters it has scores of all examples, of its own layers, until all are summed.
        self.scored = range(num_train) if study.runtime.sharded else self.columns
        self.scores = torch.zeros(
            len(strategy_names),
            1 if study.sum_queries else len(query_dataset),
            len(self.scored),
            dtype=study.runtime.precision.sum_dtype,
            device=study.runtime.device,
        )

    def run(self, progress_store: StageStore, made_by: Callable[[], list[dict[str, Any]]]) -> Tensor:
        """[strategies, queries (or their sum), this process's training examples], on the CPU.

        Progress counts only for the same settings of every strategy, which `made_by` gives.
        """
        runtime, plan = self.runtime, self.plan
        partition = {
            **self.study.partition(self.train_batch_size),
            "strategies": self.strategy_names,
            "made_by": made_by,
            "layers": [len(group) for group in plan.layer_groups],
            "queries": [len(tile) for tile in plan.query_tiles],
        }
        order = self.study.train_order
        done = 0  # examples, in the order of the passes
        progress = progress_store.load_progress(partition, runtime.warn)
        if progress is not None:
            done, tensors = progress
            self.scores.copy_(tensors["scores"])
            runtime.print(f"Compute Pairwise Score: going on after {done} of {len(order) * plan.num_passes} sequences")
        clock = self.study.progress_clock()
        passes = [(group, tile) for group in plan.layer_groups for tile in plan.query_tiles]
        for number, (group, tile) in enumerate(passes):
            first = number * len(order)
            done_here = min(max(done - first, 0), len(order))
            if done_here == len(order) and runtime.world_size == 1:
                continue
            label = f" (pass {number + 1} of {len(passes)})" if len(passes) > 1 else ""
            preconditioners = load_preconditioners(
                self.study, self.factor_stores, self.strategy_names, self.study.own(group), self.damping
            )
            with self.study.profiler("Compute Pairwise Score"):
                resident = self._preconditioned_queries(group, tile, preconditioners, label)
                del preconditioners
                training_pass = self._training_pass(group, tile, resident, done_here, label)
                scores = self.scores[:, tile.start : tile.stop]
                for num_done in training_pass:
                    if clock.is_due():
                        self.study.watch.look()
                        if not scores.isfinite().all():
                            break
                        progress = {"scores": self.scores}
                        clock.keep(partial(progress_store.save_progress, partition, first + num_done, progress))
                training_pass.close()
                if not scores.isfinite().all():
                    raise overflow(self.study, self.gradients, group, tile, resident, scores, self.scored)
                del resident  # before the next pass fills the memory with its own
                self.gradients.buffer = None
        if runtime.sharded:
            runtime.all_reduce([self.scores])
            if not self.scores.isfinite().all():
                raise UserError(f"a score, summed over all layers, is beyond the range of the number format; {REMEDY}")
            self.scores = self.scores[..., self.columns.start : self.columns.stop]
        for name, scores in zip(self.strategy_names, self.scores):
            if runtime.smallest(int(not scores.any())):
                runtime.print(
                    f"Note: every score of {name} is zero: a loss that small is below the number format's range"
                )
        return self.scores.cpu()

    def _preconditioned_queries(
        self, group: list[TrackedLayer], tile: range, preconditioners: dict[str, Preconditioner], label: str
    ) -> dict[str, Parts]:
        """{layer: parts of [strategies * queries of the tile] gradients}, as operands of products."""
        study, runtime, own = self.study, self.runtime, self.study.own(group)
        if study.sum_queries:
            queries = self.query_dataset, self.query_batch_size
            return preconditioned_sum(study, *queries, group, preconditioners, self.gradients, label)
        like = torch.empty(0, dtype=runtime.precision.operand_dtype, device=runtime.device)
        resident = {layer.name: layer.empty_parts(like, len(self.strategy_names), len(tile)) for layer in own}
        lengths = study.lengths([self.query_dataset[index] for index in tile])
        order = [tile[index] for index in order_examples(lengths, runtime)]
        with (
            runtime.progress(len(order), f"Query gradients{label}") as bar,
            study.gradient_pass(study.task.measurement, group) as run,
        ):
            captures = study.captures(run, self.query_dataset, order, self.query_batch_size, "measurement")
            for indices, captured in captures:
                positions = runtime.send(torch.tensor(indices) - tile.start)
                for layer in own:
                    of_layer = preconditioners[layer.name], captured.pop(layer.name)
                    self._store_preconditioned(layer, *of_layer, positions, resident[layer.name])
                bar.update(len(indices))
        parts = () if runtime.sharded else itertools.chain(*resident.values())
        for part in parts:  # each process filled the rows of its own queries
            for rank, rows in enumerate(shares(len(tile), runtime)):
                for of_strategy in part:
                    runtime.broadcast(of_strategy[rows.start : rows.stop], source=rank)
        return {name: tuple(part.flatten(0, 1) for part in parts) for name, parts in resident.items()}

    def _training_pass(self, group: list[TrackedLayer], tile: range, resident: dict[str, Parts], done: int, label: str):
        """Add the group's scores, batch by batch; yields the number of examples done."""
        study, order = self.study, self.study.train_order
        with (
            self.runtime.progress(len(order), f"Compute Pairwise Score{label}", initial=done) as bar,
            study.gradient_pass(study.task.train_loss, group) as run,
        ):
            held: list[tuple[list[int], dict[str, Captured]]] = []  # batches that wait for a good product
            waiting = 0  # bytes of them

            def score_held() -> bool:
                """Score the batches that wait, if any does."""
                nonlocal waiting
                indices = [index for batch, _ in held for index in batch]
                if indices:
                    self._add_scores(group, tile, resident, indices, [captured for _, captured in held])
                    held.clear()
                    waiting = 0
                    bar.update(len(indices))
                return bool(indices)

            for indices, captured in study.captures(
                run, study.train_dataset, order, self.train_batch_size, "training loss", score_held, done
            ):
                held.append((indices, captured))
                done += len(indices)
                waiting += (of_batch := captured_bytes(captured))
                full = waiting + of_batch > self.plan.held_bytes  # the next batch is not longer than this one
                if full or sum(len(batch) for batch, _ in held) >= self.plan.scored_at_once or done == len(order):
                    score_held()
                    yield done

    def _add_scores(
        self,
        group: list[TrackedLayer],
        tile: range,
        resident: dict[str, Parts],
        indices: list[int],
        batches: list[dict[str, Captured]],
    ) -> None:
        """Add the group's part to the scores of these training examples."""
        runtime = self.runtime
        # Scores of these examples alone, of all strategies' queries: each layer adds to them in place.
        block = self.scores.new_zeros(len(self.strategy_names) * len(tile), len(indices))
        for layer in self.study.own(group):
            for rows, gradients in self.gradients.parts(layer, [captured.pop(layer.name) for captured in batches]):
                for of_queries, of_examples in zip(resident[layer.name], gradients):
                    runtime.precision.add_matmul(block[:, rows], of_queries, of_examples.t())
        columns = runtime.send(torch.tensor(indices) - self.scored.start)
        self.scores[:, tile.start : tile.stop].index_add_(
            2, columns, block.view(len(self.strategy_names), len(tile), len(indices))
        )

    def _store_preconditioned(
        self,
        layer: TrackedLayer,
        preconditioner: Preconditioner,
        captured: Captured,
        positions: Tensor,
        into: Parts,
    ) -> None:
        """into[:, positions] = the captured examples' preconditioned gradients, a few at a time.

        Args:
            into: parts of [strategies, queries of the tile].
        """

        def store(rows: slice, of_rows: Iterator[Tensor]) -> None:
            with self.runtime.precision.rotations():
                for number, matrices in enumerate(of_rows):  # one strategy's after the other's
                    layer.store(matrices, positions[rows], tuple(part[number] for part in into))

        dtype, device = self.runtime.precision.sum_dtype, self.runtime.device
        chunk = preconditioning_chunk(layer, dtype.itemsize, device.type)
        if self.study.task.post_processes:
            ((_, gradients),) = self.gradients.parts(layer, [captured])
            matrices = layer.to_matrix(gradients)
            for rows in slices(len(matrices), chunk):
                in_halves(lambda some: store(some, preconditioner.of_gradients(matrices[some])), rows)
            return
        captured = captured.compact()
        for rows in slices(len(captured), chunk):
            in_halves(lambda some: store(some, preconditioner.of_captured(captured[some])), rows)
