"""Digests that tell models and datasets apart: what a stored result says it was made from."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_core.sharding import whole


def digest(chunks: Iterable[bytes]) -> str:
    """A short checksum over chunks of bytes."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Its numbers, for a digest."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def model_fingerprint(model: nn.Module) -> str:
    """A digest of all parameters and buffers, names and values, and of a Transformers model's config and adapters.

    The configs tell models apart whose tensors are the same: number of heads, activation, dropout, an adapter's scale.
    """

    def parts():
        config = model.config.to_dict() if hasattr(model, "config") else {}
        adapters = [adapter.to_dict() for adapter in getattr(model, "peft_config", {}).values()]
        for each in (config, *adapters):
            kept = {key: value for key, value in each.items() if key not in _NOT_OF_THE_MODEL}
            yield json.dumps(kept, sort_keys=True, default=_in_order).encode()
        for name, tensor in model.state_dict().items():
            yield name.encode()
            yield tensor_bytes(whole(tensor))

    return digest(parts())


# Of a config, a model's or an adapter's: where it came from and how it was loaded.
_NOT_OF_THE_MODEL = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype",
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode",
}  # fmt: skip


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def dataset_fingerprint(dataset: Sequence[Any]) -> str:
    """A digest of all examples in order.

    An example is a tensor, array, string, number, boolean or None, or a mapping or sequence of examples.

    Raises:
        TypeError: it is something else, whose value can't be told from its type.
    """

    def parts(value):
        if isinstance(value, Tensor | np.ndarray | np.generic):
            tensor = torch.as_tensor(value)
            yield f"{tensor.dtype}{tuple(tensor.shape)}:".encode()
            yield tensor_bytes(tensor)
        elif isinstance(value, Mapping):
            yield f"mapping {len(value)}:".encode()
            for key in sorted(value):
                yield f"{key!r}=".encode()
                yield from parts(value[key])
        elif isinstance(value, str | bytes | int | float | None):
            yield f"{value!r};".encode()
        elif isinstance(value, Sequence):
            yield f"sequence {len(value)}:".encode()
            for item in value:
                yield from parts(item)
        else:
            raise TypeError(f"an example holds a {type(value).__name__}: no fingerprint can be made of it")

    return digest(part for index in range(len(dataset)) for part in parts(dataset[index]))
