"""A third lot of tasks for a last look, of kinds that stand neither among the families of any training here nor in the earlier lots.

Written before the fifth part of the general optimizer's training had ended, and raced after all choices, as those of
`gradbuffer.problems.kept_apart` were.
"""

import torch
from torch import nn
from torch.nn import functional as F

from gradbuffer.problems.tasks import Task, cifar, classify, gray, mnist, perceptron, squared_error

__all__ = ["THIRD_KEPT_APART"]


# Networks -------------------------------------------------------------------------------------------------------------


class Flow(nn.Module):
    """States (B, 2) -> states (B, times, 2): ten Euler steps of a learned velocity, the same at every step."""

    def __init__(self, width=32, steps=10):
        super().__init__()
        self.velocity, self.steps = perceptron((2, width, 2), nn.Tanh), steps

    def forward(self, states):
        path = []
        for _ in range(self.steps):
            states = states + 0.2 * self.velocity(states)
            path.append(states)
        return torch.stack(path, 1)


class NoiseReader(nn.Module):
    """Noisy images (B, 196) and how noisy they are (B, 1) -> the noise (B, 196)."""

    def __init__(self, pixels=196, width=64):
        super().__init__()
        self.level, self.input = nn.Linear(1, width), nn.Linear(pixels, width)
        self.body, self.output = nn.Linear(width, width), nn.Linear(width, pixels)

    def forward(self, given):
        images, levels = given
        hidden = F.silu(self.input(images) + self.level(levels))
        return self.output(hidden + F.silu(self.body(hidden)))


class Twins(nn.Module):
    """Pairs of images (B, 2, 1, 14, 14) -> scores (B,) that both are of one class, by the product of what one network makes of each."""

    def __init__(self, width=48, numbers=12):
        super().__init__()
        self.body, self.scale = perceptron((196, width, numbers), nn.SiLU), nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, pairs):
        first, second = self.body(pairs.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return self.scale[1] + self.scale[0] * (first * second).sum(1)


class RadialNetwork(nn.Module):
    """Places (B, 3) -> values (B, 2): sums of bumps, whose centres and widths are learned."""

    def __init__(self, bumps=64):
        super().__init__()
        self.centres, self.widths = nn.Parameter(torch.randn(bumps, 3)), nn.Parameter(torch.zeros(bumps))
        self.output = nn.Linear(bumps, 2)

    def forward(self, places):
        distances = (places[:, None] - self.centres).square().sum(2)
        return self.output(torch.exp(-distances * F.softplus(self.widths)))


class BilinearPooling(nn.Module):
    """Images (B, 3, 16, 16) -> scores (B, 10) by the products of all pairs of features, over all places."""

    def __init__(self, width=12):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, width, 3, 2, 1), nn.ReLU())
        self.output = nn.Linear(width * width, 10)

    def forward(self, images):
        features = self.body(images).flatten(2)
        pairs = (features @ features.mT / features.shape[2]).flatten(1)
        return self.output(pairs.clamp(min=1e-8).sqrt())


class Memory(nn.Module):
    """Keys and what stands at each (B, places, symbols), and a question (B, symbols) -> scores (B, symbols)."""

    def __init__(self, symbols=12, width=24):
        super().__init__()
        self.key, self.value = nn.Linear(symbols, width, bias=False), nn.Linear(symbols, width, bias=False)
        self.output = nn.Linear(width, symbols)

    def forward(self, given):
        keys, values, question = given
        found = (self.key(keys) @ self.key(question)[..., None])[..., 0].softmax(1)
        return self.output((found[..., None] * self.value(values)).sum(1))


class Automaton(nn.Module):
    """Cells (B, 1, 10, 10) -> the same: one rule for all places, applied four times."""

    def __init__(self, width=16):
        super().__init__()
        self.look, self.act = nn.Conv2d(4, width, 3, padding=1, padding_mode="circular"), nn.Conv2d(width, 4, 1)

    def forward(self, cells):
        state = F.pad(cells, (0, 0, 0, 0, 0, 3))
        for _ in range(4):
            state = state + self.act(F.relu(self.look(state)))
        return state[:, :1]


class SoftTree(nn.Module):
    """Images (B, 1, 14, 14) -> scores (B, 10): a tree of 31 soft decisions, whose 32 leaves have scores."""

    def __init__(self, pixels=196, depth=5):
        super().__init__()
        self.decisions, self.leaves = nn.Linear(pixels, 2**depth - 1), nn.Parameter(0.1 * torch.randn(2**depth, 10))
        self.depth = depth

    def forward(self, images):
        right, share, first = torch.sigmoid(self.decisions(images.flatten(1))), images.new_ones(len(images), 1), 0
        for level in range(self.depth):
            own = right[:, first : first + 2**level]
            share, first = torch.stack([share * (1 - own), share * own], 2).flatten(1), first + 2**level
        return share @ self.leaves


