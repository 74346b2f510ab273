"""The pass engine: what it leaves behind (nothing), what it computes (no more than asked), and what it refuses."""

import pytest
import torch
from torch import nn

from influence_core.errors import UserError
from influence_core.layers import find_tracked_layers
from influence_core.passes import GradientPass
from influence_core.precision import Precision
from influence_core.probing import probe
from influence_core.task import EXAMPLE_INDEX
from tests.studies import STRATEGIES, make_study, score, score_tiny
from tests.test_exactness import FLOAT64, relative_error
from tests.tiny import PaddedTinyTask, TinyTask

PRECISIONS = {
    "float32": Precision(),
    "float64": FLOAT64,
    "emulated bfloat16": Precision(torch.bfloat16, emulated=True),
    "autocast bfloat16": Precision(torch.bfloat16),
}


class WrongLoss(Exception):
    """Raised by a loss."""


def tiny_batch(task, count=5):
    batch = task.collate(task.load_dataset("train")[:count])
    return {**batch, EXAMPLE_INDEX: torch.arange(count)}


def hooks_of(module):
    """Every kind of hook that a module can carry."""
    return {name: list(value) for name, value in vars(module).items() if "hooks" in name and value is not None}


def state_of(model):
    """All that a pass could change, by name."""
    state = {}
    for name, module in model.named_modules():
        state[f"module {name}"] = (type(module), id(module), module.training, hooks_of(module))
        state[f"own forward of {name}"] = "forward" in vars(module)
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else (id(parameter.grad), parameter.grad.tolist())
        bits = parameter.detach().clone().view(torch.uint8).tolist()
        where = parameter.data_ptr()
        state[f"parameter {name}"] = (id(parameter), where, parameter.dtype, bits, parameter.requires_grad, grad)
    return state


def used_model(dtype):
    """A model in mid-use: partly frozen, partly training, with a gradient and a hook of its user's."""
    model = TinyTask().load_model().to(dtype).train()
    model.first.eval()
    model.embedding.weight.requires_grad_(False)
    model.third.weight.requires_grad_(False)
    model.second.bias.grad = torch.full_like(model.second.bias, 3.0)
    model.first.register_forward_hook(lambda module, arguments, output: None)
    return model


@pytest.mark.parametrize("raises", [None, "in the first batch", "in the second batch"])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_the_model_is_left_as_it_was_found(precision, raises):
    """Modules, modes, hooks, requires_grad, .grad and the weights' very bits; also after an exception in the loss."""
    task = TinyTask()
    model = used_model(precision.sum_dtype)
    before = state_of(model)
    inside, calls = [], []

    def loss(model, batch):
        inside.append(state_of(model))
        calls.append(batch)
        if raises == "in the first batch" or (raises and len(calls) == 2):
            raise WrongLoss
        return task.train_loss(model, batch)

    def go():
        layers = find_tracked_layers(model, task.layers)
        with GradientPass(model, layers, loss, task.position_mask, precision) as run:
            for _ in range(2):
                run(tiny_batch(task))

    if raises:
        pytest.raises(WrongLoss, go)
    else:
        go()
    assert inside[0] != before, "inside, it is prepared"
    assert state_of(model) == before


def test_the_model_is_left_as_it_was_found_by_a_whole_analysis(tmp_path):
    """The planner's probes, all stages and strategies, in emulated bfloat16, where weights are swapped meanwhile."""
    study = make_study(tmp_path, precision=PRECISIONS["emulated bfloat16"])
    study.model = used_model(torch.float32)
    before = state_of(study.model)
    score(study)
    assert state_of(study.model) == before


def test_a_model_in_training_mode_gives_the_same_scores(tmp_path):
    """Dropout is off within a pass, whatever mode the model is found in."""
    study = make_study(tmp_path / "training")
    study.model.train()
    training, evaluating = score(study), score_tiny(tmp_path / "evaluating")
    for strategy in STRATEGIES:
        assert torch.equal(training[strategy], evaluating[strategy])


def leaves_of(loss):
    """The tensors at which the autograd graph of a loss ends."""
    leaves, seen, todo = {}, set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        todo += [next_node for next_node, _ in node.next_functions]
    return list(leaves.values())


