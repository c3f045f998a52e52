"""Small tasks of many kinds, on which optimizers race: what a learned optimizer is judged by where it was not trained.

Each is a network, its minibatches and their loss; a training step takes one to four milliseconds of a core, and 500
steps get far enough to tell optimizers apart. Losses are those of training. `gradbuffer.problems.races` runs the races.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gradbuffer.data.cifar10 import load_cifar10
from gradbuffer.data.mnist import load_mnist
from gradbuffer.devices import drawn_on_cpu

__all__ = [
    "GENERALIZATION",
    "TASKS",
    "Task",
    "characters",
    "cifar",
    "classify",
    "echoes",
    "encoded_text",
    "gray",
    "mnist",
    "perceptron",
    "pixels",
    "squared_error",
]


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Args:
        make_model: function without arguments that returns an `nn.Module`. Its weights come from torch's global
            generator, so that `torch.manual_seed` before the call determines them.
        draw: function of a `torch.Generator` that returns a minibatch. All randomness, also that of the loss, is in it.
        loss: function of the model and a minibatch that returns a scalar, with a graph to the model's parameters.
        kind: what is special about it, in a word or two.
        description: network, data and batch.

    Example:
        >>> task = TASKS["transformer"]
        >>> model, minibatch = task.make_model(), task.draw(torch.Generator().manual_seed(0))
        >>> task.loss(model, minibatch).backward()
    """

    make_model: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    kind: str
    description: str

    def __post_init__(self):
        object.__setattr__(self, "make_model", drawn_on_cpu(self.make_model))
        object.__setattr__(self, "draw", drawn_on_cpu(self.draw))


# Minibatches ----------------------------------------------------------------------------------------------------------


def mnist(batch: int, side: int) -> Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]:
    """draw: images (batch, 1, side, side), about of mean 0 and deviation 1, and labels (batch,)."""

    def draw(generator):
        images, labels = gray(batch, side, generator)
        return (images - 0.13) / 0.31, labels

    return draw


def gray(batch: int, side: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST's images (batch, 1, side, side) in [0, 1], and labels."""
    data = load_mnist()
    index = torch.randint(len(data.train_labels), (batch,), generator=generator)
    own = math.isqrt(data.train_images.shape[1])
    return resize(data.train_images[index].view(batch, 1, own, own), side), data.train_labels[index]


def cifar(batch: int, side: int) -> Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]:
    """draw: images (batch, 3, side, side), about of mean 0 and deviation 1, and labels (batch,)."""

    def draw(generator):
        data = load_cifar10()
        index = torch.randint(len(data.train_labels), (batch,), generator=generator)
        return (resize(data.train_images[index].float(), side) - 127) / 64, data.train_labels[index]

    return draw


def resize(images, side):
    """Images of another size, by means over areas; larger ones by interpolation."""
    own = images.shape[-1]
    if own == side:
        return images
    return F.interpolate(images, (side, side), mode="area" if own > side else "bilinear")


def sorted_symbols(generator):
    """32 sequences of 16 symbols, and the same in order."""
    symbols = torch.randint(16, (32, 16), generator=generator)
    return symbols, symbols.sort(1)[0]


