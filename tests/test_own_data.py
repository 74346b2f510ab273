"""Data that is not the preset's: files of each kind, columns by flag or found, a share held out, rows by number."""

import re

import pytest

from dailymail_t5.task import DailyMailTask
from influence_core.errors import UserError
from influence_core.experiments.arguments import parse
from swag_roberta.task import SwagTask
from tests.own_data import BLOCKS, PAIRS, QUESTIONS, SEVERAL, SIZES, TEXTS, documents, make_task, write
from tests.scripts import SHARED, run
from wikitext_gpt2.task import WikiTextTask

pytestmark = pytest.mark.usefixtures("datasets_cache")


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
    assert make_task(DailyMailTask, own, "--prompt_column", "article").source_prefix == "summarize: "
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


def test_a_file_with_tabs(tmp_path):
    """As a directory that holds it is read; quotes and commas are text."""
    lines = ["ask\treply"] + [f"{row['ask']}, or \t{row['reply']}" for row in PAIRS]
    (tmp_path / "mine.tsv").write_text("\n".join(lines) + "\n")
    flags = ["--prompt_column", "ask", "--answer_column", "reply"]
    rows = make_task(WikiTextTask, tmp_path / "mine.tsv", *flags).rows("train")
    assert rows[0] == {"prompt": f"{PAIRS[0]['ask']}, or ", "answer": PAIRS[0]["reply"]}


def test_why_a_file_is_not_read_is_said_with_what_to_do(tmp_path):
    """Cells apart by semicolons, a file that is not UTF-8, files of several datasets."""
    (tmp_path / "semicolons.csv").write_text("Frage (DE);Antwort;id\n" + "Wie?;So.;3\n" * 20)
    (tmp_path / "latin.csv").write_bytes("body,id\nGrüße,3\n".encode("latin-1") * 20)
    for name, column in (("a", "body"), ("b", "other")):
        write(tmp_path / "mixed" / f"{name}.jsonl", [{column: text} for text in TEXTS])
    for name, told in (
        ("semicolons.csv", "separated by ';'"), ("latin.csv", "save it as UTF-8"), ("mixed", "different columns")
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            make_task(WikiTextTask, tmp_path / name, "--text_column", "body").load_dataset("train")
