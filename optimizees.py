"""Distributions of functions to optimize ("optimizees"), after Andrychowicz et al. 2016, section 3.

A problem has `sample(meta_batch, generator)`, which draws a meta-batch of B functions: `params`, a dict of initial
parameters, each (B, ...), and `loss(params, step)`, the loss (B,) of each function on its minibatch of that step.
All B functions are one computation. Anything with these two serves as a problem in `meta_training`.

Drawing is done on the CPU, so that a seed means the same functions on every device.
"""

import itertools
import math
from importlib import import_module
from typing import Callable, NamedTuple

import torch
from torch.nn import functional as F

from gradbuffer.checks import check_count
from gradbuffer.data.cifar10 import ColorImages, check_color_images, load_cifar10
from gradbuffer.kernels.choice import takes_numba
from gradbuffer.data.mnist import load_mnist
from gradbuffer.contracts import Loss, MetaBatch, PerceptronData, Problem, QuadraticData, as_problem, in_parts, kind_of

__all__ = ["CIFAR10Net", "ConvexTerms", "MNISTNet", "MetaBatch", "Mirrored", "Quadratics", "RandomScaling"]

STEPS_PER_DRAW = 32  # minibatches whose indices are drawn at once


def check_floating(dtype):
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")


def check_split(split):
    if split not in ("train", "validation", "test"):
        raise ValueError(f'split must be "train", "validation" or "test", got {split!r}')


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

    def __init__(self, dim=10, dtype=torch.float32, device="cpu"):
        check_count(dim=dim)
        check_floating(dtype)
        self.dim, self.dtype, self.device = dim, dtype, torch.device(device)
        self.name = f"Quadratics, {dim} dimensions"

    def to(self, device):
        """The same distribution on another device."""
        return Quadratics(self.dim, self.dtype, device)

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions; their loss is the same at every step. Returns `MetaBatch`."""
        check_count(meta_batch=meta_batch)
        W = torch.randn(meta_batch, self.dim, self.dim, generator=generator, dtype=self.dtype).to(self.device)
        y = torch.randn(meta_batch, self.dim, 1, generator=generator, dtype=self.dtype).to(self.device)

        return in_parts({"theta": torch.zeros(meta_batch, self.dim, dtype=self.dtype, device=self.device)}, QuadraticLoss(W, y))


class QuadraticLoss(Loss):
    """‖Wθ − y‖² of B functions, W (B, n, n) and y (B, n, 1)."""

    def __init__(self, W, y, twice=None):
        self.W, self.y, self.twice = W, y, (2 * W).mT.contiguous() if twice is None else twice
        # one function: products without a batch cost half as much
        self.alone = (self.W[0], self.y[0, :, 0], self.twice[0]) if len(W) == 1 else None

    divisible = True

    def compiled(self, shapes):
        return QuadraticData(self.W, self.y, self.twice)

    def residual(self, params):
        return torch.baddbmm(self.y, self.W, params["theta"].unsqueeze(-1), beta=-1)

    def __call__(self, params, step):
        return self.residual(params).square().sum((1, 2))

    def tensors(self, step):
        """What the loss reads, the same at every step."""
        return self.W, self.y, self.twice

    def of(self, tensors):
        """The loss that reads these tensors."""
        return QuadraticLoss(*tensors)

    def part(self, first, last):
        """The loss of functions first … last - 1."""
        return QuadraticLoss(*(tensor[first:last] for tensor in self.tensors(0)))

    def with_gradient(self, params, step):
        """Losses (B,) and their gradient 2 Wᵀ(Wθ − y), a dict like params, without a graph."""
        if self.alone:
            W, y, twice = self.alone
            residual = torch.addmv(y, W, params["theta"].view(-1), beta=-1)
            return torch.dot(residual, residual).view(1), {"theta": torch.mv(twice, residual).view(1, -1)}
        residual = self.residual(params)
        return torch.bmm(residual.mT, residual).view(-1), {"theta": torch.bmm(self.twice, residual).squeeze(-1)}


class Variation(Problem):
    """A problem made of another one's functions: what `RandomScaling`, `Mirrored` and `ConvexTerms` share.

    Validation, in `meta_train`, is on the other problem's own functions: they are what the optimizer is for.
    """

    def __init__(self, problem):
        self.problem = as_problem(problem)

    @property
    def device(self):
        return self.problem.device

    def validation_problem(self):
        return self.problem.validation_problem()

    def describe(self):
        return f"{super().describe()} of {self.problem.describe()}"


class RandomScaling(Variation):
    """The same functions in other coordinates: f_c(θ) = f(c ⊙ θ) from θ_0 / c, every c_i drawn anew for each function.

    An optimizer that is trained on these cannot rely on how large the steps of one architecture are, nor on the signs
    of its gradients.

    Args:
        problem: whose functions.
        radius: c_i = e^u with u uniform on ±radius; not negative; 0 for no scaling.
        signs: also give each c_i a random sign.

    Example:
        >>> batch = RandomScaling(Quadratics(), radius=3.0).sample(4)

    Reference: Lv, Jiang and Li 2017 (arXiv 1703.03633), section 4.1; the signs are ours.
    """

    def __init__(self, problem, radius=3.0, signs=False):
        super().__init__(problem)
        if isinstance(radius, bool) or not (isinstance(radius, (int, float)) and 0 <= radius <= 20):
            raise ValueError(f"radius must be a number in [0, 20], got {radius!r}")
        self.radius, self.signs = radius, bool(signs)
        self.options = dict(radius=self.radius, signs=self.signs)
        self.name = f"{self.problem.name or kind_of(self.problem)}, randomly scaled"

    def to(self, device):
        """The same distribution on another device."""
        return RandomScaling(self.problem.to(device), self.radius, self.signs)

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions. Returns `MetaBatch`."""
        batch, scales = self.problem.sample(meta_batch, generator=generator), {}
        for name, tensor in batch.params.items():
            scale = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-1, 1, generator=generator)
            scale = scale.mul_(self.radius).exp_()
            if self.signs:
                scale *= 2 * torch.randint(2, tensor.shape, generator=generator) - 1
            scales[name] = scale.to(tensor.device)
        return scaled_batch(batch, scales)


