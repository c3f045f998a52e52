"""Where the tests of Triton's kernels run: on a GPU, or all of a file in Triton's interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

from_outside = pytest.mark.skipif(INTERPRETED, reason="in the interpreter already")


def on_device(test):
    """A test that needs a GPU, but in the interpreter."""
    return test if INTERPRETED else pytest.mark.cuda(test)


def check_in_the_interpreter(file, least, skipped=1):
    """At least so many tests of the file pass there, and all run but so many, of which one is the caller."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    here = Path(file).resolve()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", str(here)],
        cwd=here.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped)", run.stdout)}
    assert run.returncode == 0 and counts["passed"] >= least and counts["skipped"] == skipped, run.stdout + run.stderr
