"""Races on small tasks of many kinds: a learned optimizer, Adam, AdamW, NAG and Muon, each at the best of five rates.

    python benchmarks/tasks.py --net general                                  # a name in pretrained/
    python benchmarks/tasks.py --net weights.pt --table tasks.md --figure tasks.png
    python benchmarks/tasks.py --net start --tasks gru resnet --seeds 2       # normalized Adam, before any meta-training

`--net` is "start", weights of an `MLPOptimizer` ({"averaged": flat} or {"weights": flat}, "config" beside it, in a file of
`torch.save`), or what `load_optimizer` reads. All optimizers have the same initial weights and minibatches; all but "Adam, constant"
anneal their rate by a cosine. Each tries as many rates, √10 apart around its own centre, on another seed; an e marks a
best rate at the end of those tried. "Speed against X": how many times more steps X needs to end as low; ≥ and ≤ mark
bounds (`gradbuffer.problems.races.speed_against`).
"""

import argparse
import copy
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradbuffer.problems.kept_apart import FIRST_KEPT_APART, KEPT_APART  # noqa: E402
from gradbuffer.problems.kept_apart_third import THIRD_KEPT_APART  # noqa: E402
from gradbuffer.problems.races import SPANS, Contestant, race, smooth, speed_against, summary  # noqa: E402
from gradbuffer.problems.tasks import GENERALIZATION, TASKS  # noqa: E402

LOTS = {"first": FIRST_KEPT_APART, "second": KEPT_APART, "third": THIRD_KEPT_APART}
ALL = TASKS | GENERALIZATION | FIRST_KEPT_APART | KEPT_APART | THIRD_KEPT_APART
OURS = "learned", "start", "lengths alone", "directions alone"
BASELINES = ("AdamW, cosine", "Adam, constant")  # speeds are taken against these, and against the own start


def hand_designed():
    """dict from name to `Contestant`."""

    def adam(kind):
        return lambda params, lr: kind(params, lr=lr, fused=True)

    contestants = {
        "Adam, constant": Contestant(adam(torch.optim.Adam), 0.003, "constant"),
        "Adam, cosine": Contestant(adam(torch.optim.Adam), 0.009),
        "AdamW, cosine": Contestant(adam(torch.optim.AdamW), 0.009),
        "NAG, cosine": Contestant(lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True), 0.05),
    }
    if hasattr(torch.optim, "Muon"):
        contestants["Muon, cosine"] = Contestant(muon, 0.009)
    return contestants


def muon(params, lr):
    """Muon for matrices, its steps as large as AdamW's; AdamW for the rest."""
    matrices, others = ([p for p in params if (p.dim() == 2) == wanted] for wanted in (True, False))
    optimizers = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=lr, fused=True))
    return optimizers


def learned(net, parts=False):
    """dict from name to `Contestant`: the learned optimizer and, where there is one, its start; with `parts` also what it has learned in
    parts: how long steps are, in the start's directions, and directions, in steps as long as the rate says."""
    from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
    from optimizers import LearnedOptimizer, load_optimizer

    def contestant(network, lr=0.003):
        return Contestant(lambda params, lr: LearnedOptimizer(params, network, lr=lr), lr)

    network = None if net == "start" else weights_in(net) or load_optimizer(net)
    if parts and not getattr(network, "context", False):
        raise ValueError(f"--parts needs an MLPOptimizer with a context, got --net {net}")
    if network is None:
        return {"start": contestant(start_as_normalized_adam(MLPOptimizer()))}
    if not isinstance(network, MLPOptimizer):
        return {"learned": contestant(network, lr=1.0)}
    start = start_as_normalized_adam(MLPOptimizer(**network.config))
    found = {"learned": contestant(network, lr=0.03), "start": contestant(start)}
    if parts:
        lengths, directions = copy.deepcopy(start), copy.deepcopy(network)
        with torch.no_grad():
            for name in ("context_weight_0", "context_bias_0"):
                lengths.layers[name].copy_(network.layers[name])
            for name in ("context_weight_1", "context_bias_1"):
                lengths.layers[name][..., -1] = network.layers[name][..., -1]
                directions.layers[name][..., -1] = 0
        found |= {"lengths alone": contestant(lengths, lr=0.03), "directions alone": contestant(directions, lr=0.009)}
    return found


