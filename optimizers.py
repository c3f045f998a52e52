"""Learned optimizers: networks that read gradients and write updates.

`CoordinatewiseLSTM` is the optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1 and appendix A),
`RNNProp` that of Lv, Jiang and Li 2017 (arXiv 1703.03633); `sharing` has those whose coordinates tell each other
something. A learned optimizer is any `nn.Module` with `init_state(num_coordinates)` and
`forward(grad, state) -> (update, state)`; `meta_training` takes a user's own as well as these. How it is trained
stands in `meta_training`; the arithmetic of the fast path in `torch_blocks`.
"""

import hashlib
import json
import math
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

import gradbuffer
from gradbuffer.kernels import torch_blocks
from gradbuffer.contracts import PerceptronData, QuadraticData, Rule
from gradbuffer.checks import (NonFiniteError, check_count, check_finite, check_positive_number, sum_is_finite,
                             values_are_checked)
from gradbuffer.snapshots import Snapshot
from gradbuffer.kernels.choice import compiled_kernels, is_triton, kernels_for, takes_numba
from gradbuffer.nets.torch_optim import LearnedOptimizer
from gradbuffer.nets.odd_weights import odd_part
from gradbuffer.nets.per_kind import PerKind
from gradbuffer.nets.preprocessing import log_sign
from gradbuffer.nets.sharing import LSTMWithGAC, NTMBFGS, start_as_coordinatewise
from gradbuffer.nests import clone
from gradbuffer.files import write_whole
from gradbuffer.unrolling import Recorded, record_by_steps

__all__ = ["CoordinatewiseLSTM", "LSTMOptimizer", "LSTMWithGAC", "LearnedOptimizer", "NTMBFGS", "NonFiniteError",
           "NormalizedLSTM", "PerKind", "RNNProp", "load_optimizer", "log_sign", "pretrained_optimizers", "save_optimizer",
           "start_as_adam", "start_as_coordinatewise", "start_as_momentum"]

FILE_FORMAT = 2  # since 2 files hold a digest
PRETRAINED = Path(gradbuffer.__file__).with_name("pretrained")
GRAPH_BLOCK = 1 << 16  # coordinates that `replay` runs at once where autograd does the backward pass