# Losses and minibatches -----------------------------------------------------------------------------------------------


def swings(generator, batch=32):
    """States of a pendulum with friction (batch, 2), and ten later ones (batch, 10, 2)."""
    state = torch.rand(batch, 2, generator=generator) * 4 - 2
    start, path = state, []
    for step in range(10 * 5):
        angle, speed = state.unbind(1)
        state = state + 0.04 * torch.stack([speed, -2 * torch.sin(angle) - 0.3 * speed], 1)
        if step % 5 == 4:
            path.append(state)
    return start, torch.stack(path, 1)


def noisy(generator, batch=64):
    """MNIST's images with noise of any size and that size, ((batch, 196), (batch, 1)), and the noise (batch, 196)."""
    images, _ = mnist(batch, 14)(generator)
    share = torch.rand(batch, 1, generator=generator)
    noise = torch.randn(batch, 196, generator=generator)
    return ((1 - share).sqrt() * images.flatten(1) + share.sqrt() * noise, share), noise


def same_or_not(generator, batch=32):
    """Pairs of MNIST's images (batch, 2, 1, 14, 14), and whether both are of one class (batch,), which half or so are."""
    images, labels = mnist(8 * batch, 14)(generator)
    pairs, answers = [], []
    for wanted in (True, False):
        places = ((labels[: 4 * batch] == labels[4 * batch :]) == wanted).nonzero().flatten()[: batch // 2]
        pairs.append(torch.stack([images[places], images[places + 4 * batch]], 1))
        answers.append(torch.full((len(places),), float(wanted)))
    return torch.cat(pairs), torch.cat(answers)


def yes_or_no(model, minibatch):
    pairs, answers = minibatch
    return F.binary_cross_entropy_with_logits(model(pairs), answers)


def fields(generator, batch=128):
    """Places (batch, 3), and a field of two components there (batch, 2)."""
    places = torch.randn(batch, 3, generator=generator)
    x, y, z = places.unbind(1)
    return places, torch.stack([torch.sin(2 * x) * y, torch.cos(x + z) + 0.5 * y * z], 1)


def recalls(generator, batch=64, places=6, symbols=12):
    """Six different symbols with another at each, and one of the first, as ones among zeros; the symbol that stands there (batch,)."""
    keys = torch.rand(batch, symbols, generator=generator).argsort(1)[:, :places]
    values = torch.randint(symbols, (batch, places), generator=generator)
    asked = torch.randint(places, (batch, 1), generator=generator)
    hot = [F.one_hot(one, symbols).float() for one in (keys, values, keys.gather(1, asked)[:, 0])]
    return tuple(hot), values.gather(1, asked)[:, 0]


def lives(generator, batch=16):
    """Cells (batch, 1, 10, 10) of 0 and 1, and what they are after two steps of Conway's game on a torus."""
    cells = (torch.rand(batch, 1, 10, 10, generator=generator) < 0.4).float()
    after = cells
    for _ in range(2):
        neighbours = sum(after.roll((i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)) - after
        after = ((neighbours == 3) | ((neighbours == 2) & (after > 0))).float()
    return cells, after


def faint(generator, batch=64):
    """MNIST's images (batch, 1, 14, 14) in [0, 1], and labels."""
    return gray(batch, 14, generator)


# Tasks ----------------------------------------------------------------------------------------------------------------

THIRD_KEPT_APART = {
    "pendulum": Task(
        Flow, swings, squared_error, "a flow in time", "ten Euler steps of 32 tanh, a pendulum with friction, batch 32"
    ),
    "noise-of-any-size": Task(
        NoiseReader, noisy, squared_error, "diffusion", "64 units that read the noise's size, MNIST at 14×14, batch 64"
    ),
    "same-or-not": Task(
        Twins, same_or_not, yes_or_no, "twins", "perceptron of 48 on both of a pair, MNIST at 14×14, batch 32"
    ),
    "bumps": Task(
        RadialNetwork, fields, squared_error, "radial functions", "64 bumps in three dimensions, a field, batch 128"
    ),
    "bilinear": classify(
        BilinearPooling,
        cifar(16, 16),
        kind="products of features",
        description="two convolutions, products of 12 features, CIFAR-10 at 16×16, batch 16",
    ),
    "recall": classify(
        Memory, recalls, kind="a memory", description="a question to six keys of 12 symbols, width 24, batch 64"
    ),
    "life": Task(
        Automaton,
        lives,
        squared_error,
        "a cellular automaton",
        "a rule of 16 units, four times, Conway's game, batch 16",
    ),
    "tree": classify(SoftTree, faint, kind="a tree", description="31 soft decisions, MNIST at 14×14, batch 64"),
}
"""Eight tasks that nothing was chosen by until the fifth part was done."""
