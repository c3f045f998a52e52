"""The meta-gradient in two ways, meta-training, and paired comparisons."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from meta_training import (BASELINES, Coordinates, compare, evaluate, evaluate_baseline, meta_gradient, meta_train,
                           replay_by_autograd, tune_baseline, tune_baselines)
from optimizees import MetaBatch, MNISTNet, Quadratics
from optimizers import CoordinatewiseLSTM, NonFiniteError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates_of(batch):
    return sum(tensor.numel() for tensor in batch.params.values())


def problems(root):
    return {"quadratics": (Quadratics(dtype=torch.float64), CoordinatewiseLSTM().double()),
            "mnist": (MNISTNet((20,), root=root, dtype=torch.float64),
                      CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.01).double())}


def relative(one, other):
    """Largest relative difference over the tensors of two dicts."""
    assert list(one) == list(other)
    return max(((one[name] - other[name]).norm() / other[name].norm()).item() for name in one)


# The meta-gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quadratics", "mnist"])
@pytest.mark.parametrize("unroll", [1, 3, 20])
def test_replay_equals_autograd_across_windows(name, unroll, tiny_mnist):
    problem, net = problems(tiny_mnist)[name]
    batch = problem.sample(3, generator())
    params, state = batch.params, net.init_state(coordinates_of(batch))
    for window in range(3):
        replayed, info = meta_gradient(net, batch, params, state, window * unroll, unroll)
        traced, reference = meta_gradient(net, batch, params, state, window * unroll, unroll, "autograd")
        assert relative(replayed, traced) < 1e-10
        torch.testing.assert_close(info.losses, reference.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(info.params, reference.params, rtol=1e-10, atol=1e-12)
        if window:  # the last loss of one window is the first of the next
            torch.testing.assert_close(info.losses[0], last)
        last, params, state = info.losses[-1], info.params, info.state
        assert not any(tensor.requires_grad for tensor in (*params.values(), *state, info.losses))


def test_weights_of_the_steps():
    problem, net = Quadratics(dtype=torch.float64), CoordinatewiseLSTM().double()
    batch = problem.sample(2, generator())
    state, weights = net.init_state(20), torch.rand(6)
    one, _ = meta_gradient(net, batch, batch.params, state, unroll=5, weights=weights)
    two, _ = meta_gradient(net, batch, batch.params, state, unroll=5, weights=weights, method="autograd")
    even, _ = meta_gradient(net, batch, batch.params, state, unroll=5)
    assert relative(one, two) < 1e-10 and relative(one, even) > 1e-3


def test_replay_equals_autograd_at_full_size(small_mnist):
    problem, net = problems(small_mnist)["mnist"]
    batch = problem.sample(1, generator())
    state = net.init_state(15_910)
    one, _ = meta_gradient(net, batch, batch.params, state, unroll=5)
    two, _ = meta_gradient(net, batch, batch.params, state, unroll=5, method="autograd")
    assert relative(one, two) < 1e-10


@pytest.mark.parametrize("method, second_order", [("replay", False), ("autograd", False), ("autograd", True)])
def test_meta_gradient_against_finite_differences(method, second_order):
    """gradcheck of the unrolled meta-loss. Constant gradients (a linear loss) make all three exact."""
    net = CoordinatewiseLSTM(hidden_size=3, num_layers=2).double()
    slope = torch.randn(2, 4, dtype=torch.float64)

    def linear(params, step):
        return (params["theta"] * slope).sum(1) * (1 + 0.1 * step)

    def quadratic(params, step):
        return (params["theta"] * slope - 1).square().sum(1)

    check_meta_gradient(net, quadratic if second_order else linear, method, second_order)


def check_meta_gradient(net, loss, method, second_order):
    batch = MetaBatch({"theta": torch.randn(2, 4, dtype=torch.float64)}, loss)
    state = tuple(0.1 * torch.randn_like(part) for part in net.init_state(8))
    names = [name for name, _ in net.named_parameters()]

    def window():
        return meta_gradient(net, batch, batch.params, state, 0, 4, method, second_order)

    class MetaLoss(torch.autograd.Function):
        @staticmethod
        def forward(context, *weights):
            with torch.no_grad():
                for parameter, weight in zip(net.parameters(), weights):
                    parameter.copy_(weight)
            context.grads, info = window()
            return info.losses.mean(1).sum()

        @staticmethod
        def backward(context, upstream):
            return tuple(upstream * context.grads[name] for name in names)

    weights = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]
    assert gradcheck(MetaLoss.apply, weights)


def test_partial_replay_is_unbiased(monkeypatch):
    monkeypatch.setattr("meta_training.SMALLEST_SHARE", 3)
    net, batch = CoordinatewiseLSTM(hidden_size=4).double(), Quadratics(dim=6, dtype=torch.float64).sample(2, generator())
    state, draws = net.init_state(12), []
    arguments = dict(params=batch.params, state=state, unroll=3)
    whole = torch.cat([grad.flatten() for grad in meta_gradient(net, batch, **arguments)[0].values()])
    for _ in range(400):
        grads, _ = meta_gradient(net, batch, replay_fraction=0.3, generator=generator(len(draws)), **arguments)
        draws.append(torch.cat([grad.flatten() for grad in grads.values()]))
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert draws.std(0).max() > 0 and ((draws.mean(0) - whole).abs() <= 5 * error + 1e-12).all()
    monkeypatch.setattr("meta_training.SMALLEST_SHARE", 12)
    all_of_it, _ = meta_gradient(net, batch, replay_fraction=0.3, **arguments)
    torch.testing.assert_close(torch.cat([grad.flatten() for grad in all_of_it.values()]), whole)


def test_second_order_differs_where_the_loss_is_curved():
    net, batch = CoordinatewiseLSTM().double(), Quadratics(dtype=torch.float64).sample(2, generator())
    state = net.init_state(20)
    first, _ = meta_gradient(net, batch, batch.params, state, unroll=5, method="autograd")
    second, _ = meta_gradient(net, batch, batch.params, state, unroll=5, method="autograd", second_order=True)
    assert relative(first, second) > 1e-3


class LearnedRate(nn.Module):
    """A user's own optimizer: one learned learning rate and momentum, with a dict as state and no `replay`."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(-0.01, dtype=torch.float64))
        self.momentum = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def init_state(self, num_coordinates):
        return {"velocity": [torch.zeros(num_coordinates, dtype=torch.float64)]}

    def forward(self, grad, state):
        velocity = self.momentum * state["velocity"][0] + grad
        return self.rate * velocity, {"velocity": [velocity]}