class LSTMOptimizer(Rule, nn.Module):
    """What the optimizers below share: an LSTM with a linear output that every coordinate runs by itself.

    A subclass says what the LSTM is fed and what its output z becomes, in four steps:
    `read(grads, memory)` turns gradients into readings, without weights; `embed(readings)` turns those into the LSTM's
    input, perhaps with weights; the LSTM and `output` give z; the update is output_scale · z, or output_scale · tanh(z)
    where the class says `squash`. `memory` is the part of the state that does not belong to the LSTM, a tuple of tensors
    (..., N).

    What autograd records is up to the caller: under `torch.no_grad()` a step takes the fast path (on a CPU in blocks
    of coordinates that stay in cache), otherwise it goes through `nn.LSTM` and carries a graph.
    """

    coordinatewise = True  # no coordinate reads another's: any subset of them can be replayed by itself
    overwrites = True
    squash = False  # whether the output goes through a tanh

    def __init__(self, inputs, hidden_size, num_layers):
        super().__init__()
        check_count(hidden_size=hidden_size, num_layers=num_layers)
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.lstm = nn.LSTM(inputs, hidden_size, num_layers)
        self.output = nn.Linear(hidden_size, 1)
        self._packed = None

    @property
    def config(self):
        """The constructor's arguments, as a dict: what rebuilds this network, weights apart."""
        return {name: getattr(self, name) for name in self.arguments}

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def init_state(self, num_coordinates, device=None, dtype=None):
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
        shapes = [(self.num_layers, self.hidden_size)] * 2 + self.memory_shapes
        return tuple(torch.zeros(*shape, num_coordinates, **place) for shape in shapes)

    def forward(self, grad, state, inplace=False):
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
            top, (hidden, cell) = self.lstm(features, (columns_last(hidden), columns_last(cell)))
            return self.finish(self.output(top))[0, :, 0], (hidden.mT, cell.mT, *memory)
        with torch.no_grad():
            read = [part.to(grad.dtype) for part in memory]
            outputs, hidden, cell, new_memory = self._step(grad, hidden, cell, read, inplace)
            memory = [old.copy_(new) for old, new in zip(memory, new_memory)] if inplace else new_memory
            return self._finish_packed(outputs), (hidden, cell, *memory)

    def renews(self, dtype):
        """Whether `forward` with `inplace` takes a state stored in that dtype: the weights', and bfloat16 where numba runs the
        step. It computes in the weights' dtype, and rounds at the end."""
        weight = self.output.weight
        return dtype == weight.dtype or dtype == torch.bfloat16 and getattr(kernels_for(weight), "STEPS_BFLOAT16", False)

    def stepper(self, state):
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
        return self._stepper(state, state, None)

    def recorder(self, state, steps=None):
        """As `stepper`, but of a state of its own: the one given is not changed.

        Args:
            steps: so many will be taken, and `replay` will be asked about just these; or None.

        Returns:
            the function; the state that it overwrites, with `steps` complete after the last of them; and what `replay` may
            be given as `tape`, or None.
        """
        self._check(state[0][0, 0], state, state[0].shape[-1:])
        kernels, packed = self._packed_kernels()
        compiled = hasattr(kernels, "Room")
        room = kernels.Room(packed, state[0].shape[-1], steps) if compiled and steps else None
        own = *(part.new_empty(part.shape) if compiled else clone(part) for part in state[:2]), *map(clone, state[2:])
        return self._stepper(state if compiled else own, own, room), own, room

    def in_parts(self, work, functions, size, steps):
        """[work(first, last), ...] over parts of some functions of `size` coordinates each; work is a window of so many steps of
        functions first … last - 1, and its replay. All are one part unless it is faster to take some after the others, or
        several at once, each by a thread of its own."""
        kernels, packed = self._packed_kernels()
        if not hasattr(kernels, "take_parts"):
            return [work(0, functions)]
        return kernels.take_parts(work, packed, functions, size, steps)

    def record(self, loss, coordinates, theta, state, step, updates, keep=False):
        """See `Rule.record`."""
        take, own, room = self.recorder(state, updates if keep else None)
        return record_by_steps(self, loss, coordinates, theta, state, step, updates, lambda gradient, state: (take(gradient), own), room)

    def _stepper(self, state, own, room):
        """Steps of which the first reads `state`; each overwrites `own`."""
        (hidden, cell), memory, shape = own[:2], own[2:], own[0].shape[-1:]
        kernels, packed = self._packed_kernels()
        if not hasattr(kernels, "stepper") or not (hidden.is_contiguous() and cell.is_contiguous()):
            return lambda grad: self(grad, own, inplace=True)[0]
        left, whole = self._left_to(kernels, "step"), (0, *shape)
        run = kernels.stepper(packed, *state[:2], new=(hidden, cell), room=room, **left)

        def step(grad):
            if grad.shape != shape or grad.dtype != hidden.dtype:
                self._check(grad, own, tuple(grad.shape))  # says what does not fit
            check_finite(grad, "grad")
            readings, after = (grad[None, None], ()) if left else self.read(grad[None], memory)
            for old, new in zip(memory, after):
                old.copy_(new)
            readings = readings[0]
            return self._finish_packed(run(lambda a, b: self.embed(readings if (a, b) == whole else readings[:, a:b])))

        return step

    def replay(self, grads, state, adjoint, tape=None, read=None):
        """Gradient of Σ_t ⟨adjoint_t, update_t⟩ with respect to the weights, over recorded inputs.

        This is the whole meta-gradient when the inputs count as constants (design: "The meta-gradient needs no graph
        of the optimizee"). The coordinates are independent, so they go in blocks and memory does not grow with N × T.

        Args:
            grads: (T, N), the gradients fed to the network at steps 0 … T-1.
            state: the state before step 0; not changed.
            adjoint: (T, N), the derivative of the loss with respect to each update; constant.
            tape: what `recorder` gave for the steps over these gradients from this state; used up.
            read: nothing, see `Rule.replay`.

        Returns:
            dict from name to gradient, for the parameters that require grad; no graph.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(grads, state, (adjoint.shape[0], state[0].shape[-1]))
        if adjoint.shape != grads.shape:
            raise ValueError(f"adjoint must have the shape of grads {tuple(grads.shape)}, got {tuple(adjoint.shape)}")
        wanted = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        gradients = self._replay(grads, state, adjoint, wanted, tape)
        return {name: gradients[name] for name in wanted}

    def pull_back(self, grad, state, adjoint, next_adjoints, read=None):
        """Backpropagate through one step: what the second-order replay does from the last step to the first.

        Args:
            grad: (N,), what the step was fed.
            state: the state before the step; not changed.
            adjoint: (N,), the derivative of the loss with respect to the update.
            next_adjoints: list, the derivative with respect to each tensor of the state after the step; overwritten.

        Returns:
            the derivatives with respect to grad (N,), to each tensor of `state` (list), and to the weights (dict). No
            graph.
        """
        if grad.device.type != "cpu":
            return super().pull_back(grad, state, adjoint, next_adjoints)
        (hidden, cell, *memory), (dhidden, dcell, *dmemory) = state, next_adjoints
        with torch.enable_grad():
            grad, *memory = (tensor.detach().requires_grad_() for tensor in (grad, *memory))
            readings, new_memory = self.read(grad[None], memory)
            features = self.embed(readings)[0]
        with torch.no_grad():
            kernels, packed = self._packed_kernels()
            dfeatures, *parts = kernels.step_back_blocks(packed, features.detach(), hidden, cell, self._above(adjoint),
                                                         dhidden, dcell, self.squash)
            gradients = self._names_of(*parts)
        wanted = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        rest = [name for name in wanted if name not in gradients]  # those of `embed`
        pulled = torch.autograd.grad([features, *new_memory], [grad, *memory, *(wanted[name] for name in rest)],
                                     [dfeatures, *dmemory])
        gradients |= zip(rest, pulled[1 + len(memory):])
        return pulled[0], [dhidden, dcell, *pulled[1:1 + len(memory)]], {name: gradients[name] for name in wanted}

    def finish(self, z):
        """What becomes of the output: the update."""
        return self.output_scale * (z.tanh() if self.squash else z)

    def repack(self):
        """Have the weights packed anew at the next step, though they may not have changed."""
        self._packed = None

    # How it is done ---------------------------------------------------------------------------------------------

    def _check(self, grad, state, shape, inplace=False):
        if not isinstance(grad, torch.Tensor):
            raise TypeError(f"grad must be a tensor, got {type(grad).__name__}")
        weight, N = self.output.weight, grad.shape[-1] if grad.dim() else 0
        if tuple(grad.shape) != shape or N == 0:
            raise ValueError(f"grad must have shape (N,) with N ≥ 1, or (T, N) in replay; got {tuple(grad.shape)}")
        names = ["hidden", "cell", *(f"memory[{k}]" for k in range(len(self.memory_shapes)))]
        if not (isinstance(state, (tuple, list)) and len(state) == len(names)):
            raise TypeError(f"state must be init_state's tuple of {len(names)} tensors, hidden and cell first")
        shapes = [(self.num_layers, self.hidden_size)] * 2 + self.memory_shapes
        for name, tensor, rows in zip(names, state, shapes):
            if tuple(tensor.shape) != (*rows, N):
                raise ValueError(f"state's {name} must have shape {(*rows, N)} for {N} coordinates, got "
                                 f"{tuple(tensor.shape)}")
        for name, tensor in (("grad", grad), *(("state", part) for part in state[:2])):
            fits = tensor.dtype == weight.dtype or name == "state" and inplace and self.renews(tensor.dtype)
            if not fits or tensor.device != weight.device:
                raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, the network {weight.dtype} on "
                                 f"{weight.device}: move one of them")

    def _step(self, grad, hidden, cell, memory, inplace):
        """z and the next state, without a graph."""
        kernels, packed = self._packed_kernels()
        left = self._left_to(kernels, "step")
        readings, memory = (grad[None, None], memory) if left else self.read(grad[None], memory)
        return *kernels.step_blocks(packed, lambda a, b: self.embed(readings[0, :, a:b]), hidden, cell, inplace, **left), memory

    # The packed weights have output_scale in them, where no tanh comes between: it then costs nothing.

    def _packed_scale(self):
        return 1.0 if self.squash else self.output_scale

    def _finish_packed(self, z):
        """`finish` for what the packed weights give."""
        return self.finish(z) if self.squash else z

    def _above(self, adjoint):
        """The adjoint of an update -> that of what the packed weights give, or of its tanh."""
        return self.output_scale * adjoint if self.squash else adjoint

    def _packed_kernels(self):
        """The module that runs the LSTM, and the weights as it wants them, packed again only after they have changed.

        Whoever says `values_unchecked` calls `repack` if they have, where a device would have to be waited for to see it.
        """
        kernels, scale, kept = kernels_for(self.output.weight), self._packed_scale(), self._packed
        weights = [*self.lstm._flat_weights, self.output.weight, self.output.bias]
        if kept is None or kept[:2] != (kernels, scale) or not kept[2].holds(weights, wait=values_are_checked()):
            snapshot = Snapshot(weights)  # first: a change in between is then seen
            with torch.inference_mode(False), torch.no_grad():
                layers = [[w.detach() for w in layer] for layer in self.lstm.all_weights]
                packed = kernels.PackedLSTM([(w, u, b + c) for w, u, b, c in layers], scale * self.output.weight.detach()[0],
                                            scale * self.output.bias.detach()[0])
            self._packed = kept = kernels, scale, snapshot, packed
        return kernels, kept[3]

    def _left_to(self, kernels, work):
        """What of `read` those kernels do themselves in a "step" or "replay": their argument. They are given gradients then."""
        return {}

    def _names_of(self, layers, output_weight, output_bias):
        """Gradients of the packed weights as the kernels give them -> dict by the names of the parameters."""
        scale = self._packed_scale()
        gradients = {"output.weight": scale * output_weight[None], "output.bias": scale * output_bias[None]}
        for l, (ih, hh, bias) in enumerate(layers):
            gradients |= {f"lstm.weight_ih_l{l}": ih, f"lstm.weight_hh_l{l}": hh,
                          f"lstm.bias_ih_l{l}": bias, f"lstm.bias_hh_l{l}": bias.clone()}
        return gradients

    @torch.no_grad()
    def _replay(self, grads, state, adjoint, wanted, room):
        hidden, cell, *memory = state
        kernels, packed = self._packed_kernels()
        kept = {"room": room} if room is not None and room.packed is packed and room.steps == len(grads) else {}
        own = {name: parameter for name, parameter in wanted.items() if not name.startswith(("lstm.", "output."))}  # `embed`'s
        if kernels is torch_blocks and grads.device.type != "cpu" or is_triton(kernels) and (own or self.squash):
            return self._replay_with_graph(grads, state, adjoint)
        left, pieces = self._left_to(kernels, "replay"), []

        def readings(start, stop):
            if left:
                return grads[:, None, start:stop]
            return self.read(grads[:, start:stop], [part[..., start:stop] for part in memory])[0]

        def pulled(start, stop, dfeatures):
            with torch.enable_grad():
                pieces.append(torch.autograd.grad(self.embed(readings(start, stop)), list(own.values()), dfeatures))

        parts = kernels.replay_blocks(packed, lambda a, b: self.embed(readings(a, b)), hidden, cell,
                                      self._above(adjoint), self.squash, pulled if own else None, **left, **kept)
        if kept:
            room.leave()
        return self._names_of(*parts) | {name: sum(piece) for name, piece in zip(own, zip(*pieces))}

    @torch.enable_grad()
    def _replay_with_graph(self, grads, state, adjoint):
        """The replay by autograd: `nn.LSTM` runs over each block's whole sequence."""
        parameters = dict(self.named_parameters())
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        wanted = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        for start in range(0, grads.shape[1], GRAPH_BLOCK):
            block = slice(start, start + GRAPH_BLOCK)
            hidden, cell, *memory = (part[..., block] for part in state)
            readings, _ = self.read(grads[:, block], memory)
            top, _ = self.lstm(self.embed(readings).mT, (columns_last(hidden), columns_last(cell)))
            updates = self.finish(self.output(top)[..., 0])  # (T, block)
            parts = torch.autograd.grad((updates * adjoint[:, block]).sum(), list(wanted.values()))
            for name, part in zip(wanted, parts):
                total[name] += part
        return total

    def __getstate__(self):  # packed weights are a cache: not pickled, not copied
        return {**self.__dict__, "_packed": None}


