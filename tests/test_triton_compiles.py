"""All Triton kernels compiled for cards that are not here: they must keep to their registers and their shared memory.

A kernel that spills its registers is several times slower, and one that asks for more shared memory than a card has does not run. Needs
triton and its assembler, and no device.

    python tests/test_triton_compiles.py [CASE …]

prints what each kernel takes.
"""

import functools
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from gradbuffer.kernels import matrices, triton_lstm, triton_weights

triton = pytest.importorskip("triton", reason="needs triton: pip install triton")

from gradbuffer.kernels import (  # noqa: E402
    triton_averages,
    triton_group,
    triton_kernels,
    triton_losses,
    triton_mlp,
    triton_mlp_kernels,
    triton_orthogonal,
    triton_reader,
    triton_replay,
)

SHARED = {80: 163, 86: 99, 90: 227}  # kB that a program may have, by compute capability
INTEGERS = ("start", "width", "N", "T", "apart", "adjoint_apart", "stride", "new_stride", "count", "first", "watched")
INTEGERS += ("averages_stride", "new_averages_stride", "batch")
TYPES = {"pointers": "*i64", "owners": "*i32", "starts": "*i32", "sizes": "*i32", "flags": "*i32", "labels": "*i64"}
IN_MLP = {"tiles": "*i32", "forms": "*i64", "lines": "*i64", "blocks": "*i64", "spans": "*i64"}
ROUNDED = dict.fromkeys(("factors", "next_factors", "grams", "powers"), "*fp16")
IN_NEWTON_SCHULZ = {"tiles": "*i64", "forms": "*i64", "owners": "*i64", **ROUNDED}
LSTM = dict(PRECISION="tf32", PTX=True, DECAYED=False, num_warps=4, num_stages=1)
STEP = LSTM | dict(BLOCK=triton_lstm.STEP_BLOCK, bound=True)


def sizes_of(inputs):
    return triton_weights.layout(inputs, 20, 2, torch.device("cpu"))[0]


SIGNS = sizes_of(2) | dict(LOG_SIGN=10.0, SHARPEST=math.exp(10))
RNNPROP = sizes_of(20) | dict(ROWS=16, BETAS=1, GRADIENT=1, TIMED=False, LAYER=True)
NORMALIZED = sizes_of(5) | dict(ROWS=16, BETAS=3, GRADIENT=0, TIMED=True, LAYER=False)
REPLAY = LSTM | SIGNS | dict(SQUASH=False, PULL_INPUTS=False, ENDS=False)
REPLAY |= dict(BLOCK=triton_lstm.REPLAY_BLOCK[torch.float32])
WEIGHT = LSTM | SIGNS | dict(COUNT=2, GATES=128, ROWS=SIGNS["FIRST"], BLOCK=triton_lstm.WEIGHT_BLOCK[torch.float32])
READ = LSTM | dict(BLOCK=triton_reader.READ_BLOCK)
LOSS = dict(KIND=0, BLOCK=triton_losses.COLUMNS)
MLP = dict(types=IN_MLP, num_warps=triton_mlp.WARPS, **triton_mlp.TILE)
LINES = dict(types=IN_MLP, UNITS=8, BLOCK=triton_mlp_kernels.LINES)
NEWTON_SCHULZ = dict(types=IN_NEWTON_SCHULZ, PRECISION="ieee", HIGH=triton_orthogonal.HIGH, WIDE=triton_orthogonal.WIDE)
NEWTON_SCHULZ |= dict(DEEP=triton_orthogonal.DEEP[torch.float16], num_stages=triton_orthogonal.STAGES[torch.float16])
EXACT = dict(types=IN_NEWTON_SCHULZ | dict.fromkeys(ROUNDED, "*fp32"), PRECISION="tf32x3")
EXACT |= dict(DEEP=triton_orthogonal.DEEP[torch.float32], num_stages=triton_orthogonal.STAGES[torch.float32])
CASES = {  # name -> kernel, bytes that a thread spills at most, constants and options
    "step": (triton_kernels.step_kernel, 100, STEP | SIGNS),
    "step, RNNProp": (triton_averages.averages_step_kernel, 160, STEP | RNNPROP),
    "step, NormalizedLSTM": (triton_averages.averages_step_kernel, 160, STEP | NORMALIZED),
    "look": (triton_group.look_kernel, 0, dict(DECAYED=True, BLOCK=triton_group.LOOK_BLOCK)),
    "group": (triton_group.group_kernel, 100, STEP | SIGNS),
    "group, RNNProp": (triton_averages.averages_group_kernel, 160, STEP | RNNPROP),
    "group, NormalizedLSTM": (triton_averages.averages_group_kernel, 160, STEP | NORMALIZED),
    "replay": (triton_replay.replay_kernel, 1200, REPLAY),
    "weight": (triton_replay.weight_kernel, 64, WEIGHT),
    "read, RNNProp": (triton_averages.read_kernel, 0, READ | RNNPROP),
    "read, NormalizedLSTM": (triton_averages.read_kernel, 0, READ | NORMALIZED),
    "layer, RNNProp": (triton_averages.layer_kernel, 0, READ | RNNPROP),
    "activate": (triton_losses.activate, 0, LOSS),
    "pull back": (triton_losses.pull_back, 0, LOSS),
    "cross-entropy": (triton_losses.cross_entropy, 0, LOSS | dict(CLASSES=10, ROWS=16)),
    "MLP, look": (triton_mlp_kernels.look_kernel, 0, dict(types=IN_MLP, BLOCK=triton_mlp.LOOK_BLOCK)),
    "MLP, read": (triton_mlp_kernels.read_kernel, 0, MLP),
    "MLP, line": (triton_mlp_kernels.line_kernel, 32, LINES | dict(CHUNK=triton_mlp.CHUNK)),
    "MLP, factor": (triton_mlp_kernels.factor_kernel, 0, MLP),
    "MLP, gather": (
        triton_mlp_kernels.gather_kernel,
        0,
        dict(types=IN_MLP, UNITS=8, PADDED=16, CONTEXT=matrices.CONTEXT_UNITS, CHUNK=triton_mlp.MANY, num_warps=8),
    ),
    "MLP, spread": (triton_mlp_kernels.spread_kernel, 0, LINES | dict(num_warps=1)),
    "MLP, forward": (
        triton_mlp_kernels.forward_kernel,
        0,
        MLP | dict(UNITS=8, SECOND=8, BLOCK=triton_mlp_kernels.LINES, num_warps=triton_mlp.FORWARD_WARPS),
    ),
    "MLP, total": (triton_mlp_kernels.total_kernel, 0, dict(types=IN_MLP, BLOCK=1024)),
    "MLP, move": (triton_mlp_kernels.move_kernel, 0, MLP),
    "Newton-Schulz, scale": (triton_orthogonal.scale_kernel, 0, NEWTON_SCHULZ | dict(num_stages=3)),
    "Newton-Schulz, gram": (triton_orthogonal.gram_kernel, 0, NEWTON_SCHULZ),
    "Newton-Schulz, power": (triton_orthogonal.power_kernel, 0, NEWTON_SCHULZ | dict(THIRD=-4.775, FIFTH=2.0315)),
    "Newton-Schulz, apply": (triton_orthogonal.apply_kernel, 0, NEWTON_SCHULZ | dict(FIRST=3.4445)),
    "Newton-Schulz, apply, exact": (triton_orthogonal.apply_kernel, 64, NEWTON_SCHULZ | dict(FIRST=3.4445) | EXACT),
}


