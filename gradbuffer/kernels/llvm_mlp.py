"""What a small learned optimizer does with a tensor's coordinates, in a processor's registers, for loops that numba compiles.

The three passes of `gradbuffer.nets.mlp.MLPOptimizer` (variant "celo") over a tensor, and the activations of a perceptron. A
tensor is a matrix (rows, columns) in one piece; one with fewer than two axes is a single row. m and v may be of
bfloat16, as int16. Each intrinsic is called from
compiled functions only and checks nothing. Rows need not be multiples of a vector: the last vector of a row is masked.

`H` of an intrinsic is a tuple of tuples, as long as each hidden layer is wide: so the sizes are known when it is compiled.
"""

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gradbuffer.kernels.llvm_vectors import INDEX, LANES, NUMBERS, Vectors

__all__ = [
    "FACTORED",
    "OF_MATRIX",
    "OF_VECTOR",
    "READ",
    "activate_rows",
    "direct_rows",
    "exp_rows",
    "factor_rows",
    "read_rows",
]

BFLOAT16 = types.int16  # as what numba is given it
DECAYS = (0.9, 0.99, 0.999)
SECOND = 0.95
BOUND, CLIP = 1000.0, 0.1
TINY = 1e-30  # averages below it become 0: numbers that are not normal take a processor a hundred times as long
READ, FACTORED = 13, 6  # sums that `read_rows` and `factor_rows` add to
OF_MATRIX, OF_VECTOR = (
    18,
    13,
)  # features of one coordinate for which `direct_rows` has weights: all but rows' and columns'
SIGMOID, RELU, TANH = 0, 1, 2  # activations; the next one is SiLU


