"""Neural Art: its loss against another computation, its images and where they come from, and its use as a problem."""

import doctest
import sys

import numpy as np
import pytest
import torch
from conftest import huge_picture, write_art
from PIL import Image
from torch import nn

from gradbuffer.data import art as art_data
from gradbuffer.data.art import generated_textures, load_contents, load_style
from gradbuffer.evaluation import evaluate, evaluate_baseline
from gradbuffer.evaluation.curvature import evaluate_lbfgs, minimize_lbfgs
from gradbuffer.problems import neural_art, vgg
from gradbuffer.problems.neural_art import NeuralArt
from gradbuffer.problems.vgg import VGGFeatures, from_pixels, to_pixels
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates
from meta_training import meta_train
from optimizees import Quadratics
from optimizers import CoordinatewiseLSTM


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(root, **options):
    return NeuralArt(
        **{
            "split": "test",
            "size": 16,
            "root": root,
            "network": "vgg11",
            "weights": "random",
            "content_layer": "relu2_1",
            "style_layers": ("relu1_1", "relu2_1"),
            "dtype": torch.float64,
            **options,
        }
    )


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """No test reaches for the network. Returns the networks asked for."""
    asked = []

    def refuse(network, count):
        asked.append(network)
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(vgg, "imagenet_weights", refuse)
    return asked


def plain_loss(problem, image, content):
    """The loss of one image, by modules of torch.nn and sums over pixels."""
    weights = problem.features.convolutions
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers).to(image.dtype)
    for place, layer in ((0, "relu1_1"), (3, "relu2_1")):
        network[place].weight.data, network[place].bias.data = (tensor.clone() for tensor in weights[layer])
    first, second = network[:2], network[2:]

    def gram_matrices(x):
        for features in (first(x), second(first(x))):
            yield torch.einsum("ihw,jhw->ij", features[0], features[0]) / features[0, 0].numel()

    content_term = nn.functional.mse_loss(network(image[None]), network(content[None]))
    pairs = zip(gram_matrices(image[None]), gram_matrices(problem.style_image[None]))
    style_term = sum(nn.functional.mse_loss(own, painted) for own, painted in pairs) / 2
    rough = nn.functional.mse_loss(image[:, 1:], image[:, :-1]) + nn.functional.mse_loss(
        image[..., 1:], image[..., :-1]
    )
    return (
        (
            problem.options["alpha"] * content_term
            + problem.options["beta"] * style_term
            + problem.options["gamma"] * rough
        )
        * image[0].numel()
        / 256
    )


@pytest.mark.parametrize(
    "weights",
    [
        dict(alpha=1.0, beta=0.0, gamma=0.0),
        dict(alpha=0.0, beta=2.0, gamma=0.0),
        dict(alpha=0.0, beta=0.0, gamma=3.0),
        dict(alpha=0.7, beta=5.0, gamma=0.2),
    ],
)
def test_losses_and_gradients_equal_a_plain_computation(small_art, weights):
    problem = small(small_art, size=20, **weights)
    batch = problem.sample(3, generator())
    contents = batch.params["image"]
    images = (contents + 0.5 * torch.randn_like(contents)).requires_grad_()
    losses = batch.loss({"image": images}, 7)
    expected = torch.stack([plain_loss(problem, image, content) for image, content in zip(images, contents)])
    assert losses.shape == (3,) and losses.min() > 0
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=0)
    own, other = (torch.autograd.grad(values.sum(), images, retain_graph=True)[0] for values in (losses, expected))
    torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-13)


