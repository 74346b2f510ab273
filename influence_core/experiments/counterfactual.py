"""run_counterfactual.py of every example: remove the most influential examples and retrain."""

import numpy as np

from influence_core.errors import UserError
from influence_core.experiments import figures
from influence_core.experiments.arguments import check_size, parse
from influence_core.experiments.bank import Retraining
from influence_core.experiments.retraining import Experiment
from influence_core.experiments.running import run_script
from influence_core.experiments.score_sources import load_all_scores
from influence_core.files import write_json
from influence_core.tasks.example import ExampleTask

RANDOM = "random"
RESULT = "counterfactual.json"


def main(task_class: type[ExampleTask], description: str, argv: list[str] | None = None) -> None:
    """Remove the top examples of each kind of scores, and random ones, and retrain."""
    run_script(lambda: _run(task_class, parse(task_class, "run_counterfactual", description, argv)))


def _run(task_class: type[ExampleTask], arguments) -> None:
    experiment = Experiment(task_class, arguments)
    num_train = len(experiment.train_dataset)
    sizes = sorted({0, *arguments.removal_sizes})
    if "removal_sizes" not in arguments.given:
        sizes = [size for size in sizes if size < num_train]
    if sizes[-1] >= num_train:
        raise UserError(f"--removal_sizes {sizes[-1]} leaves nothing of the training set, which has {num_train}")
    num_queries = check_size(arguments, "num_counterfactual_queries", len(experiment.query_dataset), "queries")
    stored = load_all_scores(arguments.scores, experiment, baseline=False, num_summed=num_queries)
    scores = {name: each.matrix for name, each in stored.items()}
    if RANDOM in scores:
        raise UserError(f"scores named {RANDOM!r} can't be told from random removal: rename their directory")
    experiment.require_writable()
    summed = {name: matrix[:num_queries].sum(0) for name, matrix in scores.items()}
    retrainings = plan_retrainings(summed, num_train, sizes, arguments.num_repeats, arguments.seed)
    values = experiment.retrain(list(retrainings.values()))
    if not experiment.is_main:
        return
    metrics = {
        key: experiment.task.query_metrics({name: value[:num_queries] for name, value in measured.items()})
        for key, measured in zip(retrainings, values)
    }
    result = {
        "num_queries": num_queries,
        "num_train": num_train,
        "num_repeats": arguments.num_repeats,
        "removal_sizes": sizes,
        "metrics": {
            metric: {
                method: summarize(
                    [
                        [metrics[method, size, repeat][metric] for repeat in range(arguments.num_repeats)]
                        for size in sizes
                    ]
                )
                for method in (*scores, RANDOM)
            }
            for metric in next(iter(metrics.values()))
        },
        "settings": experiment.settings | {"scores": {name: each.settings for name, each in stored.items()}},
    }
    write_json(experiment.output_dir / RESULT, result)
    print(f"\n{table(result)}\n")
    experiment.draw(RESULT, figures.draw_counterfactual, "counterfactual.png")


def plan_retrainings(
    summed_scores: dict[str, np.ndarray], num_train: int, sizes: list[int], num_repeats: int, seed: int
) -> dict[tuple[str, int, int], Retraining]:
    """{(method, number removed, repeat): retraining}.

    A repeat has one seed for all methods and sizes, so that removing nothing is one retraining for all methods. What is
    removed at random is drawn afresh for each repeat; a larger removal contains the smaller one, as it does for scores.
    """
    retrainings = {}
    for repeat in range(num_repeats):
        drawn = np.random.default_rng((seed, num_train, repeat)).permutation(num_train)
        orders = {name: np.argsort(-scores, kind="stable") for name, scores in summed_scores.items()} | {RANDOM: drawn}
        for method, order in orders.items():
            for size in sizes:
                keep = np.ones(num_train, dtype=bool)
                keep[order[:size]] = False
                retrainings[method, size, repeat] = Retraining.of(keep, seed, repeat)
    return retrainings


def summarize(values: list[list[float]]) -> dict[str, list]:
    """Means and standard errors over the repeats, of [sizes, repeats]; the error of a single repeat is unknown."""
    means, num_repeats = np.mean(values, axis=1), len(values[0])
    errors = np.std(values, axis=1, ddof=1) / num_repeats**0.5 if num_repeats > 1 else [None] * len(values)
    return {"mean": list(means), "standard_error": list(errors), "values": values}


def table(result: dict) -> str:
    """Mean and standard error of each metric."""
    lines = []
    for metric, methods in result["metrics"].items():
        lines.append(f"{metric[0].upper()}{metric[1:]} (mean ± standard error) after removing")
        width = max(map(len, methods))
        cells = {
            name: [
                f"{mean:.4g}" + (f" ± {error:.2g}" if error is not None else "")
                for mean, error in zip(row["mean"], row["standard_error"])
            ]
            for name, row in methods.items()
        }
        columns = max(8, *(len(cell) for row in cells.values() for cell in row))
        lines.append(f"{'':<{width}}" + "".join(f"  {size:>{columns}}" for size in result["removal_sizes"]))
        for name, row in cells.items():
            lines.append(f"{name:<{width}}" + "".join(f"  {cell:>{columns}}" for cell in row))
    return "\n".join(lines)
