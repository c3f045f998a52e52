"""The benchmark of the meta-update runs, prints numbers in all its columns, and measures what it says."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_mnist

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TABLES = {"case": 2, "LSTM alone, coordinates": 1, "steps, 15,910 coordinates": 1}  # how many of each


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def tables_in(text):
    """The Markdown tables of a text, each a list of rows, its head first."""
    blocks = [block.splitlines() for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M)]
    return [
        [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if "---" not in line]
        for lines in blocks
    ]


def check_numbers(table):
    head, *rows = table
    assert rows
    for row in rows:
        for name, cell in list(zip(head, row, strict=True))[1:]:
            if "two" not in name:  # cores: there are too few coordinates, or cores
                number = float(re.match(r"-?[\d.]+(e[+-]\d+)?", cell.replace(",", ""))[0])
                assert number >= 0 if "MB" in name or "GB" in name else number > 0, name


def test_the_command_prints_numbers_in_all_columns(tmp_path):
    data, plot, peers = write_mnist(tmp_path / "data"), tmp_path / "figure.png", tmp_path / "peers.json"
    entry = {"command": [sys.executable, "-c", "print('took 2.5 ms')"], "pattern": r"took ([\d.]+)", "unit": "ms"}
    peers.write_text(json.dumps({"another": {"mnist x1": entry}}))
    command = [sys.executable, BENCHMARKS / "meta_gradient.py", "--smoke", "--plot", plot, "--peers", peers]
    environment = {**os.environ, "L2O_DATA": str(data)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment).stdout
    tables = tables_in(output)
    assert {name: sum(table[0][0] == name for table in tables) for name in TABLES} == TABLES
    for table in tables:
        check_numbers(table)
    assert dict(zip(*tables[0]))["another, ms"] == "2.50 (2.50)"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_methods_compute_the_same(monkeypatch):
    import meta_gradient as benchmark

    monkeypatch.setenv("L2O_KERNELS", "auto")  # restored after the test
    torch.manual_seed(0)
    window = benchmark.Window("quadratics", 2)
    results = [window.run(name, 3)[0] for name in benchmark.METHODS]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-3, atol=1e-3)


def test_bare_products_are_those_of_the_window(monkeypatch):
    """Count the multiplications: three of W's size for each layer, coordinate and step, and those by its input."""
    import floors

    from optimizers import CoordinatewiseLSTM

    count = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: count.append(a.numel() * b.shape[1]) or product(a, b, out=out))
    floors.bare_products(CoordinatewiseLSTM(hidden_size=5, preprocess="log_sign"), 5000, 3)()
    width = 1667  # 5000 in three blocks
    assert sum(count) == 3 * 3 * width * 20 * (3 * (2 + 5) + 5 + 4 * (5 + 5))


def test_alternate_counts_rounds_and_asks_peers_between_them(monkeypatch):
    import timing
    from timing import Seconds, alternate

    calls = []
    monkeypatch.setattr(timing, "LEAST", 0.0)
    times = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        4,
        {"peer": lambda: calls.append("peer") or 0.5},
        2,
    )
    assert calls == ["a", "b"] * 2 + 2 * (["a", "b"] * 2 + ["peer"])
    assert times["peer"] == Seconds(0.5, 0.5, [0.5] * 2) and 0 < times["a"].minimum <= times["a"].median < 0.5


def test_ratio_is_that_of_the_same_round():
    from timing import Seconds, ratio

    slow_first, even = Seconds(2.0, 1.0, [8.0, 2.0, 1.0]), Seconds(1.0, 0.5, [4.0, 1.0, 0.5])
    assert ratio(slow_first, even) == 2 and ratio(even, slow_first) == 0.5
    with pytest.raises(ValueError):
        ratio(even, Seconds(1.0, 1.0, [1.0]))


def test_alternate_calls_short_functions_several_times_in_a_row(monkeypatch):
    import timing

    calls = []
    monkeypatch.setattr(timing, "LEAST", 0.02)
    times = timing.alternate(
        {"short": lambda: calls.append("s") or time.sleep(0.002), "long": lambda: time.sleep(0.03)}, 1
    )
    assert 3 <= len(calls) <= 12 and 0.002 <= times["short"].median < 0.02 and times["long"].median >= 0.03


def test_peers_that_fail_or_are_misspelled_raise(tmp_path):
    from timing import read_peers

    def peers(**changes):
        entry = {"command": [sys.executable, "-c", "print(3)"], "pattern": "([0-9]+)", "unit": "s"} | changes
        (tmp_path / "peers.json").write_text(json.dumps({"label": {"mnist x1": entry}}))
        return read_peers(tmp_path / "peers.json")["label"]["mnist x1"]

    assert peers()() == 3.0
    for changes in ({"unit": "us"}, {"pattern": "[0-9]"}, {"colour": "red"}):
        with pytest.raises(ValueError, match="label, mnist x1"):
            peers(**changes)
    with pytest.raises(RuntimeError, match="printed no"):
        peers(pattern="took ([0-9]+)")()


def test_peak_memory_can_start_anew():
    """A tensor of 64 MB is in the peak while it lives, and after it is gone, until the peak is reset."""
    import memory

    if sys.platform != "linux":
        pytest.skip("needs Linux's own account of a process")
    start = memory.reset_peak()
    torch.ones(16 << 20).sum()
    assert memory.peak_megabytes() - start > 60
    assert memory.reset_peak() < start + 30