def test_a_users_own_optimizer_and_problem():
    class Bowl:
        def sample(self, meta_batch, generator=None):
            center = torch.randn(meta_batch, 2, 3, generator=generator, dtype=torch.float64)
            return MetaBatch({"x": torch.zeros_like(center)}, lambda params, step: (params["x"] - center).square().sum((1, 2)))

    net, batch = LearnedRate(), Bowl().sample(4, generator())
    state = net.init_state(24)
    one, info = meta_gradient(net, batch, batch.params, state, unroll=6)
    two, _ = meta_gradient(net, batch, batch.params, state, unroll=6, method="autograd")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-10, atol=1e-12)
    assert not info.state["velocity"][0].requires_grad and not one["unused"].any()
    before = evaluate(net, Bowl(), 30, 8).sum(1).mean()
    meta_train(net, Bowl(), 30, 10, meta_batch=8, iterations=60, lr=0.03, warmup=0, progress=False)
    assert evaluate(net, Bowl(), 30, 8).sum(1).mean() < 0.8 * before


def test_written_replay_equals_the_general_one():
    net = CoordinatewiseLSTM(preprocess="log_sign").double()
    grads, adjoint = torch.randn(2, 6, 9, dtype=torch.float64)
    state = tuple(0.3 * torch.randn_like(part) for part in net.init_state(9))
    assert relative(net.replay(grads, state, adjoint), replay_by_autograd(net, grads, state, adjoint)) < 1e-10


def test_coordinates_lie_parameter_by_parameter():
    params = {"a": torch.arange(6.0).view(2, 3), "b": 10 + torch.arange(4.0).view(2, 2, 1)}
    coordinates = Coordinates(params)
    assert coordinates.join(params).tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13]
    again = coordinates.split(coordinates.join(params))
    assert all(torch.equal(params[name], again[name]) and again[name].is_contiguous() for name in params)


# Meta-training --------------------------------------------------------------------------------------------------------


def test_training_improves_and_keeps_the_best():
    net = CoordinatewiseLSTM()
    untrained = evaluate(net, Quadratics(), 20, 64, seed=5).sum(1).mean()
    history = meta_train(net, Quadratics(), 20, 10, meta_batch=16, iterations=100, lr=0.01, warmup=5,
                         validation_every=10, progress=False)
    assert evaluate(net, Quadratics(), 20, 64, seed=5).sum(1).mean() < 0.8 * untrained
    assert len(history.meta_loss) == len(history.grad_norm) == len(history.lr) == 100
    assert len(history.validation) == 10
    assert history.best_validation == min(score for _, score in history.validation)
    assert (history.best_iteration, history.best_validation) in history.validation
    score = evaluate(net, Quadratics(), 20, 64, seed=1_000_003).sum(1).mean().item()
    assert score == pytest.approx(history.best_validation)  # the weights kept are those that scored best


