"""Where data lie, how they get there, and how an image file is read: what all data sets share."""

import contextlib
import io
import os
import socket
import tempfile
import warnings
from pathlib import Path

__all__ = ["check_split", "data_root", "decode", "fetch", "find_or_download", "is_image", "patience"]

IMAGE_FILES = (".jpg", ".jpeg", ".png")
DOWNLOAD_TIMEOUT = 30  # seconds without an answer after which we count as offline


def data_root(root):
    """Where data lie: `root`, else what `L2O_DATA` names, else `data` in the working folder. A whole path."""
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"root must be a path or None, got {root!r}")
    return Path(root or os.environ.get("L2O_DATA") or "data").resolve()


def check_split(split):
    if split not in ("train", "validation", "test"):
        raise ValueError(f'split must be "train", "validation" or "test", got {split!r}')


@contextlib.contextmanager
def patience():
    """Within it a download fails that gets no answer for `DOWNLOAD_TIMEOUT` seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def find_or_download(find, root, dataset, folder, instead):
    """What `find(root)` finds of a data set, if need be after a download into <root>/<folder>. Where it cannot be had, None,
    and a warning that says what is done `instead`."""
    found = find(root)
    if not found:
        try:
            fetch(root, dataset, folder)
            found = find(root)
        except (ImportError, OSError, RuntimeError) as error:
            warnings.warn(
                f"{dataset} is not under {root} and could not be downloaded ({error}); {instead}, or name their "
                "root in L2O_DATA.",
                stacklevel=4,
            )
    return found


def fetch(root, dataset, folder):
    """A data set by torchvision into <root>/<folder>, whole or not at all. Raises ValueError where it can't write."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=root, prefix=f".{dataset.lower()}-download-")
    except OSError as error:
        raise ValueError(
            f"the data root {root} holds no {dataset} and can't be written to ({error}): name another by "
            "the argument root or the environment variable L2O_DATA"
        ) from error
    with scratch:
        from torchvision import datasets

        with patience():
            {"MNIST": datasets.MNIST, "CIFAR-10": datasets.CIFAR10}[dataset](scratch.name, download=True)
        (root / folder).parent.mkdir(exist_ok=True)
        os.replace(Path(scratch.name) / folder, root / folder)


def is_image(path):
    return path.suffix.lower() in IMAGE_FILES and path.name[0] != "."


def decode(source, path, read):
    """The picture whose file's bytes `read()` gives, by PIL, in RGB. Raises ValueError that names the path and its source."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read())) as image:
            return image.convert("RGB")
    except Exception as error:  # an encrypted member of a zip, a picture too large, whatever damage may lead to
        raise ValueError(
            f"{path} in {source} is truncated or corrupt, or cannot be read: {type(error).__name__}: {error}"
        ) from error
