"""analyze.py of every example: factors, pairwise scores, the stage table, and the most influential sequences."""

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_core.analysis import analyze, explain
from influence_core.averaging import analyze_checkpoints, explain_checkpoints
from influence_core.compiled import what_was_compiled, where_it_does_not_pay
from influence_core.experiments.arguments import check_size, parse
from influence_core.experiments.checkpoints import not_left_empty, require_checkpoint, require_same_data
from influence_core.experiments.flags import LAST
from influence_core.experiments.overwriting import forget_overwriting, overwriting
from influence_core.experiments.own_queries import load_own_queries
from influence_core.experiments.running import run_script
from influence_core.experiments.trajectory import chosen_checkpoints
from influence_core.files import remove_leftovers
from influence_core.locks import only_writer
from influence_core.profiler import Profiler
from influence_core.runtime import Runtime
from influence_core.scores.parts import shown_pairs
from influence_core.scores.self_influence import STAGE as SELF_INFLUENCE
from influence_core.scores.stored import SCORES, pairwise_score_store
from influence_core.study import Study
from influence_core.tasks.adapters import is_adapter
from influence_core.tasks.example import ExampleTask, is_main_process
from influence_core.tasks.own_queries import OwnQueries
from influence_core.tasks.tracking import coverage_notes
from influence_core.units import gigabytes

TOP = 5  # sequences that the topic figure looks at
SHOWN_CHARACTERS = 1200  # of a sequence
SHOWN_EACH = 10  # highest and lowest training examples of a query whose scores are looked into
SCORES_FILE = "pairwise_scores.safetensors"
SHOWN_OWN = 20  # of the user's own queries, where no number was given


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
    model = task.load_model(arguments.checkpoint_dir)
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
        return study_of(task.load_model(several[name]).to(runtime.device), name)

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
    each = {name: partial(study_of_step, name) for name in several}
    of_self = bool(arguments.self_influence)
    if is_last:
        scores = analyze(study, **what, self_influence=of_self)
    else:
        scores = analyze_checkpoints(study, each, **what, self_influence=of_self)
    if arguments.compute_per_token_scores or arguments.compute_per_layer_scores:
        pairs = {name: shown_pairs(matrix, arguments.report_queries, SHOWN_EACH) for name, matrix in scores.items()}
        options = {"pairs": pairs, "by_token": bool(arguments.compute_per_token_scores)}
        options |= {key: value for key, value in what.items() if key not in ("strategy_names", "factor_batch_size")}
        explain(study, **options) if is_last else explain_checkpoints(study, each, **options)
    runtime.print(f"\n{study.profiler.table()}\n")
    if runtime.compile:
        runtime.print(f"{what_was_compiled()}\n")
    peak, planned = gigabytes(runtime.peak_memory()), gigabytes(study.planned_memory)
    runtime.print(f"Peak memory {peak} (planned {planned})\n")
    if runtime.is_main:
        _report(task, study, scores, query_dataset, own_queries, arguments)
        if of_self:
            print(describe_self_influence(task, study, list(scores)))


def load_datasets(task: ExampleTask, arguments) -> tuple[Sequence[Any], Sequence[Any]]:
    """(training examples, queries), as many of each as the flags say; UserError if the data is no longer the same."""
    num_queries = check_size(arguments, "num_queries", len(task.load_dataset("validation")), "validation set")
    train_dataset = load_train_dataset(task, arguments)
    return train_dataset, task.load_dataset("validation", range(num_queries))


def load_train_dataset(task: ExampleTask, arguments) -> Sequence[Any]:
    """The first of `load_datasets`."""
    num_train = check_size(arguments, "num_train", len(task.load_dataset("train")), "training set")
    train_dataset = task.load_dataset("train", range(num_train))
    require_same_data(task, arguments, train_dataset)
    return train_dataset


def _batch_size(arguments, flag: str, num_examples: int, runtime: Runtime) -> int:
    """The flag's value, at most all examples: that is no error, as no result depends on it, but it is said."""
    value = getattr(arguments, flag)
    if value > num_examples and flag in arguments.given:
        runtime.print(f"Note: --{flag} {value} is more than there are examples: {num_examples} in one batch")
    return min(value, num_examples)


