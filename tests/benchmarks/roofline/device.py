"""A device on which nothing is computed: tensors have shapes alone, and each operation moves a clock.

It handles every operation of the pretended device (tests/pretended), whose tensors hold meta tensors here (tensors.py).
"""

import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from tests.benchmarks.roofline import cards
from tests.benchmarks.roofline.cards import Card
from tests.benchmarks.roofline.clock import Clock
from tests.benchmarks.roofline.costs import Cost, cost_of, eigh_latency, eigh_seconds, num_bytes
from tests.benchmarks.roofline.tensors import DeviceTensor, HostTensor, answer, meta, pass_on_constants
from tests.pretended.cuda import is_pinned

ROOT = f"{Path(__file__).parents[3]}/"
OF_THE_PROJECT = (f"{ROOT}influence_core/", f"{ROOT}wikitext_gpt2/")
VIEWS = {
    "view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias",
    "as_strided", "_unsafe_view", "split", "split_with_sizes", "unbind", "diagonal", "unfold", "empty", "empty_strided",
    "new_empty", "empty_like", "_reshape_alias", "lift_fresh", "view_as", "new_empty_strided", "is_pinned",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
WAITS = {"nonzero", "masked_select", "_linalg_eigh", "_unique2"}  # the host reads a size or a flag of the result


class ModelledDevice:
    """The handler of every operation: it makes the shapes of the result, and moves the clock."""

    def __init__(self, card: Card, clock: Clock):
        self.card, self.clock = card, clock
        self.known: dict[tuple, tuple[Cost, list[_Result], bool]] = {}  # by operation and shapes, see `_meet`

    def __call__(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        call = _Call(args, kwargs)
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        if target != "cuda" and not call.is_modelled:
            self.clock.spend(cards.NO_LAUNCH, (place(), "on the CPU", ""))
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            if call.on_device:
                self._read()
            return answer(args[0])
        if name == "equal":  # no two are
            self._read() if call.on_device else self.clock.spend(cards.NO_LAUNCH, (place(), "equal on the CPU", ""))
            return False
        kind = {"cuda": DeviceTensor, "cpu": HostTensor}[target or ("cuda" if call.on_device else "cpu")]
        crossing = _crossing(name, call.tensors, target)
        if name in VIEWS:
            self.clock.spend(cards.NO_LAUNCH, (place(), "views", ""))
            result = _wrapped(_shapes(name, func, *call.metas(), target), call.tensors, kind)
        else:
            key = (func, torch.backends.cuda.matmul.allow_tf32, *call.key)
            if key not in self.known:
                self.known[key] = self._meet(name, func, call, target)
            cost, results, is_several = self.known[key]
            made = [result.like(call.tensors, kind) for result in results]
            result = tuple(made) if is_several else made[0]
            if crossing:
                self._copy(crossing, call, cost.what)
            elif kind is HostTensor:
                seconds = cost.host / (torch.get_num_threads() ** cards.CPU_EIGH_GAIN if name == "_linalg_eigh" else 1)
                self.clock.spend(seconds, (place(), f"{name} on the CPU", cost.what))
            else:
                self._on_device(name, func, cost, args)
        pass_on_constants(name, call.tensors, result)
        return result

    def _meet(self, name: str, func, call: "_Call", target) -> "tuple[Cost, list[_Result], bool]":
        """What is to be known of an operation on such shapes: its cost, its results, and whether these are several."""
        args, kwargs = call.metas()
        result = _shapes(name, func, args, kwargs, target)
        is_several = isinstance(result, tuple | list)
        made = list(result) if is_several else [result]
        inputs = _Call(args, kwargs).tensors
        outputs = [x for x in made if isinstance(x, torch.Tensor)]
        cost = cost_of(name, func, args, kwargs, inputs, outputs, self.card, torch.backends.cuda.matmul.allow_tf32)
        return cost, [_Result(x, inputs) for x in made], is_several

    # -------------------------------------------------------------------------------------------------- what it costs

    def _on_device(self, name: str, func, cost: Cost, args) -> None:
        if name == "_linalg_eigh":  # others at the same time share the card, but for the latency of each
            size, others = args[0].shape[-1], self.clock.num_busy()
            latency = eigh_latency(size, self.card)
            queued = latency * max(1.0, (others + 1) / cards.EIGH_STREAMS)
            cost = replace(cost, seconds=queued + (eigh_seconds(size, self.card) - latency) * (others + 1))
        self.clock.launch(cost, (place(), f"{name}.{func._overloadname}".removesuffix(".default"), cost.what))
        if name in WAITS or (name in INDEXED and _has_mask(args[1])):
            self.clock.wait()

    def _copy(self, direction: str, call: "_Call", what: str) -> None:
        non_blocking = bool(call.kwargs.get("non_blocking") or (len(call.args) > 2 and call.args[2]))
        on_host = [x for x in call.tensors if not x.is_cuda]
        pinned = is_pinned(on_host[0]) if on_host else non_blocking  # for which torch makes page-locked memory itself
        moved = num_bytes(call.tensors[-1])
        seconds = max(moved / (cards.PINNED if pinned else cards.PAGEABLE), cards.LAUNCH_FLOOR)
        self.clock.launch(Cost(0.0, moved, seconds, what), (place(), f"copy {direction}", what))
        if not (pinned and non_blocking):
            self.clock.wait()

    def _read(self) -> None:
        self.clock.launch(Cost(0.0, 8.0, cards.LAUNCH_FLOOR), (place(), "read a number", ""))
        self.clock.wait()


class _Result:
    """What an operation gives: one of its arguments, or a tensor of some shape, or a value."""

    def __init__(self, made, inputs: list[torch.Tensor]):
        self.number = next((number for number, x in enumerate(inputs) if x is made), None)
        self.shape = (made.shape, made.stride(), made.dtype) if isinstance(made, torch.Tensor) else None
        self.value = None if self.shape else made

    def like(self, tensors: list[torch.Tensor], kind):
        """The same of another such call."""
        if self.number is not None:
            return tensors[self.number]
        if self.shape is None:
            return self.value
        shape, strides, dtype = self.shape
        return kind(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))


class _Call:
    """The arguments of an operation, looked through once."""

    def __init__(self, args, kwargs):
        self.args, self.kwargs = args, kwargs
        self.tensors: list[torch.Tensor] = []
        self.key: list = []
        self._look(args)
        for name, value in kwargs.items():
            self.key.append(name)
            self._look(value)
        self.on_device = any(isinstance(x, DeviceTensor) for x in self.tensors)
        self.is_modelled = self.on_device or any(isinstance(x, HostTensor) for x in self.tensors)

    def _look(self, value) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            self.key.append((type(value), value.dtype, value.shape, value.stride(), value.storage_offset()))
        elif isinstance(value, tuple | list):
            self.key.append(len(value))
            for each in value:
                self._look(each)
        else:
            self.key.append((type(value), value))

    def metas(self):
        """(args, kwargs) of meta tensors."""
        return _mapped(self.args), {name: _mapped(value) for name, value in self.kwargs.items()}


def _mapped(value):
    if isinstance(value, torch.Tensor):
        return meta(value)
    return type(value)(map(_mapped, value)) if type(value) in (tuple, list) else value


def _wrapped(result, tensors, kind):
    """The tensors of the result of a view, or what they are made of."""
    if isinstance(result, torch.Tensor):
        same = [x for x in tensors if getattr(x, "values", None) is result]
        return same[0] if same else kind(result)
    return type(result)(_wrapped(x, tensors, kind) for x in result) if isinstance(result, tuple | list) else result


def _crossing(name: str, tensors, target) -> str | None:
    """Between which sides an operation copies, if it does."""
    if name == "_to_copy" and target is not None and (target == "cuda") != tensors[0].is_cuda:
        return "to the device" if target == "cuda" else "from the device"
    if name == "copy_" and tensors[0].is_cuda != tensors[1].is_cuda:
        return "to the device" if tensors[0].is_cuda else "from the device"
    return None


def _shapes(name: str, func, args, kwargs, target):
    """The result, of meta tensors; where its shape depends on numbers, as if every condition held."""
    if name == "nonzero":
        return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="meta")
    if name == "masked_select":
        return torch.empty(args[0].numel(), dtype=args[0].dtype, device="meta")
    if name == "index" and _has_mask(args[1]):
        dims = args[1][0].dim()
        return args[0].new_empty(math.prod(args[0].shape[:dims]), *args[0].shape[dims:])
    if name in INDEXED and _has_mask(args[1]):
        return args[0]
    if name in ("mm", "bmm") and func._overloadname == "dtype":
        shape = (*args[0].shape[:-1], args[1].shape[-1])
        return torch.empty(shape, dtype=args[2], device="meta")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("meta")}
    kwargs.pop("pin_memory", None)
    return func(*args, **kwargs)


def place() -> str:
    """The innermost function of the project that is running; a backward pass has none where torch is alone."""
    frame = sys._getframe(1)
    while frame is not None:
        if (name := _name_of(frame.f_code)) is not None:
            return name
        frame = frame.f_back
    return "backward pass"


@cache
def _name_of(code) -> str | None:
    path = code.co_filename
    if not path.startswith(OF_THE_PROJECT):
        return None
    return f"{path.removeprefix(ROOT).removeprefix('influence_core/')}:{code.co_name}"


def _has_mask(indices) -> bool:
    return any(x is not None and x.dtype == torch.bool for x in indices)
