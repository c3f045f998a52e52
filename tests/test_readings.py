"""A preprocessing is an entry of one table: every path computes what it says."""

import pytest
import torch
from conftest import write_mnist

from gradbuffer.nets.readings import READINGS, Readings
from gradbuffer.unrolling import Coordinates
from meta_training import meta_gradient
from optimizees import MNISTNet, Quadratics
from optimizers import (
    CoordinatewiseLSTM,
    LearnedOptimizer,
    LSTMWithGAC,
    load_optimizer,
    save_optimizer,
    start_as_coordinatewise,
)


@pytest.fixture
def third(monkeypatch):
    """A user's own: three readings, the last one even."""
    monkeypatch.setitem(
        READINGS, "third", Readings(lambda grad, p: torch.stack([grad**3, grad / p, grad.abs()], -2), (-1, -1, 1))
    )
    return "third"


@pytest.fixture(params=["plain", "torch", "numba"])
def kernels(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("L2O_KERNELS", request.param)


def network(preprocess, **options):
    return CoordinatewiseLSTM(5, preprocess=preprocess, p=4.0, output_scale=0.1, **options).double()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


NAMES = [None, "log_sign", "with_log_size", "third"]


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_replays(third, kernels, name):
    net, grads, adjoint = network(name), *torch.randn(2, 4, 37, dtype=torch.float64)
    updates, state = [], net.init_state(37)
    for grad in grads:
        update, state = net(grad, state)  # by autograd
        updates.append(update)
    expected = torch.autograd.grad((torch.stack(updates) * adjoint).sum(), list(net.parameters()))
    here = net.init_state(37)
    close(list(net.replay(grads, here, adjoint).values()), list(expected))
    with torch.no_grad():
        step, own, tape = net.recorder(here, 4)
        for grad, update in zip(grads, updates):
            close(step(grad), update.detach())
        close(list(own), [part.detach() for part in state])
        close(list(net.replay(grads, here, adjoint, tape=tape).values()), list(expected))
        close(net(grads[0], here)[0], updates[0].detach())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("functions", ["quadratics", "networks"])
def test_windows(third, kernels, name, second_order, functions, tmp_path):
    """Compiled ones where there are such, and single steps."""
    problems = {
        "quadratics": lambda: Quadratics(4, torch.float64),
        "networks": lambda: MNISTNet(
            (3,), batch_size=8, root=write_mnist(tmp_path / "mnist", side=6), dtype=torch.float64
        ),
    }
    batch, net = problems[functions]().sample(2, torch.Generator().manual_seed(0)), network(name)
    state = net.init_state(sum(tensor.numel() for tensor in batch.params.values()))
    (found, info), (expected, reference) = (
        meta_gradient(net, batch, batch.params, state, unroll=5, method=method, second_order=second_order)
        for method in ("replay", "autograd")
    )
    close(info.losses, reference.losses)
    for key in expected:
        assert (found[key] - expected[key]).norm() <= 1e-10 * expected[key].norm()


@pytest.mark.parametrize("name", NAMES)
def test_networks_that_share_read_the_same(third, name):
    plain, net = network(name), LSTMWithGAC(5, shared=0, preprocess=name, p=4.0, output_scale=0.1).double()
    net.load_state_dict(plain.state_dict())
    grad = torch.randn(7, dtype=torch.float64)
    close(net(grad, net.init_state(7))[0], plain(grad, plain.init_state(7))[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "make", [network, lambda name, odd: LSTMWithGAC(10, shared=2, preprocess=name, odd=odd).double()]
)
def test_odd_networks(third, name, make):
    net, grad = make(name, odd=True), torch.randn(7, dtype=torch.float64)
    update, opposite = net(grad, net.init_state(7))[0], net(-grad, net.init_state(7))[0]
    close(opposite, -update)
    assert update.abs().min() > 0


def test_a_sharing_network_starts_as_one_that_reads_something_new(third, monkeypatch):
    plain, net = network("third"), LSTMWithGAC(7, shared=2, preprocess="third", p=4.0, output_scale=0.1).double()
    start_as_coordinatewise(net, plain)
    grad = torch.randn(6, dtype=torch.float64)
    bound = net.bind(Coordinates({"theta": torch.zeros(2, 3)}))
    close(bound(grad, bound.init_state(6))[0], plain(grad, plain.init_state(6))[0])
    monkeypatch.setitem(READINGS, "odd", Readings(lambda grad, p: grad.unsqueeze(-2), (-1,)))
    with pytest.raises(
        ValueError, match="net must read something that does not change sign with the gradient, 'odd' has nothing such"
    ):
        start_as_coordinatewise(LSTMWithGAC(7, shared=2, preprocess="odd", p=4.0, output_scale=0.1), network("odd"))


def test_it_trains_a_model_and_comes_back_from_its_file(third, tmp_path):
    net, weight = network("third"), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    save_optimizer(net, tmp_path / "net.safetensors")
    again = load_optimizer(tmp_path / "net.safetensors")
    optimizer = LearnedOptimizer([weight], again)
    weight.square().sum().backward()
    optimizer.step()
    close(weight.detach(), 1 + net(torch.full((3,), 2.0).double(), net.init_state(3))[0].detach())
