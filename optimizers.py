"""Learned optimizers: networks that read gradients and write updates.

`CoordinatewiseLSTM` is the optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1 and appendix A). A
learned optimizer is any `nn.Module` with `init_state(num_coordinates)` and `forward(grad, state) -> (update, state)`;
`meta_training` takes a user's own as well as these. How it is trained stands in `meta_training`; the arithmetic of
the fast path in `lstm_blocks`.
"""

import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from argument_checks import NonFiniteError, check_count, check_finite
from learned_optimizer import LearnedOptimizer
from lstm_blocks import PackedLSTM, gates_to_ifog, replay_blocks, step_blocks

__all__ = ["CoordinatewiseLSTM", "LearnedOptimizer", "NonFiniteError", "load_optimizer", "log_sign", "save_optimizer"]

FILE_FORMAT = 1
GRAPH_BLOCK = 1 << 16  # coordinates that `replay` runs at once where autograd does the backward pass


def log_sign(grad, p=10.0):
    """Split gradients into the logarithm of their size and their sign, so that every scale is readable.

    ∇ becomes (log|∇| / p, sgn ∇) where |∇| ≥ e^-p, and (-1, e^p ∇) below. Both parts are continuous at the threshold.

    Args:
        grad: (N,), any scale.
        p: positive; gradients down to e^-p keep their logarithm. Default 10, the paper's.

    Returns:
        (2, N), features along rows; carries a graph if `grad` does.

    Reference: Andrychowicz et al. 2016, appendix A.
    """
    size = grad.abs().clamp(min=math.exp(-p)).log().div(p)
    return torch.stack([size, (grad * math.exp(p)).clamp(-1, 1)])


