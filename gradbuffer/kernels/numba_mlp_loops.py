"""The compiled loops of the small learned optimizer's step, see `numba_mlp`."""

import math

from gradbuffer.kernels.llvm_mlp import FACTORED, OF_MATRIX, OF_VECTOR, READ, direct_rows, factor_rows, read_rows
from gradbuffer.kernels.matrices import CONTEXT_FEATURES, CONTEXT_UNITS, LARGEST_LOG
from gradbuffer.kernels.numba_compiler import compiled
from gradbuffer.kernels.numba_orthogonal import orthogonalize

__all__ = [
    "BLOCK",
    "FEATURES",
    "inverse_size",
    "part",
    "is_zero",
    "advance_factored",
    "factors_and_roots",
    "inverse_size_of",
    "log_size",
    "read_context",
    "terms",
    "pack",
    "move",
    "split_scratch",
    "rows_at_once",
    "read_part",
    "after_reading",
    "factor_part",
    "after_factors",
    "direct_part",
    "step_matrix",
    "step_vector",
    "step_adamw",
]

FEATURES = 30
BLOCK = 1 << 14  # coordinates


@compiled
def inverse_size(total, count):
    """1 over the root mean square."""
    return 1 / math.sqrt(total / count + 1e-9)


@compiled
def part(scratch, start, length):
    return scratch[start : start + length], start + length


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
def log_size(total, count, least):
    """A third of the logarithm of the root mean square."""
    return math.log(total / count + least) / 6


@compiled
def read_context(w, units, totals, count, is_vector, lr, context, bias):
    """bias (units,): the first layer's, with what the context adds to it; returns the step's length. context: its weights."""
    kind = w.dtype.type
    for u in range(units):
        bias[u] = w[FEATURES * units + u]
    if len(context) == 0:
        return 1.0
    size, second, outputs = totals[2] / count + 1e-6, log_size(totals[6], count, 1e-38) / 2, units + 1
    read = (
        log_size(totals[3], count, 1e-30) - second,
        log_size(totals[4], count, 1e-30) - second,
        log_size(totals[5], count, 1e-30) - second,
        log_size(totals[0], count, 1e-30) - second,
        math.log(size) / 6,
        math.log((lr * lr + 1e-12) / size) / 6,
        1.0 if is_vector else 0.0,
    )
    biases, length = context[CONTEXT_FEATURES * CONTEXT_UNITS :], 0.0
    second = biases[CONTEXT_UNITS:]
    last = second[CONTEXT_UNITS * outputs :]
    for k in range(CONTEXT_UNITS):
        hidden = float(biases[k])
        for f in range(CONTEXT_FEATURES):
            hidden += read[f] * context[f * CONTEXT_UNITS + k]
        if hidden > 0:
            for u in range(units):
                bias[u] += kind(hidden * second[k * outputs + u])
            length += hidden * second[k * outputs + units]
    for u in range(units):
        bias[u] += last[u]
    return math.exp(LARGEST_LOG * math.tanh((length + last[units]) / LARGEST_LOG))


@compiled
def terms(r, roots, rows, others, w, H, first, bias, out):
    """out (H, rows · others): what r_k and 1 / √(r_k + 1e-8), over their sizes, add to each unit of the first layer.

    Their weights in w (30, H) begin at rows `first` and first + 6; bias: (H,), added, or of length 0.
    """
    width = rows * others
    s0, s1, s2 = (inverse_size_of(r, 0, rows), inverse_size_of(r, rows, rows), inverse_size_of(r, 2 * rows, rows))
    t0, t1, t2 = (
        inverse_size_of(roots, 0, width),
        inverse_size_of(roots, width, width),
        inverse_size_of(roots, 2 * width, width),
    )
    for u in range(H):
        start = bias[u] if len(bias) > 0 else w.dtype.type(0)
        a0, a1, a2 = w[first * H + u] * s0, w[(first + 1) * H + u] * s1, w[(first + 2) * H + u] * s2
        b0, b1, b2 = w[(first + 6) * H + u] * t0, w[(first + 7) * H + u] * t1, w[(first + 8) * H + u] * t2
        own = out[u * width : (u + 1) * width]
        if others == 1:
            for i in range(rows):
                own[i] = (
                    start
                    + a0 * r[i]
                    + a1 * r[rows + i]
                    + a2 * r[2 * rows + i]
                    + b0 * roots[i]
                    + b1 * roots[width + i]
                    + b2 * roots[2 * width + i]
                )
        else:
            for i in range(rows):
                for j in range(i * others, (i + 1) * others):
                    own[j] = (
                        start
                        + a0 * r[i]
                        + a1 * r[rows + i]
                        + a2 * r[2 * rows + i]
                        + b0 * roots[j]
                        + b1 * roots[width + j]
                        + b2 * roots[2 * width + j]
                    )


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
    packed, w = packed[features * H :], w[(FEATURES + 1) * H :]
    for k in range(len(w)):
        packed[k] = w[k]


