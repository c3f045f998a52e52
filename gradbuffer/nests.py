"""The state of a learned optimizer: any nest of tuples, lists and dicts with tensors at its leaves.

Networks choose their own nest (`init_state`); what moves, cuts or stores a state goes through these functions.
"""

import ctypes
import os

import torch

__all__ = ["Snapshot", "clone", "fill_leaves", "is_named", "map_tensors", "named_leaves", "tensors_in"]


def map_leaves(function, state, name):
    """The same nest with function(name, leaf) at each leaf; a leaf's name is its path, as in "state.0.cell"."""
    if isinstance(state, dict):
        return {key: map_leaves(function, part, f"{name}.{key}") for key, part in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [map_leaves(function, part, f"{name}.{number}") for number, part in enumerate(state)]
        return type(state)(*parts) if is_named(state) else type(state)(parts)
    return function(name, state)


def map_tensors(function, state):
    """Apply a function to every tensor in a state; leaves that are no tensors stay as they are."""
    return map_leaves(lambda _, leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, state, "state")


def is_named(state):
    """Whether it is a named tuple."""
    return isinstance(state, tuple) and hasattr(state, "_fields")


def clone(tensor):
    """A copy in one piece."""
    return tensor.clone(memory_format=torch.contiguous_format)


def tensors_in(state):
    """The tensors of a state, a list in the nest's order."""
    tensors = []
    map_tensors(tensors.append, state)
    return tensors


def named_leaves(state):
    """dict from name to leaf, in the nest's order; leaves that are None are left out.

    Example:
        >>> list(named_leaves((torch.zeros(2), {"moment": torch.ones(2)})))
        ['state.0', 'state.1.moment']
    """
    leaves = {}
    map_leaves(leaves.__setitem__, state, "state")
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def fill_leaves(nest, leaves):
    """The opposite of `named_leaves`: a nest of that form with these leaves."""
    return map_leaves(lambda name, _: leaves.get(name), nest, "state")


# Whether tensors still hold what they held: exactly, whoever wrote to them -------------------------------------------------

memcmp = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
memcmp.argtypes, memcmp.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int


class Snapshot:
    """A copy of tensors, to be compared with what they hold later.

    Neither a tensor's address nor its `_version` tells: fused optimizers, writes through `.data` and numpy's writes may
    leave both as they were. So all bytes are compared. Tensors that moved to other memory of the device are unchanged.

    Args:
        tensors: a list; copied.

    Example:
        >>> weight = torch.zeros(3)
        >>> kept = Snapshot([weight])
        >>> weight.numpy()[0] = 1
        >>> kept.holds([weight])
        False
    """

    def __init__(self, tensors):
        self.form = form_of(tensors)
        self.on_cpu = all(tensor.is_cpu and tensor.layout is torch.strided for tensor in tensors)
        with torch.inference_mode(False), torch.no_grad():
            self.kept = (
                [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
                if self.on_cpu
                else joined_by_form(tensors)
            )
        if self.on_cpu:
            self.places = [(kept.data_ptr(), kept.nbytes, kept.dtype, kept.shape) for kept in self.kept]

    def holds(self, tensors, wait=True):
        """Whether these tensors hold the same, in the same form; a bool.

        wait: look at what they hold also where a device has to be waited for; else only at their form there.
        """
        if not (wait or self.on_cpu):
            return form_of(tensors) == self.form
        return bool(self.compare(tensors))

    def compare(self, tensors):
        """The same, but where all tensors are on one device that is not a CPU, the answer may be a tensor there."""
        if not self.on_cpu:
            return form_of(tensors) == self.form and self.compare_elsewhere(tensors)
        if len(tensors) != len(self.places):
            return False
        for tensor, (address, size, dtype, shape) in zip(tensors, self.places):
            if not (
                tensor.is_cpu and tensor.dtype is dtype and tensor.shape == shape
            ):  # else memcmp could read too far
                return False
            if not tensor.is_contiguous():
                tensor = tensor.detach().contiguous()
            if memcmp(tensor.data_ptr(), address, size):
                return False
        return True

    @torch.no_grad()
    def compare_elsewhere(self, tensors):
        if any(device.type == "meta" for device, *_ in self.form):  # nothing is known of what they hold
            return False
        equal = [(new == kept).all() for new, kept in zip(joined_by_form(tensors), self.kept)]
        return equal[0] if len(equal) == 1 else all(equal)


def form_of(tensors):
    """What tells tensors apart without a look at what they hold: device, dtype and shape of each."""
    return [(tensor.device, tensor.dtype, tensor.shape) for tensor in tensors]


def joined_by_form(tensors):
    """One vector of all tensors of the same device and dtype: a few kernels do, however many tensors there are."""
    groups = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach().reshape(-1))
    return [torch.cat(group) for group in groups.values()]
