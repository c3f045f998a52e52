"""The optimizer in the span of gradients and moves: its minimizer, units, traps, and the trained ones that come with it."""

import copy

import pytest
import torch

from gradbuffer.nets.subspace import SubspaceLSTM, minimizer
from meta_training import evaluate, evaluate_baseline
from optimizees import Quadratics
from optimizers import LearnedOptimizer, load_optimizer


def make_net(weights=0.3, **options):
    """A network whose output does something."""
    torch.manual_seed(0)
    net = SubspaceLSTM(4, **options).double()
    torch.nn.init.normal_(net.output.weight, std=weights)
    return net


def run(net, loss, theta, steps):
    """θ after every step (steps + 1, B, n)."""
    state, path = net.init_state({"theta": theta}), [theta]
    for _ in range(steps):
        theta = theta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(theta).sum(), theta)
        with torch.no_grad():
            updates, state = net({"theta": grad}, state, params={"theta": theta})
        theta = theta.detach() + updates["theta"]
        path.append(theta)
    return torch.stack(path)


def quadratic(seed=0, functions=3, n=5):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(functions, n, n, generator=generator, dtype=torch.float64)
    return lambda theta: ((W @ theta[..., None])[..., 0] - 1).square().sum(1), 2 * W.mT @ W


def test_the_minimizer_is_that_of_a_quadratic_function():
    """Nothing is left of the gradient along the moves, at the place and with the gradient that are said."""
    loss, hessian = quadratic()
    moves = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grad = torch.func.grad(lambda theta: loss(theta).sum())
    step, difference = minimizer(moves, moves @ hessian, grad(theta), torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(grad(theta + step), grad(theta) + difference)
    torch.testing.assert_close((moves @ (grad(theta) + difference)[..., None]), torch.zeros(3, 2, 1).double())
    assert all(torch.linalg.matrix_rank(torch.cat([own, end[None]]), atol=1e-9) == 2 for own, end in zip(moves, step))


def test_a_move_along_which_the_gradient_falls_has_no_part():
    moves = torch.eye(3, dtype=torch.float64)[None, :2]
    changes = moves * torch.tensor([2.0, -1.0], dtype=torch.float64)[:, None]
    step, difference = minimizer(moves, changes, torch.ones(1, 3).double(), torch.tensor(1e-12).double())
    torch.testing.assert_close(step, torch.tensor([[-0.5, 0, 0]]).double())
    torch.testing.assert_close(difference, torch.tensor([[-1.0, 0, 0]]).double())


@pytest.mark.parametrize("of_loss, of_theta", [(1e-3, 1.0), (1.0, 50.0), (1e4, 0.01)])
def test_units_change_nothing_but_the_first_step(of_loss, of_theta):
    """Another unit of the loss or of θ, and a first step of the same length in the new unit: the same path."""
    net, (loss, _) = make_net(), quadratic()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled.log_rate += torch.tensor(of_theta**2 / of_loss).log()
    start = torch.ones(3, 5, dtype=torch.float64)
    path = run(net, loss, start, 12)
    other = run(scaled, lambda theta: of_loss * loss(theta / of_theta), of_theta * start, 12)
    assert (path[-1] - path[0]).abs().min() > 1e-3
    torch.testing.assert_close(other / of_theta, path, rtol=1e-7, atol=1e-7)


def test_turned_coordinates_turn_the_path():
    """No coordinate is told from another: in turned axes it takes the turned path, which no coordinatewise optimizer does."""
    net, (loss, _) = make_net(), quadratic()
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    start = torch.ones(3, 5, dtype=torch.float64)
    path = run(net, loss, start, 8)
    torch.testing.assert_close(run(net, lambda theta: loss(theta @ turn.T), start @ turn, 8), path @ turn)


def test_a_function_without_slope_stays_and_does_not_disturb_others():
    net, (loss, _) = make_net(), quadratic()
    start = torch.ones(3, 5, dtype=torch.float64)
    alive = torch.tensor([1.0, 0.0, 1.0]).double()
    path, whole = run(net, lambda theta: alive * loss(theta), start, 10), run(net, loss, start, 10)
    assert torch.equal(path[-1, 1], start[1])
    torch.testing.assert_close(path[:, ::2], whole[:, ::2])


def test_a_gradient_of_zero_leaves_finite_derivatives():
    net = make_net()
    theta = torch.ones(2, 3, dtype=torch.float64)
    state = net.init_state({"theta": theta})
    for factor in (1.0, 0.0, 0.0, 1.0):
        updates, state = net({"theta": factor * theta}, state, params={"theta": theta})
        theta = theta + factor * updates["theta"]
    grads = torch.autograd.grad(theta.sum(), list(net.parameters()))
    assert all(torch.isfinite(grad).all() for grad in grads) and any(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3, 3)])
def test_tensors_of_any_shape_are_as_flat_ones(shape):
    net = make_net()
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    found = run(net, lambda theta: theta.reshape(2, -1).pow(4).sum(1), theta, 4)
    flat = run(net, lambda theta: theta.pow(4).sum(1), theta.reshape(2, -1), 4)
    torch.testing.assert_close(found.reshape(flat.shape), flat)


def test_as_an_optimizer_of_torch_it_takes_the_same_steps():
    """Also where the parameters are moved by more than its update: it reads where they are."""
    net, (loss, _) = make_net(), quadratic(functions=1)
    path = run(net, loss, torch.ones(1, 5, dtype=torch.float64), 6)
    parameter = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = LearnedOptimizer([parameter], net)
    for _ in range(6):
        optimizer.zero_grad()
        loss(parameter[None]).sum().backward()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), path[-1, 0])


def test_what_is_given_is_checked():
    for options, error in (
        ({"hidden_size": 0}, ValueError),
        ({"pairs": 1.5}, TypeError),
        ({"first_rate": 0.0}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            SubspaceLSTM(**options)
    net, params = SubspaceLSTM(), {"theta": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="grads must have the names"):
        net({"other": torch.zeros(2, 3)}, net.init_state(params), params=params)
    with pytest.raises(ValueError, match=r"grads\['theta'\] must have its parameter's shape \(2, 3\)"):
        net({"theta": torch.zeros(2, 4)}, net.init_state(params), params=params)


@pytest.mark.parametrize("name", ["quadratics_subspace", "quadratics_subspace_1", "quadratics_subspace_2"])
def test_the_trained_ones_are_ahead(name):
    """On 500 new functions: the sum over 100 steps, and the median at the end against the best first-order baseline's."""
    losses = evaluate(load_optimizer(name), Quadratics(), 100, 500, seed=99)
    momentum = evaluate_baseline(torch.optim.SGD, {"lr": 0.0147, "momentum": 0.9}, Quadratics(), 100, 500, seed=99)
    assert losses.sum(1).mean() < 40 < 90 < momentum.sum(1).mean()
    assert losses[:, -1].median() < 1e-6 < 1e-3 < momentum[:, -1].median()
