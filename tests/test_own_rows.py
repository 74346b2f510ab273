"""Rows of data of one's own: which are held out, which number each has, and what of them carries loss."""

import json
import re

import numpy as np
import pytest
import torch

from dailymail_t5.task import DailyMailTask
from influence_core.errors import UserError
from influence_core.runtime import Runtime
from influence_core.study import Study
from tests.own_data import PAIRS, SEVERAL, TEXTS, documents, make_task, write
from tests.studies import score
from tests.test_exactness import FLOAT64, relative_error
from wikitext_gpt2.task import WikiTextTask

pytestmark = pytest.mark.usefixtures("datasets_cache")

# ------------------------------------------------------------------------------------------------ what is held out


def test_no_row_is_trained_on_and_held_out(tmp_path):
    for number in (2, 9, 10, 11, 60):
        rows = [{"body": f"{text} {n}"} for n, text in enumerate(TEXTS[:number])]
        path = write(tmp_path / f"{number}.jsonl", rows)
        for flags in (["--one_row_one_example"], []):
            source = make_task(WikiTextTask, path, *flags).row_source
            parts = {split: source.part(split) for split in ("train", "validation")}
            numbers = {split: part.places.numbers.tolist() for split, part in parts.items()}
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


def test_rows_of_several_files_are_named_by_file(tmp_path):
    """Which one a row is in is nobody's guess: they are read in the order of their names, part10 before part2."""
    directory = tmp_path / "data"
    for part, start, end in (("part1", 0, 20), ("part10", 20, 37), ("part2", 37, 60)):
        write(directory / f"{part}.jsonl", [{"text": text} for text in TEXTS[start:end]])
    (directory / "part1a.jsonl").write_text("")
    task = make_task(WikiTextTask, directory, "--one_row_one_example")
    texts = [row["text"] for row in task.rows("train")]
    for index in (0, 20, 53):
        number, file = re.fullmatch(r"row (\d+) of (part\d+\.jsonl)", task.origin("train", index)).groups()
        assert json.loads((directory / file).read_text().splitlines()[int(number)])["text"] == texts[index]
    assert task.origin("validation", 0) == "row 9 of part1.jsonl"
    joined = make_task(WikiTextTask, directory, "--vocab_size", "300")
    named = {joined.origin("train", index) for index in range(len(joined.load_dataset("train")))}
    assert any(re.fullmatch(r"row 19 of part1.jsonl to row \d of part10.jsonl", name) for name in named)


@pytest.mark.parametrize("names", [("p[0].jsonl", "p[1].jsonl"), ("a*.csv", "b.csv"), ("a.csv", "b?.csv")])
def test_files_whose_names_are_patterns(names, tmp_path):
    for name in names:
        write(tmp_path / "data" / name, [{"text": f"text {n} of {name}"} for n in range(6)])
    task = make_task(WikiTextTask, tmp_path / "data", "--one_row_one_example")
    texts = task.rows("train")["text"][:]
    assert len(texts) == 10
    for index, text in enumerate(texts):
        assert task.origin("train", index) == text.replace("text", "row")


def test_a_file_with_a_header_only_is_no_error(tmp_path):
    """A row is then named by its number among all."""
    write(tmp_path / "data" / "a.csv", [{"text": text} for text in TEXTS[:20]])
    (tmp_path / "data" / "b.csv").write_text("text\n")
    task = make_task(WikiTextTask, tmp_path / "data", "--one_row_one_example")
    assert task.origin("train", 3) in ("row 3", "row 3 of a.csv")


def test_a_wrong_cell_is_named_by_file(tmp_path):
    for name, wrong in (("a", None), ("b", 3)):
        rows = [{"text": None if n == wrong else text} for n, text in enumerate(TEXTS[:8])]
        write(tmp_path / "data" / f"{name}.jsonl", rows)
    with pytest.raises(UserError, match="row 11 of the train split, row 3 of b.jsonl, has nothing"):
        make_task(WikiTextTask, tmp_path / "data").rows("train")


def test_how_many_texts_may_be_cut_is_known(tmp_path):
    """By stream and flag, the longest row of a question counting; blocks of joined texts are full by their making."""
    rows = [{"body": "a few words"}, {"body": "many words " * 40}, {"body": "more of them " * 40}]
    task = make_task(WikiTextTask, write(tmp_path / "d" / "x.jsonl", rows), "--one_row_one_example")
    assert task.full_examples(task.load_dataset("train")) == {"block_size": sum(
        len(task.tokenizer(row["body"])["input_ids"]) >= 32 for row in rows[: len(task.load_dataset("train"))]
    )}  # fmt: skip
    joined = make_task(WikiTextTask, write(tmp_path / "e" / "x.jsonl", rows))
    assert joined.full_examples(joined.load_dataset("train")) == {}
    rows = [dict(PAIRS[0], ask=ask, reply=reply) for ask in ("short", "long " * 60) for reply in ("yes", "no " * 30)]
    for split in ("train", "validation"):
        write(tmp_path / "p" / f"{split}.jsonl", rows)
    task = make_task(DailyMailTask, tmp_path / "p", "--prompt_column", "ask", "--answer_column", "reply")
    assert task.full_examples(task.load_dataset("train")) == {"max_source_length": 2, "max_target_length": 2}
