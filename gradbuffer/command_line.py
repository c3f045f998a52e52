"""The command line of `meta_training.py`: train an optimizer, evaluate it, compare it with hand-designed ones.

    python meta_training.py train --problem quadratics --output checkpoints/mine.safetensors
    python meta_training.py evaluate checkpoints/mine.safetensors
    python meta_training.py compare checkpoints/mine.safetensors --figure curves.png --table curves.md

Exit status: 0 done; 1 the run failed (not finite, disk full, another process died); 2 the arguments do not go together,
or a result is there already; 130 interrupted by Ctrl-C, the best so far is saved. Settings that the notebook has too
have its values at the scale `quick`.
"""

import argparse
import io
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed

from gradbuffer.checks import ON, NonFiniteError, refuse_without_effect
from gradbuffer.checkpoints import read_start
from meta_training import BASELINES, compare, evaluate, meta_train, tune_baselines
from optimizees import ACTIVATIONS, CIFAR10Net, Mirrored, MNISTNet, Quadratics, RandomScaling
from optimizers import (CoordinatewiseLSTM, LSTMWithGAC, NTMBFGS, NormalizedLSTM, PerKind, RNNProp, load_optimizer,
                        save_optimizer, start_as_adam, start_as_momentum)
from gradbuffer.files import write_whole

__all__ = ["main"]

DEFAULTS = {  # what suits each problem
    "quadratics": dict(meta_batch=64, iterations=1500, lr=0.005, clip=30.0, replay_fraction=1.0,
                       validation_functions=256, preprocess="none", output_scale=1.0),
    "mnist": dict(meta_batch=1, iterations=450, lr=0.005, clip=20.0, replay_fraction=1 / 16, validation_functions=4,
                  preprocess="log_sign", output_scale=0.1),
    "cifar10": dict(meta_batch=1, iterations=200, lr=0.001, clip=10.0, replay_fraction=1.0, validation_functions=2,
                    preprocess="log_sign", output_scale=0.01, channels=(16, 16, 16), fc_size=32),
}
SHARING = {"gac": LSTMWithGAC, "ntm": NTMBFGS}  # networks whose coordinates are not independent
KINDS = ("conv", "fc")  # of parameters, by which `CIFAR10Net` names them
FIGURE_FORMATS = (".pdf", ".png", ".svg")


