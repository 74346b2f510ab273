"""What is tracked of any model: by default, narrowed, said, and refused where it would be forgotten or can't be."""

import copy
import re

import pytest
import torch
import transformers as hf
from torch import nn

from influence_core.coverage import describe_coverage
from influence_core.errors import UserError
from influence_core.layers import find_tracked_layers, trackable_layer_names
from influence_core.precision import Precision
from influence_core.tasks.small_batches import SmallBatches
from influence_core.tasks.tracking import coverage_notes
from tests import models
from tests.models import CAUSAL, ENCODERS, make_model
from tests.scripts import run
from tests.test_layers import Model
from wikitext_gpt2.task import WikiTextTask


def narrowed(task_class, model, pattern=None):
    """(task, names) with --tracked_layers."""
    task = task_class()
    task.tracked_layers = pattern
    return task, task.tracked_layer_names(model)


@pytest.fixture(scope="module")
def llama():
    return make_model(hf.AutoModelForCausalLM, CAUSAL["Llama"])


@pytest.fixture(scope="module")
def deberta():
    return make_model(hf.AutoModelForMultipleChoice, ENCODERS["DeBERTa-v2 (own position layers)"])


# ------------------------------------------------------------------------------------------------------------- names


def test_every_name_can_be_tracked():
    """Neither tied nor twins, nor those whose weight is made anew at each call."""
    model = Model()
    model.normed = nn.utils.weight_norm(nn.Linear(3, 3))
    names = trackable_layer_names(model)
    assert names == ["blocks.0", "blocks.1"]
    assert [layer.name for layer in find_tracked_layers(model, names)] == names
    with pytest.raises(UserError, match="normed makes its weight of other parameters"):
        find_tracked_layers(model, ["normed"])


def test_by_default_all_but_the_head(llama):
    """Also where the head is a matrix of its own."""
    _, names = narrowed(models.RandomCausal, llama)
    assert "lm_head" not in names and len(names) == 2 * 7
    assert {*names, "lm_head"} == {name for name, module in llama.named_modules() if type(module) is nn.Linear}


def test_a_pattern_narrows_it(llama):
    _, names = narrowed(models.RandomCausal, llama, "mlp|o_proj")
    assert len(names) == 2 * 4 and all("mlp" in name or "o_proj" in name for name in names)


@pytest.mark.parametrize(
    "pattern, message",
    [("mlp(", "no regular expression"), ("lm_head", "no layer that --tracked_layers 'lm_head' matches: it has model")],
)  # fmt: skip
def test_patterns_that_name_nothing(llama, pattern, message):
    with pytest.raises(UserError, match=message):
        narrowed(models.RandomCausal, llama, pattern)


def test_layers_that_can_t_be_told_apart_by_example_are_named(deberta):
    """DeBERTa's layers of relative positions are applied once: left out in a line, or refused."""
    task, names = narrowed(models.RandomChoices, deberta)
    assert not any("pos_" in name for name in names) and len(names) == 2 * 6 + 2
    (note,) = coverage_notes(task, deberta, find_tracked_layers(deberta, names), was_asked=False)
    assert "layer.*.attention.self.pos_key_proj" in note and "applied once for all examples" in note
    assert narrowed(models.RandomChoices, deberta, "encoder")[1] == names[:-2]
    with pytest.raises(UserError, match=r"no layer that can be tracked: \S+pos_key_proj, that .* is applied once"):
        narrowed(models.RandomChoices, deberta, "pos_")


@pytest.mark.parametrize(
    "make, message",
    [(lambda x: x.transpose(0, 1), "rows come second"), (lambda x: x[:1], "applied once"),
     (lambda x: x.repeat(1, 2, 1), "other positions"), (lambda x: x.flatten(0, 1)[:3], "picked"), (None, "not called")],
    ids=["sequence first", "once for all", "more positions", "picked", "not called"],
)  # fmt: skip
def test_layers_that_read_no_stream(make, message):
    """Whatever the cause, they are told from the others by what they see."""
    model = make_model(hf.AutoModelForCausalLM, CAUSAL["GPT-2"])
    model.extra = nn.Linear(8, 8).double()
    if make is not None:

        def beside(module, arguments):
            model.extra(make(arguments[0]))

        model.transformer.h[1].register_forward_pre_hook(beside)
    task, names = narrowed(models.RandomCausal, model)
    assert "extra" not in names and len(names) == 2 * 4
    assert message in task.observe(model).unfit["extra"]


