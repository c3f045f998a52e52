"""The benchmark of Chen et al. 2020 (arXiv 2010.09089): five problems, over horizons far beyond those of training.

    python benchmarks/published.py                                         # MNIST, sigmoid, to 1,000 steps: some minutes
    python benchmarks/published.py --problems sigmoid relu layers --functions 4 --published FOLDER
    python benchmarks/published.py --steps 100 1000 10000 --functions 1

As in their released code: weights from N(0, 0.01²), minibatches of 128 drawn from the test split (10,000 images). FOLDER has their trained
optimizers as arrays, dm*.npz and rnnprop*.npz, see `published_optimizer`. All optimizers get the same functions; every loss is the mean of
the last 20 steps up to 100, and of the last 100 up to later marks. NAG and Adam have the rate with the best loss at the last mark but at
most at step 1,000, of other functions; Adam with 0.001 is the baseline of theirs.

A second table has what is used with a rate and a schedule: small learned optimizers (`--annealed`), the same before their meta-training,
AdamW and NAG. Each tries as many rates, √10 apart, on other functions (up to `--tuning-steps` at most), and anneals the rate to 0 on a
cosine that ends at the mark: a training of its own for each mark.

    python benchmarks/published.py --problems sigmoid relu layers convolutions cifar10 --steps 100 1000 10000 --functions 1 --nets
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradbuffer.contracts import in_parts
from gradbuffer.data.cifar10 import load_cifar10
from gradbuffer.data.mnist import load_mnist
from gradbuffer.evaluation import TunedBaseline
from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
from gradbuffer.problems.images import Given, ImageNets, MinibatchLoss, mean_cross_entropy
from gradbuffer.problems.races import Contestant, final
from gradbuffer.problems.tasks import Task
from meta_training import compare, tune_baselines
from optimizees import MNISTNet
from optimizers import CoordinatewiseLSTM, LearnedOptimizer, RNNProp, load_optimizer

STD, BATCH, CHANNELS = 0.01, 128, (16, 32)
RATES_TRIED = 5
BASELINES = {"NAG": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}), "Adam": (torch.optim.Adam, {})}
RATES = [0.001, 0.01, 0.1, 1.0]  # the search goes on between those beside the best, and past an edge


class SmallConvolutions(ImageNets):
    """Their convolutional network: 3×3 to 16 channels and 5×5 to 32, a linear layer, and a ReLU on the scores too.

    After each convolution batch normalization (by the minibatch), ReLU and max pooling over 2×2; nothing is padded.

    Args:
        images, labels: (n, channels, side, side) in [0, 1] and (n,).
        stride: of the convolutions: 1 on MNIST, 2 on CIFAR-10.
        name: for titles.
    """

    def __init__(self, images, labels, stride, name, device="cpu"):
        self.options = dict(images=images, labels=labels, stride=stride, name=name, batch_size=BATCH)
        self.device = torch.device(device)
        self.images, self.labels, self.name = images.to(device), labels.to(device), name
        side, inputs, self.shapes = images.shape[-1], images.shape[1], {}
        for layer, (channels, kernel) in enumerate(zip(CHANNELS, (3, 5))):
            self.shapes |= {f"conv{layer}.weight": (channels, inputs, kernel, kernel)}
            self.shapes |= {f"conv{layer}.{part}": (channels,) for part in ("bias", "scale", "shift")}
            side, inputs = ((side - kernel) // stride + 1) // 2, channels
        self.shapes |= {"fc.weight": (inputs * side**2, 10), "fc.bias": (10,)}

    def to(self, device):
        images, labels, stride, name, _ = self.options.values()
        return SmallConvolutions(images, labels, stride, name, device)

    def sample(self, meta_batch, generator=None):
        params = {}
        for name, shape in self.shapes.items():
            draw = torch.full((meta_batch, *shape), float(name.endswith("scale")))
            if name.endswith("weight"):
                draw.normal_(0, STD, generator=generator)
            params[name] = draw.to(self.device)
        return in_parts(params, SmallConvolutionsLoss(self.minibatches(meta_batch, generator), self.options["stride"]))


class SmallConvolutionsLoss(MinibatchLoss):
    """Mean cross-entropy of B such networks, one after the other."""

    def __init__(self, minibatch, stride):
        super().__init__(minibatch)
        self.stride = stride

    def __call__(self, params, step):
        images, labels = self.minibatch(step)
        scores = [self.scores({name: tensor[b] for name, tensor in params.items()}, x) for b, x in enumerate(images)]
        return mean_cross_entropy(torch.stack(scores).mT, labels)

    def scores(self, params, x):
        """(batch, classes) of one network."""
        for layer in range(len(CHANNELS)):
            weight, bias, scale, shift = (
                params[f"conv{layer}.{part}"] for part in ("weight", "bias", "scale", "shift")
            )
            x = F.conv2d(x, weight, bias, self.stride)
            x = F.max_pool2d(F.batch_norm(x, None, None, scale, shift, training=True, eps=1e-3).relu(), 2)
        return (x.flatten(1) @ params["fc.weight"] + params["fc.bias"]).relu()


def make_problem(name, root):
    """One of `PROBLEMS`, on the test split."""
    if name in PERCEPTRONS:
        return MNISTNet(**PERCEPTRONS[name], split="test", init_std=STD, root=root)
    if name == "convolutions":
        data = load_mnist(root)
        side = int(data.test_images.shape[1] ** 0.5)
        return SmallConvolutions(data.test_images.view(-1, 1, side, side), data.test_labels, 1, f"{data.name}, {name}")
    data = load_cifar10(root)
    return SmallConvolutions(data.test_images / 255, data.test_labels, 2, f"{data.name}, convolutions")


PERCEPTRONS = {"sigmoid": {}, "relu": {"activation": "relu"}, "layers": {"hidden_sizes": (20, 20)}}
PROBLEMS = (*PERCEPTRONS, "convolutions", "cifar10")


def published_optimizer(path):
    """A `CoordinatewiseLSTM`, or, where the name of the file begins with rnnprop, an `RNNProp`, with the weights of their file.

    Keys: lstm_1.w_gates (inputs + 20, 80), which reads the input first and then the hidden state, and lstm_1.b_gates, the same of lstm_2;
    linear.w (20, 1), linear.b; of RNNprop input_projection.w (2, 20) and .b too. Gates come in the order input, candidate, forget,
    output; their code adds 1 to the forget gate's bias.
    """
    arrays = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    units = len(arrays["linear.w"])
    if Path(path).name.startswith("rnnprop"):
        net = RNNProp(units, 2, beta=0.95, output_scale=0.01)
        weights = {"input.weight": arrays["input_projection.w"].T, "input.bias": arrays["input_projection.b"]}
    else:
        net, weights = CoordinatewiseLSTM(units, 2, "log_sign", p=5.0, output_scale=0.01), {}
    for layer in range(2):
        both, bias = arrays[f"lstm_{layer + 1}.w_gates"].T, arrays[f"lstm_{layer + 1}.b_gates"]
        i, g, f, o = zip(both.chunk(4), bias.chunk(4))
        gates = torch.cat([weight for weight, _ in (i, f, g, o)])
        weights |= {
            f"lstm.weight_ih_l{layer}": gates[:, :-units],
            f"lstm.weight_hh_l{layer}": gates[:, -units:],
            f"lstm.bias_ih_l{layer}": torch.cat([i[1], f[1] + 1, g[1], o[1]]),
            f"lstm.bias_hh_l{layer}": torch.zeros(4 * units),
        }
    weights |= {"output.weight": arrays["linear.w"].T, "output.bias": arrays["linear.b"]}
    net.load_state_dict(weights)
    return net


def tuned_baselines(problem, steps, functions):
    """NAG and Adam at the best of some rates, and Adam as they have it."""
    tuned = tune_baselines(
        problem, steps, functions, seed=1000, baselines=BASELINES, lrs=RATES, progress=False, last=min(100, steps // 5)
    )
    found = {f"{name}, {baseline.options['lr']:.3g}": baseline for name, baseline in tuned.items()}
    return found | {"Adam, 0.001 as theirs": TunedBaseline(torch.optim.Adam, {"lr": 0.001}, {})}


def as_task(problem, batch=BATCH):
    """A problem's functions as a `Task`, for races."""
    names, loss, *_ = problem.sample(1, generator=torch.Generator())

    def draw(generator):
        chosen = torch.randint(len(problem.labels), (1, batch), generator=generator)
        return Given(problem.images[chosen], problem.labels[chosen])

    def make_model():
        return torch.nn.ParameterList([value[0] for value in problem.sample(1).params.values()])

    def loss_of(model, minibatch):
        return loss.on(minibatch)({name: value[None] for name, value in zip(names, model)}, 0)[0]

    return Task(make_model, draw, loss_of, "published", problem.name)


