"""Imitation: a learned optimizer learns to write the updates that another, its teacher, makes of the same gradients.

The off-policy imitation of Chen et al. 2020 (arXiv 2010.09089): the teacher optimizes the functions, the student reads
the gradients along that trajectory, and the loss is ½‖g_t - ĝ_t‖² between their updates, summed over the window.
Nothing of the optimizee is differentiated. How imitation and meta-loss take turns in a run is `meta_training`'s.
"""

import hashlib
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from gradbuffer.checks import NonFiniteError, check_count, check_positive_number
from gradbuffer.contracts import MetaBatch, as_loss, as_rule, is_learned
from gradbuffer.evaluation import check_baseline
from gradbuffer.nets.torch_optim import LearnedOptimizer
from gradbuffer.training.meta_gradients import check_replay_fraction, replay_recorded
from gradbuffer.unrolling import Coordinates, join_reads

__all__ = ["Demonstration", "ImitationInfo", "Teacher", "imitation_gradient"]


class ImitationInfo(NamedTuple):
    """What a window of imitation leaves behind; nothing carries a graph."""

    losses: torch.Tensor  # (unroll, B): f(θ_0) … f(θ_{T-1}) along the teacher's trajectory
    imitation: torch.Tensor  # (): the imitation loss, mean over functions, without the weight
    params: dict  # where the teacher is at the end of the window
    state: object  # the student's there


class Teacher:
    """Whom a learned optimizer imitates, and how often.

    Args:
        optimizer: class of a `torch.optim.Optimizer` that treats coordinates by themselves; or a learned optimizer.
        options: the class's options, a dict such as {"lr": 0.01}; None for a learned optimizer.
        share: in (0, 1]: share of the draws of functions, spread evenly over the run, that the teacher optimizes, in all their windows,
            while the student reads the gradients and learns to write its updates. Nothing else is learned from these.
        weight: positive factor on the imitation loss, ½‖g - ĝ‖² summed over a window, mean over functions. Its gradients go through the
            same clipping and Adam as meta-gradients, which are often larger by far.

    Raises:
        ValueError, TypeError: an argument is not as above, or the class refuses the options.
    """

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer] | nn.Module,
        options: dict[str, Any] | None = None,
        share: float = 1.0,
        weight: float = 1.0,
    ):
        if isinstance(share, bool) or not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise ValueError(f"imitation must be a number in (0, 1] where there is a teacher, got {share!r}")
        check_positive_number(imitation_weight=weight)
        if options is None and is_learned(optimizer):
            optimizer, options = LearnedOptimizer, {"net": optimizer}
        if options is None:
            raise TypeError(
                "teacher must be (class of torch.optim, dict of its options), or a learned optimizer, got "
                f"{optimizer!r}"
            )
        check_baseline(optimizer, options, names=("teacher[0]", "teacher[1]"))
        self.optimizer, self.options, self.share, self.weight = optimizer, options, share, weight
        self.begin({"probe": torch.zeros(1, 1)})

    def begin(self, params: dict[str, torch.Tensor]) -> "Demonstration":
        """The teacher at the start of its way from `params`, a dict of (B, ...)."""
        return Demonstration(self.optimizer, self.options, params)

    def comes(self, draw: int) -> bool:
        """Whether functions are for imitation, by the number of draws before them: the first are, the share is even."""
        return math.ceil((draw + 1) * self.share) > math.ceil(draw * self.share)

    def describe(self) -> str:
        """What a checkpoint must agree with, as text."""
        options = {
            name: fingerprint(option) if isinstance(option, torch.nn.Module) else option
            for name, option in self.options.items()
        }
        return f"{self.optimizer.__name__} {options}, {self.share} of the functions, weight {self.weight}"


