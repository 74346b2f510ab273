"""Threads and streams in modelled time, for what the project does side by side.

A pool's threads are real, but one at a time runs: whenever it has spent time, the one that is behind all others goes
on. So jobs that are handed out as threads become free are handed out in modelled time, too. A thread may wait for a
result or for the whole pool; two that want the same lock while one of them spends time would stand still.
"""

import concurrent.futures
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from tests.benchmarks.roofline import cards
from tests.benchmarks.roofline.clock import Clock, Host, Lane


class Threads:
    """All threads of the host; makes the clock follow them."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.turns: dict[Host, threading.Semaphore] = {clock.host: threading.Semaphore(0)}
        self.ready = {clock.host: lambda: True}  # {thread: whether it can go on}
        self.num_threads = cards.NUM_CORES
        clock.give_way = self.give_way

    def give_way(self) -> None:
        """Let the thread go on that is behind all others that can."""
        mine = self.clock.host
        if len(self.ready) > 1 and self._hand_over() is not mine:
            self.turns[mine].acquire()

    def _hand_over(self) -> Host:
        """Which thread goes on."""
        able = [host for host, is_ready in self.ready.items() if is_ready()]
        assert able, "all threads wait for each other"
        chosen = min(able, key=lambda host: host.time)
        if chosen is not self.clock.host:
            self.clock.host = chosen
            self.turns[chosen].release()
        return chosen

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """The thread stands still until then."""
        mine = self.clock.host
        before, self.ready[mine] = self.ready[mine], is_ready
        if not is_ready():
            self.give_way()
        self.ready[mine] = before

    def start(self, run: Callable[[], None], is_ready: Callable[[], bool]) -> Host:
        """A thread that begins when it can."""
        mine = self.clock.host
        host = Host(mine.time, self.clock.streams[0], mine.stage, mine.part)
        self.turns[host], self.ready[host] = threading.Semaphore(0), is_ready

        def main():
            self.turns[host].acquire()
            self.ready[host] = lambda: True
            try:
                run()
            finally:
                del self.ready[host]
                self._hand_over()

        threading.Thread(target=main, daemon=True).start()
        return host

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, thread pools and streams are such."""
        threads = self
        real = concurrent.futures

        class Pool(_Pool):
            def __init__(self, *arguments, **keywords):
                super().__init__(threads, *arguments, **keywords)

        def as_completed(futures, timeout=None):
            waiting = set(futures)
            while waiting:
                threads.wait_until(lambda: any(future.done() for future in waiting))
                first = min((future for future in waiting if future.done()), key=lambda future: future.finished)
                waiting.remove(first)
                yield first

        replaced = {"ThreadPoolExecutor": Pool, "as_completed": as_completed}
        originals = {name: getattr(real, name) for name in replaced}
        importers = [module for name, module in sys.modules.items() if name.startswith("influence_core")]
        functions = {
            "Stream": self._new_stream,
            "stream": self._on,
            "set_stream": self._set_stream,
            "current_stream": lambda *_: threads.clock.host.stream,
            "default_stream": lambda *_: threads.clock.streams[0],
            "synchronize": lambda *_: threads.clock.wait_for(*threads.clock.streams),
        }
        with ExitStack() as patches:
            for module in (real, *importers):
                for name, new in replaced.items():
                    if getattr(module, name, None) is originals[name]:
                        patches.enter_context(patch.object(module, name, new))
            patches.enter_context(patch.multiple(torch.cuda, **functions))
            patches.enter_context(patch.object(torch, "get_num_threads", lambda: threads.num_threads))
            patches.enter_context(patch.object(torch, "set_num_threads", self._set_num_threads))
            yield

    def _set_num_threads(self, number: int) -> None:
        self.num_threads = number

    def _new_stream(self, *_, **__) -> "Stream":
        stream = Stream(self.clock)
        self.clock.streams.append(stream)
        return stream

    def _set_stream(self, stream: Lane) -> None:
        self.clock.host.stream = stream

    @contextmanager
    def _on(self, stream: Lane | None):
        host = self.clock.host
        before, host.stream = host.stream, stream or host.stream
        try:
            yield
        finally:
            host.stream = before


class Stream(Lane):
    """A stream beside the default one."""

    def __init__(self, clock: Clock):
        super().__init__(clock.now())
        self.clock = clock

    def synchronize(self) -> None:
        self.clock.wait_for(self)

    def wait_stream(self, stream: Lane) -> None:
        self.time = max(self.time, stream.time)


class _Future(concurrent.futures.Future):
    """Knows when its result was there."""

    finished = 0.0

    def __init__(self, threads: Threads):
        super().__init__()
        self.threads = threads

    def _arrive(self) -> None:
        self.threads.wait_until(self.done)
        self.threads.clock.wait_for(Lane(self.finished))

    def result(self, timeout=None):
        self._arrive()
        return super().result()

    def exception(self, timeout=None):
        self._arrive()
        return super().exception()


class _Pool(concurrent.futures.Executor):
    """As ThreadPoolExecutor."""

    def __init__(self, threads, max_workers=None, thread_name_prefix="", initializer=None, initargs=()):
        self.threads, self.max_workers = threads, max_workers or cards.NUM_CORES
        self.initializer, self.initargs = initializer, initargs
        self.jobs: deque[tuple[Host, _Future, Callable]] = deque()  # with what the thread that submitted it was at
        self.workers, self.busy, self.closed = [], 0, False

    def submit(self, function, /, *arguments, **keywords):
        future = _Future(self.threads)
        host = self.threads.clock.host
        submitted = Host(host.time, stage=host.stage, part=host.part)
        self.jobs.append((submitted, future, lambda: function(*arguments, **keywords)))
        if len(self.workers) < self.max_workers:
            self.workers.append(self.threads.start(self._work, lambda: bool(self.jobs) or self.closed))
        return future

    def map(self, function, *iterables, timeout=None, chunksize=1):
        futures = [self.submit(function, *arguments) for arguments in zip(*iterables)]
        return (future.result() for future in futures)

    def _work(self) -> None:
        clock = self.threads.clock
        if self.initializer is not None:
            self.initializer(*self.initargs)
        while True:
            self.threads.wait_until(lambda: bool(self.jobs) or self.closed)
            if not self.jobs:
                return
            submitted, future, job = self.jobs.popleft()
            self.busy += 1
            clock.host.stage, clock.host.part = submitted.stage, submitted.part
            clock.wait_for(submitted)
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
            future.finished = clock.now()
            self.busy -= 1

    def shutdown(self, wait=True, *, cancel_futures=False):
        if cancel_futures:
            self.jobs.clear()
        self.closed = True
        if wait:
            self.threads.wait_until(lambda: not self.jobs and not self.busy)
            self.threads.clock.wait_for(*self.workers)
