"""The matrix of a linear layer: nn.Linear stores its weight as [out, in], GPT-2's Conv1D as [in, out].

Both compute output = W input + b, and their gradient is a sum over positions of output gradient times input; its Fisher
factors into their covariances (Martens and Grosse 2015, arXiv:1503.05671).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from influence_core.captured import Positions, lay_out
from influence_core.errors import UserError
from influence_core.layers.kind import SiteProducts, TrackedLayer
from influence_core.sharded_units import own_class


@dataclass(frozen=True)
class MatrixLayer(TrackedLayer):
    """An nn.Linear or Conv1D."""

    module: nn.Module

    is_kronecker: ClassVar[bool] = True
    is_product: ClassVar[bool] = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Of this kind; not where the weight is made of other parameters at each call (weight_norm)."""
        return own_class(module) in (nn.Linear, Conv1D) and isinstance(module._parameters.get("weight"), nn.Parameter)

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "MatrixLayer":
        """The layer of that name; UserError where it is of another kind."""
        if own_class(module) in (nn.Linear, Conv1D) and not cls.fits(module):
            raise UserError(
                f"layer {name} makes its weight of other parameters (as weight_norm does): it can't be tracked"
            )
        if own_class(module) is nn.Linear:
            return cls(name, module.in_features, module.out_features, module.bias is not None, module)
        if own_class(module) is Conv1D:
            return cls(name, *module.weight.shape, has_bias=True, module=module)
        raise UserError(
            f"layer {name} is a {own_class(module).__name__}; only nn.Linear, GPT-2's Conv1D, embeddings and "
            "norms can be tracked"
        )

    @property
    def sites(self):
        return {self.name: self.module}

    @property
    def parameters(self):
        return list(self.module.parameters(recurse=False))

    def capture(self, calls, layout):
        return lay_out(self.name, calls[self.name].to(layout.operand), layout.mask(self.name), layout)

    def gradient_parts(self, captured, out=None):
        """Cost: 2 n t o i FLOPs."""
        n, o, i = len(captured), self.out_features, self.in_features
        out = self.empty_parts(captured.activations, n) if out is None else out
        torch.bmm(captured.output_gradients.transpose(1, 2), captured.activations, out=out[0].view(n, o, i))
        if self.has_bias:
            torch.sum(captured.output_gradients, dim=1, out=out[1])
        return out

    def parameter_gradient(self, parameter, captured: Positions):
        output_gradients = captured.output_gradients.flatten(0, 1)
        if parameter is not self.module.weight:
            return output_gradients.sum(0)
        gradient = output_gradients.t() @ captured.activations.flatten(0, 1)
        return gradient.t() if own_class(self.module) is Conv1D else gradient

    def products_by_position(self, captured: Positions, directions):
        return [products_with_matrices(self.name, captured, directions)]

    def gradient_flops(self, positions):
        return 2 * positions[self.name] * self.num_parameters


def products_with_matrices(site: str, captured: Positions, directions: Tensor) -> SiteProducts:
    """g^T D (a, 1) of each position of an example, of directions D [directions, out, in(+1)].

    Cost: 2 t o i FLOPs a direction.
    """
    gradients, activations = (x[0].to(directions.dtype) for x in (captured.output_gradients, captured.activations))
    projected = gradients @ directions  # [directions, positions, in(+1)]
    i = activations.shape[-1]
    products = (projected[..., :i] * activations).sum(-1)
    return SiteProducts(site, products + projected[..., i:].sum(-1), captured.spans)
