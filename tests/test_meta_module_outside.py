"""meta_module in other people's hands: loading, optimizers, torch's own tools on a layer, older scripts, compilers."""

import abc
import copy
import threading
import typing
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import meta_module
from meta_module import MetaLinear, MetaModule, MetaSequential, to_meta, to_var


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


X, Y = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3), torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


def simple():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss_of(net):
    return F.mse_loss(net(X), Y)


def inner(net, lr=0.1, **options):
    trainable = [p for p in net.parameters() if p.requires_grad]
    net.update_params(lr, source_params=torch.autograd.grad(loss_of(net), trainable, create_graph=True), **options)
    return net


def snapshot(net):
    """Every tensor itself, its values and its version."""
    return {n: (t, t.detach().clone(), t._version) for n, t in net.state_dict(keep_vars=True).items()}


def same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def unchanged(net, before):
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, values, version) in before.items():
        assert after[name] is tensor and tensor._version == version, name
        same(tensor.detach(), values)


# ---- loading touches what it loads and nothing else ------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "state",
    [{}, {"1.running_mean": torch.ones(4).double()}, {"3.bias": torch.ones(1).double()}, {"no": torch.ones(1)}],
    ids=["nothing", "a buffer", "a parameter", "an unknown name"],
)
def test_a_partial_load_leaves_the_rest_with_its_graph(state, assign):
    net = to_meta(body())
    start = list(net.parameters())
    inner(net)
    before = snapshot(net)
    net.load_state_dict(state, strict=False, assign=assign)
    unchanged(net, {**before, **{n: t for n, t in snapshot(net).items() if n in state}})
    for name in set(state) - {"no"}:
        same(net.state_dict()[name], state[name])
    loss_of(net).backward()
    assert [p.grad is not None for p in start] == [True] * 6


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "no tensor"])
def test_a_refused_load_changes_nothing_at_all(change, updated, assign):
    plain_inside = MetaSequential(*body())  # plain layers in a meta module
    for net in (to_meta(body()), plain_inside.double()):
        if updated:
            inner(net)
        before = snapshot(net)
        state = {n: t + 1 for n, t in net.state_dict().items()}
        if change == "missing":
            del state["3.weight"]
        else:
            wrong = {"unexpected": ("other", torch.ones(1)), "shape": ("3.weight", torch.ones(2))}
            wrong["no tensor"] = ("3.bias", 1)
            state.update([wrong[change]])
        with pytest.raises(RuntimeError):
            net.load_state_dict(state, assign=assign)
        unchanged(net, before)


def test_values_that_are_not_numbers_are_no_change():
    net = to_meta(simple())
    net.set_param("0.bias", net[0].bias * float("nan"))
    before = snapshot(net)
    net.load_state_dict({"2.bias": net[2].bias.detach() + 1}, strict=False)
    unchanged(net, {**before, "2.bias": snapshot(net)["2.bias"]})
    assert net[0].bias.grad_fn is not None


def test_loading_keeps_ties_and_shared_modules():
    shared = nn.Linear(3, 3).double()
    net = to_meta(nn.ModuleDict({"one": shared, "two": shared, "tied": nn.Linear(3, 3).double()}))
    net["tied"].weight = net["one"].weight
    assert net["tied"].weight is net["two"].weight
    for name, tensor in net.named_params():
        net.set_param(name, tensor * 2)
    state = {n: torch.ones_like(t) for n, t in net.state_dict().items()}
    net.load_state_dict(state)
    assert net["one"] is net["two"] and net["one"].weight is net["tied"].weight and net["one"].weight.is_leaf
    assert net["one"].weight.eq(1).all()
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict({**state, "tied.weight": torch.ones(1)})
    assert net["one"].weight is net["tied"].weight


