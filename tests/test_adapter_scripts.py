"""All scripts on LoRA adapters: peft's own directories, retraining, and what is no LoRA or not whole."""

import json
import re
import shutil

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from dailymail_t5.task import DailyMailTask
from influence_core.errors import UserError
from influence_core.experiments.arguments import parse
from influence_core.experiments.bank import Retraining
from influence_core.experiments.retraining import Retrainer
from influence_core.layers import find_tracked_layers
from influence_core.tasks.adapters import Lora, add_adapter
from swag_roberta.task import SwagTask
from tests import models
from tests.scripts import change_record, run
from tests.test_adapters import BERT
from wikitext_gpt2.task import WikiTextTask

GPT2 = ["--config_overrides", "n_layer=2,n_embd=16,n_head=2,n_positions=32", "--block_size", "32"]
T5 = ["--config_overrides", "num_layers=1,d_model=16,d_ff=24,num_heads=2,d_kv=8"]
T5 += ["--max_source_length", "40", "--max_target_length", "12"]


def make_bases(directory):
    """{task: directory of a model with weights}"""
    common = ["--preset", "demo", "--vocab_size", "400", "--num_train", "32", "--num_train_epochs", "1"]
    for name, task_class, sizes in (("gpt2", WikiTextTask, GPT2), ("t5", DailyMailTask, T5)):
        run("train", *common, *sizes, "--checkpoint_dir", directory / name, task_class=task_class).ok()
    task = SwagTask(**dict.fromkeys(SwagTask.flag_names()) | {
        "dataset_name_or_path": "pydoc_data.topics", "vocab_size": 400, "max_length": 24, "config_overrides": "x=1",
    })  # fmt: skip
    config = hf.BertConfig(**BERT, vocab_size=len(task.tokenizer), pad_token_id=task.tokenizer.pad_token_id)
    hf.BertModel(config).save_pretrained(directory / "bert")  # without a head for choices
    task.tokenizer.save_pretrained(directory / "bert")
    return {WikiTextTask: directory / "gpt2", DailyMailTask: directory / "t5", SwagTask: directory / "bert"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


SIZES = {WikiTextTask: GPT2[2:], DailyMailTask: T5[2:], SwagTask: ["--max_length", "24"]}


def train(bases, task_class, directory, *flags, epochs=2):
    common = ["--preset", "demo", "--checkpoint_dir", directory / "adapter", "--num_train", "32"]
    start = ["--model_name_or_path", bases[task_class], "--config_overrides", "", *SIZES[task_class], *flags]
    start += ["--learning_rate", "0.01", "--num_train_epochs", epochs, "--train_batch_size", "8"]
    out = run("train", *common, *start, task_class=task_class).ok()
    return out, [*common, "--output_dir", directory / "results", "--num_queries", "5"]


@pytest.mark.parametrize("task_class, flags, num_layers", [
    (WikiTextTask, ["--lora_rank", "2"], 4),
    pytest.param(DailyMailTask, ["--lora_rank", "2", "--lora_alpha", "3"], 12, marks=pytest.mark.slow),
    pytest.param(SwagTask, ["--lora_rank", "1", "--lora_target_modules", "query", "dense"], 19, marks=pytest.mark.slow),
], ids=["gpt2", "t5", "bert"])  # fmt: skip
def test_adapters_are_trained_and_analyzed(task_class, flags, num_layers, bases, tmp_path):
    """The checkpoint is peft's own directory; retraining moves adapters, and a new head, only."""
    out, common = train(bases, task_class, tmp_path, *flags)
    assert re.search(r"[\d,]+ of [\d,]+ parameters; 32 training", out)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json"} <= names and "config.json" not in names
    out = run("analyze", *common, "--factor_strategy", "ekfac", "identity", task_class=task_class).ok()
    assert f"tracked  {num_layers} layers" in out and "100.0% of the trained" in out and "left out: frozen" in out
    assert "New weights" not in out and "Note: no gradient" not in out
    whole = peft.PeftModel.from_pretrained(
        task_class.auto_model.from_pretrained(bases[task_class]), tmp_path / "adapter"
    )
    assert whole.peft_config["default"].r == int(flags[1])
    sizes = ["--num_masks", "4", "--num_repeats", "1", "--figure_dir", tmp_path]
    assert "ekfac - identity" in run("evaluate_lds", *common, *sizes, task_class=task_class).ok()


@pytest.mark.slow
def test_counterfactual_of_adapters(bases, tmp_path):
    _, common = train(bases, WikiTextTask, tmp_path, "--lora_rank", "2")
    run("analyze", *common).ok()
    sizes = ["--removal_sizes", "0", "9", "--num_repeats", "1", "--num_counterfactual_queries", "5"]
    assert "after removing" in run("run_counterfactual", *common, *sizes, "--figure_dir", tmp_path).ok()


@pytest.mark.parametrize("task_class", [WikiTextTask, pytest.param(SwagTask, marks=pytest.mark.slow)])
def test_a_retraining_begins_where_training_did(task_class, bases, tmp_path):
    """The same new adapter and head; the base model as it was. With no step, the checkpoint is that beginning."""
    _, common = train(bases, task_class, tmp_path, "--lora_rank", "2", epochs=0)
    flags = [str(flag) for flag in (*common, "--num_masks", "2")]
    arguments = parse(task_class, "evaluate_lds", "", flags)
    task = task_class(**arguments.task)
    task.checkpoint_dir = arguments.checkpoint_dir
    data = [list(task.load_dataset(split))[:4] for split in ("train", "validation")]
    arguments.train_batch_size = 4
    retrainer = Retrainer(task, arguments, *data)
    trained = task_class(**arguments.task).load_model(arguments.checkpoint_dir)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(retrainer.initial[name], value, rtol=0, atol=0, msg=name)
    assert any("lora_A" in name for name in retrainer.initial)


def test_a_new_adapter_counts_nothing(bases, tmp_path):
    """B is zero, so no gradient reaches A: one note, and finite scores."""
    _, common = train(bases, WikiTextTask, tmp_path, "--lora_rank", "2", epochs=0)
    strategies = ["--factor_strategy", "identity", "diagonal", "kfac", "ekfac"]
    for damping in ("1e-8", "heuristic"):
        suffix = ["--damping_factor", damping, "--scores_suffix", damping.replace("-", "m")]
        out = run("analyze", *common, *strategies, *suffix).ok()
        (note,) = re.findall("Note: no gradient reaches .*", out)
        assert note.count("lora_A") == 2 and "lora_B" not in note
    stored = [load_file(path) for path in (tmp_path / "results").glob("scores_*/pairwise_scores.safetensors")]
    assert len(stored) == 8 and all(x.isfinite().all() and x.any() for each in stored for x in each.values())


def test_an_adapter_from_elsewhere(bases, tmp_path):
    """Made by peft alone, without a tokenizer and without train.py's record, whatever the flags would train."""
    base = hf.AutoModelForCausalLM.from_pretrained(bases[WikiTextTask])
    whole = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["c_fc"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.add_(0.1 * ("lora" in name))
    whole.save_pretrained(tmp_path / "adapter")
    task = WikiTextTask(
        **dict.fromkeys(WikiTextTask.flag_names()) | {"block_size": 32, "dataset_name_or_path": "pydoc_data.topics"}
    )
    model = task.load_model(str(tmp_path / "adapter"))
    tokens = {"input_ids": torch.arange(9)[None]}
    torch.testing.assert_close(model.eval()(**tokens).logits, whole.eval()(**tokens).logits)
    names = task.tracked_layer_names(model)
    assert len(names) == 4 and all("c_fc.lora_" in name for name in names)
    assert len(find_tracked_layers(model, names)) == 4


# --------------------------------------------------------------------------------------------------- what is refused


OTHERS = {
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
    "IA3": lambda: peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=["c_fc"]),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    "aLoRA": lambda: peft.LoraConfig(r=2, target_modules=["c_fc"], alora_invocation_tokens=[3, 4]),
    "of tokens": lambda: peft.LoraConfig(r=2, target_modules=["c_fc"], trainable_token_indices=[1, 2]),
}
TOLD = {"aLoRA": "LoRA adapter with alora_invocation_tokens", "of tokens": "LoRA adapter with trainable_token_indices"}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_refused_by_name(kind, bases, tmp_path):
    base = hf.AutoModelForCausalLM.from_pretrained(bases[WikiTextTask])
    config = OTHERS[kind]()
    try:
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    except (TypeError, ValueError):  # not for GPT-2's layers: the config alone tells
        config.base_model_name_or_path = str(bases[WikiTextTask])
        config.save_pretrained(tmp_path / "adapter")
    flags = ["--preset", "demo", "--checkpoint_dir", tmp_path / "adapter", "--block_size", "32"]
    for script in ("analyze", "evaluate_lds"):
        error = run(script, *flags, "--output_dir", tmp_path / "results").error()
    error = run("analyze", *flags, "--output_dir", tmp_path / "results").error()
    assert TOLD.get(kind, f"holds a {kind} adapter: only LoRA's can be analyzed") in error


def damage(what, directory):
    """Change a stored adapter in one way, and let it pass for what training left."""
    change_record(directory, files={})
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    stored, values = load_file(weights), json.loads(config.read_text())
    first = sorted(stored)[0]
    if what == "a weight missing":
        del stored[first]
    elif what == "a weight left over":
        stored["base_model.model.other.lora_A.weight"] = stored[first].clone()
    elif what == "another rank":
        values["r"] = 3
    elif what == "no base":
        values["base_model_name_or_path"] = None
    elif what == "a base that is gone":
        values["base_model_name_or_path"] = str(directory / "gone")
        change_record(directory, model_name_or_path="gone")
    elif what == "no adapter's kind":
        values["peft_type"] = "NOTHING"
    save_file(stored, weights)
    config.write_text(json.dumps(values))
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:200])


