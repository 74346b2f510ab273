"""Bad input ends a script with exit code 2 and one line that says what is wrong and what to do, and leaves nothing."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from influence_core.analysis import analyze
from influence_core.errors import UserError
from influence_core.runtime import Runtime
from influence_core.scores.pairwise import compute_pairwise_scores
from influence_core.scores.plan import Plan
from influence_core.study import Study
from tests.scripts import ANALYZE, NUM_QUERIES, NUM_TRAIN, TRAIN, contents, refused, run, run_process
from tests.tiny import PAD, TinyTask
from wikitext_gpt2.task import WikiTextTask

# ------------------------------------------------------------------------------------------------------------ flags

ZERO_OR_NEGATIVE = [
    *(("analyze", flag, value) for flag in ("query_batch_size", "train_batch_size", "factor_batch_size")
      for value in ("0", "-1")),
    *(("analyze", flag, value) for flag in ("num_queries", "num_train", "memory_budget_gb") for value in ("0", "-3")),
    ("analyze", "damping_factor", "-0.5"),
    *(("analyze", "damping_factor", value) for value in ("nan", "-1x", "x", "nanx", "infx")),
    ("analyze", "show_queries", "-1"),
    *(("train", flag, "0") for flag in ("train_batch_size", "eval_batch_size", "num_train", "block_size")),
    *(("train", "learning_rate", value) for value in ("0", "-0.5", "nan")),
    ("train", "num_train_epochs", "-1"),
]  # fmt: skip


@pytest.mark.parametrize("script, flag, value", ZERO_OR_NEGATIVE)
def test_counts_and_sizes_are_positive(script, flag, value, checkpoint, tmp_path):
    """Zero, negative numbers and NaN are refused by the flag's name, before anything is made."""
    checkpoint_flags = ["--checkpoint_dir", checkpoint] if script == "analyze" else []
    refused(script, f"--{flag}={value}", *checkpoint_flags, contains=[f"--{flag} ", value], directory=tmp_path)


TOO_LARGE = {
    "num_train": (10**6, "training set"),
    "num_queries": (10**6, "validation set"),
}


@pytest.mark.parametrize("flag", TOO_LARGE)
def test_more_than_there_is_is_refused_when_given(flag, checkpoint, tmp_path):
    """A count beyond the data is refused where it was given by hand; defaults are cut to fit instead (the run that the
    fixtures make has them)."""
    value, told = TOO_LARGE[flag]
    flags = ["--checkpoint_dir", checkpoint, f"--{flag}", value]
    refused("analyze", *flags, contains=[f"--{flag} {value}", told], directory=tmp_path)


def test_batches_larger_than_the_data_are_cut_and_said(checkpoint, results, tmp_path):
    """Scores do not depend on how many examples go through the model at once, so one command serves small data too."""
    sizes = {"query_batch_size": NUM_QUERIES, "train_batch_size": NUM_TRAIN, "factor_batch_size": NUM_TRAIN}
    flags = [part for flag, size in sizes.items() for part in (f"--{flag}", 10 * size)]
    flags += ["--checkpoint_dir", checkpoint, "--output_dir", tmp_path, "--factor_strategy", "ekfac"]
    out = run("analyze", *ANALYZE, *flags).ok()
    for flag, size in sizes.items():
        assert f"Note: --{flag} {10 * size} is more than there are examples: {size} in one batch" in out
    file = "scores_ekfac/pairwise_scores.safetensors"
    scores, expected = (load_file(directory / file)["all_modules"] for directory in (tmp_path, results[1]))
    assert torch.corrcoef(torch.stack([scores.flatten(), expected.flatten()]))[0, 1] > 0.999


@pytest.mark.parametrize("flag, value", [("num_train", 10**6), ("train_batch_size", 65)])
def test_training_on_more_than_there_is_is_refused(flag, value, tmp_path):
    """As for analyze.py."""
    refused("train", f"--{flag}", value, contains=[f"--{flag} {value}"], directory=tmp_path)


@pytest.mark.parametrize("script", ["train", "analyze"])
@pytest.mark.parametrize(
    "flags, told",
    [
        (["--no_such_flag", "3"], ["--no_such_flag", "--help"]),
        (["--preset", "huge"], ["'huge'", "full, demo"]),
        (["--num_train", "many"], ["--num_train", "'many'"]),
    ],
)
def test_unknown_flags_and_values(script, flags, told, tmp_path):
    """What is not known is named, with what there is instead."""
    refused(script, *flags, contains=told, directory=tmp_path)


