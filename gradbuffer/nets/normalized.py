"""Learned optimizers that read what Adam would do: `RNNProp`, and `NormalizedLSTM` for general use.

Lv, Jiang and Li 2017 (arXiv 1703.03633).
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from gradbuffer.checks import check_positive_number
from gradbuffer.devices import constant
from gradbuffer.kernels.interface import Averages
from gradbuffer.nets.lstm import LSTMOptimizer
from gradbuffer.nets.readings import odd_part

__all__ = ["NormalizedLSTM", "RNNProp", "start_as_adam"]

LINEAR = 0.2  # the candidate's weight on a reading: tanh is nearly linear there
OPEN, CLOSED = 4.0, -8.0  # biases of gates


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

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        beta: float = 0.95,
        output_scale: float = 0.1,
        eps: float = 1e-8,
    ):
        if not (isinstance(beta, (int, float)) and 0 <= beta < 1):
            raise ValueError(f"beta must be a number in [0, 1), got {beta!r}")
        check_positive_number(output_scale=output_scale, eps=eps)
        super().__init__(hidden_size, hidden_size, num_layers)
        self.input = nn.Linear(2, hidden_size)
        self.beta, self.output_scale, self.eps = beta, output_scale, eps

    def read(self, grads: torch.Tensor, memory: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple]:
        """(T, N) -> readings (T, 2, N): m̂/√v̂ and ∇/√v̂, and the averages after them."""
        (averages,), readings = memory, []
        for grad in grads:
            fresh = torch.stack([grad, grad * grad, torch.ones_like(grad)])
            averages = self.beta * averages + (1 - self.beta) * fresh
            mean, square = averages[:2] / averages[2]
            readings.append(torch.stack([mean, grad]) / (square + self.eps**2).sqrt())
        return torch.stack(readings), (averages,)

    def embed(self, readings: torch.Tensor) -> torch.Tensor:
        return nn.functional.elu(self.input.weight @ readings + self.input.bias[:, None])

    @property
    def averages(self) -> Averages | None:
        if type(self) is not RNNProp:  # a subclass may read something else
            return None
        return Averages((self.beta,), self.beta, self.eps, self.output_scale, 1, None, self.input)


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

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 1,
        betas: tuple = (0.5, 0.9, 0.97),
        square_beta: float = 0.95,
        fade: float = 300.0,
        longest: float = 1000.0,
        output_scale: float = 0.1,
        eps: float = 1e-8,
        odd: bool = False,
    ):
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

    def symmetrize(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`readings.odd_part` for readings of which the time alone does not change sign with the gradient."""
        return odd_part(tensors, self.hidden_size, [-1] * (len(self.betas) + 1) + [1])

    def read(self, grads: torch.Tensor, memory: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple]:
        """(T, N) -> readings (T, len(betas) + 2, N), and the averages and t after them."""
        (averages,), readings = memory, []
        decay = constant((*self.betas, self.square_beta), averages.device, averages.dtype)[:, None]
        for grad in grads:
            time = averages[-1:] + 1
            fresh = torch.cat([grad.expand(len(self.betas), -1), grad[None] * grad])
            averages = torch.cat([decay * averages[:-1] + (1 - decay) * fresh, time])
            first = time[
                :, :1
            ]  # mostly t is the same for all, and powers cost more than to look; on CUDA the host would wait
            steps = first if time.is_cpu and time.equal(first.expand_as(time)) else time
            corrected = averages[:-1] / (1 - decay**steps)
            size = (corrected[-1:] + self.eps**2).sqrt()
            age = (time.clamp(max=self.longest) / self.fade).log()
            readings.append(torch.cat([grad[None] / size, corrected[:-1] / size, age]))
        return torch.stack(readings), (averages,)

    def embed(self, readings: torch.Tensor) -> torch.Tensor:
        return readings

    @property
    def averages(self) -> Averages | None:
        if type(self) is not NormalizedLSTM:
            return None
        clock = self.fade, self.longest
        return Averages(self.betas, self.square_beta, self.eps, self.output_scale, 0, clock, None)


@torch.no_grad()
def start_as_adam(net: NormalizedLSTM, lr: float, mix: float = 0.3) -> NormalizedLSTM:
    """Write weights into a `NormalizedLSTM` with which it is Adam with a fading learning rate; meta-training starts there.

    The updates are -lr / (1 + t / fade) · ((1 - mix) m̂ + mix ∇) / √v̂ for t = 1, 2, … longest, with m̂ the average of
    the second of the net's `betas` (the first if there is one only), right to a few per cent where |∇| ≤ 3 √v̂. One unit
    of each layer does it: its output gate is sigmoid(-log(t / fade)) = 1 / (1 + t / fade). The other units keep their
    weights and start with output weights of 0: they are there for meta-training to use.

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
        bias[i], bias[f] = OPEN, CLOSED
        if layer == 0:
            weight[g, 0], weight[g, 1 + min(1, len(net.betas) - 1)] = LINEAR * mix, LINEAR * (1 - mix)
            weight[o, -1] = -1
        else:  # pass on what the layer below holds
            weight[g, 0], bias[o] = 1, OPEN
    net.output.weight.zero_()
    net.output.bias.zero_()
    net.output.weight[0, 0] = -lr / (net.output_scale * LINEAR * opened * opened ** (2 * (net.num_layers - 1)))
    return net
