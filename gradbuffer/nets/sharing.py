"""Learned optimizers whose coordinates tell each other something: global averaging cells, and a memory for all of them.

Andrychowicz et al. 2016 (arXiv 1606.04474), section 2.1 ("Information sharing between coordinates") and appendix:
`LSTMWithGAC` averages a part of its cells over all coordinates of a function; `NTMBFGS` has, in addition, an n × n
matrix for its n coordinates, as BFGS has its estimate of the inverse Hessian. `start_as_coordinatewise` lets either
begin as a trained coordinatewise LSTM.

Averages are over *one* function. A meta-batch of B functions is one vector of N = B × n coordinates, so these networks
must know which coordinate belongs to which function: `bind(coordinates)`, of an `unrolling.Coordinates`, gives the same
network for vectors that lie like that. `meta_gradient`, `meta_train` and `evaluate` call it. Unbound, a network takes
all coordinates that it is given to be one function's; so does `LearnedOptimizer` with all parameters of a group.

Their coordinates are not independent, so there is no replay in blocks here (`coordinatewise` is not set): in the
meta-gradient, the optimizer alone is left to autograd, which is exact too.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn

from gradbuffer.checks import check_count, check_finite
from gradbuffer.contracts import Rule
from gradbuffer.nests import tensors_in
from gradbuffer.nets.lstm import LSTMOptimizer
from gradbuffer.nets.readings import READINGS, check_preprocess, odd_part
from gradbuffer.unrolling import Coordinates

__all__ = ["LSTMWithGAC", "LowRankMemory", "NTMBFGS", "Unaveraged", "start_as_coordinatewise"]


class SharingLSTM(Rule, nn.Module):
    """What the optimizers below share: an LSTM with global averaging cells, and which coordinate is whose.

    Inside, coordinates stand function after function, each function's n next to each other (in the vector outside they
    stand tensor after tensor); features lie along rows. So an average over a function is one over a contiguous row.
    The weights are those of an `nn.LSTM` and an `nn.Linear`, under the names they have in `CoordinatewiseLSTM`.
    """

    arguments = ("hidden_size", "num_layers", "shared", "preprocess", "p", "output_scale", "odd")

    def __init__(self, brought, hidden_size, num_layers, shared, preprocess, p, output_scale, odd):
        check_count(hidden_size=hidden_size, num_layers=num_layers)
        check_count(least=0, shared=shared)
        if shared > hidden_size:
            raise ValueError(f"shared must be at most hidden_size={hidden_size}, got {shared}")
        check_preprocess(preprocess, p, output_scale)
        super().__init__()
        self.hidden_size, self.num_layers, self.shared = hidden_size, num_layers, shared
        self.preprocess, self.p, self.output_scale, self.odd = preprocess, p, output_scale, bool(odd)
        self.input_signs = (*READINGS[preprocess].signs, *[-1] * brought)  # `brought`: numbers read beside the gradient
        self.lstm = nn.LSTM(len(self.input_signs), hidden_size, num_layers)  # its weights; `_controller` runs it
        self.output = nn.Linear(hidden_size, 1)
        self.coordinates = None
        self._silence_averages()

    @torch.no_grad()
    def _silence_averages(self):
        """Let what averaged cells put out count nothing at first, for the layer, the one above and the output."""
        own = self.hidden_size - self.shared
        above = [layer[0] for layer in self.lstm.all_weights[1:]]
        for weight in (*above, *(layer[1] for layer in self.lstm.all_weights), self.output.weight):
            weight[:, own:] = 0

    def symmetrize(self, tensors):
        """See `CoordinatewiseLSTM.symmetrize`; here averaged cells are even, and the numbers of the heads are odd."""
        return odd_part(tensors, self.hidden_size, self.input_signs, self.shared)

    def bind(self, coordinates):
        """This optimizer for parameters that lie in the vector as `coordinates` says: the very same weights.

        Args:
            coordinates: `unrolling.Coordinates`.

        Returns:
            A network of the same class, with `init_state` and `forward` for just that many coordinates. Averages, and
            the memory, are each function's own.

        Raises:
            TypeError: `coordinates` is something else.
        """
        if not isinstance(coordinates, Coordinates):
            raise TypeError(f"coordinates must be unrolling.Coordinates, got {type(coordinates).__name__}")
        bound = copy.copy(self)  # the modules in it are the same ones
        bound.coordinates = coordinates
        return bound

    # How it is done ---------------------------------------------------------------------------------------------------

    def _functions(self, size):
        """How many functions a vector of that size holds."""
        if self.coordinates is None:
            return 1
        own = sum(self.coordinates.sizes)
        if size != own:
            raise ValueError(
                f"this {type(self).__name__} is bound to {own} coordinates, got {size}: bind it to these parameters"
            )
        return self.coordinates.functions

    def _zeros(self, num_coordinates, device, dtype):
        """The tensors of a state before the first step, a list."""
        check_count(num_coordinates=num_coordinates)
        self._functions(num_coordinates)
        like = self.output.weight
        place = dict(device=device or like.device, dtype=dtype or like.dtype)
        return [torch.zeros(shape, **place) for shape in self._shapes(num_coordinates)]

    def _check(self, grad, state):
        """How many functions it is, once all is found to fit."""
        if not isinstance(grad, torch.Tensor):
            raise TypeError(f"grad must be a tensor, got {type(grad).__name__}")
        if grad.dim() != 1 or not len(grad):
            raise ValueError(f"grad must have shape (N,) with N ≥ 1, got {tuple(grad.shape)}")
        weight, expected = self.output.weight, self._shapes(len(grad))
        shapes = [tuple(tensor.shape) for tensor in tensors_in(state)]
        if shapes != expected:
            raise ValueError(
                f"state must be init_state's, with tensors of shapes {expected} for {len(grad)} "
                f"coordinates, got {shapes}"
            )
        for name, tensor in (("grad", grad), ("state", tensors_in(state)[0])):
            if tensor.dtype != weight.dtype or tensor.device != weight.device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, the network {weight.dtype} on "
                    f"{weight.device}: move one of them"
                )
        check_finite(grad, "grad")
        return self._functions(len(grad))

    def _by_function(self, vector):
        """(N,), tensor after tensor -> (N,), function after function"""
        if self.coordinates is None or len(self.coordinates.sizes) == 1 or self.coordinates.functions == 1:
            return vector
        parts = vector.split(self.coordinates.sizes)
        return torch.cat([part.view(self.coordinates.functions, -1) for part in parts], 1).flatten()

    def _by_tensor(self, vector):
        """The opposite of `_by_function`."""
        if self.coordinates is None or len(self.coordinates.sizes) == 1 or self.coordinates.functions == 1:
            return vector
        functions = self.coordinates.functions
        parts = vector.view(functions, -1).split([size // functions for size in self.coordinates.sizes], 1)
        return torch.cat([part.flatten() for part in parts])

    def _read(self, grad):
        """(N,) -> (inputs, N)"""
        return READINGS[self.preprocess].of(grad, self.p)

    def _average(self, hidden, functions):
        """(H, N) -> (H, N): the last `shared` rows become their averages over each function."""
        if not self.shared:
            return hidden
        own, shared = hidden.split([self.hidden_size - self.shared, self.shared])
        shared = shared.view(self.shared, functions, -1)
        return torch.cat([own, shared.mean(-1, keepdim=True).expand_as(shared).flatten(1)])

    def _controller(self, features, hidden, cell, functions):
        """One step of the LSTM: features (inputs, N) -> the top layer's output (H, N), and hidden and cell after it."""
        hiddens, cells = [], []
        for (w, u, b, c), old, memory in zip(self.lstm.all_weights, hidden, cell):
            gates = torch.addmm((b + c)[:, None], torch.cat([w, u], 1), torch.cat([features, old]))
            i, f, g, o = gates.chunk(4)
            memory = torch.addcmul(f.sigmoid() * memory, i.sigmoid(), g.tanh())
            features = self._average(o.sigmoid() * memory.tanh(), functions)
            hiddens.append(features)
            cells.append(memory)
        return features, torch.stack(hiddens), torch.stack(cells)

    def _update(self, top):
        """(H, N), function after function -> the update (N,), tensor after tensor"""
        return self._by_tensor(self.output_scale * torch.addmm(self.output.bias[:, None], self.output.weight, top)[0])


