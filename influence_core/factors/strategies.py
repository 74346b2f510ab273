"""The four strategies: how the Fisher of a layer is approximated, and its inverse applied to a gradient.

    identity   F = I
    diagonal   F = diag(Lambda),                  Lambda = E[g^2]
    kfac       F = Q diag(w_G w_A^T) Q^T,         from the eigenvalues of the covariances
    ekfac      F = Q diag(Lambda) Q^T,            Lambda = E[(Q_G^T g Q_A)^2]

with Q = Q_G kron Q_A, and `(F + damping)^-1 g` computed without ever building F.

Sources: Martens and Grosse 2015, arXiv:1503.05671; George et al. 2018, arXiv:1806.03884; damping: Grosse et al. 2023,
arXiv:2308.03296, section 3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_core.errors import UserError
from influence_core.storage import Tensors

HEURISTIC = "heuristic"
HEURISTIC_SCALE = 0.1

Damping = float | str  # an absolute number; "0.5x": 0.5 x the layer's mean eigenvalue; or HEURISTIC, that is "0.1x"


def damping_scale(damping: Damping | None) -> float | None:
    """How many times the layer's mean eigenvalue, or None for an absolute number; UserError for anything else."""
    if not isinstance(damping, str):
        return None
    if damping == HEURISTIC:
        return HEURISTIC_SCALE
    try:
        scale = float(damping.removesuffix("x"))
    except ValueError:
        scale = -1.0
    if not (damping.endswith("x") and 0 <= scale < float("inf")):
        raise UserError(f"--damping_factor is a number, a multiple such as 0.5x, or {HEURISTIC}, not {damping!r}")
    return scale


@dataclass(frozen=True)
class Strategy:
    """What a strategy needs to be fitted."""

    name: str
    in_eigenbasis: bool
    needs_lambda: bool


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
    """(F + damping)^-1 of one layer.

    Args:
        factors: by kind, the layer's "lambda_matrix" [out, in(+1)], "activation_eigenvectors" [in(+1), in(+1)],
            "gradient_eigenvectors" [out, out], "activation_eigenvalues" [in(+1)], "gradient_eigenvalues" [out];
            those that the strategy needs.
        damping: added to every eigenvalue, in its units (loss^2 per weight^2).
    """

    def __init__(self, strategy: Strategy, factors: Tensors, damping: Damping):
        self.inverse = self.activation_eigenvectors = self.gradient_eigenvectors = None
        eigenvalues = None
        if strategy.in_eigenbasis:
            self.activation_eigenvectors = factors["activation_eigenvectors"]
            self.gradient_eigenvectors = factors["gradient_eigenvectors"]
            if not strategy.needs_lambda:
                eigenvalues = torch.outer(factors["gradient_eigenvalues"], factors["activation_eigenvalues"])
        if strategy.needs_lambda:
            eigenvalues = factors["lambda_matrix"]
        if eigenvalues is not None:
            scale = damping_scale(damping)
            added = damping if scale is None else scale * eigenvalues.mean()
            self.inverse = (eigenvalues + added).reciprocal()

    def __call__(self, gradients: Tensor) -> Tensor:
        """(F + damping)^-1 g for each gradient; identity returns its argument.

        Args:
            gradients: [n, out, in(+1)].
        Returns:
            [n, out, in(+1)]. Cost: 4 o i (o + i) FLOPs each in an eigenbasis.
        """
        if self.inverse is None:
            return gradients
        if self.activation_eigenvectors is None:
            return gradients * self.inverse
        rotated = self.gradient_eigenvectors.t() @ (gradients @ self.activation_eigenvectors)
        return self.gradient_eigenvectors @ (rotated.mul_(self.inverse) @ self.activation_eigenvectors.t())