@compiled
def move(theta, out, first, last, total, length, lr, decay):
    """theta -= lr · (length · out over its root mean square + decay · theta), from `first` to `last` - 1."""
    kind = theta.dtype.type
    factor, keep = kind(lr * length * inverse_size(total, len(theta))), kind(1 - lr * decay)
    for k in range(first, last):
        theta[k] = keep * theta[k] - factor * out[k]


@compiled
def split_scratch(scratch, units, rows, width):
    """What passes over a matrix share: sums of g² of rows and columns; factors and roots of both; what they add to the first
    layer; the first layer's bias; the packed weights."""
    row_squares, at = part(scratch, 0, rows)
    column_squares, at = part(scratch, at, width)
    row_factors, at = part(scratch, at, 3 * rows)
    row_roots, at = part(scratch, at, 3 * rows)
    column_factors, at = part(scratch, at, 3 * width)
    column_roots, at = part(scratch, at, 3 * width)
    row_terms, at = part(scratch, at, units * rows)
    column_terms, at = part(scratch, at, units * width)
    bias, at = part(scratch, at, units)
    return (
        row_squares,
        column_squares,
        row_factors,
        row_roots,
        column_factors,
        column_roots,
        row_terms,
        column_terms,
        bias,
        scratch[at:],
    )


