"""Files of tensors that have shapes alone: they are small, and take the time of large ones."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from influence_core import files, storage
from tests.benchmarks.roofline import cards
from tests.benchmarks.roofline.clock import Clock
from tests.benchmarks.roofline.device import place
from tests.benchmarks.roofline.tensors import host_tensor

MARK = "modelled tensors"
SMALL = 1 << 20  # bytes that are really hashed


class ModelledDisk:
    """In place of safetensors, hashlib and fsync."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.free = 0.0  # seconds, from when on the disk has nothing to write

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the project's files are such."""
        disk, clock = self, self.clock
        real_sha256 = hashlib.sha256

        class Sha256:
            """Takes the time of all that it is given, and reads what is small."""

            def __init__(self, data=b""):
                self.real = real_sha256()
                self.update(data)

            def update(self, data) -> None:
                view = memoryview(data)
                clock.spend(view.nbytes / cards.HASHING, (place(), "hashing", ""))
                self.real.update(view if view.nbytes <= SMALL and view.contiguous else str(view.nbytes).encode())

            def hexdigest(self) -> str:
                return self.real.hexdigest()

            def digest(self) -> bytes:
                return self.real.digest()

        def file_digest(file, name):
            described = file.read()
            size = disk.size(described)
            clock.spend(size / cards.PAGE_CACHE_READ, (place(), "reading files", ""))
            clock.spend(size / cards.HASHING, (place(), "hashing", ""))
            return real_sha256(described)

        def fsync(descriptor: int) -> None:
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                size = disk.size(file.read())
            disk.free = max(disk.free, clock.now()) + cards.FSYNC + size / cards.DISK
            clock.spend(disk.free - clock.now(), (place(), "writing to the disk", ""))
            written = time.time_ns() - 1_000_000_000  # a large file's last byte is not of this very moment
            os.utime(descriptor, ns=(written, written))

        with ExitStack() as patches:
            for module in (files, storage):
                for name, function in (("save_file", self.save_file), ("safe_open", self.safe_open)):
                    if hasattr(module, name):
                        patches.enter_context(patch.object(module, name, function))
            patches.enter_context(patch.object(hashlib, "sha256", Sha256))
            patches.enter_context(patch.object(hashlib, "file_digest", file_digest))
            patches.enter_context(patch.object(os, "fsync", fsync))
            yield

    @staticmethod
    def size(content: bytes) -> int:
        """Bytes of the file that this one stands for."""
        if not content.startswith(b'{"' + MARK.encode()):
            return len(content)
        tensors = json.loads(content)[MARK]
        return sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in tensors.values())

    def save_file(self, tensors, path, metadata=None) -> None:
        described = {name: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()}
        content = json.dumps({MARK: described, "metadata": metadata})
        with open(path, "w") as file:
            file.write(content)
        size = self.size(content.encode())
        self.clock.spend(size / cards.CPU_BANDWIDTH, (place(), "copying to write", ""))  # safetensors takes bytes
        self.clock.spend(size / cards.PAGE_CACHE_WRITE, (place(), "writing to the page cache", ""))

    @contextmanager
    def safe_open(self, path, framework, device="cpu"):
        with open(path) as file:
            content = json.load(file)
        yield _Opened(self.clock, content)


class _Opened:
    def __init__(self, clock: Clock, content):
        self.clock, self.content = clock, content

    def keys(self):
        return list(self.content[MARK])

    def metadata(self):
        return self.content["metadata"]

    def get_tensor(self, name: str):
        shape, dtype = self.content[MARK][name]
        tensor = host_tensor(shape, getattr(torch, dtype))
        self.clock.spend(tensor.nbytes / cards.PAGE_CACHE_READ, (place(), "reading files", ""))
        return tensor
