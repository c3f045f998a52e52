"""The Triton kernels of the coordinatewise LSTM against those in plain torch.

Without a GPU the cases run in Triton's interpreter on the CPU, in a process of their own, since TRITON_INTERPRET must
be set before triton is imported. Where a CUDA device is, they run there too. Both need triton (`pip install triton`).
"""

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, check_in_the_interpreter, from_outside

from gradbuffer.kernels import triton_lstm
from gradbuffer.kernels.choice import kernels_for
from gradbuffer.kernels.torch_blocks import PackedWeights, TorchLSTM
from gradbuffer.kernels.triton_lstm import TritonLSTM
from gradbuffer.kernels.triton_weights import PaddedWeights
from gradbuffer.unrolling import replay_by_autograd
from meta_training import meta_gradient
from optimizees import Quadratics
from optimizers import CoordinatewiseLSTM, NormalizedLSTM, RNNProp, explain, log_sign

INSTALLED = importlib.util.find_spec("triton") is not None
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def on_device(test):
    """Mark a test that runs kernels: in the interpreter, or on a CUDA device."""
    why_not = None if INSTALLED else "needs triton: pip install triton"
    if not INTERPRETED:
        test = pytest.mark.cuda(test)
    return pytest.mark.skipif(why_not is not None, reason=why_not or "")(test)


@from_outside
def test_cases_pass_in_the_interpreter():
    check_in_the_interpreter(__file__, 21, skipped=2)


def lstm(inputs, hidden, layers, dtype=torch.float32, device=DEVICE):
    """Random weights, as kernels are made of them."""
    net = torch.nn.LSTM(inputs, hidden, layers, dtype=dtype, device=device)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net, *(torch.randn(shape, dtype=dtype, device=device) for shape in ((hidden,), ()))


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
@pytest.mark.parametrize(
    "N, dtype", [(1, torch.float32), (15, torch.float64), (17, torch.float32), (37, torch.float64)]
)
def test_step(small_blocks, layers, hidden, inputs, N, dtype):
    weights = lstm(inputs, hidden, layers, dtype)
    shapes = (N,), (layers, hidden, N), (layers, hidden, N)
    grad, *state = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    kept = [part.clone() for part in state]
    readings = log_sign(grad, 7.3) if inputs == 2 else grad[None]
    expected = TorchLSTM(*weights).step(lambda a, b: readings[:, a:b], *state)
    close(TritonLSTM(*weights).step(lambda a, b: readings[:, a:b], *state), expected, TOLERANCE[dtype])
    if inputs == 2:
        found = TritonLSTM(*weights).step(lambda a, b: grad[None, a:b], *state, p=7.3)
        close(found, expected, TOLERANCE[dtype])
    assert all(map(torch.equal, state, kept))


@on_device
def test_step_in_place_on_a_part_of_larger_tensors_and_in_chunks(small_blocks, monkeypatch):
    monkeypatch.setattr(triton_lstm, "CHUNK", 20)
    weights, features = lstm(1, 5, 2), torch.randn(1, 47, device=DEVICE)
    wide = torch.randn(2, 2, 5, 60, device=DEVICE)
    kept, state = wide.clone(), tuple(wide[..., 13:])
    expected = TorchLSTM(*weights).step(lambda a, b: features[:, a:b], *state)
    found = TritonLSTM(*weights).step(lambda a, b: features[:, a:b], *state, inplace=True)
    close(found, expected, 1e-5)
    assert all(new is old for new, old in zip(found[1:], state)) and torch.equal(wide[..., :13], kept[..., :13])


@on_device
def test_log_sign_at_all_scales():
    """From 0 to 1e20, where the readings alone decide: the state is 0."""
    sizes = torch.tensor([0, 1e-30, 4e-5, 4.54e-5, 5e-5, 0.1, 1, 1e20], device=DEVICE)
    grad = torch.cat([sizes, -sizes])
    weights, readings, zero = lstm(2, 20, 1), log_sign(grad), torch.zeros(1, 20, 16, device=DEVICE)
    found = TritonLSTM(*weights).step(lambda a, b: grad[None, a:b], zero, zero, p=10.0)
    close(found, TorchLSTM(*weights).step(lambda a, b: readings[:, a:b], zero, zero), 1e-5)


