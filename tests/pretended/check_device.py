"""The pretended device itself: what CUDA refuses is refused, what it accepts gives the CPU's numbers."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tests.pretended import rules
from tests.pretended.device import CheckedDevice, CudaTensor, Operation, pretended_cuda

pytestmark = pytest.mark.gpu
BF16, INT64 = torch.bfloat16, torch.int64
MIX = "Expected all tensors to be on the same device"


def on_cpu(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


def on_gpu(*shape, dtype=torch.float32):
    return on_cpu(*shape, dtype=dtype).cuda()


def added(dtype, of_operands, **options):
    return torch.addmm(on_gpu(2, 2, dtype=dtype), *[on_gpu(2, 2, dtype=of_operands)] * 2, **options)


REFUSED = {
    "sum of both": (lambda: on_gpu(2, 2) + on_cpu(2, 2), MIX),
    "product of both": (lambda: on_gpu(2, 2) @ on_cpu(2, 2), MIX),
    "written to the CPU": (lambda: torch.zeros(()).add_(on_gpu()), MIX),
    "out on the CPU": (lambda: torch.mm(on_gpu(2, 2), on_gpu(2, 2), out=on_cpu(2, 2)), MIX),
    "CPU indexed by the GPU": (lambda: on_cpu(4)[on_gpu(2, dtype=INT64)], MIX),
    "values on the CPU": (lambda: on_gpu(4).index_put_((on_gpu(2, dtype=INT64),), on_cpu(2)), MIX),
    "rows on the CPU": (lambda: on_gpu(4, 2).index_select(0, on_cpu(2, dtype=INT64)), MIX),
    "one row, on the CPU": (lambda: on_gpu(4, 2).index_select(0, on_cpu(dtype=INT64)), MIX),
    "embedding by the CPU": (lambda: nn.functional.embedding(on_cpu(2, dtype=INT64), on_gpu(4, 2)), MIX),
    "joined": (lambda: torch.cat([on_gpu(2), on_cpu(2)]), MIX),
    "mask on the CPU": (lambda: on_gpu(2).masked_fill(on_cpu(2).bool(), 0), MIX),
    "product of integers": (lambda: on_gpu(2, 2, dtype=INT64) @ on_gpu(2, 2, dtype=INT64), "not implemented"),
    "products of integers": (lambda: torch.bmm(*[on_gpu(1, 2, 2, dtype=torch.int32)] * 2), "not implemented"),
    "product of two dtypes": (lambda: on_gpu(2, 2) @ on_gpu(2, 2, dtype=BF16), "same dtype"),
    "float64 of bfloat16": (lambda: torch.mm(*[on_gpu(2, 2, dtype=BF16)] * 2, out_dtype=torch.float64), "out_dtype"),
    "bfloat16 of float32": (lambda: torch.bmm(*[on_gpu(1, 2, 2)] * 2, out_dtype=BF16), "out_dtype"),
    "added in float64": (lambda: added(torch.float64, BF16, out_dtype=torch.float32), "self dtype must match"),
    "added in bfloat16": (lambda: added(BF16, torch.float32), "self dtype must match"),
    "eigenvectors in bfloat16": (lambda: torch.linalg.eigh(on_gpu(2, 2, dtype=BF16)), "Low precision|not implemented"),
    "numpy": (lambda: on_gpu(2).numpy(), "numpy"),
    "pinned": (lambda: on_gpu(2).pin_memory(), "cannot pin"),
    "data of a CPU tensor": (lambda: setattr(on_gpu(2), "data", on_cpu(2)), "CPU"),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED)
def test_what_cuda_refuses(refused):
    call, told = REFUSED[refused]
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match=told):
        call()


ACCEPTED = {
    "a number": lambda to: to(on_cpu(2, 2)) * 2,
    "a number in a tensor": lambda to: to(on_cpu(2, 2)) * torch.tensor(2.0),
    "a number to fill with": lambda to: to(on_cpu(2)).masked_fill(to(on_cpu(2)).bool(), torch.tensor(3.0)),
    "a number to choose": lambda to: torch.where(to(on_cpu(2)) > 0, to(on_cpu(2)), torch.tensor(3.0)),
    "a number to put": lambda to: to(on_cpu(4)).index_put_((to(torch.tensor([1, 2])),), torch.tensor(3.0)),
    "indices on the CPU": lambda to: to(on_cpu(4))[torch.tensor([1, 2])],
    "a copy from the CPU": lambda to: to(on_cpu(2)).copy_(on_cpu(2) + 1),
    "a copy to the CPU": lambda to: on_cpu(2).copy_(to(on_cpu(2) + 1)),
    "a row written": lambda to: to(on_cpu(3, 2)).index_add_(0, to(torch.tensor([1])), to(on_cpu(1, 2) + 5)),
    "a view written": lambda to: _doubled_column(to(on_cpu(3, 2))),
    "other data": lambda to: _swapped(to(on_cpu(2, 2)), to(on_cpu(3))),
    "made there": lambda to: _made_on(to(on_cpu(1)).device),
    "attention": lambda to: nn.functional.scaled_dot_product_attention(*[to(on_cpu(1, 2, 3, 4))] * 3, is_causal=True),
    "eigenvalues": lambda to: torch.linalg.eigh(to(torch.eye(2)))[0],
    "copied deeply": lambda to: copy.deepcopy(to(on_cpu(2))),
}  # fmt: skip


def _made_on(device):
    return torch.arange(3, device=device) + torch.tensor([1, 2, 3], device=device)


def _doubled_column(x):
    x[:, 1].mul_(2)
    return x


def _swapped(x, data):
    """`.data =`, as the product does with parameters."""
    held = x.data
    x.data = data
    changed = x + 1
    x.data = held
    return torch.cat([changed, x.flatten()])


@pytest.mark.parametrize("accepted", ACCEPTED)
def test_what_cuda_accepts(accepted):
    expected, actual = ACCEPTED[accepted](lambda x: x), ACCEPTED[accepted](lambda x: x.cuda())
    assert actual.device == torch.device("cpu" if accepted == "a copy to the CPU" else "cuda:0")
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("product", [torch.mm, torch.bmm])
def test_products_of_bfloat16_are_summed_in_float32(product):
    a = torch.ones(*[1] * (product is torch.bmm), 1, 257, device="cuda", dtype=BF16)
    assert product(a, a.mT, out_dtype=torch.float32).item() == 257
    assert product(a, a.mT).item() == 256  # the nearest that it can hold
    assert product(a.float(), a.mT.float(), out_dtype=torch.float32).item() == 257
    total = torch.ones(1, 1, device="cuda", dtype=BF16)
    assert total.addmm_(a.view(1, -1), a.view(-1, 1)[:, :1]).item() == 258 and total.item() == 258


ONLY_BY_RULES = {"CPU indexed by the GPU", "one row, on the CPU"}
MIXES = [name for name, (_, told) in REFUSED.items() if told == MIX and name not in ONLY_BY_RULES]


@pytest.mark.parametrize("refused", MIXES)
def test_fake_tensors_know_most_of_it_too(refused):
    """The second opinion by itself, which may know what no rule does."""

    def ask(func, args, kwargs):
        operation = Operation(func, args, kwargs)
        if operation.concerns_gpu:
            rules.ask_fake_tensors(operation)
        return operation.run()

    with pretended_cuda(ask), pytest.raises(RuntimeError, match="same device|wrong device|Mismatching"):
        REFUSED[refused][0]()


def test_other_threads_have_the_device_too():
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(lambda: torch.ones(2, device="cuda") + on_gpu(2)).result().tolist() == [1, 2]


def test_a_model_on_the_device_trains_under_autocast_with_its_weights_still_tied():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    parameters = list(model.parameters())
    model.cuda()
    assert model[0].weight is model[1].weight is parameters[0] and parameters[0].is_cuda
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(torch.tensor([1, 2], device="cuda"))
    assert logits.dtype == BF16
    logits.float().sum().backward()
    assert parameters[0].grad.is_cuda and parameters[0].grad.dtype == torch.float32
    assert parameters[0].grad.any()


def test_where_the_host_waits(cuda):
    here = __file__.rpartition("/")[2]
    pinned = on_cpu(3).pin_memory()
    x = pinned.to("cuda", non_blocking=True)
    y = x * 2 + torch.tensor(1.0)
    y.to("cpu", non_blocking=True)
    pinned.copy_(y, non_blocking=True)
    assert not cuda.waits
    for wait in (lambda: pinned.to("cuda"), lambda: on_cpu(3).to("cuda", non_blocking=True), lambda: y.cpu(),
                 lambda: y.sum().item(), lambda: bool(y.any()), lambda: y[y > 0], lambda: y.nonzero(),
                 lambda: y[torch.tensor([1])], lambda: torch.tensor(1, device="cuda"), lambda: y.tolist()):  # fmt: skip
        cuda.waits.clear()
        wait()
        assert cuda.waits.total() == 1 and here in next(iter(cuda.waits))[1], wait


def test_streams_and_events_are_there():
    side, event = torch.cuda.Stream(), torch.cuda.Event()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.device(0), torch.cuda.stream(side):
        x = on_gpu(2) + 1
        event.record(side)
    torch.cuda.current_stream().wait_event(event)
    x.record_stream(torch.cuda.current_stream())
    event.synchronize()
    assert event.query() and x.tolist() == [1, 2]


def test_too_large_a_result():
    with pretended_cuda(CheckedDevice(largest=64)):
        x = torch.ones(16, device="cuda")
        assert x.view(4, 4).T.mul_(2).sum() == 32  # nothing that has to be allocated
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 68 bytes"):
            torch.ones(17, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            x.double()


def test_another_handler_may_do_without_numbers():
    """The seam for tools that only want to know what is run: values on "meta"."""
    seen = []

    def count(func, args, kwargs):
        operation = Operation(func, args, kwargs)
        seen.append(operation.name)
        return operation.run("meta")

    with pretended_cuda(count):
        x = torch.ones(3, 4, device="cuda", requires_grad=True)
        (x @ x.T).sum().backward()
    assert isinstance(x.grad, CudaTensor) and x.grad.shape == (3, 4) and x.grad.values.device.type == "meta"
    assert seen.count("mm") == 3
