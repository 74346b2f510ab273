"""Data that is not the preset's: files of each kind, columns by flag or found, a share held out, rows by number."""

import csv
import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dailymail_t5.task import DailyMailTask
from influence_core.errors import UserError
from influence_core.experiments.arguments import parse
from influence_core.runtime import Runtime
from influence_core.study import Study
from influence_core.tasks.demo_corpus import demo_corpus, demo_questions
from swag_roberta.task import SwagTask
from tests.scripts import SHARED, run
from tests.studies import score
from tests.test_exactness import FLOAT64, relative_error
from wikitext_gpt2.task import WikiTextTask

TEXTS = [" ".join(part.split()) for text in demo_corpus().values() for part in text.split("\n\n")]
TEXTS = [text[:200] for text in TEXTS if len(text) > 60][:60]
PAIRS = [{"number": n, "ask": text[:30], "reply": text[30:70]} for n, text in enumerate(TEXTS)]
QUESTIONS = [
    {"context": row["sent1"], "A": row["ending0"], "B": row["ending1"], "C": row["ending2"],
     "gold": row["label"] % 3}
    for row in demo_questions("train")[:40]
]  # fmt: skip
BLOCKS = ["--config_overrides", "n_layer=1,n_embd=16,n_head=2,n_positions=32", "--block_size", "32"]
CHOICES = ["--config_overrides", "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=24"]
CHOICES += ["--max_length", "24"]
STREAMS = ["--config_overrides", "num_layers=1,d_model=16,d_ff=24,num_heads=2,d_kv=8"]
STREAMS += ["--max_source_length", "40", "--max_target_length", "12"]
SIZES = {WikiTextTask: BLOCKS, SwagTask: CHOICES, DailyMailTask: STREAMS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The datasets library's cache, out of the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    """The rows as a file of the kind that its name says."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("".join(row["body"] + "\n\n" for row in rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def documents(path):
    return write(path, [{"number": n, "body": text} for n, text in enumerate(TEXTS)])


def make_task(task_class, path, *flags):
    """As train.py makes it, with the demo's preset."""
    given = ["--preset", "demo", *SIZES[task_class], "--dataset_name_or_path", str(path), *flags]
    return task_class(**parse(task_class, "train", "", given).task)


def train(task_class, path, directory, *flags):
    common = ["--preset", "demo", "--checkpoint_dir", directory / "checkpoint"]
    new = ["--vocab_size", "400", *SIZES[task_class], "--num_train_epochs", "1"]
    out = run("train", *common, *new, "--dataset_name_or_path", path, *flags, task_class=task_class).ok()
    return out, [*common, "--output_dir", directory / "results"]


# -------------------------------------------------------------------------------------------------- files of each kind


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_is_all_it_takes(suffix, tmp_path):
    """Of one column of text, whatever its name: trained on, analyzed without a flag, its rows by number."""
    out, flags = train(WikiTextTask, documents(tmp_path / f"mine{suffix}"), tmp_path)
    num_rows = 120 if suffix == ".txt" else 60
    assert f"no validation split: the last {num_rows // 10} of its {num_rows} rows are held out" in out
    assert ("--text_column is 'body', the only column" in out) is (suffix != ".txt")
    out = run("analyze", *flags, "--factor_strategy", "identity", "--show_queries", "3").ok()
    (*_, last) = re.findall(r"Query \d \(rows? (?:\d+ to )?(\d+)\)", out)
    assert num_rows * 9 // 10 <= int(last) < num_rows
    assert re.search(r"Most influential training sequence \(identity\): \d+ \(rows? \d+", out)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "mine.xml").write_text("<a/>")
    for name, told in (("mine.xml", "is no file of .txt, .jsonl"), ("none.csv", "it is no local directory or file")):
        with pytest.raises(UserError, match=told):
            make_task(WikiTextTask, tmp_path / name).load_dataset("train")


