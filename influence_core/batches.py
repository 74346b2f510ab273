"""Dataset -> batches on the device, each example with its own index, shared out over processes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from influence_core.runtime import Runtime
from influence_core.task import EXAMPLE_INDEX, Batch, InfluenceTask


def share(num_examples: int, runtime: Runtime) -> range:
    """The examples that belong to this process: a contiguous share, uneven or empty where it has to be."""
    rank, world_size = runtime.rank, runtime.world_size
    return range(num_examples * rank // world_size, num_examples * (rank + 1) // world_size)


def plan_batches(num_examples: int, batch_size: int, runtime: Runtime) -> list[list[int]]:
    """The index lists of this process's batches: its share of the examples, cut into batches.

    Every example belongs to exactly one process, and none is padded or repeated.
    """
    mine = share(num_examples, runtime)
    return [list(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]


def iterate_batches(
    task: InfluenceTask, dataset: Sequence[Any], batches: list[list[int]], runtime: Runtime
) -> Iterator[Batch]:
    """The batches, collated and on the device, with batch[EXAMPLE_INDEX] added."""

    def collate(examples: list[tuple[int, Any]]) -> Batch:
        batch = task.collate([example for _, example in examples])
        return {**batch, EXAMPLE_INDEX: torch.tensor([index for index, _ in examples])}

    on_cuda = runtime.device.type == "cuda"
    loader = DataLoader(_Indexed(dataset), batch_sampler=batches, collate_fn=collate, pin_memory=on_cuda)
    for batch in loader:
        yield {key: value.to(runtime.device, non_blocking=on_cuda) for key, value in batch.items()}


class _Indexed:
    """A dataset whose items carry their index."""

    def __init__(self, dataset: Sequence[Any]):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]
