"""More tasks of kinds that no training here has seen, for a last look: what is changed because of them spoils them.

Two lots: the first was raced once, and families for the next training were chosen with it in mind; then the second was written. As
those of `gradbuffer.problems.tasks`, which learned optimizers have been chosen and mended by.
"""

import functools
import math
from collections import Counter

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
    mnist,
    perceptron,
    pixels,
    squared_error,
)

__all__ = ["FIRST_KEPT_APART", "KEPT_APART"]


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


class RowReader(nn.Module):
    """Images (B, 1, rows, width) -> scores (B, 10) by a plain recurrent network that reads row after row."""

    def __init__(self, inputs=14, width=32):
        super().__init__()
        self.body, self.output = nn.RNN(inputs, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, images):
        return self.output(self.body(images.flatten(1, 2))[0][:, -1])


class Adapted(nn.Module):
    """Images (B, 3, 16, 16) -> scores (B, 10): a network of fixed random weights, to each of which a product of rank 4 is added."""

    def __init__(self, sizes=(768, 96, 96, 10), rank=4):
        super().__init__()
        pairs = list(zip(sizes, sizes[1:]))
        self.fixed = [torch.randn(units, inputs) * (2 / inputs) ** 0.5 for inputs, units in pairs]
        self.inner = nn.ParameterList(torch.randn(rank, inputs) / inputs**0.5 for inputs, _ in pairs)
        self.outer = nn.ParameterList(0.01 * torch.randn(units, rank) for _, units in pairs)

    def forward(self, images):
        x = images.flatten(1)
        for layer, (fixed, inner, outer) in enumerate(zip(self.fixed, self.inner, self.outer)):
            x = x.relu() if layer else x
            x = x @ fixed.T + x @ inner.T @ outer.T
        return x


class SkipGram(nn.Module):
    """Pairs (B, 2) of words -> scores (B,) that they stand together: products of two tables' rows."""

    def __init__(self, words, width=16):
        super().__init__()
        self.first, self.second = nn.Embedding(words, width), nn.Embedding(words, width)
        for table in (self.first, self.second):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs):
        return (self.first(pairs[:, 0]) * self.second(pairs[:, 1])).sum(1)


class SetReader(nn.Module):
    """Sets (B, members, 4) -> numbers (B,): a learned question looks at all members by attention."""

    def __init__(self, width=32):
        super().__init__()
        self.question, self.input = nn.Parameter(torch.randn(1, 4, width) / width**0.5), nn.Linear(4, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, sets):
        members = F.gelu(self.input(sets))
        questions = self.question.expand(len(sets), -1, -1)
        return self.body(self.attention(questions, members, members, need_weights=False)[0])[:, 0]


class Graphs(nn.Module):
    """Links (B, nodes, nodes) of 0 and 1 -> numbers (B, nodes): three rounds of messages between neighbours."""

    def __init__(self, width=24, rounds=3):
        super().__init__()
        self.input, self.output = nn.Linear(1, width), nn.Linear(width, 1)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(rounds))
        self.others = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(rounds))

    def forward(self, links):
        x = F.silu(self.input(links.mean(2, keepdim=True)))
        for own, others in zip(self.own, self.others):
            x = x + F.silu(own(x) + others(links @ x) / 3)
        return self.output(x)[..., 0]


class Experts(nn.Module):
    """Images (B, 1, 14, 14) -> scores (B, 10): a gate mixes what four small perceptrons say."""

    def __init__(self, inputs=196, width=12, experts=4):
        super().__init__()
        self.gate = nn.Linear(inputs, experts)
        self.experts = nn.ModuleList(perceptron((inputs, width, 10), nn.SiLU) for _ in range(experts))

    def forward(self, images):
        shares = self.gate(images.flatten(1)).softmax(1)
        return (torch.stack([expert(images) for expert in self.experts], 2) * shares[:, None]).sum(2)


# Losses ---------------------------------------------------------------------------------------------------------------


def heat_residual(model, places):
    """How far u(x) = x (1 - x) · model(x) is from u'' = -Σ k² sin(kπx) / 10, at places (B, 1) in [0, 1]."""
    places = places.requires_grad_()
    value = places * (1 - places) * model(places)
    (slope,) = torch.autograd.grad(value.sum(), places, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), places, create_graph=True)
    target = sum(k * k * torch.sin(k * math.pi * places) for k in (1, 2, 4)) / 10
    return (curvature + target).square().mean()


