"""The functions that a seed means, drawn as meta-batches, and run as one computation where a device has room for more."""

from collections.abc import Iterable, Iterator

import torch

from gradbuffer.checks import check_count
from gradbuffer.contracts import Loss, MetaBatch, Problem, as_loss, on_device

__all__ = ["draw_batches", "join_batches", "join_for"]

FUNCTIONS_AT_ONCE = 32  # functions that evaluation draws at once; a seed's functions depend on both bounds
COORDINATES_AT_ONCE = 1 << 17  # larger states leave the cache and cost a fresh page of memory at every step
COORDINATES_ELSEWHERE = 1 << 22  # that run together on other devices than a CPU: as many draws as have no more of them


def draw_batches(
    problem: Problem, num_functions: int, seed: int, device: torch.device | str | None
) -> Iterator[MetaBatch]:
    """Meta-batches of `num_functions` functions in all: for a seed, the same to every optimizer."""
    check_count(num_functions=num_functions)
    check_count(least=0, seed=seed)
    problem, generator = on_device(problem, device), torch.Generator().manual_seed(seed)
    least = problem.multiple_of
    if num_functions % least:
        raise ValueError(f"num_functions must be a multiple of {least} for {problem.name}, got {num_functions}")
    size = size_of(problem.sample(least, generator=torch.Generator())) // least
    at_once = max(min(COORDINATES_AT_ONCE // size, FUNCTIONS_AT_ONCE) // least, 1) * least
    for first in range(0, num_functions, at_once):
        yield problem.sample(min(at_once, num_functions - first), generator=generator)


def size_of(batch):
    """Coordinates of all functions of a meta-batch."""
    return sum(tensor.numel() for tensor in batch.params.values())


def join_for(device: torch.device | str | None, batches: Iterable[MetaBatch]) -> Iterator[MetaBatch]:
    """Meta-batches as they are run: on a CPU as they are drawn, elsewhere several as one, which keep a device busier."""
    most, waiting = 0 if device is None or torch.device(device).type == "cpu" else COORDINATES_ELSEWHERE, []
    for batch in batches:
        if waiting and sum(map(size_of, waiting)) + size_of(batch) > most:
            yield join_batches(waiting)
            waiting = []
        waiting.append(batch)
    yield join_batches(waiting)


def join_batches(batches: list[MetaBatch]) -> MetaBatch:
    """Meta-batches of like parameters, function after function as one."""
    if len(batches) == 1:
        return batches[0]
    losses = [as_loss(batch.loss) for batch in batches]
    alike = all(type(loss) is type(losses[0]) for loss in losses)
    sizes = [len(next(iter(batch.params.values()))) for batch in batches]
    loss = alike and losses[0].join(losses[1:]) or JoinedLoss(losses, sizes)
    return MetaBatch({name: torch.cat([batch.params[name] for batch in batches]) for name in batches[0].params}, loss)


class JoinedLoss(Loss):
    """Losses of so many functions each, one after the other."""

    def __init__(self, losses, sizes):
        self.losses, self.sizes = losses, sizes

    def pieces(self, params):
        """(loss, params of its functions) of each."""
        parts = {name: tensor.split(self.sizes) for name, tensor in params.items()}
        return [(loss, {name: part[k] for name, part in parts.items()}) for k, loss in enumerate(self.losses)]

    def __call__(self, params, step):
        return torch.cat([loss(own, step) for loss, own in self.pieces(params)])
