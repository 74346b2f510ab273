"""Padding that no second example reveals: where every batch is padded to the same length."""

import torch
from torch import Tensor

from influence_core.captured import Captured, has_gradient
from influence_core.errors import UserError
from influence_core.task import EXAMPLE_INDEX, Batch

FEWEST = 2  # positions that make a run of padding
NEGLIGIBLE = 1e-4  # of the norm of all output gradients


def refuse_counted_padding(name: str, captured: Captured, batch: Batch) -> None:
    """Raise UserError where one example's padding is counted by a layer, or what is no padding is left out.

    Args:
        captured: what the layer saw of one example, run alone.
    """
    gradients, mask = captured.output_gradients, captured.mask
    if mask is not None:
        left_out = gradients[~mask].norm()
        if left_out > NEGLIGIBLE * gradients.norm():
            raise UserError(
                f"the position mask of layer {name} leaves out positions that carry gradient: it is that of another "
                "stream; position_mask is true at every real position of the layer's own input"
            )
        return
    num_padded = count_padding(batch, ~has_gradient(gradients))
    if num_padded >= FEWEST:
        raise UserError(
            f"layer {name} counts {num_padded} positions of padding of one example: let position_mask give the mask of "
            "the layer's own input stream (of ones where they are none)"
        )


def count_padding(batch: Batch, is_dead: Tensor) -> int:
    """Positions at the ends of rows that have no gradient, and where no tensor of the batch says anything new.

    Args:
        is_dead: [rows, positions] (or folded alike), true where there is no gradient.
    """
    tensors = [
        value.reshape(-1, value.shape[-1])
        for key, value in batch.items()
        if key != EXAMPLE_INDEX and value.dim() > 1 and value.numel() == is_dead.numel()
    ]
    if not tensors or len({x.shape for x in tensors}) > 1:
        return 0
    is_dead = is_dead.reshape(tensors[0].shape)
    # A tensor that is the same all along a row does not tell padding from the rest.
    varied = torch.stack([(x != x[:, :1]).any(1) for x in tensors]).any(0)
    count = 0
    for direction in (lambda x: x, lambda x: x.flip(1)):  # padding on the left, and on the right
        run = direction(is_dead)
        for x in map(direction, tensors):
            run = run & (x == x[:, :1])
        lengths = run.cumprod(1).sum(1)
        count += int(lengths[(lengths >= FEWEST) & varied].sum())
    return count
