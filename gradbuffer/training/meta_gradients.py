"""The unrolled optimization and its meta-gradient: by replay without a graph, by autograd, or without derivatives (PES).

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2: L(φ) = E_f Σ_t w_t f(θ_t), θ_{t+1} = θ_t + g_t,
(g_t, h_{t+1}) = m(∇_t, h_t; φ). One window at a time: what strings windows to a training run is `meta_training`. Vectors
of coordinates (N,) are as in `unrolling`. Each way to the meta-gradient is an object with its options: `Replay`, `Autograd`, and
`evolution.PES`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn

from gradbuffer.checks import (
    NonFiniteError,
    check_count,
    check_finite,
    check_positive_number,
    values_are_checked,
    values_unchecked,
)
from gradbuffer.contracts import MetaBatch, Rule, as_loss, as_rule, repack
from gradbuffer.devices import bring
from gradbuffer.nests import map_tensors, tensors_in
from gradbuffer.training.evolution import PES, Method, Unrolled, Window
from gradbuffer.unrolling import Coordinates, apply_objective, check_objective, gradients_of, multiply_by_slopes

__all__ = [
    "Autograd",
    "DEFAULTS",
    "PES",
    "Replay",
    "WindowInfo",
    "check_replay_fraction",
    "check_window",
    "finish_window",
    "flat_options",
    "meta_gradient",
    "method_of",
    "replay_recorded",
    "replay_window",
]


class WindowInfo(NamedTuple):
    """What a window of the unroll leaves behind; nothing carries a graph."""

    losses: torch.Tensor  # (unroll + 1, B): f(θ_0) … f(θ_T) of the window
    params: dict  # the end of the window, to start the next one from
    state: object


@dataclass(frozen=True)
class Replay(Method):
    """The meta-gradient by replay, without a graph of the window.

    It unrolls and keeps the gradients ∇_t. Since they are constants, the adjoint of θ_{t+1} is λ_{t+1} = Σ_{s>t} w_s ∇_s, and
    dL/dφ = Σ_t ⟨λ_{t+1}, ∂g_t/∂φ⟩: the optimizer is run once more over the recorded gradients and λ is pulled back through it. With
    `second_order` ∇_t is not constant, λ_t = λ_{t+1} + w_t ∇_t + H_t d_t with H_t the Hessian of f_t and d_t the adjoint of ∇_t as
    the optimizer's input: the optimizer is pulled back step by step, from the last to the first.

    Args:
        second_order: keep the dependence of ∇_t on φ, the edges that the paper drops: the meta-gradient of the window is the true
            one. Costs one product with the optimizee's Hessian in each step; every step's state is kept.
        replay_fraction: in (0, 1]: replay over a random share of the coordinates, drawn anew in every call, each weighted by 1 / its
            probability. The meta-gradient is a sum over coordinates, so this is an unbiased estimate of it, at that share of the
            replay's cost. Small tensors keep all their coordinates. Not with `second_order`, and only for a network with
            `coordinatewise = True`.
        objective: "sum" of the losses; or "log" of their logarithms, so that every function counts by its relative decrease,
            whatever its scale (in λ, ∇_t becomes ∇_t / f_t), which needs positive losses; or a function of the losses (..., B),
            elementwise and differentiable, such as one that clips them.
        adjoint_bound: positive, or None for no bound: keep each function's ‖λ_t‖ at most that many times what it would be if
            gradients were constants, by scaling its adjoints down at every step where it is larger. The true meta-gradient of a long
            window may explode (the optimization is chaotic); this one does not. Only with `second_order`, and for a network with
            `coordinatewise = True`.
    """

    second_order: bool = False
    replay_fraction: float = 1.0
    objective: str | Callable = "sum"
    adjoint_bound: float | None = None

    name = "replay"

    def check(self, rule: Rule) -> None:
        """Raise unless these options go together, and with this network."""
        check_objective(self.objective)
        check_replay_fraction(self.replay_fraction, self.second_order, rule)
        if self.adjoint_bound is not None:
            check_positive_number(adjoint_bound=self.adjoint_bound)
            if not self.second_order or not rule.coordinatewise:
                raise ValueError(
                    f'adjoint_bound={self.adjoint_bound} needs method="replay", second_order=True and a network with '
                    "coordinatewise = True"
                )

    def window(self, window: Window, generator: torch.Generator | None) -> Unrolled:
        """See `Method.window`."""
        if self.second_order:
            return second_order_replay_window(window, self)
        return replay_in_parts(window, self, generator)


@dataclass(frozen=True)
class Autograd(Method):
    """The meta-gradient by autograd, of the whole window as one graph: exact, slower, and what the replay is tested against.

    Args:
        second_order, objective: see `Replay`.
    """

    second_order: bool = False
    objective: str | Callable = "sum"

    name = "autograd"

    def check(self, rule: Rule) -> None:
        """Raise unless the options are as above."""
        check_objective(self.objective)

    @torch.enable_grad()
    def window(self, window: Window, generator: torch.Generator | None) -> Unrolled:
        """See `Method.window`."""
        rule, loss, coordinates, theta, state, step, weights = window
        losses, first_order = [], not self.second_order
        theta, state = theta.requires_grad_(), map_tensors(torch.Tensor.detach, state)
        for t in range(len(weights)):
            losses.append(coordinates.losses(loss, theta, step + t))
            if t + 1 < len(weights):
                (gradient,) = torch.autograd.grad(
                    losses[-1].sum(), theta, create_graph=self.second_order, retain_graph=True
                )
                read = coordinates.what(rule.reads, theta, losses[-1], step + t)
                if first_order:  # whatever the optimizer reads counts as constant
                    read = map_tensors(torch.Tensor.detach, read)
                update, state = rule(gradient, state, **read)
                theta = theta + update
        losses = torch.stack(losses)
        grads = gradients_of((weights[:, None] * apply_objective(losses, self.objective)).sum(), rule)
        return Unrolled(grads, losses.detach(), theta.detach(), map_tensors(torch.Tensor.detach, state))


METHODS = {"replay": Replay, "autograd": Autograd, "pes": PES}


def method_of(method: str | Method = "replay", **options: Any) -> Method:
    """The object of a way to the meta-gradient, from its short name or itself, and options by their names.

    An option that it does not have may be given at its default only.

    Raises:
        ValueError, TypeError: there is no such way, or an option is not one of it.
    """
    if not isinstance(method, str):
        if not isinstance(method, Method):
            raise TypeError(
                f"method must be one of {list(METHODS)}, or a Replay, Autograd, PES or EpisodicES, got {method!r}"
            )
        given = sorted(name for name, value in options.items() if value != DEFAULTS.get(name))
        if given:
            raise ValueError(f"{', '.join(given)} must stand in method={method!r} itself where that is an object")
        return method
    if method not in METHODS:
        raise ValueError(f'method must be "replay", "autograd" or "pes", got {method!r}')
    own = OPTIONS[method]
    for name, value in options.items():
        if name not in DEFAULTS:
            raise TypeError(f"unexpected keyword argument {name!r}; the options of methods are {sorted(DEFAULTS)}")
        if name not in own and value != DEFAULTS[name]:
            users = [other for other, names in OPTIONS.items() if name in names]
            if users == ["pes"]:
                raise ValueError(f"{name} is for method pes, got method {method}")
            raise ValueError(f"{name}={value!r} needs method={' or '.join(map(json.dumps, users))}, got {method!r}")
    return METHODS[method](**{name: value for name, value in options.items() if name in own})


DEFAULTS = {field.name: field.default for cls in METHODS.values() for field in fields(cls)}
OPTIONS = {method: {field.name for field in fields(cls)} for method, cls in METHODS.items()}


def flat_options(method: Method) -> dict:
    """A method's name and options, with the defaults of those that are other methods': what a checkpoint must agree with."""
    return {"method": method.name, **DEFAULTS, **asdict(method)}


def meta_gradient(
    net: nn.Module,
    batch: MetaBatch,
    params: dict[str, torch.Tensor],
    state: Any,
    step: int = 0,
    unroll: int = 20,
    method: str | Method = "replay",
    second_order: bool = False,
    *,
    weights: Sequence[float] | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], WindowInfo]:
    """The meta-gradient of one window: `unroll` updates of the optimizee, differentiated with respect to the optimizer.

    The meta-loss is the mean over functions of Σ_{t=0..T} w_t f_t(θ_t), the end of the window included. The optimizee's
    gradient ∇_t counts as a constant input of the optimizer (the paper drops those edges of the graph), unless
    `second_order`: then the meta-gradient of the window is the true one.

    "replay" and "autograd" are exact; "pes" perturbs φ instead of differentiating: a noisy estimate of the gradient through *all*
    windows so far, all edges included. `Replay`, `Autograd` and `PES` say how.

    Args:
        net: the learned optimizer; its parameters' `.grad` are not touched.
        batch: a meta-batch, with `loss(params, step) -> (B,)`.
        params: dict of (B, ...), where the window starts; not changed.
        state: the optimizer's state there (`net.init_state(N)` at the first window, of a network with `bind`
            `net.bind(Coordinates(params)).init_state(N)`); not changed.
        step: number of the window's first step, at least 0.
        unroll: T, updates in the window; positive.
        method: "replay", "autograd" or "pes", or an object of them, such as Replay(second_order=True).
        weights: (T + 1,), w_t; default all 1.
        generator: a CPU generator for what is drawn (coordinates of a partial replay, perturbations); default torch's own.
        second_order, options: those of the method, by their names, where it is given as text: replay_fraction, objective,
            adjoint_bound, sigma, pairs, hold, per_function.

    Returns:
        grads, a dict like `net.named_parameters()` (those that require grad), and `WindowInfo`. No graph. With "pes",
        the info's losses are means over the particles and its state holds them all: give it to the next window.

    Raises:
        ValueError, TypeError: an argument is not as above.
        NonFiniteError: a loss in the window is infinite or NaN, or with "log" not positive.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> net, batch = CoordinatewiseLSTM(), Quadratics(dim=10).sample(16)
        >>> grads, info = meta_gradient(net, batch, batch.params, net.init_state(160))
        >>> grads, info = meta_gradient(net, batch, info.params, info.state, step=20)

    Reference: Andrychowicz et al. 2016, section 2 and figure 2.
    """
    check_count(unroll=unroll)
    check_count(least=0, step=step)
    method = method_of(method, second_order=second_order, **options)
    method.check(as_rule(net))
    coordinates = Coordinates(params)
    rule, theta = as_rule(net, coordinates), coordinates.join(params).detach()
    weights = theta.new_ones(unroll + 1) if weights is None else bring(torch.as_tensor(weights), theta.device).to(theta)
    if weights.shape != (unroll + 1,):
        raise ValueError(f"weights must have shape ({unroll + 1},) for unroll {unroll}, got {tuple(weights.shape)}")
    weights = weights / coordinates.functions
    window = Window(rule, as_loss(batch.loss), coordinates, theta, state, step, weights)
    if theta.is_cpu:
        return finish_window(window, method.window(window, generator), method.objective)
    repack(net)  # instead of waiting for the device to see whether the weights have changed
    with values_unchecked():
        found = method.window(window, generator)
    return finish_window(window, found, method.objective)


def finish_window(
    window: Window, found: Unrolled, objective: str | Callable
) -> tuple[dict[str, torch.Tensor], WindowInfo]:
    """What `meta_gradient` returns, unless a loss is not finite."""
    if values_are_checked():
        check_window(found.grads, found.losses, window.step, objective)
    grads = window.rule.symmetrize(found.grads) if window.rule.odd else found.grads
    return grads, WindowInfo(found.losses, window.coordinates.split(found.theta), found.state)


def check_window(grads: dict[str, torch.Tensor], losses: torch.Tensor, step: int, objective: str | Callable) -> None:
    """Raise NonFiniteError unless what a window of these losses (T + 1, B) from that step on gave is finite.

    On a CPU the network has looked at every gradient that it was fed. Elsewhere nobody has, and what was not finite shows in the
    meta-gradient: both are looked at with one wait for the device.
    """
    values = apply_objective(losses, objective)
    looked_at = values if values.is_cpu else torch.cat([part.flatten() for part in (values, *grads.values())])
    if math.isfinite(looked_at.sum().item()):
        return
    if not torch.isfinite(values).all():  # a sum may also overflow
        t, function = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise NonFiniteError(
            f"the loss of function {function} at step {step + t} is {losses[t, function].item()}"
            + (', and objective="log" needs a positive one' if objective == "log" else "")
        )
    if not values.is_cpu:
        for name, grad in grads.items():
            check_finite(grad, f"the meta-gradient by {name} of the window from step {step} on")


@torch.no_grad()
def replay_in_parts(window, method, generator):
    """`replay_window`, of some functions after the others where the network and the loss can do that."""
    coordinates, whole, ends = window.coordinates, (window.theta, window.state), []

    def part_of_window(first, last):
        if last - first == coordinates.functions:
            return replay_window(window, method, generator)
        own, spans = coordinates.part(first, last)
        theta, state = map_tensors(lambda tensor: torch.cat([tensor[..., a:b] for a, b in spans], -1), whole)
        start = window._replace(loss=window.loss.part(first, last), coordinates=own, theta=theta, state=state)
        found = replay_window(start, method, generator)
        if not ends:  # the first one is for all parts, if several threads come here at once too
            ends.append(map_tensors(torch.empty_like, whole))
        for tensor, part in zip(tensors_in(ends[0]), tensors_in((found.theta, found.state))):
            for (a, b), piece in zip(spans, part.split(own.sizes, -1)):
                tensor[..., a:b] = piece
        return found

    functions = coordinates.functions
    if method.replay_fraction < 1 or not (window.rule.coordinatewise and window.loss.divisible):
        return part_of_window(0, functions)
    size = sum(coordinates.sizes) // functions
    parts = window.rule.in_parts(part_of_window, functions, size, len(window.weights) - 1)
    if len(parts) == 1:
        return parts[0]
    grads = {name: sum(part.grads[name] for part in parts) for name in parts[0].grads}
    return Unrolled(grads, torch.cat([part.losses for part in parts], 1), *ends[0])


@torch.no_grad()
def replay_window(window: Window, method: Replay, generator: torch.Generator | None) -> Unrolled:
    """`Replay.window` of the first order, all functions at once."""
    rule, loss, coordinates, theta, start, step, weights = window
    fraction = method.replay_fraction
    recorded = rule.record(loss, coordinates, theta, start, step, len(weights) - 1, fraction == 1)
    losses, gradients = recorded.losses, recorded.gradients
    adjoint, inputs = weights[1:, None] * gradients[1:], gradients[:-1]
    multiply_by_slopes(adjoint, losses[1:], method.objective, coordinates)
    if adjoint.is_cpu:
        rows = adjoint.unbind()
        for later, row in zip(rows[:0:-1], rows[-2::-1]):  # λ_{t+1} = Σ_{s>t} w_s ∇_s, in place from the end
            row += later
    else:
        adjoint = adjoint.flip(0).cumsum(0).flip(0)
    grads = replay_recorded(
        rule, coordinates, inputs, start, adjoint, fraction, generator, recorded.tape, recorded.read
    )
    return Unrolled(grads, losses, recorded.theta, map_tensors(torch.Tensor.detach, recorded.state))


def replay_recorded(
    rule: Rule,
    coordinates: Coordinates,
    inputs: torch.Tensor,
    start: Any,
    adjoint: torch.Tensor,
    fraction: float,
    generator: torch.Generator | None,
    tape: Any = None,
    read: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Gradient of Σ_t ⟨adjoint_t, update_t⟩ over recorded inputs (T, N), from the state `start` on.

    With a fraction below 1 an estimate of it, from that share of the coordinates. tape, read: see `Rule.replay`.
    """
    if fraction < 1:
        kept, factor = (bring(tensor, inputs.device) for tensor in coordinates.subset(fraction, generator))
        inputs, adjoint = inputs[:, kept], adjoint[:, kept] * factor.to(inputs)
        start = map_tensors(lambda tensor: tensor[..., kept], start)
        read = read and {
            name: values[:, kept] if isinstance(values, torch.Tensor) else values for name, values in read.items()
        }
    more = {name: value for name, value in (("tape", tape), ("read", read)) if value is not None}
    return rule.replay(inputs, start, adjoint, **more)