class CoordinatewiseLSTM(LSTMOptimizer):
    """The coordinatewise LSTM optimizer: one small LSTM, shared by all coordinates, each with a state of its own.

    (g_t, h_{t+1}) = m(∇_t, h_t; φ) and θ_{t+1} = θ_t + g_t, where m is an LSTM of `num_layers` layers followed by a
    linear output. Its state is (hidden, cell), each (num_layers, hidden_size, N).

    Args:
        hidden_size: units in each layer, positive. Default 20, the paper's.
        num_layers: LSTM layers, positive. Default 2, the paper's.
        preprocess: None feeds the gradient as it is; "log_sign" feeds `log_sign(grad, p)`.
        p: the threshold of "log_sign" is e^-p; positive.
        output_scale: factor on the output; not zero. The paper has 0.1 on MNIST and 1 on quadratics.
        odd: keep to LSTMs that answer -∇ with exactly the opposite updates, see `symmetrize`. They take the same steps
            in coordinates of other signs, never drift, and their meta-gradient has far less noise. Default False.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> net = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1)
        >>> theta, state = torch.zeros(3), net.init_state(3)
        >>> with torch.no_grad():
        ...     update, state = net(2 * theta - 1, state)
        >>> (theta + update).shape
        torch.Size([3])

    Reference: Andrychowicz et al. 2016, section 2.1 ("Coordinatewise LSTM optimizer") and appendix A.
    """

    arguments = ("hidden_size", "num_layers", "preprocess", "p", "output_scale", "odd")
    memory_shapes = []

    def __init__(self, hidden_size=20, num_layers=2, preprocess=None, p=10.0, output_scale=1.0, odd=False):
        if preprocess not in (None, "log_sign"):
            raise ValueError(f'preprocess must be None or "log_sign", got {preprocess!r}')
        if not (isinstance(p, (int, float)) and 0 < p <= 80):
            raise ValueError(f"p must be a number in (0, 80], got {p!r}")
        if not (isinstance(output_scale, (int, float)) and math.isfinite(output_scale) and output_scale != 0):
            raise ValueError(f"output_scale must be a finite number other than 0, got {output_scale!r}")
        super().__init__(2 if preprocess else 1, hidden_size, num_layers)
        self.preprocess, self.p, self.output_scale, self.odd = preprocess, p, output_scale, bool(odd)
        if odd:
            self.load_state_dict(self.symmetrize(self.state_dict()))

    def symmetrize(self, tensors):
        """The nearest weights with which the optimizer is odd; of a meta-gradient, its part along such weights.

        Args:
            tensors: dict like `state_dict()`. Not changed.

        Returns:
            dict of new tensors, no graph: see `odd_weights.odd_part`.
        """
        return odd_part(tensors, self.hidden_size, (1, -1) if self.preprocess else (-1,))

    def read(self, grads, memory):
        """(T, N) -> readings (T, inputs, N), and no memory."""
        if self.preprocess is None:
            return grads.unsqueeze(-2), ()
        return log_sign(grads, self.p).movedim(0, -2), ()

    def embed(self, readings):
        return readings

    def record(self, loss, coordinates, theta, state, step, updates, keep=False):
        """See `Rule.record`; quadratics and perceptrons go through all steps in one compiled loop, where there is one.

        Raises:
            ValueError: shapes do not fit each other.
            NonFiniteError: a gradient holds an infinity or a NaN.
        """
        data, record = loss.compiled(coordinates.shapes), {QuadraticData: self._record_quadratics, PerceptronData: self._record_perceptrons}
        found = record[type(data)](data, theta, state, step, updates, keep) if type(data) in record else None
        return found or super().record(loss, coordinates, theta, state, step, updates, keep)

    def _record_quadratics(self, quadratics, theta, state, step, updates, keep):
        packed = self._packed_for_windows(theta)
        if packed is None or any(tensor.dtype != theta.dtype or tensor.is_cuda for tensor in quadratics):
            return None
        self._check(theta, state, tuple(theta.shape))
        B, n = quadratics.y.shape[:2]
        if [tuple(tensor.shape) for tensor in quadratics] != [(B, n, n), (B, n, 1), (B, n, n)] or B * n != len(theta):
            raise ValueError("a loss's quadratics must be W (B, n, n), y (B, n, 1) and 2 Wᵀ, of B functions of n coordinates; got "
                             f"{[tuple(tensor.shape) for tensor in quadratics]} for {len(theta)} coordinates")
        return with_finite_gradients(*import_module("gradbuffer.kernels.numba_quadratics").record_quadratics(
            packed, quadratics, theta, *state, updates, self.p if self.preprocess else 0, keep))

    def _record_perceptrons(self, data, theta, state, step, updates, keep):
        """The same, where one thread alone has this to do."""
        packed = self._packed_for_windows(theta)
        if packed is None or data.images.dtype != theta.dtype or compiled_kernels().threads_here() > 1:
            return None
        self._check(theta, state, tuple(theta.shape))
        indices = torch.stack([data.index(step + t) for t in range(updates + 1)])
        return with_finite_gradients(*import_module("gradbuffer.kernels.numba_perceptrons").record_perceptrons(
            packed, data.images, data.labels, indices, data.sizes, data.activation, theta, *state, self.p if self.preprocess else 0, keep))

    def _packed_for_windows(self, theta):
        """The weights as compiled windows want them; None where there are no such windows."""
        kernels, packed = self._packed_kernels()
        fits = type(self) is CoordinatewiseLSTM and kernels.__name__ == "gradbuffer.kernels.numba_lstm"
        return packed if fits and takes_numba(theta) and packed.dtype == theta.dtype else None

    def _left_to(self, kernels, work):
        left = self.preprocess and type(self) is CoordinatewiseLSTM and work in getattr(kernels, "DOES_LOG_SIGN", ())
        return {"log_sign": self.p} if left else {}


