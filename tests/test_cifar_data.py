"""Where CIFAR-10 comes from, and what happens when it can't."""

import doctest
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import huge_picture, write_cifar10, write_cifar10_pickles
from PIL import Image

from gradbuffer.data import cifar10 as cifar_data
from gradbuffer.data.cifar10 import CIFAR10_CLASSES, generated_images, load_cifar10


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_image_files_are_read_where_they_lie(tmp_path, form):
    root = write_cifar10(tmp_path, form=form)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    data = load_cifar10(root)
    assert data.name == "CIFAR-10 (a part: 60 images)"
    assert data.train_images.shape == (60, 3, 8, 8) and data.test_images.shape == (20, 3, 8, 8)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.bincount().tolist() == [6] * 10
    assert torch.equal(data.train_images[:, 0, 0, 0], (20 * data.train_labels).byte())  # each lies with its own label
    assert torch.equal(data.test_images[:, 1, 0, 0], (20 * data.test_labels).byte() + 1)  # red, green, blue
    assert data.train_labels[:10].unique().numel() > 3  # in a random order
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_pickles_are_read_as_torchvision_unpacks_them(tmp_path, monkeypatch):
    root = write_cifar10_pickles(tmp_path)
    data = load_cifar10(root)
    assert data.name == "CIFAR-10 (a part: 50 images)" and data.test_images.shape == (10, 3, 32, 32)
    assert torch.equal(data.train_images[:, 2, 0, 0], (20 * data.train_labels).byte() + 2)
    assert load_cifar10(str(root)) is data  # once per process
    monkeypatch.setenv("L2O_DATA", str(root))
    assert load_cifar10() is data


def test_pickles_run_no_code(tmp_path, offline):
    path = write_cifar10_pickles(tmp_path) / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps({b"data": print, b"labels": []}))
    with pytest.raises(ValueError, match="data_batch_2 is truncated or corrupt.*builtins.print"):
        load_cifar10(tmp_path)
    assert not offline


@pytest.mark.filterwarnings("error")
def test_pickles_of_python_2(tmp_path):
    """The original files: Python 2 wrote them, its text is read as bytes."""
    pixels = bytes(range(256)) * 12
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n"
        b"(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(pixels).to_bytes(4, "little")
        + pixels
        + b"tb"
    )
    (tmp_path / "batch").write_bytes(b"\x80\x02}(U\x06labels](K\x07eU\x04data" + array + b"u.")
    images, labels = cifar_data.read_pickle(tmp_path / "batch")
    assert labels.tolist() == [7] and images.shape == (1, 3, 32, 32) and images.flatten().tolist() == list(pixels)


def png(side=8, mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, (side, side)).save(content, "PNG")
    return content.getvalue()


def change_pickle(**changes):
    def damage(path):
        batch = {"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 3], **changes}
        path.write_bytes(pickle.dumps({name.encode(): value for name, value in batch.items()}, protocol=2))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "test_batch is truncated or corrupt"),
        (lambda path: path.write_bytes(b""), "test_batch is truncated or corrupt"),
        (lambda path: path.write_bytes(pickle.dumps({})), "test_batch is truncated or corrupt: KeyError"),
        (lambda path: path.unlink(), "a part of CIFAR-10 only: test_batch missing"),
        (change_pickle(data=np.zeros((3, 300), np.uint8)), r"test_batch must hold bytes \(n, 3072\)"),
        (change_pickle(labels=[1, 2]), r"test_batch must hold .* n labels"),
        (change_pickle(labels=[1, 2, 10]), "test_batch must hold labels 0 … 9"),
    ],
)
def test_damaged_pickles_name_the_file(tmp_path, offline, damage, message):
    damage(write_cifar10_pickles(tmp_path) / "cifar-10-batches-py" / "test_batch")
    with pytest.raises(ValueError, match=message):
        load_cifar10(tmp_path)
    assert not offline


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "train/cat/1.png").write_bytes(png()[:-30]), "cat/1.png in .*train is trunc"),
        (lambda folder: (folder / "train/cat/1.png").write_bytes(b"no image"), "cat/1.png in .*train is trunc"),
        (lambda folder: (folder / "train/cat/1.png").write_bytes(png(9)), "cat/1.png .* 9×9 pixels; .* first is 8×8"),
        (
            lambda folder: (folder / "train/cat").rename(folder / "train/lion"),
            r"missing: \['cat'\], not known: \['lion'\]",
        ),
        (lambda folder: (folder / "test").rename(folder / "other"), r"the folder test \(or test.zip\) is missing"),
    ],
)
def test_damaged_images_name_the_file(tmp_path, offline, damage, message):
    damage(write_cifar10(tmp_path) / "cifar10")
    with pytest.raises(ValueError, match=message):
        load_cifar10(tmp_path)
    assert not offline


