"""The meta-gradient in two ways, against each other, against finite differences, and for a user's own parts."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates, replay_by_autograd
from meta_training import evaluate, meta_train
from optimizees import MetaBatch, MNISTNet, Quadratics
from optimizers import CoordinatewiseLSTM, NonFiniteError, NormalizedLSTM, RNNProp, start_as_momentum


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates_of(batch):
    return sum(tensor.numel() for tensor in batch.params.values())


def problems(root):
    return {
        "quadratics": (Quadratics(dtype=torch.float64), CoordinatewiseLSTM().double()),
        "mnist": (
            MNISTNet((20,), root=root, dtype=torch.float64),
            CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.01).double(),
        ),
        "rnnprop": (MNISTNet((20,), root=root, dtype=torch.float64), RNNProp(output_scale=0.01).double()),
        "normalized": (Quadratics(dim=4, dtype=torch.float64), NormalizedLSTM(num_layers=2).double()),
    }


def relative(one, other):
    """Largest relative difference over the tensors of two dicts."""
    assert list(one) == list(other)
    return max(((one[name] - other[name]).norm() / other[name].norm()).item() for name in one)


@pytest.mark.parametrize("name", ["quadratics", "mnist", "rnnprop", "normalized"])
@pytest.mark.parametrize("unroll", [1, 3, 20])
def test_replay_equals_autograd_across_windows(name, unroll, tiny_mnist):
    problem, net = problems(tiny_mnist)[name]
    batch = problem.sample(3, generator())
    params, state = batch.params, net.init_state(coordinates_of(batch))
    last = None
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


@pytest.mark.parametrize("name", ["quadratics", "mnist", "rnnprop", "normalized"])
@pytest.mark.parametrize("unroll", [1, 3, 20])
@pytest.mark.parametrize("written", [True, False])
def test_second_order_replay_equals_autograd(name, unroll, written, tiny_mnist, monkeypatch):
    problem, net = problems(tiny_mnist)[name]
    if written:
        monkeypatch.setattr("gradbuffer.kernels.torch_blocks.STEP_BACK_BLOCK", 700)
    else:  # as for a user's own optimizer
        monkeypatch.delattr("optimizers.LSTMOptimizer.pull_back")
    batch = problem.sample(3, generator())
    params, state = batch.params, net.init_state(coordinates_of(batch))
    for window in range(2):
        options = dict(second_order=True, objective=("sum", "log")[window], weights=torch.rand(unroll + 1))
        replayed, info = meta_gradient(net, batch, params, state, window * unroll, unroll, **options)
        traced, reference = meta_gradient(net, batch, params, state, window * unroll, unroll, "autograd", **options)
        assert relative(replayed, traced) < 1e-10
        torch.testing.assert_close(info.losses, reference.losses, rtol=1e-10, atol=1e-12)
        params, state = info.params, info.state
        assert not any(tensor.requires_grad for tensor in (*params.values(), *state, info.losses, *replayed.values()))


def test_adjoint_bound():
    """A loose bound changes nothing; with a tight one no adjoint is larger than it would be for constant gradients."""
    problem, net = Quadratics(dtype=torch.float64), CoordinatewiseLSTM(preprocess="log_sign").double()
    start_as_momentum(net, lr=1.0)  # far too high
    batch = problem.sample(4, generator())
    window = dict(net=net, batch=batch, params=batch.params, state=net.init_state(40), unroll=30)
    exact, info = meta_gradient(**window, second_order=True)
    loose, _ = meta_gradient(**window, second_order=True, adjoint_bound=1e12)
    assert relative(loose, exact) < 1e-10
    seen, pull_back = [], net.pull_back
    net.pull_back = lambda grad, state, adjoint, after: seen.append(adjoint) or pull_back(grad, state, adjoint, after)
    meta_gradient(**window, second_order=True)
    exploding, seen[:] = torch.stack(seen), []
    meta_gradient(**window, second_order=True, adjoint_bound=1.0)
    bounded, seen[:] = torch.stack(seen), []
    net.replay = lambda grads, state, adjoint, tape=None: seen.append(adjoint.flip(0)) or {}
    meta_gradient(**window)
    norms = [adjoints.view(30, 4, 10).norm(dim=2) for adjoints in (exploding, bounded, seen[0])]
    assert (norms[0] > 10 * norms[2]).any() and (norms[1] <= norms[2] * (1 + 1e-10)).all()


def test_weights_of_the_steps():
    problem, net = Quadratics(dtype=torch.float64), CoordinatewiseLSTM().double()
    batch = problem.sample(2, generator())
    state, weights = net.init_state(20), torch.rand(6)
    one, _ = meta_gradient(net, batch, batch.params, state, unroll=5, weights=weights)
    two, _ = meta_gradient(net, batch, batch.params, state, unroll=5, weights=weights, method="autograd")
    even, _ = meta_gradient(net, batch, batch.params, state, unroll=5)
    assert relative(one, two) < 1e-10 and relative(one, even) > 1e-3


@pytest.mark.parametrize("name", ["quadratics", "mnist"])
def test_log_of_the_loss(name, tiny_mnist):
    """By replay, by autograd, and as the sum in which a single function's steps are weighted by 1 / f_t."""
    problem, net = problems(tiny_mnist)[name]
    for functions in (3, 1):
        batch = problem.sample(functions, generator())
        state = net.init_state(coordinates_of(batch))
        window = net, batch, batch.params, state
        one, info = meta_gradient(*window, unroll=5, objective="log")
        two, _ = meta_gradient(*window, unroll=5, method="autograd", objective="log")
        assert relative(one, two) < 1e-10
        assert relative(one, meta_gradient(*window, unroll=5)[0]) > 1e-3
    weighted, _ = meta_gradient(*window, unroll=5, weights=1 / info.losses[:, 0])
    assert relative(one, weighted) < 1e-10


