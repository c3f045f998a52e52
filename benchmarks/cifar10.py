"""The paper's convolutional network on CIFAR-10, to 1,000 steps: a small learned optimizer, its start, and tuned baselines.

    python benchmarks/cifar10.py                         # an hour of a core
    python benchmarks/cifar10.py --steps 200 --functions 2 --net general

Minibatches of 64 images of the split "test", which no training here has drawn from. Each optimizer anneals its rate to 0 on a cosine,
and has the best of five, √10 apart, for the loss of the last tenth of the steps on another function. Losses are means over the last 100
steps.
"""

import argparse

import torch
from published import annealed, as_task, spread

from gradbuffer.problems.cifar10 import CIFAR10Net
from gradbuffer.problems.races import Contestant, race

LAST = 100  # steps


def contestants(net):
    """dict from name to `Contestant`."""
    sgd = torch.optim.SGD
    return annealed([net]) | {
        "SGD + momentum": Contestant(lambda params, lr: sgd(params, lr=lr, momentum=0.9), 0.03),
        "NAG": Contestant(lambda params, lr: sgd(params, lr=lr, momentum=0.9, nesterov=True), 0.03),
        "Adam": Contestant(lambda params, lr: torch.optim.Adam(params, lr=lr), 0.003),
        "AdamW": Contestant(lambda params, lr: torch.optim.AdamW(params, lr=lr), 0.003),
        "RMSprop": Contestant(lambda params, lr: torch.optim.RMSprop(params, lr=lr), 0.001),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="general", help="a small learned optimizer that comes with the project")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--functions", type=int, default=6)
    parser.add_argument("--data", help="data root (default $L2O_DATA, or data)")
    options = parser.parse_args()
    problem = CIFAR10Net(batch_size=64, split="test", root=options.data)
    task, ends, last = as_task(problem, batch=64), {}, min(LAST, options.steps)
    print(
        f"{problem.name}, {options.steps} steps, functions: {options.functions}\n\n"
        "| optimizer | loss | rate | less the first, paired |\n| --- | --- | --- | --- |"
    )
    for name, contestant in contestants(options.net).items():
        one = race({"": task}, {name: contestant}, 5, options.steps, range(options.functions))[""][name]
        ends[name] = one.curves[:, -last:].mean(1)
        less = ends[name] - next(iter(ends.values()))
        print(
            f"| {name} | {spread(ends[name], 4)} | {one.rate:.1g}{'e' * one.at_edge} | {spread(less, 4)} |", flush=True
        )
    print("\nAn e marks a rate at the end of those tried.")


if __name__ == "__main__":
    main()
