"""Data that can't be worked with is found before any work: by split, row and column, or by file and cause."""

import csv
import json
import re
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dailymail_t5.task import DailyMailTask
from influence_core.errors import UserError
from influence_core.tasks.columns import Label, Text, check_columns
from influence_core.tasks.demo_corpus import demo_questions
from swag_roberta.task import SwagTask
from tests.scripts import SHARED, contents, run, run_process
from tests.test_dailymail import flags as dailymail_flags
from tests.test_swag import flags as swag_flags
from wikitext_gpt2.task import WikiTextTask

pytestmark = pytest.mark.usefixtures("datasets_cache")
QUESTIONS = demo_questions("train")[:40]
TINY_SWAG = ["--preset", "demo", "--vocab_size", "400", "--max_length", "24", "--num_train_epochs", "1"]
TINY_SWAG += ["--config_overrides", "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=24"]


def write(directory, **splits):
    """A directory with <split>.jsonl of rows."""
    directory.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def changed(row, **cells):
    """The questions, one row with other cells."""
    return [question | cells if number == row else question for number, question in enumerate(QUESTIONS)]


def swag(directory, **others):
    return SwagTask(**swag_flags(dataset_name_or_path=str(directory), **others))


def wikitext(**flags):
    return WikiTextTask(**dict.fromkeys(WikiTextTask.flag_names()) | {"block_size": 8} | flags)


# ------------------------------------------------------------------------------------------------------------ columns

WRONG_CELLS = {
    "label below": ({"label": -1}, ["-1 (int)", "'label'", "from 0 to 3"]),
    "label above": ({"label": 4}, ["4 (int)", "'label'", "from 0 to 3"]),
    "label text": ({"label": "two"}, ["'two' (str)", "'label'"]),
    "label float": ({"label": 1.5}, ["(float)", "'label'"]),
    "label null": ({"label": None}, ["null", "'label'"]),
    "label list": ({"label": [1]}, ["[1] (list)", "'label'"]),
    "ending null": ({"ending2": None}, ["null", "'ending2'"]),
    "ending empty": ({"ending1": ""}, ["'' (str)", "'ending1'", "not blank"]),
    "ending blank": ({"ending3": " \t\u00a0"}, ["'ending3'", "not blank"]),
    "ending number": ({"ending0": 17}, ["17 (int)", "'ending0'", "a text"]),
    "sentence list": ({"sent1": ["a", "b"]}, ["['a', 'b'] (list)", "'sent1'"]),
    "sentence null": ({"sent2": None}, ["null", "'sent2'"]),
}


@pytest.mark.parametrize("kind", WRONG_CELLS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_wrong_cell_is_named(kind, split, tmp_path):
    """By split, row from 0 and column, with what it holds and what it has to hold."""
    cells, told = WRONG_CELLS[kind]
    other = "validation" if split == "train" else "train"
    row = 0 if kind == "label float" else 5  # beside it, whole numbers are floats in Arrow
    directory = write(tmp_path / "data", **{split: changed(row, **cells), other: QUESTIONS})
    task = swag(directory)
    with pytest.raises(UserError) as error:
        task.load_dataset(split)
    for part in (f"row {row} of the {split} split", *told):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [True, "1", 2.0])
def test_a_whole_column_of_wrong_labels(value, tmp_path):
    """Bools are no classes, though they are numbers; nor is 2.0, nor are digits."""
    rows = [question | {"label": value} for question in QUESTIONS]
    directory = write(tmp_path / "data", train=rows, validation=QUESTIONS[:2])
    with pytest.raises(UserError, match=rf"row 0 of the train split has {value!r} .* \(39 more rows are wrong\)"):
        swag(directory).load_dataset("train")


@pytest.mark.parametrize("cell, told", [("", "has nothing (null)"), ("one", "has 'one' (str)")])
def test_the_cell_is_to_blame_for_its_column(cell, told, tmp_path):
    """A missing label makes floats of all others in a csv, and a word makes texts of them: that one is named."""
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(QUESTIONS[0]))
        writer.writeheader()
        writer.writerows(changed(7, label=cell))
    with pytest.raises(UserError, match=f"row 7 of the train split {re.escape(told)} as 'label'"):
        swag(tmp_path).load_dataset("train")


def test_a_null_label_in_jsonl(tmp_path):
    """Left out of its row, or null in it."""
    rows = changed(3, label=None)
    rows[11] = {key: value for key, value in rows[11].items() if key != "label"}
    with pytest.raises(UserError, match=r"row 3 of the train split has nothing .* \(1 more row"):
        swag(write(tmp_path / "data", train=rows)).load_dataset("train")


