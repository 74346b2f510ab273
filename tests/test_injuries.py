"""Killed at any moment, damaged at any place: a rerun ends with what an uninjured run ends with, or a refusal."""

import json
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file

from influence_core.experiments import training as script_of_training
from tests.injuries import DAMAGES, events
from tests.scripts import ANALYZE, NUMBERS, TRAIN, contents, run

TRAIN_TWO = [*TRAIN, "--num_train_epochs", "2", "--save_at", "1"]
# Of the writes at which a run is killed.
THIRDS = [pytest.param(0, marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2))]
NOT_COMPARED = ("command", "made_by", "digest")  # of a manifest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """No power cut is tested, so the disk need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def essence(directory):
    """{path: content} of all files but a run's record, manifests without what tells one run from another."""
    found = {}
    for path, content in contents(directory).items():
        if path.endswith(".json") and b'"digest"' in content:
            value = json.loads(content)
            content = {key: value[key] for key in value if key not in NOT_COMPARED}
        found[path] = content
    found.pop("analysis.json", None)
    return found


def analyze_flags(checkpoint, output):
    strategies = ["--factor_strategy", "ekfac", "identity"]
    return [
        *ANALYZE,
        "--checkpoint_dir",
        checkpoint,
        "--output_dir",
        output,
        *strategies,
        "--progress_interval",
        "1e-9",
    ]


def killed_and_run_again(directory, expected, script, flags, at, number=signal.SIGKILL, again=()):
    """Kill the script at an event, run it again, and compare the directory with that of an uninjured run."""
    shutil.rmtree(directory, ignore_errors=True)
    _, code, _ = events(directory, script, *flags, kill_at=at, number=number)
    assert code in (-number, 128 + number), (at, code)
    run(script, *flags, *again).ok()
    assert essence(directory) == expected, f"killed at event {at}"


