"""Networks that read Adam's averages, their readings in Triton: in its interpreter, or on a CUDA device, against the same in torch."""

import copy

import pytest
import torch
from interpreter import DEVICE, check_in_the_interpreter, from_outside, on_device
from learned_steps import same, step

from gradbuffer.kernels import triton_lstm
from optimizers import LearnedOptimizer, NonFiniteError, NormalizedLSTM, RNNProp, explain, load_optimizer

NETS = {
    "RNNProp": lambda: RNNProp(20, 2, 0.9, 0.3),
    "NormalizedLSTM": lambda: NormalizedLSTM(20, 1, longest=2.5, fade=1.7),
    "many betas": lambda: NormalizedLSTM(5, 1, (0.5, 0.9, 0.99, 0.999), 0.98, eps=0.1),
}


@from_outside
def test_cases_pass_in_the_interpreter():
    check_in_the_interpreter(__file__, 12)


def worked(net, kind, monkeypatch, N, T=2):
    """Updates, states and gradients of some steps and of a replay, by one kind of kernels, of gradients of all scales."""
    monkeypatch.setenv("L2O_KERNELS", kind)
    like = dict(dtype=net.output.weight.dtype, device=DEVICE)
    scales = torch.logspace(-6, 4, N, **like)
    grads = scales * torch.randn(T, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(**like)
    grads[1, 0] = 0
    adjoint = torch.cos(torch.arange(T * N, **like)).view(T, N)
    with torch.no_grad():
        first, middle = net(grads[0], net.init_state(N))
        kept = [part.clone() for part in middle]
        take, own, _ = net.recorder(middle, T)
        updates = [first] + [take(grad).clone() for grad in grads[1:]]
        assert all(map(torch.equal, middle, kept))
        in_place, same_state = net(grads[-1], middle, inplace=True)
        assert all(new is old for new, old in zip(same_state, middle))
    read = net.replay(grads, kept, adjoint)
    frozen = copy.deepcopy(net)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name == "input.bias" or name.startswith("output"))
    some = frozen.replay(grads, frozen.init_state(N), adjoint)
    return [*updates, *own, in_place, *middle, *read.values(), *some.values()]


@on_device
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_steps_and_replays_are_torchs(name, dtype, tolerance, monkeypatch):
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    net = NETS[name]().to(DEVICE, dtype)
    monkeypatch.setattr(triton_lstm, "FEW", 64)  # one block of 64 and a rest
    found = worked(net, "triton", monkeypatch, 67)
    expected = worked(copy.deepcopy(net).double(), "torch", monkeypatch, 67)
    for part, wanted in zip(found, expected, strict=True):
        assert part.shape == wanted.shape and (part - wanted).norm() <= tolerance * (wanted.norm() + 1e-6)


@on_device
def test_states_that_are_parts_of_larger_ones(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "triton")
    net = RNNProp(5, 2).double().to(DEVICE)
    wide = [part.normal_().abs_() for part in net.init_state(20)]
    parts, whole = [tuple(change(part[..., 3:9]) for part in wide) for change in (lambda x: x, torch.Tensor.contiguous)]
    every_other = tuple(part[..., ::2] for part in wide)
    grad = torch.randn(10, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        expected, _ = net(grad[:6], copy.deepcopy(whole), inplace=True)
        odd, after = net(grad, every_other)
        found, _ = net(grad[:6], parts, inplace=True)
        again, new = net(grad, tuple(part.contiguous() for part in every_other))
    assert torch.equal(found, expected) and not torch.equal(parts[2], whole[2])
    assert not torch.equal(again, odd)  # it was written over in between
    with torch.no_grad():
        first, _ = net(grad[:6], whole)
    assert torch.equal(first, expected)
    assert all(part.shape == wanted.shape for part, wanted in zip(after, new))


@on_device
def test_readings_of_opposite_gradients_are_opposite(monkeypatch):
    """Exactly, but for the time's."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    monkeypatch.setenv("L2O_KERNELS", "triton")
    net = NormalizedLSTM(5).to(DEVICE)
    with torch.no_grad():
        reader = net.kernels().reader(net, "read")
        grads = torch.randn(3, 9, device=DEVICE)
        memory = net.init_state(9)[2]
        plus, minus = reader.read(grads, memory), reader.read(-grads, memory)
    assert torch.equal(plus[:, :-1], -minus[:, :-1]) and torch.equal(plus[:, -1], minus[:, -1])


def test_coordinates_of_different_ages_are_read_as_each_alone():
    """By torch: small tensors of a `LearnedOptimizer`, of which one joined later, are one vector."""
    net = NormalizedLSTM(5).double()
    young, old = net.init_state(3)[2], net.init_state(2)[2]
    (_, (old,)), grads = net.read(torch.randn(4, 2).double(), [old]), torch.randn(2, 5).double()
    found, (after,) = net.read(grads, [torch.cat([young, old], 1)])
    for span, own in ((slice(0, 3), young), (slice(3, 5), old)):
        expected, (wanted,) = net.read(grads[:, span], [own])
        assert torch.equal(found[..., span], expected) and torch.equal(after[:, span], wanted)


def optimizers(monkeypatch, make, **options):
    """(triton's, torch's), each as (parameters, optimizer, network, kind), in two groups."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    torch.manual_seed(0)
    net, found = make().double().to(DEVICE), []
    values = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in ((7, 10), (), (3,), (2, 2, 2), (0,))]
    for kind in ("triton", "torch"):
        monkeypatch.setenv("L2O_KERNELS", kind)
        params = [torch.nn.Parameter(value.clone()) for value in values]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "maximize": True}]
        own = copy.deepcopy(net)
        found.append((params, LearnedOptimizer(groups, own, lr=0.7, **options), own, kind))
    return found


