"""One meta-gradient window through all coordinates of a meta-ResNet: seconds and peak memory.

    python benchmarks/large_optimizee.py              # ResNet-18, 11.7 million coordinates; about 12 GB and some minutes
    python benchmarks/large_optimizee.py --architecture resnet50 --unroll 5     # 25.6 million; about 20 GB

The optimizee is a problem as a user would write it (`NetworkProblem`): any network with batch normalization, batches of
`--batch` random images of `--side` pixels with random labels, since neither time nor memory depends on what they show.
The peak is the whole process', torch included. "State" is the optimizer's, once: the window holds it twice, as it was
at the start (the replay begins there) and as it is now.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from memory import peak_megabytes
from torch.func import functional_call
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from floors import bytes_of_step, copy_rate

import resnet_meta
from gradbuffer.training.meta_gradients import meta_gradient
from meta_module import to_meta
from optimizees import MetaBatch
from optimizers import CoordinatewiseLSTM


class NetworkProblem:
    """Training a network from its initial weights on random images: each function has images of its own.

    Args:
        network: a meta-module from images (batch, 3, side, side) to scores (batch, classes), in training mode. Its own
            parameters and buffers stay as they are: batch normalization updates a copy, anew in every call.
        classes: labels are drawn from 0 … classes - 1.
        batch_size, side: images of a minibatch, pixels along a side.
        minibatches: different minibatches of a function; step s has the one numbered s modulo these.
    """

    def __init__(self, network, classes, batch_size=8, side=64, minibatches=4):
        self.network, self.classes = network.train(), classes
        self.shape = minibatches, batch_size, 3, side, side

    def sample(self, meta_batch, generator=None):
        """Draw `meta_batch` functions, which share the initial weights. Returns `MetaBatch`."""
        images = torch.randn(meta_batch, *self.shape, generator=generator)
        labels = torch.randint(self.classes, images.shape[:3], generator=generator)
        params = {
            name: tensor.detach().expand(meta_batch, *tensor.shape) for name, tensor in self.network.named_parameters()
        }

        def loss(params, step):
            minibatch = step % self.shape[0]
            return torch.stack(
                [
                    self.loss_of(
                        {name: tensor[b] for name, tensor in params.items()}, images[b, minibatch], labels[b, minibatch]
                    )
                    for b in range(meta_batch)
                ]
            )

        return MetaBatch(params, loss)

    def loss_of(self, params, images, labels):
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        return F.cross_entropy(functional_call(self.network, params | buffers, (images,)), labels)


def small_network():
    """The same kinds of layers, for a trial run."""
    return to_meta(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(8, 10),
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=("resnet18", "resnet34", "resnet50"), default="resnet18")
    parser.add_argument("--unroll", type=int, default=20, help="steps in the window (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    parser.add_argument("--batch", type=int, default=8, help="images in a minibatch (default 8)")
    parser.add_argument("--side", type=int, default=64, help="pixels along a side (default 64)")
    parser.add_argument("--smoke", action="store_true", help="a network of three layers instead, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    network, classes = (
        (small_network(), 10) if arguments.smoke else (getattr(resnet_meta, arguments.architecture)(), 1000)
    )
    batch = NetworkProblem(network, classes, arguments.batch, arguments.side).sample(1)
    N = sum(tensor.numel() for tensor in batch.params.values())
    net = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1)
    small = {"warm": torch.zeros(1, 256)}  # compiles the kernels
    meta_gradient(
        net,
        MetaBatch(small, lambda params, step: params["warm"].sin().sum(1)),
        small,
        net.init_state(256),
        unroll=arguments.unroll,
    )
    before, state = peak_megabytes(), net.init_state(N)
    start = time.perf_counter()
    grads, info = meta_gradient(net, batch, batch.params, state, unroll=arguments.unroll)
    seconds = time.perf_counter() - start
    peak, rate = peak_megabytes(), copy_rate()
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    print(
        "| optimizee | coordinates | steps | seconds | ns per coordinate and step | state, GB | peak of the process, "
        "GB | before the window, GB | moving a step's bytes, s |\n|" + " --- |" * 9
    )
    name = "a small network" if arguments.smoke else f"meta-{arguments.architecture}"
    name += f", batch {arguments.batch}, {arguments.side}×{arguments.side}"
    print(
        f"| {name} | {N:,} | {arguments.unroll} | {seconds:.3g} | {1e9 * seconds / N / arguments.unroll:.0f} | "
        f"{sum(part.nbytes for part in state) / 1e9:.2f} | {peak * 2**20 / 1e9:.2f} | "
        f"{before * 2**20 / 1e9:.2f} | {N * bytes_of_step(net) / rate:.2g} |"
    )
    print(f"\nlosses: {info.losses[0].item():.3f} at step 0, {info.losses[-1].item():.3f} at step {arguments.unroll}")


if __name__ == "__main__":
    main()
