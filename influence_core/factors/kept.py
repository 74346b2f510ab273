"""What the covariance pass captured, kept for the Lambda pass where memory has room.

Both passes sample the same labels, so forward and backward would give the very same activations and output gradients.
As many of the first batches are kept as fit below the peak that another stage needs anyway; the others are run again.
"""

from collections.abc import Iterator

from influence_core.captured import Captured, captured_bytes

Batch = tuple[list[int], dict[str, Captured]]  # indices of the examples, and what each layer saw


class KeptCaptures:
    """The first batches of a pass, as long as they fit into `budget` bytes."""

    def __init__(self, budget: int = 0):
        self.budget = budget
        self.batches: list[Batch] = []

    @property
    def num_examples(self) -> int:
        return sum(len(indices) for indices, _ in self.batches)

    def offer(self, indices: list[int], captured: dict[str, Captured]) -> None:
        """Keep the batch if it fits; if not, no later one is kept either."""
        if self.budget <= 0:
            return
        self.budget -= captured_bytes(captured)
        if self.budget >= 0:
            self.batches.append((indices, dict(captured)))

    def take(self) -> Iterator[Batch]:
        """The batches in order, each let go of as it is handed out."""
        while self.batches:
            yield self.batches.pop(0)

    def clear(self) -> bool:
        """Free all and keep no more; whether there was anything."""
        had_any = bool(self.batches)
        self.batches, self.budget = [], 0
        return had_any
