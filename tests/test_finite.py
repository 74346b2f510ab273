"""No number that is stored is NaN or infinite: dead layers count nothing, and what overflows is refused by its name."""

import pytest
import torch

from influence_core.errors import UserError
from influence_core.factors import fit
from influence_core.factors.lambdas import LambdaSums
from influence_core.factors.strategies import damping_scale
from influence_core.precision import Precision
from tests.scripts import contents
from tests.studies import STRATEGIES, make_study, score
from tests.test_exactness import FLOAT64, relative_error
from tests.tiny import PAD, OfModel, TinyModel, TinyTask

PRECISIONS = pytest.mark.parametrize("precision", [FLOAT64, Precision()], ids=["float64", "float32"])

# ------------------------------------------------------------------------------------------- layers without gradient


class Branch(TinyModel):
    """The third layer's output plus that of a branch, `second`, which counts nothing in one of several ways."""

    how = "times zero"

    def hidden(self, tokens, mask):
        x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))
        if self.how == "under no_grad":
            with torch.no_grad():
                branch = self.second(x)
        else:
            branch = self.second(x)
        if self.how == "detached":
            branch = branch.detach()
        return torch.tanh(self.third(x + (0.0 if self.how in ("times zero", "unread") else 1.0) * torch.relu(branch)))


class BranchTask(TinyTask):
    def __init__(self, how, layers):
        super().__init__(layers=layers)
        self.how = how

    def load_model(self, checkpoint_dir=None, shared=False):
        model = Branch()
        model.load_state_dict(TinyTask().load_model().state_dict())
        model.how = self.how
        if self.how == "relu that is off":
            with torch.no_grad():
                model.second.bias.fill_(-100.0)
        return model.eval()


@PRECISIONS
@pytest.mark.parametrize("damping", ["0.01x", "heuristic", 1e-3])
@pytest.mark.parametrize("how", ["times zero", "under no_grad", "detached", "relu that is off"])
def test_a_layer_without_gradient_counts_nothing(tmp_path, capsys, how, damping, precision):
    """The scores of all strategies are those without the layer, which is named once."""
    study = make_study(tmp_path / "with", BranchTask(how, ["first", "second", "third"]), precision)
    scores = score(study, damping=damping)
    out = capsys.readouterr().out
    assert out.count("no gradient reaches second ") == 1
    expected = score(make_study(tmp_path / "without", BranchTask(how, ["first", "third"]), precision), damping=damping)
    for strategy in STRATEGIES:
        assert scores[strategy].isfinite().all()
        assert relative_error(scores[strategy], expected[strategy]) < 1e-6, strategy


def test_no_note_where_every_layer_has_a_gradient(tmp_path, capsys):
    score(make_study(tmp_path), ["identity"])
    assert "no gradient reaches" not in capsys.readouterr().out


@pytest.mark.parametrize("damping", ["0x", "1e-50x", "1e39x", 1e-50, 1e39, "1e400x", "nanx", -1.0, "-0.1x", "many"])
def test_damping_that_damps_nothing_is_refused(tmp_path, damping):
    """Multiples of zero, and numbers that are zero or infinite in float32; nothing is computed first."""
    with pytest.raises(UserError, match="damping"):
        damping_scale(damping)
    with pytest.raises(UserError, match="damping"):
        score(make_study(tmp_path), ["ekfac"], damping=damping)
    assert not contents(tmp_path)


def test_no_damping_at_all_is_refused_where_an_eigenvalue_is_zero(tmp_path):
    """In float64 for whoever knows better; but 1 / 0 is never a score."""
    task = BranchTask("times zero", ["first", "second", "third"])
    with pytest.raises(UserError, match="layer second"):
        score(make_study(tmp_path, task), ["ekfac"], damping=0.0)


@pytest.mark.parametrize("strategy", ["diagonal", "kfac", "ekfac"])
def test_eigenvalues_whose_inverse_float32_does_not_hold_are_refused(tmp_path, strategy):
    """A loss so small that 1 / eigenvalue is beyond 1e38."""

    class Small(TinyTask):
        def train_loss(self, model, batch, sample_labels=None):
            return super().train_loss(model, batch, sample_labels) * 1e-21

        def measurement(self, model, batch):
            return super().train_loss(model, batch)

    with pytest.raises(UserError, match=r"layer \w+ .*float32's range"):
        score(make_study(tmp_path, Small(), Precision()), [strategy], damping="0.01x")
    assert not list(tmp_path.rglob("pairwise*"))


class Vanishing(TinyTask):
    """A second layer whose weights are so small that the squares of the first one's gradients are zero in float32."""

    def load_model(self, checkpoint_dir=None, shared=False):
        model = super().load_model()
        with torch.no_grad():
            model.second.weight.mul_(1e-24)
        return model


@pytest.mark.parametrize("strategy", ["diagonal", "kfac", "ekfac"])
def test_gradients_whose_squares_vanish_are_not_taken_for_none(tmp_path, strategy):
    """A gradient of 1e-24 is one: in float64 it counts like any other, in float32 it is refused, never left out."""
    assert score(make_study(tmp_path / "64", Vanishing()), [strategy], damping="heuristic")[strategy].any()
    with pytest.raises(UserError, match=r"layer first .*float32's range"):
        score(make_study(tmp_path / "32", Vanishing(), Precision()), [strategy], damping="heuristic")


# ---------------------------------------------------------------------------------------- gradients that are no numbers


