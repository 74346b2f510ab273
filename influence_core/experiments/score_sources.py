"""The scores that an experiment evaluates: stored ones, by name or path, and a baseline that knows no model."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
from safetensors import SafetensorError
from safetensors.torch import load_file

from influence_core.errors import UserError
from influence_core.fingerprints import dataset_fingerprint
from influence_core.scores.stored import OWN_QUERIES, SCORES, SUM_QUERIES
from influence_core.storage import StageStore, differences

TFIDF = "tfidf"
FILE = "pairwise_scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """Pairwise scores, and what made them (empty where that is not known)."""

    matrix: np.ndarray  # [queries, training examples]; of a sum [1, training examples]
    settings: dict[str, Any]
    scale: float | None = None  # score / scale: the predicted change of leaving the example out; None: ranks alone


def load_all_scores(
    names: Sequence[str] | None, experiment, baseline: bool = True, num_summed: int | None = None
) -> dict[str, Scores]:
    """{name: scores} of the names given, or of all that --output_dir holds for these queries, and the baseline.

    Args:
        num_summed: sums of the first so many queries may be named as well; None: a row of each query is needed.
    Raises:
        UserError: there are none, or they are of another model or other data than the experiment's.
    """
    if names is None:
        found = sorted(path.parent for path in experiment.output_dir.glob(f"scores_*/{FILE}"))
        names = [path.name.removeprefix("scores_") for path in found if not is_for_itself(path)]
        names.sort(key=lambda name: (not name.startswith("ekfac"), name))  # the first one's top sequence is shown
        if not names:
            others = ", ".join(path.name.removeprefix("scores_") for path in found)
            but = f" but sums or those of your own queries ({others})" if others else ""
            raise UserError(
                f"no scores in {experiment.output_dir}{but}: make them with `python {experiment.task.name}/analyze.py "
                f"--checkpoint_dir {experiment.arguments.checkpoint_dir} --output_dir {experiment.output_dir}`, or "
                "name them with --scores"
            )
        names += [TFIDF] * baseline
    if len(set(names)) < len(names):
        raise UserError(f"--scores names one twice: {' '.join(names)}")
    labels = [Path(name).name.removeprefix("scores_") for name in names]
    if len(set(labels)) < len(labels):
        labels = [str(Path(name).parent / label) for name, label in zip(names, labels)]
    return {label: _load(name, experiment, num_summed) for label, name in zip(labels, names)}


def is_for_itself(directory: Path) -> bool:
    """Whether scores are of the user's own queries, or of a sum: such are taken only where they are named."""
    store = StageStore(directory, "pairwise_scores", {})
    settings = store.manifest()["settings"] if store.manifest_path.exists() else {}
    return bool(settings.get(OWN_QUERIES) or settings.get(SUM_QUERIES))


def directory_of(name: str, output_dir: Path) -> Path | None:
    """Where scores lie that --scores names: in the output directory, or at a path; None: nowhere."""
    stored = output_dir / Path(name).parent / f"scores_{Path(name).name}"  # step-12/ekfac: a checkpoint's
    return next((path for path in (stored, Path(name)) if path.exists()), None)


def _load(name: str, experiment, num_summed: int | None) -> Scores:
    if name == TFIDF:
        texts = ([experiment.task.describe(x) for x in part] for part in experiment.datasets)
        return Scores(tfidf_scores(*texts), {})
    path = directory_of(name, experiment.output_dir)
    if path is None:
        stored = [path.name.removeprefix("scores_") for path in sorted(experiment.output_dir.glob("scores_*"))]
        there = f"there are {', '.join(stored)}" if stored else "there are none"
        raise UserError(f"no scores {name!r} in {experiment.output_dir} ({there}), and no such path")
    if (path / "pairwise_scores.json").exists():
        scores = _load_own(name, path, experiment, num_summed)
    else:  # made elsewhere
        file = path / FILE if path.is_dir() else path
        try:
            if not file.is_file():
                raise OSError("it is no file")
            matrix = load_file(file)[SCORES]
            if not matrix.is_floating_point():
                raise TypeError(f"its numbers are {str(matrix.dtype).removeprefix('torch.')}")
            scores = Scores(matrix.float().numpy(), {})
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"{file} can't be read as scores, a safetensors file with {SCORES!r} ({error})") from None
    if not scores.settings.get(SUM_QUERIES):
        _check_shape(name, scores.matrix.shape, experiment)
    if not np.isfinite(scores.matrix).all():
        raise UserError(f"scores {name!r} hold numbers that are not finite")
    return scores


