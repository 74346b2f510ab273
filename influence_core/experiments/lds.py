"""The linear datamodeling score: do influence scores predict what retraining on a subset does?"""

import numpy as np
from scipy.stats import spearmanr


def linear_datamodeling_scores(masks: np.ndarray, scores: np.ndarray, measurements: np.ndarray) -> np.ndarray:
    """Rank correlation, for each query, of predicted and actual measurement over retrainings.

    Args:
        masks: [retrainings, training examples], 1 where the example was kept.
        scores: [queries, training examples], positive = training on it lowers the measurement.
        measurements: [retrainings, queries], after each retraining (averaged over repeats).
    Returns:
        [queries], Spearman's correlation of -(masks @ scores^T) and the measurements, in [-1, 1].
    Raises:
        ValueError: shapes do not fit, or outcomes or predictions of a query are constant (no rank to correlate).
    Source: Park et al. 2023, arXiv:2303.14186, section 3.
    """
    masks, scores, measurements = (np.asarray(x, dtype=np.float64) for x in (masks, scores, measurements))
    if masks.shape[1] != scores.shape[1] or measurements.shape != (len(masks), len(scores)):
        raise ValueError(
            f"shapes do not fit: masks {masks.shape}, scores {scores.shape}, outcomes {measurements.shape}"
        )
    predictions = -masks @ scores.T
    for name, values in (("outcomes", measurements), ("predictions", predictions)):
        constant = np.flatnonzero(np.ptp(values, axis=0) == 0)
        if len(constant):
            raise ValueError(f"the {name} of query {constant[0]} are the same for every retraining")
    return np.array([spearmanr(p, m).statistic for p, m in zip(predictions.T, measurements.T)])
