"""Steps of a `LearnedOptimizer` by kernels in Triton beside torch's: what the tests of steps in groups share.

A list has, for each kind of kernels, (parameters, optimizer, network, the value of L2O_KERNELS).
"""

import torch


def step(monkeypatch, found, seed, change=None):
    """The same gradients and one step for each; `change(params, net)` comes before it."""
    for params, optimizer, net, kind in found:
        monkeypatch.setenv("L2O_KERNELS", kind)
        generator = torch.Generator().manual_seed(seed)
        for place, param in enumerate(params):
            gradient = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.device)
            param.grad = None if (seed, place) == (1, 3) else gradient
        if change:
            change(params, net)
        optimizer.step()


def same(found, atol=1e-12):
    """Parameters and states of both are the same."""
    (ours, own, *_), (theirs, other, *_) = found
    states = [
        sum((list(each.state[param].values()) for param in params if param in each.state), [])
        for params, each in ((ours, own), (theirs, other))
    ]
    for a, b in zip([*ours, *states[0]], [*theirs, *states[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)
