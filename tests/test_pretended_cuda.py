"""What wants a GPU, on a machine without one (see tests/pretended): each row is a process of its own."""

import re

import pytest
import torch

from tests.pretended.library import compiler
from tests.scripts import run_process

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler ($CXX or g++)"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own"),
]


@pytest.mark.parametrize("files", [
    ["tests/test_gpu.py", "tests/pretended/check_device.py", "tests/pretended/check_core.py"],
    ["tests/pretended/check_examples.py"],
], ids=["core", "examples"])  # fmt: skip
def test_on_a_pretended_device(files):
    """All of them ran, none was skipped; torch.compile is beyond it."""
    pytest = ["-m", "pytest", "-q", "-p", "tests.pretended.plugin", "-p", "no:cacheprovider", "-k", "not compiled"]
    outcome = run_process([*pytest, *files])
    assert outcome.code == 0, outcome.out
    assert re.search(r"^\d+ passed(, \d+ deselected)?(, \d+ warnings?)? in ", outcome.out, re.MULTILINE), outcome.out
