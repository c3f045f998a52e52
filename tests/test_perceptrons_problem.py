"""Perceptrons on data of one's own: their loss is that of `nn.Linear`s, their minibatches are those of the compiled windows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradbuffer.problems.perceptrons import ACTIVATIONS, minibatch
from meta_training import evaluate_baseline
from optimizees import Networks, Perceptrons

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


# Networks of any form ---------------------------------------------------------------------------------------------------


def recurrent(params, x, wanted):
    state = 0.0 * x[:, :, 0] @ params["inner"].mT
    for t in range(x.shape[2]):
        state = torch.tanh(x[:, :, t] @ params["inner"].mT + state @ params["own"].mT + params["bias"][:, None])
    return (state @ params["outer"].mT - wanted).square().mean((1, 2))


SHAPES = {"inner": (5, 2), "own": (5, 5), "bias": (5,), "outer": (1, 5)}


def networks(**options):
    x = torch.randn(70, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Networks((x, x[..., 0].sum(1, keepdim=True)), SHAPES, recurrent, **{"batch_size": 9} | options)


def test_losses_of_networks():
    problem = networks(gains={"outer": 0.5, "bias": 0.0})
    batch = problem.sample(3, generator=torch.Generator().manual_seed(1))
    assert {name: value.shape for name, value in batch.params.items()} == {
        name: (3, *shape) for name, shape in SHAPES.items()
    }
    bounds = {"inner": 2**-0.5, "own": 5**-0.5, "bias": 0.0, "outer": 0.5 * 5**-0.5}
    for name, bound in bounds.items():
        assert batch.params[name].dtype == torch.float64
        assert 0.6 * bound <= batch.params[name].abs().max() <= bound, name
    losses, chosen = batch.loss(batch.params, 6), minibatch(batch.loss.seeds, 6, 9, 70)
    assert len(chosen.unique(dim=0)) == 3
    for b in range(3):
        own = {name: value[b : b + 1] for name, value in batch.params.items()}
        examples = (tensor[chosen[b]][None] for tensor in problem.data)
        torch.testing.assert_close(losses[b : b + 1], recurrent(own, *examples))
    part = batch.part(1, 3)
    torch.testing.assert_close(part.loss(part.params, 6), losses[1:])
    later = batch.loss.later(4)
    torch.testing.assert_close(later(batch.params, 2), losses)
    joined = part.loss.later(6).join([batch.part(0, 1).loss.later(5).later(1)])  # at steps of their own
    turned = {name: value.roll(-1, 0) for name, value in batch.params.items()}
    torch.testing.assert_close(joined(turned, 0), losses.roll(-1))
    assert batch.loss.join([networks().sample(1).loss]) is None


def test_networks_are_described():
    """By what a checkpoint must agree with: name, sizes, and data."""
    problem = networks(name="sums")
    assert problem.describe() == networks(name="sums").describe() and "sums" in problem.describe()
    for other in (networks(), networks(name="sums", batch_size=8), networks(name="sums", gains={"own": 2.0})):
        assert other.describe() != problem.describe()
    x, wanted = problem.data
    assert Networks((x, wanted + 1), SHAPES, recurrent, 9, "sums").describe() != problem.describe()
    moved = problem.to("cpu")
    assert moved.describe() == problem.describe() and type(moved) is Networks
    first, second = (one.sample(2, generator=torch.Generator().manual_seed(3)) for one in (problem, moved))
    assert torch.equal(first.loss(first.params, 0), second.loss(second.params, 0))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(data=()), TypeError, "data must be tensors"),
        (dict(data=torch.zeros(3, 2)), TypeError, "data must be tensors"),
        (dict(data=[torch.zeros(3).long()]), ValueError, "data must have floating-point tensors"),
        (dict(data=[torch.zeros(3), torch.zeros(3).double()]), ValueError, "data must have floating-point tensors"),
        (dict(data=[torch.zeros(3), torch.zeros(4)]), ValueError, "data must have the same number of examples"),
        (dict(data=[torch.zeros(0, 2)]), ValueError, "at least one, got"),
        (dict(data=[torch.tensor(1.0)]), ValueError, "data must have the same number of examples"),
        (dict(shapes={}), TypeError, "shapes must be a dict"),
        (dict(shapes={"a": 3}), TypeError, r"shapes\['a'\] must be a tuple of ints"),
        (dict(shapes={"a": (0,)}), ValueError, r"shapes\['a'\] must be at least 1"),
        (dict(loss=None), TypeError, "loss must be a function"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1"),
        (dict(gains={"b": 1.0}), ValueError, "gains must be numbers from 0 on for names in"),
        (dict(gains={"a": -1.0}), ValueError, "gains must be numbers from 0 on"),
    ],
)
def test_bad_networks(change, error, message):
    given = dict(data=[torch.zeros(3, 2)], shapes={"a": (2, 2)}, loss=lambda params, x: x.sum()) | change
    with pytest.raises(error, match=message):
        Networks(**given)
