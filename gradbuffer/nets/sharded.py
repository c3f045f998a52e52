"""Parameters of which each process has a part, in a `LearnedOptimizer`: DTensors, such as those of FSDP2's `fully_shard`."""

import sys

import torch
from torch import nn

__all__ = [
    "as_sharded",
    "check_not_divided",
    "check_sharded",
    "from_sharded",
    "is_sharded",
    "local",
    "local_size",
    "placements_of_state",
    "true_everywhere",
]


def is_sharded(tensor):
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there are none
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor):
    """This process's part of the tensor, the same memory; a tensor that is not sharded as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_size(tensor):
    return local(tensor).numel()


def placements_of_state(parameter, lead):
    """Where the parts of a state (*lead, *parameter.shape) lie: each with its coordinates."""
    from torch.distributed.tensor import Shard

    return tuple(Shard(place.dim + lead) if type(place) is Shard else place for place in parameter.placements)


def as_sharded(leaf, parameter):
    """(*lead, n), of this process's n coordinates -> DTensor (*lead, *parameter.shape) of the same memory.

    In this form `torch.distributed.checkpoint` can write it, and read it with another number of processes.
    """
    from torch.distributed.tensor import DTensor

    lead = leaf.shape[:-1]
    shape = torch.Size([*lead, *parameter.shape])
    return DTensor.from_local(
        leaf.view(*lead, *local(parameter).shape),
        parameter.device_mesh,
        placements_of_state(parameter, len(lead)),
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def from_sharded(leaf, parameter):
    """The opposite of `as_sharded`, the same memory."""
    leaf, axes = local(leaf), parameter.dim()
    return leaf.flatten(leaf.dim() - axes) if axes else leaf[..., None]


def check_sharded(network, params, where):
    """Raise unless the network can run on the parts of a sharded parameter, or there is none."""
    if not any(map(is_sharded, params)):
        return
    if not network.joins:
        raise ValueError(
            f"{where} is a DTensor, of which each process has a part: its network must be coordinatewise, with a "
            f"state that is all per coordinate; got {network.name}"
        )
    from torch.distributed.tensor import Replicate, Shard

    if not all(type(place) in (Shard, Replicate) for place in params[0].placements):
        raise ValueError(f"{where} must be placed by Shard or Replicate, got {params[0].placements}")


def true_everywhere(value, mesh):
    """Whether it is true in all processes of a device mesh."""
    flag = torch.tensor(float(value), device=mesh.device_type)
    for group in mesh.get_all_groups():
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
    return bool(flag)


def check_not_divided(name, where):
    """Raise within a ZeroRedundancyOptimizer: it gives each process an optimizer of some of the parameters only."""
    module, frame = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer"), sys._getframe(1)
    while module and frame:
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer) and caller.world_size > 1:
            raise ValueError(
                f"{name}, the network of {where}, is not coordinatewise, and ZeroRedundancyOptimizer "
                "would show it in each process a part of the parameters only: its updates would be others. Accepted "
                "are coordinatewise networks"
            )
        frame = frame.f_back
