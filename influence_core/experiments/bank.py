"""Retrainings on disk: each is done once, whoever asks for it, and a killed run loses only the one in hand.

A bank is a directory: bank.json says what all its retrainings have in common (initial model, data, recipe), and each
retraining is a small file, named by what was kept and the seed. Any number of processes, on any number of machines that
share the directory, work on it side by side: who holds a retraining's lock does it, and the kernel frees the lock of a
process that dies. A directory that machines share must be on a file system whose locks (flock) hold across them, as
those of NFS do unless it is mounted with local locks.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
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

MASK, SEED = "mask", "seed"  # names of the stored tensors that say which retraining it is
WAIT_SECONDS = 1.0  # between two looks at what other processes have finished


@dataclass(frozen=True)
class Retraining:
    """What to train on, and the seed of order and dropout."""

    mask: bytes  # one byte for each training example: 1 kept, 0 removed
    seed: int

    @classmethod
    def of(cls, mask: np.ndarray, *seeds: int) -> "Retraining":
        """mask: [training examples] bool, true where kept; seeds: numbers that together make the seed."""
        return cls(np.asarray(mask, dtype=np.uint8).tobytes(), int(np.random.SeedSequence(seeds).generate_state(1)[0]))

    @property
    def name(self) -> str:
        return hashlib.sha256(self.mask + self.seed.to_bytes(8)).hexdigest()[:20]

    @property
    def indices(self) -> list[int]:
        """Of the examples that are kept."""
        return np.flatnonzero(np.frombuffer(self.mask, dtype=np.uint8)).tolist()


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
        with self._lock("bank", timeout=-1):  # two that begin at once must not both name the bank
            if not path.exists():
                write_json(path, self.settings)
        try:
            stored = dict(json.loads(path.read_text()))
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
            mask, seed = values.pop(MASK, None), values.pop(SEED, None)
            if mask is not None and mask.numpy().tobytes() == retraining.mask and seed == retraining.seed:
                return values
        raise UserError(f"{path} is truncated or of another retraining: remove it, and it is made again")

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
                    bar.set_postfix_str(f"{len(todo)} in other hands")
                    time.sleep(WAIT_SECONDS)

    def _try(self, retraining: Retraining, retrain: Callable[[Retraining], dict[str, Tensor]]) -> bool:
        """Do a retraining unless it is done, or in other hands; whether this process did it."""
        path = self.path(retraining)
        try:
            with self._lock(retraining.name, timeout=0):
                os.close(os.open(self.directory, os.O_RDONLY))  # a network file system then looks for the file anew
                if path.exists():
                    return False
                mask = torch.frombuffer(bytearray(retraining.mask), dtype=torch.uint8)
                write_tensors(path, {MASK: mask, SEED: torch.tensor(retraining.seed)} | retrain(retraining))
                return True
        except Timeout:
            return False

    @contextmanager
    def _lock(self, name: str, timeout: float):
        lock = FileLock(self.directory / "locks" / f"{name}.lock", timeout, fallback_to_soft=False)
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.directory} can't be written, or its file system has no locks: {reason}") from None
        try:
            yield
        finally:
            lock.release()
