"""The linear datamodeling score on planted data: its sign, its ends, and what it refuses."""

import numpy as np
import pytest

from influence_core.experiments.lds import linear_datamodeling_scores

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


def test_constant_outcomes_and_predictions_are_refused():
    with pytest.raises(ValueError, match="outcomes of query 2 are the same"):
        outcomes = -MASKS @ SCORES.T
        outcomes[:, 2] = 1.0
        linear_datamodeling_scores(MASKS, SCORES, outcomes)
    with pytest.raises(ValueError, match="predictions of query 0"):
        linear_datamodeling_scores(np.ones_like(MASKS), SCORES, -MASKS @ SCORES.T)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="shapes do not fit"):
        linear_datamodeling_scores(MASKS, SCORES, MASKS @ SCORES.T[:, :3])
