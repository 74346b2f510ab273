"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685), by the peft package: trained in place of all of a model.

Beside the frozen matrix W of a layer, an adapter computes (alpha / rank) B A x; A and B are linear layers like others,
and what is tracked. A new head is trained in full. A checkpoint is a directory as peft writes it.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig

from influence_core.errors import UserError, first_line
from influence_core.tasks.loading import load_from
from influence_core.tasks.models import start_model

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

CONFIG = "adapter_config.json"
_WHOLE = "_adapted"  # attribute of a model: the PeftModel that it is in, which can save it


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
            target_modules=targets[0] if targets == ["all-linear"] else targets,
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
    return _adapted(model, lora.config(_modules_of(new_weights)))


def adapted_model(
    auto_model: type, directory: str, adapt: Callable[[PretrainedConfig, bool], None], is_fresh: bool
) -> nn.Module:
    """The base model of a stored adapter, with that adapter; or with a new one of the same making, to be trained.

    Raises:
        UserError: it is of another kind than LoRA, is not whole, or its base model can't be had.
    """
    from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    config = load_from(directory, "--checkpoint_dir", lambda: PeftConfig.from_pretrained(directory))
    _refuse_other_kinds(config, directory)
    base = base_of(directory, config)
    what = f"base_model_name_or_path (in {directory}/{CONFIG})"
    model, new_weights = start_model(auto_model, base, what, adapt, is_quiet=True)
    untrained = [name for name in _modules_of(new_weights) if not _is_of(name, config.modules_to_save or ())]
    if untrained:
        raise UserError(f"the base model {base} has no weights for {', '.join(untrained)}, nor has the adapter in "
                        f"{directory}: the base is another than it was trained on")  # fmt: skip
    config.inference_mode = False
    model = _adapted(model, config)
    if not is_fresh:
        whole = getattr(model, _WHOLE)
        stored = load_from(directory, "--checkpoint_dir", lambda: load_peft_weights(directory, device="cpu"))
        wanted = get_peft_model_state_dict(whole)
        differing = sorted(
            key for key in stored.keys() | wanted.keys()
            if key not in stored or key not in wanted or stored[key].shape != wanted[key].shape
        )  # fmt: skip
        if differing:
            raise UserError(
                f"the adapter in {directory} is not of this config and base model: {len(differing)} weights are "
                f"missing, left over or of another shape, the first {differing[0]}"
            )
        set_peft_model_state_dict(whole, stored)
        for name in _modules_of(
            new_weights
        ):  # the base has them at random, unused: a model has to be the same each time
            wrapper = model.get_submodule(name)
            wrapper.original_module.load_state_dict(wrapper.modules_to_save[whole.active_adapter].state_dict())
    return model


def base_of(directory: str | Path, config: "PeftConfig | None" = None) -> str:
    """The base model of an adapter, as it was named where it was trained."""
    from peft import PeftConfig

    config = config or load_from(str(directory), "--checkpoint_dir", lambda: PeftConfig.from_pretrained(directory))
    if not config.base_model_name_or_path:
        raise UserError(f"{directory}/{CONFIG} names no base model: write it into base_model_name_or_path")
    return config.base_model_name_or_path


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of a model, or the model itself where it has none."""
    getattr(model, _WHOLE, model).save_pretrained(directory)


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


def _refuse_other_kinds(config: "PeftConfig", directory: str) -> None:
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind == "LORA" and getattr(config, "use_dora", False):
        kind = "DoRA"
    if kind != "LORA":
        raise UserError(
            f"{directory} holds a {kind} adapter: only LoRA's can be analyzed, whose matrices A and B are linear layers"
        )


def _modules_of(weights: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in weights))


def _is_of(name: str, modules: Sequence[str]) -> bool:
    """As peft tells."""
    return any(name == module or name.endswith(f".{module}") for module in modules)
