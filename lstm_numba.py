"""The coordinatewise LSTM on a CPU, compiled by numba: the arithmetic of `lstm_blocks`, faster.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1). As in `lstm_blocks`, features lie along rows
and coordinates along columns; here a tile of columns goes through all layers, gates and (in the replay) all steps
within the cache, in one compiled loop, without an operation of torch. Tiles are independent: as many run at once as
torch has threads. Beside the arguments and results, memory holds one scratch of fixed size for each thread.

A tile is `LANES` columns wide. What it keeps lies step by step, each step's rows one after the other in a flat array.
Step s of `columns` holds x_s, h⁰_{s-1}, h¹_{s-2}, …, so that what layer l multiplies at time t, the state below and its
own last one, are consecutive rows: of step t + l.

It holds arithmetic only: no parameters, no checks of what users pass. numba compiles at the first call (some seconds)
and keeps the result in `__pycache__`. `lstm_blocks` is the plain version, which this one is tested against.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from register_blocks import LANES, OUTER, ROWS, add_outer_blocks, copy_rows, fetch_rows, product_blocks

__all__ = ["PackedLSTM", "replay_blocks", "step_back_blocks", "step_blocks", "stepper"]

STEP_CHUNK = 1024 * LANES  # columns in one call of a compiled function, whose own cost of some µs is spread over them
REPLAY_CHUNK = 256 * LANES
FAR = 4096  # from so many columns on the state is no longer in the cache when the next step comes

single, double = np.float32, np.float64
# sums may be taken in another order, which lets them be vectorized; infinities and NaNs go through as usual
compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
in_order = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})


class PackedLSTM:
    """The weights of an LSTM and its linear output, laid out for the compiled loops.

    Layer l has one matrix W_l that multiplies [input; hidden], with rows in the order of gates of `nn.LSTM`, i, f, g, o.
    All layers stand in one array, padded to the widest. `weights` and `biases` are those of the forward pass, scaled so
    that sigmoid(z) = 1 / (1 + 2^y) of what they give: y = -z / ln 2, and for g, y = -2z / ln 2, since tanh(z) is
    2 sigmoid(2z) - 1. `transposed` is not scaled.

    Args:
        layers: per layer (weight_ih (4H, in), weight_hh (4H, H), bias (4H,)), in `nn.LSTM`'s order of gates.
        output_weight: (H,), output_bias: () – the output is output_weight · h + output_bias.
    """

    def __init__(self, layers, output_weight, output_bias):
        self.dtype, self.hidden, self.inputs = output_weight.dtype, layers[0][1].shape[1], layers[0][0].shape[1]
        kind, most = output_weight.numpy().dtype, self.hidden + max(w.shape[1] for w, _, _ in layers)
        weights = np.zeros((len(layers), 4 * self.hidden, most), kind)
        transposed = np.zeros((len(layers), most, 4 * self.hidden), kind)
        for l, (w, u, _) in enumerate(layers):
            both = torch.cat([w, u], 1).numpy()
            weights[l, :, :both.shape[1]] = both
            transposed[l, :both.shape[1]] = both.T
        scales = np.repeat([-1, -1, -2, -1], self.hidden) / np.log(2)
        self.weights = (scales[:, None] * weights).astype(kind).reshape(len(layers), -1)
        self.biases = (scales * np.stack([bias.numpy() for _, _, bias in layers])).astype(kind)
        self.transposed = transposed.reshape(len(layers), -1)
        self.output = np.append(output_weight.numpy(), output_bias.numpy()).astype(kind)  # (H + 1,)

    def scratch(self, steps):
        """This thread's buffer for tiles of that many steps: the last one again if it is large enough."""
        layers, H, inputs = len(self.weights), self.hidden, self.inputs
        count = LANES * ((steps + layers) * (inputs + layers * H) + (6 * steps + 1) * layers * H + steps
                         + 6 * layers * H + 2 * max(inputs, H))  # see `carve`
        kept = getattr(_thread, "scratch", None)
        if kept is None or kept.size < count or kept.dtype != self.weights.dtype:
            _thread.scratch = kept = torch.empty(count, dtype=self.dtype).numpy()  # aligned, as vectors like it
        return kept

    def zero_sums(self):
        """What `run_replay` adds to: of the weights (in blocks 4 × OUTER), the biases and the output, in float64."""
        blocks = len(self.weights), self.hidden * -(-self.weights.shape[1] // (4 * self.hidden * OUTER)) * 4 * OUTER
        return np.zeros(blocks), np.zeros(self.biases.shape), np.zeros(self.output.shape)

    def gradients(self, sums):
        """A list of such sums -> gradients as of `replay_blocks`."""
        blocked, biases, output = (parts[0] if len(parts) == 1 else sum(parts) for parts in zip(*sums))
        layers, H = [], self.hidden
        for l, (values, bias) in enumerate(zip(blocked, biases)):
            width = H if l else self.inputs
            across = -(-(width + H) // OUTER)
            weight = values[:H * across * 4 * OUTER].reshape(H, across, 4, OUTER).transpose(0, 2, 1, 3).reshape(4 * H, -1)
            layers.append([self.tensor(part) for part in (weight[:, :width], weight[:, width:width + H], bias)])
        return layers, self.tensor(output[:-1]), self.tensor(output[-1:])[0]

    def tensor(self, sums):
        return torch.from_numpy(sums.astype(self.weights.dtype))


# What is compiled ---------------------------------------------------------------------------------------------------

@in_order
def single_power(y):
    """2^y = 2^n 2^r with |r| ≤ 1/2: a polynomial, and n put into the exponent's bits. To 3e-7, relative."""
    y = single(-126) if y < single(-126) else y  # a NaN stays one
    y = single(127) if y > single(127) else y
    shifted = y + single(12582912 + 127)  # 1.5 · 2^23: what is left of the number are its integer bits
    r = y - (shifted - single(12582912 + 127))
    p = single(1.3300451e-3) * r + single(9.6697018e-3)
    p = p * r + single(5.5505592e-2)
    p = p * r + single(2.4022281e-1)
    p = p * r + single(6.9314718e-1)
    p = p * r + single(1)
    return p * np.int32(single(shifted).view(np.int32) << np.int32(23)).view(single)


@in_order
def double_power(y):
    """The same for float64, to 4e-16: 2^r as e^(r ln 2)."""
    y = -1022.0 if y < -1022 else y
    y = 1023.0 if y > 1023 else y
    n = np.floor(y + 0.5)
    r = (y - n) * 0.6931471805599453
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


# One function for float32 and one for float64: numba takes the one for its argument's type.

def sigmoid(y):
    """1 / (1 + 2^y), which is the sigmoid of -y ln 2."""
    raise NotImplementedError("only compiled functions call it")


def candidate(y):
    """2 / (1 + 2^y) - 1, which is the tanh of -y ln 2 / 2."""
    raise NotImplementedError("only compiled functions call it")


def tanh(x):
    raise NotImplementedError("only compiled functions call it")


def tanh_slope(y):
    """1 - y², the derivative where tanh is y."""
    raise NotImplementedError("only compiled functions call it")


@in_order
def sigmoid_slope(y):
    """y - y², the derivative where sigmoid is y."""
    return y - y * y


@numba.extending.overload(sigmoid)
def sigmoid_of(y):
    if y == numba.float32:
        return lambda y: single(1) / (single(1) + single_power(y))
    return lambda y: 1.0 / (1.0 + double_power(y))


@numba.extending.overload(candidate)
def candidate_of(y):
    if y == numba.float32:
        return lambda y: single(2) / (single(1) + single_power(y)) - single(1)
    return lambda y: 2.0 / (1.0 + double_power(y)) - 1.0


@numba.extending.overload(tanh)
def tanh_of(x):
    if x == numba.float32:
        return lambda x: candidate(single(-2.8853901) * x)
    return lambda x: candidate(-2.8853900817779268 * x)


@numba.extending.overload(tanh_slope)
def tanh_slope_of(y):
    if y == numba.float32:
        return lambda y: single(1) - y * y
    return lambda y: 1.0 - y * y


@compiled
def product(weight, width, bias, rows, count, x, out):
    """out = weight x + bias, of which weight[r, k] is weight[r · width + k], with `rows` rows and `count` columns."""
    blocks = rows // ROWS
    done = blocks * ROWS
    if blocks:
        product_blocks(ROWS, blocks, weight, width, bias, count, x, out)
    if rows - done >= 4:
        product_blocks(4, 1, weight[done * width:], width, bias[done:], count, x, out[done * LANES:])
        done += 4
    if rows > done:
        product_blocks(1, rows - done, weight[done * width:], width, bias[done:], count, x, out[done * LANES:])


# Loops over a row read and write few arrays each, so that what numba compiles can check that they do not overlap.

@in_order
def all_sigmoid(values):
    for j in range(len(values)):
        values[j] = sigmoid(values[j])


@in_order
def all_candidates(values):
    for j in range(len(values)):
        values[j] = candidate(values[j])


@in_order
def tanh_to(out, values):  # not onto themselves: see above
    for j in range(len(values)):
        out[j] = tanh(values[j])


@in_order
def quarters(gates):
    """i, f, g, o of (4H rows)."""
    size = len(gates) // 4
    return gates[:size], gates[size:2 * size], gates[2 * size:3 * size], gates[3 * size:]


@in_order
def activate(gates, cell, new_cell, tanhs, hidden):
    """i, f, o ← sigmoid, g ← tanh, in place, of scaled gates; c' = f c + i g, tanh(c'), h' = o tanh(c')."""
    i, f, g, o = quarters(gates)
    all_sigmoid(gates[:2 * len(i)])
    all_candidates(g)
    all_sigmoid(o)
    for j in range(len(cell)):
        new_cell[j] = f[j] * cell[j] + i[j] * g[j]
    tanh_to(tanhs, new_cell)
    for j in range(len(tanhs)):
        hidden[j] = o[j] * tanhs[j]


@in_order
def pull_back(gates, cell, tanhs, dhidden, dcell, spare):
    """gates ← dL/d(gates before activation), dcell ← dL/dc, from dhidden = dL/dh' and dcell = dL/dc'."""
    i, f, g, o = quarters(gates)
    for j in range(len(dcell)):
        dcell[j] += dhidden[j] * o[j] * tanh_slope(tanhs[j])
    for j in range(len(o)):
        o[j] = dhidden[j] * tanhs[j] * sigmoid_slope(o[j])
    for j in range(len(spare)):
        spare[j] = dcell[j] * g[j] * sigmoid_slope(i[j])
    for j in range(len(g)):
        g[j] = dcell[j] * i[j] * tanh_slope(g[j])
    for j in range(len(i)):
        i[j] = spare[j]
    for j in range(len(spare)):
        spare[j] = dcell[j] * f[j]
    for j in range(len(f)):
        f[j] = dcell[j] * cell[j] * sigmoid_slope(f[j])
    for j in range(len(dcell)):
        dcell[j] = spare[j]


@numba.njit(cache=True)
def carve(scratch, steps, inputs, layers, rows):
    """The arrays of a tile in one buffer: steps of columns, gates, c and tanh(c), all for all layers; the adjoint; then
    of one step dh and dc of each layer, dinput, a spare one; sums of the gates' adjoints."""
    H, start = rows // 4 * LANES, 0
    columns, start = part_of(scratch, start, 1, steps + layers, inputs * LANES + layers * H)
    gates, start = part_of(scratch, start, layers, steps, 4 * H)
    cells, start = part_of(scratch, start, layers, steps + 1, H)
    tanhs, start = part_of(scratch, start, layers, steps, H)
    adjoint, start = part_of(scratch, start, 1, steps, LANES)
    dhidden, start = part_of(scratch, start, 1, layers, H)
    dcells, start = part_of(scratch, start, 1, layers, H)
    rest, start = part_of(scratch, start, 1, 2, max(inputs * LANES, H))
    dgates, _ = part_of(scratch, start, 1, layers, 4 * H)
    return columns[0], gates, cells, tanhs, adjoint[0], dhidden[0], dcells[0], rest[0, 0], rest[0, 1, :H], dgates[0]


@numba.njit(cache=True)
def part_of(scratch, start, layers, steps, length):
    """(layers, steps, length) from `start` on, and where it ends."""
    stop = start + layers * steps * length
    return scratch[start:stop].reshape(layers, steps, length), stop


@compiled
def load(source, first, step, rows, width, out, out_step):
    """out[r · out_step + j] = source[first + r · step + j] for j < width, and zeros up to LANES, for r < rows."""
    if width == LANES:
        copy_rows(rows, source[first:], step, out, out_step)
        return
    for r in range(rows):
        for j in range(width):
            out[r * out_step + j] = source[first + r * step + j]
        out[r * out_step + width:r * out_step + LANES] = 0


@compiled
def store(source, width, out, start):
    """out[u, start:start + width] = source[u, :width] for all rows u of out."""
    if width == LANES:
        copy_rows(out.shape[0], source, LANES, out[0, start:], out.shape[1])
        return
    for u in range(out.shape[0]):
        for j in range(width):
            out[u, start + j] = source[u * LANES + j]


@compiled
def record(weights, biases, inputs, steps, columns, gates, cells, tanhs):
    """The forward pass of a tile over its steps."""
    layers, rows = biases.shape
    H, width = rows // 4, weights.shape[1] // rows
    for t in range(steps):
        for l in range(layers):
            below, size = max(inputs + (l - 1) * H, 0), inputs if l == 0 else H
            own = (below + size) * LANES
            product(weights[l], width, biases[l], rows, size + H, columns[t + l, below * LANES:], gates[l, t])
            activate(gates[l, t], cells[l, t], cells[l, t + 1], tanhs[l, t], columns[t + l + 1, own:own + H * LANES])


@compiled
def load_state(hidden, cells, inputs, start, width, columns, c):
    """The state before the first step into a tile."""
    layers, H, N = hidden.shape
    for l in range(layers):
        load(hidden[l].reshape(-1), start, N, H, width, columns[l, (inputs + l * H) * LANES:], LANES)
        load(cells[l].reshape(-1), start, N, H, width, c[l, 0], LANES)


@compiled
def run_step(weights, biases, output, features, offset, hidden, cells, start, stop, update, new_hidden, new_cells, scratch):
    """One step of the coordinates start … stop. features (inputs, …) begin at coordinate `offset`."""
    (layers, H, N), inputs = hidden.shape, features.shape[0]
    columns, gates, c, tanhs, outputs, _, _, _, _, _ = carve(scratch, 1, inputs, layers, 4 * H)
    for first in range(start, stop, LANES):
        width = min(LANES, stop - first)
        load(features.reshape(-1), first - offset, features.shape[1], inputs, width, columns[0], LANES)
        load_state(hidden, cells, inputs, first, width, columns, c)
        if N >= FAR and first + 2 * LANES <= stop:
            fetch_rows(layers * H, hidden.reshape(-1)[first + LANES:], N)
            fetch_rows(layers * H, cells.reshape(-1)[first + LANES:], N)
        record(weights, biases, inputs, 1, columns, gates, c, tanhs)
        product(output, H, output[H:], 1, H, columns[layers, (inputs + (layers - 1) * H) * LANES:], outputs[0])
        update[first:first + width] = outputs[0, :width]
        for l in range(layers):
            store(columns[l + 1, (inputs + l * H) * LANES:], width, new_hidden[l], first)
            store(c[l, 1], width, new_cells[l], first)


@compiled
def run_replay(weights, transposed, biases, output, squash, features, offset, hidden, cells, adjoint, start, stop, dfeatures,
               dhidden, dcells, weight_sums, bias_sums, output_sums, scratch):
    """The replay of the coordinates start … stop: adds to the sums.

    features and dfeatures (T, inputs, …) begin at coordinate `offset`; without columns dfeatures is not written.
    dhidden and dcells (layers, H, N) are the adjoints of the state after the last step, and become those of the state
    before the first one; without columns the former are zeros and the latter not written. squash: outputs go through a
    tanh.
    """
    steps, (layers, H), (_, inputs, across) = len(adjoint), hidden.shape[:2], features.shape
    wanted, carried = dfeatures.shape[2] > 0, dhidden.shape[2] > 0
    columns, gates, c, tanhs, pulls, dh, dc, dinput, spare, dgates = carve(scratch, steps, inputs, layers, 4 * H)
    zeros, top = np.zeros(max(inputs, H), weights.dtype), (inputs + (layers - 1) * H) * LANES
    for first in range(start, stop, LANES):
        within, width = first - offset, min(LANES, stop - first)
        for u in range(inputs):
            load(features.reshape(-1), u * across + within, inputs * across, steps, width, columns[0, u * LANES:],
                 columns.shape[1])
        load(adjoint.reshape(-1), first, adjoint.shape[1], steps, width, pulls.reshape(-1), LANES)
        load_state(hidden, cells, inputs, first, width, columns, c)
        if carried:
            for l in range(layers):
                load(dhidden[l].reshape(-1), first, dhidden.shape[2], H, width, dh[l], LANES)
                load(dcells[l].reshape(-1), first, dcells.shape[2], H, width, dc[l], LANES)
        else:
            dh[:], dc[:] = 0, 0
        dgates[:] = 0
        record(weights, biases, inputs, steps, columns, gates, c, tanhs)
        if squash:
            for t in range(steps):
                squash_adjoint(output, columns[t + layers, top:], pulls[t], spare)
        for t in range(steps - 1, -1, -1):
            add_output(output, pulls[t], dh[layers - 1])
            for l in range(layers - 1, -1, -1):
                pull_back(gates[l, t], c[l, t], tanhs[l, t], dh[l], dc[l], spare)
                accumulate(gates[l, t], dgates[l])
                size = inputs if l == 0 else H
                if l > 0 or wanted:
                    product(transposed[l], 4 * H, zeros, size, 4 * H, gates[l, t], dinput)
                product(transposed[l, size * 4 * H:], 4 * H, zeros, H, 4 * H, gates[l, t], dh[l])
                if l > 0:  # the input of this layer is the hidden state of the one below
                    accumulate(dinput[:H * LANES], dh[l - 1])
                elif wanted:
                    store(dinput, width, dfeatures[t], within)
        if carried:
            for l in range(layers):
                store(dh[l], width, dhidden[l], first)
                store(dc[l], width, dcells[l], first)
        step = columns.shape[1]
        for l in range(layers):
            below, count = max(inputs + (l - 1) * H, 0), inputs + H if l == 0 else 2 * H
            add_outer_blocks(4, OUTER, H, (count + OUTER - 1) // OUTER, gates[l].reshape(-1), gates.shape[2],
                             columns[l:].reshape(-1)[below * LANES:], step, steps, weight_sums[l])
            for r in range(4 * H):
                bias_sums[l, r] += total(dgates[l, r * LANES:(r + 1) * LANES])
        for t in range(steps):
            for u in range(H):
                output_sums[u] += dot(columns[t + layers, top + u * LANES:top + (u + 1) * LANES], pulls[t])
        output_sums[H] += total(pulls.reshape(-1))


@compiled
def dot(a, b):
    result = a[0] - a[0]
    for j in range(len(a)):
        result += a[j] * b[j]
    return result


@compiled
def accumulate(values, total):
    for j in range(len(values)):
        total[j] += values[j]


@compiled
def total(values):
    result = values[0] - values[0]
    for j in range(len(values)):
        result += values[j]
    return result


@compiled
def add_output(output, pulls, dhidden):
    """dhidden += output · pulls"""
    for u in range(len(output) - 1):
        row, factor = dhidden[u * LANES:(u + 1) * LANES], output[u]
        for j in range(LANES):
            row[j] += factor * pulls[j]


@compiled
def squash_adjoint(output, top, pulls, spare):
    """The adjoint of tanh(z) -> that of z = output · h + bias."""
    H = len(output) - 1
    product(output, H, output[H:], 1, H, top, spare)
    for j in range(LANES):
        pulls[j] *= tanh_slope(tanh(spare[j]))


# What others call ---------------------------------------------------------------------------------------------------

def step_blocks(packed, features, hidden, cells, inplace=False):
    """One step of the optimizer for all coordinates, without a graph: as `lstm_blocks.step_blocks`."""
    whole = hidden.is_contiguous() and cells.is_contiguous()
    new = (hidden, cells) if inplace and whole else tuple(torch.empty(hidden.shape, dtype=packed.dtype) for _ in range(2))
    update = stepper(packed, hidden, cells, new)(features)
    if inplace and not whole:
        new = hidden.copy_(new[0]), cells.copy_(new[1])
    return update, *new


def stepper(packed, hidden, cells, new=None):
    """A function that does `step_blocks` for features (start, stop) -> (inputs, width), and returns the update (N,).

    The next state goes to `new`, hidden and cells like those given; without it over those, again and again.
    """
    N, (new_hidden, new_cells), before = hidden.shape[2], new or (hidden, cells), (array(hidden), array(cells))
    after, inputs = (array(new_hidden), array(new_cells)), (packed.weights, packed.biases, packed.output)

    def step(features):
        update = torch.empty(N, dtype=packed.dtype)
        out = update.numpy()

        def work(start, stop):
            run_step(*inputs, array(features(start, stop)), start, *before, start, stop, out, *after, packed.scratch(1))

        side_by_side(work, N, STEP_CHUNK)
        return update

    return step


def replay_blocks(packed, features, hidden, cells, adjoint, squash=False, pulled=None):
    """Gradient of Σ_t ⟨adjoint_t, output_t⟩ with respect to the packed weights: as `lstm_blocks.replay_blocks`."""
    before, N = (array(hidden), array(cells), array(adjoint)), adjoint.shape[1]
    none = np.empty((1, 1, 0), packed.weights.dtype)

    def work(start, stop):
        inputs, sums = features(start, stop), packed.zero_sums()
        dfeatures = torch.empty(inputs.shape if pulled else (1, 1, 0), dtype=packed.dtype)
        run_replay(packed.weights, packed.transposed, packed.biases, packed.output, squash, array(inputs), start, *before,
                   start, stop, array(dfeatures), none, none, *sums, packed.scratch(len(adjoint)))
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
        sums = packed.zero_sums()
        run_replay(packed.weights, packed.transposed, packed.biases, packed.output, squash, before[0], 0, *before[1:], start,
                   stop, array(dfeatures[None]), *adjoints, *sums, packed.scratch(1))
        return sums

    gradients = packed.gradients(side_by_side(work, N, REPLAY_CHUNK))
    for tensor, adjoint in zip((dhidden, dcells), adjoints):
        if not tensor.is_contiguous():  # then its array was a copy
            tensor.copy_(torch.from_numpy(adjoint))
    return dfeatures, *gradients


def array(tensor):
    """A numpy array of the same memory, or a copy if that is not in one piece."""
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()


# Threads ------------------------------------------------------------------------------------------------------------

_thread = threading.local()  # each thread's scratch
_pool = (None, 0, None)  # process, threads, executor


def side_by_side(work, length, most):
    """[work(start, stop), ...] over [0, length) in pieces of at most `most`, by as many threads as torch has."""
    if length <= 8 * LANES:
        return [work(0, length)]
    threads = torch.get_num_threads()
    pieces = max(-(-length // most), min(threads, length // (8 * LANES)), 1)
    size = -(-length // (pieces * LANES)) * LANES  # whole tiles
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
