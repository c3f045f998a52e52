"""The example notebooks, executed from their own folder at the smoke scale."""

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_art, write_cifar10

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {  # at smoke scale, and committed
    "cifar10.ipynb": (9, 8),  # two are of its meta-trainings, of which the committed run makes one
    "general_optimizer.ipynb": (3, 3),
    "global_averaging.ipynb": (3, 3),
    "maml_sinusoids.ipynb": (2, 2),
    "neural_art.ipynb": (5, 5),
    "reweight_examples.ipynb": (2, 2),
}


@pytest.fixture(scope="session")
def small_cifar_root(tmp_path_factory):
    """A CIFAR-10 of small images, since to decode the real one takes longer than the whole notebook."""
    return str(write_cifar10(tmp_path_factory.mktemp("cifar"), train=24, test=4))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """`L2O_DATA` where it is set; else scikit-learn's digits, written in MNIST's file format, and small images."""
    if os.environ.get("L2O_DATA"):
        return os.environ["L2O_DATA"]
    from sklearn.datasets import load_digits

    digits = load_digits()
    root = write_art(tmp_path_factory.mktemp("data"), side=32)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.kron(digits.images * 15, np.ones((1, 3, 3)))  # 8 × 8 -> 24 × 24, and a border: MNIST's 28 × 28
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    for split, part in (("train", slice(0, 1400)), ("t10k", slice(1400, None))):
        for name, array in (("images-idx3", images[part]), ("labels-idx1", digits.target[part].astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return str(root)


def test_all_examples_are_here():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.ipynb")) == sorted(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_notebook_runs_at_smoke_scale(name, data_root, small_cifar_root, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="jupyter is not installed")
    from nbclient import NotebookClient

    monkeypatch.setenv("L2O_SCALE", "smoke")
    monkeypatch.setenv("L2O_DATA", small_cifar_root if name == "cifar10.ipynb" else data_root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for left in (ROOT / "examples" / "checkpoints").glob("*_smoke.*"):  # of an earlier test, perhaps of other settings
        left.unlink()
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any("Warning" in output.get("text", "") for output in outputs)
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == FIGURES[name][0]
    assert re.search(r"\(smoke( scale)?\)", "".join(c.source for c in notebook.cells).replace("{scale}", "smoke"))


@pytest.mark.parametrize("name", FIGURES)
def test_notebook_is_committed_with_the_outputs_of_a_full_run(name):
    nbformat = pytest.importorskip("nbformat", reason="jupyter is not installed")
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[name][1]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(str(ROOT) in str(output) or "/home/" in str(output) for output in outputs), "a machine's path"