@pytest.mark.parametrize("names, features", [(["first", "second", "third"], 5), (["third"], 4)])
def test_no_gradient_is_made_that_nobody_reads(names, features):
    """The autograd graph ends at the output of the first tracked layer alone, not at any parameter."""
    task, model = TinyTask(layers=names), TinyTask().load_model()
    leaves = []

    def loss(model, batch):
        value = task.train_loss(model, batch)
        leaves.extend(leaves_of(value))
        return value

    with GradientPass(model, find_tracked_layers(model, names), loss) as run:
        batch = tiny_batch(task)
        value, captured = run(batch)
    assert [leaf.shape for leaf in leaves] == [(*batch["tokens"].shape, features)]
    assert not value.requires_grad
    assert not any(x.requires_grad for c in captured.values() for x in (c.activations, c.output_gradients))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_captured_gradients_are_those_of_autograd():
    """Output gradients times inputs, contracted over positions, against .grad of the parameters, one batch."""
    task, model = PaddedTinyTask(), TinyTask().load_model().double()
    batch = tiny_batch(task)
    layers = find_tracked_layers(model, task.layers)
    with GradientPass(model, layers, task.train_loss, task.position_mask, FLOAT64) as run:
        _, captured = run(batch)
    task.train_loss(model, batch).backward()
    for layer in layers:
        c = captured[layer.name]
        weight = torch.einsum("npo,npi->oi", c.output_gradients, c.activations)
        expected = layer.module.weight.grad
        torch.testing.assert_close(weight, expected.T if layer.name == "second" else expected)
        if layer.has_bias:
            torch.testing.assert_close(c.output_gradients.sum((0, 1)), layer.module.bias.grad)
            weight = torch.cat([weight, layer.module.bias.grad[:, None]], dim=1)
        per_sample = layer.matrix_gradients(c)
        torch.testing.assert_close(per_sample.sum(0), weight)
        assert torch.equal(c.mask, task.position_mask(batch, layer.name))


class Chain(nn.Module):
    """Two layers; `changes` is what the model does to the output of each, by name."""

    def __init__(self, changes):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.change_first, self.change_second = (changes.get(name, torch.tanh) for name in ("first", "second"))

    def forward(self, x):
        return self.change_second(self.second(self.change_first(self.first(x))))


def square_loss(model, batch):
    return model(batch["x"]).square().sum()


def run_chain(changes, names, loss=square_loss, examples=2, times=1, **options):
    torch.manual_seed(1)
    model = Chain(changes)
    inputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    with GradientPass(model, find_tracked_layers(model, names), loss, **options) as run:
        results = [run({"x": inputs, EXAMPLE_INDEX: torch.arange(examples)}) for _ in range(times)]
    return results[-1]


IN_PLACE = {
    "method": lambda x: x.mul_(2.0),
    "operator": lambda x: x.__iadd__(1.0),
    "module": nn.ReLU(inplace=True),
    "through a view": lambda x: x.view(-1, 4).tanh_().view_as(x),
    "a part": lambda x: x.index_fill_(1, torch.tensor([0]), 0.0),
}


@pytest.mark.parametrize(
    "names, changed",
    [(["first"], "first"), (["second"], "second"), (["first", "second"], "first"), (["first", "second"], "second")],
    ids=["first", "second", "first of two", "second of two"],
)
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_an_output_changed_in_place_is_copied(change, names, changed):
    """Inputs and gradients are those of the same operation out of place, to the bit, in every batch."""
    for times in (1, 2):
        _, captured = run_chain({changed: change}, names, times=times)
        _, expected = run_chain({changed: lambda x: change(x.clone())}, names)
        for name in names:
            assert torch.equal(captured[name].output_gradients, expected[name].output_gradients)
            assert torch.equal(captured[name].activations, expected[name].activations)


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]], ids=" ".join)
def test_an_input_changed_in_place_is_copied(names):
    """A residual stream that the model adds to in place after the layer has read it."""

    def loss(model, batch, in_place=True):
        x = 2 * model.first(batch["x"])  # an operation whose result no gradient needs
        y = model.second(x)
        return (x.add_(y) if in_place else x + y).square().sum()

    _, captured = run_chain({}, names, loss)
    _, expected = run_chain({}, names, lambda model, batch: loss(model, batch, in_place=False))
    for name in names:
        assert torch.equal(captured[name].output_gradients, expected[name].output_gradients)
        assert torch.equal(captured[name].activations, expected[name].activations)


