"""resnet_meta against torchvision: construction, initialization, numbers, checkpoints, and a download that fails."""

import copy
import os
import pickle
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

torchvision = pytest.importorskip("torchvision")

from torchvision import models  # noqa: E402

import resnet_meta  # noqa: E402
from meta_module import MetaBatchNorm2d, MetaConv2d, MetaLinear, MetaModule, MetaSequential  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in resnet_meta.__all__ if name != "ResNet"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def built(builder, seed=0, **kwargs):
    torch.manual_seed(seed)
    return builder(**kwargs)


def same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("name", NAMES)
def test_initialization_outputs_and_checkpoints_are_torchvisions(name):
    plain = built(getattr(models, name), num_classes=7)
    meta = built(getattr(resnet_meta, name), num_classes=7)
    assert type(meta) is resnet_meta.ResNet and isinstance(meta, MetaModule) and isinstance(meta, models.ResNet)
    assert not any(vars(part)["_parameters"] for part in meta.modules())
    assert type(meta.layer1) is MetaSequential and type(meta.layer1[0].conv1) is MetaConv2d
    assert type(meta.bn1) is MetaBatchNorm2d and type(meta.fc) is MetaLinear
    same_state(meta, plain)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(meta.eval()(image), plain.eval()(image))
    meta.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(meta.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_gradients_in_train_mode_are_torchvisions(name):
    plain, meta = built(getattr(models, name), num_classes=7), built(getattr(resnet_meta, name), num_classes=7)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for model in (plain, meta):
        F.cross_entropy(model.train()(images), labels).backward()
    for (key, p), q in zip(meta.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    same_state(meta, plain)  # running statistics and num_batches_tracked included


@pytest.mark.parametrize(
    "options",
    [
        dict(replace_stride_with_dilation=[False, True, True]),
        dict(zero_init_residual=True),
        dict(norm_layer=lambda channels: torch.nn.GroupNorm(4, channels)),
    ],
    ids=["dilation", "zero init", "group norm"],
)
def test_options_of_torchvision(options):
    plain, meta = (built(library.resnet50, num_classes=3, **options) for library in (models, resnet_meta))
    same_state(meta, plain)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(meta.eval()(image), plain.eval()(image))


def test_the_class_itself():
    arguments = dict(block=models.resnet.BasicBlock, layers=[1, 1, 1, 1], num_classes=3)
    plain, meta = built(models.ResNet, **arguments), built(resnet_meta.ResNet, **arguments)
    same_state(meta, plain)
    assert not any(vars(part)["_parameters"] for part in meta.modules())
    for clone in (copy.deepcopy(meta), pickle.loads(pickle.dumps(meta))):
        assert type(clone) is resnet_meta.ResNet
        same_state(clone, plain)

    class Headless(resnet_meta.ResNet):
        def forward(self, x):
            return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))

    assert Headless(**arguments)(torch.randn(1, 3, 32, 32)).shape == (1, 64, 8, 8)


def test_an_inner_update_reaches_through_the_whole_network():
    model = resnet_meta.resnet18(num_classes=3).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    start = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(images), labels), start, create_graph=True)
    model.update_params(0.01, source_params=grads)
    F.cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in start)
    assert start[0].grad.abs().max() > 0
    assert all(p.grad_fn is not None for p in model.parameters())


# ---- pretrained weights ----------------------------------------------------------------------------------------------


