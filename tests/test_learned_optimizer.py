"""LearnedOptimizer: what it computes, and everything that torch expects of an optimizer."""

import ast
import copy
import gc
import io
import math
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from gradbuffer.evaluation import evaluate
from gradbuffer.nets import vectors
from gradbuffer.nets.torch_optim import check_step
from optimizees import Quadratics
from optimizers import CoordinatewiseLSTM, LearnedOptimizer, NonFiniteError, load_optimizer

# Networks -------------------------------------------------------------------------------------------------------------

Moments = namedtuple("Moments", "first second")


class AdamRule(nn.Module):
    """Adam written as a learned optimizer: a dict with a namedtuple, and one step counter for all coordinates."""

    coordinatewise = True

    def init_state(self, num_coordinates):
        zeros = torch.zeros(num_coordinates, dtype=torch.float64)
        return {"step": torch.tensor(0), "moments": Moments(zeros, zeros)}  # the same tensor twice

    def forward(self, grad, state):
        step, m, v = state["step"] + 1, *state["moments"]
        m, v, t = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2, torch.as_tensor(step, dtype=torch.float64)
        update = -0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        return update.reshape(grad.shape), {"moments": Moments(m, v), "step": step}


class CountingInPlace(AdamRule):
    """The same, with the counter as a Python number or counted in place, or with one for each coordinate."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def init_state(self, num_coordinates):
        start = {"number": 0, "tensor": torch.zeros(()), "row": torch.zeros(1, num_coordinates)}[self.kind]
        return {**super().init_state(num_coordinates), "step": start}

    def forward(self, grad, state):
        if self.kind == "tensor":
            before = {**state, "step": state["step"].clone()}
            update, after = super().forward(grad, before)
            state["step"] += 1
            return update, {**after, "step": state["step"]}
        return super().forward(grad, state)


class TwoGradientsBack(nn.Module):
    """Hands back a part of the state it was given, one place further."""

    coordinatewise = True

    def init_state(self, num_coordinates):
        return [torch.zeros(num_coordinates), torch.zeros(num_coordinates)]

    def forward(self, grad, state):
        return -0.1 * state[1], [grad, state[0]]


class NormalizedDescent(nn.Module):
    """Not coordinatewise: descends by a fixed length along a decaying mean of the gradients, with a matrix as state."""

    def init_state(self, num_coordinates):
        return torch.eye(num_coordinates) + 0.1, 0

    def forward(self, grad, state):
        matrix, steps = state
        return -0.1 * (matrix @ grad) / (grad.norm() + 1e-8) / math.sqrt(1 + steps), (0.9 * matrix, steps + 1)


class Plain(nn.Module):
    """Gradient descent: neither weights nor state."""

    coordinatewise = True

    def init_state(self, num_coordinates):
        return None

    def forward(self, grad, state):
        return -0.1 * grad, None


def lstm(hidden_size=4, **options):
    torch.manual_seed(3)
    return CoordinatewiseLSTM(hidden_size, preprocess="log_sign", output_scale=0.1, **options)


NETS = {
    "lstm": lstm,
    "adam": AdamRule,
    "history": TwoGradientsBack,
    "joint": NormalizedDescent,
    "plain": Plain,
    **{kind: lambda kind=kind: CountingInPlace(kind) for kind in ("number", "tensor", "row")},
}


# An optimizee ---------------------------------------------------------------------------------------------------------


def model(dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(16, 3, generator=generator).to(dtype), torch.randn(16, 2, generator=generator).to(dtype)


def train(net, optimizer, steps, scheduler=None):
    x, y = data(next(net.parameters()).dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def values(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def two_groups(net, first, second, **options):
    return LearnedOptimizer(
        [
            {"params": net[0].parameters(), "net": first},
            {"params": net[2].parameters(), "net": second, "lr": 0.5, "weight_decay": 0.1},
        ],
        None,
        **options,
    )


# What it computes -----------------------------------------------------------------------------------------------------


def test_equals_the_network_run_by_hand():
    net, (x, y) = lstm(), data()
    trained, by_hand = model(), model()
    optimizer, state = LearnedOptimizer(trained.parameters(), net, lr=0.5), net.init_state(32)
    params = list(by_hand.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(trained(x), y).backward()
        optimizer.step()
        grads = torch.autograd.grad(F.mse_loss(by_hand(x), y), params)
        with torch.no_grad():
            update, state = net(torch.cat([grad.flatten() for grad in grads]), state)
            for parameter, part in zip(params, update.split([p.numel() for p in params])):
                parameter.add_(part.view(parameter.shape), alpha=0.5)
        assert torch.equal(values(trained), values(by_hand))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("name", ["quadratics", "lstm"])
def test_follows_the_curves_of_evaluate(name):
    net = lstm() if name == "lstm" else load_optimizer(name)
    curves = evaluate(net, Quadratics(dim=4), steps=12, num_functions=3, seed=5)
    batch = Quadratics(dim=4).sample(3, generator=torch.Generator().manual_seed(5))
    params = {key: nn.Parameter(start.clone()) for key, start in batch.params.items()}
    optimizer, found = LearnedOptimizer(params.values(), net), []
    for step in range(12):
        optimizer.zero_grad()
        losses = batch.loss(params, step)
        losses.sum().backward()
        optimizer.step()
        found.append(losses.detach())
    torch.testing.assert_close(torch.stack(found, 1), curves, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "number", "tensor", "row"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}])
@pytest.mark.parametrize("chunk", [4, 1 << 14])
def test_adam_as_a_network_equals_adam(kind, options, chunk, monkeypatch):
    """A rule whose result is known, through every kind of state, in pieces and whole."""
    for where in ("cpu", "cpu, in place"):
        monkeypatch.setitem(vectors.CHUNK, where, chunk)
    ours, theirs = model(torch.float64), model(torch.float64)
    train(ours, LearnedOptimizer(ours.parameters(), NETS[kind](), **options), 10)
    train(theirs, torch.optim.Adam(theirs.parameters(), lr=0.01, **options), 10)
    torch.testing.assert_close(values(ours), values(theirs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("small", [0, 8, 2048])
@pytest.mark.parametrize("chunk", [4, 14, 15, 16, 1 << 14])  # the first weight has 15 coordinates
@pytest.mark.parametrize("kind", ["lstm", "history"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_chunks_change_nothing(kind, small, chunk, state_dtype, monkeypatch):
    def run():
        net = model(torch.float64)
        optimizer = LearnedOptimizer(net.parameters(), NETS[kind]().double(), state_dtype=state_dtype)
        train(net, optimizer, 4)
        return values(net), optimizer.state_dict()["state"]

    monkeypatch.setattr(vectors, "SMALL", 0)
    whole = run()
    monkeypatch.setattr(vectors, "SMALL", small)
    for where in ("cpu", "cpu, in place"):
        monkeypatch.setitem(vectors.CHUNK, where, chunk)
    tolerance = 1e-12 if state_dtype is None else 1e-2
    torch.testing.assert_close(run(), whole, rtol=tolerance, atol=tolerance)


def test_a_network_that_hands_back_its_old_state():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, seen = LearnedOptimizer([parameter], TwoGradientsBack()), []
    for gradient in (1.0, 2.0, 3.0, 4.0):
        parameter.grad = torch.tensor([gradient])
        before = parameter.item()
        optimizer.step()
        seen.append(parameter.item() - before)
    assert seen == pytest.approx([0, 0, -0.1, -0.2])


def test_a_network_that_is_not_coordinatewise_sees_its_group_as_one_vector():
    net, by_hand = model(), model()
    optimizer = LearnedOptimizer(net.parameters(), NormalizedDescent())
    train(net, optimizer, 3)
    assert [len(part) for part in optimizer.state.values()] == [2]  # with the first parameter
    assert optimizer.state[net[0].weight]["state.0"].shape == (32, 32)
    (x, y), rule = data(), NormalizedDescent()
    state = rule.init_state(32)
    for _ in range(3):
        grads = torch.autograd.grad(F.mse_loss(by_hand(x), y), list(by_hand.parameters()))
        update, state = rule(torch.cat([grad.flatten() for grad in grads]), state)
        nn.utils.vector_to_parameters(values(by_hand) + update, by_hand.parameters())
    torch.testing.assert_close(values(net), values(by_hand))
    bias = net[2].bias.detach().clone()
    net[2].bias.grad = None  # counts as 0 in the joint vector, and stays where it is
    optimizer.step()
    assert torch.equal(net[2].bias, bias) and optimizer.state[net[0].weight]["state.1"] == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype_than_the_network(dtype):
    """The network computes in float32, the sum is rounded once."""
    start = torch.randn(50).to(dtype)
    parameter, reference = nn.Parameter(start.clone()), start.double()
    net = lstm()
    optimizer, state = LearnedOptimizer([parameter], net), net.init_state(50)
    for _ in range(3):
        parameter.grad = torch.randn(50).to(dtype)
        optimizer.step()
        with torch.no_grad():
            update, state = net(parameter.grad.float(), state)
        reference = (reference + update.double()).to(dtype).double()
        torch.testing.assert_close(parameter.detach().double(), reference, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert parameter.dtype == dtype and optimizer.state[parameter]["state.0"].dtype == torch.float32


def test_bfloat16_state_takes_half_the_memory():
    """And only of what is large: moments and counters, with one number per coordinate, keep their precision."""
    parameter = nn.Parameter(torch.randn(1000))
    whole, half = (
        LearnedOptimizer([nn.Parameter(parameter.detach().clone())], lstm(20), state_dtype=dtype)
        for dtype in (None, torch.bfloat16)
    )
    for optimizer in (whole, half):
        for step in range(5):
            optimizer.param_groups[0]["params"][0].grad = torch.linspace(-1, 1, 1000) * (step + 1)
            optimizer.step()
    sizes, moved = zip(
        *(
            (
                sum(part.nbytes for state in optimizer.state.values() for part in state.values()),
                optimizer.param_groups[0]["params"][0],
            )
            for optimizer in (whole, half)
        )
    )
    assert sizes == (4 * 80 * 1000, 2 * 80 * 1000)
    torch.testing.assert_close(*moved, rtol=0.02, atol=0.02)
    parameter.grad = torch.ones(1000)
    rule = LearnedOptimizer([parameter], CountingInPlace("row"), state_dtype=torch.bfloat16)
    rule.step()
    assert {part.dtype for part in rule.state[parameter].values()} == {torch.float64, torch.float32}


def test_groups_have_their_own_network_lr_and_decay():
    net, twin = model(), model()
    optimizer = two_groups(net, lstm(), AdamRule())
    alone = [
        LearnedOptimizer(twin[0].parameters(), lstm()),
        LearnedOptimizer(twin[2].parameters(), AdamRule(), lr=0.5, weight_decay=0.1),
    ]
    x, y = data()
    for _ in range(4):
        train(net, optimizer, 1)
        twin.zero_grad()
        F.mse_loss(twin(x), y).backward()
        for part in alone:
            part.step()
    assert torch.equal(values(net), values(twin))


def test_the_network_is_followed_where_it_changes():
    """A network in the making: its weights count as they are at the step."""
    net, parameter = lstm(), nn.Parameter(torch.zeros(3))
    optimizer = LearnedOptimizer([parameter], net)
    parameter.grad = torch.ones(3)
    optimizer.step()
    with torch.no_grad():
        net.output.bias.add_(100.0)
    before = parameter.detach().clone()
    optimizer.step()
    assert ((parameter - before) > 5).all()  # 0.1 × 100


def test_a_copy_of_the_network_where_the_parameters_are():
    """Made once, and anew when the weights have changed; "meta" stands for another device."""
    net, parameter = lstm(), nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = LearnedOptimizer([parameter], net)
    network = optimizer._network(net, [parameter])
    first = network.net
    assert {tensor.device.type for tensor in first.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in net.parameters()} == {"cpu"}
    parameter.grad = torch.zeros_like(parameter)
    check_step([], [network])
    assert network.net is first
    net.output.weight.data.mul_(2)
    check_step([], [network])
    assert network.net is not first


class Decaying(nn.Module):
    """Reads θ and the time."""

    reads = {"params", "step"}

    def __init__(self, coordinatewise):
        super().__init__()
        self.coordinatewise = coordinatewise

    def init_state(self, num_coordinates):
        return torch.zeros(num_coordinates)

    def forward(self, grad, state, *, params, step):
        assert isinstance(step, int) and params.shape == grad.shape == state.shape
        return -0.1 * (step + 1) * (grad + params), state + params


@pytest.mark.parametrize("coordinatewise", [False, True])
def test_a_network_may_read_parameters_and_time(coordinatewise, monkeypatch):
    monkeypatch.setitem(vectors.CHUNK, "cpu", 4)
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer, expected, sums = (
        LearnedOptimizer(params, Decaying(coordinatewise), lr=0.5),
        torch.ones(3),
        torch.zeros(3),
    )
    for step in range(3):
        for parameter in params:
            parameter.grad = torch.full_like(parameter, 2)
        optimizer.step()
        sums, expected = sums + expected, expected - 0.05 * (step + 1) * (2 + expected)
    for parameter in params:
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected[0]))
    state = optimizer.state[params[0]]
    assert state["step"] == 3 and len(optimizer.state) == 1 + coordinatewise
    torch.testing.assert_close(state["state"][:3], sums)
    other = LearnedOptimizer(copy.deepcopy(params), Decaying(coordinatewise))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_network_that_reads_the_loss_is_refused():
    net = Decaying(True)
    net.reads = {"loss"}
    with pytest.raises(
        ValueError, match=r"Decaying must read params and step at most, beside gradients, got \['loss'\]"
    ):
        LearnedOptimizer(model().parameters(), net)


# Gradients of every sort ----------------------------------------------------------------------------------------------


def test_closure():
    net, twin, (x, y) = model(), model(), data()
    optimizer = LearnedOptimizer(net.parameters(), lstm())

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses == train(twin, LearnedOptimizer(twin.parameters(), lstm()), 4)
    assert torch.equal(values(net), values(twin))
    assert optimizer.step() is None


def test_gradient_accumulation():
    net, twin, (x, y) = model(), model(), data()
    ours, theirs = (LearnedOptimizer(part.parameters(), lstm()) for part in (net, twin))
    for _ in range(3):
        ours.zero_grad(set_to_none=False)
        for half in (slice(0, 8), slice(8, 16)):
            (F.mse_loss(net(x[half]), y[half]) / 2).backward()
        ours.step()
    train(twin, theirs, 3)
    torch.testing.assert_close(values(net), values(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(NETS))
def test_without_gradient_nothing_happens(kind):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), NETS[kind]())
    before = values(net)
    optimizer.step()
    assert torch.equal(values(net), before) and not optimizer.state
    train(net, optimizer, 2)
    state, before = copy.deepcopy(optimizer.state_dict()), values(net)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(values(net), before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_a_missing_gradient_leaves_parameter_and_state_alone():
    net = model()
    net[0].bias.requires_grad_(False)
    optimizer = LearnedOptimizer(net.parameters(), lstm())
    frozen = net[0].bias.clone()
    train(net, optimizer, 2)
    assert torch.equal(net[0].bias, frozen) and net[0].bias not in optimizer.state
    weight, state = net[0].weight.detach().clone(), copy.deepcopy(optimizer.state[net[0].weight])
    others = values(net[2])
    net[0].weight.grad = None
    optimizer.step()
    assert torch.equal(net[0].weight, weight) and not torch.equal(values(net[2]), others)
    assert all(torch.equal(part, state[name]) for name, part in optimizer.state[net[0].weight].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sparse_gradients_equal_dense_ones(dtype):
    torch.manual_seed(0)
    start = torch.randn(6, 3).to(dtype)
    tables = [nn.Embedding.from_pretrained(start.clone(), freeze=False, sparse=sparse) for sparse in (True, False)]
    optimizers = [LearnedOptimizer(table.parameters(), lstm(), weight_decay=0.1) for table in tables]
    for index in ([1, 1, 4], [0, 5, 5]):  # repeated rows: the sparse gradient is not coalesced
        for table, optimizer in zip(tables, optimizers):
            optimizer.zero_grad()
            table(torch.tensor(index)).float().pow(2).sum().backward()
            assert table.weight.grad.is_sparse == table.sparse
            optimizer.step()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)])
def test_shapes(shape):
    parameters = [nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(2))]
    optimizer = LearnedOptimizer(parameters, lstm())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameters[0].shape == shape and (parameters[0] != 1).all()
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_memory_layout_does_not_matter():
    """Transposed, strided and channels-last parameters move like contiguous ones, in place."""
    start, grad = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    results = []
    for arrange in (
        lambda t: t.clone(),
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        parameter = nn.Parameter(arrange(start))
        parameter.grad = arrange(grad)
        stride, place = parameter.stride(), parameter.data_ptr()
        LearnedOptimizer([parameter], lstm(), weight_decay=0.1).step()
        assert (parameter.stride(), parameter.data_ptr()) == (stride, place)
        results.append(parameter.detach().contiguous())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_gradients_are_only_read(kind, options):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), NETS[kind](), **options)
    train(net, optimizer, 1)
    kept = [(p.grad, p.grad.clone(), p.grad._version) for p in net.parameters()]
    optimizer.step()
    for parameter, (grad, value, version) in zip(net.parameters(), kept):
        assert parameter.grad is grad and torch.equal(grad, value) and grad._version == version


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["lstm", "joint", "plain"])
def test_gradients_that_are_not_finite(kind, bad):
    net = model()
    optimizer = LearnedOptimizer([{"params": net[i].named_parameters()} for i in (0, 2)], NETS[kind]())
    train(net, optimizer, 1)
    before, state = values(net), copy.deepcopy(optimizer.state_dict())
    net[2].bias.grad[1] = bad
    message = rf"the gradient of parameter 1 \(bias\) of group 1 must be finite, but holds {bad} at coordinate 1"
    with pytest.raises(NonFiniteError, match=message):
        optimizer.step()
    assert torch.equal(values(net), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_a_gradient_too_large_for_the_network():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([1.0, 1e300], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="parameter 0 of group 0 must be finite, but holds inf at coordinate 1"):
        LearnedOptimizer([parameter], lstm()).step()


def test_grad_scaler():
    """Scaled and unscaled training agree, and a step with an infinite gradient is skipped by the scaler."""
    net, twin, (x, y) = model(), model(), data()
    optimizer = LearnedOptimizer(net.parameters(), lstm())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(net(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
    train(twin, LearnedOptimizer(twin.parameters(), lstm()), 3)
    torch.testing.assert_close(values(net), values(twin))
    before, state = values(net), copy.deepcopy(optimizer.state_dict())
    net[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(values(net), before) and scaler.get_scale() == 2.0**9
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


class Layered(Plain):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, grad, state):
        return self.layers(grad[:, None])[:, 0], None


@pytest.mark.parametrize("kind", [lstm, Layered])
def test_under_autocast_the_network_keeps_its_dtype(kind):
    net, twin, rule = model(), model(), kind()
    ours, theirs = (LearnedOptimizer(part.parameters(), rule) for part in (net, twin))
    for part in (net, twin):
        train(part, ours if part is net else theirs, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours.step()
    theirs.step()
    assert torch.equal(values(net), values(twin))


# Saving and resuming --------------------------------------------------------------------------------------------------


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_resumed_equals_uninterrupted(kind, dtype, state_dtype):
    """To the bit, over two groups, one of them with that network, and a scheduler; through a file."""

    def setup():
        net = model()
        if kind in ("lstm", "adam", "plain"):
            net = net.to(dtype)
        optimizer = two_groups(net, NETS[kind](), lstm(), state_dtype=state_dtype)
        return net, optimizer, lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    whole, optimizer, scheduler = setup()
    train(whole, optimizer, 3, scheduler)
    net, resumed, again = setup()
    net.load_state_dict(saved_and_loaded(whole.state_dict()))
    checkpoint = saved_and_loaded(optimizer.state_dict())
    train(whole, optimizer, 4, scheduler)  # before loading: nothing of the checkpoint may be the optimizer's own memory
    resumed.load_state_dict(checkpoint)
    again.load_state_dict({**scheduler.state_dict(), "last_epoch": 3, "_step_count": 4, "_last_lr": [0.5, 0.25]})
    train(net, resumed, 4, again)
    assert torch.equal(values(net), values(whole))
    torch.testing.assert_close(resumed.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_state_dict_holds_tensors_and_numbers():
    net = model()
    optimizer = two_groups(net, lstm(), AdamRule(), state_dtype=torch.bfloat16)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, packed: seen.append(packed["param_groups"][0].keys()))
    train(net, optimizer, 1)
    packed = optimizer.state_dict()
    assert (
        set(packed["param_groups"][1])
        == {"params", "net", "lr", "weight_decay", "maximize", "state_dtype"}
        == set(seen[0])
    )
    assert packed["param_groups"][1]["params"] == [2, 3]
    assert {name: tuple(part.shape) for name, part in packed["state"][0].items()} == {
        "state.0": (2, 4, 15),
        "state.1": (2, 4, 15),
    }
    assert {name: tuple(part.shape) for name, part in packed["state"][3].items()} == {
        "state.step": (),
        "state.moments.0": (2,),
        "state.moments.1": (2,),
    }
    assert optimizer.param_groups[0]["net"] is not None  # the optimizer's own groups are whole
    torch.testing.assert_close(saved_and_loaded(packed), packed, rtol=0, atol=0)


def test_loading_copies_and_keeps_network_and_state_dtype():
    net, twin = model(), model()
    first, second = (
        LearnedOptimizer(net.parameters(), lstm(), lr=0.5),
        LearnedOptimizer(twin.parameters(), lstm(), state_dtype=torch.bfloat16),
    )
    train(net, first, 2)
    network, seen = second.param_groups[0]["net"], []
    second.register_load_state_dict_pre_hook(lambda _, packed: seen.append(len(packed["state"])))
    second.register_load_state_dict_post_hook(lambda optimizer: seen.append(len(optimizer.state)))
    second.load_state_dict(first.state_dict())
    assert seen == [4, 4] and second.param_groups[0]["net"] is network and second.param_groups[0]["lr"] == 0.5
    ours, theirs = second.state[twin[0].weight]["state.0"], first.state[net[0].weight]["state.0"]
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.bfloat16())
    first.load_state_dict(first.state_dict())
    assert first.state[net[0].weight]["state.0"].data_ptr() != theirs.data_ptr()
    packed = first.state_dict()
    del packed["param_groups"][0]["maximize"]  # from a version without that option
    first.load_state_dict(packed)
    assert first.param_groups[0]["maximize"] is False
    first.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    train(net, first, 1)


def test_a_state_dict_that_does_not_fit_changes_nothing():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), lstm())
    train(net, optimizer, 2)
    kept = copy.deepcopy(optimizer.state_dict())
    adam, wider, joint = (
        kind(net.parameters())
        for kind in (
            torch.optim.Adam,
            lambda p: LearnedOptimizer(p, lstm(5)),
            lambda p: LearnedOptimizer(p, NormalizedDescent()),
        )
    )
    for other in (adam, wider, joint):
        train(net, other, 1)
        with pytest.raises(ValueError, match="the state of parameter 0 of group 0 must have the parts .* got"):
            optimizer.load_state_dict(other.state_dict())
        torch.testing.assert_close(optimizer.state_dict(), kept, rtol=0, atol=0)
    with pytest.raises(ValueError, match="parameter 0 of group 0 must have|parameter 1 of group 0 has no place here"):
        joint.load_state_dict(kept)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        two_groups(net, lstm(), lstm()).load_state_dict(kept)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        LearnedOptimizer(net[0].parameters(), lstm()).load_state_dict(kept)


@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_alike(kind, duplicate):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), NETS[kind](), lr=0.5)
    train(net, optimizer, 2)
    twin, copied = duplicate((net, optimizer))
    assert copied.param_groups[0]["params"][0] is twin[0].weight
    train(net, optimizer, 2)
    train(twin, copied, 2)
    assert torch.equal(values(net), values(twin))
    public = [{name for name in vars(part) if not name.startswith("_")} for part in (optimizer, copied)]
    assert public[0] == public[1]


def test_add_param_group():
    net = model()
    optimizer = LearnedOptimizer(net[0].parameters(), lstm())
    train(net, optimizer, 2)
    optimizer.add_param_group({"params": net[2].parameters(), "net": AdamRule(), "lr": 0.1})
    before = values(net[2])
    train(net, optimizer, 2)
    assert not torch.equal(values(net[2]), before) and len(optimizer.state) == 4
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    with pytest.raises(TypeError, match="is torch.complex64"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 2  # the refused one is not half in


# Around the optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, factors",
    [
        (lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.5), [1, 1, 0.5, 0.5, 0.25]),
        (lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)), [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]),
        (
            lambda opt: lr_scheduler.OneCycleLR(
                opt,
                max_lr=0.8,
                total_steps=5,
                pct_start=0.4,
                anneal_strategy="linear",
                cycle_momentum=False,
                div_factor=4,
                final_div_factor=4,
            ),
            [1 / 4, 1, 11 / 16, 3 / 8, 1 / 16],
        ),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_scale_the_updates(schedule, factors, tensor_lr):
    """Gradient descent shows the factor: the parameter moves by lr × -0.1 × 1."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = LearnedOptimizer([parameter], Plain(), lr=torch.tensor(0.8) if tensor_lr else 0.8)
    scheduler, moves, rates = schedule(optimizer), [], []
    for _ in range(5):
        parameter.grad = torch.ones(3)
        before = parameter.detach().clone()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step() if len(rates) < 5 else None
        moves.append((before - parameter.detach())[0].item())
    assert moves == pytest.approx([0.1 * rate for rate in rates], rel=1e-4)
    assert rates == pytest.approx([0.8 * factor for factor in factors], rel=1e-4)


