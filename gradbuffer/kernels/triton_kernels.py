"""The coordinatewise LSTM in Triton: one step of all layers as one kernel, and what the other kernels share with it.

The LSTM of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1) is too small for a GPU's libraries: its products
have 20 columns, and what it takes is launches and state traffic. Here one program carries a block of coordinates
through everything. Its tiles have coordinates along rows and the units of one gate along columns, so that a gate is a
product with a matrix that all programs share; in memory, coordinates are contiguous.

Sizes are padded to powers of two, at least 16, with weights of 0: a padded unit's cell stays 0 and gets no gradient.
A layer reads [below; 1] and its own hidden state, so its bias is one more row of its weights: (BELOW + UNITS, 4 · UNITS).
Their columns are (2, UNITS, 2), the gates ((i, f), (o, g)) of each unit: what one thread then holds of a product on tensor cores
are all gates of its units. `triton_lstm` pads, launches and takes the padding off; this module needs triton.
"""

import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "add_product",
    "advance_block",
    "exp",
    "gates",
    "log_sign_tile",
    "long",
    "sigmoid",
    "step_kernel",
    "tanh",
    "with_one",
]


@triton.jit
def long(x):
    """An integer in 64 bits; also where the interpreter has a plain one."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def exp(x, PTX: tl.constexpr):
    """e^x; in float32 two instructions, right to some 2e-7 but for subnormal results, which are 0."""
    if PTX and x.dtype == tl.float32:
        x *= 1.4426950408889634  # log2 e
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@triton.jit
def sigmoid(x, PTX: tl.constexpr = False):
    y = 1 + exp(-x, PTX)
    if PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1 / y


@triton.jit
def tanh(x, PTX: tl.constexpr = False):
    return 2 * sigmoid(2 * x, PTX) - 1


@triton.jit
def tf32(x, NEAREST: tl.constexpr = False):
    """The upper part of a float32, as tensor cores read it; or what it is nearest to."""
    bits = x.to(tl.int32, bitcast=True)
    if NEAREST:
        bits += 4096
    return (bits & -8192).to(tl.float32, bitcast=True)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr, PTX: tl.constexpr):
    """total + a·b; "bf16" rounds the factors and sums in the total's dtype, "tf32x3" splits them in two and adds the three
    larger products, other names are `tl.dot`'s own.

    The interpreter's `dot` knows neither bfloat16 nor tf32, so their rounding is done for it.
    """
    KIND: tl.constexpr = "tf32" if PTX else "ieee"
    if PRECISION == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if not PTX:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, total, out_dtype=total.dtype)
    elif PRECISION == "tf32x3":
        upper, right = tf32(a), tf32(b)
        total = tl.dot(a - upper, right, total, input_precision=KIND)
        total = tl.dot(upper, b - right, total, input_precision=KIND)
        return tl.dot(upper, right, total, input_precision=KIND)
    elif PRECISION == "tf32":
        return tl.dot(tf32(a, True), tf32(b, True), total, input_precision=KIND)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def gates(weights, below, hidden, FROM: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr):
    """The four gates of COUNT units from unit FROM on, (BLOCK, COUNT) each: one product, whose columns are then told apart."""
    BELOW: tl.constexpr = below.shape[1]
    UNITS: tl.constexpr = hidden.shape[1]
    column = tl.arange(0, 4 * COUNT)[:, None]
    column = column // (2 * COUNT) * (2 * UNITS) + 2 * FROM + column % (2 * COUNT)
    into = tl.load(weights + column * BELOW + tl.arange(0, BELOW)[None, :])
    recurrent = tl.load(weights + 4 * UNITS * BELOW + column * UNITS + tl.arange(0, UNITS)[None, :])
    total = tl.zeros((hidden.shape[0], 4 * COUNT), hidden.dtype)
    total = add_product(total, below, tl.trans(into), PRECISION, PTX)
    total = add_product(total, hidden, tl.trans(recurrent), PRECISION, PTX)
    total = total.reshape(hidden.shape[0], 2, COUNT, 2).permute(0, 2, 1, 3)
    left, right = tl.split(total)
    i, o = tl.split(left)
    f, g = tl.split(right)
    return sigmoid(i, PTX), sigmoid(f, PTX), sigmoid(o, PTX), tanh(g, PTX)


@triton.jit
def with_one(pointer, stride, columns, inside, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """The tile [what lies in COUNT rows of memory; 1; zeros], (BLOCK, ROWS), and the rows' numbers."""
    rows = tl.arange(0, ROWS)[None, :]
    tile = tl.load(pointer + rows * stride + columns[:, None], mask=inside[:, None] & (rows < COUNT), other=0.0)
    return tl.where(rows == COUNT, 1.0, tile).to(tile.dtype)


@triton.jit
def log_sign_tile(grad, FIRST: tl.constexpr, LOG_SIGN: tl.constexpr, SHARPEST: tl.constexpr):
    """The tile [log|∇| / p; sgn ∇; 1; zeros] (BLOCK, FIRST) of gradients (BLOCK,), with LOG_SIGN = p and SHARPEST = e^p."""
    sharpest = tl.full((), SHARPEST, grad.dtype)  # a plain number would be rounded to float32
    size = tl.log(tl.maximum(tl.abs(grad), 1 / sharpest)) / tl.full((), LOG_SIGN, grad.dtype)
    sign = tl.minimum(tl.maximum(grad * sharpest, -1.0), 1.0)
    rows = tl.arange(0, FIRST)[None, :]
    below = tl.where(rows == 0, size[:, None], tl.where(rows == 1, sign[:, None], tl.where(rows == 2, 1.0, 0.0)))
    return below.to(grad.dtype)


