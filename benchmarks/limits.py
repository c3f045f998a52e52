"""What limits meta-training on MNIST: how noisy a window's meta-gradient is, and where along the steps the loss is lost to NAG.

    python benchmarks/limits.py                    # a quarter of an hour of a core
    python benchmarks/limits.py --nets mnist mnist_learned --draws 32

For each network and each window of 20 steps the meta-gradients of some functions drawn anew, one function each, by both ways: the paper's,
which takes the gradients as constants, and the exact one. Told are the norm of their mean over the root mean square of their distances
from it, the signal of one function, of which the mean over n functions has √n times as much; and the cosine between the two means. Then
mean losses over stretches of steps, less those of NAG with the rate 1 on the same functions.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradbuffer.evaluation import evaluate, evaluate_baseline
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates, unroll
from optimizees import MNISTNet
from optimizers import CoordinatewiseLSTM, load_optimizer

LENGTH = 20
WINDOWS = (0, 20, 80, 180)  # first steps
STRETCHES = (0, 5, 10, 20, 50, 100, 150, 200)
NAG = torch.optim.SGD, {"lr": 1.0, "momentum": 0.9, "nesterov": True}


def meta_gradients(net, problem, draws, second_order):
    """dict from a window's first step to the meta-gradients (draws, weights) there, of one function each."""
    found = {first: [] for first in WINDOWS}
    for seed in range(draws):
        batch = problem.sample(1, generator=torch.Generator().manual_seed(seed))
        coordinates = Coordinates(batch.params)
        theta, step = coordinates.join(batch.params), 0
        state = net.init_state(theta.numel())
        for first in WINDOWS:
            with torch.no_grad():
                for _, _, theta, state in unroll(net, batch.loss, coordinates, theta, state, step, first - step):
                    pass
            step = first
            grads, _ = meta_gradient(
                net, batch, coordinates.split(theta), state, first, LENGTH, second_order=second_order
            )
            found[first].append(torch.cat([grad.flatten() for grad in grads.values()]))
    return {first: torch.stack(grads) for first, grads in found.items()}


def signal(grads):
    """The norm of the mean of (n, W) over the root mean square of the distances from it, less what noise adds to that norm."""
    mean, variance = grads.mean(0), (grads - grads.mean(0)).square().sum() / (len(grads) - 1)
    return (mean.square().sum() - variance / len(grads)).clamp(min=0).div(variance).sqrt().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["random", "mnist", "mnist_imitated", "mnist_learned"])
    parser.add_argument("--draws", type=int, default=16, help="functions for each number of the first table")
    parser.add_argument("--functions", type=int, default=32, help="of the second table")
    parser.add_argument("--data", help="data root (default $L2O_DATA, or data)")
    options = parser.parse_args()
    problem = MNISTNet(split="validation", root=options.data)
    torch.manual_seed(0)
    nets = {
        name: CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1, odd=True)
        if name == "random"
        else load_optimizer(name)
        for name in options.nets
    }
    windows = " | ".join(f"{first} to {first + LENGTH}" for first in WINDOWS)
    print(
        f"{problem.name}: signal of one function, in steps\n\n| network | gradient | {windows} |\n{'| --- ' * (len(WINDOWS) + 2)}|"
    )
    for name, net in nets.items():
        constant, exact = (meta_gradients(net, problem, options.draws, second) for second in (False, True))
        for way, grads in (("constant gradients", constant), ("exact", exact)):
            print(f"| {name} | {way} | {' | '.join(f'{signal(grads[first]):.2f}' for first in WINDOWS)} |", flush=True)
        cosines = (torch.cosine_similarity(constant[first].mean(0), exact[first].mean(0), 0) for first in WINDOWS)
        print(f"| {name} | cosine | {' | '.join(f'{cosine:.2f}' for cosine in cosines)} |", flush=True)
    nag = evaluate_baseline(*NAG, problem, STRETCHES[-1], options.functions)
    stretches = list(zip(STRETCHES, STRETCHES[1:]))
    print(
        f"\nMean losses less NAG's, {options.functions} functions\n\n| network | "
        f"{' | '.join(f'{first} to {last - 1}' for first, last in stretches)} |\n{'| --- ' * (len(stretches) + 1)}|"
    )
    print(f"| NAG | {' | '.join(f'{nag[:, first:last].mean():.3f}' for first, last in stretches)} |")
    for name, net in nets.items():
        less = evaluate(net, problem, STRETCHES[-1], options.functions) - nag
        cells = [less[:, first:last].mean(1) for first, last in stretches]
        print(
            f"| {name} | {' | '.join(f'{c.mean():.3f} ± {c.std() / len(c) ** 0.5:.3f}' for c in cells)} |", flush=True
        )


if __name__ == "__main__":
    main()
