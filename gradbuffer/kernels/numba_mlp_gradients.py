"""The compiled gradient of perceptrons, for `numba_windows` and `numba_mlp_windows`, and the minibatches that the latter draw."""

import functools
import itertools
import math

import numpy as np

from gradbuffer.kernels.llvm_blocks import LANES, OUTER, add_outer_blocks, gather_columns
from gradbuffer.kernels.llvm_mlp import activate_rows, exp_rows
from gradbuffer.kernels.numba_compiler import compiled, in_order
from gradbuffer.kernels.numba_loops import add_product

__all__ = [
    "ACTIVATIONS",
    "hand_over",
    "CROSS_ENTROPY",
    "mix",
    "draw",
    "exponentials",
    "activate",
    "cross_entropy",
    "layers_of",
    "scratch_of",
    "squared_error",
    "value_and_gradient",
]

ACTIVATIONS = "sigmoid", "relu", "tanh", "silu"  # in compiled code by their numbers
CROSS_ENTROPY = 0  # among the losses
IMAGE_TILES = 8  # of images that go through all layers together: what the first layer reads of them is some 400 kB


@functools.cache
def layers_of(sizes: tuple, B: int = 1):
    """(B, layers, 7) of B perceptrons that lie layer by layer, all their weights before all their biases: of each layer its inputs,
    its units, where its weights and where its biases begin, at which row of a tile its inputs do, where the sums of its
    gradient do (biases', then the weights' in blocks), and where they end."""
    layers, at, row, place = np.empty((B, len(sizes) - 1, 7), np.int64), 0, 0, max(sizes) + 3
    for l, (inputs, units) in enumerate(itertools.pairwise(sizes)):
        end = place + units + -(-inputs // 4) * 4 * -(-units // OUTER) * OUTER
        for b in range(B):
            weights, biases = B * at + b * inputs * units, B * (at + inputs * units) + b * units
            layers[b, l] = inputs, units, weights, biases, row, place, end
        at, row, place = at + (inputs + 1) * units, row + inputs, end
    return layers


def scratch_of(sizes: tuple, batch: int):
    """How many numbers `value_and_gradient` wants for its images, and how many for its sums."""
    tiles, rows, layers = min(IMAGE_TILES, -(-batch // LANES)), sum(sizes), layers_of(sizes)[0]
    turned = max(inputs * units for inputs, units, *_ in layers)
    return 2 * (tiles * rows + 4 + OUTER) * LANES + max(rows, 4) * LANES + turned, int(layers[-1, -1])


@compiled
def mix(x):
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def draw(seed, step, examples, index):
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = mix(mix(np.uint64(seed) + golden) + np.uint64(step) * golden)
    for i in range(len(index)):
        number = mix(start + np.uint64(i) * golden) >> np.uint64(32)
        index[i] = np.int64((number * np.uint64(examples)) >> np.uint64(32))


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


@in_order
def exponentials(rows, x, least, out):
    exp_rows(rows, x, least, out)


@in_order
def activate(kind, rows, x, slopes):
    if kind == 0:
        activate_rows(0, rows, x, slopes)
    elif kind == 1:
        activate_rows(1, rows, x, slopes)
    elif kind == 2:
        activate_rows(2, rows, x, slopes)
    else:
        activate_rows(3, rows, x, slopes)


@compiled
def cross_entropy(scores, classes, labels, index, start, d, top, total):
    """The sum over a tile's images of the cross-entropy; d becomes its derivative by the scores, over the batch's size."""
    kind, width, loss = d.dtype.type, min(LANES, len(index) - start), 0.0
    for j in range(LANES):
        top[j] = scores[j]
        total[j] = 0
    for r in range(1, classes):
        for j in range(LANES):
            top[j] = max(top[j], scores[r * LANES + j])
    exponentials(classes, scores, top, d)
    for r in range(classes):
        for j in range(LANES):
            total[j] += d[r * LANES + j]
    for j in range(width):
        at = labels[index[start + j]] * LANES + j
        loss += math.log(total[j]) + top[j] - scores[at]
        d[at] -= total[j]
    for j in range(LANES):
        total[j] = 1 / (total[j] * kind(len(index))) if j < width else kind(0)
    for r in range(classes):
        for j in range(LANES):
            d[r * LANES + j] *= total[j]
    return loss


@compiled
def squared_error(outputs, count, targets, index, start, d):
    """The sum over a tile's examples of the mean over outputs of the squared differences; d as in `cross_entropy`."""
    width, loss, factor = min(LANES, len(index) - start), 0.0, d.dtype.type(2 / (len(index) * count))
    gather(targets, index, start, d)
    for r in range(count):
        for j in range(LANES):
            difference = outputs[r * LANES + j] - d[r * LANES + j] if j < width else d.dtype.type(0)
            loss += difference * difference
            d[r * LANES + j] = factor * difference
    return loss / count


@compiled
def value_and_gradient(layers, kinds, inputs_first, inputs, targets, labels, index, theta, grad, images, sums):
    """The loss of one perceptron on a minibatch; its parameters' places in grad get its gradient.

    layers: its own of `layers_of`. inputs_first: weights are (inputs, units), else (units, inputs). The first sums are wanted by
    nobody.
    """
    kind, loss_kind, batch, count = kinds[0], kinds[1], len(index), len(layers)
    scores, outputs = layers[-1, 0] + layers[-1, 4], layers[-1, 1]  # rows of a tile before the outputs
    tiles, step = min(IMAGE_TILES, -(-batch // LANES)), (scores + outputs) * LANES
    size = tiles * step + (4 + OUTER) * LANES  # blocks read beyond
    x, d, rest = images[:size], images[size : 2 * size], images[2 * size :]
    turned = rest[max(scores + outputs, 4) * LANES :]
    loss, sums[:] = 0.0, 0
    for begin in range(0, batch, tiles * LANES):
        now = min(tiles, -(-(batch - begin) // LANES))
        for tile in range(now):
            gather(inputs, index, begin + tile * LANES, x[tile * step :])
        for l in range(count):
            width, units, place, bias, row = layers[l, 0], layers[l, 1], layers[l, 2], layers[l, 3], layers[l, 4]
            weights = matrix(theta[place:], units, width, not inputs_first, turned)
            for tile in range(now):
                below = x[tile * step + row * LANES :]
                above = below[width * LANES : (width + units) * LANES]
                for u in range(units):
                    above[u * LANES : (u + 1) * LANES] = theta[bias + u]
                add_product(weights, width, units, width, below, above)
                if l + 1 < count:
                    activate(kind, units, above, d[tile * step + (row + width) * LANES :])
        for tile in range(now):
            start, at = begin + tile * LANES, tile * step + scores * LANES
            if loss_kind == CROSS_ENTROPY:
                loss += cross_entropy(x[at:], outputs, labels, index, start, d[at:], rest, rest[LANES:])
            else:
                loss += squared_error(x[at:], outputs, targets, index, start, d[at:])
        for l in range(count - 1, -1, -1):
            width, units, place, row, first = layers[l, 0], layers[l, 1], layers[l, 2], layers[l, 4], layers[l, 5]
            above, product = (row + width) * LANES, rest[: width * LANES]
            add_outer_blocks(
                4,
                OUTER,
                (width + 3) // 4,
                (units + OUTER - 1) // OUTER,
                x[row * LANES :],
                step,
                d[above:],
                step,
                now,
                sums[first + units :],
                sums,
            )
            for tile in range(now):
                own = d[tile * step + above :]
                for u in range(units):
                    total = own.dtype.type(0)
                    for j in range(LANES):
                        total += own[u * LANES + j]
                    sums[first + u] += total
            if l > 0:
                weights = matrix(theta[place:], width, units, inputs_first, turned)
                for tile in range(now):
                    slopes = d[tile * step + row * LANES :]
                    product[:] = 0
                    add_product(weights, units, width, units, d[tile * step + above :], product)
                    for k in range(width * LANES):
                        slopes[k] *= product[k]
    for l in range(count):
        hand_over(layers[l], inputs_first, sums, grad)
    return loss / batch


@compiled
def matrix(weights, rows, columns, as_it_is, turned):
    """Weights (rows, columns), flat: those given, or what they are in the other order, put into `turned`."""
    if as_it_is:
        return weights
    for c in range(columns):
        for r in range(rows):
            turned[r * columns + c] = weights[c * rows + r]
    return turned


@compiled
def hand_over(layer, inputs_first, sums, grad):
    """A layer's sums to their places in the gradient."""
    inputs, units, total = layer[0], layer[1], sums[layer[5] + layer[1] :]
    weights, biases, across = grad[layer[2] :], grad[layer[3] :], (units + OUTER - 1) // OUTER
    for u in range(units):
        biases[u] = sums[layer[5] + u]
    for k in range(inputs):
        for u in range(units):
            block, within = k // 4 * across + u // OUTER, k % 4 * OUTER + u % OUTER
            weights[k * units + u if inputs_first else u * inputs + k] = total[block * 4 * OUTER + within]
