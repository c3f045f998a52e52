"""Newton-Schulz iterations of many matrices at once on CUDA, three launches an iteration for all of them.

The plain version is `gradbuffer.nets.mlp.orthogonalize_matrices`. Matrices lie in padded places, at least as wide as high, with zeros
around them, so that programs read whole tiles. An iteration is X ← a X + (b G + c G²) X with G = X Xᵀ. X keeps the weights' dtype.
The factors of products may be rounded to float16, which has as many digits as TF32 and is twice as fast: entries of X, G and G² are of
the order of 1 at most. This module needs triton.
"""

import torch
import triton
import triton.language as tl

from gradbuffer.devices import bring
from gradbuffer.kernels.matrices import ITERATIONS, NEWTON_SCHULZ

__all__ = ["Orthogonalizer", "padded_sizes"]

HIGH, WIDE = 64, 128  # sizes of a tile, to which places are padded
DEEP = {torch.float16: 64, torch.float32: 32, torch.float64: 16}  # terms of a product at once
WARPS = 4
STAGES = {torch.float16: 3, torch.float32: 3, torch.float64: 2}  # of loads on their way
FORM_SIZE = tl.constexpr(4)  # of `forms`: rows, width, where the matrix begins, and where its square ones do


@triton.jit
def tile_of(tiles, forms):
    """The program's matrix: rows, width, where it and its square ones begin; and the tile's first row and column. All are multiples
    of 64, so loads are of 16 bytes."""
    row = tiles + 3 * tl.program_id(0)
    form = forms + tl.load(row) * FORM_SIZE
    rows, width = tl.multiple_of(tl.load(form).to(tl.int32), 64), tl.multiple_of(tl.load(form + 1).to(tl.int32), 64)
    start, square = tl.multiple_of(tl.load(form + 2), 64), tl.multiple_of(tl.load(form + 3), 64)
    first, left = tl.multiple_of(tl.load(row + 1).to(tl.int32), 64), tl.multiple_of(tl.load(row + 2).to(tl.int32), 64)
    return rows, width, start, square, first, left


