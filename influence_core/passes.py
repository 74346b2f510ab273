"""The one forward/backward engine: batch -> {layer: (activations, output gradients)}.

A forward hook on each tracked layer keeps the layer's input and its output; one torch.autograd.grad of the summed loss
then gives the gradients of all outputs at once. Parameters are frozen meanwhile, so that no gradient is computed which
nobody reads: the graph starts at the first tracked layer. Under torch.compile, where intermediate tensors are out of
reach, a zero `probe` is added to each output instead and the gradients of the probes are taken.

A layer that is called several times in one forward pass has its calls laid end to end along the position axis: the
contraction over positions then adds the calls up within an example, as the chain rule wants.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from influence_core.captured import Captured
from influence_core.layers import TrackedLayer
from influence_core.precision import Precision
from influence_core.task import EXAMPLE_INDEX, Batch

LossFunction = Callable[[nn.Module, Batch], Tensor]
MaskFunction = Callable[[Batch, str], Tensor | None]


@dataclass(frozen=True)
class Probe:
    """What one batch takes, for the plan."""

    num_bytes: int  # kept between forward and backward, with what is captured
    fixed_bytes: int  # of these, those that more examples in a batch would not multiply
    captured_bytes: (
        int  # of all layers' activations and output gradients as operands; what layers share counts for each
    )
    forward_flops: float
    backward_flops: float
    positions: dict[str, float]  # rows * positions that each layer sees
    active_positions: dict[str, float]  # of these, those that have a gradient


class GradientPass:
    """Context manager: `with GradientPass(...) as run: loss, captured = run(batch)`.

    Inside, the model is in evaluation mode, its parameters are frozen and hooks sit on the tracked layers; on leaving,
    also by an exception, it is as it was found. Layers are neither wrapped nor replaced, and `.grad` is never touched.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[TrackedLayer],
        loss_function: LossFunction,
        position_mask: MaskFunction = lambda batch, layer_name: None,
        precision: Precision | None = None,
        compile: bool = False,
        rounded: list[TrackedLayer] | None = None,
        rows_per_example: int = 1,
        find_active: bool = True,
    ):
        """`rounded`: layers that emulated bfloat16 rounds; by default those tracked here. `rows_per_example`: the
        task's, see InfluenceTask. `find_active`: look for positions without a gradient in each batch."""
        self.model, self.layers, self.loss_function, self.position_mask = model, layers, loss_function, position_mask
        self.precision = precision or Precision()
        self.rounded = rounded or layers
        self.rows_per_example, self.find_active = rows_per_example, find_active
        self.step = torch.compile(self._step) if compile else None
        self.probe_shapes: dict[tuple, dict[str, list[torch.Size]]] = {}  # by the shapes of the batch
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.versions: list[tuple[str, Tensor, int]] = []  # of each input and output when the layer was called
        self.probes: dict[str, list[Tensor]] | None = None

    def __enter__(self) -> "GradientPass":
        self.requires_grad = [parameter.requires_grad for parameter in self.model.parameters()]
        self.training = [module.training for module in self.model.modules()]
        self.exact_weights: list[Tensor] = []
        self.handles = []
        self.model.requires_grad_(False).eval()
        if self.precision.emulated:
            for layer in self.rounded:
                self.exact_weights.append(layer.module.weight.data)
                layer.module.weight.data = self.precision.operand(layer.module.weight.data)
                self.handles.append(layer.module.register_forward_pre_hook(self._round_input))
        for layer in self.layers:
            self.handles.append(layer.module.register_forward_hook(self._hook(layer.name)))
        if self.precision.emulated:  # after the hooks above: so that the output's gradient is rounded as well
            for layer in self.rounded:
                self.handles.append(layer.module.register_forward_hook(self._round_output))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()
        for layer, weight in zip(self.rounded, self.exact_weights):
            layer.module.weight.data = weight
        for parameter, requires_grad in zip(self.model.parameters(), self.requires_grad):
            parameter.requires_grad_(requires_grad)
        for module, training in zip(self.model.modules(), self.training):
            module.training = training
        self.forget()
        if self.step is not None:
            torch._dynamo.reset()  # what was compiled knows these hooks

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Captured]]:
        """Run one batch.

        Returns:
            The summed loss (a scalar, detached), and what each layer captured.
        Raises:
            RuntimeError: a tracked layer was not called, or its input or output was changed in place.
            ValueError: rows or the position mask do not fit what the layer saw.
        """
        shapes = tuple((key, value.shape) for key, value in batch.items())
        with torch.enable_grad():
            if self.step is not None and shapes in self.probe_shapes:
                loss, gradients = self._run_compiled(batch, self.probe_shapes[shapes])
            else:
                loss, gradients = self._run_eager(batch)
                self.probe_shapes[shapes] = {name: [x.shape for x in xs] for name, xs in self.outputs.items()}
        captured = {layer.name: self._captured(layer, batch, gradients[layer.name]) for layer in self.layers}
        self.forget()
        if self.find_active:
            self._find_active_positions(list(captured.values()))
        return loss.detach(), captured

    @staticmethod
    def _find_active_positions(captured: list[Captured]) -> None:
        """Note them where they are fewer than nine tenths. On a GPU, this waits for the backward pass, once a batch."""
        are_active = [_has_gradient(x.output_gradients) for x in captured]
        counts = torch.stack([active.sum(1).max() for active in are_active]).tolist()
        for x, active, count in zip(captured, are_active, counts):
            if count < 0.9 * active.shape[1]:
                x.active, x.max_active = active, max(count, 1)

    def probe(self, batch: Batch) -> "Probe":
        """Run one batch and count what it takes."""
        # Kept alive until they are counted: an address that is freed and taken again would hide one of the two.
        storages: dict[int, torch.UntypedStorage] = {}
        constants = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in constants:
                storages[storage.data_ptr()] = storage
            return tensor

        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            autocast = self.precision.autocast(next(self.model.parameters()).device)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
                loss = self.loss_function(self.model, batch)
            forward_flops = counter.get_total_flops()
            kept = [x for calls in (*self.inputs.values(), *self.outputs.values()) for x in calls]
            gradients = self._gradients(loss, self.outputs)
        for tensor in [*kept, *(x for calls in gradients.values() for x in calls)]:
            note(tensor)
        num_bytes = sum(storage.nbytes() for storage in storages.values())
        positions = {name: sum(x[..., 0].numel() for x in calls) for name, calls in self.inputs.items()}
        self.forget()
        active = {name: sum(float(_has_gradient(x).sum()) for x in calls) for name, calls in gradients.items()}
        numbers = sum(positions[layer.name] * (layer.in_features + layer.out_features) for layer in self.layers)
        captured_bytes = numbers * self.precision.product_dtype.itemsize
        backward_flops = counter.get_total_flops() - forward_flops
        return Probe(num_bytes, 0, captured_bytes, forward_flops, backward_flops, positions, active)

    def forget(self) -> None:
        """Let go of what a forward pass left behind."""
        self.inputs, self.outputs, self.versions, self.probes = {}, {}, [], None

    def _round_input(self, module: nn.Module, arguments: tuple):
        return (self.precision.operand(arguments[0]), *arguments[1:])

    def _round_output(self, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return self.precision.operand(output)

    def _hook(self, name: str):
        def keep(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            kept = arguments[0].detach()  # shares memory and version counter with what the model goes on to use
            self.inputs.setdefault(name, []).append(kept)
            calls = self.outputs.setdefault(name, [])
            if self.probes is not None:
                calls.append(output)
                return output + self.probes[name][len(calls) - 1]
            self.versions += [(name, tensor, tensor._version) for tensor in (kept, output)]
            calls.append(output.requires_grad_())
            return output.view_as(output)  # the model goes on with a tensor that is never a leaf of the graph

        return keep

    def _run_eager(self, batch: Batch) -> tuple[Tensor, dict[str, list[Tensor]]]:
        self.forget()
        with self.precision.autocast(next(self.model.parameters()).device):
            loss = self.loss_function(self.model, batch)
        uncalled = [layer.name for layer in self.layers if layer.name not in self.outputs]
        if uncalled:
            raise RuntimeError(f"tracked layers that the forward pass did not call: {', '.join(uncalled)}")
        for name, output, version in self.versions:
            if output._version != version:
                raise RuntimeError(
                    f"the input or output of layer {name} is changed in place by the model after the layer's call, so "
                    "its gradient cannot be had; use an out-of-place operation there"
                )
        return loss, self._gradients(loss, self.outputs)

    def _run_compiled(self, batch: Batch, probe_shapes: dict) -> tuple[Tensor, dict[str, list[Tensor]]]:
        self.forget()
        dtype = self.precision.product_dtype
        device = next(self.model.parameters()).device
        probes = {
            name: [torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
            for name, shapes in probe_shapes.items()
        }
        with torch._dynamo.config.patch(recompile_limit=64):  # by the shapes of batches
            loss, self.inputs = self.step(batch, probes)
        return loss, self._gradients(loss, probes)

    def _step(self, batch: Batch, probes: dict) -> tuple[Tensor, dict[str, list[Tensor]]]:
        self.inputs, self.outputs, self.probes = {}, {}, probes
        with self.precision.autocast(next(self.model.parameters()).device):
            loss = self.loss_function(self.model, batch)
        return loss, self.inputs

    def _gradients(self, loss: Tensor, sources: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        flat = [tensor for layer in self.layers for tensor in sources[layer.name]]
        gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
        return {layer.name: [next(gradients) for _ in sources[layer.name]] for layer in self.layers}

    def _captured(self, layer: TrackedLayer, batch: Batch, gradients: list[Tensor]) -> Captured:
        """Lay calls end to end, give every layer a position axis, and check that everything fits."""
        num_examples = len(batch[EXAMPLE_INDEX])
        activations = _lay_out([self.precision.operand(x) for x in self.inputs.pop(layer.name)])
        output_gradients = _lay_out([self.precision.operand(x) for x in gradients])
        if len(activations) % num_examples or activations.shape[:2] != output_gradients.shape[:2]:
            raise ValueError(
                f"layer {layer.name} saw inputs {tuple(activations.shape)} and output gradients "
                f"{tuple(output_gradients.shape)} for {num_examples} examples: the first axis must count rows"
            )
        mask = self.position_mask(batch, layer.name)
        if mask is not None:
            num_calls = len(gradients)
            mask = mask.bool().repeat(1, num_calls) if num_calls > 1 else mask.bool()
            if mask.shape != activations.shape[:2]:
                raise ValueError(
                    f"the position mask of layer {layer.name} is {tuple(mask.shape)}, but the layer saw "
                    f"{tuple(activations.shape[:2])} rows and positions: give it the mask of its own input stream"
                )
        if (k := self.rows_per_example) > 1:
            if len(activations) != k * num_examples:
                raise ValueError(
                    f"layer {layer.name} saw {len(activations)} rows for {num_examples} examples of {k} rows each"
                )
            activations, output_gradients = (
                x.reshape(num_examples, k * x.shape[1], x.shape[2]) for x in (activations, output_gradients)
            )
            mask = None if mask is None else mask.reshape(num_examples, -1)
        return Captured(activations, output_gradients, mask)


def _has_gradient(output_gradients: Tensor) -> Tensor:
    """[..., out] -> [...] bool, false where all are zero; NaN counts as a gradient."""
    return ~((output_gradients.amax(-1) == 0) & (output_gradients.amin(-1) == 0))


def _lay_out(calls: list[Tensor]) -> Tensor:
    """Calls of [rows, ..., features] -> [rows, positions, features]."""
    calls = [x.reshape(len(x), -1, x.shape[-1]) for x in calls]
    return calls[0] if len(calls) == 1 else torch.cat(calls, dim=1)
