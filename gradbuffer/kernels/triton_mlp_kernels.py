"""The kernels of `triton_mlp`, a step of the small learned optimizer for many tensors at once. This module needs triton.

A tensor is a matrix (rows, width), with width = columns · others in the order of `as_matrix`; one without two axes is cut into rows of
a tile's width, the last of which may be shorter. A program has a tile of a tensor, or what a table says. Features are numbered as
`MLPOptimizer` makes them.
"""

import triton
import triton.language as tl

__all__ = [
    "DECAYS",
    "FACTS",
    "FEATURES",
    "FORM",
    "LINE",
    "LINES",
    "PARTS",
    "SLOTS",
    "factor_kernel",
    "forward_kernel",
    "gather_kernel",
    "line_kernel",
    "look_kernel",
    "move_kernel",
    "read_kernel",
    "spread_kernel",
    "total_kernel",
]

# What a tensor's row of the table `forms` says: its sizes; where its output begins, with which strides, and the sizes of the place for
# it; where the sums of its rows in each tile begin, and of its columns; its tiles; its blocks of rows and of columns in `lines`.
FORM = ("size", "rows", "width", "others", "is_matrix", "out", "out_row", "out_column", "out_rows", "out_width")
FORM += ("row_sums", "column_sums", "first_tile", "tiles", "row_lines", "row_blocks", "column_lines", "column_blocks")
SIZE, ROWS, WIDTH, OTHERS, IS_MATRIX, OUT, OUT_ROW, OUT_COLUMN, OUT_ROWS, OUT_WIDTH = map(tl.constexpr, range(10))
ROW_SUMS, COLUMN_SUMS, FIRST_TILE, TILES, ROW_LINES, ROW_BLOCKS, COLUMN_LINES, COLUMN_BLOCKS = map(
    tl.constexpr, range(10, 18)
)

# What a program's row of the table `lines` says: the tensor; which of its pointers is that of its rows' or columns' averages; where the
# sums begin; how many rows or columns there are; how many sums each has, how many of these lie side by side, how far apart the others;
# over how many coordinates they go; the program's first row or column.
LINE = ("tensor", "state", "sums", "count", "terms", "beside", "apart", "coordinates", "start")

