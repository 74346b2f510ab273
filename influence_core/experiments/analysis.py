"""analyze.py of every example: factors, pairwise scores, the stage table, and the most influential sequences."""

from functools import partial
from pathlib import Path

from torch import nn

from influence_core.analysis import analyze, explain
from influence_core.averaging import analyze_checkpoints, explain_checkpoints
from influence_core.compiled import what_was_compiled, where_it_does_not_pay
from influence_core.experiments.analysis_record import write_record
from influence_core.experiments.arguments import parse
from influence_core.experiments.checkpoints import not_left_empty, require_checkpoint
from influence_core.experiments.data import load_datasets, load_train_dataset
from influence_core.experiments.flags import LAST
from influence_core.experiments.overwriting import forget_overwriting, overwriting
from influence_core.experiments.own_queries import load_own_queries
from influence_core.experiments.pages import write_pages
from influence_core.experiments.running import run_script
from influence_core.experiments.showing import describe_self_influence, show
from influence_core.experiments.trajectory import chosen_checkpoints
from influence_core.files import remove_leftovers, require_writable
from influence_core.locks import only_writer
from influence_core.profiler import Profiler
from influence_core.runtime import Runtime
from influence_core.scores.parts import SHOWN_EACH, shown_pairs
from influence_core.scores.stored import pairwise_score_store
from influence_core.scores.tokens import tells_tokens, token_counts
from influence_core.sharding import is_sharded, process_mesh, shard_model
from influence_core.study import Study
from influence_core.tasks.adapters import is_adapter
from influence_core.tasks.example import ExampleTask, is_main_process
from influence_core.tasks.tracking import coverage_notes
from influence_core.units import gigabytes


def main(task_class: type[ExampleTask], description: str, argv: list[str] | None = None) -> None:
    """Fit factors, compute pairwise scores and show what they say."""
    run_script(lambda: _analyze(task_class, parse(task_class, "analyze", description, argv)))


def _analyze(task_class: type[ExampleTask], arguments) -> None:
    require_checkpoint(task_class, arguments)
    output_dir = Path(arguments.output_dir)
    with not_left_empty(output_dir), only_writer(output_dir, bool(arguments.wait), is_main_process()):
        if is_main_process():
            for directory in (output_dir, *output_dir.glob("step-*")):
                remove_leftovers(directory)
        runtime = Runtime.start(
            arguments.use_ddp,
            arguments.use_half_precision,
            arguments.use_compile,
            arguments.seed,
            bool(arguments.use_tf32),
            bool(arguments.use_fsdp),
        )
        if runtime.compile and (note := where_it_does_not_pay(runtime.device)):
            runtime.print(note)
        if not arguments.overwrite:
            _run(task_class, arguments, runtime)
            if runtime.is_main:
                forget_overwriting(output_dir)
        else:
            with overwriting(output_dir, vars(arguments), runtime.is_main, runtime.barrier) as made_by:
                _run(task_class, arguments, runtime, made_by)
        runtime.stop()  # not after an error: leaving the group would wait for processes that wait for this one


