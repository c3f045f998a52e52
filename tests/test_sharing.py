"""Global averaging cells and the shared memory: against loops written out, and wherever learned optimizers stand."""

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from gradbuffer.nests import map_tensors, tensors_in
from gradbuffer.nets import sharing
from gradbuffer.nets.sharing import LowRankMemory
from gradbuffer.training.meta_gradients import meta_gradient
from gradbuffer.unrolling import Coordinates
from meta_training import evaluate, meta_train
from optimizees import MetaBatch, Quadratics
from optimizers import (
    NTMBFGS,
    CoordinatewiseLSTM,
    LearnedOptimizer,
    LSTMWithGAC,
    NonFiniteError,
    PerKind,
    load_optimizer,
    save_optimizer,
    start_as_coordinatewise,
)

NETWORKS = {
    "gac": lambda **more: LSTMWithGAC(4, 2, 2, **more),
    "all shared": lambda **more: LSTMWithGAC(3, 1, 3, **more),
    "ntm": lambda **more: NTMBFGS(4, 2, 1, read_heads=2, write_heads=2, rank=6, **more),
    "one head": lambda **more: NTMBFGS(3, 1, 2, read_heads=1, write_heads=1, rank=3, **more),
}


def network(name, **options):
    """One of these, in float64, every weight at work: the memory too."""
    net = NETWORKS[name](**options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
    return net


class Planes:
    """Functions of two tensors: ‖W x + b - y‖² + Σ sin W, curved in all coordinates, with W (2, 3) and b (2)."""

    def sample(self, meta_batch, generator=None):
        def draw(*shape):
            return torch.randn(meta_batch, *shape, generator=generator, dtype=torch.float64)

        start, x, y = {"weight": draw(2, 3), "bias": draw(2)}, draw(3, 1), draw(2)

        def loss(params, step):
            here = (params["weight"] @ x)[..., 0] + params["bias"] - y
            return here.square().sum(1) + params["weight"].sin().sum((1, 2)) + 7

        return MetaBatch(start, loss)


# What a step is -------------------------------------------------------------------------------------------------------


def readings_of(net, g):
    size = max(abs(g), torch.tensor(-net.p, dtype=torch.float64).exp().item())
    log_size = torch.tensor(size, dtype=torch.float64).log().item() / net.p
    sign = max(-1.0, min(1.0, g * torch.tensor(net.p, dtype=torch.float64).exp().item()))
    return {None: [g], "log_sign": [log_size, sign], "with_log_size": [g, log_size]}[net.preprocess]


def written_out(net, gradients):
    """Updates (T, n) for one function's gradients (T, n): a loop over steps, layers and coordinates."""
    n, H, shared = gradients.shape[1], net.hidden_size, net.shared
    ntm = isinstance(net, NTMBFGS)
    zero = torch.zeros(n, H, dtype=torch.float64)
    hidden, cell = [zero] * net.num_layers, [zero] * net.num_layers
    heads, pairs, updates = net.read_heads if ntm else 0, [], []
    brought = [[0.0] * n for _ in range(heads)]
    for gradient in gradients.tolist():
        inputs = [
            torch.tensor([*readings_of(net, g), *(head[i] for head in brought)], dtype=torch.float64)
            for i, g in enumerate(gradient)
        ]
        for layer, (w, u, b, c) in enumerate(net.lstm.all_weights):
            out, memory = [], []
            for i in range(n):
                a, f, g, o = (w @ inputs[i] + b + u @ hidden[layer][i] + c).view(4, H)
                memory.append(torch.sigmoid(f) * cell[layer][i] + torch.sigmoid(a) * torch.tanh(g))
                out.append(torch.sigmoid(o) * torch.tanh(memory[-1]))
            for unit in range(H - shared, H):
                mean = sum(vector[unit].item() for vector in out) / n
                for vector in out:
                    vector[unit] = mean
            hidden[layer], cell[layer], inputs = torch.stack(out), torch.stack(memory), out
        updates.append(net.output_scale * torch.stack([net.output.weight[0] @ top + net.output.bias[0] for top in out]))
        if ntm:
            vectors = torch.stack([net.heads.weight @ top + net.heads.bias for top in out], 1)  # (heads, n)
            M = torch.eye(n, dtype=torch.float64)
            for a, b in pairs[-net.rank :]:
                M = M + torch.outer(a, b) / n
            brought = [(M @ r).tolist() for r in vectors[:heads]]
            lefts, rights = vectors[heads:].tanh().chunk(2)
            pairs += list(zip(lefts, rights))
    return torch.stack(updates)


def run(net, gradients):
    """Updates (T, N) and the state after them."""
    state, updates = net.init_state(gradients.shape[1]), []
    for gradient in gradients:
        update, state = net(gradient, state)
        updates.append(update)
    return torch.stack(updates), state


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("preprocess", [None, "log_sign", "with_log_size"])
def test_a_function_against_a_loop(name, preprocess):
    net = network(name, preprocess=preprocess, output_scale=0.5)
    gradients = torch.randn(6, 5, dtype=torch.float64)
    gradients[2, 1] = 1e-7  # below the threshold of log_sign
    with torch.no_grad():
        updates, _ = run(net, gradients)
        torch.testing.assert_close(updates, written_out(net, gradients), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_several_functions_of_several_tensors_against_a_loop(name):
    net, coordinates = network(name), Coordinates(Planes().sample(3).params)
    gradients = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        updates, _ = run(net.bind(coordinates), gradients)
        for b in range(3):

            def own(vectors):
                parts = [coordinates.split(vector) for vector in vectors]
                return torch.stack([torch.cat([part["weight"][b].flatten(), part["bias"][b]]) for part in parts])

            torch.testing.assert_close(own(updates), written_out(net, own(gradients)), rtol=1e-12, atol=1e-12)
            separate, _ = run(net, own(gradients))  # unbound, one function alone
            torch.testing.assert_close(own(updates), separate, rtol=1e-12, atol=1e-12)
        joint, _ = run(net, gradients)  # unbound, all are one function's: something else
    assert not torch.allclose(joint, updates, atol=1e-3)


@pytest.mark.parametrize("preprocess", [None, "log_sign"])
def test_nothing_shared_is_the_coordinatewise_lstm(preprocess):
    plain = CoordinatewiseLSTM(5, 2, preprocess, output_scale=0.3).double()
    net = LSTMWithGAC(5, 2, 0, preprocess, output_scale=0.3).double()
    net.load_state_dict(plain.state_dict())
    gradients = torch.randn(6, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run(net, gradients), run(plain, gradients), rtol=1e-12, atol=1e-12)
        net.shared = 1
        assert not torch.allclose(run(net, gradients)[0], run(plain, gradients)[0], atol=1e-4)


@pytest.mark.parametrize("net", [LSTMWithGAC(5, 2, 2), NTMBFGS(5, 2, 2, rank=4)])
def test_a_new_network_does_not_listen_yet(net):
    alone, together = torch.zeros(4, 3), torch.randn(4, 3)
    alone[:, 0] = together[:, 0]
    (one, _), (two, _) = run(net, alone), run(net, together)
    assert torch.equal(one[:, 0], two[:, 0])
    two[:, 0].sum().backward()
    assert net.output.weight.grad[0, 3:].abs().min() > 0 and net.lstm.weight_ih_l1.grad[:, 3:].norm() > 0


@pytest.mark.parametrize("network_class", [LSTMWithGAC, NTMBFGS])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("preprocess, read", [(None, "with_log_size"), ("log_sign", "log_sign")])
def test_start_as_coordinatewise(network_class, odd, preprocess, read):
    torch.manual_seed(1)
    plain = CoordinatewiseLSTM(10, 2, preprocess, p=4.0, output_scale=0.3, odd=True).double()
    net = start_as_coordinatewise(network_class(13, 2, 3, read, p=4.0, output_scale=0.3, odd=odd).double(), plain)
    gradients = torch.randn(6, 7, dtype=torch.float64)
    (updates, state), (expected, _) = run(net, gradients), run(plain, gradients)
    torch.testing.assert_close(updates, expected, rtol=1e-12, atol=1e-12)
    updates.square().sum().backward()  # training can make them heard
    assert net.lstm.weight_ih_l1.grad[:10, 10:].abs().min() > 0
    assert odd or net.output.weight.grad[0, 10:].abs().min() > 0
    if odd:
        for name, tensor in net.symmetrize(net.state_dict()).items():
            torch.testing.assert_close(tensor, net.state_dict()[name])
    if network_class is NTMBFGS:
        assert torch.equal(state[3].matrix(), torch.eye(7, dtype=torch.float64)[None])


def test_averages_start_as_gauges_of_the_gradients_size():
    net = start_as_coordinatewise(LSTMWithGAC(25, shared=5, preprocess="with_log_size", p=4.0), CoordinatewiseLSTM())
    with torch.no_grad():
        _, (hidden, _) = run(net, torch.randn(3, 6))
        low, high = (run(net, torch.cat([torch.randn(3, 6), size * torch.ones(1, 6)]))[1][0] for size in (0.3, 3.0))
    assert torch.equal(hidden[:, 20:], hidden[:, 20:, :1].expand(2, 5, 6)) and hidden[:, 20:].std() > 0.2
    assert (high - low)[:, 20:].min() > 0.001 and (high - low)[0, 22].min() > 0.5  # all rise, the middle one by more


@pytest.mark.parametrize("name", NETWORKS)
def test_the_order_of_coordinates_does_not_matter(name):
    net, order = network(name), torch.randperm(7)
    gradients = torch.randn(6, 7, dtype=torch.float64)
    with torch.no_grad():
        (updates, _), (ordered, _) = run(net, gradients), run(net, gradients[:, order])
    torch.testing.assert_close(ordered, updates[:, order], rtol=1e-12, atol=1e-12)


def test_averages_can_clip_by_the_norm():
    """Hand-set weights: the same gradient in one coordinate is answered by less where the others' are large."""
    net = LSTMWithGAC(2, 1, 1, preprocess="with_log_size").double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        i, f, g, o = (slice(2 * gate, 2 * gate + 2) for gate in range(4))
        bias, weight, recurrent = net.lstm.bias_ih_l0, net.lstm.weight_ih_l0, net.lstm.weight_hh_l0
        weight[g.start, 0], bias[i.start], bias[f], bias[o.start] = 0.01, 8, -8, 8  # the first cell passes ∇ on
        weight[g.start + 1, 1], bias[i.start + 1], bias[o.start + 1] = 5, 8, 8  # the second one's average is of log|∇|
        recurrent[o.start, 1] = -30  # and closes the first one's output
        net.output.weight[0, 0] = -100
        gradients = torch.tensor([[[1.0, size, size]] * 2 for size in (0.01, 100.0)], dtype=torch.float64)
        small, large = (run(net, steps)[0] for steps in gradients)
    assert small[0, 0] == pytest.approx(large[0, 0].item()) and small[0, 0] == pytest.approx(-1, rel=0.01)
    assert small[1, 0] < -0.9 and -0.01 < large[1, 0] < 0


# The memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_is_the_matrix_it_stands_for():
    memory = LowRankMemory(*torch.zeros(2, 3, 5, 4, dtype=torch.float64))
    M, written = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1), []
    for _ in range(4):  # 8 pairs, of which 5 are kept
        a, b, r = torch.randn(3, 3, 2, 4, dtype=torch.float64)
        memory, before = memory.write(a, b), memory
        written += [torch.einsum("bi,bj->bij", a[:, k], b[:, k]) / 4 for k in range(2)]
        now = M + sum(written[-5:])
        torch.testing.assert_close(memory.matrix(), now, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(memory.read(r), torch.einsum("bij,brj->bri", now, r), rtol=1e-12, atol=1e-12)
        assert before.left is not memory.left and memory.left.shape == (3, 5, 4)


def test_the_memory_holds_what_bfgs_does():
    """BFGS with exact line searches, its inverse Hessian read and written by the memory alone: exact after n steps."""
    n = 6
    A = torch.randn(n, n, dtype=torch.float64)
    hessian, start = A @ A.T + torch.eye(n), torch.randn(n, dtype=torch.float64)
    memory, dense = LowRankMemory(*torch.zeros(2, 1, 2 * n, n, dtype=torch.float64)), torch.eye(n, dtype=torch.float64)
    theta = start
    for _ in range(n):
        gradient = hessian @ theta
        direction = -memory.read(gradient.view(1, 1, n)).flatten()
        step = -(gradient @ direction) / (direction @ hessian @ direction) * direction
        theta, y = theta + step, hessian @ step
        product = y @ step
        Hy = memory.read(y.view(1, 1, n)).flatten()
        u = -Hy / product
        w = u + (1 + y @ Hy / product) * step / product
        memory = memory.write(torch.stack([step, u])[None], n * torch.stack([w, step])[None])
        V = torch.eye(n) - torch.outer(y, step) / product
        dense = V.T @ dense @ V + torch.outer(step, step) / product
        torch.testing.assert_close(memory.matrix()[0], dense, rtol=1e-8, atol=1e-8)
    assert theta.norm() < 1e-8 * start.norm()
    torch.testing.assert_close(memory.matrix()[0] @ hessian, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-7)


def test_a_new_network_leaves_the_memory_alone():
    net = NTMBFGS(4, 1, 2, rank=4)
    _, state = run(net, torch.randn(3, 5))
    assert torch.equal(state[3].matrix(), torch.eye(5)[None]) and state[3].right.abs().max() > 0
    state[3].matrix()[0, 0, 1].backward()
    assert net.heads.weight.grad[2:4].abs().max() > 0  # but it can learn to write


@pytest.mark.parametrize("name", ["gac", "ntm"])
@pytest.mark.parametrize("preprocess", [None, "log_sign", "with_log_size"])
def test_odd_networks(name, preprocess):
    net = {"gac": LSTMWithGAC, "ntm": NTMBFGS}[name](10, 2, 3, preprocess, output_scale=0.1, odd=True).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
        net.load_state_dict(net.symmetrize(net.state_dict()))
        gradients = torch.randn(6, 5, dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        (updates, _), (opposite, _) = run(net, gradients), run(net, gradients * signs)
    torch.testing.assert_close(opposite, updates * signs, rtol=1e-12, atol=1e-12)
    batch = Planes().sample(2)
    grads, _ = meta_gradient(net, batch, batch.params, net.bind(Coordinates(batch.params)).init_state(16), unroll=3)
    torch.testing.assert_close(net.symmetrize(grads), grads)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_gradcheck_of_a_step(name):
    coordinates = Coordinates({"a": torch.zeros(2, 2), "b": torch.zeros(2, 1)})
    net = network(name, preprocess="with_log_size").bind(coordinates)
    nest = map_tensors(lambda tensor: 0.5 * torch.randn_like(tensor), net.init_state(6))
    grad = torch.tensor([0.4, -1.0, 2.0, -0.3, 0.8, 1.2], dtype=torch.float64)
    names = [name for name, _ in net.named_parameters()]

    def step(grad, *tensors):
        parts, weights = iter(tensors[: len(tensors) - len(names)]), tensors[-len(names) :]
        given = map_tensors(lambda _: next(parts), nest)
        update, after = torch.func.functional_call(net, dict(zip(names, weights)), (grad, given))
        return update, *tensors_in(after)

    inputs = [grad, *tensors_in(nest), *net.parameters()]
    assert gradcheck(step, [tensor.detach().clone().requires_grad_() for tensor in inputs], fast_mode=True)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("second_order", [False, True])
def test_replay_equals_autograd(name, second_order):
    net, results = network(name, output_scale=0.1), []
    batch = Planes().sample(3, torch.Generator().manual_seed(0))
    state = net.bind(Coordinates(batch.params)).init_state(24)
    for method in ("replay", "autograd"):
        params, own, windows = batch.params, state, []
        for step in (0, 4):
            grads, info = meta_gradient(net, batch, params, own, step, 4, method, second_order)
            params, own = info.params, info.state
            windows.append(grads)
        results.append(windows)
    for one, two in zip(*results):
        assert list(one) == list(two) == [parameter for parameter, _ in net.named_parameters()]
        size = torch.stack([grad.norm() for grad in two.values()]).norm()
        assert 0 < size < 1e6 and all((grad - two[parameter]).norm() < 1e-10 * size for parameter, grad in one.items())
        assert all(grad.norm() > 0 for grad in two.values())


@pytest.mark.parametrize("name", ["gac", "ntm"])
def test_a_meta_batch_is_its_functions_one_by_one(name):
    net, batch = network(name, output_scale=0.1), Planes().sample(3)
    whole, info = meta_gradient(net, batch, batch.params, net.bind(Coordinates(batch.params)).init_state(24), unroll=4)
    total = {parameter: 0 for parameter in whole}
    for b in range(3):

        def loss(params, step, b=b):
            every = {key: torch.cat([batch.params[key][:b], params[key], batch.params[key][b + 1 :]]) for key in params}
            return batch.loss(every, step)[b : b + 1]

        start = {key: tensor[b : b + 1] for key, tensor in batch.params.items()}
        grads, own = meta_gradient(net, MetaBatch(start, loss), start, net.init_state(8), unroll=4)
        torch.testing.assert_close(own.losses[:, 0], info.losses[:, b], rtol=1e-12, atol=0)
        total = {parameter: total[parameter] + grad / 3 for parameter, grad in grads.items()}
    torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-12)


# Where learned optimizers stand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gac", "ntm"])
def test_meta_training_lowers_the_loss(name):
    net = {"gac": LSTMWithGAC, "ntm": NTMBFGS}[name](8, 1, 3)
    problem, options = Quadratics(5), dict(steps=20, num_functions=64, seed=9)
    before = evaluate(net, problem, **options).sum(1).mean()
    meta_train(
        net,
        problem,
        steps=20,
        unroll=10,
        meta_batch=16,
        iterations=60,
        lr=0.02,
        clip=30.0,
        warmup=5,
        validation_functions=32,
        validation_every=20,
        progress=False,
    )
    assert evaluate(net, problem, **options).sum(1).mean() < 0.7 * before


@pytest.mark.parametrize("name", ["gac", "ntm"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"second_order": True},
        {"method": "pes", "pairs": 2},
        {"teacher": (torch.optim.SGD, {"lr": 0.01}), "imitation": 0.5},
    ],
)
def test_a_run_goes_on_from_its_checkpoint(tmp_path, name, options):
    net = NETWORKS[name](output_scale=0.1)
    twin, start = copy.deepcopy(net), copy.deepcopy(net)
    common = dict(
        steps=8,
        unroll=2,
        meta_batch=2,
        iterations=6,
        lr=0.01,
        warmup=0,
        validation_functions=2,
        validation_every=6,
        checkpoint_every=1,
        progress=False,
        **options,
    )
    history = meta_train(net, Quadratics(3), **common)
    assert all(map(torch.isfinite, torch.tensor(history.meta_loss)))

    class Stop(Exception):
        pass

    def stop(iteration, history):
        if iteration == 3:
            raise Stop

    path = tmp_path / "run.pt"  # in the middle of an unroll: the state, memory and all, is in the checkpoint
    with pytest.raises(Stop):
        meta_train(start, Quadratics(3), checkpoint=path, callback=stop, **common)
    again = meta_train(twin, Quadratics(3), checkpoint=path, **common)
    assert again.meta_loss == history.meta_loss
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in twin.state_dict().items())