def echoes(generator: torch.Generator, delay: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """32 sequences of 16 symbols, and the same later by `delay` places, after zeros."""
    symbols = torch.randint(16, (32, 16), generator=generator)
    return symbols, F.pad(symbols, (delay, 0))[:, :-delay]


def characters(generator: torch.Generator, batch: int = 8, length: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Stretches of text, and the same one character later."""
    text = encoded_text()[0]
    start = torch.randint(len(text) - length, (batch, 1), generator=generator)
    stretch = text[start + torch.arange(length + 1)]
    return stretch[:, :-1], stretch[:, 1:]


@functools.cache
def encoded_text() -> tuple[torch.Tensor, int]:
    """The help texts that come with Python, as numbers (n,), and how many different characters there are."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def with_noise(draw, size):
    """draw, with standard normal noise (batch, size) in place of the labels."""

    def draw_both(generator):
        images, _ = draw(generator)
        return images, torch.randn(len(images), size, generator=generator)

    return draw_both


@functools.cache
def ratings_table(users=300, items=200, rank=6):
    """(users, items): products of hidden vectors, with noise."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(users, rank, generator=generator), torch.randn(rank, items, generator=generator)
    return 0.3 * (left @ right / math.sqrt(rank) + 0.1 * torch.randn(users, items, generator=generator))


def ratings(generator, batch=256):
    """Pairs (batch, 2) of a user and an item, and their ratings (batch,)."""
    table = ratings_table()
    pairs = torch.stack([torch.randint(size, (batch,), generator=generator) for size in table.shape], 1)
    return pairs, table[pairs[:, 0], pairs[:, 1]]


def pixels(generator: torch.Generator, batch: int = 256, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (batch, 2) in [-1, 1] in one photograph, and the colors there (batch, 3)."""
    image = resize(load_cifar10().train_images[:1].float(), side)[0] / 127.5 - 1
    places = torch.randint(side, (batch, 2), generator=generator)
    return 2 * places / (side - 1) - 1, image[:, places[:, 0], places[:, 1]].T


@functools.cache
def regression_problem(inputs=64, smallest=0.01):
    """The inputs' mixing (inputs, inputs), with singular values from 1 to `smallest`, and the weights to be found."""
    generator = torch.Generator().manual_seed(0)
    rotations = [torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0] for _ in range(2)]
    scales = torch.logspace(0, math.log10(smallest), inputs)
    weights = torch.randn(inputs, generator=generator)
    return rotations[0] * scales @ rotations[1], 0.03 * rotations[1].T @ (weights / scales.sqrt())


def ill_conditioned(generator, batch=64):
    """Correlated inputs (batch, 64) and noisy targets (batch,)."""
    mixing, weights = regression_problem()
    inputs = torch.randn(batch, len(weights), generator=generator) @ mixing
    return inputs, inputs @ weights + 0.003 * torch.randn(batch, generator=generator)


# Networks -------------------------------------------------------------------------------------------------------------


def perceptron(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes, with activations between them, for inputs of any shape."""
    layers = [nn.Flatten()]
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def normalized_convolutions():
    layers = []
    for before, after in ((3, 12), (12, 24), (24, 24)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 4, 10))


def plain_convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


class ResidualBlock(nn.Module):
    """relu(x + two normalized convolutions of x); with another stride or width, x goes through a convolution too."""

    def __init__(self, before, after, stride=1):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.outer = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        return (self.outer(x) + self.inner(x)).relu()


def residual_convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        ResidualBlock(12, 12),
        ResidualBlock(12, 24, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def transformer_body(width, layers):
    layer = nn.TransformerEncoderLayer(
        width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


class SequenceTransformer(nn.Module):
    """Symbols (B, length) -> scores (B, length, symbols). causal: no place sees later ones."""

    def __init__(self, symbols, length, width=32, layers=2, causal=False):
        super().__init__()
        self.embedding, self.place = nn.Embedding(symbols, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.body, self.output = transformer_body(width, layers), nn.Linear(width, symbols)
        mask = nn.Transformer.generate_square_subsequent_mask(length) if causal else None
        self.register_buffer("mask", mask)

    def forward(self, symbols):
        return self.output(self.body(self.embedding(symbols) + self.place, mask=self.mask))


class VisionTransformer(nn.Module):
    """Images (B, 3, 16, 16) in patches of 4×4 pixels -> scores (B, 10) from the places' mean."""

    def __init__(self, width=32, layers=2):
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(16, width))
        self.body, self.output = transformer_body(width, layers), nn.Linear(width, 10)

    def forward(self, images):
        return self.output(self.body(self.patches(images).flatten(2).mT + self.place).mean(1))


class Recurrent(nn.Module):
    """Symbols (B, length) -> scores (B, length, symbols) by a GRU."""

    def __init__(self, symbols=16, width=32):
        super().__init__()
        self.embedding, self.body = nn.Embedding(symbols, width), nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, symbols)

    def forward(self, symbols):
        return self.output(self.body(self.embedding(symbols))[0])


class VariationalAutoencoder(nn.Module):
    """Images and noise (B, 8) -> what is decoded, as logits (B, pixels), and the code's mean and log variance (B, 8)."""

    def __init__(self, pixels=784, code=8):
        super().__init__()
        self.encoder, self.decoder = perceptron((pixels, 64, 2 * code)), perceptron((code, 64, pixels))

    def forward(self, images, noise):
        mean, log_variance = self.encoder(images).chunk(2, 1)
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance


class ResidualPerceptron(nn.Module):
    """Images (B, 3, 8, 8) -> scores (B, 10) through eight blocks x + W relu(V norm(x))."""

    def __init__(self, inputs=192, width=32, blocks=8):
        super().__init__()
        self.input, self.output = nn.Linear(inputs, width), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def forward(self, images):
        x = self.input(images.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)


class Factorization(nn.Module):
    """Pairs (B, 2) of a user and an item -> ratings (B,): products of their vectors, and a bias of each."""

    def __init__(self, users=300, items=200, rank=8):
        super().__init__()
        self.vectors = nn.ModuleList([nn.Embedding(users, rank), nn.Embedding(items, rank)])
        self.biases = nn.ModuleList([nn.Embedding(users, 1), nn.Embedding(items, 1)])
        for table in (*self.vectors, *self.biases):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs):
        users, items = pairs.unbind(1)
        left, right = self.vectors[0](users), self.vectors[1](items)
        biases = self.biases[0](users) + self.biases[1](items)
        return (left * right).sum(1) + biases[:, 0]


class CoordinateNetwork(nn.Module):
    """Places (B, 2) -> colors (B, 3): sines and cosines of places, at random frequencies, through a perceptron."""

    def __init__(self, frequencies=24, width=48):
        super().__init__()
        self.register_buffer("frequencies", 6 * torch.randn(2, frequencies))
        self.body = perceptron((2 * frequencies, width, width, 3))

    def forward(self, places):
        angles = places @ self.frequencies
        return self.body(torch.cat([angles.sin(), angles.cos()], 1))


