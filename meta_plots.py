"""Figures and tables of the experiments: loss curves with confidence bands, their summary, and a training history."""

import torch
from matplotlib import pyplot as plt

__all__ = ["plot_curves", "plot_history", "plot_tuning", "summary_table"]

# one colour for each optimizer, the same in every figure; black and thick for ours
COLORS = {"SGD": "tab:gray", "SGD + momentum": "tab:green", "NAG": "tab:blue", "Adam": "tab:orange",
          "RMSprop": "tab:purple"}


def plot_curves(curves, title, ax=None, marks=()):
    """Mean loss against the step, log scale, with the 95 % confidence band of the mean.

    Args:
        curves: dict from name to losses (functions, steps), as `evaluate` returns them; the learned ones are drawn
            thick.
        title: says the problem and at what scale it was run.
        ax: axes to draw on; default a new figure.
        marks: (step, text) pairs, drawn as dotted vertical lines.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots(figsize=(7, 4.5))[1]
    learned = iter(("black", "tab:red", "tab:brown"))
    for name, losses in curves.items():
        mean, error = mean_and_error(losses.double())
        color = COLORS.get(name) or next(learned, None)
        (line,) = ax.plot(mean, label=name, color=color, linewidth=1.2 if name in COLORS else 2.4)
        lower = (mean - 1.96 * error).clamp(min=mean.min() / 10)  # a log axis has no room below 0
        ax.fill_between(range(len(mean)), lower, mean + 1.96 * error, color=line.get_color(), alpha=0.15, linewidth=0)
    for step, text in marks:
        ax.axvline(step, color="gray", linestyle=":", linewidth=1)
        ax.annotate(text, (step, 0.98), xycoords=("data", "axes fraction"), fontsize=8, ha="left", va="top",
                    xytext=(3, 0), textcoords="offset points")
    ax.set(yscale="log", xlabel="step", ylabel="loss (mean over functions, 95 % band)", title=title)
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
        rows.append(f"| {name} | {total.item():.2f} ± {total_error.item():.2f} | "
                    f"{final.item():.3g} ± {final_error.item():.1g} |")
    return "\n".join(rows)


def plot_history(history, title, ax=None):
    """Meta-loss of every iteration (dots), and the validation score that chose the optimizer (line, right axis).

    Args:
        history: what `meta_train` returned.
        title: says what was trained.
        ax: axes to draw on; default a new figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots(figsize=(7, 3.5))[1]
    ax.plot(range(1, len(history.meta_loss) + 1), history.meta_loss, ".", markersize=2, alpha=0.4, color="tab:blue")
    ax.set(yscale="log", xlabel="iteration", ylabel="meta-loss (mean over a window)", title=title)
    if history.validation:
        right = ax.twinx()
        right.plot(*zip(*history.validation), color="black")
        right.plot(history.best_iteration, history.best_validation, "o", color="black", label="kept")
        right.set(yscale="log", ylabel="validation (sum over the steps)")
        right.legend(loc="upper right")
    return ax


def plot_tuning(tuned, title, ax=None):
    """The loss at the last step that each learning rate gave, and in the legend the one that was chosen.

    Args:
        tuned: dict from name to `TunedBaseline`, as `tune_baselines` returns it.
        title: says the problem and at what scale it was run.
        ax: axes to draw on; default a new figure.

    Returns:
        The axes. Losses over a thousand times the best are cut off.
    """
    ax = ax or plt.subplots(figsize=(7, 3.5))[1]
    for name, baseline in tuned.items():
        ax.loglog(*zip(*baseline.final_losses.items()), ".-", color=COLORS.get(name), linewidth=1.2,
                  label=f"{name}: {baseline.options['lr']:.3g}")
    lowest = min(min(baseline.final_losses.values()) for baseline in tuned.values())
    ax.set(xlabel="learning rate", ylabel="loss at the last step", title=title)
    ax.set_ylim(top=min(ax.get_ylim()[1], 1e3 * lowest))
    ax.legend(fontsize=9)
    ax.grid(alpha=0.3, which="both")
    return ax


def mean_and_error(losses):
    """Mean over functions and its standard error (0 for a single function)."""
    error = losses.std(0) / len(losses) ** 0.5 if len(losses) > 1 else torch.zeros_like(losses[0])
    return losses.mean(0), error
