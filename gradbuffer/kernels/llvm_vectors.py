"""Vectors of a processor's registers, and what is done with them: what `llvm_blocks` says to LLVM is put together here.

A matrix is given as a flat array, its rows of `LANES` columns one after the other; a row is one vector, or several.
"""

import functools
import inspect
import math
from collections.abc import Callable

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

__all__ = ["BFLOAT16", "INDEX", "LANES", "NUMBERS", "REGISTER", "REGISTERS", "TO_POWERS", "Vectors", "vector_code"]

LANES = 16  # columns
INDEX = ir.IntType(64)
BFLOAT16 = types.int16  # as what numba is given it


def registers():
    """How many bytes a vector register of this machine has, and how many such registers there are."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 32
    return (32, 16) if features.get("avx") else (16, 32 if features.get("neon") else 16)


REGISTER, REGISTERS = registers()

# By whether numbers are float32: a fraction's bits; how large y may be for the product of three 1 + 2^y to be a number; bits
# in all; factors of the polynomial that is 2^r for |r| ≤ 1/2 (to 3e-7, relative, and 4e-16), that of the highest power first.
NUMBERS = {
    True: (23, 40.0, 32, (1.3300451e-3, 9.6697018e-3, 5.5505592e-2, 2.4022281e-1, 6.9314718e-1, 1.0)),
    False: (52, 330.0, 64, [math.log(2) ** k / math.factorial(k) for k in range(13, -1, -1)]),
}
# Likewise: the bits of √½; the last power of the series in `log` (which is then right to 4e-9, relative, and 1e-17).
LOGARITHMS = {True: (0x3F3504F3, 9), False: (0x3FE6A09E667F3BCD, 21)}
TO_POWERS = -2 / math.log(2)  # tanh x = 2 / (1 + 2^y) - 1 for y so many times x


class Vectors:
    """What the functions write in LLVM's language: vectors of a register's size, what is done with them, where they lie."""

    def __init__(self, context, builder, dtype, length=None):
        self.context, self.builder, self.scalar = context, builder, context.get_data_type(dtype)
        self.bytes = 4 if dtype == types.float32 else 8  # of a number
        self.length = length or REGISTER // self.bytes
        self.type = ir.VectorType(self.scalar, self.length)
        self.quarter = 16 * self.length // REGISTER  # places in 16 bytes
        self.places = range(0, LANES, self.length)

    def pointers(self, arrays, kinds):
        if any(kind.layout != "C" for kind in kinds):
            raise TypeError(f"arrays must be in one piece, got {kinds}")
        return [
            self.context.make_array(kind)(self.context, self.builder, array).data for array, kind in zip(arrays, kinds)
        ]

    def at(self, pointer, *terms):
        """pointer + the sum of the terms, each an int or LLVM's."""
        for term in terms:
            pointer = self.builder.gep(pointer, [ir.Constant(INDEX, term) if isinstance(term, int) else term])
        return pointer

    def load(self, pointer):
        return self.builder.load(self.builder.bitcast(pointer, self.type.as_pointer()), align=self.bytes)

    def store(self, value, pointer):
        self.builder.store(value, self.builder.bitcast(pointer, self.type.as_pointer()), align=self.bytes)

    def stream(self, value, pointer):
        """Store to memory, past the cache, what is not needed soon. The pointer must be a multiple of `REGISTER`."""
        store = self.builder.store(value, self.builder.bitcast(pointer, self.type.as_pointer()), align=REGISTER)
        store.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))

    # bfloat16, which numba does not know, is given as int16: the upper halves of float32 numbers.

    def load_bfloat16(self, pointer):
        builder, (halves, bits, floats) = self.builder, self.halves_and_floats()
        upper = builder.load(builder.bitcast(pointer, halves.as_pointer()), align=2)
        value = builder.bitcast(builder.shl(builder.zext(upper, bits), ir.Constant(bits, [16] * self.length)), floats)
        return value if floats == self.type else builder.fpext(value, self.type)

    def store_bfloat16(self, value, pointer):
        """Rounded to the nearest, of two to the even one, as torch does it."""
        builder, (halves, bits, floats) = self.builder, self.halves_and_floats()
        value = value if floats == self.type else builder.fptrunc(value, floats)
        sixteen, one, below_half, a_nan = (
            ir.Constant(bits, [number] * self.length) for number in (16, 1, 0x7FFF, 0x7FC0)
        )
        whole = builder.bitcast(value, bits)
        rounded = builder.add(builder.add(whole, below_half), builder.and_(builder.lshr(whole, sixteen), one))
        upper = builder.select(builder.fcmp_unordered("uno", value, value), a_nan, builder.lshr(rounded, sixteen))
        builder.store(builder.trunc(upper, halves), builder.bitcast(pointer, halves.as_pointer()), align=2)

    def load_from(self, array, pointer):
        """From an array of that type of numba's: of these numbers, or of bfloat16."""
        return self.load_bfloat16(pointer) if array.dtype == BFLOAT16 else self.load(pointer)

    def store_to(self, array, value, pointer):
        """To such an array."""
        (self.store_bfloat16 if array.dtype == BFLOAT16 else self.store)(value, pointer)

    def halves_and_floats(self):
        return (ir.VectorType(kind, self.length) for kind in (ir.IntType(16), ir.IntType(32), ir.FloatType()))

    def spread(self, scalar):
        """A scalar in all places of a vector."""
        undefined, positions = ir.Constant(self.type, ir.Undefined), ir.VectorType(ir.IntType(32), self.length)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(positions, [0] * self.length))

    def constant(self, value):
        return ir.Constant(self.type, [value] * self.length)

    # Arithmetic -------------------------------------------------------------------------------------------------

    def times(self, a, b):
        return self.builder.fmul(a, b, flags=("contract",))

    def plus(self, a, b):
        return self.builder.fadd(a, b, flags=("contract",))

    def minus(self, a, b):
        return self.builder.fsub(a, b, flags=("contract",))

    def add_product(self, total, a, b):
        """total + a · b, rounded once where the machine can."""
        return self.plus(total, self.times(a, b))

    def at_least_and_most(self, y, least, most):
        for sign, bound in (("<", self.constant(least)), (">", self.constant(most))):
            y = self.builder.select(self.builder.fcmp_ordered(sign, y, bound), bound, y)  # a NaN stays one
        return y

    def one_plus_power(self, y):
        """1 + 2^y; beyond ±`widest` as there. 2^y is 2^n 2^r with |r| ≤ 1/2, the latter a polynomial."""
        fraction, widest, number, polynomial = NUMBERS[self.scalar == ir.FloatType()]
        bits = ir.VectorType(ir.IntType(number), self.length)
        shift = self.constant(1.5 * 2.0**fraction + 2 ** (number - fraction - 2) - 1)
        y = self.at_least_and_most(y, -widest, widest)
        shifted = self.builder.fadd(y, shift)  # its last bits are those of 2^n's exponent
        r, p = self.builder.fsub(y, self.builder.fsub(shifted, shift)), self.constant(polynomial[0])
        for factor in polynomial[1:]:
            p = self.add_product(self.constant(factor), p, r)
        power = self.builder.shl(self.builder.bitcast(shifted, bits), ir.Constant(bits, [fraction] * self.length))
        return self.add_product(self.constant(1.0), p, self.builder.bitcast(power, self.type))

    def inverses(self, powers):
        """1 over each of some of these vectors.

        With many registers by one division for two; with few the three products that take its place are not worth it.
        """
        results, one = [], self.constant(1.0)
        if REGISTERS < 32 or len(powers) % 2:
            return [self.builder.fdiv(one, power) for power in powers]
        for a, b in zip(powers[::2], powers[1::2]):
            inverse = self.builder.fdiv(one, self.times(a, b))
            results += [self.times(inverse, b), self.times(inverse, a)]
        return results

    def tanh(self, x):
        power = self.one_plus_power(self.times(self.constant(TO_POWERS), x))
        return self.minus(self.builder.fdiv(self.constant(2.0), power), self.constant(1.0))

    def log(self, x):
        """The logarithm of positive normal numbers.

        x = 2^n m with √½ ≤ m < √2, and log m = 2 artanh s = 2 (s + s³/3 + s⁵/5 + …) for s = (m - 1) / (m + 1).
        """
        kind, one = self.scalar == ir.FloatType(), self.constant(1.0)
        (fraction, _, number, _), (half, last) = NUMBERS[kind], LOGARITHMS[kind]
        whole = ir.VectorType(ir.IntType(number), self.length)
        places, halves = (ir.Constant(whole, [value] * self.length) for value in (fraction, half))
        bits = self.builder.bitcast(x, whole)
        n = self.builder.ashr(self.builder.sub(bits, halves), places)
        m = self.builder.bitcast(self.builder.sub(bits, self.builder.shl(n, places)), self.type)
        s = self.builder.fdiv(self.minus(m, one), self.plus(m, one))
        z, series = self.times(s, s), self.constant(1 / last)
        for power in range(last - 2, 0, -2):
            series = self.add_product(self.constant(1 / power), series, z)
        powers = self.times(self.builder.sitofp(n, self.type), self.constant(math.log(2)))
        return self.add_product(powers, self.plus(s, s), series)

    def sigmoid_slope(self, y):
        """y - y², the derivative where sigmoid is y."""
        return self.minus(y, self.times(y, y))

    def tanh_slope(self, y):
        """1 - y², the derivative where tanh is y."""
        return self.minus(self.constant(1.0), self.times(y, y))

    # Sums of a vector's places, and what changes places ---------------------------------------------------------

    def sums(self, several):
        """As many vectors as a vector has places -> one vector of their sums."""
        order = self.fold(
            [[number] * self.length for number in range(self.length)],
            lambda a, b, first, _: [(a + b)[place] for place in first],
        )  # which one's sum comes where
        return self.fold([several[order.index(number)] for number in range(self.length)], self.add_halves)

    def add_sums(self, several, pointer):
        """The sum of each vector is added to what is in float64 at the pointer, one after the other."""
        for start in range(0, len(several), self.length):
            some = several[start : start + self.length]
            sums = self.sums(some + [self.constant(0.0)] * (self.length - len(some)))
            wide = ir.VectorType(ir.DoubleType(), len(some))
            if len(some) < self.length:
                positions = ir.Constant(ir.VectorType(ir.IntType(32), len(some)), list(range(len(some))))
                sums = self.builder.shuffle_vector(sums, sums, positions)
            if self.scalar == ir.FloatType():
                sums = self.builder.fpext(sums, wide)
            place = self.builder.bitcast(self.at(pointer, start), wide.as_pointer())
            self.builder.store(self.builder.fadd(self.builder.load(place, align=8), sums), place, align=8)

    def transpose(self, rows):
        """A vector's length of vectors, as the rows of a square matrix -> those of its columns."""
        positions, distance = ir.VectorType(ir.IntType(32), self.length), 1
        while distance < self.length:  # squares that far apart change places with those across the diagonal
            places, new = range(self.length), list(rows)
            for r in (r for r in places if not r & distance):
                above = [place + (self.length - distance if place & distance else 0) for place in places]
                below = [place + (self.length if place & distance else distance) for place in places]
                for row, taken in ((r, above), (r + distance, below)):
                    new[row] = self.builder.shuffle_vector(rows[r], rows[r + distance], ir.Constant(positions, taken))
            rows, distance = new, 2 * distance
        return rows

    def fold(self, several, join):
        """Vectors become half as many, `join(a, b, first, second)` of two neighbours, until one is left."""
        size = self.length
        while len(several) > 1:
            several = [join(a, b, *self.halves(size)) for a, b in zip(several[::2], several[1::2])]
            size //= 2
        return several[0]

    def add_halves(self, a, b, *halves):
        """What is at the first ones' places of two vectors in a row, plus what is at the second ones'."""
        positions = ir.VectorType(ir.IntType(32), self.length)
        return self.builder.fadd(*(self.builder.shuffle_vector(a, b, ir.Constant(positions, half)) for half in halves))

    def halves(self, size):
        """Places of the first halves, and of the second ones, of all stretches of `size` places of two vectors in a row.

        What is within a quarter of a large register stays there, since that costs less."""
        results = []
        for half in range(2):
            a = [start + half * size // 2 + j for start in range(0, self.length, size) for j in range(size // 2)]
            chunk = len(a) if size > self.quarter else self.quarter // 2
            results.append(
                [
                    place + shift
                    for start in range(0, len(a), chunk)
                    for shift in (0, self.length)
                    for place in a[start : start + chunk]
                ]
            )
        return results

    # ------------------------------------------------------------------------------------------------------------

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


def vector_code(*literals: str, length: int | None = None) -> Callable:
    """Decorator: `write(vectors, *arguments)` writes a function of these arguments that compiled functions can call.

    It is given arrays as pointers and numbers as LLVM's. `vectors` are of the numbers in the first array that is not of bfloat16;
    `vectors.kinds` is a dict from argument to numba's type of it.

    Args:
        literals: arguments that are literals in every call, and given as such numbers of Python's.
        length: of the vectors. Default: a register's.
    """

    def declare(write):
        names = list(inspect.signature(write).parameters)[1:]

        @functools.wraps(write)
        def function(typing, *given):
            kinds = dict(zip(names, given))
            arrays = [name for name, kind in kinds.items() if isinstance(kind, types.Array)]
            dtype = next((kinds[name].dtype for name in arrays if kinds[name].dtype != BFLOAT16), BFLOAT16)
            taken = {
                name: types.float64 if isinstance(kind, types.Float) else types.intp for name, kind in kinds.items()
            }
            taken |= {name: kinds[name] for name in (*arrays, *literals)}

            def generate(context, builder, signature, values):
                vectors = Vectors(context, builder, dtype, length)
                vectors.kinds, arguments = kinds, dict(zip(names, values))
                pointers = vectors.pointers([arguments[name] for name in arrays], [kinds[name] for name in arrays])
                arguments |= zip(arrays, pointers)
                arguments |= {name: kinds[name].literal_value for name in literals}
                write(vectors, **arguments)
                return context.get_dummy_value()

            return types.void(*taken.values()), generate

        return intrinsic(prefer_literal=bool(literals))(function)

    return declare
