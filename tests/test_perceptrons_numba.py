"""Compiled perceptrons against the plain ones, their windows against single steps, and windows taken in parts."""

import math
import threading

import pytest
import torch
from conftest import write_mnist

from gradbuffer.contracts import as_loss
from gradbuffer.nests import tensors_in
from gradbuffer.problems.images import Minibatches
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates
from optimizees import MNISTNet, PerceptronLoss, Quadratics
from optimizers import CoordinatewiseLSTM, NonFiniteError, NormalizedLSTM, RNNProp

numba_lstm = pytest.importorskip("gradbuffer.kernels.numba_lstm", reason="numba is not installed", exc_type=ImportError)
numba_tape = pytest.importorskip("gradbuffer.kernels.numba_tape", exc_type=ImportError)
from gradbuffer.kernels.numba_threads import threads_here  # noqa: E402


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "numba")


@pytest.fixture
def small_mnist(tmp_path):
    """Images of 36 pixels: more than a tile is wide, and not a multiple of that."""
    return write_mnist(tmp_path / "mnist", side=6)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def networks(root, functions, dtype=torch.float64, hidden=(20,), batch=16, **options):
    """(batch, coordinates, theta) of networks away from their start."""
    batch = MNISTNet(hidden, batch_size=batch, root=root, dtype=dtype, **options).sample(functions, seeded())
    coordinates = Coordinates(batch.params)
    return batch, coordinates, coordinates.join(batch.params) + 0.1 * torch.randn(sum(coordinates.sizes), dtype=dtype)