def test_one_task_and_several_models(llama):
    """A mask is of the model that was asked last; what each said is kept as long as it lives."""
    task = models.RandomCausal()
    gpt2 = make_model(hf.AutoModelForCausalLM, CAUSAL["GPT-2"])
    batch = task.collate(task.load_dataset("train")[:3])
    with pytest.raises(UserError, match="no position mask for layer transformer.h.0.attn.c_attn: the model was not"):
        task.position_mask(batch, "transformer.h.0.attn.c_attn")
    for model, name in ((gpt2, "transformer.h.0.attn.c_attn"), (llama, "model.layers.0.mlp.up_proj")) * 2:
        assert name in task.tracked_layer_names(model)
        assert task.position_mask(batch, name) is batch["attention_mask"]
    with pytest.raises(UserError, match="no position mask for layer transformer.h.0"):
        task.position_mask(batch, "transformer.h.0.attn.c_attn")
    assert task.known(gpt2).streams.keys() == set(task.tracked_layer_names(gpt2))


def test_a_copy_of_a_model_is_asked_itself(llama):
    """But not amid a pass of the engine, whose hooks would take the small batches for the pass's own."""
    task, copied = models.RandomCausal(), copy.deepcopy(llama)
    task.tracked_layer_names(llama)
    batch = task.collate(task.load_dataset("train")[:3])
    with Precision(torch.float64, torch.float64).autocast(torch.device("cpu")):
        task.train_loss(llama, batch)
        with pytest.raises(UserError, match="the LlamaForCausalLM was not asked what its layers read"):
            task.train_loss(copied, batch)
    assert float(task.train_loss(copied, batch)) == float(task.train_loss(llama, batch))


def test_a_model_that_sees_later_tokens_is_no_causal_one():
    """A BERT whose config forgot to say that it decodes."""
    model = make_model(hf.AutoModelForCausalLM, ENCODERS["BERT"])
    hardly_trained = hf.RobertaConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=24)  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(UserError, match="this RobertaForCausalLM is no causal language model"):
        models.RandomCausal().tracked_layer_names(hf.RobertaForCausalLM(hardly_trained))
    with pytest.raises(UserError, match="this BertLMHeadModel is no causal language model"):
        narrowed(models.RandomCausal, model)
    decoder = make_model(hf.AutoModelForCausalLM, ENCODERS["BERT"], is_decoder=True)
    assert len(narrowed(models.RandomCausal, decoder)[1]) == 2 * 6 + 1


class FirstIsBlank(models.RandomCausal):
    num_blank = 1

    def load_dataset(self, split, indices=None):
        examples = super().load_dataset(split)
        return [{"input_ids": torch.zeros(0, dtype=torch.long)}] * self.num_blank + examples[self.num_blank :]


class AllAreBlank(FirstIsBlank):
    num_blank = models.RandomCausal.num_train


def test_a_model_is_asked_with_examples_that_have_tokens(llama):
    assert len(narrowed(FirstIsBlank, llama)[1]) == 2 * 7
    with pytest.raises(UserError, match="none of the first 1000 training examples has a token"):
        narrowed(AllAreBlank, llama)


@pytest.mark.parametrize("length", [2, 3, 9, 40])
def test_small_batches_are_of_any_length_and_of_different_tokens(llama, length):
    small = SmallBatches(models.RandomCausal(), llama)
    batch = small.batch({"input_ids": length}, turns=range(5))
    assert batch["input_ids"].shape == (5, length) and "attention_mask" not in batch
    assert (batch["input_ids"][:, -1] == models.EOS).all() and (batch["input_ids"][:, :-1] != models.EOS).all()
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) >= 4


# -------------------------------------------------------------------------------------------------------- coverage


def test_what_is_left_out_of_a_mixture_is_said():
    """Its experts are one tensor each, not layers."""
    model = make_model(hf.AutoModelForCausalLM, CAUSAL["Mixtral (experts)"])
    _, names = narrowed(models.RandomCausal, model)
    text = describe_coverage(model, find_tracked_layers(model, names))
    for kind in ("fused experts", "embeddings", "norms", "head"):
        (share,) = re.findall(rf"{kind} ([\d.]+)%", text)
        assert float(share) > 0
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    whole = sum(p.numel() for p in model.parameters())
    assert f"fused experts {experts / whole:.1%}" in text and f"of the model's {whole:,} (all trained)" in text


