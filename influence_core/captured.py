"""What the layers saw of a batch, laid out by rows and positions, and how much memory it holds."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from influence_core.errors import UserError


@dataclass(frozen=True)
class Calls:
    """Of one module in one forward pass, in their order."""

    inputs: list[Tensor]
    output_gradients: list[Tensor]  # of the summed loss
    losses: list[Any] = field(default_factory=list)  # HeadLoss: of a head whose logits were not held

    def to(self, operand: Callable[[Tensor], Tensor]) -> "Calls":
        """The same as operands of products."""
        return replace(
            self, inputs=list(map(operand, self.inputs)), output_gradients=list(map(operand, self.output_gradients))
        )


@dataclass(frozen=True)
class Layout:
    """How a batch lies in what its layers saw."""

    num_examples: int
    rows_per_example: int | None  # None where only the task knows, which then post-processes gradients
    position_counts: set[int]  # how many positions a row has anywhere in the batch
    mask: Callable[[str], Tensor | None]  # of a layer's positions, [rows, positions]
    operand: Callable[[Tensor], Tensor]  # a tensor as it enters a product
    as_in_pass: Callable[[], AbstractContextManager] = nullcontext  # inside, modules compute as they did in the pass


# How the positions of a row lie end to end, for each call of a module: (positions along the input's own axis of them,
# how many it split each into). Empty: not known, as where some positions were picked.
Spans = tuple[tuple[int, int], ...]


class Captured(ABC):
    """What one layer saw of one batch: enough for every factor and every per-sample gradient."""

    @abstractmethod
    def __len__(self) -> int:
        """Per-sample gradients that can be made of it."""

    @abstractmethod
    def __getitem__(self, rows: slice) -> "Captured":
        """That of some of them."""

    def part(self, rows: slice) -> "Captured":
        """That of some of them, or itself where these are all."""
        return self if rows == slice(0, len(self)) else self[rows]

    @abstractmethod
    def to(self, dtype: torch.dtype) -> "Captured":
        """The same in another number format."""

    @abstractmethod
    def as_one(self) -> "Captured":
        """The same as of a single example, whose gradient is the sum of all."""

    @property
    @abstractmethod
    def inputs(self) -> list[Tensor]:
        """The floating-point tensors that it read."""

    @property
    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Those of its outputs, of the summed loss."""

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [*self.inputs, *self.gradients]

    def compact(self) -> "Captured":
        """Without what adds nothing to a gradient."""
        return self

    def size(self) -> float:
        """By which the rounding of its gradients goes: norm of the inputs x norm of the output gradients."""
        inputs, gradients = (sum(float(x.norm()) ** 2 for x in each) for each in (self.inputs, self.gradients))
        return math.sqrt(inputs * gradients)


@dataclass
class Positions(Captured):
    """What a layer read and what came back, position by position."""

    activations: Tensor  # [rows, positions, in], as operands of products
    output_gradients: Tensor  # [rows, positions, out], as operands of products
    mask: Tensor | None = None  # [rows, positions] bool, true at real positions; None: all are real
    active: Tensor | None = None  # [rows, positions] bool, true where there is a gradient; None: nearly everywhere
    max_active: int = 0  # at most so many are true in a row
    spans: Spans = ()

    def __len__(self):
        return len(self.activations)

    def __getitem__(self, rows):
        mask, active = (None if x is None else x[rows] for x in (self.mask, self.active))
        return Positions(self.activations[rows], self.output_gradients[rows], mask, active, self.max_active, self.spans)

    def to(self, dtype):
        return replace(self, activations=self.activations.to(dtype), output_gradients=self.output_gradients.to(dtype))

    def as_one(self):
        """Their positions end to end: the contraction over positions then adds them up."""
        return Positions(end_to_end(self.activations), end_to_end(self.output_gradients))

    @property
    def inputs(self):
        return [self.activations]

    @property
    def gradients(self):
        return [self.output_gradients]

    def compact(self):
        """The positions with a gradient alone.

        Padding has none, and where the loss reads one position alone, neither has the rest of what the last layers see.
        """
        if self.active is None:
            return self
        num_rows, num_positions = self.active.shape
        positions = self.active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : self.max_active]
        index = positions + num_positions * torch.arange(num_rows, device=positions.device).unsqueeze(1)
        activations, output_gradients = (
            x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
            for x in (self.activations, self.output_gradients)
        )
        return Positions(activations, output_gradients)


def end_to_end(rows: Tensor) -> Tensor:
    """[rows, positions, ...] -> [1, rows * positions, ...]"""
    return rows.flatten(0, 1).unsqueeze(0)


