"""What learned optimizers read instead of the bare gradient: its size on a logarithmic scale, and its sign.

Andrychowicz et al. 2016 (arXiv 1606.04474), appendix A.
"""

import math

import torch

__all__ = ["log_sign"]


def log_sign(grad, p=10.0):
    """Split gradients into the logarithm of their size and their sign, so that every scale is readable.

    ∇ becomes (log|∇| / p, sgn ∇) where |∇| ≥ e^-p, and (-1, e^p ∇) below. Both parts are continuous at the threshold.

    Args:
        grad: (N,), any scale.
        p: positive; gradients down to e^-p keep their logarithm. Default 10, the paper's.

    Returns:
        (2, N), features along rows; carries a graph if `grad` does.

    Reference: Andrychowicz et al. 2016, appendix A.
    """
    size = grad.abs().clamp(min=math.exp(-p)).log().div(p)
    return torch.stack([size, (grad * math.exp(p)).clamp(-1, 1)])
