"""LearnedOptimizer where things go wrong: weights written past torch, states that do not fit, exceptions within a step."""

import copy
import math

import pytest
import torch
from test_learned_optimizer import AdamRule, NormalizedDescent, TwoGradientsBack, lstm, model, train, values
from torch import nn

from gradbuffer.contracts import as_loss
from gradbuffer.evaluation import evaluate
from gradbuffer.nests import Snapshot, joined_by_form
from gradbuffer.nets.torch_optim import check_step
from gradbuffer.unrolling import Coordinates
from meta_training import meta_gradient
from optimizees import Quadratics
from optimizers import CoordinatewiseLSTM, LearnedOptimizer, NormalizedLSTM, RNNProp

# Weights that change, whoever writes them -----------------------------------------------------------------------------


def by_fused_adam(net):
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(net.parameters(), lr=0.1, fused=True).step()
    net.zero_grad()


def by_data(net):
    net.output.bias.data.add_(0.5)


def by_numpy(net):
    net.output.weight.detach().numpy()[0, 0] += 0.5


def by_a_view_of_another_tensor(net):
    """The memory itself, from a tensor whose version is another one."""
    torch.frombuffer(memoryview(net.lstm.weight_hh_l0.data.numpy()), dtype=torch.float32).mul_(2)


def by_vector_to_parameters(net):
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 2, net.parameters())


def by_assignment(net):
    net.load_state_dict({name: 2 * tensor for name, tensor in net.state_dict().items()}, assign=True)


def by_swap(net):
    torch.utils.swap_tensors(net.output.weight, nn.Parameter(2 * net.output.weight.detach()))


def by_a_new_parameter(net):
    net.lstm.bias_ih_l0 = nn.Parameter(net.lstm.bias_ih_l0.detach() + 1)


def by_another_memory_layout(net):
    net.output.weight.data = torch.stack([net.output.weight.data * 2] * 2, -1)[..., 0]  # not contiguous


WRITERS = [
    by_fused_adam,
    by_data,
    by_numpy,
    by_a_view_of_another_tensor,
    by_vector_to_parameters,
    by_assignment,
    by_swap,
    by_a_new_parameter,
    by_another_memory_layout,
]


def fresh(net):
    """A network with the same weights that has never run."""
    twin = type(net)(**net.config)
    twin.load_state_dict(net.state_dict())
    return twin


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("write", WRITERS)
def test_evaluate_and_meta_gradient_see_every_change(write, kernels, monkeypatch):
    if kernels == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("L2O_KERNELS", kernels)
    net, problem = lstm(), Quadratics(dim=3)
    batch = problem.sample(2, generator=torch.Generator().manual_seed(0))
    before = evaluate(net, problem, steps=4, num_functions=2)
    meta_gradient(net, batch, batch.params, net.init_state(6), unroll=3)
    write(net)
    after, twin = evaluate(net, problem, steps=4, num_functions=2), fresh(net)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, evaluate(twin, problem, steps=4, num_functions=2), rtol=0, atol=0)
    grads, expected = (
        meta_gradient(each, batch, batch.params, each.init_state(6), unroll=3)[0] for each in (net, twin)
    )
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


@pytest.mark.parametrize("write", WRITERS)
def test_a_step_sees_every_change(write):
    net, own, other = lstm(), model(), model()
    optimizer = LearnedOptimizer(own.parameters(), net)
    train(own, optimizer, 2)
    write(net)
    reference = LearnedOptimizer(other.parameters(), lstm())
    train(other, reference, 2)
    for group in reference.param_groups:
        group["net"] = fresh(net)
    assert train(own, optimizer, 2) == train(other, reference, 2)
    assert torch.equal(values(own), values(other))


@pytest.mark.parametrize("write", WRITERS)
def test_a_copy_elsewhere_sees_every_change(write):
    """Without a second device: "meta" stands for it, and the copy is looked at after the check that a step makes."""
    net, parameter = lstm(), nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = LearnedOptimizer([parameter], net)
    network = optimizer._network(net, [parameter])
    copied = network.net
    check_step([], [network])
    assert network.net is copied
    write(net)
    check_step([], [network])
    assert network.net is not copied and network.unchanged()


