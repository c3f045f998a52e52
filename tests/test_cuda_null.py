"""Budgets of the CUDA path, on a device whose kernels never run (see `null_cuda`): launches, waits, captures, devices.

It is built with a C++ compiler for a CUDA build of torch; where one of the two is missing these tests are skipped. They run in
child processes, each for some scenarios of `null_cuda_child`; pytest-xdist's workers share what these find.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import null_cuda
import pytest
from cases import NETWORKS, PROBLEMS

fcntl = pytest.importorskip("fcntl", reason="the null device needs Linux")
CHILD = Path(__file__).with_name("null_cuda_child.py")
STEPS = 20  # of the windows measured
CHILDREN = [  # the scenarios that a child process runs
    ("windows", "optimizer", "training"),
    *((name,) for name in ("uncaptured", "captures", "kernels", "uploads", "public")),
]


@contextlib.contextmanager
def alone(folder, name):
    """What is done by one process at a time."""
    with open(folder / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The null device, built once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "null_cuda"
    folder.mkdir(exist_ok=True)
    built = folder / "built"
    with alone(folder, "library"):
        try:
            if not built.exists():
                built.write_text(str(null_cuda.build(folder)))
        except null_cuda.Missing as reason:
            pytest.skip(f"the null device {reason}")
    return Path(built.read_text())


@pytest.fixture(scope="module")
def found(library):
    """scenario -> dict from name to what was found, each scenario run once."""
    results = {}

    def run(scenario):
        (scenarios,) = (some for some in CHILDREN if scenario in some)
        file = library.parent / f"{scenarios[0]}.json"
        if scenario not in results:
            with alone(library.parent, scenarios[0]):
                if not file.exists():
                    command = [sys.executable, str(CHILD), *scenarios]
                    done = subprocess.run(
                        command, env=null_cuda.environment(library), capture_output=True, text=True, timeout=900
                    )
                    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
                    error = done.stdout[-2000:] + done.stderr[-4000:] if done.returncode else ""
                    file.write_text(json.dumps([lines, error]))
            lines, error = json.loads(file.read_text())
            assert not error, error
            for own in scenarios:
                results[own] = {name: figures for place, name, figures in lines if place == own}
        return results[scenario]

    return run


def total(figures, start):
    return sum(times for what, times in figures["all"].items() if what.startswith(start))


def test_the_device_counts(library):
    """What is counted is what was launched, waited for and captured."""
    code = """
import torch, null_cuda
x = torch.zeros(1000, device="cuda")
torch.cuda.synchronize()
null_cuda.reset()
for _ in range(3):
    x.add_(1)
y = x.clone()
assert x.sum().item() == 0
found = null_cuda.counts()
assert null_cuda.launches(found) == 5 and null_cuda.waits(found) == 1, found
null_cuda.reset()
torch.ones(3).to("cuda")
torch.ones(3).pin_memory().to("cuda", non_blocking=True)
found = null_cuda.counts()
assert null_cuda.waits(found) == 1 and found["copy up, pageable"] == found["copy up, pinned"] == 1, found
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x * 2
null_cuda.reset()
graph.replay()
assert null_cuda.launches(null_cuda.counts()) == 1
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
except Exception:
    assert any(what.startswith("refused") for what in null_cuda.counts())
else:
    raise AssertionError("a wait in a capture was let pass")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=null_cuda.environment(library), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_launches_of_a_window(found):
    """A step of a coordinatewise LSTM, of any kind: at most 15 launches, the window's beginning, end and replay included."""
    launches = {name: figures["launches"] for name, figures in found("windows").items()}
    assert {name: number for name, number in launches.items() if number > 15 * STEPS} == {} and len(launches) == 7


def test_windows_wait_once(found):
    assert {name: figures["waits"] for name, figures in found("windows").items() if figures["waits"] > 1} == {}


def test_a_learned_optimizer_takes_two_launches_a_group(found):
    """On the 62 tensors of ResNet-18, in one group."""
    for name in ("LSTM", "RNNProp", "general_lstm"):
        assert found("optimizer")[name]["launches"] <= 2 and found("optimizer")[name]["waits"] <= 1


@pytest.mark.parametrize("name, most", [("MLP", 9), ("general", 26)])
def test_all_tensors_of_the_small_optimizer_share_launches(found, name, most):
    """On the same tensors; with Newton-Schulz three launches an iteration."""
    assert found("optimizer")[name]["launches"] <= most and found("optimizer")[name]["waits"] <= 1


def test_torch_does_not_cut_into_a_cpus_blocks(found):
    """Without Triton: no more launches for 64,000 coordinates than for a few, a tenth of what blocks of a cache's size took."""
    assert found("kernels")["torch"]["launches"] <= 65 * STEPS


def test_iterations_of_training_wait_once(found):
    assert {name: figures["waits"] for name, figures in found("training").items() if figures["waits"] > 1} == {}
    assert len(found("training")) == 9


def test_windows_are_graphs_by_default(found):
    for name in ("quadratics", "MNIST", "NormalizedLSTM"):
        plain, graph, default = (found("training")[name + end] for end in ("", ", graph", ", by default"))
        assert default == graph and default["launches"] < plain["launches"] / 2


def test_training_goes_on_where_a_window_cannot_be_captured(found):
    run = found("uncaptured")["a network that waits"]
    assert run["iterations"] == 6 and len(run["warnings"]) == 1
    assert run["warnings"][0].startswith("windows are not launched as CUDA graphs: ")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_window_can_be_captured(found, network, problem):
    assert found("captures")[f"{network} on {problem}"] == {}


def test_no_public_function_mixes_devices(found):
    assert {name: figures["error"] for name, figures in found("public").items() if figures} == {}
    assert len(found("public")) > 100


def test_what_is_drawn_comes_without_a_wait_and_data_once(found):
    figures = found("uploads")
    for problem in ("quadratics", "MNIST"):
        assert (
            figures[f"sample {problem}"]["waits"] == 0 and total(figures[f"sample {problem}"], "copy up, pageable") == 0
        )
        assert total(figures[f"sample {problem}"], "copy up, pinned") > 0
    assert figures["data sets"]["before"] == figures["data sets"]["after"] == 1
    assert figures["evaluate MNIST"]["waits"] <= 3


def test_triton_is_the_default_and_torch_says_how_exact(found):
    figures = found("kernels")
    for name in ("explain", "explain general_lstm", "explain RNNProp"):
        text = figures[name]["text"] + "\n"
        assert all(f"{work}: triton\n" in text for work in ("step", "replay"))
        assert name == "explain" or "readings: triton\n" in text
    assert "LearnedOptimizer: triton\n" in figures["explain general"]["text"]
    for tf32, said in ((False, "cuDNN LSTM, exact products"), (True, "cuDNN LSTM, products in TF32 allowed")):
        own = figures[f"TF32 {tf32}"]
        assert total(own, "cuDNN LSTM") == total(own, said) > 0
