"""A model from stored weights, and what of them is missing, left over or of another shape than its config says."""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from influence_core.errors import UserError
from influence_core.tasks.loading import overheard

NO_WEIGHT = re.compile(r"\.masked_bias$")  # a constant that old checkpoints of GPT-2 carry along
SHOWN_KEYS = 4  # of a kind of difference


@dataclass(frozen=True)
class Differences:
    """Between the weights on disk and the model; those that the architecture itself ties or ignores don't count."""

    missing: list[str]  # all in the model's order
    unexpected: list[str]
    mismatched: dict[str, tuple[list[int], list[int]]]  # {name: (shape on disk, shape in the model)}

    def __bool__(self):
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self):
        shapes = [f"{name} is {list(disk)}, not {list(model)}" for name, (disk, model) in self.mismatched.items()]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        return ", ".join(f"{len(keys)} {kind} ({_listed(keys)})" for kind, keys in kinds.items() if keys)


def load_weights(
    auto_model: type, source: str, config: PretrainedConfig, revision: str
) -> tuple[nn.Module, Differences]:
    """The model in float32, and how what is stored in `source` differs from it, on which nothing is printed."""
    with overheard("transformers", lambda record: "LOAD REPORT" in record.getMessage()):
        model, info = auto_model.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    in_order = {name: number for number, name in enumerate(model.state_dict())}.__getitem__
    shapes = {name: (disk, here) for name, disk, here in info["mismatched_keys"]}
    return model, Differences(
        sorted(info["missing_keys"], key=in_order),
        sorted(key for key in info["unexpected_keys"] if not NO_WEIGHT.search(key)),
        {name: shapes[name] for name in sorted(shapes, key=in_order)},
    )


def require_whole(model: nn.Module, found: Differences, what: str) -> None:
    """Raise UserError if there is any difference: this is not the model that was trained."""
    if found:
        raise UserError(f"the weights of {what} are not those of a {type(model).__name__} of its config: "
                        f"{found}; {_cause(model, found)}")  # fmt: skip


def require_a_start(model: nn.Module, found: Differences, what: str) -> str | None:
    """What to print of weights to start training from: which are new, and which are not used.

    Raises:
        UserError: it is more than another head: layers or embeddings would be random, or be left out.
    """
    blocks = Blocks(model)
    missing = [key for key in found.missing if blocks.index(key) or key in _embeddings(model)]
    unexpected = [key for key in found.unexpected if blocks.index(key)]
    mismatched = {key: each for key, each in found.mismatched.items() if blocks.index(key) or key in _embeddings(model)}
    require_whole(model, Differences(missing, unexpected, mismatched), what)
    notes = []
    new = [*found.missing, *found.mismatched]  # a head may be of other classes
    if new:
        notes.append(f"New weights, to be trained: {_listed(new, 8)}")
    if found.unexpected:
        notes.append(f"{'s' if notes else 'S'}tored weights that are not used: {_listed(found.unexpected, 8)}")
    return "; ".join(notes) or None


def _embeddings(model: nn.Module) -> set[str]:
    """The names of weights that are looked up: of words, positions and the like."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


class Blocks:
    """The repeated blocks of a model: the members of its body's ModuleLists, wherever on disk the body lies."""

    def __init__(self, model: nn.Module):
        lists = {name: module for name, module in model.base_model.named_modules() if isinstance(module, nn.ModuleList)}
        self.sizes = {name: len(members) for name, members in lists.items()}

    def index(self, key: str) -> tuple[str, int] | None:
        """(ModuleList, index in it) of a weight; the outermost one, where they are nested."""
        for name in self.sizes:
            if match := re.search(rf"(?:^|\.){re.escape(name)}\.(\d+)\.", key):
                return name, int(match[1])
        return None

    def is_beyond(self, key: str) -> bool:
        """Whether the weight is of a block that the model does not have."""
        found = self.index(key)
        return found is not None and found[1] >= self.sizes[found[0]]


def _cause(model: nn.Module, found: Differences) -> str:
    """What is the likely cause, and what to do about it."""
    blocks = Blocks(model)
    stored = {blocks.index(key) for key in model.state_dict().keys() - {*found.missing}}
    absent = {blocks.index(key) for key in found.missing} - stored - {None}
    if found.mismatched:
        return "its config.json is of a model of another size: mend it, or name other weights"
    if any(blocks.is_beyond(key) for key in found.unexpected):
        return "its config.json has fewer layers than the weights: mend it, or name other weights"
    if absent and stored - {None}:
        return "its config.json has more layers than the weights: mend it, or name other weights"
    lacks_body = absent or _embeddings(model) & {*found.missing} or model.base_model is model
    if not lacks_body and not all(key.startswith(f"{model.base_model_prefix}.") for key in found.missing):
        head = model.get_output_embeddings()
        is_untied = head is not None and not getattr(model.config, "tie_word_embeddings", True)
        if is_untied and any(value is head.weight for key, value in model.named_parameters() if key in found.missing):
            return (
                "its head was never trained, or is the embedding (its config.json says tie_word_embeddings: false): "
                "mend that, or train it with --model_name_or_path"
            )
        return "its head was never trained: train.py does, with --model_name_or_path"
    return "they are incomplete, or of another architecture: name other weights"


def _listed(keys: Collection[str], at_most: int = SHOWN_KEYS) -> str:
    shown = ", ".join(list(keys)[:at_most])
    return shown if len(keys) <= at_most else f"{shown} and {len(keys) - at_most} more"
