"""What meta modules cost: a meta-ResNet-50 against torchvision's, and an inner loop against torch.func.functional_call.

    python benchmarks/meta_module.py [--device cpu] [--threads 1] [--repeats 11]

The two sides of each row run in turn in one process; times are medians, the ratio is the median of the ratios of
neighbouring runs (so that a machine busy with something else does not favour a side). Memory is the largest sum of
torch's live allocations during one run, beyond what was live before it.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory here and need not talk about it

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import resnet_meta  # noqa: E402
from meta_module import to_meta  # noqa: E402


def peak_bytes(run, device):
    """Largest sum of live allocations during `run`, by torch's own count."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def compare(label, ours, theirs, device, repeats):
    """One row: medians of alternating runs, and peak memory."""

    def timed(run):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in (ours, theirs):
        run()
    times = []
    for repeat in range(repeats):
        sides = (ours, theirs) if repeat % 2 else (theirs, ours)
        pair = {run: timed(run) for run in sides}
        times.append((pair[ours], pair[theirs]))
    ratio = statistics.median(a / b for a, b in times)
    a, b = (statistics.median(side) * 1e3 for side in zip(*times))
    memory = [peak_bytes(run, device) / 2**20 for run in (ours, theirs)]
    print(f"| {label} | {a:.1f} | {b:.1f} | {ratio:.3f} | {memory[0]:.1f} | {memory[1]:.1f} |", flush=True)


def forward_and_backward(model, images, labels):
    def run():
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    return run


def inner_loops(plain, images, labels, steps=10, lr=0.01):
    """One differentiable inner loop, ours and with functional_call. Both give the outer gradient."""
    meta = to_meta(plain)
    start = list(meta.parameters())
    names = [name for name, _ in meta.named_parameters()]

    def ours():
        for name, tensor in zip(names, start):
            owner, _, last = name.rpartition(".")
            setattr(meta.get_submodule(owner), last, tensor)
        for _ in range(steps):
            loss = F.cross_entropy(meta(images), labels)
            meta.update_params(lr, source_params=torch.autograd.grad(loss, list(meta.parameters()), create_graph=True))
        return torch.autograd.grad(F.cross_entropy(meta(images), labels), start)

    buffers = dict(plain.named_buffers())

    def theirs():
        params = dict(plain.named_parameters())
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(plain, (params, buffers), (images,)), labels)
            params = {
                name: tensor - lr * grad
                for (name, tensor), grad in zip(
                    params.items(), torch.autograd.grad(loss, list(params.values()), create_graph=True)
                )
            }
        loss = F.cross_entropy(functional_call(plain, (params, buffers), (images,)), labels)
        return torch.autograd.grad(loss, list(plain.parameters()))

    return ours, theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--batch", type=int, default=4, help="images per batch of the ResNets")
    parser.add_argument("--image", type=int, default=64, help="pixels per side of the ResNet-50's images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {options.threads} thread(s)"
    )
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}, {name}"
    )
    print(f"ResNet-50: batch {options.batch}, {options.image}x{options.image}; {options.repeats} alternating runs\n")
    print("| | meta, ms | torch, ms | ratio | meta, MiB | torch, MiB |\n| --- | --- | --- | --- | --- | --- |")

    images = torch.randn(options.batch, 3, options.image, options.image, device=device)
    labels = torch.randint(10, (options.batch,), device=device)
    plain = torchvision.models.resnet50(num_classes=10).to(device)
    meta = resnet_meta.resnet50(num_classes=10).to(device)
    meta.load_state_dict(plain.state_dict())
    sides = (forward_and_backward(model, images, labels) for model in (meta, plain))
    compare("ResNet-50, forward and backward", *sides, device, options.repeats)

    digits = torch.randn(128, 784, device=device), torch.randint(10, (128,), device=device)
    network = nn.Sequential(nn.Linear(784, 20), nn.Sigmoid(), nn.Linear(20, 10)).to(device)
    compare("10 inner steps, 784-20-10, batch 128", *inner_loops(network, *digits), device, 20 * options.repeats)

    small = torch.randn(options.batch, 3, 32, 32, device=device)
    network = torchvision.models.resnet18(num_classes=10).to(device)
    compare("10 inner steps, ResNet-18 at 32x32", *inner_loops(network, small, labels), device, options.repeats)


if __name__ == "__main__":
    main()
