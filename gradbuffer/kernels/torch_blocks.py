"""The coordinatewise LSTM in plain torch, on a CPU in blocks of coordinates that stay in cache.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1) is one small LSTM that every coordinate of
the optimizee runs by itself. Here features lie along rows and coordinates along columns, so each gate is one
contiguous band of rows and the products are a few wide matrix products; a block of columns goes through all layers
(and, in the replay, all steps) before the next one starts, and torch's own threads share each operation. No autograd
graph is recorded: `TorchLSTM.replay` carries its own backward pass, tested against `nn.LSTM` under autograd.
"""

import threading

import torch

from gradbuffer.devices import memory_of
from gradbuffer.kernels.interface import LSTMKernels

__all__ = ["PackedWeights", "TorchLSTM", "gates_to_ifog"]

STEP_BLOCK = 4096  # coordinates in a block of one forward step, on a CPU
STEP_BACK_BLOCK = 4096  # and of one backward step
MEMORY = 32  # the part of another device's memory that a block's scratch takes there at most
REPLAY_BLOCK = (256, 2048)  # bounds on the coordinates in a block of the replay
REPLAY_BYTES = 48 << 20  # what the activations of one block of the replay should take, between those bounds


class PackedWeights:
    """One matrix W_l (4H, in_l + H + 1) for each layer of an `nn.LSTM`, that multiplies [input; hidden; 1].

    Its gates stand in the order i, f, o, g (torch's own is i, f, g, o), which makes the three sigmoids one band.
    """

    def __init__(self, layers):
        """layers: of each (weight_ih (4H, in), weight_hh (4H, H), bias (4H,))."""
        self.hidden, self.inputs = layers[0][1].shape[1], [weight.shape[1] for weight, _, _ in layers]
        self.weights = [gates_to_ifog(torch.cat([w, u, b[:, None]], 1)) for w, u, b in layers]

    def gradients(self, weights, output_weight, output_bias):
        """Gradients of the matrices W_l, of output_weight and of output_bias -> as `LSTMKernels.replay` returns them."""
        layers = []
        for weight, inputs in zip(weights, self.inputs):
            w, u, bias = gates_to_ifog(weight).split([inputs, self.hidden, 1], 1)
            layers.append((w, u, bias[:, 0]))
        return layers, output_weight.clone(), output_bias


