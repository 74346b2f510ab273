"""Labels sampled from the model's own distribution, the same whatever the batching.

The Fisher is an expectation over the model's distribution, so its factors need labels drawn from it. A draw takes one
uniform number and a search in the cumulative sum (inverse-CDF sampling). The uniform is a function of (seed, example,
position) alone, so the labels do not depend on batch size, order or number of processes. (Two runs whose logits differ
by rounding can differ in a label where the uniform falls within rounding of a boundary between two categories.)

Hashing and sampling stay out of compiled code: torch.compile was seen to get the wrapping products of 64-bit integers
wrong on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit constant as the signed integer that torch.int64 holds."""
    return value - (1 << 64) if value >= 1 << 63 else value


BLOCK = 64  # categories that sampling sums up at once

_GOLDEN, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift (torch shifts signed integers arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser: every input bit reaches every output bit. int64 products wrap, as wanted.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@torch.compiler.disable
def counter_uniforms(seed: int, example_index: Tensor, num_positions: int) -> Tensor:
    """One uniform number in [0, 1) for each (seed, example, position).

    Args:
        seed: any integer.
        example_index: [examples] int64.
    Returns:
        [examples, num_positions] float32, multiples of 2^-24.
    """
    positions = torch.arange(1, num_positions + 1, device=example_index.device)
    state = _mix(example_index * _GOLDEN + _signed(seed * 0xD1342543DE82EF95 & (1 << 64) - 1))
    return _shift_right(_mix(state[:, None] + positions * _GOLDEN), 40).float() * 2.0**-24


_FROM_UNIFORMS_ALONE: ContextVar[bool] = ContextVar("labels_from_uniforms_alone", default=False)


@contextmanager
def labels_from_uniforms_alone() -> Iterator[None]:
    """Inside, every category that is possible is as likely as any other: a label depends on its uniform alone.

    For proofs that two batches give an example the same uniforms: labels of the model's own distribution could differ
    by the rounding of its logits.
    """
    token = _FROM_UNIFORMS_ALONE.set(True)
    try:
        yield
    finally:
        _FROM_UNIFORMS_ALONE.reset(token)


@torch.compiler.disable
def sample_categorical(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The category into which each uniform falls, by inverse CDF.

    Args:
        weights: [..., categories], non-negative, not necessarily normalised.
        uniforms: [...], in [0, 1).
    Returns:
        [...] int64.
    """
    if _FROM_UNIFORMS_ALONE.get():
        ranks = (weights > 0).cumsum(-1)  # of the possible categories, from 1
        wanted = (uniforms * ranks[..., -1]).long() + 1
        return torch.searchsorted(ranks, wanted.unsqueeze(-1)).squeeze(-1).clamp_(max=weights.shape[-1] - 1)
    # In two steps, first among blocks of categories, then within one: a sum is much faster than a cumulative sum.
    num_categories = weights.shape[-1]
    num_whole = num_categories // BLOCK
    blocks = weights[..., : num_whole * BLOCK].unflatten(-1, (num_whole, BLOCK)).sum(-1)
    rest = weights[..., num_whole * BLOCK :].sum(-1, keepdim=True)
    cumulative = torch.cat([blocks, rest], -1).cumsum(-1)
    thresholds = (uniforms.to(weights.dtype) * cumulative[..., -1]).unsqueeze(-1)
    block = _first_above(cumulative, thresholds)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0)
    categories = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    within = weights.gather(-1, categories.clamp(max=num_categories - 1)) * (categories < num_categories)
    within = within.cumsum(-1)
    position = _first_above(within, (thresholds - before).clamp(min=0))
    return categories.gather(-1, position).squeeze(-1).clamp_(max=num_categories - 1)


def _first_above(cumulative: Tensor, thresholds: Tensor) -> Tensor:
    """[..., 1], the first index whose cumulative weight is above the threshold; where rounding leaves none, the last
    one that has any weight; where the weights are NaN, any index."""
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous()).clamp_(max=cumulative.shape[-1] - 1)
    return torch.minimum(torch.searchsorted(cumulative, thresholds, right=True), last)


class LabelSampler:
    """Hands a task the uniforms for its batch; stands where the task would use the data's labels."""

    def __init__(self, seed: int):
        self.seed = seed
        self.was_asked = False

    def uniforms(self, example_index: Tensor, num_positions: int) -> Tensor:
        """[examples, num_positions], see `counter_uniforms`."""
        self.was_asked = True
        return counter_uniforms(self.seed, example_index, num_positions)

    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """One label for each row of logits [..., categories]; uniforms [...]."""
        return sample_categorical(logits.detach().float().softmax(-1), uniforms)
