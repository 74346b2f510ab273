"""What a model says of itself when it is run: which stream of the batch each layer reads.

Small batches that differ in the number of rows and of positions go through the model. A layer whose inputs follow
the positions of a stream (tokens; source or target) reads that stream; one that has one position a row, in both, reads
none. So nothing has to be known of the names or the making of a model, and what can't be told apart by example is found
before it is tracked.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from influence_core.coverage import could_be_tracked
from influence_core.memory import is_out_of_memory
from influence_core.sharding import come_to_rest
from influence_core.task import Batch

Run = Callable[[nn.Module, Batch], object]
Shapes = Mapping[str, tuple[int, int]]  # {stream: (rows, positions)} of a batch
SeenShapes = dict[str, list[torch.Size]]  # {module: of each call}

PICKED = "applied once for all examples, or to positions picked from several"
ONE_POSITION = ""  # in place of a stream: one position a row, that of a pooler or a classifier


@dataclass
class Observed:
    """What was seen of one model."""

    accepts: frozenset[str] = frozenset()  # names of the arguments of its forward pass
    streams: dict[str, str] = field(default_factory=dict)  # {layer: stream}, of layers that can be tracked
    unfit: dict[str, str] = field(default_factory=dict)  # {layer: why it can't be}; the output head is in neither
    others: list[str] | None = None  # embeddings, norms and head, once it was asked which of them can be tracked
    head_is_matrix: bool = False  # logits = hidden states x the head's weight, and nothing else
    calls: dict[str, list[str | None]] = field(default_factory=dict)  # {module: the stream of each call, if any}
    loss_is_mean: bool = False  # its own loss is the mean cross-entropy of its logits

    def describe_unfit(self) -> str:
        """In a line: which layers, numbers aside, and why."""
        names: dict[str, dict[str, None]] = {}
        for name, reason in self.unfit.items():
            names.setdefault(reason, {})[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] = None
        return "; ".join(f"{', '.join(several)} ({reason})" for reason, several in names.items())


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the model's forward pass; of the one within, where peft has put its own around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, in its own number format; afterwards as it was."""
    modes = [module.training for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.autocast(device.type if device.type != "meta" else "cpu", enabled=False):
            yield
    finally:
        come_to_rest(model)
        for module, training in zip(model.modules(), modes):
            module.training = training


def observe_layers(model: nn.Module, run: Run, batches: Sequence[tuple[Batch, Shapes]], observed: Observed) -> None:
    """Note in `observed` what each layer that could be tracked reads, and whose positions each module sees."""
    names = could_be_tracked(model)
    runs = [(*_shapes_seen(model, run, batch), shapes) for batch, shapes in batches]
    for name in names:
        calls = [(shape, shapes) for inputs, _, shapes in runs for shape in inputs.get(name, ())]
        streams = [_streams_of(shape, shapes) for shape, shapes in calls]
        if not calls:
            observed.unfit[name] = "not called"
        elif not all(inputs.get(name) for inputs, _, _ in runs):
            observed.unfit[name] = PICKED
        elif len(common := set.intersection(*streams)) == 1:
            (observed.streams[name],) = common
        else:
            reasons = (_why_unfit(*call) for call, which in zip(calls, streams) if not which)
            observed.unfit[name] = next(reasons, PICKED)
    # An embedding of positions is given the same for all rows, or nothing of them: what comes out tells.
    for name in runs[0][1]:
        calls = zip(*(outputs.get(name, ()) for _, outputs, _ in runs[:2]))
        observed.calls[name] = [
            _only(set.intersection(*(_streams_of(shape, of_run[2], True) for shape, of_run in zip(of_call, runs))))
            for of_call in calls
        ]


def _shapes_seen(model: nn.Module, run: Run, batch: Batch) -> tuple[SeenShapes, SeenShapes]:
    """Of the inputs and of the outputs of each call, by module, of those that have parameters."""
    inputs: SeenShapes = {}
    outputs: SeenShapes = {}

    def note(name: str):
        def hook(module, arguments, keywords, output):
            seen = [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]
            if seen and isinstance(output, torch.Tensor):
                inputs.setdefault(name, []).append(seen[0].shape)
                outputs.setdefault(name, []).append(output.shape)

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        with torch.no_grad(), undisturbed(model):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def _only(streams: set[str]) -> str | None:
    """The single stream whose positions these are, if any."""
    return next(iter(streams)) if len(streams) == 1 and ONE_POSITION not in streams else None


def _streams_of(shape: torch.Size, shapes: Shapes, for_all_rows: bool = False) -> set[str]:
    """The streams whose rows and positions such a tensor may have; with `for_all_rows` also as a single row for all."""
    num_positions = math.prod(shape[1:-1])
    streams = set()
    for stream, (rows, positions) in shapes.items():
        if for_all_rows and len(shape) > 2 and shape[0] == 1:
            rows = 1
        is_flat = len(shape) == 2 and shape[0] == rows * positions
        if is_flat or (shape[0] == rows and positions in (num_positions, *shape[1:-1][:1])):
            streams.add(stream)
        if shape[0] == rows and num_positions == 1:
            streams.add(ONE_POSITION)
    return streams


def _why_unfit(shape: torch.Size, shapes: Shapes) -> str:
    num_rows = {rows for rows, _ in shapes.values()}
    if shape[0] == 1 or len(shape) == 2:
        return PICKED
    if shape[0] not in num_rows and len(shape) > 2 and shape[1] in num_rows:
        return "its rows come second"
    return "sees other positions than the batch has"


class _Reached(Exception):
    """A layer saw its input: all that comes before it went well."""


def can_embed(model: nn.Module, run: Run, batch: Batch, layers: Sequence[str]) -> bool:
    """Whether a batch of so many positions gets as far as the first of the layers: the model has positions enough.

    Without layers, all of the model is run.
    """

    def stop(module, arguments):
        raise _Reached

    handles = [model.get_submodule(name).register_forward_pre_hook(stop) for name in layers]
    try:
        with torch.no_grad(), undisturbed(model):
            run(model, batch)
    except _Reached:
        pass
    except Exception as error:  # an index out of range, or shapes that do not fit, as each model has it
        return is_out_of_memory(error)
    finally:
        for handle in handles:
            handle.remove()
    return True


def most_positions(fits: Callable[[int], bool], wanted: int) -> int:
    """The largest number of positions up to `wanted` that fits, by bisection; 0 where not even one does."""
    if fits(wanted):
        return wanted
    fitting, too_many = 0, wanted
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting
