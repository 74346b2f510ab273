"""Modelled time: threads of the host that hand work to streams of a device and wait for it, and what each piece took.

Nothing here sleeps. A thread's time, and a stream's, is until when it is busy. A launch takes the host a moment, and
the device begins with it when both the launch and what the stream had before are done; to wait moves the host to the
stream's time. So what the host is too slow for, and what the device is, comes out by itself. Where there are several
threads (threads.py), the one that is behind the others goes on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.benchmarks.roofline import cards
from tests.benchmarks.roofline.costs import Cost

Place = tuple[str, str, str]  # function of the project, operation, sizes


@dataclass(eq=False)
class Lane:
    """A stream, or a thread."""

    time: float = 0.0  # seconds since the beginning, until when it is busy


@dataclass(eq=False)
class Host(Lane):
    """A thread, the stream that it launches to, and what it works at."""

    stream: Lane = field(default_factory=Lane)
    stage: str = "All else"
    part: str = ""


@dataclass
class Spent:
    """What was counted under one name."""

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0  # of the device's memory
    device: float = 0.0  # seconds
    host: float = 0.0
    wall: float = 0.0  # by which the end of all work moved on

    def add(self, other: "Spent") -> None:
        self.calls += other.calls
        self.flops += other.flops
        self.bytes += other.bytes
        self.device += other.device
        self.host += other.host
        self.wall += other.wall


class Clock:
    """All threads and streams, and the account of what they did: {(stage, part): {place: what was spent}}."""

    def __init__(self):
        self.host = Host()  # the thread that runs now
        self.streams = [self.host.stream]
        self.account: dict[tuple[str, str], dict[Place, Spent]] = {}
        self.end = 0.0  # of all that was handed out
        self.records: list[tuple[Host, list]] = []  # what a thread does is written down there as well, see `record`
        self.give_way: Callable[[], None] = lambda: None  # to the thread that is behind the others

    def now(self) -> float:
        """As time.perf_counter, for the thread that runs."""
        return self.host.time

    def launch(self, cost: Cost, place: Place, host: float = cards.LAUNCH) -> None:
        """Hand an operation to the device."""
        self._note(self.launch, cost, place, host)
        thread = self.host
        thread.time += host
        thread.stream.time = max(thread.stream.time, thread.time) + cost.seconds
        self._count(place, Spent(1, cost.flops, cost.bytes, cost.seconds, host))
        self.give_way()

    def wait(self) -> None:
        """Until the thread's stream has done what it was given."""
        self._note(self.wait)
        self.wait_for(self.host.stream)

    def wait_for(self, *lanes: Lane) -> None:
        """Until each of them is no longer busy."""
        self.host.time = max([self.host.time, *(lane.time for lane in lanes)])
        self.end = max(self.end, self.host.time)
        self.give_way()

    def spend(self, seconds: float, place: Place) -> None:
        """The thread itself is busy."""
        self._note(self.spend, seconds, place)
        self.host.time += seconds
        self._count(place, Spent(calls=1, host=seconds))
        self.give_way()

    def num_busy(self) -> int:
        """Streams beside the thread's own that are at work now."""
        return sum(stream.time > self.host.time for stream in self.streams if stream is not self.host.stream)

    @contextmanager
    def during(self, stage: str | None = None, part: str | None = None) -> Iterator[None]:
        """Inside, what is spent counts there."""
        host = self.host
        before = host.stage, host.part
        host.stage, host.part = stage or host.stage, part if part is not None else host.part
        try:
            yield
        finally:
            host.stage, host.part = before

    @contextmanager
    def record(self) -> Iterator[list]:
        """Inside, what this thread does is written down, for `replay`."""
        events: list = []
        self.records.append((self.host, events))
        try:
            yield events
        finally:
            self.records.pop()

    @staticmethod
    def replay(events: list) -> None:
        """The same once more."""
        for method, arguments in events:
            method(*arguments)

    def _note(self, method: Callable, *arguments) -> None:
        for host, events in self.records:
            if host is self.host:
                events.append((method, arguments))

    def _count(self, place: Place, spent: Spent) -> None:
        end = max(self.end, self.host.time, self.host.stream.time)
        spent.wall, self.end = end - self.end, end
        self.account.setdefault((self.host.stage, self.host.part), {}).setdefault(place, Spent()).add(spent)
