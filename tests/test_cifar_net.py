"""Convolutional networks on CIFAR-10: against networks of torch.nn, one by one; their labels, splits and accuracy."""

import pytest
import torch
from conftest import write_cifar10
from torch import nn

from gradbuffer.contracts import as_loss
from gradbuffer.data.cifar10 import generated_images, load_cifar10
from gradbuffer.problems import cifar10
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates
from optimizees import CIFAR10Net
from optimizers import CoordinatewiseLSTM

IMAGES = generated_images(120, 40, side=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**options):
    return CIFAR10Net(
        **{"batch_size": 6, "channels": (3, 2), "fc_size": 4, "root": IMAGES, "dtype": torch.float64, **options}
    )


def away_from_the_start(batch):
    return {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in batch.params.items()}


def torch_network(params, b):
    """The network of function b, from torch.nn."""

    def filled(module, **tensors):
        for name, tensor in tensors.items():
            setattr(module, name, nn.Parameter(tensor[b].detach().clone()))
        return module

    layers = []
    for k in (0, 1):
        out, inputs = params[f"conv{k}.weight"].shape[1:3]
        layers += [
            filled(nn.Conv2d(inputs, out, 5, padding=2, bias=False), weight=params[f"conv{k}.weight"]),
            filled(
                nn.BatchNorm2d(out, track_running_stats=False),
                weight=params[f"conv{k}.scale"],
                bias=params[f"conv{k}.shift"],
            ),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    inputs, units, outputs = *params["fc0.weight"].shape[1:], params["fc1.bias"].shape[1]
    layers += [
        nn.Flatten(),
        filled(nn.Linear(inputs, units, bias=False), weight=params["fc0.weight"].mT),
        filled(nn.BatchNorm1d(units, track_running_stats=False), weight=params["fc0.scale"], bias=params["fc0.shift"]),
        nn.ReLU(),
        filled(nn.Linear(units, outputs), weight=params["fc1.weight"].mT, bias=params["fc1.bias"]),
    ]
    return nn.Sequential(*layers)


@pytest.fixture(params=["function by function", "grouped"])
def way(request, monkeypatch):
    """Both ways in which B networks are run: a CPU's and a GPU's."""
    if request.param == "grouped":
        monkeypatch.setattr(cifar10, "function_by_function", cifar10.convolutional_scores)


def test_networks_equal_torch_modules(way):
    problem = small(classes=(7, 1, 4))
    batch = problem.sample(3, generator())
    params = {name: tensor.requires_grad_() for name, tensor in away_from_the_start(batch).items()}
    losses = batch.loss(params, 5)
    grads = dict(zip(params, torch.autograd.grad(losses.sum(), list(params.values()))))
    images, labels = batch.loss.minibatch(5)
    images = images.double() / 127.5 - 1
    for b in range(3):
        network = torch_network(params, b)
        expected = nn.functional.cross_entropy(network(images[b]), labels[b])
        torch.testing.assert_close(losses[b], expected)
        own = torch.autograd.grad(expected, list(network.parameters()))
        for (name, grad), other in zip(grads.items(), own):
            other = other.mT if name.startswith("fc") and other.dim() == 2 else other
            assert other.any()
            torch.testing.assert_close(grad[b], other, rtol=1e-10, atol=1e-13)


def test_functions_do_not_interact(way):
    batch = small().sample(3, generator())
    params = away_from_the_start(batch)
    coordinates = Coordinates(params)
    losses, gradient = coordinates.losses_and_gradient(as_loss(batch.loss), coordinates.join(params), 2)
    for tensor in params.values():
        tensor[1] += 1
    others, after = coordinates.losses_and_gradient(as_loss(batch.loss), coordinates.join(params), 2)
    torch.testing.assert_close(losses[[0, 2]], others[[0, 2]], rtol=1e-13, atol=0)
    assert losses[1] != others[1]
    for before, now in zip(coordinates.split(gradient).values(), coordinates.split(after).values()):
        torch.testing.assert_close(before[[0, 2]], now[[0, 2]])


def test_hessian_products(way):
    batch = small().sample(2, generator())
    params = away_from_the_start(batch)
    coordinates = Coordinates(params)
    theta = coordinates.join(params)
    vector = torch.randn_like(theta)
    product = coordinates.hessian_product(batch.loss, theta, 0, vector)
    ahead, behind = (
        coordinates.losses_and_gradient(as_loss(batch.loss), theta + h * vector, 0)[1] for h in (1e-6, -1e-6)
    )
    torch.testing.assert_close(product, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-5)


def test_part_has_the_losses_of_the_whole():
    batch = small().sample(4, generator())
    params, part = away_from_the_start(batch), batch.part(1, 3)
    own = {name: tensor[1:3] for name, tensor in params.items()}
    torch.testing.assert_close(part.loss(own, 40), batch.loss(params, 40)[1:3], rtol=1e-13, atol=0)
    assert all(torch.equal(part.params[name], tensor[1:3]) for name, tensor in batch.params.items())
    given = batch.loss.of(batch.loss.tensors(40))
    assert torch.equal(given(params, 0), batch.loss(params, 40)) and not torch.equal(
        batch.loss(params, 0), batch.loss(params, 40)
    )


@pytest.mark.parametrize("second_order", [False, True])
def test_replay_equals_autograd(second_order):
    net = CoordinatewiseLSTM(hidden_size=3, preprocess="log_sign", output_scale=0.1).double()
    batch = small().sample(2, generator())
    state = net.init_state(Coordinates(batch.params).join(batch.params).numel())
    one, two = (
        meta_gradient(net, batch, batch.params, state, unroll=4, method=method, second_order=second_order)[0]
        for method in ("replay", "autograd")
    )
    for name, grad in one.items():
        assert (grad - two[name]).norm() < 1e-10 * two[name].norm()


def test_initial_parameters():
    params = CIFAR10Net(root=generated_images(40, 20)).sample(2, generator()).params
    assert sum(tensor[0].numel() for tensor in params.values()) == 22682
    assert params["fc0.scale"].eq(1).all() and not params["fc0.shift"].any()
    assert not torch.equal(*params["conv1.weight"])
    for name, inputs in (("conv0.weight", 75), ("conv1.weight", 400), ("fc0.weight", 256), ("fc1.weight", 32)):
        assert 0.98 < params[name].abs().max() * inputs**0.5 <= 1


def test_splits_and_classes():
    whole = {split: small(split=split) for split in ("train", "validation", "test")}
    assert [len(problem.labels) for problem in whole.values()] == [60, 60, 40]
    rows = [set(map(bytes, problem.images.flatten(1).numpy())) for problem in whole.values()]
    assert not rows[0] & rows[1] and not rows[0] & rows[2]
    five, others = small(classes=(9, 0, 3)), small(classes=[1, 2, 4, 5, 6, 7, 8])
    assert len(five.labels) + len(others.labels) == 60 and five.sample(1).params["fc1.bias"].shape == (1, 3)
    kept = torch.isin(whole["train"].labels, torch.tensor([9, 0, 3]))
    assert torch.equal(five.images, whole["train"].images[kept])
    assert torch.equal(torch.tensor([9, 0, 3])[five.labels], whole["train"].labels[kept])
    assert "labels 9 0 3" in five.name and five.validation_problem().options["classes"] == (9, 0, 3)
    assert five.validation_problem().options["split"] == "validation" and five.to("cpu").options == five.options
    assert small(classes=(9, 0, 3)).images.data_ptr() == five.images.data_ptr()


def test_accuracy_on_test_images():
    problem = small(batch_size=16, split="train")
    batch = problem.sample(3, generator())
    params = away_from_the_start(batch)
    accuracy, some = problem.test_accuracy(params), problem.test_accuracy(params, images=14)
    assert accuracy.shape == (3,) and not accuracy.requires_grad
    images = problem.test_images.double() / 127.5 - 1
    for b in range(3):
        network = torch_network(params, b)
        right = torch.cat(
            [
                network(images[first:last]).argmax(1) == problem.test_labels[first:last]
                for first, last in ((0, 14), (14, 27), (27, 40))
            ]
        )
        assert accuracy[b] == right.double().mean() and some[b] == right[:14].double().mean()


def test_a_network_learns_the_stand_in():
    problem = CIFAR10Net(batch_size=32, channels=(8,), fc_size=16, root=generated_images(400, 100, side=8))
    batch = problem.sample(1, generator())
    params = {name: tensor.clone().requires_grad_() for name, tensor in batch.params.items()}
    adam = torch.optim.Adam(params.values(), lr=0.01)
    for step in range(60):
        adam.zero_grad()
        batch.loss(params, step).sum().backward()
        adam.step()
    assert problem.test_accuracy(params) > 0.6 > 0.3 > problem.test_accuracy(batch.params)


def test_data_root(small_cifar):
    problem = CIFAR10Net(root=small_cifar, channels=(2,), batch_size=4)
    assert problem.name == "CIFAR-10 (a part: 60 images), 2 channels and 32 units"
    assert problem.test_images.data_ptr() == CIFAR10Net(root=small_cifar, split="test").images.data_ptr()
    assert load_cifar10(small_cifar).train_images.shape[0] == 60


BAD = [
    (dict(batch_size=1), ValueError, "batch_size must be at least 2, got 1"),
    (dict(split="all"), ValueError, "split must be .*'all'"),
    (dict(classes=5), TypeError, "classes must be None or a tuple of labels, got 5"),
    (dict(classes=(1,)), ValueError, r"at least two different labels of 0 … 9, got \(1,\)"),
    (dict(classes=(1, 1)), ValueError, "at least two different labels"),
    (dict(classes=(1, 10)), ValueError, "at least two different labels"),
    (dict(classes=(1, "cat")), TypeError, r"classes\[1\] must be an int, got 'cat'"),
    (dict(channels=()), ValueError, r"channels must be 1 to 3 numbers, .* got \(\)"),
    (dict(channels=(2, 2, 2, 2)), ValueError, "channels must be 1 to 3 numbers, each halves the side of 8 pixels"),
    (dict(channels=(2, 0)), ValueError, r"channels\[1\] must be at least 1, got 0"),
    (dict(fc_size=2.5), TypeError, "fc_size must be an int, got 2.5"),
    (dict(dtype=torch.int8), TypeError, "dtype must be a floating-point"),
    (dict(root=3), TypeError, "root must be a path or None, got 3"),
    (dict(root=IMAGES._replace(test_images=IMAGES.test_images.float())), TypeError, "test_images must be uint8"),
    (dict(root=IMAGES._replace(train_labels=IMAGES.train_labels[1:])), ValueError, "train_images must .* 119 labels"),
    (dict(root=IMAGES._replace(train_labels=IMAGES.train_labels + 1)), ValueError, "train_labels must be 0 … 9"),
]


@pytest.mark.parametrize("options, error, message", BAD)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_bad_params_and_counts():
    problem = small()
    with pytest.raises(ValueError, match="params must be this problem's"):
        problem.test_accuracy({"theta": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="images must be at least 2, got 1"):
        problem.test_accuracy(problem.sample(1).params, images=1)
    with pytest.raises(ValueError, match="meta_batch must be at least 1, got 0"):
        problem.sample(0)


def test_too_few_images_of_some_classes(tmp_path):
    root = write_cifar10(tmp_path, train=1, test=1)
    with pytest.raises(ValueError, match=r"has \d images of classes \(0, 1\) in split '.*', too few"):
        CIFAR10Net(root=root, classes=(0, 1), channels=(2,))
