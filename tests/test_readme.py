"""What the README and the docs promise: their snippets run, their links lead somewhere, the commands are there, the docs build."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_art

import optimizers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.stem} {number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("code", SNIPPETS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_snippets_run(code, tmp_path, monkeypatch):
    """Each block on its own, as pasted into a fresh session."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optimizers.LEARNED_OPTIMIZERS", dict(optimizers.LEARNED_OPTIMIZERS))
    if not os.environ.get("L2O_DATA"):
        monkeypatch.setenv("L2O_DATA", str(write_art(tmp_path / "images", side=32)))
    exec(compile(code, "a snippet", "exec"), {"__name__": "__main__"})


def test_snippets_show_the_public_face():
    text = "".join(snippet.values[0] for snippet in SNIPPETS)
    words = (
        "to_meta update_params resnet18 functional_call meta_train LearnedOptimizer PerKind CIFAR10Net NeuralArt evaluate_lbfgs "
        "Mixture Problem Loss Rule register_optimizer tune_baseline PES Replay Teacher Curriculum Validation Checkpoint"
    )
    assert [word for word in words.split() if word not in text] == []


def test_the_front_page_is_short_and_its_links_lead_somewhere():
    assert len(README.encode()) <= 12_000
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        named = re.findall(
            r"\b((?:gradbuffer|benchmarks|examples|docs)/[\w./]+\.(?:py|ipynb|png|md))\b", page.read_text()
        )
        assert [name for name in named if not (ROOT / name).exists()] == [], page.name


def test_the_docs_build(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in (ROOT / "mkdocs.yml").read_text(), f"{page.name} is not in the site's navigation"
    assert "θ_{t+1} = θ_t + g_t" in (tmp_path / "api.html").read_text(), "underscores became emphasis"


def test_two_commands_stand_on_a_line_each():
    setup = r"^python3 -m venv \.venv && \.venv/bin/pip install -q -r requirements\.txt"
    assert len(re.findall(setup + r" && .*--execute .*Grad_buffer\.ipynb$", README, re.M)) == 1
    assert (
        len(re.findall(setup + r" pytest pytest-xdist expecttest && \.venv/bin/python -m pytest -n 2$", README, re.M))
        == 1
    )


def test_every_module_is_packaged_and_in_the_table():
    packaged = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S).group(1)
    for module in ROOT.glob("*.py"):
        assert f"`{module.name}`" in README.split("| at the root | holds |")[1] or module.name == "hubconf.py"
        assert f'"{module.stem}"' in packaged or module.name == "hubconf.py"


ALONE = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed
import torch
import meta_module, optimizers, optimizees, meta_training
net = optimizers.CoordinatewiseLSTM()
meta_training.meta_train(net, optimizees.Quadratics(), iterations=2, meta_batch=2, progress=False)
meta_module.MetaLinear(2, 1)(torch.ones(1, 2))
assert "matplotlib" not in sys.modules and "sklearn" not in sys.modules
"""


def test_quadratics_work_without_torchvision():
    subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(
    "name",
    [
        "optimizers",
        "gradbuffer.nets.torch_optim",
        "gradbuffer.nests",
        "optimizees",
        "meta_training",
        "gradbuffer.data.mnist",
        "meta_plots",
        "gradbuffer.training.imitation",
    ],
)
def test_docstring_examples(name, tmp_path, monkeypatch, small_mnist):
    import doctest
    import importlib

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L2O_DATA", str(small_mnist))
    module = importlib.import_module(name)
    result = doctest.testmod(
        module, extraglobs={**vars(importlib.import_module("optimizees")), "torch": __import__("torch")}
    )
    assert result.failed == 0
    assert result.attempted or name in ("meta_plots",)
