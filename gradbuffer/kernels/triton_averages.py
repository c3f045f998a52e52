"""Learned optimizers that read Adam's moving averages, in Triton: `RNNProp` and `NormalizedLSTM`, the readings in the kernels.

A step (readings, an ELU layer if there is one, all layers of the LSTM, the output's tanh, and the averages after it) is one launch, and so
are the readings of a whole replay, a program of which goes through all steps. The readings in torch, which these are tested against, are
those networks' `read` and `embed`, in `gradbuffer.nets.normalized`. This module needs triton.

Tiles of averages have coordinates along rows and along columns, here numbered as rows of the readings: ∇ itself at GRADIENT among the
averages of ∇, up to number BETAS, then the average of ∇², and a clock, zeros behind. ∇ is the average that keeps nothing, so memory has
no row for it.
"""

import triton
import triton.language as tl

from gradbuffer.kernels.triton_group import gradient_at, memory_at
from gradbuffer.kernels.triton_kernels import add_product, advance_block, exp, long

__all__ = ["averages_group_kernel", "averages_step_kernel", "layer_kernel", "read_kernel"]


@triton.jit
def one_minus_exp(x, PTX: tl.constexpr):
    """1 - e^x of x ≤ 0; in float32 by its series near 0, where the difference has lost its digits."""
    if x.dtype == tl.float32:
        near = tl.maximum(x, -0.25)
        series = 1 + near * 0.25 * (1 + near * 0.2 * (1 + near * 0.16666667))
        series = -near * (1 + near * 0.5 * (1 + near * 0.33333333 * series))
        return tl.where(x > -0.25, series, 1 - exp(x, PTX))
    else:
        return 1 - exp(x, PTX)


@triton.jit
def odd_tanh(x, PTX: tl.constexpr):
    """tanh, to a relative precision and exactly odd: what becomes of -x is the opposite."""
    part = one_minus_exp(-2 * tl.abs(x), PTX)
    size = part / (2 - part)
    return tl.where(x < 0, -size, size)


@triton.jit
def column_of(tile, number):
    """One column of a tile, (BLOCK, 1)."""
    columns = tl.arange(0, tile.shape[1])[None, :]
    return tl.sum(tl.where(columns == number, tile, 0.0).to(tile.dtype), axis=1)[:, None]


@triton.jit
def averages_at(columns, inside, stride, ROWS: tl.constexpr, BETAS: tl.constexpr, GRADIENT: tl.constexpr):
    """Where in memory a tile's averages lie, in rows so far apart, and which of its places have one there."""
    rows = tl.arange(0, ROWS)[None, :]
    places = columns[:, None] + long(rows - (rows > GRADIENT).to(tl.int32)) * stride
    return places, inside[:, None] & (rows != GRADIENT) & (rows < BETAS + 3)


@triton.jit
def take_readings(
    grad, averages, numbers, BETAS: tl.constexpr, GRADIENT: tl.constexpr, TIMED: tl.constexpr, PTX: tl.constexpr
):
    """The readings (BLOCK, ROWS) of ∇ (BLOCK,), and the averages after it of those before, (BLOCK, ROWS) both.

    The clock is the average of 1, or with TIMED the number of the step, which is a reading too. numbers: as of `numbers_of`.
    """
    ROWS: tl.constexpr = averages.shape[1]
    rows = tl.arange(0, ROWS)[None, :]
    slope = grad[:, None]
    fresh = tl.where(rows <= BETAS, slope, tl.where(rows == BETAS + 1, slope * slope, 1.0)).to(grad.dtype)
    averages = tl.load(numbers + rows) * averages + tl.load(numbers + ROWS + rows) * fresh
    clock = column_of(averages, BETAS + 2)
    if TIMED:
        share = one_minus_exp(clock * tl.load(numbers + 2 * ROWS + rows), PTX)
    else:
        share = clock
    corrected = averages / tl.where(rows == GRADIENT, 1.0, share).to(grad.dtype)
    readings = corrected / tl.sqrt(column_of(corrected, BETAS + 1) + tl.load(numbers + 3 * ROWS))
    last = tl.zeros_like(readings)
    if TIMED:
        age = tl.log(tl.minimum(clock, tl.load(numbers + 3 * ROWS + 2)) / tl.load(numbers + 3 * ROWS + 1))
        last = tl.where(rows == BETAS + 1, age, 0.0).to(grad.dtype)
    return tl.where(rows <= BETAS, readings, last), averages


