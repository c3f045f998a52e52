"""Meta-training: windows of the unrolled optimization, one after the other, each followed by an update of the optimizer.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2: L(φ) = E_f Σ_t w_t f(θ_t) is minimized by truncated
backpropagation through time. Optimizees come from `optimizees` (or are a user's own), learned optimizers from
`optimizers` (or are a user's own). The meta-gradient of a window is `meta_gradients`, the comparison with hand-designed
optimizers `comparison`; their public names are here too.
"""

import contextlib
import copy
import math
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from argument_checks import NonFiniteError, check_count, check_positive_number
from comparison import (BASELINES, TunedBaseline, compare, device_of, evaluate, evaluate_baseline, on_device,
                        tune_baseline, tune_baselines)
from meta_gradients import Coordinates, meta_gradient

__all__ = ["BASELINES", "History", "TunedBaseline", "compare", "evaluate", "evaluate_baseline", "meta_gradient",
           "meta_train", "tune_baseline", "tune_baselines"]


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
               warmup=50, clip=1.0, method="replay", second_order=False, replay_fraction=1.0, sigma=0.01, pairs=1,
               validation_every=None, validation_functions=64, progress=True):
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
        method, second_order, replay_fraction, sigma, pairs: see `meta_gradient`.
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
                                                replay_fraction=replay_fraction, sigma=sigma, pairs=pairs,
                                                generator=generator)
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
