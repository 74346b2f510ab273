"""Several checkpoints of one training: what train.py leaves on the way, and the mean of their scores."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from influence_core.experiments.trajectory import saved_steps
from influence_core.files import read_sealed_json, write_sealed_json
from tests.scripts import ANALYZE, TRAIN, contents, run

TRAIN3 = [*TRAIN, "--num_train_epochs", "2", "--train_batch_size", "16"]  # 4 steps an epoch
SCORES = "pairwise_scores.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint, with those after half an epoch, one, and two, that is the last."""
    directory = tmp_path_factory.mktemp("several") / "checkpoint"
    out = run("train", *TRAIN3, "--checkpoint_dir", directory, "--save_at", "2", "0.5", "1").ok()
    return directory, out


@pytest.fixture(scope="module")
def analyzed(trained, tmp_path_factory):
    """The results of all of them."""
    output = tmp_path_factory.mktemp("several") / "results"
    return output, analyze(trained[0], output, "all").ok()


def analyze(checkpoint, output, which, *flags):
    flags = [*flags, "--factor_strategy", "ekfac", "identity"]
    return run(
        "analyze", *ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", output, "--checkpoints", which, *flags
    )


def weights(directory):
    return load_file(directory / "model.safetensors")


def scores(directory, strategy="ekfac"):
    return load_file(directory / f"scores_{strategy}" / SCORES)["all_modules"]


def test_saving_on_the_way_leaves_the_training_as_it_was(trained, tmp_path):
    directory, _ = trained
    run("train", *TRAIN3, "--checkpoint_dir", tmp_path / "plain").ok()
    for name, tensor in weights(tmp_path / "plain").items():
        assert torch.equal(tensor, weights(directory)[name])


def test_each_is_what_a_training_that_ends_there_gives(trained, tmp_path):
    directory, _ = trained
    assert {path.name for path in directory.glob("step-*")} == {"step-2", "step-4", "step-8"}
    run("train", *TRAIN3, "--num_train_epochs", "1", "--checkpoint_dir", tmp_path / "one").ok()
    for name, tensor in weights(tmp_path / "one").items():
        assert torch.equal(tensor, weights(directory / "step-4")[name])
    for name, tensor in weights(directory).items():
        assert torch.equal(tensor, weights(directory / "step-8")[name])
    assert not torch.equal(*(weights(directory / step)["transformer.wte.weight"] for step in ("step-2", "step-4")))
    AutoModelForCausalLM.from_pretrained(directory / "step-2")


def test_a_finished_training_is_found_with_the_same_times_and_refused_with_others(trained):
    directory, _ = trained
    before = contents(directory)
    flags = [*TRAIN3, "--checkpoint_dir", directory]
    assert "Found finished" in run("train", *flags, "--save_at", "0.5", "1", "2").ok()
    run("train", *flags, "--save_at", "1").error("save_at", "--overwrite")
    assert contents(directory) == before


def test_training_again_leaves_no_step_of_the_one_before(trained, tmp_path):
    directory = shutil.copytree(trained[0], tmp_path / "again")
    (directory / "step-by-step").mkdir()
    (directory / "step-by-step" / "notes.txt").write_text("mine")
    flags = ["--checkpoint_dir", directory, "--num_train_epochs", "1", "--save_at", "0.5", "--overwrite"]
    run("train", *TRAIN3, *flags).ok()
    assert {path.name for path in directory.glob("step-*")} == {"step-2", "step-by-step"}


def test_a_killed_training_is_begun_again(trained, tmp_path):
    """It left a step, and no checkpoint."""
    directory = tmp_path / "killed"
    shutil.copytree(trained[0] / "step-2", directory / "step-2")
    write_sealed_json(directory / "training.json", {"unfinished": True})
    flags = ["--checkpoint_dir", directory, "--output_dir", tmp_path / "r"]
    run("analyze", *ANALYZE, *flags).error("did not end", "train.py")
    run("train", *TRAIN3, "--checkpoint_dir", directory, "--save_at", "0.5").ok()
    assert torch.equal(weights(directory)["transformer.wte.weight"], weights(trained[0])["transformer.wte.weight"])


@pytest.mark.parametrize("strategy", ["ekfac", "identity"])
def test_the_scores_are_the_mean_of_each_ones(trained, analyzed, strategy, tmp_path):
    output, _ = analyzed
    each = [scores(output / f"step-{step}", strategy).double() for step in (2, 4, 8)]
    torch.testing.assert_close(scores(output, strategy).double(), sum(each) / 3, rtol=1e-6, atol=0)
    run("analyze", *ANALYZE, "--checkpoint_dir", trained[0] / "step-4", "--output_dir", tmp_path).ok()
    torch.testing.assert_close(scores(tmp_path), scores(output / "step-4"), rtol=0, atol=0)


