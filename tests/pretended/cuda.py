"""torch.cuda and pinned memory, as far as there is something to say without a device."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch

MEMORY = 80 << 30  # bytes, all of it free


class Stream:
    """The one stream; whatever it is asked to wait for has happened."""

    device, device_index, device_type, stream_id, priority, cuda_stream = torch.device("cuda:0"), 0, 1, 0, 0, 0

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Event:
    """An event that has happened."""

    def __init__(self, *_, **__):
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end) -> float:
        return 1.0


_STREAM = Stream()


def _gives(value):
    return lambda *_, **__: value


FUNCTIONS = {
    **dict.fromkeys(("_lazy_init", "init", "set_device", "set_stream", "manual_seed", "manual_seed_all"), _gives(None)),
    **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "set_rng_state"), _gives(None)),
    **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), _gives(True)),
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated"), _gives(1 << 28)),
    **dict.fromkeys(("current_stream", "default_stream"), _gives(_STREAM)),
    "is_current_stream_capturing": _gives(False),
    "device_count": _gives(1),
    "current_device": _gives(0),
    "get_device_capability": _gives((9, 0)),
    "get_device_name": _gives("a pretended GPU"),
    "mem_get_info": _gives((MEMORY, MEMORY)),
    "memory_stats": _gives(Counter()),
    "get_rng_state": lambda *_: torch.get_rng_state(),  # what the CPU draws is what the device draws
    "Stream": Stream,
    "Event": Event,
    "stream": lambda stream: stream or nullcontext(),
    "device": lambda device: nullcontext(),
}


def _pin(tensor: torch.Tensor, device=None) -> torch.Tensor:
    if tensor.is_cuda:
        raise RuntimeError(f"cannot pin 'torch.cuda.{tensor.dtype}': only dense CPU tensors can be pinned")
    pinned = tensor.clone()
    pinned.pretends_pinned = True
    return pinned


def is_pinned(tensor: torch.Tensor, device=None) -> bool:
    return getattr(tensor, "pretends_pinned", False)


@contextmanager
def pretended_functions() -> Iterator[None]:
    """Inside, torch says that there is a CUDA device."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to keeps its parameters, tied ones too
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") by way of the CPU
    try:
        with (
            patch.multiple(torch.cuda, **FUNCTIONS),
            patch.object(torch.cuda.amp.common, "amp_definitely_not_available", _gives(False)),
            patch.multiple(torch.Tensor, pin_memory=_pin, is_pinned=is_pinned),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
