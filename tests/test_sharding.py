"""Parameters sharded over processes (Gloo on the CPU): the same scores and factors as of one process.

A job runs in real processes that join a group, each with its part of every parameter.
"""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from influence_core import analysis
from influence_core.analysis import analyze, explain
from influence_core.errors import UserError
from influence_core.exchange import rounds, share_out
from influence_core.layers import find_tracked_layers, trackable_layer_names
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.scores import cost
from influence_core.scores.parts import shown_pairs
from influence_core.sharding import is_sharded, local, process_mesh, shard_model
from influence_core.study import Study
from influence_core.tasks.models import checkpoint_model
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


def scores_of(case, directory, runtime, num_train=None, num_queries=None, **options):
    """{strategy: scores} of a case's model, sharded where the runtime says so."""
    make_task, auto_model, config, changes, kinds = CASES[case]
    task = make_task()
    task.tracked_kinds = kinds
    model = make_model(auto_model, config, **changes).to(runtime.precision.sum_dtype)
    if runtime.sharded:
        shard_model(model, process_mesh("cpu"))
    train, queries = task.load_dataset("train")[:num_train], task.load_dataset("validation")[:num_queries]
    study = Study(task, model, train, directory, runtime)
    scores = analyze(study, STRATEGIES, queries, damping=DAMPING, **SIZES, **options)
    assert all(is_sharded([parameter]) == runtime.sharded for parameter in model.parameters())  # at rest again
    return scores


def all_cases(directory, runtime):
    """{case: scores}: of every model; with fewer examples than processes, in several passes, in bfloat16."""
    runtime = replace(runtime, sharded=runtime.world_size > 1)
    scores = {case: scores_of(case, directory / case, runtime) for case in CASES}
    scores["few"] = scores_of("tied head", directory / "few", runtime, num_train=2, num_queries=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "used_memory", lambda self: 0)
        patch.setattr(cost, "CHUNK_BYTES", {"cpu": 0})  # the logits' share would dwarf this model
        scores["passes"] = scores_of("untied head", directory / "passes", runtime, memory_budget=120_000)
    half = replace(runtime, precision=HALF)
    scores["half"] = scores_of("untied head", directory / "half", half)
    return scores


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    directory = tmp_path_factory.mktemp("single")
    return directory, all_cases(directory, Runtime(precision=FLOAT64, seed=SEED))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_gives_what_one_process_gives(tmp_path, single, world_size):
    """Scores of four strategies on every process, and covariances and Lambda of "ekfac" as they are stored."""
    returned = run_processes(all_cases, world_size, tmp_path)
    for case in single[1]:
        for scores in returned:
            for strategy in STRATEGIES:
                error = relative_error(scores[case][strategy], single[1][case][strategy])
                assert error < (2e-2 if case == "half" else 1e-8), (case, strategy)
    for case in CASES:
        for stem in ("activation_covariance", "gradient_covariance"):
            expected = load(single[0] / case / "factors_ekfac", stem)
            stored = load(tmp_path / case / "factors_ekfac", stem)
            assert stored.keys() == expected.keys()
            for name in expected:
                assert relative_error(stored[name], expected[name]) < 1e-10


def replicated(directory, runtime):
    """(scores of a stored model that two of four processes have together, the share of it that each has)"""
    mesh, several = None, runtime.world_size > 1
    if several:
        with pytest.raises(UserError, match="fsdp_shards 3: 4 processes"):
            process_mesh("cpu", 3)
        mesh = process_mesh("cpu", 2)
    model = checkpoint_model(hf.AutoModelForCausalLM, str(directory / "model"), lambda *_: None, mesh)
    runtime = Runtime(seed=SEED, rank=runtime.rank, world_size=runtime.world_size, sharded=several)
    task = RandomCausal()
    study = Study(task, model, task.load_dataset("train"), directory / str(runtime.world_size), runtime)
    scores = analyze(study, STRATEGIES, task.load_dataset("validation"), damping=DAMPING, **SIZES)
    return scores, sum(local(x).numel() for x in model.parameters()) / sum(x.numel() for x in model.parameters())


@pytest.mark.slow
def test_parts_of_parameters_are_replicated(tmp_path):
    """Two rows of two processes: as of one process, each with half of the model."""
    make_model(hf.AutoModelForCausalLM, CAUSAL["Llama"]).float().save_pretrained(tmp_path / "model")
    expected, share = replicated(tmp_path, Runtime())
    assert share == 1
    for scores, share in run_processes(replicated, 4, tmp_path):
        assert 0.4 < share < 0.6
        for strategy in STRATEGIES:
            assert relative_error(scores[strategy], expected[strategy]) < 1e-4


