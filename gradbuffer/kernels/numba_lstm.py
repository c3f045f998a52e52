"""The kernels of the coordinatewise LSTM on a CPU that are compiled by numba.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1). `numba_loops` has the arithmetic; here weights
are laid out for it, states and gradients are handed over, and the columns are shared among threads. Beside the arguments
and results, memory holds one scratch of fixed size for each thread, and a `GateTape` of at most 208 MB. `torch_blocks` is
the plain version, which this one is tested against.
"""

import functools
import os

import numpy as np
import torch

from gradbuffer.kernels.interface import LSTMKernels
from gradbuffer.kernels.llvm_blocks import LANES, OUTER, OUTER_OF_ONE_ROW, ROWS
from gradbuffer.kernels.numba_loops import MORE_TILES, run_replay, shared_rows, step_all
from gradbuffer.kernels.numba_tape import WORTHWHILE, GateTape, array, as_rows, flat, in_rows, most_bytes
from gradbuffer.kernels.numba_threads import buffer, parallel_for, pieces_of, threads_here
from gradbuffer.kernels.numba_windows import record_window

__all__ = ["NumbaLSTM", "in_blocks"]


def level_2_cache():
    """Bytes of a core's, as Linux says; a common size where nothing is said."""
    try:
        return max(os.sysconf("SC_LEVEL2_CACHE_SIZE"), 0) or 1 << 20
    except (AttributeError, ValueError, OSError):  # another system
        return 1 << 20


STEP_CHUNK = (
    1024 * LANES
)  # columns of which the inputs lie in memory at once; with gradients as they are, there are none
REPLAY_CHUNK = 5120 * LANES  # columns times steps, of which the inputs lie in memory at once
CACHE = level_2_cache()


