"""The training of the small learned optimizer that is under way: many families of perceptrons on 8×8 images, by evolution strategies.

    python gradbuffer/pretrained/runs/general_mlp.py --seconds 3600 [--threads 2]

goes on from `general_mlp.pt` beside it (weights, their running average, Adam's state, what was measured; functions in progress are
begun anew), or begins, and writes it every minute. Data as for MNIST and CIFAR-10 (L2O_DATA). What it has learned is scored every 500
steps on three tasks of the same kinds: the mean loss of the last 50 of 500 steps with a cosine, at the best of five rates.
It is a run, not the library: `meta_train` takes it over when it can train on several families.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

LR, WARMUP, KEPT, PAIRS, FAMILIES_A_STEP = 3e-4, 100, 0.9995, 8, 4
RATES = [0.0003 * 10 ** (k / 2) for k in range(5)]


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


def make_families(net, data):
    """Four dicts from name to `Perceptrons`: of the third part's second half alone, of the second part, to train on, and to look at."""
    from gradbuffer.kernels.numba_mlp_windows import PerceptronWindows
    from gradbuffer.training.evolution import Perceptrons

    def family(name, hidden, activation, batch, loss="cross_entropy"):
        images, labels = data[name]
        targets, outputs, ceiling = (images, 64, 1.5) if loss == "mse" else (labels, 10, 1.5 * math.log(10))
        return Perceptrons(
            PerceptronWindows(net, (64, *hidden, outputs), activation, loss), images, targets, batch, ceiling
        )

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

    def synthetic(sizes, activation, loss, *data):
        ceiling = 1.5 if loss == "mse" else 1.5 * math.log(10)
        return Perceptrons(PerceptronWindows(net, sizes, activation, loss), *data, ceiling)

    more = {
        "low rank": synthetic((32, 8, 12), "tanh", "mse", small, low_rank, 64),
        "low rank deep": synthetic((32, 16, 16, 12), "tanh", "mse", small, low_rank, 128),
        "skewed": synthetic((32, 24, 6), "silu", "mse", skewed, bent, 64),
        "clusters": synthetic((32, 16, 10), "silu", "cross_entropy", points, which, 32),
    }
    users = torch.randint(48, (20000,), generator=generator)
    table = torch.randn(48, 4, generator=generator) @ torch.randn(4, 24, generator=generator) / 2
    seen = 0.3 * (table[users] + 0.1 * torch.randn(20000, 24, generator=generator))
    words = torch.zeros(20000, 96).scatter_(1, torch.randint(96, (20000, 4), generator=generator), 1.0)
    topics = (words @ torch.randn(96, 10, generator=generator)).argmax(1)
    latest = {
        "table": synthetic((48, 8, 24), "tanh", "mse", F.one_hot(users, 48).float(), seen, 32),
        "words": synthetic((96, 16, 10), "tanh", "cross_entropy", words, topics, 32),
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
            "regression": Perceptrons(PerceptronWindows(net, (32, 32, 8), "relu", "mse"), inputs, targets, 64, 1.5),
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
            "words relu": synthetic((96, 32, 10), "relu", "cross_entropy", words, topics, 64),
        },
    )


def make_sigmoid_families(net, data):
    """Two dicts from name to `Perceptrons`, all of them with sigmoids: to train on, and to look at."""
    from gradbuffer.kernels.numba_mlp_windows import PerceptronWindows
    from gradbuffer.training.evolution import Perceptrons

    def family(name, hidden, batch, images=None):
        inputs, labels = (part[:images] for part in data[name])
        windows = PerceptronWindows(net, (64, *hidden, 10), "sigmoid", "cross_entropy")
        return Perceptrons(windows, inputs, labels, batch, 1.5 * math.log(10))

    return (
        {
            "mnist": family("mnist", (20,), 128),
            "mnist wider": family("mnist", (32,), 64),
            "mnist two layers": family("mnist", (20, 20), 128),
            "2,000 of mnist": family("mnist", (20,), 128, 2000),
            "digits": family("digits", (20,), 128),
            "digits two layers": family("digits", (24, 24), 64),
            "cifar": family("cifar", (24,), 128),
            "3,000 of mnist, two layers": family("mnist", (16, 16), 64, 3000),
        },
        {"mnist 40": family("mnist", (40,), 128), "1,000 of mnist": family("mnist", (24,), 128, 1000)},
    )


