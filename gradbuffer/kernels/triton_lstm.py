"""The kernels of the coordinatewise LSTM on CUDA: a step and a replay as one Triton kernel each.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1), where the torch operations of `torch_blocks`
would be many launches a layer. The kernels stand in `triton_kernels`; here weights are laid out for them and their
gradients brought back. Triton comes along with CUDA builds of torch; this module imports without it, and without CUDA.
With TRITON_INTERPRET=1 in the environment before the first import of triton, the same kernels run on CPU tensors,
slowly.

Sums are deterministic (no atomics) but depend on the number of programs, so on the device.
"""

import functools
import math
import os
import shutil

import torch

from gradbuffer.kernels.interface import LSTMKernels
from gradbuffer.kernels.torch_blocks import PackedWeights

try:
    from gradbuffer.kernels import triton_kernels as kernels
except ImportError:  # no triton
    kernels = None

__all__ = ["PRECISIONS", "TritonLSTM"]

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
STEP_BLOCK = 64  # coordinates of a program of the step
REPLAY_BLOCK = {torch.float32: 32, torch.float64: 16}  # and of the replay
REPLAY_BYTES = 1 << 28  # bound on the memory of all programs of the replay together, unless one takes more
PROGRAMS_PER_PROCESSOR = 4  # of the replay; it has registers for no more
CHUNK = 1 << 20  # coordinates whose features are made at once
MOST_HIDDEN = 32  # units whose tiles fit the shared memory of every such device (99 KB)


