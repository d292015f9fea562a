import pytest
import torch
import torch.nn.functional as F

from cxr import build, norm
from cxr.norm import NormReLU

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SIZES = ((3, 16, 6, 5), (1, 24, 90, 70), (2, 64, 1, 1))  # the second in several bands of pixels


@pytest.fixture(params=["kernels", "reference"])
def operations(request):
    """The forward and the backward operation, native or in plain torch."""
    path, reason = build.load()
    if request.param == "reference":
        return norm._norm_relu, norm._norm_relu_bwd
    if path != "native":
        pytest.skip(reason)
    return torch.ops.cxrgan.norm_relu, torch.ops.cxrgan.norm_relu_bwd


def sample(size, dtype, mean=1.0):
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, g = (torch.randn(size, dtype=torch.float64) * 2 for _ in "xg")
    weight, bias = (torch.randn(size[1], dtype=wide) for _ in "wb")
    return g.to(dtype), (x + mean).to(dtype), weight, bias


def plain(g, x, weight, bias):
    """The result and the gradients by torch, in fp64."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.relu(F.group_norm(leaves[0], 8, *leaves[1:], 1e-5))
    return y, *torch.autograd.grad(y, leaves, g.double())


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm().clamp_min(1e-3)


@pytest.mark.parametrize("layout", ["usual", "channels last", "columns first"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_is_torchs_normalisation_and_relu_with_their_gradients(operations, dtype, size, layout):
    forward, backward = operations
    g, x, weight, bias = sample(size, dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "columns first":
        x = x.mT.contiguous().mT
    y, mean, rstd = forward(x, weight, bias, 8, 1e-5)
    dx, dweight, dbias = backward(g, x, weight, bias, mean, rstd)
    assert y.dtype == dx.dtype == dtype and mean.dtype == dweight.dtype == weight.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near((y, dx, dweight, dbias), plain(g, x, weight, bias), TOLERANCE[dtype])


def test_a_mean_far_from_zero_costs_no_digits(operations):
    forward, _ = operations
    g, x, weight, bias = sample((2, 16, 64, 64), torch.float32, mean=300.0)
    y, *_ = forward(x, weight, bias, 8, 1e-5)
    assert_near([y], plain(g, x, weight, bias)[:1], 1e-4)


def test_what_is_no_number_passes_through(operations):
    forward, _ = operations
    _, x, weight, bias = sample((2, 16, 6, 5), torch.float32)
    x[1, 3, 2, 2] = torch.nan
    y, *_ = forward(x, weight, bias, 8, 1e-5)
    assert y[0].isfinite().all() and y[1, 2:4].isnan().all() and y[1, 4:].isfinite().all()


def test_the_module_keeps_torchs_names_and_types():
    ours, theirs = NormReLU(16), torch.nn.GroupNorm(8, 16)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 16, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    y = ours(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and ours.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), F.relu(theirs(x.float())), atol=0.03, rtol=0.01)


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    (g,) = torch.autograd.grad(NormReLU(8)(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        g.sum().backward()


def test_operations_hold_what_torch_asks_of_one(operations):
    _, x, weight, bias = sample((2, 16, 6, 5), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.cxrgan.norm_relu.default, (*leaves, 8, 1e-5))


def test_results_do_not_depend_on_the_number_of_threads():
    build.load()
    g, x, weight, bias = sample((2, 24, 120, 90), torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y, mean, rstd = torch.ops.cxrgan.norm_relu(x, weight, bias, 8, 1e-5)
        results.append([y, *torch.ops.cxrgan.norm_relu_bwd(g, x, weight, bias, mean, rstd)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    ("change", "told"),
    [({"groups": 3}, "16 channels cannot be in 3 groups"), ({"weight": torch.ones(5)}, "weight")],
)
def test_arguments_that_do_not_fit_are_refused(change, told):
    if build.load()[0] != "native":
        pytest.skip("torch's own words")
    _, x, weight, bias = sample((2, 16, 6, 5), torch.float32)
    given = {"x": x, "weight": weight, "bias": bias, "groups": 8, "eps": 1e-5} | change
    with pytest.raises(RuntimeError, match=told):
        torch.ops.cxrgan.norm_relu(*given.values())