def weights_in(net):
    """An `MLPOptimizer` of flat weights in a file of `torch.save`; None if it is none."""
    from gradbuffer.nets.mlp import MLPOptimizer

    if Path(net).suffix not in (".pt", ".pth", ".state"):
        return None
    content = torch.load(net, weights_only=True, map_location="cpu")
    found = [content[name] for name in ("averaged", "weights") if name in content]
    if not found:
        raise ValueError(f'--net must hold "averaged" or "weights", got {sorted(content)} in {net}')
    network = MLPOptimizer(**content.get("config", {}))
    count = sum(p.numel() for p in network.parameters())
    if found[0].shape != (count,):
        raise ValueError(
            f"--net must hold ({count},) weights of an MLPOptimizer, its config beside them, got "
            f"{tuple(found[0].shape)} in {net}"
        )
    torch.nn.utils.vector_to_parameters(found[0].detach(), network.parameters())
    return network


def run_task(name, options):
    """One task: its races by contestant, and speeds, a dict from (contestant, other) to a number."""
    torch.set_num_threads(1)
    contestants = learned(options.net, options.parts) | hand_designed()
    if options.contestants:
        contestants = {key: contestants[key] for key in contestants if key in (*OURS, *options.contestants)}
    seeds = range(options.seeds)
    races = race(
        {name: ALL[name]},
        contestants,
        options.rates,
        options.steps,
        seeds,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )[name]
    speeds, longer = {}, {}
    for ours in contestants:
        for other in (*BASELINES, "start"):
            if ours in OURS and other in races and other != ours:
                speeds[ours, other] = speed_against(
                    ALL[name], races[ours], contestants[other], races[other], seeds, longer.setdefault(other, {})
                )
    return races, speeds


def run_all(names, options):
    """`run_task` of each, in this order, as they are done."""
    if options.processes == 1:
        yield from (run_task(name, options) for name in names)
        return
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        yield from pool.map(run_task, names, [options] * len(names))


def bounded(value):
    """A speed, marked where it is a bound."""
    mark = "≥ " if value >= SPANS[-1] * 0.999 else "≤ " if value <= SPANS[0] * 1.01 else ""
    return f"{mark}{value:.2f}"


def report(results, options):
    """The tables, in Markdown."""
    names, pairs = map(list, next(iter(results.values())))

    def cell(name, contestant):
        races, _ = results[name]
        one = races[contestant]
        error = f" ± {one.error:.1g}" if options.seeds > 1 else ""
        text = f"{one.mean:.4g}{error} at {one.rate:.1g}{'e' * one.at_edge}"
        best = min(races, key=lambda key: races[key].mean) == contestant
        return (f"**{text}**" if best else text) + (f", {one.failures} failed" if one.failures else "")

    text = (
        f"{options.steps} steps, {options.seeds} seeds, the best of {options.rates} rates. Final losses, their "
        f"standard errors, and rates.\n\n{row('task', names)}{'| --- ' * (1 + len(names))}|\n"
    )
    text += "".join(row(name, [cell(name, key) for key in names]) for name in results)
    if pairs:
        head = [f"{ours} against {other}" for ours, other in pairs]
        text += f"\nSpeeds.\n\n{row('task', head)}{'| --- ' * (1 + len(pairs))}|\n"
        text += "".join(row(name, [bounded(speeds[pair]) for pair in pairs]) for name, (_, speeds) in results.items())
        summaries = [summary([speeds[pair] for _, speeds in results.values()]) for pair in pairs]
        text += "".join(row(f"*{key}*", [f"{one[key]:.2f}" for one in summaries]) for key in summaries[0])
        lower = [sum(races[a].mean < races[b].mean for races, _ in results.values()) / len(results) for a, b in pairs]
        text += row("*share of tasks with a lower loss*", [f"{share:.2f}" for share in lower])
    text += sensitivity(results, names, options.rates)
    failures = {name: sum(races[name].failures for races, _ in results.values()) for name in names}
    return text + (
        f"\nFailures (a loss that is not finite, or above that at the start), of "
        f"{len(results) * options.seeds} trainings: "
        f"{'; '.join(f'{name}: {count}' for name, count in failures.items())}.\n"
    )