def test_only_what_is_changed_in_place_is_copied():
    """Copies take time and memory: those layers alone have them, and passes share what one of them found."""
    copied = set()
    run_chain({"second": IN_PLACE["method"]}, ["first", "second"], copied=copied)
    assert copied == {"second"}
    run_chain({"first": IN_PLACE["method"]}, ["first", "second"], copied=copied)
    assert copied == {"first", "second"}


def test_an_input_handed_over_by_keyword():
    """layer(input=x) is the same call as layer(x), rounded operands included."""

    class ByKeyword(Chain):
        def forward(self, x):
            return self.second(input=torch.tanh(self.first(input=x)))

    for precision in (Precision(), PRECISIONS["emulated bfloat16"]):
        captured = []
        for model in (ByKeyword({"second": lambda x: x}), Chain({"second": lambda x: x})):
            torch.manual_seed(0)
            model.load_state_dict({key: torch.randn_like(value) for key, value in model.state_dict().items()})
            with GradientPass(
                model, find_tracked_layers(model, ["first", "second"]), square_loss, precision=precision
            ) as run:
                captured.append(run({"x": torch.ones(2, 5, 3), EXAMPLE_INDEX: torch.arange(2)})[1])
        for name in ("first", "second"):
            assert captured[0][name].output_gradients.any()
            assert torch.equal(captured[0][name].output_gradients, captured[1][name].output_gradients)
            assert torch.equal(captured[0][name].activations, captured[1][name].activations)


@pytest.mark.parametrize("after", [nn.Sequential(), nn.Dropout(), nn.Identity()], ids=repr)
@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]], ids=" ".join)
def test_an_output_that_another_module_hands_on_is_measured(names, after):
    """The planner's probe must work where a module returns a tracked layer's output as its own, as Dropout does."""
    model = Chain({})
    model.first = nn.Sequential(model.first, after)
    names = [name.replace("first", "first.0") for name in names]
    batch = {"x": torch.ones(2, 5, 3), EXAMPLE_INDEX: torch.arange(2)}
    with GradientPass(model, find_tracked_layers(model, names), square_loss) as run:
        counted = probe(run, batch)
        _, captured = run(batch)
    assert counted.positions == dict.fromkeys(names, 10)
    assert counted.forward_flops == 2 * 10 * (3 * 4 + 4 * 4)
    assert all(captured[name].output_gradients.any() for name in names)


def test_a_tracked_layer_that_is_not_called_is_refused():
    with pytest.raises(UserError, match="did not call: unused"):
        run_chain({}, ["first", "unused", "second"])


def test_a_layer_whose_first_axis_is_not_rows_is_refused():
    """Two rows for three examples: a per-sample gradient has no meaning."""
    with pytest.raises(UserError, match="layer first"):
        run_chain({}, ["first"], examples=3)


def test_a_layer_that_the_loss_does_not_reach_has_zero_gradients():
    def loss(model, batch):
        model.unused(torch.ones(2, 5, 4))
        return model(batch["x"]).sum()

    _, captured = run_chain({}, ["first", "unused"], loss)
    assert not captured["unused"].output_gradients.any()
    assert captured["first"].output_gradients.any()


def test_a_pass_leaves_nothing_to_the_next():
    """The same batch again, after another one and in a new pass: equal bits; twice the loss: twice the gradients."""
    task, model = TinyTask(), TinyTask().load_model().double()
    layers = find_tracked_layers(model, task.layers)
    batch, other = tiny_batch(task), tiny_batch(task, count=3)
    with GradientPass(model, layers, task.train_loss, task.position_mask, FLOAT64) as run:
        results = [run(batch), run(other), run(batch)]
    with GradientPass(model, layers, lambda *x: 2 * task.train_loss(*x), precision=FLOAT64) as run:
        results.append(run(batch))
    for name in task.layers:
        first, _, again, doubled = (captured[name].output_gradients for _, captured in results)
        assert torch.equal(first, again)
        assert relative_error(doubled, 2 * first) < 1e-14