def test_a_plain_parent_loads_what_it_names_alone():
    net = nn.Sequential(to_meta(simple()), nn.Linear(1, 1).double())
    start = list(net[0].parameters())
    inner(net[0])
    before = snapshot(net[0])
    net.load_state_dict({"1.bias": torch.ones(1), "0.2.bias": torch.ones(1)}, strict=False)
    unchanged(net[0], {**before, "2.bias": snapshot(net[0])["2.bias"]})
    assert net[0][2].bias.is_leaf and net[0][2].bias == 1 and net[1].bias == 1
    loss_of(net[0]).backward()
    assert [p.grad is not None for p in start] == [True] * 4


def test_hooks_of_loading_still_run():
    net, seen = to_meta(simple()), []
    net[0].register_load_state_dict_pre_hook(lambda *a: seen.append("before"))
    net.register_load_state_dict_post_hook(lambda module, keys: seen.append(list(keys.missing_keys)))
    net.load_state_dict({}, strict=False)
    assert seen == ["before", ["0.weight", "0.bias", "2.weight", "2.bias"]]


# ---- optimizers made before an inner loop ----------------------------------------------------------------------------


def outer_training(restore, detach=False, parent=lambda net: net):
    """Losses of outer steps, each through an inner update, with an optimizer made once."""
    net = to_meta(simple())
    whole = parent(net)
    optimizer, losses = torch.optim.SGD(whole.parameters(), lr=0.1), []
    for _ in range(4):
        start, saved = dict(net.named_params()), copy.deepcopy(whole.state_dict())
        inner(net, detach=detach)
        query = loss_of(net)
        restore(net, whole, start, saved)
        optimizer.zero_grad()
        if detach:
            query = loss_of(net)
        query.backward()
        optimizer.step()
        losses.append(loss_of(net).item())
    assert [p is q for p, q in zip(net.parameters(), optimizer.param_groups[0]["params"])] == [True] * 4
    return losses


