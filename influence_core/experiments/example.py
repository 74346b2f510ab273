"""What the scripts of an example need beyond the influence contract: flags, presets, training and evaluation."""

import argparse
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from influence_core.errors import UserError
from influence_core.task import EXAMPLE_INDEX, Batch, InfluenceTask

MEASUREMENT = "measurement"


class ExampleTask(InfluenceTask):
    """A task that the examples' scripts can run. Its constructor takes the flags that `add_arguments` adds, by name."""

    name: ClassVar[str]  # folder of the example
    presets: ClassVar[dict[str, dict[str, Any]]]  # {"full": {flag: default}, "demo": …}; flags of any script
    tokenizer: Any  # of the checkpoint, where `checkpoint_dir` names one; else of the initial model
    checkpoint_dir: str | None = None

    @staticmethod
    @abstractmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the task's own flags: model, data and their sizes."""

    @classmethod
    def flag_names(cls) -> list[str]:
        """Of the flags that `add_arguments` adds."""
        parser = argparse.ArgumentParser(add_help=False)
        cls.add_arguments(parser)
        return [action.dest for action in parser._actions]

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss that training minimises; by default what the model computes from the batch."""
        return model(**{key: value for key, value in batch.items() if key != EXAMPLE_INDEX}).loss

    @abstractmethod
    def evaluation_values(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What evaluation needs to know of each example: {name: [examples] float64}.

        MEASUREMENT is among them: each example's own share of `measurement(model, batch)`.
        """

    def generation_values(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """More of them, that take generating text: too long for a training set, so only the validation split has them.

        By default there are none.
        """
        return {}

    @abstractmethod
    def metrics(self, values: dict[str, Tensor]) -> dict[str, float]:
        """What train.py reports of a split, from the values of all its examples: {"perplexity": …}."""

    def query_metrics(self, values: dict[str, Tensor]) -> dict[str, float]:
        """What a counterfactual retraining is judged by, from the values of the queries; the first one is plotted."""
        return self.metrics(values)


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def parse_overrides(text: str) -> dict[str, Any]:
    """ "n_layer=4,n_embd=256" -> {"n_layer": 4, "n_embd": 256}; raises UserError for anything else."""
    overrides = {}
    for part in filter(None, text.split(",")):
        key, separator, value = part.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--config_overrides takes key=value,key=value, not {part!r}")
        overrides[key.strip()] = _number(value.strip())
    return overrides


def _number(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def take(examples: Sequence[Any], indices) -> Sequence[Any]:
    """The examples at `indices`, or all."""
    return examples if indices is None else [examples[index] for index in indices]


def is_main_process() -> bool:
    """Whether this process is the one that prints, also before any process group exists."""
    return os.environ.get("RANK", "0") == "0"
