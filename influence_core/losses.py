"""Cross-entropy of a linear head, without ever holding the logits of a whole batch.

A language model's head makes [positions, vocabulary] logits, for GPT-2 sixty times the size of its input. Here they
exist only for one chunk of positions at a time: logits, label sampling, loss and the gradients are done while the chunk
is at hand. Cost: 2 t d v FLOPs, and as many again for each gradient wanted, that of the hidden state (influence) and
that of the weight (training); memory: chunk * v floats.
"""

import torch
from torch import Tensor

from influence_core.labels import sample_categorical
from influence_core.precision import active_precision

# Positions whose logits are held at once, enough for products at full speed; and bytes of these logits, at most.
CHUNK_ROWS = {"cpu": 512, "cuda": 8192}
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, uniforms, precision):
        """hidden [p, d], weight [v, d], labels [p] or None, uniforms [p] or None -> summed loss."""
        operand_weight = precision.operand(weight)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=precision.sum_dtype) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=precision.sum_dtype)
        most = CHUNK_BYTES[hidden.device.type] // (weight.shape[0] * loss.element_size())
        chunk = min(CHUNK_ROWS[hidden.device.type], max(16, most))
        buffer = None
        if hidden.device.type == "cpu":  # the same memory for every chunk: fresh pages cost like a product
            buffer = loss.new_empty(min(chunk, len(hidden)), weight.shape[0])
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            operands = precision.operand(hidden[rows])
            logits = precision.matmul(
                operands, operand_weight.t(), out=None if buffer is None else buffer[: len(operands)]
            )
            maximum = logits.amax(-1, keepdim=True)
            target_logit = None if labels is None else logits.gather(-1, labels[rows, None]) - maximum
            weights = logits.sub_(maximum).exp_()
            total = weights.sum(-1, keepdim=True)
            if labels is None:  # a category is sampled only where its weight is not zero
                target = sample_categorical(weights, uniforms[rows]).unsqueeze(-1)
                target_logit = weights.gather(-1, target).clamp_min(torch.finfo(weights.dtype).tiny).log()
            else:
                target = labels[rows, None]
            loss += (total.log() - target_logit).sum()
            if hidden_gradient is None and weight_gradient is None:
                continue
            logit_gradient = weights.div_(total)  # softmax - onehot
            logit_gradient.scatter_add_(-1, target, torch.full_like(total, -1.0))
            logit_gradient = precision.operand(logit_gradient)
            if hidden_gradient is not None:
                hidden_gradient[rows] = precision.matmul(logit_gradient, operand_weight)
            if weight_gradient is not None:
                precision.add_matmul(weight_gradient, logit_gradient.t(), precision.operand(hidden[rows]))
        ctx.gradients = hidden_gradient, weight_gradient
        return loss

    @staticmethod
    def backward(ctx, loss_gradient):
        scaled = (None if gradient is None else gradient * loss_gradient for gradient in ctx.gradients)
        return *scaled, None, None, None


@torch.compiler.disable  # a loop over chunks: nothing to gain, and a long time to trace
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    uniforms: Tensor | None = None,
    ignore_index: int = -100,
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
    hidden = hidden[carries_loss]
    if uniforms is not None:
        return _LinearCrossEntropy.apply(hidden, weight, None, uniforms[carries_loss], precision)
    return _LinearCrossEntropy.apply(hidden, weight, labels[carries_loss], None, precision)
