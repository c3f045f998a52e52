"""The Triton kernels of the coordinatewise LSTM against the blocks of torch operations.

Without a GPU the cases run in Triton's interpreter on the CPU, in a process of their own, since TRITON_INTERPRET must
be set before triton is imported. Where a CUDA device is, they run there too. Both need triton (`pip install triton`).
"""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradbuffer.kernels import choice as kernel_choice
from gradbuffer.kernels import torch_blocks
from gradbuffer.kernels import triton_lstm
from gradbuffer.kernels.torch_blocks import PackedLSTM
from optimizers import CoordinatewiseLSTM, RNNProp, log_sign

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def on_device(test):
    """Mark a test that runs kernels: in the interpreter, or on a CUDA device."""
    why_not = None if INSTALLED else "needs triton: pip install triton"
    if not INTERPRETED:
        test = pytest.mark.cuda(test)
        why_not = why_not or (None if torch.cuda.is_available() else "needs a CUDA device, or TRITON_INTERPRET=1")
    return pytest.mark.skipif(why_not is not None, reason=why_not or "")(test)


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="in the interpreter already" if INTERPRETED else
                    "needs triton: pip install triton")
def test_cases_pass_in_the_interpreter():
    here = Path(__file__).resolve()
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", str(here)]
    run = subprocess.run(command, cwd=here.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
                         text=True, timeout=300)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped)", run.stdout)}
    assert run.returncode == 0 and counts["passed"] > 20 and counts["skipped"] == 2, run.stdout + run.stderr


def lstm(inputs, hidden, layers, dtype=torch.float32, device=DEVICE):
    """Random weights."""
    sizes = [inputs] + [hidden] * (layers - 1)
    weights = [[0.4 * torch.randn(shape, dtype=dtype, device=device) for shape in
                ((4 * hidden, size), (4 * hidden, hidden), (4 * hidden,))] for size in sizes]
    return PackedLSTM(weights, *(torch.randn(shape, dtype=dtype, device=device) for shape in ((hidden,), ())))


