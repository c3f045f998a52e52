"""What all tests share: seeds, one thread, and where data come from.

Real data are found through the environment variable L2O_DATA (see `mnist.load_mnist`). Without it the tests run
on files that they write themselves, and never on the network.
"""

import gzip
import pickle
import re
import shutil
import tarfile
import zlib

import numpy as np
import pytest
import torch

from gradbuffer.data import roots
from gradbuffer.data.cifar10 import CIFAR10_CLASSES

torch.set_num_threads(1)  # the tests' tensors are too small for more to help
torch.backends.cudnn.allow_tf32 = False  # cuDNN's LSTM is exact in tests, see docs/cuda.md


OPTIONAL = {"IPython", "PIL", "matplotlib", "mkdocs", "nbclient", "nbformat", "numba", "sklearn", "torchvision"}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file whose tests need a package that is not installed is skipped, so that the others run: on a machine lent with a GPU."""
    report = yield
    missing = re.findall(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr)) if report.failed else ()
    if OPTIONAL.intersection(missing):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {missing[-1]}")
        report.result = []
    return report


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` are collected everywhere, and run where there is a device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch):
    """Torchvision's downloads fail as they do without a network. Returns the list of data sets asked for."""
    asked = []

    def refuse(root, dataset, folder):
        asked.append(dataset)
        raise OSError("no network in this test")

    monkeypatch.setattr(roots, "fetch", refuse)
    return asked


def idx_bytes(array):
    """An IDX file of unsigned bytes: magic number, dimensions, data."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(root, train=300, test=80, compress=True, side=28):
    """A small MNIST in IDX files under root: each image is bright in a place that its label chooses."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = random.integers(0, 60, (count, side, side))
        images[np.arange(count), 2 * labels % side] = 255
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            content = idx_bytes(array)
            path = folder / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(content) if compress else content)
    return root


@pytest.fixture
def small_mnist(tmp_path):
    """A data root with 300 training and 80 test images in MNIST's own file format."""
    return write_mnist(tmp_path / "small")


@pytest.fixture
def tiny_mnist(tmp_path):
    """The same with images of 8×8 pixels, where a network should be small."""
    return write_mnist(tmp_path / "tiny", side=8)


def image_of(label, side, random):
    """(side, side, 3): noise, and a corner that tells the label and the color."""
    image = random.integers(0, 256, (side, side, 3)).astype(np.uint8)
    image[0, 0] = 20 * label + np.arange(3)
    return image


def write_cifar10(root, train=6, test=2, side=8, form="folder"):
    """A small CIFAR-10 in image files (PNG, so that they are exact) under root, or in zips of them."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(CIFAR10_CLASSES):
            folder = root / "cifar10" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(image_of(label, side, random)).save(folder / f"{number}.png")
        if form == "zip":
            shutil.make_archive(root / "cifar10" / split, "zip", root / "cifar10", split)
            shutil.rmtree(root / "cifar10" / split)
    return root


def write_cifar10_pickles(root, count=10):
    """A small CIFAR-10 in the form of the original: one image of each class in every batch."""
    random, folder = np.random.default_rng(0), root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        images = np.stack([image_of(label % 10, 32, random) for label in range(count)])
        batch = {
            b"batch_label": name.encode(),
            b"labels": [label % 10 for label in range(count)],
            b"data": images.transpose(0, 3, 1, 2).reshape(count, -1),
            b"filenames": [b"x.png"] * count,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


@pytest.fixture
def small_cifar(tmp_path):
    """A data root with 60 training and 20 test images of 8×8 pixels."""
    return write_cifar10(tmp_path / "cifar")


def huge_picture(side=20_000):
    """A PNG of a few bytes that says that it is 400 megapixels large."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + (13).to_bytes(4, "big")
        + header
        + zlib.crc32(header).to_bytes(4, "big")
        + bytes(4)
        + b"IDAT"
    )


def write_art(root, form="folder", side=20, counts=(("train", 6), ("validation", 3), ("test", 4), ("test_32", 2))):
    """Small images for Neural Art (PNG, so that they are exact) under root, or in tar archives of them."""
    from PIL import Image

    random = np.random.default_rng(0)
    for folder, count in (*counts, ("style", 2)):
        size = 32 if folder.endswith("32") else side
        place = root / "neural_art" / folder
        place.mkdir(parents=True)
        for name in ("starry_night", "candy") if folder == "style" else map(str, range(count)):
            pixels = random.integers(0, 256, (size, size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{name}.png")
    if form == "tar":
        with tarfile.open(root / "neural_art" / "style.tar", "w") as file:
            for path in sorted((root / "neural_art" / "style").iterdir()):
                file.add(path, path.name)
        with tarfile.open(root / "neural_art" / "content.tar", "w") as file:
            for folder, _ in counts:
                file.add(root / "neural_art" / folder, folder)
        for folder in ("style", *(folder for folder, _ in counts)):
            shutil.rmtree(root / "neural_art" / folder)
    return root


@pytest.fixture
def small_art(tmp_path):
    """A data root with 6, 3 and 4 images of 20×20 pixels, two of 32×32, and two styles."""
    return write_art(tmp_path / "art")


@pytest.fixture
def threads_as_before():
    """A test may set the number of torch's threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
