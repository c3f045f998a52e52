"""Losses and gradients of small perceptrons on CUDA: backpropagation by hand, with Triton between the products.

The products are the library's; between two of them one kernel adds the bias and applies the activation, or its derivative, and
sums the bias' gradient up; one more is the cross-entropy. So a function with one hidden layer takes nine launches instead of
two dozen. Coordinates of a minibatch lie along columns, as in `optimizees.PerceptronLoss`, which is what it is tested against. Sums
are deterministic. This module needs triton.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl

from gradbuffer.kernels.triton_kernels import sigmoid, tanh

__all__ = ["ACTIVATIONS", "losses_and_gradient", "passes_its_check"]

ACTIVATIONS = ("sigmoid", "relu", "tanh")  # by their numbers in the kernels
COLUMNS = 128  # of a minibatch, at once
SELF_CHECK = {torch.float32: 1e-4, torch.float64: 1e-10}  # relative errors that a device's first use may show


@triton.jit
def activate(values, bias, batch, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """values (rows, batch) + bias (rows,), and the activation, in place; a program for each row."""
    row = tl.program_id(0)
    values += row.to(tl.int64) * batch
    shift = tl.load(bias + row)
    for start in range(0, batch, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < batch
        x = tl.load(values + columns, mask=inside, other=0.0) + shift
        if KIND == 0:
            x = sigmoid(x)
        elif KIND == 1:
            x = tl.maximum(x, 0.0)
        else:
            x = tanh(x)
        tl.store(values + columns, x, mask=inside)


@triton.jit
def pull_back(slopes, values, bias_gradient, batch, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """slopes (rows, batch), the loss's derivative by the activated values -> by those before, in place, and its sum over columns."""
    row = tl.program_id(0)
    slopes += row.to(tl.int64) * batch
    values += row.to(tl.int64) * batch
    total = tl.zeros((BLOCK,), slopes.dtype.element_ty)
    for start in range(0, batch, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < batch
        d = tl.load(slopes + columns, mask=inside, other=0.0)
        y = tl.load(values + columns, mask=inside, other=0.0)
        if KIND == 0:
            d *= y * (1 - y)
        elif KIND == 1:
            d = tl.where(y > 0, d, 0.0).to(d.dtype)
        else:
            d *= 1 - y * y
        tl.store(slopes + columns, d, mask=inside)
        total += d
    tl.store(bias_gradient + row, tl.sum(total, axis=0))


@triton.jit
def cross_entropy(
    scores, bias, labels, losses, bias_gradient, batch, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each function, a program: the mean cross-entropy of scores (CLASSES, batch) + bias, whose derivative takes their place."""
    function = tl.program_id(0)
    scores += function.to(tl.int64) * CLASSES * batch
    labels += function.to(tl.int64) * batch
    rows = tl.arange(0, ROWS)[:, None]
    shift = tl.load(bias + function * CLASSES + rows, mask=rows < CLASSES, other=0.0)
    total = tl.zeros((BLOCK,), scores.dtype.element_ty)
    by_class = tl.zeros((ROWS, BLOCK), scores.dtype.element_ty)
    for start in range(0, batch, BLOCK):
        columns = (start + tl.arange(0, BLOCK))[None, :]
        inside = columns < batch
        wanted = inside & (rows < CLASSES)
        z = tl.load(scores + rows * batch + columns, mask=wanted, other=0.0) + shift
        z = tl.where(rows < CLASSES, z, float("-inf")).to(shift.dtype)
        most = tl.max(z, axis=0)[None, :]
        powers = tl.exp(z - most)
        size = tl.sum(powers, axis=0)[None, :]
        truth = rows == tl.load(labels + columns, mask=inside, other=0)
        chosen = tl.sum(tl.where(truth, z - most, 0.0), axis=0)
        own = tl.sum(tl.log(size), axis=0) - chosen
        total += tl.where(start + tl.arange(0, BLOCK) < batch, own, 0.0).to(total.dtype)
        d = (powers / size - tl.where(truth, 1.0, 0.0)) / batch
        d = tl.where(wanted, d, 0.0).to(shift.dtype)
        tl.store(scores + rows * batch + columns, d, mask=wanted)
        by_class += d
    tl.store(losses + function, tl.sum(total, axis=0) / batch)
    tl.store(
        bias_gradient + function * CLASSES + tl.arange(0, ROWS),
        tl.sum(by_class, axis=1),
        mask=tl.arange(0, ROWS) < CLASSES,
    )


def losses_and_gradient(images, labels, theta, shapes, activation):
    """Losses (B,) of B perceptrons and the gradient (N,) of their sum, no graph.

    Args:
        images: (B, batch, inputs); labels: (B, batch) of int64.
        theta: (N,), in which weight0 (B, inputs, units), bias0 (B, units), weight1, … lie one after the other.
        shapes: dict of their shapes.
        activation: one of `ACTIVATIONS`.
    """
    gradient, kind, labels = torch.empty_like(theta), ACTIVATIONS.index(activation), labels.contiguous()
    params, gradients = (
        [
            part.view(shape)
            for part, shape in zip(vector.split([shape.numel() for shape in shapes.values()]), shapes.values())
        ]
        for vector in (theta, gradient)
    )
    layers, batch = [*zip(params[::2], params[1::2], gradients[::2], gradients[1::2])], labels.shape[1]
    inputs, losses = [images.mT], theta.new_empty(len(images))
    with torch.cuda.device_of(theta):
        for weight, bias, _, bias_gradient in layers:
            inputs.append(torch.bmm(weight.mT, inputs[-1]))
            if weight is not layers[-1][0]:
                activate[(bias.numel(),)](inputs[-1], bias, batch, KIND=kind, BLOCK=COLUMNS)
        classes, d = bias.shape[1], inputs.pop()
        rows = triton.next_power_of_2(classes)
        cross_entropy[(len(images),)](
            d,
            bias,
            labels,
            losses,
            bias_gradient,
            batch,
            CLASSES=classes,
            ROWS=rows,
            BLOCK=max(COLUMNS * 16 // rows, 16),
        )
        for (weight, _, weight_gradient, _), below in itertools.pairwise([*reversed(layers), (None,) * 4]):
            x = inputs.pop()
            torch.bmm(x, d.mT, out=weight_gradient)
            if inputs:
                d = torch.bmm(weight, d)
                pull_back[(below[3].numel(),)](d, x, below[3], batch, KIND=kind, BLOCK=COLUMNS)
    return losses, gradient


@functools.cache
def passes_its_check(device, dtype):
    """Whether this device computes, at its first use, what autograd does; False also where a kernel cannot be compiled."""
    generator, sizes = torch.Generator().manual_seed(0), (7, 5, 4, 3)
    shapes = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        shapes |= {f"weight{layer}": torch.Size([2, inputs, outputs]), f"bias{layer}": torch.Size([2, outputs])}
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)  # noqa: E731
    theta, images = draw(sum(shape.numel() for shape in shapes.values())), draw(2, COLUMNS + 3, sizes[0])
    labels = torch.randint(sizes[-1], (2, COLUMNS + 3), generator=generator, device="cpu").to(device)
    plain = dict(zip(ACTIVATIONS, (torch.sigmoid, torch.relu, torch.tanh)))
    try:
        for activation in ACTIVATIONS:
            with torch.enable_grad(), torch.inference_mode(False):
                leaf = theta.detach().clone().requires_grad_()
                x, parts = images, leaf.split([shape.numel() for shape in shapes.values()])
                parts = [part.view(shape) for part, shape in zip(parts, shapes.values())]
                for layer, (weight, bias) in enumerate(zip(parts[::2], parts[1::2])):
                    x = plain[activation](x) if layer else x
                    x = x @ weight + bias[:, None]
                expected = torch.nn.functional.cross_entropy(x.mT, labels, reduction="none").mean(1)
                (slope,) = torch.autograd.grad(expected.sum(), leaf)
            found = losses_and_gradient(images, labels, theta, shapes, activation)
            for own, wanted in zip(found, (expected.detach(), slope)):
                if not ((own - wanted).norm() <= SELF_CHECK[dtype] * (wanted.norm() + 1e-3)).item():
                    return False
    except Exception:  # whatever a compiler, a driver or a launcher raises: torch does it then
        return False
    return True
