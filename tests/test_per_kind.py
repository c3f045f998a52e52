"""Separate learned optimizers for separate kinds of parameters, wherever one learned optimizer can stand."""

import copy
import doctest

import pytest
import torch
from safetensors import safe_open
from torch import nn

import optimizers
from gradbuffer.data.cifar10 import generated_images
from gradbuffer.nets import per_kind
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates
from meta_training import evaluate, meta_train
from optimizees import CIFAR10Net, MetaBatch
from optimizers import CoordinatewiseLSTM, LearnedOptimizer, PerKind, RNNProp, load_optimizer, save_optimizer


def problem(dtype=torch.float64):
    return CIFAR10Net(batch_size=6, channels=(2,), fc_size=3, root=generated_images(60, 20, side=8), dtype=dtype)


def networks():
    return {"conv": CoordinatewiseLSTM(3, preprocess="log_sign", output_scale=0.1), "fc": RNNProp(4, 1)}


class OwnOptimizer(nn.Module):
    """A user's: momentum with a learned rate, its state a dict with a number in it; no replay of its own."""

    def __init__(self):
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(-3.0))

    def init_state(self, num_coordinates):
        return {"buffer": torch.zeros(num_coordinates, dtype=self.log_rate.dtype), "steps": 0}

    def forward(self, grad, state):
        buffer = 0.9 * state["buffer"] + grad
        return -self.log_rate.exp() * buffer, {"buffer": buffer, "steps": state["steps"] + 1}


class Interleaved:
    """Kinds that do not lie in a row: Σ (a b + c)² over the coordinates."""

    def sample(self, meta_batch, generator=None):
        start = {
            name: torch.rand(meta_batch, 3, generator=generator, dtype=torch.float64) for name in ("b1", "a1", "b2")
        }
        return MetaBatch(start, lambda params, step: (params["b1"] * params["a1"] + params["b2"]).square().sum(1))


def small_steps():
    return CoordinatewiseLSTM(3, output_scale=0.1)


def choices():
    own, unused = {"a*": "first", "b*": "second"}, {"b": small_steps(), "none": RNNProp(2)}
    return {
        "cifar": (PerKind(networks()), problem()),
        "odd": (PerKind({"conv": CoordinatewiseLSTM(10, odd=True), "fc": RNNProp(4, 1)}), problem()),
        "a user's own": (PerKind({"first": OwnOptimizer(), "second": small_steps()}, own), Interleaved()),
        "an unused kind": (PerKind(unused, lambda name: "b"), Interleaved()),
    }


@pytest.mark.parametrize("name", choices())
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("objective", ["sum", "log"])
def test_replay_equals_autograd(name, second_order, objective):
    net, functions = choices()[name]
    batch = functions.sample(2, torch.Generator().manual_seed(0))
    coordinates = Coordinates(batch.params)
    net = net.double()
    state, results = net.bind(coordinates).init_state(sum(coordinates.sizes)), []
    for method in ("replay", "autograd"):
        params, own, windows = batch.params, state, []
        for step in (0, 4):
            grads, info = meta_gradient(net, batch, params, own, step, 4, method, second_order, objective=objective)
            params, own = info.params, info.state
            windows.append(grads)
        results.append(windows)
    for one, two in zip(*results):
        assert list(two) == [parameter for parameter, _ in net.named_parameters()] and set(one) == set(two)
        size = torch.stack([grad.norm() for grad in two.values()]).norm()
        assert 0 < size < 1e6 and all((grad - two[parameter]).norm() < 1e-10 * size for parameter, grad in one.items())


