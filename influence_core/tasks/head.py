"""What the head of a language model makes of hidden states: a plain matrix product, or something of its own.

Where the logits are the hidden states times the head's weight, and nothing else, they need not be held for a whole
batch (losses.py). Whether they are is proven on the model: a bias, a scale, a soft cap or a factor that training moves
is found out, and then its own logits are taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_core.compiled import uncompiled
from influence_core.errors import UserError
from influence_core.layers.finding import output_head
from influence_core.losses import cross_entropy, linear_cross_entropies, linear_cross_entropy
from influence_core.sharded_units import own_class
from influence_core.sharding import whole

AMPLIFIED = (1.0, 1e3)  # hidden states times these: a soft cap shows where logits are large
PROVEN_ON = 16  # positions


@contextmanager
def head_input(head: nn.Module, num_kept: int = 1, amplify: float | None = None) -> Iterator[list[Tensor]]:
    """Inside, a forward pass of the model leaves here what its head was to read, [..., positions, d].

    The head itself is given the last `num_kept` positions only, or these apart from the model and amplified.
    """
    seen: list[Tensor] = []

    @uncompiled  # what is compiled knows no single call
    def keep(module, arguments, keywords):
        (hidden,) = (*arguments, *keywords.values())
        kept = hidden[..., -num_kept:, :]
        if amplify is not None:
            hidden = kept = kept.detach() * amplify
        seen.append(hidden)
        return (kept,), {}

    handle = head.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def head_is_matrix(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the logits are the head's input times its weight: by numbers, and by the parameters that they depend on.

    Args:
        inputs: of the model, of one small batch.
    """
    head = output_head(model)
    if own_class(head) is not nn.Linear or head.bias is not None or head.weight.is_meta:
        return False
    requires_grad = head.weight.requires_grad
    head.weight.requires_grad_(True)
    try:
        for factor in AMPLIFIED:
            with torch.enable_grad(), head_input(head, PROVEN_ON, factor) as seen:
                logits = model(**inputs).logits
            if len(seen) != 1 or seen[0].shape[:-1] != logits.shape[:-1]:
                return False
            with torch.no_grad():
                product = seen[0] @ whole(head.weight).t()
                tolerance = max(1e-5, 4 * torch.finfo(product.dtype).eps)
                if not (logits - product).norm() <= tolerance * product.norm():
                    return False
            leaves = _leaves(logits)  # the weight, or what was gathered of it
            if len(leaves) > 1 or any(leaf.shape != head.weight.shape for leaf in leaves):
                return False
    finally:
        head.weight.requires_grad_(requires_grad)
    return True


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The parameters that a tensor depends on."""
    todo, known, leaves = [tensor.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return leaves


@dataclass(frozen=True)
class TokenScores:
    """What a model says of the tokens at each position, as logits or as what a plain head would make them of."""

    states: Tensor  # [rows, positions, categories], or [rows, positions, d] where there is a weight
    weight: Tensor | None = None  # [categories, d]

    def loss(self, labels: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """Summed cross-entropy against labels [rows, positions], or against labels sampled with the uniforms there."""
        self._require_fit(labels)
        if self.weight is None:
            return cross_entropy(self.states, labels, uniforms)
        return linear_cross_entropy(self.states, self.weight, labels, uniforms)

    def _require_fit(self, labels: Tensor) -> None:
        if self.states.shape[:-1] != labels.shape:
            raise UserError(
                f"the model speaks of {tuple(self.states.shape[:-1])} rows and positions where the batch has "
                f"{tuple(labels.shape)}: its loss is not one of the next token at each position"
            )

    def losses(self, labels: Tensor) -> Tensor:
        """The loss of each row by itself, [rows] float64; without a gradient."""
        self._require_fit(labels)
        if self.weight is not None:
            return linear_cross_entropies(self.states, self.weight, labels).double().sum(1)
        return torch.stack([cross_entropy(*row) for row in zip(self.states, labels)]).double()


def token_scores(model: nn.Module, inputs: dict[str, Tensor], is_matrix: bool, head: nn.Module | None) -> TokenScores:
    """Run the model, which may be wrapped for several processes; `head` is its own."""
    if not is_matrix:
        return TokenScores(model(**inputs).logits)
    with head_input(head) as seen:
        model(**inputs)
    (hidden,) = seen
    return TokenScores(hidden, head.weight)
