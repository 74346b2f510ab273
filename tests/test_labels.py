"""Sampled labels and the chunked cross-entropy, each against a plain version of itself."""

import pytest
import torch
import torch.nn.functional as F

from influence_core import losses
from influence_core.labels import LabelSampler, counter_uniforms, sample_categorical
from influence_core.losses import linear_cross_entropies, linear_cross_entropy
from tests import reference

SEEDS = [0, 1, 11, -3, 2**31, 2**63 + 5, 123456789012345678901234567890]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniforms_equal_those_of_python_integers(seed):
    """int64 tensors that wrap against the reference's integers modulo 2^64, bit for bit."""
    examples = [0, 1, 2, 39, 4655, 10**6, 2**40 + 7]
    uniforms = counter_uniforms(seed, torch.tensor(examples), 6)
    for row, example in zip(uniforms.tolist(), examples):
        assert row == [reference.uniform(seed, example, position) for position in range(6)]
    assert LabelSampler(seed).uniforms(torch.tensor(examples), 6).tolist() == uniforms.tolist()


def test_uniforms_depend_on_seed_example_and_position_alone():
    """Any order, subset and length of the batch gives each position its own number."""
    whole = counter_uniforms(5, torch.arange(50), 20)
    order = torch.randperm(50, generator=generator())
    assert torch.equal(counter_uniforms(5, order, 20), whole[order])
    assert torch.equal(counter_uniforms(5, torch.tensor([17]), 3), whole[17:18, :3])


