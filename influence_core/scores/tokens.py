"""Which token of an example a position of a layer is: what each position adds to a score, gathered by tokens.

An example's tokens are numbered through: those of its first stream, row by row, then those of the next one. One number
more stands for all that has no token: a pooler, which sees one position a row, and padding, which adds zero.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from influence_core.errors import UserError
from influence_core.layers.kind import SiteProducts
from influence_core.task import ONLY_STREAM, Batch, InfluenceTask


def tells_tokens(task: InfluenceTask, example: Any) -> bool:
    """Whether scores can be split by token."""
    return not task.post_processes and bool(task.token_rows(example))


def token_counts(task: InfluenceTask, example: Any) -> dict[str, list[int]]:
    """{stream: tokens of each of the example's rows}

    Raises:
        UserError: the task does not tell an example's tokens, or what its layers saw does not follow them.
    """
    if task.post_processes:
        raise UserError("scores by token are for tasks whose gradients are sums over positions: this one's are "
                        "post-processed")  # fmt: skip
    rows = task.token_rows(example)
    if not rows:
        raise UserError(f"{type(task).__name__} does not tell the tokens of an example: it needs token_rows, see "
                        "influence_core/task.py")  # fmt: skip
    return {stream: [len(row) for row in of_stream] for stream, of_stream in rows.items()}


class TokenPlaces:
    """Where the tokens of a batch's examples lie in what the layers saw of it."""

    def __init__(self, task: InfluenceTask, batch: Batch, examples: Sequence[Any]):
        """
        Args:
            batch: of these examples, as it was run.
        """
        self.task, self.rows_per_example = task, task.rows_per_example
        self.counts = [token_counts(task, example) for example in examples]
        self.columns: dict[str, tuple[list[Tensor], int | None]] = {}  # by stream: of each row's tokens; all there are
        for stream in self.counts[0]:
            mask = task.token_mask(batch, stream)
            sizes = [size for counts in self.counts for size in counts[stream]]
            if mask is None:
                self.columns[stream] = [torch.arange(size) for size in sizes], None
                continue
            columns = [row.nonzero().squeeze(1) for row in torch.as_tensor(mask).cpu()]
            if list(map(len, columns)) != sizes:
                raise UserError(f"{type(task).__name__}.token_mask marks {list(map(len, columns))} tokens in the rows "
                                f"of a batch whose token_rows have {sizes}")  # fmt: skip
            self.columns[stream] = columns, mask.shape[1]

    def num_tokens(self, example: int) -> int:
        """Of an example of the batch."""
        return sum(map(sum, self.counts[example].values()))

    def add(self, totals: Tensor, example: int, sites: Iterable[SiteProducts]) -> None:
        """totals += what the positions of an example of the batch add to its scores, by its tokens.

        Args:
            totals: [directions, tokens + 1], see above.
        """
        for site in sites:
            rows = site.products.unflatten(1, (self.rows_per_example, -1))  # [directions, rows, positions of all calls]
            spans = site.spans or ((rows.shape[2], 1),)
            lengths = [positions * parts for positions, parts in spans]
            for call, (of_call, (positions, _)) in enumerate(zip(rows.split(lengths, dim=2), spans)):
                stream = self.task.token_stream(site.site, call)
                if stream == ONLY_STREAM and len(self.columns) == 1:
                    (stream,) = self.columns
                by_position = of_call.unflatten(2, (positions, -1)).sum(-1)
                self._add_rows(totals, example, stream, by_position)

    def _add_rows(self, totals: Tensor, example: int, stream: str | None, by_position: Tensor) -> None:
        """by_position: [directions, rows, positions of one call]"""
        columns, width = self.columns.get(stream, ([], None))
        fits = bool(columns) and width in (None, by_position.shape[2])
        first, left = 0, by_position.clone()
        for name, sizes in self.counts[example].items():
            for row, size in enumerate(sizes):
                if fits and name == stream and by_position.shape[2] >= size:
                    of_row = columns[example * self.rows_per_example + row].to(totals.device)
                    totals[:, first : first + size] += by_position[:, row].index_select(1, of_row)
                    left[:, row].index_fill_(1, of_row, 0)
                first += size
        totals[:, -1] += left.sum((1, 2))
