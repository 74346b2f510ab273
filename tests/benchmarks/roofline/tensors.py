"""Tensors that have shapes alone: of the modelled device, and those of the CPU that come from it or from the disk.

Where the project reads a number, the answer is made up: every condition holds, a count of those that hold is of all of
them, any other number is zero.
"""

import numpy as np
import torch

from tests.pretended.device import CudaTensor, handle

KEEPS_CONSTANT = {
    "_to_copy", "clone", "detach", "alias", "view", "stack", "max", "amax", "min", "unsqueeze", "squeeze", "select",
    "slice", "expand", "lift_fresh",
}  # fmt: skip


class _Storage:
    """What a tensor without memory says of its memory."""

    def __init__(self, storage: torch.UntypedStorage):
        self.storage = storage  # kept, so that no other gets its address

    def data_ptr(self) -> int:
        return self.storage._cdata

    def nbytes(self) -> int:
        return self.storage.nbytes()


class DeviceTensor(CudaTensor):
    """A tensor of the device: `values` is a meta tensor."""

    constant: float | None = None  # that all its numbers are, where that is known

    def untyped_storage(self):
        return _Storage(self.values.untyped_storage())

    def data_ptr(self) -> int:
        return self.values.untyped_storage()._cdata

    def tolist(self):
        flat = [self.reshape(-1)[0].item()] * self.numel() if self.numel() else []
        for size in self.shape[:0:-1]:
            flat = [flat[i : i + size] for i in range(0, len(flat), size)]
        return flat


class HostTensor(torch.Tensor):
    """A tensor of the CPU without memory."""

    constant: float | None = None
    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device="cpu",
        )  # fmt: skip
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return handle(func, args, kwargs or {})

    untyped_storage, data_ptr, tolist = DeviceTensor.untyped_storage, DeviceTensor.data_ptr, DeviceTensor.tolist

    def numpy(self):
        return np.broadcast_to(np.zeros((), str(self.dtype).removeprefix("torch.")), self.shape)


def host_tensor(shape, dtype: torch.dtype) -> HostTensor:
    """As torch.empty on the CPU."""
    return HostTensor(torch.empty(shape, dtype=dtype, device="meta"))


def meta(x):
    """As torch computes shapes with it."""
    if isinstance(x, DeviceTensor | HostTensor):
        return x.values
    if isinstance(x, torch.Tensor) and not x.is_meta:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return x


def answer(tensor):
    """What the project is told where it reads a number."""
    if tensor.dtype == torch.bool:
        return True if tensor.constant is None else bool(tensor.constant)
    constant = tensor.constant or 0
    return float(constant) if tensor.is_floating_point() else int(constant)


def pass_on_constants(name: str, tensors, result) -> None:
    """What is known of all numbers of an argument holds for those of the result."""
    if not isinstance(result, DeviceTensor | HostTensor) or not tensors:
        result = result[0] if isinstance(result, tuple | list) and name == "max" else None
    if result is None:
        return
    source = tensors[0]
    if name == "sum" and source.dtype == torch.bool:
        result.constant = source.numel() // max(1, result.numel())
    elif name in KEEPS_CONSTANT:
        if isinstance(source, DeviceTensor | HostTensor):
            result.constant = source.constant
        elif source.numel() == 1:
            result.constant = source.item()
