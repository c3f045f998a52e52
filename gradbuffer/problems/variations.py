"""Problems made of other problems: their functions in other coordinates, mirrored, beside a convex term; or several problems."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from gradbuffer.checks import check_count, check_positive_number
from gradbuffer.contracts import Loss, MetaBatch, Problem, as_loss, as_problem, in_parts, kind_of, part_if_any
from gradbuffer.devices import bring, drawn_on_cpu
from gradbuffer.unrolling import Coordinates

__all__ = ["ConvexTerms", "Mirrored", "Mixture", "RandomScaling"]


class Variation(Problem):
    """A problem made of another one's functions: what `RandomScaling`, `Mirrored` and `ConvexTerms` share.

    Validation, in `meta_train`, is on the other problem's own functions: they are what the optimizer is for.
    """

    title = "{}"

    def __init__(self, problem, **options):
        self.problem, self.options = as_problem(problem), options
        self.device, self.name = self.problem.device, self.title.format(title_of(self.problem))

    def to(self, device):
        return type(self)(self.problem.to(device), **self.options)

    def validation_problem(self):
        return self.problem.validation_problem()

    @property
    def multiple_of(self) -> int:
        return self.problem.multiple_of

    @property
    def problems(self):
        return [type(self)(problem, **self.options) for problem in self.problem.problems]

    def describe(self):
        return f"{super().describe()} of {self.problem.describe()}"

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions. Returns `MetaBatch`; of a `Mixture` a list of them."""
        drawn = self.problem.sample(meta_batch, generator=generator)
        if isinstance(drawn, list):
            return [self.vary(batch, generator)._replace(family=batch.family) for batch in drawn]
        return self.vary(drawn, generator)

    def vary(self, batch, generator):
        """What becomes of a meta-batch of the problem."""
        raise NotImplementedError


def title_of(problem):
    return problem.name or kind_of(problem)


def loss_of(batch):
    """A meta-batch's `Loss`, divided as the meta-batch is."""
    loss = as_loss(batch.loss)
    if not loss.divisible and isinstance(batch, MetaBatch) and batch.part:
        loss = copy.copy(loss)
        loss.divisible, loss.part = True, lambda first, last: loss_of(batch.part(first, last))
    return loss


def meta_batch_of(params, loss):
    return in_parts(params, loss) if loss.divisible else MetaBatch(params, loss)


def functions_of(tensors):
    """B of a dict of (B, ...)."""
    return len(next(iter(tensors.values())))


def gradient_of(loss, params, step):
    """Losses (B,) and the gradient of their sum, a dict like params, without a graph, in the fastest way that the loss knows."""
    coordinates = Coordinates(params)
    losses, gradient = coordinates.losses_and_gradient(loss, coordinates.join(params), step)
    return losses, coordinates.split(gradient)


class RandomScaling(Variation):
    """The same functions in other coordinates: f_c(θ) = f(c ⊙ θ) from θ_0 / c, every c_i drawn anew for each function.

    An optimizer that is trained on these cannot rely on how large the steps of one architecture are, nor on the signs
    of its gradients.

    Args:
        problem: whose functions.
        radius: c_i = e^u with u uniform on ±radius; not negative; 0 for no scaling.
        signs: also give each c_i a random sign.

    Example:
        >>> from optimizees import Quadratics
        >>> batch = RandomScaling(Quadratics(), radius=3.0).sample(4)

    Reference: Lv, Jiang and Li 2017 (arXiv 1703.03633), section 4.1; the signs are ours.
    """

    title = "{}, randomly scaled"

    def __init__(self, problem: Any, radius: float = 3.0, signs: bool = False):
        if isinstance(radius, bool) or not (isinstance(radius, (int, float)) and 0 <= radius <= 20):
            raise ValueError(f"radius must be a number in [0, 20], got {radius!r}")
        super().__init__(problem, radius=radius, signs=bool(signs))

    @drawn_on_cpu
    def vary(self, batch: MetaBatch, generator: torch.Generator | None) -> MetaBatch:
        scales = {}
        for name, tensor in batch.params.items():
            scale = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-1, 1, generator=generator)
            scale = scale.mul_(self.options["radius"]).exp_()
            if self.options["signs"]:
                scale *= 2 * torch.randint(2, tensor.shape, generator=generator) - 1
            scales[name] = bring(scale, tensor.device)
        scaled = {name: tensor / scales[name] for name, tensor in batch.params.items()}
        return meta_batch_of(scaled, ScaledLoss([(scales, loss_of(batch))]))