def test_large_optimizee_prints_numbers(monkeypatch, capsys):
    import large_optimizee as large

    monkeypatch.setattr(sys, "argv", ["large_optimizee.py", "--smoke", "--unroll", "2"])
    large.main()
    (table,) = tables_in(capsys.readouterr().out)
    check_numbers(table)


def test_optimizer_step_prints_numbers(monkeypatch, capsys):
    import optimizer_step as benchmark

    parameter = torch.nn.Parameter(torch.randn(3000))
    parameter.grad = torch.ones(3000)
    monkeypatch.setattr(benchmark, "parameters", lambda architecture: [parameter])
    monkeypatch.setattr(benchmark, "peak_memory", lambda *arguments: 1.0)
    monkeypatch.setattr(sys, "argv", ["optimizer_step.py", "--repetitions", "1"])
    start = parameter.detach().clone()
    benchmark.main()
    ((_, *rows),) = tables_in(capsys.readouterr().out)
    assert [row[0] for row in rows][2:] == list(benchmark.OPTIMIZERS)
    assert all(float(row[2]) > 0 for row in rows) and not parameter.equal(start)  # Adam has taken steps


def test_art_tests_prints_what_it_says(monkeypatch, capsys):
    import art_tests as art

    small = {name: (title, {**settings, "size": 16}) for name, (title, settings) in art.TESTS.items()}
    monkeypatch.setattr(art, "TESTS", small)
    monkeypatch.setattr(
        sys, "argv", ["art_tests.py", *"--tests style large --functions 2 --tuning 1 --steps 3".split()]
    )
    art.main()
    (table,) = tables_in(capsys.readouterr().out)
    head, *rows = table
    assert [row[0] for row in rows] == [small[name][0] for name in ("style", "style", "large", "large")]
    for learned, adam in zip(rows[::2], rows[1::2]):
        ours, theirs, difference = (float(cell.split()[0]) for cell in (learned[3], adam[3], adam[4]))
        assert ours > 0 and theirs > 0 and abs(ours - theirs - difference) < 0.02 * (ours + theirs)


def test_art_tests_race_what_has_a_rate(monkeypatch, capsys):
    import art_tests as art

    monkeypatch.setattr(art, "TESTS", {"test": ("small", dict(style="candy", size=16))})
    given = "art_tests.py --tests test --functions 2 --tuning 1 --steps 3 --annealed"
    monkeypatch.setattr(sys, "argv", [*given.split(), "general"])
    art.main()
    ((_, *rows),) = tables_in(capsys.readouterr().out)
    assert [row[2].split(",")[0] for row in rows] == ["general", "its start", "neural_art", "Adam", "NAG"]
    for row in rows[1:]:  # the difference is that of the means
        ours, theirs, difference = (float(cell.split()[0]) for cell in (rows[0][3], row[3], row[4]))
        assert abs(ours - theirs - difference) < 0.02 * (ours + theirs)
    monkeypatch.setattr(sys, "argv", [*given.split(), "mnist"])
    with pytest.raises(ValueError, match="--annealed must name optimizers that take a rate, got mnist"):
        art.main()


def test_network_problem_gives_each_function_its_own_loss():
    import large_optimizee as large

    torch.manual_seed(0)
    network = large.small_network()
    batch = large.NetworkProblem(network, 10, batch_size=4, side=12).sample(2, torch.Generator().manual_seed(0))
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    losses = batch.loss(batch.params, 1)
    assert losses.shape == (2,) and losses[0] != losses[1] and batch.loss(batch.params, 5).equal(losses)
    assert not batch.loss(batch.params, 0).equal(losses)
    assert all(buffer.equal(buffers[name]) for name, buffer in network.named_buffers())
    assert sum(tensor.numel() for tensor in batch.params.values()) == 2 * sum(p.numel() for p in network.parameters())
    params = {name: tensor.clone().requires_grad_() for name, tensor in batch.params.items()}
    grads = torch.autograd.grad(batch.loss(params, 0)[0], list(params.values()))
    assert all(grad[0].any() and not grad[1].any() for name, grad in zip(params, grads) if name != "0.bias")


def test_paired_differences(tmp_path):
    data = write_mnist(tmp_path / "data")
    command = [sys.executable, BENCHMARKS / "paired.py", "mnist", "mnist_from_nag", "--steps", "6", "--functions", "3"]
    environment = {**os.environ, "L2O_DATA": str(data)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment).stdout
    losses, differences = tables_in(output)
    check_numbers(losses)
    assert [row[0] for row in losses] == ["optimizer", "mnist", "mnist_from_nag", "NAG"]
    for place in range(1, 4):
        one, other, difference = (float(row[place].split(" ± ")[0]) for row in (losses[1], losses[2], differences[1]))
        assert difference == pytest.approx(one - other, abs=2e-3 * abs(one))


def test_quadratics_prints_figures_and_paired_differences(monkeypatch, capsys):
    import quadratics as benchmark

    monkeypatch.setattr(sys, "argv", ["quadratics.py", "quadratics_subspace", "--functions", "3", "--steps", "8"])
    benchmark.main()
    text = capsys.readouterr().out
    names = ["quadratics_subspace", "random weights", "coefficients by hand", "NAG", "L-BFGS", "conjugate gradients"]
    for name in names:
        assert len(re.findall(rf"^\| {name}[^|]*\| [-\d]", text, re.M)) == (1 if name == names[0] else 2), name
