"""What the engine assumes of a task and a model, proven on two examples of each dataset before any work.

It is one sentence: everything that is summed is additive over examples, and an example's part does not depend on what
shares its batch. So the shortest and the longest example are run, each alone and both together (comparison.py), for the
training loss with the data's labels and with sampled ones, and for the measurement. What differs is refused.

Cost: twelve forward and backward passes of an example, and the products of their gradients; twenty passes more where
parameters are sharded.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_core.batches import make_batch, sizes_of_some
from influence_core.comparison import Alone, Comparison
from influence_core.errors import UserError
from influence_core.labels import LabelSampler, labels_from_uniforms_alone
from influence_core.lockstep import of_many_sizes, refuse_uneven_calls
from influence_core.passes import LossFunction
from influence_core.precision import Precision
from influence_core.study import Study
from influence_core.task import Batch

NUM_SEEDS = (
    3  # of sampled labels, before a difference is believed: rounding may turn a label that a task samples itself
)
MANY_SEEDS = 8  # before labels that are always the data's own are believed not to be sampled
CERTAIN = 0.01  # nats: a loss so small says that a model would nearly always sample the data's own labels


def check_contract(study: Study, query_dataset: Sequence[Any], fits_factors: bool) -> str:
    """Prove the contract, or refuse.

    Args:
        fits_factors: whether the Fisher, and so a loss with sampled labels, is needed.
    Returns:
        A line that says what was proven, on which examples, and how long it took.
    Raises:
        UserError: what is broken, by layer where it is one's, with the likely cause.
    """
    start = time.perf_counter()
    _refuse_unfit_weights(study.model, study.runtime.precision)
    if study.task.post_processes and any(layer.is_spread for layer in study.layers):
        raise UserError("a task that post-processes gradients is given those of a whole batch, which of an embedding "
                        "or a head would be as large as the vocabulary: leave these out")  # fmt: skip
    on_train = Comparison(study, study.train_dataset, _pair(study, study.train_dataset), "training loss")
    on_queries = Comparison(study, query_dataset, _pair(study, query_dataset), "measurement")
    with_data_labels = on_train.prove(study.task.train_loss)
    if fits_factors and not study.use_empirical_fisher:
        _check_sampled_labels(study, on_train, with_data_labels)
    on_queries.prove(study.task.measurement)
    if study.runtime.sharded:
        _check_calls(study, on_train, study.task.train_loss)
        _check_calls(study, on_queries, study.task.measurement)
    study.live = on_train.live
    dead = [layer.name for layer in study.layers if layer.name not in on_train.live | on_queries.live]
    if dead:
        which = ", ".join(dead[:6]) + (f", … ({len(dead)} in all)" if len(dead) > 6 else "")
        study.runtime.print(f"Note: no gradient reaches {which} (in the examples that were looked at): counts nothing")
    return (
        f"examples {_listed(on_train)} of the training set, {_listed(on_queries)} of the queries: each gives alone "
        f"what it gives beside the other ({time.perf_counter() - start:.1f} s)"
    )


def _listed(comparison: Comparison) -> str:
    first, second = comparison.pair
    together = "" if comparison.fits else " (alone only: a batch of both does not fit into memory)"
    return f"{first} and {second}{together}"


def _refuse_unfit_weights(model: nn.Module, precision: Precision) -> None:
    """Weights of 16 bits are for half precision; those of 64 bits for analyses in float64."""
    for name, parameter in model.named_parameters():
        is_narrow = parameter.itemsize < 4
        if not parameter.is_floating_point() or (is_narrow and precision.is_half):
            continue
        if is_narrow or parameter.itemsize > precision.sum_dtype.itemsize:
            remedy = ", or run in half precision (--use_half_precision)" if is_narrow else ""
            raise UserError(
                f"the model's weights are {str(parameter.dtype).removeprefix('torch.')} (the first: {name}) and the "
                f"analysis is in {precision.name}: load the model with dtype=torch.float32{remedy}"
            )


def _check_calls(study: Study, comparison: Comparison, loss: LossFunction) -> None:
    """Processes with a part of each parameter can go in step: examples of all sizes make the same calls."""
    dataset = comparison.dataset
    batches = of_many_sizes(_sizes(study, dataset), largest=2 if comparison.fits else 1)
    with study.gradient_pass(loss) as run:
        refuse_uneven_calls(
            study.model, lambda batch: run(make_batch(study.task, dataset, batch, study.runtime)), batches
        )


def _sizes(study: Study, dataset: Sequence[Any]) -> dict[int, int]:
    """By index, where a task has no lengths of some examples."""
    if study.task.has_lengths:
        return dict(enumerate(study.lengths(dataset)))
    return sizes_of_some(study.task, dataset)


def _pair(study: Study, dataset: Sequence[Any]) -> list[int]:
    """The shortest and the longest example; two of them where there are two."""
    sizes = _sizes(study, dataset)
    shortest, longest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    return [shortest, longest if shortest != longest else (shortest + 1) % len(dataset)]


def _check_sampled_labels(study: Study, comparison: Comparison, with_data_labels: Alone) -> None:
    """Sampled labels do not depend on the batch either, and they are not the data's own."""

    def loss(sampler: LabelSampler) -> Callable[[nn.Module, Batch], Tensor]:
        return lambda model, batch: study.task.train_loss(model, batch, sampler)

    samplers = [LabelSampler(study.runtime.seed + number) for number in range(MANY_SEEDS)]
    with labels_from_uniforms_alone():
        for sampler in samplers[:NUM_SEEDS]:
            try:
                sampled = comparison.prove(loss(sampler), "training loss with sampled labels")
                break
            except UserError:
                if sampler is samplers[NUM_SEEDS - 1]:
                    raise
        has_gradient = any(gradient.any() for _, gradient in with_data_labels)
        for sampler in samplers:
            if not has_gradient or not all(map(_equal, sampled, with_data_labels)):
                return
            sampled = comparison.alone(loss(sampler))
    if samplers[-1].was_asked and max(value for value, _ in with_data_labels) < CERTAIN:
        return
    raise UserError(
        "train_loss gives the same with sample_labels as without: its factors would be those of the empirical Fisher "
        "under the name of the true one; draw the labels from the model with sample_labels (influence_core/task.py), "
        "or say --use_empirical_fisher"
    )


def _equal(a: tuple[float, Tensor], b: tuple[float, Tensor]) -> bool:
    return a[0] == b[0] and torch.equal(a[1], b[1])
