"""Fit the factors of a strategy, stage by stage; each leaves its result on disk, or at hand for the next as well."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from influence_core.captured import Captured
from influence_core.errors import UserError
from influence_core.factors.covariance import CovarianceSums
from influence_core.factors.eigendecomposition import Decomposition, decompose_all, eigendecomposition
from influence_core.factors.kept import KeptCaptures
from influence_core.factors.lambdas import LambdaSums
from influence_core.factors.strategies import STRATEGIES, Strategy, find_strategy
from influence_core.files import Tensors
from influence_core.finite import listed, not_finite, require_finite
from influence_core.layers import TrackedLayer
from influence_core.storage import StageStore
from influence_core.study import Study

Job = tuple[str, str]  # a covariance: "activation" or "gradient", and the layer


class Sums(Protocol):
    """What a pass over the training set adds up; `tensors` is the whole state."""

    tensors: Tensors

    def update(self, layer: TrackedLayer, captured: Captured) -> None: ...


def fit_factors(
    study: Study, strategy_name: str, batch_size: int, kept: KeptCaptures | None = None
) -> dict[str, StageStore]:
    """Fit and store what a strategy needs, under `factors_<name>`; finished, matching stages are left as they are.

    Args:
        kept: filled by the covariance pass, and used up by the Lambda pass that comes next, of whichever strategy.
    Returns:
        {stage: store}, for those of covariance, eigendecomposition and lambda that the strategy has.
    """
    strategy, stores = find_strategy(strategy_name), factor_stores(study, strategy_name)
    kept = kept or KeptCaptures()

    def unfinished(stage: str):
        """Kfac's covariances and their eigenvectors are ekfac's."""
        others = (other for other in STRATEGIES.values() if other.in_eigenbasis and other is not strategy)
        twins = [factor_stores(study, other.name)[stage] for other in others] if stage != "lambda" else []
        return study.stage(stores[stage], twins)

    if "covariance" in stores:
        with unfinished("covariance") as todo:
            if todo:
                _fit_covariance(study, stores["covariance"], batch_size, kept)
        with unfinished("eigendecomposition") as todo:
            if todo:
                _perform_eigendecomposition(study, stores["eigendecomposition"], stores["covariance"])
    if "lambda" in stores:
        with unfinished("lambda") as todo:
            if todo:
                _fit_lambda(study, strategy, stores["lambda"], stores.get("eigendecomposition"), batch_size, kept)
    return stores


def factor_stores(study: Study, strategy_name: str) -> dict[str, StageStore]:
    """{stage: where it lies, fitted or not}, of the stages that the strategy has."""
    strategy, name = find_strategy(strategy_name), study.result_name(strategy_name)
    stores: dict[str, StageStore] = {}
    if any(strategy.of(layer).in_eigenbasis for layer in study.layers):
        stores["covariance"] = study.factor_store(name, "covariance")
        made_from = {"covariance": stores["covariance"].checksum}  # known when it is written
        stores["eigendecomposition"] = study.factor_store(name, "eigendecomposition", **made_from)
    if any(strategy.of(layer).needs_lambda for layer in study.layers):
        basis = stores["eigendecomposition"].checksum if "eigendecomposition" in stores else "identity"
        stores["lambda"] = study.factor_store(name, "lambda", basis=basis)
    return stores


def refuse_foreign_factors(study: Study, strategy_name: str) -> None:
    """Raise UserError if stored factors were made with other settings, as far as is known before any is fitted."""
    at_layers = [find_strategy(strategy_name).of(layer) for layer in study.layers]
    stages = ["covariance", "eigendecomposition"] * any(each.in_eigenbasis for each in at_layers)
    stages += ["lambda"] * any(each.needs_lambda for each in at_layers)
    for stage in stages:
        study.factor_store(study.result_name(strategy_name), stage).manifest()


def _fit_covariance(study: Study, store: StageStore, batch_size: int, kept: KeptCaptures) -> None:
    with study.profiler("Fit Covariance"):
        layers = study.own(study.layers)
        sums = CovarianceSums(layers, study.runtime.precision, study.runtime.device)
        _accumulate(study, store, sums, batch_size, "Fit Covariance", keep=kept)
        files, num_positions = sums.means(layers)
    with study.profiler("Save Covariance"):
        num_positions = study.runtime.gathered(num_positions)
        _save(study, store, files, {"num_examples": len(study.train_dataset), "num_positions": num_positions})


def _save(study: Study, store: StageStore, files: Mapping[str, Tensors], counts: Mapping[str, Any]) -> None:
    """What rank 0 has, or what all have together."""
    if study.runtime.sharded:
        store.save_parts(files, counts, study.runtime)
    elif study.runtime.is_main:
        store.save(files, counts)


def _perform_eigendecomposition(study: Study, store: StageStore, covariance_store: StageStore) -> None:
    runtime = study.runtime
    with study.profiler("Load Covariance"):
        own = study.own(study.layers)
        covariances = covariance_store.load({layer.name for layer in own})
    with study.profiler("Perform Eigendecomposition"):
        files = {
            f"{kind}_{part}": {} for kind in ("activation", "gradient") for part in ("eigenvalues", "eigenvectors")
        }
        layers = [layer for layer in own if layer.is_kronecker]
        sizes = {("activation", layer.name): layer.shape[1] for layer in layers}
        sizes |= {("gradient", layer.name): layer.shape[0] for layer in layers}
        # The largest first, dealt out to the processes in turn, so that all finish at about the same time.
        jobs = sorted(sizes, key=lambda job: -sizes[job])
        same = _same(covariances, jobs)
        jobs = [job for job in jobs if job not in same]
        partition = {"rank": runtime.rank, "world_size": runtime.world_size, "sharded": runtime.sharded}
        _, done = store.load_progress(partition, runtime.warn) or (0, {})
        # Of sharded layers, a process has the covariances of its own.
        dealt = slice(None) if runtime.sharded else slice(runtime.rank, None, runtime.world_size)
        mine = [job for job in jobs[dealt] if _named("eigenvalues", job) not in done]

        def decompose(job: Job, device: torch.device) -> Decomposition:
            try:
                return eigendecomposition(covariances[f"{job[0]}_covariance"].pop(job[1]), device)
            except torch.linalg.LinAlgError as error:
                raise UserError(
                    f"the {job[0]} covariance of layer {job[1]} has no eigendecomposition ({error}): leave "
                    "the layer out of the tracked layers, or fit it on more examples"
                ) from None

        clock = study.progress_clock()
        with runtime.progress(len(mine), "Perform Eigendecomposition", unit="matrix") as bar:
            for job, (values, vectors) in decompose_all(mine, [sizes[job] for job in mine], decompose, runtime):
                done |= {_named("eigenvalues", job): values, _named("eigenvectors", job): vectors}
                bar.update()
                if clock.is_due():
                    clock.keep(partial(store.save_progress, partition, len(done), done))
        covariances.clear()  # also those that other processes decomposed
        for number, job in enumerate(jobs):
            for part, shape in (("eigenvalues", (sizes[job],)), ("eigenvectors", (sizes[job], sizes[job]))):
                tensor = done.get(_named(part, job))
                tensor = torch.empty(shape, dtype=runtime.precision.sum_dtype) if tensor is None else tensor
                files[f"{job[0]}_{part}"][job[1]] = tensor = tensor.to(runtime.device)
                if not runtime.sharded:
                    runtime.broadcast(tensor, source=number % runtime.world_size)
        for job, other in same.items():
            for part in ("eigenvalues", "eigenvectors"):
                files[f"{job[0]}_{part}"][job[1]] = files[f"{job[0]}_{part}"][other[1]].clone()
        for kind, tensors in files.items():
            require_finite(tensors, "Perform Eigendecomposition", kind.replace("_", " "))
    with study.profiler("Save Eigendecomposition"):
        _save(study, store, files, {"num_matrices": sum(2 for layer in study.layers if layer.is_kronecker)})


def _same(covariances: Mapping[str, Tensors], jobs: Sequence[Job]) -> dict[Job, Job]:
    """{job: an earlier one with the very same covariance}: layers that read the same input, as query, key and value."""
    same: dict[Job, Job] = {}
    alike: dict[tuple, list[Job]] = {}
    for kind, name in jobs:
        matrices = covariances[f"{kind}_covariance"]
        matrix = matrices[name]
        known = alike.setdefault((kind, len(matrix), float(matrix[0, 0]), float(matrix.trace())), [])
        other = next((other for other in known if torch.equal(matrix, matrices[other[1]])), None)
        if other is None:
            known.append((kind, name))
        else:
            same[kind, name] = other
    return same


def _named(part: str, job: Job) -> str:
    """What progress calls the "eigenvalues" or "eigenvectors" of a (kind, layer)."""
    return f"{job[0]}_{part}.{job[1]}"


def _fit_lambda(
    study: Study,
    strategy: Strategy,
    store: StageStore,
    eigendecomposition_store: StageStore | None,
    batch_size: int,
    kept: KeptCaptures,
) -> None:
    activation_eigenvectors = gradient_eigenvectors = None
    if eigendecomposition_store is not None:
        with study.profiler("Load Eigendecomposition"):
            files = eigendecomposition_store.load({layer.name for layer in study.own(study.layers)})
        activation_eigenvectors, gradient_eigenvectors = (
            files[f"{kind}_eigenvectors"] for kind in ("activation", "gradient")
        )
    with study.profiler("Fit Lambda"):
        post_process = study.task.post_process_per_sample_gradient if study.task.post_processes else None
        layers = [layer for layer in study.own(study.layers) if strategy.of(layer).needs_lambda]
        sums = LambdaSums(
            layers,
            study.runtime.precision,
            study.runtime.device,
            activation_eigenvectors,
            gradient_eigenvectors,
            post_process,
        )
        _accumulate(study, store, sums, batch_size, "Fit Lambda", given=kept)
        files = sums.means(layers, len(study.train_dataset))
    with study.profiler("Save Lambda"):
        _save(study, store, files, {"num_examples": len(study.train_dataset)})


def _accumulate(
    study: Study,
    store: StageStore,
    sums: Sums,
    batch_size: int,
    description: str,
    keep: KeptCaptures | None = None,
    given: KeptCaptures | None = None,
) -> None:
    """One pass over this process's share of the training set, then the sum over processes; or over all of it, of this
    process's own layers.

    Progress is noted on the way, as the number of examples done in the order of the pass; a run that was killed goes on
    there. With the same batch size (which the memory may have lowered) it makes the same batches, and so ends with the
    same numbers; else they differ by rounding.

    Args:
        keep: gets the first batches.
        given: the first batches of this same pass, that need not be run again. A pass that goes on somewhere in the
            middle does without both.
    """
    keep, given = keep or KeptCaptures(), given or KeptCaptures()
    runtime, order = study.runtime, study.train_order
    partition, layers, done = study.partition(batch_size), study.own(study.layers), 0
    progress = store.load_progress(partition, runtime.warn)
    if progress is not None:
        done, tensors = progress
        for name, tensor in tensors.items():
            sums.tensors[name].copy_(tensor)
        runtime.print(f"{description}: going on after {done} of {len(order)} sequences")
    if done:
        keep.clear()
        given.clear()
    study.num_kept = given.num_examples
    clock = study.progress_clock()
    with (
        runtime.progress(len(order), description, initial=done) as bar,
        study.gradient_pass(study.fisher_loss) as run,
    ):
        captures = study.captures(
            run, study.train_dataset, order, batch_size, "training loss", keep.clear, done + given.num_examples
        )
        for indices, captured in itertools.chain(given.take(), captures):
            keep.offer(indices, captured)
            for layer in layers:
                sums.update(layer, captured.pop(layer.name))
            done += len(indices)
            bar.update(len(indices))
            if clock.is_due():
                study.watch.look()
                clock.keep(partial(store.save_progress, partition, done, sums.tensors))
    if not runtime.sharded:
        runtime.all_reduce(sums.tensors.values())
    overflown = not_finite(sums.tensors)
    if overflown:
        _refuse_overflow(study, sums, batch_size, description, overflown[0])


def _refuse_overflow(study: Study, sums: Sums, batch_size: int, description: str, name: str) -> None:
    """Raise UserError for a sum that is not finite although all that entered it was, with the batch that did it."""
    kind, layer_name = name.split(".", 1)
    where = "in the sum over examples"
    if study.runtime.sharded:  # the passes of one process alone would wait for the others
        raise _overflow(kind, layer_name, description, where)
    with study.gradient_pass(study.fisher_loss) as run:
        for indices, captured in study.captures(run, study.train_dataset, study.train_order, batch_size, "loss"):
            for tensor in sums.tensors.values():
                tensor.zero_()
            for layer in study.layers:
                sums.update(layer, captured.pop(layer.name))
            if name in not_finite(sums.tensors):
                where = f"in the batch of examples {listed(indices)}"
                break
    raise _overflow(kind, layer_name, description, where)


def _overflow(kind: str, layer_name: str, description: str, where: str) -> UserError:
    kind = "gradient" if kind == "lambda" else kind
    return UserError(
        f"{description}: squares of the {kind}s of layer {layer_name} are beyond the range of the number format "
        f"{where}, so nothing is stored: look at these examples and at the checkpoint (a diverged training run?)"
    )
