"""Persistent evolution strategies: unbiased over windows, antithetic, and without trace in the network."""

from types import SimpleNamespace

import pytest
import torch
from cases import make_batch, make_net
from torch import nn

from gradbuffer.checks import values_unchecked
from gradbuffer.contracts import as_rule
from gradbuffer.nests import Snapshot, form_of
from gradbuffer.training.evolution import PES
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.training.run import Run
from gradbuffer.unrolling import Coordinates
from meta_training import evaluate, meta_train
from optimizees import MetaBatch, Quadratics
from optimizers import CoordinatewiseLSTM


class Rate(nn.Module):
    """Gradient descent with a learned rate: one meta-parameter, so that the true meta-gradient is easily had."""

    def __init__(self, rate=0.1):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def init_state(self, num_coordinates, device=None, dtype=None):
        return {"steps": torch.zeros(num_coordinates, dtype=torch.float64)}

    def forward(self, grad, state):
        return -self.rate * grad, {"steps": state["steps"] + 1}


def bowl(curvature=1.0):
    start = {"x": torch.ones(1, 1, dtype=torch.float64)}
    return MetaBatch(start, lambda params, step: 0.5 * curvature * params["x"].square().sum(1))


def windows(net, batch, unroll, count, generator, **options):
    params, state, total = batch.params, net.init_state(1), 0
    for window in range(count):
        grads, info = meta_gradient(
            net, batch, params, state, window * unroll, unroll, "pes", sigma=0.01, generator=generator, **options
        )
        params, state, total = info.params, info.state, total + grads["rate"]
    return total, info


def test_no_truncation_bias():
    """f = x²/2, x_t = (1 - r)^t: the derivative of Σ_t f_t by r is known; windows of one step see all of it."""
    net, generator, rate, steps = Rate(), torch.Generator().manual_seed(0), 0.1, 6
    expected = sum(-t * (1 - rate) ** (2 * t - 1) for t in range(1, steps + 1))
    estimates = torch.stack([windows(net, bowl(), 1, steps, generator)[0] for _ in range(500)])
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - expected) < 4 * error and error < 0.08 * abs(expected)
    truncated, params, state = 0, bowl().params, net.init_state(1)
    for window in range(steps):
        grads, info = meta_gradient(net, bowl(), params, state, window, 1)
        truncated, params, state = truncated + grads["rate"].item(), info.params, info.state
    assert abs(truncated - expected) > 7 * error  # what truncated backpropagation would have given


def test_pairs_are_antithetic_and_average():
    """One window, a loss that is linear in the perturbation up to third order: each pair gives ε²/σ² of the slope."""
    net = Rate()
    exact = -0.9
    one, _ = windows(net, bowl(), 1, 1, torch.Generator().manual_seed(1))
    epsilon = 0.01 * torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(one, exact * epsilon**2 / 0.01**2, rtol=1e-6, atol=0)
    many, info = windows(net, bowl(), 1, 1, torch.Generator().manual_seed(1), pairs=400)
    assert many.item() == pytest.approx(exact, rel=0.25) and len(info.state.particles) == 400


def test_the_network_is_left_as_it_was():
    net = CoordinatewiseLSTM()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batch = Quadratics().sample(3)
    grads, info = meta_gradient(net, batch, batch.params, net.init_state(30), unroll=3, method="pes", pairs=2)
    assert list(grads) == [name for name, _ in net.named_parameters()] and info.losses.shape == (4, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())

    def broken(params, step):
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        meta_gradient(net, MetaBatch(batch.params, broken), batch.params, net.init_state(30), method="pes")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_frozen_parameters_are_not_perturbed():
    net, batch = CoordinatewiseLSTM(), Quadratics().sample(2)
    net.output.bias.requires_grad_(False)
    grads, _ = meta_gradient(net, batch, batch.params, net.init_state(20), unroll=2, method="pes")
    assert "output.bias" not in grads


def test_it_trains():
    class Bowls:
        def sample(self, meta_batch, generator=None):
            start = {"x": torch.randn(meta_batch, 1, generator=generator, dtype=torch.float64)}
            return MetaBatch(start, lambda params, step: params["x"].square().sum(1))

    net = Rate(0.01)
    history = meta_train(
        net, Bowls(), steps=20, unroll=5, meta_batch=4, iterations=120, lr=0.02, method="pes", warmup=0, progress=False
    )
    assert history.best_validation < 0.3 * history.validation[0][1] and 0.2 < net.rate < 0.8


def test_bad_input():
    net, batch = Rate(), bowl()
    with pytest.raises(ValueError, match="sigma must be a positive number, got 0"):
        meta_gradient(net, batch, batch.params, net.init_state(1), method="pes", sigma=0)
    with pytest.raises(ValueError, match="pairs must be at least 1, got 0"):
        meta_gradient(net, batch, batch.params, net.init_state(1), method="pes", pairs=0)
    with pytest.raises(ValueError, match='second_order=True needs method="replay" or "autograd"'):
        meta_gradient(net, batch, batch.params, net.init_state(1), method="pes", second_order=True)
    _, info = meta_gradient(net, batch, batch.params, net.init_state(1), method="pes", pairs=2)
    with pytest.raises(ValueError, match="pairs must stay what it was in the window before, 2, got 1"):
        meta_gradient(net, batch, info.params, info.state, method="pes")


@pytest.mark.parametrize("network", ["LSTM", "RNNProp", "PerKind", "GAC"])
@pytest.mark.parametrize("per_function", [False, True])
def test_perturbed_weights_are_seen_where_networks_do_not_look(network, per_function, monkeypatch):
    """On a device networks do not wait to see whether their weights have changed: they are told."""
    net, batch = make_net(network), make_batch("quadratics", None)
    state = as_rule(net, Coordinates(batch.params)).init_state(8)
    method = PES(per_function=per_function)

    def estimate():
        drawn = torch.Generator().manual_seed(0)
        return meta_gradient(net, batch, batch.params, state, unroll=3, method=method, generator=drawn)[0]

    def look(self, tensors, wait=True):
        return holds(self, tensors) if wait else form_of(tensors) == self.form

    wanted, holds = estimate(), Snapshot.holds
    monkeypatch.setattr(Snapshot, "holds", look)
    with values_unchecked():
        found = estimate()
    assert all(wanted[name].any() for name in wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("network", ["LSTM", "RNNProp", "PerKind", "GAC"])
def test_an_evaluation_sees_new_weights_where_networks_do_not_look(network, monkeypatch):
    net, kept = make_net(network), Snapshot.holds
    before = evaluate(net, Quadratics(4, torch.float64), 5, 2)
    monkeypatch.setattr(Snapshot, "holds", lambda self, tensors, wait=True: form_of(tensors) == self.form)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 2
    found = evaluate(net, Quadratics(4, torch.float64), 5, 2)
    monkeypatch.setattr(Snapshot, "holds", kept)
    torch.testing.assert_close(found, evaluate(net, Quadratics(4, torch.float64), 5, 2))
    assert not torch.equal(found, before)


def test_families_of_a_mixture_draw_noise_of_their_own():
    """Of a generator's seed torch reads 32 bits: what tells families apart must lie within them."""
    run = SimpleNamespace(options=SimpleNamespace(seed=1), iteration=3, ranks=SimpleNamespace(size=2, rank=1))
    drawn = [Run.window_generator(run, family).initial_seed() % 2**32 for family in range(100)]
    assert len(set(drawn)) == 100
