"""pretrained/neural_art beside tuned Adam, on photographs, a style and an image size that it was not trained on.

    python benchmarks/art_tests.py                   # 100 functions in each of the three tests: half an hour and more
    python benchmarks/art_tests.py --tests style     # only that one
    python benchmarks/art_tests.py --baselines Adam NAG RMSprop SGD

The tests are those of examples/neural_art.ipynb, at its scale `quick`: features of a small VGG-11 with random weights, 128
steps. Both get the same photographs. Baselines get the learning rate with the lowest loss at the last step on `--tuning`
functions of the same style and size, of validation photographs, or where there are none, of other test photographs.

    python benchmarks/art_tests.py --annealed general --tests test style --functions 20

has what is used with a rate and a schedule instead: a small learned optimizer, the same before its meta-training, Adam and NAG, each with
the best of five rates, √10 apart, for the last loss on those functions, and a cosine; and the LSTM of before, its updates times the best of
five factors.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from published import with_start
from timing import table_head, table_row

from gradbuffer.evaluation import BASELINES, compare, tune_baselines
from gradbuffer.problems.neural_art import NeuralArt
from gradbuffer.problems.races import Contestant
from gradbuffer.problems.tasks import Task
from optimizers import LearnedOptimizer, load_optimizer

FEATURES = dict(network="vgg11", weights="random", content_layer="relu2_1", style_layers=("relu1_1", "relu2_1"))
TESTS = {
    "test": ("new photographs", dict(style="starry_night", size=64)),
    "style": ("a new style", dict(style="candy", size=64)),
    "large": ("128×128 pixels", dict(style="starry_night", size=128)),
}
RATES = [0.01, 0.1, 1.0]  # where the tuning begins, as in the notebook
TUNING_SEED, TEST_SEED = 1, 2016


def task_of(problem):
    """Its functions, each a photograph, as a `Task`."""

    def make_model():
        batch = problem.sample(1)
        model = torch.nn.ParameterList([batch.params["image"][0]])
        model.loss = batch.loss
        return model

    return Task(
        make_model, lambda generator: 0, lambda model, step: model.loss({"image": model[0][None]}, step)[0], "", ""
    )


def annealed(name):
    """dict from name to `Contestant`, rates around those that suit images of unit variance."""
    nets = dict(zip((name, "its start"), with_start(name)))
    found = {
        key: Contestant(lambda params, lr, own=own: LearnedOptimizer(params, own, lr=lr), 0.3)
        for key, own in nets.items()
    }
    lstm = load_optimizer("neural_art")
    found["neural_art"] = Contestant(lambda params, lr: LearnedOptimizer(params, lstm, lr=lr), 1.0, "constant")
    found["Adam"] = Contestant(lambda params, lr: torch.optim.Adam(params, lr=lr), 0.3)
    found["NAG"] = Contestant(lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True), 3.0)
    return found


def race_annealed(title, problem, others, options):
    task, tuning, ours = task_of(problem), task_of(others), None
    for name, contestant in annealed(options.annealed).items():
        tried = {
            rate: sum(
                contestant.train(tuning, rate, options.steps, 1000 + seed)[-1].item() for seed in range(options.tuning)
            )
            for rate in contestant.rates(5)
        }
        rate = min(tried, key=tried.get)
        seeds = range(options.functions)
        losses = torch.stack([contestant.train(task, rate, options.steps, seed)[-1] for seed in seeds])
        ours = losses if ours is None else ours
        beside = (last(ours - losses), f"{(ours < losses).float().mean():.0%}") if ours is not losses else ("–", "–")
        edge = "e" * (rate in (min(tried), max(tried)))
        table_row(title, options.functions, f"{name}, lr {rate:.2g}{edge}", last(losses), *beside)


def last(losses):
    """ "mean ± standard error" over functions."""
    return f"{losses.mean():.3g} ± {losses.std() / len(losses) ** 0.5:.2g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="neural_art", help="a file or a name in pretrained/ (default neural_art)")
    parser.add_argument("--annealed", metavar="NAME", help="a small learned optimizer, raced with a rate and a cosine")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS), help="default all")
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=["Adam"], help="default Adam")
    parser.add_argument("--functions", type=int, default=100, help="in each test (default 100)")
    parser.add_argument("--tuning", type=int, default=4, help="functions to tune on (default 4)")
    parser.add_argument("--steps", type=int, default=128, help="default 128, those it was trained for")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    net, steps = load_optimizer(arguments.net), arguments.steps
    table_head(
        "test", "functions", "optimizer", f"loss at step {steps - 1}", "learned - it, paired", "learned is lower in"
    )
    for name in arguments.tests:
        title, settings = TESTS[name]
        problem = NeuralArt(split="test", **FEATURES, **settings)
        others = problem if name == "large" else problem.with_split("validation")
        if arguments.annealed:
            race_annealed(title, problem, others, arguments)
            continue
        tuned = tune_baselines(
            others,
            steps,
            arguments.tuning,
            TUNING_SEED,
            lrs=RATES,
            progress=False,
            baselines={baseline: BASELINES[baseline] for baseline in arguments.baselines},
        )
        curves = compare({"learned": net}, tuned, problem, steps, arguments.functions, TEST_SEED, progress=False)
        ours = curves["learned"][:, -1]
        for label, losses in curves.items():
            rate = f", lr {tuned[label].options['lr']:.3g}" if label in tuned else ""
            beside = (
                (last(ours - losses[:, -1]), f"{(ours < losses[:, -1]).float().mean():.0%}") if rate else ("–", "–")
            )
            table_row(title, arguments.functions, label + rate, last(losses[:, -1]), *beside)


if __name__ == "__main__":
    main()
