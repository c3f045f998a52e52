"""The networks, problems and kinds of kernels that the laws of `test_laws.py` are swept over, all small and in float64."""

import torch

from gradbuffer.data.cifar10 import generated_images
from optimizees import CIFAR10Net, ConvexTerms, Mirrored, MNISTNet, Quadratics, RandomScaling
from optimizers import (
    NTMBFGS,
    CoordinatewiseLSTM,
    LSTMWithGAC,
    MLPOptimizer,
    NormalizedLSTM,
    PerKind,
    RNNProp,
    SubspaceLSTM,
)

VECTORS = (
    "quadratics",
    "scaled",
    "mirrored",
    "convex",
)  # problems without matrices, which some networks leave to AdamW
KERNELS = ("torch", "numba")

NETWORKS = {
    "LSTM": lambda: CoordinatewiseLSTM(3),
    "LSTM, log_sign, odd": lambda: CoordinatewiseLSTM(4, 1, "log_sign", output_scale=0.1, odd=True),
    "LSTM, with_log_size": lambda: CoordinatewiseLSTM(2, 3, "with_log_size", p=4.0, output_scale=-0.2),
    "RNNProp": lambda: RNNProp(3, 1),
    "NormalizedLSTM": lambda: NormalizedLSTM(3, 2, odd=True),
    "GAC": lambda: LSTMWithGAC(4, 1, shared=2),
    "NTM-BFGS": lambda: NTMBFGS(4, 1, shared=1),
    "PerKind": lambda: PerKind(
        {"first": CoordinatewiseLSTM(2, 1, "log_sign", output_scale=0.1), "rest": RNNProp(2, 1)},
        {"*0*": "first", "theta": "first", "*": "rest"},
    ),
    "MLP": lambda: MLPOptimizer((4,), lr=0.01),
    "MLP, orthogonal": lambda: MLPOptimizer((3, 3), orthogonalize=True, weight_decay=0.1, vectors="adamw", lr=0.003),
    "small_fc": lambda: MLPOptimizer((4,), "small_fc", lr=0.001),
    "subspace": lambda: SubspaceLSTM(3, pairs=2),
}

PROBLEMS = {
    "quadratics": lambda root: Quadratics(4, torch.float64),
    "perceptrons": lambda root: MNISTNet((3,), batch_size=6, root=root, side=7, dtype=torch.float64),
    "deep perceptrons": lambda root: MNISTNet(
        (3, 2), "tanh", batch_size=5, root=root, side=4, init_std=0.5, dtype=torch.float64
    ),
    "convolutions": lambda root: CIFAR10Net(
        4, channels=(2,), fc_size=3, root=generated_images(40, 10, side=4), dtype=torch.float64
    ),
    "scaled": lambda root: RandomScaling(Quadratics(3, torch.float64), 0.5, signs=True),
    "mirrored": lambda root: Mirrored(Quadratics(3, torch.float64)),
    "convex": lambda root: ConvexTerms(Quadratics(2, torch.float64), 2),
}


def make_net(name):
    """The network of that name, always with the same weights."""
    torch.manual_seed(5)
    return NETWORKS[name]().double()


def make_batch(name, root, functions=2):
    """Functions of the problem of that name, always the same."""
    return PROBLEMS[name](root).sample(functions, torch.Generator().manual_seed(3))


RESNET18 = [(64, 3, 7, 7), (64,), (64,)]  # the shapes of its parameters
for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
    RESNET18 += [
        (outputs, inputs, 3, 3),
        (outputs,),
        (outputs,),
        *[(outputs, outputs, 3, 3), (outputs,), (outputs,)] * 3,
    ]
    RESNET18 += [(outputs, inputs, 1, 1), (outputs,), (outputs,)] if inputs != outputs else []
RESNET18 += [(1000, 512), (1000,)]
