"""The flags of the command line: those of meta-training are read off the option classes."""

import argparse
import json
from dataclasses import MISSING, fields
from typing import get_args

import torch

from gradbuffer.nets.readings import READINGS
from gradbuffer.training.evolution import PES
from gradbuffer.training.meta_gradients import Replay
from gradbuffer.training.options import Checkpoint, Curriculum, Training, Validation, default_of, help_of
from meta_training import BASELINES
from optimizees import ACTIVATIONS
from optimizers import NTMBFGS, LSTMWithGAC

__all__ = ["DEFAULTS", "KINDS", "MEASURED", "OWN", "SHARING", "flag", "json_dict", "make_parser"]

DEFAULTS = {  # what suits each problem
    "quadratics": dict(
        meta_batch=64,
        iterations=1500,
        lr=0.005,
        clip=30.0,
        replay_fraction=1.0,
        validation_functions=256,
        preprocess="none",
        output_scale=1.0,
        tuning_functions=256,
    ),
    "mnist": dict(
        meta_batch=1,
        iterations=450,
        lr=0.005,
        clip=20.0,
        replay_fraction=1 / 16,
        validation_functions=4,
        preprocess="log_sign",
        output_scale=0.1,
        tuning_functions=32,
    ),
    "cifar10": dict(
        meta_batch=1,
        iterations=200,
        lr=0.001,
        clip=10.0,
        replay_fraction=1.0,
        validation_functions=2,
        preprocess="log_sign",
        output_scale=0.01,
        channels=(16, 16, 16),
        fc_size=32,
        tuning_functions=32,
    ),
}
OWN = dict(preprocess="log_sign", output_scale=0.1, tuning_functions=32) | {
    name: default_of(Training, name) for name in ("meta_batch", "iterations", "lr", "clip")
}
OWN |= dict(
    replay_fraction=1.0, validation_functions=default_of(Validation, "validation_functions")
)  # of a problem of a user's own
SHARING = {"gac": LSTMWithGAC, "ntm": NTMBFGS}  # networks whose coordinates are not independent
KINDS = ("conv", "fc")  # of parameters, by which `CIFAR10Net` names them
MEASURED = (
    {"method", "horizons", "imitation", "imitation_weight"}
    | {own.name for cls in (Training, Replay, PES, Curriculum, Validation) for own in fields(cls)}
) - {"checkpoint", "teacher"}  # for meta_train


def flag(name):
    return f"--{name.replace('_', '-')}"


