"""The compiled step of single tensors against the learned optimizer in plain torch."""

import math

import pytest
import torch

from gradbuffer.kernels.numba_mlp import WORTHWHILE, TensorSteps
from gradbuffer.kernels.numba_mlp_loops import BLOCK
from gradbuffer.kernels.numba_orthogonal import orthogonalized
from gradbuffer.nets.mlp import MLPOptimizer, orthogonalize_matrices, start_as_normalized_adam

SHAPES = [
    (),
    (1,),
    (7,),
    (33,),
    (3, 5),
    (1, 17),
    (40, 1),
    (1, 1),
    (16, 32),
    (4, 3, 3, 3),
    (6, 4, 1, 1),
    (8, 1, 5, 5),
    (2, 3, 2, 2, 2),
    (2, 5, 3),
    (5, 2, 7),
    (6, 5, 2),
]


def network(dtype, **options):
    """Its weights are near the start."""
    net = start_as_normalized_adam(MLPOptimizer(**options).to(dtype))
    with torch.no_grad():
        for part in net.parameters():
            part += 0.1 * torch.randn(part.shape, dtype=torch.float64).to(dtype)
    return net


def alone(net, param):
    return {name: value[0] for name, value in net.init_state({"": param[None]})[""].items()}


def run(net, shape, dtype, steps=4, laid=lambda x: x, size=0.1):
    """Parameter and state after some steps by `TensorSteps`, then by the reference."""
    param, compiled = laid(torch.randn(shape, dtype=torch.float64).to(dtype)), TensorSteps(net, dtype)
    state, theirs, before = alone(net, param), param.clone(), net.init_state({"": param[None]})
    for t in range(steps):
        grad = laid((size * 10**-t * torch.randn(shape, dtype=torch.float64)).to(dtype))
        compiled.step(param, grad, state, lr=0.01)
        with torch.no_grad():
            updates, before = net({"": grad[None]}, before, params={"": theirs[None]}, lr=0.01)
        theirs = theirs + updates[""][0]
    return (param, state), (theirs, {name: value[0] for name, value in before[""].items()})