def scaled_batch(batch, scales):
    """The functions of a meta-batch in coordinates θ / scales."""
    def loss(params, step):
        return batch.loss({name: scales[name] * tensor for name, tensor in params.items()}, step)

    def part(first, last):
        return scaled_batch(batch.part(first, last), {name: scale[first:last] for name, scale in scales.items()})

    scaled = {name: tensor / scales[name] for name, tensor in batch.params.items()}
    return MetaBatch(scaled, loss, part if getattr(batch, "part", None) else None)


class Mirrored(Variation):
    """Every function twice, the second time mirrored: f(θ) from θ_0 and f(-θ) from -θ_0, on the same minibatches.

    Most of the noise in a long window's meta-gradient is in one direction: that of all coordinates drifting together,
    which a function likes or not by chance. An optimizer whose updates change sign with the gradients does not drift,
    and takes the two of a pair along mirrored paths; what they say about drift then cancels. Measured on MNIST networks
    with a window of 50 steps, the noise of the meta-gradient falls from 146 to 5 (benchmarks/noise.py).

    Args:
        problem: whose functions; `sample` then needs an even `meta_batch`, and gives its first half upright.

    Example:
        >>> batch = Mirrored(Quadratics()).sample(4)

    Reference: ours; antithetic sampling of the functions.
    """

    def __init__(self, problem):
        super().__init__(problem)
        self.options = {}
        self.name = f"{self.problem.name or kind_of(self.problem)}, mirrored"

    def to(self, device):
        """The same distribution on another device."""
        return Mirrored(self.problem.to(device))

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions. Returns `MetaBatch`."""
        check_count(meta_batch=meta_batch)
        if meta_batch % 2:
            raise ValueError(f"meta_batch must be even for mirrored pairs, got {meta_batch}")
        batch, pairs = self.problem.sample(meta_batch // 2, generator=generator), meta_batch // 2
        whole = mirrored_batch([(1, pairs, batch), (-1, pairs, batch)])
        if not getattr(batch, "part", None):
            return whole

        def part(first, last):
            ranges = [(1, first, min(last, pairs)), (-1, max(first, pairs) - pairs, last - pairs)]
            return mirrored_batch([(sign, end - start, batch.part(start, end)) for sign, start, end in ranges
                                   if start < end])

        return whole._replace(part=part)


def mirrored_batch(pieces):
    """Meta-batches one after the other, each (sign, functions, meta-batch) in coordinates sign · θ."""
    def loss(params, step):
        losses, start = [], 0
        for sign, functions, batch in pieces:
            own = {name: sign * tensor[start:start + functions] for name, tensor in params.items()}
            losses.append(batch.loss(own, step))
            start += functions
        return torch.cat(losses)

    names = pieces[0][2].params
    return MetaBatch({name: torch.cat([sign * batch.params[name] for sign, _, batch in pieces]) for name in names}, loss)


class ConvexTerms(Variation):
    """The same functions beside an easy one: f(θ) + mean_i (x_i − v_i)², with x_0 and v uniform on [-1, 1].

    Deep networks start with small gradients and little to learn from; the convex term teaches the optimizer, from the
    first window on, to go downhill.

    Args:
        problem: whose functions.
        dim: coordinates of x, positive.

    Example:
        >>> batch = ConvexTerms(Quadratics()).sample(4)

    Reference: Lv, Jiang and Li 2017 (arXiv 1703.03633), section 4.2.
    """

    def __init__(self, problem, dim=20):
        super().__init__(problem)
        check_count(dim=dim)
        self.dim, self.options = dim, dict(dim=dim)
        self.name = f"{self.problem.name or kind_of(self.problem)} and a convex term"

    def to(self, device):
        """The same distribution on another device."""
        return ConvexTerms(self.problem.to(device), self.dim)

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions. Returns `MetaBatch`; x goes by the name "convex"."""
        batch = self.problem.sample(meta_batch, generator=generator)
        if "convex" in batch.params:
            raise ValueError('the problem has a parameter named "convex" already')
        like = next(iter(batch.params.values()))
        start, target = (torch.empty(meta_batch, self.dim, dtype=like.dtype).uniform_(-1, 1, generator=generator)
                         .to(like.device) for _ in range(2))
        return with_convex_term(batch, start, target)


