"""Every read and write of factors and scores, by files that are whole or absent (files.py).

A stage's result is one or more .safetensors files and, beside them, a sealed JSON manifest, written last: what made the
result (settings), what it counts, and a checksum of each file. So a result is there whole or not at all, and is used
again only for the very settings that made it.
"""

import json
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from influence_core.errors import UserError, first_line
from influence_core.files import (
    Damaged,
    Tensors,
    file_checksum,
    link_or_copy,
    read_sealed_json,
    read_sealed_tensors,
    remove_leftovers,
    write_columns,
    write_sealed_json,
    write_sealed_tensors,
    write_tensors,
    write_whole,
)
from influence_core.fingerprints import digest


class StageStore:
    """The stored result of one stage: `<directory>/<stage>.json` and the files that it names.

    Args:
        directory: made when something is written.
        stage: name of the manifest, such as "covariance".
        settings: all that determines the numbers, as JSON values; a stored result with others is refused.
        made_by: which run makes it, where that matters: one that computes again what it finds of others.
    """

    def __init__(self, directory: Path, stage: str, settings: Mapping[str, Any], made_by: str = ""):
        self.directory, self.stage, self.settings, self.made_by = Path(directory), stage, dict(settings), made_by

    @property
    def manifest_path(self) -> Path:
        return self.directory / f"{self.stage}.json"

    def manifest(self) -> dict[str, Any] | None:
        """The stored manifest, or None where the stage was not finished.

        Raises:
            UserError: unreadable, or made with other settings (the fields that differ are named).
        """
        try:
            manifest = read_sealed_json(self.manifest_path)
        except FileNotFoundError:
            return None
        except Damaged as reason:
            raise UserError(f"{self.manifest_path} is not readable ({reason}); {_REDO}") from None
        differing = differences(manifest["settings"], self.settings)
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
        paths = {stem: self.directory / f"{stem}.safetensors" for stem in files}

        def write(stem: str) -> None:
            write_tensors(paths[stem], files[stem])
            file_checksum(paths[stem])

        with ThreadPoolExecutor() as executor:  # one file is hashed while another is on its way to the disk
            list(executor.map(write, files))
        self._finish(list(paths.values()), counts)

    def _finish(self, paths: Sequence[Path], counts: Mapping[str, Any] | None) -> None:
        entries = {path.name: {"sha256": file_checksum(path), "bytes": path.stat().st_size} for path in paths}
        write_sealed_json(
            self.manifest_path,
            {
                "stage": self.stage,
                "settings": self.settings,
                "made_by": self.made_by,
                "command": sys.argv,
                "counts": dict(counts or {}),
                "files": entries,
                "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")}
                | {"python": platform.python_version()},
            },
        )
        self.tidy()

    def tidy(self) -> None:
        """Remove what a finished stage no longer needs, and what a killed process left; where that can be done."""
        with suppress(OSError):
            self._remove_progress()
            remove_leftovers(self.directory)

    def _remove_progress(self) -> None:
        for path in self.directory.glob(f"{self.stage}.progress.*"):
            path.unlink(missing_ok=True)

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

    def is_own(self) -> bool:
        """Whether the stored result, or what there is of it, is of the run that `made_by` names."""
        try:
            manifest = self.manifest() if self.made_by else None
        except UserError:
            return False
        return self.made_by != "" and (manifest is None or manifest["made_by"] == self.made_by)

    def checksum(self) -> str:
        """One checksum over the files of a finished stage: what a later stage says it was made from."""
        entries = self.manifest()["files"]
        return digest(entries[name]["sha256"].encode() for name in sorted(entries))

    def discard(self) -> None:
        """Forget a stored result: the manifest first, so that nothing half-removed is ever taken for whole."""
        try:
            names = list(read_sealed_json(self.manifest_path)["files"])
        except (OSError, Damaged):
            names = []
        try:
            for path in [self.manifest_path, *(self.directory / name for name in names)]:
                path.unlink(missing_ok=True)
            self._remove_progress()
        except OSError as error:
            raise UserError(f"{error.filename} can't be removed: {error.strerror}") from None

    def adopt(self, other: "StageStore") -> None:
        """Take over the finished result of another store by links to its files; checked when it is loaded."""
        manifest = other.manifest()
        self.discard()
        for name in manifest["files"]:
            if not (other.directory / name).exists():
                raise UserError(f"{other.directory / name} is missing; {_REDO}")
            write_whole(
                self.directory / name, lambda temporary, name=name: link_or_copy(other.directory / name, temporary)
            )
        write_sealed_json(self.manifest_path, manifest)

    def save_progress(self, partition: Mapping[str, Any], step: int, tensors: Tensors) -> None:
        """Keep what a killed run needs to go on: partial results after `step` steps of this partition of the work."""
        record = {"settings": self.settings, "partition": dict(partition), "made_by": self.made_by, "step": step}
        write_sealed_tensors(self._progress_path(partition), tensors, record)

    def load_progress(
        self, partition: Mapping[str, Any], note: Callable[[str], None] = print
    ) -> tuple[int, Tensors] | None:
        """(step, tensors), or None where there is none for these settings and this partition of the work.

        Args:
            note: called with a line where there was some that is damaged.
        """
        path = self._progress_path(partition)
        try:
            record, tensors = read_sealed_tensors(path)
        except FileNotFoundError:
            return None
        except Damaged as reason:
            note(f"Note: {path} is damaged ({reason}): this stage starts again")
            return None
        expected = json.loads(json.dumps({"settings": self.settings, "partition": dict(partition)}))
        if {key: record[key] for key in expected} != expected or (self.made_by and record["made_by"] != self.made_by):
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


def _read_checked(path: Path, sha256: str, names: Collection[str] | None) -> Tensors:
    try:
        if file_checksum(path) == sha256:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if names is None or name in names}
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or first_line(error)}; {_REDO}") from None
    raise UserError(f"{path} is truncated or altered (its checksum is not the one recorded); {_REDO}")
