"""Modules whose parameters can carry a graph: every layer of `torch.nn`, and `to_meta` for any other module.

An `nn.Parameter` is a leaf by definition, so an update `theta - lr * grad` stored in one loses its `grad_fn`, and
the gradient of what was learned with respect to how it was learned is gone. A `MetaModule` keeps the same tensors
as *buffers*, which take any tensor, and shows them to torch as its parameters. Nothing else changes: `MetaLinear` is
`class MetaLinear(MetaModule, nn.Linear)` without a body, so signature, initialization, `forward`, `state_dict` and
`repr` are torch's own.

    net = MetaSequential(MetaLinear(4, 8), nn.Tanh(), MetaLinear(8, 1))    # or to_meta(any_module)
    grads = torch.autograd.grad(loss(net(x)), list(net.parameters()), create_graph=True)
    net.update_params(lr_inner=0.1, source_params=grads)                   # theta - lr * grad, with its grad_fn
    loss(net(x_test)).backward()                                           # reaches the parameters before the update

It does not make torch's kernels twice differentiable where they are not (cuDNN's recurrent layers, for one).
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import copyreg
import functools
import inspect
import math
import numbers
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

# ruff: noqa: F822  (all but the first three are made at the end of this file)
# fmt: off
__all__ = [
    "MetaModule", "to_meta", "to_var",
    "MetaSequential", "MetaModuleList", "MetaModuleDict", "MetaParameterList", "MetaParameterDict",
    "MetaLinear", "MetaBilinear", "MetaPReLU", "MetaEmbedding", "MetaEmbeddingBag", "MetaAdaptiveLogSoftmaxWithLoss",
    "MetaConv1d", "MetaConv2d", "MetaConv3d", "MetaConvTranspose1d", "MetaConvTranspose2d", "MetaConvTranspose3d",
    "MetaBatchNorm1d", "MetaBatchNorm2d", "MetaBatchNorm3d", "MetaSyncBatchNorm",
    "MetaInstanceNorm1d", "MetaInstanceNorm2d", "MetaInstanceNorm3d", "MetaLayerNorm", "MetaGroupNorm", "MetaRMSNorm",
    "MetaRNNBase", "MetaRNN", "MetaLSTM", "MetaGRU", "MetaRNNCellBase", "MetaRNNCell", "MetaLSTMCell", "MetaGRUCell",
    "MetaMultiheadAttention", "MetaTransformer", "MetaTransformerEncoder", "MetaTransformerEncoderLayer",
    "MetaTransformerDecoder", "MetaTransformerDecoderLayer",
    "MetaLazyLinear", "MetaLazyConv1d", "MetaLazyConv2d", "MetaLazyConv3d",
    "MetaLazyConvTranspose1d", "MetaLazyConvTranspose2d", "MetaLazyConvTranspose3d",
    "MetaLazyBatchNorm1d", "MetaLazyBatchNorm2d", "MetaLazyBatchNorm3d",
    "MetaLazyInstanceNorm1d", "MetaLazyInstanceNorm2d", "MetaLazyInstanceNorm3d",
]
# fmt: on


def to_var(x: Tensor, requires_grad: bool = True) -> Tensor:
    """Return a leaf tensor with the values of `x`, on its device and of its dtype.

    Args:
        x: a tensor of any shape; floating point or complex where `requires_grad` is true.
        requires_grad: whether autograd records operations on the result (default: true).

    Returns:
        A leaf of `x`'s shape that shares its memory and carries no graph.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: `x` holds integers or booleans and `requires_grad` is true.

    >>> weights = to_var(torch.zeros(3))
    >>> torch.autograd.grad(weights.sum(), weights)
    (tensor([1., 1., 1.]),)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}; a torch.Tensor is accepted")
    if requires_grad and not (x.is_floating_point() or x.is_complex()):
        raise ValueError(f"x has dtype {x.dtype}; requires_grad=True needs a floating point or complex tensor")
    return x.detach().requires_grad_(requires_grad)


class _MetaParameters(MutableMapping):
    """What torch finds under `_parameters`: the meta-parameters, read from and written to `_buffers`."""

    def __init__(self, module: MetaModule):
        self.module, self.names, self.buffers = module, module._meta_names, module._buffers

    def __contains__(self, name):
        return name in self.names

    def __getitem__(self, name):
        if name not in self.names:
            raise KeyError(name)
        return self.buffers[name]

    def __setitem__(self, name, tensor):
        self.names[name] = None
        self.buffers[name] = tensor

    def __delitem__(self, name):
        del self.names[name]
        tensor = self.buffers.pop(name)
        if tensor is not None and not _is_compiling():
            _history_of(self.module).removed = weakref.ref(tensor)

    discard = __delitem__  # nn.Module.__setattr__ removes names from whatever is not a dict as from a set

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def items(self):  # at each of torch's traversals
        return [(name, self.buffers[name]) for name in self.names]

    def copy(self) -> dict[str, Tensor | None]:
        return dict(self.items())


