"""Conjugate gradients; L-BFGS is tested in test_neural_art.py."""

import pytest
import torch

from gradbuffer.evaluation import evaluate
from gradbuffer.evaluation.curvature import evaluate_conjugate_gradients, minimize_lbfgs
from optimizees import MetaBatch, MNISTNet, Quadratics
from optimizers import CoordinatewiseLSTM


class Bowls:
    """½ Σ a (x - c)², of two parameters together, with two different values of a: two steps reach the minimum."""

    def sample(self, meta_batch, generator=None):
        c = torch.randn(meta_batch, 5, generator=generator, dtype=torch.float64)
        start = torch.zeros(meta_batch, 2, dtype=torch.float64), torch.zeros(meta_batch, 3, dtype=torch.float64)
        weight = torch.tensor([1.0, 1.0, 30.0, 30.0, 30.0], dtype=torch.float64)

        def loss(params, step):
            return 0.5 * (weight * (torch.cat([params["x"], params["y"]], 1) - c) ** 2).sum(1) + 0.25

        return MetaBatch(dict(zip("xy", start)), loss)


def test_conjugate_gradients_need_as_many_steps_as_there_are_curvatures():
    losses = evaluate_conjugate_gradients(Bowls(), steps=4, num_functions=40)
    assert losses.shape == (40, 4) and (losses.diff(dim=1) <= 0).all()
    assert (losses[:, 1] > 0.25 + 1e-6).all()
    torch.testing.assert_close(losses[:, 2:], torch.full((40, 2), 0.25, dtype=torch.float64))


def test_conjugate_gradients_are_paired_with_the_others():
    losses = evaluate_conjugate_gradients(Quadratics(), steps=12, num_functions=40, seed=3)
    torch.testing.assert_close(losses[:, 0], evaluate(CoordinatewiseLSTM(), Quadratics(), 1, 40, seed=3)[:, 0])
    assert (losses[:, -1] < 0.1 * losses[:, 0]).float().mean() > 0.9


class Cubes(Bowls):
    def sample(self, meta_batch, generator=None):
        batch = super().sample(meta_batch, generator)
        return batch._replace(loss=lambda params, step: batch.loss(params, step) ** 1.5)


def test_other_functions_are_refused(tiny_mnist):
    problem = MNISTNet((5,), root=tiny_mnist)
    with pytest.raises(ValueError, match="conjugate gradients need quadratic functions"):
        evaluate_conjugate_gradients(Cubes(), steps=3, num_functions=2)
    with pytest.raises(ValueError, match="must not change from step to step"):
        evaluate_conjugate_gradients(problem, steps=3, num_functions=2)
    with pytest.raises(ValueError, match="must not change from step to step"):
        minimize_lbfgs(problem.sample(2), 3)
