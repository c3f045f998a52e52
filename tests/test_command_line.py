"""The command line: what it writes, what it refuses, and its exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from gradbuffer import command_line
from gradbuffer.command_line import main
from meta_training import History
from optimizers import (
    CoordinatewiseLSTM,
    NormalizedLSTM,
    load_optimizer,
    save_optimizer,
    start_as_adam,
    start_as_momentum,
)

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--dim",
    "2",
    "--units",
    "3",
    "--layers",
    "1",
    "--steps",
    "20",
    "--unroll",
    "5",
    "--meta-batch",
    "4",
    "--iterations",
    "12",
    "--validation-functions",
    "3",
    "--device",
    "cpu",
    "--quiet",
]
REFINE = [
    word for place, word in enumerate(SMALL) if not {"--units", "--layers"} & {*SMALL[max(place - 1, 0) : place + 1]}
]
CIFAR = ["--problem", "cifar10", "--channels", "2", "--fc-size", "3", "--batch-size", "6", "--device", "cpu", "--quiet"]
RACE = ["--dim", "2", "--steps", "10", "--functions", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def weights(path):
    return load_optimizer(path).state_dict()


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def names_in(path):
    """Whose rows a table has, without what is said of divergence."""
    rows = [row for row in Path(path).read_text().splitlines() if row.startswith("| ")][2:]
    return [row.split("|")[1].split("(")[0].strip() for row in rows]


def test_train_evaluate_compare(capsys):
    assert (
        main(
            ["train", "--output", "out/net.safetensors", "--history", "history.json", "--figure", "history.png", *SMALL]
        )
        == 0
    )
    assert "out/net.safetensors: validation score" in capsys.readouterr().out
    assert os.listdir("out") == ["net.safetensors"]  # the checkpoint of a finished run is gone
    history = json.loads(Path("history.json").read_text())
    assert len(history["meta_loss"]) == 12 and history["skipped"] == []
    assert Path("history.png").read_bytes().startswith(b"\x89PNG")

    assert main(["evaluate", "out/net.safetensors", "--updates", "updates.svg", "--table", "table.md", *RACE]) == 0
    printed = capsys.readouterr().out
    assert (
        "| net (diverged: 4 of 4) | diverged |" in printed
        and "Quadratics, 2 dimensions, 4 functions, seed 1" in printed
    )
    assert Path("table.md").read_text() == printed and Path("updates.svg").read_text().startswith("<?xml")

    assert (
        main(
            [
                "compare",
                "out/net.safetensors",
                "quadratics",
                "--figure",
                "curves.pdf",
                "--table",
                "curves.md",
                "--baselines",
                "SGD",
                "Adam",
                "--tuning-functions",
                "2",
                "--quiet",
                *RACE,
            ]
        )
        == 0
    )
    assert names_in("curves.md") == ["net", "quadratics", "SGD", "Adam"]
    assert Path("curves.pdf").read_bytes().startswith(b"%PDF")


def test_mnist_and_refining(tiny_mnist):
    assert (
        main(
            [
                "train",
                "--problem",
                "mnist",
                "--data",
                str(tiny_mnist),
                "--hidden",
                "3",
                "--batch-size",
                "2",
                "8",
                "--output",
                "net.safetensors",
                "--start",
                "mnist",
                "--unroll",
                "10",
                "--horizons",
                "1",
                "2",
                "--steps",
                "20",
                "--iterations",
                "3",
                "--validation-functions",
                "1",
                "--skip-non-finite",
                "1",
                "--objective",
                "log",
                "--quiet",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    refined = load_optimizer("net.safetensors")
    assert refined.config == load_optimizer("mnist").config and not same(weights("mnist"), refined.state_dict())


def test_starting_as_nag_with_the_true_meta_gradient(tiny_mnist):
    assert (
        main(
            [
                "train",
                "--problem",
                "mnist",
                "--data",
                str(tiny_mnist),
                "--hidden",
                "3",
                "--batch-size",
                "8",
                "--output",
                "net.safetensors",
                "--start-as-nag",
                "0.5",
                "--sign-lr",
                "0.1",
                "--sign-fade",
                "12",
                "--second-order",
                "--adjoint-bound",
                "1.5",
                "--mirrored",
                "--meta-batch",
                "2",
                "--random-signs",
                "--unroll",
                "5",
                "--steps",
                "10",
                "--iterations",
                "2",
                "--lr",
                "1e-6",
                "--quiet",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    started = start_as_momentum(
        CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1), 0.5, sign_lr=0.1, sign_fade=12
    )
    assert torch.allclose(load_optimizer("net.safetensors").output.weight, started.output.weight, atol=1e-4)


def test_starting_as_adam_on_small_images(small_mnist):
    assert (
        main(
            [
                "train",
                "--problem",
                "mnist",
                "--data",
                str(small_mnist),
                "--hidden",
                "3",
                "--batch-size",
                "8",
                "--side",
                "14",
                "--network",
                "normalized",
                "--layers",
                "1",
                "--start-as-adam",
                "0.02",
                "--fade",
                "50",
                "--betas",
                "0.5",
                "0.7",
                "--output",
                "net.safetensors",
                "--unroll",
                "5",
                "--steps",
                "10",
                "--iterations",
                "2",
                "--lr",
                "1e-6",
                "--quiet",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    loaded, started = (
        load_optimizer("net.safetensors"),
        start_as_adam(NormalizedLSTM(betas=(0.5, 0.7), fade=50.0), 0.02),
    )
    assert loaded.config == started.config
    assert torch.allclose(loaded.output.weight, started.output.weight, atol=1e-4)


def test_part_of_the_start_is_kept():
    start_as_adam(net := NormalizedLSTM(num_layers=1), 0.02)
    save_optimizer(net, "start.safetensors")
    for share in ("0", "0.25"):
        assert (
            main(
                [
                    "train",
                    *REFINE,
                    "--start",
                    "start.safetensors",
                    "--keep-of-start",
                    share,
                    "--output",
                    f"{share}.safetensors",
                ]
            )
            == 0
        )
    whole, part = weights("0.safetensors"), weights("0.25.safetensors")
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(part[name], 0.75 * whole[name] + 0.25 * tensor)
    assert not same(whole, net.state_dict())


def test_cifar10_with_an_optimizer_for_each_kind(small_cifar, capsys):
    cifar, short = [*CIFAR, "--data", str(small_cifar)], ["--steps", "4", "--functions", "2", "--seed", "3"]
    assert (
        main(
            [
                "train",
                *cifar,
                "--output",
                "sub.safetensors",
                "--per-kind",
                "--odd",
                "--start-as-nag",
                "0.5",
                "0.25",
                "--sign-lr",
                "0.02",
                "--held-out",
                "0",
                "1",
                "7",
                "--steps",
                "4",
                "--unroll",
                "2",
                "--iterations",
                "2",
                "--lr",
                "1e-6",
                "--validation-functions",
                "1",
            ]
        )
        == 0
    )
    trained = load_optimizer("sub.safetensors")
    assert list(trained.networks) == ["conv", "fc"] and all(net.odd for net in trained.networks.values())
    for net, lr in zip(trained.networks.values(), (0.5, 0.25)):
        started = start_as_momentum(
            CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.01, odd=True), lr, sign_lr=0.02
        )
        torch.testing.assert_close(net.output.weight, started.output.weight, atol=1e-4, rtol=0)
        assert not torch.equal(net.output.weight, started.output.weight)

    assert main(["evaluate", "sub.safetensors", *cifar, *short, "--classes", "7", "0", "--table", "one.md"]) == 0
    assert "labels 7 0, 2 channels and 3 units, 2 functions, seed 3" in capsys.readouterr().out
    assert (
        main(
            [
                "compare",
                "sub.safetensors",
                *cifar,
                *short,
                "--held-out",
                "2",
                "3",
                "4",
                "5",
                "6",
                "8",
                "9",
                "1",
                "--baselines",
                "NAG",
                "--tuning-functions",
                "1",
                "--table",
                "both.md",
            ]
        )
        == 0
    )
    assert "labels 0 7, 2 channels" in capsys.readouterr().out
    assert names_in("both.md") == ["sub", "NAG"]


def test_cifar10_with_one_optimizer_for_all(small_cifar):
    cifar = [
        *CIFAR,
        "--data",
        str(small_cifar),
        "--steps",
        "2",
        "--unroll",
        "2",
        "--iterations",
        "1",
        "--validation-functions",
        "1",
    ]
    assert main(["train", *cifar, "--output", "net.safetensors"]) == 0
    assert load_optimizer("net.safetensors").config["preprocess"] == "log_sign"


def test_rnnprop_with_random_scaling():
    assert main(["train", "--output", "net.safetensors", *SMALL, "--network", "rnnprop", "--random-scaling", "2"]) == 0
    assert load_optimizer("net.safetensors").config["hidden_size"] == 3


@pytest.mark.parametrize("network, name", [("gac", "LSTMWithGAC"), ("ntm", "NTMBFGS")])
def test_networks_that_share(tiny_mnist, capsys, network, name):
    train = ["train", "--network", network, "--shared", "2", "--odd", "--preprocess", "with_log_size"]
    assert main([*train, *SMALL, "--output", "net.safetensors"]) == 0
    loaded = load_optimizer("net.safetensors")
    assert type(loaded).__name__ == name and loaded.config["shared"] == 2 and loaded.odd
    assert main(["evaluate", "net.safetensors", *RACE]) == 0
    assert (
        main(
            [
                *train,
                "--output",
                "mnist.safetensors",
                "--problem",
                "mnist",
                "--data",
                str(tiny_mnist),
                "--hidden",
                "3",
                "--batch-size",
                "8",
                "--steps",
                "4",
                "--unroll",
                "2",
                "--iterations",
                "2",
                "--quiet",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert main([*train, *SMALL, "--output", "nag.safetensors", "--start-as-nag", "1"]) == 2
    assert f"--start-as-nag is for --network lstm, got --network {network}" in capsys.readouterr().err


def test_curriculum_and_imitation(capsys):
    train = ["train", *SMALL, "--curriculum", "5", "10", "--patience", "1", "--validation-every", "1", "--lr", "1"]
    assert (
        main(
            [
                *train,
                "--output",
                "one.safetensors",
                "--history",
                "one.json",
                "--teacher",
                "nag",
                "--teacher-lr",
                "0.01",
                "--imitation",
                "0.3",
                "--imitation-weight",
                "10",
            ]
        )
        == 0
    )
    history = json.loads(Path("one.json").read_text())
    assert 0 < len(history["imitation"]) < 12 and len(history["stages"]) > 1
    assert f"(sum of the loss over {history['stages'][-1][1]} steps)" in capsys.readouterr().out
    assert main([*train, "--output", "other.safetensors", "--teacher", "one.safetensors", "--imitation", "1"]) == 0


def test_results_are_not_replaced_silently(capsys):
    train = ["train", "--output", "net.safetensors", *SMALL]
    assert main(train) == 0
    content = Path("net.safetensors").read_bytes()
    assert main([*train, "--seed", "5"]) == 2
    assert "net.safetensors is there already: --force replaces it" in capsys.readouterr().err
    assert Path("net.safetensors").read_bytes() == content
    assert main([*train, "--seed", "5", "--force"]) == 0 and Path("net.safetensors").read_bytes() != content
    Path("table.md").write_text("mine")
    assert main(["evaluate", "net.safetensors", "--table", "table.md", *RACE]) == 2
    assert Path("table.md").read_text() == "mine"
    assert main(["evaluate", "net.safetensors", "--table", "table.md", "--force", *RACE]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--output", "x.safetensors", *SMALL, "--unroll", "7"], "unroll must divide steps, got unroll=7"),
        (["train", "--output", "x.safetensors", *SMALL, "--lr", "-1"], "lr must be a positive number, got -1.0"),
        (["train", "--output", "x.safetensors", *REFINE, "--start", "nothing"], "no file 'nothing'"),
        (
            ["train", "--output", "x.safetensors", *SMALL, "--figure", "x.doc"],
            "--figure must end in one of .* got 'x.doc'",
        ),
        (
            ["train", "--output", "x.safetensors", *SMALL, "--start-as-nag", "1"],
            'preprocess="log_sign" to start as momentum',
        ),
        (["train", "--output", "x.safetensors", *SMALL, "--curriculum", "7"], "multiples of unroll=5 below steps=20"),
        (["train", "--output", "x.safetensors", *SMALL, "--teacher", "adam", "--imitation", "1"], "needs --teacher-lr"),
        (
            [
                "train",
                "--output",
                "x.safetensors",
                *SMALL,
                "--teacher",
                "mnist",
                "--teacher-lr",
                "1",
                "--imitation",
                "1",
            ],
            "--teacher-lr is for",
        ),
        (["train", "--output", "x.safetensors", *SMALL, "--teacher", "nobody", "--imitation", "1"], "no file 'nobody'"),
        (["train", "--output", "x.safetensors", *SMALL, "--imitation", "1"], "--imitation needs --teacher"),
        (["train", "--output", "x.safetensors", *SMALL, "--random-scaling", "-1"], "radius must be a number"),
        (
            ["train", "--output", "x.safetensors", *SMALL, "--keep-of-start", "1"],
            r"--keep-of-start must be in \[0, 1\)",
        ),
        (["train", "--output", "x.safetensors", *SMALL, "--side", "14"], "--side is for --problem mnist"),
        (
            ["train", "--output", "x.safetensors", *SMALL, "--start-as-adam", "1"],
            "--start-as-adam is for --network norm",
        ),
        (["train", "--output", "x.safetensors", *SMALL, "--fade", "1"], "--fade is for --network normalized"),
        (["train", "--output", "x.safetensors", *SMALL, "--betas", "0.5"], "--betas is for --network normalized"),
        (
            ["train", "--output", "x.safetensors", *SMALL, "--network", "normalized", "--betas", "1.5"],
            "betas and square_beta must be in",
        ),
        (["train", "--output", "x.safetensors", *SMALL, "--per-kind"], "--per-kind is for --problem cifar10"),
        (
            ["train", "--output", "x.safetensors", *SMALL, "--start-as-nag", "1", "2"],
            r"--start-as-nag must be 1 number without --per-kind, got \[1.0, 2.0\]",
        ),
        (
            [
                "train",
                "--output",
                "x.safetensors",
                *CIFAR,
                "--per-kind",
                "--start-as-nag",
                "1",
                "--sign-lr",
                "1",
                "2",
                "3",
            ],
            "--sign-lr must be 1 or 2 numbers with --per-kind",
        ),
        (
            ["evaluate", "mnist", *RACE, "--fc-size", "0"],
            "--fc-size is for --problem cifar10, got --problem quadratics",
        ),
        (
            ["evaluate", "mnist", *RACE[2:], "--problem", "mnist", "--classes", "1", "2"],
            "--classes is for --problem cifar10",
        ),
        (
            ["evaluate", "mnist", *CIFAR, "--batch-size", "2", "4"],
            "--batch-size must be 1 number with --problem cifar10",
        ),
        (
            ["evaluate", "mnist", *CIFAR, "--classes", "1", "2", "--held-out", "3"],
            "--held-out has no effect with --classes",
        ),
        (
            ["evaluate", "mnist", *CIFAR, "--held-out", "3", "10"],
            r"--held-out must be different labels .* got \[3, 10\]",
        ),
        (
            ["train", "--output", "x.safetensors", *CIFAR, "--per-kind", "--start", "mnist"],
            "--per-kind has no effect with --start mnist",
        ),
        (["evaluate", "nothing", *RACE], "no file 'nothing', and no pretrained optimizer of that name"),
        (["compare", "quadratics", "quadratics", *RACE], "files must have different names"),
        (
            ["train", "--output", "x.safetensors", *SMALL, "--device", "nonsense"],
            "--device must be cpu, or cuda .* got 'nonsense'",
        ),
        (["evaluate", "quadratics", *RACE, "--device", "meta"], "--device must be cpu, or cuda .* got 'meta'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error) and not os.path.exists("x.safetensors")


NOT_SO = {  # for every option that others depend on, words with which they have no effect
    "problem": {"quadratics": ["--problem", "quadratics"], "mnist": ["--problem", "mnist"]},
    "start": ["--start", "mnist"],
    "network": {
        "lstm": ["--network", "lstm"],
        "rnnprop": ["--network", "rnnprop"],
        "own:Net": ["--network", "own:Net"],
    },
    "start_as_nag": [],
    "sign_lr": ["--start-as-nag", "1"],
    "classes": ["--problem", "cifar10", "--classes", "1", "2"],
    "curriculum": [],
    "teacher": [],
    "imitation": ["--teacher", "mnist"],
    "second_order": [],
    "method": {"replay": []},
}
OFF = {(): [], "all imitation": ["--teacher", "mnist", "--imitation", "1"], "curriculum": ["--curriculum", "20"]}


def example(command, name):
    """The option with a value that it takes."""
    action = next(action for action in command._actions if action.dest == name)
    if action.nargs == 0:
        return [action.option_strings[0]]
    value = (
        str(action.choices[0])
        if action.choices
        else {int: "7", float: "0.5", command_line.json_dict: "{}"}.get(
            action.type, "lstm" if name == "network" else "mnist"
        )
    )
    return [action.option_strings[0], *[value] * (2 if action.nargs == 2 else 1)]


def without_effect():
    """Each option of the table, beside others with which it does nothing."""
    for names, needed, values in command_line.NEEDS:
        if values == command_line.ON or values == (True,):
            beside = NOT_SO[needed]
        elif isinstance(values, range):
            beside = OFF["all imitation"]
        elif values == command_line.CLASS:
            beside = []
        elif values == (None,):
            beside = OFF["curriculum"] if needed == "curriculum" else NOT_SO[needed]
        else:
            beside = next(words for value, words in NOT_SO[needed].items() if value not in values)
        for name in names.split():
            yield pytest.param(name, beside, id=f"{name} beside {' '.join(beside)}")


@pytest.fixture
def commands():
    parser = command_line.make_parser()
    return next(
        action for action in parser._actions if action.dest == "run" or hasattr(action, "choices") and action.choices
    ).choices


@pytest.mark.parametrize("name, beside", without_effect())
def test_an_option_without_effect_is_refused(commands, capsys, name, beside):
    assert (
        main(["train", "--output", "x.safetensors", *beside, *example(commands["train"], name), "--device", "cpu"]) == 2
    )
    assert re.match(f"error: {command_line.flag(name)} (needs|is for|has no effect with) --", capsys.readouterr().err)
    assert os.listdir() == []


def test_every_option_is_in_the_table_or_always_has_an_effect(commands):
    always = {
        "output",
        "history",
        "figure",
        "tensorboard",
        "checkpoint",
        "checkpoint_every",
        "start",
        "keep_of_start",
        "steps",
        "unroll",
        "curriculum",
        "meta_batch",
        "iterations",
        "lr",
        "warmup",
        "clip",
        "replay_fraction",
        "averaging",
        "random_scaling",
        "random_signs",
        "mirrored",
        "network",
        "skip_non_finite",
        "balance",
        "on_mismatch",
        "validation_every",
        "validation_functions",
        "seed",
        "problem",
        "device",
        "force",
        "quiet",
        "help",
        "net",
        "nets",
        "table",
        "updates",
        "functions",
        "baselines",
        "tuning_functions",
    }
    dependent = {name for names, _, _ in command_line.NEEDS for name in names.split()}
    there = {action.dest for command in commands.values() for action in command._actions}
    assert there == always | dependent and not always & dependent


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["train", "--output", "x", "--checkpoint", "x", *SMALL],
            "--output and --checkpoint must be different files, got x",
        ),
        (["train", "--output", "x", "--history", "./x", *SMALL], "--output and --history must be different"),
        (
            ["train", "--output", "x", "--history", "y.png", "--figure", "y.png", *SMALL],
            "--history and --figure must be",
        ),
        (
            ["train", "--output", "x", "--history", "x.checkpoint", *SMALL],
            "--history and the checkpoint of --output must be",
        ),
        (
            ["train", "--output", "x", "--teacher", "x", "--imitation", "1", *SMALL],
            "--output and --teacher must be different",
        ),
        (
            ["train", "--output", "x", "--start", "y", "--history", "y", *REFINE],
            "--history and --start must be different",
        ),
        (["compare", "x", "y", "--table", "y", *RACE], "--table and the optimizer y must be different files"),
        (
            ["evaluate", "x", "--figure", "x.png", "--updates", "x.png", *RACE],
            "--figure and --updates must be different",
        ),
    ],
)
def test_no_two_options_name_one_file(words, message, capsys):
    assert main([*words, *["--force"] * (words[0] != "train")]) == 2
    assert message in capsys.readouterr().err and os.listdir() == []


def test_a_start_replaced_by_the_run_that_refines_it(monkeypatch):
    """The run dies as it has written its result over what it started from; run again, it keeps a part of the old weights."""
    start = NormalizedLSTM(3, 1)
    save_optimizer(start_as_adam(start, 0.02), "x.safetensors")
    train = ["train", *REFINE, "--start", "x.safetensors", "--keep-of-start", "0.5", "--force", "--output"]
    assert main([*train, "whole.safetensors"]) == 0

    def dies(*arguments, **options):
        written(*arguments, **options)
        raise OSError(5, "the machine went down")

    written = command_line.save_optimizer
    monkeypatch.setattr(command_line, "save_optimizer", dies)
    assert main([*train, "x.safetensors"]) == 1
    assert same(weights("whole.safetensors"), weights("x.safetensors")) and os.path.exists("x.safetensors.checkpoint")
    monkeypatch.setattr(command_line, "save_optimizer", written)
    assert main([*train, "x.safetensors"]) == 0
    assert same(weights("whole.safetensors"), weights("x.safetensors")) and not os.path.exists(
        "x.safetensors.checkpoint"
    )


def test_interrupted_before_anything_was_learned(monkeypatch, capsys):
    """Nothing is written then, so that the same command is not refused."""
    train = ["train", "--output", "net.safetensors", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(command_line, "meta_train", lambda *arguments, **options: History(interrupted=True))
        assert main(train) == 130
    assert "interrupted before the first iteration was done: nothing is written" in capsys.readouterr().err
    assert os.listdir() == [] and main(train) == 0


def test_a_reader_that_stops_early():
    """Tables and figures are written before anything is printed, and whoever has read enough is no failure."""
    command = [
        sys.executable,
        ROOT / "meta_training.py",
        "evaluate",
        "quadratics",
        *RACE,
        "--table",
        "t.md",
        "--figure",
        "f.png",
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(timeout=100) == 0, process.stderr.read()
    assert process.stderr.read() == "" and Path("t.md").read_text() and Path("f.png").read_bytes()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["evaluate", "quadratics", *RACE]])
def test_a_terminal_that_shows_ascii_only(words):
    plain = {**environment(), "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, ROOT / "meta_training.py", *words], env=plain, capture_output=True, timeout=100
    )
    assert result.returncode == 0 and result.stdout and not result.stderr, result.stderr


def test_what_argparse_refuses(capsys):
    for arguments in ([], ["teach"], ["train"], ["train", "--output", "x", "--problem", "cifar"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"], ["compare", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
    assert "default 64 (quadratics), 1 (mnist), 1 (cifar10)" in " ".join(capsys.readouterr().out.split())


def test_a_failed_run_goes_on_and_says_so(monkeypatch, capsys):
    train = ["train", "--output", "net.safetensors", "--checkpoint-every", "3", *SMALL]
    assert main(["train", "--output", "whole.safetensors", *SMALL]) == 0

    def fail_at(error, iteration):
        def meta_train(*arguments, callback=None, **options):
            def fail(done, history):
                if done == iteration:
                    raise error

            return original(*arguments, callback=fail, **options)

        return meta_train

    original = command_line.meta_train
    for error, iteration, status in (
        (OSError(28, "No space left on device"), 4, 1),
        (RuntimeError("another process has died"), 7, 1),
        (KeyboardInterrupt(), 10, 130),
    ):
        monkeypatch.setattr(command_line, "meta_train", fail_at(error, iteration))
        assert main(train) == status
        assert os.path.exists("net.safetensors.checkpoint")
        assert os.path.exists("net.safetensors") == (status == 130)  # the best so far
    printed = capsys.readouterr().err
    assert "No space left on device" in printed and "interrupted after 10 of 12 iterations; the best" in printed
    monkeypatch.setattr(command_line, "meta_train", original)
    assert main([*train, "--lr", "0.1"]) == 2
    assert "another run: lr was 0.005 and is 0.1" in capsys.readouterr().err
    assert main(train) == 0
    assert "going on from net.safetensors.checkpoint" in capsys.readouterr().err
    assert same(weights("whole.safetensors"), weights("net.safetensors"))


def test_exploding_training_fails(capsys):
    net = CoordinatewiseLSTM(2, 1, output_scale=1e30)
    save_optimizer(net, "explodes.safetensors")
    train = ["train", "--output", "net.safetensors", "--start", "explodes.safetensors", *REFINE]
    assert main(train) == 1
    assert "meta-training stopped at iteration 0: " in capsys.readouterr().err
    assert os.listdir() == ["explodes.safetensors"]


def test_cuda_graph_without_cuda(tiny_mnist, capsys):
    """It takes all coordinates, whatever the problem's default, and then says what is missing."""
    assert (
        main(
            [
                "train",
                "--problem",
                "mnist",
                "--data",
                str(tiny_mnist),
                "--hidden",
                "3",
                "--cuda-graph",
                "--quiet",
                "--iterations",
                "1",
                "--validation-functions",
                "1",
                "--output",
                "net.safetensors",
                "--device",
                "cpu",
            ]
        )
        == 1
    )
    assert "a CUDA graph needs a CUDA device, the window lies on cpu" in capsys.readouterr().err


