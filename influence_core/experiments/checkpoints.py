"""The directory of a checkpoint: what train.py leaves there, and what the other scripts may take it for."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from influence_core.errors import UserError, first_line
from influence_core.experiments.overwriting import NOTE
from influence_core.files import (
    PART,
    Damaged,
    as_user_wants,
    file_checksum,
    read_sealed_json,
    remove_leftovers,
    which_differ,
    write_sealed_json,
)
from influence_core.fingerprints import dataset_fingerprint
from influence_core.locks import LOCK
from influence_core.storage import differences
from influence_core.tasks import adapters
from influence_core.tasks.example import ExampleTask, is_main_process

TRAINING_RECORD = "training.json"  # the flags that made it, and DATA
UNFINISHED = {"unfinished": True}  # the record while there is no other
DATA = "train_dataset"  # in the record: the fingerprint of the training examples
FILES = "files"  # in the record: {name: checksum} of what lies beside it
MADE_BY = "made_by"  # in the record: the name of a run that overwrites
STATE = ".training"  # directory of what a killed training goes on from
CONFIGS = (CONFIG_NAME, adapters.CONFIG)  # what a checkpoint has one of: a whole model's, or an adapter's

# Of a model, which may be in parts, or of an adapter.
WEIGHTS = ("model.safetensors*", "model-*-of-*.safetensors", "adapter_model.*", adapters.BASE)


def read_training_record(checkpoint_dir: str) -> dict:
    """What train.py noted in the checkpoint; empty for a checkpoint made elsewhere."""
    path = Path(checkpoint_dir) / TRAINING_RECORD
    try:
        return read_sealed_json(path)
    except FileNotFoundError:
        return {}
    except Damaged as reason:
        raise UserError(
            f"{path} is not readable ({reason}): train again with --overwrite, or remove it to give all flags"
        ) from None


def require_checkpoint(task_class: type[ExampleTask], arguments) -> None:
    """Raise UserError, with the command that makes one, if --checkpoint_dir has no checkpoint."""
    checkpoint_dir = Path(arguments.checkpoint_dir)
    if read_training_record(arguments.checkpoint_dir) == UNFINISHED:
        raise UserError(f"the training that was to leave {checkpoint_dir} did not end: run train.py again, with "
                        "the same flags")  # fmt: skip
    if not is_checkpoint(checkpoint_dir):
        inner = sorted(path for path in checkpoint_dir.glob("*/") if is_checkpoint(path))
        if inner:
            raise UserError(f"no checkpoint in {checkpoint_dir} itself, name the one in it that is meant with "
                            f"--checkpoint_dir: {', '.join(map(str, inner))}")  # fmt: skip
        raise UserError(
            f"no checkpoint in {checkpoint_dir}: make one with `python {task_class.name}/train.py --preset "
            f"{arguments.preset} --checkpoint_dir {checkpoint_dir}`, or name another with --checkpoint_dir"
        )
    require_unchanged(checkpoint_dir)


def require_unchanged(checkpoint_dir: Path) -> None:
    """Raise UserError if weights, config or tokenizer are no longer those that train.py left there."""
    changed = which_differ(read_training_record(str(checkpoint_dir)).get(FILES, {}), checkpoint_dir)
    if changed:
        raise UserError(
            f"{checkpoint_dir / changed[0]} is no longer what train.py left: train again with --overwrite, or remove "
            f"{checkpoint_dir / TRAINING_RECORD} to take the model as it is, and give all flags"
        )


def is_checkpoint(directory: Path) -> bool:
    """Whether a model or an adapter lies there."""
    return any((directory / name).exists() for name in CONFIGS)


def refuse_foreign_directory(checkpoint_dir: Path, sources: dict[str, Any]) -> None:
    """Nothing that train.py did not make is ever written over, nor what it starts from."""
    for flag, source in sources.items():
        if flag.endswith("_or_path") and source and Path(source).resolve() == checkpoint_dir.resolve():
            raise UserError(f"--checkpoint_dir is --{flag}, which the checkpoint would replace: choose another")
    record = checkpoint_dir / TRAINING_RECORD
    if record.is_symlink() or (record.exists() and not record.is_file()):
        raise UserError(f"{record} is no file: remove it, or choose another --checkpoint_dir")
    if not checkpoint_dir.is_dir() or record.exists():
        return
    own = (LOCK, STATE, PART, NOTE)  # ends of what a training that was killed may have left
    if not all(path.name.startswith(".") and path.name.endswith(own) for path in checkpoint_dir.iterdir()):
        raise UserError(f"{checkpoint_dir} holds files that train.py did not make: choose another --checkpoint_dir")


def save_checkpoint(checkpoint_dir: Path, task: ExampleTask, model, record: dict) -> None:
    """Write the checkpoint beside its place, then move its files there; files of the user's in that directory stay.

    A directory without a config is no checkpoint: an old one loses it first, and the new one gets it last but for the
    record, which says so meanwhile. So no mixture is ever taken for whole.
    """
    checkpoint_dir = checkpoint_dir.resolve()
    temporary = None
    try:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(checkpoint_dir)
        temporary = Path(tempfile.mkdtemp(PART, ".checkpoint.", checkpoint_dir))
        task.save_model(model, temporary)
        task.tokenizer.save_pretrained(temporary)
        files = {}
        for path in filter(Path.is_file, temporary.iterdir()):
            as_user_wants(path)
            if path.suffix != ".md":  # a card for people to write in
                files[path.name] = file_checksum(path)
        write_sealed_json(checkpoint_dir / TRAINING_RECORD, UNFINISHED)
        for name in CONFIGS:
            (checkpoint_dir / name).unlink(missing_ok=True)
        for pattern in WEIGHTS:
            for path in checkpoint_dir.glob(pattern):
                path.unlink()
        for path in sorted(temporary.iterdir(), key=lambda path: path.name in CONFIGS):
            os.replace(path, checkpoint_dir / path.name)
        write_sealed_json(checkpoint_dir / TRAINING_RECORD, record | {FILES: files})
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint {checkpoint_dir} can't be written: {first_line(error)}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def not_left_empty(checkpoint_dir: Path) -> Iterator[None]:
    """Inside, a directory may be made that is removed again if nothing comes of it, as are those above it."""
    absent = [path for path in (checkpoint_dir, *checkpoint_dir.parents) if not os.path.lexists(path)]
    try:
        yield
    finally:
        if is_main_process():
            with suppress(OSError):  # it has files
                for path in absent:
                    path.rmdir()


def mark_unfinished(checkpoint_dir: Path) -> None:
    """Let a directory without a checkpoint be known as train.py's own."""
    if not (checkpoint_dir / TRAINING_RECORD).exists():
        write_sealed_json(checkpoint_dir / TRAINING_RECORD, UNFINISHED)