@pytest.mark.parametrize("detach", [False, True])
def test_restoring_the_start_keeps_an_optimizer_valid(detach):
    expected = outer_training(lambda net, whole, start, saved: net.set_params(start), detach)
    assert expected == sorted(expected, reverse=True) and expected[0] > expected[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load = lambda net, whole, start, saved: whole.load_state_dict(saved)  # noqa: E731
        if not detach:
            assert outer_training(load) == expected
            assert outer_training(load, parent=lambda net: nn.Sequential(net)) == expected


def test_loading_other_values_than_the_start_says_that_an_optimizer_does_not_follow():
    net = to_meta(simple())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    for options in ({}, {"detach": True}):
        inner(net, **options)
        query = loss_of(net) if not options else None
        with pytest.warns(UserWarning, match="MetaLinear.weight.*does not step") as caught:
            net.load_state_dict(state)
        assert caught[0].filename == __file__
        same(dict(net.state_dict()), state)
        if query is not None:
            query.backward()  # the older graph is whole
        net.set_params(dict(zip(state, optimizer.param_groups[0]["params"])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.load_state_dict(state)  # into the optimizer's leaves
    assert net[0].weight is optimizer.param_groups[0]["params"][0]
    del optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner(net, detach=True)
        net.load_state_dict({name: tensor + 1 for name, tensor in state.items()})  # nobody holds the earlier leaves


def test_what_is_remembered_does_not_grow_and_is_not_kept_alive():
    net = to_meta(simple())
    start = dict(net.named_params())
    state = copy.deepcopy(net.state_dict())
    for _ in range(5):
        inner(net)
        net.load_state_dict(state)
    assert [len(past[2]) for past in vars(net[0])["_history"].values()] == [0, 0]
    assert all(net.get_parameter(name) is tensor for name, tensor in start.items())
    for _ in range(5):
        inner(net)
    assert [len(past[2]) for past in vars(net[0])["_history"].values()] == [1, 1]
    clone = copy.deepcopy(net)
    assert not vars(clone[0])["_history"] and clone[0].weight is not net[0].weight


def test_set_params():
    net = to_meta(simple())
    start = dict(net.named_params())
    inner(net)
    after = dict(net.named_params())
    for bad, error, message in (
        ([1], TypeError, "params is list"),
        ({**start, "no": start["0.bias"]}, ValueError, "no parameter is named 'no'; the names are 0.weight"),
        ({**start, "2.bias": 1.0}, TypeError, "'2.bias' is float"),
        ({**start, "2.bias": torch.ones(2).double()}, ValueError, "'2.bias' has shape"),
    ):
        with pytest.raises(error, match=message):
            net.set_params(bad)
        assert all(net.get_parameter(name) is tensor for name, tensor in after.items())
    net.set_params({"0.bias": start["0.bias"]})
    assert net[0].bias is start["0.bias"] and net[0].weight is after["0.weight"]
    net.set_params(start)
    assert all(net.get_parameter(name) is tensor for name, tensor in start.items())
    net[2].weight, net[0].bias = net[2].weight, net[0].bias

    tied = to_meta(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    tied[1].weight = tied[0].weight
    one, other = torch.ones(2, 2), torch.zeros(2, 2)
    tied.set_params({"1.weight": one})
    assert tied[0].weight is tied[1].weight is one
    with pytest.raises(ValueError, match=r"\['0.weight'\] are tied"):
        tied.set_params({"0.weight": one, "1.weight": other})
    assert tied[0].weight is one


def test_set_params_walks_the_modules_once():
    visits = []

    class Counted(nn.Linear):
        def named_modules(self, *args, **kwargs):
            visits.append(self)
            return super().named_modules(*args, **kwargs)

    counts = []
    for layers in (4, 40):
        net = to_meta(nn.Sequential(*(Counted(1, 1) for _ in range(layers))))
        start = dict(net.named_params())
        visits.clear()
        net.set_params(start)
        counts.append(len(visits))
    assert 0 < counts[1] <= 10 * counts[0]


# ---- what torch puts on a layer --------------------------------------------------------------------------------------


class OldStyle(MetaModule):
    """A layer as the reweighting scripts write it."""

    def __init__(self):
        super().__init__()
        plain = nn.Linear(3, 3).double()
        self.register_buffer("weight", to_var(plain.weight.data))
        self.register_buffer("bias", to_var(plain.bias.data))

    def named_leaves(self):
        return [("weight", self.weight), ("bias", self.bias)]

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Scale(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))

    def forward(self, weight):
        return weight * self.factor


LAYERS = {"twin": lambda: MetaLinear(3, 3).double(), "old style": OldStyle}
PUTS = {
    "weight_norm": (lambda m: parametrizations.weight_norm(m), 3),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m), 2),
    "orthogonal": (lambda m: parametrizations.orthogonal(m), 2),
    "parametrization": (lambda m: parametrize.register_parametrization(m, "weight", Scale()), 3),
    "two parametrizations": (
        lambda m: [parametrize.register_parametrization(m, "weight", Scale()) for _ in range(2)],
        4,
    ),
    "old weight_norm": (lambda m: nn.utils.weight_norm(m), 3),
    "old spectral_norm": (lambda m: nn.utils.spectral_norm(m), 2),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), 2),
}