def test_unknown_strategy(checkpoint, tmp_path):
    """The four that there are are listed."""
    flags = ["--checkpoint_dir", checkpoint, "--factor_strategy", "ekfac", "shampoo"]
    refused("analyze", *flags, contains=["'shampoo'", "identity, diagonal, kfac, ekfac"], directory=tmp_path)


@pytest.mark.parametrize("text", ["n_layer", "=3", "n_layer:3", "n_layer=1,n_embd"])
def test_malformed_overrides(text, tmp_path):
    """What can't be read is shown with how to write it."""
    part = text.split(",")[-1]
    refused("train", "--config_overrides", text, contains=["--config_overrides", part], directory=tmp_path)


@pytest.mark.parametrize("text, told", [
    ("n_leyer=1", "n_leyer"),
    ("n_layer=many", "n_layer"),
    ("n_embd=15,n_head=2", "divisible"),
])  # fmt: skip
def test_overrides_that_make_no_model(text, told, tmp_path):
    """An unknown key, a value of the wrong kind, sizes that do not go together."""
    refused("train", "--config_overrides", text, contains=[told], directory=tmp_path)


def test_blocks_longer_than_the_model_takes(tmp_path):
    """--block_size beyond the model's positions is told before the first step, not by an index error in it."""
    refused("train", "--block_size", "64", contains=["--block_size", "32"], directory=tmp_path)


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_that_numpy_does_not_take(seed, tmp_path):
    """Any seed works or is refused in a line (the generators differ in what they take)."""
    outcome = run("train", *TRAIN, "--checkpoint_dir", tmp_path / "checkpoint", "--seed", seed)
    if outcome.code:
        outcome.error("--seed")


def test_use_ddp_outside_torchrun(checkpoint, tmp_path, monkeypatch):
    """The command that works is told."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    flags = ["--checkpoint_dir", checkpoint, "--use_ddp"]
    refused("analyze", *flags, contains=["--use_ddp", "torchrun --standalone"], directory=tmp_path)


def test_too_little_memory(checkpoint, tmp_path):
    """The flag to raise is named, and amounts are amounts: no negative number of bytes."""
    flags = ["--checkpoint_dir", checkpoint, "--memory_budget_gb", "0.01"]
    error = refused("analyze", *flags, contains=["--memory_budget_gb"], directory=tmp_path)
    assert not re.search(r"-\d", error), error


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("preset", ["demo", "full"])
def test_no_checkpoint(preset, tmp_path):
    """The command that makes the missing checkpoint is told, complete with its preset."""
    checkpoint_dir = tmp_path / "nothing"
    flags = ["--preset", preset, "--checkpoint_dir", checkpoint_dir]
    error = refused("analyze", *flags, contains=["wikitext_gpt2/train.py"], directory=tmp_path)
    command = error.split("`")[1]
    assert f"--checkpoint_dir {checkpoint_dir}" in command
    assert preset == "full" or "--preset demo" in command


def damage(directory, kind):
    weights = directory / "model.safetensors"
    if kind == "weights cut":
        weights.write_bytes(weights.read_bytes()[:20_000])
    elif kind == "weights gone":
        weights.unlink()
    elif kind == "config garbage":
        (directory / "config.json").write_text("{garbage")
    elif kind == "no tokenizer":
        for path in directory.glob("tokenizer*"):
            path.unlink()
    elif kind == "record garbage":
        (directory / "training.json").write_text('{"block_size": 3')


@pytest.mark.parametrize("kind", ["weights cut", "weights gone", "config garbage", "no tokenizer", "record garbage"])
def test_a_damaged_checkpoint(kind, spoiled, tmp_path):
    """The checkpoint, or the file in it, is named; without its tokenizer or record the data would be others'."""
    damage(spoiled, kind)
    refused("analyze", "--checkpoint_dir", spoiled, contains=[str(spoiled)], directory=tmp_path / "out")