def with_convex_term(batch, start, target):
    """The functions of a meta-batch, each with mean_i (x_i − target_i)² from x = start added to it."""
    def loss(params, step):
        own = {name: tensor for name, tensor in params.items() if name != "convex"}
        return batch.loss(own, step) + (params["convex"] - target).square().mean(1)

    def part(first, last):
        return with_convex_term(batch.part(first, last), start[first:last], target[first:last])

    return MetaBatch({**batch.params, "convex": start}, loss,
                     part if getattr(batch, "part", None) else None)


# each with what makes of an output y and dL/dy the derivative dL/dx
ACTIVATIONS = {"sigmoid": (torch.sigmoid, torch.ops.aten.sigmoid_backward),
               "relu": (torch.relu, lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0)),
               "tanh": (torch.tanh, torch.ops.aten.tanh_backward)}


class ImageNets(Problem):
    """What the networks on images below share: their `options` rebuild them, on another device or split."""

    def to(self, device):
        """The same distribution on another device."""
        return type(self)(**self.options, device=device)

    def with_split(self, split):
        """The same networks over another split of the data."""
        return type(self)(**{**self.options, "split": split}, device=self.device)

    def validation_problem(self):
        """What `meta_train` validates on: the same networks, over images that no training function draws from."""
        return self.with_split("validation")


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

    def __init__(self, hidden_sizes=(20,), activation="sigmoid", batch_size=128, split="train", root=None,
                 init_std=None, side=None, dtype=torch.float32, device="cpu"):
        hidden_sizes = tuple(hidden_sizes)
        batch_size = check_batch_size(batch_size)
        check_count(**{f"hidden_sizes[{k}]": size for k, size in enumerate(hidden_sizes)})
        check_floating(dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        check_split(split)
        if init_std is not None and not (isinstance(init_std, (int, float)) and 0 <= init_std < math.inf):
            raise ValueError(f"init_std must be None or a finite number, at least 0, got {init_std!r}")
        self.options = dict(hidden_sizes=hidden_sizes, activation=activation, batch_size=batch_size, split=split,
                            root=root, init_std=init_std, side=side, dtype=dtype)
        self.device = torch.device(device)
        full = math.isqrt(load_mnist(root).train_images.shape[1])
        if side is not None and not (isinstance(side, int) and 0 < side <= full and full % side == 0):
            raise ValueError(f"side must be None or a divisor of {full}, got {side!r}")
        self.shrinking = full / (side or full)
        self.images, self.labels = split_on_device(split, root, side, dtype, self.device)
        self.sizes = (self.images.shape[1], *hidden_sizes, 10)
        self.name = f"{load_mnist(root).name} {'-'.join(map(str, self.sizes))} {activation}"

    def sample(self, meta_batch, generator=None):
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
                params[name] = draw.to(self.device)
        seed = int(torch.randint(2**62, (), generator=generator))
        images = drawn_batch_size(self.options["batch_size"], generator)
        minibatches = Minibatches(seed, (meta_batch, images), len(self.labels), self.device)

        return in_parts(params, PerceptronLoss(Chosen(self.images, self.labels, minibatches), self.options["activation"]))


class Chosen(NamedTuple):
    """Minibatches of images and labels, of which `index(step)` (B, batch) says which they are at that step."""

    images: torch.Tensor
    labels: torch.Tensor
    index: Callable

    def __call__(self, step):
        """images (B, batch, inputs) and labels (B, batch)"""
        index = self.index(step)
        return chosen(self.images, index), chosen(self.labels, index)


def chosen(rows, index):
    """rows[index], on a CPU in a third of the time."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


def check_batch_size(batch_size):
    """A batch size, or a pair (least, most) of them as a tuple."""
    if not isinstance(batch_size, (tuple, list)):
        check_count(batch_size=batch_size)
        return batch_size
    if len(batch_size) != 2:
        raise ValueError(f"batch_size must be a number or (least, most), got {batch_size!r}")
    least, most = batch_size
    check_count(**{"batch_size[0]": least})
    check_count(least=least, **{"batch_size[1]": most})
    return least, most


def drawn_batch_size(batch_size, generator):
    """That number; of a pair, one between the two, uniform in its logarithm."""
    if isinstance(batch_size, int):
        return batch_size
    least, most = batch_size
    return round(least * (most / least) ** torch.rand((), generator=generator, dtype=torch.float64).item())


class PerceptronLoss(Loss):
    """Mean cross-entropy of B multilayer perceptrons, params weight0 (B, inputs, units), bias0 (B, units), weight1, …

    `minibatch(step)` gives images (B, batch, inputs) and labels (B, batch). activation: a name of `ACTIVATIONS`.
    """

    divisible = True

    def __init__(self, minibatch, activation):
        self.minibatch, self.activation = minibatch, activation

    def __call__(self, params, step):
        images, labels = self.minibatch(step)
        return mean_cross_entropy(self.layers(params, images)[-1], labels)

    def tensors(self, step):
        """What the loss reads at that step: its images and labels."""
        return self.minibatch(step)

    def of(self, tensors):
        """The loss that reads these tensors, at every step."""
        return PerceptronLoss(lambda step: tensors, self.activation)

    def part(self, first, last):
        """The loss of functions first … last - 1."""
        if isinstance(self.minibatch, Chosen):
            index = self.minibatch.index
            return PerceptronLoss(self.minibatch._replace(index=lambda step: index(step)[first:last]), self.activation)
        return PerceptronLoss(lambda step: tuple(part[first:last] for part in self.minibatch(step)), self.activation)

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
        names = [f"{kind}{layer}" for layer in range(len(shapes) // 2) for kind in ("weight", "bias")]
        if not isinstance(self.minibatch, Chosen) or list(shapes) != names:
            return None
        sizes = [self.minibatch.images.shape[1], *(shapes[name][1] for name in names[1::2])]
        return PerceptronData(*self.minibatch, sizes, self.activation)

    def with_vector_gradient(self, theta, shapes, step):
        """`with_gradient` for parameters in one vector, by compiled loops: see `Loss`."""
        data = self.compiled(shapes)
        if data is None or not takes_numba(theta) or data.images.dtype != theta.dtype:
            return None
        return import_module("gradbuffer.kernels.numba_perceptrons").losses_and_gradient(
            data.images, data.labels, data.index(step), theta, data.sizes, data.activation)


def mean_cross_entropy(scores, labels):
    """(B, classes, batch) and (B, batch) -> (B,)"""
    return F.cross_entropy(scores, labels, reduction="none").mean(1)


class CIFAR10Net(ImageNets):
    """A convolutional network on CIFAR-10 from random initial weights: cross-entropy, a fresh minibatch at each step.

    Convolutions of 5×5, each followed by max pooling over 2×2, then a fully connected layer and a linear classifier;
    ReLU and batch normalization throughout. Normalization is by the mean and variance of the minibatch at hand, in
    `test_accuracy` too: a function is its parameters, there are no running statistics. Convolutions and the hidden
    layer have no bias, since normalization takes it out and brings a shift of its own.

    Parameters are named "conv0.weight" (B, channels, 3, 5, 5), "conv0.scale", "conv0.shift" (B, channels), "conv1. …",
    then "fc0.weight" (B, inputs, fc_size), "fc0.scale", "fc0.shift", and "fc1.weight" (B, fc_size, classes),
    "fc1.bias"; weights start as `nn.Conv2d` and `nn.Linear` do, uniform on ±1/√inputs. A `PerKind` optimizer tells the
    two kinds apart by these names.

    The data's splits are as in `MNISTNet`: "train" and "validation" are halves of CIFAR-10's training images by a fixed
    random order. They lie on the device as bytes; a minibatch's pixels are scaled to [-1, 1].

    Args:
        batch_size: images in a minibatch, drawn with replacement; at least 2. Default 128.
        split: "train", "validation" or "test".
        classes: the labels to tell apart, at least two of 0 … 9; default all. Images of other labels are left out, and
            the labels are numbered anew in the order given. For the paper's CIFAR-5 and CIFAR-2, and for an optimizer
            that is trained on held-out labels only (LSTM-sub), train on some labels and test on the others.
        channels: of each convolution, a sequence; default (16, 16, 16), the paper's. Each one halves the image's side.
        fc_size: units of the fully connected layer; positive. Default 32, the paper's.
        root: the data root, see `load_cifar10`; or `ColorImages`, to use those.
        dtype, device: of the parameters.

    Raises:
        ValueError, TypeError: an argument is not as above, or the data are damaged.

    Example:
        >>> from gradbuffer.data.cifar10 import generated_images
        >>> problem = CIFAR10Net(batch_size=16, channels=(4, 4), root=generated_images(200, 50, side=8))
        >>> batch = problem.sample(2, generator=torch.Generator().manual_seed(0))
        >>> batch.loss(batch.params, step=0).shape, problem.test_accuracy(batch.params).shape
        (torch.Size([2]), torch.Size([2]))

    Reference: Andrychowicz et al. 2016, section 3.3. The paper does not say where the convolutions pad: ours keep the
    image's side, as those of its released code do.
    """

    def __init__(self, batch_size=128, split="train", classes=None, channels=(16, 16, 16), fc_size=32, root=None,
                 dtype=torch.float32, device="cpu"):
        channels = tuple(channels) if isinstance(channels, (tuple, list)) else (channels,)
        check_count(fc_size=fc_size, **{f"channels[{k}]": size for k, size in enumerate(channels)})
        check_count(least=2, batch_size=batch_size)  # of one image, batch normalization leaves nothing
        check_floating(dtype)
        check_split(split)
        if classes is not None:
            classes = check_classes(classes)
        self.options = dict(batch_size=batch_size, split=split, classes=classes, channels=channels, fc_size=fc_size,
                            root=root, dtype=dtype)
        self.device = torch.device(device)
        data = root if isinstance(root, ColorImages) else load_cifar10(root)
        check_color_images(data)
        side = data.train_images.shape[-1]
        if not channels or side >> len(channels) < 1:
            raise ValueError(f"channels must be 1 to {side.bit_length() - 1} numbers, each halves the side of {side} "
                             f"pixels; got {channels}")
        self.images, self.labels = color_images_on_device(data, split, classes, self.device)
        self.test_images, self.test_labels = color_images_on_device(data, "test", classes, self.device)
        self.shapes = {}
        for layer, (inputs, outputs) in enumerate(itertools.pairwise((3, *channels))):
            self.shapes |= {f"conv{layer}.weight": (outputs, inputs, 5, 5), f"conv{layer}.scale": (outputs,),
                            f"conv{layer}.shift": (outputs,)}
        features, outputs = channels[-1] * (side >> len(channels)) ** 2, len(classes or range(10))
        self.shapes |= {"fc0.weight": (features, fc_size), "fc0.scale": (fc_size,), "fc0.shift": (fc_size,),
                        "fc1.weight": (fc_size, outputs), "fc1.bias": (outputs,)}
        some = f", labels {' '.join(map(str, classes))}" if classes else ""
        self.name = f"{data.name}{some}, {'-'.join(map(str, channels))} channels and {fc_size} units"

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` networks with their sequences of minibatches. Returns `MetaBatch`."""
        check_count(meta_batch=meta_batch)
        params = {}
        for name, shape in self.shapes.items():
            draw = torch.zeros(meta_batch, *shape, dtype=self.options["dtype"])
            if name.endswith(("weight", "bias")):
                inputs = math.prod(shape[1:]) if name.startswith("conv") else self.shapes[name[:3] + ".weight"][0]
                draw.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            elif name.endswith("scale"):
                draw.fill_(1)
            params[name] = draw.to(self.device)
        seed = int(torch.randint(2**62, (), generator=generator))
        minibatches = Minibatches(seed, (meta_batch, self.options["batch_size"]), len(self.labels), self.device)

        def part(first, last):
            def loss(params, step):
                index = minibatches(step)[first:last]
                labels = self.labels[index]
                scores = function_by_function(params, self.pixels(chosen(self.images, index)))
                return mean_cross_entropy(scores.mT, labels)

            return MetaBatch({name: tensor[first:last] for name, tensor in params.items()}, loss)

        return MetaBatch(params, part(0, meta_batch).loss, part)

    @torch.no_grad()
    def test_accuracy(self, params, images=None):
        """The share of test images that each network classifies rightly. No graph.

        Images go through in chunks of about `batch_size`, the same ones for every network, and are normalized chunk
        by chunk.

        Args:
            params: dict of (B, ...), such as `sample(...).params` or what they have become.
            images: use the first so many of the test images (they lie in a random order), at least 2; default all.

        Returns:
            (B,), in [0, 1], in the parameters' dtype.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in params.items()} if isinstance(params, dict) else {}
        if {name: shape[1:] for name, shape in shapes.items()} != self.shapes:
            raise ValueError(f"params must be this problem's, (B, ...) with ... of {self.shapes}, got "
                             f"{shapes or type(params).__name__}")
        if images is not None:
            check_count(least=2, images=images)
        labels, right = self.test_labels[:images], 0
        chunks = math.ceil(len(labels) / self.options["batch_size"])
        functions = len(params["fc1.bias"])
        for chunk, expected in zip(self.test_images[:images].tensor_split(chunks), labels.tensor_split(chunks)):
            pixels = self.pixels(chunk).expand(functions, *chunk.shape)
            right = right + (function_by_function(params, pixels).argmax(2) == expected).sum(1)
        return right.to(params["fc1.bias"].dtype) / len(labels)

    def pixels(self, images):
        """Bytes -> [-1, 1]"""
        return images.to(self.options["dtype"]).div_(127.5).sub_(1)


def function_by_function(params, x):
    """Scores (B, batch, classes) of B convolutional networks, each on its own images x (B, batch, 3, side, side).

    A GPU runs all networks at once. A CPU takes one after the other: one alone fills it, and a grouped convolution is
    slower than its groups (4 networks of 16 channels, one core: 1.5 times, and twice in second derivatives).
    """
    at_once = 1 if x.device.type == "cpu" else len(x)
    return torch.cat([convolutional_scores({name: tensor[first:first + at_once] for name, tensor in params.items()},
                                           x[first:first + at_once]) for first in range(0, len(x), at_once)])


def convolutional_scores(params, x):
    """The same as one computation: networks lie side by side in the channels, (batch, B · channels, side, side)."""
    functions, batch = x.shape[:2]
    x = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    for layer in range(sum(name.startswith("conv") for name in params) // 3):
        x = F.conv2d(x, params[f"conv{layer}.weight"].flatten(0, 1), padding=2, groups=functions)
        x = normalized(x, params, f"conv{layer}")
        x = F.max_pool2d(x, 2).relu()  # in this order a quarter of the work, and the same
    x = x.reshape(batch, functions, -1).transpose(0, 1) @ params["fc0.weight"]  # (B, batch, fc_size)
    x = normalized(x.transpose(0, 1).flatten(1), params, "fc0").relu()  # (batch, B · fc_size)
    x = x.view(batch, functions, -1).transpose(0, 1)
    return torch.baddbmm(params["fc1.bias"][:, None], x, params["fc1.weight"])


def normalized(x, params, layer):
    """Batch normalization by the minibatch's own mean and variance; x is (batch, B · channels, ...)."""
    scale, shift = (params[f"{layer}.{name}"].flatten() for name in ("scale", "shift"))
    return F.batch_norm(x, None, None, scale, shift, training=True)


def check_classes(classes):
    """A tuple of at least two different labels, or an error."""
    if not isinstance(classes, (tuple, list)):
        raise TypeError(f"classes must be None or a tuple of labels, got {classes!r}")
    check_count(least=0, **{f"classes[{k}]": label for k, label in enumerate(classes)})
    if len(classes) < 2 or len(set(classes)) < len(classes) or max(classes) > 9:
        raise ValueError(f"classes must be at least two different labels of 0 … 9, got {classes!r}")
    return tuple(classes)


class Minibatches:
    """Indices of the minibatch of any step: a function of the seed and the step alone, in whatever order they come."""

    def __init__(self, seed, shape, length, device):
        self.seed, self.shape, self.length, self.device = seed, shape, length, device
        self.drawn = None, None

    def __call__(self, step):
        check_count(least=0, step=step)
        chunk, within = divmod(step, STEPS_PER_DRAW)
        drawn = self.drawn  # other threads may ask for other steps meanwhile
        if drawn[0] != chunk:
            generator = torch.Generator().manual_seed((self.seed + chunk) % 2**63)
            indices = torch.randint(self.length, (STEPS_PER_DRAW, *self.shape), generator=generator)
            self.drawn = drawn = chunk, indices.to(self.device)
        return drawn[1][within]


_on_device = {}


def split_on_device(split, root, side, dtype, device):
    """(images, labels) of a split as tensors on the device, moved there once per process."""
    data = load_mnist(root)
    key = id(data), split, side, dtype, device
    if key not in _on_device:
        images, labels = (data.test_images, data.test_labels) if split == "test" else half(data, split)
        images = images if side is None else averaged(images, side)
        _on_device[key] = images.to(device, dtype), labels.to(device), data  # data kept, so that its id stays its own
    return _on_device[key][:2]


def color_images_on_device(data, split, classes, device):
    """(images, labels) of a split and of these classes as tensors on the device, moved there once per process."""
    key = id(data), split, classes, device
    if key not in _on_device:
        images, labels = (data.test_images, data.test_labels) if split == "test" else half(data, split)
        if classes is not None:
            numbers = torch.full((10,), -1)  # of the labels, in the order of `classes`
            numbers[list(classes)] = torch.arange(len(classes))
            wanted = numbers[labels] >= 0
            images, labels = images[wanted], numbers[labels][wanted]
        if len(labels) < 2:
            raise ValueError(f"{data.name} has {len(labels)} images of classes {classes} in split {split!r}, too few")
        _on_device[key] = images.to(device), labels.to(device), data
    return _on_device[key][:2]


def averaged(images, side):
    """(n, pixels) -> (n, side²): means over blocks, scaled up so that an image's norm stays about what it was."""
    full = math.isqrt(images.shape[1])
    blocks = images.view(-1, side, full // side, side, full // side)
    return blocks.mean((2, 4)).flatten(1) * (full / side)


def half(data, split):
    """One half of the training images, by a fixed random order."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    middle = len(order) // 2
    order = order[:middle] if split == "train" else order[middle:]
    return data.train_images[order], data.train_labels[order]
