"""What the layers saw of a batch, and how much memory it holds."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def captured_bytes(captured: dict[str, Captured]) -> int:
    """Of all layers' activations and output gradients; a tensor that several layers read counts once."""
    tensors = (x for each in captured.values() for x in (each.activations, each.output_gradients))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
