"""The bank of retrainings: each once, whoever asks, also when processes are killed; foreign ones refused."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from influence_core import progress
from influence_core.errors import UserError
from influence_core.experiments.bank import Retraining, RetrainingBank
from tests.scripts import contents

SETTINGS = {"initial_model": "abc", "learning_rate": 0.1}
NUM_TRAIN = 9


def plan(number=6):
    """Retrainings that each leave out another example."""
    return [Retraining.of(np.arange(NUM_TRAIN) != index, 7, index) for index in range(number)]


class Recorder:
    """A retraining that takes `seconds`, and a line of who did which in a file."""

    def __init__(self, log, seconds=0.0):
        self.log, self.seconds = log, seconds

    def __call__(self, retraining):
        with self.log.open("a") as log:
            log.write(f"{os.getpid()} {retraining.name}\n")
        time.sleep(self.seconds)
        return outcome(retraining)

    def done(self):
        """[(process, name)] in the order they were begun."""
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []


def outcome(retraining):
    kept = torch.tensor(retraining.indices, dtype=torch.float64)
    return {"measurement": kept.sum() + torch.arange(3) + retraining.seed / 2**32}


def work(directory, log, seconds, number, rank, world_size):
    RetrainingBank(directory, SETTINGS).complete(plan(number), Recorder(log, seconds), rank, world_size)


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_whole(directory, number=6):
    bank = RetrainingBank(directory, SETTINGS)
    for retraining in plan(number):
        assert torch.equal(bank.load(retraining)["measurement"], outcome(retraining)["measurement"])


def test_a_retraining_is_named_by_what_is_kept_and_the_seed():
    keep = np.array([True, False, True])
    names = {Retraining.of(keep, 1, 2).name, Retraining.of(~keep, 1, 2).name, Retraining.of(keep, 2, 1).name}
    assert len(names) == 3
    assert Retraining.of(keep, 1, 2) == Retraining.of(keep.astype(float), 1, 2)
    assert Retraining.of(keep, 1).indices == [0, 2]


def test_what_is_there_is_not_done_again(tmp_path):
    """Asked twice, with repetitions, in another order, and for more."""
    record = Recorder(tmp_path / "log")
    bank = RetrainingBank(tmp_path / "bank", SETTINGS)
    bank.complete(plan(3) + plan(3), record)
    assert len(record.done()) == 3
    before = contents(tmp_path / "bank")
    RetrainingBank(tmp_path / "bank", SETTINGS).complete(plan(6)[::-1], record)
    assert len(record.done()) == 6 and len({name for _, name in record.done()}) == 6
    assert contents(tmp_path / "bank").items() >= before.items()
    assert_whole(tmp_path / "bank")


@pytest.mark.parametrize("ranks", [[(0, 3), (1, 3), (2, 3)], [(0, 1), (0, 1)]], ids=["ranks", "two machines"])
def test_processes_share_the_work_and_do_nothing_twice(ranks, tmp_path):
    """Ranks of one run, or runs that know nothing of each other: all wait until everything is there."""
    arguments = tmp_path / "bank", tmp_path / "log", 0.1, 8
    processes = [start(*arguments, *rank) for rank in ranks]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    done = Recorder(tmp_path / "log").done()
    assert len(done) == 8 and len({name for _, name in done}) == 8
    assert len({process for process, _ in done}) > 1
    assert_whole(tmp_path / "bank", 8)


def test_a_killed_process_loses_only_the_retraining_in_hand(tmp_path):
    """SIGKILL in the middle; the next run does that one and what was missing, and the files are as ever."""
    directory, log = tmp_path / "bank", tmp_path / "log"
    process = start(directory, log, 0.3, 6, 0, 1)
    wait_for(lambda: len(Recorder(log).done()) == 3)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = {path.name: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")}
    assert len(finished) == 2
    begun = len(Recorder(log).done())
    work(directory, log, 0, 6, 0, 1)
    assert len(Recorder(log).done()) - begun == 6 - len(finished)
    assert all((directory / name).stat().st_mtime_ns == changed for name, changed in finished.items())
    assert_whole(directory)


def test_who_dies_leaves_its_retraining_to_the_others(tmp_path):
    """The other process waits for a retraining in other hands, and takes it over when they are gone."""
    directory, log = tmp_path / "bank", tmp_path / "log"
    dying = start(directory, log, 60, 1, 0, 1)
    wait_for(lambda: Recorder(log).done())
    other = start(directory, log, 0, 1, 0, 1)
    time.sleep(0.5)
    assert other.is_alive() and len(Recorder(log).done()) == 1
    os.kill(dying.pid, signal.SIGKILL)
    dying.join()
    other.join(30)
    assert other.exitcode == 0
    assert_whole(directory, 1)


def test_a_bank_made_otherwise_is_refused(tmp_path):
    """Naming what differs, and nothing else."""
    RetrainingBank(tmp_path, SETTINGS).complete(plan(1), Recorder(tmp_path / "log"))
    with pytest.raises(UserError, match=r"learning_rate \(stored 0.1, now 0.2\); choose another --bank_dir") as error:
        RetrainingBank(tmp_path, SETTINGS | {"learning_rate": 0.2})
    assert "initial_model" not in str(error.value)
    (tmp_path / "bank.json").write_text("{")
    with pytest.raises(UserError, match="bank.json is not readable"):
        RetrainingBank(tmp_path, SETTINGS)


@pytest.mark.parametrize("spoil", [lambda content: content[:-9], lambda content: b"", lambda content: None])
def test_a_spoiled_file_is_named(spoil, tmp_path):
    """Truncated, empty, or that of another retraining."""
    bank = RetrainingBank(tmp_path, SETTINGS)
    one, other = plan(2)
    bank.complete([one, other], Recorder(tmp_path / "log"))
    content = spoil(bank.path(one).read_bytes())
    bank.path(one).write_bytes(bank.path(other).read_bytes() if content is None else content)
    with pytest.raises(UserError, match=f"{one.name}.* is (damaged|of another)"):
        bank.load(one)


def test_a_retraining_that_fails_leaves_no_file_and_no_lock(tmp_path):
    """The error comes through, and the next run can try again."""
    bank = RetrainingBank(tmp_path, SETTINGS)

    def diverge(retraining):
        raise UserError("diverged")

    with pytest.raises(UserError, match="diverged"):
        bank.complete(plan(1), diverge)
    assert not list(tmp_path.glob("*.safetensors"))
    bank.complete(plan(1), Recorder(tmp_path / "log"))
    assert_whole(tmp_path, 1)


def test_a_bank_that_diverged_at_once_takes_other_settings(tmp_path):
    """Nothing was made with the first ones; but while somebody works with these, they stay."""

    def diverge(retraining):
        with pytest.raises(UserError, match="made otherwise: learning_rate"):
            RetrainingBank(tmp_path, SETTINGS | {"learning_rate": 0.01})
        raise UserError("the training loss is nan")

    with pytest.raises(UserError, match="nan"):
        RetrainingBank(tmp_path, SETTINGS).complete(plan(1), diverge)
    RetrainingBank(tmp_path, SETTINGS | {"learning_rate": 0.01}).complete(plan(1), Recorder(tmp_path / "log"))
    with pytest.raises(UserError, match="made otherwise: learning_rate"):
        RetrainingBank(tmp_path, SETTINGS)


def test_retrainings_of_another_recipe_are_refused_without_their_bank(tmp_path):
    """bank.json is gone: each tells itself what it is of."""
    RetrainingBank(tmp_path, SETTINGS).complete(plan(1), Recorder(tmp_path / "log"))
    (tmp_path / "bank.json").unlink()
    other = RetrainingBank(tmp_path, SETTINGS | {"learning_rate": 0.01})
    with pytest.raises(UserError, match=r"was made otherwise: learning_rate \(stored 0.1, now 0.01\)"):
        other.complete(plan(1), Recorder(tmp_path / "log"))
    assert len(Recorder(tmp_path / "log").done()) == 1


def test_who_waits_says_for_whom(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    process = start(tmp_path, tmp_path / "log", 3, 1, 0, 1)
    wait_for(lambda: Recorder(tmp_path / "log").done())
    work(tmp_path, tmp_path / "log", 0, 1, 0, 1)
    process.join()
    assert f"waiting for 1 of process {process.pid} on" in capfd.readouterr().err
    assert len(Recorder(tmp_path / "log").done()) == 1


def test_locks_of_finished_retrainings_are_gone(tmp_path):
    RetrainingBank(tmp_path, SETTINGS).complete(plan(2), Recorder(tmp_path / "log"))
    assert not list((tmp_path / "locks").iterdir()) and not list(tmp_path.glob("*.lock"))
