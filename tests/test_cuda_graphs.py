"""Captured windows. Without a GPU a graph is played back by `recorded`, which keeps what a CUDA graph keeps: the
operations and the memory that they read and write, and nothing of the Python between them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradbuffer.checks import NonFiniteError, check_finite, values_unchecked
from gradbuffer.contracts import as_rule
from gradbuffer.data.cifar10 import generated_images
from gradbuffer.nests import map_tensors, tensors_in
from gradbuffer.training.cuda_graphs import CapturedWindow
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates
from meta_training import meta_train
from optimizees import CIFAR10Net, ConvexTerms, MetaBatch, Mirrored, MNISTNet, Quadratics, RandomScaling
from optimizers import CoordinatewiseLSTM, MLPOptimizer, RNNProp


class Recorder(TorchDispatchMode):
    """Writes down every operation, with the tensors that it was given and that it returned."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.operations.append((function, arguments, keywords or {}, result))
        return result

    def play(self):
        with torch.no_grad():
            for function, arguments, keywords, result in self.operations:
                for old, new in zip(tensors_in([result]), tensors_in([function(*arguments, **keywords)])):
                    if new.data_ptr() != old.data_ptr():  # new memory: to where it was the first time
                        old.copy_(new)


def recorded(work):
    recorder = Recorder()
    with recorder:
        result = work()
    return recorder.play, result


