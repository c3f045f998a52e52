"""Perceptrons trained by a small learned optimizer on a CPU, from minibatch to step in one compiled loop.

For meta-training by evolution strategies, where a window is run forward only and many times: each particle (a function to be
minimized, with weights of the optimizer of its own if wanted) goes through all steps within a core's cache. Particles do not read
each other; as many run at once as torch has threads. The optimizer is `gradbuffer.nets.mlp.MLPOptimizer`, variant "celo",
which together with autograd is what this is tested against.
"""

import itertools
import math

import numpy as np
import torch

from gradbuffer.checks import check_count, check_positive_number
from gradbuffer.kernels.numba_compiler import compiled
from gradbuffer.kernels.numba_mlp import (
    TOTALS,
    check_net,
    numbers_of_scratch,
    plain_weights,
    step_adamw,
    step_matrix,
    step_vector,
)
from gradbuffer.kernels.numba_mlp_gradients import ACTIVATIONS, draw, layers_of, scratch_of, value_and_gradient
from gradbuffer.kernels.numba_orthogonal import numbers_to_orthogonalize
from gradbuffer.kernels.numba_threads import buffer, parallel_for, threads_here, without_denormals

__all__ = ["ACTIVATIONS", "LOSSES", "PerceptronWindows", "minibatches"]

LOSSES = "cross_entropy", "mse"
PIECES = 4  # for each thread: cores that do other work, too, then take fewer


