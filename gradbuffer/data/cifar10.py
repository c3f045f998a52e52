"""Where CIFAR-10 comes from: files, a download, or, offline, generated images that say that they are a stand-in.

The images are decoded once per process, into tensors of bytes. Nothing on disk is ever changed, but for a download
into a data root that holds no CIFAR-10 yet.
"""

import functools
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gradbuffer.checks import check_count
from gradbuffer.data.roots import data_root, decode, find_or_download, is_image
from gradbuffer.devices import drawn_on_cpu

__all__ = ["CIFAR10_CLASSES", "ColorImages", "check_color_images", "generated_images", "load_cifar10"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The names of the labels 0 … 9; in the order of the alphabet, which is the original's."""

PICKLES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
PICKLED = Path("cifar-10-batches-py")  # the folder that torchvision unpacks


class ColorImages(NamedTuple):
    """Labelled color images, each split in a random order. `name` says which data set it really is, for titles."""

    name: str
    train_images: torch.Tensor  # (n, 3, side, side), uint8
    train_labels: torch.Tensor  # (n,), int64, 0 … 9
    test_images: torch.Tensor
    test_labels: torch.Tensor


def check_color_images(data: ColorImages) -> None:
    """Raise unless `ColorImages` hold what their fields say: all images square and of one size."""
    side = data.train_images.shape[-1]
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        if images.dtype != torch.uint8 or labels.dtype != torch.int64:
            raise TypeError(
                f"{split}_images must be uint8 tensors with int64 labels, got {images.dtype} and {labels.dtype}"
            )
        if images.shape != (len(labels), 3, side, side) or labels.dim() != 1 or not len(labels):
            raise ValueError(
                f"{split}_images must be (n, 3, {side}, {side}) with n labels, got {tuple(images.shape)} "
                f"with {len(labels)} labels"
            )
        if not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"{split}_labels must be 0 … 9, got {labels.min()} … {labels.max()}")


def load_cifar10(root: str | Path | None = None) -> ColorImages:
    """CIFAR-10, a part of it, or a stand-in that says that it is one.

    In this order: the pickled batches in `<root>/cifar-10-batches-py`, as torchvision unpacks them (read without
    running code from them); images in `<root>/cifar10/<split>/<class>/<number>.jpg`, or the same inside of
    `<root>/cifar10/<split>.zip`, with the splits "train" and "test" and the ten names of `CIFAR10_CLASSES` (zips are
    read where they lie, not unpacked); torchvision's download into `<root>`; and, when there is no network,
    `generated_images`, announced by a warning and by `name`.

    Args:
        root: the data root. Default: the environment variable `L2O_DATA`, else `data` in the working folder.

    Returns:
        `ColorImages`, on the CPU; the same object at every call with the same root. `name` is "CIFAR-10", or
        "CIFAR-10 (a part: 25,000 images)" with fewer training images than the original's 50,000.

    Raises:
        ValueError: a file is truncated or corrupt, files or classes are missing, images differ in size, or the root
            can't be written to when there is something to download.

    Example:
        >>> data = load_cifar10()
        >>> images, labels = data.train_images[:128], data.train_labels[:128]
    """
    return _load(data_root(root))


@functools.lru_cache(maxsize=4)
@drawn_on_cpu
def _load(root):
    splits = find_or_download(
        read_splits,
        root,
        "CIFAR-10",
        PICKLED,
        f"using generated images instead. Put the pickled batches into {root / PICKLED}, or images "
        f"into {root / 'cifar10' / 'train'}/<class>/<number>.jpg and the like for test (or train.zip and "
        "test.zip with these)",
    )
    if splits is None:
        stand_in = generated_images()
        return stand_in._replace(name=f"{stand_in.name} (CIFAR-10 not found)")
    (train_images, train_labels), (test_images, test_labels) = splits
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"the images of {root} must all be of one size, got {tuple(train_images.shape[2:])} to train "
            f"on and {tuple(test_images.shape[2:])} to test on"
        )
    count = len(train_labels)
    name = "CIFAR-10" if count == 50_000 else f"CIFAR-10 (a part: {count:,} images)"
    return ColorImages(name, *shuffle(train_images, train_labels), *shuffle(test_images, test_labels))


