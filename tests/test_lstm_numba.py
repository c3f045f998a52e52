"""What is in the compiled kernels alone; that they do what the plain ones do is in test_optimizers and test_meta_gradients."""

import math
from pathlib import Path

import pytest
import torch

from preprocessing import log_sign

numba = pytest.importorskip("numba", reason="the kernels are compiled by numba")
import lstm_numba  # noqa: E402
from meta_gradients import replay_by_autograd  # noqa: E402
from optimizers import CoordinatewiseLSTM  # noqa: E402


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("p", [0.5, 10.0, 80.0])
def test_log_sign_of_every_scale(dtype, tolerance, p):
    edge, info = math.exp(-p), torch.finfo(dtype)
    sizes = 10 ** torch.empty(5000, dtype=torch.float64).uniform_(-38, 38, generator=torch.Generator().manual_seed(0))
    special = [0.0, edge, edge * 0.999, edge * 1.001, 0.5, 0.5**0.5, 2**0.5, 1.0, 1 - info.eps, 2.0, info.max, info.tiny]
    grads = torch.cat([sizes, torch.tensor(special, dtype=torch.float64)]).to(dtype)
    grads = torch.cat([grads, -grads])
    width = len(grads)
    out = torch.full((-(-width // lstm_numba.LANES) * 2 * lstm_numba.LANES,), torch.nan, dtype=dtype)
    lstm_numba.load_log_sign(grads.numpy(), 0, width, p, out.numpy(), 2 * lstm_numba.LANES)
    rows = out.view(-1, 2, lstm_numba.LANES).transpose(0, 1).flatten(1)
    expected = log_sign(grads.double(), p)
    assert (rows[:, :width] - expected).abs().max() <= tolerance * max(1, expected.abs().max())
    assert not rows[:, width:].any()  # the last tile is filled up with zeros


def test_a_step_reads_the_gradient_wherever_a_piece_begins(monkeypatch):
    """Tiles, pieces and threads: each coordinate's update is its own."""
    monkeypatch.setenv("L2O_KERNELS", "numba")
    net, grads = CoordinatewiseLSTM(preprocess="log_sign"), torch.randn(1000)
    state, threads = net.init_state(1000), torch.get_num_threads()
    with torch.no_grad():
        single = torch.cat([net(grad[None], net.init_state(1))[0] for grad in grads])
        try:
            for count, chunk in ((1, 16 * 9), (2, 16 * 9), (2, 10**6)):
                torch.set_num_threads(count)
                monkeypatch.setattr(lstm_numba, "STEP_CHUNK", chunk)
                torch.testing.assert_close(net(grads, state)[0], single, rtol=1e-6, atol=1e-7)
        finally:
            torch.set_num_threads(threads)


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


@pytest.mark.parametrize("length, most, threads, expected", [
    (128, 10, 2, [(0, 128)]), (129, 1000, 2, [(0, 129)]), (256, 1000, 2, [(0, 128), (128, 256)]),
    (1000, 1000, 1, [(0, 1000)]), (1000, 336, 2, [(0, 256), (256, 512), (512, 768), (768, 1000)]),
    (1000, 336, 1, [(0, 336), (336, 672), (672, 1000)])])
def test_pieces_in_which_threads_work(length, most, threads, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert lstm_numba.side_by_side(lambda start, stop: (start, stop), length, most) == expected


def test_compiled_code_is_kept_by_what_is_in_its_sources(tmp_path):
    """numba itself would take code compiled from another version of a file that the function's own file imports."""
    files = [tmp_path / name for name in ("one.py", "two.py")]
    for file in files:
        file.write_text("x = 1\n")
    before = lstm_numba.digest(files)
    assert before == lstm_numba.digest(files)
    files[1].write_text("x = 2\n")
    assert before != lstm_numba.digest(files)
    assert {file.name for file in lstm_numba.SOURCES} == {"register_vectors.py", "register_blocks.py", "lstm_numba.py"}

    @lstm_numba.compiled
    def double(x):
        return 2 * x

    assert double(3.0) == 6
    assert list(Path(double.stats.cache_path).glob(f"*double-{lstm_numba.digest(lstm_numba.SOURCES)}*.nbi"))
