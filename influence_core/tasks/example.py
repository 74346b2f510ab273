"""What the scripts ask of a task beyond the influence contract: flags, presets, loading, showing and evaluation."""

import argparse
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from influence_core.errors import UserError
from influence_core.task import Batch, InfluenceTask
from influence_core.tasks.columns import Kind

MEASUREMENT = "measurement"


@dataclass(frozen=True)
class Segment:
    """A row of an example's `token_rows`, as a person reads it."""

    title: str  # such as "Summary"; empty where there is no more to say
    stream: str
    row: int = 0  # of the stream
    is_right: bool = False  # the right one of several


class ExampleTask(InfluenceTask):
    """A task that the examples' scripts can run. Its constructor takes the flags that `add_arguments` adds, by name."""

    name: ClassVar[str]  # folder of the example
    measured: ClassVar[str] = "measurement"  # what that is, for a person to read
    aim: ClassVar[str] = "do well on the query"  # what the model does where it is low
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # {"full": {flag: default}, "demo": …}; flags of any script
    # {flag: flags whose values belong to its own}: a preset's, or a checkpoint's, are not for another.
    belonging: ClassVar[dict[str, tuple[str, ...]]] = {}
    flags_of_a_start: ClassVar[tuple[str, ...]] = ()  # that say what training starts from: a checkpoint has its own
    tokenizer: Any  # of the checkpoint, where `checkpoint_dir` names one; else of the initial model
    checkpoint_dir: str | None = None
    frozen_parameters: str | None = None  # a regular expression: those in whose names it is found are not trained
    tracked_kinds: str = "blocks"  # or "all": linear layers, or every parameter that training moves; of --track
    # The processes that get a part of a model each, if the task can load it so; of --use_fsdp.
    shard_on: DeviceMesh | None = None
    tracked_layers: str | None = None  # a regular expression that narrows what is tracked; of --tracked_layers

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

    @abstractmethod
    def load_model(self, checkpoint_dir: str | None) -> nn.Module:
        """The model in float32; from the checkpoint, or the initial one (to train) where it is None."""

    def found_flags(self) -> dict[str, Any]:
        """Values of the task's flags that were not given but found, to be noted with a checkpoint."""
        return {}

    def save_model(self, model: nn.Module, directory: str | Path) -> None:
        """Write a trained model's files, from which `load_model` makes it again."""
        model.save_pretrained(directory)

    @abstractmethod
    def load_dataset(self, split: str, indices: Sequence[int] | None = None) -> Sequence[Any]:
        """The examples of "train" or "validation", all of them or those at `indices`."""

    def row_fields(self) -> dict[str, tuple[str, Kind]]:
        """{the task's name of a column: (the user's, what its cells have to be)}, of rows that `examples_of` takes.

        Raises:
            UserError: the task makes no examples of rows of the user's own.
        """
        raise UserError(f"{self.name} takes no queries of one's own")

    def examples_of(self, rows: Sequence[Mapping[str, Any]], name: Callable[[int], str]) -> Sequence[Any]:
        """Examples of the user's own rows, one of each, as those of the dataset are made.

        Args:
            rows: the cells by the task's names.
            name: of a row, by its index.
        Raises:
            UserError: no example can be made of a row, which is named.
        """
        raise UserError(f"{self.name} takes no queries of one's own")

    def cut_rows(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
        """{flag that limits tokens: which of the user's own rows have more than it allows}"""
        return {}

    @abstractmethod
    def describe(self, example: Any) -> str:
        """The example as text, for a person to read."""

    def segments(self, example: Any) -> list[Segment]:
        """The example's rows of tokens in the order of reading; by default that of `token_rows`, without titles."""
        return [
            Segment("", stream, row) for stream, rows in self.token_rows(example).items() for row in range(len(rows))
        ]

    def origin(self, split: str, index: int) -> str | None:
        """Where the example at `index` of a split came from, such as "row 7" (from 0) of the user's data."""
        return None

    def full_examples(self, examples: Sequence[Any]) -> dict[str, int]:
        """{flag that limits tokens: how many of the examples have as many, so that their texts may have been cut}"""
        return {}

    def topic(self, example: Any) -> str | None:
        """A group that the example is known to belong to, if any: lets analyze.py report topic retrieval."""
        return None

    @abstractmethod
    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss that training minimises; the model may be wrapped for several processes."""

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


def is_main_process() -> bool:
    """Whether this process is the one that prints, also before any process group exists."""
    return os.environ.get("RANK", "0") == "0"
