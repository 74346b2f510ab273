"""Parameters sharded over processes, by torch's `fully_shard`: no process holds a whole model.

Each repeated block is a unit, whose parameters are gathered for its forward pass and again for its backward pass, and
freed after. So is every module outside the blocks that has parameters of its own: embeddings, head, the last norm;
those that share a parameter (a tied table) are one unit. All lies sharded whenever no unit is at work.

Outside of its unit's passes a parameter is a DTensor of the model's full shape; `whole` gathers it.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial

from influence_core.errors import UserError

_HELD: ContextVar[dict[int, Tensor] | None] = ContextVar("held_whole", default=None)


def process_mesh(device_type: str, num_shards: int | None = None) -> DeviceMesh:
    """All processes of the group, or rows of `num_shards` neighbours, each of which has a whole model together.

    Raises:
        UserError: the processes do not make whole rows.
    """
    num_processes = torch.distributed.get_world_size()
    num_shards = num_shards or num_processes
    if num_processes % num_shards:
        raise UserError(
            f"--fsdp_shards {num_shards}: {num_processes} processes can't be shared out to that many each; give a "
            "divisor of their number, such as the processes of a node"
        )
    if num_shards == num_processes:
        return init_device_mesh(device_type, (num_processes,))
    shape = num_processes // num_shards, num_shards
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each process of the mesh its part of every parameter; parameters on the meta device stay there.

    Raises:
        UserError: the model has no repeated blocks.
    """
    has_own = any(True for _ in model.parameters(recurse=False))
    for unit in sharded_units(model):
        if model not in unit:
            fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, reshard_after_forward=True)
    # What is left: mostly nothing, it is from where the passes begin. Else it is gathered until all is at rest again.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if not has_own:
        model.__class__ = own_class(model)  # it is shown by that name
    model._is_fsdp_managed_module = True  # to transformers: texts that processes generate end together
    # What a tracked layer hands on is one, and a model that changes it in place is given a copy (passes.py).
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")


def sharded_units(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each unit: blocks, and what has parameters of its own outside of them."""
    blocks = repeated_blocks(model)
    within = {id(parameter) for block in blocks for parameter in block.parameters()}
    others: dict[int, nn.Module] = {}
    for module in model.modules():
        if any(id(parameter) not in within for parameter in module.parameters(recurse=False)):
            others[id(module)] = module
    units: list[list[nn.Module]] = []
    owners: dict[int, list[nn.Module]] = {}  # {id of a parameter: the unit that has it}
    outside = [(module, False) for module in reversed(others.values())]  # what is inside another module comes first
    for module, recurse in [(block, True) for block in blocks] + outside:
        ids = [id(parameter) for parameter in module.parameters(recurse)]
        known = next((owners[each] for each in ids if each in owners), None)
        if known is None:
            units.append(known := [])
        known.append(module)
        owners |= dict.fromkeys(ids, known)
    return units


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ModuleLists, in their order.

    Raises:
        UserError: there are none.
    """
    blocks: list[nn.Module] = []
    seen: set[int] = set()
    for module in model.modules():
        if id(module) in seen:
            continue
        if isinstance(module, nn.ModuleList):
            seen |= {id(each) for each in module.modules()}
            blocks += [member for member in module if any(True for _ in member.parameters())]
    if not blocks:
        raise UserError(
            f"--use_fsdp: this {type(model).__name__} has no repeated blocks (an nn.ModuleList of them) to gather one "
            "by one: leave --use_fsdp out"
        )
    return list(dict.fromkeys(blocks))  # one that is repeated itself is one


def come_to_rest(model: nn.Module) -> None:
    """Free what is gathered still, as where a pass was broken off in the midst of a unit's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_class(module: nn.Module) -> type:
    """The module's class, without what torch puts before that of a unit."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered where it is sharded: then every process has to call this.

    A gradient that comes back is the processes' mean, as that of what a unit gathers.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    held = (_HELD.get() or {}).get(id(tensor))
    if held is not None:
        return held
    gathered = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / tensor.device_mesh.size())
    return gathered


@contextmanager
def held_whole(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, `whole` has these at hand, and no other process is asked."""
    held = {id(tensor): whole(tensor.detach()) for tensor in tensors if isinstance(tensor, DTensor)}
    token = _HELD.set({**(_HELD.get() or {}), **held})
    try:
        yield
    finally:
        _HELD.reset(token)


def local(tensor: Tensor) -> Tensor:
    """The numbers of a parameter that this process has: all, or its part of them, by the same memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def with_part(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which this process has a part, sharded as another; or the part itself, where that one is whole."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.to_local().device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


@contextmanager
def unsharded(model: nn.Module, here: bool) -> Iterator[None]:
    """Inside, the model has whole parameters in the CPU's memory, on those processes where `here`; all come by.

    It is to be looked at and saved, not to be run.
    """
    gathered: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in gathered:  # of tied ones once
                tensor = parameter.detach().full_tensor()
                gathered[id(parameter)] = nn.Parameter(tensor.cpu(), parameter.requires_grad) if here else parameter
            replaced.append((module, name, parameter))
    try:
        for module, name, parameter in replaced:
            module._parameters[name] = gathered[id(parameter)]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether this process has only a part of any of them."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def largest_unit_bytes(model: nn.Module) -> int:
    """Of the unit with the most parameters, gathered."""
    sizes = [sum({id(x): x.numel() * x.itemsize for m in unit for x in m.parameters()}.values())
             for unit in sharded_units(model)]  # fmt: skip
    return max(sizes)


def describe_units(model: nn.Module) -> str:
    """The blocks that are gathered one by one, as a person reads it."""
    counts: dict[str, int] = {}
    blocks = repeated_blocks(model)
    for block in blocks:
        name = own_class(block).__name__
        counts[name] = counts.get(name, 0) + 1
    others = sum(not set(unit) & set(blocks) for unit in sharded_units(model))
    return ", ".join(f"{count} {name}" for name, count in counts.items()) + f" and {others} others"
