"""Neural Art as a problem: an image is optimized to have the contents of a photograph and the style of a painting.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 3.4, after Gatys, Ecker and Bethge 2015 (arXiv 1508.06576). Images
come from `art`, the network that looks at them from torchvision's VGG weights or, offline, from random ones.
"""

import functools
import itertools
import math
import socket
import warnings
import weakref

import torch
from torch.nn import functional as F

from gradbuffer.checks import check_count
from gradbuffer.data.art import generated_textures, load_contents, load_style
from gradbuffer.problems.images import ImageNets, check_floating, check_split
from gradbuffer.unrolling import MetaBatch

__all__ = ["NeuralArt", "VGGFeatures", "from_pixels", "to_pixels"]

CONVOLUTIONS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)  # of the five blocks; after each but the last, max pooling
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, what torchvision's weights expect
UNIT = 16 * 16  # pixels: losses are sums over the image in this unit
PATIENCE = 30  # seconds without an answer after which a download counts as offline


def from_pixels(pixels, dtype=torch.float32):
    """Bytes (..., 3, height, width) -> the units that images are optimized in: about zero mean and unit variance."""
    mean, std = (torch.tensor(values, dtype=dtype, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (pixels.to(dtype) / 255 - mean) / std


def to_pixels(images):
    """The way back for figures: images (..., 3, height, width) -> (..., height, width, 3) in [0, 1], cut off there."""
    mean, std = (torch.tensor(values).to(images)[:, None, None] for values in (MEAN, STD))
    return (images.detach() * std + mean).clamp(0, 1).movedim(-3, -1)


class VGGFeatures:
    """The first layers of a VGG network, each scaled so that its features have a mean square of 1.

    The scales come from sixteen generated textures, always the same ones, and are folded into the weights; since ReLU
    and max pooling commute with positive factors, that changes each layer by a factor and nothing else. So the terms
    of a loss that compare features have comparable sizes in all layers, whatever the weights.

    Args:
        network: "vgg11", "vgg13", "vgg16" or "vgg19".
        weights: "imagenet", torchvision's, from torch's hub cache or downloaded into it; "random", drawn from
            N(0, 2 / inputs) with biases of 0 (He et al. 2015); "auto", the former, or the latter with a warning where
            they cannot be had.
        seed: of random weights.
        layers: names such as "relu1_1" (block and convolution, counted from 1), which are returned.
        dtype, device: of the weights and of what comes in.

    Attributes:
        name: which network and weights it really is, for titles: "VGG-16, random weights (seed 0)".

    Raises:
        ValueError: an argument is not as above, or the file in torch's cache is damaged.
        ConnectionError: weights="imagenet" cannot be downloaded.

    Example:
        >>> features = VGGFeatures("vgg16", "random", layers=("relu1_1", "relu2_2"))
        >>> features(torch.randn(2, 3, 32, 32))["relu2_2"].shape
        torch.Size([2, 128, 16, 16])

    Reference: Simonyan and Zisserman 2014 (arXiv 1409.1556); random weights: He, Wang and Hopcroft 2016
    (arXiv 1606.04801).
    """

    def __init__(self, network="vgg16", weights="auto", seed=0, layers=("relu1_1",), dtype=torch.float32, device="cpu"):
        if network not in CONVOLUTIONS:
            raise ValueError(f"network must be one of {sorted(CONVOLUTIONS)}, got {network!r}")
        if weights not in ("auto", "imagenet", "random"):
            raise ValueError(f'weights must be "auto", "imagenet" or "random", got {weights!r}')
        check_count(least=0, seed=seed)
        known = [f"relu{block}_{number}" for block, count in enumerate(CONVOLUTIONS[network], 1)
                 for number in range(1, count + 1)]
        for layer in layers:
            if layer not in known:
                raise ValueError(f"layers of {network} must be of {known}, got {layer!r}")
        self.layers = frozenset(layers)
        deepest = max(known.index(layer) for layer in layers)
        self.name, convolutions = scaled_convolutions(network, weights, seed, deepest + 1)
        self.convolutions = {layer: tuple(tensor.to(device, dtype) for tensor in pair)
                             for layer, pair in convolutions.items()}

    def __call__(self, images):
        """Images (B, 3, height, width) -> dict from layer to features (B, channels, …); carries a graph."""
        features, images = {}, images.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        for layer, (weight, bias) in self.convolutions.items():
            images = through(layer, images, weight, bias)
            if layer in self.layers:
                features[layer] = images
        return features


def through(layer, images, weight, bias):
    """One convolution, with the pooling before it where a block begins."""
    if layer.endswith("_1") and layer != "relu1_1":
        images = F.max_pool2d(images, 2)
    return F.conv2d(images, weight, bias, padding=1).relu()


@functools.lru_cache(maxsize=4)
def scaled_convolutions(network, weights, seed, count):
    """(what it is, dict from layer to (weight, bias)) of the first `count`, with features of mean square 1."""
    title, state = f"VGG-{network[3:]}", None
    if weights != "random":
        try:
            state, title = imagenet_weights(network, count), f"{title}, ImageNet weights"
        except ConnectionError as error:
            if weights == "imagenet":
                raise
            warnings.warn(f"{error}. Neural Art uses the features of a {title} with random weights instead.",
                          stacklevel=4)
    if state is None:
        state, title = random_weights(network, seed, count), f"{title}, random weights (seed {seed})"
    images, total, scaled = from_pixels(generated_textures(16, 64)), 1.0, {}
    for layer, (weight, bias) in state.items():
        scale = through(layer, images, weight, bias / total).square().mean().sqrt().item()
        total *= scale  # what all layers so far were divided by
        scaled[layer] = weight.contiguous(memory_format=torch.channels_last) / scale, bias / total
        images = through(layer, images, *scaled[layer])
    return title, scaled


def shapes(network):
    """(layer, channels in, channels out, index of the convolution in torchvision's `features`) of each convolution."""
    channels, place = 3, 0
    for block, count in enumerate(CONVOLUTIONS[network]):
        for number in range(count):
            yield f"relu{block + 1}_{number + 1}", channels, CHANNELS[block], place
            channels, place = CHANNELS[block], place + 2
        place += 1


def random_weights(network, seed, count):
    generator, state = torch.Generator().manual_seed(seed), {}
    for layer, inputs, outputs, _ in itertools.islice(shapes(network), count):
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
        state[layer] = weight * (2 / (9 * inputs)) ** 0.5, torch.zeros(outputs)
    return state


def imagenet_weights(network, count):
    """dict from layer to (weight, bias). Raises ConnectionError where there is no network, ValueError on damage."""
    from torchvision.models import get_model_weights

    from resnet_meta import load_checkpoint

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        checkpoint = load_checkpoint(get_model_weights(network)["IMAGENET1K_V1"], progress=True)
    finally:
        socket.setdefaulttimeout(patience)
    return {layer: (checkpoint[f"features.{place}.weight"], checkpoint[f"features.{place}.bias"])
            for layer, _, _, place in itertools.islice(shapes(network), count)}


class NeuralArt(ImageNets):
    """Style transfer: f(θ) = α · content + β · style + γ · smoothness of an image θ, one function for each photograph.

    With features F(θ) of a VGG network (see `VGGFeatures` for how they are scaled):

    - content: mean squared difference of F(θ) and F(photograph) at one layer;
    - style: mean squared difference of the Gram matrices FᵀF / positions of θ and of the style image, averaged over
      several layers;
    - smoothness: total variation in its quadratic form, the mean squared difference of neighbouring pixels.

    The sum is multiplied by size² / 16², so that a pixel's gradient does not depend on how large the image is. Pixels
    are in the units that VGG takes, about zero mean and unit variance, and free to leave the range of colors; an update
    of 0.1 is a visible one, and an optimizer needs no output scaling (output_scale=1). Their gradients are small, 1e-3
    to 1, and fall by orders of magnitude on the way: preprocess="log_sign". A function is the same at every step.

    Args:
        style: name of the style image, see `load_style`.
        split: "train", "validation" or "test": which photographs, see `load_contents`. Training functions are drawn
            with replacement; the others are dealt, so that a generator meets all of them before any comes again.
        size: pixels of photographs, style and θ in each direction; at least 16.
        root: the data root, see `load_contents`.
        start: "content", θ_0 is the photograph; or "noise", θ_0 from N(0, 1). The paper does not say; Gatys et al.
            use noise.
        network, weights, seed: which features, see `VGGFeatures`.
        content_layer, style_layers: where contents and styles are compared; names such as "relu2_1".
        alpha, beta, gamma: weights of the three terms, at least 0.
        dtype, device: of images and network.

    Attributes:
        name: style, photographs, size and features, for titles. `features` (its `name` alone: `features.name`) says
            whether its weights are random.
        contents: (n, 3, size, size), all photographs of the split; `style_image` (3, size, size).

    Raises:
        ValueError, TypeError: an argument is not as above, or the data are damaged or too small.
        ConnectionError: weights="imagenet" cannot be had.

    Example:
        >>> problem = NeuralArt(size=16, weights="random", split="test")
        >>> batch = problem.sample(2, generator=torch.Generator().manual_seed(0))
        >>> batch.params["image"].shape, batch.loss(batch.params, step=0).shape
        (torch.Size([2, 3, 16, 16]), torch.Size([2]))

    Reference: Andrychowicz et al. 2016, section 3.4.
    """

    def __init__(self, style="starry_night", split="train", size=64, root=None, *, start="content", network="vgg16",
                 weights="auto", seed=0, content_layer="relu2_2", style_layers=("relu1_1", "relu2_1", "relu3_1"),
                 alpha=1.0, beta=10.0, gamma=0.1, dtype=torch.float32, device="cpu"):
        check_split(split)
        check_count(least=16, size=size)
        check_floating(dtype)
        if start not in ("content", "noise"):
            raise ValueError(f'start must be "content" or "noise", got {start!r}')
        if not isinstance(style_layers, (tuple, list)) or not style_layers:
            raise ValueError(f"style_layers must be a tuple of at least one layer's name, got {style_layers!r}")
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number, at least 0, got {value!r}")
        self.options = dict(style=style, split=split, size=size, root=root, start=start, network=network,
                            weights=weights, seed=seed, content_layer=content_layer, style_layers=tuple(style_layers),
                            alpha=alpha, beta=beta, gamma=gamma, dtype=dtype)
        self.device = torch.device(device)
        self.features = VGGFeatures(network, weights, seed, (content_layer, *style_layers), dtype, device)
        contents, painting = load_contents(root, split, size), load_style(root, style, size)
        self.contents = from_pixels(contents.images.to(device), dtype)
        self.style_image = from_pixels(painting.images[0].to(device), dtype)
        with torch.no_grad():
            self.grams = {layer: gram(features) for layer, features in self.features(self.style_image[None]).items()
                          if layer in style_layers}
        self.name = f"Neural Art, {painting.name} on {contents.name} of {size}×{size}, {self.features.name}"
        self.dealt = weakref.WeakKeyDictionary()  # generator -> (its state since, photographs still to come)

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` photographs. Returns `MetaBatch` with `params["image"]`, (meta_batch, 3, size, size)."""
        check_count(meta_batch=meta_batch)
        if self.options["split"] == "train":
            index = torch.randint(len(self.contents), (meta_batch,), generator=generator)
        else:
            index = self.deal(meta_batch, generator)
        contents = self.contents[index.to(self.device)]
        start = contents.clone()
        if self.options["start"] == "noise":
            start = torch.randn(start.shape, dtype=start.dtype, generator=generator).to(self.device)
        with torch.no_grad():
            targets = self.features(contents)[self.options["content_layer"]]
        if generator in self.dealt:
            self.dealt[generator] = generator.get_state(), self.dealt[generator][1]

        def part(first, last):
            def loss(params, step):
                return self.losses(params["image"], targets[first:last])

            return MetaBatch({"image": start[first:last]}, loss)

        return MetaBatch({"image": start}, part(0, meta_batch).loss, part)

    def deal(self, count, generator):
        """Indices of the next photographs in a random order that goes on from call to call with the same generator.

        It starts anew with a generator that has been seeded, or drawn from, since the last call.
        """
        state, left = self.dealt.get(generator, (None, None)) if generator is not None else (None, None)
        if state is None or not torch.equal(state, generator.get_state()):
            left = torch.empty(0, dtype=torch.long)
        while len(left) < count:
            left = torch.cat([left, torch.randperm(len(self.contents), generator=generator)])
        if generator is not None:
            self.dealt[generator] = generator.get_state(), left[count:]
        return left[:count]

    def losses(self, images, targets):
        """Losses (B,) of images (B, 3, size, size) whose contents' features are `targets`; carries a graph."""
        features, options = self.features(images), self.options
        content = (features[options["content_layer"]] - targets).square().mean((1, 2, 3))
        style = sum((gram(features[layer]) - target).square().mean((1, 2)) for layer, target in self.grams.items())
        rough = images.diff(dim=2).square().mean((1, 2, 3)) + images.diff(dim=3).square().mean((1, 2, 3))
        loss = options["alpha"] * content + options["beta"] / len(self.grams) * style + options["gamma"] * rough
        return loss * (options["size"] ** 2 / UNIT)


def gram(features):
    """(B, channels, height, width) -> (B, channels, channels), means over positions."""
    columns = features.permute(0, 2, 3, 1).flatten(1, 2)  # (B, positions, channels)
    return columns.mT @ columns / columns.shape[1]
