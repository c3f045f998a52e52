"""A learned optimizer where it was not trained: ReLU, ten times the horizon, a convolutional network, a transformer.

    python benchmarks/general_optimizer.py                          # pretrained/general_lstm; --net FILE for another
    python benchmarks/general_optimizer.py --parts relu transformer # only these

Loss curves are means over functions or seeds; all optimizers get the same functions, starting points and minibatches.
Hand-designed optimizers get the learning rate with the best final loss on other functions (`tune_baselines`, and for
Adam on the last two problems the best of RATES on another seed); the learned one is as it is in its file.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of the tuned Adam


class Transformer(nn.Module):
    """Two layers of 32 features, for sequences of 16 symbols."""

    def __init__(self, symbols=16, length=16):
        super().__init__()
        self.embedding, self.place = nn.Embedding(symbols, 32), nn.Parameter(0.02 * torch.randn(length, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.body, self.output = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, symbols)

    def forward(self, symbols):
        return self.output(self.body(self.embedding(symbols) + self.place))


def convolutional_network():
    layers = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def image_batches(images, labels):
    """A function of a generator: 64 images, normalized, and their labels."""

    def draw(generator):
        index = torch.randint(len(labels), (64,), generator=generator)
        return (images[index].float() - 127) / 64, labels[index]

    return draw


def sequences(generator):
    """32 sequences; at each place stands the sum of the symbol there and the one at the mirrored place, modulo 16."""
    symbols = torch.randint(16, (32, 16), generator=generator)
    return symbols, (symbols + symbols.flip(1)) % 16


def train(make_model, draw, make_optimizer, steps, seed):
    """The loss at every step (steps,)."""
    torch.manual_seed(seed)
    model, generator, losses = make_model(), torch.Generator().manual_seed(seed), torch.empty(steps)
    optimizer = make_optimizer(model.parameters())
    for t in range(steps):
        inputs, labels = draw(generator)
        scores = model(inputs)
        loss = F.cross_entropy(scores.flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[t] = loss.item()
    return losses


def compare_models(title, net, make_model, draw, steps, seeds):
    from optimizers import LearnedOptimizer

    def adam(rate):
        return lambda parameters: torch.optim.Adam(parameters, lr=rate)

    ends = {rate: train(make_model, draw, adam(rate), steps, 1000)[-steps // 10 :].mean().item() for rate in RATES}
    best = min(ends, key=ends.get)
    rules = {
        "learned": lambda parameters: LearnedOptimizer(parameters, net),
        "Adam, default 0.001": adam(1e-3),
        f"Adam, tuned: {best}": adam(best),
    }
    print(
        f"\n{title}: loss over steps, {len(seeds)} seeds\n\n| optimizer | "
        + " | ".join(f"{k * steps // 4} to {(k + 1) * steps // 4 - 1}" for k in range(4))
        + f" | last {steps // 10} |\n"
        + "| --- " * 6
        + "|"
    )
    last = {}
    for name, rule in rules.items():
        curves = torch.stack([train(make_model, draw, rule, steps, seed) for seed in seeds])
        parts, last[name] = [f"{part.mean():.3f}" for part in curves.chunk(4, 1)], curves[:, -steps // 10 :].mean(1)
        print(f"| {name} | " + " | ".join(parts) + f" | {spread(last[name])} |", flush=True)
    learned, *others = last
    print(
        "\nlearned minus "
        + ", minus ".join(f"{name}: {spread(last[learned] - last[name])}" for name in others)
        + " (paired)",
        flush=True,
    )


def compare_on_mnist(title, net, activation, steps, functions, tuning_functions, marks):
    """The library's own comparison: mean loss of the ten steps up to each mark, and the sum over the first 100."""
    from meta_training import compare, tune_baselines
    from optimizees import MNISTNet

    tuned = tune_baselines(
        MNISTNet(activation=activation, split="validation"), steps, tuning_functions, seed=1, progress=False
    )
    curves = compare(
        {"learned": net}, tuned, MNISTNet(activation=activation, split="test"), steps, functions, 7, progress=False
    )
    print(
        f"\n{title}, {functions} functions\n\n| optimizer | sum over 100 | "
        + " | ".join(f"steps {mark - 10} to {mark - 1}" for mark in marks)
        + " |\n"
        + "| --- " * (2 + len(marks))
        + "|"
    )
    for name, losses in curves.items():
        ends = [spread(losses[:, mark - 10 : mark].mean(1)) for mark in marks]
        print(f"| {name} | {spread(losses[:, :100].sum(1))} | " + " | ".join(ends) + " |", flush=True)


def go_on(net, activation, steps, functions):
    """Far beyond the horizon: no optimization may diverge."""
    from meta_training import evaluate
    from optimizees import MNISTNet

    losses = evaluate(net, MNISTNet(activation=activation, split="test"), steps, functions, 7)
    late, marks = min(500, steps // 2), [mark for mark in (100, 1000, 2000, 5000, 10000) if mark <= steps]
    print(
        f"\nMNIST, {activation}, learned, {functions} functions: "
        + ", ".join(f"{losses[:, mark - mark // 10 : mark].mean():.3f} before step {mark}" for mark in marks)
        + f"; the highest loss after step {late} is {losses[:, late:].max():.2f}",
        flush=True,
    )


def spread(values):
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("relu", "horizon", "far", "cnn", "transformer")
    parser.add_argument("--net", default="general_lstm", help="a file or a name in pretrained/ (default general_lstm)")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to run (default all)")
    parser.add_argument("--functions", type=int, default=100, help="MNIST functions (default 100)")
    parser.add_argument("--tuning-functions", type=int, default=4, help="and to tune baselines on (default 4)")
    parser.add_argument("--steps", type=int, default=1000, help="of the horizon, cnn and transformer (default 1000)")
    parser.add_argument("--seeds", type=int, default=3, help="of cnn and transformer (default 3)")
    arguments = parser.parse_args()
    from gradbuffer.data.cifar10 import load_cifar10
    from optimizers import load_optimizer

    torch.set_num_threads(1)
    net, steps, functions, seeds = (
        load_optimizer(arguments.net),
        arguments.steps,
        arguments.functions,
        range(arguments.seeds),
    )
    if "relu" in arguments.parts:
        compare_on_mnist("MNIST, 20 ReLU units", net, "relu", 101, functions, arguments.tuning_functions, (100,))
        go_on(net, "relu", steps, functions)
    if "transformer" in arguments.parts:
        compare_models("A small transformer on sequences", net, Transformer, sequences, steps, seeds)
    if "cnn" in arguments.parts:
        data = load_cifar10()
        draw = image_batches(data.train_images, data.train_labels)
        compare_models(f"A small convolutional network, {data.name}", net, convolutional_network, draw, steps, seeds)
    if "horizon" in arguments.parts:
        compare_on_mnist(
            "MNIST, base network", net, "sigmoid", steps + 1, functions, arguments.tuning_functions, (100, steps)
        )
    if "far" in arguments.parts:
        go_on(net, "sigmoid", 10 * steps, 2)


if __name__ == "__main__":
    main()
