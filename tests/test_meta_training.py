"""Meta-training, and bad input to the public face of the training side."""

import math

import pytest
import torch
from torch import nn

from meta_training import evaluate, evaluate_baseline, meta_gradient, meta_train, tune_baseline
from optimizees import MetaBatch, MNISTNet, Quadratics
from optimizers import CoordinatewiseLSTM, NonFiniteError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_training_improves_and_keeps_the_best():
    net = CoordinatewiseLSTM()
    untrained = evaluate(net, Quadratics(), 20, 64, seed=5).sum(1).mean()
    history = meta_train(
        net, Quadratics(), 20, 10, meta_batch=16, iterations=100, lr=0.01, warmup=5, validation_every=10, progress=False
    )
    assert evaluate(net, Quadratics(), 20, 64, seed=5).sum(1).mean() < 0.8 * untrained
    assert len(history.meta_loss) == len(history.grad_norm) == len(history.lr) == 100
    assert len(history.validation) == 10
    assert history.best_validation == min(score for _, score in history.validation)
    assert (history.best_iteration, history.best_validation) in history.validation
    score = evaluate(net, Quadratics(), 20, 64, seed=1_000_003).sum(1).mean().item()
    assert score == pytest.approx(history.best_validation)  # the weights kept are those that scored best


def test_same_seed_same_run():
    def run(seed):
        torch.manual_seed(0)
        net = CoordinatewiseLSTM()
        history = meta_train(net, Quadratics(), 20, 10, meta_batch=4, iterations=6, seed=seed, progress=False)
        return history, net.state_dict()

    (one, weights), (two, again), (other, _) = run(3), run(3), run(4)
    assert one == two and all(torch.equal(weights[name], again[name]) for name in weights)
    assert one.meta_loss != other.meta_loss


def test_schedule_and_clipping(monkeypatch):
    norms = []
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda adam: norms.append(
            torch.stack([parameter.grad.norm() for parameter in adam.param_groups[0]["params"]]).norm().item()
        ),
    )
    history = meta_train(
        CoordinatewiseLSTM(),
        Quadratics(),
        20,
        10,
        meta_batch=4,
        iterations=40,
        lr=0.1,
        warmup=10,
        clip=0.5,
        progress=False,
    )
    assert all(norm <= 0.5 * 1.0001 for norm in norms) and max(history.grad_norm) > 0.5
    assert history.lr.index(max(history.lr)) in (9, 10, 11) and history.lr[-1] < 0.001 and max(history.lr) <= 0.1


class Exploding:
    """Losses become infinite from the second meta-batch on."""

    draws = 0

    def sample(self, meta_batch, generator=None):
        self.draws += 1
        factor = 1.0 if self.draws == 1 else math.inf
        return MetaBatch({"x": torch.ones(meta_batch, 2)}, lambda params, step: factor * params["x"].square().sum(1))


def test_non_finite_meta_loss_stops_and_names_the_iteration():
    net = CoordinatewiseLSTM()
    with pytest.raises(NonFiniteError, match="stopped at iteration 2: .*(loss of function 0 at step 0|grad must be)"):
        meta_train(net, Exploding(), 20, 10, meta_batch=2, iterations=10, validation_every=10, progress=False)
    assert all(torch.isfinite(tensor).all() for tensor in net.state_dict().values())


class Sometimes:
    """Losses that are `bad` in the draws listed, from some step on."""

    def __init__(self, draws, bad=math.nan, from_step=0):
        self.draws, self.bad, self.from_step, self.drawn = draws, bad, from_step, 0

    def sample(self, meta_batch, generator=None):
        self.drawn += 1
        bad, scale = self.drawn in self.draws, torch.rand(meta_batch, 2, generator=generator) + 0.5

        def loss(params, step):
            value = (scale * params["x"]).square().sum(1)
            return value * self.bad if bad and step >= self.from_step else value

        return MetaBatch({"x": torch.ones(meta_batch, 2)}, loss)

    def validation_problem(self):
        return Quadratics(dim=2)


