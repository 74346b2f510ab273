"""Which layers are tracked, and how a layer's parameters are seen.

nn.Linear stores its weight as [out, in], GPT-2's Conv1D as [in, out]. Both compute output = W input + b, and here
both are one matrix [out, in(+1)]: the bias, where there is one, is the last column, as if each input carried a one
at its end. No tensor with that column of ones is ever made: it would turn 768 into 769, which matrix units do slowly.

Legend: n = examples, t = positions, i = in_features, o = out_features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from influence_core.errors import UserError


@dataclass(frozen=True)
class TrackedLayer:
    """A layer whose parameters the influence is taken over, seen as one [out, in(+1)] matrix."""

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in(+1))"""
        return self.out_features, self.in_features + self.has_bias

    @property
    def num_parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def flat_gradients(self, activations: Tensor, output_gradients: Tensor, out: Tensor | None = None) -> Tensor:
        """Per-sample gradients, flattened: the out*in weight entries, then the out bias entries.

        Args:
            activations: [n, t, in].
            output_gradients: [n, t, out], of a loss summed over examples.
            out: optional [n, out*in(+out)] buffer to write into.
        Returns:
            [n, out*in(+out)], in the dtype of the arguments. Cost: 2 n t o i FLOPs.
        """
        n, o, i = len(activations), self.out_features, self.in_features
        if out is None:
            out = activations.new_empty(n, self.num_parameters)
        torch.bmm(output_gradients.transpose(1, 2), activations, out=out[:, : o * i].view(n, o, i))
        if self.has_bias:
            torch.sum(output_gradients, dim=1, out=out[:, o * i :])
        return out

    def to_matrix(self, flat: Tensor) -> Tensor:
        """[n, out*in(+out)] -> [n, out, in(+1)]."""
        o, i = self.out_features, self.in_features
        weight = flat[:, : o * i].view(-1, o, i)
        return torch.cat([weight, flat[:, o * i :].unsqueeze(-1)], dim=-1) if self.has_bias else weight

    def store_flat(self, matrix: Tensor, rows: Tensor, into: Tensor) -> None:
        """into[rows] = to_flat(matrix), without a copy between; `into` [any number, out*in(+out)], of any dtype."""
        o, i = self.out_features, self.in_features
        into[:, : o * i].view(-1, o, i)[rows] = matrix[..., :i].to(into.dtype)
        if self.has_bias:
            into[rows, o * i :] = matrix[..., i].to(into.dtype)

    def to_flat(self, matrix: Tensor) -> Tensor:
        """[n, out, in(+1)] -> [n, out*in(+out)]."""
        weight = matrix[..., : self.in_features].flatten(1)
        return torch.cat([weight, matrix[..., -1]], dim=1) if self.has_bias else weight


def trackable_layer_names(model: nn.Module) -> list[str]:
    """Every layer of a kind that can be tracked."""
    return [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]


def find_tracked_layers(model: nn.Module, names: Sequence[str]) -> list[TrackedLayer]:
    """The named layers of the model, in the order of the names.

    Raises:
        UserError: no names; a name that the model does not have; a layer of another kind (a subclass of nn.Linear
            may compute something else); a parameter that another module uses as well (its gradient would be only
            a part).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not names or any(name not in modules for name in names):
        missing = ", ".join(name for name in names if name not in modules)
        have = trackable_layer_names(model)
        shown = ", ".join(have[:12]) + (f", … ({len(have)} in all)" if len(have) > 12 else "")
        raise UserError(
            f"no tracked layer found{f' for {missing}' if missing else ''}: the layers of this model that can be "
            f"tracked are: {shown or 'none (no nn.Linear or Conv1D)'}"
        )
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    layers, seen = [], {}
    for name in names:
        module = modules[name]
        if id(module) in seen:
            raise UserError(f"layers {seen[id(module)]} and {name} are the same module: track it once")
        seen[id(module)] = name
        layers.append(_tracked_layer(name, module))
        if any(len(owners[id(parameter)]) > 1 for parameter in module.parameters(recurse=False)):
            raise UserError(
                f"layer {name} shares its weight with another module (tied weights): its own gradient would be only "
                "a part of the parameter's; leave it out of the tracked layers"
            )
    return layers


def _tracked_layer(name: str, module: nn.Module) -> TrackedLayer:
    if type(module) is nn.Linear:
        return TrackedLayer(name, module, module.in_features, module.out_features, module.bias is not None)
    if type(module) is Conv1D:
        return TrackedLayer(name, module, *module.weight.shape, has_bias=True)
    raise UserError(f"layer {name} is a {type(module).__name__}; only nn.Linear and GPT-2's Conv1D can be tracked")
