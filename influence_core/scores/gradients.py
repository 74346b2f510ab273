"""Per-sample gradients of captured batches, ready for products with the queries'."""

from collections.abc import Iterator

from torch import Tensor

from influence_core.captured import Captured
from influence_core.layers import Parts, TrackedLayer
from influence_core.memory import is_out_of_memory, release_cached_memory
from influence_core.scores.cost import gradient_chunk
from influence_core.study import Study


class PerSampleGradients:
    """Makes them, a few at a time, in a buffer that is used again and again."""

    def __init__(self, study: Study):
        self.task, self.precision = study.task, study.runtime.precision
        self.buffer: Tensor | None = None

    def parts(self, layer: TrackedLayer, batches: list[Captured]) -> Iterator[tuple[slice, Parts]]:
        """(which of all the batches' examples, the parts of their gradients, as operands of products)."""
        operand, task, first = self.precision.operand, self.task, 0
        if task.post_processes:
            for captured in batches:
                gradients = layer.matrix_gradients(captured.compact())
                gradients = layer.to_parts(task.post_process_per_sample_gradient(layer.name, gradients))
                yield slice(first, first + len(gradients[0])), tuple(map(operand, gradients))
                first += len(gradients[0])
            return
        like, num_left = batches[0].tensors[0], sum(map(len, batches))
        chunk = gradient_chunk(layer, self.precision.product_dtype.itemsize, like.device.type)
        num_made, gradients = 0, self._buffer(layer, like, min(chunk, num_left))
        for captured in (each.compact() for each in batches):
            done = 0
            while done < len(captured):
                some = captured[done : done + len(gradients[0]) - num_made]  # as many as the buffer still takes
                layer.gradient_parts(some, tuple(part[num_made : num_made + len(some)] for part in gradients))
                num_made, done = num_made + len(some), done + len(some)
                if num_made == len(gradients[0]):
                    yield slice(first, first + num_made), tuple(map(operand, gradients))
                    first, num_left, num_made = first + num_made, num_left - num_made, 0
                    gradients = tuple(part[:num_left] for part in gradients)

    def _buffer(self, layer: TrackedLayer, like: Tensor, num_examples: int) -> Parts:
        """To write into, for fewer where memory is short; kept, as on a CPU fresh pages cost like a product."""
        sizes = [num_examples * size for size in layer.part_sizes]
        if self.buffer is None or self.buffer.numel() < sum(sizes):
            self.buffer = None
            try:
                self.buffer = like.new_empty(sum(sizes))
            except RuntimeError as error:
                if not is_out_of_memory(error) or num_examples == 1:
                    raise
        if self.buffer is None:
            release_cached_memory()
            return self._buffer(layer, like, num_examples // 2)
        return tuple(part.view(num_examples, -1) for part in self.buffer[: sum(sizes)].split(sizes))