def test_momentum_cycles_are_refused_by_the_scheduler():
    with pytest.raises(ValueError, match="momentum"):
        lr_scheduler.OneCycleLR(LearnedOptimizer(model().parameters(), lstm()), max_lr=0.8, total_steps=5)


def test_hooks_run():
    net, calls = model(), []
    optimizer = LearnedOptimizer(net.parameters(), lstm())
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    train(net, optimizer, 2)
    for hook in hooks:
        hook.remove()
    train(net, optimizer, 1)
    assert calls == ["before", "after"] * 2


def test_zero_grad_and_averaging():
    from torch.optim.swa_utils import SWALR, AveragedModel

    net = model()
    optimizer = LearnedOptimizer(net.parameters(), lstm())
    averaged, points = AveragedModel(net), []
    schedule = SWALR(optimizer, swa_lr=0.5, anneal_epochs=2)
    for _ in range(3):
        train(net, optimizer, 1, schedule)
        averaged.update_parameters(net)
        points.append(values(net))
    assert optimizer.param_groups[0]["lr"] == 0.5
    torch.testing.assert_close(values(averaged.module), torch.stack(points).mean(0))
    optimizer.zero_grad(set_to_none=False)
    assert all((parameter.grad == 0).all() for parameter in net.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.filterwarnings("ignore:Using backward")
def test_no_graph():
    net, x = model(), data()[0]
    network = lstm()
    optimizer = LearnedOptimizer(net.parameters(), network)
    net(x).pow(2).mean().backward(create_graph=True)
    assert net[0].weight.grad.requires_grad
    optimizer.step()
    for parameter in net.parameters():
        assert parameter.is_leaf and parameter.requires_grad
        assert not any(part.requires_grad for part in optimizer.state[parameter].values())
    assert all(parameter.grad is None for parameter in network.parameters())


def measured_memory(kind, steps):
    """(tensors, bytes) that there are after each of six windows of that many steps."""
    import tracemalloc

    parameter = nn.Parameter(torch.ones(6))
    optimizer = LearnedOptimizer([parameter], NETS[kind]())

    def run():
        for _ in range(steps):
            optimizer.zero_grad()
            parameter.pow(2).sum().backward()
            optimizer.step()
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return tensors, tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    return [run() for _ in range(12)]


@pytest.mark.parametrize("kind", ["lstm", "joint"])
def test_memory_does_not_grow(kind):
    """L2O_FULL=1 takes ten thousand steps instead of one thousand.

    In a process of its own, where nothing else comes and goes. A leak grows in every window; the interpreter's free lists
    and a thread's first allocations only in some.
    """
    steps, here = 2000 if os.environ.get("L2O_FULL") else 200, Path(__file__).resolve()
    code = f"import {here.stem} as tests; print(tests.measured_memory({kind!r}, {steps}))"
    paths = os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tensors, traced = zip(*ast.literal_eval(done.stdout.splitlines()[-1]))
    assert min(after - before for before, after in zip(tensors, tensors[1:])) <= 0
    assert min(after - before for before, after in zip(traced, traced[1:])) < 8 * steps


def ddp_worker(rank, folder):
    """One of two processes, each with half of the batch; the second run shares the optimizer's state out."""
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y = data(torch.float64)
    mine, results = slice(rank * 8, rank * 8 + 8), []
    for shared in (False, True):
        net = nn.parallel.DistributedDataParallel(model(torch.float64, seed=1 + rank))  # DDP makes them equal
        network = lstm().double()
        optimizer = (
            ZeroRedundancyOptimizer(net.parameters(), LearnedOptimizer, net=network)
            if shared
            else LearnedOptimizer(net.parameters(), network)
        )
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(net(x[mine]), y[mine]).backward()
            optimizer.step()
        results.append(values(net))
    torch.save(results, f"{folder}/rank{rank}")
    dist.barrier()
    os._exit(0)  # torch 2.6: tearing the process group down deadlocks with its own thread now and then


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")
def test_distributed_data_parallel(tmp_path):
    """Two processes with half of the batch each, one process with all of it."""
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    net = model(torch.float64)
    train(net, LearnedOptimizer(net.parameters(), lstm().double()), 3)
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    for ours, theirs in zip(first, second):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, values(net), rtol=1e-6, atol=1e-8)


