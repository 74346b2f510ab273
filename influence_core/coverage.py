"""Which share of a model is tracked, and what is left out, as a person reads it."""

from collections.abc import Sequence

from torch import nn

from influence_core.layers import TrackedLayer, trackable_layer_names
from influence_core.layers.finding import output_head
from influence_core.sharded_units import own_class


def describe_coverage(model: nn.Module, layers: Sequence[TrackedLayer]) -> str:
    """Layers and parameters that are tracked, their share of the model's and of the trained ones, and all the rest."""
    rest = left_out(model, layers)
    tracked = sum(layer.num_parameters for layer in layers)
    whole = tracked + sum(rest.values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_trained = " (all trained)" if trained == whole else ""
    if 0 < trained < whole:
        of_trained = f" and {tracked / trained:.1%} of the trained {trained:,}"
    shares = ", ".join(f"{kind} {count / whole:.1%}" for kind, count in rest.items()) or "none"
    return (
        f"{len(layers)} layers, {tracked:,} parameters, {tracked / whole:.1%} of the model's {whole:,}{of_trained}; "
        f"left out: {shares}"
    )


def trained_layer_names(model: nn.Module) -> list[str]:
    """The layers that can be tracked and that training moved: all where nothing is frozen, else those that are not."""
    names = trackable_layer_names(model)
    if not _is_partly_frozen(model):
        return names
    return [name for name in names if all(x.requires_grad for x in model.get_submodule(name).parameters(recurse=False))]


def could_be_tracked(model: nn.Module) -> list[str]:
    """Of these, those that are no part of the output head, whose covariances would be as large as the vocabulary."""
    head = output_head(model)
    of_head = set() if head is None else set(head.modules())
    return [name for name in trained_layer_names(model) if model.get_submodule(name) not in of_head]


def left_out(model: nn.Module, layers: Sequence[TrackedLayer]) -> dict[str, int]:
    """{kind of layer: parameters} of all that is not tracked, the most first."""
    head = output_head(model)
    of_head = set(map(id, head.parameters())) if head is not None else set()
    seen = {id(parameter) for layer in layers for parameter in layer.parameters}
    trackable, counts = set(trackable_layer_names(model)), dict[str, int]()
    is_partly_frozen = _is_partly_frozen(model)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "other linear layers" if name in trackable else _kind(module)
            if is_partly_frozen and not parameter.requires_grad:
                kind = "frozen"
            elif id(parameter) in of_head:
                kind = "head" if module is head else f"{kind} tied to the head"
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _is_partly_frozen(model: nn.Module) -> bool:
    return len({parameter.requires_grad for parameter in model.parameters()}) > 1


def _kind(module: nn.Module) -> str:
    """What a person calls the parameters of such a module."""
    name = own_class(module).__name__
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in name.lower():
        return "norms"
    if "expert" in name.lower():
        return "fused experts"
    return f"shared {name}" if own_class(module) is nn.Linear else name