@pytest.mark.parametrize("seed", [0, 1, 11])
def test_uniforms_are_uniform(seed):
    """Mean, variance, and chi-square over 256 bins of 2^20 numbers, within five standard deviations."""
    uniforms = counter_uniforms(seed, torch.arange(2048), 512).double()
    count = uniforms.numel()
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(uniforms.mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(uniforms.var() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    observed = (uniforms * 256).long().flatten().bincount(minlength=256).double()
    expected = count / 256
    chi_square = (observed - expected).square().sum() / expected
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_uniforms_of_other_seeds_examples_and_positions_are_unrelated():
    """Correlations within five standard deviations of zero, at several distances; and no row comes twice."""
    size = (512, 512)
    count = size[0] * size[1]
    blocks = {seed: counter_uniforms(seed, torch.arange(size[0]), size[1]).double() - 0.5 for seed in range(4)}

    def correlation(a, b):
        return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())

    bound = 5 / count**0.5
    for seed in range(1, 4):
        assert abs(correlation(blocks[0], blocks[seed])) < bound
    for distance in (1, 2, 3, 8, 64):
        smaller = bound * (size[0] / (size[0] - distance)) ** 0.5
        assert abs(correlation(blocks[0][distance:], blocks[0][:-distance])) < smaller
        assert abs(correlation(blocks[0][:, distance:], blocks[0][:, :-distance])) < smaller
        assert abs(correlation(blocks[0][distance:], blocks[1][:-distance])) < smaller
        assert abs(correlation(blocks[0][distance:, distance:], blocks[0][:-distance, :-distance])) < smaller * 1.1
    rows = torch.cat([block[:, :4] for block in blocks.values()])
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_come_as_often_as_they_are_probable(dtype):
    """Frequencies of 2^18 draws against the weights, by chi-square; improbable categories never come."""
    weights = torch.tensor([0.0, 3.0, 0.0, 0.5, 1.0, 1e-30, 0.25, 0.0], dtype=dtype)
    count = 1 << 18
    uniforms = counter_uniforms(3, torch.arange(512), 512).flatten()
    labels = sample_categorical(weights.expand(count, -1), uniforms)
    observed = labels.bincount(minlength=len(weights)).double()
    assert observed[weights < 1e-20].sum() == 0
    likely = weights > 1e-20
    expected = count * (weights / weights.sum())[likely].double()
    chi_square = float(((observed[likely] - expected).square() / expected).sum())
    assert chi_square < 3 + 5 * (2 * 3) ** 0.5


@pytest.mark.parametrize("zeros", [[0], [4], [1, 2], [0, 4], [0, 1, 2, 3], [1, 2, 3, 4]])
@pytest.mark.parametrize("scale", [1.0, 1.5, 1 + 2**-23, 3e-5])
def test_a_category_of_no_probability_is_never_drawn(zeros, scale):
    """Also with the least and the greatest uniform that there is."""
    weights = torch.rand(2000, 5, generator=generator()) * scale
    weights[:, zeros] = 0
    for uniform in (0.0, 2.0**-24, 1 - 2.0**-24):
        labels = sample_categorical(weights, torch.full((2000,), uniform))
        assert (weights.gather(1, labels[:, None]) > 0).all(), uniform


@pytest.mark.parametrize("num_categories", [4, 64, 200])
def test_weights_that_are_no_numbers_give_labels_all_the_same(num_categories):
    """A diverged model is told by its loss, not by an index out of range."""
    weights = torch.full((3, num_categories), float("nan"))
    labels = sample_categorical(weights, torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert ((labels >= 0) & (labels < num_categories)).all()


def test_a_large_vocabulary_has_its_last_category():
    """Rounding in a cumulative sum of 50,257 must not make labels that are none."""
    weights = torch.rand(64, 50257, generator=generator())
    labels = sample_categorical(weights, torch.full((64,), 1 - 2.0**-24))
    assert labels.max() <= 50256 and labels.min() > 50200


@pytest.mark.parametrize("num_categories", [1, 9, 64, 65, 128, 200])
def test_labels_equal_those_of_the_reference(num_categories):
    """Inverse CDF by two searches, among blocks of 64 categories and within one, against a plain loop in float64."""
    logits = torch.randn(300, num_categories, generator=generator()).double() * 3
    uniforms = counter_uniforms(2, torch.arange(300), 1)[:, 0]
    expected = [reference.sampled_label(row, u) for row, u in zip(logits, uniforms.tolist())]
    assert LabelSampler(2).sample(logits, uniforms).tolist() == expected
    assert sample_categorical(logits.exp(), uniforms).tolist() == expected


def loss_case(sampled=False):
    """(hidden [3, 17, 5], weight [9, 5], labels with ignored ones, uniforms), float64, both requiring grad."""
    hidden = torch.randn(3, 17, 5, generator=generator(1), dtype=torch.float64).requires_grad_()
    weight = torch.randn(9, 5, generator=generator(2), dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 9, (3, 17), generator=generator(3))
    labels[0, 5:] = labels[2, 0] = -100
    return hidden, weight, labels, counter_uniforms(7, torch.arange(3), 17) if sampled else None


@pytest.mark.parametrize("chunk_bytes", [1, 9 * 8 * 20, 32 << 20], ids=["chunks of 16", "chunks of 20", "one chunk"])
@pytest.mark.parametrize("wanted", ["both", "hidden", "weight", "none"])
@pytest.mark.parametrize("sampled", [False, True], ids=["labels", "sampled labels"])
def test_linear_cross_entropy_equals_the_plain_one(monkeypatch, chunk_bytes, wanted, sampled):
    """Value and gradients against F.cross_entropy of whole logits; 38 positions carry loss, so chunks are uneven."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": chunk_bytes})
    hidden, weight, labels, uniforms = loss_case(sampled)
    hidden.requires_grad_(wanted in ("both", "hidden"))
    weight.requires_grad_(wanted in ("both", "weight"))
    assert (labels != -100).sum() == 38
    targets = labels.clone()
    if sampled:  # only the places of the labels matter, not what they are
        for place in (labels != -100).nonzero().tolist():
            targets[tuple(place)] = reference.sampled_label((hidden @ weight.T)[tuple(place)], uniforms[tuple(place)])
        labels = torch.where(labels == -100, -100, 0)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    loss = linear_cross_entropy(hidden, weight, labels, uniforms)
    torch.testing.assert_close(loss, expected)
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    if inputs:
        gradients = torch.autograd.grad(3 * loss, inputs)
        for gradient, plain in zip(gradients, torch.autograd.grad(3 * expected, inputs)):
            torch.testing.assert_close(gradient, plain)


def test_other_ignored_labels_and_none_left():
    hidden, weight, labels, _ = loss_case()
    labels = torch.where(labels == -100, 4, labels)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=4)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, ignore_index=4), expected)
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    gradients = torch.autograd.grad(nothing, (hidden, weight))
    assert nothing == 0 and not any(gradient.any() for gradient in gradients)


def test_large_logits_do_not_overflow():
    """exp(1000) is infinite; a loss is not."""
    hidden = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([1]))
    assert loss.item() == 2000.0
    assert torch.autograd.grad(loss, hidden)[0].tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("chunk_bytes", [1, 32 << 20], ids=["chunks of 16", "one chunk"])
def test_losses_of_positions_add_up_to_the_summed_one(monkeypatch, chunk_bytes):
    """Each against F.cross_entropy of its logits; zero where a position carries none, or none does."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": chunk_bytes})
    hidden, weight, labels, _ = loss_case()
    each = linear_cross_entropies(hidden, weight, labels)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(3, 17)
    torch.testing.assert_close(each, expected.detach())
    assert not each.requires_grad and not each[labels == -100].any()
    torch.testing.assert_close(each.sum(), linear_cross_entropy(hidden, weight, labels).detach())
    assert not linear_cross_entropies(hidden, weight, torch.full_like(labels, -100)).any()
