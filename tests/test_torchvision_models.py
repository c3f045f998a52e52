"""`to_meta` on torchvision's models: eval outputs equal to the last bit, strict loading both ways.

All classification models, a sample of segmentation, detection and video. Initialization is replaced by cheap noise
(torchvision's own takes minutes for all 80) and images are as small as each model accepts; nothing else is changed.
"""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from meta_module import MetaModule, to_meta

torchvision = pytest.importorskip("torchvision")
models = torchvision.models

CLASSIFICATION = models.list_models(module=models)
SEGMENTATION = ("fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("r3d_18",)
DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssdlite320_mobilenet_v3_large",
)
COPIED_UP_TO = 50e6  # parameters; larger models are converted in place, since a copy of 2.5 GB shows nothing new
INITIALIZERS = ("trunc_normal_", "normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "uniform_")


def arguments_and_input(name):
    if name in SEGMENTATION:
        return dict(weights_backbone=None), torch.randn(1, 3, 32, 32)
    if name in DETECTION:
        size = {} if name.startswith("ssd") else dict(min_size=64, max_size=64)
        return dict(weights_backbone=None, **size), [torch.rand(3, 64, 64)]
    if name in VIDEO:
        return {}, torch.randn(1, 3, 4, 32, 32)
    if name.startswith("vit"):
        size = 2 * int(name.split("_")[-1])
        return dict(image_size=size), torch.randn(1, 3, size, size)
    size = {"maxvit_t": 224, "inception_v3": 75, "alexnet": 63}.get(name, 32)
    return {}, torch.randn(1, 3, size, size)


@pytest.fixture(scope="module")
def noise():
    return torch.rand(2**20, generator=torch.Generator().manual_seed(0)).sub_(0.5).mul_(0.1)


@torch.no_grad()
def fill(model, noise):
    """Cheap values without a pattern a model could see: a period of 2**20 entries."""
    for parameter in model.parameters():
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            flat[start : start + noise.numel()] = noise[: flat.numel() - start]


@pytest.mark.parametrize("name", [*CLASSIFICATION, *SEGMENTATION, *DETECTION, *VIDEO])
@pytest.mark.filterwarnings("ignore")
def test_to_meta_of_a_torchvision_model(name, noise, monkeypatch):
    for initializer in INITIALIZERS:
        monkeypatch.setattr(nn.init, initializer, lambda tensor, *args, **kwargs: tensor)
    torch.manual_seed(0)
    arguments, given = arguments_and_input(name)
    plain = models.get_model(name, weights=None, **arguments).eval()
    fill(plain, noise)
    state = plain.state_dict()
    names = [[n for n, _ in kind] for kind in (plain.named_parameters(), plain.named_buffers())]
    plain_class = type(plain)
    with torch.no_grad():
        expected = tree_leaves(plain(given))
    assert all(t.isfinite().all() for t in expected)

    meta = to_meta(plain, inplace=sum(t.numel() for t in state.values()) > COPIED_UP_TO)
    assert isinstance(meta, MetaModule) and isinstance(meta, plain_class)
    assert [[n for n, _ in kind] for kind in (meta.named_parameters(), meta.named_buffers())] == names
    assert not any(vars(part)["_parameters"] for part in meta.modules())
    with torch.no_grad():
        found = tree_leaves(meta(given))
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))

    assert list(meta.state_dict()) == list(state)
    meta.load_state_dict(state, strict=True)
    empty = models.get_model(name, weights=None, **arguments)
    empty.load_state_dict(meta.state_dict(), strict=True, assign=True)
