"""One study: a model, its training set, and the directory where its factors and scores lie."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from influence_core.batches import make_batch, order_examples
from influence_core.captured import Captured
from influence_core.errors import UserError
from influence_core.exchange import exchange, rounds, share_out
from influence_core.fingerprints import dataset_fingerprint, digest, model_fingerprint
from influence_core.finite import FiniteWatch
from influence_core.labels import LabelSampler
from influence_core.layers import TrackedLayer, find_tracked_layers
from influence_core.memory import is_out_of_memory, release_cached_memory
from influence_core.passes import GradientPass, LossFunction
from influence_core.precision import Precision
from influence_core.profiler import Profiler
from influence_core.progress import ProgressClock
from influence_core.runtime import Runtime
from influence_core.storage import StageStore
from influence_core.task import Batch, InfluenceTask
from influence_core.writer import Writer


@dataclass
class Study:
    """What every stage needs to know.

    Args:
        task: what is asked of the model.
        model: on the runtime's device, with the weights that are studied.
        train_dataset: z_1 … z_N, a sequence of examples as the task's `collate` takes them.
        output_dir: gets a directory for each strategy's factors and scores.
        runtime: device, precision, processes and seed.
        use_empirical_fisher: factors from the data's own labels instead of sampled ones.
        overwrite: compute stages again although finished results are stored,
        made_by: but those that this very run had finished before it was interrupted: its name, if it has one.
        own_queries: the queries are none of the data's: their scores' directory is named by them, so that those of
            several sets lie side by side.
        sum_queries: score the sum of the queries' gradients in place of each, at the price of one query.
        scores_suffix: part of the scores' directory, to keep several side by side (dampings, say).
        progress_interval: seconds between two notes of progress, from which a killed stage goes on.
        profiler: the stage table, where several studies share one.
    """

    task: InfluenceTask
    model: nn.Module
    train_dataset: Sequence[Any]
    output_dir: Path
    runtime: Runtime = field(default_factory=Runtime)
    use_empirical_fisher: bool = False
    overwrite: bool = False
    made_by: str = ""
    own_queries: bool = False
    sum_queries: bool = False
    scores_suffix: str = ""
    progress_interval: float = 60.0
    profiler: Profiler | None = None

    def __post_init__(self):
        self.output_dir = Path(self.output_dir)
        self.profiler = self.profiler or Profiler(self.runtime)
        self.watch = FiniteWatch(self.runtime.device)
        # What a GPU computes need not wait for the disk; processes that read each other's files do.
        self.writer = Writer(beside=self.runtime.device.type == "cuda" and self.runtime.world_size == 1)
        self.live: set[str] = set()  # layers that a gradient of the training loss was seen to reach
        self.copied: set[str] = set()  # layers whose input or output the model changes in place
        self.computed: set[Path] = set()  # manifests of the stages that this process went through
        self.planned_memory: int | None = None  # bytes at the peak, once there is a plan
        self.planned_flops: dict[str, float] = {}  # by stage
        self.num_kept = 0  # examples that the last pass over the training set got from the one before

    @cached_property
    def layers(self) -> list[TrackedLayer]:
        return find_tracked_layers(self.model, self.task.tracked_layer_names(self.model))

    def own(self, layers: Sequence[TrackedLayer]) -> list[TrackedLayer]:
        """Of these layers, those whose factors, query gradients and scores lie with this process: all, unless the
        parameters are sharded."""
        if not self.runtime.sharded:
            return list(layers)
        return share_out(layers, self.runtime.world_size)[self.runtime.rank]

    def partition(self, batch_size: int) -> dict[str, Any]:
        """What noted progress of this process is a part of."""
        runtime = self.runtime
        part = {"rank": runtime.rank, "world_size": runtime.world_size, "order": self.train_order_digest}
        return part | ({"sharded": True, "batch_size": batch_size} if runtime.sharded else {})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What determines any number that this study stores."""
        return {
            "task": f"{type(self.task).__module__}.{type(self.task).__qualname__}",
            "model": model_fingerprint(self.model),
            "train_dataset": dataset_fingerprint(self.train_dataset),
            "num_train": len(self.train_dataset),
            "tracked_layers": [layer.label for layer in self.layers],
            "dtype": self.runtime.precision.name,
        }

    def result_name(self, strategy_name: str) -> str:
        """Directory suffix of a strategy's factors and scores."""
        return strategy_name + {"bfloat16": "_half", "tf32": "_tf32"}.get(self.runtime.precision.name, "")

    def factor_store(self, name: str, stage: str, **settings) -> StageStore:
        """Where a factor stage lies; `settings` are those beyond the study's own."""
        fisher = {"fisher": "empirical"} if self.use_empirical_fisher else {"fisher": "true", "seed": self.runtime.seed}
        settings = {**self.settings, **fisher, **settings}
        return StageStore(self.output_dir / f"factors_{name}", stage, settings, self.made_by, self.writer)

    def score_store(self, name: str, stage: str = "pairwise_scores", **settings) -> StageStore:
        """Where scores lie."""
        suffix = f"_{self.scores_suffix}" if self.scores_suffix else ""
        directory = self.output_dir / f"scores_{name}{suffix}"
        return StageStore(directory, stage, {**self.settings, **settings}, self.made_by, self.writer)

    def fisher_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss whose gradients make the Fisher: labels sampled, or the data's own."""
        sampler = None if self.use_empirical_fisher else LabelSampler(self.runtime.seed)
        return self.task.train_loss(model, batch, sampler)

    def gradient_pass(
        self,
        loss_function: LossFunction,
        layers: list[TrackedLayer] | None = None,
        precision: Precision | None = None,
    ) -> GradientPass:
        """The engine, set up for this study; by default over all tracked layers.

        Args:
            precision: another than the runtime's, for a look at the model that is not compiled.
        """
        return GradientPass(
            self.model,
            self.layers if layers is None else layers,
            loss_function,
            self.task.position_mask,
            precision or self.runtime.precision,
            self.runtime.compile and precision is None,
            all_layers=self.layers,
            rows_per_example=None if self.task.post_processes else self.task.rows_per_example,
            find_active=self.task.has_lengths,
            copied=self.copied,
        )

    def lengths(self, dataset: Sequence[Any]) -> list[int]:
        """Of each example, as the task counts them."""
        return [self.task.length(example) for example in dataset]

    @cached_property
    def train_order(self) -> list[int]:
        """The training examples of this process, in the order in which every pass takes them."""
        return order_examples(self.lengths(self.train_dataset), self.runtime)

    @cached_property
    def train_order_digest(self) -> str:
        """Of `train_order`: noted progress means the first examples of just this order."""
        return digest(str(index).encode() + b" " for index in self.train_order)

    def captures(
        self,
        run: GradientPass,
        dataset: Sequence[Any],
        order: list[int],
        batch_size: int,
        what: str,
        make_room: Callable[[], bool] = lambda: False,
        done: int = 0,
    ) -> Iterator[tuple[list[int], dict[str, Captured]]]:
        """Run the examples in this order, batch by batch: (indices of the batch, what was captured).

        A batch whose forward and backward pass finds too little memory is run again if `make_room` could free some;
        else it is halved, and so are all after it. Each loss and what was captured are checked.

        Where parameters are sharded, all processes are given the same order, and run a batch each at the same time;
        one that has none left runs along. Each is handed the batches of all, but of its own layers only.

        Args:
            make_room: frees what the consumer holds, and says whether there was anything.
            done: how many examples of the order are done already.
        Raises:
            UserError: a single example does not fit (or a batch, where parameters are sharded); a loss, an input or a
                gradient is NaN or infinite.
        """
        if self.runtime.sharded:
            yield from self._captures_of_all(run, dataset, order, batch_size, what, done)
            return
        while done < len(order):
            indices = order[done : done + batch_size]
            result = self._run_if_it_fits(run, dataset, indices)
            if result is None:
                made_room = make_room()
                release_cached_memory()
                if made_room:
                    continue
                if len(indices) == 1:
                    raise UserError(f"out of memory with a single example in a batch (the {what} of {indices[0]})")
                batch_size = len(indices) // 2
                self.runtime.print(f"Out of memory with {len(indices)} examples in a batch: going on with {batch_size}")
                continue
            loss, captured = result
            self.watch.note(loss, captured, indices, what)
            done += len(indices)
            del result, loss  # so that what was captured is gone when its consumer is done with it
            yield indices, captured
        self.watch.look()

    def _captures_of_all(
        self, run: GradientPass, dataset: Sequence[Any], order: list[int], batch_size: int, what: str, done: int
    ) -> Iterator[tuple[list[int], dict[str, Captured]]]:
        """As `captures`, by all processes together."""
        runtime = self.runtime
        shares = [[layer.name for layer in share] for share in share_out(run.layers, runtime.world_size)]
        done_by_all = runtime.smallest(done)
        for batches in rounds(len(order), batch_size, runtime.world_size):
            if batches[-1].stop <= done_by_all:
                continue
            indices = [order[position] for position in batches[runtime.rank]]
            result = self._run_if_it_fits(run, dataset, indices or order[-1:])
            if result is None:  # in the midst of what the others do with it
                raise UserError(
                    f"out of memory with {len(indices)} examples in a batch of the {what}: give smaller batches "
                    "(--factor_batch_size, --query_batch_size, --train_batch_size), or more processes"
                )
            loss, captured = result
            if indices:
                self.watch.note(loss, captured, indices, what)
            else:
                captured.clear()
            del result
            parts = exchange(captured, shares, runtime.device)
            for batch, part in zip(batches, parts):
                if batch and batch.start >= done:
                    yield [order[position] for position in batch], part
            del parts
        self.watch.look()

    def _run_if_it_fits(
        self, run: GradientPass, dataset: Sequence[Any], indices: list[int]
    ) -> tuple[Tensor, dict[str, Captured]] | None:
        try:
            return run(make_batch(self.task, dataset, indices, self.runtime))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            run.forget()
            return None

    @contextmanager
    def stage(self, store: StageStore, twins: Sequence[StageStore] = ()):
        """Run a stage unless its result is stored already: `with study.stage(store) as todo: if todo: …`.

        Args:
            twins: stores that may hold the very same result under another name; a finished one is taken over.
        Every process leaves together; where there are several, the files are there by then.
        """
        if self.runtime.is_main:
            if self.overwrite and not store.is_own():
                store.discard()
            twin = next((twin for twin in twins if self._may_adopt(twin)), None)
            if twin is not None and store.manifest() is None:
                store.adopt(twin)
        self.runtime.barrier()
        todo = store.manifest() is None
        if not todo:
            self.runtime.print(f"Found finished {store.manifest_path}")
            if self.runtime.is_main:
                store.tidy()
        self.runtime.barrier()
        yield todo
        self.computed.add(store.manifest_path)
        self.runtime.barrier()

    def unfinished(self, stores: Mapping[str, StageStore]) -> list[str]:
        """Of stages by name, those whose results are not stored already."""
        todo = []
        for name, store in stores.items():
            with self.stage(store) as is_unfinished:
                if is_unfinished:
                    todo.append(name)
        return todo

    def _may_adopt(self, twin: StageStore) -> bool:
        """Whether the twin is finished, with the same settings, and not of a run that is to be done again."""
        try:
            return twin.manifest() is not None and (not self.overwrite or twin.manifest_path in self.computed)
        except UserError:
            return False

    def progress_clock(self) -> ProgressClock:
        return ProgressClock(self.progress_interval)