class Rows(Vectors):
    """`Vectors` along rows of any length, of which the last vector may be partly filled."""

    def __init__(self, context, builder, dtype):
        super().__init__(context, builder, dtype)
        self.mask = None  # of the places that count, in the last vector of a row

    def intrinsic(self, name, of, result, arguments):
        """A call of LLVM's function of that name for such vectors."""
        kind = f"i{of.element.width}" if isinstance(of.element, ir.IntType) else f"f{8 * self.bytes}"
        full = f"llvm.{name}.v{self.length}{kind}" + ".p0" * any(argument.type.is_pointer for argument in arguments)
        function = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(
            self.builder.module.globals.get(full) or ir.Function(self.builder.module, function, full), arguments
        )

    def masked_load(self, of, size, pointer):
        pointer = self.builder.bitcast(pointer, of.as_pointer())
        nothing = ir.Constant(of, [0] * self.length)
        return self.intrinsic("masked.load", of, of, [pointer, ir.Constant(ir.IntType(32), size), self.mask, nothing])

    def masked_store(self, size, value, pointer):
        pointer = self.builder.bitcast(pointer, value.type.as_pointer())
        self.intrinsic(
            "masked.store", value.type, ir.VoidType(), [value, pointer, ir.Constant(ir.IntType(32), size), self.mask]
        )

    def load(self, pointer):
        return super().load(pointer) if self.mask is None else self.masked_load(self.type, self.bytes, pointer)

    def store(self, value, pointer):
        if self.mask is None:
            super().store(value, pointer)
        else:
            self.masked_store(self.bytes, value, pointer)

    def load_from(self, array, pointer):
        """From an array of these numbers, or of bfloat16."""
        if array.dtype != BFLOAT16:
            return self.load(pointer)
        if self.mask is not None:
            halves, _, _ = self.halves_and_floats()
            upper, pointer = self.masked_load(halves, 2, pointer), cgutils.alloca_once(self.builder, halves)
            self.builder.store(upper, pointer, align=2)
        return self.load_bfloat16(pointer)

    def store_to(self, array, value, pointer):
        """To such an array."""
        if array.dtype != BFLOAT16:
            self.store(value, pointer)
        elif self.mask is None:
            self.store_bfloat16(value, pointer)
        else:
            halves, _, _ = self.halves_and_floats()
            place = cgutils.alloca_once(self.builder, halves)
            self.store_bfloat16(value, place)
            self.masked_store(2, self.builder.load(place, align=2), pointer)

    def counted(self, value):
        """The value where a place counts, else 0."""
        return value if self.mask is None else self.builder.select(self.mask, value, self.constant(0.0))

    def root(self, x):
        return self.intrinsic("sqrt", self.type, self.type, [x])

    def inverse_root(self, x):
        return self.builder.fdiv(self.constant(1.0), self.root(x))

    def at_least(self, x, least):
        return self.builder.select(self.builder.fcmp_ordered("<", x, self.constant(least)), self.constant(least), x)

    def without_tiny(self, x):
        """x, or 0 where |x| < TINY."""
        size = self.intrinsic("fabs", self.type, self.type, [x])
        return self.builder.select(self.builder.fcmp_ordered("<", size, self.constant(TINY)), self.constant(0.0), x)

    def average(self, old, new, decay):
        return self.add_product(self.times(old, self.constant(decay)), new, self.constant(1 - decay))

    def sum_of(self, vector):
        """The sum of a vector's places, a number."""
        size, positions = self.length, ir.IntType(32)
        while size > 1:
            size //= 2
            places = [j + size if j < size else j for j in range(self.length)]
            moved = self.builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(positions, self.length), places)
            )
            vector = self.builder.fadd(vector, moved)
        return self.builder.extract_element(vector, ir.Constant(positions, 0))

    def over_row(self, columns, totals, body):
        """totals ← body(j, totals) for each vector of a row of so many columns, LLVM's; j is where it begins."""
        builder, length = self.builder, ir.Constant(INDEX, self.length)
        whole, rest = builder.udiv(columns, length), builder.urem(columns, length)
        zero = ir.Constant(INDEX, 0)
        before = totals
        totals = self.when(
            builder.icmp_unsigned(">", whole, zero),
            before,
            lambda: self.loop(whole, before, lambda k, sums: body(builder.mul(k, length), sums)),
        )

        def masked():
            places, number = ir.VectorType(INDEX, self.length), ir.IntType(32)
            undefined = ir.Constant(places, ir.Undefined)
            first = builder.insert_element(undefined, rest, ir.Constant(number, 0))
            all_rest = builder.shuffle_vector(
                first, undefined, ir.Constant(ir.VectorType(number, self.length), [0] * self.length)
            )
            self.mask = builder.icmp_unsigned("<", ir.Constant(places, list(range(self.length))), all_rest)
            result = body(builder.mul(whole, length), totals)
            self.mask = None
            return result

        return self.when(builder.icmp_unsigned(">", rest, zero), totals, masked)

    def when(self, condition, totals, body):
        """body() if the condition holds, else totals."""
        builder, before = self.builder, self.builder.block
        inside, after = builder.append_basic_block("inside"), builder.append_basic_block("behind")
        builder.cbranch(condition, inside, after)
        builder.position_at_end(inside)
        new, end = body(), builder.block
        builder.branch(after)
        builder.position_at_end(after)
        merged = []
        for old, value in zip(totals, new):
            phi = builder.phi(self.type)
            phi.add_incoming(old, before)
            phi.add_incoming(value, end)
            merged.append(phi)
        return merged


