"""Train again on a part of the training set, as the checkpoint was trained, and measure the queries."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from torch import Tensor

from influence_core.errors import UserError
from influence_core.experiments.accelerators import OneDevice, accelerator_of, load_start
from influence_core.experiments.arguments import check_size
from influence_core.experiments.bank import Retraining, RetrainingBank
from influence_core.experiments.checkpoints import not_left_empty, read_training_record, require_checkpoint
from influence_core.experiments.fitting import Recipe, evaluate, fit
from influence_core.experiments.flags import RECIPE_FLAGS
from influence_core.experiments.stored_results import StoredResults
from influence_core.files import require_writable
from influence_core.fingerprints import dataset_fingerprint, model_fingerprint
from influence_core.launch import Launch
from influence_core.sharding import local
from influence_core.storage import differences
from influence_core.tasks.example import ExampleTask


class Experiment(StoredResults):
    """Stored results, and the bank of retrainings that a script's flags name.

    Under torchrun every process makes its own retrainings; they meet in the bank alone, without a process group. With
    --use_fsdp all make each of them together: the first takes it from the bank and tells the others.
    """

    def __init__(self, task_class: type[ExampleTask], arguments):
        require_checkpoint(task_class, arguments)
        if getattr(arguments, "num_train_epochs", None) == 0 and not getattr(arguments, "masks", None):
            raise UserError("--num_train_epochs 0: a retraining that does not train tells nothing")
        super().__init__(task_class, arguments)
        self.figure_dir = Path(arguments.figure_dir)
        self._note_differences()

    def _note_differences(self) -> None:
        """Retraining otherwise than the checkpoint was trained is allowed, but the scores are the checkpoint's."""
        stored = read_training_record(self.arguments.checkpoint_dir)
        record = {flag: stored[flag] for flag in RECIPE_FLAGS if stored.get(flag) is not None}
        num_examples = len(self.task.load_dataset("train"))
        record["num_train"] = min(stored.get("num_train") or num_examples, num_examples)
        now = {flag: value for flag, value in vars(self.arguments).items() if flag in record}
        differing = differences(record, now | {"num_train": len(self.train_dataset)})
        if stored and differing and self.is_main:
            print(f"Note: retraining is not as the checkpoint was trained: {differing}", flush=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The flags, for a stored result."""
        return {key: value for key, value in vars(self.arguments).items() if key not in ("given", "task")}

    def require_writable(self) -> None:
        """Prove that results and figures can be written, before any work; UserError otherwise."""
        for directory in (self.output_dir, self.figure_dir):
            with not_left_empty(directory):
                require_writable(directory)

    def draw(self, result_name: str, draw: Callable[[Path, Path], Path], figure_name: str) -> None:
        """Draw the figure of a stored result, and say where both are."""
        path = self.output_dir / result_name
        figure = draw(path, self.figure_dir / figure_name)
        print(f"Stored in {path}, drawn in {figure}")

    def retrain(self, retrainings: Sequence[Retraining]) -> list[dict[str, Tensor]]:
        """What was measured after each of them, {name: [queries]}; those that the bank lacks are made."""
        retrainer = Retrainer(self.task, self.arguments, self.train_dataset, self.query_dataset)
        directory = Path(self.arguments.bank_dir or self.output_dir / "retrainings")
        bank = RetrainingBank(directory, retrainer.settings)
        if self.arguments.use_fsdp:
            if self.is_main:
                bank.complete(retrainings, retrainer.lead)
            retrainer.follow()
        else:
            bank.complete(retrainings, retrainer, self.rank, self.world_size)
        return [bank.load(each) for each in retrainings]


class Retrainer:
    """Calling it with a Retraining trains and returns the queries' values, {name: [queries] float64}.

    Every retraining begins at the weights that train.py began at: those of --model_name_or_path or, from scratch, those
    that the checkpoint's seed gives.
    """

    def __init__(self, task: ExampleTask, arguments, train_dataset: Sequence[Any], query_dataset: Sequence[Any]):
        self.task, self.train_dataset, self.query_dataset = task, train_dataset, query_dataset
        record = read_training_record(arguments.checkpoint_dir)
        self.recipe = Recipe.from_arguments(arguments)
        if "train_batch_size" not in arguments.given:  # as large a step as that of all of train.py's processes
            num_processes = record.get("num_processes", 1)
            self.recipe = replace(self.recipe, train_batch_size=self.recipe.train_batch_size * num_processes)
        self.eval_batch_size = arguments.eval_batch_size
        check_size(arguments, "train_batch_size", len(train_dataset), "training set")
        if arguments.use_fsdp:
            Launch.require_torchrun("--use_fsdp")
        several = arguments.use_fsdp and Launch.here().world_size > 1
        self.accelerator = accelerator_of(arguments) if several else _one_device(self.recipe)
        batch_size, num_processes = self.recipe.train_batch_size, self.accelerator.num_processes
        if batch_size % num_processes:
            raise UserError(
                f"a step of {batch_size} examples can't be shared out to {num_processes} processes of --use_fsdp: give "
                "a --train_batch_size that can, or another number of processes"
            )
        self.recipe = replace(self.recipe, train_batch_size=batch_size // num_processes)
        set_seed(record.get("seed", arguments.seed))
        self.model = self.accelerator.prepare_model(load_start(task, self.accelerator))
        self.initial = {name: local(value).clone() for name, value in self.model.state_dict().items()}

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what a retraining gives, beside what is kept and the seed."""
        return {
            "task": type(self.task).__qualname__,
            "initial_model": model_fingerprint(self.model),
            "train_dataset": dataset_fingerprint(self.train_dataset),
            "query_dataset": dataset_fingerprint(self.query_dataset),
            "frozen_parameters": self.task.frozen_parameters,
            **asdict(self.recipe),
            **({"num_processes": self.accelerator.num_processes} if self.accelerator.num_processes > 1 else {}),
        }

    def lead(self, retraining: Retraining) -> dict[str, Tensor]:
        """As a call, by all processes: the others wait in `follow`."""
        if dist.is_initialized():
            dist.broadcast_object_list([retraining])
        return self(retraining)

    def follow(self) -> None:
        """Take part in what the first process leads, until it comes here too."""
        while dist.is_initialized():
            received = [None]
            dist.broadcast_object_list(received)
            if received == [None]:
                break
            self(received[0])
        self.accelerator.end_training()

    def __call__(self, retraining: Retraining) -> dict[str, Tensor]:
        subset = [self.train_dataset[index] for index in retraining.indices]
        if not subset:
            raise UserError("a retraining would have no training example left: remove fewer")
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                local(value).copy_(self.initial[name])
        set_seed(retraining.seed + self.accelerator.process_index)  # of dropout, each its own
        model = fit(self.task, self.model, subset, self.recipe, retraining.seed, self.accelerator)
        values = evaluate(self.task, model, self.query_dataset, self.eval_batch_size, self.accelerator, generate=True)
        self.accelerator.free_memory()
        if not all(bool(value.isfinite().all()) for value in values.values()):
            raise UserError("the queries' measurements after a retraining are not finite: lower --learning_rate")
        return values


def _one_device(recipe: Recipe) -> OneDevice:
    """This process's own."""
    device = torch.device("cuda", Launch.here().local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return OneDevice(device, recipe.use_half_precision)
