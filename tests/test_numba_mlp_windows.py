"""Compiled windows of perceptrons against the learned optimizer in plain torch, with gradients by autograd."""

import math

import pytest
import torch

from gradbuffer.kernels import numba_mlp_windows as module
from gradbuffer.kernels.numba_mlp_windows import PerceptronWindows, minibatches
from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam

ACTIVATE = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu}
EXAMPLES = 90


def data(sizes, loss, dtype, autoencoder=False):
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(EXAMPLES, sizes[0], generator=generator, dtype=torch.float64).to(dtype)
    if loss == "cross_entropy":
        return inputs, torch.randint(sizes[-1], (EXAMPLES,), generator=generator)
    return inputs, inputs if autoencoder else torch.randn(
        EXAMPLES, sizes[-1], generator=generator, dtype=torch.float64
    ).to(dtype)


def some_weights(net, dtype, sets=None):
    """Weights near the start, one set for each particle or one for all."""
    start_as_normalized_adam(net)
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(*((sets,) if sets else ()), len(flat), generator=generator, dtype=torch.float64)
    return (flat + 0.1 * noise).to(dtype)


def reference(net, windows, weights, params, state, inputs, targets, index, lr, first=0):
    """The same window by autograd and `MLPOptimizer`: losses (B, steps) and the end."""
    params, state, losses = windows.unflatten_params(params.clone()), windows.unflatten_state(state.clone()), []
    steps = index.shape[1]
    lr = torch.as_tensor(lr, dtype=windows.dtype).expand(len(index), steps)
    for t in range(steps):
        params = {name: value.detach().requires_grad_() for name, value in params.items()}
        x, own = inputs[index[:, t]], list(params.values())  # (B, batch, inputs)
        for l in range(0, len(own), 2):
            x = x @ own[l].mT + own[l + 1][:, None]
            x = ACTIVATE[windows.activation](x) if l + 2 < len(own) else x
        if windows.loss == "cross_entropy":
            loss = torch.nn.functional.cross_entropy(x.flatten(0, 1), targets[index[:, t]].flatten(), reduction="none")
            loss = loss.unflatten(0, x.shape[:2]).mean(1)
        else:
            loss = (x - targets[index[:, t]]).square().mean((1, 2))
        grads = dict(zip(params, torch.autograd.grad(loss.sum(), own)))
        with torch.no_grad():
            updates, state = net(grads, state, params=params, lr=lr[:, t], weights=weights)
            params = {name: value + updates[name] for name, value in params.items()}
        losses.append(loss.detach())
    return torch.stack(losses, 1), windows.flatten_params(params), windows.flatten_state(state)


DTYPES = torch.float64, torch.float32
CASES = [
    ((64, 32, 10), "relu", "cross_entropy", 64, {}, DTYPES),
    ((9, 7, 5, 3), "tanh", "cross_entropy", 20, {}, DTYPES),
    ((5, 3), "relu", "cross_entropy", 16, {"vectors": "adamw"}, DTYPES),
    ((17, 6, 17), "silu", "mse", 140, {"weight_decay": 0.1}, DTYPES),
    ((8, 6, 4, 4, 1), "sigmoid", "mse", 3, {"vectors": "adamw", "weight_decay": 0.1}, DTYPES),
    ((2, 33, 2), "relu", "cross_entropy", 33, {"hidden_sizes": (5, 4, 3)}, DTYPES[:1]),  # compiled for itself
    ((12, 40, 12), "tanh", "mse", 17, {"context": True}, DTYPES),
    ((20, 12, 5), "silu", "cross_entropy", 24, {"context": True, "orthogonalize": True}, DTYPES),
]


