"""Steps of many tensors in two launches: in Triton's interpreter, or on a CUDA device, against steps tensor by tensor."""

import copy

import pytest
import torch
from interpreter import DEVICE, check_in_the_interpreter, from_outside, on_device
from learned_steps import same, step

from gradbuffer.kernels.torch_blocks import TorchLSTM
from optimizers import CoordinatewiseLSTM, LearnedOptimizer, NonFiniteError, log_sign


@from_outside
def test_cases_pass_in_the_interpreter():
    check_in_the_interpreter(__file__, 6)


def case(p, dtype=torch.float32, shapes=((7, 3), (), (70,), (2, 2, 2))):
    """(steps, params, states, gradients, weights of the kernels) for random tensors of these shapes."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from gradbuffer.kernels.triton_lstm import TritonLSTM

    draw = lambda *shape: torch.randn(shape, dtype=dtype, device=DEVICE)  # noqa: E731
    net = torch.nn.LSTM(2 if p else 1, 20, 2, dtype=dtype, device=DEVICE)
    weights = net, draw(20), draw()
    params, gradients = [draw(*shape) for shape in shapes], [draw(*shape) for shape in shapes]
    states = [(draw(2, 20, param.numel()), draw(2, 20, param.numel())) for param in params]
    watched = list(net.parameters())
    kept = torch.cat([weight.detach().flatten() for weight in watched])
    steps = TritonLSTM(*weights).group_steps(p, params, states, watched, kept)
    return steps, params, states, gradients, weights


@on_device
@pytest.mark.parametrize(
    "p, dtype, tolerance", [(0.0, torch.float32, 1e-5), (10.0, torch.float32, 1e-5), (10.0, torch.float64, 1e-10)]
)
@pytest.mark.parametrize("sign, decay", [(1, 0), (-1, 0.3)])
def test_steps_are_those_of_each_tensor(p, dtype, tolerance, sign, decay):
    steps, params, states, gradients, weights = case(p, dtype)
    kernels, expected = TorchLSTM(*weights), copy.deepcopy((params, states))
    for _ in range(2):
        assert steps.look(gradients, 0.1, sign, decay).tolist() == [0, 0]
        steps.step()
        for param, (hidden, cells), gradient in zip(*expected, gradients):
            read = sign * gradient.flatten() + decay * param.flatten()
            readings = log_sign(read, p) if p else read[None]
            update, *_ = kernels.step(lambda a, b: readings[:, a:b], hidden, cells, inplace=True)
            param += 0.1 * update.view(param.shape)
    for found, wanted in zip(
        [*params, *sum(map(list, states), [])], [*expected[0], *sum(map(list, expected[1]), [])], strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@on_device
@pytest.mark.parametrize("bad, place", [(float("nan"), 0), (float("inf"), 1), (-float("inf"), 2)])
def test_nothing_changes_where_a_gradient_is_not_finite(bad, place):
    steps, params, states, gradients, _ = case(10.0)
    kept = copy.deepcopy((params, states))
    gradients[place].view(-1)[-1] = bad
    assert steps.look(gradients, 0.1).tolist() == [1, 0]
    steps.step()
    assert all(map(torch.equal, params, kept[0]))
    assert all(torch.equal(a, b) for own, old in zip(states, kept[1]) for a, b in zip(own, old))
    gradients[place].view(-1)[-1] = 1.0
    assert steps.look(gradients, 0.1).tolist() == [1, 0]  # until it is taken down
    steps.lower()
    assert steps.look(gradients, 0.1).tolist() == [0, 0]
    steps.step()
    assert not torch.equal(params[place], kept[0][place])


@on_device
def test_a_changed_weight_is_seen_and_other_gradients_are_found():
    steps, params, states, gradients, weights = case(0.0)
    assert steps.look(gradients, 0.1).tolist() == [0, 0]
    others = [torch.full_like(gradient, torch.nan) for gradient in gradients]
    assert steps.look(others, 0.1).tolist() == [1, 0]  # elsewhere in memory
    steps.lower()
    with torch.no_grad():
        weights[0].bias_hh_l1[-1] += 1e-3
    assert steps.look(gradients, 0.1).tolist() == [0, 1]
    assert steps.holds(params, states, steps.kept) and not steps.holds(params, states, steps.kept.clone())


def optimizers(monkeypatch, **options):
    """(triton's, torch's), each as (parameters, optimizer) of the same network, in two groups."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    torch.manual_seed(0)
    net = CoordinatewiseLSTM(5, preprocess="log_sign", output_scale=0.1).double().to(DEVICE)
    shapes, found = ((7, 3), (), (70,), (2, 2, 2), (0,)), []
    values = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes]
    for kind in ("triton", "torch"):
        monkeypatch.setenv("L2O_KERNELS", kind)
        params = [torch.nn.Parameter(value.clone()) for value in values]
        own = copy.deepcopy(net)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "maximize": True}]
        found.append((params, LearnedOptimizer(groups, own, lr=0.7, **options), own, kind))
    return found


@on_device
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.2}])
def test_a_learned_optimizer_steps_in_groups(monkeypatch, options):
    """Two launches a group; the same steps and states as tensor by tensor, saved and loaded, after the weights changed too."""
    from gradbuffer.kernels import triton_group

    found, taken = optimizers(monkeypatch, **options), []
    plain = triton_group.GroupSteps.step
    monkeypatch.setattr(triton_group.GroupSteps, "step", lambda self: taken.append(self) or plain(self))
    step(monkeypatch, found, 0)
    same(found)
    taken.clear()  # the first use on a device checks itself, by a step of its own
    for seed in (1, 2):
        step(monkeypatch, found, seed)
        same(found)
    assert len(taken) == 4

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
def test_a_group_is_as_it_was_after_an_error(monkeypatch):
    found = optimizers(monkeypatch)
    step(monkeypatch, found, 0)
    ((params, optimizer, _, kind), _) = found
    kept = copy.deepcopy(
        (
            list(map(torch.Tensor.detach, params)),
            [optimizer.state[param] for param in params if param in optimizer.state],
        )
    )

    def spoil(params, net):
        params[3].grad[0, 1, 1] = torch.nan

    with pytest.raises(
        NonFiniteError, match="the gradient of parameter 1 of group 1 must be finite, but holds nan at coordinate 3"
    ):
        step(monkeypatch, found[:1], 2, spoil)
    assert all(map(torch.equal, params, kept[0]))
    states = [optimizer.state[param] for param in params if param in optimizer.state]
    assert all(
        torch.equal(a, b) for old, new in zip(kept[1], states, strict=True) for a, b in zip(old.values(), new.values())
    )
    step(monkeypatch, found, 2)
    same(found)


@on_device
@pytest.mark.parametrize("p", [0.0, 10.0])
def test_the_self_check(monkeypatch, p):
    """Groups are stepped where they pass it at their first use."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from gradbuffer.kernels import triton_group, triton_lstm

    asked = "group", 2 if p else 1, 20, 2, torch.device(DEVICE), torch.float32, p
    triton_lstm.failures.cache_clear()
    assert triton_lstm.failures(*asked) == ()
    triton_lstm.failures.cache_clear()
    monkeypatch.setattr(triton_group.GroupSteps, "step", lambda self: None)
    (reason,) = triton_lstm.failures(*asked)
    assert "a group is off by" in reason
    triton_lstm.failures.cache_clear()
