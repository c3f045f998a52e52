"""The command line of `meta_training.py`: train an optimizer, evaluate it, compare it with hand-designed ones.

    python meta_training.py train --problem quadratics --output checkpoints/mine.safetensors
    python meta_training.py evaluate checkpoints/mine.safetensors
    python meta_training.py compare checkpoints/mine.safetensors --figure curves.png --table curves.md

Exit status: 0 done; 1 the run failed (not finite, disk full, another process died); 2 the arguments do not go together,
or a result is there already; 130 interrupted by Ctrl-C, the best so far is saved. Settings that the notebook has too
have its values at the scale `quick`.
"""

import importlib
import io
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed

from gradbuffer.checks import CLASS, ON, NonFiniteError, named_class, refuse_without_effect
from gradbuffer.command_line import arguments
from gradbuffer.command_line.arguments import DEFAULTS, KINDS, MEASURED, OWN, SHARING, flag, json_dict
from gradbuffer.contracts import on_device
from gradbuffer.files import write_whole
from gradbuffer.training.checkpoints import read_start
from meta_training import BASELINES, compare, evaluate, meta_train, tune_baselines
from optimizees import CIFAR10Net, Mirrored, MNISTNet, Quadratics, RandomScaling
from optimizers import (
    CoordinatewiseLSTM,
    NormalizedLSTM,
    PerKind,
    RNNProp,
    load_optimizer,
    save_optimizer,
    start_as_adam,
    start_as_momentum,
)

__all__ = ["flag", "json_dict", "main", "make_parser"]
FIGURE_FORMATS = (".pdf", ".png", ".svg")
NEEDS = (  # see `gradbuffer.checks.refuse_without_effect`
    ("dim", "problem", ("quadratics",)),
    ("problem_options", "problem", CLASS),
    ("network_options", "network", CLASS),
    ("sigma pairs hold per_function", "method", ("pes",)),
    ("hidden activation side", "problem", ("mnist",)),
    ("batch_size data", "problem", ("mnist", "cifar10")),
    ("classes held_out channels fc_size per_kind", "problem", ("cifar10",)),
    (
        "per_kind network_options units layers shared preprocess odd output_scale start_as_nag sign_lr sign_fade start_as_adam betas fade",
        "start",
        (None,),
    ),
    ("start_as_nag sign_lr sign_fade", "network", ("lstm",)),
    ("start_as_adam betas fade", "network", ("normalized",)),
    ("shared", "network", tuple(SHARING)),
    ("preprocess output_scale", "network", ("lstm", *SHARING)),
    ("units layers", "network", ("lstm", "rnnprop", "normalized", *SHARING)),
    ("odd", "network", ("lstm", "normalized", *SHARING)),
    ("sign_lr", "start_as_nag", ON),
    ("sign_fade", "sign_lr", ON),
    ("held_out", "classes", (None,)),
    ("patience", "curriculum", ON),
    ("horizons", "curriculum", (None,)),
    ("imitation teacher_lr imitation_weight", "teacher", ON),
    ("teacher", "imitation", ON),
    (
        "method second_order objective adjoint_bound cuda_graph",
        "imitation",
        range(1),
    ),  # where all is imitation there is no meta-loss
    ("adjoint_bound", "second_order", (True,)),
)
FILES = ("output", "history", "figure", "updates", "table", "checkpoint", "tensorboard")  # what commands write


def main(arguments=None):
    """Run the command line; returns the exit status. Default arguments: the program's."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows what it can
    options = make_parser().parse_args(arguments)
    given = vars(make_parser(defaults=False).parse_args(arguments))
    if options.run is run_train and options.replay_fraction is None and needs_all_coordinates(options):
        options.replay_fraction = 1.0
    for name, value in DEFAULTS.get(options.problem, OWN).items():
        if name in vars(options) and vars(options)[name] is None:
            setattr(options, name, value)
    try:
        refuse_without_effect(NEEDS, vars(options), given, flag)
        refuse_one_file_twice(options)
        if options.run is run_train and options.start and "network" in given and ":" not in options.network:
            raise ValueError(f"--network has no effect with --start {options.start}")
        check_device(options.device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and options.run is not run_train:
            raise ValueError("only train runs in several processes")
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has enough; the files are written by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NonFiniteError, RuntimeError) as error:
        return report_failure(error, 1)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        return report_failure(error, 2)
    except OSError as error:
        return report_failure(error, 1)
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def needs_all_coordinates(options):
    """Hessian products, graphs, perturbations, averages and networks of a user's own do; and a GPU has no reason to leave some out."""
    return (
        options.second_order
        or options.device.startswith("cuda")
        or options.cuda_graph
        or options.method != "replay"
        or options.network in SHARING
        or ":" in options.network
    )


