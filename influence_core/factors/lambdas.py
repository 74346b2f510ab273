"""Stage 3: the mean squared per-sample gradient, in the Kronecker eigenbasis (EKFAC) or in the plain one (diagonal).

    Lambda = E_z[(Q_G^T g(z) Q_A)^2]   elementwise, over examples   [out, in(+1)]

Rotating the gradient costs 2 o i (o + i) FLOPs an example, rotating its positions before the contraction
2 t (o^2 + i^2); each layer takes the cheaper.

Source: George et al. 2018, arXiv:1806.03884, eq. 13.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from influence_core.layers import TrackedLayer
from influence_core.passes import Captured
from influence_core.precision import Precision
from influence_core.storage import Tensors

# Bytes of per-sample gradients held at once. On a CPU so few that they stay in its cache, and that the allocator gives
# the same pages again (beyond 32 MiB it takes fresh ones each time, which costs as much as the product).
BUFFER_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}

PostProcess = Callable[[str, Tensor], Tensor]


def rotation_is_cheaper_on_positions(num_positions: int, out: int, inputs: int) -> bool:
    """Whether rotating the positions takes fewer products than rotating the gradient."""
    return num_positions * (out**2 + inputs**2) < out * inputs * (out + inputs)


def lambda_chunk(layer: TrackedLayer, itemsize: int, device_type: str) -> int:
    """Per-sample gradients of a layer that are held at once."""
    return max(1, BUFFER_BYTES[device_type] // (layer.num_parameters * itemsize))


class LambdaSums:
    """Accumulates squared per-sample gradients; `means` gives Lambda.

    `tensors` is all of its state: "lambda.<layer>".

    Args:
        activation_eigenvectors, gradient_eigenvectors: by layer, one a column; None for the plain basis.
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
        self.eigenvectors = None
        if activation_eigenvectors is not None:
            self.eigenvectors = {
                layer.name: (
                    _pad_columns(precision.operand(activation_eigenvectors[layer.name].to(device))),
                    precision.operand(gradient_eigenvectors[layer.name].to(device)),
                )
                for layer in layers
            }

    def update(self, layer: TrackedLayer, captured: Captured) -> None:
        """Add one batch of one layer. All positions enter: a per-sample gradient is a sum over every one."""
        rows, positions = captured.activations.shape[:2]
        total = self.tensors[f"lambda.{layer.name}"]
        if self.post_process is not None:
            # The task may combine rows as it likes, so it gets them all, and whole gradients.
            gradients = layer.to_matrix(layer.flat_gradients(captured.activations, captured.output_gradients))
            self._add_squares(total, self._rotated_gradients(layer, self.post_process(layer.name, gradients)))
            return
        chunk = lambda_chunk(layer, self.precision.sum_dtype.itemsize, total.device.type)
        for start in range(0, rows, chunk):
            activations = captured.activations[start : start + chunk]
            output_gradients = captured.output_gradients[start : start + chunk]
            if self.eigenvectors is not None and rotation_is_cheaper_on_positions(positions, *layer.shape):
                gradients = self._gradients_of_rotated_positions(layer, activations, output_gradients)
            else:
                gradients = layer.to_matrix(layer.flat_gradients(activations, output_gradients))
                gradients = self._rotated_gradients(layer, gradients)
            self._add_squares(total, gradients)

    def _gradients_of_rotated_positions(
        self, layer: TrackedLayer, activations: Tensor, output_gradients: Tensor
    ) -> Tensor:
        """[n, out, in(+1 and padding)], the positions rotated first."""
        activation_eigenvectors, gradient_eigenvectors = self.eigenvectors[layer.name]
        operand, i = self.precision.operand, layer.in_features
        rotated_activations = activations @ activation_eigenvectors[:i]
        if layer.has_bias:  # the bias's one meets the last row of the eigenvectors
            rotated_activations += activation_eigenvectors[i]
        rotated_gradients = output_gradients @ gradient_eigenvectors
        return self.precision.matmul(operand(rotated_gradients).transpose(1, 2), operand(rotated_activations))

    def _rotated_gradients(self, layer: TrackedLayer, gradients: Tensor) -> Tensor:
        """Q_G^T g Q_A of [n, out, in(+1)]."""
        if self.eigenvectors is None:
            return gradients.to(self.precision.sum_dtype)
        activation_eigenvectors, gradient_eigenvectors = self.eigenvectors[layer.name]
        half_rotated = self.precision.operand(gradients) @ activation_eigenvectors
        left = gradient_eigenvectors.t().expand(len(gradients), -1, -1)
        return self.precision.matmul(left, self.precision.operand(half_rotated))

    @staticmethod
    def _add_squares(total: Tensor, gradients: Tensor) -> None:
        total += gradients.square_().sum(0)[:, : total.shape[1]]

    def means(self, layers: list[TrackedLayer], num_examples: int) -> dict[str, Tensors]:
        """{"lambda_matrix": {layer: [out, in(+1)]}}"""
        return {"lambda_matrix": {layer.name: self.tensors[f"lambda.{layer.name}"] / num_examples for layer in layers}}


def _pad_columns(matrix: Tensor, multiple: int = 8) -> Tensor:
    """Zero columns up to a multiple that the matrix units of a GPU take at full speed (769 -> 776)."""
    if matrix.device.type == "cpu":
        return matrix
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % multiple))