@on_device
@pytest.mark.parametrize(
    "make, options", [(lambda: load_optimizer("general_lstm"), {}), (lambda: RNNProp(5), {"weight_decay": 0.2})]
)
def test_a_learned_optimizer_steps_in_groups(monkeypatch, make, options):
    """The same steps and states as tensor by tensor, also of tensors that join later, saved and loaded, after the weights changed."""
    found, taken = optimizers(monkeypatch, make, **options), []
    from gradbuffer.kernels import triton_group

    plain = triton_group.GroupSteps.step
    monkeypatch.setattr(triton_group.GroupSteps, "step", lambda self: taken.append(self) or plain(self))
    step(monkeypatch, found, 1)  # one without a gradient
    same(found)
    taken.clear()  # the first use on a device checks itself, by a step of its own
    step(monkeypatch, found, 2)
    same(found)
    assert len(taken) == 2

    def heavier(params, net):
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(1.5)

    step(monkeypatch, found, 3, heavier)
    same(found)
    for _, optimizer, *_ in found:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(monkeypatch, found, 4)
    same(found)


@on_device
@pytest.mark.parametrize("make", [lambda: NormalizedLSTM(5), lambda: RNNProp(5, 1)])
def test_a_group_is_as_it_was_after_an_error(monkeypatch, make):
    found = optimizers(monkeypatch, make)
    step(monkeypatch, found, 0)
    ((params, optimizer, _, kind), _) = found
    states = lambda: [leaf for param in params for leaf in optimizer.state.get(param, {}).values()]  # noqa: E731
    kept = [tensor.detach().clone() for tensor in (*params, *states())]

    def spoil(params, net):
        params[3].grad[0, 1, 1] = torch.inf  # it is maximized

    with pytest.raises(
        NonFiniteError, match="the gradient of parameter 1 of group 1 must be finite, but holds -inf at coordinate 3"
    ):
        step(monkeypatch, found[:1], 2, spoil)
    assert all(map(torch.equal, kept, (*params, *states())))
    step(monkeypatch, found, 2)
    same(found)


class Own(RNNProp):
    def read(self, grads, memory):
        readings, memory = super().read(grads, memory)
        return readings.flip(1), memory


@on_device
def test_a_subclass_reads_by_itself(monkeypatch):
    """Since it may read something else; and so does a state in another dtype."""
    net, plain = Own(5).double().to(DEVICE), RNNProp(5).double().to(DEVICE)
    grad = torch.randn(9, dtype=torch.float64, device=DEVICE)
    found = []
    for kind in ("triton", "torch"):
        monkeypatch.setenv("L2O_KERNELS", kind)
        with torch.no_grad():
            hidden, cell, averages = plain.init_state(9)
            found.append([net(grad, net.init_state(9))[0], plain(grad, (hidden, cell, averages.float()))[0]])
    torch.testing.assert_close(*found)
    monkeypatch.setenv("L2O_KERNELS", "triton")
    assert "readings: triton" in explain(plain) and "readings" not in explain(net)


@on_device
@pytest.mark.parametrize("work, part", [("step", "step"), ("read", "read"), ("read", "pull_layer"), ("group", None)])
def test_the_self_check(monkeypatch, work, part):
    """Readings are made in the kernels where they pass it at their first use."""
    monkeypatch.setenv("L2O_KERNELS", "triton")
    net = RNNProp(5, 1).to(DEVICE)
    kernels = net.kernels()
    from gradbuffer.kernels import triton_group, triton_reader

    triton_lstm.CHECKED.clear()
    random = torch.get_rng_state()
    assert triton_lstm.failures_of_averages(kernels, net, work) == () and torch.equal(torch.get_rng_state(), random)
    triton_lstm.CHECKED.clear()
    if part:
        plain = getattr(triton_reader.AveragesReader, part)
        wrong = lambda *given: (  # noqa: E731
            [1.1 * part for part in found] if isinstance(found := plain(*given), tuple) else 1.1 * found
        )
        monkeypatch.setattr(triton_reader.AveragesReader, part, wrong)
    else:
        monkeypatch.setattr(triton_group.GroupSteps, "step", lambda self: None)
    (reason,) = triton_lstm.failures_of_averages(kernels, net, work)
    assert f"a {work} with averages is off by" in reason
    triton_lstm.CHECKED.clear()
