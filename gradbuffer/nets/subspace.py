"""A learned optimizer that moves in the span of the last gradients and moves: an LSTM for every tensor writes the coefficients.

What a coordinate cannot see decides how fast a smooth function is minimized: how long a gradient is against the last one
(Fletcher and Reeves 1964), how far a move has changed the gradient (Barzilai and Borwein 1988), where a quadratic function has its
minimum along the moves so far (as in Nocedal 1980). Here a network reads these numbers and weighs these vectors. It is for
gradients without noise: a minibatch's noise enters the differences of gradients.
"""

import math

import torch
from torch import nn

from gradbuffer.checks import check_count, check_positive_number
from gradbuffer.contracts import Rule

__all__ = ["SubspaceLSTM"]

READINGS, VECTORS = 8, 5
BOUND = 3.0  # of every reading
RECOVERY = 1.02  # by which the rate may grow in a step
LARGEST_GROWTH = 3.0  # of a move against the last one: with 10 one function in some thousands jumps far away
FIRST_WEIGHTS = 0.01  # standard deviation of the output's weights: at first it is gradient descent at the rate ρ


class SubspaceLSTM(Rule, nn.Module):
    """A learned optimizer that moves every tensor within the span of its last gradients and moves.

    With the last move d, the change y of the gradient along it, the last `pairs` of these as columns of D and Y, and
    γ = -(DᵀY)⁻¹ Dᵀ∇, so that θ + Dγ is the minimum among θ + span(D) and ∇ + Yγ the gradient there if the function is quadratic,

        update = -eᵃ ρ ∇ + b d + c ρ y + e Dγ + f ρ Yγ,

    at most three times as long as the larger of d and ρ∇. ρ is a rate that follows the function: the smallest ⟨d, y⟩ / ⟨y, y⟩ so far,
    growing by 2 % a step. An LSTM writes a (kept within -4 … 3), b, c, e and f. It reads, for each tensor as a whole,
    logarithms of the ratios of ‖∇‖ to the last one, of ⟨d, y⟩ / ⟨y, y⟩ to ρ, of ‖d‖ and ‖Dγ‖ to ρ‖∇‖ and of ‖∇ + Yγ‖
    to ‖∇‖, and the cosines between ∇, d and y. All of it stays the same if the loss or θ are measured in another
    unit, the first step apart, which is -eᵃ first_rate ∇.

    A move along which the gradient has not grown (⟨d, y⟩ ≤ 0) has no part in γ, and one of length 0 is not kept.

    Args:
        hidden_size: units of the LSTM, positive.
        pairs: moves that are remembered, positive. The state holds 2 · pairs + 2 numbers for each coordinate.
        first_rate: of the first step, above 0, in units of θ² per loss; learned from there.

    Raises:
        TypeError, ValueError: an argument is not as said.

    Example:
        >>> net = SubspaceLSTM()
        >>> params = {"theta": torch.randn(4, 10)}  # of four functions at once, here |θ|²
        >>> state = net.init_state(params)
        >>> for _ in range(5):
        ...     updates, state = net({"theta": 2 * params["theta"]}, state, params=params)
        ...     params = {"theta": params["theta"] + updates["theta"]}

    Reference: ours.
    """

    tensorwise = True
    reads = frozenset({"params"})
    arguments = ("hidden_size", "pairs", "first_rate")

    def __init__(self, hidden_size: int = 20, pairs: int = 5, first_rate: float = 0.01):
        super().__init__()
        check_count(hidden_size=hidden_size, pairs=pairs)
        check_positive_number(first_rate=first_rate)
        self.hidden_size, self.pairs, self.first_rate = hidden_size, pairs, float(first_rate)
        self.lstm = nn.LSTMCell(READINGS, hidden_size)
        self.output = nn.Linear(hidden_size, VECTORS)
        nn.init.normal_(self.output.weight, std=FIRST_WEIGHTS)
        nn.init.zeros_(self.output.bias)
        self.log_rate = nn.Parameter(torch.tensor(math.log(first_rate)))
        self.log_ridge = nn.Parameter(torch.tensor(math.log(1e-4)))  # relative to the diagonal of DᵀY

    def init_state(self, params: dict) -> dict:
        """The state before the first step: zeros, in the parameters' dtype and on their device.

        Args:
            params: dict from name to tensor (B, *shape), the parameters of B functions.

        Returns:
            dict from name to that tensor's state, a dict of tensors: "param" and "grad" (B, *shape), those of the last step;
            "moves" (B, pairs, *shape), of length 1, and "changes", the changes of the gradient along them, the newest first;
            "rate" (B,), ρ, 0 before the first pair; "steps" (B,); "hidden" and "cell" (B, hidden_size). No graph.
        """
        return {name: self._zeros(value) for name, value in params.items()}

    def _zeros(self, param):
        functions, *shape = param.shape
        units, pairs = (functions, self.hidden_size), (functions, self.pairs, *shape)
        shapes = {"param": param.shape, "grad": param.shape, "moves": pairs, "changes": pairs}
        shapes |= {"rate": (functions,), "steps": (functions,), "hidden": units, "cell": units}
        return {name: torch.zeros(size, dtype=param.dtype, device=param.device) for name, size in shapes.items()}

    def forward(self, grads: dict, state: dict, *, params: dict) -> tuple[dict, dict]:
        """One step of B functions.

        Args:
            grads: dict from name to gradient (B, *shape).
            state: as `init_state` or the previous step returned it; not changed.
            params: dict from name to parameter (B, *shape).

        Returns:
            updates, a dict like params, to be added to them, and the next state. Both carry a graph to whatever requires grad.

        Raises:
            ValueError: names or shapes do not fit each other.
        """
        for name, given in (("grads", grads), ("state", state)):
            if set(given) != set(params):
                raise ValueError(f"{name} must have the names of params, {sorted(params)}, got {sorted(given)}")
        updates, after = {}, {}
        for name, param in params.items():
            if grads[name].shape != param.shape:
                raise ValueError(
                    f"grads[{name!r}] must have its parameter's shape {tuple(param.shape)}, got {tuple(grads[name].shape)}"
                )
            updates[name], after[name] = self._advance(grads[name], param, state[name])
        return updates, after

    def _advance(self, grad, param, state):
        """One tensor's update and next state. Within, vectors are (B, n), pairs (B, pairs, n) and scalars (B, 1)."""
        functions, shape = len(param), param.shape
        g, theta, last_g, last_theta = (x.reshape(functions, -1) for x in (grad, param, state["grad"], state["param"]))
        moves, changes = (state[name].reshape(functions, self.pairs, -1) for name in ("moves", "changes"))
        rate, steps = state["rate"][:, None], state["steps"][:, None]
        begun = steps > 0
        d, y = ((now - last) * begun for now, last in ((theta, last_theta), (g, last_g)))
        of_d, of_y, of_g = norm(d), norm(y), norm(g)

        kept = of_d > 0
        moves, changes = (
            torch.where(kept[..., None], torch.cat([(x / above_zero(of_d))[:, None], old[:, :-1]], 1), old)
            for x, old in ((d, moves), (y, changes))
        )
        step, difference = minimizer(moves, changes, g, self.log_ridge.exp())  # Dγ and Yγ

        along = cosine(d, y)
        secant = torch.where(along > 0, along, 1.0) * of_d / above_zero(of_y)  # ⟨d, y⟩ / ⟨y, y⟩
        measured = kept & (of_y > 0)
        rate = torch.where(measured, torch.where(rate > 0, torch.minimum(secant, RECOVERY * rate), secant), rate)
        used = torch.where(rate > 0, rate, self.log_rate.exp())  # ρ

        readings = [
            log_ratio(of_g, norm(last_g)) / 2 * begun,
            log_ratio(secant, used) / 2 * measured,
            log_ratio(of_d, used * of_g) / 2 * kept,
            log_ratio(norm(step), used * of_g) / 2 * kept,
            log_ratio(norm(g + difference), of_g) / 2 * kept,
            cosine(g, d),
            cosine(g, y),
            along,
        ]
        hidden, cell = self.lstm(torch.cat(readings, 1).clamp(-BOUND, BOUND), (state["hidden"], state["cell"]))
        a, b, c, e, f = self.output(hidden).split(1, 1)
        update = b * d + e * step + used * (c * y + f * difference - a.clamp(-4, BOUND).exp() * g)
        limit = LARGEST_GROWTH * torch.maximum(of_d, used * of_g)
        update = update * (limit / above_zero(norm(update))).clamp(max=1)
        after = {
            "param": param.clone(),  # a caller may move θ in place
            "grad": grad,
            "moves": moves.reshape(state["moves"].shape),
            "changes": changes.reshape(state["changes"].shape),
            "rate": rate[:, 0],
            "steps": state["steps"] + 1,
            "hidden": hidden,
            "cell": cell,
        }
        return update.reshape(shape), after


