"""The peak memory of a process, for the benchmarks."""

import resource
import sys

__all__ = ["peak_megabytes"]


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