class _OncePerTensor:
    """`fn`, applied once to each graph-carrying tensor, so that tied ones are still one tensor afterwards."""

    def __init__(self, fn: Callable[[Tensor], Tensor]):
        self.fn, self.done = fn, {}

    def keep(self, moved: Iterable[Tensor | None]) -> None:
        self.done.update((id(tensor), (tensor, tensor)) for tensor in moved if tensor is not None)

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.is_leaf and id(tensor) not in self.done:
            return self.fn(tensor)
        if id(tensor) not in self.done:
            moved = self.fn(tensor)
            if not moved.requires_grad and moved.is_floating_point():  # moved under no_grad
                moved = nn.Parameter(moved)
            self.done[id(tensor)] = (tensor, moved)  # the first keeps its id from being reused
        return self.done[id(tensor)][1]


class MetaModule(nn.Module):
    """An `nn.Module` whose parameters are buffers, so that they may be replaced by tensors that carry a graph.

    Whatever would be a parameter becomes a *meta-parameter*: an `nn.Parameter` that is assigned, a tensor passed to
    `register_parameter`, or to `register_buffer` while it requires grad. It lives in `_buffers` under its own name;
    `parameters()`, `named_parameters()`, `state_dict()` and every tool built on them treat it as the parameter it
    stands for, and `buffers()` leaves it out. A tensor may be assigned at any time: `net.weight = net.weight - g`.

    Plain layers inside a MetaModule work as they are; the first update that reaches one makes it meta.

    >>> class Net(MetaModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.scale = nn.Parameter(torch.ones(1))
    ...         self.layer = MetaLinear(2, 1)
    ...     def forward(self, x):
    ...         return self.scale * self.layer(x)
    >>> net = Net()
    >>> grads = torch.autograd.grad(net(torch.ones(3, 2)).sum(), list(net.parameters()), create_graph=True)
    >>> net.update_params(0.1, source_params=grads)
    >>> net.scale.grad_fn is not None
    True
    """

    _meta_names: dict[str, None]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "named_leaves" in vars(cls):
            _own_leaves.add(cls)

    # ---- torch's view of the meta-parameters -------------------------------------------------------------------

    @property
    def _parameters(self) -> _MetaParameters:
        return _MetaParameters(self)

    @_parameters.setter
    def _parameters(self, parameters: dict) -> None:  # nn.Module.__init__ assigns {} before there are any buffers
        vars(self)["_parameters"] = {}  # stays empty; nn.Module asks whether it is there
        vars(self)["_meta_names"] = {}
        _show_as_layer_of_torch(self)
        for name, tensor in parameters.items():
            self._parameters[name] = tensor

    def __getattr__(self, name: str):
        # torch looks into __dict__["_parameters"] first, empty here; torch 2.6's Dynamo would build the view instead
        held = self.__dict__
        if "_buffers" in held and name in held["_buffers"]:
            tensor = held["_buffers"][name]
            if _is_compiling():
                _check_export(self)
            elif "_history" in held and torch._C._current_graph_task_id() != -1:  # a backward pass is under way
                _check_recomputation(self, name, tensor)
            return tensor
        if "_modules" in held and name in held["_modules"]:
            return held["_modules"][name]
        if name == "params":  # a call of older scripts; a method would hide layers of that name
            return lambda: (tensor for _, tensor in self.named_params())
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: Tensor | None) -> None:
        """Register a parameter as `nn.Module` does; any tensor is accepted, with the graph it carries."""
        if isinstance(param, Tensor) and not isinstance(param, nn.Parameter):
            super().register_parameter(name, None)  # checks the name
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer as `nn.Module` does; one that requires grad is a meta-parameter.

        Raises:
            ValueError: a tensor that requires grad is registered with `persistent=False`.
        """
        trainable = isinstance(tensor, Tensor) and tensor.requires_grad
        if trainable and not persistent:
            raise ValueError(
                f"buffer '{name}' requires grad: a meta-parameter is saved, persistent=False is not accepted"
            )
        super().register_buffer(name, tensor, persistent)
        if trainable:
            self._meta_names[name] = None

    def __setattr__(self, name: str, value) -> None:
        held = vars(self).get("_buffers", {})
        if name not in held or isinstance(value, (nn.Parameter, nn.Buffer, nn.Module)):
            if name == "parametrizations" and isinstance(value, nn.ModuleDict):
                value = _Parametrizations(value)
            elif isinstance(value, nn.Parameter) and name in held and not _is_compiling():
                _remember(self, name, value)
            elif isinstance(value, Tensor) and "_history" in vars(self) and self._history.removed() is value:
                # torch puts a deleted parameter back, under another name
                self.register_parameter(name, value)
                return
            super().__setattr__(name, value)
            return
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"cannot assign {type(value).__name__} to '{name}'; a torch.Tensor or None is accepted")
        if value is not None and name in self._meta_names:
            _check_like(name, value, held[name])
            if not _is_compiling():
                _remember(self, name, value)
        held[name] = value

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the buffers that are not meta-parameters, as `nn.Module.named_buffers`."""

        def members(module):
            metas = vars(module).get("_meta_names", ())
            return [(name, tensor) for name, tensor in module._buffers.items() if name not in metas]

        yield from self._named_members(members, prefix=prefix, recurse=recurse, remove_duplicate=remove_duplicate)

    def get_parameter(self, target: str) -> Tensor:
        """Return the parameter of that dotted name, with the graph it carries."""
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        return owner._parameters[name] if name in owner._parameters else super().get_parameter(target)

    # ---- the updates -------------------------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the parameters, with the graph they carry, as `nn.Module.named_parameters`."""
        parts = () if not _own_leaves else self.modules() if recurse else [self]
        for part in parts:
            if isinstance(part, MetaModule) and type(part).named_leaves is not MetaModule.named_leaves:
                for name, tensor in part.named_leaves():
                    # not what torch computes under that name, from a parametrization or a mask
                    own = isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad
                    held = vars(part).get(name), part._buffers.get(name)
                    if own and name not in part._meta_names and any(tensor is one for one in held):
                        vars(part).pop(name, None)
                        part._parameters[name] = tensor
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def named_leaves(self) -> list[tuple[str, Tensor]]:
        """Return names and tensors of this module's own parameters, those of its parts left out.

        A subclass may override it, as older scripts do: what it names are parameters.
        """
        return [(name, tensor) for name, tensor in self._parameters.items() if tensor is not None]

    def named_params(
        self,
        curr_module: nn.Module | None = None,
        memo: set[Tensor] | None = None,
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Iterate over names and parameters as they are now: `set_param` may be called in the loop.

        Args:
            curr_module: the module whose parameters are meant (default: this one).
            memo: parameters to leave out; those returned are added (default: none).
            prefix, recurse, remove_duplicate: as in `nn.Module.named_parameters`, which sets the order, too.

        Returns:
            An iterator over (name, tensor); the tensors carry whatever graph they have.

        Raises:
            TypeError: an argument of another type.
        """
        module = self if curr_module is None else curr_module
        if not isinstance(module, nn.Module) or not isinstance(memo, (set, type(None))):
            wrong = f"curr_module is {type(module).__name__}, memo {type(memo).__name__}"
            raise TypeError(f"{wrong}; a module and a set are accepted, and prefix, recurse as keywords")
        found = [
            (name, tensor)
            for name, tensor in module.named_parameters(prefix, recurse, remove_duplicate)
            if memo is None or tensor not in memo
        ]
        if memo is not None:
            memo.update(tensor for _, tensor in found)
        return iter(found)

    def set_param(
        self, name: str, tensor: Tensor | None = None, param: Tensor | None = None, curr_mod: nn.Module | None = None
    ) -> None:
        """Put `tensor` itself, with its graph and its `requires_grad`, in the place of a parameter.

        Every other name of a tied parameter follows. To set many, `set_params` is faster. Older scripts' calls,
        `set_param(module, name, tensor)` and the keyword `param` for `tensor`, are accepted as well.

        Args:
            name: dotted name as in `named_params()`.
            tensor: of the parameter's shape, dtype and device.
            param: the same.
            curr_mod: the module in which the parameter has that name (default: this one).

        Raises:
            ValueError: no parameter has that name, or shape, dtype or device differ.
            TypeError: `tensor` is not a tensor.
        """
        if isinstance(name, nn.Module):
            curr_mod, name, tensor, param = name, tensor, param, None
        root = self if curr_mod is None else curr_mod
        if not isinstance(name, str) or not isinstance(root, nn.Module):
            wrong = f"name is {type(name).__name__}, curr_mod {type(root).__name__}"
            raise TypeError(f"{wrong}; a str and an nn.Module are accepted")
        if tensor is not None and param is not None:
            raise TypeError(f"two tensors for '{name}', as tensor and as param; one of them is accepted")
        tensor = param if tensor is None else tensor
        current = _find(root, name)
        _check_tensor(name, tensor, current)
        places = [
            (module, last)
            for module in dict.fromkeys([*self.modules(), *(() if root is self else root.modules())])
            for last, held in (module._buffers if isinstance(module, MetaModule) else module._parameters).items()
            if held is current and last in module._parameters
        ]
        _put([(places, tensor)], given=True)

    def set_params(self, params: Mapping[str, Tensor]) -> None:
        """Put many tensors in the places of parameters, each as `set_param` does, all of them or none.

        Args:
            params: tensors by the names of `named_params()`, such as the start of an inner loop. Parameters that it
                does not name stay as they are; every other name of a tied parameter follows.

        Raises:
            TypeError: `params` is not a mapping of names to tensors.
            ValueError: a name that no parameter has, or a shape, dtype or device that differs.

        >>> net = MetaLinear(2, 1)
        >>> start = dict(net.named_params())
        >>> net.update_params(0.1, source_params=list(net.parameters()))
        >>> net.set_params(start)
        >>> net.weight is start["weight"]
        True
        """
        if not isinstance(params, Mapping):
            raise TypeError(f"params is {type(params).__name__}; a dict of tensors by name is accepted")
        current = dict(self.named_parameters(remove_duplicate=False))
        for name, tensor in params.items():
            if name not in current:
                _find(self, name)
            _check_tensor(name, tensor, current[name])
        new = {current[name]: tensor for name, tensor in params.items()}
        tied = [name for name, tensor in params.items() if new[current[name]] is not tensor]
        if tied:
            raise ValueError(f"{tied} are tied to other names in params, which have other tensors")
        _put([(places, new[held]) for held, places in _tensors(self).values() if held in new], given=True)

    def update_params(
        self,
        lr_inner: float | Tensor,
        first_order: bool = False,
        source_params: Iterable[Tensor | None] | Mapping[str, Tensor | None] | None = None,
        detach: bool = False,
    ) -> None:
        """Replace every parameter θ that requires grad by θ - lr_inner * g, keeping the graph of both.

        Tied parameters are updated once and stay tied; frozen ones (`requires_grad=False`) stay as they are. The new
        parameters are other tensors, with `detach` other leaves: an optimizer made before steps the earlier ones, and
        this module follows it again once those are back (`set_params`, or `load_state_dict` of their values).

        Args:
            lr_inner: finite, real step size; a tensor of one element may require grad (a learned step size).
            first_order: treat the gradients g as constants (default: false).
            source_params: the gradients g, each with its parameter's shape, dtype and device: one per parameter or
                one per trainable parameter in the order of `named_params()`, or a dict by its names. An entry for a
                frozen parameter is not used; None leaves its parameter as it is (`autograd.grad(allow_unused=True)`
                gives None where the loss does not depend on it). By default each parameter's own `.grad`, which
                autograd fills for leaves only, that is before the first update.
            detach: make the new parameters leaves that require grad, without a graph (default: false).
                `update_params(0, detach=True)`, without gradients, is `detach_params()`.

        Raises:
            ValueError: number, names, shape, dtype or device of the gradients do not fit, or gradients are missing, or
                none of the parameters requires grad.
            TypeError: an argument of another type, or a plain layer that cannot be made meta; nothing has changed.

        >>> net = MetaLinear(2, 1)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> net.update_params(0.1)
        >>> net.weight.is_leaf
        False
        """
        if not (isinstance(first_order, bool) and isinstance(detach, bool)):
            wrong = f"first_order is {type(first_order).__name__}, detach {type(detach).__name__}"
            raise TypeError(f"{wrong}; bools are accepted (gradients are source_params)")
        lr = _step_size(lr_inner)
        if detach and source_params is None and not isinstance(lr, Tensor) and lr == 0:
            return self.detach_params()
        params = _tensors(self)
        grads = _gradients(source_params, {name: tensor for name, (tensor, _) in params.items()})
        updated = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            for name, grad in grads.items():
                tensor, places = params[name]
                new = tensor - lr * (grad.detach() if first_order else grad)
                updated.append((places, new if new.requires_grad else nn.Parameter(new)))  # no graph, yet not frozen
        _put(updated)

    def detach_params(self) -> None:
        """Make every parameter that carries a graph a leaf of the same values that still requires grad.

        Leaves stay the tensors they are, so an optimizer over them stays valid; one made before the updates does not
        see the new leaves. These share memory with the tensors they replace: autograd raises if a backward pass
        through the older graph needs a value changed since.
        """
        _put([(places, nn.Parameter(t.detach())) for t, places in _tensors(self).values() if not t.is_leaf])

    def copy(self, other: nn.Module, same_var: bool = False) -> None:
        """Take over the parameters and buffers of a module with the same names and shapes.

        Args:
            other: the module to copy from, meta or plain.
            same_var: hold `other`'s very parameters, with their graph, so that updates of this module reach back to
                them (an inner loop on a second module). By default the parameters are fresh leaves of this module's
                dtype and device, frozen where they were; optimizers over the earlier ones do not follow
                (`load_state_dict` fills leaves in place). Buffers are copied by value either way.

        Raises:
            TypeError: `other` is not a module.
            ValueError: names or shapes differ (and, for `same_var`, dtypes or devices).
        """
        if not isinstance(other, nn.Module):
            raise TypeError(f"other is {type(other).__name__}; an nn.Module is accepted")
        mine, theirs = self.state_dict(), other.state_dict()
        if mine.keys() != theirs.keys():
            raise ValueError(
                f"other has different names; only in one of the two: {sorted(mine.keys() ^ theirs.keys())}"
            )
        for name, tensor in mine.items():
            if isinstance(tensor, Tensor) and tensor.shape != theirs[name].shape:
                raise ValueError(f"'{name}' has shape {tuple(theirs[name].shape)} in other, {tuple(tensor.shape)} here")
        source, new = dict(other.named_parameters(remove_duplicate=False)), []
        for name, (tensor, places) in _tensors(self).items():
            value = source.get(name)
            if value is None:
                raise ValueError(f"'{name}' is a buffer in other, a parameter here")
            if same_var:
                _check_like(name, value, tensor)
            else:
                value = nn.Parameter(value.detach().to(tensor.device, tensor.dtype, copy=True), tensor.requires_grad)
            new.append((places, value))
        _put(new)
        values, copied = dict(other.named_buffers(remove_duplicate=False)), {}
        for name, old in list(self.named_buffers(remove_duplicate=False)):
            path, _, last = name.rpartition(".")
            if name in values:  # a copy in its place: an older graph may hold the buffer
                if old not in copied:
                    copied[old] = values[name].detach().to(old.device, old.dtype, copy=True)
                self.get_submodule(path)._buffers[last] = copied[old]

    # ---- ordinary torch life with tensors that carry a graph ---------------------------------------------------

    def requires_grad_(self, requires_grad: bool = True) -> MetaModule:
        """As in `nn.Module`; freezing detaches the parameters that carry a graph."""
        if not requires_grad:
            self.detach_params()
        return super().requires_grad_(requires_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in `nn.Module`, without a warning for the parameters that carry a graph and so have no `.grad`."""
        with _grad_of_non_leaves_unwarned():
            super().zero_grad(set_to_none)

    def _apply(self, fn, recurse=True):
        """Move leaves as torch moves parameters (in place: optimizers stay valid), the others with their graph."""
        fn = fn if isinstance(fn, _OncePerTensor) else _OncePerTensor(fn)
        names, buffers = self._meta_names, self._buffers
        leaves = nn.Module()
        for name, tensor in buffers.items():
            if name not in names or tensor is None or tensor.is_leaf:
                (leaves._parameters if name in names else leaves._buffers)[name] = tensor
        nn.Module._apply(leaves, fn)
        moved = {**leaves._parameters, **leaves._buffers}
        moved.update((name, fn(tensor)) for name, tensor in buffers.items() if name not in moved)
        buffers.update(moved)
        fn.keep(moved.values())
        if super()._apply.__func__ is not nn.Module._apply:
            with _grad_of_non_leaves_unwarned():
                return super()._apply(fn, recurse)  # the class's own, which finds what has moved and leaves it
        for child in self.children() if recurse else ():
            child._apply(fn)
        return self

    def load_state_dict(self, *args, **kwargs):
        """Load as `nn.Module` does. What is loaded becomes a leaf; nothing else changes, and an error changes nothing.

        Leaves are filled in place. Where a parameter carries a graph, the leaf it came from, which an optimizer may
        step, comes back if it has the values loaded, as when an inner loop ends at its start; else there is a new leaf,
        which leaves the older graph whole, and a warning if an earlier leaf is still held (by an optimizer or a graph).
        """
        with _loading(list(self.modules())):
            return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args):
        # a plain parent's load_state_dict calls this alone
        with contextlib.nullcontext() if _under_load.get() else _loading([self]):
            super()._load_from_state_dict(*args)

    def __deepcopy__(self, memo):
        """A copy of the same values whose parameters are leaves: a graph is not copied."""
        for tensor in self._parameters.values():
            if tensor is not None and not isinstance(tensor, nn.Parameter) and id(tensor) not in memo:
                memo[id(tensor)] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        if hasattr(super(), "__deepcopy__"):
            return super().__deepcopy__(memo)
        replica = type(self).__new__(type(self))
        memo[id(self)] = replica
        replica.__setstate__(copy.deepcopy(vars(self), memo))
        return replica

    def __reduce_ex__(self, protocol):
        """Pickle the classes that `to_meta` made by the class they were made from."""
        reduced = super().__reduce_ex__(protocol)
        plain = vars(type(self)).get("_twin_of")
        if plain is None or reduced[0] is not copyreg.__newobj__:
            return reduced
        return (_new_twin, (plain,), *reduced[2:])

    def _replicate_for_data_parallel(self):
        raise NotImplementedError("nn.DataParallel does not replicate meta modules; use DistributedDataParallel")


