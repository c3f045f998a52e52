"""A meta-training run by `EpisodicES`: pairs of every family go on from iteration to iteration, and a checkpoint keeps them.

What differs from `run.Run`: functions are drawn at every iteration, for episodes that begin; the estimate and its standard error are
those of pairs; validation tries several rates.
"""

import math
from typing import Any

import torch
from torch import nn

from gradbuffer.contracts import MetaBatch, Problem, as_loss, part_if_any
from gradbuffer.nests import map_tensors, tensors_in
from gradbuffer.training.checkpoints import named_tuples, plain, unplain
from gradbuffer.training.episodes import Pairs, Share, stream
from gradbuffer.training.options import Training
from gradbuffer.training.particles import Span, particles_for
from gradbuffer.training.run import Run

__all__ = ["SQUARES", "EpisodicRun"]

SQUARES = "mean of the squared norms of the pairs' estimates"  # beside the names of weights


class EpisodicRun(Run):
    """A meta-training run whose functions have episodes of their own."""

    def __init__(self, net: nn.Module, problem: Problem, options: Training):
        super().__init__(net, problem, options)
        count, episodes = sum(len(part.problems) for part in problem.problems), options.method.episodes
        if isinstance(episodes, tuple) and len(episodes) != count:
            raise ValueError(
                f"episodes must be one Episodes, or {count} of them, one for each problem; got {len(episodes)}"
            )
        self.looks_late = False  # losses come to the host in every window
        self.families = {}  # the place of a problem in a mixture -> `Pairs`
        self.variance = 0.0  # of the present meta-gradient, its squared standard error

    def draw(self) -> None:
        """The families whose turn it is, each with functions for the episodes that begin."""
        self.functions = self.draw_at(self.iteration)
        self.windows, self.step, self.imitates = 1, 0, False
        self.draws += 1

    def draw_at(self, iteration: int) -> list[MetaBatch]:
        """The meta-batches of an iteration, whatever was drawn before."""
        batches = drawn(self.problem, self.options.meta_batch, stream(self.options.seed, iteration))
        if isinstance(batches, list):
            return batches
        return [MetaBatch(batches.params, batches.loss, part_if_any(batches))]

    def pairs_of(self, batch: MetaBatch) -> Pairs:
        """The pairs of its family, which begin at the first window that it takes part in."""
        if batch.family not in self.families:
            share = Share(batch.family, self.first, self.last, self.options.meta_batch)
            given = self.options.method, share, self.options.unroll, self.options.seed, batch
            self.families[batch.family] = Pairs(self.net, *given)
        return self.families[batch.family]

    def window_of(self, functions: MetaBatch) -> tuple[dict[str, torch.Tensor], list]:
        """The meta-gradient of a family's window, with the mean of the squared norms of its pairs' estimates."""
        weights = nn.utils.parameters_to_vector(self.net.parameters())
        estimate = self.pairs_of(functions).advance(weights, functions, self.iteration)
        mean, grads, start = estimate.each.mean(0).to(weights), {}, 0
        for name, parameter in self.net.named_parameters():
            if name in self.trained:
                grads[name] = mean[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        grads[SQUARES] = estimate.each.square().sum(1).mean()
        return grads, [estimate.loss, *(norm * norm for norm in estimate.moves), 0.0]

    def balance(self, family: int, grads: dict[tuple[int, str], torch.Tensor]) -> float:
        """See `Run.balance`; adds up what the estimate's squared standard error is."""
        factor = super().balance(family, grads)
        square = sum(grads[family, name].double().square().sum().item() for name in self.trained)
        spread = max(grads[family, SQUARES].item() - square, 0.0) / max(self.options.meta_batch - 1, 1)
        self.variance += factor**2 * spread
        return factor

    def advance(self) -> None:
        """See `Run.advance`."""
        self.variance = 0.0
        super().advance()
        norm, several = self.history.grad_norm[-1], self.options.meta_batch > 1
        error = math.sqrt(self.variance) if several else math.nan
        self.history.signal_to_noise.append(norm / error if error else math.inf)

    def score_of(self, problem: Problem, seed: int) -> float:
        """The mean loss of the last tenth of steps, at the best of the rates tried."""
        method, functions, steps = self.options.method, self.options.validation.validation_functions, self.options.steps
        batch, trials = drawn(problem, functions, stream(seed)), method.trials
        particles = particles_for(self.averaged, batch, functions, trials)
        for function in range(functions):
            particles.begin(function, {name: value[function] for name, value in batch.params.items()})
        falling = 0.5 * (1 + torch.cos(math.pi * torch.arange(steps, dtype=torch.float64) / steps))
        rates = (method.trial_rates[:, None] * falling).repeat(functions, 1)
        weights = nn.utils.parameters_to_vector(self.averaged.parameters()).detach()
        losses = particles.run(
            [Span(0, functions, as_loss(batch.loss), 0)], weights, rates, torch.ones(functions * trials)
        )
        return losses.double()[:, -max(1, steps // 10) :].mean(1).view(functions, trials).mean(0).min().item()

    def begin(self) -> None:
        """See `Run.begin`; scores the weights that training begins with."""
        super().begin()
        if self.iteration == 0:
            self.score()

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds: the pairs, too."""
        content = super().content()
        own = {family: pairs.carried() for family, pairs in self.families.items()}
        parts = self.ranks.gather(plain(own))
        return content | {"families": parts and {family: joined([part[family] for part in parts]) for family in own}}

    def restore(self, content: dict[str, Any]) -> None:
        super().restore(content)
        batches = {}
        for family, carried in content["families"].items():
            for number in set(carried["on_way"]["origin"].tolist()) - batches.keys():
                batches[number] = {batch.family: batch for batch in self.draw_at(number)}
            own = {number: some[family] for number, some in batches.items() if family in some}
            pairs = self.pairs_of(next(iter(own.values())))
            device, classes = self.problem.device, named_tuples(pairs.particles.tensors())
            carried = map_tensors(lambda tensor: tensor[self.first : self.last].clone(), carried)
            carried["particles"] = unplain(carried["particles"], device, classes)
            pairs.carry_on(carried, own)


def drawn(problem, count, generator):
    """What `sample` gives, of that generator alone, also where a problem uses torch's own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator.initial_seed())
        return problem.sample(count, generator=generator)


def joined(parts):
    """What several ranks carry, one after the other along the axis of functions."""
    tensors = iter([torch.cat(same) for same in zip(*map(tensors_in, parts))])
    return map_tensors(lambda tensor: next(tensors), parts[0])
