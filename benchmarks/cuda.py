"""Checks on one GPU all that is said about CUDA, then times it beside what the card reaches: one command, under eight minutes.

    python benchmarks/cuda.py                        # --device cpu rehearses it on a machine without a GPU, in a minute or two
    python benchmarks/cuda.py --only windows steps   # some sections alone; --seconds 460 for all of them

First, side by side on all cores, what must be right: every way to the meta-gradient of every network on every problem is on the
device what it is on the CPU, the Triton kernels are what float64 gives, captured windows are those launched one by one,
`LearnedOptimizer` takes the CPU's steps, the marked tests pass. Then, with the GPU to itself, times: whole windows, iterations of
training, a step on ResNet-18's parameters, each beside its floor: the bytes that must be moved at the rate of a large copy, or the
multiplications at the rate of a large product. Every section has its own time limit, and goes on alone. Lines begin with PASS, FAIL, TIME
or NOTE; the command fails if a line says FAIL. Needs no network and no data: images are generated.
"""

import argparse
import contextlib
import copy
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

METHODS = {
    "replay": {},
    "log": {"objective": "log"},
    "share": {"replay_fraction": 0.5},
    "second order": {"second_order": True},
    "bound": {"second_order": True, "adjoint_bound": 1.5},
    "autograd": {"method": "autograd"},
    "autograd, second order": {"method": "autograd", "second_order": True},
    "pes": {"method": "pes"},
}
PARTS = 4  # processes that the equalities are divided among
DEVICE, DATA = "cuda", ""  # set by `main`


def say(kind, name, text=""):
    print(f"{kind} {name}{': ' if text else ''}{text}", flush=True)


@contextlib.contextmanager
def attempt(name):
    """What fails is noted, and the rest goes on."""
    try:
        yield
    except Exception as error:
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        say("FAIL", name, f"{type(error).__name__}: {str(error)[:200]} {places[-3:]}".replace("\n", " "))


def check(name, error, limit):
    say("PASS" if error <= limit else "FAIL", name, f"relative error {error:.1e}, limit {limit:.0e}")  # NaN fails


def distance(found, wanted):
    """The largest relative distance, in norm, of tensors in a dict; tiny ones against the largest."""
    scale = max(tensor.double().norm().item() for tensor in wanted.values()) or 1.0
    return max(
        (found[name].double().cpu() - tensor.double().cpu()).norm().item()
        / max(tensor.double().norm().item(), 1e-3 * scale)
        for name, tensor in wanted.items()
    )


