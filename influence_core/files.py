"""Files that are written whole or not at all, and files that tell when they are no longer what was written.

A temporary has a name that nobody can foresee, beside the file that it becomes, and ends in PART: what a killed process
leaves is known by that, and removed by the next one that has the directory to itself. Files get the user's umask.

A sealed file carries a digest of all that it says: one flipped bit, and it is refused.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from influence_core.errors import UserError, first_line
from influence_core.fingerprints import digest, tensor_bytes

Tensors = dict[str, Tensor]
PART = ".part"  # the end of a temporary's name
DIGEST, RECORD = "digest", "record"  # in a sealed file
_DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64"}  # as safetensors calls them


class Damaged(Exception):
    """A file is not what was written; says how that is known."""


def write_whole(path: Path, write: Callable[[str], Any], apart: bool = False) -> None:
    """`write(temporary)`, fsync, rename: a reader meets the old file or the new one, never a part.

    Args:
        apart: in a directory of its own, for a library that puts temporaries of its own beside what it writes.
    Raises:
        UserError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if apart:
            leftover = tempfile.mkdtemp(PART, f".{path.name}.", path.parent)
            temporary = os.path.join(leftover, path.name)
        else:
            descriptor, leftover = tempfile.mkstemp(PART, f".{path.name}.", path.parent)
            os.close(descriptor)
            temporary = leftover
        try:
            write(temporary)
            _place(temporary, path)
        finally:
            _remove(Path(leftover))
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise UserError(f"{path} can't be written: {getattr(error, 'strerror', None) or first_line(error)}") from None


def _place(temporary: str | Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    as_user_wants(temporary)
    os.replace(temporary, path)


def as_user_wants(path: str | Path) -> None:
    """Give a file the permissions that the user's umask says."""
    with open("/proc/self/status") as status:  # to ask the system would change it, for all threads
        umask = next(int(line.split()[1], 8) for line in status if line.startswith("Umask"))
    os.chmod(path, 0o666 & ~umask)


def remove_leftovers(directory: Path, name: str = "") -> None:
    """Remove what killed processes left half-written in a directory, of one file's name or of all.

    Only for who holds the directory's lock, or the file's: what a living process writes looks the same.
    """
    for path in Path(directory).glob(f".{name}*{PART}"):
        _remove(path)


def _remove(path: Path) -> None:
    """A file or a directory with all in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def refuse_link(path: Path) -> None:
    """Raise UserError for a symbolic link where this program keeps a directory of its own: somebody planted it."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which is not followed: remove it")


