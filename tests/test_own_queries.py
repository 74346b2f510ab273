"""Queries of the user's own, and sums, by analyze.py and by the scripts that take scores."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dailymail_t5.task import DailyMailTask
from influence_core.errors import UserError
from influence_core.experiments.arguments import parse
from influence_core.files import read_sealed_json, write_sealed_json
from influence_core.fingerprints import dataset_fingerprint
from influence_core.tasks.demo_corpus import demo_questions
from influence_core.tasks.own_queries import read_queries
from swag_roberta.task import SwagTask
from tests.own_data import PAIRS, QUESTIONS, SIZES, TEXTS, make_task, write
from tests.scripts import NUM_QUERIES, NUM_TRAIN, TRAIN, contents, run, run_process
from tests.test_torchrun import TORCHRUN
from wikitext_gpt2.task import WikiTextTask

SCORES = "pairwise_scores.safetensors"
IDENTITY = ["--factor_strategy", "identity"]
ANALYZE = ["--preset", "demo", "--num_train", f"{NUM_TRAIN}", "--track", "blocks"]


def analyze(checkpoint, output, *flags, strategies=IDENTITY):
    return run("analyze", *ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", output, *strategies, *flags)


def stored(output, pattern="scores_identity_queries-*"):
    """(scores, settings) of the one directory of that name."""
    (directory,) = output.glob(pattern)
    manifest = json.loads((directory / "pairwise_scores.json").read_text())
    return load_file(directory / SCORES)["all_modules"], manifest["settings"]


# ------------------------------------------------------------------------------------- what they are, and what is asked

NUMBERED = [{**row, "number": str(row["number"])} for row in PAIRS]
SAME_ROWS = {  # the rows of a dataset's validation split, given as one's own: of each kind of task
    "texts": (WikiTextTask, [{"body": text} for text in TEXTS], ["--one_row_one_example"]),
    "answers": (WikiTextTask, PAIRS, ["--prompt_column", "ask", "--answer_column", "reply"]),
    "several columns": (WikiTextTask, NUMBERED, ["--prompt_column", "ask", "number", "--answer_column", "reply"]),
    "summaries": (DailyMailTask, PAIRS, ["--prompt_column", "ask", "--answer_column", "reply"]),
    "questions": (SwagTask, QUESTIONS, ["--text_column", "context", "--ending_columns", "A", "B", "C"]),
    "nested": (SwagTask, [{"q": row["context"], "endings": [row["A"], row["B"]], "gold": "AB"[row["gold"] % 2]}
                          for row in QUESTIONS],
               ["--text_column", "q", "--ending_columns", "endings.0", "endings.1", "--label_column", "gold"]),
}  # fmt: skip


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("case", SAME_ROWS)
def test_they_are_made_into_examples_as_the_datas_rows_are(case, tmp_path):
    """The same rows give the same examples, by columns that were named and those that were found."""
    task_class, rows, flags = SAME_ROWS[case]
    task = make_task(task_class, write(tmp_path / "data.jsonl", rows), *flags)
    expected = task.load_dataset("validation")
    held_out = [rows[task.row_source.part("validation").places[index][1]] for index in range(len(expected))]
    queries = read_queries(task, None, str(write(tmp_path / "own.jsonl", held_out)))
    assert dataset_fingerprint(queries.examples) == dataset_fingerprint(expected)
    assert queries.origins[1] == f"line 2 of {tmp_path / 'own.jsonl'}"


def test_a_text_is_one_example_where_the_datas_are_joined(checkpoint, tmp_path):
    """Its own tokens, neither joined nor padded."""
    task = WikiTextTask(**vars_of(checkpoint))
    task.checkpoint_dir = str(checkpoint)
    texts = ["The first text.", "Another one, of more words than the first"]
    queries = read_queries(task, texts, None)
    for example, text in zip(queries.examples, texts):
        assert example["input_ids"].tolist() == task.tokenizer(text)["input_ids"] and list(example) == ["input_ids"]


def vars_of(checkpoint):
    return parse(WikiTextTask, "analyze", "", ["--preset", "demo", "--checkpoint_dir", str(checkpoint)]).task


def test_their_scores_are_those_of_the_same_examples(tmp_path):
    """From end to end: a validation set, and its rows as one's own, with stored factors that are used again."""
    rows = [{"body": text} for text in TEXTS]
    data, place = write(tmp_path / "data.jsonl", rows), ["--preset", "demo", "--checkpoint_dir", tmp_path / "c"]
    flags = ["--one_row_one_example", "--dataset_name_or_path", data]
    run("train", *place, *SIZES[WikiTextTask], "--vocab_size", "400", "--num_train_epochs", "1", *flags).ok()
    common = [*place, "--output_dir", tmp_path / "out", "--factor_strategy", "ekfac"]
    run("analyze", *common).ok()
    held_out = write(tmp_path / "own.jsonl", rows[9::10])
    out = run("analyze", *common, "--query_file", held_out).ok()
    assert out.count("Found finished") == 3 and re.search(r"Fit Lambda +\| - +\| 0 ", out)
    expected, settings = stored(tmp_path / "out", "scores_ekfac")
    scores, own = stored(tmp_path / "out", "scores_ekfac_queries-*")
    assert torch.equal(scores, expected)
    assert own["own_queries"] is True and settings["own_queries"] is None
    assert {key: value for key, value in own.items() if key != "own_queries"} == {
        key: value for key, value in settings.items() if key != "own_queries"
    }