def make_parser(run_train, run_evaluate, run_compare, defaults=True):
    """The parser of these commands; with defaults=False one whose result holds only what was given."""
    parser = argparse.ArgumentParser(
        prog="meta_training.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Learning to optimize: train an LSTM to be an optimizer, and race it against SGD, Adam and others.",
        epilog="first steps (a few minutes on a CPU):\n"
        "  python meta_training.py train --output mine.safetensors\n"
        "  python meta_training.py compare mine.safetensors --figure curves.png\n\n"
        "several processes: torchrun --nproc-per-node=2 meta_training.py train --output mine.safetensors\n"
        "exit status: 0 done, 1 the run failed, 2 wrong arguments or a result is there already, 130 interrupted",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, what in (
        ("train", run_train, "meta-train a learned optimizer; interrupted or killed, the same command goes on"),
        ("evaluate", run_evaluate, "run a trained optimizer on functions that it has not seen"),
        ("compare", run_compare, "race trained optimizers against hand-designed ones with tuned learning rates"),
    ):
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


def one_of(*names):
    """A type of argument: one of these names, or module:Class."""

    def name_or_class(text):
        if text not in names and ":" not in text:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, or module:Class; got {text!r}")
        return text

    return name_or_class


def json_dict(text):
    """A type of argument: a dict in JSON."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a dict in JSON, got {text}")
    return found


def by_problem(name):
    """The part of a help text that says the default of each problem."""
    return "default " + ", ".join(
        f"{defaults[name]:g} ({problem})" if not isinstance(defaults[name], str) else f"{defaults[name]} ({problem})"
        for problem, defaults in DEFAULTS.items()
    )


def add_training(command):
    add = command.add_argument_group("results").add_argument
    add("--output", metavar="FILE", required=True, help="the trained optimizer, a safetensors file")
    add("--history", metavar="FILE", help="what happened in each iteration, as JSON")
    add("--figure", metavar="FILE", help="the same as a figure: .png, .pdf or .svg")
    add("--tensorboard", metavar="FOLDER", help="write TensorBoard's scalars there; needs the package tensorboard")
    add("--checkpoint", metavar="FILE", help="keeps the state of an unfinished run; default OUTPUT.checkpoint")
    add_fields(add, Checkpoint, but=("checkpoint",))

    add = command.add_argument_group("the learned optimizer").add_argument
    add("--start", metavar="FILE", help="refine this optimizer (a file or a name in pretrained/) instead of a new one")
    add(
        "--network",
        metavar="NAME",
        type=one_of("lstm", "gac", "ntm", "rnnprop", "normalized"),
        default="lstm",
        help="lstm, gac, ntm, rnnprop, normalized, or module:Class, one of your own. lstm: Andrychowicz et al. 2016; "
        "gac, ntm: LSTM+GAC and NTM-BFGS from there, whose coordinates share "
        "information; rnnprop: Lv et al. 2017, which reads what Adam would do; normalized: the same over several "
        "horizons, and the time; default lstm",
    )
    add(
        "--network-options",
        metavar="JSON",
        type=json_dict,
        default={},
        help="with --network module:Class: its arguments, such as '{\"units\": 3}'",
    )
    add(
        "--keep-of-start",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="write weights this far back from the trained ones to those training began with, which often hold better on "
        "other problems (Wortsman et al. 2022, arXiv 2109.01903); the validation score is of the trained ones; "
        "default 0",
    )
    add(
        "--start-as-adam",
        metavar="LR",
        type=float,
        help="normalized: weights that make the steps of Adam with this learning rate, which fades",
    )
    add(
        "--betas",
        metavar="B",
        type=float,
        nargs="+",
        help="normalized: of the averages of the gradient that it reads; Adam's is the second; default 0.5 0.9 0.97",
    )
    add(
        "--fade", metavar="N", type=float, help="normalized: steps after which that is half of what it was; default 300"
    )
    add(
        "--start-as-nag",
        metavar="LR",
        type=float,
        nargs="+",
        help="lstm with log_sign: weights that make the steps of Nesterov momentum with this learning rate; with "
        "--per-kind one for all or one for each",
    )
    add(
        "--sign-lr",
        metavar="X",
        type=float,
        nargs="+",
        default=[0.0],
        help="with --start-as-nag: first steps by sign beside it, of this size (or one for each kind); default 0",
    )
    add(
        "--sign-fade", metavar="N", type=float, default=8, help="steps after which a quarter of that is left; default 8"
    )
    add(
        "--per-kind",
        action="store_true",
        help=f"cifar10: two of these with weights of their own, for {' and '.join(KINDS)} parameters, trained together",
    )
    add("--units", metavar="N", type=int, default=20, help="hidden units of the LSTM; default 20")
    add("--layers", metavar="N", type=int, default=2, help="layers of the LSTM; default 2")
    add("--shared", metavar="N", type=int, default=5, help="gac, ntm: averaged cells of each layer; default 5")
    add(
        "--preprocess",
        choices=("none", *filter(None, READINGS)),
        help=f"of the gradients it reads, with_log_size for gac and ntm; {by_problem('preprocess')}",
    )
    add("--odd", action="store_true", help="all but rnnprop: keep to LSTMs that answer -gradient with exactly -update")
    add("--output-scale", metavar="X", type=float, help=f"factor on its updates; {by_problem('output_scale')}")

    add = command.add_argument_group("meta-training").add_argument
    add_fields(add, Training)
    add(
        "--method",
        choices=("replay", "autograd", "pes"),
        default="replay",
        help="the way to the meta-gradient; default replay",
    )
    add_fields(add, Replay)
    add_fields(add, PES, but=("objective",))
    add(
        "--horizons",
        metavar=("LEAST", "MOST"),
        type=int,
        nargs=2,
        help="draw the number of windows at random between these, instead of always steps / unroll",
    )
    add_fields(add, Curriculum)
    add(
        "--teacher",
        metavar="NAME",
        help="imitate this optimizer: one of "
        f"{', '.join(name.lower() for name in BASELINES)}, or a learned one (a file or a name in pretrained/)",
    )
    add("--teacher-lr", metavar="X", type=float, help="learning rate of a hand-designed teacher")
    add(
        "--imitation",
        metavar="X",
        type=float,
        default=0.0,
        help="with --teacher: share of the training that imitates, the rest lowers the loss; default 0",
    )
    add(
        "--imitation-weight",
        metavar="X",
        type=float,
        default=1.0,
        help="factor on the imitation loss, beside the functions' own; default 1",
    )
    add_fields(add, Validation)
    add("--side", metavar="N", type=int, help="mnist: train on images averaged down to N × N pixels, such as 14")
    add(
        "--random-scaling",
        metavar="RADIUS",
        type=float,
        help="train in other coordinates, each scaled by e^u, u uniform on ±RADIUS",
    )
    add("--random-signs", action="store_true", help="and each with a random sign")
    add(
        "--mirrored",
        action="store_true",
        help="every function beside its mirror image f(-θ), which takes most of the noise out; an even --meta-batch",
    )


def add_fields(add, cls, but=()):
    """Flags for the fields of an options' class that hold numbers, text or switches, with their help from its docstring."""
    texts = help_of(cls)
    for own in fields(cls):
        kinds = [kind for kind in (get_args(own.type) or (own.type,)) if kind in (bool, int, float, str, tuple)]
        if own.name in but or not kinds:
            continue
        by_problems = own.name in OWN
        default = None if own.default is MISSING or by_problems else own.default
        said = f"{texts[own.name].rstrip('.')}; {by_problem(own.name)}" if by_problems else texts[own.name]
        if default is not None and default is not False and "default" not in said.lower():
            said = (
                f"{said.rstrip('.')}; default {default:g}"
                if isinstance(default, (int, float))
                else f"{said.rstrip('.')}; default {default}"
            )
        kind = (
            dict(action="store_true" if own.type is bool else argparse.BooleanOptionalAction)
            if kinds[0] is bool
            else dict(metavar="N", type=int, nargs="+")
            if kinds[0] is tuple
            else dict(metavar={int: "N", float: "X", str: "NAME"}[kinds[0]], type=kinds[0])
        )
        add(flag(own.name), default=default, help=said.replace("`", "").replace("%", "%%"), **kind)


def add_racing(command, name):
    if name == "evaluate":
        command.add_argument("net", metavar="OPTIMIZER", help="a trained optimizer: a file, or a name in pretrained/")
    else:
        command.add_argument(
            "nets", metavar="OPTIMIZER", nargs="+", help="trained optimizers: files, or names in pretrained/"
        )
    command.add_argument("--network", metavar="module:Class", help="the class of optimizers of your own")
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
        add(
            "--baselines",
            nargs="+",
            choices=list(BASELINES),
            default=list(BASELINES),
            metavar="NAME",
            help=f"default all: {', '.join(BASELINES)}",
        )
        add(
            "--tuning-functions",
            metavar="N",
            type=int,
            help=f"other functions, to find each baseline's learning rate; {by_problem('tuning_functions')}",
        )


def add_problem(command):
    add = command.add_argument_group("the problem").add_argument
    add(
        "--problem",
        metavar="NAME",
        type=one_of(*DEFAULTS),
        default="quadratics",
        help=f"functions to optimize: {', '.join(DEFAULTS)}, or module:Class, one of your own; default quadratics",
    )
    add(
        "--problem-options",
        metavar="JSON",
        type=json_dict,
        default={},
        help="with --problem module:Class: its arguments, such as '{\"dim\": 3}'",
    )
    add("--dim", metavar="N", type=int, default=10, help="quadratics: dimensions; default 10")
    add(
        "--hidden", metavar="N", type=int, nargs="*", default=[20], help="mnist: units of each hidden layer; default 20"
    )
    add("--activation", choices=sorted(ACTIVATIONS), default="sigmoid", help="mnist: default sigmoid")
    add(
        "--batch-size",
        metavar="N",
        type=int,
        nargs="+",
        default=[128],
        help="mnist, cifar10: images in a minibatch; mnist: or the least and the most, and each meta-batch draws its own; "
        "default 128",
    )
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
