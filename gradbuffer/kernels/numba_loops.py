"""The loops of the coordinatewise LSTM on a CPU, compiled by numba: the arithmetic of `torch_blocks`, faster.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1). As in `torch_blocks`, features lie along rows
and coordinates along columns; here a tile of columns goes through all layers, gates and (in the replay) all steps
within the cache, in one compiled loop, without an operation of torch.

A tile is `LANES` columns wide. What it keeps lies step by step, each step's rows one after the other in a flat array.
Step s of `columns` holds x_s, h⁰_{s-1}, h¹_{s-2}, …, so that what layer l multiplies at time t, the state below and its
own last one, are consecutive rows: of step t + l.

numba compiles at the first call (some seconds) and keeps the result in `__pycache__`. `numba_lstm` calls these.
"""

import hashlib
import math
from pathlib import Path

import numba

from gradbuffer.kernels.llvm_blocks import (LANES, OUTER, OUTER_OF_ONE_ROW, ROWS, STREAM, add_outer_blocks, add_product_blocks,
                                            affine_blocks, cell_again_units, cell_back_units, cell_units, copy_numbers, copy_rows,
                                            fetch_rows, log_sign_row)

__all__ = ["MORE_TILES", "add_product", "affine", "compiled", "digest", "in_order", "load", "load_log_sign", "run_cell", "run_replay",
           "run_step", "shared_rows", "sources", "store"]

TILES, MORE_TILES = 4, 16  # that `run_step` loads together; the latter where rows are so long that `FAR` says so
FAR = 4096  # from so many columns on the state is no longer in the cache when the next step comes


def sources():
    """The files that compiled code may come from."""
    return sorted(Path(__file__).parent.glob("*.py"))


