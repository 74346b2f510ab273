"""What the layers saw of a batch, laid out by rows and positions, and how much memory it holds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_core.errors import UserError


@dataclass
class Captured:
    """What one layer saw of one batch: enough for every factor and every per-sample gradient."""

    activations: Tensor  # [rows, positions, in], as operands of products
    output_gradients: Tensor  # [rows, positions, out], of the summed loss, as operands of products
    mask: Tensor | None  # [rows, positions] bool, true at real positions; None: all are real
    active: Tensor | None = None  # [rows, positions] bool, true where there is a gradient; None: nearly everywhere
    max_active: int = 0  # at most so many are true in a row

    def at_active_positions(self) -> tuple[Tensor, Tensor]:
        """Activations and output gradients where there is a gradient: all that a per-sample gradient is made of.

        Padding has none, and where the loss reads one position alone, neither has the rest of what the last layers see.
        """
        if self.active is None:
            return self.activations, self.output_gradients
        num_rows, num_positions = self.active.shape
        positions = self.active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : self.max_active]
        index = positions + num_positions * torch.arange(num_rows, device=positions.device).unsqueeze(1)
        activations, output_gradients = (
            x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
            for x in (self.activations, self.output_gradients)
        )
        return activations, output_gradients


def lay_out(
    name: str,
    inputs: list[Tensor],
    output_gradients: list[Tensor],
    mask: Tensor | None,
    num_examples: int,
    rows_per_example: int | None,
    position_counts: set[int],
) -> Captured:
    """The calls of a layer, end to end along the position axis, with the rows of an example folded into it.

    Args:
        inputs, output_gradients: of each call, [rows, ..., features] with any number of axes of positions; or
            [rows * positions, features], as layers see them whose model flattens before its feed-forward layers.
        mask: the task's, [rows, positions]; positions that a layer splits into several count alike.
        rows_per_example: None where only the task knows, which then post-processes gradients.
        position_counts: how many positions a row has anywhere in the batch: a flattened input is unfolded to one of
            these only, or it would be positions picked from several rows.
    Raises:
        UserError: the first axis does not count rows, or the mask does not fit.
    """
    num_rows = None if rows_per_example is None else num_examples * rows_per_example
    mask = None if mask is None else torch.as_tensor(mask, dtype=torch.bool, device=inputs[0].device)
    if num_rows is None:
        num_rows = len(inputs[0]) if mask is None else len(mask)
        if num_rows % num_examples:
            raise _wrong_rows(name, inputs[0], num_examples, rows_per_example)
    activations, gradients, masks = [], [], []
    for seen, gradient in zip(inputs, output_gradients):
        is_flattened = seen.dim() == 2 and len(seen) % num_rows == 0 and len(seen) // num_rows in position_counts
        if not (is_flattened or len(seen) == num_rows) or seen.shape[:-1] != gradient.shape[:-1]:
            raise _wrong_rows(name, seen, num_examples, rows_per_example)
        activations.append(seen.reshape(num_rows, -1, seen.shape[-1]))
        gradients.append(gradient.reshape(num_rows, -1, gradient.shape[-1]))
        if mask is not None:
            masks.append(_fit_mask(name, mask, seen, activations[-1].shape[:2]))
    parts = [activations, gradients, masks] if mask is not None else [activations, gradients]
    laid_out = [each[0] if len(each) == 1 else torch.cat(each, dim=1) for each in parts]
    if rows_per_example not in (None, 1):
        laid_out = [x.reshape(num_examples, -1, *x.shape[2:]) for x in laid_out]
    return Captured(*laid_out) if mask is not None else Captured(*laid_out, None)


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


def find_active_positions(captured: list[Captured]) -> None:
    """Note them where they are fewer than nine tenths. On a GPU, this waits for the backward pass, once a batch."""
    are_active = [has_gradient(x.output_gradients) for x in captured]
    counts = torch.stack([active.sum(1).max() for active in are_active]).tolist()
    for x, active, count in zip(captured, are_active, counts):
        if count < 0.9 * active.shape[1]:
            x.active, x.max_active = active, max(count, 1)


def has_gradient(output_gradients: Tensor) -> Tensor:
    """[..., out] -> [...] bool, false where all are zero; NaN counts as a gradient."""
    return ~((output_gradients.amax(-1) == 0) & (output_gradients.amin(-1) == 0))


def captured_bytes(captured: dict[str, Captured]) -> int:
    """Of all layers' activations and output gradients; a tensor that several layers read counts once."""
    tensors = (x for each in captured.values() for x in (each.activations, each.output_gradients))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
