"""Every example's scripts on a model that is not the folder's own, from a directory that holds only its config."""

import pytest
import transformers as hf

from dailymail_t5.task import DailyMailTask
from swag_roberta.task import SwagTask
from tests.scripts import run
from wikitext_gpt2.task import WikiTextTask

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64, "dropout": 0,
}  # fmt: skip
BLOCKS, ROWS = ["--block_size", "32"], ["--max_length", "24"]
STREAMS = ["--max_source_length", "40", "--max_target_length", "12"]
# Task, config, sizes of its data, and how many layers are tracked.
CASES = {
    "Llama": (WikiTextTask, hf.LlamaConfig(**SMALL), BLOCKS, 14),
    "Pythia": (WikiTextTask, hf.GPTNeoXConfig(**SMALL), BLOCKS, 8),
    "Gemma-2": (WikiTextTask, hf.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=1), BLOCKS, 14),
    "BERT": (SwagTask, hf.BertConfig(**SMALL, max_position_embeddings=24), ROWS, 14),
    "DistilBERT": (SwagTask, hf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24), ROWS, 14),
    "DeBERTa": (SwagTask, hf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]), ROWS, 14),
    "BART": (DailyMailTask, hf.BartConfig(**BART), STREAMS, 16),
}


def trained(name, directory):
    """(task, flags that name its checkpoint and results)"""
    task_class, config, sizes, _ = CASES[name]
    config.save_pretrained(directory / "model")
    common = ["--preset", "demo", "--checkpoint_dir", directory / "checkpoint", "--num_train", "32"]
    start = ["--model_name_or_path", directory / "model", "--config_overrides", "", "--vocab_size", "400"]
    out = run("train", *common, *start, *sizes, "--num_train_epochs", "1", task_class=task_class).ok()
    assert "Training from scratch" in out and "validation" in out
    return task_class, [*common, "--output_dir", directory / "results", "--num_queries", "5"]


# Those that test_all_scripts takes through all of them, and near relatives, are left to `make test-slow`.
LEFT = {"BERT", "DistilBERT"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in LEFT else ()) for x in CASES])
def test_train_and_analyze(name, tmp_path):
    task_class, flags = trained(name, tmp_path)
    flags += ["--track", "blocks", "--factor_strategy", "ekfac", "identity"]
    out = run("analyze", *flags, task_class=task_class).ok()
    assert "(5, 32) [queries, training examples]" in out
    assert f"tracked  {CASES[name][3]} layers" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "BERT", "BART"])
def test_all_scripts(name, tmp_path):
    task_class, flags = trained(name, tmp_path)
    run("analyze", *flags, "--factor_strategy", "ekfac", "identity", task_class=task_class).ok()
    flags += ["--figure_dir", tmp_path]
    out = run("evaluate_lds", *flags, "--num_masks", "4", "--num_repeats", "2", task_class=task_class).ok()
    assert "ekfac - identity" in out and (tmp_path / "lds.png").exists()
    sizes = ["--removal_sizes", "0", "9", "--num_repeats", "1", "--num_counterfactual_queries", "5"]
    out = run("run_counterfactual", *flags, *sizes, task_class=task_class).ok()
    assert "after removing" in out and (tmp_path / "counterfactual.png").exists()