def validate(weights, families, steps=500, seeds=4):
    ends = {}
    for name, family in families.items():
        particles = len(RATES) * seeds
        params, state = (
            family.windows.draw_params(seeds, 77).repeat(len(RATES), 1),
            family.windows.init_state(particles),
        )
        falling = 0.5 * (1 + torch.cos(math.pi * torch.arange(steps) / steps))
        lr = torch.tensor(RATES).repeat_interleave(seeds)[:, None] * falling
        losses = family.run(
            weights, params, state, steps, lr=lr, seeds=torch.arange(1000, 1000 + seeds).repeat(len(RATES))
        )
        ends[name] = losses[:, -steps // 10 :].mean(1).view(len(RATES), seeds).mean(1).min().item()
    return ends


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--second", action="store_true", help="the second part, from where the first has come to")
    parser.add_argument("--third", action="store_true", help="likewise, with orthogonal updates and a context")
    parser.add_argument(
        "--sigmoid", action="store_true", help="another one, for sigmoid networks alone, from the start"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
    from gradbuffer.training.evolution import Episodes, Pairs

    form = options.third or options.sigmoid
    net = start_as_normalized_adam(MLPOptimizer(orthogonalize=form, context=form))
    latest, more, trained, watched = make_families(net, small_images())
    start = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    episodes, lr, families_a_step, fall, end = Episodes(), LR, FAMILIES_A_STEP, 0, None
    if options.second:  # more families, rates nearer to those that users choose, and an end
        trained, lr, families_a_step, end = more | trained, 5e-4, 5, 16000
        episodes = Episodes(lengths=(150, 1200), rates=(5e-4, 2e-2), scales=(1e-2, 1e2), falling=0.85)
        start = torch.load(HERE / "general_mlp.pt")["averaged"].clone()
        options.state = options.state or HERE / "general_mlp_second.pt"
    if options.third:  # from the first part's weights, the context's as at the start
        trained, lr, families_a_step = more | trained, 5e-4, 5
        fall, end = 22500, 40000  # from 14,000 to 22,000 steps at the full rate validation stood still
        episodes = Episodes(lengths=(100, 1500), rates=(5e-4, 3e-2), scales=(1e-2, 1e2), falling=0.85, late=0.75)
        first = torch.load(HERE / "general_mlp.pt")["averaged"]
        start[: len(first)] = first
        options.state = options.state or HERE / "general_mlp_third.pt"
    if options.sigmoid:
        trained, watched = make_sigmoid_families(net, small_images())
        lr, families_a_step, end = 7e-4, 4, 8000
        episodes = Episodes(
            lengths=(100, 3000), rates=(1e-3, 1e-1), scales=(1e-2, 1e2), gains=(0.1, 1.7), falling=0.85, late=0.75
        )
        options.state = options.state or HERE / "mnist_mlp.pt"
    options.state = options.state or HERE / "general_mlp.pt"
    weights = torch.nn.Parameter(start.clone())
    adam = torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
    run = {"k": 0, "averaged": start.clone(), "scale": {}, "history": {"validation": [(0, validate(start, watched))]}}
    if options.state.exists():
        run = torch.load(options.state)
        if options.third and run["k"] >= 25000:
            trained = latest | trained
        weights.data.copy_(run["weights"])
        adam.load_state_dict(run["adam"])
    generator = torch.Generator().manual_seed(1000 + run["k"])
    pairs = {name: Pairs(family, PAIRS, generator=generator, episodes=episodes) for name, family in trained.items()}
    names, begun, saved = [], time.time(), time.time()

    def save():
        torch.save(
            {**run, "config": net.config, "weights": weights.data, "adam": adam.state_dict()},
            options.state.with_suffix(".new"),
        )
        options.state.with_suffix(".new").replace(options.state)

    while time.time() - begun < options.seconds and (end is None or run["k"] < end):
        total = torch.zeros_like(start)
        if len(names) < families_a_step:
            names = [list(trained)[place] for place in torch.randperm(len(trained), generator=generator)]
        for name in names[:families_a_step]:
            estimate = pairs[name].advance(weights.data)
            size = estimate.gradient.square().sum().item()
            run["scale"][name] = 0.99 * run["scale"].get(name, size) + 0.01 * size
            total += estimate.gradient / (run["scale"][name] ** 0.5 + 1e-12) / families_a_step
        names = names[families_a_step:]
        weights.grad = total * min(1.0, 1.0 / (total.norm().item() + 1e-12))
        rate = lr * min(1.0, (run["k"] + 1) / WARMUP)
        gone = max(0.0, (run["k"] - fall) / (end - fall)) if end else 0.0
        adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * gone))
        adam.step()
        run["k"] += 1
        run["averaged"].lerp_(weights.data, 1 - min(KEPT, run["k"] / (run["k"] + 10)))
        if run["k"] % (1000 if options.third else 500) == 0:
            run["history"]["validation"].append((run["k"], validate(run["averaged"], watched)))
            print(run["k"], round(time.time() - begun), run["history"]["validation"][-1][1], flush=True)
        if time.time() - saved > 60:
            save()
            saved = time.time()
    save()


if __name__ == "__main__":
    main()