@pytest.mark.cuda
def test_cuda_parameters_with_a_network_on_the_cpu():
    net, there, network = model(), model().cuda(), lstm()
    x, y = data()
    optimizers = [LearnedOptimizer(part.parameters(), network) for part in (net, there)]
    for step in range(3):
        for part, optimizer in zip((net, there), optimizers):
            optimizer.zero_grad()
            device = part[0].weight.device
            F.mse_loss(part(x.to(device)), y.to(device)).backward()
            optimizer.step()
        with torch.no_grad():
            network.output.bias.add_(0.1)  # the copy follows
    torch.testing.assert_close(values(there).cpu(), values(net), rtol=1e-3, atol=1e-4)
    assert network.output.weight.device.type == "cpu"


# Torch's own expectations ---------------------------------------------------------------------------------------------


def database():
    pytest.importorskip("expecttest", reason="torch.testing._internal needs the package expecttest")
    return pytest.importorskip(
        "torch.testing._internal.common_optimizers", reason="this torch is installed without its optimizer database"
    )


def test_errors_that_torch_expects_of_every_optimizer():
    """`get_error_inputs_for_all_optims`: bad parameters, groups and learning rates."""
    cases = database().get_error_inputs_for_all_optims("cpu", torch.float32)
    assert len(cases) >= 5
    for case in cases:
        sample = case.optimizer_error_input
        params = [nn.Parameter(torch.ones(2))] if sample.params is None else sample.params
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=case.error_regex):
                LearnedOptimizer(params, lstm(), **sample.kwargs)
        else:
            with pytest.raises(case.error_type, match=case.error_regex):
                LearnedOptimizer(params, lstm(), **sample.kwargs)