DAMAGES = {
    "a weight missing": "1 weights are missing, left over or of another shape",
    "another rank": "has rank 3 and alpha 4, not what",
    "a weight left over": "1 weights are missing, left over", "no base": "names no base model",
    "a base that is gone": "name where it is with --model_name_or_path", "no adapter's kind": "NOTHING",
    "cut": "can't load --checkpoint_dir",
}  # fmt: skip


@pytest.fixture(scope="module")
def new_adapter(bases, tmp_path_factory):
    directory = tmp_path_factory.mktemp("new")
    train(bases, WikiTextTask, directory, "--lora_rank", "2", epochs=0)
    return directory / "adapter"


@pytest.mark.parametrize("what", DAMAGES)
def test_adapters_that_are_not_whole(what, new_adapter, tmp_path):
    shutil.copytree(new_adapter, tmp_path / "adapter")
    damage(what, tmp_path / "adapter")
    common = ["--preset", "demo", "--checkpoint_dir", tmp_path / "adapter", "--output_dir", tmp_path / "results"]
    run("analyze", *common).error(DAMAGES[what])
    assert not (tmp_path / "results").exists()


def test_a_base_may_move_but_not_change(bases, tmp_path):
    """Where it is gone from its place, --model_name_or_path is another; with other weights it is another model."""
    shutil.copytree(bases[WikiTextTask], tmp_path / "base")
    moved = {WikiTextTask: tmp_path / "base"}
    _, common = train(moved, WikiTextTask, tmp_path, "--lora_rank", "2")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    run("analyze", *common).error("is not in", "name where it is with --model_name_or_path")
    flags = ["--model_name_or_path", tmp_path / "elsewhere", "--factor_strategy", "identity"]
    run("analyze", *common, *flags).ok()
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 0.01
    model.save_pretrained(tmp_path / "elsewhere")
    run("analyze", *common, *flags, "--overwrite").error("is not the one that the adapter", "was trained on")


