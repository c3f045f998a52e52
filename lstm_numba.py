"""The coordinatewise LSTM on a CPU, compiled by numba: the arithmetic of `lstm_blocks`, faster.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1). As in `lstm_blocks`, features lie along rows
and coordinates along columns; here a tile of columns goes through all layers, gates and (in the replay) all steps
within the cache, in one compiled loop, without an operation of torch. Tiles are independent: as many run at once as
torch has threads. Beside the arguments and results, memory holds one scratch of fixed size for each thread.

It holds arithmetic only: no parameters, no checks of what users pass. numba compiles at the first call (some seconds)
and keeps the result in `__pycache__`. `lstm_blocks` is the plain version, which this one is tested against.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

__all__ = ["PackedLSTM", "replay_blocks", "step_back_blocks", "step_blocks"]

NARROW, WIDE = None, 0  # kinds of tile: of different types, so that numba compiles each function for both widths
WIDTHS = {NARROW: 64, WIDE: 256}  # columns
STEP_CHUNK = 64 * 256  # columns in one call of a compiled function, whose own cost of some µs is spread over them
REPLAY_CHUNK = 16 * 256
WIDE_STEPS = 40  # the longest window for wide tiles: what they keep should fit in the cache

single, double = np.float32, np.float64
# sums may be taken in another order, which lets them be vectorized; infinities and NaNs go through as usual
compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
in_order = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})


class PackedLSTM:
    """The weights of an LSTM and its linear output, laid out for the compiled loops.

    Layer l has one matrix W_l that multiplies [hidden; input], with rows in the order of gates of `nn.LSTM`, i, f, g, o,
    and a column of zeros up to a multiple of 4. All layers stand in one array, padded to the widest.

    Args:
        layers: per layer (weight_ih (4H, in), weight_hh (4H, H), bias (4H,)), in `nn.LSTM`'s order of gates.
        output_weight: (H,), output_bias: () – the output is output_weight · h + output_bias.
    """

    def __init__(self, layers, output_weight, output_bias):
        self.dtype, self.hidden, self.inputs = output_weight.dtype, layers[0][1].shape[1], layers[0][0].shape[1]
        columns = [up_to_4(w.shape[1] + self.hidden) for w, _, _ in layers]
        kind = output_weight.numpy().dtype
        self.counts = np.array(columns)
        self.weights = np.zeros((len(layers), 4 * self.hidden, max(columns)), kind)
        self.transposed = np.zeros((len(layers), max(columns), 4 * self.hidden), kind)
        self.biases = np.stack([bias.numpy() for _, _, bias in layers])
        for l, (w, u, _) in enumerate(layers):
            both = torch.cat([u, w], 1).numpy()
            self.weights[l, :, :both.shape[1]] = both
            self.transposed[l, :both.shape[1]] = both.T
        self.output = np.append(output_weight.numpy(), output_bias.numpy()).astype(kind)  # (H + 1,)

    def scratch(self, kind, steps):
        """This thread's buffer for tiles of that kind and many steps: the last one again if it is large enough."""
        layers, rows, H = len(self.counts), self.weights.shape[2], self.hidden
        width = WIDTHS[kind]
        count = row_length(steps, width) * (layers * (rows + 6 * H) + H + 1) + width * (layers * 2 * H + rows)  # see `carve`
        kept = getattr(_thread, "scratch", None)
        if kept is None or kept.size < count or kept.dtype != self.weights.dtype:
            _thread.scratch = kept = np.empty(count, self.weights.dtype)
        return kept

    def zero_sums(self):
        """What `run_replay` adds to: of the weights, the biases and the output, in float64."""
        return np.zeros(self.weights.shape), np.zeros(self.biases.shape), np.zeros(self.output.shape)

    def gradients(self, sums):
        """A list of such sums -> gradients as of `replay_blocks`."""
        weights, biases, output = (torch.from_numpy(sum(parts)).to(self.dtype) for parts in zip(*sums))
        H, widths = self.hidden, [self.inputs] + [self.hidden] * (len(weights) - 1)
        layers = [(w[:, H:H + width], w[:, :H], bias) for w, width, bias in zip(weights, widths, biases)]
        return layers, output[:-1], output[-1]