class Spoil(torch.autograd.Function):
    """The same numbers forward; backward, `value` in the rows that are marked."""

    @staticmethod
    def forward(ctx, x, rows, value):
        ctx.rows, ctx.value = rows, value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[ctx.rows] = ctx.value
        return gradient, None, None


class SpoiledModel(TinyModel):
    rows, value = None, float("nan")

    def hidden(self, tokens, mask):
        x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))
        x = torch.tanh(self.second(Spoil.apply(x, self.rows, self.value)))
        return torch.tanh(self.third(x))


class SpoiledTask(TinyTask):
    """The gradient of one example, known by its labels, is NaN, infinite or too large below the second layer."""

    def __init__(self, split, index, value, only=("train", "sampled", "measurement")):
        super().__init__()
        self.bad, self.value, self.only = self.load_dataset(split)[index]["labels"], value, only

    def load_model(self, checkpoint_dir=None, shared=False):
        model = SpoiledModel()
        model.load_state_dict(TinyTask().load_model().state_dict())
        model.value = self.value
        return model.eval()

    def train_loss(self, model, batch, sample_labels=None, which=None):
        which = which or ("train" if sample_labels is None else "sampled")
        model.rows = torch.tensor([self.is_spoiled(row[row != PAD], which) for row in batch["labels"]])
        return super().train_loss(model, batch, sample_labels)

    def is_spoiled(self, labels, which):
        return which in self.only and torch.equal(labels, self.bad)

    def measurement(self, model, batch):
        return self.train_loss(model, batch, which="measurement")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("strategy, split, only", [
    ("ekfac", "train", "sampled"), ("diagonal", "train", "sampled"), ("identity", "train", "train"),
    ("identity", "validation", "measurement"),
])  # fmt: skip
def test_a_gradient_that_is_no_number_is_refused(tmp_path, strategy, split, only, value):
    """In every pass, although the loss is finite: by layer and by the batch with the example; nothing is stored."""
    index = {"train": 17, "validation": 4}[split]
    task = SpoiledTask(split, index, value, [only])
    told = (
        rf"output gradient of layer first is NaN or infinite in the batch of examples ([\d, ]*, )?{index}(, [\d, ]*)?,"
    )
    with pytest.raises(UserError, match=told):
        score(make_study(tmp_path, task, Precision()), [strategy])
    assert not contents(tmp_path)


@pytest.mark.parametrize("strategy", ["ekfac", "diagonal"])
def test_gradients_whose_squares_overflow_are_refused(tmp_path, strategy):
    """1e25 is a float32 number, its square is not: stage, layer and batch are told."""
    task = SpoiledTask("train", 17, 1e25, ["sampled"])
    stage = {"ekfac": "Fit Covariance", "diagonal": "Fit Lambda"}[strategy]
    with pytest.raises(UserError, match=rf"{stage}: .* layer first .* examples ([\d, ]*, )?17(, [\d, ]*)?,"):
        score(make_study(tmp_path, task, Precision()), [strategy])
    assert not list(tmp_path.rglob("*.json"))


def test_scores_that_overflow_are_refused(tmp_path):
    """Two finite gradients of 1e25: query, example and layer are told."""

    class Both(SpoiledTask):
        def is_spoiled(self, labels, which):
            return which == "measurement" or super().is_spoiled(labels, which)

    with pytest.raises(UserError, match="score of query 0 with training example 17 at layer first"):
        score(make_study(tmp_path, Both("train", 17, 1e25, ["train"]), Precision()), ["identity"])
    assert not list(tmp_path.rglob("*.json"))


def test_an_input_that_is_no_number_is_refused(tmp_path):
    """A NaN that the loss does not show, as behind a mask: the layer that sees it first is told."""

    class Hidden(TinyModel):
        def hidden(self, tokens, mask):
            x = self.embedding(tokens) * mask.unsqueeze(-1)
            self.second(torch.where(tokens[..., None] == 3, float("nan"), 0.0).expand(*tokens.shape, 5).to(x.dtype))
            return torch.tanh(self.third(torch.tanh(self.first(x))))

    with pytest.raises(UserError, match="the input of layer second is NaN"):
        score(make_study(tmp_path, OfModel(Hidden), Precision()), ["ekfac"])
    assert not contents(tmp_path)


# ------------------------------------------------------------------------------------------------------- eigenvalues


def test_an_eigendecomposition_that_fails_names_its_layer(tmp_path, monkeypatch):
    def fail(covariance, device):
        if len(covariance) == 6:  # of second's inputs, with the bias's one
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigendecomposition(covariance, device)

    eigendecomposition = fit.eigendecomposition
    monkeypatch.setattr(fit, "eigendecomposition", fail)
    with pytest.raises(UserError, match="the activation covariance of layer second .*failed to converge"):
        score(make_study(tmp_path), ["kfac"])
    assert not list(tmp_path.rglob("eigen*.json")) and not list(tmp_path.rglob("pairwise*"))


def test_lambda_that_is_no_number_is_not_stored(tmp_path, monkeypatch):
    """Whatever made it: the last look before a file is written."""
    update = LambdaSums.update

    def spoil(sums, layer, captured):
        update(sums, layer, captured)
        sums.tensors["lambda.third"][0, 0] = float("inf")

    monkeypatch.setattr(LambdaSums, "update", spoil)
    with pytest.raises(UserError, match="Fit Lambda: .* layer third"):
        score(make_study(tmp_path), ["ekfac"])
    assert not list(tmp_path.rglob("lambda*.json"))
