"""Eigendecompositions: none twice, and who does which where a device has a host to help it."""

import pytest
import torch

from influence_core.factors import fit
from influence_core.factors.eigendecomposition import Share, decompose_all
from influence_core.runtime import Runtime
from tests.studies import make_study, score
from tests.test_exactness import load
from tests.tiny import TinyModel, TinyTask


class Parallel(TinyModel):
    """Two layers read the same input, as query and key do."""

    def __init__(self):
        super().__init__()
        self.second = torch.nn.Linear(3, 5)

    def hidden(self, tokens, mask):
        x = self.embedding(tokens) * mask.unsqueeze(-1)
        return torch.tanh(self.third(torch.tanh(self.first(x)) + torch.sin(self.second(x))))


class ParallelTask(TinyTask):
    def load_model(self, checkpoint_dir=None, shared=False):
        torch.manual_seed(0)
        return Parallel().eval()


def test_layers_that_read_the_same_input_share_its_decomposition(tmp_path, monkeypatch):
    """Of 6 covariances 5 are decomposed; each layer has its eigenvectors, and they recompose its covariance."""
    decomposed = []

    def counting(covariance, device):
        decomposed.append(covariance)
        return fit_one(covariance, device)

    fit_one = fit.eigendecomposition
    monkeypatch.setattr(fit, "eigendecomposition", counting)
    score(make_study(tmp_path, ParallelTask()), ["ekfac"])
    assert len(decomposed) == 5
    covariances = load(tmp_path / "factors_ekfac", "activation_covariance")
    values, vectors = (
        load(tmp_path / "factors_ekfac", f"activation_{part}") for part in ("eigenvalues", "eigenvectors")
    )
    assert torch.equal(covariances["first"], covariances["second"])
    for name, covariance in covariances.items():
        torch.testing.assert_close(vectors[name] @ values[name].diag() @ vectors[name].T, covariance)


def test_on_a_cpu_each_comes_with_its_own_result():
    sizes = [2100, 40, 30, 20]
    results = decompose_all(list("abcd"), sizes, lambda job, device: (job, device.type), Runtime())
    assert list(results) == [(job, (job, "cpu")) for job in "abcd"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("host_speed, of_host", [(1e-6, 1), (0.1, 9), (10.0, 22)])
def test_the_host_takes_what_makes_an_end_sooner(host_speed, of_host):
    """Twelve matrices of 100 and twelve of 50; the device does its jobs at 1e6 d^3 a second, one after the other.

    A host that is a million times slower is not waited for but for its first, whose time nobody could know; one of a
    tenth the speed does small ones while the device does large ones.
    """
    sizes, clock = [100] * 12 + [50] * 12, Clock()
    share = Share(sizes, clock)
    free_at, done, busy = {"device": 0.0, "host": 0.0}, {"device": [], "host": []}, {}
    while free_at:
        who = min(free_at, key=free_at.get)
        clock.now = free_at[who]
        if who in busy:
            share.done(who, *busy.pop(who))
        job = share.take(who)
        if job is None:
            del free_at[who]
            continue
        seconds = sizes[job] ** 3 / 1e6 / (host_speed if who == "host" else 1)
        busy[who] = job, seconds
        done[who].append(job)
        free_at[who] += seconds
    assert sorted(done["device"] + done["host"]) == list(range(24))
    assert done["device"] == sorted(done["device"]) and done["host"] == sorted(done["host"], reverse=True)
    assert len(done["host"]) == of_host