def test_lines_keep_their_ends_where_they_are_joined(tmp_path):
    (tmp_path / "mine.txt").write_text("one\ntwo\n\nthree\n" * 5)
    rows = make_task(WikiTextTask, tmp_path / "mine.txt").rows("train")["text"]
    assert rows[:4] == ["one\n", "two\n", "\n", "three\n"]


@pytest.mark.parametrize("task_class, rows, flags, told", [
    (WikiTextTask, PAIRS, ["--prompt_column", "ask", "--answer_column", "reply"], ""),
    (WikiTextTask, PAIRS, ["--answer_column", "reply"], "--prompt_column is 'ask'"),
    (DailyMailTask, PAIRS, ["--prompt_column", "ask"], "--answer_column is 'reply'"),
    (SwagTask, QUESTIONS, ["--text_column", "context", "--ending_columns", "A", "B", "C"], "--label_column is 'gold'"),
    (SwagTask, QUESTIONS, ["--ending_columns", "A", "B", "C", "--label_column", "gold"], "--text_column is 'context'"),
], ids=["answers", "a prompt found", "a target found", "a label found", "a question found"])  # fmt: skip
def test_columns_by_flag_and_by_type(task_class, rows, flags, told, tmp_path):
    """A column that is not named is found where only one fits; every tenth row is held out."""
    out, common = train(task_class, write(tmp_path / "mine.jsonl", rows), tmp_path, *flags)
    assert told in out and f"every 10th, {len(rows) // 10} of its {len(rows)} rows are held out" in out
    out = run("analyze", *common, "--factor_strategy", "identity", task_class=task_class).ok()
    assert "Query 0 (row 9)" in out and f"({len(rows) // 10}, {len(rows) * 9 // 10}) [queries" in out


SEVERAL = [{"title": text[:20], "body": text} for text in TEXTS]
NOT_FOUND = {
    "two texts": (WikiTextTask, SEVERAL, [], "no column 'text', only title, body: .* with --text_column"),
    "no text": (WikiTextTask, [{"n": 1}, {"n": 2}], [], "no column 'text', only n: .* --text_column"),
    "no such": (WikiTextTask, SEVERAL, ["--text_column", "it"], r"no column 'it' \(--text_column\), only title, body"),
    "twice": (DailyMailTask, PAIRS, ["--prompt_column", "ask", "--answer_column", "ask"], "'ask' .* is wanted twice"),
    "both ways": (WikiTextTask, PAIRS, ["--text_column", "ask", "--answer_column", "reply"], "for whole texts, --prom"),
    "no pair": (DailyMailTask, PAIRS, [], "no column 'article', only number, ask, reply: .* --prompt_column"),
    "one ending": (SwagTask, QUESTIONS, ["--ending_columns", "A"], "two at least"),
    "no endings": (SwagTask, QUESTIONS, [], "no column 'sent1', only context, A, B, C, gold: .* --text_column"),
    "two questions": (SwagTask, QUESTIONS, ["--ending_columns", "A", "B"], "no column 'question', .* --text_column"),
    "two labels": (
        SwagTask,
        [row | {"id": 3} for row in QUESTIONS],
        ["--ending_columns", "A", "B", "C"],
        "no column 'label', .* --label_column",
    ),
}


