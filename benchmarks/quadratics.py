"""The paper's quadratics: learned optimizers, tuned baselines, L-BFGS and conjugate gradients on the same functions.

    python benchmarks/quadratics.py quadratics_subspace quadratics_subspace_1 quadratics_subspace_2 quadratics_odd

Names are files, or those in `pretrained/`. With a `SubspaceLSTM` come two more rows: the random weights with which its training began, and
the step that one would write by hand, to the minimum along the moves so far and on down the gradient there, with its first rate.
Baselines have the rate with the best mean loss at the last step on other functions. L-BFGS counts every evaluation; conjugate gradients
are given the Hessian's product with each direction for nothing. ± is a standard error; differences are paired.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradbuffer.evaluation import draw_batches, evaluate_lbfgs
from meta_training import compare, tune_baselines
from optimizees import Quadratics
from optimizers import SubspaceLSTM, load_optimizer


def conjugate_gradients(batch, steps):
    """Losses (B, steps), the first before any step, by the formulas of Hestenes and Stiefel 1952."""
    W, y, twice = (tensor.double() for tensor in batch.loss.data)
    hessian, theta, losses = twice @ W, torch.zeros_like(y), []
    residual = direction = twice @ y  # -∇ at θ = 0
    for _ in range(steps):
        losses.append((W @ theta - y).square().sum((1, 2)))
        size, product = residual.square().sum(1, keepdim=True), hessian @ direction
        rate = size / (direction * product).sum(1, keepdim=True).clamp_min(1e-300)
        theta, residual = theta + rate * direction, residual - rate * product
        direction = residual + residual.square().sum(1, keepdim=True) / size.clamp_min(1e-300) * direction
    return torch.stack(losses, 1)


def with_random_weights(net, seed=0):
    """A network like that one, as its training by the command with this seed began."""
    torch.manual_seed(seed)
    return SubspaceLSTM(**net.config)


@torch.no_grad()
def by_hand(net):
    """The same steps with constants for coefficients: Dγ - ρ (∇ + Yγ)."""
    fixed = copy.deepcopy(net)
    fixed.output.weight.zero_()
    fixed.output.bias.copy_(torch.tensor([0.0, 0, 0, 1, -1]))
    return fixed


def figures(losses):
    """Cells: the sum over the steps, the mean at the last one."""
    columns = losses.sum(1), losses[:, -1]
    return " | ".join(f"{x.mean():.4g} ± {x.std() / len(x) ** 0.5:.2g}" for x in columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="+", metavar="OPTIMIZER")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--functions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7, help="of the functions (default 7)")
    parser.add_argument("--without-lbfgs", action="store_true", help="which takes one function after the other")
    options = parser.parse_args()
    problem, nets = Quadratics(), {name: load_optimizer(name) for name in options.nets}
    for net in list(nets.values()):
        if isinstance(net, SubspaceLSTM) and "random weights" not in nets:
            nets |= {"random weights": with_random_weights(net), "coefficients by hand": by_hand(net)}
    tuned = tune_baselines(problem, options.steps, 256, seed=1000, progress=False)
    tuned = {f"{name}, {baseline.options['lr']:.3g}": baseline for name, baseline in tuned.items()}
    given = options.steps, options.functions, options.seed
    curves = compare(nets, tuned, problem, *given, progress=False)
    if not options.without_lbfgs:
        curves["L-BFGS"] = evaluate_lbfgs(problem, *given)
    batches = draw_batches(problem, options.functions, options.seed, "cpu")
    curves["conjugate gradients"] = torch.cat([conjugate_gradients(batch, options.steps) for batch in batches])
    head, (first, *others) = f"sum over {options.steps} steps | mean loss at the last", curves
    print(
        f"{problem.name}, {options.functions} functions\n\n| optimizer | {head} | median | largest |\n{'| --- ' * 5}|"
    )
    for name, losses in curves.items():
        print(f"| {name} | {figures(losses)} | {losses[:, -1].median():.2g} | {losses[:, -1].max():.2g} |")
    print(f"\n| {first} less | {head} |\n| --- | --- | --- |")
    for name in others:
        print(f"| {name} | {figures(curves[first] - curves[name])} |")


if __name__ == "__main__":
    main()
