"""What the ready tasks share: they ask the model what its layers read, and know no architecture's names.

A task of a kind says how its examples become the model's inputs (`model_inputs`), which streams of tokens a batch has
(`streams`), and what is learnt from the outputs. All else is here: what is tracked, its masks, limits of positions.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from influence_core.coverage import left_out
from influence_core.errors import UserError
from influence_core.precision import is_in_pass
from influence_core.sharding import what_failed
from influence_core.task import Batch
from influence_core.tasks.example import is_main_process
from influence_core.tasks.loading import pattern_of
from influence_core.tasks.observed import (
    ONE_POSITION,
    Observed,
    accepted_arguments,
    can_embed,
    most_positions,
    observe_layers,
    undisturbed,
)
from influence_core.tasks.others import prove_others
from influence_core.tasks.pretrained import PretrainedTask
from influence_core.tasks.small_batches import SmallBatches, resize


class TransformerTask(PretrainedTask):
    """A task over any model of its kind; examples are dicts, a field of token ids for each stream."""

    position_limits: ClassVar[dict[str, str]]  # {stream: attribute and flag that limits its tokens}, at most two
    _asked: tuple[nn.Module, Observed] | None = None  # last

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

    def observe_head(self, model: nn.Module, batch: Batch, observed: Observed) -> None:
        """Note what the head computes, where a task has a use for it."""

    # ----------------------------------------------------------------------------------------------- what is tracked

    def tracked_layer_names(self, model):
        """Every linear layer that can be tracked but the head, and with --track all every embedding, norm and head;
        narrowed by --tracked_layers.
        """
        observed = self.observe(model)
        pattern = pattern_of("--tracked_layers", self.tracked_layers)
        names = list(filter(pattern.search, observed.streams))
        if others := set(filter(pattern.search, self.other_layers(model))):
            names = [name for name, _ in model.named_modules() if name in others | set(names)]
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

    def other_layers(self, model: nn.Module) -> list[str]:
        """Embeddings, norms and head, where they are wanted and can be tracked; the others are noted as unfit."""
        if self.tracked_kinds != "all":
            return []
        observed = self.observe(model)
        if observed.others is None:
            batch = SmallBatches(self, model).all()[0]
            proven = prove_others(model, self.train_loss, batch, self.rows_per_example)
            observed.others = [name for name, reason in proven.items() if reason is None]
            observed.unfit |= {name: reason for name, reason in proven.items() if reason is not None}
        return observed.others

    def position_mask(self, batch, layer_name):
        """Of the stream that the layer was seen to read, in the model that was asked last."""
        streams, unfit = (self._asked[1].streams, self._asked[1].unfit) if self._asked else ({}, {})
        if layer_name not in streams:
            reason = unfit.get(layer_name, "the model was not asked, which tracked_layer_names does by default")
            raise UserError(f"there is no position mask for layer {layer_name}: {reason}")
        stream = streams[layer_name]
        return None if stream == ONE_POSITION else self.real_positions(batch, stream)

    def token_rows(self, example):
        return {stream: [example[stream]] for stream in self.position_limits}

    def token_mask(self, batch, stream):
        return self.real_positions(batch, stream)

    def token_stream(self, site, call):
        streams = self._asked[1].calls.get(site, [])
        return streams[call] if call < len(streams) else None

    # ---------------------------------------------------------------------------------------------- asking the model

    def observe(self, model: nn.Module) -> Observed:
        """What the model says when small batches are run, once for each model.

        The model is left as it was, but for what it changes itself when it runs (at a short text BigBird gives up its
        sparse attention for good).
        """
        if model not in self._observed:
            observed = Observed(accepted_arguments(model))
            before, self._asked = self._asked, (model, observed)
            try:
                batches = SmallBatches(self, model).all()
                shapes = [{name: tuple(x.shape) for name, x in self.streams(batch).items()} for batch in batches]
                observe_layers(model, self.run, list(zip(batches, shapes)), observed)
                self.observe_head(model, batches[0], observed)
            except Exception as error:  # whatever a model raises
                self._asked = before
                if isinstance(error, UserError):
                    raise
                what = f"a {type(model).__name__} can't be run on the examples of {self.name}"
                raise UserError(f"{what}: {what_failed(error)}") from error
            self._observed[model] = observed
        self._asked = (model, self._observed[model])
        return self._observed[model]

    @property
    def _observed(self) -> WeakKeyDictionary[nn.Module, Observed]:
        return self.__dict__.setdefault("_observed_models", WeakKeyDictionary())

    def known(self, model: nn.Module) -> Observed:
        """What the model said, or says now.

        Raises:
            UserError: a pass of the engine is under way, which would take the small batches for its own.
        """
        if self._asked is not None and self._asked[0] is model:
            return self._asked[1]
        if model not in self._observed and is_in_pass():
            raise UserError(
                f"the {type(model).__name__} was not asked what its layers read: tracked_layer_names does it by "
                "default; a task with its own has to call observe(model) there"
            )
        return self.observe(model)

    def accepted(self, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        """Of these arguments, and that nothing is kept for generating text, those that the model takes."""
        names = self.known(model).accepts
        inputs = {"use_cache": False, **inputs}
        return {key: value for key, value in inputs.items() if key in names and value is not None}

    def run(self, model: nn.Module, batch: Batch):
        """The model's output."""
        return model(**self.model_inputs(model, batch))

    def resized(self, example: Any, lengths: Mapping[str, int], tokens: Mapping[str, np.ndarray]) -> Any:
        """The example with these numbers of tokens, those within it taken from `tokens`: for small batches."""
        return {**example, **{name: resize(example[name], length, tokens[name]) for name, length in lengths.items()}}

    def num_tokens(self, example: Any, stream: str) -> int:
        """Of a stream, in the example's longest row."""
        return len(example[stream])

    def full_examples(self, examples):
        if not self.has_lengths:  # blocks, that are full by their making
            return {}
        limits = {flag: (stream, getattr(self, flag)) for stream, flag in self.position_limits.items()}
        return {
            flag: sum(self.num_tokens(example, stream) >= limit for example in examples)
            for flag, (stream, limit) in limits.items()
        }

    def cut_rows(self, rows):
        """Told by the token that there is when one more is allowed."""
        cut = {}
        for stream, flag in self.position_limits.items():
            limit, wider = getattr(self, flag), copy(self)
            setattr(wider, flag, limit + 1)
            lengths = [wider.num_tokens(example, stream) for example in wider.examples_of(rows, str)]
            cut[flag] = [index for index, length in enumerate(lengths) if length > limit]
        return cut

    # ------------------------------------------------------------------------------------- the model, fit for the task

    def load_model(self, checkpoint_dir):
        model = super().load_model(checkpoint_dir)
        if self.pads:  # by which some find a row's last token
            model.config.pad_token_id = self.tokenizer.pad_token_id
        if self.dataset_source is not None:  # else there is nothing to run
            self.observe(model)
            for stream, flag in self.position_limits.items():
                self._refuse_too_many_positions(model, stream, flag)
            if self.has_lengths:
                self._refuse_readers_of_padding(model)
        return model

    def _refuse_too_many_positions(self, model: nn.Module, stream: str, flag: str) -> None:
        wanted = getattr(self, flag)
        trained_for = getattr(model.config, "max_position_embeddings", None) or 0
        trained_for = trained_for if trained_for > 0 else wanted  # XLNet says -1: no limit
        readers = [name for name, read in self.known(model).streams.items() if read == stream]
        if wanted > trained_for:  # then the whole model is run: some look their positions up in each block
            readers = []

        small = SmallBatches(self, model)

        def fits(num_positions: int) -> bool:
            return can_embed(model, self.run, small.batch(small.lengths() | {stream: num_positions}), readers)

        most = most_positions(fits, wanted)
        if most < wanted:
            raise UserError(f"--{flag} {wanted} is more than the model's {most} positions")
        if wanted > trained_for and is_main_process():
            print(f"Note: --{flag} {wanted} is more than the {trained_for} positions that the model's config names")

    @torch.no_grad()
    def _refuse_readers_of_padding(self, model: nn.Module) -> None:
        """Before it is trained: the check of the contract would come only after."""
        small = SmallBatches(self, model)
        short, long = (small.example(small.lengths(shorter), turn=shorter) for shorter in (1, 0))
        with undisturbed(model):
            losses = [self.train_loss(model, small.of(part)) for part in ([short], [long], [short, long])]
        one, other, both = map(float, losses)
        rounding = 1e-4 if next(model.parameters()).itemsize >= 4 else 3e-2
        if abs(both - one - other) > rounding * (abs(one) + abs(other)):
            raise UserError(
                f"padding changes what this {type(model).__name__} says: the losses of two examples are {one:.4g} and "
                f"{other:.4g} alone, and {both:.4g} together, where one is padded to the other's length"
            )

    # -------------------------------------------------------------------------------------------------------- losses

    def training_loss(self, model, batch):
        """The model's own."""
        return model(**self.model_inputs(unwrapped(model), batch) | {"labels": self.labels(batch)}).loss

    # ---------------------------------------------------------------------------------------------------------- data

    def tokens(self, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
        """Token ids of each text, cut to `max_length`."""
        rows = self.tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)["input_ids"]
        return [np.array(row, dtype=np.int32) for row in rows]

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


def pad(rows: Sequence[Any], value: int) -> Tensor:
    """Rows of token ids, each padded on the right to the longest: [rows, positions] int64."""
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for row, target in zip(rows, padded):
        target[: len(row)] = torch.as_tensor(row)
    return padded
