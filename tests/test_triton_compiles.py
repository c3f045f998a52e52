"""The LSTM's Triton kernels compiled for cards that are not here: they must keep to their registers and their shared memory.

A kernel that spills its registers is several times slower, and one that asks for more shared memory than a card has does not run. Needs
triton and its assembler, and no device.
"""

import functools
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

from gradbuffer.kernels import triton_lstm, triton_weights

triton = pytest.importorskip("triton", reason="needs triton: pip install triton")

from gradbuffer.kernels import triton_group, triton_kernels, triton_replay  # noqa: E402

SHARED = {80: 163, 86: 99, 90: 227}  # kB that a program may have, by compute capability
SPILLED = {"step": 100, "group": 100, "replay": 1200, "weight": 64}  # bytes of a thread, at most
INTEGERS = ("start", "width", "N", "T", "apart", "adjoint_apart", "stride", "new_stride", "count")
OTHERS = {"pointers": "*i64", "owners": "*i32", "starts": "*i32", "sizes": "*i32", "flags": "*i32"}


@functools.cache
def assembler():
    """Triton's own tool that tells what a compiled kernel takes, or None."""
    found = list(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    return found[0] if found else None


def compiled(work, capability, tmp_path):
    """(bytes spilled by a thread, kB of shared memory) of a kernel of two layers of 20 units in float32."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton_kernels.INTERPRETED:
        pytest.skip("the interpreter does not compile")
    kernel = {
        "step": triton_kernels.step_kernel,
        "group": triton_group.group_kernel,
        "replay": triton_replay.replay_kernel,
        "weight": triton_replay.weight_kernel,
    }[work]
    sizes, _, _ = triton_weights.layout(2, 20, 2, torch.device("cpu"))
    block = {"replay": triton_lstm.REPLAY_BLOCK, "weight": triton_lstm.WEIGHT_BLOCK}.get(work, {})
    constants = sizes | dict(
        BLOCK=block.get(torch.float32, triton_lstm.STEP_BLOCK), LOG_SIGN=10.0, SHARPEST=math.exp(10), PRECISION="tf32",
        PTX=True, DECAYED=False, SQUASH=False, PULL_INPUTS=False, ENDS=False, COUNT=2, GATES=128, ROWS=sizes["FIRST"],
    )  # fmt: skip
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else "i32" if name in INTEGERS else OTHERS.get(name, "*fp32")
        for name in names
    }
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if str(signature[name]).startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs=aligned,
    )
    options = dict(num_warps=4, num_stages=1) | (
        {"maxnreg": triton_lstm.STEP_REGISTERS} if work in ("step", "group") and capability >= 90 else {}
    )
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(result.asm["cubin"])
    told = subprocess.run([assembler(), "-res-usage", path], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1]), result.metadata.shared / 1024


@pytest.mark.skipif(assembler() is None, reason="this triton has no cuobjdump")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("work", SPILLED)
def test_kernels_keep_to_what_a_card_has(work, capability, tmp_path):
    spilled, shared = compiled(work, capability, tmp_path)
    assert shared <= SHARED[capability] and spilled <= SPILLED[work]
