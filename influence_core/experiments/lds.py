"""The linear datamodeling score: do influence scores predict what retraining on a subset does?

Shapes: masks [subsets, training examples], 1 where the example was kept; scores [queries, training examples], positive
where training on the example lowers the measurement; measurements [subsets, repeats, queries].

Source: Park et al. 2023, arXiv:2303.14186, section 3.
"""

import itertools

import numpy as np
from scipy.stats import rankdata, spearmanr

EXACT_SUBSETS = 7  # up to so many, p-values by all permutations: 5,040 of them
NUM_SPLITS = 20  # of the repeats into halves, for the reliability


def subset_masks(num_train: int, num_masks: int, fraction: float, seed: int) -> np.ndarray:
    """[num_masks, num_train] bool: random subsets of one size; subset m does not depend on how many there are."""
    size = round(fraction * num_train)
    masks = np.zeros((num_masks, num_train), dtype=bool)
    for number, mask in enumerate(masks):
        mask[np.random.default_rng((seed, number)).permutation(num_train)[:size]] = True
    return masks


def linear_datamodeling_scores(masks: np.ndarray, scores: np.ndarray, measurements: np.ndarray) -> np.ndarray:
    """Rank correlation, for each query, of predicted and actual measurement over retrainings.

    Args:
        masks: [retrainings, training examples], 1 where the example was kept.
        scores: [queries, training examples], positive = training on it lowers the measurement.
        measurements: [retrainings, queries], after each retraining (averaged over repeats).
    Returns:
        [queries], Spearman's correlation of -(masks @ scores^T) and the measurements, in [-1, 1].
        Scores that say the same of every subset predict nothing: 0.
    Raises:
        ValueError: shapes do not fit, or the outcomes of a query are constant (no rank to correlate).
    """
    masks, scores, measurements = (np.asarray(x, dtype=np.float64) for x in (masks, scores, measurements))
    if masks.shape[1] != scores.shape[1] or measurements.shape != (len(masks), len(scores)):
        raise ValueError(
            f"shapes do not fit: masks {masks.shape}, scores {scores.shape}, outcomes {measurements.shape}"
        )
    constant = np.flatnonzero(np.ptp(measurements, axis=0) == 0)
    if len(constant):
        raise ValueError(f"the outcomes of query {constant[0]} are the same for every retraining: train for more "
                         "epochs or at a higher learning rate")  # fmt: skip
    return _correlations(predicted_measurements(masks, scores), measurements)


def predicted_measurements(masks: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[retrainings, queries]: -(masks @ scores^T), up to an affine map; zero where only rounding varies."""
    predictions = -masks.astype(np.float64) @ scores.T.astype(np.float64)
    return predictions * (np.ptp(predictions, axis=0) > 1e-12 * np.abs(predictions).max(axis=0))


def p_values(predictions: np.ndarray, measurements: np.ndarray) -> np.ndarray:
    """[queries], two-sided, of each query's rank correlation: by Student's t; for few subsets, by all permutations."""
    if len(measurements) > EXACT_SUBSETS:
        return np.array([spearmanr(p, m).pvalue for p, m in zip(predictions.T, measurements.T)])
    ranks, others = _standardised_ranks(predictions), _standardised_ranks(measurements)
    orders = np.array(list(itertools.permutations(range(len(ranks)))))
    found = (ranks * others).mean(0)
    chance = np.einsum("osq,sq->oq", ranks[orders], others) / len(ranks)
    return (np.abs(chance) >= np.abs(found) - 1e-9).mean(0)


def noise_ceiling(measurements: np.ndarray) -> np.ndarray | None:
    """What a perfect prediction of the mean outcome would score, for each query; None with a single repeat.

    The measurements are means over R repeats, so they carry noise. The rank correlation r of two halves of the repeats,
    of h = R // 2 each (mean of several splits), stepped up to R by the Spearman-Brown formula, n r / (1 + (n - 1) r)
    with n = R / h, is their reliability; the outcome's true mean correlates with them by its square root.

    Args:
        measurements: [subsets, repeats, queries].
    Returns:
        [queries], in [0, 1].
    """
    num_repeats = measurements.shape[1]
    half = num_repeats // 2
    if half == 0:
        return None
    rng = np.random.default_rng(0)
    correlations = []
    for _ in range(NUM_SPLITS):
        order = rng.permutation(num_repeats)
        halves = (measurements[:, part].mean(1) for part in (order[:half], order[half : 2 * half]))
        correlations.append(_correlations(*halves))
    r = np.mean(correlations, axis=0)
    steps = num_repeats / half
    # A negative correlation of the halves is noise, and so is the reliability that it would give.
    return np.sqrt(np.clip(steps * r / (1 + (steps - 1) * np.maximum(r, 0)), 0, 1))


def bootstrap(
    predictions: dict[str, np.ndarray], measurements: np.ndarray, num_samples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """The mean LDS of each method in resampled subsets and queries, the same samples for all methods.

    Args:
        predictions: {method: [subsets, queries]}.
        measurements: [subsets, queries].
    Returns:
        {method: [num_samples]}; subtract two of them for the difference of two methods.
    """
    rng = np.random.default_rng(seed)
    num_subsets, num_queries = measurements.shape
    samples = {name: np.empty(num_samples) for name in predictions}
    for sample in range(num_samples):
        rows, columns = rng.integers(num_subsets, size=num_subsets), rng.integers(num_queries, size=num_queries)
        outcomes = _standardised_ranks(measurements[rows])
        for name, values in predictions.items():
            correlations = (_standardised_ranks(values[rows]) * outcomes).mean(0)
            samples[name][sample] = correlations[columns].mean()
    return samples


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each column."""
    return (_standardised_ranks(a) * _standardised_ranks(b)).mean(0)


def _standardised_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks within each column, of mean 0 and variance 1; all zeros for a constant column."""
    ranks = rankdata(values, axis=0)
    ranks -= ranks.mean(0)
    return ranks / np.maximum(ranks.std(0), 1e-12)
