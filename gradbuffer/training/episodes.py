"""Evolution strategies on many families of functions, whose pairs have episodes of their own: what small learned optimizers learn by.

A family's functions run in antithetic pairs: both of a pair begin at one point, read the same minibatches, and are moved by the
optimizer's weights plus and minus a perturbation of the pair's own. The difference of their losses along a window, relative to their
mean, times the perturbation, is the pair's estimate of the meta-gradient. Every pair has episodes of its own: a start, a length, a
rate and its schedule, a scale of the gradients. Perturbations are held for a whole episode (NRES, Li et al. 2023, arXiv 2304.12180),
or drawn anew for each window and summed up (PES, Vicol et al. 2021, arXiv 2112.13835).

What is drawn depends on the run's seed, the iteration, the family and the function's number alone: so several processes draw what one
would, and a run that goes on from a checkpoint draws its functions again.
"""

import hashlib
import inspect
import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from gradbuffer.checks import NonFiniteError, check_count, check_positive_number
from gradbuffer.contracts import MetaBatch, Rule, as_loss, kind_of, part_of
from gradbuffer.nests import map_tensors
from gradbuffer.training.evolution import Method, Unrolled, Window
from gradbuffer.training.particles import Span, particles_for

__all__ = ["EpisodicES", "Episodes", "Estimate", "Pairs", "Share", "stream"]

DRAWN = (
    "offset",
    "length",
    "rate",
    "scale",
    "gain",
    "falling",
)  # of each function at the start of an episode, uniform at first


