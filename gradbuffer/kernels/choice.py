"""Which kernels run where: for each piece of work the first of `KINDS` that has no reasons against it.

L2O_KERNELS in the environment asks for one: "triton" (on CUDA, or on a CPU in its interpreter), "numba" (on a CPU), "torch" or
"plain". Where that one has reasons against a piece of work, the ones after it are asked. "auto", the default, asks all: triton on
CUDA where it is installed and has passed a check at its first use, numba on a CPU.
"""

import functools
import os
import pkgutil
from importlib.util import find_spec
from typing import NamedTuple

import torch

from gradbuffer.kernels.interface import LSTMKernels

__all__ = [
    "KINDS",
    "asked_for",
    "has_numba",
    "kernels_for",
    "load",
    "reasons_against",
    "reasons_against_triton",
    "takes_numba",
    "takes_triton",
]


class Kind(NamedTuple):
    """Kernels that are imported only when they are asked: numba takes a second, and not everybody has it."""

    place: str  # module:class
    needs: str | None = None  # a package
    devices: tuple | None = None  # the types on which they run; None for any


KINDS = {
    "triton": Kind("gradbuffer.kernels.triton_lstm:TritonLSTM", "triton", ("cuda",)),
    "numba": Kind("gradbuffer.kernels.numba_lstm:NumbaLSTM", "numba", ("cpu",)),
    "torch": Kind("gradbuffer.kernels.torch_blocks:TorchLSTM"),
    "plain": Kind("gradbuffer.kernels.interface:LSTMKernels"),
}


def kernels_for(weight: torch.Tensor, work: str = "step", **needs) -> type[LSTMKernels]:
    """The kernels that do a piece of work for the LSTM whose output weight (1, H) this is, where it lies.

    Args:
        weight, work, needs: as of `LSTMKernels.reasons_against`.

    Raises:
        ValueError: L2O_KERNELS is none of these kinds; or none of the kinds allowed does this.
        ImportError: L2O_KERNELS asks for one whose package is not installed.
    """
    for name in kinds_allowed():
        if not refuse(name, weight, work, needs):
            return load(KINDS[name].place)
    reasons = {name: reasons_against(name, weight, work, **needs) for name in kinds_allowed()}
    needs = {name: need for name, need in needs.items() if name not in ("lstm", "p")}
    raise ValueError(
        f"no kernels do a {work} with {needs} for a weight {tuple(weight.shape)} of {weight.dtype} on "
        f"{weight.device}: {reasons}"
    )


def reasons_against(name: str, weight: torch.Tensor, work: str, **needs) -> list[str]:
    """Why the kernels of that name do not do this; empty where they do. Arguments as of `kernels_for`."""
    if name not in kinds_allowed():
        return [f"L2O_KERNELS={asked_for()} asks for another"]
    return refuse(name, weight, work, needs)


def refuse(name, weight, work, needs):
    """`reasons_against` one of the kinds allowed."""
    kind = KINDS[name]
    interpreted = name == asked_for() == "triton"  # on the CPU, where it is asked to; it says itself if it cannot
    if kind.devices and weight.device.type not in kind.devices and not interpreted:
        return [f"runs on {' and '.join(kind.devices)}, the network is on {weight.device}"]
    if kind.needs and not is_installed(kind.needs):
        if asked_for() == name:
            raise ImportError(
                f"L2O_KERNELS={name} needs {kind.needs}, which is not installed: pip install {kind.needs}"
            )
        return [f"{kind.needs} is not installed: pip install {kind.needs}"]
    return load(kind.place).reasons_against(weight, work, **needs)


def takes_numba(tensor: torch.Tensor) -> bool:
    """Whether other loops compiled by numba may run on tensors like this one, and can be had."""
    fits = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
    return fits and "numba" in kinds_allowed() and (has_numba() or asked_for() == "numba")


def takes_triton(tensor: torch.Tensor) -> bool:
    """Whether other kernels in Triton may run on tensors like this one, and can be had."""
    fits = tensor.is_cuda and tensor.dtype in (torch.float32, torch.float64)
    return fits and "triton" in kinds_allowed() and is_installed("triton")


def reasons_against_triton(tensor: torch.Tensor) -> list[str]:
    """Why other kernels in Triton may not run on tensors like this one; empty where they may, or may in the interpreter."""
    if "triton" not in kinds_allowed():
        return [f"L2O_KERNELS={asked_for()} asks for another"]
    if not tensor.is_cuda and asked_for() != "triton":
        return [f"runs on cuda, the parameters are on {tensor.device}"]
    return [] if is_installed("triton") else ["triton is not installed: pip install triton"]


def has_numba() -> bool:
    """Whether numba is installed."""
    return is_installed("numba")


def asked_for() -> str:
    """What the environment asks for."""
    return os.environ.get("L2O_KERNELS", "auto")


def kinds_allowed():
    """The names of `KINDS` from the one that is asked for on."""
    wanted = asked_for()
    if wanted not in ORDERS:
        raise ValueError(f"L2O_KERNELS must be one of {', '.join(ORDERS)}, got {wanted!r}")
    return ORDERS[wanted]


ORDERS = {name: list(KINDS)[number:] for number, name in enumerate(KINDS)}
ORDERS["auto"] = list(KINDS)


@functools.cache
def is_installed(package):
    return find_spec(package) is not None


@functools.cache
def load(place: str) -> type[LSTMKernels]:
    """The class of a "module:class", imported."""
    return pkgutil.resolve_name(place)
