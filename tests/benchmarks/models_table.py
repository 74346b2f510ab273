"""The table of models in the README: how far scores are from those of single, unpadded examples by plain autograd.

    python -m tests.benchmarks.models_table

Tiny random models in float64, everything tracked that is tracked by default, batches padded; EKFAC against the dense
reference. It takes some minutes; tests/test_any_model.py asserts the same.
"""

import contextlib
import io
import tempfile

from influence_core.runtime import Runtime
from influence_core.study import Study
from tests.studies import score
from tests.test_any_model import CASES, build, dense_scores
from tests.test_exactness import FLOAT64, SEED, relative_error


def main():
    print("| task | model | layers | identity | ekfac | float32 inside |\n|---|---|---|---|---|---|")
    for case in CASES:
        name, task, model, is_partly_float32 = build(case)
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            study = Study(task, model, task.load_dataset("train"), directory, Runtime(precision=FLOAT64, seed=SEED))
            with contextlib.redirect_stderr(io.StringIO()):
                scores = score(study, ["identity", "ekfac"], query_batch_size=2, train_batch_size=7)
        expected = dense_scores(task, model, study.layers)
        errors = [f"{relative_error(scores[key], expected[key]):.0e}" for key in ("identity", "ekfac")]
        cells = [case[0].kind, name, len(study.layers), *errors, "yes" * is_partly_float32]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
