"""What is known of one strategy's scores, as it was stored."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from influence_core.scores.parts import ScoreParts
from influence_core.scores.stored import SUM_QUERIES


@dataclass(frozen=True)
class Analysed:
    """Scores, and what was made with them.

    Args:
        name: of the strategy's results: "ekfac", "ekfac_half".
        scores: [queries, training examples].
        settings: what made them, as their manifest says; empty where nobody knows.
        scale: what a score is divided by to be a change of the measurement; None: it is no size.
        parts: of some pairs, by layer and perhaps by token.
        self_influence: [training examples].
        record: of the run that made them, see experiments/analysis_record.py; empty where there is none.
        results: what experiments found of these scores, by their names: {"lds": …, "counterfactual": …}.
    """

    name: str
    scores: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None
    parts: ScoreParts | None = None
    self_influence: np.ndarray | None = None
    record: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict] = field(default_factory=dict)

    @property
    def are_summed(self) -> bool:
        """Whether the scores are those of a sum of queries, [1, training examples]."""
        return bool(self.settings.get(SUM_QUERIES))
