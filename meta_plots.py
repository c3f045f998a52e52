"""Figures and tables: loss curves and their summary, final losses over sizes, training histories, learned updates."""

import math

import torch
from matplotlib import pyplot as plt

from gradbuffer.contracts import as_rule, is_learned
from gradbuffer.evaluation import learned_rule, torch_rule

__all__ = [
    "plot_curves",
    "plot_history",
    "plot_sizes",
    "plot_tuning",
    "plot_updates",
    "sizes_table",
    "stretches_table",
    "summary_table",
]

# one colour for each optimizer, the same in every figure; black and thick for ours
COLORS = {
    "SGD": "tab:gray",
    "SGD + momentum": "tab:green",
    "NAG": "tab:blue",
    "Adam": "tab:orange",
    "RMSprop": "tab:purple",
    "L-BFGS": "tab:cyan",
}
LEARNED_COLORS = ("black", "tab:red", "tab:brown", "tab:pink", "tab:olive", "navy")  # in the order in which they come


def plot_curves(curves, title, ax=None, marks=(), steps=None, quantity="loss", log=True, average=1):
    """Mean loss against the step, log scale, with the 95 % confidence band of the mean.

    Args:
        curves: dict from name to losses (functions, steps), as `evaluate` returns them, or to anything else that was
            measured along the way; the learned ones are drawn thick.
        title: says the problem and at what scale it was run.
        ax: axes to draw on; default a new figure.
        marks: (step, text) pairs, drawn as dotted vertical lines.
        steps: the step of each column; default 0, 1, 2, ….
        quantity: what the columns are, for the axis. Default "loss".
        log: draw it on a log scale. Default True.
        average: draw means over so many columns, block after block, each at its block's middle; what is left over at
            the end is not drawn. For losses of minibatches, which are noisy. Default 1.

    Returns:
        The axes.

    Raises:
        ValueError: `average` is not 1 to the number of columns.
    """
    columns = min(losses.shape[1] for losses in curves.values())
    if not 1 <= average <= columns:
        raise ValueError(f"average must be 1 to the number of columns, {columns}, got {average!r}")
    ax = ax or plt.subplots(figsize=(7, 4.5))[1]
    learned = iter(LEARNED_COLORS)
    for name, losses in curves.items():
        mean, error = mean_and_error(blocks(losses.double(), average))
        places = torch.arange(losses.shape[1]) if steps is None else torch.as_tensor(steps)
        places = blocks(places[None].double(), average)[0]
        color = COLORS.get(name) or next(learned, None)
        (line,) = ax.plot(places, mean, label=name, color=color, linewidth=1.2 if name in COLORS else 2.4)
        lower = mean - 1.96 * error
        lower = lower.clamp(min=mean.min() / 10) if log else lower  # a log axis has no room below 0
        ax.fill_between(places, lower, mean + 1.96 * error, color=line.get_color(), alpha=0.15, linewidth=0)
    for step, text in marks:
        ax.axvline(step, color="gray", linestyle=":", linewidth=1)
        ax.annotate(
            text,
            (step, 0.02),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            ha="left",
            va="bottom",
            xytext=(3, 0),
            textcoords="offset points",
        )
    ax.set(
        yscale="log" if log else "linear",
        xlabel="step",
        ylabel=f"{quantity} (mean over functions, 95 % band)",
        title=title,
    )
    ax.legend(fontsize=9)
    ax.grid(alpha=0.3, which="both")
    return ax


def summary_table(curves, steps=100):
    """Markdown table: sum of the loss over the first `steps` steps and the loss at the last step, ± standard error.

    Args:
        curves: dict from name to losses (functions, steps).
        steps: how many of the first steps to add up.

    Returns:
        Text, for `IPython.display.Markdown`.
    """
    last = next(iter(curves.values())).shape[1] - 1
    rows = [f"| optimizer | sum over the first {steps} steps | loss at step {last} |", "| --- | --- | --- |"]
    for name, losses in curves.items():
        total, total_error = mean_and_error(losses[:, :steps].double().sum(1, keepdim=True))
        final, final_error = mean_and_error(losses[:, -1:].double())
        rows.append(
            f"| {name} | {total.item():.2f} ± {total_error.item():.2f} | "
            f"{final.item():.3g} ± {final_error.item():.1g} |"
        )
    return "\n".join(rows)


