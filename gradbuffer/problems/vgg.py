"""What a VGG network sees in an image: features of its first layers, with torchvision's weights or, offline, random ones.

Simonyan and Zisserman 2014 (arXiv 1409.1556). Nothing but convolutions, ReLU and max pooling is needed, so that
torchvision is for its weights alone.
"""

import functools
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from gradbuffer.checks import check_count
from gradbuffer.data.art import generated_textures
from gradbuffer.data.roots import patience
from gradbuffer.devices import drawn_on_cpu

__all__ = ["VGGFeatures", "from_pixels", "to_pixels"]

CONVOLUTIONS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)  # of the five blocks; after each but the last, max pooling
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, what torchvision's weights expect


def from_pixels(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bytes (..., 3, height, width) -> the units that images are optimized in: about zero mean and unit variance."""
    mean, std = (torch.tensor(values, dtype=dtype, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (pixels.to(dtype) / 255 - mean) / std


def to_pixels(images: torch.Tensor) -> torch.Tensor:
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
        ConnectionError: weights="imagenet" cannot be downloaded; ImportError: torchvision is not installed.

    Example:
        >>> features = VGGFeatures("vgg16", "random", layers=("relu1_1", "relu2_2"))
        >>> features(torch.randn(2, 3, 32, 32))["relu2_2"].shape
        torch.Size([2, 128, 16, 16])

    Reference: Simonyan and Zisserman 2014 (arXiv 1409.1556); random weights: He, Wang and Hopcroft 2016
    (arXiv 1606.04801).
    """

    def __init__(
        self,
        network: str = "vgg16",
        weights: str = "auto",
        seed: int = 0,
        layers: Sequence[str] = ("relu1_1",),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if network not in CONVOLUTIONS:
            raise ValueError(f"network must be one of {sorted(CONVOLUTIONS)}, got {network!r}")
        if weights not in ("auto", "imagenet", "random"):
            raise ValueError(f'weights must be "auto", "imagenet" or "random", got {weights!r}')
        check_count(least=0, seed=seed)
        known = [
            f"relu{block}_{number}"
            for block, count in enumerate(CONVOLUTIONS[network], 1)
            for number in range(1, count + 1)
        ]
        for layer in layers:
            if layer not in known:
                raise ValueError(f"layers of {network} must be of {known}, got {layer!r}")
        self.layers = frozenset(layers)
        deepest = max(known.index(layer) for layer in layers)
        self.name, convolutions = scaled_convolutions(network, weights, seed, deepest + 1)
        self.convolutions = {
            layer: tuple(tensor.to(device, dtype) for tensor in pair) for layer, pair in convolutions.items()
        }

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
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
@drawn_on_cpu
def scaled_convolutions(network, weights, seed, count):
    """(what it is, dict from layer to (weight, bias)) of the first `count`, with features of mean square 1."""
    title, state = f"VGG-{network[3:]}", None
    if weights != "random":
        try:
            state, title = imagenet_weights(network, count), f"{title}, ImageNet weights"
        except (ConnectionError, ImportError) as error:
            if weights == "imagenet":
                raise
            warnings.warn(
                f"{error}. Neural Art uses the features of a {title} with random weights instead.", stacklevel=4
            )
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

    weights = get_model_weights(network)["IMAGENET1K_V1"]
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    cached = path.exists()
    try:
        with patience():
            checkpoint = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
        return {
            layer: (checkpoint[f"features.{place}.weight"], checkpoint[f"features.{place}.bias"])
            for layer, _, _, place in itertools.islice(shapes(network), count)
        }
    except Exception as error:  # a damaged pickle may raise anything
        if isinstance(error, OSError) and not cached:  # urllib's URLError is one
            raise ConnectionError(
                f"{weights} could not be downloaded ({error}); download {weights.url} where there is a "
                f"network and put it at {path}"
            ) from error
        raise ValueError(
            f"{path} cannot be read: truncated, or no checkpoint of {network}; delete it and download "
            f"{weights.url} again"
        ) from error