@pytest.mark.parametrize("kind", NOT_FOUND)
def test_columns_that_can_t_be_found_are_asked_for(kind, tmp_path):
    task_class, rows, flags, told = NOT_FOUND[kind]
    with pytest.raises(UserError, match=told):
        make_task(task_class, write(tmp_path / "mine.jsonl", rows), *flags).load_dataset("train")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("task_class, rows, flags, cell, told", [
    (WikiTextTask, PAIRS, ["--text_column", "ask"], {"ask": None}, "has nothing"),
    (WikiTextTask, PAIRS, ["--text_column", "ask", "--one_row_one_example"], {"ask": "  "}, "'  ' .* not blank"),
    (WikiTextTask, PAIRS, ["--prompt_column", "ask", "--answer_column", "reply"], {"reply": " "}, "not blank"),
    (SwagTask, QUESTIONS, ["--text_column", "context", "--ending_columns", "A", "B", "C"], {"gold": 3}, "has 3"),
    (SwagTask, QUESTIONS, ["--text_column", "context", "--ending_columns", "A", "B", "C"], {"B": " "}, "not blank"),
], ids=["null", "blank row", "blank answer", "label", "blank ending"])  # fmt: skip
def test_wrong_cells_are_named_by_the_data_s_own_columns(suffix, task_class, rows, flags, cell, told, tmp_path):
    """By row in the file, though a share is held out."""
    rows = [row | cell if number == 25 else row for number, row in enumerate(rows)]
    (column,) = cell
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=rf"row 25 of the train split .*{told}") as error:
            make_task(task_class, write(tmp_path / f"mine{suffix}", rows), *flags).load_dataset(split)
        assert repr(column) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, told", [
    ("", "mine.jsonl is empty"), ('{"body": "a"}\n{"body": "b\n', "JSON parse error"),
    ('{"body": "a"}\n{"body": 7}\n', "row 1 .* 7"), ("\x00\x01", "JSON parse error"),
])  # fmt: skip
def test_damaged_files(content, told, tmp_path):
    (tmp_path / "mine.jsonl").write_text(content)
    flags = ["--vocab_size", "400", *BLOCKS, "--text_column", "body", "--checkpoint_dir", tmp_path / "checkpoint"]
    error = run("train", "--preset", "demo", "--dataset_name_or_path", tmp_path / "mine.jsonl", *flags).error()
    assert re.search(told, error)


def test_a_file_s_name_is_no_pattern(tmp_path):
    """Nor a directory's: another file would be read."""
    write(tmp_path / "run1.jsonl", [{"text": "the wrong file"}] * 20)
    path = write(tmp_path / "run[1].jsonl", [{"text": "the right file"}] * 20)
    assert set(make_task(WikiTextTask, path).rows("train")["text"]) == {"the right file"}


def test_rows_of_more_cells_than_the_header_names(tmp_path):
    """A comma that is not quoted: the cell's beginning would be an index, and lost."""
    (tmp_path / "mine.csv").write_text("text\n" + "Hello, world\n" * 20)
    with pytest.raises(UserError, match="have more cells than its header names: quote cells with commas"):
        make_task(WikiTextTask, tmp_path / "mine.csv").rows("train")


def test_texts_that_look_like_nothing(tmp_path):
    """ "None" and "NA" are answers; an empty cell is none."""
    path = write(tmp_path / "mine.csv", [{"ask": "a", "reply": text} for text in ("None", "NA", "null", "nan") * 3])
    flags = ["--prompt_column", "ask", "--answer_column", "reply"]
    assert set(make_task(WikiTextTask, path, *flags).rows("train")["answer"]) == {"None", "NA", "null", "nan"}


def test_a_mark_at_a_text_s_beginning_is_no_text(tmp_path):
    (tmp_path / "mine.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode() * 1 + b"three\n" * 5)
    assert make_task(WikiTextTask, tmp_path / "mine.txt").rows("train")["text"][0].strip() == "one"


def test_files_that_are_not_read_are_named(tmp_path, capsys):
    """The datasets library reads those of one kind only."""
    directory = tmp_path / "data"
    for name in ("a.jsonl", "b.jsonl"):
        write(directory / name, PAIRS)
    (directory / "notes.txt").write_text("a note\n")
    assert len(make_task(WikiTextTask, directory, "--text_column", "ask").rows("train")) == 108
    assert (
        f"Note: files of {directory} that are not read, as others are of another kind: notes.txt"
        in capsys.readouterr().out
    )


def test_several_configurations_are_listed(tmp_path):
    directory = tmp_path / "data"
    write(directory / "a.jsonl", PAIRS), write(directory / "b.jsonl", PAIRS)
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n---\n"
    )
    with pytest.raises(UserError, match="several configurations, name one with --dataset_config: one, two"):
        make_task(WikiTextTask, directory, "--text_column", "ask").rows("train")
    assert (
        len(make_task(WikiTextTask, directory, "--text_column", "ask", "--dataset_config", "two").rows("train")) == 54
    )


