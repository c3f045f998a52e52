"""Launches of the kernels for networks that read Adam's moving averages, see `triton_averages`. This module needs triton."""

import math

import torch
import triton

from gradbuffer.devices import constant
from gradbuffer.kernels.triton_averages import averages_group_kernel, averages_step_kernel, layer_kernel, read_kernel
from gradbuffer.kernels.triton_weights import in_rows, padded_size

__all__ = ["AveragesReader"]

STEP_BLOCK, READ_BLOCK = 64, 64  # coordinates of a program


class AveragesReader:
    """What takes the steps of a network that reads moving averages, and makes the readings of its replays.

    States are (hidden, cells, averages), (layers, H, N) twice and (len(betas) + 2, N), all in the weights' dtype.

    Args:
        kernels: a `TritonLSTM`.
        averages: what the network reads, an `Averages`.
    """

    group_kernel = averages_group_kernel

    def __init__(self, kernels, averages):
        weight, layer = kernels.output_weight, averages.layer
        rows = padded_size(len(averages.betas) + 3)
        self.kernels = kernels
        self.numbers = constant(numbers_of(averages, rows, weight.dtype), weight.device, weight.dtype)
        self.layer = (self.numbers,) * 2  # there is none to be read
        if layer is not None:
            self.layer = layer.weight.detach().contiguous(), layer.bias.detach()
        self.form = dict(ROWS=rows, **averages.form)

    @property
    def given(self):
        """What the kernels read of the network beside the LSTM; the group's last."""
        return *self.layer, self.numbers

    def step(self, grad, before, new):
        """One step from a state to another, which may be the same, in one launch. Returns the updates (N,)."""
        kernels, given, target = self.kernels, laid_out(before), laid_out(new)
        update, N = kernels.output_bias.new_empty(grad.shape), len(grad)
        with torch.cuda.device_of(update):
            averages_step_kernel[(triton.cdiv(N, STEP_BLOCK),)](
                grad.contiguous(),
                *given,
                *target,
                kernels.padded.weights,
                kernels.padded.output,
                *self.given,
                update,
                N,
                given[0].stride(1),
                target[0].stride(1),
                given[2].stride(0),
                target[2].stride(0),
                **kernels.padded.sizes,
                **self.form,
                BLOCK=STEP_BLOCK,
                **kernels.step_options,
            )
        for old, part in zip(new, target):
            if part is not old:
                old.copy_(part)
        return update

    def stepper(self, state, own):
        """A function of the gradient that returns the updates; the first step reads `state`, and each writes over `own`."""
        before = state

        def step(grad):
            nonlocal before
            update = self.step(grad, before, own)
            before = own
            return update

        return step

    def read(self, grads, averages):
        """What the LSTM reads at each step of gradients (T, N), from averages on: (T, inputs, N)."""
        (T, N), sizes = grads.shape, self.kernels.padded.sizes
        features, options = grads.new_empty(T, sizes["INPUTS"], N), self.kernels.options
        with torch.cuda.device_of(features):
            read_kernel[(triton.cdiv(N, READ_BLOCK),)](
                *self.recorded(grads, averages, features),
                INPUTS=sizes["INPUTS"],
                FIRST=sizes["FIRST"],
                **self.form,
                BLOCK=READ_BLOCK,
                PTX=options["PTX"],
                num_warps=options["num_warps"],
            )
        return features

    def pull_layer(self, grads, averages, dfeatures):
        """Derivatives by the weight and the bias of the layer, from those by what `read` gives (T, inputs, N), in one piece."""
        sizes, form = self.kernels.padded.sizes, {name: value for name, value in self.form.items() if name != "LAYER"}
        programs = min(triton.cdiv(grads.shape[1], READ_BLOCK), self.kernels.most_programs)
        sums = grads.new_empty(programs, sizes["FIRST"], form["ROWS"])
        with torch.cuda.device_of(sums):
            layer_kernel[(programs,)](
                *self.recorded(grads, averages, dfeatures, sums),
                INPUTS=sizes["INPUTS"],
                FIRST=sizes["FIRST"],
                **form,
                BLOCK=READ_BLOCK,
                **self.kernels.options,
            )
        total, readings = sums.sum(0)[: sizes["INPUTS"]], form["BETAS"] + 1
        return total[:, :readings].contiguous(), total[:, readings].contiguous()

    def recorded(self, grads, averages, *more):
        """The arguments with which these two kernels begin."""
        grads, averages = (part if part.stride(1) == 1 else part.contiguous() for part in (grads, averages))
        T, N = grads.shape
        return grads, averages, *self.given, *more, N, grads.stride(0), averages.stride(0), T


def numbers_of(averages, rows, dtype):
    """What the kernels read of an `Averages`: for each of so many rows what an average keeps, what it adds, and the logarithm of what it
    keeps; then eps², fade, longest, scale. As in torch, 1 - β is that of the rounded β."""
    keep = torch.tensor([*averages.betas, averages.square_beta], dtype=dtype, device="cpu").double().tolist()
    keep.insert(averages.form["GRADIENT"], 0.0)
    add = [1 - beta for beta in keep]
    if averages.clock:  # which counts
        fade, longest = averages.clock
        keep, add = [*keep, 1.0], [*add, 1.0]
    else:
        fade = longest = 1.0
        keep, add = [*keep, keep[-1]], [*add, add[-1]]
    logarithms = [math.log(beta) if 0 < beta < 1 else -1.0 for beta in keep]  # others are not used
    padded = [part + [rest] * (rows - len(part)) for part, rest in ((keep, 0.0), (add, 0.0), (logarithms, -1.0))]
    return (*sum(padded, []), averages.eps**2, fade, longest, averages.scale)


def laid_out(state):
    """The parts of a state, those that do not lie as the kernels read them as copies: both of the LSTM's alike, row after row."""
    hidden, cells, averages = state
    if not in_rows((hidden, cells)):
        hidden, cells = hidden.contiguous(), cells.contiguous()
    return hidden, cells, averages if averages.stride(1) == 1 else averages.contiguous()