NEEDS = (  # see `gradbuffer.checks.refuse_without_effect`
    ("dim", "problem", ("quadratics",)),
    ("hidden activation side", "problem", ("mnist",)),
    ("batch_size data", "problem", ("mnist", "cifar10")),
    ("classes held_out channels fc_size per_kind", "problem", ("cifar10",)),
    ("per_kind network units layers shared preprocess odd output_scale start_as_nag sign_lr sign_fade start_as_adam betas fade",
     "start", (None,)),
    ("start_as_nag sign_lr sign_fade", "network", ("lstm",)),
    ("start_as_adam betas fade", "network", ("normalized",)),
    ("shared", "network", tuple(SHARING)),
    ("preprocess output_scale", "network", ("lstm", *SHARING)),
    ("odd", "network", ("lstm", "normalized", *SHARING)),
    ("sign_lr", "start_as_nag", ON),
    ("sign_fade", "sign_lr", ON),
    ("held_out", "classes", (None,)),
    ("patience", "curriculum", ON),
    ("horizons", "curriculum", (None,)),
    ("imitation teacher_lr imitation_weight", "teacher", ON),
    ("teacher", "imitation", ON),
    ("second_order objective adjoint_bound cuda_graph", "imitation", range(1)),  # where all is imitation there is no meta-loss
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
    whole = any(getattr(options, name, False) for name in ("second_order", "cuda_graph"))
    if (whole or getattr(options, "network", None) in SHARING) and options.replay_fraction is None:
        options.replay_fraction = 1.0  # Hessian products, graphs and averages need every coordinate
    for name, value in DEFAULTS[options.problem].items():
        if getattr(options, name, value) is None:
            setattr(options, name, value)
    try:
        refuse_without_effect(NEEDS, vars(options), given, flag)
        refuse_one_file_twice(options)
        check_device(options.device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and options.run is not run_train:
            raise ValueError("only train runs in several processes")
        status = options.run(options)
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has enough; the files are written by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NonFiniteError, RuntimeError) as error:
        return failed(error, 1)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        return failed(error, 2)
    except OSError as error:
        return failed(error, 1)


def failed(error, status):
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
    begun = read_start(checkpoint) if first and options.keep_of_start else None  # a resumed run's --start may have been replaced
    begun = begun or {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if not 0 <= options.keep_of_start < 1:
        raise ValueError(f"--keep-of-start must be in [0, 1), got {options.keep_of_start}")
    if options.random_scaling is not None or options.random_signs:
        problem = RandomScaling(problem, options.random_scaling or 0.0, options.random_signs)
    if options.mirrored:
        problem = Mirrored(problem)
    settings = {name: getattr(options, name) for name in (
        "steps", "unroll", "meta_batch", "iterations", "lr", "seed", "warmup", "clip", "replay_fraction", "objective",
        "horizons", "curriculum", "patience", "imitation", "imitation_weight", "second_order", "adjoint_bound",
        "cuda_graph", "averaging", "skip_non_finite", "validation_every", "validation_functions")}
    for name in ("horizons", "curriculum"):
        settings[name] = tuple(settings[name]) if settings[name] else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "meta-training was interrupted")  # it is said below
        try:
            history = meta_train(net, problem, device=device, teacher=make_teacher(options),
                                 checkpoint=checkpoint, checkpoint_every=options.checkpoint_every, callback=scalars,
                                 progress=not options.quiet, **settings)
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
        net.load_state_dict({name: torch.lerp(tensor, begun[name], options.keep_of_start) for name, tensor in trained.items()})
        settings |= dict(keep_of_start=options.keep_of_start)
    if options.teacher:
        settings |= dict(teacher=options.teacher, teacher_lr=options.teacher_lr)
    save_optimizer(net, options.output, problem=problem.name, seed=options.seed, iteration=history.best_iteration,
                   validation=history.best_validation, settings=settings)
    if options.history:
        standard = json.loads(json.dumps(asdict(history)), parse_constant=lambda constant: None)  # JSON has no NaN
        write_whole(options.history, json.dumps(standard).encode())
    if options.figure:
        write_figure(options.figure, lambda plots: plots.plot_history(history, f"Meta-training on {problem.name}"))
    if history.interrupted:
        print(f"interrupted after {len(history.meta_loss)} of {options.iterations} iterations; the best optimizer so "
              f"far (iteration {history.best_iteration}) is in {options.output}. The same command goes on from "
              f"{checkpoint}", file=sys.stderr)
        return 130
    checkpoint.unlink(missing_ok=True)
    skipped = f"; {len(history.skipped)} windows skipped" if history.skipped else ""
    steps = history.stages[-1][1] if history.stages else options.steps
    print(f"{options.output}: validation score {history.best_validation:.4g} (sum of the loss over {steps} steps) "
          f"at iteration {history.best_iteration}{skipped}")
    return 0


def run_evaluate(options):
    refuse_existing(options, "figure", "table", "updates")
    problem, (name, net) = make_problem(options, "test", options.device), *load_nets([options.net]).items()
    net.to(options.device)
    losses = evaluate(net, problem, options.steps, options.functions, options.seed)
    if options.updates:
        write_figure(options.updates, lambda plots: plots.plot_updates(net, f"updates of {name}")[0])
    return show({name: losses}, problem, options)


def run_compare(options):
    refuse_existing(options, "figure", "table")
    nets, test = load_nets(options.nets), make_problem(options, "test", options.device)
    for net in nets.values():
        net.to(options.device)
    baselines = {name: BASELINES[name] for name in options.baselines}
    tuned = tune_baselines(make_problem(options, "validation", options.device), options.steps, options.tuning_functions,
                           seed=options.seed + 1, baselines=baselines, device=options.device,
                           progress=not options.quiet)
    curves = compare(nets, tuned, test, options.steps, options.functions, options.seed, progress=not options.quiet)
    return show(curves, test, options)


def show(curves, problem, options):
    from meta_plots import summary_table

    title = f"{problem.name}, {options.functions} functions, seed {options.seed}"
    table = f"{title}\n\n{summary_table(curves, options.steps)}"
    if options.table:  # files first: whoever reads what is printed may stop to do so
        write_whole(options.table, f"{table}\n".encode())
    if options.figure:
        write_figure(options.figure, lambda plots: plots.plot_curves(curves, title))
    print(table, flush=True)
    return 0


# What they are made of ------------------------------------------------------------------------------------------------


def make_problem(options, split, device):
    if options.problem == "quadratics":
        return Quadratics(options.dim, device=device)
    if len(options.batch_size) > (2 if options.problem == "mnist" else 1):
        some = "1 or 2 numbers" if options.problem == "mnist" else "1 number"
        raise ValueError(f"--batch-size must be {some} with --problem {options.problem}, got {options.batch_size}")
    batch_size = options.batch_size[0] if len(options.batch_size) == 1 else tuple(options.batch_size)
    if options.problem == "cifar10":
        return CIFAR10Net(batch_size, split, chosen_labels(options), options.channels, options.fc_size,
                          options.data, device=device)
    return MNISTNet(options.hidden, options.activation, batch_size, split, options.data,
                    side=getattr(options, "side", None), device=device)


def chosen_labels(options):
    """The labels to tell apart: those named, or all but those held out; None for all ten."""
    if options.held_out is None:
        return None if options.classes is None else tuple(options.classes)
    if len(set(options.held_out)) < len(options.held_out) or not set(options.held_out) <= set(range(10)):
        raise ValueError(f"--held-out must be different labels of 0 … 9, got {options.held_out}")
    return tuple(label for label in range(10) if label not in options.held_out)


def flag(name):
    return f"--{name.replace('_', '-')}"


def refuse_one_file_twice(options):
    """Raise where two options name one file, of which one would replace the other. To refine a file in its place is allowed."""
    named = {flag(name): getattr(options, name, None) for name in (*FILES, "teacher")}
    if getattr(options, "output", None) and not options.checkpoint:
        named["the checkpoint of --output"] = f"{options.output}.checkpoint"
    nets = getattr(options, "nets", [getattr(options, "net", None)])
    named |= {f"the optimizer {net}": net for net in nets}
    if getattr(options, "start", None) and Path(options.start).resolve() != Path(options.output).resolve():
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
        raise ValueError(f"--device must be cpu, or cuda where there is a GPU, got {name!r}: "
                         f"{str(error).splitlines()[0]}") from error


def make_net(options):
    if options.start:
        return load_optimizer(options.start)
    kinds = len(KINDS) if options.per_kind else 1
    for name in ("start_as_nag", "sign_lr"):
        given = getattr(options, name)
        if given is not None and len(given) not in (1, kinds):
            some = f"1 or {kinds} numbers with --per-kind" if options.per_kind else "1 number without --per-kind"
            raise ValueError(f"--{name.replace('_', '-')} must be {some}, got {given}")
    if options.per_kind:
        return PerKind({kind: make_one_net(options, place) for place, kind in enumerate(KINDS)})
    return make_one_net(options)


def make_one_net(options, place=0):
    """A new learned optimizer; with --per-kind, that of the kind at this place in KINDS."""
    preprocess = None if options.preprocess == "none" else options.preprocess
    if options.network == "rnnprop":
        return RNNProp(options.units, options.layers)
    if options.network == "normalized":
        given = {name: value for name in ("betas", "fade") if (value := getattr(options, name)) is not None}
        net = NormalizedLSTM(options.units, options.layers, odd=options.odd, **given)
        return net if options.start_as_adam is None else start_as_adam(net, options.start_as_adam)
    if options.network in SHARING:
        return SHARING[options.network](options.units, options.layers, options.shared, preprocess,
                                        output_scale=options.output_scale, odd=options.odd)
    net = CoordinatewiseLSTM(options.units, options.layers, preprocess, output_scale=options.output_scale,
                             odd=options.odd)
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


def load_nets(paths):
    nets = {Path(path).stem: load_optimizer(path) for path in paths}
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
    distributed.init_process_group("nccl" if cuda else "gloo")
    return device


class Scalars:
    """A callback of `meta_train` that writes TensorBoard's scalars."""

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs the package tensorboard (pip install tensorboard): "
                             f"{error}") from error
        self.start, self.writer = (lambda iteration: SummaryWriter(folder, purge_step=iteration)), None

    def __call__(self, iteration, history):
        self.writer = self.writer or self.start(iteration)
        values = {"meta-loss": history.meta_loss[-1], "meta-gradient norm": history.grad_norm[-1],
                  "meta-learning rate": history.lr[-1], "update size": history.update_size[-1],
                  "skipped windows": len(history.skipped)}
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
        path = getattr(options, name)
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


