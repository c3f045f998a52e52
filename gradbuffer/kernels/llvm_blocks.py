"""What an LSTM does with small matrices, in a processor's registers, for the loops that numba compiles.

numba vectorizes a loop over a row well, a product of matrices not: between two multiplications it stores the sums. The
functions here say to LLVM in vectors what a block of a product is, and what becomes of its sums before they leave the
registers. They are called from compiled functions only and check nothing. A matrix with `LANES` columns is given as a
flat array, its rows one after the other. `Vectors`, which they are written in, is in `llvm_vectors`.

The 4H rows of an LSTM's gates are in an order of their own: unit after unit, of each its i, f, g and o.
"""

from llvmlite import ir
from numba import types

from gradbuffer.kernels.llvm_vectors import INDEX, LANES, REGISTER, REGISTERS, TO_POWERS, vector_code

__all__ = [
    "LANES",
    "OUTER",
    "OUTER_OF_ONE_ROW",
    "REGISTER",
    "ROWS",
    "STREAM",
    "add_outer_blocks",
    "add_product_blocks",
    "affine_blocks",
    "cell_again_units",
    "cell_back_units",
    "cell_units",
    "copy_numbers",
    "copy_rows",
    "fetch_rows",
    "gather_columns",
    "log_sign_row",
]

TOGETHER = 2  # vectors of a row, at most, that are in registers at once
ROWS = 8 if REGISTERS == 32 else 5  # of a block of a product: with so many sums the multiplications hardly wait
STREAM = 2  # see `cell_units`
OUTER = 4 if REGISTERS == 32 else 2  # columns of `add_outer_blocks`: with 4 rows, as many sums as there is room for
OUTER_OF_ONE_ROW = 4 * OUTER  # the same with one row


def block_product(vectors, weight, rows, row, column, count, x, places, totals):
    """totals[r, place] + Σ_k weight[r, k] x[k, place], as a list in that order, for a block of rows and some places.

    weight's rows and columns are `row` and `column` numbers apart.
    """
    factors = [vectors.at(weight, vectors.builder.mul(row, ir.Constant(INDEX, r))) for r in range(rows)]

    def add(k, totals):
        at, new = vectors.builder.mul(k, ir.Constant(INDEX, LANES)), []
        xs = [vectors.load(vectors.at(x, at, place)) for place in places]
        for pointer in factors:
            factor = vectors.spread(vectors.builder.load(vectors.at(pointer, vectors.builder.mul(k, column))))
            new += [vectors.add_product(totals[len(new) + v], factor, part) for v, part in enumerate(xs)]
        return new

    return vectors.loop(count, totals, add)


def products(vectors, rows, blocks, weight, width, count, x, out, first, column_wise=False):
    """out[r, :] ← first(r of the block's first row, where the block's rows are in out) + Σ_k weight[r, k] x[k, :].

    Each block of weight (rows, width) lies row after row, or column after column.
    """
    builder, one = vectors.builder, ir.Constant(INDEX, 1)
    apart = (one, ir.Constant(INDEX, rows)) if column_wise else (width, one)

    def block(number, _):
        row = builder.mul(number, ir.Constant(INDEX, rows))
        weights = vectors.at(weight, builder.mul(row, width))
        target = vectors.at(out, builder.mul(row, ir.Constant(INDEX, LANES)))
        for start in range(0, len(vectors.places), TOGETHER):
            places = vectors.places[start : start + TOGETHER]
            spots = [vectors.at(target, r * LANES + place) for r in range(rows) for place in places]
            totals = block_product(vectors, weights, rows, *apart, count, x, places, first(row, spots))
            for total, spot in zip(totals, spots):
                vectors.store(total, spot)
        return []

    vectors.loop(blocks, [], block)


@vector_code("rows")
def add_product_blocks(vectors, rows, blocks, weight, width, count, x, out):
    """out[r, :] += Σ_k weight[r, k] x[k, :] for r < rows · blocks (rows is a literal) and k < count.

    weight (…, ≥ count) is flat, its rows `width` apart; x (count, LANES); out (rows · blocks, LANES). Neither count nor
    blocks is 0.
    """
    products(vectors, rows, blocks, weight, width, count, x, out, lambda _, spots: list(map(vectors.load, spots)))