@pytest.mark.parametrize("updated", [False, True], ids=["leaves", "updated"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("put", PUTS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_torch_puts_on_a_layer_keeps_its_tensors_parameters(put, layer, updated):
    torch.manual_seed(1)
    net = MetaSequential(LAYERS[layer]())
    plain = nn.Sequential(nn.Linear(3, 3).double())
    plain.load_state_dict(net.state_dict())
    if updated:
        grads = [torch.ones_like(p) for p in net.parameters()]
        net.update_params(0.01, source_params=grads)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.01
    act, number = PUTS[put]
    for module in (plain, net):
        torch.manual_seed(2)
        act(module[0])
        module.eval()
    names = [name for name, _ in net.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in plain.named_parameters()) and len(names) == number
    assert set(net.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(net(X), plain(X))

    params = dict(plain.named_parameters())
    grads = torch.autograd.grad(plain(X).pow(2).sum(), list(params.values()), create_graph=True)
    stepped = {n: p - 0.01 * g for (n, p), g in zip(params.items(), grads)}
    before = dict(net.named_params())
    found = torch.autograd.grad(net(X).pow(2).sum(), list(before.values()), create_graph=True)
    torch.testing.assert_close(dict(zip(before, found)), dict(zip(params, grads)))
    net.update_params(0.01, source_params=found)
    if put in ("old weight_norm", "old spectral_norm", "prune"):  # these recompute in a hook of forward
        plain.load_state_dict({**net.state_dict()})
        torch.testing.assert_close(net(X), plain(X))
    else:
        torch.testing.assert_close(net(X), functional_call(plain, stepped, X))
    outer = torch.autograd.grad(net(X).sum(), list(before.values()), materialize_grads=True)
    assert all(g.abs().sum() > 0 for g in outer)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("put", ["weight_norm", "orthogonal", "old weight_norm", "old spectral_norm", "prune"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_torch_takes_off_a_layer_is_a_parameter_again(put, layer):
    net = MetaSequential(LAYERS[layer]())
    net.update_params(0.01, source_params=[torch.ones_like(p) for p in net.parameters()])
    PUTS[put][0](net[0])
    net.update_params(0.01, source_params=[torch.ones_like(p) for p in net.parameters()])
    expected = net(X).detach()
    if put.startswith("old"):
        {"weight": nn.utils.remove_weight_norm, "spectral": nn.utils.remove_spectral_norm}[put[4:].split("_")[0]](
            net[0]
        )
    elif put == "prune":
        prune.remove(net[0], "weight")
    else:
        parametrize.remove_parametrizations(net[0], "weight")
    assert sorted(name for name, _ in net.named_parameters()) == ["0.bias", "0.weight"]
    assert sorted(net.state_dict()) == ["0.bias", "0.weight"]
    if put != "old spectral_norm":  # whose power iteration takes another step in train mode
        torch.testing.assert_close(net(X).detach(), expected)


def test_register_parameter_takes_any_tensor():
    net, leaf = MetaModule(), torch.ones(2, requires_grad=True)
    carrying = leaf * 2
    net.register_parameter("leaf", leaf)
    net.register_parameter("carrying", carrying)
    net.register_parameter("frozen", torch.zeros(1))
    assert net.leaf is leaf and net.carrying is carrying and not net.frozen.requires_grad
    assert [n for n, _ in net.named_parameters()] == list(net.state_dict()) == ["leaf", "carrying", "frozen"]
    for name, error in (("a.b", KeyError), ("", KeyError), ("forward", KeyError), (3, TypeError)):
        with pytest.raises(error):
            net.register_parameter(name, torch.ones(1))
    assert [n for n, _ in net.named_parameters()] == ["leaf", "carrying", "frozen"]


@pytest.mark.parametrize("updated", [False, True])
def test_conversion_to_synchronized_batch_normalization(updated):
    net = to_meta(body())
    start = list(net.parameters())
    if updated:
        inner(net)
    before = dict(net.named_params())
    converted = meta_module.MetaSyncBatchNorm.convert_sync_batchnorm(net)
    assert converted is net and type(net[1]) is meta_module.MetaSyncBatchNorm
    assert all(net.get_parameter(name) is tensor for name, tensor in before.items())
    loss_of(net.eval()).backward()
    assert all(p.grad is not None for p in start)
    alone = to_meta(nn.BatchNorm1d(2))
    alone.weight = alone.weight * 2
    other = meta_module.MetaSyncBatchNorm.convert_sync_batchnorm(alone)
    assert type(other) is meta_module.MetaSyncBatchNorm and other.weight is alone.weight
    assert other.weight.grad_fn is not None


# ---- classes with a base before nn.Module ----------------------------------------------------------------------------


class Slotted:
    __slots__ = ("note",)


class Protocolled(typing.Protocol):
    def forward(self, x): ...


Item = typing.TypeVar("Item")


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))

    def forward(self, x):
        return x * self.w


class Abstract(abc.ABC, Weighted): ...


class Generic(typing.Generic[Item], Weighted): ...


class OfProtocol(Protocolled, Weighted):
    def __init__(self):
        Weighted.__init__(self)

    def forward(self, x):
        return x * self.w


class WithSlots(Slotted, Weighted): ...


class AbstractLinear(abc.ABC, nn.Linear):
    def __init__(self):
        super().__init__(3, 3, dtype=torch.float64)


EARLIER_BASES = [Abstract, Generic, OfProtocol, WithSlots, AbstractLinear]


@pytest.mark.parametrize("kind", EARLIER_BASES)
def test_a_class_with_a_base_before_module_is_converted(kind):
    plain = nn.Sequential(nn.Linear(3, 3).double(), kind(), nn.Linear(3, 1).double())
    net = to_meta(plain)
    assert isinstance(net[1], kind) and isinstance(net[1], MetaModule)
    same(net(X), plain(X))
    start = list(net.parameters())
    inner(net)
    assert all(p.grad_fn is not None for p in net.parameters())
    loss_of(net).backward()
    assert all(p.grad is not None for p in start)
    assert type(copy.deepcopy(net)[1]) is type(net[1])
    mixed = MetaSequential(MetaLinear(3, 3), kind(), MetaLinear(3, 1)).double()
    assert all(p.grad_fn is not None for p in inner(mixed).parameters())


class Final(Weighted):
    """A class that no other can be made from."""

    def __init_subclass__(cls):
        raise TypeError("final")


def test_what_cannot_be_converted_is_refused_before_anything_changes():
    plain = nn.Sequential(nn.Linear(3, 3), Final(), nn.Linear(3, 1)).double()
    with pytest.raises(TypeError, match="no meta class can be made of Final: final"):
        to_meta(plain, inplace=True)
    assert [type(part) for part in plain] == [nn.Linear, Final, nn.Linear]
    assert type(plain) is nn.Sequential
    net = MetaSequential(nn.Linear(3, 3), MetaLinear(3, 3), Final(), nn.Linear(3, 1)).double()
    before = snapshot(net)
    for act in (
        lambda: inner(net),
        lambda: net.set_params({name: tensor * 2 for name, tensor in net.named_params()}),
        lambda: net.copy(copy.deepcopy(net)),
    ):
        with pytest.raises(TypeError, match="no meta class can be made of Final"):
            act()
        unchanged(net, before)
        assert [type(part) for part in net] == [nn.Linear, MetaLinear, Final, nn.Linear]


# ---- moves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updated", [False, True])
def test_a_move_never_takes_parameters_from_other_threads(updated):
    net = to_meta(simple())
    if updated:
        inner(net)
    seen = []

    def look(tensor):
        thread = threading.Thread(target=lambda: seen.append((len(net.state_dict()), net(X).shape)))
        thread.start()
        thread.join()
        return tensor

    net._apply(look)
    assert len(seen) >= 4 and set(seen) == {(4, (8, 1))}


def test_an_apply_of_ones_own():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.layer = nn.Parameter(torch.ones(1)), nn.Linear(3, 1)

        def _apply(self, fn, *args, **kwargs):
            self.seen, self.cache = list(self._parameters), fn(self.w.detach())
            return super()._apply(fn, *args, **kwargs)

        def forward(self, x):
            return self.layer(x) * self.w

    net = to_meta(Reads())
    leaf = net.w
    net.double()
    assert net.seen == ["w"] and net.cache.dtype == torch.float64 and net.w is leaf and net.w.is_leaf
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    start = list(net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner(net).float()
    assert all(p.dtype == torch.float32 and p.grad_fn is not None for p in net.parameters())
    net(X.float()).sum().backward()
    assert all(p.grad is not None for p in start)


# ---- the calls of the reweighting family's scripts -------------------------------------------------------------------


def test_the_calls_of_older_scripts():
    net = to_meta(simple())
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    same(list(net.params()), list(net.parameters()))
    for found in (net.named_params(net), net.named_params(net, None, ""), net.named_params(curr_module=net)):
        assert [name for name, _ in found] == names
    memo = {net[0].weight}
    assert [name for name, _ in net.named_params(net, memo, "p")] == ["p." + name for name in names[1:]]
    assert memo == set(net.parameters()) and not list(net.named_params(net, memo))
    assert [name for name, _ in net.named_params(net[0])] == ["weight", "bias"]
    for bad in (("p",), (net, "p"), (net, [])):
        with pytest.raises(TypeError, match="a module and a set are accepted"):
            net.named_params(*bad)
    zero = torch.zeros(4).double()
    for number, set_it in enumerate(
        (
            lambda t: net.set_param(net, "0.bias", t),
            lambda t: net.set_param(name="0.bias", param=t),
            lambda t: net.set_param(curr_mod=net, name="0.bias", param=t),
            lambda t: net.set_param(net[0], "bias", t),
            lambda t: net.set_param("0.bias", t),
        )
    ):
        tensor = zero + number
        set_it(tensor)
        assert net[0].bias is tensor
    for bad in (("0.bias", zero, zero), (net, "0.bias"), (net, 3, zero), ("0.bias",)):
        with pytest.raises(TypeError):
            net.set_param(*bad)
    with pytest.raises(TypeError, match="curr_mod int"):
        net.set_param("0.bias", zero, curr_mod=3)
    net.set_param("0.bias", torch.zeros(4, dtype=torch.float64, requires_grad=True))
    inner(net)
    values = net.state_dict()
    net.update_params(0, detach=True)
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())
    same(net.state_dict(), values)
    grads = [torch.ones_like(p) for p in net.parameters()]
    for bad in ((0.1, grads), (0.1, 1), (0.1, False, grads, None)):
        with pytest.raises(TypeError, match="bools are accepted"):
            net.update_params(*bad)


def test_a_layer_called_params_is_not_hidden():
    class Holder(MetaModule):
        def __init__(self):
            super().__init__()
            self.params = MetaLinear(2, 1)

    assert isinstance(Holder().params, MetaLinear)


def test_named_leaves_of_a_subclass_are_parameters():
    class Own(MetaModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.zeros(3))
            self.w.requires_grad_()
            self.v = to_var(torch.zeros(3))
            self.register_buffer("statistic", torch.zeros(1))

        def named_leaves(self):
            return [("w", self.w), ("v", self.v)]

        def forward(self, x):
            return x * self.w + self.v

    for net in (Own(), nn.Sequential(Own())[0], MetaSequential(Own())[0]):
        grads = [torch.ones(3), torch.ones(3)]
        net.update_params(0.5, source_params=grads)
        same([net.w, net.v], [torch.full((3,), -0.5)] * 2)
        assert [name for name, _ in net.named_params()] == ["w", "v"]
        assert list(net.state_dict()) == ["w", "v", "statistic"]
    assert [name for name, _ in MetaLinear(2, 1).named_leaves()] == ["weight", "bias"]


def test_a_reweighting_step_as_the_scripts_write_it():
    """Meta-Weight-Net's step: a virtual update, the weighting net's gradient through it, the real update."""
    model, weighting = MetaSequential(OldStyle(), nn.Tanh(), OldStyle()), to_meta(nn.Linear(1, 1).double())
    plain = copy.deepcopy(weighting)
    optimizer = torch.optim.SGD(model.params(), 0.1)
    virtual = copy.deepcopy(model)
    cost = (virtual(X) - Y).pow(2).mean(1, keepdim=True)
    virtual.zero_grad()
    grads = torch.autograd.grad((weighting(cost.detach()) * cost).mean(), virtual.params(), create_graph=True)
    virtual.update_params(lr_inner=0.1, source_params=grads)
    (virtual(X) - Y).pow(2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in weighting.params())

    params = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_params(model)}
    cost = (functional_call(model, params, X) - Y).pow(2).mean(1, keepdim=True)
    grads = torch.autograd.grad((plain(cost.detach()) * cost).mean(), list(params.values()), create_graph=True)
    stepped = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads)}
    (functional_call(model, stepped, X) - Y).pow(2).mean().backward()
    for found, expected in zip(weighting.params(), plain.params()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-14)
    before = [p.detach().clone() for p in model.params()]
    (model(X) - Y).pow(2).mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(before, model.params()))


