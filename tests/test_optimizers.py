"""CoordinatewiseLSTM: preprocessing, a hand-computed step, the fast path against nn.LSTM, files."""

import copy
import json
import math
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.autograd import gradcheck

import optimizers
from gradbuffer.kernels import interface, torch_blocks
from gradbuffer.kernels.choice import has_numba
from gradbuffer.unrolling import replay_by_autograd
from meta_training import meta_gradient, meta_train
from optimizees import Quadratics
from optimizers import (
    CoordinatewiseLSTM,
    LearnedOptimizer,
    NonFiniteError,
    NormalizedLSTM,
    RNNProp,
    load_optimizer,
    log_sign,
    pretrained_optimizers,
    save_optimizer,
    start_as_adam,
    start_as_momentum,
)


def random_state(net, N):
    hidden, cell, *memory = (0.3 * torch.randn_like(part) for part in net.init_state(N))
    return hidden, cell, *(part.abs() for part in memory)  # averages of squares among them


# Preprocessing (appendix A) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 10.0])
def test_log_sign_follows_the_formula(p):
    threshold = math.exp(-p)
    sizes = [0.0, 1e-30, threshold / 2, threshold * (1 - 1e-9), threshold, threshold * (1 + 1e-9), 0.1, 1.0, 1e20]
    grad = torch.tensor([sign * size for size in sizes for sign in (1, -1)], dtype=torch.float64)
    expected = []
    for g in grad.tolist():
        if abs(g) >= threshold:
            expected.append((math.log(abs(g)) / p, math.copysign(1, g)))
        else:
            expected.append((-1.0, math.exp(p) * g))
    torch.testing.assert_close(log_sign(grad, p).T, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_log_sign_by_hand():
    features = log_sign(torch.tensor([0.5, -math.exp(-5), 1e-6]))
    torch.testing.assert_close(
        features, torch.tensor([[math.log(0.5) / 10, -0.5, -1.0], [1.0, -1.0, math.exp(10) * 1e-6]])
    )


# One step -------------------------------------------------------------------------------------------------------------


def test_a_step_by_hand():
    """One layer of one unit, weights chosen: every gate is written out."""
    net = CoordinatewiseLSTM(hidden_size=1, num_layers=1, output_scale=0.5).double()
    with torch.no_grad():
        net.lstm.weight_ih_l0.copy_(torch.tensor([[0.1], [0.2], [0.3], [0.4]], dtype=torch.float64))
        net.lstm.weight_hh_l0.copy_(torch.tensor([[0.5], [0.6], [0.7], [0.8]], dtype=torch.float64))
        net.lstm.bias_ih_l0.copy_(torch.tensor([0.01, 0.02, 0.03, 0.04], dtype=torch.float64))
        net.lstm.bias_hh_l0.zero_()
        net.output.weight.fill_(2.0)
        net.output.bias.fill_(0.25)
    g, h, c = 1.5, -0.4, 0.9

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    i, f = sigmoid(0.1 * g + 0.5 * h + 0.01), sigmoid(0.2 * g + 0.6 * h + 0.02)
    candidate, o = math.tanh(0.3 * g + 0.7 * h + 0.03), sigmoid(0.4 * g + 0.8 * h + 0.04)
    cell = f * c + i * candidate
    hidden = o * math.tanh(cell)
    state = tuple(torch.full((1, 1, 1), value, dtype=torch.float64) for value in (h, c))
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            update, (new_h, new_c) = net(torch.tensor([g], dtype=torch.float64), state)
        assert update.requires_grad == grad_mode
        assert update.item() == pytest.approx(0.5 * (2 * hidden + 0.25), rel=1e-14)
        assert (new_h.item(), new_c.item()) == pytest.approx((hidden, cell), rel=1e-14)


@pytest.fixture(params=["plain", "torch", "numba"], autouse=True)
def kernels(request, monkeypatch):
    """Every test of this file with all ways to run the LSTM on a CPU."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("L2O_KERNELS", request.param)


SHAPES = [(1, 20), (2, 20), (3, 5), (2, 1)]  # layers, hidden; the last one has fewer units than "log_sign" has features
BORDERS = [1, 15, 16, 17, 32, 37, 63, 64, 65, 131]  # around a tile of 16 and a group of four, and primes


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(interface, "REPLAY_BLOCK", 16)
    monkeypatch.setattr(torch_blocks, "STEP_BLOCK", 16)
    monkeypatch.setattr(torch_blocks, "REPLAY_BLOCK", (16, 16))
    if has_numba():
        for chunk in ("STEP_CHUNK", "REPLAY_CHUNK"):
            monkeypatch.setattr(f"gradbuffer.kernels.numba_lstm.{chunk}", 64)


@pytest.mark.parametrize("layers, hidden", SHAPES)
@pytest.mark.parametrize("preprocess", [None, "log_sign"])
@pytest.mark.parametrize("N", BORDERS)
def test_fast_step_equals_nn_lstm(small_blocks, layers, hidden, preprocess, N):
    net = CoordinatewiseLSTM(hidden, layers, preprocess, output_scale=0.1).double()
    grad, state = torch.randn(N, dtype=torch.float64), random_state(net, N)
    kept = [part.clone() for part in state]
    slow, slow_state = net(grad, state)
    with torch.no_grad():
        fast, fast_state = net(grad, state)
    assert slow.requires_grad and not fast.requires_grad and not fast_state[0].requires_grad
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fast_state, tuple(part.detach() for part in slow_state), rtol=1e-12, atol=1e-14)
    assert all(torch.equal(before, after) for before, after in zip(kept, state))  # the given state is left alone


@pytest.mark.parametrize("N", BORDERS)
@pytest.mark.parametrize(
    "net", [CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1), RNNProp(), NormalizedLSTM()]
)
def test_step_in_place_equals_step(small_blocks, net, N):
    grad, state = torch.randn(N), random_state(net, N)
    with torch.no_grad():
        update, expected = net(grad, state)
        wide = [torch.cat([part, part], -1) for part in state]  # the state may be a part of larger tensors
        here = tuple(part[..., N:] for part in wide)
        found, returned = net(grad, here, inplace=True)
    assert torch.equal(found, update) and all(map(torch.equal, here, expected))
    assert all(part is given for part, given in zip(returned, here))
    assert all(torch.equal(part[..., :N], before) for part, before in zip(wide, state))
    with pytest.raises(ValueError, match="inplace=True records no graph"):
        net(grad, state, inplace=True)


@pytest.mark.parametrize("N", [1, 32, 131, 300])
@pytest.mark.parametrize(
    "net",
    [CoordinatewiseLSTM(), CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1), RNNProp(), NormalizedLSTM()],
)
def test_stepper_equals_steps(small_blocks, net, N):
    grads, state = torch.randn(3, N), random_state(net, N)
    here = tuple(part.clone() for part in state)
    with torch.no_grad():
        step = net.stepper(here)
        for grad in grads:
            expected, state = net(grad, state)
            assert torch.equal(step(grad), expected) and all(map(torch.equal, here, state))


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda grad: grad[1:], ValueError, "shape"),
        (lambda grad: grad.double(), ValueError, "float64"),
        (lambda grad: grad.log(), ValueError, "must be finite"),
    ],
)
def test_stepper_refuses_other_gradients(spoil, error, message):
    net = CoordinatewiseLSTM()
    step = net.stepper(net.init_state(4))
    with torch.no_grad(), pytest.raises(error, match=message):
        step(spoil(torch.tensor([1.0, 2.0, -3.0, 4.0])))


def test_stepper_refuses_other_states():
    net = CoordinatewiseLSTM()
    with pytest.raises(ValueError, match="hidden must have shape"):
        net.stepper(CoordinatewiseLSTM(hidden_size=5).init_state(4))


def test_steps_in_and_out_of_inference_mode():
    """What one of them leaves behind (scratch memory) must not be in the other's way."""
    net, grad = CoordinatewiseLSTM(hidden_size=4), torch.randn(5)
    with torch.inference_mode():
        first, _ = net(grad, net.init_state(5))
    with torch.no_grad():
        second, _ = net(grad, net.init_state(5))
    with torch.inference_mode():
        third, _ = net(grad, net.init_state(5))
    assert torch.equal(first, second) and torch.equal(second, third)


@pytest.mark.parametrize("layers, hidden", SHAPES)
@pytest.mark.parametrize("preprocess", [None, "log_sign"])
@pytest.mark.parametrize("N, T", [(1, 1), (16, 3), (17, 7), (37, 20)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_written_replay_equals_autograd(small_blocks, layers, hidden, preprocess, N, T, dtype, tolerance):
    net = CoordinatewiseLSTM(hidden, layers, preprocess, output_scale=0.1).to(dtype)
    grads, adjoint = torch.randn(2, T, N, dtype=dtype)
    state = random_state(net, N)
    for _ in range(2):  # the second time, buffers are used again
        fast = net.replay(grads, state, adjoint)
    state64 = tuple(part.double() for part in state)
    slow = replay_by_autograd(copy.deepcopy(net).double(), grads.double(), state64, adjoint.double())
    assert list(fast) == [name for name, _ in net.named_parameters()]
    scale = torch.cat([part.flatten() for part in slow.values()]).norm()
    for name, parameter in net.named_parameters():
        assert fast[name].shape == parameter.shape and fast[name].dtype == dtype
        assert (fast[name] - slow[name]).norm() <= tolerance * scale


def test_written_replay_passes_gradcheck():
    """The replay as the backward pass of Σ⟨adjoint, update⟩, checked against finite differences."""
    net = CoordinatewiseLSTM(hidden_size=3, num_layers=2, preprocess="log_sign", output_scale=0.7).double()
    grads, adjoint = torch.randn(2, 4, 5, dtype=torch.float64)
    state = random_state(net, 5)
    names = [name for name, _ in net.named_parameters()]

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(context, *weights):
            put(weights)
            total, now = 0, state
            for grad, row in zip(grads, adjoint):
                update, now = net(grad, now)
                total = total + update @ row
            return total.detach()

        @staticmethod
        def backward(context, upstream):
            replayed = net.replay(grads, state, adjoint)
            return tuple(upstream * replayed[name] for name in names)

    def put(weights):
        with torch.no_grad():
            for parameter, weight in zip(net.parameters(), weights):
                parameter.copy_(weight)

    weights = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]
    assert gradcheck(Replayed.apply, weights)


@pytest.mark.cuda
def test_cuda_equals_cpu():
    net = CoordinatewiseLSTM(preprocess="log_sign")
    grads, adjoint = torch.randn(2, 20, 1000)
    cpu = net.replay(grads, net.init_state(1000), adjoint)
    there = copy.deepcopy(net).cuda()
    cuda = there.replay(grads.cuda(), there.init_state(1000), adjoint.cuda())
    for name in cpu:
        torch.testing.assert_close(cuda[name].cpu(), cpu[name], rtol=1e-3, atol=1e-3)


def test_frozen_parameters_are_left_out_of_the_replay():
    net = CoordinatewiseLSTM()
    net.output.bias.requires_grad_(False)
    grads = torch.randn(3, 4)
    replayed = net.replay(grads, net.init_state(4), grads)
    assert "output.bias" not in replayed and len(replayed) == 9


def test_changed_weights_are_seen():
    net = CoordinatewiseLSTM()
    grad, state = torch.randn(5), net.init_state(5)
    with torch.no_grad():
        before, _ = net(grad, state)
        net.output.bias.add_(1)
        after, _ = net(grad, state)
        net.load_state_dict(CoordinatewiseLSTM().state_dict())
        loaded, _ = net(grad, state)
    torch.testing.assert_close(after, before + 1)
    torch.testing.assert_close(loaded, net(grad, state)[0].detach())


def test_copies_and_pickles_stand_alone():
    net = CoordinatewiseLSTM()
    grad, state = torch.randn(5), net.init_state(5)
    with torch.no_grad():
        before, _ = net(grad, state)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            twin.output.bias.add_(1)
            torch.testing.assert_close(twin(grad, state)[0], before + 1)
        torch.testing.assert_close(net(grad, state)[0], before)


# A start as momentum --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("momentum, nesterov", [(0.9, True), (0.9, False), (0.5, False), (0.0, False)])
def test_start_as_momentum(layers, momentum, nesterov):
    """Its updates are torch's SGD's on gradients between e^-10 and 1, from the first step on."""
    net = start_as_momentum(CoordinatewiseLSTM(20, layers, "log_sign", output_scale=0.1), 0.3, momentum, nesterov)
    sizes = torch.logspace(-4, -2.5, 12).repeat(2)
    theta, state = torch.zeros(24, requires_grad=True), net.init_state(24)
    sgd = torch.optim.SGD([theta], lr=0.3, momentum=momentum, nesterov=nesterov)
    for gradient in sizes * (0.5 + torch.rand(30, 24)) * torch.randn(30, 24).sign():
        before, theta.grad = theta.detach().clone(), gradient
        sgd.step()
        with torch.no_grad():
            update, state = net(gradient, state)
        step = theta.detach() - before
        assert ((update - step).abs() <= 0.06 * step.abs() + 0.02 * sizes * 0.3).all()


@pytest.mark.parametrize("layers", [1, 2])
def test_start_with_signs(layers):
    """Beside momentum, a running mean of signs with a weight that fades; on gradients of any size."""
    torch.manual_seed(0)
    net = start_as_momentum(
        CoordinatewiseLSTM(20, layers, "log_sign", output_scale=0.1), 1e-12, sign_lr=0.3, sign_fade=6
    )
    state, mean = net.init_state(60), torch.zeros(60)
    for t in range(60):
        gradient = torch.randn(60).sign() * (0.5 + torch.rand(60)) * torch.logspace(-3.5, 1, 60)
        mean = 0.8 * mean + 0.2 * gradient.sign()
        with torch.no_grad():
            update, state = net(gradient, state)
        wanted = -0.3 * 2 / (1 + math.exp(2 * t / 6)) * mean
        assert ((update - wanted).abs() <= 0.2 * wanted.abs() + 0.01).all(), t
    assert update.abs().max() < 1e-3


def test_start_as_momentum_leaves_the_other_units_to_training():
    torch.manual_seed(0)
    plain = CoordinatewiseLSTM(preprocess="log_sign")
    net = start_as_momentum(copy.deepcopy(plain), 1.0, averages=(0.5,))
    kept = [unit + gate * 20 for gate in range(4) for unit in range(3, 20)]
    for (name, before), after in zip(plain.lstm.named_parameters(), net.lstm.parameters()):
        assert torch.equal(before[kept], after[kept]), name
    assert not net.output.weight[0, 2:].any()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(net=CoordinatewiseLSTM(), lr=1.0), ValueError, 'preprocess="log_sign" to start as momentum, got None'),
        (dict(net=RNNProp(), lr=1.0), TypeError, "CoordinatewiseLSTM, got RNNProp"),
        (dict(net=CoordinatewiseLSTM(preprocess="log_sign"), lr=0), ValueError, "lr must be a positive number, got 0"),
        (
            dict(net=CoordinatewiseLSTM(preprocess="log_sign"), lr=1.0, momentum=1.0),
            ValueError,
            "momentum must be .* got 1.0",
        ),
        (
            dict(net=CoordinatewiseLSTM(preprocess="log_sign"), lr=1.0, averages=(2,)),
            ValueError,
            r"averages must be .* got \(2,\)",
        ),
        (
            dict(net=CoordinatewiseLSTM(preprocess="log_sign"), lr=1.0, sign_lr=-0.1),
            ValueError,
            "sign_lr must be .* got -0.1",
        ),
        (
            dict(net=CoordinatewiseLSTM(preprocess="log_sign"), lr=1.0, sign_momentum=1),
            ValueError,
            "sign_momentum must be .* 1",
        ),
        (
            dict(net=CoordinatewiseLSTM(preprocess="log_sign"), lr=1.0, sign_lr=1.0, sign_fade=21),
            ValueError,
            "at most 20, got 21",
        ),
        (
            dict(net=CoordinatewiseLSTM(6, preprocess="log_sign"), lr=1.0, sign_lr=0.1),
            ValueError,
            "6 units, too few for 7",
        ),
        (
            dict(net=CoordinatewiseLSTM(3, preprocess="log_sign"), lr=1.0),
            ValueError,
            "3 units, too few for 5 running sums",
        ),
    ],
)
def test_bad_starts(arguments, error, message):
    with pytest.raises(error, match=message):
        start_as_momentum(**arguments)


