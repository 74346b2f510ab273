"""What is checked before any work: tasks and models that break the contract are refused, those that keep it are exact.

Each broken one was seen to give wrong scores without the check; each kept one is compared with plain autograd, example
by example.
"""

import pytest
import torch
import torch.nn.functional as F

from influence_core.errors import UserError
from influence_core.losses import linear_cross_entropy
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.study import Study
from influence_core.task import EXAMPLE_INDEX
from tests.scripts import contents
from tests.studies import make_study, score, score_tiny
from tests.test_exactness import FLOAT64, relative_error
from tests.tiny import PAD, TinyTask

# ------------------------------------------------------------------------------------------------ losses that break it


class Altered(TinyTask):
    """The tiny task, its loss altered by the batch."""

    def __init__(self, alter, which=("train", "measurement")):
        super().__init__()
        self.alter, self.which = alter, which

    def train_loss(self, model, batch, sample_labels=None):
        loss = super().train_loss(model, batch, sample_labels)
        return self.alter(loss, model, batch) if "train" in self.which else loss

    def measurement(self, model, batch):
        loss = super().train_loss(model, batch)
        return self.alter(loss, model, batch) if "measurement" in self.which else loss


def contrastive(loss, model, batch):
    """Each example's mean state against those of the others in the batch."""
    mask = batch["labels"] != PAD
    states = (model.hidden(batch["tokens"], mask) * mask.unsqueeze(-1)).sum(1)
    return F.cross_entropy(states @ states.T, torch.arange(len(states)), reduction="sum")


def batch_statistics(loss, model, batch):
    logits = model(batch["tokens"], batch["labels"] != PAD)
    return (logits - logits.mean((0, 1))).square().sum()


LOSSES = {
    "mean over examples": (lambda loss, model, batch: loss / len(batch["labels"]), "mean over the batch"),
    "mean over positions": (
        lambda loss, model, batch: loss / (batch["labels"] != PAD).sum(),
        "mean over the batch",
    ),
    "divided by the padded length": (
        lambda loss, model, batch: loss / batch["labels"].shape[1],
        "is no sum of theirs",
    ),
    "negatives from the batch": (contrastive, "depends on what shares the batch"),
    "statistics of the batch": (batch_statistics, "depends on what shares the batch"),
    "random": (lambda loss, model, batch: loss * (1 + torch.rand(())), "random"),
    "a constant for each batch": (lambda loss, model, batch: loss + 5, "is no sum of theirs"),
}


@pytest.mark.parametrize("which", ["train", "measurement"])
@pytest.mark.parametrize("precision", [FLOAT64, Precision()], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_is_no_sum_over_examples_is_refused(tmp_path, kind, precision, which):
    """Means, negatives and statistics of the batch, chance; in the training loss and in the measurement."""
    alter, told = LOSSES[kind]
    study = make_study(tmp_path, Altered(alter, [which]), precision)
    with pytest.raises(UserError, match=told) as refusal:
        score(study, ["identity"])
    assert {"train": "training loss", "measurement": "measurement"}[which] in str(refusal.value)
    assert not contents(tmp_path)


def test_a_sum_that_is_scaled_or_weighted_by_example_is_fine(tmp_path):
    """Additive all the same: a mean over an example's own positions, and weights of its own."""

    def own_mean(loss, model, batch):
        logits, labels = model(batch["tokens"], batch["labels"] != PAD), batch["labels"]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=PAD, reduction="none")
        return (losses.sum(1) / (labels != PAD).sum(1)).sum()

    assert score_tiny(tmp_path, Altered(own_mean), ["identity"])["identity"].isfinite().all()


NO_GRADIENT = {
    "no gradient": (lambda loss, model, batch: loss.detach(), "no gradient"),
    "a vector": (lambda loss, model, batch: loss.expand(2), "must be one number"),
    "a number": (lambda loss, model, batch: float(loss.detach()), "must be one number"),
}


@pytest.mark.parametrize("kind", NO_GRADIENT)
def test_what_is_no_loss_is_refused(tmp_path, kind):
    alter, told = NO_GRADIENT[kind]
    with pytest.raises(UserError, match=told):
        score_tiny(tmp_path, Altered(alter), ["identity"])


# ------------------------------------------------------------------------------------------------------------- masks