def test_pes_leaves_the_weights_as_they_were():
    net, batch = NTMBFGS(3, 1, 1, rank=4), Quadratics(3).sample(2)
    before = copy.deepcopy(net.state_dict())
    state, generator = net.bind(Coordinates(batch.params)).init_state(6), torch.Generator().manual_seed(0)
    grads, info = meta_gradient(net, batch, batch.params, state, unroll=3, method="pes", pairs=2, generator=generator)
    grads, info = meta_gradient(net, batch, info.params, info.state, 3, 3, "pes", pairs=2, generator=generator)
    assert list(grads) == list(before) and all(torch.isfinite(grad).all() for grad in grads.values())
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def trained(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 6).view(3, 2)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["gac", "ntm"])
def test_as_a_torch_optimizer(name):
    """All parameters of a group are one function: averages are over them together."""
    net = network(name, output_scale=0.1).float()
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = LearnedOptimizer(model.parameters(), net)
    trained(model, optimizer, 3)
    state, params = net.init_state(13), list(twin.parameters())
    for _ in range(3):
        twin.zero_grad()
        twin(torch.linspace(-1, 1, 6).view(3, 2)).square().sum().backward()
        with torch.no_grad():
            update, state = net(torch.cat([parameter.grad.flatten() for parameter in params]), state)
            for parameter, part in zip(params, update.split([parameter.numel() for parameter in params])):
                parameter += part.view(parameter.shape)
    torch.testing.assert_close(list(model.parameters()), params)

    resumed = LearnedOptimizer(twin.parameters(), net)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, optimizer, 2)
    trained(twin, resumed, 2)
    torch.testing.assert_close(list(model.parameters()), params)
    with pytest.raises(ValueError, match="is bound to 6 coordinates, got 13: bind it to these parameters"):
        LearnedOptimizer(third.parameters(), net.bind(Coordinates({"a": torch.zeros(2, 3)})))