class Demonstration:
    """A teacher at work on one meta-batch: where it is, and its state, from window to window.

    Args:
        optimizer, options: a class of `torch.optim`, or `LearnedOptimizer`, that treats coordinates by themselves.
        params: dict of (B, ...), where it starts; copied.
    """

    def __init__(
        self, optimizer: type[torch.optim.Optimizer], options: dict[str, Any], params: dict[str, torch.Tensor]
    ):
        self.coordinates = Coordinates(params)
        self.theta = self.coordinates.join(params).detach().clone()
        self.optimizer = optimizer([self.theta], **options)

    def update(self, gradient: torch.Tensor) -> torch.Tensor:
        """The teacher's update (N,) for this gradient, which it may overwrite; it has taken that step."""
        before = self.theta.clone()
        self.theta.grad = gradient
        self.optimizer.step()
        return self.theta - before

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def go_on(self, params: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Take up the way at these params, with what `state_dict` gave there."""
        self.theta.copy_(self.coordinates.join(params))
        self.optimizer.load_state_dict(state)


@torch.no_grad()
def imitation_gradient(
    net: nn.Module,
    batch: MetaBatch,
    demonstration: Demonstration,
    state: Any,
    step: int = 0,
    unroll: int = 20,
    weight: float = 1.0,
    replay_fraction: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, torch.Tensor], ImitationInfo]:
    """The gradient of the imitation loss over one window of the teacher's trajectory.

    The loss is the mean over functions, as in the meta-loss, of Σ_t ½‖g_t - ĝ_t‖² over the window's updates: g_t the
    student's, ĝ_t the teacher's, both for the gradient at the teacher's θ_t. It knows of g_t alone, so its adjoint is
    (g_t - ĝ_t) / B, and the replay over the recorded gradients is the exact gradient, the student's state included.

    Args:
        net: the student; its parameters' `.grad` are not touched.
        batch: a meta-batch, with `loss(params, step) -> (B,)`.
        demonstration: the teacher on these functions; goes `unroll` steps further.
        state: the student's (`net.init_state(N)` at the first window); not changed.
        step: number of the window's first step, at least 0.
        unroll: T, updates in the window; positive.
        weight: factor on the loss; positive. Squared updates are small beside losses, and so are the gradients.
        replay_fraction, generator: see `meta_gradient`.

    Returns:
        grads, a dict like `net.named_parameters()` (those that require grad), and `ImitationInfo`. No graph.

    Raises:
        ValueError, TypeError: an argument is not as above.
        NonFiniteError: a loss along the trajectory, or an update of the student or the teacher, is infinite or NaN.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> net, batch = CoordinatewiseLSTM(), Quadratics(dim=10).sample(16)
        >>> demonstration = Demonstration(torch.optim.Adam, {"lr": 0.1}, batch.params)
        >>> grads, info = imitation_gradient(net, batch, demonstration, net.init_state(160))
        >>> grads, info = imitation_gradient(net, batch, demonstration, info.state, step=20)

    Reference: Chen et al. 2020, "Training Stronger Baselines for Learning to Optimize", off-policy imitation learning.
    """
    check_count(unroll=unroll)
    check_count(least=0, step=step)
    check_positive_number(weight=weight)
    check_replay_fraction(replay_fraction, False, as_rule(net))
    coordinates, start = demonstration.coordinates, state
    rule, loss, read = as_rule(net, coordinates), as_loss(batch.loss), []
    losses = demonstration.theta.new_empty(unroll, coordinates.functions)
    inputs, errors = demonstration.theta.new_empty(2, unroll, demonstration.theta.numel())
    for t in range(unroll):
        losses[t], gradient = coordinates.losses_and_gradient(loss, demonstration.theta, step + t)
        inputs[t] = gradient
        read.append(
            coordinates.what(
                rule.reads, demonstration.theta.clone() if "params" in rule.reads else None, losses[t], step + t
            )
        )
        update, state = rule(gradient, state, **read[-1])
        errors[t] = update - demonstration.update(gradient)
    for name, values in (("loss", losses), ("difference of the updates", errors)):
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"a {name} at steps {step} … {step + unroll - 1} of the teacher's way is not finite")
    errors /= coordinates.functions
    grads = replay_recorded(
        rule,
        coordinates,
        inputs,
        start,
        weight * errors,
        replay_fraction,
        generator,
        read=join_reads(read) if rule.reads else None,
    )
    if rule.odd:
        grads = rule.symmetrize(grads)
    imitation = 0.5 * coordinates.functions * errors.square().sum()
    return grads, ImitationInfo(losses, imitation, coordinates.split(demonstration.theta.clone()), state)


def fingerprint(net):
    """Text that tells a network from others, its weights included."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{type(net).__name__} {as_rule(net).config} {digest.hexdigest()[:16]}"
