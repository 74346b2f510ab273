"""Which examples meet in a batch, and what happens when a batch finds too little memory: never other numbers."""

from dataclasses import replace

import pytest
import torch

from influence_core import analysis
from influence_core.errors import UserError
from influence_core.factors import fit
from influence_core.runtime import Runtime
from influence_core.scores import plan as planning
from tests.studies import recomposed_factors, score_tiny
from tests.test_invariance import assert_same_numbers, plain  # noqa: F401 (a fixture)
from tests.tiny import TinyTask


class NotingTask(TinyTask):
    """Notes the lengths of the rows of each batch, and finds memory for `room` rows of a batch at most.

    Attributes:
        batches: [[length of each row]], of every loss that was computed.
    """

    def __init__(self, room=1000, error=None, knows_lengths=True):
        super().__init__()
        self.room, self.error, self.knows_lengths, self.batches = room, error, knows_lengths, []

    def length(self, example):
        return super().length(example) if self.knows_lengths else 1

    def train_loss(self, model, batch, sample_labels=None):
        loss = super().train_loss(model, batch, sample_labels)
        if len(batch["tokens"]) > self.room:
            raise self.error
        self.batches.append((batch["labels"] != -100).sum(1).tolist())
        return loss


def test_examples_of_like_length_meet(tmp_path, plain):  # noqa: F811
    """The longest first; less than half of the padding that the given order has, and the same numbers."""
    padding = {}
    for knows_lengths in (True, False):
        task = NotingTask(knows_lengths=knows_lengths)
        directory = tmp_path / str(knows_lengths)
        assert_same_numbers(plain, score_tiny(directory, task), recomposed_factors(directory))
        padding[knows_lengths] = sum(max(batch) * len(batch) - sum(batch) for batch in task.batches)
        lengths = [length for batch in task.batches[-6:] for length in batch]  # of the last pass
        assert (lengths == sorted(lengths, reverse=True)) is knows_lengths
    assert padding[True] < 0.5 * padding[False]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")],
    ids=["of a GPU", "of the CPU"],
)
def test_a_batch_that_finds_too_little_memory_is_halved(tmp_path, plain, capsys, error):  # noqa: F811
    """Room for two rows: batches of 6 and 7 are halved until they fit, it is said, and the numbers are the same."""
    task = NotingTask(room=2, error=error)
    assert_same_numbers(plain, score_tiny(tmp_path, task), recomposed_factors(tmp_path))
    assert max(map(len, task.batches)) <= 2
    said = capsys.readouterr().out
    assert "Out of memory with 6 examples in a batch: going on with 3" in said
    assert "Out of memory with 7 examples in a batch: going on with 3" in said
    assert "Out of memory with 3 examples in a batch: going on with 1" in said


def test_an_example_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    """One line, after the plan was made: nothing smaller can be tried."""
    task = NotingTask(error=torch.OutOfMemoryError("CUDA out of memory"))

    def fit_factors(*arguments):
        task.room = 0
        return fit.fit_factors(*arguments)

    monkeypatch.setattr(analysis, "fit_factors", fit_factors)
    with pytest.raises(UserError, match="out of memory with a single example in a batch"):
        score_tiny(tmp_path, task)


def test_other_errors_are_not_taken_for_too_little_memory(tmp_path):
    task = NotingTask(room=2, error=RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        score_tiny(tmp_path, task)


@pytest.mark.parametrize("room", [1000, 2])
def test_what_is_held_makes_room_before_a_batch_is_halved(tmp_path, plain, monkeypatch, capsys, room):  # noqa: F811
    """Batches of 7 wait until 28 examples are scored together, but every third run finds too little memory."""

    class Tight(NotingTask):
        def train_loss(self, model, batch, sample_labels=None):
            self.runs = getattr(self, "runs", 0) + (sample_labels is None and len(batch["tokens"]) > 2)
            if sample_labels is None and len(batch["tokens"]) > 2 and self.runs % 3 == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().train_loss(model, batch, sample_labels)

    def make_plan(*arguments):
        return replace(planning.make_plan(*arguments), scored_at_once=28)

    monkeypatch.setattr(analysis, "make_plan", make_plan)
    task = Tight(room, torch.OutOfMemoryError("CUDA out of memory"))
    assert_same_numbers(plain, score_tiny(tmp_path, task), recomposed_factors(tmp_path))
    said = capsys.readouterr().out
    assert ("7 examples in a batch: going on" in said) is (room == 2)


def test_jobs_side_by_side_come_back_in_order(monkeypatch):
    """The results of one after the other; a job's error reaches the caller, and the number of threads is as before."""
    monkeypatch.setattr(Runtime, "num_workers", 3)
    matrices = [torch.eye(size, dtype=torch.float64) * size for size in range(1, 30)]
    threads = torch.get_num_threads()
    traces = list(Runtime().map_parallel(lambda matrix: float(torch.linalg.eigvalsh(matrix).sum()), matrices))
    assert traces == pytest.approx([size**2 for size in range(1, 30)])
    with pytest.raises(ZeroDivisionError):
        list(Runtime().map_parallel(lambda number: 1 / number, [1, 0, 2]))
    assert torch.get_num_threads() == threads
