"""The checkpoints of one training: the last one in --checkpoint_dir, and those left on the way in its step-…/."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from influence_core.errors import UserError
from influence_core.experiments.checkpoints import (
    FILES,
    TRAINING_RECORD,
    is_checkpoint,
    read_training_record,
    require_unchanged,
)
from influence_core.experiments.flags import ALL
from influence_core.storage import differences

STEP = "step"  # in the record of a checkpoint on the way: the optimizer's steps before it
NUM_STEPS = "num_steps"  # in that of the last: the same
SAVED = "saved"  # in that of the last: [[epochs, steps], …] of those on the way


def saved_steps(save_at: Sequence[float] | None, num_train_epochs: int, num_steps: int) -> list[tuple[float, int]]:
    """[(epochs, the optimizer's steps by then)], the first step at least."""
    return [(epochs, max(1, round(num_steps * epochs / num_train_epochs))) for epochs in save_at or ()]


def step_directory(checkpoint_dir: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return Path(checkpoint_dir) / f"step-{step}"


def forget_other_steps(checkpoint_dir: Path, steps: Sequence[int]) -> None:
    """Remove what an earlier training left on its way."""
    current = [step_directory(checkpoint_dir, step) for step in steps]
    for path in Path(checkpoint_dir).glob("step-*"):
        if path not in current and (path / TRAINING_RECORD).exists() and path.name.removeprefix("step-").isdecimal():
            shutil.rmtree(path)


def saved_checkpoints(checkpoint_dir: str) -> list[Path]:
    """All on the way that are of the training that left the last."""
    if not read_training_record(checkpoint_dir).get(SAVED):
        return []
    return [path for path in chosen_checkpoints(checkpoint_dir, ALL).values() if path != Path(checkpoint_dir)]


def chosen_checkpoints(checkpoint_dir: str, which: str | Sequence[float]) -> dict[str, Path]:
    """{"step-…": directory} of those asked for, in order.

    Args:
        which: ALL, or epochs.
    Raises:
        UserError: there are none; one is missing, or of another training than the last.
    """
    record, last = read_training_record(checkpoint_dir), Path(checkpoint_dir)
    steps = dict(record.get(SAVED, ()))
    if not steps:
        raise UserError(f"{checkpoint_dir} has no checkpoints but the last: train.py --save_at 1 2 leaves those after "
                        "epochs 1 and 2")  # fmt: skip
    steps.setdefault(float(record["num_train_epochs"]), record[NUM_STEPS])
    unknown = [epochs for epochs in (steps if which == ALL else which) if epochs not in steps]
    if unknown:
        raise UserError(f"--checkpoints {unknown[0]:g}: {checkpoint_dir} has those after "
                        f"{', '.join(f'{epochs:g}' for epochs in steps)} epochs")  # fmt: skip
    chosen = {}
    for step in sorted({steps[epochs] for epochs in (steps if which == ALL else which)}):
        directory = step_directory(last, step)
        is_last = step == record[NUM_STEPS]
        chosen[directory.name] = last if is_last else directory
        if not is_last:
            _require_same_training(directory, last, record)
    return chosen


def _require_same_training(directory: Path, last: Path, record: dict[str, Any]) -> None:
    if not is_checkpoint(directory):
        raise UserError(f"the checkpoint {directory} is missing: train again with --overwrite")
    wanted = {key: value for key, value in record.items() if key not in (NUM_STEPS, SAVED, FILES)}
    differing = differences(read_training_record(str(directory)), wanted)
    if differing:
        raise UserError(f"{directory} is not of the training that left {last}: {differing}; train again with "
                        "--overwrite")  # fmt: skip
    require_unchanged(directory)