def minimizer(moves, changes, gradient, ridge):
    """Dγ and Yγ (B, n) for rows of D and Y (B, pairs, n): where a quadratic function has its minimum, and what ∇ changes by."""
    products = moves @ changes.mT
    products = (products + products.mT) / 2
    curvatures = products.diagonal(dim1=1, dim2=2)
    scale = torch.where(curvatures > 0, above_zero(curvatures).rsqrt(), 0.0)  # 0: left out
    products = scale[:, :, None] * products * scale[:, None] + ridge * torch.eye(
        moves.shape[1], dtype=moves.dtype, device=moves.device
    )
    slopes = scale * (moves @ gradient[..., None])[..., 0]
    weights = -scale * torch.linalg.solve_ex(products, slopes[..., None])[0][..., 0]  # `solve` would wait for a GPU
    return (weights[:, None] @ moves)[:, 0], (weights[:, None] @ changes)[:, 0]


def norm(vectors):
    """(B, n) -> (B, 1), with derivative 0 at 0."""
    return torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def above_zero(numbers):
    """What may stand below a fraction."""
    return numbers.clamp_min(torch.finfo(numbers.dtype).tiny ** 0.5)


def cosine(one, other):
    """(B, 1), 0 where a vector is."""
    return (one / above_zero(norm(one)) * (other / above_zero(norm(other)))).sum(1, keepdim=True)


def log_ratio(above, below):
    """log(above / below), finite where either is 0."""
    return above_zero(above).log() - above_zero(below).log()
