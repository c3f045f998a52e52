"""Mean and noise of the exact meta-gradient, from function to function: plain, mirrored pairs, an odd LSTM.

    python benchmarks/noise.py                # on MNIST images averaged to 14 × 14; --side 28 for whole ones
For each window, the meta-gradients of some functions (pairs for "mirrored") drawn anew: the norm of their mean, the
root mean square of their distances from it, and the share of those squares that lies along one direction. The optimizer
is `start_as_momentum` with signs, as in the notebook, before any meta-training.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates, unroll
from optimizees import Mirrored, MNISTNet
from optimizers import CoordinatewiseLSTM, start_as_momentum

WINDOWS = [(0, 10), (0, 50), (50, 50), (150, 50)]  # first step, length


def meta_gradient_of(net, problem, seed, first, length, bound):
    """The meta-gradient (weights,) of one draw of functions at the window from step `first` on."""
    functions = 2 if isinstance(problem, Mirrored) else 1
    batch = problem.sample(functions, generator=torch.Generator().manual_seed(seed))
    coordinates = Coordinates(batch.params)
    theta = coordinates.join(batch.params)
    with torch.no_grad():
        for _, _, theta, state in unroll(net, batch.loss, coordinates, theta, net.init_state(theta.numel()), 0, first):
            pass
    grads, _ = meta_gradient(
        net, batch, coordinates.split(theta), state, first, length, second_order=True, adjoint_bound=bound
    )
    return torch.cat([grad.flatten() for grad in grads.values()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=14, help="pixels along a side (default 14)")
    parser.add_argument("--draws", type=int, default=8, help="draws of functions for each number (default 8)")
    parser.add_argument("--bound", type=float, help="adjoint_bound (default none)")
    parser.add_argument("--data", help="data root (default $L2O_DATA, or data)")
    arguments = parser.parse_args()
    problem = MNISTNet(side=arguments.side, root=arguments.data)
    print(f"{problem.name}, {arguments.draws} draws, adjoint_bound {arguments.bound}\n")
    print("| window | functions | mean | noise | of it in one direction |\n| --- | --- | --- | --- | --- |")
    for first, length in WINDOWS:
        for name, distribution, odd in (
            ("plain", problem, False),
            ("mirrored pairs", Mirrored(problem), False),
            ("plain, odd LSTM", problem, True),
        ):
            torch.manual_seed(0)
            net = start_as_momentum(
                CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1, odd=odd), lr=1.0, sign_lr=0.1, sign_fade=12
            )
            grads = torch.stack(
                [
                    meta_gradient_of(net, distribution, seed, first, length, arguments.bound)
                    for seed in range(arguments.draws)
                ]
            )
            mean = grads.mean(0)
            squares = torch.linalg.svdvals(grads - mean).square()
            noise = (squares.sum() / (arguments.draws - 1)).sqrt()
            print(
                f"| steps {first} to {first + length} | {name} | {mean.norm():.1f} | {noise:.1f} | "
                f"{100 * squares[0] / squares.sum():.0f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
