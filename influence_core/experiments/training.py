"""train.py of every example: AdamW at a fixed rate, on whatever accelerate finds, one process or many."""

import gc
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from influence_core.errors import UserError
from influence_core.experiments.accelerators import accelerator_of, load_start
from influence_core.experiments.arguments import check_size, parse
from influence_core.experiments.checkpoints import (
    DATA,
    MADE_BY,
    STATE,
    is_finished,
    is_made_by,
    mark_unfinished,
    not_left_empty,
    read_training_record,
    refuse_foreign_directory,
    save_checkpoint,
)
from influence_core.experiments.fitting import Recipe, evaluate, fit
from influence_core.experiments.flags import RECIPE_FLAGS
from influence_core.experiments.overwriting import forget_overwriting, overwriting
from influence_core.experiments.resuming import TrainingState
from influence_core.experiments.running import run_script
from influence_core.experiments.trajectory import (
    NUM_STEPS,
    SAVED,
    STEP,
    forget_other_steps,
    saved_steps,
    step_directory,
)
from influence_core.files import refuse_link, remove_leftovers, require_writable
from influence_core.fingerprints import dataset_fingerprint, model_fingerprint
from influence_core.launch import Launch
from influence_core.locks import only_writer
from influence_core.progress import progress
from influence_core.sharding import is_sharded, local, unsharded
from influence_core.tasks.example import ExampleTask, is_main_process


def main(task_class: type[ExampleTask], description: str, argv: list[str] | None = None) -> None:
    """Train the example's model and leave a checkpoint."""
    run_script(lambda: _run(task_class, parse(task_class, "train", description, argv)))


def _run(task_class: type[ExampleTask], arguments) -> None:
    checkpoint_dir = Path(arguments.checkpoint_dir)
    refuse_foreign_directory(checkpoint_dir, arguments.task)
    with (
        not_left_empty(checkpoint_dir),
        only_writer(checkpoint_dir, bool(arguments.wait), is_main_process()),
    ):
        task = task_class(**arguments.task)
        record = arguments.task | task.found_flags()
        record |= {flag: getattr(arguments, flag) for flag in ("seed", "num_train", "save_at", *RECIPE_FLAGS)}
        record["num_processes"] = Launch.here().world_size
        found = f"Found finished {checkpoint_dir}, trained with the same flags"
        if not arguments.overwrite and is_finished(checkpoint_dir, record, lambda: _data(task, arguments)):
            if is_main_process():
                print(f"{found}; --overwrite trains again")
                _tidy(checkpoint_dir)
            return
        accelerator = accelerator_of(arguments)
        if accelerator.is_main_process:
            require_writable(checkpoint_dir)
            remove_leftovers(checkpoint_dir)
        if arguments.overwrite:
            everyone = accelerator.is_main_process, accelerator.wait_for_everyone
            with overwriting(checkpoint_dir, vars(arguments), *everyone) as made_by:
                if is_made_by(checkpoint_dir, made_by, record, lambda: _data(task, arguments)):
                    accelerator.print(f"{found} before this same command was interrupted")
                else:
                    _train(task, arguments, record | {MADE_BY: made_by}, accelerator)
        else:
            _train(task, arguments, record, accelerator)
            forget_overwriting(checkpoint_dir)
        accelerator.end_training()