@contextlib.contextmanager
def kernels_are(name):
    before = os.environ.get("L2O_KERNELS")
    os.environ["L2O_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("L2O_KERNELS")
        os.environ |= {} if before is None else {"L2O_KERNELS": before}


def kinds():
    return ("torch", "triton") if DEVICE == "cuda" else ("torch",)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seconds(run, repetitions=5, limit=5.0):
    """Median wall-clock seconds of a call, the device idle before and after; two calls warm up."""
    times, begin = [], time.perf_counter()
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    for number in range(repetitions + 2):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
        if number >= 2 and time.perf_counter() - begin > limit:
            break
    return statistics.median(times[min(2, len(times) - 1) :])


def milliseconds(value):
    return f"{1e3 * value:.3g} ms"


# What must be right ---------------------------------------------------------------------------------------------------


def equal(part):
    """Two windows of every network on every problem by every method: on the device what they are on the CPU."""
    from cases import NETWORKS, PROBLEMS, make_net

    from gradbuffer.contracts import as_rule
    from gradbuffer.unrolling import Coordinates
    from meta_training import meta_gradient

    def windows(network, problem, device, options, moved=0.0):
        net = make_net(network).to(device)
        batch = PROBLEMS[problem](DATA).to(device).sample(2, generator(3))
        noise = {name: torch.randn(tensor.shape, generator=generator(1)) for name, tensor in batch.params.items()}
        own = {name: tensor * (1 + moved * noise[name].to(tensor)) for name, tensor in batch.params.items()}
        batch = batch._replace(params=own) if moved else batch
        coordinates, params = Coordinates(batch.params), batch.params
        state, found = as_rule(net, coordinates).init_state(sum(coordinates.sizes)), {}
        for window in range(2):
            drawn = generator(window)
            grads, info = meta_gradient(net, batch, params, state, 3 * window, 3, generator=drawn, **options)
            params, state = info.params, info.state
            found |= {f"{window} {name}": grad for name, grad in grads.items()} | {f"{window}": info.losses}
        return found

    for network, problem in list(itertools.product(NETWORKS, PROBLEMS))[part::PARTS]:
        for method, options in METHODS.items():
            name = f"equal, {network} on {problem}, {method}"
            with attempt(name):
                with kernels_are("torch"):
                    try:
                        wanted = windows(network, problem, "cpu", options)
                    except ValueError:  # a network without that method
                        continue
                for kind in kinds():
                    with kernels_are(kind):
                        error = distance(windows(network, problem, DEVICE, options), wanted)
                    limit = 1e-4 if method == "pes" else 1e-9
                    if error > limit:  # where a CPU's own numbers move as far when the start does by a rounding
                        with kernels_are("torch"):
                            limit = max(limit, 100 * distance(windows(network, problem, "cpu", options, 1e-15), wanted))
                    check(f"{name}, {kind}", error, limit)


def exactness(part):
    """Meta-gradients in float32 of the networks at their real sizes, against float64: of every kind of kernels, and of TF32."""
    from meta_training import meta_gradient

    for name, problem, make, functions in window_cases():
        if functions > 8:
            continue

        def grads(device, dtype):
            torch.manual_seed(0)
            net = make().to(device, dtype)
            batch = problem("cpu").sample(functions, generator())
            params = {key: tensor.to(device, dtype) for key, tensor in batch.params.items()}
            read = [
                tuple(
                    part.to(device, part.dtype if part.dtype == torch.int64 else dtype)
                    for part in batch.loss.tensors(step)
                )
                for step in range(6)
            ]
            loss = lambda own, step: batch.loss.of(read[step])(own, step)  # noqa: E731
            state = net.init_state(sum(tensor.numel() for tensor in params.values()))
            return meta_gradient(net, batch._replace(params=params, loss=loss), params, state, unroll=5)[0]

        with attempt(f"exactness, {name}"):
            with kernels_are("torch"):
                wanted, here = grads("cpu", torch.float64), grads("cpu", torch.float32)
            own = distance(here, wanted)
            for kind in kinds():
                for tf32 in (False, True):
                    with kernels_are(kind), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                        error = distance(grads(DEVICE, torch.float32), wanted)
                    label = (
                        f"exactness, {name}, {kind}, TF32 {'allowed' if tf32 else 'not allowed'} (a CPU's {own:.0e})"
                    )
                    check(label, error, 2e-2 if tf32 else max(1e-4, 30 * own))


def kernels(part):
    """The Triton kernels at their real blocks and several sizes, against float64 in torch."""
    from gradbuffer.kernels import triton_lstm
    from gradbuffer.kernels.torch_blocks import TorchLSTM
    from gradbuffer.kernels.triton_checks import flat
    from gradbuffer.kernels.triton_lstm import TritonLSTM

    if DEVICE != "cuda":
        return say("NOTE", "kernels", "Triton's run on a GPU; in its interpreter tests/test_lstm_triton.py runs them")
    for dtype, layers, hidden, inputs in (
        (torch.float32, 2, 20, 2),
        (torch.float32, 2, 20, 1),
        (torch.float32, 1, 20, 5),
        (torch.float64, 2, 20, 2),
        (torch.float32, 2, 32, 1),
    )[part::2]:
        torch.manual_seed(0)
        net = torch.nn.LSTM(inputs, hidden, layers).to(DEVICE, torch.float64)
        output = torch.randn(hidden, dtype=torch.float64).to(DEVICE), torch.randn((), dtype=torch.float64).to(DEVICE)
        own = copy.deepcopy(net).to(dtype), *(tensor.to(dtype) for tensor in output)
        for N, T in ((1, 1), (65, 3), (15_910, 20), (200_003, 5)):
            shapes = (T, inputs, N), (layers, hidden, N), (layers, hidden, N), (T, N)
            features, *state, adjoint = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)
            wide = [tensor.double() for tensor in (features, *state, adjoint)]
            for work in ("step", "replay"):
                name = f"kernel, {work} {str(dtype)[6:]} {layers}x{hidden} inputs {inputs}, {N} coordinates"
                with attempt(name):
                    arguments, exact = (
                        (lambda a, b, all=all: all[0][0][:, a:b], *all[1:3])
                        if work == "step"
                        else (lambda a, b, all=all: all[0][..., a:b], *all[1:])
                        for all in ((features, *state, adjoint), wide)
                    )
                    wanted = flat(getattr(TorchLSTM(net, *output), work)(*exact))
                    found = flat(getattr(TritonLSTM(*own), work)(*arguments))
                    again = flat(getattr(TritonLSTM(*own), work)(*arguments))
                    named = lambda tensors: {str(k): tensor for k, tensor in enumerate(tensors)}  # noqa: E731
                    check(name, distance(named(found), named(wanted)), triton_lstm.SELF_CHECK[dtype] / 10)
                    if not all(map(torch.equal, found, again)):
                        say("FAIL", name, "two runs differ: a race?")


