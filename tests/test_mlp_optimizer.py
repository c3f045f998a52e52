"""The small learned optimizer in plain torch, against the formulas written out for one matrix, and its traps."""

import math

import numpy as np
import pytest
import torch

from gradbuffer.nets.mlp import MLPOptimizer, matrix_axes, start_as_normalized_adam

SHAPES = {"matrix": (5, 4), "bias": (7,), "scalar": (), "one": (1,), "convolution": (4, 3, 3, 2), "cube": (2, 5, 3)}


def functions(count=3, dtype=torch.float64, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def run(net, params, steps=4, lr=0.1, weights=None, scale=0.1):
    """Parameters after some steps on made-up gradients, and the last updates and state."""
    state = net.init_state(params)
    for t in range(steps):
        grads = {
            name: scale * value
            for name, value in functions(
                len(params[next(iter(params))]),
                seed=t + 1,
                dtype=params[next(iter(params))].dtype,
                shapes={n: v.shape[1:] for n, v in params.items()},
            ).items()
        }
        updates, state = net(grads, state, params=params, lr=lr, step=t, weights=weights)
        params = {name: params[name] + updates[name] for name in params}
    return params, updates, state


def written_out(net, gradients, theta):
    """The last direction of a matrix (rows, columns), in numpy and as the page of formulas has it."""
    shape = theta.shape
    m, v, r, c = np.zeros((3, *shape)), np.zeros(shape), np.zeros((3, shape[0])), np.zeros((3, shape[1]))
    for g in gradients:
        g = np.clip(g, -1000, 1000)
        for k, decay in enumerate((0.9, 0.99, 0.999)):
            m[k] = decay * m[k] + (1 - decay) * g
            r[k] = decay * r[k] + (1 - decay) * (g * g + 1e-30).mean(1)
            c[k] = decay * c[k] + (1 - decay) * (g * g + 1e-30).mean(0)
        v = 0.95 * v + 0.05 * g * g
    root, ones = 1 / np.sqrt(v + 1e-8), np.ones(shape)
    factor = [
        1 / np.sqrt(np.maximum(r[k] / (r[k].mean() + 1e-9), 1e-9))[:, None] / np.sqrt(np.maximum(c[k], 1e-9))
        for k in range(3)
    ]
    features = [
        g,
        np.clip(g, -0.1, 0.1),
        theta,
        *m,
        v,
        *(m * root),
        root,
        g * root,
        *(g * factor[k] for k in range(3)),
        *(r[k][:, None] * ones for k in range(3)),
        *(c[k] * ones for k in range(3)),
        *((r[k] + 1e-8)[:, None] ** -0.5 * ones for k in range(3)),
        *((c[k] + 1e-8) ** -0.5 * ones for k in range(3)),
        *(m[k] * factor[k] for k in range(3)),
    ]
    hidden = np.stack([x / np.sqrt((x * x).mean() + 1e-9) for x in features], -1)
    layers = [part.detach().double().numpy() for part in net.layers.values()]
    for l in range(0, len(layers), 2):
        hidden = hidden @ layers[l] + layers[l + 1]
        hidden = np.maximum(hidden, 0) if l + 2 < len(layers) else hidden[..., 0]
    return hidden / np.sqrt((hidden * hidden).mean() + 1e-9)


def test_direction_is_as_written_out():
    net = MLPOptimizer(hidden_sizes=(6, 5)).double()
    random = np.random.default_rng(0)
    gradients, theta = random.normal(size=(5, 4, 3)) * [[[1.0], [1e-3], [2000.0], [0.1]]], random.normal(size=(4, 3))
    params = {"w": torch.tensor(theta)[None]}
    state = net.init_state(params)
    for g in gradients:
        updates, state = net({"w": torch.tensor(g)[None]}, state, params=params, lr=1.0)
    np.testing.assert_allclose(
        -updates["w"][0].detach().numpy(), written_out(net, gradients, theta), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "small_fc"},
        {"vectors": "adamw"},
        {"orthogonalize": True},
        {"weight_decay": 0.1, "hidden_sizes": (3,)},
    ],
    ids=str,
)
def test_functions_do_not_read_each_other(options):
    net, params = MLPOptimizer(**options).double(), functions()
    together, _, _ = run(net, params)
    for b in range(3):
        state, alone = (
            net.init_state({n: p[b : b + 1] for n, p in params.items()}),
            {n: p[b : b + 1] for n, p in params.items()},
        )
        for t in range(4):
            grads = {name: 0.1 * value[b : b + 1] for name, value in functions(seed=t + 1).items()}
            updates, state = net(grads, state, params=alone, lr=0.1, step=t)
            alone = {name: alone[name] + updates[name] for name in alone}
        for name in params:
            torch.testing.assert_close(alone[name][0], together[name][b], rtol=1e-12, atol=1e-12)


