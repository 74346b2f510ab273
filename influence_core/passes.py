"""The one forward/backward engine: batch -> {layer: what it saw}.

A forward hook at each site of a tracked layer keeps the module's input and its output; one torch.autograd.grad of the
summed loss then gives the gradients of all outputs at once. Parameters are frozen meanwhile, so that no gradient is
computed which nobody reads: the graph starts at the first tracked layer.

With torch.compile the hooks stay out of what is compiled (compiled.py): the tracked layers run as ever, and what lies
between them is compiled.

A layer that is called several times in one forward pass has its calls laid end to end along the position axis: the
contraction over positions then adds the calls up within an example, as the chain rule wants.

A layer whose input or output the model goes on to change in place is given a copy, from the first such batch on: no
gradient could be had at a tensor that is no more what the layer made.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from influence_core.captured import Calls, Captured, Layout, find_active_positions, position_counts
from influence_core.compiled import compiled, uncompiled
from influence_core.errors import UserError
from influence_core.layers import TrackedLayer
from influence_core.losses import HeadLoss, watched_heads
from influence_core.precision import Precision
from influence_core.sharding import come_to_rest, held_whole, is_memory_of_parameter, is_sharded, local
from influence_core.task import EXAMPLE_INDEX, Batch

LossFunction = Callable[[nn.Module, Batch], Tensor]
MaskFunction = Callable[[Batch, str], Tensor | None]


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
        all_layers: list[TrackedLayer] | None = None,
        rows_per_example: int | None = 1,
        find_active: bool = True,
        copied: set[str] | None = None,
    ):
        """
        Args:
            compile: torch.compile what the model does between its tracked layers.
            all_layers: also those of other passes, by default those tracked here: emulated bfloat16 rounds them, and
                what is compiled ends at them, so that every pass shares it.
            rows_per_example: the task's, see InfluenceTask; None where it post-processes gradients.
            find_active: look for positions without a gradient in each batch.
            copied: sites that are given copies, found on the way; a set that passes may share.
        """
        self.model, self.layers, self.loss_function, self.position_mask = model, layers, loss_function, position_mask
        self.precision = precision or Precision()
        self.all_layers, self.compile = all_layers or layers, compile
        self.sites = {site: module for layer in layers for site, module in layer.sites.items()}
        self.rows_per_example, self.find_active = rows_per_example, find_active
        self.copied: set[str] = set() if copied is None else copied
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.versions: list[tuple[str, Tensor, int]] = []  # of each input and output when the layer handed it on
        self.losses: dict[int, list[HeadLoss]] = {}  # by the id of a head's weight
        self.num_rows = 0  # of the batch
        self.is_forward = True

    def __enter__(self) -> "GradientPass":
        self.requires_grad = [parameter.requires_grad for parameter in self.model.parameters()]
        self.training = [module.training for module in self.model.modules()]
        self.frees = is_sharded(self.model.parameters())  # a parameter's memory, when its unit has run
        self.exact: list[tuple[Tensor, Tensor]] = []  # (a parameter or buffer, what it held)
        self.rounded: list[tuple[Tensor, Tensor]] = []  # (what a process has of a sharded parameter, what it held)
        self.handles = []
        aside = uncompiled if self.compile else lambda hook: hook  # which calls that are not compiled need not pay for
        self.model.requires_grad_(False).eval()
        if self.precision.is_half:  # 16-bit weights of any kind, in the one that the pass computes in
            for tensor in itertools.chain(self.model.parameters(), self.model.buffers()):
                if tensor.is_floating_point() and tensor.itemsize < 4 and tensor.dtype != self.precision.product_dtype:
                    self._swap(tensor, tensor.data.to(self.precision.product_dtype))
        if self.precision.emulated:
            for module in self._products():
                self._round(module.weight)
                self.handles.append(module.register_forward_pre_hook(aside(self._round_input), with_kwargs=True))
        hooks = {site: self._hook(layer, site) for layer in self.layers for site in layer.sites}
        for site, module in ((site, module) for layer in self.all_layers for site, module in layer.sites.items()):
            if hook := hooks.get(site) or (self.compile and _nothing):
                self.handles.append(module.register_forward_hook(aside(hook), with_kwargs=True))
        if self.precision.emulated:  # after the hooks above: so that the output's gradient is rounded as well
            for module in self._products():
                self.handles.append(module.register_forward_hook(aside(self._round_output)))
        self.held = ExitStack()  # heads whose losses are noted: their gradients are made of their weights
        self.held.enter_context(held_whole(weight for layer in self.layers for weight in layer.watched.values()))
        return self

    def __exit__(self, *exception) -> None:
        self.held.close()
        come_to_rest(self.model)
        for handle in self.handles:
            handle.remove()
        for tensor, held in reversed(self.exact):
            tensor.data = held
        for part, held in self.rounded:
            part.copy_(held)
        for parameter, requires_grad in zip(self.model.parameters(), self.requires_grad):
            parameter.requires_grad_(requires_grad)
        for module, training in zip(self.model.modules(), self.training):
            module.training = training
        self.forget()

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Captured]]:
        """Run one batch.

        Returns:
            The summed loss (a scalar, detached), and what each layer captured.
        Raises:
            UserError: a tracked layer was not called; the loss is no scalar or has no gradient; rows or the position
                mask do not fit what a layer saw.
        """
        with torch.enable_grad(), compiled(self.model) if self.compile else nullcontext():
            loss = self.forward(batch)
            gradients = self.gradients(loss)
        captured = self.capture(batch, gradients)
        self.forget()
        if self.find_active:
            find_active_positions(captured.values())
        return loss.detach(), captured

    def capture(self, batch: Batch, gradients: dict[str, list[Tensor]]) -> dict[str, Captured]:
        """What each layer keeps of the batch that was run."""
        layout = Layout(
            len(batch[EXAMPLE_INDEX]),
            self.rows_per_example,
            position_counts([x for calls in self.inputs.values() for x in calls], batch),
            partial(self.position_mask, batch),
            self.precision.operand,
            partial(self.precision.autocast, next(self.model.parameters()).device),
        )
        return {layer.name: layer.capture(self._calls(layer, gradients), layout) for layer in self.layers}

    def _calls(self, layer: TrackedLayer, gradients: dict[str, list[Tensor]]) -> dict[str, Calls]:
        """Of each site of the layer that was called; forgotten here."""
        calls = {site: Calls(self.inputs.pop(site), gradients.pop(site)) for site in layer.sites if site in gradients}
        for site, weight in layer.watched.items():
            calls[site] = replace(calls.get(site, Calls([], [])), losses=self.losses[id(weight)])
        return calls

    def _was_called(self, layer: TrackedLayer) -> bool:
        losses = any(self.losses[id(weight)] for weight in layer.watched.values())
        return losses or bool(self.outputs.keys() & layer.sites.keys())

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Inside, the losses of tracked heads are noted."""
        weights = [weight for layer in self.layers for weight in layer.watched.values()]
        with watched_heads(weights) as self.losses:
            yield

    def _is_shared(self, layer: TrackedLayer, output: Tensor) -> bool:
        """Whether a module looked up for all rows what each row has its own gradient of, as positions are."""
        return layer.is_spread and output.dim() > 2 and len(output) == 1 < self.num_rows

    def _products(self) -> Iterator[nn.Module]:
        """What emulated bfloat16 rounds."""
        return (module for layer in self.all_layers if layer.is_product for module in layer.sites.values())

    def forget(self) -> None:
        """Let go of what a forward pass left behind."""
        self.inputs, self.outputs, self.versions, self.losses = {}, {}, [], {}

    def _swap(self, tensor: Tensor, data: Tensor) -> None:
        """Let a parameter or buffer hold other numbers until the pass ends."""
        self.exact.append((tensor, tensor.data))
        tensor.data = data

    def _round(self, weight: nn.Parameter) -> None:
        """Let a weight hold operands until the pass ends; sharded, in the memory that it is gathered from."""
        if not is_sharded([weight]):
            self._swap(weight, self.precision.operand(weight.data))
            return
        part = local(weight)
        self.rounded.append((part, part.clone()))
        part.copy_(self.precision.operand(part))

    def _round_input(self, module: nn.Module, arguments: tuple, keywords: dict):
        operand = self.precision.operand
        return tuple(map(operand, arguments)), {key: operand(value) for key, value in keywords.items()}

    def _round_output(self, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return self.precision.operand(output)

    def _hook(self, layer: TrackedLayer, name: str):
        def keep(module: nn.Module, arguments: tuple, keywords: dict, output: Tensor) -> Tensor:
            if not self.is_forward:  # a checkpoint that is computed again on the way back
                return output
            seen = layer.read(name, arguments, keywords)
            if self._is_shared(layer, output):
                seen, output = (x.expand(self.num_rows, *x.shape[1:]) for x in (seen, output))
            is_copied = name in self.copied
            # Shares memory and version counter with what the model goes on to use.
            is_kept = not is_copied and not (self.frees and is_memory_of_parameter(seen))
            self.inputs.setdefault(name, []).append(seen.detach() if is_kept else seen.detach().clone())
            calls = self.outputs.setdefault(name, [])
            calls.append(output.requires_grad_())
            # The model goes on with a tensor that is never a leaf of the graph.
            handed_on = output.clone() if is_copied else output.view_as(output)
            self.versions += [(name, tensor, tensor._version) for tensor in (seen.detach(), handed_on)]
            return handed_on

        return keep

    def forward(self, batch: Batch) -> Tensor:
        """The loss; again, with copies, where the model changed what a layer saw or made in place."""
        self.num_rows = len(batch[EXAMPLE_INDEX]) * (self.rows_per_example or 1)
        try:
            loss = self._forward_once(batch)
        except RuntimeError as error:
            if "in-place" not in str(error) or self.copied.issuperset(self.sites):
                raise
            come_to_rest(self.model)
            known = set(self.copied)
            self.copied.update(self.sites)  # what is changed is not known before the pass ends
            loss = self._forward_once(batch)
            self.copied.intersection_update(known | self._changed_in_place())
            return loss
        if self._changed_in_place() - self.copied:
            self.copied |= self._changed_in_place()
            loss = self._forward_once(batch)
        return loss

    def _changed_in_place(self) -> set[str]:
        """Sites whose input or output is no more what it was when the module was called; also where it was freed."""
        return {
            name for name, tensor, version in self.versions
            if tensor._version != version or (self.frees and tensor.numel() and not tensor.untyped_storage().nbytes())
        }  # fmt: skip

    def _forward_once(self, batch: Batch) -> Tensor:
        self.forget()
        with self._watch(), self.precision.autocast(next(self.model.parameters()).device):
            loss = self.loss_function(self.model, batch)
        uncalled = [layer.name for layer in self.layers if not self._was_called(layer)]
        if uncalled:
            raise UserError(
                f"tracked layers that the forward pass did not call: {', '.join(uncalled)}; leave them out of the "
                "tracked layers, or let the loss use them"
            )
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UserError(f"a loss must be one number, summed over positions and examples, and is {what}")
        if not loss.requires_grad:
            raise UserError(
                "the loss has no gradient: it does not depend on the tracked layers, or is computed under "
                "torch.no_grad or from detached tensors"
            )
        return loss

    def gradients(self, loss: Tensor) -> dict[str, list[Tensor]]:
        """Of each call's output, by site."""
        calls = {site: list(self.outputs[site]) for site in self.sites if site in self.outputs}
        flat = [tensor for each in calls.values() for tensor in each]
        leaves = [loss.leaf for losses in self.losses.values() for loss in losses if loss.leaf is not None]
        self.is_forward = False
        try:
            gradients = iter(torch.autograd.grad(loss, flat + leaves, allow_unused=True, materialize_grads=True))
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            raise UserError(
                "the model recomputes its activations by reentrant checkpoints, through which no gradient of a layer's "
                "output can be had: use gradient checkpointing with use_reentrant=False, or none"
            ) from None
        finally:
            self.is_forward = True
        return {site: [next(gradients) for _ in each] for site, each in calls.items()}


def _nothing(module: nn.Module, arguments: tuple, keywords: dict, output: Tensor) -> None:
    """The hook of a layer that a pass does not track."""
