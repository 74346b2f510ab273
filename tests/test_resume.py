"""A run that was stopped inside a stage and started again, against one that was not: the same bytes, nothing twice."""

import os
from dataclasses import replace

import pytest
import torch

from influence_core import analysis
from influence_core.factors import fit
from influence_core.runtime import Runtime
from influence_core.scores import plan as planning
from influence_core.scores.plan import Plan
from influence_core.task import EXAMPLE_INDEX
from tests.studies import make_study, score
from tests.tiny import TinyTask

pytestmark = pytest.mark.usefixtures("file_unchecked")  # what is counted here is what the stages run

FACTOR_BATCHES, TRAIN_BATCHES = 7, 6  # of 40 training examples, 6 and 7 at a time


class Stopped(Exception):
    """As if the process had been killed."""


class StoppingTask(TinyTask):
    """Notes the examples of every loss, and stops instead of giving the one after `stop_after` training losses.

    Attributes:
        losses: [(is it of sampled labels, example indices)], in the order of the calls.
        measured: queries measured, batch by batch.
    What the planner looks at, one example alone, is not noted; no other batch here is like that.
    """

    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after = stop_after
        self.losses, self.measured = [], []

    def train_loss(self, model, batch, sample_labels=None):
        indices = batch[EXAMPLE_INDEX].tolist()
        if len(set(indices)) > 1:
            if len(self.losses) == self.stop_after:
                raise Stopped
            self.losses.append((sample_labels is not None, indices))
        return super().train_loss(model, batch, sample_labels)

    def measurement(self, model, batch):
        indices = batch[EXAMPLE_INDEX].tolist()
        if len(set(indices)) > 1:
            self.measured.append(len(indices))
        return super().train_loss(model, batch)


def start(directory, stop_after=None, strategies=("ekfac",), progress_interval=0.0, **options):
    """Run as far as it may; returns (the task with its notes, the scores or None)."""
    task = StoppingTask(stop_after)
    study = make_study(directory, task, progress_interval=progress_interval)
    try:
        return task, score(study, strategies, **options)
    except Stopped:
        return task, None


