"""The optimizee as one vector of coordinates, and its optimization by a learned optimizer, step by step.

A meta-batch's parameters, a dict of tensors (B, ...), lie one after the other in one vector of N = B × n coordinates,
each tensor flattened; gradients, updates and states follow that order. θ_{t+1} = θ_t + g_t, (g_t, h_{t+1}) = m(∇_t, h_t; φ)
is Andrychowicz et al. 2016 (arXiv 1606.04474), section 2. Nothing here carries a graph.
"""

import copy
import inspect
import math
from typing import Callable, NamedTuple

import torch


__all__ = ["Coordinates", "MetaBatch", "bound", "in_parts", "part_of", "record", "stepper", "unroll"]

SMALLEST_SHARE = 1024  # coordinates of a tensor that a partial replay reads at least


class MetaBatch(NamedTuple):
    """B functions: initial `params`, each (B, ...), and `loss(params, step) -> (B,)`, which carries a graph.

    `part(first, last)`, if there is one, gives functions first … last - 1 as a meta-batch of their own, with the very
    losses that they have in the whole: what several processes share a meta-batch by.

    A loss may be an object that also has `with_gradient(params, step)`, which returns the losses (B,) and the gradient of
    their sum, a dict like params, without a graph: for functions so small that autograd costs more than they do. It may have
    `with_vector_gradient(theta, shapes, step)` beside it, which does the same for the vector θ (N,) of `unrolling.Coordinates`,
    where the parameters of these shapes lie one after the other, and returns ∇ (N,), or None where it cannot. With
    `tensors(step)` and `of(tensors)` its windows can be captured, see `cuda_graphs.CapturedWindow`. If it is ‖Wθ − y‖² of the
    only parameter (B, n), whatever its name, at every step, it may say so by `quadratics`, the tensors W (B, n, n), y (B, n, 1)
    and 2 Wᵀ: then windows are unrolled by `numba_quadratics` where they can be. If it is that of a perceptron, it may say so by
    `perceptrons(shapes)`, see `PerceptronLoss`. With `part(first, last)`, the loss of those functions alone, a window may take
    some functions to its end before it takes the others, or several threads may take some each.
    """

    params: dict
    loss: Callable
    part: Callable | None = None


def in_parts(params, loss):
    """A meta-batch of a loss that has parts."""

    def part(first, last):
        return MetaBatch({name: tensor[first:last] for name, tensor in params.items()}, loss.part(first, last))

    return MetaBatch(params, loss, part)


def part_of(batch, first, last):
    """Functions first … last - 1 of a meta-batch.

    A batch without `part` computes the losses of all its functions and gives those asked for: right, but the
    optimizees' own time is not shared among the ranks.
    """
    if getattr(batch, "part", None) is not None:
        return batch.part(first, last)
    return PartOfBatch(batch, first, last)


