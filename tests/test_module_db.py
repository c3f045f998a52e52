"""Torch's own module database: every entry with parameters, in train and eval, float32 and float64."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import meta_module
from meta_module import MetaModule, to_meta

pytest.importorskip("expecttest", reason="torch.testing._internal needs the package expecttest")
common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="this torch is installed without its module database"
)

# Entries that are not compared, with the reason. Empty: none is left out.
LEFT_OUT: dict[str, str] = {}

# Entry and dtype: number of cases that were compared.
COMPARED: dict[str, int] = {}

ENTRIES = [(info, dtype) for info in common_modules.module_db for dtype in (torch.float32, torch.float64)]


def inputs_of(info, dtype, training):
    torch.manual_seed(0)
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def build(cls, sample, dtype, training):
    torch.manual_seed(1)
    arguments = sample.constructor_input
    return cls(*arguments.args, **arguments.kwargs).to(dtype).train(training)


def fresh(value):
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def run(module, sample):
    """Output and parameter gradients; each run on its own copy of the inputs, from the same seed (dropout)."""
    args, kwargs = tree_map(fresh, (sample.forward_input.args, sample.forward_input.kwargs))
    torch.manual_seed(2)
    output = module(*args, **kwargs)
    leaves = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    loss = sum((t * t).sum() for t in leaves)
    params = [p for p in module.parameters() if p.requires_grad]
    return output, torch.autograd.grad(loss, params, allow_unused=True) if leaves else []


def same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("info", "dtype"), ENTRIES, ids=[f"{i.name}-{str(d)[6:]}" for i, d in ENTRIES])
@pytest.mark.filterwarnings("ignore")
def test_meta_equals_plain(info, dtype):
    compared = 0
    for training in (True, False):
        for sample in inputs_of(info, dtype, training):
            plain = build(info.module_cls, sample, dtype, training)
            if not list(plain.parameters()):
                continue
            if compared % 2:  # the twin and to_meta take turns
                meta = build(getattr(meta_module, f"Meta{info.module_cls.__name__}"), sample, dtype, training)
            else:
                meta = to_meta(plain)
            assert list(meta.state_dict()) == list(plain.state_dict())
            output, grads = run(plain, sample)
            found, found_grads = run(meta, sample)
            same(found, output)
            same(found_grads, grads)
            assert isinstance(meta, MetaModule)
            assert [n for n, _ in meta.named_parameters()] == [n for n, _ in plain.named_parameters()]
            assert [n for n, _ in meta.named_buffers()] == [n for n, _ in plain.named_buffers()]
            assert list(meta.state_dict()) == list(plain.state_dict())
            same(meta.state_dict(), plain.state_dict())
            assert not any(vars(part)["_parameters"] for part in meta.modules())
            compared += 1
    COMPARED[f"{info.name} {dtype}"] = compared


def test_the_database_was_compared():
    """Runs last: the numbers behind the claim, so that an empty sweep cannot pass for a full one."""
    if len(COMPARED) < len(ENTRIES):
        pytest.skip("only a part of the database was selected")
    assert not LEFT_OUT
    with_parameters = {name for name, number in COMPARED.items() if number}
    print(f"{sum(COMPARED.values())} cases with parameters of {len(with_parameters)} entries")
    assert len(with_parameters) >= 66 and sum(COMPARED.values()) >= 1300