@torch.no_grad()
def second_order_replay_window(window, method):
    rule, loss, coordinates, _, _, step, weights = window
    updates, limit = len(weights) - 1, method.adjoint_bound
    losses, gradients, thetas, states = zip(*window.unroll(keep_states=True))
    losses = torch.stack(losses)
    pulls = multiply_by_slopes(weights[:, None] * torch.stack(gradients), losses, method.objective, coordinates)
    adjoint, state_adjoints, total = pulls[-1], [torch.zeros_like(tensor) for tensor in tensors_in(states[-1])], None
    sizes = coordinates.norms(pulls.flip(0).cumsum(0).flip(0)) if limit else None  # of first-order adjoints, (T + 1, B)
    for t in reversed(range(updates)):
        read = {"read": coordinates.what(rule.reads, thetas[t], losses[t], step + t)} if rule.reads else {}
        gradient_adjoint, state_adjoints, grads, *beside = rule.pull_back(
            gradients[t], states[t], adjoint, state_adjoints, **read
        )
        total = grads if total is None else {name: total[name] + grad for name, grad in grads.items()}
        if t:  # λ_t = λ_{t+1} + w_t ∇_t + H_t d_t; what is before the window is constant
            adjoint = adjoint + pulls[t] + coordinates.hessian_product(loss, thetas[t], step + t, gradient_adjoint)
            for more in beside:
                adjoint = adjoint + coordinates.pull_back_reads(more, gradients[t])
            if limit:
                excess = coordinates.norms(adjoint[None]) / (limit * sizes[t : t + 1])
                factor = coordinates.spread(1 / excess.clamp(min=1))[0]  # (N,)
                adjoint, state_adjoints = adjoint * factor, [part * factor for part in state_adjoints]
    return Unrolled(total, losses, thetas[-1], map_tensors(torch.Tensor.detach, states[-1]))


def check_replay_fraction(fraction: Any, second_order: bool, rule: Rule) -> None:
    if not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
        raise ValueError(f"replay_fraction must be a number in (0, 1], got {fraction!r}")
    if fraction < 1 and (second_order or not rule.coordinatewise):
        raise ValueError(
            f'replay_fraction={fraction} needs method="replay", second_order=False and a network with '
            "coordinatewise = True"
        )
