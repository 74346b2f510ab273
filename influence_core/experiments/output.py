"""What the scripts print, and libraries meanwhile, is safe to look at: on standard output and on standard error."""

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator

from influence_core.text import visible


class OutputError(Exception):
    """Standard output is closed, or full."""


class VisibleOutput:
    """A stream for people: what they could not see is shown as an escape, what it can't write as a question mark."""

    _unencodable = "replace"

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        self._put(visible(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _put(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None)
        if encoding:
            text = text.encode(encoding, self._unencodable).decode(encoding)
        self._do(lambda: self._stream.write(text))

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            raise OutputError(error.strerror or str(error)) from None

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class VisibleErrors(VisibleOutput):
    """Standard error: progress bars may move in it, and the work does not end because nobody reads it."""

    _unencodable = "backslashreplace"

    def write(self, text: str) -> int:
        moves = _MOVES.match(text)[0]
        self._put(moves + visible(text[len(moves) :]))
        return len(text)

    def _do(self, action):
        with contextlib.suppress(OSError):
            action()


_MOVES = re.compile(r"(?:\x1b\[A)+\Z|\r?")  # what tqdm writes: lines up and nothing else, or a bar from its beginning


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Make both streams visible ones; what is left in a standard output that can't be written is dropped."""
    output, errors = (stream or io.StringIO() for stream in (sys.stdout, sys.stderr))  # closed: nobody wants it
    shown = VisibleErrors(errors)
    with (
        contextlib.redirect_stdout(VisibleOutput(output)),
        contextlib.redirect_stderr(shown),
        _logged_to(errors, shown),
    ):
        try:
            yield
        finally:
            try:
                output.flush()
            except OSError:  # told already; Python would tell it again at its end, and change the exit code
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


@contextlib.contextmanager
def _logged_to(old, new) -> Iterator[None]:
    """Libraries that were imported before log to the new stream too."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    handlers = {handler for logger in (logging.root, *loggers) for handler in logger.handlers}
    moved = [each for each in handlers if isinstance(each, logging.StreamHandler) and each.stream is old]
    for handler in moved:
        handler.setStream(new)
    try:
        yield
    finally:
        for handler in moved:
            handler.setStream(old)
