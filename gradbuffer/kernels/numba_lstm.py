"""The coordinatewise LSTM on a CPU, compiled by numba: the arithmetic of `torch_blocks`, faster.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1). As in `torch_blocks`, features lie along rows
and coordinates along columns; here a tile of columns goes through all layers, gates and (in the replay) all steps
within the cache, in one compiled loop, without an operation of torch. Tiles are independent: as many run at once as
torch has threads. Beside the arguments and results, memory holds one scratch of fixed size for each thread, and a `Room` of
at most 208 MB.

A tile is `LANES` columns wide. What it keeps lies step by step, each step's rows one after the other in a flat array.
Step s of `columns` holds x_s, h⁰_{s-1}, h¹_{s-2}, …, so that what layer l multiplies at time t, the state below and its
own last one, are consecutive rows: of step t + l.

It holds arithmetic only: no parameters, no checks of what users pass. numba compiles at the first call (some seconds)
and keeps the result in `__pycache__`. `torch_blocks` is the plain version, which this one is tested against.
"""

import functools
import hashlib
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import torch

from gradbuffer.kernels.llvm_blocks import (ALONE, BEYOND, LANES, OUTER, REGISTER, ROWS, add_outer_blocks, add_product_blocks, affine_blocks,
                             cell_again_units, cell_back_units, cell_units, copy_numbers, copy_rows, fetch_rows, log_sign_row)

__all__ = ["DOES_LOG_SIGN", "STEPS_BFLOAT16", "PackedLSTM", "Room", "replay_blocks", "step_back_blocks", "step_blocks",
           "stepper", "take_parts", "threads_here"]


def level_2_cache():
    """Bytes of a core's, as Linux says; a common size where nothing is said."""
    try:
        return max(os.sysconf("SC_LEVEL2_CACHE_SIZE"), 0) or 1 << 20
    except (AttributeError, ValueError, OSError):  # another system
        return 1 << 20


STEP_CHUNK = 1024 * LANES  # columns of which the inputs lie in memory at once; with gradients as they are, there are none
REPLAY_CHUNK = 5120 * LANES  # columns times steps, of which the inputs lie in memory at once
ROOM = 208 << 20  # bytes of a `Room`: all of 20 steps of the paper's network on MNIST
STATES = 48 << 20  # of its state, at most: larger ones lie as they do elsewhere
WORTHWHILE = 0.5  # share of the top layer's tiles for which there must be room: for less it is not taken
TILES, MORE_TILES = 4, 16  # that `run_step` loads together; the latter where rows are so long that `FAR` says so
DOES_LOG_SIGN = "step", "replay"  # of what is below, what takes gradients as they are
STEPS_BFLOAT16 = True  # `step_blocks` takes such a state
CACHE = level_2_cache()
FAR = 4096  # from so many columns on the state is no longer in the cache when the next step comes

# numba takes what it has compiled before from `__pycache__` while the function's own file has its date: so the name it is
# kept by says what was in all of these.
SOURCES = [Path(__file__).with_name(f"{name}.py") for name in ("llvm_vectors", "llvm_blocks", "numba_lstm")]


def digest(files):
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compiler(*allowed, sources=digest(SOURCES)):
    """`numba.njit` that lets LLVM change sums so, and compiles anew when a source has changed.

    Nothing is allocated and no references are counted (`_nrt`), which for every slice would cost an atomic operation or two.
    """
    def compile(function):
        function.__qualname__ += f"-{sources}"
        return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=set(allowed), _nrt=False)(function)

    return compile


# Sums may be taken in another order, which lets them be vectorized; infinities and NaNs go through as usual.
compiled = compiler("contract", "reassoc", "nsz", "arcp")
in_order = compiler("contract", "nsz")  # not in another order: `cell_units` counts on it