def test_rows_are_counted_in_the_part_that_is_used(tmp_path):
    """--train_split names a part: rows outside it may be wrong, and those within count from its first."""
    directory = write(tmp_path / "data", train=changed(25, label=4), validation=QUESTIONS[:2])
    assert len(swag(directory, train_split="train[:20]").load_dataset("train")) == 20
    with pytest.raises(UserError, match=r"row 5 of the train\[20:\] split has 4"):
        swag(directory, train_split="train[20:]").load_dataset("train")


def test_rows_by_a_mapping_of_indices():
    """A dataset that is shuffled or filtered holds rows that it does not have; its own are looked at, and counted."""
    rows = datasets.Dataset.from_dict({"text": ["a", "b", None, "d", "e"], "label": [0, 1, 0, 1, 7]})
    kinds = {"text": Text(), "label": Label(2)}
    check_columns(rows.select([3, 0, 1]), kinds, "data", "row {} of the train split".format)
    with pytest.raises(UserError, match="row 1 of the train split has nothing"):
        check_columns(rows.select([3, 2, 4]), kinds, "data", "row {} of the train split".format)
    with pytest.raises(UserError, match="row 2 of the train split has 7"):
        check_columns(rows.select([3, 0, 4]), kinds, "data", "row {} of the train split".format)


@pytest.mark.parametrize("task_class, make, column", [
    (WikiTextTask, wikitext, "text"),
    (DailyMailTask, lambda **flags: DailyMailTask(**dailymail_flags(**flags)), "article"),
])  # fmt: skip
def test_texts_that_may_be_empty(task_class, make, column, tmp_path):
    """WikiText has empty lines, and an article may be empty; null is no text, nor is a number."""
    filled = dict.fromkeys(task_class.columns, "some words of a text, repeated. " * 5)
    for number, (cell, told) in enumerate([("", None), (None, "nothing"), (3, "3 (int)")]):
        directory = write(tmp_path / str(number), train=[filled, filled | {column: cell}, filled])
        task = make(dataset_name_or_path=str(directory), vocab_size=300, config_overrides="x=1")
        if told is None:
            assert len(task.load_dataset("train"))
            continue
        with pytest.raises(UserError, match=f"row 1 of the train split has {re.escape(told)}.*{column!r}"):
            task.load_dataset("train")


def test_a_large_dataset_is_checked_in_no_time():
    """A second is less than one epoch's first batch takes; only columns are looked at, no row is made."""
    texts = pa.array(["a text of some twenty words " * 4] * 300_000)
    rows = datasets.Dataset(pa.table({"text": texts, "label": pa.array([0, 1] * 150_000)}))
    start = time.perf_counter()
    check_columns(
        rows, {"text": Text(may_be_blank=False), "label": Label(2)}, "data", "row {} of the train split".format
    )
    assert time.perf_counter() - start < 2


@pytest.mark.skipif(not (SHARED / "data" / "swag").is_dir(), reason="no SWAG in ../shared/data")
def test_real_questions_are_right():
    """No kind refuses a real row."""
    for split in ("train", "validation"):
        task = swag(SHARED / "data" / "swag", dataset_config="regular")
        assert len(task.rows(split)) >= 100


def test_data_are_looked_at_before_training_and_analysis(tmp_path):
    """By both scripts, in the split that each would only come to later; nothing is written."""
    directory = write(tmp_path / "data", train=QUESTIONS, validation=changed(2, ending1=None))
    data = ["--dataset_name_or_path", directory]
    place = ["--checkpoint_dir", tmp_path / "checkpoint"]
    told = [str(directory), "row 2 of the validation split", "'ending1'"]
    run("train", *TINY_SWAG, *data, *place, task_class=SwagTask).error(*told)
    assert not (tmp_path / "checkpoint").exists()
    write(directory, validation=QUESTIONS[:4])
    run("train", *TINY_SWAG, *data, *place, task_class=SwagTask).ok()
    write(directory, validation=changed(2, ending1=None))
    flags = ["--preset", "demo", *place, "--output_dir", tmp_path / "out"]
    run("analyze", *flags, task_class=SwagTask).error(*told)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ what can't load

GOOD = '{"text": "a"}\n{"text": "b"}\n'


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


