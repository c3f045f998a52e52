"""The step of a small learned optimizer on a CPU, compiled by numba: few passes over a tensor, nothing stored between features.

`gradbuffer.nets.mlp.MLPOptimizer` (variant "celo") is the plain version, which this one is tested against.
Here features go from a processor's registers straight into the first hidden layer. Those that are the same along a row or a column
are added up once for it. A tensor is gone through four times: its averages and all sums over it;
sums that need the rows' and columns' averages; the
network's output; the update. Threads share the rows of large tensors. Newton-Schulz comes between the last two.
"""

import math

import numpy as np
import torch

from gradbuffer.contracts import Rule
from gradbuffer.kernels.llvm_mlp import FACTORED, OF_MATRIX, READ
from gradbuffer.kernels.matrices import as_matrix, from_matrix, matrix_axes
from gradbuffer.kernels.numba_compiler import compiled
from gradbuffer.kernels.numba_mlp_loops import (
    FEATURES,
    after_factors,
    after_reading,
    direct_part,
    factor_part,
    move,
    read_part,
    step_adamw,
    step_matrix,
    step_vector,
)
from gradbuffer.kernels.numba_orthogonal import numbers_to_orthogonalize, orthogonalized
from gradbuffer.kernels.numba_threads import buffer, parallel_for, shares_of, threads_here, without_denormals

__all__ = [
    "TOTALS",
    "ParticleSteps",
    "TensorSteps",
    "check_net",
    "numbers_of_scratch",
    "plain_weights",
    "step_adamw",
    "step_matrix",
    "step_vector",
]

WORTHWHILE = 1 << 15  # coordinates of a matrix from which on threads share it
TOTALS = READ + FACTORED + 1  # sums over a tensor, in float64


