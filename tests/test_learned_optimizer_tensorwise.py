"""LearnedOptimizer with networks that read whole tensors, against their forward run by hand."""

import copy
import io
import math
import pickle

import pytest
import torch
from test_learned_optimizer import data, lstm, model, train, values
from test_learned_optimizer_faults import by_fused_adam
from torch import nn
from torch.optim import lr_scheduler

from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
from optimizers import LearnedOptimizer, NonFiniteError

SHAPES = [(5, 4), (7,), (), (1,), (0,), (4, 3, 3, 2), (2, 5, 3), (3, 0, 2), (1, 6)]
VARIANTS = [
    {},
    {"vectors": "adamw", "weight_decay": 0.1},
    {"orthogonalize": True, "context": True, "hidden_sizes": (3,)},
    {"variant": "small_fc"},
]


def mlp(dtype=torch.float32, **options):
    """Near its start, where it trains."""
    net = start_as_normalized_adam(MLPOptimizer(**options).to(dtype))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in net.parameters():
            part += 0.1 * torch.randn(part.shape, generator=generator).to(dtype)
    return net


class Signs(nn.Module):
    """A user's network: it moves by the sign of an average, less in larger tensors; it takes no rate and has a weight."""

    tensorwise = True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def init_state(self, params):
        return {
            name: {"average": torch.zeros_like(param), "sizes": (param.square().reshape(len(param), -1).sum(1),)}
            for name, param in params.items()
        }

    def forward(self, grads, state, *, params):
        updates, after = {}, {}
        for name, grad in grads.items():
            average = 0.5 * state[name]["average"] + grad
            updates[name] = -self.scale * average.sign() / average[0].numel()
            after[name] = {"average": average, "sizes": (state[name]["sizes"][0] + 1,)}
        return updates, after


class Late(nn.Module):
    """Another one, that takes the rate and the time."""

    tensorwise, reads, lr = True, {"params", "step"}, 0.25

    def init_state(self, params):
        return {name: torch.zeros(len(param)) for name, param in params.items()}

    def forward(self, grads, state, *, params, lr=None, step=None):
        assert isinstance(step, int)
        return (
            {name: -lr * (step + 1) * grad for name, grad in grads.items()},
            {name: count + 1 for name, count in state.items()},
        )


def small_fc():
    return mlp(variant="small_fc")


NETS = {
    "mlp": mlp,
    "adamw": lambda: mlp(vectors="adamw", weight_decay=0.1),
    "small_fc": small_fc,
    "signs": Signs,
    "late": Late,
}


