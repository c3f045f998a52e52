"""The published benchmark: their networks in ours, their convolutional network, and the command on generated data."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_mnist

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import published

    return published


def write_arrays(path, inputs, **more):
    draw = np.random.default_rng(0).normal
    arrays = {f"lstm_{layer}.b_gates": draw(size=80) for layer in (1, 2)}
    arrays |= {"lstm_1.w_gates": draw(size=(inputs + 20, 80)), "lstm_2.w_gates": draw(size=(40, 80))}
    arrays |= {"linear.w": draw(size=(20, 1)), "linear.b": draw(size=1), **more}
    np.savez(path, **{name: array.astype(np.float32) for name, array in arrays.items()})
    return arrays


def lstm(arrays, layer, x, h, c):
    """One step of one of their layers, in numpy."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    gates = np.concatenate([x, h]) @ arrays[f"lstm_{layer}.w_gates"] + arrays[f"lstm_{layer}.b_gates"]
    i, g, f, o = np.split(gates, 4)
    c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


@pytest.mark.parametrize("name", ["dm_of_someone", "rnnprop_of_someone"])
def test_their_arrays_compute_what_theirs_do(published, name, tmp_path):
    projection = {}
    if name.startswith("rnnprop"):
        projection = {"input_projection.w": np.ones((2, 20)) * [[0.5], [-2]], "input_projection.b": np.ones(20) * 0.1}
    arrays = write_arrays(tmp_path / f"{name}.npz", 20 if projection else 2, **projection)
    net, state = published.published_optimizer(tmp_path / f"{name}.npz"), [(np.zeros(20), np.zeros(20))] * 2
    learned, mean, square = net.init_state(1), 0.0, 0.0
    for t, grad in enumerate((0.3, -0.002, 0.0, 5.0)):
        x = np.array([np.log(abs(grad) + 1e-30) / 5, np.sign(grad)])
        if abs(grad) < np.exp(-5):
            x = np.array([-1, np.exp(5) * grad])
        if projection:
            mean, square = 0.95 * mean + 0.05 * grad, 0.95 * square + 0.05 * grad**2
            corrected = np.array([mean, grad / (1 / (1 - 0.95 ** (t + 1)))]) / (1 - 0.95 ** (t + 1))
            x = corrected / (np.sqrt(square / (1 - 0.95 ** (t + 1))) + 1e-8)
            x = x @ arrays["input_projection.w"] + arrays["input_projection.b"]
            x = np.where(x > 0, x, np.exp(x) - 1)
        for layer in (0, 1):
            state[layer] = lstm(arrays, layer + 1, x, *state[layer])
            x = state[layer][0]
        output = (x @ arrays["linear.w"] + arrays["linear.b"])[0]
        with torch.no_grad():
            update, learned = net(torch.tensor([grad]), learned)
        assert update.item() == pytest.approx(0.01 * (np.tanh(output) if projection else output), rel=1e-4, abs=1e-7)


def test_their_convolutional_network(published):
    """Against `torch.nn`, of one of two functions; and its shapes on both data sets' images."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 1, 28, 28, generator=generator), torch.arange(40) % 10
    problem = published.SmallConvolutions(images, labels, 1, "generated")
    batch = problem.sample(2, generator)
    assert batch.params["fc.weight"].shape == (2, 512, 10) and 0.009 < batch.params["fc.weight"].std() < 0.011
    params = {name: 10 * value[1] for name, value in batch.params.items()}
    net = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 16, 3), torch.nn.BatchNorm2d(16, eps=1e-3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(16, 32, 5), torch.nn.BatchNorm2d(32, eps=1e-3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Flatten(), torch.nn.Linear(512, 10), torch.nn.ReLU()),
    )
    with torch.no_grad():
        for own, name in zip(net.parameters(), problem.shapes):
            own.copy_(params[name].T if name == "fc.weight" else params[name])
    x, truth = batch.loss.minibatch(7)
    expected = torch.nn.functional.cross_entropy(net(x[1]), truth[1])
    found = batch.loss({name: 10 * value for name, value in batch.params.items()}, 7)
    torch.testing.assert_close(found[1], expected)
    strided = published.SmallConvolutions(torch.zeros(4, 3, 32, 32), labels[:4], 2, "generated")
    assert strided.shapes["fc.weight"] == (32, 10)


def test_the_command_prints_a_table(published, tmp_path, monkeypatch, capsys):
    write_arrays(tmp_path / "dm.npz", 2)
    monkeypatch.setattr(published, "BASELINES", {})  # the search for their rates is another's test
    command = "published.py --nets mnist_long --annealed --steps 120 100 --functions 2 --published".split()
    command += [str(tmp_path), "--data", str(write_mnist(tmp_path / "data")), "--only"]
    monkeypatch.setattr(sys, "argv", [*command, "dm"])
    published.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| optimizer | sum of 100 | 100 | 120 |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| ours: mnist_long", "| dm", "| Adam, 0.001 as theirs"]
    assert all(float(cell.split(" ± ")[0]) > 0 for row in rows[2:] for cell in row.split(" | ")[1:])
    monkeypatch.setattr(sys, "argv", [*command, "other"])
    with pytest.raises(SystemExit):
        published.main()
    assert f"{tmp_path} has no other" in capsys.readouterr().err


def test_annealed_optimizers_have_a_table_of_their_own(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "RATES_TRIED", 1)
    command = "published.py --nets --steps 100 --functions 1 --tuning-functions 1 --data".split()
    monkeypatch.setattr(sys, "argv", [*command, str(write_mnist(tmp_path / "data"))])
    published.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| optimizer | 100 |" and len(rows) == 6
    names = [row.split(" | ")[0] for row in rows[2:]]
    assert names == ["| ours: general", "| the start of general", "| AdamW", "| NAG"]
    losses = [float(row.split(" | ")[1].split(" at ")[0]) for row in rows[2:]]
    assert all(0 < loss < 2.31 for loss in losses) and losses[0] < losses[1]
    with pytest.raises(ValueError, match="--annealed must name optimizers that take a rate, got mnist"):
        published.annealed(["mnist"])
