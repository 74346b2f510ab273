"""Whether what a task tracks is expected: whole blocks left out are refused, much left out is said."""

from collections.abc import Sequence

from torch import nn

from influence_core.coverage import could_be_tracked
from influence_core.errors import UserError
from influence_core.layers import TrackedLayer
from influence_core.tasks.example import ExampleTask
from influence_core.tasks.loading import pattern_of
from influence_core.tasks.transformer import TransformerTask
from influence_core.tasks.weights import Blocks

SHOWN_BLOCKS = 6


def coverage_notes(task: ExampleTask, model: nn.Module, layers: Sequence[TrackedLayer], was_asked: bool) -> list[str]:
    """What to print of the layers that are left out.

    Args:
        was_asked: whether the user said which layers to track.
    Raises:
        UserError: nobody asked, and the task's own choice leaves out whole blocks that could be tracked; or the user
            did, and the task does not listen.
    """
    if task.tracked_kinds == "all" and not isinstance(task, TransformerTask):
        raise UserError(f"{type(task).__name__} names its layers itself, by tracked_layer_names: leave --track out")
    tracked = {layer.name for layer in layers}
    trackable = could_be_tracked(model)
    unfit = task.observe(model).unfit if isinstance(task, TransformerTask) else {}
    notes = []
    if unfit:
        notes.append(f"Left out, as they can't be tracked: {task.observe(model).describe_unfit()}")
    if was_asked:
        _refuse_ignored_pattern(task, tracked)
        return notes
    _refuse_forgotten_blocks(task, model, tracked, [name for name in trackable if name not in unfit])
    sizes = {name: sum(x.numel() for x in model.get_submodule(name).parameters(recurse=False)) for name in trackable}
    share = sum(size for name, size in sizes.items() if name in tracked) / max(1, sum(sizes.values()))
    if sizes and share < 0.5:
        notes.append(f"Note: only {share:.1%} of the parameters of the model's linear layers are tracked")
    return notes


def _refuse_ignored_pattern(task: ExampleTask, tracked: set[str]) -> None:
    pattern = pattern_of("--tracked_layers", task.tracked_layers)
    others = [name for name in tracked if not pattern.search(name)]
    if others:
        raise UserError(
            f"{type(task).__name__} names its layers itself, and {min(others)} is not of --tracked_layers "
            f"{task.tracked_layers!r}: leave that flag out"
        )


def _refuse_forgotten_blocks(task: ExampleTask, model: nn.Module, tracked: set[str], could_be: Sequence[str]) -> None:
    blocks = Blocks(model)
    known = {blocks.index(f"{name}.weight") for name in tracked}
    forgotten = dict.fromkeys(blocks.index(f"{name}.weight") for name in could_be)
    names = [f"{block[0]}.{block[1]}" for block in forgotten if block is not None and block not in known]
    if names:
        shown = ", ".join(names[:SHOWN_BLOCKS]) + (f", … ({len(names)} in all)" if len(names) > SHOWN_BLOCKS else "")
        raise UserError(
            f"{type(task).__name__} tracks no layer of {shown} of this {type(model).__name__}: its choice of layers "
            "does not fit the model; let it track all, or say --tracked_layers REGEX if it is meant"
        )
