"""Where MNIST comes from: files, a download, or, offline, a small data set that scikit-learn ships.

The images are loaded once per process, as tensors. Nothing on disk is ever changed, but for a download into a data
root that holds no MNIST yet.
"""

import functools
import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gradbuffer.data.roots import data_root, find_or_download
from gradbuffer.devices import drawn_on_cpu

__all__ = ["ImageData", "load_mnist"]

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
RAW = Path("MNIST", "raw")  # the folder into which torchvision unpacks


class ImageData(NamedTuple):
    """Labelled images. `name` says which data set it really is, for titles and tables."""

    name: str
    train_images: torch.Tensor  # (n, pixels), float32 in [0, 1]
    train_labels: torch.Tensor  # (n,), int64
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_mnist(root: str | Path | None = None) -> ImageData:
    """MNIST, or a stand-in that says that it is one.

    In this order: the four IDX files (plain, or gzip-compressed and then unpacked in memory) in `<root>/MNIST/raw`,
    `<root>/raw` or `<root>`; torchvision's download into `<root>`; and, when there is no network, scikit-learn's
    1,797 handwritten digits of 8×8 pixels, announced by a warning and by `name`.

    Args:
        root: the data root. Default: the environment variable `L2O_DATA`, else `data` in the working folder.

    Returns:
        `ImageData`, on the CPU; the same object at every call with the same root.

    Raises:
        ValueError: a file is truncated or corrupt, some of the four files are missing, or the root can't be written
            to when there is something to download.

    Example:
        >>> data = load_mnist()
        >>> images, labels = data.train_images[:128], data.train_labels[:128]
    """
    return _load(data_root(root))


@functools.lru_cache(maxsize=4)
@drawn_on_cpu
def _load(root):
    files = find_or_download(
        find_files,
        root,
        "MNIST",
        RAW,
        f"using scikit-learn's handwritten digits (8×8 pixels) instead. Put the four IDX files into {root / RAW}",
    )
    if not files:
        return load_digits()
    tensors = []
    for split in ("train", "test"):
        images, labels = (read_idx(files[name]) for name in FILES[split])
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or labels.max() > 9:
            raise ValueError(
                f"{files[FILES[split][0]]} and {files[FILES[split][1]]} do not fit each other: "
                f"shapes {images.shape} and {labels.shape}, labels up to {labels.max()}"
            )
        if len(tensors) and images[0].size != tensors[0].shape[1]:
            raise ValueError(
                f"{files[FILES[split][0]]} must hold images of the size that those to train on have, "
                f"{tensors[0].shape[1]} pixels, got {images.shape[1]}×{images.shape[2]}"
            )
        tensors += [
            torch.from_numpy(images.reshape(len(images), -1)).float().div_(255),
            torch.from_numpy(labels).long(),
        ]
    return ImageData("MNIST", *tensors)


def find_files(root):
    """dict from IDX file name to the path it is found at; empty if there is none, an error if some are missing."""
    for folder in (root / RAW, root / "raw", root):
        found = {}
        for name in (name for names in FILES.values() for name in names):
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    found.setdefault(name, path)
        if len(found) == 4:
            return found
        if found:
            missing = sorted(name for names in FILES.values() for name in names if name not in found)
            raise ValueError(f"{folder} holds a part of MNIST only: {', '.join(missing)} (or .gz) missing")
    return {}


def read_idx(path):
    """The array in an IDX file of unsigned bytes, gzip-compressed if its name ends in .gz. Raises ValueError."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error, MemoryError) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise ValueError(f"{path} is not an IDX file of bytes: it starts with {content[:4]!r}")
    dims = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(dims))
    expected, held = math.prod(shape), len(content) - 4 - 4 * dims
    if held != expected or expected == 0:
        raise ValueError(f"{path} is truncated or corrupt: its header says {expected} bytes of data, it holds {held}")
    return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * dims).reshape(shape)


def load_digits():
    """scikit-learn's digits as `ImageData`: 1,400 to train on, 397 to test on, in a fixed random order."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.data).float().div_(16)[order]
    labels = torch.from_numpy(digits.target).long()[order]
    return ImageData(
        "scikit-learn digits 8×8 (MNIST not found)", images[:1400], labels[:1400], images[1400:], labels[1400:]
    )
