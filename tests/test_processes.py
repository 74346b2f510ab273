"""One, two and three processes (Gloo on the CPU): the same factors and scores, whatever the shares.

A job runs in real processes that join a group; what each returns is compared here with a single process.
"""

import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from influence_core import analysis
from influence_core.analysis import explain
from influence_core.batches import order_examples
from influence_core.files import require_writable
from influence_core.runtime import Runtime
from influence_core.scores import cost
from influence_core.scores import plan as planning
from influence_core.scores.parts import shown_pairs
from tests.studies import STRATEGIES, make_study, recomposed_factors, score
from tests.test_exactness import DAMPING, FLOAT64, SEED, relative_error
from tests.test_resume import Stopped, StoppingTask, contents
from tests.test_score_parts import Told

# (training examples, queries): 40 among 3 processes is uneven; then fewer training examples, or queries, than
# processes, so that some process has none of the one or of the other.
CASES = {"uneven": (40, 6), "fewer training examples": (2, 6), "fewer queries": (10, 1), "one of each": (1, 1)}
# Training losses that the first and the second process take before they are stopped, of 4 covariance batches, 4 of
# Lambda and 3 of scores each.
STOPS = [(0, 2), (3, 1), (5, 7), (8, 10), (9, 9)]


def run_processes(job, world_size, directory, seconds=60):
    """Run job(directory, runtime) in each process of a group; returns what each returned."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["influence_core.analysis"])
    arguments = (world_size, directory, job, seconds)
    try:
        multiprocessing.start_processes(_process, arguments, nprocs=world_size, start_method="forkserver")
    except Exception as error:
        reports = [path.read_text() for path in sorted(directory.glob("error.*"))]
        pytest.fail("\n".join(reports) or str(error), pytrace=False)
    return [torch.load(directory / f"returned.{rank}") for rank in range(world_size)]


def _process(rank, world_size, directory, job, seconds):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=seconds)}
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", **options)
    try:
        runtime = Runtime(precision=FLOAT64, seed=SEED, rank=rank, world_size=world_size)
        torch.save(job(directory, runtime), directory / f"returned.{rank}")
    except Exception:
        (directory / f"error.{rank}").write_text(f"process {rank}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()


def all_cases(directory, runtime):
    """{case: scores of all strategies}; the factors are left in <directory>/<case>."""
    scores = {}
    for case, (num_train, num_queries) in CASES.items():
        study = make_study(directory / case, num_train=num_train, runtime=runtime)
        sizes = {"factor_batch_size": 3, "train_batch_size": 4, "query_batch_size": 2}
        scores[case] = score(study, num_queries=num_queries, **sizes)
    return scores


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """(directory, {case: scores}) of one process."""
    directory = tmp_path_factory.mktemp("single")
    return directory, all_cases(directory, Runtime(precision=FLOAT64, seed=SEED))


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_give_what_one_gives(tmp_path, single, world_size):
    """Recomposed factors as rank 0 stored them, and the scores that every rank returned."""
    returned = run_processes(all_cases, world_size, tmp_path)
    for case in CASES:
        expected = recomposed_factors(single[0] / case)
        for name, factor in recomposed_factors(tmp_path / case).items():
            assert relative_error(factor, expected[name]) < 1e-10, (case, name)
        for rank, scores in enumerate(returned):
            for strategy in STRATEGIES:
                error = relative_error(scores[case][strategy], single[1][case][strategy])
                assert error < 1e-10, (case, rank, strategy)


def looked_into(directory, runtime):
    """(self-influence of all strategies, the parts of some scores), of several numbers of examples and queries."""
    found = []
    for number, (num_train, num_queries) in enumerate(CASES.values()):
        study = make_study(directory / str(number), Told(), num_train=num_train, runtime=runtime)
        scores = score(study, num_queries=num_queries, self_influence=True)
        pairs = {name: shown_pairs(matrix, 3, 2) for name, matrix in scores.items()}
        parts = explain(study, pairs, study.task.load_dataset("validation")[:num_queries], DAMPING)
        for name in STRATEGIES:
            found.append(study.score_store(name, "self_influence").load()["self_influence"]["all_modules"])
            found += [parts[name].by_layer, *parts[name].train_tokens, *parts[name].query_tokens]
    study = make_study(directory / "sum", Told(), num_train=7, runtime=runtime, sum_queries=True)
    score(study, ["ekfac"])
    parts = explain(study, {"ekfac": [(0, 2), (0, 5), (0, 6)]}, study.task.load_dataset("validation"), DAMPING)["ekfac"]
    return [*found, parts.by_layer, *parts.train_tokens]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_what_scores_are_made_of_and_self_influence(tmp_path, world_size):
    (tmp_path / "one").mkdir()
    expected = looked_into(tmp_path / "one", Runtime(precision=FLOAT64, seed=SEED))
    for returned in run_processes(looked_into, world_size, tmp_path):
        assert len(returned) == len(expected)
        largest = max(float(x.abs().max()) for x in expected)
        for actual, one in zip(returned, expected):
            assert (actual - one).abs().max() < 1e-10 * largest


def stopped_and_started_again(directory, runtime):
    """For each of STOPS, and once for a run that nothing stops: [training losses of the two runs together]."""
    losses = []
    for number, stops in enumerate([*STOPS, None]):
        first = StoppingTask(stops and stops[runtime.rank])
        second = StoppingTask()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(analysis, "check_contract", lambda *_: "not at all")  # its losses would be counted
            try:
                score(make_study(directory / str(number), first, runtime=runtime, progress_interval=0.0), ["ekfac"])
            except Stopped:
                runtime.barrier()
                score(make_study(directory / str(number), second, runtime=runtime, progress_interval=0.0), ["ekfac"])
        assert (stops is None) == (second.losses == [])
        losses.append(first.losses + second.losses)
    return losses


def test_processes_that_were_stopped_go_on_each_where_it_was(tmp_path):
    """Two processes, stopped at different steps and started again, against two that were not: the same bytes."""
    returned = run_processes(stopped_and_started_again, 2, tmp_path)
    whole = contents(tmp_path / str(len(STOPS)))
    assert len(whole) == 8
    for losses in returned:
        assert len(losses[-1]) == 4 + 4 + 3
    for number, stops in enumerate(STOPS):
        assert contents(tmp_path / str(number)) == whole, stops
        for losses in returned:
            assert losses[number] == losses[-1], stops


def unequal_memory(directory, runtime):
    """(number of passes, bytes that one pass takes, scores), where the second process has a byte too little for it."""
    plans = []

    def make_plan(*arguments, **options):
        plans.append(planning.make_plan(*arguments, **options))
        return plans[-1]

    enough = int((directory / "enough").read_text()) if runtime.world_size > 1 else 1 << 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "used_memory", lambda self: 0)
        patch.setattr(Runtime, "free_memory", lambda self: enough - self.rank)
        patch.setattr(cost, "CHUNK_BYTES", {"cpu": 0})  # the logits' share would dwarf this model
        patch.setattr(analysis, "make_plan", make_plan)
        patch.setattr(analysis, "fit_batch_sizes", lambda layers, work, *_: work)  # smaller ones would save the pass
        scores = score(make_study(directory / str(runtime.world_size), runtime=runtime))
    needed = max(plans[0].peak_bytes[stage] for stage in ("query gradients", "training pass"))
    return plans[0].num_passes, needed, scores


def test_processes_with_unequal_memory_make_one_plan(tmp_path):
    """Free memory is never the same twice; each process's own plan would leave the others waiting for its sums."""
    passes, enough, expected = unequal_memory(tmp_path, Runtime(precision=FLOAT64, seed=SEED))
    assert passes == 1
    num_train, num_queries = CASES["uneven"]
    enough -= len(STRATEGIES) * num_queries * (num_train // 2) * 8  # of two processes, each holds half of the scores
    (tmp_path / "enough").write_text(str(enough))
    returned = run_processes(unequal_memory, 2, tmp_path, seconds=10)
    assert returned[0][0] == returned[1][0] > 1
    for *_, scores in returned:
        for strategy in STRATEGIES:
            assert relative_error(scores[strategy], expected[strategy]) < 1e-10


def test_the_output_directory_may_be_tried_by_several_processes_at_once(tmp_path):
    """Each process writes and removes its trial file; no other's may get in its way (threads serve as processes)."""
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda _: require_writable(tmp_path), range(400)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_examples", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_example_belongs_to_one_process(num_examples, world_size):
    """Shares cover the examples, once each, differ by one at most, and begin with their longest."""
    lengths = [index * 7 % 5 for index in range(num_examples)]
    shares = [order_examples(lengths, Runtime(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [index for share in shares for index in sorted(share)] == list(range(num_examples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        assert [lengths[index] for index in share] == sorted((lengths[index] for index in share), reverse=True)
