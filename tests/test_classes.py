"""Tasks of classes on data and models from elsewhere: kinds of tokens, names and numbers of classes, new heads."""

import datasets
import pytest
import torch
import transformers as hf

from influence_core.errors import UserError
from influence_core.tasks.columns import Label, Text
from influence_core.tasks.multiple_choice import MultipleChoiceTask
from influence_core.tasks.sequence_classification import SequenceClassificationTask
from swag_roberta.task import SwagTask
from tests.scripts import run

NAMES = ("art", "code", "war")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = ["the", "first", "second", "third", "of", "a", "text", "says", "what", "it", "is", "about", "and", "why"]
ROWS = [
    {"text": " ".join(WORDS[i % 5 : i % 5 + 4]), "other": WORDS[i % 7], "third": "a text", "question": "what is it",
     "label": i % 3}
    for i in range(40)
]  # fmt: skip


class Topics(SequenceClassificationTask):
    name = "topics"
    columns = {"text": Text(), "label": Label(NAMES)}


class Pairs(Topics):
    columns = {"text": Text(), "other": Text(), "label": Label(NAMES)}


class NumberedPairs(Pairs):
    columns = Pairs.columns | {"label": Label(3)}


class Guesses(MultipleChoiceTask):
    name, endings = "guesses", ("text", "other", "third")
    columns = {"question": Text()} | dict.fromkeys(endings, Text()) | {"label": Label(NAMES)}


def tokenizer(directory):
    """A BERT's, which says of two texts which token is of which."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: number for number, word in enumerate(dict.fromkeys([*special, *WORDS, *NAMES]))}
    hf.BertTokenizer(vocab=words).save_pretrained(directory)


def make_task(task_class, directory, names=None, rows=ROWS, **others):
    """The task on a dataset in the Hub's layout, whose classes may have names of their own."""
    (directory / "data").mkdir()
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    rows = datasets.Dataset.from_list(rows).cast_column("label", kind)
    for split in ("train", "validation"):
        rows.to_parquet(directory / "data" / f"{split}.parquet")
    tokenizer(directory / "words")
    flags = dict.fromkeys(task_class.flag_names())
    places = {"dataset_name_or_path": f"{directory / 'data'}", "tokenizer_name_or_path": f"{directory / 'words'}"}
    return task_class(**flags | places | {"config_overrides": "type_vocab_size=2", "max_length": 16} | others)


# ------------------------------------------------------------------------------------------------- kinds of tokens


@pytest.mark.parametrize("task_class, are_told", [(Topics, False), (Pairs, True), (Guesses, True)])
def test_the_second_of_two_texts_is_told_from_the_first(task_class, are_told, tmp_path):
    """To the model, as its tokenizer does; where there is one text, a model without kinds of tokens takes it too."""
    task = make_task(task_class, tmp_path)
    examples = task.load_dataset("train")[:3]
    batch = task.collate(examples)
    assert ("token_type_ids" in batch) is are_told
    if not are_told:
        return
    rows, types = batch["input_ids"].flatten(0, -2), batch["token_type_ids"].flatten(0, -2)
    separator = task.tokenizer.sep_token_id
    for row, kinds in zip(rows.tolist(), types.tolist()):
        first, second = (i for i, token in enumerate(row) if token == separator)
        assert kinds == [int(first < i <= second) for i in range(len(row))]
    model = task.auto_model.from_config(hf.BertConfig(**SMALL, num_labels=3)).eval()
    assert len(task.tracked_layer_names(model)) == 8  # six of the block, pooler and classifier
    inputs = task.model_inputs(model, batch)
    assert torch.equal(inputs["token_type_ids"], batch["token_type_ids"])


def test_swag_through_a_bert_tells_the_ending(tmp_path):
    hf.BertConfig(**SMALL).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    flags = ["--preset", "demo", "--model_name_or_path", tmp_path / "model", "--config_overrides", ""]
    flags += ["--tokenizer_name_or_path", tmp_path / "model", "--checkpoint_dir", tmp_path / "checkpoint"]
    flags += ["--num_train", "24", "--max_length", "24"]
    run("train", *flags, "--num_train_epochs", "1", task_class=SwagTask).ok()
    flags += ["--output_dir", tmp_path / "results", "--num_queries", "4"]
    out = run("analyze", *flags, "--factor_strategy", "identity", task_class=SwagTask).ok()
    assert "(4, 24) [queries, training examples]" in out


