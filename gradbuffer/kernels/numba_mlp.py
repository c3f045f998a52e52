"""The step of a small learned optimizer on a CPU, compiled by numba: few passes over a tensor, nothing stored between features.

`gradbuffer.nets.mlp.MLPOptimizer` (variant "celo", without Newton-Schulz) is the plain version, which this one is tested against.
Here features go from a processor's registers straight into the first hidden layer. Those that are the same along a row or a column
are added up once for it. It holds arithmetic only, and checks nothing of what users pass.
"""

import math
from pathlib import Path

import lstm_numba
from gradbuffer.kernels import llvm_mlp
from gradbuffer.kernels.llvm_mlp import FACTORED, OF_MATRIX, OF_VECTOR, READ, direct_rows, factor_rows, read_rows
from lstm_numba import compiler, digest

__all__ = ["compiled", "in_order", "numbers_of_scratch", "step_adamw", "step_matrix", "step_vector"]

# What is compiled is kept by what is in all of these, as in `lstm_numba`.
SOURCES = digest([*lstm_numba.SOURCES, *sorted(Path(__file__).parent.glob("*.py")),
                  Path(__file__).parents[2] / "perceptrons_numba.py"])
compiled = compiler("contract", "reassoc", "nsz", "arcp", sources=SOURCES)
in_order = compiler("contract", "nsz", sources=SOURCES)  # sums not in another order: what rounds by adding counts on it
FEATURES = 30
TOTALS = READ + FACTORED + 1  # sums over a tensor, in float64


def numbers_of_scratch(hidden, rows, width):
    """How many numbers `step_matrix` and `step_vector` write into for a tensor (rows, width) beside its update."""
    layers = sum((a + 1) * b for a, b in zip(hidden, (*hidden[1:], 1)))
    return (rows + width) * (7 + hidden[0]) + OF_MATRIX * hidden[0] + layers


@compiled
def inverse_size(total, count):
    """1 over the root mean square."""
    return 1 / math.sqrt(total / count + 1e-9)


@compiled
def part(scratch, start, length):
    return scratch[start:start + length], start + length


@compiled
def is_zero(numbers):
    for k in range(len(numbers)):
        if numbers[k] != 0:
            return False
    return True


@compiled
def advance_factored(r, rows, squares, others, count):
    """r (3, rows), averages of the means of g² over `count` coordinates; squares (rows · others,) holds the sums."""
    kind = r.dtype.type
    for k in range(3):
        decay = kind(0.9) if k == 0 else kind(0.99) if k == 1 else kind(0.999)
        for i in range(rows):
            total = kind(0)
            for o in range(others):
                total += squares[i * others + o]
            r[k * rows + i] = decay * r[k * rows + i] + (1 - decay) * (total / kind(count) + kind(1e-30))


@compiled
def factors_and_roots(r, rows, others, over_mean, factors, roots):
    """factors (3, rows · others): 1 / √max(r_k, 1e-9), of r_k over its mean if so; roots likewise: 1 / √(r_k + 1e-8)."""
    kind, width = r.dtype.type, rows * others
    for k in range(3):
        scale = kind(1)
        if over_mean:
            mean = kind(0)
            for i in range(rows):
                mean += r[k * rows + i]
            scale = 1 / (mean / kind(rows) + kind(1e-9))
        if others == 1:
            for i in range(rows):
                x = r[k * rows + i]
                y = x * scale
                factors[k * rows + i] = 1 / math.sqrt(y if y > kind(1e-9) else kind(1e-9))
                roots[k * rows + i] = 1 / math.sqrt(x + kind(1e-8))
        else:
            for i in range(rows):
                x = r[k * rows + i]
                y = x * scale
                factor, root = 1 / math.sqrt(y if y > kind(1e-9) else kind(1e-9)), 1 / math.sqrt(x + kind(1e-8))
                for o in range(others):
                    factors[k * width + i * others + o] = factor
                    roots[k * width + i * others + o] = root


@compiled
def inverse_size_of(x, start, count):
    total = x.dtype.type(0)
    for i in range(start, start + count):
        total += x[i] * x[i]
    return x.dtype.type(inverse_size(total, count))


@compiled
def terms(r, roots, rows, others, w, H, first, with_bias, out):
    """out (H, rows · others): what r_k and 1 / √(r_k + 1e-8), over their sizes, add to each unit of the first layer.

    Their weights in w (30, H) begin at rows `first` and first + 6; the layer's bias is added if so.
    """
    width = rows * others
    s0, s1, s2 = (inverse_size_of(r, 0, rows), inverse_size_of(r, rows, rows), inverse_size_of(r, 2 * rows, rows))
    t0, t1, t2 = (inverse_size_of(roots, 0, width), inverse_size_of(roots, width, width),
                  inverse_size_of(roots, 2 * width, width))
    for u in range(H):
        bias = w[FEATURES * H + u] if with_bias else w.dtype.type(0)
        a0, a1, a2 = w[first * H + u] * s0, w[(first + 1) * H + u] * s1, w[(first + 2) * H + u] * s2
        b0, b1, b2 = w[(first + 6) * H + u] * t0, w[(first + 7) * H + u] * t1, w[(first + 8) * H + u] * t2
        own = out[u * width:(u + 1) * width]
        if others == 1:
            for i in range(rows):
                own[i] = (bias + a0 * r[i] + a1 * r[rows + i] + a2 * r[2 * rows + i] + b0 * roots[i] + b1 * roots[width + i]
                          + b2 * roots[2 * width + i])
        else:
            for i in range(rows):
                for j in range(i * others, (i + 1) * others):
                    own[j] = (bias + a0 * r[i] + a1 * r[rows + i] + a2 * r[2 * rows + i] + b0 * roots[j] + b1 * roots[width + j]
                              + b2 * roots[2 * width + j])