def test_kinds_see_their_own_coordinates_alone():
    parts, functions = networks(), Interleaved()
    net = PerKind({"first": parts["conv"], "second": parts["fc"]}, {"a*": "first", "*": "second"}).double()
    coordinates = Coordinates(functions.sample(2).params)
    own = net.bind(coordinates)
    state = own.init_state(18)
    gradient = torch.randn(18, dtype=torch.float64)
    b1, a1, b2 = gradient.split(6)
    with torch.no_grad():
        update, after = own(gradient, state)
        first, _ = parts["conv"](a1, parts["conv"].init_state(6))
        second, _ = parts["fc"](torch.cat([b1, b2]), parts["fc"].init_state(12))
    torch.testing.assert_close(update, torch.cat([second[:6], first, second[6:]]), rtol=1e-12, atol=0)
    assert list(after) == list(state) == ["second", "first"]


def test_the_bound_optimizer_has_the_same_weights():
    net = PerKind(networks())
    own = net.bind(Coordinates(problem().sample(1).params))
    assert net.layout is None
    pairs = zip(net.named_parameters(), own.named_parameters())
    assert all(name == other and one is two for (name, one), (other, two) in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"second_order": True},
        {"method": "pes"},
        {"averaging": 0.5},
        {"teacher": (torch.optim.SGD, {"lr": 0.1}), "imitation": 0.5},
    ],
)
def test_meta_training_and_evaluation(tmp_path, options):
    net, functions = PerKind(networks()), problem(torch.float32)
    before, twin = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    common = dict(
        steps=8,
        unroll=2,
        meta_batch=2,
        lr=0.01,
        warmup=0,
        validation_functions=2,
        validation_every=6,
        checkpoint_every=1,
        progress=False,
        **options,
    )
    history = meta_train(net, functions, iterations=6, **common)
    assert len(history.validation) == 1 and all(map(torch.isfinite, torch.tensor(history.meta_loss)))
    if history.best_iteration:
        assert all(
            not torch.equal(tensor, before[name])
            for name, tensor in net.state_dict().items()
            if name.endswith("weight_ih_l0")
        )
    losses = evaluate(net, functions, steps=5, num_functions=3)
    assert losses.shape == (3, 5) and torch.isfinite(losses).all()

    class Stop(Exception):
        pass

    def stop(iteration, history):
        if iteration == 3:
            raise Stop

    path = tmp_path / "run.pt"  # in the middle of an unroll: the state is in the checkpoint
    with pytest.raises(Stop):
        meta_train(copy.deepcopy(twin), functions, iterations=6, checkpoint=path, callback=stop, **common)
    again = meta_train(twin, functions, iterations=6, checkpoint=path, **common)
    assert again.meta_loss == history.meta_loss
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in twin.state_dict().items())


def test_as_a_torch_optimizer():
    def model():
        torch.manual_seed(1)
        return nn.ModuleDict({"conv": nn.Conv2d(3, 2, 3), "fc": nn.Linear(2, 4)})

    def train(model, optimizer, steps):
        for step in range(steps):
            optimizer.zero_grad()
            scores = model["fc"](model["conv"](torch.linspace(-1, 1, 3 * 25).view(1, 3, 5, 5)).mean((2, 3)))
            scores.square().sum().backward()
            optimizer.step()

    parts = networks()
    one, two = model(), model()
    optimizer = LearnedOptimizer(one.named_parameters(), PerKind(parts), lr=0.5)
    train(one, optimizer, 3)
    groups = [{"params": list(two[kind].parameters()), "net": parts[kind]} for kind in parts]
    train(two, LearnedOptimizer(groups, None, lr=0.5), 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))

    resumed = LearnedOptimizer(two.named_parameters(), PerKind(parts))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(one, optimizer, 2)
    train(two, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    with pytest.raises(ValueError, match="PerKind tells parameters apart by their names: params must be named"):
        LearnedOptimizer(one.parameters(), PerKind(parts))
    with pytest.raises(ValueError, match=r"got None for 'weight'"):
        LearnedOptimizer(one["fc"].named_parameters(), PerKind(parts))


def test_optimizer_of_kinds_that_are_not_coordinatewise():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)})
    optimizer = LearnedOptimizer(model.named_parameters(), PerKind({"a": OwnOptimizer(), "b": CoordinatewiseLSTM(3)}))
    model["b"](model["a"](torch.ones(1, 2))).sum().backward()
    before = model["a"].weight.detach().clone()
    gradient = model["a"].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model["a"].weight.detach(), before - torch.tensor(-3.0).exp() * gradient)
    assert optimizer.state[model["a"].weight]["state.buffer"].shape == (6,)  # with the bias, as one vector


