"""Scores of the sum of the queries: those of the queries, added up, at the price of one."""

import json
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from influence_core.averaging import analyze_checkpoints
from influence_core.errors import UserError
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.scores.cost import pass_peaks
from influence_core.scores.pairwise import compute_pairwise_scores
from influence_core.scores.plan import Plan, make_plan
from influence_core.scores.plan_text import describe_plan
from tests.studies import BATCH_SIZES, STRATEGIES, make_study, score
from tests.test_exactness import DAMPING, FLOAT64, SEED, Reference, relative_error
from tests.test_finite import SpoiledTask
from tests.test_plan import NUM_QUERIES, PARAMETERS, layers, peak, work
from tests.test_processes import run_processes
from tests.test_resume import Stopped, StoppingTask, contents
from tests.tiny import OfModel, TinyModel, TinyTask
from tests.whole import NAMES, WholeTask


def both(directory, task=None, strategies=STRATEGIES, sizes=None, **options):
    """({strategy: row of the sum}, {strategy: the sum of the rows}), by the core; factors are fitted once."""
    rows = score(make_study(directory, task, **options), strategies, **(sizes or {}))
    summed = score(make_study(directory, task, sum_queries=True, **options), strategies, **(sizes or {}))
    assert {name: len(matrix) for name, matrix in summed.items()} == dict.fromkeys(strategies, 1)
    return {name: matrix[0] for name, matrix in summed.items()}, {name: x.sum(0) for name, x in rows.items()}


def assert_same(summed, expected, bound):
    for name in expected:
        assert expected[name].abs().min() > 0 and relative_error(summed[name], expected[name]) < bound, name


@pytest.mark.parametrize("precision, bound", [(FLOAT64, 1e-9), (Precision(), 2e-4)], ids=["float64", "float32"])
def test_the_sum_equals_the_dense_reference(tmp_path, precision, bound):
    """Every strategy: the reference's scores of each query, added up."""
    study = make_study(tmp_path, precision=precision, sum_queries=True)
    study.model.to(precision.product_dtype)
    truth = Reference()
    summed = score(study)
    for strategy in STRATEGIES:
        assert relative_error(summed[strategy][0], truth.scores(strategy).sum(0)) < bound, strategy


@pytest.mark.parametrize(
    "sizes", [{}, {"query_batch_size": 1}, {"query_batch_size": 5, "train_batch_size": 1}], ids=str
)
def test_the_sum_is_that_of_the_rows(tmp_path, sizes):
    """In float64, whatever the batches: they differ by rounding alone."""
    assert_same(*both(tmp_path, sizes=sizes), 1e-12)


@pytest.mark.parametrize("held", [False, True], ids=["by chunks", "held logits"])
@pytest.mark.parametrize("head", NAMES)
def test_the_sum_over_tables_and_vectors(tmp_path, head, held):
    """Embeddings, heads with and without a bias, tied and not, positions, norms."""
    assert_same(*both(tmp_path, WholeTask(head, held)), 1e-12)


class Doubling(TinyTask):
    """Post-processes gradients, so that a sum has to be one of what it leaves of each."""

    def post_process_per_sample_gradient(self, layer_name, gradient):
        return gradient * (1 + (gradient.flatten(1).norm(dim=1) > 1).to(gradient.dtype))[:, None, None]


def test_the_sum_of_what_a_task_makes_of_gradients(tmp_path):
    summed, expected = both(tmp_path / "its own", Doubling())
    assert_same(summed, expected, 1e-12)
    plain, _ = both(tmp_path / "plain", strategies=["identity"])
    assert relative_error(summed["identity"], plain["identity"]) > 0.1


def test_the_sum_of_a_layer_that_is_called_twice(tmp_path):
    assert_same(*both(tmp_path, shared=True), 1e-12)


def test_the_sum_by_groups_of_layers(tmp_path):
    """Each group's pass sums the gradients of its own layers."""
    study = make_study(tmp_path / "groups", sum_queries=True)
    first, second, third = study.layers
    plan = Plan([[first], [second, third]], [range(1)], 0, {}, 0.0)
    queries = study.task.load_dataset("validation")
    split = compute_pairwise_scores(study, {"identity": {}}, queries, plan, DAMPING, 4, 7)["identity"]
    rows = score(make_study(tmp_path / "one"), ["identity"])["identity"]
    assert relative_error(split, rows.sum(0, keepdim=True)) < 1e-12


def test_the_sum_in_half_precision(tmp_path):
    """Gradients are summed in float32 and rounded once: nearer to the truth than bfloat16 is fine."""
    half = Precision(torch.bfloat16, torch.float32, emulated=True)
    summed, of_rows = both(tmp_path / "half", precision=half)
    exact, _ = both(tmp_path / "exact", precision=Precision())
    for name in STRATEGIES:
        assert relative_error(summed[name], of_rows[name]) < 0.02, name
        assert torch.corrcoef(torch.stack([summed[name], exact[name]]))[0, 1] > 0.995, name
    assert (tmp_path / "half" / "scores_ekfac_half_sum").is_dir()


def sums(directory, runtime):
    """{number of queries: the sum's scores, of all strategies}"""
    scores = {}
    for number in (6, 1):
        study = make_study(directory / str(number), runtime=runtime, sum_queries=True)
        scores[number] = score(study, num_queries=number, query_batch_size=2)
    return scores


def test_the_sum_over_processes(tmp_path):
    """Each sums its own queries, or none where there are fewer; both score with the sum of all."""
    (tmp_path / "two").mkdir()
    expected = sums(tmp_path / "one", Runtime(precision=FLOAT64, seed=SEED))
    for returned in run_processes(sums, 2, tmp_path / "two"):
        for number, scores in expected.items():
            for strategy in STRATEGIES:
                assert relative_error(returned[number][strategy], scores[strategy]) < 1e-10


