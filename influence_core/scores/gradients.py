"""Per-sample gradients of captured batches, as rows of one matrix."""

from collections.abc import Iterator

from torch import Tensor

from influence_core.layers import TrackedLayer
from influence_core.passes import Captured
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

    def flat(self, layer: TrackedLayer, batches: list[Captured]) -> Iterator[tuple[slice, Tensor]]:
        """(which of all the batches' examples, their gradients [examples, parameters] as operands of products)."""
        precision, task, first = self.precision, self.task, 0
        pairs = [captured.at_active_positions() for captured in batches]
        if task.post_processes:
            for activations, output_gradients in pairs:
                gradients = layer.to_matrix(layer.flat_gradients(activations, output_gradients))
                gradients = layer.to_flat(task.post_process_per_sample_gradient(layer.name, gradients))
                yield slice(first, first + len(gradients)), precision.operand(gradients)
                first += len(gradients)
            return
        chunk = gradient_chunk(layer, precision.product_dtype.itemsize)
        for examples in slices(sum(len(activations) for activations, _ in pairs), chunk):
            gradients, first = self._buffer(layer, pairs[0][0], examples.stop - examples.start), 0
            for activations, output_gradients in pairs:
                # The part of this batch that lies in the chunk.
                start, stop = max(examples.start, first), min(examples.stop, first + len(activations))
                if start < stop:
                    rows = slice(start - first, stop - first)
                    out = gradients[start - examples.start : stop - examples.start]
                    layer.flat_gradients(activations[rows], output_gradients[rows], out=out)
                first += len(activations)
            yield examples, precision.operand(gradients)

    def _buffer(self, layer: TrackedLayer, like: Tensor, num_examples: int) -> Tensor:
        """[examples, parameters] to write into, always the same memory: on a CPU, fresh pages cost like a product."""
        size = num_examples * layer.num_parameters
        if self.buffer is None or self.buffer.numel() < size:
            self.buffer = like.new_empty(size)
        return self.buffer[:size].view(num_examples, layer.num_parameters)
