"""A CUDA device whose kernels never run: what counts launches, copies and waits, and what a graph cannot hold, without a GPU.

A child process that preloads it sees torch's real CUDA dispatch, Triton's real compiler and launcher, and real captures, on
tensors in zeroed host memory. So it finds wrong devices, launches, waits of the host and what cannot be captured; it finds no
wrong numbers and no device time. A value read from the device is 0, a truth value True. cuDNN has an LSTM and no
convolutions; there is no cuSOLVER.

    LIBRARY = build(folder)                    # needs g++, nm and a CUDA build of torch; raises Missing elsewhere
    subprocess.run([...], env=environment(LIBRARY))
    counts(), reset()                          # in the child
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RULES = [  # of generated functions: the first pattern that fits says what they do
    # work on the device
    (
        r"cublas(?!Set|Get|Create|Destroy|Lt)|cublasLtMatmul$|cudnn(RNN(Forward|Backward)|Convolution(F|Back)|BatchNorm|Pooling)"
        r"|cudaGraphLaunch$|cudaMemset",
        'null_cuda_count("launch {0}"); return 0;',
    ),
    # waits of the host
    (
        r"cuda(Stream|Device|Event)Synchronize$",
        'int no = null_cuda_refuse("{0}"); if (!no) null_cuda_count("wait {0}"); return no;',
    ),
    (
        r"(cuda(Stream|Event)|cublas\w*|cudnn)Create|cublasLtMatmul\w+Create|cudaGraphInstantiate",
        "*made = calloc(1, 1024); return 0;",
    ),
    (r"", "return 0;"),
]
REAL = r"cuda(GetErrorName|GetErrorString)$|__cuda\w+CallConfiguration$|cu(blas|dnn)\w*(Get\w*Version|String)$|cudnnGetProperty$"
DRIVER = [
    "cuTensorMapEncodeTiled",
    "cuTensorMapEncodeIm2col",
    "cuLinkCreate_v2",
    "cuLinkAddData_v2",
    "cuLinkComplete",
    "cuCtxSetLimit",
]
DRIVER += [
    "cuModuleLoad",
    "cuModuleUnload",
    "cuModuleLoadDataEx",
    "cuFuncSetAttribute",
    "cuFuncSetCacheConfig",
    "cuLaunchKernel",
]
DRIVER += ["cuLaunchCooperativeKernel", "cuOccupancyMaxActiveBlocksPerMultiprocessor"]


class Missing(Exception):
    """What it takes to build the null device is not here."""


def build(folder: Path) -> Path:
    """Compile it for this Python's torch into the folder. Returns the library's path. Raises Missing, with the reason."""
    import torch

    if torch.version.cuda is None:
        raise Missing("needs a CUDA build of torch")
    for tool in ("g++", "nm"):
        if not shutil.which(tool):
            raise Missing(f"needs {tool}")
    includes = header_folders()
    source = folder / "generated.cpp"
    source.write_text(generate(Path(torch.__file__).parent / "lib", (HERE / "null_cuda.cpp").read_text()))
    library = folder / "libcuda.so.1"  # one file for the runtime and the driver: Triton opens it by this name
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", *(f"-I{path}" for path in includes)]
    command += [str(HERE / "null_cuda.cpp"), str(source), "-Wl,-soname,libcuda.so.1", "-ldl", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the null device does not compile:\n{done.stderr[-3000:]}")
    return library


def header_folders():
    """Where CUDA's headers are, of the wheels that torch comes with, and of Triton's for what those lack."""
    found = []
    for name, inner in (
        ("nvidia", "cu13/include"),
        ("nvidia", "cuda_runtime/include"),
        ("triton", "backends/nvidia/include"),
    ):
        spec = importlib.util.find_spec(name)
        found += [Path(place) / inner for place in (spec.submodule_search_locations if spec else ())]
    found = [path for path in found if path.is_dir()]
    for header in ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h"):
        if not any((path / header).exists() for path in found):
            raise Missing(f"needs CUDA's header {header}")
    return found


def generate(libraries: Path, written: str) -> str:
    """The source of all functions that torch's libraries call and nobody has written."""
    wanted = set(DRIVER)
    for library in libraries.glob("*.so"):
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True).stdout
        wanted |= set(re.findall(r" U ((?:__)?(?:cuda|cublas|cudnn)[A-Z]\w*)", listed))
    lines = [
        "#include <stdlib.h>",
        'extern "C" { void null_cuda_count(const char*); int null_cuda_refuse(const char*);',
    ]
    for name in sorted(wanted):
        if not re.match(REAL, name) and not re.search(rf"\b{name}\(", written):
            body = next(body for pattern, body in RULES if re.match(pattern, name))
            lines.append(f"int {name}(void** made) {{ {body.format(name)} }}")
    return "\n".join([*lines, "}"])


def environment(library: Path, **more: str) -> dict[str, str]:
    """The environment of a child that is to see the null device, and our modules."""
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return {**{name: value for name, value in os.environ.items() if name != "L2O_KERNELS"}, **own, **more}


def counts() -> dict[str, int]:
    """In the child: how often what has happened since `reset`."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.null_cuda_report.restype = ctypes.c_char_p
    lines = [line.rsplit("\t", 1) for line in library.null_cuda_report().decode().splitlines()]
    return {what: int(times) for what, times in lines}


def reset() -> None:
    ctypes.CDLL(os.environ["LD_PRELOAD"]).null_cuda_reset()


def launches(found: dict[str, int]) -> int:
    """Kernels, copies on the device and fills: each is a launch, or a node of a graph."""
    return sum(times for what, times in found.items() if what.startswith("launch ") or what == "copy on the device")


def waits(found: dict[str, int]) -> int:
    """How often the host has waited for the device."""
    return sum(times for what, times in found.items() if what.startswith("wait "))


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