def _load_own(name: str, path: Path, experiment, num_summed: int | None) -> Scores:
    """What analyze.py stored, of this checkpoint and these data."""
    store = StageStore(path, "pairwise_scores", {})
    manifest = store.manifest()
    settings = manifest["settings"]
    queries, train = experiment.dataset_fingerprints
    if settings.get(OWN_QUERIES):
        raise UserError(
            f"scores {name!r} are of queries of your own (--query_text, --query_file), and here those of "
            "the validation set count; analyze.py --report with the same queries writes their page"
        )
    if settings.get(SUM_QUERIES):
        queries = _fingerprint_of_summed(name, settings, experiment, num_summed)
    else:
        _check_shape(name, (settings["num_queries"], settings["num_train"]), experiment)
    expected = {"model": experiment.checkpoint_fingerprint, "train_dataset": train, "query_dataset": queries}
    if settings["model"] != expected["model"] and settings["model"] in experiment.step_fingerprints:
        expected["model"] = settings["model"]
        if experiment.is_main:
            print(f"Note: scores {name!r} are of a checkpoint on the way, and retraining goes to the end", flush=True)
    differing = differences(settings, expected)
    if differing:
        raise UserError(
            f"scores {name!r} in {path} are not of the checkpoint {experiment.arguments.checkpoint_dir} and its data: "
            f"{differing}; run analyze.py on it again with --overwrite, or name another --checkpoint_dir or "
            "--output_dir"
        )
    matrix = store.load()["pairwise_scores"][SCORES].numpy()
    return Scores(matrix, settings, manifest["counts"].get("scale"))


def _fingerprint_of_summed(name: str, settings: dict[str, Any], experiment, num_summed: int | None) -> str:
    """Of the queries that a sum has to be of."""
    if num_summed is None:
        raise UserError(f"scores {name!r} are of the sum of all queries (--sum_queries), and here each query has its "
                        "own: only run_counterfactual.py takes a sum; analyze.py --sum_queries --report writes its "
                        "page")  # fmt: skip
    if settings["num_queries"] != num_summed:
        raise UserError(
            f"scores {name!r} are of the sum of {settings['num_queries']} queries, and here the first {num_summed} "
            f"count: give --num_counterfactual_queries {settings['num_queries']}, or run analyze.py --sum_queries with "
            f"--num_queries {num_summed}"
        )
    return dataset_fingerprint(experiment.query_dataset[:num_summed])


def _check_shape(name: str, shape: Sequence[int], experiment) -> None:
    expected = tuple(map(len, experiment.datasets))
    if len(shape) != 2:
        raise UserError(f"scores {name!r} have {len(shape)} dimensions in place of [queries, training examples]")
    if tuple(shape) != expected:
        raise UserError(
            f"scores {name!r} are of {shape[0]} queries and {shape[1]} training examples, and here are {expected[0]} "
            f"and {expected[1]}: give --num_queries and --num_train as analyze.py had them"
        )


def tfidf_scores(queries: Sequence[str], train: Sequence[str]) -> np.ndarray:
    """[queries, training examples]: cosine of the words' TF-IDF, count x log(N / documents with the word)."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in (*queries, *train)]
    vocabulary = {word: column for column, word in enumerate(sorted(set().union(*counts)))}
    rows = np.repeat(np.arange(len(counts)), [len(count) for count in counts])
    columns = [vocabulary[word] for count in counts for word in count]
    values = [float(number) for count in counts for number in count.values()]
    matrix = sparse.csr_array((values, (rows, columns)), shape=(len(counts), len(vocabulary)))
    matrix = matrix * np.log(len(counts) / np.bincount(columns, minlength=len(vocabulary)))
    norms = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    matrix = sparse.csr_array(matrix).multiply(1 / np.maximum(norms, 1e-12)[:, None]).tocsr()
    return (matrix[: len(queries)] @ matrix[len(queries) :].T).toarray()