# ------------------------------------------------------------------------------------------- what is printed and stored


def test_several_sets_lie_side_by_side(checkpoint, tmp_path):
    """Each is found finished when asked for again, by whichever flag; each query is shown with its top sequence."""
    first = analyze(checkpoint, tmp_path, "--query_text", "class definitions", "the assignment statement").ok()
    for number, text in enumerate(["class definitions", "the assignment statement"]):
        assert f"Query {number} (text {number + 1} of --query_text)\n  | {text}\n  Most influential" in first
    analyze(checkpoint, tmp_path, "--query_text", "class definitions").ok()
    directories = sorted(path.name for path in tmp_path.glob("scores_*"))
    assert len(directories) == 2 and all(re.fullmatch(r"scores_identity_queries-[0-9a-f]{8}", x) for x in directories)
    before = contents(tmp_path)
    file = tmp_path.parent / f"{tmp_path.name}.jsonl"
    write(file, [{"text": "class definitions"}, {"text": "the assignment statement"}])
    again = analyze(checkpoint, tmp_path, "--query_file", file).ok()
    assert "Found finished" in again and f"Query 1 (line 2 of {file})" in again
    assert contents(tmp_path) == before
    scores, _ = stored(tmp_path, re.search(r"scores_identity_queries-\w+", again)[0])
    best = scores.argmax(1).tolist()
    assert [int(x) for x in re.findall(r"sequence \(identity\): (\d+)", again)] == best


class OfTwo(WikiTextTask):
    presets = {"of_two": WikiTextTask.presets["demo"] | {"num_queries": 2, "factor_strategy": ["identity"]}}


def test_how_many_are_shown_and_used(checkpoint, tmp_path):
    """Twenty by default; --num_queries means the first so many, and no preset's number cuts them."""
    file = write(tmp_path / "own.jsonl", [{"text": f"statement number {n}"} for n in range(23)])
    out = analyze(checkpoint, tmp_path / "out", "--query_file", file, "--num_queries", "22").ok()
    assert out.count("\nQuery ") == 20 and "2 more queries are not shown (--show_queries 22 shows all)" in out
    assert stored(tmp_path / "out")[0].shape == (22, NUM_TRAIN)
    flags = ["--preset", "of_two", "--num_train", NUM_TRAIN, "--checkpoint_dir", checkpoint]
    flags += ["--output_dir", tmp_path / "all", "--query_file", file, "--show_queries", "1"]
    out = run("analyze", *flags, task_class=OfTwo).ok()
    assert out.count("\nQuery ") == 1 and "(23, 64)" in out


