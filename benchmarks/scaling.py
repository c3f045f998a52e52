"""How the replay's time and memory grow with coordinates, steps and cores, for `meta_gradient.py`."""

import functools
import os
from typing import NamedTuple

import torch
from floors import bare_products, bytes_of_step, copy_rate
from memory import available_bytes
from timing import CORES, alternate, milliseconds, pin, ratio, table_head, table_row

__all__ = ["compare_lengths", "compare_sizes", "draw"]

TWO_CORES_FROM = 100_000  # coordinates
WHOLE_PRODUCTS = 100_000  # up to as many coordinates the products of all steps are run, above those of one step


class Size(NamedTuple):
    """Nanoseconds for each coordinate and step; None where not measured."""

    N: int
    one_core: float
    two_cores: float | None
    products: float


class Length(NamedTuple):
    """Seconds and MB of a window of T steps."""

    T: int
    replay: float
    autograd: float
    replay_megabytes: float
    autograd_megabytes: float


def lstm_alone(net, N, steps):
    """A function that takes `steps` steps from random gradients, the state in place, and replays them."""
    state, grads = net.init_state(N), torch.randn(steps, N).mul_(1e-3)

    @torch.no_grad()
    def run(threads):
        pin(threads)
        current = state
        for grad in grads:
            _, current = net(grad, current, inplace=True)
        net.replay(grads, current, grads)  # from any state, with any adjoint

    return run


def compare_sizes(largest, steps, repetitions):
    """Table 3: time for each coordinate and step of the LSTM alone, on one core and on two. Returns list of `Size`."""
    from optimizers import CoordinatewiseLSTM

    os.environ["L2O_KERNELS"] = "numba"
    net, sizes = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1), []
    rate = copy_rate()
    print(
        f"memory, by a copy: {rate / 1e9:.1f} GB/s read and written; a step moves {bytes_of_step(net)} bytes "
        f"for each coordinate, {1e9 * bytes_of_step(net) / rate:.3g} ns: "
        f"{11_689_512 * bytes_of_step(net) / rate:.2f} s for ResNet-18's 11.7 million\n"
    )
    table_head(
        "LSTM alone, coordinates",
        "one core, ns per coordinate and step",
        "bare products, ns",
        "ratio",
        "two cores, ns",
        "one core / two",
    )
    for N in (10**power for power in range(2, 8)):
        needed = 4 * N * (2 * net.num_layers * net.hidden_size + 2 * steps + 8)
        if N > largest:
            break
        if needed > 0.9 * available_bytes():
            print(f"\n{N:,} coordinates need {needed / 1e9:.1f} GB: left out")
            break
        run, product_steps = lstm_alone(net, N, steps), steps if N <= WHOLE_PRODUCTS else 1
        runs = {"one": functools.partial(run, 1)}
        if N >= TWO_CORES_FROM and len(CORES) > 1:
            runs["two"] = functools.partial(run, 2)
        runs["products"] = functools.partial(on_one_core, bare_products(net, N, product_steps))
        seconds = alternate(runs, repetitions)
        times = {
            name: 1e9 * taken.median / N / (product_steps if name == "products" else steps)
            for name, taken in seconds.items()
        }
        pin(1)
        sizes.append(Size(N, times["one"], times.get("two"), times["products"]))
        two = (f"{times['two']:.0f}", f"{ratio(seconds['one'], seconds['two']):.2f}") if "two" in times else ("–", "–")
        table_row(
            f"{N:,}", f"{times['one']:.0f}", f"{times['products']:.0f}", f"{times['one'] / times['products']:.2f}", *two
        )
    return sizes


def on_one_core(run):
    pin(1)
    run()


def compare_lengths(lengths, repetitions, window, added_megabytes):
    """Table 4: time and memory over the window's length, for one MNIST network. Returns list of `Length`."""
    table_head(f"steps, {window.N:,} coordinates", "replay, ms", "autograd, ms", "replay, MB", "autograd, MB")
    rows, methods = [], ("replay, numba", "autograd")
    for T in lengths:
        times = alternate({name: functools.partial(window.run, name, T) for name in methods}, max(1, repetitions // 2))
        megabytes = [added_megabytes("mnist", 1, T, name) for name in methods]
        rows.append(Length(T, *(times[name].median for name in methods), *megabytes))
        table_row(T, *(milliseconds(times[name]) for name in methods), *(f"{amount:.0f}" for amount in megabytes))
    return rows


def draw(sizes, lengths, path):
    """The figure: time over coordinates, memory over the window's length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    coordinates = [size.N for size in sizes]
    left.loglog(coordinates, [size.one_core for size in sizes], "o-", label="step and replay, one core")
    two = [size for size in sizes if size.two_cores is not None]
    if two:
        left.loglog(
            [size.N for size in two], [size.two_cores for size in two], "o-", label="step and replay, two cores"
        )
    left.loglog(coordinates, [size.products for size in sizes], "--", color="gray", label="bare products, one core")
    left.set(xlabel="coordinates N", ylabel="ns per coordinate and step", title="The LSTM's part of the meta-gradient")
    steps = [length.T for length in lengths]
    right.loglog(steps, [length.replay_megabytes for length in lengths], "o-", label="replay")
    right.loglog(steps, [length.autograd_megabytes for length in lengths], "s-", color="tab:red", label="autograd")
    right.set(xlabel="steps T in the window", ylabel="memory added, MB", title="One MNIST network (N = 15,910)")
    right.set_xticks(steps, [str(T) for T in steps])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.savefig(path, dpi=130)
