"""`LearnedOptimizer`: a trained learned optimizer with the face of `torch.optim`.

θ ← θ + lr · g with (g, h) ← m(∇, h; φ), the update rule of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1),
for any network m with `init_state(num_coordinates)` and `forward(grad, state) -> (update, state)`. The network is used,
never trained (that is `meta_training`). The state is most of the memory, 2·layers·hidden numbers for each coordinate
of an LSTM, so it is kept per parameter and renewed in place, a chunk of coordinates at a time.
"""

import copy
import inspect
import math
import sys
from contextlib import nullcontext
from functools import partial, reduce
from numbers import Real
from typing import NamedTuple

import torch
from torch import nn

from gradbuffer.checks import NonFiniteError, check_finite, sum_is_finite, values_unchecked
from gradbuffer.snapshots import Snapshot
from gradbuffer.contracts import as_rule
from gradbuffer.nests import fill_leaves, map_tensors, named_leaves

__all__ = ["LearnedOptimizer"]

# Coordinates that a coordinatewise network gets at once, at most: more where it writes over what is stored, without copies.
CHUNK = {"cpu": 1 << 14, "cpu, in place": 1 << 18, "elsewhere": 1 << 18}
OPTIONS = ("net", "lr", "weight_decay", "maximize", "state_dtype")
SMALL = 2048  # coordinates of a parameter up to which it runs together with others: a call costs as much as some 1,000
UNSAVED = ("net", "state_dtype")  # options of a group that belong to the program: `load_state_dict` leaves them
UNSUPPORTED = ("foreach", "fused", "capturable", "differentiable", "momentum", "betas")  # options of torch's optimizers
STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LearnedOptimizer(torch.optim.Optimizer):
    """A trained learned optimizer as a `torch.optim.Optimizer`, with all that goes with one.

    Gradients are cast to the network's dtype, updates added in the parameter's. A network with `coordinatewise = True`
    runs parameter by parameter, each with a state of its own in `self.state[parameter]`; any other sees all parameters
    of its group as one vector, whose state lies with the group's first parameter. A network on another device is
    copied to where the parameters are, and again when its weights change; it is not trained, and no graph is recorded.
    A network with `network_for(name)`, such as `PerKind`, says which network runs a parameter; it needs named ones.
    A `forward` with an argument `inplace` is called with `inplace=True` and is to write the next state over the given
    one, which may be a strided part of a larger tensor: that saves a copy of the state.

    A step looks at gradients, weights and states before it changes anything, and keeps new states only once all networks
    have run: after an exception parameters and states are as they were. Not so with networks that write `inplace`: if the
    `forward` of one raises (ours does not after these checks, but Ctrl-C may come), states that it has written are a step
    ahead, while all parameters stay; go on from a checkpoint then.

    A parameter without gradient is left alone, and so is its state (in a group's joint vector its gradient is 0). A
    sparse gradient is made dense: rows that are not in it have gradient 0, which a learned optimizer may answer with a
    movement as it does to any other gradient.

    Of parameters that are DTensors, such as those of FSDP2's `fully_shard`, a coordinatewise network whose state has no part
    for all coordinates together runs on each process's part; the state is then of DTensors too, for
    `torch.distributed.checkpoint`. `ZeroRedundancyOptimizer` can hold coordinatewise networks. Other networks need all
    coordinates, and are refused in both.

    `state_dict()` holds tensors and numbers only, so that `torch.load(weights_only=True)` reads it. It does not hold
    the networks: give the same ones when resuming (`save_optimizer` and `load_optimizer` store them).
    `load_state_dict` copies, and keeps this optimizer's networks and state dtype.

    Args:
        params: parameters, named parameters or parameter groups, real and floating-point. A group is a dict with
            "params" and, where they differ from the arguments below, "net", "lr", "weight_decay", "maximize",
            "state_dtype".
        net: the network; None if every group has its own.
        lr: factor on the update, at least 0; a number or a tensor of one element. Default 1, the network's own scale.
        weight_decay: λ ≥ 0, coupled as in `torch.optim.SGD`: the network reads ∇ + λθ. Default 0.
        maximize: the network reads -∇. Default False.
        state_dtype: store the state in this floating dtype, `torch.bfloat16` for half the memory; the network still
            computes in its own. Parts with one number per coordinate (moments, step counters) keep their dtype.
            Default None: the dtype that `init_state` gives.

    Raises:
        ValueError, TypeError: an argument is not as above.
        NonFiniteError: from `step`, a gradient holds an infinity or a NaN; no parameter and no state has changed.
        ValueError: from `step`, a parameter has another size than when its state began; nothing has changed.

    Example:
        >>> from optimizers import load_optimizer
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), load_optimizer("mnist"))
        >>> model(torch.ones(2, 3)).pow(2).mean().backward()
        >>> optimizer.step()

    Reference: Andrychowicz et al. 2016, section 2.1 ("Coordinatewise LSTM optimizer").
    """

    def __init__(self, params, net, lr=1.0, weight_decay=0.0, *, maximize=False, state_dtype=None):
        self._networks = {}  # (net, device, number of coordinates if it matters) -> Network
        super().__init__(params, dict(zip(OPTIONS, (net, lr, weight_decay, maximize, state_dtype))))

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("_networks", {})

    def add_param_group(self, param_group):
        """Add a group, as `torch.optim.Optimizer.add_param_group` does; the same arguments and checks as above."""
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            for index, parameter in enumerate(group["params"]):
                if not parameter.is_floating_point():
                    raise TypeError(f"params must be real floating-point tensors, but {label(group, number, index)} "
                                    f"is {parameter.dtype}")
            for net, members in vectors_of(group):
                params, where = [group["params"][index] for index in members], label(group, number, members[0])
                check_sharded(net, self._network(net, params), params, where)
                if not is_coordinatewise(net):
                    check_not_divided(net, where)
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
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
        work = [vector for number, group in enumerate(self.param_groups) for vector in self._vectors(group, number)]
        by_network = {}
        for vector in work:
            by_network.setdefault(vector.network, []).append(vector)
        check_step(work, list(by_network))
        for vector in work:
            vector.prepare(self.state)
        with values_unchecked():  # gradients and weights have been looked at
            for network in sorted(by_network, key=lambda network: bool(network.options)):  # those in place come last
                network.advance(by_network[network])
        for vector in work:
            vector.apply(self.state)
        return loss

    def state_dict(self):
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

    def load_state_dict(self, state_dict):
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

        hooks = [self.register_load_state_dict_pre_hook(take),
                 self.register_load_state_dict_post_hook(put, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    # How it is done ---------------------------------------------------------------------------------------------------

    def _network(self, net, params):
        """The network where these parameters are, for as many coordinates as they have."""
        size, devices = sum(map(local_size, params)), {parameter.device for parameter in params}
        if len(devices) > 1:
            raise ValueError(f"{type(net).__name__} is not coordinatewise, so the parameters of its group must be on "
                             f"one device, got {sorted(map(str, devices))}")
        key = net, *devices, None if is_coordinatewise(net) else size
        network = self._networks.get(key)
        if network is None or network.place != place_of(net):
            network = self._networks[key] = Network(net, *devices, size)
        return network

    def _vectors(self, group, number):
        """What this group has to do in a step: the vectors with at least one gradient."""
        lr, networks = float(group["lr"]), {}  # one look at a network's weights for each device
        for net, members in vectors_of(group):
            params = [group["params"][index] for index in members]
            if any(parameter.grad is not None for parameter in params):
                key = net, params[0].device
                if key not in networks:
                    networks[key] = self._network(net, params)
                yield Vector(params, group, networks[key], lr,
                             lambda place, members=members: label(group, number, members[place]))

    def _state_from(self, saved):
        """dict from parameter to a copy of its saved state, which must fit. Empty if the groups differ: torch tells."""
        state, groups = {}, saved["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return state
        for number, (group, keys) in enumerate(zip(self.param_groups, (group["params"] for group in groups))):
            owners = {members[0]: (net, members) for net, members in vectors_of(group)}
            for index, key in enumerate(keys):
                leaves = saved["state"].get(key)
                if not leaves:
                    continue
                where = f"the state of {label(group, number, index)}"
                if index not in owners:
                    raise ValueError(f"{where} has no place here: got {sorted(leaves)}, accepted is none")
                net, members = owners[index]
                params = [group["params"][member] for member in members]
                network = self._network(net, params)
                state[params[0]] = network.fitting(leaves, params, group["state_dtype"], where)
        return state


# Parameter groups -----------------------------------------------------------------------------------------------------


def check_options(options):
    """Raise unless a group's options are what `LearnedOptimizer` accepts."""
    net, dtype, lr = options["net"], options["state_dtype"], options["lr"]
    if isinstance(net, str):
        raise TypeError(f"net must be a network, not its name: give load_optimizer({net!r}), of `optimizers`; got {net!r}")
    if isinstance(net, type):
        raise TypeError(f"net must be a network, not its class: give {net.__name__}(...); got {net!r}")
    if not isinstance(net, nn.Module) or not callable(getattr(net, "init_state", None)):
        raise TypeError(f"net must be a learned optimizer, an nn.Module with init_state, got {type(net).__name__}")
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    for name in ("lr", "weight_decay"):
        value = options[name]
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


def is_coordinatewise(net):
    return bool(getattr(net, "coordinatewise", False))


def vectors_of(group):
    """Which network reads which parameters as one vector: pairs of a network and a list of places in the group."""
    vectors, places_of, sizes = [], {}, list(map(torch.numel, group["params"]))
    for index in range(len(sizes)):
        places_of.setdefault(network_of(group, index), []).append(index)
    for net, places in places_of.items():
        if is_coordinatewise(net):
            vectors += [(net, [index]) for index in places if sizes[index]]
        elif any(sizes[index] for index in places):
            vectors.append((net, places))
    return vectors


def network_of(group, index):
    """The network that runs a parameter of the group."""
    net = group["net"]
    if not as_rule(net).by_name:
        return net
    if "param_names" not in group:
        raise ValueError(f"{type(net).__name__} tells parameters apart by their names: params must be named, such as "
                         "model.named_parameters()")
    return net.network_for(group["param_names"][index])


def label(group, number, index):
    name = f" ({group['param_names'][index]})" if "param_names" in group else ""
    return f"parameter {index}{name} of group {number}"


def check_step(vectors, networks):
    """Raise NonFiniteError unless all gradients are finite, and renew networks whose weights have changed.

    One synchronization for each device that is not a CPU, one for each mesh of processes.
    """
    flags, finite, meshes, unchanged = {}, True, [], {}
    for vector in vectors:
        meshes += [mesh for mesh in vector.meshes if mesh not in meshes]
        for gradient in vector.gradients:
            if gradient.is_cpu:
                finite = finite and sum_is_finite(gradient)
            else:
                flags.setdefault(gradient.device, []).append(torch.isfinite(gradient).all())
    for network in networks:
        flag = network.unchanged()
        if isinstance(flag, torch.Tensor):  # read with the others
            unchanged.setdefault(flag.device, []).append((network, flag))
        elif not flag:
            network.renew()
    for device in {**flags, **unchanged}:
        own = flags.get(device, [])
        read = torch.stack([*own, *(flag for _, flag in unchanged.get(device, []))]).tolist()
        finite = finite and all(read[:len(own)])
        for (network, _), same_weights in zip(unchanged.get(device, []), read[len(own):]):
            if not same_weights:
                network.renew()
    error = None
    if not finite:
        try:
            for vector in vectors:
                for place, gradient in enumerate(vector.gradients):
                    check_finite(gradient, f"the gradient of {vector.label(place)}")
        except NonFiniteError as found:
            error = found
    for mesh in meshes:  # all processes stop, or none: one alone would leave the others waiting
        if not true_everywhere(error is None, mesh):
            error = error or NonFiniteError("a gradient must be finite, but another process found that its part of one is not")
    if error:
        raise error


class Vector:
    """Parameters that a network reads as one vector in one step: their gradients, their state, their update."""

    def __init__(self, params, group, network, lr, label):
        self.params, self.network, self.lr, self.label = params, network, lr, label
        self.state_dtype, self.net_name = group["state_dtype"], type(network.net).__name__
        self.gradients = [flat_gradient(parameter, group, network.dtype or params[0].dtype) for parameter in params]
        self.meshes = [params[0].device_mesh] if is_sharded(params[0]) else []

    def prepare(self, states):
        """Find the state, or begin one; nothing of the optimizer's is changed."""
        self.grad = joined(self.gradients)
        self.size, self.update = len(self.grad), torch.empty_like(self.grad)
        self.later = []  # functions that write what a network gave back over its state, once all networks have run
        stored = states.get(self.params[0])
        self.is_new = not stored
        if self.is_new:
            self.state = self.network.new_state(self.size, self.state_dtype)
        else:
            self.state = {name: from_sharded(leaf, self.params[0]) for name, leaf in stored.items()} if self.meshes else stored
            self.network.check_state(self)

    def apply(self, states):
        """Keep the new state, and θ ← θ + lr · update, where there is a gradient."""
        for write in self.later:
            write()
        if self.is_new:
            states[self.params[0]] = {name: as_sharded(leaf, self.params[0]) for name, leaf in self.state.items()} \
                if self.meshes else self.state
        for parameter, update in zip(self.params, cut(self.update, map(local_size, self.params))):
            if parameter.grad is not None:
                place = local(parameter)
                place.add_(update.view(place.shape), alpha=self.lr)


def flat_gradient(parameter, group, dtype):
    """(n,), what the network is to read for this parameter, in its dtype. May share memory with `.grad`."""
    if parameter.grad is None:
        return torch.zeros(local_size(parameter), dtype=dtype, device=parameter.device)
    gradient = parameter.grad.detach()
    if is_sharded(gradient):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements).to_local()
    gradient = gradient.to(dtype)
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if group["maximize"]:
        gradient = -gradient
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


# Parameters of which each process has a part: DTensors, as of FSDP2's `fully_shard` -----------------------------------


def is_sharded(tensor):
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there are none
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor):
    """This process's part of the tensor, the same memory; a tensor that is not sharded as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_size(tensor):
    return local(tensor).numel()


def placements_of_state(parameter, lead):
    """Where the parts of a state (*lead, *parameter.shape) lie: each with its coordinates."""
    from torch.distributed.tensor import Shard

    return tuple(Shard(place.dim + lead) if type(place) is Shard else place for place in parameter.placements)


def as_sharded(leaf, parameter):
    """(*lead, n), of this process's n coordinates -> DTensor (*lead, *parameter.shape) of the same memory.

    In this form `torch.distributed.checkpoint` can write it, and read it with another number of processes.
    """
    from torch.distributed.tensor import DTensor

    lead = leaf.shape[:-1]
    shape = torch.Size([*lead, *parameter.shape])
    return DTensor.from_local(leaf.view(*lead, *local(parameter).shape), parameter.device_mesh,
                              placements_of_state(parameter, len(lead)), run_check=False, shape=shape,
                              stride=torch.empty(shape, device="meta").stride())


def from_sharded(leaf, parameter):
    """The opposite of `as_sharded`, the same memory."""
    leaf, axes = local(leaf), parameter.dim()
    return leaf.flatten(leaf.dim() - axes) if axes else leaf[..., None]


def check_sharded(net, network, params, where):
    """Raise unless the network can run on the parts of a sharded parameter, or there is none."""
    if not any(map(is_sharded, params)):
        return
    if not network.joins:
        raise ValueError(f"{where} is a DTensor, of which each process has a part: its network must be coordinatewise, with a "
                         f"state that is all per coordinate; got {type(net).__name__}")
    from torch.distributed.tensor import Replicate, Shard

    if not all(type(place) in (Shard, Replicate) for place in params[0].placements):
        raise ValueError(f"{where} must be placed by Shard or Replicate, got {params[0].placements}")


def true_everywhere(value, mesh):
    """Whether it is true in all processes of a device mesh."""
    flag = torch.tensor(float(value), device=mesh.device_type)
    for group in mesh.get_all_groups():
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
    return bool(flag)


def check_not_divided(net, where):
    """Raise within a ZeroRedundancyOptimizer: it gives each process an optimizer of some of the parameters only."""
    module, frame = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer"), sys._getframe(1)
    while module and frame:
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer) and caller.world_size > 1:
            raise ValueError(f"{type(net).__name__}, the network of {where}, is not coordinatewise, and ZeroRedundancyOptimizer "
                             "would show it in each process a part of the parameters only: its updates would be others. Accepted "
                             "are coordinatewise networks")
        frame = frame.f_back


# The network and its state --------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One leaf of the state, as the network has it."""

    lead: tuple  # the shape before the axis of coordinates; all of the shape if there is no such axis
    dtype: object  # None for a Python number
    along: bool  # the last axis is that of the coordinates
    finite: bool  # at the start it holds neither infinities nor NaNs, so it never should

    def shape(self, size):
        return (*self.lead, size) if self.along else self.lead

    def stored_dtype(self, size, state_dtype):
        vectors = self.dtype.is_floating_point and math.prod(self.shape(size)) > size
        return state_dtype if state_dtype and vectors else self.dtype


class Network:
    """A learned optimizer's network on one device, and of what parts its state is.

    The state is stored flat, as a dict from the leaf's name to a tensor (..., n) or a number, which is what
    `torch.optim.Optimizer` and `torch.load(weights_only=True)` handle.
    """

    def __init__(self, net, device, size):
        self.source, self.device, self.place = net, device, place_of(net)
        self.is_copy = any(tensor.device != device for tensor in tensors_of(net))
        self.renew()
        self.options = {"inplace": True} if "inplace" in inspect.signature(net.forward).parameters else {}
        self.most = {in_place: self.at_once(in_place) for in_place in (False, True)}
        with device, torch.inference_mode(False):  # whatever the caller's default device and mode
            nests = [self.net.init_state(n) for n in ((2, 3) if is_coordinatewise(net) else (size,))]
        self.parts = parts_of(nests, type(net).__name__)
        self.nest = map_tensors(lambda leaf: leaf.new_empty(0), nests[0])
        self.joins = is_coordinatewise(net) and all(part.along for part in self.parts.values())
        kinds = [tensor.dtype for tensor in tensors_of(net)], [part.dtype for part in self.parts.values() if part.dtype]
        weights, state = ([kind for kind in some if kind.is_floating_point] for some in kinds)
        self.dtype = weights[0] if weights else reduce(torch.promote_types, state) if state else None

    def unchanged(self):
        """Whether the weights are those of the last `renew`: a bool, or a tensor on their device.

        On the network's own CPU always True: there it runs as it is, and what it keeps of its weights it looks after itself.
        """
        return self.kept is None or self.kept.compare(tensors_of(self.source))

    def renew(self):
        """Take the weights as they are now."""
        watched = self.is_copy or self.device.type != "cpu"
        self.kept = Snapshot(tensors_of(self.source)) if watched else None
        if self.is_copy:
            with torch.inference_mode(False):
                self.net = copy.deepcopy(self.source).to(self.device)
            return
        self.net = self.source
        for module in self.net.modules():
            if hasattr(module, "repack"):  # a network does not look itself where it would have to wait
                module.repack()

    def at_once(self, in_place):
        """Coordinates that the network gets at most; in_place: it writes over what is stored."""
        if not is_coordinatewise(self.net):
            return math.inf
        kind = self.device.type + ", in place" * in_place
        return CHUNK[kind if kind in CHUNK else "elsewhere"]

    def in_place(self, vector):
        """Whether it writes over this vector's state as that is stored."""
        return bool(self.options) and all(self.dtype_of(name, vector.state[name]) == vector.state[name].dtype
                                          for name, part in self.parts.items() if part.dtype)

    def dtype_of(self, name, stored):
        """In which dtype the network is given a part that is stored so: in its own, or as it is."""
        kind, renews = self.parts[name].dtype, getattr(self.net, "renews", None)
        return stored.dtype if self.options and renews and stored.dtype != kind and renews(stored.dtype) else kind

    def chunks(self, size, in_place=False):
        most = min(self.most[in_place], max(size, 1))
        return [(a, min(a + most, size)) for a in range(0, size, most)]

    def new_state(self, size, state_dtype):
        """The state before the first step, for a vector of that size."""
        with self.device, torch.inference_mode(False):
            state = {name: torch.empty(part.shape(size), dtype=part.stored_dtype(size, state_dtype))
                     for name, part in self.parts.items() if part.dtype}
            for start, stop in self.chunks(size):
                for name, leaf in named_leaves(self.net.init_state(stop - start)).items():
                    if self.parts[name].dtype is None:
                        state[name] = leaf
                    else:
                        (state[name][..., start:stop] if self.parts[name].along else state[name]).copy_(leaf)
        return {name: state[name] for name in self.parts}

    def check_state(self, vector):
        """Raise ValueError unless a vector's state is this network's, for so many coordinates."""
        if vector.state.keys() != self.parts.keys():
            raise ValueError(f"the state of {vector.label(0)} has the parts {list(vector.state)}, which are not those of "
                             f"{vector.net_name}: {list(self.parts)}")
        size = vector.size
        for name, part in self.parts.items():
            leaf = vector.state[name]
            if part.dtype and (leaf.shape[-1] != size if part.along else leaf.shape != part.lead):
                raise ValueError(f"{vector.label(0)} must keep the size that it had when its state began: it has {size} coordinates "
                                 f"now, and {name} of its state has shape {tuple(leaf.shape)} instead of {part.shape(size)}; make "
                                 "a new optimizer for it")
            if part.dtype and leaf.device != self.device:
                raise ValueError(f"{vector.label(0)} is on {self.device}, its state on {leaf.device}: load the optimizer's "
                                 "state_dict() after moving a model")

    def fitting(self, leaves, params, state_dtype, where):
        """A copy of the saved leaves of these parameters' state, on this device; ValueError if they are not this network's."""
        size, sharded, own = sum(map(local_size, params)), is_sharded(params[0]), params[0].shape if len(params) == 1 else None
        expected = {name: (*part.lead, *own) if part.dtype and sharded else part.shape(size) if part.dtype else "a number"
                    for name, part in self.parts.items()}
        found = {name: tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else "a number"
                 for name, leaf in leaves.items()}
        if own is not None and not sharded:  # what was sharded and now is whole has the parameter's axes
            found = {name: expected[name] if name in expected and self.parts[name].along
                     and shape == (*self.parts[name].lead, *own) else shape for name, shape in found.items()}
        if found != expected:
            raise ValueError(f"{where} must have the parts {expected}, got {found}")
        state = {}
        for name, part in self.parts.items():
            leaf = leaves[name]
            if part.dtype:
                if is_sharded(leaf) != sharded or sharded and (leaf.device_mesh, leaf.placements) != (
                        params[0].device_mesh, placements_of_state(params[0], len(part.lead))):
                    raise ValueError(f"{name} of {where} must be divided among processes as the parameter is, "
                                     f"got {getattr(leaf, 'placements', 'a whole tensor')}")
                leaf = leaf.detach() if sharded else leaf.detach().reshape(part.shape(size))
            if part.finite and not is_finite(local(leaf)):
                raise ValueError(f"{name} of {where} must be finite, but holds infinities or NaNs")
            with torch.inference_mode(False):
                state[name] = leaf.to(self.device, part.stored_dtype(size, state_dtype), copy=True) if part.dtype else leaf
        return state

    def advance(self, vectors):
        """One step: fills the vectors' updates and renews their states. Small vectors run together, large ones cut."""
        batch, size = [], 0
        for vector in vectors:
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

    def run(self, spans):
        """One call of the network for spans (vector, start, stop) of coordinates."""
        sizes, kind = [stop - start for _, start, stop in spans], self.device.type
        grad = joined([vector.grad[start:stop] for vector, start, stop in spans])
        places = {name: [vector.state[name][..., start:stop] if part.along else vector.state[name]
                         for vector, start, stop in spans] for name, part in self.parts.items()}
        given = {name: self.to_compute(name, places[name], spans) for name in self.parts}
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            update, state = self.net(grad, fill_leaves(self.nest, given), **self.options)
        leaves = self.checked(update, named_leaves(state), grad, given)
        for (vector, start, stop), piece in zip(spans, cut(update, sizes)):
            vector.update[start:stop] = piece
        self.store(spans, places, given, leaves)

    def store(self, spans, places, given, leaves):
        """Write the new state over the old: at once if the network writes in place, else when all networks have run."""
        old = {place.untyped_storage().data_ptr() for name, part in self.parts.items() if part.dtype
               for place in places[name]}
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

    def write(self, vector, place, piece):
        if self.options:
            place.copy_(piece)
        else:
            vector.later.append(partial(place.copy_, piece.to(place.dtype)))

    def to_compute(self, name, places, spans):
        """A part of the state as the network is to get it: the stored memory itself wherever that is possible."""
        part = self.parts[name]
        if part.dtype is None:
            return places[0]
        if part.along:
            leaf = joined(places).to(self.dtype_of(name, places[0]))
            return leaf if self.options else leaf.contiguous()  # a user's network may rely on it
        return places[0].to(part.dtype, copy=spans[0][2] - spans[0][1] < spans[0][0].size)

    def checked(self, update, leaves, grad, given):
        """The new state's leaves, or ValueError if the network did not return what was agreed."""
        if not isinstance(update, torch.Tensor) or update.shape != grad.shape:
            got = tuple(update.shape) if isinstance(update, torch.Tensor) else type(update).__name__
            raise ValueError(f"{type(self.net).__name__} must return an update {tuple(grad.shape)}, got {got}")
        shapes, expected = ({name: getattr(leaf, "shape", None) for name, leaf in parts.items()}
                            for parts in (leaves, given))
        if shapes != expected:
            raise ValueError(f"{type(self.net).__name__} must return a state like the one it got, {expected}; "
                             f"got {shapes}")
        return leaves


def same(a, b):
    """Whether two tensors are one and the same memory."""
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def tensors_of(net):
    return [*net.parameters(), *net.buffers()]


def place_of(net):
    """Device and dtype of a network's first tensor, or None: they change where a network moves as a whole."""
    tensor = next(net.parameters(), None)
    if tensor is None:
        tensor = next(net.buffers(), None)
    return None if tensor is None else (tensor.device, tensor.dtype)


def is_finite(leaf):
    if not isinstance(leaf, torch.Tensor):
        return math.isfinite(leaf)
    return leaf.is_meta or bool(torch.isfinite(leaf).all())


def parts_of(nests, net_name):
    """The parts of a state, from `init_state` of two and of three coordinates; or from one nest, taken as it is."""
    parts = {}
    for name, leaf in named_leaves(nests[0]).items():
        twin = named_leaves(nests[-1])[name]
        if isinstance(leaf, torch.Tensor) and leaf.dim() and len(nests) == 2 and leaf.shape != twin.shape:
            lead, last = tuple(leaf.shape[:-1]), (leaf.shape[-1], twin.shape[-1])
            if last != (2, 3) or twin.shape[:-1] != leaf.shape[:-1]:
                raise ValueError(f"{name} of {net_name} must have the coordinates as its last axis (coordinatewise is "
                                 f"True), got {tuple(leaf.shape)} for 2 coordinates and {tuple(twin.shape)} for 3")
            parts[name] = Part(lead, leaf.dtype, True, is_finite(leaf))
        elif isinstance(leaf, torch.Tensor):
            parts[name] = Part(tuple(leaf.shape), leaf.dtype, False, is_finite(leaf))
        elif isinstance(leaf, (int, float)):
            parts[name] = Part((), None, False, is_finite(leaf))
        else:
            raise TypeError(f"{name} of {net_name} must be a tensor or a number, got {type(leaf).__name__}")
    return parts
