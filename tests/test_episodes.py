"""Evolution strategies whose pairs have episodes of their own: what pairs share, that the estimate is the gradient, and whole runs."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradbuffer.checks import NonFiniteError
from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
from gradbuffer.training import episodes as module
from gradbuffer.training.episodes import Pairs, Share
from gradbuffer.training.episodic_run import SQUARES, EpisodicRun
from gradbuffer.training.options import training_of
from gradbuffer.training.particles import CompiledParticles, CompiledSteps, Particles, particles_for
from meta_training import Episodes, EpisodicES, RandomHorizon, meta_gradient, meta_train
from optimizees import MetaBatch, Mixture, Networks, Perceptrons, Quadratics, RandomScaling
from optimizers import CoordinatewiseLSTM

ROOT = Path(__file__).resolve().parents[1]


# Pairs ------------------------------------------------------------------------------------------------------------------


class Recorded:
    """Particles whose losses the weights decide: 10 + slope · (w₁ + … + w_t), of the weights of all steps to the call's last one."""

    slope = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1])

    def __init__(self, functions):
        self.calls, self.params, self.past = [], torch.zeros(2 * functions, 3), torch.zeros(2 * functions)

    def begin(self, function, params):
        self.params[2 * function : 2 * function + 2], self.past[2 * function : 2 * function + 2] = params["x"], 0

    def run(self, spans, weights, rates, scales):
        steps = torch.cat([torch.full((span.last - span.first,), span.step) for span in spans])
        given = {"weights": weights, "rates": rates, "scales": scales, "params": self.params, "past": self.past}
        self.calls.append({name: value.clone() for name, value in given.items()} | {"steps": steps})
        self.past += rates.shape[1] * (weights @ self.slope)
        self.params = self.params + 1
        return (10 + self.past[:, None]).expand(-1, rates.shape[1])


class Five(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5))


def functions(count, generator=None):
    params = {"x": torch.rand(count, 3, generator=generator)}
    return MetaBatch(params, lambda params, step: params["x"].square().sum(1))


def pairs_of(monkeypatch, pairs=6, window=10, lengths=(20, 60), seed=0, **options):
    episodes = Episodes(lengths, **{name: options.pop(name) for name in ("falling", "late") if name in options})
    particles = Recorded(pairs)
    monkeypatch.setattr(module, "particles_for", lambda *given: particles)
    method = EpisodicES(episodes=episodes, ceiling=10.0, **options)
    return particles, Pairs(Five(), method, Share(0, 0, pairs, pairs), window, seed, functions(pairs))


def advance(pairs, iteration, weights=None):
    weights = torch.zeros(5) if weights is None else weights
    generator = torch.Generator().manual_seed(iteration)
    return pairs.advance(weights, functions(pairs.functions, generator), iteration)


def test_families_may_have_episodes_of_their_own():
    """A family with its own ranges goes on as with these alone, and validation tries the rates of all."""
    slow, fast = Episodes((40, 40), (1e-4, 2e-4)), Episodes((20, 60), (1e-2, 2e-2))
    method = EpisodicES(episodes=[slow, fast], trials=2)
    batch = functions(3)
    for family, own in enumerate((slow, fast)):
        drawn = []
        for given in (method, EpisodicES(episodes=own)):
            net = start_as_normalized_adam(MLPOptimizer())
            pairs = Pairs(net, given, Share(family, 0, 3, 3), 20, 0, batch)
            pairs.begin(batch, 0)
            drawn.append(pairs.on_way)
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in ("rate", "length", "falling"))
        least, most = own.rates
        assert ((least <= drawn[0]["rate"]) & (drawn[0]["rate"] <= most)).all()
    torch.testing.assert_close(method.trial_rates, torch.tensor([1e-4, 2e-2], dtype=torch.float64))


