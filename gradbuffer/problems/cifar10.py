"""Convolutional networks on CIFAR-10 as a problem: Andrychowicz et al. 2016 (arXiv 1606.04474), section 3.3."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from gradbuffer.checks import check_count
from gradbuffer.contracts import MetaBatch, in_parts
from gradbuffer.data.cifar10 import ColorImages, check_color_images, load_cifar10
from gradbuffer.data.roots import check_split
from gradbuffer.devices import bring, drawn_on_cpu, whole_device
from gradbuffer.problems.images import ImageNets, MinibatchLoss, check_floating, mean_cross_entropy, on_device

__all__ = ["CIFAR10Net"]


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

    def __init__(
        self,
        batch_size: int = 128,
        split: str = "train",
        classes: Sequence[int] | None = None,
        channels: int | Sequence[int] = (16, 16, 16),
        fc_size: int = 32,
        root: str | Path | ColorImages | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        channels = tuple(channels) if isinstance(channels, (tuple, list)) else (channels,)
        check_count(fc_size=fc_size, **{f"channels[{k}]": size for k, size in enumerate(channels)})
        check_count(least=2, batch_size=batch_size)  # of one image, batch normalization leaves nothing
        check_floating(dtype)
        check_split(split)
        if classes is not None:
            classes = check_classes(classes)
        self.options = dict(
            batch_size=batch_size,
            split=split,
            classes=classes,
            channels=channels,
            fc_size=fc_size,
            root=root,
            dtype=dtype,
        )
        self.device = whole_device(device)
        data = root if isinstance(root, ColorImages) else load_cifar10(root)
        check_color_images(data)
        side = data.train_images.shape[-1]
        if not channels or side >> len(channels) < 1:
            raise ValueError(
                f"channels must be 1 to {side.bit_length() - 1} numbers, each halves the side of {side} "
                f"pixels; got {channels}"
            )
        for name in (split, "test"):
            images, labels = on_device(data, name, self.device, of_classes, classes)
            if len(labels) < 2:
                raise ValueError(
                    f"{data.name} has {len(labels)} images of classes {classes} in split {name!r}, too few"
                )
        self.test_images, self.test_labels = images, labels
        self.images, self.labels = on_device(data, split, self.device, of_classes, classes)
        self.shapes = {}
        for layer, (inputs, outputs) in enumerate(itertools.pairwise((3, *channels))):
            self.shapes |= {
                f"conv{layer}.weight": (outputs, inputs, 5, 5),
                f"conv{layer}.scale": (outputs,),
                f"conv{layer}.shift": (outputs,),
            }
        features, outputs = channels[-1] * (side >> len(channels)) ** 2, len(classes or range(10))
        self.shapes |= {
            "fc0.weight": (features, fc_size),
            "fc0.scale": (fc_size,),
            "fc0.shift": (fc_size,),
            "fc1.weight": (fc_size, outputs),
            "fc1.bias": (outputs,),
        }
        some = f", labels {' '.join(map(str, classes))}" if classes else ""
        self.name = f"{data.name}{some}, {'-'.join(map(str, channels))} channels and {fc_size} units"

    @drawn_on_cpu
    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> MetaBatch:
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
            params[name] = bring(draw, self.device)
        return in_parts(params, ConvolutionalLoss(self.minibatches(meta_batch, generator), self.options["dtype"]))

    @torch.no_grad()
    def test_accuracy(self, params: dict[str, torch.Tensor], images: int | None = None) -> torch.Tensor:
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
            raise ValueError(
                f"params must be this problem's, (B, ...) with ... of {self.shapes}, got "
                f"{shapes or type(params).__name__}"
            )
        if images is not None:
            check_count(least=2, images=images)
        labels, right = self.test_labels[:images], 0
        chunks = math.ceil(len(labels) / self.options["batch_size"])
        functions = len(params["fc1.bias"])
        for chunk, expected in zip(self.test_images[:images].tensor_split(chunks), labels.tensor_split(chunks)):
            inputs = pixels(chunk, self.options["dtype"]).expand(functions, *chunk.shape)
            right = right + (function_by_function(params, inputs).argmax(2) == expected).sum(1)
        return right.to(params["fc1.bias"].dtype) / len(labels)


class ConvolutionalLoss(MinibatchLoss):
    """Mean cross-entropy of B convolutional networks; dtype: of the parameters."""

    def __init__(self, minibatch, dtype):
        super().__init__(minibatch)
        self.dtype = dtype

    def __call__(self, params, step):
        images, labels = self.minibatch(step)
        return mean_cross_entropy(function_by_function(params, pixels(images, self.dtype)).mT, labels)


def pixels(images, dtype):
    """Bytes -> [-1, 1]"""
    return images.to(dtype).div_(127.5).sub_(1)


def function_by_function(params, x):
    """Scores (B, batch, classes) of B convolutional networks, each on its own images x (B, batch, 3, side, side).

    A GPU runs all networks at once. A CPU takes one after the other: one alone fills it, and a grouped convolution is
    slower than its groups (4 networks of 16 channels, one core: 1.5 times, and twice in second derivatives).
    """
    at_once = 1 if x.device.type == "cpu" else len(x)
    return torch.cat(
        [
            convolutional_scores(
                {name: tensor[first : first + at_once] for name, tensor in params.items()}, x[first : first + at_once]
            )
            for first in range(0, len(x), at_once)
        ]
    )


def convolutional_scores(params, x):
    """The same as one computation: networks lie side by side in the channels, (batch, B · channels, side, side)."""
    functions, batch = x.shape[:2]
    x = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    for layer in range(sum(name.startswith("conv") for name in params) // 3):
        x = F.conv2d(x, params[f"conv{layer}.weight"].flatten(0, 1), padding=2, groups=functions)
        x = normalize(x, params, f"conv{layer}")
        x = F.max_pool2d(x, 2).relu()  # in this order a quarter of the work, and the same
    x = x.reshape(batch, functions, -1).transpose(0, 1) @ params["fc0.weight"]  # (B, batch, fc_size)
    x = normalize(x.transpose(0, 1).flatten(1), params, "fc0").relu()  # (batch, B · fc_size)
    x = x.view(batch, functions, -1).transpose(0, 1)
    return torch.baddbmm(params["fc1.bias"][:, None], x, params["fc1.weight"])


def normalize(x, params, layer):
    """Batch normalization by the minibatch's own mean and variance; x is (batch, B · channels, ...)."""
    scale, shift = (params[f"{layer}.{name}"].flatten() for name in ("scale", "shift"))
    return F.batch_norm(x, None, None, scale, shift, training=True)


def of_classes(images, labels, classes):
    """The images of these classes, and their labels' places among them."""
    if classes is None:
        return images, labels
    places = torch.full((10,), -1)
    places[list(classes)] = torch.arange(len(classes))
    wanted = places[labels] >= 0
    return images[wanted], places[labels][wanted]


def check_classes(classes):
    """A tuple of at least two different labels, or an error."""
    if not isinstance(classes, (tuple, list)):
        raise TypeError(f"classes must be None or a tuple of labels, got {classes!r}")
    check_count(least=0, **{f"classes[{k}]": label for k, label in enumerate(classes)})
    if len(classes) < 2 or len(set(classes)) < len(classes) or max(classes) > 9:
        raise ValueError(f"classes must be at least two different labels of 0 … 9, got {classes!r}")
    return tuple(classes)
