"""A small learned optimizer: one multilayer perceptron, shared by all coordinates, that reads statistics of whole tensors.

Celo2 (arXiv 2602.19142) and `small_fc` (Metz et al. 2022, arXiv 2203.11860). For each coordinate of a tensor the network reads
its gradient, its parameter, moving averages of both moments and, in matrices, factored second moments of its row and column. It
writes a direction; the rate and its schedule remain the user's. `MLPOptimizer` is the slow, clear reference in plain torch, for
any device and with gradients through everything. How to train its weights is not said here.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from gradbuffer.checks import check_count, check_positive_number
from gradbuffer.contracts import Rule
from gradbuffer.devices import constant
from gradbuffer.kernels.matrices import (
    CONTEXT_FEATURES,
    CONTEXT_UNITS,
    ITERATIONS,
    LARGEST_LOG,
    NEWTON_SCHULZ,
    as_matrix,
    from_matrix,
    matrix_axes,
)

__all__ = ["MLPOptimizer", "as_matrix", "from_matrix", "matrix_axes", "start_as_normalized_adam"]

MOMENTS = (0.9, 0.99, 0.999)  # decays of the gradient's averages, and of the rows' and columns' second moments
SECOND = 0.95  # decay of the squared gradient's average
GRADIENT_BOUND = 1000.0
VECTOR_FEATURES, MATRIX_FEATURES = 15, 30
ADAM_FEATURE = 7  # m_.9 / √(v + 1e-8)
NOT_IN_SMALL_FC = (1, 11)  # the clipped gradient and g / √(v + 1e-8), which came later
TIMES = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)
SMALL_FC_MAGNITUDE = 0.001
ADAMW_BETAS, ADAMW_EPS, ADAMW_RATE = (0.9, 0.95), 1e-8, 20.0
PARAM_FEATURE, SECOND_FEATURE, SIGNAL_FEATURES = 2, 6, (3, 4, 5, 0)  # θ; v; m_k and g


class MLPOptimizer(Rule, nn.Module):
    """A learned optimizer that reads statistics of whole tensors and writes directions.

    The update of a tensor θ is -lr · (d + weight_decay · θ). In the variant "celo" d is the network's output divided by its root
    mean square over the tensor. In "small_fc" the network also reads the time and has two outputs: d is the first times
    exp(0.001 · the second), and the published lr is 0.001.

    A tensor whose gradient is zero everywhere does not move in that step; its averages go on. The averages are not corrected for
    their start at zero, so the first twenty or so steps differ from Adam's. In "celo" a tensor of one element moves by lr
    in every step, up or down: its own root mean square is its absolute value.

    Args:
        hidden_sizes: units of each hidden layer, at least one layer.
        variant: "celo" or "small_fc".
        orthogonalize: five Newton-Schulz iterations of the output of tensors with two or more axes, as in Muon; "celo" only.
        vectors: who moves tensors with fewer than two axes: "mlp", this network, or "adamw", AdamW(0.9, 0.95) at 20 · lr.
        context: a second perceptron reads seven numbers of the whole tensor: the sizes of its averaged and of its latest gradient
            over the root of v's (how much of them is noise), the size of its parameters, lr over that, and whether it is a vector. It adds
            to the units of the first hidden layer and multiplies the direction by a factor from e⁻³ to e³. "celo" only.
        weight_decay: 0 or more, decoupled.
        lr: the rate where `forward` is given none, above 0; the default rate of `LearnedOptimizer`.

    Attributes:
        rounds_products: where kernels on CUDA take a `LearnedOptimizer`'s steps in float32, the factors of the products of Newton-Schulz
            are rounded to float16, which has as many digits as TF32; sums and the matrices themselves are not. The directions of
            matrices of 64 × 4000 to 128 × 576 were off by 0.002 of their size at most; those of TF32 by 0.004, and where the matrix
            itself is rounded to bfloat16, as in Muon, by up to 0.3. Default True; False: exact to float32's digits, and slower.

    Raises:
        TypeError, ValueError: an argument is not as said.

    `LearnedOptimizer(model.parameters(), net, lr=0.003)` trains a model by it. By itself it advances functions at once:

    Example:
        >>> net = MLPOptimizer()
        >>> params = {"weight": torch.randn(4, 10, 5), "bias": torch.zeros(4, 10)}  # of four functions at once
        >>> state = net.init_state(params)
        >>> grads = {name: torch.randn_like(value) for name, value in params.items()}
        >>> updates, state = net(grads, state, params=params, lr=0.01)
        >>> params = {name: params[name] + updates[name] for name in params}
    """

    tensorwise = True
    rounds_products = True
    arguments = ("hidden_sizes", "variant", "orthogonalize", "vectors", "weight_decay", "lr", "context")

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (8, 8),
        variant: str = "celo",
        orthogonalize: bool = False,
        vectors: str = "mlp",
        weight_decay: float = 0.0,
        lr: float = 1e-3,
        context: bool = False,
    ):
        super().__init__()
        if not isinstance(hidden_sizes, (tuple, list)) or not hidden_sizes:
            raise TypeError(f"hidden_sizes must be a tuple of at least one int, got {hidden_sizes!r}")
        for size in hidden_sizes:
            check_count(hidden_sizes=size)
        for name, value, accepted in (
            ("variant", variant, ("celo", "small_fc")),
            ("vectors", vectors, ("mlp", "adamw")),
            ("orthogonalize", orthogonalize, (False, True)),
            ("context", context, (False, True)),
        ):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}")
        for name, value in (("orthogonalize", orthogonalize), ("context", context)):
            if value and variant == "small_fc":
                raise ValueError(
                    f'{name} must be False with variant "small_fc", whose output has a size of its own, got True'
                )
        if weight_decay != 0:
            check_positive_number(weight_decay=weight_decay)
        check_positive_number(lr=lr)
        self.hidden_sizes, self.variant, self.orthogonalize = tuple(hidden_sizes), variant, bool(orthogonalize)
        self.vectors, self.weight_decay, self.lr = vectors, float(weight_decay), float(lr)
        self.context = bool(context)
        features = MATRIX_FEATURES if variant == "celo" else MATRIX_FEATURES - len(NOT_IN_SMALL_FC) + len(TIMES)
        sizes = (features, *hidden_sizes, 1 if variant == "celo" else 2)
        self.layers = nn.ParameterDict()
        for l, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            self.layers[f"weight_{l}"] = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
            self.layers[f"bias_{l}"] = nn.Parameter(torch.zeros(outputs))
        sizes = (CONTEXT_FEATURES, CONTEXT_UNITS, hidden_sizes[0] + 1)
        for l, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])) if context else ():
            self.layers[f"context_weight_{l}"] = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
            self.layers[f"context_bias_{l}"] = nn.Parameter(torch.zeros(outputs))

    @property
    def reads(self) -> set:
        """What `forward` reads beside gradients and state."""
        return {"params"} if self.variant == "celo" else {"params", "step"}

    def init_state(self, params: dict) -> dict:
        """The state before the first step: zeros, in the parameters' dtype and on their device.

        Args:
            params: dict from name to tensor (B, *shape), the parameters of B functions.

        Returns:
            dict from name to that tensor's state, a dict of tensors: "m" (B, 3, *shape), "v" (B, *shape) and, where it has
            two or more axes, "rows" (B, 3, rows) and "columns" (B, 3, columns). With vectors="adamw" those with fewer have "m",
            "v" (B, *shape) and "steps" (B,). No graph.
        """
        return {name: self._zeros(value) for name, value in params.items()}

    def _zeros(self, param):
        functions, *shape = param.shape
        axes = matrix_axes(shape)
        shapes = {"m": (functions, len(MOMENTS), *shape), "v": param.shape}
        if axes:
            shapes |= {name: (functions, len(MOMENTS), shape[axis]) for name, axis in zip(("rows", "columns"), axes)}
        elif self.vectors == "adamw":
            shapes = {"m": param.shape, "v": param.shape, "steps": (functions,)}
        return {name: torch.zeros(size, dtype=param.dtype, device=param.device) for name, size in shapes.items()}

    def forward(
        self,
        grads: dict,
        state: dict,
        *,
        params: dict,
        lr: float | torch.Tensor | None = None,
        step: int | torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[dict, dict]:
        """One step of B functions.

        Args:
            grads: dict from name to gradient (B, *shape); clipped at ±1000 here.
            state: as `init_state` or the previous step returned it; not changed.
            params: dict from name to parameter (B, *shape).
            lr: a number, or (B,) with one for each function; default: `self.lr`.
            step: how many steps were done before, an int or (B,); needed where `reads` says "step".
            weights: other weights than this network's own: flat (W,) in the order of `parameters()`, or (B, W) with a
                set for each function.

        Returns:
            updates, a dict like params, to be added to them, and the next state. Both carry a graph to whatever requires grad.

        Raises:
            ValueError: names or shapes do not fit each other, or `step` is missing.
        """
        for name, given in (("grads", grads), ("state", state)):
            if set(given) != set(params):
                raise ValueError(f"{name} must have the names of params, {sorted(params)}, got {sorted(given)}")
        if "step" in self.reads and step is None:
            raise ValueError('step must be given with variant "small_fc", which reads the time, got None')
        layers, lr, updates, after = self._layers(weights), self.lr if lr is None else lr, {}, {}
        for name, param in params.items():
            grad = grads[name]
            if grad.shape != param.shape:
                raise ValueError(
                    f"grads[{name!r}] must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}"
                )
            direction, after[name] = self.direction(grad, param, state[name], layers, lr, step)
            moves = (grad != 0).flatten(1).any(1) if grad.dim() > 1 else grad != 0
            direction = torch.where(over(moves, grad), direction, torch.zeros_like(direction))
            updates[name] = -over(lr, grad) * direction
        return updates, after

    def direction(
        self,
        grad: torch.Tensor,
        param: torch.Tensor,
        state: dict[str, torch.Tensor],
        layers: list[tuple[torch.Tensor, torch.Tensor]],
        lr: float | torch.Tensor,
        step: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What one tensor's update is -lr times, weight decay included, and its next state.

        Args:
            grad, param: (B, *shape).
            state: that tensor's, as in `init_state`.
            layers: list of pairs of a weight (inputs, outputs) or (B, inputs, outputs) and a bias (outputs,) or (B, 1, outputs);
                those of the context come last.
            lr, step: as of `forward`.

        Returns:
            direction (B, *shape) and a dict like `state`; with a graph to whatever requires grad.
        """
        grad, axes = grad.clamp(-GRADIENT_BOUND, GRADIENT_BOUND), matrix_axes(param.shape[1:])
        if not axes and self.vectors == "adamw":
            return self._adamw(grad, param, state)
        state = advance(state, grad, axes)
        features = self._features(grad, param, state, axes)  # each (B, n)
        squares = [x.square().mean(1, keepdim=True) for x in features]  # each (B, 1)
        hidden = torch.stack([x * (square + 1e-9).rsqrt() for x, square in zip(features, squares)], -1)
        if self.variant == "small_fc":
            hidden = self._with_times(hidden, step)
        depth = len(self.hidden_sizes) + 1
        layers, context, shift, size = layers[:depth], layers[depth:], 0.0, 1.0
        if self.context:
            shift, size = self._of_context(squares, lr, not axes, context)
        for l, (weight, bias) in enumerate(layers):
            if l == 0 and not axes:  # of vectors, those of matrices count as 0
                weight = self._weight_of_vectors(weight)
            hidden = hidden @ weight + (bias + shift if l == 0 else bias)
            if l + 1 < len(layers):
                hidden = hidden.relu()
        out = hidden[..., 0]  # (B, n)
        if self.variant == "small_fc":
            out = out * torch.exp(SMALL_FC_MAGNITUDE * hidden[..., 1])
        elif axes and self.orthogonalize:
            rows = param.shape[1 + axes[0]]
            out = orthogonalize_matrices(out.unflatten(1, (rows, -1))).flatten(1)
        if self.variant == "celo":
            out = size * out * (out.square().mean(1, keepdim=True) + 1e-9).rsqrt()
        return from_matrix(out, param.shape, axes) + self.weight_decay * param, state

    def _of_context(self, squares, lr, is_vector, layers):
        """What is added to the first hidden layer (B, 1, units), and the step's length (B, 1); squares: the features', each (B, 1)."""
        if not isinstance(lr, torch.Tensor):
            lr = squares[0].new_full((), lr)  # a number brought to a device would be waited for
        lr = lr.to(squares[0]).reshape(-1, 1)
        param = squares[PARAM_FEATURE] + 1e-6
        second = (
            squares[SECOND_FEATURE] + 1e-38
        ).log() / 2  # whatever the gradient's scale, the network reads the same
        logs = [((squares[number] + 1e-30).log() - second) / 6 for number in SIGNAL_FEATURES]
        flag = torch.full_like(param, is_vector)
        read = torch.stack([*logs, param.log() / 6, ((lr * lr + 1e-12) / param).log() / 6, flag], -1)  # (B, 1, 7)
        (first, bias), (second, last) = layers
        out = (read @ first + bias).relu() @ second + last
        return out[..., :-1], (LARGEST_LOG * torch.tanh(out[..., -1] / LARGEST_LOG)).exp()

    def _features(self, grad, param, state, axes):
        """Those of a tensor's coordinates, each (B, n) with n in the order of `as_matrix`, not yet divided by their sizes."""
        g, p, v = (as_matrix(x, axes) for x in (grad, param, state["v"]))
        moments = [as_matrix(m, axes) for m in state["m"].unbind(1)]
        root = (v + 1e-8).rsqrt()
        features = [g, g.clamp(-0.1, 0.1), p, *moments, v, *(m * root for m in moments), root, g * root]
        if axes:
            rows, columns = state["rows"], state["columns"]  # (B, 3, rows), (B, 3, columns)
            row_factors = (rows / (rows.mean(2, keepdim=True) + 1e-9)).clamp(min=1e-9).rsqrt()
            factors = row_factors[..., None] * columns.clamp(min=1e-9).rsqrt()[:, :, None]  # (B, 3, rows, columns)
            factors = [spread(factor, g) for factor in factors.unbind(1)]
            features += [g * factor for factor in factors]
            for read in (lambda x: x, lambda x: (x + 1e-8).rsqrt()):
                features += [spread(read(x)[..., None], g) for x in rows.unbind(1)]
                features += [spread(read(x)[:, None], g) for x in columns.unbind(1)]
            features += [m * factor for m, factor in zip(moments, factors)]
        else:
            features += [g * v.clamp(min=1e-9).rsqrt()] * len(MOMENTS)
        left_out = NOT_IN_SMALL_FC if self.variant == "small_fc" else ()
        return [feature.flatten(1) for number, feature in enumerate(features) if number not in left_out]

    def _with_times(self, features, step):
        if not isinstance(step, torch.Tensor):
            step = features.new_full((), step)  # a number brought to a device would be waited for
        step = step.to(features).reshape(-1, 1, 1)
        times = torch.tanh(step / constant(TIMES, features.device, features.dtype) - 1)
        return torch.cat([features, times.expand(*features.shape[:2], -1)], -1)

    def _weight_of_vectors(self, weight):
        if self.variant == "celo":
            return weight[..., :VECTOR_FEATURES, :]
        read = VECTOR_FEATURES - len(NOT_IN_SMALL_FC)
        return torch.cat([weight[..., :read, :], weight[..., -len(TIMES) :, :]], -2)

    def _layers(self, weights):
        """Pairs of a weight and a bias, from the own parameters or from flat ones."""
        own = list(self.layers.values())
        if weights is None:
            parts = own
        else:
            sizes = [part.numel() for part in own]
            if weights.dim() not in (1, 2) or weights.shape[-1] != sum(sizes):
                raise ValueError(f"weights must be ({sum(sizes)},) or (B, {sum(sizes)}), got {tuple(weights.shape)}")
            parts = [flat.unflatten(-1, part.shape) for flat, part in zip(weights.split(sizes, -1), own)]
        return [(weight, bias if bias.dim() == 1 else bias[:, None]) for weight, bias in zip(parts[::2], parts[1::2])]

    def _adamw(self, grad, param, state):
        """torch.optim.AdamW's step at ADAMW_RATE · lr."""
        steps, (first, second) = state["steps"] + 1, ADAMW_BETAS
        m, v = first * state["m"] + (1 - first) * grad, second * state["v"] + (1 - second) * grad * grad
        corrected = [moment / (1 - over(beta**steps, grad)) for moment, beta in ((m, first), (v, second))]
        direction = corrected[0] / (corrected[1].sqrt() + ADAMW_EPS) + self.weight_decay * param
        return ADAMW_RATE * direction, {"m": m, "v": v, "steps": steps}