# Arguments ------------------------------------------------------------------------------------------------------------


def make_parser(defaults=True):
    """The parser; with defaults=False one whose result holds only what was given."""
    parser = argparse.ArgumentParser(
        prog="meta_training.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Learning to optimize: train an LSTM to be an optimizer, and race it against SGD, Adam and others.",
        epilog="first steps (a few minutes on a CPU):\n"
               "  python meta_training.py train --output mine.safetensors\n"
               "  python meta_training.py compare mine.safetensors --figure curves.png\n\n"
               "several processes: torchrun --nproc-per-node=2 meta_training.py train --output mine.safetensors\n"
               "exit status: 0 done, 1 the run failed, 2 wrong arguments or a result is there already, 130 interrupted")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, what in (
            ("train", run_train, "meta-train a learned optimizer; interrupted or killed, the same command goes on"),
            ("evaluate", run_evaluate, "run a trained optimizer on functions that it has not seen"),
            ("compare", run_compare, "race trained optimizers against hand-designed ones with tuned learning rates")):
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.set_defaults(run=run)
        if name == "train":
            add_training(command)
        else:
            add_racing(command, name)
        add_problem(command)
        add_general(command)
        if not defaults:
            for action in command._actions:
                action.default = argparse.SUPPRESS
    return parser


