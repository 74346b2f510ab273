"""Models of which each process has a part: what a unit is, loading stored weights, adapters."""

import re
import shutil

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from influence_core.analysis import analyze
from influence_core.errors import UserError
from influence_core.fingerprints import model_fingerprint
from influence_core.runtime import Runtime
from influence_core.sharded_units import sharded_units
from influence_core.sharding import come_to_rest, is_sharded, process_mesh, shard_model, whole
from influence_core.study import Study
from influence_core.tasks.adapters import adapted_model
from influence_core.tasks.models import checkpoint_model
from tests.models import CAUSAL, ENCODER_DECODERS, ENCODERS, RandomCausal, RandomClasses, make_model
from tests.test_exactness import DAMPING, SEED, relative_error
from tests.test_processes import run_processes

CLASSES = {"num_labels": 3, "pad_token_id": 1}
SIZES = {"query_batch_size": 2, "train_batch_size": 3, "factor_batch_size": 4}

ARCHITECTURES = {
    "GPT-2": (hf.AutoModelForCausalLM, CAUSAL["GPT-2"]),
    "T5": (hf.AutoModelForSeq2SeqLM, ENCODER_DECODERS["T5"]),
    "RoBERTa": (hf.AutoModelForSequenceClassification, ENCODERS["RoBERTa"]),
    "Llama": (hf.AutoModelForCausalLM, CAUSAL["Llama"]),
}


def load_parts(directory, runtime):
    """{model: (its parameters, gathered; its fingerprint; numbers of parameters that this process has)}"""
    found = {}
    for name, auto_model in {**{name: each[0] for name, each in ARCHITECTURES.items()}, **NOT_IN_PARTS}.items():
        model = checkpoint_model(auto_model, str(directory / name), lambda *_: None, process_mesh("cpu"))
        assert is_sharded(model.parameters()) == (name not in NOT_IN_PARTS)
        if name in NOT_IN_PARTS:  # as who loads it does
            shard_model(model, process_mesh("cpu"))
        gathered = {key: whole(value) for key, value in model.state_dict().items()}
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        found[name] = (gathered, model_fingerprint(model), held, any(module.training for module in model.modules()))
    with pytest.raises(UserError, match="missing.*wte.*incomplete"):
        checkpoint_model(*partial_model(directory), lambda *_: None, process_mesh("cpu"))
    with pytest.raises(UserError, match="safetensors"):
        checkpoint_model(hf.AutoModelForCausalLM, str(directory / "none"), lambda *_: None, process_mesh("cpu"))
    return found


# No .safetensors, and names that transformers translates.
NOT_IN_PARTS = {"GPT-2 in a .bin": hf.AutoModelForCausalLM, "RoBERTa of old": hf.AutoModelForSequenceClassification}


def weights_of(directory):
    return load_file(directory / "model.safetensors")


def partial_model(directory):
    return hf.AutoModelForCausalLM, str(directory / "partial")


def test_each_process_loads_its_part_of_a_checkpoint(tmp_path):
    """Of one file or several, float32 or bfloat16: gathered it is what transformers loads, of the same fingerprint."""
    for name, (auto_model, config) in ARCHITECTURES.items():
        model = make_model(auto_model, config).to(torch.bfloat16 if name == "Llama" else torch.float32)
        model.save_pretrained(tmp_path / name, max_shard_size="1KB" if name == "T5" else "1GB")
    model = make_model(hf.AutoModelForCausalLM, CAUSAL["GPT-2"]).float()
    state = {name: x for name, x in model.state_dict().items() if "wte" not in name and "lm_head" not in name}
    model.save_pretrained(tmp_path / "partial", state_dict=state)
    model.config.save_pretrained(tmp_path / "none")
    torch.manual_seed(1)
    other = {name: torch.randn_like(tensor) for name, tensor in weights_of(tmp_path / "Llama").items()}
    save_file(other, tmp_path / "Llama" / "model.of_earlier.safetensors", {"format": "pt"})  # is not looked at
    shutil.copytree(tmp_path / "GPT-2", tmp_path / "GPT-2 in a .bin")
    weights = weights_of(tmp_path / "GPT-2")
    torch.save(weights, tmp_path / "GPT-2 in a .bin" / "pytorch_model.bin")
    (tmp_path / "GPT-2 in a .bin" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "RoBERTa", tmp_path / "RoBERTa of old")
    weights = weights_of(tmp_path / "RoBERTa")
    old = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name): tensor for name, tensor in weights.items()}
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / "RoBERTa of old" / "model.safetensors", {"format": "pt"})
    returned = run_processes(load_parts, 2, tmp_path)
    for name, auto_model in {**{name: each[0] for name, each in ARCHITECTURES.items()}, **NOT_IN_PARTS}.items():
        expected = checkpoint_model(auto_model, str(tmp_path / name), lambda *_: None)
        size = sum(parameter.numel() for parameter in expected.parameters())
        for found in returned:
            gathered, fingerprint, held, is_training = found[name]
            assert gathered.keys() == expected.state_dict().keys()
            assert all(torch.equal(gathered[key], value) for key, value in expected.state_dict().items())
            assert fingerprint == model_fingerprint(expected) and not is_training
            assert held < 0.6 * size


