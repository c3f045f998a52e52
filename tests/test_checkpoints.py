"""Checkpoints: a resumed run equals an uninterrupted one to the bit; no failure harms the checkpoint before it."""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from gradbuffer import files
from gradbuffer.training.checkpoints import (
    FILE_FORMAT,
    PARTS,
    plain,
    read_checkpoint,
    read_start,
    regroup,
    write_checkpoint,
)
from meta_training import meta_train
from optimizees import MNISTNet, Quadratics, RandomScaling
from optimizers import CoordinatewiseLSTM, RNNProp, save_optimizer

ROOT = Path(__file__).resolve().parents[1]


class Stop(Exception):
    pass


def stop_at(iteration):
    def callback(done, history):
        if done == iteration:
            raise Stop

    return callback


class Pair(NamedTuple):
    velocity: torch.Tensor
    count: int


class Momentum(nn.Module):
    """A user's optimizer whose state is a named tuple with a number in it."""

    def __init__(self):
        super().__init__()
        self.log_lr = nn.Parameter(torch.tensor(-3.0))

    def init_state(self, num_coordinates):
        return Pair(torch.zeros(num_coordinates), 0)

    def forward(self, grad, state):
        velocity = 0.9 * state.velocity + grad
        return -self.log_lr.exp() * velocity / (1 + state.count) ** 0.5, Pair(velocity, state.count + 1)


def quadratics(**arguments):
    return Quadratics(dim=3), lambda: CoordinatewiseLSTM(hidden_size=4), dict(meta_batch=4, **arguments)


def mnist(root, **arguments):
    problem = MNISTNet(batch_size=8, root=root)
    make = lambda: CoordinatewiseLSTM(hidden_size=3, num_layers=1, preprocess="log_sign", output_scale=0.1)  # noqa: E731
    return problem, make, dict(meta_batch=2, replay_fraction=0.1, **arguments)


CASES = {
    "quadratics": (quadratics, dict()),
    "random horizons": (quadratics, dict(horizons=(1, 5))),
    "second order": (quadratics, dict(method="autograd", second_order=True)),
    "a user's optimizer": (lambda: (Quadratics(dim=3), Momentum, dict(meta_batch=4)), dict()),
    "RNNProp": (lambda: (Quadratics(dim=3), lambda: RNNProp(hidden_size=3), dict(meta_batch=4)), dict()),
    "averaging": (quadratics, dict(averaging=0.9)),
    "curriculum": (quadratics, dict(curriculum=(5, 10), patience=1, validation_every=2, averaging=0.2, lr=1.0)),
    "imitation": (quadratics, dict(teacher=(torch.optim.Adam, {"lr": 0.1}), imitation=0.6)),
    "imitation of NAG": (
        lambda: (Quadratics(dim=3), Momentum, dict(meta_batch=4)),
        dict(teacher=(torch.optim.SGD, dict(lr=0.01, momentum=0.9, nesterov=True)), imitation=1.0),
    ),
    "imitation of a user's": (quadratics, dict(teacher=Momentum(), imitation=0.6, method="pes")),
    "PES": (quadratics, dict(method="pes", pairs=2, objective="log")),
    "PES of a user's": (lambda: (Quadratics(dim=3), Momentum, dict(meta_batch=4)), dict(method="pes")),
    "MNIST": (mnist, dict()),
}


TRAIN = dict(
    steps=20, unroll=5, iterations=14, lr=0.01, warmup=2, progress=False, validation_every=5, validation_functions=3
)


def train(make, problem, **arguments):
    torch.manual_seed(0)
    net = make()
    history = meta_train(net, problem, **{**TRAIN, **arguments})
    return net, history


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(name, tmp_path, tiny_mnist):
    case, more = CASES[name]
    problem, make, arguments = case(tiny_mnist) if name == "MNIST" else case()
    arguments |= more
    net, history = train(make, problem, checkpoint=tmp_path / "whole", checkpoint_every=3, **arguments)
    without, same = train(make, problem, **arguments)
    assert same == history  # checkpoints change nothing
    assert len(history.stages) == 3 * (name == "curriculum") and bool(history.imitation) == ("imitation" in name)
    for stops in ([1], [4], [7, 11], [12, 14]):
        path = tmp_path / f"stopped {stops}"
        for stop in stops:
            with pytest.raises(Stop):
                train(make, problem, checkpoint=path, checkpoint_every=3, callback=stop_at(stop), **arguments)
        torch.manual_seed(99)  # another process has another random state, and other weights to begin with
        resumed = make()
        for parameter in resumed.parameters():
            nn.init.normal_(parameter)
        again = meta_train(
            resumed,
            problem,
            **{
                **dict(
                    steps=20,
                    unroll=5,
                    iterations=14,
                    lr=0.01,
                    warmup=2,
                    validation_every=5,
                    validation_functions=3,
                    checkpoint=path,
                    checkpoint_every=2,
                    progress=False,
                ),
                **arguments,
            },
        )
        assert again == history
        assert all(torch.equal(tensor, resumed.state_dict()[key]) for key, tensor in net.state_dict().items())
        ends = [torch.load(file, weights_only=True)["content"] for file in (tmp_path / "whole", path)]
        assert repr(ends[0]["adam"]) == repr(ends[1]["adam"])
        assert all(torch.equal(tensor, ends[1]["net"][key]) for key, tensor in ends[0]["net"].items())


