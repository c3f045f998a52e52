"""Races of optimizers on tasks, each at its own best rate, and how many times faster one is than another.

All optimizers get the same number of rates, the same initial weights and the same minibatches. A rate is chosen on one
seed and raced on others. Final losses are means over the last tenth of the steps. What the tasks are is not said here:
`gradbuffer.problems.tasks`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradbuffer.checks import NonFiniteError, check_count, check_positive_number

if TYPE_CHECKING:
    from gradbuffer.problems.tasks import Task

__all__ = ["SPANS", "Contestant", "Race", "final", "race", "smooth", "speed", "speed_against", "summary", "train"]

SCHEDULES = ("cosine", "constant")
FACTOR = math.sqrt(10)  # from one rate tried to the next
SPANS = (1 / 3, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 5)  # lengths of the other optimizer's runs, over ours


@dataclass(frozen=True)
class Contestant:
    """An optimizer in a race.

    Args:
        make: function of a list of parameters and a rate that returns a `torch.optim.Optimizer`, or a list of them which
            share the parameters. It is called anew for every training.
        centre: the middle one of the rates that are tried, above 0.
        schedule: "cosine", from the rate down to 0 along half a period, or "constant".

    Example:
        >>> adam = Contestant(lambda params, lr: torch.optim.Adam(params, lr=lr), centre=0.003, schedule="constant")
    """

    make: Callable[[list, float], Any]
    centre: float
    schedule: str = "cosine"

    def __post_init__(self):
        check_positive_number(centre=self.centre)
        check_schedule(self.schedule)

    def rates(self, count: int) -> list[float]:
        """As many rates, from the smallest, each √10 times the one before; the middle one is the centre."""
        return [self.centre * FACTOR ** (k - (count - 1) // 2) for k in range(count)]

    def train(self, task: "Task", rate: float, steps: int, seed: int) -> torch.Tensor:
        """`train` at that rate."""
        return train(task, lambda params: self.make(params, rate), steps, seed, self.schedule)


@dataclass(frozen=True)
class Race:
    """What one contestant did on one task.

    Args:
        rate: the best of those tried.
        tried: dict from rate to the final loss on the seed for tuning.
        curves: (seeds, steps), losses at the best rate.
    """

    rate: float
    tried: dict
    curves: torch.Tensor

    @property
    def ends(self) -> torch.Tensor:
        """Final losses (seeds,)."""
        return final(self.curves)

    @property
    def mean(self) -> float:
        """Of the final losses; inf where one is."""
        return self.ends.mean().item()

    @property
    def error(self) -> float:
        """Standard error of that mean; NaN for a single seed or where a loss is infinite."""
        return (self.ends.std() / math.sqrt(len(self.ends))).item() if len(self.ends) > 1 else math.nan

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or the largest tried, so that others might be better."""
        return self.rate in (min(self.tried), max(self.tried))

    @property
    def failures(self) -> int:
        """How many seeds ended with a loss that is not finite, or above the loss at their start."""
        return int((~(self.ends <= self.curves[:, 0])).sum())


def check_schedule(schedule):
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")


def train(
    task: "Task", make_optimizer: Callable[[list], Any], steps: int, seed: int, schedule: str = "cosine"
) -> torch.Tensor:
    """Train a task's model, and never raise because it diverges.

    Args:
        task: a `gradbuffer.problems.tasks.Task`.
        make_optimizer: function of the list of parameters that returns a `torch.optim.Optimizer`, or a list of them.
        steps: at least 1.
        seed: of the initial weights and of the minibatches. The global generator is as before afterwards.
        schedule: of the rates in the optimizers' groups: "cosine", times (1 + cos(π t / steps)) / 2, or "constant".

    Returns:
        losses (steps,) before each step, on the CPU, without a graph; from the first that is not finite on they are inf.

    Raises:
        ValueError: an argument is not as said.
    """
    check_count(steps=steps)
    check_schedule(schedule)
    losses = torch.full((steps,), math.inf)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model, generator = task.make_model(), torch.Generator().manual_seed(seed)
        optimizers = make_optimizer(list(model.parameters()))
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
        for t in range(steps):
            if schedule == "cosine":
                for group, rate in rates:
                    group["lr"] = rate * (1 + math.cos(math.pi * t / steps)) / 2
            loss = task.loss(model, task.draw(generator))
            if not math.isfinite(loss.item()):
                break
            losses[t] = loss.item()
            model.zero_grad()
            loss.backward()
            try:
                for optimizer in optimizers:
                    optimizer.step()
            except NonFiniteError:
                break
    return losses


