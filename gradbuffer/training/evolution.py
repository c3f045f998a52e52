"""Evolution strategies: the meta-gradient without derivatives, of one meta-batch (`PES`) and on many families of functions (`Pairs`).

A family's functions run in antithetic pairs: both of a pair begin at one point, read the same minibatches, and are moved by the
optimizer's weights plus and minus a perturbation of the pair's own. The difference of their losses along a window, relative to the
pair's mean loss, times the perturbation, is the pair's estimate of the meta-gradient. Perturbations are held for a whole episode
(NRES, Li et al. 2023, arXiv 2304.12180), or drawn anew for each window and summed up (PES, Vicol et al. 2021, arXiv 2112.13835):
neither estimate is biased by truncation. Nothing is differentiated.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gradbuffer.checks import check_count, check_positive_number
from gradbuffer.contracts import Loss, Rule, repack
from gradbuffer.unrolling import Coordinates, apply_objective, check_objective, trained, unroll

__all__ = [
    "Episodes",
    "Estimate",
    "Method",
    "PES",
    "PESState",
    "Pairs",
    "Perceptrons",
    "Unrolled",
    "Window",
    "signal_to_noise",
]


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


class Estimate(NamedTuple):
    """What a window of a family's pairs says of the meta-gradient; no graph."""

    gradient: torch.Tensor  # (W,), the mean over pairs
    each: torch.Tensor  # (pairs, W)
    loss: float  # mean over pairs and steps, clipped


class Perceptrons:
    """A family: perceptrons of one form on one data set.

    Args:
        windows: the `PerceptronWindows` that run them.
        inputs, targets: the data, as its `run` takes them.
        batch: examples in a minibatch.
        ceiling: the largest loss that counts; larger ones, and those not finite, count as this.
    """

    def __init__(self, windows: Any, inputs: torch.Tensor, targets: torch.Tensor, batch: int, ceiling: float):
        check_count(batch=batch)
        check_positive_number(ceiling=ceiling)
        self.windows, self.inputs, self.targets, self.batch, self.ceiling = windows, inputs, targets, batch, ceiling

    def run(
        self, weights: torch.Tensor, params: torch.Tensor, state: torch.Tensor, steps: int, **options: Any
    ) -> torch.Tensor:
        """As `PerceptronWindows.run`."""
        return self.windows.run(
            weights,
            (params, state),
            (self.inputs, self.targets),
            steps=steps,
            batch=self.batch,
            clip=self.ceiling,
            **options,
        )


@dataclass(frozen=True)
class Episodes:
    """From what range the episodes of a family's pairs are drawn, log-uniformly.

    Args:
        lengths: least and most steps; multiples of the window come of them.
        rates, scales, gains: least and most, above 0: the optimizer's rate, factors on the gradients that it reads, and factors
            on the initial parameters.
        falling: in [0, 1], the share of episodes whose rate falls to 0 on half a cosine; else it stays.
        late: in [0, 1], how much more the end of a falling episode counts than its beginning: a window counts
            1 + late · (2 · progress - 1).

    Raises:
        ValueError: an argument is not as said.
    """

    lengths: tuple[float, float] = (100, 2000)
    rates: tuple[float, float] = (2e-4, 3e-2)
    scales: tuple[float, float] = (1e-3, 1e3)
    gains: tuple[float, float] = (0.7, 1.7)
    falling: float = 0.5
    late: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in ("falling", "late"):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name} must be from 0 to 1, got {value}")
            elif not 0 < value[0] <= value[1] < math.inf:
                raise ValueError(f"{name} must be the least and the most, above 0, got {value}")


