"""A fuzzer: files of every kind that we read, damaged in all ways, are refused by a ValueError or give the right content.

By default a few seconds' worth, the same damages each time. L2O_FUZZ_SECONDS=3600 goes on for so long with each kind of file, from
a seed that it prints.
"""

import itertools
import os
import random
import time
import warnings

import pytest
import torch
from conftest import write_art, write_cifar10, write_cifar10_pickles, write_mnist

import optimizers
from gradbuffer.data import art as art_data
from gradbuffer.data import cifar10 as cifar_data
from gradbuffer.data import mnist as mnist_data
from gradbuffer.nests import named_leaves
from gradbuffer.training.checkpoints import read_checkpoint
from meta_training import meta_train
from optimizees import Quadratics
from optimizers import CoordinatewiseLSTM, load_optimizer

DAMAGES = 60  # of each file, where no time is given


def a_bit(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def a_span(content, chance):
    start = chance.randrange(len(content))
    return start, min(len(content), start + chance.choice((1, 4, 64, 512, 4096)))


def replaced(content, chance, by):
    start, stop = a_span(content, chance)
    return content[:start] + by(content[start:stop]) + content[stop:]


DAMAGE = [
    a_bit,
    lambda content, chance: a_bit(a_bit(a_bit(content, chance), chance), chance),
    lambda content, chance: content[: chance.randrange(len(content))],
    lambda content, chance: content[chance.randrange(len(content)) :],
    lambda content, chance: content + content[slice(*a_span(content, chance))],
    lambda content, chance: replaced(content, chance, lambda span: b""),
    lambda content, chance: replaced(content, chance, lambda span: span + span),
    lambda content, chance: replaced(content, chance, lambda span: bytes(len(span))),
    lambda content, chance: replaced(content, chance, lambda span: b"\xff" * len(span)),
    lambda content, chance: replaced(content, chance, lambda span: chance.randbytes(len(span))),
    lambda content, chance: replaced(content, chance, lambda span: span[::-1]),
]


def same(found, content):
    found, content = named_leaves(found), named_leaves(content)
    return found.keys() == content.keys() and all(
        type(found[name]) is type(leaf)
        and (
            torch.equal(found[name], leaf)
            if isinstance(leaf, torch.Tensor)
            else found[name] == leaf or found[name] != found[name] and leaf != leaf
        )
        for name, leaf in content.items()
    )


def attack(path, read, same=same):
    """Damage the file in many ways; `read()` must raise ValueError or return what it did before."""
    seconds = float(os.environ.get("L2O_FUZZ_SECONDS", 0))
    seed = time.time_ns() if seconds else 0
    whole, right, end = path.read_bytes(), read(), time.time() + seconds
    chance, refused = random.Random(seed), 0
    print(f"{path.name}: seed {seed}")
    for number in itertools.count():
        if time.time() > end if seconds else number == DAMAGES:
            break
        kind = chance.randrange(len(DAMAGE))
        damaged = DAMAGE[kind](whole, chance)
        path.write_bytes(damaged)
        try:
            found = read()
        except ValueError as error:
            refused += 1
            assert str(error)
        else:
            assert same(found, right), f"damage {kind} number {number} from seed {seed} of {path.name} passed unseen"
    path.write_bytes(whole)
    assert same(read(), right) and refused > number / 4


@pytest.mark.parametrize("name", sorted(file.stem for file in optimizers.PRETRAINED.glob("*.safetensors")))
def test_weight_files(name, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes((optimizers.PRETRAINED / f"{name}.safetensors").read_bytes())

    def read():
        net = load_optimizer(path)
        return dict(net.state_dict()), str(net.config)

    attack(path, read)


def test_checkpoints(tmp_path):
    net, path = CoordinatewiseLSTM(3, 1), tmp_path / "run"
    meta_train(net, Quadratics(2), 20, 5, 2, iterations=3, checkpoint=path, validation_functions=2, progress=False)
    settings = torch.load(path, weights_only=True)["settings"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's of names that are there twice
        attack(path, lambda: read_checkpoint(path, settings))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_mnist_compressed(name, tmp_path, offline):
    root = write_mnist(tmp_path, train=40, test=20, side=4)
    attack(root / "MNIST" / "raw" / name, lambda: tuple(mnist_data._load.__wrapped__(root)))


def test_mnist_plain(tmp_path, offline):
    """Pixels have no checksum: what is read must have the right form, and be in [0, 1]."""
    root = write_mnist(tmp_path, train=40, test=20, side=4, compress=False)

    def fits(data, right):
        return [part.shape for part in data[1:]] == [part.shape for part in right[1:]] and 0 <= data[1].min() <= data[
            1
        ].max() <= 1

    attack(root / "MNIST" / "raw" / "train-images-idx3-ubyte", lambda: mnist_data._load.__wrapped__(root), fits)


def test_cifar10_zips(tmp_path):
    root = write_cifar10(tmp_path, train=2, test=1, form="zip")
    attack(root / "cifar10" / "train.zip", lambda: tuple(cifar_data.read_splits(root)))


def test_cifar10_pickles(tmp_path):
    """Pixels have no checksum here either."""
    root = write_cifar10_pickles(tmp_path)

    def fits(splits, right):
        return all(
            images.dtype == torch.uint8
            and images.shape[1:] == (3, 32, 32)
            and len(images) == len(labels)
            and 0 <= labels.min() <= labels.max() <= 9
            for images, labels in splits
        )

    attack(root / "cifar-10-batches-py" / "data_batch_3", lambda: cifar_data.read_splits(root), fits)


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_neural_art(form, tmp_path):
    """Pillow looks at no checksum of pixels, and a tar archive that lost a whole member is another archive: the form must be right."""
    root = write_art(tmp_path, form=form, counts=(("train", 3),))
    path = root / "neural_art" / ("content.tar" if form == "tar" else "train/1.png")

    def fits(art, right):
        number = len(art.images)
        return (
            art.images.shape[1:] == right.images.shape[1:]
            and art.name == f"{number:,} photographs"
            and (
                number == 3
                or form == "tar"
                and all((image == right.images).flatten(1).all(1).any() for image in art.images)
            )
        )

    attack(path, lambda: art_data._contents.__wrapped__(root, "train", 20), fits)
