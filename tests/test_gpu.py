"""The core on a CUDA device against the CPU; skipped where there is none."""

import pytest
import torch

from influence_core.precision import Precision
from influence_core.runtime import Runtime
from tests.studies import STRATEGIES, make_study, score
from tests.test_exactness import SEED, relative_error
from tests.test_invariance import spearman

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


def cuda_study(directory, half=False, num_train=None, **options):
    runtime = Runtime(CUDA, Precision.choose(CUDA, half), seed=SEED, **options)
    study = make_study(directory, runtime=runtime, num_train=num_train)
    study.model.to(CUDA)
    return study


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_float32_equals_the_cpu(tmp_path, compile):
    expected = score(make_study(tmp_path / "cpu", precision=Precision()))
    actual = score(cuda_study(tmp_path / "cuda", compile=compile))
    for strategy in STRATEGIES:
        assert relative_error(actual[strategy], expected[strategy]) < 1e-3, strategy


def test_bfloat16_keeps_the_ranks(tmp_path):
    expected = score(make_study(tmp_path / "cpu", precision=Precision()), damping="heuristic")
    actual = score(cuda_study(tmp_path / "cuda", half=True), damping="heuristic")
    for strategy in STRATEGIES:
        assert spearman(actual[strategy], expected[strategy]).mean() > 0.99, strategy


def test_bfloat16_products_are_accumulated_and_returned_in_float32():
    """A product whose exact value bfloat16 can't hold, as one matrix and as a batch."""
    precision = Precision.choose(CUDA, half=True)
    a = torch.ones(8, 1024, device=CUDA, dtype=torch.bfloat16)
    a[:, 0] = 2.0  # 1025, where bfloat16 counts by eights
    b = torch.ones(1024, 8, device=CUDA, dtype=torch.bfloat16)
    for product in (precision.matmul(a, b), precision.matmul(a[None], b[None])[0]):
        assert product.dtype == torch.float32
        assert (product == 1025).all()