def close(found, expected, tolerance):
    """Each tensor within a relative distance, in norm."""
    for part, wanted in zip(found, expected, strict=True):
        assert part.shape == wanted.shape and part.dtype == wanted.dtype
        assert (part - wanted).norm() <= tolerance * wanted.norm(), ((part - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(triton_lstm, "STEP_BLOCK", 16)
    monkeypatch.setattr(triton_lstm, "REPLAY_BLOCK", dict.fromkeys(TOLERANCE, 16))


@on_device
@pytest.mark.parametrize("layers, hidden", [(1, 20), (2, 20), (3, 5), (2, 32)])
@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("N, dtype", [(1, torch.float32), (15, torch.float64), (17, torch.float32),
                                      (37, torch.float64)])
def test_step(small_blocks, layers, hidden, inputs, N, dtype):
    packed = lstm(inputs, hidden, layers, dtype)
    shapes = (N,), (layers, hidden, N), (layers, hidden, N)
    grad, *state = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    kept = [part.clone() for part in state]
    readings = log_sign(grad, 7.3) if inputs == 2 else grad[None]
    expected = torch_blocks.step_blocks(packed, lambda a, b: readings[:, a:b], *state)
    close(triton_lstm.step_blocks(packed, lambda a, b: readings[:, a:b], *state), expected, TOLERANCE[dtype])
    if inputs == 2:
        found = triton_lstm.step_blocks(packed, lambda a, b: grad[None, a:b], *state, log_sign=7.3)
        close(found, expected, TOLERANCE[dtype])
    assert all(map(torch.equal, state, kept))


@on_device
def test_step_in_place_on_a_part_of_larger_tensors_and_in_chunks(small_blocks, monkeypatch):
    monkeypatch.setattr(triton_lstm, "CHUNK", 20)
    packed, features = lstm(1, 5, 2), torch.randn(1, 47, device=DEVICE)
    wide = torch.randn(2, 2, 5, 60, device=DEVICE)
    kept, state = wide.clone(), tuple(wide[..., 13:])
    expected = torch_blocks.step_blocks(packed, lambda a, b: features[:, a:b], *state)
    found = triton_lstm.step_blocks(packed, lambda a, b: features[:, a:b], *state, inplace=True)
    close(found, expected, 1e-5)
    assert all(new is old for new, old in zip(found[1:], state)) and torch.equal(wide[..., :13], kept[..., :13])


@on_device
def test_log_sign_at_all_scales():
    """From 0 to 1e20, where the readings alone decide: the state is 0."""
    sizes = torch.tensor([0, 1e-30, 4e-5, 4.54e-5, 5e-5, 0.1, 1, 1e20], device=DEVICE)
    grad = torch.cat([sizes, -sizes])
    packed, readings, zero = lstm(2, 20, 1), log_sign(grad), torch.zeros(1, 20, 16, device=DEVICE)
    found = triton_lstm.step_blocks(packed, lambda a, b: grad[None, a:b], zero, zero, log_sign=10.0)
    close(found, torch_blocks.step_blocks(packed, lambda a, b: readings[:, a:b], zero, zero), 1e-5)


REPLAYS = [  # layers, hidden, inputs, N, T, dtype: blocks of 16, three programs
    (2, 20, 2, 17, 3, torch.float32), (3, 5, 1, 15, 3, torch.float32), (1, 32, 1, 1, 1, torch.float32),
    (1, 20, 2, 16, 20, torch.float64), (2, 20, 1, 53, 1, torch.float64), (2, 16, 3, 5, 2, torch.float64)]


def replay_case(layers, hidden, inputs, N, T, dtype):
    """Random weights and the arguments of a replay."""
    shapes = (T, inputs, N), (layers, hidden, N), (layers, hidden, N), (T, N)
    readings, *rest = (0.5 * torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    return lstm(inputs, hidden, layers, dtype), lambda a, b: readings[:, :, a:b], *rest


def flat(gradients):
    return [*(part for layer in gradients[0] for part in layer), *gradients[1:]]


@on_device
@pytest.mark.parametrize("case", REPLAYS)
def test_replay(small_blocks, case):
    arguments = replay_case(*case)
    found = triton_lstm.replay_blocks(*arguments)
    close(flat(found), flat(torch_blocks.replay_blocks(*arguments)), TOLERANCE[case[-1]])


@on_device
def test_replay_in_chunks(small_blocks, monkeypatch):
    monkeypatch.setattr(triton_lstm, "CHUNK", 20)
    arguments = replay_case(1, 5, 2, 47, 2, torch.float32)
    close(flat(triton_lstm.replay_blocks(*arguments)), flat(torch_blocks.replay_blocks(*arguments)), 1e-5)


@on_device
@pytest.mark.parametrize("precision, least, most", [("ieee", 0, 1e-5), ("tf32x3", 0, 1e-5), ("tf32", 1e-5, 1e-2),
                                                    ("bf16", 1e-3, 5e-2)])
def test_precisions(precision, least, most):
    """They are what their names say: those of tensor cores are off by as much as their rounding, and no more."""
    arguments = replay_case(2, 20, 2, 30, 2, torch.float32)
    expected = flat(torch_blocks.replay_blocks(*arguments))
    found = flat(triton_lstm.replay_blocks(*arguments, precision=precision))
    close(found, expected, most)
    assert (found[0] - expected[0]).norm() >= least * expected[0].norm()


@on_device
def test_the_optimizers_run_on_them(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "triton")
    net, slow = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1).to(DEVICE), RNNProp(5).to(DEVICE)
    grads, adjoint = torch.randn(2, 2, 9, device=DEVICE)
    found = net.replay(grads, net.init_state(9), adjoint)
    expected = copy.deepcopy(net)._replay_with_graph(grads, net.init_state(9), adjoint)
    close(found.values(), expected.values(), 1e-5)
    for each in (net, slow):
        wanted, state = each(grads[0], each.init_state(9))
        with torch.no_grad():
            update, new = each(grads[0], each.init_state(9))
            again, _ = each(grads[0], each.init_state(9), inplace=True)
        close([update, again, *new], [wanted, wanted, *state], 1e-5)


@on_device
def test_replay_is_deterministic_and_leaves_the_state(small_blocks):
    arguments = replay_case(1, 5, 2, 50, 1, torch.float32)
    kept = [part.clone() for part in arguments[2:]]
    first, second = (flat(triton_lstm.replay_blocks(*arguments)) for _ in range(2))
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, arguments[2:], kept))


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_uses_them_where_asked(monkeypatch):
    weight = CoordinatewiseLSTM().cuda().output.weight
    assert kernel_choice.kernels_for(weight) is torch_blocks
    monkeypatch.setenv("L2O_KERNELS", "triton")
    assert (kernel_choice.kernels_for(weight) is triton_lstm) == triton_lstm.supports(weight)