def final(curves: torch.Tensor) -> torch.Tensor:
    """Means over the last tenth, at least one step: (..., steps) -> (...)."""
    steps = curves.shape[-1]
    return curves[..., -max(steps // 10, 1) :].mean(-1)


def smooth(curves: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Means over the `width` steps up to each, fewer at the start, of curves (..., steps). Default: a tenth of all."""
    steps = curves.shape[-1]
    width = max(steps // 10, 1) if width is None else width
    return torch.stack([curves[..., max(t + 1 - width, 0) : t + 1].mean(-1) for t in range(steps)], -1)


def race(
    tasks: dict[str, "Task"],
    contestants: dict[str, Contestant],
    rates: int = 5,
    steps: int = 500,
    seeds: Sequence[int] = range(5),
    tuning_seed: int = 1000,
    progress: Callable[[str], Any] | None = None,
) -> dict[str, dict[str, Race]]:
    """Every contestant on every task: a rate chosen on one seed, then trained at it on others.

    Args:
        tasks: dict from name to `gradbuffer.problems.tasks.Task`.
        contestants: dict from name to `Contestant`.
        rates: how many each of them tries, around its own centre. The best has the lowest final loss; if none is finite,
            it is the smallest rate.
        steps: of every training.
        seeds: of the race, ints; the same initial weights and minibatches for all contestants.
        tuning_seed: not among `seeds`.
        progress: function that is given a line of text after each contestant, or None.

    Returns:
        dict from task to a dict from contestant to its `Race`.

    Raises:
        ValueError: `tuning_seed` is among `seeds`, or there are no seeds.
    """
    check_count(rates=rates, steps=steps)
    seeds = list(seeds)
    if not seeds or tuning_seed in seeds:
        raise ValueError(f"seeds must be at least one, and others than tuning_seed, got {seeds} and {tuning_seed}")
    results = {}
    for task_name, task in tasks.items():
        results[task_name] = {}
        for name, contestant in contestants.items():
            tried = {
                rate: final(contestant.train(task, rate, steps, tuning_seed)).item() for rate in contestant.rates(rates)
            }
            best = min(tried, key=tried.get)
            curves = torch.stack([contestant.train(task, best, steps, seed) for seed in seeds])
            results[task_name][name] = one = Race(best, tried, curves)
            if progress:
                progress(f"{task_name}, {name}: {one.mean:.4g} at {best:.2g}")
    return results


def speed(loss: float, ends: dict[int, float], steps: int) -> float:
    """How many times more steps another optimizer needs to end as low as we did.

    What the other would need lies between two of its runs, of which one ended above our loss and the next longer one did
    not. We take it from a straight line between them, of the loss over the logarithm of the number of steps. Nothing is
    extrapolated. If its longest run ended above our loss, the result is that run's length over ours, and the truth is at
    least that; if its shortest one did not, it is that one's, and the truth is at most that.

    Args:
        loss: our final loss after `steps` steps; one that is not finite counts as reached by every run.
        ends: dict from number of steps to the other's final loss in a run of that many (with a schedule of its own
            length); a loss that is not finite has reached nothing.
        steps: our number of steps.

    Returns:
        a number; above 1 we are faster.

    Example:
        >>> speed(0.5, {100: 1.0, 200: 0.75, 400: 0.25}, steps=100)  # half-way from 200 to 400 steps: 2 · √2
        2.82...
    """
    if not math.isfinite(loss):
        return min(ends) / steps
    before = None
    for length in sorted(ends):
        end = ends[length] if math.isfinite(ends[length]) else math.inf
        if end <= loss:
            if before is None or not math.isfinite(ends[before]):
                return length / steps
            share = (ends[before] - loss) / (ends[before] - end)
            return before / steps * (length / before) ** share
        before = length
    return before / steps


def speed_against(
    task: "Task",
    ours: Race,
    contestant: Contestant,
    other: Race,
    seeds: Sequence[int],
    longer: dict[int, float] | None = None,
) -> float:
    """`speed` of one race's result against another contestant, which is trained for more or fewer steps as needed.

    Its runs are 1/3, 1/2, 3/4, 1, 3/2, 2, 3 and 5 times as long as ours (`SPANS`), at the rate that was best for the
    length of ours, with the schedule stretched along. Beginning at 1 it is trained for longer, or for less, only until
    our loss lies between two runs. The result lies between 1/3 and 5, and these two say "at most" and "at least". Losses
    are means over the seeds; where one of ours failed (`Race.failures`), the result is 1/3.

    Args:
        task: the `gradbuffer.problems.tasks.Task`.
        ours: our `Race`.
        contestant: the other `Contestant`.
        other: its `Race` on the same task and seeds.
        seeds: of both.
        longer: dict from number of steps to final loss, of runs of the other that were made before; more are added.
            Default: none.

    Returns:
        a number; above 1 we are faster.
    """
    steps, longer = ours.curves.shape[1], {} if longer is None else longer
    lengths = [max(round(steps * span), 1) for span in SPANS]
    if ours.failures:
        return lengths[0] / steps
    longer[steps] = other.mean

    def run(length):
        return torch.stack([contestant.train(task, other.rate, length, seed) for seed in seeds])

    def reached(length):
        if length not in longer and contestant.schedule == "constant":  # shorter runs are the beginnings of the longest
            longest = run(lengths[-1])
            longer.update((some, final(longest[:, :some]).mean().item()) for some in lengths if some != steps)
        elif length not in longer:
            longer[length] = final(run(length)).mean().item()
        return longer[length] <= ours.mean

    middle = SPANS.index(1)
    last = middle
    while reached(lengths[last]) == reached(steps):
        further = last + (-1 if reached(steps) else 1)
        if not 0 <= further < len(lengths):
            break
        last = further
    among = lengths[min(middle, last) : max(middle, last) + 1]
    return speed(ours.mean, {length: longer[length] for length in among}, steps)


def summary(speeds: Sequence[float]) -> dict[str, float]:
    """Of one optimizer over tasks.

    Args:
        speeds: list of `speed` for each task, at least one.

    Returns:
        dict of "geometric mean", "interquartile mean" (without the lowest and the highest quarter, each rounded down),
        "worst" and "share above 1".

    Raises:
        ValueError: there are no speeds.
    """
    if not speeds:
        raise ValueError("speeds must hold at least one number, got none")
    ordered = sorted(speeds)
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return {
        "geometric mean": math.exp(sum(map(math.log, ordered)) / len(ordered)),
        "interquartile mean": sum(middle) / len(middle),
        "worst": ordered[0],
        "share above 1": sum(value > 1 for value in ordered) / len(ordered),
    }
