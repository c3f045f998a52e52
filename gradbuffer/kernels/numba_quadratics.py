"""Windows of quadratics on a CPU, compiled by numba: for functions so small that calling torch costs more than they do.

The functions of a meta-batch do not read each other. So a share of them goes through all steps of the window, functions
and optimizer, within the cache and in one call. The LSTM is that of `numba_lstm`; `unrolling.unroll` is what this is
tested against. It holds arithmetic only.
"""

import numpy as np

from gradbuffer.kernels.numba_lstm import LANES, MORE_TILES, Room, array, as_it_lies, compiled, no_room, run_step, side_by_side
from gradbuffer.nests import clone

__all__ = ["record_quadratics"]

CHUNK = 64 * LANES  # coordinates that go through all steps together, their states of some 300 kB in the cache


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
def run_window(W, y, twice, theta, p, weights, biases, output, hidden, cells, lie, losses, gradients, first, last, update,
               residual, scratch, room, shares):
    """The window of functions first … last. The state and theta are overwritten."""
    n = W.shape[1]
    start, stop = first * n, last * n
    for t in range(len(gradients)):
        for b in range(first, last):
            here = slice(b * n, (b + 1) * n)
            losses[t, b] = value_and_gradient(W[b], y[b], twice[b], theta[here], residual, gradients[t, here])
        if t + 1 < len(gradients):
            run_step(weights, biases, output, p, gradients[t:t + 1], 0, hidden, cells, lie, start, stop, update, hidden,
                     cells, lie, scratch, room, shares, t, len(gradients) - 1)
            for i in range(start, stop):
                theta[i] += update[i]


def record_quadratics(packed, quadratics, theta, hidden, cells, updates, p, keep):
    """`unrolling.record` for quadratics and a `CoordinatewiseLSTM` with these packed weights.

    quadratics: W (B, n, n), y (B, n, 1) and 2 Wᵀ. p: of "log_sign", or 0 for no preprocessing.
    """
    W, y, twice = map(array, quadratics)
    (functions, n), N, kind = W.shape[:2], len(theta), packed.weights.dtype
    theta, hidden, cells = map(clone, (theta, hidden, cells))
    losses, gradients = theta.new_empty(updates + 1, functions), theta.new_empty(updates + 1, N)
    update, room = np.empty(N, kind), Room(packed, N, updates, with_state=False) if keep else None
    kept = (room.array, room.shares) if room else no_room(packed)
    whole = W, y.reshape(functions, n), twice, array(theta), float(p), packed.weights, packed.biases, packed.output
    own = *as_it_lies(array(hidden), array(cells)), array(losses), array(gradients)

    def work(first, last):
        run_window(*whole, *own, first, last, update, np.empty(n, kind), packed.scratch(1, MORE_TILES), *kept)

    side_by_side(work, functions, max(CHUNK // n, LANES))
    return losses, gradients, theta, (hidden, cells), room
