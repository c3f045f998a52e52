"""The training of the small learned optimizer that is under way: many families of perceptrons on 8×8 images, by evolution strategies.

    python gradbuffer/pretrained/runs/general_mlp.py --seconds 3600 [--threads 2]

goes on from `general_mlp.pt` beside it (weights, their running average, Adam's state, what was measured; functions in progress are
begun anew), or begins, and writes it every 100 steps. Data as for MNIST and CIFAR-10 (L2O_DATA). `meta_train` does the work; here are
the families, the parts of the training, and what is kept of a run. What it has learned is scored every 500 steps on tasks of the same
kinds: the mean loss of the last 50 of 500 steps with a cosine, at the best of five rates, as a geometric mean over them.
"""

import argparse
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE)]

from general_mlp_families import (  # noqa: E402
    make_broad_families,
    make_families,
    make_large_families,
    make_low_families,
    make_network_families,
    make_random_families,
    small_images,
)

from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam  # noqa: E402
from gradbuffer.training.checkpoints import read_checkpoint  # noqa: E402
from gradbuffer.training.episodic_run import EpisodicRun  # noqa: E402
from gradbuffer.training.options import training_of  # noqa: E402
from meta_training import Episodes, EpisodicES, meta_train  # noqa: E402
from optimizees import Mixture  # noqa: E402

WARMUP, EVERY = 100, 100


class Families(Mixture):
    """Those of a dict from name to problem, of which some are drawn at each step; others are for validation."""

    def __init__(self, trained, watched, families, weights=None):
        super().__init__(list(trained.values()), weights=weights, families=families)
        self.names, self.watched = list(trained), Mixture(list(watched.values()))

    def validation_problem(self):
        return self.watched


# What is kept of a run --------------------------------------------------------------------------------------------------


def split(net, flat):
    """A dict from name to the tensor's part of a flat vector."""
    sizes = [parameter.numel() for parameter in net.parameters()]
    return {name: part.view_as(value).clone() for (name, value), part in zip(net.named_parameters(), flat.split(sizes))}


def joined(parts):
    return torch.cat([part.flatten() for part in parts])


def take_up(run, state):
    """Set a run to where the state left it; functions are begun anew."""
    families = run.problem.families
    run.net.load_state_dict(split(run.net, state["weights"]))
    run.averaged.load_state_dict(split(run.net, state["averaged"]))
    run.best = split(run.net, state["averaged"])
    moments = state["adam"]["state"].get(0)
    for name, parameter in run.net.named_parameters() if moments else ():
        # gradients are sums over families here, means in the state
        first, second = split(run.net, moments["exp_avg"]), split(run.net, moments["exp_avg_sq"])
        run.adam.state[parameter] = {
            "step": moments["step"].clone(),
            "exp_avg": first[name] * families,
            "exp_avg_sq": second[name] * families**2,
        }
    run.sizes = {place: state["scale"][name] for place, name in enumerate(run.problem.names) if name in state["scale"]}
    run.iteration = run.history.best_iteration = state["k"]
    for record in ("meta_loss", "grad_norm", "lr", "update_size", "signal_to_noise"):
        vars(run.history)[record][:] = [math.nan] * state["k"]


def state_of(content, net, problem, before):
    """The state that a checkpoint's content is, after those that were measured before."""
    moments = [content["adam"]["state"][place] for place in range(len(list(net.parameters())))]
    adam = {
        "step": moments[0]["step"],
        "exp_avg": joined([part["exp_avg"] for part in moments]) / problem.families,
        "exp_avg_sq": joined([part["exp_avg_sq"] for part in moments]) / problem.families**2,
    }
    group = {**content["adam"]["param_groups"][0], "params": [0]}
    measured = [(k, {"geometric mean": score}) for k, score in content["history"]["validation"]]
    return {
        "k": content["iteration"],
        "weights": joined(content["net"].values()),
        "averaged": joined(content["averaged"].values()),
        "adam": {"state": {0: adam}, "param_groups": [group]},
        "scale": {problem.names[place]: size for place, size in content["sizes"].items()},
        "history": {**before, "validation": before["validation"] + measured},
        "config": net.config,
    }


