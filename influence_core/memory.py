"""Free memory, and what is done where there is too little of it."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from influence_core.errors import UserError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get the memory that it asked for, on any device."""
    told_by = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")  # the CPU, CUDA itself, its libraries
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told_by)


def release_cached_memory() -> None:
    """Give back what the allocator keeps for later, after an allocation failed."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def changing(what: str) -> Iterator[None]:
    """Inside, numbers are changed that stay: too little memory ends the run, as nothing could be done again.

    Raises:
        UserError: there is too little.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory while {what}: lower --memory_budget_gb, or the batch sizes") from None


def in_halves(work: Callable[[slice], None], some: slice) -> None:
    """Do the work on all of it at once, or on halves of it, and halves of these, where memory is short.

    Args:
        work: takes all the memory that it needs before it changes anything that stays.
    Raises:
        RuntimeError: there is too little for a single one.
    """
    try:
        return work(some)
    except RuntimeError as error:
        if not is_out_of_memory(error) or some.stop - some.start < 2:
            raise
    release_cached_memory()  # here, where nothing of what failed is held any more
    middle = (some.start + some.stop) // 2
    in_halves(work, slice(some.start, middle))
    return in_halves(work, slice(middle, some.stop))


def slices(size: int, chunk: int) -> Iterator[slice]:
    """0 … size, cut into chunks."""
    for start in range(0, size, chunk):
        yield slice(start, min(start + chunk, size))


def free_system_memory() -> int:
    """Bytes available on this machine, within the limit of its control group (containers)."""
    with open("/proc/meminfo") as meminfo:
        available = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            limit, current = int(limit.read()), int(current.read())
        with open("/sys/fs/cgroup/memory.stat") as stat:
            cached = sum(int(line.split()[1]) for line in stat if line.startswith(("inactive_file ", "active_file ")))
        available = min(available, limit - current + cached)
    except (OSError, ValueError):  # no control group, or no limit ("max")
        pass
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:  # of this process's address space, by ulimit -v
        with open("/proc/self/statm") as statm:
            available = min(available, limit - int(statm.read().split()[0]) * resource.getpagesize())
    return available
