"""Networks that read vectors of coordinates, in a `LearnedOptimizer`: what a step gives them, and what becomes of it.

A coordinatewise network reads each parameter as a vector of its own, small ones joined and large ones cut; any other
reads all parameters of its group as one vector.
"""

import math
from collections.abc import Iterable
from functools import partial, reduce
from typing import Any

import torch
from torch import nn

from gradbuffer.nests import fill_leaves, map_tensors, named_leaves
from gradbuffer.nets.optimizer_state import (
    STEP,
    NetworkInPlace,
    Work,
    check_state,
    copy_of_state,
    dense_gradient,
    parts_of,
    takes,
    tensors_of,
    without_autocast,
)
from gradbuffer.nets.sharded import as_sharded, check_not_divided, from_sharded, is_sharded, local, local_size

__all__ = ["Vector", "VectorNetwork", "flat_gradient"]

# Coordinates that a coordinatewise network gets at once, at most: more where it writes over what is stored, without copies.
CHUNK = {"cpu": 1 << 14, "cpu, in place": 1 << 18, "elsewhere": 1 << 22}
SMALL = 2048  # coordinates of a parameter up to which it runs together with others: a call costs as much as some 1,000


class Vector(Work):
    """Parameters that a network reads as one vector in one step: their gradients, their state, their update."""

    def __init__(self, network: "VectorNetwork", group: dict[str, Any], number: int, members: list[int], lr: float):
        super().__init__(network, group, number, members, lr)
        dtype = network.dtype or self.params[0].dtype
        self.gradients = [flat_gradient(parameter, group, dtype) for parameter in self.params]
        self.meshes = [self.params[0].device_mesh] if is_sharded(self.params[0]) else []

    def prepare(self, states: dict) -> None:
        """Find the state, or begin one; nothing of the optimizer's is changed."""
        self.grad = joined(self.gradients)
        self.size, self.update = len(self.grad), torch.empty_like(self.grad)
        if "params" in self.network.reads:
            self.theta = joined(
                [local(parameter).detach().to(self.grad.dtype).reshape(-1) for parameter in self.params]
            )
        self.later = []  # functions that write what a network gave back over its state, once all networks have run
        stored = states.get(self.params[0])
        self.is_new = not stored
        if self.is_new:
            self.state = self.network.new_state(self.size, self.group["state_dtype"])
        else:
            self.state = (
                {name: from_sharded(leaf, self.params[0]) for name, leaf in stored.items()} if self.meshes else stored
            )
            check_state(
                self.state, self.network.parts, self.size, self.network.device, self.label(0), self.network.name
            )

    def apply(self, states: dict) -> None:
        """Keep the new state, and θ ← θ + lr · update, where there is a gradient."""
        for write in self.later:
            write()
        if self.is_new:
            states[self.params[0]] = (
                {name: as_sharded(leaf, self.params[0]) for name, leaf in self.state.items()}
                if self.meshes
                else self.state
            )
        for parameter, update in zip(self.params, cut(self.update, map(local_size, self.params))):
            if parameter.grad is not None:
                place = local(parameter)
                place.add_(update.view(place.shape), alpha=self.lr)


