"""Parameters that training leaves as they are: not moved, not tracked, in no bank of a training that moves them."""

import re

import pytest
import torch
from safetensors.torch import load_file

from tests.scripts import NUMBERS, TRAIN, run

FROZEN = ["--frozen_parameters", "wte|wpe"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the model before training, after it with frozen embeddings)."""
    directory = tmp_path_factory.mktemp("frozen")
    start, tuned = directory / "start", directory / "tuned"
    run("train", *TRAIN, "--checkpoint_dir", start).ok()
    flags = ["--preset", "demo", "--model_name_or_path", start, "--block_size", "32", "--num_train", "64"]
    out = run("train", *flags, *FROZEN, "--num_train_epochs", "1", "--checkpoint_dir", tuned).ok()
    assert re.search(r"^[\d,]+ of [\d,]+ parameters", out, re.M)
    return start, tuned


def test_training_leaves_them_as_they_are(trained):
    before, after = (load_file(directory / "model.safetensors") for directory in trained)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_they_are_not_tracked_though_all_is(trained, tmp_path):
    """What training did not move can't carry influence: the table is left out, as is the head that is tied to it."""
    flags = [*NUMBERS, "--checkpoint_dir", trained[1], "--output_dir", tmp_path, "--factor_strategy", "ekfac"]
    out = run("analyze", *flags, "--track", "all").ok()
    assert "100.0% of the trained" in out and "left out: frozen" in out
    factors = load_file(tmp_path / "factors_ekfac" / "lambda_matrix.safetensors")
    assert not any("wte" in name or "wpe" in name for name in factors)


def test_a_bank_knows_what_was_frozen(trained, tmp_path):
    common = [*NUMBERS, "--checkpoint_dir", trained[1], "--output_dir", tmp_path]
    sizes = ["--num_masks", "4", "--num_repeats", "1", "--figure_dir", tmp_path]
    run("analyze", *common, "--factor_strategy", "identity").ok()
    run("evaluate_lds", *common, *sizes).ok()
    others = ["--frozen_parameters", "ln_f", "--scores", "tfidf"]
    run("evaluate_lds", *common, *sizes, *others).error("frozen_parameters")


@pytest.mark.parametrize("pattern, message", [
    ("word_embeddings", "is found in no name of a parameter; transformer.wte.weight"),
    (".", "is found in all names of parameters"),
    ("(", "is no regular expression"),
])  # fmt: skip
def test_patterns_that_cannot_be_meant_are_refused(pattern, message, tmp_path):
    run("train", *TRAIN, "--frozen_parameters", pattern, "--checkpoint_dir", tmp_path / "new").error(message)
    assert not (tmp_path / "new").exists()