@torch.no_grad()
def start_as_momentum(net, lr, momentum=0.9, nesterov=True, averages=(0.5, 0.95, 0.99), sign_lr=0.0, sign_momentum=0.8,
                      sign_fade=8):
    """Write weights into a coordinatewise LSTM with which it is SGD with momentum; meta-training then starts from there.

    With "log_sign" an LSTM cell can hold a running sum of gradients: its input gate sigmoid(log|∇|) = |∇| / (1 + |∇|)
    gives the size, its candidate tanh(3 sgn ∇) the sign, its forget gate the momentum. Some units of every layer do so,
    each with a forget gate of its own; the output reads the ones that make up the update asked for. The other units,
    and the units of `averages`, start with output weights of 0: they are there for meta-training to use.

    Momentum is slow in the first steps, where gradients are small: it has gathered nothing yet. With `sign_lr` the
    updates have a second part, -sign_lr · w_t · s_t: s_t ← sign_momentum · s_t + (1 - sign_momentum) · sgn ∇ is a
    running mean of signs, and w_t = 2 sigmoid(-2 t / sign_fade), near to it, fades. One more unit holds s_t, and
    another one the time, which closes the first one's output gate.

    Where e^-p ≤ |∇| ≪ 1 the updates of momentum are those of `torch.optim.SGD(lr, momentum, nesterov)`, to a few per
    cent; those of larger gradients saturate, those of smaller ones are up to three times too large. The part with signs
    is right to a fifth.

    Args:
        net: a `CoordinatewiseLSTM` with preprocess="log_sign"; changed in place. Its other units keep their weights.
        lr: learning rate, positive; best the one that `tune_baseline` finds.
        momentum: in [0, 1).
        nesterov: the update reads ∇ + momentum · buffer instead of the buffer.
        averages: forget gates of further units, each in (0, 1).
        sign_lr: size of the first steps by sign, 0 or more.
        sign_momentum: in [0, 1).
        sign_fade: steps after which w_t is about a quarter; positive, at most 20.

    Returns:
        `net`.

    Raises:
        ValueError, TypeError: an argument is not as above, or the network has too few units.

    Example:
        >>> net = start_as_momentum(CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1), lr=1.0)

    Reference: ours; to start from a hand-designed optimizer, by imitation, is Chen et al. 2020 (arXiv 2010.09089).
    """
    if not isinstance(net, CoordinatewiseLSTM):
        raise TypeError(f"net must be a CoordinatewiseLSTM, got {type(net).__name__}")
    if net.preprocess != "log_sign":
        raise ValueError(f'net must have preprocess="log_sign" to start as momentum, got {net.preprocess!r}')
    check_positive_number(lr=lr, sign_fade=sign_fade)
    for name, value in (("momentum", momentum), ("sign_momentum", sign_momentum)):
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    if not all(isinstance(average, (int, float)) and 0 < average < 1 for average in averages):
        raise ValueError(f"averages must be numbers in (0, 1), got {averages!r}")
    if sign_lr:
        check_positive_number(sign_lr=sign_lr)
        if sign_fade > 20:
            raise ValueError(f"sign_fade must be at most 20, got {sign_fade!r}")
    forgets, H = (0.0, momentum, *averages, *((sign_momentum, CLOCK) if sign_lr else ())), net.hidden_size
    sums = len(forgets) - bool(sign_lr)
    if len(forgets) > H or net.odd and sums > 3 * H // 10:
        kind = f"{3 * H // 10} odd" if net.odd else f"{H}"
        raise ValueError(f"the network has {kind} units, too few for {sums if net.odd else len(forgets)} running sums")
    for layer, (weight, recurrent, bias, bias2) in enumerate(net.lstm.all_weights):
        for unit, forget in enumerate(forgets):
            i, f, g, o = rows = [unit + gate * H for gate in range(4)]
            for tensor in (weight, recurrent, bias, bias2):
                tensor[rows] = 0
            bias[o] = OPEN
            if layer == 0:
                weight[i, 0], weight[g, 1], bias[f] = net.p, CANDIDATE, logit(forget)
            else:  # pass on what the layer below holds
                bias[i], bias[f], weight[g, unit] = OPEN, logit(0), GAIN
    opened = 1 / (1 + math.exp(-OPEN))
    passed = opened * (opened * GAIN * opened) ** (net.num_layers - 1)
    net.output.weight.zero_()
    net.output.bias.zero_()
    scale = net.output_scale * passed * math.tanh(CANDIDATE)
    net.output.weight[0, 1] = -lr * (momentum if nesterov else 1.0) / scale
    net.output.weight[0, 0] = -lr / scale if nesterov else 0.0
    if sign_lr:
        add_steps_by_sign(net, len(forgets) - 2, sign_lr, sign_momentum, sign_fade)
    return net


