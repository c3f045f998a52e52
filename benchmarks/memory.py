"""The peak memory of a process, for the benchmarks."""

import ctypes
import gc
import resource
import sys

__all__ = ["available_bytes", "peak_megabytes", "reset_peak"]


def peak_megabytes():
    """MB: the most that this process held in memory so far.

    On Linux `ru_maxrss` survives exec, so a small process started by a large one would report its parent's peak; the
    kernel's own account of this process does not.
    """
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            peak = next(line for line in status if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)


def reset_peak():
    """Make what the process holds now its peak, where the kernel allows that (Linux); return `peak_megabytes()`.

    What has been freed goes back to the system first, or it would be used again without being seen.
    """
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # then an earlier peak may hide a part of what comes
    return peak_megabytes()


def available_bytes():
    """Memory that a process could still take without swapping, or infinity where that is not known."""
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except OSError:
        return float("inf")