@pytest.fixture(params=["torch", "numba"])
def kernels(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("L2O_KERNELS", request.param)
    return request.param


def parameters(dtype=torch.float64, shapes=SHAPES):
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(params, step):
    """Some are zero, some are missing."""
    generator = torch.Generator().manual_seed(step)
    for number, param in enumerate(params):
        kind = (number + step) % 5
        grad = 0.1 * torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        param.grad = None if kind == 0 else grad * (kind != 1)


class ByHand:
    """The network's forward for one tensor after the other; decay comes first, as in AdamW."""

    def __init__(self, net, lr, weight_decay=0.0, maximize=False):
        self.net, self.lr, self.decay, self.sign, self.states = net, lr, weight_decay, -1 if maximize else 1, {}

    @torch.no_grad()
    def step(self, params):
        for number, param in enumerate(params):
            if param.grad is None or not param.numel():
                continue
            param *= 1 - self.lr * self.decay
            theta = {"": param.detach()[None].clone()}
            state, step = self.states.get(number) or (self.net.init_state(theta), 0)
            time = {"step": step} if "step" in getattr(self.net, "reads", ()) else {}
            updates, state = self.net({"": self.sign * param.grad[None]}, state, params=theta, lr=self.lr, **time)
            self.states[number] = state, step + 1
            param += updates[""][0]


# What it computes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "maximize": True}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_the_network_run_by_hand(variant, options, kernels):
    net, ours, theirs = mlp(torch.float64, **variant), parameters(), parameters()
    optimizer = LearnedOptimizer(
        [{"params": ours[:4]}, {"params": ours[4:], "lr": 0.003, "weight_decay": 0.05}], net, lr=0.02, **options
    )
    by_hand = [ByHand(net, 0.02, **options), ByHand(net, 0.003, **{**options, "weight_decay": 0.05})]
    for step in range(7):
        for params in (ours, theirs):
            give_gradients(params, step)
        optimizer.step()
        by_hand[0].step(theirs[:4])
        by_hand[1].step(theirs[4:])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert all(part.grad is None for part in net.parameters())
    fast = kernels == "numba" and "variant" not in variant
    assert {network.is_compiled for network in optimizer._networks.values()} == {fast}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_zero_gradient_does_not_keep_from_decay(weight_decay, kernels):
    param = nn.Parameter(torch.ones(2, 3))
    param.grad = torch.zeros(2, 3)
    LearnedOptimizer([param], MLPOptimizer(weight_decay=0.5), lr=0.5, weight_decay=weight_decay).step()
    torch.testing.assert_close(param.detach(), torch.full((2, 3), 1 - 0.5 * weight_decay))


def test_a_users_network_without_a_rate():
    net, params = Signs(), parameters(torch.float32, [(2, 3), (4,), ()])
    optimizer, before = (
        LearnedOptimizer(params, net, lr=0.5, weight_decay=0.1),
        [param.detach().clone() for param in params],
    )
    for param in params:
        param.grad = -torch.ones_like(param)
    optimizer.step()
    for param, old in zip(params, before):
        torch.testing.assert_close(param.detach(), 0.95 * old + 0.5 * 0.1 / old.numel())
    assert optimizer.state[params[0]].keys() == {"state.average", "state.sizes.0"}
    assert optimizer.state[params[0]]["state.sizes.0"].item() == pytest.approx(before[0].square().sum().item() + 1)
    assert LearnedOptimizer(params, Signs()).param_groups[0]["lr"] == 1.0


def test_a_users_network_with_rate_and_time():
    first, second = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = LearnedOptimizer([first, second], Late())
    for step in range(3):
        first.grad = torch.ones(3)
        second.grad = torch.ones(3) if step else None  # has a step number of its own
        optimizer.step()
    assert first.tolist() == [-0.25 * (1 + 2 + 3)] * 3 and second.tolist() == [-0.25 * (1 + 2)] * 3
    assert optimizer.state[first]["step"] == 3 and optimizer.state[second] == {"state": torch.tensor(2.0), "step": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_16_bit_parameters_are_rounded_once(variant, dtype, kernels):
    net, ours = mlp(**variant), parameters(dtype)
    optimizer, by_hand = LearnedOptimizer(ours, net, lr=0.05), ByHand(net, 0.05)
    for step in range(4):
        give_gradients(ours, step)
        theirs = [nn.Parameter(param.detach().float()) for param in ours]
        for param, twin in zip(ours, theirs):
            twin.grad = None if param.grad is None else param.grad.float()
        optimizer.step()
        by_hand.step(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.detach().float(), b.detach(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert ours[0].dtype == dtype and {
        part.dtype for part in optimizer.state[ours[0]].values() if isinstance(part, torch.Tensor)
    } == {torch.float32}


def test_dtypes_and_networks_side_by_side(kernels):
    """Each computes in its parameter's dtype; the network's weights are cast."""
    net, double, single = mlp(torch.float64), parameters(), parameters(torch.float32)
    for params in (double, single):
        give_gradients(params, 1)
    LearnedOptimizer([*double, *single], net, lr=0.1).step()
    for a, b in zip(double, single):
        torch.testing.assert_close(a.detach(), b.detach().double(), rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(a.detach(), b.detach().double()) for a, b in zip(double, single))
    assert net.layers["weight_0"].dtype == torch.float64


@pytest.mark.parametrize(
    "arrange", [lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.mT.contiguous().mT]
)
def test_memory_layout_does_not_matter(arrange, kernels):
    plain, laid = (
        parameters(shapes=[(2, 3, 4, 4)])[0],
        nn.Parameter(arrange(parameters(shapes=[(2, 3, 4, 4)])[0].detach())),
    )
    for step in range(1, 3):
        for param in (plain, laid):
            param.grad = torch.linspace(-1, step, 96, dtype=torch.float64).view(2, 3, 4, 4)
        laid.grad = arrange(laid.grad)
    stride, place = laid.stride(), laid.data_ptr()
    for param in (plain, laid):
        LearnedOptimizer([param], mlp(torch.float64), lr=0.1).step()
    assert (laid.stride(), laid.data_ptr()) == (stride, place)
    torch.testing.assert_close(plain, laid, rtol=1e-10, atol=1e-10)


def test_sparse_gradients_equal_dense_ones(kernels):
    tables = [nn.Embedding.from_pretrained(torch.ones(6, 3), freeze=False, sparse=sparse) for sparse in (True, False)]
    optimizers = [LearnedOptimizer(table.parameters(), mlp(), lr=0.1) for table in tables]
    for index in ([1, 1, 4], [0, 5, 5]):
        for table, optimizer in zip(tables, optimizers):
            optimizer.zero_grad()
            table(torch.tensor(index)).pow(2).sum().backward()
            assert table.weight.grad.is_sparse == table.sparse
            optimizer.step()
    assert torch.equal(tables[0].weight, tables[1].weight)


# The rate -------------------------------------------------------------------------------------------------------------


def test_the_rate_is_the_networks_own_unless_given(kernels):
    net, twin = model(), model()
    optimizer = LearnedOptimizer(
        [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.0}], mlp(lr=0.02)
    )
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "net": lstm()})
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.0, 1.0]
    train(net, optimizer, 1)
    assert torch.equal(values(net[2]), values(twin[2]))
    for before, after in zip(twin[0].parameters(), net[0].parameters()):
        assert (after - before).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_set_the_rate(tensor_lr, kernels):
    """In "celo" a tensor of one element moves by the rate."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = LearnedOptimizer(
        [param], start_as_normalized_adam(MLPOptimizer()), lr=torch.tensor(0.8) if tensor_lr else 0.8
    )
    scheduler, moves = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5), []
    for _ in range(4):
        param.grad, before = torch.ones(1), param.item()
        optimizer.step()
        scheduler.step()
        moves.append(before - param.item())
    assert moves == pytest.approx([0.8, 0.4, 0.2, 0.1], rel=1e-4)


def test_a_negative_rate_changes_nothing(kernels):
    params = parameters()
    give_gradients(params, 1)
    optimizer, before = LearnedOptimizer([{"params": params[:2]}, {"params": params[2:]}], mlp()), copy.deepcopy(params)
    optimizer.param_groups[1]["lr"] = -0.1
    with pytest.raises(ValueError, match="lr of group 1 must be a number of at least 0, got -0.1"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and not optimizer.state


class ByLayer(nn.Module):
    """A user's network that is two, by the names of parameters."""

    by_name = True

    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleDict({"0": lstm(), "2": mlp()})

    def init_state(self, num_coordinates):
        raise NotImplementedError

    def network_for(self, name):
        return self.networks[name[0]]


