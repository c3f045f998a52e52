"""Loss curves of learned and hand-designed optimizers on the same functions, and the search of learning rates.

The protocol of Andrychowicz et al. 2016 (arXiv 1606.04474), section 3: hand-designed optimizers get the learning rate
with the lowest final loss, and one seed gives every optimizer the same functions, initial points and minibatches.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from gradbuffer.checks import check_count, check_finite, values_unchecked
from gradbuffer.contracts import Problem, as_loss, as_rule, device_of, repack
from gradbuffer.evaluation.drawing import draw_batches, join_for
from gradbuffer.unrolling import Coordinates, in_place

__all__ = [
    "BASELINES",
    "TunedBaseline",
    "check_baseline",
    "compare",
    "compare_final",
    "evaluate",
    "evaluate_baseline",
    "learned_rule",
    "torch_rule",
    "tune_baseline",
    "tune_baselines",
]

BASELINES = {
    "SGD": (torch.optim.SGD, {}),
    "SGD + momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "NAG": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
}
"""Hand-designed optimizers to compare with: name -> (class, options other than the learning rate)."""


def evaluate(
    net: torch.nn.Module,
    problem: Problem,
    steps: int = 100,
    num_functions: int = 100,
    seed: int = 1,
    device: torch.device | str | None = None,
    watch: Callable | None = None,
) -> torch.Tensor:
    """Loss curves of a learned optimizer. No graph is recorded.

    Args:
        net: the learned optimizer.
        problem: distribution of optimizees.
        steps: length of the curves; `steps - 1` updates are made.
        num_functions: how many functions are drawn.
        seed: the same seed and number of functions give every optimizer, learned or not, the same functions, initial
            points and minibatches.
        device: default where `net` is.
        watch: called as watch(step, params) at every step, before its update, with the parameters (B, ...) of the
            functions that run together (as many as fit: all functions go by in such groups, one after the other). They
            are changed in place later on, and carry no graph.

    Returns:
        (num_functions, steps) on the CPU: losses[:, t] is f(θ_t), so column 0 is the loss before any update.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> losses = evaluate(CoordinatewiseLSTM(), Quadratics(), steps=10, num_functions=4)
    """
    device = device_of(net, device)
    with torch.no_grad():
        return loss_curves(learned_rule(net), problem, steps, num_functions, seed, device, watch, must_be_finite=True)


def evaluate_baseline(
    optimizer: type[torch.optim.Optimizer],
    options: dict,
    problem: Problem,
    steps: int = 100,
    num_functions: int = 100,
    seed: int = 1,
    device: torch.device | str = "cpu",
    watch: Callable | None = None,
) -> torch.Tensor:
    """Loss curves of a hand-designed optimizer, on the very functions that `evaluate` uses for that seed.

    The functions of a meta-batch are optimized side by side as one vector, so the optimizer must treat every
    coordinate by itself, as SGD, Adam, RMSprop and most others do (those that take a closure, such as L-BFGS, do not).

    Args:
        optimizer: class of a `torch.optim.Optimizer`.
        options: its keyword arguments, `lr` among them.
        problem, steps, num_functions, seed, device, watch: see `evaluate`.

    Returns:
        (num_functions, steps) on the CPU. Functions that diverge have infinite or NaN losses.

    Example:
        >>> from optimizees import Quadratics
        >>> losses = evaluate_baseline(torch.optim.Adam, {"lr": 0.1}, Quadratics(), steps=10, num_functions=4)
    """
    check_baseline(optimizer, options)
    return loss_curves(torch_rule(optimizer, options), problem, steps, num_functions, seed, torch.device(device), watch)


def check_baseline(
    optimizer: type[torch.optim.Optimizer], options: dict, names: tuple[str, str] = ("optimizer", "options")
) -> None:
    """Raise unless it is a class of `torch.optim` that treats coordinates by themselves, and a dict of its options."""
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise TypeError(f"{names[0]} must be a class of torch.optim.Optimizer, got {optimizer!r}")
    if inspect.signature(optimizer.step).parameters.get("closure", inspect.Parameter("closure", 1)).default is not None:
        raise ValueError(f"{optimizer.__name__} needs a closure and does not treat coordinates by themselves")
    if not isinstance(options, dict):
        raise TypeError(f'{names[1]} must be a dict such as {{"lr": 0.1}}, got {options!r}')


def learned_rule(net: torch.nn.Module) -> Callable:
    """begin(theta, coordinates) -> advance(gradient, losses, step), which changes theta (N,), in which parameters lie as `Coordinates`
    say. No graph."""

    def begin(theta: torch.Tensor, coordinates=None):
        coordinates = coordinates or Coordinates({"theta": theta[None]})
        repack(net)  # where a device would have to be waited for, a network does not look itself
        rule = as_rule(net, coordinates)
        state = rule.init_state(theta.numel())
        take = in_place(rule, state) if rule.overwrites else rule

        @torch.no_grad()
        def advance(gradient, losses: torch.Tensor | None = None, step: int = 0):
            nonlocal state
            # θ moves in place, and a network may keep what it read
            params = theta.clone() if "params" in rule.reads else theta
            update, state = take(gradient, state, **coordinates.what(rule.reads, params, losses, step))
            theta.add_(update)

        return advance

    return begin


def torch_rule(optimizer: type[torch.optim.Optimizer], options: dict) -> Callable:
    """The same of a class of `torch.optim`."""

    def begin(theta: torch.Tensor, coordinates=None):
        steps = optimizer([theta], **options)

        def advance(gradient, losses: torch.Tensor | None = None, step: int = 0):
            theta.grad = gradient
            steps.step()

        return advance

    return begin


def loss_curves(
    rule,
    problem: Problem,
    steps: int,
    num_functions: int,
    seed: int,
    device: torch.device | str | None,
    watch: Callable | None = None,
    must_be_finite: bool = False,
):
    """Curves (num_functions, steps) of a rule, begun anew for each meta-batch; `watch` as in `evaluate`.

    must_be_finite: gradients must be. A learned optimizer looks at each on a CPU; elsewhere that is done here, with one wait.
    """
    check_count(steps=steps)
    curves = []
    for batch in join_for(device, draw_batches(problem, num_functions, seed, device)):
        coordinates = Coordinates(batch.params)
        theta, loss = coordinates.join(batch.params).detach().clone(), as_loss(batch.loss)
        advance, losses, sums = rule(theta, coordinates), [], []
        with contextlib.nullcontext() if theta.is_cpu else values_unchecked():
            for step in range(steps):
                if watch is not None:
                    watch(step, coordinates.split(theta.detach()))
                values, gradient = coordinates.losses_and_gradient(loss, theta, step)
                losses.append(values)
                if step + 1 < steps:
                    advance(gradient, values, step)
                    if must_be_finite and not theta.is_cpu:
                        sums.append(gradient.sum())
        if sums:
            check_finite(torch.stack(sums), "the gradient's sum, a coordinate for each step,")
        curves.append(torch.stack(losses, 1))
    return torch.cat(curves).cpu()


@dataclass
class TunedBaseline:
    """A hand-designed optimizer with the learning rate that `tune_baseline` found."""

    optimizer: type
    options: dict  # `lr` included: what `evaluate_baseline` takes
    final_losses: dict  # learning rate -> mean final loss (infinite if a function diverged), the whole search
    steps: int | None = None  # of each run of the search
    last: int = 1  # how many of them, the last ones, the final loss is the mean of
    num_functions: int | None = None  # in each run of the search

    @property
    def judged_by(self) -> str:
        """In words, what its learning rate is the best for; empty if that is not known."""
        if self.steps is None:
            return ""
        functions = f"{self.num_functions} other function{'s' if self.num_functions != 1 else ''}"
        if self.last == self.steps:
            return f"the lowest sum of the loss over {self.steps} steps on {functions}"
        span = f"step {self.steps - 1}" if self.last == 1 else f"the steps {self.steps - self.last} to {self.steps - 1}"
        return f"the lowest loss at {span} on {functions}"

    def evaluate(
        self,
        problem: Problem,
        steps: int = 100,
        num_functions: int = 100,
        seed: int = 1,
        device: torch.device | str = "cpu",
        watch: Callable | None = None,
    ) -> torch.Tensor:
        """`evaluate_baseline` with these options."""
        return evaluate_baseline(self.optimizer, self.options, problem, steps, num_functions, seed, device, watch)


def tune_baseline(
    optimizer: type[torch.optim.Optimizer],
    problem: Problem,
    lrs: list[float] | None = None,
    steps: int = 100,
    num_functions: int = 32,
    seed: int = 0,
    *,
    options: dict | None = None,
    device: torch.device | str = "cpu",
    last: int = 1,
) -> TunedBaseline:
    """Search the learning rate of a hand-designed optimizer: the lowest mean loss at the last step (or steps).

    The grid grows by itself until the best learning rate does not lie at its edge; the gaps on both sides of the best
    are then searched once more at their thirds. Tune on other functions than those reported: another seed, and a
    problem over other data (`MNISTNet(split="validation")`).

    Args:
        optimizer: class of a `torch.optim.Optimizer`.
        problem, steps, num_functions, seed, device: see `evaluate`.
        lrs: at least three positive learning rates; default 10^-4 … 10, two per decade (six around the best).
        options: its other keyword arguments, such as {"momentum": 0.9}; default none.
        last: how many of the last steps the final loss is the mean of, 1 to `steps`. More of them are less noisy where
            losses are those of minibatches; last=steps tunes for the sum of the loss. Default 1.

    Returns:
        `TunedBaseline`, whose `judged_by` says in words what it was tuned for.

    Raises:
        ValueError: an argument is not as above, or no learning rate gave a finite loss.

    Example:
        >>> from optimizees import Quadratics
        >>> best = tune_baseline(torch.optim.Adam, Quadratics(), lrs=[0.01, 0.1, 1.0], steps=10, num_functions=4)
        >>> losses = best.evaluate(Quadratics(), steps=10, num_functions=4)
    """
    lrs = [10 ** (k / 2) for k in range(-8, 3)] if lrs is None else sorted(float(lr) for lr in lrs)
    if len(lrs) < 3 or not 0 < lrs[0] <= lrs[-1] < math.inf:
        raise ValueError(f"lrs must be at least three positive learning rates, got {lrs}")
    check_last(last, steps)
    options, final = options or {}, {}

    def search(rates):
        for lr in rates:
            losses = evaluate_baseline(optimizer, {**options, "lr": lr}, problem, steps, num_functions, seed, device)
            loss = losses[:, -last:].mean().item()
            final[lr] = loss if math.isfinite(loss) else math.inf
        best = min(final, key=final.get)
        if final[best] == math.inf:
            raise ValueError(f"no learning rate of {sorted(final)} gave a finite loss with {optimizer.__name__}")
        return best

    best, factor = search(lrs), (lrs[-1] / lrs[0]) ** (1 / (len(lrs) - 1))
    while best in (min(final), max(final)) and 1e-10 < best < 1e6:
        best = search([best / factor if best == min(final) else best * factor])
    rates = sorted(final)
    place = rates.index(best)
    gaps = list(zip(rates, rates[1:]))[max(place - 1, 0) : place + 1]
    best = search([low * (high / low) ** third for low, high in gaps for third in (1 / 3, 2 / 3)])
    return TunedBaseline(optimizer, {**options, "lr": best}, dict(sorted(final.items())), steps, last, num_functions)


def tune_baselines(
    problem: Problem,
    steps: int = 100,
    num_functions: int = 32,
    seed: int = 0,
    *,
    baselines: dict[str, tuple] = BASELINES,
    lrs: list[float] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    last: int = 1,
) -> dict[str, TunedBaseline]:
    """`tune_baseline` for each of `BASELINES` (or a user's own dict like it). Returns a dict from name to result."""
    tuned = {}
    for name in (bar := tqdm(baselines, desc="tuning", disable=not progress)):
        bar.set_postfix_str(name)
        optimizer, options = baselines[name]
        tuned[name] = tune_baseline(
            optimizer, problem, lrs, steps, num_functions, seed, options=options, device=device, last=last
        )
    return tuned


def check_last(last: int, steps: int):
    check_count(last=last, steps=steps)
    if last > steps:
        raise ValueError(f"last must be at most steps = {steps}, got {last}")


def compare(
    nets: dict[str, torch.nn.Module],
    tuned: dict[str, TunedBaseline],
    problem: Problem,
    steps: int = 100,
    num_functions: int = 100,
    seed: int = 1,
    device: torch.device | str | None = None,
    progress: bool = True,
    watch: Callable | None = None,
) -> dict[str, torch.Tensor]:
    """Loss curves of learned optimizers and tuned baselines, all on the same functions and minibatches.

    Args:
        nets: dict from name to learned optimizer.
        tuned: dict from name to `TunedBaseline`, as `tune_baselines` returns it.
        problem, steps, num_functions, seed: see `evaluate`.
        device: default where each network is; the baselines run where the first network does.
        progress: show a bar.
        watch: called as watch(name, step, params), see `evaluate`; `AccuracyCurves` is one.

    Returns:
        dict from name to losses (num_functions, steps), on the CPU.
    """
    curves = {}
    for name in (bar := tqdm([*nets, *tuned], desc="comparing", disable=not progress)):
        bar.set_postfix_str(name)
        own = watch and functools.partial(watch, name)
        if name in nets:
            curves[name] = evaluate(nets[name], problem, steps, num_functions, seed, device, own)
        else:
            where = device_of(next(iter(nets.values())), device) if nets else device or "cpu"
            curves[name] = tuned[name].evaluate(problem, steps, num_functions, seed, where, own)
    return curves


def compare_final(
    nets: dict[str, torch.nn.Module],
    problems: dict,
    steps: int = 100,
    num_functions: int = 100,
    seed: int = 1,
    *,
    last: int = 10,
    baselines: dict[str, tuple] = BASELINES,
    tuning_functions: int = 32,
    tuning_seed: int = 0,
    lrs: list[float] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict:
    """Final losses of learned optimizers and of baselines on several problems, the baselines tuned anew for each.

    Every optimizer gets the same functions and minibatches of a problem. Baselines are tuned for what is reported, the
    mean loss over the last steps.

    Args:
        nets: dict from name to learned optimizer.
        problems: dict from any key to a pair of problems: one to tune the baselines on, one to test on. Such as
            {(20,): (MNISTNet((20,), split="validation"), MNISTNet((20,), split="test"))}, keyed as for `plot_sizes`.
        steps, num_functions, seed: of the test, see `evaluate`.
        last: how many of the last steps a final loss is the mean of, 1 to `steps`. Default 10.
        baselines: a dict like `BASELINES`, the default; may be empty.
        tuning_functions, tuning_seed, lrs: `num_functions`, `seed` and `lrs` of `tune_baseline`.
        device: as in `compare`.
        progress: show a bar.

    Returns:
        dict from key to a dict from name to final losses (num_functions,), on the CPU. Functions that diverge have
        infinite or NaN losses.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> problems = {dim: (Quadratics(dim), Quadratics(dim)) for dim in (2, 5)}
        >>> finals = compare_final({"LSTM": CoordinatewiseLSTM()}, problems, steps=20, num_functions=8, progress=False)
        >>> finals[5].get("Adam").shape
        torch.Size([8])

    Reference: Andrychowicz et al. 2016, figure 6.
    """
    check_last(last, steps)
    for key, pair in problems.items():
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"problems[{key!r}] must be a pair of problems, to tune on and to test on, got {pair!r}")
    where = device_of(next(iter(nets.values())), device) if nets else device or "cpu"
    finals = {}
    for key in (bar := tqdm(problems, desc="problems", disable=not progress)):
        bar.set_postfix_str(str(key))
        tuning, test = problems[key]
        tuned = tune_baselines(
            tuning,
            steps,
            tuning_functions,
            tuning_seed,
            baselines=baselines,
            lrs=lrs,
            device=where,
            progress=False,
            last=last,
        )
        curves = compare(nets, tuned, test, steps, num_functions, seed, device, progress=False)
        finals[key] = {name: losses[:, -last:].mean(1) for name, losses in curves.items()}
    return finals