@pytest.mark.parametrize("name", NETWORKS)
def test_files(tmp_path, name):
    net = NETWORKS[name](preprocess="with_log_size", output_scale=0.2)
    save_optimizer(net, tmp_path / "net.safetensors", problem="none")
    loaded = load_optimizer(tmp_path / "net.safetensors")
    assert type(loaded) is type(net) and loaded.config == net.config and str(loaded) == str(net)
    assert torch.equal(*(evaluate(some, Quadratics(), steps=3, num_functions=2) for some in (net, loaded)))


def test_the_bound_network_has_the_same_weights():
    net = NTMBFGS(3, 1, 1, rank=2)
    own = net.bind(Coordinates({"a": torch.zeros(2, 3)}))
    assert net.coordinates is None and all(one is two for one, two in zip(net.parameters(), own.parameters()))
    with torch.no_grad():
        net.output.bias.fill_(3.0)
    assert own.output.bias.item() == 3 and own.init_state(6)[3].left.shape == (2, 2, 3)


@pytest.mark.cuda
@pytest.mark.parametrize("name", NETWORKS)
def test_on_cuda(name):
    net, gradients = network(name), torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        expected, _ = run(net, gradients)
        found, _ = run(net.cuda(), gradients.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)


def reading(**options):
    return LSTMWithGAC(25, preprocess="with_log_size", **options)


