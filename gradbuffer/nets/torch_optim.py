"""`LearnedOptimizer`: a trained learned optimizer as a drop-in `torch.optim.Optimizer`.

θ ← θ + lr · g with (g, h) ← m(∇, h; φ), the update rule of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1),
for any network m with `init_state(num_coordinates)` and `forward(grad, state) -> (update, state)`, see `nets.vectors`;
or for a tensorwise one, see `nets.tensorwise`. The network is used, never trained (that is `meta_training`). The state
is most of the memory, 2·layers·hidden numbers for each coordinate of an LSTM, so it is kept per parameter.
"""

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from gradbuffer.checks import NonFiniteError, check_finite, sum_is_finite, values_unchecked
from gradbuffer.contracts import as_rule
from gradbuffer.nets.groups import Group, fits_group
from gradbuffer.nets.optimizer_state import label
from gradbuffer.nets.sharded import check_sharded, local_size, true_everywhere
from gradbuffer.nets.tensorwise import TensorNetwork, own_rate
from gradbuffer.nets.vectors import VectorNetwork

__all__ = ["LearnedOptimizer"]

OPTIONS = ("net", "lr", "weight_decay", "maximize", "state_dtype")
UNSAVED = ("net", "state_dtype")  # options of a group that belong to the program: `load_state_dict` leaves them
UNSUPPORTED = ("foreach", "fused", "capturable", "differentiable", "momentum", "betas")  # options of torch's optimizers
STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LearnedOptimizer(torch.optim.Optimizer):
    """A trained learned optimizer as a `torch.optim.Optimizer`, with all that goes with one.

    A network with `coordinatewise = True` runs parameter by parameter, each with a state of its own in
    `self.state[parameter]`. One with `tensorwise = True`, such as `MLPOptimizer`, is given parameters and gradients as
    the tensors that they are, and no tensor's update may depend on another tensor. Any other sees all parameters of its
    group as one vector, whose state lies with the group's first parameter. Vectors are cast to the network's dtype; a
    tensorwise network computes in the parameters' dtype, or in float32 where they have 16 bits. Updates are added in
    the parameters' dtype. A network on another device is copied to where the parameters are, and again when its weights
    change; it is not trained, and no graph is recorded.

    What a network can say of itself stands in `contracts.Rule`. One that `reads` "params" or "step" is given them;
    "loss" is refused, since a step need not know it. One that is `by_name`, such as `PerKind`, says by
    `network_for(name)` which network runs a parameter; it needs named ones. A `forward` with an argument `inplace` is
    called with `inplace=True` and is to write the next state over the given one, which may be a strided part of a
    larger tensor: that saves a copy of the state. An `MLPOptimizer` of variant "celo" takes
    compiled steps on a CPU where numba is installed, and on CUDA those of all tensors of a group at once, by Triton.

    A step looks at gradients, weights and states before it changes anything, and keeps new states only once all
    networks have run: after an exception parameters and states are as they were. Not so with networks that write
    `inplace`: if the `forward` of one raises (ours does not after these checks, but Ctrl-C may come), states that it
    has written are a step ahead, while all parameters stay; go on from a checkpoint then. The same holds for Ctrl-C
    within a compiled step.

    A parameter without gradient is left alone, and so is its state (in a group's joint vector its gradient is 0). A
    sparse gradient is made dense: rows that are not in it have gradient 0, which a learned optimizer may answer with a
    movement as it does to any other gradient.

    Of parameters that are DTensors, such as those of FSDP2's `fully_shard`, a coordinatewise network whose state has no
    part for all coordinates together runs on each process's part; the state is then of DTensors too, for
    `torch.distributed.checkpoint`. Other networks need all coordinates and are refused. `ZeroRedundancyOptimizer` can
    hold coordinatewise and tensorwise networks.

    `state_dict()` holds tensors and numbers only, so that `torch.load(weights_only=True)` reads it. It does not hold
    the networks: give the same ones when resuming (`save_optimizer` and `load_optimizer` store them). `load_state_dict`
    copies, and keeps this optimizer's networks and state dtype.

    Args:
        params: parameters, named parameters or parameter groups, real and floating-point. A group is a dict with
            "params" and, where they differ from the arguments below, "net", "lr", "weight_decay", "maximize",
            "state_dtype".
        net: the network; None if every group has its own.
        lr: at least 0; a number or a tensor of one element. Factor on the update, default 1, the network's own scale.
            Of a tensorwise network whose `forward` takes `lr` it is the learning rate, default `net.lr`.
        weight_decay: λ ≥ 0. Coupled as in `torch.optim.SGD`: the network reads ∇ + λθ. Of a tensorwise network
            decoupled as in `torch.optim.AdamW`: θ ← (1 - lr · λ) θ, before it reads θ; a decay of its own comes on
            top. Default 0.
        maximize: the network reads -∇. Default False.
        state_dtype: store the state in this floating dtype, `torch.bfloat16` for half the memory; the network still
            computes in its own. Parts with one number per coordinate (moments, step counters) keep their dtype. Not for
            tensorwise networks. Default None: the dtype that `init_state` gives.

    Raises:
        ValueError, TypeError: an argument is not as above.
        NonFiniteError: from `step`, a gradient holds an infinity or a NaN; no parameter and no state has changed.
        ValueError: from `step`, a parameter has another size than when its state began, or a network returns other
            than agreed; nothing has changed.

    Example:
        >>> from optimizers import load_optimizer
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), load_optimizer("mnist"))
        >>> model(torch.ones(2, 3)).pow(2).mean().backward()
        >>> optimizer.step()
        >>> from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
        >>> optimizer = LearnedOptimizer(model.parameters(), start_as_normalized_adam(MLPOptimizer()), lr=0.003)

    Reference: Andrychowicz et al. 2016, section 2.1 ("Coordinatewise LSTM optimizer").
    """

    def __init__(
        self,
        params: Iterable,
        net: nn.Module | None,
        lr: float | torch.Tensor | None = None,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
    ):
        self._networks = {}  # (net, device, dtype or number of coordinates if that matters) -> network
        self._rules = Rules()
        super().__init__(params, dict(zip(OPTIONS, (net, lr, weight_decay, maximize, state_dtype))))

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("_networks", {})
        self.__dict__.setdefault("_rules", Rules())

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does; the same arguments and checks as above."""
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            for index, parameter in enumerate(group["params"]):
                if not parameter.is_floating_point():
                    raise TypeError(
                        f"params must be real floating-point tensors, but {label(group, number, index)} "
                        f"is {parameter.dtype}"
                    )
            if group["lr"] is None:
                group["lr"] = rate_of(group, self._rules)
            for net, members in readers_of(group, self._rules):
                params, where = [group["params"][index] for index in members], label(group, number, members[0])
                network = self._network(net, params)
                check_sharded(network, params, where)
                network.check_group(group, params, where)
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the loss again, gradients included, and returns it. Default None.

        Returns:
            What the closure returned, or None.

        Raises:
            NonFiniteError: a gradient is not finite; nothing has changed.
            ValueError: a state does not fit its parameter, which has another size or device now; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [part for number, group in enumerate(self.param_groups) for part in self._work(group, number)]
        by_network = {}
        for part in work:
            by_network.setdefault(part.network, []).append(part)
        check_step(work, list(by_network))
        for part in work:
            part.prepare(self.state)
        with values_unchecked():  # gradients and weights have been looked at
            for network in sorted(by_network, key=lambda network: network.writes_in_place):  # those come last
                network.advance(by_network[network])
        for part in work:
            part.apply(self.state)
        return loss

    def state_dict(self) -> dict:
        """As `torch.optim.Optimizer.state_dict`, with numbers for the networks and dtypes. The tensors are no copies."""

        def describe(_, packed):
            numbers = {}  # only numbers, but under the keys that a group has: tools flatten a state dict by those
            for group in packed["param_groups"]:
                group["net"] = numbers.setdefault(group["net"], len(numbers))
                group["state_dtype"] = (None, *STATE_DTYPES).index(group["state_dtype"])

        hook = self.register_state_dict_post_hook(describe, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; the networks and the state's dtype stay this optimizer's.

        Args:
            state_dict: from `state_dict` of an optimizer with the same networks; its tensors are copied.

        Raises:
            ValueError: it does not fit the parameters or the networks, or holds infinities or NaNs; nothing has changed.
        """
        groups, state = self.param_groups, {}

        def take(_, saved):  # after the user's own hooks; torch would cast the state to the parameters' dtype
            state.update(self._state_from(saved))
            return {**saved, "state": {}}

        def put(_):  # before the user's own hooks
            for group, before in zip(self.param_groups, groups):
                group.update({name: before[name] for name in OPTIONS if name in UNSAVED or name not in group})
            self.state.update(state)

        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    # Internals --------------------------------------------------------------------------------------------------------

    def _network(self, net, params):
        """The network where these parameters are, for their dtype or number of coordinates if that matters."""
        devices = {parameter.device for parameter in params}
        if len(devices) > 1:
            raise ValueError(
                f"{type(net).__name__} is not coordinatewise, so the parameters of its group must be on "
                f"one device, got {sorted(map(str, devices))}"
            )
        kind, form, rule = VectorNetwork, None, self._rules[net]
        if rule.tensorwise:
            kind, form = TensorNetwork, params[0].dtype
        elif not rule.coordinatewise:
            form = sum(map(local_size, params))
        key = net, *devices, form
        network = self._networks.get(key)
        if network is None or not network.is_current():
            network = self._networks[key] = kind(net, *devices, form)
        return network

    def _work(self, group, number):
        """What this group has to do in a step: what its networks read, as far as there are gradients."""
        lr, networks = float(group["lr"]), {}  # one look at a network's weights for each device and dtype
        together = {}  # network -> members that it steps at once
        for net, members in readers_of(group, self._rules):
            params = [group["params"][index] for index in members]
            if any(parameter.grad is not None for parameter in params):
                key = net, params[0].device, params[0].dtype
                if key not in networks:
                    networks[key] = self._network(net, params)
                if len(members) == 1 and fits_group(networks[key], group, params[0]):
                    together.setdefault(networks[key], []).extend(members)
                else:
                    yield networks[key].work(networks[key], group, number, members, lr)
        for network, members in together.items():
            yield Group(network, group, number, members, lr, self.state)

    def _state_from(self, saved):
        """dict from parameter to a copy of its saved state, which must fit. Empty if the groups differ: torch tells."""
        state, groups = {}, saved["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return state
        for number, (group, keys) in enumerate(zip(self.param_groups, (group["params"] for group in groups))):
            owners = {}
            for net, members in readers_of(group, self._rules):
                apart = [[index] for index in members] if self._rules[net].tensorwise else [members]
                owners |= {own[0]: (net, own) for own in apart}
            for index, key in enumerate(keys):
                leaves = saved["state"].get(key)
                if not leaves:
                    continue
                where = f"the state of {label(group, number, index)}"
                if index not in owners:
                    raise ValueError(f"{where} has no place here: got {sorted(leaves)}, accepted is none")
                net, members = owners[index]
                params = [group["params"][member] for member in members]
                state[params[0]] = self._network(net, params).load_state(leaves, params, group["state_dtype"], where)
        return state


# Parameter groups -----------------------------------------------------------------------------------------------------


def check_options(options):
    """Raise unless a group's options are what `LearnedOptimizer` accepts."""
    net, dtype, lr = options["net"], options["state_dtype"], options["lr"]
    if isinstance(net, str):
        raise TypeError(
            f"net must be a network, not its name: give load_optimizer({net!r}), of `optimizers`; got {net!r}"
        )
    if isinstance(net, type):
        raise TypeError(f"net must be a network, not its class: give {net.__name__}(...); got {net!r}")
    as_rule(net)  # raises unless it is a learned optimizer
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    for name in ("lr", "weight_decay"):
        value = options[name]
        if value is None and name == "lr":
            continue
        if isinstance(value, bool) or not isinstance(value, (Real, torch.Tensor) if name == "lr" else Real):
            raise TypeError(f"{name} must be a number of at least 0, got {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    if not isinstance(options["maximize"], bool):
        raise TypeError(f"maximize must be True or False, got {options['maximize']!r}")
    if dtype is not None and dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be None or one of {STATE_DTYPES}, got {dtype!r}")
    for name in UNSUPPORTED:
        if options.get(name):
            raise ValueError(f"{name}={options[name]!r} is an option that LearnedOptimizer does not have")


class Rules(dict):
    """The contracts of networks, each made at the first look: for a user's own module that takes some time."""

    def __missing__(self, net):
        self[net] = rule = as_rule(net)
        return rule


def readers_of(group, rules):
    """Which network reads which parameters: pairs of a network and a list of places in the group.

    A pair stands for one vector or, if the network is tensorwise, for tensors alike in device and dtype. Parameters without
    coordinates are left out, except of a vector that has some.
    """
    readers, places_of, params = [], {}, group["params"]
    sizes = list(map(torch.numel, params))
    for index in range(len(sizes)):
        places_of.setdefault(network_of(group, index, rules), []).append(index)
    for net, places in places_of.items():
        if rules[net].coordinatewise:
            readers += [(net, [index]) for index in places if sizes[index]]
        elif rules[net].tensorwise:
            alike = {}
            for index in places:
                if sizes[index]:
                    alike.setdefault((params[index].device, params[index].dtype), []).append(index)
            readers += [(net, members) for members in alike.values()]
        elif any(sizes[index] for index in places):
            readers.append((net, places))
    return readers


def network_of(group, index, rules):
    """The network that runs a parameter of the group."""
    net = group["net"]
    if not rules[net].by_name:
        return net
    if "param_names" not in group:
        raise ValueError(
            f"{type(net).__name__} tells parameters apart by their names: params must be named, such as "
            "model.named_parameters()"
        )
    return net.network_for(group["param_names"][index])


def rate_of(group, rules):
    """The rate of a group that is given none: its networks' own."""
    nets = {network_of(group, index, rules) for index in range(len(group["params"]))} or {group["net"]}
    rates = {own_rate(net) if rules[net].tensorwise else 1.0 for net in nets}
    if len(rates) > 1:
        raise ValueError(f"lr must be given: the networks of the group have rates of their own, {sorted(rates)}")
    return rates.pop()


def check_step(work, networks):
    """Raise NonFiniteError unless all gradients are finite, and renew networks whose weights have changed.

    One synchronization for each device that is not a CPU, one for each mesh of processes.
    """
    flags, finite, meshes, unchanged = {}, True, [], {}
    groups = [part for part in work if part.looks]
    networks = [network for network in networks if not any(watches(part, network) for part in groups)]
    for part in work:
        meshes += [mesh for mesh in part.meshes if mesh not in meshes]
        for gradient in part.gradients if not part.looks else ():
            if gradient.is_cpu:
                finite = finite and sum_is_finite(gradient)
            else:
                flags.setdefault(gradient.device, []).append(gradient)
    for network in networks:
        flag = network.unchanged()
        if isinstance(flag, torch.Tensor):  # read with the others
            unchanged.setdefault(flag.device, []).append((network, flag))
        elif not flag:
            network.renew()
    for device in {**flags, **unchanged}:
        own = [torch.isfinite(get_total_norm(flags[device], math.inf))] if device in flags else []
        own = torch.stack([*own, *(flag for _, flag in unchanged.get(device, []))])
        read = [True] * len(own) if own.all().item() else own.tolist()
        finite = finite and (device not in flags or read.pop(0))
        for (network, _), same_weights in zip(unchanged.get(device, []), read):
            if not same_weights:
                network.renew()
    finite = not (groups and not look_at_groups(groups)) and finite
    error = None
    if not finite:
        try:
            for part in work:
                for place, gradient in enumerate(part.gradients):
                    check_finite(gradient, f"the gradient of {part.label(place)}")
        except NonFiniteError as found:
            error = found
    for mesh in meshes:  # all processes stop, or none: one alone would leave the others waiting
        if not true_everywhere(error is None, mesh):
            error = error or NonFiniteError(
                "a gradient must be finite, but another process found that its part of one is not"
            )
    if error:
        raise error


def watches(group, network):
    """Whether the group's kernels look at this network's weights."""
    return group.network is network and network.kept_vector is not None


def look_at_groups(groups):
    """Whether all their gradients are finite; networks whose weights have changed are renewed. One wait."""
    flags = [group.look() for group in groups]
    read, finite = (flags[0] if len(flags) == 1 else torch.cat(flags)).tolist(), True
    for group, bad, changed in zip(groups, read[::2], read[1::2]):
        if bad:
            group.steps.lower()
            finite = False
        elif changed:
            group.renew()
    return finite
