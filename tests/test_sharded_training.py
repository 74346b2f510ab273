"""Training sharded parameters, as a person launches it: the weights and metrics of whole models, but for rounding."""

import re

import pytest
import torch
from safetensors.torch import load_file

from swag_roberta.task import SwagTask
from tests.scripts import run, run_process
from tests.test_adapter_scripts import SIZES, make_bases
from tests.test_torchrun import NUM_TRAIN, TORCHRUN, train_flags
from wikitext_gpt2.task import WikiTextTask

HOLDS_ALL = "can't be read in parts"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def train_both(example, flags, directory):
    """Train in two processes with whole models, and sharded, to directories of these names; what the latter printed."""
    printed = {
        name: run_process([*TORCHRUN, f"{example}/train.py", *flags, directory / name, *how]).ok()
        for name, how in (("whole", []), ("sharded", ["--use_fsdp"]))
    }
    metrics = [
        re.findall(r" (\d[\d.e+-]*)(?=,|$)", printed[name].split("Checkpoint:")[1], re.MULTILINE) for name in printed
    ]
    assert [float(value) for value in metrics[0]] == pytest.approx([float(value) for value in metrics[1]], rel=1e-2)
    return printed["sharded"]


def assert_same_weights(directory, file):
    whole, sharded = (load_file(directory / name / file) for name in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    largest = max(float(tensor.abs().max()) for tensor in whole.values())
    assert max(float((whole[key] - sharded[key]).abs().max()) for key in whole) < 1e-3 * largest


@pytest.mark.slow
@pytest.mark.parametrize("example", ["wikitext_gpt2", "dailymail_t5"])  # which also writes texts
def test_a_sharded_training_is_that_of_whole_models(example, tmp_path):
    """The weights and the metrics of two processes that each have a whole model, but for rounding."""
    flags = [*train_flags(example), "--save_at", "0.5", "--checkpoint_dir"]
    train_both(example, flags, tmp_path)
    (step,) = (tmp_path / "whole").glob("step-*")
    assert_same_weights(tmp_path, f"{step.name}/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("task_class, lora, reads_parts", [
    (WikiTextTask, [], True),
    (WikiTextTask, ["--lora_rank", "2"], True),
    (SwagTask, ["--lora_rank", "2"], False),  # its classifier is new
])  # fmt: skip
def test_a_sharded_training_from_stored_weights(task_class, lora, reads_parts, bases, tmp_path):
    """Each process reads its part of them, and has a whole adapter beside it: of the mean of all gradients."""
    flags = ["--preset", "demo", "--model_name_or_path", bases[task_class], "--config_overrides", "", *lora]
    flags += [*SIZES[task_class], "--num_train", NUM_TRAIN, "--num_train_epochs", "2", "--learning_rate", "1e-3"]
    printed = train_both(task_class.name, [*flags, "--checkpoint_dir"], tmp_path)
    assert (HOLDS_ALL in printed) != reads_parts
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert_same_weights(tmp_path, weights)


@pytest.mark.slow
def test_sharded_retrainings_are_those_of_one_process(tmp_path):
    """All processes make each retraining together; of full batches with the numbers of one process."""
    place = ["--preset", "demo", "--checkpoint_dir", tmp_path / "checkpoint", "--output_dir", tmp_path / "results"]
    run("train", *train_flags("wikitext_gpt2"), "--num_train", "64", *place[:4]).ok()
    run("analyze", *place, "--num_queries", "5", "--factor_strategy", "identity").ok()
    flags = [*place, "--num_queries", "5", "--num_masks", "3", "--num_repeats", "1", "--figure_dir", tmp_path]
    values = []
    for name, launcher, how in (("one", [], []), ("sharded", TORCHRUN, ["--use_fsdp"])):
        bank = tmp_path / name
        run_process([*launcher, "wikitext_gpt2/evaluate_lds.py", *flags, "--bank_dir", bank, *how]).ok()
        values.append({path.name: load_file(path) for path in bank.glob("*.safetensors")})
    assert values[0].keys() == values[1].keys() and len(values[0]) == 3
    for name, expected in values[0].items():
        torch.testing.assert_close(values[1][name], expected, rtol=2e-3, atol=0)  # AdamW divides by what rounds
