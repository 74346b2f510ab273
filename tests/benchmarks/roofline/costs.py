"""Seconds of one operation, by what it is and by the shapes of what it reads and writes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from tests.benchmarks.roofline import cards
from tests.benchmarks.roofline.cards import Card

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
# What an operation touches is not always what it is given: lookups read as much as they give.
LOOKUPS = {"embedding", "index_select", "gather", "index", "slice_backward", "select_backward"}
WRITES_ONLY = {"zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "arange", "new_zeros",
               "new_full", "new_ones", "scalar_tensor"}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What an operation takes on the device."""

    flops: float = 0.0  # as torch counts them
    bytes: float = 0.0
    seconds: float = 0.0
    what: str = ""  # its sizes, for a person
    host: float = 0.0  # seconds that it takes on the CPU


def num_bytes(x: Tensor) -> int:
    """Of the memory that it covers: what is expanded counts once."""
    return math.prod(size for size, stride in zip(x.shape, x.stride()) if stride) * x.element_size()


def cost_of(name: str, func, args, kwargs, inputs: list[Tensor], outputs: list[Tensor], card: Card, tf32: bool) -> Cost:
    """Of an operation of torch that ran on meta tensors.

    Args:
        name: of `func`, without its overload.
        inputs, outputs: all tensors among its arguments and results; what is changed in place is in both.
    """
    moved = bytes_moved(name, inputs, outputs, kwargs.get("out"))
    what = " ".join("x".join(map(str, x.shape)) for x in outputs[:1])
    flops = compute = 0.0
    if (product := name.removesuffix("_")) in PRODUCTS:
        left, right = inputs[1:3] if product in ("addmm", "baddbmm") else inputs[:2]
        flops = 2.0 * math.prod(left.shape) * right.shape[-1]
        compute = product_seconds(left, right, outputs[0], card, tf32)
        what = f"{'x'.join(map(str, left.shape))} @ {'x'.join(map(str, right.shape[-2:]))}"
    elif "dot_product" in name:
        flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=tuple(outputs)))
        compute = attention_seconds(func, flops, inputs[0], args, kwargs, card)
        what = "x".join(map(str, inputs[0].shape))
    elif name == "_linalg_eigh":
        size = inputs[0].shape[-1]
        flops = 9.0 * size**3
        compute = eigh_seconds(size, card)
    on_host = flops / cards.CPU_EIGH_RATE if name == "_linalg_eigh" else moved / cards.CPU_BANDWIDTH
    on_device = max(compute, moved / card.bandwidth, cards.LAUNCH_FLOOR)
    return Cost(flops, moved, on_device, what, on_host + cards.NO_LAUNCH)


def bytes_moved(name: str, inputs: list[Tensor], outputs: list[Tensor], out: Tensor | None = None) -> float:
    """Read and written, each tensor once.

    Args:
        out: one that is among the inputs only to be written to.
    """
    written = sum(map(num_bytes, outputs))
    if name in WRITES_ONLY:
        return written
    if name in LOOKUPS:
        return 2 * written
    if name == "copy_":
        return sum(map(num_bytes, inputs))
    if name == "searchsorted":  # by halves, a sector of memory at each step
        return outputs[0].numel() * 32 * math.log2(max(2, inputs[0].shape[-1]))
    if name in ("scatter_add_", "index_add_", "index_put_", "_index_put_impl_"):  # what is added, and where it goes
        source = inputs[-1]
        return 3 * num_bytes(source)
    if name == "_softmax" and inputs[0].shape[-1] > cards.WIDE_SOFTMAX:
        return cards.WIDE_SOFTMAX_READS * num_bytes(inputs[0]) + written
    return written + sum({id(x): num_bytes(x) for x in inputs if x is not out}.values())


def product_seconds(left: Tensor, right: Tensor, result: Tensor, card: Card, tf32: bool) -> float:
    """Of a matrix product, or a batch of them: by the tiles of the result that fill the multiprocessors best."""
    batch = left.shape[0] if left.dim() == 3 else 1
    (rows, summed), columns = left.shape[-2:], right.shape[-1]
    if not all((batch, rows, summed, columns)):
        return 0.0
    rate = product_rate(left, right, result, card, tf32)
    best = math.inf
    for (high, wide), share in cards.TILES.items():
        for split in cards.SPLITS:
            if split > 1 and summed / split < cards.SMALLEST_SPLIT:
                break
            tiles = batch * math.ceil(rows / high) * math.ceil(columns / wide) * split
            rounds = math.ceil(tiles / card.multiprocessors)
            flops = 2 * rounds * card.multiprocessors * high * wide * math.ceil(summed / split)
            partial = 2 * split * batch * rows * columns * 4 if split > 1 else 0  # written, and read to be added up
            best = min(best, flops / (rate * share) + partial / card.bandwidth)
    return best


def product_rate(left: Tensor, right: Tensor, result: Tensor, card: Card, tf32: bool) -> float:
    """FLOP/s of large products of such operands."""
    if left.dtype == torch.float64:
        return card.float64
    if left.dtype == torch.float32 and not tf32:
        return card.float32
    rate = card.tf32 if left.dtype == torch.float32 else card.bfloat16
    if not (is_aligned(left) and is_aligned(right)):
        return rate * cards.MISALIGNED
    return rate if is_aligned(result) else rate * cards.MISALIGNED_RESULT


def is_aligned(x: Tensor) -> bool:
    """Whether rows, and matrices of a batch, begin at multiples of 16 bytes."""
    steps = [stride for stride, size in zip(x.stride(), x.shape) if stride > 1 and size > 1]
    return all(step * x.element_size() % cards.ALIGNMENT == 0 for step in (*steps, x.storage_offset()))


def attention_seconds(func, flops: float, query: Tensor, args, kwargs, card: Card) -> float:
    """Of a fused kernel; a causal one leaves out half of what torch counts."""
    names = [argument.name for argument in func._schema.arguments]
    is_causal = {**dict(zip(names, args)), **kwargs}.get("is_causal", False)
    if query.dtype == torch.float32:
        rate = card.attention_float32
    else:
        rate = card.flash_backward if "backward" in func._schema.name else card.flash_forward
    return flops * (0.5 if is_causal else 1.0) / rate


def eigh_latency(size: int, card: Card) -> float:
    """The part of an eigendecomposition that others at the same time do not prolong."""
    return size * card.eigh_column


def eigh_seconds(size: int, card: Card) -> float:
    """Of one alone, in float64."""
    return eigh_latency(size, card) + 9.0 * size**3 / card.eigh_rate
