"""Distributions of functions to optimize ("optimizees"), after Andrychowicz et al. 2016, section 3.

A problem has `sample(meta_batch, generator)`, which draws a meta-batch of B functions: `params`, a dict of initial
parameters, each (B, ...), and `loss(params, step)`, the loss (B,) of each function on its minibatch of that step.
All B functions are one computation. Anything with these two serves as a problem in `meta_training`.

Drawing is done on the CPU, so that a seed means the same functions on every device.
"""

import itertools
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from gradbuffer.checks import check_count
from gradbuffer.contracts import Loss, MetaBatch, PerceptronData, Problem, QuadraticData, in_parts
from gradbuffer.data.mnist import load_mnist
from gradbuffer.data.roots import check_split
from gradbuffer.devices import bring, drawn_on_cpu, whole_device
from gradbuffer.kernels.choice import takes_numba, takes_triton
from gradbuffer.problems.cifar10 import CIFAR10Net
from gradbuffer.problems.images import (
    Chosen,
    ImageNets,
    MinibatchLoss,
    check_batch_size,
    check_floating,
    mean_cross_entropy,
    on_device,
)
from gradbuffer.problems.perceptrons import Networks, Perceptrons
from gradbuffer.problems.variations import ConvexTerms, Mirrored, Mixture, RandomScaling

__all__ = [
    "ACTIVATIONS",
    "CIFAR10Net",
    "ConvexTerms",
    "MNISTNet",
    "MetaBatch",
    "Mirrored",
    "Mixture",
    "Networks",
    "Perceptrons",
    "Quadratics",
    "RandomScaling",
]


class Quadratics(Problem):
    """Random quadratics f(θ) = ‖Wθ − y‖², the elements of W and y from N(0, 1), θ_0 = 0.

    Args:
        dim: W is dim × dim, y and θ have dim elements; positive. Default 10, the paper's.
        dtype: of all tensors.
        device: where the functions live.

    Example:
        >>> batch = Quadratics().sample(128, generator=torch.Generator().manual_seed(0))
        >>> batch.loss(batch.params, step=0).shape
        torch.Size([128])

    Reference: Andrychowicz et al. 2016, section 3.1.
    """

    def __init__(self, dim: int = 10, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        check_count(dim=dim)
        check_floating(dtype)
        self.dim, self.dtype, self.device = dim, dtype, whole_device(device)
        self.name = f"Quadratics, {dim} dimensions"

    def to(self, device: torch.device | str) -> "Quadratics":
        return Quadratics(self.dim, self.dtype, device)

    @drawn_on_cpu
    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> MetaBatch:
        """Draw `meta_batch` functions; their loss is the same at every step. Returns `MetaBatch`."""
        check_count(meta_batch=meta_batch)
        W = torch.randn(meta_batch, self.dim, self.dim, generator=generator, dtype=self.dtype)
        y = torch.randn(meta_batch, self.dim, 1, generator=generator, dtype=self.dtype)
        W, y = bring(W, self.device), bring(y, self.device)

        return in_parts(
            {"theta": torch.zeros(meta_batch, self.dim, dtype=self.dtype, device=self.device)}, QuadraticLoss(W, y)
        )


class QuadraticLoss(Loss):
    """‖Wθ − y‖² of B functions, W (B, n, n) and y (B, n, 1)."""

    divisible = True

    def __init__(self, W, y, twice=None):
        self.data = QuadraticData(W, y, (2 * W).mT.contiguous() if twice is None else twice)
        # one function: products without a batch cost half as much
        self.alone = (W[0], y[0, :, 0], self.data.twice[0]) if len(W) == 1 else None

    def residual(self, params):
        return torch.baddbmm(self.data.y, self.data.W, params["theta"].unsqueeze(-1), beta=-1)

    def __call__(self, params, step):
        return self.residual(params).square().sum((1, 2))

    def part(self, first, last):
        return QuadraticLoss(*(tensor[first:last] for tensor in self.data))

    def join(self, others):
        return QuadraticLoss(*map(torch.cat, zip(self.data, *(other.data for other in others))))

    def tensors(self, step):
        return self.data

    def of(self, tensors):
        return QuadraticLoss(*tensors)

    def compiled(self, shapes):
        return self.data

    def with_gradient(self, params, step):
        """Losses (B,) and their gradient 2 Wᵀ(Wθ − y), a dict like params, without a graph."""
        if self.alone:
            W, y, twice = self.alone
            residual = torch.addmv(y, W, params["theta"].view(-1), beta=-1)
            return torch.dot(residual, residual).view(1), {"theta": torch.mv(twice, residual).view(1, -1)}
        residual = self.residual(params)
        return torch.bmm(residual.mT, residual).view(-1), {"theta": torch.bmm(self.data.twice, residual).squeeze(-1)}


# each with what makes of an output y and dL/dy the derivative dL/dx
ACTIVATIONS = {
    "sigmoid": (torch.sigmoid, torch.ops.aten.sigmoid_backward),
    "relu": (torch.relu, lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0)),
    "tanh": (torch.tanh, torch.ops.aten.tanh_backward),
}


