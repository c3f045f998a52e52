"""The threads that compiled loops run in, as many as torch has, and the memory that each of them keeps for the next call."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from gradbuffer.kernels.llvm_vectors import LANES

__all__ = ["buffer", "parallel_for", "pieces_of", "shares_of", "threads_here", "windows_at_once", "without_denormals"]

LEAST = 8 * LANES  # columns that are worth a thread


class Here(threading.local):
    """What each thread has of its own: buffers by their names, and whether it is not to take more threads."""

    single_threaded = False

    def __init__(self):
        self.buffers = {}


_thread = Here()
_pool = (None, 0, None)  # process, threads, executor


def pieces_of(length: int, most: int) -> list[tuple[int, int]]:
    """Spans that cover [0, length) in whole tiles, at most about `most` in each, equally many for each thread."""
    if length <= LEAST:
        return [(0, length)]
    threads = threads_here()
    pieces = max(-(-length // most), min(threads, length // LEAST), 1)
    pieces = -(-pieces // threads) * threads if pieces > 1 else 1
    size = -(-length // (pieces * LANES)) * LANES
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def shares_of(count: int) -> list[tuple[int, int]]:
    """Spans that cover [0, count), an equal share for each thread."""
    threads = min(threads_here(), count)
    return [(count * k // threads, count * (k + 1) // threads) for k in range(threads)]


def parallel_for(work: Callable, spans: list[tuple], single_threaded: bool = False) -> list:
    """[work(*span) for span in spans], by several threads. single_threaded: what they call is not to take more threads."""
    if len(spans) == 1 or threads_here() == 1:
        return [work(*span) for span in spans]

    @torch.no_grad()
    def one(span):
        _thread.single_threaded = single_threaded
        try:
            return work(*span)
        finally:
            _thread.single_threaded = False

    return list(pool(threads_here()).map(one, spans))


def threads_here() -> int:
    """How many threads the work of this one may take."""
    return 1 if _thread.single_threaded else torch.get_num_threads()


def windows_at_once() -> int:
    """How many windows run side by side: where each thread has its own, as many as there are threads."""
    return torch.get_num_threads() if _thread.single_threaded else 1


@contextmanager
def without_denormals():
    """In this thread numbers too small for a whole mantissa count as 0: where losses come near 0, they take seven times as long."""
    before = bool(torch.tensor([1e-40], device="cpu") * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def buffer(name: str, count: int, dtype: torch.dtype):
    """This thread's memory of that name, as a numpy array: the last one again if it is large enough."""
    kept = _thread.buffers.get(name)
    if kept is None or len(kept) < count or kept.dtype != dtype:
        _thread.buffers[name] = kept = torch.empty(count, dtype=dtype, device="cpu")  # aligned, as vectors like it
    return kept[:count].numpy()


def pool(threads):
    """The threads, kept from call to call; new ones in a process that was forked, which has inherited none."""
    global _pool
    if _pool[:2] != (os.getpid(), threads):
        _pool = os.getpid(), threads, ThreadPoolExecutor(threads, thread_name_prefix="gradbuffer")
    return _pool[2]
