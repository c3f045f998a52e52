"""torchvision's nine ResNets as meta-modules, with their pretrained weights.

Built by torchvision's own builders and converted by `meta_module.to_meta`: layers, initialization, `forward`, names and
checkpoints are torchvision's, and every parameter can carry a graph. No architecture is defined here.

Reference: He et al. 2016 (arXiv 1512.03385); Xie et al. 2017 (1611.05431); Zagoruyko and Komodakis 2016 (1605.07146).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torchvision
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights

from meta_module import MetaModule, to_meta

__all__ = [
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


class ResNet(MetaModule, torchvision.models.ResNet):
    """`torchvision.models.ResNet` with meta-parameters; same arguments."""

    @functools.wraps(torchvision.models.ResNet.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        to_meta(self, inplace=True)


def _build(name: str, weights, progress: bool, pretrained: bool | None, kwargs: dict[str, Any]) -> ResNet:
    weights, state = _weights_of(name, weights, pretrained), None
    if weights is not None:
        classes = len(weights.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(f"num_classes is {kwargs['num_classes']}; {weights} has {classes}, load it and replace fc")
        state = load_checkpoint(weights, progress)
    model = to_meta(get_model_builder(name)(weights=None, **kwargs), inplace=True)
    model.__class__ = ResNet  # the class to_meta makes on the spot, by a name that can be imported and subclassed
    if state is not None:
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{_path_of(weights)} is not a checkpoint of {name}: {error}") from error
    return model


def _weights_of(name: str, weights, pretrained: bool | None) -> WeightsEnum | None:
    known = get_model_weights(name)
    if isinstance(weights, bool):  # resnet50(True), torchvision's first signature
        weights, pretrained = None, weights
    if pretrained is not None and not isinstance(pretrained, bool):
        raise TypeError(f"pretrained is {pretrained!r}; True or False is accepted")
    if pretrained and weights is not None:
        raise ValueError(
            f"pretrained=True means weights='IMAGENET1K_V1', but weights is {weights!r}; give one of the two"
        )
    if pretrained:
        return known["IMAGENET1K_V1"]
    accepted = f"{', '.join(repr(member) for member in known.__members__)}, a member of {known.__name__}, or None"
    if weights is None or isinstance(weights, known):
        return weights
    if isinstance(weights, WeightsEnum):
        raise TypeError(f"weights is {weights}; {name} accepts {accepted}")
    if not isinstance(weights, str):
        raise TypeError(f"weights is {type(weights).__name__}; {name} accepts {accepted}")
    short = weights.removeprefix(f"{known.__name__}.")
    if short not in known.__members__:
        raise ValueError(f"weights is {weights!r}; {name} accepts {accepted}")
    return known[short]


def _path_of(weights: WeightsEnum) -> str:
    return os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))


def load_checkpoint(weights: WeightsEnum, progress: bool) -> dict[str, torch.Tensor]:
    """The checkpoint in torch's hub cache, downloaded into it if it is not there."""
    path = _path_of(weights)
    cached = os.path.exists(path)
    try:
        return weights.get_state_dict(progress=progress, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        if cached:
            raise ValueError(
                f"{path} cannot be read: truncated, or no checkpoint; delete it and download {weights.url} again"
            ) from error
        if isinstance(error, OSError):  # urllib's URLError is one
            raise ConnectionError(
                f"{weights} could not be downloaded ({error}); download {weights.url} where there is a network "
                f"and put it at {path}"
            ) from error
        raise ValueError(f"what was downloaded from {weights.url} is not the checkpoint: {error}") from error


def _factory(name: str):
    def build(weights=None, progress: bool = True, *, pretrained: bool | None = None, **kwargs) -> ResNet:
        return _build(name, weights, progress, pretrained, kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Return torchvision's `{name}` as a meta-module; its parameters are leaves.

    Args:
        weights: None (random initialization, torchvision's under the same seed), a name such as "IMAGENET1K_V1" or
            "DEFAULT", or a member of `torchvision.models.{get_model_weights(name).__name__}`.
        progress: show a bar while downloading (default: true).
        pretrained: True means weights="IMAGENET1K_V1".
        kwargs: those of torchvision: num_classes, zero_init_residual, replace_stride_with_dilation, norm_layer, ...

    Raises:
        ValueError: unknown weights, num_classes other than the weights', or an unreadable or wrong checkpoint.
        TypeError: weights of another model or type.
        ConnectionError: the weights are not in torch's hub cache and cannot be downloaded.

    >>> model = {name}(num_classes=10)
    >>> type(model).__name__, type(model.fc).__name__
    ('ResNet', 'MetaLinear')
    """
    return build


resnet18 = _factory("resnet18")
resnet34 = _factory("resnet34")
resnet50 = _factory("resnet50")
resnet101 = _factory("resnet101")
resnet152 = _factory("resnet152")
resnext50_32x4d = _factory("resnext50_32x4d")
resnext101_32x8d = _factory("resnext101_32x8d")
wide_resnet50_2 = _factory("wide_resnet50_2")
wide_resnet101_2 = _factory("wide_resnet101_2")