def test_what_a_pair_shares(monkeypatch):
    particles, pairs = pairs_of(monkeypatch)
    for iteration in range(8):
        advance(pairs, iteration, torch.ones(5))
    for call in particles.calls:
        for name in ("rates", "scales"):
            assert torch.equal(call[name][::2], call[name][1::2]), name
        torch.testing.assert_close((call["weights"][::2] + call["weights"][1::2]) / 2, torch.ones(6, 5))
        noise = call["weights"][::2] - 1
        assert len(noise.unique(dim=0)) == 6 and 0.001 < noise.std() < 0.03  # one of its own for each pair, sigma 0.01
        begun = call["steps"] == 0
        assert torch.equal(call["params"][::2][begun], call["params"][1::2][begun])
        assert (call["past"].view(-1, 2)[begun] == 0).all()
        assert call["rates"].shape[0] == 12 and (call["rates"] >= 0).all() and call["rates"].max() <= 3e-2
        assert 1e-3 <= call["scales"].min() and call["scales"].max() <= 1e3
    starts = particles.calls[0]["params"][::2]
    gains = starts / functions(6, torch.Generator().manual_seed(0)).params["x"]
    torch.testing.assert_close(gains.std(1), torch.zeros(6), rtol=0, atol=1e-5)
    assert gains.min() >= 0.7 and gains.max() <= 1.7 and gains[:, 0].std() > 0.05


@pytest.mark.parametrize("hold", [True, False])
def test_how_long_a_perturbation_is_held(hold, monkeypatch):
    particles, pairs = pairs_of(monkeypatch, hold=hold, sigma=0.03)
    for iteration in range(12):
        advance(pairs, iteration)
    position = inside = between = 0
    for before, after in zip(particles.calls, particles.calls[1:]):
        steps = before["rates"].shape[1]
        position += steps
        goes_on = after["steps"] == before["steps"] + steps
        same = (before["weights"][::2] == after["weights"][::2]).all(1)
        assert not same[~goes_on].any() and goes_on.any()
        assert (same == (hold or position % 10 > 0))[goes_on].all()  # fresh ones are drawn where a window begins
        inside, between = inside + (position % 10 > 0), between + (position % 10 == 0)
    assert inside > 5 and between == 11


@pytest.mark.parametrize("staggered", [True, False])
def test_episodes_end_and_begin_anew(staggered, monkeypatch):
    particles, pairs = pairs_of(monkeypatch, pairs=40, staggered=staggered)
    for iteration in range(20):
        advance(pairs, iteration)
    steps = torch.stack([call["steps"] for call in particles.calls])  # (calls, pairs)
    taken = torch.tensor([call["rates"].shape[1] for call in particles.calls])
    assert taken.sum() == 200 and set((taken.cumsum(0)).tolist()) >= set(range(10, 201, 10))
    assert steps.max() < 60 and ((steps == 0).sum(0) > 1).all()
    begun, places = steps == 0, (taken.cumsum(0) - taken) % 10  # where in a window a call begins
    assert (begun.any(1) & (places > 0)).any()
    if staggered:
        assert ((0 < begun.sum(1)) & (begun.sum(1) < 39)).sum() > 20 and len(steps.unique(dim=1).T) > 5
    else:
        assert (steps == steps[:, :1]).all() and len(pairs.spans()) == 1
        assert len(particles.calls[0]["rates"].unique(dim=0)) == 40


@pytest.mark.parametrize("hold", [True, False])
def test_the_estimate_is_the_gradient(hold, monkeypatch):
    """Of the window's relative loss by the weights of all windows of the episode; linear losses, so up to sampling alone."""
    particles, pairs = pairs_of(monkeypatch, pairs=4000, hold=hold, lengths=(40, 40))
    total, expected = torch.zeros(5), torch.zeros(5)
    for iteration in range(6):
        known = len(particles.calls)
        estimate = advance(pairs, iteration)
        for call in particles.calls[known:]:
            taken = call["rates"].shape[1]  # a loss is decided by the weights of the steps to the last one of its call
            expected += taken / 10 * (call["steps"] + taken).double().mean() * particles.slope / 10
        total += estimate.each.mean(0)
        assert abs(estimate.loss - 10) < 0.1
    torch.testing.assert_close(total, expected, rtol=0.1, atol=0.8)