class PerceptronWindows:
    """Runs windows of perceptrons trained by an `MLPOptimizer`; made once for a kind of perceptron and of optimizer.

    A particle's parameters lie in one row: for each layer its weight (units, inputs), as `nn.Linear` has it, then its bias. Its
    state likewise: for each of those tensors m (3, *shape), v, rows (3, units) and columns (3, inputs); for a bias m and v, or with
    vectors="adamw" m, v and the number of steps.

    Args:
        net: the `MLPOptimizer` that says what the step is: variant "celo". Its weights are not taken from here.
        sizes: inputs, units of each hidden layer, outputs.
        activation: of the hidden layers, one of `ACTIVATIONS`.
        loss: "cross_entropy" of integer labels, or "mse", the mean over outputs and minibatch of the squared differences from
            targets.
        dtype: torch.float32 or torch.float64.

    Raises:
        TypeError, ValueError: an argument is not as said.

    Example:
        >>> net = start_as_normalized_adam(MLPOptimizer())
        >>> windows = PerceptronWindows(net, (64, 32, 10))
        >>> weights = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        >>> params, state = windows.draw_params(16, seed=0), windows.init_state(16)
        >>> images, labels = torch.randn(1000, 64), torch.randint(10, (1000,))
        >>> losses = windows.run(weights, params, state, images, labels, steps=50, batch=64, seeds=range(16), lr=0.01)  # (16, 50)
    """

    def __init__(self, net, sizes, activation="relu", loss="cross_entropy", dtype=torch.float32):
        check_net(net)
        if len(sizes) < 2:
            raise ValueError(f"sizes must be the inputs, any hidden layers and the outputs, got {sizes!r}")
        for size in sizes:
            check_count(sizes=size)
        for name, value, accepted in (
            ("activation", activation, ACTIVATIONS),
            ("loss", loss, LOSSES),
            ("dtype", dtype, (torch.float32, torch.float64)),
        ):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}")
        self.sizes, self.activation, self.loss, self.dtype = tuple(sizes), activation, loss, dtype
        self.hidden, self.adamw, self.weight_decay = net.hidden_sizes, net.vectors == "adamw", net.weight_decay
        self.orthogonal = net.orthogonalize
        self.num_weights = sum(part.numel() for part in net.parameters())
        self.shapes = [shape for inputs, units in itertools.pairwise(sizes) for shape in ((units, inputs), (units,))]
        self.num_params = sum(map(math.prod, self.shapes))
        self.num_state = sum(math.prod(shape) for shapes in self.state_shapes() for shape in shapes.values())
        self._shape = tuple((0,) * size for size in self.hidden)

    def state_shapes(self):
        """A dict from name to shape for each tensor, in the order in which they lie in a particle's state."""
        vector = {"m": (), "v": (), "steps": None} if self.adamw else {"m": (3,), "v": ()}
        for shape in self.shapes:
            if len(shape) == 2:
                yield {"m": (3, *shape), "v": shape, "rows": (3, shape[0]), "columns": (3, shape[1])}
            else:
                yield {name: () if front is None else (*front, *shape) for name, front in vector.items()}

    def init_state(self, particles):
        """The state (particles, num_state) before the first step: zeros."""
        return torch.zeros(particles, self.num_state, dtype=self.dtype)

    def draw_params(self, particles, seed):
        """Parameters (particles, num_params) uniform within ±1/√inputs, as in `nn.Linear`; the same seed gives the same."""
        generator, parts = torch.Generator().manual_seed(seed), []
        for shape, inputs in zip(self.shapes, (inputs for inputs in self.sizes[:-1] for _ in range(2))):
            uniform = torch.rand(particles, math.prod(shape), generator=generator, dtype=self.dtype)
            parts.append((2 * uniform - 1) / math.sqrt(inputs))
        return torch.cat(parts, 1)

    def flatten_params(self, params):
        """A dict of tensors (B, *shape), in the order weight, bias, weight, bias, … -> a new (B, num_params)."""
        shapes = [tuple(value.shape[1:]) for value in params.values()]
        if shapes != self.shapes:
            raise ValueError(f"params must have the shapes {self.shapes} behind B, in this order, got {shapes}")
        return torch.cat([value.detach().to(self.dtype).flatten(1) for value in params.values()], 1)

    def unflatten_params(self, params, names=None):
        """The reverse: views into (B, num_params). names: default "weight_0", "bias_0", "weight_1", …"""
        names = names or [f"{kind}_{l}" for l in range(len(self.sizes) - 1) for kind in ("weight", "bias")]
        parts = params.split([math.prod(shape) for shape in self.shapes], 1)
        return {name: value.unflatten(1, shape) for name, value, shape in zip(names, parts, self.shapes, strict=True)}

    def flatten_state(self, state):
        """The state of an `MLPOptimizer`, its tensors in the order of the parameters -> a new (B, num_state)."""
        parts = [
            own[name].detach().to(self.dtype).reshape(len(own[name]), -1)
            for own, shapes in zip(state.values(), self.state_shapes(), strict=True)
            for name in shapes
        ]
        return torch.cat(parts, 1)

    def unflatten_state(self, state, names=None):
        """The reverse: dict from name to dict of views into (B, num_state)."""
        names, result, at = names or list(self.unflatten_params(state.new_empty(0, self.num_params))), {}, 0
        for name, shapes in zip(names, self.state_shapes(), strict=True):
            result[name] = {}
            for part, shape in shapes.items():
                count = math.prod(shape)
                result[name][part] = state[:, at : at + count].reshape(len(state), *shape)
                at += count
        return result

    def run(
        self,
        weights,
        particles,
        data,
        *,
        lr,
        index=None,
        steps=None,
        batch=None,
        seeds=None,
        first_steps=0,
        clip=None,
        gradient_scales=1.0,
    ):
        """A window: so many steps of all particles, which are overwritten with its end.

        Which examples a step reads is said by `index`, or drawn, with repetition, from a particle's seed and the number of the
        step: so particles with the same seed read the same, and however a run is cut into windows it reads the same.

        Args:
            weights: (W,) or (B, W), one set for each particle, in the order of `net.parameters()`.
            particles: params (B, num_params) and state (B, num_state), in one piece and of this dtype; changed.
            data: inputs (examples, sizes[0]), of this dtype; and targets: of "cross_entropy" (examples,) of int64, from 0 to
                sizes[-1] - 1; of "mse" (examples, sizes[-1]), of this dtype, which may be the inputs themselves.
            lr: 0 or more: a number, (B, 1) with one for each particle, (1, steps) with one for each step, or (B, steps).
            index: (steps, batch) or (B, steps, batch) of int64, numbers of examples. Else all of:
            steps, batch: how many.
            seeds: B ints from 0 on, (B,).
            first_steps: an int or (B,): how many steps each particle did before.
            gradient_scales: above 0, a number or (B,): what the optimizer reads instead of a gradient is so many times it. A function
                in other coordinates, θ = c · θ', has c times the gradient and, for the same way, lr / c.
            clip: the largest loss to be returned, above 0; None leaves losses as they are. A loss that is not finite is returned
                as `clip` or, without it, as infinity.

        Returns:
            losses (B, steps): column t is the loss before step t, on that step's minibatch. No graph.

        Raises:
            TypeError, ValueError: shapes, dtypes or values are not as said.
        """
        (params, state), (inputs, targets) = particles, data
        B = len(params)
        for name, value, count in (("params", params, self.num_params), ("state", state, self.num_state)):
            if value.shape != (B, count) or not value.is_contiguous():
                raise ValueError(f"{name} must be ({B}, {count}), in one piece, got {tuple(value.shape)}")
        if weights.shape not in ((self.num_weights,), (B, self.num_weights)):
            raise ValueError(
                f"weights must be ({self.num_weights},) or ({B}, {self.num_weights}), got {tuple(weights.shape)}"
            )
        if inputs.dim() != 2 or inputs.shape[1] != self.sizes[0] or not len(inputs):
            raise ValueError(f"inputs must be (examples, {self.sizes[0]}), got {tuple(inputs.shape)}")
        floats = {"params": params, "state": state, "inputs": inputs}
        if self.loss == "mse":
            floats["targets"] = targets
        for name, value in floats.items():
            if value.dtype != self.dtype or value.device.type != "cpu":
                raise TypeError(f"{name} must be of {self.dtype} on the CPU, got {value.dtype} on {value.device}")
        self._check_targets(inputs, targets)
        if clip is not None:
            check_positive_number(clip=clip)
        if (index is None) == (seeds is None):
            raise ValueError(f"index, or steps, batch and seeds must be given, got index={index!r} and seeds={seeds!r}")
        if index is None:
            check_count(steps=steps, batch=batch)
            index = torch.empty(0, steps, batch, dtype=torch.int64)
        else:
            index = self._check_index(index, B, len(inputs))
            steps, batch = index.shape[1:]
        lr = torch.as_tensor(lr, dtype=torch.float64)
        if lr.dim() and lr.shape not in ((B, 1), (1, steps), (B, steps)):
            raise ValueError(f"lr must be a number or ({B} or 1, {steps} or 1), got {tuple(lr.shape)}")
        if not ((lr >= 0) & (lr < math.inf)).all():
            raise ValueError(f"lr must be finite and 0 or more, got {lr}")
        scales = torch.as_tensor(gradient_scales, dtype=self.dtype)
        if scales.shape not in ((), (B,)) or not ((scales > 0) & (scales < math.inf)).all():
            raise ValueError(f"gradient_scales must be above 0, a number or ({B},), got {gradient_scales}")
        lr, losses = lr.expand(B, steps).contiguous(), torch.empty(B, steps, dtype=self.dtype)
        none = torch.empty(0, 0, dtype=self.dtype), torch.empty(0, dtype=torch.int64)
        targets, labels = (none[0], targets) if self.loss == "cross_entropy" else (targets, none[1])
        weights = weights.detach().to(self.dtype).reshape(-1, self.num_weights)
        given = (
            self._shape,
            layers_of(self.sizes)[0],
            self._kinds(batch),
            *map(
                numpy,
                (
                    inputs,
                    targets,
                    labels,
                    index,
                    *numbers_of(seeds, first_steps, B),
                    lr,
                    scales.expand(B),
                    weights,
                    params,
                    state,
                    losses,
                ),
            ),
        )
        bound, decay, scratch = (
            (math.inf if clip is None else float(clip)),
            float(self.weight_decay),
            self._scratch(batch),
        )

        def work(first, last):
            buffers = buffer("mlp windows", scratch[0], self.dtype), buffer("mlp sums", scratch[1], torch.float64)
            with without_denormals():
                run_particles(*given, bound, decay, first, last, *buffers, np.empty(batch, np.int64))

        shares = min(B, PIECES * threads_here()) if threads_here() > 1 else 1
        parallel_for(work, [(B * k // shares, B * (k + 1) // shares) for k in range(shares)])
        return losses

    def _kinds(self, batch):
        plain = plain_weights(self.hidden)
        return np.array(
            [ACTIVATIONS.index(self.activation), LOSSES.index(self.loss), self.adamw, batch, plain, self.orthogonal]
        )

    def _check_targets(self, inputs, targets):
        if self.loss == "mse":
            if targets.shape != (len(inputs), self.sizes[-1]):
                raise ValueError(f"targets must be ({len(inputs)}, {self.sizes[-1]}), got {tuple(targets.shape)}")
        elif targets.dtype != torch.int64 or targets.shape != (len(inputs),):
            raise TypeError(f"targets must be ({len(inputs)},) of int64, got {tuple(targets.shape)} of {targets.dtype}")
        elif targets.min() < 0 or targets.max() >= self.sizes[-1]:
            raise ValueError(f"targets must be from 0 to {self.sizes[-1] - 1}, got {targets.min()} to {targets.max()}")

    def _check_index(self, index, B, examples):
        index = index[None] if index.dim() == 2 else index
        if index.dim() != 3 or len(index) not in (1, B) or not index.numel() or index.dtype != torch.int64:
            raise ValueError(f"index must be (steps, batch) or ({B}, steps, batch) of int64, got {tuple(index.shape)}")
        if index.min() < 0 or index.max() >= examples:
            raise ValueError(f"index must be from 0 to {examples - 1}, got {index.min()} to {index.max()}")
        return index

    def _scratch(self, batch):
        """Numbers of the buffers that `run_particles` splits."""
        images, sums = scratch_of(self.sizes, batch)
        shapes = [(units, inputs) for inputs, units in itertools.pairwise(self.sizes)]
        step = max(numbers_of_scratch(self.hidden, *shape) for shape in shapes)
        if self.orthogonal:
            step = max(step, *(numbers_to_orthogonalize(*shape) for shape in shapes))
        return images + step + self.num_params + max(map(math.prod, self.shapes)), sums + TOTALS


def minibatches(seeds, first_steps, steps, batch, examples):
    """Which examples `PerceptronWindows.run` reads: (B, steps, batch) of int64, from 0 to examples - 1; arguments as there."""
    check_count(steps=steps, batch=batch, examples=examples)
    seeds, first_steps = numbers_of(seeds, first_steps, len(seeds))
    index = torch.empty(len(seeds), steps, batch, dtype=torch.int64)
    for b, (seed, first) in enumerate(zip(numpy(seeds), numpy(first_steps))):
        for t in range(steps):
            draw(seed, first + t, examples, numpy(index[b, t]))
    return index


def numbers_of(seeds, first_steps, B):
    """Seeds and first steps as (B,) of int64."""
    seeds = torch.zeros(B, dtype=torch.int64) if seeds is None else torch.as_tensor(seeds)
    first_steps = torch.as_tensor(first_steps)
    for name, value, shapes in (("seeds", seeds, [(B,)]), ("first_steps", first_steps, [(), (B,)])):
        if value.dtype != torch.int64 or value.shape not in shapes or (value < 0).any():
            raise ValueError(f"{name} must be {B} ints from 0 on, got {value}")
    return seeds, first_steps.expand(B).contiguous()


def numpy(tensor):
    return tensor.detach().contiguous().numpy()


# What is compiled ---------------------------------------------------------------------------------------------------


@compiled
def step_layer(H, layer, kinds, grad, theta, state, w, context, lr, decay, out, scratch, totals):
    """The step of one layer's weight and bias; returns how much of the state is theirs."""
    width, units, at = layer[0], layer[1], layer[2]
    n = width * units
    end = at + n
    m, v, r, c = state[: 3 * n], state[3 * n : 4 * n], state[4 * n :], state[4 * n + 3 * units :]
    grads, thetas = grad[at:end], theta[at:end]
    given = H, units, width, 1, grads, thetas, m, v, r, c, w, context, kinds[5] != 0
    step_matrix(*given, lr, decay, out[:n], scratch, totals)
    own, grads, biases = state[4 * n + 3 * (units + width) :], grad[end : end + units], theta[end : end + units]
    used = 4 * n + 3 * (units + width)
    if kinds[2]:
        step_adamw(grads, biases, own[:units], own[units : 2 * units], own[2 * units :], lr, decay)
        return used + 2 * units + 1
    m, v = own[: 3 * units], own[3 * units : 4 * units]
    step_vector(H, grads, biases, m, v, w, context, lr, decay, out[:units], scratch, totals)
    return used + 4 * units


@compiled
def run_particles(
    H,
    layers,
    kinds,
    inputs,
    targets,
    labels,
    index,
    seeds,
    first_steps,
    lr,
    scales,
    weights,
    params,
    state,
    losses,
    bound,
    decay,
    first,
    last,
    scratch,
    sums,
    drawn,
):
    """The windows of particles first … last - 1. kinds: activation, loss, whether AdamW moves vectors, batch, how many
    of the weights are not the context's, whether updates of matrices become orthogonal."""
    many, size, largest = losses.shape[1], params.shape[1], 0
    for l in range(len(layers)):
        largest = max(largest, layers[l, 0] * layers[l, 1], layers[l, 1])
    grad, rest = scratch[:size], scratch[size:]
    totals, sums = sums[:TOTALS], sums[TOTALS:]
    for b in range(first, last):
        theta, own, w = params[b], state[b], weights[b if len(weights) > 1 else 0]
        w, context = w[: kinds[4]], w[kinds[4] :]
        for t in range(many):
            if len(index) > 0:
                numbers = index[b if len(index) > 1 else 0, t]
            else:
                draw(seeds[b], first_steps[b] + t, len(inputs), drawn)
                numbers = drawn
            loss = value_and_gradient(layers, kinds, False, inputs, targets, labels, numbers, theta, grad, rest, sums)
            losses[b, t] = loss if loss < bound else bound  # a NaN is not below it
            if scales[b] != 1:
                for i in range(size):
                    grad[i] *= scales[b]
            at = 0
            for l in range(len(layers)):
                at += step_layer(
                    H,
                    layers[l],
                    kinds,
                    grad,
                    theta,
                    own[at:],
                    w,
                    context,
                    lr[b, t],
                    decay,
                    rest,
                    rest[largest:],
                    totals,
                )
