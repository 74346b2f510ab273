"""Stage 1: the covariances of each layer's inputs and output gradients (the Kronecker factors).

    A = E[a a^T]   over real positions, a with its one for the bias        [in(+1), in(+1)]
    G = E[g g^T]   over real positions, g = dL/d(output), labels sampled   [out, out]

Source: Martens and Grosse 2015, arXiv:1503.05671, section 3; per position as in Grosse et al. 2023, arXiv:2308.03296.
"""

import operator

import torch
from torch import Tensor

from influence_core.captured import Captured
from influence_core.files import Tensors
from influence_core.layers import TrackedLayer
from influence_core.memory import changing, in_halves
from influence_core.precision import Precision

# Widths of the blocks of a covariance: of smaller ones the products are slower than what symmetry saves, larger ones
# save less of it.
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512


def add_second_moment(total: Tensor, rows: Tensor, precision: Precision) -> None:
    """total += rows^T rows, upper block triangle only; `mirror` completes it.

    Args:
        total: [d, d] in sum_dtype.
        rows: [positions, d].
    Cost: between half and all of 2 positions d^2 FLOPs.
    """
    d = rows.shape[1]
    block = min(max(SMALLEST_BLOCK, -(-d // 4)), LARGEST_BLOCK)
    for start in range(0, d, block):
        end = min(start + block, d)
        precision.add_matmul(total[start:end, start:], rows[:, start:end].t(), rows[:, start:])


def mirror(total: Tensor) -> Tensor:
    """Copy the upper triangle onto the lower one, in place."""
    return total.triu_().add_(total.triu(1).t())


class _Chosen:
    """Flat indices of the positions that masks choose, made once for all layers that share their masks.

    Making one waits for a GPU.
    """

    def __init__(self):
        self.known: list[tuple[tuple[Tensor, ...], list[int], Tensor]] = []  # the last ones: masks, versions, index

    def index(self, masks: tuple[Tensor, ...]) -> Tensor:
        """Of the positions that all of them choose; each [rows, positions] bool."""
        versions = [mask._version for mask in masks]  # a task may write into the same mask again
        for known, at, index in self.known:
            if at == versions and len(known) == len(masks) and all(map(operator.is_, known, masks)):
                return index
        index = torch.stack(masks).all(0).flatten().nonzero().squeeze(1)
        self.known = [*self.known[-7:], (masks, versions, index)]
        return index

    def rows(self, x: Tensor, *masks: Tensor | None) -> Tensor:
        """[rows, positions, d] -> [those chosen by all masks, d]; None chooses all."""
        x, masks = x.flatten(0, 1), tuple(mask for mask in masks if mask is not None)
        return x.index_select(0, self.index(masks)) if masks else x  # faster than x[mask]


class CovarianceSums:
    """Accumulates sums over positions; `means` gives the covariances.

    `tensors` is all of its state: "activation.<layer>", "gradient.<layer>" and "num_positions.<layer>".
    """

    def __init__(self, layers: list[TrackedLayer], precision: Precision, device: torch.device):
        self.precision, self.chosen = precision, _Chosen()
        self.tensors: Tensors = {}
        for layer in (layer for layer in layers if layer.is_kronecker):
            for kind, size in (("activation", layer.shape[1]), ("gradient", layer.shape[0])):
                self.tensors[f"{kind}.{layer.name}"] = torch.zeros(size, size, dtype=precision.sum_dtype, device=device)
            self.tensors[f"num_positions.{layer.name}"] = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, layer: TrackedLayer, captured: Captured) -> None:
        """Add one batch of one layer; positions that the mask excludes count for nothing."""
        if layer.is_kronecker:
            in_halves(lambda some: self._add(layer, captured.part(some)), slice(0, len(captured)))

    def _add(self, layer: TrackedLayer, captured: Captured) -> None:
        activations = self.chosen.rows(captured.activations, captured.mask)
        output_gradients = self.chosen.rows(captured.output_gradients, captured.mask, captured.active)
        total, i = self.tensors[f"activation.{layer.name}"], layer.in_features
        with changing("covariances are summed up"):
            add_second_moment(total[:i, :i], activations, self.precision)
            if layer.has_bias:  # the products of each input with the bias's one, and of that one with itself
                total[:i, i] += activations.sum(0, dtype=self.precision.sum_dtype)
                total[i, i] += len(activations)
            add_second_moment(self.tensors[f"gradient.{layer.name}"], output_gradients, self.precision)
            self.tensors[f"num_positions.{layer.name}"] += len(activations)

    def means(self, layers: list[TrackedLayer]) -> tuple[dict[str, Tensors], dict[str, int]]:
        """({"activation_covariance": {layer: [in(+1), in(+1)]}, "gradient_covariance": …}, num_positions by layer)."""
        layers = [layer for layer in layers if layer.is_kronecker]
        counts = {layer.name: int(self.tensors[f"num_positions.{layer.name}"]) for layer in layers}
        files = {
            f"{kind}_covariance": {
                layer.name: mirror(self.tensors[f"{kind}.{layer.name}"]).div_(counts[layer.name]) for layer in layers
            }
            for kind in ("activation", "gradient")
        }
        return files, counts