def add_steps_by_sign(net, sign, lr, momentum, fade):
    """Turn the running sum of unit `sign` into one of signs, whose output gate the next unit, a clock, closes."""
    H, clock, opened = net.hidden_size, sign + 1, 1 / (1 + math.exp(-OPEN))
    weight, recurrent, bias, _ = net.lstm.all_weights[0]
    for unit, amount in ((sign, SMALL), (clock, SMALL / 5)):  # what a step adds, whatever the gradient's size
        weight[unit, 0], bias[unit] = 0, logit(amount)
    weight[clock + 2 * H, 1], bias[clock + 2 * H] = 0, CANDIDATE
    # the clock's output rises by `tick` in a step at first; the sign's output gate is half open at first
    tick = opened * math.tanh(SMALL / 5 * math.tanh(CANDIDATE))
    bias[sign + 3 * H], recurrent[sign + 3 * H, clock] = 0, -2 / (fade * tick)
    held = SMALL * math.tanh(CANDIDATE) / (1 - momentum)  # what the cell holds where all signs agree
    passed = (opened * GAIN * opened) ** (net.num_layers - 1)
    net.output.weight[0, sign] = -2 * lr / (net.output_scale * passed * math.tanh(held))


OPEN, CANDIDATE, GAIN = 4.0, 3.0, 3.0  # an open gate's bias, the candidate's weight on the sign, between layers
SMALL, CLOCK = 0.05, 0.98  # an input gate that keeps tanh linear, the forget gate of the unit that holds the time


