"""Steps of many tensors at once by the coordinatewise LSTM on CUDA: two launches for a group of a `LearnedOptimizer`.

The first looks at all gradients, and at the network's weights, and raises flags; the second takes the step of every
coordinate of every tensor, its update included, where no flag is up. Programs find their tensors in tables: which tensor, which
of its coordinates, where its memory is. This module needs triton.
"""

import functools
import itertools
import math

import torch
import triton
import triton.language as tl

from gradbuffer.devices import bring
from gradbuffer.kernels.triton_kernels import advance_block, log_sign_tile

__all__ = ["GroupSteps", "gradient_at", "memory_at"]

STEP_BLOCK, LOOK_BLOCK = 64, 2048  # coordinates of a program


@triton.jit
def memory_at(pointers, number, like):
    """Where the tensor of that number lies, as a pointer of the type of another."""
    return tl.load(pointers + number).to(like.dtype)


@triton.jit
def gradient_at(pointers, tensor, count, columns, inside, like, numbers, DECAYED: tl.constexpr):
    """What the network reads of a tensor's coordinates: ± ∇ + λ θ."""
    grad = tl.load(numbers) * tl.load(memory_at(pointers, tensor, like) + columns, mask=inside, other=0.0)
    if DECAYED:
        grad += tl.load(numbers + 1) * tl.load(
            memory_at(pointers, count + tensor, like) + columns, mask=inside, other=0.0
        )
    return grad.to(like.dtype.element_ty)


@triton.jit(do_not_specialize=["count", "first", "watched"])
def look_kernel(
    pointers,
    owners,
    starts,
    sizes,
    flags,
    like,
    kept,
    count,
    first,
    watched,
    numbers,
    DECAYED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """flags[0] = 1 where a gradient is not finite, flags[1] = 1 where a weight is another than the one kept.

    Tensors 0 … count - 1 are parameters; the `watched` ones after them are weights, whose copies lie one after the other in `kept`.
    numbers: the sign and the λ of `gradient_at`, and the rate.
    pointers: of all gradients, parameters, hidden states, cells, and averages if there are any, `first` in all, then of the weights, then
    where in `kept` each weight's copy begins.
    """
    tensor = tl.load(owners + tl.program_id(0))
    columns = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK)
    inside = columns < tl.load(sizes + tensor)
    if tensor < count:
        grad = gradient_at(pointers, tensor, count, columns, inside, like, numbers, DECAYED)
        finite = (grad - grad) == 0  # neither for an infinity nor for a NaN
        if tl.sum(tl.where(inside & (finite == 0), 1, 0), axis=0) > 0:
            tl.store(flags, 1)
    else:
        weight = tensor - count
        now = tl.load(memory_at(pointers, first + weight, like) + columns, mask=inside, other=0.0)
        before = tl.load(kept + tl.load(pointers + first + watched + weight) + columns, mask=inside, other=0.0)
        if tl.sum(tl.where(inside & (now != before), 1, 0), axis=0) > 0:
            tl.store(flags + 1, 1)


@triton.jit(do_not_specialize=["count"])
def group_kernel(
    pointers,
    owners,
    starts,
    sizes,
    flags,
    weights,
    output_weight,
    count,
    numbers,
    DECAYED: tl.constexpr,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST: tl.constexpr,
    BELOW: tl.constexpr,
    UNITS: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    SHARPEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """θ ← θ + rate · update and the next state, of BLOCK coordinates of one tensor; nothing where a flag is up."""
    tensor = tl.load(owners + tl.program_id(0))
    columns = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK)
    size = tl.load(sizes + tensor)
    inside = (columns < size) & (tl.load(flags) == 0) & (tl.load(flags + 1) == 0)
    grad = gradient_at(pointers, tensor, count, columns, inside, weights, numbers, DECAYED)
    if LOG_SIGN > 0:
        below = log_sign_tile(grad, FIRST, LOG_SIGN, SHARPEST)
    else:
        rows = tl.arange(0, FIRST)[None, :]
        below = tl.where(rows == 0, grad[:, None], tl.where(rows == 1, 1.0, 0.0)).to(grad.dtype)
    hidden = memory_at(pointers, 2 * count + tensor, weights)
    cells = memory_at(pointers, 3 * count + tensor, weights)
    out = advance_block(
        below,
        hidden,
        cells,
        hidden,
        cells,
        columns,
        inside,
        weights,
        output_weight,
        size,
        size,
        H,
        LAYERS,
        FIRST,
        BELOW,
        UNITS,
        PRECISION,
        PTX,
    )
    theta = memory_at(pointers, count + tensor, weights) + columns
    tl.store(theta, tl.load(theta, mask=inside, other=0.0) + tl.load(numbers + 2) * out, mask=inside)


