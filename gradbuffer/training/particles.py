"""Functions on their way under weights of the optimizer of their own, forward only: what evolution strategies run.

Each function has as many particles as there are sets of weights that it is run with; all particles of a family are one computation,
in plain torch, on a CPU with compiled steps of the optimizer, or for perceptrons there in one compiled loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from gradbuffer.contracts import Loss, as_loss, as_rule
from gradbuffer.kernels.choice import load, takes_numba
from gradbuffer.nests import tensors_in
from gradbuffer.nets.mlp import MLPOptimizer
from gradbuffer.unrolling import Coordinates

__all__ = ["CompiledParticles", "CompiledSteps", "Particles", "Span", "particles_for"]


STEPS = "gradbuffer.kernels.numba_mlp:ParticleSteps"


class Span(NamedTuple):
    """Neighbouring functions that are at the same step."""

    first: int
    last: int  # the one behind the last
    loss: Loss  # of these functions
    step: int  # how many they have done


class Particles:
    """Particles of one family in plain torch. Particle f · copies + c is function f under the c-th set of weights.

    Args:
        net: the learned optimizer, which is tensorwise.
        params: dict from name to tensor (F, ...), parameters of F functions; only shapes, dtype and device are taken of them.
        copies: sets of weights.
    """

    def __init__(self, net: nn.Module, params: dict[str, torch.Tensor], copies: int):
        self.net, self.copies = net, copies
        self.reads = as_rule(net).reads
        self.params = {name: value.detach().repeat_interleave(copies, 0) for name, value in params.items()}
        self.state = net.init_state(self.params)

    @torch.no_grad()
    def begin(self, function: int, params: dict[str, torch.Tensor]) -> None:
        """Set the particles of a function to these parameters, a dict of (...), and their state to that before the first step."""
        rows = slice(function * self.copies, (function + 1) * self.copies)
        for name, value in params.items():
            self.params[name][rows] = value
        fresh = self.net.init_state({name: value[rows] for name, value in self.params.items()})
        for whole, part in zip(tensors_in(self.state), tensors_in(fresh)):
            whole[rows] = part

    @torch.no_grad()
    def run(self, spans: list[Span], weights: torch.Tensor, rates: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Take a window of steps.

        Args:
            spans: all functions, one after the other.
            weights: (P, W), those of each of the P particles, in the order of `net.parameters()`; or (W,).
            rates: (P, steps).
            scales: (P,), what the gradients are multiplied by before the optimizer reads them.

        Returns:
            losses (P, steps) on the CPU, before each step; those that are not finite are infinite. No graph.
        """
        like = next(iter(self.params.values()))
        weights, rates, scales = (given.to(like) for given in (weights, rates, scales))
        losses, steps = rates.new_empty(rates.shape), torch.empty(len(rates), dtype=torch.int64)
        for span in spans:
            steps[span.first * self.copies : span.last * self.copies] = span.step
        steps, step, pieces = steps.to(like.device), self.stepper(weights), self.pieces(spans)
        for t in range(rates.shape[1]):
            grads = self.room()
            for rows, loss, first in pieces:
                own = {name: value[rows] for name, value in self.params.items()}
                coordinates = Coordinates(own)
                losses[rows, t], gradient = coordinates.losses_and_gradient(loss, coordinates.join(own), first + t)
                for name, part in coordinates.split(gradient).items():
                    grads[name][rows] = part * scales[rows].view(-1, *[1] * (part.dim() - 1))
            read = {"params": self.params, "step": steps + t, "loss": losses[:, t]}
            step(grads, rates[:, t], {name: read[name] for name in {"params", *self.reads}})
        return losses.cpu().nan_to_num(torch.inf, torch.inf, torch.inf)

    def room(self) -> dict[str, torch.Tensor]:
        """Where a step's gradients come to stand."""
        return {name: torch.empty_like(value) for name, value in self.params.items()}

    def stepper(self, weights: torch.Tensor) -> Callable:
        """A function of (gradients, rates (P,), what the network reads beside) that takes a step of all particles."""

        def step(grads, rates, read):
            updates, self.state = self.net(grads, self.state, lr=rates, weights=weights, **read)
            self.params = {name: value + updates[name] for name, value in self.params.items()}

        return step

    def pieces(self, spans: list[Span]) -> list[tuple[slice | torch.Tensor, Loss, int]]:
        """(which particles, their loss, its step): one computation of all where the losses can be joined, else of all copies of a
        span, or one of each."""
        later = [span.loss.later(span.step) for span in spans]
        if None not in later:
            single = [loss.part(k, k + 1) for span, loss in zip(spans, later) for k in range(span.last - span.first)]
            first, *others = [loss for loss in single for _ in range(self.copies)]
            joined = first.join(others)
            if joined is not None:
                return [(slice(None), joined, 0)]
        return [piece for span in spans for piece in self.pieces_of(span)]

    def pieces_of(self, span: Span) -> list[tuple[torch.Tensor, Loss, int]]:
        """`pieces` of one span."""
        count = span.last - span.first
        rows = torch.arange(span.first * self.copies, span.last * self.copies).view(count, -1).T  # (copies, count)
        joined = span.loss.join([span.loss] * (self.copies - 1))
        if joined is not None:
            return [(rows.flatten(), joined, span.step)]
        return [(row, span.loss, span.step) for row in rows]

    def tensors(self) -> tuple[Any, Any]:
        """Parameters and state, nests of tensors with an axis of particles first."""
        return self.params, self.state

    def go_on(self, params: Any, state: Any) -> None:
        """Take up what `tensors` gave."""
        self.params, self.state = params, state


