"""The core on the pretended device: planted mistakes are caught, collectives fit NCCL, memory that runs out is met."""

import pickle
import threading
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from influence_core import exchange as exchanging
from influence_core import labels
from influence_core.captured import Positions
from influence_core.factors import lambdas, preconditioners
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from tests.pretended.device import CheckedDevice, pretended_cuda
from tests.studies import make_study, score
from tests.test_exactness import relative_error
from tests.test_gpu import cuda_study

pytestmark = pytest.mark.gpu
MIX = "Expected all tensors to be on the same device"
NCCL_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8}
NCCL_DTYPES |= {torch.uint8}


class ForgetfulTorch:
    """torch, with an arange that forgets the device."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def arange(self, *arguments, device=None):
        return torch.arange(*arguments)


def left_behind(make):
    """make, with what it makes left on the CPU."""

    def made(*arguments, **options):
        captured = make(*arguments, **options)
        return replace(captured, activations=captured.activations.cpu())

    return made


def on_the_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def with_cpu_factors(layer, factors, *rest):
    return Preconditioner(layer, [(strategy, on_the_cpu(tensors)) for strategy, tensors in factors], *rest)


def with_cpu_basis(layer, activation_eigenvectors, gradient_eigenvectors, precision):
    return Eigenbasis(layer, activation_eigenvectors.cpu(), gradient_eigenvectors, precision)


def in_float64(self, a, b, out=None):
    return torch.mm(a, b, out_dtype=torch.float64).float() if a.dim() == 2 else torch.bmm(a, b)


Preconditioner, Eigenbasis = preconditioners.Preconditioner, lambdas.Eigenbasis
MISTAKES = {
    "a batch that stays on the CPU": (Runtime, "send", lambda self, tensor: tensor, MIX),
    "positions counted on the CPU": (labels, "torch", ForgetfulTorch(), MIX),
    "active positions on the CPU": (Positions, "compact", left_behind(Positions.compact), MIX),
    "factors on the CPU": (preconditioners, "Preconditioner", with_cpu_factors, MIX),
    "eigenvectors on the CPU": (lambdas, "Eigenbasis", with_cpu_basis, MIX),
    "a product in float64": (Precision, "matmul", in_float64, "out_dtype must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake, tmp_path, monkeypatch):
    owner, name, planted, told = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(Exception, match=told):
        score(cuda_study(tmp_path, half=told != MIX), ["ekfac"])


def test_collectives_get_what_nccl_takes(tmp_path, monkeypatch):
    """As the first of two processes; the other one gives numbers too, though no good ones."""
    seen = set()

    def collective(tensor, *arguments):
        assert tensor.is_cuda and tensor.is_contiguous() and tensor.dtype in NCCL_DTYPES, tensor
        seen.add(tensor.dtype)
        if arguments == (1,):  # the other's to broadcast
            tensor.fill_(0.5)

    monkeypatch.setattr(dist, "all_reduce", collective)
    monkeypatch.setattr(dist, "broadcast", collective)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    score(cuda_study(tmp_path, half=True, rank=0, world_size=2))
    assert seen == {torch.float32, torch.bfloat16, torch.int64}


class TwoProcesses:
    """torch.distributed as `exchange` uses it, for two threads; what NCCL would not take is refused."""

    def __init__(self):
        self.of_thread, self.given, self.barrier = threading.local(), [None, None], threading.Barrier(2, timeout=60)

    def get_rank(self):
        return self.of_thread.rank

    def _given_by_both(self, value):
        self.given[self.get_rank()] = value
        self.barrier.wait()
        both = list(self.given)
        self.barrier.wait()
        return both

    def all_gather_object(self, objects, value):
        objects[:] = self._given_by_both(pickle.dumps(value))
        objects[:] = map(pickle.loads, objects)  # a tensor would be of no use to another process
        assert not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(objects))

    def all_to_all_single(self, received, sent, received_sizes, sent_sizes):
        for tensor, sizes in ((received, received_sizes), (sent, sent_sizes)):
            assert tensor.is_cuda and tensor.is_contiguous() and tensor.dtype in NCCL_DTYPES
            assert sum(sizes) == len(tensor)
        blocks = [block.split(sizes)[self.get_rank()] for block, sizes in self._given_by_both((sent, sent_sizes))]
        for into, block in zip(received.split(received_sizes), blocks, strict=True):
            into.copy_(block)
        self.barrier.wait()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_what_is_captured_reaches_the_owners_of_layers(half, tmp_path, monkeypatch):
    """Of sharded parameters: what NCCL takes, on the device, the very numbers; also where one has no batch."""
    study = cuda_study(tmp_path, half=half)
    with study.gradient_pass(study.task.train_loss) as run:
        captured = [of_batch for _, of_batch in study.captures(run, study.train_dataset, list(range(6)), 3, "loss")]
    processes, results = TwoProcesses(), {}
    monkeypatch.setattr(exchanging, "dist", processes)
    shares = [[layer.name for layer in share] for share in exchanging.share_out(study.layers, 2)]

    def work(rank, has_batch):
        processes.of_thread.rank = rank
        results[rank] = exchanging.exchange(dict(captured[rank]) if has_batch else {}, shares, torch.device("cuda"))

    for has_batches in ((True, True), (True, False)):
        threads = [threading.Thread(target=work, args=each) for each in enumerate(has_batches)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for owner, share in enumerate(shares):
            for source, of_source in enumerate(results.pop(owner)):
                assert of_source.keys() == (set(share) if has_batches[source] else set())
                for name, seen in of_source.items():
                    for field in ("activations", "output_gradients"):
                        ours, theirs = getattr(seen, field), getattr(captured[source][name], field)
                        assert ours.is_cuda and ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs.cpu())


def test_a_batch_that_finds_too_little_memory_is_halved(tmp_path, capsys):
    """By what the allocator refuses: sampling labels for so many positions; the scores are the same."""
    expected = score(make_study(tmp_path / "cpu", precision=Precision()), ["ekfac"])
    with pretended_cuda(CheckedDevice(largest=60_000)):
        actual = score(cuda_study(tmp_path / "cuda"), ["ekfac"], factor_batch_size=40)
    assert relative_error(actual["ekfac"], expected["ekfac"]) < 1e-3
    said = capsys.readouterr().out
    assert said.count("Out of memory with 40 examples in a batch: going on with 20") == 2  # covariances and Lambda


def test_how_often_the_host_waits(tmp_path, cuda):
    """For five batches more of each pass: where positions without a loss or a gradient are left out."""

    def waits(num_train):
        cuda.waits.clear()
        study = cuda_study(tmp_path / str(num_train), num_train=num_train)
        score(study, ["ekfac"], factor_batch_size=4, train_batch_size=4)
        return cuda.waits.copy()

    more = waits(40)
    more.subtract(waits(20))
    at_batches = {why: count / 5 for why, count in more.items() if "decompos" not in why[1] and "fit.py" not in why[1]}
    # Which positions carry loss, and which have a gradient, in each of three passes; the covariances' index of these.
    assert sum(at_batches.values()) == 3 * 2 + 1, more
