import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cxr
from cxr import CxrError, UsageError
from cxr.cnn.adapter import IMAGENET, Adapted, adapt, inputs, log_odds

NAMES = ("NORMAL", "PNEUMONIA", "COVID")


class Echo(nn.Module):
    """Answers the same whatever it is shown, and keeps what it was shown."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        self.seen = x
        return self.answer


def test_adapt_is_the_packages_own():
    assert cxr.adapt is adapt
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        _ = cxr.adopt


def test_the_cnn_gets_its_size_channels_and_range():
    net = Echo(torch.zeros(2))
    x = torch.linspace(-1, 1, 2 * 32 * 32).view(2, 1, 32, 32)
    adapt(net, 48, 3, value_range=(-1024, 1024))(x)
    assert net.seen.shape == (2, 3, 48, 48)
    assert torch.equal(net.seen[:, 0], net.seen[:, 2])
    assert net.seen.min() >= -1024 and net.seen.max() <= 1024
    torch.testing.assert_close(net.seen.mean(), x.mean() * 1024, atol=1, rtol=0)


def test_mean_and_std_are_applied_after_the_range():
    x = torch.full((1, 1, 224, 224), 0.0)
    prepared = inputs(**IMAGENET)(x)
    expected = (0.5 - torch.tensor(IMAGENET["mean"])) / torch.tensor(IMAGENET["std"])
    torch.testing.assert_close(prepared[0, :, 100, 100], expected)


def test_shrinking_is_antialiased_and_has_a_gradient_everywhere():
    stripes = torch.ones(1, 1, 64, 64)
    stripes[..., ::2] = -1
    x = stripes.requires_grad_()
    small = inputs(size=16)(x)
    assert small.abs().max() < 0.2  # of every second column alone, it would be -1 or 1
    small.sum().backward()
    assert (x.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_answer_is_the_logit(shape):
    answer = torch.randn(shape)
    found = adapt(Echo(answer))(torch.zeros(4, 1, 32, 32))
    torch.testing.assert_close(found, answer.flatten())


@pytest.mark.parametrize("target", ["COVID", 2, "2"])
def test_a_softmax_becomes_the_log_odds_of_the_target_against_the_rest(target):
    z = torch.randn(5, 3)
    p = z.softmax(1)[:, 2]
    x = torch.zeros(5, 1, 32, 32)
    options = {"target": target, "classes": NAMES}
    for output, answers in (("logits", z), ("probabilities", z.softmax(1))):
        found = adapt(Echo(answers), output=output, **options)(x)
        torch.testing.assert_close(found, (p / (1 - p)).log())


@pytest.mark.parametrize(
    ("output", "end"), [("logit", nn.Identity()), ("probability", nn.Sigmoid())]
)
def test_a_sigmoids_target_keeps_its_own_logit(output, end):
    z = torch.randn(5, 3)
    found = adapt(Echo(end(z)), output=output, target=1)(torch.zeros(5, 1, 32, 32))
    torch.testing.assert_close(found, z[:, 1], atol=1e-5, rtol=1e-5)


def test_log_odds_are_finite_with_a_gradient_at_both_ends():
    p = torch.tensor([0.0, 1e-9, 0.5, 1 - 1e-7, 1.0], requires_grad=True)
    z = log_odds(p)
    z.sum().backward()
    assert z.isfinite().all() and p.grad.isfinite().all() and (p.grad > 0).all()


def test_a_modules_own_names_are_its_classes():
    net = Echo(torch.randn(2, 3))
    net.pathologies = list(NAMES)
    assert adapt(net, target="COVID").answer.target == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": "sigmoid"}, "say one of logit, probability"),
        ({"mean": (0.5, 0.5), "channels": 3}, "mean has 2 numbers for 3 channels"),
        ({"std": 0.0}, "std must be above 0"),
        ({"value_range": (1, 0)}, "the lower end comes first"),
        ({"size": 0}, "must be 1 or more"),
        ({"target": "TB", "classes": NAMES}, "no such class; there are NORMAL, PNEUMONIA, COVID"),
        ({"target": 3, "classes": NAMES}, "there are 3 classes"),
        ({"target": "TB"}, "does not name its answers"),
        ({"target": "A", "classes": ["A", "A"]}, "several classes are called so"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        adapt(nn.Identity(), **options)


@pytest.mark.parametrize(
    ("answer", "options", "words"),
    [
        (torch.zeros(2, 3), {}, "gives 3 answers for an image: say which is the target"),
        (torch.zeros(2, 3), {"target": 5}, "answers are 0 to 2"),
        (torch.zeros(2, 4), {"target": 1, "classes": NAMES}, "4 answers and has 3 classes"),
        (torch.zeros(2, 1), {"target": 0}, "leave the target out"),
        (torch.zeros(2), {"output": "logits"}, "one answer is no softmax"),
        ((torch.zeros(2),), {}, "gives a tuple"),
        (torch.tensor([0.5, -3.0]), {"output": "probability"}, "answers -3, which is no prob"),
        (torch.zeros(()), {}, "not a tensor"),
    ],
)
def test_answers_that_do_not_fit_are_named(answer, options, words):
    with pytest.raises(CxrError, match=words):
        adapt(Echo(answer), **options)(torch.zeros(2, 1, 32, 32))


def test_only_a_module_is_adapted():
    with pytest.raises(UsageError, match="not function"):
        adapt(lambda x: x)


def test_the_gradient_at_the_image_is_that_of_the_whole():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 23 * 23, 3))
    whole = adapt(net.double(), 48, mean=0.5, std=0.2, output="logits", target=1).double()
    assert isinstance(whole, Adapted)
    whole.answer.register_forward_pre_hook(lambda _, y: y)
    x = torch.rand(1, 1, 32, 32, dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(whole(x).sum(), x)
    step = 1e-3 * F.normalize(slope, dim=(2, 3))
    rise = (whole(x + step) - whole(x - step)).item() / 2e-3
    assert rise == pytest.approx(slope.norm().item(), rel=0.01)