def by_problem(name):
    """The part of a help text that says the default of each problem."""
    return "default " + ", ".join(f"{defaults[name]:g} ({problem})" if not isinstance(defaults[name], str) else
                                  f"{defaults[name]} ({problem})" for problem, defaults in DEFAULTS.items())


def add_training(command):
    add = command.add_argument_group("results").add_argument
    add("--output", metavar="FILE", required=True, help="the trained optimizer, a safetensors file")
    add("--history", metavar="FILE", help="what happened in each iteration, as JSON")
    add("--figure", metavar="FILE", help="the same as a figure: .png, .pdf or .svg")
    add("--tensorboard", metavar="FOLDER", help="write TensorBoard's scalars there; needs the package tensorboard")
    add("--checkpoint", metavar="FILE", help="keeps the state of an unfinished run; default OUTPUT.checkpoint")
    add("--checkpoint-every", metavar="N", type=int, help="iterations between two; default as --validation-every")

    add = command.add_argument_group("the learned optimizer").add_argument
    add("--start", metavar="FILE", help="refine this optimizer (a file or a name in pretrained/) instead of a new one")
    add("--network", choices=("lstm", "gac", "ntm", "rnnprop", "normalized"), default="lstm",
        help="lstm: Andrychowicz et al. 2016; gac, ntm: LSTM+GAC and NTM-BFGS from there, whose coordinates share "
             "information; rnnprop: Lv et al. 2017, which reads what Adam would do; normalized: the same over several "
             "horizons, and the time; default lstm")
    add("--keep-of-start", metavar="SHARE", type=float, default=0.0,
        help="write weights this far back from the trained ones to those training began with, which often hold better on "
             "other problems (Wortsman et al. 2022, arXiv 2109.01903); the validation score is of the trained ones; "
             "default 0")
    add("--start-as-adam", metavar="LR", type=float,
        help="normalized: weights that make the steps of Adam with this learning rate, which fades")
    add("--betas", metavar="B", type=float, nargs="+",
        help="normalized: of the averages of the gradient that it reads; Adam's is the second; default 0.5 0.9 0.97")
    add("--fade", metavar="N", type=float, help="normalized: steps after which that is half of what it was; default 300")
    add("--start-as-nag", metavar="LR", type=float, nargs="+",
        help="lstm with log_sign: weights that make the steps of Nesterov momentum with this learning rate; with "
             "--per-kind one for all or one for each")
    add("--sign-lr", metavar="X", type=float, nargs="+", default=[0.0],
        help="with --start-as-nag: first steps by sign beside it, of this size (or one for each kind); default 0")
    add("--sign-fade", metavar="N", type=float, default=8, help="steps after which a quarter of that is left; default 8")
    add("--per-kind", action="store_true",
        help=f"cifar10: two of these with weights of their own, for {' and '.join(KINDS)} parameters, trained together")
    add("--units", metavar="N", type=int, default=20, help="hidden units of the LSTM; default 20")
    add("--layers", metavar="N", type=int, default=2, help="layers of the LSTM; default 2")
    add("--shared", metavar="N", type=int, default=5, help="gac, ntm: averaged cells of each layer; default 5")
    add("--preprocess", choices=("none", "log_sign", "with_log_size"),
        help=f"of the gradients it reads, with_log_size for gac and ntm; {by_problem('preprocess')}")
    add("--odd", action="store_true", help="all but rnnprop: keep to LSTMs that answer -gradient with exactly -update")
    add("--output-scale", metavar="X", type=float, help=f"factor on its updates; {by_problem('output_scale')}")

    add = command.add_argument_group("meta-training").add_argument
    add("--steps", metavar="N", type=int, default=100, help="updates of each function; default 100")
    add("--unroll", metavar="N", type=int, default=20,
        help="updates in a window of truncated backpropagation, a divisor of --steps; default 20")
    add("--horizons", metavar=("LEAST", "MOST"), type=int, nargs=2,
        help="draw the number of windows at random between these, instead of always steps / unroll")
    add("--curriculum", metavar="N", type=int, nargs="+",
        help="horizons to train at before --steps, multiples of --unroll; each until its validation stands still")
    add("--patience", metavar="N", type=int, default=3,
        help="with --curriculum: validations without improvement, after which it goes on; default 3")
    add("--teacher", metavar="NAME", help="imitate this optimizer: one of "
        f"{', '.join(name.lower() for name in BASELINES)}, or a learned one (a file or a name in pretrained/)")
    add("--teacher-lr", metavar="X", type=float, help="learning rate of a hand-designed teacher")
    add("--imitation", metavar="X", type=float, default=0.0,
        help="with --teacher: share of the training that imitates, the rest lowers the loss; default 0")
    add("--imitation-weight", metavar="X", type=float, default=1.0,
        help="factor on the imitation loss, beside the functions' own; default 1")
    add("--meta-batch", metavar="N", type=int,
        help=f"functions run together, in all processes; {by_problem('meta_batch')}")
    add("--iterations", metavar="N", type=int, help=f"updates of the optimizer; {by_problem('iterations')}")
    add("--lr", metavar="X", type=float, help=f"highest meta-learning rate; {by_problem('lr')}")
    add("--warmup", metavar="N", type=int, default=50, help="iterations until it is reached; default 50")
    add("--clip", metavar="X", type=float, help=f"largest norm of the meta-gradient; {by_problem('clip')}")
    add("--replay-fraction", metavar="X", type=float,
        help=f"share of the coordinates in the meta-gradient; {by_problem('replay_fraction')}")
    add("--objective", choices=("sum", "log"), default="sum", help="sum of the losses or of their logs; default sum")
    add("--second-order", action="store_true", help="the exact meta-gradient of each window: slower")
    add("--adjoint-bound", metavar="X", type=float,
        help="with --second-order: keep adjoints within X times what they are without it, so that none explode")
    add("--cuda-graph", action="store_true",
        help="on a GPU: launch each window as one CUDA graph, which is faster for small functions; not with --second-order")
    add("--averaging", metavar="X", type=float, default=0.0,
        help="keep a running average of the weights, with this share of itself in each step; default 0: none")
    add("--side", metavar="N", type=int, help="mnist: train on images averaged down to N × N pixels, such as 14")
    add("--random-scaling", metavar="RADIUS", type=float,
        help="train in other coordinates, each scaled by e^u, u uniform on ±RADIUS")
    add("--random-signs", action="store_true", help="and each with a random sign")
    add("--mirrored", action="store_true",
        help="every function beside its mirror image f(-θ), which takes most of the noise out; an even --meta-batch")
    add("--skip-non-finite", metavar="N", type=int, default=0,
        help="let up to N windows in a row pass that are not finite; default 0: stop")
    add("--validation-every", metavar="N", type=int, help="iterations between two validations; default iterations / 40")
    add("--validation-functions", metavar="N", type=int,
        help=f"functions in each; {by_problem('validation_functions')}")
    add("--seed", metavar="N", type=int, default=0, help="of the functions and of a new optimizer; default 0")


