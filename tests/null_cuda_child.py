"""What `test_cuda_null.py` runs in a child process on the null device: `null_cuda_child.py SCENARIO... `, a JSON line for each result.

A scenario is a generator of (name, figures) pairs.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import null_cuda
import torch
from cases import NETWORKS, PROBLEMS, RESNET18, make_net
from conftest import write_mnist

from gradbuffer.contracts import as_rule
from gradbuffer.kernels import triton_lstm, triton_mlp
from gradbuffer.problems.images import on_device as problems_on_device
from gradbuffer.training.cuda_graphs import CapturedWindow
from gradbuffer.unrolling import Coordinates
from meta_training import evaluate, meta_gradient, meta_train, tune_baseline
from optimizees import ConvexTerms, Mirrored, Mixture, MNISTNet, Quadratics, RandomScaling
from optimizers import (
    CoordinatewiseLSTM,
    LearnedOptimizer,
    MLPOptimizer,
    NormalizedLSTM,
    PerKind,
    RNNProp,
    explain,
    load_optimizer,
    start_as_normalized_adam,
)

UNROLL = 20
for kernels_of in (triton_lstm, triton_mlp):  # kernels that never run give no numbers
    kernels_of.SELF_CHECK = dict.fromkeys(kernels_of.SELF_CHECK, float("inf"))


def figures(work, times=2):
    """Launches and waits of one call, the first calls aside."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    null_cuda.reset()
    for _ in range(times):
        work()
    found = null_cuda.counts()
    return {"launches": null_cuda.launches(found) / times, "waits": null_cuda.waits(found) / times, "all": found}


def attempt(work):
    """{} if it runs, else what went wrong and where."""
    try:
        work()
        return {}
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in own[-3:])
        return {"error": f"{type(error).__name__}: {error} ({places})"}


@contextlib.contextmanager
def without_cudnn():
    """The null device has no convolutions in its cuDNN."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def log_sign():
    return CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1)


def windows(root):
    """Windows of the default path, at real sizes."""
    quadratics, mnist = Quadratics(device="cuda"), MNISTNet(root=root, device="cuda")
    for name, problem, make, functions in (
        ("quadratics x1", quadratics, CoordinatewiseLSTM, 1),
        ("quadratics x128", quadratics, CoordinatewiseLSTM, 128),
        ("MNIST x1", mnist, log_sign, 1),
        ("MNIST x128", mnist, log_sign, 128),
        ("MNIST x1, odd", mnist, lambda: CoordinatewiseLSTM(preprocess="log_sign", odd=True), 1),
        ("MNIST x1, RNNProp", mnist, RNNProp, 1),
        ("MNIST x1, NormalizedLSTM", mnist, NormalizedLSTM, 1),
    ):
        net, batch = make().cuda(), problem.sample(functions, torch.Generator().manual_seed(0))
        state = net.init_state(sum(tensor.numel() for tensor in batch.params.values()))
        yield name, figures(lambda: meta_gradient(net, batch, batch.params, state, unroll=UNROLL), 1)


def optimizer(root):
    """`LearnedOptimizer.step` on the parameters of ResNet-18, one group."""
    params = [torch.nn.Parameter(torch.zeros(shape, device="cuda")) for shape in RESNET18]
    for param in params:
        param.grad = torch.zeros_like(param)
    nets = {"LSTM": log_sign, "MLP": lambda: start_as_normalized_adam(MLPOptimizer()), "RNNProp": RNNProp}
    nets |= {name: functools.partial(load_optimizer, name) for name in ("general", "general_lstm")}
    for name, make in nets.items():
        optimizer = LearnedOptimizer(params, make().cuda(), lr=0.001)
        yield name, figures(optimizer.step, 1)
        del optimizer
    yield "Adam", figures(torch.optim.Adam(params, fused=True).step, 1)


def training(root):
    """Iterations of `meta_train`, without validations: those of 12 less those of 4."""
    for name, make, problem in (
        ("quadratics", CoordinatewiseLSTM, Quadratics()),
        ("MNIST", log_sign, MNISTNet(root=root)),
        ("NormalizedLSTM", NormalizedLSTM, MNISTNet(root=root)),
    ):
        for graph in (False, True, None):
            found = []
            for iterations in (4, 4, 12):
                null_cuda.reset()
                options = dict(
                    steps=100,
                    unroll=UNROLL,
                    meta_batch=4,
                    validation_every=100,
                    validation_functions=2,
                    cuda_graph=graph,
                )
                meta_train(make(), problem, device="cuda", iterations=iterations, progress=False, **options)
                found.append(null_cuda.counts())
            few, many = ({"launches": null_cuda.launches(own), "waits": null_cuda.waits(own)} for own in found[1:])
            label = {False: "", True: ", graph", None: ", by default"}[graph]
            yield f"{name}{label}", {key: (many[key] - few[key]) / 8 for key in few}


class Waiting(torch.nn.Module):
    """A network of a user's own whose work depends on values: it cannot be captured."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.1))

    def init_state(self, num_coordinates):
        return ()

    def forward(self, grad, state):
        return (-self.rate * grad if grad.abs().max().item() < 1e9 else 0 * grad), state


