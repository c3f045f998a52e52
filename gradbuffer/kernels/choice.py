"""Which implementation of the fast paths runs where: compiled by numba, by Triton, or plain torch.

L2O_KERNELS in the environment asks for one: "torch", "numba", or "triton" for `triton_lstm` on CUDA. Without it, "auto", it is
numba on a CPU if that can be had, else torch.
"""

import functools
import os
from importlib import import_module
from importlib.util import find_spec

import torch

from gradbuffer.kernels import torch_blocks

__all__ = ["compiled_kernels", "has_numba", "is_triton", "kernels_for", "takes_numba"]


def kernels_for(weight):
    """The module that runs the LSTM without a graph where that weight (1, H) is.

    On a CPU `numba_lstm` if numba can be had, else `torch_blocks`, which is slower, does the same and also runs on CUDA.
    """
    if asked_for() == "triton" and import_module("gradbuffer.kernels.triton_lstm").supports(weight):
        return import_module("gradbuffer.kernels.triton_lstm")
    return compiled_kernels() if takes_numba(weight) else torch_blocks


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
    return kernels.__name__ == "gradbuffer.kernels.triton_lstm"


@functools.cache
def has_numba():
    return find_spec("numba") is not None


@functools.cache
def compiled_kernels():
    return import_module("gradbuffer.kernels.numba_lstm")  # only now: importing numba takes a second
