"""Public signatures are typed: every parameter and every return of what a module names in `__all__`."""

import ast
import importlib
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import meta_training
from gradbuffer.training import options as module
from gradbuffer.training.meta_gradients import DEFAULTS
from gradbuffer.training.options import MetaTrainOptions, training_of
from optimizers import CoordinatewiseLSTM

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / f"{name}.py" for name in ("meta_plots", "meta_training", "optimizees")]
FILES += [
    path
    for folder in ("", "data", "nets", "problems", "training")
    for path in sorted((ROOT / "gradbuffer" / folder).glob("*.py"))
    if path.stem != "__init__"
]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]


def untyped(function, name):
    """Names of what a function does not annotate, a method's `self` and a constructor's return apart."""
    signature = inspect.signature(function)
    lacking = [
        f"{name}({parameter.name})"
        for parameter in signature.parameters.values()
        if parameter.annotation is inspect.Parameter.empty and not ("." in name and parameter.name in ("self", "cls"))
    ]
    if signature.return_annotation is inspect.Signature.empty and not name.endswith(".__init__"):
        lacking.append(f"{name} ->")
    return lacking


def public_functions(value, name):
    """(function, name) of a function, or of a class's constructor, `__call__`, public methods and properties."""
    if inspect.isclass(value):
        for own, member in vars(value).items():
            member = (
                member.fget if isinstance(member, property) else inspect.unwrap(getattr(member, "__func__", member))
            )
            # what `dataclass` and `NamedTuple` make has annotations of its own, or none of ours
            if inspect.isfunction(member) and member.__qualname__ == f"{value.__qualname__}.{own}":
                if own in ("__init__", "__call__") or not own.startswith("_"):
                    yield member, f"{name}.{own}"
    elif inspect.isfunction(value):
        yield inspect.unwrap(value), name


@pytest.mark.parametrize("name", MODULES)
def test_public_signatures_are_typed(name):
    if name == "meta_plots":
        pytest.importorskip("matplotlib")
    owner = importlib.import_module(name)
    checked = [
        untyped(function, called)
        for public in owner.__all__
        if getattr(getattr(owner, public), "__module__", None) == name
        for function, called in public_functions(getattr(owner, public), public)
    ]
    assert sum(checked, []) == []


def test_what_lacks_an_annotation_is_found():
    class Half:
        def __init__(self, size): ...

        def step(self, gradient: int, *more): ...

        @property
        def size(self): ...

    found = [lack for function, name in public_functions(Half, "Half") for lack in untyped(function, name)]
    assert found == ["Half.__init__(size)", "Half.step(more)", "Half.step ->", "Half.size ->"]


def takes(name):
    """Whether `training_of` knows an option, whatever it thinks of this value for it."""
    try:
        training_of(CoordinatewiseLSTM(), **{name: object()})
    except (RuntimeError, TypeError, ValueError) as error:
        return "unexpected keyword argument" not in str(error)
    return True


def test_options_of_meta_train_are_those_that_are_taken():
    tree = ast.parse(inspect.getsource(module))
    candidates = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    candidates = (
        {text for text in candidates if text.isidentifier()} | set(DEFAULTS) | set(MetaTrainOptions.__annotations__)
    )
    for owner in (module.Training, module.RandomHorizon, module.Curriculum, module.Validation, module.Checkpoint):
        candidates |= {field.name for field in fields(owner)}
    taken = {name for name in candidates - {"net"} if takes(name)}
    in_its_signature = taken & set(inspect.signature(meta_training.meta_train).parameters)
    assert in_its_signature == {"steps", "unroll", "meta_batch", "iterations", "lr", "seed"}
    assert set(MetaTrainOptions.__annotations__) == taken - in_its_signature