def stretches_table(curves, stretches, tuned=None, more=None):
    """Markdown table: mean loss over stretches of steps, ± standard error over functions if there are several.

    Args:
        curves: dict from name to losses (functions, steps).
        stretches: dict from heading to the slice of steps that the mean is over.
        tuned: dict from name to `TunedBaseline`, for a column of learning rates. Default: no such column.
        more: dict from heading to a dict from name to numbers (functions,), for further columns.

    Returns:
        Text, for `IPython.display.Markdown`.

    Example:
        >>> print(stretches_table({"LSTM": torch.tensor([[3.0, 1.0]])}, {"all": slice(None)}))
        | optimizer | all |
        | --- | --- |
        | LSTM | 2.000 |
    """
    more = more or {}
    heads = ["optimizer", *(["learning rate"] if tuned is not None else []), *stretches, *more]
    rows = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, losses in curves.items():
        cells = [name]
        if tuned is not None:
            cells.append(f"{tuned[name].options['lr']:.3g}" if name in tuned else "")
        columns = [losses[:, stretch].mean(1) for stretch in stretches.values()]
        for numbers in (*columns, *(column[name] for column in more.values())):
            mean, error = mean_and_error(numbers.double())
            cells.append(f"{mean.item():.3f}" + (f" ± {error.item():.3f}" if len(numbers) > 1 else ""))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plot_sizes(finals, title, axes=None):
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
        figure, axes = plt.subplots(
            1, len(depths), figsize=(5 * len(depths), 4.5), sharey=True, squeeze=False, constrained_layout=True
        )
        figure.suptitle(title)
        axes = axes[0]
    elif len(axes) != len(depths):
        raise ValueError(f"axes must be as many as there are numbers of layers, {len(depths)}, got {len(axes)}")
    for ax, depth in zip(axes, depths):
        units = sorted(hidden[0] for hidden in finals if len(hidden) == depth)
        learned = iter(LEARNED_COLORS)
        for name in finals[depth * (units[0],)]:
            mean, error = zip(*(mean_and_error(finals[depth * (unit,)][name].double()) for unit in units))
            mean, error = torch.stack(mean), 1.96 * torch.stack(error)
            below = torch.minimum(error, 0.9 * mean)  # a log axis has no room below 0
            ax.errorbar(
                units,
                mean,
                yerr=torch.stack([below, error]),
                label=name,
                capsize=3,
                marker="o",
                markersize=4,
                color=COLORS.get(name) or next(learned, None),
                linewidth=1.2 if name in COLORS else 2.4,
            )
        ax.set(
            yscale="log",
            xlabel="hidden units in a layer",
            xticks=units,
            title=f"{depth} hidden layer{'s' if depth > 1 else ''}",
        )
        ax.grid(alpha=0.3, which="both")
    axes[0].set(ylabel="final loss (mean over functions, 95 % interval)")
    axes[0].legend(fontsize=9)  # small networks leave room above
    return list(axes)


