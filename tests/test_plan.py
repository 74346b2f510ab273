"""The plan of passes: what it splits, what it promises to cost, and that the passes made are those planned."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from influence_core.analysis import analyze, probe_example
from influence_core.errors import UserError
from influence_core.layers import find_tracked_layers
from influence_core.precision import Precision
from influence_core.probing import Probe
from influence_core.runtime import Runtime
from influence_core.scores.batch_sizes import fit_batch_sizes
from influence_core.scores.cost import Work
from influence_core.scores.pairwise import _PairwiseJob, compute_pairwise_scores
from influence_core.scores.plan import Plan, make_plan
from influence_core.study import Study
from tests.studies import make_study
from tests.tiny import TinyTask

NUM_LAYERS, WIDTH, NUM_TRAIN, NUM_QUERIES, POSITIONS = 6, 512, 1000, 24, 128
PARAMETERS = NUM_LAYERS * WIDTH * WIDTH
FORWARD, BACKWARD = 7e9, 8e9


def layers():
    """Equal layers, as a Transformer's depth has them."""
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)])
    return find_tracked_layers(model, [str(index) for index in range(NUM_LAYERS)])


def work(**changes):
    positions = {str(index): POSITIONS for index in range(NUM_LAYERS)}
    probe = Probe(1 << 20, 0, 1 << 40, FORWARD, BACKWARD, positions, positions)
    sizes = {"num_train": NUM_TRAIN, "num_queries": NUM_QUERIES, "num_strategies": 1}
    sizes |= {"train_batch_size": 2, "query_batch_size": 2, "factor_batch_size": 2}
    needs = {"operand_bytes": 4, "product_bytes": 4, "num_in_eigenbasis": 1, "num_with_lambda": 1}
    needs["num_preconditioned"] = 1
    return Work(**(sizes | needs | {"train": probe, "query": probe} | changes))


def peak(plan):
    """Bytes of the stages that the plan can shape."""
    return max(plan.peak_bytes["query gradients"], plan.peak_bytes["training pass"])


def covers(plan):
    """Whether each layer is in one group, in order, and each query in one tile, in order."""
    names = [layer.name for group in plan.layer_groups for layer in group]
    queries = [query for tile in plan.query_tiles for query in tile]
    return names == [layer.name for layer in layers()] and queries == list(range(NUM_QUERIES))


def test_one_pass_where_memory_suffices():
    """Memory for all queries and layers: one group, one tile, whatever the batch sizes are."""
    plan = make_plan(layers(), work(), 1 << 40)
    assert plan.num_passes == 1 and covers(plan)
    assert plan.resident_bytes == NUM_QUERIES * PARAMETERS * 4


def test_layers_are_split_before_queries():
    """One byte less than one pass takes: two groups of layers of equal size, and still all queries together."""
    whole = make_plan(layers(), work(), 1 << 40)
    budget = peak(whole)
    assert make_plan(layers(), work(), budget).num_passes == 1
    split = make_plan(layers(), work(), budget - 1)
    assert (len(split.layer_groups), len(split.query_tiles)) == (2, 1)
    assert [len(group) for group in split.layer_groups] == [3, 3] and covers(split)
    assert split.resident_bytes == whole.resident_bytes / 2


