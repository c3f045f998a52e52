"""Time of one inner step of meta-training by evolution strategies: a small perceptron, trained by the small learned optimizer.

    python benchmarks/inner_steps.py            # 64-32-10, ReLU, batch 64; --sizes, --activation, --batch for others

One inner step is a minibatch's loss and gradient and the optimizer's step, for one particle. "Compiled" is
`PerceptronWindows`, on one thread and on two (where the machine lends them). "Torch" is the same run in plain torch, all particles
batched: products of batched matrices, gradients by autograd, `MLPOptimizer`. "meta_train" is whole iterations of such a training by
`EpisodicES`, the update of the optimizer's weights included: what is drawn, the window, estimate, clipping, Adam, averages; in plain torch
with `staggered=False`; "steps compiled" is the same functions as `Networks`, whose losses are plain torch.
Microseconds, medians (minima) over alternating repetitions in one process; ratios are the medians of each repetition's own.
"""

import argparse
import copy
import os
import platform
import sys
from pathlib import Path

from timing import CORES, alternate, pin, ratio, table_head, table_row

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def problem(sizes, examples=4096):
    """Made-up images that tell their labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(sizes[-1], (examples,), generator=generator)
    return torch.randn(sizes[-1], sizes[0], generator=generator)[labels] + torch.randn(
        examples, sizes[0], generator=generator
    ), labels


def compiled_run(windows, weights, particles, steps, batch, data, threads):
    def run():
        pin(threads)
        params, state = windows.draw_params(particles, seed=0), windows.init_state(particles)
        return windows.run(weights, (params, state), data, lr=0.003, steps=steps, batch=batch, seeds=range(particles))

    return run


def torch_run(net, windows, weights, particles, steps, batch, data, threads):
    import torch

    from gradbuffer.kernels.numba_mlp_windows import minibatches

    activation = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu}[
        windows.activation
    ]
    index, (images, labels) = minibatches(range(particles), 0, steps, batch, len(data[0])), data

    def losses_and_gradients(params, images, labels):
        params = {name: value.requires_grad_() for name, value in params.items()}
        x, own = images, list(params.values())
        for l in range(0, len(own), 2):
            x = torch.baddbmm(own[l + 1][:, None], x, own[l].mT)
            x = activation(x) if l + 2 < len(own) else x
        losses = torch.nn.functional.cross_entropy(x.mT, labels, reduction="none").mean(1)
        return losses.detach(), dict(zip(params, torch.autograd.grad(losses.sum(), own)))

    def run():
        pin(threads)
        params = windows.unflatten_params(windows.draw_params(particles, seed=0))
        state, losses = net.init_state(params), []
        for t in range(steps):
            here = index[:, t]
            loss, grads = losses_and_gradients(
                {name: value.detach() for name, value in params.items()}, images[here], labels[here]
            )
            with torch.no_grad():
                updates, state = net(grads, state, params=params, lr=0.003, weights=weights)
                params = {name: params[name].detach() + updates[name] for name in params}
            losses.append(loss)
        return torch.stack(losses, 1)

    return run


def meta_train_run(net, sizes, activation, batch, data, particles, steps, kind, threads):
    import torch

    from gradbuffer.training.episodic_run import EpisodicRun
    from gradbuffer.training.options import training_of
    from meta_training import EpisodicES
    from optimizees import Networks, Perceptrons

    net, before = copy.deepcopy(net), os.environ.get("L2O_KERNELS")
    method, functions = EpisodicES(staggered=kind != "torch"), Perceptrons(*data, sizes[1:-1], activation, batch)
    if kind == "steps compiled":
        functions = Networks(data, functions.shapes, functions.losses, batch)
    options = dict(steps=steps, unroll=steps, meta_batch=particles // 2, averaging=0.99, balance=True, method=method)
    run = EpisodicRun(net, functions, training_of(net, iterations=10**6, **options))
    os.environ["L2O_KERNELS"] = "torch" if kind == "torch" else "auto"
    torch.set_num_threads(1)
    run.advance()  # chooses what runs the functions
    if before is None:
        del os.environ["L2O_KERNELS"]
    else:
        os.environ["L2O_KERNELS"] = before

    def iterate():
        pin(threads)
        run.advance()

    return iterate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="64,32,10", help="inputs, hidden layers, outputs")
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50, help="of a window")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--vectors", default="mlp", choices=("mlp", "adamw"))
    options = parser.parse_args()

    import torch

    from gradbuffer.kernels.numba_mlp_windows import PerceptronWindows
    from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam

    torch.manual_seed(0)
    net = start_as_normalized_adam(MLPOptimizer(vectors=options.vectors))
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    sizes = tuple(map(int, options.sizes.split(",")))
    windows, data = PerceptronWindows(net, sizes, options.activation), problem(sizes)
    weights = flat + 0.01 * torch.randn(options.particles, len(flat))  # each particle has its own
    given = weights, options.particles, options.steps, options.batch, data
    runs = {}
    for threads in (1, 2)[: max(len(CORES), 1)]:
        runs[f"compiled, {threads} thread{'s' * (threads > 1)}"] = compiled_run(windows, *given, threads)
        runs[f"torch, {threads} thread{'s' * (threads > 1)}"] = torch_run(net, windows, *given, threads)
        rest = sizes, options.activation, options.batch, data, options.particles, options.steps
        for kind in ("compiled", "steps compiled", "torch"):
            name = f"meta_train, {kind}, {threads} thread{'s' * (threads > 1)}"
            runs[name] = meta_train_run(net, *rest, kind, threads)
    first, second = (runs[name]() for name in ("compiled, 1 thread", "torch, 1 thread"))
    apart = float((first - second).abs().max())
    times, count = alternate(runs, options.repetitions), options.particles * options.steps
    print(
        f"\n{options.sizes}, {options.activation}, batch {options.batch}, {options.particles} particles with weights of their own, "
        f"windows of {options.steps} steps, float32; torch {torch.__version__}, {platform.processor() or platform.machine()}; "
        f"losses differ by at most {apart:.1g}\n"
    )
    table_head("", "µs per inner step", "inner steps per second", "compiled, 1 thread, is faster by")
    for name, seconds in times.items():
        median, minimum = (1e6 * value / count for value in (seconds.median, seconds.minimum))
        faster = ratio(seconds, times["compiled, 1 thread"])
        table_row(name, f"{median:.1f} ({minimum:.1f})", f"{1e6 / median:,.0f}", f"{faster:.2f}")


if __name__ == "__main__":
    main()