class ScaledLoss(Loss):
    """Losses one after the other, each in coordinates of its own: pieces are (scales, loss), for f(scales ⊙ θ), with scales like the
    parameters of its functions."""

    def __init__(self, pieces):
        self.pieces, self.divisible = pieces, all(loss.divisible for _, loss in pieces)

    def split(self, params):
        """(scales, loss, where it is computed) of each piece."""
        start = 0
        for scales, loss in self.pieces:
            functions = functions_of(scales)
            yield (
                scales,
                loss,
                {name: scale * params[name][start : start + functions] for name, scale in scales.items()},
            )
            start += functions

    def __call__(self, params, step):
        return torch.cat([loss(own, step) for _, loss, own in self.split(params)])

    def with_gradient(self, params, step):
        found = [(scales, *gradient_of(loss, own, step)) for scales, loss, own in self.split(params)]
        gradients = {
            name: torch.cat([scales[name] * gradient[name] for scales, _, gradient in found]) for name in params
        }
        return torch.cat([losses for _, losses, _ in found]), gradients

    def part(self, first, last):
        pieces = []
        for scales, loss in self.pieces:
            begin, end = max(first, 0), min(last, functions_of(scales))
            if begin < end:
                pieces.append(({name: scale[begin:end] for name, scale in scales.items()}, loss.part(begin, end)))
            first, last = first - functions_of(scales), last - functions_of(scales)
        return ScaledLoss(pieces)

    def tensors(self, step):
        return tuple(tensor for scales, loss in self.pieces for tensor in (*scales.values(), *loss.tensors(step)))

    def of(self, tensors):
        left, pieces = iter(tensors), []
        for scales, loss in self.pieces:
            scales = {name: next(left) for name in scales}
            pieces.append((scales, loss.of(tuple(next(left) for _ in loss.tensors(0)))))
        return ScaledLoss(pieces)