def test_a_retraining_moves_the_adapter_only(bases, tmp_path):
    _, common = train(bases, SwagTask, tmp_path, "--lora_rank", "2", epochs=1)
    arguments = parse(SwagTask, "evaluate_lds", "", [str(flag) for flag in (*common, "--num_masks", "2")])
    task = SwagTask(**arguments.task)
    task.checkpoint_dir = arguments.checkpoint_dir
    data = [list(task.load_dataset(split))[:16] for split in ("train", "validation")]
    retrainer = Retrainer(task, arguments, *data)
    retrainer(Retraining(bytes([1] * 16), 1))
    moved = {name for name, x in retrainer.model.state_dict().items() if not torch.equal(x, retrainer.initial[name])}
    assert moved and all("lora_" in name or "classifier.modules_to_save" in name for name in moved)


def test_flags_that_make_no_adapter(bases, tmp_path):
    new = ["--preset", "demo", *GPT2, "--vocab_size", "400", "--checkpoint_dir", tmp_path / "none"]
    run("train", *new, "--lora_rank", "2").error("--lora_rank adapts a model that has weights")
    run("train", *new, "--lora_alpha", "2").error("give --lora_rank as well")
    run("train", *new, "--lora_rank", "0").error("--lora_rank must be positive")
    start = [*new, "--model_name_or_path", bases[WikiTextTask], "--config_overrides", ""]
    run("train", *start, "--lora_rank", "2", "--lora_target_modules", "q_proj").error("no adapter", "q_proj")
    flags = ["--preset", "demo", "--checkpoint_dir", bases[WikiTextTask], "--lora_rank", "2"]
    run("analyze", *flags).error("holds a whole model and no adapter")
    some = ["--lora_rank", "2", "--lora_target_modules", "c_attn", "c_atn"]
    run("train", *start, *some).error("--lora_target_modules c_atn is no layer", "c_attn")
    train(bases, WikiTextTask, tmp_path, "--lora_rank", "2", epochs=0)
    adapter = ["--preset", "demo", "--checkpoint_dir", tmp_path / "adapter"]
    run("analyze", *adapter, "--lora_rank", "7").error("has rank 2 and alpha 4, not what --lora_rank")
    of_adapter = ["--config_overrides", "", "--model_name_or_path", tmp_path / "adapter"]
    run("train", *new, *of_adapter).error("is an adapter, not a model", "gpt2")
    run("train", *start, "--lora_rank", "2", "--checkpoint_dir", bases[WikiTextTask]).error("choose another")
    with pytest.raises(UserError, match="no adapter for this GPT2LMHeadModel"):
        add_adapter(models.make_model(hf.AutoModelForCausalLM, models.CAUSAL["GPT-2"]), Lora(2, None, ["none"]), [])


