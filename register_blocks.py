"""What an LSTM does with small matrices, in a processor's registers, for the loops that numba compiles.

numba vectorizes a loop over a row well, a product of matrices not: between two multiplications it stores the sums. The
functions here say to LLVM in vectors what a block of a product is, and what becomes of its sums before they leave the
registers. They are called from compiled functions only and check nothing. A matrix with `LANES` columns is given as a
flat array, its rows one after the other. `Vectors`, which they are written in, is in `register_vectors`.

The 4H rows of an LSTM's gates are in an order of their own: unit after unit in groups of `UNITS` (the last ones singly),
for each group its rows of i, then of f, g and o. So a block of rows has all that its units need, see `cell_blocks`.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from register_vectors import INDEX, LANES, REGISTER, REGISTERS, Vectors

__all__ = ["ALONE", "BEYOND", "LANES", "OUTER", "ROWS", "UNITS", "add_outer_blocks", "add_product_blocks", "cell_again_blocks",
           "cell_back_blocks", "cell_blocks", "copy_numbers", "copy_rows", "fetch_rows", "gather_columns", "log_sign_row"]

TOGETHER = 2  # vectors of a row, at most, that are in registers at once
ROWS = 8 if REGISTERS == 32 else 4  # of a block of a product: with so many sums the multiplications never wait
UNITS = ROWS // 4
BEYOND = 2  # see `cell_blocks`
BFLOAT16 = types.int16  # as what numba is given it
OUTER = 4 if REGISTERS == 32 else 2  # columns of `add_outer_blocks`: with 4 rows, as many sums as there is room for
ALONE = 4 * OUTER  # with one row


def block_product(vectors, weight, rows, stride, count, x, places, totals):
    """totals[r, place] + Σ_k weight[r, k] x[k, place], as a list in that order, for a block of rows and some places."""
    factors = [vectors.at(weight, vectors.builder.mul(stride, ir.Constant(INDEX, r))) for r in range(rows)]

    def add(k, totals):
        at, new = vectors.builder.mul(k, ir.Constant(INDEX, LANES)), []
        xs = [vectors.load(vectors.at(x, at, place)) for place in places]
        for pointer in factors:
            factor = vectors.spread(vectors.builder.load(vectors.at(pointer, k)))
            new += [vectors.add_product(totals[len(new) + v], factor, part) for v, part in enumerate(xs)]
        return new

    return vectors.loop(count, totals, add)


@intrinsic(prefer_literal=True)
def add_product_blocks(typing, rows, blocks, weight, width, count, x, out):
    """out[r, :] += Σ_k weight[r, k] x[k, :] for r < rows · blocks (rows is a literal) and k < count.

    weight (…, ≥ count) is flat, its rows `width` apart; x (count, LANES); out (rows · blocks, LANES). Neither count nor
    blocks is 0.
    """
    arrays, R = (weight, x, out), rows.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, weight.dtype)
        w, source, target = vectors.pointers([values[k] for k in (2, 5, 6)], arrays)

        def block(number, _):
            row = builder.mul(number, ir.Constant(INDEX, R))
            first = vectors.at(w, builder.mul(row, values[3]))
            out = vectors.at(target, builder.mul(row, ir.Constant(INDEX, LANES)))
            for start in range(0, len(vectors.places), TOGETHER):
                places = vectors.places[start:start + TOGETHER]
                spots = [vectors.at(out, r * LANES + place) for r in range(R) for place in places]
                before = list(map(vectors.load, spots))
                totals = block_product(vectors, first, R, values[3], values[4], source, places, before)
                for total, spot in zip(totals, spots):
                    vectors.store(total, spot)
            return []

        vectors.loop(values[1], [], block)
        return context.get_dummy_value()

    return types.void(rows, types.intp, weight, types.intp, types.intp, x, out), generate


@intrinsic(prefer_literal=True)
def cell_blocks(typing, units, blocks, weight, width, bias, count, x, cell, new_cell, hidden, keep, gates, tanhs):
    """A step of units · blocks units (units is a literal, neither is 0): c' = f c + i g, h' = o tanh(c').

    y = weight x + bias is as in `add_product_blocks`, of 4 · units rows for each block, and scaled: i, f and o are
    1 / (1 + 2^y), g is 2 / (1 + 2^y) - 1. cell is c, new_cell and hidden become c' and h'. If `keep` is not 0, gates (4 · units
    · blocks, LANES) become i, f, g and o, and tanhs tanh(c'); with `BEYOND` the former go to memory, past the cache.
    """
    arrays, U = (weight, bias, x, cell, new_cell, hidden, gates, tanhs), units.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, weight.dtype)
        w, b, source, old, new, out, kept, kept_tanhs = vectors.pointers([values[k] for k in (2, 4, 6, 7, 8, 9, 11, 12)],
                                                                         arrays)
        keeping, near, beyond = (builder.icmp_signed(sign, values[10], ir.Constant(INDEX, bound))
                                 for sign, bound in (("!=", 0), ("==", 1), ("==", BEYOND)))

        def cells_and_gates(number, _):
            row, unit = (builder.mul(number, ir.Constant(INDEX, size)) for size in (4 * U, U * LANES))
            first, biases = vectors.at(w, builder.mul(row, values[3])), vectors.at(b, row)
            kept_rows = vectors.at(kept, builder.mul(row, ir.Constant(INDEX, LANES)))
            start_at = [vectors.spread(builder.load(vectors.at(biases, r))) for r in range(4 * U)]
            for start in range(0, len(vectors.places), TOGETHER):
                places = vectors.places[start:start + TOGETHER]
                totals = block_product(vectors, first, 4 * U, values[3], values[5], source, places,
                                       [bias for bias in start_at for _ in places])
                spots = [(u, v) for u in range(U) for v in range(len(places))]
                gates = vectors.sigmoids([totals[(gate * U + u) * len(places) + v] for u, v in spots for gate in range(4)])
                for (u, v), (i, f, g, o) in zip(spots, zip(*[iter(gates)] * 4)):
                    g = vectors.minus(vectors.plus(g, g), vectors.constant(1.0))
                    spot = u * LANES + places[v]
                    c = vectors.add_product(vectors.times(i, g), f, vectors.load(vectors.at(old, unit, spot)))
                    vectors.store(c, vectors.at(new, unit, spot))
                    vectors.store(o, vectors.at(out, unit, spot))
                    for wanted, put in ((near, vectors.store), (beyond, vectors.stream)):
                        with builder.if_then(wanted):
                            for gate, value in enumerate((i, f, g, o)):
                                put(value, vectors.at(kept_rows, (gate * U + u) * LANES + places[v]))
            return []

        def outputs(number, _):  # of o and c'; another loop, for each of these steps waits for the one before
            unit = builder.mul(number, ir.Constant(INDEX, U * LANES))
            spots = [u * LANES + place for u in range(U) for place in vectors.places]
            for spot, t in zip(spots, vectors.tanhs([vectors.load(vectors.at(new, unit, spot)) for spot in spots])):
                o = vectors.at(out, unit, spot)
                vectors.store(vectors.times(vectors.load(o), t), o)
                with builder.if_then(keeping):
                    vectors.store(t, vectors.at(kept_tanhs, unit, spot))
            return []

        vectors.loop(values[1], [], cells_and_gates)
        vectors.loop(values[1], [], outputs)
        return context.get_dummy_value()

    return types.void(units, types.intp, weight, types.intp, bias, types.intp, x, cell, new_cell, hidden, types.intp, gates,
                      tanhs), generate


@intrinsic(prefer_literal=True)
def cell_again_blocks(typing, units, blocks, gates, cell, new_cell, hidden, tanhs):
    """`cell_blocks` once more, of which gates were kept: only what is not a product."""
    arrays, U = (gates, cell, new_cell, hidden, tanhs), units.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, gates.dtype)
        rows, old, new, out, kept_tanhs = vectors.pointers(values[2:], arrays)

        def block(number, _):
            row, unit = (builder.mul(number, ir.Constant(INDEX, size * LANES)) for size in (4 * U, U))
            for u in range(U):
                for place in vectors.places:
                    i, f, g, o = (vectors.load(vectors.at(rows, row, (gate * U + u) * LANES + place)) for gate in range(4))
                    spot = u * LANES + place
                    c = vectors.add_product(vectors.times(i, g), f, vectors.load(vectors.at(old, unit, spot)))
                    (t,) = vectors.tanhs([c])
                    for value, pointer in ((c, new), (t, kept_tanhs), (vectors.times(o, t), out)):
                        vectors.store(value, vectors.at(pointer, unit, spot))
            return []

        vectors.loop(values[1], [], block)
        return context.get_dummy_value()

    return types.void(units, types.intp, gates, cell, new_cell, hidden, tanhs), generate


@intrinsic(prefer_literal=True)
def cell_back_blocks(typing, units, blocks, gates, cell, tanhs, dhidden, dcell, slopes):
    """Back through `cell_blocks`: slopes ← dL/dy (y not scaled), dcell ← dL/dc, from dhidden = dL/dh' and dcell = dL/dc'.

    Of the step it takes what was kept, and c, as `cell`. slopes may be gates.
    """
    arrays, U = (gates, cell, tanhs, dhidden, dcell, slopes), units.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, gates.dtype)
        rows, old, kept_tanhs, dh, dc, out = vectors.pointers(values[2:], arrays)

        def block(number, _):
            row, unit = (builder.mul(number, ir.Constant(INDEX, size * LANES)) for size in (4 * U, U))
            for u in range(U):
                for place in vectors.places:
                    places = [(gate * U + u) * LANES + place for gate in range(4)]
                    i, f, g, o = (vectors.load(vectors.at(rows, row, spot)) for spot in places)
                    c, t, above, ahead = (vectors.load(vectors.at(pointer, unit, u * LANES + place))
                                          for pointer in (old, kept_tanhs, dh, dc))
                    ahead = vectors.add_product(ahead, vectors.times(above, o), vectors.tanh_slope(t))
                    changes = (vectors.times(vectors.times(ahead, g), vectors.sigmoid_slope(i)),
                               vectors.times(vectors.times(ahead, c), vectors.sigmoid_slope(f)),
                               vectors.times(vectors.times(ahead, i), vectors.tanh_slope(g)),
                               vectors.times(vectors.times(above, t), vectors.sigmoid_slope(o)))
                    vectors.store(vectors.times(ahead, f), vectors.at(dc, unit, u * LANES + place))
                    for change, spot in zip(changes, places):
                        vectors.store(change, vectors.at(out, row, spot))
            return []

        vectors.loop(values[1], [], block)
        return context.get_dummy_value()

    return types.void(units, types.intp, gates, cell, tanhs, dhidden, dcell, slopes), generate


@intrinsic(prefer_literal=True)
def add_outer_blocks(typing, rows, columns, row_blocks, column_blocks, y, y_step, x, x_step, steps, total, row_total):
    """total[r, k] += Σ_t Σ_j y_t[r, j] x_t[k, j] and row_total[r] += Σ_t Σ_j y_t[r, j], over steps and LANES.

    In blocks of rows by columns (literals). y_t (rows · row_blocks, LANES) begins at t · y_step of the flat y, x_t (columns
    · column_blocks, LANES) likewise. total (row_blocks, column_blocks, rows, columns) is flat and in float64, row_total
    too. rows · columns is a multiple of a vector's length; no number is 0.
    """
    arrays, R, K = (y, x, total, row_total), rows.literal_value, columns.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, y.dtype)
        ys, xs, target, row_target = vectors.pointers([values[k] for k in (4, 6, 9, 10)], arrays)
        y_stride, x_stride, many, across = values[5], values[7], values[8], values[3]
        zero = vectors.constant(0.0)

        def rows_of_blocks(row, _):
            left = vectors.at(ys, builder.mul(row, ir.Constant(INDEX, R * LANES)))

            def block(column, with_rows):
                right = vectors.at(xs, builder.mul(column, ir.Constant(INDEX, K * LANES)))

                def add(t, totals):
                    a_t, b_t = vectors.at(left, builder.mul(t, y_stride)), vectors.at(right, builder.mul(t, x_stride))
                    for place in vectors.places:
                        b = [vectors.load(vectors.at(b_t, k * LANES + place)) for k in range(K)]
                        a = [vectors.load(vectors.at(a_t, r * LANES + place)) for r in range(R)]
                        alone = [vectors.plus(total, part) for total, part in zip(totals[R * K:], a)]
                        totals = [vectors.add_product(totals[r * K + k], a[r], b[k])
                                  for r in range(R) for k in range(K)] + alone
                    return totals

                totals = vectors.loop(many, [zero] * (R * K + with_rows), add)
                number = builder.add(builder.mul(row, across), column)
                vectors.add_sums(totals[:R * K], vectors.at(target, builder.mul(number, ir.Constant(INDEX, R * K))))
                return totals[R * K:]

            alone = block(ir.Constant(INDEX, 0), R)
            vectors.add_sums(alone, vectors.at(row_target, builder.mul(row, ir.Constant(INDEX, R))))
            others = builder.sub(across, ir.Constant(INDEX, 1))
            with builder.if_then(builder.icmp_signed(">", others, ir.Constant(INDEX, 0))):
                vectors.loop(others, [], lambda number, _: block(builder.add(number, ir.Constant(INDEX, 1)), 0))
            return []

        vectors.loop(values[2], [], rows_of_blocks)
        return context.get_dummy_value()

    return types.void(rows, columns, types.intp, types.intp, y, types.intp, x, types.intp, types.intp, total,
                      row_total), generate


@intrinsic
def log_sign_row(typing, p, least, steepest, rows):
    """`preprocessing.log_sign` of the numbers in the second row of rows (2, LANES), not NaN: its two parts become the rows.

    least is e^-p, steepest e^p."""
    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, rows.dtype)
        (start,) = vectors.pointers(values[3:], [rows])
        p, least, steepest = (vectors.spread(context.cast(builder, value, types.float64, rows.dtype)) for value in values[:3])
        for place in vectors.places:
            sizes, signs = vectors.at(start, place), vectors.at(start, LANES + place)
            grad = vectors.load(signs)
            size = builder.select(builder.fcmp_ordered("<", grad, vectors.constant(0.0)), builder.fneg(grad), grad)
            size = builder.select(builder.fcmp_ordered("<", size, least), least, size)
            vectors.store(builder.fdiv(vectors.log(size), p), sizes)
            vectors.store(vectors.at_least_and_most(vectors.times(grad, steepest), -1.0, 1.0), signs)
        return context.get_dummy_value()

    return types.void(types.float64, types.float64, types.float64, rows), generate


def copy_between(source, out):
    """The numbers' dtype, and what of `Vectors` loads from one array and stores to the other: either may be bfloat16."""
    number = out.dtype if source.dtype == BFLOAT16 else source.dtype
    return (number, Vectors.load_bfloat16 if source.dtype == BFLOAT16 else Vectors.load,
            Vectors.store_bfloat16 if out.dtype == BFLOAT16 else Vectors.store)


@intrinsic
def copy_rows(typing, rows, tiles, source, source_row, source_tile, out, out_row, out_tile):
    """out[r · out_row + k · out_tile + j] = source[r · source_row + k · source_tile + j] for r < rows, k < tiles, j < LANES.

    Neither rows nor tiles is 0. One of the arrays may be of bfloat16, as int16."""
    number, load, store = copy_between(source, out)

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, number)
        origin, target = vectors.pointers([values[2], values[5]], [source, out])

        def row(r, _):
            old, new = vectors.at(origin, builder.mul(r, values[3])), vectors.at(target, builder.mul(r, values[6]))

            def tile(k, _):
                from_, to = vectors.at(old, builder.mul(k, values[4])), vectors.at(new, builder.mul(k, values[7]))
                for place in vectors.places:
                    store(vectors, load(vectors, vectors.at(from_, place)), vectors.at(to, place))
                return []

            return vectors.loop(values[1], [], tile)

        vectors.loop(values[0], [], row)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, source, types.intp, types.intp, out, types.intp, types.intp), generate


