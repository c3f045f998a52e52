"""Imitation of a teacher: its gradient, the teacher's way from window to window, and a student that learns it."""

import pytest
import torch
from torch import nn

from gradbuffer.evaluation import evaluate, evaluate_baseline
from gradbuffer.nets.torch_optim import LearnedOptimizer
from gradbuffer.training.imitation import Demonstration, Teacher, imitation_gradient
from meta_training import meta_train
from optimizees import MetaBatch, MNISTNet, Quadratics
from optimizers import CoordinatewiseLSTM, NonFiniteError, RNNProp

TEACHERS = {
    "Adam": (torch.optim.Adam, {"lr": 0.1}),
    "NAG": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "weight decay": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
}
STUDENTS = {
    "LSTM": lambda: CoordinatewiseLSTM(4, preprocess="log_sign", output_scale=0.1),
    "odd": lambda: CoordinatewiseLSTM(12, 1, odd=True),
    "RNNProp": lambda: RNNProp(4),
    "frozen": lambda: freeze(CoordinatewiseLSTM(4)),
}


def freeze(net):
    net.lstm.weight_ih_l0.requires_grad_(False)
    return net


def quadratics(meta_batch=3):
    return Quadratics(dim=4, dtype=torch.float64).sample(meta_batch, torch.Generator().manual_seed(1))


class Scale(nn.Module):
    """Steps of a learned multiple of the gradient: a user's optimizer, without `replay`."""

    def __init__(self, rate=0.01):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def init_state(self, num_coordinates):
        return ()

    def forward(self, grad, state):
        return -self.rate * grad, state


def by_autograd(net, batch, teacher, state, step, unroll, theta=None, optimizer=None):
    """The imitation loss as one graph, each function's teacher by itself, on its own tensor."""
    (params,) = batch.params.values()
    theta = params.detach().clone() if theta is None else theta
    optimizer = optimizer or teacher[0]([theta], **teacher[1])
    loss = 0.0
    for t in range(unroll):
        at = theta.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(batch.loss({next(iter(batch.params)): at}, step + t).sum(), at)
        update, state = net(gradient.flatten(), state)
        before = theta.clone()
        theta.grad = gradient.clone()
        optimizer.step()
        loss = loss + 0.5 * (update.view_as(theta) - (theta - before)).square().sum(1).mean()
    wanted = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return dict(zip(wanted, grads)), loss.detach(), theta, optimizer


@pytest.mark.parametrize("student", [*STUDENTS, "a user's"])
@pytest.mark.parametrize("name", TEACHERS)
def test_the_gradient_equals_autograds(student, name):
    net = Scale().double() if student == "a user's" else STUDENTS[student]().double()
    batch, teacher, theta, optimizer = quadratics(), TEACHERS[name], None, None
    demonstration, state, params = Demonstration(*teacher, batch.params), net.init_state(12), None
    for step in (0, 5):  # the second window goes on from both states
        expected, loss, theta, optimizer = by_autograd(net, batch, teacher, state, step, 5, theta, optimizer)
        grads, info = imitation_gradient(net, batch, demonstration, state, step, 5)
        if student == "odd":
            expected = net.symmetrize(expected)
        assert grads.keys() == expected.keys()
        for key, grad in grads.items():
            assert (grad - expected[key]).norm() <= 1e-10 * expected[key].norm()
        torch.testing.assert_close(info.imitation, loss, rtol=1e-12, atol=0)
        (params,), state = info.params.values(), info.state
        torch.testing.assert_close(params, theta, rtol=1e-12, atol=0)
        assert not params.requires_grad and info.losses.shape == (5, 3)
    once, heavier = (
        imitation_gradient(net, batch, Demonstration(*teacher, batch.params), net.init_state(12), 0, 5, weight)[0]
        for weight in (1.0, 3.0)
    )
    for key, grad in once.items():
        torch.testing.assert_close(heavier[key], 3 * grad)