def test_networks_by_name_have_one_rate():
    net, several = model(), ByLayer()
    with pytest.raises(
        ValueError, match=r"lr must be given: the networks of the group have rates of their own, \[0.001, 1.0\]"
    ):
        LearnedOptimizer(net.named_parameters(), several)
    optimizer, before = LearnedOptimizer(net.named_parameters(), several, lr=0.01), values(net[2])
    train(net, optimizer, 2)
    assert optimizer.state[net[0].weight].keys() == {"state.0", "state.1"} and not torch.equal(values(net[2]), before)
    assert list(optimizer.state[net[2].weight]) == ["state.m", "state.v", "state.rows", "state.columns"]


# Around the optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(NETS))
def test_it_trains(kind, kernels):
    net = model()
    losses = train(net, LearnedOptimizer(net.parameters(), NETS[kind](), lr=1.0 if kind == "signs" else 0.05), 30)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", list(NETS))
def test_new_weights_are_seen_at_the_next_step(kind, kernels):
    if kind == "late":
        pytest.skip("it has no weights")
    net, own, other = NETS[kind](), model(), model()
    optimizer = LearnedOptimizer(own.parameters(), net, lr=0.05)
    for write in (
        lambda part: by_fused_adam(part),
        lambda part: [weight.data.mul_(2) for weight in part.parameters()],
        lambda part: [weight.detach().numpy().__imul__(0.5) for weight in part.parameters()],
    ):
        write(net)
        fresh = LearnedOptimizer(other.parameters(), copy.deepcopy(net), lr=0.05)
        if optimizer.state:
            fresh.load_state_dict(optimizer.state_dict())
        other.load_state_dict(own.state_dict())
        train(own, optimizer, 2)
        train(other, fresh, 2)
        assert torch.equal(values(own), values(other))


def test_a_copy_elsewhere_sees_every_change():
    """ "meta" stands for another device."""
    net, param = mlp(), nn.Parameter(torch.zeros(3, 2, device="meta"))
    optimizer = LearnedOptimizer([param], net)
    network = optimizer._network(net, [param])
    before = network.net
    assert {part.device.type for part in before.parameters()} == {"meta"} and not network.is_compiled
    assert network.unchanged()
    next(net.parameters()).data.mul_(2)
    assert not network.unchanged()


