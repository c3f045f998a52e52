"""What no implementation of the meta-update by matrix products can save, measured: products, the optimizee, memory.

For the other benchmarks; nothing here computes a meta-gradient.
"""

import time

import torch

__all__ = ["bare_products", "bytes_of_step", "copy_rate", "forward_products", "optimizee_alone"]

BLOCK = 2048  # coordinates in a block of the products


def bare_products(net, N, steps):
    """A function that runs the LSTM's matrix products of a first-order meta-gradient window, and nothing else.

    For each layer's W (4H, in + H), each block of about `BLOCK` coordinates and each step: W · [input; h] twice (in the
    unroll, and again in the replay), and the replay's two products backward, by [input; h] (in the first layer by h
    alone: the derivative by the gradient is not asked for) and by W. On the same buffers again and again.
    """
    weights = [torch.cat([w.detach(), u.detach()], 1) for w, u, *_ in net.lstm.all_weights]
    count = -(-N // BLOCK)
    width, H = -(-N // count), net.hidden_size
    layers = []
    for layer, weight in enumerate(weights):
        column, back = torch.randn(weight.shape[1], width), (weight if layer else weight[:, -H:]).t().contiguous()
        gates = torch.empty(4 * H, width)
        layers.append(
            (weight, column, gates, back, torch.empty(len(back), width), column.t(), torch.empty_like(weight))
        )

    def run():
        for _ in range(steps * count):
            for weight, column, gates, back, dcolumn, column_t, dweight in layers:
                torch.mm(weight, column, out=gates)
                torch.mm(weight, column, out=gates)
                torch.mm(back, gates, out=dcolumn)
                torch.mm(gates, column_t, out=dweight)

    return torch.no_grad()(run)


def forward_products(net, N):
    """A function that runs the matrix products of one step for N coordinates: W · [input; h] of each layer, the output."""
    count = -(-N // BLOCK)
    width = -(-N // count)
    weights = [torch.cat([w.detach(), u.detach()], 1) for w, u, *_ in net.lstm.all_weights] + [
        net.output.weight.detach()
    ]
    layers = [(weight, torch.randn(weight.shape[1], width), torch.empty(len(weight), width)) for weight in weights]

    def run():
        for _ in range(count):
            for weight, column, gates in layers:
                torch.mm(weight, column, out=gates)

    return torch.no_grad()(run)


def optimizee_alone(coordinates, batch, steps):
    """A function that computes the losses and gradients of a window, always at the initial point: no optimizer."""
    theta = coordinates.join(batch.params).detach()

    def run():
        for step in range(steps + 1):
            coordinates.losses_and_gradient(batch.loss, theta, step)

    return run


def copy_rate(numbers=1 << 26, repetitions=5):
    """Bytes a second, read and written, of the fastest of some copies of a tensor too large for the cache."""
    source, times = torch.ones(numbers), []
    target = torch.empty_like(source)
    for _ in range(repetitions + 1):  # the first brings the pages in
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times[1:])


def bytes_of_step(net):
    """Bytes that one step moves for each coordinate at least: the state in and out, the gradient in, the update out."""
    weight = net.output.weight
    return weight.element_size() * (2 * 2 * net.num_layers * net.hidden_size + 2)
