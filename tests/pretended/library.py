"""guard.cpp, compiled at its first use and kept with Python's own compiled files; to be loaded before torch is."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
_loaded: list[ctypes.CDLL] = []


def compiler() -> str | None:
    """The C++ compiler, where there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def load() -> None:
    """Let autograd and autocast of this process take CUDA tensors."""
    if _loaded:
        return
    assert "torch" not in sys.modules, "torch has looked for a CUDA device already"
    identity = SOURCE.read_text() + importlib.metadata.version("torch")
    name = f"guard-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    library = SOURCE.parent / "__pycache__" / name
    if not library.exists():
        _compile(library)
    _loaded.append(ctypes.CDLL(str(library)))


def _compile(library: Path) -> None:
    torch = Path(importlib.util.find_spec("torch").origin).parent
    library.parent.mkdir(exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")  # whole or not at all, though several processes may be at it
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{torch}/include"]
    links = [f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([compiler(), *flags, str(SOURCE), "-o", str(part), *links], check=True)
    part.replace(library)