@triton.jit
def advance_units(
    below,
    hidden,
    cells,
    new_hidden,
    new_cells,
    columns,
    inside,
    weights,
    output_weight,
    stride,
    new_stride,
    FROM: tl.constexpr,
    COUNT: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """One layer's step of COUNT of its units from FROM on. Returns their part of the output, if it is the last layer."""
    units = FROM + tl.arange(0, COUNT)[None, :]
    wanted = inside[:, None] & (units < H)
    c = tl.load(cells + columns[:, None] + long(units) * stride, mask=wanted, other=0.0)
    i, f, o, g = gates(weights, below, hidden, FROM, COUNT, PRECISION, PTX)
    c = f * c + i * g
    h = o * tanh(c, PTX)
    places = columns[:, None] + long(units) * new_stride
    tl.store(new_hidden + places, h, mask=wanted)
    tl.store(new_cells + places, c, mask=wanted)
    return tl.sum(h * tl.load(output_weight + units), axis=1)


@triton.jit
def advance_block(
    below,
    hidden,
    cells,
    new_hidden,
    new_cells,
    columns,
    inside,
    weights,
    output_weight,
    stride,
    new_stride,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST: tl.constexpr,
    BELOW: tl.constexpr,
    UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """All layers' step of a block of coordinates, from states (LAYERS, H, N) to others, whose rows lie so far apart. Returns the outputs.

    below: the tile that the first layer reads beside its state. The output's bias stands behind its weights, which are padded.
    Units go by sixteens and a smaller rest: of 20 padded to 32, activations and products would cost half as much again.
    """
    WHOLE: tl.constexpr = H // 16 * 16
    REST: tl.constexpr = H - WHOLE
    PADDED_REST: tl.constexpr = 4 if REST <= 4 else (8 if REST <= 8 else 16)
    units = tl.arange(0, UNITS)[None, :]
    wanted = inside[:, None] & (units < H)
    out = tl.zeros_like(tl.sum(below, axis=1))
    for layer in tl.static_range(LAYERS):
        h = tl.load(hidden + columns[:, None] + long(units) * stride, mask=wanted, other=0.0)
        tl.debug_barrier()  # it may be overwritten from here on, by other threads of this program
        out = tl.zeros_like(out)
        for first in tl.static_range(0, WHOLE, 16):
            out += advance_units(
                below,
                h,
                cells,
                new_hidden,
                new_cells,
                columns,
                inside,
                weights,
                output_weight,
                stride,
                new_stride,
                first,
                16,
                H,
                PRECISION,
                PTX,
            )
        if REST > 0:
            out += advance_units(
                below,
                h,
                cells,
                new_hidden,
                new_cells,
                columns,
                inside,
                weights,
                output_weight,
                stride,
                new_stride,
                WHOLE,
                PADDED_REST,
                H,
                PRECISION,
                PTX,
            )
        if layer == 0:
            weights += 4 * (FIRST + UNITS) * UNITS
        else:
            weights += 4 * (BELOW + UNITS) * UNITS
        if layer < LAYERS - 1:
            tl.debug_barrier()  # the new state was written by other threads of this program
            below = with_one(new_hidden, long(new_stride), columns, inside, H, BELOW)
        hidden += long(stride) * H
        cells += long(stride) * H
        new_hidden += long(new_stride) * H
        new_cells += long(new_stride) * H
    return out + tl.load(output_weight + UNITS)


@triton.jit(do_not_specialize=["start", "width", "stride", "new_stride"])  # compiling takes a minute: once is enough
def step_kernel(
    features,
    hidden,
    cells,
    new_hidden,
    new_cells,
    weights,
    output_weight,
    update,
    start,
    width,
    stride,
    new_stride,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST: tl.constexpr,
    BELOW: tl.constexpr,
    UNITS: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    SHARPEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """One step of the optimizer: preprocessing, all layers, the output and the next state of BLOCK coordinates.

    features (INPUTS, width) are made already, or with LOG_SIGN = p > 0 gradients (1, width), SHARPEST = e^p. They belong to the
    coordinates from `start` on of the states, see `advance_block`, and of update (N,).
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if LOG_SIGN > 0:
        grad = tl.load(features + columns, mask=inside, other=0.0)
        below = log_sign_tile(grad, FIRST, LOG_SIGN, SHARPEST)
    else:
        below = with_one(features, width, columns, inside, INPUTS, FIRST)
    out = advance_block(
        below,
        hidden + start,
        cells + start,
        new_hidden + start,
        new_cells + start,
        columns,
        inside,
        weights,
        output_weight,
        stride,
        new_stride,
        H,
        LAYERS,
        FIRST,
        BELOW,
        UNITS,
        PRECISION,
        PTX,
    )
    tl.store(update + start + columns, out, mask=inside)


INTERPRETED = not isinstance(step_kernel, triton.JITFunction)  # by TRITON_INTERPRET=1: on the CPU, without a compiler