# Odd optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden, layers", [(20, 2), (7, 1), (3, 3), (1, 2)])
@pytest.mark.parametrize("preprocess", [None, "log_sign"])
def test_odd_optimizers_answer_opposite_gradients_oppositely(hidden, layers, preprocess):
    torch.manual_seed(0)
    net = CoordinatewiseLSTM(hidden, layers, preprocess, odd=True).double()
    one, other, size = net.init_state(40), net.init_state(40), 0.0
    with torch.no_grad():
        for grad in torch.randn(6, 40, dtype=torch.float64) * 10.0 ** -torch.arange(6)[:, None]:
            update, one = net(grad, one)
            opposite, other = net(-grad, other)
            assert (update + opposite).abs().max() < 1e-15
            size = max(size, update.abs().max())
    assert size > 1e-6 or hidden == 1


def test_symmetrize_is_the_nearest_odd_optimizer():
    """A projection: linear, idempotent, and what it takes away is orthogonal to what it leaves."""
    net, plain = CoordinatewiseLSTM(7, 2, "log_sign", odd=True), CoordinatewiseLSTM(7, 2, "log_sign")
    kept = net.symmetrize(plain.state_dict())
    again = net.symmetrize(kept)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    inner = sum((kept[name] * (plain.state_dict()[name] - kept[name])).sum().item() for name in kept)
    assert abs(inner) < 1e-5 and 0 < sum(tensor.square().sum() for tensor in kept.values())


