"""The backward pass of a whole unroll of the coordinatewise LSTM as one Triton kernel.

Its tiles and its weights are laid out as in `triton_kernels`. This module needs triton.
"""

import triton
import triton.language as tl

from gradbuffer.kernels.triton_kernels import add_product, gates, matrix, tanh, with_one

__all__ = ["replay_kernel"]


@triton.jit
def below_tile(
    features,
    tape,
    layer: tl.constexpr,
    t,
    columns,
    inside,
    width,
    plane,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a layer reads at step t beside its state: the features, or the next hidden state of the layer below."""
    if layer == 0:
        return with_one(features + t * INPUTS * width, width, columns, inside, INPUTS, ROWS)
    else:
        lanes = tl.arange(0, BLOCK)
        return with_one(tape + 2 * (layer - 1) * plane + (t + 1) * H * BLOCK, BLOCK, lanes, lanes >= 0, H, ROWS)


@triton.jit
def record_layer(
    features,
    hidden,
    cells,
    weights,
    tape,
    layer: tl.constexpr,
    columns,
    inside,
    start,
    width,
    N,
    T,
    plane,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One layer's forward pass through all steps: its states before and after each go to the tape."""
    units = tl.arange(0, UNITS)[None, :]
    wanted = (units < H) & (columns >= 0)[:, None]
    places = (start + columns)[:, None] + (layer * H + units).to(tl.int64) * N
    h = tl.load(hidden + places, mask=inside[:, None] & (units < H), other=0.0)
    c = tl.load(cells + places, mask=inside[:, None] & (units < H), other=0.0)
    now = tape + 2 * layer * plane + units * BLOCK + tl.arange(0, BLOCK)[:, None]
    tl.store(now, h, mask=wanted)
    tl.store(now + plane, c, mask=wanted)
    for t in range(T):
        below = below_tile(features, tape, layer, t, columns, inside, width, plane, INPUTS, H, ROWS, BLOCK)
        i, f, o, g = gates(weights, below, h, PRECISION, INTERPRET)
        c = f * c + i * g
        h = o * tanh(c)
        tl.store(now + (t + 1) * H * BLOCK, h, mask=wanted)
        tl.store(now + plane + (t + 1) * H * BLOCK, c, mask=wanted)
    tl.debug_barrier()  # the passes that follow read what other threads of this program wrote


@triton.jit
def pull_back_layer(
    features,
    adjoint,
    weights,
    output_weight,
    sums,
    output_sum,
    tape,
    layer: tl.constexpr,
    columns,
    inside,
    width,
    T,
    plane,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One layer's backward pass through all steps, from the last; adds to the sums and returns that of the output."""
    units = tl.arange(0, UNITS)[None, :]
    lanes = tl.arange(0, BLOCK)[:, None]
    kept = (units < H) & (lanes >= 0)
    now = tape + 2 * layer * plane + units * BLOCK + lanes
    rows = tl.arange(0, ROWS)[None, :]
    handed = tape + 2 * LAYERS * plane  # derivatives by the hidden states, from each layer to the one below
    GATE: tl.constexpr = (ROWS + UNITS) * UNITS
    HIDDEN: tl.constexpr = ROWS * UNITS
    w_out = tl.load(output_weight + units)
    into_i, into_hidden_i = tl.load(matrix(sums, ROWS, UNITS)), tl.load(matrix(sums + HIDDEN, UNITS, UNITS))
    into_f = tl.load(matrix(sums + GATE, ROWS, UNITS))
    into_hidden_f = tl.load(matrix(sums + GATE + HIDDEN, UNITS, UNITS))
    into_o = tl.load(matrix(sums + 2 * GATE, ROWS, UNITS))
    into_hidden_o = tl.load(matrix(sums + 2 * GATE + HIDDEN, UNITS, UNITS))
    into_g = tl.load(matrix(sums + 3 * GATE, ROWS, UNITS))
    into_hidden_g = tl.load(matrix(sums + 3 * GATE + HIDDEN, UNITS, UNITS))
    dh = tl.zeros((BLOCK, UNITS), w_out.dtype)
    dc = tl.zeros((BLOCK, UNITS), w_out.dtype)
    for back in range(T):
        t = T - 1 - back
        below = below_tile(features, tape, layer, t, columns, inside, width, plane, INPUTS, H, ROWS, BLOCK)
        h = tl.load(now + t * H * BLOCK, mask=kept, other=0.0)
        c = tl.load(now + plane + t * H * BLOCK, mask=kept, other=0.0)
        i, f, o, g = gates(weights, below, h, PRECISION, INTERPRET)
        tanh_c = tanh(f * c + i * g)
        if layer == LAYERS - 1:
            pull = tl.load(adjoint + t * width + columns, mask=inside, other=0.0)[:, None]
            dh += pull * w_out
            output_sum += tl.sum(pull * o * tanh_c, axis=0)
        else:
            dh += tl.load(handed + (layer * T + t) * H * BLOCK + units * BLOCK + lanes, mask=kept, other=0.0)
        dc += dh * o * (1 - tanh_c * tanh_c)
        di = dc * g * i * (1 - i)
        df = dc * c * f * (1 - f)
        do = dh * tanh_c * o * (1 - o)
        dg = dc * i * (1 - g * g)
        dc *= f
        below, h = tl.trans(below), tl.trans(h)
        into_i = add_product(into_i, below, di, PRECISION, INTERPRET)
        into_f = add_product(into_f, below, df, PRECISION, INTERPRET)
        into_o = add_product(into_o, below, do, PRECISION, INTERPRET)
        into_g = add_product(into_g, below, dg, PRECISION, INTERPRET)
        into_hidden_i = add_product(into_hidden_i, h, di, PRECISION, INTERPRET)
        into_hidden_f = add_product(into_hidden_f, h, df, PRECISION, INTERPRET)
        into_hidden_o = add_product(into_hidden_o, h, do, PRECISION, INTERPRET)
        into_hidden_g = add_product(into_hidden_g, h, dg, PRECISION, INTERPRET)
        dh = tl.zeros_like(dh)
        dh = add_back(dh, di, weights + HIDDEN, UNITS, PRECISION, INTERPRET)
        dh = add_back(dh, df, weights + GATE + HIDDEN, UNITS, PRECISION, INTERPRET)
        dh = add_back(dh, do, weights + 2 * GATE + HIDDEN, UNITS, PRECISION, INTERPRET)
        dh = add_back(dh, dg, weights + 3 * GATE + HIDDEN, UNITS, PRECISION, INTERPRET)
        if layer > 0:
            dbelow = tl.zeros((BLOCK, ROWS), w_out.dtype)
            dbelow = add_back(dbelow, di, weights, ROWS, PRECISION, INTERPRET)
            dbelow = add_back(dbelow, df, weights + GATE, ROWS, PRECISION, INTERPRET)
            dbelow = add_back(dbelow, do, weights + 2 * GATE, ROWS, PRECISION, INTERPRET)
            dbelow = add_back(dbelow, dg, weights + 3 * GATE, ROWS, PRECISION, INTERPRET)
            tl.store(
                handed + ((layer - 1) * T + t) * H * BLOCK + rows * BLOCK + lanes,
                dbelow,
                mask=(rows < H) & (lanes >= 0),
            )
    tl.store(matrix(sums, ROWS, UNITS), into_i)
    tl.store(matrix(sums + HIDDEN, UNITS, UNITS), into_hidden_i)
    tl.store(matrix(sums + GATE, ROWS, UNITS), into_f)
    tl.store(matrix(sums + GATE + HIDDEN, UNITS, UNITS), into_hidden_f)
    tl.store(matrix(sums + 2 * GATE, ROWS, UNITS), into_o)
    tl.store(matrix(sums + 2 * GATE + HIDDEN, UNITS, UNITS), into_hidden_o)
    tl.store(matrix(sums + 3 * GATE, ROWS, UNITS), into_g)
    tl.store(matrix(sums + 3 * GATE + HIDDEN, UNITS, UNITS), into_hidden_g)
    tl.debug_barrier()
    return output_sum


@triton.jit
def add_back(total, dgate, weights, ROWS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """total + dgate · (those ROWS of a gate's weights)ᵀ."""
    weight = tl.load(matrix(weights, ROWS, dgate.shape[1]))
    return add_product(total, dgate, tl.trans(weight), PRECISION, INTERPRET)


@triton.jit(do_not_specialize=["start", "width", "N", "T", "sums_size", "tape_size"])
def replay_kernel(
    features,
    hidden,
    cells,
    adjoint,
    weights,
    output_weight,
    sums,
    tape,
    start,
    width,
    N,
    T,
    sums_size,
    tape_size,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST: tl.constexpr,
    BELOW: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Backward pass through T steps: each program takes every so-many-th block and adds to sums of its own.

    Layer by layer, not step by step: the gradients of one layer's weights then stay in registers through all steps.
    The tape, (2 · LAYERS, T + 1, H, BLOCK) and (LAYERS - 1, T, H, BLOCK) for each program, keeps hidden states, cells
    and what each layer hands to the one below; the gates are computed again, which saves their memory. features
    (T, INPUTS, width) and adjoint (T, width) belong to the coordinates from `start` on of states (LAYERS, H, N).
    """
    program = tl.program_id(0)
    tape += program.to(tl.int64) * tape_size
    sums += program.to(tl.int64) * (sums_size + UNITS)  # of the weights, then of the output's
    plane = (T + 1) * H * BLOCK
    FIRST_SIZE: tl.constexpr = 4 * (FIRST + UNITS) * UNITS
    SIZE: tl.constexpr = 4 * (BELOW + UNITS) * UNITS
    output_place = sums + sums_size + tl.arange(0, UNITS)
    output_sum = tl.load(output_place)
    for block in range(program, tl.cdiv(width, BLOCK), tl.num_programs(0)):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        record_layer(
            features,
            hidden,
            cells,
            weights,
            tape,
            0,
            columns,
            inside,
            start,
            width,
            N,
            T,
            plane,
            INPUTS,
            H,
            FIRST,
            UNITS,
            BLOCK,
            PRECISION,
            INTERPRET,
        )
        for layer in tl.static_range(1, LAYERS):
            record_layer(
                features,
                hidden,
                cells,
                weights + FIRST_SIZE + (layer - 1) * SIZE,
                tape,
                layer,
                columns,
                inside,
                start,
                width,
                N,
                T,
                plane,
                INPUTS,
                H,
                BELOW,
                UNITS,
                BLOCK,
                PRECISION,
                INTERPRET,
            )
        for above in tl.static_range(1, LAYERS):
            offset = FIRST_SIZE + (LAYERS - above - 1) * SIZE
            output_sum = pull_back_layer(
                features,
                adjoint,
                weights + offset,
                output_weight,
                sums + offset,
                output_sum,
                tape,
                LAYERS - above,
                columns,
                inside,
                width,
                T,
                plane,
                INPUTS,
                H,
                LAYERS,
                BELOW,
                UNITS,
                BLOCK,
                PRECISION,
                INTERPRET,
            )
        output_sum = pull_back_layer(
            features,
            adjoint,
            weights,
            output_weight,
            sums,
            output_sum,
            tape,
            0,
            columns,
            inside,
            width,
            T,
            plane,
            INPUTS,
            H,
            LAYERS,
            FIRST,
            UNITS,
            BLOCK,
            PRECISION,
            INTERPRET,
        )
    tl.store(output_place, output_sum)
