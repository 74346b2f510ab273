"""Every read and write of factors and scores, by files that are whole or absent (files.py).

A stage's result is one or more .safetensors files and, beside them, a sealed JSON manifest, written last: what made the
result (settings), what it counts, and a checksum of each file. So a result is there whole or not at all, and is used
again only for the very settings that made it.
"""

import json
import platform
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
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
    write_parts,
    write_sealed_json,
    write_sealed_tensors,
    write_tensors,
    write_whole,
)
from influence_core.fingerprints import digest
from influence_core.writer import Writer


class StageStore:
    """The stored result of one stage: `<directory>/<stage>.json` and the files that it names.

    Args:
        directory: made when something is written.
        stage: name of the manifest, such as "covariance".
        settings: all that determines the numbers, as JSON values; a stored result with others is refused. A value that
            is not known yet may be a function that gives it when it is needed.
        made_by: which run makes it, where that matters: one that computes again what it finds of others.
        writer: writes the result, perhaps beside what follows. Whoever asks for it waits.
    """

    def __init__(
        self,
        directory: Path,
        stage: str,
        settings: Mapping[str, Any],
        made_by: str = "",
        writer: Writer | None = None,
    ):
        self.directory, self.stage, self.made_by = Path(directory), stage, made_by
        self._settings, self.writer = dict(settings), writer or Writer()
        self._at_hand: dict[str, Tensors] | None = None  # what was just saved

    @property
    def settings(self) -> dict[str, Any]:
        return _known(self._settings)

    def add_settings(self, **settings) -> None:
        """Those that are known by now."""
        self._settings |= settings

    @property
    def manifest_path(self) -> Path:
        return self.directory / f"{self.stage}.json"

    def manifest(self) -> dict[str, Any] | None:
        """The stored manifest, or None where the stage was not finished.

        Raises:
            UserError: unreadable, or made with other settings (the fields that differ are named).
        """
        self.writer.wait(self.manifest_path)
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
        if self._at_hand is not None:
            files, self._at_hand = self._at_hand, None
            return {
                stem: {name: x for name, x in tensors.items() if names is None or name in names}
                for stem, tensors in files.items()
            }
        manifest = self.manifest()
        if manifest is None:
            return None
        return {
            Path(file).stem: _read_checked(self.directory / file, entry["sha256"], names)
            for file, entry in manifest["files"].items()
        }

    def save(self, files: Mapping[str, Tensors], counts: Mapping[str, Any] | None = None) -> None:
        """Write the files, then the manifest, then drop the progress.

        Beside what follows, the copies that are written serve the next `load` as well.
        """
        files = {stem: {name: x.detach().cpu().contiguous() for name, x in files[stem].items()} for stem in files}
        if self.writer.beside:
            self._at_hand = files
        self.writer.do(self.manifest_path, partial(self._write, files, counts))

    def _write(self, files: Mapping[str, Tensors], counts: Mapping[str, Any] | None) -> None:
        paths = {stem: self.directory / f"{stem}.safetensors" for stem in files}

        def write(stem: str) -> tuple[Path, str]:
            write_tensors(paths[stem], files[stem])
            return paths[stem], file_checksum(paths[stem])

        with ThreadPoolExecutor() as executor:  # one file is hashed while another is on its way to the disk
            checksums = dict(executor.map(write, files))
        self._finish(checksums, counts)

    def _finish(self, checksums: Mapping[Path, str], counts: Mapping[str, Any] | None) -> None:
        entries = {path.name: {"sha256": checksums[path], "bytes": path.stat().st_size} for path in checksums}
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
        self._tidy(entries)

    def tidy(self) -> None:
        """Remove what a finished stage needs no longer, and what a killed one left of it, where that can be done."""
        self._tidy(self.manifest()["files"])

    def _tidy(self, names: Collection[str]) -> None:
        with suppress(OSError):
            self._remove_progress()
            for name in (self.stage, *names):
                remove_leftovers(self.directory, name)

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
            self._finish({path: file_checksum(path)}, counts)
        runtime.barrier()

    def save_parts(self, files: Mapping[str, Tensors], counts: Mapping[str, Any], runtime) -> None:
        """As `save`, of files of which every process has, and writes, some tensors; all leave when it is whole."""
        paths = [self.directory / f"{stem}.safetensors" for stem in files]
        for path, tensors in zip(paths, files.values()):
            write_parts(path, tensors, runtime)
        if runtime.is_main:
            self._finish({path: file_checksum(path) for path in paths}, counts)
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
        record = {"settings": self.settings, "partition": _known(partition), "made_by": self.made_by, "step": step}
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
        expected = json.loads(json.dumps({"settings": self.settings, "partition": _known(partition)}))
        if {key: record[key] for key in expected} != expected or (self.made_by and record["made_by"] != self.made_by):
            return None
        return record["step"], tensors

    def _progress_path(self, partition: Mapping[str, Any]) -> Path:
        return self.directory / f"{self.stage}.progress.{partition.get('rank', 0)}.safetensors"


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are functions are called by now."""
    return {key: value() if callable(value) else value for key, value in values.items()}


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
