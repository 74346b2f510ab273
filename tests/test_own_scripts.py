"""All scripts on data that is not the preset's, and what they say when it changes between them."""

import json

import pytest

from dailymail_t5.task import DailyMailTask
from swag_roberta.task import SwagTask
from tests.own_data import PAIRS, QUESTIONS, SIZES, TEXTS, documents, write
from tests.scripts import run
from wikitext_gpt2.task import WikiTextTask

pytestmark = pytest.mark.usefixtures("datasets_cache")
CHOICES = ["--text_column", "context", "--ending_columns", "A", "B", "C"]


def flags_of(task_class, directory):
    """(of train.py, of the others)"""
    common = ["--preset", "demo", "--checkpoint_dir", directory / "checkpoint"]
    train = [*common, "--vocab_size", "400", *SIZES[task_class], "--num_train_epochs", "1"]
    return train, [*common, "--output_dir", directory / "results"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("task_class, rows, flags", [
    (WikiTextTask, None, []),
    (WikiTextTask, PAIRS, ["--prompt_column", "ask", "--answer_column", "reply"]),
    (SwagTask, QUESTIONS, CHOICES),
    (DailyMailTask, PAIRS, ["--prompt_column", "ask"]),
], ids=["texts", "answers", "choices", "targets"])  # fmt: skip
def test_all_scripts(task_class, rows, flags, suffix, tmp_path):
    """From a file of each kind, named to train.py alone; columns by flag and found."""
    if suffix == ".txt" and rows is not None:
        pytest.skip("a .txt has one column")
    path = tmp_path / f"mine{suffix}"
    path = documents(path) if rows is None else write(path, rows)
    train, others = flags_of(task_class, tmp_path)
    run("train", *train, "--dataset_name_or_path", path, *flags, task_class=task_class).ok()
    run("analyze", *others, "--factor_strategy", "ekfac", "identity", task_class=task_class).ok()
    retraining = [*others, "--num_repeats", "1", "--figure_dir", tmp_path / "figure"]
    out = run("evaluate_lds", *retraining, "--num_masks", "4", task_class=task_class).ok()
    assert all(name in out for name in ("ekfac", "identity", "tfidf"))
    sizes = ["--removal_sizes", "0", "2", "--num_counterfactual_queries", "2"]
    run("run_counterfactual", *retraining, *sizes, task_class=task_class).ok()
    drawn = {path.stem for path in (tmp_path / "figure").glob("*.png")}
    assert drawn == {"lds", "calibration", "counterfactual"}


@pytest.fixture
def trained(tmp_path):
    """(the file, train.py's flags, the others') of a checkpoint."""
    path = write(tmp_path / "mine.jsonl", [{"body": text} for text in TEXTS])
    train, others = flags_of(WikiTextTask, tmp_path)
    train = [*train, "--dataset_name_or_path", path, "--one_row_one_example"]
    run("train", *train, task_class=WikiTextTask).ok()
    return path, train, others


@pytest.mark.parametrize("change", ["a word", "a row less", "another order"])
def test_data_that_has_changed(change, trained, tmp_path):
    """Its scores would be of examples that the model was not trained on: refused, unless a flag names the data."""
    path, train, others = trained
    rows = [{"body": text} for text in TEXTS]
    rows = {
        "a word": [{"body": rows[0]["body"].replace("a", "o")}, *rows[1:]],
        "a row less": rows[1:],
        "another order": rows[::-1],
    }[change]
    write(path, rows)
    told = ["was trained on other examples: the data has changed since"]
    for script in ("analyze", "evaluate_lds", "run_counterfactual"):
        run(script, *others).error(*told, "--dataset_name_or_path")
    assert not (tmp_path / "results").exists()
    run("train", *train).error(*told, "--overwrite")
    out = run("analyze", *others, "--dataset_name_or_path", path, "--factor_strategy", "identity").ok()
    assert "Note:" in out and "trained on other examples than those that the flags name" in out
    run("train", *train, "--overwrite").ok()
    out = run("analyze", *others, "--factor_strategy", "identity", "--overwrite").ok()
    assert "other examples" not in out


def test_data_that_is_the_same(trained):
    """Whatever its file was called, or says of what nobody reads."""
    path, train, others = trained
    path.write_text("".join(json.dumps({"body": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))
    assert "Found finished" in run("train", *train).ok()
    out = run("analyze", *others, "--factor_strategy", "identity").ok()
    assert "other examples" not in out


def test_queries_may_change(trained):
    """They are nothing that was trained on."""
    path, _, others = trained
    rows = [{"body": text} for text in TEXTS]
    rows[9] = {"body": "another query, that is as good"}
    write(path, rows)
    run("analyze", *others, "--factor_strategy", "identity").ok()


def test_a_part_of_the_data_is_noted(trained):
    _, _, others = trained
    out = run("analyze", *others, "--factor_strategy", "identity", "--num_train", "20").ok()
    assert "other examples than those that the flags name" in out


def test_a_model_that_is_not_analyzed_is_noted(trained, tmp_path):
    _, _, others = trained
    out = run("analyze", *others, "--factor_strategy", "identity", "--model_name_or_path", tmp_path).ok()
    assert "Note: --model_name_or_path: for train.py; analyzed is the model in" in out
