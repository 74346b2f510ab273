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
import stat
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
        host, address = socket.gethostname(), os.environ.get("MASTER_ADDR", "")
        is_of_this_host = address in ("", "localhost", "127.0.0.1")
        rest = [os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID")]
        job = ":".join([host if is_of_this_host else address, *rest])
        return cls(host, os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), job)

    def __str__(self) -> str:
        host, since = (ascii(text)[1:-1][:100] for text in (str(self.host), str(self.since)))
        return f"process {self.process:d} on {host}, since {since}"


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
        with contextlib.suppress(OSError):  # another user's, that can be locked and not written
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
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        return Holder()
    with open(descriptor, "rb") as file:
        for _ in range(20):  # between taking and signing it, it is empty
            content = file.read(10_000)
            if content:
                break
            time.sleep(0.01)
    try:
        stored = json.loads(content)
        return Holder(str(stored["host"]), int(stored["process"]), str(stored["since"]), str(stored["job"]))
    except (ValueError, TypeError, KeyError):
        return Holder()


def _opened(path: Path) -> int:
    """The file, made where there is none; a regular one that has no other name, or its content would be another's."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        descriptor = os.open(path, os.O_RDONLY | flags)  # another user's: the lock holds for both
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.ELOOP, "what is there for a lock is a link or no file")
    return descriptor


def _acquire(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = _opened(path)
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
            with contextlib.suppress(OSError):
                while (holder := holder_of(path)) is not None and holder.job != Holder.me().job and is_held(path):
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
