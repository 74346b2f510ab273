"""What one batch takes, counted by running it: for the plan."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_core.captured import has_gradient
from influence_core.flops import FlopCount
from influence_core.layers import TrackedLayer
from influence_core.losses import IGNORED
from influence_core.passes import GradientPass
from influence_core.sharding import local
from influence_core.task import Batch


@dataclass(frozen=True)
class Probe:
    """What one batch takes, for the plan."""

    num_bytes: int  # kept between forward and backward, with what is captured
    fixed_bytes: int  # of these, those that more examples in a batch would not multiply
    captured_bytes: int  # of what all layers capture, as operands; what several share counts for each
    forward_flops: float
    backward_flops: float
    positions: dict[str, float]  # rows * positions that each site of a layer sees
    active_positions: dict[str, float]  # of these, those that have a gradient
    num_gradients: int = 1  # of a layer, that can be made of it
    captured_by_layer: dict[str, int] = field(default_factory=dict)  # of captured_bytes, each layer's

    def captured_of(self, layers: Iterable[TrackedLayer]) -> int:
        """Bytes that these layers capture."""
        of_all = self.captured_by_layer
        return sum(of_all[layer.name] for layer in layers) if of_all else self.captured_bytes


def probe(run: GradientPass, batch: Batch) -> Probe:
    """Run one batch and count what it takes."""
    # Kept alive until they are counted: an address that is freed and taken again would hide one of the two.
    storages: dict[int, torch.UntypedStorage] = {}
    constants = {local(parameter).untyped_storage().data_ptr() for parameter in run.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constants:
            storages[storage.data_ptr()] = storage
        return tensor

    with FlopCount() as counter, torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = run.forward(batch)
        forward_flops = counter.total
        kept = [x for calls in (*run.inputs.values(), *run.outputs.values()) for x in calls]
        gradients = run.gradients(loss)
    for tensor in [*kept, *(x for calls in gradients.values() for x in calls)]:
        note(tensor)
    num_bytes = sum(storage.nbytes() for storage in storages.values())
    positions = {site: float(sum(x[..., 0].numel() for x in calls)) for site, calls in gradients.items()}
    active = {site: sum(float(has_gradient(x).sum()) for x in calls) for site, calls in gradients.items()}
    for layer in run.layers:
        for site, weight in layer.watched.items():
            of_losses = sum(float((loss.targets != IGNORED).sum()) for loss in run.losses[id(weight)])
            positions[site], active[site] = (counts.get(site, 0) + of_losses for counts in (positions, active))
    storages.clear()
    captured = run.capture(batch, gradients)
    by_layer = {name: sum(x.nbytes for x in each.tensors) for name, each in captured.items()}
    num_gradients = max(map(len, captured.values()))
    run.forget()
    flops = forward_flops, counter.total - forward_flops
    return Probe(num_bytes, 0, sum(by_layer.values()), *flops, positions, active, num_gradients, by_layer)
