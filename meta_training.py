"""Meta-training: the unrolled optimization, its meta-gradient, and the comparison with hand-designed optimizers.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2: L(φ) = E_f Σ_t w_t f(θ_t), θ_{t+1} = θ_t + g_t,
(g_t, h_{t+1}) = m(∇_t, h_t; φ), minimized by truncated backpropagation through time. Optimizees come from `optimizees`
(or are a user's own), learned optimizers from `optimizers` (or are a user's own).

Coordinates: a meta-batch's parameters, a dict of tensors (B, ...), lie one after the other in one vector of N = B × n
coordinates, each tensor flattened; gradients, updates and states follow that order.
"""

import contextlib
import copy
import inspect
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from argument_checks import NonFiniteError, check_count, check_positive_number

__all__ = ["BASELINES", "History", "TunedBaseline", "compare", "evaluate", "evaluate_baseline", "meta_gradient",
           "meta_train", "tune_baseline", "tune_baselines"]

SMALLEST_SHARE = 1024  # coordinates of a tensor that a partial replay reads at least
FUNCTIONS_AT_ONCE = 32  # functions that evaluation runs as one computation; a seed's functions depend on both bounds
COORDINATES_AT_ONCE = 1 << 17  # larger states leave the cache and cost a fresh page of memory at every step

BASELINES = {
    "SGD": (torch.optim.SGD, {}),
    "SGD + momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "NAG": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
}
"""Hand-designed optimizers to compare with: name -> (class, options other than the learning rate)."""