GRADIENT, PARAM, MOMENTS, SQUARE, ROW_STATE, COLUMN_STATE = map(tl.constexpr, range(6))  # the table of pointers
SIGN, RATE, KEEP, WEIGHT_DECAY, FIRST_DECAY = map(tl.constexpr, range(5))  # `numbers`, with three decays
PARTS = 32  # sums that a tile leaves: of squares of the features 0 … 11, the largest |∇|; from 16 on the features 12 … 14 and 27 … 29
LARGEST, FACTORED = tl.constexpr(12), tl.constexpr(16)
SLOTS = 16  # that a block of rows or columns leaves, three of each: of the averages, of their squares, of those of 1/√(· + 1e-8)
FACTS = 2  # about a tensor: the length of its step, and whether it moves
FEATURES = 30
BOUND, SMALL, AVERAGE, LARGEST_LOG = map(tl.constexpr, (1000.0, 0.1, 0.95, 3.0))  # as of `nets.mlp`
DECAYS = (0.9, 0.99, 0.999)
LINES = 32  # rows or columns of a program
LINE_SIZE, FORM_SIZE, PART_SIZE, SLOT_SIZE, FACT_SIZE, ALL, OF_VECTORS = map(
    tl.constexpr, (len(LINE), len(FORM), PARTS, SLOTS, FACTS, FEATURES, FEATURES // 2)
)


@triton.jit
def form(forms, tensor, WHAT: tl.constexpr):
    return tl.load(forms + tensor * FORM_SIZE + WHAT)


@triton.jit
def memory(pointers, count, WHAT: tl.constexpr, tensor, like):
    """A part of a tensor's memory, as a pointer of the type of another."""
    return tl.load(pointers + WHAT * count + tensor).to(like.dtype)


@triton.jit
def tile_of(tiles, forms, ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    """The program's tile: tensor, its rows, its columns · others, which of these are there; where it begins in the tensor's memory, and
    where from there its coordinates are."""
    row = tiles + 3 * tl.program_id(0)
    tensor, first, left = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    width = form(forms, tensor, WIDTH).to(tl.int32)
    rows = first + tl.arange(0, ROWS_BLOCK)
    columns = left + tl.arange(0, WIDTH_BLOCK)
    begin = first.to(tl.int64) * width + left  # a large tensor's coordinates are not counted in 32 bits
    within = tl.arange(0, ROWS_BLOCK)[:, None] * width + tl.arange(0, WIDTH_BLOCK)[None, :]
    inside = (rows[:, None] < form(forms, tensor, ROWS)) & (columns[None, :] < width)
    inside = inside & (within < form(forms, tensor, SIZE) - begin)  # the last row of a vector may be shorter
    return tensor, rows, columns, inside, begin, within


@triton.jit
def at_least(x, LOW: tl.constexpr):
    return tl.maximum(x, tl.full(x.shape, LOW, x.dtype))  # a number by itself would be rounded to float32


@triton.jit
def clipped(x, MOST: tl.constexpr):
    return tl.minimum(at_least(x, -MOST), tl.full(x.shape, MOST, x.dtype))


@triton.jit
def gradient_of(pointers, count, tensor, inside, begin, within, numbers):
    """± ∇, clipped."""
    grad = tl.load(memory(pointers, count, GRADIENT, tensor, numbers) + begin + within, mask=inside, other=0.0)
    return clipped(tl.load(numbers + SIGN) * grad, BOUND)


@triton.jit
def leave(parts, NUMBER: tl.constexpr, values):
    """Store a tile's sum of squares."""
    tl.store(parts + tl.program_id(0) * PART_SIZE + NUMBER, tl.sum(values * values))


@triton.jit(do_not_specialize=["count", "watched"])
def look_kernel(pointers, blocks, flags, like, kept, count, watched, BLOCK: tl.constexpr):
    """flags[0] = 1 where a gradient is not finite, flags[1] = 1 where a weight is another than the one kept.

    Tensors 0 … count - 1 are gradients; the `watched` ones after them are weights, whose copies lie one after the other in `kept`.
    pointers: of all of them, then where in `kept` each weight's copy begins.
    """
    block = blocks + 3 * tl.program_id(0)
    tensor, columns = tl.load(block), tl.load(block + 1) + tl.arange(0, BLOCK)
    inside = columns < tl.load(block + 2)
    now = tl.load(tl.load(pointers + tensor).to(like.dtype) + columns, mask=inside, other=0.0)
    if tensor < count:
        finite = (now - now) == 0  # neither for an infinity nor for a NaN
        if tl.sum(tl.where(inside & (finite == 0), 1, 0), axis=0) > 0:
            tl.store(flags, 1)
    else:
        before = tl.load(kept + tl.load(pointers + watched + tensor) + columns, mask=inside, other=0.0)
        if tl.sum(tl.where(inside & (now != before), 1, 0), axis=0) > 0:
            tl.store(flags + 1, 1)


@triton.jit(do_not_specialize=["count"])
def read_kernel(
    pointers, tiles, forms, numbers, parts, sums, count, ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr
):
    """The new averages of both moments; sums of squares: of features, and of each row and column of the gradient in the tile."""
    tensor, rows, columns, inside, begin, within = tile_of(tiles, forms, ROWS_BLOCK, WIDTH_BLOCK)
    grad = gradient_of(pointers, count, tensor, inside, begin, within, numbers)
    param = tl.load(memory(pointers, count, PARAM, tensor, numbers) + begin + within, mask=inside, other=0.0)
    square = memory(pointers, count, SQUARE, tensor, numbers) + begin + within
    second = tl.load(square, mask=inside, other=0.0) * AVERAGE + grad * (1 - AVERAGE) * grad
    tl.store(square, second, mask=inside)
    root = tl.where(inside, tl.rsqrt(second + 1e-8), 0.0)
    leave(parts, 0, grad)
    leave(parts, 1, clipped(grad, SMALL))
    leave(parts, 2, tl.load(numbers + KEEP) * param)
    leave(parts, 6, second)
    leave(parts, 10, root)
    leave(parts, 11, grad * root)
    tl.store(parts + tl.program_id(0) * PART_SIZE + LARGEST, tl.max(tl.abs(grad)))
    size = form(forms, tensor, SIZE)
    for k in tl.static_range(3):
        place = memory(pointers, count, MOMENTS, tensor, numbers) + k * size + begin + within
        decay = tl.load(numbers + FIRST_DECAY + k)
        moment = decay * tl.load(place, mask=inside, other=0.0) + (1 - decay) * grad
        tl.store(place, moment, mask=inside)
        leave(parts, 3 + k, moment)
        leave(parts, 7 + k, moment * root)
    if form(forms, tensor, IS_MATRIX) != 0:
        row_count, width = form(forms, tensor, ROWS), form(forms, tensor, WIDTH)
        of_rows = sums + form(forms, tensor, ROW_SUMS) + tl.min(columns) // WIDTH_BLOCK * row_count
        of_columns = sums + form(forms, tensor, COLUMN_SUMS) + tl.min(rows) // ROWS_BLOCK * width
        tl.store(of_rows + rows, tl.sum(grad * grad, axis=1), mask=rows < row_count)
        tl.store(of_columns + columns, tl.sum(grad * grad, axis=0), mask=columns < width)


@triton.jit(do_not_specialize=["count"])
def line_kernel(pointers, lines, numbers, sums, slots, count, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The new averages of the squares of a block of rows or columns, and sums over it."""
    line = lines + tl.program_id(0) * LINE_SIZE
    tensor, state, first, total = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    terms, beside, apart, coordinates = tl.load(line + 4), tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    own = tl.load(line + 8) + tl.arange(0, BLOCK)
    inside = own < total
    squares = tl.zeros([CHUNK, BLOCK], dtype=numbers.dtype.element_ty)
    for start in range(0, terms, CHUNK):
        term = start + tl.arange(0, CHUNK)
        place = sums + first + (term // beside * apart + term % beside)[:, None] + own[None, :] * beside
        squares += tl.load(place, mask=(term < terms)[:, None] & inside[None, :], other=0.0)
    mean = tl.sum(squares, axis=0) / coordinates.to(squares.dtype) + 1e-30
    places = tl.load(pointers + state * count + tensor).to(numbers.dtype) + own
    slot = slots + tl.program_id(0) * SLOT_SIZE
    for k in tl.static_range(3):
        decay = tl.load(numbers + FIRST_DECAY + k)
        new = decay * tl.load(places + k * total, mask=inside, other=0.0) + (1 - decay) * mean
        tl.store(places + k * total, new, mask=inside)
        new = tl.where(inside, new, 0.0)
        tl.store(slot + k, tl.sum(new))
        tl.store(slot + 3 + k, tl.sum(new * new))
        tl.store(slot + 6 + k, tl.sum(tl.where(inside, 1 / (new + 1e-8), 0.0)))


@triton.jit
def mean_of_rows(slots, forms, tensor, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
    """Of the averages of a tensor's rows."""
    first, blocks = form(forms, tensor, ROW_LINES), form(forms, tensor, ROW_BLOCKS)
    total = tl.zeros([BLOCK], dtype=slots.dtype.element_ty)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        total += tl.load(slots + (first + block) * SLOT_SIZE + NUMBER, mask=block < blocks, other=0.0)
    return tl.sum(total, axis=0) / form(forms, tensor, ROWS).to(total.dtype)


@triton.jit
def row_factor(row, mean):
    return tl.rsqrt(at_least(row / (mean + 1e-9), 1e-9))


@triton.jit
def column_factor(column):
    return tl.rsqrt(at_least(column, 1e-9))


@triton.jit
def factor_of(pointers, forms, slots, count, tensor, rows, columns, second, numbers, NUMBER: tl.constexpr):
    """What the gradient is multiplied with in feature 12 + NUMBER: of a row and a column, or of each coordinate of a vector."""
    is_matrix, row_count = form(forms, tensor, IS_MATRIX) != 0, form(forms, tensor, ROWS)
    others = form(forms, tensor, OTHERS).to(tl.int32)
    column_count = form(forms, tensor, WIDTH) // others
    row_place = memory(pointers, count, ROW_STATE, tensor, numbers) + NUMBER * row_count + rows
    row = tl.load(row_place, mask=(rows < row_count) & is_matrix, other=0.0)
    own = columns // others
    column_place = memory(pointers, count, COLUMN_STATE, tensor, numbers) + NUMBER * column_count + own
    column = tl.load(column_place, mask=(own < column_count) & is_matrix, other=0.0)
    of_row = row_factor(row, mean_of_rows(slots, forms, tensor, NUMBER, 64))
    of_matrix = of_row[:, None] * column_factor(column)[None, :]
    return tl.where(is_matrix, of_matrix, column_factor(second))


@triton.jit(do_not_specialize=["count"])
def factor_kernel(
    pointers, tiles, forms, numbers, parts, slots, count, ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr
):
    """Sums of squares of the features that need the averages of all rows and columns."""
    tensor, rows, columns, inside, begin, within = tile_of(tiles, forms, ROWS_BLOCK, WIDTH_BLOCK)
    grad = gradient_of(pointers, count, tensor, inside, begin, within, numbers)
    is_matrix, size = form(forms, tensor, IS_MATRIX) != 0, form(forms, tensor, SIZE)
    square = memory(pointers, count, SQUARE, tensor, numbers) + begin + within
    second = tl.load(square, mask=inside & (is_matrix == 0), other=0.0)
    for k in tl.static_range(3):
        factor = factor_of(pointers, forms, slots, count, tensor, rows, columns, second, numbers, k)
        place = memory(pointers, count, MOMENTS, tensor, numbers) + k * size + begin + within
        leave(parts, FACTORED + k, grad * factor)
        leave(parts, FACTORED + 3 + k, tl.load(place, mask=inside & is_matrix, other=0.0) * factor)


@triton.jit
def scaled_weights(weights, scaled, feature, mean, there, is_matrix, units, UNITS: tl.constexpr):
    """Store the weights of some features, divided by the roots of these features' mean squares; 0 for what vectors do not have."""
    place = feature[:, None] * UNITS + units[None, :]
    own, within = there & (is_matrix | (feature < OF_VECTORS)), units[None, :] < UNITS
    weight = tl.load(weights + place, mask=own[:, None] & within, other=0.0)
    weight = weight * (1 / tl.sqrt(tl.where(own, mean, 0.0) + 1e-9))[:, None]
    tl.store(scaled + place, weight, mask=there[:, None] & within)


@triton.jit
def sums_of_lines(slots, forms, tensor, FIRST: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """What the blocks of a tensor's rows or columns have left, added up in float64."""
    first, blocks, total = form(forms, tensor, FIRST), form(forms, tensor, BLOCKS), tl.zeros([SLOT_SIZE], tl.float64)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        place = slots + (first + block)[:, None] * SLOT_SIZE + tl.arange(0, SLOT_SIZE)[None, :]
        total += tl.sum(tl.load(place, mask=(block < blocks)[:, None], other=0.0).to(tl.float64), axis=0)
    return total


@triton.jit
def gather_kernel(
    forms,
    numbers,
    parts,
    slots,
    weights,
    context,
    scaled,
    facts,
    UNITS: tl.constexpr,
    PADDED: tl.constexpr,
    CONTEXT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The first layer as a tensor's coordinates use it, its context included; the length of its step; whether it moves.

    scaled: of each tensor (31, UNITS), weights over the sizes of their features, then the bias. What few numbers are computed here are
    computed in float64.
    """
    tensor = tl.program_id(0)
    first, count = form(forms, tensor, FIRST_TILE), form(forms, tensor, TILES)
    is_matrix = form(forms, tensor, IS_MATRIX) != 0
    number = tl.arange(0, PART_SIZE)
    total, largest = tl.zeros([PART_SIZE], tl.float64), tl.zeros([PART_SIZE], tl.float64)
    for start in range(0, count, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        place = parts + (first + tile)[:, None] * PART_SIZE + number[None, :]
        found = tl.load(place, mask=(tile < count)[:, None], other=0.0).to(tl.float64)
        total += tl.sum(found, axis=0)
        largest = tl.maximum(largest, tl.max(tl.abs(found), axis=0))
    size = form(forms, tensor, SIZE).to(tl.float64)
    mean = total / size
    units, own = tl.arange(0, PADDED), scaled + tensor * (ALL + 1) * UNITS
    factored = number - FACTORED  # 0 … 2: of the gradient, 3 … 5: of the moments
    feature = tl.where(number < FACTORED, number, tl.where(factored < 3, 12 + factored, 24 + factored))
    there = (number < LARGEST) | ((factored >= 0) & (factored < 6))
    scaled_weights(weights, own, feature, mean, there, is_matrix, units, UNITS)
    slot = tl.arange(0, SLOT_SIZE)
    there = (slot >= 3) & (slot < 9)
    feature = tl.where(slot < 6, 12 + slot, 15 + slot)
    rows = form(forms, tensor, ROWS)
    columns = form(forms, tensor, WIDTH) // form(forms, tensor, OTHERS)
    of_rows = sums_of_lines(slots, forms, tensor, ROW_LINES, ROW_BLOCKS, CHUNK) / rows.to(tl.float64)
    of_columns = sums_of_lines(slots, forms, tensor, COLUMN_LINES, COLUMN_BLOCKS, CHUNK) / columns.to(tl.float64)
    scaled_weights(weights, own, feature, of_rows, there, is_matrix, units, UNITS)
    scaled_weights(weights, own, feature + 3, of_columns, there, is_matrix, units, UNITS)
    shift, length = tl.zeros([PADDED], tl.float64), 1.0
    if CONTEXT > 0:
        param = tl.sum(tl.where(number == 2, mean, 0.0)) + 1e-6
        second = tl.log(tl.sum(tl.where(number == 6, mean, 0.0)) + 1e-38) / 2
        rate = tl.load(numbers + RATE).to(tl.float64)
        hidden, inner = tl.arange(0, CONTEXT), context + 8 * CONTEXT  # after (7, CONTEXT) weights and a bias
        signal = (number == 0) | ((number >= 3) & (number < 6))
        row = tl.where(number == 0, 3, number - 3)
        read = tl.load(context + row[:, None] * CONTEXT + hidden[None, :], mask=signal[:, None], other=0.0)
        logs = tl.where(signal, (tl.log(tl.where(signal, mean, 1.0) + 1e-30) - second) / 6, 0.0)
        units_in = tl.sum(logs[:, None] * read, axis=0) + tl.load(context + 7 * CONTEXT + hidden)
        units_in += tl.log(param) / 6 * tl.load(context + 4 * CONTEXT + hidden)
        units_in += tl.log((rate * rate + 1e-12) / param) / 6 * tl.load(context + 5 * CONTEXT + hidden)
        units_in += tl.where(is_matrix, 0.0, 1.0) * tl.load(context + 6 * CONTEXT + hidden)
        units_in = tl.maximum(units_in, 0.0)
        place = inner + hidden[:, None] * (UNITS + 1) + units[None, :]
        out = tl.sum(units_in[:, None] * tl.load(place, mask=(units <= UNITS)[None, :], other=0.0), axis=0)
        out += tl.load(inner + CONTEXT * (UNITS + 1) + units, mask=units <= UNITS, other=0.0)
        shift = out
        last = tl.sum(tl.where(units == UNITS, out, 0.0)) / LARGEST_LOG
        length = tl.exp((1 - 2 / (tl.exp(2 * last) + 1)) * LARGEST_LOG)
    bias = tl.load(weights + ALL * UNITS + units, mask=units < UNITS, other=0.0) + shift
    tl.store(own + ALL * UNITS + units, bias, mask=units < UNITS)
    tl.store(facts + tensor * FACT_SIZE, length)
    moves = tl.sum(tl.where(number == LARGEST, largest, 0.0)) > 0
    tl.store(facts + tensor * FACT_SIZE + 1, tl.where(moves, 1.0, 0.0))


@triton.jit
def plus(units, feature, weights, UNITS: tl.constexpr):
    """units[j] + feature · weights[j], a tuple."""
    new = ()
    for j in tl.static_range(UNITS):
        new = new + (units[j] + feature * tl.load(weights + j),)
    return new


@triton.jit(do_not_specialize=["count"])
def spread_kernel(pointers, lines, forms, slots, scaled, added, like, count, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block of rows or columns, what its coordinates share: three factors, and what the first layer's units are given.

    added: of each block (3 + UNITS, BLOCK).
    """
    line = lines + tl.program_id(0) * LINE_SIZE
    tensor, state, total = tl.load(line), tl.load(line + 1), tl.load(line + 3)
    own = tl.load(line + 8) + tl.arange(0, BLOCK)
    is_row = state == ROW_STATE
    places = tl.load(pointers + state * count + tensor).to(like.dtype) + own
    first = scaled + tensor * (ALL + 1) * UNITS + tl.where(is_row, 15, 18) * UNITS
    out = added + tl.program_id(0) * (3 + UNITS) * BLOCK + tl.arange(0, BLOCK)
    units = ()
    for j in tl.static_range(UNITS):
        units = units + (tl.full([BLOCK], 0.0, like.dtype.element_ty),)
    for k in tl.static_range(3):
        average = tl.load(places + k * total, mask=own < total, other=0.0)
        of_row = row_factor(average, mean_of_rows(slots, forms, tensor, k, 64))
        tl.store(out + k * BLOCK, tl.where(is_row, of_row, column_factor(average)))
        units = plus(units, average, first + k * UNITS, UNITS)
        units = plus(units, tl.rsqrt(average + 1e-8), first + (6 + k) * UNITS, UNITS)
    for j in tl.static_range(UNITS):
        tl.store(out + (3 + j) * BLOCK, units[j])


@triton.jit
def shared_by(added, first, own, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Where what `spread_kernel` leaves begins, for rows or columns of a tensor whose blocks begin there."""
    return added + (first + own // BLOCK) * ((3 + UNITS) * BLOCK) + own % BLOCK


@triton.jit(do_not_specialize=["count"])
def forward_kernel(
    pointers,
    tiles,
    forms,
    numbers,
    added,
    scaled,
    weights,
    out,
    squares,
    count,
    UNITS: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The network's output, in a layout that its reader wants, with zeros around it, and the sum of its squares in the tile.

    weights: those after the first layer. SECOND: units of the second hidden layer, 0 where there is one layer.
    """
    tensor, rows, columns, inside, begin, within = tile_of(tiles, forms, ROWS_BLOCK, WIDTH_BLOCK)
    size = form(forms, tensor, SIZE)
    grad = gradient_of(pointers, count, tensor, inside, begin, within, numbers)
    param = tl.load(memory(pointers, count, PARAM, tensor, numbers) + begin + within, mask=inside, other=0.0)
    second = tl.load(memory(pointers, count, SQUARE, tensor, numbers) + begin + within, mask=inside, other=0.0)
    first = scaled + tensor * (ALL + 1) * UNITS
    root, of_vector = tl.rsqrt(second + 1e-8), column_factor(second)
    is_matrix = form(forms, tensor, IS_MATRIX) != 0
    own = columns // form(forms, tensor, OTHERS).to(tl.int32)
    has_row, has_column = (
        (rows < form(forms, tensor, ROWS)) & is_matrix,
        (columns < form(forms, tensor, WIDTH)) & is_matrix,
    )
    of_rows = shared_by(added, form(forms, tensor, ROW_LINES), rows, UNITS, BLOCK)
    of_columns = shared_by(added, form(forms, tensor, COLUMN_LINES), own, UNITS, BLOCK)
    units = ()
    for j in tl.static_range(UNITS):
        units = units + (tl.zeros_like(grad) + tl.load(first + ALL * UNITS + j),)
    units = plus(units, grad, first, UNITS)
    units = plus(units, clipped(grad, SMALL), first + UNITS, UNITS)
    units = plus(units, tl.load(numbers + KEEP) * param, first + 2 * UNITS, UNITS)
    units = plus(units, second, first + 6 * UNITS, UNITS)
    units = plus(units, root, first + 10 * UNITS, UNITS)
    units = plus(units, grad * root, first + 11 * UNITS, UNITS)
    for k in tl.static_range(3):
        place = memory(pointers, count, MOMENTS, tensor, numbers) + k * size + begin + within
        moment = tl.load(place, mask=inside, other=0.0)
        factor = tl.load(of_rows + k * BLOCK, mask=has_row, other=0.0)[:, None]
        factor = factor * tl.load(of_columns + k * BLOCK, mask=has_column, other=0.0)[None, :]
        factor = tl.where(is_matrix, factor, of_vector)
        units = plus(units, moment, first + (3 + k) * UNITS, UNITS)
        units = plus(units, moment * root, first + (7 + k) * UNITS, UNITS)
        units = plus(units, grad * factor, first + (12 + k) * UNITS, UNITS)
        units = plus(units, moment * factor, first + (27 + k) * UNITS, UNITS)
    hidden = ()
    for j in tl.static_range(UNITS):
        row = tl.load(of_rows + (3 + j) * BLOCK, mask=has_row, other=0.0)
        column = tl.load(of_columns + (3 + j) * BLOCK, mask=has_column, other=0.0)
        hidden = hidden + (tl.maximum(units[j] + row[:, None] + column[None, :], 0.0),)
    total = tl.zeros_like(grad)
    if SECOND > 0:
        last = weights + UNITS * SECOND + SECOND
        for j in tl.static_range(SECOND):
            unit = tl.zeros_like(grad) + tl.load(weights + UNITS * SECOND + j)
            for i in tl.static_range(UNITS):
                unit += hidden[i] * tl.load(weights + i * SECOND + j)
            total += tl.maximum(unit, 0.0) * tl.load(last + j)
        total += tl.load(last + SECOND)
    else:
        for i in tl.static_range(UNITS):
            total += hidden[i] * tl.load(weights + i)
        total += tl.load(weights + UNITS)
    total = tl.where(inside, total, 0.0)
    tl.store(squares + tl.program_id(0), tl.sum(total * total))
    room = (rows < form(forms, tensor, OUT_ROWS))[:, None] & (columns < form(forms, tensor, OUT_WIDTH))[None, :]
    tl.store(out_of(out, forms, tensor, rows, columns), total, mask=room)


@triton.jit
def out_of(out, forms, tensor, rows, columns):
    """Where the outputs of a tile lie."""
    start = out + form(forms, tensor, OUT)
    return start + (rows * form(forms, tensor, OUT_ROW))[:, None] + (columns * form(forms, tensor, OUT_COLUMN))[None, :]


@triton.jit
def total_kernel(squares, spans, totals, BLOCK: tl.constexpr):
    """Add up the sums of squares that a tensor's tiles have left. spans: (tensor, first, how many)."""
    span = spans + 3 * tl.program_id(0)
    first, count = tl.load(span + 1), tl.load(span + 2)
    total = tl.zeros([BLOCK], dtype=squares.dtype.element_ty)
    for start in range(0, count, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(squares + first + tile, mask=tile < count, other=0.0)
    tl.store(totals + tl.load(span), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def move_kernel(
    pointers, tiles, forms, numbers, facts, totals, out, count, ROWS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr
):
    """θ ← keep · θ, and where there is a gradient θ ← θ - lr · (length · output / its root mean square + weight_decay · θ)."""
    tensor, rows, columns, inside, begin, within = tile_of(tiles, forms, ROWS_BLOCK, WIDTH_BLOCK)
    place = memory(pointers, count, PARAM, tensor, numbers) + begin + within
    param = tl.load(numbers + KEEP) * tl.load(place, mask=inside, other=0.0)
    mean = tl.load(totals + tensor) / form(forms, tensor, SIZE).to(param.dtype)
    length = tl.load(facts + tensor * FACT_SIZE) / tl.sqrt(mean + 1e-9)
    direction = length * tl.load(out_of(out, forms, tensor, rows, columns), mask=inside, other=0.0)
    direction += tl.load(numbers + WEIGHT_DECAY) * param
    rate = tl.load(numbers + RATE) * tl.load(facts + tensor * FACT_SIZE + 1)
    tl.store(place, param - rate * direction, mask=inside)
