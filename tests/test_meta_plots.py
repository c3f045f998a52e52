"""Figures and tables: the numbers they show are those they were given."""

import math

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from gradbuffer.figures.tables import diverged  # noqa: E402
from gradbuffer.training.run import History  # noqa: E402
from meta_plots import (  # noqa: E402
    LiveFigure,
    plot_curves,
    plot_history,
    plot_progress,
    plot_sizes,
    plot_trajectories,
    plot_tuning,
    plot_updates,
    sizes_table,
    stretches_table,
    summary_table,
)
from meta_training import TunedBaseline, evaluate_baseline  # noqa: E402
from optimizees import MetaBatch, Quadratics  # noqa: E402
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
    losses = torch.tensor([[4.0, 2.0, 1.0], [4.0, 4.0, 3.0], [4.0, 3.0, 2.0]])
    adam, sgd = losses + torch.tensor([[0.0, 0.5, -0.5]]), losses + 1
    tuned = {name: TunedBaseline(torch.optim.Adam, {"lr": 0.1}, {}, 3, 1, 8) for name in ("Adam", "mine")}
    rows = summary_table({"LSTM": losses, "Adam": adam, "mine": sgd}, 2, tuned).splitlines()
    assert rows == [
        "| optimizer | sum over the first 2 steps | median | less that of Adam | loss at step 2 | median | less that of Adam |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| LSTM | 7.00 ± 0.58 | 7.000 | -0.5000 (lower on 100%) | 2.00 ± 0.58 | 2.000 | +0.5000 (lower on 0%) |",
        "| Adam | 7.50 ± 0.58 | 7.500 |  | 1.50 ± 0.58 | 1.500 |  |",
        "| mine | 9.00 ± 0.58 | 9.000 | +1.500 (lower on 0%) | 3.00 ± 0.58 | 3.000 | +1.500 (lower on 0%) |",
        "",
        "Learning rates of Adam, mine: the lowest loss at step 2 on 8 other functions.",
    ]
    assert (
        summary_table({"LSTM": losses}).splitlines()[0]
        == "| optimizer | sum over 3 steps | median | loss at step 2 | median |"
    )


def test_tables_count_what_diverges():
    """Means are those of the other functions, medians and win rates count divergence as infinite, no nonsense is printed."""
    good = torch.tensor([[4.0, 2.0, 1.0]]).repeat(6, 1)
    bad = good.clone() - 0.5
    bad[0, 2], bad[1, 1], bad[2, 2], bad[3, 1] = math.inf, math.nan, 9.0, 1e9
    curves, gone = {"LSTM": good, "SGD": bad, "NAG": good + 1, "Adam": torch.full_like(good, math.nan)}, diverged(bad)
    assert gone.tolist() == [True, True, True, True, False, False] and not diverged(good).any()
    rows = [row.split(" | ") for row in summary_table(curves, 3).splitlines()]
    assert "less that of NAG" in rows[0]
    assert rows[3][:4] == ["| SGD (diverged: 4 of 6)", "5.500", "diverged", "-4.500 (lower on 33%)"]
    assert rows[5][:3] == ["| Adam (diverged: 6 of 6)", "diverged", "diverged"] and "lower on 0%" in rows[5][3]
    assert rows[2][3] == "-3.000 (lower on 100%)"
    row = stretches_table({"SGD": bad}, {"end": slice(-1, None)}).splitlines()[-1]
    assert row == "| SGD (diverged: 4 of 6) | 0.5000 | diverged |"


def test_numbers_keep_their_zeros_and_digits():
    rows = stretches_table(
        {"LSTM": torch.tensor([[0.22], [0.26]]), "CG": torch.tensor([[1e-9], [3e-9]])}, {"all": slice(None)}
    )
    assert rows.splitlines()[2:] == ["| LSTM | 0.240 ± 0.020 | 0.2400 |", "| CG | 2.0e-09 ± 1.0e-09 | 2.0e-09 |"]


def test_divergence_is_cut_off_and_counted_in_figures():
    torch.manual_seed(0)
    good = torch.linspace(3, 1, 20).repeat(8, 1) + 0.1 * torch.rand(8, 20)
    bad = good.clone()
    bad[:3, 10:] *= 1e12
    for center in ("mean", "median"):
        ax = plot_curves({"LSTM": good, "SGD": bad, "NAG": bad[:3]}, "a title", center=center)
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels == ["LSTM", "SGD (3 of 8 diverged)", "NAG (3 of 3 diverged)"]
        assert 3 < ax.get_ylim()[1] < 4.2 and ax.get_ylim()[0] > 0.1
    ax = plot_curves({"SGD": bad}, "a title")
    torch.testing.assert_close(torch.as_tensor(ax.get_lines()[0].get_ydata()), bad[3:].double().mean(0))
    plt.close("all")


