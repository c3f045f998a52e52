"""Meta-training: windows of the unrolled optimization, one after the other, each followed by an update of the optimizer.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2: L(φ) = E_f Σ_t w_t f(θ_t) is minimized by truncated
backpropagation through time. Optimizees come from `optimizees` (or are a user's own), learned optimizers from
`optimizers` (or are a user's own). The meta-gradient of a window is `meta_gradients`, the comparison with hand-designed
optimizers `evaluation`; their public names are here too. As a program (`python meta_training.py --help`) it is
`command_line`.
"""

import runpy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from gradbuffer.contracts import Problem, device_of, on_device
from gradbuffer.evaluation import (
    BASELINES,
    TunedBaseline,
    compare,
    compare_final,
    evaluate,
    evaluate_baseline,
    tune_baseline,
    tune_baselines,
)
from gradbuffer.problems.images import AccuracyCurves
from gradbuffer.training.episodes import Episodes, EpisodicES
from gradbuffer.training.episodic_run import EpisodicRun
from gradbuffer.training.evolution import PES
from gradbuffer.training.meta_gradients import Autograd, Replay, meta_gradient
from gradbuffer.training.options import (
    Checkpoint,
    Curriculum,
    MetaTrainOptions,
    RandomHorizon,
    Teacher,
    Training,
    Validation,
    training_of,
)
from gradbuffer.training.run import History, Run

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it since Python 3.11

__all__ = [
    "AccuracyCurves",
    "Autograd",
    "BASELINES",
    "Checkpoint",
    "Curriculum",
    "Episodes",
    "EpisodicES",
    "History",
    "PES",
    "RandomHorizon",
    "Replay",
    "Teacher",
    "Training",
    "TunedBaseline",
    "Validation",
    "compare",
    "compare_final",
    "evaluate",
    "evaluate_baseline",
    "meta_gradient",
    "meta_train",
    "tune_baseline",
    "tune_baselines",
]


def meta_train(
    net: torch.nn.Module,
    problem: Problem,
    steps: int = 100,
    unroll: int = 20,
    meta_batch: int = 16,
    iterations: int = 1000,
    lr: float = 0.005,
    seed: int = 0,
    device: torch.device | str | None = None,
    *,
    callback: Callable[[int, History], None] | None = None,
    progress: bool = True,
    **options: "Unpack[MetaTrainOptions]",
) -> History:
    """Meta-train a learned optimizer by truncated backpropagation through the unrolled optimization.

    Functions are drawn anew after every `steps` steps; each window of `unroll` updates gives one meta-update by Adam,
    with the meta-gradient clipped by its norm and the learning rate warmed up, then annealed to 0 on a cosine. Every
    so many iterations (and at the end) the optimizer is scored on functions that training does not draw:
    the sum of the loss over `steps` steps. `net` ends with the weights that scored best, Ctrl-C included: it ends the
    run early, with a warning.

    Of a problem that is a mixture (`optimizees.Mixture`) every iteration takes a window of each of its meta-batches, and sums their
    meta-gradients; its score is the geometric mean of its problems' scores.

    With `method=EpisodicES()` functions have episodes of their own instead, which go on from iteration to iteration: evolution strategies
    on many families of functions, for optimizers such as `MLPOptimizer`. That class says what these options mean then.

    In a process group of `torch.distributed` (`torchrun`), each process takes a slice of every meta-batch and the
    meta-gradients are summed: N processes train as one does, to rounding (what the meta-gradient itself draws,
    coordinates of a partial replay and perturbations of "pes", differs). `net` starts everywhere from the first
    process's weights.

    Args:
        net: the learned optimizer; trained in place, and moved to `device`.
        problem: distribution of optimizees to train on. Its `validation_problem()`, if it has one, is validated on;
            else fresh functions of its own.
        steps, unroll, meta_batch, iterations, lr, seed: see `Training`.
        device: where to train; default where `net` is.
        callback: called as callback(iterations done, history) after each iteration; in the first process only.
        progress: show a bar with the meta-loss.
        options: the other options of `Training`, by their names: warmup, clip, averaging, method, cuda_graph, weights, horizon, teacher,
            meta_optimizer, schedule, skip_non_finite, balance, validation, checkpoint. Those that are objects may be given so, such as
            method=Replay(second_order=True), or by the names of their own options: second_order, replay_fraction, objective and
            adjoint_bound (see `Replay`), sigma, pairs, hold and per_function (`PES`), horizons=(least, most), curriculum and patience
            (`Curriculum`), imitation and imitation_weight, with teacher=(class of `torch.optim`, its options) or a learned
            optimizer (`Teacher`), validation_every and validation_functions (`Validation`), checkpoint_every and on_mismatch
            (`Checkpoint`).

    Returns:
        `History`.

    Raises:
        ValueError, TypeError: an argument is not as above, or has no effect beside the others; `checkpoint` is damaged, no checkpoint,
            or that of a run with other settings.
        OSError: `checkpoint` cannot be written; an older one there is as it was.
        NonFiniteError: the meta-loss or the meta-gradient stopped being finite; names the iteration. `net` then has
            the best weights so far.
        RuntimeError: another process of the group has died.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> net = CoordinatewiseLSTM()
        >>> history = meta_train(net, Quadratics(), iterations=20, meta_batch=8, progress=False)
        >>> len(history.meta_loss)
        20

    Reference: Andrychowicz et al. 2016, section 3; curriculum and imitation: Chen et al. 2020 (arXiv 2010.09089).
    """
    options = training_of(
        net, steps=steps, unroll=unroll, meta_batch=meta_batch, iterations=iterations, lr=lr, seed=seed, **options
    )
    device = device_of(net, device)
    net.to(device)
    kind = EpisodicRun if isinstance(options.method, EpisodicES) else Run
    run = kind(net, on_device(problem, device), options)
    try:
        run.begin()
        with tqdm(
            total=iterations,
            initial=run.iteration,
            desc="meta-training",
            unit="it",
            disable=not progress or run.ranks.rank > 0,
        ) as bar:
            while run.iteration < iterations:
                run.advance()
                if run.iteration % options.validation_every == 0 or run.iteration == iterations:
                    run.validate()
                if options.checkpoint and (
                    run.iteration % options.checkpoint_every == 0 or run.iteration in (1, iterations)
                ):
                    run.save()  # after the first too: a place that cannot be written is found out early
                if callback is not None and run.ranks.rank == 0:
                    callback(run.iteration, run.history)
                bar.update()
                bar.set_postfix(
                    meta_loss=f"{run.history.meta_loss[-1]:.3g}",
                    best=f"{run.history.best_validation:.4g}",
                    refresh=False,
                )
    except KeyboardInterrupt:
        run.history.interrupted = True
        warnings.warn(
            f"meta-training was interrupted at iteration {run.iteration} of {iterations}; the optimizer is "
            f"the best so far, of iteration {run.history.best_iteration}",
            stacklevel=2,
        )
    finally:
        net.load_state_dict(run.best)
    return run.history


if __name__ == "__main__":
    runpy.run_module(
        "gradbuffer.command_line", run_name="__main__"
    )  # the program, which imports this module under its own name
