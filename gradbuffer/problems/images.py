"""What problems on images share: splits on the device, minibatches that a seed and a step determine, checks of arguments."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from gradbuffer.checks import check_count
from gradbuffer.contracts import Loss, Problem
from gradbuffer.contracts import on_device as problem_on_device
from gradbuffer.devices import bring, drawn_on_cpu

STEPS_PER_DRAW = 32  # minibatches whose indices are drawn at once

__all__ = [
    "AccuracyCurves",
    "Chosen",
    "ImageNets",
    "MinibatchLoss",
    "check_batch_size",
    "check_floating",
    "mean_cross_entropy",
    "on_device",
]


def check_floating(dtype: Any) -> None:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")


class ImageNets(Problem):
    """What the problems on images share: their `options` rebuild them, on another device or split."""

    def to(self, device: torch.device | str) -> "ImageNets":
        return type(self)(**self.options, device=device)

    def with_split(self, split: str) -> "ImageNets":
        """The same networks over another split of the data."""
        return type(self)(**{**self.options, "split": split}, device=self.device)

    def validation_problem(self) -> Problem:
        """What `meta_train` validates on: the same networks, over images that no training function draws from."""
        return self.with_split("validation")

    @drawn_on_cpu
    def minibatches(self, meta_batch: int, generator: torch.Generator | None) -> "Chosen":
        """Draw the sequences of minibatches of that many functions: `Chosen` of the problem's images and labels."""
        seed = int(torch.randint(2**62, (), generator=generator))
        shape = meta_batch, drawn_batch_size(self.options["batch_size"], generator)
        return Chosen(self.images, self.labels, Minibatches(seed, shape, len(self.labels), self.device))


class Chosen(NamedTuple):
    """Minibatches of images and labels, of which `index(step)` (B, batch) says which they are at that step."""

    images: torch.Tensor
    labels: torch.Tensor
    index: Callable

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """images (B, batch, ...) and labels (B, batch)"""
        index = self.index(step)
        return choose(self.images, index), choose(self.labels, index)

    def part(self, first: int, last: int) -> "Chosen":
        """Those of functions first … last - 1."""
        return self._replace(index=lambda step: self.index(step)[first:last])

    def join(self, others: list["Chosen"]) -> "Chosen":
        """These and those of other functions, of the same images."""
        indices = [self.index, *(other.index for other in others)]
        return self._replace(index=lambda step: torch.cat([index(step) for index in indices]))


class Given(NamedTuple):
    """The same minibatches at every step."""

    images: torch.Tensor  # (B, batch, ...)
    labels: torch.Tensor  # (B, batch)

    def __call__(self, step):
        return self

    def part(self, first, last):
        return Given(self.images[first:last], self.labels[first:last])


class MinibatchLoss(Loss):
    """The loss of B networks on what `minibatch(step)` gives: `Chosen` images and labels, or `Given` ones."""

    divisible = True

    def __init__(self, minibatch: Callable):
        self.minibatch = minibatch

    def tensors(self, step: int) -> tuple:
        return tuple(self.minibatch(step))

    def of(self, tensors: tuple) -> "MinibatchLoss":
        return self.on(Given(*tensors))

    def part(self, first: int, last: int) -> "MinibatchLoss":
        return self.on(self.minibatch.part(first, last))

    def join(self, others: list["MinibatchLoss"]) -> "MinibatchLoss | None":
        minibatches = [self.minibatch, *(other.minibatch for other in others)]
        if not all(
            isinstance(minibatch, Chosen) and minibatch.images is self.minibatch.images for minibatch in minibatches
        ):
            return None
        return self.on(self.minibatch.join(minibatches[1:]))

    def on(self, minibatch: Callable) -> "MinibatchLoss":
        """The same networks' loss on other minibatches."""
        loss = copy.copy(self)
        loss.minibatch = minibatch
        return loss


