"""Backpropagation of the coordinatewise LSTM in Triton: through a whole unroll, and the gradients of the weights.

Tiles and weights are laid out as in `triton_kernels`. One kernel carries a block of coordinates forward and back through all steps and
writes the derivatives by the gates to memory; another multiplies these with what the gates read, over all coordinates and steps.
So no kernel holds both in its registers. This module needs triton.
"""

import triton
import triton.language as tl

from gradbuffer.kernels.triton_kernels import add_product, gates, log_sign_tile, long, tanh, with_one

__all__ = ["replay_kernel", "weight_kernel"]


@triton.jit
def below_tile(
    features,
    hs,
    layer: tl.constexpr,
    t,
    columns,
    inside,
    width,
    apart,
    plane,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    SHARPEST: tl.constexpr,
):
    """What a layer reads at step t beside its state: the features, or the next hidden state of the layer below."""
    if layer == 0 and LOG_SIGN > 0:
        grad = tl.load(features + long(t) * apart + columns, mask=inside, other=0.0)
        return log_sign_tile(grad, ROWS, LOG_SIGN, SHARPEST)
    elif layer == 0:
        return with_one(features + long(t) * INPUTS * apart, apart, columns, inside, INPUTS, ROWS)
    else:
        return with_one(hs + ((layer - 1) * plane + (t + 1) * H) * width, width, columns, inside, H, ROWS)