@dataclass(frozen=True)
class Episodes:
    """From what ranges episodes are drawn, log-uniformly.

    Args:
        lengths: least and most steps; rounded up to whole ones, not to windows.
        rates: least and most learning rate, above 0.
        scales: least and most factor on the gradients that the optimizer reads, above 0: functions in other coordinates.
        gains: least and most factor on the initial parameters, above 0.
        falling: in [0, 1], the share of episodes whose rate falls to 0 on half a cosine; in the others it stays.
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
            elif not (isinstance(value, (tuple, list)) and len(value) == 2 and 0 < value[0] <= value[1] < math.inf):
                raise ValueError(f"{name} must be the least and the most, above 0, got {value}")
            else:
                object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class EpisodicES(Method):
    """The meta-gradient by evolution strategies on functions that have episodes of their own: for `meta_train` with an optimizer that
    takes a rate, such as `MLPOptimizer`, and a mixture of many families of small functions.

    `meta_batch` is the number of antithetic pairs of each family, `unroll` the window. Each iteration takes a window of every family,
    or of those that `Mixture(families=…)` draws. Where an episode ends, which may be inside a window, another one begins with a function
    drawn anew.
    `Perceptrons` under an `MLPOptimizer` of the variant "celo" on a CPU run in a compiled loop, over the threads of torch; all else
    runs in plain torch. Validation gives each family the best of several rates, which fall to 0 on half a cosine over `steps` steps;
    its score is the mean loss of the last tenth of them. The weights that training begins with are scored, too.

    Args:
        sigma: standard deviation of the perturbations of the optimizer's weights; positive.
        hold: keep a perturbation for a whole episode, instead of a fresh one for each window.
        episodes: what they are like, an `Episodes`; or a tuple of them, one for each problem of the mixture in its order, where
            families want rates or lengths of their own.
        staggered: episodes of a family have lengths of their own, and the first ones begin part of the way through, so that they end
            at different times. False: they begin and end together, so that a family in plain torch is one computation in each
            step, not one for each function.
        ceiling: the largest loss that counts, in multiples of that at the start of the episode; larger ones, and those that are not
            finite, count as this. Above 1.
        trials: rates that validation tries, from the least to the most of all episodes'; positive.

    Raises:
        TypeError, ValueError: an argument is not as said.

    Reference: Vicol, Metz and Sohl-Dickstein 2021 (arXiv 2112.13835); Li et al. 2023 (arXiv 2304.12180); the mixture of episodes: Metz
    et al. 2022 (arXiv 2203.11860).
    """

    sigma: float = 0.01
    hold: bool = True
    episodes: Episodes | tuple[Episodes, ...] = Episodes()
    staggered: bool = True
    ceiling: float = 1.5
    trials: int = 5

    name = "episodic_es"

    def __post_init__(self):
        check_positive_number(sigma=self.sigma, ceiling=self.ceiling)
        check_count(trials=self.trials)
        if self.ceiling <= 1:
            raise ValueError(f"ceiling must be above 1, got {self.ceiling}")
        several = list(self.episodes) if isinstance(self.episodes, (tuple, list)) else [self.episodes]
        if not several or not all(isinstance(one, Episodes) for one in several):
            raise TypeError(f"episodes must be an Episodes, or a tuple of them, got {self.episodes!r}")
        if isinstance(self.episodes, list):
            object.__setattr__(self, "episodes", tuple(several))
        for name in ("hold", "staggered"):
            if not isinstance(vars(self)[name], bool):
                raise TypeError(f"{name} must be True or False, got {vars(self)[name]!r}")

    def check(self, rule: Rule) -> None:
        """Raise unless the network takes whole tensors, a rate, and weights for each function."""
        forward = type(vars(rule).get("adopted", rule)).forward
        lacking = [name for name in ("params", "lr", "weights") if name not in inspect.signature(forward).parameters]
        if not rule.tensorwise or rule.odd or lacking:
            raise ValueError(
                "EpisodicES needs a tensorwise network that is not odd and whose forward takes params, lr and weights, such as "
                f"MLPOptimizer; got {kind_of(rule)}"
            )

    def window(self, window: Window, generator: torch.Generator | None) -> Unrolled:
        """Raises ValueError: a single window is not what this is for."""
        raise ValueError(
            "EpisodicES is a method of meta_train, whose functions go on from window to window; meta_gradient takes "
            "PES(hold=True, per_function=True)"
        )

    def episodes_of(self, family: int) -> Episodes:
        """Those of a problem, by its place in the mixture."""
        return self.episodes[family] if isinstance(self.episodes, tuple) else self.episodes

    @property
    def trial_rates(self) -> torch.Tensor:
        """The rates that validation tries (trials,)."""
        several = self.episodes if isinstance(self.episodes, tuple) else (self.episodes,)
        least, most = math.log(min(one.rates[0] for one in several)), math.log(max(one.rates[1] for one in several))
        return torch.linspace(least, most, self.trials, dtype=torch.float64).exp()


def stream(*numbers: int) -> torch.Generator:
    """A generator that these numbers determine, on the CPU. (Of a seed torch reads 32 bits.)"""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big"))


class Share(NamedTuple):
    """Functions first … last - 1 of the meta-batches of a family: all of them, or those of one of several processes."""

    family: int
    first: int
    last: int
    whole: int  # how many functions a meta-batch has


class Estimate(NamedTuple):
    """What a window of a family's pairs says of the meta-gradient; no graph."""

    each: torch.Tensor  # (pairs, W), its mean is the estimate
    loss: float  # mean over pairs and steps, clipped
    moves: list[float]  # ‖θ_T - θ_0‖, ‖θ_0‖ and ‖θ_T‖, of all particles as one vector