def test_late_windows_of_falling_episodes_count_more(monkeypatch):
    def estimates(**options):
        _, pairs = pairs_of(monkeypatch, pairs=3, lengths=(40, 40), **options)
        found = []
        for iteration in range(6):
            each = advance(pairs, iteration).each
            whole = pairs.on_way["done"] >= 10  # all of the window is of one episode
            found.append(((pairs.on_way["done"] - 5.5) / pairs.on_way["length"], each, whole))
        return found

    even, late = estimates(falling=1), estimates(falling=1, late=0.5)
    assert sum(int(whole.sum()) for *_, whole in even) > 8
    for (progress, each, whole), (_, counted, _) in zip(even, late):
        torch.testing.assert_close(counted[whole], (each * (1 + 0.5 * (2 * progress - 1))[:, None])[whole])
    for (_, each, _), (_, counted, _) in zip(estimates(falling=0), estimates(falling=0, late=0.5)):
        assert torch.equal(each, counted)


def test_large_losses_count_as_the_ceiling_and_starts_must_be_finite(monkeypatch):
    _, pairs = pairs_of(monkeypatch, pairs=3, lengths=(2000, 6000))
    losses = torch.full((6, 10), 2.0, dtype=torch.float64)
    losses[0, 5:], losses[2, 5:] = math.inf, 100.0  # of the first two pairs, the first particle alone
    monkeypatch.setattr(pairs.particles, "run", lambda *given: losses)
    estimate = advance(pairs, 0)
    wanted = (2.0 + 20.0) / 2  # half of the window at ten times the start
    relative = (wanted - 2) / ((wanted + 2) / 2) * pairs.on_way["noise"][:2] / (2 * 0.01**2)
    torch.testing.assert_close(estimate.each[:2], relative.double(), rtol=1e-5, atol=1e-4)
    assert (estimate.each[2] == 0).all() and estimate.each.isfinite().all()

    _, pairs = pairs_of(monkeypatch, pairs=3, lengths=(2000, 6000))
    losses[4, 0] = math.inf
    monkeypatch.setattr(pairs.particles, "run", lambda *given: losses)
    with pytest.raises(NonFiniteError, match="function 2 of family 0 is not finite at the start"):
        advance(pairs, 0)
    losses[4, 0] = 2.0
    advance(pairs, 1)
    assert (
        pairs.on_way["origin"].tolist()[2] == 1 and 0 in pairs.on_way["origin"].tolist()
    )  # that one alone begins anew
    losses[3, 3] = -0.1
    with pytest.raises(ValueError, match="losses must be 0 or more .* got -0.1"):
        advance(pairs, 2)


# Whole runs -------------------------------------------------------------------------------------------------------------


def families(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 8, generator=generator, dtype=torch.float64).to(dtype)
    labels = (inputs @ torch.randn(8, 4, generator=generator, dtype=torch.float64).to(dtype)).argmax(1)
    return [Perceptrons(inputs, labels, (8,), batch_size=16), Perceptrons(inputs, inputs, (4,), "tanh", batch_size=16)]


EPISODES = Episodes(lengths=(40, 80), rates=(3e-3, 5e-2), scales=(0.5, 2.0))
SETTINGS = dict(
    steps=60,
    unroll=20,
    meta_batch=4,
    iterations=6,
    lr=0.01,
    clip=4.0,
    warmup=2,
    balance=True,
    averaging=0.9,
    validation_functions=4,
    validation_every=3,
    progress=False,
)


def train(problem, dtype=torch.float32, method=EpisodicES(episodes=EPISODES), net=None, **options):
    net = net or start_as_normalized_adam(MLPOptimizer().to(dtype))
    return net, meta_train(net, problem, method=method, **SETTINGS | options)