def digest(files):
    """What tells the contents of files apart."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compiler(*allowed, version=digest(sources())):
    """`numba.njit` that lets LLVM change sums so, and compiles anew when a source has changed.

    numba takes what it has compiled before from `__pycache__` while the function's own file has its date: so the name it is
    kept by says what was in all of them. Nothing is allocated and no references are counted (`_nrt`), which for every slice would
    cost an atomic operation or two.
    """
    def compile(function):
        function.__qualname__ += f"-{version}"
        return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=set(allowed), _nrt=False)(function)

    return compile


# Sums may be taken in another order, which lets them be vectorized; infinities and NaNs go through as usual.
compiled = compiler("contract", "reassoc", "nsz", "arcp")
in_order = compiler("contract", "nsz")  # not in another order: `cell_units` counts on it


@compiled
def shared_rows(rows):
    """rows = ROWS · a + 4 · b + c with as small a c as can be, then b -> a, b, c."""
    for single in range(4):
        for fours in range(ROWS):
            rest = rows - single - 4 * fours
            if rest >= 0 and rest % ROWS == 0:
                return rest // ROWS, fours, single
    return 0, 0, rows


@compiled
def add_product(weight, width, rows, count, x, out):
    """out += weight x, of which weight[r, k] is weight[r · width + k], with `rows` rows and `count` columns."""
    blocks, fours, singles = shared_rows(rows)
    done = blocks * ROWS
    if blocks:
        add_product_blocks(ROWS, blocks, weight, width, count, x, out)
    if fours:
        add_product_blocks(4, fours, weight[done * width:], width, count, x, out[done * LANES:])
        done += 4 * fours
    if singles:
        add_product_blocks(1, singles, weight[done * width:], width, count, x, out[done * LANES:])


@compiled
def affine(weight, width, bias, rows, count, x, out):
    """out = weight x + bias, weight put `in_blocks`, else as in `add_product`; rows is a multiple of 4."""
    blocks, fours, _ = shared_rows(rows)
    done = blocks * ROWS
    if blocks:
        affine_blocks(ROWS, blocks, weight, width, bias, count, x, out)
    if fours:
        affine_blocks(4, fours, weight[done * width:], width, bias[done:], count, x, out[done * LANES:])


@in_order
def run_cell(H, weight, width, bias, count, x, sums, cell, new_cell, hidden, keep, gates, tanhs):
    """`cell_units` for H units, of the sums weight x + bias."""
    affine(weight, width, bias, 4 * H, count, x, sums)
    cell_units(H, sums, cell, new_cell, hidden, keep, gates, tanhs)


@in_order
def run_again(H, gates, cell, new_cell, hidden, tanhs):
    cell_again_units(H, gates, cell, new_cell, hidden, tanhs)


@in_order
def pull_back(H, gates, cell, tanhs, dhidden, dcell, slopes):
    cell_back_units(H, gates, cell, tanhs, dhidden, dcell, slopes)


@compiled
def split_scratch(scratch, tiles, steps, inputs, layers, rows):
    """The arrays of tiles in one buffer: steps of columns, and c, of all tiles; then, once for all, the gates, tanh(c) and
    the adjoint; dh and dc of one step; dinput and another row of one step."""
    H, start = rows // 4 * LANES, 0
    columns, start = part_of(scratch, start, tiles, steps + layers, inputs * LANES + layers * H)
    cells, start = part_of(scratch, start, tiles * layers, steps + 1, H)
    gates, start = part_of(scratch, start, layers, steps, 4 * H)
    tanhs, start = part_of(scratch, start, layers, steps, H)
    adjoint, start = part_of(scratch, start, 1, steps, LANES)
    dhidden, start = part_of(scratch, start, 1, layers, H)
    dcells, start = part_of(scratch, start, 1, layers, H)
    rest, _ = part_of(scratch, start, 1, 1, (inputs + 1) * LANES)
    dinput, row = rest[0, 0, :inputs * LANES], rest[0, 0, inputs * LANES:]
    return columns, cells, gates, tanhs, adjoint[0], dhidden[0], dcells[0], dinput, row


@compiled
def part_of(scratch, start, layers, steps, length):
    """(layers, steps, length) from `start` on, and where it ends."""
    stop = start + layers * steps * length
    return scratch[start:stop].reshape(layers, steps, length), stop


@compiled
def load(source, first, row, tile, rows, width, out, out_row, out_tile):
    """`width` columns of source, from `first` on, into tiles of out, filled up with zeros; rows and tiles are so far apart."""
    whole = width // LANES
    if whole:
        copy_rows(rows, whole, source[first:], row, tile, out, out_row, out_tile)
    if width > whole * LANES:
        for r in range(rows):
            start, at = first + r * row + whole * tile, r * out_row + whole * out_tile
            copy_numbers(width - whole * LANES, source, start, out, at)
            for j in range(width - whole * LANES, LANES):
                out[at + j] = 0


@compiled
def store(source, source_tile, rows, width, out, first, row, tile):
    """The reverse: rows of tiles into `width` columns of out, from `first` on."""
    whole = width // LANES
    if whole:
        copy_rows(rows, whole, source, LANES, source_tile, out[first:], row, tile)
    if width > whole * LANES:
        for r in range(rows):
            start = first + r * row + whole * tile
            copy_numbers(width - whole * LANES, source, whole * source_tile + r * LANES, out, start)


@compiled
def place_on_tape(l, tile, shares, length):
    """Where on the tape a tile's gates of layer l begin, which take `length` numbers; -1 where it has no room for them."""
    return (shares[l + 1:].sum() + tile) * length if tile < shares[l] else -1


@compiled
def record(weights, biases, inputs, columns, cells, gates, tanhs, tile, tape, shares, begin, end, steps, again):
    """The forward pass of a tile over its steps begin … end - 1, which are the first ones of columns, cells and gates.

    Of layers for which the tape has tape all gates are kept there; of others here, and with `again` only. Then the gates on
    the tape are those that were kept there before.
    """
    layers, rows = biases.shape
    H, width, size = rows // 4, weights.shape[1] // rows, gates.shape[2]
    for t in range(end - begin):
        for l in range(layers):
            below, above = (inputs + (l - 1) * H, H) if l else (0, inputs)
            own, start = (below + above) * LANES, place_on_tape(l, tile, shares, steps * size)
            gate, keep = (tape[start + (begin + t) * size:], STREAM) if start >= 0 else (gates[l, t], again)
            if start >= 0 and again:
                run_again(H, gate, cells[l, t], cells[l, t + 1], columns[t + l + 1, own:], tanhs[l, t])
            else:
                run_cell(H, weights[l], width, biases[l], above + H, columns[t + l, below * LANES:], gates[l, t], cells[l, t],
                         cells[l, t + 1], columns[t + l + 1, own:], keep, gate, tanhs[l, t])