@pytest.mark.parametrize("arguments", [dict(), dict(method="autograd"), dict(second_order=True), dict(method="pes")])
def test_training_keeps_optimizers_odd(arguments):
    net = CoordinatewiseLSTM(hidden_size=6, odd=True)
    meta_train(
        net, Quadratics(dim=3), 6, 3, 2, iterations=8, lr=0.03, validation_functions=4, progress=False, **arguments
    )
    weights = net.state_dict()
    assert all(torch.equal(tensor, net.symmetrize(weights)[name]) for name, tensor in weights.items())


def test_odd_optimizers_come_back_from_their_files(tmp_path):
    net = start_as_momentum(CoordinatewiseLSTM(preprocess="log_sign", odd=True), 0.5, sign_lr=0.1)
    assert all(torch.equal(tensor, net.symmetrize(net.state_dict())[name]) for name, tensor in net.state_dict().items())
    save_optimizer(net, tmp_path / "net.safetensors")
    assert load_optimizer(tmp_path / "net.safetensors").odd and not load_optimizer("mnist").odd
    with pytest.raises(ValueError, match="6 odd units, too few for 7 running sums"):
        start_as_momentum(net, 0.5, sign_lr=0.1, averages=(0.5, 0.9, 0.95, 0.99))


# NormalizedLSTM -------------------------------------------------------------------------------------------------------


