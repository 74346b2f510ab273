"""From a study to scores, in one call: plan, factors, pairwise scores; and from scores to what they are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from influence_core.batches import make_batch
from influence_core.check import check_contract
from influence_core.errors import UserError
from influence_core.factors.fit import factor_stores, fit_factors, refuse_foreign_factors
from influence_core.factors.kept import KeptCaptures
from influence_core.factors.strategies import Damping, damping_scale, find_strategy
from influence_core.files import require_writable
from influence_core.layers import TrackedLayer
from influence_core.memory import is_out_of_memory
from influence_core.passes import LossFunction
from influence_core.probing import Probe, probe
from influence_core.scores.batch_sizes import fit_batch_sizes
from influence_core.scores.cost import Work
from influence_core.scores.explaining import compute_score_parts
from influence_core.scores.pairwise import compute_pairwise_scores
from influence_core.scores.parts import (
    Pair,
    ScoreParts,
    drop_parts_of_others,
    load_score_parts,
    parts_store,
)
from influence_core.scores.plan import Plan, make_plan, plan_flops
from influence_core.scores.plan_text import describe_plan
from influence_core.scores.self_influence import compute_self_influence, self_influence_store
from influence_core.scores.stored import pairwise_score_store
from influence_core.sharded_units import largest_unit_bytes
from influence_core.study import Study

UNITS_AT_ONCE = 3  # of sharded parameters: one at work, the next one, and what it is made of


def analyze(
    study: Study,
    strategy_names: Sequence[str],
    query_dataset: Sequence[Any],
    damping: Damping = 1e-8,
    query_batch_size: int = 32,
    train_batch_size: int = 64,
    factor_batch_size: int = 64,
    memory_budget: int | None = None,
    self_influence: bool = False,
) -> dict[str, Tensor]:
    """Fit what the strategies need and score every query against every training example.

    Args:
        query_batch_size, train_batch_size, factor_batch_size: examples in one forward and backward pass, at most;
            they change memory and time, not results, and are lowered where memory is short.
        memory_budget: bytes that the process may use in all; by default 90 % of what is free, and what it has.
        self_influence: also store each training example's own score, see scores/self_influence.py.
    Returns:
        {strategy: [queries, training examples] float32, on the CPU}; also stored, see `Study.score_store`. With
        `Study.sum_queries`, [1, training examples].
    Raises:
        UserError: the settings do not fit the data, the memory, or what is stored; or the task or model breaks the
            contract (see check.py).
    """
    strategies = [find_strategy(name) for name in strategy_names]
    damping_scale(damping)
    for name, dataset in (("training set", study.train_dataset), ("set of queries", query_dataset)):
        if not len(dataset):
            raise UserError(f"the {name} is empty")
    refuse_foreign_results(study, strategy_names, query_dataset, damping, self_influence)
    if not is_finished(study, strategy_names, query_dataset, damping, self_influence):  # those may be read-only
        require_writable(study.output_dir)
    fits_factors = any(strategy.needs_lambda or strategy.in_eigenbasis for strategy in strategies)
    checked = check_contract(study, query_dataset, fits_factors)
    of_training = probe_example(
        study, study.train_dataset, study.fisher_loss if fits_factors else study.task.train_loss, study.layers
    )
    work = Work(
        num_train=len(study.train_dataset),
        num_queries=len(query_dataset),
        num_strategies=len(strategies),
        train_batch_size=min(train_batch_size, len(study.train_dataset)),
        query_batch_size=min(query_batch_size, len(query_dataset)),
        factor_batch_size=min(factor_batch_size, len(study.train_dataset)),
        train=of_training,
        query=probe_example(study, query_dataset, study.task.measurement, study.layers),
        operand_bytes=study.runtime.precision.operand_dtype.itemsize,
        product_bytes=study.runtime.precision.product_dtype.itemsize,
        num_in_eigenbasis=sum(strategy.in_eigenbasis for strategy in strategies),
        num_with_lambda=sum(strategy.needs_lambda for strategy in strategies),
        num_preconditioned=sum(strategy.needs_lambda or strategy.in_eigenbasis for strategy in strategies),
        sum_bytes=study.runtime.precision.sum_dtype.itemsize,
        device_type=study.runtime.device.type,
        num_processes=study.runtime.world_size,
        num_workers=study.runtime.num_workers,
        num_shares=study.runtime.world_size if study.runtime.sharded else 1,
        gathered_bytes=UNITS_AT_ONCE * largest_unit_bytes(study.model) if study.runtime.sharded else 0,
        post_processed=of_training.num_gradients if study.task.post_processes else 0,
        sum_queries=study.sum_queries,
    )
    work = study.runtime.of_main(work)
    in_use, budget = available_memory(study, memory_budget)
    work = fit_batch_sizes(study.layers, work, budget, study.runtime.print)
    plan = plan_analysis(study, work, in_use, budget)
    study.runtime.print(f"  checked  {checked}")
    kept = KeptCaptures(plan.kept_bytes)
    # Those with covariances first: what their pass kept then serves the first Lambda, of whichever strategy.
    in_order = sorted(strategies, key=lambda strategy: not strategy.in_eigenbasis)
    with study.writer:
        stores = {each.name: fit_factors(study, each.name, work.factor_batch_size, kept) for each in in_order}
        kept.clear()
        of_strategies = {name: stores[name] for name in strategy_names}
        scores = compute_pairwise_scores(
            study, of_strategies, query_dataset, plan, damping, work.query_batch_size, work.train_batch_size
        )
        if self_influence:
            compute_self_influence(study, of_strategies, damping, work.train_batch_size, plan.layer_groups)
        return scores


def explain(
    study: Study,
    pairs: Mapping[str, Sequence[Pair]],
    query_dataset: Sequence[Any],
    damping: Damping = 1e-8,
    by_token: bool = True,
    query_batch_size: int = 32,
    train_batch_size: int = 64,
    memory_budget: int | None = None,
) -> dict[str, ScoreParts]:
    """What the scores of some pairs are made of, by layer and (with `by_token`) by token; after `analyze`.

    Args:
        pairs: {strategy: (query, training example) of each}, see `shown_pairs`.
    Returns:
        {strategy: its parts}, also stored beside the scores.
    Raises:
        UserError: the scores are not stored; the task does not tell its tokens.
    """
    parts: dict[str, ScoreParts] = {}
    for name, of_strategy in pairs.items():
        factors = factor_stores(study, name)
        scores = pairwise_score_store(study, name, query_dataset, damping, factors)
        for stored in (*factors.values(), scores):
            if stored.manifest() is None:
                raise UserError(
                    f"there is no {stored.manifest_path}, by which scores would be explained: analyze first"
                )
        store = parts_store(study, scores, of_strategy, by_token)
        if study.runtime.is_main:
            drop_parts_of_others(store)
        with study.stage(store) as todo:
            if todo:
                _, budget = available_memory(study, memory_budget)
                sizes = query_batch_size, train_batch_size
                made = compute_score_parts(
                    study, name, factors, query_dataset, of_strategy, damping, *sizes, budget, by_token
                )
                if study.runtime.is_main:
                    store.save({store.stage: made.tensors()}, {"layers": made.layers})
        parts[name] = load_score_parts(store)
    return parts


def refuse_foreign_results(
    study: Study,
    strategy_names: Sequence[str],
    query_dataset: Sequence[Any],
    damping: Damping,
    self_influence: bool = False,
) -> None:
    """Raise UserError, before the work rather than after it, for stored results that were made otherwise."""
    if not study.overwrite:
        for name in strategy_names:
            refuse_foreign_factors(study, name)
            pairwise_score_store(study, name, query_dataset, damping).manifest()
            if self_influence:
                self_influence_store(study, name, damping).manifest()


def is_finished(
    study: Study,
    strategy_names: Sequence[str],
    query_dataset: Sequence[Any],
    damping: Damping,
    self_influence: bool = False,
) -> bool:
    """Whether all scores are stored and are to stay."""
    stores = [pairwise_score_store(study, name, query_dataset, damping) for name in strategy_names]
    if self_influence:
        stores += [self_influence_store(study, name, damping) for name in strategy_names]
    return not study.overwrite and all(store.manifest() is not None for store in stores)


def available_memory(study: Study, memory_budget: int | None) -> tuple[int, int]:
    """Bytes in use, and bytes that may be taken beyond them."""
    in_use = study.runtime.used_memory()
    budget = study.runtime.free_memory() if memory_budget is None else memory_budget - in_use
    return in_use, study.runtime.smallest(budget)  # all processes follow one plan


def plan_analysis(study: Study, work: Work, in_use: int, budget: int) -> Plan:
    """Make the plan and print it."""
    plan = make_plan(study.layers, work, budget, in_use)
    study.runtime.print(describe_plan(plan, study.model, study.layers, work, in_use, budget))
    study.runtime.print(f"  numbers  {study.runtime.precision.description}, on {study.runtime.device}")
    study.planned_memory = in_use + max(plan.peak_bytes.values())
    study.planned_flops = plan_flops(plan, study.layers, work)
    return plan


def probe_example(study: Study, dataset: Sequence[Any], loss: LossFunction, layers: list[TrackedLayer]) -> Probe:
    """The memory that the longest example takes, and what a mean one captures and costs.

    Run by one, and by the same one twice, to tell what more examples would not multiply.
    """
    lengths = study.lengths(dataset)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    with study.gradient_pass(loss, layers) as run:
        one = probe(run, make_batch(study.task, dataset, [longest], study.runtime))
        try:
            two = probe(run, make_batch(study.task, dataset, [longest, longest], study.runtime))
            num_bytes = two.num_bytes - one.num_bytes
        except RuntimeError as error:
            if not is_out_of_memory(error) or study.runtime.sharded:  # others are in the midst of the same pass
                raise
            num_bytes = one.num_bytes  # then nothing is known of what more examples would not multiply
    share_of_longest = sum(lengths) / len(lengths) / lengths[longest]
    return replace(
        one,
        num_bytes=num_bytes,
        fixed_bytes=one.num_bytes - num_bytes,
        captured_bytes=int(one.captured_bytes * share_of_longest),
        captured_by_layer={name: int(size * share_of_longest) for name, size in one.captured_by_layer.items()},
        forward_flops=one.forward_flops * share_of_longest,
        backward_flops=one.backward_flops * share_of_longest,
        positions={name: count * share_of_longest for name, count in one.positions.items()},
        active_positions={name: count * share_of_longest for name, count in one.active_positions.items()},
    )
