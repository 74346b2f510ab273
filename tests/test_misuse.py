"""A table of wrong calls: exit code 2, one line that says what is wrong, and nothing made."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.misuse import TABLE
from tests.scripts import ANALYZE, NUM_QUERIES, NUM_TRAIN, NUMBERS, TRAIN, contents, run


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{name: path} of files and directories of all wrong kinds."""
    tmp = tmp_path_factory.mktemp("wrong")
    lines = {
        "numbers": 1, "nulls": None, "lists": ["a"], "mappings": {"a": 1}, "booleans": True,
    }  # fmt: skip
    files: dict[str, str | bytes] = {f"{name}.jsonl": _jsonl([value] * 99) for name, value in lines.items()}
    files |= {
        "file": "hello", "empty.txt": "", "empty.jsonl": "", "garbage.jsonl": '{"text": "a"\n{{{', "garbage.npy": "no",
        "garbage.parquet": "PAR1", "bytes.txt": b"\xff\xfe\x80abc\n" * 50, "mixed.jsonl": _jsonl(["a b"] * 50 + [3]),
        "bytes.jsonl": b'{"text": "\xff\xfe"}\n' * 50, "other.jsonl": '{"x": 1}\n' * 50, "blank.txt": "\n  \n" * 50,
        "scalar.json": "3", "deep.json": "[" * 100_000, "latin.csv": b"text\n" + b"caf\xe9\n" * 30,
        "ragged.csv": "text,b\n1,2,3\n4\n" * 20, "word.txt": "a" * 2_000_000, "plain.txt": "some words here\n" * 200,
    }  # fmt: skip
    for name, content in files.items():
        (tmp / name).write_bytes(content.encode() if isinstance(content, str) else content)
    masks = np.arange(6 * NUM_TRAIN).reshape(6, NUM_TRAIN) % 2
    measured = np.random.default_rng(0).normal(size=(6, NUM_QUERIES))
    arrays = {
        "masks": masks, "measured": measured, "narrow": masks[:, :3], "twos": masks * 2, "flat": masks[0],
        "complex": measured * 1j, "nan": measured * np.nan, "none": np.zeros((6, 0, NUM_QUERIES)),
        "strings": np.full((6, NUM_QUERIES), "a"), "short": measured[1:], "constant": np.zeros((6, NUM_QUERIES)),
        "pickled": np.full((6, NUM_QUERIES), {}, dtype=object),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(tmp / f"{name}.npy", array, allow_pickle=name == "pickled")
    ones = torch.ones(NUM_QUERIES, NUM_TRAIN)
    torch.save({"a": ones}, tmp / "mapping.pt")
    save_file({"a": ones, "b": ones.clone()}, tmp / "two.safetensors")
    for name, tensor in {"0": ones.sum(), "1": ones[0].clone(), "3": ones[..., None], "nan": ones * torch.nan,
                         "complex": ones * 1j, "small": ones[:2].clone()}.items():  # fmt: skip
        save_file({"all_modules": tensor.contiguous()}, tmp / f"scores_{name}.safetensors")
    for name in ("fifo.txt", "fifo.npy"):
        os.mkfifo(tmp / name)
    (tmp / "empty").mkdir()
    (tmp / "foreign").mkdir()
    (tmp / "foreign" / "notes.txt").write_text("mine")
    return {"tmp": tmp, **{name: tmp / name for name in ("file", "fifo", "empty", "foreign")}}


def _jsonl(values):
    return "\n".join(json.dumps({"text": value}) for value in values)


@pytest.fixture(scope="module")
def common(checkpoint, results, tmp_path_factory):
    """{script: flags that are right}, and the directory that all but stored results go to."""
    new = tmp_path_factory.mktemp("new")
    stored = [*NUMBERS, "--checkpoint_dir", checkpoint, "--output_dir", results[1], "--figure_dir", new / "figure"]
    bank = ["--bank_dir", new / "bank", "--num_repeats", "1"]
    return new, {
        "train": [*TRAIN, "--checkpoint_dir", new / "checkpoint"],
        "analyze": [*ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", new / "results"],
        "evaluate_lds": [*stored, *bank, "--num_masks", "2", "--scores", "tfidf"],
        "run_counterfactual": [*stored, *bank],
        "half_precision_analysis": stored,
    }


def test_the_table_is_long():
    assert len(TABLE) >= 200


@pytest.mark.parametrize(
    "script, flags, told", TABLE, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_a_wrong_call(script, flags, told, common, places):
    new, right = common
    flags = [flag.format(**places) for flag in flags]
    if "--dataset_name_or_path" in flags:  # its own number of examples
        right = right | {"train": [part for part in right["train"] if part not in ("--num_train", str(NUM_TRAIN))]}
    try:
        error = run(script, *right[script], *flags).error(told)
        assert len(error) < 1000
        assert not contents(new), "something was made"
    finally:
        shutil.rmtree(new)
        new.mkdir()


def test_names_are_shown_without_their_control_characters(tmp_path, capfd):
    run("analyze", *ANALYZE, "--checkpoint_dir", tmp_path / "a\x1b[31mb\x07").error("a\\x1b[31mb\\x07")


def test_paths_are_whole_in_the_message():
    assert str(Path("/nonexistent")) in run("analyze", *ANALYZE, "--checkpoint_dir", "/nonexistent").error()
