"""The flags that the scripts share, their presets, and what may be said with them.

A flag's value is, in this order: what was given on the command line; for the task's own flags and --num_train, what the
checkpoint was trained with; the preset's default; the default of all examples.
"""

import argparse
from pathlib import Path

from influence_core.errors import UserError
from influence_core.experiments.checkpoints import read_training_record
from influence_core.experiments.flags import (
    LAST,
    RECIPE_FLAGS,
    SCRIPTS,
    TRACKED,
    add_shared_arguments,
    checkpoints,
    trains,
)
from influence_core.experiments.values import check_values
from influence_core.tasks.example import ExampleTask

COMMON_DEFAULTS = {
    "preset": "full",
    "checkpoint_dir": "./checkpoints",
    "output_dir": "./influence_results",
    "seed": 1004,
    "train_batch_size.train": 32,
    "eval_batch_size": 32,
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "num_train_epochs": 3,
    "factor_strategy": ["ekfac"],
    "damping_factor": 1e-8,
    "track": TRACKED[0],
    "checkpoints": LAST,
    "query_batch_size": 32,
    "train_batch_size.analyze": 64,
    "factor_batch_size": 64,
    "progress_interval": 60.0,
    "show_queries": 1,
    "report_queries": 50,
    "num_masks": 100,
    "num_repeats.evaluate_lds": 5,
    "num_repeats.run_counterfactual": 3,
    "subset_fraction": 0.5,
    "show_query": 0,
    "num_counterfactual_queries": 50,
    "removal_sizes": [0, 50, 100, 150, 200],
    "figure_dir": "figure",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def parse(task_class: type[ExampleTask], script: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """The flags of one script ("train", "analyze", …), complete; `args.task` holds the task's own, by name.

    Raises:
        UserError: unknown flags or values; counts that are not positive.
    """
    parser = _Parser(
        prog=f"{script}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    task_flags = task_class.flag_names()
    task_class.add_arguments(parser)
    add_shared_arguments(parser)
    for add in SCRIPTS[script]:
        add(parser)
    _describe_defaults(parser, task_class, script)
    given = vars(parser.parse_args(argv))

    presets = task_class.presets
    preset = given.get("preset", COMMON_DEFAULTS["preset"])
    if preset not in presets:
        raise UserError(f"unknown --preset {preset!r}: choose from {', '.join(presets)}")
    values = _defaults(COMMON_DEFAULTS, script) | _defaults(presets[preset], script)
    values["preset"] = preset
    if script != "train":
        record = read_training_record(given.get("checkpoint_dir", values["checkpoint_dir"]))
        recipe = RECIPE_FLAGS if trains(script) else ()
        kept = {flag: record[flag] for flag in (*task_flags, "num_train", *recipe) if flag in record}
        values = _over(values, kept, task_class)
    values = _over(values, given, task_class)
    arguments = argparse.Namespace(**{action.dest: None for action in parser._actions if action.dest != "help"})
    vars(arguments).update({key: value for key, value in values.items() if hasattr(arguments, key)})
    arguments.given = set(given)
    check_values(arguments)
    if getattr(arguments, "save_at", None):
        arguments.save_at = sorted(set(arguments.save_at))
    if isinstance(getattr(arguments, "checkpoints", None), list):
        arguments.checkpoints = checkpoints(" ".join(arguments.checkpoints))
    arguments.task = {flag: getattr(arguments, flag) for flag in task_flags}
    for flag, value in arguments.task.items():  # so that a checkpoint's record means the same from any directory
        if flag.endswith("_or_path"):
            arguments.task[flag] = _place(value)
    return arguments


def check_size(arguments: argparse.Namespace, flag: str, size: int, of: str) -> int:
    """The flag's value, which may not exceed the data if it was given by hand; clipped to it otherwise."""
    value = getattr(arguments, flag)
    if value is None:
        return size
    if value > size and flag in arguments.given:
        raise UserError(f"--{flag} {value} is larger than the {of}, which has {size}")
    return min(value, size)


def check_query(arguments: argparse.Namespace, num_queries: int) -> int:
    """The number of the query to show, counted from 0; the last one at most unless it was given by hand."""
    if arguments.show_query >= num_queries and "show_query" in arguments.given:
        raise UserError(
            f"--show_query {arguments.show_query}: there are {num_queries} queries, with numbers from 0 to "
            f"{num_queries - 1}"
        )
    return min(arguments.show_query, num_queries - 1)


def _over(values: dict, others: dict, task_class: type[ExampleTask]) -> dict:
    """The values, with others in their place, and without what belongs to a value that is another now."""
    for flag, belonging in task_class.belonging.items():
        if flag in others and _place(others[flag]) != _place(values.get(flag)):
            values = {key: value for key, value in values.items() if key not in belonging}
    return values | others


def _place(value: str | None) -> str | None:
    """The same for the same place, however it is named."""
    try:
        path = None if value is None else Path(value).expanduser()
        return str(path.resolve()) if path is not None and path.exists() else value
    except (OSError, RuntimeError):  # no name of a file: too long, or of a user who is not there
        return value


def _defaults(defaults: dict, script: str) -> dict:
    """Those of the script: "flag", "flag.train" where it trains, and "flag.script"."""
    chosen = {flag: value for flag, value in defaults.items() if "." not in flag}
    for suffix in (".train" if trains(script) else None, f".{script}"):
        chosen |= {
            flag.removesuffix(suffix): value for flag, value in defaults.items() if suffix and flag.endswith(suffix)
        }
    return chosen


def _describe_defaults(parser: argparse.ArgumentParser, task_class: type[ExampleTask], script: str) -> None:
    """Put the presets' defaults into the help."""
    by_preset = {
        name: _defaults(COMMON_DEFAULTS, script) | _defaults(preset, script)
        for name, preset in task_class.presets.items()
    }
    for action in parser._actions:
        values = {name: defaults.get(action.dest) for name, defaults in by_preset.items()}
        if action.dest != "help" and any(value is not None for value in values.values()):
            shown = {
                name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()
            }
            same = len(set(map(str, shown.values()))) == 1
            text = (
                next(iter(shown.values())) if same else ", ".join(f"{name}: {value}" for name, value in shown.items())
            )
            action.help = f"{action.help} [{str(text).replace('%', '%%')}]"
