"""Evolution strategies: what pairs share, how long perturbations are held, and that the estimate is the gradient."""

import math

import pytest
import torch

from gradbuffer.kernels.numba_mlp_windows import PerceptronWindows
from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
from gradbuffer.training.evolution import Episodes, Pairs, Perceptrons, signal_to_noise


class Windows:
    num_weights, num_params = 5, 3

    def init_state(self, particles):
        return torch.zeros(particles, 2)

    def draw_params(self, particles, seed):
        return torch.rand(particles, 3, generator=torch.Generator().manual_seed(seed % 2**31))


class Family:
    """Losses that the weights decide: 10 + slope · (w₁ + … + w_t) at step t of the episode, the weights of each window."""

    slope = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1])

    def __init__(self):
        self.windows, self.calls = Windows(), []

    def run(self, weights, params, state, steps, **given):
        self.calls.append({"weights": weights.clone(), "params": params.clone(), "state": state.clone(), **given})
        state[:, 0] += steps * (weights @ self.slope)  # what earlier windows have done
        params += 1
        return (10 + state[:, :1]).expand(-1, steps)


def make(**options):
    family = Family()
    given = {"pairs": 6, "window": 10, "episodes": Episodes((20, 60)), "generator": torch.Generator().manual_seed(0)}
    options = given | options
    return family, Pairs(family, **options)


def test_what_a_pair_shares():
    family, pairs = make()
    for _ in range(8):
        pairs.advance(torch.ones(5))
    for call in family.calls:
        for name in ("lr", "seeds", "first_steps", "gradient_scales"):
            assert torch.equal(call[name][::2], call[name][1::2]), name
        torch.testing.assert_close((call["weights"][::2] + call["weights"][1::2]) / 2, torch.ones(6, 5))
        noise = call["weights"][::2] - 1
        assert len(noise.unique(dim=0)) == 6 and 0.001 < noise.std() < 0.03  # one of its own for each pair, sigma 0.01
        begun = call["first_steps"] == 0
        assert (
            torch.equal(call["params"][begun][::2], call["params"][begun][1::2]) and (call["state"][begun] == 0).all()
        )
        assert call["lr"].shape == (12, 10) and (call["lr"] >= 0).all() and call["lr"].max() <= 3e-2
        assert 1e-3 <= call["gradient_scales"].min() and call["gradient_scales"].max() <= 1e3


@pytest.mark.parametrize("hold", [True, False])
def test_how_long_a_perturbation_is_held(hold):
    family, pairs = make(hold=hold, sigma=0.1)
    for _ in range(12):
        pairs.advance(torch.zeros(5))
        last = family.calls[-1]["weights"][::2]
        if hold:
            torch.testing.assert_close(pairs.total, last)
    kept = changed = 0
    for before, after in zip(family.calls, family.calls[1:]):
        goes_on = after["first_steps"][::2] == before["first_steps"][::2] + 10
        same = (before["weights"][::2] == after["weights"][::2]).all(1)
        kept, changed = kept + int((goes_on & same).sum()), changed + int((goes_on & ~same).sum())
        assert not same[~goes_on].any() and goes_on.any()
    assert (kept > 0, changed > 0) == (hold, not hold)


def test_episodes_end_and_begin_anew_at_different_times():
    family, pairs = make(pairs=40)
    for _ in range(20):
        pairs.advance(torch.zeros(5))
    first = torch.stack([call["first_steps"][::2] for call in family.calls])  # (windows, pairs)
    assert first.max() <= 50 and ((first == 0).sum(0) > 2).all()
    assert 1 < (first[3] == 0).sum() < 39  # staggered
    assert len(first.unique(dim=1).T) > 5


@pytest.mark.parametrize("hold", [True, False])
def test_the_estimate_is_the_gradient(hold):
    """Of the window's relative loss by the weights of all windows of the episode; linear losses, so up to sampling alone."""
    family, pairs = make(pairs=4000, hold=hold, episodes=Episodes((40, 40)))
    total, expected = torch.zeros(5), torch.zeros(5)
    for _ in range(6):
        estimate = pairs.advance(torch.zeros(5))
        windows = (family.calls[-1]["first_steps"][::2] / 10 + 1).mean()  # how many windows' weights decide the loss
        expected += 10 * windows * family.slope / 10
        total += estimate.gradient
        assert abs(estimate.loss - 10) < 0.1 and torch.equal(estimate.each.mean(0), estimate.gradient)
    torch.testing.assert_close(total, expected, rtol=0.1, atol=0.8)


def test_late_windows_of_falling_episodes_count_more():
    def estimates(**episodes):
        _, pairs = make(pairs=3, episodes=Episodes((40, 40), **episodes))
        found = []
        for _ in range(6):
            each = pairs.advance(torch.zeros(5)).each
            found.append(((pairs.done - 5.5) / pairs.length, each))
        return found

    even, late = estimates(falling=1), estimates(falling=1, late=0.5)
    for (progress, each), (_, counted) in zip(even, late):
        torch.testing.assert_close(counted, each * (1 + 0.5 * (2 * progress - 1))[:, None])
    for (_, each), (_, counted) in zip(estimates(falling=0), estimates(falling=0, late=0.5)):
        assert torch.equal(each, counted)


@pytest.mark.parametrize("change", [{"lengths": (5, 2)}, {"rates": (0, 1)}, {"falling": 1.5}, {"late": -0.1}], ids=str)
def test_what_episodes_cannot_be(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        Episodes(**change)


def test_real_perceptrons():
    """Finite estimates of the right form, the same from the same generator."""
    net = start_as_normalized_adam(MLPOptimizer(hidden_sizes=(4,)))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 6, generator=generator)
    labels = (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)
    family = Perceptrons(PerceptronWindows(net, (6, 5, 3)), inputs, labels, 16, 1.5 * math.log(3))
    pairs = Pairs(family, pairs=4, window=10, episodes=Episodes((20, 40)), generator=generator)
    weights = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    for _ in range(6):
        estimate = pairs.advance(weights)
        assert estimate.each.shape == (4, len(weights)) and estimate.each.isfinite().all() and 0 < estimate.loss < 1.7
    again = Pairs(family, pairs=4, window=10, episodes=Episodes((20, 40)), generator=torch.Generator().manual_seed(5))
    other = Pairs(family, pairs=4, window=10, episodes=Episodes((20, 40)), generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.advance(weights).each, other.advance(weights).each)


def test_signal_to_noise():
    noise = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    assert 0.8 < signal_to_noise(noise) < 1.2  # all noise
    assert signal_to_noise(noise + 1) == pytest.approx((400 + 1) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "options, message",
    [(dict(pairs=0), "pairs must be at least 1"), (dict(sigma=0), "sigma must be a positive number")],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
