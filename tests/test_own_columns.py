"""Columns of data that is not the preset's: cells of .csv files, parts of cells, prompts and questions of several."""

import json

import pytest

from dailymail_t5.task import DailyMailTask
from influence_core.errors import UserError
from swag_roberta.task import SwagTask
from tests.own_data import QUESTIONS, TEXTS, make_task, write
from wikitext_gpt2.task import WikiTextTask

pytestmark = pytest.mark.usefixtures("datasets_cache")
ANSWERS = ["--prompt_column", "ask", "--answer_column", "reply"]


def rows_of(task, split="train"):
    return list(task.rows(split))


# ------------------------------------------------------------------------------------------------------- cells of .csv


@pytest.mark.parametrize("cells", [
    ["007", "1.50", "1e5", "-0"], ["True", "false", "TRUE", "no"], ["None", "NA", "null", "nan"],
    ["2020-01-01", "1/2/2020", " 7", "7 "], ["7", "x", "8", "9"],
], ids=["numbers", "booleans", "nothing", "dates and spaces", "mixed"])  # fmt: skip
def test_a_text_in_a_csv_is_what_is_written(cells, tmp_path):
    """pandas would make other texts of them, or none."""
    path = write(tmp_path / "mine.csv", [{"ask": "a", "reply": cell} for cell in cells * 3])
    task = make_task(WikiTextTask, path, *ANSWERS)
    assert sorted(row["answer"] for split in ("train", "validation") for row in rows_of(task, split)) == sorted(
        cells * 3
    )


def test_cells_that_change_their_kind_far_down(tmp_path):
    """After what pandas reads at once, which would be refused as another type: in a column that nobody reads."""
    rows = [{"id": n if n < 15_000 else f"x{n}", "body": "a text"} for n in range(20_000)]
    assert (
        len(make_task(WikiTextTask, write(tmp_path / "mine.csv", rows), "--text_column", "body").rows("train"))
        == 18_000
    )


def test_labels_in_a_csv_are_numbers(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("q,a,b,gold\n" + "why,this,that, 1\n" * 10 + "why,this,that,0\n" * 5)
    flags = ["--text_column", "q", "--ending_columns", "a", "b", "--label_column", "gold"]
    assert [row["label"] for row in rows_of(make_task(SwagTask, path, *flags))][8:11] == [1, 0, 0]
    path.write_text("q,a,b,gold\n" + "why,this,that,1\n" * 10 + "why,this,that,one\n" + "why,this,that,1\n" * 10)
    with pytest.raises(UserError, match="row 10 of the train split has 'one' .*: mend"):
        make_task(SwagTask, path, *flags).rows("train")


def test_files_of_other_columns_are_named(tmp_path):
    directory = tmp_path / "data"
    write(directory / "a.csv", [{"ask": "a", "reply": "b"}] * 5), write(directory / "b.csv", [{"ask": "a"}] * 5)
    with pytest.raises(UserError, match=r"b\.csv has the columns ask, and .*a\.csv others: ask, reply"):
        make_task(WikiTextTask, directory, *ANSWERS).rows("train")


def test_cells_beyond_the_header_of_any_file(tmp_path):
    """The second file's texts would be an index, and lost."""
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "a.csv").write_text("text\nHello\n" * 5)
    (directory / "b.csv").write_text("text\n" + "Hello, world\n" * 5)
    with pytest.raises(UserError, match=r"b\.csv have more cells than its header names"):
        make_task(WikiTextTask, directory).rows("train")


# ------------------------------------------------------------------------------------------------------ parts of cells

