"""Batch sizes that memory allows: those asked for, or smaller ones where that saves passes or nothing else fits."""

from collections.abc import Callable
from dataclasses import replace

from influence_core.errors import UserError
from influence_core.layers import TrackedLayer
from influence_core.scores.cost import Work, fit_peaks
from influence_core.scores.plan import make_plan

# A batch takes as long as so many examples more than it has: what small batches lose to products that are too small.
# On 2 CPU cores single examples of 128 tokens took 1.3 times what batches of 16 did; for a GPU it is an estimate.
OVERHEAD = {"cpu": 0.5, "cuda": 4}


def fit_batch_sizes(layers: list[TrackedLayer], work: Work, budget: int, say: Callable[[str], None]) -> Work:
    """The work with batch sizes halved as often as it takes.

    Factor batches are the largest that fit. Training batches share the memory with the resident queries: each size
    gives another plan, and that is taken which takes the least time. Query batches follow, so that their passes take
    no more memory than those of the training batches.

    Args:
        budget: bytes that may be taken beyond what is in use.
        say: is told what was lowered.
    Returns:
        Work that `make_plan` accepts; where not even single examples fit, that with single examples, to be refused.
    """
    of_factors = [replace(work, factor_batch_size=size) for size in _halvings(work.factor_batch_size)]
    fitting = (each for each in of_factors if max(fit_peaks(layers, each).values(), default=0) <= budget)
    factor = next(fitting, of_factors[-1])
    options = [factor]
    for train in _halvings(work.train_batch_size):
        of_training = train * work.train.num_bytes
        queries = (size for size in _halvings(work.query_batch_size) if size * work.query.num_bytes <= of_training)
        options.append(replace(factor, train_batch_size=train, query_batch_size=next(queries, 1)))
    timed: list[tuple[float, Work]] = []
    for option in options:
        try:
            plan = make_plan(layers, option, budget)
        except UserError:
            continue
        timed.append((plan.pairwise_flops * (1 + OVERHEAD[work.device_type] / option.train_batch_size), option))
        if option is factor and plan.num_passes == 1:
            break  # what was asked for; no other can be better
    if not timed:
        return replace(work, factor_batch_size=1, train_batch_size=1, query_batch_size=1)
    _, best = min(timed, key=lambda pair: pair[0])
    lowered = [
        f"--{name} {getattr(best, name)} instead of {getattr(work, name)}"
        for name in ("factor_batch_size", "query_batch_size", "train_batch_size")
        if getattr(best, name) != getattr(work, name)
    ]
    if lowered:
        say(f"Batches that fit into memory better: {', '.join(lowered)}")
    return best


def _halvings(size: int) -> list[int]:
    """The size, half of it, … 1."""
    return [size >> times for times in range(size.bit_length())]
