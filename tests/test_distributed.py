"""Several processes by gloo: the same meta-gradient and training as one, a death that is told, and another number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradbuffer.contracts import part_of
from gradbuffer.training.ranks import Ranks
from optimizees import MetaBatch, MNISTNet, Quadratics

ROOT = Path(__file__).resolve().parents[1]

JOB = """
import os, shutil, sys, traceback
import torch
from torch import distributed
from gradbuffer.contracts import as_problem
from gradbuffer.training.options import training_of
from gradbuffer.training.run import Run
from meta_training import meta_train
from optimizees import MetaBatch, Mixture, MNISTNet, Quadratics
from optimizers import CoordinatewiseLSTM

torch.set_num_threads(1)


class Whole(Quadratics):
    "Quadratics whose batches cannot be divided: every rank computes all losses."

    def sample(self, meta_batch, generator=None):
        return super().sample(meta_batch, generator)._replace(part=None)


class Failing(Quadratics):
    "The last function of the second draw is NaN: on the last rank alone."

    draws = 0

    def sample(self, meta_batch, generator=None):
        self.draws += 1
        batch = super().sample(meta_batch, generator)
        factor = torch.ones(meta_batch, dtype=self.dtype)
        if self.draws == 2:
            factor[-1] = float("nan")
        return MetaBatch(batch.params, lambda params, step: batch.loss(params, step) * factor)

    def validation_problem(self):
        return Quadratics(self.dim, self.dtype)


def problem(name, root):
    if name == "mnist":
        return MNISTNet(batch_size=8, root=root, dtype=torch.float64)
    if name == "mixture":
        return Mixture([Quadratics(2, torch.float64), Quadratics(4, torch.float64)], families=1)
    return {"quadratics": Quadratics, "whole": Whole, "failing": Failing}[name](dim=3, dtype=torch.float64)


def network():
    # another one in every process: the first rank's must count
    torch.manual_seed(0 if not distributed.is_initialized() else distributed.get_rank())
    return CoordinatewiseLSTM(hidden_size=3).double()


def settings(**more):
    return dict(steps=20, unroll=5, meta_batch=5, iterations=10, lr=0.01, warmup=2, validation_every=5,
                validation_functions=3, progress=False) | more


def first_gradient(name, root):
    torch.manual_seed(0)
    net = CoordinatewiseLSTM(hidden_size=3).double()
    options = {option: value for option, value in settings(clip=None, balance=name == "mixture").items() if option != "progress"}
    run = Run(net, as_problem(problem(name, root)), training_of(net, **options))
    return run.window()


def job(root, folder):
    results = {}
    for name in ("quadratics", "whole", "mnist", "mixture"):
        grads, figures = first_gradient(name, root)
        net = network()
        history = meta_train(net, problem(name, root), **settings(checkpoint=f"{folder}/{name}", balance=name == "mixture"))
        results[name] = dict(grads=grads, figures=figures, weights=dict(net.state_dict()), loss=history.meta_loss,
                             norm=history.grad_norm, size=history.update_size, validation=history.validation,
                             random=torch.load(f"{folder}/{name}", weights_only=True)["content"]["random"][0])
    net = network()
    history = meta_train(net, problem("quadratics", root), teacher=(torch.optim.Adam, {"lr": 0.1}), imitation=0.5,
                         curriculum=(10,), patience=1, **settings(lr=0.5, validation_every=2))
    results["guided"] = dict(weights=dict(net.state_dict()), stages=history.stages, imitation=history.imitation,
                             loss=history.meta_loss)
    net = network()
    history = meta_train(net, problem("failing", root), skip_non_finite=1, **settings())
    results["failing"] = dict(weights=dict(net.state_dict()), skipped=history.skipped, loss=history.meta_loss)
    try:
        meta_train(network(), problem("failing", root), **settings())
    except ValueError as error:
        results["message"] = str(error)
    try:
        meta_train(network(), problem("quadratics", root), **settings(checkpoint="/dev/null/there"))
    except (OSError, RuntimeError) as error:
        results["unwritable"] = f"{type(error).__name__}: {error}"
    return results


