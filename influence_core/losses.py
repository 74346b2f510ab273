"""Cross-entropy, summed: of logits, or of a linear head without ever holding the logits of a whole batch.

A language model's head makes [positions, vocabulary] logits, for GPT-2 sixty times the size of its input. Here they
exist only for one chunk of positions at a time: logits, label sampling, loss and the gradients are done while the chunk
is at hand. Cost: 2 t d v FLOPs, and as many again for each gradient wanted, that of the hidden state (influence) and
that of the weight (training); memory: chunk * v floats, on a GPU up to three times as many.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_core.labels import sample_categorical
from influence_core.precision import Precision, active_precision

IGNORED = -100  # as a target: a position that carries no loss
# Positions whose logits are held at once, enough for products at full speed; and bytes of these logits, at most.
CHUNK_ROWS = {"cpu": 512, "cuda": 8192}
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


# On a CPU, rows of logits that begin at the same place in a cache line, an odd number of lines apart (a power of two
# would put all rows into the same few sets of the cache), and products with so many categories at once: together a
# third faster than one product into rows of 50,257.
ALIGNMENT, CATEGORIES_AT_ONCE = 16, 512


def _logit_buffer(num_rows: int, num_categories: int, like: Tensor) -> Tensor | None:
    """On a CPU, memory that every chunk uses again (fresh pages cost like a product); its last columns are padding."""
    if like.device.type != "cpu":
        return None
    return like.new_empty(num_rows, (-(-num_categories // ALIGNMENT) | 1) * ALIGNMENT)


def _logits(precision: Precision, hidden: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
    """[positions, categories], and where there is a buffer -inf in the columns beyond them."""
    if buffer is None:
        return precision.matmul(hidden, weight.t())
    logits = buffer[: len(hidden)]
    for start in range(0, len(weight), CATEGORIES_AT_ONCE):
        block = weight[start : start + CATEGORIES_AT_ONCE]
        precision.matmul(hidden, block.t(), out=logits[:, start : start + len(block)])
    logits[:, len(weight) :] = float("-inf")
    return logits


@dataclass
class HeadLoss:
    """What `linear_cross_entropy` was given: a head's gradient can be made of it, though no logits were kept."""

    hidden: Tensor  # [..., d]
    targets: Tensor  # [...] int64, also where they were sampled; IGNORED where a position carries no loss
    precision: Precision  # of its products
    scale: Tensor | None = None  # d (whole loss) / d (this one), once a backward pass came through
    leaf: Tensor | None = None  # of the graph, where the hidden states are none

    def weights(self) -> Tensor:
        """[...], what each position's own loss counts in the whole."""
        counts = (self.targets != IGNORED).to(self.hidden.dtype)
        return counts * (0 if self.scale is None else self.scale)


_WATCHED: ContextVar[dict[int, list[HeadLoss]] | None] = ContextVar("watched_heads", default=None)


@contextmanager
def watched_heads(weights: Iterable[Tensor]) -> Iterator[dict[int, list[HeadLoss]]]:
    """Inside, losses of heads with these weights are noted: {id of a weight: its losses}."""
    noted: dict[int, list[HeadLoss]] = {id(weight): [] for weight in weights}
    token = _WATCHED.set(noted)
    try:
        yield noted
    finally:
        _WATCHED.reset(token)


def add_head_gradient(loss: HeadLoss, weight: Tensor, out: Tensor) -> None:
    """out += d loss / d weight, of one example, by chunks of its positions.

    Args:
        loss: of hidden states [t, d].
        weight: [v, d]; out: the same, in the dtype of sums.
    Cost: 4 t d v FLOPs.
    """
    if loss.scale is None:
        return
    precision, carries_loss = loss.precision, loss.targets != IGNORED
    hidden, targets = loss.hidden[carries_loss], loss.targets[carries_loss]
    operand_weight = precision.operand(weight)
    for rows, buffer in _chunks(hidden, weight, precision.sum_dtype):
        seen = precision.operand(hidden[rows])
        logits = _logits(precision, seen, operand_weight, buffer)
        probabilities = torch.softmax(logits, -1, out=None if buffer is None else logits)
        gradient = _of_logits(probabilities, targets[rows, None], len(weight), precision)
        precision.add_matmul(out, gradient.t(), seen * loss.scale.to(seen.dtype))


def _chunks(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor | None]]:
    """Positions whose logits are held at once, and the memory for these where there is any."""
    most = CHUNK_BYTES[hidden.device.type] // (len(weight) * dtype.itemsize)
    chunk = min(CHUNK_ROWS[hidden.device.type], max(16, most))
    buffer = _logit_buffer(min(chunk, len(hidden)), len(weight), hidden.new_empty(0, dtype=dtype))
    for start in range(0, len(hidden), chunk):
        yield slice(start, start + chunk), buffer