def scheduler_sets():
    """Every set of schedulers that torch tests an optimizer with, each once."""
    optimizers = database()
    return [makers for info in optimizers.optim_db for makers in info.scheduler_inputs]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_in_the_right_direction_with_torchs_schedulers(contiguous):
    """As torch's `test_param_groups…_with_lrsched_goes_right_direction`: two groups, the loss falls."""
    sets = scheduler_sets()
    assert len(sets) >= 10
    for makers in sets:
        torch.manual_seed(0)
        weight, bias = torch.randn(10, 5), torch.randn(10)
        if not contiguous:
            weight, bias = torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]
        weight, bias, x = nn.Parameter(weight), nn.Parameter(bias), torch.randn(5)
        optimizer = LearnedOptimizer([{"params": [weight]}, {"params": [bias], "lr": 0.5}], Plain(), lr=0.1)
        schedulers = [make(optimizer) for make in makers]

        def closure():
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        start = closure().item()
        for _ in range(20):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(loss)
                else:
                    scheduler.step()
        assert closure().item() < start


def test_can_be_printed():
    text = repr(two_groups(model(), lstm(), AdamRule()))
    assert "Parameter Group 1" in text and "CoordinatewiseLSTM" in text and "lr: 0.5" in text


# Bad arguments --------------------------------------------------------------------------------------------------------