def in_processes(size, function, *arguments):
    "Fork `size` processes that form a group (none if it is 1); their exit statuses."
    group, children = f"{sys.argv[2]}/group{size}{function.__name__}", []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                if size > 1:
                    distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=size)
                function(rank, *arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
    return [os.waitpid(child, 0)[1] for child in children]


def equal_job(rank, size):
    place = f"{sys.argv[2]}/{size}"
    torch.save(job(sys.argv[1], place), f"{place}/rank{rank}")


class Deadly(Quadratics):
    draws = 0

    def sample(self, meta_batch, generator=None):
        self.draws += 1
        if self.draws == 4 and distributed.get_rank() == 1:
            os.kill(os.getpid(), 9)
        return super().sample(meta_batch, generator)


Deadly.__name__ = "Quadratics"


def interrupt(done, history):
    if done == 14:
        raise KeyboardInterrupt


def train(rank, name, make=Quadratics, **arguments):
    folder = sys.argv[2]
    torch.manual_seed(0)
    net = CoordinatewiseLSTM(hidden_size=3).double()
    more = dict(checkpoint=f"{folder}/run") if name != "whole" else {}
    try:
        history = meta_train(net, make(dim=3, dtype=torch.float64), **settings(meta_batch=4, iterations=20, **more, **arguments))
    except RuntimeError as error:
        with open(f"{folder}/{name}.message{rank}", "w") as file:
            file.write(str(error))
        raise
    if rank == 0:
        torch.save((history.meta_loss, dict(net.state_dict())), f"{folder}/{name}")


def interrupted(rank, name):
    train(rank, name, checkpoint_every=1, callback=interrupt)


if __name__ == "__main__":
    folder = sys.argv[2]
    torch.optim.Adam([torch.zeros(1)]).step()  # imports what every child would import again
    if sys.argv[3] == "equal":
        for size in (1, 2):
            os.mkdir(f"{folder}/{size}")
            assert in_processes(size, equal_job, size) == [0] * size
    else:
        assert in_processes(1, train, "whole") == [0]
        assert in_processes(2, train, "died", Deadly) == [256, 9]
        shutil.copy(f"{folder}/run", f"{folder}/after death")
        # one process, to the middle of an unroll; then three to the end
        assert in_processes(1, interrupted, "one") == [0]
        shutil.copy(f"{folder}/run", f"{folder}/after one")
        assert in_processes(3, train, "three") == [0] * 3
"""


def environment():
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(processes, *command, timeout=200):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            *map(str, command),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_job(folder, what):
    from conftest import write_mnist

    root, script = write_mnist(folder / "tiny", side=8), folder / "job.py"
    script.write_text(JOB)
    run = subprocess.run(
        [sys.executable, script, root, folder, what], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process made, and each of two."""
    folder = tmp_path_factory.mktemp("jobs")
    run_job(folder, "equal")
    return {
        size: [torch.load(folder / str(size) / f"rank{rank}", weights_only=True) for rank in range(size)]
        for size in (1, 2)
    }


@pytest.mark.parametrize("name", ["quadratics", "whole", "mnist", "mixture"])
def test_two_processes_train_as_one_does(results, name):
    (one,), many = [results[1][0][name]], [result[name] for result in results[2]]
    for result in many:
        for key, grad in one["grads"].items():
            torch.testing.assert_close(result["grads"][key], grad, rtol=1e-10, atol=1e-14)
        assert result["figures"] == pytest.approx(one["figures"], rel=1e-10)
        for record in ("loss", "norm", "size"):
            assert result[record] == pytest.approx(one[record], rel=1e-9)
        assert [k for k, _ in result["validation"]] == [5, 10]
        assert [score for _, score in result["validation"]] == pytest.approx([score for _, score in one["validation"]])
        for key, weight in one["weights"].items():
            torch.testing.assert_close(result["weights"][key], weight, rtol=1e-8, atol=1e-10)
            assert torch.equal(result["weights"][key], many[0]["weights"][key])  # the ranks do not drift apart
        assert torch.equal(result["random"], one["random"])  # as many draws


def test_two_processes_follow_one_curriculum_and_one_teacher(results):
    (one,), many = [results[1][0]["guided"]], [result["guided"] for result in results[2]]
    assert len(one["stages"]) == 2 and 0 < len(one["imitation"]) < 10
    for result in many:
        assert result["stages"] == one["stages"]
        assert [at for at, _ in result["imitation"]] == [at for at, _ in one["imitation"]]
        (_, losses), (_, expected) = zip(*result["imitation"]), zip(*one["imitation"])
        assert losses == pytest.approx(expected, rel=1e-8)
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-8)
        for key, weight in one["weights"].items():
            torch.testing.assert_close(result["weights"][key], weight, rtol=1e-7, atol=1e-9)
            assert torch.equal(result["weights"][key], many[0]["weights"][key])


