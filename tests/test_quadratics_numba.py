"""Compiled windows of quadratics against the loop of single steps, and when they are not taken."""

import math

import pytest
import torch

from gradbuffer import unrolling
from gradbuffer.contracts import as_loss
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates
from optimizees import Quadratics
from optimizers import CoordinatewiseLSTM, NonFiniteError, NormalizedLSTM

numba = pytest.importorskip("numba", reason="windows of quadratics are compiled by numba")


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "numba")


def window(net, problem, functions, seed=0):
    """(net, loss, coordinates, theta, state, step, updates, keep) of a window in the middle of an optimization."""
    generator = torch.Generator().manual_seed(seed)
    batch = problem.sample(functions, generator)
    coordinates = Coordinates(batch.params)
    theta = torch.randn(functions * problem.dim, generator=generator, dtype=problem.dtype)
    state = tuple(
        torch.rand(part.shape, generator=generator, dtype=problem.dtype) - 0.5 for part in net.init_state(len(theta))
    )
    return net, batch.loss, coordinates, theta, state, 3, 7, False


def record(net, loss, *rest):
    return net.record(as_loss(loss), *rest)


def stepwise(net, loss, *rest):
    """`record` of a loss that does not say that it is a quadratic."""
    return record(net, lambda params, step: loss(params, step), *rest)


def close(found, expected, tolerance):
    for one, other in zip(found[:3] + found[3], expected[:3] + expected[3]):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * (1 + other.norm())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("dim, functions", [(10, 1), (1, 1), (1, 17), (3, 5), (10, 16), (10, 131), (33, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(preprocess="log_sign", output_scale=0.1),
        dict(hidden_size=3, num_layers=1),
        dict(hidden_size=5, num_layers=3, output_scale=-0.3, preprocess="log_sign", odd=True),
    ],
)
def test_windows_equal_single_steps(dtype, tolerance, dim, functions, options):
    given = window(CoordinatewiseLSTM(**options).to(dtype), Quadratics(dim, dtype), functions)
    theta, state = given[3].clone(), [part.clone() for part in given[4]]
    with torch.no_grad():
        found = record(*given)
        close(found, stepwise(*given), tolerance)
    assert torch.equal(given[3], theta) and all(map(torch.equal, given[4], state))  # what is given is not changed


def test_threads_share_the_functions(monkeypatch, threads_as_before):
    """The same to the last bit, in whatever pieces and by however many threads."""
    given, results = window(CoordinatewiseLSTM(preprocess="log_sign"), Quadratics(7), 300), []
    for threads, chunk in ((1, 10_000_000), (1, 16 * 7), (2, 10_000_000), (2, 16 * 7)):
        torch.set_num_threads(threads)
        monkeypatch.setattr("gradbuffer.kernels.numba_windows.CHUNK", chunk)
        with torch.no_grad():
            found = record(*given)
        results.append([*found[:3], *found[3]])
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(result, results[0]))


@pytest.mark.parametrize("options", [{}, dict(replay_fraction=0.5), dict(objective="log")])
def test_meta_gradients_are_those_of_single_steps(options, monkeypatch):
    problem, net = Quadratics(dtype=torch.float64), CoordinatewiseLSTM().double()
    batch = problem.sample(150, torch.Generator().manual_seed(1))
    monkeypatch.setattr(unrolling, "SMALLEST_SHARE", 10)

    def gradient(batch):
        generator = torch.Generator().manual_seed(2)
        return meta_gradient(net, batch, batch.params, net.init_state(1500), unroll=5, generator=generator, **options)

    found, info = gradient(batch)
    expected, reference = gradient(batch._replace(loss=lambda params, step: batch.loss(params, step)))
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-10 * expected[name].norm()
    torch.testing.assert_close(info.losses, reference.losses, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_not_finite():
    net, loss, coordinates, theta, *rest = window(CoordinatewiseLSTM(), Quadratics(4), 3)
    theta[6] = math.inf
    with torch.no_grad(), pytest.raises(NonFiniteError, match="grad must be finite, but holds .* at coordinate 4"):
        record(net, loss, coordinates, theta, *rest)


class Halved(CoordinatewiseLSTM):
    """A user's own: reads half of each gradient."""

    def read(self, grads, memory):
        return super().read(grads / 2, memory)


@pytest.mark.parametrize("net", [Halved(), NormalizedLSTM()])
def test_other_networks_go_step_by_step(net):
    given = window(net, Quadratics(4), 3)
    with torch.no_grad():
        close(record(*given), stepwise(*given), 1e-5)


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_what_is_not_compiled_is_refused_or_done_as_ever(kernels, monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", kernels)
    given = window(CoordinatewiseLSTM(), Quadratics(4), 3)
    with torch.no_grad():
        close(record(*given), stepwise(*given), 1e-5)
        with pytest.raises(ValueError, match="state's hidden must have shape"):
            record(*given[:4], CoordinatewiseLSTM().init_state(11), *given[5:])
        too_few = Quadratics(4).sample(2).loss
        with pytest.raises(ValueError if kernels == "numba" else RuntimeError, match="for 12 coordinates|size"):
            record(given[0], too_few, *given[2:])
    batch = Quadratics(4, torch.float64).sample(3)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):  # functions of one precision, θ of another
        record(given[0], batch.loss, *given[2:])