@intrinsic(prefer_literal=True)
def read_rows(typing, matrix, rows, columns, grad, theta, moments, apart, second, row_squares, column_squares, totals):
    """The averages m and v of a tensor after one more gradient, and sums over it.

    totals (READ,) in float64 gets the sums of squares of g; g clipped; θ; m_k; v; m_k / √(v + 1e-8); 1 / √(v + 1e-8); g / √(v +
    1e-8), and, of a vector, g / √max(v, 1e-9). moments holds m_k, each `apart` numbers from the next; m and v are overwritten.
    Of a matrix (a literal, 1 or 0) row_squares (rows,) becomes the sum of g² in each row, and column_squares (columns,) is added
    to.
    """
    arrays, is_matrix = (grad, theta, moments, second, row_squares, column_squares, totals), bool(matrix.literal_value)

    def generate(context, builder, signature, values):
        v = Rows(context, builder, grad.dtype)
        g_at, p_at, m_at, v_at, r_at, c_at, t_at = v.pointers([values[k] for k in (3, 4, 5, 7, 8, 9, 10)], arrays)
        count, apart = values[2], values[6]
        m_ats = [v.at(m_at, builder.mul(apart, ir.Constant(INDEX, k))) for k in range(3)]
        zero = v.constant(0.0)

        def row(i, totals):
            start = builder.mul(i, count)

            def body(j, sums):
                def here(pointer):
                    return v.at(pointer, start, j)

                g = v.at_least_and_most(v.load(here(g_at)), -BOUND, BOUND)
                squared = v.times(g, g)
                features = [v.at_least_and_most(g, -CLIP, CLIP), v.load(here(p_at))]
                ms = [
                    v.without_tiny(v.average(v.load_from(moments, here(m)), g, decay))
                    for m, decay in zip(m_ats, DECAYS)
                ]
                for m, pointer in zip(ms, m_ats):
                    v.store_to(moments, m, here(pointer))
                averaged = v.without_tiny(v.average(v.load_from(second, here(v_at)), squared, SECOND))
                v.store_to(second, averaged, here(v_at))
                root = v.counted(v.inverse_root(v.plus(averaged, v.constant(1e-8))))
                features += [*ms, averaged, *(v.times(m, root) for m in ms), root, v.times(g, root)]
                if is_matrix:
                    v.store(v.plus(v.load(v.at(c_at, j)), squared), v.at(c_at, j))
                else:
                    features.append(v.times(g, v.inverse_root(v.at_least(averaged, 1e-9))))
                return [v.plus(sums[0], squared)] + [v.add_product(total, x, x) for total, x in zip(sums[1:], features)]

            new = v.over_row(count, [zero, *totals[1:]], body)
            if is_matrix:
                builder.store(v.sum_of(new[0]), v.at(r_at, i))
            return [v.plus(totals[0], new[0]), *new[1:]]

        v.add_sums(v.loop(values[1], [zero] * (READ - is_matrix), row), t_at)
        return context.get_dummy_value()

    return types.void(
        matrix, types.intp, types.intp, grad, theta, moments, types.intp, second, row_squares, column_squares, totals
    ), generate


@intrinsic
def factor_rows(typing, rows, columns, all_rows, grad, moments, apart, row_factors, column_factors, totals):
    """totals (FACTORED,), in float64, += the sums of squares of g R_k C_k, then of m_k R_k C_k, over rows of a matrix.

    row_factors is R, each k `all_rows` from the next; column_factors (3, columns) is C.
    """
    arrays = grad, moments, row_factors, column_factors, totals

    def generate(context, builder, signature, values):
        v = Rows(context, builder, grad.dtype)
        g_at, m_at, r_at, c_at, t_at = v.pointers([values[k] for k in (3, 4, 6, 7, 8)], arrays)
        count, apart = values[1], values[5]
        zero = v.constant(0.0)

        def times_k(step, k):
            return builder.mul(step, ir.Constant(INDEX, k))

        def row(i, totals):
            start = builder.mul(i, count)

            def body(j, sums):
                g, sums = v.at_least_and_most(v.load(v.at(g_at, start, j)), -BOUND, BOUND), list(sums)
                for k in range(3):
                    factor = v.load(v.at(c_at, times_k(count, k), j))
                    for at, x in ((k, g), (3 + k, v.load_from(moments, v.at(m_at, times_k(apart, k), start, j)))):
                        x = v.times(x, factor)
                        sums[at] = v.add_product(sums[at], x, x)
                return sums

            sums, new = v.over_row(count, [zero] * FACTORED, body), []
            for k in range(FACTORED):
                factor = v.spread(builder.load(v.at(r_at, times_k(values[2], k % 3), i)))
                new.append(v.add_product(totals[k], sums[k], v.times(factor, factor)))
            return new

        v.add_sums(v.loop(values[0], [zero] * FACTORED, row), t_at)
        return context.get_dummy_value()

    return types.void(
        types.intp, types.intp, types.intp, grad, moments, types.intp, row_factors, column_factors, totals
    ), generate


