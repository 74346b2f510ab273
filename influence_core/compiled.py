"""torch.compile for what a model does between its tracked layers.

The hooks of the tracked layers are no part of what is compiled, so that it ends at each of them: a norm, an activation,
a residual sum and attention are fused, while the layers' own products run as they do without torch.compile, where
nothing is to be gained by it. What is compiled knows no pass, then, and blocks that are alike share it: every pass of
an analysis uses it, for any length and batch size (its shapes are symbolic). Hashing and sampling of labels stay out;
the check of the contract and the plan's probes run without, so that the plan's memory is that of the plain model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from influence_core.errors import UserError, first_line

MOST_VARIANTS = 64  # of one function's compiled code: with and without gradients, by kinds of blocks
uncompiled: Callable = torch.compiler.disable


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Inside, the model's forward pass runs compiled, but for its tracked layers.

    Raises:
        UserError: torch.compile fails at it.
    """
    before = model._compiled_call_impl
    model.compile(dynamic=True)
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            f"torch.compile fails at this {type(model).__name__} ({first_line(error)}): leave --use_compile out"
        ) from error
    finally:
        model._compiled_call_impl = before


def where_it_does_not_pay(device: torch.device) -> str | None:
    """A line for people, before they wait for nothing."""
    if device.type != "cpu":
        return None
    return "Note: --use_compile compiles for a minute or two on a CPU, and was seen to save nothing there"


def what_was_compiled() -> str:
    """In this process, as a line for people."""
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if not count:
        return (
            "Note: nothing was compiled: all was stored, or is done by tracked layers alone, or the losses never call "
            "the model itself"
        )
    seconds = torch._dynamo.utils.calculate_time_spent()["total_wall_time"]
    return f"torch.compile made {count} graphs in {seconds:.0f} s, once for all passes and lengths"
