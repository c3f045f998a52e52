"""Checkpoints of a meta-training run: one file, written whole or not at all, that loads without running any code.

A file holds plain containers, numbers, text and tensors alone, by `torch.save`, and is read with `weights_only=True`. The
comment at the end of it, which is a zip archive, is a digest of all before. What goes into it
is `run`'s; the settings of the run stand beside it, and another run's are refused.
"""

import hashlib
import io
import zipfile
from pathlib import Path

import torch

from gradbuffer.contracts import kind_of
from gradbuffer.files import remove_partial_files, write_whole
from gradbuffer.nests import is_named, map_tensors, tensors_in
from gradbuffer.unrolling import Coordinates

__all__ = [
    "describe_net",
    "named_tuples",
    "plain",
    "read_checkpoint",
    "read_start",
    "regroup",
    "unplain",
    "write_checkpoint",
]

FILE_FORMAT = 2  # since 2 files end with a digest
DIGEST = "sha256:"
PARTS = ("iteration", "history", "random", "net", "averaged", "best", "adam", "window")  # that every content has
NAMED_TUPLE = "class of the named tuple"  # the key by which a plain state holds one; files name no classes to load


def write_checkpoint(path, content, settings):
    """Write a checkpoint; a failure leaves the one before as it was.

    Args:
        path: where to; the folder is made if it is not there.
        content, settings: dicts of what `plain` makes.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"format": FILE_FORMAT, "kind": "meta-training", "settings": settings, "content": content}, buffer)
    write_whole(path, with_digest(buffer.getvalue()))


def with_digest(content):
    """A zip archive without a comment -> the same with the digest of what comes before as its comment."""
    content, comment = content[:-2], f"{DIGEST}{hashlib.sha256(content[:-2]).hexdigest()}".encode()
    return (
        content + len(comment).to_bytes(2, "little") + comment
    )  # an archive ends with its comment, and the length before it


def digest_fits(content):
    """Whether a file ends with the digest of its content; None if it ends with none."""
    length = len(DIGEST) + 64
    if content[-length:-64] != DIGEST.encode():
        return None
    return with_digest(content[: -length - 2] + b"\0\0") == content


def read_checkpoint(path, settings, restart=False):
    """The content of a checkpoint of the run with these settings, on the CPU; None if there is no file, or with `restart` one of
    another run.

    Raises:
        ValueError: the file is corrupt, of a later format, no checkpoint, lacks parts, or is another run's; names the settings
            that differ.
    """
    path = Path(path)
    remove_partial_files(path)
    if not path.exists():
        return None
    file = read_file(path)
    there = file["settings"]
    different = [
        f"{name} was {there.get(name)!r} and is {settings.get(name)!r}"
        for name in {**there, **settings}
        if there.get(name) != settings.get(name)
    ]
    if different and restart:
        return None
    if different:
        raise ValueError(
            f"{path} is the checkpoint of another run: {'; '.join(different)}. Go on with its settings, "
            "name another file, or remove this one"
        )
    return file["content"]


def read_start(path):
    """The weights that the run of this checkpoint began with, a state dict; None if there is no file, or it does not say."""
    return read_file(path)["content"].get("start") if Path(path).exists() else None


def read_file(path):
    """The dict that a checkpoint's file holds. Raises ValueError."""
    try:
        content = Path(path).read_bytes()
        whole = digest_fits(content)
        if whole is False:
            raise ValueError("its digest is not that of its content")
        if whole is None:  # of the first format: torch.load does not look at an archive's own checksums
            damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        file = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damage may lead torch to
        raise ValueError(f"{path} is not a readable checkpoint, or a damaged one: {error}") from error
    if not isinstance(file, dict) or file.get("kind") != "meta-training" or not isinstance(file.get("format"), int):
        raise ValueError(f"{path} holds no checkpoint of a meta-training run")
    if file["format"] > FILE_FORMAT:
        raise ValueError(f"{path} is of format {file['format']}; this version reads up to {FILE_FORMAT}: update it")
    if whole is None and file["format"] > 1:
        raise ValueError(f"{path} is not a readable checkpoint, or a damaged one: its digest is missing")
    content = file.get("content")
    missing = [name for name in PARTS if not isinstance(content, dict) or name not in content]
    if missing or not isinstance(file.get("settings"), dict):
        raise ValueError(
            f"{path} lacks parts of a checkpoint: {', '.join(missing) or 'settings'}. Remove it to begin anew"
        )
    return file


def plain(state):
    """A state in plain containers, its tensors detached and on the CPU: what a checkpoint can hold."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {name: plain(part) for name, part in state.items()}
    if is_named(state):
        return {NAMED_TUPLE: type(state).__name__, "parts": plain(tuple(state))}
    if isinstance(state, (tuple, list)):
        return (list if isinstance(state, list) else tuple)(plain(part) for part in state)
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(f"a checkpoint holds tensors, numbers, text and containers of them, got {type(state).__name__}")


def named_tuples(state):
    """The classes of named tuples in a state."""
    if isinstance(state, dict):
        state = list(state.values())
    if not isinstance(state, (tuple, list)):
        return []
    return [type(state)] * is_named(state) + [cls for part in state for cls in named_tuples(part)]


def unplain(state, device, classes):
    """A plain state on a device, its named tuples of these classes again."""
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, dict) and NAMED_TUPLE in state:
        cls = next(cls for cls in classes if cls.__name__ == state[NAMED_TUPLE])
        return cls(*unplain(state["parts"], device, classes))
    if isinstance(state, dict):
        return {name: unplain(part, device, classes) for name, part in state.items()}
    if isinstance(state, (tuple, list)):
        return type(state)(unplain(part, device, classes) for part in state)
    return state


def regroup(parts, first, last, coordinatewise):
    """Params and state of functions first … last - 1, from those that each rank of a run had.

    Args:
        parts: a list of (first, last, params, state), as the ranks' slices of the meta-batch follow each other.
        first, last: the slice wanted.
        coordinatewise: whether the last axis of the state's tensors is that of coordinates; only then can states be
            put together in another way than they were.

    Returns:
        (params, state), or None where that cannot be done.
    """
    for start, end, params, state in parts:
        if (start, end) == (first, last):
            return params, state
    if not coordinatewise:
        return None
    sizes = [Coordinates(params) for _, _, params, _ in parts]
    tensors = [tensors_in(state) for _, _, _, state in parts]
    joined = iter([regroup_tensors(same, sizes, first, last) for same in zip(*tensors)])
    params = {name: torch.cat([part[2][name] for part in parts])[first:last] for name in parts[0][2]}
    return params, map_tensors(lambda tensor: next(joined), parts[0][3])


def regroup_tensors(tensors, coordinates, first, last):
    """Every rank's (..., N of its functions) -> (..., N of functions first … last - 1)."""
    pieces = [
        [piece.unflatten(-1, (part.functions, -1)) for piece in tensor.split(part.sizes, -1)]
        for tensor, part in zip(tensors, coordinates)
    ]
    return torch.cat([torch.cat(same, -2)[..., first:last, :].flatten(-2) for same in zip(*pieces)], -1)


# What a checkpoint must agree with ------------------------------------------------------------------------------------


def describe_net(rule):
    """What a checkpoint must agree with of a learned optimizer, as text."""
    tensors = {
        name: f"{tuple(parameter.shape)} {parameter.dtype}, {'trained' if parameter.requires_grad else 'frozen'}"
        for name, parameter in rule.named_parameters()
    }
    return f"{kind_of(rule)} {rule.config} with {tensors}"
