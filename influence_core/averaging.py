"""Scores of one training, as the mean over several of its checkpoints.

What an example does to the model it does all along the training, and each checkpoint sees its own stretch of that: the
sum over checkpoints of Pruthi et al. 2020 (TracIn, arXiv:2002.08484), with each one's own preconditioner, and the mean
in place of the sum so that a score keeps its scale (the learning rate is the same throughout).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from influence_core.analysis import analyze, explain, refuse_foreign_results
from influence_core.factors.strategies import Damping
from influence_core.memory import release_cached_memory
from influence_core.scores.parts import Pair, ScoreParts, drop_parts_of_others, load_score_parts, parts_store
from influence_core.scores.self_influence import STAGE as SELF_INFLUENCE
from influence_core.scores.self_influence import self_influence_store
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
    with_self = bool(options.get("self_influence"))
    for make in checkpoints.values():
        refuse_foreign_results(make(), strategy_names, query_dataset, damping, with_self)
    of_self = {
        name: self_influence_store(study, name, damping, checkpoints=names) for name in strategy_names * with_self
    }
    parts: dict[StageStore, dict[str, StageStore]] = {store: {} for store in (*stores.values(), *of_self.values())}
    for number, (checkpoint, make) in enumerate(checkpoints.items()):
        runtime.print(f"Checkpoint {checkpoint}, {number + 1} of {len(names)}: each has factors and scores of its own")
        one = make()
        analyze(one, strategy_names, query_dataset, damping, **options)
        for name in strategy_names:
            parts[stores[name]][checkpoint] = pairwise_score_store(one, name, query_dataset, damping)
            if with_self:
                parts[of_self[name]][checkpoint] = self_influence_store(one, name, damping)
        study.planned_memory = max(study.planned_memory or 0, one.planned_memory or 0)
        for stage, flops in one.planned_flops.items():
            study.planned_flops[stage] = study.planned_flops.get(stage, 0) + flops
        del one  # its model, before the next one's is loaded
        release_cached_memory()
    with study.writer:
        for store in of_self.values():
            _mean(study, store, parts[store], SELF_INFLUENCE)
        return {name: _mean(study, store, parts[store], "pairwise_scores") for name, store in stores.items()}


def explain_checkpoints(
    study: Study,
    checkpoints: Mapping[str, Callable[[], Study]],
    pairs: Mapping[str, Sequence[Pair]],
    query_dataset: Sequence[Any],
    damping: Damping = 1e-8,
    by_token: bool = True,
    **options: Any,
) -> dict[str, ScoreParts]:
    """As `explain`, of the mean over these checkpoints: the mean of the parts; after `analyze_checkpoints`."""
    names = list(checkpoints)
    stores = {}
    for name, of_strategy in pairs.items():
        scores = pairwise_score_store(study, name, query_dataset, damping, checkpoints=names)
        stores[name] = parts_store(study, scores, of_strategy, by_token)
    todo = {}
    for name, store in stores.items():
        if study.runtime.is_main:
            drop_parts_of_others(store)
        with study.stage(store) as unfinished:
            if unfinished:
                todo[name] = pairs[name]
    if todo:
        of_checkpoints = []
        for make in checkpoints.values():
            of_checkpoints.append(explain(make(), todo, query_dataset, damping, by_token, **options))
            release_cached_memory()
        for name in todo:
            mean = ScoreParts.mean([parts[name] for parts in of_checkpoints])
            if study.runtime.is_main:
                stores[name].save({stores[name].stage: mean.tensors()}, {"layers": mean.layers})
        study.runtime.barrier()
    return {name: load_score_parts(store) for name, store in stores.items()}


def _mean(study: Study, store: StageStore, parts: Mapping[str, StageStore], stem: str) -> Tensor:
    """Of the parts' scores, on the CPU; stored, or read where it is stored."""
    store.add_settings(scores={name: part.checksum() for name, part in parts.items()})
    with study.stage(store) as todo:
        if todo and study.runtime.is_main:
            scores = [part.load()[stem][SCORES] for part in parts.values()]
            mean = (sum(matrix.double() for matrix in scores) / len(scores)).to(scores[0].dtype)
            with study.profiler("Save Pairwise Score"):
                counts = next(iter(parts.values())).manifest()["counts"] | {"num_checkpoints": len(parts)}
                store.save({stem: {SCORES: mean}}, counts)
    with study.profiler("Load Pairwise Score"):
        return store.load()[stem][SCORES]