def start_as_normalized_adam(net: MLPOptimizer, seed: int = 0) -> MLPOptimizer:
    """Write weights with which the direction is m_.9 / √(v + 1e-8) over its root mean square, before any training.

    In each layer a pair of units passes x and -x on. All other units have small random weights, and the output does not read
    them yet.

    Args:
        net: an `MLPOptimizer` with at least two units in every hidden layer; changed.
        seed: of the random weights.

    Returns:
        net.

    Raises:
        ValueError: a layer has one unit.
    """
    if min(net.hidden_sizes) < 2:
        raise ValueError(f"net must have at least 2 units in every hidden layer, got hidden_sizes={net.hidden_sizes}")
    generator = torch.Generator().manual_seed(seed)
    adam = ADAM_FEATURE - sum(number < ADAM_FEATURE for number in NOT_IN_SMALL_FC) * (net.variant == "small_fc")
    last = len(net.hidden_sizes)
    with torch.no_grad():
        for l in range(last + 1):
            weight, bias = net.layers[f"weight_{l}"], net.layers[f"bias_{l}"]
            bias.zero_()
            if l == last:
                weight.zero_()
                weight[:2, 0] = torch.tensor([1.0, -1.0])
                continue
            noise = torch.randn(weight.shape, generator=generator) * 0.15 / math.sqrt(len(weight))
            weight.copy_(noise)
            weight[:, :2] = 0
            if l == 0:
                weight[adam, :2] = torch.tensor([1.0, -1.0])
            else:
                weight[:2, :2] = torch.eye(2)
        if net.context:
            weight = net.layers["context_weight_0"]
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(len(weight)))
            for name in ("context_bias_0", "context_weight_1", "context_bias_1"):
                net.layers[name].zero_()
    return net