class GroupSteps:
    """Steps of a group's tensors, all in the weights' dtype and each in one piece, for one set of them.

    Args:
        kernels: a `TritonLSTM`.
        p: of `log_sign`; 0 for gradients as they are.
        params: list of parameters (n,) of any shape; states: list of their (hidden, cells), (layers, H, n) each, and averages
            (rows, n) with a reader. Written over.
        watched: the network's weights, a list; kept: one vector of what they were, or None: they are not looked at.
        reader: the `AveragesReader` of a network that keeps averages, or None.
    """

    def __init__(self, kernels, p, params, states, watched, kept, reader=None):
        self.kernels, self.p, self.like, self.kept, self.reader = kernels, float(p), params[0], kept, reader
        self.count, self.watched = len(params), list(watched) if kept is not None else []
        sizes = tuple(param.numel() for param in params) + tuple(weight.numel() for weight in self.watched)
        device = params[0].device
        self.look_table = table(sizes, LOOK_BLOCK, device)
        self.step_table = table(sizes[: self.count], STEP_BLOCK, device)
        self.flags = torch.zeros(2, dtype=torch.int32, device=device)
        # in the order of the kernels; what a tensor's memory is may change from step to step, and is brought anew then
        self.fixed = [*params, *itertools.chain(*zip(*states)), *self.watched]
        offsets = [0]
        for weight in self.watched:
            offsets.append(offsets[-1] + weight.numel())
        self.offsets, self.addresses, self.pointers, self.asked, self.numbers = offsets[:-1], None, None, None, None

    def holds(self, params, states, kept):
        """Whether it is for these very tensors."""
        own = [*params, *itertools.chain(*zip(*states))]
        return self.kept is kept and all(a is b for a, b in zip(own, self.fixed)) and len(params) == self.count

    def look(self, gradients, rate, sign=1.0, decay=0.0):
        """One launch, for the step θ ← θ + rate · update of a network that reads sign · ∇ + decay · θ.

        Returns:
            flags (2,) on the device: a gradient is not finite; a weight has changed. They stay up until `lower`.
        """
        addresses = [tensor.data_ptr() for tensor in (*gradients, *self.fixed)] + self.offsets
        if addresses != self.addresses:
            self.addresses, self.pointers = addresses, bring(torch.tensor(addresses, device="cpu"), self.like.device)
        if (sign, decay, rate) != self.asked:  # a kernel's arguments would be rounded to float32
            numbers = torch.tensor([sign, decay, rate], dtype=self.like.dtype, device="cpu")
            self.asked, self.numbers = (sign, decay, rate), bring(numbers, self.like.device)
        kept = self.like if self.kept is None else self.kept
        with torch.cuda.device_of(self.like):
            look_kernel[(len(self.look_table[0]),)](
                self.pointers,
                *self.look_table,
                self.flags,
                self.like,
                kept,
                self.count,
                self.count + len(self.fixed) - len(self.watched),
                len(self.watched),
                self.numbers,
                DECAYED=decay != 0,
                BLOCK=LOOK_BLOCK,
            )
        return self.flags

    def lower(self):
        """Take the flags down."""
        self.flags.zero_()

    def step(self):
        """One launch: the step of the gradients that were looked at last, unless a flag is up."""
        padded, reader = self.kernels.padded, self.reader
        kernel, more = group_kernel, ()
        form = dict(LOG_SIGN=self.p, SHARPEST=math.exp(self.p))
        if reader is not None:
            kernel, more, form = reader.group_kernel, reader.given, reader.form
        with torch.cuda.device_of(self.like):
            kernel[(len(self.step_table[0]),)](
                self.pointers,
                *self.step_table,
                self.flags,
                padded.weights,
                padded.output,
                self.count,
                self.numbers,
                *more,
                DECAYED=self.asked[1] != 0,
                **padded.sizes,
                **form,
                BLOCK=STEP_BLOCK,
                **self.kernels.step_options,
            )


@functools.lru_cache(maxsize=32)
def table(sizes, block, device):
    """For each program of so many coordinates the number of its tensor and its first coordinate there, and the tensors' sizes."""
    sizes = torch.tensor(sizes, device="cpu")
    blocks = (sizes + block - 1) // block
    owners = torch.arange(len(sizes), device="cpu").repeat_interleave(blocks)
    first = (blocks.cumsum(0) - blocks).repeat_interleave(blocks)
    starts = (torch.arange(len(owners), device="cpu") - first) * block
    return tuple(bring(part.to(torch.int32), device) for part in (owners, starts, sizes))