def test_a_damaged_model_to_start_from(spoiled, tmp_path):
    """--model_name_or_path with weights that are cut short."""
    damage(spoiled, "weights cut")
    flags = ["--model_name_or_path", spoiled, "--config_overrides", ""]
    refused("train", *flags, contains=["--model_name_or_path", str(spoiled)], directory=tmp_path / "new")


def test_a_checkpoint_of_nan(spoiled, tmp_path):
    """A NaN weight: the first example that is looked at is named, and no covariance is stored."""
    weights = load_file(spoiled / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][3, 5] = float("nan")
    save_file(weights, spoiled / "model.safetensors", {"format": "pt"})
    flags = ["--checkpoint_dir", spoiled, "--factor_batch_size", "16"]
    refused("analyze", *flags, contains=["training loss", "examples 0 is nan"], directory=tmp_path / "out")


class NanTask(TinyTask):
    """The loss of one example, known by its labels, is NaN; so is its measurement."""

    def __init__(self, split, index):
        super().__init__()
        self.bad = self.load_dataset(split)[index]["labels"]

    def train_loss(self, model, batch, sample_labels=None):
        loss = super().train_loss(model, batch, sample_labels)
        is_bad = any(torch.equal(row[row != PAD], self.bad) for row in batch["labels"])
        return loss * float("nan") if is_bad else loss


@pytest.mark.parametrize("strategy", ["ekfac", "diagonal", "identity"])
def test_the_batch_of_a_nan_loss_is_named(strategy, tmp_path):
    """In the covariance, Lambda and pairwise pass: the very batch that holds the example, and nothing is stored."""
    task = NanTask("train", 17)
    study = Study(task, task.load_model(), task.load_dataset("train"), tmp_path)
    with pytest.raises(UserError, match=r"training loss .* examples ([\d, ]*, )?17(, [\d, ]*)? is nan"):
        analyze(study, [strategy], task.load_dataset("validation"), 1e-3, 6, 6, 6)
    assert not contents(tmp_path)


@pytest.mark.parametrize("tile", [6, 3])
def test_the_query_of_a_nan_measurement_is_named(tile, tmp_path):
    """Queries are counted from the first of all, also where they are worked on in tiles."""
    task = NanTask("validation", 4)
    study = Study(task, task.load_model(), task.load_dataset("train"), tmp_path, Runtime())
    plan = Plan([study.layers], [range(start, start + tile) for start in range(0, 6, tile)], 0, {}, 0.0)
    with pytest.raises(UserError, match="measurement .* examples 4 is nan"):
        compute_pairwise_scores(study, {"identity": {}}, task.load_dataset("validation"), plan, 1e-3, 1, 7)


def test_diverging_training(tmp_path):
    """One line with the flag to lower, and no checkpoint."""
    refused("train", "--learning_rate", "1e30", contains=["loss is nan", "--learning_rate"], directory=tmp_path)


def test_training_that_diverges_in_its_last_step(tmp_path):
    """The loss is finite at every step, the model is not afterwards: that is no finished checkpoint either."""
    flags = ["--learning_rate", "1e30", "--train_batch_size", "64"]
    refused("train", *flags, contains=["--learning_rate"], directory=tmp_path)


class NothingTracked(WikiTextTask):
    """A task that names no layer, or one that the model does not have."""

    names: list[str] = []

    def tracked_layer_names(self, model):
        return self.names


@pytest.mark.parametrize("names", [[], ["transformer.h.7.mlp.c_fc"]])
def test_no_tracked_layer(names, checkpoint, tmp_path, monkeypatch):
    """What is missing is named, with the layers that could be tracked."""
    monkeypatch.setattr(NothingTracked, "names", names)
    told = ["no tracked layer", *names, "transformer.h.0.mlp.c_fc"]
    flags = ["--checkpoint_dir", checkpoint]
    refused("analyze", *flags, contains=told, directory=tmp_path, task_class=NothingTracked)


# --------------------------------------------------------------------------------------------------- as a person would


def test_a_refusal_as_a_process(tmp_path):
    """Exit code 2 and one line alone on stderr, from the shell: no library adds a warning or a traceback."""
    command = ["wikitext_gpt2/analyze.py", "--checkpoint_dir", tmp_path / "nothing", "--output_dir", tmp_path / "out"]
    outcome = run_process(command)
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1 and outcome.err.startswith("error: no checkpoint in ")
    assert not contents(tmp_path)
