"""Draws the README's figure: `python docs/make_figures.py`, two minutes on one core. MNIST lies where L2O_DATA says.

Loss curves of two optimizers that come with the library, beside hand-designed ones. The learning rates of these have the lowest
mean loss over the steps 90 to 99 on other functions: of another seed, on MNIST over the validation half of the images.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from meta_plots import plot_curves  # noqa: E402
from meta_training import compare, tune_baselines  # noqa: E402
from optimizees import MNISTNet, Quadratics  # noqa: E402
from optimizers import load_optimizer  # noqa: E402

FIGURE = Path(__file__).with_name("figures") / "curves.png"
PANELS = {  # title: optimizer, problem to tune on, problem to race on, functions
    "Quadratics in 10 dimensions": ("quadratics_odd", Quadratics(), Quadratics(), 1000),
    "MNIST, 784-20-10 with sigmoid": ("mnist_learned", MNISTNet(split="validation"), MNISTNet(split="test"), 20),
}


def draw(path=FIGURE):
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for ax, (title, (name, tuning, test, functions)) in zip(axes, PANELS.items()):
        tuned = tune_baselines(tuning, num_functions=max(8, functions // 4), last=10)
        curves = compare({"learned (LSTM)": load_optimizer(name)}, tuned, test, num_functions=functions)
        for kind, losses in curves.items():
            rate = f"lr {tuned[kind].options['lr']:.3g}" if kind in tuned else ""
            print(f"{title}: {kind} {rate}: sum {losses.sum(1).mean():.2f}, steps 90 to 99 {losses[:, 90:].mean():.4f}")
        plot_curves(curves, f"{title}: {functions} new functions", ax, tuned=tuned, legend=ax is axes[1])
    figure.savefig(path, dpi=90)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size


if __name__ == "__main__":
    draw()