def test_normalized_reads_what_its_formula_says():
    net, gradients = NormalizedLSTM(betas=(0.5, 0.9), square_beta=0.8, fade=3.0).double(), torch.randn(6, 4).double()
    readings, (averages,) = net.read(gradients, net.init_state(4)[2:])
    for t in range(1, 7):
        seen = gradients[:t]

        def average(values, beta):
            weights = beta ** torch.arange(t - 1, -1, -1).double()
            return (weights[:, None] * values).sum(0) / weights.sum()

        size = (average(seen**2, 0.8) + 1e-16).sqrt()
        expected = torch.stack(
            [
                seen[-1] / size,
                average(seen, 0.5) / size,
                average(seen, 0.9) / size,
                torch.full((4,), math.log(t / 3.0), dtype=torch.float64),
            ]
        )
        torch.testing.assert_close(readings[t - 1], expected, rtol=1e-10, atol=1e-12)
    assert (averages[-1] == 6).all()


def test_normalized_does_not_see_the_scale_of_the_loss_and_never_steps_too_far():
    net, gradients = NormalizedLSTM(output_scale=0.2), torch.randn(5, 8)
    with torch.no_grad():
        net.output.weight.mul_(100)
        updates = []
        for scale in (1.0, 1e-4, 1e6):
            state, updates_at_scale = net.init_state(8), []
            for grad in gradients:
                update, state = net(scale * grad, state)
                updates_at_scale.append(update)
            updates.append(torch.stack(updates_at_scale))
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(updates[2], updates[0], rtol=1e-3, atol=1e-5)
    assert 0.1 < updates[0].abs().max() <= 0.2


