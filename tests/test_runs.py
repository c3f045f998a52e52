"""Trainings under way: what is kept of them can be taken up, and is what was kept."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from gradbuffer.training.checkpoints import read_checkpoint
from gradbuffer.training.episodic_run import EpisodicRun
from gradbuffer.training.options import training_of
from meta_training import EpisodicES
from optimizees import Perceptrons
from optimizers import MLPOptimizer

SCRIPT = Path(__file__).resolve().parents[1] / "gradbuffer" / "pretrained" / "runs" / "general_mlp.py"


def test_the_state_of_the_general_optimizers_training(tmp_path):
    if not SCRIPT.exists():
        pytest.skip("that training is done")
    spec = importlib.util.spec_from_file_location("general_mlp", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    inputs, net = torch.randn(50, 4), MLPOptimizer(context=True)
    families = {name: Perceptrons(inputs, inputs, (2,), name=name) for name in ("a", "b", "c")}
    problem = script.Families(families, {"d": families["a"]}, 2)
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.randn_like(flat), "exp_avg_sq": torch.rand_like(flat)}
    group = {**torch.optim.AdamW([nn.Parameter(flat)], lr=0.1, weight_decay=0.0).state_dict()["param_groups"][0]}
    measured = [(0, {"d": 0.5}), (5, {"d": 0.4})]
    state = {
        "k": 7,
        "weights": flat + 1,
        "averaged": flat - 1,
        "adam": {"state": {0: moments}, "param_groups": [group]},
        "scale": {"a": 3.0, "c": 5.0},
        "history": {"validation": measured},
        "config": net.config,
    }
    path, options = tmp_path / "run", dict(iterations=10, unroll=10, steps=20, meta_batch=2, balance=True)
    options |= dict(method=EpisodicES(), averaging=0.9, validation_functions=2, checkpoint=path)
    options |= dict(meta_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0))
    run = EpisodicRun(net, problem, training_of(net, **options))
    script.take_up(run, state)
    run.save()
    kept = script.state_of(read_checkpoint(path, run.settings), net, problem, state["history"])
    assert kept.keys() == state.keys()
    for name in ("k", "scale", "history", "config"):
        assert kept[name] == state[name], name
    for name in ("weights", "averaged"):
        assert torch.equal(kept[name], state[name]), name
    for name, value in moments.items():
        torch.testing.assert_close(kept["adam"]["state"][0][name], value)
    assert kept["adam"]["param_groups"][0] | {"params": [0]} == group | {"params": [0]}

    run = EpisodicRun(net, problem, training_of(net, **options))  # it goes on from there
    run.begin()
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), flat + 1)
    run.advance()
    run.validate()
    kept = script.state_of(run.content(), net, problem, state["history"])
    assert (
        kept["k"] == 8 and kept["adam"]["state"][0]["step"] == 8 and not torch.equal(kept["weights"], state["weights"])
    )
    assert kept["history"]["validation"][:2] == measured and kept["history"]["validation"][2][0] == 8
    assert len(run.history.meta_loss) == 8 and math.isfinite(run.history.meta_loss[-1])
