"""What a `LearnedOptimizer` keeps: its networks, where the parameters are, and of what parts their states are.

A state is stored flat, as a dict from the leaf's name to a tensor or a number, which is what `torch.optim.Optimizer` and
`torch.load(weights_only=True)` handle.
"""

import copy
import inspect
import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from gradbuffer.contracts import as_rule, repack
from gradbuffer.nests import Snapshot, named_leaves
from gradbuffer.nets.sharded import is_sharded, local, local_size, placements_of_state

__all__ = [
    "STEP",
    "NetworkInPlace",
    "Part",
    "Work",
    "check_state",
    "copy_of_state",
    "dense_gradient",
    "label",
    "parts_of",
    "takes",
    "tensors_of",
    "without_autocast",
]


class Part(NamedTuple):
    """One leaf of the state, as the network has it."""

    lead: tuple  # the shape before the axis of coordinates; all of the shape if there is no such axis
    dtype: object  # None for a Python number
    along: bool  # the last axis is that of the coordinates
    finite: bool  # at the start it holds neither infinities nor NaNs, so it never should

    def shape(self, size: int) -> tuple:
        return (*self.lead, size) if self.along else self.lead

    def stored_dtype(self, size: int, state_dtype: torch.dtype | None) -> torch.dtype:
        vectors = self.dtype.is_floating_point and math.prod(self.shape(size)) > size
        return state_dtype if state_dtype and vectors else self.dtype


STEP = Part((), None, False, True)  # the part "step" of a state: how many steps were done, for a network that reads it


class Work:
    """What a network reads of a group in one step."""

    looks = False  # whether its kernels look at gradients and weights themselves

    def __init__(self, network: "NetworkInPlace", group: dict[str, Any], number: int, members: list[int], lr: float):
        self.network, self.group, self.number, self.members, self.lr = network, group, number, members, lr
        self.params = [group["params"][index] for index in members]

    def label(self, place: int) -> str:
        return label(self.group, self.number, self.members[place])


def label(group: dict[str, Any], number: int, index: int) -> str:
    """What errors call a parameter."""
    name = f" ({group['param_names'][index]})" if "param_names" in group else ""
    return f"parameter {index}{name} of group {number}"


class NetworkInPlace:
    """A network where the parameters are: itself, or a copy on their device that follows its weights.

    Args:
        net: the network.
        device: of the parameters.
        cast_to: dtype of a copy's weights. Default: the network's own.
        is_watched: whether its weights are looked at before every step. Those of a copy and those on a device that has
            to be waited for always are: all else looks itself after what it keeps of its weights.
    """

    def __init__(
        self, net: nn.Module, device: torch.device, cast_to: torch.dtype | None = None, is_watched: bool = False
    ):
        self.source, self.device, self.cast_to, self.place = net, device, cast_to, place_of(net)
        self.name = type(net).__name__
        self.is_copy = any(
            tensor.device != device or cast_to and tensor.is_floating_point() and tensor.dtype != cast_to
            for tensor in tensors_of(net)
        )
        self.is_watched = is_watched or self.is_copy or device.type != "cpu"
        self.renew()
        self.reads = frozenset(self.rule.reads)
        if not self.reads <= {"params", "step"}:
            raise ValueError(
                f"{self.name} must read params and step at most, beside gradients, got {sorted(self.reads)}"
            )

    def is_current(self) -> bool:
        """Whether the network still is where it was, as a whole."""
        return self.place == place_of(self.source)

    @property
    def kept_vector(self) -> torch.Tensor | None:
        """What the weights were, one vector on the device; None where they are elsewhere, or of several dtypes."""
        vectors = [] if self.is_copy or self.kept is None or self.kept.on_cpu else self.kept.kept
        return vectors[0] if len(vectors) == 1 and vectors[0].dtype == self.dtype else None

    def unchanged(self) -> bool | torch.Tensor:
        """Whether the weights are those of the last `renew`, or not watched: a bool, or a tensor on their device."""
        return self.kept is None or self.kept.compare(tensors_of(self.source))

    def renew(self) -> None:
        """Take the weights as they are now."""
        self.kept = Snapshot(tensors_of(self.source)) if self.is_watched else None
        if self.is_copy:
            with torch.inference_mode(False):
                self.net = copy.deepcopy(self.source).to(self.device, self.cast_to)
        else:
            self.net = self.source
            repack(self.net)  # it does not look itself where it would have to wait
        self.rule = as_rule(self.net)


def tensors_of(net: nn.Module) -> list[torch.Tensor]:
    return [*net.parameters(), *net.buffers()]


def takes(net: nn.Module, argument: str) -> bool:
    """Whether `forward` has an argument of that name."""
    return argument in inspect.signature(net.forward).parameters


