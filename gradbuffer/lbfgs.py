"""L-BFGS on each function of a meta-batch, counted in evaluations of a function and its gradient: a baseline for `evaluation`."""

import math
from typing import Any

import torch

from gradbuffer.checks import check_count
from gradbuffer.contracts import MetaBatch, as_loss, has_parts
from gradbuffer.unrolling import Coordinates

__all__ = ["minimize_lbfgs"]


def minimize_lbfgs(batch: MetaBatch, steps: int, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L-BFGS with a strong Wolfe line search on each function of a meta-batch, for `steps` evaluations.

    Args:
        batch: a `MetaBatch` with `part`; its losses are those of step 0.
        steps: evaluations of each function and its gradient, positive.
        options: of `torch.optim.LBFGS`, such as {"history_size": 10}.

    Returns:
        (losses (B, steps), params): the lowest loss so far after each evaluation, and where the lowest was found,
        a dict of (B, ...). No graph.

    Raises:
        TypeError: the meta-batch has no `part`.

    Example:
        >>> from optimizees import Quadratics
        >>> losses, params = minimize_lbfgs(Quadratics().sample(2), steps=10)
    """
    check_count(steps=steps)
    if not has_parts(batch):
        raise TypeError("L-BFGS takes one function after the other: the meta-batch must have part(first, last)")
    functions, curves, ends = len(next(iter(batch.params.values()))), [], []
    for function in range(functions):
        losses, end = minimize_one(batch.part(function, function + 1), steps, options)
        curves.append(losses)
        ends.append(end)
    return torch.stack(curves), {name: torch.cat([end[name] for end in ends]) for name in batch.params}


def minimize_one(batch, steps, options):
    """(losses (steps,), params) of L-BFGS on a meta-batch of one function."""
    coordinates, losses = Coordinates(batch.params), []
    theta = torch.nn.Parameter(coordinates.join(batch.params).detach().clone())
    best, lowest = theta.detach().clone(), math.inf

    def closure():
        nonlocal best, lowest
        loss, theta.grad = coordinates.losses_and_gradient(as_loss(batch.loss), theta, 0)
        if len(losses) < steps and loss.item() < lowest:
            best, lowest = theta.detach().clone(), loss.item()
        losses.append(loss[0])
        return loss[0]

    optimizer = torch.optim.LBFGS(
        [theta], **{"line_search_fn": "strong_wolfe", "max_iter": steps, "max_eval": steps, **options}
    )
    while len(losses) < steps:  # it may stop early, at its tolerances; then it begins anew where it is
        optimizer.step(closure)
    return torch.stack(losses[:steps]).cummin(0).values, coordinates.split(best)