def test_gradcheck(small_art):
    problem = small(small_art)
    batch = problem.sample(1, generator())
    direction = torch.randn_like(batch.params["image"])

    def along(amounts):  # three coordinates through the image, so that the check is quick
        moved = batch.params["image"] + amounts[0] * direction + amounts[1] * direction.flip(2)
        return batch.loss({"image": moved + amounts[2] * direction.flip(3)}, 0)

    amounts = torch.tensor([0.1, 0.2, -0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(along, (amounts,))
    assert torch.autograd.gradgradcheck(along, (amounts,))


def test_functions_are_independent_and_parts_are_the_whole(small_art):
    problem = small(small_art)
    whole, draw = problem.sample(4, generator(3)), generator(3)
    images = whole.params["image"] + 0.3 * torch.randn(4, 3, 16, 16, dtype=torch.float64)
    singles = [problem.sample(1, draw) for _ in range(4)]
    losses = torch.cat([single.loss({"image": image[None]}, 0) for single, image in zip(singles, images)])
    torch.testing.assert_close(whole.loss({"image": images}, 0), losses, rtol=1e-12, atol=0)
    assert torch.equal(torch.cat([single.params["image"] for single in singles]), whole.params["image"])
    part = whole.part(1, 3)
    assert torch.equal(part.params["image"], whole.params["image"][1:3])
    torch.testing.assert_close(part.loss({"image": images[1:3]}, 0), losses[1:3], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        part.loss.of(part.loss.tensors(0))({"image": images[1:3]}, 0), losses[1:3], rtol=1e-12, atol=0
    )


def test_a_larger_image_has_gradients_of_the_same_size(small_art):
    """The same picture once, and four times side by side: four times the loss, hence the same gradient, but for edges."""
    problem = small(small_art, size=20)
    image = 0.3 * problem.contents[:1] + 0.5  # far from the style, whose picture is noise as well
    norms = []
    for copies in (1, 2):
        problem.options["size"] = 20 * copies
        tiled = image.repeat(1, 1, copies, copies).requires_grad_()
        with torch.no_grad():
            target = problem.features(tiled)["relu2_1"]
        (gradient,) = torch.autograd.grad(problem.losses(tiled, target).sum(), tiled)
        norms.append(gradient.square().mean().sqrt())
    assert 0.6 < norms[1] / norms[0] < 1.6


def test_draws_follow_the_generator(small_art):
    train = small(small_art, split="train")
    one, two, other = (train.sample(5, generator(seed)).params["image"] for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    noise = small(small_art, start="noise")
    one, two = (noise.sample(2, generator()) for _ in range(2))
    assert torch.equal(one.params["image"], two.params["image"])
    assert one.params["image"].std() == pytest.approx(1, abs=0.1)
    contents = small(small_art).sample(2, generator())
    own = {"image": contents.params["image"]}
    assert torch.equal(one.loss(own, 0), contents.loss(own, 0))  # the same photographs, from another start


@pytest.mark.parametrize("start", ["content", "noise"])
def test_a_generator_meets_all_test_images_before_any_comes_again(small_art, start):
    problem, draw = small(small_art, start=start), generator()
    places = []
    for count in (1, 2, 1, 4):
        problem.sample(count, draw)
        left = problem.dealt[draw][1]
        places.append(len(left))
    assert places == [3, 1, 0, 0]
    problem, draw = small(small_art), generator()
    seen = torch.cat([problem.sample(count, draw).params["image"] for count in (1, 2, 1)])
    assert len(seen.flatten(1).unique(dim=0)) == 4
    again = problem.sample(2, draw.manual_seed(0)).params["image"]  # seeded anew: from the beginning
    assert torch.equal(again, seen[:2])
    assert problem.sample(6).params["image"].flatten(1).unique(dim=0).shape[0] == 4  # without a generator, too


def test_splits_are_disjoint(small_art):
    images = [small(small_art, split=split).contents for split in ("train", "validation", "test")]
    assert [len(each) for each in images] == [6, 3, 4]
    assert len(torch.cat(images).flatten(1).unique(dim=0)) == 13
    problem = small(small_art, split="train", style="candy")
    validation = problem.validation_problem()
    assert torch.equal(validation.contents, images[1]) and torch.equal(validation.style_image, problem.style_image)
    assert torch.equal(problem.with_split("test").contents, images[2])


def test_archives_and_folders_give_the_same(tmp_path):
    folder, archive = write_art(tmp_path / "folder"), write_art(tmp_path / "tar", "tar")
    before = {path: path.stat().st_mtime_ns for path in archive.rglob("*")}
    for split, size in (("train", 16), ("validation", 20), ("test", 20), ("test", 32)):
        one, two = (load_contents(root, split, size) for root in (folder, archive))
        assert one.name == two.name and torch.equal(one.images, two.images) and one.images.dtype == torch.uint8
        assert one.images.shape[2:] == (size, size)
    assert len(one.images) == 2  # of test_32
    for style in ("starry_night", "candy"):
        assert torch.equal(load_style(folder, style, 16).images, load_style(archive, style, 16).images)
    assert before == {path: path.stat().st_mtime_ns for path in archive.rglob("*")}
    assert load_contents(archive, "train", 16) is load_contents(str(archive), "train", 16)  # once per process


def test_images_are_cut_to_their_middle_and_averaged(tmp_path):
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = np.arange(0, 192, 24, dtype=np.uint8)[:, None, None]  # the middle square; its rows get brighter
    pixels[:, :2] = pixels[:, 10:] = 255
    for folder in ("train", "style"):
        (tmp_path / "neural_art" / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "neural_art" / folder / "one.png")
    image = load_contents(tmp_path, "train", 4).images[0]
    assert image[1].tolist() == [[12 + 48 * row] * 4 for row in range(4)]
    assert torch.equal(load_style(tmp_path, "one", 4).images[0], image)


def test_without_images_textures_stand_in_and_say_so(tmp_path):
    with (
        pytest.warns(UserWarning, match="no contents for Neural Art under .*content.tar.*L2O_DATA"),
        pytest.warns(UserWarning, match="no styles for Neural Art"),
    ):
        problem = small(tmp_path)
    assert "generated textures" in problem.name and 'a generated style "starry_night"' in problem.name
    with pytest.warns(UserWarning, match="no styles for Neural Art"):
        candy = load_style(tmp_path, "candy", 16)
    assert not torch.equal(candy.images, load_style(tmp_path, "starry_night", 16).images)
    with pytest.warns(UserWarning, match="no contents"):
        every = [load_contents(tmp_path, split, 16).images for split in ("train", "validation", "test")]
    assert len(torch.cat(every).flatten(1).unique(dim=0)) == 320  # no image comes twice
    assert torch.equal(generated_textures(2, 16, seed=5), generated_textures(2, 16, seed=5))


def test_random_weights_are_announced_and_imagenets_asked_for(small_art, no_weights):
    with pytest.warns(UserWarning, match="no network in this test.*random weights"):
        problem = small(small_art, weights="auto", seed=3)
    assert problem.features.name == "VGG-11, random weights (seed 3)" and problem.features.name in problem.name
    with pytest.raises(ConnectionError, match="no network in this test"):
        small(small_art, weights="imagenet")
    assert no_weights == ["vgg11", "vgg11"]
    other, same = small(small_art, seed=4), small(small_art, seed=3)
    assert torch.equal(same.grams["relu1_1"], problem.grams["relu1_1"])
    assert not torch.equal(other.grams["relu1_1"], problem.grams["relu1_1"])


@pytest.mark.parametrize("network", ["vgg11", "vgg16"])
def test_weights_of_torchvision_in_their_own_places(monkeypatch, network):
    """A checkpoint in torchvision's form gives torchvision's features, but for one factor for each layer."""
    models = pytest.importorskip("torchvision.models.vgg")
    letter = {"vgg11": "A", "vgg16": "D"}[network]
    torch.manual_seed(1)
    layers = models.make_layers(models.cfgs[letter], batch_norm=False)[:12]
    state = {
        f"features.{name}": tensor
        for name, tensor in models.make_layers(models.cfgs[letter], batch_norm=False).state_dict().items()
    }
    state |= {f"features.{name}": tensor for name, tensor in layers.state_dict().items()}
    monkeypatch.undo()
    vgg.scaled_convolutions.cache_clear()
    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", lambda weights, **options: state)
    features = VGGFeatures(network, "imagenet", layers=("relu1_1", "relu2_1", "relu3_1"))
    assert features.name == f"VGG-{network[3:]}, ImageNet weights"
    images = torch.randn(2, 3, 16, 16)
    found, x, ends = features(images), images, {}
    for layer in layers:
        x = layer(x)
        ends.setdefault(x.shape[1:], x) if isinstance(layer, nn.ReLU) else None
    textures = from_pixels(generated_textures(16, 64))
    for name, values in found.items():
        ratio = values / ends[values.shape[1:]]
        ratio = ratio[ends[values.shape[1:]] > 1e-3]
        assert ratio.std() < 1e-3 * ratio.mean()
        assert features(textures)[name].square().mean().sqrt() == pytest.approx(1, rel=1e-3)


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    models = pytest.importorskip("torchvision.models")
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / models.VGG11_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]

    def no_network(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(ConnectionError, match=f"no network in this test.*put it at {path}"):
        vgg.imagenet_weights("vgg11", 1)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)  # as if it were not installed
    vgg.scaled_convolutions.cache_clear()
    with pytest.warns(UserWarning, match="torchvision.models.*random weights"):
        assert VGGFeatures("vgg11").name == "VGG-11, random weights (seed 0)"
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in (b"no checkpoint", None):
        torch.save({"features.1.weight": torch.ones(2)}, path) if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} cannot be read: truncated, or no checkpoint of vgg11"):
            vgg.imagenet_weights("vgg11", 1)


def test_pixels_there_and_back():
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    shown = to_pixels(from_pixels(pixels))
    assert shown.shape == (2, 5, 4, 3)
    torch.testing.assert_close(shown.movedim(-1, 1), pixels / 255, rtol=0, atol=1e-6)
    assert to_pixels(torch.full((3, 2, 2), 100.0)).max() == 1


def test_training_and_evaluation_take_it_as_any_problem(small_art):
    problem = small(small_art, split="train", dtype=torch.float32)
    net = CoordinatewiseLSTM(hidden_size=4, preprocess="log_sign")
    history = meta_train(
        net,
        problem,
        steps=4,
        unroll=2,
        iterations=2,
        meta_batch=2,
        validation_functions=2,
        replay_fraction=0.25,
        progress=False,
    )
    assert len(history.meta_loss) == 2 and history.validation
    test = problem.with_split("test")
    learned = evaluate(net, test, steps=4, num_functions=4)
    adam = evaluate_baseline(torch.optim.Adam, {"lr": 0.05}, test, steps=4, num_functions=4)
    assert learned.shape == (4, 4) and torch.equal(learned[:, 0], adam[:, 0])
    assert (adam[:, -1] < adam[:, 0]).all()
    lbfgs = evaluate_lbfgs(test, steps=8, num_functions=4)
    torch.testing.assert_close(lbfgs[:, 0], adam[:, 0])
    assert (lbfgs.diff(dim=1) <= 0).all() and (lbfgs[:, -1] < adam[:, -1]).all()


def test_replay_equals_autograd(small_art):
    net = CoordinatewiseLSTM(hidden_size=3, preprocess="log_sign").double()
    batch = small(small_art).sample(2, generator())
    state = net.init_state(Coordinates(batch.params).join(batch.params).numel())
    replay, autograd = (
        meta_gradient(net, batch, batch.params, state, unroll=3, method=method)[0] for method in ("replay", "autograd")
    )
    for name, grad in replay.items():
        torch.testing.assert_close(grad, autograd[name], rtol=1e-7, atol=1e-10)


def test_lbfgs_minimizes_each_function_and_gives_where():
    batch = Quadratics(dim=4, dtype=torch.float64).sample(3, generator())
    losses, params = minimize_lbfgs(batch, 60, history_size=20)
    assert losses.shape == (3, 60) and params["theta"].shape == (3, 4)
    torch.testing.assert_close(batch.loss(params, 0), losses[:, -1])
    assert (losses[:, -1] < 1e-6 * losses[:, 0]).all()
    with pytest.raises(TypeError, match="must have part"):
        minimize_lbfgs(batch._replace(part=None), 3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(split="holdout"), 'split must be "train", "validation" or "test", got \'holdout\''),
        (dict(size=8), "size must be at least 16, got 8"),
        (dict(size=24), "20×20 pixels, too small for images of 24×24"),
        (dict(start="style"), 'start must be "content" or "noise"'),
        (dict(network="resnet18"), r"network must be one of \['vgg11'.*got 'resnet18'"),
        (dict(weights="mine"), 'weights must be "auto", "imagenet" or "random"'),
        (dict(content_layer="relu1_2"), "layers of vgg11 must be of .*got 'relu1_2'"),
        (dict(style_layers=()), "style_layers must be a tuple of at least one"),
        (dict(beta=-1), "beta must be a finite number, at least 0, got -1"),
        (dict(style="mona_lisa"), r"style must be one of \['candy', 'starry_night'\].*'mona_lisa'"),
    ],
)
def test_bad_input(small_art, options, message):
    with pytest.raises(ValueError, match=message):
        small(small_art, **options)


