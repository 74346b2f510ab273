"""Progress: a bar on a terminal; in a log file at most a line in 30 seconds, and nothing of other libraries."""

import contextlib
import io
import re
import sys

import datasets
import huggingface_hub
import pytest
from transformers.utils import logging as transformers_logging

from influence_core import progress
from influence_core.runtime import Runtime
from influence_core.tasks.bars import LONG_BYTES, bars_of_datasets, quiet_libraries
from tests.scripts import ANALYZE, NUMBERS, TRAIN, run_process

LINE = re.compile(r"^[A-Z][\w ]*: \d+% \d+/\d+ \[[\d:]+<[\d:?]+, +[\d.?]+s?[a-z/]+(, .*)?\]$")


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set forward: `clock.time`."""

    class Clock:
        time = 1000.0

    monkeypatch.setattr(progress, "now", lambda: Clock.time)
    monkeypatch.setattr(progress._Lines, "_last", None)
    return Clock


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def work(clock, seconds, steps, description="Work", **options):
    with progress.progress(steps, description, **options) as bar:
        for _ in range(steps):
            clock.time += seconds / steps
            bar.update()


@pytest.mark.parametrize("steps", [1, 29, 1000])
def test_short_work_says_nothing(steps, clock, capsys):
    work(clock, 29, steps)
    assert lines(capsys) == []


def test_a_line_in_thirty_seconds(clock, capsys):
    """Of 100 s: at 30, 60 and 90 s, and at the end; each a line of its own."""
    work(clock, 100, 1000)
    shown = lines(capsys)
    assert [re.search(r"\d+%", line)[0] for line in shown] == ["30%", "60%", "90%", "100%"]
    assert shown[0] == "Work: 30% 300/1000 [00:30<01:10, 10.00seq/s]"
    assert all(LINE.match(line) for line in shown)


def test_the_end_is_said_once(clock, capsys):
    work(clock, 60, 2)
    assert [line.split()[1] for line in lines(capsys)] == ["50%", "100%"]


def test_many_short_bars_are_one_process(clock, capsys):
    """A line in 30 seconds of them together, and none at their ends."""
    for number in range(50):
        work(clock, 6, 6, f"Bar {number}")
    assert len(lines(capsys)) == 300 // 30


def test_bars_at_once_are_one_process(clock, capsys):
    with progress.progress(300, "Outer") as outer, progress.progress(300, "Inner") as inner:
        for _ in range(290):
            clock.time += 1
            inner.update()
            outer.update()
        assert len(lines(capsys)) == 290 // 30


def test_no_steps_no_line(clock, capsys):
    with progress.progress(0, "Nothing to do"):
        clock.time += 100
    assert lines(capsys) == []


def test_what_was_done_before_took_no_time(clock, capsys):
    with progress.progress(100, "Train", unit="step") as bar:
        bar.start_from(50)
        clock.time += 40
        bar.note("loss=1.5", refresh=False)
        bar.update(10)
    assert lines(capsys) == ["Train: 60% 60/100 [00:40<02:40,  4.00s/step, loss=1.5]"]


def test_waiting_is_noted_as_seldom(clock, capsys):
    with progress.progress(3, "Retrain", unit="run") as bar:
        for _ in range(100):
            clock.time += 1
            bar.note("waiting for 3 of others")
    shown = lines(capsys)
    assert len(shown) == 3 and all(line.endswith("waiting for 3 of others]") for line in shown)


def test_written_lines_appear_at_once(clock, capsys):
    with progress.progress(3, "Train") as bar:
        bar.write("Going on after epoch 1 of 3")
    assert capsys.readouterr() == ("Going on after epoch 1 of 3\n", "")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_rank_0_only(is_terminal, clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_terminal", lambda: is_terminal)
    with Runtime(rank=1, world_size=2).progress(10, "Work") as bar:
        clock.time += 100
        bar.update()
        bar.note("a note")
        bar.start_from(3)
        bar.write("a line")
    assert capsys.readouterr() == ("", "")


def test_work_goes_on_though_nobody_reads(clock, monkeypatch):
    """Standard error is closed, or full."""
    monkeypatch.setattr(sys, "stderr", None)
    work(clock, 100, 10)
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        work(clock, 100, 10)
        with contextlib.suppress(OSError):
            sys.stderr.detach()


# ---------------------------------------------------------------------------------------------------- other libraries


@pytest.fixture
def on(monkeypatch):
    """On a terminal, or not."""

    def set_it(is_terminal):
        monkeypatch.setattr("influence_core.tasks.bars.is_terminal", lambda: is_terminal)

    return set_it


def are_shown():
    """(of transformers, of the Hub)"""
    return transformers_logging.is_progress_bar_enabled(), not huggingface_hub.utils.are_progress_bars_disabled()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_of_transformers_and_of_downloads(is_terminal, on):
    on(is_terminal)
    before = are_shown()
    with quiet_libraries():
        assert are_shown() == (False, is_terminal)
    assert are_shown() == before == (True, True)


@pytest.mark.parametrize("value", [True, False])
def test_what_a_user_set_for_the_hub_holds(value, on, monkeypatch, recwarn):
    on(False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", value)
    before = are_shown()
    with quiet_libraries():
        assert are_shown() == before
    assert not recwarn.list


@pytest.mark.parametrize("is_terminal, num_bytes, shown", [
    (True, LONG_BYTES, True), (True, LONG_BYTES - 1, False), (False, LONG_BYTES, False), (True, None, True),
    (False, None, False),
])  # fmt: skip
def test_bars_of_datasets(is_terminal, num_bytes, shown, on, tmp_path):
    """On a terminal where there is much to read, or to download."""
    on(is_terminal)
    if num_bytes is not None:
        with open(tmp_path / "rows.txt", "wb") as file:
            file.truncate(num_bytes)  # no blocks on disk
    with bars_of_datasets("somebody/dataset" if num_bytes is None else str(tmp_path)):
        assert datasets.are_progress_bars_disabled() is not shown
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("value", [True, False])
def test_what_a_user_set_for_datasets_holds(value, on, monkeypatch, recwarn):
    on(False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_DISABLE_PROGRESS_BARS", value)
    before = datasets.are_progress_bars_disabled()
    with bars_of_datasets("rows.txt"):
        assert datasets.are_progress_bars_disabled() is before
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------------- scripts


def data_of(directory):
    """Flags of a dataset of the user's own, which the datasets library reads."""
    directory.mkdir()
    for split in ("train", "validation"):
        (directory / f"{split}.txt").write_text("".join(f"line {n} of some words\n" for n in range(3000)))
    return ["--dataset_name_or_path", directory]


