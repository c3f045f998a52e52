"""Checks at the door, shared by the modules: each names the argument, the value received and what is accepted."""

import contextlib
import contextvars
import math

import torch

__all__ = ["NonFiniteError", "check_count", "check_finite", "check_positive_number", "sum_is_finite",
           "values_are_checked", "values_unchecked"]

ALONE = 1 << 15  # elements that torch sums without its threads
looking = contextvars.ContextVar("looking", default=True)  # whether `check_finite` does


class NonFiniteError(ValueError):
    """A gradient, a loss or a meta-gradient is infinite or not a number."""


def check_count(least=1, **counts):
    """Raise unless every keyword argument is an int of at least `least`."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive_number(**numbers):
    """Raise unless every keyword argument is a finite number above 0."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def sum_is_finite(tensor):
    """Whether a tensor's sum is finite, in one pass over it. If not, the sum itself may have overflown.

    On a CPU in pieces too small for torch to wake its threads: they then wait for more work, busily and for some ms, on
    cores that ours need (N = 10^5, two cores: a step takes 1.4 times as long).
    """
    pieces = tensor.flatten().split(ALONE) if tensor.device.type == "cpu" and tensor.numel() > ALONE else (tensor,)
    return all(math.isfinite(piece.sum().item()) for piece in pieces)


def check_finite(tensor, name):
    """Raise NonFiniteError, naming the first coordinate, unless all of `tensor` is finite."""
    if not looking.get() or sum_is_finite(tensor):
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        where = int((~finite).flatten().nonzero()[0])
        raise NonFiniteError(f"{name} must be finite, but holds {tensor.flatten()[where].item()} at coordinate {where} "
                             f"({int((~finite).sum())} of {tensor.numel()} are not finite)")


def values_are_checked():
    """Whether we are not within `values_unchecked`."""
    return looking.get()


@contextlib.contextmanager
def values_unchecked():
    """Within it `check_finite` lets everything pass: to look at a value, a program has to wait for the device."""
    token = looking.set(False)
    try:
        yield
    finally:
        looking.reset(token)