# ---------------------------------------------------------------------------------------- what belongs to a dataset


def flags_of(task_class, script, *given):
    return parse(task_class, script, "", list(map(str, given))).task


def test_a_preset_s_config_is_its_dataset_s(tmp_path):
    """And of a copy of it, where the copy has that config."""
    own = documents(tmp_path / "mine.jsonl")
    assert flags_of(WikiTextTask, "train")["dataset_config"] == "wikitext-2-raw-v1"
    assert flags_of(WikiTextTask, "train", "--dataset_name_or_path", own)["dataset_config"] is None
    given = ["--dataset_name_or_path", own, "--dataset_config", "mine"]
    assert flags_of(WikiTextTask, "train", *given)["dataset_config"] == "mine"
    assert make_task(DailyMailTask, own).source_prefix == "summarize: "
    assert make_task(DailyMailTask, own, "--prompt_column", "ask").source_prefix == ""
    assert make_task(DailyMailTask, own, "--prompt_column", "a", "--source_prefix", "x: ").source_prefix == "x: "
    directory = tmp_path / "copy"
    write(directory / "train.jsonl", PAIRS), write(directory / "none.jsonl", PAIRS)
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: other\n  data_files: none.jsonl\n- config_name: wikitext-2-raw-v1\n"
        "  data_files: train.jsonl\n---\n"
    )
    task = make_task(WikiTextTask, directory, "--text_column", "ask")
    assert task.row_source.config == "wikitext-2-raw-v1" and len(task.rows("train")) == 54


@pytest.mark.skipif(not (SHARED / "data" / "swag").is_dir(), reason="no SWAG in ../shared/data")
def test_a_local_copy_needs_no_config():
    assert make_task(SwagTask, SHARED / "data" / "swag").row_source.config == "regular"


def test_columns_of_a_checkpoint_stay(tmp_path):
    """analyze.py takes what train.py noted: which columns there are decides what carries loss, of other data too."""
    _, flags = train(WikiTextTask, write(tmp_path / "mine.jsonl", SEVERAL), tmp_path, "--text_column", "body")
    common = flags[:4]
    assert flags_of(WikiTextTask, "analyze", *common)["text_column"] == "body"
    same = [*common, "--dataset_name_or_path", tmp_path / "mine.jsonl"]
    assert flags_of(WikiTextTask, "analyze", *same)["text_column"] == "body"
    other = [*common, "--dataset_name_or_path", documents(tmp_path / "other.jsonl")]
    assert flags_of(WikiTextTask, "analyze", *other)["text_column"] == "body"


# ------------------------------------------------------------------------------------------------ what is held out