# ---- recomputation, copies, step sizes -------------------------------------------------------------------------------


def through(forward):
    net = to_meta(simple())
    start = list(net.parameters())
    for _ in range(2):
        loss = F.mse_loss(forward(net), Y)
        net.update_params(0.5, source_params=torch.autograd.grad(loss, list(net.parameters()), create_graph=True))
    return net, start, F.mse_loss(forward(net), Y)


def by_arguments(net):
    return checkpoint(lambda p, x: functional_call(net, p, (x,)), dict(net.named_params()), X, use_reentrant=False)


def test_checkpointing_through_an_inner_loop():
    _, start, loss = through(lambda net: net(X))
    expected = torch.autograd.grad(loss, start)
    _, start, loss = through(by_arguments)
    torch.testing.assert_close(torch.autograd.grad(loss, start), expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="was replaced since.*functional_call"):
        _, start, loss = through(lambda net: checkpoint(net, X, use_reentrant=False))
        torch.autograd.grad(loss, start)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("restore", ["set_params", "load_state_dict", "update"])
def test_a_recomputation_after_the_parameters_were_replaced_is_refused(restore, reentrant):
    net = to_meta(simple())
    start, saved = dict(net.named_params()), copy.deepcopy(net.state_dict())
    inner(net)
    x = X.clone().requires_grad_()
    query = F.mse_loss(checkpoint(net, x, use_reentrant=reentrant), Y)
    {"set_params": lambda: net.set_params(start), "load_state_dict": lambda: net.load_state_dict(saved),
     "update": lambda: inner(net)}[restore]()  # fmt: skip
    with pytest.raises(RuntimeError, match="was replaced since"):
        query.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_without_a_replacement_in_between_works(reentrant):
    net = to_meta(simple())
    inner(net).detach_params()
    F.mse_loss(net(X), Y).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    F.mse_loss(checkpoint(net, X.clone().requires_grad_(), use_reentrant=reentrant), Y).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def test_a_buffer_in_two_places_is_copied_to_both():
    class Tie(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(3), nn.Linear(3, 1)
            self.b.register_buffer("mean", self.a.running_mean)

    one, two = to_meta(Tie()), to_meta(Tie())
    two.a(X.float())
    one.copy(two)
    assert one.a.running_mean is one.b.mean and one.b.mean is not two.b.mean
    same(one.b.mean, two.a.running_mean)


def test_an_update_of_nothing_and_odd_step_sizes():
    net = to_meta(nn.Linear(3, 1))
    net.set_params({name: tensor.detach() for name, tensor in net.named_params()})
    with pytest.raises(ValueError, match="no parameter requires grad"):
        net.update_params(0.1, source_params=list(net.parameters()))
    net.requires_grad_()
    before = snapshot(net)
    for step, message in ((torch.tensor(0.1j), "torch.complex64"), (0.1j, "0.1j"), (torch.tensor(True), "torch.bool")):
        with pytest.raises(TypeError, match=message):
            net.update_params(step, source_params=list(net.parameters()))
    unchanged(net, before)
    MetaSequential(nn.Tanh()).update_params(0.1, source_params=[])  # nothing to update is no error


# ---- compilers, tracers, other libraries -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["assign", "set_param", "set_params", "update_params"])
def test_compiled_replacements(how, backend):
    def step(net, x):
        if how == "assign":
            net[0].weight = net[0].weight * 2
        elif how == "set_param":
            net.set_param("0.weight", net[0].weight * 2)
        elif how == "set_params":
            net.set_params({"0.weight": net[0].weight * 2})
        else:
            net.update_params(0.1, source_params=[p * 2 for p in net.parameters()])
        return net(x)

    expected, net = to_meta(simple()), to_meta(simple())
    start = list(net.parameters())
    torch._dynamo.reset()
    out = torch.compile(step, fullgraph=True, backend=backend)(net, X)
    torch.testing.assert_close(out, step(expected, X))
    torch.testing.assert_close(net.state_dict(), expected.state_dict())
    assert net[0].weight.grad_fn is not None
    out.sum().backward()
    assert start[0].grad is not None


class Traced(MetaModule):
    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(1)), MetaLinear(3, 1)

    def forward(self, x):
        return self.scale * torch.tanh(self.layer(x))