ADAPTED = {  # name: (task, auto model, config, changes, of the adapter)
    "Llama": (RandomCausal, hf.AutoModelForCausalLM, CAUSAL["Llama"], {}, {"target_modules": ["q_proj", "up_proj"]}),
    "RoBERTa": (RandomClasses, hf.AutoModelForSequenceClassification, ENCODERS["RoBERTa"], CLASSES,
                {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
}  # fmt: skip


def adapted_scores(directory, runtime):
    """{base model: (names of tracked layers, scores, fingerprint)}"""
    sharded, found = runtime.world_size > 1, {}
    runtime = Runtime(seed=SEED, rank=runtime.rank, world_size=runtime.world_size, sharded=sharded)
    mesh = process_mesh("cpu") if sharded else None
    for name, (make_task, auto_model, *_) in ADAPTED.items():
        place = str(directory / name / "adapter")
        model = adapted_model(auto_model, place, None, None, lambda *_: None, False, mesh).eval()
        if sharded and not is_sharded(model.parameters()):
            shard_model(model, mesh)
        task = make_task()
        study = Study(task, model, task.load_dataset("train"), directory / f"{name} {runtime.world_size}", runtime)
        names = [layer.name for layer in study.layers]
        scores = analyze(study, ["ekfac"], task.load_dataset("validation"), damping=DAMPING, **SIZES)
        found[name] = names, scores["ekfac"], model_fingerprint(model)
    return found


@pytest.mark.slow
def test_an_adapter_of_a_sharded_model(tmp_path):
    """LoRA on a base model of which each process has a part: tracked alike, equal scores within float32's rounding."""
    torch.manual_seed(2)
    for name, (_, auto_model, config, changes, of_adapter) in ADAPTED.items():
        make_model(auto_model, config, **changes).float().save_pretrained(tmp_path / name / "base")
        base = auto_model.from_pretrained(tmp_path / name / "base")
        adapter = peft.get_peft_model(base, peft.LoraConfig(r=2, **of_adapter))
        for parameter in (parameter for key, parameter in adapter.named_parameters() if "lora" in key):
            nn.init.normal_(parameter)
        adapter.save_pretrained(tmp_path / name / "adapter")
    expected = adapted_scores(tmp_path, Runtime())
    for found in run_processes(adapted_scores, 2, tmp_path):
        for name, (names, scores, fingerprint) in expected.items():
            assert (found[name][0], found[name][2]) == (names, fingerprint)
            assert relative_error(found[name][1], scores) < 1e-4


class Own(nn.Module):
    """A person's: positions of the model itself, a block that is used twice, and two that share a matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Parameter(torch.randn(5, 4))
        repeated, others = nn.Linear(4, 4), [nn.Linear(4, 4), nn.Linear(4, 4)]
        others[1].weight = others[0].weight
        self.blocks = nn.ModuleList([repeated, repeated, *others])

    def forward(self, x):
        x = x + self.positions
        for block in self.blocks:
            x = block(x).tanh()
        return x


def passes_of_own(directory, runtime):
    """[(outputs, gradient of the input)] of passes, each from rest."""
    model = Own()
    if runtime.world_size > 1:
        shard_model(model, process_mesh("cpu"))
    model.requires_grad_(False)
    results = []
    for seed in range(2):
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        outputs = model(x)
        (gradient,) = torch.autograd.grad(outputs.sum(), x)
        come_to_rest(model)
        assert all(is_sharded([each]) == (runtime.world_size > 1) for each in model.parameters())
        results.append((outputs.detach(), gradient))
    return results


def test_a_model_with_parameters_beside_its_blocks_and_shared_blocks(tmp_path):
    expected = passes_of_own(tmp_path, Runtime())
    for found in run_processes(passes_of_own, 2, tmp_path):
        for ours, theirs in zip(found, expected, strict=True):
            for actual, wanted in zip(ours, theirs, strict=True):
                torch.testing.assert_close(actual, wanted)


def test_units_are_blocks_and_what_lies_outside():
    """Every parameter is of one unit; a tied table, wherever it is used, is one; a model without blocks is refused."""
    for name, (auto_model, config) in ARCHITECTURES.items():
        model = make_model(auto_model, config)
        units = [{id(x) for module in unit for x in module.parameters()} for unit in sharded_units(model)]
        assert sum(map(len, units)) == len(list(model.parameters())), name
        assert set.union(*units) == {id(x) for x in model.parameters()}
    with pytest.raises(UserError, match="no repeated blocks"):
        sharded_units(nn.Sequential(nn.Linear(2, 2)))
