"""All tensors of a parameter group in one step of a coordinatewise network, where it has kernels for that."""

from typing import Any

import torch

from gradbuffer.nets.optimizer_state import Work, check_state, tensors_of
from gradbuffer.nets.vectors import VectorNetwork, flat_gradient

__all__ = ["Group", "fits_group"]


def fits_group(network: Any, group: dict[str, Any], parameter: torch.Tensor) -> bool:
    """Whether a parameter of a group can be stepped together with others: it, its gradient and its state lie as the kernels read them."""
    gradient, dtype = parameter.grad, parameter.dtype
    return (
        isinstance(network, VectorNetwork)
        and network.steps_in_groups
        and gradient is not None
        and type(gradient.data) is type(parameter.data) is torch.Tensor
        and gradient.layout is torch.strided
        and gradient.dtype == dtype == network.dtype
        and gradient.is_contiguous()
        and parameter.is_contiguous()
        and group["state_dtype"] in (None, dtype)
    )


class Group(Work):
    """Parameters of one group that a network steps all at once."""

    meshes, looks = (), True

    def __init__(
        self, network: VectorNetwork, group: dict[str, Any], number: int, members: list[int], lr: float, stored: dict
    ):
        super().__init__(network, group, number, members, lr)
        self.stored = stored  # the optimizer's states
        self.new = {}  # parameter -> its state, where the optimizer has none yet, or one that lies otherwise

    @property
    def gradients(self) -> list[torch.Tensor]:
        """What the network reads of each, for errors."""
        return [flat_gradient(parameter, self.group, parameter.dtype) for parameter in self.params]

    def look(self) -> torch.Tensor:
        """Flags (2,) on the device: a gradient is not finite; the network's weights have changed. One launch."""
        states = [self.state_of(place, parameter) for place, parameter in enumerate(self.params)]
        parts, kept = [tuple(state.values()) for state in states], self.network.kept_vector
        made = self.network.groups.get(self.number)
        looks_itself = kept is None and not self.network.is_watched  # on a CPU, in the interpreter
        if made is None or looks_itself or not made.holds(self.params, parts, kept):
            made = self.network.rule.group_steps(self.params, parts, tensors_of(self.network.source), kept)
            self.network.groups[self.number] = made
        self.steps = made
        sign = -1.0 if self.group["maximize"] else 1.0
        gradients = [parameter.grad for parameter in self.params]
        return made.look(gradients, self.lr, sign, float(self.group["weight_decay"]))

    def state_of(self, place: int, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Its state, or a new one."""
        state = self.new.get(parameter) or self.stored.get(parameter)
        if not state:
            self.new[parameter] = state = self.network.new_state(parameter.numel(), None)
            return state
        network = self.network
        check_state(state, network.parts, parameter.numel(), network.device, self.label(place), network.name)
        if not all(leaf.is_contiguous() and leaf.dtype == parameter.dtype for leaf in state.values()):
            self.new[parameter] = state = {name: leaf.to(parameter.dtype).contiguous() for name, leaf in state.items()}
        return state

    def renew(self) -> None:
        """Take the weights as they are now; the gradients have been looked at."""
        self.steps.lower()
        self.network.renew()
        self.look()

    def prepare(self, states: dict) -> None:
        """Done by `look`."""

    def apply(self, states: dict) -> None:
        """Keep the states that are new; the step has written over parameters and states."""
        states.update(self.new)