def test_medians_and_quartiles():
    losses = torch.arange(1.0, 6.0)[:, None] * torch.ones(1, 3)
    ax = plot_curves({"LSTM": losses}, "a title", center="median")
    assert ax.get_lines()[0].get_ydata().tolist() == [3, 3, 3] and "median over functions, quartiles" in ax.get_ylabel()
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (2, 4)
    with pytest.raises(ValueError, match="center must be 'mean' or 'median', got 'mode'"):
        plot_curves({"LSTM": losses}, "a title", center="mode")
    plt.close("all")


def test_conjugate_gradients_leave_room_to_the_others():
    curves = {"LSTM": torch.tensor([[4.0, 1.0, 0.1]]), "conjugate gradients": torch.tensor([[4.0, 1e-6, 1e-12]])}
    assert plot_curves(curves, "a title").get_ylim()[0] > 0.01
    plt.close("all")


def test_colors_say_who_is_learned():
    """Learned ones are warm and thick, hand-designed ones cool and thin, a user's own baselines among them."""
    names = ["LSTM", "another", "Adam", "NAG", "AdamW", "mine"]
    tuned = {"mine": TunedBaseline(torch.optim.SGD, {"lr": 0.1}, {})}
    ax = plot_curves({name: torch.rand(4, 5) + 0.5 for name in names}, "many", tuned=tuned)
    for line, learned in zip(ax.get_lines(), (True, True, False, False, False, False)):
        red, _, blue = matplotlib.colors.to_rgb(line.get_color())
        assert (red > blue) == learned and (line.get_linewidth() > 2) == learned, line.get_label()
    assert len({line.get_color() for line in ax.get_lines()}) == len(names)
    plt.close("all")


def test_nothing_is_cut_off_when_saved(tmp_path):
    """Saved as it is, without bbox_inches, everything drawn lies within the picture."""
    curves = {"an optimizer with a long name": torch.rand(4, 30) + 1, "SGD + momentum": torch.rand(4, 30) + 2}
    history = History([3.0, 2.0, 1.0], [1.0] * 3, [0.1] * 3, [(2, 30.0), (3, 20.0)], 3, 20.0, [0.1] * 3)
    for ax in (
        plot_curves(curves, "a title"),
        plot_history(history, "training"),
        plot_updates(CoordinatewiseLSTM(), "net")[0],
    ):
        ax.figure.savefig(tmp_path / "figure.png")
        inside, (width, height) = ax.figure.get_tightbbox(), ax.figure.get_size_inches()
        assert inside.x0 >= 0 and inside.y0 >= 0 and inside.x1 <= width and inside.y1 <= height
    plt.close("all")


def test_ticks_are_plain():
    ax = plot_curves({"LSTM": torch.tensor([[2.0, 0.9, 0.3], [2.1, 0.8, 0.31]])}, "a title")
    ax.figure.canvas.draw()
    texts = [tick.get_text() for tick in ax.get_yticklabels()]
    assert "0.5" in texts and "1" in texts and not any("10" in text or "e" in text for text in texts)
    assert not any(tick.get_text() for tick in ax.yaxis.get_ticklabels(minor=True))
    plt.close("all")


