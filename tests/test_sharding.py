"""Parameters sharded over processes (Gloo on the CPU): the same scores and factors as of one process.

A job runs in real processes that join a group, each with its part of every parameter.
"""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from influence_core.analysis import analyze
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.sharding import is_sharded, shard_model
from influence_core.study import Study
from tests.models import CAUSAL, ENCODER_DECODERS, ENCODERS, RandomCausal, RandomClasses, RandomPairs, make_model
from tests.studies import STRATEGIES
from tests.test_exactness import DAMPING, FLOAT64, SEED, load, relative_error
from tests.test_processes import run_processes

HALF = Precision(torch.bfloat16, torch.float32, emulated=True)
UNTIED, CLASSES = {"tie_word_embeddings": False}, {"num_labels": 3, "pad_token_id": 1}

# name: (task, auto model, config, changes, kinds of parameters that are tracked)
CASES = {
    "tied head": (RandomCausal, hf.AutoModelForCausalLM, CAUSAL["GPT-2"], {}, "all"),
    "untied head": (RandomCausal, hf.AutoModelForCausalLM, CAUSAL["Llama"], UNTIED, "all"),
    "blocks, padded": (RandomClasses, hf.AutoModelForSequenceClassification, ENCODERS["RoBERTa"], CLASSES, "blocks"),
    "two streams": (RandomPairs, hf.AutoModelForSeq2SeqLM, ENCODER_DECODERS["T5"], {}, "all"),
}
SIZES = {"query_batch_size": 2, "train_batch_size": 3, "factor_batch_size": 4}


def scores_of(case, directory, runtime, num_train=None, **options):
    """{strategy: scores} of a case's model, sharded where the runtime says so."""
    make_task, auto_model, config, changes, kinds = CASES[case]
    task = make_task()
    task.tracked_kinds = kinds
    model = make_model(auto_model, config, **changes).to(runtime.precision.sum_dtype)
    if runtime.sharded:
        shard_model(model, runtime.device)
    train, queries = task.load_dataset("train")[:num_train], task.load_dataset("validation")
    study = Study(task, model, train, directory, runtime, **options)
    scores = analyze(study, STRATEGIES, queries, damping=DAMPING, **SIZES)
    assert is_sharded(model.parameters()) == runtime.sharded  # all at rest again
    return scores


def all_cases(directory, runtime):
    runtime = replace(runtime, sharded=runtime.world_size > 1)
    return {case: scores_of(case, directory / case, runtime) for case in CASES}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    directory = tmp_path_factory.mktemp("single")
    return directory, all_cases(directory, Runtime(precision=FLOAT64, seed=SEED))


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_gives_what_one_process_gives(tmp_path, single, world_size):
    """Scores of four strategies on every process, and covariances and Lambda of "ekfac" as they are stored."""
    returned = run_processes(all_cases, world_size, tmp_path)
    for case in CASES:
        for scores in returned:
            for strategy in STRATEGIES:
                error = relative_error(scores[case][strategy], single[1][case][strategy])
                assert error < 1e-8, (case, strategy)
        for stem in ("activation_covariance", "gradient_covariance"):
            expected = load(single[0] / case / "factors_ekfac", stem)
            stored = load(tmp_path / case / "factors_ekfac", stem)
            assert stored.keys() == expected.keys()
            for name in expected:
                assert relative_error(stored[name], expected[name]) < 1e-10