@pytest.mark.parametrize("make", [lambda: NormalizedLSTM(4), lambda: RNNProp(4)])
def test_other_networks_too(make):
    torch.manual_seed(0)
    net, grad = make(), torch.tensor([1.0, -2.0])
    with torch.no_grad():
        before, _ = net(grad, net.init_state(2))
        by_data(net)
        after, _ = net(grad, net.init_state(2))
        expected, _ = fresh(net)(grad, net.init_state(2))
    assert not torch.equal(before, after) and torch.equal(after, expected)


def test_a_snapshot_is_exact():
    one, two = torch.zeros(3), torch.tensor([1, 2])
    kept = Snapshot([one, two])
    assert kept.holds([one, two]) and kept.holds([one.clone(), two.clone()])  # memory that moved
    assert not kept.holds([one]) and not kept.holds([one, two.int()]) and not kept.holds([one[:2], two])
    assert not kept.holds([one.view(3, 1), two])
    assert not kept.holds([-one, two])  # -0.0
    one.numpy()[2] = math.nan
    assert not kept.holds([one, two]) and Snapshot([one]).holds([one])
    meta = torch.zeros(3, device="meta")
    assert not Snapshot([meta]).holds([meta]) and Snapshot([meta]).holds([meta], wait=False)


def test_a_snapshot_on_another_device_compares_there():
    """The same code as on CUDA, told that these tensors are elsewhere."""
    tensors = [torch.zeros(3), torch.tensor([1, 2]), torch.ones(2, 2).t()]
    kept = Snapshot(tensors)
    elsewhere = copy.copy(kept)
    elsewhere.on_cpu, elsewhere.kept = False, joined_by_form(tensors)
    assert elsewhere.holds(tensors)
    tensors[1].numpy()[1] = 3
    assert not elsewhere.holds(tensors) and elsewhere.holds(tensors, wait=False)


# States that do not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lstm, AdamRule, TwoGradientsBack, NormalizedDescent])
def test_a_parameter_that_shrank_is_refused(kind):
    net, parameter, other = kind(), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    optimizer = LearnedOptimizer([{"params": [other], "net": AdamRule()}, {"params": [parameter]}], net)
    for each in (parameter, other):
        each.grad = torch.ones_like(each)
    optimizer.step()
    parameter.data, parameter.grad = parameter.data[:3], torch.ones(3)
    kept, before = copy.deepcopy(optimizer.state_dict()), [parameter.detach().clone(), other.detach().clone()]
    with pytest.raises(
        ValueError, match="parameter 0 of group 1 must keep .* has 3 coordinates now, and .*4.* instead of .*3"
    ):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict(), kept, rtol=0, atol=0)
    assert torch.equal(parameter, before[0]) and torch.equal(other, before[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind, part", [(lstm, "state.1"), (AdamRule, "state.moments.1")])
def test_a_state_that_is_not_finite_is_refused(kind, part, bad):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), kind())
    train(net, optimizer, 2)
    kept, bad_one = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    bad_one["state"][1][part][..., 1] = bad
    with pytest.raises(ValueError, match=f"{part} of the state of parameter 1 of group 0 must be finite"):
        optimizer.load_state_dict(bad_one)
    torch.testing.assert_close(optimizer.state_dict(), kept, rtol=0, atol=0)


class SmallestSoFar(nn.Module):
    """Its state begins with infinities."""

    coordinatewise = True

    def init_state(self, num_coordinates):
        return torch.full((num_coordinates,), math.inf)

    def forward(self, grad, state):
        return -0.1 * grad, torch.minimum(grad.abs(), state)


def test_a_state_that_begins_with_infinities_may_hold_them():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = LearnedOptimizer(parameters, SmallestSoFar())
    saved = {
        "state": {0: {"state": torch.tensor([math.inf, 1.0])}},
        "param_groups": optimizer.state_dict()["param_groups"],
    }
    optimizer.load_state_dict(saved)
    assert optimizer.state[parameters[0]]["state"].tolist() == [math.inf, 1.0]


