"""Whether a layer's inputs and output gradients make all of its parameters' gradient: proven on one example.

They do where the layer computes its matrix, and nothing else reads the parameters. A weight that is also used without
the layer being called (tied by computation, merged with an adapter's), a forward pass replaced on the instance, a hook
that changes what comes out: all give scores of something else, without a word.

Cost: a forward and backward pass with the gradients of parameters; each is let go of as soon as it is compared. Of
sharded parameters, whose gradient may arrive in parts, each process holds its shares until the pass is over; all
processes run the same example.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from influence_core.captured import Captured
from influence_core.errors import UserError
from influence_core.layers import TrackedLayer
from influence_core.precision import Precision
from influence_core.sharding import come_to_rest, is_sharded, whole
from influence_core.task import Batch


def refuse_other_uses(*arguments) -> None:
    """Raise UserError for the first layer that `other_uses` finds, of the same arguments."""
    for name, share in other_uses(*arguments).items():
        raise UserError(
            f"the gradient of layer {name}'s parameters is not what its calls make (by {share:.1g} of it): they are "
            "used elsewhere too (tied by computation, merged with an adapter's), or the layer computes something else "
            "than its kind does; leave it out of the tracked layers"
        )


def other_uses(
    model: nn.Module,
    layers: Sequence[TrackedLayer],
    loss_function,
    batch: Batch,
    captured: Mapping[str, Captured],
    precision: Precision,
    tolerances: tuple[float, float],
) -> dict[str, float]:
    """{layer: share of the gradient} of those whose parameters get another than their own calls make, by so much.

    Args:
        captured: what the engine saw of the batch.
        tolerances: rounding, as shares of a gradient and of the largest one.
    """
    compared: dict[str, tuple[float, float, float]] = {}  # {layer: (difference, its norm, rounding of the product)}
    epsilon = torch.finfo(precision.operand_dtype).eps

    def compare(layer: TrackedLayer, parameter: nn.Parameter, size: float) -> None:
        seen = captured[layer.name]
        ours = layer.parameter_gradient(parameter, seen)
        theirs = torch.zeros_like(ours) if parameter.grad is None else whole(parameter.grad).to(ours.dtype)
        new = (float((ours - theirs).norm()), float(max(ours.norm(), theirs.norm())), 10 * epsilon * size)
        compared[layer.name] = tuple(map(max, compared.get(layer.name, new), new))

    state = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    pending, handles = {}, []
    model.requires_grad_(False).eval()
    for layer in layers:
        for parameter in layer.parameters:
            parameter.grad = None
            pending[parameter] = (layer, captured[layer.name].size())

    def arrived(parameter: nn.Parameter) -> None:
        layer, size = pending.pop(parameter)
        compare(layer, parameter, size)
        parameter.grad = None

    try:
        for parameter in list(pending):
            parameter.requires_grad_(True)
            if not is_sharded([parameter]):
                handles.append(parameter.register_post_accumulate_grad_hook(arrived))
        with torch.enable_grad(), precision.autocast(next(model.parameters()).device):
            loss_function(model, batch).backward()
        for parameter in list(pending):  # those that no gradient reached, or all of it by now
            arrived(parameter)
    finally:
        come_to_rest(model)
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, grad in state:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, training in modes:
            module.training = training
    largest = max(norm for _, norm, _ in compared.values())
    relative, of_largest = tolerances
    return {
        name: difference / norm
        for name, (difference, norm, rounding) in compared.items()
        if difference > relative * norm + of_largest * largest + rounding
    }
