"""Processes with a part of each parameter go in step: all call the same units, in the same order.

A process that calls one that the others do not would wait for their parts for ever, or be sent those of another unit.
So a model whose calls depend on its input (an embedding that is called again for padding), or on chance (whole layers
that are dropped), is refused before any work.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from influence_core.errors import UserError
from influence_core.sharded_units import own_class
from influence_core.sharding import Reads, what_failed

NUM_SINGLE = 8  # examples that are run by themselves


def refuse_uneven_calls(
    model: nn.Module, run: Callable[[Sequence[int]], object], batches: Sequence[Sequence[int]]
) -> None:
    """Raise UserError if a sharded model does not call the same units for each of these batches, or can't be run.

    Args:
        run: runs the model on the examples of these indices, in every process.
    """
    name, first = own_class(model).__name__, []
    try:
        run(batches[0])  # a task may ask the model more where it sees it for the first time
        for batch in batches:
            with _unit_calls(model) as called:
                run(batch)
            first = first or called
            if called != first:
                break
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise UserError(f"this {name} can't be run: {what_failed(error)}") from error
    if called != first:
        names = dict.fromkeys(first + called)
        uneven = [each for each in names if first.count(each) != called.count(each)] or ["in another order"]
        raise UserError(
            f"--use_fsdp: which parts of this {name} are called ({uneven[0]}) depends on the example or on chance, but "
            "sharded processes go in step: leave --use_fsdp out, or, where its config drops layers at random, set that "
            "to 0 (--config_overrides)"
        )


def of_many_sizes(sizes: Mapping[int, int], largest: int = 2) -> list[list[int]]:
    """Batches of the examples whose sizes are given by index: single ones, from the smallest to the largest, always as
    many, for what depends on chance; and these two together, for what depends on padding.

    Args:
        largest: examples in a batch, at most.
    """
    by_size = {size: index for index, size in sizes.items()}
    indices = [by_size[size] for size in sorted(by_size)]
    last = len(indices) - 1
    single = [indices[number * last // (NUM_SINGLE - 1)] for number in range(NUM_SINGLE)]
    together = [indices[0], indices[last]][: largest if last else 1]
    return [*([index] for index in single), together]


@contextmanager
def _unit_calls(model: nn.Module) -> Iterator[list[str]]:
    """What is called of units inside, and read of them from outside, in its order."""
    called: list[str] = []

    def note(name: str) -> Callable:
        return lambda *_: called.append(name)

    units = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    handles = [module.register_forward_pre_hook(note(name or "the model")) for name, module in units]
    Reads.of(model).calls = called
    try:
        yield called
    finally:
        Reads.of(model).calls = None
        for handle in handles:
            handle.remove()
