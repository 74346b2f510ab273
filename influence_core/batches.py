"""Which examples a process takes, in which order, and how they become a batch on the device."""

from collections.abc import Sequence
from typing import Any

import torch

from influence_core.runtime import Runtime
from influence_core.task import EXAMPLE_INDEX, Batch, InfluenceTask


def share(num_examples: int, runtime: Runtime) -> range:
    """The examples that belong to this process: a contiguous share, uneven or empty where it has to be."""
    rank, world_size = runtime.rank, runtime.world_size
    return range(num_examples * rank // world_size, num_examples * (rank + 1) // world_size)


def order_examples(lengths: Sequence[int], runtime: Runtime) -> list[int]:
    """This process's share of the examples, the longest first.

    Examples of like length meet in a batch, so that little of it is padding, and a batch that is too large for the
    memory is met at once. Every example belongs to exactly one process, and none is repeated.
    """
    return sorted(share(len(lengths), runtime), key=lambda index: -lengths[index])


def make_batch(task: InfluenceTask, dataset: Sequence[Any], indices: Sequence[int], runtime: Runtime) -> Batch:
    """These examples, collated and on the device, with batch[EXAMPLE_INDEX] added."""
    batch = {**task.collate([dataset[index] for index in indices]), EXAMPLE_INDEX: torch.tensor(indices)}
    return {key: runtime.send(value) for key, value in batch.items()}