# {what: ({file: content}, flags, what is told)}
CANT_LOAD = {
    "a broken line": ({"train.jsonl": GOOD + '{"text": "c\n' + GOOD}, {}, ["JSON parse error", "row 2", "train.jsonl"]),
    "no JSON": ({"train.jsonl": b"\xff\xfe\x00\x01"}, {}, ["JSON parse error", "train.jsonl"]),
    "more cells": ({"train.csv": "text,label\na,1\nb,2,3\n"}, {}, ["Expected 2 fields in line 3, saw 3", "train.csv"]),
    "other columns": (
        {"train-0.csv": "text,label\na,1\n", "train-1.csv": "text,other\na,1\n"},
        {},
        ["train-1.csv has the columns text, other"],
    ),
    "an empty jsonl": ({"train.jsonl": ""}, {}, ["train.jsonl is empty"]),
    "an empty csv": ({"train.csv": ""}, {}, ["train.csv is empty"]),
    "an empty parquet": ({"train.parquet": ""}, {}, ["train.parquet is empty"]),
    "no rows": ({"train.csv": "text\n"}, {}, ["no data"]),
    "half a parquet": ({"train.parquet": "cut"}, {}, ["Parquet magic bytes", "train.parquet"]),
    "a damaged parquet": ({"train.parquet": "scratched"}, {}, ["orrupt"]),
    "no such split": ({"train.jsonl": GOOD}, {"train_split": "dev"}, ["--train_split dev", "['train']"]),
    "no split at all": ({"train.jsonl": GOOD}, {"train_split": "train[:"}, ["--train_split train[:"]),
    "no such config": ({"train.jsonl": GOOD}, {"dataset_config": "raw"}, ["--dataset_config raw", "'default'"]),
    "nothing": ({}, {}, ["any data files"]),
}  # fmt: skip


@pytest.mark.parametrize("what", CANT_LOAD)
def test_the_cause_is_told(what, tmp_path):
    """Not that "an error occurred", which is all that datasets says of most: the cause, and the file where it is."""
    files, flags, told = CANT_LOAD[what]
    directory = tmp_path / "data"
    directory.mkdir()
    for name, content in files.items():
        if content in ("cut", "scratched"):
            whole = parquet(directory / name, text=["words " * 100] * 50)
            content = whole[: len(whole) // 2] if content == "cut" else whole[:20] + b"\xff" * 40 + whole[60:]
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    task = wikitext(dataset_name_or_path=str(directory), **flags)
    with pytest.raises(UserError) as error:
        task.rows("train")
    message = str(error.value)
    for part in (f"can't load --dataset_name_or_path {directory}", *told):
        assert part in message, message
    assert "An error occurred" not in message and "\n" not in message and len(message) < 700 + 2 * len(str(directory))


def test_mixed_types_are_told_by_row(tmp_path):
    """datasets makes Json of such a column, and no error."""
    directory = write(tmp_path / "data", train=[{"text": "a"}, {"text": "b"}, {"text": {"c": 1}}])
    with pytest.raises(UserError, match=r"row 2 of the train split has \{'c': 1\} \(dict\) as 'text'"):
        wikitext(dataset_name_or_path=str(directory)).rows("train")


def test_splits_have_types_of_their_own(tmp_path):
    """datasets casts the cells of one split to the types of another: 7 to "7", and texts beside it into quotes."""
    validation = [{"text": "some words of a text"}, {"text": 7}]
    directory = write(tmp_path / "data", train=[{"text": "a"}], validation=validation)
    task = wikitext(dataset_name_or_path=str(directory))
    assert task.rows("train")["text"][:] == ["a"]
    with pytest.raises(UserError, match=r"row 1 of the validation split has 7 \(int\) as 'text'"):
        task.rows("validation")
    write(directory, validation=[{"text": "b"}, {"text": "c"}])
    both = wikitext(dataset_name_or_path=str(directory), train_split="train+validation[:1]")
    assert both.rows("train")["text"][:] == ["a", "b"]


def test_data_that_can_t_load_as_a_process(tmp_path):
    """One line alone on stderr: what datasets logs is in it, and no traceback."""
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "train.jsonl").write_text(GOOD + '{"text": "c\n')
    flags = ["--preset", "demo", "--dataset_name_or_path", directory, "--checkpoint_dir", tmp_path / "checkpoint"]
    outcome = run_process(["wikitext_gpt2/train.py", *flags], HF_HOME=str(tmp_path / "cache"))
    outcome.error("JSON parse error", str(directory / "train.jsonl"))
    assert not [path for path in contents(tmp_path) if path.startswith("checkpoint")]
