"""Modelled time: threads of the host that hand work to streams of a device and wait for it, and what each piece took.

Nothing here sleeps. A lane is a thread or a stream, and its time is until when it is busy. A launch takes the host a
moment, and the device begins with it when both the launch and what the stream had before are done; to wait moves the
host to the stream's time. So what the host is too slow for, and what the device is, comes out by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.benchmarks.roofline import cards
from tests.benchmarks.roofline.costs import Cost

Place = tuple[str, str, str]  # function of the project, operation, sizes


@dataclass
class Lane:
    """A thread or a stream."""

    time: float = 0.0  # seconds since the beginning, until when it is busy


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


@dataclass
class Clock:
    """All lanes, and the account of what they did: {(stage, part): {place: what was spent}}."""

    host: Lane = field(default_factory=Lane)  # the thread that runs now
    stream: Lane = field(default_factory=Lane)  # the one that it launches to
    lanes: list[Lane] = field(default_factory=list)
    account: dict[tuple[str, str], dict[Place, Spent]] = field(default_factory=dict)
    stage: str = "before and between"
    part: str = ""
    end: float = 0.0  # of all that was handed out
    listeners: list[list] = field(default_factory=list)  # what is done is written down there as well, see `record`

    def __post_init__(self):
        self.lanes += [self.host, self.stream]

    def now(self) -> float:
        """As time.perf_counter, for the thread that runs."""
        return self.host.time

    def launch(self, cost: Cost, place: Place, host: float = cards.LAUNCH) -> None:
        """Hand an operation to the device."""
        self._note(self.launch, cost, place, host)
        self.host.time += host
        self.stream.time = max(self.stream.time, self.host.time) + cost.seconds
        self._count(place, Spent(1, cost.flops, cost.bytes, cost.seconds, host))

    def wait(self, lane: Lane | None = None) -> None:
        """Until a stream, by default the thread's own, has done what it was given."""
        self._note(self.wait, lane)
        self.host.time = max(self.host.time, (lane or self.stream).time)

    def spend(self, seconds: float, place: Place) -> None:
        """The thread itself is busy."""
        self._note(self.spend, seconds, place)
        self.host.time += seconds
        self._count(place, Spent(calls=1, host=seconds))

    def busy(self) -> int:
        """Streams beside the thread's own that are still at work now."""
        streams = [lane for lane in self.lanes if isinstance(lane, StreamLane)]
        return sum(lane.time > self.host.time for lane in streams if lane is not self.stream)

    @contextmanager
    def during(self, stage: str | None = None, part: str | None = None) -> Iterator[None]:
        """Inside, what is spent counts there."""
        before = self.stage, self.part
        self.stage, self.part = stage or self.stage, part if part is not None else self.part
        try:
            yield
        finally:
            self.stage, self.part = before

    @contextmanager
    def record(self) -> Iterator[list]:
        """Inside, what is done is written down, for `replay`."""
        events: list = []
        self.listeners.append(events)
        try:
            yield events
        finally:
            self.listeners.remove(events)

    @staticmethod
    def replay(events: list) -> None:
        """The same once more."""
        for method, arguments in events:
            method(*arguments)

    def _note(self, method, *arguments) -> None:
        for events in self.listeners:
            events.append((method, arguments))

    def _count(self, place: Place, spent: Spent) -> None:
        end = max(self.end, self.host.time, self.stream.time)
        spent.wall, self.end = end - self.end, end
        self.account.setdefault((self.stage, self.part), {}).setdefault(place, Spent()).add(spent)


class StreamLane(Lane):
    """A stream beside the default one."""
