"""Networks that read whole tensors, in a `LearnedOptimizer`: what a step gives them, and what becomes of it.

θ ← (1 - lr · λ) θ, then θ ← θ + update(∇, θ, state; lr), tensor by tensor. An `MLPOptimizer` on a CPU takes the
compiled steps of `kernels.numba_mlp.TensorSteps` where they do what it does, on CUDA those of `kernels.triton_mlp`, of all tensors
of a group at once; all others run as they are.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gradbuffer.kernels.choice import asked_for, load, reasons_against_triton, takes_numba
from gradbuffer.nests import fill_leaves, map_tensors, named_leaves
from gradbuffer.nets.mlp import MLPOptimizer
from gradbuffer.nets.optimizer_state import (
    STEP,
    NetworkInPlace,
    Part,
    Work,
    check_state,
    copy_of_state,
    dense_gradient,
    parts_of,
    takes,
    tensors_of,
    without_autocast,
)

__all__ = ["TensorNetwork", "Tensors", "explain_steps", "own_rate"]

TOGETHER = "gradbuffer.kernels.triton_mlp:MLPSteps"  # imported only where it may run: importing triton takes a second


def own_rate(net: nn.Module) -> float:
    """The rate of a tensorwise network's group where none is given: 1, a factor on its update, if it takes none."""
    if not takes(net, "lr"):
        return 1.0
    if getattr(net, "lr", None) is None:
        raise ValueError(f"lr must be given: {type(net).__name__} takes a rate and has none of its own, as `lr`")
    return net.lr


class Tensors(Work):
    """Parameters of one dtype on one device that a tensorwise network reads in one step."""

    meshes = ()  # none is sharded

    def __init__(self, network: "TensorNetwork", group: dict[str, Any], number: int, members: list[int], lr: float):
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr of group {number} must be a number of at least 0, got {lr}")
        members = [index for index in members if group["params"][index].grad is not None]
        super().__init__(network, group, number, members, lr)
        self.keep = 1 - lr * group["weight_decay"]
        self.gradients = self.read_gradients()

    @functools.cached_property
    def names(self) -> list[str]:
        """What the network calls them."""
        return [self.group["param_names"][k] if "param_names" in self.group else str(k) for k in self.members]

    def read_gradients(self) -> list[torch.Tensor]:
        """What the network reads of each."""
        maximize, dtype = self.group["maximize"], self.network.dtype
        return [dense_gradient(parameter, maximize, dtype) for parameter in self.params]

    def prepare(self, states: dict) -> None:
        """Find the states, or begin them; nothing of the optimizer's is changed."""
        self.states = [
            self.network.state_for(parameter, states.get(parameter), self.label(place))
            for place, parameter in enumerate(self.params)
        ]
        self.values = [parameter.detach().to(self.network.dtype) for parameter in self.params]
        self.results = [None] * len(self.params)  # pairs of an update and a new state, once the network has run

    def apply(self, states: dict) -> None:
        """Keep the new parameters and states."""
        self.network.finish(self)
        self.keep_new(states)

    def keep_new(self, states: dict) -> None:
        """Keep what is not where it belongs yet."""
        for parameter, value, state in zip(self.params, self.values, self.states):
            states[parameter] = state
            if value.dtype != parameter.dtype:
                parameter.copy_(value)


class TensorGroup(Tensors):
    """Those that kernels step all at once. What did not change since the last step is not looked at again: that takes a host longer
    than a device needs for the step."""

    looks = True

    def read_gradients(self) -> list[torch.Tensor]:
        """Each in one piece; the kernels turn their sign."""
        dtype, found = self.network.dtype, []
        for parameter in self.params:
            gradient = parameter.grad
            plain = type(gradient) is torch.Tensor and gradient.dtype is dtype and gradient.layout is torch.strided
            found.append((gradient if plain else dense_gradient(parameter, False, dtype)).contiguous())
        return found

    def look(self) -> torch.Tensor:
        """Flags (2,) on the device: a gradient is not finite; the network's weights have changed. One launch."""
        network, kept = self.network, self.network.kept_vector
        made = network.groups.get(self.number)
        if made is None or not made.holds(self.params, kept):
            made = load(TOGETHER)(network.net, self.params, tensors_of(network.source), kept)
            network.groups[self.number] = made
        self.steps = made
        return made.look(self.gradients)

    def renew(self) -> None:
        """Take the weights as they are now; the gradients have been looked at."""
        self.steps.lower()
        self.network.renew()
        self.look()

    def prepare(self, states: dict) -> None:
        """Find the states, or begin them; nothing of the optimizer's is changed."""
        found = [states.get(parameter, {}) for parameter in self.params]
        self.is_known = self.steps.knows([*self.params, *(leaf for state in found for leaf in state.values())])
        if not self.is_known:
            super().prepare(states)
            pairs = zip(self.params, self.values)
            self.values = [
                param if param.dtype == value.dtype else value for param, value in pairs
            ]  # themselves: known

    def apply(self, states: dict) -> None:
        """Write over parameters and states, and keep those that are new."""
        sign = -1.0 if self.group["maximize"] else 1.0
        if self.is_known:
            self.steps.step_again(self.gradients, self.lr, sign, self.keep)
        else:
            nests = [{name.removeprefix("state."): leaf for name, leaf in state.items()} for state in self.states]
            self.steps.step(self.values, self.gradients, nests, self.lr, sign, self.keep)
            self.keep_new(states)
        torch.autograd.graph.increment_version([param for param in self.params if not param.is_inference()])