class TorchLSTM(LSTMKernels):
    """The kernels in plain torch.

    `forward_weights` holds W_l with the rows of g doubled, since tanh(z) = 2 sigmoid(2z) - 1 lets one call of sigmoid serve all
    four gates and takes a fifth of the time of torch's tanh.
    """

    @classmethod
    def reasons_against(cls, weight, work, **needs):
        reasons = super().reasons_against(weight, work, **needs)
        if weight.device.type != "cpu" and work != "step":
            reasons.append("away from the CPU autograd launches fewer operations")
        return reasons

    def __init__(self, lstm, output_weight, output_bias):
        super().__init__(lstm, output_weight, output_bias)
        self.packed = PackedWeights(self.layer_weights())
        self.weights, self.widths = self.packed.weights, self.packed.inputs
        self.forward_weights = [w.clone() for w in self.weights]
        for w in self.forward_weights:
            w[3 * self.hidden :].mul_(2)
        self.backward_weights = [w[:, :-1].t().contiguous() for w in self.weights]  # without the bias' column
        self.one, self.minus_one = output_weight.new_ones(()), output_weight.new_full((), -1.0)

    def step(self, features, hidden, cells, inplace=False, p=0.0):
        H, N = hidden.shape[1:]
        update = hidden.new_empty(N)
        new_hidden, new_cells = (hidden, cells) if inplace else (torch.empty_like(hidden), torch.empty_like(cells))
        states = [tensor.unbind() for tensor in (hidden, cells, new_hidden, new_cells)]
        rows = (4 * H, H, *(weight.shape[1] for weight in self.weights))  # gates, tanh(c), each layer's [input; h; 1]
        most = step_width(self, rows, STEP_BLOCK, N)
        scratch = scratch_for(self, "step", rows, most)
        for start, stop in blocks(N, most):
            gates, tanh_cell, *columns = bands(scratch, rows, stop - start)
            below = features(start, stop)
            for weight, column, *layer in zip(self.forward_weights, columns, *states):
                h, c, new_h, new_c = [state[:, start:stop] for state in layer]
                torch.cat([below, h, self.one.expand(1, stop - start)], out=column)
                Cell(column, gates, c, new_c, tanh_cell, new_h).run(weight, self.minus_one)
                below = new_h
            torch.mv(below.t(), self.output_weight, out=update[start:stop])
        return update.add_(self.output_bias), new_hidden, new_cells

    def step_back(self, features, hidden, cells, adjoint, dhidden, dcells, squash=False):
        H, N, layers = self.hidden, hidden.shape[2], range(len(self.widths))
        dfeatures, weight_grads = torch.empty_like(features), [torch.zeros_like(weight) for weight in self.weights]
        output_grad, bias_grad = torch.zeros_like(self.output_weight), torch.zeros_like(self.output_bias)
        # of each layer: [input; h; 1], gates, c', tanh(c'), h', and the derivative by [input; h]; then of the gates, twice
        rows = [count for weight in self.weights for count in (weight.shape[1], 4 * H, H, H, H, weight.shape[1] - 1)]
        rows += [4 * H, 4 * H]
        most = step_width(self, rows, STEP_BACK_BLOCK, N)
        scratch = scratch_for(self, "step back", rows, most)
        for start, stop in blocks(N, most):
            *own, dgates, slope = bands(scratch, rows, stop - start)
            below, run, into = features[:, start:stop], [], GateGradients(self, dgates, slope)
            for l in layers:
                column, gates, new_cell, tanh_cell, new_hidden, dcolumn = own[6 * l : 6 * l + 6]
                torch.cat([below, hidden[l, :, start:stop], self.one.expand(1, stop - start)], out=column)
                cell = Cell(column, gates, cells[l, :, start:stop], new_cell, tanh_cell, new_hidden)
                cell.run(self.forward_weights[l], self.minus_one)
                run.append((cell, dcolumn))
                below = new_hidden
            pull = adjoint[start:stop]
            if squash:
                pull = pull * self.slopes(torch.mv(below.t(), self.output_weight).add_(self.output_bias))
            output_grad.addmv_(below, pull)
            bias_grad += pull.sum()
            dhidden[-1, :, start:stop].addr_(self.output_weight, pull)
            for l in reversed(layers):
                (cell, dcolumn), dh = run[l], dhidden[l, :, start:stop]
                cell.pull_back(dh, dcells[l, :, start:stop], into)
                weight_grads[l].addmm_(dgates, cell.column.t())
                dbelow, dh_before = torch.mm(self.backward_weights[l], dgates, out=dcolumn).split([self.widths[l], H])
                dh.copy_(dh_before)
                if l:  # the input of this layer is the hidden state of the one below
                    dhidden[l - 1, :, start:stop].add_(dbelow)
                else:
                    dfeatures[:, start:stop] = dbelow
        return dfeatures, *self.packed.gradients(weight_grads, output_grad, bias_grad)

    def replay(self, features, hidden, cells, adjoint, squash=False, pull_inputs=None, p=0.0, tape=None):
        T, N = adjoint.shape
        spans = blocks(N, replay_width(self, T))
        block = activations_for(self, T, spans[0][1])
        for start, stop in spans:
            inputs = features(start, stop)
            block.load(inputs, hidden[:, :, start:stop], cells[:, :, start:stop], adjoint[:, start:stop])
            block.record()
            if squash:
                outputs = torch.einsum("h,thn->tn", self.output_weight, block.top) + self.output_bias
                block.adjoint *= self.slopes(outputs)
            dfeatures = inputs.new_empty(*inputs.shape[:2], block.adjoint.shape[1]) if pull_inputs else None
            block.backward(dfeatures)
            if pull_inputs:
                pull_inputs(start, stop, dfeatures[..., : stop - start])
        return self.packed.gradients(block.weight_grads, block.output_grad, block.bias_grad.clone())

    def slopes(self, outputs):
        """The derivative of tanh at the outputs."""
        return 1 - outputs.tanh().square()


def gates_to_ifog(rows):
    """(4H, ...) in torch's order i, f, g, o -> i, f, o, g. The permutation is its own inverse."""
    i, f, g, o = rows.chunk(4)
    return torch.cat([i, f, o, g])


