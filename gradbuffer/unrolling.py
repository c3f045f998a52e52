"""The optimizee as one vector of coordinates, and its optimization by a learned optimizer, step by step.

A meta-batch's parameters, a dict of tensors (B, ...), lie one after the other in one vector of N = B × n coordinates,
each tensor flattened; gradients, updates and states follow that order. θ_{t+1} = θ_t + g_t, (g_t, h_{t+1}) = m(∇_t, h_t; φ)
is Andrychowicz et al. 2016 (arXiv 1606.04474), section 2. Losses and rules are those of `contracts`.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from gradbuffer.devices import drawn_on_cpu
from gradbuffer.nests import map_tensors, tensors_in

__all__ = [
    "Coordinates",
    "Recorded",
    "check_objective",
    "gradients_of",
    "in_place",
    "join_reads",
    "pull_back_by_autograd",
    "record_by_steps",
    "replay_by_autograd",
    "multiply_by_slopes",
    "apply_objective",
    "trained",
    "unroll",
]

SMALLEST_SHARE = 1024  # coordinates of a tensor that a partial replay reads at least


class Coordinates:
    """How a dict of parameters (B, ...) lies in one vector (N,)."""

    # added to the number of a step that a network reads; a tensor in a captured window
    first_step: int | torch.Tensor = 0

    def __init__(self, params: dict[str, torch.Tensor]):
        if not isinstance(params, dict) or not params:
            raise TypeError(f"params must be a dict from name to tensor (B, ...), got {type(params).__name__}")
        first = next(iter(params.values()))
        for name, tensor in params.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dim() < 1:
                raise TypeError(f"params[{name!r}] must be a tensor (B, ...), got {tensor!r}")
            if tensor.shape[0] != first.shape[0] or tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(
                    f"params[{name!r}] is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; the "
                    f"first is {tuple(first.shape)} {first.dtype} on {first.device}"
                )
        self.functions = first.shape[0]
        self.shapes = {name: tensor.shape for name, tensor in params.items()}
        self.sizes = [tensor.numel() for tensor in params.values()]

    def part(self, first: int, last: int) -> tuple["Coordinates", list[tuple[int, int]]]:
        """`Coordinates` of functions first … last - 1 alone, and where they are in the vector: a list of (start, stop)."""
        part, spans, start = copy.copy(self), [], 0
        part.functions = last - first
        part.shapes = {name: torch.Size([last - first, *shape[1:]]) for name, shape in self.shapes.items()}
        part.sizes = [size // self.functions * part.functions for size in self.sizes]
        for size in self.sizes:
            spans.append((start + size // self.functions * first, start + size // self.functions * last))
            start += size
        return part, spans

    def join(self, params: dict[str, torch.Tensor]) -> torch.Tensor:
        """dict of (B, ...) -> (N,)"""
        parts = [params[name].reshape(-1) for name in self.shapes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N,) -> dict of (B, ...), views"""
        if len(self.sizes) == 1:
            ((name, shape),) = self.shapes.items()
            return {name: theta.view(shape)}
        parts = torch.split_with_sizes(theta, self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def losses(self, loss: Any, theta: torch.Tensor, step: int) -> torch.Tensor:
        """Losses (B,) of the functions at theta (N,)."""
        losses = loss(self.split(theta), step)
        if not isinstance(losses, torch.Tensor) or losses.shape != (self.functions,):
            raise ValueError(
                f"loss must return a tensor of shape ({self.functions},), one loss for each function, got "
                f"{tuple(losses.shape) if isinstance(losses, torch.Tensor) else losses!r}"
            )
        return losses

    def losses_and_gradient(self, loss: Any, theta: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B,) and ∇ (N,) of their sum, each function's own gradient; no graph.

        `Loss.with_vector_gradient` or `Loss.with_gradient` gives both; where they do not, autograd does.
        """
        found = loss.with_vector_gradient(theta.detach(), self.shapes, step)
        if found is not None:
            return found
        found = loss.with_gradient(self.split(theta.detach()), step)
        if found is not None:
            return found[0], self.join(found[1])
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            losses, gradient = self.losses(loss, theta, step), None
            if losses.requires_grad:
                (gradient,) = torch.autograd.grad(losses.sum(), theta, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"loss must depend on the parameters {list(self.shapes)} that it is given, and let autograd see it; got "
                f"losses without a gradient by them at step {step}"
            )
        return losses.detach(), gradient

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """One value for each function (..., B) -> one for each coordinate (..., N)."""
        return torch.cat([values.repeat_interleave(size // self.functions, -1) for size in self.sizes], -1)

    def first_of_each(self, values: torch.Tensor) -> torch.Tensor:
        """The way back: one value for each coordinate (N,) -> one for each function (B,)."""
        return values[: self.sizes[0]].view(self.functions, -1)[:, 0]

    def what(
        self, reads: Iterable[str], theta: torch.Tensor | None, losses: torch.Tensor | None, step: int
    ) -> dict[str, Any]:
        """What a network that `reads` these is given beside gradient and state, see `Rule`."""
        given = {"params": theta} if "params" in reads else {}
        if "loss" in reads:
            given["loss"] = self.spread(losses)
        if "step" in reads:
            given["step"] = self.first_step + step
        return given

    def pull_back_reads(self, adjoints: dict[str, torch.Tensor], gradient: torch.Tensor) -> torch.Tensor:
        """The adjoint of θ (N,) from those of what a network read: of "params" (N,), and of "loss" (N,) through ∇."""
        total = adjoints.get("params", torch.zeros_like(gradient))
        if "loss" in adjoints:
            of_each = [part.view(self.functions, -1).sum(1) for part in adjoints["loss"].split(self.sizes)]
            total = total + self.spread(sum(of_each)) * gradient
        return total

    def norms(self, vectors: torch.Tensor) -> torch.Tensor:
        """(T, N) -> (T, B), the norm of each function's part."""
        parts = [part.view(len(vectors), self.functions, -1) for part in vectors.split(self.sizes, 1)]
        return torch.cat(parts, 2).norm(dim=2)

    def hessian_product(self, loss: Any, theta: torch.Tensor, step: int, vector: torch.Tensor) -> torch.Tensor:
        """H v (N,), with H the Hessian of the sum of the functions' losses at theta; no graph."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            losses = self.losses(loss, theta, step)
            (gradient,) = torch.autograd.grad(losses.sum(), theta, create_graph=True)
            if not gradient.requires_grad:  # a linear loss
                return torch.zeros_like(theta)
            (product,) = torch.autograd.grad(gradient, theta, vector, allow_unused=True)
        return torch.zeros_like(vector) if product is None else product

    @drawn_on_cpu
    def subset(self, fraction: float, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A random share of every tensor's coordinates, at least SMALLEST_SHARE of each: indices, and 1 / probability."""
        indices, weights, start = [], [], 0
        for size in self.sizes:
            kept = min(size, max(math.ceil(fraction * size), SMALLEST_SHARE))
            indices.append(torch.randperm(size, generator=generator)[:kept] + start)
            weights.append(torch.full((kept,), size / kept))
            start += size
        return torch.cat(indices), torch.cat(weights)


# The unrolled optimization ----------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """A window without a graph: what `Rule.record` gives."""

    losses: torch.Tensor  # (updates + 1, B)
    gradients: torch.Tensor  # (updates + 1, N), ∇ at each step
    theta: torch.Tensor  # (N,), the end
    state: Any  # the optimizer's there
    tape: Any = None  # what its `replay` may want to be given
    read: dict | None = None  # what it read at each step but the last


def unroll(
    rule: Any,
    loss: Any,
    coordinates: Coordinates,
    theta: torch.Tensor,
    state: Any,
    step: int,
    updates: int,
    keep_states: bool = False,
    advance: Callable | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]]:
    """Yield (losses (B,), ∇ (N,), θ (N,), state) at steps step … step + updates, with an update after each but the last.

    The state given is not changed. Those yielded are overwritten by the next step, where the network can do that, unless
    `keep_states`. advance: (gradient, state) -> (update, next state), instead of the network's. Run it under
    `torch.no_grad()`.
    """
    take = advance or rule
    for t in range(updates + 1):
        if t == 1 and rule.overwrites and not (advance or keep_states):
            take = in_place(rule, state)
        losses, gradient = coordinates.losses_and_gradient(loss, theta, step + t)
        yield losses, gradient, theta, state
        if t < updates:
            update, state = take(gradient, state, **coordinates.what(rule.reads, theta, losses, step + t))
            theta = theta + update