class TensorNetwork(NetworkInPlace):
    """A tensorwise network for parameters of one dtype on one device.

    It computes in the parameters' dtype if that is float32 or float64, else in float32; its weights are cast to it.
    """

    joins, writes_in_place = False, False

    def __init__(self, net: nn.Module, device: torch.device, dtype: torch.dtype):
        self.dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        self.is_compiled = (
            type(net) is MLPOptimizer
            and net.variant == "celo"
            and takes_numba(torch.empty(0, device=device, dtype=self.dtype))
        )
        watched = self.is_compiled or asked_for() == "triton"  # on a CPU
        super().__init__(net, device, None if self.is_compiled else self.dtype, is_watched=watched)
        self.takes = self.reads | {name for name in ("lr", "params") if takes(net, name)}
        self.forms = {}  # shape of a parameter -> the nest of its state, and the parts of that

    def is_current(self) -> bool:
        return super().is_current() and (type(self.source) is not MLPOptimizer or self.source.config == self.config)

    def renew(self) -> None:
        super().renew()
        self.compiled, self.config = None, self.source.config if type(self.source) is MLPOptimizer else None
        self.groups = {}  # by the numbers of groups, what steps them at once

    @functools.cached_property
    def work(self) -> type[Tensors]:
        """What it reads of a group; looked at before the first step, as a device then compiles kernels and checks them."""
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        return Tensors if reasons_against_steps(self.net, like) else TensorGroup

    def check_group(self, group: dict[str, Any], params: list[torch.Tensor], where: str) -> None:
        """Raise unless it can run in this place."""
        if group["state_dtype"] is not None:
            raise ValueError(
                f"state_dtype must be None for {where}, whose network {self.name} is tensorwise: its state "
                f"has the dtype that it computes in; got {group['state_dtype']}"
            )
        names = group.get("param_names", ())
        if len(set(names)) < len(names):
            raise ValueError(f"the names of a group's parameters must differ for {self.name}, got {names}")
        self.form_of(min(params, key=torch.numel))

    def new_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step, flat."""
        with self.device, torch.inference_mode(False), torch.no_grad():
            nests = self.net.init_state({"0": parameter.detach().to(self.dtype)[None]})
        if not isinstance(nests, dict) or nests.keys() != {"0"}:
            raise ValueError(
                f"init_state of {self.name} must return a dict with the names of the params, got {nests!r}"
            )
        for name, leaf in named_leaves(nests["0"]).items():
            if not isinstance(leaf, torch.Tensor) or leaf.shape[:1] != (1,):
                got = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise ValueError(f"{name} of {self.name} must be a tensor (B, ...) for B functions, got {got} for one")
        nest = map_tensors(lambda leaf: leaf[0], nests["0"])
        state, parts = named_leaves(nest), parts_of([nest], self.name)
        if "step" in self.reads:
            state["step"], parts["step"] = 0, STEP
        self.forms[parameter.shape] = fill_leaves(nest, {}), parts
        return state

    def form_of(self, parameter: torch.Tensor) -> tuple[Any, dict[str, Part]]:
        if parameter.shape not in self.forms:
            self.new_state(parameter)
        return self.forms[parameter.shape]

    def state_for(self, parameter: torch.Tensor, stored: dict[str, Any] | None, label: str) -> dict[str, Any]:
        """The state to go on from: the stored one, if it fits."""
        if not stored:
            return self.new_state(parameter)
        _, parts = self.form_of(parameter)
        check_state(stored, parts, parameter.numel(), self.device, label, self.name)
        if all(part.dtype is None or stored[name].dtype == part.dtype for name, part in parts.items()):
            return stored
        return {name: stored[name].to(part.dtype) if part.dtype else stored[name] for name, part in parts.items()}

    def load_state(
        self, leaves: dict[str, Any], params: list[torch.Tensor], state_dtype: torch.dtype | None, where: str
    ) -> dict[str, Any]:
        """A copy of a parameter's saved state; ValueError if it is not this network's."""
        return copy_of_state(leaves, self.form_of(params[0])[1], params, self.device, state_dtype, where)

    def advance(self, works: Iterable[Tensors]) -> None:
        """Run the network, unless its steps are compiled, which write over what they read; nothing is changed yet."""
        if self.is_compiled and self.compiled is None:
            from gradbuffer.kernels.numba_mlp import TensorSteps  # only now: importing numba takes a second

            self.compiled = TensorSteps(self.net, self.dtype)
        for work in works if not self.is_compiled and self.work is Tensors else ():
            places_at = {}
            for place, state in enumerate(work.states):
                places_at.setdefault(state.get("step"), []).append(place)
            for step, places in places_at.items():
                self.run(work, step, places)

    def run(self, work: Tensors, step: int | None, places: list[int]) -> None:
        """One call of the network for tensors of the same step number."""
        named = {work.names[place]: place for place in places}
        grads = {name: work.gradients[place][None] for name, place in named.items()}
        params = {name: work.values[place][None] for name, place in named.items()}
        if work.keep != 1:
            params = {name: work.keep * value for name, value in params.items()}
        before = {
            name: {leaf: part[None] for leaf, part in work.states[place].items() if leaf != "step"}
            for name, place in named.items()
        }
        nests = {
            name: fill_leaves(self.forms[work.values[place].shape][0], before[name]) for name, place in named.items()
        }
        given = {"lr": work.lr, "params": params, "step": step}
        with without_autocast(self.device.type):
            updates, after = self.net(grads, nests, **{name: given[name] for name in self.takes})
        after = {name: named_leaves(nest) for name, nest in after.items()} if isinstance(after, dict) else {}
        self.check_shapes("updates", updates, params)
        for name, place in named.items():
            self.check_shapes(f"a state of {name!r}", after.get(name), before[name])
            update = updates[name][0] if "lr" in self.takes else work.lr * updates[name][0]
            with torch.inference_mode(False):  # clones: they may be parts of the old state, or of one another
                state = {
                    leaf: part.detach()[0].to(before[name][leaf].dtype).clone() for leaf, part in after[name].items()
                }
            work.results[place] = update, state

    def check_shapes(self, what: str, found: Any, wanted: dict[str, torch.Tensor]) -> None:
        """Raise ValueError unless the network has returned tensors like those in another dict."""
        found, wanted = shapes_of(found), shapes_of(wanted)
        if found != wanted:
            raise ValueError(f"{self.name} must return {what} of the shapes {wanted}, got {found}")

    def finish(self, work: Tensors) -> None:
        """Write what follows from the step over parameters and states."""
        for value in work.values if work.keep != 1 else ():
            value.mul_(work.keep)
        if self.is_compiled:
            nests = [fill_leaves(self.forms[value.shape][0], state) for value, state in zip(work.values, work.states)]
            self.compiled.steps(work.values, work.gradients, nests, work.lr)
            return
        for value, state, (update, after) in zip(work.values, work.states, work.results):
            value.add_(update)
            state.update(after)
            if "step" in state:
                state["step"] += 1


def shapes_of(tensors):
    """dict from name to shape; what is no tensor has none."""
    if not isinstance(tensors, dict):
        return type(tensors).__name__
    return {
        name: tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        for name, tensor in tensors.items()
    }


def reasons_against_steps(net, like):
    """Why kernels do not step tensors like that one all at once; empty where they do."""
    if type(net) is not MLPOptimizer:
        return [f"there are such kernels for an MLPOptimizer only, got {type(net).__name__}"]
    return reasons_against_triton(like) or load(TOGETHER).reasons_against(net, like)


def explain_steps(net: MLPOptimizer) -> list[str]:
    """Lines that say what takes a `LearnedOptimizer`'s steps where the network lies, and why not the others."""
    like = next(net.parameters()).detach()
    reasons = {"triton": reasons_against_steps(net, like)}
    if not takes_numba(like):
        reasons["numba"] = [f"runs on a CPU where it is installed and asked for, the network is on {like.device}"]
    elif net.variant != "celo":
        reasons["numba"] = [f'the variant must be "celo", got {net.variant!r}']
    runs = next(kind for kind in ("triton", "numba", "torch") if not reasons.get(kind))
    lines = [f"  step of a LearnedOptimizer: {runs}"]
    return lines + [f"    not {kind}: {'; '.join(against)}" for kind, against in reasons.items() if against]