class CompiledSteps(Particles):
    """The same on a CPU where losses are plain torch and the steps of an `MLPOptimizer` compiled, see `kernels.numba_mlp`."""

    def __init__(self, net: nn.Module, params: dict[str, torch.Tensor], copies: int):
        super().__init__(net, params, copies)
        self.steps, self.grads = load(STEPS)(net, next(iter(params.values())).dtype), super().room()

    def room(self) -> dict[str, torch.Tensor]:
        return self.grads

    def stepper(self, weights: torch.Tensor) -> Callable:
        step = self.steps.bind(self.params, self.grads, self.state, weights)
        return lambda grads, rates, read: step(rates.double())


class CompiledParticles(Particles):
    """The same of perceptrons on a CPU: parameters (P, numbers) and state (P, numbers), see `kernels.numba_mlp_windows`."""

    def __init__(self, windows: Any, data: tuple, batch: int, functions: int, copies: int):
        self.windows, self.data, self.batch, self.copies = windows, data, batch, copies
        self.params = torch.zeros(functions * copies, windows.num_params, dtype=windows.dtype)
        self.state = windows.init_state(functions * copies)

    def begin(self, function: int, params: dict[str, torch.Tensor]) -> None:
        rows = slice(function * self.copies, (function + 1) * self.copies)
        self.params[rows] = self.windows.flatten_params({name: value[None] for name, value in params.items()})
        self.state[rows] = 0

    def run(self, spans: list[Span], weights: torch.Tensor, rates: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        seeds = torch.cat([span.loss.seeds for span in spans])
        steps = torch.cat([torch.full((span.last - span.first,), span.step) for span in spans])
        return self.windows.run(
            weights,
            (self.params, self.state),
            self.data,
            lr=rates,
            steps=rates.shape[1],
            batch=self.batch,
            seeds=seeds.repeat_interleave(self.copies),
            first_steps=steps.repeat_interleave(self.copies),
            gradient_scales=scales,
        )


def particles_for(net: nn.Module, batch: Any, functions: int, copies: int) -> Particles:
    """Particles of so many functions of that meta-batch's kind: compiled ones where there are such."""
    params = {name: value[:1].expand(functions, *value.shape[1:]) for name, value in batch.params.items()}
    if type(net) is MLPOptimizer and net.variant == "celo":
        compiled = as_loss(batch.loss).compiled_particles(net)
        if compiled is not None:
            return CompiledParticles(*compiled, functions, copies)
        like = next(iter(params.values()))
        if takes_numba(like) and all(load(STEPS).takes(value.shape[1:]) for value in params.values()):
            return CompiledSteps(net, params, copies)
    return Particles(net, params, copies)