def _tensors(root: nn.Module) -> dict[str, tuple[Tensor, list[tuple[nn.Module, str]]]]:
    """Each distinct parameter under its first name, with every (module, name) that holds it."""
    known, found, first_name = root.named_parameters() if _own_leaves else (), {}, {}
    for _ in known:  # what named_leaves names is a parameter from here on
        pass
    for path, module in root.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is None:
                continue
            key = first_name.setdefault(id(tensor), f"{path}.{name}" if path else name)
            found.setdefault(key, (tensor, []))[1].append((module, name))
    return found


def _find(root: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else ():
        owner = None if owner is None else owner._modules.get(part)
    tensor = None if owner is None else owner._parameters.get(last)
    if tensor is None:
        names = ", ".join(known for known, _ in root.named_parameters(remove_duplicate=False))
        raise ValueError(f"no parameter is named '{name}'; the names are {names or 'none'}")
    return tensor


@contextlib.contextmanager
def _grad_of_non_leaves_unwarned():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


def _check_tensor(name: str, tensor: Tensor, current: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor for '{name}' is {type(tensor).__name__}; a torch.Tensor is accepted")
    _check_like(name, tensor, current)


def _check_like(name: str, new: Tensor, old: Tensor | None) -> None:
    if old is None or isinstance(old, UninitializedTensorMixin):
        return
    for what in ("shape", "dtype", "device"):
        if getattr(new, what) != getattr(old, what):
            raise ValueError(f"'{name}' has {what} {getattr(old, what)}; it cannot take {what} {getattr(new, what)}")


def _put(updates: list[tuple[list[tuple[nn.Module, str]], Tensor]], given: bool = False) -> None:
    """Put each tensor in its places, all of them or none; `given`: the tensors are the user's own."""
    plain = {module for places, _ in updates for module, _ in places if not isinstance(module, MetaModule)}
    if plain:
        _convert((type(module).__name__, module) for module in plain)
    remember = not _is_compiling()
    for places, tensor in updates:
        for module, name in places:
            if remember:
                _remember(module, name, tensor, given)
            module._buffers[name] = tensor


# ---- what stood there before: for optimizers, loading and recomputation ---------------------------------------------

_under_load = contextvars.ContextVar("_under_load", default=False)
_is_compiling = torch.compiler.is_compiling
_sequence_number = torch._C._autograd._get_sequence_nr  # grows with each node of autograd's graph
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # newer than the oldest torch accepted


class _History(dict):
    """Of a module: by name, the id of the tensor last put there, when, and the leaves before it, not kept alive.

    `removed` is the parameter last deleted. A copy of the module begins its history anew.
    """

    removed = staticmethod(lambda: None)

    def __reduce__(self):
        return (_History, ())


def _history_of(module: nn.Module) -> _History:
    return module.__dict__.setdefault("_history", _History())


def _remember(module: nn.Module, name: str, new: Tensor, given: bool = True) -> None:
    """Note when `new` came and which leaves before it an optimizer may step; a leaf the user gives begins anew."""
    history, leaves = _history_of(module), []
    if not (given and new.is_leaf):
        leaves, old = history[name][2] if name in history else [], module._buffers[name]
        if old is not None and old.is_leaf and old.requires_grad:
            leaves = [leaf for leaf in leaves if _alive(leaf) is not None and _alive(leaf) is not old]
            leaves.append(weakref.ref(old))
    history[name] = (id(new), _sequence_number(), leaves)


def _alive(reference: weakref.ref) -> Tensor | None:
    tensor = reference()
    if tensor is not None:
        tensor._fix_weakref()  # as torch.utils.weak does
    return tensor


def _earlier_leaves(module: nn.Module, name: str) -> list[Tensor]:
    references = vars(module).get("_history", {}).get(name, (0, 0, ()))[2]
    return [leaf for leaf in map(_alive, references) if leaf is not None]


def _check_recomputation(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Activation checkpointing calls the module again inside a backward pass: with the parameters of the first time?"""
    current, since, _ = vars(module)["_history"].get(name, (0, 0, ()))
    node = torch._C._current_autograd_node()
    recomputes = node is not None and node._sequence_nr() < since and torch.is_grad_enabled()
    if recomputes and current == id(tensor):  # not where functional_call has put another in its place
        raise RuntimeError(
            f"'{name}' was replaced since the forward that a backward pass computes again (activation checkpointing); "
            "pass the parameters as arguments: checkpoint(lambda p, x: torch.func.functional_call(net, p, (x,)), "
            "dict(net.named_params()), x, use_reentrant=False)"
        )


def _check_export(module: nn.Module) -> None:
    if _is_exporting():
        raise RuntimeError(
            f"torch.export does not take {type(module).__name__}: export a plain module that loads its state_dict()"
        )


@contextlib.contextmanager
def _loading(modules: list[nn.Module]):
    """Copies stand in for all tensors during a load; then what was loaded moves in, after an error nothing."""
    found = {}  # each tensor with its places
    for module in modules:
        for held in (module._buffers, vars(module)["_parameters"]):
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, UninitializedTensorMixin):
                    found.setdefault(tensor, []).append((module, held, name, name in module._parameters))
    carrying = not all(tensor.is_leaf for tensor in found)
    stand_ins = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor, places in found.items():
            copied = tensor.detach().clone()
            if any(is_parameter for *_, is_parameter in places):
                copied = nn.Parameter(copied, tensor.requires_grad)
            stand_ins[tensor] = (copied, copied._version)
            for _, held, name, _ in places:
                held[name] = copied
    outer = _under_load.set(True)
    try:
        yield
    except BaseException:
        for tensor, places in found.items():
            for _, held, name, _ in places:
                held[name] = tensor
        raise
    finally:
        _under_load.reset(outer)
    stale = []
    for tensor, places in found.items():
        copied, version = stand_ins[tensor]
        places = [place for place in places if place[1].get(place[2]) is copied]  # others have been assigned anew
        for _, held, name, _ in places:
            held[name] = tensor
        unchanged = _same(tensor, copied)
        if not places or (unchanged and copied._version == version):
            continue
        module, _, name, is_parameter = places[0]
        earlier = [leaf for leaf in _earlier_leaves(module, name) if leaf is not tensor] if is_parameter else []
        value = tensor
        if not tensor.is_leaf or (carrying and not is_parameter and not unchanged):  # the older graph may need it
            value = next((leaf for leaf in reversed(earlier) if _same(leaf, copied)), copied)
        elif not unchanged:
            with torch.no_grad():
                tensor.copy_(copied)
        back = any(value is leaf for leaf in earlier)
        if earlier and not back:
            stale.append(f"{type(module).__name__}.{name}")
        for module, held, name, is_parameter in places:
            if is_parameter and value is not tensor:
                _remember(module, name, value, given=back)
            held[name] = value
    if stale:
        warnings.warn(
            f"loaded, but not into the leaves of before the updates: {', '.join(stale)}. An optimizer made "
            "before does not step these; make it anew, or put its leaves back first by net.set_params(start)",
            stacklevel=4,
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same values, NaN included; what has none to compare (meta device) counts as the same."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    if one.is_meta or one.layout != torch.strided or torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _step_size(lr_inner: float | Tensor) -> float | Tensor:
    if isinstance(lr_inner, Tensor):
        if lr_inner.numel() != 1:
            raise ValueError(f"lr_inner has shape {tuple(lr_inner.shape)}; a number or one element is accepted")
        if lr_inner.is_complex() or lr_inner.dtype == torch.bool:
            raise TypeError(f"lr_inner has dtype {lr_inner.dtype}; a real number is accepted")
        return lr_inner.reshape(())
    if not isinstance(lr_inner, numbers.Real) or isinstance(lr_inner, bool):
        raise TypeError(f"lr_inner is {lr_inner!r}; a number or a tensor of one element is accepted")
    if not math.isfinite(lr_inner):
        raise ValueError(f"lr_inner is {lr_inner}; a finite number is accepted")
    return lr_inner


def _gradients(source, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by name of the parameters to update, each checked against its parameter."""
    trainable = {name: tensor for name, tensor in params.items() if tensor.requires_grad}
    if params and not trainable:
        raise ValueError("no parameter requires grad, so none would be updated; call requires_grad_() on the module")
    if source is None:
        # .grad of a tensor that is not a leaf warns when it is read
        grads = {name: p.grad if p.is_leaf or p.retains_grad else None for name, p in trainable.items()}
        missing = [name for name, grad in grads.items() if grad is None]
        if missing:
            raise ValueError(
                f"no .grad for {', '.join(missing)}; call backward(create_graph=True) before the first update; after "
                "it pass source_params=torch.autograd.grad(...), with None where the loss does not use a parameter"
            )
    elif isinstance(source, Mapping):
        unknown, missing = [n for n in source if n not in params], [n for n in trainable if n not in source]
        if unknown or missing:
            raise ValueError(f"source_params has unknown names {unknown} and lacks {missing}")
        grads = {name: source[name] for name in trainable}
    elif isinstance(source, Iterable) and not isinstance(source, (Tensor, str)):
        source = list(source)
        if len(source) not in (len(params), len(trainable)):
            raise ValueError(
                f"source_params has {len(source)} entries; {len(params)} (one per parameter) "
                f"or {len(trainable)} (one per parameter that requires grad) are accepted"
            )
        grads = dict(zip(params if len(source) == len(params) else trainable, source))
    else:
        raise TypeError(f"source_params is {type(source).__name__}; gradients in a list, tuple or dict are accepted")
    grads = {name: grad for name, grad in grads.items() if name in trainable and grad is not None}
    for name, grad in grads.items():
        if not isinstance(grad, Tensor):
            raise TypeError(f"the gradient of '{name}' is {type(grad).__name__}; a torch.Tensor or None is accepted")
        _check_like(name, grad, params[name])
    return grads


# ---- any module, by the same mechanism -----------------------------------------------------------------------------


def to_meta(module: nn.Module, inplace: bool = False) -> MetaModule:
    """Give the meta version of any module: the same values and `forward`, every part of it meta.

    Each part that has parameters or children gets the class `MetaX`: the twin below where X is a layer of `torch.nn`,
    else one made on the spot from `MetaModule` and X. `isinstance(part, X)` stays true; tied parameters stay tied.
    Where X has a method of its own called `copy`, say, its own is kept and `MetaModule.copy(part, other)` is ours.

    Args:
        module: a module of torch, of a third party or partly meta. Parametrized layers (`nn.utils.parametrize`) are
            accepted: their originals become meta-parameters.
        inplace: convert `module` itself, keeping its parameters' identity (default: convert a deep copy).

    Returns:
        The meta module; parameters are leaves of a copy, or the module's own if `inplace`.

    Raises:
        TypeError: not a module; one that wraps or compiles another (convert the inner module first); or one that
            holds a layer or tensor by the name of one of our methods.

    >>> net = to_meta(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    >>> type(net).__name__, type(net[0]).__name__
    ('MetaSequential', 'MetaLinear')
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type(module).__name__}; an nn.Module is accepted")
    _check_convertible(module.named_modules())
    if not inplace:
        module = copy.deepcopy(module)
    plain = [(name, part) for name, part in module.named_modules() if not isinstance(part, MetaModule)]
    _convert((n, p) for n, p in plain if p is module or p._parameters or p._modules or _trainable_buffers(p))
    return module


def _check_convertible(parts: Iterable[tuple[str, nn.Module]]) -> None:
    wrappers = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
    for name, part in parts:
        if isinstance(part, wrappers) or "_orig_mod" in part._modules:  # the last: torch.compile's OptimizedModule
            raise TypeError(f"'{name}' is a {type(part).__name__}; convert the module before it is wrapped or compiled")
        hidden = [n for n in _FACE if n in {*part._modules, *part._parameters, *part._buffers}]
        if hidden and not isinstance(part, nn.ModuleDict):  # whose entries are reached by key
            raise TypeError(f"'{name}' holds {hidden}, which the methods of MetaModule would hide; rename them")


def _trainable_buffers(module: nn.Module) -> list[str]:
    return [n for n, b in module._buffers.items() if b is not None and b.requires_grad]


def _convert(parts: Iterable[tuple[str, nn.Module]]) -> None:
    """Give each part its twin's class; whatever cannot be converted is refused before anything has changed."""
    parts = list(parts)
    _check_convertible(parts)
    for module, twin in [(part, _twin(type(part))) for _, part in parts]:
        parameters = vars(module)["_parameters"]
        module.__class__ = twin
        vars(module).pop("_flat_weights", None)  # of recurrent layers; see _Recurrent
        vars(module).update(_parameters={}, _meta_names=dict.fromkeys([*parameters, *_trainable_buffers(module)]))
        module._buffers.update(parameters)
        _show_as_layer_of_torch(module)


_made_twins: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()
_own_leaves: weakref.WeakSet[type] = weakref.WeakSet()  # classes with a named_leaves of their own
_FACE = ("named_params", "named_leaves", "set_param", "set_params", "update_params", "detach_params", "copy")


def _twin(plain: type) -> type:
    """The class `MetaX` of a class X, made at the first call: `class MetaX(MetaModule, X)` without a body, for most."""
    twin = _made_twins.get(plain)
    if twin is None:
        base = next((kind for layer, kind in _KINDS.items() if issubclass(plain, layer)), MetaModule)
        kept = [n for n in _FACE if hasattr(plain, n) and getattr(base, n) is getattr(MetaModule, n)]
        body = {name: inspect.getattr_static(plain, name) for name in kept}
        body.update(__module__=__name__, _twin_of=plain)
        if issubclass(plain, nn.modules.lazy.LazyModuleMixin) and plain.cls_to_become is not None:
            body["cls_to_become"] = _twin(plain.cls_to_become)  # what the first forward turns it into
        # an ABC, a Generic or a slotted class before nn.Module: instances can only take a class that begins with it
        for bases in ((base, plain), (plain, base)):
            try:
                twin = types.new_class(f"Meta{plain.__name__}", bases, exec_body=lambda space: space.update(body))
                object.__new__(plain).__class__ = twin
                break
            except TypeError as error:
                reason = error
        else:
            raise TypeError(f"no meta class can be made of {plain.__qualname__}: {reason}") from reason
        _made_twins[plain] = twin
    return twin


def _show_as_layer_of_torch(module: MetaModule) -> None:
    """torch.fx keeps whole the layers whose __module__, read off the instance, is one of torch.nn."""
    plain = vars(type(module)).get("_twin_of", nn.Module)
    if plain.__module__.startswith("torch.nn.") and plain is not nn.Module:
        vars(module)["__module__"] = plain.__module__


def _new_twin(plain: type) -> MetaModule:
    twin = _twin(plain)
    return twin.__new__(twin)


# ---- the twins of torch.nn, and what some of them have beside MetaModule's ------------------------------------------


class _Recurrent(MetaModule):
    """nn.RNN, LSTM and GRU compute from a list of their weights: here it is read off the meta-parameters each time."""

    @property
    def _flat_weights(self):
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights):
        pass

    def flatten_parameters(self) -> None:
        """As in torch, but weights that carry a graph are not moved in memory."""
        if all(weight is None or weight.is_leaf for weight in self._flat_weights):
            super().flatten_parameters()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._init_flat_weights()
        return self


class _Composite(MetaModule):
    """Layers that build others inside themselves: those are meta too once `__init__` has run."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if plain := vars(cls).get("_twin_of"):

            @functools.wraps(plain.__init__)
            def __init__(self, *args, **kwargs):
                plain.__init__(self, *args, **kwargs)
                to_meta(self, inplace=True)

            cls.__init__ = __init__


class _SyncBatchNorm(MetaModule):
    """nn.SyncBatchNorm converts modules that were updated, too."""

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group=None) -> MetaModule:
        """As in torch, after updates, too, where `nn.SyncBatchNorm`'s own raises since it takes leaves alone."""
        module = to_meta(module, inplace=True)
        params = dict(module.named_parameters(remove_duplicate=False))
        module.detach_params()
        converted = to_meta(nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group), inplace=True)
        for part in (module, converted):
            MetaModule.set_params(part, params)
        return converted


class _ParameterList(MetaModule):
    """nn.ParameterList keeps the graph of what is put into it."""

    def __setitem__(self, idx: int, param) -> None:
        super().__setitem__(idx, param)
        _keep_graph(self, self._get_abs_string_index(idx), param)


class _ParameterDict(MetaModule):
    """nn.ParameterDict likewise."""

    def __setitem__(self, key: str, value) -> None:
        super().__setitem__(key, value)
        _keep_graph(self, key, value)

    def copy(self, other: nn.Module | None = None, same_var: bool = False):
        """Without an argument a new dict of the same entries, as in torch; else `MetaModule.copy`."""
        if other is not None:
            return super().copy(other, same_var)
        return _twin(nn.ParameterDict)([(key, self[key]) for key in self])


def _keep_graph(module: MetaModule, name: str, value) -> None:
    if isinstance(value, Tensor) and not value.is_leaf:  # torch has made an nn.Parameter of it, a leaf
        module._buffers[name] = value


_KINDS = {  # what the twins of these layers, and of their subclasses, have beside what MetaModule has
    nn.RNNBase: _Recurrent,
    nn.SyncBatchNorm: _SyncBatchNorm,
    nn.ParameterList: _ParameterList,
    nn.ParameterDict: _ParameterDict,
    nn.AdaptiveLogSoftmaxWithLoss: _Composite,
    nn.MultiheadAttention: _Composite,
    nn.Transformer: _Composite,
    nn.TransformerEncoder: _Composite,
    nn.TransformerEncoderLayer: _Composite,
    nn.TransformerDecoder: _Composite,
    nn.TransformerDecoderLayer: _Composite,
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # newer than the oldest torch accepted
    _KINDS[nn.LinearCrossEntropyLoss] = _Composite
    __all__ += ["MetaLinearCrossEntropyLoss"]

for _name in __all__[3:]:
    globals()[_name] = _twin(getattr(nn, _name.removeprefix("Meta")))

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[MetaModule]: ...  # those of __all__, for tools that do not run this


class _Parametrizations(_twin(nn.ModuleDict)):
    """What torch.nn.utils.parametrize puts on a meta layer: meta, too."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, to_meta(module, inplace=True))
