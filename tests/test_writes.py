"""Every write is whole or absent, and one that fails says so in a line."""

import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from influence_core import files
from influence_core.errors import UserError
from influence_core.files import write_json, write_tensors
from influence_core.storage import StageStore
from tests.scripts import contents

FAILURES = {
    "OSError": OSError(28, "No space left on device"),
    "SafetensorError": SafetensorError("I/O error: no space"),
}


@pytest.mark.parametrize("failure", [*FAILURES, "KeyboardInterrupt"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch, failure, existing):
    """Half a file is never left, under no name, and an older one stays; a full disk is told in a line."""
    path = tmp_path / "factors.safetensors"
    if existing:
        write_tensors(path, {"old": torch.ones(3)})
    before = contents(tmp_path)
    error = FAILURES.get(failure, KeyboardInterrupt())

    def fail(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half a file")
        raise error

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(UserError if failure in FAILURES else KeyboardInterrupt) as raised:
        write_tensors(path, {"new": torch.zeros(3)})
    assert failure not in FAILURES or str(path) in str(raised.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_file_too_large_for_the_disk_is_told(tmp_path, kind):
    """The real failure, by the process's limit on file sizes: a UserError with the path, and nothing left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=str(tmp_path / "large")):
            if kind == "json":
                write_json(tmp_path / "large.json", ["x" * 100_000])
            else:
                write_tensors(tmp_path / "large.safetensors", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == {}


def test_a_stage_without_its_manifest_is_not_finished(tmp_path):
    """The manifest is written last: where it could not be, the stage counts as not done."""
    store = StageStore(tmp_path, "stage", {"a": 1})
    (tmp_path / "stage.json").mkdir()  # so that the manifest can't be written
    with pytest.raises(UserError):
        store.save({"numbers": {"x": torch.ones(2)}})
    (tmp_path / "stage.json").rmdir()
    assert store.load() is None


def test_a_tensor_file_can_be_read_by_others(tmp_path):
    """The file is as readable as other files are: the temporary file's private mode does not stay."""
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o044 == 0o044
