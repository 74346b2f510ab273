"""Every read and write of factors and scores.

A stage's result is one or more .safetensors files and, beside them, a JSON manifest, written last: what made the
result (settings), what it counts, and a checksum of each file. So a result is there whole or not at all, and is used
again only for the very settings that made it.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from influence_core.errors import UserError
from influence_core.fingerprints import digest

Tensors = dict[str, Tensor]


class StageStore:
    """The stored result of one stage: `<directory>/<stage>.json` and the files that it names.

    Args:
        directory: made when something is written.
        stage: name of the manifest, such as "covariance".
        settings: all that determines the numbers, as JSON values; a stored result with others is refused.
    """

    def __init__(self, directory: Path, stage: str, settings: Mapping[str, Any]):
        self.directory, self.stage, self.settings = Path(directory), stage, dict(settings)

    @property
    def manifest_path(self) -> Path:
        return self.directory / f"{self.stage}.json"

    def manifest(self) -> dict[str, Any] | None:
        """The stored manifest, or None where the stage was not finished.

        Raises:
            UserError: unreadable, or made with other settings (the fields that differ are named).
        """
        try:
            manifest = json.loads(self.manifest_path.read_text())
            stored = dict(manifest["settings"])
            _ = [entry["sha256"] for entry in manifest["files"].values()]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{self.manifest_path} is not readable ({error}); {_REDO}") from None
        differing = differences(stored, self.settings)
        if differing:
            raise UserError(
                f"{self.manifest_path} was made with other settings: {differing}; {_REDO}, or choose another "
                "--output_dir"
            )
        return manifest

    def load(self, names: Collection[str] | None = None) -> dict[str, Tensors] | None:
        """{file stem: {name: tensor}}, all tensors or those named; None where the stage was not finished.

        Raises:
            UserError: as `manifest`, or a file that is missing, truncated or altered (named).
        """
        manifest = self.manifest()
        if manifest is None:
            return None
        return {
            Path(file).stem: _read_checked(self.directory / file, entry["sha256"], names)
            for file, entry in manifest["files"].items()
        }

    def save(self, files: Mapping[str, Tensors], counts: Mapping[str, Any] | None = None) -> None:
        """Write the files, then the manifest, then drop the progress."""
        paths = []
        for stem, tensors in files.items():
            paths.append(self.directory / f"{stem}.safetensors")
            write_tensors(paths[-1], tensors)
        self._finish(paths, counts)

    def _finish(self, paths: Sequence[Path], counts: Mapping[str, Any] | None) -> None:
        entries = {path.name: {"sha256": file_checksum(path), "bytes": path.stat().st_size} for path in paths}
        write_json(
            self.manifest_path,
            {
                "stage": self.stage,
                "settings": self.settings,
                "command": sys.argv,
                "counts": dict(counts or {}),
                "files": entries,
                "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")}
                | {"python": platform.python_version()},
            },
        )
        for path in self.directory.glob(f"{self.stage}.progress.*"):
            path.unlink()

    def save_columns(
        self, stem: str, name: str, block: Tensor, columns: range, num_columns: int, counts: Mapping[str, Any], runtime
    ) -> None:
        """As `save`, of one [rows, num_columns] tensor of which every process has, and writes, its own columns.

        Args:
            block: [rows, len(columns)], on the CPU. Every process calls this, and leaves when the result is whole.
        """
        if runtime.world_size == 1:
            self.save({stem: {name: block}}, counts)
            return
        path = self.directory / f"{stem}.safetensors"
        write_columns(path, name, block, columns, num_columns, runtime)
        if runtime.is_main:
            self._finish([path], counts)
        runtime.barrier()

    def checksum(self) -> str:
        """One checksum over the files of a finished stage: what a later stage says it was made from."""
        entries = self.manifest()["files"]
        return digest(entries[name]["sha256"].encode() for name in sorted(entries))

    def discard(self) -> None:
        """Forget a stored result: the manifest first, so that nothing half-removed is ever taken for whole."""
        try:
            names = list(json.loads(self.manifest_path.read_text())["files"])
        except (OSError, ValueError, LookupError, TypeError):
            names = []
        paths = [self.manifest_path, *(self.directory / Path(name).name for name in names)]
        for path in [*paths, *self.directory.glob(f"{self.stage}.progress.*")]:
            path.unlink(missing_ok=True)

    def adopt(self, other: "StageStore") -> None:
        """Take over the finished result of another store by links to its files; checked when it is loaded."""
        manifest = other.manifest()
        self.discard()
        for name in manifest["files"]:
            _write_whole(self.directory / name, lambda temporary, name=name: _link(other.directory / name, temporary))
        write_json(self.manifest_path, manifest)

    def save_progress(self, partition: Mapping[str, Any], step: int, tensors: Tensors) -> None:
        """Keep what a killed run needs to go on: partial results after `step` steps of this partition of the work."""
        record = json.dumps({"settings": self.settings, "partition": dict(partition), "step": step}, sort_keys=True)
        write_tensors(self._progress_path(partition), tensors, {"progress": record})

    def load_progress(self, partition: Mapping[str, Any]) -> tuple[int, Tensors] | None:
        """(step, tensors), or None where there is none for these settings and this partition of the work."""
        path = self._progress_path(partition)
        try:
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError):
            return None
        expected = json.loads(json.dumps({"settings": self.settings, "partition": dict(partition)}))
        if {key: record[key] for key in expected} != expected:
            return None
        return record["step"], tensors

    def _progress_path(self, partition: Mapping[str, Any]) -> Path:
        return self.directory / f"{self.stage}.progress.{partition.get('rank', 0)}.safetensors"


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Which of the wanted settings (JSON values) are stored otherwise, as text; empty if none is."""
    return "; ".join(
        f"{key} (stored {stored.get(key)}, now {value})" for key, value in wanted.items() if stored.get(key) != value
    )


