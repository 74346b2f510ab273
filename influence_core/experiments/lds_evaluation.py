"""evaluate_lds.py of every example: retrain on random subsets, and see how well each kind of scores predicted it."""

import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from influence_core.errors import UserError, first_line
from influence_core.experiments import figures
from influence_core.experiments.arguments import check_query, parse
from influence_core.experiments.bank import Retraining
from influence_core.experiments.calibration import calibrate, calibration_lines
from influence_core.experiments.lds import (
    bootstrap,
    linear_datamodeling_scores,
    noise_ceiling,
    p_values,
    predicted_measurements,
    subset_masks,
)
from influence_core.experiments.retraining import Experiment
from influence_core.experiments.running import run_script
from influence_core.experiments.score_sources import load_all_scores
from influence_core.experiments.showing import describe_query
from influence_core.files import write_json
from influence_core.tasks.example import MEASUREMENT, ExampleTask

RESULT = "lds.json"


def main(task_class: type[ExampleTask], description: str, argv: list[str] | None = None) -> None:
    """Evaluate stored scores by the linear datamodeling score."""
    run_script(lambda: _evaluate(task_class, parse(task_class, "evaluate_lds", description, argv)))


def _evaluate(task_class: type[ExampleTask], arguments) -> None:
    experiment = Experiment(task_class, arguments)
    stored = load_all_scores(arguments.scores, experiment)
    scores = {name: each.matrix for name, each in stored.items()}
    shown = check_query(arguments, len(experiment.query_dataset))
    experiment.require_writable()
    masks, measurements = ground_truth(experiment)
    if not experiment.is_main:
        return
    try:
        result = evaluate(scores, masks, measurements)
        if arguments.choose:
            result["chosen"] = choose(scores, masks, measurements)
    except ValueError as error:
        raise UserError(f"there is no rank correlation: {error}") from None
    result["calibration"] = {
        name: calibrate(each.matrix, each.scale, masks, measurements.mean(1))
        for name, each in stored.items()
        if each.scale is not None
    }
    result["settings"] = experiment.settings | {"scores": {name: each.settings for name, each in stored.items()}}
    write_json(experiment.output_dir / RESULT, result)
    first = next(iter(scores))
    described = describe_query(
        experiment.task,
        torch.from_numpy(scores[first]),
        experiment.query_dataset,
        experiment.train_dataset,
        shown,
        first,
    )
    print(f"\n{described}\n{table(result)}\n")
    experiment.draw(RESULT, figures.draw_lds, "lds.png")
    if result["calibration"]:
        experiment.draw(RESULT, figures.draw_calibration, "calibration.png")