@pytest.fixture
def plain(monkeypatch):
    """The kernels of plain torch, all of whose operations `Recorder` sees."""
    monkeypatch.setenv("L2O_KERNELS", "torch")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def perturb(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


CASES = {
    "quadratics": (lambda root: Quadratics(dim=4, dtype=torch.float64), lambda: CoordinatewiseLSTM(hidden_size=5)),
    "one": (lambda root: Quadratics(dim=4, dtype=torch.float64), lambda: CoordinatewiseLSTM(hidden_size=5)),
    "odd": (lambda root: Quadratics(dim=4, dtype=torch.float64), lambda: CoordinatewiseLSTM(hidden_size=5, odd=True)),
    "mnist": (
        lambda root: MNISTNet((3,), batch_size=5, root=root, dtype=torch.float64),
        lambda: CoordinatewiseLSTM(hidden_size=5, preprocess="log_sign", output_scale=0.1),
    ),
    "rnnprop": (
        lambda root: MNISTNet((3,), "relu", batch_size=5, root=root, dtype=torch.float64),
        lambda: RNNProp(hidden_size=5),
    ),
    "time": (
        lambda root: Quadratics(dim=4, dtype=torch.float64),
        lambda: MLPOptimizer((4,), "small_fc", lr=0.001).double(),
    ),
    "varied": (
        lambda root: Mirrored(ConvexTerms(RandomScaling(Quadratics(dim=4, dtype=torch.float64), 1.0), dim=3)),
        lambda: CoordinatewiseLSTM(hidden_size=5),
    ),
    "convolutions": (
        lambda root: CIFAR10Net(
            4, channels=(2,), fc_size=3, root=generated_images(40, 20, side=4), dtype=torch.float64
        ),
        lambda: CoordinatewiseLSTM(hidden_size=5, preprocess="log_sign", output_scale=0.1),
    ),
}


def start_of(net, batch):
    coordinates = Coordinates(batch.params)
    return as_rule(net, coordinates).init_state(sum(coordinates.sizes))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", ["sum", "log"])
def test_captured_window_equals_meta_gradient(plain, tiny_mnist, case, objective):
    """Other functions, other weights, later windows: what was captured knows of none of them."""
    problem, net = CASES[case][0](tiny_mnist), CASES[case][1]().double()
    first = problem.sample(1 if case == "one" else 4, generator(0))
    window = CapturedWindow(net, first, first.params, start_of(net, first), 4, objective, record=recorded)
    for seed in (1, 2):
        perturb(net)
        batch = problem.sample(1 if case == "one" else 4, generator(seed))
        params, state = batch.params, start_of(net, batch)
        for step in (0, 4, 8):
            assert window.fits(batch, params, state, step)
            before = map_tensors(torch.clone, (params, state))
            grads, info = window(batch, params, state, step)
            expected, expected_info = meta_gradient(net, batch, params, state, step, 4, objective=objective)
            torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(tuple(info), tuple(expected_info), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(tensors_in(before), tensors_in((params, state)), rtol=0, atol=0)
            params, state = info.params, info.state


def test_results_stay_as_they_are(plain):
    """A later launch overwrites nothing of an earlier one's results."""
    problem, net = Quadratics(dim=3), CoordinatewiseLSTM(hidden_size=4)
    batch, other = problem.sample(2, generator(0)), problem.sample(2, generator(1))
    window = CapturedWindow(net, batch, batch.params, net.init_state(6), 2, record=recorded)
    results = window(batch, batch.params, net.init_state(6))
    kept = map_tensors(torch.clone, results)
    window(other, other.params, net.init_state(6))
    torch.testing.assert_close(tensors_in(results), tensors_in(kept), rtol=0, atol=0)


# they bring a number from Python to the device, and the device to a halt
FROM_PYTHON = [(torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (torch.Tensor, "new_tensor")]


class OneDevice(TorchDispatchMode):
    """Lets no operation read or write two devices."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        devices = {tensor.device.type for tensor in tensors_in([list(arguments), dict(keywords or {}), result])}
        assert len(devices) <= 1, (function, devices)
        return result


@pytest.mark.parametrize("case", CASES)
def test_nothing_comes_from_another_device(monkeypatch, tiny_mnist, case):
    """On tensors without values: a window copies nothing to its device and waits for no value, as a graph demands."""
    problem, net = CASES[case][0](tiny_mnist).to("meta"), CASES[case][1]().double().to("meta")
    batch = problem.sample(1 if case == "one" else 4, generator(0))

    def watched(work):
        work()  # as before a capture: constants are brought once
        with OneDevice(), monkeypatch.context() as context:
            for place, name in FROM_PYTHON:
                context.setattr(place, name, None)
            return None, work()

    window = CapturedWindow(net, batch, batch.params, start_of(net, batch), 4, record=watched)
    assert all(grad.is_meta for grad in window.results.grads.values())
    with OneDevice(), pytest.raises(AssertionError, match="copy"):  # both would be noticed
        torch.zeros(3).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        check_finite(torch.zeros(3, device="meta"), "x")


@pytest.fixture
def small():
    net, batch = CoordinatewiseLSTM(hidden_size=4), Quadratics(dim=3).sample(2)
    return net, batch, batch.params, net.init_state(6)


def test_other_shapes_are_refused(plain, small):
    net, batch, params, state = small
    window, other = CapturedWindow(*small, 2, record=recorded), Quadratics(dim=3).sample(3)
    assert not window.fits(other, other.params, net.init_state(9))
    with pytest.raises(ValueError, match="the window captured has shapes"):
        window(other, other.params, net.init_state(9))


def test_not_finite(plain, small):
    net, batch, params, state = small
    window = CapturedWindow(*small, 2, record=recorded)
    with pytest.raises(NonFiniteError, match="the loss of function 1 at step 7 is nan"):
        window(batch, {"theta": torch.tensor([[0.0] * 3, [float("nan")] * 3])}, state, 7)
    window(*small[1:])


def test_values_unchecked():
    with values_unchecked():
        check_finite(torch.tensor(torch.nan), "x")
    with pytest.raises(NonFiniteError):
        check_finite(torch.tensor(torch.nan), "x")


def test_errors(small):
    net, batch, params, state = small
    with pytest.raises(RuntimeError, match="needs a CUDA device, the window lies on cpu"):
        CapturedWindow(*small)
    with pytest.raises(ValueError, match='objective must be "sum" or "log"'):
        CapturedWindow(*small, objective="product")
    with pytest.raises(ValueError, match="an object with tensors"):
        CapturedWindow(net, MetaBatch(params, lambda params, step: 0), params, state)
    with pytest.raises(ValueError, match='cuda_graph=True needs method="replay"'):
        meta_train(net, Quadratics(), second_order=True, cuda_graph=True)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        meta_train(net, Quadratics(), iterations=1, cuda_graph=True, progress=False, device="cpu")


def test_meta_training(plain, tiny_mnist, monkeypatch):
    """The same run, with minibatches of several sizes: a window is captured anew where it has another shape."""
    captures = []

    def capture(*arguments):
        captures.append(arguments)
        return CapturedWindow(*arguments, record=recorded)

    monkeypatch.setattr("gradbuffer.training.run.CapturedWindow", capture)
    problem, weights, histories = MNISTNet((), batch_size=(2, 9), root=tiny_mnist, dtype=torch.float64), [], []
    for graph in (False, True):
        torch.manual_seed(3)
        net = CoordinatewiseLSTM(hidden_size=3, preprocess="log_sign", output_scale=0.1).double()
        histories.append(
            meta_train(
                net,
                problem,
                steps=4,
                unroll=2,
                meta_batch=2,
                iterations=12,
                validation_functions=2,
                cuda_graph=graph,
                progress=False,
            )
        )
        weights.append(net.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)
    assert histories[0].meta_loss == pytest.approx(histories[1].meta_loss, rel=1e-10)
    assert 1 < len(captures) <= 6


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_on_cuda(monkeypatch, tiny_mnist, case, kernels):
    monkeypatch.setenv("L2O_KERNELS", kernels)
    problem, net = CASES[case][0](tiny_mnist).to("cuda"), CASES[case][1]().double().cuda()
    first = problem.sample(1 if case == "one" else 4, generator(0))
    N = sum(tensor.numel() for tensor in first.params.values())
    window = CapturedWindow(net, first, first.params, net.init_state(N), 4)
    for seed in (1, 2):
        perturb(net)
        batch = problem.sample(1 if case == "one" else 4, generator(seed))
        grads, info = window(batch, batch.params, net.init_state(N), 4)
        expected, expected_info = meta_gradient(net, batch, batch.params, net.init_state(N), 4, 4)
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tuple(info), tuple(expected_info), rtol=1e-10, atol=1e-12)