@functools.cache
def assembler():
    """Triton's own tool that tells what a compiled kernel takes, or None."""
    found = list(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    return found[0] if found else None


def compiled(name, capability):
    """(registers of a thread, bytes that it spills, kB of shared memory) of a kernel in float32, at the sizes that are launched."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, _, given = CASES[name]
    names, types = kernel.arg_names, TYPES | given.get("types", {})
    signature = {
        each: "constexpr" if each in given else "i32" if each in INTEGERS else types.get(each, "*fp32")
        for each in names
    }
    aligned = {(k,): [["tt.divisibility", 16]] for k, each in enumerate(names) if signature[each].startswith("*")}
    constants = {(names.index(each),): value for each, value in given.items() if each in names}
    options = {each: given[each] for each in ("num_warps", "num_stages") if each in given}
    if given.get("bound") and capability >= 90:
        options["maxnreg"] = triton_lstm.STEP_REGISTERS
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        told = subprocess.run([assembler(), "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()
    return int(registers), int(stack), result.metadata.shared / 1024


@pytest.mark.skipif(triton_kernels.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.skipif(assembler() is None, reason="this triton has no cuobjdump")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_to_what_a_card_has(name, capability):
    _, spilled, shared = compiled(name, capability)
    assert shared <= SHARED[capability] and spilled <= CASES[name][1]


def test_all_kernels_are_compiled():
    """Those that are launched: others are parts of them."""
    kernels = Path(triton_lstm.__file__).parent.glob("triton_*.py")
    launched = set().union(*(re.findall(r"(\w+)\[\(.*,\)\]\(", path.read_text()) for path in kernels)) - {"kernel"}
    assert launched <= {kernel.__name__ for kernel, *_ in CASES.values()} and len(launched) >= 20


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        for capability in SHARED:
            start = time.perf_counter()
            registers, spilled, shared = compiled(case, capability)
            took = time.perf_counter() - start
            print(
                f"sm_{capability} {case}: {registers} registers, {spilled} B spilled, {shared:.1f} kB shared, {took:.1f} s",
                flush=True,
            )