def nets_with_averages():
    from optimizers import NormalizedLSTM, RNNProp, load_optimizer

    general = load_optimizer("general_lstm")
    return {"RNNProp": RNNProp(), "NormalizedLSTM": NormalizedLSTM(num_layers=2), "general_lstm": general}


def averages(part, sizes=((1, 1), (65, 3), (15_910, 20), (200_003, 5))):
    """Readings of moving averages in Triton, in steps and in replays, against float64 in torch; of states at several ages."""
    from optimizers import explain

    if DEVICE != "cuda":
        return say(
            "NOTE", "averages", "Triton's run on a GPU; tests/test_triton_averages.py runs them in the interpreter"
        )

    def work(net, kind, dtype, N, T):
        net, scales = copy.deepcopy(net).to(DEVICE, dtype), torch.logspace(-6, 0, N, dtype=torch.float64)
        draw = lambda seed: torch.randn(T, N, generator=generator(seed), dtype=torch.float64)  # noqa: E731
        grads, adjoint = (scales * draw(1)).to(DEVICE, dtype), draw(2).to(DEVICE, dtype)
        with kernels_are(kind), torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if kind == "triton" and "readings: triton" not in explain(net):
                say("FAIL", f"averages, {type(net).__name__}", explain(net).replace("\n", " "))
            first = net.replay(grads, net.init_state(N), adjoint)
            take, state, _ = net.recorder(net.init_state(N), T)
            found = {"updates": torch.stack([take(grad).clone() for grad in grads])}
            found |= dict(zip(("hidden", "cells", "averages"), map(torch.clone, state)))
            found |= first | {f"later {name}": part for name, part in net.replay(grads, state, adjoint).items()}
        return found

    for (name, net), (N, T) in itertools.product(nets_with_averages().items(), sizes):
        label = f"averages, {name}, {N} coordinates, {T} steps"
        with attempt(label):
            wanted = work(net, "torch", torch.float64, N, T)
            found, again = (work(net, "triton", torch.float32, N, T) for _ in range(2))
            check(label, distance(found, wanted), 3e-4)
            if not all(torch.equal(found[key], again[key]) for key in found):
                say("FAIL", label, "two runs differ: a race?")
            check(f"{label}, float64", distance(work(net, "triton", torch.float64, N, T), wanted), 1e-9)


