"""The scale and shift of a norm (LayerNorm, RMSNorm and their like): output = weight * s(input) + bias, elementwise.

What multiplies the weight is asked of the module itself, so a weight that is kept less one (Gemma's) is no other kind.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_core.captured import Calls, Positions, lay_out
from influence_core.errors import UserError
from influence_core.layers.kind import SiteProducts, TrackedLayer, forward_with
from influence_core.sharded_units import own_class


@dataclass(frozen=True)
class VectorLayer(TrackedLayer):
    """A module whose own parameters are "weight" [d] and, where there is one, "bias" [d]: a matrix of one column."""

    module: nn.Module

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether its parameters are such; what it computes of them is proven when it runs."""
        own = module._parameters
        weight, bias = own.get("weight"), own.get("bias")
        is_vector = isinstance(weight, nn.Parameter) and weight.dim() == 1 and not list(module.children())
        names = {name for name, parameter in own.items() if parameter is not None}
        return is_vector and names <= {"weight", "bias"} and (bias is None or bias.shape == weight.shape)

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "VectorLayer":
        return cls(name, 1, len(module.weight), module._parameters.get("bias") is not None, module)

    @property
    def label(self):
        return f"{self.name} (vector)"

    @property
    def sites(self):
        return {self.name: self.module}

    @property
    def parameters(self):
        return [self.module.weight, *([self.module.bias] if self.has_bias else [])]

    def capture(self, calls, layout):
        """What multiplies the weight, in place of the input."""
        of_module = calls[self.name]
        with layout.as_in_pass():
            multiplied = [self._multiplied(x) for x in of_module.inputs]
        if any(x.shape[-1] != self.out_features for x in multiplied):
            kind = own_class(self.module).__name__
            raise UserError(f"layer {self.name} is a {kind}, whose weight is not of its last axis: it can't be tracked")
        return lay_out(self.name, Calls(multiplied, of_module.output_gradients).to(layout.operand), None, layout)

    @torch.no_grad()
    def _multiplied(self, x: Tensor) -> Tensor:
        """s(x): the output for a weight of ones less that for none."""
        zeros = torch.zeros(self.out_features, dtype=self.module.weight.dtype, device=x.device)
        bias = {"bias": zeros} if self.has_bias else {}
        without = forward_with(self.module, {"weight": zeros, **bias}, x)
        return forward_with(self.module, {"weight": zeros + 1, **bias}, x) - without

    def gradient_parts(self, captured: Positions, out=None):
        out = self.empty_parts(captured.activations, len(captured)) if out is None else out
        gradients, multiplied = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in captured.tensors[::-1])
        out[0].copy_((gradients * multiplied).sum(1))  # rounded once, where products have fewer digits
        if self.has_bias:
            out[1].copy_(gradients.sum(1))
        return out

    def parameter_gradient(self, parameter, captured: Positions):
        return self.gradient_parts(captured)[0 if parameter is self.module.weight else 1].sum(0)

    def products_by_position(self, captured: Positions, directions):
        gradients, multiplied = (x[0].to(directions.dtype) for x in captured.tensors[::-1])
        products = directions[..., 0] @ (gradients * multiplied).t()
        if self.has_bias:
            products = products + directions[..., 1] @ gradients.t()
        return [SiteProducts(self.name, products, captured.spans)]

    def gradient_flops(self, positions):
        return 3 * positions[self.name] * self.out_features