_REDO = "use --overwrite to compute it again"


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def write_columns(path: Path, name: str, block: Tensor, columns: range, num_columns: int, runtime) -> None:
    """Write a .safetensors file of one [rows, num_columns] tensor, each process its own columns, whole or not at all.

    No process holds more than its columns. The main process reserves the space first, so that a full disk is an error
    there and then, and moves the file to its place when all have written.
    """
    block = block.contiguous()
    shape = (len(block), num_columns)
    size = shape[0] * shape[1] * block.element_size()
    entry = {"dtype": _DTYPE_NAMES[block.dtype], "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({name: entry}).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    temporary = path.with_name(f".{path.name}.columns")
    try:
        if runtime.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(header)
                file.flush()
                os.posix_fallocate(file.fileno(), 0, len(header) + size)
        runtime.barrier()
        if len(columns):
            whole = np.memmap(temporary, block.numpy().dtype, "r+", len(header), shape)
            whole[:, columns.start : columns.stop] = block.numpy()
            whole.flush()
        runtime.barrier()
        if runtime.is_main:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


_DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64"}  # as safetensors calls them


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    _write_whole(path, lambda temporary: Path(temporary).write_text(text))


def _write_whole(path: Path, write) -> None:
    """Temporary file, fsync, rename: a reader meets the old file or the new one, never a part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise UserError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}") from None


def _link(source: Path, target: str) -> None:
    """A hard link where the file system has them, a copy elsewhere."""
    if not source.exists():
        raise UserError(f"{source} is missing; {_REDO}")
    os.unlink(target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def require_writable(directory: Path) -> None:
    """Make the directory and prove that files can be written there; raises UserError otherwise."""
    probe = Path(directory) / ".writable"
    _write_whole(probe, lambda temporary: None)
    probe.unlink(missing_ok=True)  # another process may prove the same


def file_checksum(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_checked(path: Path, sha256: str, names: Collection[str] | None) -> Tensors:
    try:
        if file_checksum(path) == sha256:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if names is None or name in names}
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; {_REDO}") from None
    raise UserError(f"{path} is truncated or altered (its checksum is not the one recorded); {_REDO}")
