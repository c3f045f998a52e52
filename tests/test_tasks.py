"""Tasks draw, train and repeat themselves; races and speeds on made-up optimizers whose answers are known."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_cifar10, write_mnist
from torch import nn

from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
from gradbuffer.problems import kept_apart, races, tasks
from gradbuffer.problems.kept_apart import FIRST_KEPT_APART, KEPT_APART
from gradbuffer.problems.kept_apart_third import THIRD_KEPT_APART
from gradbuffer.problems.races import Contestant, Race, final, race, smooth, speed, speed_against, summary, train
from gradbuffer.problems.tasks import GENERALIZATION, TASKS, Task

ALL = TASKS | GENERALIZATION | FIRST_KEPT_APART | KEPT_APART | THIRD_KEPT_APART


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    return write_cifar10(root, side=32)


@pytest.fixture
def data(written, monkeypatch):
    monkeypatch.setenv("L2O_DATA", str(written))


def adamw(params):
    return torch.optim.AdamW(params, lr=0.003)


# Tasks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_tasks_train_and_repeat_themselves(data, name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (train(ALL[name], adamw, 2, seed) for seed in (0, 0, 1))
    assert first.isfinite().all() and torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ALL)
def test_all_parameters_have_gradients(data, name):
    model = ALL[name].make_model()
    ALL[name].loss(model, ALL[name].draw(torch.Generator().manual_seed(0))).backward()
    assert [key for key, param in model.named_parameters() if param.grad is None or not param.grad.any()] == []


def test_kept_apart_tasks_have_the_answers_they_say(data):
    generator = torch.Generator().manual_seed(0)
    sequences, sums = kept_apart.marked_numbers(generator)
    assert (sequences[..., 1].sum(1) == 2).all() and torch.allclose(sequences.prod(2).sum(1), sums)
    noisy, images = kept_apart.noisy_digits(generator)
    assert noisy.shape == images.shape == (32, 1, 14, 14) and 0.4 < (noisy - images).std() < 0.6
    contexts, middle = kept_apart.middles(generator)
    text = "".join(map(chr, tasks.encoded_text()[0].tolist()))
    for context, character in zip(contexts[:3].tolist(), middle.tolist()):
        whole = [*context[:4], character, *context[4:]]
        assert "".join(map(chr, whole)) in text
    lots = TASKS, FIRST_KEPT_APART, KEPT_APART, THIRD_KEPT_APART
    assert len(set().union(*lots)) == sum(map(len, lots))


def test_the_second_lot_has_the_answers_it_says(data):
    generator = torch.Generator().manual_seed(0)
    links, ways = kept_apart.two_steps_away(generator)
    node = 5
    counted = sum(
        bool(links[3, node, middle] and links[3, middle, other])
        for middle in range(12)
        for other in range(12)
        if other != node
    )
    assert torch.equal(links, links.mT) and ways[3, node].item() == pytest.approx(math.log(1 + counted))
    sets, answers = kept_apart.ranges(generator)
    assert answers[2] == max(sets[2, :, 0]) - min(sets[2, :, 1])
    first, second = kept_apart.two_views(generator)
    assert first.shape == second.shape and all((view[0] == 0).sum() >= 25 for view in (first, second))
    pairs, near = kept_apart.neighbours(generator)
    text = kept_apart.words().tolist()
    beside = {(a, b) for k in range(1, 4) for a, b in zip(text, text[k:])}
    assert near.mean() == 0.5
    assert all((a, b) in beside or (b, a) in beside for (a, b), yes in zip(pairs.tolist(), near.tolist()) if yes)

    def solution(x):  # of Poisson's equation, over x (1 - x)
        return sum(torch.sin(k * math.pi * x) for k in (1, 2, 4)) / (10 * math.pi**2) / (x * (1 - x))

    places = torch.rand(20, 1, dtype=torch.float64, generator=generator)
    assert kept_apart.heat_residual(solution, places) < 1e-20
    model, images = kept_apart.Adapted(), torch.randn(2, 3, 16, 16, generator=generator)
    whole = [fixed + outer @ inner for fixed, inner, outer in zip(model.fixed, model.inner, model.outer)]
    expected = ((images.flatten(1) @ whole[0].T).relu() @ whole[1].T).relu() @ whole[2].T
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_there_are_at_least_twelve_tasks_of_many_kinds():
    assert len(TASKS) >= 12 and len({task.kind for task in TASKS.values()}) >= 10


def test_images_of_another_size_are_resized(tiny_mnist, monkeypatch):
    monkeypatch.setenv("L2O_DATA", str(tiny_mnist))
    images, labels = tasks.mnist(4, 28)(torch.Generator().manual_seed(0))
    assert images.shape == (4, 1, 28, 28) and labels.shape == (4,)
    image = torch.rand(1, 1, 8, 8)
    assert torch.allclose(tasks.resize(image, 4), nn.functional.avg_pool2d(image, 2))
    assert tasks.resize(image, 8) is image


def test_sequences_have_the_answers_they_say():
    generator = torch.Generator().manual_seed(0)
    symbols, answers = tasks.echoes(generator)
    assert torch.equal(answers[:, 4:], symbols[:, :-4]) and not answers[:, :4].any()
    symbols, answers = tasks.sorted_symbols(generator)
    assert answers.tolist() == [sorted(row) for row in symbols.tolist()]
    stretch, following = tasks.characters(generator)
    assert torch.equal(stretch[:, 1:], following[:, :-1])


def test_the_language_model_sees_no_later_characters():
    model, (stretch, _) = TASKS["characters"].make_model(), tasks.characters(torch.Generator().manual_seed(0))
    changed = stretch.clone()
    changed[:, 20:] = 0
    a, b = model(stretch), model(changed)
    assert torch.allclose(a[:, :20], b[:, :20], atol=1e-5) and not torch.allclose(a[:, 20:], b[:, 20:], atol=1e-3)


def test_the_evidence_bound_is_that_of_torchs_distributions():
    model = tasks.VariationalAutoencoder(pixels=9, code=2)
    images, noise = torch.rand(5, 1, 3, 3).round(), torch.randn(5, 2)
    logits, mean, log_variance = model(images, noise)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).sum(1)
    fit = torch.distributions.Bernoulli(logits=logits).log_prob(images.flatten(1)).sum(1)
    assert torch.allclose(tasks.evidence_bound(model, (images, noise)), (divergence - fit).mean() / 9, rtol=1e-5)


def test_the_regression_is_as_ill_conditioned_as_it_says():
    mixing, weights = tasks.regression_problem()
    assert torch.linalg.cond(mixing.double().T @ mixing.double()).item() == pytest.approx(1e4, rel=0.01)
    inputs, targets = tasks.ill_conditioned(torch.Generator().manual_seed(0))
    assert (inputs @ weights - targets).square().mean().item() == pytest.approx(9e-6, rel=0.5)


# Races ----------------------------------------------------------------------------------------------------------------


class Slope(nn.Module):
    """Its loss is its only weight, so that SGD goes down by the rate in every step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1000.0))