def graphs(part):
    """Captured windows are those launched one by one."""
    from cases import NETWORKS, PROBLEMS, make_net

    from gradbuffer.contracts import as_rule
    from gradbuffer.training.cuda_graphs import CapturedWindow
    from gradbuffer.unrolling import Coordinates
    from meta_training import meta_gradient

    if DEVICE != "cuda":
        return say("NOTE", "graphs", "need a CUDA device; tests/test_cuda_graphs.py plays them back on a CPU")
    for network, problem in itertools.product(NETWORKS, PROBLEMS):
        name = f"graph, {network} on {problem}"
        with attempt(name):
            net, own = make_net(network).to(DEVICE), PROBLEMS[problem](DATA).to(DEVICE)
            first = own.sample(2, generator())
            coordinates = Coordinates(first.params)
            state = as_rule(net, coordinates).init_state(sum(coordinates.sizes))
            window, worst = CapturedWindow(net, first, first.params, state, 4), 0.0
            for seed in (1, 2):
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter *= 1.1
                batch = own.sample(2, generator(seed))
                grads, info = window(batch, batch.params, state, 4)
                wanted, expected = meta_gradient(net, batch, batch.params, state, 4, 4)
                worst = max(worst, distance(grads, wanted), distance({"": info.losses}, {"": expected.losses}))
            check(name, worst, 1e-9)


def optimizer(part):
    """`LearnedOptimizer` on the device takes the CPU's steps."""
    from optimizers import LearnedOptimizer, RNNProp, load_optimizer

    def run(device, net, dtype, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(30, 200), torch.nn.Tanh(), torch.nn.Linear(200, 3)).to(
            device, dtype
        )
        x, y = torch.randn(16, 30, dtype=dtype).to(device), torch.randn(16, 3, dtype=dtype).to(device)
        steps = LearnedOptimizer(model.named_parameters(), copy.deepcopy(net).to(dtype), **options)
        for _ in range(4):
            steps.zero_grad()
            (model(x) - y).square().mean().backward()
            steps.step()
            steps.load_state_dict(steps.state_dict())
        return {str(k): parameter.detach() for k, parameter in enumerate(model.parameters())}

    nets = {
        "mnist": (load_optimizer("mnist"), {}),
        "general_lstm": (load_optimizer("general_lstm"), {}),
        "RNNProp": (RNNProp(), {}),
        "general": (load_optimizer("general"), {}),
    }
    nets["mnist, state in bfloat16"] = load_optimizer("mnist"), {"state_dtype": torch.bfloat16}
    for (name, (net, options)), dtype, kind in itertools.product(nets.items(), (torch.float64, torch.float32), kinds()):
        label = f"LearnedOptimizer, {name}, {str(dtype)[6:]}, {kind}"
        with attempt(label):
            with kernels_are("torch"):
                wanted = run("cpu", net, dtype, **options)
            with kernels_are(kind), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found = run(DEVICE, net, dtype, **options)
            check(
                label,
                distance(found, wanted),
                2e-2 if "bfloat16" in name or name == "general" else 1e-8 if dtype == torch.float64 else 1e-3,
            )


def tests(part):
    """The tests that are marked for a device."""
    if DEVICE != "cuda":
        return say("NOTE", "tests", "those marked cuda need one")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--tb=line",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    say("PASS" if done.returncode == 0 else "FAIL", "tests marked cuda", last)
    if done.returncode:
        print(done.stdout[-4000:])


# Times ----------------------------------------------------------------------------------------------------------------


def rates():
    """What this machine reaches: bytes a second of a copy (read and written), operations a second of products."""
    size, side = (1 << 28, 8192) if DEVICE == "cuda" else (1 << 24, 1024)
    source = torch.empty(size, device=DEVICE)
    target = torch.empty_like(source)
    found = {"copy": 2 * 4 * size / seconds(lambda: target.copy_(source))}
    a, b = torch.randn(2, side, side, device=DEVICE)
    found["float32"] = 2 * side**3 / seconds(lambda: a @ b)
    if DEVICE == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        found["TF32"] = 2 * side**3 / seconds(lambda: a @ b)
        torch.backends.cuda.matmul.allow_tf32 = False
        a, b = a.bfloat16(), b.bfloat16()
        found["bfloat16"] = 2 * side**3 / seconds(lambda: a @ b)
    return found


