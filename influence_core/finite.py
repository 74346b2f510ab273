"""Every stored number is finite: what is not is refused by what it is, its layer and its examples, before it is stored.

Reading a number waits for the device, so on a GPU what the passes bring is looked at in bunches; a result is looked at
once, when its stage ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_core.captured import Captured
from influence_core.errors import UserError

BUNCH = 32  # batches between two looks on a GPU
REMEDY = "look at these examples and at the checkpoint (a diverged training run?)"


@dataclass
class _Noted:
    loss: Tensor  # scalar
    sums: Tensor  # [2, layers]: of each layer's inputs and output gradients; finite if every number is
    layer_names: list[str]  # in the order of the forward pass
    indices: list[int]
    what: str


class FiniteWatch:
    """Looks at the loss of every batch and at what its layers captured."""

    def __init__(self, device: torch.device):
        self.bunch = BUNCH if device.type == "cuda" else 1
        self.noted: list[_Noted] = []

    def note(self, loss: Tensor, captured: Mapping[str, Captured], indices: list[int], what: str) -> None:
        """Remember a batch, and look at all that are remembered when a bunch is full."""
        # A sum over finite numbers is finite and one over a NaN or an infinity is not, at the price of one read.
        dtype = torch.promote_types(loss.dtype, torch.float32)
        kinds = [[x.inputs for x in captured.values()], [x.gradients for x in captured.values()]]
        sums = torch.stack([
            torch.stack([sum((x.sum(dtype=dtype) for x in of_layer), loss.new_zeros((), dtype=dtype))
                         for of_layer in tensors]) for tensors in kinds
        ])  # fmt: skip
        self.noted.append(_Noted(loss, sums, list(captured), indices, what))
        if len(self.noted) == self.bunch:
            self.look()

    def look(self) -> None:
        """Raise UserError if anything remembered is NaN or infinite; to be called before anything is stored."""
        noted, self.noted = self.noted, []
        if not noted:
            return
        finite = torch.stack([torch.stack([x.loss.isfinite(), x.sums.isfinite().all()]) for x in noted]).tolist()
        for batch, (is_loss_finite, are_sums_finite) in zip(noted, finite):
            examples = f"the batch of examples {listed(batch.indices)}"
            if not is_loss_finite:
                raise UserError(f"the {batch.what} of {examples} is {float(batch.loss)}: {REMEDY}")
            if are_sums_finite:
                continue
            inputs, gradients = (~batch.sums.isfinite()).tolist()
            if any(inputs):  # what goes wrong in the forward pass is handed on to later layers
                where, name = "input", batch.layer_names[inputs.index(True)]
            else:  # and in the backward pass, to earlier ones
                where, name = "output gradient", batch.layer_names[-1 - gradients[::-1].index(True)]
            raise UserError(
                f"the {where} of layer {name} is NaN or infinite in {examples}, although their {batch.what} is "
                f"{float(batch.loss):.4g}: {REMEDY}"
            )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    if not tensors:
        return []
    are_finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return [name for name, is_finite in zip(tensors, are_finite) if not is_finite]


def require_finite(tensors: Mapping[str, Tensor], stage: str, kind: str) -> None:
    """Raise UserError if a result of a stage is not finite; `tensors` by layer, `kind` as a person calls them."""
    bad = not_finite(tensors)
    if bad:
        raise UserError(
            f"{stage}: the {kind} of layer {bad[0]} is not finite, so nothing is stored: its numbers are beyond the "
            "range of the number format (a diverged training run, or a loss of an unusual scale?)"
        )


def listed(examples: Sequence[int]) -> str:
    """Indices as a person reads them, a run of them as "3 to 7"."""
    if len(examples) > 1 and list(examples) == list(range(examples[0], examples[-1] + 1)):
        return f"{examples[0]} to {examples[-1]}"
    return ", ".join(map(str, sorted(examples)))
