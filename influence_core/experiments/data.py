"""The training examples and the queries that a script's flags name."""

from collections.abc import Sequence
from typing import Any

from influence_core.experiments.arguments import check_size
from influence_core.experiments.checkpoints import require_same_data
from influence_core.tasks.example import ExampleTask


def load_datasets(task: ExampleTask, arguments) -> tuple[Sequence[Any], Sequence[Any]]:
    """(training examples, queries), as many of each as the flags say; UserError if the data is no longer the same."""
    num_queries = check_size(arguments, "num_queries", len(task.load_dataset("validation")), "validation set")
    train_dataset = load_train_dataset(task, arguments)
    return train_dataset, task.load_dataset("validation", range(num_queries))


def load_train_dataset(task: ExampleTask, arguments) -> Sequence[Any]:
    """The first of `load_datasets`."""
    num_train = check_size(arguments, "num_train", len(task.load_dataset("train")), "training set")
    train_dataset = task.load_dataset("train", range(num_train))
    require_same_data(task, arguments, train_dataset)
    return train_dataset