class CoordinatewiseLSTM(nn.Module):
    """The coordinatewise LSTM optimizer: one small LSTM, shared by all coordinates, each with a state of its own.

    (g_t, h_{t+1}) = m(∇_t, h_t; φ) and θ_{t+1} = θ_t + g_t, where m is an LSTM of `num_layers` layers followed by a
    linear output. What autograd records is up to the caller: under `torch.no_grad()` a step takes the fast path (on a
    CPU in blocks of coordinates that stay in cache), otherwise it goes through `nn.LSTM` and carries a graph.

    Args:
        hidden_size: units in each layer, positive. Default 20, the paper's.
        num_layers: LSTM layers, positive. Default 2, the paper's.
        preprocess: None feeds the gradient as it is; "log_sign" feeds `log_sign(grad, p)`.
        p: the threshold of "log_sign" is e^-p; positive.
        output_scale: factor on the output; not zero. The paper has 0.1 on MNIST and 1 on quadratics.

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

    coordinatewise = True  # no coordinate reads another's: any subset of them can be replayed by itself

    def __init__(self, hidden_size=20, num_layers=2, preprocess=None, p=10.0, output_scale=1.0):
        super().__init__()
        check_count(hidden_size=hidden_size, num_layers=num_layers)
        if preprocess not in (None, "log_sign"):
            raise ValueError(f'preprocess must be None or "log_sign", got {preprocess!r}')
        if not (isinstance(p, (int, float)) and 0 < p <= 80):
            raise ValueError(f"p must be a number in (0, 80], got {p!r}")
        if not (isinstance(output_scale, (int, float)) and math.isfinite(output_scale) and output_scale != 0):
            raise ValueError(f"output_scale must be a finite number other than 0, got {output_scale!r}")
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.preprocess, self.p, self.output_scale = preprocess, p, output_scale
        self.lstm = nn.LSTM(2 if preprocess else 1, hidden_size, num_layers)
        self.output = nn.Linear(hidden_size, 1)
        self._packed = self._packed_key = None

    @property
    def config(self):
        """The constructor's arguments, as a dict: what rebuilds this network, weights apart."""
        return {name: getattr(self, name) for name in ("hidden_size", "num_layers", "preprocess", "p", "output_scale")}

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def init_state(self, num_coordinates, device=None, dtype=None):
        """The state before the first step: all zeros.

        Args:
            num_coordinates: N, positive: coordinates of the optimizee, all functions of a meta-batch together.
            device, dtype: default to the weights'.

        Returns:
            (hidden, cell), each (num_layers, hidden_size, N); no graph.
        """
        check_count(num_coordinates=num_coordinates)
        weight = self.output.weight
        shape = self.num_layers, self.hidden_size, num_coordinates
        zeros = [torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype) for _ in range(2)]
        return tuple(zeros)

    def forward(self, grad, state, inplace=False):
        """One step of the optimizer for all coordinates.

        Args:
            grad: (N,), the optimizee's gradient, in the weights' dtype and on their device.
            state: (hidden, cell) as `init_state` or the previous step returned it; changed only if `inplace`.
            inplace: write the next state over `state` (the same tensors are returned). Not with a graph.

        Returns:
            update (N,), to be added to the parameters, and the next state. Both carry a graph back to the weights, to
            `grad` and to `state` when grad mode is on and one of them requires grad; under `torch.no_grad()` neither.

        Raises:
            ValueError: shapes, dtypes or devices do not fit each other, or `inplace` where a graph would be recorded.
            NonFiniteError: `grad` holds an infinity or a NaN.
        """
        self._check(grad, state, (grad.numel(),) if isinstance(grad, torch.Tensor) else None)
        check_finite(grad, "grad")
        hidden, cell = state
        if torch.is_grad_enabled() and any(part.requires_grad for part in (grad, hidden, cell, *self.parameters())):
            if inplace:
                raise ValueError("inplace=True records no graph: call under torch.no_grad(), or leave it False")
            return self._step_with_graph(grad, hidden, cell)
        with torch.no_grad():
            update, hidden, cell = step_blocks(self._pack(), lambda a, b: self._features(grad[a:b]), hidden, cell,
                                               inplace)
        return update, (hidden, cell)

    def replay(self, grads, state, adjoint):
        """Gradient of Σ_t ⟨adjoint_t, update_t⟩ with respect to the weights, over recorded inputs.

        This is the whole meta-gradient when the inputs count as constants (design: "The meta-gradient needs no graph
        of the optimizee"). The coordinates are independent, so they go in blocks and memory does not grow with N × T.
        On a CPU the backward pass is written out; elsewhere `nn.LSTM` runs over each block's whole sequence.

        Args:
            grads: (T, N), the gradients fed to the network at steps 0 … T-1.
            state: the state before step 0; not changed.
            adjoint: (T, N), the derivative of the loss with respect to each update; constant.

        Returns:
            dict from name to gradient, for the parameters that require grad; no graph.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(grads, state, (adjoint.shape[0], state[0].shape[-1]))
        if adjoint.shape != grads.shape:
            raise ValueError(f"adjoint must have the shape of grads {tuple(grads.shape)}, got {tuple(adjoint.shape)}")
        if grads.device.type == "cpu":
            gradients = self._replay_blocks(grads, state, adjoint)
        else:
            gradients = self._replay_with_graph(grads, state, adjoint)
        return {name: gradients[name] for name, parameter in self.named_parameters() if parameter.requires_grad}

    # How it is done ---------------------------------------------------------------------------------------------

    def _check(self, grad, state, shape):
        if not isinstance(grad, torch.Tensor):
            raise TypeError(f"grad must be a tensor, got {type(grad).__name__}")
        weight, N = self.output.weight, grad.shape[-1] if grad.dim() else 0
        if tuple(grad.shape) != shape or N == 0:
            raise ValueError(f"grad must have shape (N,) with N ≥ 1, or (T, N) in replay; got {tuple(grad.shape)}")
        if not (isinstance(state, (tuple, list)) and len(state) == 2):
            raise TypeError("state must be the pair (hidden, cell) of init_state")
        expected = (self.num_layers, self.hidden_size, N)
        for name, tensor in (("state's hidden", state[0]), ("state's cell", state[1])):
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} must have shape {expected} for {N} coordinates, got {tuple(tensor.shape)}")
        for name, tensor in (("grad", grad), ("state", state[0])):
            if tensor.dtype != weight.dtype or tensor.device != weight.device:
                raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, the network {weight.dtype} on "
                                 f"{weight.device}: move one of them")

    def _features(self, grad):
        """(..., N) -> (..., inputs, N)"""
        if self.preprocess is None:
            return grad.unsqueeze(-2)
        return log_sign(grad, self.p).movedim(0, -2)

    def _step_with_graph(self, grad, hidden, cell):
        top, (hidden, cell) = self.lstm(self._features(grad).t()[None], (columns_last(hidden), columns_last(cell)))
        return self.output_scale * self.output(top)[0, :, 0], (hidden.mT, cell.mT)

    def _pack(self):
        """The weights as the block kernels want them, packed again only after they have changed."""
        key = tuple((parameter.data_ptr(), parameter._version) for parameter in self.parameters())
        if key != self._packed_key:
            weights = [[w.detach() for w in layer] for layer in self.lstm.all_weights]
            self._packed = PackedLSTM([(w, u, b + c) for w, u, b, c in weights],
                                      self.output.weight.detach()[0] * self.output_scale,
                                      self.output.bias.detach()[0] * self.output_scale)
            self._packed_key = key
        return self._packed

    @torch.no_grad()
    def _replay_blocks(self, grads, state, adjoint):
        weights, output_weight, output_bias = replay_blocks(
            self._pack(), lambda a, b: self._features(grads[:, a:b]), *state, adjoint)
        gradients = {"output.weight": output_weight[None] * self.output_scale,
                     "output.bias": output_bias[None] * self.output_scale}
        for l, weight in enumerate(weights):
            inputs = weight.shape[1] - self.hidden_size - 1
            ih, hh, bias = gates_to_ifog(weight).split([inputs, self.hidden_size, 1], 1)
            gradients |= {f"lstm.weight_ih_l{l}": ih, f"lstm.weight_hh_l{l}": hh,
                          f"lstm.bias_ih_l{l}": bias[:, 0], f"lstm.bias_hh_l{l}": bias[:, 0].clone()}
        return gradients

    @torch.enable_grad()
    def _replay_with_graph(self, grads, state, adjoint):
        parameters = dict(self.named_parameters())
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        wanted = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        for block in range(0, grads.shape[1], GRAPH_BLOCK):
            block = slice(block, block + GRAPH_BLOCK)
            features = self._features(grads[:, block]).mT  # (T, block, inputs)
            top, _ = self.lstm(features, tuple(columns_last(tensor[..., block]) for tensor in state))
            updates = self.output_scale * self.output(top)[..., 0]
            parts = torch.autograd.grad((updates * adjoint[:, block]).sum(), list(wanted.values()))
            for name, part in zip(wanted, parts):
                total[name] += part
        return total

    def __getstate__(self):  # packed weights are a cache: not pickled, not copied
        return {**self.__dict__, "_packed": None, "_packed_key": None}


def columns_last(state):
    """(layers, H, N), features along rows, -> (layers, N, H), what `nn.LSTM` wants."""
    return state.mT.contiguous()


# Files --------------------------------------------------------------------------------------------------------------

LEARNED_OPTIMIZERS = {"CoordinatewiseLSTM": CoordinatewiseLSTM}


def save_optimizer(net, path, **notes):
    """Write a learned optimizer to a safetensors file: its weights, and in the metadata its class and arguments.

    The file is written beside its place and then renamed, so that a failure leaves an older file as it was.

    Args:
        net: one of this module's learned optimizers.
        path: where to; the folder is made if it is not there.
        notes: what else the metadata should say (problem, seed, result …), kept as text.

    Raises:
        TypeError: `net` is not one of this module's classes.
        OSError: the file cannot be written.

    Example:
        >>> save_optimizer(CoordinatewiseLSTM(), "checkpoints/new.safetensors", problem="none yet")
        >>> net = load_optimizer("checkpoints/new.safetensors")
    """
    if type(net).__name__ not in LEARNED_OPTIMIZERS:
        raise TypeError(f"net must be one of {sorted(LEARNED_OPTIMIZERS)}, got {type(net).__name__}")
    metadata = {"format": str(FILE_FORMAT), "class": type(net).__name__, "config": json.dumps(net.config),
                **{name: str(note) for name, note in notes.items()}}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(save(tensors, metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_optimizer(path_or_name):
    """Read a learned optimizer that `save_optimizer` wrote. Loading never runs code from the file.

    Args:
        path_or_name: a file, or the name of one in the folder `pretrained` beside this module, such as "mnist".

    Returns:
        The network, on the CPU.

    Raises:
        FileNotFoundError: there is no such file or name; the message lists the names there are.
        ValueError: the file is corrupt, of a later format, or not one of ours.
    """
    folder = Path(__file__).with_name("pretrained")
    path = Path(path_or_name)
    if not path.exists():
        names = sorted(file.stem for file in folder.glob("*.safetensors"))
        if str(path_or_name) not in names:
            raise FileNotFoundError(f"no file {str(path_or_name)!r}, and no pretrained optimizer of that name; "
                                    f"there are {names}")
        path = folder / f"{path_or_name}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("class") not in LEARNED_OPTIMIZERS or not metadata.get("format", "").isdigit():
        raise ValueError(f"{path} holds no learned optimizer of this library (its metadata: {metadata})")
    if int(metadata["format"]) > FILE_FORMAT:
        raise ValueError(f"{path} is of format {metadata['format']}; this version reads up to {FILE_FORMAT}: update it")
    try:
        net = LEARNED_OPTIMIZERS[metadata["class"]](**json.loads(metadata["config"]))
        net.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    except (KeyError, StopIteration, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe a {metadata['class']}: {error}") from error
    return net
