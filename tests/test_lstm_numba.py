"""What is in the compiled kernels alone; that they do what the plain ones do is in test_optimizers and test_meta_gradients."""

import copy
import math
from pathlib import Path

import pytest
import torch

from gradbuffer.nets.readings import log_sign

numba = pytest.importorskip("numba", reason="the kernels are compiled by numba")
from gradbuffer.kernels import numba_compiler, numba_loops, numba_lstm, numba_tape  # noqa: E402
from gradbuffer.kernels.llvm_blocks import LANES, ROWS, STREAM  # noqa: E402
from gradbuffer.kernels.numba_threads import parallel_for, pieces_of  # noqa: E402
from gradbuffer.unrolling import replay_by_autograd  # noqa: E402
from optimizers import CoordinatewiseLSTM, NormalizedLSTM, RNNProp  # noqa: E402


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("p", [0.5, 10.0, 80.0])
def test_log_sign_of_every_scale(dtype, tolerance, p):
    edge, info = math.exp(-p), torch.finfo(dtype)
    sizes = 10 ** torch.empty(5000, dtype=torch.float64).uniform_(-38, 38, generator=torch.Generator().manual_seed(0))
    special = [
        0.0,
        edge,
        edge * 0.999,
        edge * 1.001,
        0.5,
        0.5**0.5,
        2**0.5,
        1.0,
        1 - info.eps,
        2.0,
        info.max,
        info.tiny,
    ]
    grads = torch.cat([sizes, torch.tensor(special, dtype=torch.float64)]).to(dtype)
    grads = torch.cat([grads, -grads])
    width = len(grads)
    out = torch.full((-(-width // LANES) * 2 * LANES,), torch.nan, dtype=dtype)
    numba_loops.load_log_sign(grads.numpy(), 0, width, p, out.numpy(), 2 * LANES)
    rows = out.view(-1, 2, LANES).transpose(0, 1).flatten(1)
    expected = log_sign(grads.double(), p)
    assert (rows[:, :width] - expected).abs().max() <= tolerance * max(1, expected.abs().max())
    assert (rows[:, width:] == torch.tensor([[-1.0], [0.0]])).all()  # the last tile is filled up as with zeros


@pytest.mark.parametrize("preprocess", [None, "log_sign"])
def test_a_step_reads_the_gradient_wherever_a_piece_begins(preprocess, monkeypatch, threads_as_before):
    """Tiles, pieces and threads: each coordinate's update is its own."""
    monkeypatch.setenv("L2O_KERNELS", "numba")
    net, grads = CoordinatewiseLSTM(preprocess=preprocess), torch.randn(1000)
    with torch.no_grad():
        single = torch.cat([net(grad[None], net.init_state(1))[0] for grad in grads])
        for threads, chunk in ((1, 16 * 9), (2, 16 * 9), (2, 10**6)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(numba_lstm, "STEP_CHUNK", chunk)
            torch.testing.assert_close(net(grads, net.init_state(1000))[0], single, rtol=1e-6, atol=1e-7)


class Halved(CoordinatewiseLSTM):
    """A user's own: reads half of each gradient."""

    def read(self, grads, memory):
        return super().read(grads / 2, memory)


@pytest.mark.parametrize("preprocess", [None, "log_sign"])
def test_kernels_do_not_pass_over_what_a_subclass_reads(preprocess, monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "numba")
    net, grads, adjoint = Halved(preprocess=preprocess).double(), *torch.randn(2, 3, 5, dtype=torch.float64)
    expected, _ = net(grads[0], net.init_state(5))  # with a graph
    with torch.no_grad():
        for found in (net(grads[0], net.init_state(5))[0], net.stepper(net.init_state(5))(grads[0])):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
    replayed = net.replay(grads, net.init_state(5), adjoint)
    traced = replay_by_autograd(net, grads, net.init_state(5), adjoint)
    for name in traced:
        torch.testing.assert_close(replayed[name], traced[name], rtol=1e-10, atol=1e-12)


def steps_and_replays(net, N, steps, threads=1):
    """Replays with and without what the steps have kept, as pairs of dicts; the tape; and what has to be unchanged."""
    grads, adjoint = torch.randn(2, steps, N, dtype=torch.float64)
    state = (
        tuple(0.3 * torch.randn(part.shape, dtype=torch.float64) for part in net.init_state(N)[:2])
        + net.init_state(N)[2:]
    )
    before, here = tuple(part.clone() for part in state), tuple(part.clone() for part in state)
    torch.set_num_threads(threads)
    with torch.no_grad():
        step, own, tape = net.recorder(state, steps)
        updates = [step(grad).clone() for grad in grads]
        kept = net.replay(grads, state, adjoint, tape=tape)
        plain = net.stepper(here)
        assert all(torch.equal(plain(grad), update) for grad, update in zip(grads, updates))
        assert all(map(torch.equal, own, here)) and all(map(torch.equal, state, before))
    return kept, net.replay(grads, state, adjoint), tape


@pytest.mark.parametrize(
    "net",
    [
        CoordinatewiseLSTM(),
        CoordinatewiseLSTM(5, 3, "log_sign", output_scale=0.1),
        CoordinatewiseLSTM(3, 1),
        RNNProp(),
        NormalizedLSTM(hidden_size=7),
    ],
)
@pytest.mark.parametrize(
    "N, tiles, threads", [(1, 10, 1), (150, 100, 2), (333, 12, 2), (333, 27, 1), (333, 11, 1), (333, 10, 2)]
)
def test_replay_with_what_the_steps_have_kept(net, N, tiles, threads, monkeypatch, threads_as_before):
    """Gates of all tiles, of some, of all in the upper layers and some in the lower ones, of too few to be worth it."""
    monkeypatch.setenv("L2O_KERNELS", "numba")
    monkeypatch.setattr(numba_lstm, "REPLAY_CHUNK", 7 * 16 * 9)
    monkeypatch.setattr(numba_lstm, "STEP_CHUNK", 16 * 9)
    net, steps = copy.deepcopy(net).double(), 7
    whole, layers, row = -(-N // LANES), net.num_layers, net.hidden_size * LANES * 8
    monkeypatch.setattr(numba_tape, "TAPE_BYTES", (tiles * steps * 4 + 2 * whole * layers) * row)  # gates; the state
    kept, plain, tape = steps_and_replays(net, N, steps, threads)
    expected = [max(0, min(whole, tiles - whole * above)) for above in reversed(range(layers))]
    assert tape.shares.tolist() == (expected if tiles >= whole / 2 else [0] * layers)
    for name in plain:
        assert (kept[name] - plain[name]).norm() <= 1e-12 * plain[name].norm()


@pytest.mark.parametrize("cache", [0, 1 << 30])
@pytest.mark.parametrize("states", [0, 1 << 30])
def test_where_a_state_lies_and_what_is_fetched_change_nothing(states, cache, monkeypatch, threads_as_before):
    """A state that is too large stays in rows; the next tile's gates are fetched ahead where the cache is large enough."""
    monkeypatch.setenv("L2O_KERNELS", "numba")
    monkeypatch.setattr(numba_tape, "STATE_BYTES", states)
    monkeypatch.setattr(numba_lstm, "CACHE", cache)
    net = CoordinatewiseLSTM(preprocess="log_sign").double()
    assert bool(net.recorder(net.init_state(150), 5)[2].state.size) == bool(states)
    kept, plain, _ = steps_and_replays(net, 150, 5)
    for name in plain:
        assert (kept[name] - plain[name]).norm() <= 1e-12 * plain[name].norm()


@pytest.mark.parametrize("N, start, stop", [(300, 16, 293), (300, 0, 300), (90, 89, 90), (20000, 5000, 15003)])
@pytest.mark.parametrize("net", [CoordinatewiseLSTM(), CoordinatewiseLSTM(5, 3, "log_sign"), CoordinatewiseLSTM(3, 1)])
def test_a_stretch_of_a_state_is_renewed_where_it_lies(net, N, start, stop, monkeypatch):
    """In no other memory, and what is beside it stays."""
    monkeypatch.setenv("L2O_KERNELS", "numba")
    net = copy.deepcopy(net).double()
    whole = [torch.rand(part.shape, dtype=torch.float64) for part in net.init_state(N)]
    before, grad = [part.clone() for part in whole], torch.randn(stop - start, dtype=torch.float64)
    with torch.no_grad():
        expected, new = net(grad, tuple(part[..., start:stop].contiguous() for part in before))
        update, after = net(grad, tuple(part[..., start:stop] for part in whole), inplace=True)
    torch.testing.assert_close(update, expected, rtol=1e-13, atol=1e-13)
    for part, old, here, there in zip(whole, before, after, new):
        assert here.data_ptr() == part[..., start:].data_ptr()
        torch.testing.assert_close(part[..., start:stop], there, rtol=1e-13, atol=1e-13)
        assert torch.equal(part[..., :start], old[..., :start]) and torch.equal(part[..., stop:], old[..., stop:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bfloat16_is_rounded_as_torch_does(dtype):
    """To the nearest, of two to the even one; what is not a number stays so. Whole tiles and the last columns."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-7])
    special = torch.tensor([0.0, math.inf, math.nan, 3.4e38, torch.finfo(torch.bfloat16).max, 1e-40, 2**-133, 1e-45])
    sizes = 10 ** torch.empty(999).uniform_(-38, 38, generator=generator)
    every_bit = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)  # a NaN that rounding up would make -0
    values = torch.cat([sizes, special, every_bit, steps, -sizes, -special, -steps]).to(dtype)
    values = values[torch.randperm(len(values), generator=generator)]
    N, tiles = len(values), -(-len(values) // LANES)
    tiled, stored = torch.zeros(tiles * LANES, dtype=dtype), torch.zeros(N + 2, dtype=torch.bfloat16)
    tiled[:N], expected = values, values.to(torch.bfloat16)
    numba_loops.store(tiled.numpy(), LANES, 1, N, numba_tape.array(stored), 1, 0, LANES)
    torch.testing.assert_close(stored[1:-1], expected, rtol=0, atol=0, equal_nan=True)
    assert stored[0] == stored[-1] == 0
    back = torch.full_like(tiled, math.nan)
    numba_loops.load(numba_tape.array(stored), 1, 0, LANES, 1, N, back.numpy(), 0, LANES)
    torch.testing.assert_close(back[:N], expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert not back[N:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N, start, stop", [(1, 0, 1), (100, 17, 90), (5000, 100, 4903)])
@pytest.mark.parametrize(
    "net", [CoordinatewiseLSTM(preprocess="log_sign"), CoordinatewiseLSTM(3, 1), RNNProp(hidden_size=5)]
)
def test_a_state_in_bfloat16_is_renewed_where_it_lies(net, N, start, stop, dtype, monkeypatch):
    """As if it were taken out, computed with, and rounded."""
    monkeypatch.setenv("L2O_KERNELS", "numba")
    net = copy.deepcopy(net).to(dtype)
    whole = [torch.rand(part.shape).to(torch.bfloat16) for part in net.init_state(N)]
    before, grad = [part.clone() for part in whole], torch.randn(stop - start, dtype=dtype)
    with torch.no_grad():
        assert net.renews(torch.bfloat16) and not net.renews(torch.float16)
        expected, new = net(grad, tuple(part[..., start:stop].to(dtype) for part in before))
        update, after = net(grad, tuple(part[..., start:stop] for part in whole), inplace=True)
        with pytest.raises(ValueError, match="state is torch.bfloat16"):
            net(grad, tuple(part[..., start:stop] for part in whole))
        monkeypatch.setenv("L2O_KERNELS", "torch")
        with pytest.raises(ValueError, match="state is torch.bfloat16"):
            net(grad, tuple(part[..., start:stop] for part in whole), inplace=True)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6  # it is compiled for each dtype of the state
    torch.testing.assert_close(update, expected, rtol=tolerance, atol=tolerance)
    for part, old, here, there in zip(whole, before, after, new):
        assert here.data_ptr() == part[..., start:].data_ptr()
        torch.testing.assert_close(part[..., start:stop].to(dtype), there, rtol=2**-8 + tolerance, atol=tolerance)
        assert (part[..., start:stop] != there.to(torch.bfloat16)).sum() <= 1e-3 * there.numel()
        assert torch.equal(part[..., :start], old[..., :start]) and torch.equal(part[..., stop:], old[..., stop:])


def test_what_was_kept_under_other_weights_is_not_used(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "numba")
    net, grads = CoordinatewiseLSTM(), torch.randn(3, 40)
    with torch.no_grad():
        step, _, tape = net.recorder(net.init_state(40), 3)
        for grad in grads:
            step(grad)
        with pytest.raises(RuntimeError, match="room for 3 steps only"):
            step(grads[0])
        for parameter in net.parameters():
            parameter *= 2
    found, expected = (
        net.replay(grads, net.init_state(40), grads, tape=tape),
        net.replay(grads, net.init_state(40), grads),
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_windows_at_the_same_time_have_tapes_of_their_own(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "numba")
    net, grads, adjoint = CoordinatewiseLSTM(), torch.randn(3, 40), torch.randn(3, 40)
    state = net.init_state(40)
    expected = net.replay(grads, state, adjoint)
    with torch.no_grad():
        (one, _, first), (two, _, second) = net.recorder(state, 3), net.recorder(state, 3)
        for grad in grads:
            one(grad), two(-grad)
    found, memory = net.replay(grads, state, adjoint, tape=first), second.gates.ctypes.data
    net.replay(-grads, state, adjoint, tape=second)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert net.recorder(state, 3)[2].gates.ctypes.data == memory  # the next window uses what the last one left


@pytest.mark.parametrize(
    "length, most, threads, expected",
    [
        (128, 10, 2, [(0, 128)]),
        (129, 1000, 2, [(0, 129)]),
        (256, 1000, 2, [(0, 128), (128, 256)]),
        (1000, 1000, 1, [(0, 1000)]),
        (1000, 336, 2, [(0, 256), (256, 512), (512, 768), (768, 1000)]),
        (1000, 336, 1, [(0, 336), (336, 672), (672, 1000)]),
    ],
)
def test_pieces_in_which_threads_work(length, most, threads, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert (
        pieces_of(length, most) == parallel_for(lambda start, stop: (start, stop), pieces_of(length, most)) == expected
    )


def test_compiled_code_is_kept_by_what_is_in_its_sources(tmp_path):
    """numba itself would take code compiled from another version of a file that the function's own file imports."""
    files = [tmp_path / name for name in ("one.py", "two.py")]
    for file in files:
        file.write_text("x = 1\n")
    before = numba_compiler.digest(files)
    assert before == numba_compiler.digest(files)
    files[1].write_text("x = 2\n")
    assert before != numba_compiler.digest(files)
    assert {"llvm_vectors.py", "llvm_blocks.py", "numba_loops.py", "numba_windows.py"} <= {
        file.name for file in numba_compiler.sources()
    }

    @numba_compiler.compiled
    def double(x):
        return 2 * x

    assert double(3.0) == 6
    assert list(Path(double.stats.cache_path).glob(f"*double-{numba_compiler.digest(numba_compiler.sources())}*.nbi"))


@pytest.mark.parametrize("rows", [*range(1, 30), 40, 80])
def test_products_of_any_number_of_rows(rows):
    width, count, lanes = 9, 7, LANES
    weight, x, out, bias = (
        torch.randn(*shape).numpy() for shape in ((rows, width), (count, lanes), (rows, lanes), (rows, 1))
    )
    product, sums = weight[:, :count].astype("f8") @ x, out.copy()
    blocks, fours, singles = numba_loops.shared_rows(rows)
    assert ROWS * blocks + 4 * fours + singles == rows and singles < 4
    numba_loops.add_product(weight.reshape(-1), width, rows, count, x.reshape(-1), sums.reshape(-1))
    assert abs(sums - (out + product)).max() <= 1e-5
    if rows % 4 == 0:
        blocks = weight.reshape(-1)[numba_lstm.in_blocks(rows, width)]
        numba_loops.affine(blocks, width, bias.reshape(-1), rows, count, x.reshape(-1), sums.reshape(-1))
        assert abs(sums - (bias + product)).max() <= 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("units", [1, 7, 2000])
def test_a_cell_with_gates_of_any_size(units, dtype, tolerance):
    """Nothing leaves the numbers' range, a NaN stays one, and what is kept changes nothing."""
    sizes = torch.tensor([0, 1e-30, 0.1, 1, 20, 45, 1e3, 1e30, math.inf], dtype=torch.float64)
    sizes, seed = torch.cat([sizes, -sizes]), torch.Generator().manual_seed(units)
    z = sizes[torch.randint(len(sizes), (units, 4), generator=seed)].to(dtype)
    z[::11] = math.nan  # what a layer reads is read by all gates
    cell = (10 ** torch.empty(units, LANES).uniform_(-3, 3, generator=seed)).to(dtype)
    i, f, g, o = (gate[:, None] for gate in z.double().unbind(1))
    c = i.sigmoid() * g.tanh() + f.sigmoid() * cell.double()
    expected = (
        c,
        o.sigmoid() * c.tanh(),
        c.tanh(),
        torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)[..., 0],
    )
    bias = (z.double() * torch.tensor([-1, -1, -2, -1]) / math.log(2)).to(dtype).reshape(-1).numpy()
    weight, x, results = torch.zeros(4 * units, dtype=dtype).numpy(), torch.zeros(LANES, dtype=dtype).numpy(), []
    for keep in (0, 1, STREAM):
        sums, kept = (torch.empty(4 * units, LANES, dtype=dtype) for _ in range(2))
        new, hidden, tanhs = (torch.empty_like(cell) for _ in range(3))
        arrays = [part.view(-1).numpy() for part in (sums, cell, new, hidden, sums if keep == 1 else kept, tanhs)]
        numba_loops.run_cell(units, weight, 1, bias, 1, x, *arrays[:4], keep, *arrays[4:])
        results.append((new, hidden))
        parts = (
            (new, hidden, tanhs, (sums if keep == 1 else kept).view(units, 4, -1)[..., 3]) if keep else (new, hidden)
        )
        for part, there in zip(parts, expected):
            scale = there.abs().clamp(min=1)
            torch.testing.assert_close(part.double() / scale, there / scale, rtol=0, atol=tolerance, equal_nan=True)
    for new, hidden in results[1:]:
        torch.testing.assert_close((new, hidden), results[0], rtol=0, atol=0, equal_nan=True)
