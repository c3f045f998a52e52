"""Checks at the door, shared by the modules: each names the argument, the value received and what is accepted."""

import contextlib
import contextvars
import math
import pkgutil
import sys

import torch

__all__ = [
    "CLASS",
    "NonFiniteError",
    "ON",
    "check_count",
    "check_finite",
    "check_positive_number",
    "name_of",
    "named_class",
    "refuse_without_effect",
    "sum_is_finite",
    "values_are_checked",
    "values_unchecked",
]

ALONE = 1 << 15  # elements that torch sums without its threads
looking = contextvars.ContextVar("looking", default=True)  # whether `check_finite` does

ON, CLASS = "on", "module:Class"
OFF = (None, False, 0, [0])


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
        raise NonFiniteError(
            f"{name} must be finite, but holds {tensor.flatten()[where].item()} at coordinate {where} "
            f"({int((~finite).sum())} of {tensor.numel()} are not finite)"
        )


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


def refuse_without_effect(needs, options, given, spell=str):
    """Raise where an option was given that has no effect beside the others.

    A table of needs has rows (options, needed, values): the options, names with spaces between, have an effect only where the option
    `needed` has one of these values. `CLASS` stands for a class of a user's
    own; `ON` for all values but those that switch an option off; a range (0, end) for the numbers
    below its end, and for an option that is off.

    Args:
        needs: a table as above.
        options: dict from name to value, of all options; one that is not there counts as None.
        given: the names of those that were given.
        spell: function from an option's name to what users call it.

    Raises:
        ValueError: names the option, what it needs, and what that is.
    """
    for names, needed, values in needs:
        value = options.get(needed)
        if values == ON:
            effect, reason = value not in OFF, f"needs {spell(needed)}"
        elif values == CLASS:
            effect, reason = ":" in str(value), f"is for {spell(needed)} {CLASS}, got {spell(needed)} {value}"
        elif values == (None,):
            effect, reason = value is None, f"has no effect with {spell(needed)} {value}"
        elif isinstance(values, range):
            effect, reason = value in OFF or value < values.stop, f"has no effect with {spell(needed)} {value}"
        else:
            wanted = " or ".join(f"{spell(needed)} {some}" for some in values).replace(" True", "")
            effect, reason = value in values, f"is for {wanted}, got {spell(needed)} {value}"
        for name in names.split():
            if name in given and not effect:
                raise ValueError(f"{spell(name)} {reason}")


def name_of(function):
    """A function's name for people, or its class's."""
    return getattr(function, "__qualname__", type(function).__name__)


def named_class(text):
    """The class that "module:Class" names, of a module that can be imported from here or from the working folder.

    Raises:
        ValueError: there is no such module or class.
    """
    if "" not in sys.path:
        sys.path.append("")  # a program that was installed does not look into the working folder
    try:
        return pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{text!r} must be module:Class, of a module that can be imported: {error}") from error
