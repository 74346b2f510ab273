"""The project's own analysis, run on a modelled card."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from influence_core import analysis, check, profiler, progress
from influence_core.captured import Captured
from influence_core.factors import eigendecomposition
from influence_core.factors.covariance import CovarianceSums
from influence_core.factors.lambdas import LambdaSums
from influence_core.losses import HeadLoss
from influence_core.passes import GradientPass
from influence_core.profiler import Profiler
from influence_core.runtime import Runtime
from influence_core.scores import pairwise
from influence_core.study import Study
from tests.benchmarks.roofline import disk
from tests.benchmarks.roofline.attention import scaled_dot_product_attention
from tests.benchmarks.roofline.cards import Card
from tests.benchmarks.roofline.clock import Clock
from tests.benchmarks.roofline.device import ModelledDevice
from tests.benchmarks.roofline.threads import Threads
from tests.pretended.device import pretended_cuda
from wikitext_gpt2.task import WikiTextTask

PASSES = "forward and backward passes"
# What is done to every batch and gives nothing back; where one of them is called otherwise now, the model is as right,
# and takes longer to say so.
REPEATED = ((CovarianceSums, "update"), (LambdaSums, "update"), (pairwise._PairwiseJob, "_add_scores"))


@dataclass
class Size:
    """Of an analysis; by default that of the README's full preset."""

    num_train: int = 4656
    num_queries: int = 481
    block_size: int = 512
    factor_batch_size: int = 64
    train_batch_size: int = 64
    query_batch_size: int = 32
    eval_batch_size: int = 16  # of train.py
    track: str = "blocks"
    config_overrides: str = ""  # beyond GPT-2 small


class _NoTokenizer:
    pad_token_id = None

    def __len__(self):
        return 0


class RandomTokens(WikiTextTask):
    """Blocks of random tokens: what they are changes no operation."""

    tokenizer = _NoTokenizer()

    def __init__(self, size: Size):
        flags = dict.fromkeys(self.flag_names())
        overrides = f"n_layer=12,{size.config_overrides}".strip(",")  # GPT-2 small is what the rest of a config says
        super().__init__(**flags | {"block_size": size.block_size, "config_overrides": overrides})
        self.tracked_kinds, self.size = size.track, size

    def config_values(self):
        return {}

    def make_examples(self, split):
        count = self.size.num_train if split == "train" else self.size.num_queries
        return [{"input_ids": block} for block in torch.randint(0, 1000, (count, self.block_size))]


class _StageNames(Profiler):
    """The stage table, that also tells the clock which stage it is."""

    def __init__(self, runtime: Runtime, clock: Clock):
        super().__init__(runtime)
        self.clock = clock

    @contextmanager
    def __call__(self, action: str):
        with self.clock.during(stage=action, part=""), super().__call__(action):
            yield


def make_task(size: Size) -> tuple[RandomTokens, torch.nn.Module]:
    """The task and its model, on the CPU, which was asked what its layers read while it has numbers."""
    task = RandomTokens(size)
    model = task.load_model(None).eval()
    task.tracked_layer_names(model)
    return task, model


def model_analysis(card: Card, precision: str, size: Size) -> tuple[Clock, Study]:
    """Run `analyze` on the card, in "bf16", "float32" or "tf32".

    Returns:
        The clock with its account, and the study, which knows its plan.
    """
    task, model = make_task(size)
    clock = Clock()
    device = ModelledDevice(card, clock)
    with tempfile.TemporaryDirectory() as directory, modelled(device, card, model):
        runtime = Runtime.start(use_half_precision=precision == "bf16", use_tf32=precision == "tf32")
        model = model.to(runtime.device)
        datasets = task.load_dataset("train"), task.load_dataset("validation")
        beginning(clock)
        of_card = Study(task, model, datasets[0], Path(directory), runtime, profiler=_StageNames(runtime, clock))
        analysis.analyze(
            of_card,
            ["ekfac"],
            datasets[1],
            damping="0.01x",
            query_batch_size=size.query_batch_size,
            train_batch_size=size.train_batch_size,
            factor_batch_size=size.factor_batch_size,
        )
        clock.wait()
    return clock, of_card