class PartOfBatch:
    def __init__(self, batch, first, last):
        self.batch, self.first, self.last = batch, first, last
        self.params = {name: tensor[first:last] for name, tensor in batch.params.items()}

    def loss(self, params, step):
        whole = {name: torch.cat([tensor[:self.first], params[name], tensor[self.last:]])
                 for name, tensor in self.batch.params.items()}
        return self.batch.loss(whole, step)[self.first:self.last]


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

    def part(self, first, last):
        """`Coordinates` of functions first … last - 1 alone, and where they are in the vector: a list of (start, stop)."""
        part, spans, start = copy.copy(self), [], 0
        part.functions = last - first
        part.shapes = {name: torch.Size([last - first, *shape[1:]]) for name, shape in self.shapes.items()}
        part.sizes = [size // self.functions * part.functions for size in self.sizes]
        for size in self.sizes:
            spans.append((start + size // self.functions * first, start + size // self.functions * last))
            start += size
        return part, spans

    def join(self, params):
        """dict of (B, ...) -> (N,)"""
        parts = [params[name].reshape(-1) for name in self.shapes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, theta):
        """(N,) -> dict of (B, ...), views"""
        if len(self.sizes) == 1:
            ((name, shape),) = self.shapes.items()
            return {name: theta.view(shape)}
        parts = torch.split_with_sizes(theta, self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def losses(self, loss, theta, step):
        """Losses (B,) of the functions at theta (N,)."""
        losses = loss(self.split(theta), step)
        if not isinstance(losses, torch.Tensor) or losses.shape != (self.functions,):
            raise ValueError(f"loss must return a tensor of shape ({self.functions},), one loss for each function, got "
                             f"{tuple(losses.shape) if isinstance(losses, torch.Tensor) else losses!r}")
        return losses

    def losses_and_gradient(self, loss, theta, step):
        """Losses (B,) and ∇ (N,) of their sum, each function's own gradient; no graph.

        A loss that has `with_gradient(params, step)`, or `with_vector_gradient`, gives both, in tensors that the next step leaves
        alone; autograd does it for others. See `optimizees.MetaBatch`.
        """
        if hasattr(loss, "with_vector_gradient"):
            found = loss.with_vector_gradient(theta.detach(), self.shapes, step)
            if found is not None:
                return found
        if hasattr(loss, "with_gradient"):
            losses, gradients = loss.with_gradient(self.split(theta.detach()), step)
            return losses, self.join(gradients)
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            losses, gradient = self.losses(loss, theta, step), None
            if losses.requires_grad:
                (gradient,) = torch.autograd.grad(losses.sum(), theta, allow_unused=True)
        if gradient is None:
            raise ValueError(f"loss must depend on the parameters {list(self.shapes)} that it is given, and let autograd see it; got "
                             f"losses without a gradient by them at step {step}")
        return losses.detach(), gradient

    def spread(self, values):
        """One value for each function (..., B) -> one for each coordinate (..., N)."""
        return torch.cat([values.repeat_interleave(size // self.functions, -1) for size in self.sizes], -1)

    def norms(self, vectors):
        """(T, N) -> (T, B), the norm of each function's part."""
        parts = [part.view(len(vectors), self.functions, -1) for part in vectors.split(self.sizes, 1)]
        return torch.cat(parts, 2).norm(dim=2)

    def hessian_product(self, loss, theta, step, vector):
        """H v (N,), with H the Hessian of the sum of the functions' losses at theta; no graph."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            losses = self.losses(loss, theta, step)
            (gradient,) = torch.autograd.grad(losses.sum(), theta, create_graph=True)
            if not gradient.requires_grad:  # a linear loss
                return torch.zeros_like(theta)
            (product,) = torch.autograd.grad(gradient, theta, vector, allow_unused=True)
        return torch.zeros_like(vector) if product is None else product

    def subset(self, fraction, generator):
        """A random share of every tensor's coordinates, at least SMALLEST_SHARE of each: indices, and 1 / probability."""
        indices, weights, start = [], [], 0
        for size in self.sizes:
            kept = min(size, max(math.ceil(fraction * size), SMALLEST_SHARE))
            indices.append(torch.randperm(size, generator=generator)[:kept] + start)
            weights.append(torch.full((kept,), size / kept))
            start += size
        return torch.cat(indices), torch.cat(weights)


def bound(net, coordinates):
    """The network for parameters that lie like this, if it tells them apart (see `per_kind`); else as it is."""
    return net.bind(coordinates) if hasattr(net, "bind") else net


def unroll(net, loss, coordinates, theta, state, step, updates, keep_states=False, advance=None):
    """Yield (losses (B,), ∇ (N,), θ (N,), state) at steps step … step + updates, with an update after each but the last.

    The state given is not changed. Those yielded are overwritten by the next step, where the network can do that, unless
    `keep_states`. advance: (gradient, state) -> (update, next state), instead of the network's. Run it under
    `torch.no_grad()`.
    """
    take = advance or net
    for t in range(updates + 1):
        if t == 1 and not (advance or keep_states):
            take = stepper(net, state)
        losses, gradient = coordinates.losses_and_gradient(loss, theta, step + t)
        yield losses, gradient, theta, state
        if t < updates:
            update, state = take(gradient, state)
            theta = theta + update


def record(net, loss, coordinates, theta, state, step, updates, keep):
    """The same to its end: losses (updates + 1, B), gradients ∇ (updates + 1, N), θ and the state there, and with `keep`
    what the network may want to be given at their replay, as `room`, or None.

    Quadratics and perceptrons go through all steps in one compiled loop where the network can do that.
    """
    for kind in ("quadratics", "perceptrons"):
        if hasattr(net, f"record_{kind}") and hasattr(loss, kind):
            recorded = getattr(net, f"record_{kind}")(getattr(loss, kind), coordinates, theta, state, step, updates, keep)
            if recorded is not None:
                return recorded
    losses, gradients, advance, room = [], theta.new_empty(updates + 1, len(theta)), None, None
    if hasattr(net, "recorder"):
        take, own, room = net.recorder(state, updates if keep else None)
        advance = lambda gradient, state: (take(gradient), own)  # noqa: E731
    for values, gradient, theta, state in unroll(net, loss, coordinates, theta, state, step, updates, advance=advance):
        gradients[len(losses)] = gradient
        losses.append(values)
    return torch.stack(losses), gradients, theta, state, room


def stepper(net, state):
    """step(gradient, state) -> (update, next state), to be given this state and then its own: the network itself, or
    where it can do that, a step that overwrites `state`."""
    if hasattr(net, "stepper"):
        step = net.stepper(state)
        return lambda gradient, state: (step(gradient), state)
    if "inplace" in inspect.signature(net.forward).parameters:
        return lambda gradient, state: net(gradient, state, inplace=True)
    return net
