"""What the covariance pass captured serves the Lambda pass: fewer passes, the very same numbers, no more memory."""

import pytest
import torch

from influence_core import analysis
from influence_core.factors.kept import KeptCaptures
from influence_core.passes import Captured
from tests.studies import make_study, score
from tests.test_resume import StoppingTask, contents


def score_with(directory, monkeypatch, kept_bytes, task=None):
    """The task, and what an analysis left on disk, where the plan keeps so many bytes."""

    def plan(study, *arguments):
        made = original(study, *arguments)
        study.kept_bytes = kept_bytes
        return made

    original = analysis.plan_analysis
    task = task or StoppingTask()
    with monkeypatch.context() as patch:
        patch.setattr(analysis, "plan_analysis", plan)
        study = make_study(directory, task)
        score(study, ["ekfac"])
    return task, study, contents(directory)


@pytest.mark.parametrize("kept_bytes, some", [(1 << 30, False), (25_000, True)])
def test_kept_batches_are_not_run_again_and_change_nothing(kept_bytes, some, tmp_path, monkeypatch):
    """Factors and scores byte by byte, whether all batches are kept, or those that fit."""
    plain, study, expected = score_with(tmp_path / "plain", monkeypatch, 0)
    assert study.num_kept == 0
    task, study, stored = score_with(tmp_path / "kept", monkeypatch, kept_bytes)
    assert stored == expected
    assert (0 < study.num_kept < 40) if some else study.num_kept == 40
    assert len(plain.losses) - len(task.losses) == -(-study.num_kept // 6)


def captured(*shapes):
    return {f"{number}": Captured(torch.zeros(shape), torch.zeros(shape), None) for number, shape in enumerate(shapes)}


def test_only_the_first_batches_that_fit_are_kept():
    """Once one was left out, no later one is kept: the others are run from there on."""
    kept = KeptCaptures(budget=100 * 4)
    kept.offer([0], captured((1, 10, 2)))  # 40 numbers
    kept.offer([1, 2], captured((1, 20, 2)))  # 80: too many
    kept.offer([3], captured((1, 1, 1)))
    assert kept.num_examples == 1 and [indices for indices, _ in kept.take()] == [[0]]


def test_a_tensor_that_layers_share_counts_once():
    """Query, key and value of an attention layer read the same tensor."""
    shared = torch.zeros(1, 10, 2)
    gradients = [torch.zeros(1, 10, 1) for _ in range(3)]
    kept = KeptCaptures(budget=(20 + 3 * 10) * 4)
    kept.offer([0], {str(number): Captured(shared, gradient, None) for number, gradient in enumerate(gradients)})
    assert kept.num_examples == 1


def test_what_is_kept_stays_below_the_peak_of_the_plan(tmp_path):
    """And is within the peaks that the plan tells."""
    study = make_study(tmp_path)
    score(study, ["ekfac"], factor_batch_size=1)
    assert study.kept_bytes > 0 and study.num_kept > 0


def test_memory_that_runs_out_is_taken_from_what_is_kept(tmp_path, monkeypatch):
    """The batch is then run as it was, and the Lambda pass runs all of them again."""
    expected = score_with(tmp_path / "plain", monkeypatch, 0)[2]
    task = StoppingTask()
    original, failed = task.train_loss, []

    def train_loss(*arguments):
        if len(task.losses) == 4 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return original(*arguments)

    task.train_loss = train_loss
    _, study, stored = score_with(tmp_path / "kept", monkeypatch, 1 << 30, task)
    assert failed and study.num_kept == 0 and stored == expected
