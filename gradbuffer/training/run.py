"""A meta-training run: what changes from window to window, how it goes on, and how it is saved and restored.

Its options are `options.Training`; `meta_training.meta_train` is the door to it.
"""

import contextlib
import copy
import math
import sys
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from gradbuffer.checks import NonFiniteError, check_count, values_unchecked
from gradbuffer.contracts import Problem, as_problem, as_rule, part_of
from gradbuffer.evaluation import evaluate
from gradbuffer.training.checkpoints import named_tuples, plain, read_checkpoint, regroup, unplain, write_checkpoint
from gradbuffer.training.cuda_graphs import CapturedWindow
from gradbuffer.training.evolution import PES, PESState
from gradbuffer.training.imitation import imitation_gradient
from gradbuffer.training.meta_gradients import Replay, WindowInfo, check_window, meta_gradient
from gradbuffer.training.options import Curriculum, Training
from gradbuffer.training.ranks import Ranks
from gradbuffer.unrolling import Coordinates, trained

__all__ = ["History", "Run"]

VALIDATION_SEED = 1_000_003  # added to the seed of a run, so that its validation functions are not its training ones
MOST_CAPTURED = 1 << 20  # coordinates up to which windows are CUDA graphs of themselves: beyond, a GPU has enough to do
KEPT_CAPTURES = 8  # shapes of windows


@dataclass
class History:
    """What happened in a meta-training run.

    Lists of one number for each iteration k; NaN in all but `lr` where the window was skipped:

    - `meta_loss`: the window's loss, mean over functions and the window's steps; along the teacher's way in imitation;
    - `grad_norm`: the norm of the meta-gradient before clipping;
    - `lr`: the meta-learning rate;
    - `update_size`: how far the window took the optimizees, ‖θ_T - θ_0‖ / max(‖θ_0‖, ‖θ_T‖), all functions as one
      vector: near 0 where they stand still, 1 where the step is as large as what it leads to, up to 2.

    `validation` holds pairs (iteration, sum of the loss over the steps, mean over the validation functions), infinite
    where a function diverged; `best_iteration` is the one whose optimizer was kept (0: the one training began with).
    `skipped` holds a pair (iteration, cause) for each window that was skipped because something was not finite.
    `interrupted` says that Ctrl-C ended the run. `imitation` holds a pair (iteration, imitation loss) for each window
    that imitated a teacher.

    With `EpisodicES` `signal_to_noise` holds a number for each iteration, the norm of the meta-gradient over its standard error, which
    the pairs tell: 1 and less is noise. `validation` begins with the weights that training begins with, at iteration 0; its scores are
    as that class says. `update_size` is that of all particles.

    With a curriculum `stages` holds a pair for each stage reached: (iterations done when it began, its horizon). Scores
    are over the horizon of their stage. A stage but the first begins with the score of the weights it begins with, and
    `best_iteration` and `best_validation` are those of the last stage. Without a curriculum `stages` is empty.
    """

    meta_loss: list = field(default_factory=list)
    grad_norm: list = field(default_factory=list)
    lr: list = field(default_factory=list)
    validation: list = field(default_factory=list)
    best_iteration: int = 0
    best_validation: float = math.inf
    update_size: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    interrupted: bool = False
    stages: list = field(default_factory=list)
    imitation: list = field(default_factory=list)
    signal_to_noise: list = field(default_factory=list)


class Functions:
    """A meta-batch on its way: where its functions are, and what moves them."""

    def __init__(self, net, batch, family, teacher):
        coordinates = Coordinates(batch.params)
        self.batch, self.params, self.family = batch, batch.params, family
        self.state = as_rule(net, coordinates).init_state(sum(coordinates.sizes))
        self.demonstration = teacher and teacher.begin(batch.params)

    def carried(self):
        """What it takes to go on: params, and the state, that of the teacher beside it if there is one."""
        return self.params, self.state if self.demonstration is None else (self.state, self.demonstration.state_dict())

    def carry_on(self, params, state):
        if self.demonstration is not None:
            state, taught = state
            self.demonstration.go_on(params, taught)
        device = next(iter(self.params.values())).device
        self.params, self.state = unplain((params, state), device, [PESState, *named_tuples(self.state)])


