"""The families of small functions that `general_mlp.py` trains on: perceptrons on small images and made-up data, and other networks."""

import math

import torch
from torch.nn import functional as F

from gradbuffer.problems.perceptrons import ACTIVATIONS, Networks, Perceptrons


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