@pytest.mark.parametrize(
    "sizes, activation, loss, batch, options, dtype",
    [(*case, dtype) for *case, dtypes in CASES for dtype in dtypes],
    ids=str,
)
def test_windows_are_those_of_the_reference(sizes, activation, loss, batch, options, dtype):
    B, steps = 3, 20
    net = MLPOptimizer(**options).to(dtype)
    windows = PerceptronWindows(net, sizes, activation, loss, dtype)
    inputs, targets = data(sizes, loss, dtype, autoencoder=sizes[0] == sizes[-1])
    weights = some_weights(net, dtype, sets=B)
    params, state = windows.draw_params(B, seed=1), windows.init_state(B)
    lr = torch.linspace(0.001, 0.01, B)[:, None] * torch.linspace(1, 0.1, steps)
    index = minibatches(range(B), 5, steps, batch, EXAMPLES)
    losses, theta, end = reference(net, windows, weights, params, state, inputs, targets, index, lr)
    found = windows.run(
        weights, (params, state), (inputs, targets), lr=lr, steps=steps, batch=batch, seeds=range(B), first_steps=5
    )
    close = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(found, losses, **close)
    torch.testing.assert_close(params, theta, **close)
    torch.testing.assert_close(state, end, **close)


def small(options=None, sizes=(6, 5, 3), loss="cross_entropy", dtype=torch.float64, B=4):
    net = MLPOptimizer(**options or {}).to(dtype)
    windows = PerceptronWindows(net, sizes, "relu", loss, dtype)
    return (
        net,
        windows,
        some_weights(net, dtype),
        windows.draw_params(B, seed=1),
        windows.init_state(B),
        *data(sizes, loss, dtype),
    )


def test_shared_weights_and_given_minibatches():
    net, windows, weights, params, state, inputs, targets = small()
    index = torch.randint(EXAMPLES, (6, 20))
    losses, theta, end = reference(net, windows, weights, params, state, inputs, targets, index.expand(4, 6, 20), 0.01)
    each = [(params.clone(), state.clone()) for _ in range(2)]
    found = windows.run(weights, (params, state), (inputs, targets), lr=0.01, index=index)
    for part, expected in ((found, losses), (params, theta), (state, end)):
        torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-10)
    rates = torch.full((4, 1), 0.01, dtype=torch.float64)
    again = [
        windows.run(w, start, (inputs, targets), lr=rates, index=i)
        for start, w, i in zip(each, (weights, weights.expand(4, -1)), (index, index.expand(4, 6, 20)))
    ]
    assert all(torch.equal(found, other) for other in again) and all(torch.equal(params, p) for p, _ in each)


def test_scaled_gradients_are_those_in_other_coordinates():
    """With θ = c · θ' the gradient by θ' is c times that by θ, and so are the averages; a direction moves θ by c · lr."""
    net, windows, weights, params, state, inputs, targets = small()
    scales = torch.tensor([1e-3, 0.5, 1.0, 40.0], dtype=torch.float64)
    index, begun = minibatches(range(4), 0, 12, 20, EXAMPLES), params.clone()
    losses = windows.run(weights, (params, state), (inputs, targets), lr=0.01, index=index, gradient_scales=scales)

    class Scaled(torch.nn.Module):
        def forward(self, grads, state, **given):
            return net(
                {name: grad * scales.view(-1, *[1] * (grad.dim() - 1)) for name, grad in grads.items()}, state, **given
            )

    expected = reference(Scaled(), windows, weights, begun, windows.init_state(4), inputs, targets, index, 0.01)
    for part, other in zip((losses, params, state), expected):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(losses[0], losses[2])
    with pytest.raises(ValueError, match="gradient_scales must be above 0"):
        windows.run(weights, (params, state), (inputs, targets), lr=0.01, index=index, gradient_scales=0.0)


def test_a_window_in_two_parts_is_the_same():
    _, windows, weights, params, state, inputs, targets = small({"vectors": "adamw"})
    whole = params.clone(), state.clone()
    given = dict(lr=0.01, batch=20, seeds=[3, 3, 5, 6])
    losses = windows.run(weights, whole, (inputs, targets), steps=10, **given)
    parts = [
        windows.run(weights, (params, state), (inputs, targets), steps=4, **given),
        windows.run(weights, (params, state), (inputs, targets), steps=6, first_steps=torch.full((4,), 4), **given),
    ]
    assert torch.equal(torch.cat(parts, 1), losses) and torch.equal(params, whole[0]) and torch.equal(state, whole[1])


