"""Products of small matrices whose sums stay in a processor's registers, for the loops that numba compiles.

numba vectorizes a loop over a row well, a product of matrices not: between two multiplications it stores the sums. The
two functions here say to LLVM in vectors what a block of a product is. They are called from compiled functions only and
check nothing. A matrix with `LANES` columns is given as a flat array, its rows one after the other. Whoever changes them
must also touch the file that calls them: numba keeps what it has compiled until that file changes.
"""

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

__all__ = ["LANES", "OUTER", "ROWS", "add_outer_blocks", "copy_rows", "fetch_rows", "product_blocks"]

LANES = 16  # columns
TOGETHER = 2  # vectors of a row, at most, that are in registers at once
INDEX = ir.IntType(64)


def registers():
    """How many bytes a vector register of this machine has, and how many such registers there are."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 32
    return (32, 16) if features.get("avx") else (16, 32 if features.get("neon") else 16)


REGISTER, REGISTERS = registers()
ROWS = 8 if REGISTERS == 32 else 4  # of a block of `product_blocks`: with so many sums the multiplications never wait
OUTER = 4 if REGISTERS == 32 else 2  # columns of `add_outer_blocks`: with 4 rows, as many sums as there is room for


class Vectors:
    """What both functions write in LLVM's language: vectors of a register's size, and where they lie."""

    def __init__(self, context, builder, dtype):
        self.context, self.builder, self.scalar = context, builder, context.get_data_type(dtype)
        self.length = REGISTER // (4 if dtype == types.float32 else 8)
        self.type = ir.VectorType(self.scalar, self.length)

    def pointers(self, arrays, kinds):
        return [self.context.make_array(kind)(self.context, self.builder, array).data for array, kind in zip(arrays, kinds)]

    def at(self, pointer, *terms):
        """pointer + the sum of the terms, each an int or LLVM's."""
        for term in terms:
            pointer = self.builder.gep(pointer, [ir.Constant(INDEX, term) if isinstance(term, int) else term])
        return pointer

    def load(self, pointer):
        return self.builder.load(self.builder.bitcast(pointer, self.type.as_pointer()), align=REGISTER // self.length)

    def store(self, value, pointer):
        self.builder.store(value, self.builder.bitcast(pointer, self.type.as_pointer()), align=REGISTER // self.length)

    def spread(self, scalar):
        """A scalar in all places of a vector."""
        undefined, positions = ir.Constant(self.type, ir.Undefined), ir.VectorType(ir.IntType(32), self.length)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(positions, [0] * self.length))

    def add_product(self, total, a, b):
        """total + a · b, rounded once where the machine can."""
        return self.builder.fadd(total, self.builder.fmul(a, b, flags=("contract",)), flags=("contract",))

    def sums(self, several):
        """As many vectors as a vector has places -> one vector of their sums."""
        while len(several) > 1:
            pairs, length = list(zip(several[::2], several[1::2])), self.length
            even, odd = (ir.Constant(ir.VectorType(ir.IntType(32), length), list(range(first, 2 * length, 2))) for first in (0, 1))
            several = [self.builder.fadd(self.builder.shuffle_vector(a, b, even), self.builder.shuffle_vector(a, b, odd))
                       for a, b in pairs]
        return several[0]

    def loop(self, count, totals, body):
        """totals ← body(k, totals) for k = 0 … count - 1; count, LLVM's, is at least 1. Returns the last totals."""
        builder, before = self.builder, self.builder.block
        head, done = builder.append_basic_block("block"), builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        k, carried = builder.phi(INDEX), [builder.phi(self.type) for _ in totals]
        new, after = body(k, carried), builder.add(k, ir.Constant(INDEX, 1))
        k.add_incoming(ir.Constant(INDEX, 0), before)
        k.add_incoming(after, builder.block)
        for phi, first, next_one in zip(carried, totals, new):
            phi.add_incoming(first, before)
            phi.add_incoming(next_one, builder.block)
        builder.cbranch(builder.icmp_unsigned("<", after, count), head, done)
        builder.position_at_end(done)
        return new


@intrinsic(prefer_literal=True)
def product_blocks(typing, rows, blocks, weight, width, bias, count, x, out):
    """out[r, :] = bias[r] + Σ_k weight[r, k] x[k, :] for r < rows · blocks (rows is a literal) and k < count.

    weight (…, ≥ count) is flat, its rows `width` apart; x (count, LANES); out (rows · blocks, LANES). Neither count nor
    blocks is 0.
    """
    arrays, R = (weight, bias, x, out), rows.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, weight.dtype)
        w, b, source, target = vectors.pointers([values[k] for k in (2, 4, 6, 7)], arrays)
        stride, many = values[3], values[5]

        def block(number, _):
            row = builder.mul(number, ir.Constant(INDEX, R))
            biases, out = vectors.at(b, row), vectors.at(target, builder.mul(row, ir.Constant(INDEX, LANES)))
            factors = [vectors.at(w, builder.mul(builder.add(row, ir.Constant(INDEX, r)), stride)) for r in range(R)]
            for start in range(0, LANES, TOGETHER * vectors.length):
                places = range(start, min(start + TOGETHER * vectors.length, LANES), vectors.length)

                def add(k, totals):
                    at = builder.mul(k, ir.Constant(INDEX, LANES))
                    xs, new = [vectors.load(vectors.at(source, at, place)) for place in places], []
                    for pointer in factors:
                        factor = vectors.spread(builder.load(vectors.at(pointer, k)))
                        new += [vectors.add_product(totals[len(new) + v], factor, part) for v, part in enumerate(xs)]
                    return new

                start_at = [vectors.spread(builder.load(vectors.at(biases, r))) for r in range(R)]
                totals = vectors.loop(many, [bias for bias in start_at for _ in places], add)
                for n, total in enumerate(totals):
                    vectors.store(total, vectors.at(out, n // len(places) * LANES + places[n % len(places)]))
            return []

        vectors.loop(values[1], [], block)
        return context.get_dummy_value()

    return types.void(rows, types.intp, weight, types.intp, bias, types.intp, x, out), generate


@intrinsic(prefer_literal=True)
def add_outer_blocks(typing, rows, columns, row_blocks, column_blocks, y, y_step, x, x_step, steps, total):
    """total[r, k] += Σ_t Σ_j y_t[r, j] x_t[k, j], over steps and LANES, in blocks of rows by columns (literals).

    y_t (rows · row_blocks, LANES) begins at t · y_step of the flat y, x_t (columns · column_blocks, LANES) likewise.
    total (row_blocks, column_blocks, rows, columns) is flat and in float64. rows · columns is a multiple of a vector's
    length.
    """
    arrays, R, K = (y, x, total), rows.literal_value, columns.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, y.dtype)
        ys, xs, target = vectors.pointers([values[k] for k in (4, 6, 9)], arrays)
        y_stride, x_stride, many, across = values[5], values[7], values[8], values[3]
        wide = ir.VectorType(ir.DoubleType(), vectors.length)
        zero = vectors.spread(ir.Constant(vectors.scalar, 0.0))

        def rows_of_blocks(row, _):
            def block(column, _):
                left = vectors.at(ys, builder.mul(row, ir.Constant(INDEX, R * LANES)))
                right = vectors.at(xs, builder.mul(column, ir.Constant(INDEX, K * LANES)))

                def add(t, totals):
                    a_t, b_t = vectors.at(left, builder.mul(t, y_stride)), vectors.at(right, builder.mul(t, x_stride))
                    for place in range(0, LANES, vectors.length):
                        b = [vectors.load(vectors.at(b_t, k * LANES + place)) for k in range(K)]
                        a = [vectors.load(vectors.at(a_t, r * LANES + place)) for r in range(R)]
                        totals = [vectors.add_product(totals[r * K + k], a[r], b[k]) for r in range(R) for k in range(K)]
                    return totals

                totals = vectors.loop(many, [zero] * (R * K), add)
                number = builder.add(builder.mul(row, across), column)
                place = vectors.at(target, builder.mul(number, ir.Constant(INDEX, R * K)))
                for start in range(0, R * K, vectors.length):
                    sums = vectors.sums(totals[start:start + vectors.length])
                    if vectors.scalar == ir.FloatType():
                        sums = builder.fpext(sums, wide)
                    pointer = builder.bitcast(vectors.at(place, start), wide.as_pointer())
                    builder.store(builder.fadd(builder.load(pointer, align=8), sums), pointer, align=8)
                return []

            vectors.loop(across, [], block)
            return []

        vectors.loop(values[2], [], rows_of_blocks)
        return context.get_dummy_value()

    return types.void(rows, columns, types.intp, types.intp, y, types.intp, x, types.intp, types.intp, total), generate


@intrinsic
def copy_rows(typing, rows, source, source_step, out, out_step):
    """out[r · out_step + j] = source[r · source_step + j] for r < rows (1 or more) and j < LANES."""
    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, source.dtype)
        origin, target = vectors.pointers([values[1], values[3]], [source, out])

        def body(r, totals):
            old, new = vectors.at(origin, builder.mul(r, values[2])), vectors.at(target, builder.mul(r, values[4]))
            for place in range(0, LANES, vectors.length):
                vectors.store(vectors.load(vectors.at(old, place)), vectors.at(new, place))
            return totals

        vectors.loop(values[0], [], body)
        return context.get_dummy_value()

    return types.void(types.intp, source, types.intp, out, types.intp), generate


@intrinsic
def fetch_rows(typing, rows, source, source_step):
    """Have source[r · source_step + j], r < rows (1 or more) and j < LANES, brought near while something else is computed."""
    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, source.dtype)
        (origin,), byte, number = vectors.pointers([values[1]], [source]), ir.IntType(8).as_pointer(), ir.IntType(32)
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte] + [number] * 3))
        line = 64 * vectors.length // REGISTER  # elements

        def body(r, totals):
            row = vectors.at(origin, builder.mul(r, values[2]))
            for place in range(0, LANES, line):  # where rows begin within a line, the one before has brought that line
                last = builder.bitcast(vectors.at(row, place + line - 1), byte)
                builder.call(fetch, [last, *(ir.Constant(number, kind) for kind in (0, 2, 1))])  # to be read, not nearest, data
            return totals

        vectors.loop(values[0], [], body)
        return context.get_dummy_value()

    return types.void(types.intp, source, types.intp), generate
