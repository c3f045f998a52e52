"""Evaluation, tuning and paired comparisons."""

import pytest
import torch
from torch import nn

from gradbuffer.data.cifar10 import generated_images
from gradbuffer.evaluation import (
    BASELINES,
    TunedBaseline,
    compare,
    compare_final,
    evaluate,
    evaluate_baseline,
    tune_baseline,
    tune_baselines,
)
from gradbuffer.problems.images import AccuracyCurves
from optimizees import CIFAR10Net, MNISTNet, Quadratics
from optimizers import CoordinatewiseLSTM


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_evaluation_follows_the_optimizer():
    problem, net = Quadratics(dim=3), CoordinatewiseLSTM()
    losses = evaluate(net, problem, 5, 40, seed=9)
    assert losses.shape == (40, 5) and not losses.requires_grad
    draw = generator(9)
    batch, rest = problem.sample(32, draw), problem.sample(8, draw)
    for batch, expected in ((batch, losses[:32]), (rest, losses[32:])):
        theta, state = batch.params["theta"], net.init_state(batch.params["theta"].numel())
        for step in range(5):
            theta = theta.detach().requires_grad_()
            values = batch.loss({"theta": theta}, step)
            torch.testing.assert_close(values.detach(), expected[:, step])
            (gradient,) = torch.autograd.grad(values.sum(), theta)
            update, state = net(gradient.flatten(), state)
            theta = theta + update.view_as(theta)


@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines_are_torchs_own_on_each_function(name):
    optimizer, options = BASELINES[name]
    losses = evaluate_baseline(optimizer, {**options, "lr": 0.01}, Quadratics(), 6, 3, seed=2)
    batch = Quadratics().sample(3, generator(2))
    for function in range(3):
        theta = torch.zeros(3, 10, requires_grad=True)
        rule = optimizer([theta], lr=0.01, **options)
        for step in range(6):
            rule.zero_grad()
            value = batch.loss({"theta": theta}, step)[function]
            assert value.item() == pytest.approx(losses[function, step].item(), rel=1e-5)
            value.backward()
            rule.step()


def test_comparisons_are_paired(tiny_mnist):
    """A learned optimizer that is SGD in disguise gives SGD's curves: same functions, starts and minibatches."""

    class PlainSGD(nn.Module):
        def init_state(self, num_coordinates):
            return ()

        def forward(self, grad, state):
            return -0.3 * grad, state

    for problem in (Quadratics(dim=2), MNISTNet((5,), root=tiny_mnist)):
        learned = evaluate(PlainSGD(), problem, 8, 40, seed=3)
        torch.testing.assert_close(learned, evaluate_baseline(torch.optim.SGD, {"lr": 0.3}, problem, 8, 40, seed=3))
        assert torch.equal(learned, evaluate(PlainSGD(), problem, 8, 40, seed=3))
        assert not torch.equal(learned[:, 0], evaluate(PlainSGD(), problem, 8, 40, seed=4)[:, 0])


def test_tuning_finds_the_best_rate_and_leaves_the_edge():
    tuned = tune_baseline(torch.optim.SGD, Quadratics(), [1e-5, 1e-4, 1e-3], 30, 16)
    rates = list(tuned.final_losses)
    assert rates[0] < tuned.options["lr"] < rates[-1] and max(rates) > 1e-3
    assert tuned.final_losses[tuned.options["lr"]] == min(tuned.final_losses.values())
    again = tuned.evaluate(Quadratics(), 30, 16, seed=0)[:, -1].mean().item()
    assert again == pytest.approx(tuned.final_losses[tuned.options["lr"]])


def test_compare_gives_every_curve():
    nets = {"LSTM": CoordinatewiseLSTM()}
    tuned = tune_baselines(Quadratics(), 5, 4, lrs=[1e-3, 1e-2, 1e-1], progress=False)
    curves = compare(nets, tuned, Quadratics(), 5, 6, progress=False)
    assert list(curves) == ["LSTM", *BASELINES] and all(losses.shape == (6, 5) for losses in curves.values())
    assert all(torch.equal(losses[:, 0], curves["LSTM"][:, 0]) for losses in curves.values())


def test_tuning_by_the_mean_of_the_last_steps():
    """The rates of one step and of the last five differ where the end is noisy; each is the best by its own measure."""
    problem, found = Quadratics(dim=4), {}
    for last in (1, 5):
        found[last] = tune_baseline(torch.optim.RMSprop, problem, [0.01, 0.1, 1.0], 12, 8, last=last)
        for lr, loss in found[last].final_losses.items():
            losses = evaluate_baseline(torch.optim.RMSprop, {"lr": lr}, problem, 12, 8, seed=0)[:, -last:]
            assert loss == pytest.approx(losses.mean().item())
    assert found[1].final_losses != found[5].final_losses
    with pytest.raises(ValueError, match="last must be at most steps = 12, got 13"):
        tune_baseline(torch.optim.SGD, problem, steps=12, last=13)
    with pytest.raises(ValueError, match="last must be at least 1, got 0"):
        tune_baselines(problem, 12, 4, last=0, progress=False)


