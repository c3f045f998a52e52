"""The compiled gradient of perceptrons, and the minibatches that they draw, see `numba_mlp_windows`."""

import math

import numpy as np

from gradbuffer.kernels.llvm_blocks import LANES, OUTER, add_outer_blocks
from gradbuffer.kernels.llvm_mlp import activate_rows, exp_rows
from gradbuffer.kernels.numba_compiler import compiled, in_order
from gradbuffer.kernels.numba_loops import add_product
from gradbuffer.kernels.numba_windows import IMAGE_TILES, gather

__all__ = [
    "hand_over",
    "CROSS_ENTROPY",
    "mix",
    "draw",
    "exponentials",
    "activate",
    "cross_entropy",
    "squared_error",
    "value_and_gradient",
]

CROSS_ENTROPY = 0  # among the losses


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
def value_and_gradient(layers, kinds, inputs, targets, labels, index, theta, grad, images, sums):
    """The loss of one perceptron on a minibatch; grad becomes its gradient."""
    kind, loss_kind, batch, count = kinds[0], kinds[1], len(index), len(layers)
    scores, outputs = layers[-1, 0] + layers[-1, 3], layers[-1, 1]  # rows of a tile before the outputs
    tiles, step = min(IMAGE_TILES, -(-batch // LANES)), (scores + outputs) * LANES
    size = tiles * step + (4 + OUTER) * LANES  # blocks read beyond
    x, d, rest = images[:size], images[size : 2 * size], images[2 * size :]
    turned = rest[max(scores + outputs, 4) * LANES :]
    loss, sums[:] = 0.0, 0
    for begin in range(0, batch, tiles * LANES):
        now = min(tiles, -(-(batch - begin) // LANES))
        for tile in range(now):
            at = tile * step
            gather(inputs, index, begin + tile * LANES, x[at:])
            for l in range(count):
                width, units, place, row = layers[l, 0], layers[l, 1], layers[l, 2], layers[l, 3]
                below, first = x[at + row * LANES :], at + (row + width) * LANES
                above = x[first : first + units * LANES]
                biases = theta[place + width * units :]
                for u in range(units):
                    for j in range(LANES):
                        above[u * LANES + j] = biases[u]
                add_product(theta[place:], width, units, width, below, above)
                if l + 1 < count:
                    activate(kind, units, above, d[first:])
            at += scores * LANES
            if loss_kind == CROSS_ENTROPY:
                loss += cross_entropy(x[at:], outputs, labels, index, begin + tile * LANES, d[at:], rest, rest[LANES:])
            else:
                loss += squared_error(x[at:], outputs, targets, index, begin + tile * LANES, d[at:])
        for l in range(count - 1, -1, -1):
            width, units, place, row, first = layers[l, 0], layers[l, 1], layers[l, 2], layers[l, 3], layers[l, 4]
            blocks, above = (units + 3) // 4, (row + width) * LANES
            add_outer_blocks(
                4,
                OUTER,
                blocks,
                (width + OUTER - 1) // OUTER,
                d[above:],
                step,
                x[row * LANES :],
                step,
                now,
                sums[first + 4 * blocks :],
                sums[first:],
            )
            if l > 0:
                weights, product = theta[place:], rest[: width * LANES]
                for u in range(units):
                    for k in range(width):
                        turned[k * units + u] = weights[u * width + k]
                for tile in range(now):
                    slopes = d[tile * step + row * LANES :]
                    product[:] = 0
                    add_product(turned, units, width, units, d[tile * step + above :], product)
                    for k in range(width * LANES):
                        slopes[k] *= product[k]
    for l in range(count):
        hand_over(layers[l], sums, grad)
    return loss / batch


@compiled
def hand_over(layer, sums, grad):
    """A layer's sums to their places in the gradient."""
    width, units, place, first = layer[0], layer[1], layer[2], layer[4]
    blocks, across = (units + 3) // 4, (width + OUTER - 1) // OUTER
    weights, biases, total = grad[place:], grad[place + width * units :], sums[first + 4 * blocks :]
    for u in range(units):
        biases[u] = sums[first + u]
        block, row = u // 4, u % 4
        for c in range(across):
            at = ((block * across + c) * 4 + row) * OUTER
            for k in range(min(OUTER, width - c * OUTER)):
                weights[u * width + c * OUTER + k] = total[at + k]
