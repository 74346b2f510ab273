"""Per-sample gradients of captured batches, ready for products with the queries'."""

from collections.abc import Iterator

from torch import Tensor

from influence_core.captured import Captured
from influence_core.layers import Parts, TrackedLayer
from influence_core.scores.plan import gradient_chunk
from influence_core.study import Study


def slices(size: int, chunk: int) -> Iterator[slice]:
    """0 … size, cut into chunks."""
    for start in range(0, size, chunk):
        yield slice(start, min(start + chunk, size))


class PerSampleGradients:
    """Makes them, a few at a time, in a buffer that is used again and again."""

    def __init__(self, study: Study):
        self.task, self.precision = study.task, study.runtime.precision
        self.buffer: Tensor | None = None

    def parts(self, layer: TrackedLayer, batches: list[Captured]) -> Iterator[tuple[slice, Parts]]:
        """(which of all the batches' examples, the parts of their gradients, as operands of products)."""
        operand, task, first = self.precision.operand, self.task, 0
        pairs = [captured.at_active_positions() for captured in batches]
        if task.post_processes:
            for activations, output_gradients in pairs:
                gradients = layer.matrix_gradients(activations, output_gradients)
                gradients = layer.to_parts(task.post_process_per_sample_gradient(layer.name, gradients))
                yield slice(first, first + len(gradients[0])), tuple(map(operand, gradients))
                first += len(gradients[0])
            return
        chunk = gradient_chunk(layer, self.precision.product_dtype.itemsize)
        for examples in slices(sum(len(activations) for activations, _ in pairs), chunk):
            gradients, first = self._buffer(layer, pairs[0][0], examples.stop - examples.start), 0
            for activations, output_gradients in pairs:
                # The part of this batch that lies in the chunk.
                start, stop = max(examples.start, first), min(examples.stop, first + len(activations))
                if start < stop:
                    rows = slice(start - first, stop - first)
                    out = tuple(part[start - examples.start : stop - examples.start] for part in gradients)
                    layer.gradient_parts(activations[rows], output_gradients[rows], out)
                first += len(activations)
            yield examples, tuple(map(operand, gradients))

    def _buffer(self, layer: TrackedLayer, like: Tensor, num_examples: int) -> Parts:
        """To write into, always the same memory: on a CPU, fresh pages cost like a product."""
        sizes = [num_examples * size for size in layer.part_sizes]
        if self.buffer is None or self.buffer.numel() < sum(sizes):
            self.buffer = like.new_empty(sum(sizes))
        return tuple(part.view(num_examples, -1) for part in self.buffer[: sum(sizes)].split(sizes))
