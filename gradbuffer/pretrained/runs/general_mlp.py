"""The training of the small learned optimizer that is under way: many families of perceptrons on 8×8 images, by evolution strategies.

    python gradbuffer/pretrained/runs/general_mlp.py --seconds 3600 [--threads 2]

goes on from `general_mlp.pt` beside it (weights, their running average, Adam's state, what was measured; functions in progress are
begun anew), or begins, and writes it every 100 steps. Data as for MNIST and CIFAR-10 (L2O_DATA). `meta_train` does the work; here are
the families, the parts of the training, and what is kept of a run. What it has learned is scored every 500 steps on tasks of the same
kinds: the mean loss of the last 50 of 500 steps with a cosine, at the best of five rates, as a geometric mean over them.
"""

import argparse
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam  # noqa: E402
from gradbuffer.problems.perceptrons import ACTIVATIONS  # noqa: E402
from gradbuffer.training.checkpoints import read_checkpoint  # noqa: E402
from gradbuffer.training.episodic_run import EpisodicRun  # noqa: E402
from gradbuffer.training.options import training_of  # noqa: E402
from meta_training import Episodes, EpisodicES, meta_train  # noqa: E402
from optimizees import Mixture, Networks, Perceptrons  # noqa: E402

WARMUP, EVERY = 100, 100


# The families -----------------------------------------------------------------------------------------------------------


class Families(Mixture):
    """Those of a dict from name to problem, of which some are drawn at each step; others are for validation."""

    def __init__(self, trained, watched, families, weights=None):
        super().__init__(list(trained.values()), weights=weights, families=families)
        self.names, self.watched = list(trained), Mixture(list(watched.values()))

    def validation_problem(self):
        return self.watched


def standardized(images, labels):
    return (images - images.mean()) / images.std(), labels.long()


