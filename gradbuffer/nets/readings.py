"""What learned optimizers read of the gradient, and the weights of those that answer -∇ with exactly the opposite updates.

Andrychowicz et al. 2016 (arXiv 1606.04474), appendix A. A new preprocessing is a new entry of `READINGS`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["READINGS", "Readings", "check_preprocess", "log_sign", "odd_part"]


def log_sign(grad: torch.Tensor, p: float = 10.0) -> torch.Tensor:
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


class Readings(NamedTuple):
    """One way to read a gradient."""

    of: Callable  # (gradients (..., N), p) -> (..., inputs, N), without weights; carries a graph if they do
    signs: tuple  # of each reading 1 or -1, what becomes of it where ∇ becomes -∇; as many as there are inputs
    built_in: Callable | None = (
        None  # p -> the `p` of `LSTMKernels` that do the same; None: compiled kernels cannot do it
    )


READINGS = {  # by the name of `preprocess`
    None: Readings(lambda grad, p: grad.unsqueeze(-2), (-1,), lambda p: 0.0),
    "log_sign": Readings(lambda grad, p: log_sign(grad, p).movedim(0, -2), (1, -1), lambda p: float(p)),
    "with_log_size": Readings(lambda grad, p: torch.stack([grad, log_sign(grad, p)[0]], -2), (-1, 1)),
}


def check_preprocess(preprocess: str | None, p: float, output_scale: float) -> None:
    """Raise ValueError unless these are a name in `READINGS`, a number in (0, 80] and a finite number other than 0."""
    if preprocess not in READINGS:
        raise ValueError(f"preprocess must be one of {list(READINGS)}, got {preprocess!r}")
    if isinstance(p, bool) or not (isinstance(p, (int, float)) and 0 < p <= 80):
        raise ValueError(f"p must be a number in (0, 80], got {p!r}")
    if not (isinstance(output_scale, (int, float)) and math.isfinite(output_scale) and output_scale != 0):
        raise ValueError(f"output_scale must be a finite number other than 0, got {output_scale!r}")


@torch.no_grad()
def odd_part(tensors: dict, hidden_size: int, input_signs: tuple, shared: int = 0) -> dict:
    """The nearest weights with which an LSTM optimizer is odd; of a meta-gradient, its part along such weights.

    Optimizees whose coordinates could as well have the other sign, such as random quadratics or a network's weights, give
    an optimizer no reason to tell the two apart. Under ∇ → -∇ units come in three kinds: *odd* ones change sign (of 20:
    the first 6), *even* ones stay (the next 2), and the others come in pairs that change places. An LSTM keeps to that if
    its weights stay the same when rows and columns are exchanged and signed accordingly: gates must be even, candidates
    are as their units, the linear layers on top are odd. The mean of the weights and of the exchanged ones is the nearest
    such point. Adam keeps to it too, since tied entries have the same history.

    Args:
        tensors: dict like `state_dict()`: an `nn.LSTM` under the name "lstm" and linear layers. Not changed.
        hidden_size: units in each layer.
        input_signs: what becomes of each reading, 1 or -1.
        shared: how many units at the end of each layer are even, whatever the others are.

    Returns:
        dict of new tensors, no graph.
    """
    first, shapes = next(iter(tensors.values())), tuple((name, tensor.shape) for name, tensor in tensors.items())
    places, signs = exchange(shapes, hidden_size, tuple(input_signs), shared, first.device, first.dtype)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    parts = ((flat + flat.index_select(0, places) * signs) / 2).split([shape.numel() for _, shape in shapes])
    return {name: part.view(shape) for (name, shape), part in zip(shapes, parts)}


@functools.cache
def exchange(shapes, hidden_size, input_signs, shared, device, dtype):
    """Which place of a vector of these tensors comes to which, and with what sign: indices, and 1 or -1."""
    H, own = hidden_size, hidden_size - shared
    odd, even = 3 * own // 10, own // 10 + (own - 3 * own // 10 - own // 10) % 2
    place, sign = torch.arange(H, device="cpu"), torch.ones(H, device="cpu")
    place[odd + even : own] = place[odd + even : own].view(-1, 2).flip(1).flatten()
    sign[:odd] = -1
    units = place, sign
    rows = torch.cat([place + gate * H for gate in range(4)]), torch.cat([sign.abs(), sign.abs(), sign, sign.abs()])
    inputs = torch.arange(len(input_signs), device="cpu"), torch.tensor(input_signs, device="cpu").float()
    start, places, exchanged_signs = 0, [], []
    for name, shape in shapes:
        numbers = torch.arange(start, start + shape.numel(), device="cpu").view(shape)
        changes, start = torch.ones(shape, device="cpu"), start + shape.numel()
        kinds = [
            rows
            if name.startswith("lstm.")
            else (torch.arange(shape[0], device="cpu"), -torch.ones(shape[0], device="cpu"))
        ]
        if len(shape) == 2:
            kinds.append(inputs if name == "lstm.weight_ih_l0" else units)
        for dim, (which, signs) in enumerate(kinds):
            numbers = numbers.index_select(dim, which)
            changes = changes * signs.view([-1] + [1] * (len(shape) - 1 - dim))
        places.append(numbers.flatten())
        exchanged_signs.append(changes.flatten())
    with torch.inference_mode(False):
        return torch.cat(places).to(device), torch.cat(exchanged_signs).to(device, dtype)
