"""What a language model's head makes of its hidden states, and how many positions a model has."""

import pytest
import torch
import transformers as hf
from torch import nn

from influence_core.errors import UserError
from influence_core.tasks.head import head_is_matrix
from influence_core.tasks.rows import Examples
from swag_roberta.task import SwagTask
from tests import models
from tests.models import CAUSAL, make_model
from tests.scripts import contents, run

SHORT = models.SIZES | {"max_position_embeddings": 20}

# ------------------------------------------------------------------------------------------------------------ heads


class Scaled(nn.Module):
    """A language model whose logits go through something more."""

    def __init__(self, after):
        super().__init__()
        self.embedding, self.head, self.after = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), after
        self.config = hf.PretrainedConfig()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        return hf.modeling_outputs.CausalLMOutput(logits=self.after(logits))


class Factor(nn.Module):
    """A factor of one, that training would move."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.factor


class Cap(nn.Module):
    def forward(self, x):
        return 30 * torch.tanh(x / 30)


def test_a_head_is_a_matrix_only_where_nothing_else_makes_the_logits():
    """Also what changes nothing yet: a bias of zeros, a factor of one, a cap far above the logits of a new model."""
    tokens = {"input_ids": torch.arange(6)[None]}
    assert head_is_matrix(Scaled(nn.Identity()), tokens)
    for after in (Factor(), Cap(), nn.LayerNorm(7), nn.LogSoftmax(-1), nn.Threshold(-1e4, 0), nn.Hardtanh(-100, 100)):
        changes = not isinstance(after, nn.Threshold)
        assert head_is_matrix(Scaled(after), tokens) is not changes, after
    biased = Scaled(nn.Identity())
    biased.head = nn.Linear(5, 7)
    nn.init.zeros_(biased.head.bias)
    assert not head_is_matrix(biased, tokens)


@pytest.mark.parametrize("name, is_matrix", [("GPT-2", True), ("Llama", True), ("Qwen2", True), ("Pythia", True),
                                             ("Phi (head with a bias)", False), ("Gemma-2 (soft cap)", False),
                                             ("Granite (scaled logits)", False)])  # fmt: skip
def test_which_heads_are(name, is_matrix):
    task, model = models.RandomCausal(), make_model(hf.AutoModelForCausalLM, CAUSAL[name])
    assert task.observe(model).head_is_matrix is is_matrix
    assert task.observe(model).loss_is_mean


@pytest.mark.parametrize("changes", [{}, {"router_aux_loss_coef": 0.5}], ids=["0.001", "0.5"])
def test_a_loss_of_more_than_the_tokens_is_trained_and_said(changes, capsys):
    """That of a mixture's router, however small; the influence is that of the cross-entropy."""
    model = make_model(hf.AutoModelForCausalLM, CAUSAL["Mixtral (experts)"], output_router_logits=True, **changes)
    assert model.config.router_aux_loss_coef == changes.get("router_aux_loss_coef", 0.001)
    task = models.RandomCausal()
    assert not task.observe(model).loss_is_mean and "more than the mean cross-entropy" in capsys.readouterr().out
    batch = task.collate(task.load_dataset("train")[:3])
    own = model(**task.model_inputs(model, batch), labels=task.labels(batch)).loss
    assert float(task.training_loss(model, batch)) == pytest.approx(float(own))


def test_a_model_that_leaves_the_shift_to_its_caller():
    """BART's decoder alone compares each position with its own label: trained so, it would learn to copy."""
    config = hf.BartConfig(**models.BART, is_decoder=True)
    model = make_model(hf.AutoModelForCausalLM, config)
    task = models.RandomCausal()
    task.observe(model)
    batch = task.collate(task.load_dataset("train")[:3])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert float(task.training_loss(model, batch)) == pytest.approx(float(expected), rel=1e-6)


# -------------------------------------------------------------------------------------------------- position limits


def config_only(config, directory, *flags):
    """Flags that train from scratch by this config."""
    config.save_pretrained(directory / "model")
    place = ["--model_name_or_path", directory / "model", "--checkpoint_dir", directory / "checkpoint"]
    return ["--preset", "demo", "--vocab_size", "400", "--config_overrides", "", *place, *flags]


OF_20 = {
    "GPT-2": hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=20),
    "OPT": hf.OPTConfig(**SHORT, ffn_dim=12, word_embed_proj_dim=8),
    "GPT-J (in each block)": hf.GPTJConfig(n_embd=8, n_layer=1, n_head=2, n_positions=20, rotary_dim=2),
}


@pytest.mark.parametrize("config", OF_20.values(), ids=OF_20)
def test_more_tokens_than_positions_are_refused(config, tmp_path):
    """Also where the first two of a table are for other things, and where each block has its own."""
    run("train", *config_only(config, tmp_path, "--block_size", "32")).error(
        "--block_size 32", "the model's 20 positions"
    )


def test_of_a_model_without_a_table_of_positions_it_is_said(tmp_path):
    """Rotary positions go on for ever; whether the model was trained for them is another matter."""
    flags = config_only(
        hf.LlamaConfig(**SHORT, num_key_value_heads=1), tmp_path, "--block_size", "32", "--num_train", "8"
    )
    out = run("train", *flags, "--num_train_epochs", "0").ok()
    assert "Note: --block_size 32 is more than the 20 positions that the model's config names" in out


def test_rows_that_a_bert_has_no_positions_for(tmp_path):
    flags = config_only(hf.BertConfig(**SHORT), tmp_path, "--config_overrides", "max_position_embeddings=20")
    flags += ["--max_length", "24"]
    run("train", *flags, task_class=SwagTask).error("--max_length 24 is more than the model's 20 positions")


@pytest.mark.parametrize("config", [hf.FNetConfig, hf.XLNetConfig])
def test_models_that_read_padding_are_refused_before_they_are_trained(config, tmp_path):
    """FNet has no mask at all; XLNet takes the last position for the row's summary, whatever stands there."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512}
    if config is hf.XLNetConfig:
        sizes = {"d_model": 256, "n_layer": 2, "n_head": 2, "d_inner": 512}
    flags = config_only(config(**sizes), tmp_path, "--max_length", "24", "--num_train", "16")
    run("train", *flags, task_class=SwagTask).error("padding changes what this", "alone")
    assert not contents(tmp_path / "checkpoint")


def test_a_text_of_one_token_predicts_nothing():
    task = models.RandomCausal()
    task.columns, task.tokenizer = {"text": None}, lambda texts, **options: {"input_ids": [[5]] * len(texts)}
    examples = Examples([{"text": "a"}], 10, task.tokenized)
    with pytest.raises(UserError, match="row 0 has 'a', a text of 1 tokens, and it takes two"):
        examples[0]
