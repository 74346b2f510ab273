"""Too little memory while something is made of what was captured: done in halves, with the same numbers, or refused."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from influence_core.errors import UserError
from influence_core.factors.covariance import CovarianceSums
from influence_core.factors.lambdas import LambdaSums
from influence_core.memory import changing, in_halves
from influence_core.scores.pairwise import _PairwiseJob
from tests.studies import recomposed_factors, score_tiny
from tests.test_invariance import assert_same_numbers, plain  # noqa: F401 (a fixture)


class LittleMemory(TorchDispatchMode):
    """No operation gets memory for more than so many numbers at once; `failures` counts those that wanted it."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.failures = most, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given and x.numel() > self.most:
                self.failures += 1
                raise torch.OutOfMemoryError(f"CUDA out of memory: {func} of {tuple(x.shape)}")
        return out


@pytest.mark.parametrize("owner, method, most", [
    (CovarianceSums, "update", 70),  # a batch of 6 examples of 8 positions of 5
    (LambdaSums, "update", 100),  # 6 gradients of 5 x 16, padded
    (_PairwiseJob, "_store_preconditioned", 100),
    (_PairwiseJob, "_add_scores", 200),
], ids=lambda value: str(getattr(value, "__name__", value)))  # fmt: skip
def test_what_finds_too_little_memory_is_done_in_halves(tmp_path, plain, monkeypatch, owner, method, most):  # noqa: F811
    """All strategies: no number is added twice, none is left out."""
    memory, act = LittleMemory(most), getattr(owner, method)

    def with_little(*arguments):
        with memory:
            return act(*arguments)

    monkeypatch.setattr(owner, method, with_little)
    assert_same_numbers(plain, score_tiny(tmp_path), recomposed_factors(tmp_path))
    assert memory.failures > 3


def test_halves_of_halves_cover_all_once():
    done = []

    def work(some):
        if some.stop - some.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(range(some.start, some.stop))

    in_halves(work, slice(5, 27))
    assert done == list(range(5, 27))


def test_a_single_one_that_does_not_fit_and_other_errors_are_raised():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("something else")):

        def work(some, error=error):
            raise error

        with pytest.raises(type(error), match=str(error)):
            in_halves(work, slice(0, 4))


def test_what_can_not_be_done_again_is_refused_in_a_line():
    with pytest.raises(UserError, match="out of memory while sums are made: lower"), changing("sums are made"):
        raise torch.OutOfMemoryError("CUDA out of memory")
