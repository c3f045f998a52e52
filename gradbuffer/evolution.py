"""Evolution strategies for learned optimizers, on many families of functions at once.

A family's functions run in antithetic pairs: both of a pair begin at one point, read the same minibatches, and are moved by the
optimizer's weights plus and minus a perturbation of the pair's own. The difference of their losses along a window, relative to the
pair's mean loss, times the perturbation, is the pair's estimate of the meta-gradient. Perturbations are held for a whole episode
(NRES, Li et al. 2023, arXiv 2304.12180), or drawn anew for each window and summed up (PES, Vicol et al. 2021, arXiv 2112.13835):
neither estimate is biased by truncation. Nothing is differentiated.
"""

import math
from typing import NamedTuple

import torch

from gradbuffer.checks import check_count, check_positive_number

__all__ = ["Estimate", "Pairs", "Perceptrons", "signal_to_noise"]


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

    def __init__(self, windows, inputs, targets, batch, ceiling):
        check_count(batch=batch)
        check_positive_number(ceiling=ceiling)
        self.windows, self.inputs, self.targets, self.batch, self.ceiling = windows, inputs, targets, batch, ceiling

    def run(self, weights, params, state, steps, **options):
        """As `PerceptronWindows.run`."""
        return self.windows.run(weights, params, state, self.inputs, self.targets, steps=steps, batch=self.batch,
                                clip=self.ceiling, **options)


class Pairs:
    """The antithetic pairs of one family, on their way from window to window.

    Every pair has episodes of its own: a start, a rate (kept, or falling on half a cosine), a scale of the gradients and a length,
    the last three log-uniform. The first episodes begin part of the way through, so that pairs do not end together.

    Args:
        family: a `Perceptrons`.
        pairs: how many.
        window: steps in a window.
        sigma: standard deviation of the perturbations.
        lengths: of episodes, least and most steps; multiples of `window` come of them.
        rates, scales, gains: least and most; gains are factors on the initial parameters.
        hold: one perturbation for a whole episode; else a fresh one for each window.
        generator: on the CPU, for all that is drawn.
    """

    def __init__(self, family, pairs=8, window=50, sigma=0.01, lengths=(100, 2000), rates=(2e-4, 3e-2), scales=(1e-3, 1e3),
                 gains=(0.7, 1.7), hold=True, *, generator):
        check_count(pairs=pairs, window=window)
        check_positive_number(sigma=sigma)
        for name, (least, most) in dict(lengths=lengths, rates=rates, scales=scales, gains=gains).items():
            if not 0 < least <= most < math.inf:
                raise ValueError(f"{name} must be the least and the most, above 0, got {(least, most)}")
        self.family, self.pairs, self.window, self.sigma, self.generator = family, pairs, window, sigma, generator
        self.lengths, self.rates, self.scales, self.gains, self.hold = lengths, rates, scales, gains, hold
        W, windows = family.windows.num_weights, family.windows
        self.params, self.state = torch.empty(2 * pairs, windows.num_params), windows.init_state(2 * pairs)
        self.noise, self.total = torch.zeros(pairs, W), torch.zeros(pairs, W)
        self.done, self.length, self.seeds = (torch.zeros(pairs, dtype=torch.int64) for _ in range(3))
        self.rate, self.scale, self.falls = torch.ones(pairs), torch.ones(pairs), torch.zeros(pairs)
        for pair in range(pairs):
            self.begin(pair)
            self.length[pair] = math.ceil(self.length[pair] * self.uniform() / window) * window

    def uniform(self):
        return float(torch.rand((), generator=self.generator))

    def log_uniform(self, bounds):
        return bounds[0] * (bounds[1] / bounds[0]) ** self.uniform()

    def begin(self, pair):
        """A new episode."""
        both, number = slice(2 * pair, 2 * pair + 2), int(torch.randint(2**40, (), generator=self.generator))
        self.params[both] = self.log_uniform(self.gains) * self.family.windows.draw_params(1, number)
        self.state[both], self.total[pair], self.done[pair], self.seeds[pair] = 0, 0, 0, number
        self.length[pair] = math.ceil(self.log_uniform(self.lengths) / self.window) * self.window
        self.rate[pair], self.scale[pair] = self.log_uniform(self.rates), self.log_uniform(self.scales)
        self.falls[pair] = self.uniform() < 0.5
        self.noise[pair] = self.sigma * torch.randn(self.noise.shape[1], generator=self.generator)

    def advance(self, weights):
        """One window of all pairs around these weights (W,): an `Estimate`."""
        for pair in (self.done >= self.length).nonzero().flatten().tolist():
            self.begin(pair)
        if not self.hold:
            fresh = self.sigma * torch.randn(self.noise.shape, generator=self.generator)
            self.noise = torch.where(self.done[:, None] > 0, fresh, self.noise)
        self.total = self.noise.clone() if self.hold else self.total + self.noise
        both = torch.stack([weights + self.noise, weights - self.noise], 1).flatten(0, 1)  # (2 pairs, W)
        progress = (self.done[:, None] + torch.arange(self.window)) / self.length[:, None]
        rates = self.rate[:, None] * torch.where(self.falls[:, None] > 0, 0.5 * (1 + torch.cos(math.pi * progress)), 1.0)
        twice = {name: value.repeat_interleave(2, 0) for name, value in dict(
            lr=rates, seeds=self.seeds, first_steps=self.done, gradient_scales=self.scale).items()}
        losses = self.family.run(both, self.params, self.state, self.window, **twice).mean(1).view(-1, 2)  # (pairs, 2)
        self.done += self.window
        difference = (losses[:, 0] - losses[:, 1]) / losses.mean(1).clamp(min=1e-12)
        each = difference[:, None] * self.total / (2 * self.sigma**2)
        return Estimate(each.mean(0), each, losses.mean().item())


def signal_to_noise(each):
    """The norm of the mean of estimates (n, W) over its standard error, as a number: 1 and less is noise."""
    mean = each.mean(0)
    error = ((each - mean).square().sum() / (len(each) * (len(each) - 1))).sqrt()
    return float(mean.norm() / error.clamp(min=1e-30))
