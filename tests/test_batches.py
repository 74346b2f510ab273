"""Which examples meet in a batch, and what happens when a batch finds too little memory: never other numbers."""

import pytest
import torch

from influence_core import analysis
from influence_core.errors import UserError
from influence_core.factors import fit
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
