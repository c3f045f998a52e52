"""Time and memory of one meta-update window: the replay against a plain autograd unroll, in one run.

    python benchmarks/meta_gradient.py                # one core; --threads 2 for two
Each row is the median over alternating repetitions of `meta_gradient` with `unroll` steps. Peak memory is measured in
a process of its own for each case: the growth of its resident set over what it held before the window.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from memory import peak_megabytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CASES = [("quadratics", 1), ("quadratics", 16), ("quadratics", 128), ("mnist", 1), ("mnist", 8)]
METHODS = ("replay", "autograd")


def window(problem, functions, unroll):
    """A function of the method that runs one meta-gradient of that case."""
    from meta_training import meta_gradient
    from optimizees import MNISTNet, Quadratics
    from optimizers import CoordinatewiseLSTM

    if problem == "mnist":
        net, distribution = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1), MNISTNet()
    else:
        net, distribution = CoordinatewiseLSTM(), Quadratics()
    batch = distribution.sample(functions)
    state = net.init_state(sum(tensor.numel() for tensor in batch.params.values()))
    return lambda method: meta_gradient(net, batch, batch.params, state, unroll=unroll, method=method)


def seconds(run, repetitions):
    """Median time of each method, alternating."""
    times = {method: [] for method in METHODS}
    for repetition in range(repetitions + 1):
        for method in METHODS:
            start = time.perf_counter()
            run(method)
            if repetition:  # the first is a warm-up
                times[method].append(time.perf_counter() - start)
    return {method: statistics.median(values) for method, values in times.items()}


def peak_memory(problem, functions, unroll, method, threads):
    """MB that one window adds to the peak of a fresh process, after a window of one step has warmed it up."""
    command = [sys.executable, __file__, "--memory-of", problem, str(functions), method, "--unroll", str(unroll),
               "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unroll", type=int, default=20, help="steps in the window (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of each case (default 7)")
    parser.add_argument("--memory-of", nargs=3, metavar=("PROBLEM", "FUNCTIONS", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory_of:
        problem, functions, method = arguments.memory_of
        window(problem, int(functions), 1)(method)
        run = window(problem, int(functions), arguments.unroll)
        before = peak_megabytes()
        run(method)
        print(peak_megabytes() - before)
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.threads:])
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} thread(s), unroll {arguments.unroll}\n")
    print("| case | replay | autograd | ratio | replay, MB | autograd, MB |\n| --- | --- | --- | --- | --- | --- |")
    for problem, functions in CASES:
        times = seconds(window(problem, functions, arguments.unroll),
                        max(2, arguments.repetitions // 3) if (problem, functions) == ("mnist", 8) else arguments.repetitions)
        memory = [peak_memory(problem, functions, arguments.unroll, method, arguments.threads) for method in METHODS]
        print(f"| {problem} ×{functions} | {1e3 * times['replay']:.1f} ms | {1e3 * times['autograd']:.1f} ms | "
              f"{times['autograd'] / times['replay']:.2f} | {memory[0]:.0f} | {memory[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
