"""Meta-training, and bad input to the public face of the training side."""

import math

import pytest
import torch
from torch import nn

from meta_training import evaluate, evaluate_baseline, meta_gradient, meta_train, tune_baseline
from optimizees import MetaBatch, Quadratics
from optimizers import CoordinatewiseLSTM, NonFiniteError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_training_improves_and_keeps_the_best():
    net = CoordinatewiseLSTM()
    untrained = evaluate(net, Quadratics(), 20, 64, seed=5).sum(1).mean()
    history = meta_train(net, Quadratics(), 20, 10, meta_batch=16, iterations=100, lr=0.01, warmup=5,
                         validation_every=10, progress=False)
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
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: norms.append(
        torch.stack([parameter.grad.norm() for parameter in adam.param_groups[0]["params"]]).norm().item()))
    history = meta_train(CoordinatewiseLSTM(), Quadratics(), 20, 10, meta_batch=4, iterations=40, lr=0.1, warmup=10,
                         clip=0.5, progress=False)
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


def window(**arguments):
    net, batch = CoordinatewiseLSTM(hidden_size=2), Quadratics(dim=2).sample(2)
    arguments = {"params": batch.params, "state": net.init_state(4), **arguments}
    return meta_gradient(net, batch, **arguments)


def train(**arguments):
    return meta_train(CoordinatewiseLSTM(hidden_size=2), Quadratics(dim=2), progress=False,
                      **{"iterations": 1, **arguments})


@pytest.mark.parametrize("call, error, message", [
    (lambda: window(unroll=0), ValueError, "unroll must be at least 1, got 0"),
    (lambda: window(step=-1), ValueError, "step must be at least 0, got -1"),
    (lambda: window(method="bptt"), ValueError, "method must be .* got 'bptt'"),
    (lambda: window(replay_fraction=0), ValueError, "replay_fraction must be a number in .* got 0"),
    (lambda: window(replay_fraction=0.5, method="autograd"), ValueError, "replay_fraction=0.5 needs method"),
    (lambda: window(second_order=True), ValueError, "second_order=True needs"),
    (lambda: window(weights=[1.0] * 20), ValueError, r"weights must have shape \(21,\)"),
    (lambda: window(params=[1]), TypeError, "params must be a dict"),
    (lambda: window(params={"a": torch.zeros(2), "b": torch.zeros(3)}), ValueError, r"params\['b'\] is \(3,\)"),
    (lambda: window(state=CoordinatewiseLSTM(hidden_size=2).init_state(5)), ValueError, "state's hidden must have"),
    (lambda: train(unroll=30), ValueError, "unroll must divide steps, got unroll=30 and steps=100"),
    (lambda: train(unroll=200), ValueError, "unroll must divide steps"),
    (lambda: train(iterations=0), ValueError, "iterations must be at least 1, got 0"),
    (lambda: train(lr=0.0), ValueError, "lr must be a positive number, got 0.0"),
    (lambda: train(clip=-1), ValueError, "clip must be a positive number, got -1"),
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
])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_of_the_wrong_shape():
    batch = MetaBatch({"x": torch.ones(2, 3)}, lambda params, step: params["x"].sum())
    net = CoordinatewiseLSTM()
    with pytest.raises(ValueError, match=r"loss must return a tensor of shape \(2,\)"):
        meta_gradient(net, batch, batch.params, net.init_state(6))
