"""Where pairwise scores lie, and what is stored with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from influence_core.factors.strategies import Damping, find_strategy
from influence_core.fingerprints import dataset_fingerprint
from influence_core.storage import StageStore
from influence_core.study import Study

SCORES = "all_modules"  # name of the stored tensor [queries, training examples]
OWN_QUERIES, SUM_QUERIES = "own_queries", "sum_queries"  # settings: true of scores that are such, see Study
DIGITS = 8  # of the queries' fingerprint, in the name of a directory


def pairwise_score_store(
    study: Study,
    strategy_name: str,
    query_dataset: Sequence[Any],
    damping: Damping,
    factor_stores: dict[str, StageStore] | None = None,
    checkpoints: Sequence[str] | None = None,
) -> StageStore:
    """Where a strategy's scores lie; without `factor_stores` only what is known before fitting is compared.

    Args:
        checkpoints: names of those whose mean the scores are, where they are one.
    """
    queries = dataset_fingerprint(query_dataset)
    settings = factor_settings(strategy_name, damping, factor_stores, checkpoints) | {
        "query_dataset": queries,
        "num_queries": len(query_dataset),
        OWN_QUERIES: study.own_queries or None,
        SUM_QUERIES: study.sum_queries or None,
    }
    name = study.result_name(strategy_name)
    name += f"_queries-{queries[:DIGITS]}" * study.own_queries + "_sum" * study.sum_queries
    return study.score_store(name, **settings)


def factor_settings(
    strategy_name: str,
    damping: Damping,
    factor_stores: Mapping[str, StageStore] | None = None,
    checkpoints: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What scores of any kind owe to a strategy: see `pairwise_score_store`."""
    settings = {
        "strategy": strategy_name,
        "damping": damping if strategy_name != "identity" else None,
        "checkpoints": None if checkpoints is None else list(checkpoints),
    }
    if factor_stores is not None:
        settings["factors"] = lambda: {stage: store.checksum() for stage, store in factor_stores.items()}
    return settings


def score_scale(strategy_name: str, num_train: int, stores: dict[str, StageStore]) -> float | None:
    """What a strategy's scores are divided by to be changes, see `Strategy.scale`; from the stores of its factors."""
    counts = stores["covariance"].manifest()["counts"] if "covariance" in stores else {}
    return find_strategy(strategy_name).scale(num_train, counts.get("num_positions"))
