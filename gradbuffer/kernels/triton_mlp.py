"""Steps of all tensors of a group at once by the small learned optimizer (`MLPOptimizer`, variant "celo") on CUDA.

Programs find their tiles in tables: which tensor, which rows and columns of it. A step goes four times through the coordinates:
averages and sums of squares; sums that need the rows' and columns' averages; the network's output; the update. Small kernels between
them add up what the tiles have left. All tensors share each launch: one to look, 8 to step, and with Newton-Schulz, of all matrices
together, 17 more. Sums are deterministic: there are no atomics. The plain version is `gradbuffer.nets.mlp`. This module needs triton.
"""

import copy
import functools
import operator
from typing import NamedTuple

import torch
import triton

from gradbuffer.devices import bring
from gradbuffer.kernels.matrices import CONTEXT_UNITS, as_matrix, from_matrix, matrix_axes
from gradbuffer.kernels.triton_mlp_kernels import (
    DECAYS,
    FACTS,
    FEATURES,
    FORM,
    LINE,
    LINES,
    PARTS,
    SLOTS,
    factor_kernel,
    forward_kernel,
    gather_kernel,
    line_kernel,
    look_kernel,
    move_kernel,
    read_kernel,
    spread_kernel,
    total_kernel,
)
from gradbuffer.kernels.triton_orthogonal import Orthogonalizer, padded_sizes

__all__ = ["MLPSteps"]

TILE = dict(ROWS_BLOCK=8, WIDTH_BLOCK=128)
WARPS, FORWARD_WARPS = 4, 8  # of a tile; the network's output takes more registers
CHUNK, MANY = 64, 256  # sums that a program adds up at once, of a row or column and of a tensor
LOOK_BLOCK = 2048
MOST_UNITS, MOST_LAYERS = 16, 2  # of which a program holds all units in registers
SELF_CHECK = {torch.float32: 1e-3, torch.float64: 1e-8}  # relative errors that a device's first use may show
ROUNDED_CHECK = 0.02  # and where products of Newton-Schulz have factors rounded to float16
INTERPRETED = not isinstance(look_kernel, triton.JITFunction)