def logit(probability):
    """The bias of a gate; a closed one at 0."""
    return math.log(probability / (1 - probability)) if probability > 0 else -8.0


class RNNProp(LSTMOptimizer):
    """RNNProp: the coordinatewise LSTM fed with what Adam would do, so that it holds on other scales and longer runs.

    With the bias-corrected moving averages m̂ of ∇ and v̂ of ∇², the network reads m̂/√v̂ and ∇/√v̂, which do not change
    when the loss is rescaled; an ELU layer makes `hidden_size` features of them; the update is
    output_scale · tanh(output), so no step exceeds `output_scale`. Its state is (hidden, cell, averages): averages
    (3, N) of ∇, of ∇² and of 1 (what corrects the bias).

    Args:
        hidden_size: units in the ELU layer and in each LSTM layer, positive.
        num_layers: LSTM layers, positive.
        beta: of both moving averages, in [0, 1). Default 0.95, the paper's.
        output_scale: the largest step; positive. Default 0.1, the paper's.
        eps: its square is added to v̂; positive.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> net = RNNProp()
        >>> theta, state = torch.zeros(3), net.init_state(3)
        >>> with torch.no_grad():
        ...     update, state = net(2 * theta - 1, state)

    Reference: Lv, Jiang and Li 2017 (arXiv 1703.03633), "Learning Gradient Descent: Better Generalization and Longer
    Horizons", section 4.
    """

    arguments = ("hidden_size", "num_layers", "beta", "output_scale", "eps")
    memory_shapes = [(3,)]
    squash = True

    def __init__(self, hidden_size=20, num_layers=2, beta=0.95, output_scale=0.1, eps=1e-8):
        if not (isinstance(beta, (int, float)) and 0 <= beta < 1):
            raise ValueError(f"beta must be a number in [0, 1), got {beta!r}")
        check_positive_number(output_scale=output_scale, eps=eps)
        super().__init__(hidden_size, hidden_size, num_layers)
        self.input = nn.Linear(2, hidden_size)
        self.beta, self.output_scale, self.eps = beta, output_scale, eps

    def read(self, grads, memory):
        """(T, N) -> readings (T, 2, N): m̂/√v̂ and ∇/√v̂, and the averages after them."""
        (averages,), readings = memory, []
        for grad in grads:
            fresh = torch.stack([grad, grad * grad, torch.ones_like(grad)])
            averages = self.beta * averages + (1 - self.beta) * fresh
            mean, square = averages[:2] / averages[2]
            readings.append(torch.stack([mean, grad]) / (square + self.eps**2).sqrt())
        return torch.stack(readings), (averages,)

    def embed(self, readings):
        return nn.functional.elu(self.input.weight @ readings + self.input.bias[:, None])


