"""How figures look: one style, colours by role, plain ticks, legends beside the data; and figures that are drawn again and again."""

import functools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import optim

__all__ = ["KNOW_CURVATURE", "STYLE", "LiveFigure", "legend_beside", "looks_of", "plain_log", "styled"]

STYLE = Path(__file__).with_name("figures.mplstyle")
BASELINES = {  # the same in every figure; no two have one lightness and one dash
    "SGD": ("#8c8c8c", "-"),
    "SGD + momentum": ("#009e73", (0, (5, 1.5))),
    "NAG": ("#0072b2", "-"),
    "Adam": ("#56b4e9", (0, (6, 1.5, 1, 1.5))),
    "RMSprop": ("#6a4c9c", (0, (1.5, 1.2))),
    "L-BFGS": ("#1b5e45", (0, (3, 1, 1, 1, 1, 1))),
    "conjugate gradients": ("#222222", (0, (1, 1.5))),
}
KNOW_CURVATURE = ("L-BFGS", "conjugate gradients")  # they may go far below all others
OTHERS = ("#3f4e5e", "#41b6c4", "#54278f", "#74c476", "#9ebcda", "#2b8cbe")  # of baselines that are not named above
LEARNED = ("#d55e00", "#7f0000", "#e69f00", "#cc5fa0", "#8c510a", "#f4a582")  # in the order in which they come
DASHES = ("-", (0, (4, 1)), (0, (1, 0.8)), (0, (6, 1, 1, 1)))


def styled(plot: Callable) -> Callable:
    """The function, drawing in the style of these figures."""

    @functools.wraps(plot)
    def draw(*arguments, **options):
        with plt.style.context(STYLE):
            return plot(*arguments, **options)

    return draw


def looks_of(names: Iterable[str], tuned: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """How the line of each name looks: baselines cool and thin, others, which have been learned, warm and thick.

    A baseline is one of those above, one of `tuned`, or a class of `torch.optim`.
    """
    names, own = list(names), tuned or ()
    others = [name for name in names if name not in BASELINES and (name in own or name in vars(optim))]
    learned = [name for name in names if name not in BASELINES and name not in others]
    looks = {name: (*look, 1.3) for name, look in BASELINES.items()}
    for group, colors, width, first in ((others, OTHERS, 1.3, 1), (learned, LEARNED, 2.6, 0)):
        for place, name in enumerate(group):
            dashes = DASHES[(first + place + place // len(colors)) % len(DASHES)]
            looks[name] = colors[place % len(colors)], dashes, width
    return {
        name: dict(zip(("color", "linestyle", "linewidth"), looks[name]), zorder=3 if name in learned else 2)
        for name in names
    }


def plain_log(axis: Axis) -> None:
    """Ticks as plain numbers: at 1, 2, 5, 10, … on a log axis of few decades, at powers of ten on one of many."""
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    few = high < 300 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_beside(ax: Axes) -> None:
    """A legend to the right of the axes, never over the data."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


class LiveFigure:
    """A figure in a notebook that is drawn again and again while something goes on, such as a training.

    Call it as often as you like: it draws at most once in `seconds`. Outside of a notebook it does nothing.

    Args:
        draw: draws the present state of things, with the arguments of the call; returns its axes.
        seconds: from one drawing to the next.

    Example:
        >>> from meta_training import meta_train
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> live = LiveFigure(lambda iteration, history: plot_history(history, "training"))
        >>> history = meta_train(CoordinatewiseLSTM(), Quadratics(), iterations=2, meta_batch=2, progress=False, callback=live)
        >>> live.finish(2, history)
    """

    def __init__(self, draw: Callable, seconds: float = 4.0):
        self.draw, self.seconds, self.drawn, self.shown = draw, seconds, -math.inf, None

    def __call__(self, *state: Any) -> None:
        """Draw, if the last drawing is long enough ago."""
        if time.monotonic() - self.drawn >= self.seconds:
            self.finish(*state)

    def finish(self, *state: Any) -> None:
        """Draw in any case: call it when all is done."""
        from IPython import get_ipython
        from IPython.display import display

        if get_ipython() is None:
            return
        figure = self.draw(*state).figure
        plt.close(figure)  # or the notebook would show it once more
        if self.shown is None:
            self.shown = display(figure, display_id=True)
        else:
            self.shown.update(figure)
        self.drawn = time.monotonic()