def flat_gradient(parameter: torch.Tensor, group: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """(n,), what the network is to read for this parameter, in its dtype. May share memory with `.grad`."""
    if parameter.grad is None:
        return torch.zeros(local_size(parameter), dtype=dtype, device=parameter.device)
    gradient = dense_gradient(parameter, group["maximize"], dtype)
    if group["weight_decay"]:
        gradient = gradient.add(local(parameter).to(dtype), alpha=group["weight_decay"])
    return gradient.reshape(-1)


def joined(pieces):
    """Tensors (..., n_i) as one (..., Σ n_i); a single one as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def cut(vector, sizes):
    """The opposite of `joined`, without the Python of `Tensor.split`."""
    sizes = list(sizes)
    return [vector] if len(sizes) == 1 else torch.split_with_sizes(vector, sizes, -1)


class VectorNetwork(NetworkInPlace):
    """A network on one device, for vectors of that size or, if it is coordinatewise, of any, and the parts of its state."""

    work = Vector

    def __init__(self, net: nn.Module, device: torch.device, size: int | None = None):
        super().__init__(net, device)
        self.options = {"inplace": True} if takes(net, "inplace") else {}
        self.writes_in_place = bool(self.options)
        self.most = {in_place: self.at_once(in_place) for in_place in (False, True)}
        with device, torch.inference_mode(False):  # whatever the caller's default device and mode
            nests = [self.net.init_state(n) for n in ((2, 3) if self.rule.coordinatewise else (size,))]
        self.parts = parts_of(nests, self.name)
        if "step" in self.reads:
            self.parts["step"] = STEP
        self.nest = map_tensors(lambda leaf: leaf.new_empty(0), nests[0])
        self.joins = self.rule.coordinatewise and all(part.along for part in self.parts.values())
        kinds = [tensor.dtype for tensor in tensors_of(net)], [part.dtype for part in self.parts.values() if part.dtype]
        weights, state = ([kind for kind in some if kind.is_floating_point] for some in kinds)
        self.dtype = weights[0] if weights else reduce(torch.promote_types, state) if state else None

    def renew(self) -> None:
        super().renew()
        self.groups, self._steps_in_groups = {}, None  # by the numbers of groups, what steps them

    @property
    def steps_in_groups(self) -> bool:
        """Whether the network takes the steps of many tensors at once; looked at once."""
        if self._steps_in_groups is None:
            self._steps_in_groups = self.rule.steps_in_groups
        return self._steps_in_groups

    def check_group(self, group: dict[str, Any], params: list[torch.Tensor], where: str) -> None:
        """Raise unless it can run in this place."""
        if not self.rule.coordinatewise:
            check_not_divided(self.name, where)

    def at_once(self, in_place: bool) -> float:
        """Coordinates that the network gets at most; in_place: it writes over what is stored."""
        if not self.rule.coordinatewise:
            return math.inf
        kind = self.device.type + ", in place" * in_place
        return CHUNK[kind if kind in CHUNK else "elsewhere"]

    def in_place(self, vector: Vector) -> bool:
        """Whether it writes over this vector's state as that is stored."""
        return bool(self.options) and all(
            self.dtype_of(name, vector.state[name]) == vector.state[name].dtype
            for name, part in self.parts.items()
            if part.dtype
        )

    def dtype_of(self, name: str, stored: torch.Tensor) -> torch.dtype:
        """In which dtype the network is given a part that is stored so: in its own, or as it is."""
        kind = self.parts[name].dtype
        return stored.dtype if self.options and stored.dtype != kind and self.rule.renews(stored.dtype) else kind

    def chunks(self, size: int, in_place: bool = False) -> list[tuple[int, int]]:
        most = min(self.most[in_place], max(size, 1))
        return [(a, min(a + most, size)) for a in range(0, size, most)]

    def new_state(self, size: int, state_dtype: torch.dtype | None) -> dict[str, Any]:
        """The state before the first step, for a vector of that size."""
        with self.device, torch.inference_mode(False):
            state = {
                name: torch.empty(part.shape(size), dtype=part.stored_dtype(size, state_dtype))
                for name, part in self.parts.items()
                if part.dtype
            }
            if "step" in self.reads:
                state["step"] = 0
            for start, stop in self.chunks(size):
                for name, leaf in named_leaves(self.net.init_state(stop - start)).items():
                    if self.parts[name].dtype is None:
                        state[name] = leaf
                    else:
                        (state[name][..., start:stop] if self.parts[name].along else state[name]).copy_(leaf)
        return {name: state[name] for name in self.parts}

    def load_state(
        self, leaves: dict[str, Any], params: list[torch.Tensor], state_dtype: torch.dtype | None, where: str
    ) -> dict[str, Any]:
        """A copy of the saved leaves of these parameters' state; ValueError if they are not this network's."""
        return copy_of_state(leaves, self.parts, params, self.device, state_dtype, where)

    def advance(self, vectors: Iterable[Work]) -> None:
        """One step: fills the vectors' updates and renews their states. Small vectors run together, large ones cut."""
        batch, size = [], 0
        for vector in vectors:
            if not isinstance(vector, Vector):  # many at once
                vector.steps.step()
                continue
            if not self.joins or vector.size > min(SMALL, self.most[False]):
                for span in self.chunks(vector.size, self.in_place(vector)):  # none of a part without coordinates
                    self.run([(vector, *span)])
                continue
            if size + vector.size > self.most[False]:
                self.run(batch)
                batch, size = [], 0
            batch.append((vector, 0, vector.size))
            size += vector.size
        if batch:
            self.run(batch)

    def run(self, spans: list[tuple[Vector, int, int]]) -> None:
        """One call of the network for spans (vector, start, stop) of coordinates."""
        sizes = [stop - start for _, start, stop in spans]
        grad = joined([vector.grad[start:stop] for vector, start, stop in spans])
        places = {
            name: [
                vector.state[name][..., start:stop] if part.along else vector.state[name]
                for vector, start, stop in spans
            ]
            for name, part in self.parts.items()
        }
        given = {name: self.to_compute(name, places[name], spans) for name in self.parts}
        read = {}
        if "params" in self.reads:
            read["params"] = joined([vector.theta[start:stop] for vector, start, stop in spans])
        if "step" in self.reads:
            read["step"] = given.pop("step")
        with without_autocast(self.device.type):
            update, state = self.net(grad, fill_leaves(self.nest, given), **self.options, **read)
        leaves = self.checked(update, named_leaves(state), grad, given)
        if "step" in self.reads:
            leaves["step"] = read["step"] + 1
        for (vector, start, stop), piece in zip(spans, cut(update, sizes)):
            vector.update[start:stop] = piece
        self.store(spans, places, given, leaves)

    def store(
        self,
        spans: list[tuple[Vector, int, int]],
        places: dict[str, list],
        given: dict[str, Any],
        leaves: dict[str, Any],
    ) -> None:
        """Write the new state over the old: at once if the network writes in place, else when all networks have run."""
        old = {
            place.untyped_storage().data_ptr()
            for name, part in self.parts.items()
            if part.dtype
            for place in places[name]
        }
        for name, leaf in leaves.items():  # a network may hand back a part of the old state: out of the way with it
            if self.parts[name].dtype and leaf.untyped_storage().data_ptr() in old and not same(leaf, given[name]):
                leaves[name] = leaf.clone()
        sizes, (vector, _, end) = [stop - start for _, start, stop in spans], spans[-1]
        for name, part in self.parts.items():
            if part.along:
                for (owner, *_), place, piece in zip(spans, places[name], cut(leaves[name], sizes)):
                    if not same(place, piece):
                        self.write(owner, place, piece)
            elif end == vector.size:  # all chunks of a vector read the old value, and the last one leaves the new
                if part.dtype:
                    self.write(vector, places[name][0], leaves[name])
                else:
                    vector.later.append(partial(vector.state.__setitem__, name, leaves[name]))

    def write(self, vector: Vector, place: torch.Tensor, piece: torch.Tensor) -> None:
        if self.options:
            place.copy_(piece)
        else:
            vector.later.append(partial(place.copy_, piece.to(place.dtype)))

    def to_compute(self, name: str, places: list, spans: list[tuple[Vector, int, int]]) -> Any:
        """A part of the state as the network is to get it: the stored memory itself wherever that is possible."""
        part = self.parts[name]
        if part.dtype is None:
            return places[0]
        if part.along:
            leaf = joined(places).to(self.dtype_of(name, places[0]))
            return leaf if self.options else leaf.contiguous()  # a user's network may rely on it
        return places[0].to(part.dtype, copy=spans[0][2] - spans[0][1] < spans[0][0].size)

    def checked(
        self, update: torch.Tensor, leaves: dict[str, Any], grad: torch.Tensor, given: dict[str, Any]
    ) -> dict[str, Any]:
        """The new state's leaves, or ValueError if the network did not return what was agreed."""
        if not isinstance(update, torch.Tensor) or update.shape != grad.shape:
            got = tuple(update.shape) if isinstance(update, torch.Tensor) else type(update).__name__
            raise ValueError(f"{self.name} must return an update {tuple(grad.shape)}, got {got}")
        shapes, expected = (
            {name: getattr(leaf, "shape", None) for name, leaf in parts.items()} for parts in (leaves, given)
        )
        if shapes != expected:
            raise ValueError(f"{self.name} must return a state like the one it got, {expected}; got {shapes}")
        return leaves


def same(a, b):
    """Whether two tensors are one and the same memory."""
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())
