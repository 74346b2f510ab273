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
from influence_core.sharding import whole

IGNORED = -100  # as a target: a position that carries no loss
# Positions whose logits are held at once, enough for products at full speed; and bytes of these logits, at most.
CHUNK_ROWS = {"cpu": 512, "cuda": 8192}
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


# On a CPU, rows of logits that begin at the same place in a cache line, an odd number of lines apart (a power of two
# would put all rows into the same few sets of the cache), and products with so many categories at once: together a
# third faster than one product into rows of 50,257. On a GPU, rows that matrix units take at full speed.
ALIGNMENT, CATEGORIES_AT_ONCE = 16, 512
GPU_ALIGNMENT = 64


class Head:
    """A head's weight [v, d] as an operand; on a GPU with rows of zeros, so that rows of logits are aligned."""

    def __init__(self, weight: Tensor, precision: Precision):
        self.num_categories, self.precision = len(weight), precision
        missing = -len(weight) % GPU_ALIGNMENT if weight.device.type != "cpu" else 0
        weight = precision.operand(weight)
        self.weight = torch.nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight

    def chunks(self, num_positions: int) -> Iterator[tuple[slice, Tensor | None]]:
        """Positions whose logits are held at once; on a CPU with memory for these: fresh pages cost like a product."""
        device, dtype = self.weight.device, self.precision.sum_dtype
        most = CHUNK_BYTES[device.type] // (self.num_categories * dtype.itemsize)
        chunk = min(CHUNK_ROWS[device.type], max(16, most))
        buffer = None
        if device.type == "cpu":
            width = (-(-self.num_categories // ALIGNMENT) | 1) * ALIGNMENT
            buffer = torch.empty(min(chunk, num_positions), width, dtype=dtype)
        for start in range(0, num_positions, chunk):
            yield slice(start, start + chunk), buffer

    def logits(self, hidden: Tensor, buffer: Tensor | None) -> Tensor:
        """[positions, categories and columns of -inf], of hidden states that are operands."""
        if buffer is None:
            logits = self.precision.matmul(hidden, self.weight.t())
        else:
            logits = buffer[: len(hidden)]
            for start in range(0, self.num_categories, CATEGORIES_AT_ONCE):
                block = self.weight[start : start + CATEGORIES_AT_ONCE]
                self.precision.matmul(hidden, block.t(), out=logits[:, start : start + len(block)])
        logits[:, self.num_categories :] = float("-inf")
        return logits

    def logit_gradient(self, probabilities: Tensor, target: Tensor) -> Tensor:
        """softmax - onehot as an operand [positions, rows of the weight]; in the place of the probabilities."""
        ones = probabilities.new_full(target.shape, -1.0)
        return self.precision.operand(probabilities.scatter_add_(-1, target, ones)[:, : len(self.weight)])


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


def add_head_gradient(loss: HeadLoss, head: Head, out: Tensor) -> None:
    """out += d loss / d weight, of one example, by chunks of its positions.

    Args:
        loss: of hidden states [t, d].
        out: [v, d], in the dtype of sums.
    Cost: 4 t d v FLOPs.
    """
    if loss.scale is None:
        return
    carrying = _carrying(loss.targets)
    hidden, targets = loss.hidden.index_select(0, carrying), loss.targets.index_select(0, carrying)
    for rows, buffer in head.chunks(len(hidden)):
        seen = head.precision.operand(hidden[rows])
        probabilities = _softmax(head.logits(seen, buffer), buffer)
        gradient = head.logit_gradient(probabilities, targets[rows, None])[:, : len(out)]
        head.precision.add_matmul(out, gradient.t(), seen * loss.scale.to(seen.dtype))


def head_products(loss: HeadLoss, head: Head, directions: Tensor) -> Tensor:
    """[directions, t]: what each position of an example adds to <d loss / d weight, direction>.

    Args:
        loss: of hidden states [t, d].
        directions: [directions, v, d], in the dtype of the products.
    Cost: 2 t d v FLOPs, and as many for each direction.
    """
    products = directions.new_zeros(len(directions), len(loss.hidden))
    if loss.scale is None:
        return products
    carrying = _carrying(loss.targets)
    hidden, targets = loss.hidden.index_select(0, carrying), loss.targets.index_select(0, carrying)
    for rows, buffer in head.chunks(len(hidden)):
        seen = head.precision.operand(hidden[rows])
        probabilities = _softmax(head.logits(seen, buffer), buffer)
        gradient = head.logit_gradient(probabilities, targets[rows, None])[:, : directions.shape[1]]
        seen = (seen * loss.scale.to(seen.dtype)).to(directions.dtype)
        products[:, carrying[rows]] = ((gradient.to(directions.dtype) @ directions) * seen).sum(-1)
    return products


def _carrying(labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Flat indices of the positions that carry loss; made once a batch, as it waits for a GPU."""
    return (labels != ignore_index).flatten().nonzero().squeeze(1)


def _softmax(logits: Tensor, buffer: Tensor | None) -> Tensor:
    return torch.softmax(logits, -1, out=None if buffer is None else logits)


def _by_chunks(
    head: Head, hidden: Tensor, labels: Tensor | None, uniforms: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(positions, their losses [n, 1], probabilities [n, categories and more], targets [n, 1]), chunk by chunk.

    A chunk's probabilities are overwritten by the next one's.
    """
    for rows, buffer in head.chunks(len(hidden)):
        logits = head.logits(head.precision.operand(hidden[rows]), buffer)
        if labels is not None:  # beside the largest one, that the softmax then takes to 1 / sum
            target = labels[rows, None]
            target_logit = logits.gather(-1, target) - logits.amax(-1, keepdim=True)
        probabilities = _softmax(logits, buffer)
        del logits
        if labels is None:  # a category is sampled only where its probability is not zero
            target = sample_categorical(probabilities[:, : head.num_categories], uniforms[rows]).unsqueeze(-1)
            smallest = torch.finfo(probabilities.dtype).tiny
            log_likelihood = probabilities.gather(-1, target).clamp_min(smallest).log()
        else:  # the largest probability gives log sum exp: unlike the target's it never rounds to zero
            log_likelihood = target_logit + probabilities.amax(-1, keepdim=True).log()
        yield rows, -log_likelihood, probabilities, target
        del probabilities  # before the next chunk's take their place


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, uniforms, precision, noted):
        """hidden [p, d], weight [v, d], labels [p] or None, uniforms [p] or None -> summed loss.

        `noted`: a HeadLoss to complete, or None.
        """
        head = Head(weight, precision)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=precision.sum_dtype) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=precision.sum_dtype)
        targets = []
        for rows, losses, probabilities, target in _by_chunks(head, hidden, labels, uniforms):
            loss += losses.sum()
            targets.append(target)
            if hidden_gradient is None and weight_gradient is None:
                continue
            logit_gradient = head.logit_gradient(probabilities, target)
            if hidden_gradient is not None:
                hidden_gradient[rows] = precision.matmul(logit_gradient, head.weight)
            if weight_gradient is not None:
                logit_gradient = logit_gradient[:, : len(weight)]
                precision.add_matmul(weight_gradient, logit_gradient.t(), precision.operand(hidden[rows]))
            del probabilities, logit_gradient  # before the next chunk's take their place
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
    noted = None
    if id(weight) in (_WATCHED.get() or {}):
        noted = HeadLoss(hidden.detach(), labels.masked_fill(labels == ignore_index, IGNORED), precision)
        _WATCHED.get()[id(weight)].append(noted)
        if not hidden.requires_grad:  # nothing below the head is tracked
            hidden = noted.leaf = hidden.detach().requires_grad_()
    weight = whole(weight)
    carrying = _carrying(labels, ignore_index)
    hidden = hidden.flatten(0, -2).index_select(0, carrying)
    if uniforms is not None:
        uniforms = uniforms.flatten().index_select(0, carrying)
        return _LinearCrossEntropy.apply(hidden, weight, None, uniforms, precision, noted)
    labels = labels.flatten().index_select(0, carrying)
    return _LinearCrossEntropy.apply(hidden, weight, labels, None, precision, noted)


@torch.no_grad()
def linear_cross_entropies(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """The loss of each position by itself, zero where it carries none: as `linear_cross_entropy`, [...], nats."""
    precision = active_precision(hidden)
    carrying = _carrying(labels, ignore_index)
    some = hidden.flatten(0, -2).index_select(0, carrying), labels.flatten().index_select(0, carrying), None
    chunks = [losses.squeeze(-1) for _, losses, _, _ in _by_chunks(Head(whole(weight), precision), *some)]
    losses = torch.zeros(labels.numel(), dtype=precision.sum_dtype, device=hidden.device)
    return losses.index_copy_(0, carrying, torch.cat(chunks) if chunks else losses[:0]).view(labels.shape)


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
