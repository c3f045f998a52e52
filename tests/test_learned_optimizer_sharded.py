"""LearnedOptimizer in two processes by gloo: FSDP2's DTensors and their checkpoints, ZeroRedundancyOptimizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
JOB = """
import copy, os, sys
import torch
import torch.distributed.checkpoint as checkpoint
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from gradbuffer.nets.mlp import MLPOptimizer
from optimizers import CoordinatewiseLSTM, LearnedOptimizer, LSTMWithGAC

torch.set_num_threads(1)


class Counting(nn.Module):
    coordinatewise = True

    def init_state(self, num_coordinates):
        return torch.zeros(num_coordinates), 0

    def forward(self, grad, state):
        return -0.1 * grad, (grad, state[1] + 1)


def network():
    torch.manual_seed(3)
    return CoordinatewiseLSTM(4, preprocess="log_sign", output_scale=0.1)


def tensorwise():
    torch.manual_seed(3)
    return MLPOptimizer()


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))  # 5 rows on two processes; a bias that one lacks


def sharded():
    net = model()
    for module in (net[0], net):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return net


def train(net, optimizer, steps):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def whole(net):
    return {name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach().clone()
            for name, parameter in net.named_parameters()}


def error_of(function):
    try:
        function()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def fsdp(rank, folder):
    results = {}
    for kind, options in (("plain", {}), ("bfloat16", {"state_dtype": torch.bfloat16, "weight_decay": 0.01})):
        net, alone = sharded(), model()
        optimizer, reference = (LearnedOptimizer(each.parameters(), network(), **options) for each in (net, alone))
        train(net, optimizer, 4)
        train(alone, reference, 4)
        results[kind] = whole(net), whole(alone)
        if kind == "plain":
            part = net[0].weight.grad.to_local()
            if rank == 1:
                part[0, 0] = float("nan")
            results["not finite"] = error_of(optimizer.step), whole(net)
    saved_weights = whole(net)
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        net, again = sharded(), sharded()
        optimizer, resumed = (LearnedOptimizer(each.parameters(), network()) for each in (net, again))
        train(net, optimizer, 3)
        saved = get_optimizer_state_dict(net, optimizer, options=options)
        checkpoint.save(saved, checkpoint_id=f"{folder}/{flat}")
        again.load_state_dict(copy.deepcopy(net.state_dict()))
        read = get_optimizer_state_dict(again, resumed, options=options)
        checkpoint.load(read, checkpoint_id=f"{folder}/{flat}")
        set_optimizer_state_dict(again, resumed, read, options=options)
        train(net, optimizer, 3)
        train(again, resumed, 3)
        results[f"resumed, flat {flat}"] = whole(again), whole(net)
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    alone = model()
    alone.load_state_dict(whole(net))
    reference = LearnedOptimizer(alone.parameters(), network())
    if full:  # the first rank has it
        set_optimizer_state_dict(alone, reference, full)
        train(alone, reference, 2)
    train(net, optimizer, 2)
    results["full"] = whole(alone) if full else None, whole(net)
    results["gac"] = error_of(lambda: LearnedOptimizer(net.parameters(), LSTMWithGAC(4, shared=1)))
    results["counting"] = error_of(lambda: LearnedOptimizer(net.parameters(), Counting()))
    results["mlp"] = error_of(lambda: LearnedOptimizer(net.parameters(), MLPOptimizer()))
    return results


def zero(rank, folder):
    results = {}
    for kind in (network, tensorwise):
        nets = [model(), model()]
        optimizers = [ZeroRedundancyOptimizer(nets[0].parameters(), LearnedOptimizer, net=kind(), lr=0.5),
                      LearnedOptimizer(nets[1].parameters(), kind(), lr=0.5)]
        for net, optimizer in zip(nets, optimizers):
            train(net, optimizer, 3)
        results[kind.__name__] = whole(nets[0]), whole(nets[1])
    results["gac"] = error_of(lambda: ZeroRedundancyOptimizer(model().parameters(), LearnedOptimizer, net=LSTMWithGAC(4, shared=1)))
    LearnedOptimizer(model().parameters(), LSTMWithGAC(4, shared=1))  # outside of it
    return results


def job(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.save({"fsdp": fsdp(rank, folder), "zero": zero(rank, folder)}, f"{folder}/rank{rank}")
    distributed.barrier()
    os._exit(0)  # as in `test_learned_optimizer.ddp_worker`


if __name__ == "__main__":
    torch.multiprocessing.start_processes(job, (sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this torch is built without distributed")
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch is older than fully_shard")
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "job.py").write_text(JOB)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(folder / "job.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["plain", "bfloat16"])
def test_fsdp_trains_as_one_process(results, kind):
    for result in results:
        torch.testing.assert_close(*result["fsdp"][kind], rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_on_one_process_stops_all(results):
    messages = [result["fsdp"]["not finite"][0] for result in results]
    assert (
        messages[0]
        == "NonFiniteError: a gradient must be finite, but another process found that its part of one is not"
    )
    assert messages[1].startswith(
        "NonFiniteError: the gradient of parameter 0 of group 0 must be finite, but holds nan"
    )
    for result in results:
        torch.testing.assert_close(result["fsdp"]["not finite"][1], result["fsdp"]["plain"][0], rtol=0, atol=0)


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_resume_to_the_bit(results, flat):
    for result in results:
        torch.testing.assert_close(*result["fsdp"][f"resumed, flat {flat}"], rtol=0, atol=0)


def test_a_full_state_dict_goes_on_in_one_process(results):
    torch.testing.assert_close(*results[0]["fsdp"]["full"], rtol=1e-5, atol=1e-6)


def test_networks_that_need_all_coordinates_are_refused(results):
    for result in results:
        for name, net in (("gac", "LSTMWithGAC"), ("counting", "Counting"), ("mlp", "MLPOptimizer")):
            message = result["fsdp"][name]
            assert message.startswith("ValueError: parameter 0 of group 0 is a DTensor") and message.endswith(
                f"got {net}"
            )
        assert (
            "ZeroRedundancyOptimizer would show it in each process a part of the parameters only"
            in result["zero"]["gac"]
        )


@pytest.mark.parametrize("kind", ["network", "tensorwise"])
def test_zero_redundancy_with_a_coordinatewise_or_tensorwise_network(results, kind):
    for result in results:
        torch.testing.assert_close(*result["zero"][kind], rtol=1e-5, atol=1e-6)