def small_run(problem, **arguments):
    torch.manual_seed(0)
    net = CoordinatewiseLSTM(hidden_size=3)
    return net, meta_train(
        net,
        problem,
        **{
            **dict(
                steps=20,
                unroll=10,
                meta_batch=2,
                iterations=10,
                progress=False,
                validation_every=5,
                validation_functions=3,
            ),
            **arguments,
        },
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_windows_are_skipped_and_counted(bad):
    problem = Sometimes((2, 4, 5), bad, from_step=12)  # these draws fail in their second window
    net, history = small_run(problem, skip_non_finite=1)
    assert [iteration for iteration, _ in history.skipped] == [3, 7, 9]
    assert all("must be finite" in cause or "loss of function" in cause for _, cause in history.skipped)
    assert problem.drawn == 5  # others are drawn after each
    for record in (history.meta_loss, history.grad_norm, history.update_size):
        assert len(record) == 10 and [k for k in range(10) if not math.isfinite(record[k])] == [3, 7, 9]
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())
    with pytest.raises(NonFiniteError, match="stopped at iteration 4: .* after 2 skipped windows in a row. Lower lr"):
        small_run(Sometimes(range(2, 100), bad), skip_non_finite=2)


def test_a_skipped_window_leaves_the_optimizer_alone(monkeypatch):
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: steps.append(1) or step(adam))
    net, history = small_run(Sometimes(range(1, 100)), iterations=3, skip_non_finite=3)
    torch.manual_seed(0)
    untrained = CoordinatewiseLSTM(hidden_size=3)
    assert not steps and all(torch.equal(a, b) for a, b in zip(net.parameters(), untrained.parameters()))


class DivergentValidation(Quadratics):
    def validation_problem(self):
        return Sometimes(range(2, 100))  # `evaluate` draws the first to see its size


def test_divergent_validation_stops_or_scores_infinity():
    with pytest.raises(NonFiniteError, match="stopped at iteration 4: in validation, "):
        small_run(DivergentValidation(dim=2))
    _, history = small_run(DivergentValidation(dim=2), skip_non_finite=1)
    assert history.validation == [(5, math.inf), (10, math.inf)] and history.best_iteration == 0


def test_interrupted_returns_the_best_so_far(tmp_path):
    def interrupt(done, history):
        if done == 7:
            raise KeyboardInterrupt

    net, whole = small_run(Quadratics(dim=2))
    with pytest.warns(
        UserWarning, match="interrupted at iteration 7 of 10; the optimizer is the best so far, of iteration 5"
    ):
        stopped, history = small_run(Quadratics(dim=2), callback=interrupt, checkpoint=tmp_path / "run")
    assert history.interrupted and not whole.interrupted and len(history.meta_loss) == 7
    assert history.best_iteration == 5 and history.meta_loss == whole.meta_loss[:7]
    score = evaluate(stopped, Quadratics(dim=2), 20, 3, seed=1_000_003).sum(1).mean().item()
    assert score == history.best_validation
    resumed, history = small_run(Quadratics(dim=2), checkpoint=tmp_path / "run")
    assert history == whole and all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters()))


def test_the_average_of_the_weights_is_kept():
    average, trail = None, []

    def follow(done, history):
        nonlocal average
        kept = min(0.05, (done - 1) / (done + 9))
        weights = [parameter.detach().clone() for parameter in net.parameters()]
        average = weights if done == 1 else [kept * old + (1 - kept) * new for old, new in zip(average, weights)]
        trail.append(weights)

    net = CoordinatewiseLSTM(hidden_size=3)
    history = meta_train(
        net,
        Quadratics(dim=2),
        20,
        5,
        meta_batch=2,
        iterations=5,
        lr=0.3,
        validation_every=5,
        averaging=0.05,
        validation_functions=3,
        callback=follow,
        progress=False,
    )
    assert history.best_iteration == 5 and len(trail) == 5
    for kept, wanted, last in zip(net.parameters(), average, trail[-1]):
        torch.testing.assert_close(kept.detach(), wanted)
        assert not torch.equal(last, wanted)


