"""What is checked before any work: tasks and models that break the contract are refused, those that keep it are exact.

Each broken one was seen to give wrong scores without the check; each kept one is compared with plain autograd, example
by example.
"""

import pytest
import torch
import torch.nn.functional as F

from influence_core.errors import UserError
from influence_core.labels import LabelSampler
from influence_core.losses import linear_cross_entropy
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.study import Study
from influence_core.task import EXAMPLE_INDEX
from tests import reference
from tests.scripts import contents
from tests.studies import make_study, score, score_tiny
from tests.test_exactness import FLOAT64, relative_error
from tests.tiny import PAD, TinyModel, TinyTask

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
    "a number": (lambda loss, model, batch: float(loss), "must be one number"),
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


# ---------------------------------------------------------------------------------------------------- sampled labels


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


# ------------------------------------------------------------------------------------------------ what layers see


class Flattening(TinyModel):
    """As OPT and shared experts do: [examples, positions, features] -> [examples * positions, features] and back."""

    def hidden(self, tokens, mask):
        x = self.embedding(tokens) * mask.unsqueeze(-1)
        x = torch.tanh(self.first(x))
        flat = self.second(x.reshape(-1, x.shape[-1]))
        return torch.tanh(self.third(torch.tanh(flat).view_as(x)))


class SequenceFirst(TinyModel):
    """[positions, examples, features], as torch's own Transformer by default."""

    def hidden(self, tokens, mask):
        x = (self.embedding(tokens) * mask.unsqueeze(-1)).transpose(0, 1)
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return torch.tanh(self.third(x)).transpose(0, 1)


class OnceForAll(TinyModel):
    """A layer that projects relative positions, once for all examples; flat, or with one row."""

    with_axis = False

    def hidden(self, tokens, mask):
        relative = self.second(torch.ones(6, 5, dtype=self.second.weight.dtype).cumsum(0)[None] if self.with_axis else
                               torch.ones(6, 5, dtype=self.second.weight.dtype).cumsum(0))  # fmt: skip
        x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))
        return torch.tanh(self.third(x + relative.mean(-2)))


class OnceForAllWithAxis(OnceForAll):
    with_axis = True


class Routed(TinyModel):
    """An expert that sees the positions which are sent to it."""

    def hidden(self, tokens, mask):
        x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))
        chosen = mask & (tokens % 3 != 0)
        out = x.clone()
        out[chosen] = torch.tanh(self.second(x[chosen]))
        return torch.tanh(self.third(out))


class Packed(TinyModel):
    """All real positions of the batch, one after the other, in one row."""

    def hidden(self, tokens, mask):
        x = self.embedding(tokens)
        packed = torch.tanh(self.second(torch.tanh(self.first(x[mask][None]))))
        out = x.new_zeros(*x.shape[:2], 5)
        out[mask] = packed[0]
        return torch.tanh(self.third(out))


class Uncalled(TinyModel):
    def hidden(self, tokens, mask):
        return torch.tanh(self.third(torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))))


class Twice(TinyModel):
    """DoRA's way: the layer sees the tokens, and once more a matrix of ones for all of them."""

    def hidden(self, tokens, mask):
        x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))
        norm = self.second(torch.eye(5, dtype=x.dtype)).norm()
        return torch.tanh(self.third(torch.tanh(self.second(x) / norm)))


class OfModel(TinyTask):
    """The tiny task with another model."""

    def __init__(self, model_class, **options):
        super().__init__(**options)
        self.model_class = model_class

    def load_model(self, checkpoint_dir=None, shared=False):
        model = self.model_class()
        model.load_state_dict(TinyTask().load_model().state_dict())
        return model.eval()


MODELS = {
    "sequence first": (SequenceFirst, "layer first .*rows come second"),
    "once for all, flat": (OnceForAll, "layer second .*(once for all|relative positions)"),
    "once for all, one row": (OnceForAllWithAxis, "layer second .*(once for all|relative positions)"),
    "routed": (Routed, "layer second .*picked positions"),
    "packed": (Packed, "layer first .*(packed|padding|mask)"),
    "not called": (Uncalled, "did not call: second"),
    "once for all beside its own": (Twice, "layer second .*once for all"),
}