def uncaptured(root):
    """A run of a network that cannot be captured: what it warns of, and whether it comes to its end."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        history = meta_train(Waiting().cuda(), Quadratics(), steps=4, unroll=2, iterations=6, meta_batch=2,
                             validation_functions=2, progress=False, device="cuda")  # fmt: skip
    texts = [str(warning.message) for warning in found]
    yield (
        "a network that waits",
        {"iterations": len(history.meta_loss), "warnings": [text for text in texts if "CUDA graphs" in text]},
    )


def captures(root):
    """Every network on every problem as a graph."""
    with without_cudnn():
        for network in NETWORKS:
            for problem in PROBLEMS:

                def work():
                    net, batch = (
                        make_net(network).cuda(),
                        PROBLEMS[problem](root).to("cuda").sample(2, torch.Generator().manual_seed(3)),
                    )
                    coordinates = Coordinates(batch.params)
                    state = as_rule(net, coordinates).init_state(sum(coordinates.sizes))
                    window = CapturedWindow(net, batch, batch.params, state, 3)
                    window(batch, batch.params, state)

                null_cuda.reset()
                found = attempt(work)
                refused = [what for what in null_cuda.counts() if what.startswith("refused")]
                yield f"{network} on {problem}", {**found, **({"refused": refused} if refused else {})}


def kernels(root):
    """What is chosen on CUDA, and why not the others."""
    yield "explain", {"text": explain(log_sign().cuda())}
    for name in ("general", "general_lstm"):
        yield f"explain {name}", {"text": explain(load_optimizer(name).cuda())}
    yield "explain RNNProp", {"text": explain(RNNProp().cuda())}
    os.environ["L2O_KERNELS"] = "torch"
    net, batch = log_sign().cuda(), MNISTNet(root=root, device="cuda").sample(4, torch.Generator().manual_seed(0))
    state = net.init_state(sum(tensor.numel() for tensor in batch.params.values()))
    yield "torch", figures(lambda: meta_gradient(net, batch, batch.params, state, unroll=UNROLL), 1)
    for tf32 in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            yield f"TF32 {tf32}", figures(lambda: meta_gradient(net, batch, batch.params, state, unroll=2), 1)
    del os.environ["L2O_KERNELS"]


def uploads(root):
    """Functions drawn for a device, and evaluation."""
    for name, problem in (("quadratics", Quadratics(device="cuda")), ("MNIST", MNISTNet(root=root, device="cuda"))):
        generator = torch.Generator().manual_seed(0)

        def draw():
            batch = problem.sample(4, generator)
            batch.loss(batch.params, 0)

        yield f"sample {name}", figures(draw)
    data = problems_on_device.cache_info().currsize
    net = log_sign().cuda()
    yield (
        "evaluate MNIST",
        figures(lambda: evaluate(net, MNISTNet(root=root, device="cuda"), steps=10, num_functions=32)),
    )
    yield "data sets", {"before": data, "after": problems_on_device.cache_info().currsize}


def public(root):
    """Public functions by every way, on the device and with it as the default device: what raises is an error of devices."""
    quadratics, mnist = Quadratics(device="cuda"), MNISTNet((5,), root=root, device="cuda")
    options = dict(progress=False, iterations=3, steps=4, unroll=2, meta_batch=2, validation_functions=2, device="cuda")
    methods = [
        dict(),
        dict(second_order=True),
        dict(method="autograd", second_order=True),
        dict(method="pes"),
        dict(objective="log"),
    ]
    made = {name: lambda name=name: make_net(name).float() for name in NETWORKS}
    made["PerKind"] = lambda: PerKind({"all": CoordinatewiseLSTM(3)}, {"*": "all"})
    for name, make in made.items():
        for method in methods:
            yield f"{name} {method}", attempt(lambda: meta_train(make(), mnist, **options, **method))
        yield f"{name} evaluated", attempt(lambda: evaluate(make().cuda(), mnist, 4, 3))
        yield f"{name} in evaluation mode", attempt(lambda: meta_train(make().eval(), quadratics, **options))
        if name not in ("PerKind", "subspace"):  # names; a solver of cuSOLVER's, which the null device lacks
            yield f"{name} as an optimizer", attempt(lambda: train_by(make()))
    more = {
        "a share": dict(replay_fraction=0.5),
        "a bound": dict(second_order=True, adjoint_bound=1.5),
        "averages": dict(averaging=0.9),
        "horizons": dict(horizons=(1, 2)),
        "a teacher": dict(teacher=(torch.optim.Adam, {"lr": 0.01}), imitation=1.0),
        "a learned teacher": dict(teacher=log_sign(), imitation=1.0),
    }
    for name, extra in more.items():
        yield name, attempt(lambda: meta_train(log_sign(), mnist, **options, **extra))
    varied = {
        "mirrored": Mirrored(mnist),
        "scaled": RandomScaling(mnist, signs=True),
        "convex": ConvexTerms(quadratics),
        "mixed": Mixture([quadratics, mnist]),
    }
    for name, problem in varied.items():
        for method in methods[:4]:
            yield f"{name} {method}", attempt(lambda: meta_train(log_sign(), problem, **options, **method))
    for name in ("mirrored", "scaled", "convex"):
        lrs = dict(lrs=[0.1, 0.2, 0.3], steps=3, num_functions=2, device="cuda")
        yield f"{name} tuned", attempt(lambda: tune_baseline(torch.optim.SGD, varied[name], **lrs))
        yield f"{name} evaluated", attempt(lambda: evaluate(log_sign().cuda(), varied[name], 4, 2))
    with tempfile.TemporaryDirectory() as folder:

        def resume():
            for iterations in (3, 5):
                saved = dict(checkpoint=f"{folder}/run", checkpoint_every=1, on_mismatch="restart")
                meta_train(log_sign(), mnist, **{**options, "steps": 8, "iterations": iterations}, **saved)

        yield "a checkpoint", attempt(resume)
    with without_cudnn():
        cifar = PROBLEMS["convolutions"](root).to("cuda")
        yield "convolutions", attempt(lambda: evaluate(make_net("LSTM, log_sign, odd").cuda(), cifar, 3, 2))
    torch.set_default_device("cuda")
    for name, problem in {**varied, "MNIST": mnist, "quadratics": quadratics}.items():
        for method in methods[:2]:
            yield (
                f"default device, {name} {method}",
                attempt(lambda: meta_train(log_sign(), problem, **options, **method)),
            )
    yield "default device, evaluated", attempt(lambda: evaluate(log_sign(), mnist, 4, 3))
    for name, make in made.items():
        yield f"default device, {name}", attempt(lambda: meta_train(make(), mnist, **options))
    yield (
        "default device, a CPU's network",
        attempt(lambda: evaluate(log_sign().cpu(), Quadratics(device="cpu"), 4, 3, device="cpu")),
    )
    torch.set_default_device(None)


def train_by(net):
    model = torch.nn.Linear(3, 2).cuda()
    named = LearnedOptimizer(model.named_parameters(), net)
    for _ in range(2):
        named.zero_grad()
        model(torch.ones(4, 3, device="cuda")).square().sum().backward()
        named.step()
    named.load_state_dict(named.state_dict())
    named.step()


SCENARIOS = {
    function.__name__: function
    for function in (windows, optimizer, training, uncaptured, captures, kernels, uploads, public)
}


def main():
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        big = write_mnist(Path(folder) / "big")
        for scenario in sys.argv[1:]:
            for name, found in SCENARIOS[scenario](big):
                print(json.dumps([scenario, name, found]), flush=True)


if __name__ == "__main__":
    main()
