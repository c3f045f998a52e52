"""Whole windows on a CPU, compiled by numba: for functions whose operations of torch cost more in being called than in being done.

`record_window` chooses by the data that a loss declares (`contracts.Loss.compiled`); for other data there is no window
here. The LSTM is that of `numba_loops`; `unrolling.unroll`, and the losses themselves, are what this is tested against.
Images lie along columns, in tiles as there.
"""

import functools
import itertools
import math

import numpy as np
import torch

from gradbuffer.contracts import PerceptronData, QuadraticData
from gradbuffer.kernels.llvm_blocks import LANES, OUTER, add_outer_blocks, gather_columns
from gradbuffer.kernels.numba_compiler import compiled
from gradbuffer.kernels.numba_loops import MORE_TILES, State, Tape, Weights, add_product, run_step
from gradbuffer.kernels.numba_tape import GateTape, array, as_rows
from gradbuffer.kernels.numba_threads import buffer, parallel_for, pieces_of, shares_of, threads_here
from gradbuffer.nests import clone

__all__ = ["ACTIVATIONS", "IMAGE_TILES", "gather", "losses_and_gradient", "record_window"]

ACTIVATIONS = "sigmoid", "relu", "tanh"  # in compiled code by their numbers
SIGMOID, RELU = 0, 1
CHUNK = 64 * LANES  # coordinates that go through all steps together, their states of some 300 kB in the cache
IMAGE_TILES = 8  # of images that go through all layers together: what the first layer reads of them is some 400 kB


@functools.singledispatch
def record_window(data, kernels, theta, state, step, updates, p, keep):
    """`LSTMKernels.window` for functions that are known by `data`, with the state (hidden, cells)."""
    return None


