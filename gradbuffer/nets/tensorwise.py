"""A small learned optimizer as a drop-in `torch.optim.Optimizer`, on a CPU, by the compiled steps of `TensorSteps`.

It has parameter groups with a rate each, closures and a state dict, and no other options. CUDA, weight decay by groups
and averages of other dtypes are not for it.
"""

import copy
import math

import torch

from gradbuffer.kernels.numba_mlp import TensorSteps, check_net
from gradbuffer.snapshots import Snapshot

__all__ = ["TensorwiseSteps"]


class TensorwiseSteps(torch.optim.Optimizer):
    """Trains parameters on a CPU by an `MLPOptimizer`, variant "celo" without Newton-Schulz.

    A parameter without a gradient is skipped, and its averages stay. A new rate in `param_groups`, as schedulers set it,
    holds from the next step on.

    Args:
        params: parameters of float32 or float64 on the CPU, or dicts of groups, each with its own "lr" if wanted.
        net: the `MLPOptimizer`. Every step uses its weights as they then are. They are not in the state dict.
        lr: the rate, 0 or more. Default: `net.lr`.

    Raises:
        TypeError, ValueError: an argument is not as said; in `step`, a gradient is sparse, or a parameter is elsewhere
            or of another dtype.

    Example:
        >>> optimizer = TensorwiseSteps(model.parameters(), start_as_normalized_adam(MLPOptimizer()), lr=0.003)
        >>> loss = F.mse_loss(model(inputs), targets)
        >>> optimizer.zero_grad()
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(self, params, net, lr=None):
        check_net(net)
        self.net, self.compiled = net, {}
        super().__init__(params, {"lr": net.lr if lr is None else lr})

    def __getstate__(self):
        return {**super().__getstate__(), "net": self.net}

    def __setstate__(self, state):
        super().__setstate__({"compiled": {}, **state})

    def add_param_group(self, param_group):
        """As of `torch.optim.Optimizer`; the group's rate is checked."""
        lr = param_group.get("lr", self.defaults["lr"])
        if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 <= lr < math.inf:
            raise ValueError(f"lr must be a finite number, 0 or more, got {lr!r}")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict):
        """As of `torch.optim.Optimizer`, but the state is copied: steps overwrite it where it lies."""
        super().load_state_dict(copy.deepcopy(state_dict))

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all parameters that have a gradient.

        Args:
            closure: function that computes the gradients anew and returns the loss; called once, before the step.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_dtype = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.layout is not torch.strided:
                    raise TypeError(f"gradients must be dense, got one of layout {param.grad.layout}")
                by_dtype.setdefault(param.dtype, []).append(param)
            for dtype, params in by_dtype.items():
                states = [self.state_of(param) for param in params]
                self.steps_of(dtype).steps(params, [param.grad for param in params], states, group["lr"])
        return loss

    def steps_of(self, dtype):
        """The compiled steps for that dtype; made anew when the network's weights have changed."""
        weights = list(self.net.parameters())
        if dtype not in self.compiled or not self.compiled[dtype][0].holds(weights):
            self.compiled[dtype] = Snapshot(weights), TensorSteps(self.net, dtype)
        return self.compiled[dtype][1]

    def state_of(self, param):
        """A parameter's state, begun where there is none."""
        state = self.state[param]
        if not state:
            state.update({name: value[0] for name, value in self.net.init_state({"": param[None]})[""].items()})
        return state
