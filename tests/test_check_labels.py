"""Sampled labels that depend on the batch or are ignored are refused; those drawn as promised are taken."""

import pytest
import torch
import torch.nn.functional as F

from influence_core.errors import UserError
from influence_core.labels import LabelSampler
from influence_core.losses import linear_cross_entropy
from influence_core.precision import Precision
from influence_core.task import EXAMPLE_INDEX
from tests import reference
from tests.scripts import contents
from tests.studies import make_study, score, score_tiny
from tests.test_exactness import FLOAT64, relative_error
from tests.tiny import PAD, OfModel, TinyModel, TinyTask


class LeftPadded(TinyTask):
    """Rows padded on the left; uniforms by column of the padded batch (`by_column`), or the example's own position."""

    def __init__(self, by_column):
        super().__init__()
        self.by_column = by_column

    def collate(self, examples):
        batch = super().collate(examples)
        shifts = (batch["labels"] == PAD).sum(1)
        return {key: torch.stack([row.roll(int(s)) for row, s in zip(value, shifts)]) for key, value in batch.items()}

    def train_loss(self, model, batch, sample_labels=None):
        labels, uniforms = batch["labels"], None
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], labels.shape[1])
            if not self.by_column:
                own = ((labels != PAD).cumsum(1) - 1).clamp(min=0)
                uniforms = uniforms.gather(1, own)
        return linear_cross_entropy(model.hidden(batch["tokens"], labels != PAD), model.head.weight, labels, uniforms)


@pytest.mark.parametrize("precision", [FLOAT64, Precision()], ids=["float64", "float32"])
def test_sampled_labels_that_depend_on_the_padding_are_refused(tmp_path, precision):
    """Uniforms by column move with left padding; by the example's own positions they are those of right padding."""
    with pytest.raises(UserError, match="sampled labels .* depend on padding"):
        score(make_study(tmp_path / "wrong", LeftPadded(by_column=True), precision), ["ekfac"])
    assert not contents(tmp_path)
    right = score(make_study(tmp_path / "right", LeftPadded(by_column=False), precision), ["ekfac"])["ekfac"]
    expected = score(make_study(tmp_path / "expected", precision=precision), ["ekfac"])["ekfac"]
    assert relative_error(right, expected) < (1e-9 if precision is FLOAT64 else 1e-3)


class OfTheBatch(TinyTask):
    """Uniforms by the row of the batch instead of by the example."""

    def train_loss(self, model, batch, sample_labels=None):
        rows = torch.arange(len(batch["labels"]))
        return super().train_loss(model, batch | {EXAMPLE_INDEX: rows}, sample_labels)


class Ignoring(TinyTask):
    """A task that has no sampled labels: one that never looks, and one that asks for numbers and lets them lie."""

    asks = False

    def train_loss(self, model, batch, sample_labels=None):
        if self.asks and sample_labels is not None:
            sample_labels.uniforms(batch[EXAMPLE_INDEX], 3)
        return super().train_loss(model, batch)


class Asking(Ignoring):
    asks = True


@pytest.mark.parametrize("task, told", [
    (OfTheBatch(), "depend on padding or on the batch"),
    (Ignoring(), "same with sample_labels as without"),
    (Asking(), "same with sample_labels as without"),
])  # fmt: skip
def test_labels_that_are_not_sampled_as_promised_are_refused(tmp_path, task, told):
    """But not where no Fisher is fitted, or the empirical one was asked for."""
    with pytest.raises(UserError, match=told):
        score(make_study(tmp_path / "true", task), ["diagonal"])
    assert not contents(tmp_path)
    score(make_study(tmp_path / "identity", task), ["identity"])
    score(make_study(tmp_path / "empirical", task, use_empirical_fisher=True), ["diagonal"])


class Classifier(TinyTask):
    """One label of two for each example, sampled by the sampler; the model may be as good as certain."""

    def __init__(self, confidence, draw="sampler"):
        super().__init__()
        self.confidence, self.draw = confidence, draw

    def train_loss(self, model, batch, sample_labels=None):
        mask = batch["labels"] != PAD
        states = (model.hidden(batch["tokens"], mask) * mask.unsqueeze(-1)).sum(1)
        logits = torch.stack([states.sum(1) * 0.1 + self.confidence, states.sum(1) * 0.0], 1)
        labels = torch.zeros(len(logits), dtype=torch.long)
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], 1)[:, 0]
            if self.draw == "sampler":
                labels = sample_labels.sample(logits, uniforms)
            else:  # by the task's own search
                labels = (uniforms >= logits.softmax(-1)[:, 0]).long()
        return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("draw", ["sampler", "by the task"])
@pytest.mark.parametrize("confidence", [0.0, 3.0, 30.0])
def test_a_model_that_is_certain_of_two_labels_is_not_taken_for_one_that_ignores_them(tmp_path, confidence, draw):
    """Sampled labels that happen to be the data's own, of two examples with one label each."""
    task = Classifier(confidence, draw)
    if confidence == 3.0 and draw == "by the task":
        pytest.skip("labels of the data's own eight times running, with a loss that is not small: 1 in 10")
    assert score(make_study(tmp_path, task), ["diagonal"], damping=1.0)["diagonal"].isfinite().all()


def test_uniform_labels_are_those_of_the_uniforms(tmp_path):
    """The check's labels depend on the uniforms alone; outside it, on the model as ever."""
    from influence_core.labels import labels_from_uniforms_alone, sample_categorical

    uniforms = torch.tensor([0.0, 0.3, 0.74, 1 - 2**-24])
    weights = torch.tensor([[1e-9, 0.0, 1.0, 1e-9, 1e-9]]).expand(4, 5)
    with labels_from_uniforms_alone():  # the second category is not possible
        assert sample_categorical(weights, uniforms).tolist() == [0, 2, 3, 4]
        assert LabelSampler(0).sample(weights.log(), uniforms).tolist() == [0, 2, 3, 4]
    assert sample_categorical(weights, uniforms).tolist() == [0, 2, 2, 2]
    assert reference.sampled_label(weights[0].log(), 0.3) == 2


class Choices(TinyTask):
    """Two to four choices an example: the others are impossible."""

    def train_loss(self, model, batch, sample_labels=None):
        mask = batch["labels"] != PAD
        logits = (model(batch["tokens"], mask) * mask.unsqueeze(-1)).sum(1)
        num_choices = 2 + batch["labels"][:, 0] % 3
        logits = logits.masked_fill(torch.arange(logits.shape[1]) >= num_choices[:, None], float("-inf"))
        labels = batch["labels"][:, 0] % 2
        if sample_labels is not None:
            labels = sample_labels.sample(logits, sample_labels.uniforms(batch[EXAMPLE_INDEX], 1)[:, 0])
        return F.cross_entropy(logits, labels, reduction="sum")


def test_impossible_labels_are_never_sampled(tmp_path):
    assert score_tiny(tmp_path, Choices(), ["ekfac"])["ekfac"].isfinite().all()


class DeadEnd(TinyModel):
    """The last tracked layer is called, and nothing comes of it."""

    def hidden(self, tokens, mask):
        return (
            super().hidden(tokens, mask).detach()
            + torch.tanh(self.second(torch.tanh(self.first(self.embedding(tokens)))))[..., :4]
        )


def test_labels_that_are_ignored_are_found_whatever_the_last_layer(tmp_path):
    """One that no gradient reaches says nothing of the labels."""

    class DeadEnded(Ignoring, OfModel):
        pass

    with pytest.raises(UserError, match="same with sample_labels"):
        score(make_study(tmp_path, DeadEnded(DeadEnd)), ["diagonal"])
