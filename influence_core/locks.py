"""Who works in a directory: one at a time, and everybody else is told who it is.

A lock is a file under flock: the kernel frees it when its holder dies, however it dies, so the lock of a dead process
blocks nobody. The file says who holds it, and is removed by its holder.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from influence_core.errors import UserError

LOCK = ".lock"  # in a directory that has one writer
WAIT_SECONDS = 1.0  # between two tries
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock."""

    host: str = "?"
    process: int = 0
    since: str = "?"
    job: str = ""  # the processes that torchrun started together have it in common

    @classmethod
    def me(cls) -> "Holder":
        job = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
        return cls(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), job.strip(":"))

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class Held(Exception):
    """Another process has the lock: `holder`."""

    def __init__(self, holder: Holder):
        super().__init__(str(holder))
        self.holder = holder


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock, or raise at once.

    Raises:
        Held: another process does.
        OSError: the file can't be made, or its file system has no locks.
    """
    descriptor = _acquire(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Holder.me())).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # first: who opened it before finds that it is no longer the lock, and makes a new one
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a living process has a lock; the file of a dead one is removed."""
    try:
        with lock(path):
            return False
    except Held:
        return True


def holder_of(path: Path) -> Holder | None:
    """Who holds a lock now, as far as its file says; None if nobody has one there."""
    try:
        stored = json.loads(path.read_text() or "{}")
        return Holder(**{key: stored[key] for key in asdict(Holder()) if key in stored})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError):
        return Holder()


def _acquire(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except BlockingIOError:
            holder = holder_of(path)
            os.close(descriptor)
            if holder is not None:  # else it has just been given back
                raise Held(holder) from None
            continue
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it before we had it


@contextlib.contextmanager
def only_writer(directory: Path, wait: bool, is_main: bool = True) -> Iterator[None]:
    """Be the one job that writes into a directory, or say who does.

    Where nothing can be written at all, or where the file system has no locks, there is none to hold.

    Args:
        wait: until the other has ended, in place of raising.
        is_main: of the processes of this job, the one that holds the lock and speaks.
    Raises:
        UserError: another job writes there, and `wait` is not given; or the disk is full.
    """
    path = Path(directory) / LOCK
    with contextlib.ExitStack() as stack:
        if is_main:
            _hold(stack, path, wait)
        elif wait:
            me = Holder.me()
            while (holder := holder_of(path)) is not None and holder.job != me.job:
                time.sleep(WAIT_SECONDS)
        yield


def _hold(stack: contextlib.ExitStack, path: Path, wait: bool) -> None:
    told = None
    while True:
        try:
            stack.enter_context(lock(path))
            return
        except Held as held:
            if not wait:
                raise UserError(
                    f"{path.parent} is being written by {held}: wait for it with --wait, or choose another directory"
                ) from None
            if told != held.holder:
                told = held.holder
                print(f"Waiting for {held}, which writes {path.parent}", flush=True)
            time.sleep(WAIT_SECONDS)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                print(f"Note: the file system of {path.parent} has no locks: see that nothing else writes there")
            elif error.errno not in _READ_ONLY:
                raise UserError(f"{path.parent} can't be written: {error.strerror or error}") from None
            return