# The optimizee as one vector ------------------------------------------------------------------------------------------


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

    def join(self, params):
        """dict of (B, ...) -> (N,)"""
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def split(self, theta):
        """(N,) -> dict of (B, ...), views"""
        parts = theta.split(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def losses(self, loss, theta, step):
        """Losses (B,) of the functions at theta (N,)."""
        losses = loss(self.split(theta), step)
        if not isinstance(losses, torch.Tensor) or losses.shape != (self.functions,):
            raise ValueError(f"loss must return a tensor of shape ({self.functions},), one loss for each function, got "
                             f"{tuple(losses.shape) if isinstance(losses, torch.Tensor) else losses!r}")
        return losses

    def losses_and_gradient(self, loss, theta, step):
        """Losses (B,) and ∇ (N,) of their sum, each function's own gradient; no graph."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            losses = self.losses(loss, theta, step)
            (gradient,) = torch.autograd.grad(losses.sum(), theta)
        return losses.detach(), gradient

    def subset(self, fraction, generator):
        """A random share of every tensor's coordinates, at least SMALLEST_SHARE of each: indices, and 1 / probability."""
        indices, weights, start = [], [], 0
        for size in self.sizes:
            kept = min(size, max(math.ceil(fraction * size), SMALLEST_SHARE))
            indices.append(torch.randperm(size, generator=generator)[:kept] + start)
            weights.append(torch.full((kept,), size / kept))
            start += size
        return torch.cat(indices), torch.cat(weights)


def map_tensors(function, state):
    """Apply a function to every tensor in a state made of tuples, lists, dicts and tensors."""
    if isinstance(state, torch.Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: map_tensors(function, part) for name, part in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [map_tensors(function, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state


# The meta-gradient ----------------------------------------------------------------------------------------------------


class WindowInfo(NamedTuple):
    """What a window of the unroll leaves behind; nothing carries a graph."""

    losses: torch.Tensor  # (unroll + 1, B): f(θ_0) … f(θ_T) of the window
    params: dict  # the end of the window, to start the next one from
    state: object


def meta_gradient(net, batch, params, state, step=0, unroll=20, method="replay", second_order=False, weights=None,
                  replay_fraction=1.0, generator=None):
    """The meta-gradient of one window: `unroll` updates of the optimizee, differentiated with respect to the optimizer.

    The meta-loss is the mean over functions of Σ_{t=0..T} w_t f_t(θ_t), the end of the window included. The optimizee's
    gradient ∇_t counts as a constant input of the optimizer (the paper drops those edges of the graph), unless
    `second_order`.

    "replay" unrolls without a graph and keeps the gradients ∇_t. Since they are constants, the adjoint of θ_{t+1} is
    λ_{t+1} = Σ_{s>t} w_s ∇_s, and dL/dφ = Σ_t ⟨λ_{t+1}, ∂g_t/∂φ⟩: the optimizer is run once more over the recorded
    gradients and λ is pulled back through it. "autograd" differentiates the whole window as one graph; it is exact too,
    slower, and what the replay is tested against.

    Args:
        net: the learned optimizer; its parameters' `.grad` are not touched.
        batch: a meta-batch, with `loss(params, step) -> (B,)`.
        params: dict of (B, ...), where the window starts; not changed.
        state: the optimizer's state there (`net.init_state(N)` at the first window); not changed.
        step: number of the window's first step, at least 0.
        unroll: T, updates in the window; positive.
        method: "replay" or "autograd".
        second_order: let ∇_t carry its own graph; needs "autograd".
        weights: (T + 1,), w_t; default all 1.
        replay_fraction: in (0, 1]: replay over a random share of the coordinates, drawn anew in every call, each
            weighted by 1 / its probability. The meta-gradient is a sum over coordinates, so this is an unbiased
            estimate of it, at that share of the replay's cost. Small tensors keep all their coordinates. Needs
            "replay" and a network with `coordinatewise = True` (the last axis of its state's tensors is N).
        generator: a CPU generator for that draw; default torch's own.

    Returns:
        grads, a dict like `net.named_parameters()` (those that require grad), and `WindowInfo`. No graph.

    Raises:
        ValueError, TypeError: an argument is not as above.
        NonFiniteError: a loss in the window is infinite or NaN.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> net, batch = CoordinatewiseLSTM(), Quadratics(dim=10).sample(16)
        >>> grads, info = meta_gradient(net, batch, batch.params, net.init_state(160))
        >>> grads, info = meta_gradient(net, batch, info.params, info.state, step=20)

    Reference: Andrychowicz et al. 2016, section 2 and figure 2.
    """
    check_count(unroll=unroll)
    check_count(least=0, step=step)
    if method not in ("replay", "autograd"):
        raise ValueError(f'method must be "replay" or "autograd", got {method!r}')
    if second_order and method == "replay":
        raise ValueError('second_order=True needs method="autograd": the replay takes the gradients as constants')
    check_replay_fraction(replay_fraction, method, net)
    coordinates = Coordinates(params)
    theta = coordinates.join(params).detach()
    weights = torch.ones(unroll + 1) if weights is None else torch.as_tensor(weights)
    if weights.shape != (unroll + 1,):
        raise ValueError(f"weights must have shape ({unroll + 1},) for unroll {unroll}, got {tuple(weights.shape)}")
    weights = weights.to(theta) / coordinates.functions
    if method == "replay":
        grads, losses, theta, state = replay_window(net, batch.loss, coordinates, theta, state, step, weights,
                                                    replay_fraction, generator)
    else:
        grads, losses, theta, state = autograd_window(net, batch.loss, coordinates, theta, state, step, weights,
                                                      second_order)
    if not torch.isfinite(losses).all():
        t, function = (~torch.isfinite(losses)).nonzero()[0].tolist()
        raise NonFiniteError(f"the loss of function {function} at step {step + t} is {losses[t, function].item()}")
    return grads, WindowInfo(losses, coordinates.split(theta), state)


@torch.no_grad()
def replay_window(net, loss, coordinates, theta, state, step, weights, fraction, generator):
    unroll, start = len(weights) - 1, state
    losses, gradients = theta.new_empty(unroll + 1, coordinates.functions), theta.new_empty(unroll + 1, len(theta))
    for t in range(unroll):
        losses[t], gradients[t] = coordinates.losses_and_gradient(loss, theta, step + t)
        update, state = net(gradients[t], state)
        theta = theta + update
    losses[-1], gradients[-1] = coordinates.losses_and_gradient(loss, theta, step + unroll)
    # λ_{t+1} = Σ_{s>t} w_s ∇_s: a cumulative sum from the end
    adjoint, inputs = (weights[1:, None] * gradients[1:]).flip(0).cumsum(0).flip(0), gradients[:-1]
    if fraction < 1:
        kept, factor = (tensor.to(theta.device) for tensor in coordinates.subset(fraction, generator))
        inputs, adjoint = inputs[:, kept], adjoint[:, kept] * factor.to(theta)
        start = map_tensors(lambda tensor: tensor[..., kept], start)
    replay = getattr(net, "replay", None) or (lambda *recorded: replay_by_autograd(net, *recorded))
    return replay(inputs, start, adjoint), losses, theta, map_tensors(torch.Tensor.detach, state)


@torch.enable_grad()
def replay_by_autograd(net, grads, state, adjoint):
    """Gradient of Σ_t ⟨adjoint_t, update_t⟩ for any optimizer: run it over grads (T, N) again, with a graph."""
    updates, state = [], map_tensors(torch.Tensor.detach, state)
    for grad in grads:
        update, state = net(grad, state)
        updates.append(update)
    return gradients_of((torch.stack(updates) * adjoint).sum(), net)


@torch.enable_grad()
def autograd_window(net, loss, coordinates, theta, state, step, weights, second_order):
    unroll, losses = len(weights) - 1, []
    theta, state = theta.requires_grad_(), map_tensors(torch.Tensor.detach, state)
    for t in range(unroll + 1):
        losses.append(coordinates.losses(loss, theta, step + t))
        if t < unroll:
            (gradient,) = torch.autograd.grad(losses[-1].sum(), theta, create_graph=second_order, retain_graph=True)
            update, state = net(gradient, state)
            theta = theta + update
    losses = torch.stack(losses)
    grads = gradients_of((weights[:, None] * losses).sum(), net)
    return grads, losses.detach(), theta.detach(), map_tensors(torch.Tensor.detach, state)


def gradients_of(value, net):
    """Gradients of a scalar as a dict like `net.named_parameters()`; zeros for parameters it does not depend on."""
    wanted = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(parameter) if grad is None else grad
            for (name, parameter), grad in zip(wanted.items(), grads)}


# Meta-training --------------------------------------------------------------------------------------------------------


@dataclass
class History:
    """What happened in a meta-training run.

    `meta_loss[k]` is the window's loss at iteration k (mean over functions and the window's steps), `grad_norm[k]` the
    norm of the meta-gradient before clipping, `lr[k]` the meta-learning rate. `validation` holds pairs (iteration, sum
    of the loss over the steps, mean over the validation functions); `best_iteration` is the one whose optimizer was
    kept.
    """

    meta_loss: list = field(default_factory=list)
    grad_norm: list = field(default_factory=list)
    lr: list = field(default_factory=list)
    validation: list = field(default_factory=list)
    best_iteration: int = 0
    best_validation: float = math.inf


def meta_train(net, problem, steps=100, unroll=20, meta_batch=16, iterations=1000, lr=0.005, seed=0, device=None, *,
               warmup=50, clip=1.0, method="replay", second_order=False, replay_fraction=1.0, validation_every=None,
               validation_functions=64, progress=True):
    """Meta-train a learned optimizer by truncated backpropagation through the unrolled optimization.

    Functions are drawn anew after every `steps` steps; each window of `unroll` updates gives one meta-update by Adam,
    with the meta-gradient clipped by its norm and the learning rate warmed up, then annealed to 0 on a cosine. Every
    `validation_every` iterations (and at the end) the optimizer is scored on functions that training does not draw:
    the sum of the loss over `steps` steps. `net` ends with the weights that scored best.

    Args:
        net: the learned optimizer; trained in place, and moved to `device`.
        problem: distribution of optimizees to train on. Its `validation_problem()`, if it has one, is validated on;
            else fresh functions of its own.
        steps: horizon, updates of each function; a multiple of `unroll`.
        unroll: updates in a window of truncated backpropagation.
        meta_batch: functions run together.
        iterations: meta-updates, each of one window.
        lr: the highest meta-learning rate.
        seed: of the functions; the same seed gives the same run.
        device: where to train; default where `net` is.
        warmup: iterations over which the meta-learning rate rises from 0.
        clip: largest norm of the meta-gradient, or None for no clipping.
        method, second_order, replay_fraction: see `meta_gradient`.
        validation_every: default a fortieth of `iterations`.
        validation_functions: how many functions a validation takes; the same ones each time.
        progress: show a bar with the meta-loss.

    Returns:
        `History`.

    Raises:
        ValueError, TypeError: an argument is not as above.
        NonFiniteError: the meta-loss or the meta-gradient stopped being finite; names the iteration. `net` then has
            the best weights so far.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> net = CoordinatewiseLSTM()
        >>> history = meta_train(net, Quadratics(), iterations=20, meta_batch=8, progress=False)
        >>> len(history.meta_loss)
        20

    Reference: Andrychowicz et al. 2016, section 3.
    """
    check_count(steps=steps, unroll=unroll, meta_batch=meta_batch, iterations=iterations,
                validation_functions=validation_functions)
    check_count(least=0, warmup=warmup, seed=seed)
    if steps % unroll:
        raise ValueError(f"unroll must divide steps, got unroll={unroll} and steps={steps}")
    check_positive_number(lr=lr)
    if clip is not None:
        check_positive_number(clip=clip)
    validation_every = validation_every or max(1, iterations // 40)
    check_count(validation_every=validation_every)
    device = device_of(net, device)
    net.to(device)
    problem = on_device(problem, device)
    validation = problem.validation_problem() if hasattr(problem, "validation_problem") else problem
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    adam = torch.optim.Adam(trained.values(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    history, best = History(), copy.deepcopy(net.state_dict())
    bar = tqdm(total=iterations, desc="meta-training", unit="it", disable=not progress)
    try:
        with bar:
            for iteration in range(iterations):
                step = iteration * unroll % steps
                if step == 0:
                    batch = problem.sample(meta_batch, generator=generator)
                    params, state = batch.params, net.init_state(Coordinates(batch.params).join(batch.params).numel())
                with naming_iteration(iteration):
                    grads, info = meta_gradient(net, batch, params, state, step, unroll, method, second_order,
                                                replay_fraction=replay_fraction, generator=generator)
                    norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads.values()]))
                    if not torch.isfinite(norm):
                        raise NonFiniteError(f"the norm of the meta-gradient is {norm.item()}")
                params, state = info.params, info.state
                rate = schedule(iteration, iterations, warmup) * lr
                apply_meta_gradient(adam, trained, grads, rate, min(1.0, clip / (norm.item() + 1e-12)) if clip else 1.0)
                history.meta_loss.append(info.losses.mean().item())
                history.grad_norm.append(norm.item())
                history.lr.append(rate)
                if (iteration + 1) % validation_every == 0 or iteration + 1 == iterations:
                    with naming_iteration(iteration):
                        losses = evaluate(net, validation, steps, validation_functions, seed=seed + VALIDATION_SEED)
                        score = losses.sum(1).mean().item()
                    history.validation.append((iteration + 1, score))
                    if score < history.best_validation:
                        history.best_iteration, history.best_validation = iteration + 1, score
                        best = copy.deepcopy(net.state_dict())
                bar.update()
                bar.set_postfix(meta_loss=f"{history.meta_loss[-1]:.3g}", best=f"{history.best_validation:.4g}",
                                refresh=False)
    finally:
        net.load_state_dict(best)
    return history


VALIDATION_SEED = 1_000_003  # added to the seed of a run, so that its validation functions are not its training ones


def schedule(iteration, iterations, warmup):
    """Factor of the meta-learning rate: a linear warm-up, then half a cosine down to 0."""
    return min(1.0, (iteration + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def apply_meta_gradient(adam, trained, grads, lr, factor):
    for name, parameter in trained.items():
        parameter.grad = grads[name] * factor
    for group in adam.param_groups:
        group["lr"] = lr
    adam.step()
    adam.zero_grad()


@contextlib.contextmanager
def naming_iteration(iteration):
    """Add the iteration to the message of a NonFiniteError."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"meta-training stopped at iteration {iteration}: {error}. Lower lr or clip, or look at "
                             "the optimizee's loss") from error


# Evaluation and baselines ---------------------------------------------------------------------------------------------


def evaluate(net, problem, steps=100, num_functions=100, seed=1, device=None):
    """Loss curves of a learned optimizer. No graph is recorded.

    Args:
        net: the learned optimizer.
        problem: distribution of optimizees.
        steps: length of the curves; `steps - 1` updates are made.
        num_functions: how many functions are drawn.
        seed: the same seed and number of functions give every optimizer, learned or not, the same functions, initial
            points and minibatches.
        device: default where `net` is.

    Returns:
        (num_functions, steps) on the CPU: losses[:, t] is f(θ_t), so column 0 is the loss before any update.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> losses = evaluate(CoordinatewiseLSTM(), Quadratics(), steps=10, num_functions=4)
    """
    device = device_of(net, device)

    def start(coordinates, theta):
        state = net.init_state(theta.numel())

        def advance(theta, gradient):
            nonlocal state
            update, state = net(gradient, state)
            return theta.add_(update)

        return advance

    with torch.no_grad():
        return loss_curves(start, problem, steps, num_functions, seed, device)


def evaluate_baseline(optimizer, options, problem, steps=100, num_functions=100, seed=1, device="cpu"):
    """Loss curves of a hand-designed optimizer, on the very functions that `evaluate` uses for that seed.

    The functions of a meta-batch are optimized side by side as one vector, so the optimizer must treat every
    coordinate by itself, as SGD, Adam, RMSprop and most others do (those that take a closure, such as L-BFGS, do not).

    Args:
        optimizer: class of a `torch.optim.Optimizer`.
        options: its keyword arguments, `lr` among them.
        problem, steps, num_functions, seed, device: see `evaluate`.

    Returns:
        (num_functions, steps) on the CPU. Functions that diverge have infinite or NaN losses.

    Example:
        >>> from optimizees import Quadratics
        >>> losses = evaluate_baseline(torch.optim.Adam, {"lr": 0.1}, Quadratics(), steps=10, num_functions=4)
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise TypeError(f"optimizer must be a class of torch.optim.Optimizer, got {optimizer!r}")
    if inspect.signature(optimizer.step).parameters.get("closure", inspect.Parameter("closure", 1)).default is not None:
        raise ValueError(f"{optimizer.__name__} needs a closure and does not treat coordinates by themselves")
    if not isinstance(options, dict):
        raise TypeError(f'options must be a dict such as {{"lr": 0.1}}, got {options!r}')

    def start(coordinates, theta):
        rule = optimizer([theta], **options)

        def advance(theta, gradient):
            theta.grad = gradient
            rule.step()
            return theta

        return advance

    return loss_curves(start, problem, steps, num_functions, seed, torch.device(device))


def loss_curves(start, problem, steps, num_functions, seed, device):
    """Curves (num_functions, steps) of the rule that start(coordinates, theta) begins for each meta-batch."""
    check_count(steps=steps, num_functions=num_functions)
    check_count(least=0, seed=seed)
    problem, generator, curves = on_device(problem, device), torch.Generator().manual_seed(seed), []
    size = sum(tensor.numel() for tensor in problem.sample(1, generator=torch.Generator()).params.values())
    at_once = min(max(COORDINATES_AT_ONCE // size, 1), FUNCTIONS_AT_ONCE)
    for first in range(0, num_functions, at_once):
        batch = problem.sample(min(at_once, num_functions - first), generator=generator)
        coordinates = Coordinates(batch.params)
        theta = coordinates.join(batch.params).detach().clone()
        advance, losses = start(coordinates, theta), []
        for step in range(steps):
            values, gradient = coordinates.losses_and_gradient(batch.loss, theta, step)
            losses.append(values)
            if step + 1 < steps:
                theta = advance(theta, gradient)
        curves.append(torch.stack(losses, 1))
    return torch.cat(curves).cpu()


@dataclass
class TunedBaseline:
    """A hand-designed optimizer with the learning rate that `tune_baseline` found."""

    optimizer: type
    options: dict  # `lr` included: what `evaluate_baseline` takes
    final_losses: dict  # learning rate -> mean final loss (infinite if a function diverged), the whole search

    def evaluate(self, problem, steps=100, num_functions=100, seed=1, device="cpu"):
        """`evaluate_baseline` with these options."""
        return evaluate_baseline(self.optimizer, self.options, problem, steps, num_functions, seed, device)


def tune_baseline(optimizer, problem, lrs=None, steps=100, num_functions=32, seed=0, *, options=None, device="cpu"):
    """Search the learning rate of a hand-designed optimizer: the lowest mean loss at the last step.

    The grid grows by itself until the best learning rate does not lie at its edge; the gaps on both sides of the best
    are then searched once more at their thirds. Tune on other functions than those reported: another seed, and a
    problem over other data (`MNISTNet(split="validation")`).

    Args:
        optimizer: class of a `torch.optim.Optimizer`.
        problem, steps, num_functions, seed, device: see `evaluate`.
        lrs: at least three positive learning rates; default 10^-4 … 10, two per decade (six around the best).
        options: its other keyword arguments, such as {"momentum": 0.9}; default none.

    Returns:
        `TunedBaseline`.

    Raises:
        ValueError: an argument is not as above, or no learning rate gave a finite loss.

    Example:
        >>> from optimizees import Quadratics
        >>> best = tune_baseline(torch.optim.Adam, Quadratics(), lrs=[0.01, 0.1, 1.0], steps=10, num_functions=4)
        >>> losses = best.evaluate(Quadratics(), steps=10, num_functions=4)
    """
    lrs = [10 ** (k / 2) for k in range(-8, 3)] if lrs is None else sorted(float(lr) for lr in lrs)
    if len(lrs) < 3 or not 0 < lrs[0] <= lrs[-1] < math.inf:
        raise ValueError(f"lrs must be at least three positive learning rates, got {lrs}")
    options, final = options or {}, {}

    def search(rates):
        for lr in rates:
            losses = evaluate_baseline(optimizer, {**options, "lr": lr}, problem, steps, num_functions, seed, device)
            loss = losses[:, -1].mean().item()
            final[lr] = loss if math.isfinite(loss) else math.inf
        best = min(final, key=final.get)
        if final[best] == math.inf:
            raise ValueError(f"no learning rate of {sorted(final)} gave a finite loss with {optimizer.__name__}")
        return best

    best, factor = search(lrs), (lrs[-1] / lrs[0]) ** (1 / (len(lrs) - 1))
    while best in (min(final), max(final)) and 1e-10 < best < 1e6:
        best = search([best / factor if best == min(final) else best * factor])
    rates = sorted(final)
    place = rates.index(best)
    gaps = list(zip(rates, rates[1:]))[max(place - 1, 0):place + 1]
    best = search([low * (high / low) ** third for low, high in gaps for third in (1 / 3, 2 / 3)])
    return TunedBaseline(optimizer, {**options, "lr": best}, dict(sorted(final.items())))


def tune_baselines(problem, steps=100, num_functions=32, seed=0, *, baselines=BASELINES, lrs=None, device="cpu",
                   progress=True):
    """`tune_baseline` for each of `BASELINES` (or a user's own dict like it). Returns a dict from name to result."""
    tuned = {}
    for name in (bar := tqdm(baselines, desc="tuning", disable=not progress)):
        bar.set_postfix_str(name)
        optimizer, options = baselines[name]
        tuned[name] = tune_baseline(optimizer, problem, lrs, steps, num_functions, seed, options=options, device=device)
    return tuned


def compare(nets, tuned, problem, steps=100, num_functions=100, seed=1, device=None, progress=True):
    """Loss curves of learned optimizers and tuned baselines, all on the same functions and minibatches.

    Args:
        nets: dict from name to learned optimizer.
        tuned: dict from name to `TunedBaseline`, as `tune_baselines` returns it.
        problem, steps, num_functions, seed: see `evaluate`.
        device: default where each network is; the baselines run where the first network does.
        progress: show a bar.

    Returns:
        dict from name to losses (num_functions, steps), on the CPU.
    """
    curves = {}
    for name in (bar := tqdm([*nets, *tuned], desc="comparing", disable=not progress)):
        bar.set_postfix_str(name)
        if name in nets:
            curves[name] = evaluate(nets[name], problem, steps, num_functions, seed, device)
        else:
            where = device_of(next(iter(nets.values())), device) if nets else device or "cpu"
            curves[name] = tuned[name].evaluate(problem, steps, num_functions, seed, where)
    return curves


# Checks at the door ---------------------------------------------------------------------------------------------------


def check_replay_fraction(fraction, method, net):
    if not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
        raise ValueError(f"replay_fraction must be a number in (0, 1], got {fraction!r}")
    if fraction < 1 and (method != "replay" or not getattr(net, "coordinatewise", False)):
        raise ValueError(f'replay_fraction={fraction} needs method="replay" and a network with coordinatewise = True')


def device_of(net, device):
    """The device asked for, else the one that the network is on."""
    if not isinstance(net, torch.nn.Module) or not hasattr(net, "init_state"):
        raise TypeError(f"net must be a learned optimizer, an nn.Module with init_state, got {type(net).__name__}")
    if device is not None:
        return torch.device(device)
    return next((parameter.device for parameter in net.parameters()), torch.device("cpu"))


def on_device(problem, device):
    """The problem on a device, if it knows how to move there."""
    if not hasattr(problem, "sample"):
        raise TypeError(f"problem must have sample(meta_batch, generator), got {type(problem).__name__}")
    here = getattr(problem, "device", None)
    return problem.to(device) if hasattr(problem, "to") and here != device else problem
