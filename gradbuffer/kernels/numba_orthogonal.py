"""Newton-Schulz iterations of a small matrix, compiled: `gradbuffer.nets.mlp.orthogonalize_matrices` for one of them.

All iterations are a polynomial in X Xᵀ times X. So only X Xᵀ and the last product are as large as X; what lies between them are
products of square matrices. What is multiplied from the right lies in tiles of `LANES` columns, what is from the left row by row.
"""

import math

import torch

from gradbuffer.kernels.llvm_blocks import LANES
from gradbuffer.kernels.matrices import ITERATIONS, NEWTON_SCHULZ
from gradbuffer.kernels.numba_compiler import compiled
from gradbuffer.kernels.numba_loops import add_product

__all__ = ["numbers_to_orthogonalize", "orthogonalize", "orthogonalized", "symmetric_product"]

FIRST, THIRD, FIFTH = NEWTON_SCHULZ
BLOCKS, WORTH_BLOCKS = 4, 256  # of a symmetric product in each direction; from what size on


def numbers_to_orthogonalize(rows, columns):
    """How many numbers `orthogonalize` writes into beside the matrix."""
    m, n = min(rows, columns), max(rows, columns)
    across, along = -(-m // LANES) * LANES, -(-n // LANES) * LANES
    return m * n + n * across + 2 * m * along + 2 * m * m + 5 * m * across


@compiled
def to_tiles(x, rows, columns, tiles):
    """(rows, columns), row by row, into tiles; what is beyond the last column becomes 0."""
    for t in range(-(-columns // LANES)):
        own = tiles[t * rows * LANES :]
        for i in range(rows):
            for j in range(LANES):
                k = t * LANES + j
                own[i * LANES + j] = x[i * columns + k] if k < columns else 0


@compiled
def from_tiles(tiles, rows, columns, x):
    """The reverse."""
    for t in range(-(-columns // LANES)):
        own = tiles[t * rows * LANES :]
        for i in range(rows):
            for j in range(min(LANES, columns - t * LANES)):
                x[i * columns + t * LANES + j] = own[i * LANES + j]


@compiled
def copy(x, out):
    for k in range(len(x)):
        out[k] = x[k]


@compiled
def turn(x, rows, columns, turned):
    for i in range(rows):
        for k in range(columns):
            turned[k * rows + i] = x[i * columns + k]


@compiled
def multiply(left, rows, count, tiles, columns, out):
    """out, in tiles, is left (rows, count) times what the tiles hold, (count, columns)."""
    for t in range(-(-columns // LANES)):
        own = out[t * rows * LANES : (t + 1) * rows * LANES]
        own[:] = 0
        add_product(left, count, rows, count, tiles[t * count * LANES :], own)


@compiled
def orthogonalize(x, rows, columns, scratch):
    """x (rows · columns), row by row, becomes nearly orthogonal."""
    kind, m, n = x.dtype.type, min(rows, columns), max(rows, columns)
    across, along = -(-m // LANES) * LANES, -(-n // LANES) * LANES
    wide, rest = scratch[: m * n], scratch[m * n :]
    turned, rest = rest[: n * across], rest[n * across :]
    tiles, rest = rest[: m * along], rest[m * along :]
    product, rest = rest[: m * along], rest[m * along :]
    square, rest = rest[: m * m], rest[m * m :]
    factor, rest = rest[: m * m], rest[m * m :]
    size = m * across
    gram, power, step, both, total = (
        rest[:size],
        rest[size : 2 * size],
        rest[2 * size : 3 * size],
        rest[3 * size : 4 * size],
        rest[4 * size : 5 * size],
    )
    norm = 0.0
    for k in range(m * n):
        norm += x[k] * x[k]
    scale = kind(1 / (math.sqrt(norm) + 1e-7))
    for k in range(m * n):
        x[k] *= scale
    if rows <= columns:
        copy(x, wide)
    else:
        turn(x, rows, columns, wide)
    to_tiles(wide, m, n, tiles)
    turn(wide, m, n, product)  # only for a moment
    to_tiles(product, n, m, turned)
    multiply(wide, m, n, turned, m, gram)
    for iteration in range(ITERATIONS):
        from_tiles(gram, m, m, square)
        multiply(square, m, m, gram, m, power)
        for k in range(size):
            step[k] = kind(THIRD) * gram[k] + kind(FIFTH) * power[k]
        for i in range(m):
            step[i // LANES * m * LANES + i * LANES + i % LANES] += kind(FIRST)
        from_tiles(step, m, m, factor)
        if iteration == 0:
            copy(step, total)
        else:
            multiply(factor, m, m, total, m, both)
            copy(both, total)
        if iteration + 1 < ITERATIONS:
            multiply(factor, m, m, gram, m, both)
            multiply(factor, m, m, both, m, gram)
    from_tiles(total, m, m, factor)
    multiply(factor, m, m, tiles, n, product)
    from_tiles(product, m, n, wide)
    if rows <= columns:
        copy(wide, x)
    else:
        turn(wide, m, n, x)


@compiled
def mirror(x, size):
    """What lies above the diagonal of x (size · size) comes to lie below it, too; tile after tile, as caches like it."""
    for first in range(0, size, LANES):
        for start in range(0, first + 1, LANES):
            for i in range(first, min(first + LANES, size)):
                for k in range(start, min(start + LANES, i)):
                    x[i * size + k] = x[k * size + i]


def orthogonalized(x, out):
    """The same of a large matrix (rows, columns), in plain torch, into `out`; returns that."""
    tall = x.shape[0] > x.shape[1]
    gram, factor, total, other = (x.new_empty((min(x.shape),) * 2) for _ in range(4))
    symmetric_product(x.mT if tall else x, x if tall else x.mT, gram)
    scale = 1 / (math.sqrt(gram.trace().item()) + 1e-7)  # the trace is the sum of the matrix's squares
    gram *= scale * scale
    for iteration in range(ITERATIONS):
        symmetric_product(gram, gram, factor, gram, THIRD, FIFTH).diagonal().add_(FIRST)
        if iteration == 0:
            total.copy_(factor)
        else:
            total, other = symmetric_product(factor, total, other), total
        if iteration + 1 < ITERATIONS:
            symmetric_product(factor, symmetric_product(factor, gram, other), gram)
    total *= scale
    return torch.mm(x, total, out=out) if tall else torch.mm(total, x, out=out)


def symmetric_product(left, right, out, added=None, beta=0.0, alpha=1.0):
    """beta · added + alpha · left · right into `out`, where that is symmetric: of a large one, what is below the diagonal is copied."""
    added = out if added is None else added
    size = len(out)
    block = -(-size // BLOCKS) if size >= WORTH_BLOCKS else size
    for first in range(0, size, block):
        last = min(first + block, size)
        given, into = (whole[first:last, first:] for whole in (added, out))
        torch.addmm(given, left[first:last], right[:, first:], beta=beta, alpha=alpha, out=into)
    if block < size:
        mirror(out.view(-1).numpy(), size)
    return out
