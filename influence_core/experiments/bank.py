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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_core.errors import UserError
from influence_core.files import (
    Damaged,
    read_sealed_json,
    read_sealed_tensors,
    refuse_link,
    remove_leftovers,
    write_sealed_json,
    write_sealed_tensors,
)
from influence_core.locks import Held, holder_of, is_held, lock
from influence_core.progress import progress
from influence_core.storage import differences

NAME = "bank.json"  # says what the retrainings have in common
LOCKS = "locks"  # directory of those in hand
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
        self._named = json.loads(json.dumps(self.settings))  # as a file gives them back
        for each in (self.directory / NAME, self.directory / LOCKS):
            refuse_link(each)
        if self._stored() == self._named:  # also where nothing can be written
            return
        with self._naming():  # two that begin at once must not both name the bank
            remove_leftovers(self.directory, NAME)
            stored = self._stored()
            if stored is not None and not self._is_unused():
                self._require_same(stored)
            if stored != self._named:
                write_sealed_json(self.directory / NAME, self.settings)

    def _stored(self) -> dict[str, Any] | None:
        """What bank.json says, if there is one."""
        path = self.directory / NAME
        try:
            return read_sealed_json(path)
        except FileNotFoundError:
            return None
        except Damaged as reason:
            raise UserError(
                f"{path} is not readable ({reason}): remove it, its retrainings tell themselves what they are of; "
                "or choose another --bank_dir"
            ) from None

    def _require_same(self, stored: Mapping[str, Any] | None) -> None:
        differing = differences(stored or {}, self._named)
        if differing:
            raise UserError(
                f"the retrainings in {self.directory} were made otherwise: {differing}; choose another --bank_dir"
            )

    def _is_unused(self) -> bool:
        """Whether there is no retraining yet, nor one in hand: then it may become a bank of something else."""
        try:
            in_hand = any(map(is_held, (self.directory / LOCKS).glob("*")))
        except OSError:  # something that nobody can lock
            in_hand = True
        return not in_hand and not any(self.directory.glob("*.safetensors"))

    def path(self, retraining: Retraining) -> Path:
        return self.directory / f"{retraining.name}.safetensors"

    def load(self, retraining: Retraining) -> dict[str, Tensor]:
        """{name: [queries]}, what was measured after it.

        Raises:
            UserError: the file is damaged, or of another retraining or another bank.
        """
        path = self.path(retraining)
        try:
            settings, values = read_sealed_tensors(path)
        except (OSError, Damaged) as reason:
            raise UserError(f"{path} is damaged ({reason}): remove it, and it is made again") from None
        mask, seed = values.pop(MASK, None), values.pop(SEED, None)
        if mask is None or mask.numpy().tobytes() != retraining.mask or seed != retraining.seed:
            raise UserError(f"{path} is of another retraining: remove it, and it is made again")
        differing = differences(settings, self._named)
        if differing:
            raise UserError(f"{path} was made otherwise: {differing}; choose another --bank_dir, or remove it")
        return values

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
        for each in retrainings:  # before hours of work, not after
            if self.path(each).exists():
                self.load(each)
        start = len(retrainings) * rank // world_size
        todo = [each for each in retrainings[start:] + retrainings[:start] if not self.path(each).exists()]
        done = len(retrainings) - len(todo)
        with progress(len(retrainings), "Retrain", unit="run", initial=done, is_shown=rank == 0) as bar:
            while todo:
                mine = next(filter(None, (self._try(each, retrain) for each in todo)), None)
                before, todo = len(todo), [each for each in todo if not self.path(each).exists()]
                bar.update(before - len(todo))
                if todo and mine is None:
                    holder = next(filter(None, (holder_of(self._lock_path(each)) for each in todo)), "others")
                    bar.note(f"waiting for {len(todo)} of {holder}")
                    time.sleep(WAIT_SECONDS)

    def _try(self, retraining: Retraining, retrain: Callable[[Retraining], dict[str, Tensor]]) -> bool:
        """Do a retraining unless it is done, or in other hands; whether this process did it."""
        path = self.path(retraining)
        try:
            with self._lock(self._lock_path(retraining)):
                os.close(os.open(self.directory, os.O_RDONLY))  # a network file system then looks for the file anew
                if path.exists():
                    return False
                self._require_same(self._stored())  # others may have named it anew while nothing was in hand
                remove_leftovers(self.directory, path.name)
                mask = torch.frombuffer(bytearray(retraining.mask), dtype=torch.uint8)
                values = {MASK: mask, SEED: torch.tensor(retraining.seed)} | retrain(retraining)
                write_sealed_tensors(path, values, self.settings)
                return True
        except Held:
            return False

    def _lock_path(self, retraining: Retraining) -> Path:
        return self.directory / LOCKS / f"{retraining.name}.lock"

    @contextmanager
    def _lock(self, path: Path):
        with ExitStack() as stack:
            try:
                stack.enter_context(lock(path))
            except OSError as error:
                reason = error.strerror or error
                raise UserError(
                    f"{self.directory} can't be written, or its file system has no locks: {reason}"
                ) from None
            yield

    @contextmanager
    def _naming(self):
        """Alone in the directory, but for who works on a retraining."""
        while True:
            with suppress(Held), self._lock(self.directory / f"{NAME}.lock"):
                yield
                return
            time.sleep(WAIT_SECONDS / 10)