class NormalizedLSTM(LSTMOptimizer):
    """A coordinatewise LSTM that reads what Adam would, over several horizons, and the time: for general use.

    Its readings are ∇/√v̂, m̂_β/√v̂ for every β of `betas`, and log(min(t, longest) / fade), with the bias-corrected moving
    averages m̂_β of ∇ and v̂ of ∇²: none of them changes when the loss is rescaled. The update is
    output_scale · tanh(output), so no step exceeds `output_scale`. `start_as_adam` gives it weights with which it is Adam
    with a learning rate that fades. Its state is (hidden, cell, averages): averages (len(betas) + 2, N) of ∇, one for
    each β, of ∇², and t. (Kept in bfloat16, t stops at 256, since 257 is no number there.)

    Args:
        hidden_size: units in each layer, positive.
        num_layers: LSTM layers, positive.
        betas: of the averages of ∇, at least one, each in (0, 1).
        square_beta: of the average of ∇², in (0, 1).
        fade: steps at which the reading of the time is 0, positive.
        longest: steps at which that reading stops growing, positive: an optimizer cannot know what to do at a reading that
            it has not met in training. Default 1000.
        output_scale: the largest step; positive.
        eps: its square is added to v̂; positive.
        odd: keep to LSTMs that answer -∇ with exactly the opposite updates, see `symmetrize`. Others drift, however
            little, and over thousands of steps that is far. Default False.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> net = start_as_adam(NormalizedLSTM(), lr=0.03)
        >>> theta, state = torch.zeros(3), net.init_state(3)
        >>> with torch.no_grad():
        ...     update, state = net(2 * theta - 1, state)

    Reference: the readings follow Lv, Jiang and Li 2017 (arXiv 1703.03633); averages over several horizons and the time as
    inputs, Metz et al. 2020 (arXiv 2009.11243).
    """

    arguments = ("hidden_size", "num_layers", "betas", "square_beta", "fade", "longest", "output_scale", "eps", "odd")
    squash = True

    def __init__(self, hidden_size=20, num_layers=1, betas=(0.5, 0.9, 0.97), square_beta=0.95, fade=300.0, longest=1000.0,
                 output_scale=0.1, eps=1e-8, odd=False):
        if not (isinstance(betas, (tuple, list)) and betas):
            raise TypeError(f"betas must be a tuple of numbers, at least one, got {betas!r}")
        for beta in (*betas, square_beta):
            if not (isinstance(beta, (int, float)) and 0 < beta < 1):
                raise ValueError(f"betas and square_beta must be in (0, 1), got {beta!r}")
        check_positive_number(fade=fade, longest=longest, output_scale=output_scale, eps=eps)
        super().__init__(len(betas) + 2, hidden_size, num_layers)
        self.betas, self.square_beta, self.fade = tuple(betas), square_beta, fade
        self.longest, self.output_scale, self.eps, self.odd = longest, output_scale, eps, bool(odd)
        self.memory_shapes = [(len(betas) + 2,)]
        if odd:
            self.load_state_dict(self.symmetrize(self.state_dict()))

    def symmetrize(self, tensors):
        """`odd_weights.odd_part` for readings of which the time alone does not change sign with the gradient."""
        return odd_part(tensors, self.hidden_size, [-1] * (len(self.betas) + 1) + [1])

    def read(self, grads, memory):
        """(T, N) -> readings (T, len(betas) + 2, N), and the averages and t after them."""
        (averages,), readings = memory, []
        decay = averages.new_tensor([*self.betas, self.square_beta])[:, None]
        for grad in grads:
            time = averages[-1:] + 1
            fresh = torch.cat([grad.expand(len(self.betas), -1), grad[None] * grad])
            averages = torch.cat([decay * averages[:-1] + (1 - decay) * fresh, time])
            corrected = averages[:-1] / (1 - decay ** time[:, :1])  # t is the same for all
            size = (corrected[-1:] + self.eps**2).sqrt()
            readings.append(torch.cat([grad[None] / size, corrected[:-1] / size, (time.clamp(max=self.longest) / self.fade).log()]))
        return torch.stack(readings), (averages,)

    def embed(self, readings):
        return readings


@torch.no_grad()
def start_as_adam(net, lr, mix=0.3):
    """Write weights into a `NormalizedLSTM` with which it is Adam with a fading learning rate; meta-training starts there.

    The updates are -lr / (1 + t / fade) · ((1 - mix) m̂ + mix ∇) / √v̂ for t = 1, 2, … longest, with m̂ the average of the second
    of the net's `betas` (the first if there is one only), right to a few per cent where |∇| ≤ 3 √v̂. One unit of each layer
    does it: its output gate is sigmoid(-log(t / fade)) = 1 / (1 + t / fade). The other units keep their weights and start
    with output weights of 0: they are there for meta-training to use.

    Args:
        net: changed in place.
        lr: the learning rate at the start, positive, at most a third of the net's output_scale.
        mix: how much of the gradient itself goes into the step, in [0, 1].

    Returns:
        `net`.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Reference: ours.
    """
    if not isinstance(net, NormalizedLSTM):
        raise TypeError(f"net must be a NormalizedLSTM, got {type(net).__name__}")
    check_positive_number(lr=lr)
    if lr > net.output_scale / 3:
        raise ValueError(f"lr must be at most a third of output_scale={net.output_scale}, got {lr!r}")
    if not (isinstance(mix, (int, float)) and 0 <= mix <= 1):
        raise ValueError(f"mix must be a number in [0, 1], got {mix!r}")
    H, opened = net.hidden_size, 1 / (1 + math.exp(-OPEN))
    for layer, (weight, recurrent, bias, bias2) in enumerate(net.lstm.all_weights):
        i, f, g, o = rows = [gate * H for gate in range(4)]
        for tensor in (weight, recurrent, bias, bias2):
            tensor[rows] = 0
        bias[i], bias[f] = OPEN, logit(0)
        if layer == 0:
            weight[g, 0], weight[g, 1 + min(1, len(net.betas) - 1)] = LINEAR * mix, LINEAR * (1 - mix)
            weight[o, -1] = -1
        else:  # pass on what the layer below holds
            weight[g, 0], bias[o] = 1, OPEN
    net.output.weight.zero_()
    net.output.bias.zero_()
    net.output.weight[0, 0] = -lr / (net.output_scale * LINEAR * opened * opened ** (2 * (net.num_layers - 1)))
    return net


LINEAR = 0.2  # the candidate's weight on a reading: tanh is nearly linear there


def columns_last(state):
    """(layers, H, N), features along rows, -> (layers, N, H), what `nn.LSTM` wants."""
    return state.mT.contiguous()


def with_finite_gradients(losses, gradients, *rest):
    """What was recorded, or NonFiniteError if a gradient that the network was fed is not finite."""
    if not sum_is_finite(gradients[:-1]):
        for gradient in gradients[:-1]:
            check_finite(gradient, "grad")
    return Recorded(losses, gradients, *rest)


# Files --------------------------------------------------------------------------------------------------------------