class TensorSteps:
    """Steps of an `MLPOptimizer`, variant "celo", of single tensors on a CPU, where they lie.

    Args:
        net: the `MLPOptimizer`. Its weights are copied: make another of these when they have changed.
        dtype: of the tensors, torch.float32 or torch.float64.

    Raises:
        TypeError, ValueError: an argument is not as said.

    Example:
        >>> steps, param = TensorSteps(net), torch.randn(10, 5)
        >>> state = {name: value[0] for name, value in net.init_state({"": param[None]})[""].items()}
        >>> steps.step(param, torch.randn(10, 5), state, lr=0.01)  # param and state are changed
    """

    def __init__(self, net, dtype=torch.float32):
        check_net(net)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.dtype, self.hidden, self.decay, self.adamw = (
            dtype,
            net.hidden_sizes,
            net.weight_decay,
            net.vectors == "adamw",
        )
        weights = torch.nn.utils.parameters_to_vector(net.parameters()).detach().to("cpu", dtype).numpy()
        self.weights, self.context = weights[: plain_weights(self.hidden)], weights[plain_weights(self.hidden) :]
        self.orthogonal = net.orthogonalize
        self.shape = tuple((0,) * size for size in self.hidden)

    def step(self, param, grad, state, lr):
        """One step; `param` and the tensors of `state` are overwritten. What does not lie in one piece is copied there and back.

        Args:
            param, grad: of the same shape and this dtype, on the CPU.
            state: what `MLPOptimizer.init_state` gives for one function, without its leading axis. With parameters of float32 "m" and
                "v" may both be of bfloat16, except those of AdamW: averages that lie so take half the memory, and those of slow
                decay miss small changes.
            lr: 0 or more.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices do not fit each other.
        """
        axes, shape = matrix_axes(param.shape), tuple(param.shape)
        parts = ("m", "v", "rows", "columns") if axes else ("m", "v", "steps") if self.adamw else ("m", "v")
        if tuple(state) != parts:
            raise ValueError(f"state must have {parts}, got {tuple(state)}")
        shapes = {"grad": shape, "m": shape if self.adamw and not axes else (3, *shape), "v": shape, "steps": ()}
        if axes:
            shapes |= {name: (3, shape[axis]) for name, axis in zip(("rows", "columns"), axes)}
        narrow = state["m"].dtype == torch.bfloat16 and self.dtype == torch.float32 and "steps" not in parts
        for name, tensor in {"param": param, "grad": grad, **state}.items():
            dtype = torch.bfloat16 if narrow and name in ("m", "v") else self.dtype
            if tensor.dtype != dtype or tensor.device.type != "cpu":
                raise TypeError(f"{name} must be of {dtype} on the CPU, got {tensor.dtype} on {tensor.device}")
            if tuple(tensor.shape) != shapes.get(name, shape):
                raise ValueError(f"{name} must have the shape {shapes.get(name, shape)}, got {tuple(tensor.shape)}")
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be finite and 0 or more, got {lr}")
        if not param.numel():
            return
        with torch.no_grad():
            laid = {
                name: in_one_piece(tensor, axes if name in ("grad", "param", "m", "v") else None, name == "m" and axes)
                for name, tensor in {"param": param, "grad": grad, **state}.items()
            }
            theta, grads, *own = (
                (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy() for flat in laid.values()
            )
            if axes:
                self._step_matrix(shape[axes[0]], shape[axes[1]], grads, theta, *own, float(lr))
            elif self.adamw:
                step_adamw(grads, theta, *own, float(lr), self.decay)
            else:
                scratch = buffer("mlp scratch", numbers_of_scratch(self.hidden, 1, 1), self.dtype)
                step_vector(
                    self.shape,
                    grads,
                    theta,
                    *own,
                    self.weights,
                    self.context,
                    float(lr),
                    self.decay,
                    buffer("mlp out", theta.size, self.dtype),
                    scratch,
                    np.empty(TOTALS),
                )
            if not param.is_inference():
                torch.autograd.graph.increment_version(param)  # numba's writes would go unnoticed by autograd
            for name, tensor in {"param": param, **state}.items():
                if laid[name].data_ptr() != tensor.data_ptr():
                    several = name == "m" and axes
                    tensor.copy_(
                        from_matrix(
                            laid[name].reshape(3 if several else 1, -1), (3 if several else 1, *shape), axes
                        ).reshape(tensor.shape)
                    )

    def steps(self, params, grads, states, lr):
        """`step` for each of several tensors: threads take one after the other, and share those that are much of the whole.

        Args:
            params, grads, states: lists of the same length, of what `step` takes.
            lr: 0 or more.

        Raises:
            TypeError, ValueError: lengths differ, or as of `step`; then other tensors than the faulty one may have moved.
        """
        if not len(params) == len(grads) == len(states):
            raise ValueError(
                f"params, grads and states must be equally many, got {len(params)}, {len(grads)} and {len(states)}"
            )
        large = sum(param.numel() for param in params) // (2 * threads_here())
        order = sorted(range(len(params)), key=lambda k: -params[k].numel())

        def work(k):
            self.step(params[k], grads[k], states[k], lr)

        small = [(k,) for k in order if threads_here() > 1 and params[k].numel() <= large]
        for k in order[: len(order) - len(small)]:
            work(k)
        if small:
            parallel_for(work, small, single_threaded=True)

    def _step_matrix(self, rows, columns, grad, theta, m, v, r, c, lr):
        others, count, threads = theta.size // (rows * columns), theta.size, min(threads_here(), rows)
        width, H = columns * others, self.shape
        scratch = buffer("mlp scratch", numbers_of_scratch(self.hidden, rows, width), self.dtype)
        out, totals = buffer("mlp out", count, self.dtype), np.zeros((threads, TOTALS))
        if not self.orthogonal and (threads == 1 or count < WORTHWHILE):
            given = H, rows, columns, others, grad, theta, m, v, r, c, self.weights, self.context, False
            step_matrix(*given, lr, self.decay, out, scratch, totals[0])
            return
        spans = [(k, rows * k // threads, rows * (k + 1) // threads) for k in range(threads)]
        squares = np.zeros((threads, width), theta.dtype)
        parallel_for(
            lambda k, a, b: read_part(H, a, b, rows, width, grad, theta, m, v, scratch, squares[k], totals[k]), spans
        )
        if not after_reading(H, rows, columns, others, grad, r, c, scratch, squares.sum(0), totals.sum(0)):
            return
        parallel_for(lambda k, a, b: factor_part(H, a, b, rows, width, grad, m, scratch, totals[k]), spans)
        given = r, c, self.weights, self.context, lr
        length = after_factors(H, rows, columns, others, *given, scratch, totals.sum(0))
        parallel_for(
            lambda k, a, b: direct_part(H, a, b, rows, width, grad, theta, m, v, scratch, out, totals[k]), spans
        )
        total = totals.sum(0)[READ + FACTORED]
        if self.orthogonal:
            given, out = torch.from_numpy(out).view(rows, width), buffer("mlp orthogonal", count, self.dtype)
            total = orthogonalized(given, torch.from_numpy(out).view(rows, width)).norm().item() ** 2
        parallel_for(lambda _, a, b: move(theta, out, a * width, b * width, total, length, lr, self.decay), spans)


class ParticleSteps:
    """Steps of an `MLPOptimizer`, variant "celo", of tensors of P particles at once, each under weights of its own, on a CPU.

    Args:
        net: the `MLPOptimizer` that says what the step is. Its weights are not taken from here.
        dtype: of all tensors, torch.float32 or torch.float64.
    """

    def __init__(self, net, dtype):
        check_net(net)
        self.dtype, self.hidden, self.decay = dtype, net.hidden_sizes, net.weight_decay
        self.adamw, self.orthogonal = net.vectors == "adamw", net.orthogonalize
        self.shape = tuple((0,) * size for size in self.hidden)

    @staticmethod
    def takes(shape):
        """Whether tensors of that shape, without the axis of particles, lie as `step` reads them."""
        return matrix_axes(shape) in (None, (0, 1))

    def bind(self, params, grads, states, weights):
        """What takes a step of all tensors where they lie: a function of the rates (P,), of float64.

        Args:
            params: dict from name to (P, *shape), each in one piece; every step overwrites them.
            grads: a dict like it, read at each step.
            states: what `MLPOptimizer.init_state` gives for them; every step overwrites it.
            weights: (P, W), or (W,) for all.
        """
        P, calls, largest, need = len(next(iter(params.values()))), [], 0, 0
        weights = weights.detach().to(self.dtype).reshape(-1, weights.shape[-1]).contiguous().numpy()
        for name, param in params.items():
            shape, count = tuple(param.shape[1:]), param[0].numel()
            matrix = matrix_axes(shape) is not None
            rows, columns = (shape[0], shape[1]) if matrix else (1, 1)
            width = count // rows if matrix else 1
            arrays = [part.detach().view(P, -1).numpy() for part in (grads[name], param, *states[name].values())]
            arrays += [arrays[3][:, :0]] * (6 - len(arrays))  # vectors have no rows and columns
            kinds = np.array([matrix, self.adamw, plain_weights(self.hidden), self.orthogonal])
            calls.append((self.shape, kinds, rows, columns, max(width // columns, 1), *arrays, weights))
            largest, need = max(largest, count), max(need, numbers_of_scratch(self.hidden, rows, width))
            if matrix and self.orthogonal:
                need = max(need, numbers_to_orthogonalize(rows, width))

        def step(lr):
            lr = lr.numpy()

            def work(first, last):
                out, scratch, totals = (
                    buffer("mlp out", largest, self.dtype),
                    buffer("mlp scratch", need, self.dtype),
                    np.empty(TOTALS),
                )
                with without_denormals():
                    for given in calls:
                        count = given[6].shape[1]
                        step_particles(*given, lr, self.decay, first, last, out[:count], scratch, totals)

            parallel_for(work, shares_of(P))

        return step


@compiled
def step_particles(
    H, kinds, rows, columns, others, grad, theta, m, v, r, c, weights, lr, decay, first, last, out, scratch, totals
):
    """One tensor's step of particles first … last - 1. kinds: whether it is a matrix, whether AdamW moves vectors, how many of the
    weights are not the context's, whether updates of matrices become orthogonal."""
    for b in range(first, last):
        w = weights[b if len(weights) > 1 else 0]
        w, context = w[: kinds[2]], w[kinds[2] :]
        g, x = grad[b], theta[b]
        if kinds[0]:
            given = H, rows, columns, others, g, x, m[b], v[b], r[b], c[b], w, context, kinds[3] != 0
            step_matrix(*given, lr[b], decay, out, scratch, totals)
        elif kinds[1]:
            step_adamw(g, x, m[b], v[b], r[b], lr[b], decay)
        else:
            step_vector(H, g, x, m[b], v[b], w, context, lr[b], decay, out, scratch, totals)


def check_net(net):
    """Raise unless the compiled step is that of this network."""
    if not isinstance(net, Rule) or "orthogonalize" not in net.arguments:
        raise TypeError(f"net must be an MLPOptimizer, got {type(net).__name__}")
    if net.variant != "celo":
        raise ValueError(f'net must have variant "celo", got {net.variant!r}')


def in_one_piece(tensor, axes, several):
    """A tensor's numbers in the order of `as_matrix`, flat: its own memory where it lies so. several: it has a leading axis."""
    return as_matrix(tensor if several else tensor[None], axes).contiguous().view(-1)


def numbers_of_scratch(hidden, rows, width):
    """How many numbers `step_matrix` and `step_vector` write into for a tensor (rows, width) beside its update."""
    layers = sum((a + 1) * b for a, b in zip(hidden, (*hidden[1:], 1)))
    return (rows + width) * (7 + hidden[0]) + (OF_MATRIX + 1) * hidden[0] + layers


def plain_weights(hidden):
    """How many weights the network has without those of its context, which come last."""
    return sum((a + 1) * b for a, b in zip((FEATURES, *hidden), (*hidden, 1)))