def save(state, path):
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--second", action="store_true", help="the second part, from where the first has come to")
    parser.add_argument("--third", action="store_true", help="likewise, with orthogonal updates and a context")
    parser.add_argument("--fifth", action="store_true", help="from there, half of the families other networks")
    parser.add_argument("--sixth", action="store_true", help="from there, with 120 perceptrons of random forms more")
    parser.add_argument("--fourth", action="store_true", help="from there, more families, about one rate")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    form = given.third or given.fourth or given.fifth or given.sixth
    net = start_as_normalized_adam(MLPOptimizer(orthogonalize=form, context=form))
    data = small_images()
    latest, more, trained, watched = make_families(data)
    start = joined(net.parameters()).detach()
    episodes, lr, families, fall, end, every = Episodes(), 3e-4, 4, 0, None, 500
    if given.second:  # more families, rates nearer to those that users choose, and an end
        trained, lr, families, end = more | trained, 5e-4, 5, 16000
        episodes = Episodes(lengths=(150, 1200), rates=(5e-4, 2e-2), scales=(1e-2, 1e2), falling=0.85)
        start = torch.load(HERE / "general_mlp.pt")["averaged"].clone()
    if given.third:  # from the first part's weights, the context's as at the start
        trained, lr, families, every = more | trained, 5e-4, 5, 1000
        fall, end = 22500, 40000  # from 14,000 to 22,000 steps at the full rate validation stood still
        episodes = Episodes(lengths=(100, 1500), rates=(5e-4, 3e-2), scales=(1e-2, 1e2), falling=0.85, late=0.75)
        first = torch.load(HERE / "general_mlp.pt")["averaged"]
        start[: len(first)] = first
    if given.fourth:  # near one rate, so that what it reads of the rate tells it how far the schedule has come
        trained = make_large_families(data) | make_broad_families(data) | latest | more | trained
        lr, families, fall, end, every = 5e-4, 6, 1000, 9000, 1000
        episodes = Episodes(lengths=(150, 2000), rates=(7e-3, 1.4e-2), scales=(1e-2, 1e2), falling=0.95, late=0.75)
        start = torch.load(HERE / "general_mlp_third.pt")["averaged"]
    weights = None
    if (
        given.fifth or given.sixth
    ):  # half of them other networks than perceptrons; of perceptrons as many on pictures as on other data
        trained = make_low_families() | make_large_families(data) | make_broad_families(data) | latest | more | trained
        for name in ("sum of two", "digits tanh", "digits deep relu"):  # their losses end at what rounding leaves
            trained.pop(name)
        watched.pop("digits five")
        if given.sixth:
            trained |= make_random_families(list(trained.values()))
        pictures = [problem.inputs.shape[1] == 64 for problem in trained.values()]
        weights = [1 / (sum(pictures) if picture else len(pictures) - sum(pictures)) for picture in pictures]
        others = make_network_families(data)
        trained, weights = trained | others, weights + [2 / len(others)] * len(others)
        lr, families, fall, end, every = 1e-3, 5, 800, 2200, 500
        if given.sixth:
            lr, fall, end, every = 5e-4, 12000, 20000, 1000
        episodes = Episodes(lengths=(150, 2000), rates=(1.5e-2, 4.5e-2), scales=(1e-2, 1e2), falling=1.0, late=0.75)
        start = torch.load(HERE / f"general_mlp_{'fifth' if given.sixth else 'fourth'}.pt")["averaged"]
    part = (
        "_sixth" * given.sixth
        + "_fifth" * given.fifth
        + "_fourth" * given.fourth
        + "_second" * given.second
        + "_third" * given.third
    )
    path = given.state or HERE / f"general_mlp{part}.pt"
    state = {
        "k": 0,
        "weights": start,
        "averaged": start,
        "adam": {"state": {}},
        "scale": {},
        "history": {"validation": []},
    }
    if path.exists():
        state = torch.load(path)
    if given.third and state["k"] >= 25000:
        trained = latest | trained
    if given.fourth and state["k"] >= 4900:  # where its losses had come to be lowest
        episodes = replace(episodes, rates=(2e-2, 4.5e-2))
    problem, begun = Families(trained, watched, families, weights), time.time()

    def schedule(iteration, iterations):
        gone = max(0.0, (iteration - fall) / (end - fall)) if end else 0.0
        return min(1.0, (iteration + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * gone))

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        options = dict(
            steps=500,
            unroll=50,
            meta_batch=8,
            iterations=end or 10**6,
            seed=state["k"],
            clip=float(families),
            balance=True,
            averaging=0.9995,
            method=EpisodicES(episodes=episodes),
            meta_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
            schedule=schedule,
            validation_every=every,
            validation_functions=4,
            checkpoint=checkpoint,
            checkpoint_every=EVERY,
        )
        run = EpisodicRun(net, problem, training_of(net, **options))
        take_up(run, state)
        run.save()

        def follow(done, history):
            if done % every == 0:
                print(done, round(time.time() - begun), history.validation[-1][1], flush=True)
            if done % EVERY == 0 or done == end:
                save(state_of(read_checkpoint(checkpoint, run.settings), net, problem, state["history"]), path)
                if time.time() - begun > given.seconds:
                    raise KeyboardInterrupt

        meta_train(net, problem, callback=follow, progress=False, **options)


if __name__ == "__main__":
    main()