# Losses ---------------------------------------------------------------------------------------------------------------


def cross_entropy(model, minibatch):
    """Mean over all places: scores (..., classes) against labels (...)."""
    inputs, labels = minibatch
    return F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())


def squared_error(model: nn.Module, minibatch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = minibatch
    return F.mse_loss(model(inputs).view_as(targets), targets)


def reconstruction(model, minibatch):
    images, _ = minibatch
    return F.mse_loss(model(images), images.flatten(1))


def evidence_bound(model, minibatch):
    """The negative evidence lower bound, in nats per pixel."""
    images, noise = minibatch
    logits, mean, log_variance = model(images, noise)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    fit = F.binary_cross_entropy_with_logits(logits, images.flatten(1), reduction="none").sum(1)
    return (fit + divergence).mean() / logits.shape[1]


# Tasks ----------------------------------------------------------------------------------------------------------------

classify = functools.partial(Task, loss=cross_entropy)

TASKS = {
    "convolutions-batchnorm": classify(
        normalized_convolutions,
        cifar(16, 16),
        kind="batch norm",
        description="three convolutions with batch norm, CIFAR-10 at 16×16, batch 16",
    ),
    "convolutions-plain": classify(
        plain_convolutions,
        mnist(32, 14),
        kind="convolutions",
        description="two convolutions, GELU, MNIST at 14×14, batch 32",
    ),
    "resnet": classify(
        residual_convolutions,
        cifar(16, 16),
        kind="residual, batch norm",
        description="ResNet of two blocks, CIFAR-10 at 16×16, batch 16",
    ),
    "vision-transformer": classify(
        VisionTransformer,
        cifar(16, 16),
        kind="attention",
        description="two layers of 32, 16 patches, CIFAR-10 at 16×16, batch 16",
    ),
    "transformer": classify(
        functools.partial(SequenceTransformer, 16, 16),
        sorted_symbols,
        kind="attention",
        description="two layers of 32, sequences of 16 symbols to be sorted, batch 32",
    ),
    "gru": classify(
        Recurrent,
        echoes,
        kind="recurrent",
        description="GRU of 32 units, symbols to be repeated four places later, batch 32",
    ),
    "characters": classify(
        lambda: SequenceTransformer(encoded_text()[1], 32, causal=True),
        characters,
        kind="language model",
        description="causal transformer, two layers of 32, the help texts of Python, 8 stretches of 32 characters",
    ),
    "autoencoder": Task(
        functools.partial(perceptron, (784, 64, 16, 64, 784), nn.Tanh),
        mnist(32, 28),
        reconstruction,
        "autoencoder",
        "784-64-16-64-784, tanh, MNIST, batch 32",
    ),
    "variational-autoencoder": Task(
        VariationalAutoencoder,
        with_noise(lambda generator: gray(32, 28, generator), 8),
        evidence_bound,
        "noisy loss",
        "784-64-8-64-784, ReLU, MNIST, batch 32",
    ),
    "residual-perceptron": classify(
        ResidualPerceptron,
        cifar(32, 8),
        kind="layer norm",
        description="eight residual blocks of 32 with layer norm, CIFAR-10 at 8×8, batch 32",
    ),
    "factorization": Task(
        Factorization,
        ratings,
        squared_error,
        "embeddings",
        "300 users, 200 items, vectors of 8, made-up ratings, batch 256",
    ),
    "coordinates": Task(
        CoordinateNetwork,
        pixels,
        squared_error,
        "one picture",
        "48-48-48-3 on sines of places, one photograph at 32×32, batch 256",
    ),
    "ill-conditioned": Task(
        functools.partial(nn.Linear, 64, 1),
        ill_conditioned,
        squared_error,
        "condition number 10,000",
        "linear regression of 64 inputs, batch 64",
    ),
    "wide": classify(
        functools.partial(perceptron, (196, 256, 10), nn.Tanh),
        mnist(32, 14),
        kind="wide",
        description="196-256-10, tanh, MNIST at 14×14, batch 32",
    ),
    "deep": classify(
        functools.partial(perceptron, (196, *[32] * 12, 10)),
        mnist(32, 14),
        kind="deep",
        description="twelve layers of 32, ReLU, MNIST at 14×14, batch 32",
    ),
}
"""Fifteen tasks of kinds that small perceptrons in meta-training are not."""


def perceptron_on_mnist(width=64, depth=2, batch=32):
    return classify(
        functools.partial(perceptron, (196, *[width] * depth, 10)),
        mnist(batch, 14),
        kind="perceptron",
        description=f"{depth} layers of {width}, ReLU, MNIST at 14×14, batch {batch}",
    )


GENERALIZATION = {
    "perceptron": perceptron_on_mnist(),
    "perceptron, width × 8": perceptron_on_mnist(width=512),
    "perceptron, depth × 4": perceptron_on_mnist(depth=8),
    "perceptron, batch × 8": perceptron_on_mnist(batch=256),
}
"""One task, and the same eight times as wide, four times as deep, and with batches eight times as large."""
