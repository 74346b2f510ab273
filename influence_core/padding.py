"""Padding that no second example reveals, since every batch is padded to the same length: is it counted, or too much?

Padding has no gradient, but not all that has none is padding: where a loss reads one position, the last layers have no
gradient at the others. So the batch's own tensors are asked as well: along padding they say nothing new.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from influence_core.captured import Positions, has_gradient
from influence_core.errors import UserError
from influence_core.task import EXAMPLE_INDEX, Batch

FEWEST = 2  # positions that make a run of padding
NEGLIGIBLE = 1e-4  # of the norm of all output gradients


def refuse_counted_padding(captured: Mapping[str, Positions], batch: Batch, others: Sequence[Batch] = ()) -> None:
    """Raise UserError where a layer counts padding, or leaves out what is none.

    Args:
        captured: what each layer saw of one example, run alone in this batch.
        others: batches of other examples.
    """
    by_kind: dict[str, list[tuple[str, int]]] = {}  # layers whose names differ by a number only, those of all blocks
    for name, of_layer in captured.items():
        gradients, mask = of_layer.output_gradients, of_layer.mask
        if mask is None:
            num_padded = _in_no_tensor(batch, gradients, others)
            if num_padded:
                raise _counts_padding(name, num_padded)
        elif gradients[~mask].norm() > NEGLIGIBLE * gradients.norm():
            raise UserError(
                f"the position mask of layer {name} leaves out positions that carry gradient: it is that of another "
                "stream; position_mask is true at every real position of the layer's own input"
            )
        else:
            num_padded = _beyond_another_tensor(batch, of_layer)
            by_kind.setdefault(re.sub(r"\d+", "#", name), []).append((name, num_padded))
    for layers in by_kind.values():
        # In the last block alone, positions may have no gradient for other reasons; and tokens without a loss differ.
        if all(num_padded for _, num_padded in layers) and _sees_the_same(captured[layers[0][0]]):
            raise _counts_padding(*layers[0])


def _counts_padding(name: str, num_padded: int) -> UserError:
    return UserError(
        f"layer {name} counts {num_padded} positions of padding of one example: let position_mask give the mask of the "
        "layer's own input stream (of ones where they are none)"
    )


def _in_no_tensor(batch: Batch, gradients: Tensor, others: Sequence[Batch]) -> int:
    """Positions at the ends of rows without gradient, along which no tensor of the batch changes.

    One of them at least has a value there that no example has within, as padding has: or it might be a text's end.
    """
    count, tensors = 0, _tensors(batch, gradients)
    within = {key: torch.cat([_within(each[key]) for each in (batch, *others) if key in each]) for key in tensors}
    for end, (without_gradient, constant) in zip((0, -1), _runs_at_the_ends(batch, gradients)):
        run = torch.stack([without_gradient, *constant]).amin(0)
        is_padding = torch.zeros_like(run, dtype=torch.bool)
        for (key, x), length in zip(tensors.items(), constant):
            is_padding |= ~torch.isin(x[:, end], within[key]) & (length < x.shape[1])
        count += int(run[is_padding & (run >= FEWEST)].sum())
    return count


def _within(x: Tensor) -> Tensor:
    """What stands between the equal values at the beginning of each row and those at its end."""
    x = x.reshape(-1, x.shape[-1])
    from_left, from_right = ((y == y[:, :1]).cumprod(1).bool() for y in (x, x.flip(1)))
    return x[~from_left & ~from_right.flip(1)]


def _beyond_another_tensor(batch: Batch, captured: Positions) -> int:
    """Counted positions without gradient, where those without begin just where a tensor of the batch ends."""
    counts = []
    for direction, (without_gradient, constant) in enumerate(_runs_at_the_ends(batch, captured.output_gradients)):
        num_positions = _num_positions(batch, captured.output_gradients)
        mask = captured.mask.reshape(-1, num_positions)
        mask = mask if direction == 0 else mask.flip(1)
        within = torch.arange(num_positions, device=mask.device) < without_gradient[:, None]
        fits = torch.stack([run == without_gradient for run in constant]).any(0)
        counts.append(int((mask & within)[fits & (without_gradient < num_positions)].sum()))
    return max((count for count in counts if count >= FEWEST), default=0)


def _sees_the_same(captured: Positions) -> bool:
    """Whether all counted positions without gradient have the same input, as those of padding have.

    But for the two at the ends: a decoder's input is shifted by one.
    """
    seen = captured.activations[captured.mask & ~has_gradient(captured.output_gradients)][1:-1]
    return len(seen) >= FEWEST and bool((seen - seen[:1]).norm() <= NEGLIGIBLE * seen.norm())


def _tensors(batch: Batch, gradients: Tensor) -> dict[str, Tensor]:
    """[rows, positions], the batch's tensors of as many positions as there are gradients."""
    count = gradients.shape[0] * gradients.shape[1]
    tensors = {key: x for key, x in batch.items() if key != EXAMPLE_INDEX and x.dim() > 1 and x.numel() == count}
    tensors = {key: x.reshape(-1, x.shape[-1]) for key, x in tensors.items()}
    return tensors if len({x.shape for x in tensors.values()}) == 1 else {}


def _num_positions(batch: Batch, gradients: Tensor) -> int:
    return next(iter(_tensors(batch, gradients).values())).shape[1]


def _runs_at_the_ends(batch: Batch, gradients: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """For the beginning and the end of rows: how many positions have no gradient, and in how many a tensor is constant.

    Each [rows], the second one of every tensor of the batch; nothing where none has the positions of the gradients.
    """
    tensors = list(_tensors(batch, gradients).values())
    if tensors:
        without = ~has_gradient(gradients).reshape(tensors[0].shape)
        for turned in (lambda x: x, lambda x: x.flip(1)):
            runs = [turned(without), *(turned(x) == turned(x)[:, :1] for x in tensors)]
            lengths = [run.cumprod(1).sum(1) for run in runs]
            yield lengths[0], lengths[1:]