def test_symbolic_trace():
    for net in (to_meta(nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 1, 1)))[:1], Traced()):
        x = X.float()
        graph = torch.fx.symbolic_trace(net)
        assert any(node.op == "call_module" for node in graph.graph.nodes), "a twin is one node, as a layer of torch"
        same(graph(x), net(x))
        traced = {id(p) for p in graph.parameters()}
        assert all(id(p) in traced for p in net.parameters())


def test_export_is_refused_at_the_call():
    with pytest.raises(Exception, match="torch.export does not take Meta"):
        torch.export.export(to_meta(simple()).eval(), (X,))


def test_clones_as_learn2learn_makes_them():
    """learn2learn.clone_module: a shallow copy whose dicts are copied, the parameters cloned with their graph."""

    def clone_module(module, memo):
        clone = module.__new__(type(module))
        clone.__dict__ = module.__dict__.copy()
        clone._parameters = clone._parameters.copy()
        clone._buffers = clone._buffers.copy()
        clone._modules = clone._modules.copy()
        for name, param in module._parameters.items():
            if param is not None:
                memo.setdefault(param, param.clone())
                clone._parameters[name] = memo[param]
        for name, buffer in module._buffers.items():
            if name in clone._buffers and buffer is not None and name not in module._parameters:
                clone._buffers[name] = memo.setdefault(buffer, buffer.clone())
        for name, child in clone._modules.items():
            clone._modules[name] = clone_module(child, memo)
        return clone

    net = to_meta(simple())
    before = snapshot(net)
    clone = clone_module(net, {})
    unchanged(net, before)
    assert all(p.grad_fn is not None for p in clone.parameters())
    loss_of(clone).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_differentiable_optimizers_of_torchopt(name):
    """By its functional side: its MetaSGD and the like take nothing but a true dict for a module's `_parameters`."""
    torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")

    def adapted(net, start, loss, put):
        optimizer, params = torchopt.FuncOptimizer(getattr(torchopt, name)(lr=0.1)), start
        for _ in range(2):
            params = optimizer.step(loss(params), params)
            put(params)
        return torch.autograd.grad(loss(params), list(start.values()))

    net, plain = to_meta(simple()), simple()
    found = adapted(net, dict(net.named_params()), lambda params: loss_of(net), net.set_params)
    loss = lambda params: F.mse_loss(functional_call(plain, params, X), Y)  # noqa: E731
    expected = adapted(plain, dict(plain.named_parameters()), loss, lambda params: None)
    torch.testing.assert_close(found, expected)


def test_updates_written_into_the_parameters_of_each_module():
    """As differentiable optimizers do that keep each module's `_parameters`."""
    net = to_meta(simple())
    start = list(net.parameters())
    containers = [part._parameters for part in net.modules()]
    copies = [container.copy() for container in containers]
    assert [set(c) for c in copies] == [set(c) for c in containers] and all(type(c) is dict for c in copies)
    for container in containers:
        container.update((name, tensor * 2) for name, tensor in container.items())
    same([p.detach() for p in net.parameters()], [2 * p.detach() for p in start])
    loss_of(net).backward()
    assert all(p.grad is not None for p in start)