@pytest.mark.parametrize("name", [*TEACHERS, "learned"])
def test_the_teacher_goes_its_own_way(name):
    """Over windows, and through its saved state, as it does in an evaluation."""
    problem, learned = Quadratics(dim=3), CoordinatewiseLSTM(4, output_scale=0.1)
    teacher = (LearnedOptimizer, {"net": learned}) if name == "learned" else TEACHERS[name]
    batch = problem.sample(4, torch.Generator().manual_seed(1))
    net, losses = Scale(), []
    demonstration, params, state = Demonstration(*teacher, batch.params), batch.params, ()
    for step in (0, 6):
        _, info = imitation_gradient(net, batch, demonstration, state, step, 6)
        losses.append(info.losses)
        again = Demonstration(*teacher, batch.params)
        again.go_on(info.params, demonstration.state_dict())
        demonstration = again
    curves = evaluate(learned, problem, 12, 4) if name == "learned" else evaluate_baseline(*teacher, problem, 12, 4)
    torch.testing.assert_close(torch.cat(losses).T, curves)
    assert all(torch.equal(tensor, params[key]) for key, tensor in batch.params.items())  # not changed


def test_a_share_of_the_coordinates_is_an_unbiased_estimate(tiny_mnist, monkeypatch):
    from gradbuffer import unrolling

    monkeypatch.setattr(unrolling, "SMALLEST_SHARE", 1)
    problem = MNISTNet((3,), batch_size=8, root=tiny_mnist, dtype=torch.float64)
    batch, net, generator = problem.sample(1), Scale().double(), torch.Generator().manual_seed(0)
    net.coordinatewise = True

    def gradient(fraction):
        demonstration = Demonstration(torch.optim.Adam, {"lr": 0.01}, batch.params)
        return imitation_gradient(net, batch, demonstration, (), 0, 2, 1.0, fraction, generator)[0]["rate"]

    whole, parts = gradient(1.0), torch.stack([gradient(0.25) for _ in range(100)])
    assert (parts.mean() - whole).abs() < 4 * parts.std() / 10 and parts.std() > 0


def test_a_student_approaches_its_teacher():
    teacher, problem = (torch.optim.Adam, {"lr": 0.1}), Quadratics(dim=2)
    net = RNNProp(8)
    history = meta_train(
        net,
        problem,
        10,
        5,
        meta_batch=16,
        iterations=150,
        lr=0.02,
        warmup=5,
        teacher=teacher,
        imitation=1.0,
        validation_functions=4,
        progress=False,
        validation_every=150,
    )
    losses = [loss for _, loss in history.imitation]
    assert [iteration for iteration, _ in history.imitation] == list(range(150))
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    asked, made = evaluate_baseline(*teacher, problem, 10, 32), evaluate(net, problem, 10, 32)
    torch.testing.assert_close(made.mean(0), asked.mean(0), rtol=0.1, atol=0)


def test_a_share_of_the_draws_imitates():
    def run(**arguments):
        torch.manual_seed(0)
        return meta_train(
            CoordinatewiseLSTM(3, 1),
            Quadratics(dim=2),
            20,
            10,
            meta_batch=2,
            iterations=40,
            progress=False,
            validation_functions=2,
            validation_every=40,
            **arguments,
        )

    teacher = CoordinatewiseLSTM(3, 1)
    before = [parameter.clone() for parameter in teacher.parameters()]
    for share in (0.25, 0.5, 1.0):
        history = run(teacher=teacher, imitation=share)
        imitated = [iteration for iteration, _ in history.imitation]
        assert len(imitated) == 40 * share
        assert all(iteration + 1 in imitated for iteration in imitated if iteration % 2 == 0)  # all windows of a draw
        assert len(history.meta_loss) == 40 and not history.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
    assert run().imitation == []


