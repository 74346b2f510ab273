"""Weights that are not the model's are refused by name, and training that was finished is never lost."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from influence_core.errors import UserError
from influence_core.tasks.demo_corpus import demo_corpus, train_tokenizer
from swag_roberta.task import SwagTask
from tests.scripts import ANALYZE, NUMBERS, TRAIN, change_record, contents, refused, run, run_process
from wikitext_gpt2.task import WikiTextTask

TWO_LAYERS = "n_layer=2,n_embd=16,n_head=2,n_positions=32"
BLOCK = "transformer.h.1."


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """A checkpoint of two layers, trained on nothing."""
    directory = tmp_path_factory.mktemp("two") / "checkpoint"
    flags = ["--config_overrides", TWO_LAYERS, "--num_train_epochs", "0", "--checkpoint_dir", directory]
    run("train", *TRAIN, *flags).ok()
    return directory


@pytest.fixture
def place(two_layers, tmp_path):
    """A copy of it, to spoil."""
    directory = shutil.copytree(two_layers, tmp_path / "spoiled")
    change_record(directory, files={})  # what is put there passes for what training left
    return directory


def store_as(directory, form):
    """The same weights as one file, in pieces, or pickled."""
    if form == "pieces":
        model = AutoModelForCausalLM.from_pretrained(directory)
        (directory / "model.safetensors").unlink()
        model.save_pretrained(directory, max_shard_size="20KB")
        assert len(list(directory.glob("*.safetensors"))) > 2
    elif form == "pickle":
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()


def configure(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(directory, change):
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def drop(name):
    return lambda weights: weights.pop(name)


def add(name):
    return lambda weights: weights.update({name: torch.zeros(3)})


# {what: (change of the config, of the weights, what is told)}
SPOILED = {
    "more layers": ({"n_layer": 3}, None, ["12 missing (transformer.h.2.ln_1.weight", "and 8 more", "more layers"]),
    "fewer layers": ({"n_layer": 1}, None, [f"unexpected ({BLOCK}", "fewer layers"]),
    "another size": ({"n_embd": 24}, None, ["transformer.wte.weight is [400, 16], not [400, 24]", "another size"]),
    "fewer words": ({"vocab_size": 300}, None, ["transformer.wte.weight is [400, 16], not [300, 16]"]),
    "one weight missing": ({}, drop(f"{BLOCK}mlp.c_fc.weight"), [f"1 missing ({BLOCK}mlp.c_fc.weight)", "incomplete"]),
    "no embeddings": ({}, drop("transformer.wte.weight"), ["missing (transformer.wte.weight", "incomplete"]),
    "one weight more": ({}, add(f"{BLOCK}attn.gate.weight"), [f"1 unexpected ({BLOCK}attn.gate.weight)"]),
    "untied": ({"tie_word_embeddings": False}, None, ["1 missing (lm_head.weight)", "tie_word_embeddings: false"]),
}  # fmt: skip


@pytest.mark.parametrize("form", ["file", "pieces", "pickle"])
@pytest.mark.parametrize("what", SPOILED)
def test_weights_of_another_model(what, form, place, tmp_path):
    """A random layer, or one left out, would give scores of no model that anybody trained: the keys are named."""
    config, change, told = SPOILED[what]
    if change:
        change_weights(place, change)
        if form == "pieces":
            pytest.skip("transformers would store a whole model again")
    store_as(place, form)
    configure(place, **config)
    flags = ["--checkpoint_dir", place]
    refused("analyze", *flags, contains=[f"--checkpoint_dir {place}", *told], directory=tmp_path / "out")


ONLY_HEADS = ("untied",)  # what training may start from


@pytest.mark.parametrize("what", SPOILED)
def test_weights_of_another_model_to_start_from(what, place, tmp_path):
    """The same is refused by train.py, but for a new head."""
    config, change, told = SPOILED[what]
    configure(place, **config)
    if change:
        change_weights(place, change)
    flags = ["--model_name_or_path", place, "--config_overrides", "", "--num_train_epochs", "0"]
    if what not in ONLY_HEADS:
        refused("train", *flags, contains=[f"--model_name_or_path {place}", *told], directory=tmp_path / "new")
        return
    out = run("train", *TRAIN, *flags, "--checkpoint_dir", tmp_path / "new").ok()
    assert out.count("New weights, to be trained: lm_head.weight\n") == 1


def test_other_scripts_refuse_it_too(checkpoint, results, spoiled, tmp_path):
    """evaluate_lds.py and run_counterfactual.py, before they retrain."""
    configure(spoiled, n_layer=2)
    out = shutil.copytree(results[1], tmp_path / "out")
    before = contents(out)
    for script in ("evaluate_lds", "run_counterfactual"):
        flags = [*NUMBERS, "--checkpoint_dir", spoiled, "--output_dir", out, "--figure_dir", tmp_path]
        flags += ["--removal_sizes", "3"] if script == "run_counterfactual" else []
        run(script, *flags).error(f"--checkpoint_dir {spoiled}", "more layers")
    assert contents(out) == before


def test_what_old_checkpoints_carry_along_is_no_difference(place, tmp_path):
    """The Hub's GPT-2: names without the model's prefix, causal masks among the weights."""
    weights = load_file(place / "model.safetensors")
    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    flags = ["--checkpoint_dir", place, "--output_dir", tmp_path / "out", "--factor_strategy", "identity"]
    run("analyze", *ANALYZE, *flags).ok()
    flags = ["--model_name_or_path", place, "--config_overrides", "", "--num_train_epochs", "0"]
    out = run("train", *TRAIN, *flags, "--checkpoint_dir", tmp_path / "new").ok()
    assert "New weights" not in out and "not used" not in out
    configure(place, n_layer=1)
    refused("train", *flags, contains=["h.1.", "fewer layers"], directory=tmp_path / "other")


# --------------------------------------------------------------------------------------------------------- a new head


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    """RoBERTa as the Hub has it: a head for masked words, and none for multiple choice."""
    directory = tmp_path_factory.mktemp("masked_lm")
    tokenizer = train_tokenizer(list(demo_corpus().values()), 400, "roberta")
    tokenizer.save_pretrained(directory)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"pad_token_id": 1, "max_position_embeddings": 40, "type_vocab_size": 1, "vocab_size": 400}
    RobertaForMaskedLM(RobertaConfig(**sizes, **ids)).save_pretrained(directory)
    return directory


SWAG = ["--preset", "demo", "--max_length", "24", "--num_train", "24"]
START = ["--config_overrides", "", "--num_train_epochs", "1"]


@pytest.mark.slow
def test_a_new_head_is_named_once(masked_lm, tmp_path):
    """What is new and what is left out, in one line; transformers' own table of it is not printed beside it."""
    flags = [*SWAG, *START, "--model_name_or_path", masked_lm, "--checkpoint_dir", tmp_path / "checkpoint"]
    code = "import sys; from influence_core.experiments import training; from swag_roberta.task import SwagTask; "
    outcome = run_process(["-c", f"{code}training.main(SwagTask, 'a test', sys.argv[1:])", *flags])
    pooler = "roberta.pooler.dense.weight, roberta.pooler.dense.bias"
    line = (
        f"New weights, to be trained: {pooler}, classifier.weight, classifier.bias; stored weights that are not used: "
    )
    assert outcome.ok().count(line + "lm_head.bias, lm_head.dense.bias") == 1
    assert "REPORT" not in outcome.err and "MISSING" not in outcome.err
    place = ["--checkpoint_dir", tmp_path / "checkpoint", "--output_dir", tmp_path / "out"]
    analyze = [*SWAG, "--num_queries", "2", "--factor_strategy", "identity"]
    assert "New weights" not in run("analyze", *analyze, *place, task_class=SwagTask).ok()
    sizes = ["--removal_sizes", "2", "--num_repeats", "1", "--num_counterfactual_queries", "2"]
    flags = [*SWAG, "--num_queries", "2", *place, *sizes, "--figure_dir", tmp_path]
    assert run("run_counterfactual", *flags, task_class=SwagTask).ok().count("New weights, to be trained") == 1


