"""Each training example's own score: exact for every strategy and kind of layer, whatever stops it or shares it."""

import pytest
import torch
from safetensors.torch import load_file

from influence_core import analysis
from influence_core.analysis import analyze
from influence_core.errors import UserError
from influence_core.precision import Precision
from influence_core.scores import self_influence as module
from influence_core.scores.self_influence import compute_self_influence, self_influence_store
from tests import reference
from tests.scripts import ANALYZE, run
from tests.studies import BATCH_SIZES, STRATEGIES, make_study, score
from tests.test_exactness import DAMPING, FLOAT64, Reference, relative_error
from tests.test_resume import Stopped, StoppingTask
from tests.tiny import TinyTask
from tests.whole import WholeTask


def self_influence(study, strategies=STRATEGIES, **options):
    """{strategy: [training examples]}"""
    score(study, strategies, self_influence=True, **options)
    return {name: stored(study.output_dir, name) for name in strategies}


def stored(directory, name):
    return load_file(directory / f"scores_{name}" / "self_influence.safetensors")["all_modules"]


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "layer called twice"])
def test_it_equals_the_dense_reference(tmp_path, shared):
    truth = Reference(shared)
    actual = self_influence(make_study(tmp_path, shared=shared))
    losses = [truth.loss(x, x["labels"]) for x in truth.train]
    for strategy in STRATEGIES:
        expected = 0
        for name in truth.task.layers:
            gradients = truth.gradients(name, losses)
            fisher = truth.approximate_fisher(strategy, name)
            each = [reference.scores(strategy, fisher, DAMPING, [g], [g])[0, 0] for g in gradients]
            expected = expected + torch.stack(each)
        assert relative_error(actual[strategy], expected) < 1e-9


@pytest.mark.parametrize("head, held", [("tied", False), ("untied, with a bias", True)])
def test_every_kind_of_layer_enters(tmp_path, head, held):
    """Equal to the scores of the training set as queries, whose measurement is -0.5 x the loss here."""
    task = WholeTask(head, held)
    actual = self_influence(make_study(tmp_path / "self", task))
    study = make_study(tmp_path / "all", task)
    pairs = analyze(study, STRATEGIES, study.train_dataset, DAMPING, **BATCH_SIZES)
    for strategy in STRATEGIES:
        assert relative_error(actual[strategy], -2 * pairs[strategy].diagonal()) < 1e-9


def test_a_task_s_own_rows_are_combined_first(tmp_path):
    class Doubled(TinyTask):
        def post_process_per_sample_gradient(self, layer_name, gradient):
            return 2 * gradient

    plain = self_influence(make_study(tmp_path / "plain"), ["identity", "kfac"])
    doubled = self_influence(make_study(tmp_path / "doubled", Doubled()), ["identity", "kfac"])
    for name in plain:
        assert relative_error(doubled[name], 4 * plain[name]) < 1e-9


def test_groups_of_layers_and_small_batches_change_nothing(tmp_path):
    study = make_study(tmp_path)
    expected = self_influence(study, ["ekfac", "diagonal"])
    stores = {name: analysis.factor_stores(study, name) for name in expected}
    again = make_study(tmp_path)
    for name in expected:
        self_influence_store(again, name, DAMPING).discard()
    groups = [again.layers[:1], again.layers[1:]]
    actual = compute_self_influence(again, stores, DAMPING, 2, groups)
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-12


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("stop_after", [0, 1, 5])
def test_a_run_that_was_stopped_goes_on(tmp_path, stop_after):
    """Inside its own pass: no batch is run twice, and it ends with the same bytes."""
    expected = self_influence(make_study(tmp_path / "whole"), ["ekfac"])["ekfac"]
    score(make_study(tmp_path / "stopped", StoppingTask()), ["ekfac"])
    losses = 0
    for stop in (stop_after, None):
        task = StoppingTask(stop)
        try:
            self_influence(make_study(tmp_path / "stopped", task, progress_interval=0.0), ["ekfac"])
        except Stopped:
            assert stop is not None
        losses += len(task.losses)
    assert losses == 6  # batches of 7 of 40
    assert torch.equal(stored(tmp_path / "stopped", "ekfac"), expected)


def test_finished_ones_are_found_and_of_another_damping_refused(tmp_path, capsys):
    self_influence(make_study(tmp_path), ["ekfac"])
    capsys.readouterr()
    self_influence(make_study(tmp_path), ["ekfac"])
    assert "self_influence.json" in capsys.readouterr().out
    for path in (tmp_path / "scores_ekfac").glob("pairwise_scores.*"):
        path.unlink()
    with pytest.raises(UserError, match="damping"):
        self_influence(make_study(tmp_path), ["ekfac"], damping=0.5)


def test_overflow_is_refused_by_name(tmp_path, monkeypatch):
    def spoil(study, layer, preconditioner, captured, block):
        block.fill_(float("inf"))

    monkeypatch.setattr(module, "_add", spoil)
    with pytest.raises(UserError, match="self-influence of training example 0"):
        self_influence(make_study(tmp_path), ["identity"])
    assert not (tmp_path / "scores_identity" / "self_influence.json").exists()


HALF = Precision.choose(torch.device("cpu"), True)


@pytest.mark.parametrize("precision, tolerance", [(Precision(), 1e-4), (HALF, 3e-2)], ids=["float32", "bfloat16"])
def test_fewer_digits(tmp_path, precision, tolerance):
    expected = self_influence(make_study(tmp_path / "exact", precision=FLOAT64))
    rounded = make_study(tmp_path / "rounded", precision=precision)
    score(rounded, STRATEGIES, self_influence=True)
    for name in STRATEGIES:
        assert relative_error(stored(tmp_path / "rounded", rounded.result_name(name)), expected[name]) < tolerance


def test_the_script_stores_it_and_shows_the_highest(checkpoint, tmp_path):
    flags = ["--checkpoint_dir", checkpoint, "--output_dir", tmp_path, "--factor_strategy", "ekfac", "--self_influence"]
    out = run("analyze", *ANALYZE, *flags, "--compute_per_token_scores", "--report_queries", "2").ok()
    of_self = stored(tmp_path, "ekfac")
    assert of_self.shape == (64,) and (of_self > 0).all()
    assert f"Highest self-influence (ekfac): {int(of_self.argmax())}" in out
    parts = load_file(tmp_path / "scores_ekfac" / "score_parts.safetensors")
    scores = load_file(tmp_path / "scores_ekfac" / "pairwise_scores.safetensors")["all_modules"]
    assert parts["pairs"].shape == (40, 2)
    expected = scores[parts["pairs"][:, 0], parts["pairs"][:, 1]]
    assert relative_error(parts["by_layer"].sum(1), expected) < 1e-3
    for tokens in ("train_tokens", "query_tokens"):
        sums = torch.stack([x.sum() for x in parts[tokens].split(parts[f"num_{tokens}"].tolist())])
        assert relative_error(sums, expected) < 1e-3
