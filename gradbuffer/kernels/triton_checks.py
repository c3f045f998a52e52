"""What the self-checks of the LSTM's Triton kernels run, and compare. Imports without triton."""

import math

import torch

from gradbuffer.kernels.torch_blocks import TorchLSTM

__all__ = ["distance", "drawn", "error_of_averages", "flat", "log_sign", "random_lstm", "replayed"]


def error_of_averages(kernels, reader_of, net, work):
    """How far a piece of work of a few steps is from torch's, relatively, for random weights of the LSTM. reader_of: `AveragesReader`."""
    device, dtype, T, N = kernels.output_weight.device, kernels.output_weight.dtype, 3, 65
    draw, averages = drawn(device, dtype), net.averages
    lstm = random_lstm((kernels.inputs, kernels.hidden, kernels.layers), draw)
    weights, grads = (lstm, draw(kernels.hidden), draw()), draw(T, N)
    ours, plain = type(kernels)(*weights), TorchLSTM(*weights)
    reader, state = reader_of(ours, averages), [grads.new_zeros(*shape, N) for shape in net.state_shapes]
    if work == "read":
        readings, _ = net.read(grads, state[2:])
        found, expected = [reader.read(grads, state[2])], [net.embed(readings)]
        if averages.layer is not None:
            pull = draw(T, kernels.inputs, N)
            found += reader.pull_layer(grads, state[2], pull)
            pull *= expected[0].clamp(max=0) + 1  # the slope of an ELU
            expected += [torch.einsum("tin,trn->ir", pull, readings), pull.sum((0, 2))]
        return distance(found, expected)
    own, memory, theta = [part.clone() for part in state], state[2:], grads.new_zeros(2, N).unbind()
    steps = ours.group_steps(0.0, [theta[0]], [own], [], None, reader)
    for grad in grads:
        if work == "group":
            steps.look([grad], 1.0)
            steps.step()
        else:
            theta[0].add_(reader.step(grad, own, own))
        readings, memory = net.read(grad[None], memory)
        features = net.embed(readings)[0]
        output, *_ = plain.step(lambda a, b, x=features: x[:, a:b], *state[:2], inplace=True)
        theta[1].add_(averages.scale * output.tanh())
    return distance([theta[0], *own], [theta[1], *state[:2], *memory])


def drawn(device, dtype):
    """A function that gives random tensors of a shape, the same ones everywhere."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")).to(
        device, dtype
    )


def random_lstm(sizes, draw):
    """An LSTM of these sizes with such weights."""
    like = draw()
    lstm = torch.nn.LSTM(*sizes, device="meta", dtype=like.dtype).to_empty(device=like.device)  # nothing is drawn
    for parameter in lstm.parameters():
        parameter.copy_(draw(*parameter.shape))
    return lstm


def distance(found, expected):
    """The largest relative distance between tensors of two nested lists."""
    return max(((a - b).norm() / (b.norm() + 1e-3)).item() for a, b in zip(flat(found), flat(expected)))


def replayed(kernels, read, p, state, adjoint, squash, pulls):
    """A replay's results, the derivatives by the features among them if it pulls."""
    features = torch.empty_like(read)
    pull = (lambda a, b, part: features[..., a:b].copy_(part)) if pulls else None
    return [
        kernels.replay(lambda a, b: read[..., a:b], *state, adjoint, squash, pull, p),
        *([features] if pulls else []),
    ]


def log_sign(grads, p):
    """As of `nets.readings`."""
    return torch.stack([grads.abs().clamp(min=math.exp(-p)).log() / p, (grads * math.exp(p)).clamp(-1, 1)])


def flat(parts):
    """The tensors in nested lists and tuples."""
    return [tensor for part in parts for tensor in (flat(part) if isinstance(part, (list, tuple)) else [part])]
