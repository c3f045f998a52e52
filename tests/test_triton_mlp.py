"""Steps of the small learned optimizer for many tensors at once: in Triton's interpreter, or on a CUDA device, against plain torch."""

import copy

import pytest
import torch
from interpreter import DEVICE, check_in_the_interpreter, from_outside, on_device
from learned_steps import same, step

from gradbuffer.nets.mlp import orthogonalize_matrices
from optimizers import LearnedOptimizer, MLPOptimizer, NonFiniteError, explain

VECTORS = [(), (1,), (130,)]
MATRICES = [(7, 3), (9, 130), (5, 6, 4), (4, 6, 5), (3, 2, 9), (6, 5, 2, 3), (2, 1, 3, 3)]


@from_outside
def test_cases_pass_in_the_interpreter():
    check_in_the_interpreter(__file__, 17)


def make(dtype=torch.float64, **options):
    """A network with random weights, biases included; small, since the interpreter takes its units one by one."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    net = MLPOptimizer(**{"hidden_sizes": (4,)} | options).to(DEVICE, dtype)
    for name, weight in net.layers.items():
        weight.requires_grad_(False)
        if "bias" in name:
            weight.normal_()
    return net


def compare(net, shapes, steps=2, scale=1.0, still=()):
    """The largest differences of parameters, in units of lr, and of states, relative, after some steps by the kernels and by torch.

    still: the numbers of tensors whose gradient is zero in the second step.
    """
    from gradbuffer.kernels.triton_mlp import MLPSteps

    draw = lambda *shape: torch.randn(*shape, dtype=net.layers["bias_0"].dtype, device=DEVICE)  # noqa: E731
    params, lr = {str(k): draw(1, *shape) for k, shape in enumerate(shapes)}, 0.01
    state = net.init_state(params)
    values = [param[0].clone() for param in params.values()]
    own = [{name: leaf[0].clone() for name, leaf in each.items()} for each in state.values()]
    kernels = MLPSteps(net, values, [], None)
    for number in range(steps):
        grads = {
            name: scale * draw(*param.shape) * (number != 1 or int(name) not in still) for name, param in params.items()
        }
        kernels.step(values, [-grad[0] for grad in grads.values()], own, lr, -1.0, 0.9)
        params = {name: 0.9 * param for name, param in params.items()}
        updates, state = net(grads, state, params=params, lr=lr)
        params = {name: param + updates[name] for name, param in params.items()}
    wanted = [{name: leaf[0] for name, leaf in each.items()} for each in state.values()]
    far = lambda a, b, size: ((a - b).abs().max() / size).item()  # noqa: E731
    return (
        max(far(value, param[0], lr) for value, param in zip(values, params.values())),
        max(
            far(leaf, right[name], right[name].abs().max())
            for each, right in zip(own, wanted)
            for name, leaf in each.items()
        ),
    )


@on_device
@pytest.mark.parametrize(
    "options, given, shapes",
    [
        ({"hidden_sizes": (8, 8)}, {}, MATRICES[3:]),
        ({}, {"scale": 1e-5}, VECTORS + MATRICES[:3]),
        ({"hidden_sizes": (5, 3), "context": True, "weight_decay": 0.1}, {"still": (0, 2, 4)}, VECTORS + MATRICES[:3]),
        ({"context": True}, {"scale": 1e4}, MATRICES[2:]),
    ],
)
def test_a_step_is_the_networks(options, given, shapes):
    """Also of gradients beyond the bound, of tiny ones, and of tensors that do not move."""
    params, states = compare(make(**options), shapes, **given)
    assert params < 1e-9 and states < 1e-12


@on_device
@pytest.mark.parametrize("shapes", [[(7, 3), (5,)], [(18, 140)], [(70, 3, 1, 1), (4, 6, 5)]])
def test_orthogonalized(shapes):
    params, states = compare(make(orthogonalize=True, context=True), shapes, steps=1)
    assert params < 1e-9 and states < 1e-12


@on_device
@pytest.mark.parametrize("rounds, tolerance", [(False, 1e-3), (True, 0.1)])
def test_in_float32(rounds, tolerance):
    """In units of lr, of which a parameter's last digit is 1e-5."""
    net = make(torch.float32, orthogonalize=True)
    net.rounds_products = rounds
    params, states = compare(net, [(7, 30), (5,), (40, 9)], steps=1)
    assert params < tolerance and states < 1e-6
    assert (params > 1e-4) == rounds


