"""Layers that see rows, positions or calls in unusual ways: exact where that is certain, refused where it is not."""

import pytest
import torch
import torch.nn.functional as F

from influence_core.errors import UserError
from influence_core.losses import linear_cross_entropy
from influence_core.runtime import Runtime
from influence_core.task import EXAMPLE_INDEX
from tests.scripts import contents
from tests.studies import make_study, score, score_tiny
from tests.test_exactness import FLOAT64, relative_error
from tests.tiny import PAD, OfModel, TinyModel, TinyTask


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


class Checkpointed(TinyModel):
    """Activations that are computed again on the way back."""

    use_reentrant = False

    def hidden(self, tokens, mask):
        x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))
        x = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.second(x)), x, use_reentrant=self.use_reentrant)
        return torch.tanh(self.third(x))


class Reentrant(Checkpointed):
    use_reentrant = True


def test_checkpoints_are_exact_or_refused(tmp_path):
    class Plain(TinyModel):
        def hidden(self, tokens, mask):
            x = torch.tanh(self.first(self.embedding(tokens) * mask.unsqueeze(-1)))
            return torch.tanh(self.third(torch.tanh(self.second(x))))

    actual, expected = (
        score_tiny(tmp_path / model.__name__, OfModel(model), ["ekfac"])["ekfac"] for model in (Checkpointed, Plain)
    )
    assert relative_error(actual, expected) < 1e-12
    with pytest.raises(UserError, match="use_reentrant"):
        score_tiny(tmp_path / "reentrant", OfModel(Reentrant), ["ekfac"])


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


# ----------------------------------------------------------------------- parameters that get another gradient as well


class UsedTwice(TinyModel):
    """A weight that is also read without its layer being called, as a tied head by computation."""

    def hidden(self, tokens, mask):
        x = super().hidden(tokens, mask)
        return x + torch.tanh(F.linear(x, self.third.weight[:, :4]))


class Merged(TinyModel):
    """A layer whose output is changed by what its own weight makes, as an adapter of its directions does (DoRA)."""

    def __init__(self):
        super().__init__()
        self.third.register_forward_hook(lambda module, arguments, output: output / module.weight.norm())


class Replaced(TinyModel):
    """The class is a Linear's, the forward pass is not."""

    def __init__(self):
        super().__init__()
        self.third.forward = lambda x: F.linear(x, self.third.weight**2)


@pytest.mark.parametrize("model_class", [UsedTwice, Merged, Replaced])
def test_a_parameter_that_gets_another_gradient_as_well_is_refused(model_class, tmp_path):
    with pytest.raises(UserError, match="the gradient of layer third's parameters is not what its calls make"):
        score_tiny(tmp_path, OfModel(model_class))
    assert not contents(tmp_path)
    scores = score_tiny(tmp_path, OfModel(model_class, layers=["first", "second"]))
    assert all(matrix.isfinite().all() for matrix in scores.values())


class SomeWithoutLoss(OfModel):
    """Rows of this many tokens carry no loss: their gradients are zero, and prove nothing."""

    def __init__(self, without):
        super().__init__(UsedTwice)
        self.without = without

    def train_loss(self, model, batch, sample_labels=None):
        labels = batch["labels"]
        with_loss = ((labels != PAD).sum(1, keepdim=True) != self.without) & (labels != PAD)
        uniforms = None if sample_labels is None else sample_labels.uniforms(batch[EXAMPLE_INDEX], labels.shape[1])
        hidden = model.hidden(batch["tokens"], labels != PAD)
        return linear_cross_entropy(hidden, model.head.weight, labels.where(with_loss, PAD), uniforms)


@pytest.mark.parametrize("without", [2, 8], ids=["the shortest", "the longest"])
def test_an_example_without_a_loss_is_no_proof(without, tmp_path):
    task = SomeWithoutLoss(without)
    lengths = [task.length(example) for split in ("train", "validation") for example in task.load_dataset(split)]
    assert min(lengths) == 2 and max(lengths) == 8
    with pytest.raises(UserError, match="the gradient of layer third's parameters is not what its calls make"):
        score_tiny(tmp_path, task)


def test_the_proof_leaves_the_model_as_it_was(tmp_path):
    """Gradients, what is frozen, and whether it trains."""
    study = make_study(tmp_path)
    study.model.first.weight.requires_grad_(False)
    study.model.second.weight.grad = kept = torch.ones_like(study.model.second.weight)
    study.model.train()
    score(study, ["identity"])
    assert study.model.training and study.model.second.weight.grad is kept and study.model.third.weight.grad is None
    assert not study.model.first.weight.requires_grad and study.model.third.weight.requires_grad
