"""Optimizers on the same MNIST networks, minibatches and starts: losses, and each one's differences from the first, paired.

    python benchmarks/paired.py mnist_learned mnist_imitated mnist_learned_0 mnist_learned_2 mnist_from_nag     # some minutes on one core

Names are files, or those in `pretrained/`; tuned NAG (learning rate 1, what `tune_baseline` finds) comes last. ± is a standard error.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from meta_training import evaluate, evaluate_baseline
from optimizees import MNISTNet
from optimizers import load_optimizer

NAG = torch.optim.SGD, {"lr": 1.0, "momentum": 0.9, "nesterov": True}


def figures(losses):
    """Text of the sum over the first half of the steps, and of the losses at its end and at the end of all."""
    half = losses.shape[1] // 2
    columns = losses[:, :half].sum(1), losses[:, half - 1], losses[:, -1]
    return " | ".join(f"{x.mean():.4g} ± {x.std() / len(x) ** 0.5:.2g}" for x in columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="+", metavar="OPTIMIZER")
    parser.add_argument("--steps", type=int, default=200, help="even (default 200)")
    parser.add_argument("--functions", type=int, default=100, help="of the test images (default 100)")
    parser.add_argument("--data", help="data root (default $L2O_DATA, or data)")
    arguments = parser.parse_args()
    problem, half = MNISTNet(split="test", root=arguments.data), arguments.steps // 2
    curves = {
        net: evaluate(load_optimizer(net), problem, arguments.steps, arguments.functions) for net in arguments.nets
    }
    curves["NAG"] = evaluate_baseline(*NAG, problem, arguments.steps, arguments.functions)
    first, *others = curves
    head = f"sum over {half} steps | loss at step {half - 1} | at step {arguments.steps - 1}"
    print(f"{problem.name}, {arguments.functions} functions\n\n| optimizer | {head} |\n| --- | --- | --- | --- |")
    for name, losses in curves.items():
        print(f"| {name} | {figures(losses)} |")
    print(f"\n| {first} less | {head} |\n| --- | --- | --- | --- |")
    for name in others:
        print(f"| {name} | {figures(curves[first] - curves[name])} |")


if __name__ == "__main__":
    main()