def with_start(name):
    """That optimizer, which must take a rate, and the same before its meta-training."""
    net = load_optimizer(name)
    if not isinstance(net, MLPOptimizer):
        raise ValueError(f"--annealed must name optimizers that take a rate, got {name}, a {type(net).__name__}")
    return net, start_as_normalized_adam(MLPOptimizer(**net.config))


def annealed(names):
    """dict from name to `Contestant`: those small learned optimizers, their starts, and two others, each around a rate of its own."""
    found = {}
    for name in names:
        found[f"ours: {name}"], found[f"the start of {name}"] = with_start(name)
    contestants = {
        name: Contestant(lambda params, lr, net=net: LearnedOptimizer(params, net, lr=lr), 0.009)
        for name, net in found.items()
    }
    contestants["AdamW"] = Contestant(lambda params, lr: torch.optim.AdamW(params, lr=lr), 0.01)
    contestants["NAG"] = Contestant(lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True), 0.1)
    return contestants


def print_annealed(problem, names, marks, functions, tuning, longest):
    heads = [f"{mark:,}" for mark in marks] + [f"ln at {mark:,}" for mark in marks if mark >= 1000]
    print(
        f"\n{problem.name}, a cosine and the best of {RATES_TRIED} rates for each mark, functions: {functions}\n\n"
        f"| optimizer | {' | '.join(heads)} |\n{'| --- ' * (len(heads) + 1)}|",
        flush=True,
    )
    task = as_task(problem)
    for name, contestant in annealed(names).items():
        ends, cells, tuned = {}, [], {}
        for mark in marks:
            length = min(mark, longest)
            if length not in tuned:
                seeds = range(1000, 1000 + tuning)
                tried = {
                    rate: sum(final(contestant.train(task, rate, length, seed)).item() for seed in seeds)
                    for rate in contestant.rates(RATES_TRIED)
                }
                tuned[length] = min(tried, key=tried.get)
            rate, rates = tuned[length], contestant.rates(RATES_TRIED)
            curves = torch.stack([contestant.train(task, rate, mark, seed) for seed in range(1, functions + 1)])
            ends[mark] = curves[:, mark - min(100, mark // 5) :].mean(1)
            cells.append(f"{spread(ends[mark], 5)} at {rate:.1g}{'e' * (rate in (rates[0], rates[-1]))}")
        cells += [f"{end.mean().log():.2f}" for mark, end in ends.items() if mark >= 1000]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_table(title, curves, marks):
    heads = [f"{mark:,}" for mark in marks] + [f"ln at {mark:,}" for mark in marks if mark >= 1000]
    print(f"\n{title}\n\n| optimizer | sum of 100 | {' | '.join(heads)} |\n{'| --- ' * (len(heads) + 2)}|")
    for name, losses in curves.items():
        ends = {mark: losses[:, mark - min(100, mark // 5) : mark].mean(1) for mark in marks}
        cells = [spread(losses[:, :100].sum(1), 2)] + [spread(end, 4) for end in ends.values()]
        cells += [f"{end.mean().log():.2f}" for mark, end in ends.items() if mark >= 1000]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def spread(values, digits):
    """Mean ± standard error, the latter if there are several."""
    error = f" ± {values.std() / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["sigmoid"])
    parser.add_argument("--nets", nargs="*", default=["mnist_learned", "mnist_from_nag", "mnist_long", "general_lstm"])
    parser.add_argument(
        "--annealed", nargs="*", default=["general"], help="small learned optimizers for the second table"
    )
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="of their optimizers as arrays")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these; default all in FOLDER")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000], help="the marks, each at least 100")
    parser.add_argument("--functions", type=int, default=4)
    parser.add_argument("--tuning-functions", type=int, default=2, help="for the baselines' rates; 0: no baselines")
    parser.add_argument(
        "--tuning-steps", type=int, default=1000, help="at most so many; rates of later marks are those found there"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the functions (default 1)")
    parser.add_argument("--data", help="data root (default $L2O_DATA, or data)")
    options = parser.parse_args()
    if min(options.steps) < 100:
        parser.error(f"--steps must be numbers of at least 100, got {options.steps}")
    if options.only and not options.published:
        parser.error("--only has no effect without --published")
    marks, nets = sorted(set(options.steps)), {f"ours: {name}": load_optimizer(name) for name in options.nets}
    if options.published:
        paths = sorted(options.published.glob("*.npz"))
        missing = set(options.only or ()) - {path.stem for path in paths}
        if missing or not paths:
            parser.error(f"{options.published} has no {', '.join(sorted(missing)) or '.npz file'}")
        nets |= {path.stem: published_optimizer(path) for path in paths if path.stem in (options.only or path.stem)}
    for name in options.problems:
        problem = make_problem(name, options.data)
        if options.annealed:
            functions, tuning = options.functions, max(options.tuning_functions, 1)
            print_annealed(problem, options.annealed, marks, functions, tuning, options.tuning_steps)
        if not nets:
            continue
        tuned = {}
        if options.tuning_functions:
            tuned = tuned_baselines(problem, min(marks[-1], options.tuning_steps), options.tuning_functions)
        curves = compare(nets, tuned, problem, marks[-1], options.functions, options.seed, progress=False)
        print_table(f"{problem.name}, functions: {options.functions}", curves, marks)


if __name__ == "__main__":
    main()