class Squashed(TinyModel):
    """Another checkpoint, as far as the means are concerned."""

    def hidden(self, tokens, mask):
        return torch.tanh(0.5 * super().hidden(tokens, mask))


def test_the_mean_over_checkpoints_of_sums(tmp_path):
    """Is the sum of the mean."""
    means = []
    for sum_queries in (True, False):
        study = make_study(tmp_path, sum_queries=sum_queries)
        checkpoints = {
            name: partial(make_study, tmp_path / name, OfModel(model), sum_queries=sum_queries)
            for name, model in {"step-1": TinyModel, "step-2": Squashed}.items()
        }
        queries = study.task.load_dataset("validation")
        means.append(analyze_checkpoints(study, checkpoints, ["ekfac"], queries, DAMPING, **BATCH_SIZES)["ekfac"])
    assert means[0].shape == (1, 40) and relative_error(means[0][0], means[1].sum(0)) < 1e-12
    assert (tmp_path / "step-2" / "scores_ekfac_sum").is_dir() and (tmp_path / "scores_ekfac_sum").is_dir()


# ------------------------------------------------------------------------------------------------------- what it costs


def test_a_sum_takes_the_memory_of_one_query():
    """One row of gradients is resident and one of sums beside it while they are made; one row of scores."""
    whole = make_plan(layers(), work(sum_queries=True), 1 << 40)
    assert whole.query_tiles == [range(1)] and whole.num_passes == 1
    assert whole.resident_bytes == 4 * PARAMETERS
    one = make_plan(layers(), work(num_queries=1), 1 << 40)
    assert whole.peak_bytes["training pass"] == one.peak_bytes["training pass"]
    sums, single = (pass_peaks(layers(), each, 1)["query gradients"] for each in (
        work(sum_queries=True), work(num_queries=1)))  # fmt: skip
    assert sums - single == 4 * PARAMETERS
    saved = peak(make_plan(layers(), work(), 1 << 40)) - peak(whole)
    assert saved > (NUM_QUERIES - 3) * 4 * PARAMETERS


def test_memory_that_holds_few_queries_holds_any_sum():
    """Where queries take several passes over the training set, their sum takes one."""
    budget = peak(make_plan(layers(), work(num_queries=2), 1 << 40)) * 11 // 10
    assert make_plan(layers(), work(), budget).num_passes > 1
    assert make_plan(layers(), work(sum_queries=True), budget).num_passes == 1


@pytest.mark.usefixtures("unchecked")
def test_what_a_sum_saves_is_the_products_with_the_other_rows(tmp_path):
    """The queries' gradients cost the same; torch's count, that knows no product added in place, sees all the rest."""
    counted, planned = {}, {}
    for sum_queries in (True, False):
        study = make_study(tmp_path, sum_queries=sum_queries)
        with FlopCounterMode(display=False) as counter:
            score(study, ["identity"], query_batch_size=6)
        counted[sum_queries] = counter.get_total_flops()
        planned[sum_queries] = study.planned_flops["pairwise"]
    saved = 2 * 40 * (6 - 1) * sum(layer.num_parameters for layer in study.layers)
    assert counted[False] == counted[True] > 0
    assert planned[False] - planned[True] == pytest.approx(saved)


def test_the_plan_says_so():
    plan = make_plan(layers(), work(sum_queries=True), 1 << 40)
    text = describe_plan(plan, torch.nn.Sequential(), layers(), work(sum_queries=True), 0, 1 << 40)
    assert f"the sum of {NUM_QUERIES} queries x 1000 training examples" in text
    assert "6.3 MB of preconditioned gradients stay in memory (of the sum alone)" in text


# ---------------------------------------------------------------------------------------------------- what is stored


def test_a_sum_lies_beside_the_rows_and_says_so(tmp_path, capsys):
    summed, _ = both(tmp_path, strategies=["identity"])
    manifests = {
        name: json.loads((tmp_path / f"scores_identity{name}" / "pairwise_scores.json").read_text())["settings"]
        for name in ("", "_sum")
    }
    assert (manifests["_sum"]["sum_queries"], manifests[""]["sum_queries"]) == (True, None)
    capsys.readouterr()
    again = score(make_study(tmp_path, sum_queries=True), ["identity"])["identity"][0]
    assert torch.equal(again, summed["identity"])
    assert "Found finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="num_queries"):
        score(make_study(tmp_path, sum_queries=True), ["identity"], num_queries=3)


@pytest.mark.usefixtures("unchecked")
def test_a_sum_that_was_stopped_goes_on(tmp_path):
    """To the same bytes as one that was not, and what rows left behind is nothing to go on from."""
    options = {"progress_interval": 0.0, "sum_queries": True}
    study = make_study(tmp_path / "stopped", StoppingTask(3), **options)
    with pytest.raises(Stopped):
        score(study, ["identity"])
    second = StoppingTask()
    score(make_study(tmp_path / "stopped", second, **options), ["identity"])
    score(make_study(tmp_path / "whole", StoppingTask(), **options), ["identity"])
    assert len(second.losses) == 3 and contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_sum_that_overflows_is_refused_as_one(tmp_path):
    """No single query is to blame."""

    class Both(SpoiledTask):
        def is_spoiled(self, labels, which):
            return which == "measurement" or super().is_spoiled(labels, which)

    study = make_study(tmp_path, Both("train", 17, 1e25, ["train"]), Precision(), sum_queries=True)
    with pytest.raises(UserError, match="score of the sum of the queries with training example 17 at layer first"):
        score(study, ["identity"])
    assert not list(tmp_path.rglob("*.json"))
