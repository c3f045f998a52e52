"""The unrolled optimization and its meta-gradient, by replay without a graph or by autograd.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2: L(φ) = E_f Σ_t w_t f(θ_t), θ_{t+1} = θ_t + g_t,
(g_t, h_{t+1}) = m(∇_t, h_t; φ). One window at a time: what strings windows to a training run is `meta_training`.

Coordinates: a meta-batch's parameters, a dict of tensors (B, ...), lie one after the other in one vector of N = B × n
coordinates, each tensor flattened; gradients, updates and states follow that order.
"""

import math
from typing import NamedTuple

import torch

from argument_checks import NonFiniteError, check_count
from state_nests import map_tensors

__all__ = ["Coordinates", "WindowInfo", "meta_gradient"]

SMALLEST_SHARE = 1024  # coordinates of a tensor that a partial replay reads at least


# The optimizee as one vector ------------------------------------------------------------------------------------------


class Coordinates:
    """How a dict of parameters (B, ...) lies in one vector (N,)."""

    def __init__(self, params):
        if not isinstance(params, dict) or not params:
            raise TypeError(f"params must be a dict from name to tensor (B, ...), got {type(params).__name__}")
        first = next(iter(params.values()))
        for name, tensor in params.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dim() < 1:
                raise TypeError(f"params[{name!r}] must be a tensor (B, ...), got {tensor!r}")
            if tensor.shape[0] != first.shape[0] or tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(f"params[{name!r}] is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; the "
                                 f"first is {tuple(first.shape)} {first.dtype} on {first.device}")
        self.functions = first.shape[0]
        self.shapes = {name: tensor.shape for name, tensor in params.items()}
        self.sizes = [tensor.numel() for tensor in params.values()]

    def join(self, params):
        """dict of (B, ...) -> (N,)"""
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def split(self, theta):
        """(N,) -> dict of (B, ...), views"""
        parts = theta.split(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def losses(self, loss, theta, step):
        """Losses (B,) of the functions at theta (N,)."""
        losses = loss(self.split(theta), step)
        if not isinstance(losses, torch.Tensor) or losses.shape != (self.functions,):
            raise ValueError(f"loss must return a tensor of shape ({self.functions},), one loss for each function, got "
                             f"{tuple(losses.shape) if isinstance(losses, torch.Tensor) else losses!r}")
        return losses

    def losses_and_gradient(self, loss, theta, step):
        """Losses (B,) and ∇ (N,) of their sum, each function's own gradient; no graph."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            losses = self.losses(loss, theta, step)
            (gradient,) = torch.autograd.grad(losses.sum(), theta)
        return losses.detach(), gradient

    def subset(self, fraction, generator):
        """A random share of every tensor's coordinates, at least SMALLEST_SHARE of each: indices, and 1 / probability."""
        indices, weights, start = [], [], 0
        for size in self.sizes:
            kept = min(size, max(math.ceil(fraction * size), SMALLEST_SHARE))
            indices.append(torch.randperm(size, generator=generator)[:kept] + start)
            weights.append(torch.full((kept,), size / kept))
            start += size
        return torch.cat(indices), torch.cat(weights)


# The meta-gradient ----------------------------------------------------------------------------------------------------


class WindowInfo(NamedTuple):
    """What a window of the unroll leaves behind; nothing carries a graph."""

    losses: torch.Tensor  # (unroll + 1, B): f(θ_0) … f(θ_T) of the window
    params: dict  # the end of the window, to start the next one from
    state: object


def meta_gradient(net, batch, params, state, step=0, unroll=20, method="replay", second_order=False, weights=None,
                  replay_fraction=1.0, generator=None):
    """The meta-gradient of one window: `unroll` updates of the optimizee, differentiated with respect to the optimizer.

    The meta-loss is the mean over functions of Σ_{t=0..T} w_t f_t(θ_t), the end of the window included. The optimizee's
    gradient ∇_t counts as a constant input of the optimizer (the paper drops those edges of the graph), unless
    `second_order`.

    "replay" unrolls without a graph and keeps the gradients ∇_t. Since they are constants, the adjoint of θ_{t+1} is
    λ_{t+1} = Σ_{s>t} w_s ∇_s, and dL/dφ = Σ_t ⟨λ_{t+1}, ∂g_t/∂φ⟩: the optimizer is run once more over the recorded
    gradients and λ is pulled back through it. "autograd" differentiates the whole window as one graph; it is exact too,
    slower, and what the replay is tested against.

    Args:
        net: the learned optimizer; its parameters' `.grad` are not touched.
        batch: a meta-batch, with `loss(params, step) -> (B,)`.
        params: dict of (B, ...), where the window starts; not changed.
        state: the optimizer's state there (`net.init_state(N)` at the first window); not changed.
        step: number of the window's first step, at least 0.
        unroll: T, updates in the window; positive.
        method: "replay" or "autograd".
        second_order: let ∇_t carry its own graph; needs "autograd".
        weights: (T + 1,), w_t; default all 1.
        replay_fraction: in (0, 1]: replay over a random share of the coordinates, drawn anew in every call, each
            weighted by 1 / its probability. The meta-gradient is a sum over coordinates, so this is an unbiased
            estimate of it, at that share of the replay's cost. Small tensors keep all their coordinates. Needs
            "replay" and a network with `coordinatewise = True` (the last axis of its state's tensors is N).
        generator: a CPU generator for that draw; default torch's own.

    Returns:
        grads, a dict like `net.named_parameters()` (those that require grad), and `WindowInfo`. No graph.

    Raises:
        ValueError, TypeError: an argument is not as above.
        NonFiniteError: a loss in the window is infinite or NaN.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> net, batch = CoordinatewiseLSTM(), Quadratics(dim=10).sample(16)
        >>> grads, info = meta_gradient(net, batch, batch.params, net.init_state(160))
        >>> grads, info = meta_gradient(net, batch, info.params, info.state, step=20)

    Reference: Andrychowicz et al. 2016, section 2 and figure 2.
    """
    check_count(unroll=unroll)
    check_count(least=0, step=step)
    if method not in ("replay", "autograd"):
        raise ValueError(f'method must be "replay" or "autograd", got {method!r}')
    if second_order and method == "replay":
        raise ValueError('second_order=True needs method="autograd": the replay takes the gradients as constants')
    check_replay_fraction(replay_fraction, method, net)
    coordinates = Coordinates(params)
    theta = coordinates.join(params).detach()
    weights = torch.ones(unroll + 1) if weights is None else torch.as_tensor(weights)
    if weights.shape != (unroll + 1,):
        raise ValueError(f"weights must have shape ({unroll + 1},) for unroll {unroll}, got {tuple(weights.shape)}")
    weights = weights.to(theta) / coordinates.functions
    if method == "replay":
        grads, losses, theta, state = replay_window(net, batch.loss, coordinates, theta, state, step, weights,
                                                    replay_fraction, generator)
    else:
        grads, losses, theta, state = autograd_window(net, batch.loss, coordinates, theta, state, step, weights,
                                                      second_order)
    if not torch.isfinite(losses).all():
        t, function = (~torch.isfinite(losses)).nonzero()[0].tolist()
        raise NonFiniteError(f"the loss of function {function} at step {step + t} is {losses[t, function].item()}")
    return grads, WindowInfo(losses, coordinates.split(theta), state)


@torch.no_grad()
def replay_window(net, loss, coordinates, theta, state, step, weights, fraction, generator):
    unroll, start = len(weights) - 1, state
    losses, gradients = theta.new_empty(unroll + 1, coordinates.functions), theta.new_empty(unroll + 1, len(theta))
    for t in range(unroll):
        losses[t], gradients[t] = coordinates.losses_and_gradient(loss, theta, step + t)
        update, state = net(gradients[t], state)
        theta = theta + update
    losses[-1], gradients[-1] = coordinates.losses_and_gradient(loss, theta, step + unroll)
    # λ_{t+1} = Σ_{s>t} w_s ∇_s: a cumulative sum from the end
    adjoint, inputs = (weights[1:, None] * gradients[1:]).flip(0).cumsum(0).flip(0), gradients[:-1]
    if fraction < 1:
        kept, factor = (tensor.to(theta.device) for tensor in coordinates.subset(fraction, generator))
        inputs, adjoint = inputs[:, kept], adjoint[:, kept] * factor.to(theta)
        start = map_tensors(lambda tensor: tensor[..., kept], start)
    replay = getattr(net, "replay", None) or (lambda *recorded: replay_by_autograd(net, *recorded))
    return replay(inputs, start, adjoint), losses, theta, map_tensors(torch.Tensor.detach, state)


@torch.enable_grad()
def replay_by_autograd(net, grads, state, adjoint):
    """Gradient of Σ_t ⟨adjoint_t, update_t⟩ for any optimizer: run it over grads (T, N) again, with a graph."""
    updates, state = [], map_tensors(torch.Tensor.detach, state)
    for grad in grads:
        update, state = net(grad, state)
        updates.append(update)
    return gradients_of((torch.stack(updates) * adjoint).sum(), net)


@torch.enable_grad()
def autograd_window(net, loss, coordinates, theta, state, step, weights, second_order):
    unroll, losses = len(weights) - 1, []
    theta, state = theta.requires_grad_(), map_tensors(torch.Tensor.detach, state)
    for t in range(unroll + 1):
        losses.append(coordinates.losses(loss, theta, step + t))
        if t < unroll:
            (gradient,) = torch.autograd.grad(losses[-1].sum(), theta, create_graph=second_order, retain_graph=True)
            update, state = net(gradient, state)
            theta = theta + update
    losses = torch.stack(losses)
    grads = gradients_of((weights[:, None] * losses).sum(), net)
    return grads, losses.detach(), theta.detach(), map_tensors(torch.Tensor.detach, state)


def gradients_of(value, net):
    """Gradients of a scalar as a dict like `net.named_parameters()`; zeros for parameters it does not depend on."""
    wanted = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(parameter) if grad is None else grad
            for (name, parameter), grad in zip(wanted.items(), grads)}


def check_replay_fraction(fraction, method, net):
    if not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
        raise ValueError(f"replay_fraction must be a number in (0, 1], got {fraction!r}")
    if fraction < 1 and (method != "replay" or not getattr(net, "coordinatewise", False)):
        raise ValueError(f'replay_fraction={fraction} needs method="replay" and a network with coordinatewise = True')