def lay_out(name: str, calls: Calls, mask: Tensor | None, layout: Layout) -> Positions:
    """The calls of a module, end to end along the position axis, with the rows of an example folded into it.

    Args:
        name: of the layer, for messages.
        calls: [rows, ..., features] with any number of axes of positions; or [rows * positions, features], as layers
            see them whose model flattens before its feed-forward layers: unfolded to as many positions as a row has
            somewhere in the batch, or it would be positions picked from several rows.
        mask: the task's, [rows, positions]; positions that a layer splits into several count alike.
    Raises:
        UserError: the first axis does not count rows, or the mask does not fit.
    """
    num_examples, rows_per_example = layout.num_examples, layout.rows_per_example
    num_rows = None if rows_per_example is None else num_examples * rows_per_example
    first = calls.inputs[0]
    mask = None if mask is None else torch.as_tensor(mask, dtype=torch.bool, device=first.device)
    if num_rows is None:
        num_rows = len(first) if mask is None else len(mask)
        if num_rows % num_examples:
            raise _wrong_rows(name, first, num_examples, rows_per_example)
    activations, gradients, masks, spans = [], [], [], []
    for seen, gradient in zip(calls.inputs, calls.output_gradients):
        is_flattened = seen.dim() == 2 and len(seen) % num_rows == 0 and len(seen) // num_rows in layout.position_counts
        if not (is_flattened or len(seen) == num_rows) or seen.shape[:-1] != gradient.shape[:-1]:
            raise _wrong_rows(name, seen, num_examples, rows_per_example)
        activations.append(seen.reshape(num_rows, -1, seen.shape[-1]))
        gradients.append(gradient.reshape(num_rows, -1, gradient.shape[-1]))
        num_positions = activations[-1].shape[1]
        axis = seen.shape[1] if seen.dim() > 3 else num_positions
        spans.append((axis, num_positions // max(axis, 1)))
        if mask is not None:
            masks.append(_fit_mask(name, mask, seen, activations[-1].shape[:2]))
    parts = [activations, gradients, masks] if mask is not None else [activations, gradients]
    laid_out = [each[0] if len(each) == 1 else torch.cat(each, dim=1) for each in parts]
    if rows_per_example not in (None, 1):
        laid_out = [x.reshape(num_examples, -1, *x.shape[2:]) for x in laid_out]
    return Positions(*laid_out, spans=tuple(spans))


def position_counts(inputs: Iterable[Tensor], batch: Mapping[str, Tensor]) -> set[int]:
    """How many positions a row may have, by the layers' inputs and by the batch's axes, also flattened."""
    counts = {x.shape[1] for x in inputs if x.dim() > 2}
    for value in batch.values():
        sizes = value.shape[1:]
        counts |= {math.prod(sizes[i:j]) for i in range(len(sizes)) for j in range(i + 1, len(sizes) + 1)}
    return counts


def _fit_mask(name: str, mask: Tensor, seen: Tensor, shape: torch.Size) -> Tensor:
    """The mask for one call, [rows, positions]."""
    if mask.dim() == 2 and seen.dim() > 3 and mask.shape == seen.shape[:2]:
        mask = mask.repeat_interleave(shape[1] // mask.shape[1], dim=1)
    if mask.shape != shape:
        raise UserError(
            f"the position mask of layer {name} is {tuple(mask.shape)}, but the layer saw {tuple(shape)} rows and "
            "positions: give it the mask of its own input stream, or leave it out if it has none (relative positions, "
            "experts that see picked positions)"
        )
    return mask


def _wrong_rows(name: str, seen: Tensor, num_examples: int, rows_per_example: int | None) -> UserError:
    num_rows = num_examples * (rows_per_example or 1)
    of_rows = f" of {rows_per_example} rows each" if (rows_per_example or 1) > 1 else ""
    if seen.dim() > 2 and seen.shape[1] == num_rows:
        cause = "its rows come second (sequence first)"
    elif seen.dim() > 2 and len(seen) == 1:
        cause = "it is applied once for all examples (as relative positions are), or to rows packed into one"
    else:
        cause = "it sees positions picked from several examples (routed experts), or is applied once for all"
    return UserError(
        f"layer {name} saw inputs of shape {tuple(seen.shape)} in a batch of {num_examples} examples{of_rows}, and the "
        f"first axis must count rows: {cause}; leave it out of the tracked layers"
    )


def find_active_positions(captured: Iterable[Captured]) -> None:
    """Note them where they are fewer than nine tenths; masks that say the same become one, as do active positions.

    On a GPU, this waits for the backward pass, once a batch: what layers share need not be asked of each.
    """
    captured = [each for each in captured if isinstance(each, Positions)]
    if not captured:
        return
    are_active = [has_gradient(x.output_gradients) for x in captured]
    masks = [x.mask for x in captured if x.mask is not None]
    pairs = [*_pairs_alike(are_active), *_pairs_alike(masks)]
    asked = [active.sum(1).max() for active in are_active] + [(one == other).all().long() for one, other in pairs]
    answers = torch.stack(asked).tolist()
    first: dict[int, Tensor] = {}  # by id, the one that says the same
    for (one, other), is_same in zip(pairs, answers[len(captured) :]):
        if is_same:
            first.setdefault(id(other), first.get(id(one), one))
    for x, active, count in zip(captured, are_active, answers):
        x.mask = first.get(id(x.mask), x.mask)
        if count < 0.9 * active.shape[1]:
            x.active, x.max_active = first.get(id(active), active), max(count, 1)


def _pairs_alike(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each tensor beside earlier ones of its shape that may say the same: the first, and the last two."""
    pairs: list[tuple[Tensor, Tensor]] = []
    earlier: dict[torch.Size, list[Tensor]] = {}
    for tensor in tensors:
        known = earlier.setdefault(tensor.shape, [])
        if not any(other is tensor for other in known):
            pairs += [(other, tensor) for other in known]
            known[1:] = [*known[1:][-1:], tensor]
    return pairs


def has_gradient(output_gradients: Tensor) -> Tensor:
    """[..., out] -> [...] bool, false where all are zero; NaN counts as a gradient."""
    return ~((output_gradients.amax(-1) == 0) & (output_gradients.amin(-1) == 0))


def captured_bytes(captured: dict[str, Captured]) -> int:
    """Of all layers' inputs and output gradients; a tensor that several layers read counts once."""
    sizes: dict[int, tuple[int, dict]] = {}  # {storage: (its bytes, those of each view of it)}
    for x in (x for each in captured.values() for x in each.tensors):
        storage = x.untyped_storage()
        sizes.setdefault(storage.data_ptr(), (storage.nbytes(), {}))[1][x.data_ptr(), x.shape, x.stride()] = x.nbytes
    # What came from another process lies beside others' in one storage; views of one tensor may overlap.
    return sum(min(whole, sum(views.values())) for whole, views in sizes.values())