def together(model, minibatch):
    """Of two noisy views (B, …) of each image: which of all second views is a first one's own, by their directions."""
    first, second = (F.normalize(model(view), dim=1) for view in minibatch)
    return F.cross_entropy(first @ second.mT / 0.2, torch.arange(len(first)))


def yes_or_no(model, minibatch):
    pairs, answers = minibatch
    return F.binary_cross_entropy_with_logits(model(pairs), answers)


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


def two_views(generator, batch=48):
    """Two views (batch, 1, 14, 14) of MNIST's images, each with noise and a patch of 5×5 set to 0."""
    images, _ = mnist(batch, 14)(generator)
    views = []
    for _ in range(2):
        view = images + 0.3 * torch.randn(images.shape, generator=generator)
        row, column = (int(torch.randint(10, (), generator=generator)) for _ in range(2))
        view[:, :, row : row + 5, column : column + 5] = 0
        views.append(view)
    return views


@functools.cache
def words():
    """The same texts as those of `characters`, by words: the numbers (n,) of the 500 most frequent, 500 for all others."""
    from pydoc_data.topics import topics

    found = " ".join(topics[name] for name in sorted(topics)).lower().split()
    numbers = {word: number for number, (word, _) in enumerate(Counter(found).most_common(500))}
    return torch.tensor([numbers.get(word, 500) for word in found])


def neighbours(generator, batch=128):
    """Pairs (batch, 2) of words, half of which stand within three words of each other, and whether they do (batch,)."""
    text = words()
    at = torch.randint(3, len(text) - 3, (batch,), generator=generator)
    near = at + (1 + torch.randint(3, (batch,), generator=generator)) * (
        2 * torch.randint(2, (batch,), generator=generator) - 1
    )
    far = torch.randint(len(text), (batch,), generator=generator)
    answers = torch.arange(batch) % 2
    return torch.stack([text[at], torch.where(answers > 0, text[near], text[far])], 1), answers.float()


def ranges(generator, batch=32, members=12):
    """Sets (batch, members, 4) of numbers, and how far the largest first number is from the smallest second one."""
    sets = torch.randn(batch, members, 4, generator=generator)
    return sets, sets[..., 0].amax(1) - sets[..., 1].amin(1)


def two_steps_away(generator, batch=16, nodes=12):
    """Links (batch, nodes, nodes) between random nodes, and the logarithm of 1 + the ways of two steps from each to others."""
    links = (torch.rand(batch, nodes, nodes, generator=generator) < 0.2).float().triu(1)
    links = links + links.mT
    ways = links @ links
    return links, (1 + ways.sum(2) - ways.diagonal(dim1=1, dim2=2)).log()


# Tasks ----------------------------------------------------------------------------------------------------------------

FIRST_KEPT_APART = {
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
"""Seven tasks that nothing was chosen by until they were raced once."""

KEPT_APART = {
    "heat": Task(
        lambda: perceptron((1, 32, 32, 1), nn.Tanh),
        lambda generator: torch.rand(64, 1, generator=generator),
        heat_residual,
        "a differential equation",
        "perceptron of two layers of 32 tanh, the residual of Poisson's equation in one dimension, batch 64",
    ),
    "views": Task(
        lambda: perceptron((196, 64, 16), nn.ReLU),
        two_views,
        together,
        "contrast",
        "perceptron of 64 to 16 numbers, which two views are of the same image, MNIST at 14×14, batch 48",
    ),
    "rows": classify(
        RowReader,
        mnist(32, 14),
        kind="plain recurrence",
        description="recurrent network of 32 tanh that reads rows, MNIST at 14×14, batch 32",
    ),
    "adapters": classify(
        Adapted,
        cifar(32, 16),
        kind="products of low rank",
        description="products of rank 4 beside fixed random weights 768-96-96-10, CIFAR-10 at 16×16, batch 32",
    ),
    "skip-gram": Task(
        lambda: SkipGram(501),
        neighbours,
        yes_or_no,
        "two tables",
        "two tables of 16, which words stand near each other, the help texts of Python, batch 128",
    ),
    "sets": Task(
        SetReader,
        ranges,
        squared_error,
        "attention, regression",
        "four questions of attention of 32, a range over sets of 12, batch 32",
    ),
    "graphs": Task(
        Graphs,
        two_steps_away,
        squared_error,
        "graphs",
        "three rounds of messages of 24, ways of two steps in random graphs of 12 nodes, batch 16",
    ),
    "experts": classify(
        Experts, mnist(32, 14), kind="a mixture", description="four gated perceptrons of 12, MNIST at 14×14, batch 32"
    ),
}
"""Eight more, likewise, raced once after the fourth part of the training, and before the fifth."""
