"""The core on a CUDA device against the CPU; skipped where there is none."""

from functools import partial

import pytest
import torch

from influence_core.analysis import explain
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.scores.parts import shown_pairs
from influence_core.scores.self_influence import self_influence_store
from tests.studies import STRATEGIES, make_study, score
from tests.test_exactness import SEED, relative_error
from tests.test_invariance import spearman
from tests.test_score_parts import ToldWhole

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


def cuda_study(directory, half=False, num_train=None, task=None, **options):
    runtime = Runtime(CUDA, Precision.choose(CUDA, half), seed=SEED, **options)
    study = make_study(directory, task, runtime=runtime, num_train=num_train)
    study.model.to(CUDA)
    return study


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_float32_equals_the_cpu(tmp_path, compile):
    expected = score(make_study(tmp_path / "cpu", precision=Precision()))
    actual = score(cuda_study(tmp_path / "cuda", compile=compile))
    for strategy in STRATEGIES:
        assert relative_error(actual[strategy], expected[strategy]) < 1e-3, strategy


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_parts_of_scores_and_self_influence_equal_the_cpu(tmp_path, half):
    """Of a model with every kind of layer."""
    found = []
    for make in (cuda_study, partial(make_study, precision=Precision.choose(torch.device("cpu"), half))):
        options = {"half": half} if make is cuda_study else {}
        study = make(tmp_path / str(len(found)), task=ToldWhole(), **options)
        scores = score(study, ["ekfac"], damping="heuristic", self_influence=True)["ekfac"]
        (parts,) = explain(study, {"ekfac": shown_pairs(scores, 3, 2)}, queries(study), "heuristic").values()
        store = self_influence_store(study, "ekfac", "heuristic")
        of_self = store.load()["self_influence"]["all_modules"]
        found.append([of_self, parts.by_layer, *parts.train_tokens, *parts.query_tokens])
    tolerance = 0.1 if half else 1e-3
    for actual, expected in zip(*found):
        assert relative_error(actual, expected) < tolerance


def queries(study):
    return study.task.load_dataset("validation")


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