@compiled
def pack(w, H, totals, count, matrix, packed):
    """The weights as `direct_rows` reads them: of the first layer those of single coordinates, over their features' sizes."""
    kind = w.dtype.type
    for f in range(12):
        scale = kind(inverse_size(totals[f], count))
        for u in range(H):
            packed[f * H + u] = w[f * H + u] * scale
    features = OF_MATRIX if matrix else OF_VECTOR
    if matrix:
        for k in range(FACTORED):
            feature, scale = (12 + k if k < 3 else 24 + k), kind(inverse_size(totals[READ + k], count))
            for u in range(H):
                packed[(12 + k) * H + u] = w[feature * H + u] * scale
    else:  # three times the same feature
        scale = kind(inverse_size(totals[12], count))
        for u in range(H):
            packed[12 * H + u] = (w[12 * H + u] + w[13 * H + u] + w[14 * H + u]) * scale
    packed, w = packed[features * H:], w[(FEATURES + 1) * H:]
    for k in range(len(w)):
        packed[k] = w[k]


@compiled
def move(theta, out, total, lr, decay):
    """theta -= lr · (out over its root mean square + decay · theta)."""
    kind = theta.dtype.type
    factor, keep = kind(lr * inverse_size(total, len(theta))), kind(1 - lr * decay)
    for k in range(len(theta)):
        theta[k] = keep * theta[k] - factor * out[k]


@compiled
def step_matrix(H, rows, columns, others, grad, theta, m, v, r, c, w, lr, decay, out, scratch, totals):
    """One step of a tensor (rows, columns · others), theta and the state overwritten; out is of its size, too.

    H: sizes of the hidden layers, as `llvm_mlp` says; w: all weights in the order of `MLPOptimizer.parameters()`.
    totals (TOTALS,) is of float64.
    """
    width, units, count = columns * others, len(H[0]), len(theta)
    row_squares, at = part(scratch, 0, rows)
    column_squares, at = part(scratch, at, width)
    row_factors, at = part(scratch, at, 3 * rows)
    row_roots, at = part(scratch, at, 3 * rows)
    column_factors, at = part(scratch, at, 3 * width)
    column_roots, at = part(scratch, at, 3 * width)
    row_terms, at = part(scratch, at, units * rows)
    column_terms, at = part(scratch, at, units * width)
    packed = scratch[at:]
    totals[:], column_squares[:] = 0, 0
    read_rows(1, rows, width, grad, theta, m, count, v, row_squares, column_squares, totals)
    advance_factored(r, rows, row_squares, 1, width)
    advance_factored(c, columns, column_squares, others, rows * others)
    if totals[0] == 0 and is_zero(grad):
        return
    factors_and_roots(r, rows, 1, True, row_factors, row_roots)
    factors_and_roots(c, columns, others, False, column_factors, column_roots)
    factor_rows(rows, width, rows, grad, m, count, row_factors, column_factors, totals[READ:])
    terms(r, row_roots, rows, 1, w, units, 15, True, row_terms)
    terms(c, column_roots, columns, others, w, units, 18, False, column_terms)
    pack(w, units, totals, count, True, packed)
    direct_rows(H, 1, rows, width, rows, grad, theta, m, count, v, row_factors, column_factors, row_terms, column_terms, packed,
                out, totals[READ + FACTORED:])
    move(theta, out, totals[READ + FACTORED], lr, decay)


@compiled
def step_vector(H, grad, theta, m, v, w, lr, decay, out, scratch, totals):
    """`step_matrix` for a tensor with fewer than two axes."""
    units, count = len(H[0]), len(theta)
    totals[:] = 0
    read_rows(0, 1, count, grad, theta, m, count, v, scratch, scratch, totals)
    if totals[0] == 0 and is_zero(grad):
        return
    pack(w, units, totals, count, False, scratch)
    direct_rows(H, 0, 1, count, 1, grad, theta, m, count, v, scratch, scratch, w[FEATURES * units:], scratch, scratch, out,
                totals[READ + FACTORED:])
    move(theta, out, totals[READ + FACTORED], lr, decay)


@compiled
def step_adamw(grad, theta, m, v, steps, lr, decay):
    """AdamW(0.9, 0.95) at 20 · lr, for a tensor with fewer than two axes; steps (1,) are those done before."""
    kind = theta.dtype.type
    steps[0] += 1
    done = float(steps[0])
    moves, rate, keep = not is_zero(grad), kind(20 * lr / (1 - 0.9**done)), kind(1 - 20 * lr * decay)
    root, first, second = kind(1 / math.sqrt(1 - 0.95**done)), kind(0.9), kind(0.95)
    for k in range(len(theta)):
        g = grad[k]
        g = kind(1000) if g > kind(1000) else kind(-1000) if g < kind(-1000) else g
        m[k] = first * m[k] + (1 - first) * g
        v[k] = second * v[k] + (1 - second) * g * g
        if moves:
            theta[k] = keep * theta[k] - rate * m[k] / (math.sqrt(v[k]) * root + kind(1e-8))