REPLAYS = [  # layers, hidden, inputs, N, T, dtype: blocks of 16, three programs
    (2, 20, 2, 17, 3, torch.float32),
    (3, 5, 1, 15, 3, torch.float32),
    (1, 32, 1, 1, 1, torch.float32),
    (1, 20, 2, 16, 20, torch.float64),
    (2, 20, 1, 53, 1, torch.float64),
    (2, 16, 3, 5, 2, torch.float64),
]


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
    weights, *recorded = replay_case(*case)
    close(
        flat(TritonLSTM(*weights).replay(*recorded)), flat(TorchLSTM(*weights).replay(*recorded)), TOLERANCE[case[-1]]
    )


@on_device
def test_replay_in_chunks(small_blocks, monkeypatch):
    monkeypatch.setattr(triton_lstm, "CHUNK", 20)
    weights, *recorded = replay_case(1, 5, 2, 47, 2, torch.float32)
    close(flat(TritonLSTM(*weights).replay(*recorded)), flat(TorchLSTM(*weights).replay(*recorded)), 1e-5)


@on_device
@pytest.mark.parametrize(
    "precision, least, most", [("ieee", 0, 1e-5), ("tf32x3", 0, 1e-5), ("tf32", 1e-5, 1e-2), ("bf16", 1e-3, 5e-2)]
)
def test_precisions(precision, least, most):
    """They are what their names say: those of tensor cores are off by as much as their rounding, and no more."""
    weights, *recorded = replay_case(2, 20, 2, 30, 2, torch.float32)
    expected, found = (
        flat(kernels.replay(*recorded)) for kernels in (TorchLSTM(*weights), TritonLSTM(*weights, precision))
    )
    close(found, expected, most)
    assert (found[0] - expected[0]).norm() >= least * expected[0].norm()


@on_device
def test_the_optimizers_run_on_them(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "triton")
    net, slow = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1).to(DEVICE), RNNProp(5).to(DEVICE)
    grads, adjoint = torch.randn(2, 2, 9, device=DEVICE)
    for each in (net, slow):
        assert type(each.kernels("step")) is TritonLSTM
        found = each.replay(grads, each.init_state(9), adjoint)
        close(found.values(), replay_by_autograd(each, grads, each.init_state(9), adjoint).values(), 1e-5)
        wanted, state = each(grads[0], each.init_state(9))
        with torch.no_grad():
            update, new = each(grads[0], each.init_state(9))
            again, _ = each(grads[0], each.init_state(9), inplace=True)
        close([update, again, *new], [wanted, wanted, *state], 1e-5)


@on_device
@pytest.mark.parametrize(
    "make", [lambda: CoordinatewiseLSTM(5, preprocess="log_sign"), lambda: RNNProp(5), lambda: NormalizedLSTM(5)]
)
@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradients(make, second_order, monkeypatch):
    """With steps back, the replay of a squashed output, derivatives by the features, in chunks."""
    monkeypatch.setattr(triton_lstm, "CHUNK", 4)
    monkeypatch.setenv("L2O_KERNELS", "triton")
    net, batch = make().double().to(DEVICE), Quadratics(3, torch.float64, device=DEVICE).sample(2)
    state = net.init_state(6)
    found, expected = (
        meta_gradient(net, batch, batch.params, state, unroll=3, second_order=second_order, method=method)[0]
        for method in ("replay", "autograd")
    )
    close(found.values(), expected.values(), 1e-10)
    assert explain(net).count("triton") == 3 + (net.averages is not None) and "not triton" not in explain(net)