def sensitivity(results, names, count):
    """What one rate for all tasks costs, on the seed for tuning, in Markdown."""
    tried = {name: [sorted(races[name].tried.items()) for races, _ in results.values()] for name in names}
    best = {name: [min(loss for _, loss in one) for one in some] for name, some in tried.items()}
    head = [f"rate {k + 1} of {count}" for k in range(count)]
    text = "\nThe same rate for all tasks: the loss over that at the task's best rate, median over tasks"
    against = BASELINES[0]
    text += f"; share of tasks below {against} at its best rate.\n\n" if against in names else ".\n\n"
    text += f"{row('optimizer', head)}{'| --- ' * (1 + count)}|\n"
    for name in names:
        cells = []
        for k in range(count):
            losses = [one[k][1] for one in tried[name]]
            cells.append(f"{statistics.median(a / max(b, 1e-12) for a, b in zip(losses, best[name])):.2f}")
            if against in names:
                cells[-1] += f"; {sum(a < b for a, b in zip(losses, best[against])) / len(losses):.0%}"
        text += row(f"{name}, from {tried[name][0][0][0]:.1g}", cells)
    return text


def row(title, cells):
    return f"| {title} | {' | '.join(cells)} |\n"


def draw(results, path):
    """Smoothed curves, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from gradbuffer.figures.style import STYLE, looks_of

    plt.style.use(STYLE)
    looks = looks_of(next(iter(results.values()))[0], hand_designed())
    columns = min(4, len(results))
    rows = math.ceil(len(results) / columns)
    size = max(3.4 * columns, 8), 2.6 * rows + 0.8
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(results) :]:
        ax.axis("off")
    for ax, (name, (races, _)) in zip(axes.flat, results.items()):
        for contestant, one in races.items():
            ax.plot(smooth(one.curves).mean(0), label=contestant, **looks[contestant])
        ax.set(yscale="log")
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=7, which="both")
    figure.suptitle("training losses over steps: means over a tenth of all steps, and over seeds", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="general", help='"start", a file, or a name in pretrained/ (default general)')
    parser.add_argument("--steps", type=int, default=500, help="of every training (default 500)")
    parser.add_argument("--seeds", type=int, default=5, help="(default 5)")
    parser.add_argument("--rates", type=int, default=5, help="that each optimizer tries (default 5)")
    parser.add_argument("--tasks", nargs="+", choices=list(ALL), metavar="TASK", help=f"of {', '.join(ALL)}")
    parser.add_argument(
        "--generalization", action="store_true", help="the perceptron, wider, deeper and with larger batches, instead"
    )
    parser.add_argument(
        "--kept-apart",
        nargs="?",
        choices=list(LOTS),
        const="third",
        help="tasks that nothing was chosen by, instead: the third lot, or an earlier one, which was until it had been raced",
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=list(hand_designed()),
        metavar="NAME",
        help=f"hand-designed optimizers, of {', '.join(hand_designed())} (default all)",
    )
    parser.add_argument(
        "--parts", action="store_true", help="race what it has learned of steps' lengths alone, and of directions, too"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="each with tasks of its own, on one thread (default 1)"
    )
    parser.add_argument("--table", type=Path, help="file for the tables, in Markdown")
    parser.add_argument("--figure", type=Path, help="file for the loss curves")
    options = parser.parse_args()
    if bool(options.tasks) + options.generalization + bool(options.kept_apart) > 1:
        parser.error("--tasks, --generalization and --kept-apart each choose the tasks: only one can be given")
    learned(options.net, options.parts)  # what is wrong with it is said before anything runs
    chosen = LOTS[options.kept_apart] if options.kept_apart else GENERALIZATION if options.generalization else TASKS
    names = options.tasks or list(chosen)
    results = {}
    for name, found in zip(names, run_all(names, options)):
        results[name] = found
        if options.table:  # after each task: a race of an hour should not be lost
            options.table.write_text(report(results, options), encoding="utf-8")
    if options.figure:
        draw(results, options.figure)
    print(report(results, options))


if __name__ == "__main__":
    main()