def advance(state, grad, axes):
    """The averages after one more gradient (B, *shape)."""
    decays = constant(MOMENTS, grad.device, grad.dtype).reshape(1, -1, *[1] * (grad.dim() - 1))
    new = {
        "m": decays * state["m"] + (1 - decays) * grad[:, None],
        "v": SECOND * state["v"] + (1 - SECOND) * grad * grad,
    }
    if axes:
        squares, decays = as_matrix(grad, axes).square() + 1e-30, constant(MOMENTS, grad.device, grad.dtype)[:, None]
        for name, over_axes in (("rows", (2, 3)), ("columns", (1, 3))):
            new[name] = decays * state[name] + (1 - decays) * squares.mean(over_axes)[:, None]
    return new


def spread(values, like):
    """(B, rows or 1, columns or 1) over all of (B, rows, columns, others)."""
    return values[..., None].expand(like.shape)


def over(numbers, like):
    """(B,) or one number, to be multiplied with (B, *shape)."""
    if not isinstance(numbers, torch.Tensor) or numbers.dim() == 0:
        return numbers
    return numbers.reshape(-1, *[1] * (like.dim() - 1))


def orthogonalize_matrices(matrices):
    """Five Newton-Schulz iterations towards the orthogonal matrix nearest to each of (B, rows, columns)."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