def test_weights_and_rates_for_each_function():
    net, params = MLPOptimizer(), functions(dtype=torch.float32)
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    sets, rates = flat + 0.1 * torch.randn(3, len(flat)), torch.tensor([0.1, 0.01, 0.0])
    together, _, _ = run(net, params, lr=rates, weights=sets)
    for b in range(3):
        torch.nn.utils.vector_to_parameters(sets[b], net.parameters())
        alone, _, _ = run(net, params, lr=float(rates[b]))
        for name in params:
            torch.testing.assert_close(alone[name][b], together[name][b], rtol=1e-4, atol=1e-5)
    assert torch.equal(together["matrix"][2], params["matrix"][2])  # at rate 0


@pytest.mark.parametrize("options", [{}, {"variant": "small_fc"}, {"orthogonalize": True}], ids=str)
def test_gradient_by_the_weights(options):
    net = MLPOptimizer(hidden_sizes=(3,), **options).double()
    params, flat = (
        functions(2, shapes={"w": (3, 2), "b": (3,)}),
        torch.nn.utils.parameters_to_vector(net.parameters()).detach(),
    )

    def end(weights):
        return torch.cat([value.flatten() for value in run(net, params, 2, weights=weights, scale=1.0)[0].values()])

    assert torch.autograd.gradcheck(end, flat.clone().requires_grad_())


@pytest.mark.parametrize("variant", ["celo", "small_fc"])
@pytest.mark.parametrize("hidden_sizes", [(2,), (8, 8), (4, 5, 3)])
def test_start_is_normalized_adam_without_bias_correction(variant, hidden_sizes):
    net, params = start_as_normalized_adam(MLPOptimizer(hidden_sizes, variant).double(), seed=3), functions()
    _, updates, state = run(net, params, steps=3, lr=1.0)
    for name in params:
        adam = state[name]["m"][:, 0] * (state[name]["v"] + 1e-8).rsqrt()
        size = adam.reshape(len(adam), -1).square().mean(1).add(1e-9).sqrt().reshape(-1, *[1] * (adam.dim() - 1))
        torch.testing.assert_close(-updates[name], adam / size, rtol=1e-6, atol=1e-6)
    m, gradients = 0, [0.1 * functions(seed=t + 1)["bias"] for t in range(3)]
    for g in gradients:
        m = 0.9 * m + 0.1 * g  # nothing is divided by 1 - 0.9^t
    torch.testing.assert_close(state["bias"]["m"][:, 0], m)
    again = start_as_normalized_adam(MLPOptimizer(hidden_sizes, variant).double(), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


def test_start_wants_two_units():
    with pytest.raises(ValueError, match="at least 2 units"):
        start_as_normalized_adam(MLPOptimizer((1,)))


@pytest.mark.parametrize("options", [{}, {"variant": "small_fc"}, {"vectors": "adamw"}], ids=str)
def test_zero_gradient_does_not_move(options):
    net, params = MLPOptimizer(weight_decay=0.1, **options), functions(2, torch.float32)
    _, _, state = run(net, params)
    grads = functions(2, torch.float32, seed=9)
    for value in grads.values():
        value[1] = 0
    updates, after = net(grads, state, params=params, step=4)
    for name in params:
        assert updates[name][0].abs().sum() > 0
        assert torch.equal(updates[name][1], torch.zeros_like(updates[name][1]))
    torch.testing.assert_close(after["matrix"]["m"][1, 0], 0.9 * state["matrix"]["m"][1, 0])  # the averages go on


def test_one_element_moves_by_the_rate():
    net = start_as_normalized_adam(MLPOptimizer())
    params = functions(4, torch.float32, {"scalar": (), "one": (1,), "matrix": (1, 1)})
    state = net.init_state(params)
    for size in (1e-2, 1.0, 100.0):
        grads = {name: size * torch.ones_like(value) for name, value in params.items()}
        updates, state = net(grads, state, params=params, lr=0.03)
        for value in updates.values():
            torch.testing.assert_close(value, torch.full_like(value, -0.03), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((), None),
        ((5,), None),
        ((1, 7), (0, 1)),
        ((2, 5, 3), (1, 2)),
        ((3, 3, 3), (0, 1)),
        ((3, 2, 3), (0, 2)),
        ((4, 1, 3), (0, 2)),
        ((2, 3, 7, 7), (0, 1)),
        ((2, 1, 5, 5, 5), (0, 1)),
    ],
)
def test_matrix_axes(shape, axes):
    assert matrix_axes(shape) == axes