SLOPE = Task(Slope, lambda generator: None, lambda model, _: model.weight, "made up", "")
BOWL = Task(Slope, lambda generator: None, lambda model, _: model.weight.square(), "made up", "")
# The loss is finite, its gradient is not.
CUSP = Task(
    Slope, lambda generator: None, lambda model, _: (model.weight - model.weight.detach()).sqrt(), "made up", ""
)


def sgd(centre, schedule="constant", **options):
    return Contestant(lambda params, lr: torch.optim.SGD(params, lr=lr, **options), centre, schedule)


def raced(contestant, task=SLOPE, steps=100):
    return race({"": task}, {"": contestant}, rates=1, steps=steps, seeds=[0, 1])[""][""]


def test_schedules():
    constant, cosine = (
        train(SLOPE, lambda params: torch.optim.SGD(params, lr=1.0), 100, 0, schedule)
        for schedule in ("constant", "cosine")
    )
    assert torch.equal(constant, 1000.0 - torch.arange(100.0))
    factors = 0.5 * (1 + torch.cos(math.pi * torch.arange(100) / 100))
    assert torch.allclose(cosine[1:], 1000.0 - factors.cumsum(0)[:-1])
    with pytest.raises(ValueError, match="schedule must be one of .*, got 'linear'"):
        train(SLOPE, adamw, 1, 0, "linear")


def test_several_optimizers_share_the_parameters():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    task = Task(Two, lambda generator: None, lambda model, _: model.a + model.b, "made up", "")

    def two(params):
        return [torch.optim.SGD(params[:1], lr=1.0), torch.optim.SGD(params[1:], lr=10.0)]

    losses = train(task, two, 3, 0, "constant")
    assert losses.tolist() == [0.0, -11.0, -22.0]


