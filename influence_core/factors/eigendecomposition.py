"""Stage 2: the eigendecomposition of each covariance: C = Q diag(w) Q^T, one eigenvector a column."""

import torch
from torch import Tensor

WIDE = 2048  # from this size on a decomposition uses several threads well; smaller ones go side by side


def eigendecomposition(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, negative rounding noise set to 0) and eigenvectors of a covariance.

    Args:
        covariance: [d, d], symmetric positive semi-definite.
    Returns:
        [d] and [d, d], in the dtype of the covariance; computed in float64. Cost: about 9 d^3 FLOPs.
    Raises:
        torch.linalg.LinAlgError: it does not converge, on the device nor on the CPU.
    """
    try:
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
    except torch.linalg.LinAlgError:  # a GPU's library gives up on matrices that LAPACK takes
        if covariance.device.type == "cpu":
            raise
        found = torch.linalg.eigh(covariance.double().cpu())
        eigenvalues, eigenvectors = (x.to(covariance.device) for x in found)
    # Contiguous: eigh returns its eigenvectors by columns, and a broadcast sends memory as it lies.
    return eigenvalues.clamp_(min=0).to(covariance.dtype), eigenvectors.to(covariance.dtype).contiguous()