def test_batches_are_scored_together_where_that_takes_little():
    """64 examples where memory is plenty; fewer near the budget, or where they take over half of the queries' bytes."""
    small = replace(work().train, captured_bytes=1 << 10)
    plan = make_plan(layers(), work(train=small), 1 << 40)
    assert plan.scored_at_once == 64
    assert make_plan(layers(), work(train=small), peak(plan)).scored_at_once == 64
    fewer = make_plan(layers(), work(train=small), peak(plan) - 1)
    assert 2 < fewer.scored_at_once < 64 and peak(fewer) < peak(plan)
    large = replace(small, captured_bytes=plan.resident_bytes // 40)
    assert make_plan(layers(), work(train=large), 1 << 40).scored_at_once == 22  # 20 more than a batch has
    assert make_plan(layers(), work(train=small, train_batch_size=80), 1 << 40).scored_at_once < 80  # each batch alone


@pytest.mark.parametrize("num_strategies", [1, 3])
def test_every_budget_gives_a_whole_plan_within_it(num_strategies):
    """From ample memory down to none: nothing scored twice or left out, within the budget, until it is refused."""
    job = work(num_strategies=num_strategies)
    budget = peak(make_plan(layers(), job, 1 << 40))
    shapes, refused = set(), False
    while not refused:
        try:
            plan = make_plan(layers(), job, budget)
        except UserError as error:
            assert "--memory_budget_gb" in str(error) and "\n" not in str(error)
            refused = True
        else:
            assert covers(plan)
            assert peak(plan) <= budget
            shapes.add((len(plan.layer_groups), len(plan.query_tiles)))
            budget = int(0.98 * budget)
    assert (1, 1) in shapes and (NUM_LAYERS, 1) in shapes  # both ends were met
    assert any(tiles > 1 for _, tiles in shapes)


def test_the_factor_stages_keep_to_the_budget_too():
    """A factor batch that takes more than the budget is refused before the work, like the other batch sizes."""
    budget = peak(make_plan(layers(), work(), 1 << 40))
    with pytest.raises(UserError, match="--factor_batch_size"):
        make_plan(layers(), work(factor_batch_size=100_000), budget)


def lowered_to(budget, **changes):
    """(batch sizes that fit, what was said, the plan for them)"""
    said = []
    job = fit_batch_sizes(layers(), work(**changes), budget, said.append)
    return (job.factor_batch_size, job.query_batch_size, job.train_batch_size), said, make_plan(layers(), job, budget)


def test_batch_sizes_are_lowered_to_what_memory_holds():
    """As asked where they fit; factor batches halved on their own; the others with what is resident; then refused."""
    sizes = {"factor_batch_size": 64, "query_batch_size": 16, "train_batch_size": 32}
    probe = replace(work().train, num_bytes=64 << 20)  # of one example in a batch
    asked = {**sizes, "train": probe, "query": probe}
    assert lowered_to(1 << 40, **asked)[:2] == ((64, 16, 32), [])
    plenty = max(make_plan(layers(), work(**asked), 1 << 40).peak_bytes.values())
    lowered, said, plan = lowered_to(plenty - 1, **asked)
    assert lowered == (32, 16, 32) and plan.num_passes == 1
    assert said == ["Batches that fit into memory better: --factor_batch_size 32 instead of 64"]
    tightest = max(make_plan(layers(), work(train=probe, query=probe), 1 << 40).peak_bytes.values())
    lowered, _, plan = lowered_to(tightest, **asked)
    assert max(lowered) <= 4 and max(plan.peak_bytes.values()) <= tightest
    with pytest.raises(UserError, match="batches of 1 .* and 1 .*--memory_budget_gb"):
        lowered_to(1 << 20, **asked)


def test_a_large_query_batch_does_not_shrink_the_training_batch():
    """Queries may be much longer than training examples, or be measured many at once."""
    long = replace(work().train, num_bytes=1 << 30)
    sizes = {"query_batch_size": 64, "train_batch_size": 32, "query": long}
    budget = max(make_plan(layers(), work(**{**sizes, "query_batch_size": 1}), 1 << 40).peak_bytes.values())
    (_, queries, train), *_ = lowered_to(budget, **sizes)
    assert (queries, train) == (1, 32)


def test_smaller_batches_are_taken_for_fewer_passes_but_not_single_examples():
    """Half a batch instead of a second pass; on a GPU a second pass rather than training examples one by one."""
    probe = replace(work().train, num_bytes=4 << 20)
    asked = {"train": probe, "query": probe, "train_batch_size": 32, "query_batch_size": 32}
    lower = [work(**{**asked, "train_batch_size": size, "query_batch_size": size}) for size in (16, 1)]
    half, single = (max(make_plan(layers(), each, 1 << 40).peak_bytes.values()) for each in lower)
    assert make_plan(layers(), work(**asked), half).num_passes > 1
    sizes, _, plan = lowered_to(half, **asked)
    assert sizes[1:] == (16, 16) and plan.num_passes == 1
    sizes, _, plan = lowered_to(single, **asked)
    assert sizes[1:] == (1, 1) and plan.num_passes == 1
    on_gpu = {**asked, "device_type": "cuda"}
    single = max(make_plan(layers(), replace(lower[1], device_type="cuda"), 1 << 40).peak_bytes.values())
    sizes, _, plan = lowered_to(single, **on_gpu)
    assert min(sizes[1:]) > 1 and plan.num_passes > 1


def test_flops_of_two_groups_are_fewer_than_of_two_tiles():
    """9 PT against 12 PT: a group's pass does not go below the group, and makes the group's gradients alone."""
    dots = 2 * NUM_TRAIN * NUM_QUERIES * PARAMETERS
    gradients = 2 * POSITIONS * PARAMETERS
    positions = 2 * POSITIONS * 2 * WIDTH**2 * NUM_LAYERS  # the query side: Q_G^T g Q_A, its positions rotated
    rotations = NUM_QUERIES * (positions + 2 * PARAMETERS * 2 * WIDTH)  # and Q_G … Q_A^T
    groups = (NUM_TRAIN + NUM_QUERIES) * (2 * FORWARD + 1.5 * BACKWARD + gradients) + dots + rotations
    tiles = NUM_TRAIN * (2 * FORWARD + 2 * BACKWARD + 2 * gradients) + dots + rotations
    tiles += NUM_QUERIES * (FORWARD + BACKWARD + gradients)
    split = make_plan(layers(), work(), peak(make_plan(layers(), work(), 1 << 40)) - 1)
    assert split.num_passes == 2
    assert split.pairwise_flops == pytest.approx(groups)
    assert split.pairwise_flops < tiles


def small_study(directory, task):
    precision = Precision(torch.float64, torch.float64)
    return Study(task, task.load_model().double(), task.load_dataset("train"), directory, Runtime(precision=precision))


def parts(study, sizes, tile):
    """A plan of layer groups of these sizes and query tiles of this one."""
    rest = list(study.layers)
    groups = [[rest.pop(0) for _ in range(size)] for size in sizes]
    tiles = [range(start, min(start + tile, 6)) for start in range(0, 6, tile)]
    return Plan(groups, tiles, 0, {}, 0.0)


def pairwise(study, plan):
    queries = study.task.load_dataset("validation")
    return compute_pairwise_scores(study, {"identity": {}}, queries, plan, 1e-3, 4, 7)["identity"]


@pytest.mark.parametrize("sizes", [[3], [2, 1], [1, 1, 1]])
@pytest.mark.parametrize("tile", [6, 4, 1])
def test_scores_do_not_depend_on_the_plan(tmp_path, sizes, tile):
    """Passes for parts of the layers and queries add up to the scores of one pass."""
    whole = small_study(tmp_path / "whole", TinyTask())
    split = small_study(tmp_path / "split", TinyTask())
    expected = pairwise(whole, parts(whole, [3], 6))
    actual = pairwise(split, parts(split, sizes, tile))
    assert expected.abs().min() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_pass_frees_its_queries_before_the_next_makes_its_own(tmp_path, monkeypatch):
    """The plan fills the memory with the queries of one pass: those of the last one may not lie beside them."""
    make, made, alive = _PairwiseJob._preconditioned_queries, [], []

    def noting(*arguments):
        alive.append(sum(part() is not None for part in made))
        resident = make(*arguments)
        made.extend(weakref.ref(part.untyped_storage()) for parts in resident.values() for part in parts)
        return resident

    monkeypatch.setattr(_PairwiseJob, "_preconditioned_queries", noting)
    study = small_study(tmp_path, TinyTask())
    pairwise(study, parts(study, [1, 2], 3))
    assert alive == [0, 0, 0, 0] and len(made) > 4


def test_counted_flops_of_groups_are_fewer_than_of_tiles(tmp_path):
    """What the plan reckons with is true of the passes made: torch's own count of a run's products."""

    def count(name, sizes, tile):
        study = small_study(tmp_path / name, TinyTask())
        with FlopCounterMode(display=False) as counter:
            pairwise(study, parts(study, sizes, tile))
        return counter.get_total_flops()

    one, groups, tiles = count("one", [3], 6), count("groups", [1, 2], 6), count("tiles", [3], 3)
    assert one < groups < tiles


class CountingTask(TinyTask):
    """Counts the passes over training batches (data's own labels: the pairwise stage) and over queries."""

    def __init__(self):
        super().__init__()
        self.num_training_passes = self.num_measurements = 0

    def train_loss(self, model, batch, sample_labels=None):
        self.num_training_passes += sample_labels is None
        return super().train_loss(model, batch, sample_labels)

    def measurement(self, model, batch):
        self.num_measurements += 1
        return TinyTask.train_loss(self, model, batch)


def test_training_passes_do_not_grow_with_query_micro_batches(tmp_path, unchecked):
    """--query_batch_size shapes the queries' own passes only; the training set is passed over once."""
    counts = {}
    for query_batch_size in (1, 4):
        task = CountingTask()
        study = small_study(tmp_path / str(query_batch_size), task)
        queries = task.load_dataset("validation")
        analyze(study, ["ekfac"], queries, query_batch_size=query_batch_size, train_batch_size=7)
        counts[query_batch_size] = task.num_training_passes
        assert task.num_measurements >= len(queries) / query_batch_size
    assert counts == {1: 6, 4: 6}  # ceil(40 / 7) batches


def test_planned_passes_are_made(tmp_path):
    """A plan of two groups and two tiles passes over the training set four times, no more and no less."""
    task = CountingTask()
    study = small_study(tmp_path, task)
    pairwise(study, parts(study, [2, 1], 3))
    assert task.num_training_passes == 4 * 6


def test_the_probe_counts_the_same_each_time(tmp_path):
    """Processes agree on one plan because they count alike; memory freed and taken again must not be counted once."""
    study = make_study(tmp_path)
    probes = [probe_example(study, study.train_dataset, study.fisher_loss, study.layers) for _ in range(200)]
    assert len({(probe.num_bytes, probe.fixed_bytes) for probe in probes}) == 1


def test_gradients_that_a_task_post_processes_are_counted_whole():
    """Two an example: four copies of all that a batch of 2 has, of one layer at a time."""
    plain, post_processing = (make_plan(layers(), work(post_processed=number), 1 << 40) for number in (0, 2))
    for stage in ("lambda", "query gradients", "training pass"):
        added = post_processing.peak_bytes[stage] - plain.peak_bytes[stage]
        assert added == 2 * 2 * 4 * WIDTH * WIDTH * 4, stage
