"""The README and the pages of docs/: every snippet runs, every link leads somewhere, every page is in the site, which builds strictly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_art

import optimizers

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = {f"{page.stem}-{number}": code for page in PAGES
            for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M), 1)}


@pytest.mark.parametrize("name", SNIPPETS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_snippets_run(name, tmp_path, monkeypatch):
    """Each on its own, as pasted into a fresh session."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimizers, "LEARNED_OPTIMIZERS", dict(optimizers.LEARNED_OPTIMIZERS))
    if not os.environ.get("L2O_DATA"):
        monkeypatch.setenv("L2O_DATA", str(write_art(tmp_path / "images", side=32)))
    exec(compile(SNIPPETS[name], f"snippet {name}", "exec"), {"__name__": "__main__"})


def test_snippets_show_the_public_face():
    text = "".join(SNIPPETS.values())
    words = ("to_meta", "update_params", "resnet18", "functional_call", "meta_train", "LearnedOptimizer", "PerKind", "CIFAR10Net", "NeuralArt",
             "evaluate_lbfgs", "Mixture", "register_optimizer", "Replay", "PES", "Teacher", "Curriculum", "Validation", "Checkpoint", "Loss", "Rule")
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_pages_name_are_there(page):
    """Paths in code: of the package, its benchmarks, examples and docs."""
    names = re.findall(r"\b((?:gradbuffer|benchmarks|examples|docs)/[\w./]+\.(?:py|ipynb|png|md))\b", page.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    pytest.importorskip("mkdocstrings_handlers.python", reason="pip install '.[docs]'")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / f"{page.stem}.html").is_file()
        assert f": {page.name}\n" in (ROOT / "mkdocs.yml").read_text()
    api = (tmp_path / "site" / "api.html").read_text()
    assert "θ_{t+1} = θ_t + g_t" in api and api.count("doc-heading") > 50