def up_to_4(count):
    return -(-count // 4) * 4


# What is compiled ---------------------------------------------------------------------------------------------------

def columns_in(kind):
    """Columns in a tile of that kind, a constant where it is compiled."""
    raise NotImplementedError("only compiled functions call it")


@numba.extending.overload(columns_in)
def columns_in_kind(kind):
    # unsigned: numba takes a signed column for one that may count from the end, and then does not vectorize
    if isinstance(kind, numba.types.NoneType):
        return lambda kind: np.uintp(64)
    return lambda kind: np.uintp(256)


@numba.njit(cache=True)
def row_length(steps, width):
    """Columns of a tile's arrays over all steps, the end included, and 16 more: rows must not fall on the same sets of
    the cache."""
    return (steps + 1) * width + 16


@in_order
def single_exponential(x):
    """e^x = 2^n e^r with |r| ≤ ln 2 / 2: a polynomial, and n put into the exponent's bits. To 3e-7, relative."""
    x = single(-87) if x < single(-87) else x  # a NaN stays one
    x = single(88) if x > single(88) else x
    shifted = x * single(1.44269504) + single(12582912 + 127)  # 1.5 · 2^23: what is left of the number are its integer bits
    r = x - (shifted - single(12582912 + 127)) * single(0.6931472)
    p = single(0.0083125253) * r + single(0.0418901139)
    p = p * r + single(0.166671145)
    p = p * r + single(0.499992318)
    p = p * r + single(1)
    p = p * r + single(1)
    return p * np.int32(single(shifted).view(np.int32) << np.int32(23)).view(single)


@in_order
def double_exponential(x):
    """The same for float64, to 4e-16."""
    x = -708.0 if x < -708 else x
    x = 709.0 if x > 709 else x
    n = np.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6
    p = 1 / 6227020800
    p = p * r + 1 / 479001600
    p = p * r + 1 / 39916800
    p = p * r + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * np.int64((np.int64(n) + np.int64(1023)) << np.int64(52)).view(double)


# One function for float32 and one for float64: numba takes the one for x's type.

def sigmoid(x):
    """1 / (1 + e^-x)"""
    raise NotImplementedError("only compiled functions call it")


def tanh(x):
    """2 sigmoid(2x) - 1"""
    raise NotImplementedError("only compiled functions call it")


def tanh_slope(y):
    """1 - y², the derivative where tanh is y."""
    raise NotImplementedError("only compiled functions call it")


@in_order
def sigmoid_slope(y):
    """y - y², the derivative where sigmoid is y."""
    return y - y * y


@numba.extending.overload(sigmoid)
def sigmoid_of(x):
    if x == numba.float32:
        return lambda x: single(1) / (single(1) + single_exponential(-x))
    return lambda x: 1.0 / (1.0 + double_exponential(-x))


@numba.extending.overload(tanh)
def tanh_of(x):
    if x == numba.float32:
        return lambda x: single(2) / (single(1) + single_exponential(single(-2) * x)) - single(1)
    return lambda x: 2.0 / (1.0 + double_exponential(-2.0 * x)) - 1.0


@numba.extending.overload(tanh_slope)
def tanh_slope_of(y):
    if y == numba.float32:
        return lambda y: single(1) - y * y
    return lambda y: 1.0 - y * y


@compiled
def product(kind, weight, bias, rows, count, x, at, out, to):
    """out[:rows, to:to + lanes] = weight[:rows, :count] x[:count, at:at + lanes] + bias, in blocks of 4 by 4.

    rows and count are multiples of 4. The inner loop has 16 weights in registers and 4 sums to keep.
    """
    lanes = columns_in(kind)
    for r in range(0, rows, 4):
        a, b, c, d = bias[r], bias[r + 1], bias[r + 2], bias[r + 3]
        for k in range(0, count, 4):
            a0, a1, a2, a3 = weight[r, k], weight[r, k + 1], weight[r, k + 2], weight[r, k + 3]
            b0, b1, b2, b3 = weight[r + 1, k], weight[r + 1, k + 1], weight[r + 1, k + 2], weight[r + 1, k + 3]
            c0, c1, c2, c3 = weight[r + 2, k], weight[r + 2, k + 1], weight[r + 2, k + 2], weight[r + 2, k + 3]
            d0, d1, d2, d3 = weight[r + 3, k], weight[r + 3, k + 1], weight[r + 3, k + 2], weight[r + 3, k + 3]
            if k == 0:
                for j in range(lanes):
                    x0, x1, x2, x3 = x[k, at + j], x[k + 1, at + j], x[k + 2, at + j], x[k + 3, at + j]
                    out[r, to + j] = a + a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                    out[r + 1, to + j] = b + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                    out[r + 2, to + j] = c + c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                    out[r + 3, to + j] = d + d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
            else:
                for j in range(lanes):
                    x0, x1, x2, x3 = x[k, at + j], x[k + 1, at + j], x[k + 2, at + j], x[k + 3, at + j]
                    out[r, to + j] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                    out[r + 1, to + j] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                    out[r + 2, to + j] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                    out[r + 3, to + j] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@compiled
def add_outer(y, x, rows, count, length, total):
    """total[:rows, :count] += y[:rows, :length] x[:count, :length]ᵀ, in blocks of 4 by 2; rows and count as above."""
    for r in range(0, rows, 4):
        for k in range(0, count, 2):
            zero = y[r, 0] - y[r, 0]
            a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = zero
            for j in range(length):
                x0, x1 = x[k, j], x[k + 1, j]
                a0 += y[r, j] * x0
                a1 += y[r, j] * x1
                b0 += y[r + 1, j] * x0
                b1 += y[r + 1, j] * x1
                c0 += y[r + 2, j] * x0
                c1 += y[r + 2, j] * x1
                d0 += y[r + 3, j] * x0
                d1 += y[r + 3, j] * x1
            total[r, k] += a0
            total[r, k + 1] += a1
            total[r + 1, k] += b0
            total[r + 1, k + 1] += b1
            total[r + 2, k] += c0
            total[r + 2, k + 1] += c1
            total[r + 3, k] += d0
            total[r + 3, k + 1] += d1


# Loops over a row read and write few arrays each, so that what numba compiles can check that they do not overlap.

@in_order
def activate(kind, gates, cells, tanhs, above, onward, H, at):
    """i, f, o ← sigmoid, g ← tanh, c' = f c + i g, h' = o tanh(c'), for the step whose columns begin at `at`.

    gates (4H, …) in place; c' to the next step's columns of cells; h' to `above`, and to `onward` for the next step.
    """
    lanes = columns_in(kind)
    after = at + lanes
    for u in range(4 * H):
        if u // H == 2:
            for j in range(lanes):
                gates[u, at + j] = tanh(gates[u, at + j])
        else:
            for j in range(lanes):
                gates[u, at + j] = sigmoid(gates[u, at + j])
    for u in range(H):
        i, f, g, o = u, H + u, 2 * H + u, 3 * H + u
        for j in range(lanes):
            cells[u, after + j] = gates[f, at + j] * cells[u, at + j] + gates[i, at + j] * gates[g, at + j]
        for j in range(lanes):
            tanhs[u, at + j] = tanh(cells[u, after + j])
        for j in range(lanes):
            above[u, at + j] = gates[o, at + j] * tanhs[u, at + j]
        for j in range(lanes):
            onward[u, after + j] = above[u, at + j]


@in_order
def pull_back(kind, gates, cells, tanhs, dhidden, dcells, spare, H, at):
    """gates ← dL/d(gates before activation), dcells ← dL/dc, from dhidden = dL/dh' and dcells = dL/dc' (H, lanes)."""
    lanes = columns_in(kind)
    for u in range(H):
        i, f, g, o = u, H + u, 2 * H + u, 3 * H + u
        for j in range(lanes):
            dcells[u, j] += dhidden[u, j] * gates[o, at + j] * tanh_slope(tanhs[u, at + j])
        for j in range(lanes):
            gates[o, at + j] = dhidden[u, j] * tanhs[u, at + j] * sigmoid_slope(gates[o, at + j])
        for j in range(lanes):
            spare[j] = dcells[u, j] * gates[g, at + j] * sigmoid_slope(gates[i, at + j])
        for j in range(lanes):
            gates[g, at + j] = dcells[u, j] * gates[i, at + j] * tanh_slope(gates[g, at + j])
        for j in range(lanes):
            gates[i, at + j] = spare[j]
        for j in range(lanes):
            spare[j] = dcells[u, j] * gates[f, at + j]
        for j in range(lanes):
            gates[f, at + j] = dcells[u, j] * cells[u, at + j] * sigmoid_slope(gates[f, at + j])
        for j in range(lanes):
            dcells[u, j] = spare[j]


@numba.njit(cache=True)
def carve(kind, scratch, steps, layers, rows, H):
    """The arrays of a tile in one buffer: of each layer [hidden; input], gates, c and tanh(c); the top's h; the adjoint;
    then of one step dh and dc of each layer, and d[hidden; input]."""
    width = int(columns_in(kind))
    S, start = row_length(steps, width), 0
    columns, start = part_of(scratch, start, layers, rows, S)
    gates, start = part_of(scratch, start, layers, 4 * H, S)
    cells, start = part_of(scratch, start, layers, H, S)
    tanhs, start = part_of(scratch, start, layers, H, S)
    top, start = part_of(scratch, start, 1, H, S)
    adjoint, start = part_of(scratch, start, 1, 1, S)
    dhidden, start = part_of(scratch, start, layers, H, width)
    dcells, start = part_of(scratch, start, layers, H, width)
    dcolumn, start = part_of(scratch, start, 1, rows, width)
    return columns, gates, cells, tanhs, top[0], adjoint[0], dhidden, dcells, dcolumn[0]


@numba.njit(cache=True)
def part_of(scratch, start, layers, rows, length):
    """(layers, rows, length) from `start` on, and where it ends."""
    stop = start + layers * rows * length
    return scratch[start:stop].reshape(layers, rows, length), stop


@compiled
def load(kind, source, start, width, out, row, to):
    """out[row + u, to:to + lanes] = source[u, start:start + width] and zeros, for all rows u of source."""
    lanes = columns_in(kind)
    for u in range(source.shape[0]):
        for j in range(width):
            out[row + u, to + j] = source[u, start + j]
        for j in range(width, lanes):
            out[row + u, to + j] = 0


@compiled
def store(source, rows, at, width, out, start):
    """out[u, start:start + width] = source[u, at:at + width] for the first rows u of source."""
    for u in range(rows):
        for j in range(width):
            out[u, start + j] = source[u, at + j]


@compiled
def record(kind, weights, biases, counts, steps, H, columns, gates, cells, tanhs, top):
    """The forward pass of a tile over its steps."""
    layers, lanes = len(counts), columns_in(kind)
    for t in range(steps):
        at = np.uintp(t) * lanes
        for l in range(layers):
            product(kind, weights[l], biases[l], 4 * H, counts[l], columns[l], at, gates[l], at)
            above = columns[l + 1, H:] if l + 1 < layers else top
            activate(kind, gates[l], cells[l], tanhs[l], above, columns[l], H, at)


@compiled
def run_step(kind, weights, biases, counts, output, features, offset, hidden, cells, start, stop, update, new_hidden, new_cells,
             scratch):
    """One step of the coordinates start … stop. features (inputs, …) begin at coordinate `offset`."""
    layers, H = hidden.shape[:2]
    columns, gates, c, tanhs, top, _, _, _, _ = carve(kind, scratch, 1, layers, weights.shape[2], H)
    columns[:] = 0  # rows that only fill up to a multiple of 4 among them
    zero, lanes = np.uintp(0), columns_in(kind)
    for tile in range(start, stop, int(lanes)):
        first, width = np.uintp(tile), np.uintp(min(int(lanes), stop - tile))
        load(kind, features, np.uintp(tile - offset), width, columns[0], H, zero)
        for l in range(layers):
            load(kind, hidden[l], first, width, columns[l], 0, zero)
            load(kind, cells[l], first, width, c[l], 0, zero)
        record(kind, weights, biases, counts, 1, H, columns, gates, c, tanhs, top)
        for j in range(width):
            update[first + j] = output[H]
        for u in range(H):
            for j in range(width):
                update[first + j] += output[u] * top[u, j]
        for l in range(layers):
            store(columns[l], H, lanes, width, new_hidden[l], first)
            store(c[l], H, lanes, width, new_cells[l], first)


@compiled
def run_replay(kind, weights, transposed, biases, counts, output, squash, features, offset, hidden, cells, adjoint, start, stop,
               dfeatures, dhidden, dcells, weight_sums, bias_sums, output_sums, scratch):
    """The replay of the coordinates start … stop: adds to the sums.

    features and dfeatures (T, inputs, …) begin at coordinate `offset`; without columns dfeatures is not written.
    dhidden and dcells (layers, H, N) are the adjoints of the state after the last step, and become those of the state
    before the first one; without columns the former are zeros and the latter not written. squash: outputs go through a
    tanh.
    """
    steps, (layers, H) = len(adjoint), hidden.shape[:2]
    wanted, carried = dfeatures.shape[2] > 0, dhidden.shape[2] > 0
    columns, gates, c, tanhs, top, pulls, dh, dc, dcolumn = carve(kind, scratch, steps, layers, weights.shape[2], H)
    columns[:] = 0
    zero, lanes = np.uintp(0), columns_in(kind)
    zeros, spare, length = np.zeros(weights.shape[2], weights.dtype), np.empty(int(lanes), weights.dtype), steps * int(lanes)
    for tile in range(start, stop, int(lanes)):
        first, within, width = np.uintp(tile), np.uintp(tile - offset), np.uintp(min(int(lanes), stop - tile))
        for t in range(steps):
            load(kind, features[t], within, width, columns[0], H, np.uintp(t) * lanes)
            load(kind, adjoint[t:t + 1], first, width, pulls, 0, np.uintp(t) * lanes)
        for l in range(layers):
            load(kind, hidden[l], first, width, columns[l], 0, zero)
            load(kind, cells[l], first, width, c[l], 0, zero)
            if carried:
                load(kind, dhidden[l], first, width, dh[l], 0, zero)
                load(kind, dcells[l], first, width, dc[l], 0, zero)
            else:
                dh[l], dc[l] = 0, 0
        record(kind, weights, biases, counts, steps, H, columns, gates, c, tanhs, top)
        if squash:
            squash_adjoint(output, top, pulls[0], length, H)
        for t in range(steps - 1, -1, -1):
            at = np.uintp(t) * lanes
            for u in range(H):
                for j in range(lanes):
                    dh[layers - 1, u, j] += output[u] * pulls[0, at + j]
            for l in range(layers - 1, -1, -1):
                pull_back(kind, gates[l], c[l], tanhs[l], dh[l], dc[l], spare, H, at)
                rows = counts[l] if l > 0 or wanted else (H + 3) // 4 * 4
                product(kind, transposed[l], zeros, rows, 4 * H, gates[l], at, dcolumn, np.uintp(0))
                dh[l] = dcolumn[:H]
                if l > 0:  # the input of this layer is the hidden state of the one below
                    for u in range(H):
                        for j in range(lanes):
                            dh[l - 1, u, j] += dcolumn[H + u, j]
                elif wanted:
                    store(dcolumn[H:], dfeatures.shape[1], zero, width, dfeatures[t], within)
        if carried:
            for l in range(layers):
                store(dh[l], H, zero, width, dhidden[l], first)
                store(dc[l], H, zero, width, dcells[l], first)
        for l in range(layers):
            add_outer(gates[l], columns[l], 4 * H, counts[l], length, weight_sums[l])
            for r in range(4 * H):
                bias_sums[l, r] += gates[l, r, :length].sum()
        for u in range(H):
            output_sums[u] += dot(top[u], pulls[0], length)
        output_sums[H] += pulls[0, :length].sum()


@compiled
def dot(a, b, length):
    total = a[0] - a[0]
    for j in range(length):
        total += a[j] * b[j]
    return total


@compiled
def squash_adjoint(output, top, pulls, length, H):
    """The adjoint of tanh(z) -> that of z = output · h + bias."""
    for j in range(length):
        z = output[H]
        for u in range(H):
            z += output[u] * top[u, j]
        pulls[j] *= tanh_slope(tanh(z))


# What others call ---------------------------------------------------------------------------------------------------

def step_blocks(packed, features, hidden, cells, inplace=False):
    """One step of the optimizer for all coordinates, without a graph: as `lstm_blocks.step_blocks`."""
    before, N = (array(hidden), array(cells)), hidden.shape[2]
    whole = hidden.is_contiguous() and cells.is_contiguous()
    new = (hidden, cells) if inplace and whole else (torch.empty(hidden.shape, dtype=packed.dtype) for _ in range(2))
    new_hidden, new_cells = new
    update = torch.empty(N, dtype=packed.dtype)
    after = array(update), array(new_hidden), array(new_cells)

    def work(start, stop):
        kind = kind_for(stop - start, 1)
        run_step(kind, packed.weights, packed.biases, packed.counts, packed.output, array(features(start, stop)), start,
                 *before, start, stop, *after, packed.scratch(kind, 1))

    side_by_side(work, N, STEP_CHUNK)
    if inplace and not whole:
        new_hidden, new_cells = hidden.copy_(new_hidden), cells.copy_(new_cells)
    return update, new_hidden, new_cells


def replay_blocks(packed, features, hidden, cells, adjoint, squash=False, pulled=None):
    """Gradient of Σ_t ⟨adjoint_t, output_t⟩ with respect to the packed weights: as `lstm_blocks.replay_blocks`."""
    before, N = (array(hidden), array(cells), array(adjoint)), adjoint.shape[1]
    none = np.empty((1, 1, 0), packed.weights.dtype)

    def work(start, stop):
        kind, inputs, sums = kind_for(stop - start, len(adjoint)), features(start, stop), packed.zero_sums()
        dfeatures = torch.empty(inputs.shape if pulled else (1, 1, 0), dtype=packed.dtype)
        run_replay(kind, packed.weights, packed.transposed, packed.biases, packed.counts, packed.output, squash,
                   array(inputs), start, *before, start, stop, array(dfeatures), none, none, *sums,
                   packed.scratch(kind, len(adjoint)))
        if pulled:
            pulled(start, stop, dfeatures)
        return sums

    return packed.gradients(side_by_side(work, N, REPLAY_CHUNK))


def step_back_blocks(packed, features, hidden, cells, adjoint, dhidden, dcells, squash=False):
    """Backpropagation through one step for all coordinates: as `lstm_blocks.step_back_blocks`."""
    dfeatures, N = torch.empty(features.shape, dtype=packed.dtype), features.shape[1]
    before = array(features[None]), array(hidden), array(cells), array(adjoint[None])
    adjoints = array(dhidden), array(dcells)

    def work(start, stop):
        kind, sums = kind_for(stop - start, 1), packed.zero_sums()
        run_replay(kind, packed.weights, packed.transposed, packed.biases, packed.counts, packed.output, squash, before[0], 0,
                   *before[1:], start, stop, array(dfeatures[None]), *adjoints, *sums, packed.scratch(kind, 1))
        return sums

    gradients = packed.gradients(side_by_side(work, N, REPLAY_CHUNK))
    for tensor, adjoint in zip((dhidden, dcells), adjoints):
        if not tensor.is_contiguous():  # then its array was a copy
            tensor.copy_(torch.from_numpy(adjoint))
    return dfeatures, *gradients


def kind_for(columns, steps):
    """Wide tiles cost less for a column, narrow ones less where there are few columns or many steps to keep."""
    return WIDE if columns >= 2 * WIDTHS[WIDE] and steps <= WIDE_STEPS else NARROW


def array(tensor):
    """A numpy array of the same memory, or a copy if that is not in one piece."""
    return tensor.detach().contiguous().numpy()


# Threads ------------------------------------------------------------------------------------------------------------

_thread = threading.local()  # each thread's scratch
_pool = (None, 0, None)  # process, threads, executor


def side_by_side(work, length, most):
    """[work(start, stop), ...] over [0, length) in pieces of at most `most`, by as many threads as torch has."""
    threads = torch.get_num_threads()
    tile = WIDTHS[NARROW]
    pieces = max(-(-length // most), min(threads, length // (2 * tile)), 1)
    size = -(-length // (pieces * tile)) * tile  # whole tiles
    spans = [(start, min(start + size, length)) for start in range(0, length, size)]
    if len(spans) == 1 or threads == 1:
        return [work(*span) for span in spans]

    @torch.no_grad()
    def alone(span):
        return work(*span)

    return list(pool(threads).map(alone, spans))


def pool(threads):
    """The threads, kept from call to call; new ones in a process that was forked, which has inherited none."""
    global _pool
    if _pool[:2] != (os.getpid(), threads):
        _pool = os.getpid(), threads, ThreadPoolExecutor(threads, thread_name_prefix="lstm_numba")
    return _pool[2]