def test_same_seed_same_run():
    def run(seed):
        torch.manual_seed(0)
        net = CoordinatewiseLSTM()
        history = meta_train(net, Quadratics(), 20, 10, meta_batch=4, iterations=6, seed=seed, progress=False)
        return history, net.state_dict()

    (one, weights), (two, again), (other, _) = run(3), run(3), run(4)
    assert one == two and all(torch.equal(weights[name], again[name]) for name in weights)
    assert one.meta_loss != other.meta_loss


def test_schedule_and_clipping(monkeypatch):
    norms = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: norms.append(
        torch.stack([parameter.grad.norm() for parameter in adam.param_groups[0]["params"]]).norm().item()))
    history = meta_train(CoordinatewiseLSTM(), Quadratics(), 20, 10, meta_batch=4, iterations=40, lr=0.1, warmup=10,
                         clip=0.5, progress=False)
    assert all(norm <= 0.5 * 1.0001 for norm in norms) and max(history.grad_norm) > 0.5
    assert history.lr.index(max(history.lr)) in (9, 10, 11) and history.lr[-1] < 0.001 and max(history.lr) <= 0.1


class Exploding:
    """Losses become infinite from the second meta-batch on."""

    draws = 0

    def sample(self, meta_batch, generator=None):
        self.draws += 1
        factor = 1.0 if self.draws == 1 else math.inf
        return MetaBatch({"x": torch.ones(meta_batch, 2)}, lambda params, step: factor * params["x"].square().sum(1))


def test_non_finite_meta_loss_stops_and_names_the_iteration():
    net = CoordinatewiseLSTM()
    with pytest.raises(NonFiniteError, match="stopped at iteration 2: .*(loss of function 0 at step 0|grad must be)"):
        meta_train(net, Exploding(), 20, 10, meta_batch=2, iterations=10, validation_every=10, progress=False)
    assert all(torch.isfinite(tensor).all() for tensor in net.state_dict().values())


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_evaluation_follows_the_optimizer():
    problem, net = Quadratics(dim=3), CoordinatewiseLSTM()
    losses = evaluate(net, problem, 5, 40, seed=9)
    assert losses.shape == (40, 5) and not losses.requires_grad
    draw = generator(9)
    batch, rest = problem.sample(32, draw), problem.sample(8, draw)
    for batch, expected in ((batch, losses[:32]), (rest, losses[32:])):
        theta, state = batch.params["theta"], net.init_state(batch.params["theta"].numel())
        for step in range(5):
            theta = theta.detach().requires_grad_()
            values = batch.loss({"theta": theta}, step)
            torch.testing.assert_close(values.detach(), expected[:, step])
            (gradient,) = torch.autograd.grad(values.sum(), theta)
            update, state = net(gradient.flatten(), state)
            theta = theta + update.view_as(theta)


@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines_are_torchs_own_on_each_function(name):
    optimizer, options = BASELINES[name]
    losses = evaluate_baseline(optimizer, {**options, "lr": 0.01}, Quadratics(), 6, 3, seed=2)
    batch = Quadratics().sample(3, generator(2))
    for function in range(3):
        theta = torch.zeros(3, 10, requires_grad=True)
        rule = optimizer([theta], lr=0.01, **options)
        for step in range(6):
            rule.zero_grad()
            value = batch.loss({"theta": theta}, step)[function]
            assert value.item() == pytest.approx(losses[function, step].item(), rel=1e-5)
            value.backward()
            rule.step()


def test_comparisons_are_paired(tiny_mnist):
    """A learned optimizer that is SGD in disguise gives SGD's curves: same functions, starts and minibatches."""

    class PlainSGD(nn.Module):
        def init_state(self, num_coordinates):
            return ()

        def forward(self, grad, state):
            return -0.3 * grad, state

    for problem in (Quadratics(dim=2), MNISTNet((5,), root=tiny_mnist)):
        learned = evaluate(PlainSGD(), problem, 8, 40, seed=3)
        torch.testing.assert_close(learned, evaluate_baseline(torch.optim.SGD, {"lr": 0.3}, problem, 8, 40, seed=3))
        assert torch.equal(learned, evaluate(PlainSGD(), problem, 8, 40, seed=3))
        assert not torch.equal(learned[:, 0], evaluate(PlainSGD(), problem, 8, 40, seed=4)[:, 0])


