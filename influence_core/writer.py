"""Writing beside computing: a stage's files go to the disk while the next stage is computed already."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from influence_core.errors import UserError


class Writer:
    """`with writer: …`: on leaving, all is written, or the first failure is raised.

    Args:
        beside: jobs are done one after the other in a thread of their own; else at once, by whoever has them done.
    """

    def __init__(self, beside: bool = False):
        self.beside = beside
        self.pool: ThreadPoolExecutor | None = None
        self.pending: dict[Path, Future] = {}

    def do(self, path: Path, job: Callable[[], None]) -> None:
        """Have a job done, after which the path is there."""
        if not self.beside:
            job()
            return
        self.pool = self.pool or ThreadPoolExecutor(1)
        self.pending[path] = self.pool.submit(job)

    def wait(self, path: Path) -> None:
        """Until the path is there, if it is to come; raises what the job raised."""
        if (future := self.pending.get(path)) is not None:
            future.result()
            self.pending.pop(path, None)  # a job may wait for an earlier one's, too

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """A failure beside another error stays unsaid: that one ended the run."""
        try:
            with suppress(*[] if error is None else [UserError]):
                for path in list(self.pending):
                    self.wait(path)
        finally:
            self.pending.clear()
            if self.pool is not None:
                self.pool.shutdown()
                self.pool = None
