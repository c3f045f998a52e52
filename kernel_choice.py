"""Which implementation of the fast paths runs where: compiled by numba, by Triton, or plain torch.

L2O_KERNELS in the environment asks for one: "torch", "numba", or "triton" for `lstm_triton` on CUDA. Without it, "auto", it is
numba on a CPU if that can be had, else torch.
"""

import functools
import os
from importlib import import_module
from importlib.util import find_spec

import torch

import lstm_blocks

__all__ = ["compiled_kernels", "has_numba", "is_triton", "kernels_for", "takes_numba"]


def kernels_for(weight):
    """The module that runs the LSTM without a graph where that weight (1, H) is.

    On a CPU `lstm_numba` if numba can be had, else `lstm_blocks`, which is slower, does the same and also runs on CUDA.
    """
    if asked_for() == "triton" and import_module("lstm_triton").supports(weight):
        return import_module("lstm_triton")
    return compiled_kernels() if takes_numba(weight) else lstm_blocks


def takes_numba(tensor):
    """Whether loops compiled by numba may run on tensors like this one, and can be had."""
    wanted = asked_for()
    if wanted == "torch" or tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return wanted == "numba" or has_numba()


def asked_for():
    wanted = os.environ.get("L2O_KERNELS", "auto")
    if wanted not in ("auto", "numba", "torch", "triton"):
        raise ValueError(f'L2O_KERNELS must be "auto", "numba", "torch" or "triton", got {wanted!r}')
    return wanted


def is_triton(kernels):
    return kernels.__name__ == "lstm_triton"


@functools.cache
def has_numba():
    return find_spec("numba") is not None


@functools.cache
def compiled_kernels():
    return import_module("lstm_numba")  # only now: importing numba takes a second