@intrinsic
def copy_numbers(typing, count, source, first, out, at):
    """out[at + k] = source[first + k] for k < count, which is not 0, of arrays as of `copy_rows`."""
    number, load, store = copy_between(source, out)

    def generate(context, builder, signature, values):
        single = Vectors(context, builder, number, length=1)
        origin, target = single.pointers([values[1], values[3]], [source, out])

        def copy(k, _):
            store(single, load(single, single.at(origin, values[2], k)), single.at(target, values[4], k))
            return []

        single.loop(values[0], [], copy)
        return context.get_dummy_value()

    return types.void(types.intp, source, types.intp, out, types.intp), generate


@intrinsic
def gather_columns(typing, source, row, index, count, out):
    """out[k · LANES + j] = source[index[j] · row + k] for j < LANES and k < count: rows become columns.

    count is a multiple of `LANES`, and not 0."""
    arrays = source, index, out

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, source.dtype)
        origin, numbers, target = vectors.pointers([values[k] for k in (0, 2, 4)], arrays)
        blocks = builder.udiv(values[3], ir.Constant(INDEX, vectors.length))
        for place in vectors.places:
            rows = [vectors.at(origin, builder.mul(values[1], builder.load(vectors.at(numbers, place + j))))
                    for j in range(vectors.length)]

            def block(number, _):
                first = builder.mul(number, ir.Constant(INDEX, vectors.length))
                columns = vectors.transposed([vectors.load(vectors.at(row, first)) for row in rows])
                out = vectors.at(target, builder.mul(first, ir.Constant(INDEX, LANES)), place)
                for k, column in enumerate(columns):
                    vectors.store(column, vectors.at(out, k * LANES))
                return []

            vectors.loop(blocks, [], block)
        return context.get_dummy_value()

    return types.void(source, types.intp, index, types.intp, out), generate


@intrinsic
def fetch_rows(typing, rows, tiles, source, source_row):
    """Have source[r · source_row + j], r < rows and j < tiles · LANES, brought near while something else is computed.

    Neither rows nor tiles is 0."""
    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, source.dtype)
        (origin,), byte, number = vectors.pointers([values[2]], [source]), ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        line = 64 * 8 // source.dtype.bitwidth  # elements

        def row(r, _):
            start = vectors.at(origin, builder.mul(r, values[3]))

            def tile(k, _):
                here = vectors.at(start, builder.mul(k, ir.Constant(INDEX, LANES)))
                for place in range(0, LANES, line):  # where rows begin within a line, the one before has brought that line
                    last = builder.bitcast(vectors.at(here, place + line - 1), byte)
                    builder.call(fetch, [last, *(ir.Constant(number, how) for how in (0, 2, 1))])  # to be read; not nearest; data
                return []

            return vectors.loop(values[1], [], tile)

        vectors.loop(values[0], [], row)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, source, types.intp), generate