def is_finished(checkpoint_dir: Path, record: dict, data: Callable[[], str]) -> bool:
    """Whether it was trained with the flags of a record, and on these data.

    Args:
        data: gives the fingerprint of the training examples.
    Raises:
        UserError: it was trained otherwise.
    """
    stored = read_training_record(checkpoint_dir)
    if not stored or stored == UNFINISHED:
        return False
    remedy = "use --overwrite to train again, or choose another --checkpoint_dir"
    differing = differences(stored, json.loads(json.dumps(record)))
    if differing:
        raise UserError(f"{checkpoint_dir} was trained with other flags: {differing}; {remedy}")
    if DATA in stored and stored[DATA] != data():
        raise UserError(f"{checkpoint_dir} was trained on other examples: the data has changed since; {remedy}")
    changed = which_differ(stored.get(FILES, {}), checkpoint_dir)
    if changed:
        raise UserError(f"{checkpoint_dir / changed[0]} is no longer what train.py left: {remedy}")
    return True


def is_made_by(checkpoint_dir: Path, made_by: str, record: dict, data: Callable[[], str]) -> bool:
    """Whether a run of that name finished it, as `is_finished` has it; nothing that changed since is."""
    try:
        is_own = read_training_record(str(checkpoint_dir)).get(MADE_BY) == made_by
        return is_own and is_finished(checkpoint_dir, record, data)
    except UserError:
        return False


def require_same_data(task: ExampleTask, arguments, train_dataset: Sequence[Any]) -> None:
    """Raise UserError if the training examples are others than a checkpoint was trained on, and no flag asked for it;
    where one did, note it.
    """
    stored = read_training_record(arguments.checkpoint_dir).get(DATA)
    if stored is None or stored == dataset_fingerprint(train_dataset):
        return
    if not arguments.given & {*arguments.task, "num_train"} - {*task.flags_of_a_start}:
        raise UserError(f"{arguments.checkpoint_dir} was trained on other examples: the data has changed since; train "
                        "again, or name the data with --dataset_name_or_path to take it as it is")  # fmt: skip
    if is_main_process():
        print(f"Note: {arguments.checkpoint_dir} was trained on other examples than those that the flags name")
