"""The core against tests/reference.py, for every strategy, stage and kind of layer."""

import pytest
import torch
import torch.nn.functional as F

from influence_core.analysis import analyze
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.study import Study
from tests import reference
from tests.tiny import PAD, TinyTask

DAMPING = 1e-3
SEED = 11
FLOAT64 = Precision(torch.float64, torch.float64)


class Reference:
    """All quantities of the tiny task, by the reference."""

    def __init__(self, shared=False, empirical=False):
        self.task = TinyTask()
        self.model = self.task.load_model(shared=shared).double()
        self.train = self.task.load_dataset("train")
        self.queries = self.task.load_dataset("validation")
        self.empirical = empirical

    def loss(self, example, labels):
        tokens, mask = example["tokens"][None], torch.ones(1, len(labels), dtype=torch.bool)

        def of(model):
            return F.cross_entropy(model(tokens, mask)[0], labels, reduction="sum")

        return of

    def fisher_losses(self):
        losses = []
        for index, example in enumerate(self.train):
            labels = example["labels"]
            if not self.empirical:
                logits = self.model(example["tokens"][None], torch.ones(1, len(labels), dtype=torch.bool))[0]
                uniforms = [reference.uniform(SEED, index, position) for position in range(len(labels))]
                labels = torch.tensor([reference.sampled_label(row, u) for row, u in zip(logits, uniforms)])
            losses.append(self.loss(example, labels))
        return losses

    def gradients(self, name, losses):
        return torch.stack([reference.layer_gradient(self.model, name, loss, name == "second") for loss in losses])

    def covariances(self, name):
        masks = [torch.ones(len(example["tokens"]), dtype=torch.bool) for example in self.train]
        return reference.covariances(self.model, name, self.fisher_losses(), masks)

    def approximate_fisher(self, strategy, name):
        return reference.approximate_fisher(
            strategy, self.gradients(name, self.fisher_losses()), *self.covariances(name)
        )

    def scores(self, strategy, damping=DAMPING):
        total = 0
        for name in self.task.layers:
            query_gradients = self.gradients(name, [self.loss(x, x["labels"]) for x in self.queries])
            train_gradients = self.gradients(name, [self.loss(x, x["labels"]) for x in self.train])
            approximation = self.approximate_fisher(strategy, name)
            total = total + reference.scores(strategy, approximation, damping, query_gradients, train_gradients)
        return total


def run(directory, strategies, truth, precision=FLOAT64, **options):
    """(study, {strategy: scores}) by the core."""
    model = truth.model.to(precision.product_dtype)
    runtime = Runtime(precision=precision, seed=SEED)
    study = Study(truth.task, model, truth.train, directory, runtime, use_empirical_fisher=truth.empirical)
    options = {"damping": DAMPING, "query_batch_size": 4, "train_batch_size": 7, "factor_batch_size": 6} | options
    scores = analyze(study, strategies, truth.queries, **options)
    truth.model.double()
    return study, scores


def relative_error(actual, expected):
    expected = expected.detach()
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "layer called twice"])
@pytest.mark.parametrize("empirical", [False, True], ids=["sampled labels", "empirical Fisher"])
def test_factors_equal_the_dense_reference(tmp_path, shared, empirical):
    """Covariances, eigendecompositions recomposed, Lambda and diagonal, each layer, in float64."""
    truth = Reference(shared, empirical)
    run(tmp_path, ["ekfac", "diagonal"], truth)
    stored = {kind: load(tmp_path / "factors_ekfac", kind) for kind in KINDS}
    diagonal = load(tmp_path / "factors_diagonal", "lambda_matrix")
    for name in truth.task.layers:
        gradients = truth.gradients(name, truth.fisher_losses())
        covariances = truth.covariances(name)
        for kind, expected in zip(("activation", "gradient"), covariances):
            assert relative_error(stored[f"{kind}_covariance"][name], expected) < 1e-11
            values, vectors = stored[f"{kind}_eigenvalues"][name], stored[f"{kind}_eigenvectors"][name]
            assert relative_error(vectors @ values.diag() @ vectors.T, expected) < 1e-11
        basis = torch.kron(stored["gradient_eigenvectors"][name], stored["activation_eigenvectors"][name])
        expected = torch.diag(basis.T @ reference.fisher(gradients) @ basis)
        assert relative_error(stored["lambda_matrix"][name].flatten(), expected) < 1e-11
        ekfac = basis @ stored["lambda_matrix"][name].flatten().diag() @ basis.T
        assert relative_error(ekfac, truth.approximate_fisher("ekfac", name)) < 1e-9
        assert relative_error(diagonal[name], gradients.square().mean(0)) < 1e-11


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "layer called twice"])
@pytest.mark.parametrize("precision, tolerance", [(FLOAT64, 1e-9), (Precision(), 2e-4)], ids=["float64", "float32"])
def test_scores_equal_the_dense_reference(tmp_path, strategy, shared, precision, tolerance):
    """Triple product of query gradient, dense inverse and training gradient, summed over layers."""
    truth = Reference(shared)
    _, scores = run(tmp_path, [strategy], truth, precision)
    assert relative_error(scores[strategy], truth.scores(strategy)) < tolerance


def test_several_strategies_from_one_pass_equal_each_alone(tmp_path):
    truth = Reference()
    names = ["identity", "diagonal", "kfac", "ekfac"]
    _, together = run(tmp_path / "together", names, truth)
    for name in names:
        _, alone = run(tmp_path / "alone", [name], truth)
        assert relative_error(together[name], alone[name]) < 1e-12


KINDS = [
    f"{kind}_{part}" for kind in ("activation", "gradient") for part in ("covariance", "eigenvalues", "eigenvectors")
]
KINDS.append("lambda_matrix")


def load(directory, kind):
    from safetensors.torch import load_file

    return load_file(directory / f"{kind}.safetensors")


def test_masked_padding_is_what_the_reference_leaves_out():
    """The tiny task pads: without that the masks above would test nothing."""
    task = TinyTask()
    batch = task.collate(task.load_dataset("train"))
    assert (batch["labels"] == PAD).any()