def sizes_table(finals):
    """Markdown table of mean final losses ± standard error: a row for each network, a column for each optimizer.

    Args:
        finals: as `plot_sizes` takes them.

    Returns:
        Text, for `IPython.display.Markdown`.

    Raises:
        ValueError: the sizes are not as `plot_sizes` takes them.
    """
    check_sizes(finals)
    names = list(next(iter(finals.values())))
    rows = [" | ".join(["| layers × units", *names]) + " |", "| --- " * (1 + len(names)) + "|"]
    for hidden in sorted(finals, key=lambda hidden: (len(hidden), hidden)):
        cells = []
        for name in names:
            mean, error = mean_and_error(finals[hidden][name].double())
            cells.append(f"{mean.item():.3f} ± {error.item():.3f}")
        rows.append(f"| {len(hidden)} × {hidden[0]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def check_sizes(finals):
    if not finals:
        raise ValueError("finals must hold at least one network")
    for hidden in finals:
        if not (isinstance(hidden, tuple) and len(set(hidden)) == 1):
            raise ValueError(f"keys of finals must be tuples of one or more equal sizes, as (20, 20), got {hidden!r}")


def plot_history(history, title, ax=None):
    """What happened in meta-training: is the loss falling, are the meta-gradients sane, do the functions move at all?

    Above, the meta-loss of every iteration (dots) and the validation score that chose the optimizer (line, right axis);
    skipped windows are red ticks. Below, the norm of the meta-gradient and the size of the window's update relative to
    the parameters'.

    Args:
        history: what `meta_train` returned.
        title: says what was trained.
        ax: axes to draw the upper part on, and nothing below; default a new figure with both.

    Returns:
        The upper axes.
    """
    iterations, dots = range(1, len(history.meta_loss) + 1), dict(linestyle="", marker=".", markersize=2, alpha=0.4)
    grid = None if ax else plt.figure(figsize=(7, 5.5)).add_gridspec(2, hspace=0.3, height_ratios=(3, 2))
    ax = ax or grid.figure.add_subplot(grid[0])
    ax.plot(iterations, history.meta_loss, color="tab:blue", **dots)
    ax.set(yscale="log", xlabel="iteration", ylabel="meta-loss (mean over a window)", title=title)
    if history.validation:
        right = ax.twinx()
        right.plot(*zip(*history.validation), color="black")
        right.plot(history.best_iteration, history.best_validation, "o", color="black", label="kept")
        right.set(yscale="log", ylabel="validation (sum over the steps)")
        right.legend(loc="upper right")
    for iteration, _ in history.stages[1:]:  # a curriculum's: from here on scores are over more steps
        ax.axvline(iteration, color="gray", linestyle=":", linewidth=1)
    if history.skipped:
        ax.plot(
            [iteration + 1 for iteration, _ in history.skipped],
            [0.02] * len(history.skipped),
            "|",
            color="tab:red",
            transform=ax.get_xaxis_transform(),
            label=f"skipped: {len(history.skipped)}",
        )
        ax.legend(loc="upper left")
    if grid:
        below = grid.figure.add_subplot(grid[1], sharex=ax)
        for axes, values, color, name in (
            (below, history.grad_norm, "tab:green", "norm of the meta-gradient"),
            (below.twinx(), history.update_size, "tab:purple", "relative update size"),
        ):
            axes.plot(iterations[: len(values)], values, color=color, **dots)
            axes.set(yscale="log", xlabel="iteration")
            axes.set_ylabel(name, color=color)
    return ax


def plot_updates(net, title, gradients=None, steps=(1, 10, 50), baselines=None, axes=None):
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
    axes = list(
        axes
        if axes is not None
        else plt.subplots(1, 1 + len(steps), figsize=(3.6 * (1 + len(steps)), 3.2), constrained_layout=True)[1]
    )
    for name, rule in rules.items():
        look = dict(color=COLORS.get(name, "black"), linewidth=1.2 if name in COLORS else 2.4, label=name)
        axes[0].plot(range(1, len(gradients) + 1), along[name] * size[name], **look)
        for ax, step in zip(axes[1:], steps):
            before = gradients[: step - 1, None].expand(-1, len(grid))
            ax.plot(grid.cpu(), follow(rule, torch.cat([before, grid[None]]))[-1].cpu() * size[name], **look)
    axes[0].set(xlabel="step", ylabel="update", title=title)
    axes[0].legend(fontsize=9)
    for ax, step in zip(axes[1:], steps):
        ax.set(xlabel="gradient", title=f"at step {step}")
        ax.axvline(gradients[step - 1].item(), color="gray", linestyle=":", linewidth=1)  # where the history goes on
    for ax in axes:
        ax.axhline(0, color="gray", linewidth=0.5)
        ax.grid(alpha=0.3)
    return axes


def follow(rule, gradients):
    """Updates (T, N) of a rule of `evaluation` along gradients (T, N)."""
    theta, updates = torch.zeros_like(gradients[0]), []
    advance = rule(theta)
    for gradient in gradients:
        theta.zero_()
        advance(gradient)
        updates.append(theta.clone())
    return torch.stack(updates)


def plot_tuning(tuned, title, ax=None, quantity="loss at the last step"):
    """The loss by which each learning rate was judged, and in the legend the one that was chosen.

    Args:
        tuned: dict from name to `TunedBaseline`, as `tune_baselines` returns it.
        title: says the problem and at what scale it was run.
        ax: axes to draw on; default a new figure.
        quantity: what loss it is, for the axis; say so where they were tuned with `last`.

    Returns:
        The axes. Losses over a thousand times the best are cut off.
    """
    ax = ax or plt.subplots(figsize=(7, 3.5))[1]
    for name, baseline in tuned.items():
        ax.loglog(
            *zip(*baseline.final_losses.items()),
            ".-",
            color=COLORS.get(name),
            linewidth=1.2,
            label=f"{name}: {baseline.options['lr']:.3g}",
        )
    lowest = min(min(baseline.final_losses.values()) for baseline in tuned.values())
    ax.set(xlabel="learning rate", ylabel=quantity, title=title)
    ax.set_ylim(top=min(ax.get_ylim()[1], 1e3 * lowest))
    ax.legend(fontsize=9)
    ax.grid(alpha=0.3, which="both")
    return ax


def blocks(values, length):
    """(functions, steps) -> (functions, steps // length), means over blocks of steps."""
    return values.unfold(1, length, length).mean(2)


def mean_and_error(losses):
    """Mean over functions and its standard error (0 for a single function)."""
    error = losses.std(0) / len(losses) ** 0.5 if len(losses) > 1 else torch.zeros_like(losses[0])
    return losses.mean(0), error
