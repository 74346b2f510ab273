"""A stage's files are written while the next one is computed, as on a GPU: the same results, and no failure unsaid."""

import threading
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from influence_core import storage
from influence_core.averaging import analyze_checkpoints
from influence_core.errors import UserError
from influence_core.factors import fit
from influence_core.factors import strategies as factors
from influence_core.scores.stored import SCORES
from influence_core.storage import StageStore
from influence_core.writer import Writer
from tests.studies import STRATEGIES, make_study, score


def numbers(directory):
    """{file: {name: tensor}} of all that is stored."""
    return {path.relative_to(directory): load_file(path) for path in sorted(directory.rglob("*.safetensors"))}


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing takes as long as some batches; notes in which threads it was done."""
    threads, write = [], storage.write_tensors

    def slow(*arguments):
        threads.append(threading.current_thread())
        time.sleep(0.05)
        write(*arguments)

    monkeypatch.setattr(storage, "write_tensors", slow)
    return threads


def study_with(directory, beside):
    study = make_study(directory)
    study.writer = Writer(beside)
    return study


def test_results_are_those_of_a_writer_that_is_waited_for(tmp_path, slow_disk, monkeypatch):
    """All strategies, one of which takes over another's finished stages; and the files, to the last bit."""
    begun = []
    decompose_all = fit.decompose_all

    def noting(*arguments):
        begun.append((tmp_path / "beside" / "factors_ekfac" / "covariance.json").exists())
        return decompose_all(*arguments)

    monkeypatch.setattr(fit, "decompose_all", noting)
    scores = {}
    for how in ("waited for", "beside"):
        study = study_with(tmp_path / how, how == "beside")
        scores[how] = score(study, ["ekfac", "kfac", "diagonal", "identity"])
        assert not study.writer.pending and study.writer.pool is None
    assert begun[-1] is False, "decompositions wait for no covariance to be on the disk"
    for strategy in STRATEGIES:
        assert torch.equal(scores["waited for"][strategy], scores["beside"][strategy])
    expected, found = (numbers(tmp_path / how) for how in ("waited for", "beside"))
    assert expected.keys() == found.keys()
    for path, tensors in expected.items():
        assert all(torch.equal(tensors[name], found[path][name]) for name in tensors), path
    again = study_with(tmp_path / "beside", True)
    assert torch.equal(score(again, ["ekfac"])["ekfac"], scores["beside"]["ekfac"])


@pytest.mark.parametrize(
    "failing", ["activation_covariance", "gradient_eigenvectors", "lambda_matrix", "pairwise_scores"]
)
def test_a_failure_is_said_and_what_was_finished_stays(tmp_path, monkeypatch, failing):
    """A full disk, at any stage: one line, no manifest without its files; the next run makes what is missing."""
    write = storage.write_tensors

    def full(path, tensors, *rest):
        if path.stem == failing:
            time.sleep(0.05)
            raise UserError(f"{path} can't be written: No space left on device")
        write(path, tensors, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_tensors", full)
        with pytest.raises(UserError, match=f"{failing}.safetensors can't be written: No space left"):
            score(study_with(tmp_path / "one", True), ["ekfac"])
    for manifest in (tmp_path / "one").rglob("*.json"):
        store = StageStore(manifest.parent, manifest.stem, {})
        assert store.load(), manifest
    resumed = score(study_with(tmp_path / "one", True), ["ekfac"])["ekfac"]
    assert torch.equal(resumed, score(study_with(tmp_path / "two", False), ["ekfac"])["ekfac"])


def test_means_over_checkpoints_are_on_the_disk_when_the_call_returns(tmp_path, slow_disk):
    study = study_with(tmp_path / "all", True)
    checkpoints = {name: partial(study_with, tmp_path / "all" / name, True) for name in ("one", "two")}
    queries = study.task.load_dataset("validation")
    means = analyze_checkpoints(study, checkpoints, ["identity", "ekfac"], queries)
    for strategy, mean in means.items():
        stored = load_file(tmp_path / "all" / f"scores_{strategy}" / "pairwise_scores.safetensors")
        assert torch.equal(stored[SCORES], mean)
        assert (tmp_path / "all" / f"scores_{strategy}" / "pairwise_scores.json").exists()


@pytest.mark.parametrize("strategies", [["kfac", "ekfac"], ["ekfac", "kfac"]], ids="-".join)
def test_strategies_share_their_eigenvectors_whichever_comes_first(tmp_path, monkeypatch, strategies):
    made = []
    basis = factors.Eigenbasis
    monkeypatch.setattr(factors, "Eigenbasis", lambda *arguments: made.append(1) or basis(*arguments))
    score(study_with(tmp_path, True), strategies)
    assert len(made) == 3  # one a layer


def test_an_error_elsewhere_is_the_one_that_is_raised(tmp_path):
    def fail():
        raise UserError("disk")

    with pytest.raises(KeyError), Writer(beside=True) as writer:
        writer.do(tmp_path / "a", fail)
        raise KeyError
    with pytest.raises(UserError, match="disk"), writer:
        writer.do(tmp_path / "a", fail)


def test_who_asks_waits(tmp_path):
    writer, done = Writer(beside=True), []
    with writer:
        writer.do(tmp_path / "a", lambda: (time.sleep(0.05), done.append("a")))
        writer.wait(tmp_path / "b")
        assert not done
        writer.wait(tmp_path / "a")
        assert done == ["a"]