@triton.jit
def record_layer(
    features,
    hidden,
    cells,
    weights,
    hs,
    cs,
    layer: tl.constexpr,
    columns,
    inside,
    start,
    width,
    apart,
    adjoint_apart,
    N,
    T,
    plane,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    SHARPEST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """One layer's forward pass through all steps: its states before and after each go to hs and cs."""
    units = tl.arange(0, UNITS)[None, :]
    wanted = inside[:, None] & (units < H)
    places = (start + columns)[:, None] + (layer * H + units).to(tl.int64) * N
    h = tl.load(hidden + places, mask=wanted, other=0.0)
    c = tl.load(cells + places, mask=wanted, other=0.0)
    now = columns[:, None] + (layer * plane + units) * width
    tl.store(hs + now, h, mask=wanted)
    tl.store(cs + now, c, mask=wanted)
    for t in range(T):
        below = below_tile(
            features, hs, layer, t, columns, inside, width, apart, plane, INPUTS, H, ROWS, LOG_SIGN, SHARPEST
        )
        i, f, o, g = gates(weights, below, h, 0, UNITS, PRECISION, PTX)
        c = f * c + i * g
        h = o * tanh(c, PTX)
        now += H * width
        tl.store(hs + now, h, mask=wanted)
        tl.store(cs + now, c, mask=wanted)
    tl.debug_barrier()  # the passes that follow read what other threads of this program wrote


@triton.jit
def pulled(di, df, do, dg, weights, ROWS: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr):
    """The derivatives by what the gates read (BLOCK, ROWS), of those by the gates; weights (4 UNITS, ROWS)."""
    UNITS: tl.constexpr = di.shape[1]
    rows = tl.arange(
        0, ROWS
    )  # in the order in which a thread that holds two columns of each product holds the gates' units
    rows = rows // 8 * 8 + rows % 2 * 4 + rows % 8 // 2
    own = weights + tl.arange(0, UNITS)[:, None] * 2 * ROWS + rows[None, :]
    total = tl.zeros((di.shape[0], ROWS), di.dtype)
    total = add_product(total, di, tl.load(own), PRECISION, PTX)
    total = add_product(total, df, tl.load(own + ROWS), PRECISION, PTX)
    total = add_product(total, do, tl.load(own + 2 * UNITS * ROWS), PRECISION, PTX)
    total = add_product(total, dg, tl.load(own + (2 * UNITS + 1) * ROWS), PRECISION, PTX)
    return total.reshape(di.shape[0], ROWS // 8, 4, 2).permute(0, 1, 3, 2).reshape(di.shape[0], ROWS)


@triton.jit
def pull_back_layer(
    features,
    adjoint,
    weights,
    output_weight,
    hs,
    cs,
    handed,
    dgates,
    dfeatures,
    dhidden,
    dcells,
    output_sum,
    bias_sum,
    layer: tl.constexpr,
    columns,
    inside,
    start,
    width,
    apart,
    adjoint_apart,
    N,
    T,
    plane,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUASH: tl.constexpr,
    PULL_INPUTS: tl.constexpr,
    ENDS: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    SHARPEST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """One layer's backward pass through all steps, from the last. Returns the sums for the output's weights and its bias."""
    units = tl.arange(0, UNITS)[None, :]
    wanted = inside[:, None] & (units < H)
    now = columns[:, None] + (layer * plane + (T - 1) * H + units) * width
    place = columns[:, None] + (((layer + 1) * long(T) - 1) * 4 * H + units) * width  # in dgates
    above = columns[:, None] + (((layer + 1) * long(T) - 1) * H + units) * width  # in handed
    rows = tl.arange(0, ROWS)[None, :]
    under = columns[:, None] + ((layer * long(T) - 1) * H + rows) * width
    w_out = tl.load(output_weight + units)
    w_out_bias = tl.load(output_weight + UNITS)
    dh = tl.zeros((BLOCK, UNITS), w_out.dtype)
    dc = tl.zeros((BLOCK, UNITS), w_out.dtype)
    ends = (start + columns)[:, None] + (layer * H + units).to(tl.int64) * N
    if ENDS:
        dh = tl.load(dhidden + ends, mask=wanted, other=0.0)
        dc = tl.load(dcells + ends, mask=wanted, other=0.0)
    for back in range(T):
        t = T - 1 - back
        below = below_tile(
            features, hs, layer, t, columns, inside, width, apart, plane, INPUTS, H, ROWS, LOG_SIGN, SHARPEST
        )
        h = tl.load(hs + now, mask=wanted, other=0.0)
        c = tl.load(cs + now, mask=wanted, other=0.0)
        i, f, o, g = gates(weights, below, h, 0, UNITS, PRECISION, PTX)
        tanh_c = tanh(f * c + i * g, PTX)
        if layer == LAYERS - 1:
            pull = tl.load(adjoint + long(t) * adjoint_apart + columns, mask=inside, other=0.0)
            if SQUASH:
                squashed = tanh(tl.sum(o * tanh_c * w_out, axis=1) + w_out_bias, PTX)
                pull *= 1 - squashed * squashed
            dh += pull[:, None] * w_out
            output_sum += tl.sum(pull[:, None] * o * tanh_c, axis=0)
            bias_sum += tl.sum(pull, axis=0)
        else:
            dh += tl.load(handed + above, mask=wanted, other=0.0)
        dc += dh * o * (1 - tanh_c * tanh_c)
        di = dc * g * i * (1 - i)
        df = dc * c * f * (1 - f)
        do = dh * tanh_c * o * (1 - o)
        dg = dc * i * (1 - g * g)
        dc *= f
        tl.store(dgates + place, di, mask=wanted)
        tl.store(dgates + place + H * width, df, mask=wanted)
        tl.store(dgates + place + 2 * H * width, dg, mask=wanted)
        tl.store(dgates + place + 3 * H * width, do, mask=wanted)
        dh = pulled(di, df, do, dg, weights + ROWS * 4 * UNITS, UNITS, PRECISION, PTX)
        if layer > 0 or PULL_INPUTS:
            dbelow = pulled(di, df, do, dg, weights, ROWS, PRECISION, PTX)
            if layer > 0:
                tl.store(handed + under, dbelow, mask=inside[:, None] & (rows < H))
            else:
                features_place = columns[:, None] + (long(t) * INPUTS + rows) * width
                tl.store(dfeatures + features_place, dbelow, mask=inside[:, None] & (rows < INPUTS))
        now -= H * width
        place -= 4 * H * width
        above -= H * width
        under -= H * width
    if ENDS:
        tl.store(dhidden + ends, dh, mask=wanted)
        tl.store(dcells + ends, dc, mask=wanted)
    tl.debug_barrier()
    return output_sum, bias_sum


@triton.jit(do_not_specialize=["start", "width", "apart", "adjoint_apart", "N", "T"])
def replay_kernel(
    features,
    hidden,
    cells,
    adjoint,
    weights,
    output_weight,
    hs,
    cs,
    handed,
    dgates,
    dfeatures,
    dhidden,
    dcells,
    output_sums,
    start,
    width,
    apart,
    adjoint_apart,
    N,
    T,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST: tl.constexpr,
    BELOW: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUASH: tl.constexpr,
    PULL_INPUTS: tl.constexpr,
    ENDS: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    SHARPEST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """T steps of a block of coordinates, forward and back, layer by layer.

    features (T, INPUTS, width), with LOG_SIGN as in `step_kernel` gradients (T, width), and adjoint (T, width), whose rows lie
    `apart` and `adjoint_apart`, belong to the coordinates from `start` on of states (LAYERS, H, N).
    Written are, of width columns each: hs, cs (LAYERS, T + 1, H, ·), the states; dgates (LAYERS, T, 4, H, ·), the derivatives by the
    gates i, f, g, o before their activation; handed (LAYERS - 1, T, H, ·), those by the hidden states below; with PULL_INPUTS
    dfeatures (T, INPUTS, ·). Of each program output_sums (UNITS + 1) gets the gradients of the output's weights and bias.
    With SQUASH adjoint is the derivative by the output's tanh. With ENDS dhidden, dcells (LAYERS, H, N) are the derivatives by the
    state after the last step, and become those by the state before the first.
    """
    program = tl.program_id(0)
    columns = program * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    plane = (long(T) + 1) * H
    FIRST_SIZE: tl.constexpr = 4 * (FIRST + UNITS) * UNITS
    SIZE: tl.constexpr = 4 * (BELOW + UNITS) * UNITS
    output_sum = tl.zeros((UNITS,), output_weight.dtype.element_ty)
    bias_sum = tl.sum(output_sum, axis=0)
    record_layer(
        features,
        hidden,
        cells,
        weights,
        hs,
        cs,
        0,
        columns,
        inside,
        start,
        width,
        apart,
        adjoint_apart,
        N,
        T,
        plane,
        INPUTS,
        H,
        FIRST,
        UNITS,
        LOG_SIGN,
        SHARPEST,
        PRECISION,
        PTX,
    )
    for layer in tl.static_range(1, LAYERS):
        record_layer(
            features,
            hidden,
            cells,
            weights + FIRST_SIZE + (layer - 1) * SIZE,
            hs,
            cs,
            layer,
            columns,
            inside,
            start,
            width,
            apart,
            adjoint_apart,
            N,
            T,
            plane,
            INPUTS,
            H,
            BELOW,
            UNITS,
            LOG_SIGN,
            SHARPEST,
            PRECISION,
            PTX,
        )
    for above in tl.static_range(1, LAYERS):
        output_sum, bias_sum = pull_back_layer(
            features,
            adjoint,
            weights + FIRST_SIZE + (LAYERS - above - 1) * SIZE,
            output_weight,
            hs,
            cs,
            handed,
            dgates,
            dfeatures,
            dhidden,
            dcells,
            output_sum,
            bias_sum,
            LAYERS - above,
            columns,
            inside,
            start,
            width,
            apart,
            adjoint_apart,
            N,
            T,
            plane,
            INPUTS,
            H,
            LAYERS,
            BELOW,
            UNITS,
            BLOCK,
            SQUASH,
            PULL_INPUTS,
            ENDS,
            LOG_SIGN,
            SHARPEST,
            PRECISION,
            PTX,
        )
    output_sum, bias_sum = pull_back_layer(
        features,
        adjoint,
        weights,
        output_weight,
        hs,
        cs,
        handed,
        dgates,
        dfeatures,
        dhidden,
        dcells,
        output_sum,
        bias_sum,
        0,
        columns,
        inside,
        start,
        width,
        apart,
        adjoint_apart,
        N,
        T,
        plane,
        INPUTS,
        H,
        LAYERS,
        FIRST,
        UNITS,
        BLOCK,
        SQUASH,
        PULL_INPUTS,
        ENDS,
        LOG_SIGN,
        SHARPEST,
        PRECISION,
        PTX,
    )
    output_sums += program * (UNITS + 1)
    tl.store(output_sums + tl.arange(0, UNITS), output_sum)
    tl.store(output_sums + UNITS, bias_sum)


@triton.jit(do_not_specialize=["width", "apart", "T"])
def weight_kernel(
    below,
    hidden,
    dgates,
    sums,
    width,
    apart,
    T,
    COUNT: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    SHARPEST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Of one layer sums (programs, GATES, ROWS + UNITS): dgates times [below; 1; zeros] and [hidden; zeros], over coordinates and steps.

    below (T, COUNT, width), with LOG_SIGN gradients (T, width), whose rows lie `apart`, hidden (T, H, width), dgates (T, 4 H, width);
    GATES is a power of two, 4 H or more. Each program takes every so-many-th block of one step's coordinates.
    """
    gate = tl.arange(0, GATES)[:, None]
    units = tl.arange(0, UNITS)[None, :]
    into = tl.zeros((GATES, ROWS), sums.dtype.element_ty)
    recurrent = tl.zeros((GATES, UNITS), sums.dtype.element_ty)
    blocks = tl.cdiv(width, BLOCK)
    for number in range(tl.program_id(0), T * blocks, tl.num_programs(0)):
        t = long(number // blocks)
        columns = (number % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        own = dgates + (t * 4 * H + gate) * width + columns[None, :]
        pulls = tl.load(own, mask=inside[None, :] & (gate < 4 * H), other=0.0)
        if LOG_SIGN > 0:
            grad = tl.load(below + t * apart + columns, mask=inside, other=0.0)
            read = log_sign_tile(grad, ROWS, LOG_SIGN, SHARPEST)
        else:
            read = with_one(below + t * COUNT * apart, apart, columns, inside, COUNT, ROWS)
        h = tl.load(hidden + (t * H + units) * width + columns[:, None], mask=inside[:, None] & (units < H), other=0.0)
        into = add_product(into, pulls, read, PRECISION, PTX)
        recurrent = add_product(recurrent, pulls, h, PRECISION, PTX)
    sums += (tl.program_id(0) * GATES + gate) * (ROWS + UNITS)
    tl.store(sums + tl.arange(0, ROWS)[None, :], into)
    tl.store(sums + ROWS + units, recurrent)
