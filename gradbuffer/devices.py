"""Where tensors are: one name for each device, its memory, and numbers that are brought there once."""

import functools
from collections.abc import Callable

import torch

__all__ = ["bring", "constant", "drawn_on_cpu", "memory_of", "whole_device"]


def whole_device(device: torch.device | str) -> torch.device:
    """The device with its number, as tensors there say it: "cuda" is the present one of them, such as "cuda:0"."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def drawn_on_cpu(function: Callable) -> Callable:
    """Decorates what draws or loads: the tensors that it makes are on the CPU, as its generator is, whatever the default device."""

    @functools.wraps(function)
    def run(*arguments, **keywords):
        if torch.get_default_device().type == "cpu":
            return function(*arguments, **keywords)
        with torch.device("cpu"):
            return function(*arguments, **keywords)

    return run


def bring(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """What was drawn on the CPU, on a device: as a copy that the host does not wait for, where that is a CUDA device."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory(device).to(device, non_blocking=True)


def memory_of(device: torch.device) -> int:
    """Bytes that a device has in all: a number of the card's, so that a run's blocks do not depend on what else lies there."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 32 << 30


@functools.lru_cache(maxsize=256)
def constant(values: tuple, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A vector of these numbers there, made once: to bring numbers to a device, the host has to wait for it. Not to be changed."""
    with torch.inference_mode(False):  # what is made in that mode cannot be used outside it where autograd records
        return torch.tensor(values, device=device, dtype=dtype)
