"""What of a model is gathered at once, where its parameters are sharded.

Each repeated block is a unit, and so is every module outside the blocks that has parameters of its own: embeddings,
head, the last norm. Those that share a parameter (a tied table) are one unit.
"""

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from torch import nn
from torch.distributed.fsdp import FSDPModule

from influence_core.errors import UserError

Unit = list[nn.Module]


def sharded_units(model: nn.Module) -> list[Unit]:
    """The modules of each unit; units that lie inside a module of another come before it.

    Raises:
        UserError: the model has no repeated blocks; or parameters are shared so that there is no such order.
    """
    blocks = repeated_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    others = [
        module for module in model.modules()
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False))
    ]  # fmt: skip
    units: list[Unit] = []
    owners: dict[int, Unit] = {}  # {id of a parameter: the unit that has it}
    for module, recurse in [(block, True) for block in blocks] + [(module, False) for module in others]:
        ids = {id(parameter) for parameter in module.parameters(recurse)}
        unit: Unit = []
        for known in [known for known in units if any(owners.get(each) is known for each in ids)]:
            units.remove(known)
            unit += known
            ids |= {each for each, owner in owners.items() if owner is known}
        unit.append(module)
        units.append(unit)
        owners |= dict.fromkeys(ids, unit)
    return _inner_first(model, units)


def _inner_first(model: nn.Module, units: list[Unit]) -> list[Unit]:
    numbers = {id(module): number for number, unit in enumerate(units) for module in unit}
    inside = {
        number: {numbers[id(inner)] for module in unit for inner in module.modules() if id(inner) in numbers} - {number}
        for number, unit in enumerate(units)
    }
    try:
        return [units[number] for number in TopologicalSorter(inside).static_order()]
    except CycleError:
        raise UserError(
            f"--use_fsdp: blocks of this {type(model).__name__} share parameters with what lies inside of others, and "
            "can't be gathered one by one: leave --use_fsdp out"
        ) from None


def around(model: nn.Module, units: list[Unit]) -> list[nn.Module]:
    """The modules that have units inside them."""
    ids = {id(module) for unit in units for module in unit}
    return [
        module for module in model.modules()
        if module is model or any(id(inner) in ids for inner in module.modules() if inner is not module)
    ]  # fmt: skip


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ModuleLists, in their order; of lists in lists, and the like, those inside.

    Raises:
        UserError: there are none.
    """
    blocks: list[nn.Module] = []
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in seen:
            seen |= {id(each) for each in module.modules()}
            blocks += [block for block in _called(module) if any(True for _ in block.parameters())]
    if not blocks:
        raise UserError(
            f"--use_fsdp: this {type(model).__name__} has no repeated blocks (an nn.ModuleList of them) to gather one "
            "by one: leave --use_fsdp out"
        )
    return list(dict.fromkeys(blocks))  # one that is repeated itself is one


def _called(container: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside that compute something."""
    for member in container.children():
        if type(member).forward is nn.Module.forward:
            yield from _called(member)
        else:
            yield member


def own_class(module: nn.Module) -> type:
    """The module's class, without what torch puts before that of a unit."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def largest_unit_bytes(model: nn.Module) -> int:
    """Of the unit with the most parameters, gathered."""
    blocks = {*repeated_blocks(model)}

    def size(unit: Unit) -> int:
        of_unit = {id(x): x for module in unit for x in module.parameters(recurse=module in blocks)}
        return sum(x.numel() * x.itemsize for x in of_unit.values())

    return max(map(size, sharded_units(model)))


def describe_units(model: nn.Module) -> str:
    """The blocks that are gathered one by one, as a person reads it."""
    counts: dict[str, int] = {}
    blocks = repeated_blocks(model)
    for block in blocks:
        name = own_class(block).__name__
        counts[name] = counts.get(name, 0) + 1
    others = sum(not set(unit) & set(blocks) for unit in sharded_units(model))
    return ", ".join(f"{count} {name}" for name, count in counts.items()) + f" and {others} others"
