"""The core's pure functions over random shapes, masks and number formats, against the slow versions of them."""

import contextlib
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from influence_core.batches import order_examples, shares
from influence_core.captured import Positions, find_active_positions
from influence_core.errors import UserError
from influence_core.experiments.lds import linear_datamodeling_scores
from influence_core.factors.covariance import CovarianceSums
from influence_core.factors.lambdas import LambdaSums
from influence_core.factors.strategies import STRATEGIES, Preconditioner
from influence_core.files import (
    Damaged,
    read_sealed_json,
    read_sealed_tensors,
    write_sealed_json,
    write_sealed_tensors,
)
from influence_core.labels import counter_uniforms, sample_categorical
from influence_core.layers.matrix import MatrixLayer
from influence_core.losses import cross_entropy, linear_cross_entropy
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.tasks.pretrained import parse_overrides
from influence_core.text import visible
from tests import reference

settings.register_profile("all", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("all")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
SMALL, DTYPE = st.integers(1, 7), st.sampled_from([torch.float64, torch.float32])
SEEDS = st.integers(0, 2**31)


def close(a, b, dtype):
    torch.testing.assert_close(a.double(), b.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@st.composite
def batches(draw):
    """(layer, what it captured, mask): some positions masked, some without a gradient, one real position at least."""
    rows, positions, inputs, outputs, dtype = draw(SMALL), draw(SMALL), draw(SMALL), draw(SMALL), draw(DTYPE)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    module = torch.nn.Linear(inputs, outputs, bias=draw(st.booleans()), dtype=dtype)
    mask = torch.rand(rows, positions, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    mask[0, 0] = True
    x = torch.randn(rows, positions, inputs, dtype=dtype, generator=generator)
    g = torch.randn(rows, positions, outputs, dtype=dtype, generator=generator) * mask[..., None]
    g *= torch.rand(rows, positions, 1, generator=generator) < draw(st.sampled_from([0.2, 1.0]))
    captured = Positions(x, g, mask if draw(st.booleans()) or not mask.all() else None)
    if draw(st.booleans()):
        find_active_positions([captured])
    return MatrixLayer.of("layer", module), captured, mask


def with_ones(layer, activations):
    ones = activations.new_ones(*activations.shape[:-1], 1)
    return torch.cat([activations, ones], -1) if layer.has_bias else activations


def dense_gradients(layer, captured):
    """[rows, out, in(+1)], position by position."""
    a = with_ones(layer, captured.activations)
    return sum(captured.output_gradients[:, t, :, None] * a[:, t, None, :] for t in range(a.shape[1]))


@given(batches())
def test_per_sample_gradients(batch):
    layer, captured, _ = batch
    expected = dense_gradients(layer, captured)
    gradients = layer.to_matrix(layer.gradient_parts(captured.compact()))
    close(gradients[..., : layer.shape[1]], expected, captured.activations.dtype)


@given(batches())
def test_covariances(batch):
    layer, captured, mask = batch
    dtype = captured.activations.dtype
    sums = CovarianceSums([layer], Precision(dtype, dtype), torch.device("cpu"))
    sums.update(layer, captured)
    files, counts = sums.means([layer])
    a, g = with_ones(layer, captured.activations)[mask], captured.output_gradients[mask]
    assert counts == {"layer": int(mask.sum())}
    close(files["activation_covariance"]["layer"], sum(torch.outer(x, x) for x in a) / len(a), dtype)
    close(files["gradient_covariance"]["layer"], sum(torch.outer(x, x) for x in g) / len(a), dtype)


@given(batches(), st.sampled_from(["diagonal", "kfac", "ekfac"]), st.sampled_from([0.1, 1.0, 10.0]))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_lambda_and_preconditioner(batch, name, damping):
    """Of this one batch's factors: the dense Fisher's approximation, damped and solved."""
    layer, captured, mask = batch
    captured, dtype = captured.to(torch.float64), torch.float64
    precision, strategy, gradients = Precision(dtype, dtype), STRATEGIES[name], dense_gradients(layer, captured)
    a, g = with_ones(layer, captured.activations)[mask], captured.output_gradients[mask]
    covariances = a.T @ a / len(a), g.T @ g / len(a)
    (a_values, a_vectors), (g_values, g_vectors) = map(torch.linalg.eigh, covariances)
    factors = {"activation_eigenvectors": a_vectors, "gradient_eigenvectors": g_vectors,
               "activation_eigenvalues": a_values, "gradient_eigenvalues": g_values}  # fmt: skip
    if strategy.needs_lambda:
        bases = ({"layer": a_vectors}, {"layer": g_vectors}) if strategy.in_eigenbasis else (None, None)
        sums = LambdaSums([layer], precision, torch.device("cpu"), *bases)
        sums.update(layer, captured)
        factors["lambda_matrix"] = sums.means([layer], len(captured))["lambda_matrix"]["layer"]
    approximation = reference.approximate_fisher(name, gradients, *covariances)
    (made,) = Preconditioner(layer, [(strategy, factors)], damping, dtype).of_captured(captured.compact())
    for one, gradient in zip(made, gradients, strict=True):
        expected = reference.precondition(name, approximation, damping, gradient)
        close(one[..., : layer.shape[1]], expected, torch.float64)


@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=4), SMALL)
def test_uniforms(seed, examples, positions):
    made = counter_uniforms(seed, torch.tensor(examples), positions)
    expected = [[reference.uniform(seed % 2**64, e, p) for p in range(positions)] for e in examples]
    assert made.tolist() == expected


@given(st.integers(1, 300), SEEDS, st.floats(0, 1, exclude_max=True, width=32))
def test_sampled_labels(categories, seed, uniform):
    """The reference's; where the uniform is within rounding of a boundary, its neighbour."""
    logits = 3 * torch.randn(categories, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights = logits.softmax(-1)
    label = int(sample_categorical(weights, torch.tensor(uniform)))
    low, high = float(weights[:label].sum()), float(weights[: label + 1].sum())
    assert low - 1e-12 <= uniform <= high + 1e-12
    if min(abs(uniform - low), abs(uniform - high)) > 1e-12:
        assert label == reference.sampled_label(logits, uniform)


@given(st.integers(1, 9), SMALL, st.integers(1, 600), st.booleans(), SEEDS, DTYPE)
def test_a_head_in_chunks(positions, width, categories, samples, seed, dtype):
    """Loss and gradient as those of whole logits, some positions without a loss, labels given or sampled."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(categories, width, dtype=dtype, generator=generator)
    labels = torch.randint(categories, (positions,), generator=generator)
    labels[torch.rand(positions, generator=generator) < 0.3] = -100
    uniforms = torch.rand(positions, dtype=dtype, generator=generator) if samples else None
    loss = linear_cross_entropy(hidden, weight, labels, uniforms)
    expected = cross_entropy(hidden @ weight.T, labels, uniforms)
    close(loss, expected, dtype)
    (made,), (wanted,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    close(made, wanted, dtype)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 5))
def test_every_example_belongs_to_one_process(lengths, world_size):
    runtimes = [Runtime(rank=rank, world_size=world_size) for rank in range(world_size)]
    orders = [order_examples(lengths, runtime) for runtime in runtimes]
    assert sorted(index for order in orders for index in order) == list(range(len(lengths)))
    for order, share in zip(orders, shares(len(lengths), runtimes[0])):
        assert sorted(order) == list(share)
        assert [lengths[index] for index in order] == sorted((lengths[index] for index in order), reverse=True)


@given(st.integers(3, 8), st.integers(2, 9), st.integers(1, 3), SEEDS)
def test_the_linear_datamodeling_score(subsets, examples, queries, seed):
    generator = np.random.default_rng(seed)
    masks = generator.random((subsets, examples)) < 0.5
    scores, outcomes = generator.normal(size=(queries, examples)), generator.normal(size=(subsets, queries))
    made = linear_datamodeling_scores(masks, scores, outcomes)
    for query in range(queries):
        predicted = [-sum(scores[query, kept] for kept in np.flatnonzero(mask)) for mask in masks]
        expected = (
            0.0 if np.ptp(predicted) < 1e-12 else spearmanr(np.round(predicted, 12), outcomes[:, query]).statistic
        )
        assert made[query] == pytest.approx(expected, abs=1e-9)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "digest"), JSON, max_size=4), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sealed_file_tells_of_any_change(tmp_path, value, data):
    path = tmp_path / "sealed.json"
    write_sealed_json(path, value)
    assert read_sealed_json(path) == value
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with contextlib.suppress(Damaged):
        assert read_sealed_json(path) == value  # a blank between two values


@given(st.lists(SMALL, max_size=3), st.dictionaries(st.text(), JSON, max_size=2), SEEDS, st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sealed_tensors_tell_of_any_change(tmp_path, shape, record, seed, data):
    path = tmp_path / "sealed.safetensors"
    tensors = {"a": torch.rand(shape, generator=torch.Generator().manual_seed(seed)), "b": torch.arange(3)}
    write_sealed_tensors(path, tensors, record)
    stored, read = read_sealed_tensors(path)
    assert stored == json.loads(json.dumps(record)) and all(torch.equal(read[name], tensors[name]) for name in tensors)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with contextlib.suppress(Damaged):
        stored, read = read_sealed_tensors(path)
        assert stored == record and all(torch.equal(read[name], tensors[name]) for name in tensors)


@given(st.text(st.characters(exclude_categories=[])))
def test_nothing_shown_moves_a_terminal(text):
    shown = visible(text)
    assert not any(
        ord(character) < 32 and character not in "\n\t" or 127 <= ord(character) < 160 for character in shown
    )
    assert visible(shown) == shown
    shown.encode()


@given(st.text())
def test_overrides_are_read_or_refused(text):
    try:
        assert all(key.strip() for key in parse_overrides(text))
    except UserError as error:
        assert "--config_overrides takes" in str(error)