def test_tuning_finds_the_best_rate_and_leaves_the_edge():
    tuned = tune_baseline(torch.optim.SGD, Quadratics(), [1e-5, 1e-4, 1e-3], 30, 16)
    rates = list(tuned.final_losses)
    assert rates[0] < tuned.options["lr"] < rates[-1] and max(rates) > 1e-3
    assert tuned.final_losses[tuned.options["lr"]] == min(tuned.final_losses.values())
    again = tuned.evaluate(Quadratics(), 30, 16, seed=0)[:, -1].mean().item()
    assert again == pytest.approx(tuned.final_losses[tuned.options["lr"]])


def test_compare_gives_every_curve():
    nets = {"LSTM": CoordinatewiseLSTM()}
    tuned = tune_baselines(Quadratics(), 5, 4, lrs=[1e-3, 1e-2, 1e-1], progress=False)
    curves = compare(nets, tuned, Quadratics(), 5, 6, progress=False)
    assert list(curves) == ["LSTM", *BASELINES] and all(losses.shape == (6, 5) for losses in curves.values())
    assert all(torch.equal(losses[:, 0], curves["LSTM"][:, 0]) for losses in curves.values())


# Bad input ------------------------------------------------------------------------------------------------------------


def window(**arguments):
    net, batch = CoordinatewiseLSTM(hidden_size=2), Quadratics(dim=2).sample(2)
    arguments = {"params": batch.params, "state": net.init_state(4), **arguments}
    return meta_gradient(net, batch, **arguments)


def train(**arguments):
    return meta_train(CoordinatewiseLSTM(hidden_size=2), Quadratics(dim=2), progress=False,
                      **{"iterations": 1, **arguments})


@pytest.mark.parametrize("call, error, message", [
    (lambda: window(unroll=0), ValueError, "unroll must be at least 1, got 0"),
    (lambda: window(step=-1), ValueError, "step must be at least 0, got -1"),
    (lambda: window(method="bptt"), ValueError, "method must be .* got 'bptt'"),
    (lambda: window(replay_fraction=0), ValueError, "replay_fraction must be a number in .* got 0"),
    (lambda: window(replay_fraction=0.5, method="autograd"), ValueError, "replay_fraction=0.5 needs method"),
    (lambda: window(second_order=True), ValueError, "second_order=True needs"),
    (lambda: window(weights=[1.0] * 20), ValueError, r"weights must have shape \(21,\)"),
    (lambda: window(params=[1]), TypeError, "params must be a dict"),
    (lambda: window(params={"a": torch.zeros(2), "b": torch.zeros(3)}), ValueError, r"params\['b'\] is \(3,\)"),
    (lambda: window(state=CoordinatewiseLSTM(hidden_size=2).init_state(5)), ValueError, "state's hidden must have"),
    (lambda: train(unroll=30), ValueError, "unroll must divide steps, got unroll=30 and steps=100"),
    (lambda: train(unroll=200), ValueError, "unroll must divide steps"),
    (lambda: train(iterations=0), ValueError, "iterations must be at least 1, got 0"),
    (lambda: train(lr=0.0), ValueError, "lr must be a positive number, got 0.0"),
    (lambda: train(clip=-1), ValueError, "clip must be a positive number, got -1"),
    (lambda: train(meta_batch=1.5), TypeError, "meta_batch must be an int, got 1.5"),
    (lambda: meta_train(nn.Linear(1, 1), Quadratics()), TypeError, "net must be a learned optimizer.*got Linear"),
    (lambda: meta_train(CoordinatewiseLSTM(), "quadratics"), TypeError, "problem must have sample"),
    (lambda: evaluate(CoordinatewiseLSTM(), Quadratics(), steps=0), ValueError, "steps must be at least 1, got 0"),
    (lambda: evaluate(CoordinatewiseLSTM(), Quadratics(), num_functions=-2), ValueError, "num_functions must be"),
    (lambda: evaluate_baseline("Adam", {"lr": 1}, Quadratics()), TypeError, "optimizer must be a class"),
    (lambda: evaluate_baseline(torch.optim.LBFGS, {}, Quadratics()), ValueError, "LBFGS needs a closure"),
    (lambda: evaluate_baseline(torch.optim.Adam, 0.1, Quadratics()), TypeError, "options must be a dict"),
    (lambda: tune_baseline(torch.optim.Adam, Quadratics(), [0.1]), ValueError, "lrs must be at least three"),
    (lambda: tune_baseline(torch.optim.Adam, Quadratics(), [-1, 0.1, 1]), ValueError, "lrs must be at least three"),
])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_of_the_wrong_shape():
    batch = MetaBatch({"x": torch.ones(2, 3)}, lambda params, step: params["x"].sum())
    net = CoordinatewiseLSTM()
    with pytest.raises(ValueError, match=r"loss must return a tensor of shape \(2,\)"):
        meta_gradient(net, batch, batch.params, net.init_state(6))