def test_no_row_is_trained_on_and_held_out(tmp_path):
    for number in (2, 9, 10, 11, 60):
        rows = [{"body": f"{text} {n}"} for n, text in enumerate(TEXTS[:number])]
        path = write(tmp_path / f"{number}.jsonl", rows)
        for flags in (["--one_row_one_example"], []):
            source = make_task(WikiTextTask, path, *flags).row_source
            parts = {split: source.part(split) for split in ("train", "validation")}
            numbers = {split: [row for _, row in part.places] for split, part in parts.items()}
            assert sorted([*numbers["train"], *numbers["validation"]]) == list(range(number))
            assert len(parts["validation"]) == -(-number // 10)
            for split, part in parts.items():
                assert part.rows["text"][:] == [rows[n]["body"] for n in numbers[split]]
    with pytest.raises(UserError, match=r"too few rows \(1\) to hold one out"):
        make_task(WikiTextTask, write(tmp_path / "one.jsonl", SEVERAL[:1]), "--text_column", "body").rows("train")


def test_what_is_for_validation_is_not_held_out(tmp_path, capsys):
    """A split of its own, or one that was asked for."""
    directory = tmp_path / "data"
    write(directory / "train.jsonl", PAIRS), write(directory / "test.jsonl", PAIRS[:7])
    flags = ["--text_column", "ask", "--one_row_one_example"]
    task = make_task(WikiTextTask, directory, *flags, "--validation_split", "test")
    assert (len(task.load_dataset("train")), len(task.load_dataset("validation"))) == (60, 7)
    write(directory / "validation.jsonl", PAIRS[:5])
    task = make_task(WikiTextTask, directory, *flags)
    assert (len(task.load_dataset("train")), len(task.load_dataset("validation"))) == (60, 5)
    assert "held out" not in capsys.readouterr().out


def test_rows_of_a_part_have_their_numbers_in_the_whole(tmp_path, capsys):
    """Of a split, and with its name where there are several; rows that are in both are told."""
    directory = tmp_path / "data"
    write(directory / "train.jsonl", PAIRS), write(directory / "test.jsonl", PAIRS[:7])
    flags = ["--text_column", "ask", "--one_row_one_example", "--train_split", "train[50%:]+test[2:]"]
    task = make_task(WikiTextTask, directory, *flags, "--validation_split", "train[10:34]")
    assert len(task.load_dataset("train")) == 35 and len(task.load_dataset("validation")) == 24
    assert [task.origin("train", index) for index in (0, 29, 30, 34)] == [
        "row 30 of train", "row 59 of train", "row 2 of test", "row 6 of test",
    ]  # fmt: skip
    assert task.origin("validation", 0) == "row 10" and task.rows("validation")["text"][0] == PAIRS[10]["ask"]
    assert "Note: 4 rows are in the training set and among the queries" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- rows, prompts and answers


def words(task):
    """A tokenizer of whole words, in which 0 ends and 1 begins a text."""
    known = {}

    def encode(texts, truncation=False, max_length=None, add_special_tokens=True, verbose=True):
        rows = [[known.setdefault(word, len(known) + 2) for word in text.split()] for text in texts]
        rows = [[1, *row, 0] if add_special_tokens else row for row in rows]
        return {"input_ids": [row[:max_length] if truncation else row for row in rows]}

    encode.bos_token_id, encode.eos_token_id = 1, 0
    task.tokenizer = encode
    return task


@pytest.mark.parametrize("room, expected", [
    (9, [1, 2, 3, 4, 5, 6, 0]), (7, [1, 2, 3, 4, 5, 6, 0]), (6, [1, 3, 4, 5, 6, 0]), (5, [1, 4, 5, 6, 0]),
    (4, [4, 5, 6, 0]), (3, [4, 5, 6]), (2, [4, 5]),
])  # fmt: skip
def test_an_answer_follows_its_prompt_and_carries_all_loss(room, expected, tmp_path):
    """Where both are too long, the prompt loses its beginning; an end that the tokenizer sets after it is no part."""
    path = write(tmp_path / "mine.jsonl", [{"ask": "a b c", "reply": "d e"}] * 2)
    flags = ["--prompt_column", "ask", "--answer_column", "reply", "--separator", " ", "--block_size", str(room)]
    (example,) = words(make_task(WikiTextTask, path, *flags)).load_dataset("train")
    assert example["input_ids"].tolist() == expected
    answered = [token if token in (5, 6, 0) else -100 for token in expected]
    assert example["labels"].tolist() == answered


def test_the_loss_of_answers_is_that_of_single_examples(tmp_path):
    """Of the answer alone, given all before it, whatever pads the batch: loss and scores."""
    path = write(tmp_path / "mine.jsonl", PAIRS[:20])
    task = make_task(WikiTextTask, path, "--prompt_column", "ask", "--answer_column", "reply", "--vocab_size", "400")
    torch.manual_seed(0)
    model = task.load_model(None).double().eval()
    examples = task.load_dataset("train")

    def own(example):
        logits = model(example["input_ids"][None]).logits[0, :-1]
        answer = example["labels"][1:] != -100
        assert 0 < answer.sum() < len(answer)
        return torch.nn.functional.cross_entropy(logits[answer], example["labels"][1:][answer], reduction="sum")

    batch = task.collate(examples[:5])
    assert relative_error(task.train_loss(model, batch), sum(map(own, examples[:5]))) < 1e-12
    layer = model.transformer.h[0].mlp.c_fc
    expected = []
    for example in [*task.load_dataset("validation"), *examples]:
        gradients = torch.autograd.grad(own(example), [layer.weight, layer.bias])
        expected.append(torch.cat([gradient.flatten() for gradient in gradients]))
    expected = torch.stack(expected)
    task.tracked_layers = "mlp.c_fc"
    study = Study(task, model, list(examples), tmp_path / "results", Runtime(precision=FLOAT64))
    scores = score(study, ["identity"])["identity"]
    number = len(task.load_dataset("validation"))
    assert relative_error(scores, expected[:number] @ expected[number:].T) < 1e-9


def test_a_prompt_ends_before_its_answer(tmp_path):
    """By default with a line break, so that the two don't run into each other."""
    path = write(tmp_path / "mine.jsonl", [{"ask": "What is it?", "reply": "A text."}] * 2)
    for flags, expected in (([], "What is it?\nA text."), (["--separator", " = "], "What is it? = A text.")):
        flags = ["--prompt_column", "ask", "--answer_column", "reply", "--vocab_size", "300", *flags]
        task = make_task(WikiTextTask, path, *flags)
        assert task.text(task.load_dataset("train")[0]["input_ids"]) == expected


def test_a_row_that_is_too_short_is_named(tmp_path):
    rows = [{"body": "x" if n == 8 else text} for n, text in enumerate(TEXTS)]
    flags = ["--one_row_one_example", "--vocab_size", "300", "--train_split", "train[5:]"]
    task = make_task(WikiTextTask, write(tmp_path / "mine.jsonl", rows), *flags)
    with pytest.raises(UserError, match=r"row 8 of \S+ has 'x', a text of 1 tokens"):
        list(task.load_dataset("train"))


def test_joined_rows_end(tmp_path):
    """Before the next one begins."""
    task = make_task(WikiTextTask, write(tmp_path / "mine.jsonl", [{"body": "one two"}] * 40), "--vocab_size", "300")
    assert "two\none" in task.describe(task.load_dataset("train")[0])


def test_a_row_is_an_example_that_she_knows(tmp_path):
    """Cut to the block's size, in the order of the file; what is in a .txt file between two blank lines is a row."""
    for suffix in (".jsonl", ".txt"):
        task = words(make_task(WikiTextTask, documents(tmp_path / f"mine{suffix}"), "--one_row_one_example"))
        examples = task.load_dataset("train")
        assert len(examples) == 54 and task.holds_out_the_end is False
        numbers = [number for number in range(60) if number % 10 != 9]
        for index in (0, 8, 9, 53):
            row = numbers[index] * (2 if suffix == ".txt" else 1)
            assert task.origin("train", index) == f"row {row}"
            expected = task.tokenizer([TEXTS[numbers[index]]])["input_ids"][0][: task.block_size]
            np.testing.assert_array_equal(examples[index]["input_ids"], expected)


def test_a_block_says_of_which_rows_it_is(tmp_path):
    """By the tokens of each row, over the bounds of what is tokenized at once."""
    task = words(make_task(WikiTextTask, documents(tmp_path / "mine.jsonl")))
    task.rows_at_once = 7
    blocks = task.load_dataset("train")
    rows = [task.tokenizer([text])["input_ids"][0] for text in TEXTS[:54]]
    for start in range(0, 54, 7):
        part = [(token, start + n) for n, row in enumerate(rows[start : start + 7]) for token in row]
        for at in range(0, len(part) - 31, 32):
            index = next(
                i for i, block in enumerate(blocks) if block["input_ids"].tolist() == [t for t, _ in part[at : at + 32]]
            )
            first, last = part[at][1], part[at + 31][1]
            assert task.origin("train", index) == (f"row {first}" if first == last else f"rows {first} to {last}")
