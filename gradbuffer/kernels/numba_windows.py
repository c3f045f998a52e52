"""Whole windows on a CPU, compiled by numba: for functions whose operations of torch cost more in being called than in being done.

`record_window` chooses by the data that a loss declares (`contracts.Loss.compiled`); for other data there is no window
here. The LSTM is that of `numba_loops`; `unrolling.unroll`, and the losses themselves, are what this is tested against.
Images lie along columns, in tiles as there.
"""

import functools

import numpy as np
import torch

from gradbuffer.contracts import PerceptronData, QuadraticData
from gradbuffer.kernels.llvm_blocks import LANES
from gradbuffer.kernels.numba_compiler import compiled
from gradbuffer.kernels.numba_loops import MORE_TILES, State, Tape, Weights, run_step
from gradbuffer.kernels.numba_mlp_gradients import ACTIVATIONS, CROSS_ENTROPY, layers_of, scratch_of, value_and_gradient
from gradbuffer.kernels.numba_tape import GateTape, array, as_rows, flat
from gradbuffer.kernels.numba_threads import buffer, parallel_for, pieces_of, shares_of, threads_here
from gradbuffer.nests import clone

__all__ = ["losses_and_gradient", "record_window"]

CHUNK = 64 * LANES  # coordinates that go through all steps together, their states of some 300 kB in the cache


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
    own = *flat(array(hidden), array(cells)), array(losses), array(gradients)

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
    theta, hidden = clone(theta), state[0]
    losses, gradients = theta.new_empty(index.shape[:2]), theta.new_empty(updates + 1, N)
    tape, own = (
        GateTape(kernels, N, updates) if keep else None,
        (hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)),
    )
    end = as_rows(*own)
    between = (*tape.state, tape.strides) if tape and tape.state.size else end
    perceptron_window(
        *map(array, (data.images, data.labels, index, theta)),
        *tables_of(index.shape[1], data.sizes, data.activation),
        float(p),
        *kernels.packed,
        *as_rows(*state),
        *between,
        *end,
        array(losses),
        array(gradients),
        np.empty(N, kernels.weights.dtype),
        *buffers(data.sizes, index.shape[2], theta.dtype),
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
    losses, gradient = theta.new_empty(len(index)), torch.empty_like(theta)
    given = *map(array, (images, labels, index, theta)), *tables_of(len(index), sizes, activation)
    results = array(losses), array(gradient)

    def work(first, last):
        run_perceptrons(*given, first, last, *results, *buffers(sizes, index.shape[1], theta.dtype))

    parallel_for(work, shares_of(len(index)))
    return losses, gradient


def tables_of(B, sizes, activation):
    """The layers and kinds of B such perceptrons, as `run_perceptrons` wants them."""
    return layers_of(tuple(sizes), B), np.array([ACTIVATIONS.index(activation), CROSS_ENTROPY])


def buffers(sizes, batch, dtype):
    """This thread's scratch and sums for it."""
    images, sums = scratch_of(tuple(sizes), batch)
    return buffer("images", images, dtype), buffer("sums", sums, torch.float64)


# What is compiled ---------------------------------------------------------------------------------------------------


@compiled
def quadratic_and_gradient(W, y, twice, theta, residual, gradient):
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
            losses[t, b] = quadratic_and_gradient(W[b], y[b], twice[b], theta[here], residual, gradients[t, here])
        if t < updates:
            run_step(weights, p, gradients[t : t + 1], 0, state, start, stop, update, state, scratch, tape, t)
            for i in range(start, stop):
                theta[i] += update[i]


@compiled
def run_perceptrons(images, labels, index, theta, layers, kinds, first, last, losses, gradient, scratch, sums):
    """Perceptrons first … last - 1 of those in theta (N,): layer after layer all their weights (inputs, units), then all their
    biases (units,).

    layers: `layers_of` them all; kinds: as of `value_and_gradient`. index (B, batch): which images each one reads. gradient (N,),
    losses (B,).
    """
    for b in range(first, last):
        losses[b] = value_and_gradient(
            layers[b], kinds, True, images, images, labels, index[b], theta, gradient, scratch, sums
        )


@compiled
def perceptron_window(
    images,
    labels,
    index,
    theta,
    layers,
    kinds,
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
            images, labels, index[t], theta, layers, kinds, 0, index.shape[1], losses[t], gradients[t], scratch, sums
        )
        if t < updates:
            if t == updates - 1:
                after = State(end_hidden, end_cells, end_strides)
            run_step(weights, p, gradients[t : t + 1], 0, before, 0, len(theta), update, after, step_scratch, tape, t)
            before = after
            for k in range(len(theta)):
                theta[k] += update[k]