@on_device
@pytest.mark.parametrize("rows, columns", [(20, 150), (130, 4)])
def test_matrices_are_orthogonalized_as_by_torch(rows, columns):
    """Rounded factors move the direction by less than a hundredth, of a badly conditioned matrix too."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from gradbuffer.kernels.triton_orthogonal import Orthogonalizer, padded_sizes

    matrix = torch.randn(rows, columns, device=DEVICE) * torch.logspace(0, -4, columns, device=DEVICE)
    wide, (high, width) = (matrix if rows < columns else matrix.T), padded_sizes(rows, columns)
    wanted = orthogonalize_matrices(wide.double()[None])[0]
    for factors, tolerance in ((torch.float16, 0.01), (torch.float32, 1e-4)):
        x = torch.zeros(high, width, device=DEVICE)
        x[: wide.shape[0], : wide.shape[1]] = wide
        total = x.square().sum().reshape(1)
        made = Orthogonalizer([(0, high, width, 0)], torch.float32, factors, x.device)
        squares = made.run(x.view(-1), total)
        found = x[: wide.shape[0], : wide.shape[1]]
        assert (found - wanted).norm() < tolerance * wanted.norm()
        torch.testing.assert_close(squares.sum(), x.square().sum())
        assert x.count_nonzero() == found.count_nonzero()


SHAPES = [(7, 3), (), (70,), (2, 3, 2, 2)]


def optimizers(monkeypatch):
    """(triton's, torch's), each as (parameters, optimizer, network, kind), in two groups."""
    net, found = make(context=True), []
    values = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in (*SHAPES, (0,))]
    values.append(torch.randn(3, 2, 4, 2, dtype=torch.float64, device=DEVICE).permute(0, 2, 3, 1))  # not in one piece
    for kind in ("triton", "torch"):
        monkeypatch.setenv("L2O_KERNELS", kind)
        own, params = copy.deepcopy(net), [torch.nn.Parameter(value.clone()) for value in values]
        parts = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03, "maximize": True, "weight_decay": 0.2}]
        found.append((params, LearnedOptimizer(parts, own, lr=0.01), own, kind))
    return found


@on_device
def test_a_learned_optimizer_steps_in_groups(monkeypatch):
    """The same steps and states as tensor by tensor, saved and loaded, after the weights changed too."""
    found, taken = optimizers(monkeypatch), []
    from gradbuffer.kernels.triton_mlp import MLPSteps

    plain = MLPSteps.launch
    monkeypatch.setattr(MLPSteps, "launch", lambda self, *given: taken.append(self) or plain(self, *given))
    step(monkeypatch, found, 0)
    same(found, atol=1e-11)
    taken.clear()  # the first use on a device checks itself, by a step of its own
    step(monkeypatch, found, 1)
    same(found, atol=1e-11)
    assert len(taken) == 2

    def heavier(params, net):
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(1.5)

    step(monkeypatch, found, 3, heavier)
    same(found, atol=1e-11)
    for _, optimizer, *_ in found:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(monkeypatch, found, 4)
    same(found, atol=1e-11)


@on_device
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_group_is_as_it_was_after_an_error(monkeypatch, bad):
    found = optimizers(monkeypatch)
    step(monkeypatch, found, 0)
    ((params, optimizer, _, kind), _) = found
    everything = lambda: [
        *params,
        *(leaf for param in params if param in optimizer.state for leaf in optimizer.state[param].values()),
    ]  # noqa: E731
    kept = [tensor.detach().clone() for tensor in everything()]

    def spoil(params, net):
        params[3].grad[0, 1, 1] = bad

    with pytest.raises(NonFiniteError, match=f"the gradient of parameter 1 of group 1 must be finite, but holds {bad}"):
        step(monkeypatch, found[:1], 2, spoil)
    assert all(map(torch.equal, kept, everything()))
    step(monkeypatch, found, 2)
    same(found, atol=1e-11)


@on_device
def test_a_changed_weight_is_seen_and_other_gradients_are_found():
    net, params = make(), [torch.zeros(shape, dtype=torch.float64, device=DEVICE) for shape in SHAPES]
    from gradbuffer.kernels.triton_mlp import MLPSteps

    watched, gradients = list(net.parameters()), [torch.ones_like(param) for param in params]
    kept = torch.cat([weight.detach().flatten() for weight in watched])
    steps = MLPSteps(net, params, watched, kept)
    assert steps.look(gradients).tolist() == [0, 0]
    assert steps.look([torch.full_like(gradient, torch.nan) for gradient in gradients]).tolist() == [1, 0]
    steps.lower()
    net.layers["bias_1"] += 1e-3
    assert steps.look(gradients).tolist() == [0, 1]
    assert steps.holds(params, kept) and not steps.holds(params, kept.clone()) and not steps.holds(params[1:], kept)


@on_device
def test_the_self_check(monkeypatch):
    """Steps are taken at once where they pass it at their first use."""
    net = make(context=True)
    from gradbuffer.kernels import triton_mlp

    asked = net, torch.device(DEVICE), torch.float64
    triton_mlp.CHECKED.clear()
    random = torch.get_rng_state()
    assert triton_mlp.failures(*asked) == () and torch.equal(torch.get_rng_state(), random)
    triton_mlp.CHECKED.clear()
    monkeypatch.setattr(triton_mlp.MLPSteps, "launch", lambda self, *given: None)
    (reason,) = triton_mlp.failures(*asked)
    assert "a step is off by" in reason
    triton_mlp.CHECKED.clear()


@on_device
@pytest.mark.parametrize(
    "options, reason",
    [
        ({"variant": "small_fc"}, "variant"),
        ({"vectors": "adamw"}, "vectors"),
        ({"hidden_sizes": (4, 4, 4)}, "at most 2 hidden layers"),
        ({"hidden_sizes": (17,)}, "of at most 16 units"),
    ],
)
def test_reasons(monkeypatch, options, reason):
    monkeypatch.setenv("L2O_KERNELS", "triton")
    assert "LearnedOptimizer: triton\n" in explain(make()) + "\n"
    text = explain(make(**options))
    assert "LearnedOptimizer: triton" not in text and reason in text