def report_failure(error, status):
    print(f"error: {error}", file=sys.stderr)
    return status


# The commands ---------------------------------------------------------------------------------------------------------


def run_train(options):
    first = int(os.environ.get("RANK", 0)) == 0
    checkpoint = Path(options.checkpoint or f"{options.output}.checkpoint")
    if first:
        if not checkpoint.exists():  # else the files may be this very run's, from before it was interrupted
            refuse_existing(options, "output", "figure", "history")
        else:
            print(f"going on from {checkpoint}", file=sys.stderr)
    scalars = Scalars(options.tensorboard) if options.tensorboard and first else None
    device = join_processes(options.device)
    torch.manual_seed(options.seed)
    net, problem = make_net(options), make_problem(options, "train", device)
    begun = (
        read_start(checkpoint) if first and options.keep_of_start else None
    )  # a resumed run's --start may have been replaced
    begun = begun or {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if not 0 <= options.keep_of_start < 1:
        raise ValueError(f"--keep-of-start must be in [0, 1), got {options.keep_of_start}")
    if options.random_scaling is not None or options.random_signs:
        problem = RandomScaling(problem, options.random_scaling or 0.0, options.random_signs)
    if options.mirrored:
        problem = Mirrored(problem)
    settings = {name: value for name, value in vars(options).items() if name in MEASURED}
    for name in ("horizons", "curriculum"):
        settings[name] = tuple(settings[name]) if settings[name] else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "meta-training was interrupted")  # it is said below
        try:
            history = meta_train(
                net,
                problem,
                device=device,
                teacher=make_teacher(options),
                checkpoint=checkpoint,
                checkpoint_every=options.checkpoint_every,
                on_mismatch=options.on_mismatch,
                callback=scalars,
                progress=not options.quiet,
                **settings,
            )
        finally:
            if scalars:
                scalars.close()
    if not first:
        return 130 if history.interrupted else 0
    if history.interrupted and not checkpoint.exists():
        print("interrupted before the first iteration was done: nothing is written", file=sys.stderr)
        return 130
    if options.keep_of_start:
        trained = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
        net.load_state_dict(
            {name: torch.lerp(tensor, begun[name], options.keep_of_start) for name, tensor in trained.items()}
        )
        settings |= dict(keep_of_start=options.keep_of_start)
    if options.teacher:
        settings |= dict(teacher=options.teacher, teacher_lr=options.teacher_lr)
    save_optimizer(
        net,
        options.output,
        problem=problem.name,
        seed=options.seed,
        iteration=history.best_iteration,
        validation=history.best_validation,
        settings=settings,
    )
    if options.history:
        standard = json.loads(json.dumps(asdict(history)), parse_constant=lambda constant: None)  # JSON has no NaN
        write_whole(options.history, json.dumps(standard).encode())
    if options.figure:
        write_figure(options.figure, lambda plots: plots.plot_history(history, f"Meta-training on {problem.name}"))
    if history.interrupted:
        print(
            f"interrupted after {len(history.meta_loss)} of {options.iterations} iterations; the best optimizer so "
            f"far (iteration {history.best_iteration}) is in {options.output}. The same command goes on from "
            f"{checkpoint}",
            file=sys.stderr,
        )
        return 130
    checkpoint.unlink(missing_ok=True)
    skipped = f"; {len(history.skipped)} windows skipped" if history.skipped else ""
    steps = history.stages[-1][1] if history.stages else options.steps
    print(
        f"{options.output}: validation score {history.best_validation:.4g} (sum of the loss over {steps} steps) "
        f"at iteration {history.best_iteration}{skipped}"
    )
    return 0


def run_evaluate(options):
    refuse_existing(options, "figure", "table", "updates")
    problem, (name, net) = (
        make_problem(options, "test", options.device),
        *load_nets([options.net], options.network).items(),
    )
    net.to(options.device)
    losses = evaluate(net, problem, options.steps, options.functions, options.seed)
    if options.updates:
        write_figure(options.updates, lambda plots: plots.plot_updates(net, f"updates of {name}")[0])
    return show({name: losses}, problem, options)