def small_images():
    """MNIST, CIFAR-10 in grey and scikit-learn's digits, 8×8."""
    from sklearn.datasets import load_digits

    from gradbuffer.data.cifar10 import load_cifar10
    from gradbuffer.data.mnist import load_mnist

    mnist, cifar, digits = load_mnist(), load_cifar10(), load_digits()
    side = math.isqrt(mnist.train_images.shape[1])
    border, pool = (2, 3) if side == 28 else (0, 1)
    whole = mnist.train_images.view(-1, 1, side, side)[:, :, border : side - border, border : side - border]
    grey = cifar.train_images.float().mean(1, keepdim=True)
    return {
        "mnist": standardized(F.avg_pool2d(whole, pool).flatten(1), mnist.train_labels),
        "cifar": standardized(F.avg_pool2d(grey, grey.shape[-1] // 8).flatten(1), cifar.train_labels),
        "digits": standardized(torch.tensor(digits.images).float().flatten(1), torch.tensor(digits.target)),
    }


def make_families(data):
    """Four dicts from name to `Perceptrons`: of the third part's second half alone, of the second part, to train on, and to look at."""

    def family(name, hidden, activation, batch, loss="cross_entropy"):
        images, labels = data[name]
        return Perceptrons(images, images if loss == "mse" else labels, hidden, activation, batch)

    generator = torch.Generator().manual_seed(99)
    first, second = (
        torch.randn(32, 24, generator=generator) / 32**0.5,
        torch.randn(24, 8, generator=generator) * 1.5 / 24**0.5,
    )
    inputs = torch.randn(20000, 32, generator=generator)
    targets = torch.tanh(2 * inputs @ first) @ second
    targets = (targets - targets.mean()) / targets.std()
    left, right = torch.randn(32, 6, generator=generator) / 32**0.5, torch.randn(6, 12, generator=generator) / 6**0.5
    small = 0.2 * torch.randn(20000, 32, generator=generator)
    low_rank = small @ left @ right
    low_rank = low_rank / low_rank.std()
    skewed = torch.randn(20000, 32, generator=generator) * torch.logspace(0, -1.5, 32)
    bent = torch.sin(skewed @ torch.randn(32, 6, generator=generator))
    bent = (bent - bent.mean()) / bent.std()
    clusters = torch.randn(10, 32, generator=generator) * 0.35
    which = torch.randint(10, (20000,), generator=generator)
    points = clusters[which] + torch.randn(20000, 32, generator=generator) * 0.6
    more = {
        "low rank": Perceptrons(small, low_rank, (8,), "tanh", 64),
        "low rank deep": Perceptrons(small, low_rank, (16, 16), "tanh", 128),
        "skewed": Perceptrons(skewed, bent, (24,), "silu", 64),
        "clusters": Perceptrons(points, which, (16,), "silu", 32),
    }
    users = torch.randint(48, (20000,), generator=generator)
    table = torch.randn(48, 4, generator=generator) @ torch.randn(4, 24, generator=generator) / 2
    seen = 0.3 * (table[users] + 0.1 * torch.randn(20000, 24, generator=generator))
    words = torch.zeros(20000, 96).scatter_(1, torch.randint(96, (20000, 4), generator=generator), 1.0)
    topics = (words @ torch.randn(96, 10, generator=generator)).argmax(1)
    latest = {
        "table": Perceptrons(F.one_hot(users, 48).float(), seen, (8,), "tanh", 32),
        "words": Perceptrons(words, topics, (16,), "tanh", 32),
        "mnist wide": family("mnist", (96,), "relu", 64),
        "digits eight layers": family("digits", (20,) * 8, "relu", 32),
    }
    return (
        latest,
        more,
        {
            "mnist relu": family("mnist", (32,), "relu", 64),
            "cifar relu": family("cifar", (32,), "relu", 64),
            "digits tanh": family("digits", (32,), "tanh", 64),
            "mnist autoencoder": family("mnist", (16,), "silu", 32, "mse"),
            "cifar two layers": family("cifar", (32, 32), "silu", 32),
            "mnist deep tanh": family("mnist", (24, 24, 24), "tanh", 16),
            "regression": Perceptrons(inputs, targets, (32,), "relu", 64),
            "cifar autoencoder": family("cifar", (24,), "tanh", 64, "mse"),
            "cifar linear": family("cifar", (), "relu", 64),
            "digits deep relu": family("digits", (32, 32, 32), "relu", 128),
            "mnist sigmoid": family("mnist", (20,), "sigmoid", 128),
            "cifar deep relu": family("cifar", (24, 24, 24, 24), "relu", 16),
        },
        {
            "cifar wide": family("cifar", (64,), "relu", 64),
            "mnist autoencoder deep": family("mnist", (32, 8, 32), "relu", 64, "mse"),
            "digits five": family("digits", (48, 48, 48, 48), "tanh", 64),
            "cifar ten layers": family("cifar", (24,) * 9, "relu", 64),
            "words relu": Perceptrons(words, topics, (32,), "relu", 64),
        },
    )


def make_broad_families(data):
    """Dict from name to `Perceptrons`: tasks that end low, rare symbols, noise in labels, inputs that are not centred."""
    generator = torch.Generator().manual_seed(101)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    def standard(values):
        return (values - values.mean()) / values.std()

    def symbols(count, *columns):
        return torch.cat([F.one_hot(column, count).float() for column in columns], 1)

    count = 20000
    places, waves = 2 * uniform(count, 2) - 1, 3 * normal(2, 16)
    picture = standard(torch.sin(3 * places @ normal(2, 12) + 6.3 * uniform(12)) @ normal(12, 3))
    numbers = uniform(count, 20)
    marks = torch.zeros(count, 20).scatter_(1, uniform(count, 20).argsort(1)[:, :2], 1.0)
    taught = normal(count, 16)
    first, second = torch.randint(7, (2, count), generator=generator)
    next_of, text = torch.softmax(2 * normal(12, 12, 12), -1), [0, 1]
    draws = uniform(count + 3)
    cumulated = next_of.cumsum(-1)
    for draw in draws:
        text.append(min(11, int((cumulated[text[-2], text[-1]] < draw).sum())))
    text = torch.tensor(text)
    frequencies = 1 / torch.arange(1, 97)
    rare = torch.multinomial(frequencies, count, replacement=True, generator=generator)
    kinds = torch.multinomial(torch.softmax(2 * normal(96, 12), -1)[rare], 1, generator=generator)[:, 0]
    digits, labels = data["mnist"]
    random = torch.where(uniform(len(labels)) < 0.3, torch.randint(10, labels.shape, generator=generator), labels)
    grey, classes = data["cifar"]
    angles = torch.arange(count) % 3 * 2.1 + (turns := 4 * uniform(count)) + 0.1 * normal(count)
    spirals = torch.stack([turns * torch.cos(angles), turns * torch.sin(angles)], 1) / 2
    return {
        "picture": Perceptrons(
            torch.cat([torch.sin(places @ waves), torch.cos(places @ waves)], 1), picture, (48, 48), "tanh"
        ),
        "adding": Perceptrons(
            torch.cat([numbers, marks], 1), (numbers * marks).sum(1, keepdim=True), (32, 32), "silu", 32
        ),
        "taught": Perceptrons(taught, torch.tanh(taught @ normal(16, 8) / 4) @ normal(8, 4), (24,), "tanh"),
        "sum of two": Perceptrons(symbols(7, first, second), (first + second) % 7, (32,), "relu", 32),
        "text": Perceptrons(symbols(12, text[:count], text[1 : count + 1]), text[2 : count + 2], (32,), "tanh"),
        "rare symbols": Perceptrons(symbols(96, rare), kinds, (16,), "tanh"),
        "random labels": Perceptrons(digits, random, (32,), "relu"),
        "not centred": Perceptrons(0.5 * (digits - digits.min()), labels, (32, 32), "relu", 32),
        "cifar deep silu": Perceptrons(grey, classes, (24,) * 5, "silu", 32),
        "digits, small batches": Perceptrons(*data["digits"], (32,), "relu", 8),
        "noise removed": Perceptrons(grey + 0.5 * normal(*grey.shape), grey, (24,), "silu", 32),
        "autoencoder deep tanh": Perceptrons(digits, digits, (32, 8, 32), "tanh"),
        "large targets": Perceptrons(taught, 5 * torch.sin(taught @ normal(16, 4) / 2), (32, 32), "relu"),
        "spirals": Perceptrons(spirals, torch.arange(count) % 3, (24, 24, 24), "tanh", 32),
    }


def make_large_families(data):
    """Dict from name to `Perceptrons`, wider or deeper than the others."""
    digits = data["digits"]
    return {
        "mnist very wide": Perceptrons(*data["mnist"], (160,), "relu", 32),
        "cifar wide two layers": Perceptrons(*data["cifar"], (128, 64), "silu", 32),
        "digits twelve layers": Perceptrons(*digits, (16,) * 11, "relu", 32),
        "digits wide to narrow": Perceptrons(*digits, (128, 16), "tanh", 32),
    }


def make_low_families():
    """Dict from name to `Perceptrons`: functions without noise, whose losses go far down, and two tables at once."""
    generator = torch.Generator().manual_seed(102)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def standard(values):
        return (values - values.mean(0)) / values.std(0)

    count = 20000
    x, hidden = normal(count, 12), normal(count, 4)
    users, items = torch.randint(40, (2, count), generator=generator)
    left, right = normal(40, 3), normal(40, 3)
    both = torch.cat([F.one_hot(users, 40), F.one_hot(items, 40)], 1).float()
    ratings = (left[users] * right[items]).sum(1, keepdim=True)
    mixed = hidden @ normal(4, 24) / 2
    return {
        "products": Perceptrons(x, standard(x[:, :4] * x[:, 4:8]), (48,), "silu", 64),
        "distances": Perceptrons(x, standard((x[:, :6] - x[:, 6:]).norm(dim=1, keepdim=True)), (32, 32), "tanh", 32),
        "steps": Perceptrons(x, standard((x[:, :3] > 0).float() @ normal(3, 3)), (32,), "relu", 64),
        "waves of one number": Perceptrons(
            x[:, :1], standard(torch.sin(3 * x[:, :1] + torch.arange(3.0))), (32, 32), "tanh", 64
        ),
        "linear, deep": Perceptrons(x, x @ normal(12, 6) / 12**0.5, (24, 24, 24), "tanh", 32),
        "hidden numbers": Perceptrons(mixed, mixed, (4,), "tanh", 32),
        "hidden numbers deep": Perceptrons(mixed, mixed, (16, 4, 16), "silu", 64),
        "two tables": Perceptrons(both, ratings, (16,), "tanh", 64),
        "two tables, liked": Perceptrons(both, (ratings[:, 0] > 0).long(), (8,), "silu", 128),
        "largest": Perceptrons(x, x.amax(1, keepdim=True), (32, 32), "relu", 32),
        "order": Perceptrons(x[:, :6], x[:, :6].sort(1).values, (48,), "relu", 64),
    }


def make_network_families(data):
    """Dict from name to `Networks`: of other forms than perceptrons, small enough that fifty steps of them take a tenth of a second."""
    generator = torch.Generator().manual_seed(103)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def whole(most, *shape):
        return torch.randint(most, shape, generator=generator)

    def linear(x, weight, bias=None):
        """(B, batch, ..., inputs), (B, units, inputs) -> (B, batch, ..., units)."""
        y = torch.bmm(x.flatten(1, -2), weight.mT)
        return (y if bias is None else y + bias[:, None]).unflatten(1, x.shape[1:-1])

    def mse(x, wanted):
        return (x - wanted).square().flatten(1).mean(1)

    def cross_entropy(scores, labels):
        """(B, batch, ..., classes), (B, batch, ...) -> (B,)."""
        logs = scores.log_softmax(-1).gather(-1, labels[..., None])
        return -logs.flatten(1).mean(1)

    def recurrent(p, x, wanted):
        state = x.new_zeros(*x.shape[:2], p["own"].shape[1])
        for t in range(x.shape[2]):
            state = torch.tanh(linear(x[:, :, t], p["inner"], p["bias"]) + linear(state, p["own"]))
        return linear(state, p["outer"], p["last"])

    def gated(p, x, wanted):
        state = x.new_zeros(*x.shape[:2], p["own"].shape[2])
        for t in range(x.shape[2]):
            gates = linear(x[:, :, t], p["inner"], p["bias"]) + linear(state, p["own"])
            keep, new = gates.chunk(2, -1)
            state = state + torch.sigmoid(keep) * (torch.tanh(new) - state)
        return linear(state, p["outer"], p["last"])

    def attention(p, x, wanted):
        """One block of attention and a perceptron over places, both added to what they read."""
        h = linear(x, p["embed"], p["embed_bias"]) + (p["place"][:, None] if "place" in p else 0)
        q, k, v = linear(normalized(h), p["qkv"]).chunk(3, -1)
        h = h + linear((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v, p["mix"])
        h = h + linear(F.silu(linear(normalized(h), p["up"], p["up_bias"])), p["down"])
        return h

    def normalized(h):
        return F.layer_norm(h, h.shape[-1:])

    def convolved(p, x, wanted):
        """Two convolutions of 3×3 over (B, batch, 1, 8, 8), and scores."""
        for name, stride in (("first", 1), ("second", 2)):
            w = p[name]
            columns = F.unfold(x.flatten(0, 1), 3, padding=1, stride=stride).unflatten(0, x.shape[:2])
            y = torch.einsum("bok,bnkp->bnop", w.flatten(2), columns) + p[name + "_bias"][:, None, :, None]
            x = F.relu(y).unflatten(-1, (int(y.shape[-1] ** 0.5),) * 2)
        return linear(x.flatten(2), p["outer"], p["last"])

    def over_time(p, x, wanted):
        """Two convolutions in time, of reach 3 and 6, over (B, batch, length, symbols), which see what came before only."""
        h = linear(x, p["embed"])
        for name, gap in (("first", 1), ("second", 2)):
            past = torch.cat([F.pad(h, (0, 0, gap * k, 0))[:, :, : h.shape[2]] for k in range(3)], -1)
            h = h + F.relu(linear(past, p[name], p[name + "_bias"]))
        return linear(h, p["outer"])

    def messages(p, links, wanted):
        h = F.silu(linear(links.mean(-1, keepdim=True), p["inner"], p["inner_bias"]))
        for number in range(2):
            read = linear(h, p[f"own_{number}"], p[f"bias_{number}"]) + linear(links @ h / 3, p[f"others_{number}"])
            h = h + torch.tanh(read)
        return linear(h, p["outer"], p["last"])

    def of_set(p, x, wanted):
        h = F.relu(linear(F.relu(linear(x, p["a"], p["a_bias"])), p["b"], p["b_bias"])).mean(2)
        return linear(F.relu(linear(h, p["c"], p["c_bias"])), p["d"], p["d_bias"])

    def products(p, pairs, answers):
        rows = [
            table.gather(1, pairs[..., k, None].expand(-1, -1, table.shape[-1]))
            for k, table in enumerate((p["left"], p["right"]))
        ]
        return (rows[0] * rows[1]).sum(-1)

    def adapted(fixed):
        def scores(p, x, wanted):
            for number, weight in enumerate(fixed):
                x = (F.relu(x) if number else x) @ weight.T + linear(
                    linear(x, p[f"inner_{number}"]), p[f"outer_{number}"]
                )
            return x

        return scores

    def family(name, network, loss, data, shapes, batch=32, **gains):
        return Networks(data, shapes, lambda p, x, y: loss(network(p, x, y), y), batch, name, gains)

    def first(network):
        return lambda p, x, y: network(p, x, y).mean(2)

    def gate_shapes(inputs, width, outputs, gates=1):
        return {
            "inner": (gates * width, inputs),
            "bias": (gates * width,),
            "own": (gates * width, width),
            "outer": (outputs, width),
            "last": (outputs,),
        }

    def block_shapes(inputs, width, outputs, places=0):
        shapes = {"embed": (width, inputs), "embed_bias": (width,), "qkv": (3 * width, width), "mix": (width, width)}
        shapes |= {"up": (2 * width, width), "up_bias": (2 * width,), "down": (width, 2 * width)}
        return shapes | ({"place": (places, width)} if places else {}) | {"read": (outputs, width)}

    count = 8000
    digits, labels = data["mnist"]
    grey, classes = data["cifar"]
    rows, places = digits.view(-1, 8, 8), whole(8, count, 6)
    numbers, sets = normal(count, 6, 2), normal(count, 6, 3)
    hot = F.one_hot(places, 8).float()
    links = (torch.rand(count, 8, 8, generator=generator) < 0.25).float().triu(1)
    links = links + links.mT
    triangles = torch.diagonal(links @ links @ links, dim1=1, dim2=2)[..., None].add(1).log()
    nearest = (links @ links.sum(2, keepdim=True)).add(1).log()
    words, topics = torch.randint(60, (2, count), generator=generator)
    tables = normal(60, 5), normal(60, 5)
    ratings = (tables[0][words] * tables[1][topics]).sum(1) / 2 + 0.1 * normal(count)
    liked = ((tables[0][words] * tables[1][topics]).sum(1) + normal(count) > 0).float()
    both = torch.stack([words, topics], 1)
    fixed = [normal(32, 64) / 8 * 2**0.5, normal(10, 32) / 32**0.5]
    ranks = {
        f"{kind}_{k}": shape
        for k in range(2)
        for kind, shape in (("inner", (4, fixed[k].shape[1])), ("outer", (len(fixed[k]), 4)))
    }
    conv = {"first": (6, 1, 3, 3), "first_bias": (6,), "second": (10, 6, 3, 3), "second_bias": (10,)}
    conv |= {"outer": (10, 160), "last": (10,)}
    waves = torch.sin(
        torch.rand(count, 1, generator=generator) * 6
        + torch.arange(9) * (0.3 + torch.rand(count, 1, generator=generator))
    )
    graph = {"inner": (12, 1), "inner_bias": (12,), "outer": (1, 12), "last": (1,)}
    graph |= {
        f"{kind}_{k}": (12,) if kind == "bias" else (12, 12) for k in range(2) for kind in ("own", "others", "bias")
    }
    set_of = {
        "a": (16, 3),
        "a_bias": (16,),
        "b": (16, 16),
        "b_bias": (16,),
        "c": (16, 16),
        "c_bias": (16,),
        "d": (1, 16),
        "d_bias": (1,),
    }
    time = {
        "embed": (12, 8),
        "first": (12, 36),
        "first_bias": (12,),
        "second": (12, 36),
        "second_bias": (12,),
        "outer": (8, 12),
    }
    yes = lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1)  # noqa: E731
    read = lambda p, x, y: linear(attention(p, x, y), p["read"])  # noqa: E731
    largest = sets[..., 0].amax(1, keepdim=True) - sets[..., 1].amin(1, keepdim=True)
    return {
        "rows, recurrent": family("rows, recurrent", recurrent, cross_entropy, (rows, labels), gate_shapes(8, 20, 10)),
        "adding, recurrent": family(
            "adding, recurrent",
            gated,
            mse,
            (numbers, numbers[..., 0].sum(1, keepdim=True) / 2),
            gate_shapes(2, 16, 1, 2),
        ),
        "last symbol, gated": family(
            "last symbol, gated", gated, cross_entropy, (hot, places[:, 1]), gate_shapes(8, 16, 8, 2)
        ),
        "next of a wave": family(
            "next of a wave", recurrent, mse, (waves[:, :8, None], waves[:, 8:]), gate_shapes(1, 16, 1), 16
        ),
        "order, attention": family(
            "order, attention", read, cross_entropy, (hot, places.sort(1)[0]), block_shapes(8, 16, 8, 6), 16
        ),
        "rows, attention": family(
            "rows, attention", first(read), cross_entropy, (rows, labels), block_shapes(8, 16, 10, 8), 16
        ),
        "range of a set": family("range of a set", first(read), mse, (sets, largest), block_shapes(3, 16, 1)),
        "mnist convolutions": family(
            "mnist convolutions", convolved, cross_entropy, (digits.view(-1, 1, 8, 8), labels), conv, 8
        ),
        "cifar convolutions": family(
            "cifar convolutions", convolved, cross_entropy, (grey.view(-1, 1, 8, 8), classes), conv, 16
        ),
        "delay, in time": family("delay, in time", over_time, cross_entropy, (hot, F.pad(places, (3, 0))[:, :6]), time),
        "triangles": family("triangles", messages, mse, (links, triangles), graph),
        "neighbours": family("neighbours", messages, mse, (links, nearest), graph, 16),
        "mean of a set": family("mean of a set", of_set, mse, (sets, sets.square().mean((1, 2))[:, None]), set_of),
        "ratings": family(
            "ratings", products, mse, (both, ratings), {"left": (60, 5), "right": (60, 5)}, 64, left=2.0, right=2.0
        ),
        "liked": family(
            "liked", products, yes, (both, liked), {"left": (60, 8), "right": (60, 8)}, 128, left=2.0, right=2.0
        ),
        "mnist adapters": family(
            "mnist adapters", adapted(fixed), cross_entropy, (digits, labels), ranks, 32, outer_0=0.1, outer_1=0.1
        ),
    }


def make_random_families(families, count=120):
    """Dict from name to `Perceptrons` of forms drawn at random, on the data of those given."""
    generator, found = torch.Generator().manual_seed(104), {}
    for number in range(count):
        data = families[int(torch.randint(len(families), (), generator=generator))]
        layers, activation = (int(torch.randint(most, (), generator=generator)) for most in (6, len(ACTIVATIONS)))
        units, batch = torch.rand(layers, generator=generator), torch.rand((), generator=generator)
        found[f"random {number}"] = Perceptrons(
            data.inputs,
            data.targets,
            [int(8 * 12**share) for share in units],
            list(ACTIVATIONS)[activation],
            int(8 * 16**batch),
        )
    return found


# What is kept of a run --------------------------------------------------------------------------------------------------


def split(net, flat):
    """A dict from name to the tensor's part of a flat vector."""
    sizes = [parameter.numel() for parameter in net.parameters()]
    return {name: part.view_as(value).clone() for (name, value), part in zip(net.named_parameters(), flat.split(sizes))}


def joined(parts):
    return torch.cat([part.flatten() for part in parts])


def take_up(run, state):
    """Set a run to where the state left it; functions are begun anew."""
    families = run.problem.families
    run.net.load_state_dict(split(run.net, state["weights"]))
    run.averaged.load_state_dict(split(run.net, state["averaged"]))
    run.best = split(run.net, state["averaged"])
    moments = state["adam"]["state"].get(0)
    for name, parameter in run.net.named_parameters() if moments else ():
        # gradients are sums over families here, means in the state
        first, second = split(run.net, moments["exp_avg"]), split(run.net, moments["exp_avg_sq"])
        run.adam.state[parameter] = {
            "step": moments["step"].clone(),
            "exp_avg": first[name] * families,
            "exp_avg_sq": second[name] * families**2,
        }
    run.sizes = {place: state["scale"][name] for place, name in enumerate(run.problem.names) if name in state["scale"]}
    run.iteration = run.history.best_iteration = state["k"]
    for record in ("meta_loss", "grad_norm", "lr", "update_size", "signal_to_noise"):
        vars(run.history)[record][:] = [math.nan] * state["k"]


def state_of(content, net, problem, before):
    """The state that a checkpoint's content is, after those that were measured before."""
    moments = [content["adam"]["state"][place] for place in range(len(list(net.parameters())))]
    adam = {
        "step": moments[0]["step"],
        "exp_avg": joined([part["exp_avg"] for part in moments]) / problem.families,
        "exp_avg_sq": joined([part["exp_avg_sq"] for part in moments]) / problem.families**2,
    }
    group = {**content["adam"]["param_groups"][0], "params": [0]}
    measured = [(k, {"geometric mean": score}) for k, score in content["history"]["validation"]]
    return {
        "k": content["iteration"],
        "weights": joined(content["net"].values()),
        "averaged": joined(content["averaged"].values()),
        "adam": {"state": {0: adam}, "param_groups": [group]},
        "scale": {problem.names[place]: size for place, size in content["sizes"].items()},
        "history": {**before, "validation": before["validation"] + measured},
        "config": net.config,
    }


def save(state, path):
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--second", action="store_true", help="the second part, from where the first has come to")
    parser.add_argument("--third", action="store_true", help="likewise, with orthogonal updates and a context")
    parser.add_argument("--fifth", action="store_true", help="from there, half of the families other networks")
    parser.add_argument("--sixth", action="store_true", help="from there, with 120 perceptrons of random forms more")
    parser.add_argument("--fourth", action="store_true", help="from there, more families, about one rate")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    form = given.third or given.fourth or given.fifth or given.sixth
    net = start_as_normalized_adam(MLPOptimizer(orthogonalize=form, context=form))
    data = small_images()
    latest, more, trained, watched = make_families(data)
    start = joined(net.parameters()).detach()
    episodes, lr, families, fall, end, every = Episodes(), 3e-4, 4, 0, None, 500
    if given.second:  # more families, rates nearer to those that users choose, and an end
        trained, lr, families, end = more | trained, 5e-4, 5, 16000
        episodes = Episodes(lengths=(150, 1200), rates=(5e-4, 2e-2), scales=(1e-2, 1e2), falling=0.85)
        start = torch.load(HERE / "general_mlp.pt")["averaged"].clone()
    if given.third:  # from the first part's weights, the context's as at the start
        trained, lr, families, every = more | trained, 5e-4, 5, 1000
        fall, end = 22500, 40000  # from 14,000 to 22,000 steps at the full rate validation stood still
        episodes = Episodes(lengths=(100, 1500), rates=(5e-4, 3e-2), scales=(1e-2, 1e2), falling=0.85, late=0.75)
        first = torch.load(HERE / "general_mlp.pt")["averaged"]
        start[: len(first)] = first
    if given.fourth:  # near one rate, so that what it reads of the rate tells it how far the schedule has come
        trained = make_large_families(data) | make_broad_families(data) | latest | more | trained
        lr, families, fall, end, every = 5e-4, 6, 1000, 9000, 1000
        episodes = Episodes(lengths=(150, 2000), rates=(7e-3, 1.4e-2), scales=(1e-2, 1e2), falling=0.95, late=0.75)
        start = torch.load(HERE / "general_mlp_third.pt")["averaged"]
    weights = None
    if (
        given.fifth or given.sixth
    ):  # half of them other networks than perceptrons; of perceptrons as many on pictures as on other data
        trained = make_low_families() | make_large_families(data) | make_broad_families(data) | latest | more | trained
        for name in ("sum of two", "digits tanh", "digits deep relu"):  # their losses end at what rounding leaves
            trained.pop(name)
        watched.pop("digits five")
        if given.sixth:
            trained |= make_random_families(list(trained.values()))
        pictures = [problem.inputs.shape[1] == 64 for problem in trained.values()]
        weights = [1 / (sum(pictures) if picture else len(pictures) - sum(pictures)) for picture in pictures]
        others = make_network_families(data)
        trained, weights = trained | others, weights + [2 / len(others)] * len(others)
        lr, families, fall, end, every = 1e-3, 5, 800, 2200, 500
        if given.sixth:
            lr, fall, end, every = 5e-4, 12000, 20000, 1000
        episodes = Episodes(lengths=(150, 2000), rates=(1.5e-2, 4.5e-2), scales=(1e-2, 1e2), falling=1.0, late=0.75)
        start = torch.load(HERE / f"general_mlp_{'fifth' if given.sixth else 'fourth'}.pt")["averaged"]
    part = (
        "_sixth" * given.sixth
        + "_fifth" * given.fifth
        + "_fourth" * given.fourth
        + "_second" * given.second
        + "_third" * given.third
    )
    path = given.state or HERE / f"general_mlp{part}.pt"
    state = {
        "k": 0,
        "weights": start,
        "averaged": start,
        "adam": {"state": {}},
        "scale": {},
        "history": {"validation": []},
    }
    if path.exists():
        state = torch.load(path)
    if given.third and state["k"] >= 25000:
        trained = latest | trained
    if given.fourth and state["k"] >= 4900:  # where its losses had come to be lowest
        episodes = replace(episodes, rates=(2e-2, 4.5e-2))
    problem, begun = Families(trained, watched, families, weights), time.time()

    def schedule(iteration, iterations):
        gone = max(0.0, (iteration - fall) / (end - fall)) if end else 0.0
        return min(1.0, (iteration + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * gone))

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        options = dict(
            steps=500,
            unroll=50,
            meta_batch=8,
            iterations=end or 10**6,
            seed=state["k"],
            clip=float(families),
            balance=True,
            averaging=0.9995,
            method=EpisodicES(episodes=episodes),
            meta_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
            schedule=schedule,
            validation_every=every,
            validation_functions=4,
            checkpoint=checkpoint,
            checkpoint_every=EVERY,
        )
        run = EpisodicRun(net, problem, training_of(net, **options))
        take_up(run, state)
        run.save()

        def follow(done, history):
            if done % every == 0:
                print(done, round(time.time() - begun), history.validation[-1][1], flush=True)
            if done % EVERY == 0 or done == end:
                save(state_of(read_checkpoint(checkpoint, run.settings), net, problem, state["history"]), path)
                if time.time() - begun > given.seconds:
                    raise KeyboardInterrupt

        meta_train(net, problem, callback=follow, progress=False, **options)


if __name__ == "__main__":
    main()