def test_update_size_is_relative_to_the_parameters():
    class Step(nn.Module):
        """Steps of a tenth of the gradient: x ← x - 0.2 x on f = x²."""

        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.1))

        def init_state(self, num_coordinates):
            return ()

        def forward(self, grad, state):
            return -self.rate * grad, state

    history = meta_train(
        Step(), Sometimes((), from_step=100), 2, 1, meta_batch=1, iterations=1, validation_functions=1, progress=False
    )
    scale = torch.rand(1, 2, generator=generator()) + 0.5
    change = 0.2 * scale.square()
    assert history.update_size == [pytest.approx((change.norm() / 2**0.5).item())]
    history = meta_train(
        Step(), Quadratics(dim=2), 2, 1, meta_batch=1, iterations=1, validation_functions=1, progress=False
    )
    assert history.update_size == [pytest.approx(1.0)]  # from θ = 0


def test_horizons_are_drawn():
    class Lengths:
        def __init__(self):
            self.steps = []

        def sample(self, meta_batch, generator=None):
            batch = Quadratics(dim=2).sample(meta_batch, generator)
            self.steps.append([])
            steps = self.steps[-1]
            return batch._replace(loss=lambda params, step: steps.append(step) or batch.loss(params, step))

        def validation_problem(self):
            return Quadratics(dim=2)

    def lengths(**arguments):
        problem = Lengths()
        small_run(problem, iterations=60, unroll=5, **arguments)
        return [max(steps) // 5 for steps in problem.steps]

    assert lengths() == [4] * 15
    drawn = lengths(horizons=(1, 3))
    assert (
        set(drawn) == {1, 2, 3}
        and sum(drawn) == 60
        and drawn == lengths(horizons=(1, 3)) != lengths(horizons=(1, 3), seed=1)
    )
    assert lengths(horizons=lambda iteration, generator: 1 + iteration // 10)[:12] == [1] * 10 + [2] * 2


@pytest.mark.parametrize("averaging", [0.0, 0.5])
def test_a_curriculum_goes_on_from_the_best_weights_of_each_stage(averaging, monkeypatch):
    scores = iter(
        [
            5.0,
            4.0,
            6.0,
            4.5,  # 10 steps: the second stays the best for two validations
            9.0,
            9.5,
            8.0,
            8.0,
            math.inf,  # 20 steps, the first with those weights; the third is the best
            30.0,
            31.0,
            29.0,
            32.0,
        ]
    )  # 40 steps: the last, whatever the scores
    scored, horizons = [], []

    def score(net, problem, steps, functions, seed):
        scored.append((steps, [parameter.detach().clone() for parameter in net.parameters()]))
        return torch.full((functions, 1), next(scores))

    class Longest(Quadratics):
        def sample(self, meta_batch, generator=None):
            batch = super().sample(meta_batch, generator)
            horizons.append(0)

            def loss(params, step):
                horizons[-1] = max(horizons[-1], step)
                return batch.loss(params, step)

            return batch._replace(loss=loss)

    monkeypatch.setattr("gradbuffer.training.run.evaluate", score)
    net, history = small_run(
        Longest(dim=2),
        steps=40,
        curriculum=(10, 20),
        patience=2,
        averaging=averaging,
        iterations=22,
        validation_every=2,
    )
    assert history.stages == [(0, 10), (8, 20), (16, 40)]
    assert [steps for steps, _ in scored] == [10] * 4 + [20] * 5 + [40] * 4
    assert [at for at, _ in history.validation] == [2, 4, 6, 8, 8, 10, 12, 14, 16, 16, 18, 20, 22]
    assert (history.best_iteration, history.best_validation) == (20, 29.0)
    weights = [weights for _, weights in scored]

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other))

    assert same(weights[4], weights[1]) and same(weights[9], weights[6]) and same(net.parameters(), weights[11])
    assert not same(weights[4], weights[3]) and not same(weights[5], weights[4])
    assert horizons == [10] * 8 + [20] * 4 + [40] * 1 + [20]  # 22 windows: the last functions are cut short


