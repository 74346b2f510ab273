"""Parameters sharded over processes, by torch's `fully_shard`: no process holds a whole model.

The parameters of a unit (sharded_units.py: a block, an embedding, the head) are gathered for its forward pass and again
for its backward pass, and freed after. All lies sharded whenever no unit is at work.

Outside of its unit's passes a parameter is a DTensor of the model's full shape; `whole` gathers it. That is done too
for a module that reads a unit's parameter without calling it (DeBERTa's table of relative positions), and a unit whose
`forward` is called in place of itself (SqueezeBERT's) is called. What a unit hands on is never its parameters' own
memory, which is freed.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.utils._pytree import tree_map

from influence_core.errors import UserError, first_line
from influence_core.sharded_units import around, own_class, sharded_units

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
        UserError: the model has no repeated blocks, or can't be taken apart into units.
    """
    has_own = any(True for _ in model.parameters(recurse=False))
    units, reads = sharded_units(model), Reads()
    names = {module: name for name, module in model.named_modules()}
    for unit in units:
        if model not in unit:
            for module in unit:
                module.register_forward_hook(_hand_on_own_memory)  # before the hook that frees
            fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, reshard_after_forward=True)
            for module in unit:
                if isinstance(module, FSDPModule):  # but where it lies inside another of the unit
                    _serve_all(module, names[module], reads)
    # What is left: mostly nothing, it is from where the passes begin. Else it is gathered until all is at rest again.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if not has_own:
        model.__class__ = own_class(model)  # it is shown by that name
    object.__setattr__(model, "_reads", reads)
    for module in around(model, units):
        module.register_forward_pre_hook(reads.begin)
        module.register_forward_hook(reads.end, always_call=True)
    for module in model.modules():  # to transformers: layers are not dropped, and texts end together
        module._is_fsdp_managed_module = True
    # What a tracked layer hands on is one, and a model that changes it in place is given a copy (passes.py).
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")


class Reads:
    """Of a model: while it runs, a parameter that is read outside of its unit's call is gathered, once until it ends.

    So is one of which only the dtype is asked.
    """

    def __init__(self):
        self.depth = 0  # calls that are under way, of modules in modules
        self.gathered: dict[tuple[int, bool], Tensor] = {}
        self.calls: list[str] | None = None  # what was called and gathered is noted here

    @staticmethod
    def of(model: nn.Module) -> "Reads":
        """Those of a sharded model."""
        return model.__dict__["_reads"]

    def begin(self, *_) -> None:
        """A call begins."""
        self.depth += 1

    def end(self, *_) -> None:
        """A call has ended."""
        self.depth -= 1
        if not self.depth:
            self.gathered.clear()

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """What an attribute of a module is for those who ask for it by that name."""
        if not self.depth or not isinstance(tensor, DTensor):
            return tensor
        key = id(tensor), torch.is_grad_enabled()
        if key not in self.gathered:
            self.gathered[key] = whole(tensor)
            if self.calls is not None:
                self.calls.append(name)
        return self.gathered[key]


def _hand_on_own_memory(module: nn.Module, arguments: tuple, output: Any) -> Any:
    """A forward hook: the output, with a copy of what is a view of a parameter (latents, learned queries)."""
    gathered = {x.untyped_storage().data_ptr() for x in module.parameters() if not isinstance(x, DTensor)}

    def own(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in gathered else x

    return tree_map(own, output)


def _serve_all(module: nn.Module, module_name: str, reads: Reads) -> None:
    """Let a unit's module be of use to those who go round its call."""
    kind = type(module)

    class Unit(kind):
        def __new__(cls, *arguments, **keywords):
            return kind(*arguments, **keywords)  # by torch, one that is no unit: a part of an nn.Sequential

        def __getattr__(self, name):
            return reads.read(f"{module_name}.{name}", super().__getattr__(name))

        @wraps(kind.forward)
        def forward(self, *arguments, **keywords):
            """In a call parameters are whole; where `forward` itself is called, it is made a call."""
            if is_sharded(islice(self.parameters(), 1)):
                return self(*arguments, **keywords)
            reads.begin()
            try:
                return super().forward(*arguments, **keywords)
            finally:
                reads.end()

    Unit.__name__, Unit.__qualname__ = kind.__name__, kind.__qualname__
    module.__class__ = Unit


def what_failed(error: Exception) -> str:
    """What an exception of a run of a model says, in one line; of operations that were given parts, the cause."""
    if "DTensor" not in str(error):
        return first_line(error)
    return "it reads parameters of a block outside of that block's call, which --use_fsdp can't serve: leave that out"


def come_to_rest(model: nn.Module) -> None:
    """Free what is gathered still, as where a pass was broken off in the midst of a unit's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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


def is_memory_of_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter or a view of one, whose memory is freed with it where that is sharded."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether this process has only a part of any of them."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)
