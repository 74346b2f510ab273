"""Files, directories and data that can't be used: one line that names them, and nothing on disk is changed."""

import shutil

import datasets
import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from tests.scripts import ANALYZE, TRAIN, contents, refused, run


def test_factors_of_another_seed_or_model(checkpoint, spoiled, results, tmp_path):
    """What differs is named with both values, and the stored results stay as they are."""
    directory = shutil.copytree(results[1], tmp_path / "results")
    before = contents(directory)
    flags = [*ANALYZE, "--factor_strategy", "ekfac", "--output_dir", directory]
    run("analyze", *flags, "--checkpoint_dir", checkpoint, "--seed", "7").error("seed (stored 1004, now 7)")
    run("analyze", *flags, "--checkpoint_dir", checkpoint, "--num_train", "40").error("num_train (stored 64, now 40)")
    weights = load_file(spoiled / "model.safetensors")
    weights["transformer.h.0.ln_1.weight"][0] += 1e-3  # not of a tracked layer, but it changes the gradients
    save_file(weights, spoiled / "model.safetensors", {"format": "pt"})
    run("analyze", *flags, "--checkpoint_dir", spoiled).error("model (stored ", "--overwrite")
    assert contents(directory) == before


def test_a_truncated_factor_file(checkpoint, results, tmp_path):
    """The file is named."""
    directory = shutil.copytree(results[1], tmp_path / "results")
    shutil.rmtree(directory / "scores_ekfac")
    path = directory / "factors_ekfac" / "lambda_matrix.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    flags = [*ANALYZE, "--factor_strategy", "ekfac", "--output_dir", directory, "--checkpoint_dir", checkpoint]
    run("analyze", *flags).error(str(path), "--overwrite")
    assert not (directory / "scores_ekfac").exists()


@pytest.mark.parametrize("where", ["below a file", "proc"])
def test_directories_that_cannot_be_written(where, checkpoint, tmp_path):
    """The directory is named, before the work: nothing is computed that could not be kept."""
    (tmp_path / "file").write_text("a file")
    directory = tmp_path / "file" / "out" if where == "below a file" else "/proc/nowhere/out"
    analyzed = run("analyze", *ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", directory)
    trained = run("train", *TRAIN, "--checkpoint_dir", directory)
    for outcome in (analyzed, trained):
        outcome.error(str(directory), "can't be written")
    assert contents(tmp_path) == {"file": b"a file"}


@pytest.mark.parametrize("elsewhere", [True, False], ids=["other files", "current directory"])
def test_training_deletes_nothing_that_is_not_its_own(elsewhere, tmp_path, monkeypatch):
    """--checkpoint_dir with other files in it, also as `.`: refused, or trained, but the files stay."""
    (tmp_path / "thesis.txt").write_text("three years of work")
    monkeypatch.chdir(tmp_path)
    outcome = run("train", *TRAIN, "--checkpoint_dir", tmp_path if elsewhere else ".")
    if outcome.code:
        outcome.error("--checkpoint_dir")
    assert contents(tmp_path)["thesis.txt"] == b"three years of work"


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_a_hub_id_without_network(what, checkpoint, tmp_path, monkeypatch):
    """A local directory is asked for, with the flag that takes it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    flags = {
        "model": ["--model_name_or_path", "nobody/no-such-model", "--config_overrides", ""],
        "dataset": ["--dataset_name_or_path", "nobody/no-such-data", "--model_name_or_path", checkpoint],
    }[what]
    told = [f"--{what}_name_or_path", "nobody/no-such", "give a local directory"]
    refused("train", *flags, contains=told, directory=tmp_path)


@pytest.fixture
def local_data(tmp_path, monkeypatch):
    """A dataset in the Hub's layout, 40 rows a split; the library's cache is kept out of the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "data"
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_dict({"text": ["a line of text, and another one after it\n"] * 40})
        rows.to_parquet(directory / f"{split}-00000-of-00001.parquet")
    return directory


@pytest.mark.parametrize("kind", ["cut", "no text", "no data", "whole"])
def test_local_data_that_cannot_be_used(kind, local_data, checkpoint, tmp_path):
    """The dataset is named; the same directory, whole, is the control that works."""
    train, validation = sorted(local_data.glob("*.parquet"))
    if kind == "cut":
        train.write_bytes(train.read_bytes()[:-20])
    elif kind == "no text":
        for path in (train, validation):
            datasets.Dataset.from_dict({"words": [3] * 40}).to_parquet(path)
    elif kind == "no data":
        train.unlink(), validation.unlink()
    flags = ["--dataset_name_or_path", local_data, "--tokenizer_name_or_path", checkpoint, "--num_train_epochs", "0"]
    if kind == "whole":
        run("train", *TRAIN, *flags, "--num_train", "2", "--checkpoint_dir", tmp_path / "new").ok()
    else:
        refused("train", *flags, contains=[str(local_data)], directory=tmp_path / "new")
