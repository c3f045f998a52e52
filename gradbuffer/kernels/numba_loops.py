"""The loops of the coordinatewise LSTM on a CPU, compiled by numba: the arithmetic of `torch_blocks`, faster.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1). As in `torch_blocks`, features lie along rows
and coordinates along columns; here a tile of columns goes through all layers, gates and (in the replay) all steps
within the cache, in one compiled loop, without an operation of torch.

A tile is `LANES` columns wide. What it keeps lies step by step, each step's rows one after the other in a flat array.
Step s of `columns` holds x_s, h⁰_{s-1}, h¹_{s-2}, …, so that what layer l multiplies at time t, the state below and its
own last one, are consecutive rows: of step t + l.

numba compiles at the first call (some seconds) and keeps the result in `__pycache__`. `numba_lstm` calls these.
"""

import math
from typing import NamedTuple

import numpy as np

from gradbuffer.kernels.llvm_blocks import (
    LANES,
    OUTER,
    OUTER_OF_ONE_ROW,
    ROWS,
    STREAM,
    add_outer_blocks,
    add_product_blocks,
    affine_blocks,
    cell_again_units,
    cell_back_units,
    cell_units,
    copy_numbers,
    copy_rows,
    fetch_rows,
    log_sign_row,
)
from gradbuffer.kernels.numba_compiler import compiled, in_order

__all__ = [
    "MORE_TILES",
    "State",
    "Tape",
    "Weights",
    "add_product",
    "affine",
    "load",
    "load_log_sign",
    "run_cell",
    "run_replay",
    "run_step",
    "shared_rows",
    "step_all",
    "store",
]

TILES, MORE_TILES = 4, 16  # that `run_step` loads together; the latter where rows are so long that `FAR` says so
FAR = 4096  # from so many columns on the state is no longer in the cache when the next step comes


class Weights(NamedTuple):
    """Those of the forward pass, see `numba_lstm.NumbaLSTM`. (Such tuples are made within compiled code, where they cost nothing.)"""

    matrices: np.ndarray
    biases: np.ndarray
    output: np.ndarray


class State(NamedTuple):
    """h and c of all layers and coordinates, flat, and how far apart layers, rows and tiles are."""

    hidden: np.ndarray
    cells: np.ndarray
    strides: np.ndarray


class Tape(NamedTuple):
    """See `numba_lstm.GateTape`: the gates that are kept, of so many tiles of each layer, over so many steps."""

    gates: np.ndarray
    shares: np.ndarray
    steps: int


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
        add_product_blocks(4, fours, weight[done * width :], width, count, x, out[done * LANES :])
        done += 4 * fours
    if singles:
        add_product_blocks(1, singles, weight[done * width :], width, count, x, out[done * LANES :])


@compiled
def affine(weight, width, bias, rows, count, x, out):
    """out = weight x + bias, weight put `in_blocks`, else as in `add_product`; rows is a multiple of 4."""
    blocks, fours, _ = shared_rows(rows)
    done = blocks * ROWS
    if blocks:
        affine_blocks(ROWS, blocks, weight, width, bias, count, x, out)
    if fours:
        affine_blocks(4, fours, weight[done * width :], width, bias[done:], count, x, out[done * LANES :])


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
    dinput, row = rest[0, 0, : inputs * LANES], rest[0, 0, inputs * LANES :]
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
def place_on_tape(tape, l, tile, size):
    """Where a tile's gates of layer l begin, which take `size` numbers in each step; -1 where there is no room for them."""
    return (tape.shares[l + 1 :].sum() + tile) * (tape.steps * size) if tile < tape.shares[l] else -1


@compiled
def record(weights, inputs, columns, cells, gates, tanhs, tile, tape, begin, end, again):
    """The forward pass of a tile over its steps begin … end - 1, which are the first ones of columns, cells and gates.

    Of layers for which the tape has room all gates are kept there; of others here, and with `again` only. Then the gates on
    the tape are those that were kept there before.
    """
    layers, rows = weights.biases.shape
    H, width, size = rows // 4, weights.matrices.shape[1] // rows, gates.shape[2]
    for t in range(end - begin):
        for l in range(layers):
            below, above = (inputs + (l - 1) * H, H) if l else (0, inputs)
            own, start = (below + above) * LANES, place_on_tape(tape, l, tile, size)
            gate, keep = (tape.gates[start + (begin + t) * size :], STREAM) if start >= 0 else (gates[l, t], again)
            if start >= 0 and again:
                run_again(H, gate, cells[l, t], cells[l, t + 1], columns[t + l + 1, own:], tanhs[l, t])
            else:
                run_cell(
                    H,
                    weights.matrices[l],
                    width,
                    weights.biases[l],
                    above + H,
                    columns[t + l, below * LANES :],
                    gates[l, t],
                    cells[l, t],
                    cells[l, t + 1],
                    columns[t + l + 1, own:],
                    keep,
                    gate,
                    tanhs[l, t],
                )


