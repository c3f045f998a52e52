"""Meta-training: windows of the unrolled optimization, one after the other, each followed by an update of the optimizer.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2: L(φ) = E_f Σ_t w_t f(θ_t) is minimized by truncated
backpropagation through time. Optimizees come from `optimizees` (or are a user's own), learned optimizers from
`optimizers` (or are a user's own). The meta-gradient of a window is `meta_gradients`, the comparison with hand-designed
optimizers `evaluation`; their public names are here too. As a program (`python meta_training.py --help`) it is
`command_line`.
"""

import copy
import inspect
import math
import sys
import warnings
from dataclasses import asdict, dataclass, field

import torch
from tqdm.auto import tqdm

from gradbuffer.checks import NonFiniteError, check_count, check_positive_number
from gradbuffer.checkpoints import (describe_net, describe_problem, named_tuples, plain, read_checkpoint, regroup, unplain,
                         write_checkpoint)
from gradbuffer.evaluation import (BASELINES, AccuracyCurves, TunedBaseline, compare, compare_final, device_of, evaluate,
                        evaluate_baseline, on_device, tune_baseline, tune_baselines)
from gradbuffer.cuda_graphs import CapturedWindow
from gradbuffer.needs import ON, refuse_without_effect
from gradbuffer.horizons import check_curriculum, describe_horizons, horizon_rule
from gradbuffer.imitation import Imitation, imitation_gradient
from gradbuffer.meta_gradients import check_gradient_options, meta_gradient
from gradbuffer.pes import PESState
from gradbuffer.ranks import Ranks
from gradbuffer.unrolling import Coordinates, bound, part_of

__all__ = ["AccuracyCurves", "BASELINES", "History", "TunedBaseline", "compare", "compare_final", "evaluate",
           "evaluate_baseline", "meta_gradient", "meta_train", "tune_baseline", "tune_baselines"]

GRADIENT_OPTIONS = ("method", "second_order", "replay_fraction", "sigma", "pairs", "objective", "adjoint_bound")
NEEDS = (  # see `gradbuffer.needs`
    ("sigma pairs", "method", ("pes",)),
    ("patience", "curriculum", ON),
    ("imitation_weight", "teacher", ON),
    ("method second_order objective adjoint_bound cuda_graph", "imitation", range(1)),  # all imitation: there is no meta-loss
)
VALIDATION_SEED = 1_000_003  # added to the seed of a run, so that its validation functions are not its training ones


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