def test_a_curriculum_that_ends_early_and_one_that_diverges():
    _, history = small_run(Quadratics(dim=2), curriculum=(10,), patience=10)
    assert history.stages == [(0, 10)] and all(score < math.inf for _, score in history.validation)
    _, history = small_run(
        DivergentValidation(dim=2), curriculum=(10,), patience=1, skip_non_finite=1, validation_every=3
    )
    assert history.stages == [(0, 10), (3, 20)] and history.best_iteration == 3
    assert [at for at, _ in history.validation] == [3, 3, 6, 9, 10]
    _, history = small_run(DivergentValidation(dim=2), curriculum=(10,), patience=2, skip_non_finite=1)
    assert history.stages == [(0, 10)]  # nothing is left to train at the end


def test_functions_do_not_depend_on_the_replay_fraction(tiny_mnist):
    def first_losses(fraction):
        problem = MNISTNet(hidden_sizes=(), batch_size=8, root=tiny_mnist)
        return small_run(problem, iterations=3, lr=1e-12, replay_fraction=fraction, validation_functions=1)[1].meta_loss

    assert first_losses(1.0) == pytest.approx(first_losses(0.1), rel=1e-5)


def window(**arguments):
    net, batch = CoordinatewiseLSTM(hidden_size=2), Quadratics(dim=2).sample(2)
    arguments = {"params": batch.params, "state": net.init_state(4), **arguments}
    return meta_gradient(net, batch, **arguments)