@functools.cache
def has_compiler():
    """Whether triton finds what it compiles its launchers with."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


class TritonLSTM(LSTMKernels):
    """The kernels in Triton, of float32 and float64 and at most 32 hidden units; it has none for `step_back`.

    Args:
        precision: of the products: "ieee", "tf32x3" (three products on tensor cores, nearly as exact), "tf32", or
            "bf16", which rounds the factors to bfloat16. Sums and states keep their dtype. Default None is "tf32x3" for
            float32 on NVIDIA's devices, where plain products of float32 overflow the registers, and "ieee" otherwise.

    Raises:
        RuntimeError: there is no triton, or the kernels cannot run where the weights lie.
        ValueError: `precision` is none of these, or not "ieee" for float64.
    """

    reads_log_sign = frozenset({"step"})

    @classmethod
    def reasons_against(cls, weight, work, *, state=None, squash=False, inputs=False):
        reasons = super().reasons_against(weight, work, state=state)
        if kernels is None:
            return [*reasons, "needs triton: it comes with CUDA builds of torch, or by `pip install triton` on Linux"]
        if weight.dtype not in (torch.float32, torch.float64):
            reasons.append(f"the weights must be of torch.float32 or torch.float64, got {weight.dtype}")
        if weight.shape[-1] > MOST_HIDDEN:
            reasons.append(f"the LSTM must have at most {MOST_HIDDEN} units, got {weight.shape[-1]}")
        if kernels.INTERPRETED and weight.device.type != "cpu":
            reasons.append(f"interpreted, it runs on the CPU, the network is on {weight.device}")
        if not kernels.INTERPRETED:
            if not weight.is_cuda:
                reasons.append(f"runs on CUDA (on the CPU with TRITON_INTERPRET=1), the network is on {weight.device}")
            elif torch.cuda.get_device_capability(weight.device) < (8, 0):
                reasons.append("needs a CUDA device of capability 8.0")
            elif not has_compiler():
                reasons.append("needs a C compiler, for its launchers")
        if work == "step_back":
            reasons.append("has no kernel for it")
        if work == "replay" and (squash or inputs):
            reasons.append("has no kernel for the replay of a squashed output, or with derivatives by the features")
        return reasons

    def __init__(self, lstm, output_weight, output_bias, precision=None):
        super().__init__(lstm, output_weight, output_bias)
        reasons = self.reasons_against(output_weight, "step")
        if reasons:
            raise RuntimeError("; ".join(reasons))
        self.precision = check_precision(output_weight, precision)
        self.packed = PackedWeights(self.layer_weights())
        self.padded = PaddedWeights(self.packed, output_weight)

    def step(self, features, hidden, cells, inplace=False, p=0.0):
        """As of `LSTMKernels`, in one launch for each 2^20 coordinates. With `p` on gradients without NaN."""
        if p and self.inputs != 2:
            raise ValueError(f"log_sign with p={p!r} makes two features, the network reads {self.inputs}")
        N, padded, given = hidden.shape[-1], self.padded, (hidden, cells)
        hidden, cells = hidden.contiguous(), cells.contiguous()
        new = (hidden, cells) if inplace else (torch.empty_like(hidden), torch.empty_like(cells))
        update = self.output_bias.new_empty(N).copy_(self.output_bias)
        with torch.cuda.device_of(hidden):
            for start in range(0, N, CHUNK):
                part = features(start, min(start + CHUNK, N)).contiguous()
                width = part.shape[-1]
                kernels.step_kernel[(-(-width // STEP_BLOCK),)](
                    part,
                    hidden,
                    cells,
                    *new,
                    padded.weights,
                    padded.output_weight,
                    update,
                    start,
                    width,
                    N,
                    LOG_SIGN=float(p),
                    SHARPEST=math.exp(p),
                    **padded.sizes,
                    BLOCK=STEP_BLOCK,
                    PRECISION=self.precision,
                    INTERPRET=kernels.INTERPRETED,
                    num_warps=4,
                    num_stages=1,
                )
        if inplace:
            new = [old if old is there else old.copy_(there) for old, there in zip(given, new)]
        return update, *new

    def replay(self, features, hidden, cells, adjoint, squash=False, pull_inputs=None, p=0.0, tape=None):
        """As of `LSTMKernels`, in one launch for each 2^20 coordinates. Its programs keep the states of one block each in memory
        that does not grow with N (REPLAY_BYTES at most, in general)."""
        if squash or pull_inputs:
            return super().replay(features, hidden, cells, adjoint, squash, pull_inputs)
        (T, N), padded, layers, H = adjoint.shape, self.padded, self.layers, self.hidden
        hidden, cells = hidden.contiguous(), cells.contiguous()
        block = REPLAY_BLOCK[adjoint.dtype]
        tape_size = (2 * layers * (T + 1) + (layers - 1) * T) * H * block
        chunk = max(min(CHUNK, (2**31 - 1) // (T * self.inputs)), 1)  # the kernel counts within it in 32 bits
        programs = min(
            most_programs(adjoint.device),
            -(-min(N, chunk) // block),
            max(REPLAY_BYTES // (tape_size * adjoint.element_size()), 1),
        )
        new = adjoint.new_empty
        states, sums = new(programs * tape_size), new(programs, len(padded.weights)).zero_()
        output_sums = new(programs, padded.sizes["UNITS"]).zero_()
        with torch.cuda.device_of(adjoint):
            for start in range(0, N, chunk):
                stop = min(start + chunk, N)
                kernels.replay_kernel[(programs,)](
                    features(start, stop).contiguous(),
                    hidden,
                    cells,
                    adjoint[:, start:stop].contiguous(),
                    padded.weights,
                    padded.output_weight,
                    sums,
                    output_sums,
                    states,
                    start,
                    stop - start,
                    N,
                    T,
                    len(padded.weights),
                    tape_size,
                    **padded.sizes,
                    BLOCK=block,
                    PRECISION=self.precision,
                    INTERPRET=kernels.INTERPRETED,
                    num_warps=4,
                    num_stages=1,
                )
        return self.packed.gradients(padded.take_off(sums.sum(0)), output_sums.sum(0)[:H], adjoint.sum())


def check_precision(weight, precision):
    """The precision of the products, if it is one for such weights."""
    if precision is None:
        precision = "tf32x3" if weight.is_cuda and weight.dtype == torch.float32 and not torch.version.hip else "ieee"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None or one of {PRECISIONS}, got {precision!r}")
    if precision != "ieee" and weight.dtype != torch.float32:
        raise ValueError(f'precision must be "ieee" for {weight.dtype}, got {precision!r}')
    return precision


def most_programs(device):
    """Programs of the replay that the device runs side by side."""
    if device.type != "cuda":
        return 3  # interpreted one after the other: enough to see that their sums meet
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


class PaddedWeights:
    """`PackedWeights` and the output's (H,) as the kernels read them: of each layer (4, BELOW + UNITS, UNITS), end to end.

    Its rows are [below; bias; zeros] and [hidden; zeros], its columns the gate's units and zeros.
    """

    def __init__(self, packed, output_weight):
        self.packed, H = packed, packed.hidden
        self.sizes = dict(
            INPUTS=packed.inputs[0],
            H=H,
            LAYERS=len(packed.inputs),
            FIRST=padded_size(packed.inputs[0] + 1),
            BELOW=padded_size(H + 1),
            UNITS=padded_size(H),
        )
        self.below = [self.sizes["FIRST"]] + [self.sizes["BELOW"]] * (len(packed.inputs) - 1)
        padded = [self.pad(weight, below) for weight, below in zip(packed.weights, self.below)]
        self.weights = torch.cat([part.flatten() for part in padded])
        self.output_weight = output_weight.new_zeros(self.sizes["UNITS"])
        self.output_weight[:H] = output_weight

    def rows(self, inputs, below):
        """Where the columns of W_l = [input; hidden; 1] stand among the padded rows: (columns, rows), three times."""
        H = self.packed.hidden
        return [
            (slice(inputs), slice(inputs)),
            (slice(inputs, inputs + H), slice(below, below + H)),
            (slice(inputs + H, None), slice(inputs, inputs + 1)),
        ]

    def pad(self, weight, below):
        """W_l (4H, inputs + H + 1) -> (4, BELOW + UNITS, UNITS)."""
        H, units = self.packed.hidden, self.sizes["UNITS"]
        padded, weight = weight.new_zeros(4, below + units, units), weight.view(4, H, -1).mT
        for columns, rows in self.rows(weight.shape[1] - H - 1, below):
            padded[:, rows, :H] = weight[:, columns]
        return padded

    def take_off(self, padded):
        """The inverse of `pad` for all layers, from one tensor like `weights`."""
        H, units = self.packed.hidden, self.sizes["UNITS"]
        parts = padded.split([4 * (below + units) * units for below in self.below])
        return [
            torch.cat([part.view(4, -1, units)[:, rows, :H] for _, rows in self.rows(inputs, below)], 1).mT.reshape(
                4 * H, -1
            )
            for part, inputs, below in zip(parts, self.packed.inputs, self.below)
        ]


def padded_size(size):
    """The power of two from 16 on that holds it: what `tl.dot` takes."""
    return max(16, 1 << (size - 1).bit_length())
