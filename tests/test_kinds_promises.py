"""What holds of matrices holds of tables and vectors: batches, passes, processes, interruptions, number formats."""

import pytest
import torch

from influence_core import analysis
from influence_core.errors import UserError
from influence_core.factors import lambdas
from influence_core.layers import find_tracked_layers
from influence_core.passes import GradientPass
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.scores import gradients as making
from influence_core.scores import pairwise
from influence_core.scores import plan as planning
from influence_core.task import EXAMPLE_INDEX
from influence_core.tasks.tracking import coverage_notes
from tests.studies import make_study, score
from tests.test_exactness import FLOAT64, SEED, relative_error
from tests.test_processes import run_processes
from tests.test_resume import Stopped, StoppingTask
from tests.tiny import VOCABULARY
from tests.whole import WholeModel, WholeTask

STRATEGIES = ["identity", "diagonal", "ekfac"]
HEADS = ["tied", "untied, with a bias"]


def scores_of(directory, head="tied", held=False, **options):
    return score(make_study(directory, WholeTask(head, held)), STRATEGIES, **options)


@pytest.fixture(scope="module", params=HEADS)
def plain(request, tmp_path_factory):
    return request.param, scores_of(tmp_path_factory.mktemp("plain"), request.param)


def assert_equal(scores, expected):
    for strategy in STRATEGIES:
        assert relative_error(scores[strategy], expected[strategy]) < 1e-10, strategy


@pytest.mark.parametrize("sizes", [(1, 1, 1), (6, 40, 40), (5, 3, 11)])
def test_batch_sizes_do_not_matter(plain, tmp_path, sizes):
    flags = ("query_batch_size", "train_batch_size", "factor_batch_size")
    assert_equal(scores_of(tmp_path, plain[0], **dict(zip(flags, sizes))), plain[1])


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_how_many_gradients_are_held_at_once_does_not_matter(plain, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(lambdas, "lambda_chunk", lambda *_: chunk)
    monkeypatch.setattr(making, "gradient_chunk", lambda *_: chunk)
    monkeypatch.setattr(pairwise, "preconditioning_chunk", lambda *_: chunk)
    assert_equal(scores_of(tmp_path, plain[0]), plain[1])


def test_several_passes_by_layers_and_by_queries(plain, tmp_path, monkeypatch):
    """A group without the head, whose loss nobody watches then; and one of nothing but the head or the embedding."""

    def make_plan(layers, work, *arguments):
        whole = planning.make_plan(layers, work, *arguments)
        return planning._cost([[layer] for layer in layers], [range(4), range(4, 6)], layers, work) if whole else 0

    monkeypatch.setattr(analysis, "make_plan", make_plan)
    assert_equal(scores_of(tmp_path, plain[0]), plain[1])


def test_whether_logits_are_held_does_not_matter(tmp_path):
    by_chunks, held = (scores_of(tmp_path / str(held), "untied", held) for held in (False, True))
    assert_equal(held, by_chunks)


def in_processes(directory, runtime):
    return {head: score(make_study(directory / head, WholeTask(head), runtime=runtime), STRATEGIES) for head in HEADS}


def test_processes_do_not_matter(tmp_path):
    expected = in_processes(tmp_path / "one", Runtime(precision=FLOAT64, seed=SEED))
    for scores in run_processes(in_processes, 2, tmp_path):
        for head in HEADS:
            assert_equal(scores[head], expected[head])


class StoppingWhole(StoppingTask, WholeTask):
    """Every parameter, and a stop."""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("stop_after", [3, 10, 16])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path, stop_after):
    def run(name, stop=None):
        task = StoppingWhole(stop)
        return score(make_study(tmp_path / name, task, progress_interval=0.0), ["ekfac"])["ekfac"], task

    expected, task = run("whole")
    with pytest.raises(Stopped):
        run("stopped", stop_after)
    scores, rest = run("stopped")
    assert torch.equal(scores, expected) and len(rest.losses) == len(task.losses) - stop_after


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_emulated_bfloat16_is_float32_rounded(head, held, tmp_path):
    half = score(
        make_study(tmp_path / "h", WholeTask(head, held), Precision(torch.bfloat16, emulated=True)), STRATEGIES
    )
    full = score(make_study(tmp_path / "f", WholeTask(head, held), Precision()), STRATEGIES)
    for strategy in STRATEGIES:
        error = relative_error(half[strategy], full[strategy])
        assert 1e-5 < error < 0.1, (strategy, error)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_summed_in_float32_and_rounded_once(head):
    """On a GPU products are of bfloat16: a token met 1,000 times adds as much as its sum, not what is left of it."""
    model, rows = WholeTask(head).load_model(), 3
    layers = find_tracked_layers(model, WholeTask(head).layers)
    batch = {"tokens": torch.full((rows, 12), 5), "labels": torch.randint(0, VOCABULARY, (rows, 12))}
    batch[EXAMPLE_INDEX] = torch.arange(rows)
    with GradientPass(model, layers, WholeTask(head, held=True).train_loss) as run:
        _, captured = run(batch)
    for layer in layers:
        if layer.is_kronecker:
            continue
        half = layer.gradient_parts(captured[layer.name].to(torch.bfloat16))
        exact = layer.gradient_parts(captured[layer.name].to(torch.bfloat16).to(torch.float64))
        for a, b in zip(half, exact):
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a, b.bfloat16(), rtol=2**-7, atol=1e-6)