@vector_code("rows")
def affine_blocks(vectors, rows, blocks, weight, width, bias, count, x, out):
    """out[r, :] = bias[r] + Σ_k weight[r, k] x[k, :], else as `add_product_blocks`, but of each block of weight (rows, width)
    column lies after column: it is read from one end to the other."""

    def biases(row, spots):
        each = [vectors.spread(vectors.builder.load(vectors.at(bias, row, r))) for r in range(rows)]
        return [one for one in each for _ in range(len(spots) // rows)]

    products(vectors, rows, blocks, weight, width, count, x, out, biases, column_wise=True)


class Units:
    """What functions below do for each unit: where its numbers are, taken and put there, in vectors."""

    def __init__(self, vectors):
        self.vectors = vectors

    def spots(self, unit):
        """Where i, f, g and o are among the rows of gates, and where the unit's are in others."""
        gates, own = (self.vectors.builder.mul(unit, ir.Constant(INDEX, size * LANES)) for size in (4, 1))
        return [([(gates, gate * LANES + place) for gate in range(4)], (own, place)) for place in self.vectors.places]

    def load(self, spot, *pointers):
        return [self.vectors.load(self.vectors.at(pointer, *spot)) for pointer in pointers]

    def load_gates(self, spots, pointer):
        return [self.vectors.load(self.vectors.at(pointer, *spot)) for spot in spots]

    def store(self, spot, *values_and_pointers):
        for value, pointer in values_and_pointers:
            self.vectors.store(value, self.vectors.at(pointer, *spot))


@vector_code()
def cell_units(vectors, units, sums, cell, new_cell, hidden, keep, gates, tanhs):
    """A step of so many units, at least one: c' = f c + i g, h' = o tanh(c').

    sums are y (4 · units, LANES), scaled: i, f and o are 1 / (1 + 2^y), g is 2 / (1 + 2^y) - 1. cell is c, new_cell and hidden
    become c' and h', each by one division. If `keep` is not 0, gates, which may be the sums, become i, f, g and o, and tanhs
    tanh(c'); with `STREAM` the former go to memory, past the cache.
    """
    builder, of, times = vectors.builder, Units(vectors), vectors.times
    one, two = vectors.constant(1.0), vectors.constant(2.0)
    keeping, near, beyond = (
        builder.icmp_signed(sign, keep, ir.Constant(INDEX, bound))
        for sign, bound in (("!=", 0), ("==", 1), ("==", STREAM))
    )

    def cells(unit, _):
        for rows, here in of.spots(unit):  # with p = 1 + 2^y each: i = 1 / p_i and so on, g = (2 - p_g) / p_g
            ps, (c,) = [vectors.one_plus_power(y) for y in of.load_gates(rows, sums)], of.load(here, cell)
            i, f, g, o = ps
            total = vectors.add_product(times(vectors.minus(two, g), f), c, times(i, g))
            of.store(here, (builder.fdiv(total, times(times(i, g), f)), new_cell), (o, hidden))
            for wanted, store in ((near, vectors.store), (beyond, vectors.stream)):
                with builder.if_then(wanted):
                    i, f, g, o = vectors.inverses(ps)
                    for value, row in zip((i, f, vectors.minus(vectors.plus(g, g), one), o), rows):
                        store(value, vectors.at(gates, *row))
        return []

    def outputs(unit, _):  # in another loop, for each of these steps waits for the one before
        for _, here in of.spots(unit):
            c, o = of.load(here, new_cell, hidden)  # 1 + 2^y of o
            p = vectors.one_plus_power(times(vectors.constant(TO_POWERS), c))
            of.store(here, (builder.fdiv(vectors.minus(two, p), times(p, o)), hidden))
            with builder.if_then(keeping):
                of.store(here, (builder.fdiv(vectors.minus(two, p), p), tanhs))
        return []

    for body in (cells, outputs):
        vectors.loop(units, [], body)


@vector_code()
def cell_again_units(vectors, units, gates, cell, new_cell, hidden, tanhs):
    """`cell_units` once more, of which gates were kept: what follows from them."""
    of = Units(vectors)

    def again(unit, _):
        for rows, here in of.spots(unit):
            (i, f, g, o), (c,) = of.load_gates(rows, gates), of.load(here, cell)
            c = vectors.add_product(vectors.times(i, g), f, c)
            t = vectors.tanh(c)
            of.store(here, (c, new_cell), (t, tanhs), (vectors.times(o, t), hidden))
        return []

    vectors.loop(units, [], again)


@vector_code()
def cell_back_units(vectors, units, gates, cell, tanhs, dhidden, dcell, slopes):
    """Back through `cell_units`: slopes ← dL/dy (y not scaled), dcell ← dL/dc, from dhidden = dL/dh' and dcell = dL/dc'.

    Of the step it takes what was kept, and c, as `cell`. slopes may be gates.
    """
    of, times = Units(vectors), vectors.times

    def back(unit, _):
        for rows, here in of.spots(unit):
            (i, f, g, o), (c, t, above, ahead) = of.load_gates(rows, gates), of.load(here, cell, tanhs, dhidden, dcell)
            ahead = vectors.add_product(ahead, times(above, o), vectors.tanh_slope(t))
            changes = (
                times(times(ahead, g), vectors.sigmoid_slope(i)),
                times(times(ahead, c), vectors.sigmoid_slope(f)),
                times(times(ahead, i), vectors.tanh_slope(g)),
                times(times(above, t), vectors.sigmoid_slope(o)),
            )
            of.store(here, (times(ahead, f), dcell))
            for change, row in zip(changes, rows):
                of.store(row, (change, slopes))
        return []

    vectors.loop(units, [], back)


@vector_code("rows", "columns")
def add_outer_blocks(vectors, rows, columns, row_blocks, column_blocks, y, y_step, x, x_step, steps, total, row_total):
    """total[r, k] += Σ_t Σ_j y_t[r, j] x_t[k, j] and row_total[r] += Σ_t Σ_j y_t[r, j], over steps and LANES.

    In blocks of rows by columns (literals). y_t (rows · row_blocks, LANES) begins at t · y_step of the flat y, x_t (columns
    · column_blocks, LANES) likewise. total (row_blocks, column_blocks, rows, columns) is flat and in float64, row_total
    too. rows · columns is a multiple of a vector's length; no number is 0.
    """
    builder, zero, size = vectors.builder, vectors.constant(0.0), rows * columns

    def rows_of_blocks(row, _):
        left = vectors.at(y, builder.mul(row, ir.Constant(INDEX, rows * LANES)))

        def block(column, with_rows):
            right = vectors.at(x, builder.mul(column, ir.Constant(INDEX, columns * LANES)))

            def add(t, totals):
                a_t, b_t = vectors.at(left, builder.mul(t, y_step)), vectors.at(right, builder.mul(t, x_step))
                for place in vectors.places:
                    b = [vectors.load(vectors.at(b_t, k * LANES + place)) for k in range(columns)]
                    a = [vectors.load(vectors.at(a_t, r * LANES + place)) for r in range(rows)]
                    row_sums = [vectors.plus(total, part) for total, part in zip(totals[size:], a)]
                    totals = [
                        vectors.add_product(totals[r * columns + k], a[r], b[k])
                        for r in range(rows)
                        for k in range(columns)
                    ] + row_sums
                return totals

            totals = vectors.loop(steps, [zero] * (size + with_rows), add)
            number = builder.add(builder.mul(row, column_blocks), column)
            vectors.add_sums(totals[:size], vectors.at(total, builder.mul(number, ir.Constant(INDEX, size))))
            return totals[size:]

        row_sums = block(ir.Constant(INDEX, 0), rows)
        vectors.add_sums(row_sums, vectors.at(row_total, builder.mul(row, ir.Constant(INDEX, rows))))
        others = builder.sub(column_blocks, ir.Constant(INDEX, 1))
        with builder.if_then(builder.icmp_signed(">", others, ir.Constant(INDEX, 0))):
            vectors.loop(others, [], lambda number, _: block(builder.add(number, ir.Constant(INDEX, 1)), 0))
        return []

    vectors.loop(row_blocks, [], rows_of_blocks)


@vector_code()
def log_sign_row(vectors, p, least, steepest, rows):
    """`readings.log_sign` of the numbers in the second row of rows (2, LANES), not NaN: its two parts become the rows.

    least is e^-p, steepest e^p."""
    builder = vectors.builder
    p, least, steepest = (
        vectors.spread(vectors.context.cast(builder, value, types.float64, vectors.kinds["rows"].dtype))
        for value in (p, least, steepest)
    )
    for place in vectors.places:
        sizes, signs = vectors.at(rows, place), vectors.at(rows, LANES + place)
        grad = vectors.load(signs)
        size = builder.select(builder.fcmp_ordered("<", grad, vectors.constant(0.0)), builder.fneg(grad), grad)
        size = builder.select(builder.fcmp_ordered("<", size, least), least, size)
        vectors.store(builder.fdiv(vectors.log(size), p), sizes)
        vectors.store(vectors.at_least_and_most(vectors.times(grad, steepest), -1.0, 1.0), signs)


@vector_code()
def copy_rows(vectors, rows, tiles, source, source_row, source_tile, out, out_row, out_tile):
    """out[r · out_row + k · out_tile + j] = source[r · source_row + k · source_tile + j] for r < rows, k < tiles, j < LANES.

    Neither rows nor tiles is 0. One of the arrays may be of bfloat16, as int16."""
    builder, kinds = vectors.builder, vectors.kinds

    def row(r, _):
        old, new = vectors.at(source, builder.mul(r, source_row)), vectors.at(out, builder.mul(r, out_row))

        def tile(k, _):
            from_, to = vectors.at(old, builder.mul(k, source_tile)), vectors.at(new, builder.mul(k, out_tile))
            for place in vectors.places:
                value = vectors.load_from(kinds["source"], vectors.at(from_, place))
                vectors.store_to(kinds["out"], value, vectors.at(to, place))
            return []

        return vectors.loop(tiles, [], tile)

    vectors.loop(rows, [], row)


@vector_code(length=1)
def copy_numbers(single, count, source, first, out, at):
    """out[at + k] = source[first + k] for k < count, which is not 0, of arrays as of `copy_rows`."""

    def copy(k, _):
        value = single.load_from(single.kinds["source"], single.at(source, first, k))
        single.store_to(single.kinds["out"], value, single.at(out, at, k))
        return []

    single.loop(count, [], copy)


@vector_code()
def gather_columns(vectors, source, row, index, count, out):
    """out[k · LANES + j] = source[index[j] · row + k] for j < LANES and k < count: rows become columns.

    count is a multiple of `LANES`, and not 0."""
    builder = vectors.builder
    blocks = builder.udiv(count, ir.Constant(INDEX, vectors.length))
    for place in vectors.places:
        rows = [
            vectors.at(source, builder.mul(row, builder.load(vectors.at(index, place + j))))
            for j in range(vectors.length)
        ]

        def block(number, _):
            first = builder.mul(number, ir.Constant(INDEX, vectors.length))
            columns = vectors.transpose([vectors.load(vectors.at(row, first)) for row in rows])
            target = vectors.at(out, builder.mul(first, ir.Constant(INDEX, LANES)), place)
            for k, column in enumerate(columns):
                vectors.store(column, vectors.at(target, k * LANES))
            return []

        vectors.loop(blocks, [], block)


@vector_code()
def fetch_rows(vectors, rows, tiles, source, source_row):
    """Have source[r · source_row + j], r < rows and j < tiles · LANES, brought near while something else is computed.

    Neither rows nor tiles is 0."""
    builder, byte, number = vectors.builder, ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    line = 64 * 8 // vectors.kinds["source"].dtype.bitwidth  # elements

    def row(r, _):
        start = vectors.at(source, builder.mul(r, source_row))

        def tile(k, _):
            here = vectors.at(start, builder.mul(k, ir.Constant(INDEX, LANES)))
            for place in range(0, LANES, line):  # where rows begin within a line, the one before has brought that line
                last = builder.bitcast(vectors.at(here, place + line - 1), byte)
                how = (ir.Constant(number, flag) for flag in (0, 2, 1))  # to be read; not nearest; data
                builder.call(fetch, [last, *how])
            return []

        return vectors.loop(tiles, [], tile)

    vectors.loop(rows, [], row)
