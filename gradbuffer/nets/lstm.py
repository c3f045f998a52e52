"""What learned optimizers share that are an LSTM with a linear output, run by every coordinate by itself.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2.1. `optimizers.CoordinatewiseLSTM` and those of `normalized` are
such. Where autograd records nothing, the arithmetic is that of `gradbuffer.kernels`; `explain` says which kind of kernels
does what.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradbuffer.checks import check_count, check_finite, sum_is_finite, values_are_checked
from gradbuffer.contracts import Loss, Rule
from gradbuffer.kernels.choice import KINDS, asked_for, kernels_for, load, reasons_against
from gradbuffer.kernels.interface import WORK, Averages, LSTMKernels
from gradbuffer.nests import Snapshot, clone
from gradbuffer.nets.mlp import MLPOptimizer
from gradbuffer.nets.tensorwise import explain_steps
from gradbuffer.unrolling import Coordinates, Recorded, record_by_steps, trained

__all__ = ["LSTMOptimizer", "explain"]


class LSTMOptimizer(Rule, nn.Module):
    """What such optimizers share. A subclass says what the LSTM is fed and what its output z becomes, in four steps:
    `read(grads, memory)` turns gradients into readings, without weights; `embed(readings)` turns those into the LSTM's
    input, perhaps with weights; the LSTM and `output` give z; the update is output_scale · z, or output_scale · tanh(z)
    where the class says `squash`. `memory` is the part of the state that does not belong to the LSTM, a tuple of tensors
    (..., N), of the shapes `memory_shapes` before N.

    What autograd records is up to the caller: under `torch.no_grad()` a step is done by kernels (on a CPU in blocks
    of coordinates that stay in cache), otherwise it goes through `nn.LSTM` and carries a graph.
    """

    coordinatewise = True  # no coordinate reads another's: any subset of them can be replayed by itself
    overwrites = True
    squash = False  # whether the output goes through a tanh
    arguments: tuple = ()  # the constructor's
    memory_shapes: list = []

    def __init__(self, inputs: int, hidden_size: int, num_layers: int):
        super().__init__()
        check_count(hidden_size=hidden_size, num_layers=num_layers)
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.lstm = nn.LSTM(inputs, hidden_size, num_layers)
        self.output = nn.Linear(hidden_size, 1)
        self._packed = None

    def train(self, mode: bool = True) -> "LSTMOptimizer":
        """As of `nn.Module`, but the LSTM stays in training mode: without dropout both are the same, and cuDNN differentiates
        in that one alone."""
        super().train(mode)
        self.lstm.train()
        return self

    @property
    def built_in(self) -> float | None:
        """The `p` with which compiled kernels do by themselves what `read` and `embed` do; None: they cannot do that."""
        return None

    @property
    def averages(self) -> Averages | None:
        """What it reads, squashed and all, where that is Adam's moving averages and some kernels can do it by themselves; else None."""
        return None

    @property
    def state_shapes(self) -> list[tuple]:
        """The shapes of the state's parts, without the coordinates behind."""
        return [(self.num_layers, self.hidden_size)] * 2 + self.memory_shapes

    def init_state(
        self, num_coordinates: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple:
        """The state before the first step: all zeros.

        Args:
            num_coordinates: N, positive: coordinates of the optimizee, all functions of a meta-batch together.
            device, dtype: default to the weights'.

        Returns:
            (hidden, cell, *memory): hidden and cell (num_layers, hidden_size, N), memory as the class says; no graph.
        """
        check_count(num_coordinates=num_coordinates)
        like = self.output.weight
        place = dict(device=device or like.device, dtype=dtype or like.dtype)
        return tuple(torch.zeros(*shape, num_coordinates, **place) for shape in self.state_shapes)

    def forward(self, grad: torch.Tensor, state: tuple, inplace: bool = False) -> tuple[torch.Tensor, tuple]:
        """One step of the optimizer for all coordinates.

        Args:
            grad: (N,), the optimizee's gradient, in the weights' dtype and on their device.
            state: as `init_state` or the previous step returned it; changed only if `inplace`.
            inplace: write the next state over `state` (the same tensors are returned). Not with a graph. It may then
                be stored in a dtype that `renews` says yes to.

        Returns:
            update (N,), to be added to the parameters, and the next state. Both carry a graph back to the weights, to
            `grad` and to `state` when grad mode is on and one of them requires grad; under `torch.no_grad()` neither.

        Raises:
            ValueError: shapes, dtypes or devices do not fit each other, or `inplace` where a graph would be recorded.
            NonFiniteError: `grad` holds an infinity or a NaN.
        """
        self._check(grad, state, (grad.numel(),) if isinstance(grad, torch.Tensor) else None, inplace)
        check_finite(grad, "grad")
        hidden, cell, *memory = state
        if torch.is_grad_enabled() and any(part.requires_grad for part in (grad, *state, *self.parameters())):
            if inplace:
                raise ValueError("inplace=True records no graph: call under torch.no_grad(), or leave it False")
            readings, memory = self.read(grad[None], memory)
            features = self.embed(readings).mT  # (1, N, inputs)
            top, (hidden, cell) = self.lstm(features, (hidden.mT.contiguous(), cell.mT.contiguous()))
            return self.finish(self.output(top))[0, :, 0], (hidden.mT, cell.mT, *memory)
        with torch.no_grad():
            kernels = self.kernels("step", state=hidden.dtype)
            p, after, reader = self._left_to(kernels, "step"), memory, self._reader(kernels, "step", memory)
            if reader:
                new = state if inplace else tuple(map(torch.empty_like, state))
                return reader.step(grad, state, new), tuple(new)
            if p:
                readings = grad[None]
            else:
                readings, after = self.read(grad[None], [part.to(grad.dtype) for part in memory])
                readings = readings[0]
            outputs, hidden, cell = kernels.step(lambda a, b: self.embed(readings[:, a:b]), hidden, cell, inplace, p)
            memory = [old.copy_(new) for old, new in zip(memory, after)] if inplace else after
            return self._finish_packed(outputs), (hidden, cell, *memory)

    def renews(self, dtype: torch.dtype) -> bool:
        """Whether `forward` with `inplace` takes a state stored in that dtype: the weights', and bfloat16 where numba runs the
        step. It computes in the weights' dtype, and rounds at the end."""
        weight = self.output.weight
        return dtype == weight.dtype or any(not reasons_against(name, weight, "step", state=dtype) for name in KINDS)

    def stepper(self, state: tuple) -> Callable[[torch.Tensor], torch.Tensor]:
        """Many steps from one state, without a graph: what does not change from step to step is looked at once.

        Args:
            state: as `init_state` or a step returned it; overwritten by each step with the next one.

        Returns:
            a function of the gradient (N,) that returns the update (N,), as `forward` with `inplace` does; the next call
            may overwrite it. Call it under `torch.no_grad()`, and no more once the weights have changed.

        Raises:
            ValueError: shapes, dtypes or devices do not fit each other.
            NonFiniteError: of the function: the gradient holds an infinity or a NaN.
        """
        self._check(state[0][0, 0], state, state[0].shape[-1:])
        return self._stepper(state, state)

    @property
    def steps_in_groups(self) -> bool:
        if self.averages is not None:
            return self.kernels().reader(self, "group") is not None
        plain = self.built_in is not None and not self.squash and not self.memory_shapes
        return plain and self.kernels().takes_groups(self.built_in)

    def group_steps(self, params: list, states: list, watched: list, kept: torch.Tensor | None) -> Any:
        """See `LSTMKernels.group_steps`."""
        kernels = self.kernels()
        reader = kernels.reader(self, "group") if self.averages is not None else None
        return kernels.group_steps(self.built_in or 0.0, params, states, watched, kept, reader)

    def recorder(
        self, state: tuple, steps: int | None = None
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple, Any]:
        """As `stepper`, but of a state of its own: the one given is not changed.

        Args:
            steps: so many will be taken, and `replay` will be asked about just these; or None.

        Returns:
            the function; the state that it overwrites, complete after the last of the `steps`; and the `tape` for `replay`,
            or None.
        """
        self._check(state[0][0, 0], state, state[0].shape[-1:])
        tape = self.kernels().tape(state[0].shape[-1], steps) if steps else None
        own = *(part.new_empty(part.shape) for part in state[:2]), *map(clone, state[2:])
        return self._stepper(state, own, tape), own, tape

    def in_parts(self, work: Callable, functions: int, size: int, steps: int) -> list:
        """See `Rule.in_parts`: some functions after the others, or several at once, each by a thread of its own."""
        return self.kernels().in_parts(work, functions, size, steps) if functions > 1 else [work(0, functions)]

    def record(
        self,
        loss: Loss,
        coordinates: Coordinates,
        theta: torch.Tensor,
        state: tuple,
        step: int,
        updates: int,
        keep: bool = False,
    ) -> Recorded:
        """See `Rule.record`: in one compiled loop, where there is one for this network and such functions.

        Raises:
            ValueError: shapes do not fit each other.
            NonFiniteError: a gradient holds an infinity or a NaN.
        """
        data, p = loss.compiled(coordinates.shapes), self.built_in
        if data is not None and p is not None:
            self._check(theta, state, tuple(theta.shape))
            window = self.kernels().window(data, theta, *state, step, updates, p, keep)
            if window is not None:
                return with_finite_gradients(Recorded(*window))
        take, own, tape = self.recorder(state, updates if keep else None)
        return record_by_steps(
            self, loss, coordinates, theta, state, step, updates, lambda gradient, state: (take(gradient), own), tape
        )

    def replay(
        self, grads: torch.Tensor, state: tuple, adjoint: torch.Tensor, tape: Any = None, read: dict | None = None
    ) -> dict:
        """See `Rule.replay`. The coordinates are independent, so they go in blocks and memory does not grow with N × T.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(grads, state, (adjoint.shape[0], state[0].shape[-1]))
        if adjoint.shape != grads.shape:
            raise ValueError(f"adjoint must have the shape of grads {tuple(grads.shape)}, got {tuple(adjoint.shape)}")
        wanted = trained(self)
        gradients = self._replay(grads, state, adjoint, wanted, tape)
        return {name: gradients[name] for name in wanted}

    def pull_back(
        self, grad: torch.Tensor, state: tuple, adjoint: torch.Tensor, next_adjoints: list, read: dict | None = None
    ) -> tuple:
        """See `Rule.pull_back`; next_adjoints are overwritten."""
        (hidden, cell, *memory), (dhidden, dcell, *dmemory) = state, next_adjoints
        with torch.enable_grad():
            grad, *memory = (tensor.detach().requires_grad_() for tensor in (grad, *memory))
            readings, new_memory = self.read(grad[None], memory)
            features = self.embed(readings)[0]
        with torch.no_grad():
            kernels = self.kernels("step_back", squash=self.squash)
            dfeatures, *parts = kernels.step_back(
                features.detach(), hidden, cell, self._above(adjoint), dhidden, dcell, self.squash
            )
            gradients = self._names_of(*parts)
        wanted = trained(self)
        rest = [name for name in wanted if name not in gradients]  # those of `embed`
        pulled = torch.autograd.grad(
            [features, *new_memory], [grad, *memory, *(wanted[name] for name in rest)], [dfeatures, *dmemory]
        )
        gradients |= zip(rest, pulled[1 + len(memory) :])
        return pulled[0], [dhidden, dcell, *pulled[1 : 1 + len(memory)]], {name: gradients[name] for name in wanted}

    def finish(self, z: torch.Tensor) -> torch.Tensor:
        """What becomes of the output: the update."""
        return self.output_scale * (z.tanh() if self.squash else z)

    def kernels(
        self, work: str = "step", state: torch.dtype | None = None, squash: bool = False, inputs: bool = False
    ) -> LSTMKernels:
        """What does a piece of work for these weights, made anew only after they have changed; arguments as of
        `LSTMKernels.reasons_against`.

        Whoever says `values_unchecked` calls `repack` if they have, where a device would have to be waited for to see it.
        """
        lstm, output = self.lstm, self.output
        weight, bias = output.weight, output.bias
        weights, scale, kept = [*lstm._flat_weights, weight, bias], self._packed_scale(), self._packed
        # under `functional_call` other tensors stand in the weights' place
        wait = values_are_checked() or kept is not None and any(a is not b for a, b in zip(kept[3], weights))
        if kept is None or kept[0] != scale or not kept[1].holds(weights, wait):
            # the snapshot first: a change in between is then seen
            self._packed = kept = scale, Snapshot(weights), {}, weights
        made, asked = kept[2], (asked_for(), work, state, squash, inputs)
        if asked in made:
            return made[asked]
        sizes = dict(lstm=lstm, p=self.built_in or 0.0)
        kind = kernels_for(weight, work, state=state, squash=squash, inputs=inputs, **sizes)
        if kind not in made:
            with torch.inference_mode(False), torch.no_grad():
                made[kind] = kind(lstm, scale * weight.detach()[0], scale * bias.detach()[0])
        made[asked] = made[kind]
        return made[kind]

    def repack(self) -> None:
        """Have the weights packed anew at the next step, though they may not have changed."""
        self._packed = None

    # Internals --------------------------------------------------------------------------------------------------------

    def _check(self, grad, state, shape, inplace=False):
        if not isinstance(grad, torch.Tensor):
            raise TypeError(f"grad must be a tensor, got {type(grad).__name__}")
        weight, N = self.output.weight, grad.shape[-1] if grad.dim() else 0
        if grad.shape != shape or N == 0:
            raise ValueError(f"grad must have shape (N,) with N ≥ 1, or (T, N) in replay; got {tuple(grad.shape)}")
        names = ["hidden", "cell", *(f"memory[{k}]" for k in range(len(self.memory_shapes)))]
        if not (isinstance(state, (tuple, list)) and len(state) == len(names)):
            raise TypeError(f"state must be init_state's tuple of {len(names)} tensors, hidden and cell first")
        for name, tensor, rows in zip(names, state, self.state_shapes):
            if tensor.shape != (*rows, N):
                raise ValueError(
                    f"state's {name} must have shape {(*rows, N)} for {N} coordinates, got {tuple(tensor.shape)}"
                )
        for name, tensor in (("grad", grad), *(("state", part) for part in state[:2])):
            fits = tensor.dtype == weight.dtype or name == "state" and inplace and self.renews(tensor.dtype)
            if not fits or tensor.device != weight.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, the network {weight.dtype} on "
                    f"{weight.device}: move one of them"
                )

    def _stepper(self, state, own, tape=None):
        """Steps of which the first reads `state`; each overwrites `own`."""
        (hidden, cell), memory, shape = own[:2], own[2:], own[0].shape[-1:]
        kernels = self.kernels()
        p, whole = self._left_to(kernels, "step"), (0, *shape)
        reader = self._reader(kernels, "step", memory)
        run = reader.stepper(state, own) if reader else kernels.stepper(*state[:2], (hidden, cell), p, tape)

        def step(grad):
            if grad.shape != shape or grad.dtype != hidden.dtype:
                self._check(grad, own, tuple(grad.shape))  # says what does not fit
            check_finite(grad, "grad")
            if reader:
                return run(grad)
            readings, after = (grad[None, None], ()) if p else self.read(grad[None], memory)
            for old, new in zip(memory, after):
                old.copy_(new)
            readings = readings[0]
            return self._finish_packed(run(lambda a, b: self.embed(readings if (a, b) == whole else readings[:, a:b])))

        return step

    # The packed weights have output_scale in them, where no tanh comes between: it then costs nothing.

    def _packed_scale(self):
        return 1.0 if self.squash else self.output_scale

    def _finish_packed(self, z):
        """`finish` for what the packed weights give."""
        return self.finish(z) if self.squash else z

    def _above(self, adjoint):
        """The adjoint of an update -> that of what the packed weights give, or of its tanh."""
        return self.output_scale * adjoint if self.squash else adjoint

    def _left_to(self, kernels, work):
        """The p of log_sign where those kernels do it themselves: they are given gradients then. Else 0."""
        return (self.built_in or 0.0) if work in kernels.reads_log_sign else 0.0

    def _reader(self, kernels, work, memory):
        """What makes the readings for those kernels, where they can do it themselves; else None."""
        if self.averages is None or any(part.dtype != self.output.weight.dtype for part in memory):
            return None
        return kernels.reader(self, work)

    def _names_of(self, layers, output_weight, output_bias):
        """Gradients of the packed weights as the kernels give them -> dict by the names of the parameters."""
        scale = self._packed_scale()
        gradients = {"output.weight": scale * output_weight[None], "output.bias": scale * output_bias[None]}
        for l, (ih, hh, bias) in enumerate(layers):
            gradients |= {
                f"lstm.weight_ih_l{l}": ih,
                f"lstm.weight_hh_l{l}": hh,
                f"lstm.bias_ih_l{l}": bias,
                f"lstm.bias_hh_l{l}": bias.clone(),
            }
        return gradients

    @torch.no_grad()
    def _replay(self, grads, state, adjoint, wanted, tape):
        hidden, cell, *memory = state
        own = {
            name: parameter for name, parameter in wanted.items() if not name.startswith(("lstm.", "output."))
        }  # `embed`'s
        kernels, pieces = self.kernels("replay", squash=self.squash, inputs=bool(own)), []
        p, reader = self._left_to(kernels, "replay"), self._reader(kernels, "read", memory)

        def recorded(start, stop):
            return grads[:, start:stop], *(part[..., start:stop] for part in memory)

        def readings(start, stop):
            if p:
                return grads[:, None, start:stop]
            gradients, *before = recorded(start, stop)
            return self.read(gradients, before)[0]

        def features(start, stop):
            return reader.read(*recorded(start, stop)) if reader else self.embed(readings(start, stop))

        def pull_inputs(start, stop, dfeatures):
            if reader:
                found = reader.pull_layer(*recorded(start, stop), dfeatures)
                pieces.append([found[name.rpartition(".")[2] == "bias"] for name in own])
                return
            with torch.enable_grad():
                pieces.append(torch.autograd.grad(self.embed(readings(start, stop)), list(own.values()), dfeatures))

        parts = kernels.replay(
            features, hidden, cell, self._above(adjoint), self.squash, pull_inputs if own else None, p, tape
        )
        return self._names_of(*parts) | {name: sum(piece) for name, piece in zip(own, zip(*pieces))}

    def __getstate__(self):  # packed weights are a cache: not pickled, not copied
        return {**self.__dict__, "_packed": None}


def with_finite_gradients(recorded):
    """What was recorded, or NonFiniteError if a gradient that the network was fed is not finite."""
    if not sum_is_finite(recorded.gradients[:-1]):
        for gradient in recorded.gradients[:-1]:
            check_finite(gradient, "grad")
    return recorded


def explain(net: nn.Module) -> str:
    """Which kind of kernels does what for a learned optimizer where it lies, and why not the others.

    Args:
        net: a learned optimizer; a `PerKind` is explained network by network.

    Returns:
        text, some lines for each LSTM and each `MLPOptimizer`.

    Example:
        >>> from optimizers import CoordinatewiseLSTM
        >>> print(explain(CoordinatewiseLSTM()))
    """
    found = {name: each for name, each in net.named_modules() if isinstance(each, (LSTMOptimizer, MLPOptimizer))}
    if not found:
        return f"{type(net).__name__} has no kernels: its forward runs as it is written, and autograd differentiates it"
    lines = []
    for name, module in found.items():
        weight = next(module.parameters())
        lines.append(f"{name + ': ' if name else ''}{type(module).__name__} of {weight.dtype} on {weight.device}")
        if isinstance(module, MLPOptimizer):
            lines += explain_steps(module)
            continue
        weight = module.output.weight
        for work in WORK:
            needs = dict(lstm=module.lstm, p=module.built_in or 0.0)
            if work != "step":
                needs |= dict(squash=module.squash, inputs=has_weights_below(module))
            reasons = {kind: reasons_against(kind, weight, work, **needs) for kind in KINDS}
            runs = next(kind for kind, against in reasons.items() if not against)
            lines.append(f"  {work}: {runs}")
            lines += [f"    not {kind}: {'; '.join(against)}" for kind, against in reasons.items() if against]
        if module.averages is not None:
            own, asked = module.kernels(), ("step", "read", "group")
            against = {reason: None for work in asked for reason in own.reasons_against_reader(module, work)}
            kind = next(name for name, kind in KINDS.items() if load(kind.place) is type(own))
            lines.append(f"  readings: {'torch' if against else kind}")
            lines += [f"    not {kind}: {'; '.join(against)}"] if against else []
    return "\n".join(lines)


def has_weights_below(net):
    """Whether `embed` has weights, so that the derivatives by the LSTM's inputs are wanted."""
    return any(not name.startswith(("lstm.", "output.")) for name, _ in net.named_parameters())
