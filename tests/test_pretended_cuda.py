"""What wants a GPU, on a machine without one: see tests/pretended."""

import re

import pytest
import torch

from tests.pretended.library import compiler
from tests.scripts import ROOT, run_process


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler ($CXX or g++)")
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own")
def test_all_that_wants_a_gpu_but_compilation():
    """In a process of its own, and none is skipped."""
    checks = sorted((ROOT / "tests" / "pretended").glob("check_*.py"))
    command = ["-m", "pytest", "-q", "-p", "tests.pretended.plugin", "-p", "no:cacheprovider", "-k", "not compiled"]
    outcome = run_process([*command, "tests/test_gpu.py", *checks])
    assert outcome.code == 0, outcome.out + outcome.err
    passed = re.search(r"^(\d+) passed, 1 deselected.* in ", outcome.out, re.MULTILINE)
    assert passed and int(passed[1]) > 50, outcome.out