def place_of(net):
    """Device and dtype of a network's first tensor, or None: they change where a network moves as a whole."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return next(((tensor.device, tensor.dtype) for tensor in tensors), None)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which networks compute in their own dtype."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def dense_gradient(parameter: torch.Tensor, maximize: bool, dtype: torch.dtype) -> torch.Tensor:
    """What the network is to read for this parameter, this process's part of it. May share memory with `.grad`."""
    gradient = parameter.grad.detach()
    if is_sharded(gradient):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements).to_local()
    gradient = gradient.to(dtype)
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    return -gradient if maximize else gradient


def parts_of(nests: list, net_name: str) -> dict[str, Part]:
    """The parts of a state, from `init_state` of two and of three coordinates; or from one nest, taken as it is."""
    parts = {}
    for name, leaf in named_leaves(nests[0]).items():
        twin = named_leaves(nests[-1])[name]
        if isinstance(leaf, torch.Tensor) and leaf.dim() and len(nests) == 2 and leaf.shape != twin.shape:
            lead, last = tuple(leaf.shape[:-1]), (leaf.shape[-1], twin.shape[-1])
            if last != (2, 3) or twin.shape[:-1] != leaf.shape[:-1]:
                raise ValueError(
                    f"{name} of {net_name} must have the coordinates as its last axis (coordinatewise is "
                    f"True), got {tuple(leaf.shape)} for 2 coordinates and {tuple(twin.shape)} for 3"
                )
            parts[name] = Part(lead, leaf.dtype, True, is_finite(leaf))
        elif isinstance(leaf, torch.Tensor):
            parts[name] = Part(tuple(leaf.shape), leaf.dtype, False, is_finite(leaf))
        elif isinstance(leaf, (int, float)):
            parts[name] = Part((), None, False, is_finite(leaf))
        else:
            raise TypeError(f"{name} of {net_name} must be a tensor or a number, got {type(leaf).__name__}")
    return parts


def is_finite(leaf):
    if not isinstance(leaf, torch.Tensor):
        return math.isfinite(leaf)
    return leaf.is_meta or bool(torch.isfinite(leaf).all())


def check_state(
    state: dict[str, Any], parts: dict[str, Part], size: int, device: torch.device, label: str, net_name: str
) -> None:
    """Raise ValueError unless a state on this device has these parts, for so many coordinates."""
    if state.keys() != parts.keys():
        raise ValueError(
            f"the state of {label} has the parts {list(state)}, which are not those of {net_name}: {list(parts)}"
        )
    for name, part in parts.items():
        leaf = state[name]
        if part.dtype and (leaf.shape[-1] != size if part.along else leaf.shape != part.lead):
            raise ValueError(
                f"{label} must keep the size that it had when its state began: it has {size} coordinates "
                f"now, and {name} of its state has shape {tuple(leaf.shape)} instead of "
                f"{part.shape(size)}; make a new optimizer for it"
            )
        if part.dtype and leaf.device != device:
            raise ValueError(
                f"{label} is on {device}, its state on {leaf.device}: load the optimizer's state_dict() after "
                "moving a model"
            )


def copy_of_state(
    leaves: dict[str, Any],
    parts: dict[str, Part],
    params: list[torch.Tensor],
    device: torch.device,
    state_dtype: torch.dtype | None,
    where: str,
) -> dict[str, Any]:
    """A copy of the saved leaves of these parameters' state, on this device; ValueError if they are not these parts."""
    size, sharded = sum(map(local_size, params)), is_sharded(params[0])
    own = params[0].shape if len(params) == 1 else None
    expected = {
        name: (*part.lead, *own) if part.dtype and sharded else part.shape(size) if part.dtype else "a number"
        for name, part in parts.items()
    }
    found = {name: tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else "a number" for name, leaf in leaves.items()}
    if own is not None and not sharded:  # what was sharded and now is whole has the parameter's axes
        found = {
            name: expected[name]
            if name in expected and parts[name].along and shape == (*parts[name].lead, *own)
            else shape
            for name, shape in found.items()
        }
    if found != expected:
        raise ValueError(f"{where} must have the parts {expected}, got {found}")
    state = {}
    for name, part in parts.items():
        leaf = leaves[name]
        if part.dtype:
            if (
                is_sharded(leaf) != sharded
                or sharded
                and (leaf.device_mesh, leaf.placements)
                != (params[0].device_mesh, placements_of_state(params[0], len(part.lead)))
            ):
                raise ValueError(
                    f"{name} of {where} must be divided among processes as the parameter is, "
                    f"got {getattr(leaf, 'placements', 'a whole tensor')}"
                )
            leaf = leaf.detach() if sharded else leaf.detach().reshape(part.shape(size))
        if part.finite and not is_finite(local(leaf)):
            raise ValueError(f"{name} of {where} must be finite, but holds infinities or NaNs")
        with torch.inference_mode(False):
            state[name] = leaf.to(device, part.stored_dtype(size, state_dtype), copy=True) if part.dtype else leaf
    return state
