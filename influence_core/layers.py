"""Which layers are tracked, and how a layer's parameters are seen.

nn.Linear stores its weight as [out, in], GPT-2's Conv1D as [in, out]. Both compute output = W input + b, and here
both are one matrix [out, in(+1)]: the bias, where there is one, is the last column, as if each input carried a one
at its end. No tensor with that column of ones is ever made: it would turn 768 into 769, which matrix units do slowly.

Flattened for products with other gradients, one is held by its parts: the weight's out*in numbers, row by row, and the
bias's out numbers. Side by side in one row they would keep the batched product that makes them from writing in one go.

Legend: n = examples, t = positions, i = in_features, o = out_features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from influence_core.errors import UserError

Parts = tuple[Tensor, ...]  # gradients flattened, [examples, numbers]: of the weight; of the bias, where there is one


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

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Numbers in a gradient's parts: those of the weight, then those of the bias, where there is one."""
        weight = self.out_features * self.in_features
        return (weight, self.out_features) if self.has_bias else (weight,)

    def empty_parts(self, like: Tensor, *shape: int) -> Parts:
        """Memory for the parts of so many gradients, [*shape, numbers of a part] each."""
        return tuple(like.new_empty(*shape, size) for size in self.part_sizes)

    def gradient_parts(self, activations: Tensor, output_gradients: Tensor, out: Parts | None = None) -> Parts:
        """Per-sample gradients, by parts.

        Args:
            activations: [n, t, in].
            output_gradients: [n, t, out], of a loss summed over examples.
            out: optional memory to write into, of n gradients.
        Returns:
            ([n, out*in], [n, out] where there is a bias), in the dtype of the arguments. Cost: 2 n t o i FLOPs.
        """
        n, o, i = len(activations), self.out_features, self.in_features
        out = self.empty_parts(activations, n) if out is None else out
        torch.bmm(output_gradients.transpose(1, 2), activations, out=out[0].view(n, o, i))
        if self.has_bias:
            torch.sum(output_gradients, dim=1, out=out[1])
        return out

    def matrix_gradients(self, activations: Tensor, output_gradients: Tensor) -> Tensor:
        """Per-sample gradients as matrices, [n, out, in(+1)]; arguments as of `gradient_parts`."""
        return self.to_matrix(self.gradient_parts(activations, output_gradients))

    def parameter_gradient(self, parameter: nn.Parameter, activations: Tensor, output_gradients: Tensor) -> Tensor:
        """What the calls of all examples together add to the gradient of the weight or the bias, in its own layout."""
        output_gradients = output_gradients.flatten(0, 1)
        if parameter is not self.module.weight:
            return output_gradients.sum(0)
        gradient = output_gradients.t() @ activations.flatten(0, 1)
        return gradient.t() if type(self.module) is Conv1D else gradient

    def to_matrix(self, parts: Parts) -> Tensor:
        """Parts of n gradients -> [n, out, in(+1)]."""
        weight = parts[0].view(-1, self.out_features, self.in_features)
        return torch.cat([weight, parts[1].unsqueeze(-1)], dim=-1) if self.has_bias else weight

    def to_parts(self, matrix: Tensor) -> Parts:
        """[n, out, in(+1)] -> parts."""
        weight = matrix[..., : self.in_features].flatten(1)
        return (weight, matrix[..., -1]) if self.has_bias else (weight,)

    def store(self, matrix: Tensor, rows: Tensor, into: Parts) -> None:
        """into[rows] = to_parts(matrix), without a copy between; `into`: of any number of gradients and any dtype."""
        o, i = self.out_features, self.in_features
        into[0].view(-1, o, i)[rows] = matrix[..., :i].to(into[0].dtype)
        if self.has_bias:
            into[1][rows] = matrix[..., i].to(into[1].dtype)


def trackable_layer_names(model: nn.Module) -> list[str]:
    """Every layer that `find_tracked_layers` accepts: of a kind that can be tracked, with parameters all its own."""
    modules, owners = dict(model.named_modules()), _owners(model)
    return [name for name, module in modules.items() if _is_trackable(module) and not _shares(module, owners)]


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
    owners = _owners(model)
    layers, seen = [], {}
    for name in names:
        module = modules[name]
        if id(module) in seen:
            raise UserError(f"layers {seen[id(module)]} and {name} are the same module: track it once")
        seen[id(module)] = name
        layers.append(_tracked_layer(name, module))
        if _shares(module, owners):
            raise UserError(
                f"layer {name} shares its weight with another module (tied weights): its own gradient would be only "
                "a part of the parameter's; leave it out of the tracked layers"
            )
    return layers


def _owners(model: nn.Module) -> dict[int, set[int]]:
    """{id of a parameter: ids of the modules that have it}"""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return owners


def _shares(module: nn.Module, owners: dict[int, set[int]]) -> bool:
    return any(len(owners[id(parameter)]) > 1 for parameter in module.parameters(recurse=False))


def _is_trackable(module: nn.Module) -> bool:
    """Of a kind that can be tracked; not where the weight is made of other parameters at each call (weight_norm)."""
    return type(module) in (nn.Linear, Conv1D) and isinstance(module._parameters.get("weight"), nn.Parameter)


def _tracked_layer(name: str, module: nn.Module) -> TrackedLayer:
    if type(module) in (nn.Linear, Conv1D) and not _is_trackable(module):
        raise UserError(f"layer {name} makes its weight of other parameters (as weight_norm does): it can't be tracked")
    if type(module) is nn.Linear:
        return TrackedLayer(name, module, module.in_features, module.out_features, module.bias is not None)
    if type(module) is Conv1D:
        return TrackedLayer(name, module, *module.weight.shape, has_bias=True)
    raise UserError(f"layer {name} is a {type(module).__name__}; only nn.Linear and GPT-2's Conv1D can be tracked")
