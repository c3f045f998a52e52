"""Optimizers that know the curvature: L-BFGS and conjugate gradients, each function by itself.

They stand beside learned optimizers as a measure of what is possible on functions that do not change from step to step.
One step of theirs is one evaluation of a function and its gradient, which is what a step costs the others.
"""

import math
from typing import Any

import torch

from gradbuffer.checks import check_count
from gradbuffer.contracts import MetaBatch, Problem, as_loss, part_if_any
from gradbuffer.evaluation.drawing import draw_batches
from gradbuffer.unrolling import Coordinates

__all__ = ["evaluate_conjugate_gradients", "evaluate_lbfgs", "minimize_lbfgs"]


def evaluate_lbfgs(
    problem: Problem,
    steps: int = 100,
    num_functions: int = 100,
    seed: int = 1,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor:
    """Loss curves of L-BFGS, each function by itself, on the very functions that `evaluate` uses for that seed.

    Args:
        problem: distribution of functions that do not change from step to step, with meta-batches that have `part`.
        steps, num_functions, seed, device: see `evaluate`.
        options: see `minimize_lbfgs`.

    Returns:
        (num_functions, steps) on the CPU: losses[:, t] is the lowest loss in t + 1 evaluations of a function and its
        gradient. One evaluation is what a step costs the other optimizers; those of the line search count.

    Example:
        >>> from optimizees import Quadratics
        >>> losses = evaluate_lbfgs(Quadratics(), steps=10, num_functions=4)
    """
    batches = draw_batches(problem, num_functions, seed, torch.device(device))
    return torch.cat([minimize_lbfgs(batch, steps, **options)[0] for batch in batches]).cpu()


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
        ValueError: its losses at the steps 0 and 1 differ.

    Example:
        >>> from optimizees import Quadratics
        >>> losses, params = minimize_lbfgs(Quadratics().sample(2), steps=10)
    """
    check_count(steps=steps)
    if part_if_any(batch) is None:
        raise TypeError("L-BFGS takes one function after the other: the meta-batch must have part(first, last)")
    check_constant(batch)
    functions, curves, ends = len(next(iter(batch.params.values()))), [], []
    for function in range(functions):
        losses, end = minimize_one(batch.part(function, function + 1), steps, options)
        curves.append(losses)
        ends.append(end)
    return torch.stack(curves), {name: torch.cat([end[name] for end in ends]) for name in batch.params}


def minimize_one(batch, steps: int, options: dict):
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


def evaluate_conjugate_gradients(
    problem: Problem, steps: int = 100, num_functions: int = 100, seed: int = 1, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Loss curves of linear conjugate gradients, on the very functions that `evaluate` uses for that seed.

    Where a gradient is linear in the parameters, the gradients at two points tell the curvature between them, so that each
    step is as long as it should be and costs one evaluation. In exact arithmetic the minimum of a function of n parameters
    is reached in n steps.

    Args:
        problem: distribution of quadratic functions, such as `Quadratics`.
        steps, num_functions, seed, device: see `evaluate`.

    Returns:
        (num_functions, steps) on the CPU: losses[:, t] is the lowest loss in t steps.

    Raises:
        ValueError: a function is not quadratic, or changes from step to step.

    Example:
        >>> from optimizees import Quadratics
        >>> losses = evaluate_conjugate_gradients(Quadratics(), steps=10, num_functions=4)

    Reference: Hestenes and Stiefel 1952.
    """
    check_count(steps=steps)
    batches = draw_batches(problem, num_functions, seed, torch.device(device))
    return torch.cat([conjugate_gradients(batch, steps) for batch in batches]).cpu()


def conjugate_gradients(batch, steps):
    """Lowest losses so far (B, steps) of conjugate gradients on each function of a meta-batch."""
    check_constant(batch)
    coordinates, loss = Coordinates(batch.params), as_loss(batch.loss)
    spread = coordinates.spread

    def evaluate(theta):
        return coordinates.losses_and_gradient(loss, theta, 0)

    def inner(a, b):
        """(B,): inner products of the functions' parts."""
        parts = coordinates.split(a * b)
        return sum(part.flatten(1).sum(1) for part in parts.values())

    theta = coordinates.join(batch.params).detach().clone()
    values, gradient = evaluate(theta)
    direction, square, losses = -gradient, inner(gradient, gradient), [values]
    for step in range(1, steps):
        ahead, gradient_ahead = evaluate(theta + direction)
        if step == 1:
            expected = values + inner(direction, gradient + gradient_ahead) / 2  # exact for a quadratic function
            if not torch.allclose(ahead, expected, rtol=1e-2):
                raise ValueError("conjugate gradients need quadratic functions, which these are not")
        bent = gradient_ahead - gradient
        curvature = inner(direction, bent)
        length = torch.where(curvature > 0, -inner(direction, gradient) / curvature, 0.0)
        theta, gradient = theta + spread(length) * direction, gradient + spread(length) * bent
        before, square = square, inner(gradient, gradient)
        direction = spread(torch.where(before > 0, square / before, 0.0)) * direction - gradient
        losses.append(evaluate(theta)[0])  # only to be shown: the gradient there is known already
    return torch.stack(losses, 1).cummin(1).values


def check_constant(batch):
    with torch.no_grad():
        if not torch.allclose(batch.loss(batch.params, 0), batch.loss(batch.params, 1), equal_nan=True):
            raise ValueError(
                "functions must not change from step to step here, got others at the steps 0 and 1 (of minibatches?)"
            )
