"""What `Grad_buffer.ipynb` runs: its settings at each scale, and its learned optimizers, trained here or loaded as shipped.

Like the command line, and unlike the rest of the package, it stands above the modules at the root.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gradbuffer.contracts import Problem
from gradbuffer.training.run import History
from meta_plots import LiveFigure, plot_history
from meta_training import meta_train
from optimizers import load_optimizer, pretrained_optimizers, save_optimizer

__all__ = ["SCALES", "Scale", "choose_scale", "train_or_load"]


@dataclass(frozen=True)
class Scale:
    """How long to train and how many functions to average over.

    Args:
        name: of the scale.
        loop: meta-updates of the loop that the notebook writes out.
        training: dict from learned optimizer to options of `meta_train`, beside those in `RECIPES`.
        loaded: learned optimizers that are loaded as shipped, since training takes long.
        steps: of the races; the longer ones are on MNIST alone.
        test, tuning: dict from problem to how many functions.
        lrs: learning rates to try, in tuning; None searches wider.
        sizes: options of `compare_final`, and the numbers of hidden units.
    """

    name: str
    loop: int
    training: dict
    loaded: tuple
    steps: tuple
    test: dict
    tuning: dict
    lrs: list | None
    sizes: dict


RECIPES = {  # learned optimizer -> options of `meta_train` at every scale
    "quadratics": dict(lr=0.005, clip=30.0),
    "quadratics_odd": dict(lr=0.005, clip=30.0, averaging=0.98),
    "mnist": dict(lr=0.005, clip=20.0, meta_batch=1, replay_fraction=1 / 16),
    "mnist_imitated": dict(lr=0.005, clip=1000.0, meta_batch=2, unroll=20, warmup=10, seed=1),
    "mnist_learned": dict(
        lr=0.002, clip=10.0, meta_batch=4, averaging=0.98, adjoint_bound=1.5, skip_non_finite=5, seed=1
    ),
    "mnist_from_nag": dict(clip=10.0, meta_batch=2, averaging=0.98, adjoint_bound=1.5),
}
RATES = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]  # for the many networks of one figure
LONG = dict(steps=200, unroll=50)
SHORT = dict(steps=20, unroll=10, validation_functions=2)
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="smoke",
            loop=2,
            training={
                "quadratics": dict(SHORT, meta_batch=4, iterations=10),
                "quadratics_odd": dict(SHORT, meta_batch=4, iterations=4),
                "mnist": dict(SHORT, iterations=5),
                "mnist_imitated": dict(SHORT, iterations=2),
                "mnist_learned": dict(SHORT, iterations=1),
                "mnist_from_nag": dict(SHORT, iterations=1, lr=2e-3),
            },
            loaded=(),
            steps=(20, 40),
            test=dict(quadratics=4, mnist=2),
            tuning=dict(quadratics=4, mnist=1),
            lrs=[0.01, 0.1, 1.0],
            sizes=dict(units=[5, 10], tuning_functions=1, num_functions=2, lrs=[0.01, 0.1, 1.0]),
        ),
        Scale(
            name="quick",
            loop=300,
            training={
                "quadratics": dict(meta_batch=64, iterations=1500, validation_functions=256, validation_every=150),
                "quadratics_odd": dict(meta_batch=64, iterations=800, validation_functions=256, validation_every=100),
                "mnist": dict(iterations=300, validation_functions=4, validation_every=50),
                "mnist_imitated": dict(steps=200, iterations=105, validation_functions=4, validation_every=105),
                "mnist_learned": dict(LONG, iterations=30, warmup=5, validation_functions=4, validation_every=15),
                "mnist_from_nag": dict(
                    LONG, iterations=30, lr=7e-4, warmup=5, validation_functions=8, validation_every=15
                ),
            },
            loaded=("mnist", "mnist_imitated", "mnist_learned", "mnist_from_nag"),
            steps=(100, 200),
            test=dict(quadratics=500, mnist=16),
            tuning=dict(quadratics=256, mnist=4),
            lrs=None,
            sizes=dict(units=[5, 20, 50], tuning_functions=2, num_functions=8, lrs=RATES),
        ),
        Scale(
            name="paper",
            loop=1000,
            training={
                "quadratics": dict(meta_batch=128, iterations=6000, validation_functions=512, validation_every=300),
                "quadratics_odd": dict(meta_batch=128, iterations=6000, validation_functions=512, validation_every=250),
                "mnist": dict(iterations=2500, validation_functions=16, validation_every=250),
                "mnist_imitated": dict(steps=200, iterations=420, validation_functions=8, validation_every=105),
                "mnist_learned": dict(LONG, iterations=1600, warmup=20, validation_functions=16, validation_every=40),
                "mnist_from_nag": dict(
                    LONG, iterations=80, lr=2e-3, warmup=10, validation_functions=16, validation_every=16
                ),
            },
            loaded=(),
            steps=(100, 200),
            test=dict(quadratics=10_000, mnist=100),
            tuning=dict(quadratics=512, mnist=8),
            lrs=None,
            sizes=dict(units=[5, 10, 20, 30, 40, 50], tuning_functions=2, num_functions=10, lrs=RATES),
        ),
    )
}
STARTS = ("as the scale says", "train", "shipped")


def choose_scale() -> Scale:
    """The scale that the environment variable L2O_SCALE names, by default "quick"."""
    name = os.environ.get("L2O_SCALE", "quick")
    if name not in SCALES:
        raise ValueError(f"L2O_SCALE must be one of {list(SCALES)}, got {name!r}")
    return SCALES[name]


def train_or_load(
    name: str, net: nn.Module, problem: Problem, scale: Scale, folder: str | Path = "checkpoints", **options: Any
) -> tuple[nn.Module, History | None]:
    """A learned optimizer of the notebook: trained here, with a live figure, or loaded as it is shipped. Says which, in a line.

    What is loaded at a scale is in `Scale.loaded`; the environment variable L2O_START says otherwise: "train" trains all, "shipped"
    loads all. A network with other settings than the shipped one's is trained in any case. Training keeps a checkpoint and goes on
    from there in the next run, or begins anew where something was changed.

    Args:
        name: of the optimizer, as in `RECIPES`.
        net: the untrained network; trained in place, on the problem's device.
        problem: what to train on.
        scale: see `choose_scale`.
        folder: for the checkpoint and the trained weights.
        options: of `meta_train`, before those of the recipe and the scale.

    Returns:
        (network, history); history is None for a network that was loaded.

    Raises:
        ValueError: L2O_START is neither.
    """
    start = os.environ.get("L2O_START", STARTS[0])
    if start not in STARTS:
        raise ValueError(f"L2O_START must be one of {list(STARTS[1:])}, got {start!r}")
    notes, reason = pretrained_optimizers().get(name), ""
    if start == "shipped" or (start == STARTS[0] and name in scale.loaded):
        shipped = load_optimizer(name) if notes else None
        if shipped is not None and (type(shipped), shipped.config) == (type(net), net.config):
            print(f"{name}: loaded, not trained here. Its training: {notes['command']}")
            return shipped.to(problem.device), None
        reason = ", since the shipped one has other settings" if notes else ", since none is shipped"
    recipe = dict(RECIPES[name])
    if str(problem.device).startswith("cuda"):  # a share of the coordinates saves a CPU's time; a GPU has time for all
        recipe.pop("replay_fraction", None)
    settings = {"seed": 0, **recipe, **scale.training[name], **options}
    path = Path(folder) / f"{name}_{scale.name}"
    title = f"{name}: meta-training on {problem.name} ({scale.name} scale)"
    live = LiveFigure(lambda _, history: plot_history(history, title))
    begun = time.perf_counter()
    history = meta_train(
        net,
        problem,
        device=problem.device,
        callback=live,
        progress=False,
        checkpoint=f"{path}.run",
        on_mismatch="restart",
        **settings,
    )
    live.finish(len(history.meta_loss), history)
    numbers = {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str, type(None)))}
    save_optimizer(
        net,
        f"{path}.safetensors",
        problem=problem.name,
        validation=history.best_validation,
        settings=numbers,
        seed=settings["seed"],
    )
    print(
        f"{name}: trained here{reason}: {len(history.meta_loss)} windows, {time.perf_counter() - begun:.0f} s; "
        f"validation {history.best_validation:.4g} (sum of the loss), kept at window {history.best_iteration}"
    )
    return net, history