@compiled
def rows_at_once(width):
    """So many that sums over them are taken in the numbers' own dtype, before they go to float64."""
    return max(BLOCK // width, 1)


@compiled
def read_part(H, first, last, rows, width, grad, theta, m, v, scratch, column_squares, totals):
    """`read_rows` for rows first … last - 1 of a matrix; column_squares may be others than the scratch's."""
    row_squares, some = split_scratch(scratch, len(H[0]), rows, width)[0], rows_at_once(width)
    for i in range(first, last, some):
        at = i * width
        read_rows(
            1,
            min(some, last - i),
            width,
            grad[at:],
            theta[at:],
            m[at:],
            rows * width,
            v[at:],
            row_squares[i:],
            column_squares,
            totals,
        )


@compiled
def after_reading(H, rows, columns, others, grad, r, c, scratch, column_squares, totals):
    """The rows' and columns' averages and factors; whether the tensor moves."""
    width = columns * others
    row_squares, _, row_factors, row_roots, column_factors, column_roots, _, _, _, _ = split_scratch(
        scratch, len(H[0]), rows, width
    )
    advance_factored(r, rows, row_squares, 1, width)
    advance_factored(c, columns, column_squares, others, rows * others)
    if totals[0] == 0 and is_zero(grad):
        return False
    factors_and_roots(r, rows, 1, True, row_factors, row_roots)
    factors_and_roots(c, columns, others, False, column_factors, column_roots)
    return True


@compiled
def factor_part(H, first, last, rows, width, grad, m, scratch, totals):
    """`factor_rows` for rows first … last - 1."""
    _, _, row_factors, _, column_factors, _, _, _, _, _ = split_scratch(scratch, len(H[0]), rows, width)
    some = rows_at_once(width)
    for i in range(first, last, some):
        at = i * width
        factor_rows(
            min(some, last - i),
            width,
            rows,
            grad[at:],
            m[at:],
            rows * width,
            row_factors[i:],
            column_factors,
            totals[READ:],
        )


@compiled
def after_factors(H, rows, columns, others, r, c, w, context, lr, scratch, totals):
    """What the perceptron reads of rows and columns, and its weights over the features' sizes; returns the step's length."""
    width, units = columns * others, len(H[0])
    _, _, _, row_roots, _, column_roots, row_terms, column_terms, bias, packed = split_scratch(
        scratch, units, rows, width
    )
    length = read_context(w, units, totals, rows * width, False, lr, context, bias)
    terms(r, row_roots, rows, 1, w, units, 15, bias, row_terms)
    terms(c, column_roots, columns, others, w, units, 18, bias[:0], column_terms)
    pack(w, units, totals, rows * width, True, packed)
    return length


@compiled
def direct_part(H, first, last, rows, width, grad, theta, m, v, scratch, out, totals):
    """`direct_rows` for rows first … last - 1."""
    _, _, row_factors, _, column_factors, _, row_terms, column_terms, _, packed = split_scratch(
        scratch, len(H[0]), rows, width
    )
    some = rows_at_once(width)
    for i in range(first, last, some):
        at = i * width
        direct_rows(
            H,
            1,
            min(some, last - i),
            width,
            rows,
            grad[at:],
            theta[at:],
            m[at:],
            rows * width,
            v[at:],
            row_factors[i:],
            column_factors,
            row_terms[i:],
            column_terms,
            packed,
            out[at:],
            totals[READ + FACTORED :],
        )


@compiled
def step_matrix(
    H, rows, columns, others, grad, theta, m, v, r, c, w, context, orthogonal, lr, decay, out, scratch, totals
):
    """One step of a tensor (rows, columns · others), theta and the state overwritten; out is of its size, too.

    H: sizes of the hidden layers, as `llvm_mlp` says; w, context: all weights in the order of `MLPOptimizer.parameters()`,
    context's apart, or of length 0; orthogonal: whether the update becomes so. totals (TOTALS,) is of float64.
    """
    width = columns * others
    column_squares = split_scratch(scratch, len(H[0]), rows, width)[1]
    totals[:], column_squares[:] = 0, 0
    read_part(H, 0, rows, rows, width, grad, theta, m, v, scratch, column_squares, totals)
    if not after_reading(H, rows, columns, others, grad, r, c, scratch, column_squares, totals):
        return
    factor_part(H, 0, rows, rows, width, grad, m, scratch, totals)
    length = after_factors(H, rows, columns, others, r, c, w, context, lr, scratch, totals)
    direct_part(H, 0, rows, rows, width, grad, theta, m, v, scratch, out, totals)
    if orthogonal:
        orthogonalize(out, rows, width, scratch)
        totals[READ + FACTORED] = 0
        for k in range(len(out)):
            totals[READ + FACTORED] += out[k] * out[k]
    move(theta, out, 0, len(theta), totals[READ + FACTORED], length, lr, decay)


@compiled
def step_vector(H, grad, theta, m, v, w, context, lr, decay, out, scratch, totals):
    """`step_matrix` for a tensor with fewer than two axes."""
    units, count = len(H[0]), len(theta)
    totals[:] = 0
    read_rows(0, 1, count, grad, theta, m, count, v, scratch, scratch, totals)
    if totals[0] == 0 and is_zero(grad):
        return
    bias, scratch = scratch[:units], scratch[units:]
    length = read_context(w, units, totals, count, True, lr, context, bias)
    pack(w, units, totals, count, False, scratch)
    direct_rows(
        H,
        0,
        1,
        count,
        1,
        grad,
        theta,
        m,
        count,
        v,
        scratch,
        scratch,
        bias,
        scratch,
        scratch,
        out,
        totals[READ + FACTORED :],
    )
    move(theta, out, 0, count, totals[READ + FACTORED], length, lr, decay)


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
