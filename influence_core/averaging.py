"""Scores of one training, as the mean over several of its checkpoints.

What an example does to the model it does all along the training, and each checkpoint sees its own stretch of that: the
sum over checkpoints of Pruthi et al. 2020 (TracIn, arXiv:2002.08484), with each one's own preconditioner, and the mean
in place of the sum so that a score keeps its scale (the learning rate is the same throughout).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from influence_core.analysis import analyze, refuse_foreign_results
from influence_core.factors.strategies import Damping
from influence_core.memory import release_cached_memory
from influence_core.scores.stored import SCORES, pairwise_score_store
from influence_core.storage import StageStore
from influence_core.study import Study


def analyze_checkpoints(
    study: Study,
    checkpoints: Mapping[str, Callable[[], Study]],
    strategy_names: Sequence[str],
    query_dataset: Sequence[Any],
    damping: Damping = 1e-8,
    **options: Any,
) -> dict[str, Tensor]:
    """As `analyze`, of each of these checkpoints; the study's own scores are their mean.

    Args:
        study: of the model that the training ended with, which is not run: where the means lie.
        checkpoints: {name: makes its study, of its own model and directory, with the same training set and runtime}.
        options: those of `analyze`.
    Raises:
        UserError: as `analyze`; for stored results of any checkpoint before the first one's work.
    """
    runtime, names = study.runtime, list(checkpoints)
    stores = {
        name: pairwise_score_store(study, name, query_dataset, damping, checkpoints=names) for name in strategy_names
    }
    if not study.overwrite:
        for store in stores.values():
            store.manifest()
    for make in checkpoints.values():
        refuse_foreign_results(make(), strategy_names, query_dataset, damping)
    parts: dict[str, dict[str, StageStore]] = {name: {} for name in strategy_names}
    for number, (checkpoint, make) in enumerate(checkpoints.items()):
        runtime.print(f"Checkpoint {checkpoint}, {number + 1} of {len(names)}: each has factors and scores of its own")
        one = make()
        analyze(one, strategy_names, query_dataset, damping, **options)
        for name in strategy_names:
            parts[name][checkpoint] = pairwise_score_store(one, name, query_dataset, damping)
        study.planned_memory = max(study.planned_memory or 0, one.planned_memory or 0)
        del one  # its model, before the next one's is loaded
        release_cached_memory()
    with study.writer:
        return {name: _mean(study, store, parts[name]) for name, store in stores.items()}


def _mean(study: Study, store: StageStore, parts: Mapping[str, StageStore]) -> Tensor:
    """Of the parts' scores, [queries, training examples] on the CPU; stored, or read where it is stored."""
    store.add_settings(scores={name: part.checksum() for name, part in parts.items()})
    with study.stage(store) as todo:
        if todo and study.runtime.is_main:
            scores = [part.load()["pairwise_scores"][SCORES] for part in parts.values()]
            mean = (sum(matrix.double() for matrix in scores) / len(scores)).to(scores[0].dtype)
            with study.profiler("Save Pairwise Score"):
                counts = next(iter(parts.values())).manifest()["counts"] | {"num_checkpoints": len(parts)}
                store.save({"pairwise_scores": {SCORES: mean}}, counts)
    with study.profiler("Load Pairwise Score"):
        return store.load()["pairwise_scores"][SCORES]
