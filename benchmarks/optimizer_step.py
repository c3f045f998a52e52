"""Time and memory of `LearnedOptimizer.step` on ResNet-18's parameters, of an LSTM and of the small `MLPOptimizer`, beside Adam and AdamW.

    python benchmarks/optimizer_step.py            # one core; --threads 2 for two, --architecture for another model

"Products" are the bare matrix products of one forward step of the LSTM for all coordinates, by torch, in blocks that stay in
the cache and on the same buffers again and again (`floors`). The state in float32 is read and written once, in place, by
torch, as every step has to. Medians (minima) over alternating repetitions, in one process; ratios are the median of each
repetition's own. Peak memory is measured in a process of its own for each optimizer: what three steps add to the resident
set that model and gradients have.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

from memory import peak_megabytes
from timing import alternate, milliseconds, ratio, table_head, table_row

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OPTIMIZERS = (
    "LearnedOptimizer",
    "LearnedOptimizer, bfloat16 state",
    "LearnedOptimizer, MLPOptimizer",
    "LearnedOptimizer, general",
    "Adam",
    "AdamW, foreach",
)


def parameters(architecture):
    """That model's parameters, with gradients."""
    import torch
    import torchvision

    params = list(getattr(torchvision.models, architecture)(weights=None).parameters())
    for parameter in params:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return params


def optimizer_of(name, params):
    import torch

    from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
    from optimizers import LearnedOptimizer, load_optimizer

    if name == "LearnedOptimizer, MLPOptimizer":
        return LearnedOptimizer(params, start_as_normalized_adam(MLPOptimizer()), lr=0.0)
    if name == "LearnedOptimizer, general":  # an MLPOptimizer with Newton-Schulz and a context
        return LearnedOptimizer(params, load_optimizer("general"), lr=0.0)
    if name == "Adam":
        return torch.optim.Adam(params, lr=1e-5)
    if name == "AdamW, foreach":
        return torch.optim.AdamW(params, lr=1e-5, foreach=True)
    state_dtype = torch.bfloat16 if "bfloat16" in name else None
    # lr 0: the parameters stay where they are, and the update is computed and added all the same
    return LearnedOptimizer(params, load_optimizer("mnist"), lr=0.0, state_dtype=state_dtype)


def peak_memory(name, architecture, threads):
    """MB that three steps add to the peak of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, "--architecture", architecture, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def state_of(optimizer):
    return [part for state in optimizer.state.values() for part in state.values()]


def state_megabytes(optimizer):
    return sum(part.nbytes for part in state_of(optimizer)) / 2**20


def pass_over_state(optimizer):
    """Read and write it all, which changes nothing."""
    for part in state_of(optimizer):
        part.mul_(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet18", help="a torchvision model (default resnet18)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of each case (default 5)")
    parser.add_argument("--memory-of", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch
    from floors import forward_products

    from optimizers import load_optimizer

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    params = parameters(arguments.architecture)
    if arguments.memory_of:
        optimizer = optimizer_of(arguments.memory_of, params)
        before = peak_megabytes()
        for _ in range(3):
            optimizer.step()
        print(peak_megabytes() - before)
        return
    size = sum(parameter.numel() for parameter in params)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} thread(s), {arguments.architecture}, "
        f"{size:,} coordinates\n"
    )
    memory = {name: peak_memory(name, arguments.architecture, arguments.threads) for name in OPTIMIZERS}
    optimizers = {name: optimizer_of(name, params) for name in OPTIMIZERS}
    runs = {name: optimizer.step for name, optimizer in optimizers.items()}
    floors = {
        "products": forward_products(load_optimizer("mnist"), size),
        "state": lambda: pass_over_state(optimizers["LearnedOptimizer"]),
    }
    times = alternate(runs | floors, arguments.repetitions)
    table_head("", "ms", "ratio to the products", "to AdamW, foreach", "state, MB", "peak, MB")
    table_row("the LSTM's products alone", milliseconds(times["products"]), 1, "–", "–", "–")
    table_row(
        "its float32 state, read and written",
        milliseconds(times["state"]),
        f"{ratio(times['state'], times['products']):.2f}",
        "–",
        "–",
        "–",
    )
    for name, optimizer in optimizers.items():
        table_row(
            name,
            milliseconds(times[name]),
            f"{ratio(times[name], times['products']):.2f}",
            f"{ratio(times[name], times['AdamW, foreach']):.2f}",
            f"{state_megabytes(optimizer):.0f}",
            f"{memory[name]:.0f}",
        )


if __name__ == "__main__":
    main()
