"""Networks on data of one's own: a family of functions to train a learned optimizer on, many of which make a `Mixture`.

Which examples a minibatch holds is said by a function's seed and the number of the step alone, in plain torch as in the compiled
windows (`gradbuffer.kernels.numba_mlp_windows`), which run such functions under an `MLPOptimizer` on a CPU.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from gradbuffer.checks import check_count
from gradbuffer.contracts import Loss, MetaBatch, Problem, in_parts
from gradbuffer.devices import bring, drawn_on_cpu, whole_device
from gradbuffer.kernels.choice import load, takes_numba

__all__ = ["Networks", "NetworksLoss", "Perceptrons", "PerceptronsLoss"]

COMPILED = "gradbuffer.kernels.numba_mlp_windows:PerceptronWindows"
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu}
SEEDS = 2**40  # of minibatches, from 0 on


class Networks(Problem):
    """Networks of any one form on one data set, from initial weights and on minibatches of their own; all are one computation.

    Parameters are uniform within ±1/√n at first, where n is the product of a tensor's sizes but the first, or of a vector its size; times
    their `gains`. Minibatches are drawn with repetition, the same for the same function and step.

    Args:
        data: tensors (examples, ...) that the loss reads; those of floating point are of one dtype, which the networks then are of, too.
        shapes: dict from name to shape of each parameter.
        loss: function of (params, *minibatch) that returns (B,), 0 or more, with a graph: params is a dict of (B, *shape), and each
            tensor of the minibatch is (B, batch, ...), the B networks' own examples. No network may depend on another's numbers.
        batch_size: examples in a minibatch.
        name: for titles and messages; a checkpoint knows the loss by it.
        gains: dict from name to what initial values are multiplied by, 0 or more; 1 for those that are not named.

    Raises:
        TypeError, ValueError: an argument is not as said.

    Example:
        >>> x = torch.randn(500, 6, 3)  # sequences of six
        >>> shapes = {"inner": (8, 3), "own": (8, 8), "outer": (1, 8)}
        >>> def loss(params, x):  # a recurrent network that adds up what it reads
        ...     state = 0.0 * x[:, :, 0] @ params["inner"].mT
        ...     for t in range(6):
        ...         state = torch.tanh(x[:, :, t] @ params["inner"].mT + state @ params["own"].mT)
        ...     return (state @ params["outer"].mT - x.sum((2, 3))[..., None]).square().mean((1, 2))
        >>> batch = Networks([x], shapes, loss, batch_size=32, name="sums").sample(4)
        >>> batch.loss(batch.params, step=0).shape
        torch.Size([4])
    """

    def __init__(
        self,
        data: Sequence[torch.Tensor],
        shapes: dict[str, tuple[int, ...]],
        loss: Callable[..., torch.Tensor],
        batch_size: int = 64,
        name: str = "networks",
        gains: dict[str, float] | None = None,
    ):
        check_tensors(data)
        check_count(batch_size=batch_size)
        if not isinstance(shapes, dict) or not shapes:
            raise TypeError(f"shapes must be a dict from name to shape, got {shapes!r}")
        for key, shape in shapes.items():
            if not isinstance(shape, (tuple, list)):
                raise TypeError(f"shapes[{key!r}] must be a tuple of ints, got {shape!r}")
            check_count(**{f"shapes[{key!r}]": size for size in shape})
        if not callable(loss):
            raise TypeError(f"loss must be a function of (params, *minibatch), got {loss!r}")
        gains = dict(gains or {})
        if not gains.keys() <= shapes.keys() or not all(0 <= gain < math.inf for gain in gains.values()):
            raise ValueError(f"gains must be numbers from 0 on for names in {sorted(shapes)}, got {gains}")
        self.data, self.loss, self.name = tuple(data), loss, name
        self.shapes, self.gains = {key: tuple(shape) for key, shape in shapes.items()}, gains
        self.device = data[0].device
        self.dtype = next(tensor.dtype for tensor in data if tensor.is_floating_point())
        self.options = dict(shapes=self.shapes, batch_size=batch_size, name=name, gains=gains)

    def to(self, device: torch.device | str) -> "Networks":
        device = whole_device(device)
        return Networks([tensor.to(device) for tensor in self.data], loss=self.loss, **self.options)

    def describe(self) -> str:
        """What a checkpoint must agree with: the options, and a digest of the data."""
        digest = hashlib.sha256()
        for tensor in self.data:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"{super().describe()} on {tuple(self.data[0].shape)} {self.dtype} {digest.hexdigest()[:16]}"

    @drawn_on_cpu
    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> MetaBatch:
        """Draw `meta_batch` networks with their sequences of minibatches. Returns `MetaBatch`."""
        check_count(meta_batch=meta_batch)
        params = {}
        for name, shape in self.shapes.items():
            uniform = torch.rand(meta_batch, *shape, generator=generator, dtype=self.dtype)
            bound = self.gains.get(name, 1.0) / math.sqrt(self.inputs_of(name))
            params[name] = bring((2 * uniform - 1) * bound, self.device)
        seeds = torch.randint(SEEDS, (meta_batch,), generator=generator)
        return in_parts(params, self.losses_on(seeds, torch.zeros_like(seeds)))

    def losses_on(self, seeds: torch.Tensor, firsts: torch.Tensor) -> "NetworksLoss":
        """Those of as many networks, on the minibatches of these seeds from these steps on, both (B,)."""
        return NetworksLoss(self, seeds, firsts)

    def inputs_of(self, name: str) -> int:
        """n, of which 1/√n is how large a parameter is at first."""
        shape = self.shapes[name]
        return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


class NetworksLoss(Loss):
    """The loss of networks of `Networks`, each on the minibatches of its seed, from the step in `firsts` on."""

    divisible = True

    def __init__(self, problem: Networks, seeds: torch.Tensor, firsts: torch.Tensor):
        self.problem, self.seeds, self.firsts = problem, seeds, firsts  # the latter two (B,) of int64, on the CPU

    def __call__(self, params: dict, step: int) -> torch.Tensor:
        data, batch = self.problem.data, self.problem.options["batch_size"]
        index = bring(minibatch(self.seeds, self.firsts + step, batch, len(data[0])), self.problem.device)
        return self.problem.loss(params, *(tensor[index] for tensor in data))

    def part(self, first: int, last: int) -> "NetworksLoss":
        return type(self)(self.problem, self.seeds[first:last], self.firsts[first:last])

    def later(self, steps: int) -> "NetworksLoss":
        return type(self)(self.problem, self.seeds, self.firsts + steps)

    def join(self, others: list["NetworksLoss"]) -> "NetworksLoss | None":
        if any(other.problem is not self.problem for other in others):
            return None
        parts = zip(*((loss.seeds, loss.firsts) for loss in (self, *others)))
        return type(self)(self.problem, *map(torch.cat, parts))


class Perceptrons(Networks):
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
        outputs = targets.shape[1] if targets.dim() == 2 else int(targets.max()) + 1
        sizes, shapes = (inputs.shape[1], *hidden_sizes, outputs), {}
        for layer, (count, units) in enumerate(itertools.pairwise(sizes)):
            shapes |= {f"weight_{layer}": (units, count), f"bias_{layer}": (units,)}
        name = name or f"perceptrons {'-'.join(map(str, sizes))} {activation}"
        super().__init__((inputs, targets), shapes, self.losses, batch_size, name)
        self.sizes = sizes
        self.options = dict(hidden_sizes=tuple(hidden_sizes), activation=activation, batch_size=batch_size, name=name)

    def to(self, device: torch.device | str) -> "Perceptrons":
        device = whole_device(device)
        return Perceptrons(self.inputs.to(device), self.targets.to(device), **self.options)

    @property
    def inputs(self) -> torch.Tensor:
        return self.data[0]

    @property
    def targets(self) -> torch.Tensor:
        return self.data[1]

    def inputs_of(self, name: str) -> int:
        """As in `nn.Linear`, of a bias those of its layer, too."""
        return self.sizes[int(name.rpartition("_")[2])]

    def losses(self, params: dict, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Those of B perceptrons (B,), of inputs (B, batch, inputs)."""
        layers = len(params) // 2
        for layer in range(layers):
            x = torch.baddbmm(params[f"bias_{layer}"][:, None], x, params[f"weight_{layer}"].mT)
            x = ACTIVATIONS[self.options["activation"]](x) if layer + 1 < layers else x
        if self.targets.dim() == 1:
            return F.cross_entropy(x.mT, targets, reduction="none").mean(1)
        return (x - targets).square().mean((1, 2))

    def losses_on(self, seeds: torch.Tensor, firsts: torch.Tensor) -> "PerceptronsLoss":
        return PerceptronsLoss(self, seeds, firsts)


