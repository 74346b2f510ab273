"""Self-influence: each training example's own score, grad L(z_t)^T (F + damping)^-1 grad L(z_t).

Large where the model had to bend for a single example: the usual way to find what is mislabelled or odd. One pass over
the training set (one for each group of layers, where the factors of all do not fit), exact.

Source: Koh and Liang 2017, arXiv:1703.04730, section 5.4; Pruthi et al. 2020, arXiv:2002.08484, section 4.1.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from influence_core.captured import Captured
from influence_core.errors import UserError
from influence_core.factors.preconditioners import load_preconditioners
from influence_core.factors.strategies import Damping, Preconditioner
from influence_core.layers import TrackedLayer
from influence_core.memory import in_halves, slices
from influence_core.scores.cost import preconditioning_chunk
from influence_core.scores.stored import SCORES, factor_settings
from influence_core.storage import StageStore
from influence_core.study import Study

STAGE = "self_influence"


def self_influence_store(
    study: Study,
    strategy_name: str,
    damping: Damping,
    factor_stores: Mapping[str, StageStore] | None = None,
    checkpoints: Sequence[str] | None = None,
) -> StageStore:
    """Where a strategy's self-influence lies, see `pairwise_score_store`."""
    settings = factor_settings(strategy_name, damping, factor_stores, checkpoints)
    return study.score_store(study.result_name(strategy_name), STAGE, **settings)


def compute_self_influence(
    study: Study,
    factor_stores: Mapping[str, Mapping[str, StageStore]],
    damping: Damping,
    batch_size: int,
    layer_groups: Sequence[list[TrackedLayer]],
) -> dict[str, Tensor]:
    """Of each strategy, all from the same passes; stored, or read where finished ones are stored.

    Args:
        factor_stores: {strategy: what fit_factors returned for it}.
        layer_groups: those whose factors fit into memory together.
    Returns:
        {strategy: [training examples] in the precision's sum_dtype (float32), on the CPU}
    Raises:
        UserError: a number is beyond the range of the number format.
    """
    stores = {name: self_influence_store(study, name, damping, factors) for name, factors in factor_stores.items()}
    todo = study.unfinished(stores)
    if todo:
        progress_store = stores[todo[0]]
        partition = {"strategies": todo, "made_by": lambda: [stores[name].settings for name in todo]}
        scores = _pass_over(
            study, {name: factor_stores[name] for name in todo}, damping, batch_size, layer_groups,
            progress_store, partition,
        )  # fmt: skip
        if study.runtime.is_main:
            for name, of_strategy in reversed(list(zip(todo, scores))):  # the one that has the progress last
                stores[name].save({STAGE: {SCORES: of_strategy}}, {"num_train": len(of_strategy)})
        study.runtime.barrier()
    return {name: store.load()[STAGE][SCORES] for name, store in stores.items()}


def _pass_over(study, factor_stores, damping, batch_size, layer_groups, progress_store, partition) -> Tensor:
    """[strategies, training examples], on the CPU, of all processes together."""
    runtime, order = study.runtime, study.train_order
    partition |= study.partition(batch_size) | {"layers": [len(group) for group in layer_groups]}
    sums = {"dtype": runtime.precision.sum_dtype, "device": runtime.device}
    scores = torch.zeros(len(factor_stores), len(study.train_dataset), **sums)
    done = 0  # examples, in the order of the passes
    progress = progress_store.load_progress(partition, runtime.warn)
    if progress is not None:
        done, tensors = progress
        scores.copy_(tensors["scores"])
        runtime.print(f"Self-influence: going on after {done} of {len(order) * len(layer_groups)} sequences")
    clock = study.progress_clock()
    for number, group in enumerate(layer_groups):
        first = number * len(order)
        done_here = min(max(done - first, 0), len(order))
        if done_here == len(order) and runtime.world_size == 1:
            continue
        own = study.own(group)
        preconditioners = load_preconditioners(study, factor_stores, list(factor_stores), own, damping)
        label = (
            f"Self-influence (pass {number + 1} of {len(layer_groups)})" if len(layer_groups) > 1 else "Self-influence"
        )
        with (
            study.profiler("Compute Self-Influence"),
            runtime.progress(len(order), label, initial=done_here) as bar,
            study.gradient_pass(study.task.train_loss, group) as run,
        ):
            what = study.train_dataset, order, batch_size, "training loss"
            for indices, captured in study.captures(run, *what, done=done_here):
                block = scores.new_zeros(len(scores), len(indices))
                for layer in own:
                    _add(study, layer, preconditioners[layer.name], captured.pop(layer.name), block)
                scores.index_add_(1, runtime.send(torch.tensor(indices)), block)
                done_here += len(indices)
                bar.update(len(indices))
                if clock.is_due():
                    study.watch.look()
                    notes = {"scores": scores}
                    clock.keep(partial(progress_store.save_progress, partition, first + done_here, notes))
    runtime.all_reduce([scores])
    if not scores.isfinite().all():
        _, index = (int(each) for each in (~scores.isfinite()).nonzero()[0])
        raise UserError(
            f"the self-influence of training example {index} is beyond the range of the number format; nothing of it "
            "is stored: raise --damping_factor, or look at the checkpoint (a diverged training run?)"
        )
    return scores.cpu()


def _add(study: Study, layer: TrackedLayer, preconditioner: Preconditioner, captured: Captured, block: Tensor) -> None:
    """block += the layer's part, [strategies, examples of the batch]."""
    captured, gradients = captured.compact(), None
    if study.task.post_processes:
        gradients = study.task.post_process_per_sample_gradient(layer.name, layer.matrix_gradients(captured))

    def add(some: slice) -> None:
        if gradients is not None:
            products: Iterator[Tensor] = preconditioner.self_products_of(gradients[some])
        else:
            products = preconditioner.self_products(captured.part(some))
        block[:, some] += torch.stack(list(products))

    chunk = preconditioning_chunk(layer, block.element_size(), block.device.type)
    for some in slices(block.shape[1], chunk):
        in_halves(add, some)
