"""Persistent evolution strategies: an unbiased meta-gradient from truncated windows, without any derivative of them.

Vicol, Metz and Sohl-Dickstein 2021 (arXiv 2112.13835). The optimizer's weights are perturbed, in antithetic pairs, anew
in every window; each of a pair goes its own way through all windows, and the loss of a window is credited to all
perturbations that its function has seen so far. So the estimate has no truncation bias, and neither the optimizee nor
the optimizer needs useful gradients. `meta_gradients.meta_gradient(method="pes")` calls it.
"""

from typing import NamedTuple

import torch

from gradbuffer.unrolling import unroll

__all__ = ["PESState", "pes_window"]


class PESState(NamedTuple):
    """What a window leaves for the next one of the same functions."""

    perturbations: dict  # name -> (pairs, ...), the sum of all perturbations so far
    particles: list  # for each pair, and in it for each sign: (theta (N,), the optimizer's state)


@torch.no_grad()
def pes_window(net, loss, coordinates, theta, state, step, weights, sigma, pairs, generator, objective):
    """One window of every particle.

    Args:
        net, loss, coordinates, theta, step: see `meta_gradients.meta_gradient`.
        state: the optimizer's state, at the first window of its functions; else the `PESState` of the window before.
        weights: (T + 1,), w_t; the loss at the start counts nothing, since the window before has counted it.
        sigma: standard deviation of the perturbations. pairs: how many.
        generator: a CPU generator for the perturbations. objective: see `meta_gradients.meta_gradient`.

    Returns:
        grads (dict), losses (T + 1, B) as a mean over particles, theta of the first particle, `PESState`.
    """
    parameters = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    if not isinstance(state, PESState):
        nothing = {name: parameter.new_zeros(pairs, *parameter.shape) for name, parameter in parameters.items()}
        state = PESState(nothing, [[(theta, state)] * 2 for _ in range(pairs)])
    if len(state.particles) != pairs:
        raise ValueError(f"pairs must stay what it was in the window before, {len(state.particles)}, got {pairs}")
    kept = {name: parameter.clone() for name, parameter in parameters.items()}
    grads = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    perturbations, particles, curves = {name: [] for name in parameters}, [], []
    try:
        for pair, starts in enumerate(state.particles):
            fresh = {name: sigma * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                     .to(parameter.device) for name, parameter in parameters.items()}
            totals, ends = [], []
            for sign, (theta, own) in zip((1, -1), starts):
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name] + sign * fresh[name])
                losses = []
                for values, _, theta, own in unroll(net, loss, coordinates, theta, own, step, len(weights) - 1):
                    losses.append(values)
                losses = torch.stack(losses)
                scored = losses[1:].log() if objective == "log" else losses[1:]
                totals.append((weights[1:, None] * scored).sum())
                ends.append((theta, own))
                curves.append(losses)
            particles.append(ends)
            for name in parameters:
                perturbations[name].append(state.perturbations[name][pair] + fresh[name])
                grads[name] += perturbations[name][-1] * (totals[0] - totals[1]) / (2 * sigma**2 * pairs)
    finally:
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    after = PESState({name: torch.stack(parts) for name, parts in perturbations.items()}, particles)
    return grads, torch.stack(curves).mean(0), particles[0][0][0], after