class Pairs:
    """The antithetic pairs of one family, on their way from window to window.

    Every pair has episodes of its own: a start, a rate, a scale of the gradients and a length. The first episodes begin part of
    the way through, so that pairs do not end together.

    Args:
        family: a `Perceptrons`.
        pairs: how many.
        window: steps in a window.
        sigma: standard deviation of the perturbations.
        hold: one perturbation for a whole episode; else a fresh one for each window.
        episodes: what they are like, `Episodes`.
        generator: on the CPU, for all that is drawn.
    """

    def __init__(
        self,
        family: Perceptrons,
        pairs: int = 8,
        window: int = 50,
        sigma: float = 0.01,
        hold: bool = True,
        episodes: Episodes = Episodes(),
        *,
        generator: torch.Generator,
    ):
        check_count(pairs=pairs, window=window)
        check_positive_number(sigma=sigma)
        self.family, self.pairs, self.window, self.sigma, self.generator = family, pairs, window, sigma, generator
        self.hold, self.episodes = hold, episodes
        W, windows = family.windows.num_weights, family.windows
        self.params, self.state = torch.empty(2 * pairs, windows.num_params), windows.init_state(2 * pairs)
        self.noise, self.total = torch.zeros(pairs, W), torch.zeros(pairs, W)
        self.done, self.length, self.seeds = (torch.zeros(pairs, dtype=torch.int64) for _ in range(3))
        self.rate, self.scale, self.falls = torch.ones(pairs), torch.ones(pairs), torch.zeros(pairs)
        for pair in range(pairs):
            self.begin(pair)
            self.length[pair] = math.ceil(self.length[pair] * self.uniform() / window) * window

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, device="cpu"))

    def log_uniform(self, bounds: tuple[float, float]) -> float:
        return bounds[0] * (bounds[1] / bounds[0]) ** self.uniform()

    def begin(self, pair: int) -> None:
        """A new episode."""
        both, number = (
            slice(2 * pair, 2 * pair + 2),
            int(torch.randint(2**40, (), generator=self.generator, device="cpu")),
        )
        self.params[both] = self.log_uniform(self.episodes.gains) * self.family.windows.draw_params(1, number)
        self.state[both], self.total[pair], self.done[pair], self.seeds[pair] = 0, 0, 0, number
        self.length[pair] = math.ceil(self.log_uniform(self.episodes.lengths) / self.window) * self.window
        self.rate[pair], self.scale[pair] = (
            self.log_uniform(self.episodes.rates),
            self.log_uniform(self.episodes.scales),
        )
        self.falls[pair] = self.uniform() < self.episodes.falling
        self.noise[pair] = self.sigma * torch.randn(self.noise.shape[1], generator=self.generator, device="cpu")

    def advance(self, weights: torch.Tensor) -> Estimate:
        """One window of all pairs around these weights (W,): an `Estimate`."""
        for pair in (self.done >= self.length).nonzero().flatten().tolist():
            self.begin(pair)
        if not self.hold:
            fresh = self.sigma * torch.randn(self.noise.shape, generator=self.generator, device="cpu")
            self.noise = torch.where(self.done[:, None] > 0, fresh, self.noise)
        self.total = self.noise.clone() if self.hold else self.total + self.noise
        both = torch.stack([weights + self.noise, weights - self.noise], 1).flatten(0, 1)  # (2 pairs, W)
        progress = (self.done[:, None] + torch.arange(self.window)) / self.length[:, None]
        rates = self.rate[:, None] * torch.where(
            self.falls[:, None] > 0, 0.5 * (1 + torch.cos(math.pi * progress)), 1.0
        )
        twice = {
            name: value.repeat_interleave(2, 0)
            for name, value in dict(
                lr=rates, seeds=self.seeds, first_steps=self.done, gradient_scales=self.scale
            ).items()
        }
        losses = self.family.run(both, self.params, self.state, self.window, **twice).mean(1).view(-1, 2)  # (pairs, 2)
        self.done += self.window
        difference = (losses[:, 0] - losses[:, 1]) / losses.mean(1).clamp(min=1e-12)
        counts = 1 + self.episodes.late * self.falls * (2 * progress.mean(1) - 1)
        each = (counts * difference)[:, None] * self.total / (2 * self.sigma**2)
        return Estimate(each.mean(0), each, losses.mean().item())


def signal_to_noise(each: torch.Tensor) -> float:
    """The norm of the mean of estimates (n, W) over its standard error, as a number: 1 and less is noise."""
    mean = each.mean(0)
    error = ((each - mean).square().sum() / (len(each) * (len(each) - 1))).sqrt()
    return float(mean.norm() / error.clamp(min=1e-30))
