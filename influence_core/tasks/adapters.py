"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685), by the peft package: trained in place of all of a model.

Beside the frozen matrix W of a layer, an adapter computes (alpha / rank) B A x; A and B are linear layers like others,
and what is tracked. A new head is trained in full. A checkpoint is a directory as peft writes it.
"""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from influence_core.errors import UserError, first_line
from influence_core.fingerprints import digest, tensor_bytes
from influence_core.sharding import whole
from influence_core.tasks.loading import load_from
from influence_core.tasks.models import MODEL_FLAG, Adapt, start_model

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.distributed.device_mesh import DeviceMesh

CONFIG, BASE = "adapter_config.json", "base_model.json"  # peft's, and ours beside it: which base it is
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CHECKPOINT_FLAG = "--checkpoint_dir"
ALL_LINEAR = "all-linear"
NOT_LAYERS = ("base_layer", "default")  # of names: parts of an adapter
# Of LoraConfig: the forward pass needs the model around, or what is trained is no layer.
MORE_THAN_LORA = (
    "alora_invocation_tokens", "target_parameters", "layer_replication", "trainable_token_indices", "arrow_config",
    "use_qalora", "use_bdlora",
)  # fmt: skip
# Attributes of a model: the PeftModel that it is in, which can save it; a digest of it without the adapter.
_WHOLE, _BASE = "_adapted", "_base_digest"


@dataclass(frozen=True)
class Lora:
    """What the flags say of an adapter."""

    rank: int
    alpha: float | None
    target_modules: Sequence[str] | None

    def config(self, new_modules: Sequence[str]) -> "PeftConfig":
        """peft's own; `new_modules` are trained in full."""
        from peft import LoraConfig  # here and below: only where it is needed, it takes long to import

        targets = self.target_modules
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            target_modules=targets[0] if targets == [ALL_LINEAR] else targets,
            modules_to_save=list(new_modules) or None,
            exclude_modules=list(new_modules) or None,
        )


def is_adapter(directory: str | Path | None) -> bool:
    """Whether a checkpoint holds an adapter and not a model."""
    return directory is not None and Path(directory, CONFIG).is_file()


def add_adapter(model: nn.Module, lora: Lora, new_weights: Sequence[str]) -> nn.Module:
    """The model with a new adapter, that changes nothing yet, and all else frozen.

    Args:
        new_weights: names of those that no checkpoint gave: their modules are trained in full.
    Raises:
        UserError: peft finds no layers for it.
    """
    base = _digest(model, new_weights)
    model = _adapted(model, lora.config(_modules_of(new_weights)))
    object.__setattr__(model, _BASE, base)
    _refuse_misspelt(model, lora.target_modules)
    return model


def adapted_model(
    auto_model: type,
    directory: str,
    model_source: str | None,
    lora: Lora | None,
    adapt: Adapt,
    is_fresh: bool,
    shard_on: "DeviceMesh | None" = None,
) -> nn.Module:
    """The base model of a stored adapter, with that adapter; or with a new one of the same making, to be trained.

    Args:
        model_source: another place of the base model, where it is no longer at its own.
        lora: what flags say of the adapter.
        shard_on: the processes that get a part of each parameter of the base model, unless modules were trained
            in full beside it; the adapter is whole.
    Raises:
        UserError: it is of another kind than LoRA, is not whole, or not what the flags say; its base model can't be
            had, or is another now.
    """
    from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    config = load_from(directory, CHECKPOINT_FLAG, lambda: PeftConfig.from_pretrained(directory))
    _refuse_other_kinds(config, directory)
    if lora is not None and (lora.rank, lora.alpha or config.lora_alpha) != (config.r, config.lora_alpha):
        raise UserError(f"the adapter in {directory} has rank {config.r} and alpha {config.lora_alpha}, not what "
                        "--lora_rank and --lora_alpha say: leave these out")  # fmt: skip
    base, revision = base_of(directory, config)
    if model_source is not None and not Path(base).exists() and Path(model_source).exists():
        base = model_source
    what = f"base_model_name_or_path (in {directory}/{CONFIG})"
    if base.startswith((".", "~", os.sep)) and not Path(base).exists():
        raise UserError(
            f"the base model of the adapter in {directory} is not in {base}: name where it is with {MODEL_FLAG}"
        )
    if config.modules_to_save:  # copies of modules, which can't be made of parts: who loads it shards it whole
        shard_on = None
    model, new_weights = start_model(auto_model, base, what, adapt, True, revision, shard_on)
    untrained = [name for name in _modules_of(new_weights) if not _is_within(name, config.modules_to_save or ())]
    if untrained:
        raise UserError(f"neither the base model {base} nor the adapter in {directory} has weights for "
                        f"{', '.join(untrained)}: train it with them in modules_to_save")  # fmt: skip
    _refuse_another_base(model, new_weights, base, directory)
    config.inference_mode = False
    model = _adapted(model, config)
    if not is_fresh:
        whole = getattr(model, _WHOLE)
        if not any(Path(directory, name).is_file() for name in WEIGHTS):
            raise UserError(f"{directory} has the config of an adapter and no weights ({' or '.join(WEIGHTS)})")
        stored = load_from(directory, CHECKPOINT_FLAG, lambda: load_peft_weights(directory, device="cpu"))
        wanted, there = get_peft_model_state_dict(whole, save_embedding_layers=False), whole.state_dict()
        known = {**there, **wanted}  # embeddings may be stored too, as they are in the base or trained
        differing = sorted(
            key for key in stored.keys() | wanted.keys()
            if key not in stored or key not in known or stored[key].shape != known[key].shape
        )  # fmt: skip
        if differing:
            raise UserError(
                f"the adapter in {directory} is not of this config and base model: {len(differing)} weights are "
                f"missing, left over or of another shape, the first {differing[0]}"
            )
        set_peft_model_state_dict(whole, stored)
        for name, module in model.named_modules():
            # What the base has at random under a trained copy is unused; but a model has to be the same each time.
            if hasattr(module, "original_module") and any(key.startswith(f"{name}.") for key in new_weights):
                copy = module.modules_to_save[whole.active_adapter]
                module.original_module.load_state_dict(copy.state_dict())
    return model


