"""Largest relative error of each stage and strategy against tests/reference.py (float64), as a table.

python -m tests.benchmarks.exactness_table
"""

import tempfile
from pathlib import Path

import torch

from influence_core.factors.strategies import STRATEGIES
from influence_core.precision import Precision
from tests import reference
from tests.test_exactness import FLOAT64, Reference, load, relative_error, run


def factor_errors(directory: Path, truth: Reference) -> dict[str, float]:
    """Largest error over layers of each factor; eigendecompositions recomposed, Lambda in the eigenbasis stored."""
    errors: dict[str, float] = {}

    def note(name, actual, expected):
        errors[name] = max(errors.get(name, 0.0), relative_error(actual, expected))

    for name in truth.task.layers:
        gradients = truth.gradients(name, truth.fisher_losses())
        vectors = {}
        for kind, expected in zip(("activation", "gradient"), truth.covariances(name)):
            note(f"{kind} covariance", load(directory / "factors_ekfac", f"{kind}_covariance")[name], expected)
            values = load(directory / "factors_ekfac", f"{kind}_eigenvalues")[name].double()
            vectors[kind] = load(directory / "factors_ekfac", f"{kind}_eigenvectors")[name].double()
            note(f"{kind} eigendecomposition", vectors[kind] @ values.diag() @ vectors[kind].T, expected)
        basis = torch.kron(vectors["gradient"], vectors["activation"])
        expected = torch.diag(basis.T @ reference.fisher(gradients) @ basis)
        note("lambda", load(directory / "factors_ekfac", "lambda_matrix")[name].flatten(), expected)
        note("diagonal", load(directory / "factors_diagonal", "lambda_matrix")[name], gradients.square().mean(0))
    return errors


def main():
    columns = {}
    for label, precision in (("float64", FLOAT64), ("float32", Precision())):
        with tempfile.TemporaryDirectory() as directory:
            truth = Reference()
            _, scores = run(Path(directory), list(STRATEGIES), truth, precision)
            columns[label] = factor_errors(Path(directory), truth)
            for name, matrix in scores.items():
                columns[label][f"scores, {name}"] = relative_error(matrix, truth.scores(name))
    print(f"{'':<30}" + "".join(f"{label:>12}" for label in columns))
    for row in next(iter(columns.values())):
        print(f"{row:<30}" + "".join(f"{errors[row]:>12.1e}" for errors in columns.values()))


if __name__ == "__main__":
    main()
