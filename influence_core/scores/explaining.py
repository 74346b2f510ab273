"""Parts of scores, computed.

    score[q, t] = sum over layers of <(F + damping)^-1 g_q, g_t>

and a layer's gradient is a sum over the positions that it saw. So <(F + damping)^-1 g_q, part of g_t> splits a score
over the tokens of the training example, and, as the inverse is symmetric, <part of g_q, (F + damping)^-1 g_t> over
those of the query. Each of the three sums to the score.

Cost of a pair: 2 P T FLOPs for each of the two splits (P parameters, T positions), and of each query and training
example its forward and backward pass and its gradient, preconditioned.

Source: Grosse et al. 2023, arXiv:2308.03296, sections 3.4 and 5.3.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_core.batches import make_batch
from influence_core.captured import Captured
from influence_core.factors.preconditioners import load_preconditioners
from influence_core.factors.strategies import Damping, Preconditioner
from influence_core.layers import TrackedLayer
from influence_core.memory import slices
from influence_core.scores.cost import preconditioning_chunk
from influence_core.scores.gradients import PerSampleGradients
from influence_core.scores.parts import Pair, ScoreParts
from influence_core.scores.query_sum import preconditioned_sum
from influence_core.scores.tokens import TokenPlaces, token_counts
from influence_core.storage import StageStore
from influence_core.study import Study

MOST_QUERIES = 64  # whose preconditioned gradients, and what their layers saw, are at hand at once


def compute_score_parts(
    study: Study,
    strategy_name: str,
    factor_stores: Mapping[str, StageStore],
    query_dataset: Sequence[Any],
    pairs: Sequence[Pair],
    damping: Damping,
    query_batch_size: int,
    train_batch_size: int,
    budget: int,
    by_token: bool = True,
) -> ScoreParts:
    """The parts of these pairs' scores; of scores of a sum of queries, its parts by layer and by the examples' tokens.

    Several processes share the queries, or the training examples of a sum; of sharded parameters, the layers.

    Args:
        factor_stores: what fit_factors returned for the strategy.
        budget: bytes that may be taken beyond what is in use.
    Raises:
        UserError: the task does not tell an example's tokens (with `by_token`).
    """
    if by_token:
        token_counts(study.task, query_dataset[0])
    sizes = {"query_batch_size": query_batch_size, "train_batch_size": train_batch_size}
    job = _PartsJob(study, query_dataset, list(pairs), by_token, **sizes)
    queries = sorted({query for query, _ in pairs})
    longest = max(study.lengths([query_dataset[query] for query in queries]), default=0)
    groups, at_once = _fit(study, longest * study.task.rows_per_example, budget)
    everywhere = study.sum_queries or study.runtime.sharded
    mine = queries if everywhere else queries[study.runtime.rank :: study.runtime.world_size]
    with study.runtime.progress(len(mine) * len(groups), "Score parts", unit="query") as bar:
        for group in groups:
            preconditioners = load_preconditioners(
                study, {strategy_name: factor_stores}, [strategy_name], study.own(group), damping
            )
            for tile in slices(len(mine), at_once):
                with study.profiler("Compute Score Parts"):
                    job.add(group, preconditioners, mine[tile])
                bar.update(tile.stop - tile.start)
    return job.result()


def _fit(study: Study, longest: int, budget: int) -> tuple[list[list[TrackedLayer]], int]:
    """(groups of layers whose factors fit into a third of the budget, queries that fit into another)

    Args:
        longest: positions of the longest query.
    """
    number = study.runtime.precision.sum_dtype.itemsize
    if study.runtime.sharded:  # each process has about an even part of a group
        budget *= study.runtime.world_size
    groups: list[list[TrackedLayer]] = [[]]
    taken = largest = 0
    for layer in study.layers:
        of_layer = number * (layer.num_covariances + 2 * layer.num_parameters)
        if groups[-1] and taken + of_layer > budget / 3:
            groups.append([])
            taken = 0
        groups[-1].append(layer)
        taken += of_layer
        of_query = sum(layer.num_parameters + longest * sum(layer.shape) for layer in groups[-1])
        largest = max(largest, number * of_query)
    return groups, int(min(max(budget / 3 / largest, 1), MOST_QUERIES))


@dataclass
class _Query:
    """A query of the tile."""

    captured: dict[str, Captured]
    directions: dict[str, Tensor]  # its preconditioned gradients [out, in(+1)], by layer
    places: TokenPlaces | None
    row: int  # in its batch


class _PartsJob:
    """Sums up the parts, group by group of layers."""

    def __init__(self, study, query_dataset, pairs: list[Pair], by_token, query_batch_size, train_batch_size):
        self.study, self.task, self.dtype = study, study.task, study.runtime.precision.sum_dtype
        self.query_dataset, self.pairs = query_dataset, pairs
        self.query_batch_size, self.train_batch_size = query_batch_size, train_batch_size
        zeros = {"dtype": self.dtype, "device": study.runtime.device}
        self.layer_index = {layer.name: number for number, layer in enumerate(study.layers)}
        self.by_layer = torch.zeros(len(pairs), len(study.layers), **zeros)
        self.train_tokens = self.query_tokens = None

        def zeros_of(example: Any) -> Tensor:
            return torch.zeros(1 + sum(map(sum, token_counts(self.task, example).values())), **zeros)

        if by_token:
            self.train_tokens = [zeros_of(study.train_dataset[index]) for _, index in pairs]
        if by_token and not study.sum_queries:
            self.query_tokens = [zeros_of(query_dataset[query]) for query, _ in pairs]

    def result(self) -> ScoreParts:
        """On the CPU, of all processes together."""
        tokens = [*(self.train_tokens or ()), *(self.query_tokens or ())]
        flat = torch.cat([self.by_layer.flatten(), *tokens])
        self.study.runtime.all_reduce([flat])
        by_layer, *tokens = flat.cpu().split([self.by_layer.numel(), *map(len, tokens)])
        num = len(self.pairs)
        of_train = None if self.train_tokens is None else tokens[:num]
        of_queries = None if self.query_tokens is None else tokens[num:]
        layers = [layer.label for layer in self.study.layers]
        return ScoreParts(self.pairs, layers, by_layer.view_as(self.by_layer), of_train, of_queries)

    def add(self, group: list[TrackedLayer], preconditioners: dict[str, Preconditioner], tile: list[int]) -> None:
        """The parts of these layers, for the pairs of these queries."""
        study = self.study
        own, queries = study.own(group), self._queries(group, preconditioners, tile)
        numbers: dict[int, list[int]] = {}  # of the pairs, by training example
        for number, (query, index) in enumerate(self.pairs):
            if query in queries:
                numbers.setdefault(index, []).append(number)
        order = self._by_length(study.train_dataset, list(numbers))
        if study.sum_queries and not study.runtime.sharded:  # every process has the sum
            order = order[study.runtime.rank :: study.runtime.world_size]
        with study.gradient_pass(study.task.train_loss, group) as run:
            captures = study.captures(run, study.train_dataset, order, self.train_batch_size, "training loss")
            for indices, captured in captures:
                places = self._places(study.train_dataset, indices)
                for layer in own:
                    of_layer = captured.pop(layer.name)
                    for row, gradient, direction in self._gradients(layer, of_layer, preconditioners[layer.name]):
                        one = (of_layer[row : row + 1], gradient, direction) if places else (None, gradient, None)
                        self._add_pairs(layer, numbers[indices[row]], queries, *one, places, row)

    def _add_pairs(self, layer, numbers: list[int], queries, captured, gradient, direction, places, row) -> None:
        """The parts of one layer, for all pairs of one training example."""
        of_queries = [queries[self.pairs[number][0]] for number in numbers]
        directions = torch.stack([query.directions[layer.name] for query in of_queries])
        self.by_layer[numbers, self.layer_index[layer.name]] = (directions * gradient).sum((1, 2))
        if captured is None:
            return
        totals = self.by_layer.new_zeros(len(numbers), 1 + places.num_tokens(row))
        places.add(totals, row, layer.products_by_position(captured, directions))
        for number, query, of_train in zip(numbers, of_queries, totals):
            self.train_tokens[number] += of_train
            if self.query_tokens is None:
                continue
            products = layer.products_by_position(query.captured[layer.name], direction.unsqueeze(0))
            query.places.add(self.query_tokens[number].unsqueeze(0), query.row, products)

    def _queries(self, group, preconditioners, tile: list[int]) -> dict[int, _Query]:
        """By number; where queries are summed, their sum is the only one."""
        own = self.study.own(group)
        if self.study.sum_queries:
            gradients = PerSampleGradients(self.study)
            sums = preconditioned_sum(
                self.study, self.query_dataset, self.query_batch_size, group, preconditioners, gradients
            )
            directions = {layer.name: layer.to_matrix(sums[layer.name])[0].to(self.dtype) for layer in own}
            return {0: _Query({}, directions, None, 0)}
        queries: dict[int, _Query] = {}
        with self.study.gradient_pass(self.task.measurement, group) as run:
            order = self._by_length(self.query_dataset, tile)
            captures = self.study.captures(run, self.query_dataset, order, self.query_batch_size, "measurement")
            for indices, captured in captures:
                places = self._places(self.query_dataset, indices)
                of_batch = [_Query({}, {}, places, row) for row in range(len(indices))]
                for layer in own:
                    of_layer = captured.pop(layer.name)
                    for row, _, direction in self._gradients(layer, of_layer, preconditioners[layer.name]):
                        of_batch[row].directions[layer.name] = direction
                        if places:
                            of_batch[row].captured[layer.name] = of_layer[row : row + 1]
                queries |= zip(indices, of_batch)
        return queries

    def _gradients(
        self, layer: TrackedLayer, captured: Captured, preconditioner: Preconditioner
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the example, its gradient, that preconditioned), [out, in(+1)] each, of a batch's examples."""
        chunk = preconditioning_chunk(layer, self.dtype.itemsize, self.study.runtime.device.type)
        whole = None
        if self.task.post_processes:
            whole = layer.matrix_gradients(captured.compact().to(self.dtype))
            whole = self.task.post_process_per_sample_gradient(layer.name, whole)
        for rows in slices(len(captured if whole is None else whole), chunk):
            if whole is None:
                some = captured[rows].compact().to(self.dtype)
                made, (preconditioned,) = layer.matrix_gradients(some), preconditioner.of_captured(some)
            else:
                made, (preconditioned,) = whole[rows], preconditioner.of_gradients(whole[rows])
            yield from zip(range(rows.start, rows.stop), made, preconditioned)

    def _places(self, dataset: Sequence[Any], indices: list[int]) -> TokenPlaces | None:
        """Where the tokens of a batch lie, if they are wanted."""
        if self.train_tokens is None:
            return None
        batch = make_batch(self.task, dataset, indices, self.study.runtime)
        return TokenPlaces(self.task, batch, [dataset[index] for index in indices])

    def _by_length(self, dataset: Sequence[Any], indices: list[int]) -> list[int]:
        """Those of like length together, the longest first."""
        lengths = [self.task.length(dataset[index]) for index in indices]
        return [indices[number] for number in sorted(range(len(indices)), key=lambda i: (-lengths[i], indices[i]))]
