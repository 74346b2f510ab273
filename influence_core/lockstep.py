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

NUM_RUNS = 8  # of examples of as many lengths as there are


def refuse_uneven_calls(model: nn.Module, run: Callable[[int], object], indices: Sequence[int]) -> None:
    """Raise UserError if a sharded model does not call the same units for each of these examples.

    Args:
        run: runs the model on the example of that index, in every process.
    """
    run(indices[0])  # a task may ask the model more where it sees it for the first time
    first: list[str] = []
    for index in indices:
        with _unit_calls(model) as called:
            run(index)
        first = first or called
        if called != first:
            names = dict.fromkeys(first + called)
            uneven = [name for name in names if first.count(name) != called.count(name)] or ["in another order"]
            raise UserError(
                f"--use_fsdp: which parts of this {own_class(model).__name__} are called ({uneven[0]}) depends on the "
                "example or on chance, but sharded processes go in step: leave --use_fsdp out, or, where its config "
                "drops layers at random, set that to 0 (--config_overrides)"
            )


def of_many_sizes(sizes: Mapping[int, int]) -> list[int]:
    """`NUM_RUNS` of the examples whose sizes are given by index: of all sizes, or evenly chosen ones."""
    by_size = {size: index for index, size in sizes.items()}
    indices = [by_size[size] for size in sorted(by_size)]
    if len(indices) <= NUM_RUNS:
        return [indices[number % len(indices)] for number in range(NUM_RUNS)]
    return [indices[number * (len(indices) - 1) // (NUM_RUNS - 1)] for number in range(NUM_RUNS)]


@contextmanager
def _unit_calls(model: nn.Module) -> Iterator[list[str]]:
    """The names of the units that are called inside, in their order."""
    called: list[str] = []

    def note(name: str) -> Callable:
        return lambda *_: called.append(name)

    units = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    handles = [module.register_forward_pre_hook(note(name or "the model")) for name, module in units]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