def test_the_share_of_what_was_trained(llama):
    """Where a part of the model is frozen."""
    layers = find_tracked_layers(llama, narrowed(models.RandomCausal, llama)[1])
    tracked = sum(layer.num_parameters for layer in layers)
    llama.model.embed_tokens.requires_grad_(False)
    trained = sum(p.numel() for p in llama.parameters() if p.requires_grad)
    text = describe_coverage(llama, layers)
    llama.requires_grad_(True)
    assert f" and {tracked / trained:.1%} of the trained {trained:,}; left out" in text


def test_layers_of_other_kinds_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 3, 1), Model().doubling)
    assert "Doubling" in describe_coverage(model, find_tracked_layers(model, ["0"]))
    assert "Conv2d" in describe_coverage(model, find_tracked_layers(model, ["0"]))


def test_a_model_without_a_layer_that_can_be_tracked():
    """Falcon's are a class of their own, which could compute anything."""
    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = make_model(hf.AutoModelForCausalLM, hf.FalconConfig(**sizes))
    with pytest.raises(UserError, match="FalconForCausalLM has no layer that can be tracked: its .* of FalconLinear, "):
        narrowed(models.RandomCausal, model)


class OfRoberta(models.RandomChoices):
    """A choice of layers by the names of one architecture."""

    def tracked_layer_names(self, model):
        names = super().tracked_layer_names(model)
        return [name for name in names if re.fullmatch(r"roberta\.encoder\..*|classifier", name)]


def test_forgotten_blocks_are_refused():
    """RoBERTa's names on a BERT leave the last layer alone, quietly; unless that was asked for."""
    model = make_model(hf.AutoModelForMultipleChoice, ENCODERS["BERT"])
    task, names = narrowed(OfRoberta, model)
    layers = find_tracked_layers(model, names)
    assert names == ["classifier"]
    with pytest.raises(UserError, match=r"tracks no layer of encoder\.layer\.0, encoder\.layer\.1 of this BertFor"):
        coverage_notes(task, model, layers, was_asked=False)
    task.tracked_layers = "classifier"
    assert coverage_notes(task, model, layers, was_asked=True) == []
    task.tracked_layers = "encoder"
    with pytest.raises(UserError, match="OfRoberta names its layers itself, and classifier is not of"):
        coverage_notes(task, model, layers, was_asked=True)
    roberta = make_model(hf.AutoModelForMultipleChoice, ENCODERS["RoBERTa"])
    task, names = narrowed(OfRoberta, roberta)
    assert coverage_notes(task, roberta, find_tracked_layers(roberta, names), was_asked=False) == []


class OnlyQueries(WikiTextTask):
    """One of four layers of each block."""

    def tracked_layer_names(self, model):
        return [name for name in super().tracked_layer_names(model) if name.endswith("attn.c_proj")]


class OnlyTheFirstBlock(WikiTextTask):
    presets = {name: preset | {"tracked_layers": r"h\.0\."} for name, preset in WikiTextTask.presets.items()}


def test_the_scripts_say_and_refuse_it(checkpoint, tmp_path):
    """A note for less than half; a refusal for whole blocks, but not of what --tracked_layers asks for."""
    flags = ["--preset", "demo", "--checkpoint_dir", checkpoint, "--num_train", "8", "--num_queries", "2"]
    flags += ["--track", "blocks", "--factor_strategy", "identity", "--output_dir"]
    out = run("analyze", *flags, tmp_path / "some", task_class=OnlyQueries).ok()
    assert "Note: only 8." in out and "parameters of the model's linear layers are tracked" in out
    out = run("analyze", *flags, tmp_path / "asked", "--tracked_layers", r"attn\.c_proj").ok()
    assert "tracked  1 layers, 272 parameters" in out and "Note: only" not in out
    run("analyze", *flags, tmp_path / "none", "--tracked_layers", "q_proj").error("q_proj", "it has transformer.h.0")
    flags[3] = two_blocks = tmp_path / "two_blocks"
    train = ["--config_overrides", "n_layer=2,n_embd=16,n_head=2,n_positions=32", "--vocab_size", "400"]
    train += ["--block_size", "32", "--num_train", "8", "--num_train_epochs", "0"]
    run("train", "--preset", "demo", "--checkpoint_dir", two_blocks, *train).ok()
    run("analyze", *flags, tmp_path / "preset", task_class=OnlyTheFirstBlock).error(
        "tracks no layer of h.1 of this GPT2"
    )
    asked = ["--tracked_layers", r"h\.0\."]
    assert "tracked  4 layers" in run("analyze", *flags, tmp_path / "first", *asked, task_class=OnlyTheFirstBlock).ok()