def same(net, other):
    return all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize("staggered, context", [(True, False), (False, True)])
def test_the_compiled_engine_is_plain_torch(staggered, context, monkeypatch):
    """Whole runs in float64, with weights of their own for each particle, ends of episodes and validation."""
    pytest.importorskip("numba")
    problem, found, weights = Mixture(families(torch.float64)), [], []
    for kind, kernels in ((CompiledParticles, "auto"), (Particles, "torch")):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        net = start_as_normalized_adam(MLPOptimizer(context=context, orthogonalize=context).double())
        assert type(particles_for(net, problem.problems[0].sample(1), 2, 3)) is kind
        method = EpisodicES(episodes=EPISODES, staggered=staggered, trials=3)
        note = lambda done, history: weights.append(nn.utils.parameters_to_vector(net.parameters()).detach())  # noqa: B023, E731
        given = dict(net=net, method=method, meta_batch=3, validation_functions=2, callback=note)
        found.append(train(problem, **given)[1])
    history, again = found
    torch.testing.assert_close(torch.stack(weights[:6]), torch.stack(weights[6:]), rtol=1e-7, atol=1e-9)
    assert len({tuple(some.tolist()) for some in weights[:6]}) == 6
    for name in ("meta_loss", "grad_norm", "update_size", "signal_to_noise"):
        assert vars(history)[name] == pytest.approx(vars(again)[name], rel=1e-7), name
        assert len(vars(history)[name]) == 6
    assert [at for at, _ in history.validation] == [0, 3, 6]
    assert [score for _, score in history.validation] == pytest.approx([s for _, s in again.validation], rel=1e-7)