class Run:
    """A meta-training run: what changes from window to window, how it goes on, and how it is saved and restored."""

    def __init__(self, net: nn.Module, problem: Problem, options: Training):
        self.net, self.problem, self.options = net, problem, options
        self.validation, self.settings = as_problem(problem.validation_problem()), options.describe(net, problem)
        self.ranks = Ranks()
        self.first, self.last = self.ranks.share(options.meta_batch)
        self.trained = trained(as_rule(net))
        parameters = list(self.trained.values())
        self.on_cpu = all(parameter.is_cpu for parameter in parameters)
        # a device is waited for once an iteration, where nothing must be known earlier
        self.looks_late = not self.on_cpu and self.ranks.size == 1 and not options.balance
        fused = None if self.on_cpu else True
        make = options.meta_optimizer or (lambda params: torch.optim.Adam(params, lr=options.lr, fused=fused))
        self.adam = make(parameters)
        self.rates = [group["lr"] for group in self.adam.param_groups]
        self.generator = torch.Generator().manual_seed(options.seed)
        stages = options.horizon.curriculum if isinstance(options.horizon, Curriculum) else ()
        self.curriculum = (*stages, options.steps)
        self.history, self.iteration, self.best = History(), 0, copy.deepcopy(net.state_dict())
        self.start = self.best  # what training begins with
        if stages:
            self.history.stages.append((0, stages[0]))
        self.averaged = copy.deepcopy(net) if options.averaging else net
        self.captured = []  # windows as CUDA graphs, of several shapes
        self.graphs_fail = False  # where they were not asked for: whether one could not be captured
        self.sizes = {}  # running mean squares of meta-gradients, by the place of their problem in a mixture
        self.functions, self.draws = None, 0  # those in hand (None: to be drawn), how many draws there were

    @property
    def steps(self) -> int:
        """The present horizon."""
        return self.history.stages[-1][1] if self.history.stages else self.options.steps

    def draw(self) -> None:
        """New functions. What it takes to draw these again is kept."""
        self.drawn_from, self.drawn_at = self.random_state(), self.iteration
        self.windows = self.options.windows(self.iteration, self.generator)
        if self.history.stages:
            self.windows = self.steps // self.options.unroll
        check_count(horizons=self.windows)
        batches, teacher = self.problem.sample(self.options.meta_batch, generator=self.generator), self.options.teacher
        self.imitates = teacher is not None and teacher.comes(self.draws)
        self.functions, self.step = [], 0
        for batch in batches if isinstance(batches, list) else [batches]:
            own = batch if self.ranks.size == 1 else part_of(batch, self.first, self.last)
            family = batch.family if isinstance(batches, list) else 0
            self.functions.append(Functions(self.net, own, family, teacher if self.imitates else None))
        self.draws += 1

    def advance(self) -> None:
        """One iteration: a window and the meta-update by its meta-gradient, or the note that it was skipped."""
        options, history = self.options, self.history
        factor = (options.schedule or self.schedule)(self.iteration, options.iterations)
        try:
            grads, figures = self.window()
            norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads.values()]))
            norm, meta_loss, *squares, imitation = numbers_of([norm, *figures])
            if not (math.isfinite(norm) and math.isfinite(meta_loss)):
                self.check_windows()
                raise NonFiniteError(f"the norm of the meta-gradient is {norm}")
        except NonFiniteError as error:
            self.skip(error)
            meta_loss = norm = update_size = math.nan
        else:
            change, before, after = (square**0.5 for square in squares)
            update_size = change / max(before, after, sys.float_info.min)
            clipped = min(1.0, options.clip / (norm + 1e-12)) if options.clip else 1.0
            for name, parameter in self.trained.items():
                parameter.grad = grads[name] * clipped
            for group, rate in zip(self.adam.param_groups, self.rates):
                group["lr"] = factor * rate
            self.adam.step()
            self.adam.zero_grad()
            self.average()
            if self.imitates:
                history.imitation.append((self.iteration, imitation))
        for record, value in (
            (history.meta_loss, meta_loss),
            (history.grad_norm, norm),
            (history.lr, factor * self.rates[0]),
            (history.update_size, update_size),
        ):
            record.append(value)
        self.iteration += 1

    def schedule(self, iteration: int, iterations: int) -> float:
        """A linear warm-up, then half a cosine down to 0."""
        return (
            min(1.0, (iteration + 1) / (self.options.warmup + 1))
            * 0.5
            * (1 + math.cos(math.pi * iteration / iterations))
        )

    @torch.no_grad()
    def average(self) -> None:
        if self.averaged is not self.net:
            kept = min(self.options.averaging, self.iteration / (self.iteration + 10))
            for average, now in zip(self.averaged.parameters(), self.net.parameters()):
                average.lerp_(now, 1 - kept)

    def window(self) -> tuple[dict[str, torch.Tensor], list]:
        """The next window's meta-gradient, and [meta-loss, squares of ‖θ_T - θ_0‖, ‖θ_0‖, ‖θ_T‖, imitation loss]: numbers, or
        where we look late tensors, and nothing has been checked."""
        if self.functions is None:
            self.draw()
        share = (self.last - self.first) / self.options.meta_batch
        grads = figures = failure = None
        self.unchecked = []
        try:
            found = {functions.family: self.window_of(functions) for functions in self.functions}
        except NonFiniteError as error:
            failure = error
        else:
            grads = {(family, name): grad * share for family in found for name, grad in found[family][0].items()}
            loss, *squares, imitation = (sum(figures) for figures in zip(*(figures for _, figures in found.values())))
            figures = [loss / len(found) * share, *squares, imitation * share]
            self.step += self.options.unroll
            if self.step >= self.windows * self.options.unroll:
                self.functions = None
        grads, figures = self.ranks.sum(grads, figures, failure)
        factors = {family: self.balance(family, grads) for family in dict.fromkeys(family for family, _ in grads)}
        return {
            name: sum(grads[family, name] * factor for family, factor in factors.items()) for name in self.trained
        }, figures

    def balance(self, family: int, grads: dict[tuple[int, str], torch.Tensor]) -> float:
        """The factor on the meta-gradient of a mixture's problem that makes it count as much as the others' do."""
        if not self.options.balance:
            return 1.0
        square = sum(grads[family, name].square().sum().item() for name in self.trained)
        self.sizes[family] = 0.99 * self.sizes.get(family, square) + 0.01 * square
        return 1 / (self.sizes[family] ** 0.5 + 1e-12)

    def check_windows(self) -> None:
        """Raise NonFiniteError if it can be said what is not finite in the windows that nobody has looked at yet."""
        for functions in self.unchecked:
            check_window(*functions, self.options.method.objective)

    def window_of(self, functions: Functions) -> tuple[dict[str, torch.Tensor], list]:
        """The same of one meta-batch, which goes on."""
        start, unroll = functions.params, self.options.unroll
        if functions.demonstration is not None:
            grads, info = imitation_gradient(
                self.net,
                functions.batch,
                functions.demonstration,
                functions.state,
                self.step,
                unroll,
                self.options.teacher.weight,
                replay_fraction_of(self.options.method),
                self.window_generator(functions.family),
            )
        else:
            with values_unchecked() if self.looks_late else contextlib.nullcontext():
                grads, info = self.meta_gradient(functions)
            self.unchecked += [(grads, info.losses, self.step)] * self.looks_late
        functions.params, functions.state = info.params, info.state
        imitation = 0.0 if functions.demonstration is None else info.imitation
        figures = [info.losses.mean(), *norms_of_change(start, info.params), imitation]
        loss, *norms, imitation = figures if self.looks_late else numbers_of(figures)
        return grads, [loss, *(norm * norm for norm in norms), imitation]

    def meta_gradient(self, functions: Functions) -> tuple[dict[str, torch.Tensor], WindowInfo]:
        window = (functions.batch, functions.params, functions.state)
        captured = self.captured_window(window)
        if captured is not None:
            return captured(*window, self.step)
        return meta_gradient(
            self.net,
            *window,
            self.step,
            self.options.unroll,
            self.options.method,
            weights=self.options.weights_at(self.step),
            generator=self.window_generator(functions.family),
        )

    def captured_window(self, window: tuple) -> CapturedWindow | None:
        """The CUDA graph of windows of such shapes, where they are taken."""
        asked, params = self.options.cuda_graph, window[1].values()
        if asked is None:
            small = sum(tensor.numel() for tensor in params) <= MOST_CAPTURED
            asked = small and not self.graphs_fail and self.options.can_be_captured and all(p.is_cuda for p in params)
        if not asked:
            return None
        try:
            for captured in self.captured:
                if captured.fits(*window, self.step):
                    return captured
            made = CapturedWindow(self.net, *window, self.options.unroll, self.options.method.objective)
        except (RuntimeError, ValueError) as error:
            if self.options.cuda_graph:
                raise
            self.graphs_fail = True
            if isinstance(error, RuntimeError):  # a loss that does not say what it reads is no surprise
                warnings.warn(f"windows are not launched as CUDA graphs: {error}", stacklevel=2)
            return None
        self.captured = [made, *self.captured[: KEPT_CAPTURES - 1]]
        return made

    def window_generator(self, family: int) -> torch.Generator:
        """For what the meta-gradient draws: a generator of its own, so that the functions depend on the seed alone."""
        number = (self.options.seed * 1_000_003 + self.iteration) * self.ranks.size + self.ranks.rank
        number += family * 2_654_435_769  # spreads over the 32 bits that torch reads of a seed
        return torch.Generator().manual_seed(number % 2**63)

    def skip(self, error: NonFiniteError) -> None:
        """Note a window that was not finite, and draw other functions; raise if there have been too many."""
        skipped, before = self.history.skipped, 0
        while before < len(skipped) and skipped[-1 - before][0] == self.iteration - 1 - before:
            before += 1
        if before >= self.options.skip_non_finite:
            after = f" after {before} skipped windows in a row" if before else ""
            raise stop_error(self.iteration, f"{error}{after}") from error
        skipped.append((self.iteration, str(error)))
        self.functions = None

    def validate(self) -> None:
        """Score the optimizer; where the best of a curriculum's stage has stood long enough, go on to the next."""
        self.score()
        history, later = self.history, [steps for steps in self.curriculum if steps > self.steps]
        waited = sum(iteration > history.best_iteration for iteration, _ in history.validation)
        if later and waited >= self.options.horizon.patience and self.iteration < self.options.iterations:
            for net in (self.net, self.averaged):
                net.load_state_dict(self.best)
            history.stages.append((self.iteration, later[0]))
            history.best_iteration, history.best_validation = self.iteration, math.inf
            self.functions = None
            self.score()

    def score(self) -> None:
        """Score the optimizer at the present horizon (on the first rank, for all), and keep it if it is the best."""

        def score():
            logs = []
            for problem in self.validation.problems:
                try:
                    logs.append(self.score_of(problem, self.options.seed + VALIDATION_SEED))
                except NonFiniteError as error:
                    if not self.options.skip_non_finite:
                        raise stop_error(self.iteration - 1, f"in validation, {error}") from error
                    return math.inf
            score = logs[0] if len(logs) == 1 else 0.0 if 0 in logs else math.exp(sum(map(math.log, logs)) / len(logs))
            return score if math.isfinite(score) else math.inf

        score, history = self.ranks.on_first(score), self.history
        history.validation.append((self.iteration, score))
        if score < history.best_validation:
            best = copy.deepcopy(self.averaged.state_dict())
            self.best, history.best_iteration, history.best_validation = best, self.iteration, score

    def score_of(self, problem: Problem, seed: int) -> float:
        """The score of one problem's functions."""
        functions = self.options.validation.validation_functions
        return evaluate(self.averaged, problem, self.steps, functions, seed).sum(1).mean().item()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Take up the run where its checkpoint left it, or begin it, every rank from the first rank's weights."""
        content = None
        if self.options.checkpoint is not None:
            path, restart = self.options.checkpoint.checkpoint, self.options.checkpoint.on_mismatch == "restart"
            content = self.ranks.on_first(lambda: read_checkpoint(path, self.settings, restart))
        if content is not None:
            best = self.best
            try:
                self.restore(content)
            except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
                self.best = best
                raise ValueError(
                    f"{path} is whole as a file, but does not describe this run: {type(error).__name__}: {error}. "
                    "Remove it to begin anew"
                ) from error
        elif self.ranks.size > 1:
            self.net.load_state_dict(self.ranks.on_first(lambda: plain(dict(self.net.state_dict()))))
            self.best = self.start = copy.deepcopy(self.net.state_dict())
            self.averaged.load_state_dict(self.best)

    def save(self) -> None:
        content = plain(self.content())
        self.ranks.on_first(lambda: write_checkpoint(self.options.checkpoint.checkpoint, content, self.settings))

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds, on the first rank; the others answer."""
        content = {
            "iteration": self.iteration,
            "history": asdict(self.history),
            "random": self.random_state(),
            "net": dict(self.net.state_dict()),
            "averaged": dict(self.averaged.state_dict()),
            "best": dict(self.best),
            "start": dict(self.start),
            "adam": self.adam.state_dict(),
            "draws": self.draws,
            "window": None,
        }
        if self.sizes:
            content["sizes"] = self.sizes
        if self.functions is not None:  # in the middle of an unroll
            carried = [functions.carried() for functions in self.functions]
            params, state = carried[0] if len(carried) == 1 else zip(*carried)
            parts = self.ranks.gather(plain((self.first, self.last, params, state)))
            content["window"] = {
                "step": self.step,
                "drawn_at": self.drawn_at,
                "drawn_from": self.drawn_from,
                "imitates": self.imitates,
                "parts": parts,
            }
        return content

    def restore(self, content: dict[str, Any]) -> None:
        for net, name in ((self.net, "best"), (self.averaged, "averaged"), (self.net, "net")):
            net.load_state_dict(content[name])
        self.adam.load_state_dict(content["adam"])
        self.best, self.history = content["best"], History(**content["history"])
        if len(self.history.meta_loss) != content["iteration"]:
            raise ValueError(f"its history has {len(self.history.meta_loss)} iterations, not {content['iteration']}")
        self.draws = content.get("draws", 0)  # files from before there was imitation have none
        self.start = content.get("start", self.start)  # nor have older ones this
        self.sizes = content.get("sizes", {})
        window = content["window"]
        if window is not None:
            parts, several = window["parts"], isinstance(window["parts"][0][2], tuple)
            divisible = (
                as_rule(self.net).coordinatewise
                and not isinstance(self.options.method, PES)
                and not window.get("imitates")
            )
            divisible = divisible and not several
            if divisible or len(parts) == self.ranks.size:  # else these ranks begin with new functions
                params, state = regroup(parts, self.first, self.last, divisible)
                self.set_random_state(window["drawn_from"])
                self.iteration, self.draws = window["drawn_at"], self.draws - 1
                self.draw()
                for functions, *carried in zip(self.functions, *((params, state) if several else ([params], [state]))):
                    functions.carry_on(*carried)
                self.step = window["step"]
        self.set_random_state(content["random"])
        self.iteration = content["iteration"]

    def random_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.generator.get_state(), torch.get_rng_state()  # torch's own: for optimizers and problems that use it

    def set_random_state(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.generator.set_state(state[0])
        torch.set_rng_state(state[1])


def replay_fraction_of(method):
    """Imitation replays as `Replay` does; other methods have no share of it."""
    return method.replay_fraction if isinstance(method, Replay) else 1.0


def norms_of_change(start, end):
    """‖end - start‖, ‖start‖ and ‖end‖ of dicts of tensors."""
    start, end = (torch.cat([tensor.flatten() for tensor in params.values()]) for params in (start, end))
    return [vector.norm() for vector in (end - start, start, end)]


def numbers_of(figures):
    """The numbers in a list of tensors without axes and numbers, with one wait for their device."""
    tensors = [figure for figure in figures if isinstance(figure, torch.Tensor)]
    if all(tensor.is_cpu for tensor in tensors):
        read = iter([tensor.item() for tensor in tensors])
    else:
        read = iter(torch.stack([tensor.double() for tensor in tensors]).tolist())
    return [next(read) if isinstance(figure, torch.Tensor) else figure for figure in figures]


def stop_error(iteration, cause):
    return NonFiniteError(
        f"meta-training stopped at iteration {iteration}: {cause}. Lower lr or clip, look at the "
        "optimizee's loss, or let skip_non_finite windows pass"
    )
