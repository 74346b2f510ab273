"""The four strategies: how the Fisher of a layer is approximated, and its inverse applied to a gradient.

    identity   F = I
    diagonal   F = diag(Lambda),                  Lambda = E[g^2]
    kfac       F = Q diag(w_G w_A^T) Q^T,         from the eigenvalues of the covariances
    ekfac      F = Q diag(Lambda) Q^T,            Lambda = E[(Q_G^T g Q_A)^2]

with Q = Q_G kron Q_A, and `(F + damping)^-1 g` computed without ever building F.

Sources: Martens and Grosse 2015, arXiv:1503.05671; George et al. 2018, arXiv:1806.03884; damping: Grosse et al. 2023,
arXiv:2308.03296, section 3.1.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_core.captured import Captured
from influence_core.errors import UserError
from influence_core.factors.eigenbasis import Eigenbasis
from influence_core.files import Tensors
from influence_core.layers import TrackedLayer
from influence_core.precision import Precision

HEURISTIC = "heuristic"
HEURISTIC_SCALE = 0.1
ROWS_AT_ONCE = 4096  # of eigenvalues that are inverted in float64: a vocabulary has many

Damping = float | str  # an absolute number; "0.5x": 0.5 x the layer's mean eigenvalue; or HEURISTIC, that is "0.1x"


def damping_scale(damping: Damping | None) -> float | None:
    """How many times the layer's mean eigenvalue, or None for an absolute number.

    Raises:
        UserError: it is neither, or a number that float32 does not hold as a positive one.
    """
    if damping is None:
        return None
    is_multiple = isinstance(damping, str)
    try:
        number = (
            HEURISTIC_SCALE if damping == HEURISTIC else float(damping.removesuffix("x") if is_multiple else damping)
        )
    except (TypeError, ValueError):
        number = math.nan
    if (is_multiple and damping != HEURISTIC and not damping.endswith("x")) or not 0 <= number < math.inf:
        raise UserError(f"--damping_factor is a number, a multiple such as 0.5x, or {HEURISTIC}, not {damping!r}")
    limits = torch.finfo(torch.float32)
    is_none = number == 0 and not is_multiple  # for whoever knows that every eigenvalue is positive
    if not is_none and not limits.tiny <= number <= limits.max:
        raise UserError(
            f"--damping_factor {damping} is outside float32's range, {limits.tiny:.1e} to {limits.max:.1e}: too little "
            "divides by zero in every direction that the data never shows"
        )
    return number if is_multiple else None


def damped_inverse(layer: TrackedLayer, eigenvalues: Tensor, damping: Damping, is_live: bool = False) -> Tensor:
    """1 / (eigenvalues + damping) [out, in(+1)]; zero for a layer without any gradient, which counts nothing.

    (Its mean eigenvalue is zero, so that no multiple of it is a damping.)

    Args:
        is_live: it is known to have a gradient, so that eigenvalues of zero are squares that are too small to be held.
    Raises:
        UserError: the inverse is beyond the range of the eigenvalues' dtype.
    """
    scale, mean = damping_scale(damping), eigenvalues.mean(dtype=torch.float64)
    added = damping if scale is None else scale * mean
    inverse = torch.empty_like(eigenvalues)
    for some, into in zip(eigenvalues.split(ROWS_AT_ONCE), inverse.split(ROWS_AT_ONCE)):
        into.copy_((some.double() + added).reciprocal_())
    if scale is not None and not is_live:
        inverse.masked_fill_(~eigenvalues.any(), 0)
    if not inverse.isfinite().all():
        raise UserError(
            f"some eigenvalues of layer {layer.name} (mean {float(mean):.1e}) are so small that the damped "
            f"inverse is beyond {str(eigenvalues.dtype).removeprefix('torch.')}'s range: raise --damping_factor, or "
            "leave the layer out"
        )
    return inverse


@dataclass(frozen=True)
class Strategy:
    """What a strategy needs to be fitted, at a layer whose Fisher factors into covariances."""

    name: str
    in_eigenbasis: bool
    needs_lambda: bool

    def of(self, layer: TrackedLayer) -> "Strategy":
        """Itself, or the diagonal one in its place at a layer of no such factors."""
        return self if layer.is_kronecker or not self.in_eigenbasis else STRATEGIES["diagonal"]

    def scale(self, num_train: int, num_positions: Mapping[str, int] | None = None) -> float | None:
        """score / scale is the change that leaving the example out is predicted to make; None where only ranks count.

        Args:
            num_positions: by layer, over which the covariances are means: F is one over as many, and not over examples,
                where no Lambda corrects it. Their median counts for all layers.
        """
        if self.needs_lambda:
            return float(num_train)
        return float(statistics.median(num_positions.values())) if self.in_eigenbasis and num_positions else None


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("identity", in_eigenbasis=False, needs_lambda=False),
        Strategy("diagonal", in_eigenbasis=False, needs_lambda=True),
        Strategy("kfac", in_eigenbasis=True, needs_lambda=False),
        Strategy("ekfac", in_eigenbasis=True, needs_lambda=True),
    )
}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name; raises UserError where there is none."""
    if name not in STRATEGIES:
        raise UserError(f"unknown factor strategy {name!r}: choose from {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


class Preconditioner:
    """(F + damping)^-1 of one layer, for several strategies at once: those with the same eigenvectors share rotations.

    Args:
        strategies: (strategy, factors), the factors by kind: the layer's "lambda_matrix" [out, in(+1)],
            "activation_eigenvectors" [in(+1), in(+1)], "gradient_eigenvectors" [out, out], "activation_eigenvalues"
            [in(+1)], "gradient_eigenvalues" [out]; those that the strategy needs. Strategies share a rotation where
            they are given the very same eigenvectors.
        damping: added to every eigenvalue, in its units (loss^2 per weight^2).
        dtype: of the products.
        is_live: see `damped_inverse`.
    Raises:
        UserError: see `damped_inverse`.
    """

    def __init__(
        self,
        layer: TrackedLayer,
        strategies: list[tuple[Strategy, Tensors]],
        damping: Damping,
        dtype: torch.dtype,
        is_live: bool = False,
    ):
        self.layer, self.dtype = layer, dtype
        self.inverses: list[Tensor | None] = []
        self.bases: list[Eigenbasis | None] = []
        made: dict[int, Eigenbasis] = {}
        for strategy, factors in ((strategy.of(layer), factors) for strategy, factors in strategies):
            basis, eigenvalues = None, factors.get("lambda_matrix")
            if strategy.in_eigenbasis:
                vectors = factors["activation_eigenvectors"], factors["gradient_eigenvectors"]
                if id(vectors[0]) not in made:
                    made[id(vectors[0])] = Eigenbasis(layer, *vectors, Precision(dtype, dtype))
                basis = made[id(vectors[0])]
                if not strategy.needs_lambda:
                    eigenvalues = torch.outer(factors["gradient_eigenvalues"], factors["activation_eigenvalues"])
            inverse = None
            if eigenvalues is not None:
                inverse = damped_inverse(layer, eigenvalues, damping, is_live)
            if basis is not None:
                inverse = torch.nn.functional.pad(inverse, (0, basis.num_padding_columns))
            self.bases.append(basis)
            self.inverses.append(inverse)

    def of_captured(self, captured: Captured) -> Iterator[Tensor]:
        """(F + damping)^-1 g for each strategy in turn, of the per-sample gradients g.

        Returns:
            [n, out, in(+1)] for each strategy; the caller may not change them in place.
        """
        return self._apply(*self._makers(captured))

    def of_gradients(self, gradients: Tensor) -> Iterator[Tensor]:
        """As `of_captured`, of gradients [n, out, in(+1)] that are at hand."""
        gradients = gradients.to(self.dtype)
        return self._apply(lambda: gradients, lambda basis: basis.rotate(gradients))

    def self_products(self, captured: Captured) -> Iterator[Tensor]:
        """g^T (F + damping)^-1 g for each strategy in turn, [n] each; nothing has to be rotated back."""
        return self._squares(*self._makers(captured))

    def self_products_of(self, gradients: Tensor) -> Iterator[Tensor]:
        """As `self_products`, of gradients [n, out, in(+1)] that are at hand."""
        gradients = gradients.to(self.dtype)
        return self._squares(lambda: gradients, lambda basis: basis.rotate(gradients))

    def _makers(self, captured: Captured) -> tuple[Callable[[], Tensor], Callable[[Eigenbasis], Tensor]]:
        """What makes the gradients, see `_in_bases`."""
        captured = captured.to(self.dtype)
        return lambda: self.layer.matrix_gradients(captured), lambda basis: basis.rotated_gradients(captured)

    def _apply(self, *make: Callable) -> Iterator[Tensor]:
        for basis, gradients, inverse in self._in_bases(*make):
            gradients = gradients if inverse is None else gradients * inverse
            yield gradients if basis is None else basis.rotate_back(gradients)

    def _squares(self, *make: Callable) -> Iterator[Tensor]:
        for _, gradients, inverse in self._in_bases(*make):
            divided = gradients if inverse is None else gradients * inverse
            yield (divided * gradients).sum((1, 2))

    def _in_bases(
        self, plain: Callable[[], Tensor], rotated: Callable[[Eigenbasis], Tensor]
    ) -> Iterator[tuple[Eigenbasis | None, Tensor, Tensor | None]]:
        """(basis, gradients in it, damped inverse) for each strategy; the arguments make gradients where needed."""
        made: dict[int, Tensor] = {}
        for basis, inverse in zip(self.bases, self.inverses):
            key = id(basis)
            if key not in made:
                made[key] = plain() if basis is None else rotated(basis)
            yield basis, made[key], inverse