def test_averaged_curves():
    losses = torch.tensor([[4.0, 2.0, 1.0, 3.0, 5.0]])
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
        "| optimizer | learning rate | the first 2 | median | the last | median | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| LSTM |  | 3.50 ± 0.50 | 3.500 | 2.0 ± 1.0 | 2.000 | 0.50 ± 0.25 |",
        "| NAG | 0.25 | 1.000 | 1.000 | 1.000 | 1.000 | 0.50 ± 0.25 |",
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
    assert [text.get_text() for text in two.get_legend().get_texts()] == ["LSTM", "Adam"]
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
        assert ax.containers[0][0].get_linewidth() > 2 > ax.containers[1][0].get_linewidth()
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
    finals = {
        (20, 20): {"LSTM": torch.tensor([1.0, 3.0]), "NAG": torch.tensor([math.inf, 1.0])},
        (20,): {"LSTM": torch.tensor([0.5]), "NAG": torch.tensor([0.25])},
    }
    rows = sizes_table(finals).splitlines()
    assert rows == [
        "| layers × units | LSTM | NAG |",
        "| --- | --- | --- |",
        "| 1 × 20 | 0.5000 | **0.2500** |",
        "| 2 × 20 | **2.0 ± 1.0** | 1.000 |",
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
    assert list(ax.get_lines()[0].get_ydata()) == [3.0, 2.0, 1.0] and ax.figure.get_suptitle() == "training"
    line, kept = ax.figure.axes[1].get_lines()
    assert list(line.get_ydata()) == [30.0, 20.0] and (list(kept.get_xdata()), list(kept.get_ydata())) == ([3], [20.0])
    assert [text.get_text() for text in ax.figure.axes[1].get_legend().get_texts()] == ["kept: 20"]
    assert all(tick % 1 == 0 for tick in ax.figure.axes[2].get_xticks())  # iterations
    plt.close("all")


def test_history_shows_gradients_update_sizes_and_skips():
    history = History(
        [3.0, math.nan, 1.0], [1.0, math.nan, 2.0], [0.1] * 3, [(3, 20.0)], 3, 20.0, [0.5, math.nan, 0.25], [(1, "NaN")]
    )
    upper = plot_history(history, "training")
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["skipped: 1"]
    assert list(upper.get_lines()[1].get_xdata()) == [2]
    lower = {ax.get_title(): list(ax.get_lines()[0].get_ydata()) for ax in upper.figure.axes[2:]}
    assert lower["norm of the meta-gradient"][::2] == [1.0, 2.0]
    assert lower["update size / parameter size"][::2] == [0.5, 0.25]
    given = plt.subplots()[1]
    assert plot_history(history, "training", given) is given and len(given.figure.axes) == 1
    plt.close("all")


def test_history_of_families_shows_the_signal_to_noise_ratio():
    history = History([3.0, 2.0], [1.0, 1.0], [0.1, 0.1], [(2, 0.5)], 2, 0.5, signal_to_noise=[0.7, 1.5])
    axes = {ax.get_title(): ax for ax in plot_history(history, "training").figure.axes}
    assert list(axes["meta-gradient: signal to noise"].get_lines()[0].get_ydata()) == [0.7, 1.5]
    assert "validation: loss in the last tenth of the steps" in axes and "norm of the meta-gradient" not in axes
    plt.close("all")


def test_progress_has_a_dot_for_each_number_and_lines_to_compare_with():
    ax = plot_progress([3.0, 2.0, 1.0], "training", "sum of the loss", {"NAG": 2.5})
    dots, level = ax.get_lines()
    assert list(dots.get_ydata()) == [3.0, 2.0, 1.0] and list(level.get_ydata()) == [2.5, 2.5]
    assert ax.get_ylabel() == "sum of the loss" and ax.get_legend().get_texts()[0].get_text() == "NAG"
    many = plot_progress([float(k % 7 + 1) for k in range(60)], "training")
    median = many.get_lines()[1]
    assert set(median.get_ydata()) <= {2.0, 3.0, 4.0, 5.0, 6.0} and len(median.get_xdata()) == 56
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


class Plane:
    """Bowls in the plane, of two parameters with names of their own."""

    def sample(self, meta_batch, generator=None):
        c = torch.randn(meta_batch, 2, generator=generator)
        params = {"x": torch.zeros(meta_batch), "y": torch.zeros(meta_batch, 1)}
        return MetaBatch(
            params, lambda params, step: (params["x"] - c[:, 0]) ** 2 + 3 * (params["y"][:, 0] - c[:, 1]) ** 2
        )


@pytest.mark.parametrize("problem", [Quadratics(dim=2), Plane()])
def test_trajectories_are_the_ways_of_the_optimizers(problem):
    tuned = {"SGD": TunedBaseline(torch.optim.SGD, {"lr": 0.05}, {})}
    axes = plot_trajectories({"LSTM": CoordinatewiseLSTM()}, tuned, problem, "ways", steps=6, num_functions=2, seed=4)
    batch = problem.sample(2, generator=torch.Generator().manual_seed(4))
    losses = evaluate_baseline(torch.optim.SGD, {"lr": 0.05}, problem, 6, 2, seed=4)
    for function, ax in enumerate(axes):
        learned, sgd = ax.get_lines()[:2]
        assert len(learned.get_xdata()) == 6 and learned.get_linewidth() > sgd.get_linewidth()
        for step, point in enumerate(sgd.get_xydata()):
            places = iter(torch.tensor(point, dtype=torch.float32))
            params = {
                name: torch.stack([next(places) for _ in range(part[0].numel())]).view(part[:1].shape).expand_as(part)
                for name, part in batch.params.items()
            }
            torch.testing.assert_close(batch.loss(params, 0)[function], losses[function, step], rtol=1e-4, atol=1e-5)
        contours = ax.collections[0]
        for level, path in zip(contours.levels, contours.get_paths()):
            for point in path.vertices[::40]:
                places = iter(torch.tensor(point, dtype=torch.float32))
                params = {
                    name: torch.stack([next(places) for _ in range(part[0].numel())])
                    .view(part[:1].shape)
                    .expand_as(part)
                    for name, part in batch.params.items()
                }
                assert batch.loss(params, 0)[function].item() == pytest.approx(level, rel=0.2, abs=0.02)
    with pytest.raises(ValueError, match="functions of two parameters, got Quadratics"):
        plot_trajectories({"LSTM": CoordinatewiseLSTM()}, {}, Quadratics(dim=3), "")
    plt.close("all")


def test_live_figures_are_drawn_now_and_then(monkeypatch):
    drawn, shown = [], []

    class Shown:
        def update(self, figure):
            shown.append(figure)

    def display(figure, display_id):
        shown.append(figure)
        return Shown()

    monkeypatch.setattr("IPython.get_ipython", lambda: "a notebook")
    monkeypatch.setattr("IPython.display.display", display)
    live = LiveFigure(lambda number: drawn.append(number) or plt.subplots()[1], seconds=1000)
    for number in range(5):
        live(number)
    live.finish(5)
    assert drawn == [0, 5] and len(shown) == 2 and not plt.get_fignums()
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    live.finish(6)
    assert drawn == [0, 5]