def test_threads_change_nothing(threads_as_before):
    _, windows, weights, params, state, inputs, targets = small(B=5)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        own = params.clone(), state.clone()
        results.append((windows.run(weights, own, (inputs, targets), lr=0.01, steps=8, batch=20, seeds=range(5)), *own))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_minibatches_are_spread_and_repeat():
    index = minibatches([4, 4, 9], torch.tensor([0, 1, 0]), 50, 64, 10)
    assert torch.equal(index[0, 1:], index[1, :-1]) and not torch.equal(index[0], index[2])
    counts = index[[0, 2]].flatten().bincount(minlength=10)
    assert len(counts) == 10 and ((counts - 640).abs() < 6 * math.sqrt(640)).all()


@pytest.mark.parametrize("clip", [None, 3.0])
def test_a_particle_that_diverges_harms_nobody(clip):
    _, windows, weights, params, state, inputs, targets = small(dtype=torch.float32)
    healthy = params.clone(), state.clone()
    given = dict(steps=12, batch=20, seeds=range(4), clip=clip)
    expected = windows.run(weights, healthy, (inputs, targets), lr=0.01, **given)
    rates = torch.tensor([0.01, 1e30, 0.01, 0.01], dtype=torch.float64)[:, None]
    params[3, 5] = math.nan
    losses = windows.run(weights, (params, state), (inputs, targets), lr=rates, **given)
    for b in (0, 2):
        assert torch.equal(losses[b], expected[b]) and torch.equal(params[b], healthy[0][b])
        assert torch.equal(state[b], healthy[1][b]) and params[b].isfinite().all()
    assert (
        (losses[3] == (clip or math.inf)).all() and (losses[1, 3:] >= (clip or 1e10)).all() and not losses.isnan().any()
    )


def test_zero_gradients_do_not_move():
    net, windows, weights, params, state, inputs, targets = small({"weight_decay": 0.1}, loss="mse", sizes=(6, 5, 3))
    with torch.no_grad():
        parts = windows.unflatten_params(params)
        parts["bias_0"].fill_(-1e6)  # no unit of the hidden layer is alive
    before, index = params.clone(), minibatches(range(4), 0, 5, 20, EXAMPLES)
    losses, theta, end = reference(net, windows, weights, params, state, inputs, targets, index, 0.01)
    windows.run(weights, (params, state), (inputs, targets), lr=0.01, index=index)
    torch.testing.assert_close(params, theta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-10)
    after, before = windows.unflatten_params(params), windows.unflatten_params(before)
    for name in params_that_stay():
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["bias_1"], before["bias_1"])


def params_that_stay():
    return "weight_0", "bias_0", "weight_1"


def flushes():
    return bool(torch.tensor([1e-40]) * 1 == 0)


@pytest.mark.parametrize("before", [False, True])
def test_numbers_near_zero_do_not_slow_a_window(before, monkeypatch):
    """While a window runs, and then alone: they take seven times as long, and losses near 0 are full of them."""
    seen, run_particles = [], module.run_particles
    monkeypatch.setattr(module, "run_particles", lambda *given: (seen.append(flushes()), run_particles(*given)))
    torch.set_flush_denormal(before)
    try:
        windows = PerceptronWindows(MLPOptimizer(), (4, 3, 2))
        params = windows.draw_params(2, seed=0), windows.init_state(2)
        weights = torch.nn.utils.parameters_to_vector(MLPOptimizer().parameters())
        data = torch.randn(9, 4), torch.zeros(9, dtype=torch.int64)
        windows.run(weights, params, data, lr=0.01, steps=2, batch=3, seeds=range(2))
        assert seen and all(seen) and flushes() is before
    finally:
        torch.set_flush_denormal(False)