@pytest.mark.parametrize("start", [False, True])
def test_an_odd_normalized_lstm_does_not_drift(start):
    net, gradients = NormalizedLSTM(num_layers=2, odd=True).double(), torch.randn(8, 5).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    net.load_state_dict(net.symmetrize(net.state_dict()))
    if start:  # writes odd weights
        start_as_adam(net, 0.03)
        for name, tensor in net.symmetrize(net.state_dict()).items():
            torch.testing.assert_close(tensor, net.state_dict()[name])
    state = mirrored = net.init_state(5)
    for grad in gradients:
        with torch.no_grad():
            update, state = net(grad, state)
            opposite, mirrored = net(-grad, mirrored)
        torch.testing.assert_close(opposite, -update, rtol=1e-10, atol=1e-14)
        assert update.abs().min() > 0


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("betas, mix", [((0.5, 0.8), 0.3), ((0.9,), 0.0)])
def test_start_as_adam(layers, betas, mix):
    net = start_as_adam(NormalizedLSTM(num_layers=layers, betas=betas, square_beta=0.9, fade=5.0), lr=0.02, mix=mix)
    state, mean, square, beta = net.init_state(6), 0, 0, betas[-1]
    for t, grad in enumerate(torch.randn(12, 6), 1):
        with torch.no_grad():
            update, state = net(grad, state)
        mean, square = beta * mean + (1 - beta) * grad, 0.9 * square + 0.1 * grad**2
        direction = (1 - mix) * mean / (1 - beta**t) + mix * grad
        expected = -0.02 / (1 + t / 5.0) * direction / (square / (1 - 0.9**t)).sqrt()
        torch.testing.assert_close(update, expected, rtol=0.1, atol=2e-5)


