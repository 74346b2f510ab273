"""Stage 2: the eigendecomposition of each covariance: C = Q diag(w) Q^T, one eigenvector a column.

Most of it has no parallelism to give a whole device something to do: several at a time take little longer than one. A
CPU gives each a part of its threads; a GPU works at several streams, while its host decomposes others. Which of the two
takes a matrix is a matter of time, and signs of eigenvectors differ between them: on a GPU two runs agree to rounding.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from influence_core.memory import is_out_of_memory
from influence_core.runtime import Runtime

WIDE = 2048  # from this size on a decomposition uses several threads well; smaller ones go side by side
STREAMS = 4  # of a GPU, with a decomposition each, at most
STREAMS_BYTES = 4 << 30  # that they may take together, where one alone takes less
MATRICES = 5  # of float64 that a decomposition holds

Job = TypeVar("Job")
Decomposition = tuple[Tensor, Tensor]  # eigenvalues [d], eigenvectors [d, d]


def eigendecomposition(covariance: Tensor, device: torch.device | None = None) -> Decomposition:
    """Eigenvalues (ascending, negative rounding noise set to 0) and eigenvectors of a covariance.

    Args:
        covariance: [d, d], symmetric positive semi-definite.
        device: that does it, by default the covariance's; the CPU where it finds no memory or does not converge.
    Returns:
        [d] and [d, d], in the dtype of the covariance; computed in float64. Cost: about 9 d^3 FLOPs.
    Raises:
        torch.linalg.LinAlgError: it does not converge, on the device nor on the CPU.
    """
    device, found = device or covariance.device, None
    try:
        found = torch.linalg.eigh(covariance.to(device).double())
    except RuntimeError as error:  # a GPU's library gives up on matrices that LAPACK takes
        does_not_converge = isinstance(error, torch.linalg.LinAlgError)
        if device.type == "cpu" or not (does_not_converge or is_out_of_memory(error)):
            raise
    eigenvalues, eigenvectors = found or torch.linalg.eigh(covariance.cpu().double())
    # Contiguous: eigh returns its eigenvectors by columns, and a broadcast sends memory as it lies.
    return eigenvalues.clamp_(min=0).to(covariance.dtype), eigenvectors.to(covariance.dtype).contiguous()


def num_at_once(size: int, device_type: str, num_workers: int) -> int:
    """Decompositions of that size that the device holds at once."""
    if device_type == "cuda":
        return max(1, min(STREAMS, STREAMS_BYTES // (MATRICES * 8 * size**2)))
    return 1 if size >= WIDE else num_workers


def decompose_all(
    jobs: Sequence[Job],
    sizes: Sequence[int],
    decompose: Callable[[Job, torch.device], Decomposition],
    runtime: Runtime,
) -> Iterator[tuple[Job, Decomposition]]:
    """Each job with its result, on the runtime's device, in the order in which they are done.

    Args:
        jobs: the largest first.
        sizes: of their matrices.
        decompose: does one on a device.
    """
    if runtime.device.type == "cuda":
        yield from _on_streams(jobs, sizes, decompose, runtime)
        return
    wide = sum(size >= WIDE for size in sizes)  # these, the first, get all threads one by one
    one = partial(decompose, device=runtime.device)
    yield from zip(jobs, itertools.chain(map(one, jobs[:wide]), runtime.map_parallel(one, jobs[wide:])))


class Share:
    """Deals out jobs: the device takes the largest, its host the smallest, as long as that makes an end sooner.

    A host may have one core to spare, or sixty: how fast it is is seen from what it has done.
    """

    def __init__(self, sizes: Sequence[int], clock: Callable[[], float] = time.monotonic):
        self.sizes, self.clock, self.start = sizes, clock, clock()
        self.left = range(len(sizes))  # numbers of jobs
        self.work = {"device": 0.0, "host": 0.0}  # done, in d^3
        self.host_seconds = 0.0
        self.lock = threading.Lock()

    def take(self, who: str) -> int | None:
        """The number of the next job, None where there is none."""
        with self.lock:
            if not self.left or (who == "host" and not self._host_is_worth_it()):
                return None
            job = self.left[0 if who == "device" else -1]
            self.left = self.left[1:] if who == "device" else self.left[:-1]
            return job

    def stop(self) -> None:
        """Deal out no more."""
        with self.lock:
            self.left = range(0)

    def _host_is_worth_it(self) -> bool:
        size, of_device = self.sizes[self.left[-1]], self.work["device"]
        if not self.host_seconds or not of_device:
            return size < WIDE
        of_rest = sum(self.sizes[job] ** 3 for job in self.left) * (self.clock() - self.start) / of_device
        return size**3 * self.host_seconds / self.work["host"] < of_rest

    def done(self, who: str, job: int, seconds: float) -> None:
        with self.lock:
            self.work[who] += self.sizes[job] ** 3
            self.host_seconds += seconds * (who == "host")


def _on_streams(jobs, sizes, decompose, runtime: Runtime) -> Iterator[tuple[Job, Decomposition]]:
    share, of_thread = Share(sizes), threading.local()

    def make_stream() -> None:
        torch.cuda.set_device(runtime.device)  # a new thread is at the first one
        of_thread.stream = torch.cuda.Stream(runtime.device)

    def one(who: str) -> tuple[Job, Decomposition] | None:
        number = share.take(who)
        if number is None:
            return None
        start = share.clock()
        if who == "host":
            found = decompose(jobs[number], torch.device("cpu"))
        else:
            with torch.cuda.stream(of_thread.stream):
                found = decompose(jobs[number], runtime.device)
            of_thread.stream.synchronize()  # what follows runs on another stream
        share.done(who, number, share.clock() - start)
        return jobs[number], found

    # torch loads its library at the first call, and fails where several threads make it at once.
    torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=runtime.device))
    num_streams = num_at_once(max(sizes, default=1), "cuda", 1)
    with ThreadPoolExecutor(num_streams, initializer=make_stream) as device, ThreadPoolExecutor(1) as host:
        futures = [pool.submit(one, who) for who, pool in (("device", device), ("host", host)) for _ in jobs]
        try:
            for future in as_completed(futures):
                if (result := future.result()) is None:
                    continue
                here = tuple(tensor.to(runtime.device) for tensor in result[1])
                for tensor in here:  # made on another stream than it is used and let go of
                    tensor.record_stream(torch.cuda.current_stream(runtime.device))
                yield result[0], here
        finally:
            share.stop()