def shuffle(images, labels):
    """Both in one fixed random order: files lie class by class, and any stretch of images should be a fair sample."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def read_splits(root):
    """[(images, labels)] of "train" and "test" from the files under root; None if there are none."""
    if (root / PICKLED).is_dir():
        return [read_pickles(root / PICKLED, names) for names in PICKLES.values()]
    sources = {
        split: [source for source in (root / "cifar10" / split, root / "cifar10" / f"{split}.zip") if source.exists()]
        for split in ("train", "test")
    }
    if not any(sources.values()):
        return None
    for split, found in sources.items():
        if not found:
            raise ValueError(
                f"{root / 'cifar10'} holds a part of CIFAR-10 only: the folder {split} (or {split}.zip) is missing"
            )
    return [read_images(*found[:1]) for found in sources.values()]


# The pickled batches --------------------------------------------------------------------------------------------------


class ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text and numpy arrays, and runs no other code."""

    def find_class(self, module, name):
        if (module.replace("_core", "core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in CIFAR-10")


def read_pickles(folder, names):
    """(images, labels) of these batches, one after the other. Raises ValueError."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} holds a part of CIFAR-10 only: {', '.join(missing)} missing")
    batches = [read_pickle(folder / name) for name in names]
    return tuple(torch.cat(parts) for parts in zip(*batches))


def read_pickle(path):
    """(images, labels) of a batch. Raises ValueError."""
    try:
        with path.open("rb") as file:
            batch = ArrayUnpickler(file, encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # whatever damage may lead the unpickler to
        raise ValueError(f"{path} is truncated or corrupt: {type(error).__name__}: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072 or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"{path} must hold bytes (n, 3072) and n labels, got {pixels.dtype} {pixels.shape} and {labels.shape}"
        )
    if not len(labels) or labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() <= 9:
        raise ValueError(f"{path} must hold labels 0 … 9, got {np.unique(labels)[:20].tolist()}")
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


# Image files ----------------------------------------------------------------------------------------------------------


def read_images(source):
    """(images, labels) of a folder or a zip with `<class>/<number>.jpg` in it. Raises ValueError."""
    try:
        if source.is_dir():
            return label_images(source, {path.relative_to(source): path.read_bytes for path in source.glob("*/*")})
        with zipfile.ZipFile(source) as file:
            members = file.infolist()
            if len({member.filename for member in members}) < len(members):
                raise zipfile.BadZipFile("two members have one name")
            for member in members:
                if not is_image(Path(member.filename)):
                    file.read(member)  # says so if the name is a damaged one, which would hide an image
            entries = {Path(member.filename): functools.partial(file.read, member) for member in members}
            return label_images(source, entries)
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise ValueError(f"{source} is truncated or corrupt, or cannot be read: {error}") from error


def label_images(source, readers):
    """(images, labels), from a dict of paths that end in `<class>/<file>` and what reads each."""
    paths = sorted(filter(is_image, readers))
    found = {path.parent.name for path in paths}
    if found != set(CIFAR10_CLASSES):
        missing, other = sorted(set(CIFAR10_CLASSES) - found), sorted(found - set(CIFAR10_CLASSES))
        raise ValueError(
            f"{source} must hold images of CIFAR-10's ten classes, <class>/<number>.jpg; "
            f"missing: {missing}, not known: {other}"
        )
    images = None
    for place, path in enumerate(paths):
        pixels = np.asarray(decode(source, path, readers[path]))
        if images is None:
            images = torch.empty(len(paths), *pixels.shape, dtype=torch.uint8)
        if pixels.shape != images.shape[1:] or pixels.shape[0] != pixels.shape[1]:
            raise ValueError(
                f"{path} in {source} is {pixels.shape[1]}×{pixels.shape[0]} pixels; images must be square "
                f"and all of one size, the first is {images.shape[2]}×{images.shape[1]}"
            )
        images[place] = torch.from_numpy(pixels.copy())
    labels = torch.tensor([CIFAR10_CLASSES.index(path.parent.name) for path in paths])
    return images.permute(0, 3, 1, 2).contiguous(), labels


@drawn_on_cpu
def generated_images(train: int = 2000, test: int = 500, side: int = 32, seed: int = 0) -> ColorImages:
    """A stand-in for CIFAR-10: noisy gratings, whose direction and color tell the class and whose phase is random.

    Args:
        train, test: images of the two splits, positive; classes take turns.
        side: pixels in each direction, positive.
        seed: the same seed gives the same images.

    Returns:
        `ColorImages`, on the CPU.

    Example:
        >>> generated_images(train=100, test=20, side=16).train_images.shape
        torch.Size([100, 3, 16, 16])
    """
    check_count(train=train, test=test, side=side)
    check_count(least=0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for count in (train, test):
        labels = torch.arange(count) % 10
        angle, turn = labels * (torch.pi / 10), 2 * torch.pi * torch.rand(count, generator=generator)
        along = torch.linspace(-1, 1, side)
        waves = (along * angle.cos()[:, None])[:, None] + (along * angle.sin()[:, None])[..., None]  # (n, side, side)
        waves = (6 * waves + turn[:, None, None]).sin()
        tint = (labels[:, None] * 2.4 + torch.arange(3) * 2.1).cos()  # (n, 3)
        noise = torch.randn(count, 3, side, side, generator=generator)
        images = 128 + 40 * waves[:, None] + 20 * tint[..., None, None] + 40 * noise
        tensors += shuffle(images.clamp(0, 255).byte(), labels)
    return ColorImages("generated images", *tensors)
