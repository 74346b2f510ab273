"""Properties that the theory promises, whatever the numbers are."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from influence_core.captured import Positions
from influence_core.factors import eigenbasis, lambdas
from influence_core.factors.strategies import STRATEGIES as STRATEGY_OF
from influence_core.factors.strategies import Preconditioner
from influence_core.layers.matrix import MatrixLayer
from influence_core.precision import Precision
from tests import reference
from tests.studies import STRATEGIES, ekfac_fisher, make_study, score, score_tiny
from tests.test_exactness import KINDS, Reference, load, relative_error
from tests.tiny import TinyTask

LAYERS = ("first", "second", "third")
PRECONDITIONED = ("diagonal", "kfac", "ekfac")


@pytest.fixture(scope="module")
def truth():
    """Per-sample gradients with sampled labels, {layer: [examples, out, in(+1)]}, by the reference."""
    dense = Reference()
    losses = dense.fisher_losses()
    return {name: dense.gradients(name, losses).detach() for name in LAYERS}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A directory with the factors and scores of every strategy."""
    directory = tmp_path_factory.mktemp("fitted")
    score_tiny(directory)
    return directory


@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
def test_lambda_adds_up_to_the_mean_squared_gradient_norm(fitted, truth, strategy):
    """An orthogonal basis keeps norms: each layer's sum of Lambda against torch.func's gradients."""
    stored = load(fitted / f"factors_{strategy}", "lambda_matrix")
    for name in LAYERS:
        expected = truth[name].square().sum(dim=(1, 2)).mean()
        torch.testing.assert_close(stored[name].sum(), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_ekfac_is_nearer_to_the_fisher_than_any_multiple_of_kfac(fitted, truth, name):
    """Frobenius distance to the dense Fisher; the best multiple of KFAC by least squares (George et al. 2018).

    EKFAC is the nearest of all matrices with KFAC's eigenvectors, so a change of any eigenvalue takes it away.
    """
    stored = {kind: load(fitted / "factors_ekfac", kind) for kind in KINDS}
    fisher = reference.fisher(truth[name])
    kfac = torch.kron(stored["gradient_covariance"][name], stored["activation_covariance"][name])
    best_kfac = (fisher * kfac).sum() / kfac.square().sum() * kfac
    ekfac = ekfac_fisher(stored, name)
    distance = (fisher - ekfac).norm()
    assert distance < 0.99 * (fisher - best_kfac).norm()
    eigenvalues = stored["lambda_matrix"][name]
    for step in (0.01, -0.01):
        for row in range(eigenvalues.shape[0]):
            for column in range(eigenvalues.shape[1]):
                changed = eigenvalues.clone()
                changed[row, column] += step * eigenvalues.mean()
                other = ekfac_fisher({**stored, "lambda_matrix": {name: changed}}, name)
                assert (fisher - other).norm() > distance


def test_infinite_damping_gives_the_identity_scores(tmp_path):
    """damping * scores against the identity strategy's; what is left falls as 1 / damping."""
    study = make_study(tmp_path, overwrite=True)
    errors = {}
    for damping in (1e6, 1e8):
        scores = score(study, damping=damping)
        for strategy in PRECONDITIONED:
            errors[strategy, damping] = relative_error(damping * scores[strategy], scores["identity"])
    for strategy in PRECONDITIONED:
        assert errors[strategy, 1e8] < 1e-6
        assert 50 < errors[strategy, 1e6] / errors[strategy, 1e8] < 200


def test_the_layers_scores_sum_to_the_total(tmp_path):
    """Each layer tracked alone, summed, against all tracked together."""
    alone = [score_tiny(tmp_path / name, TinyTask(layers=[name])) for name in LAYERS]
    together = score_tiny(tmp_path / "together")
    for strategy in STRATEGIES:
        assert relative_error(sum(scores[strategy] for scores in alone), together[strategy]) < 1e-12
        largest = together[strategy].abs().max()
        assert all(scores[strategy].abs().max() > 1e-4 * largest for scores in alone), "a layer that adds nothing"


@pytest.mark.parametrize("strategy", PRECONDITIONED)
def test_heuristic_damping_is_a_tenth_of_each_layers_mean_eigenvalue(tmp_path, fitted, truth, strategy):
    """ "heuristic" with all layers against the sum over layers tracked alone, each with its number written out.

    The mean eigenvalue is a trace divided by the size: of the Kronecker product for KFAC, of the Fisher otherwise.
    """
    total = 0
    for name in LAYERS:
        mean = truth[name].square().mean()
        if strategy == "kfac":
            covariances = [load(fitted / "factors_ekfac", f"{kind}_covariance") for kind in ("activation", "gradient")]
            mean = covariances[0][name].diag().mean() * covariances[1][name].diag().mean()
        task = TinyTask(layers=[name])
        total = total + score_tiny(tmp_path / name, task, [strategy], damping=0.1 * float(mean))[strategy]
    heuristic = score_tiny(tmp_path / "heuristic", None, [strategy], damping="heuristic")[strategy]
    assert relative_error(heuristic, total) < 1e-10
    multiple = score_tiny(tmp_path / "multiple", None, [strategy], damping="0.1x")[strategy]
    assert torch.equal(multiple, heuristic)
    assert relative_error(heuristic, score_tiny(tmp_path / "none", None, [strategy], damping=0.0)[strategy]) > 0.1


def test_rotating_positions_and_rotating_the_gradient_give_the_same(tmp_path, monkeypatch):
    """The two ways to Q_G^T g Q_A, each forced for every layer, for Lambda and for the queries' preconditioning."""
    stored, scores, called = [], [], {True: 0, False: 0}
    for on_positions in (True, False):

        def choose(*sizes, on_positions=on_positions):
            called[on_positions] += 1
            return on_positions

        monkeypatch.setattr(eigenbasis, "rotation_is_cheaper_on_positions", choose)
        directory = tmp_path / str(on_positions)
        scores.append(score_tiny(directory, None, ["ekfac"])["ekfac"])
        stored.append(load(directory / "factors_ekfac", "lambda_matrix"))
    assert all(called.values()), "the choice is not asked for"
    for name in LAYERS:
        assert relative_error(stored[0][name], stored[1][name]) < 1e-12
    assert relative_error(*scores) < 1e-10


def test_strategies_with_the_same_eigenvectors_share_the_rotation():
    """KFAC and EKFAC together: one rotation, two ways back, by torch's count; and each as if it were alone."""
    layer = MatrixLayer("layer", 16, 8, has_bias=False, module=torch.nn.Identity())
    generator = torch.Generator().manual_seed(0)

    def random(*sizes):
        return torch.rand(sizes, generator=generator)

    factors = {"activation_eigenvectors": random(16, 16), "gradient_eigenvectors": random(8, 8)}
    factors |= {"activation_eigenvalues": random(16), "gradient_eigenvalues": random(8), "lambda_matrix": random(8, 16)}
    pair = [(STRATEGY_OF[name], factors) for name in ("kfac", "ekfac")]
    positions = Positions(random(3, 50, 16), random(3, 50, 8))
    both = Preconditioner(layer, pair, 0.1, torch.float32)
    with FlopCounterMode(display=False) as counter:
        together = list(both.of_captured(positions))
    rotation = 2 * 8 * 16 * (8 + 16)
    assert counter.get_total_flops() == 3 * (2 * 50 * 8 * 16 + 3 * rotation)
    for (strategy, _), result in zip(pair, together):
        (alone,) = Preconditioner(layer, [(strategy, factors)], 0.1, torch.float32).of_captured(positions)
        assert torch.equal(alone, result)


@pytest.mark.parametrize("num_positions, out, inputs", [(1, 16, 16), (6, 16, 32), (24, 16, 64), (40, 16, 32)])
def test_the_cheaper_rotation_is_chosen(monkeypatch, num_positions, out, inputs):
    """The rule against FLOPs that torch counts for the two ways (sizes that need no padding, no bias)."""
    layer = MatrixLayer("layer", inputs, out, has_bias=False, module=torch.nn.Identity())
    generator = torch.Generator().manual_seed(0)
    eigenvectors = [{"layer": torch.randn(size, size, generator=generator)} for size in (inputs, out)]
    activations, gradients = (torch.randn(3, num_positions, size, generator=generator) for size in (inputs, out))
    choice = eigenbasis.rotation_is_cheaper_on_positions(num_positions, out, inputs)
    flops = {}
    for on_positions in (True, False):
        monkeypatch.setattr(eigenbasis, "rotation_is_cheaper_on_positions", lambda *_, answer=on_positions: answer)
        sums = lambdas.LambdaSums([layer], Precision(), torch.device("cpu"), *eigenvectors)
        with FlopCounterMode(display=False) as counter:
            sums.update(layer, Positions(activations, gradients))
        flops[on_positions] = counter.get_total_flops()
    assert flops[choice] < flops[not choice]


def test_the_empirical_fisher_is_another_one(tmp_path, fitted):
    """Sampled labels matter: factors from the data's own labels differ, those of another seed do too."""
    study = make_study(tmp_path / "empirical", use_empirical_fisher=True)
    score(study, ["ekfac"])
    sampled = load(fitted / "factors_ekfac", "gradient_covariance")
    empirical = load(tmp_path / "empirical" / "factors_ekfac", "gradient_covariance")
    inputs = [load(path / "factors_ekfac", "activation_covariance") for path in (fitted, tmp_path / "empirical")]
    for name in LAYERS:
        assert relative_error(empirical[name], sampled[name]) > 0.01
        assert relative_error(inputs[0][name], inputs[1][name]) < 1e-12
