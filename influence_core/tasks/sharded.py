"""A model of stored weights, of which each process reads its own part: none ever holds the whole.

The model is made on the meta device, sharded there, and given its part of each tensor of the .safetensors files, by
torch's reader of such files. Buffers, which are small, are whole everywhere.

Where there are no such files, or transformers would have to rename or merge what they hold, or make what they lack,
each process reads the whole model into main memory first, which is said; who asked for it shards it then.
"""

import json
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME

from influence_core.sharding import shard_model
from influence_core.tasks.example import is_main_process
from influence_core.tasks.weights import NO_WEIGHT, Differences, load_weights


def load_sharded_weights(
    auto_model: type, source: str, config: PretrainedConfig, revision: str, mesh: DeviceMesh
) -> tuple[nn.Module, Differences]:
    """As `load_weights`, this process's part of it, on its device; or the whole, where it can't be read in parts.

    Raises:
        UserError: the model has no repeated blocks.
    """
    directory = source
    if not Path(source).is_dir():
        directory = snapshot_download(source, revision=revision, allow_patterns=["model*.safetensors", INDEX])
    if files := _files(Path(directory)):
        model = _read_parts(auto_model, files, config, mesh)
        if model is not None:
            return model, Differences([], [], {})
    if is_main_process():
        print(f"Note: the weights in {source} can't be read in parts: each process holds all of them while it loads")
    return load_weights(auto_model, source, config, revision)


def _files(directory: Path) -> list[Path]:
    """Those that transformers would take: others may lie beside them, of another format or an earlier time."""
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return [directory / SAFE_WEIGHTS_NAME]
    if not (directory / INDEX).is_file():
        return []
    try:
        names = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, OSError):
        return []  # transformers will say what is wrong with it
    return [directory / name for name in sorted(names)]


def _read_parts(auto_model: type, files: list[Path], config: PretrainedConfig, mesh: DeviceMesh) -> nn.Module | None:
    """The model, if just what it has is stored."""
    with init_empty_weights(include_buffers=False):
        model = auto_model.from_config(config, dtype=torch.float32)
    model.tie_weights()
    with tempfile.TemporaryDirectory() as links:  # the reader takes all that it finds
        for path in files:
            Path(links, path.name).symlink_to(path.resolve(strict=True))
        reader = checkpoint.HuggingFaceStorageReader(links)
        stored = {key: list(each.size) for key, each in reader.read_metadata().state_dict_metadata.items()}
        if _matched(model, stored)[1]:
            return None
        shard_model(model.eval(), mesh)
        device = torch.device(mesh.device_type)  # this process's
        buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
        model.to_empty(device=device)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        checkpoint.load(_matched(model, stored)[0], storage_reader=reader)
    return model


def _matched(model: nn.Module, stored: dict[str, list[int]]) -> tuple[dict[str, Tensor], Differences]:
    """({stored name: the tensor that it is for}, what does not match).

    Args:
        stored: {name: shape}, by the model's names, or those of its body or of a model around it.
    """
    tensors, body = model.state_dict(), f"{model.base_model_prefix}."
    ids: dict[str, int] = {name: id(x) for name, x in model.named_parameters(remove_duplicate=False)}
    wanted, unexpected, mismatched, found = {}, [], {}, set()
    for key, shape in stored.items():
        names = (key, body + key, key.removeprefix(body))
        name = next((name for name in names if name in tensors), None)
        if name is None:
            unexpected.append(key)
        elif shape != list(tensors[name].shape):
            mismatched[name] = (shape, list(tensors[name].shape))
        elif ids.get(name) not in found or name not in ids:  # of tied ones the first
            wanted[key] = tensors[name]
        found |= {name, ids.get(name, name)}
    missing = [name for name in tensors if name not in found and ids.get(name) not in found]
    ignored = [NO_WEIGHT.pattern, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    unexpected = [key for key in unexpected if not any(re.search(pattern, key) for pattern in ignored)]
    return wanted, Differences(missing, sorted(unexpected), mismatched)
