"""Laws that hold for every network, problem and kind of kernels."""

import pytest
import torch
from cases import KERNELS, NETWORKS, PROBLEMS, VECTORS, make_batch, make_net

from gradbuffer.contracts import as_loss, as_rule, part_if_any, part_of
from gradbuffer.nests import map_tensors, tensors_in
from gradbuffer.unrolling import Coordinates
from meta_training import Autograd, Replay, evaluate, meta_gradient, meta_train
from optimizers import load_optimizer, save_optimizer

STEPS = 4

every_network = pytest.mark.parametrize("network", NETWORKS)
every_problem = pytest.mark.parametrize("problem", PROBLEMS)


def close(found, expected, tolerance=1e-9):
    """Two nests of tensors are the same, to rounding."""
    found, expected = tensors_in(found), tensors_in(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance * (1e-3 + float(other.abs().max()) if other.numel() else 0)
        )


def window(net, batch, method="replay", params=None, state=None, **options):
    """Gradients and `WindowInfo` of a window; by default from the start."""
    params = batch.params if params is None else params
    if state is None:
        coordinates = Coordinates(params)
        state = as_rule(net, coordinates).init_state(sum(coordinates.sizes))
    return meta_gradient(net, batch, params, state, 3, STEPS, method, **options)


@every_network
@every_problem
@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
def test_replay_equals_autograd(network, problem, second_order, small_mnist):
    """In two windows, one after the other, so that the second begins with a state."""
    net, batch = make_net(network), make_batch(problem, small_mnist)
    (grads, info), (expected, reference) = (window(net, batch, method(second_order)) for method in (Replay, Autograd))
    close((grads, info.losses, info.params), (expected, reference.losses, reference.params))
    assert any(grad.abs().sum() > 0 for grad in grads.values()) or (network, problem in VECTORS) == (
        "MLP, orthogonal",
        True,
    )
    grads, info = window(net, batch, Replay(second_order), info.params, info.state)
    expected, reference = window(net, batch, Autograd(second_order), reference.params, reference.state)
    close((grads, info.losses, info.params), (expected, reference.losses, reference.params))


@every_network
@every_problem
def test_parts_equal_the_whole(network, problem, small_mnist):
    """The meta-gradient is the mean of its functions' own."""
    net, batch = make_net(network), make_batch(problem, small_mnist)
    whole, info = window(net, batch)
    parts = [window(net, part_of(batch, function, function + 1)) for function in range(2)]
    close(whole, {name: (parts[0][0][name] + parts[1][0][name]) / 2 for name in whole})
    close(info.losses, torch.cat([part.losses for _, part in parts], 1))
    assert part_if_any(batch)


@every_network
@every_problem
def test_a_tape_changes_nothing(network, problem, small_mnist):
    net, batch = make_net(network), make_batch(problem, small_mnist)
    coordinates = Coordinates(batch.params)
    rule, theta, loss = as_rule(net, coordinates), coordinates.join(batch.params), as_loss(batch.loss)
    state = map_tensors(lambda tensor: tensor + 0.01, rule.init_state(len(theta)))
    kept = map_tensors(torch.clone, (theta, state))
    with torch.no_grad():
        with_tape, without = (rule.record(loss, coordinates, theta, state, 0, STEPS, keep) for keep in (True, False))
    close(with_tape[:4], without[:4])
    assert all(map(torch.equal, tensors_in((theta, state)), tensors_in(kept)))  # what was given is as it was
    adjoint = torch.randn(STEPS, len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    read = {} if without.read is None else {"read": without.read}
    tape = {} if with_tape.tape is None else {"tape": with_tape.tape}
    close(
        rule.replay(with_tape.gradients[:-1], state, adjoint, **tape, **read),
        rule.replay(without.gradients[:-1], state, adjoint, **read),
    )


@every_network
@every_problem
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_kind_of_kernels_gives_the_same(network, problem, kernels, small_mnist, monkeypatch):
    net, batch = make_net(network), make_batch(problem, small_mnist)
    monkeypatch.setenv("L2O_KERNELS", "torch")
    expected, reference = window(net, batch, Autograd())
    second, _ = window(net, batch, Autograd(second_order=True))
    monkeypatch.setenv("L2O_KERNELS", kernels)
    net = make_net(network)
    grads, info = window(net, batch)
    close(
        (grads, info.losses, info.params, info.state), (expected, reference.losses, reference.params, reference.state)
    )
    close(window(net, batch, Replay(second_order=True))[0], second)


@every_network
def test_saved_equals_loaded(network, tmp_path):
    net = make_net(network)
    save_optimizer(net, tmp_path / "net.safetensors")
    loaded = load_optimizer(tmp_path / "net.safetensors")
    assert type(loaded) is type(net) and loaded.config == net.config
    problem = PROBLEMS["quadratics"](None)
    assert torch.equal(*(evaluate(one, problem, 5, 3) for one in (net, loaded)))


@every_network
@pytest.mark.parametrize("problem", ["perceptrons"])
@pytest.mark.parametrize(
    "options",
    [dict(method="replay"), dict(method="pes", per_function=True, hold=True), dict(second_order=True)],
    ids=["replay", "pes", "second order"],
)
def test_resumed_equals_uninterrupted(network, problem, options, small_mnist, tmp_path):
    problem = PROBLEMS[problem](small_mnist)
    options = dict(
        steps=6,
        unroll=3,
        meta_batch=2,
        iterations=4,
        progress=False,
        validation_functions=2,
        validation_every=2,
        **options,
    )
    whole = make_net(network)
    history = meta_train(whole, problem, **options)

    def stop(iteration, history):
        if iteration == 3:  # in the middle of an unroll
            raise KeyboardInterrupt

    path = tmp_path / "run"
    with pytest.warns(UserWarning, match="interrupted"):
        meta_train(make_net(network), problem, **options, checkpoint=path, checkpoint_every=1, callback=stop)
    resumed = make_net(network)
    again = meta_train(resumed, problem, **options, checkpoint=path, checkpoint_every=1)
    assert again.meta_loss == history.meta_loss and again.validation == history.validation
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    assert (
        any(
            not torch.equal(*pair) for pair in zip(whole.state_dict().values(), make_net(network).state_dict().values())
        )
        or history.best_iteration == 0
    )
