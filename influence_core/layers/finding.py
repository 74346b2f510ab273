"""Which layers of a model can be tracked, and those of given names."""

from collections.abc import Sequence

from torch import nn

from influence_core.errors import UserError
from influence_core.layers.kind import TrackedLayer
from influence_core.layers.matrix import MatrixLayer
from influence_core.layers.table import TableLayer
from influence_core.layers.vector import VectorLayer

SHOWN_NAMES = 12


def trackable_layer_names(model: nn.Module) -> list[str]:
    """Every linear layer that `find_tracked_layers` accepts, with parameters all its own."""
    modules, owners = dict(model.named_modules()), _owners(model)
    return [name for name, module in modules.items() if MatrixLayer.fits(module) and not _shared(module, owners)]


def other_layer_names(model: nn.Module) -> list[str]:
    """Of tables and vectors: the first module of each weight."""
    head, owners, seen, names = output_head(model), _owners(model), set(), []
    for name, module in model.named_modules():
        is_table = _has_weight(module) and (isinstance(module, nn.Embedding) or module is head)
        if not is_table and not (VectorLayer.fits(module) and not _shared(module, owners)):
            continue
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            names.append(name)
    return names


def find_tracked_layers(model: nn.Module, names: Sequence[str]) -> list[TrackedLayer]:
    """The named layers of the model, in the order of the names.

    A linear layer that is the model's head, or shares its weight with an embedding, is a table.

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
    owners, head = _owners(model), output_head(model)
    layers, seen = [], {}
    for name in names:
        layer = _tracked_layer(name, modules, owners, head)
        for parameter in layer.parameters:
            other = seen.setdefault(id(parameter), name)
            if other is not name or names.count(name) > 1:
                raise UserError(f"layers {other} and {name} are the same: track it once")
        layers.append(layer)
    return layers


def output_head(model: nn.Module) -> nn.Module | None:
    """What makes the logits of a language model, if there is one; its trained copy, where peft keeps one."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    copies = getattr(head, "modules_to_save", None)
    return head if copies is None else copies[head.active_adapters[0]]


def _tracked_layer(
    name: str, modules: dict[str, nn.Module], owners: dict[int, dict[int, nn.Module]], head: nn.Module | None
) -> TrackedLayer:
    module = modules[name]
    sharing = list(owners[id(module.weight)].values()) if _has_weight(module) else []
    looks_up = any(isinstance(each, nn.Embedding) for each in sharing)
    if sharing and (module is head or looks_up):
        return _table(name, sharing, modules)
    layer = (VectorLayer if VectorLayer.fits(module) else MatrixLayer).of(name, module)
    if _shared(module, owners):
        raise UserError(
            f"layer {name} shares its weight with another module (tied weights): its own gradient would be only "
            "a part of the parameter's; leave it out of the tracked layers"
        )
    return layer


def _table(name: str, sharing: Sequence[nn.Module], modules: dict[str, nn.Module]) -> TableLayer:
    names = {id(module): each for each, module in reversed(modules.items())}  # the first of a module's
    of_sites = {names[id(module)]: module for module in sharing}
    embeddings = {site: module for site, module in of_sites.items() if isinstance(module, nn.Embedding)}
    return TableLayer.of(name, embeddings, {site: of_sites[site] for site in of_sites if site not in embeddings})


def _owners(model: nn.Module) -> dict[int, dict[int, nn.Module]]:
    """{id of a parameter: {id: module} of those that have it}"""
    owners: dict[int, dict[int, nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), {})[id(module)] = module
    return owners


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def _shared(module: nn.Module, owners: dict[int, dict[int, nn.Module]]) -> bool:
    return any(len(owners[id(parameter)]) > 1 for parameter in module.parameters(recurse=False))
