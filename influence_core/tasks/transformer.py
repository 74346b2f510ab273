"""What the ready tasks share: they ask the model what its layers read, and know no architecture's names.

A task of a kind says how its examples become the model's inputs (`model_inputs`), which streams of tokens a batch has
(`streams`), and what is learnt from the outputs. All else is here: what is tracked, its masks, limits of positions.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from influence_core.coverage import left_out
from influence_core.errors import UserError, first_line
from influence_core.task import EXAMPLE_INDEX, Batch
from influence_core.tasks.example import is_main_process
from influence_core.tasks.observed import (
    ONE_POSITION,
    Observed,
    accepted_arguments,
    can_embed,
    most_positions,
    observe_layers,
)
from influence_core.tasks.pretrained import PretrainedTask

OBSERVED_POSITIONS = (7, 5)  # of the first and the second stream, in the first observed batch; one less in the second
OBSERVED_ROWS = (2, 3)


class TransformerTask(PretrainedTask):
    """A task over any model of its kind; examples are dicts, a field of token ids for each stream."""

    position_limits: ClassVar[dict[str, str]]  # {stream: attribute and flag that limits its tokens}, at most two
    observed: Observed | None = None  # of the model that was observed last
    _observed_model: nn.Module | None = None

    # ---------------------------------------------------------------------------------------- what a kind of task says

    @abstractmethod
    def streams(self, batch: Batch) -> dict[str, Tensor]:
        """The tokens of a batch by stream, [rows, positions] each."""

    @abstractmethod
    def real_positions(self, batch: Batch, stream: str) -> Tensor | None:
        """[rows, positions] of a stream, true where there is no padding; None: everywhere."""

    @abstractmethod
    def model_inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's forward pass; see `accepted`."""

    @abstractmethod
    def labels(self, batch: Batch) -> Tensor:
        """What the model takes as labels to compute its own loss."""

    # ----------------------------------------------------------------------------------------------- what is tracked

    def tracked_layer_names(self, model):
        """Every layer that can be tracked but the head, narrowed by --tracked_layers."""
        observed = self.observe(model)
        try:
            pattern = re.compile(self.tracked_layers or "")
        except re.error as error:
            raise UserError(f"--tracked_layers {self.tracked_layers!r} is no regular expression: {error}") from None
        names = list(filter(pattern.search, observed.streams))
        if names:
            return names
        unfit = next(filter(pattern.search, observed.unfit), None)
        if self.tracked_layers and unfit:
            have = f"that can be tracked: {unfit}, that --tracked_layers matches, is {observed.unfit[unfit]}"
        elif self.tracked_layers and observed.streams:
            have = f"that --tracked_layers {self.tracked_layers!r} matches: it has {', '.join(observed.streams)}"
        else:
            have = f"that can be tracked: its parameters are of {', '.join(left_out(model, []))}"
            have += f"; {observed.describe_unfit()}" if observed.unfit else ""
        raise UserError(f"this {type(model).__name__} has no layer {have}")

    def position_mask(self, batch, layer_name):
        """Of the stream that the layer was seen to read."""
        if self.observed is None:
            raise UserError("no model was observed yet: its masks are known after tracked_layer_names(model)")
        stream = self.observed.streams.get(layer_name, ONE_POSITION)
        return None if stream == ONE_POSITION else self.real_positions(batch, stream)

    # ---------------------------------------------------------------------------------------------- asking the model

    def observe(self, model: nn.Module) -> Observed:
        """What the model says when two small batches are run, once for each model."""
        if self._observed_model is not model:
            observed = Observed(accepted_arguments(model))
            batches = [self._small_batch(model, number) for number in range(len(OBSERVED_ROWS))]
            shapes = [{name: tuple(x.shape) for name, x in self.streams(batch).items()} for batch in batches]
            self._observed_model, self.observed = model, observed
            try:
                observe_layers(model, self.run, list(zip(batches, shapes)), observed)
                self.observe_head(model, batches[0], observed)
            except Exception as error:  # whatever a model raises
                self._observed_model = None
                what = f"a {type(model).__name__} can't be run on the examples of {self.name}"
                raise UserError(f"{what}: {first_line(error)}") from error
        return self.observed

    def observe_head(self, model: nn.Module, batch: Batch, observed: Observed) -> None:
        """Note what the head computes, where a task has a use for it."""

    def known(self, model: nn.Module) -> Observed:
        """What was observed of the model; of another one, only what it accepts."""
        return self.observed if self._observed_model is model else Observed(accepted_arguments(model))

    def accepted(self, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        """Of these arguments, and that nothing is kept for generating text, those that the model takes."""
        names = self.known(model).accepts
        inputs = {"use_cache": False, **inputs}
        return {key: value for key, value in inputs.items() if key in names and value is not None}

    def run(self, model: nn.Module, batch: Batch):
        """The model's output."""
        return model(**self.model_inputs(model, batch))

    def load_model(self, checkpoint_dir):
        model = super().load_model(checkpoint_dir)
        if self.pads and getattr(model.config, "pad_token_id", None) is None:  # by which some find a row's last token
            model.config.pad_token_id = self.tokenizer.pad_token_id
        if self.dataset_source is not None:  # else there is nothing to run
            self.observe(model)
            for stream, flag in self.position_limits.items():
                self._refuse_too_many_positions(model, stream, flag)
        return model

    def _refuse_too_many_positions(self, model: nn.Module, stream: str, flag: str) -> None:
        wanted = getattr(self, flag)
        readers = [name for name, read in self.observed.streams.items() if read == stream]

        def fits(num_positions: int) -> bool:
            batch = self._batch(model, 1, self._small_lengths(0) | {stream: num_positions})
            return can_embed(model, self.run, batch, readers)

        most = most_positions(fits, wanted)
        if most < wanted:
            raise UserError(f"--{flag} {wanted} is more than the model's {most} positions")
        trained_for = getattr(model.config, "max_position_embeddings", None)
        if trained_for and wanted > trained_for and is_main_process():
            print(f"Note: --{flag} {wanted} is more than the {trained_for} positions that the model's config names")

    def _small_lengths(self, number: int) -> dict[str, int]:
        lengths: dict[str, int] = {}
        for (stream, flag), positions in zip(self.position_limits.items(), OBSERVED_POSITIONS):
            length = min(positions, getattr(self, flag))
            lengths[stream] = length - 1 if length in lengths.values() else length
        return {stream: length - number for stream, length in lengths.items()}

    def _small_batch(self, model: nn.Module, number: int) -> Batch:
        return self._batch(model, OBSERVED_ROWS[number], self._small_lengths(number))

    def _batch(self, model: nn.Module, num_rows: int, lengths: Mapping[str, int]) -> Batch:
        """The first training example so many times, cut or repeated to these numbers of positions."""
        example = self.load_dataset("train", [0])[0]
        batch = {**self.collate([self.resized(example, lengths)] * num_rows), EXAMPLE_INDEX: torch.arange(num_rows)}
        batch.pop("attention_mask", None)  # nothing is padded, but by a collate that pads to a fixed length
        for stream, length in lengths.items():
            padded = batch[stream].shape[-1]
            same = [key for key, x in batch.items() if key not in lengths and x.dim() > 1 and x.shape[-1] == padded]
            batch |= {key: batch[key][..., :length].contiguous() for key in (stream, *same)}
        device = next(model.parameters()).device
        return {key: value.to(device) for key, value in batch.items()}

    def resized(self, example: Any, lengths: Mapping[str, int]) -> Any:
        """The example with other numbers of tokens, its last token in place."""
        return {**example, **{stream: resize(example[stream], length) for stream, length in lengths.items()}}

    # -------------------------------------------------------------------------------------------------------- losses

    def training_loss(self, model, batch):
        """The model's own."""
        return model(**self.model_inputs(unwrapped(model), batch) | {"labels": self.labels(batch)}).loss

    # ---------------------------------------------------------------------------------------------------------- data

    def tokens(self, texts: Sequence[str], max_length: int, pairs: Sequence[str] | None = None) -> list[np.ndarray]:
        """Token ids of each text, cut to `max_length`."""
        rows = self.tokenizer(list(texts), pairs and list(pairs), truncation=True, max_length=max_length, verbose=False)
        return [np.array(row, dtype=np.int32) for row in rows["input_ids"]]

    def text(self, tokens) -> str:
        """Token ids as a person reads them, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def topic(self, example):
        return example.get("topic")


def topic_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The field that an example takes over from a row that has it."""
    return {"topic": row["topic"]} if "topic" in row else {}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where it is wrapped for several processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def resize(tokens: Any, length: int) -> Any:
    """Token ids cut or repeated to a length, the last one kept; of each row, where there are several."""
    if isinstance(tokens, list) and len(tokens) and np.ndim(tokens[0]):
        return [resize(row, length) for row in tokens]
    tokens = np.asarray(tokens)
    return np.append(np.resize(tokens, length - 1), tokens[-1])


def pad(rows: Sequence[Any], value: int) -> Tensor:
    """Rows of token ids, each padded on the right to the longest: [rows, positions] int64."""
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for row, target in zip(rows, padded):
        target[: len(row)] = torch.as_tensor(row)
    return padded
