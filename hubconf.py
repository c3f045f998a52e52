"""Entry points of `torch.hub.load(<this repository>, "resnet50", weights="DEFAULT")`: the meta-ResNets."""

dependencies = ["torch", "torchvision"]

from resnet_meta import (  # noqa: E402, F401  (torch.hub reads `dependencies` before it imports)
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)
