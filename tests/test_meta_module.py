"""meta_module against torch: each twin, `to_meta`, and what happens to a module in ordinary torch life."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import meta_module
from meta_module import *  # noqa: F403  (as the README tells users to)
from meta_module import MetaLinear, MetaModule, MetaSequential, to_meta, to_var

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the twins -------------------------------------------------------------------------------------------------------


def floats(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def integers(high, *shape):
    return torch.randint(high, shape)


# layer, constructor arguments, inputs; every layer with a forward on a CPU, and the options earlier collections lost
CASES = [
    ("Linear", dict(in_features=3, out_features=2), lambda: (floats(4, 3),)),
    ("Linear", dict(in_features=3, out_features=2, bias=False), lambda: (floats(4, 3),)),
    ("Bilinear", dict(in1_features=3, in2_features=2, out_features=4), lambda: (floats(5, 3), floats(5, 2))),
    ("PReLU", dict(num_parameters=3), lambda: (floats(4, 3),)),
    ("Embedding", dict(num_embeddings=6, embedding_dim=3, padding_idx=1), lambda: (integers(6, 4, 2),)),
    ("EmbeddingBag", dict(num_embeddings=6, embedding_dim=3, mode="sum"), lambda: (integers(6, 4, 2),)),
    ("Conv1d", dict(in_channels=2, out_channels=4, kernel_size=3, groups=2), lambda: (floats(2, 2, 7),)),
    ("Conv2d", dict(in_channels=2, out_channels=3, kernel_size=3, bias=False), lambda: (floats(2, 2, 6, 6),)),
    (
        "Conv2d",
        dict(in_channels=2, out_channels=3, kernel_size=3, padding=1, padding_mode="circular"),
        lambda: (floats(2, 2, 6, 6),),
    ),
    ("Conv3d", dict(in_channels=1, out_channels=2, kernel_size=2, dilation=2), lambda: (floats(1, 1, 4, 4, 4),)),
    ("ConvTranspose1d", dict(in_channels=2, out_channels=3, kernel_size=3), lambda: (floats(2, 2, 5),)),
    (
        "ConvTranspose2d",
        dict(in_channels=2, out_channels=3, kernel_size=3, stride=2, padding=1),
        lambda: (floats(2, 2, 4, 4), [8, 8]),
    ),
    ("ConvTranspose3d", dict(in_channels=1, out_channels=2, kernel_size=2), lambda: (floats(1, 1, 3, 3, 3),)),
    ("BatchNorm1d", dict(num_features=3), lambda: (floats(5, 3),)),
    ("BatchNorm2d", dict(num_features=3, momentum=None), lambda: (floats(4, 3, 2, 2),)),
    ("BatchNorm2d", dict(num_features=3, affine=False), lambda: (floats(4, 3, 2, 2),)),
    ("BatchNorm2d", dict(num_features=3, track_running_stats=False), lambda: (floats(4, 3, 2, 2),)),
    ("BatchNorm3d", dict(num_features=2), lambda: (floats(3, 2, 2, 2, 2),)),
    ("InstanceNorm1d", dict(num_features=3, affine=True), lambda: (floats(2, 3, 5),)),
    ("InstanceNorm2d", dict(num_features=3, affine=True, track_running_stats=True), lambda: (floats(2, 3, 4, 4),)),
    ("InstanceNorm3d", dict(num_features=2, affine=True), lambda: (floats(2, 2, 2, 2, 2),)),
    ("LayerNorm", dict(normalized_shape=(3, 4)), lambda: (floats(2, 3, 4),)),
    ("GroupNorm", dict(num_groups=2, num_channels=4), lambda: (floats(3, 4, 2),)),
    ("RMSNorm", dict(normalized_shape=4), lambda: (floats(3, 4),)),
    ("RNN", dict(input_size=3, hidden_size=4, nonlinearity="relu"), lambda: (floats(5, 2, 3),)),
    ("LSTM", dict(input_size=3, hidden_size=4, num_layers=2, bidirectional=True), lambda: (floats(5, 2, 3),)),
    ("LSTM", dict(input_size=3, hidden_size=4, proj_size=2, bias=False), lambda: (floats(5, 2, 3),)),
    ("GRU", dict(input_size=3, hidden_size=4, batch_first=True), lambda: (floats(2, 5, 3),)),
    ("RNNCell", dict(input_size=3, hidden_size=4), lambda: (floats(2, 3),)),
    ("LSTMCell", dict(input_size=3, hidden_size=4), lambda: (floats(2, 3), (floats(2, 4), floats(2, 4)))),
    ("GRUCell", dict(input_size=3, hidden_size=4), lambda: (floats(2, 3), floats(2, 4))),
    (
        "MultiheadAttention",
        dict(embed_dim=4, num_heads=2, kdim=3, vdim=5),
        lambda: (floats(2, 1, 4), floats(3, 1, 3), floats(3, 1, 5)),
    ),
    ("MultiheadAttention", dict(embed_dim=4, num_heads=2, add_bias_kv=True), lambda: (floats(2, 1, 4),) * 3),
    ("TransformerEncoderLayer", dict(d_model=4, nhead=2, dim_feedforward=6, dropout=0.0), lambda: (floats(3, 2, 4),)),
    (
        "TransformerDecoderLayer",
        dict(d_model=4, nhead=2, dim_feedforward=6, dropout=0.0),
        lambda: (floats(3, 2, 4), floats(2, 2, 4)),
    ),
    (
        "Transformer",
        dict(d_model=4, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=6, dropout=0.0),
        lambda: (floats(3, 2, 4), floats(2, 2, 4)),
    ),
    (
        "AdaptiveLogSoftmaxWithLoss",
        dict(in_features=8, n_classes=6, cutoffs=[2, 4]),
        lambda: (floats(5, 8), integers(6, 5)),
    ),
]
if hasattr(nn, "LinearCrossEntropyLoss"):
    CASES.append(("LinearCrossEntropyLoss", dict(in_features=3, num_classes=4), lambda: (floats(5, 3), integers(4, 5))))

# twins that have no case above, and the test that exercises them instead
ELSEWHERE = {
    "Sequential": "test_containers",
    "ModuleList": "test_containers",
    "ModuleDict": "test_containers",
    "ParameterList": "test_parameter_list_and_dict",
    "ParameterDict": "test_parameter_list_and_dict",
    "SyncBatchNorm": "test_sync_batch_norm (its train mode runs on CUDA only)",
    "RNNBase": "test_bases_without_forward",
    "RNNCellBase": "test_bases_without_forward",
    "TransformerEncoder": "test_stacks_built_from_a_layer",
    "TransformerDecoder": "test_stacks_built_from_a_layer",
}

# torch itself has no second derivative of these on a CPU
FIRST_ORDER_ONLY = {"EmbeddingBag"}

CASE_IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(CASES)]
each_layer = pytest.mark.parametrize(("name", "arguments", "inputs"), CASES, ids=CASE_IDS)


def pair(name, arguments, dtype=torch.float64):
    """The torch layer and its twin, each built from the same seed."""
    torch.manual_seed(1)
    plain = getattr(nn, name)(**arguments, dtype=dtype)
    torch.manual_seed(1)
    return plain, getattr(meta_module, f"Meta{name}")(**arguments, dtype=dtype)


def total(output):
    """A scalar that depends on every floating point entry of whatever a layer returns."""
    if isinstance(output, torch.Tensor):
        return (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).pow(2).sum()
    return sum(total(part) for part in output if part is not None)


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def gradients(module, inputs, **kwargs):
    return torch.autograd.grad(total(module(*inputs)), trainable(module), **kwargs)


def same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert list(left) == list(right)
    for name in left:
        same(left[name], right[name])


def twin_classes():
    return {
        n: c
        for n, c in vars(meta_module).items()
        if inspect.isclass(c) and issubclass(c, MetaModule) and n[:4] == "Meta"
    }


def test_every_layer_of_torch_nn_with_parameters_has_a_twin():
    """A class of torch.nn without a twin must prove that it has no parameters: by being built and showing none."""
    attempts = [(), (1,), (2, 2), (1, None, 0.5), (0.1, 0.2), (1, (1, 1)), (nn.Identity(),)]
    for name, layer in vars(nn).items():
        if not (inspect.isclass(layer) and issubclass(layer, nn.Module)) or layer is nn.Module:
            continue
        twin = getattr(meta_module, f"Meta{layer.__name__}", None)
        if twin is not None:
            assert issubclass(twin, layer) and issubclass(twin, MetaModule), name
            assert f"Meta{layer.__name__}" in meta_module.__all__
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for arguments in attempts:
                try:
                    built = layer(*arguments)
                    break
                except (TypeError, ValueError):
                    continue
            else:
                pytest.fail(f"nn.{name} has no twin and could not be built to see whether it has parameters")
        assert not list(built.parameters()) or layer is nn.DataParallel, f"nn.{name} has parameters and no twin"


def test_every_twin_has_a_case():
    covered = {name for name, *_ in CASES} | set(ELSEWHERE)
    twins = {name[4:] for name in twin_classes()} - {"Module"}
    assert {name for name in twins if not name.startswith("Lazy")} == covered
    for reason in ELSEWHERE.values():
        assert reason.split()[0] in globals()


def test_star_import_brings_our_names_alone():
    names = {}
    exec("from meta_module import *", names)
    names.pop("__builtins__")
    assert set(names) == {"MetaModule", "to_meta", "to_var"} | set(twin_classes())


def test_imports_torch_alone_and_does_nothing():
    code = (
        "import sys, torch; before = set(sys.modules); state = torch.random.get_rng_state(); import meta_module;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "assert new <= {'meta_module'} | set(sys.stdlib_module_names), new;"
        "assert 'torchvision' not in sys.modules; assert torch.equal(state, torch.random.get_rng_state())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@each_layer
def test_twin_equals_torch(name, arguments, inputs):
    plain, meta = pair(name, arguments)
    assert inspect.signature(type(meta)) == inspect.signature(type(plain))
    assert repr(meta).replace("Meta", "") == repr(plain)
    same_state(plain, meta)
    assert [n for n, _ in meta.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in meta.named_buffers()] == [n for n, _ in plain.named_buffers()]
    for part in meta.modules():
        for key, tensor in part._parameters.items():
            assert part._buffers[key] is tensor and not vars(part)["_parameters"]
    inputs = inputs()
    for mode in (True, False):
        plain.train(mode), meta.train(mode)
        same(total(meta(*inputs)), total(plain(*inputs)))
        if trainable(plain):
            same(gradients(meta, inputs), gradients(plain, inputs))
        same_state(plain, meta)  # running statistics


@each_layer
def test_differentiable_update_equals_functional_call(name, arguments, inputs):
    plain, meta = pair(name, arguments)
    if not trainable(plain):
        pytest.skip("no parameters with these arguments")
    inputs = inputs()
    second_order = name not in FIRST_ORDER_ONLY
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        params, buffers = dict(plain.named_parameters()), dict(plain.named_buffers())
        loss = total(functional_call(plain, (params, buffers), inputs))
        grads = torch.autograd.grad(loss, params.values(), create_graph=second_order)
        params = {n: p - 0.01 * g for (n, p), g in zip(params.items(), grads)}
        expected = gradients_of(total(functional_call(plain, (params, buffers), inputs)), list(plain.parameters()))

        start = list(meta.parameters())
        meta.update_params(0.01, source_params=gradients(meta, inputs, create_graph=second_order))
        assert all(p.grad_fn is not None for p in meta.parameters())
        found = gradients_of(total(meta(*inputs)), start)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert any(g.abs().max() > 0 for g in found)


def gradients_of(loss, params):
    return torch.autograd.grad(loss, params, materialize_grads=True)


@each_layer
def test_copies_moves_and_loads_after_an_update(name, arguments, inputs):
    plain, meta = pair(name, arguments)
    inputs = inputs()
    for module in (plain, meta):
        module.eval()
    if trainable(meta):
        meta.update_params(0.1, source_params=gradients(meta, inputs))
    expected = total(meta(*inputs))
    buffer = io.BytesIO()
    torch.save(meta, buffer)
    buffer.seek(0)
    for clone in (copy.deepcopy(meta), pickle.loads(pickle.dumps(meta)), torch.load(buffer, weights_only=False)):
        assert type(clone) is type(meta)
        assert all(p.is_leaf and p.requires_grad for p in clone.parameters())
        assert not {id(t) for t in clone.state_dict(keep_vars=True).values()} & {id(p) for p in meta.parameters()}
        same(total(clone(*inputs)), expected)
    plain.load_state_dict(meta.state_dict())
    same(total(plain(*inputs)), expected)
    meta.float().double()
    assert all(p.grad_fn is not None and p.dtype == torch.float64 for p in meta.parameters())
    meta.load_state_dict(plain.state_dict())
    same(total(meta(*inputs)), expected)
    assert all(p.is_leaf and p.requires_grad for p in meta.parameters())


LAZY = {
    "LazyLinear": (dict(out_features=2), (4, 3)),
    "LazyConv1d": (dict(out_channels=2, kernel_size=2), (2, 3, 5)),
    "LazyConv2d": (dict(out_channels=2, kernel_size=2, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "LazyConv3d": (dict(out_channels=2, kernel_size=2), (2, 3, 4, 4, 4)),
    "LazyConvTranspose1d": (dict(out_channels=2, kernel_size=2), (2, 3, 5)),
    "LazyConvTranspose2d": (dict(out_channels=2, kernel_size=2, bias=False), (2, 3, 5, 5)),
    "LazyConvTranspose3d": (dict(out_channels=2, kernel_size=2), (2, 3, 4, 4, 4)),
    "LazyBatchNorm1d": (dict(), (4, 3)),
    "LazyBatchNorm2d": (dict(), (4, 3, 2, 2)),
    "LazyBatchNorm3d": (dict(), (4, 3, 2, 2, 2)),
    "LazyInstanceNorm1d": (dict(affine=True), (2, 3, 5)),
    "LazyInstanceNorm2d": (dict(affine=True), (2, 3, 4, 4)),
    "LazyInstanceNorm3d": (dict(affine=True), (2, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("converted", [False, True], ids=["twin", "to_meta"])
def test_lazy_layers_become_their_twin_at_the_first_forward(name, converted):
    assert {n for n in vars(nn) if n.startswith("Lazy")} == set(LAZY)
    arguments, shape = LAZY[name]
    x = torch.randn(*shape)
    plain = getattr(nn, name)(**arguments)
    meta = (
        to_meta(getattr(nn, name)(**arguments), inplace=True)
        if converted
        else getattr(meta_module, f"Meta{name}")(**arguments)
    )
    assert list(meta.state_dict()) == list(plain.state_dict())
    torch.manual_seed(2)
    expected = plain(x)
    torch.manual_seed(2)
    same(meta(x), expected)
    assert type(meta) is getattr(meta_module, f"Meta{name[4:]}")
    same_state(plain, meta)
    meta.update_params(0.1, source_params=gradients(meta, (x,), create_graph=True))
    assert all(p.grad_fn is not None for p in meta.parameters())


def test_a_lazy_layer_is_not_updated_before_its_first_forward():
    with pytest.raises(ValueError, match="weight, bias"):
        meta_module.MetaLazyLinear(2).update_params(0.1)


def test_containers():
    layers = [MetaLinear(3, 3), nn.Tanh(), nn.Linear(3, 2)]
    net = MetaSequential(OrderedDict(zip("abc", layers)))
    assert [n for n, _ in net.named_parameters()] == ["a.weight", "a.bias", "c.weight", "c.bias"]
    assert repr(net).startswith("MetaSequential(\n  (a): MetaLinear(")
    both = meta_module.MetaModuleDict({"list": meta_module.MetaModuleList(layers), "net": net})
    assert len(list(both.parameters())) == 4 and len(list(both.named_parameters(remove_duplicate=False))) == 8
    x = torch.randn(5, 3)
    both.update_params(
        0.1, source_params=torch.autograd.grad(net(x).pow(2).sum(), list(both.parameters()), create_graph=True)
    )
    same(net(x), both["list"][2](torch.tanh(both["list"][0](x))))
    assert both["list"][2].weight.grad_fn is not None


def test_parameter_list_and_dict():
    values = [torch.randn(2), torch.randn(3)]
    plain, meta = nn.ParameterList(values), meta_module.MetaParameterList(values)
    same_state(plain, meta)
    assert repr(meta) == "Meta" + repr(plain)
    meta.update_params(0.1, source_params=[p * 2 for p in meta])
    assert all(p.grad_fn is not None for p in meta)
    assert meta[:1][0] is meta[0]
    meta[0] = meta[0] * 3
    meta.append(meta[0] + 1)
    assert meta[0].grad_fn is not None and meta[2].grad_fn is not None and len(list(meta.parameters())) == 3

    entries = {"left": torch.randn(2), "right": torch.randn(3)}
    plain, meta = nn.ParameterDict(entries), meta_module.MetaParameterDict(entries)
    same_state(plain, meta)
    meta["left"] = meta["left"] * 2
    meta["new"] = meta["right"] + 1
    shallow = meta.copy()
    assert type(shallow) is meta_module.MetaParameterDict and list(shallow) == list(meta) == ["left", "right", "new"]
    assert shallow["new"] is meta["new"] and meta["new"].grad_fn is not None
    del meta["new"]
    assert list(meta.state_dict()) == ["left", "right"]
    other = meta_module.MetaParameterDict(entries)
    other.copy(meta)
    same(other["left"], meta["left"])


def test_sync_batch_norm():
    plain, meta = pair("SyncBatchNorm", dict(num_features=3))
    same_state(plain, meta)
    x = floats(4, 3, 2, 2)
    same(meta.eval()(x), plain.eval()(x))
    meta.update_params(0.1, source_params=gradients(meta, (x,), create_graph=True))
    assert meta.weight.grad_fn is not None
    converted = to_meta(nn.SyncBatchNorm.convert_sync_batchnorm(MetaSequential(meta_module.MetaBatchNorm1d(3))))
    assert type(converted[0]) is meta_module.MetaSyncBatchNorm


def test_bases_without_forward():
    for name, arguments in (
        ("RNNBase", dict(mode="GRU", input_size=3, hidden_size=4)),
        ("RNNCellBase", dict(input_size=3, hidden_size=4, bias=True, num_chunks=3)),
    ):
        plain, meta = pair(name, arguments)
        assert list(plain.state_dict()) == list(meta.state_dict())
        meta.update_params(0.1, source_params=list(meta.parameters()))
        assert all(p.grad_fn is not None for p in meta.parameters())


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("given", ["plain", "meta"])
def test_stacks_built_from_a_layer(kind, given):
    arguments = dict(d_model=4, nhead=2, dim_feedforward=6, dropout=0.0, dtype=torch.float64)
    layer = getattr(nn, f"Transformer{kind}Layer")(**arguments)
    plain = getattr(nn, f"Transformer{kind}")(layer, 2)
    meta = getattr(meta_module, f"MetaTransformer{kind}")(layer if given == "plain" else to_meta(layer), 2)
    same_state(plain, meta)
    inputs = (floats(3, 2, 4),) * (1 if kind == "Encoder" else 2)
    same(meta(*inputs), plain(*inputs))
    same(gradients(meta, inputs), gradients(plain, inputs))
    assert not any(vars(part).get("_parameters") for part in meta.modules())
    meta.update_params(0.1, source_params=gradients(meta, inputs, create_graph=True))
    assert all(p.grad_fn is not None for p in meta.parameters())


def test_packed_sequences_and_train_dropout_of_an_lstm():
    plain, meta = pair("LSTM", dict(input_size=3, hidden_size=4, num_layers=2, dropout=0.5))
    packed = nn.utils.rnn.pack_sequence([floats(5, 3), floats(3, 3)])
    torch.manual_seed(3)
    expected = plain(packed)[0].data
    torch.manual_seed(3)
    same(meta(packed)[0].data, expected)


# ---- to_meta ---------------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A third-party module: a parameter of its own, a buffer registered before it, a child, a method called copy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.ones(3))
        self.gain = nn.Parameter(torch.randn(3))
        self.register_parameter("unused", None)
        self.params = nn.ParameterList([nn.Parameter(torch.randn(3))])
        self.layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.PReLU())

    def copy(self):
        return "Gate's own"

    def forward(self, x):
        return self.layer(self.gain * x + self.offset) * self.params[0]


class Tied(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.encoder, self.decoder = layer(3, 3, bias=False), layer(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


def parts_holding_parameters_outside_buffers(module):
    return [name for name, part in module.named_modules() if vars(part)["_parameters"]]


def test_to_meta_of_a_third_party_module():
    plain, x = Gate(), torch.randn(5, 3)
    meta = to_meta(plain)
    assert isinstance(meta, Gate) and isinstance(meta, MetaModule) and type(meta).__name__ == "MetaGate"
    assert type(plain) is Gate and type(plain.layer[0]) is nn.Linear, "the module given is left as it was"
    assert type(to_meta(Gate())) is type(meta), "one class per class"
    assert parts_holding_parameters_outside_buffers(meta) == []
    same_state(plain, meta)
    assert [n for n, _ in meta.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in meta.named_buffers()] == [n for n, _ in plain.named_buffers()]
    same(meta(x), plain(x))
    same(gradients(meta, (x,)), gradients(plain, (x,)))
    same_state(plain, meta)
    assert meta.copy() == "Gate's own"
    other = Gate()
    MetaModule.copy(meta, other)
    same_state(other, meta)
    meta.update_params(0.1, source_params=gradients(meta, (x,), create_graph=True))
    assert meta.params[0].grad_fn is not None and meta.gain.grad_fn is not None


def test_to_meta_in_place_keeps_the_parameters_themselves():
    plain = Gate()
    before = list(plain.parameters())
    assert to_meta(plain, inplace=True) is plain
    assert all(p is q for p, q in zip(plain.parameters(), before, strict=True))
    assert to_meta(plain, inplace=True) is plain, "twice is once"


def test_to_meta_pickles_what_it_made():
    meta = to_meta(Gate())
    meta.update_params(0.1, source_params=list(meta.parameters()))
    x = torch.randn(5, 3)
    for clone in (pickle.loads(pickle.dumps(meta)), copy.deepcopy(meta)):
        assert type(clone) is type(meta)
        same(clone.eval()(x), meta.eval()(x))


def test_to_meta_of_plain_and_meta_mixed():
    plain = nn.Sequential(MetaLinear(3, 3), nn.Sequential(nn.Linear(3, 3), MetaSequential(nn.Linear(3, 1))))
    meta = to_meta(plain)
    assert parts_holding_parameters_outside_buffers(meta) == []
    same_state(plain, meta)
    assert len(list(meta.parameters())) == 6 and list(meta.buffers()) == []


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_parametrized_layers(norm, order):
    def build():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    parametrize = getattr(nn.utils.parametrizations, norm)
    plain = build()
    parametrize(plain[0])
    if order == "before":
        meta = to_meta(plain)
    else:
        meta = to_meta(build())
        torch.manual_seed(5)
        parametrize(meta[0])
        meta.load_state_dict(plain.state_dict())
        meta = to_meta(meta, inplace=True)
    same_state(plain, meta)
    x = floats(4, 3)
    params = dict(plain.named_parameters())
    assert [n for n, _ in meta.named_parameters()] == list(params)
    for module in (plain, meta):
        module.eval()  # spectral norm's power iteration moves on in train mode
    grads = torch.autograd.grad(total(plain(x)), params.values(), create_graph=True)
    updated = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads)}
    expected = gradients_of(total(functional_call(plain, updated, x)), list(params.values()))
    start = list(meta.parameters())
    meta.update_params(0.1, source_params=gradients(meta, (x,), create_graph=True))
    torch.testing.assert_close(gradients_of(total(meta(x)), start), expected, rtol=1e-10, atol=1e-12)
    same(copy.deepcopy(meta)(x), meta(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.jit.script(nn.Linear(2, 2)),
        lambda: nn.DataParallel(nn.Linear(2, 2)),
        lambda: nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")),
    ],
    ids=["scripted", "data parallel", "compiled"],
)
@pytest.mark.filterwarnings("ignore")
def test_to_meta_refuses_wrapped_modules(build):
    with pytest.raises(TypeError, match="convert the module before it is wrapped or compiled"):
        to_meta(build())


def test_to_meta_refuses_names_that_it_would_hide():
    module = nn.Sequential(OrderedDict(first=nn.Identity(), copy=nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"holds \['copy'\]"):
        to_meta(module, inplace=True)
    assert type(module) is nn.Sequential and type(module.copy) is nn.Linear


def test_to_meta_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="module is builtin_function_or_method"):
        to_meta(torch.tanh)


# ---- updates ---------------------------------------------------------------------------------------------------------


class Net(MetaModule):
    """A MetaModule with everything at once: a parameter of its own, plain layers, a norm, a frozen one."""

    def __init__(self, norm=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = MetaLinear(3, 4)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.act = nn.PReLU()
        self.head = nn.Linear(4, 1)
        self.frozen = nn.Parameter(torch.full((1,), 0.5), requires_grad=False)
        self.double()

    def forward(self, x):
        return self.frozen + self.scale * self.head(self.act(self.norm(self.layer(x))))


def unroll_functional(module, params, buffers, batches, steps, lr, first_order):
    """The reference: the same inner loop written with torch.func.functional_call."""
    for x, y in batches[:steps]:
        loss = F.mse_loss(functional_call(module, (params, buffers), x), y)
        learned = {n: p for n, p in params.items() if p.requires_grad}
        grads = torch.autograd.grad(loss, learned.values(), create_graph=not first_order)
        params = {**params, **{n: p - lr * g for (n, p), g in zip(learned.items(), grads)}}
    x, y = batches[-1]
    return F.mse_loss(functional_call(module, (params, buffers), x), y)


def unroll_meta(net, batches, steps, lr, first_order):
    for x, y in batches[:steps]:
        grads = torch.autograd.grad(F.mse_loss(net(x), y), trainable(net), create_graph=not first_order)
        net.update_params(lr, first_order=first_order, source_params=grads)
    x, y = batches[-1]
    return F.mse_loss(net(x), y)


def batches_of(number):
    return [(floats(6, 3), floats(6, 1)) for _ in range(number)]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_inner_updates_equal_functional_call(steps, first_order, mode):
    net = Net().train(mode)
    reference = copy.deepcopy(net)
    batches = batches_of(steps + 1)
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    params, buffers = dict(reference.named_parameters()), dict(reference.named_buffers())
    expected = unroll_functional(reference, params, buffers, batches, steps, lr, first_order)
    start = trainable(net)
    found = unroll_meta(net, batches, steps, lr, first_order)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, [*start, lr]),
        torch.autograd.grad(expected, [*trainable(reference), lr]),
        rtol=1e-11,
        atol=1e-13,
    )
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradcheck_through_inner_updates(steps, first_order, norm):
    """Numerical differentiation of the outer loss; in first order, of the loss the first-order graph stands for."""
    layer = nn.BatchNorm1d(3, track_running_stats=False) if norm == "batch" else nn.GroupNorm(1, 3)
    net = MetaSequential(MetaLinear(2, 3), layer, nn.Tanh(), MetaLinear(3, 1)).double()
    names = [n for n, _ in net.named_params()]
    start = [p.detach().clone().requires_grad_() for p in net.parameters()]
    batches = [(floats(4, 2), floats(4, 1)) for _ in range(steps + 1)]
    recorded = []

    def outer(*params):
        for name, tensor in zip(names, params):
            net.set_param(name, tensor)
        for step, (x, y) in enumerate(batches[:steps]):
            if not first_order:
                grads = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()), create_graph=True)
            else:  # gradients are constants there: the same ones at every point that gradcheck visits
                if len(recorded) == step:
                    recorded.append(torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters())))
                grads = [g + 0 * p for g, p in zip(recorded[step], net.parameters())]
            net.update_params(0.5, first_order=first_order, source_params=grads)
        x, y = batches[-1]
        return F.mse_loss(net(x), y)

    assert torch.autograd.gradcheck(outer, start)
    if norm == "group":  # torch's batch_norm has no third derivative, and its layer_norm's is wrong (torch 2.15)
        assert torch.autograd.gradgradcheck(outer, start)


def test_default_gradients_are_the_parameters_own():
    net = Net()
    x, y = batches_of(1)[0]
    before = {n: p.detach().clone() for n, p in net.named_params()}
    F.mse_loss(net(x), y).backward(create_graph=True)
    grads = {n: p.grad for n, p in net.named_params() if p.requires_grad}
    net.update_params(0.1)
    for name, tensor in net.named_params():
        if name == "frozen":
            assert tensor.is_leaf and not tensor.requires_grad
            same(tensor, before[name])
        else:
            same(tensor, before[name] - 0.1 * grads[name])
            assert tensor.grad_fn is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reading .grad of a tensor that is not a leaf warns
        with pytest.raises(ValueError, match=r"no \.grad for scale, layer\.weight.*source_params"):
            net.update_params(0.1)
        net.zero_grad()


def test_first_order_drops_the_graph_of_the_gradients_alone():
    net = MetaLinear(2, 1, bias=False).double()
    start, x = net.weight, floats(3, 2)
    grad = torch.autograd.grad(net(x).pow(2).sum(), start, create_graph=True)
    net.update_params(0.1, first_order=True, source_params=grad)
    same(torch.autograd.grad(net.weight.sum(), start)[0], torch.ones(1, 2, dtype=torch.float64))


def test_detach_gives_leaves_that_still_train():
    net = Net()
    net.update_params(0.1, source_params=[p * 2 for p in net.parameters()], detach=True)
    assert all(p.is_leaf and p.requires_grad == (n != "frozen") for n, p in net.named_params())
    with torch.no_grad():  # under no_grad there is no graph either, and nothing freezes
        net.update_params(0.1, source_params=[p * 2 for p in net.parameters()])
    assert all(p.is_leaf and p.requires_grad == (n != "frozen") for n, p in net.named_params())


def test_detach_params_keeps_values_ties_leaves_and_requires_grad():
    net = to_meta(Tied())
    net.extra = nn.Parameter(torch.zeros(1))
    net.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    extra = net.extra
    net.set_param("encoder.weight", net.encoder.weight * 2)
    graph = net.encoder.weight
    net.detach_params()
    same(net.encoder.weight.detach(), graph.detach())
    assert net.encoder.weight is net.decoder.weight and net.encoder.weight.requires_grad and net.encoder.weight.is_leaf
    assert net.extra is extra and not net.frozen.requires_grad and graph.grad_fn is not None


def test_tied_weights_stay_tied_and_are_updated_once():
    x = torch.randn(4, 3)
    for net in (to_meta(Tied()), to_meta(Tied(), inplace=True), to_meta(Tied(MetaLinear))):
        assert [n for n, _ in net.named_parameters()] == ["encoder.weight"]
        assert [n for n, _ in net.named_parameters(remove_duplicate=False)] == ["encoder.weight", "decoder.weight"]
        for _ in range(2):
            before = net.encoder.weight
            grad = torch.autograd.grad(net(x).pow(2).sum(), before, create_graph=True)
            net.update_params(0.1, source_params=grad)
            assert net.encoder.weight is net.decoder.weight
            same(net.encoder.weight, before - 0.1 * grad[0])
        for name, tensor in net.named_params():  # snapshot: the loop does not meet the tie again
            net.set_param(name, tensor + 1)
        assert net.encoder.weight is net.decoder.weight
        net.set_param("decoder.weight", net.encoder.weight * 2)
        assert net.encoder.weight is net.decoder.weight
        assert net.double().encoder.weight is net.decoder.weight and net.encoder.weight.grad_fn is not None
        assert copy.deepcopy(net).encoder.weight is not net.encoder.weight
        clone = copy.deepcopy(net)
        assert clone.encoder.weight is clone.decoder.weight
        net.load_state_dict(clone.state_dict())
        assert net.encoder.weight is net.decoder.weight


def test_gradients_by_name_by_position_and_unused():
    def updated(source):
        net = MetaSequential(MetaLinear(2, 2), MetaLinear(2, 1))
        for parameter in net.parameters():
            parameter.data.fill_(1.0)
        net[0].bias.requires_grad_(False)
        net.update_params(0.5, source_params=source(net))
        return [float(p.detach().flatten()[0]) for p in net.parameters()]

    expected = [0.5, 1.0, 0.5, 0.5]
    ones = lambda net: [torch.ones_like(p) for p in net.parameters()]  # noqa: E731
    assert updated(ones) == expected
    assert updated(lambda net: [g for g, p in zip(ones(net), net.parameters()) if p.requires_grad]) == expected
    assert updated(lambda net: iter(ones(net))) == expected
    assert updated(lambda net: dict(zip([n for n, _ in net.named_params()], ones(net)))) == expected
    assert updated(lambda net: [ones(net)[0], None, None, ones(net)[3]]) == [0.5, 1.0, 1.0, 0.5]


def test_sparse_gradients():
    net = meta_module.MetaEmbedding(5, 2, sparse=True)
    plain = nn.Embedding.from_pretrained(net.weight.detach().clone(), freeze=False)
    index = torch.tensor([1, 1, 3])
    for module in (net, plain):
        module(index).pow(2).sum().backward()
    assert net.weight.grad.is_sparse
    net.update_params(0.1)
    torch.testing.assert_close(net.weight, plain.weight - 0.1 * plain.weight.grad)


def test_set_param_takes_the_tensor_itself():
    net = Net()
    replacement = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    net.set_param("layer.weight", replacement)
    assert net.layer.weight is replacement
    plain_head = net.head
    net.set_param("head.weight", net.head.weight * 2)
    assert net.head is plain_head and net.head.weight.grad_fn is not None and isinstance(net.head, MetaLinear)
    assert net.get_parameter("head.weight") is net.head.weight and net.get_parameter("scale") is net.scale


def test_assignment_keeps_the_graph_and_the_type():
    net = MetaLinear(2, 2)
    weight = net.weight
    net.weight = weight - 1
    assert net.weight.grad_fn is not None and [n for n, _ in net.named_parameters()] == ["weight", "bias"]
    net.bias = None
    assert [n for n, _ in net.named_parameters()] == ["weight"] and net(torch.ones(1, 2)).shape == (1, 2)
    net.bias = nn.Parameter(torch.zeros(2))
    assert [n for n, _ in net.named_parameters()] == ["weight", "bias"] and list(net.state_dict()) == ["weight", "bias"]
    del net.bias
    assert [n for n, _ in net.named_parameters()] == ["weight"] and not hasattr(net, "bias")
    net.weight = nn.Identity()
    assert not list(net.parameters()) and isinstance(net.weight, nn.Identity)


def test_copy_takes_values_or_the_tensors_themselves():
    net, other, x = Net(), Net(), floats(6, 3)
    other(x)  # moves other's running statistics
    net.copy(other)
    same_state(net, other)
    assert all(p.is_leaf and p.requires_grad == (n != "frozen") for n, p in net.named_params())
    net.update_params(0.1, source_params=list(net.parameters()))
    graph = net.layer.weight
    kept = graph.detach().clone()
    net.copy(other)
    same(graph.detach(), kept)
    assert net.layer.weight.is_leaf and net.layer.weight is not other.layer.weight
    single = Net().float()
    single.copy(other)
    assert single.layer.weight.dtype == single.norm.running_mean.dtype == torch.float32

    net.copy(other, same_var=True)
    assert net.layer.weight is other.layer.weight and net.norm.running_mean is not other.norm.running_mean
    losses = []
    for _ in range(2):  # two tasks, their graphs alive together
        net.copy(other, same_var=True)
        net.update_params(0.1, source_params=gradients(net, (x,), create_graph=True))
        losses.append(total(net(x)))
    sum(losses).backward()
    kept = other.layer.weight.detach().clone()
    net.copy(other, same_var=True)
    net.copy(Net())  # by value: what was shared is let go, not written to
    same(other.layer.weight.detach(), kept)
    assert other.layer.weight.grad is not None and other.layer.weight.is_leaf


def test_to_var():
    x = torch.arange(3.0) * torch.ones(3, requires_grad=True)
    leaf = to_var(x)
    assert leaf.is_leaf and leaf.requires_grad and leaf.dtype == x.dtype and leaf.device == x.device
    same(leaf.detach(), x.detach())
    assert x.grad_fn is not None
    labels = to_var(torch.tensor([1, 2]), requires_grad=False)
    assert labels.dtype == torch.int64 and not labels.requires_grad


# ---- bad input -------------------------------------------------------------------------------------------------------


def buffers_only():
    module = nn.Module()
    module.register_buffer("weight", torch.ones(4, 3))
    module.register_buffer("bias", torch.ones(4))
    return module


BAD = [
    (lambda n: to_var([1.0]), TypeError, "x is list"),
    (lambda n: to_var(torch.tensor(1)), ValueError, "torch.int64"),
    (lambda n: n.set_param("layer.wieght", torch.ones(4, 3)), ValueError, "'layer.wieght'.*layer.weight"),
    (lambda n: n.set_param("act", torch.ones(1)), ValueError, "'act'"),
    (lambda n: n.set_param(3, torch.ones(1)), TypeError, "name is int"),
    (lambda n: n.set_param("scale", 1.0), TypeError, "'scale' is float"),
    (lambda n: n.set_param("scale", torch.ones(2).double()), ValueError, r"'scale' has shape torch.Size\(\[1\]\)"),
    (lambda n: n.set_param("scale", torch.ones(1)), ValueError, "'scale' has dtype torch.float64.*torch.float32"),
    (lambda n: n.set_param("scale", torch.ones(1, device="meta").double()), ValueError, "'scale' has device cpu.*meta"),
    (lambda n: n.set_param("norm.running_mean", torch.ones(4)), ValueError, "norm.running_mean"),
    (lambda n: setattr(n, "scale", torch.ones(2).double()), ValueError, "'scale' has shape"),
    (lambda n: setattr(n, "scale", "one"), TypeError, "str to 'scale'"),
    (lambda n: n.update_params("0.1"), TypeError, "lr_inner is '0.1'"),
    (lambda n: n.update_params(True), TypeError, "lr_inner is True"),
    (lambda n: n.update_params(float("nan")), ValueError, "lr_inner is nan"),
    (lambda n: n.update_params(torch.ones(2)), ValueError, r"lr_inner has shape \(2,\)"),
    (lambda n: n.update_params(0.1), ValueError, "no .grad for scale, layer.weight"),
    (lambda n: n.update_params(0.1, source_params=[torch.ones(1)]), ValueError, "1 entries; 9 .*or 8"),
    (lambda n: n.update_params(0.1, source_params=torch.ones(9)), TypeError, "source_params is Tensor"),
    (lambda n: n.update_params(0.1, source_params=[1.0] * 9), TypeError, "gradient of 'scale' is float"),
    (
        lambda n: n.update_params(0.1, source_params=[p.float() for p in n.parameters()]),
        ValueError,
        "'scale' has dtype",
    ),
    (lambda n: n.update_params(0.1, source_params=[p[None] for p in n.parameters()]), ValueError, "'scale' has shape"),
    (
        lambda n: n.update_params(0.1, source_params={"scale": n.scale, "x": n.scale}),
        ValueError,
        r"\['x'\].*layer.weight",
    ),
    (lambda n: n.copy({}), TypeError, "other is dict"),
    (lambda n: n.copy(MetaLinear(3, 4)), ValueError, "different names.*act.weight"),
    (lambda n: n.layer.copy(MetaLinear(3, 5)), ValueError, r"'weight' has shape \(5, 3\) in other, \(4, 3\) here"),
    (lambda n: n.layer.copy(MetaLinear(3, 4), same_var=True), ValueError, "'weight' has dtype"),
    (lambda n: n.layer.copy(buffers_only(), same_var=True), ValueError, "'weight' is a buffer in other"),
    (
        lambda n: n.register_buffer("b", torch.ones(1, requires_grad=True), persistent=False),
        ValueError,
        "persistent=False",
    ),
    (
        lambda n: nn.DataParallel(n)._replicate_for_data_parallel() and n._replicate_for_data_parallel(),
        NotImplementedError,
        "Distributed",
    ),
]


@pytest.mark.parametrize(("act", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named_and_changes_nothing(act, error, message):
    net = Net()
    before = {n: (p, p.detach().clone()) for n, p in net.named_params()}
    with pytest.raises(error, match=message):
        act(net)
    for name, tensor in net.named_params():
        assert tensor is before[name][0]
        same(tensor.detach(), before[name][1])


# ---- ordinary torch life ---------------------------------------------------------------------------------------------


def twins():
    """A plain network and its meta version with the same values, and a batch."""
    torch.manual_seed(6)
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.PReLU(), nn.Linear(4, 1)).double()
    return plain, to_meta(plain), floats(8, 3), floats(8, 1)


def updated_with_graph(net, x, y):
    grads = torch.autograd.grad(F.mse_loss(net(x), y), trainable(net), create_graph=True)
    net.update_params(0.1, source_params=grads)
    return net


@pytest.mark.parametrize("assign", [False, True])
def test_loading_right_after_an_update_leaves_the_older_graph_whole(assign):
    plain, net, x, y = twins()
    other = copy.deepcopy(plain)
    start = list(net.parameters())
    expected = torch.autograd.grad(F.mse_loss(updated_with_graph(net, x, y)(x), y), start)
    plain, net, x, y = twins()
    start = list(net.parameters())
    outer = F.mse_loss(updated_with_graph(net, x, y)(x), y)
    for value in other.state_dict().values():
        value.add_(1)
    assert not any(net.load_state_dict(other.state_dict(), strict=True, assign=assign))
    same_state(net, other)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in net.parameters())
    torch.testing.assert_close(torch.autograd.grad(outer, start), expected)
    net.load_state_dict(plain.state_dict(), assign=assign)
    plain.load_state_dict(net.state_dict(), strict=True, assign=assign)
    same_state(net, plain)


def test_loading_keeps_leaves_frozen_and_plain_tensors_trainable():
    net = MetaLinear(2, 2)
    mine = torch.zeros(2, 2, requires_grad=True)
    net.set_param("weight", mine)
    net.bias.requires_grad_(False)
    bias = net.bias
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    net.load_state_dict(state)
    assert net.weight is mine and net.bias is bias and float(mine[0, 0]) == 1
    net.load_state_dict(state, assign=True)
    assert net.weight.requires_grad and not net.bias.requires_grad
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        net.load_state_dict({"weight": torch.ones(3, 2), "bias": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"bias".*Unexpected key.*"bais"'):
        net.load_state_dict({"weight": torch.ones(2, 2), "bais": torch.ones(2)})


def test_state_dict_of_a_graph_is_detached_and_complete():
    plain, net, x, y = twins()
    updated_with_graph(net, x, y)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert net.state_dict()._metadata == plain.state_dict()._metadata
    assert not any(t.requires_grad for t in net.state_dict().values())
    assert net.state_dict(keep_vars=True)["0.weight"] is net[0].weight


@pytest.mark.parametrize("move", ["double", "float", "half", "bfloat16"])
def test_moves_keep_leaves_leaves_and_optimizers_valid(move):
    plain, net, x, _ = twins()
    pairs = [(module, torch.optim.SGD(module.parameters(), lr=0.1)) for module in (plain, net)]
    before = list(net.parameters())
    plain(x).sum().backward(), net(x).sum().backward()
    for module, optimizer in pairs:
        getattr(module, move)()
        optimizer.step()
    assert all(p is q and p.is_leaf and p.requires_grad for p, q in zip(net.parameters(), before, strict=True))
    assert {t.dtype for t in net.parameters()} == {t.dtype for t in plain.parameters()}
    same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
    same_state(net, plain)


def test_running_statistics_move_with_the_weights():
    net = to_meta(nn.BatchNorm1d(3)).to("meta")
    assert {t.device.type for t in net.state_dict(keep_vars=True).values()} == {"meta"}
    net = net.to_empty(device="cpu")
    assert {t.device.type for t in net.state_dict(keep_vars=True).values()} == {"cpu"}
    assert all(p.is_leaf and p.requires_grad for p in net.parameters()) and len(list(net.buffers())) == 3
    with torch.device("meta"):
        assert meta_module.MetaBatchNorm1d(3).weight.is_meta


@pytest.mark.cuda
def test_moves_to_cuda():
    plain, net, x, y = twins()
    before = list(net.parameters())
    net.cuda()
    assert all(p is q and p.is_cuda and p.is_leaf for p, q in zip(net.parameters(), before, strict=True))
    assert all(b.is_cuda for b in net.buffers())
    updated_with_graph(net, x.cuda(), y.cuda()).cpu()
    assert all(p.grad_fn is not None and not p.is_cuda for p in net.parameters())
    lstm = meta_module.MetaLSTM(3, 4, 2).cuda()
    lstm(torch.randn(5, 2, 3, device="cuda"))[0].sum().backward()
    lstm.update_params(0.1)
    lstm(torch.randn(5, 2, 3, device="cuda"))[0].sum().backward()


def test_a_move_carries_the_graph_of_updated_parameters():
    _, net, x, y = twins()
    start = list(net.parameters())
    updated_with_graph(net, x, y).float()
    assert all(p.dtype == torch.float32 and p.grad_fn is not None for p in net.parameters())
    net(x.float()).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in start)
    with torch.no_grad():
        net.double()
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("SGD", dict(lr=0.1, momentum=0.9, weight_decay=0.01)), ("Adam", dict(lr=0.01)), ("LBFGS", dict(lr=0.1))],
)
def test_optimizers_train_it_to_the_same_numbers(optimizer, options):
    plain, net, x, y = twins()
    losses = []
    for module in (plain, net):
        opt = getattr(torch.optim, optimizer)(module.parameters(), **options)
        losses.append([])
        for _ in range(5):

            def closure():
                opt.zero_grad()
                loss = F.mse_loss(module(x), y)
                loss.backward()
                return loss

            losses[-1].append(float(opt.step(closure)))
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    same_state(plain, net)


def test_requires_grad_and_zero_grad_and_train():
    _, net, x, y = twins()
    net[0].requires_grad_(False)
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True, True]
    frozen = net[0].weight
    start = list(net.parameters())
    updated_with_graph(net, x, y)
    assert net[0].weight is frozen and net[3].weight.grad_fn is not None
    net.eval()
    assert not any(m.training for m in net.modules()) and net.train()[1].training
    net(x).sum().backward()
    net.zero_grad()
    assert start[-1].grad is not None, "the leaf before the update is not the module's any more"
    net.requires_grad_(False)
    assert all(p.is_leaf and not p.requires_grad for p in net.parameters())
    net.requires_grad_()
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())
    net(x).sum().backward()
    net.zero_grad(set_to_none=False)
    assert all(p.grad.abs().sum() == 0 for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_parameters_and_buffers_with_their_full_signatures():
    plain, net = Gate(), to_meta(Gate())
    net.alias = net.layer
    plain.alias = plain.layer
    for recurse in (True, False):
        for remove_duplicate in (True, False):
            for kind in ("named_parameters", "named_buffers"):
                options = dict(prefix="p", recurse=recurse, remove_duplicate=remove_duplicate)
                assert [n for n, _ in getattr(net, kind)(**options)] == [n for n, _ in getattr(plain, kind)(**options)]
            options = dict(recurse=recurse)
            assert len(list(net.parameters(**options))) == len(list(plain.parameters(**options)))
            assert len(list(net.buffers(**options))) == len(list(plain.buffers(**options)))


def test_what_becomes_a_meta_parameter():
    net = MetaModule()
    net.assigned = nn.Parameter(torch.zeros(1))
    net.register_parameter("registered", nn.Parameter(torch.zeros(2)))
    net.register_parameter("none", None)
    net.register_buffer("trainable", torch.zeros(3, requires_grad=True))
    net.register_buffer("statistic", torch.zeros(4))
    net.register_buffer("cache", torch.zeros(5), persistent=False)
    net.attribute = torch.zeros(6, requires_grad=True)
    assert [n for n, _ in net.named_parameters()] == ["assigned", "registered", "trainable"]
    assert [n for n, _ in net.named_buffers()] == ["statistic", "cache"]
    assert list(net.state_dict()) == ["assigned", "registered", "trainable", "statistic"]
    assert {"assigned", "registered", "trainable", "statistic"} <= set(net._buffers) and net.none is None
    net.statistic = net.statistic + net.assigned  # a buffer stays one, even where it carries a graph
    assert [n for n, _ in net.named_buffers()] == ["statistic", "cache"]
    with pytest.raises(KeyError, match="already exists"):
        net.register_buffer("attribute", torch.zeros(1))
    with pytest.raises(KeyError, match="already exists"):
        net.register_parameter("statistic", nn.Parameter(torch.zeros(1)))


def test_a_plain_parent_sees_the_meta_parameters():
    net = nn.Sequential(MetaLinear(2, 2), nn.Linear(2, 1))
    assert [n for n, _ in net.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    net.load_state_dict(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).state_dict())
    net[0].update_params(0.1, source_params=list(net[0].parameters()))
    net(torch.ones(1, 2)).sum().backward()
    assert copy.deepcopy(net)[0].weight.is_leaf


def test_dir_and_repr_and_summaries():
    for module in (Net(), to_meta(Gate()), MetaLinear(2, 3)):
        names = dir(module)
        assert {"update_params", "forward"} <= set(names) and set(module._buffers) - {"0"} <= set(names)
    assert repr(MetaLinear(2, 3, bias=False)) == "MetaLinear(in_features=2, out_features=3, bias=False)"

    _, net, x, y = twins()
    rows = []  # what torchsummary and its like do: hooks on every layer, weight.size(), parameter counts
    for name, layer in net.named_modules():
        layer.register_forward_hook(
            lambda m, i, o, n=name: rows.append(
                (n, type(m).__name__, tuple(o.shape), sum(p.numel() for p in m.parameters(False)))
            )
        )
    net(x)
    assert rows[0] == ("0", "MetaLinear", (8, 4), 16) and rows[-1][0] == "" and sum(r[3] for r in rows) == 30
    assert torch.nn.utils.parameters_to_vector(net.parameters()).numel() == 30
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)


def test_hooks_and_apply():
    net = Net()
    net.apply(lambda m: nn.init.constant_(m.weight, 2.0) if isinstance(m, nn.Linear) else None)
    assert float(net.layer.weight[0, 0]) == float(net.head.weight[0, 0]) == 2.0
    seen = []
    net.layer.weight.register_hook(lambda g: seen.append(g.shape))
    net.layer.register_full_backward_hook(lambda m, gi, go: seen.append(len(go)))
    net(floats(4, 3)).sum().backward()
    assert sorted(map(str, seen)) == sorted(["1", str(net.layer.weight.shape)])


def test_functional_call_vmap_grad_and_jvp():
    plain, net, x, y = twins()
    plain.eval(), net.eval()
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    shifted = {n: p.detach() + 0.1 for n, p in params.items()}
    same(functional_call(net, (shifted, buffers), x), functional_call(plain, (shifted, buffers), x))
    assert all(net.get_parameter(n) is p for n, p in params.items()), "functional_call puts everything back"

    def loss(module):
        return lambda p, x, y: F.mse_loss(functional_call(module, p, x), y)

    for transform in (
        lambda f: torch.func.grad(f)(shifted, x, y),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0, 0))(shifted, x[:, None], y[:, None]),
        lambda f: torch.func.jvp(lambda p: f(p, x, y), (shifted,), (shifted,)),
        lambda f: torch.func.hessian(lambda s: f({**shifted, "0.bias": s}, x, y))(shifted["0.bias"]),
    ):
        same(transform(loss(net)), transform(loss(plain)))
    stacked, _ = torch.func.stack_module_state([net, copy.deepcopy(net)])
    assert stacked["0.weight"].shape == (2, 4, 3)
    out = torch.func.vmap(lambda p, b: functional_call(net, (p, b), x))(*torch.func.stack_module_state([net, net]))
    torch.testing.assert_close(out[1], plain(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    plain, net, x, y = twins()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert len(list(compiled.parameters())) == 7 and list(compiled.state_dict()) == [
        "_orig_mod." + k for k in net.state_dict()
    ]
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-12, atol=1e-12)
    start = list(net.parameters())
    for p, q in zip(
        torch.autograd.grad(F.mse_loss(compiled(x), y), start),
        gradients_of(F.mse_loss(plain(x), y), list(plain.parameters())),
    ):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    # parameters that carry a graph: first order, since AOT autograd has no double backward
    net.update_params(0.1, first_order=True, source_params=torch.autograd.grad(F.mse_loss(net(x), y), start))
    expected = gradients_of(F.mse_loss(net(x), y), start)
    torch.testing.assert_close(gradients_of(F.mse_loss(compiled(x), y), start), expected, rtol=1e-10, atol=1e-12)


def test_compile_of_an_lstm():
    plain, meta = pair("LSTM", dict(input_size=3, hidden_size=4))
    x = floats(5, 2, 3)
    torch.testing.assert_close(torch.compile(meta, backend="eager")(x)[0], plain(x)[0])


def ddp_worker(rank, folder):
    """One of two processes: a data-parallel step, and one through an inner update, on half of the batch."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP is to make them equal
    net = to_meta(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()).eval()
    # broadcasting buffers at each forward would write into those the inner step's graph has saved
    ddp = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (3, 1))
    mine = slice(rank * 4, rank * 4 + 4)
    start = list(ddp.parameters())
    values = [p.detach().clone() for p in start]
    F.mse_loss(ddp(x[mine]), y[mine]).backward()
    plain = [p.grad.clone() for p in start]
    ddp.zero_grad()
    grads = torch.autograd.grad(F.mse_loss(net(x[mine]), y[mine]), start, create_graph=True)
    net.update_params(0.1, source_params=grads)
    outer = F.mse_loss(ddp(x[mine]), y[mine])
    outer.backward()
    torch.save([values, plain, [p.grad for p in start]], f"{folder}/rank{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    (values, plain, outer), others = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    torch.testing.assert_close([values, plain, outer], others, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (3, 1))
    net = to_meta(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()).eval()
    names = [n for n, _ in net.named_params()]

    def start_over():
        for name, value in zip(names, values):
            net.set_param(name, value.clone().requires_grad_())
        return list(net.parameters())

    start = start_over()
    torch.testing.assert_close(plain, list(torch.autograd.grad(F.mse_loss(net(x), y), start)))
    expected = []
    for half in (slice(0, 4), slice(4, 8)):
        start = start_over()
        net.update_params(
            0.1, source_params=torch.autograd.grad(F.mse_loss(net(x[half]), y[half]), start, create_graph=True)
        )
        expected.append(torch.autograd.grad(F.mse_loss(net(x[half]), y[half]), start))
    torch.testing.assert_close(outer, [(a + b) / 2 for a, b in zip(*expected)])


def test_docstring_examples_run():
    import doctest

    results = doctest.testmod(meta_module)
    assert results.attempted >= 10 and results.failed == 0


def test_pruning_and_averaging():
    from torch.nn.utils import prune
    from torch.optim.swa_utils import AveragedModel

    plain, net, x, _ = twins()
    for module in (plain, net):
        prune.l1_unstructured(module[0], "weight", amount=0.5)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()]
    same(net(x), plain(x))
    net.update_params(0.1, source_params=gradients(net, (x,), create_graph=True))
    total(net(x)).backward()
    net = twins()[1].eval()
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    same(list(averaged.parameters()), list(net.parameters()))
