"""What a function is, and what advances it: the page to extend the library by.

- A *problem* draws functions: `Problem`. Anything with `sample(meta_batch, generator)` will do.
- Functions come as a `MetaBatch`: B of them are one computation. Their `Loss` may be any function of (params, step); one that is a
  `Loss` can say more, such as how its gradient is computed without autograd.
- A *learned optimizer* is any `nn.Module` with `init_state(num_coordinates)` and `forward(grad, state) -> (update, state)`; one that
  is a `Rule` can say more, such as what else it reads, or how it is differentiated.

`as_problem`, `as_loss` and `as_rule` make these of what a user gives, once, at the door; behind it nothing is asked for that is not
in these three classes. A meta-batch's parameters lie one after the other in one vector of N = B × n coordinates, see
`unrolling.Coordinates`; gradients, updates and states follow that order.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from gradbuffer.devices import whole_device
from gradbuffer.unrolling import Coordinates, Recorded, pull_back_by_autograd, record_by_steps, replay_by_autograd

__all__ = [
    "Loss",
    "MetaBatch",
    "PerceptronData",
    "Problem",
    "QuadraticData",
    "Rule",
    "as_loss",
    "as_problem",
    "as_rule",
    "device_of",
    "in_parts",
    "is_learned",
    "kind_of",
    "on_device",
    "part_if_any",
    "part_of",
    "repack",
]


# Problems -------------------------------------------------------------------------------------------------------------


class Problem:
    """A distribution of functions to optimize. A subclass has `sample`, and says what differs from the rest.

    `name` is for titles; `device` is where functions live; `options` are the arguments that rebuild it, by which checkpoints tell
    problems apart. `sample` takes meta-batches of a multiple of `multiple_of` functions.
    """

    name = ""
    multiple_of = 1
    device = torch.device("cpu")
    options: dict = {}

    def sample(self, meta_batch: int, generator: torch.Generator | None = None) -> "MetaBatch":
        """Draw `meta_batch` functions; all randomness comes from the generator, on the CPU, so that a seed means the same
        functions on every device. A mixture returns a list of meta-batches, of shapes of their own."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> "Problem":
        """The same distribution on another device."""
        return self

    def validation_problem(self) -> "Problem":
        """What `meta_train` validates on: functions that training does not draw. Default: fresh functions of its own."""
        return self

    @property
    def problems(self) -> list:
        """The problems that this one is a mixture of; itself, where it is none."""
        return [self]

    def describe(self) -> str:
        """What a checkpoint must agree with, as text."""
        options = (
            {name: value for name, value in self.options.items() if name != "root"}
            if isinstance(self.options, dict)
            else {}
        )
        return f"{kind_of(self)} {self.name} {options}"


class MetaBatch(NamedTuple):
    """B functions: initial `params`, a dict of tensors (B, ...), and `loss(params, step) -> (B,)`, which carries a graph.

    `part(first, last)`, if there is one, gives functions first … last - 1 as a meta-batch of their own, with the very
    losses that they have in the whole: what several processes share a meta-batch by. `loss` may be a `Loss`.
    """

    params: dict
    loss: Callable
    part: Callable | None = None
    family: int = 0  # which problem of a mixture they are of, by its place among `problems`


