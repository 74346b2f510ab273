"""Batches of a few short rows to ask a model with, made of a task's own examples by its own collate."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from influence_core.errors import UserError
from influence_core.task import EXAMPLE_INDEX, Batch

if TYPE_CHECKING:
    from influence_core.tasks.transformer import TransformerTask

POSITIONS = (7, 5)  # of the first and the second stream; one less in the second batch
ROWS = (2, 3) + (1,) * 6  # of each batch: what picks positions does not pick one of every row, and as many of each
NUM_EXAMPLES = 16  # whose tokens are used
LOOKED_AT = 1000  # for those that have tokens

Lengths = Mapping[str, int]  # {stream: positions}


class SmallBatches:
    """The first training examples of a task, at any number of positions, and with tokens of each other."""

    def __init__(self, task: "TransformerTask", model: nn.Module):
        self.task = task
        self.device = next(model.parameters()).device
        dataset = task.load_dataset("train")
        examples = (dataset[index] for index in range(min(len(dataset), LOOKED_AT)))
        with_tokens = (each for each in examples if all(len(each[stream]) for stream in task.position_limits))
        self.examples = list(itertools.islice(with_tokens, NUM_EXAMPLES))
        if not self.examples:
            raise UserError(f"none of the first {LOOKED_AT} training examples has a token")
        self.tokens = {stream: self._all_tokens(stream) for stream in task.position_limits}

    def _all_tokens(self, stream: str) -> np.ndarray:
        fields = [example[stream] for example in self.examples]
        rows = itertools.chain.from_iterable(field if has_rows(field) else [field] for field in fields)
        return np.concatenate([np.asarray(row) for row in rows])

    def lengths(self, shorter: int = 0) -> dict[str, int]:
        """Positions by stream, or so many less; no two streams have the same."""
        lengths: dict[str, int] = {}
        for (stream, flag), positions in zip(self.task.position_limits.items(), POSITIONS):
            length = min(positions, getattr(self.task, flag))
            lengths[stream] = length - 1 if length in lengths.values() else length
        return {stream: length - shorter for stream, length in lengths.items()}

    def example(self, lengths: Lengths, turn: int = 0) -> Any:
        """An example of these numbers of positions, another for each turn."""
        tokens = {stream: np.roll(tokens, -turn * POSITIONS[0]) for stream, tokens in self.tokens.items()}
        return self.task.resized(self.examples[turn % len(self.examples)], lengths, tokens)

    def of(self, examples: Sequence[Any]) -> Batch:
        """These examples as a batch, where the model is."""
        batch = {**self.task.collate(examples), EXAMPLE_INDEX: torch.arange(len(examples))}
        return {key: value.to(self.device) for key, value in batch.items()}

    def batch(self, lengths: Lengths, turns: Sequence[int] = (0,)) -> Batch:
        """A row of these numbers of positions for each turn, without any padding."""
        batch = self.of([self.example(lengths, turn) for turn in turns])
        batch.pop("attention_mask", None)  # nothing is padded, but by a collate that pads to a fixed length
        for stream, length in lengths.items():
            padded = batch[stream].shape[-1]
            same = [key for key, x in batch.items() if key not in lengths and x.dim() > 1 and x.shape[-1] == padded]
            batch |= {key: batch[key][..., :length].contiguous() for key in (stream, *same)}
        return batch

    def all(self) -> list[Batch]:
        """Batches that differ in rows, positions and tokens."""
        turns = itertools.count()
        return [
            self.batch(self.lengths(shorter=number % 2), [next(turns) for _ in range(num_rows)])
            for number, num_rows in enumerate(ROWS)
        ]


def has_rows(field: Any) -> bool:
    """Whether a field holds several rows of token ids, and not one."""
    return isinstance(field, list) and len(field) > 0 and np.ndim(field[0]) > 0


def resize(tokens: Any, length: int, others: np.ndarray | None = None) -> Any:
    """Token ids cut or repeated to a length, of each row where there are several; from `others` if given.

    The first and the last stay, and are not repeated: the last may end a text, and some models take only rows with as
    many ends.
    """
    if has_rows(tokens):
        return [resize(row, length, None if others is None else np.roll(others, -i)) for i, row in enumerate(tokens)]
    first, between, last = np.split(np.asarray(tokens), [1, -1]) if len(tokens) > 1 else [np.asarray(tokens)] * 3
    between = between if others is None else others
    between = between[~np.isin(between, [first, last])]
    between = np.resize(between if len(between) else first, max(length - 2, 0))
    return np.concatenate([first, between, last])[-length:]
