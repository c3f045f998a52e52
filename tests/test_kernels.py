"""Which kernels are chosen and why, and what the interface does by default."""

import os
import subprocess
import sys

import pytest
import torch

from gradbuffer.kernels import choice
from gradbuffer.kernels.choice import KINDS, kernels_for, load, reasons_against
from gradbuffer.kernels.interface import LSTMKernels
from gradbuffer.kernels.torch_blocks import TorchLSTM
from optimizers import CoordinatewiseLSTM, LSTMWithGAC, PerKind, RNNProp, explain

WEIGHT = torch.zeros(1, 20)


def without(monkeypatch, package):
    """As if that package were not installed."""
    is_installed = choice.is_installed
    monkeypatch.setattr(choice, "is_installed", lambda name: name != package and is_installed(name))


def test_the_first_kind_without_reasons_runs(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "torch")
    assert kernels_for(WEIGHT) is TorchLSTM
    assert (
        kernels_for(WEIGHT.to("meta"), "step") is TorchLSTM and kernels_for(WEIGHT.to("meta"), "replay") is LSTMKernels
    )
    monkeypatch.setenv("L2O_KERNELS", "plain")
    assert kernels_for(WEIGHT) is LSTMKernels
    monkeypatch.delenv("L2O_KERNELS")
    without(monkeypatch, "numba")
    assert kernels_for(WEIGHT) is TorchLSTM and not choice.has_numba() and not choice.takes_numba(WEIGHT)


def test_where_numba_runs_if_it_is_there(monkeypatch):
    numba_lstm = pytest.importorskip(
        "gradbuffer.kernels.numba_lstm", reason="numba is not installed", exc_type=ImportError
    )
    monkeypatch.delenv("L2O_KERNELS", raising=False)
    assert kernels_for(WEIGHT) is kernels_for(WEIGHT.double(), "step_back", squash=True) is numba_lstm.NumbaLSTM
    assert kernels_for(WEIGHT, "step", state=torch.bfloat16) is numba_lstm.NumbaLSTM
    assert kernels_for(WEIGHT.to(torch.bfloat16)) is TorchLSTM


def test_what_is_asked_for_and_refused(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "fast")
    with pytest.raises(ValueError, match="L2O_KERNELS must be one of triton, numba, torch, plain, auto, got 'fast'"):
        kernels_for(WEIGHT)
    monkeypatch.setenv("L2O_KERNELS", "numba")
    assert reasons_against("numba", WEIGHT.to("meta"), "step") == ["runs on cpu, the network is on meta"]
    without(monkeypatch, "numba")
    with pytest.raises(ImportError, match="L2O_KERNELS=numba needs numba, which is not installed: pip install numba"):
        kernels_for(WEIGHT)
    monkeypatch.setenv("L2O_KERNELS", "torch")
    assert reasons_against("numba", WEIGHT, "step") == ["L2O_KERNELS=torch asks for another"]
    with pytest.raises(ValueError, match="no kernels do a step .*'torch': .* must be of torch.float32, got torch.bf"):
        kernels_for(WEIGHT, "step", state=torch.bfloat16)


def test_explain(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "torch")
    text = explain(PerKind({"a": CoordinatewiseLSTM(), "b": RNNProp().double()}))
    assert text.startswith("networks.a: CoordinatewiseLSTM of torch.float32 on cpu\n  step: torch\n    not triton: ")
    assert "networks.b: RNNProp of torch.float64 on cpu" in text and text.count("replay: torch") == 2
    assert explain(LSTMWithGAC()).startswith("LSTMWithGAC has no kernels")


def test_no_kind_is_imported_before_it_is_asked():
    code = (
        "import sys, optimizers, torch; from gradbuffer.kernels.choice import kernels_for; "
        "kernels_for(torch.zeros(1, 20, device='meta')); print([name for name in ('numba', 'triton') if name in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "L2O_KERNELS"}
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout == "[]\n"
    )


@pytest.mark.parametrize("name", ["plain", "torch", "numba"])
def test_defaults_of_the_interface_are_kept_by_every_kind(name):
    """A stepper is steps, parts are the whole, and what no loop is compiled for has no window."""
    if name == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    lstm, output = torch.nn.LSTM(1, 5, 2), (torch.randn(5), torch.randn(()))
    kernels, grads = load(KINDS[name].place)(lstm, *output), torch.randn(3, 40)
    state = expected = tuple(torch.randn(2, 2, 5, 40).unbind())
    own = tuple(torch.full_like(part, torch.nan) for part in state)
    tape = kernels.tape(40, 3)
    step = kernels.stepper(*state, own, tape=tape)
    for grad in grads:
        found = step(lambda a, b: grad[None, a:b])
        outputs, *expected = kernels.step(lambda a, b: grad[None, a:b], *expected)
        assert torch.equal(found, outputs)
    assert all(map(torch.equal, own, expected))
    assert kernels.in_parts(lambda first, last: (first, last), 3, 40, 2) == [(0, 3)]
    assert kernels.window(("something else",), grads[0], *state, 0, 2, 0.0, False) is None


@pytest.mark.parametrize("name", ["plain", "torch", "numba"])
@pytest.mark.parametrize("squash", [False, True])
def test_every_kind_does_what_the_plain_one_does(name, squash, monkeypatch):
    if name == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr("gradbuffer.kernels.interface.REPLAY_BLOCK", 17)
    lstm, output = torch.nn.LSTM(2, 5, 2, dtype=torch.float64), (torch.randn(5).double(), torch.randn(()).double())
    features, state, adjoint = (
        torch.randn(3, 2, 40).double(),
        torch.randn(2, 2, 5, 40).double(),
        torch.randn(3, 40).double(),
    )
    results = []
    for kind in ("plain", name):
        kernels, pulled = load(KINDS[kind].place)(lstm, *output), torch.zeros_like(features)
        layers, *rest = kernels.replay(
            lambda a, b: features[..., a:b], *state, adjoint, squash, lambda a, b, part: pulled[..., a:b].copy_(part)
        )
        after = torch.ones(2, 2, 5, 40).double()
        back, more, *others = kernels.step_back(features[0], *state, adjoint[0], *after, squash)
        results.append([*sum(map(list, layers + more), []), *rest, *others, pulled, back, after])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