def test_an_interval_is_honoured_and_a_finished_run_stays_as_it_is(tmp_path):
    problem, make, arguments = quadratics()
    path, seen = tmp_path / "folder" / "run", []

    def look(done, history):
        seen.append(torch.load(path, weights_only=True)["content"]["iteration"])

    net, history = train(make, problem, checkpoint=path, checkpoint_every=4, callback=look, **arguments)
    assert seen == [1, 1, 1, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 14]
    content = path.read_bytes()
    again, same = train(make, problem, checkpoint=path, callback=stop_at(14), **arguments)
    assert same == history and path.read_bytes() == content
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


KILLED = """
import os, random, signal, sys, time
import torch
from gradbuffer.training.checkpoints import read_checkpoint
from meta_training import meta_train
from optimizees import Quadratics
from optimizers import CoordinatewiseLSTM

torch.set_num_threads(1)
path, record, every, iterations = sys.argv[1], sys.argv[2], 2, 100
random.seed(0)
torch.optim.Adam([torch.zeros(1)]).step()  # imports what every child would import again

def train(**arguments):
    torch.manual_seed(0)
    net = CoordinatewiseLSTM(hidden_size=3)
    history = meta_train(net, Quadratics(dim=3), 20, 5, 4, iterations, warmup=2, validation_every=15,
                         validation_functions=3, progress=False, **arguments)
    return net, history

def note(done, history):
    with open(record, "w") as file:
        file.write(str(done))

kills, least = 0, 0
while True:
    child = os.fork()
    if child == 0:
        train(checkpoint=path, checkpoint_every=every, callback=note)
        os._exit(0)
    deadline = time.time() + random.uniform(0.02, 0.2)
    while time.time() < deadline and kills < 12:
        time.sleep(0.005)
    if kills < 12:
        os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    kills += 1
    if os.path.exists(path):
        reached = int((open(record).read() if os.path.exists(record) else "") or 0)
        there = torch.load(path, weights_only=True)["content"]["iteration"]
        assert there >= least and there > reached - every, (there, least, reached)
        least = there
assert kills >= 3, kills
resumed, history = train(checkpoint=path, checkpoint_every=every)
net, whole = train()
assert history == whole and all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters()))
assert os.listdir(os.path.dirname(path)) == ["run"]  # half-written files were cleared away

"""


