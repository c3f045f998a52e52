"""Figures and tables: the numbers they show are those they were given."""

import math

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from meta_plots import (  # noqa: E402
    plot_curves,
    plot_history,
    plot_sizes,
    plot_tuning,
    plot_updates,
    sizes_table,
    stretches_table,
    summary_table,
)
from meta_training import History, TunedBaseline  # noqa: E402
from optimizers import CoordinatewiseLSTM  # noqa: E402


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


def test_no_two_optimizers_look_the_same():
    names = [
        "start",
        "LSTM",
        "LSTM, 25 cells",
        "LSTM+GAC",
        "NTM-BFGS",
        "SGD",
        "SGD + momentum",
        "NAG",
        "Adam",
        "RMSprop",
        "L-BFGS",
    ]
    axes = plot_curves({name: torch.rand(4, 5) + 0.5 for name in names}, "many")
    colors = [matplotlib.colors.to_hex(line.get_color()) for line in axes.get_lines()]
    plt.close("all")
    assert len(set(colors)) == len(names)


def test_other_quantities_at_some_steps():
    accuracies = {"LSTM": torch.tensor([[0.0, 0.4, 0.6], [0.1, 0.5, 0.9]])}
    ax = plot_curves(accuracies, "a title", steps=[0, 50, 100], quantity="accuracy", log=False)
    (line,) = ax.get_lines()
    assert list(line.get_xdata()) == [0, 50, 100] and ax.get_yscale() == "linear"
    assert ax.get_ylabel() == "accuracy (mean over functions, 95 % band)"
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.05 - 1.96 * 0.05, abs=1e-6)  # below 0, and not cut off
    plt.close("all")


def test_table_by_hand():
    losses = torch.tensor([[4.0, 2.0, 1.0], [4.0, 4.0, 3.0]])
    rows = summary_table({"LSTM": losses}, steps=2).splitlines()
    assert rows[0] == "| optimizer | sum over the first 2 steps | loss at step 2 |"
    assert rows[2] == "| LSTM | 7.00 ± 1.00 | 2 ± 1 |"


def test_averaged_curves():
    losses = torch.tensor([[4.0, 2.0, 1.0, 3.0, 100.0]])
    (line,) = plot_curves({"LSTM": losses}, "a title", average=2).get_lines()
    assert line.get_xdata().tolist() == [0.5, 2.5] and line.get_ydata().tolist() == [3, 2]
    plt.close("all")
    for average in (0, 6):
        with pytest.raises(ValueError, match=f"1 to the number of columns, 5, got {average}"):
            plot_curves({"LSTM": losses}, "a title", average=average)


def test_stretches_by_hand():
    curves = {"LSTM": torch.tensor([[4.0, 2.0, 1.0], [4.0, 4.0, 3.0]]), "NAG": torch.ones(2, 3)}
    tuned = {"NAG": TunedBaseline(torch.optim.SGD, {"lr": 0.25}, {})}
    accuracy = {name: torch.tensor([0.25, 0.75]) for name in curves}
    stretches = {"the first 2": slice(2), "the last": slice(-1, None)}
    rows = stretches_table(curves, stretches, tuned, {"accuracy": accuracy}).splitlines()
    assert rows == [
        "| optimizer | learning rate | the first 2 | the last | accuracy |",
        "| --- | --- | --- | --- | --- |",
        "| LSTM |  | 3.500 ± 0.500 | 2.000 ± 1.000 | 0.500 ± 0.250 |",
        "| NAG | 0.25 | 1.000 ± 0.000 | 1.000 ± 0.000 | 0.500 ± 0.250 |",
    ]
    assert stretches_table({"LSTM": curves["LSTM"][:1]}, stretches).splitlines()[-1] == "| LSTM | 3.000 | 1.000 |"


@pytest.fixture
def finals():
    hidden = ((20,), (5,), (20, 20), (5, 5), (10, 10))  # in any order, and not every size in both panels
    return {sizes: {"LSTM": torch.rand(9) + 1 / sizes[0], "Adam": torch.rand(9) + len(sizes)} for sizes in hidden}


def test_sizes_show_means_and_intervals(finals):
    one, two = plot_sizes(finals, "a title")
    assert one.figure.get_suptitle() == "a title" and one.get_yscale() == "log"
    assert (one.get_title(), two.get_title()) == ("1 hidden layer", "2 hidden layers")
    assert [text.get_text() for text in one.get_legend().get_texts()] == ["LSTM", "Adam"]
    for ax, depth, units in ((one, 1, [5, 20]), (two, 2, [5, 10, 20])):
        for bars, name in zip(ax.containers, ("LSTM", "Adam")):
            line, _, (intervals,) = bars
            assert list(line.get_xdata()) == units
            for place, unit in enumerate(units):
                losses = finals[depth * (unit,)][name].double()
                mean, error = losses.mean().item(), 1.96 * losses.std().item() / 3
                assert line.get_ydata()[place] == pytest.approx(mean)
                ends = intervals.get_segments()[place][:, 1]
                assert ends.tolist() == pytest.approx([mean - min(error, 0.9 * mean), mean + error])
        assert ax.containers[0][0].get_color() == "black" and ax.containers[1][0].get_color() == "tab:orange"
    given = plt.subplots(1, 2)[1]
    assert plot_sizes(finals, "", axes=given) == list(given)
    plt.close("all")


