"""Losses of perceptrons in Triton: in its interpreter, or on a CUDA device, against autograd through the plain loss."""

import itertools

import pytest
import torch
from interpreter import DEVICE, check_in_the_interpreter, from_outside, on_device

from gradbuffer.problems.images import Given
from optimizees import PerceptronLoss


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    from gradbuffer.kernels import triton_losses

    return triton_losses


@from_outside
def test_cases_pass_in_the_interpreter():
    check_in_the_interpreter(__file__, least=9)


@on_device
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
@pytest.mark.parametrize("sizes, batch, functions", [((9, 10), 5, 1), ((6, 4, 10), 128, 2), ((5, 7, 3, 2), 131, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_losses_and_gradient(kernels, activation, sizes, batch, functions, dtype, tolerance):
    shapes = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        shapes |= {
            f"weight{layer}": torch.Size([functions, inputs, outputs]),
            f"bias{layer}": torch.Size([functions, outputs]),
        }
    theta = torch.randn(sum(shape.numel() for shape in shapes.values()), dtype=dtype, device=DEVICE)
    images = torch.randn(functions, batch, sizes[0], dtype=dtype, device=DEVICE)
    labels = torch.randint(sizes[-1], (functions, batch), device=DEVICE)
    kept = theta.clone(), images.clone()
    losses, gradient = kernels.losses_and_gradient(images, labels, theta, shapes, activation)
    assert torch.equal(theta, kept[0]) and torch.equal(images, kept[1])
    leaf = theta.clone().requires_grad_()
    parts = leaf.split([shape.numel() for shape in shapes.values()])
    params = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
    expected = PerceptronLoss(Given(images, labels), activation)(params, 0)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(losses, expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, slope, rtol=100 * tolerance, atol=tolerance)


@on_device
def test_large_scores_and_infinities(kernels):
    """Scores far apart give no NaN; a NaN among them shows in its own function alone."""
    shapes = {"weight0": torch.Size([2, 1, 3]), "bias0": torch.Size([2, 3])}
    theta = torch.tensor([500.0, -500, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0], device=DEVICE)
    images, labels = torch.ones(2, 4, 1, device=DEVICE), torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    losses, gradient = kernels.losses_and_gradient(images, labels, theta, shapes, "relu")
    assert losses[0] == 0 and gradient.isfinite().all()
    images[1] = torch.nan
    losses, _ = kernels.losses_and_gradient(images, labels, theta, shapes, "relu")
    assert losses.isfinite().tolist() == [True, False]


@on_device
def test_the_self_check(kernels, monkeypatch):
    kernels.passes_its_check.cache_clear()
    assert kernels.passes_its_check(torch.device(DEVICE), torch.float32)
    kernels.passes_its_check.cache_clear()
    monkeypatch.setattr(kernels, "pull_back", None)
    assert not kernels.passes_its_check(torch.device(DEVICE), torch.float32)
    kernels.passes_its_check.cache_clear()