# ---------------------------------------------------------------------------------------------- classes and their names


def test_a_class_by_its_name_is_its_number(tmp_path):
    rows = [row | {"label": NAMES[row["label"]]} for row in ROWS]
    (tmp_path / "named").mkdir()
    for directory, task_class in ((tmp_path, Guesses), (tmp_path / "named", Topics)):
        task = make_task(task_class, directory)
        assert [example["label"] for example in task.tokenized(rows)] == [row["label"] for row in ROWS]


def test_the_names_of_the_dataset_s_classes_in_another_order_are_refused(tmp_path):
    """Whose labels are numbers: they would be taken for other classes."""
    task = make_task(Pairs, tmp_path, names=("war", "code", "art"))
    with pytest.raises(UserError, match="classes are war, code, art, in this order: the task has them as art, code"):
        task.class_names  # noqa: B018


def test_the_model_s_numbers_of_the_classes_go_by_their_names(tmp_path, capsys):
    """For each model anew: what an earlier one counted otherwise is forgotten."""
    task = make_task(NumberedPairs, tmp_path, names=NAMES)
    example = task.load_dataset("train")[1]
    assert example["label"] == 1
    task.adapt_config(hf.BertConfig(id2label={0: "Code", 1: "War", 2: "Art"}), is_start=True)
    assert task.class_of(example) == 0 and task.collate([example])["labels"].tolist() == [0]
    capsys.readouterr()
    task.adapt_config(hf.BertConfig(id2label={0: "up", 1: "down", 2: "left"}), is_start=True)
    assert task.class_of(example) == 1 and "taken to be the same in this order" in capsys.readouterr().out
    config = hf.BertConfig(num_labels=3)
    task.adapt_config(config, is_start=True)
    assert task.class_of(example) == 1 and config.id2label == dict(enumerate(NAMES))


def test_a_head_of_other_classes_is_new(tmp_path, capsys):
    """Where training starts from; a checkpoint must have as many."""
    task = make_task(Topics, tmp_path)
    config = hf.BertConfig(**SMALL, vocab_size=40, num_labels=5)
    task.auto_model.from_config(config).save_pretrained(tmp_path / "five")
    task.model_source, task.config_overrides = f"{tmp_path / 'five'}", {}
    model = task.load_model(None)
    assert model.config.num_labels == 3
    out = capsys.readouterr().out
    assert "New weights, to be trained: classifier.weight, classifier.bias" in out
    with pytest.raises(UserError, match="the model has 5 classes, the column 'label' 3"):
        task.load_model(f"{tmp_path / 'five'}")


def test_columns_whose_names_are_the_task_s_own_for_others(tmp_path):
    """A pair whose second text is called as the task calls its first; endings called as SWAG's question."""
    task = make_task(Topics, tmp_path, text_column=["other", "text"])
    rows = task.rows("train")
    assert list(task.columns)[0] == "text" and rows["text"][:] == [row["other"] for row in ROWS]
    assert rows[list(task.columns)[1]][:] == [row["text"] for row in ROWS]
    (tmp_path / "choices").mkdir()
    rows = [{"sent1": row["text"], "sent2": row["other"], "context": "c", "label": row["label"] % 2} for row in ROWS]
    flags = {"text_column": "context", "ending_columns": ["sent2", "sent1"]}
    task = make_task(SwagTask, tmp_path / "choices", rows=rows, **flags)
    assert task.choices(task.rows("train")[0]) == [("c", rows[0]["sent2"]), ("c", rows[0]["sent1"])]
    (tmp_path / "twice").mkdir()
    with pytest.raises(UserError, match="'sent1' .* is wanted twice"):
        make_task(SwagTask, tmp_path / "twice", rows=rows, ending_columns=["sent1", "sent1"]).rows("train")
