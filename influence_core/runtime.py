"""Where and how a run happens: device, process group, seed, precision, torch.compile, free memory."""

import os
import random
import resource
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from influence_core.errors import UserError
from influence_core.launch import Launch
from influence_core.memory import free_system_memory
from influence_core.precision import Precision
from influence_core.progress import Progress, progress

# One process may wait for another's share, or for what only rank 0 does, as long as that takes. The dead are not waited
# for: torchrun ends the job when a process does.
LONGEST_WAIT = timedelta(days=7)

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Runtime:
    """One process's view of the run; `Runtime()` is a single process in float32 on the CPU."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = field(default_factory=Precision)
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    compile: bool = False
    sharded: bool = False  # parameters lie spread over the processes

    @classmethod
    def start(
        cls,
        use_ddp: bool = False,
        use_half_precision: bool = False,
        use_compile: bool = False,
        seed: int = 0,
        use_tf32: bool = False,
        use_fsdp: bool = False,
    ) -> "Runtime":
        """Choose the device, join the process group (under torchrun) and seed every generator.

        Args:
            use_ddp, use_fsdp: as one of several processes, each with the whole model, or with a part of each parameter.
        Raises:
            UserError: either outside torchrun, or both; a precision that the device does not have.
        """
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            # Batches of many lengths leave holes that none of the next ones fits into, unless segments can grow.
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        launch = Launch.here()
        if use_ddp and use_fsdp:
            raise UserError("--use_ddp gives each process the whole model, --use_fsdp a part of it: say one of them")
        if use_fsdp and use_compile:
            raise UserError("--use_compile is not for --use_fsdp: leave one of them out")
        flag, several = "--use_fsdp" if use_fsdp else "--use_ddp", use_ddp or use_fsdp
        if several:
            Launch.require_torchrun(flag)
        if not several and launch.world_size > 1:
            raise UserError(
                "torchrun started several processes, each of which would do all of the work: add --use_ddp (or "
                "--use_fsdp, where a process does not hold the model), or run one process without torchrun"
            )
        device = torch.device(f"cuda:{launch.local_rank}" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and launch.local_rank >= torch.cuda.device_count():
            num_processes = os.environ.get("LOCAL_WORLD_SIZE", launch.world_size)
            raise UserError(
                f"{num_processes} processes on a machine with {torch.cuda.device_count()} GPUs: give torchrun "
                f"--nproc-per-node={torch.cuda.device_count()} at most"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums are float32
        precision = Precision.choose(device, use_half_precision, use_tf32)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = precision.tf32
        if several:
            backend = "nccl" if device.type == "cuda" else "gloo"
            if use_fsdp and device.type == "cuda":
                backend = "cpu:gloo,cuda:nccl"  # what tells of tensors is Python's, and need not wait for the device
            dist.init_process_group(backend, timeout=LONGEST_WAIT)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        rank, world_size = (launch.rank, launch.world_size) if several else (0, 1)
        return cls(device, precision, rank, world_size, seed, use_compile, use_fsdp and world_size > 1)

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Only this process prints and writes shared files."""
        return self.rank == 0

    def print(self, *values, **options) -> None:
        if self.is_main:
            print(*values, **options, flush=True)

    def warn(self, text: str) -> None:
        """Print, from whichever process it concerns."""
        print(text if self.is_main else f"(process {self.rank}) {text}", flush=True)

    def progress(self, total: int, description: str, initial: int = 0, unit: str = "seq") -> Progress:
        """Of work of this process, shown on rank 0 only."""
        return progress(total, description, unit, initial, is_shown=self.is_main)

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor (contiguous) over processes, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                assert tensor.is_contiguous()
                dist.all_reduce(tensor)

    def of_main(self, value: Item) -> Item:
        """The first process's value, where parameters are sharded: all have to do the same steps."""
        values = [value]
        if self.sharded:
            dist.broadcast_object_list(values)
        return values[0]

    def smallest(self, value: int) -> int:
        """The smallest of the processes' values: what all of them can do."""
        tensor = torch.tensor(value, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give every process the tensor (contiguous, perhaps empty) of rank `source`, in place."""
        if self.world_size > 1 and tensor.numel():
            assert tensor.is_contiguous()
            dist.broadcast(tensor, source)

    def gathered(self, values: dict[str, Item]) -> dict[str, Item]:
        """What the processes have together, where parameters are sharded and each has a part."""
        if not self.sharded:
            return values
        parts: list[dict[str, Item]] = [{}] * self.world_size
        dist.all_gather_object(parts, values)
        return {key: value for part in parts for key, value in part.items()}

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def send(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU on the device; pinned on the way, so that no one waits for what the device is doing."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def synchronize(self) -> None:
        """Wait until the device has done what it was given (for timing)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def num_workers(self) -> int:
        """How many small jobs of linear algebra run at once: one thread does them nearly as fast as several."""
        return min(4, torch.get_num_threads()) if self.device.type == "cpu" else 1

    def map_parallel(self, function: Callable[[Item], Result], items: list[Item]) -> Iterator[Result]:
        """The results in order, `num_workers` at a time, each with its part of the threads."""
        num_workers, num_threads = self.num_workers, torch.get_num_threads()
        if num_workers == 1:
            yield from map(function, items)
            return
        executor = ThreadPoolExecutor(
            num_workers, initializer=torch.set_num_threads, initargs=(max(1, num_threads // num_workers),)
        )
        try:
            yield from executor.map(function, items)
        finally:
            executor.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)  # the workers' setting reaches the whole process

    def used_memory(self) -> int:
        """Bytes this process holds on its device now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    def peak_memory(self) -> int:
        """Bytes this process has held on its device at most."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with open("/proc/self/status") as status:  # getrusage would count what a parent process held before this one
            peak = next((int(line.split()[1]) for line in status if line.startswith("VmHWM")), None)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak is None else peak)

    def free_memory(self) -> int:
        """Bytes that this process may still take: 90 % of what is free, shared among the processes of a machine."""
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return int(0.9 * (torch.cuda.mem_get_info(self.device)[0] + cached))
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.world_size > 1 else 1
        return int(0.9 * free_system_memory() / local_processes)
