"""Two examples of a dataset under one loss, each alone and both together: they agree, or are refused with the cause."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_core.batches import make_batch
from influence_core.captured import Captured, Positions
from influence_core.errors import UserError
from influence_core.finite import FiniteWatch
from influence_core.layers import TrackedLayer
from influence_core.memory import is_out_of_memory, release_cached_memory
from influence_core.padding import refuse_counted_padding
from influence_core.parameters import refuse_other_uses
from influence_core.passes import LossFunction
from influence_core.precision import Precision
from influence_core.sharding import what_failed, whole
from influence_core.study import Study
from influence_core.task import EXAMPLE_INDEX, Batch

Alone = list[tuple[float, Tensor]]  # of each example: its loss, and two sums of each layer's output gradients

# How far apart two roundings of a gradient may be: as a share of it, and of the largest one of all layers (what
# cancellation leaves where a gradient would be zero). Beyond the first, a layer's part depends on the batch.
TOLERANCES = {"exact": (1e-3, 1e-5), "tf32": (3e-2, 3e-3), "half": (0.15, 2e-2)}


@dataclass
class _Ran:
    """A batch that was run."""

    batch: Batch
    loss: float
    captured: dict[str, Captured]


@dataclass
class _Part:
    """What one batch gives to the sums at one layer."""

    gradients: Tensor  # [examples, out, in(+1)]
    size: float  # by which the gradients' rounding goes


class Comparison:
    """The pair of examples, compared under one loss after the other.

    Args:
        pair: their indices in the dataset.
        what: name of the loss.
    """

    def __init__(self, study: Study, dataset: Sequence[Any], pair: list[int], what: str):
        self.study, self.dataset, self.pair, self.what = study, dataset, pair, what
        precision = study.runtime.precision
        # In half precision rounding would hide what is looked for, and the contract is one of task and model.
        self.has_narrow_weights = any(x.is_floating_point() and x.itemsize < 4 for x in study.model.parameters())
        self.precision = precision if self.has_narrow_weights else Precision(precision.sum_dtype, precision.sum_dtype)
        self.tolerances = TOLERANCES["half" if self.has_narrow_weights else "tf32" if precision.tf32 else "exact"]
        self.epsilon = torch.finfo(self.precision.operand_dtype).eps
        self.fits = True  # a batch of both into memory
        self.live: set[str] = set()  # layers that a gradient reached

    def alone(self, loss: LossFunction) -> Alone:
        """What each example gives by itself."""
        return [self._summary(self._run(loss, [index])) for index in self.pair]

    def prove(self, loss: LossFunction, what: str | None = None) -> Alone:
        """What each example gives by itself; UserError where both together give something else."""
        what, study = what or self.what, self.study
        alone = [self._run(loss, [index]) for index in self.pair]
        for ran in alone:
            counted = {layer.name: ran.captured[layer.name] for layer in study.layers if layer.is_kronecker}
            refuse_counted_padding(counted, ran.batch, [other.batch for other in alone])
            self.live |= {name for name, captured in ran.captured.items() if any(x.any() for x in captured.gradients)}
        summaries = list(map(self._summary, alone))
        together = self._run(loss, self.pair)
        if together is not None:
            self._compare_losses(loss, what, alone, together)
            self._compare_layers(loss, what, alone, together)
        if not self.has_narrow_weights:  # of which half precision has copies
            self._prove_parameters(loss, max(alone, key=self._size))
        return summaries

    def _summary(self, ran: _Ran) -> tuple[float, Tensor]:
        gradients = [x for layer in self.study.layers for x in ran.captured[layer.name].gradients]
        places = [torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device) for x in gradients]
        return ran.loss, torch.stack([y.sum() for x, place in zip(gradients, places) for y in (x, x * place)])

    def _run(self, loss: LossFunction, indices: list[int]) -> _Ran | None:
        """None where a batch of several does not fit into memory."""
        study = self.study
        try:
            batch = make_batch(study.task, self.dataset, indices, study.runtime)
            with study.gradient_pass(loss, precision=self.precision) as run:
                value, captured = run(batch)
        except UserError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                which = " and ".join(map(str, indices))
                raise UserError(f"the {self.what} of {which} can't be computed: {what_failed(error)}") from error
            release_cached_memory()
            if len(indices) == 1:
                raise UserError(
                    f"out of memory with a single example in a batch (the {self.what} of {indices[0]})"
                ) from None
            self.fits = False
            return None
        watch = FiniteWatch(study.runtime.device)
        watch.note(value, captured, indices, self.what)
        watch.look()
        return _Ran(batch, float(value), captured)

    def _size(self, ran: _Ran) -> float:
        """Of all output gradients together."""
        return sum(float(x.double().square().sum()) for captured in ran.captured.values() for x in captured.gradients)

    def _prove_parameters(self, loss: LossFunction, ran: _Ran) -> None:
        study = self.study
        try:
            refuse_other_uses(study.model, study.layers, loss, ran.batch, ran.captured, self.precision, self.tolerances)
        except RuntimeError as error:  # there may be no room for the gradients of parameters
            if not is_out_of_memory(error):
                raise
            release_cached_memory()
            study.runtime.print(
                "Note: no room for the gradients of parameters: that layers make all of them is unproven"
            )

    def _compare_losses(self, loss: LossFunction, what: str, alone: list[_Ran], together: _Ran) -> None:
        first, second = (ran.loss for ran in alone)
        allowed = self.tolerances[0] / 10 * (abs(first) + abs(second)) + max(map(self._cancelled, alone))
        if abs(together.loss - first - second) <= allowed:
            return
        again = self._run(loss, self.pair)
        if again is not None and abs(again.loss - together.loss) > allowed:
            cause = (
                "it is random, as two runs of the same batch differ (dropout that eval() does not reach, or labels "
                "drawn without sample_labels)"
            )
        elif min(first, second) - allowed <= together.loss <= max(first, second) + allowed:
            cause = "it looks like a mean over the batch: sum over positions and examples (reduction='sum')"
        elif what == self.what:
            cause = (
                "it depends on what shares the batch: negatives or statistics taken from the batch, or padding that "
                "the model reads (attention mask, position ids)"
            )
        else:
            cause = (
                "its labels depend on padding or on the batch: ask sample_labels.uniforms for each example's own "
                "positions, the first real one first"
            )
        raise UserError(
            f"the {what} of examples {self._named()} is {first:.6g} and {second:.6g} alone, and {together.loss:.6g} "
            f"together, so it is no sum of theirs: {cause}"
        )

    def _cancelled(self, ran: _Ran) -> float:
        """What rounding may make of a loss that is a small difference of larger numbers, as a margin may be."""
        if self.epsilon > 1e-5:
            return 0.0  # of such numbers, all and nothing
        size = 0.0
        for layer in self.study.layers:
            size = max(size, ran.captured[layer.name].size() * float(whole(layer.parameters[0].detach()).norm()))
        return 10 * self.epsilon * size

    def _compare_layers(self, loss: LossFunction, what: str, alone: list[_Ran], together: _Ran) -> None:
        relative, of_largest = self.tolerances
        differing: list[tuple[TrackedLayer, float, float]] = []  # (layer, difference, what rounding explains)
        largest = 0.0
        for layer in self.study.layers:
            parts = [self._part(layer, ran) for ran in alone]
            both = self._part(layer, together)
            if layer.is_kronecker:
                self._compare_counts(layer, what, [ran.captured[layer.name] for ran in (*alone, together)])
            for example, part in enumerate(parts):
                norm = float(part.gradients.norm())
                largest = max(largest, norm)
                difference = float((both.gradients[example] - part.gradients[0]).norm())
                differing.append((layer, difference, relative * norm + 10 * self.epsilon * part.size))
        for layer, difference, explained in differing:
            if difference > explained + of_largest * largest:
                raise UserError(
                    f"the gradient of the {what} at layer {layer.name} of examples {self._named()} is not alone what "
                    f"it is together (by {difference / max(largest, 1e-30):.1g} of the largest), though the losses "
                    "agree: what the layer sees can't be told apart by example (positions picked from several, or rows "
                    "that do not come first); leave it out of the tracked layers"
                )

    def _compare_counts(self, layer: TrackedLayer, what: str, captured: list[Positions]) -> None:
        """Of each example alone, and of both together."""
        counted = [x.activations if x.mask is None else x.activations[x.mask] for x in captured]
        counted = [x.reshape(-1, layer.in_features) for x in counted]
        *counts, expected = map(len, counted)
        if sum(counts) != expected:
            if expected in counts:
                cause = "it is applied once for all examples (as relative positions are); leave it out"
            else:
                cause = "padding is counted, or the mask is that of another stream; let position_mask give its own"
            raise UserError(
                f"layer {layer.name} counts {counts[0]} and {counts[1]} positions of examples {self._named()} alone, "
                f"and {expected} together ({what}): {cause}"
            )
        *moments, of_both = (x.square().sum(0) for x in counted)
        moment = sum(moments)
        if float((of_both - moment).norm()) > 10 * self.tolerances[0] * float(moment.norm()):
            raise UserError(
                f"the inputs that layer {layer.name} counts for examples {self._named()} are not alone what they are "
                f"together ({what}): the mask is that of another stream, or the model reads padding; let position_mask "
                "give the mask of the layer's own input"
            )

    def _part(self, layer: TrackedLayer, ran: _Ran) -> _Part:
        captured, task = ran.captured[layer.name], self.study.task
        gradients = layer.matrix_gradients(captured)
        if task.post_processes:
            gradients = task.post_process_per_sample_gradient(layer.name, gradients)
        expected = (len(ran.batch[EXAMPLE_INDEX]), *layer.shape)
        if gradients.shape != expected:
            raise UserError(
                f"the gradients of layer {layer.name} are {tuple(gradients.shape)}, and must be {expected}, one for "
                "each example: rows that make one example together need rows_per_example, or a "
                "post_process_per_sample_gradient that sums them"
            )
        return _Part(gradients, captured.size())

    def _named(self) -> str:
        return " and ".join(map(str, self.pair))