@triton.jit
def at(first, ROWS: tl.constexpr, left, COLUMNS: tl.constexpr, apart):
    """Offsets of (ROWS, COLUMNS) of a matrix with rows so far apart."""
    begin = first.to(tl.int64) * apart + left  # a large matrix is not counted in 32 bits
    return begin + tl.arange(0, ROWS)[:, None] * apart + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def scale_kernel(tiles, forms, owners, totals, x, factors, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """X over its norm, and its copy for the products. owners: the tensors of the matrices; totals: of tensors, sums of squares."""
    rows, width, start, square, first, left = tile_of(tiles, forms)
    scale = 1 / (tl.sqrt(tl.load(totals + tl.load(owners + tl.load(tiles + 3 * tl.program_id(0))))) + 1e-7)
    place = at(first, HIGH, left, WIDE, width)
    value = scale * tl.load(x + start + place)
    tl.store(x + start + place, value)
    tl.store(factors + start + place, value.to(factors.dtype.element_ty))


@triton.jit
def gram_kernel(tiles, forms, x, factors, grams, HIGH: tl.constexpr, DEEP: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of G = X Xᵀ and its mirror image."""
    rows, width, start, square, first, left = tile_of(tiles, forms)
    total = tl.zeros([HIGH, HIGH], dtype=x.dtype.element_ty)
    one, other = factors + start + at(first, HIGH, 0, DEEP, width), factors + start + at(left, HIGH, 0, DEEP, width)
    for k in range(0, width, DEEP):
        a, b = tl.load(one + k), tl.load(other + k)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION, out_dtype=total.dtype)
    found = total.to(grams.dtype.element_ty)
    tl.store(grams + square + at(first, HIGH, left, HIGH, rows), found)
    tl.store(grams + square + at(left, HIGH, first, HIGH, rows), tl.trans(found))


@triton.jit
def power_kernel(
    tiles,
    forms,
    x,
    grams,
    powers,
    HIGH: tl.constexpr,
    DEEP: tl.constexpr,
    THIRD: tl.constexpr,
    FIFTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of b G + c G² and its mirror image."""
    rows, width, start, square, first, left = tile_of(tiles, forms)
    total = tl.zeros([HIGH, HIGH], dtype=x.dtype.element_ty)
    one, other = grams + square + at(first, HIGH, 0, DEEP, rows), grams + square + at(left, HIGH, 0, DEEP, rows)
    for k in range(0, rows, DEEP):
        a, b = tl.load(one + k), tl.load(other + k)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION, out_dtype=total.dtype)
    gram = tl.load(grams + square + at(first, HIGH, left, HIGH, rows)).to(total.dtype)
    found = (gram * THIRD + total * FIFTH).to(powers.dtype.element_ty)
    tl.store(powers + square + at(first, HIGH, left, HIGH, rows), found)
    tl.store(powers + square + at(left, HIGH, first, HIGH, rows), tl.trans(found))


@triton.jit
def apply_kernel(
    tiles,
    forms,
    x,
    factors,
    powers,
    next_factors,
    squares,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of a X + (b G + c G²) X, written over X's, with its copy for the next products and the sum of its squares."""
    rows, width, start, square, first, left = tile_of(tiles, forms)
    total = tl.zeros([HIGH, WIDE], dtype=x.dtype.element_ty)
    power, factor = (
        powers + square + at(first, HIGH, 0, DEEP, rows),
        factors + start + at(first * 0, DEEP, left, WIDE, width),
    )
    for k in range(0, rows, DEEP):
        a, b = tl.load(power + k), tl.load(factor)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
        factor += DEEP * width
    place = at(first, HIGH, left, WIDE, width)
    total += tl.load(x + start + place) * FIRST
    tl.store(x + start + place, total)
    tl.store(next_factors + start + place, total.to(next_factors.dtype.element_ty))
    tl.store(squares + tl.program_id(0), tl.sum(total * total))


INTERPRETED = not isinstance(gram_kernel, triton.JITFunction)


def padded_sizes(rows, width):
    """The sizes of the place of a matrix (rows, width), turned if it is higher than wide."""
    short, long = min(rows, width), max(rows, width)
    return -(-short // HIGH) * HIGH, -(-long // WIDE) * WIDE


class Orthogonalizer:
    """Newton-Schulz of some matrices in one piece of memory.

    Args:
        places: list of (number of the tensor, rows, width, where it begins), the sizes as of `padded_sizes`.
        dtype: of the matrices. factors: the dtype to which the factors of products are rounded, float16 or `dtype`.
        device: where they are.
    """

    def __init__(self, places, dtype, factors, device):
        self.dtype, self.factors, self.device = dtype, factors, device
        places = sorted(places, key=lambda place: -place[1] * place[2])  # the longest programs first
        forms, squares, tiles, self.spans, begin = [], [], [], [], 0
        for number, (tensor, rows, width, start) in enumerate(places):
            forms.append((rows, width, start, begin))
            begin += rows * rows
            squares += [(number, i, j) for i in range(0, rows, HIGH) for j in range(i, rows, HIGH)]
            own = [(number, i, j) for j in range(0, width, WIDE) for i in range(0, rows, HIGH)]
            self.spans.append((tensor, len(tiles), len(own)))
            tiles += own
        self.room, self.count = begin, len(tiles)  # numbers of all square matrices; tiles
        brought = [torch.tensor(own, dtype=torch.int64, device="cpu") for own in (forms, squares, tiles)]
        self.forms, self.square_tiles, self.tiles = (bring(own, device) for own in brought)
        owners = torch.tensor([place[0] for place in places], device="cpu")
        self.owners = bring(owners, device)
        precise = dtype == torch.float64 or INTERPRETED or torch.version.hip or factors == torch.float16
        self.options = dict(
            DEEP=DEEP[factors], PRECISION="ieee" if precise else "tf32x3", num_stages=STAGES[factors], num_warps=WARPS
        )

    def run(self, x, totals):
        """Write over the matrices in x, of which `totals` are the sums of squares, by tensor; 16 launches.

        Returns:
            the sums of squares of the tiles of the results, to be added up by `spans`.
        """
        first, third, fifth = NEWTON_SCHULZ
        new = dict(device=self.device, dtype=self.factors)
        one, other = torch.empty(x.numel(), **new), torch.empty(x.numel(), **new)
        grams, powers = torch.empty(self.room, **new), torch.empty(self.room, **new)
        squares = torch.empty(self.count, device=self.device, dtype=self.dtype)
        scale_kernel[(self.count,)](self.tiles, self.forms, self.owners, totals, x, one, HIGH=HIGH, WIDE=WIDE)
        for _ in range(ITERATIONS):
            gram_kernel[(len(self.square_tiles),)](
                self.square_tiles, self.forms, x, one, grams, HIGH=HIGH, **self.options
            )
            power_kernel[(len(self.square_tiles),)](
                self.square_tiles, self.forms, x, grams, powers, HIGH=HIGH, THIRD=third, FIFTH=fifth, **self.options
            )
            apply_kernel[(self.count,)](
                self.tiles,
                self.forms,
                x,
                one,
                powers,
                other,
                squares,
                HIGH=HIGH,
                WIDE=WIDE,
                FIRST=first,
                **self.options,
            )
            one, other = other, one
        return squares