def sums(dtype):
    """A family of small convolutions whose scalars, vectors, matrices and kernels are all moved."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    shapes = {"kernel": (4, 2, 3, 3), "bias": (4,), "scale": (), "outer": (1, 36)}

    def loss(params, x):
        columns = torch.nn.functional.unfold(x.flatten(0, 1), 3).unflatten(0, x.shape[:2])  # (B, batch, 18, 9)
        hidden = torch.tanh(params["kernel"].flatten(2)[:, None] @ columns + params["bias"][:, None, :, None])
        found = params["scale"][:, None] * (hidden.flatten(2) @ params["outer"].mT)[..., 0]
        return (found - x.sum((2, 3, 4)) / 5).square().mean(1)

    return Networks([inputs], shapes, loss, batch_size=8)


@pytest.mark.parametrize(
    "options", [{}, {"context": True, "orthogonalize": True}, {"vectors": "adamw", "weight_decay": 0.1}], ids=str
)
def test_compiled_steps_are_plain_torch(options, monkeypatch):
    """Whole runs of networks that are no perceptrons, in float64; all losses of a family are one computation, also where the functions
    are at steps of their own."""
    pytest.importorskip("numba")
    problem, found, calls = sums(torch.float64), [], []
    loss, problem.loss = problem.loss, lambda *given: calls.append(1) or loss(*given)
    for kind, kernels in ((CompiledSteps, "auto"), (Particles, "torch")):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        net = start_as_normalized_adam(MLPOptimizer(**options).double())
        assert type(particles_for(net, problem.sample(1), 2, 3)) is kind
        calls.clear()
        method = EpisodicES(episodes=EPISODES, trials=3)
        found.append(train(problem, net=net, method=method, meta_batch=3, validation_functions=2))
        assert len(calls) == SETTINGS["iterations"] * SETTINGS["unroll"] + 3 * SETTINGS["steps"]  # three validations
    (net, history), (other, again) = found
    for ours, theirs in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    for name in ("meta_loss", "grad_norm", "update_size", "signal_to_noise"):
        assert vars(history)[name] == pytest.approx(vars(again)[name], rel=1e-7), name


class Bowls:
    """A user's own, which is no perceptron, uses torch's own generator, and does not say how it is divided."""

    def sample(self, meta_batch, generator=None):
        center, curvature = torch.randn(meta_batch, 3, 2, generator=generator), 0.5 + torch.rand(meta_batch)

        def loss(params, step):
            return curvature * (params["x"] - center).square().sum((1, 2)) + (
                params["b"] * math.cos(step)
            ).square().sum(1)

        return SimpleNamespace(params={"x": torch.zeros(meta_batch, 3, 2), "b": torch.ones(meta_batch, 2)}, loss=loss)


CASES = {
    "perceptrons": lambda: (Mixture(families()), {}),
    "networks": lambda: (sums(torch.float32), {}),
    "one at a time": lambda: (Mixture(families(), families=1), {}),
    "fresh perturbations": lambda: (families()[0], dict(method=EpisodicES(hold=False, episodes=EPISODES))),
    "a user's": lambda: (
        Mixture([Bowls(), RandomScaling(families()[1])]),
        dict(method=EpisodicES(episodes=EPISODES, trials=2), meta_batch=2, validation_functions=2),
    ),
    "episodes of their own": lambda: (
        Mixture([Bowls(), Bowls()]),
        dict(method=EpisodicES(episodes=(EPISODES, Episodes(lengths=(20, 40), rates=(1e-2, 2e-2))))),
    ),
    "all together": lambda: (Bowls(), dict(method=EpisodicES(episodes=EPISODES, staggered=False))),
    "time": lambda: (Quadratics(3), dict(net=start_as_normalized_adam(MLPOptimizer(variant="small_fc")))),
}


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(name, tmp_path):
    def stop(done, history):
        if done == 4:
            raise Stop

    path = tmp_path / "run"
    problem, options = CASES[name]()
    net, history = train(problem, **options)
    assert all(math.isfinite(value) for value in (*history.meta_loss, *history.signal_to_noise, *history.update_size))
    problem, options = CASES[name]()
    with pytest.raises(Stop):
        train(problem, checkpoint=path, checkpoint_every=2, callback=stop, **options)
    torch.manual_seed(99)
    problem, options = CASES[name]()
    again, resumed = train(problem, checkpoint=path, **options)
    assert resumed == history and same(net, again)
    if name == "perceptrons":
        other = families()
        other[1].data = other[1].inputs, other[1].targets + 1e-3
        with pytest.raises(ValueError, match="another run: problem was"):
            train(Mixture(other), checkpoint=path)
        with pytest.raises(ValueError, match="another run: sigma was 0.01 and is 0.02"):
            train(problem, checkpoint=path, method=EpisodicES(sigma=0.02, episodes=EPISODES))


def test_a_run_learns():
    """Validation, pair by pair of the same functions, falls by far more than it scatters."""
    method = EpisodicES(sigma=0.02, episodes=EPISODES)
    given = dict(iterations=250, meta_batch=8, averaging=0.95, validation_functions=8, validation_every=250)
    problem = Mixture(families())
    net, history = train(problem, method=method, warmup=50, **given)
    run = EpisodicRun(net, problem, training_of(net, method=method, steps=60, unroll=20, validation_functions=8))
    start = EpisodicRun(
        start_as_normalized_adam(MLPOptimizer()),
        problem,
        training_of(net, method=method, steps=60, unroll=20, validation_functions=8),
    )
    gains = torch.tensor(
        [
            [math.log(start.score_of(own, seed) / run.score_of(own, seed)) for own in problem.problems]
            for seed in range(8)
        ]
    ).mean(1)
    assert gains.mean() > 4 * gains.std() / 8**0.5 and gains.mean() > 0.02, gains
    assert history.best_iteration == 250 and history.best_validation < history.validation[0][1]
    assert len(history.signal_to_noise) == 250


def test_frozen_weights_stay():
    net = start_as_normalized_adam(MLPOptimizer())
    net.layers["weight_1"].requires_grad_(False)
    before, after = {name: value.clone() for name, value in net.state_dict().items()}, {}
    note = lambda done, history: after.update({name: value.clone() for name, value in net.state_dict().items()})  # noqa: E731
    train(families()[0], net=net, iterations=2, callback=note)
    assert [name for name in before if torch.equal(before[name], after[name])] == ["layers.weight_1"]


def test_the_signal_to_noise_ratio():
    net, options = MLPOptimizer(), dict(method=EpisodicES(episodes=EPISODES))
    run = EpisodicRun(net, families()[0], training_of(net, **options, unroll=20, steps=60, meta_batch=6))
    noise = torch.randn(6, sum(p.numel() for p in net.parameters()))
    for shift in (0.0, 1.0):
        each = noise + shift
        mean, variance = each.mean(0), each.var(0).sum() / 6
        names = [(name, p) for name, p in net.named_parameters()]
        parts = mean.split([p.numel() for _, p in names])
        grads = {(0, name): part.view_as(p) for (name, p), part in zip(names, parts)}
        run.variance = 0.0
        run.balance(0, grads | {(0, SQUARES): each.square().sum(1).mean()})
        assert run.variance == pytest.approx(variance.item(), rel=1e-3)


JOB = """
import sys
import torch
from torch import distributed
sys.path.insert(0, "tests")
from test_episodes import CASES, same, train