def beginning(clock: Clock) -> None:
    """Forget what it took to get here."""
    clock.account.clear()
    clock.end = clock.host.time = clock.host.stream.time = 0.0


@contextmanager
def modelled(device: ModelledDevice, card: Card, model: torch.nn.Module) -> Iterator[None]:
    """Inside, the project runs on the card, and what it takes goes to the clock."""
    clock = device.clock
    clocks = SimpleNamespace(perf_counter=clock.now, monotonic=clock.now)
    in_use = sum(parameter.nbytes for parameter in model.parameters())
    of_card = {
        "mem_get_info": lambda *_: (int(card.memory - in_use), int(card.memory)),
        "get_device_capability": lambda *_: card.capability,
        **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_: in_use),
    }
    with ExitStack() as stack:
        stack.callback(setattr, torch.backends.cuda.matmul, "allow_tf32", False)  # as it was
        stack.enter_context(pretended_cuda(device))
        stack.enter_context(patch.multiple(torch.cuda, **of_card))
        stack.enter_context(
            patch.object(torch.nn.functional, "scaled_dot_product_attention", scaled_dot_product_attention)
        )
        stack.enter_context(Threads(clock).installed())
        for module in (check, profiler, progress):
            stack.enter_context(patch.object(module, "time", clocks))
        stack.enter_context(patch.object(GradientPass, "__call__", pass_once_by_shapes(GradientPass.__call__, clock)))
        if share := getattr(eigendecomposition, "Share", None):  # deals out by what it sees take how long
            stack.enter_context(patch.object(eigendecomposition, "Share", partial(share, clock=clock.now)))
        for owner, name in REPEATED:
            if hasattr(owner, name):
                stack.enter_context(patch.object(owner, name, once_by_shapes(getattr(owner, name), clock)))
        of_queries = _queries_apart(pairwise._PairwiseJob._preconditioned_queries, clock)
        stack.enter_context(patch.object(pairwise._PairwiseJob, "_preconditioned_queries", of_queries))
        stack.enter_context(disk.ModelledDisk(clock).installed())
        yield


def pass_once_by_shapes(really, clock: Clock):
    """A forward and backward pass, counted as a part of its own; see `once_by_shapes`."""
    once = once_by_shapes(really, clock, gives=True)

    def run(self, batch):
        with clock.during(part=f"{clock.host.part}{': ' * bool(clock.host.part)}{PASSES}"):
            return once(self, batch)

    return run


def once_by_shapes(really, clock: Clock, gives: bool = False):
    """A method that takes what it took for the same object and arguments of the same shapes, without being called.

    Args:
        gives: whether it gives something back: tensors in tuples and dicts, that were those of the call that was made.
    """

    def run(self, *arguments):
        known = self.__dict__.setdefault(f"modelled_{really.__name__}", {})
        shapes = tuple(map(_shapes, arguments))
        if shapes in known:
            events, result = known[shapes]
            clock.replay(events)
        else:
            with clock.record() as events:
                result = really(self, *arguments)
            known[shapes] = events, result if gives else None
        return _copied(result)

    return run


def _copied(value):
    """With dicts of its own, which the caller may empty."""
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return dict(value) if isinstance(value, dict) else value


def _shapes(value):
    """What the operations on a value may depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, Captured | HeadLoss):
        return tuple(map(_shapes, vars(value).values()))
    if isinstance(value, dict):
        return tuple((key, _shapes(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return len(value) if value and isinstance(value[0], int) else tuple(map(_shapes, value))
    return getattr(value, "name", id(value) if isinstance(value, torch.nn.Module) else value)  # a layer's name


def _queries_apart(really, clock: Clock):
    """What the queries of a pass take, told from what its training set takes."""

    def of_queries(self, *arguments):
        label = arguments[-1]  # " (pass 1 of 2)"
        with clock.during(part=f"queries{label}"):
            result = really(self, *arguments)
        clock.host.part = f"training set{label}"  # until the stage ends
        return result

    return of_queries