class Loss:
    """The losses of a meta-batch's functions. A subclass has `__call__`, and says what can be done better than by default."""

    divisible = False  # whether `part` computes those functions alone

    def __call__(self, params: dict, step: int) -> torch.Tensor:
        """Losses (B,) at params, a dict of (B, ...), each on its minibatch of that step; with a graph."""
        raise NotImplementedError

    def with_gradient(self, params: dict, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
        """Losses (B,) and the gradient of their sum, a dict like params, without a graph, in tensors that the next step leaves
        alone; or None: autograd does it. For functions so small that autograd costs more than they do."""
        return None

    def with_vector_gradient(self, theta: torch.Tensor, shapes: dict, step: int) -> tuple | None:
        """The same for the vector θ (N,) in which parameters of these shapes lie one after the other: losses and ∇ (N,), or None."""
        return None

    def part(self, first: int, last: int) -> "Loss":
        """The loss of functions first … last - 1, alone. Only where `divisible`."""
        raise NotImplementedError

    def join(self, others: list["Loss"]) -> "Loss | None":
        """The loss of these functions and of the others, whose losses are of this class, as one computation; None: there is none."""
        return None

    def later(self, steps: int) -> "Loss | None":
        """The loss of these functions so many steps on, which `join` takes with that of others at other steps; None: there is none."""
        return None

    def tensors(self, step: int) -> tuple:
        """What is read at that step, tensors of the same shapes in all batches: for a window that is captured as a CUDA graph."""
        raise ValueError(
            f"a window can be captured if its loss is an object with tensors(step) and of(); got {kind_of(self)}"
        )

    def of(self, tensors: tuple) -> "Loss":
        """A loss that reads these tensors, at any step."""
        raise NotImplementedError

    def compiled(self, shapes: dict) -> "QuadraticData | PerceptronData | None":
        """What a compiled window must know of functions of these shapes: a `QuadraticData` or `PerceptronData`; else None."""
        return None

    def compiled_particles(self, net: Any) -> tuple | None:
        """What runs functions under weights of their own, as of `problems.perceptrons.PerceptronsLoss`, which has `seeds`; else None."""
        return None


class QuadraticData(NamedTuple):
    """f(θ) = ‖Wθ − y‖² of the only parameter (B, n), at every step."""

    W: torch.Tensor  # (B, n, n)
    y: torch.Tensor  # (B, n, 1)
    twice: torch.Tensor  # 2 Wᵀ


class PerceptronData(NamedTuple):
    """Perceptrons with the mean cross-entropy of a minibatch."""

    images: torch.Tensor  # (examples, inputs)
    labels: torch.Tensor  # (examples,)
    index: Callable  # step -> (B, batch), the minibatch's places
    sizes: list  # of the layers, the input's first
    activation: str


def as_problem(problem: Any) -> Problem:
    """The problem as a `Problem`. Raises TypeError if it has no `sample`."""
    if isinstance(problem, Problem):
        return problem
    if not callable(getattr(problem, "sample", None)):
        raise TypeError(f"problem must have sample(meta_batch, generator), got {type(problem).__name__}")
    return adopt(Problem(), Problem, problem)


def as_loss(loss: Any) -> Loss:
    """The loss as a `Loss`. Raises TypeError if it is no function."""
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise TypeError(f"a meta-batch's loss must be a function of (params, step), got {loss!r}")
    adopted = adopt(FunctionLoss(), Loss, loss)
    adopted.divisible = "part" in vars(adopted)
    return adopted


def adopt(adopted, contract, given):
    """What the user gave, behind a contract: it answers for all that it has of it, the contract's defaults for the rest."""
    for name in vars(contract):  # no user's problem is a mixture by having `problems`
        if not name.startswith("_") and name != "problems" and hasattr(given, name):
            setattr(adopted, name, getattr(given, name))
    adopted.adopted = given
    return adopted


def kind_of(contract: Any) -> str:
    """The name of the class that a user knows."""
    return type(vars(contract).get("adopted", contract)).__name__


class FunctionLoss(Loss):
    """A user's own function of (params, step)."""

    def __call__(self, params, step):
        return self.adopted(params, step)


def in_parts(params: dict, loss: Loss) -> MetaBatch:
    """A meta-batch of a divisible loss."""

    def part(first, last):
        return in_parts({name: tensor[first:last] for name, tensor in params.items()}, loss.part(first, last))

    return MetaBatch(params, loss, part)


def part_if_any(batch: Any) -> Callable | None:
    """What gives some of a meta-batch's functions alone; None if nothing does."""
    return getattr(batch, "part", None)


def part_of(batch: Any, first: int, last: int) -> MetaBatch:
    """Functions first … last - 1 of a meta-batch.

    A batch without `part` computes the losses of all its functions and gives those asked for: right, but the
    optimizees' own time is not shared among the ranks.
    """
    if part_if_any(batch) is not None:
        return batch.part(first, last)
    params = {name: tensor[first:last] for name, tensor in batch.params.items()}
    return MetaBatch(params, PartOfLoss(as_loss(batch.loss), batch.params, first, last))


class PartOfLoss(Loss):
    """The losses of some functions, computed with all others at their first parameters."""

    def __init__(self, loss, params, first, last):
        self.loss, self.params, self.first, self.last = loss, params, first, last

    def __call__(self, params, step):
        whole = {
            name: torch.cat([tensor[: self.first], params[name], tensor[self.last :]])
            for name, tensor in self.params.items()
        }
        return self.loss(whole, step)[self.first : self.last]


# Learned optimizers ---------------------------------------------------------------------------------------------------


class Rule:
    """What advances θ: a base class for networks, beside `nn.Module`, whose defaults suit any of them.

    A network has `init_state(num_coordinates, device, dtype)`, which gives any nest of tensors, and `forward(grad, state)`, which
    returns the update (N,) and the next state. It may say more:

    - `reads`: what `forward` is given as keyword arguments beside gradient and state, some of "params": θ (N,); "loss": each
      coordinate's function's loss at this step (N,); "step": its number, an int.
    - `coordinatewise`: no coordinate reads another's, so that any subset of them can be run by itself, and the last axis of all
      tensors of the state is that of coordinates.
    - `tensorwise`: it is given whole tensors. `init_state(params)` gets a dict of tensors (B, ...), those of B functions, and so do
      `forward(grads, state)` and `params`; "loss" is (B,) then. `forward` may have an argument `weights`, see `per_function`.
    - `odd`: its weights are kept to those of which `symmetrize` is the identity.
    """

    coordinatewise = False
    tensorwise = False
    by_name = False  # whether `network_for` tells parameters apart
    odd = False
    overwrites = False  # whether `stepper` gives steps that write over the state they are given
    steps_in_groups = False  # whether `group_steps` gives steps of many tensors at once
    reads: Any = frozenset()
    arguments: tuple = ()  # the constructor's arguments, which the network keeps under their names

    @property
    def config(self) -> Any:
        """The constructor's arguments, a dict: what rebuilds this network, weights apart. Text where it does not say."""
        return {name: vars(self)[name] for name in self.arguments} if self.arguments else ""

    def extra_repr(self) -> str:
        """These arguments, for `nn.Module`'s `repr`."""
        return ", ".join(f"{name}={vars(self)[name]!r}" for name in self.arguments)

    def bind(self, coordinates: Coordinates) -> "Rule":
        """The same network, with the very same weights, for parameters that lie like this: for one that tells them apart."""
        return self

    def network_for(self, name: str) -> Any:
        """The network that runs a parameter of that name: for one that is several."""
        return self

    def stepper(self, state: Any) -> Callable:
        """step(gradient) -> update, many times from this state on, which each step overwrites. Only where `overwrites`."""
        raise NotImplementedError

    def group_steps(self, *arguments: Any) -> Any:
        """What takes steps of many tensors at once, see `LSTMKernels.group_steps`. Only where `steps_in_groups`."""

    def renews(self, dtype: torch.dtype) -> bool:
        """Whether such steps take a state that is stored in that dtype."""
        return False

    def repack(self) -> None:
        """Have what is kept of the weights made anew at the next step, though they may not have changed."""

    def record(
        self,
        loss: Loss,
        coordinates: Coordinates,
        theta: torch.Tensor,
        state: Any,
        step: int,
        updates: int,
        keep: bool = False,
    ) -> Recorded:
        """Unroll from step to step + updates, without a graph; neither theta nor state is changed.

        keep: `replay` will be asked about just these steps, and may be given their `tape`.
        """
        return record_by_steps(self, loss, coordinates, theta, state, step, updates)

    def in_parts(self, work: Callable, functions: int, size: int, steps: int) -> list:
        """[work(first, last), ...] over parts of some functions of `size` coordinates each; work is a window of so many steps of
        functions first … last - 1, and its replay. All are one part unless another way is faster. Only where `coordinatewise`."""
        return [work(0, functions)]

    def replay(
        self, grads: torch.Tensor, state: Any, adjoint: torch.Tensor, tape: Any = None, read: dict | None = None
    ) -> dict:
        """Gradient of Σ_t ⟨adjoint_t, update_t⟩ with respect to the weights, over recorded inputs.

        Args:
            grads, adjoint: (T, N).
            state: before step 0; not changed.
            tape: what `record` gave with these, or None.
            read: what the network `reads`, for each step: "params" and "loss" (T, N), "step" a list.

        Returns:
            dict from name to gradient, for the parameters that require grad; no graph.
        """
        return replay_by_autograd(self, grads, state, adjoint, read)

    def pull_back(
        self,
        grad: torch.Tensor,
        state: Any,
        adjoint: torch.Tensor,
        next_adjoints: list[torch.Tensor],
        read: dict | None = None,
    ) -> tuple:
        """Backpropagate through one step: what the second-order replay does from the last step to the first.

        Args:
            grad: (N,), what the step was fed, with `read` what it read beside.
            state: the state before the step; not changed.
            adjoint: (N,), the derivative of the loss with respect to the update.
            next_adjoints: list, the derivative with respect to each tensor of the state after the step; may be overwritten.

        Returns:
            the derivatives with respect to grad (N,), to each tensor of `state` (list), and to the weights (dict). A network that
            `reads` returns a fourth, a dict with those of "params" and "loss", as far as it reads them. No graph.
        """
        return pull_back_by_autograd(self, grad, state, adjoint, next_adjoints, read)

    def symmetrize(self, tensors: dict) -> dict:
        """Of a meta-gradient, a dict like `state_dict()`, the part along the weights that the network keeps to."""
        return tensors

    def per_function(self, weights: dict, coordinates: Coordinates) -> "Rule":
        """This network with other weights for every function: a dict from name to (B, ...). Default: one function after the other."""
        return PerFunction(self, weights, coordinates)

    def run_with(self, weights: dict, grad: Any, state: Any, **read: Any) -> tuple[Any, Any]:
        """`forward` with these weights, a dict like `named_parameters()`, instead of its own."""
        return torch.func.functional_call(self, weights, (grad, state), read)


def is_learned(net: Any) -> bool:
    """Whether it is a learned optimizer."""
    return isinstance(net, nn.Module) and callable(getattr(net, "init_state", None))


def as_rule(net: Any, coordinates: Coordinates | None = None) -> Rule:
    """The network as a `Rule`, for parameters that lie like this. Raises TypeError if it is no learned optimizer."""
    if not isinstance(net, Rule):
        if not is_learned(net):
            raise TypeError(f"net must be a learned optimizer, an nn.Module with init_state, got {type(net).__name__}")
        net = adopt(ModuleRule(net), Rule, net)
    if coordinates is None:
        return net
    bound = net.bind(coordinates)
    bound = bound if isinstance(bound, Rule) else as_rule(bound)
    return Tensorwise(bound, coordinates) if bound.tensorwise else bound


class ModuleRule(Rule):
    """A user's own module."""

    config = ""

    def __init__(self, net):
        self.net, self.init_state, self.named_parameters = net, net.init_state, net.named_parameters

    def __call__(self, grad, state, **read):
        return self.net(grad, state, **read)

    def run_with(self, weights, grad, state, **read):
        return torch.func.functional_call(self.net, weights, (grad, state), read)


class Tensorwise(Rule):
    """A network that reads whole tensors, between vectors of coordinates."""

    config = ""

    def __init__(self, net, coordinates):
        self.net, self.coordinates, self.named_parameters = net, coordinates, net.named_parameters
        self.reads, self.config, self.odd, self.symmetrize = frozenset(net.reads), net.config, net.odd, net.symmetrize
        forward = net.net.forward if isinstance(net, ModuleRule) else net.forward
        self.takes_weights = "weights" in inspect.signature(forward).parameters

    def init_state(self, num_coordinates, device=None, dtype=None):
        like = next((parameter for _, parameter in self.named_parameters()), torch.empty(0))
        zeros = torch.zeros(num_coordinates, device=device or like.device, dtype=dtype or like.dtype)
        return self.net.init_state(self.coordinates.split(zeros))

    def __call__(self, grad, state, **read):
        updates, state = self.net(self.coordinates.split(grad), state, **self.by_tensor(read))
        return self.coordinates.join(updates), state

    def run_with(self, weights, grad, state, **read):
        updates, state = self.net.run_with(weights, self.coordinates.split(grad), state, **self.by_tensor(read))
        return self.coordinates.join(updates), state

    def per_function(self, weights, coordinates):
        if not self.takes_weights:
            return super().per_function(weights, coordinates)
        flat, own = torch.cat([weights[name].flatten(1) for name, _ in self.named_parameters()], 1), copy.copy(self)
        own.by_tensor = lambda read: {**Tensorwise.by_tensor(self, read), "weights": flat}
        return own

    def by_tensor(self, read):
        """What it is given beside gradients and state, from vectors."""
        given = dict(read)
        if "params" in given:
            given["params"] = self.coordinates.split(given["params"])
        if "loss" in given:
            given["loss"] = self.coordinates.first_of_each(given["loss"])
        return given


class PerFunction(Rule):
    """Any rule with weights of its own for every function, a dict from name to (B, ...); its state is a list of theirs."""

    def __init__(self, rule, weights, coordinates):
        net = rule.net if isinstance(rule, (ModuleRule, Tensorwise)) else rule
        parts = [coordinates.part(function, function + 1) for function in range(coordinates.functions)]
        self.rules, self.spans = [as_rule(net, own) for own, _ in parts], [spans for _, spans in parts]
        self.reads = rule.reads
        self.weights = [{name: tensor[function] for name, tensor in weights.items()} for function in range(len(parts))]
        self.sizes = [end - start for start, end in self.spans[0]]

    def init_state(self, num_coordinates, device=None, dtype=None):
        return [rule.init_state(sum(self.sizes)) for rule in self.rules]

    def __call__(self, grad, state, **read):
        updates, after = [], []
        for rule, weights, spans, own in zip(self.rules, self.weights, self.spans, state):
            cut = lambda value: torch.cat([value[a:b] for a, b in spans]) if isinstance(value, torch.Tensor) else value  # noqa: E731
            update, own = rule.run_with(weights, cut(grad), own, **{name: cut(value) for name, value in read.items()})
            updates.append(update.split(self.sizes))
            after.append(own)
        return torch.cat([piece for tensors in zip(*updates) for piece in tensors]), after


def repack(net: Any) -> None:
    """Have every part of a network, or of what `as_rule` makes of one, make anew what it keeps of its weights."""
    while isinstance(net, (ModuleRule, Tensorwise)):
        net = net.net
    for module in net.modules() if isinstance(net, nn.Module) else [net]:
        if isinstance(module, Rule):
            module.repack()


def device_of(net: Any, device: torch.device | str | None = None) -> torch.device:
    """The device asked for, else the one that the network is on."""
    rule = as_rule(net)
    if device is not None:
        return whole_device(device)
    return next((parameter.device for _, parameter in rule.named_parameters()), torch.device("cpu"))


def on_device(problem: Any, device: torch.device) -> Problem:
    """The problem as a `Problem`, on a device, if it knows how to move there."""
    problem, device = as_problem(problem), whole_device(device)
    return problem if whole_device(problem.device) == device else as_problem(problem.to(device))
