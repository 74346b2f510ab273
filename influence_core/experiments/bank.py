"""Retrainings on disk: each is done once, whoever asks for it, and a killed run loses only the one in hand.

A bank is a directory: bank.json says what all its retrainings have in common (initial model, data, recipe), and each
retraining is a small file, named by what was kept and the seed. Any number of processes, on any number of machines that
share the directory, work on it side by side: who holds a retraining's lock does it. The kernel frees the lock of a
process that dies.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from influence_core.errors import UserError
from influence_core.storage import differences, write_json, write_tensors

KEEP, SEED = "keep", "seed"  # names of the stored tensors that say which retraining it is
WAIT_SECONDS = 1.0  # between two looks at what other processes have finished


@dataclass(frozen=True)
class Retraining:
    """What to train on, and the seed of order and dropout."""

    keep: bytes  # one byte for each training example: 1 kept, 0 removed
    seed: int

    @classmethod
    def of(cls, keep: np.ndarray, *seeds: int) -> "Retraining":
        """keep: [training examples] bool; seeds: numbers that together make the seed."""
        return cls(np.asarray(keep, dtype=np.uint8).tobytes(), int(np.random.SeedSequence(seeds).generate_state(1)[0]))

    @property
    def name(self) -> str:
        return hashlib.sha256(self.keep + self.seed.to_bytes(8)).hexdigest()[:20]

    @property
    def indices(self) -> list[int]:
        """Of the examples that are kept."""
        return np.flatnonzero(np.frombuffer(self.keep, dtype=np.uint8)).tolist()


class RetrainingBank:
    """All retrainings of one recipe.

    Args:
        settings: what they have in common, as JSON values.
    Raises:
        UserError: the directory holds a bank with other settings (the fields that differ are named).
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self.directory, self.settings = Path(directory), dict(settings)
        path = self.directory / "bank.json"
        try:
            stored = dict(json.loads(path.read_text()))
        except FileNotFoundError:
            write_json(path, self.settings)
            stored = self.settings
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not readable ({error}): choose another --bank_dir") from None
        differing = differences(stored, self.settings)
        if differing:
            raise UserError(
                f"the retrainings in {self.directory} were made otherwise: {differing}; choose another --bank_dir"
            )

    def path(self, retraining: Retraining) -> Path:
        return self.directory / f"{retraining.name}.safetensors"

    def load(self, retraining: Retraining) -> dict[str, Tensor]:
        """{name: [queries]}, what was measured after it.

        Raises:
            UserError: the file is not readable, or of another retraining.
        """
        path = self.path(retraining)
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}
            keep, seed = values.pop(KEEP, None), values.pop(SEED, None)
            if keep is not None and keep.numpy().tobytes() == retraining.keep and seed == retraining.seed:
                return values
        raise UserError(f"{path} is truncated or altered: remove it, and it is made again")

    def complete(
        self,
        retrainings: Sequence[Retraining],
        retrain: Callable[[Retraining], dict[str, Tensor]],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Do those that are missing, beside whoever else does, and return when all are there.

        Args:
            retrain: returns {name: [queries] float64}.
            rank, world_size: only say where in the list each process begins.
        """
        retrainings = list(dict.fromkeys(retrainings))
        start = len(retrainings) * rank // world_size
        todo = [each for each in retrainings[start:] + retrainings[:start] if not self.path(each).exists()]
        with tqdm(total=len(retrainings), desc="Retrain", unit="run", disable=rank > 0, dynamic_ncols=True) as bar:
            bar.initial = bar.n = len(retrainings) - len(todo)
            bar.refresh()
            while todo:
                mine = next(filter(None, (self._try(each, retrain) for each in todo)), None)
                todo = [each for each in todo if not self.path(each).exists()]
                bar.update(len(retrainings) - len(todo) - bar.n)
                if todo and mine is None:
                    time.sleep(WAIT_SECONDS)  # what is left is in other hands

    def _try(self, retraining: Retraining, retrain: Callable[[Retraining], dict[str, Tensor]]) -> bool:
        """Do a retraining unless it is done, or in other hands; whether this process did it."""
        path = self.path(retraining)
        lock = FileLock(self.directory / "locks" / f"{retraining.name}.lock", timeout=0)
        try:
            Path(lock.lock_file).parent.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            raise UserError(f"{self.directory} can't be written: {error.strerror or error}") from None
        try:
            if path.exists():
                return False
            keep = torch.frombuffer(bytearray(retraining.keep), dtype=torch.uint8)
            write_tensors(path, {KEEP: keep, SEED: torch.tensor(retraining.seed)} | retrain(retraining))
            return True
        finally:
            lock.release()