# What needs no triton -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, hidden, layers", [(1, 20, 1), (2, 20, 2), (20, 5, 3), (2, 32, 2), (17, 16, 2)])
def test_padded_weights(inputs, hidden, layers):
    """A gate from the padded weights is that from the packed ones, and the padding comes off again."""
    sizes = [inputs] + [hidden] * (layers - 1)
    packed = lstm(inputs, hidden, layers, torch.float64, "cpu")
    padded = triton_lstm.PaddedWeights(packed)
    for size, below, weight in zip(sizes, padded.below, packed.weights):
        assert below > size and below & (below - 1) == 0
        x, h, one = torch.randn(size).double(), torch.randn(hidden).double(), torch.ones(1).double()
        row = torch.zeros(below + padded.sizes["UNITS"]).double()
        row[:size], row[size], row[below:below + hidden] = x, 1, h
        gates = row @ padded.pad(weight, below)
        torch.testing.assert_close(gates[:, :hidden].flatten(), weight @ torch.cat([x, h, one]))
        assert not gates[:, hidden:].any()
    assert all(map(torch.equal, padded.take_off(padded.weights), packed.weights))


def test_errors(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "torch")
    packed, weight = CoordinatewiseLSTM(preprocess="log_sign")._packed_kernels()[1], torch.zeros(1, 20)
    state, features = torch.zeros(2, 2, 20, 3), torch.zeros(2, 3)
    if not INTERPRETED:
        assert not triton_lstm.supports(weight) and kernel_choice.kernels_for(weight) is torch_blocks
        with pytest.raises(RuntimeError, match="need triton" if triton_lstm.kernels is None else "on a CUDA device"):
            triton_lstm.replay_blocks(packed, lambda a, b: features[None], *state, torch.zeros(1, 3))
    monkeypatch.setattr(triton_lstm, "kernels", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        triton_lstm.step_blocks(packed, lambda a, b: features, *state)
    monkeypatch.setattr(triton_lstm, "kernels", type("Installed", (), {"INTERPRETED": True}))
    with pytest.raises(ValueError, match="precision must be None or one of .* got 'half'"):
        triton_lstm.step_blocks(packed, lambda a, b: features, *state, precision="half")
    with pytest.raises(ValueError, match='must be "ieee" for torch.float64, got \'bf16\''):
        triton_lstm.step_blocks(CoordinatewiseLSTM().double()._packed_kernels()[1], lambda a, b: features, *state, precision="bf16")
    with pytest.raises(ValueError, match="log_sign=10.0 makes two features, the network reads 1"):
        triton_lstm.step_blocks(CoordinatewiseLSTM()._packed_kernels()[1], lambda a, b: features, *state, log_sign=10.0)
    with pytest.raises(RuntimeError, match="at most 32 units .* got torch.float32, 64 units"):
        triton_lstm.step_blocks(CoordinatewiseLSTM(64)._packed_kernels()[1], lambda a, b: features, *state)
