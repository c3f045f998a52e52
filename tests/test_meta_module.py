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
    ("MultiheadAttention", dict(embed_dim=4, num_heads=2, kdim=3, vdim=5), lambda: (floats(2, 1, 4), floats(3, 1, 3), floats(3, 1, 5))),
    ("MultiheadAttention", dict(embed_dim=4, num_heads=2, add_bias_kv=True), lambda: (floats(2, 1, 4),) * 3),
    ("TransformerEncoderLayer", dict(d_model=4, nhead=2, dim_feedforward=6, dropout=0.0), lambda: (floats(3, 2, 4),)),
    ("TransformerDecoderLayer", dict(d_model=4, nhead=2, dim_feedforward=6, dropout=0.0), lambda: (floats(3, 2, 4), floats(2, 2, 4))),
    (
        "Transformer",
        dict(d_model=4, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=6, dropout=0.0),
        lambda: (floats(3, 2, 4), floats(2, 2, 4)),
    ),
    ("AdaptiveLogSoftmaxWithLoss", dict(in_features=8, n_classes=6, cutoffs=[2, 4]), lambda: (floats(5, 8), integers(6, 5))),
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
    return {n: c for n, c in vars(meta_module).items() if inspect.isclass(c) and issubclass(c, MetaModule) and n[:4] == "Meta"}


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
    meta = to_meta(getattr(nn, name)(**arguments), inplace=True) if converted else getattr(meta_module, f"Meta{name}")(**arguments)
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
    both.update_params(0.1, source_params=torch.autograd.grad(net(x).pow(2).sum(), list(both.parameters()), create_graph=True))
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
