"""Which examples a process takes, in which order, and how they become a batch on the device."""

from collections.abc import Sequence
from typing import Any

import torch

from influence_core.errors import UserError
from influence_core.runtime import Runtime
from influence_core.task import EXAMPLE_INDEX, Batch, InfluenceTask

LOOKED_AT = 64  # examples whose sizes are compared where a task has no lengths


def shares(num_examples: int, runtime: Runtime) -> list[range]:
    """The examples of each process: contiguous shares, uneven or empty where they have to be."""
    bounds = [num_examples * rank // runtime.world_size for rank in range(runtime.world_size + 1)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:])]


def share(num_examples: int, runtime: Runtime) -> range:
    """The examples that belong to this process."""
    return shares(num_examples, runtime)[runtime.rank]


def order_examples(lengths: Sequence[int], runtime: Runtime) -> list[int]:
    """This process's share of the examples, the longest first.

    Examples of like length meet in a batch, so that little of it is padding, and a batch that is too large for the
    memory is met at once. Every example belongs to exactly one process, and none is repeated. Where parameters are
    sharded, all processes go through all examples together (study.captures), and this is the order of all.
    """
    of_process = range(len(lengths)) if runtime.sharded else share(len(lengths), runtime)
    return sorted(of_process, key=lambda index: -lengths[index])


def sizes_of_some(task: InfluenceTask, dataset: Sequence[Any]) -> dict[int, int]:
    """By index, of examples throughout the dataset: the numbers that they become."""
    indices = range(0, len(dataset), -(-len(dataset) // LOOKED_AT))
    return {i: sum(x.numel() for x in task.collate([dataset[i]]).values()) for i in indices}


def make_batch(task: InfluenceTask, dataset: Sequence[Any], indices: Sequence[int], runtime: Runtime) -> Batch:
    """These examples, collated and on the device, with batch[EXAMPLE_INDEX] added."""
    batch = {**task.collate([dataset[index] for index in indices]), EXAMPLE_INDEX: torch.tensor(indices)}
    other = [
        f"{key!r} (a {type(value).__name__})" for key, value in batch.items() if not isinstance(value, torch.Tensor)
    ]
    if other:
        raise UserError(f"collate gives {', '.join(other)}: a batch holds tensors")
    return {key: runtime.send(value) for key, value in batch.items()}
