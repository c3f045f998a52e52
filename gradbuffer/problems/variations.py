"""Problems made of other problems' functions: in other coordinates, mirrored, beside a convex term."""

import torch

from gradbuffer.checks import check_count
from gradbuffer.contracts import MetaBatch, Problem, as_problem, kind_of

__all__ = ["ConvexTerms", "Mirrored", "RandomScaling"]


class Variation(Problem):
    """A problem made of another one's functions: what `RandomScaling`, `Mirrored` and `ConvexTerms` share.

    Validation, in `meta_train`, is on the other problem's own functions: they are what the optimizer is for.
    """

    def __init__(self, problem):
        self.problem = as_problem(problem)

    @property
    def device(self):
        return self.problem.device

    def validation_problem(self):
        return self.problem.validation_problem()

    def describe(self):
        return f"{super().describe()} of {self.problem.describe()}"


class RandomScaling(Variation):
    """The same functions in other coordinates: f_c(θ) = f(c ⊙ θ) from θ_0 / c, every c_i drawn anew for each function.

    An optimizer that is trained on these cannot rely on how large the steps of one architecture are, nor on the signs
    of its gradients.

    Args:
        problem: whose functions.
        radius: c_i = e^u with u uniform on ±radius; not negative; 0 for no scaling.
        signs: also give each c_i a random sign.

    Example:
        >>> batch = RandomScaling(Quadratics(), radius=3.0).sample(4)

    Reference: Lv, Jiang and Li 2017 (arXiv 1703.03633), section 4.1; the signs are ours.
    """

    def __init__(self, problem, radius=3.0, signs=False):
        super().__init__(problem)
        if isinstance(radius, bool) or not (isinstance(radius, (int, float)) and 0 <= radius <= 20):
            raise ValueError(f"radius must be a number in [0, 20], got {radius!r}")
        self.radius, self.signs = radius, bool(signs)
        self.options = dict(radius=self.radius, signs=self.signs)
        self.name = f"{self.problem.name or kind_of(self.problem)}, randomly scaled"

    def to(self, device):
        """The same distribution on another device."""
        return RandomScaling(self.problem.to(device), self.radius, self.signs)

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions. Returns `MetaBatch`."""
        batch, scales = self.problem.sample(meta_batch, generator=generator), {}
        for name, tensor in batch.params.items():
            scale = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-1, 1, generator=generator)
            scale = scale.mul_(self.radius).exp_()
            if self.signs:
                scale *= 2 * torch.randint(2, tensor.shape, generator=generator) - 1
            scales[name] = scale.to(tensor.device)
        return scaled_batch(batch, scales)


def scaled_batch(batch, scales):
    """The functions of a meta-batch in coordinates θ / scales."""
    def loss(params, step):
        return batch.loss({name: scales[name] * tensor for name, tensor in params.items()}, step)

    def part(first, last):
        return scaled_batch(batch.part(first, last), {name: scale[first:last] for name, scale in scales.items()})

    scaled = {name: tensor / scales[name] for name, tensor in batch.params.items()}
    return MetaBatch(scaled, loss, part if getattr(batch, "part", None) else None)


class Mirrored(Variation):
    """Every function twice, the second time mirrored: f(θ) from θ_0 and f(-θ) from -θ_0, on the same minibatches.

    Most of the noise in a long window's meta-gradient is in one direction: that of all coordinates drifting together,
    which a function likes or not by chance. An optimizer whose updates change sign with the gradients does not drift,
    and takes the two of a pair along mirrored paths; what they say about drift then cancels. Measured on MNIST networks
    with a window of 50 steps, the noise of the meta-gradient falls from 146 to 5 (benchmarks/noise.py).

    Args:
        problem: whose functions; `sample` then needs an even `meta_batch`, and gives its first half upright.

    Example:
        >>> batch = Mirrored(Quadratics()).sample(4)

    Reference: ours; antithetic sampling of the functions.
    """

    def __init__(self, problem):
        super().__init__(problem)
        self.options = {}
        self.name = f"{self.problem.name or kind_of(self.problem)}, mirrored"

    def to(self, device):
        """The same distribution on another device."""
        return Mirrored(self.problem.to(device))

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions. Returns `MetaBatch`."""
        check_count(meta_batch=meta_batch)
        if meta_batch % 2:
            raise ValueError(f"meta_batch must be even for mirrored pairs, got {meta_batch}")
        batch, pairs = self.problem.sample(meta_batch // 2, generator=generator), meta_batch // 2
        whole = mirrored_batch([(1, pairs, batch), (-1, pairs, batch)])
        if not getattr(batch, "part", None):
            return whole

        def part(first, last):
            ranges = [(1, first, min(last, pairs)), (-1, max(first, pairs) - pairs, last - pairs)]
            return mirrored_batch([(sign, end - start, batch.part(start, end)) for sign, start, end in ranges
                                   if start < end])

        return whole._replace(part=part)


def mirrored_batch(pieces):
    """Meta-batches one after the other, each (sign, functions, meta-batch) in coordinates sign · θ."""
    def loss(params, step):
        losses, start = [], 0
        for sign, functions, batch in pieces:
            own = {name: sign * tensor[start:start + functions] for name, tensor in params.items()}
            losses.append(batch.loss(own, step))
            start += functions
        return torch.cat(losses)

    names = pieces[0][2].params
    return MetaBatch({name: torch.cat([sign * batch.params[name] for sign, _, batch in pieces]) for name in names}, loss)


class ConvexTerms(Variation):
    """The same functions beside an easy one: f(θ) + mean_i (x_i − v_i)², with x_0 and v uniform on [-1, 1].

    Deep networks start with small gradients and little to learn from; the convex term teaches the optimizer, from the
    first window on, to go downhill.

    Args:
        problem: whose functions.
        dim: coordinates of x, positive.

    Example:
        >>> batch = ConvexTerms(Quadratics()).sample(4)

    Reference: Lv, Jiang and Li 2017 (arXiv 1703.03633), section 4.2.
    """

    def __init__(self, problem, dim=20):
        super().__init__(problem)
        check_count(dim=dim)
        self.dim, self.options = dim, dict(dim=dim)
        self.name = f"{self.problem.name or kind_of(self.problem)} and a convex term"

    def to(self, device):
        """The same distribution on another device."""
        return ConvexTerms(self.problem.to(device), self.dim)

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions. Returns `MetaBatch`; x goes by the name "convex"."""
        batch = self.problem.sample(meta_batch, generator=generator)
        if "convex" in batch.params:
            raise ValueError('the problem has a parameter named "convex" already')
        like = next(iter(batch.params.values()))
        start, target = (torch.empty(meta_batch, self.dim, dtype=like.dtype).uniform_(-1, 1, generator=generator)
                         .to(like.device) for _ in range(2))
        return with_convex_term(batch, start, target)


def with_convex_term(batch, start, target):
    """The functions of a meta-batch, each with mean_i (x_i − target_i)² from x = start added to it."""
    def loss(params, step):
        own = {name: tensor for name, tensor in params.items() if name != "convex"}
        return batch.loss(own, step) + (params["convex"] - target).square().mean(1)

    def part(first, last):
        return with_convex_term(batch.part(first, last), start[first:last], target[first:last])

    return MetaBatch({**batch.params, "convex": start}, loss,
                     part if getattr(batch, "part", None) else None)