class Drift(nn.Module):
    """Updates that do not look at the gradient."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def init_state(self, num_coordinates):
        return ()

    def forward(self, grad, state):
        return self.rate * torch.ones_like(grad), state


@pytest.mark.parametrize("method", ["replay", "autograd", "pes"])
def test_log_of_an_exponential_is_what_was_there_before(method):
    batch = Quadratics(dim=2, dtype=torch.float64).sample(3, generator())
    exponential = MetaBatch(batch.params, lambda params, step: batch.loss(params, step).mul(0.1).exp())
    tenth = MetaBatch(batch.params, lambda params, step: batch.loss(params, step).mul(0.1))
    (one, _), (two, _) = (
        meta_gradient(
            Drift(), problem, batch.params, (), unroll=5, method=method, objective=objective, generator=generator()
        )
        for problem, objective in ((exponential, "log"), (tenth, "sum"))
    )
    assert relative(one, two) < 1e-10


def test_log_needs_positive_losses():
    batch = MetaBatch({"x": torch.ones(2, 2)}, lambda params, step: params["x"].sum(1) * torch.tensor([1.0, -1.0]))
    net = CoordinatewiseLSTM()
    for method in ("replay", "autograd"):
        with pytest.raises(
            NonFiniteError, match='loss of function 1 at step 0 is -2.0, and objective="log" needs a pos'
        ):
            meta_gradient(net, batch, batch.params, net.init_state(4), unroll=2, objective="log", method=method)


def test_replay_equals_autograd_at_full_size(small_mnist):
    problem, net = problems(small_mnist)["mnist"]
    batch = problem.sample(1, generator())
    state = net.init_state(15_910)
    one, _ = meta_gradient(net, batch, batch.params, state, unroll=5)
    two, _ = meta_gradient(net, batch, batch.params, state, unroll=5, method="autograd")
    assert relative(one, two) < 1e-10


@pytest.mark.parametrize(
    "method, second_order", [("replay", False), ("replay", True), ("autograd", False), ("autograd", True)]
)
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
    monkeypatch.setattr("gradbuffer.unrolling.SMALLEST_SHARE", 3)
    net, batch = (
        CoordinatewiseLSTM(hidden_size=4).double(),
        Quadratics(dim=6, dtype=torch.float64).sample(2, generator()),
    )
    state, draws = net.init_state(12), []
    arguments = dict(params=batch.params, state=state, unroll=3)
    whole = torch.cat([grad.flatten() for grad in meta_gradient(net, batch, **arguments)[0].values()])
    for _ in range(400):
        grads, _ = meta_gradient(net, batch, replay_fraction=0.3, generator=generator(len(draws)), **arguments)
        draws.append(torch.cat([grad.flatten() for grad in grads.values()]))
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert draws.std(0).max() > 0 and ((draws.mean(0) - whole).abs() <= 5 * error + 1e-12).all()
    monkeypatch.setattr("gradbuffer.unrolling.SMALLEST_SHARE", 12)
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
            return MetaBatch(
                {"x": torch.zeros_like(center)}, lambda params, step: (params["x"] - center).square().sum((1, 2))
            )

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
