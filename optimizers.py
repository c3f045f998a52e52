"""Learned optimizers: networks that read gradients and write updates.

`CoordinatewiseLSTM` is the optimizer of Andrychowicz et al. 2016 (arXiv 1606.04474, section 2.1 and appendix A). The
others have their own modules in `gradbuffer.nets`, and their names here: `RNNProp` and `NormalizedLSTM` read what Adam
would do, `LSTMWithGAC` and `NTMBFGS` have coordinates that tell each other something, `SubspaceLSTM` weighs the last
gradients and moves of whole tensors, `MLPOptimizer` reads statistics of them, `PerKind` is several networks in one. A
learned optimizer is any `nn.Module` with `init_state(num_coordinates)` and `forward(grad, state) -> (update, state)`;
`meta_training` trains a user's own as well as these. `LearnedOptimizer` makes a drop-in `torch.optim.Optimizer` of one.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

import gradbuffer
from gradbuffer.checks import NonFiniteError, check_finite, check_positive_number, named_class
from gradbuffer.contracts import as_rule, is_learned
from gradbuffer.files import write_whole
from gradbuffer.nets.lstm import LSTMOptimizer, explain
from gradbuffer.nets.mlp import MLPOptimizer, start_as_normalized_adam
from gradbuffer.nets.normalized import NormalizedLSTM, RNNProp, start_as_adam
from gradbuffer.nets.per_kind import PerKind
from gradbuffer.nets.readings import READINGS, check_preprocess, log_sign, odd_part
from gradbuffer.nets.sharing import NTMBFGS, LSTMWithGAC, start_as_coordinatewise
from gradbuffer.nets.subspace import SubspaceLSTM
from gradbuffer.nets.torch_optim import LearnedOptimizer

__all__ = [
    "CoordinatewiseLSTM",
    "LSTMOptimizer",
    "LSTMWithGAC",
    "LearnedOptimizer",
    "MLPOptimizer",
    "NTMBFGS",
    "NonFiniteError",
    "NormalizedLSTM",
    "PerKind",
    "RNNProp",
    "SubspaceLSTM",
    "explain",
    "load_optimizer",
    "log_sign",
    "pretrained_optimizers",
    "register_optimizer",
    "save_optimizer",
    "start_as_adam",
    "start_as_coordinatewise",
    "start_as_momentum",
    "start_as_normalized_adam",
]

FILE_FORMAT = 2  # since 2 files hold a digest
PRETRAINED = Path(gradbuffer.__file__).with_name("pretrained")


class CoordinatewiseLSTM(LSTMOptimizer):
    """The coordinatewise LSTM optimizer: one small LSTM, shared by all coordinates, each with a state of its own.

    (g_t, h_{t+1}) = m(∇_t, h_t; φ) and θ_{t+1} = θ_t + g_t, where m is an LSTM of `num_layers` layers followed by a
    linear output. Its state is (hidden, cell), each (num_layers, hidden_size, N).

    Args:
        hidden_size: units in each layer, positive. Default 20, the paper's.
        num_layers: LSTM layers, positive. Default 2, the paper's.
        preprocess: what of the gradient is fed, a name in `readings.READINGS`. None: the gradient as it is; "log_sign":
            `log_sign(grad, p)`; "with_log_size": the gradient and the first of those two.
        p: the threshold of "log_sign" is e^-p; in (0, 80].
        output_scale: factor on the output; not zero. The paper has 0.1 on MNIST and 1 on quadratics.
        odd: keep to LSTMs that answer -∇ with exactly the opposite updates, see `symmetrize`. They take the same steps
            in coordinates of other signs, never drift, and their meta-gradient has far less noise. Default False.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> net = CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1)
        >>> theta, state = torch.zeros(3), net.init_state(3)
        >>> with torch.no_grad():
        ...     update, state = net(2 * theta - 1, state)
        >>> (theta + update).shape
        torch.Size([3])

    Reference: Andrychowicz et al. 2016, section 2.1 ("Coordinatewise LSTM optimizer") and appendix A.
    """

    arguments = ("hidden_size", "num_layers", "preprocess", "p", "output_scale", "odd")

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        preprocess: str | None = None,
        p: float = 10.0,
        output_scale: float = 1.0,
        odd: bool = False,
    ):
        check_preprocess(preprocess, p, output_scale)
        super().__init__(len(READINGS[preprocess].signs), hidden_size, num_layers)
        self.preprocess, self.p, self.output_scale, self.odd = preprocess, p, output_scale, bool(odd)
        if odd:
            self.load_state_dict(self.symmetrize(self.state_dict()))

    def symmetrize(self, tensors: dict) -> dict:
        """The nearest weights with which the optimizer is odd; of a meta-gradient, its part along such weights.

        Args:
            tensors: dict like `state_dict()`. Not changed.

        Returns:
            dict of new tensors, no graph: see `readings.odd_part`.
        """
        return odd_part(tensors, self.hidden_size, READINGS[self.preprocess].signs)

    def read(self, grads, memory):
        """(T, N) -> readings (T, inputs, N), and no memory."""
        return READINGS[self.preprocess].of(grads, self.p), ()

    def embed(self, readings):
        return readings

    @property
    def built_in(self):
        known = READINGS[self.preprocess].built_in
        own = type(self) is CoordinatewiseLSTM  # a subclass may read something else
        return known(self.p) if own and known else None


@torch.no_grad()
def start_as_momentum(
    net: CoordinatewiseLSTM,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    averages: tuple = (0.5, 0.95, 0.99),
    sign_lr: float = 0.0,
    sign_momentum: float = 0.8,
    sign_fade: float = 8,
) -> CoordinatewiseLSTM:
    """Write weights into a coordinatewise LSTM with which it is SGD with momentum; meta-training then starts from there.

    With "log_sign" an LSTM cell can hold a running sum of gradients: its input gate sigmoid(log|∇|) = |∇| / (1 + |∇|)
    gives the size, its candidate tanh(3 sgn ∇) the sign, its forget gate the momentum. Some units of every layer do so,
    each with a forget gate of its own; the output reads the ones that make up the update asked for. The other units,
    and the units of `averages`, start with output weights of 0: they are there for meta-training to use.

    Momentum is slow in the first steps, where gradients are small: it has gathered nothing yet. With `sign_lr` the
    updates have a second part, -sign_lr · w_t · s_t: s_t ← sign_momentum · s_t + (1 - sign_momentum) · sgn ∇ is a
    running mean of signs, and w_t = 2 sigmoid(-2 t / sign_fade), near to it, fades. One more unit holds s_t, and
    another one the time, which closes the first one's output gate.

    Where e^-p ≤ |∇| ≪ 1 the updates of momentum are those of `torch.optim.SGD(lr, momentum, nesterov)`, to a few per
    cent; those of larger gradients saturate, those of smaller ones are up to three times too large. The part with signs
    is right to a fifth.

    Args:
        net: a `CoordinatewiseLSTM` with preprocess="log_sign"; changed in place. Its other units keep their weights.
        lr: learning rate, positive; best the one that `tune_baseline` finds.
        momentum: in [0, 1).
        nesterov: the update reads ∇ + momentum · buffer instead of the buffer.
        averages: forget gates of further units, each in (0, 1).
        sign_lr: size of the first steps by sign, 0 or more.
        sign_momentum: in [0, 1).
        sign_fade: steps after which w_t is about a quarter; positive, at most 20.

    Returns:
        `net`.

    Raises:
        ValueError, TypeError: an argument is not as above, or the network has too few units.

    Example:
        >>> net = start_as_momentum(CoordinatewiseLSTM(preprocess="log_sign", output_scale=0.1), lr=1.0)

    Reference: ours; to start from a hand-designed optimizer, by imitation, is Chen et al. 2020 (arXiv 2010.09089).
    """
    if not isinstance(net, CoordinatewiseLSTM):
        raise TypeError(f"net must be a CoordinatewiseLSTM, got {type(net).__name__}")
    if net.preprocess != "log_sign":
        raise ValueError(f'net must have preprocess="log_sign" to start as momentum, got {net.preprocess!r}')
    check_positive_number(lr=lr, sign_fade=sign_fade)
    for name, value in (("momentum", momentum), ("sign_momentum", sign_momentum)):
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    if not all(isinstance(average, (int, float)) and 0 < average < 1 for average in averages):
        raise ValueError(f"averages must be numbers in (0, 1), got {averages!r}")
    if sign_lr:
        check_positive_number(sign_lr=sign_lr)
        if sign_fade > 20:
            raise ValueError(f"sign_fade must be at most 20, got {sign_fade!r}")
    forgets, H = (0.0, momentum, *averages, *((sign_momentum, CLOCK) if sign_lr else ())), net.hidden_size
    sums = len(forgets) - bool(sign_lr)
    if len(forgets) > H or net.odd and sums > 3 * H // 10:
        kind = f"{3 * H // 10} odd" if net.odd else f"{H}"
        raise ValueError(f"the network has {kind} units, too few for {sums if net.odd else len(forgets)} running sums")
    for layer, (weight, recurrent, bias, bias2) in enumerate(net.lstm.all_weights):
        for unit, forget in enumerate(forgets):
            i, f, g, o = rows = [unit + gate * H for gate in range(4)]
            for tensor in (weight, recurrent, bias, bias2):
                tensor[rows] = 0
            bias[o] = OPEN
            if layer == 0:
                weight[i, 0], weight[g, 1], bias[f] = net.p, CANDIDATE, logit(forget)
            else:  # pass on what the layer below holds
                bias[i], bias[f], weight[g, unit] = OPEN, logit(0), GAIN
    opened = 1 / (1 + math.exp(-OPEN))
    passed = opened * (opened * GAIN * opened) ** (net.num_layers - 1)
    net.output.weight.zero_()
    net.output.bias.zero_()
    scale = net.output_scale * passed * math.tanh(CANDIDATE)
    net.output.weight[0, 1] = -lr * (momentum if nesterov else 1.0) / scale
    net.output.weight[0, 0] = -lr / scale if nesterov else 0.0
    if sign_lr:
        add_steps_by_sign(net, len(forgets) - 2, sign_lr, sign_momentum, sign_fade)
    return net


def add_steps_by_sign(net, sign, lr, momentum, fade):
    """Turn the running sum of unit `sign` into one of signs, whose output gate the next unit, a clock, closes."""
    H, clock, opened = net.hidden_size, sign + 1, 1 / (1 + math.exp(-OPEN))
    weight, recurrent, bias, _ = net.lstm.all_weights[0]
    for unit, amount in ((sign, SMALL), (clock, SMALL / 5)):  # what a step adds, whatever the gradient's size
        weight[unit, 0], bias[unit] = 0, logit(amount)
    weight[clock + 2 * H, 1], bias[clock + 2 * H] = 0, CANDIDATE
    # the clock's output rises by `tick` in a step at first; the sign's output gate is half open at first
    tick = opened * math.tanh(SMALL / 5 * math.tanh(CANDIDATE))
    bias[sign + 3 * H], recurrent[sign + 3 * H, clock] = 0, -2 / (fade * tick)
    held = SMALL * math.tanh(CANDIDATE) / (1 - momentum)  # what the cell holds where all signs agree
    passed = (opened * GAIN * opened) ** (net.num_layers - 1)
    net.output.weight[0, sign] = -2 * lr / (net.output_scale * passed * math.tanh(held))


OPEN, CANDIDATE, GAIN = 4.0, 3.0, 3.0  # an open gate's bias, the candidate's weight on the sign, between layers
SMALL, CLOCK = 0.05, 0.98  # an input gate that keeps tanh linear, the forget gate of the unit that holds the time


def logit(probability):
    """The bias of a gate; a closed one at 0."""
    return math.log(probability / (1 - probability)) if probability > 0 else -8.0


# Files --------------------------------------------------------------------------------------------------------------

LEARNED_OPTIMIZERS = {
    "CoordinatewiseLSTM": CoordinatewiseLSTM,
    "LSTMWithGAC": LSTMWithGAC,
    "MLPOptimizer": MLPOptimizer,
    "NTMBFGS": NTMBFGS,
    "NormalizedLSTM": NormalizedLSTM,
    "PerKind": PerKind,
    "RNNProp": RNNProp,
    "SubspaceLSTM": SubspaceLSTM,
}


def register_optimizer(cls: type) -> type:
    """Make a learned optimizer of your own known by the name of its class, so that its files are read like those of this library.

    Args:
        cls: an `nn.Module` with `init_state` and `forward`, and `config`, a dict of its constructor's arguments.

    Returns:
        cls: use it as a decorator.

    Raises:
        ValueError: another class has that name.

    Example:
        >>> @register_optimizer
        ... class Mine(CoordinatewiseLSTM):
        ...     pass
    """
    kept = LEARNED_OPTIMIZERS.setdefault(cls.__name__, cls)
    if kept is not cls and name_of(kept, full=True) != name_of(
        cls, full=True
    ):  # a cell that is run again defines its class anew
        raise ValueError(
            f"another learned optimizer is registered as {cls.__name__}: {kept.__module__}.{kept.__qualname__}"
        )
    LEARNED_OPTIMIZERS[cls.__name__] = cls
    return cls


def name_of(cls, full=False):
    """By what name a file calls a class."""
    registered = LEARNED_OPTIMIZERS.get(cls.__name__) is cls and not full
    return cls.__name__ if registered else f"{cls.__module__}:{cls.__qualname__}"


def save_optimizer(net: nn.Module, path: str | Path, **notes) -> None:
    """Write a learned optimizer to a safetensors file: its weights, and in the metadata its class and arguments.

    The file is written beside its place and then renamed, so that a failure leaves an older file as it was. It holds a digest
    of its content, so that a damaged one is found out when it is loaded.

    Args:
        net: one of this module's learned optimizers, or a `PerKind` of some, whose rule is a dict; or one of your own that has
            `config`, a dict of its constructor's arguments. If its class is registered (`register_optimizer`) its file is read like
            those of this library, else `load_optimizer` must be given the class.
        path: where to; the folder is made if it is not there.
        notes: what else the metadata should say (problem, seed, result …), kept as text; not by the names "format", "class",
            "config" and "sha256", which are taken.

    Raises:
        TypeError: `net` is no learned optimizer, has no such `config`, or its rule is a function.
        ValueError: a weight is infinite or NaN, or a note has a name that is taken.
        OSError: the file cannot be written.

    Example:
        >>> save_optimizer(CoordinatewiseLSTM(), "checkpoints/new.safetensors", problem="none yet")
        >>> net = load_optimizer("checkpoints/new.safetensors")
    """
    if not is_learned(net) or not isinstance(as_rule(net).config, dict):
        raise TypeError(
            f"net must be one of {sorted(LEARNED_OPTIMIZERS)}, or a learned optimizer of your own with config, a dict of "
            f"its constructor's arguments; got {type(net).__name__}"
        )
    for part in net.networks.values() if isinstance(net, PerKind) else ():
        if LEARNED_OPTIMIZERS.get(type(part).__name__) is not type(part):
            raise TypeError(
                f"net must be one of {sorted(LEARNED_OPTIMIZERS)}, the networks of a PerKind too (see register_optimizer), "
                f"got {type(part).__name__}"
            )
    if isinstance(net, PerKind) and not isinstance(net.rule, dict):
        raise TypeError(f"the rule of a PerKind must be a dict to be written to a file, got {net.rule!r}")
    metadata = {"format": str(FILE_FORMAT), "class": name_of(type(net)), "config": json.dumps(net.config)}
    taken = sorted(notes.keys() & {*metadata, "sha256"})
    if taken:
        raise ValueError(
            f"notes must have other names than {sorted({*metadata, 'sha256'})}, which the file itself needs; "
            f"got {taken}"
        )
    metadata |= {name: str(note) for name, note in notes.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    for name, tensor in tensors.items():
        check_finite(tensor, f"the weight {name}")
    write_whole(path, save(tensors, {**metadata, "sha256": digest(metadata, tensors)}))


def load_optimizer(path_or_name: str | Path, network: type | str | None = None) -> nn.Module:
    """Read a learned optimizer that `save_optimizer` wrote. Loading never runs code from the file, nor code that the file names.

    Args:
        path_or_name: a file, or the name of one that comes with this library, see `pretrained_optimizers`, such as "mnist".
        network: of an optimizer of your own, whose class is not registered: its class, or "module:Class".

    Returns:
        The network, on the CPU; also under `torch.inference_mode` or another default device one that can be trained.

    Raises:
        FileNotFoundError: there is no such file or name; the message lists the names there are.
        ValueError: the file is corrupt, of a later format, or of a class that is neither registered nor given; or a weight is
            infinite or NaN.
    """
    path = Path(path_or_name)
    if not path.is_file():  # a folder may have the name of a pretrained optimizer
        names = sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))
        if str(path_or_name) not in names:
            raise FileNotFoundError(
                f"no file {str(path_or_name)!r}, and no pretrained optimizer of that name; there are {names}"
            )
        path = PRETRAINED / f"{path_or_name}.safetensors"
    with torch.inference_mode(False), torch.device("cpu"):
        metadata, tensors = read_file(path)
        return rebuild_from(path, metadata, tensors, named_class(network) if isinstance(network, str) else network)


def rebuild_from(path, metadata, tensors, own=None):
    """The network that a file describes, if it is whole."""
    name = metadata.get("class", "")
    classes = (
        LEARNED_OPTIMIZERS
        if own is None
        else {**LEARNED_OPTIMIZERS, name_of(own): own, f"__main__:{own.__qualname__}": own}
    )
    if ":" in name and name not in classes:
        raise ValueError(
            f"{path} holds a {name}, which is not of this library: give its class, load_optimizer(..., network=...), or "
            "register it, see register_optimizer"
        )
    if name not in classes or metadata.get("format") not in map(str, range(1, FILE_FORMAT + 1)):
        if name in classes and metadata.get("format", "").isdigit():
            raise ValueError(
                f"{path} is of format {metadata['format']}; this version reads 1 to {FILE_FORMAT}: update it"
            )
        raise ValueError(f"{path} holds no learned optimizer of this library (its metadata: {metadata})")
    kept = metadata.pop("sha256", None)
    if kept != digest(metadata, tensors) and (
        kept is not None or metadata["format"] != "1"
    ):  # the first format had none
        raise ValueError(f"{path} is damaged: its digest is not that of its content")
    try:
        for weight, tensor in tensors.items():
            check_finite(tensor, f"the weight {weight}")
        net = rebuild(name, json.loads(metadata["config"]), classes)
        net.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    except (KeyError, StopIteration, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe a {metadata['class']}: {error}") from error
    return net


def digest(metadata, tensors):
    """SHA-256 of a file's content, as text: every text of the metadata, every tensor's name, form and bytes."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def pretrained_optimizers() -> dict[str, dict[str, str]]:
    """The learned optimizers that come with this library, in `gradbuffer/pretrained`, and what their files say about them.

    Returns:
        dict from name, as `load_optimizer` takes it, to the file's metadata, a dict of text: "class", "config", and the
        notes that `save_optimizer` was given, such as "problem", "seed" and "validation".

    Raises:
        ValueError: a file there is corrupt.

    Example:
        >>> pretrained_optimizers()["quadratics"].get("problem")
        'Quadratics, 10 dimensions'
    """
    return {path.stem: read_file(path)[0] for path in sorted(PRETRAINED.glob("*.safetensors"))}


def read_file(path):
    """(metadata, tensors) of a safetensors file, both dicts."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def rebuild(name, config, classes):
    """A learned optimizer from the name of its class and its `config`."""
    if name == "PerKind":
        config = {**config, "networks": {kind: rebuild(*part, classes) for kind, part in config["networks"].items()}}
    return classes[name](**config)