class NumbaLSTM(LSTMKernels):
    """The compiled kernels, and the weights as they want them.

    Layer l has one matrix W_l that multiplies [input; hidden]. Its rows are in the order of `llvm_blocks`; `place`
    says where each row of `nn.LSTM`, all units' i, f, g, o, is in it. All layers stand in one array, padded to the widest.
    `weights`, put `in_blocks`, and `biases` are those of the forward pass, scaled so that sigmoid(z) = 1 / (1 + 2^y) of what
    they give: y = -z / ln 2, and for g, y = -2z / ln 2, since tanh(z) is 2 sigmoid(2z) - 1. `transposed` is not scaled.
    """

    reads_log_sign = frozenset({"step", "replay"})

    @classmethod
    def reasons_against(cls, weight, work, *, state=None, squash=False, inputs=False, lstm=None, p=0.0):
        reasons = []
        if weight.device.type != "cpu":
            reasons.append(f"runs on the CPU, the network is on {weight.device}")
        if weight.dtype not in (torch.float32, torch.float64):
            reasons.append(f"the weights must be of torch.float32 or torch.float64, got {weight.dtype}")
        if state not in (None, weight.dtype, torch.bfloat16):
            reasons.append(f"the state must be of {weight.dtype} or torch.bfloat16, got {state}")
        return reasons

    def __init__(self, lstm, output_weight, output_bias):
        super().__init__(lstm, output_weight, output_bias)
        layers, H, self.dtype = self.layer_weights(), self.hidden, output_weight.dtype
        kind, most = output_weight.numpy().dtype, H + max(w.shape[1] for w, _, _ in layers)
        order, self.place = order_of_rows(H)
        weights = np.zeros((len(layers), 4 * H, most), kind)
        for l, (w, u, _) in enumerate(layers):
            weights[l, :, : w.shape[1] + H] = np.concatenate([w.numpy(), u.numpy()], 1)[order]
        scales = (np.repeat([-1, -1, -2, -1], H) / np.log(2))[order]
        self.weights = (
            (scales[:, None] * weights).astype(kind).reshape(len(layers), -1).take(in_blocks(4 * H, most), axis=1)
        )
        self.biases = (scales * np.stack([bias.numpy()[order] for _, _, bias in layers])).astype(kind)
        self.transposed = weights.transpose(0, 2, 1).reshape(len(layers), -1)
        self.output = np.append(output_weight.numpy(), output_bias.numpy()).astype(kind)  # (H + 1,)
        self.packed = self.weights, self.biases, self.output  # what compiled steps want

    def step(self, features, hidden, cells, inplace=False, p=0.0):
        """As of `LSTMKernels`. The state may be of bfloat16, each of its numbers then rounded after the step."""
        there = inplace and in_rows(hidden, cells)
        new = (
            (hidden, cells)
            if there
            else tuple(torch.empty(hidden.shape, dtype=self.dtype, device="cpu") for _ in range(2))
        )
        outputs = self.steps_where_they_lie(hidden, cells, new, p, None)(features)
        if inplace and not there:
            new = hidden.copy_(new[0]), cells.copy_(new[1])
        return outputs, *new

    def stepper(self, hidden, cells, new=None, p=0.0, tape=None):
        if not in_rows(*(new or (hidden, cells))):
            return super().stepper(hidden, cells, new, p)
        return self.steps_where_they_lie(hidden, cells, new or (hidden, cells), p, tape)

    def steps_where_they_lie(self, hidden, cells, new, p, tape):
        """`stepper` where `new` is `in_rows`."""
        N, before, end = hidden.shape[2], as_rows(hidden, cells), as_rows(*new)
        between = (*tape.state, tape.strides) if tape and tape.state.size else end
        gates, shares = self.gates_on(tape)
        outputs, steps, done = torch.empty(N, dtype=self.dtype, device="cpu"), tape.steps if tape else 1, 0
        out = outputs.numpy()

        def step(features):
            nonlocal before, done
            if tape and done == steps:
                raise RuntimeError(f"the tape has room for {steps} steps only")
            after = end if done == steps - 1 else between

            def work(start, stop):
                step_all(
                    *self.packed,
                    float(p),
                    array(features(start, stop)),
                    start,
                    *before,
                    start,
                    stop,
                    out,
                    *after,
                    self.scratch(1, MORE_TILES),
                    gates,
                    shares,
                    done,
                    steps,
                )

            parallel_for(work, pieces_of(N, N if p else STEP_CHUNK))
            before, done = after, done + 1 if tape else 0
            return outputs

        return step

    def tape(self, coordinates, steps):
        return GateTape(self, coordinates, steps)

    def replay(self, features, hidden, cells, adjoint, squash=False, pull_inputs=None, p=0.0, tape=None):
        before, N = (*flat(array(hidden), array(cells)), array(adjoint)), adjoint.shape[1]
        tape = tape if tape and tape.kernels is self and tape.steps == len(adjoint) else None
        kept, none = self.gates_on(tape), np.empty((1, 1, 0), self.weights.dtype)
        next_tile = kept[1].astype(bool).sum() * len(adjoint) * 4 * self.hidden * LANES * self.weights.itemsize

        def work(start, stop):
            inputs, sums, scratch = features(start, stop), self.zero_sums(), self.scratch(len(adjoint))
            dfeatures = torch.empty(inputs.shape if pull_inputs else (1, 1, 0), dtype=self.dtype, device="cpu")
            ahead = 2 * (scratch.nbytes + next_tile) <= CACHE
            run_replay(
                *self.packed,
                self.transposed,
                squash,
                float(p),
                array(inputs),
                start,
                *before,
                start,
                stop,
                array(dfeatures),
                none,
                none,
                *sums,
                scratch,
                *kept,
                ahead,
            )
            if pull_inputs:
                pull_inputs(start, stop, dfeatures)
            return sums

        gradients = self.gradients(parallel_for(work, pieces_of(N, max(REPLAY_CHUNK // len(adjoint), LANES))))
        if tape:
            tape.release()
        return gradients

    def step_back(self, features, hidden, cells, adjoint, dhidden, dcells, squash=False):
        dfeatures, N = torch.empty(features.shape, dtype=self.dtype, device="cpu"), features.shape[1]
        before = array(features[None]), 0, *flat(array(hidden), array(cells)), array(adjoint[None])
        adjoints = array(dhidden), array(dcells)

        def work(start, stop):
            sums = self.zero_sums()
            run_replay(
                *self.packed,
                self.transposed,
                squash,
                0.0,
                *before,
                start,
                stop,
                array(dfeatures[None]),
                *adjoints,
                *sums,
                self.scratch(1),
                *self.gates_on(None),
                False,
            )
            return sums

        gradients = self.gradients(parallel_for(work, pieces_of(N, REPLAY_CHUNK)))
        for tensor, adjoint in zip((dhidden, dcells), adjoints):
            if not tensor.is_contiguous():  # then its array was a copy
                tensor.copy_(torch.from_numpy(adjoint))
        return dfeatures, *gradients

    def in_parts(self, work, functions, size, steps):
        """As many functions go together as a tape has room for, if it has for one. With several threads each part is one
        thread's alone; without enough functions for that, all go together."""
        gates, state = (
            4 * steps * self.hidden * self.weights.itemsize,
            2 * self.layers * self.hidden * self.weights.itemsize,
        )
        many, room = threads_here(), most_bytes(threads_here())  # gates: of a coordinate and one layer
        at_once = (
            room // (self.layers * gates + state) // size
            or int(room >= (state + WORTHWHILE * gates) * size)
            or functions
        )
        parts = -(-functions // at_once)
        turns = -(-parts // many)
        if parts > 1:
            parts = min(turns * many, functions)
        if parts < 0.75 * turns * many:  # too many threads would have nothing to do
            parts = 1
        return parallel_for(
            work, [(functions * k // parts, functions * (k + 1) // parts) for k in range(parts)], single_threaded=True
        )

    def window(self, data, theta, hidden, cells, step, updates, p, keep):
        return record_window(data, self, theta, (hidden, cells), step, updates, p, keep)

    # Internals --------------------------------------------------------------------------------------------------------

    def gates_on(self, tape):
        """The gates that are kept on a tape, or nothing, and for how many tiles of each layer it has room."""
        return (tape.gates, tape.shares) if tape else (np.empty(0, self.weights.dtype), np.zeros(self.layers, np.int64))

    def scratch(self, steps, tiles=1):
        """This thread's buffer for tiles of that many steps: the last one again if it is large enough."""
        layers, H, inputs = self.layers, self.hidden, self.inputs
        count = (
            tiles
            * LANES
            * (
                (steps + layers) * (inputs + layers * H)
                + (6 * steps + 1) * layers * H
                + steps
                + 2 * layers * H
                + inputs
                + 1
                + OUTER_OF_ONE_ROW
            )
        )  # see `split_scratch`; blocks read beyond
        return buffer("scratch", count, self.dtype)

    def zero_sums(self):
        """What `run_replay` adds to, in float64: weights' (in blocks 4 × OUTER), biases'; the output's bias's and weight's."""
        blocks = self.layers, self.hidden * -(-self.weights.shape[1] // (4 * self.hidden * OUTER)) * 4 * OUTER
        output = 1 + -(-self.hidden // OUTER_OF_ONE_ROW) * OUTER_OF_ONE_ROW
        return np.zeros(blocks), np.zeros(self.biases.shape), np.zeros(output)

    def gradients(self, sums):
        """A list of such sums -> gradients as of `replay`."""
        kind, H = self.weights.dtype, self.hidden
        blocked, biases, output = ((parts[0] if len(parts) == 1 else sum(parts)).astype(kind) for parts in zip(*sums))
        layers, output = [], torch.from_numpy(output)
        for l, (weights, bias) in enumerate(zip(blocked, biases)):
            of_inputs, of_hidden = places_of_sums(H, H if l else self.inputs)
            parts = weights.take(of_inputs), weights.take(of_hidden), bias.take(self.place)
            layers.append([torch.from_numpy(part) for part in parts])
        return layers, output[1 : 1 + H], output[0]


@functools.cache
def order_of_rows(H):
    """Where each row of `llvm_blocks` is among all units' i, f, g, o; and the inverse of that permutation."""
    order = np.arange(4 * H).reshape(4, H).T.ravel()
    return order, np.argsort(order)


@functools.cache
def places_of_sums(H: int, width: int):
    """Where `nn.LSTM`'s matrices (4H, width) and (4H, H) have their gradients among the sums of `run_replay`, which lie in blocks
    4 × OUTER."""
    across = -(-(width + H) // OUTER)
    places = np.arange(H * across * 4 * OUTER).reshape(H, across, 4, OUTER).swapaxes(1, 2).reshape(4 * H, -1)
    places = places[order_of_rows(H)[1]]
    return places[:, :width].copy(), places[:, width : width + H].copy()


@functools.cache
def in_blocks(rows: int, width: int):
    """Where in a flat matrix (rows, width) the numbers are that `affine` takes one after the other: block by block, of each
    column by column."""
    blocks, _, _ = shared_rows(rows)
    parts = zip(np.split(np.arange(rows * width).reshape(rows, width), [blocks * ROWS]), (ROWS, 4))
    return np.concatenate([part.reshape(-1, size, width).swapaxes(1, 2).ravel() for part, size in parts])