class LSTMWithGAC(SharingLSTM):
    """LSTM+GAC: the coordinatewise LSTM with global averaging cells.

    In each layer the last `shared` cells are for communication. They work like the others, but what they put out,
    towards the next layer, the output and the next step, is the average of their hidden outputs over all coordinates of
    the function. This is enough to learn, for example, clipping of gradients by their norm. Ours: the weights that read
    these averages start at zero, so that training begins with a coordinatewise LSTM and adds what helps; with random
    ones it fell behind. Its state is (hidden, cell), each (num_layers, hidden_size, N), with the coordinates function
    after function.

    With `shared=0` this is `CoordinatewiseLSTM`, and weights of the one fit the other.

    Args:
        hidden_size: units in each layer, positive. Default 20.
        num_layers: LSTM layers, positive. Default 2.
        shared: cells of each layer that are averaged, from 0 to `hidden_size`. Default 5.
        preprocess: None feeds the gradient as it is; "log_sign" feeds `log_sign(grad, p)`; "with_log_size", ours, feeds
            the gradient as it is and beside it log|∇| / p as in "log_sign", whose average tells the gradient's scale.
        p: sizes down to e^-p keep their logarithm; in (0, 80].
        output_scale: factor on the output; not zero.
        odd: keep to networks that answer -∇ with exactly the opposite updates, coordinate by coordinate: as
            `CoordinatewiseLSTM`, and the cells that are averaged are even, so that changing the sign of *one*
            coordinate's gradients changes the sign of its updates and nothing else. Default False.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> net = LSTMWithGAC(shared=5)
        >>> theta, state = torch.zeros(3), net.init_state(3)
        >>> with torch.no_grad():
        ...     update, state = net(2 * theta - 1, state)  # unbound: the three are one function's
        >>> batch_of_two = net.bind(Coordinates({"theta": torch.zeros(2, 3)}))
        >>> batch_of_two.init_state(6)[0].shape
        torch.Size([2, 20, 6])

    Reference: Andrychowicz et al. 2016, section 2.1 ("Global averaging cells"); how many cells are shared is ours.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        shared: int = 5,
        preprocess: str | None = None,
        p: float = 10.0,
        output_scale: float = 1.0,
        odd: bool = False,
    ):
        super().__init__(0, hidden_size, num_layers, shared, preprocess, p, output_scale, odd)
        if odd:
            self.load_state_dict(self.symmetrize(self.state_dict()))

    def init_state(
        self, num_coordinates: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple:
        """The state before the first step: all zeros.

        Args:
            num_coordinates: N, positive: all coordinates, of a bound network just as many as it is bound to.
            device, dtype: default to the weights'.

        Returns:
            (hidden, cell), each (num_layers, hidden_size, N); no graph.
        """
        return tuple(self._zeros(num_coordinates, device, dtype))

    def forward(self, grad: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        """One step of the optimizer for all coordinates.

        Args:
            grad: (N,), the optimizee's gradient, in the weights' dtype and on their device.
            state: as `init_state` or the previous step returned it; not changed.

        Returns:
            update (N,), to be added to the parameters, and the next state. Both carry a graph back to the weights, to
            `grad` and to `state` as far as grad mode is on and these require grad.

        Raises:
            ValueError: shapes, dtypes or devices do not fit each other, or what the network is bound to.
            NonFiniteError: `grad` holds an infinity or a NaN.
        """
        functions = self._check(grad, state)
        top, *state = self._controller(self._read(self._by_function(grad)), *state, functions)
        return self._update(top), tuple(state)

    def _shapes(self, size):
        return [(self.num_layers, self.hidden_size, size)] * 2


class Unaveraged(LSTMWithGAC):
    """A control: the cells of LSTM+GAC without what they share, every coordinate being taken for a function of its own.

    Example:
        >>> net = Unaveraged(25, shared=5, preprocess="with_log_size", p=4.0)

    Reference: ours.
    """

    def bind(self, coordinates: Coordinates) -> "Unaveraged":
        return super().bind(Coordinates({"each": torch.zeros(sum(coordinates.sizes), 1)}))


class LowRankMemory(NamedTuple):
    """Matrices M = I + 1/n Σ_k a_k b_kᵀ, one n × n matrix for each of B functions, kept as their vectors a_k and b_k.

    So they take 2 B × K × n numbers and reading is two thin matrix products. A vector of zeros writes nothing.

    Example:
        >>> memory = LowRankMemory(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))  # M = I, room for four
        >>> memory = memory.write(torch.ones(1, 1, 3), torch.tensor([[[3.0, 0.0, 0.0]]]))
        >>> memory.read(torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[2., 3., 4.]]])
    """

    left: torch.Tensor  # (B, K, n), a_k; the newest last
    right: torch.Tensor  # (B, K, n), b_k

    def read(self, vectors: torch.Tensor) -> torch.Tensor:
        """M r for vectors r (B, R, n). Returns (B, R, n), with a graph if one of the tensors has one."""
        return torch.baddbmm(vectors, vectors @ self.right.mT, self.left, alpha=1 / vectors.shape[-1])

    def write(self, left: torch.Tensor, right: torch.Tensor) -> "LowRankMemory":
        """M + 1/n Σ_w a_w b_wᵀ, with a and b (B, W, n), W ≤ K; the W oldest pairs are dropped. Returns a new memory."""
        kept = slice(left.shape[1], None)
        return LowRankMemory(torch.cat([self.left[:, kept], left], 1), torch.cat([self.right[:, kept], right], 1))

    def matrix(self) -> torch.Tensor:
        """M as it is, (B, n, n)."""
        size = self.left.shape[-1]
        return torch.eye(size).to(self.left) + self.left.mT @ self.right / size


class NTMBFGS(SharingLSTM):
    """NTM-BFGS: LSTM+GAC with an external memory, an n × n matrix M that all n coordinates of a function share.

    M begins as the identity. In each step the controller, an LSTM with global averaging cells that every coordinate
    runs by itself, reads its gradient and what the read heads brought it in the step before, and puts out for its
    coordinate the update g, and one number for each vector of the heads: of all coordinates together those make up

    - for each read head r, and it brings i = M r, one number for each coordinate, to the next step;
    - for each write head a and b: after the reading, M ← M + a bᵀ / n.

    BFGS updates its inverse Hessian by two such products, H ← H + s wᵀ + u sᵀ with s the last step, y the difference of
    gradients, u = -Hy / sᵀy and w = u + (1 + yᵀHy / sᵀy) s / sᵀy: two write heads can do it, given Hy by a read head.

    What the paper leaves open, and what it is here: M is kept as the vectors of the products, and of those the last
    `rank`; older ones are forgotten, as in L-BFGS. Products are divided by n, so that a number read is r plus an
    average over coordinates and its scale does not depend on n. a and b are squashed by tanh: one write head adds to
    M, in a step, a matrix of norm 1 at most. r is not squashed. The heads are a linear layer on the top layer's
    output, `heads` (its rows in order: all r, all a, all b); the rows of a, and the weights that read what the read
    heads brought, start at zero, so that a new network is a coordinatewise LSTM and M the identity.

    Its state is (hidden, cell, readings, memory): readings (read_heads, N), memory a `LowRankMemory` of (B, rank, n).

    Args:
        hidden_size, num_layers, shared, preprocess, p, output_scale, odd: see `LSTMWithGAC`.
        read_heads: positive. Default 2.
        write_heads: positive. Default 2, as many as BFGS needs.
        rank: pairs of vectors that are kept, at least `write_heads`. Default 40: the last 20 steps. The memory takes
            2 × rank × N numbers.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> net = NTMBFGS(rank=10)
        >>> theta, state = torch.zeros(3), net.init_state(3)
        >>> with torch.no_grad():
        ...     update, state = net(2 * theta - 1, state)
        >>> state[3].matrix().shape
        torch.Size([1, 3, 3])

    Reference: Andrychowicz et al. 2016, section 2.1 ("NTM-BFGS optimizer") and appendix.
    """

    arguments = (*SharingLSTM.arguments, "read_heads", "write_heads", "rank")

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        shared: int = 5,
        preprocess: str | None = None,
        p: float = 10.0,
        output_scale: float = 1.0,
        odd: bool = False,
        read_heads: int = 2,
        write_heads: int = 2,
        rank: int = 40,
    ):
        check_count(read_heads=read_heads, write_heads=write_heads, rank=rank)
        if rank < write_heads:
            raise ValueError(f"rank must be at least write_heads={write_heads}, got {rank}")
        super().__init__(read_heads, hidden_size, num_layers, shared, preprocess, p, output_scale, odd)
        self.read_heads, self.write_heads, self.rank = read_heads, write_heads, rank
        self.heads = nn.Linear(hidden_size, read_heads + 2 * write_heads)
        with torch.no_grad():
            self.lstm.weight_ih_l0[:, -read_heads:] = 0
            self.heads.weight[:, hidden_size - shared :] = 0
            for tensor in (self.heads.weight, self.heads.bias):
                tensor[read_heads : read_heads + write_heads] = 0
        if odd:
            self.load_state_dict(self.symmetrize(self.state_dict()))

    def init_state(
        self, num_coordinates: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple:
        """The state before the first step: all zeros, which makes M the identity.

        Args:
            num_coordinates, device, dtype: see `LSTMWithGAC.init_state`.

        Returns:
            (hidden, cell, readings, memory); no graph.
        """
        hidden, cell, readings, left, right = self._zeros(num_coordinates, device, dtype)
        return hidden, cell, readings, LowRankMemory(left, right)

    def forward(self, grad: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        """One step of the optimizer for all coordinates.

        Args, returns and raises: see `LSTMWithGAC.forward`; the graph goes through the memory too.
        """
        functions = self._check(grad, state)
        hidden, cell, readings, memory = state
        features = torch.cat([self._read(self._by_function(grad)), readings])
        top, hidden, cell = self._controller(features, hidden, cell, functions)
        heads = torch.addmm(self.heads.bias[:, None], self.heads.weight, top).view(len(self.heads.bias), functions, -1)
        reads, writes = heads.split([self.read_heads, 2 * self.write_heads])  # (heads, B, n) each
        readings = memory.read(reads.transpose(0, 1)).transpose(0, 1).flatten(1)
        left, right = writes.tanh().transpose(0, 1).chunk(2, 1)
        return self._update(top), (hidden, cell, readings, memory.write(left, right))

    def _shapes(self, size):
        functions = self._functions(size)
        states, memory = (self.num_layers, self.hidden_size, size), (functions, self.rank, size // functions)
        return [states, states, (self.read_heads, size), memory, memory]


@torch.no_grad()
def start_as_coordinatewise(net: SharingLSTM, plain: LSTMOptimizer) -> SharingLSTM:
    """Write a trained coordinatewise LSTM into a network that shares: its answers are the same, until it is trained.

    The cells that are not averaged become `plain`'s. Nothing listens to those that are, nor to what read heads bring,
    and matrices M stay the identity: meta-training begins where `plain` has come to, and what it gains from there is
    what sharing is worth.

    For that the averages must be worth listening to; left small, as in a new network, they hardly are. So the averaged
    cells begin as gauges of the gradient's size: each puts out tanh(3 (r - r_k)) of its coordinate's reading
    r = log|∇| / p, with thresholds r_k spread over (-1, 1). Gates are open, forget gates closed, so that an average
    tells of the present step; higher layers pass it on, and their own cells can compare it with that of the last one.

    Args:
        net: a new `LSTMWithGAC` or `NTMBFGS` with as many layers, and `plain.hidden_size + net.shared` cells in each;
            changed in place. It must read "with_log_size" where `plain` reads the gradient as it is, else what `plain` reads
            with the same `p`, one reading of it even; have the same `output_scale`; and be odd only if `plain` is.
        plain: a `CoordinatewiseLSTM`; not changed.

    Returns:
        `net`.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> from optimizers import load_optimizer
        >>> plain = load_optimizer("quadratics_odd")  # of 20 cells
        >>> net = LSTMWithGAC(25, shared=5, preprocess="with_log_size", p=4.0, odd=True)
        >>> net = start_as_coordinatewise(net, plain)

    Reference: ours.
    """
    if not isinstance(net, SharingLSTM):
        raise TypeError(f"net must be a LSTMWithGAC or NTMBFGS, got {type(net).__name__}")
    if not isinstance(plain, LSTMOptimizer) or "preprocess" not in plain.arguments:
        raise TypeError(f"plain must be a CoordinatewiseLSTM, got {type(plain).__name__}")
    H, own, shared = net.hidden_size, plain.hidden_size, net.shared
    if (net.num_layers, H - shared) != (plain.num_layers, own):
        raise ValueError(
            f"net must have {plain.num_layers} layers of {own} cells, as plain, and shared ones beside "
            f"them, got {net.num_layers} of {H - shared} and {shared} shared"
        )
    reads = "with_log_size" if plain.preprocess is None else plain.preprocess
    if 1 not in READINGS[reads].signs:
        raise ValueError(
            f"net must read something that does not change sign with the gradient, {reads!r} has nothing such"
        )
    if net.preprocess != reads or plain.preprocess is not None and net.p != plain.p:
        raise ValueError(
            f"net must read {reads!r}{f' with p={plain.p}' if plain.preprocess is not None else ''}, got "
            f"{net.preprocess!r} with p={net.p}"
        )
    if net.output_scale != plain.output_scale or net.odd and not plain.odd:
        raise ValueError(
            f"net must have plain's output_scale={plain.output_scale} and be odd only if it is, got "
            f"output_scale={net.output_scale} and odd={net.odd}"
        )
    for weights, plain_weights in zip(net.lstm.all_weights, plain.lstm.all_weights):
        for weight, plain_weight in zip(weights, plain_weights):
            rows, plain_rows = weight.view(4, H, -1), plain_weight.view(4, own, -1)  # gate, cell, what it reads
            rows.zero_()
            rows[:, :own, : plain_rows.shape[2]] = plain_rows
        weights[2].view(4, H)[:, own:] = torch.tensor(GAUGE_BIASES).to(weights[2])[:, None]
    gauges = slice(2 * H + own, 3 * H)  # the candidates of averaged cells
    thresholds = (2 * torch.arange(shared) + 1) / max(shared, 1) - 1
    first, *above = net.lstm.all_weights
    first[0][gauges, READINGS[reads].signs.index(1)] = GAUGE_SLOPE
    first[2][gauges] = (-GAUGE_SLOPE * thresholds).to(first[2])
    for weight, *_ in above:
        weight[gauges, own:] = PASSED_ON * torch.eye(shared).to(weight)
    net.output.weight.zero_()
    net.output.weight[:, :own] = plain.output.weight
    net.output.bias.copy_(plain.output.bias)
    return net


GAUGE_BIASES = 2.0, -3.0, 0.0, 2.0  # input, forget, candidate, output: an average of this step, not of those before
GAUGE_SLOPE, PASSED_ON = 3.0, 2.0  # of a first candidate over its reading; from an average to the candidate above
