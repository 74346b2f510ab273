"""What a training asks of accelerate: all processes for one model, whole or sharded; or one process by itself."""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from influence_core.launch import Launch
from influence_core.runtime import LONGEST_WAIT
from influence_core.sharding import is_sharded, process_mesh, shard_model
from influence_core.tasks.example import ExampleTask


def accelerator_of(arguments) -> Accelerator:
    """By a script's flags, for all processes that torchrun started.

    Raises:
        UserError: --use_fsdp outside torchrun, or a number of shards that does not divide the processes.
    """
    if arguments.use_fsdp:
        Launch.require_torchrun("--use_fsdp")
    accelerator = (_Sharding if arguments.use_fsdp and Launch.here().world_size > 1 else Accelerator)(
        mixed_precision="bf16" if arguments.use_half_precision else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        # Told so, or without a GPU it would not see the other processes, and each would train by itself.
        cpu="LOCAL_RANK" in os.environ and not torch.cuda.is_available(),
    )
    if isinstance(accelerator, _Sharding):
        accelerator.mesh = process_mesh(accelerator.device.type, arguments.fsdp_shards)
    return accelerator


def load_start(task: ExampleTask, accelerator) -> nn.Module:
    """The model to train, of which each process has read no more than its part, if it is to have no more."""
    before, task.shard_on = task.shard_on, getattr(accelerator, "mesh", None)
    try:
        return task.load_model(None)
    finally:
        task.shard_on = before


class _Sharding(Accelerator):
    """Leaves each process its part of a model, by the very sharding of the analysis.

    accelerate's own takes GPUs only, and cuts a model elsewhere; data, precision and optimizer stay accelerate's.
    """

    def prepare_model(self, model, *_, **__):
        if not is_sharded(model.parameters()):
            shard_model(model, self.mesh)
        # An adapter beside a base model that was read in parts: small, and each process has all of it.
        self._whole = [each for each in model.parameters() if each.requires_grad and not is_sharded([each])]
        return model

    def backward(self, loss, **kwargs):
        super().backward(loss, **kwargs)
        if not self._whole:
            return
        has_any = torch.tensor([each.grad is not None for each in self._whole], device=self.device)
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in self._whole]
        mean = torch.cat([*(gradient.flatten() for gradient in gradients), has_any.float()]) / self.num_processes
        dist.all_reduce(mean)
        *means, has_any = mean.split([*(each.numel() for each in self._whole), len(self._whole)])
        for parameter, of_all, any_has in zip(self._whole, means, has_any.tolist()):
            parameter.grad = of_all.view_as(parameter) if any_has else None


class OneDevice:
    """What `fit` and `evaluate` ask of accelerate's Accelerator, for a process that trains a model of its own.

    Under torchrun an Accelerator would join all processes to train one model; retrainings are one process's each.
    """

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self, device: torch.device, use_half_precision: bool):
        self.device, self.use_half_precision = device, use_half_precision

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def prepare(self, optimizer, loader):
        return optimizer, _OnDevice(loader, self.device)

    def autocast(self):
        half = self.use_half_precision
        return torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def free_memory(self) -> None:
        """There is nothing that it keeps."""

    def end_training(self) -> None:
        """There is no group to leave."""


@dataclass
class _OnDevice:
    loader: DataLoader
    device: torch.device

    def __iter__(self):
        for batch in self.loader:
            yield {key: value.to(self.device) for key, value in batch.items()}