def contents(directory):
    """{path: bytes} of every tensor file."""
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Progress is noted after every batch here; no power cut is tested, so the disk need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(notes, scores, files) of a run that nothing stopped."""
    directory = tmp_path_factory.mktemp("whole")
    task, scores = start(directory)
    assert len(task.losses) == 2 * FACTOR_BATCHES + TRAIN_BATCHES
    assert len(contents(directory)) == 8  # 2 covariances, 4 of the eigendecompositions, Lambda, scores
    return task, scores, contents(directory)


@pytest.mark.parametrize(
    "stops",
    [[0], [1], [3], [7], [9], [13], [14], [15], [19], [2, 3, 4, 5], [0, 0, 20]],
    ids=lambda stops: "stopped after " + " and ".join(map(str, stops)),
)
def test_a_stopped_run_goes_on_where_it_was(tmp_path, whole, stops):
    """Stopped once or more: within covariance (0 to 6 batches), Lambda (7 to 13), pairwise (14 to 19), or just done.

    `stops` counts the training losses that each run may take. Together the runs take exactly those of the whole run.
    """
    losses = []
    for stop_after in stops:
        task, scores = start(tmp_path, stop_after)
        losses += task.losses
        assert (scores is None) == (len(losses) < len(whole[0].losses))
    task, scores = start(tmp_path)
    assert losses + task.losses == whole[0].losses
    assert torch.equal(scores["ekfac"], whole[1]["ekfac"])
    assert contents(tmp_path) == whole[2], "a file differs, or progress is left lying about"


@pytest.mark.parametrize("stop_after", [0, 1, 4, 5])
def test_a_stopped_eigendecomposition_goes_on_where_it_was(tmp_path, monkeypatch, whole, stop_after):
    """Six matrices, each decomposed once by the two runs together."""
    decomposed = []

    def eigendecomposition(covariance, device):
        if len(decomposed) == stop_after and not started_again:
            raise Stopped
        decomposed.append(len(covariance))
        return plain(covariance, device)

    plain = fit.eigendecomposition
    monkeypatch.setattr(fit, "eigendecomposition", eigendecomposition)
    monkeypatch.setattr(Runtime, "num_workers", 1)  # one after the other, so that it is known which were done
    started_again = False
    assert start(tmp_path)[1] is None
    started_again = True
    task, _ = start(tmp_path)
    assert len(decomposed) == 6
    assert task.losses == whole[0].losses[FACTOR_BATCHES:]
    assert contents(tmp_path) == whole[2]


@pytest.mark.parametrize("stop_after", [14 + 3, 14 + 6, 14 + 8, 14 + 13, 14 + 23])
def test_a_run_of_several_passes_goes_on_in_the_pass_where_it_was(tmp_path, monkeypatch, stop_after):
    """Two groups of layers x two tiles of queries = four passes; those finished are not even begun again."""

    def four_passes(layers, *_, **__):
        return Plan([layers[:1], layers[1:]], [range(4), range(4, 6)], 0, {"training pass": 0}, 0.0)

    monkeypatch.setattr(analysis, "make_plan", four_passes)
    whole_task, whole_scores = start(tmp_path / "whole", strategies=["ekfac", "identity"])
    first, scores = start(tmp_path / "stopped", stop_after, strategies=["ekfac", "identity"])
    assert scores is None
    second, scores = start(tmp_path / "stopped", strategies=["ekfac", "identity"])
    assert first.losses + second.losses == whole_task.losses
    passes_done = (stop_after - 14) // TRAIN_BATCHES
    assert whole_task.measured == [4, 2, 4, 2]
    assert second.measured == whole_task.measured[passes_done:]
    for strategy, expected in whole_scores.items():
        assert torch.equal(scores[strategy], expected), strategy
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("stop_after", [14 + 1, 14 + 2, 14 + 3, 14 + 5])
def test_batches_that_were_held_are_taken_again(tmp_path, monkeypatch, whole, stop_after):
    """Two batches wait until they are scored together; progress counts those that were scored."""

    def make_plan(*arguments):
        return replace(planning.make_plan(*arguments), scored_at_once=14)

    monkeypatch.setattr(analysis, "make_plan", make_plan)
    first, scores = start(tmp_path, stop_after)
    assert scores is None
    second, scores = start(tmp_path)
    num_scored = (stop_after - 14) // 2 * 2
    assert second.losses == whole[0].losses[14 + num_scored :]
    torch.testing.assert_close(scores["ekfac"], whole[1]["ekfac"], rtol=1e-12, atol=1e-12)


def test_progress_in_another_order_is_not_gone_on_from(tmp_path, monkeypatch, whole):
    """The control: what was done are the first examples of an order; in another one they are others."""

    start(tmp_path, 3)
    monkeypatch.setattr(StoppingTask, "length", lambda self, example: 1)
    task, scores = start(tmp_path)
    assert len(task.losses) == len(whole[0].losses), "examples of another order were taken for done"
    torch.testing.assert_close(scores["ekfac"], whole[1]["ekfac"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stop_after", [3, 9, 16])
def test_a_stopped_run_goes_on_with_other_batch_sizes(tmp_path, whole, stop_after):
    """As after running out of memory: no example is lost or counted twice, and the numbers agree to rounding."""
    first, _ = start(tmp_path, stop_after)
    second, scores = start(tmp_path, factor_batch_size=5, train_batch_size=9)
    taken = sorted(index for _, indices in first.losses + second.losses for index in indices)
    assert taken == sorted(3 * list(range(40)))
    torch.testing.assert_close(scores["ekfac"], whole[1]["ekfac"], rtol=1e-9, atol=1e-9)


def test_progress_with_other_settings_is_not_gone_on_from(tmp_path):
    """The control: what sampled labels have left half done is no part of an empirical Fisher."""
    for name, stop_after in (("stopped", 3), ("whole", 0)):
        start(tmp_path / name, stop_after)
        task = StoppingTask()
        score(make_study(tmp_path / name, task, use_empirical_fisher=True), ["ekfac"])
        assert len(task.losses) == 2 * FACTOR_BATCHES + TRAIN_BATCHES
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_without_noted_progress_a_stage_starts_again(tmp_path, whole):
    """The control: progress is noted at intervals; before the first one nothing is, and finished stages stay."""
    first, _ = start(tmp_path, 9, progress_interval=3600.0)
    second, scores = start(tmp_path, progress_interval=3600.0)
    assert len(first.losses) == 9
    assert second.losses == whole[0].losses[FACTOR_BATCHES:]
    assert torch.equal(scores["ekfac"], whole[1]["ekfac"])


def test_a_finished_run_is_read_and_overwrite_runs_it_again(tmp_path, whole):
    """Nothing is computed the second time; with overwrite everything is, to the same bytes."""
    start(tmp_path)
    again, scores = start(tmp_path)
    assert again.losses == again.measured == []
    assert torch.equal(scores["ekfac"], whole[1]["ekfac"])
    task = StoppingTask()
    score(make_study(tmp_path, task, overwrite=True), ["ekfac"])
    assert task.losses == whole[0].losses
    assert contents(tmp_path) == whole[2]