@pytest.mark.parametrize(
    "last, words",
    [
        (1, "the lowest loss at step 5"),
        (2, "the lowest loss at the steps 4 to 5"),
        (6, "the lowest sum of the loss over 6 steps"),
    ],
)
def test_tuned_baselines_say_by_what(last, words):
    tuned = tune_baseline(torch.optim.SGD, Quadratics(dim=2), [0.001, 0.01, 0.1], 6, 3, last=last)
    assert tuned.judged_by == f"{words} on 3 other functions"


def test_tuning_for_the_sum_has_the_lowest_sum():
    tuned = tune_baseline(torch.optim.Adam, Quadratics(dim=4), [0.01, 0.1, 1.0], 12, 8, last=12)
    sums = {
        lr: evaluate_baseline(torch.optim.Adam, {"lr": lr}, Quadratics(dim=4), 12, 8, seed=0).sum(1).mean().item()
        for lr in tuned.final_losses
    }
    assert min(sums, key=sums.get) == tuned.options["lr"]


def test_final_losses_on_several_problems(tiny_mnist):
    """What `tune_baselines` and `compare` give for each problem by itself, on its own pair of splits."""
    networks = {(units,): MNISTNet((units,), batch_size=8, root=tiny_mnist) for units in (3, 6)}
    nets, lrs = {"LSTM": CoordinatewiseLSTM(preprocess="log_sign")}, [0.01, 0.1, 1.0]
    chosen = {name: BASELINES[name] for name in ("NAG", "Adam")}
    finals = compare_final(
        nets,
        {hidden: (net.with_split("validation"), net.with_split("test")) for hidden, net in networks.items()},
        9,
        4,
        seed=5,
        last=3,
        baselines=chosen,
        tuning_functions=2,
        tuning_seed=7,
        lrs=lrs,
        progress=False,
    )
    assert list(finals) == [(3,), (6,)]
    for hidden, losses in finals.items():
        assert list(losses) == ["LSTM", "NAG", "Adam"] and all(final.shape == (4,) for final in losses.values())
        tuned = tune_baselines(
            networks[hidden].with_split("validation"), 9, 2, 7, baselines=chosen, lrs=lrs, progress=False, last=3
        )
        curves = compare(nets, tuned, networks[hidden].with_split("test"), 9, 4, 5, progress=False)
        for name, final in losses.items():
            torch.testing.assert_close(final, curves[name][:, 6:].mean(1))
    alone = compare_final(
        {},
        {"any": (Quadratics(2), Quadratics(2))},
        5,
        3,
        last=1,
        baselines=chosen,
        lrs=lrs,
        tuning_functions=2,
        progress=False,
    )
    assert list(alone["any"]) == ["NAG", "Adam"]


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(last=6), "last must be at most steps = 5, got 6"),
        (dict(last=0), "last must be at least 1"),
        (dict(problems={2: Quadratics(2)}), r"problems\[2\] must be a pair of problems"),
    ],
)
def test_final_losses_refuse(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        compare_final(
            **{"nets": {}, "problems": {2: (Quadratics(2), Quadratics(2))}, "steps": 5, "last": 2, **arguments}
        )


def test_watching_sees_every_step_of_every_function():
    seen, net = [], CoordinatewiseLSTM()
    losses = evaluate(
        net, Quadratics(dim=3), 4, 40, seed=9, watch=lambda step, params: seen.append((step, params["theta"].clone()))
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3] * 2  # 32 functions, then 8
    assert [len(theta) for _, theta in seen] == [32] * 4 + [8] * 4 and not seen[0][1].requires_grad
    draw, batches = generator(9), []
    for number in (32, 8):
        batches.append(Quadratics(dim=3).sample(number, draw))
    for place, (step, theta) in enumerate(seen):
        values = batches[place // 4].loss({"theta": theta}, step)
        torch.testing.assert_close(values, losses[:32, step] if place < 4 else losses[32:, step])


def test_accuracy_along_the_way():
    problem = CIFAR10Net(batch_size=16, channels=(3,), root=generated_images(100, 40, side=8), split="validation")
    watch = AccuracyCurves(problem, every=15, images=30)
    tuned = {name: TunedBaseline(torch.optim.Adam, {"lr": lr}, {}) for name, lr in (("slow", 1e-4), ("Adam", 0.01))}
    losses = compare({}, tuned, problem, 31, 7, seed=2, progress=False, watch=watch)
    assert watch.steps == [0, 15, 30] and list(watch.curves) == ["slow", "Adam"]
    assert all(curves.shape == (7, 3) for curves in watch.curves.values())
    starts = problem.sample(7, generator(2)).params
    torch.testing.assert_close(watch.curves["Adam"][:, 0], problem.test_accuracy(starts, 30))
    assert watch.curves["Adam"][:, 2].mean() > watch.curves["slow"][:, 2].mean() + 0.2
    unwatched = tuned["Adam"].evaluate(problem, 31, 7, seed=2)
    assert torch.equal(unwatched, losses["Adam"])  # looking changes nothing


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(problem=Quadratics()), "problem must have test_accuracy"),
        (dict(every=0), "every must be"),
        (dict(images=1), "images must be"),
    ],
)
def test_accuracy_refuses(arguments, error):
    problem = CIFAR10Net(channels=(2,), root=generated_images(40, 20, side=8))
    with pytest.raises((TypeError, ValueError), match=error):
        AccuracyCurves(**{"problem": problem, **arguments})