@record_window.register
def record_quadratics(data: QuadraticData, kernels, theta, state, step, updates, p, keep):
    if any(tensor.dtype != theta.dtype or tensor.is_cuda for tensor in data) or kernels.dtype != theta.dtype:
        return None
    functions, n = data.y.shape[:2]
    shapes = [(functions, n, n), (functions, n, 1), (functions, n, n)]
    if [tuple(part.shape) for part in data] != shapes or functions * n != len(theta):
        raise ValueError(
            "quadratics must be W (B, n, n), y (B, n, 1) and 2 Wᵀ, of B functions of n coordinates; got "
            f"{[tuple(part.shape) for part in data]} for {len(theta)} coordinates"
        )
    W, y, twice = map(array, data)
    N, kind = len(theta), kernels.weights.dtype
    theta, hidden, cells = map(clone, (theta, *state))
    losses, gradients = theta.new_empty(updates + 1, functions), theta.new_empty(updates + 1, N)
    update, tape = np.empty(N, kind), GateTape(kernels, N, updates, with_state=False) if keep else None
    kept = kernels.gates_on(tape)
    whole = W, y.reshape(functions, n), twice, array(theta), float(p), *kernels.packed
    own = *as_rows(hidden, cells), array(losses), array(gradients)

    def work(first, last):
        quadratic_window(*whole, *own, first, last, update, np.empty(n, kind), kernels.scratch(1, MORE_TILES), *kept)

    parallel_for(work, pieces_of(functions, max(CHUNK // n, LANES)))
    return losses, gradients, theta, (hidden, cells), tape


@record_window.register
def record_perceptrons(data: PerceptronData, kernels, theta, state, step, updates, p, keep):
    """By this thread alone: there is no window where several have this to do."""
    if data.images.dtype != theta.dtype or kernels.dtype != theta.dtype or threads_here() > 1:
        return None
    index, N = torch.stack([data.index(step + t) for t in range(updates + 1)]), len(theta)
    (layers, buffers), theta, hidden = layout(data.sizes, *index.shape[1:]), clone(theta), state[0]
    losses, gradients = theta.new_empty(index.shape[:2]), theta.new_empty(updates + 1, N)
    tape, own = (
        GateTape(kernels, N, updates) if keep else None,
        (hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)),
    )
    end = as_rows(*own)
    between = (*tape.state, tape.strides) if tape and tape.state.size else end
    perceptron_window(
        *map(array, (data.images, data.labels, index, theta)),
        layers,
        ACTIVATIONS.index(data.activation),
        float(p),
        *kernels.packed,
        *as_rows(*state),
        *between,
        *end,
        array(losses),
        array(gradients),
        np.empty(N, kernels.weights.dtype),
        *buffers(theta.dtype),
        kernels.scratch(1, MORE_TILES),
        *kernels.gates_on(tape),
    )
    return losses, gradients, theta, own, tape


def losses_and_gradient(
    images: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, theta: torch.Tensor, sizes: list, activation: str
):
    """Losses (B,) and the gradient (N,) of their sum, of B perceptrons theta (N,), laid out as in `run_perceptrons`; no graph.

    Args:
        images, labels: (images, pixels) and (images,), of which each perceptron reads those of its row of index (B, batch).
        sizes: inputs, units of each layer.
        activation: one of `ACTIVATIONS`.
    """
    losses, gradient, (layers, buffers) = (
        theta.new_empty(len(index)),
        torch.empty_like(theta),
        layout(sizes, *index.shape),
    )
    given = *map(array, (images, labels, index, theta)), layers, ACTIVATIONS.index(activation)
    results = array(losses), array(gradient)

    def work(first, last):
        run_perceptrons(*given, first, last, *results, *buffers(theta.dtype))

    parallel_for(work, shares_of(len(index)))
    return losses, gradient


def layout(sizes, B, batch):
    """The layers of B perceptrons as `run_perceptrons` wants them, and a function of a dtype that gives this thread's scratch
    and sums for it."""
    layers, at, row, place = [], 0, 0, max(sizes) + 3  # in blocks of 4
    for inputs, units in itertools.pairwise(sizes):
        layers.append((inputs, units, at, row, place))
        at, row, place = at + B * (inputs + 1) * units, row + inputs, place + units + (inputs + 3) * (units + OUTER)
    tiles, matrix = min(IMAGE_TILES, -(-batch // LANES)), max(inputs * units for inputs, units, *_ in layers)
    numbers = (2 * tiles * (row + sizes[-1]) + 2 + OUTER) * LANES + matrix  # blocks read beyond

    def buffers(dtype):
        return buffer("images", numbers, dtype), buffer("sums", place, torch.float64)

    return np.array(layers), buffers


# What is compiled ---------------------------------------------------------------------------------------------------


@compiled
def value_and_gradient(W, y, twice, theta, residual, gradient):
    """‖Wθ − y‖², and gradient ← 2 Wᵀ(Wθ − y); twice is 2 Wᵀ, residual (n,) is overwritten."""
    n, loss = len(theta), residual.dtype.type(0)
    for i in range(n):
        residual[i] = -y[i]
    for j in range(n):
        factor = residual.dtype.type(0.5) * theta[j]
        for i in range(n):
            residual[i] += factor * twice[j, i]
    for j in range(n):
        gradient[j] = 0
    for i in range(n):
        loss += residual[i] * residual[i]
        factor = 2 * residual[i]
        for j in range(n):
            gradient[j] += factor * W[i, j]
    return loss


@compiled
def quadratic_window(
    W,
    y,
    twice,
    theta,
    p,
    matrices,
    biases,
    output,
    hidden,
    cells,
    strides,
    losses,
    gradients,
    first,
    last,
    update,
    residual,
    scratch,
    gates,
    shares,
):
    """The window of functions first … last. The state and theta are overwritten."""
    n, updates = W.shape[1], len(gradients) - 1
    start, stop = first * n, last * n
    weights, state, tape = (
        Weights(matrices, biases, output),
        State(hidden, cells, strides),
        Tape(gates, shares, updates),
    )
    for t in range(updates + 1):
        for b in range(first, last):
            here = slice(b * n, (b + 1) * n)
            losses[t, b] = value_and_gradient(W[b], y[b], twice[b], theta[here], residual, gradients[t, here])
        if t < updates:
            run_step(weights, p, gradients[t : t + 1], 0, state, start, stop, update, state, scratch, tape, t)
            for i in range(start, stop):
                theta[i] += update[i]


@compiled
def gather(images, index, start, columns):
    """Images index[start:start + LANES] into the columns of a tile, filled up with zeros."""
    pixels, width, done = images.shape[1], min(LANES, len(index) - start), 0
    if width == LANES and pixels >= LANES:
        done = pixels - pixels % LANES
        gather_columns(images, pixels, index[start:], done, columns)
    for k in range(done, pixels):
        for j in range(LANES):
            columns[k * LANES + j] = images[index[start + j], k] if j < width else 0


@compiled
def activate(kind, y):
    for k in range(len(y)):
        if kind == SIGMOID:
            y[k] = 1 / (1 + math.exp(-y[k]))
        elif kind == RELU:
            y[k] = 0 if y[k] < 0 else y[k]
        else:
            y[k] = math.tanh(y[k])


@compiled
def pull_through(kind, y, d):
    """d = dL/dy becomes dL/dx, where the activation of x is y."""
    for k in range(len(y)):
        if kind == SIGMOID:
            d[k] *= y[k] * (1 - y[k])
        elif kind == RELU:
            d[k] = d[k] if y[k] > 0 else 0
        else:
            d[k] *= 1 - y[k] * y[k]


@compiled
def cross_entropy(scores, classes, labels, index, start, d, top, total):
    """The sum over a tile's images of the cross-entropy; d becomes its derivative by the scores, over the batch's size."""
    width, loss = min(LANES, len(index) - start), 0.0
    top[:], total[:] = -math.inf, 0
    for r in range(classes):
        for j in range(LANES):
            top[j] = max(top[j], scores[r * LANES + j])
    for r in range(classes):
        for j in range(LANES):
            d[r * LANES + j] = math.exp(scores[r * LANES + j] - top[j])
            total[j] += d[r * LANES + j]
    for j in range(width):
        label = labels[index[start + j]]
        loss += math.log(total[j]) + top[j] - scores[label * LANES + j]
        d[label * LANES + j] -= total[j]
    for j in range(LANES):
        total[j] = 1 / (total[j] * len(index)) if j < width else 0
    for r in range(classes):
        for j in range(LANES):
            d[r * LANES + j] *= total[j]
    return loss


@compiled
def forward(layer, B, b, tiles, theta, kind, last, x, step, turned):
    """What a layer of perceptron b puts out, of all tiles, `step` apart in x. layer: as of `run_perceptrons`."""
    inputs, units, at, row = layer[0], layer[1], layer[2], layer[3]
    weights, biases = theta[at + b * inputs * units :], theta[at + (B * inputs + b) * units :]
    for k in range(inputs):
        for u in range(units):
            turned[u * inputs + k] = weights[k * units + u]
    for tile in range(tiles):
        below = x[tile * step + row * LANES :]
        above = below[inputs * LANES : (inputs + units) * LANES]
        for u in range(units):
            above[u * LANES : (u + 1) * LANES] = biases[u]
        add_product(turned, inputs, units, inputs, below, above)
        if not last:
            activate(kind, above)


@compiled
def backward(layer, B, b, tiles, theta, kind, x, d, step, sums):
    """From dL/d(what the layer put out), in d as that is in x, to that of what it reads; the layer's own go to the sums."""
    inputs, units, at, row, place = layer[0], layer[1], layer[2], layer[3], layer[4]
    weights, above = theta[at + b * inputs * units :], (row + inputs) * LANES
    add_outer_blocks(
        4,
        OUTER,
        (inputs + 3) // 4,
        (units + OUTER - 1) // OUTER,
        x[row * LANES :],
        step,
        d[above:],
        step,
        tiles,
        sums[place + units :],
        sums,
    )
    for tile in range(tiles):
        start = tile * step + row * LANES
        read, slopes, own = (
            x[start : start + inputs * LANES],
            d[start : start + inputs * LANES],
            d[tile * step + above :],
        )
        for u in range(units):
            sums[place + u] += own[u * LANES : (u + 1) * LANES].sum()
        if row > 0:
            slopes[:] = 0
            add_product(weights, units, inputs, units, own, slopes)
            pull_through(kind, read, slopes)


@compiled
def hand_over(layer, B, b, sums, gradient):
    """A layer's sums to their places in the gradient."""
    inputs, units, at, place = layer[0], layer[1], layer[2], layer[4]
    weights, biases = gradient[at + b * inputs * units :], gradient[at + (B * inputs + b) * units :]
    across = (units + OUTER - 1) // OUTER
    for u in range(units):
        biases[u] = sums[place + u]
    for k in range(inputs):
        for u in range(units):
            block, within = k // 4 * across + u // OUTER, k % 4 * OUTER + u % OUTER
            weights[k * units + u] = sums[place + units + block * 4 * OUTER + within]


@compiled
def run_perceptrons(images, labels, index, theta, layers, kind, first, last, losses, gradient, scratch, sums):
    """Perceptrons first … last - 1 of those in theta (N,): layer after layer all their weights (inputs, units), then all their
    biases (units,).

    layers: of each, its inputs, its units, where its weights begin in theta, at which row of a tile its inputs do, and where
    its sums do (biases', then the weights' in blocks; the first sums are wanted by nobody). index (B, batch): which images each
    one reads. gradient (N,), losses (B,).
    """
    (B, batch), classes, scores = (
        index.shape,
        layers[-1, 1],
        layers[-1, 0] + layers[-1, 3],
    )  # rows of a tile, before the scores
    tiles, step = min(IMAGE_TILES, -(-batch // LANES)), (scores + classes) * LANES
    x, d, rest = scratch[: tiles * step], scratch[tiles * step : 2 * tiles * step], scratch[2 * tiles * step :]
    for b in range(first, last):
        own, loss, sums[:] = index[b], 0.0, 0
        for begin in range(0, batch, tiles * LANES):
            count = min(tiles, -(-(batch - begin) // LANES))
            for tile in range(count):
                gather(images, own, begin + tile * LANES, x[tile * step :])
            for l in range(len(layers)):
                forward(layers[l], B, b, count, theta, kind, l + 1 == len(layers), x, step, rest)
            for tile in range(count):
                at = tile * step + scores * LANES
                loss += cross_entropy(x[at:], classes, labels, own, begin + tile * LANES, d[at:], rest, rest[LANES:])
            for l in range(len(layers) - 1, -1, -1):
                backward(layers[l], B, b, count, theta, kind, x, d, step, sums)
        losses[b] = loss / batch
        for l in range(len(layers)):
            hand_over(layers[l], B, b, sums, gradient)


@compiled
def perceptron_window(
    images,
    labels,
    index,
    theta,
    layers,
    kind,
    p,
    matrices,
    biases,
    output,
    hidden,
    cells,
    strides,
    mid_hidden,
    mid_cells,
    mid_strides,
    end_hidden,
    end_cells,
    end_strides,
    losses,
    gradients,
    update,
    scratch,
    sums,
    step_scratch,
    gates,
    shares,
):
    """A window of them all. index (updates + 1, B, batch); theta is overwritten; the state is read, written after the last
    step to end_…, and is between them in mid_…"""
    updates = len(gradients) - 1
    weights, tape = Weights(matrices, biases, output), Tape(gates, shares, updates)
    before, after = State(hidden, cells, strides), State(mid_hidden, mid_cells, mid_strides)
    for t in range(updates + 1):
        run_perceptrons(
            images, labels, index[t], theta, layers, kind, 0, index.shape[1], losses[t], gradients[t], scratch, sums
        )
        if t < updates:
            if t == updates - 1:
                after = State(end_hidden, end_cells, end_strides)
            run_step(weights, p, gradients[t : t + 1], 0, before, 0, len(theta), update, after, step_scratch, tape, t)
            before = after
            for k in range(len(theta)):
                theta[k] += update[k]