torch.set_num_threads(1)
rank, size, address, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=size)
for name in ("perceptrons", "all together"):
    problem, options = CASES[name]()
    net, history = train(problem, checkpoint=f"{folder}/{name}", iterations=4, validation_every=2, **options)
    if rank == 0:
        torch.save((history.meta_loss, history.signal_to_noise, net.state_dict()), f"{folder}/{name} result")
distributed.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path):
    jobs = [
        subprocess.Popen([sys.executable, "-c", JOB, str(rank), "2", str(tmp_path / "store"), str(tmp_path)], cwd=ROOT)
        for rank in range(2)
    ]
    try:
        assert [job.wait(timeout=900) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
    for name in ("perceptrons", "all together"):
        problem, options = CASES[name]()
        path = tmp_path / f"{name} alone"
        net, history = train(problem, iterations=4, validation_every=2, checkpoint=path, **options)
        losses, ratios, weights = torch.load(tmp_path / f"{name} result")
        assert history.meta_loss == pytest.approx(losses, rel=1e-4)
        assert history.signal_to_noise == pytest.approx(ratios, rel=1e-3)
        for key, value in net.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
        one, two = (torch.load(file, weights_only=True)["content"] for file in (path, tmp_path / name))
        for family, carried in one["families"].items():
            for part, value in carried["on_way"].items():
                torch.testing.assert_close(two["families"][family]["on_way"][part], value, rtol=1e-3, atol=1e-3)


class Diverging(Quadratics):
    """Starts that are not finite in the third draw of a run."""

    draws = 0

    def sample(self, meta_batch, generator=None):
        batch = super().sample(meta_batch, generator)
        self.draws += 1
        factor = math.nan if self.draws == 3 else 1.0
        return MetaBatch(batch.params, lambda params, step: factor * batch.loss(params, step))

    def validation_problem(self):
        return Quadratics(self.dim)


def test_starts_that_are_not_finite_are_skipped():
    method = EpisodicES(episodes=Episodes(lengths=(20, 20), rates=(1e-3, 1e-2)))
    _, history = train(Diverging(3), method=method, skip_non_finite=1, meta_batch=2)
    assert [iteration for iteration, _ in history.skipped] == [2]
    assert [math.isfinite(value) for value in history.signal_to_noise] == [k != 2 for k in range(6)]
    with pytest.raises(NonFiniteError, match="stopped at iteration 2: .* at the start of its episode"):
        train(Diverging(3), method=method, meta_batch=2)


class OwnTensorwise(MLPOptimizer):
    def forward(self, grads, state, *, params):
        return super().forward(grads, state, params=params)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: train(Quadratics(2), net=CoordinatewiseLSTM()), ValueError, "needs a tensorwise network.* got Coord"),
        (lambda: train(Quadratics(2), net=OwnTensorwise()), ValueError, "takes params, lr and weights.* got OwnTensor"),
        (lambda: train(Quadratics(2), horizon=RandomHorizon(1, 3)), ValueError, "horizon has no effect with method=Ep"),
        (lambda: train(Quadratics(2), horizons=(1, 3)), ValueError, "horizon has no effect with method=Ep"),
        (lambda: train(Quadratics(2), curriculum=(20,)), ValueError, "horizon has no effect with method=Ep"),
        (lambda: train(Quadratics(2), weights=[1.0] * 21), ValueError, "weights has no effect with method=Ep"),
        (lambda: train(Quadratics(2), teacher=MLPOptimizer(), imitation=0.5), ValueError, "teacher has no effect"),
        (lambda: train(Quadratics(2), cuda_graph=True), ValueError, "cuda_graph=True needs"),
        (lambda: train(Quadratics(2), sigma=0.1), ValueError, "sigma must stand in method=EpisodicES"),
        (lambda: train(Quadratics(2), method="episodic_es"), ValueError, "method must be"),
        (lambda: train("perceptrons"), TypeError, "problem must have sample"),
        (lambda: EpisodicES(sigma=0), ValueError, "sigma must be a positive number, got 0"),
        (lambda: EpisodicES(ceiling=1.0), ValueError, "ceiling must be above 1, got 1.0"),
        (lambda: EpisodicES(trials=0), ValueError, "trials must be at least 1, got 0"),
        (lambda: EpisodicES(hold=1), TypeError, "hold must be True or False, got 1"),
        (
            lambda: EpisodicES(episodes=(1, 2)),
            TypeError,
            r"episodes must be an Episodes, or a tuple of them, got \(1, 2\)",
        ),
        (lambda: EpisodicES(episodes=()), TypeError, r"episodes must be an Episodes, or a tuple of them, got \(\)"),
        (
            lambda: train(families()[0], method=EpisodicES(episodes=(EPISODES,) * 7)),
            ValueError,
            "episodes must be one Episodes, or . of them, one for each problem; got 7",
        ),
        (lambda: Episodes(lengths=(5, 2)), ValueError, r"lengths must be the least and the most, .* got \(5, 2\)"),
        (lambda: Episodes(rates=(0, 1)), ValueError, "rates must be the least"),
        (lambda: Episodes(scales=3.0), ValueError, "scales must be the least .* got 3.0"),
        (lambda: Episodes(falling=1.5), ValueError, "falling must be from 0 to 1, got 1.5"),
        (lambda: Episodes(late=-0.1), ValueError, "late must be from 0 to 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_single_window_is_refused():
    net, batch = MLPOptimizer(), Quadratics(2).sample(2)
    with pytest.raises(ValueError, match=r"EpisodicES is a method of meta_train.*PES\(hold=True, per_function=True\)"):
        meta_gradient(net, batch, batch.params, net.init_state(batch.params), method=EpisodicES())


@pytest.mark.cuda
def test_a_device_trains_as_a_cpu(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "torch")
    runs = []
    for device in ("cpu", "cuda"):
        net = start_as_normalized_adam(MLPOptimizer().double())
        given = dict(meta_batch=3, iterations=3, validation_functions=2, device=device)
        runs.append(train(Mixture(families(torch.float64)), net=net, **given)[1])
    for name in ("meta_loss", "grad_norm", "update_size", "signal_to_noise"):
        assert vars(runs[0])[name] == pytest.approx(vars(runs[1])[name], rel=1e-6), name
    assert runs[0].best_validation == pytest.approx(runs[1].best_validation, rel=1e-6)
