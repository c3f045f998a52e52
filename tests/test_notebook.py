"""Grad_buffer.ipynb: runs top to bottom at smoke scale, and is committed with the outputs of a paper run."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "Grad_buffer.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook):
    return "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
                     + str(output.get("data", {}).get("text/markdown", "")) for output in outputs(notebook))


def test_runs_top_to_bottom(tmp_path, monkeypatch, small_mnist):
    monkeypatch.setenv("L2O_SCALE", "smoke")
    monkeypatch.setenv("L2O_DATA", str(small_mnist))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path)}}).execute()
    figures = sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert figures == 13 and "scale 'smoke'" in text_of(notebook)
    tables = re.findall(r"\| LSTM[^|]*\| [\d.]+ ± [\d.]+ \|", text_of(notebook))
    assert len(tables) == 12  # two optimizers on quadratics, on MNIST for 100 and 200 steps, and on three transfers
    sizes = re.findall(r"^\| \d × \d+(?: \| [\d.]+ ± [\d.]+){6} \|$", text_of(notebook), re.M)
    assert len(sizes) == 4  # one and two layers of two sizes, for two learned optimizers and four baselines
    runs = ("mnist_from_nag", "mnist", "quadratics_odd", "quadratics")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(
        f"{run}_smoke.{kind}" for run in runs for kind in ("run", "safetensors"))


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


def test_unknown_scale_is_named(monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell.source for cell in notebook.cells if "SCALES = {" in cell.source or "scale = os.environ" in cell.source]
    monkeypatch.setenv("L2O_SCALE", "huge")
    with pytest.raises(ValueError, match="L2O_SCALE must be one of .*'huge'"):
        exec("\n".join(cells), {"os": __import__("os"), "torch": __import__("torch")})