class NoState(nn.Module):
    pass


class WrongAxis(Plain):
    def init_state(self, num_coordinates):
        return torch.zeros(num_coordinates, 7)


class WrongLeaf(Plain):
    def init_state(self, num_coordinates):
        return "zeros"


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"net": 3}, TypeError, "net must be a learned optimizer, an nn.Module with init_state, got int"),
        ({"net": NoState()}, TypeError, "got NoState"),
        ({"net": None}, TypeError, "got NoneType"),
        ({"net": WrongAxis()}, ValueError, r"WrongAxis must have the coordinates as its last axis .* got \(2, 7\)"),
        ({"net": WrongLeaf()}, TypeError, "state of WrongLeaf must be a tensor or a number, got str"),
        ({"lr": -1}, ValueError, "lr must be a number of at least 0, got -1"),
        ({"lr": math.nan}, ValueError, "lr must be a number of at least 0, got nan"),
        ({"lr": "fast"}, TypeError, "lr must be a number of at least 0, got 'fast'"),
        ({"lr": True}, TypeError, "lr must be a number"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be a number of at least 0, got -0.1"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number of at least 0, got None"),
        ({"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
        ({"state_dtype": torch.int8}, ValueError, "state_dtype must be None or one of .*bfloat16.* got torch.int8"),
        ({"foreach": True}, (TypeError, ValueError), "foreach"),
        ({"capturable": True}, (TypeError, ValueError), "capturable"),
    ],
)
def test_bad_arguments(options, error, message):
    params = model().parameters()
    with pytest.raises(error, match=message):
        LearnedOptimizer(params, **{"net": lstm(), **options})
    with pytest.raises(error, match=message):  # the same in a group
        LearnedOptimizer([{"params": list(model().parameters()), **options}], lstm())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_that_are_not_real_numbers(dtype):
    with pytest.raises(TypeError, match=f"parameter 1 of group 0 is {dtype}"):
        LearnedOptimizer([torch.zeros(2), torch.zeros(2, dtype=dtype)], lstm())


class Careless(Plain):
    def __init__(self, update=lambda grad: -grad, state=None):
        super().__init__()
        self.update, self.state = update, state

    def init_state(self, num_coordinates):
        return {"m": torch.zeros(num_coordinates)}

    def forward(self, grad, state):
        return self.update(grad), state if self.state is None else self.state


@pytest.mark.parametrize(
    "net, message",
    [
        (Careless(update=lambda grad: grad.mean()), r"Careless must return an update \(3,\), got \(\)"),
        (Careless(update=lambda grad: None), r"got NoneType"),
        (Careless(state={"v": torch.zeros(3)}), "Careless must return a state like the one it got"),
        (Careless(state={"m": torch.zeros(2)}), "Careless must return a state like the one it got"),
    ],
)
def test_networks_that_break_the_agreement(net, message):
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = LearnedOptimizer([parameter], net)
    parameter.grad = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(parameter, torch.zeros(3))


def test_another_network_for_an_old_state():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), lstm())
    train(net, optimizer, 1)
    optimizer.param_groups[0]["net"] = AdamRule()
    with pytest.raises(ValueError, match="state of parameter 0 of group 0 has the parts .* not those of AdamRule"):
        train(net, optimizer, 1)
