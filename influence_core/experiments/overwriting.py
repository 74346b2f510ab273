"""--overwrite computes everything again, once: a requeued command goes on with what it had finished itself."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from influence_core.errors import UserError
from influence_core.files import Damaged, read_sealed_json, write_sealed_json
from influence_core.fingerprints import digest
from influence_core.locks import LOCK

NOTE = ".overwriting.json"  # in the directory, from the first start of such a command to its end
_NOT_OF_THE_WORK = ("given", "overwrite", "wait", "progress_interval", "show_queries")  # flags that change no result


@contextmanager
def overwriting(directory: Path, flags: Mapping[str, Any], is_main: bool, barrier: Callable[[], None]) -> Iterator[str]:
    """The name of this run: the same when the very same command is run again after it was interrupted.

    Args:
        flags: those of the command.
        is_main, barrier: of the processes that share the work; all of them enter.
    """
    path = directory / NOTE
    kept = {key: value for key, value in flags.items() if key not in _NOT_OF_THE_WORK}
    command = digest([json.dumps(kept, sort_keys=True, default=str).encode()])
    if is_main:
        try:
            is_same = read_sealed_json(path)["command"] == command
        except (OSError, Damaged):
            is_same = False
        if not is_same:
            write_sealed_json(path, {"command": command, "made_by": f"{command} {time.time_ns()}"})
    barrier()
    try:
        yield read_sealed_json(path)["made_by"]
    except UserError:
        if is_main and not is_same and not _anything_since(path):  # it was refused before any work
            path.unlink(missing_ok=True)
        raise
    barrier()
    if is_main:
        path.unlink(missing_ok=True)


def forget_overwriting(directory: Path) -> None:
    """For a command without --overwrite that has ended: what it left is not a killed --overwrite's any more."""
    with suppress(OSError):
        (directory / NOTE).unlink(missing_ok=True)


def _anything_since(note: Path) -> bool:
    """Whether a file beside the note, or below, is newer."""
    since = note.stat().st_mtime_ns
    return any(
        path.is_file() and path.stat().st_mtime_ns > since and path.name not in (note.name, LOCK)
        for path in note.parent.rglob("*")
    )
