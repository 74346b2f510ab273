"""The linear datamodeling score on planted data: its sign, its ends, and what it refuses."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from influence_core.experiments.calibration import calibrate, calibration_lines
from influence_core.experiments.lds import (
    bootstrap,
    linear_datamodeling_scores,
    noise_ceiling,
    p_values,
    predicted_measurements,
    subset_masks,
)
from influence_core.experiments.lds_evaluation import choose, evaluate

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(size=(4, 30))
MASKS = (GENERATOR.random((50, 30)) < 0.5).astype(float)


def test_planted_outcomes_give_one_and_their_opposite_minus_one():
    """Outcomes that fall by the score of each example kept; sign and scale as the scores' convention says."""
    outcomes = 5.0 - 2.0 * MASKS @ SCORES.T
    assert linear_datamodeling_scores(MASKS, SCORES, outcomes) == pytest.approx(np.ones(4))
    assert linear_datamodeling_scores(MASKS, SCORES, -outcomes) == pytest.approx(-np.ones(4))


def test_unrelated_outcomes_give_about_zero():
    outcomes = GENERATOR.normal(size=(50, 4))
    assert np.abs(linear_datamodeling_scores(MASKS, SCORES, outcomes)).mean() < 0.3


def test_constant_outcomes_are_refused_and_constant_predictions_are_worth_nothing():
    """Scores may be constant up to rounding: with subsets of one size, those that are the same for every example."""
    with pytest.raises(ValueError, match="outcomes of query 2 are the same"):
        outcomes = -MASKS @ SCORES.T
        outcomes[:, 2] = 1.0
        linear_datamodeling_scores(MASKS, SCORES, outcomes)
    masks = subset_masks(30, 40, 0.5, seed=0)
    scores = SCORES.copy()
    scores[1], scores[2] = 0.0, 1 / 3
    lds = linear_datamodeling_scores(masks, scores, -masks.astype(float) @ SCORES.T)
    assert lds == pytest.approx([1, 0, 0, 1])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="shapes do not fit"):
        linear_datamodeling_scores(MASKS, SCORES, MASKS @ SCORES.T[:, :3])


def test_subsets_are_random_of_one_size_and_do_not_depend_on_their_number():
    masks = subset_masks(101, 40, 0.5, seed=3)
    assert masks.dtype == bool and (masks.sum(1) == 50).all()
    assert (subset_masks(101, 7, 0.5, seed=3) == masks[:7]).all()
    assert len({mask.tobytes() for mask in masks}) == 40
    assert (subset_masks(101, 40, 0.5, seed=4) != masks).any()
    assert masks.mean(0).min() > 0.15 and masks.mean(0).max() < 0.85  # no example is favoured


def test_the_ceiling_is_what_the_true_mean_scores():
    """Simulated: outcome = truth + noise of known size. The truth's own LDS is the ceiling."""
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(400, 1, 30))
    for num_repeats, noise in ((2, 1.0), (3, 0.5), (5, 2.0)):
        measurements = truth + noise * rng.normal(size=(400, num_repeats, 30))
        exact = (1 + noise**2 / num_repeats) ** -0.5  # Pearson's; ranks correlate a little less
        reached = np.mean([spearmanr(a, b).statistic for a, b in zip(truth[:, 0].T, measurements.mean(1).T)])
        assert noise_ceiling(measurements).mean() == pytest.approx(reached, abs=0.02) == pytest.approx(exact, abs=0.04)


def test_the_ceiling_of_pure_noise_is_low_and_of_one_repeat_unknown():
    noise = np.random.default_rng(2).normal(size=(400, 4, 30))
    assert noise_ceiling(noise).mean() < 0.25  # the square root of what is left by chance
    assert noise_ceiling(noise[:, :1]) is None
    assert noise_ceiling(np.repeat(noise[:, :1], 2, axis=1)) == pytest.approx(np.ones(30))


def test_the_bootstrap_covers_the_truth_and_pairs_methods():
    """Its interval holds the mean LDS; two equal methods differ by nothing in every sample."""
    outcomes = -MASKS @ SCORES.T + np.random.default_rng(3).normal(size=(50, 4))
    predictions = {name: predicted_measurements(MASKS, SCORES) for name in ("one", "other")}
    samples = bootstrap(predictions, outcomes, num_samples=200)
    low, high = np.quantile(samples["one"], (0.025, 0.975))
    assert low < linear_datamodeling_scores(MASKS, SCORES, outcomes).mean() < high < 1
    assert high - low > 0.01 and (samples["one"] == samples["other"]).all()


def test_significance_is_counted_per_query():
    """Two planted queries of four."""
    outcomes = np.random.default_rng(4).normal(size=(50, 4))
    outcomes[:, :2] = -(MASKS @ SCORES.T)[:, :2]
    result = evaluate({"planted": SCORES}, MASKS, outcomes[:, None])
    assert result["methods"]["planted"]["num_significant"] == 2
    assert result["methods"]["planted"]["max"] == pytest.approx(1) and result["ceiling"] is None


def test_choosing_on_one_half_and_reporting_on_the_other():
    """The method planted in the even subsets is chosen, and what it is worth on the odd ones is said."""
    outcomes = -MASKS @ SCORES.T
    other = np.random.default_rng(5).normal(size=SCORES.shape)
    outcomes[1::2] = -MASKS[1::2] @ other.T
    chosen = choose({"even": SCORES, "odd": other}, MASKS, outcomes[:, None])
    assert chosen["best"] == "even" and chosen["chosen_on"]["even"] == pytest.approx(1)
    assert chosen["reported_on"]["odd"] == pytest.approx(1) and chosen["reported_on"]["even"] < 0.5


def test_calibration_finds_a_planted_slope():
    """With noise of a known variance, which takes its share of R^2; and says nothing where nothing was predicted."""
    masks = (np.random.default_rng(1).random((4000, 30)) < 0.5).astype(float)
    changes = -masks @ SCORES.T / 30
    noise = np.random.default_rng(2).normal(size=changes.shape) * changes.std(0)
    row = calibrate(SCORES, 30.0, masks, 7.0 + 0.25 * (changes + noise))
    assert row["slope_per_query"] == pytest.approx(np.full(4, 0.25), rel=0.1)
    assert row["r_squared_per_query"] == pytest.approx(np.full(4, 0.5), abs=0.05)
    assert row["slope"] == pytest.approx(np.median(row["slope_per_query"]))
    none = calibrate(np.zeros_like(SCORES), 30.0, masks, changes)
    assert none["slope"] == none["r_squared"] == 0
    assert len(calibration_lines({"ekfac": row, "zero": none})) == 3 and not calibration_lines({})


@pytest.mark.parametrize("num_subsets", [3, 4, 6])
def test_p_values_of_few_subsets_are_those_of_all_permutations(num_subsets):
    """Four subsets in perfect order are no better than 2 in 24; Student's t would say 0."""
    perfect = np.arange(num_subsets, dtype=float)[:, None]
    assert p_values(perfect, perfect) == pytest.approx([2 / math.factorial(num_subsets)])
    assert p_values(0 * perfect, perfect) == pytest.approx([1.0])
    predictions, outcomes = np.random.default_rng(0).normal(size=(2, num_subsets, 3))
    for column, p in enumerate(p_values(predictions, outcomes)):
        found = abs(spearmanr(predictions[:, column], outcomes[:, column]).statistic)
        chance = [abs(spearmanr(order, outcomes[:, column]).statistic)
                  for order in itertools.permutations(predictions[:, column])]  # fmt: skip
        assert p == pytest.approx(np.mean([each >= found - 1e-9 for each in chance]))
