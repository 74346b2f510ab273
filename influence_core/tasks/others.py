"""Which embeddings and norms of a model can be tracked: proven on a small batch, no architecture is known by name."""

from collections.abc import Sequence

import torch
from torch import nn

from influence_core.errors import UserError
from influence_core.layers import TrackedLayer, find_tracked_layers
from influence_core.layers.finding import other_layer_names
from influence_core.memory import is_out_of_memory
from influence_core.parameters import other_uses
from influence_core.passes import GradientPass, LossFunction
from influence_core.precision import Precision
from influence_core.task import Batch

TOLERANCES = (1e-3, 1e-5)  # of a gradient, and of the largest
NARROW_TOLERANCES = (0.15, 2e-2)  # of weights of 16 bits


def prove_others(model: nn.Module, loss: LossFunction, batch: Batch, rows_per_example: int) -> dict[str, str | None]:
    """{layer: None where it can be tracked, else why it can't}, of all tables and vectors that training moves.

    Args:
        batch: of several examples.
    """
    reasons: dict[str, str | None] = {}
    layers: list[TrackedLayer] = []
    is_trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for name in other_layer_names(model):
        try:
            (layer,) = find_tracked_layers(model, [name])
        except UserError as error:
            reasons[name] = str(error)
            continue
        if not is_trained or all(id(parameter) in is_trained for parameter in layer.parameters):
            layers.append(layer)
    reasons |= _unlike(model, layers, loss, batch, rows_per_example)
    return reasons


def _unlike(
    model: nn.Module, layers: Sequence[TrackedLayer], loss: LossFunction, batch: Batch, rows_per_example: int
) -> dict[str, str | None]:
    """All at once, or singly where one of them stops the others."""
    if not layers:
        return {}
    dtype = next(model.parameters()).dtype
    precision = Precision(dtype, torch.promote_types(dtype, torch.float32))
    tolerances = TOLERANCES if dtype.itemsize >= 4 else NARROW_TOLERANCES
    try:
        with GradientPass(
            model, list(layers), loss, precision=precision, rows_per_example=rows_per_example, find_active=False
        ) as run:
            _, captured = run(batch)
        found = other_uses(model, layers, loss, batch, captured, precision, tolerances)
    except Exception as error:  # whatever a model makes of what it is given
        if is_out_of_memory(error):
            raise
        if len(layers) == 1:
            return {layers[0].name: _shortened(str(error))}
        parts = (_unlike(model, [layer], loss, batch, rows_per_example) for layer in layers)
        return {name: reason for part in parts for name, reason in part.items()}
    return {layer.name: "its gradient is not what its calls make" if layer.name in found else None for layer in layers}


def _shortened(reason: str) -> str:
    return "applied once for all examples" if "first axis must count rows" in reason else reason.splitlines()[0]
