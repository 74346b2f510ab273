"""The one training loop, for train.py and for every retraining: AdamW at a fixed rate, in a seeded order."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from weakref import WeakSet

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from influence_core.batches import sizes_of_some
from influence_core.errors import UserError
from influence_core.experiments.resuming import TrainingState, generator_states, restore_generators
from influence_core.lockstep import of_many_sizes, refuse_uneven_calls
from influence_core.progress import Progress, progress
from influence_core.sharding import is_sharded
from influence_core.tasks.example import ExampleTask

_CHECKED: WeakSet[nn.Module] = WeakSet()  # sharded models whose calls were looked at


@dataclass(frozen=True)
class Recipe:
    """What, beside the initial model, the data and the seed, decides the trained model."""

    learning_rate: float
    weight_decay: float
    num_train_epochs: int
    train_batch_size: int  # of each process
    use_half_precision: bool

    @classmethod
    def from_arguments(cls, arguments) -> "Recipe":
        """From the flags of the same names."""
        values = {field.name: getattr(arguments, field.name) for field in fields(cls)}
        return cls(**values | {"use_half_precision": bool(values["use_half_precision"])})

    def num_steps(self, num_examples: int, num_processes: int = 1) -> int:
        """Steps of the optimizer."""
        return self.num_train_epochs * math.ceil(num_examples / (self.train_batch_size * num_processes))


def fit(
    task: ExampleTask,
    model: nn.Module,
    dataset,
    recipe: Recipe,
    seed: int,
    accelerator,
    bar: Progress | None = None,
    after_step: Callable[[int, nn.Module], None] = lambda step, model: None,
    state: TrainingState | None = None,
) -> nn.Module:
    """Train the model; returns it as `accelerator` (see accelerators.py) wrapped it.

    Args:
        seed: of the order of the examples; that of dropout is torch's own generator.
        bar: moved on at every step.
        after_step: called with the number of steps done and the model, which it leaves as it is.
        state: gone on from, and kept after each epoch.
    Raises:
        UserError: the loss is NaN or infinite.
    """
    model = accelerator.prepare_model(model)  # sharded, it has other parameters from here on
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, recipe.train_batch_size, shuffle=True, generator=generator, collate_fn=task.collate)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    model.train()
    if is_sharded(model.parameters()):
        _check_calls(task, model, dataset, recipe, accelerator)
    bar = bar or Progress()
    total = recipe.num_steps(len(dataset), accelerator.num_processes)
    first = 0 if state is None else state.load(accelerator.unwrap_model(model), optimizer, generator)
    done = total // max(1, recipe.num_train_epochs) * first
    if first:
        bar.write(f"Going on after epoch {first} of {recipe.num_train_epochs}")
        bar.start_from(done)
    for epoch in range(first, recipe.num_train_epochs):
        for step, batch in enumerate(loader):
            with accelerator.autocast():
                loss = task.training_loss(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            # Not at every step on a GPU: reading the loss waits for the device.
            if accelerator.device.type == "cpu" or done % 10 == 0 or done == total:
                value = loss.item()
                if not math.isfinite(value):
                    where = f"batch {step} of epoch {epoch}"
                    raise UserError(f"the training loss is {value} at or before {where}: lower --learning_rate")
                bar.note(f"loss={value:.3f}", refresh=False)
            bar.update()
            after_step(done, model)
        if state is not None and epoch + 1 < recipe.num_train_epochs:
            state.save(epoch + 1, accelerator.unwrap_model(model), optimizer, generator)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                state.forget(but_epoch=epoch + 1)
    return model


@torch.no_grad()
def _check_calls(task: ExampleTask, model: nn.Module, dataset, recipe: Recipe, accelerator) -> None:
    """Processes that train sharded parameters have to go in step, also where dropout draws otherwise."""

    def run(indices: Sequence[int]) -> Tensor:
        examples = [dataset[index] for index in indices]
        batch = {key: value.to(accelerator.device) for key, value in task.collate(examples).items()}
        return task.training_loss(model, batch)

    if model in _CHECKED:  # before, by another retraining
        return
    states = generator_states()
    set_seed(0)  # of all processes
    with accelerator.autocast():
        refuse_uneven_calls(model, run, of_many_sizes(sizes_of_some(task, dataset), recipe.train_batch_size))
    restore_generators(states)
    _CHECKED.add(model)


@torch.no_grad()
def evaluate(
    task: ExampleTask,
    model: nn.Module,
    dataset,
    batch_size: int,
    accelerator,
    generate: bool = False,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """What `task.evaluation_values` says of every example: {name: [examples] float64 on the CPU}.

    With `generate`, also what `task.generation_values` says.
    Each example counts once, however many processes there are, and every process gets all values. All run as many
    batches, as sharded parameters want it; what fills up the last is the first example again.
    """
    model = accelerator.unwrap_model(model).eval()
    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    number = math.ceil(len(dataset) / accelerator.num_processes)
    examples = [dataset[index] for index in (*share, *[0] * (number - len(share)))]
    loader = DataLoader(examples, batch_size, collate_fn=task.collate)
    parts: dict[str, list[Tensor]] = {}
    is_shown = show_progress and accelerator.is_main_process
    with progress(len(loader), "Evaluate", unit="batch", leave=False, is_shown=is_shown) as bar:
        for batch in loader:
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            measured = task.evaluation_values(model, batch)
            if generate:
                measured |= task.generation_values(model, batch)
            for name, values in measured.items():
                parts.setdefault(name, []).append(values)
            bar.update()
    gathered = {}
    for name, values in parts.items():
        whole = torch.zeros(len(dataset), dtype=torch.float64, device=accelerator.device)
        if share:
            whole[share.start :: share.step] = torch.cat(values)[: len(share)].double()
        gathered[name] = accelerator.reduce(whole).cpu()
    return gathered