def close(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * (1 + other.norm())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
@pytest.mark.parametrize(
    "hidden, batch, side",
    [((20,), 128, None), ((), 16, 3), ((7, 5), 1, None), ((3,), 17, 2), ((33, 17, 2), 300, 3), ((1,), 15, 1)],
)
@pytest.mark.parametrize("functions", [1, 3])
def test_losses_and_gradients_are_the_plain_ones(
    small_mnist, dtype, tolerance, activation, hidden, batch, side, functions
):
    given, coordinates, theta = networks(small_mnist, functions, dtype, hidden, batch, activation=activation, side=side)
    before = theta.clone()
    losses, gradient = given.loss.with_vector_gradient(theta, coordinates.shapes, 5)
    expected, gradients = given.loss.with_gradient(coordinates.split(theta), 5)
    found = coordinates.split(gradient)
    close([losses, *found.values()], [expected, *(gradients[name] for name in found)], tolerance)
    assert torch.equal(theta, before)


def test_threads_share_the_networks(small_mnist, threads_as_before):
    given, coordinates, theta = networks(small_mnist, 5)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(coordinates.losses_and_gradient(given.loss, theta, 3))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(small_mnist, activation, value):
    given, coordinates, theta = networks(small_mnist, 3, activation=activation)
    theta[sum(coordinates.sizes[:3]) + 10] = value  # the second network's bias of a class
    losses, gradient = given.loss.with_vector_gradient(theta, coordinates.shapes, 0)
    assert losses.isfinite().tolist() == [True, False, True]
    assert not coordinates.split(gradient)["bias1"][1].isfinite().all()
    with pytest.raises(NonFiniteError):
        net = CoordinatewiseLSTM().double()
        meta_gradient(net, given, coordinates.split(theta), net.init_state(len(theta)), unroll=2)


def test_other_layouts_and_precisions_are_not_compiled(small_mnist):
    given, coordinates, theta = networks(small_mnist, 2)
    turned = dict(reversed(coordinates.shapes.items()))
    assert given.loss.with_vector_gradient(theta, turned, 0) is None
    assert given.loss.with_vector_gradient(theta.float(), coordinates.shapes, 0) is None
    other = given.loss.of(given.loss.tensors(4))  # minibatches that nobody can choose
    assert other.with_vector_gradient(theta, coordinates.shapes, 0) is None
    close(
        coordinates.losses_and_gradient(other, theta, 0), coordinates.losses_and_gradient(given.loss, theta, 4), 1e-12
    )
    split = coordinates.split(theta)
    there = {name: split[name] for name in turned}
    turned = Coordinates(there)
    losses, gradient = turned.losses_and_gradient(given.loss, turned.join(there), 0)
    expected = given.loss.with_gradient(split, 0)
    close([losses, *turned.split(gradient).values()], [expected[0], *(expected[1][name] for name in there)], 1e-12)


def record(net, loss, *rest):
    return net.record(as_loss(loss), *rest)


def stepwise(net, loss, *rest):
    """`record` of a loss that does not say that it is a perceptron's."""
    return record(net, lambda params, step: loss(params, step), *rest)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("updates", [1, 2, 7])
@pytest.mark.parametrize(
    "net", [CoordinatewiseLSTM(), CoordinatewiseLSTM(5, 3, "log_sign", output_scale=0.1), RNNProp(3)]
)
@pytest.mark.parametrize("functions, threads", [(1, 1), (3, 1), (2, 2)])
def test_windows_equal_single_steps(small_mnist, dtype, tolerance, updates, net, functions, threads, threads_as_before):
    """The RNNProp and two threads go step by step here too, the former with the plain optimizee's losses."""
    net = net.to(dtype)
    batch, coordinates, theta = networks(small_mnist, functions, dtype, (3,), 20, side=3)
    state = tuple(torch.rand(part.shape, dtype=dtype) for part in net.init_state(len(theta)))
    kept, adjoint = [part.clone() for part in (theta, *state)], torch.randn(updates, len(theta), dtype=dtype)
    torch.set_num_threads(threads)
    with torch.no_grad():
        given = coordinates, theta, state, 3, updates
        expected, plain = stepwise(net, batch.loss, *given, False), record(net, batch.loss, *given, False)
        *found, tape, _ = record(net, batch.loss, *given, True)
    close(tensors_in(found), tensors_in(expected[:4]), tolerance)
    close(tensors_in(plain[:4]), tensors_in(expected[:4]), tolerance)
    assert all(map(torch.equal, kept, (theta, *state)))
    with_tape, without = (net.replay(found[1][:-1], state, adjoint, **more) for more in (dict(tape=tape), {}))
    close(list(with_tape.values()), list(without.values()), tolerance)


def test_a_gradient_that_is_not_finite(small_mnist):
    net = CoordinatewiseLSTM().double()
    batch, coordinates, theta = networks(small_mnist, 1)
    theta[-1] = math.nan
    with torch.no_grad(), pytest.raises(NonFiniteError, match="grad must be finite, but holds"):
        record(net, batch.loss, coordinates, theta, net.init_state(len(theta)), 0, 2, False)


# Windows of some functions after the others ------------------------------------------------------------------------------


def problems(root):
    return {
        "networks": MNISTNet((3,), batch_size=8, root=root, side=3, dtype=torch.float64),
        "quadratics": Quadratics(7, torch.float64),
    }


@pytest.mark.parametrize("problem", ["networks", "quadratics"])
@pytest.mark.parametrize("net", [CoordinatewiseLSTM(5, 2, "log_sign", output_scale=0.1), RNNProp(5), NormalizedLSTM(5)])
@pytest.mark.parametrize("threads, functions", [(1, 5), (2, 5), (2, 2)])
@pytest.mark.parametrize("objective", ["sum", "log"])
def test_parts_are_the_whole(small_mnist, problem, net, threads, functions, objective, monkeypatch, threads_as_before):
    net, batch = net.double(), problems(small_mnist)[problem].sample(functions, seeded())
    start = meta_gradient(
        net, batch, batch.params, net.init_state(sum(map(torch.numel, batch.params.values()))), unroll=3
    )[1]
    given = tensors_in([start.params, start.state])
    before = [tensor.clone() for tensor in given]
    torch.set_num_threads(threads)

    def window():
        return meta_gradient(net, batch, start.params, start.state, step=3, unroll=6, objective=objective)

    grads, info = window()
    size = sum(map(torch.numel, batch.params.values())) // functions
    monkeypatch.setattr(
        numba_tape, "TAPE_BYTES", 2 * size * net.num_layers * 5 * (4 * 6 + 2) * 8
    )  # of two functions' gates and states
    spans, in_parts = [], numba_lstm.NumbaLSTM.in_parts
    monkeypatch.setattr(
        numba_lstm.NumbaLSTM,
        "in_parts",
        lambda self, work, *rest: in_parts(
            self, lambda *span: spans.append((*span, threads_here())) or work(*span), *rest
        ),
    )
    parted, parted_info = window()
    expected = {(1, 5): [(0, 1), (1, 3), (3, 5)], (2, 5): [(0, 1), (1, 2), (2, 3), (3, 5)], (2, 2): [(0, 2)]}
    assert sorted(spans) == [(*span, 2 if threads == functions else 1) for span in expected[threads, functions]]
    close([parted[name] for name in grads], list(grads.values()), 1e-12)
    close(tensors_in(list(parted_info)), tensors_in(list(info)), 1e-12)
    assert all(map(torch.equal, before, given))
    assert threads_here() == threads


@pytest.mark.parametrize(
    "functions, size, steps, threads, expected",
    [
        (8, 1000, 20, 1, 1),
        (8, 16000, 20, 1, 8),
        (8, 16000, 20, 2, 8),
        (8, 8000, 20, 1, 4),
        (8, 8000, 20, 2, 4),
        (7, 16000, 20, 2, 7),
        (3, 16000, 20, 2, 3),
        (1, 16000, 20, 2, 1),
        (1, 16000, 20, 1, 1),
        (8, 16000, 40, 1, 8),  # the upper layer's gates of one
        (8, 16000, 100, 1, 1),
        (2, 16000, 20, 8, 1),
        (5, 16000, 20, 4, 1),
        (8, 16000, 20, 4, 8),
        (16, 16000, 20, 16, 1),
    ],
)  # too little room for each thread
def test_how_many_parts(functions, size, steps, threads, expected, monkeypatch):
    kernels = CoordinatewiseLSTM().kernels()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(numba_tape, "TAPE_BYTES", 210 << 20)
    parts = kernels.in_parts(lambda first, last: (first, last), functions, size, steps)
    assert len(parts) == expected
    assert [number for first, last in parts for number in range(first, last)] == list(range(functions))


def test_windows_of_several_threads_keep_their_tapes(monkeypatch, threads_as_before):
    kernels, both = CoordinatewiseLSTM().kernels(), threading.Barrier(2)
    torch.set_num_threads(2)
    monkeypatch.setattr(numba_tape.GateTape, "spare", [])
    monkeypatch.setattr(numba_tape, "TAPE_BYTES", 30 * 2 * 20 * (4 * 20 + 2) * 4 * 2)

    def work(first, last):
        tape = kernels.tape(30 * (last - first), 20)
        assert tape.shares.all()
        memory = tape.memory.ctypes.data
        both.wait(timeout=60)
        tape.release()
        return memory

    first = kernels.in_parts(work, 4, 30, 20)
    assert len(set(first)) == 2 == len(numba_tape.GateTape.spare)
    assert set(kernels.in_parts(work, 4, 30, 20)) == set(first)


def test_a_failure_in_one_part(monkeypatch, threads_as_before):
    net, batch = CoordinatewiseLSTM(), Quadratics(30).sample(4, seeded())
    state, broken = net.init_state(120), {"theta": batch.params["theta"].clone()}
    broken["theta"][3, 0] = math.inf
    expected = meta_gradient(net, batch, batch.params, state)[0]
    torch.set_num_threads(2)
    monkeypatch.setattr(numba_tape, "TAPE_BYTES", 30 * 2 * 20 * (4 * 20 + 2) * 4 * 2)
    with pytest.raises(NonFiniteError):
        meta_gradient(net, batch, broken, state)
    found = meta_gradient(net, batch, batch.params, state)[0]
    close(list(found.values()), list(expected.values()), 1e-5)


def test_a_loss_that_was_replaced_is_not_taken_in_parts(small_mnist, monkeypatch):
    """The meta-batch's own `part` would not know of it."""
    monkeypatch.setattr(numba_tape, "TAPE_BYTES", 1 << 16)
    net, batch = CoordinatewiseLSTM(5).double(), problems(small_mnist)["networks"].sample(3, seeded())
    state = net.init_state(sum(map(torch.numel, batch.params.values())))

    def with_decay(params, step):
        return batch.loss(params, step) + sum(tensor.flatten(1).square().sum(1) for tensor in params.values())

    changed = batch._replace(loss=with_decay)
    found, expected = (
        meta_gradient(net, changed, batch.params, state, unroll=4, method=method)[0]
        for method in ("replay", "autograd")
    )
    close(list(found.values()), list(expected.values()), 1e-10)


def test_parts_of_losses(small_mnist):
    batch, coordinates, theta = networks(small_mnist, 4)
    split = coordinates.split(theta)
    own = {name: tensor[1:3] for name, tensor in split.items()}
    for loss in (batch.loss, batch.loss.of(batch.loss.tensors(2)), PerceptronLoss(batch.loss.minibatch, "sigmoid")):
        torch.testing.assert_close(loss.part(1, 3)(own, 2), loss(split, 2)[1:3])
        torch.testing.assert_close(loss.part(0, 3).part(1, 3)(own, 2), loss(split, 2)[1:3])
    quadratics = Quadratics(3).sample(4).loss
    points = torch.randn(4, 3)
    torch.testing.assert_close(quadratics.part(1, 3)({"theta": points[1:3]}, 0), quadratics({"theta": points}, 0)[1:3])


def test_coordinates_of_a_part():
    params = {"a": torch.arange(12.0).view(3, 2, 2), "b": torch.arange(12.0, 15.0).view(3, 1)}
    coordinates = Coordinates(params)
    part, spans = coordinates.part(1, 3)
    theta = coordinates.join(params)
    own = part.split(torch.cat([theta[start:stop] for start, stop in spans]))
    assert part.functions == 2 and all(torch.equal(own[name], params[name][1:3]) for name in params)
    assert coordinates.functions == 3  # which stays as it was


def test_minibatches_do_not_mind_other_threads():
    class Disturbed(Minibatches):
        """Another thread asks for another chunk each time that this one has drawn its own."""

        drawn = property(
            lambda self: self.others, lambda self, value: self.__dict__.update(others=(99, torch.zeros(32, 2, 4)))
        )

    plain, disturbed = (kind(5, (2, 4), 1000, torch.device("cpu")) for kind in (Minibatches, Disturbed))
    assert all(torch.equal(plain(step), disturbed(step)) for step in (0, 31, 32, 3))
