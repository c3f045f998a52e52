"""Quadratics and MNIST networks: their formulas, their randomness, their splits."""

import doctest

import pytest
import torch
from torch import nn

from gradbuffer.contracts import as_loss
from gradbuffer.problems import variations
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates
from optimizees import ConvexTerms, MetaBatch, Mirrored, Mixture, MNISTNet, Quadratics, RandomScaling


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_quadratics_follow_their_formula():
    batch = Quadratics(dim=3, dtype=torch.float64).sample(4, generator())
    draw = generator()
    W, y = (torch.randn(4, 3, k, generator=draw, dtype=torch.float64) for k in (3, 1))
    theta = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.stack([(W[b] @ theta[b] - y[b, :, 0]).square().sum() for b in range(4)])
    torch.testing.assert_close(batch.loss({"theta": theta}, 7), expected)
    assert not batch.params["theta"].any()


@pytest.mark.parametrize("functions", [1, 4])
def test_quadratics_know_their_gradient(functions):
    batch = Quadratics(dim=3, dtype=torch.float64).sample(functions, generator())
    coordinates, theta = Coordinates(batch.params), torch.randn(3 * functions, dtype=torch.float64)
    losses, gradient = coordinates.losses_and_gradient(batch.loss, theta, 0)
    expected, by_autograd = coordinates.losses_and_gradient(
        as_loss(lambda params, step: batch.loss(params, step)), theta, 0
    )
    torch.testing.assert_close((losses, gradient), (expected, by_autograd), rtol=1e-13, atol=0)
    part, own = batch.part(functions // 2, functions), theta.view(functions, 3)[functions // 2 :]
    torch.testing.assert_close(
        part.loss.with_gradient({"theta": own}, 0)[1]["theta"].flatten(), gradient[functions // 2 * 3 :]
    )


@pytest.mark.parametrize("hidden_sizes", [(), (20,), (7, 5)])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_network_equals_torch_modules(tiny_mnist, hidden_sizes, activation):
    problem = MNISTNet(hidden_sizes, activation, batch_size=16, root=tiny_mnist, dtype=torch.float64)
    batch = problem.sample(3, generator())
    losses = batch.loss(batch.params, 5)
    images, labels = batch.loss.minibatch(5)
    for b in range(3):
        sizes, layers = problem.sizes, []
        for k in range(len(sizes) - 1):
            layer = nn.Linear(sizes[k], sizes[k + 1], dtype=torch.float64)
            layer.weight.data, layer.bias.data = batch.params[f"weight{k}"][b].T, batch.params[f"bias{k}"][b]
            layers += [layer, {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}[activation]()]
        expected = nn.functional.cross_entropy(nn.Sequential(*layers[:-1])(images[b]), labels[b])
        torch.testing.assert_close(losses[b], expected)


@pytest.mark.parametrize("hidden_sizes", [(), (20,), (7, 5)])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_network_knows_its_gradient(tiny_mnist, hidden_sizes, activation):
    batch = MNISTNet(hidden_sizes, activation, batch_size=16, root=tiny_mnist, dtype=torch.float64).sample(
        3, generator()
    )
    coordinates = Coordinates(batch.params)
    theta = coordinates.join(batch.params)
    theta = theta + torch.randn(theta.shape, generator=generator(), dtype=torch.float64)
    found = coordinates.losses_and_gradient(batch.loss, theta, 5)
    expected = coordinates.losses_and_gradient(as_loss(lambda params, step: batch.loss(params, step)), theta, 5)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    part = batch.part(1, 3)
    split = {name: tensor[1:3] for name, tensor in coordinates.split(theta).items()}
    losses, gradients = part.loss.with_gradient(split, 5)
    torch.testing.assert_close(losses, expected[0][1:3])
    torch.testing.assert_close(gradients["weight0"], coordinates.split(expected[1])["weight0"][1:3])


def test_minibatches_depend_on_seed_and_step_alone(tiny_mnist):
    problem = MNISTNet(root=tiny_mnist, batch_size=8)
    one, two, other = (problem.sample(2, generator(seed)) for seed in (3, 3, 4))
    forward = [one.loss(one.params, step) for step in range(70)]
    backward = [two.loss(two.params, step) for step in reversed(range(70))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward))
    assert len({tuple(losses.tolist()) for losses in forward}) == 70  # a fresh minibatch at every step
    assert not torch.equal(one.params["weight0"], other.params["weight0"])


def test_each_meta_batch_draws_its_batch_size(tiny_mnist):
    """Uniformly in its logarithm, the same for a seed, for every part and for every step."""
    problem, draw, sizes = MNISTNet((), batch_size=(2, 32), root=tiny_mnist), generator(), []
    for _ in range(200):
        images, labels = (batch := problem.sample(2, draw)).loss.minibatch(40)
        sizes.append(labels.shape[1])
        assert images.shape[:2] == labels.shape == (2, sizes[-1])
    assert min(sizes) == 2 and max(sizes) <= 32 and 0.4 < sum(size <= 8 for size in sizes) / 200 < 0.6
    torch.testing.assert_close(
        batch.part(1, 2).loss({name: tensor[1:] for name, tensor in batch.params.items()}, 3),
        batch.loss(batch.params, 3)[1:],
    )
    again = problem.with_split("train").sample(2, generator())
    assert again.loss.minibatch(0)[1].shape[1] == sizes[0]
    fixed = MNISTNet((), batch_size=8, root=tiny_mnist).sample(2, generator())
    assert torch.equal(fixed.params["weight0"], again.params["weight0"])


def test_splits_do_not_share_images(tiny_mnist):
    train, validation, test = (MNISTNet(root=tiny_mnist, split=split) for split in ("train", "validation", "test"))
    assert len(train.images) == len(validation.images) == 150 and len(test.images) == 80
    rows = [set(map(bytes, problem.images.numpy())) for problem in (train, validation, test)]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert torch.equal(train.validation_problem().images, validation.images)


def test_data_are_on_the_device_once(tiny_mnist):
    assert MNISTNet(root=tiny_mnist).images.data_ptr() == MNISTNet((40,), root=tiny_mnist).images.data_ptr()


def test_initial_weights(tiny_mnist):
    weight = MNISTNet(root=tiny_mnist).sample(20, generator()).params["weight0"]
    assert weight.abs().max() <= 1 / 8 and abs(weight.std() - 1 / 8 / 3**0.5) < 1e-3  # as nn.Linear
    weight = MNISTNet(root=tiny_mnist, init_std=0.01).sample(20, generator()).params["weight0"]
    assert abs(weight.std() - 0.01) < 1e-4


def test_smaller_images(small_mnist):
    full, small = (MNISTNet((3,), root=small_mnist, side=side) for side in (None, 7))
    assert small.sizes == (49, 3, 10) and "49-3-10" in small.name and small.with_split("test").sizes == small.sizes
    blocks = full.images[0].view(28, 28).unfold(0, 4, 4).unfold(1, 4, 4).mean((2, 3))
    torch.testing.assert_close(small.images[0], 4 * blocks.flatten())
    weight = small.sample(50, generator()).params["weight0"]
    assert 0.99 / 28 < weight.abs().max() <= 1 / 28  # of 784 inputs, not of 49
    assert MNISTNet((3,), root=small_mnist, side=28).images.equal(full.images)


def test_offline_network_has_the_digits_size(tmp_path, offline):
    with pytest.warns(UserWarning, match="digits"):
        problem = MNISTNet(root=tmp_path / "none")
    assert problem.sizes == (64, 20, 10) and "MNIST not found" in problem.name
    assert problem.sample(2).loss(problem.sample(2).params, 0).shape == (2,)


@pytest.mark.parametrize("problem", [Quadratics(dim=4), "mnist"])
def test_functions_of_a_batch_are_independent(problem, tiny_mnist):
    problem = MNISTNet((5,), root=tiny_mnist, batch_size=4) if problem == "mnist" else problem
    batch = problem.sample(3, generator())
    coordinates = Coordinates(batch.params)
    theta = coordinates.join({name: torch.randn_like(tensor) for name, tensor in batch.params.items()})
    _, gradient = coordinates.losses_and_gradient(batch.loss, theta, 0)
    changed = {name: tensor.clone() for name, tensor in coordinates.split(theta).items()}
    for tensor in changed.values():
        tensor[1] += 1
    _, after = coordinates.losses_and_gradient(batch.loss, coordinates.join(changed), 0)
    for before, now in zip(coordinates.split(gradient).values(), coordinates.split(after).values()):
        torch.testing.assert_close(before[[0, 2]], now[[0, 2]])


def test_random_scaling_is_a_change_of_coordinates():
    plain = Quadratics(dtype=torch.float64)
    start = torch.randn(5, 10, dtype=torch.float64)

    class Started:  # θ_0 = 0 would hide that it is scaled too
        def sample(self, meta_batch, generator=None):
            return MetaBatch({"theta": start}, plain.sample(meta_batch, generator=generator).loss)

    one, two = Started().sample(5, generator()), RandomScaling(Started(), 2.0, signs=True).sample(5, generator())
    scale = one.params["theta"] / two.params["theta"]
    assert 1e-3 < scale.abs().log().std() and scale.abs().log().abs().max() <= 2 and 10 < (scale < 0).sum() < 40
    theta = torch.randn(5, 10, dtype=torch.float64)
    torch.testing.assert_close(two.loss({"theta": theta / scale}, 0), one.loss({"theta": theta}, 0))
    unscaled = RandomScaling(Started(), 0.0).sample(5, generator())
    torch.testing.assert_close(unscaled.params["theta"], start)


def test_mirrored_functions_come_in_pairs(tiny_mnist):
    """f(θ) and f(-θ) with the same minibatches: opposite gradients at opposite points."""
    plain = MNISTNet((5,), root=tiny_mnist, batch_size=4, dtype=torch.float64)
    batch, upright = Mirrored(plain).sample(6, generator()), plain.sample(3, generator())
    coordinates = Coordinates(batch.params)
    for step in (0, 7):
        losses, gradient = coordinates.losses_and_gradient(batch.loss, coordinates.join(batch.params), step)
        torch.testing.assert_close(losses, upright.loss(upright.params, step).repeat(2))
        for tensor in coordinates.split(gradient).values():
            assert tensor[:3].any()
            torch.testing.assert_close(tensor[:3], -tensor[3:])
    assert all(torch.equal(tensor[:3], upright.params[name]) for name, tensor in batch.params.items())


def test_mirrored_pairs_cancel_what_a_drift_does():
    """The meta-gradient with respect to a constant added to all updates is noise on functions, 0 on pairs of them."""
    net = torch.nn.Linear(1, 1).double()  # update = -0.01 ∇ + drift
    with torch.no_grad():
        net.weight.fill_(-0.01)
        net.bias.zero_()
    net.init_state = lambda N: ()
    net.forward = lambda grad, state: (torch.nn.functional.linear(grad[:, None], net.weight, net.bias)[:, 0], state)
    problem = Quadratics(dim=4, dtype=torch.float64)
    drifts = []
    for distribution in (problem, Mirrored(problem)):
        batch = distribution.sample(2, generator())
        grads, _ = meta_gradient(net, batch, batch.params, (), unroll=3)
        drifts.append(grads["bias"].abs().item())
    assert drifts[0] > 1 and drifts[1] < 1e-12


def test_convex_terms_are_beside_the_problem():
    plain, batch = (
        Quadratics(dim=4).sample(3, generator()),
        ConvexTerms(Quadratics(dim=4), dim=6).sample(3, generator()),
    )
    theta, x = torch.randn(3, 4), torch.zeros(3, 6, requires_grad=True)
    difference = batch.loss({"theta": theta, "convex": x}, 0) - plain.loss({"theta": theta}, 0)
    (gradient,) = torch.autograd.grad(difference.sum(), x)
    target = -gradient * 6 / 2
    torch.testing.assert_close(difference, target.square().mean(1), rtol=1e-4, atol=1e-5)
    assert target.abs().max() <= 1 and batch.params["convex"].abs().max() <= 1


@pytest.mark.parametrize("first, last", [(0, 2), (1, 3), (1, 5), (3, 4), (4, 6)])
def test_parts_of_variations_have_the_same_losses(first, last):
    problem = Mirrored(ConvexTerms(RandomScaling(Quadratics(dim=4)), dim=3))
    batch = problem.sample(6, generator())
    params = {name: torch.randn_like(tensor) for name, tensor in batch.params.items()}
    part = batch.part(first, last)
    torch.testing.assert_close(
        part.loss({name: tensor[first:last] for name, tensor in params.items()}, 0), batch.loss(params, 0)[first:last]
    )
    assert all(torch.equal(part.params[name], tensor[first:last]) for name, tensor in batch.params.items())


VARIATIONS = [
    lambda problem: RandomScaling(problem, 1.0, signs=True),
    Mirrored,
    ConvexTerms,
    lambda problem: Mirrored(ConvexTerms(RandomScaling(Mirrored(problem), 1.0), dim=3)),
]


@pytest.mark.parametrize("vary", VARIATIONS)
@pytest.mark.parametrize("kind", ["quadratics", "networks", "a user's own"])
def test_variations_pass_on_what_a_loss_knows(vary, kind, tiny_mnist):
    """Its gradient, its parts, what it reads."""
    plain = (
        MNISTNet((5,), root=tiny_mnist, batch_size=4, dtype=torch.float64)
        if kind == "networks"
        else Quadratics(4, torch.float64)
    )

    class Own:
        def sample(self, meta_batch, generator=None):
            batch = plain.sample(meta_batch, generator)
            return batch._replace(loss=lambda params, step: batch.loss(params, step))

    batch = vary(Own() if kind == "a user's own" else plain).sample(4, generator())
    coordinates = Coordinates(batch.params)
    theta = coordinates.join(batch.params)
    theta = theta + torch.randn(theta.shape, generator=generator(), dtype=theta.dtype)
    found = coordinates.losses_and_gradient(batch.loss, theta, 5)
    expected = coordinates.losses_and_gradient(as_loss(lambda params, step: batch.loss(params, step)), theta, 5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not found[0].requires_grad and not found[1].requires_grad and expected[1].any()
    if kind == "a user's own":
        assert batch.part and batch.part(0, 2).loss.divisible  # as the meta-batch says, which divides them
        with pytest.raises(ValueError, match="can be captured"):
            batch.loss.tensors(0)
    else:
        own = batch.loss.of(tuple(batch.loss.tensors(5)))
        torch.testing.assert_close(own(coordinates.split(theta), 99), expected[0], rtol=1e-12, atol=0)
        part = batch.loss.part(0, 3).part(1, 3)
        torch.testing.assert_close(
            part({name: tensor[1:3] for name, tensor in coordinates.split(theta).items()}, 5), expected[0][1:3]
        )
    part = batch.part(1, 3).loss
    torch.testing.assert_close(
        part({name: tensor[1:3] for name, tensor in coordinates.split(theta).items()}, 5), expected[0][1:3]
    )


def test_variations_of_a_loss_without_parts():
    class Own:
        def sample(self, meta_batch, generator=None):
            batch = Quadratics(3).sample(meta_batch, generator)
            return MetaBatch(batch.params, lambda params, step: batch.loss(params, step))

    assert all(vary(Own()).sample(4, generator()).part is None for vary in VARIATIONS)
    assert RandomScaling(Own()).name == "Own, randomly scaled"


def test_a_mixture_draws_of_each_problem(tiny_mnist):
    problems = [Quadratics(3), MNISTNet((5,), root=tiny_mnist, batch_size=4)]
    mixture, draw = Mixture(problems), generator()
    for drawn, problem in zip(mixture.sample(4, generator()), problems, strict=True):
        alone = problem.sample(4, draw)
        assert isinstance(drawn, MetaBatch) and list(drawn.params) == list(alone.params)
        assert torch.equal(drawn.loss(drawn.params, 3), alone.loss(alone.params, 3))
    validation = mixture.validation_problem()
    assert [problem.options.get("split") for problem in validation.problems] == [None, "validation"]
    assert [len(batch.params) for batch in validation.to("cpu").sample(2)] == [1, 4]
    assert "Quadratics, 3 dimensions; " in mixture.name and mixture.device == torch.device("cpu")
    assert mixture.describe() != Mixture(problems[:1]).describe() and "Quadratics, 3 dimensions" in mixture.describe()


def test_a_mixture_draws_families_by_their_weights():
    mixture = Mixture([Quadratics(dim) for dim in (1, 2, 3)], weights=[1, 1, 4], families=1)
    draw = generator()
    drawn = [[batch.params["theta"].shape[1] for batch in mixture.sample(2, draw)] for _ in range(600)]
    counts = torch.tensor([dims for (dims,) in drawn]).bincount(minlength=4)
    assert (counts[1:] - torch.tensor([100, 100, 400])).abs().max() < 40
    two = Mixture(mixture.problems, families=2)
    drawn = {tuple(batch.params["theta"].shape[1] for batch in two.sample(2, draw)) for _ in range(50)}
    assert drawn == {(1, 2), (1, 3), (2, 3)}
    assert [batch.params["theta"].shape for batch in two.sample(2, generator(3))] == [
        batch.params["theta"].shape for batch in two.sample(2, generator(3))
    ]
    assert len(two.validation_problem().sample(1)) == 3


def test_variations_of_a_mixture():
    mixed = Mirrored(RandomScaling(Mixture([Quadratics(2), Mixture([ConvexTerms(Quadratics(3), dim=5)])])))
    batches = mixed.sample(4, generator())
    assert [{name: tuple(tensor.shape) for name, tensor in batch.params.items()} for batch in batches] == [
        {"theta": (4, 2)},
        {"theta": (4, 3), "convex": (4, 5)},
    ]
    assert all(batch.loss(batch.params, 0).shape == (4,) for batch in batches)
    assert [problem.name for problem in mixed.problems][0] == "Quadratics, 2 dimensions, randomly scaled, mirrored"
    assert [problem.name for problem in mixed.validation_problem().problems] == [
        "Quadratics, 2 dimensions",
        "Quadratics, 3 dimensions",
    ]


def test_variations_validate_on_the_problem_itself(tiny_mnist):
    problem = ConvexTerms(Mirrored(RandomScaling(MNISTNet((5,), root=tiny_mnist))))
    assert problem.to("cpu").validation_problem().options["split"] == "validation"
    assert "randomly scaled" in problem.name and problem.device.type == "cpu"


BAD = [
    (
        lambda root: RandomScaling("quadratics"),
        TypeError,
        r"problem must have sample\(meta_batch, generator\), got str",
    ),
    (lambda root: RandomScaling(Quadratics(), radius=-1), ValueError, r"radius must be a number in \[0, 20\], got -1"),
    (lambda root: Mirrored(Quadratics()).sample(3), ValueError, "meta_batch must be even for mirrored pairs, got 3"),
    (lambda root: ConvexTerms(Quadratics(), dim=0), ValueError, "dim must be at least 1, got 0"),
    (lambda root: ConvexTerms(ConvexTerms(Quadratics())).sample(1), ValueError, 'has a parameter named "convex"'),
    (lambda root: Mixture([]), TypeError, r"problems must be a list of at least one problem, got \[\]"),
    (lambda root: Mixture(Quadratics()), TypeError, "problems must be a list of at least one problem, got <"),
    (lambda root: Mixture([Quadratics(), 3]), TypeError, r"problem must have sample\(meta_batch, generator\), got int"),
    (
        lambda root: Mixture([Quadratics()] * 2, [1]),
        ValueError,
        "weights have an effect only with families, got families=None",
    ),
    (
        lambda root: Mixture([Quadratics()] * 2, [1], 1),
        ValueError,
        r"weights must be 2 positive numbers, one .* got \[1\]",
    ),
    (lambda root: Mixture([Quadratics()] * 2, [1, 0], 1), ValueError, r"weights\[1\] must be a positive number, got 0"),
    (
        lambda root: Mixture([Quadratics()] * 2, families=2),
        ValueError,
        "families must be None, .* below their number, 2, got 2",
    ),
    (
        lambda root: Mixture([Quadratics(), Quadratics(device="meta")]),
        ValueError,
        r"on one device, got \['cpu', 'meta'\]",
    ),
    (lambda root: Quadratics(dim=0), ValueError, "dim must be at least 1, got 0"),
    (lambda root: Quadratics(dim=2.5), TypeError, "dim must be an int, got 2.5"),
    (lambda root: Quadratics(dtype=torch.int64), TypeError, "dtype must be a floating-point"),
    (lambda root: Quadratics().sample(0), ValueError, "meta_batch must be at least 1, got 0"),
    (lambda root: MNISTNet((20, -1), root=root), ValueError, r"hidden_sizes\[1\] must be at least 1, got -1"),
    (lambda root: MNISTNet(activation="swish", root=root), ValueError, "activation must be one of .*'swish'"),
    (lambda root: MNISTNet(batch_size=0, root=root), ValueError, "batch_size must be at least 1, got 0"),
    (lambda root: MNISTNet(batch_size=(8, 4), root=root), ValueError, r"batch_size\[1\] must be at least 8, got 4"),
    (lambda root: MNISTNet(batch_size=(1, 2, 3), root=root), ValueError, r"must be a number or \(least, most\), got"),
    (lambda root: MNISTNet(split="all", root=root), ValueError, "split must be .*'all'"),
    (lambda root: MNISTNet(side=5, root=root), ValueError, "side must be None or a divisor of 8, got 5"),
    (lambda root: MNISTNet(init_std=-1, root=root), ValueError, "init_std must be .* got -1"),
    (
        lambda root: MNISTNet(root=root).sample(1).loss(MNISTNet(root=root).sample(1).params, -1),
        ValueError,
        "step must be at least 0, got -1",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(tiny_mnist, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_mnist)


def test_docstring_examples():
    result = doctest.testmod(variations)
    assert result.attempted >= 8 and result.failed == 0
