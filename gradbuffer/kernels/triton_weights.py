"""An LSTM's weights laid out for its Triton kernels, padded to powers of two, and how states lie. Imports without triton."""

import functools
import math

import torch

from gradbuffer.kernels.torch_blocks import PackedWeights

__all__ = ["PaddedWeights", "in_rows", "layout", "padded_size"]


class PaddedWeights:
    """An LSTM's weights and its output's (H,) and () as the kernels read them.

    `weights` has of each layer (4 · UNITS, BELOW) and (4 · UNITS, UNITS), end to end: rows (2, UNITS, 2) as in `triton_kernels`, the
    units' followed by zeros, columns [below; bias; zeros] and [hidden; zeros]. `output` (UNITS + 1,) is padded likewise, its bias
    last. All are gathered from one vector by indices, so that a change of the weights costs a few launches and no wait.
    """

    def __init__(self, lstm, output_weight, output_bias):
        shapes = lstm.input_size, lstm.hidden_size, lstm.num_layers
        self.sizes, first, second = layout(*shapes, output_weight.device)
        own = [output_bias.new_zeros(1), *lstm._flat_weights, output_weight, output_bias.reshape(1)]
        flat = torch.cat([part.detach().reshape(-1) for part in own])
        padded = flat.index_select(0, first).add_(flat.index_select(0, second))
        self.weights, self.output = padded.split([len(padded) - self.sizes["UNITS"] - 1, self.sizes["UNITS"] + 1])


@functools.cache
def layout(inputs, hidden, layers, device):
    """The kernels' sizes, and index tensors: for each padded number the weights whose sum it is, twice.

    The weights are one vector: a zero, those of each layer in `nn.LSTM`'s order (weight_ih, weight_hh, bias_ih, bias_hh), the
    output's and its bias. Where the weights' own numbers in it are laid out as the weights would be, they are the indices.
    """
    H, units = hidden, padded_size(hidden)
    sizes = dict(
        INPUTS=inputs, H=H, LAYERS=layers, FIRST=padded_size(inputs + 1), BELOW=padded_size(H + 1), UNITS=units
    )
    widths, total, first, second = [inputs] + [H] * (layers - 1), 1, [], []

    def numbered(*shape):
        nonlocal total
        total += math.prod(shape)
        return torch.arange(total - math.prod(shape), total, device="cpu").view(shape)

    def padded(w, u, b, below):
        (matrix,) = PackedWeights([(w, u, b)]).weights  # (4H, in + H + 1), gates in the kernels' order
        rows, count = matrix.view(4, H, -1), w.shape[1]
        out = rows.new_zeros(4, units, below + units)
        out[:, :H, :count], out[:, :H, count] = rows[..., :count], rows[..., -1]
        out[:, :H, below : below + H] = rows[..., count:-1]
        out = out.view(2, 2, units, -1).transpose(1, 2).flatten(0, 2)  # (2, units, 2) rows
        return torch.cat([out[:, :below].flatten(), out[:, below:].flatten()])

    for l, width in enumerate(widths):
        w, u, b, c = numbered(4 * H, width), numbered(4 * H, H), numbered(4 * H), numbered(4 * H)
        below = sizes["BELOW" if l else "FIRST"]
        first.append(padded(w, u, b, below))
        second.append(padded(torch.zeros_like(w), torch.zeros_like(u), c, below))
    first += [torch.nn.functional.pad(numbered(H), (0, units - H)), numbered(1)]
    second = torch.nn.functional.pad(torch.cat(second), (0, units + 1))
    return sizes, torch.cat(first).to(device), second.to(device)


def padded_size(size):
    """The power of two from 16 on that holds it: what `tl.dot` takes."""
    return max(16, 1 << (size - 1).bit_length())


def in_rows(state):
    """Whether the parts (layers, H, N) of a state lie alike, row after row at one distance: whole, or a part of a larger one."""
    layouts = {part.stride() for part in state}
    apart, row, one = layouts.pop()
    return (
        not layouts
        and (one == 1 or state[0].shape[2] == 1)
        and (apart == row * state[0].shape[1] or state[0].shape[0] == 1)
    )
