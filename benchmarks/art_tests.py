"""pretrained/neural_art beside tuned Adam, on photographs, a style and an image size that it was not trained on.

    python benchmarks/art_tests.py                   # 100 functions in each of the three tests: half an hour and more
    python benchmarks/art_tests.py --tests style     # only that one
    python benchmarks/art_tests.py --baselines Adam NAG RMSprop SGD

The tests are those of examples/neural_art.ipynb, at its scale `quick`: features of a small VGG-11 with random weights, 128
steps. Both get the same photographs. Baselines get the learning rate with the lowest loss at the last step on `--tuning`
functions of the same style and size, of validation photographs, or where there are none, of other test photographs.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import table_head, table_row

from gradbuffer.evaluation import BASELINES, compare, tune_baselines
from gradbuffer.problems.neural_art import NeuralArt
from optimizers import load_optimizer

FEATURES = dict(network="vgg11", weights="random", content_layer="relu2_1", style_layers=("relu1_1", "relu2_1"))
TESTS = {
    "test": ("new photographs", dict(style="starry_night", size=64)),
    "style": ("a new style", dict(style="candy", size=64)),
    "large": ("128×128 pixels", dict(style="starry_night", size=128)),
}
RATES = [0.01, 0.1, 1.0]  # where the tuning begins, as in the notebook
TUNING_SEED, TEST_SEED = 1, 2016


def last(losses):
    """ "mean ± standard error" over functions."""
    return f"{losses.mean():.3g} ± {losses.std() / len(losses) ** 0.5:.2g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="neural_art", help="a file or a name in pretrained/ (default neural_art)")
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