class Cell:
    """Views of the buffers that one LSTM cell reads and writes for one block of coordinates, taken once and used often.

    Taking a view costs as much as a small product, so the loops below take none.

    Args:
        column: [input; h; 1], (in + H + 1, w), read.
        gates: (4H, w); cell_in, cell_out, tanh_cell, hidden_out: (H, w).
    """

    def __init__(self, column, gates, cell_in, cell_out, tanh_cell, hidden_out):
        H = cell_in.shape[0]
        self.column, self.gates, self.sigmoids = column, gates, gates[: 3 * H]
        self.i, self.f, self.o, self.g = gates.split(H)
        self.cell_in, self.cell_out, self.tanh_cell, self.hidden_out = cell_in, cell_out, tanh_cell, hidden_out

    def run(self, weight, minus_one):
        """c' = f·c + i·g,  h' = o·tanh(c'), in place."""
        torch.mm(weight, self.column, out=self.gates).sigmoid_()
        torch.add(minus_one, self.g, alpha=2, out=self.g)
        torch.mul(self.f, self.cell_in, out=self.cell_out).addcmul_(self.i, self.g)
        torch.mul(self.cell_out, 2, out=self.tanh_cell).sigmoid_()
        torch.add(minus_one, self.tanh_cell, alpha=2, out=self.tanh_cell)
        torch.mul(self.o, self.tanh_cell, out=self.hidden_out)

    def pull_back(self, dhidden, dcell, into):
        """Backpropagate: reads dL/dh', turns dL/dc' into dL/dc in place, leaves dL/d(gates before activation)."""
        tanh_cell, one = self.tanh_cell, into.one
        # slopes: s(1 - s) for the three sigmoids, 1 - g² for the candidate
        torch.addcmul(self.sigmoids, self.sigmoids, self.sigmoids, value=-1, out=into.slope_sigmoids)
        torch.addcmul(one, self.g, self.g, value=-1, out=into.slope_g)
        # dc += dh · o · (1 - tanh²(c)), with dg and di as scratch
        torch.addcmul(one, tanh_cell, tanh_cell, value=-1, out=into.g)
        torch.mul(dhidden, self.o, out=into.i)
        dcell.addcmul_(into.i, into.g)
        torch.mul(dcell, self.g, out=into.i)
        torch.mul(dcell, self.cell_in, out=into.f)
        torch.mul(dhidden, tanh_cell, out=into.o)
        torch.mul(dcell, self.i, out=into.g)
        into.gates.mul_(into.slope)
        dcell.mul_(self.f)


class GateGradients:
    """Buffers (4H, w) for the derivative by the gates before activation and for their slopes, with views of their bands."""

    def __init__(self, packed, gates, slope):
        H = packed.hidden
        self.gates, self.slope, self.one = gates, slope, packed.one
        self.i, self.f, self.o, self.g = self.gates.split(H)
        self.slope_sigmoids, self.slope_g = self.slope[: 3 * H], self.slope[3 * H :]


class Last(threading.local):
    """What this thread used last: fresh memory costs as much as the arithmetic on it."""

    key = activations = None

    def __init__(self):
        self.scratch = {}


_last = Last()


def scratch_for(packed, purpose, rows, width):
    """Buffers of rows × width, one for each number of rows, the same ones again if nothing has changed since."""
    key, scratch = (tuple(rows), packed.one.dtype, width), _last.scratch
    if packed.one.device.type == "cpu" and scratch.get(purpose, (None,))[0] == key:
        return scratch[purpose][1]
    with torch.inference_mode(False):  # what is made in that mode cannot be written to outside it
        buffers = [packed.one.new_empty(count * width) for count in rows]
    if packed.one.device.type == "cpu":  # elsewhere, two streams could meet in it
        _last.scratch = {**scratch, purpose: (key, buffers)}
    return buffers


def bands(buffers, rows, width):
    """A matrix (rows, width) in each of the buffers, for one block of coordinates."""
    return [buffer[: count * width].view(count, width) for count, buffer in zip(rows, buffers)]


def activations_for(packed, steps, width):
    """`Activations` of that size with their sums at 0: the last one again if it fits, else a new one."""
    key = packed.widths, packed.hidden, packed.output_weight.dtype, steps, width
    if _last.key != key:
        _last.activations = None  # free the old one first
        with torch.inference_mode(False):  # as in `scratch_for`
            _last.key, _last.activations = key, Activations(packed, steps, width)
    kept = _last.activations
    kept.packed = packed
    for total in (*kept.weight_grads, kept.output_grad, kept.bias_grad):
        total.zero_()
    return kept