def require_writable(directory: Path) -> None:
    """Make the directory and prove that files can be written there; raises UserError otherwise."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".writable.", suffix=PART):
            pass
    except OSError as error:
        raise UserError(f"{directory} can't be written: {error.strerror or error}") from None


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata), apart=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))


# ---------------------------------------------------------------------------------------------------------- sealed


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping of JSON values that `read_sealed_json` believes only as long as it is unchanged."""
    write_json(path, {**value, DIGEST: _digest_of(value)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What was written there.

    Raises:
        FileNotFoundError: nothing was.
        Damaged: it is something else now.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(first_line(error)) from None
    if not isinstance(value, dict) or DIGEST not in value:
        raise Damaged("it has no digest: altered, or of an earlier version of this program")
    if value.pop(DIGEST) != _digest_of(value):
        raise Damaged("it was altered: its digest is not that of what it says")
    return value


def write_sealed_tensors(path: Path, tensors: Tensors, record: Mapping[str, Any]) -> None:
    """Write tensors and a mapping of JSON values that `read_sealed_tensors` believes only as long as both are."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record, sort_keys=True)
    write_tensors(path, tensors, {RECORD: text, DIGEST: _digest_of_tensors(text, tensors)})


def read_sealed_tensors(path: Path) -> tuple[dict[str, Any], Tensors]:
    """(record, tensors) that were written there.

    Raises:
        FileNotFoundError, Damaged: as `read_sealed_json`.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata[DIGEST] == _digest_of_tensors(metadata[RECORD], tensors):
            return json.loads(metadata[RECORD]), tensors
    except FileNotFoundError:
        raise
    except KeyError:
        raise Damaged("it has no digest: altered, or of an earlier version of this program") from None
    except Exception as error:  # a damaged file may break its reader in any way
        raise Damaged(first_line(error)) from None
    raise Damaged("it was altered: its digest is not that of what it says")


def _digest_of(value: Mapping[str, Any]) -> str:
    return digest([json.dumps(value, sort_keys=True).encode()])


def _digest_of_tensors(record: str, tensors: Tensors) -> str:
    def parts():
        yield record.encode()
        for name in sorted(tensors):
            yield f"\n{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode()
            yield tensor_bytes(tensors[name])

    return digest(parts())


_hashed: dict[Path, tuple[tuple[int, ...], str]] = {}  # by this process: (which state of the file, its checksum)
_CLOCK_TICK = 20_000_000  # ns: within it, another change may leave a file's time as it is


def file_checksum(path: Path) -> str:
    """sha256 of a file's bytes; as it was, where this process has hashed them before and nobody has touched them."""
    before, now = os.stat(path), time.time_ns()
    known, checksum = _hashed.get(path, ((), ""))
    if known == _state(before):
        return checksum
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if before.st_mtime_ns < now - _CLOCK_TICK:
        _hashed[path] = _state(before), checksum
    return checksum


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# ------------------------------------------------------------------------------------------- by several processes


def write_columns(path: Path, name: str, block: Tensor, columns: range, num_columns: int, runtime) -> None:
    """Write a .safetensors file of one [rows, num_columns] tensor, each process its own columns, whole or not at all.

    No process holds more than its columns. The main process reserves the space first, so that a full disk is an error
    there and then, and moves the file to its place when all have written. The temporary's name is known to all, so it
    is made anew, and never through a link that somebody put there.
    """
    block = block.contiguous()
    shape = (len(block), num_columns)

    def write(file: BinaryIO, start: int) -> None:
        if len(columns):
            whole = np.memmap(file, block.numpy().dtype, "r+", start, shape)
            whole[:, columns.start : columns.stop] = block.numpy()
            whole.flush()

    _write_together(path, {name: (block.dtype, shape)}, lambda file, starts: write(file, starts[name]), runtime)


def write_parts(path: Path, tensors: Tensors, runtime) -> None:
    """Write a .safetensors file of which each process has some tensors, as `write_columns` does."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(file: BinaryIO, starts: Mapping[str, int]) -> None:
        for name, tensor in tensors.items():
            file.seek(starts[name])
            file.write(tensor_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())

    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _write_together(path, runtime.gathered(kinds), write, runtime)


def _write_together(path: Path, kinds: Mapping[str, tuple], write: Callable[[BinaryIO, dict], None], runtime) -> None:
    """Let each process write its own numbers.

    Args:
        kinds: {tensor: (dtype, shape)} of all of the file.
        write: is given the file, and where in it each tensor begins.
    """
    entries, starts, size = {}, {}, 0
    for name, (dtype, shape) in kinds.items():
        end = size + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [size, end]}
        starts[name], size = size, end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    temporary = path.with_name(f".{path.name}.columns{PART}")
    try:
        if runtime.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            with _opened(temporary, os.O_CREAT | os.O_EXCL) as file:
                file.write(header)
                file.flush()
                os.posix_fallocate(file.fileno(), 0, len(header) + size)
        runtime.barrier()
        with _opened(temporary) as file:
            write(file, {name: len(header) + start for name, start in starts.items()})
        runtime.barrier()
        if runtime.is_main:
            _place(temporary, path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


def _opened(path: Path, flags: int = 0):
    return open(os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600), "r+b")


def link_or_copy(source: Path, target: str) -> None:
    """A hard link where the file system has them, a copy elsewhere, in place of an empty file."""
    os.unlink(target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def which_differ(files: Mapping[str, str], directory: Path) -> Sequence[str]:
    """Of {file name: checksum}, those that are missing from a directory or are no longer the same."""
    return [
        name for name, checksum in files.items()
        if not (directory / name).is_file() or file_checksum(directory / name) != checksum
    ]  # fmt: skip