def train(**arguments):
    return meta_train(
        CoordinatewiseLSTM(hidden_size=2), Quadratics(dim=2), progress=False, **{"iterations": 1, **arguments}
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: window(unroll=0), ValueError, "unroll must be at least 1, got 0"),
        (lambda: window(step=-1), ValueError, "step must be at least 0, got -1"),
        (lambda: window(method="bptt"), ValueError, "method must be .* got 'bptt'"),
        (lambda: window(replay_fraction=0), ValueError, "replay_fraction must be a number in .* got 0"),
        (lambda: window(replay_fraction=0.5, method="autograd"), ValueError, "replay_fraction=0.5 needs method"),
        (lambda: window(second_order=True, replay_fraction=0.5), ValueError, "replay_fraction=0.5 needs"),
        (lambda: train(averaging=1), ValueError, r"averaging must be a number in \[0, 1\), got 1"),
        (lambda: window(adjoint_bound=1.0), ValueError, 'adjoint_bound=1.0 needs method="replay", second_order=True'),
        (lambda: window(adjoint_bound=0), ValueError, "adjoint_bound must be a positive number, got 0"),
        (lambda: window(weights=[1.0] * 20), ValueError, r"weights must have shape \(21,\)"),
        (lambda: window(params=[1]), TypeError, "params must be a dict"),
        (lambda: window(params={"a": torch.zeros(2), "b": torch.zeros(3)}), ValueError, r"params\['b'\] is \(3,\)"),
        (lambda: window(state=CoordinatewiseLSTM(hidden_size=2).init_state(5)), ValueError, "state's hidden must have"),
        (lambda: train(unroll=30), ValueError, "unroll must divide steps, got unroll=30 and steps=100"),
        (lambda: train(unroll=200), ValueError, "unroll must divide steps"),
        (lambda: train(iterations=0), ValueError, "iterations must be at least 1, got 0"),
        (lambda: train(lr=0.0), ValueError, "lr must be a positive number, got 0.0"),
        (lambda: train(clip=-1), ValueError, "clip must be a positive number, got -1"),
        (lambda: window(objective="product"), ValueError, "objective must be .* got 'product'"),
        (lambda: train(horizons=3), ValueError, "horizons must be None, .* got 3"),
        (lambda: train(horizons=(0, 3)), ValueError, r"horizons\[0\] must be at least 1, got 0"),
        (lambda: train(horizons=(4, 3)), ValueError, r"horizons\[1\] must be at least 4, got 3"),
        (lambda: train(horizons=lambda iteration, generator: 0), ValueError, "horizons must be at least 1, got 0"),
        (lambda: train(curriculum=(20,), horizons=(1, 3)), ValueError, r"curriculum=\(20,\) needs horizons=None"),
        (lambda: train(curriculum=20), ValueError, "curriculum must be None or a tuple of horizons, .* got 20"),
        (lambda: train(curriculum=()), ValueError, r"curriculum must be None or .* got \(\)"),
        (lambda: train(curriculum=(20, 0)), ValueError, r"curriculum\[1\] must be at least 1, got 0"),
        (lambda: train(curriculum=(20.0,)), TypeError, r"curriculum\[0\] must be an int, got 20.0"),
        (lambda: train(curriculum=(20, 50)), ValueError, r"multiples of unroll=20 below steps=100, got \(20, 50\)"),
        (lambda: train(curriculum=(40, 20)), ValueError, "curriculum must be increasing"),
        (lambda: train(curriculum=(20, 100)), ValueError, "below steps=100"),
        (lambda: train(curriculum=(20,), patience=0), ValueError, "patience must be at least 1, got 0"),
        (lambda: train(sigma=0.1), ValueError, "sigma is for method pes, got method replay"),
        (lambda: train(pairs=2, method="autograd"), ValueError, "pairs is for method pes, got method autograd"),
        (lambda: train(patience=5), ValueError, "patience needs curriculum"),
        (lambda: train(imitation_weight=2.0), ValueError, "imitation_weight needs teacher"),
        (
            lambda: train(teacher=(torch.optim.SGD, {"lr": 0.1}), imitation=1.0, second_order=True),
            ValueError,
            "second_order has no effect with imitation 1.0",
        ),
        (
            lambda: train(teacher=(torch.optim.SGD, {"lr": 0.1}), imitation=1.0, objective="log"),
            ValueError,
            "objective has no effect",
        ),
        (lambda: train(skip_non_finite=-1), ValueError, "skip_non_finite must be at least 0, got -1"),
        (lambda: train(checkpoint_every=-2), ValueError, "checkpoint_every must be at least 1, got -2"),
        (lambda: train(meta_batch=1.5), TypeError, "meta_batch must be an int, got 1.5"),
        (lambda: meta_train(nn.Linear(1, 1), Quadratics()), TypeError, "net must be a learned optimizer.*got Linear"),
        (lambda: meta_train(CoordinatewiseLSTM(), "quadratics"), TypeError, "problem must have sample"),
        (lambda: evaluate(CoordinatewiseLSTM(), Quadratics(), steps=0), ValueError, "steps must be at least 1, got 0"),
        (lambda: evaluate(CoordinatewiseLSTM(), Quadratics(), num_functions=-2), ValueError, "num_functions must be"),
        (lambda: evaluate_baseline("Adam", {"lr": 1}, Quadratics()), TypeError, "optimizer must be a class"),
        (lambda: evaluate_baseline(torch.optim.LBFGS, {}, Quadratics()), ValueError, "LBFGS needs a closure"),
        (lambda: evaluate_baseline(torch.optim.Adam, 0.1, Quadratics()), TypeError, "options must be a dict"),
        (lambda: tune_baseline(torch.optim.Adam, Quadratics(), [0.1]), ValueError, "lrs must be at least three"),
        (lambda: tune_baseline(torch.optim.Adam, Quadratics(), [-1, 0.1, 1]), ValueError, "lrs must be at least three"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_of_the_wrong_shape():
    batch = MetaBatch({"x": torch.ones(2, 3)}, lambda params, step: params["x"].sum())
    net = CoordinatewiseLSTM()
    with pytest.raises(ValueError, match=r"loss must return a tensor of shape \(2,\)"):
        meta_gradient(net, batch, batch.params, net.init_state(6))
