"""A user's own optimizer and problem as first-class: files, the registry, the command line, from a folder of his own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_command_line import environment

import optimizers
from gradbuffer.checks import named_class
from optimizers import CoordinatewiseLSTM, PerKind, load_optimizer, register_optimizer, save_optimizer

ROOT = Path(__file__).resolve().parents[1]

MINE = '''
import torch
from torch import nn
from optimizees import MetaBatch


class Rate(nn.Module):
    """Gradient descent with a learned rate."""

    coordinatewise = True

    def __init__(self, rate=0.01):
        super().__init__()
        self.config = {"rate": rate}
        self.rate = nn.Parameter(torch.tensor([float(rate)]))

    def init_state(self, num_coordinates, device=None, dtype=None):
        return ()

    def forward(self, grad, state):
        return -self.rate * grad, state


class Bowls:
    """f = |x - c|²"""

    name = "bowls"

    def __init__(self, dim=3):
        self.dim = dim

    def sample(self, meta_batch, generator=None):
        c = torch.randn(meta_batch, self.dim, generator=generator)
        return MetaBatch({"x": torch.zeros(meta_batch, self.dim)}, lambda params, step: (params["x"] - c).square().sum(1))
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_user.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimizers, "LEARNED_OPTIMIZERS", dict(optimizers.LEARNED_OPTIMIZERS))
    yield named_class("mine_of_a_user:Rate")
    sys.modules.pop("mine_of_a_user")


def test_files(mine):
    save_optimizer(mine(0.3), "own.safetensors", problem="none")
    for network in (mine, "mine_of_a_user:Rate"):
        net = load_optimizer("own.safetensors", network=network)
        assert type(net) is mine and net.rate.item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match="holds a mine_of_a_user:Rate, which is not of this library: give its class"):
        load_optimizer("own.safetensors")
    with pytest.raises(ValueError, match="holds a mine_of_a_user:Rate"):
        load_optimizer("own.safetensors", network=CoordinatewiseLSTM)
    with pytest.raises(ValueError, match="'nothing:Here' must be module:Class"):
        load_optimizer("own.safetensors", network="nothing:Here")


def test_registered(mine):
    assert register_optimizer(mine) is mine and register_optimizer(mine) is mine
    save_optimizer(PerKind({"a": mine(0.1), "b": CoordinatewiseLSTM(3)}, {"a*": "a", "*": "b"}), "kinds.safetensors")
    assert load_optimizer("kinds.safetensors").networks["a"].rate.item() == pytest.approx(0.1)
    save_optimizer(mine(0.2), "own.safetensors")
    assert load_optimizer("own.safetensors").rate.item() == pytest.approx(0.2)
    with pytest.raises(ValueError, match="another learned optimizer is registered as CoordinatewiseLSTM"):
        register_optimizer(type("CoordinatewiseLSTM", (CoordinatewiseLSTM,), {}))


def test_what_cannot_be_written(mine):
    net = mine()
    net.config = "no dict"
    for given in (net, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="or a learned optimizer of your own with config"):
            save_optimizer(given, "x.safetensors")
    with pytest.raises(TypeError, match="the networks of a PerKind too"):
        save_optimizer(PerKind({"a": mine()}, {"*": "a"}), "x.safetensors")
    assert not Path("x.safetensors").exists()


def test_the_command_line(mine):
    def run(*words):
        program = [
            sys.executable,
            ROOT / "meta_training.py",
            *words,
            "--problem",
            "mine_of_a_user:Bowls",
            "--problem-options",
            '{"dim": 2}',
            "--network",
            "mine_of_a_user:Rate",
            "--quiet",
            "--device",
            "cpu",
        ]
        done = subprocess.run(list(map(str, program)), env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(
        "train",
        "--network-options",
        '{"rate": 0.02}',
        "--output",
        "own.safetensors",
        "--iterations",
        "30",
        "--lr",
        "0.02",
        "--meta-batch",
        "4",
        "--steps",
        "20",
        "--unroll",
        "10",
        "--history",
        "history.json",
    )
    history = json.loads(Path("history.json").read_text())
    assert history["validation"][-1][1] < 0.9 * history["validation"][0][1]
    assert "own" in run("evaluate", "own.safetensors", "--functions", "5")
    table = run(
        "compare",
        "own.safetensors",
        "--functions",
        "5",
        "--steps",
        "10",
        "--tuning-functions",
        "3",
        "--baselines",
        "SGD",
    )
    assert "own" in table and "SGD" in table and "bowls" in table
    run("train", "--start", "own.safetensors", "--output", "finer.safetensors", "--iterations", "2")
    assert load_optimizer("finer.safetensors", mine).rate.item() != 0
