"""A learned optimizer that is several: one for each kind of parameter.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 3.3, train two LSTMs for convolutional networks, one for the
parameters of convolutions and one for those of fully connected layers. What a learned optimizer gets is one vector of
coordinates without names, so one that treats parameters by their names has two methods more:

- `bind(coordinates)`, of an `unrolling.Coordinates`, gives the network for parameters that lie like that, with the very
  same weights: an `nn.Module` with `init_state` and `forward`. `meta_gradient`, `meta_train` and `evaluate` call it.
- `network_for(name)` gives the network that a parameter of that name is run by. `LearnedOptimizer` calls it.
"""

import copy
from fnmatch import fnmatchcase

import torch
from torch import nn

from gradbuffer.checks import name_of
from gradbuffer.contracts import Rule, as_rule, is_learned
from gradbuffer.nests import tensors_in
from gradbuffer.unrolling import Coordinates

__all__ = ["PerKind"]


class PerKind(Rule, nn.Module):
    """Several learned optimizers, each for one kind of parameter.

    It is trained as one: a meta-gradient has a part for each network, and all of them see the same functions. In the
    state each kind has a state of its own, a dict from kind to what that network's `init_state` gives.

    Meta-gradients by "replay" (first and second order), "autograd" and "pes" work as with one network;
    `replay_fraction` and `adjoint_bound`, which need `coordinatewise = True`, do not.

    Args:
        networks: dict from kind to learned optimizer; they share no weights.
        rule: from a parameter's name to its kind. A dict from pattern (as in `fnmatch`) to kind, in which the first
            pattern that fits counts; or a function. Default: a kind is what the names of its parameters begin with,
            such as "conv" and "fc" of `CIFAR10Net`.

    Raises:
        ValueError, TypeError: an argument is not as above; from `bind` and `network_for`, a name has no kind.

    Example:
        >>> from optimizees import CIFAR10Net; from optimizers import CoordinatewiseLSTM
        >>> from gradbuffer.data.cifar10 import generated_images; from meta_training import evaluate
        >>> net = PerKind({kind: CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1)
        ...                for kind in ("conv", "fc")})
        >>> problem = CIFAR10Net(batch_size=8, channels=(4,), root=generated_images(100, 20, side=8))
        >>> evaluate(net, problem, steps=3, num_functions=2).shape
        torch.Size([2, 3])

    Reference: Andrychowicz et al. 2016, section 3.3.
    """

    by_name = True

    def __init__(self, networks, rule=None):
        super().__init__()
        if not isinstance(networks, dict) or not networks:
            raise TypeError(f"networks must be a dict from kind to learned optimizer, got {networks!r}")
        for kind, net in networks.items():
            if not isinstance(kind, str):
                raise TypeError(f"kinds must be text, got {kind!r}")
            if not is_learned(net):
                raise TypeError(
                    f"networks[{kind!r}] must be a learned optimizer, an nn.Module with init_state, got "
                    f"{type(net).__name__}"
                )
            own = as_rule(net)
            if own.tensorwise or own.reads or own.bind.__func__ is not Rule.bind:
                raise TypeError(f"networks[{kind!r}] is a {type(net).__name__}, which can't be one of several")
        tensors = [id(parameter) for net in networks.values() for parameter in net.parameters()]
        if len(set(map(id, networks.values()))) < len(networks) or len(set(tensors)) < len(tensors):
            raise ValueError("networks must share no weights; give one kind to all parameters that share a network")
        rule = {f"{kind}*": kind for kind in networks} if rule is None else rule
        if not callable(rule) and not isinstance(rule, dict):
            raise TypeError(f"rule must be a dict from pattern to kind or a function of a name, got {rule!r}")
        unknown = sorted({str(kind) for kind in rule.values()} - set(networks)) if isinstance(rule, dict) else []
        if unknown:
            raise ValueError(f"rule names the kinds {unknown}; there are {list(networks)}")
        try:
            self.networks = nn.ModuleDict(networks)
        except KeyError as error:
            raise ValueError(f"a kind must be a name that nn.ModuleDict takes: {error}") from error
        self.rule, self.layout = rule, None

    @property
    def config(self):
        """What rebuilds this network, weights apart: for each kind class and config, and the rule."""
        networks = {kind: [type(net).__name__, self.rules[kind].config] for kind, net in self.networks.items()}
        rule = name_of(self.rule)  # of a function, its name
        return {"networks": networks, "rule": self.rule if isinstance(self.rule, dict) else rule}

    def kind_of(self, name):
        """The kind of the parameter of that name."""
        if callable(self.rule):
            kind = self.rule(name)
        else:
            kind = next((kind for pattern, kind in self.rule.items() if fnmatchcase(name, pattern)), None)
        if kind not in self.networks:
            raise ValueError(
                f"rule must give every parameter one of the kinds {list(self.networks)}, got {kind!r} for {name!r}"
            )
        return kind

    def network_for(self, name):
        """The network that runs the parameter of that name."""
        return self.networks[self.kind_of(name)]

    def bind(self, coordinates):
        """This optimizer for parameters that lie in the vector as `coordinates` says: the same networks and weights.

        Args:
            coordinates: `unrolling.Coordinates`.

        Returns:
            `PerKind`, with `init_state`, `forward`, `replay` and `pull_back` for just that many coordinates.
        """
        if not isinstance(coordinates, Coordinates):
            raise TypeError(f"coordinates must be unrolling.Coordinates, got {type(coordinates).__name__}")
        bound = copy.copy(self)  # the modules in it are the same ones
        bound.layout = [(self.kind_of(name), size) for name, size in zip(coordinates.shapes, coordinates.sizes)]
        return bound

    def init_state(self, num_coordinates, device=None, dtype=None):
        """The state before the first step, see `LSTMOptimizer.init_state`: a dict from kind, of those there are."""
        self._check(num_coordinates)
        options = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
        return {
            kind: self.networks[kind].init_state(sum(size for own, size in self.layout if own == kind), **options)
            for kind in self._kinds()
        }

    def forward(self, grad, state):
        """One step of every network on its own coordinates. Returns update (N,) and the next state."""
        self._check(grad.shape[-1])
        updates, after = {}, {}
        for kind, own in self._split(grad).items():
            updates[kind], after[kind] = self.networks[kind](own, state[kind])
        return self._join(updates), after

    @property
    def rules(self):
        return {kind: as_rule(net) for kind, net in self.networks.items()}

    def replay(self, grads, state, adjoint, tape=None, read=None):
        """See `LSTMOptimizer.replay`: every network over its own coordinates of grads and adjoint, (T, N) each."""
        self._check(grads.shape[-1])
        total, adjoints = self._zeros(), self._split(adjoint)
        for kind, own in self._split(grads).items():
            total |= self._named(kind, self.rules[kind].replay(own, state[kind], adjoints[kind]))
        return total

    def pull_back(self, grad, state, adjoint, next_adjoints, read=None):
        """See `LSTMOptimizer.pull_back`: every network for its own coordinates, and its own part of the state."""
        self._check(grad.shape[-1])
        pulled, before, total, adjoints, rest = {}, [], self._zeros(), self._split(adjoint), list(next_adjoints)
        for kind, own in self._split(grad).items():
            count = len(tensors_in(state[kind]))
            given, rest = rest[:count], rest[count:]
            pulled[kind], parts, grads = self.rules[kind].pull_back(own, state[kind], adjoints[kind], given)
            before += parts
            total |= self._named(kind, grads)
        return self._join(pulled), before, total

    @property
    def odd(self):
        return any(rule.odd for rule in self.rules.values())

    def symmetrize(self, tensors):
        """See `CoordinatewiseLSTM.symmetrize`, of those networks that are odd."""
        symmetric = dict(tensors)
        for kind, net in self.rules.items():
            if net.odd:
                start = f"networks.{kind}."
                own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
                symmetric |= self._named(kind, net.symmetrize(own))
        return symmetric

    # How it is done ---------------------------------------------------------------------------------------------------

    def _check(self, size):
        if self.layout is None:
            raise TypeError(
                "PerKind must know how the parameters lie before it can run: "
                "net = net.bind(unrolling.Coordinates(params))"
            )
        own = sum(size for _, size in self.layout)
        if size != own:
            raise ValueError(f"this PerKind is bound to {own} coordinates, got {size}: bind it to these parameters")

    def _kinds(self):
        return list(dict.fromkeys(kind for kind, _ in self.layout))

    def _split(self, vector):
        """(..., N) -> dict from kind to (..., n of that kind)"""
        pieces = list(zip(self.layout, vector.split([size for _, size in self.layout], -1)))
        return {kind: torch.cat([piece for (own, _), piece in pieces if own == kind], -1) for kind in self._kinds()}

    def _join(self, vectors):
        """The opposite of `_split`."""
        pieces = {
            kind: iter(vectors[kind].split([size for own, size in self.layout if own == kind], -1))
            for kind in self._kinds()
        }
        return torch.cat([next(pieces[kind]) for kind, _ in self.layout], -1)

    def _zeros(self):
        return {
            name: torch.zeros_like(parameter) for name, parameter in self.named_parameters() if parameter.requires_grad
        }

    def _named(self, kind, gradients):
        return {f"networks.{kind}.{name}": gradient for name, gradient in gradients.items()}