@pytest.mark.parametrize("make", [lambda: CoordinatewiseLSTM(preprocess="log_sign"), RNNProp])
def test_two_threads_do_what_one_does(make):
    net, grads, adjoint = make().double(), torch.randn(3, 700).double(), torch.randn(3, 700).double()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                update, state = net(grads[0], net.init_state(700))
            found.append([update, *state, *net.replay(grads, net.init_state(700), adjoint).values()])
        finally:
            torch.set_num_threads(1)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-13)


def test_the_shipped_general_optimizer():
    """As it is, on a small ReLU network that it has never seen: ahead of Adam as it is, and steady long after that."""
    inputs = torch.randn(256, 8)
    labels = (inputs[:, :3].prod(1) > 0).long()

    def end(make_optimizer, steps):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        optimizer = make_optimizer(model.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
        return loss.item()

    net = load_optimizer("general_lstm")
    learned = end(lambda parameters: LearnedOptimizer(parameters, net), 100)
    assert type(net) is NormalizedLSTM and learned < 0.8 * end(torch.optim.Adam, 100)
    assert end(lambda parameters: LearnedOptimizer(parameters, net), 1500) < learned


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(betas=()), TypeError, "betas must be a tuple of numbers, at least one, got ()"),
        (dict(betas=(0.5, 1.0)), ValueError, "must be in (0, 1), got 1.0"),
        (dict(square_beta=0), ValueError, "must be in (0, 1), got 0"),
        (dict(fade=0.0), ValueError, "fade must be a positive number, got 0.0"),
        (dict(hidden_size=0), ValueError, "hidden_size must be at least 1, got 0"),
    ],
)
def test_normalized_errors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        NormalizedLSTM(**arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(net=RNNProp(), lr=0.01), TypeError, "net must be a NormalizedLSTM, got RNNProp"),
        (dict(lr=0.05), ValueError, "lr must be at most a third of output_scale=0.1, got 0.05"),
        (dict(lr=0.01, mix=2), ValueError, "mix must be a number in [0, 1], got 2"),
    ],
)
def test_start_as_adam_errors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        start_as_adam(**{"net": NormalizedLSTM(), **arguments})


# RNNProp (Lv, Jiang and Li 2017) ---------------------------------------------------------------------------------------