def ground_truth(experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Masks [subsets, training examples], measurements [subsets, repeats, queries]: from files, or from retraining."""
    arguments = experiment.arguments
    if bool(arguments.masks) != bool(arguments.measurements):
        raise UserError("--masks and --measurements go together: give both files, or neither to retrain")
    if arguments.masks:
        return read_ground_truth(arguments, *map(len, experiment.datasets))
    masks = subset_masks(len(experiment.train_dataset), arguments.num_masks, arguments.subset_fraction, arguments.seed)
    least = 4 if arguments.choose else 2
    if len(masks) < least:
        raise UserError(f"a rank correlation takes more subsets: --num_masks {least} at least, not {len(masks)}")
    if not 0 < masks[0].sum() < masks.shape[1]:
        raise UserError(f"--subset_fraction {arguments.subset_fraction} of {masks.shape[1]} keeps all or none")
    retrainings = [
        Retraining.of(mask, arguments.seed, number, repeat)
        for number, mask in enumerate(masks)
        for repeat in range(arguments.num_repeats)
    ]
    values = [each[MEASUREMENT].numpy() for each in experiment.retrain(retrainings)]
    return masks, np.stack(values).reshape(len(masks), arguments.num_repeats, -1)


def read_ground_truth(arguments, num_queries: int, num_train: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks and measurements made elsewhere; UserError if they do not fit the data."""
    masks, measurements = (
        read_array(Path(p), arguments.allow_pickle) for p in (arguments.masks, arguments.measurements)
    )
    if measurements.ndim == 2:
        measurements = measurements[:, None]
    if masks.ndim != 2 or masks.shape[1] != num_train or not np.isin(masks, (0, 1)).all():
        raise UserError(f"{arguments.masks} must be [subsets, {num_train}] of 0 and 1; it is {masks.shape}")
    if measurements.ndim != 3 or (len(measurements), measurements.shape[2]) != (len(masks), num_queries):
        raise UserError(
            f"{arguments.measurements} must be [{len(masks)}, {num_queries}] or [{len(masks)}, repeats, {num_queries}]"
            f", not {measurements.shape}"
        )
    if not measurements.size:
        raise UserError(f"{arguments.measurements} holds no numbers: {measurements.shape}")
    if not np.isfinite(measurements).all():
        raise UserError(f"{arguments.measurements} holds numbers that are not finite")
    return masks.astype(bool), measurements.astype(np.float64)


def read_array(path: Path, allow_pickle: bool) -> np.ndarray:
    """The one array in a .npy, .pt or .safetensors file."""
    if path.suffix not in (".npy", ".pt", ".pth", ".safetensors"):
        raise UserError(f"{path} is no .npy, .pt or .safetensors file")
    if not path.is_file():
        raise UserError(f"{path} is {'no file' if path.exists() else 'not there'}")
    try:
        if path.suffix == ".npy":
            value = np.load(path, allow_pickle=allow_pickle)
        elif path.suffix == ".safetensors":
            (value,) = load_file(path).values()
        else:
            value = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        value = torch.as_tensor(value)
        if value.is_complex():
            raise TypeError("it holds complex numbers")
        return value.double().numpy()
    except Exception as error:  # unpickling may raise anything
        is_pickle = isinstance(error, pickle.UnpicklingError) or "allow_pickle" in str(error)
        if is_pickle and not allow_pickle:
            raise UserError(
                f"{path} is a pickle, which may run any code; --allow_pickle reads one of your own"
            ) from None
        raise UserError(f"{path} can't be read as one array of numbers: {first_line(error)}") from None


def evaluate(scores: dict[str, np.ndarray], masks: np.ndarray, measurements: np.ndarray) -> dict:
    """All figures of the evaluation, as JSON values.

    Args:
        scores: {name: [queries, training examples]}; masks: [subsets, training examples];
        measurements: [subsets, repeats, queries].
    Raises:
        ValueError: as linear_datamodeling_scores.
    """
    outcomes = measurements.mean(1)
    lds = {name: linear_datamodeling_scores(masks, matrix, outcomes) for name, matrix in scores.items()}
    predictions = {name: predicted_measurements(masks, matrix) for name, matrix in scores.items()}
    samples = bootstrap(predictions, outcomes)
    ceiling = noise_ceiling(measurements)
    return {
        "num_subsets": len(masks),
        "num_repeats": measurements.shape[1],
        "num_queries": measurements.shape[2],
        "ceiling": None if ceiling is None else float(ceiling.mean()),
        "methods": {
            name: {
                "lds": float(values.mean()),
                "interval": _interval(samples[name]),
                "median": float(np.median(values)),
                "min": float(values.min()),
                "max": float(values.max()),
                "num_significant": int((p_values(predictions[name], outcomes) < 0.05).sum()),
                "per_query": values.tolist(),
            }
            for name, values in lds.items()
        },
        "differences": {
            f"{one} - {other}": {
                "lds": float((lds[one] - lds[other]).mean()),
                "interval": _interval(samples[one] - samples[other]),
            }
            for number, one in enumerate(lds)
            for other in list(lds)[number + 1 :]
        },
    }


def choose(scores: dict[str, np.ndarray], masks: np.ndarray, measurements: np.ndarray) -> dict:
    """The best scores by the subsets of even number, and what the others say of every kind of scores."""
    outcomes = measurements.mean(1)
    halves = [
        {name: float(linear_datamodeling_scores(masks[part], matrix, outcomes[part]).mean())
         for name, matrix in scores.items()}
        for part in (slice(0, None, 2), slice(1, None, 2))
    ]  # fmt: skip
    best = max(halves[0], key=halves[0].get)
    return {"best": best, "chosen_on": halves[0], "reported_on": halves[1]}


def table(result: dict) -> str:
    """The evaluation as a person reads it."""
    width = max(map(len, ("method", *result["methods"])))
    lines = [
        f"Linear datamodeling score over {result['num_queries']} queries, {result['num_subsets']} subsets x "
        f"{result['num_repeats']} retrainings",
        f"{'method':<{width}} {'mean':>7} {'95 % interval':>17} {'median':>7} {'min':>7} {'max':>7} {'p < .05':>8}",
    ]
    for name, row in sorted(result["methods"].items(), key=lambda item: -item[1]["lds"]):
        low, high = row["interval"]
        lines.append(
            f"{name:<{width}} {row['lds']:>7.3f} [{low:>7.3f},{high:>7.3f}] {row['median']:>7.3f} {row['min']:>7.3f} "
            f"{row['max']:>7.3f} {row['num_significant']:>8}"
        )
    if result["ceiling"] is None:
        lines.append("No noise ceiling: it takes two retrainings of each subset at least (--num_repeats 2)")
    else:
        lines.append(f"Noise ceiling, what a perfect prediction would score: {result['ceiling']:.3f}")
    if result["differences"]:
        lines.append("Differences (paired bootstrap):")
        for name, row in result["differences"].items():
            lines.append(f"  {name}: {row['lds']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]")
    lines += calibration_lines(result.get("calibration", {}))
    if "chosen" in result:
        chosen = result["chosen"]
        lines.append(f"Chosen on the even subsets: {chosen['best']}. Mean LDS on the even and on the odd subsets:")
        for name, value in chosen["chosen_on"].items():
            lines.append(f"  {name:<{width}} {value:.3f} {chosen['reported_on'][name]:.3f}")
    return "\n".join(lines)


def _interval(samples: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(samples, (0.025, 0.975))]
