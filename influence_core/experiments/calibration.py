"""Whether scores are sizes, or only an order: actual changes of the measurement against the predicted ones.

Leaving examples out is predicted to change a query's measurement by the sum of their scores / scale, where the scale is
the number of training examples for strategies whose Fisher is a mean over examples (`Strategy.scale`). Over subsets, a
least-squares line of the actual on the predicted changes has slope 1 where the scores are sizes; its R^2 is the share
of the outcomes' variance that it explains, noise of the retrainings included.
"""

from collections.abc import Mapping

import numpy as np

from influence_core.experiments.lds import predicted_measurements

DIGITS = 5  # of the changes that the figure draws


def calibrate(scores: np.ndarray, scale: float, masks: np.ndarray, outcomes: np.ndarray) -> dict:
    """Slope and R^2 of each query, and their medians, as JSON values.

    Args:
        scores: [queries, training examples]; masks: [subsets, training examples], 1 where kept;
        outcomes: [subsets, queries], measurements after retraining.
    """
    predicted = predicted_measurements(masks, scores) / scale
    predicted, actual = predicted - predicted.mean(0), outcomes - outcomes.mean(0)
    products, squares, actual_squares = ((a * b).mean(0) for a, b in (
        (predicted, actual), (predicted, predicted), (actual, actual)
    ))  # fmt: skip
    slopes = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
    shares = np.divide(slopes * products, actual_squares, out=np.zeros_like(products), where=actual_squares > 0)
    return {
        "slope": float(np.median(slopes)),
        "r_squared": float(np.median(shares)),
        "slope_per_query": slopes.tolist(),
        "r_squared_per_query": shares.tolist(),
        "predicted": _rounded(predicted),
        "actual": _rounded(actual),
    }


def calibration_lines(calibration: Mapping[str, dict]) -> list[str]:
    """The medians as a person reads them; none where no scores have a scale."""
    if not calibration:
        return []
    lines = ["Actual against predicted change (median over queries; slope 1: score / scale is its size):"]
    width = max(map(len, calibration))
    for name, row in calibration.items():
        lines.append(f"  {name:<{width}} slope {row['slope']:.3g}, R^2 {row['r_squared']:.3f}")
    return lines


def _rounded(values: np.ndarray) -> list[list[float]]:
    """[subsets][queries], short enough to store."""
    return [[float(f"{value:.{DIGITS}g}") for value in row] for row in values]