class Masked(TinyTask):
    """A position mask that is what `make(labels)` says."""

    def __init__(self, make, longest=None):
        super().__init__()
        self.make, self.longest = make, longest

    def collate(self, examples):
        return super().collate(examples, self.longest)

    def position_mask(self, batch, layer_name):
        return self.make(batch["labels"])


MASKS = {
    "none, padded to the longest": (lambda labels: None, None, "padding is counted"),
    "none, always padded alike": (lambda labels: None, 12, "of padding of one example"),
    "ones": (lambda labels: torch.ones_like(labels), None, "padding is counted"),
    "a position too few": (lambda labels: (labels != PAD) & (labels.roll(-1, 1) != PAD), 12, "leaves out positions"),
    "of another stream": (lambda labels: (labels != PAD).flip(1), 12, "leaves out positions"),
    "of a longer stream": (
        lambda labels: torch.arange(12).expand(len(labels), 12) < 10,
        12,
        "of padding of one example",
    ),
    "of the other example": (lambda labels: (labels != PAD).flip(0), None, "stream"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_is_not_the_layers_own_is_refused(tmp_path, kind):
    """By the layer's name; no scores, no factors."""
    make, longest, told = MASKS[kind]
    with pytest.raises(UserError, match=told) as refusal:
        score_tiny(tmp_path, Masked(make, longest), ["kfac"])
    assert "layer first" in str(refusal.value)
    assert not contents(tmp_path)


def test_unpadded_batches_need_no_mask(tmp_path):
    """Examples of one length: None is right, also where the last positions of every example carry no loss."""

    class Unpadded(TinyTask):
        def load_dataset(self, split, indices=None):
            examples = [example for example in super().load_dataset(split) if len(example["tokens"]) > 5]
            return [{key: value[:6] for key, value in example.items()} for example in examples]

        def position_mask(self, batch, layer_name):
            return None

        def train_loss(self, model, batch, sample_labels=None):
            labels = batch["labels"].clone()
            labels[:, 4:] = -100
            uniforms = None if sample_labels is None else sample_labels.uniforms(batch[EXAMPLE_INDEX], 6)
            hidden = model.hidden(batch["tokens"], torch.ones_like(labels))
            return linear_cross_entropy(hidden, model.head.weight, labels, uniforms)

    assert score_tiny(tmp_path, Unpadded(), ["kfac"])["kfac"].isfinite().all()


class Trailing(TinyTask):
    """Labels aligned with tokens, of which the first or the last four carry no loss: real positions all the same."""

    def __init__(self, without):
        super().__init__()
        self.without = without

    def load_dataset(self, split, indices=None):
        examples = [example for example in super().load_dataset(split) if len(example["tokens"]) > 6]
        for example in examples:
            example["real"] = torch.ones_like(example["tokens"])
            example["labels"][self.without] = PAD
        return examples

    def collate(self, examples):
        real = [F.pad(example["real"], (0, 8 - len(example["real"]))) for example in examples]
        return {**super().collate(examples, 8), "real": torch.stack(real)}

    def train_loss(self, model, batch, sample_labels=None):
        labels, uniforms = batch["labels"], None
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], labels.shape[1])
        hidden = model.hidden(batch["tokens"], batch["real"])
        return linear_cross_entropy(hidden, model.head.weight, labels, uniforms)

    def position_mask(self, batch, layer_name):
        return batch["real"]


@pytest.mark.parametrize("without", [slice(-4, None), slice(0, 4)], ids=["trailing", "prompt"])
def test_real_tokens_without_loss_are_no_padding(tmp_path, without):
    assert score_tiny(tmp_path, Trailing(without), ["kfac"])["kfac"].isfinite().all()


class LastPosition(TinyTask):
    """Strings of two letters and of one length, some with equal ones first; the loss reads the last position."""

    def load_dataset(self, split, indices=None):
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(0, 2, (12, 6), generator=generator)
        tokens[::2, :4] = 0
        return [{"tokens": row, "labels": row} for row in tokens]

    def position_mask(self, batch, layer_name):
        return None

    def train_loss(self, model, batch, sample_labels=None):
        logits, labels = model(batch["tokens"], torch.ones_like(batch["tokens"]))[:, -1], batch["labels"][:, -1]
        if sample_labels is not None:
            labels = sample_labels.sample(logits, sample_labels.uniforms(batch[EXAMPLE_INDEX], 1)[:, 0])
        return F.cross_entropy(logits, labels, reduction="sum")