# Exceptions within a step ---------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Adam's rule or any other, that fails on demand."""

    coordinatewise, fails = True, False

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def init_state(self, num_coordinates):
        return self.rule.init_state(num_coordinates)

    def forward(self, grad, state):
        if self.fails and grad.numel() == 3:
            raise RuntimeError("on demand")
        return self.rule(grad, state)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rule", [AdamRule, TwoGradientsBack])
def test_after_an_exception_nothing_has_changed(rule, steps, monkeypatch):
    """Of networks that do not write in place, and of ours beside them."""
    monkeypatch.setattr("gradbuffer.nets.vectors.SMALL", 0)  # one call for each parameter
    parameters = [nn.Parameter(torch.ones(size)) for size in (5, 4, 3)]
    failing = Failing(rule())
    optimizer = LearnedOptimizer([{"params": parameters[:1], "net": lstm()}, {"params": parameters[1:]}], failing)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(steps):
        optimizer.step()
    kept, before = copy.deepcopy(optimizer.state_dict()), [parameter.detach().clone() for parameter in parameters]
    twin = copy.deepcopy((parameters, optimizer))
    failing.fails = True
    with pytest.raises(RuntimeError, match="on demand"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict(), kept, rtol=0, atol=0)
    assert all(map(torch.equal, parameters, before))
    failing.fails = False
    optimizer.step()
    for parameter in twin[0]:
        parameter.grad = torch.ones_like(parameter)
    twin[1].step()
    assert all(map(torch.equal, parameters, twin[0]))


# Contexts of the caller -----------------------------------------------------------------------------------------------

CONTEXTS = {"inference": torch.inference_mode, "meta": lambda: torch.device("meta"), "no_grad": torch.no_grad}


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", [lstm, AdamRule, NormalizedDescent])
def test_made_and_stepped_under_any_context(kind, context, kernels, monkeypatch):
    if kernels == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("L2O_KERNELS", kernels)
    net, own, other = kind(), model(), model()
    if context == "meta" and kind is AdamRule:
        pytest.skip("its forward makes new tensors on the default device")
    for each in (own, other):
        train(each, torch.optim.SGD(each.parameters(), lr=0.0), 1)  # gradients
    with CONTEXTS[context]():
        optimizer = LearnedOptimizer(own.parameters(), net)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    reference = LearnedOptimizer(other.parameters(), kind())
    reference.step()
    reference.step()
    assert torch.equal(values(own), values(other))
    train(own, optimizer, 1)
    own(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_weights_packed_under_inference_mode_serve_later(kernels, monkeypatch):
    if kernels == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("L2O_KERNELS", kernels)
    net, problem = CoordinatewiseLSTM(4), Quadratics(dim=3)
    batch = problem.sample(2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        net(torch.ones(6), net.init_state(6))
        net.replay(torch.ones(3, 6), net.init_state(6), torch.ones(3, 6))
    grads, _ = meta_gradient(net, batch, batch.params, net.init_state(6), unroll=3)
    expected, _ = meta_gradient(fresh(net), batch, batch.params, net.init_state(6), unroll=3)
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)
    grads["output.bias"].add_(1)  # an ordinary tensor


# Errors that say what to do -------------------------------------------------------------------------------------------


def test_a_name_or_a_class_instead_of_a_network():
    parameters = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="""give load_optimizer\\('mnist'\\).* got 'mnist'"""):
        LearnedOptimizer(parameters, "mnist")
    with pytest.raises(TypeError, match=r"give CoordinatewiseLSTM\(\.\.\.\)"):
        LearnedOptimizer(parameters, CoordinatewiseLSTM)


def test_a_loss_that_does_not_depend_on_the_parameters():
    coordinates, theta = Coordinates({"a": torch.ones(2, 3)}), torch.ones(6)
    other = torch.ones(2, requires_grad=True)
    for loss in (
        lambda params, step: torch.ones(2),
        lambda params, step: other * 2,
        lambda params, step: params["a"].detach().sum(1),
    ):
        with pytest.raises(ValueError, match="loss must depend on the parameters .*'a'"):
            coordinates.losses_and_gradient(as_loss(loss), theta, 0)