def run_compare(options):
    refuse_existing(options, "figure", "table")
    nets, test = load_nets(options.nets, options.network), make_problem(options, "test", options.device)
    for net in nets.values():
        net.to(options.device)
    baselines = {name: BASELINES[name] for name in options.baselines}
    tuned = tune_baselines(
        make_problem(options, "validation", options.device),
        options.steps,
        options.tuning_functions,
        seed=options.seed + 1,
        baselines=baselines,
        device=options.device,
        progress=not options.quiet,
    )
    curves = compare(nets, tuned, test, options.steps, options.functions, options.seed, progress=not options.quiet)
    return show(curves, test, options, tuned)


def show(curves, problem, options, tuned=None):
    from meta_plots import summary_table

    title = f"{problem.name}, {options.functions} functions, seed {options.seed}"
    table = f"{title}\n\n{summary_table(curves, options.steps, tuned)}"
    if options.table:  # files first: whoever reads what is printed may stop to do so
        write_whole(options.table, f"{table}\n".encode())
    if options.figure:
        write_figure(options.figure, lambda plots: plots.plot_curves(curves, title, tuned=tuned))
    print(table, flush=True)
    return 0


# What they are made of ------------------------------------------------------------------------------------------------


def make_problem(options, split, device):
    if ":" in options.problem:
        problem = on_device(named_class(options.problem)(**options.problem_options), device)
        return problem.validation_problem() if split == "validation" else problem
    if options.problem == "quadratics":
        return Quadratics(options.dim, device=device)
    if len(options.batch_size) > (2 if options.problem == "mnist" else 1):
        some = "1 or 2 numbers" if options.problem == "mnist" else "1 number"
        raise ValueError(f"--batch-size must be {some} with --problem {options.problem}, got {options.batch_size}")
    batch_size = options.batch_size[0] if len(options.batch_size) == 1 else tuple(options.batch_size)
    if options.problem == "cifar10":
        return CIFAR10Net(
            batch_size, split, chosen_labels(options), options.channels, options.fc_size, options.data, device=device
        )
    return MNISTNet(
        options.hidden,
        options.activation,
        batch_size,
        split,
        options.data,
        side=vars(options).get("side"),
        device=device,
    )


def chosen_labels(options):
    """The labels to tell apart: those named, or all but those held out; None for all ten."""
    if options.held_out is None:
        return None if options.classes is None else tuple(options.classes)
    if len(set(options.held_out)) < len(options.held_out) or not set(options.held_out) <= set(range(10)):
        raise ValueError(f"--held-out must be different labels of 0 … 9, got {options.held_out}")
    return tuple(label for label in range(10) if label not in options.held_out)


def refuse_one_file_twice(options):
    """Raise where two options name one file, of which one would replace the other. To refine a file in its place is allowed."""
    given = vars(options)
    named = {flag(name): given.get(name) for name in (*FILES, "teacher")}
    if given.get("output") and not options.checkpoint:
        named["the checkpoint of --output"] = f"{options.output}.checkpoint"
    named |= {f"the optimizer {net}": net for net in given.get("nets", [given.get("net")])}
    if given.get("start") and Path(options.start).resolve() != Path(options.output).resolve():
        named["--start"] = options.start
    owners = {}
    for option, path in named.items():
        if path:
            owners.setdefault(Path(path).resolve(), []).append(option)
    for path, several in owners.items():
        if len(several) > 1:
            raise ValueError(f"{' and '.join(several)} must be different files, got {path.name} for both")


def check_device(name):
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"--device must be cpu, or cuda where there is a GPU, got {name!r}: {str(error).splitlines()[0]}"
        ) from error


def make_net(options):
    if options.start:
        return load_optimizer(options.start, options.network if ":" in options.network else None)
    kinds = len(KINDS) if options.per_kind else 1
    for name in ("start_as_nag", "sign_lr"):
        given = vars(options)[name]
        if given is not None and len(given) not in (1, kinds):
            some = f"1 or {kinds} numbers with --per-kind" if options.per_kind else "1 number without --per-kind"
            raise ValueError(f"--{name.replace('_', '-')} must be {some}, got {given}")
    if options.per_kind:
        return PerKind({kind: make_one_net(options, place) for place, kind in enumerate(KINDS)})
    return make_one_net(options)