def test_rnnprop_reads_what_adam_would_do():
    """Its readings are Adam's own step, and the gradient over the same root, computed by torch's Adam."""
    net, gradients = RNNProp(beta=0.9).double(), torch.randn(6, 4, dtype=torch.float64)
    readings, _ = net.read(gradients, net.init_state(4)[2:])
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=1.0, betas=(0.9, 0.9), eps=0.0)
    for gradient, reading in zip(gradients, readings):
        before, theta.grad = theta.detach().clone(), gradient.clone()
        adam.step()
        step = before - theta.detach()
        torch.testing.assert_close(reading[0], step, rtol=1e-10, atol=1e-12)
        mean = adam.state[theta]["exp_avg"] / (1 - 0.9 ** adam.state[theta]["step"].item())
        torch.testing.assert_close(reading[1], step * gradient / mean, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("N", [1, 16, 17, 37])
def test_rnnprop_fast_step_equals_nn_lstm(small_blocks, N):
    net = RNNProp(5, 2).double()
    slow_state = fast_state = net.init_state(N)
    for grad in torch.randn(4, N, dtype=torch.float64):
        slow, slow_state = net(grad, slow_state)
        with torch.no_grad():
            fast, fast_state = net(grad, fast_state)
        assert slow.requires_grad and not fast.requires_grad and fast.abs().max() <= 0.1
        torch.testing.assert_close(fast, slow.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(fast_state, tuple(part.detach() for part in slow_state), rtol=1e-12, atol=1e-14)


def test_rnnprop_does_not_see_the_scale_of_the_loss():
    net, first = RNNProp(), None
    with torch.no_grad():
        for scale in (1.0, 1e-4, 1e6):
            state = net.init_state(8)
            for grad in torch.randn(5, 8, generator=torch.Generator().manual_seed(0)):
                update, state = net(scale * grad, state)
            first = update if first is None else first
            torch.testing.assert_close(update, first, rtol=1e-3, atol=1e-6)


def test_rnnprop_bears_gradients_of_zero():
    net, grad = RNNProp().double(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    update, state = net(grad, net.init_state(3))
    assert all(torch.isfinite(part).all() for part in torch.autograd.grad(update.sum(), [grad, *net.parameters()]))


# Files ----------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    net = CoordinatewiseLSTM(7, 1, "log_sign", p=8.0, output_scale=0.1)
    save_optimizer(net, tmp_path / "new" / "net.safetensors", problem="a test")
    again = load_optimizer(tmp_path / "new" / "net.safetensors")
    assert again.config == net.config
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["net.safetensors"]


def test_rnnprop_saved_and_loaded(tmp_path):
    net = RNNProp(7, 1, beta=0.9, output_scale=0.2)
    save_optimizer(net, tmp_path / "net.safetensors")
    again = load_optimizer(tmp_path / "net.safetensors")
    assert type(again) is RNNProp and again.config == net.config
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


def test_failed_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_optimizer(CoordinatewiseLSTM(), path)
    content = path.read_bytes()
    monkeypatch.setattr("gradbuffer.files.os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_optimizer(CoordinatewiseLSTM(), path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "net.safetensors"
    save_optimizer(CoordinatewiseLSTM(), path)
    content, weights = path.read_bytes(), CoordinatewiseLSTM().state_dict()
    path.write_bytes(content[:200])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_optimizer(path)
    save_file(weights, path)
    with pytest.raises(ValueError, match="holds no learned optimizer"):
        load_optimizer(path)
    good = {"class": "CoordinatewiseLSTM", "config": json.dumps(CoordinatewiseLSTM().config)}
    save_file(weights, path, {**good, "format": "3"})
    with pytest.raises(ValueError, match="is of format 3; this version reads 1 to 2"):
        load_optimizer(path)
    save_file(weights, path, {**good, "format": "1"})  # from before there were digests
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_optimizer(path).state_dict().items())
    for format, digest in (("2", {}), ("1", {"sha256": "0" * 64})):
        save_file(weights, path, {**good, **digest, "format": format})
        with pytest.raises(ValueError, match="is damaged: its digest is not that of its content"):
            load_optimizer(path)
    save_file({**weights, "output.bias": torch.tensor([math.inf])}, path, {**good, "format": "1"})
    with pytest.raises(ValueError, match="the weight output.bias must be finite"):
        load_optimizer(path)
    save_file({"other": torch.zeros(2)}, path, {**good, "format": "1"})
    with pytest.raises(ValueError, match="does not describe a CoordinatewiseLSTM"):
        load_optimizer(path)
    with pytest.raises(FileNotFoundError, match="no pretrained optimizer of that name"):
        load_optimizer("no-such-optimizer")
    with pytest.raises(TypeError, match="got Linear"):
        save_optimizer(torch.nn.Linear(1, 1), path)


def test_every_text_and_every_weight_is_in_the_digest(tmp_path):
    path = tmp_path / "net.safetensors"
    save_optimizer(CoordinatewiseLSTM(p=10.0, preprocess="log_sign"), path, note="one")
    metadata, tensors = optimizers.read_file(path)
    assert metadata["note"] == "one" and load_optimizer(path).p == 10.0
    for change in ({"config": metadata["config"].replace("10.0", "11.0")}, {"note": "two"}, {"another": "note"}):
        save_file(tensors, path, {**metadata, **change})
        with pytest.raises(ValueError, match="is damaged"):
            load_optimizer(path)
    for change in ({"output.bias": tensors["output.bias"] + 1e-7}, {"output.bias": tensors["output.bias"].double()}):
        save_file({**tensors, **change}, path, metadata)
        with pytest.raises(ValueError, match="is damaged"):
            load_optimizer(path)


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    path, net = tmp_path / "net.safetensors", CoordinatewiseLSTM()
    for name in ("config", "format", "class", "sha256"):
        with pytest.raises(ValueError, match=f"notes must have other names than .*; got .'{name}'."):
            save_optimizer(net, path, **{name: "mine"})
    net.output.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the weight output.bias must be finite, but holds nan"):
        save_optimizer(net, path)
    assert not path.exists()


def test_a_folder_does_not_hide_a_pretrained_optimizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "other").mkdir()
    assert isinstance(load_optimizer("mnist"), CoordinatewiseLSTM)
    with pytest.raises(FileNotFoundError, match="no file 'other', and no pretrained optimizer of that name"):
        load_optimizer("other")


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.device("meta"), torch.no_grad],
    ids=["inference_mode", "meta device", "no_grad"],
)
def test_loading_gives_a_network_that_can_be_used_and_trained_anywhere(context):
    with context():
        net = load_optimizer("quadratics")
    assert all(not tensor.is_inference() and tensor.device.type == "cpu" for tensor in net.parameters())
    batch = Quadratics(2).sample(2)
    grads, _ = meta_gradient(net, batch, batch.params, net.init_state(4), unroll=3, method="autograd")
    assert all(grad.isfinite().all() for grad in grads.values())


