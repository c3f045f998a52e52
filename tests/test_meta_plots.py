"""Figures and tables: the numbers they show are those they were given."""

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from meta_plots import plot_curves, plot_history, plot_tuning, summary_table  # noqa: E402
from meta_training import History, TunedBaseline  # noqa: E402


@pytest.fixture
def curves():
    return {"LSTM": torch.rand(9, 30) + 0.5, "Adam": torch.rand(9, 30) + 1, "NAG": torch.full((9, 30), 2.0)}


def test_curves_show_means_and_bands(curves):
    ax = plot_curves(curves, "a title", marks=[(10, "here")])
    assert ax.get_title() == "a title" and ax.get_yscale() == "log" and ax.get_xlabel() == "step"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(curves)
    for line, (name, losses) in zip(ax.get_lines(), curves.items()):
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), losses.double().mean(0))
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    mean, error = curves["LSTM"].double().mean(0), curves["LSTM"].double().std(0) / 3
    assert band.max() == pytest.approx((mean + 1.96 * error).max().item())
    assert band.min() == pytest.approx((mean - 1.96 * error).min().item())
    assert len({line.get_color() for line in ax.get_lines()[:3]}) == 3
    plt.close("all")


def test_table_by_hand():
    losses = torch.tensor([[4.0, 2.0, 1.0], [4.0, 4.0, 3.0]])
    rows = summary_table({"LSTM": losses}, steps=2).splitlines()
    assert rows[0] == "| optimizer | sum over the first 2 steps | loss at step 2 |"
    assert rows[2] == "| LSTM | 7.00 ± 1.00 | 2 ± 1 |"


def test_history_marks_what_was_kept():
    history = History([3.0, 2.0, 1.0], [1.0] * 3, [0.1] * 3, [(2, 30.0), (3, 20.0)], 3, 20.0)
    ax = plot_history(history, "training")
    assert list(ax.get_lines()[0].get_ydata()) == [3.0, 2.0, 1.0]
    kept = ax.figure.axes[1].get_lines()[1]
    assert (list(kept.get_xdata()), list(kept.get_ydata())) == ([3], [20.0])
    plt.close("all")


def test_tuning_shows_every_rate_and_the_choice():
    tuned = {"Adam": TunedBaseline(torch.optim.Adam, {"lr": 0.1}, {0.01: 2.0, 0.1: 1.0, 1.0: 5.0})}
    ax = plot_tuning(tuned, "tuning")
    assert list(ax.get_lines()[0].get_xdata()) == [0.01, 0.1, 1.0]
    assert ax.get_legend().get_texts()[0].get_text() == "Adam: 0.1"
    plt.close("all")
