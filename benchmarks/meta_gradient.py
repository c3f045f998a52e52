"""Time and memory of one meta-update window: the replay, a plain autograd unroll and what the arithmetic alone takes.

    python benchmarks/meta_gradient.py                # one core; --plot draws benchmarks/meta_gradient.png
    python benchmarks/meta_gradient.py --peers FILE   # other programs beside ours, see `timing.read_peers`
    python benchmarks/meta_gradient.py --resnet       # also a window of ResNet-18's 11.7 million coordinates

1. A window of `--unroll` steps by `meta_gradient`, in float32: the replay with the kernels of numba and with those of
   plain torch, and autograd. Median and (minimum) over alternating repetitions on one core.
2. The floor, in the same rounds: the LSTM's matrix products alone, the optimizee alone (`floors`), and what the replay
   takes beyond the optimizee, divided by the products. Memory is what one window adds to the resident set of a process
   of its own. And eight networks on MNIST beside one.
3. What the LSTM alone, step and replay, takes for each coordinate and step, from 100 coordinates to `--largest`, on one
   core and on two; time and memory over the length of the window (`scaling`).
"""

import argparse
import functools
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

from memory import peak_megabytes, reset_peak
from timing import CORES, alternate, milliseconds, pin, ratio, read_peers, table_head, table_row

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

CASES = {
    f"{problem} x{functions}": (problem, functions)
    for problem, sizes in (("quadratics", (1, 16, 128)), ("mnist", (1, 8)))
    for functions in sizes
}
METHODS = {
    "replay, numba": ("replay", "numba"),
    "replay, torch": ("replay", "torch"),
    "autograd": ("autograd", "torch"),
}
SMOKE = dict(unroll=2, repetitions=1, cases=["mnist x1"], largest=1e3, lengths=[2], peer_rounds=1)


class Window:
    """A case: the network, a meta-batch and the state at its start."""

    def __init__(self, problem, functions):
        from optimizees import MNISTNet, Quadratics
        from optimizers import CoordinatewiseLSTM

        if problem == "mnist":
            self.net, distribution = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1), MNISTNet()
        else:
            self.net, distribution = CoordinatewiseLSTM(), Quadratics()
        self.batch = distribution.sample(functions)
        self.N = sum(tensor.numel() for tensor in self.batch.params.values())
        self.state = self.net.init_state(self.N)

    def run(self, name, unroll):
        """One meta-gradient by the method of that name in `METHODS`."""
        from gradbuffer.training.meta_gradients import meta_gradient

        method, os.environ["L2O_KERNELS"] = METHODS[name]
        return meta_gradient(self.net, self.batch, self.batch.params, self.state, unroll=unroll, method=method)