def machine(part):
    found = rates()
    products = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in found.items() if name != "copy")
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU"
    say(
        "TIME",
        f"{card}, torch {torch.__version__}",
        f"copy {found['copy'] / 1e12:.3g} TB/s; products {products} TFLOP/s",
    )
    if DEVICE == "cuda":
        x = torch.zeros(1000, device=DEVICE)
        launch = seconds(lambda: [x.add_(1) for _ in range(1000)]) / 1000
        read = seconds(lambda: [x[0].item() for _ in range(100)]) / 100
        say("TIME", "a launch", f"{1e6 * launch:.2g} us; a value read {1e6 * read:.2g} us")
        from optimizers import CoordinatewiseLSTM, explain

        print(explain(CoordinatewiseLSTM(preprocess="log_sign").to(DEVICE)))


def window_cases():
    from optimizees import MNISTNet, Quadratics
    from optimizers import CoordinatewiseLSTM

    log_sign = lambda: CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1)  # noqa: E731
    quadratics = lambda device: Quadratics(device=device)  # noqa: E731
    mnist = lambda device: MNISTNet(root=DATA, device=device)  # noqa: E731
    return [
        ("quadratics x1", quadratics, CoordinatewiseLSTM, 1),
        ("quadratics x128", quadratics, CoordinatewiseLSTM, 128),
        ("MNIST x1", mnist, log_sign, 1),
        *([("MNIST x128", mnist, log_sign, 128)] if DEVICE == "cuda" else []),
    ]


