"""The scores that an experiment evaluates: stored ones, by name or path, and a baseline that knows no model."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sparse
from safetensors import SafetensorError
from safetensors.numpy import load_file

from influence_core.errors import UserError
from influence_core.scores.pairwise import SCORES
from influence_core.storage import StageStore, dataset_fingerprint

TFIDF = "tfidf"
FILE = "pairwise_scores.safetensors"


def load_all_scores(names: Sequence[str] | None, experiment, baseline: bool = True) -> dict[str, np.ndarray]:
    """{name: [queries, training examples]} of the names given, or of all that --output_dir holds and the baseline.

    Raises:
        UserError: there are none, or they are of other data than the experiment's.
    """
    if names is None:
        found = sorted(experiment.output_dir.glob(f"scores_*/{FILE}"))
        names = [path.parent.name.removeprefix("scores_") for path in found]
        if not names:
            raise UserError(
                f"no scores in {experiment.output_dir}: make them with `python {experiment.task.name}/analyze.py "
                f"--checkpoint_dir {experiment.arguments.checkpoint_dir} --output_dir {experiment.output_dir}`, or "
                "name them with --scores"
            )
        names += [TFIDF] * baseline
    if len(set(names)) < len(names):
        raise UserError(f"--scores names one twice: {' '.join(names)}")
    return {Path(name).name: _load(name, experiment) for name in names}


def _load(name: str, experiment) -> np.ndarray:
    if name == TFIDF:
        texts = ([experiment.task.describe(x) for x in part] for part in experiment.datasets)
        return tfidf_scores(*texts)
    path = next((path for path in (experiment.output_dir / f"scores_{name}", Path(name)) if path.exists()), None)
    if path is None:
        stored = [path.name.removeprefix("scores_") for path in sorted(experiment.output_dir.glob("scores_*"))]
        there = f"there are {', '.join(stored)}" if stored else "there are none"
        raise UserError(f"no scores {name!r} in {experiment.output_dir} ({there}), and no such path")
    if (path / "pairwise_scores.json").exists():
        queries, train = map(dataset_fingerprint, experiment.datasets)
        store = StageStore(path, "pairwise_scores", {"train_dataset": train, "query_dataset": queries})
        scores = store.load()["pairwise_scores"][SCORES].numpy()
    else:  # made elsewhere
        file = path / FILE if path.is_dir() else path
        try:
            scores = load_file(file)[SCORES]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{file} can't be read as scores, a safetensors file with {SCORES!r} ({error})") from None
    expected = tuple(map(len, experiment.datasets))
    if scores.shape != expected:
        raise UserError(f"scores {name!r} are {scores.shape}, but there are {expected} queries and training examples")
    if not np.isfinite(scores).all():
        raise UserError(f"scores {name!r} hold numbers that are not finite")
    return scores


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