def make_one_net(options, place=0):
    """A new learned optimizer; with --per-kind, that of the kind at this place in KINDS."""
    if ":" in options.network:
        return named_class(options.network)(**options.network_options)
    preprocess = None if options.preprocess == "none" else options.preprocess
    if options.network == "rnnprop":
        return RNNProp(options.units, options.layers)
    if options.network == "normalized":
        given = {name: vars(options)[name] for name in ("betas", "fade") if vars(options)[name] is not None}
        net = NormalizedLSTM(options.units, options.layers, odd=options.odd, **given)
        return net if options.start_as_adam is None else start_as_adam(net, options.start_as_adam)
    if options.network in SHARING:
        return SHARING[options.network](
            options.units,
            options.layers,
            options.shared,
            preprocess,
            output_scale=options.output_scale,
            odd=options.odd,
        )
    net = CoordinatewiseLSTM(
        options.units, options.layers, preprocess, output_scale=options.output_scale, odd=options.odd
    )
    if options.start_as_nag is not None:
        lr, sign_lr = (given[place % len(given)] for given in (options.start_as_nag, options.sign_lr))
        start_as_momentum(net, lr, sign_lr=sign_lr, sign_fade=options.sign_fade)
    return net


def make_teacher(options):
    """What to imitate: one of the baselines, by its name in lower case, or a learned optimizer; None if nothing."""
    if options.teacher is None:
        return None
    baselines = {name.lower(): baseline for name, baseline in BASELINES.items()}
    if options.teacher.lower() not in baselines:
        if options.teacher_lr is not None:
            raise ValueError(f"--teacher-lr is for {sorted(baselines)}, got --teacher {options.teacher}")
        return load_optimizer(options.teacher)
    if options.teacher_lr is None:
        raise ValueError(f"--teacher {options.teacher} needs --teacher-lr")
    optimizer, more = baselines[options.teacher.lower()]
    return optimizer, {**more, "lr": options.teacher_lr}


def load_nets(paths, network=None):
    nets = {Path(path).stem: load_optimizer(path, network) for path in paths}
    if len(nets) < len(paths) or nets.keys() & BASELINES.keys():
        raise ValueError(f"the optimizers' files must have different names, and none a baseline's, got {paths}")
    return nets


def join_processes(device):
    """Under torchrun, join its process group; returns this process's device."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    # torch's optimizers import this; where they are first to, its defaults keep our group for good, whose threads then run on
    # after it is destroyed, and abort a process that ends meanwhile.
    importlib.import_module("torch.distributed.nn.functional")
    distributed.init_process_group("nccl" if cuda else "gloo")
    return device


class Scalars:
    """A callback of `meta_train` that writes TensorBoard's scalars."""

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"--tensorboard needs the package tensorboard (pip install tensorboard): {error}"
            ) from error
        self.start, self.writer = (lambda iteration: SummaryWriter(folder, purge_step=iteration)), None

    def __call__(self, iteration, history):
        self.writer = self.writer or self.start(iteration)
        values = {
            "meta-loss": history.meta_loss[-1],
            "meta-gradient norm": history.grad_norm[-1],
            "meta-learning rate": history.lr[-1],
            "update size": history.update_size[-1],
            "skipped windows": len(history.skipped),
        }
        if history.validation and history.validation[-1][0] == iteration:
            values["validation"] = history.validation[-1][1]
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)

    def close(self):
        if self.writer:
            self.writer.close()


def refuse_existing(options, *names):
    """Raise before any work if a result would replace a file, unless --force."""
    for name in names:
        path = vars(options)[name]
        if path and name in ("figure", "updates") and Path(path).suffix not in FIGURE_FORMATS:
            raise ValueError(f"--{name} must end in one of {FIGURE_FORMATS}, got {path!r}")
        if path and Path(path).exists() and not options.force:
            raise FileExistsError(f"{path} is there already: --force replaces it")


def write_figure(path, draw):
    import matplotlib

    matplotlib.use("Agg")  # files only: no window, no display needed
    import meta_plots

    picture = io.BytesIO()
    figure = draw(meta_plots).figure
    figure.savefig(picture, format=Path(path).suffix[1:], dpi=150, bbox_inches="tight")
    matplotlib.pyplot.close(figure)
    write_whole(path, picture.getvalue())


def make_parser(defaults=True):
    """The parser; with defaults=False one whose result holds only what was given."""
    return arguments.make_parser(run_train, run_evaluate, run_compare, defaults)
