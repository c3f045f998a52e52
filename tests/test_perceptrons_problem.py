"""Perceptrons on data of one's own: their loss is that of `nn.Linear`s, their minibatches are those of the compiled windows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradbuffer.problems.perceptrons import ACTIVATIONS, minibatch
from meta_training import evaluate_baseline
from optimizees import Perceptrons

SEEDS = torch.tensor([0, 5, 2**40 - 1])


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(90, 6, generator=generator).to(dtype), torch.randint(4, (90,), generator=generator)


@pytest.mark.parametrize("step", [0, 1, 100_000])
def test_minibatches_are_those_of_the_compiled_windows(step):
    compiled = pytest.importorskip("gradbuffer.kernels.numba_mlp_windows")
    for examples in (1, 90, 60_000):
        found = minibatch(SEEDS, step, 33, examples)
        assert torch.equal(found, compiled.minibatches(SEEDS, step, 1, 33, examples)[:, 0])
        assert found.min() >= 0 and found.max() < examples


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["classes", "values", "autoencoder"])
@pytest.mark.parametrize("hidden_sizes", [(), (5,), (5, 7)])
def test_losses_are_those_of_linear_layers(activation, kind, hidden_sizes):
    inputs, labels = data()
    targets = {"classes": labels, "values": inputs[:, :2].sin(), "autoencoder": inputs}[kind]
    problem = Perceptrons(inputs, targets, hidden_sizes, activation, batch_size=12)
    batch = problem.sample(3, generator=torch.Generator().manual_seed(1))
    losses = batch.loss(batch.params, 4)
    chosen = minibatch(batch.loss.seeds, 4, 12, 90)
    assert len(chosen.unique(dim=0)) == 3
    for b in range(3):
        layers, values = [], list(batch.params.values())
        for weight, bias in zip(values[::2], values[1::2]):
            assert weight[b].abs().max() <= weight.shape[2] ** -0.5 < 1.3 * weight[b].abs().max()
            linear = nn.Linear(*reversed(weight.shape[1:])).double()
            linear.load_state_dict({"weight": weight[b], "bias": bias[b]})
            layers += [linear, ACTIVATIONS[activation]]
        x = inputs[chosen[b]]
        for layer in layers[:-1]:
            x = layer(x)
        wanted = targets[chosen[b]]
        expected = F.cross_entropy(x, wanted) if kind == "classes" else F.mse_loss(x, wanted)
        torch.testing.assert_close(losses[b], expected)
    part = batch.part(1, 3)
    torch.testing.assert_close(part.loss(part.params, 4), losses[1:])
    joined = part.loss.join([batch.part(0, 1).loss])
    turned = {name: value.roll(-1, 0) for name, value in batch.params.items()}
    torch.testing.assert_close(joined(turned, 4), losses.roll(-1))
    assert batch.loss.join([Perceptrons(inputs, targets).sample(1).loss]) is None


def test_seeds_and_names_and_what_they_learn():
    inputs, labels = data(torch.float32)
    problem = Perceptrons(inputs, labels, (8,), batch_size=30)
    one, two = (problem.sample(2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.params["weight_0"], two.params["weight_0"]) and torch.equal(one.loss.seeds, two.loss.seeds)
    assert problem.sizes == (6, 8, 4) and problem.name == "perceptrons 6-8-4 relu"
    assert Perceptrons(inputs, inputs, (), name="mine").name == "mine"
    losses = evaluate_baseline(torch.optim.Adam, {"lr": 0.02}, problem, steps=150, num_functions=2)
    assert losses[:, -20:].mean() < 0.9 * losses[:, 0].mean()


def test_a_checkpoint_tells_data_apart():
    inputs, labels = data()
    texts = [
        Perceptrons(*given).describe()
        for given in (
            (inputs, labels),
            (inputs.clone(), labels.clone()),
            (inputs + 1e-9, labels),
            (inputs, labels.flip(0)),
            (inputs.float(), labels),
            (inputs, labels, (8,)),
            (inputs, labels, (32,), "tanh"),
            (inputs, labels, (32,), "relu", 32),
        )
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 7


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(inputs=[1.0]), TypeError, "inputs must be a tensor, got list"),
        (dict(targets=None), TypeError, "targets must be a tensor, got NoneType"),
        (dict(inputs=torch.zeros(90, 2, 3)), ValueError, r"inputs must be \(examples, inputs\) .* got \(90, 2, 3\)"),
        (dict(inputs=torch.zeros(90, 6).half()), ValueError, "inputs must be .* got .* of torch.float16"),
        (dict(inputs=torch.zeros(0, 6)), ValueError, "inputs must be"),
        (dict(targets=torch.zeros(89, dtype=torch.int64)), ValueError, r"targets must be \(90,\) of int64"),
        (dict(targets=torch.zeros(90)), ValueError, "targets must be"),
        (dict(targets=torch.zeros(90, 2, dtype=torch.int64)), ValueError, "targets must be"),
        (dict(targets=torch.zeros(90, 2)), ValueError, "outputs. of torch.float64, got .* of torch.float32"),
        (dict(targets=torch.full((90,), -1)), ValueError, "targets must be classes from 0 on, got -1"),
        (dict(hidden_sizes=8), TypeError, "hidden_sizes must be a tuple of ints"),
        (dict(hidden_sizes=(8, 0)), ValueError, r"hidden_sizes\[1\] must be at least 1, got 0"),
        (dict(activation="gelu"), ValueError, "activation must be one of .* got 'gelu'"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input(change, error, message):
    inputs, labels = data()
    with pytest.raises(error, match=message):
        Perceptrons(**dict(inputs=inputs, targets=labels) | change)