def test_a_new_setting_of_the_network_is_seen_too(kernels):
    net, param = MLPOptimizer(), nn.Parameter(torch.ones(2, 3))
    optimizer = LearnedOptimizer([param], net, lr=0.5)
    param.grad = torch.ones(2, 3)
    optimizer.step()
    twin, state = (
        param.detach()[None].clone(),
        {"": {name[6:]: part[None].clone() for name, part in optimizer.state[param].items()}},
    )
    net.weight_decay = 0.5
    with torch.no_grad():
        updates, _ = net({"": param.grad[None]}, state, params={"": twin}, lr=0.5)
    optimizer.step()
    torch.testing.assert_close(param.detach(), (twin + updates[""])[0])


@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("again", ["state dict", "deepcopy", "pickle"])
def test_training_goes_on_from_a_saved_state(again, dtype, kind, kernels):
    net = model(dtype)

    def setup(part):
        return LearnedOptimizer(
            [{"params": part[0].parameters(), "lr": 0.1}, {"params": part[2].parameters()}], NETS[kind](), lr=0.05
        )

    optimizer = setup(net)
    train(net, optimizer, 3)
    if again == "state dict":
        file = io.BytesIO()
        torch.save((net.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        other = model(dtype)
        other.load_state_dict(weights)
        second = setup(other)
        second.load_state_dict(state)
    else:
        other, second = (
            copy.deepcopy((net, optimizer)) if again == "deepcopy" else pickle.loads(pickle.dumps((net, optimizer)))
        )
    train(net, optimizer, 3)
    train(other, second, 3)
    assert torch.equal(values(net), values(other))
    torch.testing.assert_close(second.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_state_that_does_not_fit_changes_nothing(kernels):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), mlp())
    train(net, optimizer, 2)
    kept = copy.deepcopy(optimizer.state_dict())
    for other in (
        torch.optim.Adam(net.parameters()),
        LearnedOptimizer(net.parameters(), lstm()),
        LearnedOptimizer(net.parameters(), Late()),
    ):
        train(net, other, 1)
        with pytest.raises(ValueError, match="the state of parameter 0 of group 0 must have the parts .* got"):
            optimizer.load_state_dict(other.state_dict())
    broken = copy.deepcopy(kept)
    broken["state"][1]["state.m"][1, 2] = math.nan
    with pytest.raises(ValueError, match="state.m of the state of parameter 1 of group 0 must be finite"):
        optimizer.load_state_dict(broken)
    torch.testing.assert_close(optimizer.state_dict(), kept, rtol=0, atol=0)
    net[2].weight.data, net[2].weight.grad = torch.ones(3, 5), torch.ones(3, 5)
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(ValueError, match="parameter 2 of group 0 must keep the size that it had when its state began"):
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))
    torch.testing.assert_close(optimizer.state_dict(), kept, rtol=0, atol=0)