def meta_train(net, problem, steps=100, unroll=20, meta_batch=16, iterations=1000, lr=0.005, seed=0, device=None, *,
               warmup=50, clip=1.0, method="replay", second_order=False, replay_fraction=1.0, sigma=0.01, pairs=1,
               objective="sum", adjoint_bound=None, cuda_graph=False, averaging=0.0, horizons=None, curriculum=None,
               patience=3, teacher=None, imitation=0.0, imitation_weight=1.0, skip_non_finite=0, validation_every=None,
               validation_functions=64, checkpoint=None, checkpoint_every=None, callback=None, progress=True):
    """Meta-train a learned optimizer by truncated backpropagation through the unrolled optimization.

    Functions are drawn anew after every `steps` steps; each window of `unroll` updates gives one meta-update by Adam,
    with the meta-gradient clipped by its norm and the learning rate warmed up, then annealed to 0 on a cosine. Every
    `validation_every` iterations (and at the end) the optimizer is scored on functions that training does not draw:
    the sum of the loss over `steps` steps. `net` ends with the weights that scored best, Ctrl-C included: it ends the
    run early, with a warning.

    In a process group of `torch.distributed` (`torchrun`), each process takes a slice of every meta-batch and the
    meta-gradients are summed: N processes train as one does, to rounding (what the meta-gradient itself draws,
    coordinates of a partial replay and perturbations of "pes", differs). `net` starts everywhere from the first
    process's weights.

    Args:
        net: the learned optimizer; trained in place, and moved to `device`.
        problem: distribution of optimizees to train on. Its `validation_problem()`, if it has one, is validated on;
            else fresh functions of its own.
        steps: horizon, updates of each function; a multiple of `unroll`.
        unroll: updates in a window of truncated backpropagation.
        meta_batch: functions run together; in all processes together, if there are several.
        iterations: meta-updates, each of one window.
        lr: the highest meta-learning rate.
        seed: of the functions; the same seed gives the same run.
        device: where to train; default where `net` is.
        warmup: iterations over which the meta-learning rate rises from 0.
        clip: largest norm of the meta-gradient, or None for no clipping.
        method, second_order, replay_fraction, sigma, pairs, objective, adjoint_bound: see `meta_gradient`.
        cuda_graph: launch each window as one CUDA graph, see `cuda_graphs.CapturedWindow`: for small optimizees, which
            keep a GPU waiting for Python. Changes no result but by rounding. Only with method="replay",
            second_order=False and replay_fraction=1.
        averaging: in [0, 1): validate, and keep, a running average of the weights, φ̄ ← a φ̄ + (1 - a) φ with
            a = min(averaging, k / (k + 10)) after k iterations. It takes the
            meta-gradient's noise out of what is kept. Default 0: the weights as they are.
        horizons: windows until functions are drawn anew, instead of always `steps` / `unroll`: (least, most), drawn
            uniformly each time, or a function of (iteration, generator) that returns a count.
        curriculum: horizons to train at before `steps`, such as (20, 50): increasing multiples of `unroll`. Where
            validation, at the present horizon, has not improved `patience` times in a row, training returns to the best
            weights of that horizon and goes on at the next. What is kept is the best of the last horizon reached, which
            is not `steps` if `iterations` end before. Adam's state and the schedule of the meta-learning rate go on.
            Only with `horizons=None`.
        patience: validations in a row without improvement, after which a curriculum goes on.
        teacher: imitate this optimizer: (class of a `torch.optim.Optimizer`, its options), such as
            (torch.optim.Adam, {"lr": 0.01}), or a learned optimizer. See `imitation_gradient`; `method`, `second_order`
            and `objective` are of no concern there.
        imitation: in (0, 1] with a teacher: share of the draws of functions, spread evenly over the run, that it
            optimizes, in all their windows, while `net` reads the gradients and learns to write its updates. Nothing
            else is learned from these. Default 0.
        imitation_weight: positive factor on the imitation loss, ½‖g - ĝ‖² summed over a window, mean over functions.
            Its gradients go through the same clipping and Adam as meta-gradients, which are often larger by far.
        skip_non_finite: how many windows in a row may be skipped because a loss, a gradient or the meta-gradient is not
            finite: the optimizer stays as it is, `History.skipped` notes it, and functions are drawn anew. Validation
            functions that diverge then score infinity. Default 0: the first one stops the run.
        validation_every: default a fortieth of `iterations`.
        validation_functions: how many functions a validation takes; the same ones each time.
        checkpoint: a file to keep the state of the run in. If it is there already the run goes on from it, and ends
            as if it had never stopped, to the bit (one process, the same machine and torch). For that, a batch's
            `loss` must depend on nothing but its arguments and what `sample` drew from the generator (or from torch's).
        checkpoint_every: iterations from one checkpoint to the next; default `validation_every`.
        callback: called as callback(iterations done, history) after each iteration; in the first process only.
        progress: show a bar with the meta-loss.

    Returns:
        `History`.

    Raises:
        ValueError, TypeError: an argument is not as above, or has no effect beside the others; `checkpoint` is damaged, no checkpoint, or that of a run
            with other settings.
        OSError: `checkpoint` cannot be written; an older one there is as it was.
        NonFiniteError: the meta-loss or the meta-gradient stopped being finite; names the iteration. `net` then has
            the best weights so far.
        RuntimeError: another process of the group has died.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> net = CoordinatewiseLSTM()
        >>> history = meta_train(net, Quadratics(), iterations=20, meta_batch=8, progress=False)
        >>> len(history.meta_loss)
        20

    Reference: Andrychowicz et al. 2016, section 3; curriculum and imitation: Chen et al. 2020 (arXiv 2010.09089).
    """
    options = dict(locals())
    check_count(steps=steps, unroll=unroll, meta_batch=meta_batch, iterations=iterations,
                validation_functions=validation_functions, patience=patience)
    check_count(least=0, warmup=warmup, seed=seed, skip_non_finite=skip_non_finite)
    if steps % unroll:
        raise ValueError(f"unroll must divide steps, got unroll={unroll} and steps={steps}")
    check_positive_number(lr=lr)
    if clip is not None:
        check_positive_number(clip=clip)
    if isinstance(averaging, bool) or not (isinstance(averaging, (int, float)) and 0 <= averaging < 1):
        raise ValueError(f"averaging must be a number in [0, 1), got {averaging!r}")
    check_curriculum(curriculum, steps, unroll, horizons)
    validation_every = validation_every or max(1, iterations // 40)
    checkpoint_every = checkpoint_every or validation_every
    check_count(validation_every=validation_every, checkpoint_every=checkpoint_every)
    device = device_of(net, device)
    net.to(device)
    if teacher is None and imitation != 0:
        raise ValueError(f"imitation needs a teacher, got imitation={imitation!r} and teacher=None")
    imitation = None if teacher is None else Imitation(teacher, imitation, imitation_weight, net)
    settings = dict(steps=steps, unroll=unroll, meta_batch=meta_batch, iterations=iterations, lr=lr, seed=seed,
                    warmup=warmup, clip=clip, method=method, second_order=second_order,
                    replay_fraction=replay_fraction, sigma=sigma, pairs=pairs, objective=objective,
                    adjoint_bound=adjoint_bound, averaging=averaging, horizons=describe_horizons(horizons),
                    curriculum=curriculum and f"{tuple(curriculum)} with patience {patience}",
                    teacher=imitation and imitation.describe(),
                    validation_every=validation_every, validation_functions=validation_functions, net=describe_net(net),
                    problem=describe_problem(problem))
    check_gradient_options(net, **{name: settings[name] for name in GRADIENT_OPTIONS})
    if cuda_graph and (method, second_order, replay_fraction) != ("replay", False, 1):
        raise ValueError('cuda_graph=True needs method="replay", second_order=False and replay_fraction=1, got '
                         f"{method!r}, {second_order} and {replay_fraction}")
    given = {name for name, parameter in inspect.signature(meta_train).parameters.items()
             if parameter.default is not parameter.empty and options[name] != parameter.default}
    refuse_without_effect(NEEDS, options, given)
    run = Run(net, on_device(problem, device), settings, horizon_rule(horizons, steps // unroll), skip_non_finite,
              curriculum, patience, imitation, cuda_graph)
    try:
        run.begin(checkpoint)
        with tqdm(total=iterations, initial=run.iteration, desc="meta-training", unit="it",
                  disable=not progress or run.ranks.rank > 0) as bar:
            while run.iteration < iterations:
                run.advance()
                if run.iteration % validation_every == 0 or run.iteration == iterations:
                    run.validate()
                if checkpoint is not None and (run.iteration % checkpoint_every == 0 or run.iteration in (1, iterations)):
                    run.save(checkpoint)  # after the first too: a place that cannot be written is found out early
                if callback is not None and run.ranks.rank == 0:
                    callback(run.iteration, run.history)
                bar.update()
                bar.set_postfix(meta_loss=f"{run.history.meta_loss[-1]:.3g}",
                                best=f"{run.history.best_validation:.4g}", refresh=False)
    except KeyboardInterrupt:
        run.history.interrupted = True
        warnings.warn(f"meta-training was interrupted at iteration {run.iteration} of {iterations}; the optimizer is "
                      f"the best so far, of iteration {run.history.best_iteration}", stacklevel=2)
    finally:
        net.load_state_dict(run.best)
    return run.history


class Run:
    """A meta-training run: what changes from window to window, how it goes on, and how it is saved and restored."""

    def __init__(self, net, problem, settings, horizon, skip_non_finite, curriculum=None, patience=1, imitation=None,
                 cuda_graph=False):
        self.net, self.problem, self.settings = net, problem, settings
        self.validation = problem.validation_problem() if hasattr(problem, "validation_problem") else problem
        self.horizon, self.skip_non_finite = horizon, skip_non_finite
        self.ranks = Ranks()
        self.first, self.last = self.ranks.share(settings["meta_batch"])
        self.trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        self.adam = torch.optim.Adam(self.trained.values(), lr=settings["lr"])
        self.generator = torch.Generator().manual_seed(settings["seed"])
        self.curriculum, self.patience, self.imitation = (*(curriculum or ()), settings["steps"]), patience, imitation
        self.history, self.iteration, self.best = History(), 0, copy.deepcopy(net.state_dict())
        self.start = self.best  # what training begins with
        if curriculum:
            self.history.stages.append((0, curriculum[0]))
        self.averaged = copy.deepcopy(net) if settings["averaging"] else net
        self.cuda_graph, self.captured = cuda_graph, None
        self.batch, self.draws = None, 0  # the functions in hand (None: to be drawn), how many draws there were

    @property
    def steps(self):
        """The present horizon."""
        return self.history.stages[-1][1] if self.history.stages else self.settings["steps"]

    def draw(self):
        """New functions. What it takes to draw these again is kept."""
        self.drawn_from, self.drawn_at = self.random_state(), self.iteration
        self.windows = self.horizon(self.iteration, self.generator)
        if self.history.stages:
            self.windows = self.steps // self.settings["unroll"]
        check_count(horizons=self.windows)
        batch = self.problem.sample(self.settings["meta_batch"], generator=self.generator)
        self.batch = batch if self.ranks.size == 1 else part_of(batch, self.first, self.last)
        self.params, self.step = self.batch.params, 0
        coordinates = Coordinates(self.params)
        self.state = bound(self.net, coordinates).init_state(sum(coordinates.sizes))
        imitates = self.imitation is not None and self.imitation.comes(self.draws)
        self.demonstration = self.imitation.begin(self.params) if imitates else None
        self.draws += 1

    def advance(self):
        """One iteration: a window and the meta-update by its meta-gradient, or the note that it was skipped."""
        settings, history = self.settings, self.history
        rate = schedule(self.iteration, settings["iterations"], settings["warmup"]) * settings["lr"]
        try:
            grads, (meta_loss, *squares, imitation) = self.window()
            norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads.values()])).item()
            if not math.isfinite(norm):
                raise NonFiniteError(f"the norm of the meta-gradient is {norm}")
        except NonFiniteError as error:
            self.skip(error)
            meta_loss = norm = update_size = math.nan
        else:
            change, before, after = (square**0.5 for square in squares)
            update_size = change / max(before, after, sys.float_info.min)
            clip = settings["clip"]
            apply_meta_gradient(self.adam, self.trained, grads, rate, min(1.0, clip / (norm + 1e-12)) if clip else 1.0)
            self.average()
            if self.demonstration is not None:
                history.imitation.append((self.iteration, imitation))
        for record, value in ((history.meta_loss, meta_loss), (history.grad_norm, norm), (history.lr, rate),
                              (history.update_size, update_size)):
            record.append(value)
        self.iteration += 1

    @torch.no_grad()
    def average(self):
        if self.averaged is not self.net:
            kept = min(self.settings["averaging"], self.iteration / (self.iteration + 10))
            for average, now in zip(self.averaged.parameters(), self.net.parameters()):
                average.lerp_(now, 1 - kept)

    def window(self):
        """The next window's meta-gradient, and [meta-loss, squares of ‖θ_T - θ_0‖, ‖θ_0‖, ‖θ_T‖, imitation loss]."""
        if self.batch is None:
            self.draw()
        settings, start = self.settings, self.params
        share = (self.last - self.first) / settings["meta_batch"]
        grads = figures = failure = None
        try:
            if self.demonstration is None:
                grads, info = self.meta_gradient(start)
            else:
                grads, info = imitation_gradient(self.net, self.batch, self.demonstration, self.state, self.step,
                                                 settings["unroll"], self.imitation.weight, settings["replay_fraction"],
                                                 self.window_generator())
        except NonFiniteError as error:
            failure = error
        else:
            grads = {name: grad * share for name, grad in grads.items()}
            imitation = 0.0 if self.demonstration is None else info.imitation.item() * share
            figures = [info.losses.mean().item() * share, *squares_of_change(start, info.params), imitation]
            self.params, self.state, self.step = info.params, info.state, self.step + settings["unroll"]
            if self.step >= self.windows * settings["unroll"]:
                self.batch = None
        return self.ranks.sum(grads, figures, failure)

    def meta_gradient(self, start):
        settings, window = self.settings, (self.batch, start, self.state)
        if not self.cuda_graph:
            return meta_gradient(self.net, *window, self.step, settings["unroll"], generator=self.window_generator(),
                                 **{name: settings[name] for name in GRADIENT_OPTIONS})
        if self.captured is None or not self.captured.fits(*window, self.step):
            self.captured = CapturedWindow(self.net, *window, settings["unroll"], settings["objective"])
        return self.captured(*window, self.step)

    def window_generator(self):
        """For what the meta-gradient draws: a generator of its own, so that the functions depend on the seed alone."""
        number = (self.settings["seed"] * 1_000_003 + self.iteration) * self.ranks.size + self.ranks.rank
        return torch.Generator().manual_seed(number % 2**63)

    def skip(self, error):
        """Note a window that was not finite, and draw other functions; raise if there have been too many."""
        skipped, before = self.history.skipped, 0
        while before < len(skipped) and skipped[-1 - before][0] == self.iteration - 1 - before:
            before += 1
        if before >= self.skip_non_finite:
            after = f" after {before} skipped windows in a row" if before else ""
            raise stopped(self.iteration, f"{error}{after}") from error
        skipped.append((self.iteration, str(error)))
        self.batch = None

    def validate(self):
        """Score the optimizer; where the best of a curriculum's stage has stood long enough, go on to the next."""
        self.score()
        history, later = self.history, [steps for steps in self.curriculum if steps > self.steps]
        waited = sum(iteration > history.best_iteration for iteration, _ in history.validation)
        if later and waited >= self.patience and self.iteration < self.settings["iterations"]:
            for net in (self.net, self.averaged):
                net.load_state_dict(self.best)
            history.stages.append((self.iteration, later[0]))
            history.best_iteration, history.best_validation = self.iteration, math.inf
            self.batch = None
            self.score()

    def score(self):
        """Score the optimizer at the present horizon (on the first rank, for all), and keep it if it is the best."""
        def score():
            try:
                losses = evaluate(self.averaged, self.validation, self.steps, self.settings["validation_functions"],
                                  self.settings["seed"] + VALIDATION_SEED)
            except NonFiniteError as error:
                if not self.skip_non_finite:
                    raise stopped(self.iteration - 1, f"in validation, {error}") from error
                return math.inf
            score = losses.sum(1).mean().item()
            return score if math.isfinite(score) else math.inf

        score, history = self.ranks.on_first(score), self.history
        history.validation.append((self.iteration, score))
        if score < history.best_validation:
            best = copy.deepcopy(self.averaged.state_dict())
            self.best, history.best_iteration, history.best_validation = best, self.iteration, score

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def begin(self, checkpoint):
        """Take up the run where its checkpoint left it, or begin it, every rank from the first rank's weights."""
        content = None
        if checkpoint is not None:
            content = self.ranks.on_first(lambda: read_checkpoint(checkpoint, self.settings))
        if content is not None:
            best = self.best
            try:
                self.restore(content)
            except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
                self.best = best
                raise ValueError(f"{checkpoint} is whole as a file, but does not describe this run: {type(error).__name__}: {error}. "
                                 "Remove it to begin anew") from error
        elif self.ranks.size > 1:
            self.net.load_state_dict(self.ranks.on_first(lambda: plain(dict(self.net.state_dict()))))
            self.best = self.start = copy.deepcopy(self.net.state_dict())
            self.averaged.load_state_dict(self.best)

    def save(self, checkpoint):
        content = {"iteration": self.iteration, "history": asdict(self.history), "random": self.random_state(),
                   "net": dict(self.net.state_dict()), "averaged": dict(self.averaged.state_dict()),
                   "best": dict(self.best), "start": dict(self.start), "adam": self.adam.state_dict(), "draws": self.draws,
                   "window": None}
        if self.batch is not None:  # in the middle of an unroll
            state, imitates = self.state, self.demonstration is not None
            if imitates:
                state = state, self.demonstration.state_dict()
            parts = self.ranks.gather(plain((self.first, self.last, self.params, state)))
            content["window"] = {"step": self.step, "drawn_at": self.drawn_at, "drawn_from": self.drawn_from,
                                 "imitates": imitates, "parts": parts}
        self.ranks.on_first(lambda: write_checkpoint(checkpoint, plain(content), self.settings))

    def restore(self, content):
        for net, name in ((self.net, "best"), (self.averaged, "averaged"), (self.net, "net")):
            net.load_state_dict(content[name])
        self.adam.load_state_dict(content["adam"])
        self.best, self.history = content["best"], History(**content["history"])
        if len(self.history.meta_loss) != content["iteration"]:
            raise ValueError(f"its history has {len(self.history.meta_loss)} iterations, not {content['iteration']}")
        self.draws = content.get("draws", 0)  # files from before there was imitation have none
        self.start = content.get("start", self.start)  # nor have older ones this
        window = content["window"]
        if window is not None:
            parts, divisible = window["parts"], getattr(self.net, "coordinatewise", False)
            divisible = divisible and self.settings["method"] != "pes" and not window.get("imitates")
            if divisible or len(parts) == self.ranks.size:  # else these ranks begin with new functions
                carried = regroup(parts, self.first, self.last, divisible)
                self.set_random_state(window["drawn_from"])
                self.iteration, self.draws = window["drawn_at"], self.draws - 1
                self.draw()
                device = next(iter(self.params.values())).device
                params, state = carried
                if self.demonstration is not None:
                    state, taught = state
                    self.demonstration.go_on(params, taught)
                self.params, self.state = unplain((params, state), device, [PESState, *named_tuples(self.state)])
                self.step = window["step"]
        self.set_random_state(content["random"])
        self.iteration = content["iteration"]

    def random_state(self):
        return self.generator.get_state(), torch.get_rng_state()  # torch's own: for optimizers and problems that use it

    def set_random_state(self, state):
        self.generator.set_state(state[0])
        torch.set_rng_state(state[1])


def schedule(iteration, iterations, warmup):
    """Factor of the meta-learning rate: a linear warm-up, then half a cosine down to 0."""
    return min(1.0, (iteration + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def apply_meta_gradient(adam, trained, grads, lr, factor):
    for name, parameter in trained.items():
        parameter.grad = grads[name] * factor
    for group in adam.param_groups:
        group["lr"] = lr
    adam.step()
    adam.zero_grad()


def squares_of_change(start, end):
    """Squares of ‖end - start‖, ‖start‖ and ‖end‖ of dicts of tensors, as numbers."""
    start, end = (torch.cat([tensor.flatten() for tensor in params.values()]) for params in (start, end))
    return [norm * norm for norm in torch.stack([vector.norm() for vector in (end - start, start, end)]).tolist()]


def stopped(iteration, cause):
    return NonFiniteError(f"meta-training stopped at iteration {iteration}: {cause}. Lower lr or clip, look at the "
                          "optimizee's loss, or let skip_non_finite windows pass")


if __name__ == "__main__":
    from gradbuffer.command_line import main  # which imports this module under its own name

    sys.exit(main())