def test_divergence_is_a_result():
    losses = train(BOWL, lambda params: torch.optim.SGD(params, lr=10.0), 100, 0, "constant")
    assert losses[0] == 1e6 and losses[-1] == math.inf and not losses.isnan().any()


def test_an_optimizer_that_refuses_a_gradient_has_diverged():
    from optimizers import LearnedOptimizer, load_optimizer

    net = load_optimizer("general_lstm")
    assert train(CUSP, lambda params: LearnedOptimizer(params, net), 3, 0).tolist() == [0.0, math.inf, math.inf]


def test_rates_are_a_grid_around_the_centre():
    assert sgd(0.1).rates(5) == pytest.approx([0.01, 0.0316, 0.1, 0.316, 1.0], rel=1e-2)
    with pytest.raises(ValueError, match="centre must be a positive number, got 0"):
        sgd(0)


def test_the_best_rate_is_raced():
    result = race({"bowl": BOWL}, {"sgd": sgd(0.5 / math.sqrt(10))}, rates=5, steps=20, seeds=[0, 1, 2])["bowl"]["sgd"]
    assert result.rate == pytest.approx(0.5) and not result.at_edge  # one step from the bottom
    assert result.curves.shape == (3, 20) and result.mean == 0 and result.error == 0 and result.failures == 0
    assert math.isinf(result.tried[max(result.tried)]) or result.tried[max(result.tried)] > 1e6
    edge = race({"bowl": BOWL}, {"sgd": sgd(0.001)}, rates=3, steps=20, seeds=[0])["bowl"]["sgd"]
    assert edge.at_edge and edge.rate == max(edge.tried) and math.isnan(edge.error)
    with pytest.raises(ValueError, match="others than tuning_seed, got"):
        race({"bowl": BOWL}, {"sgd": sgd(0.1)}, seeds=[1000])


def test_contestants_start_and_draw_alike():
    contestants = {"slow": sgd(1e-9), "also slow": sgd(1e-9, momentum=0.9)}
    slow, also = race({"": TASKS["ill-conditioned"]}, contestants, rates=1, steps=5, seeds=[0, 1])[""].values()
    assert torch.allclose(slow.curves, also.curves, rtol=1e-5) and not torch.allclose(
        slow.curves[0], slow.curves[1], rtol=1e-2
    )


def test_failures_are_counted():
    curves = torch.tensor([[2.0] * 9 + [1.0], [2.0] * 9 + [3.0], [2.0] * 9 + [math.inf], [2.0] * 10])
    assert Race(0.1, {0.1: 1.0}, curves).failures == 2


def test_final_and_smoothed():
    curve = torch.arange(20.0)
    assert final(curve) == 18.5 and final(curve[:3]) == 2
    assert smooth(curve)[[0, 1, 19]].tolist() == [0, 0.5, 18.5]
    assert smooth(curve, 4)[10] == 8.5


def test_speed_between_runs():
    ends = {100: 1.0, 200: 0.75, 400: 0.25}
    assert speed(0.5, ends, 100) == pytest.approx(2 * math.sqrt(2))
    assert speed(0.75, ends, 100) == 2 and speed(0.75, ends, 400) == 0.5
    assert speed(0.1, ends, 100) == 4  # at least
    assert speed(2.0, ends, 200) == 0.5  # at most
    assert speed(math.nan, ends, 100) == 1
    assert speed(0.5, {100: math.inf, 200: math.nan, 400: 0.25}, 100) == 4


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("ratio", [0.4, 1.0, 2.0, 4.0])
def test_twice_the_slope_is_twice_the_speed(schedule, ratio):
    ours, other = sgd(ratio, schedule), sgd(1.0, schedule)
    found = speed_against(SLOPE, raced(ours), other, raced(other), [0, 1])
    assert found == pytest.approx(ratio, rel=0.04)  # between two runs the curve is no straight line over log steps


def test_speeds_have_bounds():
    slow, fast = sgd(0.001), sgd(1.0)
    assert speed_against(SLOPE, raced(fast), slow, raced(slow), [0, 1]) == races.SPANS[-1]
    assert speed_against(SLOPE, raced(slow), fast, raced(fast), [0, 1]) == pytest.approx(races.SPANS[0], rel=0.01)
    failing = raced(sgd(1.0, maximize=True))
    assert failing.failures == 2
    assert speed_against(SLOPE, failing, slow, raced(slow), [0, 1]) == pytest.approx(races.SPANS[0], rel=0.01)