def test_convolution_reads_kernel_positions_alike():
    net, params = MLPOptimizer().double(), functions(2, shapes={"w": (4, 3, 2, 2), "cube": (2, 5, 3)})
    grads = functions(2, shapes={"w": (4, 3, 2, 2), "cube": (2, 5, 3)}, seed=1)
    updates, state = net(grads, net.init_state(params), params=params)
    squares = grads["w"].square()
    torch.testing.assert_close(state["w"]["rows"][:, 0], 0.1 * squares.mean((2, 3, 4)))
    torch.testing.assert_close(state["w"]["columns"][:, 2], 0.001 * squares.mean((1, 3, 4)))
    torch.testing.assert_close(state["cube"]["rows"][:, 0], 0.1 * grads["cube"].square().mean((1, 3)))
    turned = {name: {"w": lambda x: x.transpose(-1, -2), "cube": lambda x: x.movedim(-3, -1)}[name] for name in params}
    others, _ = net(
        {n: turned[n](g) for n, g in grads.items()},
        net.init_state({n: turned[n](p) for n, p in params.items()}),
        params={n: turned[n](p) for n, p in params.items()},
    )
    for name in params:  # where the kernel's positions stand does not matter, nor where the smallest axis does
        torch.testing.assert_close(others[name], turned[name](updates[name]))


def test_adamw_for_vectors_is_torchs():
    net, params = (
        MLPOptimizer(vectors="adamw", weight_decay=0.01).double(),
        functions(1, shapes={"bias": (7,), "scalar": ()}),
    )
    ours, _, _ = run(net, params, 6, lr=0.001)
    theirs = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.01)
    for t in range(6):
        for name, value in functions(1, seed=t + 1, shapes={"bias": (7,), "scalar": ()}).items():
            theirs[name].grad = 0.1 * value
        optimizer.step()
    for name in params:
        torch.testing.assert_close(ours[name], theirs[name].detach())


def test_weight_decay_is_decoupled():
    with_decay, without = MLPOptimizer(weight_decay=0.3).double(), MLPOptimizer().double()
    without.load_state_dict(with_decay.state_dict())
    params, grads = functions(), functions(seed=1)
    state = without.init_state(params)
    a, b = (net(grads, state, params=params, lr=0.1)[0] for net in (with_decay, without))
    for name in params:
        torch.testing.assert_close(a[name], b[name] - 0.1 * 0.3 * params[name])


def test_orthogonalized_matrices():
    net, params = (
        MLPOptimizer(orthogonalize=True).double(),
        functions(shapes={"wide": (4, 9), "tall": (6, 2, 1, 2), "bias": (3,)}),
    )
    plain = MLPOptimizer().double()
    plain.load_state_dict(net.state_dict())
    grads = functions(shapes={n: p.shape[1:] for n, p in params.items()}, seed=1)
    ours, theirs = (n(grads, n.init_state(params), params=params, lr=1.0)[0] for n in (net, plain))
    torch.testing.assert_close(ours["bias"], theirs["bias"])
    for name in ("wide", "tall"):
        values = torch.linalg.svdvals(ours[name].flatten(2))
        assert (values.amax(1) / values.amin(1) < 2).all()  # the iteration leaves them between 0.7 and 1.2
        before = torch.linalg.svd(theirs[name].flatten(2), full_matrices=False)
        turned = before.U.mT @ ours[name].flatten(2) @ before.Vh.mT
        torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-9)