LISTS = [
    {"ctx": row["context"], "endings": [row["A"], row["B"], row["C"]], "key": "ABC"[row["gold"]], "n": row["gold"],
     "meta": {"digit": str(row["gold"]), "ways": {"text": [row["A"], row["B"], row["C"]]}}}
    for row in QUESTIONS
]  # fmt: skip
FLAT = ["--text_column", "context", "--ending_columns", "A", "B", "C", "--label_column", "gold"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("endings", ["endings", "meta.ways.text"])
@pytest.mark.parametrize("label", ["key", "n", "meta.digit"])
def test_endings_in_a_list(suffix, endings, label, tmp_path):
    """Of HellaSwag's, RACE's or ARC's shape, labels by number, digit or letter: the same examples as of columns."""
    flat = make_task(SwagTask, write(tmp_path / "flat.jsonl", QUESTIONS), *FLAT)
    named = ["--ending_columns", *(f"{endings}.{number}" for number in range(3))]
    path = write(tmp_path / f"mine{suffix}", LISTS)
    task = make_task(SwagTask, path, "--text_column", "ctx", *named, "--label_column", label)
    for split in ("train", "validation"):
        ours, theirs = (each.load_dataset(split, range(4)) for each in (task, flat))
        assert list(map(task.describe, ours)) == list(map(flat.describe, theirs))
        assert [example["label"] for example in ours] == [example["label"] for example in theirs]


def test_a_list_that_is_too_short_is_named(tmp_path):
    rows = LISTS[:7] + [LISTS[7] | {"endings": ["only", "two"]}] + LISTS[8:]
    flags = ["--text_column", "ctx", "--ending_columns", "endings.0", "endings.1", "endings.2", "--label_column", "key"]
    with pytest.raises(UserError, match="row 7 of the train split has nothing .* as 'endings.2'"):
        make_task(SwagTask, write(tmp_path / "mine.jsonl", rows), *flags).rows("train")


@pytest.mark.parametrize("wrong", ["endings.x", "meta.none", "meta.digit.0", "endings", "none.0"])
def test_parts_that_are_not_there(wrong, tmp_path):
    flags = ["--text_column", "ctx", "--ending_columns", "endings.0", wrong, "--label_column", "key"]
    told = "as 'endings', which has to be a text" if wrong == "endings" else (
        f"has no column '{wrong}' .*, only ctx, endings.0, key, n, meta.digit, meta.ways.text.0"
    )  # fmt: skip
    with pytest.raises(UserError, match=told):
        make_task(SwagTask, write(tmp_path / "mine.jsonl", LISTS), *flags).rows("train")


@pytest.mark.parametrize("label", ["D", "3", "d", "", "-1", "1.0", 3, -1, True, None])
def test_labels_that_are_no_ending(label, tmp_path):
    rows = LISTS[:7] + [LISTS[7] | {"key": label}] + LISTS[8:]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--text_column", "ctx", "--ending_columns", "endings.0", "endings.1", "endings.2", "--label_column", "key"]
    with pytest.raises(UserError, match="row 7 of the train split has .* from 0 to 2, or a letter from A to C"):
        make_task(SwagTask, tmp_path / "mine.jsonl", *flags).rows("train")


def test_a_chat_of_two(tmp_path):
    rows = [{"messages": [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:40]}]}
            for text in TEXTS]  # fmt: skip
    flags = ["--prompt_column", "messages.0.content", "--answer_column", "messages.1.content"]
    (row, *_) = rows_of(make_task(WikiTextTask, write(tmp_path / "mine.jsonl", rows), *flags))
    assert row == {"prompt": TEXTS[0][:20], "answer": TEXTS[0][20:40]}


# ------------------------------------------------------------------------------------------------- prompts of several


@pytest.mark.parametrize("task_class", [WikiTextTask, DailyMailTask])
def test_an_instruction_and_its_input(task_class, tmp_path):
    """Joined by the separator, without those that are blank or missing: as if they had been one column."""
    pairs = [("Add.", "1 and 2"), ("Say it.", ""), ("Speak.", None), ("Go.", "  ")] * 4
    several = [{"do": do, "with": with_, "out": "three"} for do, with_ in pairs]
    one = [{"do": "\n".join(part for part in pair if part and part.strip()), "out": "three"} for pair in pairs]
    others = ["--answer_column", "out", "--vocab_size", "300"]
    tasks = [
        make_task(task_class, write(tmp_path / f"{name}.jsonl", rows), "--prompt_column", *names, *others)
        for name, rows, names in (("several", several, ["do", "with"]), ("one", one, ["do"]))
    ]
    assert len(tasks[0].tokenizer)  # of its own parts, some of them missing
    tasks[0].tokenizer = tasks[1].tokenizer
    ours, theirs = ([list(map(int, example["input_ids"])) for example in task.load_dataset("train")] for task in tasks)
    assert ours == theirs and len(ours) == 14


def test_a_text_and_its_question(tmp_path):
    """Reading comprehension: a question of several columns; and SWAG's own two, named or not."""
    rows = [{"text": row["context"], "ask": "What then?"} | row for row in QUESTIONS]
    flags = ["--ending_columns", "A", "B", "C", "--label_column", "gold"]
    task = make_task(SwagTask, write(tmp_path / "mine.jsonl", rows), "--text_column", "text", "ask", *flags)
    assert task.describe(task.load_dataset("train")[0]).startswith(f"{rows[0]['text']} What then? …\n")
    own = [{"sent1": "A man sits.", "sent2": "He", "label": 1} | {f"ending{n}": f"goes {n}." for n in range(4)}] * 20
    path = write(tmp_path / "own.jsonl", own)
    first, named, short = (
        make_task(SwagTask, path, *given).choices(own[0])[0]
        for given in ([], ["--text_column", "sent1", "sent2"], ["--text_column", "sent1"])
    )
    assert first == named == ("A man sits.", "He goes 0.") and short == ("A man sits.", "goes 0.")


