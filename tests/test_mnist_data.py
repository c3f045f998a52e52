"""Where MNIST comes from, and what happens when it can't."""

import gzip
import warnings
from pathlib import Path

import pytest
import torch
from conftest import write_mnist

from gradbuffer.data import mnist as mnist_data
from gradbuffer.data.mnist import load_mnist


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_are_read_where_they_lie(tmp_path, compress):
    root = write_mnist(tmp_path, compress=compress)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    data = load_mnist(root)
    assert data.name == "MNIST"
    assert data.train_images.shape == (300, 784) and data.test_images.shape == (80, 784)
    assert data.train_images.dtype == torch.float32 and 0 <= data.train_images.min() and data.train_images.max() == 1
    assert data.train_labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    bright = data.train_images.view(-1, 28, 28).mean(2).argmax(1)
    assert torch.equal(bright, 2 * data.train_labels)  # every image lies with its own label
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_loaded_once_per_process(small_mnist):
    assert load_mnist(small_mnist) is load_mnist(str(small_mnist))


def test_root_from_the_environment(small_mnist, monkeypatch):
    monkeypatch.setenv("L2O_DATA", str(small_mnist))
    assert load_mnist() is load_mnist(small_mnist)


def test_truncated_gzip_names_the_file_and_changes_nothing(small_mnist, offline):
    path = small_mnist / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(content := path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is truncated or corrupt"):
        load_mnist(small_mnist)
    assert path.read_bytes() == content and not offline


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"PK" + content[2:],
        lambda content: b"",
    ],
)
def test_damaged_idx_names_the_file(small_mnist, offline, damage):
    path = small_mnist / "MNIST/raw/t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz is"):
        load_mnist(small_mnist)
    assert not offline


def test_labels_that_do_not_fit_the_images(small_mnist):
    raw = small_mnist / "MNIST/raw"
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes((raw / "train-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(ValueError, match="do not fit each other"):
        load_mnist(small_mnist)


def test_test_images_of_another_size(tmp_path, offline):
    root, other = write_mnist(tmp_path / "one"), write_mnist(tmp_path / "other", side=8)
    name = "MNIST/raw/t10k-images-idx3-ubyte.gz"
    (root / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match="t10k-images.* must hold images of the size .* 784 pixels, got 8×8"):
        load_mnist(root)


def test_missing_part_is_named_and_not_downloaded_over(small_mnist, offline):
    (small_mnist / "MNIST/raw/t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte"):
        load_mnist(small_mnist)
    assert not offline


def test_offline_falls_back_to_digits_with_a_warning(tmp_path, offline):
    with pytest.warns(UserWarning, match="scikit-learn's handwritten digits"):
        data = load_mnist(tmp_path / "nothing here")
    assert offline == ["MNIST"] and "MNIST not found" in data.name
    assert data.train_images.shape == (1400, 64) and data.test_images.shape == (397, 64)
    assert data.train_images.max() == 1 and sorted(data.train_labels.unique().tolist()) == list(range(10))


def test_download_is_whole_or_not_at_all(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    class Interrupted:
        def __init__(self, root, download):
            write_mnist(Path(root))
            raise OSError("the connection broke")

    monkeypatch.setattr(datasets, "MNIST", Interrupted)
    with pytest.warns(UserWarning, match="the connection broke"):
        load_mnist(tmp_path)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(datasets, "MNIST", lambda root, download: write_mnist(Path(root)))
    mnist_data._load.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_mnist(tmp_path).name == "MNIST"
    assert len(list((tmp_path / "MNIST/raw").iterdir())) == 4


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="can't be written to.*L2O_DATA"):
        load_mnist(tmp_path / "file" / "data")


def test_root_of_a_wrong_type():
    with pytest.raises(TypeError, match="root must be a path or None, got 3"):
        load_mnist(3)
