"""What analyze.py left, for a script that begins with it: the task, its data, and whose results belong to them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from influence_core.experiments.checkpoints import require_checkpoint
from influence_core.experiments.data import load_datasets
from influence_core.experiments.trajectory import saved_checkpoints
from influence_core.fingerprints import dataset_fingerprint, model_fingerprint
from influence_core.launch import Launch
from influence_core.tasks.example import ExampleTask


class StoredResults:
    """The task and its data that a script's flags name, as the checkpoint's record completes them.

    Raises:
        UserError: there is no checkpoint, or the data is no longer what it was trained on.
    """

    def __init__(self, task_class: type[ExampleTask], arguments):
        require_checkpoint(task_class, arguments)
        self.arguments = arguments
        launch = Launch.here()
        self.rank, self.world_size = launch.rank, launch.world_size
        self.task = task_class(**arguments.task)
        self.task.checkpoint_dir = arguments.checkpoint_dir
        self.train_dataset, self.query_dataset = load_datasets(self.task, arguments)
        self.output_dir = Path(arguments.output_dir)

    @cached_property
    def checkpoint_fingerprint(self) -> str:
        """Of the trained model, as scores name it."""
        return model_fingerprint(self.task.load_model(self.arguments.checkpoint_dir))

    @cached_property
    def step_fingerprints(self) -> list[str]:
        """Of the checkpoints that the training left on its way: their scores are of the same training."""
        directories = saved_checkpoints(self.arguments.checkpoint_dir)
        return [model_fingerprint(self.task.load_model(directory)) for directory in directories]

    @property
    def is_main(self) -> bool:
        """Only this process reports."""
        return self.rank == 0

    @property
    def datasets(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """(queries, training examples), the axes of scores."""
        return self.query_dataset, self.train_dataset

    @cached_property
    def dataset_fingerprints(self) -> tuple[str, str]:
        """Of the queries and the training examples; hashed once, whatever the number of scores."""
        queries, train = map(dataset_fingerprint, self.datasets)
        return queries, train