def in_place(rule: Any, state: Any) -> Callable:
    """(gradient, state) -> (update, state) for this state, which every step overwrites."""
    step = rule.stepper(state)
    return lambda gradient, state, **read: (step(gradient, **read), state)


def record_by_steps(
    rule: Any,
    loss: Any,
    coordinates: Coordinates,
    theta: torch.Tensor,
    state: Any,
    step: int,
    updates: int,
    advance: Callable | None = None,
    tape: Any = None,
) -> Recorded:
    """`Rule.record`, step by step. advance: as of `unroll`; tape: what goes with it."""
    losses, read = [], []
    gradients = theta.new_empty(updates + 1, len(theta)) if theta.is_cpu else [None] * (updates + 1)
    for values, gradient, theta, state in unroll(rule, loss, coordinates, theta, state, step, updates, advance=advance):
        if len(losses) < updates and rule.reads:
            read.append(coordinates.what(rule.reads, theta, values, step + len(losses)))
        gradients[len(losses)] = gradient
        losses.append(values)
    gradients = gradients if theta.is_cpu else torch.stack(gradients)  # one launch, not one for each step
    return Recorded(torch.stack(losses), gradients, theta, state, tape, join_reads(read))


def join_reads(read: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A list of what was read at each step -> a dict of it all, None if nothing was."""
    if not read:
        return None
    return {
        name: torch.stack([step[name] for step in read]) if name != "step" else [step[name] for step in read]
        for name in read[0]
    }


def read_at(read, t):
    """What was read at step t of those recorded, as keyword arguments."""
    return {} if read is None else {name: values[t] for name, values in read.items()}


def apply_objective(losses: torch.Tensor, objective: str | Callable) -> torch.Tensor:
    """What the meta-loss adds up, elementwise: the losses, their logarithms, or an own function of them."""
    return losses if objective == "sum" else losses.log() if objective == "log" else objective(losses)


def multiply_by_slopes(
    pulls: torch.Tensor, losses: torch.Tensor, objective: str | Callable, coordinates: Coordinates
) -> torch.Tensor:
    """Times the derivative of `apply_objective` by the losses (T, B), in place: of the pulls w_t ∇_t (T, N)."""
    if objective == "log":
        pulls /= coordinates.spread(losses)
    elif objective != "sum":
        with torch.enable_grad():
            losses = losses.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(apply_objective(losses, objective).sum(), losses)
        pulls *= coordinates.spread(slopes)
    return pulls


def check_objective(objective: Any) -> None:
    if objective not in ("sum", "log") and not callable(objective):
        raise ValueError(f'objective must be "sum" or "log", or a function of the losses, got {objective!r}')


# Differentiating the optimizer by autograd -----------------------------------------------------------------------------


@torch.enable_grad()
def replay_by_autograd(
    rule: Any, grads: torch.Tensor, state: Any, adjoint: torch.Tensor, read: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """`Rule.replay` for any network: run it over grads (T, N) again, with a graph."""
    updates, state = [], map_tensors(torch.Tensor.detach, state)
    for t, grad in enumerate(grads):
        update, state = rule(grad, state, **read_at(read, t))
        updates.append(update)
    return gradients_of((torch.stack(updates) * adjoint).sum(), rule)


def pull_back_by_autograd(
    rule: Any,
    grad: torch.Tensor,
    state: Any,
    adjoint: torch.Tensor,
    next_adjoints: list[torch.Tensor],
    read: dict[str, Any] | None = None,
) -> tuple:
    """`Rule.pull_back` for any network: run the step again, with a graph."""
    wanted, read = trained(rule), read or {}
    with torch.enable_grad():
        grad = grad.detach().requires_grad_()
        beside = {
            name: value.detach().requires_grad_() for name, value in read.items() if isinstance(value, torch.Tensor)
        }
        state = map_tensors(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), state)
        before = tensors_in(state)
        update, after = rule(grad, state, **{**read, **beside})
        ends = [
            (end, d) for end, d in zip([update, *tensors_in(after)], [adjoint, *next_adjoints]) if end.requires_grad
        ]
        leaves = [grad, *before, *wanted.values(), *beside.values()]
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        grads = (
            torch.autograd.grad([end for end, _ in ends], asked, [d for _, d in ends], allow_unused=True)
            if ends
            else []
        )
        found = dict(zip(map(id, asked), grads))
    pulled = [torch.zeros_like(leaf) if found.get(id(leaf)) is None else found[id(leaf)] for leaf in leaves]
    first = 1 + len(before)
    parts = pulled[0], pulled[1:first], dict(zip(wanted, pulled[first:]))
    return (*parts, dict(zip(beside, pulled[first + len(wanted) :]))) if rule.reads else parts


def trained(rule: Any) -> dict:
    """dict from name to parameter, of those that require grad."""
    return {name: parameter for name, parameter in rule.named_parameters() if parameter.requires_grad}


def gradients_of(value: torch.Tensor, rule: Any) -> dict[str, torch.Tensor]:
    """Gradients of a scalar as a dict like `named_parameters()`; zeros for parameters it does not depend on."""
    wanted = trained(rule)
    depends = value.requires_grad  # a network may leave such parameters to a rule without weights
    grads = torch.autograd.grad(value, list(wanted.values()), allow_unused=True) if depends else [None] * len(wanted)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(wanted.items(), grads)
    }
