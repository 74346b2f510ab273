"""Stage 3: the mean squared per-sample gradient, in the Kronecker eigenbasis (EKFAC) or in the plain one (diagonal).

    Lambda = E_z[(Q_G^T g(z) Q_A)^2]   elementwise, over examples   [out, in(+1)]

Source: George et al. 2018, arXiv:1806.03884, eq. 13.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from influence_core.captured import Captured
from influence_core.factors.eigenbasis import Eigenbasis
from influence_core.files import Tensors
from influence_core.layers import TrackedLayer
from influence_core.memory import in_halves, slices
from influence_core.precision import Precision

# Bytes of per-sample gradients held at once. On a CPU so few that they stay in its cache, and that the allocator gives
# the same pages again (beyond 32 MiB it takes fresh ones each time, which costs as much as the product).
BUFFER_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}

SMALL = 1 << 15  # numbers of a gradient, below which a loop over examples costs more than it saves

PostProcess = Callable[[str, Tensor], Tensor]


def lambda_chunk(layer: TrackedLayer, itemsize: int, device_type: str) -> int:
    """Per-sample gradients of a layer that are held at once."""
    return max(1, BUFFER_BYTES[device_type] // (layer.num_parameters * itemsize))


class LambdaSums:
    """Accumulates squared per-sample gradients; `means` gives Lambda.

    `tensors` is all of its state: "lambda.<layer>".

    Args:
        activation_eigenvectors, gradient_eigenvectors: by layer, one a column; in the plain basis where there are none.
        post_process: the task's, where it has one.
    """

    def __init__(
        self,
        layers: list[TrackedLayer],
        precision: Precision,
        device: torch.device,
        activation_eigenvectors: Tensors | None = None,
        gradient_eigenvectors: Tensors | None = None,
        post_process: PostProcess | None = None,
    ):
        self.precision, self.post_process = precision, post_process
        self.tensors: Tensors = {
            f"lambda.{layer.name}": torch.zeros(layer.shape, dtype=precision.sum_dtype, device=device)
            for layer in layers
        }
        self.bases = {
            layer.name: Eigenbasis(
                layer,
                activation_eigenvectors[layer.name].to(device),
                gradient_eigenvectors[layer.name].to(device),
                precision,
            )
            for layer in layers
            if layer.name in (activation_eigenvectors or {})
        }

    def update(self, layer: TrackedLayer, captured: Captured) -> None:
        """Add one batch of one layer. All positions that have a gradient enter: it is a sum over every one."""
        if f"lambda.{layer.name}" not in self.tensors:
            return
        total, basis = self.tensors[f"lambda.{layer.name}"], self.bases.get(layer.name)
        captured, gradients = captured.compact(), None
        if self.post_process is not None:
            # The task may combine rows as it likes, so it gets them all, and whole gradients.
            gradients = self.post_process(layer.name, layer.matrix_gradients(captured))

        def add(some: slice) -> None:
            if gradients is not None:
                made = gradients[some] if basis is None else basis.rotate(gradients[some])
            else:
                part = captured.part(some)
                made = layer.matrix_gradients(part) if basis is None else basis.rotated_gradients(part)
            self._add_squares(total, made.to(total.dtype))

        chunk = lambda_chunk(layer, self.precision.sum_dtype.itemsize, total.device.type)
        for some in slices(len(captured if gradients is None else gradients), chunk):
            in_halves(add, some)

    @staticmethod
    def _add_squares(total: Tensor, gradients: Tensor) -> None:
        gradients = gradients[..., : total.shape[1]]
        if total.numel() < SMALL:
            total += gradients.square().sum(0)
            return
        if gradients.is_cuda and len(gradients) > 1:  # reads them once: the sum of squares is a kernel of its own
            gradients = torch.linalg.vector_norm(gradients, dim=0, keepdim=True)
        for gradient in gradients:
            total.addcmul_(gradient, gradient)

    def means(self, layers: list[TrackedLayer], num_examples: int) -> dict[str, Tensors]:
        """{"lambda_matrix": {layer: [out, in(+1)]}}"""
        layers = [layer for layer in layers if f"lambda.{layer.name}" in self.tensors]
        return {"lambda_matrix": {layer.name: self.tensors[f"lambda.{layer.name}"] / num_examples for layer in layers}}
