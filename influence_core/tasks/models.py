"""The model of a task: from stored weights, which have to be all there, or from scratch by a config."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import DEFAULT_REVISION
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PretrainedConfig

from influence_core.errors import UserError
from influence_core.memory import free_system_memory
from influence_core.tasks.example import is_main_process
from influence_core.tasks.loading import load_from, pattern_of
from influence_core.tasks.sharded import load_sharded_weights
from influence_core.tasks.weights import Differences, load_weights, require_a_start, require_whole
from influence_core.units import gigabytes

Adapt = Callable[[PretrainedConfig, bool], None]  # changes or refuses a config; told whether training starts from it
MODEL_FLAG = "--model_name_or_path"
# The function that some configs call gelu_new, as one kernel instead of eight.
_SIZES = ("hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "intermediate_size", "n_inner",
          "d_model", "d_kv", "d_ff", "num_heads")  # fmt: skip
_NUMBERS_OF_LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")
MOST_LAYERS = 10_000
GELU, FUSED_GELU = "gelu_new", "gelu_pytorch_tanh"


def has_weights(source: str | None) -> bool:
    """Whether a local directory holds any."""
    directory = Path(source or "/nowhere")
    return any(itertools.chain(directory.glob("*.safetensors*"), directory.glob("pytorch_model*")))


def checkpoint_model(auto_model: type, source: str, adapt: Adapt, shard_on: DeviceMesh | None = None) -> nn.Module:
    """A checkpoint, which has to be complete; `shard_on`: the processes that read a part each, where they can."""
    model, differences = _load(auto_model, source, "--checkpoint_dir", adapt, is_start=False, shard_on=shard_on)
    require_whole(model, differences, f"--checkpoint_dir {source}")
    return model


def start_model(
    auto_model: type,
    source: str,
    flag: str,
    adapt: Adapt,
    is_quiet: bool = False,
    revision: str | None = None,
    shard_on: DeviceMesh | None = None,
) -> tuple[nn.Module, list[str]]:
    """(weights to start training from, names of those that are new: the head's may be), which is said."""
    model, differences = _load(auto_model, source, flag, adapt, is_start=True, revision=revision, shard_on=shard_on)
    note = require_a_start(model, differences, f"{flag} {source}")
    if note and not is_quiet and is_main_process():
        print(note)
    return model, [*differences.missing, *differences.mismatched]


def _load(
    auto_model: type,
    source: str,
    flag: str,
    adapt: Adapt,
    is_start: bool,
    revision: str | None = None,
    shard_on: DeviceMesh | None = None,
) -> tuple[nn.Module, Differences]:
    def load():
        config = AutoConfig.from_pretrained(source, revision=revision or DEFAULT_REVISION)
        _adapt(config, adapt, is_start)
        what = auto_model, source, config, revision or DEFAULT_REVISION
        return load_weights(*what) if shard_on is None else load_sharded_weights(*what, shard_on)

    return load_from(source, flag, load)


def new_model(
    auto_model: type,
    config_class: type[PretrainedConfig],
    source: str | None,
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
    adapt: Adapt,
) -> nn.Module:
    """A model with random weights.

    Args:
        config_class: where `source` stores no config.
        values: of the config, from tokenizer and task; those that it does not have are left out.
        overrides: of the config, by the user.
    Raises:
        UserError: the config has no such fields, or no model can be made of it.
    """
    stored: dict[str, Any] = {}
    is_place = source is not None and (source.startswith((".", "~", "/")) or Path(source).exists())
    if is_place and not Path(source).is_dir():  # else it is a Hub's, and its config is not asked for
        raise UserError(f"can't load {MODEL_FLAG} {source}: it is no directory")
    if is_place and not Path(source, "config.json").is_file() and not overrides:
        raise UserError(f"can't load {MODEL_FLAG} {source}: it has neither weights nor a config.json")
    try:
        if source and Path(source, "config.json").is_file():
            config_class = type(AutoConfig.from_pretrained(source))
            stored, _ = config_class.get_config_dict(source)
        default = config_class()
    except Exception as error:  # transformers checks a config in many ways
        raise _no_model(error) from None
    unknown = [key for key in overrides if callable(getattr(default, key, len))]  # methods are none
    if unknown:
        raise UserError(f"--config_overrides: a {config_class.__name__} has no {', '.join(unknown)}")
    values = {key: value for key, value in values.items() if _takes(default, key, value)}
    values |= {key: _as_is_usual(getattr(default, key), value) for key, value in overrides.items()}
    try:
        derived = _derived_fields(config_class, stored, values)
        stored = {key: value for key, value in stored.items() if key not in derived}
        config = config_class(**{**stored, **values})
        _adapt(config, adapt, True)
        _refuse_impossible_sizes(auto_model, config, default)
        model = auto_model.from_config(config)
    except UserError:
        raise
    except Exception as error:
        raise _no_model(error) from None
    if is_main_process():
        sizes = [getattr(config, name, "?") for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
        unused = f", without the weights in {source}" if has_weights(source) else ""
        print("Training from scratch{}: {} layers of {}, vocabulary {}".format(unused, *sizes))
    return model


def freeze(model: nn.Module, pattern: str, flag: str) -> None:
    """Leave the parameters in whose names a regular expression is found as they are: not trained, so not tracked.

    Raises:
        UserError: it is none, or is found in no name, or nothing would be left to train.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = list(filter(pattern_of(flag, pattern).search, trained))
    if not frozen:
        raise UserError(f"{flag} {pattern!r} is found in no name of a parameter; {', '.join(trained)[:200]}, … are")
    if len(frozen) == len(trained):
        raise UserError(f"{flag} {pattern!r} is found in all names of parameters: nothing would be left to train")
    for name in frozen:
        trained[name].requires_grad_(False)


def _as_is_usual(usual: Any, value: Any) -> Any:
    """A number in the type that a config has it in: 1 for 1.0, 1e3 for 1000."""
    if type(usual) is float and type(value) is int:
        return float(value)
    if type(usual) is int and type(value) is float and value.is_integer():
        return int(value)
    return value


def _refuse_impossible_sizes(auto_model: type, config: PretrainedConfig, default: PretrainedConfig) -> None:
    """Raise UserError for a model without layers, or one that this machine's memory does not hold."""
    for name in (*_SIZES, *_NUMBERS_OF_LAYERS):
        size = getattr(config, name, None)
        if not isinstance(size, int):  # what is not said, or wrong in another way
            continue
        if size < 1 and size != getattr(default, name, None):  # XLNet has -1 positions
            raise UserError(f"--config_overrides: {name} is {size}, and no model is made of that")
        if name in _NUMBERS_OF_LAYERS and size > MOST_LAYERS:
            raise UserError(f"--config_overrides: {name} is {size}: at most {MOST_LAYERS:,}")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        size = sum(parameter.nbytes for parameter in auto_model.from_config(config).parameters())
    if size > free_system_memory():
        raise UserError(f"--config_overrides: the weights alone are {gigabytes(size)}, more than there is memory")


def _takes(config: PretrainedConfig, key: str, value: Any) -> bool:
    """Whether the config has a field that can be set: XLNet's number of positions is one that can only be read."""
    try:
        has_field = key.endswith("_token_id") or hasattr(config, key)
        setattr(config, key, value)
    except Exception:  # whatever a config's property raises
        return False
    return has_field


def _derived_fields(config_class: type[PretrainedConfig], stored: Mapping, values: Mapping) -> set[str]:
    """Fields that a config derives from others that are given now: what is stored of them is out of date."""
    before = config_class(**{key: stored[key] for key in values if key in stored}).to_dict()
    after = config_class(**values).to_dict()
    return {key for key in after if key not in values and after[key] != before.get(key)}


def _adapt(config: PretrainedConfig, adapt: Adapt, is_start: bool) -> None:
    for name in ("activation_function", "hidden_act"):
        if getattr(config, name, None) == GELU:
            setattr(config, name, FUSED_GELU)
    adapt(config, is_start)


def _no_model(error: Exception) -> UserError:
    said = f"it knows no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return UserError(f"no model can be made with this config: {said}")
