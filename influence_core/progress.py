"""Progress of long work: a bar on a terminal, and in a log file a line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0  # of the whole process; work that ends sooner says nothing
LINE = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
now = time.monotonic


class Progress:
    """What nobody sees: that of a process that does not print. A context manager, which ends it."""

    def update(self, count: int = 1) -> None:
        """So many more are done."""

    def start_from(self, done: int) -> None:
        """So many were done before: they took no time."""

    def note(self, text: str, refresh: bool = True) -> None:
        """Show a text beside the numbers; with `refresh` at once, not with the next step."""

    def write(self, text: str) -> None:
        """A line on standard output, above the bar."""

    def close(self) -> None:
        """The work has ended."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def progress(
    total: int,
    description: str,
    unit: str = "seq",
    initial: int = 0,
    leave: bool = True,
    is_shown: bool = True,
) -> Progress:
    """Progress with an estimate of the time left.

    Args:
        total, initial: in units; how many there are, and how many of them were done before.
        leave: the bar stays on the terminal when the work has ended.
        is_shown: false in processes that don't print.
    """
    if not is_shown:
        return Progress()
    if is_terminal():
        return _Bar(tqdm(total=total, initial=initial, desc=description, unit=unit, leave=leave, dynamic_ncols=True))
    return _Lines(total, description, unit, initial)


def is_terminal() -> bool:
    """Whether a person looks on, where progress is shown."""
    return sys.stderr is not None and sys.stderr.isatty()


class _Bar(Progress):
    def __init__(self, bar: tqdm):
        self._bar = bar

    def update(self, count=1):
        self._bar.update(count)

    def start_from(self, done):
        self._bar.initial = self._bar.n = done
        self._bar.refresh()

    def note(self, text, refresh=True):
        self._bar.set_postfix_str(text, refresh)

    def write(self, text):
        self._bar.write(text)

    def close(self):
        self._bar.close()


class _Lines(Progress):
    _last: float | None = None  # when any of them wrote, or the first one began

    def __init__(self, total: int, description: str, unit: str, initial: int):
        self._text = {"total": total, "prefix": description, "unit": unit, "bar_format": LINE}
        self._initial = self._done = initial
        self._note, self._written = "", None
        self._begin = now()
        if _Lines._last is None:
            _Lines._last = self._begin

    def update(self, count=1):
        self._done += count
        self._write_if(now() - _Lines._last >= SECONDS_BETWEEN_LINES)

    def start_from(self, done):
        self._initial = self._done = done

    def note(self, text, refresh=True):
        self._note = text
        self._write_if(refresh and now() - _Lines._last >= SECONDS_BETWEEN_LINES)

    def write(self, text):
        print(text, flush=True)

    def close(self):
        self._write_if(now() - self._begin >= SECONDS_BETWEEN_LINES and self._written != self._done)

    def _write_if(self, is_due: bool) -> None:
        if not is_due or not self._text["total"]:
            return
        _Lines._last, self._written = now(), self._done
        line = tqdm.format_meter(
            self._done, elapsed=now() - self._begin, initial=self._initial, postfix=self._note, **self._text
        )
        with contextlib.suppress(OSError, ValueError):  # nobody reads it: no reason to end the work
            print(line, file=sys.stderr, flush=True)


class ProgressClock:
    """Says when it is time to note progress again: so seldom that noting takes no more than a hundredth of the time."""

    def __init__(self, interval: float):
        self.interval, self.last = interval, time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self.last >= self.interval

    def keep(self, save: Callable[[], None]) -> None:
        """Note the progress."""
        start = time.monotonic()
        save()
        self.last = time.monotonic()
        self.interval = max(self.interval, 100 * (self.last - start) * (self.interval > 1))