def _run(task_class: type[ExampleTask], arguments, runtime: Runtime, made_by: str = "") -> None:
    is_last = arguments.checkpoints == LAST
    several = {} if is_last else chosen_checkpoints(arguments.checkpoint_dir, arguments.checkpoints)
    task = task_class(**arguments.task)
    task.tracked_layers, task.tracked_kinds = arguments.tracked_layers, arguments.track
    task.checkpoint_dir = arguments.checkpoint_dir  # whose tokenizer makes the user's texts into examples
    own_queries = load_own_queries(task, arguments)
    task.shard_on = process_mesh(runtime.device.type, arguments.fsdp_shards) if runtime.sharded else None

    def load_model(directory: str | Path) -> nn.Module:
        model = task.load_model(directory)
        if task.shard_on is not None and not is_sharded(model.parameters()):  # by a task that loads it in its own way
            shard_model(model, task.shard_on)
        return model

    model = load_model(arguments.checkpoint_dir)
    unused = [flag for flag in task.flags_of_a_start if flag in arguments.given]
    if unused and not is_adapter(arguments.checkpoint_dir):
        flags = ", ".join(f"--{flag}" for flag in unused)
        runtime.print(f"Note: {flags}: for train.py; analyzed is the model in {arguments.checkpoint_dir}")
    if own_queries is None:
        train_dataset, query_dataset = load_datasets(task, arguments)
    else:
        train_dataset, query_dataset = load_train_dataset(task, arguments), own_queries.examples
    num_train, num_queries = len(train_dataset), len(query_dataset)
    profiler, output_dir = Profiler(runtime), Path(arguments.output_dir)

    def study_of(model: nn.Module, name: str = "") -> Study:
        return Study(
            task,
            model,
            train_dataset,
            output_dir / name,
            runtime,
            use_empirical_fisher=bool(arguments.use_empirical_fisher),
            overwrite=bool(arguments.overwrite),
            made_by=made_by,
            own_queries=own_queries is not None,
            sum_queries=bool(arguments.sum_queries),
            scores_suffix=arguments.scores_suffix or "",
            progress_interval=arguments.progress_interval,
            profiler=profiler,
        )

    def study_of_step(name: str) -> Study:
        return study_of(load_model(several[name]).to(runtime.device), name)

    study = study_of(model.to(runtime.device) if is_last else model)
    for note in coverage_notes(task, model, study.layers, was_asked="tracked_layers" in arguments.given):
        runtime.print(note)
    what = {"strategy_names": arguments.factor_strategy, "query_dataset": query_dataset}
    what |= {
        "damping": arguments.damping_factor,
        "query_batch_size": _batch_size(arguments, "query_batch_size", num_queries, runtime),
        "train_batch_size": _batch_size(arguments, "train_batch_size", num_train, runtime),
        "factor_batch_size": _batch_size(arguments, "factor_batch_size", num_train, runtime),
        "memory_budget": None if arguments.memory_budget_gb is None else int(arguments.memory_budget_gb * 1e9),
    }
    if arguments.compute_per_token_scores:  # before the work, not after
        token_counts(task, query_dataset[0])
    if arguments.report:
        require_writable(output_dir)
    each = {name: partial(study_of_step, name) for name in several}
    of_self = bool(arguments.self_influence)
    if is_last:
        scores = analyze(study, **what, self_influence=of_self)
    else:
        scores = analyze_checkpoints(study, each, **what, self_influence=of_self)
    by_token, by_layer = arguments.compute_per_token_scores, arguments.compute_per_layer_scores
    if by_token is None:  # the page shows what there is
        by_token = bool(arguments.report) and tells_tokens(task, query_dataset[0])
    if by_layer is None:
        by_layer = bool(arguments.report)
    if by_token or by_layer:
        pairs = {name: shown_pairs(matrix, arguments.report_queries, SHOWN_EACH) for name, matrix in scores.items()}
        options = {"pairs": pairs, "by_token": by_token}
        options |= {key: value for key, value in what.items() if key not in ("strategy_names", "factor_batch_size")}
        explain(study, **options) if is_last else explain_checkpoints(study, each, **options)
    runtime.print(f"\n{study.profiler.table()}\n")
    if runtime.compile:
        runtime.print(f"{what_was_compiled()}\n")
    peak, planned = gigabytes(runtime.peak_memory()), gigabytes(study.planned_memory)
    runtime.print(f"Peak memory {peak} (planned {planned})\n")
    if not runtime.is_main:
        return
    show(task, study, scores, query_dataset, own_queries, arguments)
    if of_self and not (study.own_queries or study.sum_queries):
        print(describe_self_influence(task, study, list(scores)))
    of_scores = {"damping": arguments.damping_factor, "checkpoints": list(several) or None}
    stores = [pairwise_score_store(study, name, query_dataset, **of_scores) for name in scores]
    places = {store.directory.name.removeprefix("scores_"): store for store in stores}
    record = write_record(study, places)
    if arguments.report:
        matrices = {name: matrix.numpy() for name, matrix in zip(places, scores.values())}
        directories = {name: store.directory for name, store in places.items()}
        origins = None if own_queries is None else own_queries.origins
        of_study = task, query_dataset, train_dataset, output_dir, directories, matrices
        for page in write_pages(*of_study, arguments, record, origins):
            print(f"Report: {page}")


def _batch_size(arguments, flag: str, num_examples: int, runtime: Runtime) -> int:
    """The flag's value, at most all examples: that is no error, as no result depends on it, but it is said."""
    value = getattr(arguments, flag)
    if value > num_examples and flag in arguments.given:
        runtime.print(f"Note: --{flag} {value} is more than there are examples: {num_examples} in one batch")
    return min(value, num_examples)