@triton.jit
def layer_tile(readings, layer_weight, layer_bias, INPUTS: tl.constexpr, FIRST: tl.constexpr, BETAS: tl.constexpr):
    """What the layer between readings and LSTM makes before its activation, (BLOCK, FIRST). weight (INPUTS, BETAS + 1)."""
    rows = tl.arange(0, FIRST)[None, :]
    total = tl.load(layer_bias + rows, mask=rows < INPUTS, other=0.0)
    for number in tl.static_range(BETAS + 1):
        weight = tl.load(layer_weight + rows * (BETAS + 1) + number, mask=rows < INPUTS, other=0.0)
        total = total + column_of(readings, number) * weight
    return total


@triton.jit
def feature_tile(
    readings,
    layer_weight,
    layer_bias,
    INPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    BETAS: tl.constexpr,
    LAYER: tl.constexpr,
    PTX: tl.constexpr,
):
    """[what the LSTM reads; 1; zeros], (BLOCK, FIRST)."""
    if LAYER:
        below = layer_tile(readings, layer_weight, layer_bias, INPUTS, FIRST, BETAS)
        below = tl.where(below > 0, below, exp(tl.minimum(below, 0.0), PTX) - 1)
    else:
        below = readings
    return tl.where(tl.arange(0, FIRST)[None, :] == INPUTS, 1.0, below).to(readings.dtype)


@triton.jit
def read_block(
    grad,
    averages,
    new_averages,
    columns,
    inside,
    stride,
    new_stride,
    layer_weight,
    layer_bias,
    numbers,
    INPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BETAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TIMED: tl.constexpr,
    LAYER: tl.constexpr,
    PTX: tl.constexpr,
):
    """What a block of coordinates reads at one step, see `feature_tile`; their averages move from one place to another."""
    places, there = averages_at(columns, inside, stride, ROWS, BETAS, GRADIENT)
    tile = tl.load(averages + places, mask=there, other=0.0)
    tl.debug_barrier()  # it may be overwritten from here on, by other threads of this program
    readings, tile = take_readings(grad, tile, numbers, BETAS, GRADIENT, TIMED, PTX)
    places, there = averages_at(columns, inside, new_stride, ROWS, BETAS, GRADIENT)
    tl.store(new_averages + places, tile, mask=there)
    return feature_tile(readings, layer_weight, layer_bias, INPUTS, FIRST, BETAS, LAYER, PTX)