def test_bad_types(small_art):
    with pytest.raises(TypeError, match="style must be the name of an image, got 3"):
        small(small_art, style=3)
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        small(small_art, dtype=torch.int32)
    with pytest.raises(TypeError, match="root must be a path or None"):
        small(5)


def damage_header(path):
    content = path.read_bytes()
    place = content.index(b"train/2.png")
    path.write_bytes(content[:place] + b"T" + content[place + 1 :])


@pytest.mark.parametrize(
    "form, damage, message",
    [
        (
            "folder",
            lambda folder: (folder / "test/1.png").write_bytes(b"no image"),
            "1.png in .* is truncated or corrupt",
        ),
        (
            "folder",
            lambda folder: (folder / "test/1.png").write_bytes(huge_picture()),
            "1.png in .* DecompressionBombError",
        ),
        ("tar", lambda folder: (folder / "content.tar").write_bytes(bytes(10240)), "content.tar holds no images"),
        ("tar", lambda folder: damage_header(folder / "content.tar"), "content.tar is truncated or corrupt"),
        ("folder", lambda folder: (folder / "test").rename(folder / "other"), "holds no images in test or test_20"),
        (
            "tar",
            lambda folder: (folder / "content.tar").write_bytes(b"no archive"),
            "content.tar is truncated or corrupt",
        ),
        (
            "tar",
            lambda folder: (folder / "content.tar").write_bytes((folder / "content.tar").read_bytes()[:1200]),
            "content.tar is truncated or corrupt",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, form, damage, message):
    damage(write_art(tmp_path, form) / "neural_art")
    with pytest.raises(ValueError, match=message):
        load_contents(tmp_path, "test", 20)


@pytest.mark.parametrize("module", [art_data, neural_art, vgg])
def test_docstring_examples(small_art, monkeypatch, module):
    monkeypatch.setenv("L2O_DATA", str(write_art(small_art / "larger", side=64)))
    result = doctest.testmod(module)
    assert result.attempted >= 2 and result.failed == 0