def test_damaged_zip_names_the_file(tmp_path, offline):
    path = write_cifar10(tmp_path, form="zip") / "cifar10" / "test.zip"
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(ValueError, match="test.zip is truncated or corrupt"):
        load_cifar10(tmp_path)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        entry = file.getinfo("test/dog/1.png")
    path.write_bytes(content[: entry.header_offset + 60] + b"?" + content[entry.header_offset + 61 :])
    with pytest.raises(ValueError, match="test.zip is truncated or corrupt.*test/dog/1.png"):
        load_cifar10(tmp_path)
    assert not offline


def test_members_that_cannot_be_read(tmp_path, offline):
    path = write_cifar10(tmp_path, form="zip") / "cifar10" / "test.zip"
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = content.find(mark)
        while place >= 0:
            content[place + flags] |= 1  # encrypted, it says
            place = content.find(mark, place + 4)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="test.zip is truncated or corrupt, or cannot be read.* encrypted"):
        load_cifar10(tmp_path)
    assert not offline


def test_a_picture_that_is_too_large(tmp_path, offline):
    (write_cifar10(tmp_path) / "cifar10" / "train" / "dog" / "3.png").write_bytes(huge_picture())
    with pytest.raises(
        ValueError, match="dog/3.png in .* cannot be read: DecompressionBombError: Image size .400000000 pixels"
    ):
        load_cifar10(tmp_path)


def test_splits_of_different_sizes(tmp_path):
    write_cifar10(tmp_path / "large", side=16)
    root = write_cifar10(tmp_path / "small")
    (root / "cifar10/test").rename(root / "cifar10/test8")
    (tmp_path / "large/cifar10/test").rename(root / "cifar10/test")
    with pytest.raises(ValueError, match=r"all be of one size, got \(8, 8\) to train on and \(16, 16\)"):
        load_cifar10(root)


def test_offline_falls_back_to_generated_images_with_a_warning(tmp_path, offline):
    with pytest.warns(UserWarning, match="no network in this test.*cifar-10-batches-py"):
        data = load_cifar10(tmp_path / "nothing here")
    assert offline == ["CIFAR-10"] and "CIFAR-10 not found" in data.name
    assert data.train_images.shape == (2000, 3, 32, 32) and data.test_labels.bincount().tolist() == [50] * 10


def test_generated_images_have_classes_that_can_be_told_apart():
    data, again = generated_images(300, 100, 16), generated_images(300, 100, 16)
    assert all(torch.equal(one, two) for one, two in zip(data[1:], again[1:]))
    train, test = (images.float().mean((2, 3)) for images in (data.train_images, data.test_images))  # colors
    centers = torch.stack([train[data.train_labels == label].mean(0) for label in range(10)])
    assert (torch.cdist(test, centers).argmin(1) == data.test_labels).float().mean() > 0.5


def test_download_is_put_in_place(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets, "CIFAR10", lambda root, download: write_cifar10_pickles(Path(root)))
    assert load_cifar10(tmp_path).name == "CIFAR-10 (a part: 50 images)"
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]


def test_docstring_examples(small_cifar, monkeypatch):
    monkeypatch.setenv("L2O_DATA", str(small_cifar))
    result = doctest.testmod(cifar_data)
    assert result.attempted >= 3 and result.failed == 0


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match="root must be a path or None, got 3"):
        load_cifar10(3)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="holds no CIFAR-10 and can't be written to.*L2O_DATA"):
        load_cifar10(tmp_path / "file" / "data")
    with pytest.raises(ValueError, match="side must be at least 1, got 0"):
        generated_images(side=0)
    assert len(CIFAR10_CLASSES) == 10