def add_racing(command, name):
    if name == "evaluate":
        command.add_argument("net", metavar="OPTIMIZER", help="a trained optimizer: a file, or a name in pretrained/")
    else:
        command.add_argument("nets", metavar="OPTIMIZER", nargs="+",
                             help="trained optimizers: files, or names in pretrained/")
    add = command.add_argument_group("results (the table is printed as well)").add_argument
    add("--figure", metavar="FILE", help="loss curves: .png, .pdf or .svg")
    if name == "evaluate":
        add("--updates", metavar="FILE", help="its updates, as a function of the gradient and of time: likewise")
    add("--table", metavar="FILE", help="the table, as Markdown")
    add = command.add_argument_group("the race").add_argument
    add("--steps", metavar="N", type=int, default=100, help="length of the loss curves; default 100")
    add("--functions", metavar="N", type=int, default=100, help="how many functions; default 100")
    add("--seed", metavar="N", type=int, default=1, help="of the functions; default 1")
    if name == "compare":
        add("--baselines", nargs="+", choices=list(BASELINES), default=list(BASELINES), metavar="NAME",
            help=f"default all: {', '.join(BASELINES)}")
        add("--tuning-functions", metavar="N", type=int, default=32,
            help="other functions, to find each baseline's learning rate; default 32")