def test_rows_without_any_part_of_a_prompt(tmp_path):
    """A null is no prompt, of one column or of several."""
    rows = [{"do": "Add.", "with": "1 and 2", "out": "three"}] * 7 + [{"do": None, "with": " ", "out": "three"}]
    path = write(tmp_path / "mine.jsonl", rows + rows)
    for task_class in (WikiTextTask, DailyMailTask):
        flags = ["--prompt_column", "do", "with", "--answer_column", "out", "--vocab_size", "300"]
        with pytest.raises(UserError, match="row 7 of .* has nothing in any of 'do', 'with'"):
            list(make_task(task_class, path, *flags).load_dataset("train"))


# ---------------------------------------------------------------------------------------------------- what was guessed


def test_a_name_that_is_given_is_not_searched_for(tmp_path):
    """Though it is the task's own: another column would be taken."""
    path = write(tmp_path / "mine.jsonl", [{"question": "a", "answer": "b"}] * 20)
    for task_class, name in ((WikiTextTask, "prompt"), (DailyMailTask, "article")):
        with pytest.raises(UserError, match=f"has no column '{name}' .--prompt_column., only question, answer"):
            make_task(task_class, path, "--prompt_column", name, "--answer_column", "answer").rows("train")


def test_a_part_of_a_question_is_not_guessed(tmp_path):
    """SWAG has two: any other text would be taken for the one that is missing."""
    rows = [
        {"sent1": "A man sits.", "source": "gold-reuter", "label": 0} | {f"ending{n}": f"{n}." for n in range(4)}
    ] * 20
    path = write(tmp_path / "mine.jsonl", rows)
    with pytest.raises(UserError, match="has no column 'sent2', .*: name the one that is meant with --text_column"):
        make_task(SwagTask, path).rows("train")
    assert make_task(SwagTask, path, "--text_column", "sent1").choices(rows[0])[1] == ("A man sits.", "1.")


def test_letters_and_digits_are_not_mixed(tmp_path):
    """ARC counts some of its questions' endings from A and others from 1: no number tells which ending it is."""
    rows = [row | {"key": "1" if number % 5 == 2 else "B"} for number, row in enumerate(LISTS)]
    flags = ["--text_column", "ctx", "--ending_columns", "endings.0", "endings.1", "endings.2", "--label_column", "key"]
    with pytest.raises(UserError, match="'key' has letters in some rows and numbers in others"):
        make_task(SwagTask, write(tmp_path / "mine.jsonl", rows), *flags).rows("train")


def test_labels_that_count_from_one_are_noted(tmp_path, capsys):
    rows = [row | {"gold": 1 + row["gold"] % 2} for row in QUESTIONS]
    make_task(SwagTask, write(tmp_path / "mine.jsonl", rows), *FLAT).rows("train")
    assert "Note: no row is of class 0, from which classes count ('gold')" in capsys.readouterr().out
    make_task(SwagTask, write(tmp_path / "other.jsonl", QUESTIONS), *FLAT).rows("train")
    assert "class 0" not in capsys.readouterr().out


def test_endings_that_are_not_named_are_noted(tmp_path, capsys):
    flags = ["--text_column", "ctx", "--ending_columns", "endings.0", "endings.1", "--label_column", "n"]
    rows = [row | {"n": row["n"] % 2} for row in LISTS]
    make_task(SwagTask, write(tmp_path / "mine.jsonl", rows), *flags).rows("train")
    assert "Note: 40 rows have more parts than the 2 that are named ('endings') of" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- cells of several shapes


@pytest.mark.parametrize("more", [{"tool_calls": [1]}, {"name": "me"}])
def test_a_chat_whose_messages_have_other_fields(more, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"ask {n}"} | (more if n % 3 else {}),
                          {"role": "assistant", "content": f"say {n}"}]} for n in range(30)]  # fmt: skip
    flags = ["--prompt_column", "messages.0.content", "--answer_column", "messages.1.content"]
    (row, *_) = rows_of(make_task(WikiTextTask, write(tmp_path / "mine.jsonl", rows), *flags))
    assert row == {"prompt": "ask 0", "answer": "say 0"}