@intrinsic(prefer_literal=True)
def direct_rows(
    typing,
    H,
    matrix,
    rows,
    columns,
    all_rows,
    grad,
    theta,
    moments,
    apart,
    second,
    row_factors,
    column_factors,
    row_terms,
    column_terms,
    weights,
    out,
    total,
):
    """out = what the perceptron puts out for each coordinate of some rows; total (1,), in float64, += the sum of its squares.

    H: the hidden layers' sizes, as the module says. weights, flat: of the first layer (features, H[0]), each feature's divided
    by that feature's size, in the order of `read_rows`' and then `factor_rows`' sums; then of each other layer, the output's
    included, (inputs, outputs) and the bias. row_terms: what a row adds to each unit of the first layer, its bias included, each
    unit `all_rows` from the next; of a vector the bias. column_terms (H[0], columns) likewise, of a matrix.
    """
    arrays = grad, theta, moments, second, row_factors, column_factors, row_terms, column_terms, weights, out, total
    sizes, is_matrix = [len(layer) for layer in H], bool(matrix.literal_value)

    def generate(context, builder, signature, values):
        v = Rows(context, builder, grad.dtype)
        pointers = v.pointers([values[k] for k in (5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16)], arrays)
        g_at, p_at, m_at, v_at, r_at, c_at, row_at, column_at, w_at, out_at, t_at = pointers
        count, all_rows, apart = values[3], values[4], values[8]

        def times_k(step, k):
            return builder.mul(step, ir.Constant(INDEX, k))

        def weight(place):
            return v.spread(builder.load(v.at(w_at, place)))

        def add_to_all(sums, x, place):
            return [v.add_product(total, x, weight(place + u)) for u, total in enumerate(sums)]

        def rectified(sums):
            return [v.at_least(x, 0.0) for x in sums]

        def row(i, totals):
            start = builder.mul(i, count)
            own = [builder.load(v.at(row_at, times_k(all_rows, u), i)) for u in range(sizes[0])]
            factors = [builder.load(v.at(r_at, times_k(all_rows, k), i)) for k in range(3)] if is_matrix else []

            def body(j, totals):
                def here(pointer, array=grad):
                    return v.load_from(array, v.at(pointer, start, j))

                sums = [v.spread(term) for term in own]
                if is_matrix:
                    sums = [v.plus(x, v.load(v.at(column_at, times_k(count, u), j))) for u, x in enumerate(sums)]
                g = v.at_least_and_most(here(g_at), -BOUND, BOUND)
                ms = [here(v.at(m_at, times_k(apart, k)), moments) for k in range(3)]
                averaged = here(v_at, second)
                root = v.inverse_root(v.plus(averaged, v.constant(1e-8)))
                features = [
                    g,
                    v.at_least_and_most(g, -CLIP, CLIP),
                    here(p_at),
                    *ms,
                    averaged,
                    *(v.times(m, root) for m in ms),
                    root,
                    v.times(g, root),
                ]
                if is_matrix:
                    both = [
                        v.times(v.spread(factor), v.load(v.at(c_at, times_k(count, k), j)))
                        for k, factor in enumerate(factors)
                    ]
                    features += [v.times(g, factor) for factor in both] + [
                        v.times(m, factor) for m, factor in zip(ms, both)
                    ]
                else:
                    features.append(v.times(g, v.inverse_root(v.at_least(averaged, 1e-9))))
                for number, x in enumerate(features):
                    sums = add_to_all(sums, x, number * sizes[0])
                place = len(features) * sizes[0]
                for inputs, outputs in zip(sizes, [*sizes[1:], 1]):
                    below = rectified(sums)
                    sums = [weight(place + inputs * outputs + u) for u in range(outputs)]
                    for x in below:
                        sums, place = add_to_all(sums, x, place), place + outputs
                    place += outputs
                result = v.counted(sums[0])
                v.store(result, v.at(out_at, start, j))
                return [v.add_product(totals[0], result, result)]

            return v.over_row(count, totals, body)

        v.add_sums(v.loop(values[2], [v.constant(0.0)], row), t_at)
        return context.get_dummy_value()

    return types.void(
        H,
        matrix,
        types.intp,
        types.intp,
        types.intp,
        grad,
        theta,
        moments,
        types.intp,
        second,
        row_factors,
        column_factors,
        row_terms,
        column_terms,
        weights,
        out,
        total,
    ), generate


