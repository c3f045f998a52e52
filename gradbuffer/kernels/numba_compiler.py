"""How loops are compiled by numba, and kept from one process to the next."""

import hashlib
from pathlib import Path

import numba

__all__ = ["compiled", "digest", "in_order", "sources"]


def sources():
    """The files that compiled code may come from."""
    return sorted(file for kind in ("llvm_*.py", "numba_*.py") for file in Path(__file__).parent.glob(kind))


def digest(files):
    """What tells the contents of files apart."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compiler(*allowed, version=digest(sources())):
    """`numba.njit` that lets LLVM change sums so, and compiles anew when a source has changed.

    numba takes what it has compiled before from `__pycache__` while the function's own file has its date: so the name it
    is kept by says what was in all of them. Nothing is allocated and no references are counted (`_nrt`), which for every
    slice would cost an atomic operation or two.
    """

    def compile(function):
        function.__qualname__ += f"-{version}"
        return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=set(allowed), _nrt=False)(function)

    return compile


# Sums may be taken in another order, which lets them be vectorized; infinities and NaNs go through as usual.
compiled = compiler("contract", "reassoc", "nsz", "arcp")
in_order = compiler("contract", "nsz")  # not in another order: `cell_units` counts on it
