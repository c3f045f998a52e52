"""The paper's quadratics: learned optimizers, tuned baselines, L-BFGS and conjugate gradients on the same functions.

    python benchmarks/quadratics.py quadratics_subspace quadratics_subspace_1 quadratics_subspace_2 quadratics_odd

Names are files, or those in `pretrained/`. With a `SubspaceLSTM` come two more rows: the random weights with which its training began, and
the step that one would write by hand, to the minimum along the moves so far and on down the gradient there, with its first rate.
Baselines have the rate with the best mean loss at the last step on other functions. L-BFGS counts every evaluation.
± is a standard error; differences are paired.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradbuffer.evaluation.curvature import evaluate_conjugate_gradients, evaluate_lbfgs
from meta_training import compare, tune_baselines
from optimizees import Quadratics
from optimizers import SubspaceLSTM, load_optimizer


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
    curves["conjugate gradients"] = evaluate_conjugate_gradients(problem, *given)
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