def add_problem(command):
    add = command.add_argument_group("the problem").add_argument
    add("--problem", choices=list(DEFAULTS), default="quadratics", help="functions to optimize; default quadratics")
    add("--dim", metavar="N", type=int, default=10, help="quadratics: dimensions; default 10")
    add("--hidden", metavar="N", type=int, nargs="*", default=[20], help="mnist: units of each hidden layer; default 20")
    add("--activation", choices=sorted(ACTIVATIONS), default="sigmoid", help="mnist: default sigmoid")
    add("--batch-size", metavar="N", type=int, nargs="+", default=[128],
        help="mnist, cifar10: images in a minibatch; mnist: or the least and the most, and each meta-batch draws its own; "
             "default 128")
    add("--classes", metavar="LABEL", type=int, nargs="+", help="cifar10: labels to tell apart; default all of 0 … 9")
    add("--held-out", metavar="LABEL", type=int, nargs="+", help="cifar10: labels to leave out; default none")
    add("--channels", metavar="N", type=int, nargs="+", help="cifar10: of each convolution; default 16 16 16")
    add("--fc-size", metavar="N", type=int, help="cifar10: units of the fully connected layer; default 32")
    add("--data", metavar="FOLDER", help="images: where they lie or are downloaded to; default $L2O_DATA, or data")


def add_general(command):
    add = command.add_argument_group("general").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default cuda if present, else cpu")
    add("--force", action="store_true", help="replace results that are there already")
    add("--quiet", action="store_true", help="no progress bars")


if __name__ == "__main__":
    sys.exit(main())
