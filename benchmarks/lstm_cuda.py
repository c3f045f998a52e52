"""Time of one optimizer step and of one replay on CUDA, beside what memory and matrix products alone would take.

    python benchmarks/lstm_cuda.py                    # --precisions tf32x3 bf16, --largest 1e6, --unroll 20
Each time is the median over alternating repetitions, the kernels compiled and warm. The floor of a step is the larger
of two: the bytes of state and gradient that it must read and write at the rate of a large copy, and its
multiplications at the rate of a large product of float32 matrices (tf32 not allowed; kernels on tensor cores may go
below that one). The floor of a replay is three forward passes' multiplications at that rate. "torch" is what runs
without triton. Last, whole windows of the meta-gradient, by one launch after the other and as one CUDA graph.
"""

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def medians(runs, repetitions):
    """Median seconds of each function in a dict, alternating."""
    times = {name: [] for name in runs}
    for repetition in range(repetitions + 2):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if repetition >= 2:  # the first ones warm up
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def rates(repetitions):
    """What this device reaches: bytes per second of a copy (read and written), operations per second of a product."""
    source = torch.empty(1 << 28, device="cuda")
    target, a, b = torch.empty_like(source), *torch.randn(2, 8192, 8192, device="cuda")
    times = medians({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, repetitions)
    return 2 * source.numel() * 4 / times["copy"], 2 * 8192**3 / times["product"]


def cases(net, N, unroll, precisions):
    """Functions that run a step and a replay over N coordinates, by kernels of each precision and by torch."""
    from gradbuffer.kernels.interface import LSTMKernels
    from gradbuffer.kernels.torch_blocks import TorchLSTM
    from gradbuffer.kernels.triton_lstm import TritonLSTM

    weights = net.lstm, net.output.weight[0], net.output.bias[0]
    state, grad = net.init_state(N), torch.randn(N, device="cuda")
    triton = {name: TritonLSTM(*weights, precision=name) for name in precisions}
    steps = {
        name: partial(kernels.step, lambda a, b: grad[None, a:b], *state, inplace=True, p=net.p)
        for name, kernels in triton.items()
    }
    readings = net.read(grad[None], ())[0][0]
    steps["torch"] = partial(TorchLSTM(*weights).step, lambda a, b: readings[:, a:b], *state, inplace=True)
    grads, start = torch.randn(unroll, N, device="cuda"), net.init_state(N)
    replays = {
        name: partial(kernels.replay, lambda a, b: net.read(grads[:, a:b], ())[0], *start, grads)
        for name, kernels in {**triton, "torch": LSTMKernels(*weights)}.items()
    }
    return steps, replays


def windows(unroll, repetitions):
    """Seconds of a window: {problem: {"torch": …, "torch, graph": …, "triton": …, "triton, graph": …}}"""
    from gradbuffer.training.cuda_graphs import CapturedWindow
    from gradbuffer.training.meta_gradients import meta_gradient
    from optimizees import MNISTNet, Quadratics
    from optimizers import CoordinatewiseLSTM

    results = {}
    for name, problem, preprocess, functions in (
        ("quadratics ×1", Quadratics(device="cuda"), None, 1),
        ("quadratics ×128", Quadratics(device="cuda"), None, 128),
        ("MNIST ×1", MNISTNet(device="cuda"), "log_sign", 1),
    ):
        net, batch = CoordinatewiseLSTM(preprocess=preprocess).cuda(), problem.sample(functions)
        window = batch, batch.params, net.init_state(sum(tensor.numel() for tensor in batch.params.values()))
        results[name] = {}
        for kernels in ("torch", "triton"):
            os.environ["L2O_KERNELS"] = kernels
            captured = CapturedWindow(net, *window, unroll)
            results[name] |= medians(
                {
                    kernels: partial(meta_gradient, net, *window, unroll=unroll),
                    f"{kernels}, graph": partial(captured, *window),
                },
                repetitions,
            )
    return results


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unroll", type=int, default=20, help="steps of the replay (default 20)")
    parser.add_argument("--largest", type=float, default=1e7, help="coordinates at most (default 1e7)")
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of each case (default 7)")
    parser.add_argument(
        "--precisions", nargs="+", default=["tf32x3", "bf16"], help="of the kernels (default tf32x3 bf16)"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/lstm_cuda.py needs a CUDA device: torch finds none here")
    from gradbuffer.kernels.triton_lstm import TritonLSTM
    from optimizers import CoordinatewiseLSTM

    net = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1).cuda()
    reasons = TritonLSTM.reasons_against(net.output.weight, "step")
    if reasons:
        sys.exit(f"benchmarks/lstm_cuda.py compares the kernels of triton with others: {'; '.join(reasons)}")
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth, products = rates(arguments.repetitions)
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}; copy {bandwidth / 1e9:.0f} GB/s, float32 "
        f"products {products / 1e12:.1f} TFLOP/s; unroll {arguments.unroll}\n"
    )
    names = [*arguments.precisions, "torch", "floor"]
    print("| what | N | " + " | ".join(f"{name}, ms" for name in names) + " |\n|" + " --- |" * (len(names) + 2))
    operations = 2 * sum(w.numel() + u.numel() for w, u, *_ in net.lstm.all_weights)  # of a coordinate's forward step
    bytes_moved = 4 * (2 * 2 * net.num_layers * net.hidden_size + 2)  # state read and written, gradient, update
    for N in (10**4, 10**5, 10**6, 10**7):
        if N > arguments.largest:
            break
        floors = {
            "step": max(N * bytes_moved / bandwidth, N * operations / products),
            "replay": 3 * arguments.unroll * N * operations / products,
        }
        for (what, floor), runs in zip(floors.items(), cases(net, N, arguments.unroll, arguments.precisions)):
            times = medians(runs, arguments.repetitions) | {"floor": floor}
            print(f"| {what} | {N} | " + " | ".join(f"{1e3 * times[name]:.3f}" for name in names) + " |", flush=True)
    for number, (name, times) in enumerate(windows(arguments.unroll, arguments.repetitions).items()):
        if number == 0:
            print("\n| window | " + " | ".join(f"{kind}, ms" for kind in times) + " |\n|" + " --- |" * (len(times) + 1))
        print(f"| {name} | " + " | ".join(f"{1e3 * seconds:.3f}" for seconds in times.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