@on_device
def test_replay_is_deterministic_and_leaves_the_state(small_blocks):
    weights, *recorded = replay_case(1, 5, 2, 50, 1, torch.float32)
    kept = [part.clone() for part in recorded[1:]]
    first, second = (flat(TritonLSTM(*weights).replay(*recorded)) for _ in range(2))
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, recorded[1:], kept))


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device, not the interpreter")
def test_cuda_uses_them_by_default(monkeypatch):
    monkeypatch.delenv("L2O_KERNELS", raising=False)
    weight = CoordinatewiseLSTM().cuda().output.weight
    assert (kernels_for(weight) is TritonLSTM) != bool(TritonLSTM.reasons_against(weight, "step"))


class OnCuda:
    """Passes for a weight on a card, for what only looks at where it is."""

    is_cuda, device, dtype, shape = True, torch.device("cuda:0"), torch.float32, (1, 20)


@pytest.fixture
def card(monkeypatch):
    """A card, as far as the choice of kernels looks at it; its self-check runs where the tests do."""
    if not INSTALLED:
        pytest.skip("needs triton: pip install triton")
    monkeypatch.setattr(triton_lstm, "kernels", SimpleNamespace(INTERPRETED=False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_lstm, "missing_to_compile", lambda: None)
    triton_lstm.failures.cache_clear()
    yield
    triton_lstm.failures.cache_clear()


def test_a_kernel_that_fails_its_first_use_is_not_chosen(card, monkeypatch):
    """Whatever a card, a driver or a compiler raises becomes a reason; torch runs then."""

    class Broken(TritonLSTM):
        def __init__(self, *weights):
            raise RuntimeError("out of resource: shared memory, Required: 126976, Hardware limit: 101376")

    monkeypatch.delenv("L2O_KERNELS", raising=False)
    monkeypatch.setattr(triton_lstm, "TritonLSTM", Broken)
    net = torch.nn.LSTM(2, 20, 2)
    reasons = TritonLSTM.reasons_against(OnCuda, "step", lstm=net)
    assert len(reasons) == 1 and "its self-check on cuda:0 failed: " in reasons[0]
    assert kernels_for(OnCuda, "step", lstm=net) is TorchLSTM
    assert TritonLSTM.reasons_against(OnCuda, "step") == []  # it is not tried out where sizes are not known


@pytest.mark.parametrize(
    "work, p, pulls",
    [
        ("step", 0.0, False),
        ("step", 10.0, False),
        ("replay", 0.0, False),
        ("replay", 10.0, False),
        ("replay", 0.0, True),
    ],
)
def test_the_self_check_finds_wrong_numbers(card, monkeypatch, work, p, pulls):
    """With torch's own kernels in Triton's place it passes; with slightly wrong ones it tells. It draws nothing of the caller's."""
    monkeypatch.setattr(
        triton_lstm, "processors", lambda device: 132
    )  # of what those run at once torch makes two blocks
    random = torch.get_rng_state()

    class Right(TorchLSTM):
        def step(self, features, hidden, cells, inplace=False, p=0.0):
            read = (lambda a, b: log_sign(features(a, b)[0], p)) if p else features
            return super().step(read, hidden, cells, inplace)

        def replay(self, features, *rest):
            *rest, pull, p = rest
            read = (lambda a, b: torch.stack([log_sign(grad[0], p) for grad in features(a, b)])) if p else features
            pieces = []  # Triton's come at once
            found = super().replay(read, *rest, (lambda a, b, part: pieces.append(part)) if pull else None)
            if pull:
                pull(0, rest[0].shape[-1], torch.cat(pieces, -1))
            return found

    class Wrong(Right):
        def __init__(self, lstm, output, bias):
            super().__init__(lstm, output * 1.01, bias)

    for kind, count in ((Right, 0), (Wrong, 1)):
        monkeypatch.setattr(triton_lstm, "TritonLSTM", kind)
        triton_lstm.failures.cache_clear()
        found = triton_lstm.failures(work, 2, 20, 2, torch.device("cpu"), torch.float32, p, pulls=pulls)
        assert len(found) == count and torch.equal(torch.get_rng_state(), random)
    assert re.match(f"its self-check on cpu failed: a {work} is off by .*, more than 1e-03", found[0])


def test_what_is_missing_to_compile(monkeypatch, tmp_path):
    triton_lstm.missing_to_compile.cache_clear()
    monkeypatch.setattr(triton_lstm.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "cc")
    assert triton_lstm.missing_to_compile() == "needs Python.h, for its launchers: it comes with python3-dev"
    triton_lstm.missing_to_compile.cache_clear()
    (tmp_path / "Python.h").touch()
    assert triton_lstm.missing_to_compile() is None
    triton_lstm.missing_to_compile.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(triton_lstm.shutil, "which", lambda name: None)
    assert triton_lstm.missing_to_compile() == "needs a C compiler, for its launchers"
    triton_lstm.missing_to_compile.cache_clear()


# What needs no triton -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, hidden, layers", [(1, 20, 1), (2, 20, 2), (20, 5, 3), (2, 32, 2), (17, 16, 2)])
def test_padded_weights(inputs, hidden, layers):
    """A gate from the padded weights is that from the packed ones."""
    sizes, (net, *output) = [inputs] + [hidden] * (layers - 1), lstm(inputs, hidden, layers, torch.float64, "cpu")
    packed = PackedWeights([(w.detach(), u.detach(), (b + c).detach()) for w, u, b, c in net.all_weights])
    padded = PaddedWeights(net, *output)
    units, start = padded.sizes["UNITS"], 0
    for layer, (size, weight) in enumerate(zip(sizes, packed.weights)):
        below = padded.sizes["BELOW" if layer else "FIRST"]
        assert below > size and below & (below - 1) == 0
        x, h, one = torch.randn(size).double(), torch.randn(hidden).double(), torch.ones(1).double()
        row = torch.zeros(below + units).double()
        row[:size], row[size], row[below : below + hidden] = x, 1, h
        parts = []
        for width in (below, units):
            part = padded.weights[start : start + 4 * width * units].view(2, units, 2, width)
            parts.append(part.permute(0, 2, 3, 1).flatten(0, 1))  # of each gate (width, units)
            start += part.numel()
        own = torch.cat(parts, 1)
        gates = row @ own
        torch.testing.assert_close(gates[:, :hidden].flatten(), weight @ torch.cat([x, h, one]))
        assert not gates[:, hidden:].any()
    assert start == len(padded.weights)
    assert torch.equal(padded.output[:hidden], output[0]) and padded.output[-1] == output[1]
    assert not padded.output[hidden:units].any()


def test_errors(monkeypatch):
    weights, weight = lstm(2, 20, 2, device="cpu"), torch.zeros(1, 20)
    state, features = torch.zeros(2, 2, 20, 3), torch.zeros(2, 3)
    if not INTERPRETED:
        expected = "needs triton" if triton_lstm.kernels is None else "runs on CUDA .*, the network is on cpu"
        assert any(re.match(expected, reason) for reason in TritonLSTM.reasons_against(weight, "step"))
        with pytest.raises(RuntimeError, match=expected):
            TritonLSTM(*weights)
    monkeypatch.setattr(triton_lstm, "kernels", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        TritonLSTM(*weights)
    monkeypatch.setattr(triton_lstm, "kernels", type("Installed", (), {"INTERPRETED": True}))
    with pytest.raises(ValueError, match="precision must be None or one of .* got 'half'"):
        TritonLSTM(*weights, precision="half")
    with pytest.raises(ValueError, match="must be \"ieee\" for torch.float64, got 'bf16'"):
        TritonLSTM(*lstm(2, 20, 2, torch.float64, "cpu"), precision="bf16")
    with pytest.raises(ValueError, match="log_sign with p=10.0 makes two features, the network reads 1"):
        TritonLSTM(*lstm(1, 20, 2, device="cpu")).step(lambda a, b: features, *state, p=10.0)
    with pytest.raises(RuntimeError, match="at most 32 units, got 64"):
        TritonLSTM(*lstm(1, 64, 1, device="cpu"))