class PerceptronsLoss(NetworksLoss):
    """The loss of networks of `Perceptrons`."""

    def compiled_particles(self, net: Any) -> tuple | None:
        """For an `MLPOptimizer` of the variant "celo", on a CPU with numba: its `PerceptronWindows`, the inputs and targets that those
        read, and the minibatch's size."""
        problem = self.problem
        if not takes_numba(problem.inputs):
            return None
        loss = "cross_entropy" if problem.targets.dim() == 1 else "mse"
        windows = load(COMPILED)(net, problem.sizes, problem.options["activation"], loss, problem.inputs.dtype)
        return windows, (problem.inputs, problem.targets), problem.options["batch_size"]


def check_tensors(data):
    """Raise unless these are the same number of examples, and floating-point numbers of one dtype among them."""
    if not isinstance(data, (tuple, list)) or not data or not all(isinstance(tensor, torch.Tensor) for tensor in data):
        raise TypeError(f"data must be tensors (examples, ...), got {data!r}")
    dtypes = {tensor.dtype for tensor in data if tensor.is_floating_point()}
    shapes = [tuple(tensor.shape) for tensor in data]
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(f"data must have floating-point tensors, all of float32 or of float64, got {dtypes}")
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(f"data must have the same number of examples, at least one, got {shapes}")
    if len({tensor.device for tensor in data}) != 1:
        raise ValueError(f"data must be on one device, got {[str(tensor.device) for tensor in data]}")


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
    start = mix(mix(seeds + GOLDEN) + torch.as_tensor(step) * GOLDEN)[:, None]
    return shifted(shifted(mix(start + torch.arange(batch) * GOLDEN), 32) * examples, 32)


def mix(x):
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shifted(x, 31)


def shifted(x, bits):
    """To the right, filled with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