@pytest.mark.parametrize("masked", [True, False], ids=["with a mask", "without"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_whose_rows_are_no_examples_is_refused(tmp_path, kind, masked):
    """By its name and the likely cause."""
    model_class, told = MODELS[kind]
    task = OfModel(model_class, masked=masked)
    if not masked:
        told = "layer (first|second)|did not call: second"
    with pytest.raises(UserError, match=told):
        score_tiny(tmp_path, task, ["ekfac"])
    assert not contents(tmp_path)


def test_sequence_first_layers_of_as_many_positions_as_examples_are_refused(tmp_path):
    """The case that shapes alone let pass: as many positions as there are examples in a batch, and nothing padded."""

    class Square(OfModel):
        def load_dataset(self, split, indices=None):
            examples = [example for example in super().load_dataset(split) if len(example["tokens"]) >= 4]
            return [{key: value[:4] for key, value in example.items()} for example in examples]

        def length(self, example):
            return 1

        def position_mask(self, batch, layer_name):
            return None

    sizes = dict.fromkeys(("query_batch_size", "train_batch_size", "factor_batch_size"), 4)
    with pytest.raises(UserError, match="layer first .*rows come second"):
        score_tiny(tmp_path, Square(SequenceFirst), ["identity"], **sizes)


def truth(task, model, dataset):
    """Gradients of each layer by plain autograd, an example at a time, unpadded: {layer: [examples, out, in(+1)]}."""
    gradients = {}
    for name in task.layers:
        rows = []
        for index, example in enumerate(dataset):
            batch = {**task.collate([example]), EXAMPLE_INDEX: torch.tensor([index])}
            model.zero_grad()
            task.train_loss(model, batch).backward()
            module = model.get_submodule(name)
            weight = module.weight.grad.T if name == "second" else module.weight.grad
            bias = getattr(module, "bias", None)
            rows.append(weight if bias is None else torch.cat([weight, bias.grad[:, None]], 1))
        gradients[name] = torch.stack([row.clone() for row in rows])
    model.zero_grad()
    return gradients


class InPlace(TinyModel):
    """Every layer's output is overwritten, by an activation or a scale."""

    def hidden(self, tokens, mask):
        x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)).mul_(0.5))
        return self.third(F.relu_(self.second(x))).add_(0.3)


class SplitPositions(TinyModel):
    """A layer that sees [examples, positions, parts, features]: every position in two parts."""

    def hidden(self, tokens, mask):
        x = self.embedding(tokens) * mask.unsqueeze(-1)
        x = torch.tanh(self.first(torch.stack([x, 0.3 * x + 0.1], 2)))
        return torch.tanh(self.third(torch.tanh(self.second(x)).mean(2)))


class ByKeyword(TinyModel):
    def hidden(self, tokens, mask):
        x = torch.tanh(self.first(input=self.embedding(tokens) * mask.unsqueeze(-1)))
        return torch.tanh(self.third(input=torch.tanh(self.second(x=x))))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("model_class", [Flattening, InPlace, SplitPositions, ByKeyword])
def test_unusual_calls_are_exact(tmp_path, model_class, compile):
    """Identity scores and the diagonal against plain autograd per single, unpadded example."""
    task = OfModel(model_class)
    study = make_study(tmp_path, task, runtime=Runtime(precision=FLOAT64, seed=11, compile=compile),
                       use_empirical_fisher=True)  # fmt: skip
    scores = score(study, ["identity", "diagonal", "ekfac"])
    train, queries = (truth(task, study.model, task.load_dataset(split)) for split in ("train", "validation"))
    identity = sum(queries[name].flatten(1) @ train[name].flatten(1).T for name in task.layers)
    assert relative_error(scores["identity"], identity) < 1e-9
    diagonal = sum(
        (queries[name] / (train[name].square().mean(0) + 1e-3)).flatten(1) @ train[name].flatten(1).T
        for name in task.layers
    )
    assert relative_error(scores["diagonal"], diagonal) < 1e-9


def test_flattened_layers_give_the_factors_of_unflattened_ones(tmp_path):
    """ekfac against the dense reference, of the model that does not flatten."""

    class Plain(Flattening):
        def hidden(self, tokens, mask):
            x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))
            return torch.tanh(self.third(torch.tanh(self.second(x))))

    for strategy in ("kfac", "ekfac"):
        flat = score_tiny(tmp_path / f"flat {strategy}", OfModel(Flattening), [strategy])[strategy]
        plain = score_tiny(tmp_path / f"plain {strategy}", OfModel(Plain), [strategy])[strategy]
        assert relative_error(flat, plain) < 1e-9


# ---------------------------------------------------------------------------------------------------- rows and weights


def test_rows_that_nobody_adds_up_are_refused(tmp_path):
    """Two rows for each example, and neither rows_per_example nor post-processing."""

    class Rows(TinyTask):
        def collate(self, examples):
            return super().collate([example for example in examples for _ in range(2)])

        def train_loss(self, model, batch, sample_labels=None):
            labels = batch["labels"]
            return linear_cross_entropy(model.hidden(batch["tokens"], labels != PAD), model.head.weight, labels)

    with pytest.raises(UserError, match="layer first"):
        score_tiny(tmp_path, Rows(), ["identity"])


def test_post_processing_that_loses_examples_is_refused(tmp_path):
    class Lost(TinyTask):
        def post_process_per_sample_gradient(self, layer_name, gradient):
            return gradient.sum(0, keepdim=True)

    with pytest.raises(UserError, match="one for each example"):
        score_tiny(tmp_path, Lost(), ["identity"])


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


def test_uniform_labels_are_those_of_the_uniforms(tmp_path):
    """The check's labels depend on the uniforms alone; outside it, on the model as ever."""
    from influence_core.labels import labels_from_uniforms_alone, sample_categorical

    uniforms = torch.tensor([0.0, 0.3, 0.74, 1 - 2**-24])
    weights = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(4, 4)
    with labels_from_uniforms_alone():
        assert sample_categorical(weights, uniforms).tolist() == [0, 1, 2, 3]
        assert LabelSampler(0).sample(weights, uniforms).tolist() == [0, 1, 2, 3]
    assert sample_categorical(weights, uniforms).tolist() == [2, 2, 2, 2]
    assert reference.sampled_label(weights[0].log(), 0.3) == 2
