"""What the covariance pass captured serves the Lambda pass: fewer passes, the very same numbers, no more memory."""

import contextlib
from dataclasses import replace

import pytest
import torch

from influence_core import analysis
from influence_core.captured import Positions
from influence_core.factors.kept import KeptCaptures
from influence_core.factors.lambdas import LambdaSums
from influence_core.runtime import Runtime
from influence_core.scores import plan as planning
from tests.studies import make_study, score
from tests.test_exactness import FLOAT64, SEED
from tests.test_processes import run_processes
from tests.test_resume import Stopped, StoppingTask, contents

pytestmark = pytest.mark.usefixtures("file_unchecked")  # what is counted here is what the stages run

ALL = 1 << 30


@contextlib.contextmanager
def keeping(kept_bytes):
    """Every plan lets so many bytes be kept."""
    original = analysis.plan_analysis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "plan_analysis", lambda *given: replace(original(*given), kept_bytes=kept_bytes))
        yield


def score_with(directory, kept_bytes, task=None, strategies=("ekfac",), **options):
    """(the task with its notes, the study, what it left on disk)"""
    task = task or StoppingTask()
    study = make_study(directory, task, **options)
    with keeping(kept_bytes):
        score(study, strategies)
    return task, study, contents(directory)


@pytest.mark.parametrize("kept_bytes, some", [(ALL, False), (25_000, True)])
def test_kept_batches_are_not_run_again_and_change_nothing(kept_bytes, some, tmp_path):
    """Factors and scores byte by byte, whether all batches are kept, or those that fit."""
    plain, study, expected = score_with(tmp_path / "plain", 0)
    assert study.num_kept == 0
    task, study, stored = score_with(tmp_path / "kept", kept_bytes)
    assert stored == expected
    assert (0 < study.num_kept < 40) if some else study.num_kept == 40
    assert len(plain.losses) - len(task.losses) == -(-study.num_kept // 6)


def captured(*shapes):
    return {f"{number}": Positions(torch.zeros(shape), torch.zeros(shape)) for number, shape in enumerate(shapes)}


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
    kept.offer([0], {str(number): Positions(shared, gradient) for number, gradient in enumerate(gradients)})
    assert kept.num_examples == 1


def test_the_plan_keeps_only_what_raises_no_peak(tmp_path):
    """Its highest peak is the same with what is kept, and some batches are."""
    plans = []
    original = analysis.make_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "make_plan", lambda *given: plans.append(original(*given)) or plans[-1])
        study = make_study(tmp_path)
        score(study, ["ekfac"], factor_batch_size=1)
    assert plans[0].kept_bytes > 0 and study.num_kept > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_keep_captures", lambda plan, *_: plan)
        patch.setattr(analysis, "make_plan", lambda *given: plans.append(original(*given)) or plans[-1])
        score(make_study(tmp_path / "without"), ["ekfac"], factor_batch_size=1)
    assert max(plans[0].peak_bytes.values()) == max(plans[1].peak_bytes.values())


@pytest.mark.parametrize("strategies", [("kfac", "ekfac"), ("diagonal", "ekfac"), ("kfac", "diagonal")])
def test_whichever_strategy_comes_next_takes_it(strategies, tmp_path):
    """One covariance pass, and no other for the first Lambda; results as without."""
    plain, _, expected = score_with(tmp_path / "plain", 0, strategies=strategies)
    task, _, stored = score_with(tmp_path / "kept", ALL, strategies=strategies)
    assert stored == expected
    assert len(plain.losses) - len(task.losses) == 7  # batches of 6 of 40


def test_a_run_stopped_while_it_used_what_was_kept_goes_on(tmp_path):
    """The kept batches are gone with the process; the rerun makes the rest of them again."""
    expected = score_with(tmp_path / "plain", 0)[2]
    study = make_study(tmp_path / "kept", StoppingTask(), progress_interval=0.0)
    updates, update = [], LambdaSums.update

    def stopping(sums, *arguments):
        updates.append(True)
        if len(updates) == 8:  # within the third batch
            raise Stopped
        update(sums, *arguments)

    with keeping(ALL), pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(LambdaSums, "update", stopping)
        score(study, ["ekfac"])
    assert study.num_kept == 40
    task, _, stored = score_with(tmp_path / "kept", ALL)
    assert stored == expected
    assert sum(sampled for sampled, _ in task.losses) == 7 - 2  # batches of Lambda that were left


def in_processes(directory, runtime):
    """[(scores, number of examples kept)], of one training example, that leaves a process without any, and of 40."""
    results = []
    for num_train in (1, 40):
        study = make_study(directory / str(num_train), num_train=num_train, runtime=runtime)
        with keeping(ALL):
            results.append((score(study, ["ekfac"])["ekfac"], study.num_kept))
    return results


def test_several_processes_keep_their_own(tmp_path):
    """Scores as of one process, and each kept its share."""
    alone = in_processes(tmp_path / "alone", Runtime(precision=FLOAT64, seed=SEED))
    for rank, results in enumerate(run_processes(in_processes, 2, tmp_path)):
        assert [kept for _, kept in results] == [rank, 20]
        for (scores, _), (expected, _) in zip(results, alone):
            torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_memory_that_runs_out_is_taken_from_what_is_kept(tmp_path):
    """The batch is then run as it was, and the Lambda pass runs all of them again."""
    expected = score_with(tmp_path / "plain", 0)[2]
    task = StoppingTask()
    original, failed = task.train_loss, []

    def train_loss(*arguments):
        if len(task.losses) == 4 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return original(*arguments)

    task.train_loss = train_loss
    _, study, stored = score_with(tmp_path / "kept", ALL, task)
    assert failed and study.num_kept == 0 and stored == expected