def test_files(tmp_path):
    net = PerKind(networks(), {"conv*": "conv", "fc?.*": "fc"})
    save_optimizer(net, tmp_path / "net.safetensors", problem="CIFAR-10")
    loaded = load_optimizer(tmp_path / "net.safetensors")
    assert loaded.config == net.config and list(loaded.rule) == ["conv*", "fc?.*"]
    assert torch.equal(*(evaluate(some, problem(torch.float32), steps=3, num_functions=1) for some in (net, loaded)))
    with pytest.raises(TypeError, match="the rule of a PerKind must be a dict to be written to a file"):
        save_optimizer(PerKind(networks(), lambda name: "fc"), tmp_path / "other.safetensors")
    with pytest.raises(TypeError, match=r"net must be one of \[.*got OwnOptimizer"):
        save_optimizer(PerKind({"fc": OwnOptimizer()}), tmp_path / "other.safetensors")


LSTM = CoordinatewiseLSTM(2)
BAD = [
    (lambda: PerKind([LSTM]), TypeError, "networks must be a dict from kind to learned optimizer"),
    (lambda: PerKind({}), TypeError, "networks must be a dict"),
    (lambda: PerKind({1: LSTM}), TypeError, "kinds must be text, got 1"),
    (lambda: PerKind({"a.b": LSTM}), ValueError, "a kind must be a name that nn.ModuleDict takes"),
    (lambda: PerKind({"a": nn.Linear(1, 1)}), TypeError, r"networks\['a'\] must be a learned optimizer.* got Linear"),
    (lambda: PerKind({"a": PerKind({"b": LSTM})}), TypeError, r"networks\['a'\] is a PerKind"),
    (lambda: PerKind({"a": LSTM, "b": LSTM}), ValueError, "networks must share no weights"),
    (lambda: PerKind({"a": LSTM}, "a"), TypeError, "rule must be a dict from pattern to kind or a function .* got 'a'"),
    (lambda: PerKind({"a": LSTM}, {"*": "b"}), ValueError, r"rule names the kinds \['b'\]; there are \['a'\]"),
    (lambda: PerKind({"a": LSTM}, lambda name: 3).kind_of("x"), ValueError, r"kinds \['a'\], got 3 for 'x'"),
    (lambda: PerKind({"a": LSTM}).bind({"a": 3}), TypeError, "coordinates must be unrolling.Coordinates, got dict"),
    (lambda: PerKind({"a": LSTM}).init_state(3), TypeError, r"must know how the parameters lie.*net.bind\("),
    (
        lambda: PerKind({"a": LSTM}).bind(Coordinates({"a": torch.zeros(2, 3)})).init_state(5),
        ValueError,
        "bound to 6 coordinates, got 5",
    ),
    (
        lambda: meta_gradient(PerKind({"a": LSTM}), MetaBatch({}, None), {}, None, replay_fraction=0.5),
        ValueError,
        "a network with coordinatewise = True",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_docstring_examples():
    result = doctest.testmod(per_kind)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", ["cifar10", "cifar10_sub"])
def test_shipped_optimizers_lower_the_loss(name):
    path = optimizers.PRETRAINED / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        assert {"problem", "seed", "command", "result"} < set(file.metadata()) and path.stat().st_size < 100_000
    net = load_optimizer(name)
    assert list(net.networks) == ["conv", "fc"] and net.odd
    images = generated_images(200, 20, side=16)
    losses = evaluate(net, CIFAR10Net(batch_size=16, channels=(8, 8), root=images), steps=25, num_functions=2)
    assert losses[:, -5:].mean() < 0.7 * losses[:, 0].mean()