def test_a_checkpoint_of_another_kind_takes_no_old_weights_along(bases, tmp_path):
    """A whole model, an adapter, a whole model again in one directory; what the user put there stays."""
    whole = ["--preset", "demo", "--vocab_size", "400", *GPT2, "--num_train", "32", "--num_train_epochs", "0"]
    whole += ["--checkpoint_dir", tmp_path / "adapter", "--overwrite"]
    run("train", *whole).ok()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    train(bases, WikiTextTask, tmp_path, "--lora_rank", "2", "--overwrite", epochs=0)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and not names & {"model.safetensors", "config.json"}
    run("train", *whole).ok()
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"model.safetensors", "notes.txt"} <= names and not any(
        "adapter" in name or "base" in name for name in names
    )


def test_a_checkpoint_in_a_directory_of_several(new_adapter, tmp_path):
    """peft writes an adapter that has a name, and a trainer each checkpoint, into a directory of its own."""
    for name in ("first", "second"):
        shutil.copytree(new_adapter, tmp_path / "all" / name)
    common = ["--preset", "demo", "--output_dir", tmp_path / "results", "--factor_strategy", "identity"]
    error = run("analyze", *common, "--checkpoint_dir", tmp_path / "all").error("no checkpoint in", "itself")
    assert f"--checkpoint_dir: {tmp_path}/all/first, {tmp_path}/all/second" in error
    run("analyze", *common, "--checkpoint_dir", tmp_path / "all" / "second", "--num_queries", "2").ok()


def test_a_base_s_revision_is_asked_for(new_adapter, bases, tmp_path, monkeypatch):
    """Of config, weights and tokenizer; a local directory has none, so what is asked of transformers is looked at."""
    shutil.copytree(new_adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v7"}))
    for tokenizer_file in (tmp_path / "adapter").glob("token*"):
        tokenizer_file.unlink()
    (tmp_path / "adapter" / "training.json").unlink()
    asked = []
    for auto in (hf.AutoConfig, hf.AutoModelForCausalLM, hf.AutoTokenizer):
        real = auto.from_pretrained

        def note(source, *arguments, real=real, auto=auto, **options):
            asked.append((auto.__name__, str(source), options.get("revision")))
            return real(source, *arguments, **options)

        monkeypatch.setattr(auto, "from_pretrained", note)
    task = WikiTextTask(**dict.fromkeys(WikiTextTask.flag_names()) | {"block_size": 32})
    task.load_model(str(tmp_path / "adapter"))
    base = str(bases[WikiTextTask])
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    assert set(asked) == {(name, base, "v7") for name in names}
