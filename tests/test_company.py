"""Several processes, several users, a disk that others share: one writer, files as the umask says, no link followed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from influence_core.errors import UserError
from influence_core.files import PART, write_columns, write_json, write_sealed_json, write_tensors
from influence_core.launch import Launch
from influence_core.locks import Held, Holder, holder_of, is_held, lock, only_writer
from influence_core.runtime import Runtime
from tests.scripts import ANALYZE, ROOT, TRAIN, contents, run, run_process

# ------------------------------------------------------------------------------------------------------------- locks

HOLD = "from influence_core.locks import lock; from pathlib import Path; import sys\n"
HOLD += "with lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def held(tmp_path):
    """A lock that another process holds: (its path, the process)."""
    path = tmp_path / "results" / ".lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.wait()


def test_a_lock_says_who_holds_it(held):
    path, process = held
    with pytest.raises(Held) as raised, lock(path):
        pass
    assert raised.value.holder.process == process.pid and raised.value.holder.host == Holder.me().host
    assert is_held(path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_blocks_nobody(held, number):
    path, process = held
    process.send_signal(number)
    process.wait()
    assert path.exists() and not is_held(path) and not path.exists()
    with lock(path):
        assert holder_of(path).process == os.getpid()
    assert not path.exists()


def test_a_second_analysis_says_who_holds_the_directory(held, checkpoint):
    path, process = held
    flags = [*ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", path.parent, "--factor_strategy", "identity"]
    run("analyze", *flags).error(f"is being written by process {process.pid} on", "--wait")
    assert list(contents(path.parent)) == [".lock"]
    threading.Timer(2, process.stdin.close).start()
    out = run("analyze", *flags, "--wait").ok()
    assert out.count(f"Waiting for process {process.pid} on") == 1 and "Scores (identity)" in out
    assert not path.exists()


def test_a_second_training_too(held):
    path, process = held
    run("train", *TRAIN, "--checkpoint_dir", path.parent).error(f"by process {process.pid} on")


def test_many_that_lock_in_turn_are_never_two(tmp_path):
    """Also while the file is removed and made anew."""
    inside, most, done = [], [], []

    def work():
        for _ in range(30):
            while True:
                try:
                    with lock(tmp_path / "lock"):
                        inside.append(1)
                        most.append(len(inside))
                        time.sleep(0.0005)
                        inside.pop()
                    break
                except Held:
                    time.sleep(0.0003)
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 6 and max(most) == 1


def test_where_nothing_can_be_written_finished_results_are_read(checkpoint, results, monkeypatch, tmp_path):
    """A disk that is mounted read-only, as far as a test that may be root's can make one."""
    flags = [*ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", results[1], "--factor_strategy", "ekfac"]
    before, really = contents(results[1]), os.open

    def refuse(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(results[1]) in str(path):
            raise OSError(30, "Read-only file system")
        return really(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert "Scores (ekfac)" in run("analyze", *flags).ok()
    run("analyze", *flags, "identity").error("Read-only file system")
    assert contents(results[1]) == before


# ----------------------------------------------------------------------------------------------------------- torchrun

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize("environment, told", [
    (TORCHRUN, "add --use_ddp"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set in the environment and RANK is not"),
    ({"RANK": "0"}, "RANK is set in the environment and LOCAL_RANK is not"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set"),
    (TORCHRUN | {"RANK": "x"}, "nothing that torchrun sets"),
    (TORCHRUN | {"RANK": "2"}, "nothing that torchrun sets"),
    (TORCHRUN | {"LOCAL_RANK": "-1"}, "nothing that torchrun sets"),
])  # fmt: skip
def test_half_of_an_environment_is_refused(environment, told, checkpoint, tmp_path, monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flags = [*ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "results"]
    outcome = run("analyze", *flags)
    assert outcome.code == 2 and told in outcome.err and not (tmp_path / "results").exists()
    if environment is not TORCHRUN:
        with pytest.raises(UserError, match=told):
            Launch.here()


def test_alone_is_no_environment(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert Launch.here() == Launch(0, 0, 1)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
        write_tensors(tmp_path / "b.safetensors", {"x": torch.ones(2)})
        write_columns(tmp_path / "c.safetensors", "x", torch.ones(2, 3), range(3), 3, Runtime())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_a_checkpoint_has_them_too(tmp_path, checkpoint):
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in checkpoint.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("name", [f".c.safetensors.columns{PART}", ".c.safetensors.columns", "c.safetensors"])
def test_a_planted_link_is_not_followed(name, tmp_path):
    """Who may write into a shared directory can't have another file overwritten by the one who works there."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / name).symlink_to(victim)
    write_columns(tmp_path / "results" / "c.safetensors", "x", torch.ones(2, 3), range(3), 3, Runtime())
    assert victim.read_text() == "precious" and not (tmp_path / "results" / "c.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["step-2", ".training"])
def test_a_planted_directory_is_not_followed(name, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "epoch-1.safetensors").write_text("precious")
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    flags = [*TRAIN, "--num_train_epochs", "2", "--save_at", "1", "--train_batch_size", "32"]
    write_sealed_json(directory / "training.json", {"unfinished": True})
    (directory / name).symlink_to(victim)
    run("train", *flags, "--checkpoint_dir", directory).error(f"{name} is a symbolic link")
    assert list(contents(victim)) == ["epoch-1.safetensors"]


def test_a_lock_that_is_another_name_of_a_file_is_not_written(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.link(victim, tmp_path / ".lock")
    with pytest.raises(UserError, match="link or no file"), only_writer(tmp_path, wait=False):
        pass
    assert victim.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_two_users_are_not_both_in():
    """The second can't write the first one's lock, and meets it all the same."""
    with tempfile.TemporaryDirectory() as name, lock(Path(name) / ".lock"):
        directory = Path(name)
        os.chmod(directory, 0o777)
        os.chmod(directory / ".lock", 0o644)
        child = os.fork()
        if child == 0:
            code = 3
            try:
                os.setresuid(4002, 4002, 4002)
                with only_writer(directory, wait=False):
                    code = 0
            except UserError as error:
                code = 2 if f"process {os.getppid()} on" in str(error) else 4
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2


def test_a_planted_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match="can't be written"), only_writer(tmp_path, wait=False):
        pass
    assert victim.read_text() == "precious"


# ------------------------------------------------------------------------------------------------------------- output


def script(*flags):
    return ["wikitext_gpt2/analyze.py", *flags]


@pytest.fixture(scope="module")
def reading(checkpoint, results):
    """A call of analyze.py that finds everything finished."""
    return script(*ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", results[1], "--factor_strategy", "ekfac")


@pytest.mark.slow
def test_an_ascii_terminal_gets_replacements(reading):
    outcome = run_process(reading, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert "Scores (ekfac)" in outcome.ok() and outcome.out.isascii()


@pytest.mark.parametrize("where", ["> /dev/full", pytest.param("| true", marks=pytest.mark.slow)])
def test_an_output_that_nobody_takes(where, reading):
    command = " ".join(map(str, [sys.executable, *reading]))
    line = f"set -o pipefail; {command} {where}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error", "Traceback", "Exception"))]
    assert done.returncode == 2 and len(errors) == 1 and "the output can't be written" in errors[0], done.stderr


def test_a_closed_output_is_as_none(reading):
    command = " ".join(map(str, [sys.executable, *reading]))
    done = subprocess.run(["bash", "-c", f"{command} >&-"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_control_characters_of_training_text_are_shown(tmp_path):
    """ESC, BEL, BS and NUL would move the cursor, ring, erase what stands there, or worse."""
    text = "ab\x1b[31mred\x07 \x08\x08 c\x00d \u202egnirts\n"
    (tmp_path / "text.txt").write_text(text * 200)
    data = ["--dataset_name_or_path", tmp_path / "text.txt", "--block_size", "32"]
    overrides = ["--config_overrides", "n_layer=1,n_embd=16,n_head=2,n_positions=32", "--vocab_size", "400"]
    flags = ["--preset", "demo", *data, "--checkpoint_dir", tmp_path / "checkpoint"]
    run("train", *flags, *overrides, "--num_train_epochs", "0", "--num_train", "40").ok()
    more = ["--factor_strategy", "identity", "--output_dir", tmp_path / "results", "--num_queries", "2"]
    out = run("analyze", *flags, *more, "--num_train", "40").ok()
    assert "\\x1b[31mred\\x07" in out and "\\u202e" in out
    assert not {"\x1b", "\x07", "\x08", "\x00", "\u202e"} & {*out}


def test_the_record_of_a_training_is_sealed(checkpoint):
    assert json.loads((checkpoint / "training.json").read_text())["digest"]


def test_a_refusal_leaves_no_directory_nor_those_above_it(checkpoint, tmp_path):
    flags = [*ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "a" / "b" / "c"]
    run("analyze", *flags, "--tracked_layers", "no_such_layer").error("no layer")
    assert not list(tmp_path.iterdir())