def windows(part):
    """Whole windows of 20 steps, and iterations of training, beside three forward passes' multiplications."""
    from gradbuffer.training.cuda_graphs import CapturedWindow
    from meta_training import meta_gradient, meta_train

    product, unroll = rates()["float32"], 20 if DEVICE == "cuda" else 3
    for name, problem, make, functions in window_cases():
        times, own = {}, problem(DEVICE)
        for kind in kinds():
            with attempt(f"window, {name}, {kind}"), kernels_are(kind):
                net, batch = make().to(DEVICE), own.sample(functions, generator())
                N = sum(tensor.numel() for tensor in batch.params.values())
                state = net.init_state(N)
                times[kind] = seconds(lambda: meta_gradient(net, batch, batch.params, state, unroll=unroll))
                if DEVICE == "cuda" and functions * (name != "quadratics x128") < 128:
                    captured = CapturedWindow(net, batch, batch.params, state, unroll)
                    times[f"{kind}, a graph"] = seconds(lambda: captured(batch, batch.params, state))
                for graph in (False, True) if DEVICE == "cuda" and functions < 128 else (False,):
                    marks, count = [], 16 if DEVICE == "cuda" else 4
                    options = dict(
                        unroll=unroll, steps=5 * unroll, validation_every=1000, validation_functions=2, progress=False
                    )
                    meta_train(
                        make(), own, meta_batch=functions, iterations=count, device=DEVICE, cuda_graph=graph, **options,
                        callback=lambda k, history: marks.append(time.perf_counter()),
                    )  # fmt: skip
                    steps = [after - before for before, after in itertools.pairwise(marks[count // 4 : -1])]
                    times[f"{kind}, an iteration{' by graphs' * graph}"] = statistics.median(steps)
        numbers = sum(parameter.numel() for parameter in net.parameters())
        floor = 3 * 2 * numbers * N * unroll / product
        found = "; ".join(f"{kind} {milliseconds(value)}" for kind, value in times.items())
        say("TIME", f"window of {unroll}, {name}", f"{found}; its multiplications in float32 {milliseconds(floor)}")


def steps(part):
    """One optimizer step on parameters of ResNet-18's shapes, beside Adam's and the bytes that must be moved."""
    from cases import RESNET18

    from optimizers import LearnedOptimizer, RNNProp, load_optimizer

    shapes = RESNET18 if DEVICE == "cuda" else RESNET18[:8]
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    N, copying = sum(map(torch.numel, params)), rates()["copy"]
    fused = {"fused": True} if DEVICE == "cuda" else {}
    say(
        "TIME",
        f"step of {N:,} coordinates, AdamW",
        milliseconds(seconds(torch.optim.AdamW(params, lr=1e-6, **fused).step)),
    )
    for kind, name in itertools.product(kinds(), ("mnist", "general_lstm", "RNNProp", "general")):
        with attempt(f"step, {name}, {kind}"), kernels_are(kind):
            net = (RNNProp() if name == "RNNProp" else load_optimizer(name)).to(DEVICE)
            own = LearnedOptimizer(params, net, lr=1e-6)
            value = seconds(own.step, 5, 8.0)
            read = sum(
                leaf.nbytes for state in own.state.values() for leaf in state.values() if isinstance(leaf, torch.Tensor)
            )
            floor = (2 * read + 3 * 4 * N) / copying
            say(
                "TIME",
                f"step of {N:,} coordinates, {name}, {kind}",
                f"{milliseconds(value)}; its bytes {milliseconds(floor)}",
            )
            del own


def readings(part):
    """Windows of networks that read moving averages, and the kernels that make readings alone, beside the bytes they move."""
    from gradbuffer.training.cuda_graphs import CapturedWindow
    from meta_training import meta_gradient
    from optimizees import MNISTNet

    problem, unroll, copying = MNISTNet(root=DATA, device=DEVICE), 20 if DEVICE == "cuda" else 2, rates()["copy"]
    for name, net in nets_with_averages().items():
        net, times = net.to(DEVICE), {}
        batch = problem.sample(1, generator())
        N = sum(tensor.numel() for tensor in batch.params.values())
        for kind in kinds():
            with attempt(f"window, {name}, {kind}"), kernels_are(kind):
                given = net, batch, batch.params, net.init_state(N)
                times[kind] = seconds(lambda: meta_gradient(*given, unroll=unroll), 3, 4.0)
                if DEVICE == "cuda":
                    captured = CapturedWindow(*given, unroll)
                    times[f"{kind}, a graph"] = seconds(lambda: captured(*given[1:]), 3, 4.0)
        found = "; ".join(f"{kind} {milliseconds(value)}" for kind, value in times.items())
        say("TIME", f"window of {unroll}, MNIST x1, {name}", found)
        if DEVICE != "cuda":
            continue
        with attempt(f"readings, {name}"), kernels_are("triton"), torch.no_grad():
            N, T = 1 << 20, 20
            grads, state = torch.randn(T, N, device=DEVICE), net.init_state(N)
            reader = net.kernels().reader(net, "read")
            features = reader.read(grads, state[2])
            floor = (grads.nbytes + features.nbytes) / copying
            value = seconds(lambda: reader.read(grads, state[2]))
            say("TIME", f"readings of {T} x {N}, {name}", f"{milliseconds(value)}; its bytes {milliseconds(floor)}")
            if net.averages.layer is not None:
                value = seconds(lambda: reader.pull_layer(grads, state[2], features))
                say(
                    "TIME",
                    f"their layer's gradients, {name}",
                    f"{milliseconds(value)}; its bytes {milliseconds(floor)}",
                )
            value = seconds(lambda: reader.step(grads[0], state, state))
            floor = (2 * sum(part.nbytes for part in state) + 2 * grads[0].nbytes) / copying
            say("TIME", f"step of {N} coordinates, {name}", f"{milliseconds(value)}; its bytes {milliseconds(floor)}")


def profile(part):
    """Where the device's time goes: the kernels that take most of a window, and of a step, and what the host takes."""
    from cases import RESNET18
    from torch.profiler import ProfilerActivity

    from meta_training import meta_gradient
    from optimizers import LearnedOptimizer, load_optimizer

    if DEVICE != "cuda":
        return say("NOTE", "profile", "needs a CUDA device")
    work = {}
    for name, problem, make, functions in window_cases():
        net, batch = make().to(DEVICE), problem(DEVICE).sample(functions, generator())
        state = net.init_state(sum(tensor.numel() for tensor in batch.params.values()))
        work[f"window, {name}"] = lambda net=net, batch=batch, state=state: meta_gradient(
            net, batch, batch.params, state, unroll=20
        )
    for name in ("mnist", "general_lstm", "general"):
        params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in RESNET18]
        for param in params:
            param.grad = 1e-3 * torch.randn_like(param)
        work[f"step, {name}"] = LearnedOptimizer(params, load_optimizer(name).to(DEVICE), lr=1e-6).step
    for name, run in work.items():
        with attempt(f"profile, {name}"):
            run(), run()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                run()
                torch.cuda.synchronize()
            events = [event for event in found.key_averages() if event.self_device_time_total > 0]
            events.sort(key=lambda event: -event.self_device_time_total)
            total, launches = (
                sum(event.self_device_time_total for event in events),
                sum(event.count for event in events),
            )
            say("TIME", f"profile, {name}", f"{launches} pieces of work on the device, {total / 1e3:.3g} ms")
            for event in events[:9]:
                print(f"    {event.self_device_time_total / 1e3:8.3f} ms {event.count:6d} x {event.key[:90]}")


CHECKS = {
    "equal": (equal, PARTS, 200),
    "exactness": (exactness, 1, 150),
    "kernels": (kernels, 2, 200),
    "averages": (averages, 1, 200),
    "graphs": (graphs, 1, 200),
}
CHECKS |= {"optimizer": (optimizer, 1, 120), "tests": (tests, 1, 240)}
TIMES = {
    "machine": (machine, 1, 60),
    "windows": (windows, 1, 120),
    "steps": (steps, 1, 90),
    "readings": (readings, 1, 90),
    "profile": (profile, 1, 60),
}
SECTIONS = CHECKS | TIMES


def child(name, part, limit, arguments):
    """One part of a section in a process of its own: what it printed, and a line if it did not come to an end."""
    command = [
        sys.executable,
        __file__,
        "--section",
        name,
        "--part",
        str(part),
        "--device",
        arguments.device,
        "--data",
        DATA,
    ]
    start, environment = time.perf_counter(), {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, env=environment
            ).returncode
            ended = "" if code == 0 else f"FAIL {name} {part}: ended with {code}\n"
        except subprocess.TimeoutExpired:
            ended = f"FAIL {name} {part}: stopped after {limit:.0f} s\n"
        file.seek(0)
        text = file.read()
    return f"--- {name} {part}, {time.perf_counter() - start:.0f} s\n{text}{ended}"


def main():
    global DEVICE, DATA
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=460, help="for all sections")
    for hidden in ("--section", "--part", "--data"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    DEVICE, DATA = arguments.device, arguments.data or ""
    warnings.simplefilter("ignore")
    if arguments.section:
        return SECTIONS[arguments.section][0](int(arguments.part))
    from conftest import write_mnist

    end, texts = time.perf_counter() + arguments.seconds, []
    with tempfile.TemporaryDirectory() as folder:
        DATA = str(write_mnist(Path(folder), train=2000, test=500))

        def run(job):
            name, part = job
            left = min(SECTIONS[name][2], end - time.perf_counter())
            text = child(name, part, left, arguments) if left > 5 else f"FAIL {name} {part}: no time left\n"
            print(text, flush=True)
            texts.append(text)

        for sections, at_once in ((CHECKS, max((os.cpu_count() or 2) * 2 // 3, 1)), (TIMES, 1)):
            jobs = [(name, part) for name in sections if name in arguments.only for part in range(sections[name][1])]
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(run, jobs))
    lines = [line for text in texts for line in text.splitlines()]
    count = {kind: sum(line.startswith(f"{kind} ") for line in lines) for kind in ("PASS", "FAIL")}
    print(f"=== {count['PASS']} checks passed, {count['FAIL']} failed")
    print("\n".join(line for kind in ("FAIL", "NOTE", "TIME") for line in lines if line.startswith(f"{kind} ")))
    return int(count["FAIL"] > 0)


if __name__ == "__main__":
    sys.exit(main())