def test_blank_lines_and_marks_count_as_lines_only(checkpoint, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one statement"}\r\n\n{"text": "another statement", "more": 3}')
    out = analyze(checkpoint, tmp_path / "out", "--query_file", file).ok()
    assert f"(line 1 of {file})" in out and f"(line 3 of {file})" in out


def test_texts_that_are_too_long_are_cut_and_said(checkpoint, tmp_path):
    """Those that are as long as they may be are not."""
    task = WikiTextTask(**vars_of(checkpoint))
    task.checkpoint_dir = str(checkpoint)
    text = "\n".join(TEXTS)
    fitting = task.tokenizer.decode(task.tokenizer(text)["input_ids"][: task.block_size])
    assert task.cut_rows([{"text": fitting}, {"text": text}]) == {"block_size": [1]}
    out = analyze(checkpoint, tmp_path, "--query_text", text, "a short one").ok()
    assert "longer than --block_size 32 are cut, as the data's texts are: text 1 of --query_text\n" in out


@pytest.mark.usefixtures("datasets_cache")
def test_which_part_is_too_long_is_told_by_its_flag(tmp_path):
    pairs = write(tmp_path / "data.jsonl", PAIRS)
    task = make_task(DailyMailTask, pairs, "--prompt_column", "ask", "--answer_column", "reply")
    rows = [{"article": "a", "highlights": " ".join(TEXTS)}, {"article": " ".join(TEXTS), "highlights": "a"}]
    assert task.cut_rows(rows) == {"max_source_length": [1], "max_target_length": [0]}


def test_every_checkpoint_of_a_training_and_half_precision(tmp_path):
    """As for the data's queries, a directory in each; sums too."""
    place = ["--checkpoint_dir", tmp_path / "checkpoint"]
    run("train", *TRAIN, *place, "--save_at", "0.5").ok()
    text = ["--query_text", "class definitions", "assignment"]
    flags = [*text, "--checkpoints", "all", "--use_half_precision"]
    analyze(place[1], tmp_path / "out", *flags).ok()
    analyze(place[1], tmp_path / "out", *flags, "--sum_queries").ok()
    rows, _ = stored(tmp_path / "out", "scores_identity_half_queries-????????")
    total, settings = stored(tmp_path / "out", "scores_identity_half_queries-*_sum")
    assert len(settings["checkpoints"]) == 2 and total.shape == (1, NUM_TRAIN)
    torch.testing.assert_close(total[0], rows.sum(0), rtol=0.02, atol=0.02 * float(rows.abs().max()))
    assert len(list((tmp_path / "out").glob("step-*/scores_identity_half_queries-*"))) == 4


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("track", ["blocks", "all"])
def test_an_adapter_and_a_sum(track, masked_checkpoint, tmp_path):
    """Of questions, whose endings are summed within an example too."""
    directory, rows = masked_checkpoint
    file = write(tmp_path / "own.jsonl", rows)
    flags = ["--preset", "demo", "--checkpoint_dir", directory, "--output_dir", tmp_path / "out", "--num_train", "40"]
    flags += ["--query_file", file, "--factor_strategy", "ekfac", "--track", track]
    out = run("analyze", *flags, task_class=SwagTask).ok()
    assert "-> " in out
    out = run("analyze", *flags, "--sum_queries", task_class=SwagTask).ok()
    assert "Most influential training sequences (ekfac) for 3 queries together" in out
    assert "(1, 40) [sum of 3 queries, training examples]" in out
    rows, _ = stored(tmp_path / "out", "scores_ekfac_queries-????????")
    total, _ = stored(tmp_path / "out", "scores_ekfac_queries-*_sum")
    torch.testing.assert_close(total[0], rows.sum(0), rtol=1e-3, atol=1e-4 * float(rows.abs().max()))


@pytest.fixture(scope="module")
def masked_checkpoint(tmp_path_factory):
    """(an adapter on a model for SWAG's questions, three questions)"""
    directory = tmp_path_factory.mktemp("swag")
    base = ["--preset", "demo", *SIZES[SwagTask], "--vocab_size", "400", "--num_train", "40", "--num_train_epochs", "0"]
    run("train", *base, "--checkpoint_dir", directory / "base", task_class=SwagTask).ok()
    adapter = ["--preset", "demo", "--max_length", "24", "--num_train", "40", "--num_train_epochs", "1"]
    adapter += ["--model_name_or_path", directory / "base", "--lora_rank", "2", "--config_overrides", ""]
    run("train", *adapter, "--checkpoint_dir", directory / "adapter", task_class=SwagTask).ok()
    return directory / "adapter", [
        {k: v for k, v in row.items() if k != "topic"} for row in demo_questions("train")[:3]
    ]


@pytest.mark.slow
def test_own_queries_and_their_sum_under_torchrun(checkpoint, tmp_path):
    """Each process reads them; one prints; the scores are those of one process."""
    file = write(tmp_path / "own.jsonl", [{"text": text} for text in TEXTS[:5]])
    for flags in ([], ["--sum_queries"]):
        common = [
            *ANALYZE,
            *IDENTITY,
            "--checkpoint_dir",
            checkpoint,
            "--query_file",
            file,
            *flags,
        ]
        two = [*TORCHRUN, "wikitext_gpt2/analyze.py", *common, "--output_dir", tmp_path / "two", "--use_ddp"]
        assert run_process(two).ok().count("training examples] in") == 1
        run("analyze", *common, "--output_dir", tmp_path / "one").ok()
        pattern = "scores_identity_queries-" + ("*_sum" if flags else "????????")
        one, two = (stored(tmp_path / name, pattern)[0] for name in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


# -------------------------------------------------------------------------------------------------------- what is wrong

LINES = {
    '{"text": 3}': "line 2 of {file} has 3 (int) as 'text', which has to be a text",
    '{"text": null}': "line 2 of {file} has nothing (null) as 'text'",
    '{"text": ["a b"]}': "has ['a b'] (list) as 'text'",
    '{"txt": "a b"}': "line 2 of {file} has no field 'text', only txt: write {{\"text\": …}}",
    "{}": "line 2 of {file} has no field 'text': write",
    '{"text": ""}': "line 2 of {file} has no text",
    '{"text": " \\n "}': "line 2 of {file} has no text",
    '{"text": "a"}': "line 2 of {file} has 'a', a text of 1 tokens",
    '{"text": "\\ud800 and more"}': "half of a pair of surrogates",
    "nope": "line 2 of {file} is no JSON (Expecting value at column 1)",
    '{"text": "a b"': "line 2 of {file} is no JSON",
    '["a b"]': "line 2 of {file} is ['a b'] (list) and no JSON object",
    "3": "is 3 (int) and no JSON object",
    "[" * 100_000: "line 2 of {file} is no JSON",
    '{"text": "caf\xe9"}'.encode("latin-1"): "line 2 of {file} is no text in UTF-8: save it as UTF-8",
    b'{"text": "a \x00b"': "is no JSON",
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: str(line)[:30])
def test_a_line_that_is_wrong(line, checkpoint, tmp_path):
    """Refused by its number, before anything is made."""
    file = tmp_path / "own.jsonl"
    file.write_bytes(b'{"text": "one statement"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    told = LINES[line].format(file=file)
    analyze(checkpoint, tmp_path / "out", "--query_file", file).error(told)
    assert not (tmp_path / "out").exists()


FILES = {
    "empty": ("", "is empty: write a line of JSON"),
    "blank": ("\n \n", "is empty"),
    "none": (None, "is not there"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_query(name, checkpoint, tmp_path):
    content, told = FILES[name]
    file = tmp_path / "own.jsonl"
    if content is not None:
        file.write_text(content)
    analyze(checkpoint, tmp_path / "out", "--query_file", file).error(f"--query_file {file} {told}")


FLAGS = [
    (["--query_text", "a b c", "--query_file", "x"], "both given"),
    (["--query_text"], "at least one argument"),
    (["--query_text", "a b c", ""], "--query_text is empty"),
    (["--query_text", "x"], "text 1 of --query_text has 'x', a text of 1 tokens"),
    (
        ["--query_text", "a b c", "--num_queries", "2"],
        "--num_queries 2 is larger than the set of queries in --query_text",
    ),
    (["--query_text", "a \udcff"], "no text in UTF-8"),
    (["--query_file", ""], "--query_file is empty"),
    (["--query_file", "/"], "is no file"),
    (["--query_file", "x" * 300], "too long for the name of a file"),
    (["--scores_suffix", "sum"], "other than half, sum or queries-"),
    (["--scores_suffix", "sum_a"], "other than half, sum or queries-"),
    (["--scores_suffix", "queries-12345678"], "other than half, sum or queries-"),
]


@pytest.mark.parametrize(
    "flags, told", FLAGS, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_flags_that_are_wrong(flags, told, checkpoint, tmp_path):
    analyze(checkpoint, tmp_path / "out", *flags).error(told)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("task_class, flags, rows, fields", [
    (WikiTextTask, ["--prompt_column", "ask", "--answer_column", "reply"], PAIRS, "ask, reply"),
    (DailyMailTask, ["--prompt_column", "ask"], [{"ask": r["ask"], "reply": r["reply"]} for r in PAIRS], "ask, reply"),
    (SwagTask, ["--text_column", "context", "--ending_columns", "A", "B", "C"], QUESTIONS, "context, A, B, C, gold"),
])  # fmt: skip
def test_a_text_where_an_example_is_more(task_class, flags, rows, fields, tmp_path):
    """The fields are told as the data calls them, and where they go."""
    task = make_task(task_class, write(tmp_path / "data.jsonl", rows), *flags)
    with pytest.raises(UserError, match=f"more than a text: give --query_file, .* fields {fields}"):
        read_queries(task, ["a text"], None)


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("change, told", [
    ({"gold": 3}, "has 3 (int) as 'gold', which has to be a whole number from 0 to 2"), ({"gold": -1}, "has -1 (int)"),
    ({"gold": True}, "has True (bool)"), ({"gold": "D"}, "has 'D' (str)"), ({"gold": 1.0}, "has 1.0 (float)"),
    ({"B": ""}, "has '' (str) as 'B', which has to be a text that is not blank"), ({"context": None}, "as 'context'"),
    ({"A": None}, "nothing (null) as 'A'"),
])  # fmt: skip
def test_cells_that_the_data_could_not_have(change, told, tmp_path):
    flags = ["--text_column", "context", "--ending_columns", "A", "B", "C"]
    task = make_task(SwagTask, write(tmp_path / "data.jsonl", QUESTIONS), *flags)
    file = write(tmp_path / "own.jsonl", [QUESTIONS[0], QUESTIONS[1] | change])
    with pytest.raises(UserError) as error:
        read_queries(task, None, str(file))
    assert f"line 2 of {file} " in str(error.value) and told in str(error.value)


# ----------------------------------------------------------------------------------------- the scripts that take scores


@pytest.fixture(scope="module")
def all_kinds(checkpoint, results, tmp_path_factory):
    """Flags that name rows, a sum of all four queries and own queries of one directory."""
    output = shutil.copytree(results[1], tmp_path_factory.mktemp("kinds") / "out")
    ekfac = ["--factor_strategy", "ekfac"]
    out = analyze(checkpoint, output, "--sum_queries", "--num_queries", NUM_QUERIES, strategies=ekfac).ok()
    assert "Most influential training sequences (ekfac) for 4 queries together" in out
    analyze(checkpoint, output, "--query_text", "class definitions", strategies=ekfac).ok()
    flags = ["--preset", "demo", "--num_queries", "4", "--checkpoint_dir", checkpoint, "--output_dir", output]
    return [*flags, "--figure_dir", output.parent / "figure"], output


LDS = ["--num_masks", "2", "--num_repeats", "1"]


def test_they_are_left_out_of_what_is_found(all_kinds):
    flags, output = all_kinds
    run("evaluate_lds", *flags, *LDS).ok()
    assert set(json.loads((output / "lds.json").read_text())["methods"]) == {"ekfac", "tfidf"}


def test_they_are_refused_by_name(all_kinds):
    flags, output = all_kinds
    (own,) = (path.name.removeprefix("scores_") for path in output.glob("scores_*queries-*"))
    for script, more in (("evaluate_lds", LDS), ("run_counterfactual", ["--removal_sizes", "3"])):
        run(script, *flags, *more, "--scores", own).error(f"scores '{own}' are of queries of your own")
    run("evaluate_lds", *flags, *LDS, "--scores", "ekfac_sum").error("only run_counterfactual.py takes a sum")
    run("half_precision_analysis", *flags, "--scores_suffix", "sum").error("--scores_suffix")


def test_none_but_these_is_told(all_kinds, tmp_path):
    flags, output = all_kinds
    shutil.copytree(output / "scores_ekfac_sum", tmp_path / "scores_ekfac_sum")
    flags = [tmp_path if part == output else part for part in flags]
    run("evaluate_lds", *flags, *LDS).error("but sums or those of your own queries (ekfac_sum)")


def test_the_counterfactual_takes_the_sum_of_its_queries(all_kinds):
    """And removes what the rows would have it remove: nothing is trained twice, and the figures are the same."""
    flags, output = all_kinds
    flags = [*flags, "--removal_sizes", "5", "--num_repeats", "1"]
    run("run_counterfactual", *flags, "--scores", "ekfac", "ekfac_sum").ok()
    metrics = json.loads((output / "counterfactual.json").read_text())["metrics"]
    for methods in metrics.values():
        assert methods["ekfac"]["values"] == methods["ekfac_sum"]["values"]
    told = ["the sum of 4 queries, and here the first 3 count", "--num_counterfactual_queries 4", "--num_queries 3"]
    run("run_counterfactual", *flags, "--num_counterfactual_queries", "3", "--scores", "ekfac_sum").error(*told)


def test_the_sum_of_other_queries_is_refused(all_kinds, checkpoint, tmp_path):
    """As many, but not the first ones; and of the first ones, where the retrainings measure more."""
    flags, output = all_kinds
    flags = [*flags, "--removal_sizes", "5", "--num_repeats", "1", "--bank_dir", output / "retrainings"]
    analyze(checkpoint, output, "--sum_queries", "--num_queries", "3", "--scores_suffix", "three", strategies=[
        "--factor_strategy", "ekfac"]).ok()  # fmt: skip
    run("run_counterfactual", *flags, "--num_counterfactual_queries", "3", "--scores", "ekfac_sum_three").ok()
    path = output / "scores_ekfac_sum_three" / "pairwise_scores.json"
    manifest = read_sealed_json(path)
    manifest["settings"]["query_dataset"] = "0" * 16
    write_sealed_json(path, manifest)
    more = ["--num_counterfactual_queries", "3", "--scores", "ekfac_sum_three"]
    run("run_counterfactual", *flags, *more).error("query_dataset (stored 0000000000000000")


# ---------------------------------------------------------------------------------------------------------- their pages


def test_their_page_stands_beside_the_data_s(checkpoint, tmp_path):
    """Their own origins on it, and the sum's page speaks of all queries together."""
    looking = ["--report", "--compute_per_token_scores", "--num_queries", "3"]
    analyze(checkpoint, tmp_path, *looking).ok()
    whole = (tmp_path / "report.html").read_bytes()
    out = analyze(checkpoint, tmp_path, *looking[:2], "--query_text", "The colour of a mutable sequence", "Yes").ok()
    page = next(tmp_path.glob("report_identity_queries-*.html"))
    assert f"Report: {page}" in out
    assert "text 1 of --query_text" in page.read_text() and "colour of a mutable" in page.read_text()
    analyze(checkpoint, tmp_path, *looking, "--sum_queries").ok()
    assert "All 3 queries together" in (tmp_path / "report_identity_sum.html").read_text()
    assert (tmp_path / "report.html").read_bytes() == whole
