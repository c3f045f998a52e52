"""What all tests share: seeds, one thread, and where data come from.

Real data are found through the environment variable L2O_DATA (see `mnist_data.load_mnist`). Without it the tests run
on files that they write themselves, and never on the network.
"""

import gzip

import numpy as np
import pytest
import torch

import mnist_data


torch.set_num_threads(1)  # the tests' tensors are too small for more to help


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch):
    """No network: torchvision's download fails as it does without one. Counts the calls."""
    calls = []

    def refuse(root):
        calls.append(root)
        raise OSError("no network in this test")

    monkeypatch.setattr(mnist_data, "download", refuse)
    return calls


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