class PackedLSTM:
    """The weights of an LSTM and its linear output, laid out for the compiled loops.

    Layer l has one matrix W_l that multiplies [input; hidden]. Its rows are in the order of `llvm_blocks`; `place`
    says where each row of `nn.LSTM`, all units' i, f, g, o, is in it. All layers stand in one array, padded to the widest.
    `weights`, put `in_blocks`, and `biases` are those of the forward pass, scaled so that sigmoid(z) = 1 / (1 + 2^y) of what
    they give: y = -z / ln 2, and for g, y = -2z / ln 2, since tanh(z) is 2 sigmoid(2z) - 1. `transposed` is not scaled.

    Args:
        layers: per layer (weight_ih (4H, in), weight_hh (4H, H), bias (4H,)), in `nn.LSTM`'s order of gates.
        output_weight: (H,), output_bias: () – the output is output_weight · h + output_bias.
    """

    def __init__(self, layers, output_weight, output_bias):
        self.dtype, self.hidden, self.inputs = output_weight.dtype, layers[0][1].shape[1], layers[0][0].shape[1]
        kind, H, most = output_weight.numpy().dtype, self.hidden, self.hidden + max(w.shape[1] for w, _, _ in layers)
        order, self.place = order_of_rows(H)
        weights = np.zeros((len(layers), 4 * H, most), kind)
        for l, (w, u, _) in enumerate(layers):
            weights[l, :, :w.shape[1] + H] = np.concatenate([w.numpy(), u.numpy()], 1)[order]
        scales = (np.repeat([-1, -1, -2, -1], H) / np.log(2))[order]
        self.weights = (scales[:, None] * weights).astype(kind).reshape(len(layers), -1).take(in_blocks(4 * H, most), axis=1)
        self.biases = (scales * np.stack([bias.numpy()[order] for _, _, bias in layers])).astype(kind)
        self.transposed = weights.transpose(0, 2, 1).reshape(len(layers), -1)
        self.output = np.append(output_weight.numpy(), output_bias.numpy()).astype(kind)  # (H + 1,)

    def scratch(self, steps, tiles=1):
        """This thread's buffer for tiles of that many steps: the last one again if it is large enough."""
        layers, H, inputs = len(self.weights), self.hidden, self.inputs
        count = tiles * LANES * ((steps + layers) * (inputs + layers * H) + (6 * steps + 1) * layers * H + steps
                                 + 2 * layers * H + inputs + 1 + ALONE)  # see `carve`; blocks read beyond
        return buffer("scratch", count, self.dtype)

    def zero_sums(self):
        """What `run_replay` adds to, in float64: weights' (in blocks 4 × OUTER), biases'; the output's bias's and weight's."""
        blocks = len(self.weights), self.hidden * -(-self.weights.shape[1] // (4 * self.hidden * OUTER)) * 4 * OUTER
        return np.zeros(blocks), np.zeros(self.biases.shape), np.zeros(1 + -(-self.hidden // ALONE) * ALONE)

    def gradients(self, sums):
        """A list of such sums -> gradients as of `replay_blocks`."""
        blocked, biases, output = (parts[0] if len(parts) == 1 else sum(parts) for parts in zip(*sums))
        layers, H = [], self.hidden
        for l, (values, bias) in enumerate(zip(blocked, biases)):
            width = H if l else self.inputs
            across = -(-(width + H) // OUTER)
            weight = values[:H * across * 4 * OUTER].reshape(H, across, 4, OUTER).transpose(0, 2, 1, 3).reshape(4 * H, -1)
            parts = weight[:, :width], weight[:, width:width + H], bias
            layers.append([self.tensor(part[self.place]) for part in parts])
        return layers, self.tensor(output[1:1 + H]), self.tensor(output[:1])[0]

    def tensor(self, sums):
        return torch.from_numpy(sums.astype(self.weights.dtype))


@functools.cache
def order_of_rows(H):
    """Where each row of `llvm_blocks` is among all units' i, f, g, o; and the inverse of that permutation."""
    order = np.arange(4 * H).reshape(4, H).T.ravel()
    return order, np.argsort(order)


@functools.cache
def in_blocks(rows, width):
    """Where in a flat matrix (rows, width) the numbers are that `affine` takes one after the other: block by block, of each
    column by column."""
    blocks, _, _ = shared_rows(rows)
    parts = zip(np.split(np.arange(rows * width).reshape(rows, width), [blocks * ROWS]), (ROWS, 4))
    return np.concatenate([part.reshape(-1, size, width).swapaxes(1, 2).ravel() for part, size in parts])


# What is compiled ---------------------------------------------------------------------------------------------------

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
def carve(scratch, tiles, steps, inputs, layers, rows):
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
def place_in_room(l, tile, shares, length):
    """Where in the room a tile's gates of layer l begin, which take `length` numbers; -1 where there is no room for them."""
    return (shares[l + 1:].sum() + tile) * length if tile < shares[l] else -1


@compiled
def record(weights, biases, inputs, columns, cells, gates, tanhs, tile, room, shares, begin, end, steps, again):
    """The forward pass of a tile over its steps begin … end - 1, which are the first ones of columns, cells and gates.

    Of layers for which there is room all gates are kept there; of others here, and with `again` only. Then the gates in
    the room are those that were kept there before.
    """
    layers, rows = biases.shape
    H, width, size = rows // 4, weights.shape[1] // rows, gates.shape[2]
    for t in range(end - begin):
        for l in range(layers):
            below, above = (inputs + (l - 1) * H, H) if l else (0, inputs)
            own, start = (below + above) * LANES, place_in_room(l, tile, shares, steps * size)
            gate, keep = (room[start + (begin + t) * size:], BEYOND) if start >= 0 else (gates[l, t], again)
            if start >= 0 and again:
                run_again(H, gate, cells[l, t], cells[l, t + 1], columns[t + l + 1, own:], tanhs[l, t])
            else:
                run_cell(H, weights[l], width, biases[l], above + H, columns[t + l, below * LANES:], gates[l, t], cells[l, t],
                         cells[l, t + 1], columns[t + l + 1, own:], keep, gate, tanhs[l, t])


@compiled
def load_state(hidden, cells, lie, inputs, start, width, columns, c):
    """The state before the first step into tiles."""
    layers, H = c.shape[0] // len(columns), c.shape[2] // LANES
    for l in range(layers):
        first = l * lie[0] + start // LANES * lie[2]
        load(hidden, first, lie[1], lie[2], H, width, columns[0, l, (inputs + l * H) * LANES:], LANES, columns[0].size)
        load(cells, first, lie[1], lie[2], H, width, c[l, 0], LANES, layers * c[0].size)


@compiled
def load_log_sign(source, first, width, p, out, out_tile):
    """`width` numbers of source, from `first` on, as their log_sign into the first two rows of tiles `out_tile` apart, which
    are filled up with those of 0."""
    least, steepest = math.exp(-p), math.exp(p)
    load(source, first, 0, LANES, 1, width, out[LANES:], 0, out_tile)
    for tile in range(-(-width // LANES)):
        log_sign_row(p, least, steepest, out[tile * out_tile:])


@compiled
def run_step(weights, biases, output, p, features, offset, hidden, cells, lie, start, stop, update, new_hidden, new_cells,
             new_lie, scratch, room, shares, step, steps):
    """One step of the coordinates start … stop. features (inputs, …) begin at coordinate `offset`; if p is not 0 they are
    gradients (1, …), of which log_sign makes two. room, shares: see `Room`; it is number `step` of its `steps`.

    The state before the step, flat, lies as `lie` says, that after it as `new_lie`: so far apart are layers, rows and tiles.
    What some tiles need of a row is read, and written, together: of rows that lie far apart, more of them.
    """
    layers, inputs, tiles = len(weights), 2 if p > 0 else features.shape[0], MORE_TILES if lie[1] >= FAR else TILES
    H, group = biases.shape[1] // 4, tiles * LANES
    columns, c, gates, tanhs, outputs, _, _, _, _ = carve(scratch, tiles, 1, inputs, layers, 4 * H)
    for first in range(start, stop, group):
        width = min(group, stop - first)
        if p > 0:
            load_log_sign(features[0], first - offset, width, p, columns.reshape(-1), columns[0].size)
        else:
            load(features.reshape(-1), first - offset, features.shape[1], LANES, inputs, width, columns[0, 0], LANES,
                 columns[0].size)
        load_state(hidden, cells, lie, inputs, first, width, columns, c)
        for tile in range(-(-width // LANES)):
            row, last = tile * layers * H // tiles, (tile + 1) * layers * H // tiles
            if lie[1] >= FAR and first + 2 * group <= stop and row < last:  # a share of what the next tiles will read
                fetch_rows(last - row, tiles, hidden[row * lie[1] + first + group:], lie[1])
                fetch_rows(last - row, tiles, cells[row * lie[1] + first + group:], lie[1])
            record(weights, biases, inputs, columns[tile], c[tile * layers:], gates, tanhs, first // LANES + tile, room,
                   shares, step, step + 1, steps, 0)
            outputs[0] = output[H]
            add_product(output, H, 1, H, columns[tile, layers, (inputs + (layers - 1) * H) * LANES:], outputs[0])
            for j in range(min(LANES, width - tile * LANES)):
                update[first + tile * LANES + j] = outputs[0, j]
        for l in range(layers):
            at = l * new_lie[0] + first // LANES * new_lie[2]
            store(columns[0, l + 1, (inputs + l * H) * LANES:], columns[0].size, H, width, new_hidden, at, new_lie[1],
                  new_lie[2])
            store(c[l, 1], layers * c[0].size, H, width, new_cells, at, new_lie[1], new_lie[2])


@compiled
def run_replay(weights, transposed, biases, output, squash, p, features, offset, hidden, cells, lie, adjoint, start, stop,
               dfeatures, dhidden, dcells, weight_sums, bias_sums, output_sums, scratch, room, shares, ahead):
    """The replay of the coordinates start … stop: adds to the sums.

    features (T, inputs, …), p and the state are as of `run_step`. dfeatures lies like features; without columns it is not
    written.
    dhidden and dcells (layers, H, N) are the adjoints of the state after the last step, and become those of the state
    before the first one; without columns the former are zeros and the latter not written. squash: outputs go through a
    tanh. ahead: fetch what the next tile will read of the room.
    """
    (steps, N), (layers, rows), (_, given, across) = adjoint.shape, biases.shape, features.shape
    H = rows // 4
    inputs = 2 if p > 0 else given
    wanted, carried = dfeatures.shape[2] > 0, dhidden.shape[2] > 0
    tiles, c, gates, tanhs, pulls, dh, dc, dinput, z = carve(scratch, 1, steps, inputs, layers, 4 * H)
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
        load_state(hidden, cells, lie, inputs, first, width, tiles, c)
        if carried:
            for l in range(layers):
                load(dhidden[l].reshape(-1), first, N, LANES, H, width, dh[l], LANES, 0)
                load(dcells[l].reshape(-1), first, N, LANES, H, width, dc[l], LANES, 0)
        else:
            dh[:], dc[:] = 0, 0
        tile = first // LANES
        record(weights, biases, inputs, columns, c, gates, tanhs, tile, room, shares, 0, steps, steps, 1)
        if squash:
            for t in range(steps):
                squash_adjoint(output, columns[t + layers, top:], pulls[t], z)
        for t in range(steps - 1, -1, -1):
            add_product(output, 1, H, 1, pulls[t], dh[layers - 1])
            for l in range(layers - 1, -1, -1):
                slopes, size = gates[l, t], 4 * H * LANES
                here, coming = place_in_room(l, tile, shares, steps * size), place_in_room(l, tile + 1, shares, steps * size)
                if ahead and coming >= 0 and first + LANES < stop:  # it will read them all before there is much to do
                    fetch_rows(4 * H, 1, room[coming + t * size:], LANES)
                pull_back(H, room[here + t * size:] if here >= 0 else slopes, c[l, t], tanhs[l, t], dh[l], dc[l], slopes)
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
        add_outer_blocks(1, ALONE, 1, (H + ALONE - 1) // ALONE, pulls.reshape(-1), LANES,
                         columns[layers:].reshape(-1)[top:], step, steps, output_sums[1:], output_sums)


@compiled
def squash_adjoint(output, top, pulls, z):
    """The adjoint of tanh(z) -> that of z = output · h + bias."""
    H = len(output) - 1
    z[:] = output[H]
    add_product(output, H, 1, H, top, z)
    for j in range(LANES):
        pulls[j] *= 1 - math.tanh(z[j]) ** 2


# What others call ---------------------------------------------------------------------------------------------------

def step_blocks(packed, features, hidden, cells, inplace=False, log_sign=0):
    """One step of the optimizer for all coordinates, without a graph: as `torch_blocks.step_blocks`.

    With `log_sign`, features are gradients (1, width), of which it then does `preprocessing.log_sign` with that p. The state
    may be of bfloat16, each of its numbers then rounded after the step.
    """
    there = inplace and in_rows(hidden, cells)
    new = (hidden, cells) if there else tuple(torch.empty(hidden.shape, dtype=packed.dtype, device="cpu") for _ in range(2))
    update = stepper(packed, hidden, cells, log_sign, new)(features)
    if inplace and not there:
        new = hidden.copy_(new[0]), cells.copy_(new[1])
    return update, *new


class Room:
    """Room for what a window's steps compute and its replay would else compute again, their gates; and for the state between
    steps, tile by tile, since rows that lie far apart are slow to read and write.

    The state comes first, then the gates of as many tiles as fit, the top layer's first, whose products are larger.
    `shares` says for how many tiles of each layer there is room. The memory is kept for the next window, since new memory
    costs as much time as it saves.
    """

    spare = []  # what the last window left, if it is not in use

    def __init__(self, packed, coordinates, steps, with_state=True):
        layers, H, size = len(packed.weights), packed.hidden, packed.weights.itemsize
        self.packed, self.steps, self.shares, tiles = packed, steps, no_room(packed)[1], -(-coordinates // LANES)
        self.lie = np.array([H * LANES, LANES, layers * H * LANES])
        state, gates = 2 * tiles * layers * H * LANES, 4 * steps * H * LANES  # numbers; of a layer of a tile
        state = state if with_state and steps > 1 and state * size <= STATES else 0
        fit = (most_room(rooms_here()) - state * size) // (gates * size)
        if fit >= WORTHWHILE * tiles:
            for l in reversed(range(layers)):
                self.shares[l] = min(tiles, fit - self.shares.sum())
        needed = (state + int(self.shares.sum()) * gates) * size
        try:
            self.memory = Room.spare.pop()
        except IndexError:
            self.memory = aligned(0)
        if len(self.memory) < needed:
            self.memory = None  # not both at once
            self.memory = aligned(needed)
        self.array = self.memory[:needed].view(packed.weights.dtype)
        self.state, self.array = self.array[:state].reshape(2, state // 2), self.array[state:]

    def leave(self):
        """The next window may have the memory."""
        Room.spare[rooms_here() - 1:] = [self.memory]
        self.memory = self.array = self.state = None


def take_parts(work, packed, functions, size, steps):
    """[work(first, last), ...] over parts of some functions of `size` coordinates each, which do not read each other. Work is
    their windows of so many steps and the replays of these.

    As many functions go together as there is room for, if there is for one. With several threads each part is one thread's
    alone; without enough functions for that, all go together.
    """
    layers, H, number, many = len(packed.weights), packed.hidden, packed.weights.itemsize, threads_here()
    gates, state, room = 4 * steps * H * number, 2 * layers * H * number, most_room(many)  # of a coordinate; of one layer
    at_once = room // (layers * gates + state) // size or int(room >= (state + WORTHWHILE * gates) * size) or functions
    parts = -(-functions // at_once)
    turns = -(-parts // many)
    if parts > 1:
        parts = min(turns * many, functions)
    if parts < 0.75 * turns * many:  # too many threads would have nothing to do
        parts = 1
    return each_of(work, [(functions * k // parts, functions * (k + 1) // parts) for k in range(parts)], alone=True)


def rooms_here():
    """How many windows run at once, each with a room of its own."""
    return torch.get_num_threads() if getattr(_thread, "alone", False) else 1


def most_room(rooms):
    """Bytes of a `Room`, at most, where there are so many."""
    return min(ROOM, 4 * ROOM // rooms)


def aligned(size):
    """Bytes, the first at a multiple of what a vector takes."""
    memory = np.empty(size + REGISTER, np.uint8)
    start = -memory.ctypes.data % REGISTER
    return memory[start:start + size]


def no_room(packed):
    return np.empty(0, packed.weights.dtype), np.zeros(len(packed.weights), np.int64)


def as_it_lies(hidden, cells):
    """What compiled functions are told of a state (layers, H, N), as arrays in one piece."""
    return hidden.reshape(-1), cells.reshape(-1), np.array([hidden[0].size, hidden.shape[2], LANES])


def in_rows(*parts):
    """Whether a state's tensors (layers, H, N) are those of whole ones, or of the same stretch of their coordinates."""
    strides = parts[0].stride()
    return strides[2] == 1 and strides[0] == parts[0].shape[1] * strides[1] and all(part.stride() == strides for part in parts)


def in_place(hidden, cells):
    """`as_it_lies` for tensors, of the memory itself where that is `in_rows`."""
    if not in_rows(hidden, cells):
        return as_it_lies(array(hidden), array(cells))
    layer, row, _ = hidden.stride()
    size = (len(hidden) - 1) * layer + (hidden.shape[1] - 1) * row + hidden.shape[2]
    flat = (array(part.as_strided((size,), (1,))) for part in (hidden, cells))
    return *flat, np.array([layer, row, LANES])


def stepper(packed, hidden, cells, log_sign=0, new=None, room=None):
    """A function that does `step_blocks` for features (start, stop) -> (inputs, width), and returns the update (N,), which
    its next call overwrites.

    The first step reads that state, and each writes the next one to `new`, hidden and cells like those given; without it
    over those. With a `Room`, no more steps than it has room for, and `new` is complete after the last of them.
    """
    N, inputs = hidden.shape[2], (packed.weights, packed.biases, packed.output)
    before, end = in_place(hidden, cells), in_place(*(new or (hidden, cells)))
    between = (*room.state, room.lie) if room and room.state.size else end
    kept, shares = (room.array, room.shares) if room else no_room(packed)
    update, steps, done = torch.empty(N, dtype=packed.dtype, device="cpu"), room.steps if room else 1, 0
    out = update.numpy()

    def step(features):
        nonlocal before, done
        if room and done == steps:
            raise RuntimeError(f"there is room for {steps} steps only")
        after = end if done == steps - 1 else between

        def work(start, stop):
            run_step(*inputs, float(log_sign), array(features(start, stop)), start, *before, start, stop, out, *after,
                     packed.scratch(1, MORE_TILES), kept, shares, done, steps)

        side_by_side(work, N, N if log_sign else STEP_CHUNK)
        before, done = after, done + 1 if room else 0
        return update

    return step


def replay_blocks(packed, features, hidden, cells, adjoint, squash=False, pulled=None, log_sign=0, room=None):
    """Gradient of Σ_t ⟨adjoint_t, output_t⟩ with respect to the packed weights: as `torch_blocks.replay_blocks`.

    log_sign: as of `step_blocks`; not with `pulled`. room: where the steps that led to this have kept their gates; what is
    there is used up.
    """
    kept = (room.array, room.shares) if room else no_room(packed)
    before, N = (*as_it_lies(array(hidden), array(cells)), array(adjoint)), adjoint.shape[1]
    none = np.empty((1, 1, 0), packed.weights.dtype)
    next_tile = kept[1].astype(bool).sum() * len(adjoint) * 4 * packed.hidden * LANES * packed.weights.itemsize

    def work(start, stop):
        inputs, sums, scratch = features(start, stop), packed.zero_sums(), packed.scratch(len(adjoint))
        dfeatures = torch.empty(inputs.shape if pulled else (1, 1, 0), dtype=packed.dtype, device="cpu")
        ahead = 2 * (scratch.nbytes + next_tile) <= CACHE
        run_replay(packed.weights, packed.transposed, packed.biases, packed.output, squash, float(log_sign), array(inputs),
                   start, *before, start, stop, array(dfeatures), none, none, *sums, scratch, *kept, ahead)
        if pulled:
            pulled(start, stop, dfeatures)
        return sums

    return packed.gradients(side_by_side(work, N, max(REPLAY_CHUNK // len(adjoint), LANES)))


def step_back_blocks(packed, features, hidden, cells, adjoint, dhidden, dcells, squash=False):
    """Backpropagation through one step for all coordinates: as `torch_blocks.step_back_blocks`."""
    dfeatures, N = torch.empty(features.shape, dtype=packed.dtype, device="cpu"), features.shape[1]
    before = array(features[None]), *as_it_lies(array(hidden), array(cells)), array(adjoint[None])
    adjoints = array(dhidden), array(dcells)

    def work(start, stop):
        sums = packed.zero_sums()
        run_replay(packed.weights, packed.transposed, packed.biases, packed.output, squash, 0.0, before[0], 0, *before[1:],
                   start, stop, array(dfeatures[None]), *adjoints, *sums, packed.scratch(1), *no_room(packed), False)
        return sums

    gradients = packed.gradients(side_by_side(work, N, REPLAY_CHUNK))
    for tensor, adjoint in zip((dhidden, dcells), adjoints):
        if not tensor.is_contiguous():  # then its array was a copy
            tensor.copy_(torch.from_numpy(adjoint))
    return dfeatures, *gradients


def buffer(name, count, dtype):
    """This thread's memory of that name as an array: the last one again if it is large enough."""
    kept = _thread.__dict__.get(name)
    if kept is None or len(kept) < count or kept.dtype != dtype:
        _thread.__dict__[name] = kept = torch.empty(count, dtype=dtype, device="cpu")  # aligned, as vectors like it
    return kept[:count].numpy()


def array(tensor):
    """A numpy array of the same memory, or a copy if that is not in one piece. bfloat16 as int16."""
    tensor = (tensor.detach() if tensor.requires_grad else tensor).contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# Threads ------------------------------------------------------------------------------------------------------------

_thread = threading.local()  # each thread's buffers
_pool = (None, 0, None)  # process, threads, executor


def side_by_side(work, length, most):
    """[work(start, stop), ...] over [0, length) in pieces of at most `most`, by as many threads as torch has."""
    if length <= 8 * LANES:
        return [work(0, length)]
    threads = threads_here()
    pieces = max(-(-length // most), min(threads, length // (8 * LANES)), 1)
    pieces = -(-pieces // threads) * threads if pieces > 1 else 1  # so many for each thread
    size = -(-length // (pieces * LANES)) * LANES  # whole tiles
    return each_of(work, [(start, min(start + size, length)) for start in range(0, length, size)])


def shared_out(work, count):
    """[work(first, last), ...] over as many equal shares of `count` as torch has threads."""
    threads = min(threads_here(), count)
    return each_of(work, [(count * k // threads, count * (k + 1) // threads) for k in range(threads)])


def each_of(work, spans, alone=False):
    """[work(*span) for span in spans], side by side. alone: what they call is not to take more threads."""
    threads = threads_here()
    if len(spans) == 1 or threads == 1:
        return [work(*span) for span in spans]

    @torch.no_grad()
    def one(span):
        _thread.alone = alone
        try:
            return work(*span)
        finally:
            _thread.alone = False

    return list(pool(threads).map(one, spans))


def threads_here():
    """How many threads the work of this one may take."""
    return 1 if getattr(_thread, "alone", False) else torch.get_num_threads()


def pool(threads):
    """The threads, kept from call to call; new ones in a process that was forked, which has inherited none."""
    global _pool
    if _pool[:2] != (os.getpid(), threads):
        _pool = os.getpid(), threads, ThreadPoolExecutor(threads, thread_name_prefix="gradbuffer.kernels.numba_lstm")
    return _pool[2]
