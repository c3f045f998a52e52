"""More tasks of kinds that no training here has seen, for a last look: what is changed because of them spoils them.

As those of `gradbuffer.problems.tasks`, which learned optimizers have been chosen and mended by.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from gradbuffer.problems.tasks import (
    Task,
    characters,
    cifar,
    classify,
    echoes,
    encoded_text,
    gray,
    pixels,
    squared_error,
)

__all__ = ["KEPT_APART"]


# Networks -------------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Images (B, 3, 16, 16) -> scores (B, 10): perceptrons over 16 patches, and over their 32 channels, in turn."""

    def __init__(self, width=32, places=16, blocks=2):
        super().__init__()
        self.patches, self.output = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for size in (places, width) * blocks
        )

    def forward(self, images):
        x = self.patches(images).flatten(2).mT  # (B, places, width)
        for number, (norm, part) in enumerate(zip(self.norms, self.parts)):
            x = x + (part(norm(x)) if number % 2 else part(norm(x).mT).mT)
        return self.output(x.mean(1))


class Denoiser(nn.Module):
    """Images (B, 1, 14, 14) -> the same: down to half the side and up again, with what was before added to it."""

    def __init__(self, width=8):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, width, 3, padding=1), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.inner, self.output = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images):
        first = F.silu(self.down(images))
        return self.output(first + F.silu(self.up(F.silu(self.inner(first)))))


class DepthwiseConvolutions(nn.Module):
    """Images (B, 3, 16, 16) -> scores (B, 10): convolutions channel by channel, then over channels, with group norm."""

    def __init__(self, width=24):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, 2, 1)]
        for _ in range(2):
            layers += [nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1, groups=width)]
            layers += [nn.Conv2d(width, width, 1)]
        self.body, self.output = nn.Sequential(*layers), nn.Linear(width, 10)

    def forward(self, images):
        return self.output(self.body(images).mean((2, 3)))


class DilatedConvolutions(nn.Module):
    """Symbols (B, length) -> scores (B, length, symbols): convolutions over what came before, of growing reach."""

    def __init__(self, symbols=16, width=32, reaches=(1, 2, 4)):
        super().__init__()
        self.embedding, self.output, self.reaches = nn.Embedding(symbols, width), nn.Linear(width, symbols), reaches
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=reach) for reach in reaches)

    def forward(self, symbols):
        x = self.embedding(symbols).mT
        for reach, layer in zip(self.reaches, self.layers):
            x = x + F.relu(layer(F.pad(x, (2 * reach, 0))))
        return self.output(x.mT)


class MiddleCharacter(nn.Module):
    """Contexts (B, 8) of characters -> scores (B, alphabet): their vectors, through a perceptron."""

    def __init__(self, alphabet, width=16, places=8, hidden=64):
        super().__init__()
        self.embedding = nn.Embedding(alphabet, width)
        self.body = nn.Sequential(nn.Linear(places * width, hidden), nn.Tanh(), nn.Linear(hidden, alphabet))

    def forward(self, contexts):
        return self.body(self.embedding(contexts).flatten(1))


class SineNetwork(nn.Module):
    """Places (B, 2) -> colors (B, 3) through layers of sines."""

    def __init__(self, width=48, layers=3, frequency=10.0):
        super().__init__()
        sizes = (2, *[width] * layers)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:]))
        self.output, self.frequency = nn.Linear(width, 3), frequency
        for layer in self.layers[1:]:
            bound = (6 / width) ** 0.5 / frequency
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, places):
        for layer in self.layers:
            places = torch.sin(self.frequency * layer(places))
        return self.output(places)


class Adder(nn.Module):
    """Sequences (B, length, 2) -> sums (B,) by an LSTM."""

    def __init__(self, width=32):
        super().__init__()
        self.body, self.output = nn.LSTM(2, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, sequences):
        return self.output(self.body(sequences)[0][:, -1])[:, 0]


# Minibatches ----------------------------------------------------------------------------------------------------------


def noisy_digits(generator, batch=32):
    """MNIST's images (batch, 1, 14, 14) with noise, and without it."""
    images, _ = gray(batch, 14, generator)
    return images + 0.5 * torch.randn(images.shape, generator=generator), images


def middles(generator, batch=64):
    """Four characters before one and four after it (batch, 8), and that one (batch,)."""
    stretch, _ = characters(generator, batch, 9)
    return torch.cat([stretch[:, :4], stretch[:, 5:]], 1), stretch[:, 4]


def marked_numbers(generator, batch=32, length=20):
    """Numbers in [0, 1] with marks on two of them (batch, length, 2), and the sum of those (batch,)."""
    numbers = torch.rand(batch, length, generator=generator)
    chosen = torch.rand(batch, length, generator=generator).topk(2, 1).indices
    marks = torch.zeros(batch, length).scatter_(1, chosen, 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)


# Tasks ----------------------------------------------------------------------------------------------------------------

KEPT_APART = {
    "mixer": classify(
        Mixer,
        cifar(16, 16),
        kind="mixed perceptrons",
        description="MLP-Mixer of two blocks, 16 patches, CIFAR-10 at 16×16, batch 16",
    ),
    "depthwise-convolutions": classify(
        DepthwiseConvolutions,
        cifar(16, 16),
        kind="group norm",
        description="two separable convolutions of 24 with group norm, CIFAR-10 at 16×16, batch 16",
    ),
    "denoiser": Task(
        Denoiser,
        noisy_digits,
        squared_error,
        "noise taken out",
        "convolutions down and up with a short cut, MNIST at 14×14 with noise, batch 32",
    ),
    "dilated-convolutions": classify(
        DilatedConvolutions,
        functools.partial(echoes, delay=8),
        kind="convolutions in time",
        description="three dilated convolutions of 32, symbols to be repeated eight places later, batch 32",
    ),
    "middle-character": classify(
        lambda: MiddleCharacter(encoded_text()[1]),
        middles,
        kind="embeddings and a perceptron",
        description="vectors of 16, 64 units, the character between eight others, the help texts of Python, batch 64",
    ),
    "sines": Task(
        SineNetwork, pixels, squared_error, "sines", "three layers of 48 sines, one photograph at 32×32, batch 256"
    ),
    "adding": Task(
        Adder,
        marked_numbers,
        squared_error,
        "LSTM, regression",
        "LSTM of 32 units, the sum of two marked numbers among 20, batch 32",
    ),
}
"""Seven tasks that nothing was chosen by."""
