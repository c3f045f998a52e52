"""What was wrong on CUDA and shows without a device: devices' names, draws, constants, marks, sizes of blocks."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import PROBLEMS, make_net
from conftest import write_art

from gradbuffer.contracts import as_loss, device_of, on_device
from gradbuffer.data import mnist
from gradbuffer.devices import constant, whole_device
from gradbuffer.evaluation import drawing
from gradbuffer.evaluation.drawing import draw_batches, join_batches, join_for
from gradbuffer.kernels.interface import LSTMKernels
from gradbuffer.nests import tensors_in
from gradbuffer.problems.neural_art import NeuralArt
from gradbuffer.problems.tasks import TASKS
from gradbuffer.training.options import RandomHorizon, training_of
from gradbuffer.training.run import Run
from gradbuffer.unrolling import Coordinates
from meta_training import evaluate, meta_gradient, tune_baseline
from optimizees import Mirrored, Mixture, MNISTNet, Quadratics, RandomScaling
from optimizers import CoordinatewiseLSTM, NormalizedLSTM, PerKind, RNNProp

TESTS = Path(__file__).resolve().parent


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Numbers on the device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NormalizedLSTM", "LSTM, log_sign, odd"])
def test_numbers_are_brought_to_a_device_once(name, monkeypatch):
    """A second window makes no tensor of numbers of Python's, which a graph could not hold and for which a device waits."""
    net, batch = make_net(name), Quadratics(4, torch.float64).sample(2, seeded())
    state = net.init_state(8)
    first, _ = meta_gradient(net, batch, batch.params, state, unroll=2)
    for place, maker in ((torch, "tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(place, maker, None)
    again, _ = meta_gradient(net, batch, batch.params, state, unroll=2)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_constants():
    place = torch.device("cpu")
    with torch.inference_mode():
        found = constant((0.5, 2.0), place, torch.float64)
    assert found.tolist() == [0.5, 2.0] and found.dtype == torch.float64 and not found.is_inference()
    assert constant((0.5, 2.0), place, torch.float64) is found is not constant((0.5, 2.0), place, torch.float32)


# Networks in evaluation mode ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [CoordinatewiseLSTM, RNNProp, NormalizedLSTM, lambda: PerKind({"theta": CoordinatewiseLSTM(3)})]
)
def test_cudnn_can_differentiate_after_eval(make):
    """cuDNN refuses to in evaluation mode; the mode makes no difference otherwise."""
    net = make().eval()
    lstms = [module for module in net.modules() if isinstance(module, torch.nn.LSTM)]
    assert lstms and all(lstm.training for lstm in lstms) and not net.training and net.train().training


# Draws ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def default_device():
    """Another default device, as by torch.set_default_device("cuda"): tensors without a place of their own have no values."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def drawn(problem, steps=(0, 40)):
    batch = problem.sample(2, seeded(1))
    for own in batch if isinstance(batch, list) else [batch]:
        yield from own.params.values()
        yield from (as_loss(own.loss)(own.params, step) for step in steps)


@pytest.mark.parametrize("name", [*PROBLEMS, "mixture", "sizes", "art"])
def test_problems_draw_on_the_cpu(name, tmp_path, small_mnist, request):
    """The same functions and minibatches, whatever the default device."""

    def make():
        if name == "art":
            root = tmp_path if (tmp_path / "neural_art").exists() else write_art(tmp_path)
            return NeuralArt(size=16, weights="random", root=root, split="validation", start="noise")
        if name == "mixture":
            return RandomScaling(Mixture([Quadratics(2), Quadratics(3)], [1.0, 2.0], 1), signs=True)
        if name == "sizes":
            return MNISTNet((2,), batch_size=(2, 9), root=small_mnist, init_std=0.1, side=4)
        return PROBLEMS[name](small_mnist)

    expected = list(drawn(make()))
    mnist._load.cache_clear()  # what is loaded once is loaded anew
    request.getfixturevalue("default_device")
    found = list(drawn(make()))
    assert all(tensor.device.type == "cpu" for tensor in found) and all(map(torch.equal, found, expected))


def test_other_draws_are_on_the_cpu(request):
    coordinates = Coordinates({"a": torch.zeros(2, 3000)})
    task = TASKS["mlp"] if "mlp" in TASKS else next(iter(TASKS.values()))

    def draws():
        return [
            *coordinates.subset(0.5, seeded()),
            torch.tensor(RandomHorizon(1, 50)(0, seeded()), device="cpu"),
            *tensors_in([task.draw(seeded())]),
        ]

    expected = draws()
    request.getfixturevalue("default_device")
    assert all(map(torch.equal, draws(), expected))
    assert all(parameter.device.type == "cpu" for parameter in task.make_model().parameters())


# One device, one name -------------------------------------------------------------------------------------------------


def test_devices_have_one_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert whole_device("cuda") == torch.device("cuda:1") == device_of(CoordinatewiseLSTM(), "cuda")
    assert whole_device("cuda:0") == torch.device("cuda:0") and whole_device("cpu") == torch.device("cpu")
    problem = Quadratics(device="cuda")
    assert problem.device == torch.device("cuda:1")
    assert on_device(problem, torch.device("cuda")) is problem is on_device(problem, torch.device("cuda:1"))
    own = SimpleNamespace(sample=None, device=torch.device("cuda"))
    own.sample, own.to = (lambda *_: None), (lambda _: pytest.fail("it is there already"))
    assert on_device(own, torch.device("cuda:1")).adopted is own


# Blocks and memory ----------------------------------------------------------------------------------------------------


def test_blocks_of_the_plain_replay_shrink_with_its_steps(monkeypatch):
    """What cuDNN keeps of a block, eight numbers of each unit and step and more, stays below an eighth of the card."""
    total = 80 << 30
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    kernels = LSTMKernels(torch.nn.LSTM(2, 20, 2), torch.zeros(20), torch.zeros(()))
    assert kernels.replay_block(20) == 1 << 16  # on a CPU what it always was
    kernels.output_weight = SimpleNamespace(device=torch.device("cuda:0"), element_size=lambda: 4)
    blocks = {steps: kernels.replay_block(steps) for steps in (1, 20, 200, 1000)}
    assert all(8 * 20 * 2 * 4 * steps * block < total / 8 for steps, block in blocks.items())
    assert blocks[20] > 200_000 and blocks[1000] > 4096


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_mirrored_functions_are_evaluated_and_tuned_for():
    problem = Mirrored(Mirrored(Quadratics(3)))
    assert problem.multiple_of == 4 and RandomScaling(problem).multiple_of == 4
    losses = evaluate(CoordinatewiseLSTM(3), problem, steps=3, num_functions=8)
    assert losses.shape == (8, 3) and torch.equal(losses[:4, 0], losses[4:, 0])
    assert tune_baseline(torch.optim.SGD, problem, lrs=[0.01, 0.02, 0.03], steps=2, num_functions=4).options["lr"] > 0
    with pytest.raises(ValueError, match="num_functions must be a multiple of 4 for Quadratics, .* got 6"):
        evaluate(CoordinatewiseLSTM(3), problem, steps=3, num_functions=6)


def test_mirrored_functions_run_in_groups_of_a_multiple(monkeypatch):
    monkeypatch.setattr(drawing, "FUNCTIONS_AT_ONCE", 7)
    sizes = [len(batch.params["theta"]) for batch in draw_batches(Mirrored(Quadratics(3)), 14, 0, torch.device("cpu"))]
    assert sizes == [6, 6, 2]


@pytest.mark.parametrize("name", PROBLEMS)
def test_joined_functions_are_those_drawn(name, small_mnist, monkeypatch):
    """Elsewhere than on a CPU all run as one computation, the very functions that a CPU runs in groups."""
    monkeypatch.setattr(drawing, "FUNCTIONS_AT_ONCE", 4)
    problem = PROBLEMS[name](small_mnist)
    apart = list(draw_batches(problem, 10, 3, torch.device("cpu")))
    assert [len(batch.params[next(iter(batch.params))]) for batch in apart] == [4, 4, 2]
    whole = join_batches(apart)
    assert {key: len(tensor) for key, tensor in whole.params.items()} == dict.fromkeys(whole.params, 10)
    for step in (0, 33):
        expected = torch.cat([as_loss(batch.loss)(batch.params, step) for batch in apart])
        torch.testing.assert_close(as_loss(whole.loss)(whole.params, step), expected, rtol=1e-12, atol=0)
        found, gradient = Coordinates(whole.params).losses_and_gradient(
            as_loss(whole.loss), Coordinates(whole.params).join(whole.params), step
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        parts = Coordinates(whole.params).split(gradient)
        for key in parts:
            apart_too = [
                Coordinates(batch.params).split(
                    Coordinates(batch.params).losses_and_gradient(
                        as_loss(batch.loss), Coordinates(batch.params).join(batch.params), step
                    )[1]
                )[key]
                for batch in apart
            ]
            torch.testing.assert_close(parts[key], torch.cat(apart_too), rtol=1e-9, atol=1e-14)


def test_functions_are_joined_elsewhere_than_on_a_cpu(monkeypatch):
    monkeypatch.setattr(drawing, "FUNCTIONS_AT_ONCE", 4)
    monkeypatch.setattr(drawing, "COORDINATES_ELSEWHERE", 25)
    for device, sizes in (("cpu", [4, 4, 4]), ("cuda", [8, 4])):
        batches = draw_batches(Quadratics(3), 12, 0, torch.device("cpu"))
        assert [len(batch.params["theta"]) for batch in join_for(torch.device(device), batches)] == sizes
    assert (
        type(join_batches(list(draw_batches(Quadratics(3), 12, 0, torch.device("cpu")))).loss).__name__
        == "QuadraticLoss"
    )


# Marks ----------------------------------------------------------------------------------------------------------------


def test_all_tests_of_a_device_are_marked():
    """They are skipped by their mark; no test looks for the device by itself."""
    here = Path(__file__).name
    asking = [
        path.name
        for path in TESTS.glob("test_*.py")
        if path.name != here and "skipif(not torch.cuda" in path.read_text().replace("\n", "")
    ]
    assert asking == []


COLLECT = """
import importlib.abc, sys, pytest
sys.path.insert(0, sys.argv[1])
from conftest import OPTIONAL

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.exit(pytest.main(["-m", "cuda", "--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts=", sys.argv[1]]))
"""


def test_marked_tests_are_collected_without_optional_packages():
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, str(TESTS)], capture_output=True, text=True, cwd=TESTS.parent, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for name in (
        "test_cuda_graphs",
        "test_lstm_triton",
        "test_optimizers",
        "test_sharing",
        "test_meta_module.py::test_moves",
    ):
        assert name in done.stdout


# The check on a GPU ---------------------------------------------------------------------------------------------------


def test_the_check_on_a_gpu_can_be_rehearsed():
    """`benchmarks/cuda.py` on a CPU: checks pass, times are printed beside their floors, what needs a device says so."""
    command = [sys.executable, str(TESTS.parent / "benchmarks" / "cuda.py"), "--device", "cpu", "--only"]
    done = subprocess.run([*command, "machine", "graphs", "optimizer"], capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("PASS LearnedOptimizer") for line in lines) >= 6
    assert any(line.startswith("NOTE graphs: need") for line in lines)
    assert any(line.startswith("TIME a CPU") and "TB/s" in line for line in lines)
    none_left = subprocess.run([*command, "machine", "--seconds", "1"], capture_output=True, text=True, timeout=600)
    assert none_left.returncode == 1 and "FAIL machine 0: no time left" in none_left.stdout


# One look an iteration ------------------------------------------------------------------------------------------------


class SometimesNaN(Quadratics):
    """Every third meta-batch has a function whose loss is not a number."""

    draws = 0

    def sample(self, meta_batch, generator=None):
        batch = super().sample(meta_batch, generator)
        self.draws += 1
        if self.draws % 3 == 0:
            batch.loss.data.y[1] = torch.nan
        return batch


def test_training_that_looks_late_skips_the_same_windows():
    """As on CUDA: nothing is looked at before the iteration's end, and what was not finite is told then."""
    histories = []
    for late in (False, True):
        torch.manual_seed(0)
        options = dict(steps=4, unroll=2, meta_batch=2, iterations=9, skip_non_finite=3)
        run = Run(CoordinatewiseLSTM(4), SometimesNaN(3), training_of(CoordinatewiseLSTM(4), **options))
        run.looks_late = late
        while run.iteration < 9:
            run.advance()
        histories.append(run.history)
    early, later = histories
    assert [iteration for iteration, _ in early.skipped] == [iteration for iteration, _ in later.skipped] != []
    assert all("the loss of function 1 at step 0 is nan" in cause for _, cause in later.skipped)
    for name in ("meta_loss", "grad_norm", "update_size"):
        assert getattr(early, name) == pytest.approx(getattr(later, name), rel=1e-6, nan_ok=True)