def power(vectors, y):
    """2^y, for y between the least and the greatest exponent of normal numbers (beyond them, those).

    It rounds by adding: the function that holds it must be compiled so that sums stay in their order."""
    builder, (fraction, _, number, polynomial) = vectors.builder, NUMBERS[vectors.bytes == 4]
    bits, most = ir.VectorType(ir.IntType(number), vectors.length), 126.0 if vectors.bytes == 4 else 1022.0
    shift = vectors.constant(1.5 * 2.0**fraction + 2 ** (number - fraction - 2) - 1)
    y = vectors.at_least_and_most(y, -most, most)
    shifted = builder.fadd(y, shift)  # its last bits are those of 2^n's exponent
    r, p = builder.fsub(y, builder.fsub(shifted, shift)), vectors.constant(polynomial[0])
    for factor in polynomial[1:]:
        p = vectors.add_product(vectors.constant(factor), p, r)
    exponents = builder.shl(builder.bitcast(shifted, bits), ir.Constant(bits, [fraction] * vectors.length))
    return vectors.times(p, builder.bitcast(exponents, vectors.type))


@intrinsic
def exp_rows(typing, rows, x, least, out):
    """out = exp(x - least) for rows of LANES columns, `least` being one row; rows is not 0."""

    def generate(context, builder, signature, values):
        v = Vectors(context, builder, x.dtype)
        x_at, least_at, out_at = v.pointers(values[1:], [x, least, out])

        def row(r, _):
            start = builder.mul(r, ir.Constant(INDEX, LANES))
            for place in v.places:
                y = v.minus(v.load(v.at(x_at, start, place)), v.load(v.at(least_at, place)))
                v.store(power(v, v.times(y, v.constant(1 / math.log(2)))), v.at(out_at, start, place))
            return []

        v.loop(values[0], [], row)
        return context.get_dummy_value()

    return types.void(types.intp, x, least, out), generate


@intrinsic(prefer_literal=True)
def activate_rows(typing, kind, rows, x, slopes):
    """x becomes its activation, and slopes its derivative, for rows of LANES columns; rows is not 0. kind: a literal."""

    def generate(context, builder, signature, values):
        v = Vectors(context, builder, x.dtype)
        x_at, slopes_at = v.pointers(values[2:], [x, slopes])
        zero, one = v.constant(0.0), v.constant(1.0)

        def activation(y):
            if kind.literal_value == RELU:
                positive = builder.fcmp_unordered(">", y, zero)  # a NaN stays one
                return builder.select(positive, y, zero), builder.select(positive, one, zero)
            if kind.literal_value == TANH:
                tanh = v.tanh(y)
                return tanh, v.tanh_slope(tanh)
            sigmoid = builder.fdiv(one, v.one_plus_power(v.times(v.constant(-1 / math.log(2)), y)))
            if kind.literal_value == SIGMOID:
                return sigmoid, v.sigmoid_slope(sigmoid)
            return v.times(y, sigmoid), v.add_product(sigmoid, y, v.sigmoid_slope(sigmoid))

        def row(r, _):
            start = builder.mul(r, ir.Constant(INDEX, LANES))
            for place in v.places:
                value, slope = activation(v.load(v.at(x_at, start, place)))
                v.store(value, v.at(x_at, start, place))
                v.store(slope, v.at(slopes_at, start, place))
            return []

        v.loop(values[1], [], row)
        return context.get_dummy_value()

    return types.void(kind, types.intp, x, slopes), generate