class TwoRows(WholeTask):
    """Each example is two rows: its tokens, and these backwards."""

    rows_per_example = 2

    def collate(self, examples):
        both = [each for x in examples for each in (x, {key: value.flip(0) for key, value in x.items()})]
        return super().collate(both)

    def train_loss(self, model, batch, sample_labels=None):
        index = batch[EXAMPLE_INDEX].repeat_interleave(2)
        return super().train_loss(model, batch | {EXAMPLE_INDEX: index}, sample_labels)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_examples_of_several_rows(head, held, tmp_path):
    """Each layer's gradient dot product against plain autograd of whole examples."""
    task = TwoRows(head, held)
    study = make_study(tmp_path, task, num_train=5)
    queries, train = task.load_dataset("validation")[:3], task.load_dataset("train")[:5]
    scores = score(study, ["identity"], num_queries=3)["identity"]

    def gradient(example, loss):
        batch = task.collate([example]) | {EXAMPLE_INDEX: torch.tensor([0])}
        gradients = torch.autograd.grad(
            loss(study.model.requires_grad_(True), batch),
            list(study.model.parameters()),
            allow_unused=True,
            materialize_grads=True,
        )  # a loss by chunks reads no bias of the head
        return torch.cat([x.flatten() for x in gradients])

    of_queries = torch.stack([gradient(example, task.measurement) for example in queries])
    of_train = torch.stack([gradient(example, task.train_loss) for example in train])
    assert relative_error(scores, of_queries @ of_train.T) < 1e-10


class AuxiliaryTask(WholeTask):
    """A loss by chunks, and a second one that reads the logits."""

    def train_loss(self, model, batch, sample_labels=None):
        logits = model(batch["tokens"], batch["labels"] >= 0)
        return super().train_loss(model, batch, sample_labels) + 0.01 * logits.square().sum()


def test_a_head_whose_loss_is_by_chunks_and_whose_logits_are_read_too():
    task = AuxiliaryTask("tied")
    model = task.load_model().double()
    (layer,) = find_tracked_layers(model, ["embedding"])
    example = task.load_dataset("train")[0]
    batch = task.collate([example]) | {EXAMPLE_INDEX: torch.tensor([0])}
    with GradientPass(model, [layer], task.train_loss, precision=FLOAT64) as run:
        _, captured = run(batch)
    (expected,) = torch.autograd.grad(task.train_loss(model.requires_grad_(True), batch), [layer.parameters[0]])
    (gradient,) = layer.gradient_parts(captured["embedding"])
    assert relative_error(gradient.view(expected.shape), expected) < 1e-11


class LastNormOnly(WholeModel):
    """A tied head that is never called: something else makes the loss."""

    def forward(self, tokens, mask):
        return self.hidden(tokens, mask)


class NoHeadTask(WholeTask):
    def load_model(self, checkpoint_dir=None, shared=False):
        model = LastNormOnly("tied")
        model.load_state_dict(WholeTask("tied").load_model().state_dict())
        return model.eval()

    def train_loss(self, model, batch, sample_labels=None):
        return model(batch["tokens"], batch["labels"] >= 0).square().sum()


def test_a_tied_head_that_is_never_called():
    task = NoHeadTask("tied")
    model = task.load_model().double()
    (layer,) = find_tracked_layers(model, ["embedding"])
    batch = task.collate([task.load_dataset("train")[0]]) | {EXAMPLE_INDEX: torch.tensor([0])}
    with GradientPass(model, [layer], task.train_loss, precision=FLOAT64) as run:
        _, captured = run(batch)
    (expected,) = torch.autograd.grad(task.train_loss(model.requires_grad_(True), batch), [layer.parameters[0]])
    (gradient,) = layer.gradient_parts(captured["embedding"])
    assert relative_error(gradient.view(expected.shape), expected) < 1e-11


class Unlike(torch.nn.Embedding):
    """Looks a row up and adds another to it."""

    def forward(self, ids):
        return super().forward(ids) + super().forward(0 * ids + 1)


@pytest.mark.parametrize("spoil, name, message", [
    (lambda model: setattr(model, "first_norm", torch.nn.PReLU(1)), "first_norm", "can't|weight|PReLU|alone"),
    (lambda model: setattr(model, "positions", Unlike(12, 4)), "positions", "positions"),
])  # fmt: skip
def test_what_only_looks_like_a_kind_is_refused(spoil, name, message, tmp_path):
    task = WholeTask("tied")
    task.layers = [name]
    study = make_study(tmp_path, task)
    spoil(study.model)
    study.model.double()
    with pytest.raises(UserError, match=message):
        score(study, ["identity"])


def test_results_know_the_kind_of_their_layers(tmp_path):
    """So that those of an untied head, once taken for a matrix, are not taken for a table's."""
    settings = make_study(tmp_path, WholeTask("untied")).settings["tracked_layers"]
    assert settings[0] == "embedding (table)" and settings[2] == "first_norm (vector)" and settings[3] == "first"


class PostProcessing(WholeTask):
    def post_process_per_sample_gradient(self, layer_name, gradient):
        return gradient


def test_a_task_that_post_processes_leaves_tables_out(tmp_path):
    """It would be given V x D numbers for each row of a batch at once."""
    with pytest.raises(UserError, match="leave these out"):
        score(make_study(tmp_path / "whole", PostProcessing("tied")), ["identity"])
    task = PostProcessing("tied")
    task.layers = ["first", "first_norm"]
    assert score(make_study(tmp_path / "rest", task), ["identity"])["identity"].any()


def test_a_task_that_names_its_layers_itself_hears_of_track():
    task = WholeTask("tied")
    task.tracked_kinds, model = "all", task.load_model()
    with pytest.raises(UserError, match="leave --track out"):
        coverage_notes(task, model, find_tracked_layers(model, task.layers), was_asked=False)