def assert_near(ours, theirs, dtype):
    close = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=2e-3, atol=2e-5)
    torch.testing.assert_close(ours[0], theirs[0], **close)
    assert list(ours[1]) == list(theirs[1])
    for name, part in ours[1].items():
        torch.testing.assert_close(part, theirs[1][name], **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vectors": "adamw", "weight_decay": 0.1},
        {"context": True, "hidden_sizes": (6, 3)},
        {"orthogonalize": True, "context": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_those_of_the_reference(shape, options, dtype):
    assert_near(*run(network(dtype, **options), shape, dtype), dtype)


@pytest.mark.parametrize("shape", [(256, 300), (301, 261), (300, 300), (40, 7), (1, 5)])
def test_matrices_become_orthogonal_in_blocks(shape):
    """As in plain torch; of symmetric products only the blocks above the diagonal are computed."""
    matrix = torch.randn(shape, dtype=torch.float64)
    out = torch.full_like(matrix, torch.nan)
    assert orthogonalized(matrix, out) is out
    torch.testing.assert_close(out, orthogonalize_matrices(matrix[None])[0], rtol=1e-9, atol=1e-11)
    assert (orthogonalized(torch.zeros_like(matrix), out) == 0).all()


@pytest.mark.parametrize("shape", [(250, 139), (67, 23, 5, 5), (3, 2 * BLOCK + 5)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_and_threads(shape, threads, threads_as_before):
    assert math.prod(shape) > WORTHWHILE
    torch.set_num_threads(threads)
    for dtype in (torch.float64, torch.float32):
        assert_near(*run(network(dtype), shape, dtype, steps=2), dtype)


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_of_several_tensors(threads, threads_as_before):
    torch.set_num_threads(threads)
    net, shapes = network(torch.float64), [(5,), (250, 139), (), (30, 20), (7, 3, 2, 2), (0,)]
    params, grads = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    states, others = [alone(net, param) for param in params], [(param.clone(), alone(net, param)) for param in params]
    compiled = TensorSteps(net, torch.float64)
    compiled.steps(params, grads, states, lr=0.01)
    for param, grad, state, (other, theirs) in zip(params, grads, states, others):
        compiled.step(other, grad, theirs, lr=0.01)
        assert_near((param, state), (other, theirs), torch.float64)
    with pytest.raises(ValueError, match="equally many"):
        compiled.steps(params, grads[1:], states, lr=0.01)
    with pytest.raises(TypeError, match="grad must be of"):
        compiled.steps(params, [grad.float() for grad in grads], states, lr=0.01)


@pytest.mark.parametrize(
    "laid", [lambda x: x.mT.contiguous().mT, lambda x: x.contiguous(memory_format=torch.channels_last)]
)
def test_tensors_that_do_not_lie_in_one_piece(laid):
    shape = (6, 4, 3, 3)
    assert not laid(torch.zeros(shape)).is_contiguous()
    ours, theirs = run(network(torch.float64), shape, torch.float64, laid=laid)
    assert not ours[0].is_contiguous()
    assert_near(ours, theirs, torch.float64)


@pytest.mark.parametrize("size", [0.0, 1e5, 1e-7])
@pytest.mark.parametrize("shape", [(5,), (6, 5)])
def test_gradients_of_any_size(size, shape):
    ours, theirs = run(network(torch.float64, weight_decay=0.1), shape, torch.float64, size=size)
    assert_near(ours, theirs, torch.float64)


def test_tiny_averages_become_zero():
    net, param = network(torch.float32), torch.randn(20, 20)
    compiled, state = TensorSteps(net), alone(net, param)
    compiled.step(param, torch.randn(20, 20), state, lr=0.01)
    for _ in range(1500):
        compiled.step(param, torch.zeros(20, 20), state, lr=0.01)
    assert (state["m"][0] == 0).all() and (state["v"] == 0).all() and (state["m"][2] != 0).any()


@pytest.mark.parametrize("shape", [(16, 32), (7, 19), (4, 3, 3, 3), (37,), (250, 139)], ids=str)
def test_state_in_bfloat16(shape):
    net, steps, param = network(torch.float32), 20, torch.randn(shape)
    compiled, params = TensorSteps(net), (param, param.clone())
    theirs, narrow = alone(net, param), alone(net, param)
    narrow |= {name: narrow[name].bfloat16() for name in ("m", "v")}
    for _ in range(steps):
        grad = torch.randn(shape)
        compiled.step(params[0], grad, narrow, lr=0.01)
        compiled.step(params[1], grad, theirs, lr=0.01)
        theirs |= {name: theirs[name].bfloat16().float() for name in ("m", "v")}
    for name in ("m", "v"):
        assert narrow[name].dtype == torch.bfloat16
        torch.testing.assert_close(narrow[name].float(), theirs[name], rtol=0.02, atol=1e-5)
    moved = (params[1] - params[0]).square().mean().sqrt()
    assert 0 < moved < 0.02 * 0.01 * steps  # against a way of 0.01 for each step


def test_autograd_notices_that_a_parameter_has_changed():
    net, param = network(torch.float32), torch.nn.Parameter(torch.randn(6, 5))
    loss, before = param.square().sum(), param.detach().clone()
    TensorSteps(net).step(param, torch.randn(6, 5), alone(net, param.detach()), lr=0.01)
    assert param.requires_grad and not torch.equal(param, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_nan_stays_in_its_tensor():
    net, param = network(torch.float32), torch.randn(6, 5)
    grad, state = torch.randn(6, 5), alone(net, param)
    grad[2, 3] = math.nan
    TensorSteps(net).step(param, grad, state, lr=0.01)
    assert param.isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"param": torch.zeros(5, 4)}, "grad must have the shape"),
        ({"grad": torch.zeros(4, 5, dtype=torch.float64)}, "grad must be of"),
        ({"state": {}}, "state must have"),
        (
            {"state": alone(MLPOptimizer(), torch.zeros(4, 5)) | {"v": torch.zeros(4, 5).bfloat16()}},
            "v must be of torch.float32",
        ),
        ({"lr": -1.0}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
    ],
)
def test_what_is_given_is_checked(change, message):
    net = MLPOptimizer()
    given = dict(param=torch.zeros(4, 5), grad=torch.zeros(4, 5), state=alone(net, torch.zeros(4, 5)), lr=0.01) | change
    with pytest.raises((TypeError, ValueError), match=message):
        TensorSteps(net).step(**given)


@pytest.mark.parametrize(
    "net, dtype, message",
    [
        (torch.nn.Linear(2, 2), torch.float32, "net must be"),
        (MLPOptimizer(variant="small_fc"), torch.float32, "net must have"),
        (MLPOptimizer(), torch.bfloat16, "dtype must be"),
    ],
)
def test_arguments_are_checked(net, dtype, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TensorSteps(net, dtype)