def test_equal_tokens_at_the_beginning_are_no_padding(tmp_path):
    assert score_tiny(tmp_path, LastPosition(), ["kfac"])["kfac"].isfinite().all()


def test_a_measurement_that_nearly_cancels_is_no_broken_one(tmp_path):
    """A margin of nearly nothing in float32: what rounding leaves of it is not additive, and need not be."""

    class Margin(TinyTask):
        def measurement(self, model, batch):
            mask = batch["labels"] != PAD
            logits = (model(batch["tokens"], mask) * mask.unsqueeze(-1)).sum(1)
            return (logits[:, 0] - (logits[:, 0] + 1e-6 * logits[:, 1])).sum()

    assert score(make_study(tmp_path, Margin(), Precision()), ["identity"])["identity"].isfinite().all()


# ---------------------------------------------------------------------------------- weights, batches, what it says


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_width_than_the_analysis_are_refused(tmp_path, dtype):
    """With the remedy; 16-bit weights are what from_pretrained gives for most checkpoints of today."""
    study = make_study(tmp_path, precision=Precision())
    study.model.to(dtype)
    with pytest.raises(UserError, match=r"weights are \w+ \(the first: embedding.weight\).*dtype=torch.float32"):
        score(study, ["identity"])
    study.model.float().third.to(dtype)
    with pytest.raises(UserError, match=r"the first: third.weight"):
        score(study, ["identity"])
    assert not contents(tmp_path)


@pytest.mark.parametrize("emulated", [True, False], ids=["emulated", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_16_bit_weights(tmp_path, dtype, emulated):
    """The scores are those of the same weights in float32, within rounding; the model keeps its bits."""
    task, precision = TinyTask(), Precision(torch.bfloat16, emulated=emulated)
    scores = []
    for directory, convert in (("narrow", lambda model: model), ("wide", lambda model: model.float())):
        study = Study(task, convert(task.load_model().to(dtype)), task.load_dataset("train"), tmp_path / directory,
                      Runtime(precision=precision, seed=11))  # fmt: skip
        before = {name: value.clone() for name, value in study.model.state_dict().items()}
        scores.append(score(study, ["ekfac", "identity"], damping="heuristic"))
        after = study.model.state_dict()
        assert all(
            torch.equal(before[name], after[name]) and after[name].dtype == before[name].dtype for name in before
        )
    tolerance = {(torch.bfloat16, True): 1e-6, (torch.float16, True): 1e-6}.get((dtype, emulated), 0.15)
    for strategy in ("ekfac", "identity"):
        assert relative_error(scores[0][strategy], scores[1][strategy]) < tolerance


def test_the_check_says_what_it_looked_at(tmp_path, capsys):
    """The shortest and the longest example of each dataset, and the seconds; once."""
    task = TinyTask()
    score(make_study(tmp_path, task), ["ekfac"])
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("  checked")]
    for split in ("train", "validation"):
        lengths = [len(example["tokens"]) for example in task.load_dataset(split)]
        shortest, longest = lengths.index(min(lengths)), lengths.index(max(lengths))
        assert f"{shortest} and {longest} of the" in line
    assert line.endswith(" s)")


def test_single_examples_are_enough(tmp_path):
    """A training set of one example and one query."""
    scores = score(make_study(tmp_path, num_train=1), ["identity"], num_queries=1)
    assert scores["identity"].shape == (1, 1)


@pytest.mark.parametrize("which", ["train", "queries"])
def test_no_examples_are_refused(tmp_path, which):
    study = make_study(tmp_path, num_train=0 if which == "train" else None)
    with pytest.raises(UserError, match="is empty"):
        score(study, ["identity"], num_queries=0 if which == "queries" else None)


def test_what_is_no_tensor_in_a_batch_is_named(tmp_path):
    class Texts(TinyTask):
        def collate(self, examples):
            return {**super().collate(examples), "texts": ["a"] * len(examples)}

    with pytest.raises(UserError, match="'texts' .a list"):
        score_tiny(tmp_path, Texts(), ["identity"])
