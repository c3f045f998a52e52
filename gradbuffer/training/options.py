"""The options of a meta-training run: each written once, as a field of a frozen class that checks itself when it is made.

`meta_train` takes them by their names or as these objects; the checkpoint's settings are their fields, and the command line reads its
flags and help texts off them (`help_of`).
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from gradbuffer.checks import check_count, check_positive_number, name_of
from gradbuffer.contracts import Problem, as_rule
from gradbuffer.training.checkpoints import describe_net
from gradbuffer.training.episodes import EpisodicES
from gradbuffer.training.evolution import Method
from gradbuffer.training.imitation import Teacher
from gradbuffer.training.meta_gradients import DEFAULTS, Replay, flat_options, method_of

__all__ = [
    "Checkpoint",
    "Curriculum",
    "MetaTrainOptions",
    "RandomHorizon",
    "Teacher",
    "Training",
    "Validation",
    "default_of",
    "help_of",
    "training_of",
]


@dataclass(frozen=True)
class RandomHorizon:
    """Windows until functions are drawn anew, drawn uniformly each time.

    Args:
        least, most: of the windows; positive.
    """

    least: int
    most: int

    def __post_init__(self):
        check_count(**{"horizons[0]": self.least})
        check_count(least=self.least, **{"horizons[1]": self.most})

    def __call__(self, iteration: int, generator: torch.Generator | None) -> int:
        return int(torch.randint(self.least, self.most + 1, (), generator=generator, device="cpu"))


@dataclass(frozen=True)
class Curriculum:
    """Horizons to train at before `steps`, after Chen et al. 2020 (arXiv 2010.09089).

    Where validation, at the present horizon, has not improved `patience` times in a row, training returns to the best weights of that
    horizon and goes on at the next. What is kept is the best of the last horizon reached, which is not `steps` if `iterations` end
    before. Adam's state and the schedule of the meta-learning rate go on.

    Args:
        curriculum: horizons to train at before steps, such as (20, 50): increasing multiples of unroll.
        patience: validations in a row without improvement, after which a curriculum goes on.
    """

    curriculum: tuple
    patience: int = 3

    def __post_init__(self):
        if not isinstance(self.curriculum, (tuple, list)) or not self.curriculum:
            raise ValueError(
                f"curriculum must be None or a tuple of horizons, such as (20, 50), got {self.curriculum!r}"
            )
        check_count(**{f"curriculum[{k}]": horizon for k, horizon in enumerate(self.curriculum)})
        check_count(patience=self.patience)
        object.__setattr__(self, "curriculum", tuple(self.curriculum))

    def check(self, steps: int, unroll: int) -> None:
        """Raise unless these horizons lead to that one."""
        way = [*self.curriculum, steps]
        if any(horizon % unroll for horizon in way) or any(a >= b for a, b in zip(way, way[1:])):
            raise ValueError(
                f"curriculum must be increasing multiples of unroll={unroll} below steps={steps}, got {self.curriculum!r}"
            )


@dataclass(frozen=True)
class Validation:
    """How the optimizer is scored along the way, on functions that training does not draw; the same ones each time.

    Args:
        validation_every: iterations between two validations; default a fortieth of iterations.
        validation_functions: functions in each.
    """

    validation_every: int | None = None
    validation_functions: int = 64

    def __post_init__(self):
        check_count(validation_functions=self.validation_functions)
        if self.validation_every is not None:
            check_count(validation_every=self.validation_every)


@dataclass(frozen=True)
class Checkpoint:
    """A file that keeps the state of a run. If it is there already the run goes on from it, and ends as if it had never stopped, to the
    bit (one process, the same machine and torch). For that, a batch's `loss` must depend on nothing but its arguments and what
    `sample` drew from the generator (or from torch's).

    Args:
        checkpoint: the file.
        checkpoint_every: iterations from one checkpoint to the next; default as validation_every.
        on_mismatch: where the file is that of a run with other settings: "error" raises, "restart" begins anew and replaces it.
    """

    checkpoint: str | Path
    checkpoint_every: int | None = None
    on_mismatch: str = "error"

    def __post_init__(self):
        if self.checkpoint_every is not None:
            check_count(checkpoint_every=self.checkpoint_every)
        if self.on_mismatch not in ("error", "restart"):
            raise ValueError(f'on_mismatch must be "error" or "restart", got {self.on_mismatch!r}')


@dataclass(frozen=True)
class Training:
    """All options of a meta-training run.

    Args:
        steps: horizon, updates of each function; a multiple of unroll.
        unroll: updates in a window of truncated backpropagation.
        meta_batch: functions run together; in all processes together, if there are several.
        iterations: meta-updates, each of one window.
        lr: the highest meta-learning rate of the default meta_optimizer.
        seed: of the functions; the same seed gives the same run.
        warmup: iterations over which the meta-learning rate rises from 0.
        clip: largest norm of the meta-gradient, or None for no clipping.
        averaging: in [0, 1): validate, and keep, a running average of the weights, φ̄ ← a φ̄ + (1 - a) φ with
            a = min(averaging, k / (k + 10)) after k iterations. It takes the meta-gradient's noise out of what is kept.
            Default 0: the weights as they are.
        method: the way to the meta-gradient: `Replay`, `Autograd`, `PES` or `EpisodicES`, with their options.
        cuda_graph: launch each window as one CUDA graph, see `cuda_graphs.CapturedWindow`: for small optimizees, which
            keep a GPU waiting for Python. Changes no result but by rounding. Only with method="replay",
            second_order=False, replay_fraction=1 and no weights. Default None: on CUDA where these hold, functions have at most 2^20
            coordinates together, and network and loss can be captured.
        weights: w_t of the losses in a window, unroll + 1 numbers; or a function of a step's number that returns one, so that late
            steps can count more than early ones. Default all 1.
        horizon: windows until functions are drawn anew, instead of always steps / unroll: a `RandomHorizon`, a `Curriculum`,
            or a function of (iteration, generator) that returns a count.
        teacher: whom to imitate, see `Teacher`.
        meta_optimizer: a function of the list of trained parameters that returns a `torch.optim.Optimizer`, whose own rates the
            schedule then multiplies. Default Adam at the rate lr.
        schedule: a function of (iteration, iterations) that returns a factor on the meta-learning rate. Default: a linear rise over
            `warmup` iterations, then half a cosine down to 0.
        skip_non_finite: how many windows in a row may be skipped because a loss, a gradient or the meta-gradient is not
            finite: the optimizer stays as it is, `History.skipped` notes it, and functions are drawn anew. Validation
            functions that diverge then score infinity. Default 0: the first one stops the run.
        balance: divide the meta-gradient of each problem of a mixture by a running root mean square of its norm, so that all of them
            count the same, whatever the scale of their losses.
        validation: see `Validation`.
        checkpoint: see `Checkpoint`; or just the file.
    """

    steps: int = 100
    unroll: int = 20
    meta_batch: int = 16
    iterations: int = 1000
    lr: float = 0.005
    seed: int = 0
    warmup: int = 50
    clip: float | None = 1.0
    averaging: float = 0.0
    method: Any = Replay()
    cuda_graph: bool | None = None
    weights: Any = None
    horizon: Callable | Curriculum | None = None
    teacher: Teacher | None = None
    meta_optimizer: Callable | None = None
    schedule: Callable | None = None
    skip_non_finite: int = 0
    balance: bool = False
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint | None = None

    def __post_init__(self):
        check_count(steps=self.steps, unroll=self.unroll, meta_batch=self.meta_batch, iterations=self.iterations)
        check_count(least=0, warmup=self.warmup, seed=self.seed, skip_non_finite=self.skip_non_finite)
        if self.steps % self.unroll:
            raise ValueError(f"unroll must divide steps, got unroll={self.unroll} and steps={self.steps}")
        check_positive_number(lr=self.lr)
        if self.clip is not None:
            check_positive_number(clip=self.clip)
        if isinstance(self.averaging, bool) or not (
            isinstance(self.averaging, (int, float)) and 0 <= self.averaging < 1
        ):
            raise ValueError(f"averaging must be a number in [0, 1), got {self.averaging!r}")
        if isinstance(self.horizon, Curriculum):
            self.horizon.check(self.steps, self.unroll)
        elif self.horizon is not None and not callable(self.horizon):
            raise TypeError(
                f"horizon must be None, a RandomHorizon, a Curriculum or a function of (iteration, generator), got {self.horizon!r}"
            )
        for name, kind in (
            ("validation", Validation),
            ("checkpoint", (Checkpoint, type(None))),
            ("teacher", (Teacher, type(None))),
        ):
            if not isinstance(vars(self)[name], kind):
                raise TypeError(f"{name} must be a {name.capitalize()}, got {vars(self)[name]!r}")
        for name in ("meta_optimizer", "schedule"):
            if vars(self)[name] is not None and not callable(vars(self)[name]):
                raise TypeError(f"{name} must be a function, got {vars(self)[name]!r}")
        if self.meta_optimizer is not None and self.lr != default_of(Training, "lr"):
            raise ValueError(f"lr={self.lr} is for the default meta_optimizer; one that is given has its own rates")
        if self.schedule is not None and self.warmup != default_of(Training, "warmup"):
            raise ValueError(f"warmup={self.warmup} is for the default schedule, which is not used where one is given")
        if self.weights is not None and not callable(self.weights):
            weights = torch.as_tensor(self.weights, dtype=torch.float64)
            if weights.shape != (self.unroll + 1,):
                raise ValueError(
                    f"weights must have shape ({self.unroll + 1},) for unroll {self.unroll}, got {tuple(weights.shape)}"
                )
            object.__setattr__(self, "weights", tuple(weights.tolist()))
        if self.cuda_graph and not self.can_be_captured:
            raise ValueError(
                'cuda_graph=True needs method="replay", second_order=False, replay_fraction=1 and no weights, got '
                f"{self.method} and weights={self.weights}"
            )
        if isinstance(self.method, EpisodicES):
            for name in ("weights", "horizon", "teacher"):
                if vars(self)[name] is not None:
                    raise ValueError(f"{name} has no effect with method={self.method}")
        if self.teacher is not None and self.teacher.share == 1:  # all is imitation: there is no meta-loss
            without = [
                name
                for name, value in flat_options(self.method).items()
                if name in ("method", "second_order", "objective", "adjoint_bound")
                and value != {"method": "replay", **DEFAULTS}[name]
            ]
            for name in [*without, *(name for name in ("cuda_graph", "weights") if vars(self)[name])]:
                raise ValueError(f"{name} has no effect with imitation {self.teacher.share}")

    @property
    def can_be_captured(self) -> bool:
        """Whether these are windows of which CUDA graphs can be made."""
        return self.method == Replay(objective=self.method.objective) and self.weights is None

    @property
    def validation_every(self) -> int:
        return self.validation.validation_every or max(1, self.iterations // 40)

    @property
    def checkpoint_every(self) -> int:
        return self.checkpoint.checkpoint_every or self.validation_every

    def windows(self, iteration: int, generator: torch.Generator | None) -> int:
        """How many windows the functions drawn at this iteration run for."""
        fixed = self.horizon is None or isinstance(self.horizon, Curriculum)
        return self.steps // self.unroll if fixed else self.horizon(iteration, generator)

    def weights_at(self, step: int) -> Sequence[float] | torch.Tensor | None:
        """w_t of the window that begins at that step; None where all are 1."""
        return [self.weights(step + t) for t in range(self.unroll + 1)] if callable(self.weights) else self.weights

    def describe(self, net: nn.Module, problem: Problem) -> dict:
        """What a checkpoint must agree with: plain values by their names."""
        plain = {
            name: vars(self)[name]
            for name in ("steps", "unroll", "meta_batch", "iterations", "lr", "seed", "warmup", "clip")
        }
        method = flat_options(self.method)
        settings = plain | {
            name: method.pop(name)
            for name in ("method", "second_order", "replay_fraction", "sigma", "pairs", "objective", "adjoint_bound")
        }
        settings["objective"] = describe(settings["objective"])
        settings |= {
            "averaging": self.averaging,
            "horizons": None,
            "curriculum": None,
            "teacher": self.teacher and self.teacher.describe(),
            "validation_every": self.validation_every,
            "validation_functions": self.validation.validation_functions,
            "net": describe_net(as_rule(net)),
            "problem": problem.describe(),
        }
        if isinstance(self.horizon, Curriculum):
            settings["curriculum"] = f"{self.horizon.curriculum} with patience {self.horizon.patience}"
        elif isinstance(self.horizon, RandomHorizon):
            settings["horizons"] = (self.horizon.least, self.horizon.most)
        elif self.horizon is not None:
            settings["horizons"] = describe(self.horizon)
        later = method | {
            name: vars(self)[name] for name in ("weights", "meta_optimizer", "schedule", "balance")
        }  # older files lack these
        return settings | {name: describe(value) for name, value in later.items() if value}


class MetaTrainOptions(TypedDict, total=False):
    """What `meta_train` takes by name beside the options that stand in its own signature. `Training` and the classes of its objects
    say what each is."""

    warmup: int
    clip: float | None
    averaging: float
    cuda_graph: bool | None
    weights: Sequence[float] | torch.Tensor | Callable[[int], float] | None
    meta_optimizer: Callable[[list], torch.optim.Optimizer] | None
    schedule: Callable[[int, int], float] | None
    skip_non_finite: int
    balance: bool
    # the way to the meta-gradient: `Replay`, `Autograd`, `PES`
    method: str | Method
    second_order: bool
    replay_fraction: float
    objective: str | Callable
    adjoint_bound: float | None
    sigma: float
    pairs: int
    hold: bool
    per_function: bool
    # windows until functions are drawn anew: `RandomHorizon`, `Curriculum`
    horizon: Callable[[int, torch.Generator], int] | Curriculum | None
    horizons: tuple[int, int] | Callable[[int, torch.Generator], int] | None
    curriculum: Sequence[int] | Curriculum | None
    patience: int
    # `Teacher`
    teacher: Teacher | nn.Module | tuple[type, dict] | None
    imitation: float
    imitation_weight: float
    # `Validation`
    validation: Validation | None
    validation_every: int | None
    validation_functions: int
    # `Checkpoint`
    checkpoint: str | Path | Checkpoint | None
    checkpoint_every: int | None
    on_mismatch: str


def describe(value):
    """A function by its name, a list as a tuple, plain values as they are."""
    if callable(value):
        return name_of(value)
    return tuple(value) if isinstance(value, list) else value


def default_of(cls: type, name: str) -> Any:
    """The default of a field."""
    found = next(own for own in fields(cls) if own.name == name)
    return found.default if found.default is not MISSING else found.default_factory()


def training_of(net: nn.Module, **given: Any) -> Training:
    """`Training` from options by their names: its own, and those of `Replay`, `PES`, `Curriculum`, `Teacher`, `Validation` and
    `Checkpoint`, which are gathered into these; `horizons` is None, (least, most) or a function.

    Args:
        net: what is to be trained, which cannot be its own teacher.
        given: the options.

    Raises:
        ValueError, TypeError: an option is not as its class says, has no effect beside the others, or is none of all.
    """
    names = {own.name for own in fields(Training)}
    if given.get("checkpoint_every") is not None:
        check_count(checkpoint_every=given["checkpoint_every"])
    method = method_of(
        given.pop("method", "replay"), **{name: given.pop(name) for name in [*given] if name in DEFAULTS}
    )
    horizons, horizon = given.pop("horizons", None), given.pop("horizon", None)
    curriculum = gather(Curriculum, given)
    if [horizons, horizon, curriculum].count(None) < 2:
        raise ValueError(
            f"curriculum={curriculum and curriculum.curriculum!r} needs horizons=None, got horizons={horizons or horizon!r}"
        )
    if horizons is not None and not callable(horizons):
        if not (isinstance(horizons, (tuple, list)) and len(horizons) == 2):
            raise ValueError(
                f"horizons must be None, (least, most) or a function of (iteration, generator), got {horizons!r}"
            )
        horizons = RandomHorizon(*horizons)
    validation = gather(Validation, given, "validation")
    own = {name: given.pop(name) for name in [*given] if name in names - {"teacher", "checkpoint", "validation"}}
    training = Training(
        method=method,
        horizon=horizons or horizon or curriculum,
        teacher=teacher_of(given, net),
        validation=validation,
        checkpoint=gather(Checkpoint, given),
        **own,
    )
    if given:
        raise TypeError(
            f"meta_train got unexpected keyword arguments {sorted(given)}; there are {sorted(MetaTrainOptions.__annotations__)}"
        )
    training.method.check(as_rule(net))
    return training


def gather(cls, given, name=None):
    """The object of a class that was given by that name, or whose fields were given by theirs, taken out of `given`; else None.

    name: default that of the class's first field, without which the others have nothing to say.
    """
    alone, found = name, {own.name: given.pop(own.name) for own in fields(cls) if own.name in given}
    name = name or fields(cls)[0].name
    whole = given.pop(name, None) if alone else found.pop(name, None)
    changed = [other for other, value in found.items() if value != default_of(cls, other)]
    if isinstance(whole, cls):
        if changed:
            raise ValueError(f"{changed[0]} must stand in {name}={whole!r} itself where that is an object")
        return whole
    if alone:
        if whole is not None:
            raise TypeError(f"{name} must be a {cls.__name__}, got {whole!r}")
        return cls(**found)
    if whole is None:
        changed = [
            other for other in changed if other != "checkpoint_every"
        ]  # as often as that, if there were a checkpoint
        if changed:
            raise ValueError(f"{changed[0]} needs {name}")
        return None
    return cls(whole, **found)


def teacher_of(given, net):
    """`Teacher` from teacher, imitation and imitation_weight."""
    teacher, share, weight = given.pop("teacher", None), given.pop("imitation", 0.0), given.pop("imitation_weight", 1.0)
    if isinstance(teacher, Teacher):
        if share or weight != 1:
            raise ValueError("imitation and imitation_weight must stand in the Teacher itself where one is given")
    elif teacher is None:
        if share != 0:
            raise ValueError(f"imitation needs a teacher, got imitation={share!r} and teacher=None")
        if weight != 1:
            raise ValueError("imitation_weight needs teacher")
    else:
        teacher = Teacher(
            *(teacher if isinstance(teacher, (tuple, list)) else (teacher, None)), share=share, weight=weight
        )
    if teacher is not None and teacher.options.get("net") is net:
        raise ValueError("teacher must be another optimizer than net, which changes as it learns: give a copy")
    return teacher


def help_of(cls: type) -> dict:
    """dict from option to its text, of a class's docstring."""
    text, found = inspect.cleandoc(cls.__doc__).partition("Args:\n")[2], {}
    for names, said in re.findall(r"^    ([\w, ]+): (.*(?:\n     .*)*)", text, re.M):
        for name in names.split(", "):
            found[name] = " ".join(said.split())
    return found
