"""Batch sizes that the memory allows: those asked for, or less where less memory gives fewer passes, or any at all."""

from collections.abc import Callable
from dataclasses import replace

from influence_core.errors import UserError
from influence_core.layers import TrackedLayer
from influence_core.scores.plan import Work, fit_peaks, make_plan

# Examples in a batch below which products get slow: smaller ones are taken only where nothing else fits.
EFFICIENT = 8


def fit_batch_sizes(
    layers: list[TrackedLayer], work: Work, budget: int, say: Callable[[str], None] = lambda text: None
) -> Work:
    """The work with batch sizes halved, as often as it takes.

    The factor passes take the largest batch that fits. Query and training batches share memory with the resident
    queries: they are halved where that saves passes over the training set, or where nothing fits otherwise.

    Args:
        budget: bytes that may be taken beyond what is in use.
        say: is told what was lowered.
    Returns:
        Work that `make_plan` accepts; where not even single examples fit, the work as it is, for it to refuse.
    """
    factor_sizes = (size for size in _halvings(work.factor_batch_size) if _fits_factors(layers, work, size, budget))
    if (factor_batch_size := next(factor_sizes, None)) is None:
        return work
    asked, work = work, replace(work, factor_batch_size=factor_batch_size)
    lowered = [
        replace(work, train_batch_size=train, query_batch_size=query)
        for train, query in zip(*_same_length(_halvings(work.train_batch_size), _halvings(work.query_batch_size)))
    ]
    efficient = [x for x in lowered if x == work or min(x.train_batch_size, x.query_batch_size) >= EFFICIENT]
    best = _cheapest(layers, efficient, budget) or _cheapest(layers, lowered, budget)
    if best is None:
        return work
    sizes = ("factor_batch_size", "query_batch_size", "train_batch_size")
    changed = [f"--{name} {getattr(best, name)} for {getattr(asked, name)}" for name in sizes]
    changed = [text for name, text in zip(sizes, changed) if getattr(best, name) != getattr(asked, name)]
    if changed:
        say(f"Lowered to what memory holds best: {', '.join(changed)}")
    return best


def _cheapest(layers: list[TrackedLayer], options: list[Work], budget: int) -> Work | None:
    """That with the fewest FLOPs, the first of several; None if no plan fits."""
    flops = {}
    for number, work in enumerate(options):
        try:
            flops[number] = make_plan(layers, work, budget).pairwise_flops
        except UserError:
            continue
    return options[min(flops, key=flops.__getitem__)] if flops else None


def _fits_factors(layers: list[TrackedLayer], work: Work, batch_size: int, budget: int) -> bool:
    return max(fit_peaks(layers, replace(work, factor_batch_size=batch_size)).values(), default=0) <= budget


def _halvings(size: int) -> list[int]:
    """The size, half of it, … 1."""
    return [size >> times for times in range(size.bit_length())]


def _same_length(*lists: list[int]) -> list[list[int]]:
    """Each list filled up with its last value."""
    longest = max(map(len, lists))
    return [values + values[-1:] * (longest - len(values)) for values in lists]
