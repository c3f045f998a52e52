"""Several processes that meta-train together, each on its own functions, by `torch.distributed`.

All processes ("ranks") draw the same whole meta-batch from the same generator, and each keeps a slice of it, so that any
number of them sees the same functions. Meta-gradients are summed over ranks. Without a process group there is one rank,
and nothing here communicates. Starting the group is the caller's, as `torchrun` expects.
"""

import contextlib

import torch
from torch import distributed

from gradbuffer.checks import NonFiniteError

__all__ = ["Ranks"]


class Ranks:
    """This process among those of the default process group; alone if there is none."""

    def __init__(self):
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank, self.size = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)

    def share(self, meta_batch):
        """(first, last): the functions of a meta-batch that are this rank's; sizes differ by one at most."""
        if meta_batch < self.size:
            raise ValueError(f"meta_batch must be at least the number of processes {self.size}, got {meta_batch}")
        return self.rank * meta_batch // self.size, (self.rank + 1) * meta_batch // self.size

    def on_first(self, function):
        """What `function()` returns on rank 0, for every rank. Where it raises there, all ranks raise."""
        if self.size == 1:
            return function()
        outcome, failure = [None, None], None
        if self.rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:
                failure, outcome[1] = error, f"{type(error).__name__}: {error}"
        with self.answering():
            distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise failure or RuntimeError(f"rank 0 failed: {outcome[1]}")
        return outcome[0]

    def gather(self, value):
        """A list of every rank's value (tensors in it on the CPU) on rank 0, None elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        with self.answering():
            distributed.gather_object(value, values, dst=0)
        return values

    def sum(self, grads, figures, failure):
        """Sums over ranks of a dict of tensors and of a list of numbers; raises everywhere if one rank has failed.

        Args:
            grads: dict of this rank's summands, the same names and shapes on every rank; None if it failed.
            figures: list of numbers, or None.
            failure: the NonFiniteError that kept this rank from having them, or None.

        Returns:
            grads, figures: the sums, the same to the bit on every rank.
        """
        if self.size == 1:
            if failure is not None:
                raise failure
            return grads, figures
        with self.answering():
            device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
            failed = torch.tensor(float(failure is not None), device=device)
            distributed.all_reduce(failed)
            if failed.item():
                causes = [None] * self.size
                distributed.all_gather_object(causes, failure and str(failure))
                raise NonFiniteError(
                    "; ".join(f"on rank {rank}, {cause}" for rank, cause in enumerate(causes) if cause)
                )
            parts = [grad.flatten() for grad in grads.values()]
            figures = torch.tensor(figures, dtype=torch.float64)
            vector = torch.cat([part.to(device, torch.float64) for part in (*parts, figures)])
            distributed.all_reduce(vector)
        *sums, figures = vector.split([*(part.numel() for part in parts), len(figures)])
        return {
            name: part.view(grad.shape).to(grad) for part, (name, grad) in zip(sums, grads.items())
        }, figures.tolist()

    @contextlib.contextmanager
    def answering(self):
        """Say what it means when the others do not answer."""
        try:
            yield
        except NonFiniteError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: another process of this job has died or does not "
                "answer. Start the job again: with a checkpoint it goes on from there, with any number "
                f"of processes ({error})"
            ) from error
