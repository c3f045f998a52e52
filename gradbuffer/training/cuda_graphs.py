"""A window of the meta-gradient as one CUDA graph: its thousands of small kernels are launched at once.

With few coordinates a GPU is faster than Python, and waits for the next launch. A window that has run once under
`torch.cuda.graph` is launched as a whole from then on, on the same memory: what differs from window to window (where it
starts, the functions' data; the optimizer's weights lie where they always do) is copied there first.

The functions' loss must be an object that says which tensors it reads, see `CapturedWindow`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradbuffer.checks import check_count, values_unchecked
from gradbuffer.contracts import Loss, MetaBatch, as_loss, as_rule, repack
from gradbuffer.nests import clone, map_tensors, tensors_in
from gradbuffer.training.evolution import Unrolled, Window
from gradbuffer.training.meta_gradients import Replay, WindowInfo, finish_window, replay_window
from gradbuffer.unrolling import Coordinates, check_objective

__all__ = ["CapturedWindow", "cuda_graph"]


def cuda_graph(work: Callable) -> tuple[Callable[[], None], Any]:
    """Capture a function without arguments.

    Returns:
        a function that launches what it did again, and its result, whose tensors are overwritten by every launch.

    Raises:
        RuntimeError: the function does what a graph cannot hold.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is done once only (kernels compiled, libraries begun) must not be captured
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


class CapturedWindow:
    """The replay's meta-gradient of windows of one size, captured once: as `meta_gradient(net, …, unroll=unroll)`.

    The batch's loss must be an object with two methods beside being called: `tensors(step)`, a tuple of what it reads at
    that step, of the same shapes in all batches; and `of(tensors)`, a loss that reads these, at any step. Those of
    `Quadratics` and `MNISTNet` have them. It may have `with_gradient`, like any loss. `loss` and `net` must do all their
    work on the device, and what they do must not depend on values.

    Only at the end is it looked whether numbers are finite.

    Args:
        net: the learned optimizer, on the device; its weights are read anew at every launch.
        batch, params, state: a window, as of `meta_gradient`: it says which shapes all of them have.
        unroll: T, updates in the window; positive.
        objective: see `Replay`.
        record: what captures, see `cuda_graph`.

    Raises:
        ValueError: the loss does not say which tensors it reads; `objective` is neither.
        RuntimeError: as `cuda_graph`; or the window does not lie on a CUDA device.

    Example:
        >>> from optimizees import Quadratics; from optimizers import CoordinatewiseLSTM
        >>> if torch.cuda.is_available():
        ...     net, problem = CoordinatewiseLSTM().cuda(), Quadratics(device="cuda")
        ...     batch = problem.sample(16)
        ...     window = CapturedWindow(net, batch, batch.params, net.init_state(160))
        ...     grads, info = window(batch, batch.params, net.init_state(160))
        ...     grads, info = window(batch, info.params, info.state, step=20)
    """

    def __init__(
        self,
        net: nn.Module,
        batch: MetaBatch,
        params: dict[str, torch.Tensor],
        state: Any,
        unroll: int = 20,
        objective: str | Callable = "sum",
        record: Callable = cuda_graph,
    ):
        check_count(unroll=unroll)
        check_objective(objective)
        self.net, self.unroll, self.objective = net, unroll, objective
        self.data = [tuple(map(clone, tensors)) for tensors in self.data_of(batch, 0)]
        self.shapes, coordinates = shapes_of(params, state, self.data[0]), Coordinates(params)
        theta = clone(coordinates.join(params).detach())
        coordinates.first_step = theta.new_zeros((), dtype=torch.int64)  # a number would be captured with the rest
        if record is cuda_graph and not theta.is_cuda:
            raise RuntimeError(f"a CUDA graph needs a CUDA device, the window lies on {theta.device}")
        loss = LossesOfSteps([as_loss(batch.loss).of(tensors) for tensors in self.data])
        weights = torch.full_like(theta[:1], 1 / coordinates.functions).expand(unroll + 1).contiguous()
        self.window = Window(as_rule(net, coordinates), loss, coordinates, theta, map_tensors(clone, state), 0, weights)
        try:
            self.launch, self.results = record(self.work)
        finally:
            repack(net)  # elsewhere than in the graph's memory

    def work(self) -> Unrolled:
        """What is captured: a window on the memory of this object."""
        repack(self.net)
        with values_unchecked():
            return replay_window(self.window, Replay(objective=self.objective), None)

    def fits(self, batch: MetaBatch, params: dict[str, torch.Tensor], state: Any, step: int = 0) -> bool:
        """Whether this window has the shapes that were captured."""
        return self.shapes == shapes_of(params, state, as_loss(batch.loss).tensors(step))

    def data_of(self, batch: MetaBatch, step: int) -> list[tuple]:
        """What the loss reads at each step of the window from `step` on."""
        loss = as_loss(batch.loss)
        return [loss.tensors(step + t) for t in range(self.unroll + 1)]

    def __call__(
        self, batch: MetaBatch, params: dict[str, torch.Tensor], state: Any, step: int = 0
    ) -> tuple[dict[str, torch.Tensor], WindowInfo]:
        """Launch the window of these functions from these params and this state, at that step.

        Returns:
            grads and `WindowInfo`, as `meta_gradient`; new tensors.

        Raises:
            ValueError: the window has other shapes than the one that was captured.
            NonFiniteError: a loss in the window is infinite or NaN, or with "log" not positive.
        """
        data = self.data_of(batch, step)
        shapes = shapes_of(params, state, data[0])
        if shapes != self.shapes:
            raise ValueError(f"the window captured has shapes {self.shapes}, got one with {shapes}")
        with torch.no_grad():
            self.window.theta.copy_(self.window.coordinates.join(params))
            self.window.coordinates.first_step.fill_(step)
            copy_all(tensors_in((self.window.state, self.data)), tensors_in((state, data)))
            self.launch()
            found = map_tensors(clone, self.results)
        return finish_window(self.window._replace(step=step), found, self.objective)


def copy_all(kept, new):
    """Copy a list of tensors over another, with a few launches for all of one dtype."""
    by_dtype = {}
    for pair in zip(kept, new):
        by_dtype.setdefault(pair[0].dtype, []).append(pair)
    for pairs in by_dtype.values():
        torch._foreach_copy_(*map(list, zip(*pairs)))


def shapes_of(params, state, data):
    """The shapes of a window: of parameters, of the state, of what the loss reads at a step."""
    return (
        {name: tensor.shape for name, tensor in params.items()},
        [tensor.shape for tensor in tensors_in(state)],
        [tensor.shape for tensor in data],
    )


class LossesOfSteps(Loss):
    """A loss that is another one at every step."""

    def __init__(self, losses):
        self.losses = losses

    def with_gradient(self, params, step):
        return self.losses[step].with_gradient(params, step)

    def __call__(self, params, step):
        return self.losses[step](params, step)