def choose(rows, index):
    """rows[index], on a CPU in a third of the time."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


def check_batch_size(batch_size: Any) -> int | tuple[int, int]:
    """A batch size, or a pair (least, most) of them as a tuple."""
    if not isinstance(batch_size, (tuple, list)):
        check_count(batch_size=batch_size)
        return batch_size
    if len(batch_size) != 2:
        raise ValueError(f"batch_size must be a number or (least, most), got {batch_size!r}")
    least, most = batch_size
    check_count(**{"batch_size[0]": least})
    check_count(least=least, **{"batch_size[1]": most})
    return least, most


def drawn_batch_size(batch_size, generator):
    """That number; of a pair, one between the two, uniform in its logarithm."""
    if isinstance(batch_size, int):
        return batch_size
    least, most = batch_size
    return round(least * (most / least) ** torch.rand((), generator=generator, dtype=torch.float64).item())


def mean_cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, classes, batch) and (B, batch) -> (B,)"""
    return F.cross_entropy(scores, labels, reduction="none").mean(1)


class Minibatches:
    """Indices of the minibatch of any step: a function of the seed and the step alone, in whatever order they come."""

    def __init__(self, seed, shape, length, device):
        self.seed, self.shape, self.length, self.device = seed, shape, length, device
        self.drawn = None, None

    def __call__(self, step):
        check_count(least=0, step=step)
        chunk, within = divmod(step, STEPS_PER_DRAW)
        drawn = self.drawn  # other threads may ask for other steps meanwhile
        if drawn[0] != chunk:
            generator = torch.Generator().manual_seed((self.seed + chunk) % 2**63)
            indices = torch.randint(self.length, (STEPS_PER_DRAW, *self.shape), generator=generator, device="cpu")
            self.drawn = drawn = chunk, bring(indices, self.device)
        return drawn[1][within]


@functools.cache
@drawn_on_cpu
def on_device(
    data: Any, split: str, device: torch.device, prepare: Callable, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `prepare(images, labels, *options)` makes of a split of the data, on the device; moved there once per process."""
    whole = (data.test_images, data.test_labels) if split == "test" else half(data, split)
    return tuple(tensor.to(device) for tensor in prepare(*whole, *options))


def half(data, split):
    """One half of the training images, by a fixed random order."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    middle = len(order) // 2
    order = order[:middle] if split == "train" else order[middle:]
    return data.train_images[order], data.train_labels[order]


class AccuracyCurves:
    """What `compare` watches with: the accuracy on test images along the way, every so many steps.

    `steps` lists when it was measured; `curves` is a dict from name to accuracies (num_functions, len(steps)), on the
    CPU and in [0, 1].

    Args:
        problem: whose functions run, with `test_accuracy(params, images)`, such as `CIFAR10Net`.
        every: steps from one measurement to the next, the first at step 0; positive.
        images: how many test images; default all.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> from gradbuffer.data.cifar10 import generated_images; from optimizees import CIFAR10Net
        >>> problem = CIFAR10Net(batch_size=8, channels=(4,), root=generated_images(100, 20, side=8))
        >>> watch = AccuracyCurves(problem, every=2)
        >>> tuned = {"SGD": TunedBaseline(torch.optim.SGD, {"lr": 0.1}, {})}
        >>> losses = compare({}, tuned, problem, steps=5, num_functions=3, progress=False, watch=watch)
        >>> watch.steps, watch.curves["SGD"].shape
        ([0, 2, 4], torch.Size([3, 3]))
    """

    def __init__(self, problem: Any, every: int = 100, images: int | None = None):
        if not callable(getattr(problem, "test_accuracy", None)):
            raise TypeError(f"problem must have test_accuracy(params, images), got {type(problem).__name__}")
        check_count(every=every)
        if images is not None:
            check_count(least=2, images=images)
        self.problem, self.every, self.images, self.measured = problem, every, images, {}

    def __call__(self, name: str, step: int, params: dict[str, torch.Tensor]) -> None:
        if step % self.every == 0:
            problem = problem_on_device(self.problem, next(iter(params.values())).device)
            accuracies = problem.test_accuracy(params, self.images).cpu()
            self.measured.setdefault(name, {}).setdefault(step, []).append(accuracies)

    @property
    def steps(self) -> list[int]:
        return sorted({step for groups in self.measured.values() for step in groups})

    @property
    def curves(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.stack([torch.cat(groups) for groups in by_step.values()], 1)
            for name, by_step in self.measured.items()
        }