def start(net=reading(), plain=CoordinatewiseLSTM()):
    return start_as_coordinatewise(net, plain)


def bad_step(grad, state=None, net=LSTMWithGAC(2, 1, 1)):
    return net(grad, net.init_state(3) if state is None else state)


BAD = [
    (lambda: LSTMWithGAC(0), ValueError, "hidden_size must be at least 1, got 0"),
    (lambda: LSTMWithGAC(shared=1.5), TypeError, "shared must be an int, got 1.5"),
    (lambda: LSTMWithGAC(4, shared=5), ValueError, "shared must be at most hidden_size=4, got 5"),
    (lambda: LSTMWithGAC(shared=-1), ValueError, "shared must be at least 0, got -1"),
    (lambda: LSTMWithGAC(preprocess="log"), ValueError, r"preprocess must be one of \[None, 'log_sign', .* got 'log'"),
    (lambda: LSTMWithGAC(p=100), ValueError, r"p must be a number in \(0, 80\], got 100"),
    (lambda: NTMBFGS(output_scale=0), ValueError, "output_scale must be a finite number other than 0, got 0"),
    (lambda: NTMBFGS(read_heads=0), ValueError, "read_heads must be at least 1, got 0"),
    (lambda: NTMBFGS(write_heads=3, rank=2), ValueError, "rank must be at least write_heads=3, got 2"),
    (lambda: start(PerKind({"a": CoordinatewiseLSTM()})), TypeError, "be a LSTMWithGAC or NTMBFGS, got PerKind"),
    (lambda: start(plain=LSTMWithGAC()), TypeError, "plain must be a CoordinatewiseLSTM, got LSTMWithGAC"),
    (lambda: start(plain=nn.LSTM(1, 20, 2)), TypeError, "plain must be a CoordinatewiseLSTM, got LSTM"),
    (lambda: start(LSTMWithGAC(25)), ValueError, "net must read 'with_log_size', got None with p=10.0"),
    (lambda: start(LSTMWithGAC(20, shared=5)), ValueError, "2 layers of 20 cells, as plain.* got 2 of 15 and 5 shared"),
    (lambda: start(LSTMWithGAC(25, 1)), ValueError, "2 layers of 20 cells.* got 1 of 20"),
    (lambda: start(LSTMWithGAC(25, preprocess="log_sign")), ValueError, "must read 'with_log_size', got 'log_sign'"),
    (
        lambda: start(LSTMWithGAC(25, preprocess="log_sign", p=3), CoordinatewiseLSTM(preprocess="log_sign")),
        ValueError,
        "net must read 'log_sign' with p=10.0, got 'log_sign' with p=3",
    ),
    (lambda: start(reading(output_scale=0.1)), ValueError, "scale=1.0 .* got output_scale=0.1 and odd=False"),
    (lambda: start(reading(odd=True)), ValueError, "be odd only if it is, got output_scale=1.0 and odd=True"),
    (lambda: LSTMWithGAC().bind({"a": 3}), TypeError, "coordinates must be unrolling.Coordinates, got dict"),
    (lambda: LSTMWithGAC().init_state(0), ValueError, "num_coordinates must be at least 1, got 0"),
    (
        lambda: NTMBFGS().bind(Coordinates({"a": torch.zeros(2, 3)})).init_state(5),
        ValueError,
        "this NTMBFGS is bound to 6 coordinates, got 5",
    ),
    (lambda: bad_step([1.0]), TypeError, "grad must be a tensor, got list"),
    (lambda: bad_step(torch.zeros(1, 3)), ValueError, r"grad must have shape \(N,\) with N ≥ 1, got \(1, 3\)"),
    (lambda: bad_step(torch.zeros(4)), ValueError, r"state must be init_state's, with tensors of shapes \[\(1, 2, 4\)"),
    (lambda: bad_step(torch.zeros(3), ()), ValueError, r"state must be init_state's.* got \[\]"),
    (lambda: bad_step(torch.zeros(3).double()), ValueError, "grad is torch.float64 on cpu, the network torch.float32"),
    (lambda: bad_step(torch.tensor([0.0, float("nan"), 1.0])), NonFiniteError, "grad must be finite.*coordinate 1"),
    (lambda: PerKind({"a": LSTMWithGAC()}), TypeError, "is a LSTMWithGAC, which can't be one of several"),
    (
        lambda: meta_gradient(LSTMWithGAC(), MetaBatch({}, None), {}, None, replay_fraction=0.5),
        ValueError,
        "a network with coordinatewise = True",
    ),
    (
        lambda: meta_gradient(NTMBFGS(), MetaBatch({}, None), {}, None, second_order=True, adjoint_bound=2),
        ValueError,
        "a network with coordinatewise = True",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_docstring_examples():
    result = doctest.testmod(sharing)
    assert result.attempted and not result.failed