def test_dropouts_change_and_weights_stay(masked_lm):
    """--config_overrides of anything else makes another model, from scratch."""

    def start(overrides):
        given = {"max_length": 24, "model_name_or_path": str(masked_lm), "config_overrides": overrides}
        return SwagTask(**dict.fromkeys(SwagTask.flag_names()) | given).load_model(None)

    plain, still = start(""), start("hidden_dropout_prob=0,attention_probs_dropout_prob=0.25")
    assert (still.config.hidden_dropout_prob, still.config.attention_probs_dropout_prob) == (0, 0.25)
    assert still.roberta.embeddings.dropout.p == 0 and plain.roberta.embeddings.dropout.p > 0
    ours, theirs = (model.roberta.encoder.state_dict() for model in (still, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = start("hidden_dropout_prob=0,num_attention_heads=1").roberta.encoder.state_dict()
    assert not any(torch.equal(other[name], theirs[name]) for name in theirs if name.endswith("query.weight"))
    with pytest.raises(UserError, match="a RobertaConfig has no my_dropout"):
        start("my_dropout=0")


def test_a_head_that_was_never_trained_is_not_analysed(masked_lm, tmp_path):
    """The initial model as --checkpoint_dir: its answers would be random."""
    told = ["4 missing", "classifier.weight", "head was never trained", "--model_name_or_path"]
    flags = [*SWAG, "--checkpoint_dir", masked_lm, "--output_dir", tmp_path]
    run("analyze", *flags, task_class=SwagTask).error(*told)
    assert not contents(tmp_path)


def test_only_the_main_process_names_it(masked_lm, tmp_path, monkeypatch, capsys):
    """Under torchrun all load the model."""
    flags = dict.fromkeys(SwagTask.flag_names()) | {"max_length": 24, "model_name_or_path": str(masked_lm)}
    for rank, times in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        SwagTask(**flags).load_model(None)
        assert capsys.readouterr().out.count("New weights") == times


# ---------------------------------------------------------------------------------------------- tokenizer against model


def test_more_words_than_embeddings(checkpoint, spoiled, tmp_path):
    """In training and in analysis, with both numbers; else an index error, or on a GPU worse, in the first pass."""
    tokenizer = AutoTokenizer.from_pretrained(spoiled)
    tokenizer.add_tokens(["attribute", "assignment"])
    tokenizer.save_pretrained(spoiled)
    refused("analyze", "--checkpoint_dir", spoiled, contains=["402", "400", str(spoiled)], directory=tmp_path / "out")
    start = ["--model_name_or_path", checkpoint, "--config_overrides", "", "--tokenizer_name_or_path", spoiled]
    refused("train", *start, contains=["402", "400", "--tokenizer_name_or_path"], directory=tmp_path / "new")
    small = ["--config_overrides", "n_layer=1,n_embd=16,n_head=2,n_positions=32,vocab_size=300"]
    refused("train", *small, contains=["400", "300", "vocab_size"], directory=tmp_path / "small")


def test_a_tokenizer_that_can_t_pad(checkpoint, masked_lm, tmp_path):
    """GPT-2's own for a task that pads; WikiText's blocks don't, and take it."""
    place = ["--checkpoint_dir", tmp_path / "new"]
    flags = [*SWAG, *START, *place, "--model_name_or_path", masked_lm, "--tokenizer_name_or_path", checkpoint]
    run("train", *flags, task_class=SwagTask).error("no pad token", str(checkpoint))
    assert not contents(tmp_path)


class GPT2Style(SwagTask):
    """A task whose style of tokenizer has no padding."""

    tokenizer_style = "gpt2"


def test_a_new_tokenizer_that_can_t_pad(tmp_path):
    flags = ["--preset", "demo", "--vocab_size", "400", "--checkpoint_dir", tmp_path]
    run("train", *flags, task_class=GPT2Style).error("--vocab_size", "no pad token")


# ------------------------------------------------------------------------------------- saved before it is evaluated


class Failing(WikiTextTask):
    """Training works, evaluation does not."""

    def evaluation_values(self, model, batch):
        raise RuntimeError("out of luck")


class NotFinite(WikiTextTask):
    """A metric that is not finite, of a model that is."""

    def metrics(self, values):
        return {"perplexity": float("inf")}


def assert_usable(checkpoint_dir, out):
    """Found finished by train.py, and analysed."""
    assert [path.name for path in checkpoint_dir.parent.iterdir()] == [checkpoint_dir.name], (
        "no piece is left beside it"
    )
    assert "Found finished" in run("train", *TRAIN, "--checkpoint_dir", checkpoint_dir).ok()
    place = ["--checkpoint_dir", checkpoint_dir, "--output_dir", out]
    run("analyze", *ANALYZE, *place, "--factor_strategy", "identity").ok()


def test_an_evaluation_that_raises_loses_no_training(tmp_path):
    place = tmp_path / "place" / "checkpoint"
    with pytest.raises(RuntimeError, match="out of luck"):
        run("train", *TRAIN, "--checkpoint_dir", place, task_class=Failing)
    assert_usable(place, tmp_path / "out")


def test_a_metric_that_is_not_finite_loses_no_training(tmp_path):
    """The error says that the checkpoint was kept."""
    place = tmp_path / "place" / "checkpoint"
    outcome = run("train", *TRAIN, "--checkpoint_dir", place, task_class=NotFinite)
    outcome.error("perplexity", "inf", f"the checkpoint {place} was kept")
    assert_usable(place, tmp_path / "out")


KILLED = """
import os, signal, sys
from influence_core.experiments import training
from wikitext_gpt2.task import WikiTextTask

class Killed(WikiTextTask):
    def evaluation_values(self, model, batch):
        os.kill(os.getpid(), signal.SIGKILL)

training.main(Killed, "a test", sys.argv[1:])
"""


def test_a_kill_during_evaluation_loses_no_training(checkpoint, tmp_path):
    place = tmp_path / "place" / "checkpoint"
    assert run_process(["-c", KILLED, *TRAIN, "--checkpoint_dir", place]).code == -9
    assert contents(place)["model.safetensors"] == contents(checkpoint)["model.safetensors"]
    assert_usable(place, tmp_path / "out")


class NanAfterTraining(WikiTextTask):
    """Its weights are finite, its loss is not once it does not train."""

    def training_loss(self, model, batch):
        loss = super().training_loss(model, batch)
        return loss if model.training else loss * float("nan")


def test_a_model_whose_loss_is_nan_is_not_saved(tmp_path):
    flags = ["--checkpoint_dir", tmp_path]
    run("train", *TRAIN, *flags, task_class=NanAfterTraining).error(
        "loss is nan", "nothing was saved", "--learning_rate"
    )
    assert not contents(tmp_path)
