"""The modelled card of tests/benchmarks/roofline, where its figures can be counted by hand."""

import re
from collections import deque
from concurrent import futures

import pytest
import torch

from tests.benchmarks.roofline import cards
from tests.benchmarks.roofline.cards import CARDS
from tests.benchmarks.roofline.clock import Clock
from tests.benchmarks.roofline.costs import Cost, cost_of, product_seconds
from tests.benchmarks.roofline.threads import Threads
from tests.pretended.library import compiler
from tests.scripts import run_process

H100 = CARDS["H100"]
TILED = 128 * H100.multiprocessors  # rows of a result whose tiles of 128 x 256 are one for each multiprocessor
PLACE = ("", "", "")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def of_product(rows, summed, columns, dtype=torch.bfloat16):
    operands = empty(rows, summed, dtype=dtype), empty(summed, columns, dtype=dtype)
    return product_seconds(*operands, empty(rows, columns, dtype=torch.float32), H100, tf32=False)


def of_sum(size):
    x, y = empty(size, dtype=torch.float32), empty(size, dtype=torch.float32)
    return cost_of(
        "add", torch.ops.aten.add.Tensor, (x, y), {}, [x, y], [empty(size, dtype=torch.float32)], H100, False
    )


def test_a_product_that_fills_the_card_takes_its_flops_by_the_rate():
    assert of_product(TILED, 512, 256) == pytest.approx(2 * TILED * 512 * 256 / H100.bfloat16)
    assert of_product(TILED, 512, 256, torch.float32) == pytest.approx(2 * TILED * 512 * 256 / H100.float32)


def test_half_of_a_last_round_of_tiles_is_lost():
    """One row more takes another round; smaller tiles lose less of it."""
    assert of_product(TILED + 1, 512, 256) == pytest.approx(1.5 / 0.85 * of_product(TILED, 512, 256))


def test_a_small_result_of_a_long_sum_is_split():
    """Of one tile, which 32 multiprocessors add up a part each, to be written and read; smaller tiles are no slower."""
    summed = 1 << 20
    alone = 2 * TILED * summed * 256 / H100.bfloat16
    assert of_product(128, summed, 256) <= alone / 32 + 2 * 32 * 128 * 256 * 4 / H100.bandwidth
    assert of_product(128, summed, 256) > alone / H100.multiprocessors


def test_rows_that_begin_anywhere_make_matrix_units_slow():
    """Of operands, of the result; not where there are no matrix units."""
    assert of_product(TILED, 511, 256) == pytest.approx(3 * 511 / 512 * of_product(TILED, 512, 256))
    assert of_product(TILED, 512, 257) > 1.49 * of_product(TILED, 512, 320)
    assert of_product(TILED, 511, 256, torch.float32) < of_product(TILED, 512, 256, torch.float32)


def test_a_sum_takes_what_it_reads_and_writes_and_no_kernel_less_than_the_floor():
    cost = of_sum(1 << 24)
    assert (cost.flops, cost.bytes) == (0, 3 * 4 << 24)
    assert cost.seconds == pytest.approx((3 * 4 << 24) / H100.bandwidth)
    assert of_sum(1).seconds == cards.LAUNCH_FLOOR


@pytest.mark.parametrize(("seconds", "expected"), [(1e-3, cards.LAUNCH + 10e-3), (1e-6, 10 * cards.LAUNCH + 1e-6)])
def test_the_slower_of_host_and_device_counts(seconds, expected):
    clock = Clock()
    for _ in range(10):
        clock.launch(Cost(seconds=seconds), PLACE)
    assert clock.now() == pytest.approx(10 * cards.LAUNCH)
    clock.wait()
    assert clock.now() == clock.end == pytest.approx(expected)
    (places,) = clock.account.values()
    assert places[PLACE].wall == pytest.approx(expected)


def test_threads_take_jobs_in_modelled_time():
    """Two workers, one of them ten times as fast, and eleven jobs: the slow one is done with one when all are."""
    clock = Clock()
    done, jobs = [], deque(range(11))

    def work(seconds):
        while jobs:
            job = jobs.popleft()
            clock.spend(seconds, PLACE)
            done.append((job, seconds))

    with Threads(clock).installed(), futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, seconds) for seconds in (1.0, 10.0)]:
            future.result()
    assert clock.now() == pytest.approx(10.0)
    assert [seconds for _, seconds in done].count(10.0) == 1


def test_a_pool_is_as_fast_as_its_workers():
    clock = Clock()
    with Threads(clock).installed(), futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda job: clock.spend(1.0, PLACE) or job, range(8))) == list(range(8))
    assert clock.now() == pytest.approx(2.0)


@pytest.mark.parametrize(("beside", "waited"), [(1.0, 0.0), (5.0, 2.0)])
def test_what_runs_beside_counts_where_it_is_waited_for(beside, waited):
    """And what another thread does is no part of what this one records, to be replayed."""
    clock = Clock()
    with Threads(clock).installed(), futures.ThreadPoolExecutor(1) as pool:
        with clock.during(stage="beside"):
            future = pool.submit(clock.spend, beside, PLACE)
        with clock.record() as events:
            clock.spend(3.0, PLACE)
        future.result()
    assert clock.now() == clock.end == pytest.approx(3.0 + waited)
    assert len(events) == 1
    (of_other,) = clock.account["beside", ""].values()
    assert (of_other.host, of_other.wall) == (beside, 0.0)


SMALL = ["--num_train", "128", "--num_queries", "32", "--block_size", "64"]
SMALL += ["--config_overrides", "n_layer=2,n_embd=192,n_head=6,vocab_size=1024"]


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler ($CXX or g++)")
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own")
def test_the_analysis_itself_is_what_is_modelled():
    """Its products are those of its own plan (but for the padding of eigenvectors), and all time is in a row."""
    outcome = run_process(["-m", "tests.benchmarks.roofline", *SMALL])
    assert outcome.code == 0, outcome.out
    work = re.search(r"covariance ([\d.e+-]+), .*lambda ([\d.e+-]+), pairwise ([\d.e+-]+) TFLOP", outcome.out)
    covariance, of_lambda, pairwise = (float(number) / 1e3 for number in work.groups())
    rows = {
        line[:-50].strip(): [float(line[start : start + 10]) for start in range(len(line) - 50, len(line), 10)]
        for line in outcome.out.partition("\nstage ")[2].splitlines()[1:]
    }
    flops = {stage: row[0] for stage, row in rows.items()}
    passes = flops["Fit Covariance, forward and backward passes"]  # the Lambda pass takes what this one kept
    assert flops["Fit Lambda"] + passes == pytest.approx(of_lambda, rel=0.05)
    assert sum(flops[stage] for stage in flops if "Pairwise" in stage) == pytest.approx(pairwise, rel=0.05)
    of_symmetry = covariance - passes  # half of the products' own, of which blocks save less
    assert 0.97 * of_symmetry < flops["Fit Covariance"] < 2 * of_symmetry
    *_, total = rows["Total"]
    assert total == pytest.approx(sum(row[4] for stage, row in rows.items() if stage != "Total"), rel=0.01)
    *_, device, host, wall = map(sum, zip(*(row for stage, row in rows.items() if stage.startswith("Fit"))))
    assert wall > max(device, host)  # of what no threads share
