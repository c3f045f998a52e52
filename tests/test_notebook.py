"""Grad_buffer.ipynb: runs top to bottom at smoke scale, starts from shipped weights where it is told to, and is committed
with the outputs of a paper run."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from matplotlib import pyplot as plt
from nbclient import NotebookClient

import optimizers
from optimizers import CoordinatewiseLSTM, load_optimizer, pretrained_optimizers

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "Grad_buffer.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook):
    return "\n".join(
        output.get("text", "")
        + str(output.get("data", {}).get("text/plain", ""))
        + str(output.get("data", {}).get("text/markdown", ""))
        for output in outputs(notebook)
    )


def execute(*names, namespace):
    """Cells of the notebook, in this process."""
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
    for name in names:
        exec(compile(cells[f"cell-{name}"], f"cell-{name}", "exec"), namespace)


def test_runs_top_to_bottom(tmp_path, monkeypatch, small_mnist):
    monkeypatch.setenv("L2O_SCALE", "smoke")
    monkeypatch.delenv("L2O_START", raising=False)
    monkeypatch.setenv("L2O_DATA", str(small_mnist))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    figures = sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert figures == 13 and "scale 'smoke'" in text_of(notebook) and "shipped" not in text_of(notebook)
    tables = re.findall(r"\| LSTM[^|]*\| [\d.]+ ± [\d.]+ \|", text_of(notebook))
    assert text_of(notebook).count("sum over the first 20 steps") == 6 and "loss at step 39" in text_of(notebook)
    assert len(tables) == 12  # two optimizers on quadratics, on MNIST for short and long runs, and on three transfers
    sizes = re.findall(r"^\| \d × \d+(?: \| [\d.]+ ± [\d.]+){6} \|$", text_of(notebook), re.M)
    assert len(sizes) == 4  # one and two layers of two sizes, for two learned optimizers and four baselines
    runs = ("mnist_from_nag", "mnist", "quadratics_odd", "quadratics")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(
        f"{run}_smoke.{kind}" for run in runs for kind in ("run", "safetensors")
    )


def test_is_committed_with_the_outputs_of_a_paper_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # one run, top to bottom
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert "scale 'paper'" in text_of(notebook) and "MNIST not found" not in text_of(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 13


def test_defines_no_logic():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not re.search(r"^(def|class) ", cell.source, re.M)


@pytest.mark.parametrize("variable", ["L2O_SCALE", "L2O_START"])
def test_unknown_setting_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, "huge")
    choices = {"L2O_SCALE": "smoke', 'quick', 'paper", "L2O_START": "train', 'shipped"}[variable]
    with pytest.raises(ValueError, match=rf"{variable} must be one of \['{choices}'\], got 'huge'"):
        execute("02", "03", "04", namespace={})


@pytest.mark.parametrize("missing", [None, "quadratics_odd"])
def test_starts_from_shipped_weights(tmp_path, monkeypatch, capsys, small_mnist, missing):
    """All cells that meta-train, and the first race on MNIST without its baselines."""
    shutil.copytree(optimizers.PRETRAINED, tmp_path / "pretrained", ignore=shutil.ignore_patterns(f"{missing}.*"))
    monkeypatch.setattr(optimizers, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setenv("L2O_START", "shipped")
    monkeypatch.setenv("L2O_SCALE", "smoke")
    monkeypatch.setenv("L2O_DATA", str(small_mnist))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", plt.close)  # as in a notebook: what is shown does not stay open
    drawn, figure = [], plt.figure
    monkeypatch.setattr(plt, "figure", lambda *args, **options: drawn.append(figure(*args, **options)) or drawn[-1])

    space = {}
    execute("02", "03", "04", "12", "14", namespace=space)
    on_quadratics = space["nets"]
    execute("20", "24", namespace=space)
    trained = [missing] if missing else []
    assert len(drawn) == len(trained)  # one history for each that was trained here
    runs = {
        "quadratics": ("quadratics", on_quadratics, "LSTM", CoordinatewiseLSTM()),
        "quadratics_odd": ("quadratics", on_quadratics, "LSTM, odd, exact", CoordinatewiseLSTM(odd=True)),
        "mnist": ("mnist", space["nets"], "LSTM", space["untrained"]),
        "mnist_from_nag": ("mnist", space["nets"], "LSTM from NAG", space["untrained"]),
    }
    said = capsys.readouterr().out
    assert said.count("No meta-training here, so no curves of it.") == len(runs) - len(trained)
    for run, (problem, nets, name, same_kind) in runs.items():
        loaded = f"{name} (shipped)" in nets
        assert loaded == (run != missing) == (name not in nets)
        assert f"start 'shipped': {run} is {'loaded, not' if loaded else 'trained: pretrained/ has no'}" in said
        if loaded:
            net, notes = load_optimizer(run), pretrained_optimizers()[run]
            assert all(map(torch.equal, net.parameters(), nets[f"{name} (shipped)"].parameters()))
            assert net.config == same_kind.config and notes["problem"] == space[problem].name
            _, at_this_one = said.split(f"{name}: pretrained/{run}.safetensors\n")
            for key in ("command", "problem", "result", "validation"):
                assert f"  {key}: {notes[key]}\n" in at_this_one
    written = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert written == [f"{run}_smoke.{kind}" for run in trained for kind in ("run", "safetensors")]

    monkeypatch.setattr(plt, "show", lambda: None)
    execute("26", namespace=space | {"tuned": {}})
    legend = [text.get_text() for text in plt.gca().get_legend().get_texts()]
    plt.close("all")
    assert legend == ["LSTM (shipped)", "LSTM from NAG (shipped)", "its start, untrained"]
