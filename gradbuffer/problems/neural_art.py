"""Neural Art as a problem: an image is optimized to have the contents of a photograph and the style of a painting.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 3.4, after Gatys, Ecker and Bethge 2015 (arXiv 1508.06576). Images
come from `data.art`, the network that looks at them from `vgg`.
"""

import math
import weakref
from pathlib import Path
from typing import Any

import torch

from gradbuffer.checks import check_count
from gradbuffer.contracts import Loss, MetaBatch, in_parts
from gradbuffer.data.art import load_contents, load_style
from gradbuffer.data.roots import check_split
from gradbuffer.devices import bring, drawn_on_cpu, whole_device
from gradbuffer.problems.images import ImageNets, check_floating
from gradbuffer.problems.vgg import VGGFeatures, from_pixels

__all__ = ["NeuralArt"]

UNIT = 16 * 16  # pixels: losses are sums over the image in this unit


DEFAULTS = dict(
    network="vgg16",
    weights="auto",
    seed=0,
    content_layer="relu2_2",
    style_layers=("relu1_1", "relu2_1", "relu3_1"),
    alpha=1.0,
    beta=10.0,
    gamma=0.1,
)


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

    def __init__(
        self,
        style: str = "starry_night",
        split: str = "train",
        size: int = 64,
        root: str | Path | None = None,
        *,
        start: str = "content",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **features_and_factors: Any,
    ):
        chosen = DEFAULTS | features_and_factors
        unknown = sorted(chosen.keys() - DEFAULTS.keys())
        if unknown:
            raise TypeError(f"NeuralArt got unexpected keyword arguments {unknown}; there are {sorted(DEFAULTS)}")
        network, weights, seed, content_layer, style_layers, alpha, beta, gamma = chosen.values()
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
        self.options = dict(
            style=style,
            split=split,
            size=size,
            root=root,
            start=start,
            network=network,
            weights=weights,
            seed=seed,
            content_layer=content_layer,
            style_layers=tuple(style_layers),
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            dtype=dtype,
        )
        self.device = device = whole_device(device)
        self.features = VGGFeatures(network, weights, seed, (content_layer, *style_layers), dtype, device)
        contents, painting = load_contents(root, split, size), load_style(root, style, size)
        self.contents = from_pixels(contents.images.to(device), dtype)
        self.style_image = from_pixels(painting.images[0].to(device), dtype)
        with torch.no_grad():
            self.grams = {
                layer: gram(features)
                for layer, features in self.features(self.style_image[None]).items()
                if layer in style_layers
            }
        self.name = f"Neural Art, {painting.name} on {contents.name} of {size}×{size}, {self.features.name}"
        self.dealt = weakref.WeakKeyDictionary()  # generator -> (its state since, photographs still to come)

    @drawn_on_cpu
    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> MetaBatch:
        """Draw `meta_batch` photographs. Returns `MetaBatch` with `params["image"]`, (meta_batch, 3, size, size)."""
        check_count(meta_batch=meta_batch)
        if self.options["split"] == "train":
            index = torch.randint(len(self.contents), (meta_batch,), generator=generator)
        else:
            index = self.deal(meta_batch, generator)
        contents = self.contents[bring(index, self.device)]
        start = contents.clone()
        if self.options["start"] == "noise":
            start = bring(torch.randn(start.shape, dtype=start.dtype, generator=generator), self.device)
        with torch.no_grad():
            targets = self.features(contents)[self.options["content_layer"]]
        if generator in self.dealt:
            self.dealt[generator] = generator.get_state(), self.dealt[generator][1]

        return in_parts({"image": start}, ArtLoss(self, targets))

    def deal(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
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

    def losses(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses (B,) of images (B, 3, size, size) whose contents' features are `targets`; carries a graph."""
        features, options = self.features(images), self.options
        content = (features[options["content_layer"]] - targets).square().mean((1, 2, 3))
        style = sum((gram(features[layer]) - target).square().mean((1, 2)) for layer, target in self.grams.items())
        rough = images.diff(dim=2).square().mean((1, 2, 3)) + images.diff(dim=3).square().mean((1, 2, 3))
        loss = options["alpha"] * content + options["beta"] / len(self.grams) * style + options["gamma"] * rough
        return loss * (options["size"] ** 2 / UNIT)


class ArtLoss(Loss):
    """The losses of images whose contents' features are `targets`, the same at every step."""

    divisible = True

    def __init__(self, problem, targets):
        self.problem, self.targets = problem, targets

    def __call__(self, params, step):
        return self.problem.losses(params["image"], self.targets)

    def part(self, first, last):
        return ArtLoss(self.problem, self.targets[first:last])

    def tensors(self, step):
        return (self.targets,)

    def of(self, tensors):
        return ArtLoss(self.problem, *tensors)


def gram(features):
    """(B, channels, height, width) -> (B, channels, channels), means over positions."""
    columns = features.permute(0, 2, 3, 1).flatten(1, 2)  # (B, positions, channels)
    return columns.mT @ columns / columns.shape[1]
