"""The unrolled optimization and its meta-gradient: by replay without a graph, by autograd, or without derivatives (PES).

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2: L(φ) = E_f Σ_t w_t f(θ_t), θ_{t+1} = θ_t + g_t,
(g_t, h_{t+1}) = m(∇_t, h_t; φ). One window at a time: what strings windows to a training run is `meta_training`. Vectors
of coordinates (N,) are as in `unrolling`.
"""

import math
from typing import NamedTuple

import torch

from gradbuffer.checks import NonFiniteError, check_count, check_positive_number
from gradbuffer.pes import pes_window
from gradbuffer.nests import map_tensors, tensors_in
from gradbuffer.unrolling import Coordinates, bound, record, unroll

__all__ = ["WindowInfo", "meta_gradient"]


class WindowInfo(NamedTuple):
    """What a window of the unroll leaves behind; nothing carries a graph."""

    losses: torch.Tensor  # (unroll + 1, B): f(θ_0) … f(θ_T) of the window
    params: dict  # the end of the window, to start the next one from
    state: object


def meta_gradient(net, batch, params, state, step=0, unroll=20, method="replay", second_order=False, weights=None,
                  replay_fraction=1.0, sigma=0.01, pairs=1, generator=None, objective="sum", adjoint_bound=None):
    """The meta-gradient of one window: `unroll` updates of the optimizee, differentiated with respect to the optimizer.

    The meta-loss is the mean over functions of Σ_{t=0..T} w_t f_t(θ_t), the end of the window included. The optimizee's
    gradient ∇_t counts as a constant input of the optimizer (the paper drops those edges of the graph), unless
    `second_order`: then the meta-gradient of the window is the true one.

    "replay" unrolls without a graph and keeps the gradients ∇_t. Since they are constants, the adjoint of θ_{t+1} is
    λ_{t+1} = Σ_{s>t} w_s ∇_s, and dL/dφ = Σ_t ⟨λ_{t+1}, ∂g_t/∂φ⟩: the optimizer is run once more over the recorded
    gradients and λ is pulled back through it. With `second_order` ∇_t is not constant, λ_t = λ_{t+1} + w_t ∇_t + H_t d_t
    with H_t the Hessian of f_t and d_t the adjoint of ∇_t as the optimizer's input: the optimizer is pulled back step by
    step, from the last to the first, still without a graph of the window. "autograd" differentiates the whole window as
    one graph; it is exact too, slower, and what the replay is tested against. "pes" perturbs φ instead of
    differentiating: a noisy estimate of the gradient through *all* windows so far, all edges included (see `pes`).

    Args:
        net: the learned optimizer; its parameters' `.grad` are not touched.
        batch: a meta-batch, with `loss(params, step) -> (B,)`.
        params: dict of (B, ...), where the window starts; not changed.
        state: the optimizer's state there (`net.init_state(N)` at the first window, of a network with `bind`
            `net.bind(Coordinates(params)).init_state(N)`); not changed.
        step: number of the window's first step, at least 0.
        unroll: T, updates in the window; positive.
        method: "replay", "autograd" or "pes".
        second_order: keep the dependence of ∇_t on φ, the edges that the paper drops; not with "pes", which always has
            it. Costs one product with the optimizee's Hessian in each step; the replay keeps every step's state.
        weights: (T + 1,), w_t; default all 1.
        replay_fraction: in (0, 1]: replay over a random share of the coordinates, drawn anew in every call, each
            weighted by 1 / its probability. The meta-gradient is a sum over coordinates, so this is an unbiased
            estimate of it, at that share of the replay's cost. Small tensors keep all their coordinates. Needs
            "replay" without `second_order`, and a network with `coordinatewise = True` (the last axis of its state's
            tensors is N).
        sigma: of "pes": standard deviation of the perturbations of φ; positive.
        pairs: of "pes": antithetic pairs, each of which costs two unrolls; positive.
        generator: a CPU generator for these draws; default torch's own.
        objective: "sum" as above; "log" takes Σ_t w_t log f_t(θ_t) instead, so that every function counts by its
            relative decrease, whatever its scale: in λ, ∇_t becomes ∇_t / f_t. Needs positive losses.
        adjoint_bound: positive, or None for no bound: keep each function's ‖λ_t‖ at most that many times what it would
            be if gradients were constants, by scaling its adjoints down at every step where it is larger. The true
            meta-gradient of a long window may explode (the optimization is chaotic); this one does not. Needs "replay"
            with `second_order`, and a network with `coordinatewise = True`.

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
    check_gradient_options(net, method, second_order, replay_fraction, sigma, pairs, objective, adjoint_bound)
    coordinates = Coordinates(params)
    net, theta = bound(net, coordinates), coordinates.join(params).detach()
    weights = torch.ones(unroll + 1) if weights is None else torch.as_tensor(weights)
    if weights.shape != (unroll + 1,):
        raise ValueError(f"weights must have shape ({unroll + 1},) for unroll {unroll}, got {tuple(weights.shape)}")
    weights = weights.to(theta) / coordinates.functions
    if method == "replay" and second_order:
        grads, losses, theta, state = second_order_replay_window(net, batch.loss, coordinates, theta, state, step, weights,
                                                                 objective, adjoint_bound)
    elif method == "replay":
        grads, losses, theta, state = replay_in_parts(net, batch.loss, coordinates, theta, state, step, weights,
                                                      replay_fraction, generator, objective)
    elif method == "pes":
        grads, losses, theta, state = pes_window(net, batch.loss, coordinates, theta, state, step, weights, sigma,
                                                 pairs, generator, objective)
    else:
        grads, losses, theta, state = autograd_window(net, batch.loss, coordinates, theta, state, step, weights,
                                                      second_order, objective)
    return finished(net, coordinates, grads, losses, theta, state, step, objective)


def finished(net, coordinates, grads, losses, theta, state, step, objective):
    """What `meta_gradient` returns, unless a loss is not finite."""
    values = losses if objective == "sum" else losses.log()
    if not math.isfinite(values.sum().item()) and not torch.isfinite(values).all():  # a sum may also overflow
        t, function = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise NonFiniteError(f"the loss of function {function} at step {step + t} is {losses[t, function].item()}"
                             + (', and objective="log" needs a positive one' if objective == "log" else ""))
    if getattr(net, "odd", False):
        grads = net.symmetrize(grads)
    return grads, WindowInfo(losses, coordinates.split(theta), state)


@torch.no_grad()
def replay_in_parts(net, loss, coordinates, theta, state, step, weights, fraction, generator, objective):
    """`replay_window`, of some functions after the others where the network and the loss can do that."""
    functions, whole, ends = coordinates.functions, (theta, state), []

    def window(first, last):
        if last - first == functions:
            return replay_window(net, loss, coordinates, *whole, step, weights, fraction, generator, objective)
        own, spans = coordinates.part(first, last)
        start = map_tensors(lambda tensor: torch.cat([tensor[..., a:b] for a, b in spans], -1), whole)
        grads, losses, *after = replay_window(net, loss.part(first, last), own, *start, step, weights, fraction, generator,
                                              objective)
        if not ends:  # the first one is for all parts, if several threads come here at once too
            ends.append(map_tensors(torch.empty_like, whole))
        for tensor, part in zip(tensors_in(ends[0]), tensors_in(after)):
            for (a, b), piece in zip(spans, part.split(own.sizes, -1)):
                tensor[..., a:b] = piece
        return grads, losses

    if fraction < 1 or not (getattr(net, "coordinatewise", False) and hasattr(net, "take_parts") and hasattr(loss, "part")):
        return window(0, functions)
    parts = net.take_parts(window, functions, sum(coordinates.sizes) // functions, len(weights) - 1)
    if len(parts) == 1:
        return parts[0]
    grads, losses = zip(*parts)
    return {name: sum(grad[name] for grad in grads) for name in grads[0]}, torch.cat(losses, 1), *ends[0]


@torch.no_grad()
def replay_window(net, loss, coordinates, theta, state, step, weights, fraction, generator, objective):
    start = state
    losses, gradients, theta, state, room = record(net, loss, coordinates, theta, state, step, len(weights) - 1, fraction == 1)
    adjoint, inputs = weights[1:, None] * gradients[1:], gradients[:-1]
    if objective == "log":
        adjoint /= coordinates.spread(losses[1:])
    rows = adjoint.unbind()
    for later, row in zip(rows[:0:-1], rows[-2::-1]):  # λ_{t+1} = Σ_{s>t} w_s ∇_s, in place from the end
        row += later
    grads = replay_recorded(net, coordinates, inputs, start, adjoint, fraction, generator, room)
    return grads, losses, theta, map_tensors(torch.Tensor.detach, state)


def replay_recorded(net, coordinates, inputs, start, adjoint, fraction, generator, room=None):
    """Gradient of Σ_t ⟨adjoint_t, update_t⟩ over recorded inputs (T, N), from the state `start` on.

    With a fraction below 1 an estimate of it, from that share of the coordinates. room: see `unrolling.record`.
    """
    if fraction < 1:
        kept, factor = (tensor.to(inputs.device) for tensor in coordinates.subset(fraction, generator))
        inputs, adjoint = inputs[:, kept], adjoint[:, kept] * factor.to(inputs)
        start = map_tensors(lambda tensor: tensor[..., kept], start)
    replay = getattr(net, "replay", None) or (lambda *recorded: replay_by_autograd(net, *recorded))
    return replay(inputs, start, adjoint, **({} if room is None else {"room": room}))


@torch.enable_grad()
def replay_by_autograd(net, grads, state, adjoint):
    """Gradient of Σ_t ⟨adjoint_t, update_t⟩ for any optimizer: run it over grads (T, N) again, with a graph."""
    updates, state = [], map_tensors(torch.Tensor.detach, state)
    for grad in grads:
        update, state = net(grad, state)
        updates.append(update)
    return gradients_of((torch.stack(updates) * adjoint).sum(), net)


@torch.no_grad()
def second_order_replay_window(net, loss, coordinates, theta, state, step, weights, objective, limit):
    updates = len(weights) - 1
    losses, gradients, thetas, states = zip(*unroll(net, loss, coordinates, theta, state, step, updates, True))
    losses = torch.stack(losses)
    pulls = weights[:, None] * torch.stack(gradients)
    if objective == "log":
        pulls /= coordinates.spread(losses)
    written = hasattr(net, "pull_back") and theta.device.type == "cpu"
    pull_back = net.pull_back if written else lambda *step: pull_back_by_autograd(net, *step)
    adjoint, state_adjoints, total = pulls[-1], [torch.zeros_like(tensor) for tensor in tensors_in(states[-1])], None
    sizes = coordinates.norms(pulls.flip(0).cumsum(0).flip(0)) if limit else None  # of first-order adjoints, (T + 1, B)
    for t in reversed(range(updates)):
        gradient_adjoint, state_adjoints, grads = pull_back(gradients[t], states[t], adjoint, state_adjoints)
        total = grads if total is None else {name: total[name] + grad for name, grad in grads.items()}
        if t:  # λ_t = λ_{t+1} + w_t ∇_t + H_t d_t; what is before the window is constant
            adjoint = adjoint + pulls[t] + coordinates.hessian_product(loss, thetas[t], step + t, gradient_adjoint)
            if limit:
                excess = coordinates.norms(adjoint[None]) / (limit * sizes[t:t + 1])
                factor = coordinates.spread(1 / excess.clamp(min=1))[0]  # (N,)
                adjoint, state_adjoints = adjoint * factor, [part * factor for part in state_adjoints]
    return total, losses, thetas[-1], map_tensors(torch.Tensor.detach, states[-1])


def pull_back_by_autograd(net, grad, state, adjoint, next_adjoints):
    """`LSTMOptimizer.pull_back` for any optimizer: run the step again, with a graph."""
    wanted = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        grad = grad.detach().requires_grad_()
        state = map_tensors(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), state)
        before = tensors_in(state)
        update, after = net(grad, state)
        ends = [(end, d) for end, d in zip([update, *tensors_in(after)], [adjoint, *next_adjoints]) if end.requires_grad]
        leaves = [grad, *before, *wanted.values()]
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        found = dict(zip(map(id, asked), torch.autograd.grad([end for end, _ in ends], asked, [d for _, d in ends],
                                                             allow_unused=True)))
    pulled = [torch.zeros_like(leaf) if found.get(id(leaf)) is None else found[id(leaf)] for leaf in leaves]
    return pulled[0], pulled[1:1 + len(before)], dict(zip(wanted, pulled[1 + len(before):]))


@torch.enable_grad()
def autograd_window(net, loss, coordinates, theta, state, step, weights, second_order, objective):
    losses = []
    theta, state = theta.requires_grad_(), map_tensors(torch.Tensor.detach, state)
    for t in range(len(weights)):
        losses.append(coordinates.losses(loss, theta, step + t))
        if t + 1 < len(weights):
            (gradient,) = torch.autograd.grad(losses[-1].sum(), theta, create_graph=second_order, retain_graph=True)
            update, state = net(gradient, state)
            theta = theta + update
    losses = torch.stack(losses)
    grads = gradients_of((weights[:, None] * (losses.log() if objective == "log" else losses)).sum(), net)
    return grads, losses.detach(), theta.detach(), map_tensors(torch.Tensor.detach, state)


def gradients_of(value, net):
    """Gradients of a scalar as a dict like `net.named_parameters()`; zeros for parameters it does not depend on."""
    wanted = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(parameter) if grad is None else grad
            for (name, parameter), grad in zip(wanted.items(), grads)}


def check_gradient_options(net, method, second_order, replay_fraction, sigma, pairs, objective, adjoint_bound):
    check_count(pairs=pairs)
    check_positive_number(sigma=sigma)
    if method not in ("replay", "autograd", "pes"):
        raise ValueError(f'method must be "replay", "autograd" or "pes", got {method!r}')
    if second_order and method == "pes":
        raise ValueError('second_order=True needs method="replay" or "autograd": "pes" takes no derivatives')
    if objective not in ("sum", "log"):
        raise ValueError(f'objective must be "sum" or "log", got {objective!r}')
    check_replay_fraction(replay_fraction, method, second_order, net)
    if adjoint_bound is not None:
        check_positive_number(adjoint_bound=adjoint_bound)
        if method != "replay" or not second_order or not getattr(net, "coordinatewise", False):
            raise ValueError(f'adjoint_bound={adjoint_bound} needs method="replay", second_order=True and a network with '
                             "coordinatewise = True")


def check_replay_fraction(fraction, method, second_order, net):
    if not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
        raise ValueError(f"replay_fraction must be a number in (0, 1], got {fraction!r}")
    if fraction < 1 and (method != "replay" or second_order or not getattr(net, "coordinatewise", False)):
        raise ValueError(f'replay_fraction={fraction} needs method="replay", second_order=False and a network with '
                         "coordinatewise = True")
