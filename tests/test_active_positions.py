"""Positions without a gradient are left out of the work: which they are, and that nothing else changes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from influence_core.captured import Positions, find_active_positions
from influence_core.factors.covariance import CovarianceSums
from influence_core.factors.lambdas import LambdaSums
from influence_core.layers import find_tracked_layers
from influence_core.passes import GradientPass
from influence_core.precision import Precision
from influence_core.probing import probe
from influence_core.task import EXAMPLE_INDEX
from tests.test_exactness import FLOAT64
from tests.test_passes import Chain

ROWS, POSITIONS = 3, 10
# Which positions the loss reads: [rows, positions] bool, and how many of a row at most are then active.
READS = {
    "the first position": (torch.arange(POSITIONS).expand(ROWS, -1) == 0, 1),
    "as many as a row is long": (torch.arange(POSITIONS).expand(ROWS, -1) < torch.tensor([[2], [7], [4]]), 7),
    "scattered ones": (torch.arange(POSITIONS).expand(ROWS, -1) % 4 == torch.tensor([[0], [1], [3]]), 3),
    "nothing of one row": (torch.tensor([[1], [0], [1]]) * torch.arange(POSITIONS) % 9 > 4, 4),
    "nothing": (torch.zeros(ROWS, POSITIONS, dtype=torch.bool), 1),
    "nearly all": (torch.arange(POSITIONS).expand(ROWS, -1) < torch.tensor([[9], [2], [3]]), None),
    "all": (torch.ones(ROWS, POSITIONS, dtype=torch.bool), None),
}


def run(read):
    """(layers, what they captured) of a loss that reads these positions alone."""
    torch.manual_seed(0)
    model = Chain({}).double()
    layers = find_tracked_layers(model, ["first", "second"])
    batch = {"x": torch.randn(ROWS, POSITIONS, 3, dtype=torch.float64), EXAMPLE_INDEX: torch.arange(ROWS)}
    with GradientPass(model, layers, lambda m, b: m(b["x"])[read].square().sum(), precision=FLOAT64) as engine:
        _, captured = engine(batch)
        counted = probe(engine, batch)
    assert counted.active_positions == dict.fromkeys(("first", "second"), int(read.sum()))
    return layers, captured


@pytest.mark.parametrize("read, most", READS.values(), ids=READS)
def test_only_positions_with_a_gradient_are_kept(read, most):
    """Found exactly, and per-sample gradients of them are those of all positions."""
    for layer in (result := run(read))[0]:
        captured = result[1][layer.name]
        if most is None:
            assert captured.active is None
        else:
            assert torch.equal(captured.active, read)
        compact = captured.compact()
        assert compact.activations.shape[1] == compact.output_gradients.shape[1] == (most or POSITIONS)
        ours, of_all = map(layer.matrix_gradients, (compact, captured))
        torch.testing.assert_close(ours, of_all, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("read, most", READS.values(), ids=READS)
def test_factors_are_those_of_all_positions(read, most, masked):
    """Covariances, whose mean is over real positions with or without a gradient, and Lambda."""
    layers, captured = run(read)
    eigenvectors = [
        {layer.name: torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for layer, size in sizes}
        for sizes in ([(layer, layer.shape[1]) for layer in layers], [(layer, layer.shape[0]) for layer in layers])
    ]
    sums = {}
    for left_out in (True, False):
        covariances = CovarianceSums(layers, FLOAT64, torch.device("cpu"))
        lambdas = LambdaSums(layers, FLOAT64, torch.device("cpu"), *eigenvectors)
        for layer in layers:
            seen = captured[layer.name]
            seen.mask = torch.arange(POSITIONS).expand(ROWS, -1) < torch.tensor([[8], [9], [3]]) if masked else None
            if not left_out:
                seen.active = None
            covariances.update(layer, seen)
            lambdas.update(layer, seen)
        sums[left_out] = {**covariances.tensors, **lambdas.tensors}
    for name, expected in sums[False].items():
        torch.testing.assert_close(sums[True][name], expected, rtol=1e-12, atol=1e-14, msg=name)


def test_a_gradient_that_is_no_number_is_no_zero():
    """Or a diverged model would look like one that needs no work."""
    _, captured = run(READS["the first position"][0])
    gradients = captured["first"].output_gradients
    gradients[1, 5] = float("nan")
    captured["first"].active = None
    find_active_positions([captured["first"]])
    assert captured["first"].active[1, 5] and captured["first"].active.sum() == ROWS + 1


class CountingIndices(TorchDispatchMode):
    """How often it was asked which positions a mask chooses: a GPU is waited for each time."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket is torch.ops.aten.nonzero
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("own_masks", [False, True], ids=["one mask for all", "a mask made for each layer"])
def test_positions_are_looked_up_once_for_each_mask_and_not_for_each_layer(own_masks):
    """Of 6 layers, half of which read another stream: two masks, and two more with what has a gradient of them."""
    torch.manual_seed(0)
    masks = [torch.arange(POSITIONS) < torch.tensor(lengths).unsqueeze(1) for lengths in ([9, 4, 5], [3, 10, 6])]
    captured = {}
    layers = find_tracked_layers(nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)]), list("012345"))
    for number, layer in enumerate(layers):
        mask = masks[number % 2]
        gradients = torch.randn(ROWS, POSITIONS, 3) * (mask & (torch.arange(POSITIONS) < 7)).unsqueeze(-1)
        activations = torch.randn(ROWS, POSITIONS, 3)
        captured[layer.name] = Positions(activations, gradients, mask.clone() if own_masks else mask)
    apart = {name: replace(each) for name, each in captured.items()}  # before anything is shared
    find_active_positions(captured.values())
    shared, alone = (CovarianceSums(layers, Precision(), torch.device("cpu")) for _ in range(2))
    with CountingIndices() as counting:
        for layer in layers:
            shared.update(layer, captured[layer.name])
    assert counting.count == 4
    for layer in layers:
        find_active_positions([apart[layer.name]])
        alone.update(layer, apart[layer.name])
    for name, total in alone.tensors.items():
        assert torch.equal(shared.tensors[name], total), name
