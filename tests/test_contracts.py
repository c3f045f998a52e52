"""The contracts: what a user's own problem, loss and network need, and what the defaults make of them."""

import json
import math

import pytest
import torch
from torch import nn

from gradbuffer.contracts import Loss, MetaBatch, Problem, Rule, as_loss, as_problem, as_rule, part_of
from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
from gradbuffer.training.evolution import PES
from gradbuffer.training.imitation import Demonstration, imitation_gradient
from gradbuffer.training.meta_gradients import Autograd, Replay
from gradbuffer.training.options import Checkpoint, Curriculum, Validation, training_of
from gradbuffer.training.run import Run
from gradbuffer.unrolling import Coordinates, trained
from meta_training import compare, evaluate, meta_gradient, meta_train
from optimizees import Mixture, MNISTNet, Quadratics
from optimizers import CoordinatewiseLSTM


class Reader(nn.Module):
    """Reads all that there is: θ, the loss and the step, beside the gradient and a running mean of it."""

    coordinatewise = True
    reads = {"params", "loss", "step"}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-0.02, -0.01, 0.01, 0.003, -0.02], dtype=torch.float64))

    def init_state(self, num_coordinates, device=None, dtype=None):
        return {"mean": torch.zeros(num_coordinates, dtype=torch.float64)}

    def forward(self, grad, state, *, params, loss, step):
        assert params.shape == loss.shape == grad.shape and isinstance(step, int)
        mean = 0.9 * state["mean"] + 0.1 * grad
        readings = torch.stack([grad, mean, params.tanh(), loss.clamp(min=1e-9).log() * grad.tanh(), grad / (step + 1)])
        return self.weight @ readings, {"mean": mean}


class Keeper(nn.Module):
    """Keeps the parameters that it read in its state, and moves by what they have changed since."""

    reads = {"params"}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def init_state(self, num_coordinates, device=None, dtype=None):
        return torch.zeros(num_coordinates, dtype=torch.float64)

    def forward(self, grad, state, *, params):
        return self.weight * (params - state) - 0.01 * grad, params


class Tensors(Rule, nn.Module):
    """Reads whole tensors: a step along each tensor's gradient, whose size is of its root mean square."""

    tensorwise = True
    reads = {"params", "loss", "step"}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-0.05, 0.01, 0.02], dtype=torch.float64))

    def init_state(self, params):
        return {name: torch.zeros_like(tensor) for name, tensor in params.items()}

    def forward(self, grads, state, *, params, loss, step):
        updates = {}
        for name, grad in grads.items():
            assert grad.shape == params[name].shape and loss.shape == grad.shape[:1]
            own = [-1] + [1] * (grad.dim() - 1)
            size = (grad.flatten(1).square().mean(1) + 1e-3).sqrt().view(own)
            updates[name] = (
                self.weight[0] * grad / size
                + self.weight[1] * params[name]
                + self.weight[2] * (loss / (1 + loss)).view(own) * grad / (size * (1 + step))
            )
        return updates, {name: state[name] + 1 for name in state}


def windows(net, batch, method, count=2, **options):
    """Meta-gradients of some windows, one after the other, and where they end."""
    params, found = batch.params, []
    state = as_rule(net, Coordinates(params)).init_state(sum(tensor.numel() for tensor in params.values()))
    for k in range(count):
        grads, info = meta_gradient(net, batch, params, state, 5 * k, 5, method, **options)
        params, state = info.params, info.state
        found += [*grads.values(), info.losses, *params.values()]
    return found