def test_small_fc_reads_the_time_and_has_a_magnitude():
    net, params, grads = MLPOptimizer(variant="small_fc").double(), functions(), functions(seed=1)
    assert net.reads == {"params", "step"} and MLPOptimizer().reads == {"params"} and net.tensorwise
    assert net.layers["weight_0"].shape[0] == 39 and MLPOptimizer().layers["weight_0"].shape[0] == 30
    state = net.init_state(params)
    early, late = (net(grads, state, params=params, step=step)[0]["matrix"] for step in (0, 1000))
    assert not torch.allclose(early, late)
    each, _ = net(grads, state, params=params, step=torch.tensor([0, 1000, 0]))
    torch.testing.assert_close(each["matrix"][1], late[1])
    torch.testing.assert_close(each["matrix"][2], early[2])
    with torch.no_grad():
        net.layers["bias_2"][1] += 500.0
    louder, _ = net(grads, state, params=params, step=0)
    torch.testing.assert_close(louder["matrix"], early * math.exp(0.5))
    with pytest.raises(ValueError, match="step must be given"):
        net(grads, state, params=params)


def test_large_gradients_are_clipped():
    net, params = MLPOptimizer().double(), functions(1)
    state = net.init_state(params)
    a, b = (
        net({n: torch.full_like(p, size) for n, p in params.items()}, state, params=params)[0] for size in (1e3, 1e7)
    )
    for name in params:
        assert torch.equal(a[name], b[name])


def test_float32_is_near_float64():
    params = functions(2)
    net = MLPOptimizer()
    single = run(net, {n: p.float() for n, p in params.items()})[0]
    double = run(net.double(), params)[0]
    for name in params:
        assert single[name].dtype == torch.float32
        torch.testing.assert_close(single[name].double(), double[name], rtol=1e-3, atol=1e-4)


def test_config_rebuilds_it():
    options = dict(
        hidden_sizes=(4, 3),
        variant="celo",
        orthogonalize=True,
        vectors="adamw",
        weight_decay=0.1,
        lr=0.02,
        context=True,
    )
    net = MLPOptimizer(**options)
    assert net.config == options and MLPOptimizer(**net.config).config == options and "lr=0.02" in repr(net)
    params, grads = functions(dtype=torch.float32), functions(dtype=torch.float32, seed=1)
    default, given = (net(grads, net.init_state(params), params=params, lr=lr)[0] for lr in (None, 0.02))
    assert torch.equal(default["matrix"], given["matrix"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_sizes": ()}, "hidden_sizes"),
        ({"hidden_sizes": 8}, "hidden_sizes"),
        ({"hidden_sizes": (0,)}, "hidden_sizes"),
        ({"variant": "celo2"}, "variant"),
        ({"vectors": "adam"}, "vectors"),
        ({"orthogonalize": 5}, "orthogonalize"),
        ({"orthogonalize": True, "variant": "small_fc"}, "orthogonalize"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MLPOptimizer(**options)


def test_what_is_given_is_checked():
    net, params = MLPOptimizer(), functions(dtype=torch.float32)
    state = net.init_state(params)
    for change, message in (
        ({"grads": {"bias": params["bias"]}}, "grads must have the names"),
        ({"state": {}}, "state must have the names"),
        ({"weights": torch.zeros(7)}, "weights must be"),
        ({"grads": {**params, "bias": params["bias"][:, :2]}}, "grads\\['bias'\\]"),
    ):
        given = {"grads": params, "state": state, "params": params, **change}
        with pytest.raises(ValueError, match=message):
            net(given.pop("grads"), given.pop("state"), **given)


def test_the_length_of_a_step_does_not_depend_on_the_gradients_scale():
    """What the context reads are ratios: gradients of 1e-7, as in the first layers of a deep network, make steps as long as others."""
    net, params = start_as_normalized_adam(MLPOptimizer(context=True).double()), functions(2)
    with torch.no_grad():
        for name in ("context_weight_1", "context_bias_1"):
            net.layers[name][..., -1] = torch.randn(net.layers[name][..., -1].shape, dtype=torch.float64)
    lengths = []
    for scale in (1.0, 1e-7):
        state = net.init_state(params)
        for seed in range(3):
            grads = {name: scale * value for name, value in functions(2, seed=seed + 1).items()}
            updates, state = net(grads, state, params=params, lr=1.0)
        lengths.append(torch.stack([value.reshape(2, -1).square().mean(1).sqrt() for value in updates.values()]))
    torch.testing.assert_close(*lengths, rtol=1e-3, atol=0)
    assert lengths[0].std() > 0.01  # tensors differ
