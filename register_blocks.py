"""Products of small matrices whose sums stay in a processor's registers, for the loops that numba compiles.

numba vectorizes a loop over a row well, a product of matrices not: between two multiplications it stores the sums. The
two functions here say to LLVM in vectors what a block of a product is. They are called from compiled functions only and
check nothing. A matrix with `LANES` columns is given as a flat array, its rows one after the other.
"""

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

__all__ = ["LANES", "OUTER", "add_outer_block", "copy_rows", "product_block"]

LANES = 32  # columns
TOGETHER = 2  # vectors of a row that are in registers at once
INDEX = ir.IntType(64)


def registers():
    """How many bytes a vector register of this machine has, and how many such registers there are."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 32
    return (32, 16) if features.get("avx") else (16, 32 if features.get("neon") else 16)


REGISTER, REGISTERS = registers()
OUTER = 5 if REGISTERS == 32 else 2  # columns of `add_outer_block`: with 4 rows, as many sums as there is room for


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

    def sum(self, vector):
        """Of a vector's elements, in any order."""
        kind = f"llvm.vector.reduce.fadd.v{self.length}{'f32' if self.scalar == ir.FloatType() else 'f64'}"
        signature = ir.FunctionType(self.scalar, [self.scalar, self.type])
        function = self.builder.module.globals.get(kind) or ir.Function(self.builder.module, signature, kind)
        return self.builder.call(function, [ir.Constant(self.scalar, -0.0), vector], fastmath=("reassoc",))

    def loop(self, count, totals, body):
        """totals ← body(k, totals) for k = 0 … count - 1; count, LLVM's, is at least 1. Returns the last totals."""
        builder, before = self.builder, self.builder.block
        head, done = builder.append_basic_block("block"), builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        k, carried = builder.phi(INDEX), [builder.phi(self.type) for _ in totals]
        new, after = body(k, carried), builder.add(k, ir.Constant(INDEX, 1))
        k.add_incoming(ir.Constant(INDEX, 0), before)
        k.add_incoming(after, head)
        for phi, first, next_one in zip(carried, totals, new):
            phi.add_incoming(first, before)
            phi.add_incoming(next_one, head)
        builder.cbranch(builder.icmp_unsigned("<", after, count), head, done)
        builder.position_at_end(done)
        return new


@intrinsic(prefer_literal=True)
def product_block(typing, rows, weight, width, bias, count, x, out):
    """out[r, :] = bias[r] + Σ_k weight[r, k] x[k, :] for r < rows (a literal) and k < count.

    weight (rows, ≥ count) is flat, its rows `width` apart; x (count, LANES); out (rows, LANES).
    """
    arrays, R = (weight, bias, x, out), rows.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, weight.dtype)
        w, b, source, target = vectors.pointers([values[k] for k in (1, 3, 5, 6)], arrays)
        stride, many = values[2], values[4]
        for start in range(0, LANES, TOGETHER * vectors.length):
            places = range(start, min(start + TOGETHER * vectors.length, LANES), vectors.length)

            def body(k, totals):
                row = builder.mul(k, ir.Constant(INDEX, LANES))
                xs, new = [vectors.load(vectors.at(source, row, place)) for place in places], []
                for r in range(R):
                    factor = vectors.spread(builder.load(vectors.at(w, builder.mul(stride, ir.Constant(INDEX, r)), k)))
                    new += [vectors.add_product(totals[len(new) + v], factor, part) for v, part in enumerate(xs)]
                return new

            biases = [vectors.spread(builder.load(vectors.at(b, r))) for r in range(R)]
            totals = vectors.loop(many, [bias for bias in biases for _ in places], body)
            for n, total in enumerate(totals):
                vectors.store(total, vectors.at(target, n // len(places) * LANES + places[n % len(places)]))
        return context.get_dummy_value()

    return types.void(rows, weight, types.intp, bias, types.intp, x, out), generate


@intrinsic(prefer_literal=True)
def add_outer_block(typing, rows, columns, y, y_step, x, x_step, steps, total, width):
    """total[r, k] += Σ_t Σ_j y_t[r, j] x_t[k, j] for r < rows and k < columns (literals), over steps and LANES.

    y_t (rows, LANES) begins at t · y_step of the flat y, x_t (columns, LANES) likewise; total, flat, in float64, has
    rows `width` apart.
    """
    arrays, R, K = (y, x, total), rows.literal_value, columns.literal_value

    def generate(context, builder, signature, values):
        vectors = Vectors(context, builder, y.dtype)
        ys, xs, target = vectors.pointers([values[k] for k in (2, 4, 7)], arrays)
        y_stride, x_stride, many, stride = values[3], values[5], values[6], values[8]

        def body(t, totals):
            left, right = vectors.at(ys, builder.mul(t, y_stride)), vectors.at(xs, builder.mul(t, x_stride))
            for place in range(0, LANES, vectors.length):
                b = [vectors.load(vectors.at(right, k * LANES + place)) for k in range(K)]
                a = [vectors.load(vectors.at(left, r * LANES + place)) for r in range(R)]
                totals = [vectors.add_product(totals[r * K + k], a[r], b[k]) for r in range(R) for k in range(K)]
            return totals

        zero = vectors.spread(ir.Constant(vectors.scalar, 0.0))
        for n, sums in enumerate(vectors.loop(many, [zero] * (R * K), body)):
            value = vectors.sum(sums)
            if vectors.scalar == ir.FloatType():
                value = builder.fpext(value, ir.DoubleType())
            place = vectors.at(target, builder.mul(stride, ir.Constant(INDEX, n // K)), n % K)
            builder.store(builder.fadd(builder.load(place), value), place)
        return context.get_dummy_value()

    return types.void(rows, columns, y, types.intp, x, types.intp, types.intp, total, types.intp), generate


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