def test_a_parameter_that_changes_its_dtype_goes_on(kernels):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), mlp(), lr=0.01)
    train(net, optimizer, 2)
    twin = copy.deepcopy(optimizer.state[net[0].weight]["state.v"])
    for param in net.parameters():
        param.data, param.grad = param.data.double(), None
    x, y = data(torch.float64)
    (net(x) - y).square().mean().backward()
    optimizer.step()
    v = optimizer.state[net[0].weight]["state.v"]
    torch.testing.assert_close(v, 0.95 * twin.double() + 0.05 * net[0].weight.grad.square(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite(bad, kernels):
    net = model()
    optimizer = LearnedOptimizer([{"params": net[i].named_parameters()} for i in (0, 2)], mlp())
    train(net, optimizer, 1)
    before, state = values(net), copy.deepcopy(optimizer.state_dict())
    net[2].bias.grad[1] = bad
    with pytest.raises(
        NonFiniteError, match=rf"the gradient of parameter 1 \(bias\) of group 1 must be finite, but holds {bad}"
    ):
        optimizer.step()
    assert torch.equal(values(net), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_grad_scaler_and_autocast(kernels):
    net, twin, (x, y) = model(), model(), data()
    optimizer, scaler = (
        LearnedOptimizer(net.parameters(), mlp(), lr=0.05),
        torch.amp.GradScaler("cpu", init_scale=2.0**10),
    )
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale((net(x) - y).square().mean()).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scaler.step(optimizer)
        scaler.update()
    train(twin, LearnedOptimizer(twin.parameters(), mlp(), lr=0.05), 3)
    torch.testing.assert_close(values(net), values(twin))
    before = values(net)
    net[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(values(net), before)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
def test_made_and_stepped_under_any_context(context, kernels):
    own, other = model(), model()
    for each in (own, other):
        train(each, torch.optim.SGD(each.parameters(), lr=0.0), 1)  # gradients
    with context():
        optimizer = LearnedOptimizer(own.parameters(), mlp(), lr=0.1) if context is torch.inference_mode else None
        if optimizer:
            optimizer.step()
    if not optimizer:
        optimizer = LearnedOptimizer(own.parameters(), mlp(), lr=0.1)
        with context():
            optimizer.step()
    optimizer.step()
    reference = LearnedOptimizer(other.parameters(), mlp(), lr=0.1)
    reference.step()
    reference.step()
    assert torch.equal(values(own), values(other))
    own(torch.ones(1, 3)).sum().backward()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", list(NETS))
def test_cuda_parameters_with_a_network_on_the_cpu(kind):
    here, there, network = parameters(), [nn.Parameter(param.detach().cuda()) for param in parameters()], NETS[kind]()
    optimizers = [LearnedOptimizer(params, network, lr=0.02, weight_decay=0.1) for params in (here, there)]
    for step in range(3):
        give_gradients(here, step)
        for param, twin in zip(here, there):
            twin.grad = None if param.grad is None else param.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for weight in network.parameters():
                weight.mul_(1.1)  # the copy follows
    for param, twin in zip(here, there):
        torch.testing.assert_close(twin.cpu(), param, rtol=1e-8, atol=1e-8)


# What is refused ------------------------------------------------------------------------------------------------------


class Careless(nn.Module):
    """What it gives back can be changed."""

    tensorwise = True

    def __init__(
        self,
        state=lambda params: {name: {"m": torch.zeros_like(param)} for name, param in params.items()},
        updates=None,
        after=None,
    ):
        super().__init__()
        self.state, self.updates, self.after = state, updates, after

    def init_state(self, params):
        return self.state(params)

    def forward(self, grads, state, *, params):
        return self.updates(grads) if self.updates else grads, self.after(state) if self.after else state


@pytest.mark.parametrize(
    "net, options, message",
    [
        (
            mlp(),
            {"state_dtype": torch.bfloat16},
            "state_dtype must be None for parameter 0 of group 0, whose network MLPOptimizer is tensorwise",
        ),
        (
            Careless(lambda params: {}),
            {},
            "init_state of Careless must return a dict with the names of the params, got {}",
        ),
        (
            Careless(lambda params: None),
            {},
            "init_state of Careless must return a dict with the names of the params, got None",
        ),
        (
            Careless(lambda params: {name: {"m": torch.zeros(3)} for name in params}),
            {},
            r"state.m of Careless must be a tensor \(B, ...\) .* got \(3,\)",
        ),
        (
            Careless(lambda params: {name: {"m": 0} for name in params}),
            {},
            "state.m of Careless must be a tensor .* got int",
        ),
    ],
)
def test_bad_networks_and_options(net, options, message):
    params = parameters(torch.float32)
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer(params, net, **options)


def test_what_a_network_cannot_read():
    net = Late()
    net.reads = {"params", "loss"}
    with pytest.raises(
        ValueError, match=r"Late must read params and step at most, beside gradients, got \['loss', 'params'\]"
    ):
        LearnedOptimizer(parameters(), net)
    net.reads, net.lr = {"params"}, None
    with pytest.raises(ValueError, match="lr must be given: Late takes a rate and has none of its own"):
        LearnedOptimizer(parameters(), net)
    named = [("weight", nn.Parameter(torch.ones(2))) for _ in range(2)]
    with pytest.raises(ValueError, match="the names of a group's parameters must differ for MLPOptimizer"):
        LearnedOptimizer(named, mlp())


@pytest.mark.parametrize(
    "net, message",
    [
        (Careless(updates=lambda grads: {}), "Careless must return updates of the shapes .*, got {}"),
        (
            Careless(updates=lambda grads: {name: grad[0] for name, grad in grads.items()}),
            r"Careless must return updates of the shapes .*\(1, 2, 3\)",
        ),
        (Careless(updates=lambda grads: None), "Careless must return updates of the shapes .*, got NoneType"),
        (
            Careless(after=lambda state: {name: {} for name in state}),
            "Careless must return a state of '0' of the shapes .*, got {}",
        ),
        (Careless(after=lambda state: None), "Careless must return a state of '0' of the shapes"),
    ],
)
def test_networks_that_break_the_agreement(net, message):
    param, first = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2))
    optimizer = LearnedOptimizer([{"params": [first], "net": mlp()}, {"params": [param]}], net)
    param.grad, first.grad = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not param.any() and not first.any() and not optimizer.state
