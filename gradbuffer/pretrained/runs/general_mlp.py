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
from gradbuffer.training.checkpoints import read_checkpoint  # noqa: E402
from gradbuffer.training.episodic_run import EpisodicRun  # noqa: E402
from gradbuffer.training.options import training_of  # noqa: E402
from meta_training import Episodes, EpisodicES, meta_train  # noqa: E402
from optimizees import Mixture, Perceptrons  # noqa: E402

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
    parser.add_argument("--fifth", action="store_true", help="from there, half of the families no pictures")
    parser.add_argument("--fourth", action="store_true", help="from there, more families, about one rate")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    form = given.third or given.fourth or given.fifth
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
    if given.fifth:  # of families that are no pictures of digits or things as many as of those, whatever their number
        trained = make_low_families() | make_large_families(data) | make_broad_families(data) | latest | more | trained
        pictures = [problem.inputs.shape[1] == 64 for problem in trained.values()]
        weights = [1 / (sum(pictures) if picture else len(pictures) - sum(pictures)) for picture in pictures]
        lr, families, fall, end, every = 5e-4, 6, 6000, 20000, 1000
        episodes = Episodes(lengths=(150, 2000), rates=(1.5e-2, 4.5e-2), scales=(1e-2, 1e2), falling=1.0, late=0.75)
        start = torch.load(HERE / "general_mlp_fourth.pt")["averaged"]
    part = "_fifth" * given.fifth + "_fourth" * given.fourth + "_second" * given.second + "_third" * given.third
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
