"""Figures and tables: loss curves and their summary, final losses over sizes, training histories, updates and ways through the plane.

All figures have one style, and colours by role: learned optimizers are warm and thick, hand-designed ones cool and thin
(`gradbuffer.figures.style`). The tables are `gradbuffer.figures.tables`; their names are here too.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import nn

from gradbuffer.contracts import Problem, as_rule, is_learned
from gradbuffer.evaluation import TunedBaseline, compare, draw_batches, learned_rule, torch_rule
from gradbuffer.figures.style import KNOW_CURVATURE, LiveFigure, legend_beside, looks_of, plain_log, styled
from gradbuffer.figures.tables import check_sizes, diverged, mean_and_error, sizes_table, stretches_table, summary_table

if TYPE_CHECKING:
    from gradbuffer.training.run import History

__all__ = [
    "LiveFigure",
    "plot_curves",
    "plot_history",
    "plot_progress",
    "plot_sizes",
    "plot_trajectories",
    "plot_tuning",
    "plot_updates",
    "sizes_table",
    "stretches_table",
    "summary_table",
]

LEARNED_COLOR = looks_of(["learned"])["learned"]["color"]


@styled
def plot_curves(
    curves: dict[str, torch.Tensor],
    title: str,
    ax: Axes | None = None,
    marks: Sequence[tuple[float, str]] = (),
    steps: Sequence[float] | torch.Tensor | None = None,
    quantity: str = "loss",
    log: bool = True,
    average: int = 1,
    *,
    tuned: dict[str, TunedBaseline] | None = None,
    center: str = "mean",
    legend: bool = True,
) -> Axes:
    """Loss against the step, log scale: the mean with its 95 % confidence band, or the median with the quartiles.

    On a log scale the axis ends a little above the losses at the start and begins below the lowest of the optimizers that do not know
    the curvature (L-BFGS and conjugate gradients do); what goes beyond it is cut off. Functions on which an
    optimizer diverged (as `gradbuffer.figures.tables.diverged` says) are counted in the legend and left out of its mean; its median
    counts them as infinite.

    Args:
        curves: dict from name to losses (functions, steps), as `evaluate` returns them, or to anything else that was
            measured along the way; the learned ones are drawn thick.
        title: says the problem and at what scale it was run.
        ax: axes to draw on; default a new figure.
        marks: (step, text) pairs, drawn as dotted vertical lines.
        steps: the step of each column; default 0, 1, 2, ….
        quantity: what the columns are, for the axis. Default "loss".
        log: draw it on a log scale, as losses that may diverge. Default True.
        average: draw means over so many columns, block after block, each at its block's middle; what is left over at
            the end is not drawn. For losses of minibatches, which are noisy. Default 1.
        tuned: whose names are baselines. Default: names as in `BASELINES` of `meta_training`, and of classes in `torch.optim`.
        center: "mean", the default, or "median".
        legend: draw one, beside the axes. Default True.

    Returns:
        The axes.

    Raises:
        ValueError: `average` is not 1 to the number of columns, or `center` is neither.
    """
    columns = min(losses.shape[1] for losses in curves.values())
    if not 1 <= average <= columns:
        raise ValueError(f"average must be 1 to the number of columns, {columns}, got {average!r}")
    if center not in ("mean", "median"):
        raise ValueError(f"center must be 'mean' or 'median', got {center!r}")
    ax = ax or plt.subplots()[1]
    starts, lows = [], []
    for name, look in looks_of(curves, tuned).items():
        middle, lower, upper, count = middle_and_band(curves[name].double(), average, center, log)
        if log:
            starts.append(middle_and_band(curves[name][:, :1].double(), 1, center, False)[0].item())
            lowest = min([value for value in middle.tolist() if math.isfinite(value)], default=math.inf)
            lows += [] if name in KNOW_CURVATURE else [lowest]
            lower = lower.clamp(min=lowest / 10)  # a log axis has no room below 0
        label = f"{name} ({count} of {len(curves[name])} diverged)" if count else name
        places = torch.arange(curves[name].shape[1]) if steps is None else torch.as_tensor(steps)
        places = blocks(places[None].double(), average)[0]
        ax.plot(places, middle, label=label, **look)
        ax.fill_between(places, lower, upper, color=look["color"], alpha=0.15, linewidth=0)
    for step, text in marks:
        ax.axvline(step, color="gray", linestyle=":", linewidth=1)
        where = dict(xycoords=("data", "axes fraction"), textcoords="offset points", xytext=(3, 0))
        ax.annotate(text, (step, 0.02), fontsize=8, va="bottom", **where)
    band = "mean over functions, 95 % band" if center == "mean" else "median over functions, quartiles"
    ax.set(yscale="log" if log else "linear", xlabel="step", ylabel=f"{quantity} ({band})")
    ax.set_title(title)
    if log:
        top = 1.25 * max(start for start in starts if math.isfinite(start))
        low = min(lows, default=0)
        ax.set_ylim(max(ax.get_ylim()[0], low / 3 if math.isfinite(low) else 0, 1e-6 * top), top)
        plain_log(ax.yaxis)
    if legend:
        legend_beside(ax)
    return ax


@styled
def plot_sizes(
    finals: dict[tuple, dict[str, torch.Tensor]], title: str, axes: Sequence[Axes] | None = None
) -> list[Axes]:
    """Final losses over the number of hidden units: a panel for each number of layers, a line for each optimizer.

    Error bars are the 95 % confidence interval of the mean, on a log scale: an interval that goes below a tenth of the
    mean is cut off there, and a mean that is not finite is left out.

    Args:
        finals: dict from hidden sizes, tuples such as (20,) or (20, 20), to a dict from name to final losses
            (functions,), as `compare_final` returns it. All layers of a network have the same size.
        title: says the problem and at what scale it was run.
        axes: one to draw on for each number of layers; default a new figure with a common y axis.

    Returns:
        List of the axes, from few layers to many.

    Raises:
        ValueError: the sizes are not as above, or there are not as many axes.

    Reference: Andrychowicz et al. 2016, figure 6.
    """
    check_sizes(finals)
    depths = sorted({len(hidden) for hidden in finals})
    if axes is None:
        figure, axes = plt.subplots(1, len(depths), figsize=(4 * len(depths) + 1.5, 4), sharey=True, squeeze=False)
        figure.suptitle(title)
        axes = axes[0]
    elif len(axes) != len(depths):
        raise ValueError(f"axes must be as many as there are numbers of layers, {len(depths)}, got {len(axes)}")
    for ax, depth in zip(axes, depths):
        units = sorted(hidden[0] for hidden in finals if len(hidden) == depth)
        for name, look in looks_of(finals[depth * (units[0],)]).items():
            mean, error = zip(*(mean_and_error(finals[depth * (unit,)][name].double()) for unit in units))
            mean, error = torch.stack(mean), 1.96 * torch.stack(error)
            bars = torch.stack([torch.minimum(error, 0.9 * mean), error])  # a log axis has no room below 0
            ax.errorbar(units, mean, yerr=bars, label=name, capsize=2, marker="o", markersize=4, **look)
        ax.set(yscale="log", xlabel="hidden units in a layer", xticks=units)
        ax.set_title(f"{depth} hidden layer{'s' if depth > 1 else ''}")
    axes[0].set(ylabel="final loss (mean over functions, 95 % interval)")
    for ax in axes:
        plain_log(ax.yaxis)
    legend_beside(axes[-1])
    return list(axes)


@styled
def plot_history(history: "History", title: str, ax: Axes | None = None) -> Axes:
    """What happened in meta-training, a panel for each: is the loss falling, are the meta-gradients sane, do the functions move at all?

    The meta-loss, the norm of the meta-gradient and the size of the update relative to the parameters' have a dot for each window. Of
    `EpisodicES` the signal-to-noise ratio stands in the place of the norm: far below 1, steps are mostly noise.
    Where functions are optimized for several windows, their first windows lie highest, so that the dots form bands; the line is a
    running median. The validation score is the one by which weights are kept.

    Args:
        history: what `meta_train` returned.
        title: says what was trained.
        ax: axes to draw the meta-loss on, and nothing else; default a new figure with all.

    Returns:
        The axes of the meta-loss.
    """
    axes = [ax] if ax else list(plt.subplots(2, 2, figsize=(9, 5), sharex=True)[1].flat)
    of_gradient = "norm of the meta-gradient", history.grad_norm
    if history.signal_to_noise:
        of_gradient = "meta-gradient: signal to noise", history.signal_to_noise
    panels = (
        ("meta-loss of each window", history.meta_loss, LEARNED_COLOR),
        (*of_gradient, "#0072b2"),
        ("update size / parameter size", history.update_size, "#6a4c9c"),
    )
    for panel, (name, values, color) in zip((axes[0], *axes[2:]), panels):
        scatter(panel, values, color)
        panel.set_title(name)
        panel.set_yscale("log")
    if history.skipped:
        places, height = [iteration + 1 for iteration, _ in history.skipped], [0.02] * len(history.skipped)
        look = dict(color="black", transform=axes[0].get_xaxis_transform(), label=f"skipped: {len(history.skipped)}")
        axes[0].plot(places, height, "|", **look)
        axes[0].legend(loc="upper right")
    for iteration, _ in history.stages[1:]:  # a curriculum's: from here on scores are over more steps
        axes[0].axvline(iteration, color="gray", linestyle=":", linewidth=1)
    if ax:
        ax.set_title(title)
    else:
        axes[0].figure.suptitle(title)
        scored = "loss in the last tenth of" if history.signal_to_noise else "sum of the loss over"
        axes[1].set_title(f"validation: {scored} the steps")
        if history.validation:
            axes[1].plot(*zip(*history.validation), ".-", color="black")
            axes[1].plot(history.best_iteration, history.best_validation, "o", color=LEARNED_COLOR, markersize=8)
            axes[1].legend([axes[1].get_lines()[1]], [f"kept: {history.best_validation:.4g}"], loc="best")
            axes[1].set_yscale("log")
    for panel in axes:
        plain_log(panel.yaxis)
    for panel in axes[-2:]:
        panel.set_xlabel("iteration")
        panel.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))  # whole iterations
    return axes[0]


@styled
def plot_progress(
    values: Sequence[float],
    title: str,
    quantity: str = "loss",
    levels: dict[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One number for each iteration of something that goes on, with their running median, on a log scale.

    Numbers over thirty times their median, as at the start of a training, are cut off.

    Args:
        values: the numbers.
        title: says of what.
        quantity: what they are, for the axis. Default "loss".
        levels: dict from name to a number to compare with, drawn as a horizontal line.
        ax: axes to draw on; default a new figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots(figsize=(7.5, 3))[1]
    scatter(ax, values, LEARNED_COLOR)
    for name, look in looks_of(levels or {}, levels).items():
        ax.axhline(levels[name], label=name, **look)
    ax.set(yscale="log", xlabel="iteration", ylabel=quantity, title=title)
    usual = sorted(values)[len(values) // 2] if values else math.nan
    if math.isfinite(usual):
        ax.set_ylim(top=min(ax.get_ylim()[1], 30 * usual))
    plain_log(ax.yaxis)
    if levels:
        legend_beside(ax)
    return ax


def scatter(ax, values, color):
    """A dot for each iteration, and their running median."""
    iterations, values = torch.arange(1, len(values) + 1), torch.tensor(values, dtype=torch.float64)
    few = len(values) < 500
    ax.plot(iterations, values, ".", color=color, markersize=5 if few else 3, alpha=0.5, markeredgewidth=0)
    width = max(len(values) // 30, 5)
    if len(values) >= 2 * width:
        ax.plot(
            iterations.unfold(0, width, 1).double().mean(1), values.unfold(0, width, 1).nanmedian(1).values, color=color
        )


@styled
def plot_updates(
    net: nn.Module,
    title: str,
    gradients: torch.Tensor | None = None,
    steps: Sequence[int] = (1, 10, 50),
    baselines: dict[str, tuple[type, dict]] | None = None,
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """What the optimizer has learned to do with one coordinate's gradients, beside hand-designed optimizers.

    Left, its updates over time, along a history of gradients. Then for each of `steps`, the update at that step as a
    function of the gradient there, after the history before it: a straight line for SGD, a saturating one for Adam. The
    baselines are linear in their learning rate; each is drawn with the one at which its updates along the history are
    as large as the learned ones (root mean square), so that shapes can be compared.

    Args:
        net: a coordinatewise learned optimizer.
        title: says which.
        gradients: (T,), the history; default 60 noisy gradients that shrink from 1 to 0.05, always the same.
        steps: which steps to look at, from 1 to T.
        baselines: dict from name to (class, options other than the learning rate); default SGD and Adam.
        axes: 1 + len(steps) axes to draw on; default a new figure.

    Returns:
        List of the axes.

    Raises:
        ValueError: `net` is not coordinatewise, or a step lies outside the history.

    Reference: Andrychowicz et al. 2016, appendix ("Visualizations of optimizer").
    """
    if not is_learned(net) or not as_rule(net).coordinatewise:
        raise ValueError(f"net must treat every coordinate by itself (coordinatewise = True), got {type(net).__name__}")
    if gradients is None:
        noise = torch.randn(60, generator=torch.Generator().manual_seed(0))
        gradients = torch.logspace(0, math.log10(0.05), 60) * (0.7 + noise)
    if not all(isinstance(step, int) and 1 <= step <= len(gradients) for step in steps):
        raise ValueError(f"steps must lie in 1 … {len(gradients)}, the history of gradients, got {steps}")
    parameter = next(net.parameters())
    gradients = torch.as_tensor(gradients).to(parameter)
    grid = torch.linspace(-1.5, 1.5, 201).to(parameter) * gradients.abs().max()
    baselines = {"SGD": (torch.optim.SGD, {}), "Adam": (torch.optim.Adam, {})} if baselines is None else baselines
    rules = {"learned": learned_rule(net)}
    for name, (optimizer, options) in baselines.items():
        rules[name] = torch_rule(optimizer, {**options, "lr": 1.0})
    along = {name: follow(rule, gradients[:, None])[:, 0].cpu() for name, rule in rules.items()}
    size = {name: along["learned"].norm() / updates.norm() for name, updates in along.items()}
    if axes is None:
        figure, axes = plt.subplots(1, 1 + len(steps), figsize=(3 * (1 + len(steps)) + 1.3, 3))
    looks = looks_of(rules, baselines)
    for name, rule in rules.items():
        axes[0].plot(range(1, len(gradients) + 1), along[name] * size[name], label=name, **looks[name])
        for ax, step in zip(axes[1:], steps):
            before = gradients[: step - 1, None].expand(-1, len(grid))
            updates = follow(rule, torch.cat([before, grid[None]]))[-1].cpu() * size[name]
            ax.plot(grid.cpu(), updates, label=name, **looks[name])
    axes[0].set(xlabel="step", ylabel="update")
    axes[0].set_title(title)
    for ax, step in zip(axes[1:], steps):
        ax.set(xlabel="gradient")
        ax.set_title(f"at step {step}")
        ax.axvline(gradients[step - 1].item(), color="gray", linestyle=":", linewidth=1)  # where the history goes on
    for ax in axes:
        ax.axhline(0, color="gray", linewidth=0.5)
    legend_beside(axes[-1])
    return list(axes)


def follow(rule, gradients):
    """Updates (T, N) of a rule of `evaluation` along gradients (T, N)."""
    theta, updates = torch.zeros_like(gradients[0]), []
    advance = rule(theta)
    for gradient in gradients:
        theta.zero_()
        advance(gradient)
        updates.append(theta.clone())
    return torch.stack(updates)


@styled
def plot_trajectories(
    nets: dict[str, nn.Module],
    tuned: dict[str, TunedBaseline],
    problem: Problem,
    title: str,
    steps: int = 30,
    num_functions: int = 3,
    seed: int = 1,
) -> list[Axes]:
    """The ways of optimizers down functions of two parameters, over the functions' contour lines: a panel for each function.

    Args:
        nets: dict from name to learned optimizer.
        tuned: dict from name to `TunedBaseline`.
        problem: distribution of functions of two parameters, such as `Quadratics(dim=2)`; their losses at step 0 are drawn.
        title: says which.
        steps: how many points each way has.
        num_functions, seed: which functions, see `evaluate`.

    Returns:
        List of the axes. A panel shows where the learned optimizers go; ways that leave it are cut off.

    Raises:
        ValueError: the functions do not have two parameters.
    """
    batch = next(draw_batches(problem, num_functions, seed, torch.device("cpu")))
    if sum(part[0].numel() for part in batch.params.values()) != 2:
        raise ValueError(f"problem must have functions of two parameters, got {problem.name or type(problem).__name__}")
    ways = {name: [] for name in (*nets, *tuned)}

    def watch(name, step, params):
        ways[name].append(torch.cat([part.reshape(len(part), -1) for part in params.values()], 1).clone().cpu())

    compare(nets, tuned, problem, steps, num_functions, seed, progress=False, watch=watch)
    ways = {name: torch.stack(points, 1) for name, points in ways.items()}  # (functions, steps, 2)
    figure, axes = plt.subplots(1, num_functions, figsize=(3.4 * num_functions + 1.3, 3.4), squeeze=False)
    figure.suptitle(title)
    shown = torch.cat([ways[name] for name in nets or ways], 1)
    for function, ax in enumerate(axes[0]):
        low, high = shown[function].min(0).values, shown[function].max(0).values
        margin = 0.3 * (high - low).clamp_min(0.3 * (high - low).max())
        x, y = (torch.linspace(*ends, 60) for ends in zip(low - margin, high + margin))
        heights = heights_of(batch, function, x, y)
        levels = torch.logspace(math.log10(max(heights.min(), 1e-3 * heights.max())), math.log10(heights.max()), 14)
        ax.contour(x, y, heights, levels, colors="black", linewidths=0.4, alpha=0.5)
        for name, look in looks_of(ways, tuned).items():
            ax.plot(*ways[name][function].T, marker="o", markersize=look["linewidth"] + 1, label=name, **look)
        ax.plot(*ways[name][function, 0], "s", color="black", markersize=5, zorder=4)
        ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="θ₁", ylabel="θ₂")
        ax.grid(False)
    legend_beside(axes[0, -1])
    return list(axes[0])


@torch.no_grad()
def heights_of(batch, function, x, y):
    """(len(y), len(x)): the loss of one function of a meta-batch over a grid."""
    points, rows = torch.cartesian_prod(y, x).flip(1), []
    for point in points:  # one by one, since a meta-batch takes one point for each of its functions
        places = iter(point)
        params = {
            name: torch.stack([next(places) for _ in range(part[0].numel())]).view(part[:1].shape).expand_as(part)
            for name, part in batch.params.items()
        }
        rows.append(batch.loss(params, 0)[function])
    return torch.stack(rows).view(len(y), len(x))


@styled
def plot_tuning(
    tuned: dict[str, TunedBaseline],
    title: str,
    ax: Axes | None = None,
    quantity: str = "loss at the last step",
    legend: bool = True,
) -> Axes:
    """The loss by which each learning rate was judged; the one that was chosen has a large dot and stands in the legend.

    Args:
        tuned: dict from name to `TunedBaseline`, as `tune_baselines` returns it.
        title: says the problem and at what scale it was run.
        ax: axes to draw on; default a new figure.
        quantity: what loss it is, for the axis; say so where they were tuned with `last`.
        legend: draw one, beside the axes. Default True.

    Returns:
        The axes. Losses over a thousand times the best are cut off.
    """
    ax = ax or plt.subplots(figsize=(7.5, 3.2))[1]
    for name, look in looks_of(tuned, tuned).items():
        losses, lr = tuned[name].final_losses, tuned[name].options["lr"]
        ax.loglog(*zip(*losses.items()), marker=".", label=f"{name}: {lr:.3g}", **look)
        ax.plot(lr, losses[lr], "o", color=look["color"], markersize=8)
    lowest = min(min(baseline.final_losses.values()) for baseline in tuned.values())
    ax.set(xlabel="learning rate", ylabel=quantity)
    ax.set_title(title)
    ax.set_ylim(top=min(ax.get_ylim()[1], 1e3 * lowest))
    plain_log(ax.yaxis)
    plain_log(ax.xaxis)
    if legend:
        legend_beside(ax)
    return ax


# Internals ------------------------------------------------------------------------------------------------------------


def blocks(values, length):
    """(functions, steps) -> (functions, steps // length), means over blocks of steps."""
    return values.unfold(1, length, length).mean(2)


def middle_and_band(losses, average, center, may_diverge):
    """(middle, lower, upper, how many functions diverged): the mean and its 95 % band, or the median and the quartiles."""
    gone = diverged(losses) if may_diverge else torch.zeros(len(losses), dtype=torch.bool)
    if center == "median":
        losses = blocks(losses.masked_fill(gone[:, None], math.inf), average)
        return *(losses.quantile(share, 0, interpolation="nearest") for share in (0.5, 0.25, 0.75)), int(gone.sum())
    if gone.all():
        nothing = blocks(losses, average)[0] * math.nan
        return nothing, nothing, nothing, int(gone.sum())
    mean, error = mean_and_error(blocks(losses[~gone], average))
    return mean, mean - 1.96 * error, mean + 1.96 * error, int(gone.sum())
