"""The kernels of the coordinatewise LSTM on CUDA: a step and a replay as one Triton kernel each.

The optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1), where the torch operations of `torch_blocks`
would be many launches a layer. The kernels stand in `triton_kernels`; here weights are laid out for them and their
gradients brought back. Triton comes along with CUDA builds of torch; this module imports without it, and without CUDA.
With TRITON_INTERPRET=1 in the environment before the first import of triton, the same kernels run on CPU tensors,
slowly.

Sums are deterministic (no atomics) but depend on the number of programs, so on the device.
"""

import functools
import math
import os
import shutil
import sysconfig

import torch

from gradbuffer.devices import memory_of
from gradbuffer.kernels.interface import LSTMKernels
from gradbuffer.kernels.torch_blocks import TorchLSTM
from gradbuffer.kernels.triton_checks import distance, drawn, error_of_averages, log_sign, random_lstm, replayed
from gradbuffer.kernels.triton_weights import PaddedWeights, in_rows

try:
    from gradbuffer.kernels import triton_kernels as kernels
    from gradbuffer.kernels.triton_group import GroupSteps
    from gradbuffer.kernels.triton_reader import AveragesReader
    from gradbuffer.kernels.triton_replay import replay_kernel, weight_kernel
except ImportError:  # no triton
    kernels = None

__all__ = ["PRECISIONS", "TritonLSTM"]

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
STEP_BLOCK = 64  # coordinates of a program of the step
STEP_REGISTERS = (
    128  # of a thread of the step in float32, from capability 9.0 on: four programs side by side on a processor
)
REPLAY_BLOCK = {
    torch.float32: 64,
    torch.float64: 16,
}  # and of the replay, where there are more than 16 for each processor
FEW = 16  # coordinates of a program of the replay elsewhere: a step of its takes less time
WEIGHT_BLOCK = {torch.float32: 64, torch.float64: 16}  # and of the products that the weights' gradients are
REPLAY_MEMORY = 8  # the part of a card's memory that a replay takes at most, unless one block takes more
PROGRAMS_PER_PROCESSOR = 2  # of those products
CHUNK = 1 << 24  # coordinates whose features are made at once
SELF_CHECK = {
    torch.float32: 1e-3,
    torch.float64: 1e-8,
}  # relative errors that a device's first use of a kernel may show
ROUNDED_CHECK = 2e-2  # and where products are rounded to TF32
MOST_HIDDEN = 32  # units whose tiles fit the shared memory of most such devices; the self-check tells