@compiled
def load_state(hidden, cells, strides, inputs, start, width, columns, c):
    """The state before the first step into tiles."""
    layers, H = c.shape[0] // len(columns), c.shape[2] // LANES
    for l in range(layers):
        first = l * strides[0] + start // LANES * strides[2]
        load(hidden, first, strides[1], strides[2], H, width, columns[0, l, (inputs + l * H) * LANES:], LANES, columns[0].size)
        load(cells, first, strides[1], strides[2], H, width, c[l, 0], LANES, layers * c[0].size)


@compiled
def load_log_sign(source, first, width, p, out, out_tile):
    """`width` numbers of source, from `first` on, as their log_sign into the first two rows of tiles `out_tile` apart, which
    are filled up with those of 0."""
    least, steepest = math.exp(-p), math.exp(p)
    load(source, first, 0, LANES, 1, width, out[LANES:], 0, out_tile)
    for tile in range(-(-width // LANES)):
        log_sign_row(p, least, steepest, out[tile * out_tile:])


@compiled
def run_step(weights, biases, output, p, features, offset, hidden, cells, strides, start, stop, update, new_hidden, new_cells,
             new_strides, scratch, tape, shares, step, steps):
    """One step of the coordinates start … stop. features (inputs, …) begin at coordinate `offset`; if p is not 0 they are
    gradients (1, …), of which log_sign makes two. tape, shares: see `GateTape`; it is number `step` of its `steps`.

    The state before the step, flat, has the strides `strides`, that after it `new_strides`: so far apart are layers, rows and tiles.
    What some tiles need of a row is read, and written, together: of rows that strides far apart, more of them.
    """
    layers, inputs, tiles = len(weights), 2 if p > 0 else features.shape[0], MORE_TILES if strides[1] >= FAR else TILES
    H, group = biases.shape[1] // 4, tiles * LANES
    columns, c, gates, tanhs, outputs, _, _, _, _ = split_scratch(scratch, tiles, 1, inputs, layers, 4 * H)
    for first in range(start, stop, group):
        width = min(group, stop - first)
        if p > 0:
            load_log_sign(features[0], first - offset, width, p, columns.reshape(-1), columns[0].size)
        else:
            load(features.reshape(-1), first - offset, features.shape[1], LANES, inputs, width, columns[0, 0], LANES,
                 columns[0].size)
        load_state(hidden, cells, strides, inputs, first, width, columns, c)
        for tile in range(-(-width // LANES)):
            row, last = tile * layers * H // tiles, (tile + 1) * layers * H // tiles
            if strides[1] >= FAR and first + 2 * group <= stop and row < last:  # a share of what the next tiles will read
                fetch_rows(last - row, tiles, hidden[row * strides[1] + first + group:], strides[1])
                fetch_rows(last - row, tiles, cells[row * strides[1] + first + group:], strides[1])
            record(weights, biases, inputs, columns[tile], c[tile * layers:], gates, tanhs, first // LANES + tile, tape,
                   shares, step, step + 1, steps, 0)
            outputs[0] = output[H]
            add_product(output, H, 1, H, columns[tile, layers, (inputs + (layers - 1) * H) * LANES:], outputs[0])
            for j in range(min(LANES, width - tile * LANES)):
                update[first + tile * LANES + j] = outputs[0, j]
        for l in range(layers):
            at = l * new_strides[0] + first // LANES * new_strides[2]
            store(columns[0, l + 1, (inputs + l * H) * LANES:], columns[0].size, H, width, new_hidden, at, new_strides[1],
                  new_strides[2])
            store(c[l, 1], layers * c[0].size, H, width, new_cells, at, new_strides[1], new_strides[2])


@compiled
def run_replay(weights, transposed, biases, output, squash, p, features, offset, hidden, cells, strides, adjoint, start, stop,
               dfeatures, dhidden, dcells, weight_sums, bias_sums, output_sums, scratch, tape, shares, ahead):
    """The replay of the coordinates start … stop: adds to the sums.

    features (T, inputs, …), p and the state are as of `run_step`. dfeatures lies like features; without columns it is not
    written.
    dhidden and dcells (layers, H, N) are the adjoints of the state after the last step, and become those of the state
    before the first one; without columns the former are zeros and the latter not written. squash: outputs go through a
    tanh. ahead: fetch what the next tile will read of the tape.
    """
    (steps, N), (layers, rows), (_, given, across) = adjoint.shape, biases.shape, features.shape
    H = rows // 4
    inputs = 2 if p > 0 else given
    wanted, carried = dfeatures.shape[2] > 0, dhidden.shape[2] > 0
    tiles, c, gates, tanhs, pulls, dh, dc, dinput, z = split_scratch(scratch, 1, steps, inputs, layers, 4 * H)
    columns, top = tiles[0], (inputs + (layers - 1) * H) * LANES
    for first in range(start, stop, LANES):
        within, width = first - offset, min(LANES, stop - first)
        if p > 0:
            for t in range(steps):
                load_log_sign(features[t, 0], within, width, p, columns[t], 0)
        else:
            for u in range(inputs):
                load(features.reshape(-1), u * across + within, inputs * across, LANES, steps, width, columns[0, u * LANES:],
                     columns.shape[1], 0)
        load(adjoint.reshape(-1), first, N, LANES, steps, width, pulls.reshape(-1), LANES, 0)
        load_state(hidden, cells, strides, inputs, first, width, tiles, c)
        if carried:
            for l in range(layers):
                load(dhidden[l].reshape(-1), first, N, LANES, H, width, dh[l], LANES, 0)
                load(dcells[l].reshape(-1), first, N, LANES, H, width, dc[l], LANES, 0)
        else:
            dh[:], dc[:] = 0, 0
        tile = first // LANES
        record(weights, biases, inputs, columns, c, gates, tanhs, tile, tape, shares, 0, steps, steps, 1)
        if squash:
            for t in range(steps):
                squash_adjoint(output, columns[t + layers, top:], pulls[t], z)
        for t in range(steps - 1, -1, -1):
            add_product(output, 1, H, 1, pulls[t], dh[layers - 1])
            for l in range(layers - 1, -1, -1):
                slopes, size = gates[l, t], 4 * H * LANES
                here, coming = place_on_tape(l, tile, shares, steps * size), place_on_tape(l, tile + 1, shares, steps * size)
                if ahead and coming >= 0 and first + LANES < stop:  # it will read them all before there is much to do
                    fetch_rows(4 * H, 1, tape[coming + t * size:], LANES)
                pull_back(H, tape[here + t * size:] if here >= 0 else slopes, c[l, t], tanhs[l, t], dh[l], dc[l], slopes)
                if l == 0 and wanted:
                    dinput[:] = 0
                    add_product(transposed[0], 4 * H, inputs, 4 * H, slopes, dinput)
                    store(dinput, 0, inputs, width, dfeatures[t].reshape(-1), within, across, LANES)
                before = H if t > 0 or carried else 0  # rows of the hidden state that is asked for
                dh[l] = 0
                if l > 0:  # the input of this layer is the hidden state of the one below
                    add_product(transposed[l], 4 * H, H + before, 4 * H, slopes, dh[l - 1:].reshape(-1))
                elif before:
                    add_product(transposed[0, inputs * 4 * H:], 4 * H, H, 4 * H, slopes, dh[0])
        if carried:
            for l in range(layers):
                store(dh[l], 0, H, width, dhidden[l].reshape(-1), first, N, LANES)
                store(dc[l], 0, H, width, dcells[l].reshape(-1), first, N, LANES)
        step = columns.shape[1]
        for l in range(layers):
            below, count = (inputs + (l - 1) * H, 2 * H) if l else (0, inputs + H)
            add_outer_blocks(4, OUTER, H, (count + OUTER - 1) // OUTER, gates[l].reshape(-1), gates.shape[2],
                             columns[l:].reshape(-1)[below * LANES:], step, steps, weight_sums[l], bias_sums[l])
        add_outer_blocks(1, OUTER_OF_ONE_ROW, 1, (H + OUTER_OF_ONE_ROW - 1) // OUTER_OF_ONE_ROW, pulls.reshape(-1), LANES,
                         columns[layers:].reshape(-1)[top:], step, steps, output_sums[1:], output_sums)


@compiled
def squash_adjoint(output, top, pulls, z):
    """The adjoint of tanh(z) -> that of z = output · h + bias."""
    H = len(output) - 1
    z[:] = output[H]
    add_product(output, H, 1, H, top, z)
    for j in range(LANES):
        pulls[j] *= 1 - math.tanh(z[j]) ** 2