def test_layout_of_params_and_state():
    net, windows, _, params, state, *_ = small({"vectors": "adamw"})
    named = windows.unflatten_params(params, ["a", "b", "c", "d"])
    assert {name: tuple(value.shape[1:]) for name, value in named.items()} == {
        "a": (5, 6),
        "b": (5,),
        "c": (3, 5),
        "d": (3,),
    }
    assert torch.equal(windows.flatten_params(named), params)
    state.copy_(torch.arange(state.numel()).reshape(state.shape))
    parts, fresh = windows.unflatten_state(state), net.init_state(windows.unflatten_params(params))
    assert {n: {k: v.shape for k, v in s.items()} for n, s in parts.items()} == {
        n: {k: v.shape for k, v in s.items()} for n, s in fresh.items()
    }
    assert torch.equal(windows.flatten_state(parts), state)
    with pytest.raises(ValueError, match="params must have the shapes"):
        windows.flatten_params({"a": named["b"]})


def test_drawn_params():
    windows = small(sizes=(16, 5, 3))[1]
    params = windows.unflatten_params(windows.draw_params(50, seed=1))
    assert 0.24 < params["weight_0"].abs().max() <= 0.25 and 0.2 < params["bias_0"].abs().max() <= 0.25
    assert 0.4 < params["weight_1"].abs().max() <= 5**-0.5
    assert not torch.equal(windows.draw_params(2, seed=1), windows.draw_params(2, seed=2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"params": torch.zeros(4, 3)}, "params must be"),
        ({"state": torch.zeros(4, 3)}, "state must be"),
        ({"weights": torch.zeros(3, 5)}, "weights must be"),
        ({"inputs": torch.zeros(9, 5)}, "inputs must be"),
        ({"inputs": torch.zeros(EXAMPLES, 6)}, "inputs must be of torch.float64"),
        ({"targets": torch.zeros(EXAMPLES)}, "targets must be"),
        ({"targets": torch.full((EXAMPLES,), 3)}, "targets must be from 0 to 2"),
        ({"lr": -1.0}, "lr must be"),
        ({"lr": torch.tensor([[1.0], [math.nan], [1.0], [1.0]])}, "lr must be finite"),
        ({"lr": torch.ones(4)}, "lr must be a number"),
        ({"clip": 0.0}, "clip must be"),
        ({"seeds": None}, "index, or steps"),
        ({"seeds": [1, 2]}, "seeds must be"),
        ({"steps": 0}, "steps must be"),
        ({"first_steps": -1}, "first_steps must be"),
        ({"seeds": None, "index": torch.full((2, 5), EXAMPLES)}, "index must be from 0"),
        ({"seeds": None, "index": torch.zeros(5, dtype=torch.int64)}, "index must be \\(steps"),
    ],
)
def test_what_is_given_is_checked(change, message):
    _, windows, weights, params, state, inputs, targets = small()
    given = (
        dict(
            weights=weights,
            params=params,
            state=state,
            inputs=inputs,
            targets=targets,
            lr=0.01,
            steps=5,
            batch=20,
            seeds=range(4),
        )
        | change
    )
    with pytest.raises((TypeError, ValueError), match=message):
        given["particles"] = given.pop("params"), given.pop("state")
        windows.run(data=(given.pop("inputs"), given.pop("targets")), **given)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"net": torch.nn.Linear(2, 2)}, "net must be an MLPOptimizer"),
        ({"net": MLPOptimizer(variant="small_fc")}, "net must have variant"),
        ({"sizes": (5,)}, "sizes must be"),
        ({"sizes": (5, 0)}, "sizes"),
        ({"activation": "gelu"}, "activation must be"),
        ({"loss": "l1"}, "loss must be"),
        ({"dtype": torch.float16}, "dtype must be"),
    ],
)
def test_arguments_are_checked(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PerceptronWindows(**{"net": MLPOptimizer(), "sizes": (5, 3), **change})
