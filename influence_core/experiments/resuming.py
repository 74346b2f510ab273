"""What a killed training goes on from, to end as if it had not been killed: its state at the end of each epoch.

On a CPU it ends in the same bytes. The state is that of the model, the optimizer, the order of the examples and, for
each process, of the generators that dropout draws from. It is about three times as large as the model, and is removed
when the training has ended.
"""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_core.errors import UserError
from influence_core.files import (
    Damaged,
    Tensors,
    read_sealed_tensors,
    refuse_link,
    remove_leftovers,
    write_sealed_tensors,
)
from influence_core.sharding import is_sharded, local, with_part
from influence_core.storage import differences

MODEL = "model"  # of names: its tensors


class TrainingState:
    """The states of one training, in a directory.

    Args:
        identity: what decides the trained model, as JSON values: states of another training are not gone on from.
        rank, world_size: of this process among those that train the model; all of them save and load.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], rank: int = 0, world_size: int = 1):
        self.directory, self.identity = directory, dict(identity)
        self.rank, self.world_size = rank, world_size
        self.is_kept = True  # until the disk is full
        refuse_link(directory)

    def save(self, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator) -> None:
        """Keep the state after so many epochs in place of the one before; where that can't be written, say so once."""
        if not self.is_kept:
            return
        record = {"identity": self.identity, "epoch": epoch}
        try:
            shared, own = {"order": order.get_state()}, generator_states()
            parts = own if is_sharded(model.parameters()) else shared  # of sharded parameters each process has its own
            if self.rank == 0 or parts is own:
                weights = {name: local(tensor) for name, tensor in model.state_dict().items()}
                parts |= {f"{MODEL}.{name}": tensor for name, tensor in _unlike(weights).items()}
                parts |= _optimizer_tensors(optimizer)
            if self.rank == 0:
                write_sealed_tensors(self._path(epoch), shared, record)
            write_sealed_tensors(self._path(epoch, self.rank), own, record)
        except UserError as error:
            self.is_kept = False
            print(f"Note: {error}: the training goes on, but could not be gone on with if it were killed", flush=True)

    def forget(self, but_epoch: int) -> None:
        """Remove the states of other epochs, if all processes have saved this one; for one process, when all tried."""
        if not all(self._path(but_epoch, rank).exists() for rank in (None, *range(self.world_size))):
            return
        for path in self.directory.glob("epoch-*"):
            if not path.name.startswith(f"epoch-{but_epoch}."):
                path.unlink(missing_ok=True)
        remove_leftovers(self.directory)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator) -> int:
        """Go on from the latest state that all processes have; the number of epochs that are done, 0 without one."""
        others = ""
        for epoch in self._epochs():
            try:
                record, tensors = read_sealed_tensors(self._path(epoch))
                parts = []
                for rank in range(self.world_size):  # all, so that every process goes on from the same epoch
                    of_rank, own = read_sealed_tensors(self._path(epoch, rank))
                    parts.append((of_rank, own if rank == self.rank else {}))
            except (OSError, Damaged) as reason:
                self._say(
                    f"Note: the state in {self._path(epoch)} is damaged or not whole ({reason}): not gone on from it"
                )
                continue
            differing = differences(record["identity"], self.identity)
            if differing or any(part["identity"] != record["identity"] for part, _ in parts):
                others = differing
                continue
            tensors |= parts[self.rank][1]
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    if (stored := tensors.get(f"{MODEL}.{name}")) is not None:
                        local(value).copy_(stored)
            _restore_optimizer(optimizer, tensors)
            order.set_state(tensors["order"])
            restore_generators(tensors)
            return epoch
        if others:
            self._say(f"Note: the training in {self.directory.parent} that did not end was another: {others}; this one "
                      "starts from its beginning")  # fmt: skip
        return 0

    def remove(self) -> None:
        """Forget all of it: the training has ended."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _epochs(self) -> list[int]:
        """Those whose model is there, the latest first."""
        names = (path.name.split(".") for path in self.directory.glob("epoch-*.safetensors"))
        numbers = [name[0].removeprefix("epoch-") for name in names if len(name) == 2]
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def _path(self, epoch: int, rank: int | None = None) -> Path:
        of = "" if rank is None else f".process-{rank}"
        return self.directory / f"epoch-{epoch}{of}.safetensors"

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def _unlike(tensors: Mapping[str, Tensor]) -> Tensors:
    """Each tensor once: tied ones, and views of one storage, under the first name."""
    seen: set[tuple] = set()
    unlike = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            unlike[name] = tensor
    return unlike


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """{"optimizer.NUMBER.NAME": tensor} of the state of each parameter."""
    return {
        f"optimizer.{number}.{name}": local(torch.as_tensor(value))
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, Tensors] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            like = parameters[int(number)] if tensor.dim() else tensor  # a number of steps is no part of anything
            state.setdefault(int(number), {})[name] = with_part(tensor, like)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def generator_states() -> Tensors:
    """The states of all generators that a model may draw from."""
    python = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python[1], dtype=torch.int64),
        "python_gauss": torch.tensor([] if python[2] is None else [python[2]], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Tensors) -> None:
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    np.random.set_state(("MT19937", states["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
