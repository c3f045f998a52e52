"""Perceptrons on data of one's own: a family of functions to train a learned optimizer on, many of which make a `Mixture`.

Which examples a minibatch holds is said by a function's seed and the number of the step alone, in plain torch as in the compiled
windows (`gradbuffer.kernels.numba_mlp_windows`), which run such functions under an `MLPOptimizer` on a CPU.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from gradbuffer.checks import check_count
from gradbuffer.contracts import Loss, MetaBatch, Problem, in_parts
from gradbuffer.devices import bring, drawn_on_cpu, whole_device
from gradbuffer.kernels.choice import load, takes_numba

__all__ = ["Perceptrons", "PerceptronsLoss"]

COMPILED = "gradbuffer.kernels.numba_mlp_windows:PerceptronWindows"
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu}
SEEDS = 2**40  # of minibatches, from 0 on


class Perceptrons(Problem):
    """Multilayer perceptrons of one form on one data set, from initial weights and on minibatches of their own.

    Parameters are those of `nn.Linear`, weight_0 (units, inputs), bias_0 (units,), weight_1, …, uniform within ±1/√inputs at first.
    The loss is the mean cross-entropy of integer targets, or the mean squared difference from others. Minibatches are drawn with
    repetition, the same for the same function and step.

    Args:
        inputs: (examples, inputs), float32 or float64, which the networks then are too; about standardized.
        targets: (examples,) of int64, classes from 0 on; or (examples, outputs) of the inputs' dtype, which may be the inputs
            themselves: an autoencoder.
        hidden_sizes: units of each hidden layer; may be empty.
        activation: of the hidden layers: "relu", "tanh", "sigmoid" or "silu".
        batch_size: examples in a minibatch.
        name: for titles and messages. Default: the sizes of the layers and the activation.

    Raises:
        TypeError, ValueError: an argument is not as said.

    Example:
        >>> images, labels = torch.randn(500, 16), torch.randint(3, (500,))
        >>> batch = Perceptrons(images, labels, hidden_sizes=(8,), batch_size=32).sample(4)
        >>> batch.loss(batch.params, step=0).shape
        torch.Size([4])
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        hidden_sizes: Sequence[int] = (32,),
        activation: str = "relu",
        batch_size: int = 64,
        name: str = "",
    ):
        check_data(inputs, targets)
        if not isinstance(hidden_sizes, (tuple, list)):
            raise TypeError(f"hidden_sizes must be a tuple of ints, which may be empty, got {hidden_sizes!r}")
        check_count(batch_size=batch_size, **{f"hidden_sizes[{k}]": size for k, size in enumerate(hidden_sizes)})
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.inputs, self.targets, self.device = inputs, targets, inputs.device
        outputs = targets.shape[1] if targets.dim() == 2 else int(targets.max()) + 1
        self.sizes = (inputs.shape[1], *hidden_sizes, outputs)
        self.options = dict(hidden_sizes=tuple(hidden_sizes), activation=activation, batch_size=batch_size, name=name)
        self.name = name or f"perceptrons {'-'.join(map(str, self.sizes))} {activation}"

    def to(self, device: torch.device | str) -> "Perceptrons":
        device = whole_device(device)
        return Perceptrons(self.inputs.to(device), self.targets.to(device), **self.options)

    def describe(self) -> str:
        """What a checkpoint must agree with: the options, and a digest of the data."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"{super().describe()} on {tuple(self.inputs.shape)} {self.inputs.dtype} {digest.hexdigest()[:16]}"

    @drawn_on_cpu
    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> MetaBatch:
        """Draw `meta_batch` networks with their sequences of minibatches. Returns `MetaBatch`."""
        check_count(meta_batch=meta_batch)
        params = {}
        for layer, (inputs, units) in enumerate(itertools.pairwise(self.sizes)):
            for name, shape in ((f"weight_{layer}", (units, inputs)), (f"bias_{layer}", (units,))):
                uniform = torch.rand(meta_batch, *shape, generator=generator, dtype=self.inputs.dtype)
                params[name] = bring((2 * uniform - 1) / math.sqrt(inputs), self.device)
        seeds = torch.randint(SEEDS, (meta_batch,), generator=generator)
        return in_parts(params, PerceptronsLoss(self, seeds))


class PerceptronsLoss(Loss):
    """The loss of networks of `Perceptrons`, each on the minibatches of its seed."""

    divisible = True

    def __init__(self, problem: Perceptrons, seeds: torch.Tensor):
        self.problem, self.seeds = problem, seeds  # the latter (B,) of int64, on the CPU

    def __call__(self, params: dict, step: int) -> torch.Tensor:
        index = minibatch(self.seeds, step, self.problem.options["batch_size"], len(self.problem.inputs))
        index = bring(index, self.problem.device)
        x, layers = self.problem.inputs[index], len(params) // 2  # (B, batch, inputs)
        for layer in range(layers):
            x = torch.baddbmm(params[f"bias_{layer}"][:, None], x, params[f"weight_{layer}"].mT)
            x = ACTIVATIONS[self.problem.options["activation"]](x) if layer + 1 < layers else x
        targets = self.problem.targets[index]
        if targets.dim() == 2:
            return F.cross_entropy(x.mT, targets, reduction="none").mean(1)
        return (x - targets).square().mean((1, 2))

    def part(self, first: int, last: int) -> "PerceptronsLoss":
        return PerceptronsLoss(self.problem, self.seeds[first:last])

    def join(self, others: list["PerceptronsLoss"]) -> "PerceptronsLoss | None":
        if any(other.problem is not self.problem for other in others):
            return None
        return PerceptronsLoss(self.problem, torch.cat([self.seeds, *(other.seeds for other in others)]))

    def compiled_particles(self, net: Any) -> tuple | None:
        """For an `MLPOptimizer` of the variant "celo", on a CPU with numba: its `PerceptronWindows`, the inputs and targets that those
        read, and the minibatch's size."""
        problem = self.problem
        if not takes_numba(problem.inputs):
            return None
        loss = "cross_entropy" if problem.targets.dim() == 1 else "mse"
        windows = load(COMPILED)(net, problem.sizes, problem.options["activation"], loss, problem.inputs.dtype)
        return windows, (problem.inputs, problem.targets), problem.options["batch_size"]


