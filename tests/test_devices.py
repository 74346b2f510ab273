"""What a machine has and what it is asked for: processes and GPUs, products with an output dtype."""

import pytest
import torch

from influence_core.errors import UserError
from influence_core.flops import FlopCount
from influence_core.runtime import Runtime

LAUNCH = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
LAUNCH |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_more_processes_than_gpus_are_refused_with_both_numbers(monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on a machine with 2 GPUs: .*--nproc-per-node=2 at most"):
        Runtime.start(use_ddp=True)


@pytest.mark.parametrize("product, operands", [
    (torch.mm, "ab"), (torch.addmm, "cab"), (torch.bmm, "AB"),
])  # fmt: skip
def test_products_with_an_output_dtype_are_counted(product, operands):
    """As those of bfloat16 into float32 on a GPU: 2 x 3 x 4 x 5 operations."""
    sizes = {"a": (3, 4), "b": (4, 5), "c": (3, 5), "A": (1, 3, 4), "B": (1, 4, 5)}
    dtypes = {name: torch.float32 if name == "c" else torch.bfloat16 for name in sizes}
    tensors = [torch.empty(sizes[name], dtype=dtypes[name], device="meta") for name in operands]
    with FlopCount() as count:
        product(*tensors, out_dtype=torch.float32)
    assert count.total == 120