@functools.cache
def added_megabytes(problem, functions, unroll, name):
    """MB that one window adds to a process of its own, after windows of one step have warmed it up.

    The process is forked from one that has only imported what is needed.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["gradbuffer.training.meta_gradients", "optimizees", "optimizers", "gradbuffer.kernels.numba_lstm"]
    )
    with processes.Pool(1) as pool:
        return pool.apply(measure_memory, (problem, functions, unroll, name))


def measure_memory(problem, functions, unroll, name):
    pin(1)
    window = Window(problem, functions)
    for warm in (window, Window("quadratics", 1)):  # kernels depend on the number of coordinates
        warm.run(name, 1)
    before = reset_peak()
    window.run(name, unroll)
    return peak_megabytes() - before


def with_numba(run):
    """The function, with kernels of numba."""

    def run_so():
        os.environ["L2O_KERNELS"] = "numba"
        run()

    return run_so


def compare_cases(cases, unroll, repetitions, peers, peer_rounds):
    """Tables 1 and 2."""
    from floors import bare_products, optimizee_alone

    from gradbuffer.unrolling import Coordinates

    table_head(
        "case",
        *(f"{name}, ms" for name in METHODS),
        "autograd / replay",
        *(column for label in peers for column in (f"{label}, ms", f"{label} / replay")),
    )
    floors = []
    for case in cases:
        window = Window(*CASES[case])
        runs = {name: functools.partial(window.run, name, unroll) for name in METHODS}
        window.run("replay, numba", 1)  # numba compiles: up to a minute, which is no round's time
        runs["products"] = bare_products(window.net, window.N, unroll)
        runs["optimizee"] = with_numba(optimizee_alone(Coordinates(window.batch.params), window.batch, unroll))
        beside = {label: entries[case] for label, entries in peers.items() if case in entries}
        times = alternate(runs, repetitions, beside, peer_rounds)
        ours = times["replay, numba"].median
        theirs = [
            (milliseconds(times[label]), f"{times[label].median / ours:.2f}") if label in times else ("–", "–")
            for label in peers
        ]
        table_row(
            case.replace("x", "×"),
            *(milliseconds(times[name]) for name in METHODS),
            f"{ratio(times['autograd'], times['replay, numba']):.2f}",
            *(cell for pair in theirs for cell in pair),
        )
        floors.append((case, window.N, times))
    print()
    table_head(
        "case",
        "coordinates",
        "optimizee alone, ms",
        "bare products, ms",
        "LSTM part of the replay, ms",
        "LSTM part / bare products",
        *(f"{name}, MB" for name in METHODS),
    )
    for case, N, times in floors:
        lstm = times["replay, numba"].median - times["optimizee"].median
        table_row(
            case.replace("x", "×"),
            f"{N:,}",
            milliseconds(times["optimizee"]),
            milliseconds(times["products"]),
            milliseconds(lstm),
            f"{lstm / times['products'].median:.2f}",
            *(f"{added_megabytes(*CASES[case], unroll, name):.0f}" for name in METHODS),
        )


def compare_batches(unroll, repetitions):
    """How much longer eight networks on MNIST take than one, in turn: what a machine does changes within minutes."""
    times = alternate(
        {number: functools.partial(Window("mnist", number).run, "replay, numba", unroll) for number in (1, 8)},
        repetitions,
    )
    print(
        f"MNIST ×8 and ×1 in turn: {milliseconds(times[8])} and {milliseconds(times[1])} ms, "
        f"{ratio(times[8], times[1]):.2f} ({times[8].minimum / times[1].minimum:.2f}) times as long"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unroll", type=int, default=20, help="steps in the window (default 20)")
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of each case, at least (default 7)")
    parser.add_argument(
        "--cases", nargs="*", default=list(CASES), choices=CASES, help="of tables 1 and 2 (default all)"
    )
    parser.add_argument(
        "--largest", type=float, default=1e7, help="coordinates of the LSTM alone at most (default 1e7; 0 for none)"
    )
    parser.add_argument(
        "--lengths",
        nargs="*",
        type=int,
        default=[20, 50, 100, 200],
        metavar="T",
        help="steps of MNIST's windows (default 20 50 100 200)",
    )
    parser.add_argument("--peers", metavar="FILE.json", help="programs to run in turn with ours")
    parser.add_argument("--peer-rounds", type=int, default=3, help="runs of each such program (default 3)")
    parser.add_argument(
        "--plot",
        nargs="?",
        const=str(HERE / "meta_gradient.png"),
        metavar="PATH",
        help="draw how time and memory grow (default path benchmarks/meta_gradient.png)",
    )
    parser.add_argument("--resnet", action="store_true", help="also large_optimizee.py: some minutes, about 11 GB")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    for name, least in (("unroll", 1), ("repetitions", 1), ("peer_rounds", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    peers = read_peers(arguments.peers) if arguments.peers else {}
    import torch

    pin(1)
    torch.manual_seed(0)
    from scaling import compare_lengths, compare_sizes, draw

    from gradbuffer.kernels.choice import has_numba

    if not has_numba():
        sys.exit("benchmarks/meta_gradient.py compares the kernels of numba with others: pip install numba")
    print(
        f"torch {torch.__version__}, {platform.machine()}, core {CORES[-1] if CORES else '?'} of "
        f"{os.cpu_count()}, windows of {arguments.unroll} steps, float32; median (minimum)\n"
    )
    compare_cases(arguments.cases, arguments.unroll, arguments.repetitions, peers, arguments.peer_rounds)
    print()
    compare_batches(arguments.unroll, arguments.repetitions)
    print()
    sizes = compare_sizes(arguments.largest, arguments.unroll, arguments.repetitions)
    print()
    lengths = compare_lengths(arguments.lengths, arguments.repetitions, Window("mnist", 1), added_megabytes)
    if arguments.plot:
        draw(sizes, lengths, arguments.plot)
        print(f"\ndrawn: {arguments.plot}")
    if arguments.resnet:
        print(flush=True)
        subprocess.run(
            [
                sys.executable,
                str(HERE / "large_optimizee.py"),
                "--unroll",
                str(arguments.unroll),
                *(["--smoke"] if arguments.smoke else []),
            ],
            check=True,
        )


if __name__ == "__main__":
    main()
