"""Losses and gradients of small perceptrons on a CPU, compiled by numba: for networks whose operations of torch cost more in
being called than in being done.

The cross-entropy of `optimizees.MNISTNet`, images along columns, in tiles as in `lstm_numba`. It holds arithmetic only;
`optimizees.PerceptronLoss` is the plain version, which this one is tested against.
"""

import math

import numpy as np
import torch

from lstm_numba import (LANES, TILES, Room, add_product, array, as_it_lies, buffer, compiled, no_room, run_step, shared_out)
from register_blocks import OUTER, add_outer_blocks, gather_columns
from state_nests import clone

__all__ = ["ACTIVATIONS", "losses_and_gradient", "record_perceptrons"]

ACTIVATIONS = "sigmoid", "relu", "tanh"  # in compiled code by their numbers
SIGMOID, RELU = 0, 1
IMAGE_TILES = 8  # of images that go through all layers together: what the first layer reads of them is some 400 kB


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
def blocked(inputs, units):
    """How many numbers `add_outer_blocks` makes of a matrix."""
    return (inputs + 3) // 4 * ((units + OUTER - 1) // OUTER) * 4 * OUTER


@compiled
def run_perceptrons(images, labels, index, theta, sizes, kind, first, last, losses, gradient, scratch, sums):
    """Perceptrons first … last - 1 of those in theta (N,): layer after layer all their weights (inputs, units), then all their
    biases (units,).

    sizes: inputs, units of each layer. index (B, batch): which images each one reads. gradient (N,), losses (B,).
    """
    layers, (B, batch), rows, spare = len(sizes) - 1, index.shape, sizes.sum(), sizes.sum() + 4  # sums that nobody wants
    tiles = min(IMAGE_TILES, -(-batch // LANES))
    stop, step = tiles * rows * LANES, rows * LANES  # of what layers read and put out, of all tiles and of one
    x, d = scratch[:stop], scratch[stop:2 * stop]  # the latter their derivatives
    total, top, turned = scratch[2 * stop:], scratch[2 * stop + LANES:], scratch[2 * stop + 2 * LANES:]
    for b in range(first, last):
        own, loss, sums[:] = index[b], 0.0, 0
        for begin in range(0, batch, tiles * LANES):
            count = min(tiles, -(-(batch - begin) // LANES))
            for tile in range(count):
                gather(images, own, begin + tile * LANES, x[tile * step:])
            at, row, place = 0, 0, spare  # of the layer: its weights in theta, what it reads in a tile, its sums
            for l in range(layers):
                inputs, units = sizes[l], sizes[l + 1]
                after, weights = row + inputs, theta[at + b * inputs * units:]
                for k in range(inputs):
                    for u in range(units):
                        turned[u * inputs + k] = weights[k * units + u]
                at += B * inputs * units
                for tile in range(count):
                    y = x[tile * step + after * LANES:tile * step + (after + units) * LANES]
                    for u in range(units):
                        y[u * LANES:(u + 1) * LANES] = theta[at + b * units + u]
                    add_product(turned, inputs, units, inputs, x[tile * step + row * LANES:], y)
                    if l + 1 < layers:
                        activate(kind, y)
                at, row, place = at + B * units, after, place + units + blocked(inputs, units)
            for tile in range(count):
                here = tile * step + row * LANES
                loss += cross_entropy(x[here:], sizes[layers], labels, own, begin + tile * LANES, d[here:], top, total)
            for l in range(layers - 1, -1, -1):
                inputs, units = sizes[l], sizes[l + 1]
                at, before, place = at - B * (inputs + 1) * units, row - inputs, place - units - blocked(inputs, units)
                add_outer_blocks(4, OUTER, (inputs + 3) // 4, (units + OUTER - 1) // OUTER, x[before * LANES:], step,
                                 d[row * LANES:], step, count, sums[place + units:], sums)
                for tile in range(count):
                    here, below = tile * step + row * LANES, tile * step + before * LANES
                    for u in range(units):
                        sums[place + u] += d[here + u * LANES:here + (u + 1) * LANES].sum()
                    if l > 0:
                        d[below:below + inputs * LANES] = 0
                        add_product(theta[at + b * inputs * units:], units, inputs, units, d[here:], d[below:])
                        pull_through(kind, x[below:below + inputs * LANES], d[below:below + inputs * LANES])
                row = before
        losses[b], at, place = loss / batch, 0, spare
        for l in range(layers):
            inputs, units = sizes[l], sizes[l + 1]
            weights, across = gradient[at + b * inputs * units:], (units + OUTER - 1) // OUTER
            for k in range(inputs):
                for u in range(units):
                    block, within = k // 4 * across + u // OUTER, k % 4 * OUTER + u % OUTER
                    weights[k * units + u] = sums[place + units + block * 4 * OUTER + within]
            at += B * inputs * units
            for u in range(units):
                gradient[at + b * units + u] = sums[place + u]
            at, place = at + B * units, place + units + blocked(inputs, units)


@compiled
def run_window(images, labels, index, theta, sizes, kind, p, weights, biases, output, hidden, cells, lie, mid_hidden, mid_cells,
               mid_lie, end_hidden, end_cells, end_lie, losses, gradients, update, scratch, sums, step_scratch, room, shares):
    """A window of them all. index (updates + 1, B, batch); theta is overwritten; the state is read, written after the last
    step to end_…, and is between them in mid_…"""
    updates = len(gradients) - 1
    for t in range(updates + 1):
        run_perceptrons(images, labels, index[t], theta, sizes, kind, 0, index.shape[1], losses[t], gradients[t], scratch, sums)
        if t < updates:
            if t > 0:
                hidden, cells, lie = mid_hidden, mid_cells, mid_lie
            if t == updates - 1:
                mid_hidden, mid_cells, mid_lie = end_hidden, end_cells, end_lie
            run_step(weights, biases, output, p, gradients[t:t + 1], 0, hidden, cells, lie, 0, len(theta), update, mid_hidden,
                     mid_cells, mid_lie, step_scratch, room, shares, t, updates)
            for k in range(len(theta)):
                theta[k] += update[k]


def losses_and_gradient(images, labels, index, theta, sizes, activation):
    """Losses (B,) and the gradient (N,) of their sum, of B perceptrons theta (N,), which lie as in `run_perceptrons`; no graph.

    Args:
        images, labels: (images, pixels) and (images,), of which each perceptron reads those of its row of index (B, batch).
        sizes: inputs, units of each layer.
        activation: one of `ACTIVATIONS`.
    """
    sizes, kind = np.array(sizes), ACTIVATIONS.index(activation)
    losses, gradient = theta.new_empty(len(index)), torch.empty_like(theta)
    given, results = map(array, (images, labels, index, theta)), (array(losses), array(gradient))
    given = *given, sizes, kind

    def work(first, last):
        run_perceptrons(*given, first, last, *results, *buffers(sizes, index.shape[1], theta.dtype))

    shared_out(work, len(index))
    return losses, gradient


def record_perceptrons(packed, images, labels, index, sizes, activation, theta, hidden, cells, p, keep):
    """`unrolling.record` for perceptrons and a `CoordinatewiseLSTM` with these packed weights, by this thread alone.

    index (updates + 1, B, batch); else as of `losses_and_gradient`. p: of "log_sign", or 0 for no preprocessing.
    """
    sizes, updates, N = np.array(sizes), len(index) - 1, len(theta)
    losses, gradients, theta = theta.new_empty(index.shape[:2]), theta.new_empty(updates + 1, N), clone(theta)
    room, own = Room(packed, N, updates) if keep else None, tuple(torch.empty(hidden.shape, dtype=theta.dtype) for _ in range(2))
    end = as_it_lies(*map(array, own))
    between = (*room.state, room.lie) if room and room.state.size else end
    run_window(*map(array, (images, labels, index, theta)), sizes, ACTIVATIONS.index(activation), float(p), packed.weights,
               packed.biases, packed.output, *as_it_lies(array(hidden), array(cells)), *between, *end, array(losses),
               array(gradients), np.empty(N, packed.weights.dtype), *buffers(sizes, index.shape[2], theta.dtype),
               packed.scratch(1, TILES), *((room.array, room.shares) if room else no_room(packed)))
    return losses, gradients, theta, own, room


def buffers(sizes, batch, dtype):
    """This thread's scratch and sums for `run_perceptrons`."""
    layers, tiles = list(zip(sizes.tolist(), sizes[1:].tolist())), min(IMAGE_TILES, -(-batch // LANES))
    count = 2 * tiles * int(sizes.sum()) * LANES + max(i * u for i, u in layers) + (2 + OUTER) * LANES
    places = int(sizes.sum()) + 4 + sum((i + 4) * (u + OUTER) + u for i, u in layers)  # blocks reach beyond
    return buffer("images", count, dtype), buffer("sums", places, torch.float64)
