"""The state of a learned optimizer: any nest of tuples, lists and dicts with tensors at its leaves.

Networks choose their own nest (`init_state`); what moves, cuts or stores a state goes through these functions.
"""

import torch

__all__ = ["clone", "fill_leaves", "is_named", "map_tensors", "named_leaves", "tensors_in"]


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