def test_a_window_that_fails_on_one_rank_is_skipped_on_all(results):
    (one,), many = results[1], results[2]
    for result in many:
        assert [k for k, _ in result["failing"]["skipped"]] == [4] == [k for k, _ in one["failing"]["skipped"]]
        assert (
            "on rank 1, " in result["failing"]["skipped"][0][1]
            and "on rank 0" not in result["failing"]["skipped"][0][1]
        )
        for key, weight in one["failing"]["weights"].items():
            torch.testing.assert_close(result["failing"]["weights"][key], weight, rtol=1e-8, atol=1e-10)
        assert "stopped at iteration 4: on rank 1, " in result["message"]


def test_a_checkpoint_that_the_first_rank_cannot_write_stops_all(results):
    for result, error in zip(results[2], ("NotADirectoryError", "RuntimeError: rank 0 failed: NotADirectoryError")):
        assert result["unwritable"].startswith(error) and "could not be written" in result["unwritable"]


def test_slices_of_a_meta_batch(monkeypatch, tiny_mnist):
    """They cover it, and their losses are those of the whole batch, with `part` and without."""
    ranks = Ranks()
    for size in (1, 2, 3, 7):
        ranks.size, shares = size, []
        for ranks.rank in range(size):
            shares.append(ranks.share(7))
        assert shares[0][0] == 0 and shares[-1][1] == 7 and all(a[1] == b[0] for a, b in zip(shares, shares[1:]))
    with pytest.raises(ValueError, match="meta_batch must be at least the number of processes 7, got 6"):
        ranks.share(6)
    for problem in (Quadratics(dim=3), MNISTNet((4,), batch_size=8, root=tiny_mnist)):
        batch = problem.sample(5, generator=torch.Generator().manual_seed(0))
        for given in (batch, MetaBatch(batch.params, batch.loss)):
            part = part_of(given, 1, 3)
            for step in (0, 40):
                torch.testing.assert_close(part.loss(part.params, step), batch.loss(batch.params, step)[1:3])


def test_a_death_ends_the_job_and_another_number_of_processes_goes_on(tmp_path):
    run_job(tmp_path, "death")
    message = (tmp_path / "died.message0").read_text()
    assert "rank 0 of 2: another process of this job has died or does not answer" in message
    content = torch.load(tmp_path / "after death", weights_only=True)["content"]
    assert content["iteration"] == 10 and len(content["window"]["parts"]) == 2  # in the middle of an unroll
    content = torch.load(tmp_path / "after one", weights_only=True)["content"]
    assert content["iteration"] == 14 and len(content["window"]["parts"]) == 1
    (loss, weights), (expected, end) = (torch.load(tmp_path / name, weights_only=True) for name in ("three", "whole"))
    assert loss == pytest.approx(expected, rel=1e-8)
    for name, weight in end.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-7, atol=1e-9)
