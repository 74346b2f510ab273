"""What CUDA refuses, and where its host waits: by the name of an operator and where its tensors are.

Sources: torch's own checks (TensorIterator takes a CPU tensor without dimensions among CUDA ones, other kernels don't;
indices may be on the CPU; Blas.cpp on `out_dtype`), and FakeTensorMode, which knows the devices and dtypes of the rest.
"""

import threading

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_map

from tests.pretended.cuda import is_pinned

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"}
NOT_OF_INTEGERS = PRODUCTS | {"mv", "dot", "addmv", "addmv_", "addbmm"}
COPIES = {"_to_copy", "copy_", "_copy_from", "_foreach_copy_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# These look at devices themselves, and take no CPU tensor even where it has no dimension.
STRICT = PRODUCTS | {"mv", "dot", "addmv", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add"}
STRICT |= {"index_add_", "index_select", "embedding", "searchsorted", "native_layer_norm", "nll_loss_forward"}
# The host reads a size or a number of the result.
READ = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal", "is_nonzero"}
READ |= {"_linalg_eigh", "_linalg_check_errors", "_local_scalar_dense"}
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException, NotImplementedError)

_fake, _one_at_a_time = FakeTensorMode(allow_non_fake_inputs=True), threading.Lock()
_accepted: set = set()  # calls that FakeTensorMode had nothing against


def check(operation) -> None:
    """Raise what CUDA would."""
    name, on_gpu, on_cpu = operation.name, operation.on_gpu, operation.on_cpu
    if on_gpu and on_cpu and name not in COPIES:
        if name in INDEXED:
            (indexed, _, *rest) = operation.args
            strangers = [x for x in (indexed, *(x for x in rest[:1] if isinstance(x, torch.Tensor) and x.dim()))
                         if not x.is_cuda]  # fmt: skip
        else:
            written = operation.args[:1] if operation.func._schema.is_mutable else ()
            strangers = [x for x in on_cpu if x.dim() or name in STRICT or any(x is each for each in written)]
        if strangers:
            shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in operation.tensors)
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({operation.func} of {shapes})"
            )
    if name in NOT_OF_INTEGERS and not (on_gpu[-1].is_floating_point() or on_gpu[-1].is_complex()):
        raise RuntimeError(f'"{name}_cuda" not implemented for {on_gpu[-1].dtype}')
    if name in PRODUCTS:
        _check_dtypes(operation)
    ask_fake_tensors(operation)


def _check_dtypes(operation) -> None:
    """Of a product, and of what it is added to."""
    *added, a, b = (x for x in operation.args if isinstance(x, torch.Tensor))
    (out_dtype,) = [x for x in operation.args if isinstance(x, torch.dtype)] or [a.dtype]
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected mat1 and mat2 to have the same dtype, but got: {a.dtype} != {b.dtype}")
    is_wider = out_dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16)
    if out_dtype != a.dtype and not is_wider:
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    if any(x.dtype not in (out_dtype, a.dtype) for x in added):
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")


def ask_fake_tensors(operation) -> None:
    """Raise what FakeTensorMode has against it; asked once for each kind of arguments."""
    call = operation.func, _kind(operation.args), _kind(tuple(operation.kwargs.items()))
    if call in _accepted or operation.name == "_local_scalar_dense":
        return

    def fake(x):
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    try:
        with _one_at_a_time, _fake:
            operation.func(*tree_map(fake, operation.args), **tree_map(fake, operation.kwargs))
    except UNKNOWN:
        pass
    _accepted.add(call)


def _kind(x):
    """What devices and dtypes are refused by; sizes are the CPU's to refuse."""
    if isinstance(x, torch.Tensor):
        return x.dim(), x.dtype, x.is_cuda
    if isinstance(x, tuple | list):
        return tuple(map(_kind, x))
    return type(x) if isinstance(x, int | float) else x


def product(func, args, kwargs):
    """A matrix product as tensor cores make it: operands of 16 bits, sums of 32; in whatever dtype it is asked for."""
    operands = [x for x in args if isinstance(x, torch.Tensor)]
    asked = [x for x in args if isinstance(x, torch.dtype)]  # which the CPU has no product for
    if not asked and operands[-1].itemsize > 2:
        return func(*args, **kwargs)
    out = kwargs.pop("out", operands[0] if func._schema.is_mutable else None)  # addmm_ has no `out`
    summed_in = torch.promote_types(operands[-1].dtype, torch.float32)
    result = func.overloadpacket(*(x.to(summed_in) for x in operands), **kwargs)
    return result.to(asked[0] if asked else operands[-1].dtype) if out is None else out.copy_(result)


def wait(operation) -> str | None:
    """Why the host waits until the device has done this, if it does."""
    name, args = operation.name, operation.args
    if name in READ:
        return name.removeprefix("_")
    if name in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return f"{name} by a mask"
        return f"{name} by indices on the CPU" if not all(index.is_cuda for index in indices) else None
    if name in COPIES:
        return _wait_for_copy(operation)
    return None


def _wait_for_copy(operation) -> str | None:
    """None where both are on the GPU, or where the copy may go on by itself: between it and pinned memory."""
    if operation.name == "_to_copy":
        source, target = operation.args[0], None
        goes_to_gpu = source.is_cuda if operation.target is None else operation.target == "cuda"
    else:
        target, source = operation.args[:2]
        goes_to_gpu = target.is_cuda
    if goes_to_gpu == source.is_cuda:
        return None
    is_async = operation.kwargs.get("non_blocking") or operation.args[2:] == (True,)
    host = source if goes_to_gpu else target  # torch itself pins what `to` makes of a copy that need not wait
    return None if is_async and (host is None or is_pinned(host)) else f"copy to the {'GPU' if goes_to_gpu else 'CPU'}"
