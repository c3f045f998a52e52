"""What the README promises: its commands stand where they are looked for, its modules import where it says they do.

Its snippets run in `test_docs`.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_two_screens():
    assert len(README.encode()) <= 12_000


def test_two_commands_stand_on_a_line_each():
    setup = r"^python3 -m venv \.venv && \.venv/bin/pip install -q -r requirements\.txt"
    assert len(re.findall(setup + r" && .*--execute .*Grad_buffer\.ipynb$", README, re.M)) == 1
    assert len(re.findall(setup + r" pytest pytest-xdist expecttest && \.venv/bin/python -m pytest -n 2$", README, re.M)) == 1


def test_every_module_is_packaged_and_named():
    packaged = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S).group(1)
    for module in ROOT.glob("*.py"):
        assert f"`{module.name}`" in README or module.name == "hubconf.py"
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


@pytest.mark.parametrize("name", ["optimizers", "gradbuffer.nets.torch_optim", "gradbuffer.nests", "optimizees", "meta_training",
                                  "gradbuffer.data.mnist", "meta_plots", "gradbuffer.training.imitation"])
def test_docstring_examples(name, tmp_path, monkeypatch, small_mnist):
    import doctest
    import importlib

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L2O_DATA", str(small_mnist))
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={**vars(importlib.import_module("optimizees")), "torch": __import__("torch")})
    assert result.failed == 0
    assert result.attempted or name in ("meta_plots",)
