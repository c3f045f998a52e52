"""Where Neural Art's images come from: files, tar archives, or, where there are none, generated textures that say so.

Archives are read where they lie, members into memory; nothing on disk is ever changed.
"""

import functools
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from gradbuffer.checks import check_count
from gradbuffer.data.roots import check_split, data_root, decode, is_image
from gradbuffer.devices import drawn_on_cpu

__all__ = ["ArtImages", "generated_textures", "load_contents", "load_style"]

GENERATED = {"train": 200, "validation": 20, "test": 100}  # how many images stand in for each split


class ArtImages(NamedTuple):
    """Color images of one size. `name` says what they really are, for titles."""

    name: str
    images: torch.Tensor  # (n, 3, size, size), uint8


def load_contents(root: str | Path | None = None, split: str = "train", size: int = 64) -> ArtImages:
    """The content images of a split, or a stand-in that says that it is one.

    Images are those of the folder `<root>/neural_art/<split>_<size>` if there is one, else of
    `<root>/neural_art/<split>`; or of the folders with these names inside of `<root>/neural_art/content.tar`. They are
    cut to a square around their middle and averaged down to the size asked for. Without a folder `neural_art` that
    holds contents, `generated_textures` stand in, announced by a warning and by `name`.

    Args:
        root: the data root. Default: the environment variable `L2O_DATA`, else `data` in the working folder.
        split: "train", "validation" or "test".
        size: pixels in each direction, positive.

    Returns:
        `ArtImages`, on the CPU; the same object at every call with the same arguments.

    Raises:
        ValueError: there are contents, but not of this split, or they are smaller than `size`; or a file is truncated
            or corrupt.

    Example:
        >>> contents = load_contents(split="test").images
    """
    check_count(size=size)
    check_split(split)
    return _contents(data_root(root), split, size)


def load_style(root: str | Path | None = None, style: str = "starry_night", size: int = 64) -> ArtImages:
    """One style image, or a stand-in that says that it is one.

    It is the file of that name in the folder `<root>/neural_art/style` or inside of `<root>/neural_art/style.tar`, cut
    and averaged down as contents are.

    Args:
        root, size: as for `load_contents`.
        style: a file's name without its ending.

    Returns:
        `ArtImages` with a single image.

    Raises:
        ValueError: there are styles, but none of this name, or it is smaller than `size`, truncated or corrupt.

    Example:
        >>> style = load_style(style="candy", size=32).images[0]
    """
    check_count(size=size)
    if not isinstance(style, str) or not style:
        raise TypeError(f"style must be the name of an image, got {style!r}")
    return _style(data_root(root), style, size)


@functools.lru_cache(maxsize=16)
@drawn_on_cpu
def _contents(root, split, size):
    source, folders = open_source(root / "neural_art", "content")
    if not any(folders.values()):
        announce("contents", root, "content.tar, or <split>/*.jpg")
        number = list(GENERATED).index(split)
        return ArtImages("generated textures", generated_textures(GENERATED[split], size, seed=1000 * number + size))
    folder = f"{split}_{size}" if folders.get(f"{split}_{size}") else split
    if not folders.get(folder):
        raise ValueError(f"{source} holds no images in {split} or {split}_{size}; it has folders {sorted(folders)}")
    images = [middle_square(source, path, read, size) for path, read in sorted(folders[folder].items())]
    return ArtImages(f"{len(images):,} photographs", torch.stack(images))


@functools.lru_cache(maxsize=16)
@drawn_on_cpu
def _style(root, style, size):
    source, folders = open_source(root / "neural_art", "style")
    files = {path.stem: (path, read) for folder in folders.values() for path, read in folder.items()}
    if not files:
        announce("styles", root, "style.tar, or style/*.jpg")
        return ArtImages(f'a generated style "{style}"', generated_textures(1, size, seed=zlib.crc32(style.encode())))
    if style not in files:
        raise ValueError(f"style must be one of {sorted(files)}, the images of {source}, got {style!r}")
    return ArtImages(style.replace("_", " "), middle_square(source, *files[style], size)[None])


def announce(kind, root, form):
    warnings.warn(
        f"there are no {kind} for Neural Art under {root}; using generated textures instead. Put images into "
        f"{root / 'neural_art'} ({form}), or name their root in L2O_DATA.",
        stacklevel=4,
    )


def open_source(folder, kind):
    """Where the images of a kind lie, and a dict: folder's name -> {path: what reads its bytes}; empty if there are none.

    Unpacked images go before an archive.
    """
    paths = (folder / "style").glob("*") if kind == "style" else folder.glob("*/*")
    folders = in_folders({path: path.read_bytes for path in paths})
    if kind == "content":
        folders.pop("style", None)
    archive = folder / f"{kind}.tar"
    if folders or not archive.exists():
        return folder, folders
    folders = in_folders(read_archive(archive))
    if not folders:
        raise ValueError(f"{archive} holds no images: it is damaged, or another archive")
    return archive, folders


def read_archive(archive):
    """dict from a member's path to what reads it. Raises ValueError."""
    try:
        with tarfile.open(archive) as file:
            contents = {Path(member.name): file.extractfile(member).read() for member in file if member.isfile()}
            file.fileobj.seek(file.offset)  # where tarfile found the end: also at a damaged header
            if file.fileobj.read().strip(b"\0"):
                raise tarfile.ReadError(f"the member at byte {file.offset} has a damaged header")
    except Exception as error:  # whatever damage may lead tarfile to
        raise ValueError(f"{archive} is truncated or corrupt: {error}") from error
    return {path: functools.partial(bytes, content) for path, content in contents.items()}


def in_folders(readers):
    """{path: reader} -> {folder's name: {path: reader}}, images only."""
    folders = {}
    for path, read in readers.items():
        if is_image(path):
            folders.setdefault(path.parent.name, {})[path] = read
    return folders


def middle_square(source, path, read, size):
    """(3, size, size), uint8: the middle square of an image, averaged down. Raises ValueError."""
    from PIL import Image

    image = decode(source, path, read)
    width, height = image.size
    side = min(width, height)
    if side < size:
        raise ValueError(f"{path} in {source} is {width}×{height} pixels, too small for images of {size}×{size}")
    left, top = (width - side) // 2, (height - side) // 2
    box = left, top, left + side, top + side
    pixels = np.array(image.resize((size, size), Image.Resampling.BOX, box=box))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@drawn_on_cpu
def generated_textures(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth random textures: noise of several scales, one drawn over the other, in random colors.

    Args:
        count: how many, positive.
        size: pixels in each direction, positive.
        seed: the same seed gives the same images.

    Returns:
        (count, 3, size, size), uint8.

    Example:
        >>> generated_textures(4, size=16).shape
        torch.Size([4, 3, 16, 16])
    """
    check_count(count=count, size=size)
    check_count(least=0, seed=seed)
    generator, images = torch.Generator().manual_seed(seed), 0
    for cells in (2, 5, 11, 23):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        images = images + F.interpolate(noise, (size, size), mode="bicubic", align_corners=True) / cells**0.5
    return (128 + 70 * images).clamp(0, 255).byte()
