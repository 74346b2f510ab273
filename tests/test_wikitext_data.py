"""The loading code of wikitext_gpt2 on real data and on model directories, as --preset full takes them."""

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config

from tests.scripts import BLOCK_SIZE, SHARED, TRAIN, run
from wikitext_gpt2.task import WikiTextTask

WIKITEXT, TOKENIZER = SHARED / "data" / "wikitext", SHARED / "models" / "gpt2-tokenizer"

needs_wikitext = pytest.mark.skipif(
    not (WIKITEXT.is_dir() and TOKENIZER.is_dir()), reason=f"no WikiText-2 in {WIKITEXT} or tokenizer in {TOKENIZER}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The datasets library's cache, out of the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def wikitext(config, block_size=512):
    flags = dict.fromkeys(WikiTextTask.flag_names()) | {"block_size": block_size, "dataset_config": config}
    return WikiTextTask(**flags | {"dataset_name_or_path": str(WIKITEXT), "tokenizer_name_or_path": str(TOKENIZER)})


def cut(rows, tokenizer, rows_per_group, block_size=512):
    """Blocks by another way: row by row into a list of tokens, whole blocks of which are taken at each group's end."""
    blocks, tokens = [], []
    for number, row in enumerate(rows, 1):
        tokens += tokenizer.encode(row, verbose=False)
        if number % rows_per_group == 0 or number == len(rows):
            while len(tokens) >= block_size:
                blocks.append(tokens[:block_size])
                tokens = tokens[block_size:]
            tokens = []
    return blocks


@needs_wikitext
@pytest.mark.parametrize(
    "config, split, num_rows", [("wikitext-2-v1", "validation", 3760), ("wikitext-2-raw-v1", "train", 2119)]
)
def test_blocks_of_wikitext(config, split, num_rows):
    """Grouped per 1,000 rows, the remainder of each group dropped: every block against the parquet file's rows."""
    task = wikitext(config)
    blocks = [example["input_ids"].tolist() for example in task.load_dataset(split)]
    (path,) = (WIKITEXT / config).glob(f"{split}-*.parquet")
    rows = datasets.Dataset.from_parquet(str(path))["text"]
    assert len(rows) == num_rows
    assert blocks == cut(rows, task.tokenizer, 1000)
    assert blocks != cut(rows, task.tokenizer, num_rows), "else the grouping would not show"
    some = task.load_dataset(split, [5, 3])
    assert [example["input_ids"].tolist() for example in some] == [blocks[5], blocks[3]]


@needs_wikitext
def test_parts_of_splits_and_a_tokenizer_of_their_text():
    """--train_split and --validation_split name parts that do not meet; --vocab_size trains a tokenizer on the one."""
    flags = dict.fromkeys(WikiTextTask.flag_names()) | {"block_size": 64, "vocab_size": 300}
    flags |= {"dataset_name_or_path": str(WIKITEXT), "dataset_config": "wikitext-2-v1"}
    flags |= {"train_split": "validation[:5%]", "validation_split": "validation[5%:8%]"}
    task = WikiTextTask(**flags | {"config_overrides": "n_layer=1,n_embd=8,n_head=2,n_positions=64"})
    assert task.load_model(None).config.vocab_size == len(task.tokenizer) == 300
    (path,) = (WIKITEXT / "wikitext-2-v1").glob("validation-*.parquet")
    rows = datasets.Dataset.from_parquet(str(path))["text"]
    for split, part in (("train", rows[:188]), ("validation", rows[188:301])):
        text = "".join(task.tokenizer.decode(example["input_ids"]) for example in task.load_dataset(split))
        assert len(text) > 1000 and "".join(part).startswith(text)


@needs_wikitext
@pytest.mark.slow
def test_scripts_on_wikitext(tmp_path):
    """Both scripts with the full preset's loading code, local paths, and a small model from scratch."""
    train = ["--dataset_name_or_path", WIKITEXT, "--tokenizer_name_or_path", TOKENIZER, "--block_size", "64"]
    train += ["--config_overrides", "n_layer=1,n_embd=8,n_head=2,n_positions=64", "--num_train", "16"]
    train += ["--num_train_epochs", "1", "--checkpoint_dir", tmp_path / "checkpoint", "--eval_batch_size", "64"]
    out = run("train", *train).ok()
    assert "Training from scratch" in out and "vocabulary 50257" in out and "; 16 training and" in out
    analyze = ["--checkpoint_dir", tmp_path / "checkpoint", "--output_dir", tmp_path / "out"]
    out = run("analyze", *analyze, "--num_train", "16", "--num_queries", "2", "--factor_strategy", "identity").ok()
    assert "(2, 16) [queries, training examples]" in out
    assert "topic" not in out  # WikiText's blocks have none


def config_only(directory, **sizes):
    GPT2Config(n_layer=1, n_head=2, n_embd=24, n_positions=BLOCK_SIZE, **sizes).save_pretrained(directory)
    return directory


def train_from(model, directory, *flags):
    """(what was printed, the weights) of training that starts from a model directory."""
    flags = ["--model_name_or_path", model, "--config_overrides", "", "--checkpoint_dir", directory, *flags]
    return run("train", *TRAIN, *flags).ok(), load_file(directory / "model.safetensors")


def test_a_directory_with_only_a_config_starts_from_scratch(tmp_path):
    """The config's sizes, the tokenizer's vocabulary, weights by the seed, and a line that says so."""
    model = config_only(tmp_path / "model")
    out, weights = train_from(model, tmp_path / "new", "--num_train_epochs", "0")
    assert "Training from scratch: 1 layers of 24, vocabulary 400" in out
    assert weights["transformer.h.0.mlp.c_fc.weight"].shape == (24, 96)
    assert len(weights["transformer.wte.weight"]) == 400
    _, others = train_from(model, tmp_path / "other", "--num_train_epochs", "0", "--seed", "7")
    assert not torch.equal(weights["transformer.wte.weight"], others["transformer.wte.weight"])


def test_a_directory_with_weights_is_started_from(checkpoint, tmp_path):
    """No epoch leaves the very weights; an epoch moves them, from there."""
    start = load_file(checkpoint / "model.safetensors")
    out, weights = train_from(checkpoint, tmp_path / "none", "--num_train_epochs", "0")
    assert "scratch" not in out
    assert start.keys() == weights.keys() and all(torch.equal(start[name], weights[name]) for name in start)
    _, weights = train_from(checkpoint, tmp_path / "one", "--learning_rate", "1e-6")
    moved = max(float((start[name] - weights[name]).abs().max()) for name in start)
    assert 0 < moved < 1e-5  # two steps of AdamW at 1e-6


def test_overrides_beside_weights_train_another_model(checkpoint, tmp_path):
    """--config_overrides asks for a model from scratch, also where the directory has weights."""
    flags = ["--model_name_or_path", checkpoint, "--config_overrides", "n_embd=8", "--num_train_epochs", "0"]
    out = run("train", *TRAIN, *flags, "--checkpoint_dir", tmp_path / "new").ok()
    assert f"Training from scratch, without the weights in {checkpoint}: 1 layers of 8" in out