def test_feature_extraction_by_torch_fx():
    from torchvision.models.feature_extraction import create_feature_extractor

    meta, images = built(resnet_meta.resnet18).eval(), torch.randn(1, 3, 32, 32)
    plain = built(torchvision.models.resnet18).eval()
    found, expected = (create_feature_extractor(model, ["layer4", "fc"])(images) for model in (meta, plain))
    assert list(found) == ["layer4", "fc"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    grads = torch.autograd.grad(meta(images).sum(), list(meta.parameters()))
    meta.update_params(0.1, source_params=grads)
    extractor = create_feature_extractor(meta, ["fc"])
    torch.testing.assert_close(extractor(images)["fc"], meta(images), rtol=0, atol=0)


def put_checkpoint(hub, name, version="IMAGENET1K_V1"):
    weights = models.get_model_weights(name)[version]
    source = built(getattr(models, name), seed=3)
    path = hub / os.path.basename(weights.url)
    torch.save(source.state_dict(), path)
    return source, path


@pytest.mark.parametrize(
    ("version", "arguments"),
    [
        ("IMAGENET1K_V1", dict(pretrained=True)),
        ("IMAGENET1K_V1", dict(weights="IMAGENET1K_V1", progress=False)),
        ("IMAGENET1K_V1", dict(weights="ResNet50_Weights.IMAGENET1K_V1")),
        ("IMAGENET1K_V2", dict(weights="IMAGENET1K_V2", num_classes=1000)),
        ("IMAGENET1K_V2", dict(weights="DEFAULT", pretrained=False)),
        ("IMAGENET1K_V2", dict(weights=models.ResNet50_Weights.DEFAULT)),
    ],
)
def test_weights_come_from_the_hub_cache(hub, version, arguments):
    source, _ = put_checkpoint(hub, "resnet50", version)
    model = resnet_meta.resnet50(**arguments)
    same_state(model, source)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_pretrained_by_position_as_in_the_first_signature(hub):
    source, _ = put_checkpoint(hub, "resnet18")
    same_state(resnet_meta.resnet18(True), source)
    assert resnet_meta.resnet18(False, num_classes=2).fc.out_features == 2


@pytest.mark.parametrize("name", NAMES)
def test_every_model_asks_for_torchvisions_checkpoint(hub, name):
    """pretrained=True of each model looks for the very file torchvision's would, and says so without a network."""
    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    with pytest.raises(ConnectionError) as caught:
        getattr(resnet_meta, name)(pretrained=True)
    assert weights.url in str(caught.value) and str(hub / os.path.basename(weights.url)) in str(caught.value)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other model", "no state dict"])
def test_damaged_and_wrong_checkpoints(hub, damage):
    source, path = put_checkpoint(hub, "resnet18")
    whole = path.read_bytes()
    if damage == "other model":
        torch.save(models.resnet34(num_classes=1000).state_dict(), path)
    elif damage == "no state dict":
        torch.save([1, 2], path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>"}[damage])
    before = path.read_bytes()
    with pytest.raises(ValueError) as caught:
        resnet_meta.resnet18(pretrained=True)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before and list(hub.iterdir()) == [path], "nothing is left behind or overwritten"
    path.write_bytes(whole)
    same_state(resnet_meta.resnet18(pretrained=True), source)


def test_a_download_with_the_wrong_content(hub, monkeypatch, capsys):
    import io

    class Response(io.BytesIO):
        def info(self):
            return self

        def get_all(self, header):
            return None

    monkeypatch.setattr(torch.hub, "urlopen", lambda *args, **kwargs: Response(b"something else"))
    with pytest.raises(ValueError, match="resnet18-f37072fd.pth is not the checkpoint.*hash"):
        resnet_meta.resnet18(pretrained=True, progress=False)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(weights="IMAGENET1K_V9"), ValueError, "'IMAGENET1K_V9'; resnet18 accepts 'IMAGENET1K_V1'"),
        (dict(weights=models.ResNet50_Weights.DEFAULT), TypeError, "ResNet50_Weights.IMAGENET1K_V2; resnet18 accepts"),
        (dict(weights=3), TypeError, "weights is int"),
        (dict(pretrained="yes"), TypeError, "pretrained is 'yes'"),
        (dict(pretrained=True, weights="DEFAULT"), ValueError, "give one of the two"),
        (dict(weights="DEFAULT", num_classes=10), ValueError, "num_classes is 10; .* has 1000"),
        (dict(classes=10), TypeError, "classes"),
    ],
)
def test_bad_arguments(hub, arguments, error, message):
    with pytest.raises(error, match=message):
        resnet_meta.resnet18(**arguments)


def test_torch_hub_load(hub):
    source, _ = put_checkpoint(hub, "resnet18")
    same_state(torch.hub.load(str(ROOT), "resnet18", source="local", weights="IMAGENET1K_V1"), source)


def test_torch_hub_load_from_elsewhere(tmp_path):
    code = (
        f"import torch; print(type(torch.hub.load({str(ROOT)!r}, 'resnet18', source='local', num_classes=2)).__name__)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "ResNet", done.stderr


def test_docstring_examples_run():
    import doctest

    finder = doctest.DocTestFinder()
    tests = [
        t
        for name in ("resnet18", "resnext50_32x4d")
        for t in finder.find(getattr(resnet_meta, name), name, globs=vars(resnet_meta).copy())
    ]
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(r.attempted for r in results) == 4 and sum(r.failed for r in results) == 0
