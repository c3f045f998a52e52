"""Evolution strategies: the meta-gradient of one meta-batch without derivatives, and what all ways to a meta-gradient share.

Functions run in antithetic pairs, moved by the optimizer's weights plus and minus a perturbation; the difference of their losses along
a window, times the perturbation, is an estimate of the meta-gradient. Perturbations are held for all windows of the functions (NRES, Li
et al. 2023, arXiv 2304.12180), or drawn anew for each window and summed up (PES, Vicol et al. 2021, arXiv 2112.13835): neither estimate
is biased by truncation. Nothing is differentiated. Functions with episodes of their own, on many families, are those of `episodes`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gradbuffer.checks import check_count, check_positive_number
from gradbuffer.contracts import Loss, Rule, repack
from gradbuffer.unrolling import Coordinates, apply_objective, check_objective, trained, unroll

__all__ = ["Method", "PES", "PESState", "Unrolled", "Window"]


class Window(NamedTuple):
    """A window to be unrolled, with one update fewer than there are weights."""

    rule: Rule
    loss: Loss
    coordinates: Coordinates
    theta: torch.Tensor  # (N,), where it starts
    state: Any  # the rule's there
    step: int  # the first one's number
    weights: torch.Tensor  # (T + 1,), w_t / B

    def unroll(self, keep_states: bool = False) -> Iterator[tuple]:
        """See `unrolling.unroll`."""
        *given, weights = self
        return unroll(*given, len(weights) - 1, keep_states)


class Unrolled(NamedTuple):
    """What a window gives; no graph."""

    grads: dict[str, torch.Tensor]
    losses: torch.Tensor  # (T + 1, B)
    theta: torch.Tensor  # (N,), the end
    state: Any


class Method:
    """A way to the meta-gradient: a frozen dataclass of its options, with `name`, `objective`, and two methods."""

    name = ""
    objective: str | Callable = "sum"

    def check(self, rule: Rule) -> None:
        """Raise unless the options go together, and with this network."""
        raise NotImplementedError

    def window(self, window: Window, generator: torch.Generator | None) -> Unrolled:
        """Unroll a window, and find its meta-gradient; no graph. generator: for what is drawn."""
        raise NotImplementedError


class PESState(NamedTuple):
    """What a window leaves for the next one of the same functions."""

    perturbations: (
        dict  # name -> (pairs, ...), the sum of all perturbations so far; (pairs, B, ...) with one for every function
    )
    particles: list  # for each pair, and in it for each sign: (theta (N,), the optimizer's state)


@dataclass(frozen=True)
class PES(Method):
    """The meta-gradient by evolution strategies: an unbiased estimate from truncated windows, without any derivative of them.

    The optimizer's weights are perturbed, in antithetic pairs; each of a pair goes its own way through all windows, and the loss of a
    window is credited to all perturbations that its function has seen so far. So the estimate has no truncation bias, and neither the
    optimizee nor the optimizer needs useful gradients.

    Args:
        sigma: standard deviation of the perturbations of φ; positive.
        pairs: antithetic pairs, each of which costs two unrolls; positive.
        objective: see `meta_gradients.Replay`.
        hold: keep a perturbation for all windows of its functions (noise-reuse evolution strategies, Li et al. 2023), instead of adding
            a fresh one in each (persistent ones, Vicol et al. 2021).
        per_function: give every function perturbations of its own, so that the estimate is a mean over as many directions as functions.
            A network that cannot take several weights at once is then run function by function.

    Reference: Vicol, Metz and Sohl-Dickstein 2021 (arXiv 2112.13835); Li et al. 2023 (arXiv 2304.12180).
    """

    sigma: float = 0.01
    pairs: int = 1
    objective: str | Callable = "sum"
    hold: bool = False
    per_function: bool = False

    name = "pes"

    def check(self, rule: Rule) -> None:
        """Raise unless the options are as above."""
        check_count(pairs=self.pairs)
        check_positive_number(sigma=self.sigma)
        check_objective(self.objective)

    @torch.no_grad()
    def window(self, window: Window, generator: torch.Generator | None) -> Unrolled:
        """One window of every particle.

        Its state is the optimizer's, at the first window of its functions (with `per_function` they begin with `init_state`); else the
        `PESState` of the window before. The loss at the start counts nothing, since the window before has counted it.

        Returns:
            losses as a mean over particles, theta of the first particle, and a `PESState`.
        """
        rule, coordinates, state = window.rule, window.coordinates, window.state
        parameters, lead = trained(rule), [coordinates.functions] * self.per_function
        first = not isinstance(state, PESState)
        if first:
            nothing = {
                name: parameter.new_zeros(self.pairs, *lead, *parameter.shape) for name, parameter in parameters.items()
            }
            own = None if self.per_function else state
            state = PESState(nothing, [[(window.theta, own)] * 2 for _ in range(self.pairs)])
        if len(state.particles) != self.pairs:
            raise ValueError(
                f"pairs must stay what it was in the window before, {len(state.particles)}, got {self.pairs}"
            )
        kept = {name: parameter.clone() for name, parameter in parameters.items()}
        grads = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        perturbations, particles, curves = {name: [] for name in parameters}, [], []
        try:
            for pair, starts in enumerate(state.particles):
                fresh, total = self.perturb(
                    kept, {name: sums[pair] for name, sums in state.perturbations.items()}, lead, first, generator
                )
                scores, ends = [], []
                for sign, (theta, own) in zip((1, -1), starts):
                    moved, losses = {name: kept[name] + sign * fresh[name] for name in kept}, []
                    if self.per_function:
                        particle = rule.per_function(moved, coordinates)
                        own = particle.init_state(theta.numel()) if own is None else own
                    else:
                        particle = rule
                        for name, parameter in parameters.items():
                            parameter.copy_(moved[name])
                        repack(rule)
                    for values, _, theta, own in window._replace(rule=particle, theta=theta, state=own).unroll():
                        losses.append(values)
                    curves.append(torch.stack(losses))
                    weighted = window.weights[1:, None] * apply_objective(curves[-1][1:], self.objective)
                    scores.append(weighted.sum(0) if self.per_function else weighted.sum())
                    ends.append((theta, own))
                particles.append(ends)
                difference = scores[0] - scores[1]
                for name in parameters:
                    perturbations[name].append(total[name])
                    credit = (
                        torch.tensordot(difference, total[name], 1) if self.per_function else total[name] * difference
                    )
                    grads[name] += credit / (2 * self.sigma**2 * self.pairs)
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
            repack(rule)
        after = PESState({name: torch.stack(parts) for name, parts in perturbations.items()}, particles)
        return Unrolled(grads, torch.stack(curves).mean(0), particles[0][0][0], after)

    def perturb(
        self,
        parameters: dict[str, torch.Tensor],
        before: dict[str, torch.Tensor],
        lead: list[int],
        first: bool,
        generator: torch.Generator | None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What a pair's weights are moved by in this window, and the sum of it over all windows so far."""
        if self.hold and not first:
            return before, before
        fresh = {
            name: self.sigma
            * torch.randn([*lead, *parameter.shape], generator=generator, dtype=parameter.dtype, device="cpu").to(
                parameter.device
            )
            for name, parameter in parameters.items()
        }
        return fresh, {name: before[name] + fresh[name] for name in fresh}