class Pairs:
    """The antithetic pairs of one family on their way from window to window.

    Args:
        net: the learned optimizer.
        method: the options.
        share: which functions.
        window: steps in a window.
        seed: the run's.
        batch: a `MetaBatch` of the family, for the forms of its parameters.
    """

    def __init__(self, net: nn.Module, method: EpisodicES, share: Share, window: int, seed: int, batch: MetaBatch):
        self.method, self.share, self.window, self.seed = method, share, window, seed
        self.episodes = method.episodes_of(share.family)
        self.functions = share.last - share.first
        parameters = [parameter for _, parameter in net.named_parameters()]
        self.particles = particles_for(net, batch, self.functions, 2)
        self.free = torch.cat([torch.full((part.numel(),), float(part.requires_grad)) for part in parameters])
        self.batches = {}  # iteration -> the meta-batch drawn then, as long as one of its functions is on its way
        zeros = torch.zeros(self.functions, dtype=torch.float64)
        counts = torch.zeros(self.functions, dtype=torch.int64)
        noise = torch.zeros(self.functions, len(self.free), dtype=parameters[0].dtype)
        self.on_way = {name: zeros.clone() for name in (*DRAWN, "start")} | {
            "origin": counts - 1,  # the iteration at which the function was drawn
            "done": counts,
            "noise": noise,
            "total": noise,
        }

    def begin(self, batch: MetaBatch, iteration: int, at: int = 0) -> None:
        """Begin episodes where they have ended, with the functions of a meta-batch that was drawn at this iteration.

        at: how many steps of the window were done before.
        """
        method, share, on_way = self.method, self.share, self.on_way
        ended = self.ended()
        if not ended.any():
            return
        drawn = torch.rand(
            len(DRAWN), share.whole, generator=stream(self.seed, share.family, iteration, at), dtype=torch.float64
        )
        if not method.staggered:
            drawn[:2] = drawn[:2, :1]
        fresh = dict(zip(DRAWN, drawn[:, share.first : share.last]))
        for name in ("length", "rate", "scale", "gain"):
            least, most = vars(self.episodes)[f"{name}s"]
            fresh[name] = least * (most / least) ** fresh[name]
        first = on_way["origin"] < 0  # these begin part of the way through
        part = torch.where(first, fresh["offset"].clamp(min=1e-9), 1.0)
        fresh["length"] = torch.ceil(fresh["length"] * part - 1e-9)
        fresh["falling"] = (fresh["falling"] < self.episodes.falling).double()
        fresh |= {"origin": torch.full_like(on_way["origin"], iteration), "done": torch.zeros_like(on_way["done"])}
        for name, values in fresh.items():
            on_way[name] = torch.where(ended, values, on_way[name])
        for function in ended.nonzero().flatten().tolist():
            number = share.first + function
            self.particles.begin(
                function, {name: value[number] * fresh["gain"][function] for name, value in batch.params.items()}
            )
        self.batches[iteration] = batch
        self.batches = {number: self.batches[number] for number in set(on_way["origin"].tolist())}

    def ended(self) -> torch.Tensor:
        """Which functions (functions,) have no episode under way."""
        return (self.on_way["origin"] < 0) | (self.on_way["done"] >= self.on_way["length"])

    def perturb(self, iteration: int, at: int = 0) -> None:
        """Draw perturbations, of all functions or, where they are held or inside a window, of those whose episodes begin."""
        on_way, begun = self.on_way, self.on_way["done"] == 0
        renewed = begun if self.method.hold or at else torch.ones_like(begun)
        fresh = torch.zeros_like(on_way["noise"])
        for row in renewed.nonzero().flatten().tolist():
            fresh[row].normal_(generator=stream(self.seed, self.share.family, iteration, self.share.first + row, at))
        fresh *= self.method.sigma * self.free
        on_way["noise"] = torch.where(renewed[:, None], fresh, on_way["noise"])
        on_way["total"] = torch.where(begun[:, None], fresh, on_way["total"] + fresh)

    def spans(self) -> list[Span]:
        """Functions that were drawn together and are at the same step, as far as they are neighbours, with their loss."""
        spans, first = [], 0
        for (origin, done), same in groupby(zip(self.on_way["origin"].tolist(), self.on_way["done"].tolist())):
            last = first + len(list(same))
            batch, own = self.batches[origin], (self.share.first + first, self.share.first + last)
            if own != (0, self.share.whole):
                batch = part_of(batch, *own)
            spans.append(Span(first, last, as_loss(batch.loss), done))
            first = last
        return spans

    def advance(self, weights: torch.Tensor, batch: MetaBatch, iteration: int) -> Estimate:
        """One window of all pairs around these weights (W,).

        batch: functions of this family, drawn at this iteration, for episodes that begin.

        Raises:
            NonFiniteError: a loss at the start of an episode is not finite; that episode ends.
            ValueError: a loss is negative.
        """
        window, weights, numbers = self.window, weights.detach().cpu(), torch.arange(self.window)
        losses = torch.zeros(self.functions, 2, window, dtype=torch.float64)
        progress, since = torch.zeros(self.functions, window).double(), torch.zeros(self.functions, 1)
        done, each, mean, way, before = 0, 0.0, 0.0, 0.0, None
        while done < window:  # from one end of an episode to the next
            self.begin(batch, iteration, done)
            self.perturb(iteration, done)
            here = vector_of(self.particles.params)
            before = here if before is None else before
            until = min(done + int((self.on_way["length"] - self.on_way["done"]).min()), window)
            losses[:, :, done:until], progress[:, done:until] = self.go(weights, until - done)
            after = vector_of(self.particles.params)
            done, way = until, way + (after - here)
            ends = (self.ended() | (done == window))[:, None]
            estimate, loss = self.estimate(losses, progress, ends & (since <= numbers) & (numbers < done))
            each, mean, since = each + estimate, mean + loss, torch.where(ends, done, since)
        moves = [vector.nan_to_num(0, 0, 0).norm().item() for vector in (way, before, after)]
        return Estimate(each, mean, moves)

    def go(self, weights: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """So many steps of all pairs, no more than any episode has left: losses (pairs, 2, steps) and the share of the episode that was
        done before each of them (pairs, steps)."""
        on_way = self.on_way
        both = torch.stack([weights + on_way["noise"], weights - on_way["noise"]], 1).flatten(0, 1)  # (2 pairs, W)
        progress = (on_way["done"][:, None] + torch.arange(steps)) / on_way["length"][:, None]
        falls = torch.where(on_way["falling"][:, None] > 0, 0.5 * (1 + torch.cos(math.pi * progress)), 1.0)
        rates = (on_way["rate"][:, None] * falls).repeat_interleave(2, 0)
        losses = self.particles.run(self.spans(), both, rates, on_way["scale"].repeat_interleave(2))
        losses = losses.double().view(self.functions, 2, steps)
        self.take_up(losses)
        return losses, progress

    def estimate(
        self, losses: torch.Tensor, progress: torch.Tensor, counted: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """What the steps of a window that count, (pairs, window) of bool, add to its estimate (pairs, W) and to its loss."""
        on_way, share = self.on_way, counted.sum(1) / self.window
        ceiling = (self.method.ceiling * on_way["start"])[:, None, None]
        losses = (torch.minimum(losses, ceiling) * counted[:, None]).sum(2) / counted.sum(1, keepdim=True).clamp(min=1)
        progress = (progress * counted).sum(1) / counted.sum(1).clamp(min=1)
        difference = (losses[:, 0] - losses[:, 1]) / losses.mean(1).clamp(min=1e-12)
        counts = share * (1 + self.episodes.late * on_way["falling"] * (2 * progress - 1))
        each = (counts * difference)[:, None] * on_way["total"] / (2 * self.method.sigma**2)
        return each, (losses.mean(1) * share).mean().item()

    def take_up(self, losses: torch.Tensor) -> None:
        """Note that these steps have been done, and how high the losses (pairs, 2, steps) of episodes begin; raise as `advance` does."""
        if (losses < 0).any():
            raise ValueError(
                f"losses must be 0 or more for EpisodicES, which compares them with their mean; got {losses.min().item()} in "
                f"family {self.share.family}"
            )
        on_way, begun = self.on_way, self.on_way["done"] == 0
        on_way["start"] = torch.where(begun, losses[:, 0, 0], on_way["start"])
        on_way["done"] = on_way["done"] + losses.shape[2]
        bad = begun & ~on_way["start"].isfinite()
        if bad.any():
            on_way["length"] = torch.where(bad, 0.0, on_way["length"])
            function = self.share.first + int(bad.nonzero()[0])
            raise NonFiniteError(
                f"the loss of function {function} of family {self.share.family} is not finite at the start of its episode"
            )

    def carried(self) -> dict[str, Any]:
        """What it takes to go on, a nest of tensors whose first axis is that of functions."""
        split = map_tensors(lambda tensor: tensor.unflatten(0, (self.functions, 2)), self.particles.tensors())
        return {"on_way": self.on_way, "particles": split}

    def carry_on(self, carried: dict[str, Any], batches: dict[int, MetaBatch]) -> None:
        """Go on from there. batches: the meta-batches of this family by the iterations at which they were drawn."""
        self.on_way = carried["on_way"]
        self.batches = {number: batches[number] for number in set(self.on_way["origin"].tolist())}
        self.particles.go_on(*map_tensors(lambda tensor: tensor.flatten(0, 1), carried["particles"]))


def vector_of(params):
    """All parameters of all particles, (P · numbers,), as they are now."""
    tensors = params.values() if isinstance(params, dict) else [params]
    return torch.cat([tensor.flatten() for tensor in tensors])
