"""The laws that torch's own test_optim.py has every optimizer obey, by torch's database `torch.testing._internal.common_optimizers`.

`LearnedOptimizer` stands in it as a further optimizer, with its own options. Not here: what it refuses (foreach, fused,
capturable, differentiable, complex parameters).
"""

import copy
import pickle

import pytest
import torch
from test_learned_optimizer import AdamRule, NormalizedDescent, lstm
from test_learned_optimizer_tensorwise import Signs, mlp, small_fc
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from optimizers import LearnedOptimizer

pytest.importorskip("expecttest", reason="torch.testing._internal needs the package expecttest")
database = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="this torch is installed without its optimizer database"
)


def inputs(device, dtype=None):
    """As torch's functions of that kind: the options that tests run through."""
    more = [
        ("default", {}),
        ("lr", {"lr": 0.1}),
        ("tensor lr", {"lr": torch.tensor(0.1)}),
        ("weight_decay", {"weight_decay": 0.1}),
        ("maximize", {"maximize": True, "weight_decay": 0.1}),
        ("bfloat16 state", {"state_dtype": torch.bfloat16}),
    ]
    return [
        database.OptimizerInput(params=None, kwargs={"net": net(), **options}, desc=f"{net.__name__}, {name}")
        for net in (lstm, AdamRule, NormalizedDescent, mlp, small_fc, Signs)
        for name, options in more
        if "state_dtype" not in options or net in (lstm, AdamRule, NormalizedDescent)
    ]  # tensorwise ones have none


INFO = database.OptimizerInfo(
    LearnedOptimizer,
    optim_inputs_func=inputs,
    supported_impls=(),
    supports_sparse=True,
    supports_complex=False,
    optim_error_inputs_func=database.get_error_inputs_for_all_optims,
)
every_input = pytest.mark.parametrize("given", INFO.optim_inputs_func("cpu"), ids=lambda given: given.desc)


def two_parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(2, 3, dtype=dtype)), nn.Parameter(torch.randn(2, dtype=dtype))]


def closure_of(optimizer, params):
    def closure():
        optimizer.zero_grad()
        loss = (params[0] @ torch.ones(3, dtype=params[0].dtype) + params[1]).square().sum()
        loss.backward()
        return loss

    return closure


def steps(optimizer, params, count):
    closure = closure_of(optimizer, params)
    for _ in range(count):
        closure()
        optimizer.step()


def made(given, params):
    return INFO.optim_cls(params, **given.kwargs)


def equal(ours, theirs):
    return all(map(torch.equal, ours, theirs))


@every_input
@pytest.mark.parametrize("with_copy", ["deepcopy", "pickle", "state_dict", "shallow"])
def test_it_goes_on_alike_from_a_copy(given, with_copy):
    """test_deepcopy_copies_all_public_attrs, test_pickle, test_can_load_older_state_dict, test_state_dict_deterministic and
    test_can_load_from_non_copy… : the copy and the original take the same steps, and neither moves the other."""
    params = two_parameters()
    optimizer = made(given, params)
    steps(optimizer, params, 3)
    if with_copy == "deepcopy":
        twins, other = copy.deepcopy((params, optimizer))
    elif with_copy == "pickle":
        twins, other = pickle.loads(pickle.dumps((params, optimizer)))
    else:
        twins = copy.deepcopy(params)
        other, saved = made(given, twins), optimizer.state_dict()
        other.load_state_dict(copy.deepcopy(saved) if with_copy == "state_dict" else saved)
    public = [name for name in dir(optimizer) if not name.startswith("_")]
    assert public == [name for name in dir(other) if not name.startswith("_")]
    before = copy.deepcopy(twins)
    steps(optimizer, params, 3)
    assert equal(twins, before)
    steps(other, twins, 3)
    assert equal(params, twins)
    torch.testing.assert_close(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)


@every_input
def test_a_step_without_gradients_is_a_no_op(given):
    """test_step_is_noop_when_params_have_no_grad; test_grads_are_never_inplaced_into."""
    params = two_parameters()
    optimizer, before = made(given, params), copy.deepcopy(params)
    optimizer.step()
    assert equal(params, before) and not optimizer.state_dict()["state"]
    closure_of(optimizer, params)()
    versions = [parameter.grad._version for parameter in params]
    optimizer.step()
    assert versions == [parameter.grad._version for parameter in params] and not equal(params, before)