class Mirrored(Variation):
    """Every function twice, the second time mirrored: f(θ) from θ_0 and f(-θ) from -θ_0, on the same minibatches.

    Most of the noise in a long window's meta-gradient is in one direction: that of all coordinates drifting together,
    which a function likes or not by chance. An optimizer whose updates change sign with the gradients does not drift,
    and takes the two of a pair along mirrored paths; what they say about drift then cancels. Measured on MNIST networks
    with a window of 50 steps, the noise of the meta-gradient falls from 146 to 5 (benchmarks/noise.py).

    Args:
        problem: whose functions; `sample` then needs an even `meta_batch`, and gives its first half upright.

    Example:
        >>> from optimizees import Quadratics
        >>> batch = Mirrored(Quadratics()).sample(4)

    Reference: ours; antithetic sampling of the functions.
    """

    title = "{}, mirrored"

    @property
    def multiple_of(self) -> int:
        return 2 * self.problem.multiple_of

    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> MetaBatch | list[MetaBatch]:
        """Draw `meta_batch` functions, in pairs. Returns `MetaBatch`; of a `Mixture` a list of them."""
        check_count(meta_batch=meta_batch)
        if meta_batch % 2:
            raise ValueError(f"meta_batch must be even for mirrored pairs, got {meta_batch}")
        return super().sample(meta_batch // 2, generator)

    def vary(self, batch: MetaBatch, generator: torch.Generator | None) -> MetaBatch:
        params = {name: torch.cat([tensor, -tensor]) for name, tensor in batch.params.items()}
        signs = [
            {name: tensor.new_full((), sign).expand_as(tensor) for name, tensor in batch.params.items()}
            for sign in (1, -1)
        ]
        return meta_batch_of(params, ScaledLoss([(scales, loss_of(batch)) for scales in signs]))


class ConvexTerms(Variation):
    """The same functions beside an easy one: f(θ) + mean_i (x_i − v_i)², with x_0 and v uniform on [-1, 1].

    Deep networks start with small gradients and little to learn from; the convex term teaches the optimizer, from the
    first window on, to go downhill. x goes by the name "convex".

    Args:
        problem: whose functions.
        dim: coordinates of x, positive.

    Example:
        >>> from optimizees import Quadratics
        >>> batch = ConvexTerms(Quadratics()).sample(4)

    Reference: Lv, Jiang and Li 2017 (arXiv 1703.03633), section 4.2.
    """

    title = "{} and a convex term"

    def __init__(self, problem: Any, dim: int = 20):
        check_count(dim=dim)
        super().__init__(problem, dim=dim)

    @drawn_on_cpu
    def vary(self, batch: MetaBatch, generator: torch.Generator | None) -> MetaBatch:
        if "convex" in batch.params:
            raise ValueError('the problem has a parameter named "convex" already')
        like = next(iter(batch.params.values()))
        start, target = (
            bring(
                torch.empty(len(like), self.options["dim"], dtype=like.dtype).uniform_(-1, 1, generator=generator),
                like.device,
            )
            for _ in range(2)
        )
        return meta_batch_of({**batch.params, "convex": start}, ConvexLoss(loss_of(batch), target))


class ConvexLoss(Loss):
    """Another loss, and mean_i (x_i − target_i)² of the parameter x, "convex", added to it."""

    def __init__(self, loss, target):
        self.loss, self.target, self.divisible = loss, target, loss.divisible

    def split(self, params):
        """The other loss's parameters, and x - target."""
        return {name: tensor for name, tensor in params.items() if name != "convex"}, params["convex"] - self.target

    def __call__(self, params, step):
        own, away = self.split(params)
        return self.loss(own, step) + away.square().mean(1)

    def with_gradient(self, params, step):
        own, away = self.split(params)
        losses, gradients = gradient_of(self.loss, own, step)
        return losses + away.square().mean(1), {**gradients, "convex": away * (2 / away.shape[1])}

    def part(self, first, last):
        return ConvexLoss(self.loss.part(first, last), self.target[first:last])

    def tensors(self, step):
        return *self.loss.tensors(step), self.target

    def of(self, tensors):
        return ConvexLoss(self.loss.of(tensors[:-1]), tensors[-1])


class Mixture(Problem):
    """Several problems at once, whose functions may have parameters of unequal names and shapes.

    Args:
        problems: a list of at least one, all on one device.
        weights: of the random draw of `families`: how often each problem is drawn in proportion to the others, positive numbers.
            Default: all alike.
        families: how many different problems `sample` draws from, at random; from 1 to all but one. Default: all of them.

    Raises:
        ValueError, TypeError: an argument is not as above; or `weights` are given, and there is nothing to be drawn by them.

    Example:
        >>> from optimizees import Quadratics
        >>> [len(batch.params["theta"][0]) for batch in Mixture([Quadratics(4), Quadratics(8)]).sample(2)]
        [4, 8]
    """

    problems: list = []

    def __init__(self, problems: Sequence[Any], weights: Sequence[float] | None = None, families: int | None = None):
        if not isinstance(problems, (list, tuple)) or not problems:
            raise TypeError(f"problems must be a list of at least one problem, got {problems!r}")
        self.problems = [as_problem(problem) for problem in problems]
        self.device = self.problems[0].device
        if any(problem.device != self.device for problem in self.problems):
            raise ValueError(
                f"problems must be on one device, got {[str(problem.device) for problem in self.problems]}"
            )
        if families is not None:
            check_count(families=families)
            if families >= len(problems):
                raise ValueError(
                    f"families must be None, for all problems, or below their number, {len(problems)}, got {families}"
                )
        elif weights is not None:
            raise ValueError("weights have an effect only with families, got families=None")
        if weights is not None:
            weights = check_weights(weights, len(problems))
        self.weights, self.families = weights, families
        self.name = f"a mixture of {'; '.join(map(title_of, self.problems))}"

    def to(self, device: torch.device | str) -> "Mixture":
        return Mixture([problem.to(device) for problem in self.problems], self.weights, self.families)

    def validation_problem(self) -> "Mixture":
        """The validation problems of all, whatever `families` is: every validation is on all of them."""
        validated = [as_problem(problem.validation_problem()) for problem in self.problems]
        return Mixture([own for problem in validated for own in problem.problems])

    def describe(self) -> str:
        options = dict(weights=self.weights, families=self.families)
        return f"{kind_of(self)} {options} of {[problem.describe() for problem in self.problems]}"

    @drawn_on_cpu
    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> list[MetaBatch]:
        """Draw `meta_batch` functions of each problem, or of each of the `families` drawn. Returns a list of `MetaBatch`, in the
        problems' order."""
        places, batches = range(len(self.problems)), []
        if self.families is not None:
            weights = torch.tensor(self.weights or [1.0] * len(self.problems), dtype=torch.float64)
            places = sorted(torch.multinomial(weights, self.families, generator=generator).tolist())
        for place in places:
            drawn = self.problems[place].sample(meta_batch, generator=generator)
            first = sum(
                len(problem.problems) for problem in self.problems[:place]
            )  # one of them may be a mixture itself
            for batch in (
                drawn if isinstance(drawn, list) else [MetaBatch(drawn.params, drawn.loss, part_if_any(drawn))]
            ):
                batches.append(batch._replace(family=first + batch.family))
        return batches


def check_weights(weights, count):
    """A list of that many positive numbers, or an error."""
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        raise ValueError(f"weights must be {count} positive numbers, one for each problem, got {weights!r}")
    check_positive_number(**{f"weights[{place}]": weight for place, weight in enumerate(weights)})
    return list(weights)
