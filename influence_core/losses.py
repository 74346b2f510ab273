"""Cross-entropy of a linear head, without ever holding the logits of a whole batch.

A language model's head makes [positions, vocabulary] logits, for GPT-2 sixty times the size of its input. Here they
exist only for one chunk of positions at a time: logits, label sampling, loss and the gradient of the hidden state are
done while the chunk is at hand. The head's weight is constant (no gradient), as everywhere in an influence analysis.
Cost: 4 t d v FLOPs with the gradient, half of it without; memory: chunk * v floats.
"""

import torch
from torch import Tensor

from influence_core.labels import sample_categorical
from influence_core.precision import Precision

CHUNK_BYTES = 32 << 20  # of one chunk of logits: large enough for a full-speed product, small enough to stay cached


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, uniforms, precision):
        """hidden [p, d], weight [v, d], labels [p] or None, uniforms [p] or None -> summed loss."""
        operand_weight = precision.operand(weight)
        hidden_gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        loss = hidden.new_zeros((), dtype=precision.sum_dtype)
        chunk = max(16, CHUNK_BYTES // (weight.shape[0] * loss.element_size()))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = precision.matmul(precision.operand(hidden[rows]), operand_weight.t())
            maximum = logits.amax(-1, keepdim=True)
            weights = logits.sub_(maximum).exp()  # logits are now relative to the maximum
            total = weights.sum(-1, keepdim=True)
            target = sample_categorical(weights, uniforms[rows]) if labels is None else labels[rows]
            target = target.unsqueeze(-1)
            loss += (total.log() - logits.gather(-1, target)).sum()
            if hidden_gradient is not None:
                probabilities = weights.div_(total)
                probabilities.scatter_add_(-1, target, torch.full_like(total, -1.0))
                hidden_gradient[rows] = precision.matmul(precision.operand(probabilities), operand_weight)
        ctx.hidden_gradient = hidden_gradient
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        return ctx.hidden_gradient * loss_gradient, None, None, None, None


@torch.compiler.disable  # a loop over chunks: nothing to gain, and a long time to trace
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    uniforms: Tensor | None = None,
    precision: Precision | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Summed cross-entropy of softmax(hidden @ weight^T), against labels or labels sampled from it.

    Args:
        hidden: [..., d].
        weight: [v, d], constant.
        labels: [...] int64; positions at `ignore_index` carry no loss.
        uniforms: [...] in [0, 1): labels are sampled from the softmax with these, where `labels` is not ignored.
        precision: of the products; by default that of `hidden`.
    Returns:
        Scalar, nats.
    """
    if precision is None:
        precision = Precision(hidden.dtype, torch.promote_types(hidden.dtype, torch.float32))
    carries_loss = labels != ignore_index
    hidden = hidden[carries_loss]
    if uniforms is not None:
        return _LinearCrossEntropy.apply(hidden, weight, None, uniforms[carries_loss], precision)
    return _LinearCrossEntropy.apply(hidden, weight, labels[carries_loss], None, precision)
