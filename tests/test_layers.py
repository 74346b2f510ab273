"""Which layers may be tracked, and how a layer's parameters are seen."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from influence_core.captured import Positions
from influence_core.errors import UserError
from influence_core.layers import find_tracked_layers, trackable_layer_names
from influence_core.layers.finding import other_layer_names
from influence_core.layers.matrix import MatrixLayer
from influence_core.layers.table import TableLayer
from influence_core.layers.vector import VectorLayer
from tests.tiny import TinyModel


class Doubling(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Model(nn.Module):
    """Every kind of layer that must be told apart."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.twin, self.other_twin = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other_twin.weight = self.twin.weight
        self.same_bias, self.other_bias = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other_bias.bias = self.same_bias.bias
        self.doubling = Doubling(4, 4)
        self.norm, self.dropout = nn.LayerNorm(4), nn.Dropout()
        self.renormed = nn.Embedding(11, 4, max_norm=1.0)
        self.blocks = nn.ModuleList([nn.Linear(4, 6), Conv1D(5, 6)])
        self.alias = self.blocks[0]


def test_linear_and_conv1d_are_seen_as_one_kind():
    """[out, in(+1)] for both, in the order asked for, the number of parameters as torch counts them."""
    model = TinyModel()
    layers = find_tracked_layers(model, ["third", "first", "second"])
    assert [layer.name for layer in layers] == ["third", "first", "second"]
    assert [layer.shape for layer in layers] == [(4, 5), (5, 4), (5, 6)]
    for layer in layers:
        assert layer.num_parameters == sum(parameter.numel() for parameter in layer.module.parameters())
    assert find_tracked_layers(Model(), ["blocks.1"])[0].shape == (5, 7)


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_a_layers_output_is_its_matrix_times_the_input_with_a_one(name):
    """The [out, in(+1)] view against the module's own forward pass; flat and back again changes nothing."""
    layer = find_tracked_layers(TinyModel(), [name])[0]
    weight = layer.module.weight.T if name == "second" else layer.module.weight
    matrix = torch.cat([weight, layer.module.bias[:, None]], dim=1) if layer.has_bias else weight
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(0))
    extended = torch.cat([x, torch.ones(7, 1)], dim=1) if layer.has_bias else x
    torch.testing.assert_close(extended @ matrix.T, layer.module(x))
    assert matrix.shape == layer.shape
    assert torch.equal(layer.to_matrix(layer.to_parts(matrix[None]))[0], matrix)


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_gradients_fill_a_given_buffer(name):
    """Written into `out` or returned anew: the same numbers, every one of the buffer's overwritten."""
    layer = find_tracked_layers(TinyModel(), [name])[0]
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(3, 6, layer.in_features, generator=generator)
    gradients = torch.randn(3, 6, layer.out_features, generator=generator)
    buffer = layer.empty_parts(activations, 3)
    for part in buffer:
        part.fill_(float("nan"))
    captured = Positions(activations, gradients)
    layer.gradient_parts(captured, out=buffer)
    for part, anew in zip(buffer, layer.gradient_parts(captured), strict=True):
        assert torch.equal(part, anew)


def test_an_unknown_name_is_refused_with_what_there_is():
    with pytest.raises(UserError) as refusal:
        find_tracked_layers(TinyModel(), ["first", "fourth", "fifth"])
    message = str(refusal.value)
    assert "for fourth, fifth" in message
    assert "first, second, third, head" in message
    assert "\n" not in message


def test_a_long_list_of_what_there_is_is_cut_short():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    with pytest.raises(UserError, match=r"0, 1, .*, 11, … \(40 in all\)"):
        find_tracked_layers(model, ["missing"])


def test_no_names_and_no_layers_are_refused():
    with pytest.raises(UserError, match="first, second, third, head"):
        find_tracked_layers(TinyModel(), [])
    with pytest.raises(UserError, match="none"):
        find_tracked_layers(nn.Sequential(nn.ReLU()), [])


@pytest.mark.parametrize(
    "names, message",
    [
        (["doubling"], "doubling is a Doubling; only"),
        (["dropout"], "dropout is a Dropout; only"),
        (["blocks"], "blocks is a ModuleList; only"),
        (["renormed"], "renormed changes its rows"),
        (["embedding", "head"], "embedding and head are the same"),
        (["twin"], "twin shares its weight"),
        (["blocks.1", "other_twin"], "other_twin shares its weight"),
        (["same_bias"], "same_bias shares its weight"),
        (["blocks.0", "alias"], "blocks.0 and alias are the same"),
        (["blocks.1", "blocks.1"], "blocks.1 and blocks.1 are the same"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_right_is_refused(names, message):
    """Subclasses and other kinds, tied weights and biases, one module under two names."""
    with pytest.raises(UserError, match=message):
        find_tracked_layers(Model(), names)


def test_what_is_near_to_that_is_not_refused():
    """One of a module's two names will do; a plain layer beside tied ones is fine."""
    model = Model()
    assert find_tracked_layers(model, ["alias", "blocks.1"])[0].module is model.blocks[0]
    assert "doubling" not in trackable_layer_names(model)
    assert "blocks.1" in trackable_layer_names(model)


def test_each_kind_is_known_by_its_module():
    """A head that is tied to an embedding is one table with it, whichever of the two is named."""
    model = Model()
    kinds = [MatrixLayer, MatrixLayer, VectorLayer, TableLayer]
    layers = find_tracked_layers(model, ["blocks.0", "blocks.1", "norm", "embedding"])
    assert [type(layer) for layer in layers] == kinds
    (head,) = find_tracked_layers(model, ["head"])
    assert head.sites == layers[-1].sites == {"embedding": model.embedding, "head": model.head}
    assert other_layer_names(model) == ["embedding", "norm", "renormed"]
