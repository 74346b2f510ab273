"""What a batch's layers captured, brought to the processes that own these layers.

Each process runs batches of its own through all layers, and owns some of the layers: it is sent what all the others
captured of these, and sends them what it captured of theirs. So whatever is made of a layer (covariances, eigenvectors,
Lambda, preconditioned query gradients, scores) lies with its owner alone, and is whole there.

What a layer captured can be of any kind: it is pickled, its tensors apart from it, each once however many layers share
it (queries, keys and values read the same input).
"""

import io
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from influence_core.captured import Captured
from influence_core.layers import TrackedLayer

ALIGNMENT = 16  # bytes, at which a tensor begins among others
LAYERS_AT_ONCE = 8  # of each process, whose tensors are on their way together: about those of a block


def share_out(layers: Sequence[TrackedLayer], num_processes: int) -> list[list[TrackedLayer]]:
    """The layers of each process: runs of about equal weight, by parameters and by what covariances take.

    A process may have none where there are few.
    """
    weights = [layer.num_parameters + layer.num_covariances for layer in layers]
    total, before = sum(weights), 0
    shares: list[list[TrackedLayer]] = [[] for _ in range(num_processes)]
    for layer, weight in zip(layers, weights):
        shares[(2 * before + weight) * num_processes // (2 * total)].append(layer)
        before += weight
    return shares


def exchange(
    captured: dict[str, Captured], shares: Sequence[Sequence[str]], device: torch.device
) -> list[dict[str, Captured]]:
    """What each process captured of the layers that this one owns, in the order of the processes.

    Args:
        captured: of this process's batch, by layer; emptied. Nothing where it had no batch.
        shares: names of the layers of each process.
    """
    received: list[dict[str, Captured]] = [{} for _ in shares]
    for start in range(0, max(map(len, shares)), LAYERS_AT_ONCE):
        some = [share[start : start + LAYERS_AT_ONCE] for share in shares]
        for of_source, part in zip(received, _exchange(captured, some, device)):
            of_source |= part
    return received


def _exchange(
    captured: dict[str, Captured], shares: Sequence[Sequence[str]], device: torch.device
) -> list[dict[str, Captured]]:
    """The same, all at once; what the shares name is taken out of `captured`."""
    rank = dist.get_rank()
    own = {name: captured.pop(name) for name in shares[rank] if name in captured}
    packed = [_pack({name: captured.pop(name) for name in share if name in captured}) for share in shares]
    texts: list[Any] = [None] * len(shares)
    shapes = [[(x.dtype, x.shape) for x in tensors] for _, tensors in packed]
    dist.all_gather_object(texts, [(text, of_share) for (text, _), of_share in zip(packed, shapes)])
    headers = [of_source[rank] for of_source in texts]
    spans = [_spans(of_share) for of_share in shapes]
    sizes = [of_share[-1].stop for of_share in spans]
    sent = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    for (_, tensors), of_share, into in zip(packed, spans, sent.split(sizes)):
        for span, x in zip(of_share, tensors):
            if x.numel():
                into[span].view(x.dtype).view(x.shape).copy_(x)
    del packed
    expected = [_spans(shapes)[-1].stop for _, shapes in headers]
    received = torch.empty(sum(expected), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, sent, expected, sizes)
    del sent
    parts = [_unpack(*header, block) for header, block in zip(headers, received.split(expected))]
    parts[rank] = own
    return parts


def _spans(shapes: Sequence[tuple[torch.dtype, torch.Size]]) -> list[slice]:
    """Where each tensor lies among bytes, and last, that nothing lies at the end."""
    spans, start = [], 0
    for dtype, shape in shapes:
        size = shape.numel() * dtype.itemsize
        spans.append(slice(start, start + size))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return [*spans, slice(start, start)]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self.known: dict[tuple, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in self.known:
            self.known[key] = len(self.tensors)
            self.tensors.append(value.detach())
        return self.known[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.persistent_load = tensors.__getitem__


def _pack(captured: dict[str, Captured]) -> tuple[bytes, list[Tensor]]:
    if not captured:
        return b"", []
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(captured)
    return file.getvalue(), pickler.tensors


def _unpack(text: bytes, shapes: Sequence[tuple[torch.dtype, torch.Size]], block: Tensor) -> dict[str, Captured]:
    if not text:
        return {}
    tensors = [block[span].view(dtype).view(shape) for span, (dtype, shape) in zip(_spans(shapes), shapes)]
    return _Unpickler(io.BytesIO(text), tensors).load()


def rounds(num_examples: int, batch_size: int, num_processes: int) -> Iterator[list[range]]:
    """The batches of each process, round by round, of examples in an order that all know; the last round's are even."""
    for start in range(0, num_examples, batch_size * num_processes):
        size = min(batch_size, -(-(num_examples - start) // num_processes))
        bounds = [min(start + size * rank, num_examples) for rank in range(num_processes + 1)]
        yield [range(*pair) for pair in zip(bounds, bounds[1:])]
