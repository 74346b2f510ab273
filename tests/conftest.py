"""What several test files share."""

import contextlib
import os
import pty
import shutil
import subprocess
import termios

import datasets
import pytest
import torch

from influence_core import analysis
from tests.scripts import ANALYZE, ROOT, TRAIN, change_record, run

# Products this small lose more to a second thread, tenfold on a busy machine, than it gives; processes inherit it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint that train.py made at tiny size; copy it before changing anything."""
    directory = tmp_path_factory.mktemp("trained") / "checkpoint"
    run("train", *TRAIN, "--checkpoint_dir", directory).ok()
    return directory


@pytest.fixture(scope="session")
def results(checkpoint, tmp_path_factory):
    """(what analyze.py printed, its output directory) for that checkpoint, EKFAC; copy it before changing anything."""
    directory = tmp_path_factory.mktemp("analyzed") / "results"
    flags = ["--checkpoint_dir", checkpoint, "--output_dir", directory, "--factor_strategy", "ekfac"]
    return run("analyze", *ANALYZE, *flags).ok(), directory


@pytest.fixture
def unchecked(monkeypatch):
    """No check of the contract, whose runs of the model would be counted by tests of what the stages run."""
    monkeypatch.setattr(analysis, "check_contract", lambda *_: "not at all")


@pytest.fixture(scope="module")
def file_unchecked():
    """The same for all tests and fixtures of a file: not for a single test, as it would last into the next ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "check_contract", lambda *_: "not at all")
        yield


@pytest.fixture
def spoiled(checkpoint, tmp_path):
    """A copy of the checkpoint, to spoil: what is put there passes for what training left."""
    directory = shutil.copytree(checkpoint, tmp_path / "spoiled")
    change_record(directory, files={})
    return directory


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """The datasets library's cache, out of the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def terminal():
    """Run a command on a terminal: what it shows there."""

    def shown_by(command) -> str:
        ours, its = pty.openpty()
        termios.tcsetwinsize(its, (50, 200))
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=its, stderr=its, env=environment):
            os.close(its)
            shown = b""
            with contextlib.suppress(OSError):  # how Linux says that nobody has the other end any more
                while part := os.read(ours, 100_000):
                    shown += part
        os.close(ours)
        return shown.decode()

    return shown_by