@pytest.fixture(scope="module")
def analysis(checkpoint, tmp_path_factory):
    """(directory, flags, what an uninjured run leaves there, number of its events)."""
    directory = tmp_path_factory.mktemp("analysis") / "results"
    flags = analyze_flags(checkpoint, directory)
    count, code, printed = events(directory, "analyze", *flags)
    assert code == 0, printed
    return directory, flags, essence(directory), count


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The same of train.py."""
    directory = tmp_path_factory.mktemp("training") / "checkpoint"
    flags = [*TRAIN_TWO, "--checkpoint_dir", directory]
    count, code, printed = events(directory, "train", *flags)
    assert code == 0, printed
    return directory, flags, essence(directory), count


@pytest.mark.parametrize("tenth", range(10))
def test_an_analysis_killed_at_some_writes(analysis, tenth):
    directory, flags, expected, count = analysis
    assert count > 60
    killed_and_run_again(directory, expected, "analyze", flags, count * tenth // 10)


@pytest.mark.parametrize("third", THIRDS)
def test_an_analysis_killed_at_every_write(analysis, third):
    directory, flags, expected, count = analysis
    for at in range(third, count, 3):
        killed_and_run_again(directory, expected, "analyze", flags, at)


@pytest.mark.parametrize("place", [0, 0.3, 0.6, -6, -4, -2])
def test_a_training_killed_at_some_writes(training, place):
    """A part of all, or the last ones: beside the record of a finished checkpoint nothing stays either."""
    directory, flags, expected, count = training
    killed_and_run_again(directory, expected, "train", flags, int(place * count) if place >= 0 else count + place)
    assert {path.name for path in directory.iterdir() if path.is_dir()} == {"step-2"}


def test_a_requeued_overwrite_of_a_new_directory(training):
    """Killed before there was a checkpoint: the directory is its own, and the state is gone on from."""
    directory, flags, expected, _ = training
    shutil.rmtree(directory)
    events(directory, "train", *flags, "--overwrite", kill_at="epoch-1.process-0.safetensors")
    assert "Going on after epoch 1 of 2" in run("train", *flags, "--overwrite").ok()
    assert essence(directory) == expected


def test_a_requeued_overwrite_trusts_no_checkpoint_that_changed(training, monkeypatch):
    """Killed in the final evaluation, then damaged: trained again, not believed."""
    directory, flags, expected, _ = training
    run("train", *flags).ok()
    monkeypatch.setattr(script_of_training, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    _, code, _ = events(directory, "train", *flags, "--overwrite")
    assert code == -signal.SIGKILL
    monkeypatch.undo()
    left = shutil.copytree(directory, directory.with_name("left"))
    assert "Found finished" in run("train", *flags, "--overwrite").ok()
    shutil.rmtree(directory)
    shutil.copytree(left, directory)
    (directory / "model.safetensors").write_bytes(b"garbage")
    assert "Found finished" not in run("train", *flags, "--overwrite").ok()
    assert essence(directory) == expected
    shutil.rmtree(left)


@pytest.mark.parametrize("third", THIRDS)
def test_a_training_killed_at_every_write(training, third):
    directory, flags, expected, count = training
    for at in range(third, count, 3):
        killed_and_run_again(directory, expected, "train", flags, at)


def test_a_terminated_run_says_how_to_go_on(analysis):
    """SIGTERM, in the midst of the work: one line, and a rerun ends as if nothing had been."""
    directory, flags, expected, count = analysis
    shutil.rmtree(directory)
    _, code, printed = events(directory, "analyze", *flags, kill_at=count // 2, number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "terminated; what was finished is stored" in printed
    assert "Traceback" not in printed
    run("analyze", *flags).ok()
    assert essence(directory) == expected


def test_a_requeued_overwrite_keeps_what_it_had_finished(analysis):
    directory, flags, expected, count = analysis
    run("analyze", *flags).ok()
    _, code, _ = events(directory, "analyze", *flags, "--overwrite", kill_at=count * 3 // 4)
    assert code == -signal.SIGKILL
    again = run("analyze", *flags, "--overwrite").ok()
    assert "Found finished" in again and "covariance.json" in again
    assert essence(directory) == expected
    assert "Found finished" not in run("analyze", *flags, "--overwrite").ok()


# ---------------------------------------------------------------------------------------------------------- damage


def damaged_runs(directory, flags, script, path, keep):
    """Run a script beside a file damaged in many ways: refused, nothing changed; or what was damaged is yielded."""
    original = (directory / path).read_bytes()
    for kind, damage in DAMAGES.items():
        for seed in range(keep):
            (directory / path).unlink()
            (directory / path).write_bytes(original)
            damage(directory / path, seed)
            before = (directory / path).read_bytes()
            outcome = run(script, *flags)
            what = f"{path} {kind}, seed {seed}"
            if outcome.code == 0:
                yield what
            else:
                outcome.error()
                assert (directory / path).read_bytes() == before, what
    (directory / path).unlink()
    (directory / path).write_bytes(original)


RESULTS = [
    "factors_ekfac/covariance.json", "factors_ekfac/activation_covariance.safetensors",
    "factors_ekfac/eigendecomposition.json", "factors_ekfac/gradient_eigenvectors.safetensors",
    "factors_ekfac/lambda.json", "factors_ekfac/lambda_matrix.safetensors",
    "scores_ekfac/pairwise_scores.json", "scores_ekfac/pairwise_scores.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("keep", [1, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("path", RESULTS)
def test_damaged_results_are_refused(path, keep, analysis):
    directory, flags, _, _ = analysis
    run("analyze", *flags).ok()
    scores = load_file(directory / "scores_ekfac" / "pairwise_scores.safetensors")["all_modules"].clone()
    for what in damaged_runs(directory, flags, "analyze", path, keep):
        stored = load_file(directory / "scores_ekfac" / "pairwise_scores.safetensors")["all_modules"]
        assert stored.equal(scores), what


@pytest.mark.parametrize("keep", [1, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("stage", ["covariance", "eigendecomposition", "lambda", "pairwise_scores"])
def test_damaged_progress_starts_its_stage_again(stage, keep, analysis):
    """A flipped bit anywhere, the number of steps, or a cut tail: a note, and the results of an uninjured run."""
    directory, flags, expected, _ = analysis
    name = f"{stage}.progress.0.safetensors"
    shutil.rmtree(directory)
    events(directory, "analyze", *flags, kill_at=name)
    left = shutil.copytree(directory, directory.with_name("left"), dirs_exist_ok=True)
    for kind, damage in DAMAGES.items():
        for seed in range(keep):
            shutil.rmtree(directory)
            shutil.copytree(left, directory)
            damage(next(directory.rglob(name)), seed)
            out = run("analyze", *flags).ok()
            assert "is damaged" in out and "starts again" in out, (kind, seed)
            assert essence(directory) == expected, (kind, seed)
    shutil.rmtree(left)


CHECKPOINT = ["training.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("keep", [1, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("path", CHECKPOINT)
def test_a_damaged_checkpoint_is_refused(path, keep, training, tmp_path):
    """Under a fresh output directory too: no preset's data, no other weights."""
    directory, train_flags, _, _ = training
    run("train", *train_flags).ok()
    flags = ["--preset", "demo", "--checkpoint_dir", directory, "--num_queries", "4", "--factor_strategy", "identity"]
    for what in damaged_runs(directory, [*flags, "--output_dir", tmp_path / "new"], "analyze", path, keep):
        raise AssertionError(f"{what} was analyzed")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("keep", [
    pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.exhaustive)
])  # fmt: skip
def test_damaged_retrainings_and_banks(keep, checkpoint, tmp_path):
    common = [*NUMBERS, "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "results"]
    flags = [*common, "--num_masks", "2", "--num_repeats", "1", "--figure_dir", tmp_path, "--scores", "tfidf"]
    run("evaluate_lds", *flags).ok()
    bank = tmp_path / "results" / "retrainings"
    assert {path.suffix for path in bank.iterdir()} == {".json", ".safetensors", ""}
    assert not list((bank / "locks").iterdir())
    for path in (bank / "bank.json", next(bank.glob("*.safetensors"))):
        for what in damaged_runs(bank, flags, "evaluate_lds", path.name, keep):
            raise AssertionError(f"{what} was used")
    (bank / "bank.json").unlink()
    run("evaluate_lds", *flags, "--learning_rate", "0.5").error("was made otherwise", "learning_rate")


@pytest.mark.slow
def test_a_damaged_state_of_training_is_not_gone_on_from(training):
    directory, flags, expected, _ = training
    name = "epoch-1.safetensors"
    shutil.rmtree(directory)
    events(directory, "train", *flags, kill_at="epoch-1.process-0.safetensors")
    left = shutil.copytree(directory, directory.with_name("left"), dirs_exist_ok=True)
    assert "Going on after epoch 1 of 2" in run("train", *flags).ok()
    assert essence(directory) == expected
    for kind, damage in DAMAGES.items():
        shutil.rmtree(directory)
        shutil.copytree(left, directory)
        damage(next(directory.rglob(name)), 0)
        assert "is damaged or not whole" in run("train", *flags).ok(), kind
        assert essence(directory) == expected, kind
    shutil.rmtree(left)
