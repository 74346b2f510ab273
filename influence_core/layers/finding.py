"""Which layers of a model can be tracked, and those of given names."""

from collections.abc import Sequence

from torch import nn

from influence_core.errors import UserError
from influence_core.layers.kind import TrackedLayer
from influence_core.layers.matrix import MatrixLayer

SHOWN_NAMES = 12


def trackable_layer_names(model: nn.Module) -> list[str]:
    """Every linear layer that `find_tracked_layers` accepts, with parameters all its own."""
    modules, owners = dict(model.named_modules()), _owners(model)
    return [name for name, module in modules.items() if MatrixLayer.fits(module) and not _shares(module, owners)]


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
        shown = ", ".join(have[:SHOWN_NAMES]) + (f", … ({len(have)} in all)" if len(have) > SHOWN_NAMES else "")
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
        layers.append(MatrixLayer.of(name, module))
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