@pytest.mark.parametrize("path, told", [
    ("messages.0", "'messages.0' of .* is a dict: name the part of it that is meant"),
    ("messages.0.none", "has nothing .null."),
    ("messages.0.content", "is not of one kind in all rows, but list and str"), ("messages.7.content", "has nothing"),
    (f"messages.{10**20}", "has no column 'messages.1000"), ("mixed.0", "'mixed.0' of .* is not of one kind"),
])  # fmt: skip
def test_parts_of_several_shapes(path, told, tmp_path):
    rows = [{"messages": [{"role": "user", "content": ["ask"] if n % 4 == 1 else "ask"} | ({"x": 1} if n % 3 else {})],
             "mixed": ["x", 7] if n % 2 else [7, "x"]} for n in range(30)]  # fmt: skip
    with pytest.raises(UserError, match=told):
        make_task(WikiTextTask, write(tmp_path / "mine.jsonl", rows), "--text_column", path).rows("train")


def test_a_column_s_own_name_may_have_dots(tmp_path):
    rows = [{"m.i": {"q": text}, "a.b": "other"} for text in TEXTS]
    path = write(tmp_path / "mine.jsonl", rows)
    assert rows_of(make_task(WikiTextTask, path, "--text_column", "m.i.q"))[0] == {"text": TEXTS[0]}
    assert rows_of(make_task(WikiTextTask, path, "--text_column", "a.b"))[0] == {"text": "other"}


# --------------------------------------------------------------------------------------------- how a .csv is written


def directory_of(tmp_path, name, content, card=""):
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if card:
        (directory / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n{card}---\n"
        )
    return directory


@pytest.mark.parametrize("name, content, card", [
    ("train.tsv", "body\tid\n" + "a text, of two\t007\n" * 20, ""),
    ("train.csv", "body;id\n" + "a text, of two;007\n" * 20, "  sep: ';'\n"),
    ("train.csv", '"a text, of two",007\n' * 20, "  column_names: [body, id]\n"),
    ("train.csv", b"body,id\n" + b'"a text, of two",007\n' * 19 + b"h\xf6flich,007\n", "  encoding: latin-1\n"),
], ids=["tabs", "semicolons", "no header", "latin-1"])  # fmt: skip
def test_a_dataset_says_how_its_csv_is_written(name, content, card, tmp_path):
    directory = directory_of(tmp_path, name, content, card)
    texts = make_task(WikiTextTask, directory, "--text_column", "body").rows("train")["text"][:]
    assert texts[0] == "a text, of two"
    assert make_task(WikiTextTask, directory, "--text_column", "id").rows("train")["text"][0] == "007"


def test_a_column_of_true_and_false_is_no_text(tmp_path):
    """The only other one is found."""
    rows = [{"flag": ("True", "false")[n % 2], "body": text} for n, text in enumerate(TEXTS)]
    assert rows_of(make_task(WikiTextTask, write(tmp_path / "mine.csv", rows)))[0] == {"text": TEXTS[0]}


def test_labels_that_count_from_one_are_told_what_to_do(tmp_path):
    """Leaving those rows out that are beyond the last class would shift all others."""
    rows = [row | {"gold": 1 + row["gold"]} for row in QUESTIONS]
    with pytest.raises(UserError, match="they seem to count from 1: subtract 1 from all"):
        make_task(SwagTask, write(tmp_path / "mine.jsonl", rows), *FLAT).rows("train")
    rows[3]["gold"] = 0
    with pytest.raises(UserError, match="mend such rows"):
        make_task(SwagTask, write(tmp_path / "other.jsonl", rows), *FLAT).rows("train")


def test_letters_may_be_small(tmp_path):
    rows = [row | {"gold": "abc"[row["gold"]]} for row in QUESTIONS]
    task, plain = (make_task(SwagTask, write(tmp_path / f"{number}.jsonl", each), *FLAT)
                   for number, each in enumerate((rows, QUESTIONS)))  # fmt: skip
    labels = [[example["label"] for example in each.load_dataset("train")] for each in (task, plain)]
    assert labels[0] == labels[1]


def test_endings_may_be_numbered_in_braces(tmp_path):
    """In quotes, or where no shell expands them."""
    path, common = write(tmp_path / "mine.jsonl", LISTS), ["--text_column", "ctx", "--label_column", "key"]
    braces, plain = (make_task(SwagTask, path, *common, "--ending_columns", *names).rows("train")
                     for names in (["endings.{0..2}"], ["endings.0", "endings.1", "endings.2"]))  # fmt: skip
    assert braces[:] == plain[:]
