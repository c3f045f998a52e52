"""The wheel: what it holds, and that it works from anywhere, beside a user's own files."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOORS = {
    "gradbuffer",
    "meta_module.py",
    "meta_plots.py",
    "meta_training.py",
    "optimizees.py",
    "optimizers.py",
    "resnet_meta.py",
}
TAKEN = ("gradbuffer", "pyproject.toml", "README.md", "LICENSE", "requirements.txt")
MINE = """
import checkpoints, comparison, optimizers  # the user's own, beside this script
from meta_module import MetaLinear
from meta_training import evaluate, meta_train
from gradbuffer.nets.torch_optim import LearnedOptimizer
assert checkpoints.mine and comparison.mine and optimizers.mine
print(MetaLinear(2, 1), meta_train.__name__, LearnedOptimizer.__name__)
"""
SHIPPED = """
from meta_training import evaluate
from optimizees import Quadratics
from optimizers import load_optimizer, pretrained_optimizers
losses = evaluate(load_optimizer("quadratics"), Quadratics(), steps=50, num_functions=4)
assert losses[:, -1].mean() < 0.2 * losses[:, 0].mean(), losses.mean(0)
print(sorted(pretrained_optimizers()))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install .` puts into site-packages."""
    pytest.importorskip("setuptools", minversion="70.1", reason="builds the wheel without a network")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "project").mkdir()
    for path in [*ROOT.glob("*.py"), *map(ROOT.joinpath, TAKEN)]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / "project" / path.name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", folder / "project", "--no-deps", "--no-build-isolation", "-w", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", wheel, "--no-deps", "--no-index", "--target", folder / "site"], check=True)
    return folder / "site"


def run(installed, folder, *command):
    """Run a program in a folder, with the installed library and the packages of this environment, and nothing of the clone."""
    paths = os.pathsep.join(map(str, (installed, sysconfig.get_paths()["purelib"])))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_seven_names(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin", "__pycache__"}
    assert names == DOORS


def test_trained_optimizers_come_with_it(installed, tmp_path):
    (tmp_path / "script.py").write_text(SHIPPED)
    shipped = sorted(path.stem for path in (ROOT / "gradbuffer" / "pretrained").glob("*.safetensors"))
    assert run(installed, tmp_path, sys.executable, "script.py").strip() == str(shipped)


def test_files_of_the_users_own_do_no_harm(installed, tmp_path):
    for name in ("checkpoints", "comparison", "optimizers"):
        (tmp_path / f"{name}.py").write_text("mine = True")
    (tmp_path / "script.py").write_text(MINE)
    assert "MetaLinear(in_features=2" in run(installed, tmp_path, sys.executable, "script.py")


def test_the_console_script(installed, tmp_path):
    (script,) = (installed / "bin").glob("gradbuffer*")
    printed = run(
        installed,
        tmp_path,
        sys.executable,
        script,
        "evaluate",
        "quadratics",
        "--functions",
        "4",
        "--steps",
        "20",
        "--device",
        "cpu",
        "--figure",
        "curves.png",  # drawn in a style that comes with it
    )
    assert "| quadratics | " in printed and (tmp_path / "curves.png").exists()


def test_packages_are_all_listed():
    """A folder of the package that pyproject.toml forgets would be missing from the wheel."""
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "gradbuffer").rglob("__init__.py")}
    assert set(listed) == there


def test_the_package_imports_no_door():
    """So a user's own optimizers.py beside his script does no harm. Programs alone do: the command line and the notebook's."""
    doors = {Path(door).stem for door in DOORS} - {"gradbuffer"}
    for path in sorted((ROOT / "gradbuffer").rglob("*.py")):
        if {"command_line", "runs", "experiments.py"} & {*path.parts}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not doors & {name.split(".")[0] for name in names}, path
