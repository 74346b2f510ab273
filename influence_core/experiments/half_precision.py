"""half_precision_analysis.py: what bfloat16 does to the scores of one strategy."""

import numpy as np
from scipy.stats import spearmanr

from influence_core.errors import UserError
from influence_core.experiments import figures
from influence_core.experiments.arguments import check_query, parse
from influence_core.experiments.retraining import Experiment
from influence_core.experiments.running import run_script
from influence_core.experiments.score_sources import load_all_scores
from influence_core.files import write_json
from influence_core.launch import Launch
from influence_core.storage import differences
from influence_core.tasks.example import ExampleTask

RESULT = "half_precision.json"
OF_PRECISION = {"dtype", "factors", "scores"}  # settings in which the two may differ


def main(task_class: type[ExampleTask], description: str, argv: list[str] | None = None) -> None:
    """Compare the float32 and bfloat16 scores of a strategy."""
    run_script(lambda: _compare(task_class, parse(task_class, "half_precision_analysis", description, argv)))


def _compare(task_class: type[ExampleTask], arguments) -> None:
    if Launch.here().world_size > 1:
        raise UserError("half_precision_analysis.py is the work of one process: run it without torchrun")
    experiment = Experiment(task_class, arguments)
    (strategy,) = arguments.factor_strategy[:1]
    shown = check_query(arguments, len(experiment.query_dataset))
    suffix = f"_{arguments.scores_suffix}" if arguments.scores_suffix else ""
    pair = [f"{strategy}{suffix}", f"{strategy}_half{suffix}"]
    for name, flag in zip(pair, ("", " --use_half_precision")):
        if not (experiment.output_dir / f"scores_{name}").exists():
            flag += f" --scores_suffix {arguments.scores_suffix}" * bool(suffix)
            raise UserError(
                f"no scores {name!r} in {experiment.output_dir}: make them with "
                f"`python {experiment.task.name}/analyze.py --factor_strategy {strategy}{flag}`"
            )
    full, half = load_all_scores(pair, experiment).values()
    made_by = [{key: each.settings[key] for key in each.settings.keys() - OF_PRECISION} for each in (full, half)]
    differing = differences(*made_by)
    if differing:
        raise UserError(f"{pair[0]} and {pair[1]} differ by more than their precision: {differing}; analyze one again")
    experiment.require_writable()
    result = compare(full.matrix, half.matrix, shown)
    result |= {"strategy": strategy, "settings": {pair[0]: full.settings, pair[1]: half.settings}}
    write_json(experiment.output_dir / RESULT, result)
    print(
        f"{strategy}: mean Spearman over {len(result['per_query'])} queries of float32 and bfloat16 scores "
        f"{result['mean_spearman']:.4f} (min {min(result['per_query']):.4f})"
    )
    experiment.draw(RESULT, figures.draw_half_precision, "half_precision.png")


def compare(full: np.ndarray, half: np.ndarray, shown: int) -> dict:
    """Rank correlation of each query's scores, [queries, training examples] each, and one query's scores to draw."""
    correlations = [float(spearmanr(a, b).statistic) for a, b in zip(full, half)]
    return {
        "mean_spearman": float(np.mean(correlations)),
        "per_query": correlations,
        "shown_query": shown,
        "float32": full[shown].tolist(),
        "bfloat16": half[shown].tolist(),
    }