def test_tensorboard(monkeypatch, capsys):
    class SummaryWriter:
        scalars = []

        def __init__(self, folder, purge_step):
            self.scalars.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.scalars.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    assert main(["train", "--output", "net.safetensors", "--tensorboard", "logs", *SMALL]) == 2
    assert "--tensorboard needs the package tensorboard (pip install tensorboard)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    assert main(["train", "--output", "net.safetensors", "--tensorboard", "logs", "--history", "h.json", *SMALL]) == 0
    scalars, history = SummaryWriter.scalars, json.loads(Path("h.json").read_text())
    assert scalars[0] == ("logs", 1) and scalars[-1] == "closed"
    losses = [entry[1:] for entry in scalars if entry[0] == "meta-loss"]
    assert losses == list(zip(history["meta_loss"], range(1, 13)))
    assert [list(entry[:0:-1]) for entry in scalars if entry[0] == "validation"] == history["validation"]


def hear_ctrl_c():
    """A shell starts what runs in its background deaf to Ctrl-C, the tests and their children included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_as_a_program():
    command = [
        sys.executable,
        ROOT / "meta_training.py",
        "train",
        "--output",
        "net.safetensors",
        *SMALL,
        "--iterations",
        "100000",
        "--validation-every",
        "5",
    ]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    try:
        for _ in range(1200):
            time.sleep(0.1)
            if os.path.exists("net.safetensors.checkpoint"):
                if torch.load("net.safetensors.checkpoint", weights_only=True)["content"]["iteration"] >= 10:
                    break
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, message
    assert "the best optimizer so far" in message and "The same command goes on" in message
    assert load_optimizer("net.safetensors").config["hidden_size"] == 3


def test_torchrun():
    """Two gloo processes by torch's own launcher, and what one process makes of the same arguments."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        ROOT / "meta_training.py",
        "train",
        "--output",
        "two.safetensors",
        *SMALL,
    ]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and result.stdout.count("two.safetensors: validation score") == 1, result.stderr
    assert main(["train", "--output", "one.safetensors", *SMALL]) == 0
    two = weights("two.safetensors")
    for name, weight in weights("one.safetensors").items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_no_thread_of_the_process_group_is_left():
    """One that ran on could abort the process at its end, with the results written."""
    program = """if True:
        import pathlib, sys
        from gradbuffer.command_line import main
        status = main(sys.argv[1:])
        print(status, sorted(path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, "train", "--output", "one.safetensors", *SMALL]
    result = subprocess.run(command, env=environment() | alone, capture_output=True, text=True, timeout=200)
    assert result.stdout.splitlines()[-1].startswith("0 ["), result.stderr
    assert "gloo" not in result.stdout