def _report(
    task: ExampleTask, study: Study, scores: dict[str, Tensor], query_dataset, own_queries: OwnQueries | None, arguments
) -> None:
    shown, train_dataset, num_queries = next(iter(scores)), study.train_dataset, len(query_dataset)
    num_shown = arguments.show_queries
    if own_queries is not None and "show_queries" not in arguments.given:
        num_shown = SHOWN_OWN
    if study.sum_queries:
        if num_shown:
            print(describe_sum(task, scores[shown][0], num_queries, train_dataset, shown))
    else:
        for index in range(min(num_shown, num_queries)):
            origin = None if own_queries is None else own_queries.origins[index]
            print(describe_query(task, scores[shown], query_dataset, train_dataset, index, shown, origin))
        if own_queries is not None and num_queries > num_shown:
            print(f"{num_queries - num_shown} more queries are not shown (--show_queries {num_queries} shows all)\n")
        if num_queries and task.topic(query_dataset[0]) is not None:
            print(describe_topics(task, scores, query_dataset, train_dataset))
    rows = f"sum of {num_queries} queries" if study.sum_queries else "queries"
    for name, matrix in scores.items():
        path = pairwise_score_store(study, name, query_dataset, arguments.damping_factor).directory
        print(
            f"Scores ({name}): {tuple(matrix.shape)} [{rows}, training examples] in {path}/pairwise_scores.safetensors"
        )


def describe_query(
    task: ExampleTask,
    scores: Tensor,
    query_dataset,
    train_dataset,
    index: int,
    strategy: str,
    origin: str | None = None,
) -> str:
    """A query and its most influential training example, as text.

    Args:
        origin: where the query is from, if not from the validation split.
    """
    score, best = scores[index].max(0)
    query, train = query_dataset[index], train_dataset[int(best)]
    whence = _whence(task, query, origin or task.origin("validation", index))
    parts = [f"Query {index}{whence}", _indent(task.describe(query))]
    parts += [
        f"  Most influential training sequence ({strategy}): {_name(task, int(best), train)}, score {score:.4g}",
        _indent(task.describe(train)),
    ]
    return "\n".join(parts) + "\n"


def describe_sum(task: ExampleTask, scores: Tensor, num_queries: int, train_dataset, strategy: str) -> str:
    """The most influential training examples for the queries together, as text; scores: [training examples]."""
    parts = [f"Most influential training sequences ({strategy}) for {num_queries} queries together"]
    for score, best in zip(*scores.topk(min(TOP, len(scores)))):
        train = train_dataset[int(best)]
        parts += [f"  {_name(task, int(best), train)}, score {score:.4g}", _indent(task.describe(train))]
    return "\n".join(parts) + "\n"


def _name(task: ExampleTask, index: int, train) -> str:
    """Of a training example: its number, and where it is from."""
    return f"{index}{_whence(task, train, task.origin('train', index))}"


def _whence(task: ExampleTask, example, origin: str | None) -> str:
    """What is known of where an example is from."""
    topic = task.topic(example)
    known = [f"topic: {topic}" if topic is not None else None, origin]
    text = ", ".join(each for each in known if each)
    return f" ({text})" if text else ""


def _indent(text: str) -> str:
    if len(text) > SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + " […]"
    lines = (textwrap.wrap(line, 112, drop_whitespace=False) or [""] for line in text.splitlines())
    return "\n".join(f"  | {part}" for wrapped in lines for part in wrapped)


def describe_self_influence(task, study, strategies: Sequence[str]) -> str:
    """The training examples with the highest scores of their own."""
    lines = []
    for name in strategies:
        store = study.score_store(study.result_name(name), SELF_INFLUENCE)
        values, indices = store.load()[SELF_INFLUENCE][SCORES].topk(min(TOP, len(study.train_dataset)))
        found = (
            f"{_name(task, index, study.train_dataset[index])} {value:.4g}"
            for value, index in zip(values.tolist(), indices.tolist())
        )
        lines.append(f"Highest self-influence ({name}): {', '.join(found)}")
    return "\n".join(lines)


def describe_topics(task, scores: dict[str, Tensor], query_dataset, train_dataset) -> str:
    """How often a query's top sequences are of its own topic, beside chance."""
    train_topics = [task.topic(example) for example in train_dataset]
    same = torch.tensor(
        [[topic == task.topic(query) for topic in train_topics] for query in query_dataset], dtype=torch.float64
    )
    shares = {
        name: float(same.gather(1, matrix.topk(min(TOP, len(train_topics))).indices).mean())
        for name, matrix in scores.items()
    }
    found = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return (
        f"Of the {TOP} most influential sequences of a query, so many are of the query's own topic: {found} "
        f"(chance {float(same.mean()):.1%}; {len(query_dataset)} queries)\n"
    )