@every_input
def test_a_step_returns_what_its_closure_does(given):
    """test_step_all_hooks and the closures of test_forloop_goes_right_direction: hooks run in their order, around the closure."""
    params, order = two_parameters(), []
    optimizer = made(given, params)
    closure = closure_of(optimizer, params)
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: order.append("global post")),
    ]
    try:
        loss = optimizer.step(lambda: order.append("closure") or closure())
    finally:
        for handle in handles:
            handle.remove()
    assert loss.requires_grad and order == ["global pre", "pre", "closure", "post", "global post"]
    assert optimizer.step() is None


@every_input
def test_state_dict_hooks(given):
    """test_state_dict_pre_hook, …_post_hook, test_load_state_dict_pre_hook_and_prepend, …_post_hook."""
    params, seen = two_parameters(), []
    optimizer = made(given, params)
    steps(optimizer, params, 1)
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append("post") or {**saved, "test": 1})
    saved = optimizer.state_dict()
    assert saved["test"] == 1 and seen == ["pre", "post"]

    def change(_, given):
        seen.append("load pre")
        given["param_groups"][0]["lr"] = 0.002
        return given

    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("second"))
    optimizer.register_load_state_dict_pre_hook(change, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda loaded: loaded.state[params[0]].update(test=torch.ones(())))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002 and optimizer.state[params[0]]["test"] == 1
    assert seen == ["pre", "post", "load pre", "second"]


@every_input
def test_named_parameters_load_by_place(given):
    """test_state_dict_with_cuda…'s and test_can_load_from_to_named_state_dict: with and without names, either way."""
    for named in (True, False):
        source, target = two_parameters(), two_parameters()
        optimizer = made(given, list(zip("ab", source)) if named else source)
        steps(optimizer, source, 2)
        other = made(given, target if named else list(zip("ab", target)))
        with torch.no_grad():
            for parameter, own in zip(target, source):
                parameter.copy_(own)
        other.load_state_dict(optimizer.state_dict())
        for each, params in ((optimizer, source), (other, target)):
            steps(each, params, 2)
        assert equal(source, target)


@every_input
def test_groups_have_their_own_options(given):
    """test_param_groups_lr and test_add_param_group…: a group with lr 0 stays, one that joins later runs."""
    params = two_parameters()
    optimizer = INFO.optim_cls([{"params": params[:1], "lr": 0.0}], **given.kwargs)
    optimizer.add_param_group({"params": params[1:]})
    before = copy.deepcopy(params)
    steps(optimizer, params, 2)
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    assert len(optimizer.param_groups) == 2


@every_input
def test_a_tensor_lr_is_the_number(given):
    """test_tensor_lr."""
    options = {**given.kwargs, "lr": 0.125}
    ours, theirs = two_parameters(), two_parameters()
    for params, lr in ((ours, 0.125), (theirs, torch.tensor(0.125))):
        steps(INFO.optim_cls(params, **{**options, "lr": lr}), params, 3)
    assert equal(ours, theirs)


@every_input
def test_sparse_gradients_equal_dense_ones(given):
    """test_rosenbrock_sparse, as far as it is about sparse gradients."""
    ours, theirs = two_parameters()[:1], two_parameters()[:1]
    grad = torch.tensor([[0.0, 1.0, -2.0], [0.0, 0.0, 0.5]])
    for params, own in ((ours, grad), (theirs, grad.to_sparse())):
        optimizer = made(given, params)
        for _ in range(3):
            params[0].grad = own.clone()
            optimizer.step()
    assert equal(ours, theirs)


@every_input
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_train_and_resume(given, dtype):
    """test_mixed_device_dtype's dtypes, and test_state_dict_deterministic for them."""
    params = two_parameters(dtype)
    optimizer = made(given, params)
    steps(optimizer, params, 2)
    twins = copy.deepcopy(params)
    other = made(given, twins)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, own in ((optimizer, params), (other, twins)):
        steps(each, own, 2)
    assert equal(params, twins) and params[0].dtype == dtype


@every_input
def test_parameters_without_coordinates_and_lists(given):
    """test_peak_memory…'s empty parameters aside: an empty parameter, an iterator, a set's error."""
    params = [*two_parameters(), nn.Parameter(torch.empty(0))]
    optimizer = INFO.optim_cls(iter(params), **given.kwargs)
    params[2].grad = torch.empty(0)
    steps(optimizer, params, 2)
    with pytest.raises(TypeError, match="ordered collections"):
        INFO.optim_cls([{"params": set(params)}], **given.kwargs)


def test_errors_of_the_database():
    """test_errors."""
    cases = INFO.optim_error_inputs_func("cpu", torch.float32)
    for case in cases:
        sample = case.optimizer_error_input
        params = two_parameters() if sample.params is None else sample.params
        expect = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with expect(case.error_type, match=case.error_regex):
            INFO.optim_cls(params, lstm(), **sample.kwargs)
    assert len(cases) >= 5
