"""Kill a script at any event of its file system, and damage what lies on disk.

A script is run in a child of this process, which an audit hook kills (SIGKILL) just before its N-th event: a file
opened for writing, renamed, linked or removed, a directory made, below the directory that is watched.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.scripts import run

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def events(
    directory: Path, script: str, *flags, kill_at: int | str | None = None, number: signal.Signals = signal.SIGKILL
):
    """(number of events, exit code or minus the signal, what it printed) of a script in a child process.

    Args:
        kill_at: the event before which the child gets the signal; or the name of a file, when that is whole.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        count, is_there = 0, False

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count, is_there
            is_write = event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES)
            if is_write and str(directory) in str(arguments[:2]):
                if count == kill_at or is_there:
                    os.kill(os.getpid(), number)
                count += 1
                is_there = event == "os.rename" and isinstance(kill_at, str) and str(arguments[1]).endswith(kill_at)

        sys.addaudithook(hook)
        code = 70
        try:
            outcome = run(script, *flags)
            code = outcome.code
            os.write(write_end, f"{count}\n{outcome.out}{outcome.err}"[:60_000].encode())
        finally:
            os._exit(code)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        told = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    count, _, printed = told.partition("\n")
    return int(count or 0), os.waitstatus_to_exitcode(status), printed


def flip_a_bit(path: Path, seed: int) -> None:
    """Change one bit anywhere."""
    content, generator = bytearray(path.read_bytes()), random.Random(seed)
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    _replace(path, bytes(content))


def cut_the_tail(path: Path, seed: int) -> None:
    """Leave a part of the beginning."""
    content = path.read_bytes()
    _replace(path, content[: random.Random(seed).randrange(len(content))])


def flip_a_bit_of_the_head(path: Path, seed: int) -> None:
    """Change one bit where names and shapes are."""
    content, generator = bytearray(path.read_bytes()), random.Random(seed)
    content[generator.randrange(min(400, len(content)))] ^= 1 << generator.randrange(8)
    _replace(path, bytes(content))


DAMAGES: dict[str, Callable[[Path, int], None]] = {
    "flipped": flip_a_bit,
    "flipped in its head": flip_a_bit_of_the_head,
    "cut": cut_the_tail,
}


def _replace(path: Path, content: bytes) -> None:
    """A new file: the old one may be linked from elsewhere."""
    path.unlink()
    path.write_bytes(content)