def test_killed_at_random_moments(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "there" / "run", tmp_path / "record"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


# Files that cannot be written -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "run"
    one = {**dict.fromkeys(PARTS), "iteration": 1}
    write_checkpoint(path, one, {})
    with file_size_limit(1000), pytest.raises(OSError, match="could not be written: File too large; .* as it was"):
        write_checkpoint(path, {"iteration": 2, "large": torch.zeros(10_000)}, {})
    assert read_checkpoint(path, {}) == one and os.listdir(tmp_path) == ["run"]

    problem, make, arguments = quadratics()
    run = tmp_path / "training"
    torch.manual_seed(0)
    net = make()
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fill = lambda done, history: done == 6 and monkeypatch.setattr(files.os, "fsync", full_disk)  # noqa: E731
    with pytest.raises(OSError, match="could not be written: No space left on device; a file that was there") as caught:
        meta_train(
            net,
            problem,
            20,
            5,
            iterations=14,
            checkpoint=run,
            checkpoint_every=2,
            validation_every=4,
            callback=fill,
            progress=False,
            **arguments,
        )
    assert caught.value.errno == 28 and str(run) in str(caught.value)
    assert torch.load(run, weights_only=True)["content"]["iteration"] == 6 and sorted(os.listdir(tmp_path)) == [
        "run",
        "training",
    ]
    assert any(not torch.equal(start[name], tensor) for name, tensor in net.state_dict().items())  # the best so far


@contextlib.contextmanager
def read_only(folder):
    """A folder that this process may not write to, root's too."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        one = {**dict.fromkeys(PARTS), "iteration": 1}
        write_checkpoint(path, one, {})
        path.chmod(0o644)
        problem, make, arguments = quadratics()
        with read_only(Path(folder)):
            with pytest.raises(PermissionError, match="could not be written: Permission denied; a file that was there"):
                write_checkpoint(path, {"iteration": 2}, {})
            with pytest.raises(PermissionError, match="other"):  # after the first iteration
                train(make, problem, checkpoint=Path(folder) / "other", callback=stop_at(1), **arguments)
            with pytest.raises(PermissionError, match="net.safetensors"):
                save_optimizer(CoordinatewiseLSTM(), Path(folder) / "net.safetensors")
            assert read_checkpoint(path, {}) == one
    with pytest.raises(OSError, match="could not be written"):  # a file where a folder should be
        write_checkpoint(Path(__file__) / "run", {}, {})


# Files that are not this run's checkpoint -----------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path):
    problem, make, arguments = quadratics()
    with pytest.raises(Stop):
        train(make, problem, checkpoint=tmp_path / "run", checkpoint_every=3, callback=stop_at(7), **arguments)
    return tmp_path / "run"


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_damaged_and_foreign_files(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, settings = stopped.read_bytes(), torch.load(stopped, weights_only=True)["settings"]
    damaged = [b"", b"not a checkpoint", content[:100], content[: len(content) // 2], content[:-1], content[1:]]
    middle = content.index(torch.load(stopped, weights_only=True)["content"]["net"]["output.weight"].numpy().tobytes())
    damaged.append(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])  # one bit, in a weight
    for case in damaged:
        stopped.write_bytes(case)
        with pytest.raises(ValueError, match="is not a readable checkpoint, or a damaged one"):
            read_checkpoint(stopped, settings)
        assert stopped.read_bytes() == case
    for foreign in ({"weight": torch.ones(2)}, [1, 2], {"kind": "meta-training"}):
        torch.save(foreign, stopped)
        with pytest.raises(ValueError, match="holds no checkpoint of a meta-training run"):
            read_checkpoint(stopped, settings)
    torch.save({"kind": "meta-training", "format": FILE_FORMAT + 1}, stopped)
    with pytest.raises(ValueError, match=f"is of format {FILE_FORMAT + 1}; this version reads up to {FILE_FORMAT}"):
        read_checkpoint(stopped, settings)
    torch.save({"kind": "meta-training", "format": 1, "content": Evil()}, stopped)
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_checkpoint(stopped, settings)
    assert not Path("evil").exists()
    save_optimizer(CoordinatewiseLSTM(), stopped)
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        read_checkpoint(stopped, settings)


def test_a_file_that_lacks_parts_or_holds_others(stopped):
    """Whole as a file, and yet no checkpoint of this run: an error that says so, and the network stays as it was."""
    problem, make, arguments = quadratics()
    file = torch.load(stopped, weights_only=True)
    for name in PARTS:
        write_checkpoint(stopped, {key: part for key, part in file["content"].items() if key != name}, file["settings"])
        with pytest.raises(ValueError, match=f"lacks parts of a checkpoint: {name}. Remove it"):
            train(make, problem, checkpoint=stopped, **arguments)
    for name in {*PARTS} - {"iteration", "window"}:
        for other in ({}, [torch.zeros(2)], "text"):
            write_checkpoint(stopped, {**file["content"], name: other}, file["settings"])
            net = CoordinatewiseLSTM(hidden_size=4)
            before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
            with pytest.raises(ValueError, match="is whole as a file, but does not describe this run"):
                meta_train(net, problem, checkpoint=stopped, **TRAIN, **arguments)
            assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in before.items())


def test_files_of_the_first_format_are_read(stopped):
    problem, make, arguments = quadratics()
    file = torch.load(stopped, weights_only=True)
    torch.save(
        {**file, "format": 1, "content": {key: part for key, part in file["content"].items() if key != "start"}},
        stopped,
    )
    _, history = train(make, problem, checkpoint=stopped, **arguments)
    assert history == train(make, problem, **arguments)[1]


def test_the_start_of_a_run_is_in_its_checkpoint(stopped):
    problem, make, _ = quadratics()
    torch.manual_seed(0)
    start = make().state_dict()
    kept = read_start(stopped)
    assert kept.keys() == start.keys() and all(torch.equal(kept[name], tensor) for name, tensor in start.items())
    assert read_start(stopped.with_name("none")) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lr=0.02), "another run: lr was 0.01 and is 0.02"),
        (dict(steps=40), "steps was 20 and is 40"),
        (dict(seed=1, clip=None), "seed was 0 and is 1; clip was 1.0 and is None"),
        (dict(iterations=20), "iterations was 14 and is 20"),
        (dict(horizons=(1, 2)), r"horizons was None and is \(1, 2\)"),
        (
            dict(problem=RandomScaling(Quadratics(dim=3), 2.0)),
            "problem was 'Quad.* and is .RandomScaling .* of Quadratics",
        ),
        (dict(objective="log"), "objective was 'sum' and is 'log'"),
        (dict(curriculum=(10,), patience=2), r"curriculum was None and is '\(10,\) with patience 2'"),
        (
            dict(teacher=(torch.optim.Adam, {"lr": 0.1}), imitation=0.3),
            "teacher was None and is \"Adam {'lr': 0.1}, 0.3 of the functions, weight 1.0\"",
        ),
        (
            dict(make=lambda: CoordinatewiseLSTM(hidden_size=5)),
            "net was .*'hidden_size': 4.* and is .*'hidden_size': 5",
        ),
        (
            dict(make=lambda: CoordinatewiseLSTM(hidden_size=4).double(), problem=Quadratics(3, dtype=torch.float64)),
            "net was .*float32.* and is .*float64",
        ),
        (
            dict(problem=Quadratics(dim=4)),
            "problem was 'Quadratics Quadratics, 3 dimensions .*' and is 'Quadratics.* 4 dim",
        ),
    ],
)
def test_another_runs_checkpoint_is_refused(stopped, change, message):
    problem, make, arguments = quadratics()
    arguments |= dict(problem=problem, make=make, checkpoint=stopped) | change
    content = stopped.read_bytes()
    with pytest.raises(ValueError, match=message):
        train(**arguments)
    assert stopped.read_bytes() == content


@pytest.mark.parametrize("wrong", [dict(method="bptt"), dict(replay_fraction=2.0), dict(horizons=lambda *_: 0)])
def test_a_run_that_could_not_begin_leaves_no_checkpoint(wrong, tmp_path):
    problem, make, arguments = quadratics()
    with pytest.raises(ValueError):
        train(make, problem, checkpoint=tmp_path / "run", **arguments, **wrong)
    assert os.listdir(tmp_path) == []


def test_another_number_of_processes_draws_new_functions_in_the_middle_of_an_imitation(tmp_path):
    """The teacher's state cannot be cut, so all ranks draw, also one whose slice is as it was."""
    problem, make, arguments = quadratics(teacher=(torch.optim.Adam, {"lr": 0.1}), imitation=1.0)
    path, draws = tmp_path / "run", []
    with pytest.raises(Stop):
        train(make, problem, checkpoint=path, checkpoint_every=3, callback=stop_at(6), **arguments)
    file = torch.load(path, weights_only=True)
    file["content"]["window"]["parts"] *= 2  # as two ranks would have left it
    write_checkpoint(path, file["content"], file["settings"])
    sample = problem.sample
    problem.sample = lambda *given, **more: draws.append(given) or sample(*given, **more)
    _, history = train(make, problem, checkpoint=path, callback=lambda done, _: draws.append(done), **arguments)
    assert draws[:2] == [(4,), 7] and len(history.meta_loss) == len(history.imitation) == 14


def test_what_may_change(stopped):
    problem, make, arguments = quadratics()
    _, history = train(make, problem, **arguments)
    assert (
        train(
            make,
            problem,
            checkpoint=stopped,
            checkpoint_every=5,
            skip_non_finite=3,
            callback=lambda *_: None,
            device="cpu",
            **arguments,
        )[1]
        == history
    )


def test_a_state_that_a_checkpoint_cannot_hold():
    with pytest.raises(TypeError, match="a checkpoint holds tensors, numbers, text .* got object"):
        plain({"a": [object()]})


def test_slices_are_put_together_for_another_number_of_ranks():
    """Three ranks' coordinates, cut anew in two, lie as `Coordinates` puts the whole meta-batch's."""
    whole = {"w": torch.arange(24.0).view(4, 2, 3), "b": 100 + torch.arange(4.0).view(4, 1)}

    def state_of(first, last):
        vector = torch.cat([tensor[first:last].flatten() for tensor in whole.values()])
        return vector.expand(2, -1).clone(), {"cell": vector[None]}

    def part(first, last):
        return first, last, {name: tensor[first:last] for name, tensor in whole.items()}, state_of(first, last)

    parts = [part(0, 1), part(1, 2), part(2, 4)]
    for first, last in ((0, 2), (2, 4), (0, 4), (1, 2)):
        params, state = regroup(parts, first, last, coordinatewise=True)
        expected = state_of(first, last)
        assert all(torch.equal(params[name], whole[name][first:last]) for name in whole)
        assert torch.equal(state[0], expected[0]) and torch.equal(state[1]["cell"], expected[1]["cell"])
    assert regroup(parts, 0, 2, coordinatewise=False) is None
    assert regroup(parts, 1, 2, coordinatewise=False) is not None