@pytest.fixture
def batches(small_mnist):
    problem = MNISTNet((4,), batch_size=8, root=small_mnist, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return Quadratics(4, torch.float64).sample(3, generator), problem.sample(2, generator)


@pytest.mark.parametrize("net", [Reader(), Tensors(), start_as_normalized_adam(MLPOptimizer((4,), lr=0.01)).double()])
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("objective", ["sum", "log", lambda losses: losses.clamp(max=2.0) + losses.sqrt()])
def test_replay_equals_autograd(batches, net, second_order, objective):
    for batch in batches:
        found, expected = (
            windows(net, batch, method(second_order=second_order, objective=objective)) for method in (Replay, Autograd)
        )
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_what_is_read_is_differentiated(batches):
    """The true meta-gradient against finite differences, through θ, the loss and the state."""
    for net in (Reader(), Tensors()):
        batch = batches[0]

        def value():
            return sum(losses.sum(0).mean() for losses in windows(net, batch, "replay", 1)[1:2])

        grads = windows(net, batch, Replay(second_order=True), 1)[0]
        for k in range(len(net.weight)):
            with torch.no_grad():
                net.weight[k] += 1e-6
                ahead = value()
                net.weight[k] -= 2e-6
                behind = value()
                net.weight[k] += 1e-6
            torch.testing.assert_close(grads[k], (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


def test_a_share_of_the_coordinates_of_a_network_that_reads(batches, monkeypatch):
    monkeypatch.setattr("gradbuffer.unrolling.SMALLEST_SHARE", 1)
    net, batch = Reader(), batches[0]
    exact = windows(net, batch, "replay", 1)[0]
    draws = torch.stack(
        [
            windows(net, batch, Replay(replay_fraction=0.5), 1, generator=torch.Generator().manual_seed(k))[0]
            for k in range(400)
        ]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() < 4 * error).all() and (error > 0).all()


def test_a_network_may_keep_the_parameters_that_it_read():
    """In an evaluation θ moves in place: the losses are those along a window all the same."""
    losses = evaluate(Keeper(), Quadratics(3, torch.float64), steps=6, num_functions=4, seed=1)
    batch, net = Quadratics(3, torch.float64).sample(4, generator=torch.Generator().manual_seed(1)), Keeper()
    _, info = meta_gradient(net, batch, batch.params, net.init_state(12), unroll=5)
    torch.testing.assert_close(losses, info.losses.mT)


@pytest.mark.parametrize("net", [Reader(), Tensors()])
def test_networks_that_read_are_evaluated_and_imitate(net, batches):
    losses = evaluate(net, Quadratics(3, torch.float64), steps=6, num_functions=4)
    assert losses.shape == (4, 6) and torch.isfinite(losses).all()
    batch = batches[0]
    state = as_rule(net, Coordinates(batch.params)).init_state(12)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    first = None
    for _ in range(60):
        grads, info = imitation_gradient(
            net, batch, Demonstration(torch.optim.SGD, {"lr": 0.01}, batch.params), state, unroll=5
        )
        first = info.imitation if first is None else first
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter -= 0.02 * grads[name] / (grads[name].norm() + 1e-9) * info.imitation.clamp(max=0.1)
    assert info.imitation < first
    net.load_state_dict(before)


class Lines(Problem):
    """A user's own, whose parameters are of two shapes."""

    name = "lines"

    def sample(self, meta_batch, generator=None):
        slope = torch.randn(meta_batch, 3, generator=generator, dtype=torch.float64)
        start = {
            "a": torch.ones(meta_batch, 3, dtype=torch.float64),
            "b": torch.ones(meta_batch, 2, 2, dtype=torch.float64),
        }
        return MetaBatch(
            start, lambda params, step: ((params["a"] - slope) ** 2).sum(1) + params["b"].square().sum((1, 2))
        )


class Untyped:
    """One that knows nothing of the base class."""

    def sample(self, meta_batch, generator=None):
        return Lines().sample(meta_batch, generator)


@pytest.mark.parametrize("per_function", [False, True])
@pytest.mark.parametrize(
    "net", [Reader(), Tensors(), MLPOptimizer((2,), lr=0.01).double(), CoordinatewiseLSTM(2, 1).double()]
)
def test_perturbations_of_every_function_are_those_of_each_alone(net, per_function):
    """One window: the estimate is the mean of those of single functions with the same perturbations."""
    batch, torch_generator = Lines().sample(3, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    method = PES(sigma=0.01, pairs=2, per_function=per_function)
    coordinates = Coordinates(batch.params)
    state = as_rule(net, coordinates).init_state(sum(coordinates.sizes))
    grads, info = meta_gradient(net, batch, batch.params, state, unroll=3, method=method, generator=torch_generator)
    expected = {name: torch.zeros_like(tensor) for name, tensor in grads.items()}
    kept = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for pair in range(2):
        for function in range(3):
            noise = {name: info.state.perturbations[name][pair] for name in kept}
            noise = {name: tensor[function] for name, tensor in noise.items()} if per_function else noise
            one, totals = part_of(batch, function, function + 1), []
            for sign in (1, -1):
                net.load_state_dict({name: kept[name] + sign * noise[name] for name in kept})
                own = as_rule(net, Coordinates(one.params)).init_state(7)
                totals.append(meta_gradient(net, one, one.params, own, unroll=3)[1].losses[1:].sum())
            for name in kept:
                expected[name] += noise[name] * (totals[0] - totals[1]) / (2 * 0.01**2 * 2 * 3)
    net.load_state_dict(kept)
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-7, atol=1e-9)


def test_perturbations_that_are_held():
    net, batch, method = (
        CoordinatewiseLSTM(2, 1).double(),
        Lines().sample(2, torch.Generator().manual_seed(0)),
        PES(hold=True),
    )
    state, params, seen = net.init_state(14), batch.params, []
    for k in range(3):
        _, info = meta_gradient(net, batch, params, state, 3 * k, 3, method)
        params, state = info.params, info.state
        seen.append(torch.cat([tensor.flatten() for tensor in info.state.perturbations.values()]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]) and seen[0].std() > 0


def test_meta_training_of_a_users_own(tmp_path):
    """Own problem and own network, typed and untyped: the same run; and a run of tensors goes on from its checkpoint."""
    ends = []
    for problem in (Lines(), Untyped()):
        net = Reader()
        history = meta_train(
            net, problem, steps=10, unroll=5, meta_batch=2, iterations=6, progress=False, validation_functions=3
        )
        ends.append((net.weight.detach().clone(), history.meta_loss))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    options = dict(
        steps=10, unroll=5, meta_batch=2, iterations=7, progress=False, validation_functions=3, validation_every=1
    )
    whole, halves = Tensors(), Tensors()
    meta_train(whole, Lines(), **options)

    def stop(iteration, history):
        if iteration == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        meta_train(halves, Lines(), **options, checkpoint=tmp_path / "run", callback=stop, checkpoint_every=1)
    halves = Tensors()
    meta_train(halves, Lines(), **options, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert torch.equal(whole.weight, halves.weight)
    assert compare({"own": whole}, {}, Lines(), steps=4, num_functions=2, progress=False)["own"].shape == (2, 4)


def test_weights_of_the_steps():
    """Only the last loss counts: as `meta_gradient` with these weights; a function of the step's number says the same."""
    nets = [Reader() for _ in range(3)]
    last = [0.0] * 5 + [1.0]
    for net, weights in zip(nets, (last, lambda step: float(step in (5, 10)), None)):
        meta_train(net, Lines(), steps=5, unroll=5, meta_batch=2, iterations=3, progress=False, weights=weights)
    assert torch.equal(nets[0].weight, nets[1].weight) and not torch.equal(nets[0].weight, nets[2].weight)


@pytest.mark.parametrize("families", [None, 1])
def test_problems_that_are_balanced_count_the_same(families):
    """Each by its own size, also where some are drawn at random and a checkpoint lies between; without it one drowns the other."""

    class Quiet(Quadratics):
        def sample(self, meta_batch, generator=None):
            batch = super().sample(meta_batch, generator)
            return MetaBatch(batch.params, lambda params, step: 1e-6 * batch.loss(params, step))

    sizes = []
    for balance in (True, False):
        net, problem = Reader(), Mixture([Quadratics(3, torch.float64), Quiet(2, torch.float64)], families=families)
        options = dict(steps=5, unroll=5, meta_batch=4, iterations=30, balance=balance, clip=None)
        run = Run(net, problem, training_of(net, **options))
        norms = [sum(grad.square().sum() for grad in run.window()[0].values()).sqrt().item() for _ in range(30)]
        sizes.append(max(norms[5:]) / min(norms[5:]))
        if balance:
            assert sorted(run.sizes) == [0, 1] and run.sizes[1] < 1e-9 * run.sizes[0]
    assert sizes[0] < 100
    assert families is None or sizes[1] > 1e4


def test_weights_may_be_a_tensor(tmp_path):
    """As well as a list: the same run, and its checkpoint agrees with that of the list."""
    options = dict(steps=5, unroll=5, meta_batch=2, iterations=2, progress=False, checkpoint=tmp_path / "run")
    found = [
        meta_train(Reader(), Lines(), weights=weights, **options) for weights in (torch.arange(6.0), list(range(6)))
    ]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="weights has no effect with imitation 1"):
        meta_train(Reader(), Lines(), weights=torch.ones(21), teacher=(torch.optim.SGD, {"lr": 0.1}), imitation=1)


def test_other_meta_optimizers_and_schedules():
    seen = []

    def momentum(params):
        assert [parameter.shape for parameter in params] == [(5,)]
        return torch.optim.SGD([{"params": params, "lr": 1e-4}], momentum=0.9)

    def halve(iteration, iterations):
        seen.append((iteration, iterations))
        return 0.5**iteration

    net = Reader()
    history = meta_train(
        net,
        Lines(),
        steps=5,
        unroll=5,
        meta_batch=2,
        iterations=3,
        progress=False,
        meta_optimizer=momentum,
        schedule=halve,
    )
    assert history.lr == [1e-4, 5e-5, 2.5e-5] and seen == [(0, 3), (1, 3), (2, 3)]
    for option in (dict(lr=0.1, meta_optimizer=momentum), dict(warmup=3, schedule=halve)):
        with pytest.raises(ValueError, match="is for the default"):
            meta_train(Reader(), Lines(), **option)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: as_problem(3), TypeError, "problem must have sample.* got int"),
        (lambda: as_loss(3), TypeError, "loss must be a function of .* got 3"),
        (lambda: as_rule(nn.Linear(1, 1)), TypeError, "net must be a learned optimizer, .* got Linear"),
        (lambda: meta_train(Reader(), Lines(), bogus=3), TypeError, r"unexpected keyword arguments \['bogus'\]"),
        (
            lambda: meta_train(Reader(), Lines(), method=Replay(), second_order=True),
            ValueError,
            "second_order must stand in method=",
        ),
        (
            lambda: meta_train(Reader(), Lines(), curriculum=Curriculum((20,)), patience=5),
            ValueError,
            "patience must stand in curriculum=",
        ),
        (
            lambda: meta_train(Reader(), Lines(), validation=Validation(), validation_every=5),
            ValueError,
            "validation_every must stand in",
        ),
        (
            lambda: meta_train(Reader(), Lines(), checkpoint=Checkpoint("x"), checkpoint_every=5),
            ValueError,
            "checkpoint_every must stand in",
        ),
        (lambda: meta_train(Reader(), Lines(), on_mismatch="restart"), ValueError, "on_mismatch needs checkpoint"),
        (lambda: meta_train(Reader(), Lines(), weights=[1.0]), ValueError, r"weights must have shape \(21,\)"),
        (lambda: meta_train(Reader(), Lines(), horizon=3), TypeError, "horizon must be"),
        (lambda: meta_train(Reader(), Lines(), schedule=3), TypeError, "schedule must be a function"),
        (lambda: meta_train(Reader(), Lines(), objective="product"), ValueError, "objective must be .* got 'product'"),
        (lambda: meta_train(Reader(), Lines(), on_mismatch="never", checkpoint="x"), ValueError, "on_mismatch must be"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_checkpoint_of_another_run_is_replaced_if_wanted(tmp_path):
    options = dict(steps=5, unroll=5, meta_batch=2, iterations=2, progress=False, checkpoint=tmp_path / "run")
    meta_train(Reader(), Lines(), **options)
    with pytest.raises(ValueError, match="is the checkpoint of another run: seed was 0 and is 1"):
        meta_train(Reader(), Lines(), **options, seed=1)
    history = meta_train(Reader(), Lines(), **options, seed=1, on_mismatch="restart")
    assert len(history.meta_loss) == 2


def test_defaults_of_a_loss():
    loss, params = (
        as_loss(lambda params, step: params["x"].square().sum(1) * (step + 1)),
        {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
    )
    assert (
        isinstance(loss, Loss)
        and not loss.divisible
        and loss.compiled({}) is None
        and loss.with_gradient(params, 0) is None
    )
    losses, gradient = Coordinates(params).losses_and_gradient(loss, Coordinates(params).join(params), 1)
    assert losses.tolist() == [10.0, 50.0] and gradient.tolist() == [4.0, 8.0, 12.0, 16.0]
    with pytest.raises(ValueError, match="can be captured if .* got function"):
        loss.tensors(0)
    assert math.isfinite(losses.sum()) and json.dumps(sorted(trained(as_rule(Reader())))) == '["weight"]'