def check_data(inputs, targets):
    """Raise unless these are examples and what networks are to make of them."""
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if inputs.dtype not in (torch.float32, torch.float64) or inputs.dim() != 2 or not inputs.numel():
        raise ValueError(
            f"inputs must be (examples, inputs) of float32 or float64, got {tuple(inputs.shape)} of {inputs.dtype}"
        )
    classes, values = targets.dtype == torch.int64, targets.dtype == inputs.dtype
    if not (classes and targets.dim() == 1 or values and targets.dim() == 2) or len(targets) != len(inputs):
        raise ValueError(
            f"targets must be ({len(inputs)},) of int64, or ({len(inputs)}, outputs) of {inputs.dtype}, got "
            f"{tuple(targets.shape)} of {targets.dtype}"
        )
    if targets.device != inputs.device:
        raise ValueError(f"targets must be where the inputs are, on {inputs.device}, got {targets.device}")
    if classes and targets.min() < 0:
        raise ValueError(f"targets must be classes from 0 on, got {int(targets.min())}")


# The minibatches of the compiled windows --------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # numbers of 64 bits without a sign, as torch's int64 holds them


def minibatch(seeds, step, batch, examples):
    """Which examples functions of these seeds (B,) read at a step: (B, batch) of int64, as `numba_mlp_windows.minibatches`."""
    start = mix(mix(seeds + GOLDEN) + torch.tensor(step) * GOLDEN)[:, None]
    return shifted(shifted(mix(start + torch.arange(batch) * GOLDEN), 32) * examples, 32)


def mix(x):
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shifted(x, 31)


def shifted(x, bits):
    """To the right, filled with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