@compiled
def load_state(state, inputs, start, width, columns, c):
    """The state before the first step into tiles."""
    layers, H = c.shape[0] // len(columns), c.shape[2] // LANES
    layer, row, tile = state.strides[0], state.strides[1], state.strides[2]
    for l in range(layers):
        first = l * layer + start // LANES * tile
        load(
            state.hidden, first, row, tile, H, width, columns[0, l, (inputs + l * H) * LANES :], LANES, columns[0].size
        )
        load(state.cells, first, row, tile, H, width, c[l, 0], LANES, layers * c[0].size)


@compiled
def load_log_sign(source, first, width, p, out, out_tile):
    """`width` numbers of source, from `first` on, as their log_sign into the first two rows of tiles `out_tile` apart, which
    are filled up with those of 0."""
    least, steepest = math.exp(-p), math.exp(p)
    load(source, first, 0, LANES, 1, width, out[LANES:], 0, out_tile)
    for tile in range(-(-width // LANES)):
        log_sign_row(p, least, steepest, out[tile * out_tile :])


@compiled
def step_all(
    matrices,
    biases,
    output,
    p,
    features,
    offset,
    hidden,
    cells,
    strides,
    start,
    stop,
    update,
    new_hidden,
    new_cells,
    new_strides,
    scratch,
    gates,
    shares,
    step,
    steps,
):
    """`run_step` for Python, which would pay for tuples."""
    run_step(
        Weights(matrices, biases, output),
        p,
        features,
        offset,
        State(hidden, cells, strides),
        start,
        stop,
        update,
        State(new_hidden, new_cells, new_strides),
        scratch,
        Tape(gates, shares, steps),
        step,
    )


@compiled
def run_step(weights, p, features, offset, before, start, stop, update, after, scratch, tape, step):
    """One step of the coordinates start … stop, number `step` of those that the tape is for.

    features (inputs, …) begin at coordinate `offset`; if p is not 0 they are gradients (1, …), of which log_sign makes two. before
    and after: the states. What some tiles need of a row is read, and written, together: of rows that are far apart, more of them.
    """
    layers, inputs, apart = len(weights.matrices), 2 if p > 0 else features.shape[0], before.strides[1]
    tiles, H, output = MORE_TILES if apart >= FAR else TILES, weights.biases.shape[1] // 4, weights.output
    group = tiles * LANES
    columns, c, gates, tanhs, outputs, _, _, _, _ = split_scratch(scratch, tiles, 1, inputs, layers, 4 * H)
    for first in range(start, stop, group):
        width = min(group, stop - first)
        if p > 0:
            load_log_sign(features[0], first - offset, width, p, columns.reshape(-1), columns[0].size)
        else:
            load(
                features.reshape(-1),
                first - offset,
                features.shape[1],
                LANES,
                inputs,
                width,
                columns[0, 0],
                LANES,
                columns[0].size,
            )
        load_state(before, inputs, first, width, columns, c)
        for tile in range(-(-width // LANES)):
            row, last = tile * layers * H // tiles, (tile + 1) * layers * H // tiles
            if apart >= FAR and first + 2 * group <= stop and row < last:  # a share of what the next tiles will read
                fetch_rows(last - row, tiles, before.hidden[row * apart + first + group :], apart)
                fetch_rows(last - row, tiles, before.cells[row * apart + first + group :], apart)
            record(
                weights,
                inputs,
                columns[tile],
                c[tile * layers :],
                gates,
                tanhs,
                first // LANES + tile,
                tape,
                step,
                step + 1,
                0,
            )
            outputs[0] = output[H]
            add_product(output, H, 1, H, columns[tile, layers, (inputs + (layers - 1) * H) * LANES :], outputs[0])
            for j in range(min(LANES, width - tile * LANES)):
                update[first + tile * LANES + j] = outputs[0, j]
        for l in range(layers):
            at = l * after.strides[0] + first // LANES * after.strides[2]
            store(
                columns[0, l + 1, (inputs + l * H) * LANES :],
                columns[0].size,
                H,
                width,
                after.hidden,
                at,
                after.strides[1],
                after.strides[2],
            )
            store(c[l, 1], layers * c[0].size, H, width, after.cells, at, after.strides[1], after.strides[2])


@compiled
def run_replay(
    matrices,
    biases,
    output,
    transposed,
    squash,
    p,
    features,
    offset,
    hidden,
    cells,
    strides,
    adjoint,
    start,
    stop,
    dfeatures,
    dhidden,
    dcells,
    weight_sums,
    bias_sums,
    output_sums,
    scratch,
    kept,
    shares,
    ahead,
):
    """The replay of the coordinates start … stop: adds to the sums.

    features (T, inputs, …), p and the state are as of `run_step`. dfeatures is laid out as features; without columns it is
    not written. dhidden and dcells (layers, H, N) are the adjoints of the state after the last step, and become those of the state
    before the first one; without columns the former are zeros and the latter not written. squash: outputs go through a
    tanh. ahead: fetch what the next tile will read of the tape.
    """
    (steps, N), (layers, rows), (_, given, across) = adjoint.shape, biases.shape, features.shape
    weights, state, tape = Weights(matrices, biases, output), State(hidden, cells, strides), Tape(kept, shares, steps)
    H, inputs = rows // 4, 2 if p > 0 else given
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
                load(
                    features.reshape(-1),
                    u * across + within,
                    inputs * across,
                    LANES,
                    steps,
                    width,
                    columns[0, u * LANES :],
                    columns.shape[1],
                    0,
                )
        load(adjoint.reshape(-1), first, N, LANES, steps, width, pulls.reshape(-1), LANES, 0)
        load_state(state, inputs, first, width, tiles, c)
        if carried:
            for l in range(layers):
                load(dhidden[l].reshape(-1), first, N, LANES, H, width, dh[l], LANES, 0)
                load(dcells[l].reshape(-1), first, N, LANES, H, width, dc[l], LANES, 0)
        else:
            dh[:], dc[:] = 0, 0
        tile = first // LANES
        record(weights, inputs, columns, c, gates, tanhs, tile, tape, 0, steps, 1)
        if squash:
            for t in range(steps):
                squash_adjoint(output, columns[t + layers, top:], pulls[t], z)
        for t in range(steps - 1, -1, -1):
            add_product(output, 1, H, 1, pulls[t], dh[layers - 1])
            for l in range(layers - 1, -1, -1):
                slopes, size = gates[l, t], 4 * H * LANES
                here, coming = place_on_tape(tape, l, tile, size), place_on_tape(tape, l, tile + 1, size)
                if ahead and coming >= 0 and first + LANES < stop:  # it will read them all before there is much to do
                    fetch_rows(4 * H, 1, kept[coming + t * size :], LANES)
                pull_back(
                    H, kept[here + t * size :] if here >= 0 else slopes, c[l, t], tanhs[l, t], dh[l], dc[l], slopes
                )
                if l == 0 and wanted:
                    dinput[:] = 0
                    add_product(transposed[0], 4 * H, inputs, 4 * H, slopes, dinput)
                    store(dinput, 0, inputs, width, dfeatures[t].reshape(-1), within, across, LANES)
                before = H if t > 0 or carried else 0  # rows of the hidden state that is asked for
                dh[l] = 0
                if l > 0:  # the input of this layer is the hidden state of the one below
                    add_product(transposed[l], 4 * H, H + before, 4 * H, slopes, dh[l - 1 :].reshape(-1))
                elif before:
                    add_product(transposed[0, inputs * 4 * H :], 4 * H, H, 4 * H, slopes, dh[0])
        if carried:
            for l in range(layers):
                store(dh[l], 0, H, width, dhidden[l].reshape(-1), first, N, LANES)
                store(dc[l], 0, H, width, dcells[l].reshape(-1), first, N, LANES)
        step = columns.shape[1]
        for l in range(layers):
            below, count = (inputs + (l - 1) * H, 2 * H) if l else (0, inputs + H)
            add_outer_blocks(
                4,
                OUTER,
                H,
                (count + OUTER - 1) // OUTER,
                gates[l].reshape(-1),
                gates.shape[2],
                columns[l:].reshape(-1)[below * LANES :],
                step,
                steps,
                weight_sums[l],
                bias_sums[l],
            )
        add_outer_blocks(
            1,
            OUTER_OF_ONE_ROW,
            1,
            (H + OUTER_OF_ONE_ROW - 1) // OUTER_OF_ONE_ROW,
            pulls.reshape(-1),
            LANES,
            columns[layers:].reshape(-1)[top:],
            step,
            steps,
            output_sums[1:],
            output_sums,
        )


@compiled
def squash_adjoint(output, top, pulls, z):
    """The adjoint of tanh(z) -> that of z = output · h + bias."""
    H = len(output) - 1
    z[:] = output[H]
    add_product(output, H, 1, H, top, z)
    for j in range(LANES):
        pulls[j] *= 1 - math.tanh(z[j]) ** 2
