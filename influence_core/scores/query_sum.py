"""The query side of the scores of a sum: gradients are summed over queries, then preconditioned once.

A batch's sum is the gradient of its examples laid end to end as one, a product with no gradient of each: it costs no
more than they do, and only one stays in memory.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from influence_core.batches import order_examples
from influence_core.captured import Captured
from influence_core.factors.strategies import Preconditioner
from influence_core.layers import Parts, TrackedLayer
from influence_core.memory import in_halves
from influence_core.scores.gradients import PerSampleGradients
from influence_core.study import Study


def preconditioned_sum(
    study: Study,
    query_dataset: Sequence[Any],
    batch_size: int,
    group: list[TrackedLayer],
    preconditioners: Mapping[str, Preconditioner],
    gradients: PerSampleGradients,
    label: str = "",
) -> dict[str, Parts]:
    """{layer: parts of [strategies] gradients}, of all processes' queries together, as operands of products."""
    runtime, own = study.runtime, study.own(group)
    like = torch.empty(0, dtype=runtime.precision.sum_dtype, device=runtime.device)
    sums = {layer.name: tuple(part.zero_() for part in layer.empty_parts(like, 1)) for layer in own}
    order = order_examples(study.lengths(query_dataset), runtime)
    with (
        runtime.progress(len(order), f"Query gradients{label}") as bar,
        study.gradient_pass(study.task.measurement, group) as run,
    ):
        for indices, captured in study.captures(run, query_dataset, order, batch_size, "measurement"):
            for layer in own:
                _add(study, layer, captured.pop(layer.name), gradients, sums[layer.name])
            bar.update(len(indices))
    if not runtime.sharded:  # then the owner of a layer had all queries
        runtime.all_reduce(itertools.chain(*sums.values()))
    resident, like = {}, like.to(runtime.precision.operand_dtype)
    for layer in own:
        matrix = layer.to_matrix(sums.pop(layer.name))
        resident[layer.name] = layer.empty_parts(like, len(preconditioners[layer.name].inverses))
        with runtime.precision.rotations():
            for number, preconditioned in enumerate(preconditioners[layer.name].of_gradients(matrix)):
                layer.store(preconditioned, slice(number, number + 1), resident[layer.name])
    return resident


def _add(study: Study, layer: TrackedLayer, captured: Captured, gradients: PerSampleGradients, sums: Parts) -> None:
    """sums += the gradients of the captured examples; sums: parts of one gradient."""
    if study.task.post_processes:
        ((_, of_examples),) = gradients.parts(layer, [captured])
        for total, part in zip(sums, of_examples):
            total += part.sum(0, dtype=total.dtype)
        return
    captured = captured.compact()

    def add(rows: slice) -> None:
        for total, part in zip(sums, layer.gradient_parts(captured.part(rows).to(sums[0].dtype).as_one())):
            total += part

    in_halves(add, slice(0, len(captured)))