def base_of(directory: str | Path, config: "PeftConfig | None" = None) -> tuple[str, str | None]:
    """(the base model of an adapter, as it was named where it was trained; its revision on the Hub)"""
    from peft import PeftConfig

    config = config or load_from(str(directory), CHECKPOINT_FLAG, lambda: PeftConfig.from_pretrained(directory))
    if not config.base_model_name_or_path:
        raise UserError(f"{directory}/{CONFIG} names no base model: write it into base_model_name_or_path")
    return config.base_model_name_or_path, config.revision


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of a model and a digest of its base; or the model itself, where it has none."""
    whole = getattr(model, _WHOLE, None)
    if whole is None:
        model.save_pretrained(directory)
        return
    whole.save_pretrained(directory)
    Path(directory, BASE).write_text(json.dumps({"fingerprint": getattr(model, _BASE)}))


def _digest(base: nn.Module, new_weights: Sequence[str]) -> str:
    """Of the weights that a base model came with."""
    return digest(
        chunk
        for name, tensor in base.state_dict().items()
        if name not in new_weights
        for chunk in (name.encode(), tensor_bytes(whole(tensor)))
    )


def _adapted(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what peft calls in transformers
            whole: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:  # what peft has against the layers
        raise UserError(
            f"no adapter for this {type(model).__name__}: {first_line(error)} (--lora_target_modules names layers)"
        ) from None
    # The model itself has the adapter's layers now; what is around it would only hide its arguments.
    model = whole.get_base_model()
    object.__setattr__(model, _WHOLE, whole)  # not as a part of it
    return model


def _refuse_misspelt(model: nn.Module, targets: Sequence[str] | None) -> None:
    """peft itself is content if any of several names is that of a layer."""
    found = getattr(model, _WHOLE).base_model.targeted_module_names
    missing = [name for name in targets or () if not any(_is_within(layer, [name]) for layer in found)]
    if missing and list(targets or ()) != [ALL_LINEAR]:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name, module in model.named_modules() if _is_layer(module))
        raise UserError(f"--lora_target_modules {missing[0]} is no layer of this {type(model).__name__}: it has "
                        f"{', '.join(kind for kind in kinds if kind not in NOT_LAYERS)}")  # fmt: skip


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding)) or hasattr(module, "base_layer")


def _refuse_another_base(model: nn.Module, new_weights: Sequence[str], base: str, directory: str) -> None:
    """Where it is noted which the adapter was trained on: as train.py does, and peft does not."""
    path = Path(directory, BASE)
    if path.is_file() and json.loads(path.read_text()).get("fingerprint") != _digest(model, new_weights):
        raise UserError(f"the base model {base} is not the one that the adapter in {directory} was trained on: its "
                        "weights are others now")  # fmt: skip


def _refuse_other_kinds(config: "PeftConfig", directory: str) -> None:
    """What is no LoRA, or one whose forward pass takes more than its layers."""
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind == "LORA" and getattr(config, "use_dora", False):
        kind = "DoRA"
    if kind != "LORA":
        raise UserError(
            f"{directory} holds a {kind} adapter: only LoRA's can be analyzed, whose matrices A and B are linear layers"
        )
    more = [field for field in MORE_THAN_LORA if getattr(config, field, None)]
    if more:
        raise UserError(f"{directory} holds a LoRA adapter with {more[0]}, which can't be analyzed: only plain ones")


def _modules_of(weights: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in weights))


def _is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether it is one of these modules, or in one, by the ends of their names, as peft tells."""
    return any(f".{module}." in f".{name}." for module in modules)