def test_a_diverging_teacher_is_told():
    with pytest.raises(NonFiniteError, match="stopped at iteration 0: .*(teacher's way is not|grad must be) finite"):
        train(teacher=(torch.optim.SGD, {"lr": 1e30}), imitation=1.0)
    history = train(teacher=(torch.optim.SGD, {"lr": 1e30}), imitation=0.5, skip_non_finite=3, iterations=8)
    assert history.skipped and history.imitation == []
    batch = MetaBatch({"x": torch.ones(1, 2)}, lambda params, step: params["x"].sum(1) / 0.0)
    with pytest.raises(NonFiniteError):
        imitation_gradient(Scale(), batch, Demonstration(torch.optim.SGD, {"lr": 0.1}, batch.params), ())


def train(net=None, **arguments):
    return meta_train(
        net or CoordinatewiseLSTM(hidden_size=2),
        Quadratics(dim=2),
        progress=False,
        validation_functions=2,
        **{"iterations": 1, "meta_batch": 2, **arguments},
    )


def own_teacher():
    net = CoordinatewiseLSTM(2)
    return train(net, teacher=net, imitation=0.5)


ADAM = (torch.optim.Adam, {"lr": 0.1})


def window(**arguments):
    batch = quadratics()
    return imitation_gradient(Scale().double(), batch, Demonstration(*ADAM, batch.params), (), **arguments)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: train(imitation=0.3), ValueError, "imitation needs a teacher, got imitation=0.3"),
        (lambda: train(teacher=ADAM), ValueError, r"imitation must be a number in \(0, 1\] where .* got 0.0"),
        (lambda: train(teacher=ADAM, imitation=1.1), ValueError, r"imitation must be a number in \(0, 1\] .* got 1.1"),
        (lambda: train(teacher=ADAM, imitation=True), ValueError, "imitation must be a number .* got True"),
        (
            lambda: train(teacher=ADAM, imitation=0.3, imitation_weight=0),
            ValueError,
            "imitation_weight must be a positive",
        ),
        (own_teacher, ValueError, "teacher must be another optimizer than net"),
        (lambda: train(teacher="adam", imitation=0.3), TypeError, "teacher must be .* got 'adam'"),
        (lambda: train(teacher=nn.Linear(1, 1), imitation=0.3), TypeError, "teacher must be .* got Linear"),
        (
            lambda: train(teacher=(nn.Linear, {}), imitation=0.3),
            TypeError,
            r"teacher\[0\] must be a class of torch.optim",
        ),
        (lambda: train(teacher=(torch.optim.Adam, 0.1), imitation=0.3), TypeError, r"teacher\[1\] must be .* got 0.1"),
        (lambda: train(teacher=(torch.optim.LBFGS, {}), imitation=0.3), ValueError, "LBFGS needs a closure"),
        (lambda: train(teacher=(torch.optim.Adam, {"lr": -1.0}), imitation=0.3), ValueError, "Invalid learning rate"),
        (lambda: train(teacher=ADAM, imitation=1.0, method="bptt"), ValueError, "method must be .* got 'bptt'"),
        (lambda: window(unroll=0), ValueError, "unroll must be at least 1, got 0"),
        (lambda: window(step=-1), ValueError, "step must be at least 0, got -1"),
        (lambda: window(weight=-1.0), ValueError, "weight must be a positive number, got -1.0"),
        (lambda: window(replay_fraction=0.5), ValueError, "replay_fraction=0.5 needs"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_description_tells_teachers_apart():
    def describe(teacher, *more):
        return Teacher(*(teacher if isinstance(teacher, tuple) else (teacher, None)), *(more or (0.5, 1.0))).describe()

    torch.manual_seed(0)
    one, other = CoordinatewiseLSTM(2), CoordinatewiseLSTM(2)
    torch.manual_seed(0)
    texts = [
        describe(one),
        describe(other),
        describe(ADAM),
        describe((torch.optim.Adam, {"lr": 0.2})),
        describe(ADAM, 0.3, 1.0),
        describe(ADAM, 0.5, 2.0),
    ]
    assert len(set(texts)) == 6 and describe(CoordinatewiseLSTM(2)) == texts[0]
