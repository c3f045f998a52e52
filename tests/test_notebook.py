"""Grad_buffer.ipynb: runs top to bottom at smoke scale, loads what it is told to, and is committed with the outputs of one run."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from matplotlib import pyplot as plt
from nbclient import NotebookClient

import optimizers
from gradbuffer.experiments import RECIPES, SCALES, choose_scale, train_or_load
from optimizees import Quadratics
from optimizers import CoordinatewiseLSTM, load_optimizer, pretrained_optimizers

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "Grad_buffer.ipynb"
FIGURES = 23  # where everything is trained; one less for each optimizer that is loaded


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook):
    return "\n".join(
        output.get("text", "")
        + str(output.get("data", {}).get("text/plain", ""))
        + str(output.get("data", {}).get("text/markdown", ""))
        for output in outputs(notebook)
    )


def cells():
    return {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"}


def execute(*names, namespace):
    """Cells of the notebook, in this process."""
    for name in names:
        exec(compile(cells()[f"cell-{name}"].source, f"cell-{name}", "exec"), namespace)


@pytest.fixture
def at_smoke_scale(tmp_path, monkeypatch, small_mnist):
    monkeypatch.setenv("L2O_SCALE", "smoke")
    monkeypatch.delenv("L2O_START", raising=False)
    monkeypatch.setenv("L2O_DATA", str(small_mnist))
    monkeypatch.setattr(plt, "show", plt.close)  # as in a notebook: what is shown does not stay open
    monkeypatch.chdir(tmp_path)


def test_runs_top_to_bottom(tmp_path, monkeypatch, at_smoke_scale):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    figures = sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert figures == FIGURES and "scale 'smoke'" in text_of(notebook) and "loaded" not in text_of(notebook)
    assert text_of(notebook).count("by hand, ") == 10  # the meta-gradient's parts
    for line in re.findall("largest difference (.*)", text_of(notebook)):
        assert float(line) < 1e-2, "by hand it is another meta-gradient"
    assert text_of(notebook).count("sum over 20 steps") == 6 and text_of(notebook).count("| loss at step 39 |") == 2
    assert text_of(notebook).count("Learning rates of") == 9
    sizes = re.findall(r"^\| \d × \d+(?: \| (?:[\d.± *]+|\**diverged\**)){7} \|$", text_of(notebook), re.M)
    assert len(sizes) == 4  # one and two layers of two sizes, for three learned optimizers and four baselines
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(
        f"{run}_smoke.{kind}" for run in RECIPES for kind in ("run", "safetensors")
    )


def test_is_committed_with_the_outputs_of_one_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # one run, top to bottom
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert "scale 'quick'" in text_of(notebook) and "MNIST not found" not in text_of(notebook)
    assert all(f"{name}: loaded, not trained here" in text_of(notebook) for name in SCALES["quick"].loaded)
    figures = sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert figures == FIGURES - len(SCALES["quick"].loaded)
    assert "widget" not in json.dumps(outputs(notebook)), "a progress bar that will never move again"
    assert str(ROOT) not in str(notebook) and "/home/" not in str(notebook), "a machine's path"


def test_cells_are_short_and_hold_no_logic():
    for name, cell in cells().items():
        assert not re.search(r"^(def|class) ", cell.source, re.M) or name == "cell-bowls", name
        assert len(cell.source.splitlines()) <= 28, name


@pytest.mark.parametrize("variable", ["L2O_SCALE", "L2O_START"])
def test_unknown_setting_is_named(monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "huge")
    choices = {"L2O_SCALE": "smoke', 'quick', 'paper", "L2O_START": "train', 'shipped"}[variable]
    with pytest.raises(ValueError, match=rf"{variable} must be one of \['{choices}'\], got 'huge'"):
        train_or_load("quadratics", CoordinatewiseLSTM(), Quadratics(), choose_scale(), tmp_path)


@pytest.mark.parametrize("missing", [None, "quadratics_odd"])
def test_loads_what_is_shipped(tmp_path, monkeypatch, capsys, at_smoke_scale, missing):
    """All cells that meta-train, and the ablation without its race."""
    shutil.copytree(optimizers.PRETRAINED, tmp_path / "pretrained", ignore=shutil.ignore_patterns(f"{missing}.*"))
    monkeypatch.setattr(optimizers, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setenv("L2O_START", "shipped")
    space = {}
    execute("imports", "settings", "quadratics", "exact", namespace=space)
    quadratics = {"quadratics": space["paper"], "quadratics_odd": space["exact"]}
    execute("mnist", "mnist-paper", "ablation", namespace=space)
    names = {"mnist_imitated": "imitated", "mnist_learned": "learned", "mnist": "paper", "mnist_from_nag": "from_start"}
    found = quadratics | {name: space[variable] for name, variable in names.items()}
    assert found.keys() == RECIPES.keys()
    said, trained = capsys.readouterr().out, [missing] if missing else []
    for name, net in found.items():
        if name == missing:
            assert f"{name}: trained here, since none is shipped: 4 windows" in said
        else:
            assert f"{name}: loaded, not trained here. Its training: {pretrained_optimizers()[name]['command']}" in said
            assert all(map(torch.equal, net.parameters(), load_optimizer(name).parameters()))
    written = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert written == [f"{run}_smoke.{kind}" for run in trained for kind in ("run", "safetensors")]


def test_a_changed_network_is_trained_and_a_changed_training_begins_anew(capsys, monkeypatch, tmp_path, at_smoke_scale):
    """Whatever a user changes in a cell takes effect, though a shipped network and an older checkpoint are there."""
    monkeypatch.setenv("L2O_START", "shipped")
    net, history = train_or_load("quadratics", CoordinatewiseLSTM(hidden_size=5), Quadratics(), choose_scale())
    assert net.config["hidden_size"] == 5 and len(history.meta_loss) == 10
    assert "quadratics: trained here, since the shipped one has other settings: 10 windows" in capsys.readouterr().out
    rates = []
    for options in (dict(), dict(lr=0.01), dict(iterations=3), dict(second_order=True)):
        net = CoordinatewiseLSTM(hidden_size=7)
        before = [weight.clone() for weight in net.parameters()]
        _, history = train_or_load("quadratics", net, Quadratics(), choose_scale(), **options)
        rates.append(history.lr)
        assert len(history.meta_loss) == options.get("iterations", 10)
        assert not all(map(torch.equal, before, net.parameters()))
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]])
    again, same = train_or_load(
        "quadratics", CoordinatewiseLSTM(hidden_size=7), Quadratics(), choose_scale(), **options
    )
    assert same == history and all(map(torch.equal, again.parameters(), net.parameters()))  # from its checkpoint
    saved = load_optimizer(tmp_path / "checkpoints" / "quadratics_smoke.safetensors")
    assert all(map(torch.equal, saved.parameters(), net.parameters()))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_scale_says_how_to_train_every_optimizer(scale):
    assert scale.training.keys() == RECIPES.keys() and set(scale.loaded) <= set(pretrained_optimizers())