@functools.cache
def missing_to_compile():
    """What triton compiles its launchers with and does not find, in words; None if it finds all."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "needs a C compiler, for its launchers"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "needs Python.h, for its launchers: it comes with python3-dev"
    return None


class TritonLSTM(LSTMKernels):
    """The kernels in Triton, of float32 and float64 and at most 32 hidden units.

    Args:
        precision: of the products: "ieee", "tf32x3" (three products on tensor cores, nearly as exact), "tf32", or
            "bf16", which rounds the factors to bfloat16. Sums and states keep their dtype. Default None is, for float32 on NVIDIA's
            devices, what cuDNN's LSTM does: "tf32" where `torch.backends.cudnn.allow_tf32`, torch's default, else "tf32x3"; "ieee"
            otherwise.

    Raises:
        RuntimeError: there is no triton, or the kernels cannot run where the weights lie.
        ValueError: `precision` is none of these, or not "ieee" for float64.
    """

    reads_log_sign = frozenset({"step", "replay"})

    @classmethod
    def reasons_against(cls, weight, work, *, state=None, squash=False, inputs=False, lstm=None, p=0.0):
        reasons = super().reasons_against(weight, work, state=state)
        if kernels is None:
            return [*reasons, "needs triton: it comes with CUDA builds of torch, or by `pip install triton` on Linux"]
        if weight.dtype not in (torch.float32, torch.float64):
            reasons.append(f"the weights must be of torch.float32 or torch.float64, got {weight.dtype}")
        if weight.shape[-1] > MOST_HIDDEN:
            reasons.append(f"the LSTM must have at most {MOST_HIDDEN} units, got {weight.shape[-1]}")
        if kernels.INTERPRETED and weight.device.type != "cpu":
            reasons.append(f"interpreted, it runs on the CPU, the network is on {weight.device}")
        if not kernels.INTERPRETED:
            if not weight.is_cuda:
                reasons.append(f"runs on CUDA (on the CPU with TRITON_INTERPRET=1), the network is on {weight.device}")
            elif torch.cuda.get_device_capability(weight.device) < (8, 0):
                reasons.append("needs a CUDA device of capability 8.0")
            elif missing_to_compile():
                reasons.append(missing_to_compile())
        if not reasons and lstm is not None and weight.is_cuda:
            sizes = lstm.input_size, lstm.hidden_size, lstm.num_layers
            reasons += failures(
                work,
                *sizes,
                weight.device,
                weight.dtype,
                p if work != "step_back" and lstm.input_size == 2 and not inputs else 0.0,
                work != "step" and squash,
                work == "replay" and inputs,
            )
        return reasons

    def __init__(self, lstm, output_weight, output_bias, precision=None):
        super().__init__(lstm, output_weight, output_bias)
        reasons = self.reasons_against(output_weight, "step")
        if reasons:
            raise RuntimeError("; ".join(reasons))
        check_precision(output_weight, precision)
        self.precision = precision
        self.padded = PaddedWeights(lstm, output_weight, output_bias)

    @property
    def options(self):
        """Of every kernel's launch."""
        precision = check_precision(self.output_weight, self.precision)  # torch's choice of TF32 may change
        ptx = not (kernels.INTERPRETED or torch.version.hip)
        return dict(PRECISION=precision, PTX=ptx, num_warps=4, num_stages=1)

    @property
    def step_options(self):
        options, weight = self.options, self.output_weight
        bound = (
            options["PTX"] and weight.dtype == torch.float32 and torch.cuda.get_device_capability(weight.device)[0] >= 9
        )
        return options | ({"maxnreg": STEP_REGISTERS} if bound else {})

    def step(self, features, hidden, cells, inplace=False, p=0.0):
        """As of `LSTMKernels`, in one launch. With `p` on gradients without NaN."""
        before = hidden, cells
        new = (
            before
            if inplace
            else tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in before)
        )
        return self.step_into(features, before, new, p), *new

    def step_into(self, features, before, new, p):
        """One step from a state (hidden, cells) to another, which may be the same. Returns the outputs."""
        if p and self.inputs != 2:
            raise ValueError(f"log_sign with p={p!r} makes two features, the network reads {self.inputs}")
        N, padded = before[0].shape[-1], self.padded
        outputs, target = self.output_bias.new_empty(N), new
        if not in_rows(before):
            before = tuple(part.contiguous() for part in before)
        if not in_rows(new):
            target = tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in new)
        with torch.cuda.device_of(outputs):
            for start in range(0, N, CHUNK):
                part = features(start, min(start + CHUNK, N)).contiguous()
                width = part.shape[-1]
                kernels.step_kernel[(-(-width // STEP_BLOCK),)](
                    part,
                    *before,
                    *target,
                    padded.weights,
                    padded.output,
                    outputs,
                    start,
                    width,
                    before[0].stride(1),
                    target[0].stride(1),
                    LOG_SIGN=float(p),
                    SHARPEST=math.exp(p),
                    **padded.sizes,
                    BLOCK=STEP_BLOCK,
                    **self.step_options,
                )
        if target is not new:
            for old, part in zip(new, target):
                old.copy_(part)
        return outputs

    def stepper(self, hidden, cells, new=None, p=0.0, tape=None):
        before, after = (hidden, cells), new or (hidden, cells)

        def step(features):
            nonlocal before
            outputs = self.step_into(features, before, after, p)
            before = after
            return outputs

        return step

    def takes_groups(self, p):
        weight = self.output_weight
        return kernels.INTERPRETED or not failures(
            "group", self.inputs, self.hidden, self.layers, weight.device, weight.dtype, float(p)
        )

    def group_steps(self, p, params, states, watched, kept, reader=None):
        return GroupSteps(self, p, params, states, watched, kept, reader)

    def reasons_against_reader(self, net, work):
        return () if kernels.INTERPRETED else failures_of_averages(self, net, work)

    def reader(self, net, work):
        return None if self.reasons_against_reader(net, work) else AveragesReader(self, net.averages)

    @property
    def most_programs(self):
        """Of a kernel that sums products up, at most."""
        return PROGRAMS_PER_PROCESSOR * processors(self.output_weight.device)

    def replay(self, features, hidden, cells, adjoint, squash=False, pull_inputs=None, p=0.0, tape=None):
        """As of `LSTMKernels`, in three launches for as many coordinates as an eighth of the card's memory holds the states and
        derivatives of all steps of, and a few sums."""
        adjoint = adjoint if adjoint.stride(1) == 1 else adjoint.contiguous()
        state, chunks = (hidden.contiguous(), cells.contiguous()), self.chunks(*adjoint.shape)
        sums = self.room_for_sums(chunks, len(adjoint))
        for number, (start, stop) in enumerate(chunks):
            part = features(start, stop)
            part = part if p and part.stride(-1) == 1 else part.contiguous()
            pull, dfeatures = adjoint[:, start:stop], torch.empty_like(part) if pull_inputs else None
            self.pull_back(number, part, state, pull, start, None, squash, dfeatures, sums, p)
            if pull_inputs:
                pull_inputs(start, stop, dfeatures)
        return self.gradients(sums)

    def step_back(self, features, hidden, cells, adjoint, dhidden, dcells, squash=False):
        adjoint, ends = adjoint.contiguous(), (dhidden, dcells)
        state, chunks = (hidden.contiguous(), cells.contiguous()), self.chunks(1, len(adjoint))
        sums, inner = self.room_for_sums(chunks, 1), tuple(part.contiguous() for part in ends)
        dfeatures = torch.empty_like(features)
        for number, (start, stop) in enumerate(chunks):
            part, pull = features[None, :, start:stop].contiguous(), adjoint[None, start:stop]
            own = torch.empty_like(part)
            self.pull_back(number, part, state, pull, start, inner, squash, own, sums, 0.0)
            dfeatures[:, start:stop] = own[0]
        for old, new in zip(ends, inner):
            if old is not new:
                old.copy_(new)
        return dfeatures, *self.gradients(sums)

    def chunks(self, T, N):
        """[(start, stop), ...] of coordinates that are replayed at once."""
        weight, H, layers = self.output_weight, self.hidden, self.layers
        numbers = T * (layers * 7 * H + 2 * self.inputs + 1) + 2 * layers * H  # of one coordinate
        block = self.replay_block_of(N)
        most = memory_of(weight.device) // REPLAY_MEMORY // (numbers * weight.element_size())
        size = max(min(most, CHUNK) // block, 1) * block
        return [(start, min(start + size, N)) for start in range(0, N, size)]

    def replay_block_of(self, N):
        """Coordinates of a program of the replay of so many."""
        weight = self.output_weight
        return FEW if N <= FEW * processors(weight.device) else REPLAY_BLOCK[weight.dtype]

    def room_for_sums(self, chunks, T):
        """What each program of `pull_back` adds up: for each layer (chunks, programs, gates, rows), for the output (blocks, H + 1)."""
        sizes, weight, (_, width) = self.padded.sizes, self.output_weight, chunks[0]
        block = self.replay_block_of(chunks[-1][1])
        blocks = sum(-(-(stop - start) // block) for start, stop in chunks)
        programs = min(self.most_programs, T * -(-width // WEIGHT_BLOCK[weight.dtype]))
        rows, units = max(1 << (4 * self.hidden - 1).bit_length(), 16), sizes["UNITS"]
        return [
            weight.new_empty(len(chunks), programs, rows, sizes["BELOW" if layer else "FIRST"] + units)
            for layer in range(self.layers)
        ], weight.new_empty(blocks, units + 1)

    def pull_back(self, number, features, state, adjoint, start, ends, squash, dfeatures, sums, p):
        """One chunk: sums of the derivatives by the weights, of features (T, inputs, width), with `p` gradients (T, 1, width), and adjoint
        (T, width), along whose rows numbers are contiguous. They belong to the coordinates from `start` on of the contiguous state
        (hidden, cells) and of ends, the derivatives by the state after the last step, which become those by `state`; None for zeros.
        The derivatives by the features go to `dfeatures`, if it is not None."""
        (T, width), padded, layers, H = adjoint.shape, self.padded, self.layers, self.hidden
        new, block = adjoint.new_empty, self.replay_block_of(state[0].shape[-1])
        hs, cs = new(layers, T + 1, H, width), new(layers, T + 1, H, width)
        dgates, handed = new(layers, T, 4 * H, width), new(max(layers - 1, 1), T, H, width)
        with torch.cuda.device_of(adjoint):
            replay_kernel[(-(-width // block),)](
                features,
                *state,
                adjoint,
                padded.weights,
                padded.output,
                hs,
                cs,
                handed,
                dgates,
                features if dfeatures is None else dfeatures,
                *(ends or state),
                sums[1][start // block :],
                start,
                width,
                features.stride(0) if p else width,
                adjoint.stride(0),
                state[0].shape[-1],
                T,
                **padded.sizes,
                BLOCK=block,
                SQUASH=squash,
                PULL_INPUTS=dfeatures is not None,
                ENDS=ends is not None,
                LOG_SIGN=float(p),
                SHARPEST=math.exp(p),
                **self.options,
            )
            for layer, own in enumerate(sums[0]):
                weight_kernel[own.shape[1:2]](
                    hs[layer - 1, 1:] if layer else features,
                    hs[layer],
                    dgates[layer],
                    own[number],
                    width,
                    features.stride(0) if p and not layer else width,
                    T,
                    COUNT=H if layer else self.inputs,
                    H=H,
                    GATES=own.shape[2],
                    ROWS=padded.sizes["BELOW" if layer else "FIRST"],
                    UNITS=padded.sizes["UNITS"],
                    BLOCK=WEIGHT_BLOCK[adjoint.dtype],
                    LOG_SIGN=0.0 if layer else float(p),
                    SHARPEST=math.exp(0.0 if layer else p),
                    **self.options,
                )

    def gradients(self, sums):
        """As of `LSTMKernels.replay`, from the sums of all programs."""
        H, sizes, layers = self.hidden, self.padded.sizes, []
        for layer, own in enumerate(sums[0]):
            total, count, below = (
                own.sum((0, 1))[: 4 * H],
                H if layer else self.inputs,
                sizes["BELOW" if layer else "FIRST"],
            )
            layers.append([total[:, :count], total[:, below : below + H], total[:, count]])
        outputs = sums[1].sum(0)
        return layers, outputs[:H], outputs[-1]


def check_precision(weight, precision):
    """The precision of the products, if it is one for such weights."""
    if precision is None and weight.is_cuda and weight.dtype == torch.float32 and not torch.version.hip:
        precision = "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"
    elif precision is None:
        precision = "ieee"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be None or one of {PRECISIONS}, got {precision!r}")
    if precision != "ieee" and weight.dtype != torch.float32:
        raise ValueError(f'precision must be "ieee" for {weight.dtype}, got {precision!r}')
    return precision


def processors(device):
    """How many run programs side by side; interpreted, they run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def failures(work, inputs, hidden, layers, device, dtype, p, squash=False, pulls=False):
    """Reasons against a kernel that this device gives at its first use: it is compiled, runs on a few coordinates, and is compared
    with torch. It may need more shared memory than there is, or a driver; or be wrong."""
    sizes = [STEP_BLOCK + 1]
    if work in ("replay", "step_back"):  # in both kinds of blocks
        sizes.append(FEW * processors(device) + 1)
    return reasons_of(
        work,
        device,
        dtype,
        lambda: max(error_of(work, (inputs, hidden, layers), device, dtype, p, squash, pulls, N) for N in sizes),
    )


def reasons_of(work, device, dtype, error_of):
    """The reasons that an error gives, a function's, or its failure."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            error = error_of()
    except Exception as error:  # whatever a compiler, a driver or a launcher raises
        return (
            f"its self-check on {device} failed: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}",
        )
    exact = check_precision(torch.empty(0, device=device, dtype=dtype), None) != "tf32"
    limit = SELF_CHECK[dtype] if exact else ROUNDED_CHECK
    if not error <= limit:
        return (f"its self-check on {device} failed: a {work} is off by {error:.1e}, more than {limit:.0e}",)
    return ()


CHECKED = {}  # what was checked -> reasons against it


def failures_of_averages(kernels, net, work):
    """As `failures`, against the readings of a network like that one in a piece of work, made in the kernels."""
    weight = kernels.output_weight
    sizes = kernels.inputs, kernels.hidden, kernels.layers
    key = work, *net.averages.form.values(), *sizes, weight.device, weight.dtype
    if key not in CHECKED:
        CHECKED[key] = reasons_of(
            f"{work} with averages",
            weight.device,
            weight.dtype,
            lambda: error_of_averages(kernels, AveragesReader, net, work),
        )
    return CHECKED[key]


def error_of(work, sizes, device, dtype, p, squash, pulls, N):
    """How far a piece of work of random weights and N coordinates is from torch's, relatively; see `failures`."""
    draw, T, (inputs, hidden, layers) = drawn(device, dtype), 3, sizes
    lstm = random_lstm(sizes, draw)
    weights, state = (lstm, draw(hidden), draw()), (draw(layers, hidden, N), draw(layers, hidden, N))
    adjoint, grads, features = draw(T, N), draw(T, N), draw(T, inputs, N)
    ours, plain = TritonLSTM(*weights), TorchLSTM(*weights)
    if work == "replay":
        read = torch.stack([log_sign(grad, p) for grad in grads]) if p else features
        cases = (ours, grads[:, None] if p else features, p), (plain, read, 0.0)
        found, expected = (replayed(*case, state, adjoint, squash, pulls) for case in cases)
    elif work == "step_back":
        found, expected = [], []
        for kind, parts in ((ours, found), (plain, expected)):
            ends = [part.flip(0) for part in state]
            parts += [kind.step_back(features[0], *state, adjoint[0], *ends, squash), *ends]
    elif work == "group":
        read, parts = (
            (lambda x: log_sign(x, p)) if p else (lambda x: x[None]),
            [state, tuple(draw(layers, hidden, 5) for _ in "hc")],
        )
        found, rest = [draw(N), draw(5)], [draw(N), draw(5)]
        steps = [plain.step(lambda a, b, x=x: read(x)[:, a:b], *own) for x, own in zip(rest, parts)]
        expected = [(theta + 0.5 * update, *after) for theta, (update, *after) in zip(found, steps)]
        own = ours.group_steps(p, found, parts, [], None)
        own.look(rest, 0.5)
        own.step()
        found = [(theta, *after) for theta, after in zip(found, parts)]
    elif p:
        wanted = log_sign(grads[0], p)
        found = ours.step(lambda a, b: grads[:1, a:b], *state, p=p)
        expected = plain.step(lambda a, b: wanted[:, a:b], *state)
    else:
        found, expected = (kind.step(lambda a, b: features[0, :, a:b], *state) for kind in (ours, plain))
    return distance(found, expected)