IN_HASTE = """
import runpy, sys
from influence_core import progress
progress.SECONDS_BETWEEN_LINES = float(sys.argv[1])
del sys.argv[:2]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(seconds, *command):
    """A script for which so many seconds are 30."""
    return ["-c", IN_HASTE, seconds, *command]


def test_a_log_file_has_lines(tmp_path):
    """With 0 for 30 seconds one for each step, and nothing by anybody else."""
    place = [*data_of(tmp_path / "data"), "--checkpoint_dir", tmp_path / "checkpoint"]
    command = ["wikitext_gpt2/train.py", *TRAIN, "--train_batch_size", "8", *place]
    outcome = run_process(script(0, *command), HF_HOME=str(tmp_path / "cache"))
    outcome.ok()
    shown = outcome.err.splitlines()
    assert "\r" not in outcome.err and all(LINE.match(line) for line in shown), outcome.err
    assert sum(line.startswith("Train: ") for line in shown) == 8
    assert {line.split(":")[0] for line in shown} == {"Train", "Evaluate"}


@pytest.mark.slow
def test_the_log_files_of_short_work_are_empty(tmp_path):
    """Of every script, with data that the datasets library reads: no bar, no warning, nothing at all."""
    place = [*data_of(tmp_path / "data"), "--checkpoint_dir", tmp_path / "checkpoint"]
    place_of_results = ["--output_dir", tmp_path / "results"]
    retrain = [*NUMBERS, *place, *place_of_results, "--figure_dir", tmp_path / "figure", "--num_repeats", "1"]
    for command in (
        ["train.py", *TRAIN, *place],
        ["analyze.py", *ANALYZE, *place, *place_of_results],
        ["evaluate_lds.py", *retrain, "--num_masks", "3"],
        ["run_counterfactual.py", *retrain, "--removal_sizes", "0", "8"],
    ):
        outcome = run_process([f"wikitext_gpt2/{command[0]}", *command[1:]], HF_HOME=str(tmp_path / "cache"))
        assert outcome.ok() and outcome.err == ""


@pytest.mark.slow
def test_torchrun_logs_of_rank_0_alone(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", sys.executable]
    command = ["wikitext_gpt2/train.py", *TRAIN, "--train_batch_size", "8", "--checkpoint_dir", tmp_path / "checkpoint"]
    outcome = run_process([*torchrun, *script(0, *command)])
    outcome.ok()
    shown = [line for line in outcome.err.splitlines() if line.startswith("Train: ")]
    assert len(shown) == 4 and all(LINE.match(line) for line in shown) and "\r" not in outcome.err, outcome.err


@pytest.mark.slow
def test_a_terminal_has_bars(terminal, tmp_path):
    """Of this project, with what tqdm writes to move in them; not of transformers."""
    command = ["wikitext_gpt2/train.py", *TRAIN, "--checkpoint_dir", tmp_path / "checkpoint"]
    shown = terminal([sys.executable, *command])
    assert re.search(r"\rTrain: 100%\|█+\| 2/2 \[", shown) and "\rEvaluate: " in shown
    assert "\\r" not in shown and "\\x1b" not in shown
    assert "Writing model shards" not in shown and "Loading weights" not in shown


def test_a_stream_without_isatty(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not progress.is_terminal()
