"""Every kind of parameter against the dense reference in float64: tables, tied and not, vectors, and the matrices."""

import pytest
import torch
import torch.nn.functional as F

from influence_core.analysis import analyze
from influence_core.layers import find_tracked_layers
from influence_core.runtime import Runtime
from influence_core.study import Study
from tests import reference
from tests.test_exactness import DAMPING, FLOAT64, SEED, load, relative_error
from tests.tiny import VOCABULARY
from tests.whole import NAMES, WholeTask

HEADS = [("tied", False), ("tied", True), ("untied", False), ("untied", True), ("tied, with a bias", True),
         ("untied, with a bias", True)]  # fmt: skip
MATRICES = {"first": False, "second": True}


class Truth:
    """All quantities by the reference, an example at a time."""

    def __init__(self, head, held):
        self.task = WholeTask(head, held)
        self.model = self.task.load_model().double()
        self.train = self.task.load_dataset("train")[:12]  # the reference takes its time
        self.queries = self.task.load_dataset("validation")[:4]

    def loss(self, example, labels, factor=1.0):
        tokens, mask = example["tokens"][None], torch.ones(1, len(labels), dtype=torch.bool)
        return lambda model: factor * F.cross_entropy(model(tokens, mask)[0], labels, reduction="sum")

    def sampled(self, index, example):
        logits = self.model(example["tokens"][None], torch.ones(1, len(example["tokens"]), dtype=torch.bool))[0]
        uniforms = [reference.uniform(SEED, index, position) for position in range(len(logits))]
        return torch.tensor([reference.sampled_label(row, u) for row, u in zip(logits, uniforms)])

    def gradients(self, name, losses):
        """[n, numbers] of all parameters of a layer; a head's bias stands with its table."""
        if name in MATRICES:
            return torch.stack([reference.layer_gradient(self.model, name, loss, MATRICES[name]) for loss in losses])
        owners = [name] + ["head"] * (name == "embedding" and self.task.head == "tied, with a bias")
        keys = {id(p): f"{owner}.{key}" for owner in owners
                for key, p in self.model.get_submodule(owner).named_parameters()}  # fmt: skip
        each = [torch.stack([reference.parameter_gradient(self.model, key, loss) for loss in losses])
                for key in keys.values()]  # fmt: skip
        return torch.cat([x if x.dim() == 3 else x.unsqueeze(-1) for x in each], dim=-1)

    def fisher_losses(self):
        return [self.loss(x, self.sampled(index, x)) for index, x in enumerate(self.train)]

    def scores(self, strategy, name):
        queries = self.gradients(name, [self.loss(x, x["labels"], -0.5) for x in self.queries])
        train = self.gradients(name, [self.loss(x, x["labels"]) for x in self.train])
        fisher = self.gradients(name, self.fisher_losses())
        if name not in MATRICES and strategy != "identity":
            strategy = "diagonal"
        covariances = (None, None)
        if strategy in ("kfac", "ekfac"):
            masks = [torch.ones(len(x["tokens"]), dtype=torch.bool) for x in self.train]
            covariances = reference.covariances(self.model, name, self.fisher_losses(), masks)
        approximation = reference.approximate_fisher(strategy, fisher, *covariances)
        return reference.scores(strategy, approximation, DAMPING, queries, train)


def score(truth, directory, strategies, precision=FLOAT64, **options):
    runtime = Runtime(precision=precision, seed=SEED)
    study = Study(truth.task, truth.model.to(precision.sum_dtype), truth.train, directory, runtime)
    options = {"damping": DAMPING, "query_batch_size": 4, "train_batch_size": 7, "factor_batch_size": 6} | options
    scores = analyze(study, strategies, truth.queries, **options)
    truth.model.double()
    return study, scores


@pytest.mark.parametrize("head, held", HEADS)
def test_scores_of_every_parameter(head, held, tmp_path):
    """Of all four strategies; nothing of the model is left out."""
    truth = Truth(head, held)
    strategies = ["identity", "diagonal", "kfac", "ekfac"]
    study, scores = score(truth, tmp_path, strategies)
    assert sum(layer.num_parameters for layer in study.layers) == sum(p.numel() for p in truth.model.parameters())
    for strategy in strategies:
        expected = sum(truth.scores(strategy, name) for name in NAMES[head])
        assert relative_error(scores[strategy], expected) < 1e-9, strategy


@pytest.mark.parametrize("head, held", HEADS)
def test_each_layer_alone(head, held, tmp_path):
    """So that one's error hides in no other's; its factor is the mean of squares, summed within an example before."""
    truth = Truth(head, held)
    for name in NAMES[head]:
        truth.task.layers = [name]
        _, scores = score(truth, tmp_path / name, ["ekfac"])
        assert relative_error(scores["ekfac"], truth.scores("ekfac", name)) < 1e-9, name
        if name not in MATRICES:
            stored = load(tmp_path / name / "factors_ekfac", "lambda_matrix")[name]
            expected = truth.gradients(name, truth.fisher_losses()).square().mean(0)
            assert relative_error(stored, expected.view_as(stored)) < 1e-11, name
            assert not (tmp_path / name / "factors_ekfac" / "covariance.json").exists()


def test_a_tied_table_is_one_layer():
    model = WholeTask("tied").load_model()
    (table,) = find_tracked_layers(model, ["embedding"])
    assert set(table.sites) == {"embedding", "head"} and table.shape == (VOCABULARY, 4)
    with pytest.raises(Exception, match="embedding and head are the same"):
        find_tracked_layers(model, ["embedding", "head"])