class MNISTNet(ImageNets):
    """A multilayer perceptron on MNIST from random initial weights: cross-entropy on a fresh minibatch at every step.

    MNIST's training split is halved, by a fixed random order: functions of `split="train"` draw their minibatches from
    one half, those of `"validation"` from the other, those of `"test"` from MNIST's test split. Meta-training uses
    the first, choosing an optimizer (or a learning rate) the second, and reported curves the third.

    The data are loaded once per process and lie on the device as tensors; `mnist.load_mnist` says where they come
    from, and what stands in for MNIST offline (`name`, for titles, says which it was).

    Args:
        hidden_sizes: units of each hidden layer; may be empty (a linear classifier). Default (20,), the paper's.
        activation: "sigmoid" (the paper's), "relu" or "tanh".
        batch_size: images in a minibatch, drawn with replacement; positive. Default 128. Or (least, most): each `sample`
            draws one between these, uniformly in its logarithm, and keeps it; an optimizer trained on these has to see
            for itself how noisy its gradients are.
        split: "train", "validation" or "test".
        root: the data root, see `load_mnist`.
        side: None for the images as they are; a smaller number averages them down to side × side pixels, and scales pixels
            up and the first layer's initial weights down so that the network learns much as it does at full size:
            a rehearsal stage at a fraction of the coordinates (14: a quarter). Must divide the images' own side.
        init_std: None starts as `nn.Linear` does, uniform on ±1/√inputs (the paper does not say; what others measured
            and our figures are for this one); a number, from N(0, init_std²), 0.01 in the paper's released code.
        dtype, device: of all tensors.

    Example:
        >>> problem = MNISTNet(hidden_sizes=(20, 20), activation="relu", split="test")
        >>> batch = problem.sample(4, generator=torch.Generator().manual_seed(0))
        >>> {name: tuple(tensor.shape) for name, tensor in batch.params.items()}["weight0"]
        (4, 784, 20)

    Reference: Andrychowicz et al. 2016, section 3.2.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (20,),
        activation: str = "sigmoid",
        batch_size: int | tuple[int, int] = 128,
        split: str = "train",
        root: str | Path | None = None,
        init_std: float | None = None,
        side: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        hidden_sizes = tuple(hidden_sizes)
        batch_size = check_batch_size(batch_size)
        check_count(**{f"hidden_sizes[{k}]": size for k, size in enumerate(hidden_sizes)})
        check_floating(dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        check_split(split)
        if init_std is not None and not (isinstance(init_std, (int, float)) and 0 <= init_std < math.inf):
            raise ValueError(f"init_std must be None or a finite number, at least 0, got {init_std!r}")
        self.options = dict(
            hidden_sizes=hidden_sizes,
            activation=activation,
            batch_size=batch_size,
            split=split,
            root=root,
            init_std=init_std,
            side=side,
            dtype=dtype,
        )
        self.device = whole_device(device)
        data = load_mnist(root)
        full = math.isqrt(data.train_images.shape[1])
        if side is not None and not (isinstance(side, int) and 0 < side <= full and full % side == 0):
            raise ValueError(f"side must be None or a divisor of {full}, got {side!r}")
        self.shrinking = full / (side or full)
        self.images, self.labels = on_device(data, split, self.device, shrink, side, dtype)
        self.sizes = (self.images.shape[1], *hidden_sizes, 10)
        self.name = f"{data.name} {'-'.join(map(str, self.sizes))} {activation}"

    @drawn_on_cpu
    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> MetaBatch:
        """Draw `meta_batch` networks with their sequences of minibatches. Returns `MetaBatch`."""
        check_count(meta_batch=meta_batch)
        params = {}
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(self.sizes)):
            for name, shape in ((f"weight{layer}", (inputs, outputs)), (f"bias{layer}", (outputs,))):
                draw = torch.empty(meta_batch, *shape, dtype=self.options["dtype"])
                inputs_at_full_size = inputs * (self.shrinking**2 if layer == 0 else 1)
                if self.options["init_std"] is None:
                    draw.uniform_(-(inputs_at_full_size**-0.5), inputs_at_full_size**-0.5, generator=generator)
                else:
                    draw.normal_(0, self.options["init_std"], generator=generator)
                params[name] = bring(draw, self.device)
        return in_parts(params, PerceptronLoss(self.minibatches(meta_batch, generator), self.options["activation"]))


def shrink(images, labels, side, dtype):
    """Images (n, pixels) -> (n, side²): means over blocks, scaled up so that an image's norm stays about what it was."""
    if side is not None:
        full = math.isqrt(images.shape[1])
        blocks = images.view(-1, side, full // side, side, full // side)
        images = blocks.mean((2, 4)).flatten(1) * (full / side)
    return images.to(dtype), labels


class PerceptronLoss(MinibatchLoss):
    """Mean cross-entropy of B multilayer perceptrons, params weight0 (B, inputs, units), bias0 (B, units), weight1, …

    minibatch: of images (B, batch, inputs) and labels (B, batch), see `MinibatchLoss`. activation: a name of `ACTIVATIONS`.
    """

    def __init__(self, minibatch, activation):
        super().__init__(minibatch)
        self.activation = activation

    def __call__(self, params, step):
        images, labels = self.minibatch(step)
        return mean_cross_entropy(self.layers(params, images)[-1], labels)

    def layers(self, params, images):
        """What every layer reads, the images (B, inputs, batch) first, and the scores (B, classes, batch).

        With images along columns products with few units are faster than along rows, and so is the softmax.
        """
        x, last, activation = images.mT, len(params) // 2 - 1, ACTIVATIONS[self.activation][0]
        outputs = [x]
        for layer in range(last + 1):
            x = torch.baddbmm(params[f"bias{layer}"].unsqueeze(2), params[f"weight{layer}"].mT, x)
            outputs.append(activation(x) if layer < last else x)
            x = outputs[-1]
        return outputs

    @torch.no_grad()
    def with_gradient(self, params, step):
        """Losses (B,) and the gradient of their sum, a dict like params, without a graph: backpropagation by hand."""
        images, labels = self.minibatch(step)
        *inputs, scores = self.layers(params, images)
        logs, truth, gradients = scores.log_softmax(1), labels.unsqueeze(1), {}
        losses = logs.gather(1, truth).sum((1, 2)).div_(-labels.shape[1])
        d = logs.exp_().scatter_add_(1, truth, logs.new_full((), -1).expand(truth.shape)).div_(labels.shape[1])
        for layer in reversed(range(len(inputs))):
            gradients |= {f"bias{layer}": d.sum(2), f"weight{layer}": torch.bmm(d, inputs[layer].mT).mT}
            if layer:
                d = ACTIVATIONS[self.activation][1](torch.bmm(params[f"weight{layer}"], d), inputs[layer])
        return losses, gradients

    def compiled(self, shapes):
        names = names_of(len(shapes) // 2)
        if not isinstance(self.minibatch, Chosen) or list(shapes) != names:
            return None
        sizes = [self.minibatch.images.shape[1], *(shapes[name][1] for name in names[1::2])]
        return PerceptronData(*self.minibatch, sizes, self.activation)

    def with_vector_gradient(self, theta, shapes, step):
        if takes_triton(theta) and list(shapes) == names_of(len(shapes) // 2):
            losses = import_module("gradbuffer.kernels.triton_losses")
            if losses.passes_its_check(theta.device, theta.dtype):
                return losses.losses_and_gradient(*self.minibatch(step), theta, shapes, self.activation)
        data = self.compiled(shapes)
        if data is None or not takes_numba(theta) or data.images.dtype != theta.dtype:
            return None
        return import_module("gradbuffer.kernels.numba_windows").losses_and_gradient(
            data.images, data.labels, data.index(step), theta, data.sizes, data.activation
        )


def names_of(layers):
    """The names of a perceptron's parameters."""
    return [f"{kind}{layer}" for layer in range(layers) for kind in ("weight", "bias")]