def _of_logits(probabilities: Tensor, target: Tensor, num_categories: int, precision: Precision) -> Tensor:
    """The gradient of logits, softmax - onehot, as an operand; in the place of the probabilities."""
    ones = probabilities.new_full(target.shape, -1.0)
    return precision.operand(probabilities.scatter_add_(-1, target, ones)[:, :num_categories])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, uniforms, precision, noted):
        """hidden [p, d], weight [v, d], labels [p] or None, uniforms [p] or None -> summed loss.

        `noted`: a HeadLoss to complete, or None.
        """
        operand_weight = precision.operand(weight)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=precision.sum_dtype) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=precision.sum_dtype)
        targets = []
        for rows, buffer in _chunks(hidden, weight, precision.sum_dtype):
            logits = _logits(precision, precision.operand(hidden[rows]), operand_weight, buffer)
            if labels is not None:  # beside the largest one, that the softmax then takes to 1 / sum
                target_logit = logits.gather(-1, labels[rows, None]) - logits.amax(-1, keepdim=True)
            probabilities = torch.softmax(logits, -1, out=None if buffer is None else logits)
            if labels is None:  # a category is sampled only where its probability is not zero
                target = sample_categorical(probabilities[:, : len(weight)], uniforms[rows]).unsqueeze(-1)
                log_likelihood = probabilities.gather(-1, target).clamp_min(torch.finfo(loss.dtype).tiny).log()
            else:  # the largest probability gives log sum exp: unlike the target's it never rounds to zero
                target = labels[rows, None]
                log_likelihood = target_logit + probabilities.amax(-1, keepdim=True).log()
            loss -= log_likelihood.sum()
            targets.append(target)
            if hidden_gradient is None and weight_gradient is None:
                continue
            logit_gradient = _of_logits(probabilities, target, len(weight), precision)
            if hidden_gradient is not None:
                hidden_gradient[rows] = precision.matmul(logit_gradient, operand_weight)
            if weight_gradient is not None:
                precision.add_matmul(weight_gradient, logit_gradient.t(), precision.operand(hidden[rows]))
            del logits, probabilities, logit_gradient  # before the next chunk's take their place
        ctx.gradients, ctx.noted = (hidden_gradient, weight_gradient), noted
        if noted is not None and targets:
            noted.targets = noted.targets.masked_scatter(noted.targets != IGNORED, torch.cat(targets))
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        if ctx.noted is not None:
            ctx.noted.scale = loss_gradient.detach()
        scaled = (None if gradient is None else gradient * loss_gradient for gradient in ctx.gradients)
        return *scaled, None, None, None, None


@torch.compiler.disable  # a loop over chunks: nothing to gain, and a long time to trace
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    uniforms: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    """Summed cross-entropy of softmax(hidden @ weight^T), against labels or labels sampled from it.

    Args:
        hidden: [..., d].
        weight: [v, d].
        labels: [...] int64; positions at `ignore_index` carry no loss.
        uniforms: [...] in [0, 1): labels are sampled from the softmax with these, where `labels` is not ignored.
    Returns:
        Scalar, nats.
    """
    if not torch.is_grad_enabled():  # else the function would make the gradient of a weight that wants one
        hidden, weight = hidden.detach(), weight.detach()
    precision = active_precision(hidden)
    carries_loss = labels != ignore_index
    noted = None
    if id(weight) in (_WATCHED.get() or {}):
        noted = HeadLoss(hidden.detach(), labels.masked_fill(~carries_loss, IGNORED), precision)
        _WATCHED.get()[id(weight)].append(noted)
        if not hidden.requires_grad:  # nothing below the head is tracked
            hidden = noted.leaf = hidden.detach().requires_grad_()
    hidden = hidden[carries_loss]
    if uniforms is not None:
        return _LinearCrossEntropy.apply(hidden, weight, None, uniforms[carries_loss], precision, noted)
    return _LinearCrossEntropy.apply(hidden, weight, labels[carries_loss], None, precision, noted)


@torch.compiler.disable
def cross_entropy(
    logits: Tensor, labels: Tensor, uniforms: Tensor | None = None, ignore_index: int = IGNORED
) -> Tensor:
    """Summed cross-entropy of softmax(logits), as `linear_cross_entropy`, in float32 at least.

    Args:
        logits: [..., categories].
    """
    carries_loss = labels != ignore_index
    logits, labels = logits[carries_loss], labels[carries_loss]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if uniforms is not None:
        labels = sample_categorical(logits.detach().softmax(-1), uniforms[carries_loss])
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