def looked_into(directory, runtime):
    """{case: {name: numbers}}: self-influence, parts of scores, and those of the sum of the queries."""
    runtime, found = replace(runtime, sharded=runtime.world_size > 1), {}
    for case in ("tied head", "two streams"):
        for sum_queries in (False, True):
            make_task, auto_model, config, changes, kinds = CASES[case]
            task = make_task()
            task.tracked_kinds = kinds
            model = make_model(auto_model, config, **changes).to(torch.float64)
            if runtime.sharded:
                shard_model(model, process_mesh("cpu"))
            queries, place = task.load_dataset("validation"), directory / f"{case} {sum_queries}"
            study = Study(task, model, task.load_dataset("train"), place, runtime, sum_queries=sum_queries)
            scores = analyze(study, STRATEGIES, queries, damping=DAMPING, self_influence=True, **SIZES)
            pairs = {name: shown_pairs(scores[name], 3, 2) for name in ("ekfac", "diagonal")}
            sizes = {key: value for key, value in SIZES.items() if key != "factor_batch_size"}
            parts = explain(study, pairs, queries, DAMPING, **sizes)
            of_parts = {f"{name} {key}": x for name, each in parts.items() for key, x in each.tensors().items()}
            files = {name: place / f"scores_{name}" / "self_influence.safetensors" for name in STRATEGIES}
            of_self = {f"{name} self": load_file(file)["all_modules"] for name, file in files.items()}
            found[case, sum_queries] = {**scores, **of_parts, **of_self}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_sharded_scores_are_made_of(tmp_path, world_size):
    """Self-influence, parts by layer and token, and scores of the queries' sum: as of one process."""
    expected = looked_into(tmp_path / "one", Runtime(precision=FLOAT64, seed=SEED))
    (tmp_path / "several").mkdir()
    for found in run_processes(looked_into, world_size, tmp_path / "several"):
        assert found.keys() == expected.keys()
        for case, tensors in expected.items():
            for name, tensor in tensors.items():
                assert relative_error(found[case][name], tensor) < 1e-8, (case, name)


class Stopped(Exception):
    """As if the job had been killed."""


class StoppingTask(RandomCausal):
    """Counts the training losses of more than one example, and stops in place of the one after `stop_after`."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after, self.num_losses = stop_after, 0

    def train_loss(self, model, batch, sample_labels=None):
        if len(set(batch["example_index"].tolist())) > 1:
            if self.num_losses == self.stop_after:
                raise Stopped
            self.num_losses += 1
        return super().train_loss(model, batch, sample_labels)

    def measurement(self, model, batch):
        return super().train_loss(model, batch)  # not counted: a process may have but one query


def stopped_and_started_again(directory, runtime):
    """[(losses of both runs, scores)] where nothing, and where each of several losses is the last."""
    runtime, results = replace(runtime, sharded=True), []

    def run(task, number):
        model = make_model(hf.AutoModelForCausalLM, CAUSAL["GPT-2"])
        shard_model(model, process_mesh("cpu"))
        place = directory / str(number)
        study = Study(task, model, task.load_dataset("train"), place, runtime, progress_interval=0.0)
        return analyze(study, ["ekfac"], task.load_dataset("validation"), damping=DAMPING, **SIZES)["ekfac"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "check_contract", lambda *_: "not at all")
        for number, stop in enumerate([None, 1, 3, 5]):
            first, second = StoppingTask(stop), StoppingTask()
            try:
                scores = run(first, number)
            except Stopped:
                if number == 1 and runtime.is_main:  # processes do not note their progress at the same time
                    for path in (directory / "1").rglob("*.progress.0.safetensors"):
                        path.unlink()
                runtime.barrier()
                scores = run(second, number)
            results.append((first.num_losses + second.num_losses, scores))
    return results


@pytest.mark.slow
def test_a_stopped_job_goes_on_though_its_processes_had_done_unequal_parts(tmp_path):
    """Stopped in each stage and started again: the very scores of a job that was not, and no more passes run again than
    the process with the least has to, and than waited to be scored together."""
    for results in run_processes(stopped_and_started_again, 2, tmp_path):
        (whole_losses, expected), *others = results
        for number, (losses, scores) in enumerate(others, 1):
            assert torch.equal(scores, expected), number
            assert losses == whole_losses + (number in (1, 3)), number


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7, 50])
def test_layers_and_batches_are_shared_out(num_processes):
    """Each layer has one owner, runs of layers are about even; each example is in one batch, of the allowed size."""
    model = make_model(hf.AutoModelForCausalLM, CAUSAL["GPT-2"])
    layers = find_tracked_layers(model, trackable_layer_names(model)[:-1])
    shares = share_out(layers, num_processes)
    assert len(shares) == num_processes and [layer for share in shares for layer in share] == layers
    for num_examples in (1, 5, 40):
        batches = [batch for each in rounds(num_examples, 4, num_processes) for batch in each]
        assert [index for batch in batches for index in batch] == list(range(num_examples))
        assert max(map(len, batches)) <= 4 and len(batches) % num_processes == 0
