"""What compiled loops are handed: states and tensors as arrays, and the memory that a window keeps for its replay."""

import numpy as np
import torch

from gradbuffer.kernels.interface import LSTMKernels
from gradbuffer.kernels.llvm_blocks import LANES, REGISTER
from gradbuffer.kernels.numba_threads import windows_at_once

__all__ = ["GateTape", "WORTHWHILE", "array", "as_rows", "flat", "in_rows", "most_bytes"]

TAPE_BYTES = 208 << 20  # of a `GateTape`: all of 20 steps of the paper's network on MNIST
STATE_BYTES = 48 << 20  # of the state on it, at most: larger ones lie as they do elsewhere
WORTHWHILE = 0.5  # share of the top layer's tiles for which a tape must have room: for less it has none


class GateTape:
    """Memory for what a window's steps compute and its replay would else compute again, their gates; and for the state between
    steps, tile by tile, since rows that lie far apart are slow to read and write.

    The state comes first, then the gates of as many tiles as fit, the top layer's first, whose products are larger.
    `shares` says for how many tiles of each layer there is room. The memory is kept for the next window, since new memory
    costs as much time as it saves.
    """

    spare = []  # what the last window left, if it is not in use

    def __init__(self, kernels: LSTMKernels, coordinates: int, steps: int, with_state: bool = True):
        layers, H, size = kernels.layers, kernels.hidden, kernels.weights.itemsize
        self.kernels, self.steps = kernels, steps
        self.strides, tiles = np.array([H * LANES, LANES, layers * H * LANES]), -(-coordinates // LANES)
        state, gates = 2 * tiles * layers * H * LANES, 4 * steps * H * LANES  # numbers; of a layer of a tile
        state = state if with_state and steps > 1 and state * size <= STATE_BYTES else 0
        fit = (most_bytes(windows_at_once()) - state * size) // (gates * size)
        fit = fit if fit >= WORTHWHILE * tiles else 0
        shares = [min(max(fit - above * tiles, 0), tiles) for above in reversed(range(layers))]
        self.shares, needed = np.array(shares, np.int64), (state + sum(shares) * gates) * size
        try:
            self.memory = GateTape.spare.pop()
        except IndexError:
            self.memory = allocate_aligned(0)
        if len(self.memory) < needed:
            self.memory = None  # not both at once
            self.memory = allocate_aligned(needed)
        numbers = self.memory[:needed].view(kernels.weights.dtype)
        self.state, self.gates = numbers[:state].reshape(2, state // 2), numbers[state:]

    def release(self):
        """The next window may have the memory."""
        GateTape.spare[windows_at_once() - 1 :] = [self.memory]
        self.memory = self.gates = self.state = None


def most_bytes(windows):
    """Of a `GateTape`, at most, where so many windows run at once."""
    return min(TAPE_BYTES, 4 * TAPE_BYTES // windows)


def allocate_aligned(size):
    """Bytes, the first at a multiple of what a vector takes."""
    memory = np.empty(size + REGISTER, np.uint8)
    start = -memory.ctypes.data % REGISTER
    return memory[start : start + size]


def flat(hidden, cells):
    """What compiled functions are told of a state (layers, H, N): arrays in one piece, and the strides of layers, rows, tiles."""
    return hidden.reshape(-1), cells.reshape(-1), np.array([hidden[0].size, hidden.shape[2], LANES])


def in_rows(*parts):
    """Whether a state's tensors (layers, H, N) are those of whole ones, or of the same stretch of their coordinates."""
    strides = parts[0].stride()
    return (
        strides[2] == 1
        and strides[0] == parts[0].shape[1] * strides[1]
        and all(part.stride() == strides for part in parts)
    )


def as_rows(hidden: torch.Tensor, cells: torch.Tensor):
    """`flat` for tensors, of the memory itself where that is `in_rows`."""
    if not in_rows(hidden, cells):
        return flat(array(hidden), array(cells))
    layer, row, _ = hidden.stride()
    size = (len(hidden) - 1) * layer + (hidden.shape[1] - 1) * row + hidden.shape[2]
    numbers = (array(part.as_strided((size,), (1,))) for part in (hidden, cells))
    return *numbers, np.array([layer, row, LANES])


def array(tensor: torch.Tensor):
    """A numpy array of the same memory, or a copy if that is not in one piece. bfloat16 as int16."""
    tensor = (tensor.detach() if tensor.requires_grad else tensor).contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
