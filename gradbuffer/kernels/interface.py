"""What runs the LSTM of a learned optimizer without autograd's graph of it: one class for every kind of kernels.

`LSTMKernels` is the plain kind, by `nn.LSTM` and autograd, for every device and dtype; it is what fast kinds are tested
against. A fast kind is a subclass that overrides some of the methods and says, by `reasons_against`, where it does not run.
`choice` picks one for each piece of work. Features lie along rows and coordinates along columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from gradbuffer.devices import memory_of

__all__ = ["Averages", "LSTMKernels", "WORK", "add_gradients"]

WORK = ("step", "replay", "step_back")  # the pieces of work for which kernels are chosen
REPLAY_BLOCK = 1 << 16  # coordinates over which autograd runs at once on a CPU, at most


class Averages(NamedTuple):
    """What a network reads that keeps Adam's moving averages, for kernels that make the readings by themselves.

    Its memory is the averages of ∇, of ∇², and a clock; it reads m̂/√(v̂ + eps²) of each average of ∇ and ∇/√(v̂ + eps²). Its updates are
    scale · tanh(output).
    """

    betas: tuple  # of the averages of ∇
    square_beta: float  # of that of ∇²
    eps: float
    scale: float
    gradient_at: int  # where ∇ is among the averages of ∇
    clock: (
        tuple | None
    )  # (fade, longest): it counts, and log(min(t, longest) / fade) is read; None: it is the average of 1
    layer: nn.Linear | None  # with an ELU, between readings and LSTM

    @property
    def form(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        timed, layer = self.clock is not None, self.layer is not None
        return dict(BETAS=len(self.betas), GRADIENT=self.gradient_at, TIMED=timed, LAYER=layer)


class LSTMKernels:
    """An LSTM and its linear output, of some weights: made of them, and made anew when they have changed.

    Args:
        lstm: of any number of layers, with biases.
        output_weight: (H,), output_bias: () – the output is output_weight · h + output_bias. No graph.
    """

    reads_log_sign: frozenset = (
        frozenset()
    )  # the pieces of work that read gradients and do `log_sign` themselves, given p

    @classmethod
    def reasons_against(
        cls,
        weight: torch.Tensor,
        work: str,
        *,
        state: torch.dtype | None = None,
        squash: bool = False,
        inputs: bool = False,
        lstm: nn.LSTM | None = None,
        p: float = 0.0,
    ) -> list[str]:
        """Why these kernels do not do a piece of work; empty where they do.

        Args:
            weight: the output's weight (1, H), for its size, dtype and device.
            work: one of `WORK`.
            state: the dtype of the state to be overwritten; None for the weights' own.
            squash: the outputs go through a tanh. inputs: the derivatives by the features are wanted.
            lstm: the LSTM, for its sizes: kernels that must be tried out are. p: of `log_sign`, which the kernels may do.
        """
        return [] if state in (None, weight.dtype) else [f"the state must be of {weight.dtype}, got {state}"]

    def __init__(self, lstm: nn.LSTM, output_weight: torch.Tensor, output_bias: torch.Tensor):
        self.lstm, self.output_weight, self.output_bias = lstm, output_weight, output_bias
        self.hidden, self.inputs, self.layers = lstm.hidden_size, lstm.input_size, lstm.num_layers

    def step(
        self, features: Callable, hidden: torch.Tensor, cells: torch.Tensor, inplace: bool = False, p: float = 0.0
    ):
        """One step of all coordinates.

        Args:
            features: function (start, stop) -> (inputs, width), what those coordinates read; with `p` the gradients (1, width).
            hidden, cells: (layers, H, N), the state; changed only if `inplace`.
            inplace: write the next state over the given one.
            p: of `log_sign`, where `reads_log_sign` has "step"; else 0.

        Returns:
            outputs (N,), and hidden and cells of the next step. No graph.
        """
        with torch.no_grad():
            outputs, *new = self.run(features(0, hidden.shape[-1])[None], hidden, cells)
        return outputs[0], *([old.copy_(part) for old, part in zip((hidden, cells), new)] if inplace else new)

    def stepper(
        self, hidden: torch.Tensor, cells: torch.Tensor, new: tuple | None = None, p: float = 0.0, tape=None
    ) -> Callable:
        """A function that does `step` for features, and returns the outputs (N,), which its next call may overwrite.

        The first step reads that state, and each writes the next one to `new`, hidden and cells like those given; without it
        over those. With a tape, there are no more steps than it is for, and `new` is complete after the last of them.
        """
        before, after = (hidden, cells), new or (hidden, cells)

        def step(features):
            nonlocal before
            outputs, *found = self.step(features, *before, before is after, p)
            if before is not after:
                for old, part in zip(after, found):
                    old.copy_(part)
                before = after
            return outputs

        return step

    def takes_groups(self, p: float) -> bool:
        """Whether there are `group_steps`; p: of `log_sign`, 0 for gradients as they are."""
        return False

    def group_steps(self, p: float, params: list, states: list, watched: list, kept: torch.Tensor | None, reader=None):
        """What takes a `LearnedOptimizer`'s steps of many tensors at once, as `triton_group.GroupSteps`; reader: as of `reader`."""
        raise NotImplementedError

    def reasons_against_reader(self, net, work: str) -> tuple[str, ...]:
        """Why a network that has `averages` must make its readings by itself in a piece of work, "step", "read" or "group"."""
        return ("has no kernels for readings of averages",)

    def reader(self, net, work: str):
        """What makes a network's readings and takes its steps, as `triton_reader.AveragesReader`, where it has `averages` and there are no
        reasons against it; else None."""
        return None

    def tape(self, coordinates: int, steps: int):
        """Room for what so many steps compute and their replay would else compute again; None where nothing is kept."""
        return None

    def replay(
        self,
        features: Callable,
        hidden: torch.Tensor,
        cells: torch.Tensor,
        adjoint: torch.Tensor,
        squash: bool = False,
        pull_inputs: Callable | None = None,
        p: float = 0.0,
        tape=None,
    ):
        """Gradient of Σ_t ⟨adjoint_t, output_t⟩ with respect to the weights, over recorded inputs.

        Args:
            features: function (start, stop) -> (T, inputs, width), what those coordinates read; with `p` the gradients.
            hidden, cells: (layers, H, N), the state at the first step; not changed.
            adjoint: (T, N), the loss's derivative by each output; with `squash` by its tanh.
            pull_inputs: function (start, stop, dfeatures (T, inputs, width)), called with the derivatives by the features.
            p: of `log_sign`, where `reads_log_sign` has "replay"; else 0.
            tape: what the steps that led to this have kept; used up.

        Returns:
            gradients, no graph: of each layer (weight_ih, weight_hh, bias), of output_weight, of output_bias.
        """
        total, size = None, self.replay_block(len(adjoint))
        for start in range(0, adjoint.shape[1], size):
            block = slice(start, start + size)
            dfeatures, _, *parts = self.by_autograd(
                features(start, min(block.stop, adjoint.shape[1])),
                hidden[..., block],
                cells[..., block],
                adjoint[:, block],
                None,
                squash,
                pull_inputs is not None,
            )
            if pull_inputs:
                pull_inputs(start, start + dfeatures.shape[-1], dfeatures)
            total = parts if total is None else add_gradients(total, parts)
        return tuple(total)

    def step_back(
        self,
        features: torch.Tensor,
        hidden: torch.Tensor,
        cells: torch.Tensor,
        adjoint: torch.Tensor,
        dhidden: torch.Tensor,
        dcells: torch.Tensor,
        squash: bool = False,
    ):
        """Backpropagation through one step of all coordinates, which is run again for it.

        Args:
            features: (inputs, N), what the step was fed.
            hidden, cells: (layers, H, N), the state before the step; not changed.
            adjoint: (N,), the loss's derivative by the outputs; with `squash` by their tanh.
            dhidden, dcells: (layers, H, N), its derivative by the state after the step; becomes that by the state before.

        Returns:
            its derivative by the features (inputs, N), and gradients as of `replay`.
        """
        dfeatures, before, *parts = self.by_autograd(
            features[None], hidden, cells, adjoint[None], (dhidden, dcells), squash, True
        )
        for old, new in zip((dhidden, dcells), before):
            old.copy_(new)
        return dfeatures[0], *parts

    def in_parts(self, work: Callable, functions: int, size: int, steps: int) -> list:
        """[work(first, last), ...] over parts of some functions of `size` coordinates each, which do not read each other. Work
        is their windows of so many steps and the replays of these. All are one part unless another way is faster."""
        return [work(0, functions)]

    def window(
        self,
        data,
        theta: torch.Tensor,
        hidden: torch.Tensor,
        cells: torch.Tensor,
        step: int,
        updates: int,
        p: float,
        keep: bool,
    ):
        """A whole window in one compiled loop, of functions that are known by what their loss declares.

        Args:
            data: a `QuadraticData` or `PerceptronData` of `gradbuffer.contracts`, or anything else.
            theta: (N,); hidden, cells: (layers, H, N), the state before the first step; none is changed.
            step: number of the first step. updates: in the window.
            p: of `log_sign`; 0 for gradients as they are.
            keep: `replay` will be asked about these steps.

        Returns:
            losses (updates + 1, B), gradients (updates + 1, N), θ and (hidden, cells) at the end, and a tape or None; no graph.
            None where there is no such loop.
        """
        return None

    # Internals --------------------------------------------------------------------------------------------------------

    def replay_block(self, steps):
        """Coordinates over which autograd runs at once, so that what it keeps of so many steps (of each layer its input, the gates,
        twice, and the states) takes an eighth of the card's memory at most, and on a CPU 4 GiB."""
        weight = self.output_weight
        numbers = steps * (self.inputs + self.layers * 12 * self.hidden)
        fits = max((memory_of(weight.device) >> 3) // (numbers * weight.element_size()), 256)
        return min(fits, REPLAY_BLOCK) if weight.device.type == "cpu" else fits

    def layer_weights(self):
        """Of each layer weight_ih (4H, in), weight_hh (4H, H) and the sum of its biases (4H,), in `nn.LSTM`'s order of gates."""
        with torch.no_grad():
            return [(w.detach(), u.detach(), b + c) for w, u, b, c in self.lstm.all_weights]

    def run(self, features, hidden, cells):
        """`nn.LSTM` over features (T, inputs, N) -> outputs (T, N), and hidden and cells at the end; with a graph if asked."""
        top, (hidden, cells) = self.lstm(features.mT, (hidden.mT.contiguous(), cells.mT.contiguous()))
        return top @ self.output_weight + self.output_bias, hidden.mT, cells.mT

    @torch.enable_grad()
    def by_autograd(self, features, hidden, cells, adjoint, ends, squash, inputs):
        """The derivatives by the features (if asked), by the state before, and the gradients as of `replay`. ends: the
        derivatives by the state after the last step, or None for zeros."""
        given = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in (
                (features, inputs),
                (hidden, ends is not None),
                (cells, ends is not None),
                (self.output_weight, True),
                (self.output_bias, True),
            )
        ]
        plain = LSTMKernels(self.lstm, *given[3:])
        outputs, *after = plain.run(*given[:3])
        layers = [layer[:3] for layer in self.lstm.all_weights]
        asked = [*given, *(part for layer in layers for part in layer)]
        wanted = [tensor for tensor in asked if tensor.requires_grad]  # a frozen weight is not
        heads, pulls = [outputs.tanh() if squash else outputs], [adjoint]
        if ends is not None:
            heads, pulls = heads + after, pulls + list(ends)
        found = dict(zip(map(id, wanted), torch.autograd.grad(heads, wanted, pulls)))
        dfeatures, dhidden, dcells, doutput, dbias, *rest = (
            found.get(id(tensor), torch.zeros_like(tensor)) for tensor in asked
        )
        return dfeatures, (dhidden, dcells), [rest[k : k + 3] for k in range(0, len(rest), 3)], doutput, dbias


def add_gradients(one, other):
    """The sums of two results of `LSTMKernels.replay`."""
    layers = [[a + b for a, b in zip(own, more)] for own, more in zip(one[0], other[0])]
    return layers, one[1] + other[1], one[2] + other[2]