@triton.jit(do_not_specialize=["width", "stride", "new_stride", "averages_stride", "new_averages_stride"])
def averages_step_kernel(
    grads,
    hidden,
    cells,
    averages,
    new_hidden,
    new_cells,
    new_averages,
    weights,
    output_weight,
    layer_weight,
    layer_bias,
    numbers,
    update,
    width,
    stride,
    new_stride,
    averages_stride,
    new_averages_stride,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST: tl.constexpr,
    BELOW: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    BETAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TIMED: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """One step of BLOCK of `width` coordinates: their updates, and the next state, which may be written over the one given."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    grad = tl.load(grads + columns, mask=inside, other=0.0)
    below = read_block(
        grad,
        averages,
        new_averages,
        columns,
        inside,
        averages_stride,
        new_averages_stride,
        layer_weight,
        layer_bias,
        numbers,
        INPUTS,
        FIRST,
        ROWS,
        BETAS,
        GRADIENT,
        TIMED,
        LAYER,
        PTX,
    )
    out = advance_block(
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
        H,
        LAYERS,
        FIRST,
        BELOW,
        UNITS,
        PRECISION,
        PTX,
    )
    tl.store(update + columns, tl.load(numbers + 3 * ROWS + 3) * odd_tanh(out, PTX), mask=inside)


@triton.jit(do_not_specialize=["count"])
def averages_group_kernel(
    pointers,
    owners,
    starts,
    sizes,
    flags,
    weights,
    output_weight,
    count,
    asked,
    layer_weight,
    layer_bias,
    numbers,
    DECAYED: tl.constexpr,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    LAYERS: tl.constexpr,
    FIRST: tl.constexpr,
    BELOW: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    BETAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TIMED: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """As `triton_group.group_kernel`, whose `numbers` are `asked` here: θ ← θ + rate · update and the next state, where no flag is up."""
    tensor = tl.load(owners + tl.program_id(0))
    columns = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK)
    size = tl.load(sizes + tensor)
    inside = (columns < size) & (tl.load(flags) == 0) & (tl.load(flags + 1) == 0)
    grad = gradient_at(pointers, tensor, count, columns, inside, weights, asked, DECAYED)
    averages = memory_at(pointers, 4 * count + tensor, weights)
    below = read_block(
        grad,
        averages,
        averages,
        columns,
        inside,
        size,
        size,
        layer_weight,
        layer_bias,
        numbers,
        INPUTS,
        FIRST,
        ROWS,
        BETAS,
        GRADIENT,
        TIMED,
        LAYER,
        PTX,
    )
    hidden = memory_at(pointers, 2 * count + tensor, weights)
    cells = memory_at(pointers, 3 * count + tensor, weights)
    out = advance_block(
        below,
        hidden,
        cells,
        hidden,
        cells,
        columns,
        inside,
        weights,
        output_weight,
        size,
        size,
        H,
        LAYERS,
        FIRST,
        BELOW,
        UNITS,
        PRECISION,
        PTX,
    )
    update = tl.load(numbers + 3 * ROWS + 3) * odd_tanh(out, PTX)
    theta = memory_at(pointers, count + tensor, weights) + columns
    tl.store(theta, tl.load(theta, mask=inside, other=0.0) + tl.load(asked + 2) * update, mask=inside)


@triton.jit(do_not_specialize=["width", "apart", "averages_stride", "T"])
def read_kernel(
    grads,
    averages,
    layer_weight,
    layer_bias,
    numbers,
    features,
    width,
    apart,
    averages_stride,
    T,
    INPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BETAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TIMED: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """features (T, INPUTS, width): what the LSTM reads at T steps of gradients (T, width), in rows so far `apart`, from averages on."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    places, there = averages_at(columns, inside, averages_stride, ROWS, BETAS, GRADIENT)
    tile = tl.load(averages + places, mask=there, other=0.0)
    rows = tl.arange(0, FIRST)[None, :]
    for t in range(T):
        grad = tl.load(grads + long(t) * apart + columns, mask=inside, other=0.0)
        readings, tile = take_readings(grad, tile, numbers, BETAS, GRADIENT, TIMED, PTX)
        below = feature_tile(readings, layer_weight, layer_bias, INPUTS, FIRST, BETAS, LAYER, PTX)
        own = columns[:, None] + (long(t) * INPUTS + rows) * width
        tl.store(features + own, below, mask=inside[:, None] & (rows < INPUTS))


@triton.jit(do_not_specialize=["width", "apart", "averages_stride", "T"])
def layer_kernel(
    grads,
    averages,
    layer_weight,
    layer_bias,
    numbers,
    dfeatures,
    sums,
    width,
    apart,
    averages_stride,
    T,
    INPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BETAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """sums (programs, FIRST, ROWS): of the ELU layer the derivatives by its weights, and behind them by its bias, from those by what it
    makes, dfeatures (T, INPUTS, width). The readings are made again. Each program takes every so-many-th block of coordinates."""
    rows = tl.arange(0, FIRST)[None, :]
    behind = tl.arange(0, ROWS)[None, :] == BETAS + 1
    total = tl.zeros((FIRST, ROWS), sums.dtype.element_ty)
    for block in range(tl.program_id(0), tl.cdiv(width, BLOCK), tl.num_programs(0)):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        places, there = averages_at(columns, inside, averages_stride, ROWS, BETAS, GRADIENT)
        tile = tl.load(averages + places, mask=there, other=0.0)
        for t in range(T):
            grad = tl.load(grads + long(t) * apart + columns, mask=inside, other=0.0)
            readings, tile = take_readings(grad, tile, numbers, BETAS, GRADIENT, TIMED, PTX)
            below = layer_tile(readings, layer_weight, layer_bias, INPUTS, FIRST, BETAS)
            own = columns[:, None] + (long(t) * INPUTS + rows) * width
            pull = tl.load(dfeatures + own, mask=inside[:, None] & (rows < INPUTS), other=0.0)
            pull *= tl.where(below > 0, 1.0, exp(tl.minimum(below, 0.0), PTX)).to(pull.dtype)
            read = tl.where(behind, 1.0, readings).to(readings.dtype)
            total = add_product(total, tl.trans(pull), read, PRECISION, PTX)
    sums += (tl.program_id(0) * FIRST + tl.arange(0, FIRST)[:, None]) * ROWS
    tl.store(sums + tl.arange(0, ROWS)[None, :], total)
