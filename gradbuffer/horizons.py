"""How many steps a meta-training run takes on the functions it has drawn: always as many, at random, or a curriculum.

The curriculum of growing horizons is that of Chen et al. 2020 (arXiv 2010.09089). When it goes on is `meta_training`'s.
"""

import torch

from gradbuffer.checks import check_count
from gradbuffer.checkpoints import plain

__all__ = ["check_curriculum", "describe_horizons", "horizon_rule"]


def horizon_rule(horizons, windows):
    """A function of (iteration, generator) that gives the windows until functions are drawn anew."""
    if horizons is None:
        return lambda iteration, generator: windows
    if callable(horizons):
        return horizons
    if not (isinstance(horizons, (tuple, list)) and len(horizons) == 2):
        raise ValueError("horizons must be None, (least, most) or a function of (iteration, generator), got "
                         f"{horizons!r}")
    least, most = horizons
    check_count(**{"horizons[0]": least})
    check_count(least=least, **{"horizons[1]": most})
    return lambda iteration, generator: int(torch.randint(least, most + 1, (), generator=generator))


def check_curriculum(curriculum, steps, unroll, horizons):
    if curriculum is None:
        return
    if horizons is not None:
        raise ValueError(f"curriculum={curriculum!r} needs horizons=None, got horizons={horizons!r}")
    if not isinstance(curriculum, (tuple, list)) or not curriculum:
        raise ValueError(f"curriculum must be None or a tuple of horizons, such as (20, 50), got {curriculum!r}")
    check_count(**{f"curriculum[{k}]": horizon for k, horizon in enumerate(curriculum)})
    way = [*curriculum, steps]
    if any(horizon % unroll for horizon in way) or any(a >= b for a, b in zip(way, way[1:])):
        raise ValueError(f"curriculum must be increasing multiples of unroll={unroll} below steps={steps}, got "
                         f"{curriculum!r}")


def describe_horizons(horizons):
    return getattr(horizons, "__qualname__", type(horizons).__name__) if callable(horizons) else plain(horizons)