def blocks(length, most):
    """[(start, stop), ...] covering [0, length) in pieces of one size (the last may be smaller), at most `most`."""
    size = -(-length // -(-length // most))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def step_width(packed, rows, most, N):
    """Coordinates in a block whose scratch has so many rows: `most` on a CPU; elsewhere all N, if there is memory for them."""
    if packed.one.device.type == "cpu":
        return most
    return min(N, max(memory_of(packed.one.device) // MEMORY // (sum(rows) * packed.one.element_size()), most))


def replay_width(packed, steps):
    """Coordinates in a replay block, such that its activations take about REPLAY_BYTES."""
    rows = sum(inputs + 8 * packed.hidden + 1 for inputs in packed.widths)
    width = REPLAY_BYTES // (steps * rows * packed.output_weight.element_size())
    return int(min(max(width, REPLAY_BLOCK[0]), REPLAY_BLOCK[1]))


class Activations:
    """Activations of one block of coordinates over T steps, and the backward pass over them.

    They serve many blocks, one after the other (the last may be narrower: the unused columns have adjoint 0);
    the weight gradients are sums over all of them.
    """

    def __init__(self, packed, steps, width):
        new, H, layers = packed.output_weight.new_zeros, packed.hidden, range(len(packed.widths))
        self.packed, self.steps = packed, steps
        self.columns = [new(steps + 1, inputs + H + 1, width) for inputs in packed.widths]  # [input; h; 1] of each step
        self.cell_states = [new(steps + 1, H, width) for _ in layers]
        self.top = new(steps, H, width)  # hidden state of the last layer, after each step
        self.adjoint = new(steps, width)
        self.dhidden, self.dcell = [new(H, width) for _ in layers], [new(H, width) for _ in layers]
        self.into = GateGradients(packed, new(4 * H, width), new(4 * H, width))
        self.dcolumns = [new(inputs + H, width) for inputs in packed.widths]
        self.weight_grads = [torch.zeros_like(weight) for weight in packed.weights]
        self.output_grad, self.bias_grad = torch.zeros_like(packed.output_weight), new(())
        for columns in self.columns:
            columns[:, -1] = 1
        above = [column[:-1, :H] for column in self.columns[1:]] + [self.top]
        self.cells = [  # [layer][step]: the cell, the rows that take a copy of h, its column transposed
            [
                (Cell(*views), copy, views[0].t())
                for *views, copy in zip(
                    self.columns[l],
                    new(steps, 4 * H, width),
                    self.cell_states[l],
                    self.cell_states[l][1:],
                    new(steps, H, width),
                    self.columns[l][1:, packed.widths[l] : -1],
                    above[l],
                )
            ]
            for l in layers
        ]

    def load(self, features, hidden, cells, adjoint):
        """Take a block in: features (T, inputs, w), state (layers, H, w), adjoint (T, w)."""
        w = adjoint.shape[1]
        for l, inputs in enumerate(self.packed.widths):
            self.columns[l][0, inputs:-1, :w] = hidden[l]
            self.cell_states[l][0, :, :w] = cells[l]
        self.columns[0][:-1, : self.packed.widths[0], :w] = features
        self.adjoint[:, :w], self.adjoint[:, w:] = adjoint, 0

    def record(self):
        """The forward pass, keeping all that `backward` reads."""
        minus_one = self.packed.minus_one
        for step in zip(*self.cells):
            for weight, (cell, copy, _) in zip(self.packed.forward_weights, step):
                cell.run(weight, minus_one)
                copy.copy_(cell.hidden_out)

    def backward(self, dfeatures=None):
        """Backpropagation through the T steps, adding to `weight_grads`, `output_grad` and `bias_grad`.

        dfeatures: (T, inputs, width), filled if given.
        """
        packed, H, into = self.packed, self.packed.hidden, self.into
        dgates, to_hidden = into.gates, packed.backward_weights[0][packed.widths[0] :]
        halves = [column.split([column.shape[0] - H, H]) for column in self.dcolumns]
        for d in self.dhidden + self.dcell:
            d.zero_()
        self.bias_grad += self.adjoint.sum()
        for t in reversed(range(self.steps)):
            self.dhidden[-1].addr_(packed.output_weight, self.adjoint[t])
            self.output_grad.addmv_(self.top[t], self.adjoint[t])
            for l in reversed(range(len(self.cells))):
                cell, _, column_t = self.cells[l][t]
                dh = self.dhidden[l]
                cell.pull_back(dh, self.dcell[l], into)
                self.weight_grads[l].addmm_(dgates, column_t)
                if l:  # the input of this layer is the hidden state of the one below
                    torch.mm(packed.backward_weights[l], dgates, out=self.dcolumns[l])
                    self.dhidden[l - 1].add_(halves[l][0])
                    dh.copy_(halves[l][1])
                elif dfeatures is None:
                    torch.mm(to_hidden, dgates, out=dh)
                else:
                    torch.mm(packed.backward_weights[0], dgates, out=self.dcolumns[0])
                    dfeatures[t] = halves[0][0]
                    dh.copy_(halves[0][1])