def test_some_are_named_by_their_epochs(trained, tmp_path, analyzed):
    analyze(trained[0], tmp_path, "0.5,3").error("0.5, 1, 2")
    out = run("analyze", *ANALYZE, "--checkpoint_dir", trained[0], "--output_dir", tmp_path,
              "--checkpoints", "0.5", "2").ok()  # fmt: skip
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-2", "step-8"}
    mean = (scores(analyzed[0] / "step-2") + scores(analyzed[0] / "step-8")) / 2
    torch.testing.assert_close(scores(tmp_path), mean)
    assert "1 of 2" in out and out.count("Num calls") == 1


def test_what_is_stored_is_found_and_other_means_are_refused(trained, analyzed):
    output, _ = analyzed
    before = contents(output)
    assert analyze(trained[0], output, "all").ok().count("Found finished") >= 8
    assert contents(output) == before
    for which in ("1,2", "last"):
        analyze(trained[0], output, which).error("checkpoints", "--overwrite")
    assert contents(output) == before
    (output / "step-4" / "scores_ekfac" / SCORES).write_bytes(b"damaged")
    analyze(trained[0], output, "all").error("step-4", "--overwrite")
    (output / "step-4" / "scores_ekfac" / SCORES).write_bytes(before[f"step-4/scores_ekfac/{SCORES}"])


def test_the_stage_table_counts_all_of_them(analyzed):
    cells = [[cell.strip() for cell in line.split("|")] for line in analyzed[1].splitlines() if line.startswith("| ")]
    calls = {row[1]: row[3] for row in cells}
    assert calls["Fit Covariance"] == calls["Fit Lambda"] == "3"


@pytest.mark.parametrize("flags, message", [
    (["--save_at", "3"], "after the end"),
    (["--save_at", "0"], "positive"),
    (["--save_at", "nan"], "finite"),
    (["--save_at", "soon"], "save_at"),
])  # fmt: skip
def test_times_that_are_none_are_refused(flags, message, tmp_path):
    run("train", *TRAIN3, "--checkpoint_dir", tmp_path / "c", *flags).error(message)
    assert not contents(tmp_path)


@pytest.mark.parametrize("which, message", [("3", "0.5, 1, 2"), ("some", "checkpoints"), ("", "checkpoints")])
def test_checkpoints_that_are_none_are_refused(trained, tmp_path, which, message):
    analyze(trained[0], tmp_path / "r", which).error(message)
    assert not contents(tmp_path)


def test_a_checkpoint_of_another_training_or_a_missing_one_is_refused(trained, tmp_path):
    directory = shutil.copytree(trained[0], tmp_path / "mixed")
    record = read_sealed_json(directory / "step-2" / "training.json")
    write_sealed_json(directory / "step-2" / "training.json", record | {"learning_rate": 0.5})
    analyze(directory, tmp_path / "r", "all").error("step-2", "learning_rate")
    shutil.rmtree(directory / "step-2")
    analyze(directory, tmp_path / "r", "all").error("step-2", "missing")
    analyze(directory, tmp_path / "r", "1,2").ok()


def test_a_checkpoint_without_others_says_how_to_get_them(trained, tmp_path):
    directory = tmp_path / "plain"
    run("train", *TRAIN3, "--num_train_epochs", "0", "--checkpoint_dir", directory).ok()
    analyze(directory, tmp_path / "r", "all").error("--save_at")


def test_lds_takes_the_mean_and_each_one(trained, analyzed, tmp_path):
    """All are of the training that is done again."""
    flags = ["--preset", "demo", "--checkpoint_dir", trained[0], "--output_dir", analyzed[0], "--num_train", "64"]
    flags += ["--num_queries", "4", "--num_masks", "2", "--num_repeats", "1", "--figure_dir", tmp_path]
    out = run("evaluate_lds", *flags, "--bank_dir", tmp_path, "--scores", "ekfac", "step-2/ekfac", "identity").ok()
    assert "step-2/ekfac" in out and out.count("are of a checkpoint on the way") == 1


@pytest.mark.parametrize("num_steps, expected", [(8, [2, 4, 8]), (1, [1, 1, 1]), (3, [1, 2, 3])])
def test_steps_of_epochs(num_steps, expected):
    assert [step for _, step in saved_steps([0.5, 1.0, 2.0], 2, num_steps)] == expected
