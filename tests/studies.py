"""Studies of the tiny task that the tests share, and what they leave on disk."""

import torch

from influence_core.analysis import analyze
from influence_core.runtime import Runtime
from influence_core.study import Study
from tests.test_exactness import DAMPING, FLOAT64, SEED, load
from tests.tiny import TinyTask

STRATEGIES = ("identity", "diagonal", "kfac", "ekfac")
BATCH_SIZES = {"query_batch_size": 4, "train_batch_size": 7, "factor_batch_size": 6}


def make_study(directory, task=None, precision=FLOAT64, num_train=None, shared=False, runtime=None, **options):
    """A study of the tiny task (or of one derived from it), in float64 unless told otherwise."""
    task = task or TinyTask()
    runtime = runtime or Runtime(precision=precision, seed=SEED)
    model = task.load_model(shared=shared).to(runtime.precision.sum_dtype)
    return Study(task, model, task.load_dataset("train")[:num_train], directory, runtime, **options)


def score(study, strategies=STRATEGIES, num_queries=None, **options):
    """{strategy: [queries, train]} by the core."""
    queries = study.task.load_dataset("validation")[:num_queries]
    return analyze(study, strategies, queries, **{"damping": DAMPING, **BATCH_SIZES, **options})


def score_tiny(directory, task=None, strategies=STRATEGIES, **options):
    """The scores of a new study of the tiny task."""
    return score(make_study(directory, task), strategies, **options)


def recomposed_factors(directory, layers=("first", "second", "third")):
    """What the factors of "ekfac" and "diagonal" mean, without the arbitrary sign or order of an eigenvector.

    Returns:
        {"<kind>.<layer>": tensor}: covariances as stored, Q w Q^T, Q Lambda Q^T as a full matrix, the diagonal.
    """
    stored = {path.stem: load(directory / "factors_ekfac", path.stem) for path in _files(directory / "factors_ekfac")}
    diagonal = load(directory / "factors_diagonal", "lambda_matrix")
    factors = {}
    for layer in layers:
        for kind in ("activation", "gradient"):
            values, vectors = stored[f"{kind}_eigenvalues"][layer], stored[f"{kind}_eigenvectors"][layer]
            factors[f"{kind}_covariance.{layer}"] = stored[f"{kind}_covariance"][layer]
            factors[f"{kind}_recomposed.{layer}"] = vectors @ values.diag() @ vectors.T
        factors[f"ekfac.{layer}"] = ekfac_fisher(stored, layer)
        factors[f"diagonal.{layer}"] = diagonal[layer]
    return factors


def ekfac_fisher(stored, layer):
    """Q diag(Lambda) Q^T, [out * in(+1), out * in(+1)], of stored factors."""
    basis = torch.kron(stored["gradient_eigenvectors"][layer], stored["activation_eigenvectors"][layer])
    return basis @ stored["lambda_matrix"][layer].flatten().diag() @ basis.T


def _files(directory):
    return sorted(directory.glob("*.safetensors"))