def _train(task: ExampleTask, arguments, record: dict[str, Any], accelerator: Accelerator) -> None:
    checkpoint_dir = Path(arguments.checkpoint_dir)
    set_seed(arguments.seed)
    model = load_start(task, accelerator)
    splits = {split: task.load_dataset(split) for split in ("train", "validation")}
    num_train = check_size(arguments, "num_train", len(splits["train"]), "training set")
    splits["train"] = task.load_dataset("train", range(num_train))
    check_size(arguments, "train_batch_size", num_train, "training set")
    accelerator.print(
        f"{_sizes(model)} parameters; {num_train} training and "
        f"{len(splits['validation'])} validation examples; {accelerator.num_processes} x {accelerator.device}"
    )
    for flag, count in task.full_examples(splits["train"]).items():
        if count:
            accelerator.print(f"Note: {count} of {num_train} training examples fill --{flag} "
                              f"{getattr(arguments, flag)}: what their texts have beyond it is cut")  # fmt: skip
    recipe = Recipe.from_arguments(arguments)
    num_steps = recipe.num_steps(num_train, accelerator.num_processes)
    saved = saved_steps(arguments.save_at, recipe.num_train_epochs, num_steps)
    record[DATA] = dataset_fingerprint(splits["train"])

    def save(directory: Path, model: torch.nn.Module, more: dict[str, Any]) -> None:
        _require_finite(task, model, splits["train"][: recipe.train_batch_size], accelerator)
        with unsharded(model, here=accelerator.is_main_process):
            if accelerator.is_main_process:
                save_checkpoint(directory, task, model, record | more)

    def after_step(step: int, model: torch.nn.Module) -> None:
        if any(step == at for _, at in saved):
            if accelerator.is_main_process:
                mark_unfinished(checkpoint_dir)
            refuse_link(step_directory(checkpoint_dir, step))
            save(step_directory(checkpoint_dir, step), accelerator.unwrap_model(model), {STEP: step})
            model.train()

    state = None
    if arguments.resume is not False:
        identity = json.loads(json.dumps(record | {"initial_model": model_fingerprint(model)}))
        # Each process then keeps a part of it all, but of an adapter beside weights that were read in parts.
        num_shards = (arguments.fsdp_shards or accelerator.num_processes) if arguments.use_fsdp else None
        identity |= {"sharded": num_shards, "read_in_parts": is_sharded(model.parameters())}
        state = TrainingState(checkpoint_dir / STATE, identity, accelerator.process_index, accelerator.num_processes)
    with progress(num_steps, "Train", unit="step", is_shown=accelerator.is_main_process) as bar:
        model = fit(task, model, splits["train"], recipe, arguments.seed, accelerator, bar, after_step, state)
        model = accelerator.unwrap_model(model)
    _let_go_of_wrappers(accelerator)
    # Before the evaluation, that may fail: it can be done again, without training.
    save(checkpoint_dir, model, {NUM_STEPS: num_steps, SAVED: saved})
    if accelerator.is_main_process:
        forget_other_steps(checkpoint_dir, [step for _, step in saved])
        TrainingState(checkpoint_dir / STATE, {}).remove()
        print(f"Checkpoint: {checkpoint_dir}", flush=True)
    accelerator.wait_for_everyone()
    for split, dataset in splits.items():
        generate = split == "validation"
        with accelerator.autocast():
            values = evaluate(
                task, model, dataset, arguments.eval_batch_size, accelerator, generate, show_progress=True
            )
        metrics = task.metrics(values)
        if not all(map(math.isfinite, metrics.values())):
            raise UserError(
                f"{metrics} on the {split} split: lower --learning_rate if training diverged; the checkpoint "
                f"{checkpoint_dir} was kept"
            )
        accelerator.print(f"{split:<10} " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def _tidy(checkpoint_dir: Path) -> None:
    """Remove what a training that was killed in its last moments left beside the finished checkpoint."""
    forget_overwriting(checkpoint_dir)
    remove_leftovers(checkpoint_dir)
    steps = [step for _, step in read_training_record(str(checkpoint_dir)).get(SAVED, ())]
    forget_other_steps(checkpoint_dir, steps)
    TrainingState(checkpoint_dir / STATE, {}).remove()


def _data(task: ExampleTask, arguments) -> str:
    num_train = check_size(arguments, "num_train", len(task.load_dataset("train")), "training set")
    return dataset_fingerprint(task.load_dataset("train", range(num_train)))


def _sizes(model: torch.nn.Module) -> str:
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{whole:,}" if trained == whole else f"{trained:,} of {whole:,}"


def _let_go_of_wrappers(accelerator: Accelerator) -> None:
    """So that DistributedDataParallel is not the last to hold the process group: processes would hang at their end.

    It frees the group while it holds the interpreter, for which the group's threads wait with their last tensor;
    torch.distributed itself lets go of the interpreter first.
    """
    accelerator.free_memory()
    gc.collect()  # after the lists that free_memory empties last


@torch.no_grad()
def _require_finite(task: ExampleTask, model: torch.nn.Module, examples: Sequence[Any], accelerator) -> None:
    """Raise UserError if the model is not worth keeping: the last step's loss was that of the model before it."""
    broken = [name for name, parameter in model.named_parameters() if not local(parameter).isfinite().all()]
    if broken:
        raise UserError(f"training diverged: {broken[0]} is not finite, nothing was saved; lower --learning_rate")
    batch = {key: value.to(accelerator.device) for key, value in task.collate(examples).items()}
    with accelerator.autocast():
        loss = task.training_loss(model.eval(), batch).item()
    if not math.isfinite(loss):
        raise UserError(f"training diverged: the loss is {loss} now, nothing was saved; lower --learning_rate")
