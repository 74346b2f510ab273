"""The device: tensors that say "cuda:0", operations on them, and the context in which there is such a device."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretended import rules
from tests.pretended.cuda import pretended_functions

CUDA = torch.device("cuda:0")
PROJECT = f"{Path(__file__).parents[2]}/"


class CudaTensor(torch.Tensor):
    """A tensor that is on the GPU, whose `values` are not."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "CudaTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CUDA,
        )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _handlers[-1](func, args, kwargs or {})

    @property
    def data(self) -> "CudaTensor":
        return CudaTensor(self.values)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, CudaTensor):
            raise NotImplementedError("the data of a CudaTensor can't be those of a tensor on the CPU")
        torch.Tensor.data.__set__(self, other)
        self.values = other.values

    def untyped_storage(self):
        return self.values.untyped_storage()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def record_stream(self, stream) -> None:
        pass

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = CudaTensor(self.values.clone()).requires_grad_(self.requires_grad)
            copy.__dict__.update({key: value for key, value in self.__dict__.items() if key != "values"})
            memo[id(self)] = copy
        return memo[id(self)]

    def __repr__(self, **_):
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"


class Operation:
    """A call of one of torch's operators."""

    def __init__(self, func, args: tuple, kwargs: dict):
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = func.overloadpacket.__name__
        self.tensors = [leaf for leaf in _leaves((args, tuple(kwargs.values()))) if isinstance(leaf, torch.Tensor)]
        self.on_gpu = [tensor for tensor in self.tensors if isinstance(tensor, CudaTensor)]
        self.on_cpu = [tensor for tensor in self.tensors if not isinstance(tensor, CudaTensor)]
        device = kwargs.get("device")
        self.target = None if device is None else torch.device(device).type  # where the result is asked for

    @property
    def concerns_gpu(self) -> bool:
        return bool(self.on_gpu) or self.target == "cuda"

    def run(self, device: str = "cpu"):
        """The result, computed of values that are on this device: a tensor of the CPU, or "meta" without numbers."""
        args, kwargs = _map(_values, self.args), {key: _map(_values, value) for key, value in self.kwargs.items()}
        is_result_on_gpu = self.concerns_gpu if self.target is None else self.target == "cuda"
        if is_result_on_gpu and self.target is not None:
            kwargs["device"] = torch.device(device)
        is_pinned = bool(kwargs.pop("pin_memory", False))
        result = rules.product(self.func, args, kwargs) if self.name in rules.PRODUCTS else self.func(*args, **kwargs)
        if self.func._schema.is_mutable and any(tensor.shape != tensor.values.shape for tensor in self.on_gpu):
            raise NotImplementedError(f"{self.func} gave its argument another shape")
        known = {id(_values(tensor)): tensor for tensor in self.tensors}

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in known:
                return known[id(x)]
            if is_result_on_gpu:
                return CudaTensor(x)
            x.pretends_pinned = is_pinned
            return x

        return _map(wrap, result)


class CheckedDevice:
    """What becomes of an operation by default: it is checked, noted and computed.

    Args:
        largest: bytes that one result may take; more raises torch.OutOfMemoryError.
    Attributes:
        waits: how often the host waited for the device, by (why, the innermost line of the project).
    """

    def __init__(self, largest: float = float("inf")):
        self.largest = largest
        self.waits: Counter[tuple[str, str]] = Counter()

    def __call__(self, func, args, kwargs):
        operation = Operation(func, args, kwargs)
        if operation.concerns_gpu:
            rules.check(operation)
            if (why := rules.wait(operation)) is not None:
                self.waits[why, _where()] += 1
        result = operation.run()
        if operation.concerns_gpu:
            self._allocate(result, operation)
        return result

    def _allocate(self, result, operation: Operation) -> None:
        if self.largest == float("inf"):
            return
        held = {tensor.untyped_storage().data_ptr() for tensor in operation.on_gpu}
        results = [leaf.untyped_storage() for leaf in _leaves(result) if isinstance(leaf, CudaTensor)]
        size = max((storage.nbytes() for storage in results if storage.data_ptr() not in held), default=0)
        if size > self.largest:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes (pretended)")


_handlers: list[Callable] = [CheckedDevice()]  # the last is in charge; the first, of tensors that outlive a device


class _Everything(TorchDispatchMode):
    """Operations without a CudaTensor too, where they may make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not kwargs and CudaTensor not in types:
            return func(*args)
        return _handlers[-1](func, args, kwargs or {})


def _run_thread(thread: threading.Thread, run=threading.Thread.run) -> None:
    """A dispatch mode is of the thread that entered it."""
    with _Everything():
        run(thread)


@contextmanager
def pretended_cuda(handler: Callable | None = None) -> Iterator[Callable]:
    """Inside there is a CUDA device, whose operations are handled by `handler(func, args, kwargs)`.

    Args:
        handler: a new CheckedDevice by default; any other may make an `Operation` of its arguments and `run` it.
    """
    handler = handler or CheckedDevice()
    with ExitStack() as stack:
        if len(_handlers) == 1:  # an inner context has another handler, and the outer one's device
            stack.enter_context(pretended_functions())
            stack.enter_context(patch.object(threading.Thread, "run", _run_thread))
            stack.enter_context(_Everything())
        _handlers.append(handler)
        stack.callback(_handlers.pop)
        yield handler


def _where() -> str:
    """The innermost line of the project; a backward pass has none where torch computes the gradient."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PROJECT) and path != __file__ and "/.venv/" not in path:
            return f"{path.removeprefix(PROJECT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


def _values(x):
    return x.values if type(x) is CudaTensor else x


def _leaves(x) -> list:
    """What tuples and lists, also within each other, hold; of everything else, itself."""
    if type(x) not in (tuple, list):
        return [x]
    return [leaf for each in x for leaf in (_leaves(each) if type(each) in (tuple, list) else (each,))]


def _map(function: Callable, x):
    if type(x) not in (tuple, list):
        return function(x)
    return type(x)([_map(function, each) if type(each) in (tuple, list) else function(each) for each in x])