def test_sizes_that_diverge_or_reach_below_zero():
    finals = {(5,): {"SGD": torch.tensor([0.01, 3.0]), "Adam": torch.tensor([math.inf, 1.0])}}
    (ax,) = plot_sizes(finals, "")
    ends = ax.containers[0][2][0].get_segments()[0][:, 1]
    assert ends[0] == pytest.approx(0.1 * 1.505) and ends[1] > 3  # the axis has no room below 0
    ax.figure.canvas.draw()
    plt.close("all")


def test_sizes_by_hand():
    finals = {(20, 20): {"LSTM": torch.tensor([1.0, 3.0])}, (20,): {"LSTM": torch.tensor([0.5])}}
    rows = sizes_table(finals).splitlines()
    assert rows == [
        "| layers × units | LSTM |",
        "| --- | --- |",
        "| 1 × 20 | 0.500 ± 0.000 |",
        "| 2 × 20 | 2.000 ± 1.000 |",
    ]


@pytest.mark.parametrize("hidden", [(20, 10), (), 20])
def test_sizes_refuse_what_they_cannot_place(hidden):
    for show in (sizes_table, lambda finals: plot_sizes(finals, "")):
        with pytest.raises(ValueError, match="keys of finals must be tuples"):
            show({hidden: {"LSTM": torch.rand(2)}})
        with pytest.raises(ValueError, match="at least one network"):
            show({})
    with pytest.raises(ValueError, match="axes must be as many as .* 1, got 2"):
        plot_sizes({(5,): {"LSTM": torch.rand(2)}}, "", axes=plt.subplots(1, 2)[1])
    plt.close("all")


def test_history_marks_what_was_kept():
    history = History([3.0, 2.0, 1.0], [1.0] * 3, [0.1] * 3, [(2, 30.0), (3, 20.0)], 3, 20.0)
    ax = plot_history(history, "training")
    assert list(ax.get_lines()[0].get_ydata()) == [3.0, 2.0, 1.0]
    kept = ax.figure.axes[1].get_lines()[1]
    assert (list(kept.get_xdata()), list(kept.get_ydata())) == ([3], [20.0])
    plt.close("all")


def test_history_shows_gradients_update_sizes_and_skips():
    history = History(
        [3.0, math.nan, 1.0], [1.0, math.nan, 2.0], [0.1] * 3, [(3, 20.0)], 3, 20.0, [0.5, math.nan, 0.25], [(1, "NaN")]
    )
    upper = plot_history(history, "training")
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["skipped: 1"]
    assert list(upper.get_lines()[1].get_xdata()) == [2]
    lower = {ax.get_ylabel(): list(ax.get_lines()[0].get_ydata()) for ax in upper.figure.axes[2:]}
    assert lower["norm of the meta-gradient"][::2] == [1.0, 2.0] and lower["relative update size"][::2] == [0.5, 0.25]
    given = plt.subplots()[1]
    assert plot_history(history, "training", given) is given and len(given.figure.axes) == 2
    plt.close("all")


def test_updates_are_those_of_the_optimizers():
    net, gradients = CoordinatewiseLSTM(hidden_size=4), torch.tensor([1.0, -0.5, 0.25, 0.5])
    axes = plot_updates(
        net,
        "an optimizer",
        gradients,
        steps=(1, 3),
        baselines={"SGD": (torch.optim.SGD, {}), "Adam": (torch.optim.Adam, {})},
    )
    assert [ax.get_title() for ax in axes] == ["an optimizer", "at step 1", "at step 3"]
    learned, sgd, adam = (torch.as_tensor(line.get_ydata()) for line in axes[0].get_lines()[:3])
    state, expected = net.init_state(1), []
    with torch.no_grad():
        for gradient in gradients:
            update, state = net(gradient[None], state)
            expected.append(update)
    torch.testing.assert_close(learned, torch.cat(expected))
    torch.testing.assert_close(sgd, -gradients * learned.norm() / gradients.norm())  # as large as the learned ones
    torch.testing.assert_close(adam.norm(), learned.norm())
    for step, ax in zip((1, 3), axes[1:]):  # the curve over the gradient goes through the update of the history
        for line, along in zip(ax.get_lines(), (learned, sgd, adam)):
            x, y = (torch.as_tensor(data) for data in (line.get_xdata(), line.get_ydata()))
            assert x.min() == -1.5 and x.max() == 1.5
            near = (x - gradients[step - 1]).abs().argmin()
            torch.testing.assert_close(y[near], along[step - 1], rtol=0.1, atol=0.01)
    assert len(plot_updates(net.double(), "default history")) == 4
    with pytest.raises(ValueError, match=r"steps must lie in 1 … 4, .* got \(5,\)"):
        plot_updates(net, "", gradients, steps=(5,))
    with pytest.raises(ValueError, match="net must treat every coordinate by itself .* got Linear"):
        plot_updates(torch.nn.Linear(1, 1), "")
    plt.close("all")


def test_tuning_shows_every_rate_and_the_choice():
    tuned = {"Adam": TunedBaseline(torch.optim.Adam, {"lr": 0.1}, {0.01: 2.0, 0.1: 1.0, 1.0: 5.0})}
    assert plot_tuning(tuned, "tuning", quantity="mean loss").get_ylabel() == "mean loss"
    ax = plot_tuning(tuned, "tuning")
    assert list(ax.get_lines()[0].get_xdata()) == [0.01, 0.1, 1.0]
    assert ax.get_legend().get_texts()[0].get_text() == "Adam: 0.1"
    plt.close("all")