class MLPSteps:
    """Steps of a group's tensors for one set of them.

    Args:
        net: an `MLPOptimizer`, where the parameters are and in the dtype in which it computes.
        params: list of parameters. watched: the weights to look at, a list; kept: one vector of what they were, or None: they are
            not looked at.
    """

    @staticmethod
    def reasons_against(net, like: torch.Tensor) -> list[str]:
        """Why there are no such steps by this network for tensors like that one; empty where there are."""
        reasons = []
        if net.variant != "celo":
            reasons.append(f'the variant must be "celo", got {net.variant!r}')
        if net.vectors != "mlp":
            reasons.append(f'vectors must be moved by "mlp", got {net.vectors!r}')
        if len(net.hidden_sizes) > MOST_LAYERS or max(net.hidden_sizes) > MOST_UNITS:
            reasons.append(
                f"there must be at most {MOST_LAYERS} hidden layers of at most {MOST_UNITS} units, got {net.hidden_sizes}"
            )
        if INTERPRETED and like.is_cuda:
            reasons.append(f"interpreted, it runs on the CPU, the parameters are on {like.device}")
        if not INTERPRETED and not like.is_cuda:
            reasons.append(f"runs on CUDA (on the CPU with TRITON_INTERPRET=1), the parameters are on {like.device}")
        elif like.is_cuda and torch.cuda.get_device_capability(like.device) < (8, 0):
            reasons.append("needs a CUDA device of capability 8.0")
        if not reasons and like.is_cuda:
            reasons += failures(net, like.device, like.dtype)
        return reasons

    def __init__(self, net, params, watched, kept):
        like = params[0]
        self.net, self.params, self.kept, self.device = net, list(params), kept, like.device
        self.dtype = next(net.parameters()).dtype
        self.watched, self.factors = list(watched) if kept is not None else [], factors_of(net, self.dtype)
        self.flags = torch.zeros(2, dtype=torch.int32, device=self.device)
        sizes = [tensor.numel() for tensor in (*params, *self.watched)]
        self.look_blocks = blocks_of(tuple(sizes), self.device)
        self.offsets = [sum(sizes[len(params) : k]) for k in range(len(params), len(sizes))]
        shapes = tuple(param.shape for param in params)
        self.tables = tables_of(shapes, net.orthogonalize, self.dtype, self.factors, self.device)
        self.forms = [form_of(shape) for shape in shapes]
        self.weights = torch.cat([weight.detach().flatten() for weight in net.layers.values()])
        own = [weight for name, weight in net.layers.items() if not name.startswith("context")]
        self.context = self.weights[sum(weight.numel() for weight in own) :]
        self.brought = {}  # small vectors on the device, and what they were made of
        self.known, self.places, self.asked = None, None, None  # tensors that lie as the kernels read them, and where

    def holds(self, params, kept) -> bool:
        """Whether it is for these very tensors."""
        return self.kept is kept and same(params, self.params) and self.factors == factors_of(self.net, self.dtype)

    def knows(self, tensors) -> bool:
        """Whether these are the values, then the states' parts, of the last step, where they were, and nothing had to be copied."""
        if self.known is None or not same(tensors, self.known):
            return False
        return [tensor.data_ptr() for tensor in tensors] == self.places

    def bring(self, name, values, dtype):
        """Numbers as a vector on the device, anew only where they have changed."""
        if name not in self.brought or self.brought[name][0] != values:
            self.brought[name] = values, bring(torch.tensor(values, dtype=dtype, device="cpu"), self.device)
        return self.brought[name][1]

    def look(self, gradients) -> torch.Tensor:
        """One launch. gradients: list, in the dtype of the steps, each in one piece.

        Returns:
            flags (2,) on the device: a gradient is not finite; a weight has changed. They stay up until `lower`.
        """
        addresses = [tensor.data_ptr() for tensor in (*gradients, *self.watched)] + self.offsets
        pointers = self.bring("look", addresses, torch.int64)
        kept = self.weights if self.kept is None else self.kept
        with torch.cuda.device_of(self.weights):
            look_kernel[(len(self.look_blocks),)](
                pointers,
                self.look_blocks,
                self.flags,
                self.weights,
                kept,
                len(gradients),
                len(self.watched),
                BLOCK=LOOK_BLOCK,
            )
        return self.flags

    def lower(self) -> None:
        """Take the flags down."""
        self.flags.zero_()

    def step(self, values, gradients, states, lr, sign=1.0, keep=1.0) -> None:
        """One step: θ ← keep · θ, then what `MLPOptimizer.forward` of sign · ∇ adds; parameters and states are written over.

        Args:
            values, gradients: lists of tensors like the parameters, in the dtype of the steps.
            states: list of dicts of tensors like those of `MLPOptimizer.init_state`, without their leading axis.
            lr: the rate. sign: 1 or -1. keep: a factor on parameters, before the network reads them.
        """
        self.known, back, addresses = None, [], [[], [], [], [], [], []]
        for value, gradient, state, form in zip(values, gradients, states, self.forms):
            parts = gradient, value, state["m"], state["v"], state.get("rows"), state.get("columns")
            for place, (tensor, own) in enumerate(zip(parts, addresses)):
                if tensor is not None and not (form.plain and tensor.is_contiguous()):
                    laid = in_order(tensor, form.axes, place)
                    back.append((tensor, laid, form.axes, place))
                    tensor = laid
                own.append(0 if tensor is None else tensor.data_ptr())
        self.asked = addresses[1:]
        self.run(addresses[0], lr, sign, keep)
        for tensor, laid, axes, place in back:
            if place:  # the gradient stays
                put_back(laid, tensor, axes, place)
        if not back:
            self.known = [*values, *(leaf for state in states for leaf in state.values())]
            self.places = [tensor.data_ptr() for tensor in self.known]

    def step_again(self, gradients, lr, sign=1.0, keep=1.0) -> None:
        """`step` of tensors that it `knows`, with gradients each in one piece."""
        self.run([gradient.data_ptr() for gradient in gradients], lr, sign, keep)

    def run(self, addresses, lr, sign, keep):
        """addresses: of the gradients."""
        pointers = self.bring("step", sum(self.asked, addresses), torch.int64)
        numbers = self.bring("numbers", [sign, lr, keep, self.net.weight_decay, *DECAYS], self.dtype)
        with torch.cuda.device_of(self.weights):
            self.launch(pointers, numbers)

    def launch(self, pointers, numbers):
        tables, count, units = self.tables, len(self.params), self.net.hidden_sizes[0]
        new = functools.partial(torch.empty, dtype=self.dtype, device=self.device)
        tiles, lines, options = len(tables.tiles), len(tables.lines), dict(num_warps=WARPS, **TILE)
        sizes = tiles * PARTS, tables.sums, lines * SLOTS, count * (FEATURES + 1) * units, count * FACTS
        sizes = [-(-size // 16) * 16 for size in (*sizes, tiles, count, lines * (3 + units) * LINES)]
        parts, sums, slots, scaled, facts, squares, totals, added = torch.split_with_sizes(new(sum(sizes)), sizes)
        out = new(tables.out)
        given = pointers, tables.tiles, tables.forms, numbers
        later = self.weights[(FEATURES + 1) * units :]  # the layers after the first
        read_kernel[(tiles,)](*given, parts, sums, count, **options)
        if lines:
            line_kernel[(lines,)](pointers, tables.lines, numbers, sums, slots, count, BLOCK=LINES, CHUNK=CHUNK)
        factor_kernel[(tiles,)](*given, parts, slots, count, **options)
        gather_kernel[(count,)](
            tables.forms,
            numbers,
            parts,
            slots,
            self.weights,
            self.context,
            scaled,
            facts,
            UNITS=units,
            PADDED=triton.next_power_of_2(units + 1),
            CONTEXT=CONTEXT_UNITS if self.net.context else 0,
            CHUNK=MANY,
            num_warps=8,
        )
        if lines:
            spread = pointers, tables.lines, tables.forms, slots, scaled, added, self.weights, count
            spread_kernel[(lines,)](*spread, UNITS=units, BLOCK=LINES, num_warps=1)
        second = self.net.hidden_sizes[1] if len(self.net.hidden_sizes) > 1 else 0
        forward = added, scaled, later, out, squares, count
        forward_kernel[(tiles,)](
            *given, *forward, UNITS=units, SECOND=second, BLOCK=LINES, **{**options, "num_warps": FORWARD_WARPS}
        )
        total_kernel[(count,)](squares, tables.spans, totals, BLOCK=1024)
        if tables.orthogonalizer:
            squares = tables.orthogonalizer.run(out, totals)
            total_kernel[(len(tables.matrix_spans),)](squares, tables.matrix_spans, totals, BLOCK=1024)
        move_kernel[(tiles,)](*given, facts, totals, out, count, **options)


def same(tensors, others):
    """Whether two lists hold the very same tensors."""
    return len(tensors) == len(others) and all(map(operator.is_, tensors, others))


def factors_of(net, dtype):
    """The dtype to which factors of the products of Newton-Schulz are rounded."""
    return torch.float16 if net.rounds_products and dtype == torch.float32 else dtype


# Tables ---------------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A tensor as a matrix: its axes, whether it lies like one, and its sizes."""

    axes: tuple | None
    plain: bool
    rows: int
    width: int
    others: int
    size: int


@functools.lru_cache(maxsize=1024)
def form_of(shape):
    axes, size = matrix_axes(shape), shape.numel()
    if axes is None:
        return Form(None, True, -(-size // TILE["WIDTH_BLOCK"]), TILE["WIDTH_BLOCK"], 1, size)
    rows, columns = shape[axes[0]], shape[axes[1]]
    others = size // (rows * columns)
    return Form(axes, len(shape) != 3 or axes == (0, 1) or others == 1, rows, columns * others, others, size)


@functools.lru_cache(maxsize=32)
def blocks_of(sizes, device):
    """(blocks, 3) for tensors of these sizes: the tensor, the first coordinate, the size."""
    blocks = [(tensor, start, size) for tensor, size in enumerate(sizes) for start in range(0, size, LOOK_BLOCK)]
    return bring(torch.tensor(blocks, dtype=torch.int64, device="cpu"), device)


def in_order(tensor, axes, place):
    """A copy of one of a tensor's parts, in the order of `kernels.matrices.as_matrix`. place: its number in the table of pointers."""
    if place > 3:
        return tensor.contiguous()
    return as_matrix(tensor if place == 2 and axes else tensor[None], axes).contiguous()


def put_back(laid, tensor, axes, place):
    """Write a copy that `in_order` made over what it was made of."""
    if place > 3 or axes is None:
        tensor.copy_(laid.view(tensor.shape))
    else:
        lead = tensor.shape if place == 2 else (1, *tensor.shape)
        tensor.copy_(from_matrix(laid.reshape(lead[0], -1), lead, axes).view(tensor.shape))


class Tables(NamedTuple):
    """What the kernels look up for tensors of some shapes."""

    tiles: torch.Tensor  # (tiles, 3): tensor, first row, first column
    forms: torch.Tensor
    lines: torch.Tensor
    spans: torch.Tensor  # of each tensor (tensor, first tile, tiles)
    sums: int  # numbers that the tiles' rows and columns leave
    out: int  # numbers of all places for outputs
    orthogonalizer: Orthogonalizer | None
    matrix_spans: torch.Tensor  # of the tiles of the orthogonalizer


@functools.lru_cache(maxsize=32)
def tables_of(shapes, orthogonalize, dtype, factors, device):
    height, breadth = TILE["ROWS_BLOCK"], TILE["WIDTH_BLOCK"]
    tiles, forms, lines, spans, places, sums, out, first = [], [], [], [], [], 0, 0, 0
    for tensor, shape in enumerate(shapes):
        axes, _, rows, width, others, size = form_of(shape)
        own, room = (
            dict(size=size, rows=rows, width=width, others=others, is_matrix=int(axes is not None)),
            (rows, width),
        )
        own |= dict(out=out, out_row=width, out_column=1)
        if orthogonalize and axes:
            short, long = padded_sizes(rows, width)
            places.append((tensor, short, long, out))
            room = (short, long) if rows <= width else (long, short)
            own |= dict(out_row=long, out_column=1) if rows <= width else dict(out_row=1, out_column=long)
        out += -(-room[0] * room[1] // 64) * 64
        down, across = -(-room[0] // height), -(-room[1] // breadth)
        places_of_tiles = torch.cartesian_prod(torch.arange(down) * height, torch.arange(across) * breadth)
        tiles.append(torch.cat([torch.full((len(places_of_tiles), 1), tensor), places_of_tiles], 1))
        own |= dict(out_rows=room[0], out_width=room[1], row_sums=sums, first_tile=first, tiles=down * across)
        first += down * across
        spans.append((tensor, own["first_tile"], own["tiles"]))
        own |= dict.fromkeys(("column_sums", "row_lines", "row_blocks", "column_lines", "column_blocks"), 0)
        if axes:
            own["column_sums"] = sums + rows * across
            sums = own["column_sums"] + width * down
            columns = width // others
            for name, line in (
                ("row", (4, own["row_sums"], rows, across, 1, rows, width)),
                ("column", (5, own["column_sums"], columns, down * others, others, width, rows * others)),
            ):
                starts = range(0, line[2], LINES)
                own |= {f"{name}_lines": len(lines), f"{name}_blocks": len(starts)}
                lines += [(tensor, *line, start) for start in starts]
        forms.append([own[name] for name in FORM])
    long = dict(dtype=torch.int64, device="cpu")
    orthogonalizer = Orthogonalizer(places, dtype, factors, device) if places else None
    return Tables(
        bring(torch.cat(tiles).to(torch.int32), device),
        bring(torch.tensor(forms, **long), device),
        bring(torch.tensor(lines, **long).reshape(len(lines), len(LINE)), device),
        bring(torch.tensor(spans, **long), device),
        sums,
        out,
        orthogonalizer,
        bring(torch.tensor(orthogonalizer.spans if places else [], **long), device),
    )


CHECKED = {}  # what was checked -> reasons against it


def failures(net, device, dtype):
    """Reasons against steps by a network like that one that a device gives at its first use, looked for once."""
    key = tuple(net.hidden_sizes), net.orthogonalize, net.context, factors_of(net, dtype), device, dtype
    if key not in CHECKED:
        CHECKED[key] = check(net, device, dtype)
    return CHECKED[key]


def check(net, device, dtype):
    """The kernels are compiled, run on a few tensors with random weights, and are compared with torch in float64."""
    generator, net = torch.Generator().manual_seed(0), copy.deepcopy(net).to(device, dtype)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)

    try:
        with torch.inference_mode(False), torch.no_grad():
            for weight in net.parameters():
                weight.copy_(draw(*weight.shape) / len(weight) ** 0.5)
            params = {str(k): draw(1, *shape) for k, shape in enumerate(((40, 3), (3, 20, 2, 2), (150,), ()))}
            grads = {name: draw(*param.shape) for name, param in params.items()}
            values = [param[0].clone() for param in params.values()]
            own = [{name: leaf[0] for name, leaf in part.items()} for part in net.init_state(params).values()]
            MLPSteps(net, values, [], None).step(values, [grad[0] for grad in grads.values()], own, 0.01)
            net, params, grads = net.double(), *({k: x.double() for k, x in part.items()} for part in (params, grads))
            updates, after = net(grads, net.init_state(params), params=params, lr=0.01)
            pairs = [(value - params[name][0], updates[name][0]) for value, name in zip(values, params)]
            pairs += [(leaf, after[name][key][0]) for part, name in zip(own, params) for key, leaf in part.items()]
            error = max(((found - wanted).norm() / wanted.norm()).item() for found, wanted in pairs)
    except Exception as error:  # whatever a compiler, a driver or a launcher raises
        return (
            f"its self-check on {device} failed: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}",
        )
    limit = ROUNDED_CHECK if factors_of(net, dtype) != dtype and net.orthogonalize else SELF_CHECK[dtype]
    if not error <= limit:
        return (f"its self-check on {device} failed: a step is off by {error:.1e}, more than {limit:.0e}",)
    return ()