def test_pretrained_optimizers_are_listed_with_their_notes(tmp_path, monkeypatch):
    listed = pretrained_optimizers()
    assert {"quadratics", "quadratics_odd", "mnist", "mnist_from_nag", "general", "general_lstm"} <= set(listed)
    for name, notes in listed.items():
        assert notes["class"] == type(load_optimizer(name)).__name__ and notes["problem"] and notes["validation"]
        assert notes["seed"][0].isdigit() and re.search(
            "meta_training.py|README|ipynb|general_mlp.py", notes["command"]
        )
        assert re.search(r"\d", notes["result"])
        assert (optimizers.PRETRAINED / f"{name}.safetensors").stat().st_size < 100_000
    monkeypatch.setattr(optimizers, "PRETRAINED", tmp_path)
    assert pretrained_optimizers() == {}
    save_optimizer(CoordinatewiseLSTM(), tmp_path / "mine.safetensors", problem="none yet")
    assert list(pretrained_optimizers()) == ["mine"] and pretrained_optimizers()["mine"]["problem"] == "none yet"
    assert isinstance(load_optimizer("mine"), CoordinatewiseLSTM)
    (tmp_path / "mine.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="mine.safetensors is not a readable safetensors file"):
        pretrained_optimizers()


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": 2.0}, TypeError, "hidden_size must be an int, got 2.0"),
        ({"num_layers": -1}, ValueError, "num_layers must be at least 1, got -1"),
        ({"preprocess": "log"}, ValueError, r"preprocess must be one of \[None, 'log_sign', .* got 'log'"),
        ({"p": 0}, ValueError, "p must be a number in"),
        ({"output_scale": float("nan")}, ValueError, "output_scale must be a finite number"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        CoordinatewiseLSTM(**arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"beta": 1.0}, ValueError, r"beta must be a number in \[0, 1\), got 1.0"),
        ({"output_scale": 0}, ValueError, "output_scale must be a positive number, got 0"),
        ({"eps": -1.0}, ValueError, "eps must be a positive number, got -1.0"),
    ],
)
def test_bad_arguments_of_rnnprop(arguments, error, message):
    with pytest.raises(error, match=message):
        RNNProp(**arguments)


def test_bad_steps():
    net = CoordinatewiseLSTM()
    state = net.init_state(4)
    with pytest.raises(TypeError, match="grad must be a tensor, got list"):
        net([1.0] * 4, state)
    with pytest.raises(ValueError, match=r"grad must have shape \(N,\)"):
        net(torch.zeros(4, 1), state)
    with pytest.raises(
        ValueError, match=r"state's hidden must have shape \(2, 20, 5\) for 5 coordinates, got \(2, 20, 4\)"
    ):
        net(torch.zeros(5), state)
    with pytest.raises(ValueError, match="grad is torch.float64"):
        net(torch.zeros(4).double(), state)
    with pytest.raises(TypeError, match="state must be init_state's tuple of 2 tensors"):
        net(torch.zeros(4), state[0])
    with pytest.raises(NonFiniteError, match="grad must be finite, but holds nan at coordinate 2 .1 of 4"):
        net(torch.tensor([0.0, 1.0, float("nan"), 2.0]), state)
    many = torch.zeros(70_001)  # looked at in pieces
    many[65_536] = float("inf")
    with pytest.raises(NonFiniteError, match="grad must be finite, but holds inf at coordinate 65536 .1 of 70001"):
        net(many, net.init_state(70_001))
    with pytest.raises(ValueError, match="num_coordinates must be at least 1, got 0"):
        net.init_state(0)
    with pytest.raises(ValueError, match="adjoint must have the shape of grads"):
        net.replay(torch.zeros(3, 4), state, torch.zeros(3, 5))