LEARNED_OPTIMIZERS = {"CoordinatewiseLSTM": CoordinatewiseLSTM, "LSTMWithGAC": LSTMWithGAC, "NTMBFGS": NTMBFGS,
                      "NormalizedLSTM": NormalizedLSTM, "PerKind": PerKind, "RNNProp": RNNProp}


def save_optimizer(net, path, **notes):
    """Write a learned optimizer to a safetensors file: its weights, and in the metadata its class and arguments.

    The file is written beside its place and then renamed, so that a failure leaves an older file as it was. It holds a digest
    of its content, so that a damaged one is found out when it is loaded.

    Args:
        net: one of this module's learned optimizers; or a `PerKind` of some, whose rule is a dict.
        path: where to; the folder is made if it is not there.
        notes: what else the metadata should say (problem, seed, result …), kept as text; not by the names "format", "class",
            "config" and "sha256", which are taken.

    Raises:
        TypeError: `net` is not one of this module's classes, or its rule is a function.
        ValueError: a weight is infinite or NaN, or a note has a name that is taken.
        OSError: the file cannot be written.

    Example:
        >>> save_optimizer(CoordinatewiseLSTM(), "checkpoints/new.safetensors", problem="none yet")
        >>> net = load_optimizer("checkpoints/new.safetensors")
    """
    for part in (net, *(net.networks.values() if isinstance(net, PerKind) else ())):
        if type(part).__name__ not in LEARNED_OPTIMIZERS:
            raise TypeError(f"net must be one of {sorted(LEARNED_OPTIMIZERS)}, got {type(part).__name__}")
    if isinstance(net, PerKind) and not isinstance(net.rule, dict):
        raise TypeError(f"the rule of a PerKind must be a dict to be written to a file, got {net.rule!r}")
    metadata = {"format": str(FILE_FORMAT), "class": type(net).__name__, "config": json.dumps(net.config)}
    taken = sorted(notes.keys() & {*metadata, "sha256"})
    if taken:
        raise ValueError(f"notes must have other names than {sorted({*metadata, 'sha256'})}, which the file itself needs; got {taken}")
    metadata |= {name: str(note) for name, note in notes.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    for name, tensor in tensors.items():
        check_finite(tensor, f"the weight {name}")
    write_whole(path, save(tensors, {**metadata, "sha256": digest(metadata, tensors)}))


def load_optimizer(path_or_name):
    """Read a learned optimizer that `save_optimizer` wrote. Loading never runs code from the file.

    Args:
        path_or_name: a file, or the name of one that comes with this library, see `pretrained_optimizers`, such as "mnist".

    Returns:
        The network, on the CPU; also under `torch.inference_mode` or another default device one that can be trained.

    Raises:
        FileNotFoundError: there is no such file or name; the message lists the names there are.
        ValueError: the file is corrupt, of a later format, or not one of ours; or a weight is infinite or NaN.
    """
    path = Path(path_or_name)
    if not path.is_file():  # a folder may have the name of a pretrained optimizer
        names = sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))
        if str(path_or_name) not in names:
            raise FileNotFoundError(f"no file {str(path_or_name)!r}, and no pretrained optimizer of that name; "
                                    f"there are {names}")
        path = PRETRAINED / f"{path_or_name}.safetensors"
    with torch.inference_mode(False), torch.device("cpu"):
        metadata, tensors = contents(path)
        return rebuilt_from(path, metadata, tensors)


def rebuilt_from(path, metadata, tensors):
    """The network that a file describes, if it is whole."""
    if metadata.get("class") not in LEARNED_OPTIMIZERS or metadata.get("format") not in map(str, range(1, FILE_FORMAT + 1)):
        if metadata.get("class") in LEARNED_OPTIMIZERS and metadata.get("format", "").isdigit():
            raise ValueError(f"{path} is of format {metadata['format']}; this version reads 1 to {FILE_FORMAT}: update it")
        raise ValueError(f"{path} holds no learned optimizer of this library (its metadata: {metadata})")
    kept = metadata.pop("sha256", None)
    if kept != digest(metadata, tensors) and (kept is not None or metadata["format"] != "1"):  # the first format had none
        raise ValueError(f"{path} is damaged: its digest is not that of its content")
    try:
        for name, tensor in tensors.items():
            check_finite(tensor, f"the weight {name}")
        net = rebuilt(metadata["class"], json.loads(metadata["config"]))
        net.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    except (KeyError, StopIteration, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe a {metadata['class']}: {error}") from error
    return net


def digest(metadata, tensors):
    """SHA-256 of a file's content, as text: every text of the metadata, every tensor's name, form and bytes."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def pretrained_optimizers():
    """The learned optimizers that come with this library, in `gradbuffer/pretrained`, and what their files say about them.

    Returns:
        dict from name, as `load_optimizer` takes it, to the file's metadata, a dict of text: "class", "config", and the
        notes that `save_optimizer` was given, such as "problem", "seed" and "validation".

    Raises:
        ValueError: a file there is corrupt.

    Example:
        >>> pretrained_optimizers()["quadratics"]["problem"]
        'Quadratics, 10 dimensions'
    """
    return {path.stem: contents(path)[0] for path in sorted(PRETRAINED.glob("*.safetensors"))}


def contents(path):
    """(metadata, tensors) of a safetensors file, both dicts."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def rebuilt(name, config):
    """A learned optimizer from the name of its class and its `config`."""
    if name == "PerKind":
        config = {**config, "networks": {kind: rebuilt(*part) for kind, part in config["networks"].items()}}
    return LEARNED_OPTIMIZERS[name](**config)