def test_runs_of_the_other_are_kept():
    ours, other, longer = sgd(1.9, "cosine"), sgd(1.0, "cosine"), {}
    first = speed_against(SLOPE, raced(ours), other, raced(other), [0, 1], longer)
    assert sorted(longer) == [100, 150, 200]
    never = Contestant(None, 1.0)  # trains nothing any more
    assert speed_against(SLOPE, raced(ours), never, raced(other), [0, 1], longer) == first


def test_summary_of_speeds():
    found = summary([4.0, 0.5, 1.0, 2.0, 8.0])
    assert found["geometric mean"] == pytest.approx(2.0) and found["worst"] == 0.5
    assert found["interquartile mean"] == pytest.approx(7 / 3) and found["share above 1"] == 0.6
    with pytest.raises(ValueError, match="speeds must hold at least one"):
        summary([])


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs benchmarks/tasks.py with these arguments, in this process; returns what it prints."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "tasks.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_tasks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tasks.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


def test_the_command_races_weights_of_a_file(command, tmp_path):
    net = MLPOptimizer(context=True)
    weights = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.save({"averaged": weights, "k": 3, "config": net.config}, tmp_path / "weights.pt")
    table, figure = tmp_path / "table.md", tmp_path / "figure.png"
    text = command(
        "--net",
        tmp_path / "weights.pt",
        "--steps",
        6,
        "--seeds",
        2,
        "--rates",
        2,
        "--tasks",
        "ill-conditioned",
        "factorization",
        "--table",
        table,
        "--figure",
        figure,
    )
    assert text.strip() == table.read_text(encoding="utf-8").strip() and figure.read_bytes().startswith(b"\x89PNG")
    for part in (
        "learned against AdamW, cosine",
        "learned against start",
        "start against Adam, constant",
        "geometric mean",
        "of 4 trainings: learned: ",
        "NAG, cosine",
    ):
        assert part in text
    torch.save({"weights": weights[:-1]}, tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"--net must hold \(329,\) weights of an MLPOptimizer, its config beside them, got \(473,\)"
    ):
        command("--net", tmp_path / "weights.pt")


def test_the_command_races_what_was_learned_in_parts(command, tmp_path):
    """Of weights that are the start's but for the lengths of steps, directions alone are the start's: the same losses at the same rate."""
    net = start_as_normalized_adam(MLPOptimizer(context=True))
    with torch.no_grad():
        net.layers["context_bias_1"][-1] = -10.0  # e⁻³ times as long, but for a hundredth
    weights = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.save({"averaged": weights, "config": net.config}, tmp_path / "weights.pt")
    given = "--steps", 5, "--seeds", 1, "--rates", 1, "--tasks", "ill-conditioned", "--contestants", "NAG, cosine"
    text = command("--net", tmp_path / "weights.pt", "--parts", *given)
    head, _, row = (line.split(" | ") for line in text.splitlines()[2:5])
    losses = dict(zip(head, (cell.strip("*").split(" at ")[0] for cell in row)))
    assert losses["learned"] == losses["lengths alone"] != losses["directions alone"]
    assert "directions alone against start" in text
    with pytest.raises(ValueError, match="--parts needs an MLPOptimizer with a context, got --net start"):
        command("--net", "start", "--parts", *given)


def test_what_one_rate_for_all_tasks_costs():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from tasks import sensitivity

    def raced(*losses):
        return Race(0.1, dict(zip((0.1, 0.3), losses)), torch.ones(1, 4))

    results = {
        "one": ({"learned": raced(1.0, 2.0), "AdamW, cosine": raced(4.0, 1.5)}, {}),
        "two": ({"learned": raced(3.0, 1.0), "AdamW, cosine": raced(2.0, 8.0)}, {}),
    }
    text = sensitivity(results, ["learned", "AdamW, cosine"], 2)
    assert "| learned, from 0.1 | 2.00; 50% | 1.50; 50% |" in text
    assert "| AdamW, cosine, from 0.1 | 1.83; 0% | 2.50; 0% |" in text


@pytest.mark.parametrize("net", ["start", "general_lstm"])
def test_the_command_races_starts_and_names(command, net):
    text = command(
        "--net",
        net,
        "--steps",
        4,
        "--seeds",
        1,
        "--rates",
        1,
        "--tasks",
        "ill-conditioned",
        "--contestants",
        "AdamW, cosine",
    )
    name = "start" if net == "start" else "learned"
    head = next(line for line in text.splitlines() if line.startswith("| task"))
    assert head == f"| task | {name} | AdamW, cosine |" and "| ill-conditioned | " in text
