"""One list of samples for every device: the kernels against plain fp64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import build, ops

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = (*FORMATS, "sliced")
SIZES = ((2, 20, 8, 6), (2, 16, 5, 9), (3, 7, 5, 9))
NAMES = ("c", "d", "eps", "strength", "b", "r", "s_next")
PRESENT = {  # the arguments a sample of mod_act has, beside c
    "everything": ("d", "eps", "strength", "b", "s_next"),
    "bias": ("b",),
    "demodulation": ("d",),
    "noise": ("eps", "strength"),
    "style": ("s_next",),
    "nothing": (),
    "image": ("d", "eps", "strength", "b", "r"),
    "image and style": ("d", "eps", "strength", "b", "r", "s_next"),
}
MOD_ACTS = [(op, present) for op in ("mod_act", "fir_mod_act") for present in PRESENT]
FIRS = [  # factor, transposed, pad, gain
    (1, False, 1, 4.0),
    (1, False, 2, 1.0),
    (1, True, 1, 4.0),
    (2, False, 1, 1.0),
    (2, True, 1, 4.0),
]


def spread(things) -> list[tuple]:
    """Every thing with every dtype, layouts and sizes in turn: every pair of these, not every
    triple."""
    return [
        (thing, dtype, LAYOUTS[(i + j) % 3], SIZES[(i // 3 + i + 2 * j) % 3])
        for i, thing in enumerate(things)
        for j, dtype in enumerate(TOLERANCE)
    ]


@pytest.fixture(scope="module", params=["kernels", "reference"])
def implementation(request) -> str:
    path, reason = build.load()
    if request.param == "kernels" and path != "native":
        pytest.skip(reason)
    return request.param


@pytest.fixture
def poison():
    """Memory that nobody wrote reads as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(5).isnan().all()  # on every device
    yield
    torch.use_deterministic_algorithms(False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rand(*shape: int, dtype=torch.float64, device="cpu", seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "sliced":
        around = F.pad(x, (1, 2, 0, 1, 2, 1))
        return around[:, 2:-1, :-1, 1:-2]
    return x.contiguous(memory_format=FORMATS[layout])


def sample(present, blur: bool, size, dtype=torch.float64, device="cpu") -> dict:
    """Arguments of (fir_)mod_act by name; `size` is N, C, H, W of the result."""
    n, c, h, w = size
    shapes = ((n, c), (n, 1, h, w), (), (c,), (n, c), (n, c))
    inputs = {"c": rand(n, c, h + blur, w + blur, dtype=dtype, device=device)}
    for i, (name, shape) in enumerate(zip(NAMES[1:], shapes)):
        inputs[name] = None
        if name in present:
            inputs[name] = rand(*shape, dtype=_wide(dtype), device=device, seed=i)
    return inputs


def plain_fir(x: Tensor, factor=1, transposed=False, pad=1, gain=1.0, size=None) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device)
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4) * (gain / 64)
    if not transposed:
        return F.conv2d(x, kernel, stride=factor, padding=pad, groups=x.shape[1])
    full = F.conv_transpose2d(x, kernel, stride=factor, groups=x.shape[1])
    full = F.pad(full, (0, 2, 0, 2))  # rows and columns that the stride left over
    return full[:, :, pad : pad + size[0], pad : pad + size[1]]


def plain_mod_act(blur, c, d, eps, strength, b, r, s_next) -> list[Tensor]:
    x = plain_fir(c, gain=4.0) if blur else c
    if d is not None:
        x = x * d[:, :, None, None]
    if eps is not None:
        x = x + strength * eps
    if b is not None:
        x = x + b[:, None, None]
    y = (F.leaky_relu(x, ops.SLOPE) * ops.GAIN).clamp(-ops.CLAMP, ops.CLAMP)
    outputs = [] if r is not None and s_next is None else [y]
    if s_next is not None:
        outputs = [y * s_next[:, :, None, None]]
    return outputs + ([] if r is None else [(y * r[:, :, None, None]).sum(1, keepdim=True)])


def plain_act_fir(c: Tensor, b: Tensor, down: int) -> Tensor:
    return plain_fir(plain_mod_act(False, c, *[None] * 3, b, None, None)[0], down)


def oracle(function, inputs: list, seed: int = 9) -> tuple[list[Tensor], list[Tensor], list]:
    """Outputs of `function` in fp64, gradients for them, and the inputs' gradients in fp64."""
    wide = [x.to(torch.float64, copy=True) if isinstance(x, Tensor) else x for x in inputs]
    tensors = [x.requires_grad_() for x in wide if isinstance(x, Tensor)]
    outputs = function(*wide)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    grads = [rand(*y.shape, seed=seed).to(inputs[0]).double() for y in outputs]
    found = iter(torch.autograd.grad(outputs, tensors, grads))
    return outputs, grads, [next(found) if isinstance(x, Tensor) else None for x in wide]


def mod_act_oracle(blur: bool, inputs: dict, size) -> tuple[list[Tensor], list[Tensor], list]:
    """`oracle` of plain_mod_act, with the summands [N, C, H, W] of the strength's gradient for it."""
    if inputs["strength"] is not None:
        inputs = inputs | {"strength": inputs["strength"].expand(size)}
    return oracle(lambda *values: plain_mod_act(blur, *values), list(inputs.values()))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[dtype]
    scale = expected.detach().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected.detach(), rtol=tolerance, atol=tolerance * scale
    )


def close_sum(actual: Tensor, summands: Tensor) -> None:
    """A sum may cancel: its rounding is measured by the sum of the absolute values."""
    assert actual.ndim == 0
    error = (actual.double() - summands.sum()).abs()
    assert error <= 2 * torch.finfo(actual.dtype).eps * summands.abs().sum()


def check(outputs, grads, expected_outputs, expected_grads, dtype, names=("c",)) -> None:
    """Images to the tolerance of their storage, vectors' gradients to that of fp32."""
    for y, expected in zip(outputs, expected_outputs, strict=True):
        close(y, expected, y.dtype)
    for name, grad, expected in zip(names, grads, expected_grads, strict=True):
        if expected is not None and name != "eps":
            if name == "strength":
                close_sum(grad, expected)
            else:
                close(grad, expected, dtype if name == "c" else _wide(dtype))


def run_mod_act(implementation, name, inputs: dict, grads) -> tuple[list, list]:
    """The outputs there are, and the gradients in the order of the inputs."""
    blur, values = name == "fir_mod_act", list(inputs.values())
    image, y = inputs["r"] is not None, inputs["r"] is None or inputs["s_next"] is not None
    gs = iter(grads)
    gy, gimage = next(gs) if y else None, next(gs) if image else None
    if implementation == "reference":
        outputs = ops._mod_act(*values, blur=blur)
        found = ops._mod_act_bwd(gy, gimage, *values, blur=blur)
    else:
        outputs = getattr(torch.ops.cxrgan, name)(*values)
        found = getattr(torch.ops.cxrgan, f"{name}_bwd")(gy, gimage, *values)
    dc, *vectors = found
    vectors.insert(1, None)  # eps
    return [o for o, there in zip(outputs, (y, image)) if there], [dc, *vectors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which, dtype, layout, size", spread(MOD_ACTS), ids=str)
def test_mod_act_agrees_with_fp64_autograd(
    implementation, poison, device, which, dtype, layout, size
):
    name, present = which
    blur = name == "fir_mod_act"
    inputs = sample(PRESENT[present], blur, size, dtype, device)
    torch.use_deterministic_algorithms(False)
    expected, grads, expected_grads = mod_act_oracle(blur, inputs, size)
    torch.use_deterministic_algorithms(True)
    inputs["c"] = laid_out(inputs["c"], layout)
    stored = [g.to(dtype if g.shape[1] == size[1] else _wide(dtype)) for g in grads]
    stored = [laid_out(g, layout) if g.shape[1] == size[1] else g for g in stored]
    outputs, found = run_mod_act(implementation, name, inputs, stored)
    check(outputs, found, expected, expected_grads, dtype, NAMES)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in (outputs[0], found[0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, channels", [(torch.float64, 37), (torch.float32, 40)], ids=str)
@pytest.mark.parametrize("name", ["mod_act", "fir_mod_act", "act_fir"])
def test_the_parts_a_larger_image_is_worked_on_in_add_up(device, name, dtype, channels):
    size = (2, channels, 57, 41)
    inputs = sample(PRESENT["image and style"], name == "fir_mod_act", size, dtype, device)
    if name == "act_fir":
        c, b = inputs["c"], inputs["b"]
        expected, (g,), expected_grads = oracle(plain_act_fir, [c, b, 2])
        found = torch.ops.cxrgan.act_fir_bwd(g.to(dtype), c, b, 2)
        check([ops.act_fir(c, b)], found, expected, expected_grads[:2], dtype, ("c", "b"))
        return
    expected, grads, expected_grads = mod_act_oracle(name == "fir_mod_act", inputs, size)
    outputs, found = run_mod_act("kernels", name, inputs, [g.to(dtype) for g in grads])
    check(outputs, found, expected, expected_grads, dtype, NAMES)


ACT_FIRS = spread([1, 2, 1, 2, 1, 2]) + [(1, torch.float32, "contiguous", (1, 1, 2, 3))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("down, dtype, layout, size", ACT_FIRS, ids=str)
def test_act_fir_agrees_with_fp64_autograd(
    implementation, poison, device, down, dtype, layout, size
):
    c = rand(*size, dtype=dtype, device=device)
    b = rand(size[1], dtype=_wide(dtype), device=device)
    torch.use_deterministic_algorithms(False)
    expected, grads, expected_grads = oracle(plain_act_fir, [c, b, down])
    torch.use_deterministic_algorithms(True)
    c, g = laid_out(c, layout), laid_out(grads[0].to(dtype), layout)
    if implementation == "reference":
        y, found = ops._act_fir(c, b, down), ops._act_fir_bwd(g, c, b, down)
    else:
        y, found = ops.act_fir(c, b, down), torch.ops.cxrgan.act_fir_bwd(g, c, b, down)
    check([y], found, expected, expected_grads[:2], dtype, ("c", "b"))


FIR_SAMPLES = spread(FIRS) + [(fir, torch.float32, "contiguous", (3, 1, 5, 9)) for fir in FIRS]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which, dtype, layout, size", FIR_SAMPLES, ids=str)
def test_fir_agrees_with_convolution(implementation, poison, device, which, dtype, layout, size):
    factor, transposed, pad, gain = which
    x = rand(*size, dtype=dtype, device=device)
    if transposed:
        out = [factor * s + (factor == 1) for s in size[2:]]
    else:
        out = [(s + 2 * pad - 4) // factor + 1 for s in size[2:]]
    torch.use_deterministic_algorithms(False)
    expected = plain_fir(x.double(), factor, transposed, pad, gain, out)
    fir = ops._fir if implementation == "reference" else torch.ops.cxrgan.fir
    torch.use_deterministic_algorithms(True)
    close(fir(laid_out(x, layout), factor, transposed, pad, *out, gain), expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_activations_beyond_the_clamp_are_cut_and_pass_no_gradient(implementation, device):
    c = torch.tensor([-1e4, -300.0, 0.0, 100.0, 300.0, float("nan")], device=device)
    inputs = dict.fromkeys(NAMES) | {"c": c.view(1, 1, 2, 3)}
    outputs, (dc, *_) = run_mod_act(
        implementation, "mod_act", inputs, [torch.ones(1, 1, 2, 3, device=device)]
    )
    low, gain = -300 * ops.SLOPE * ops.GAIN, ops.GAIN
    y = torch.tensor([-256.0, low, 0.0, 100 * gain, 256.0, float("nan")])
    torch.testing.assert_close(outputs[0].flatten().cpu(), y, equal_nan=True)
    slopes = torch.tensor([0.0, gain * ops.SLOPE, gain * ops.SLOPE, gain, 0.0])
    torch.testing.assert_close(dc.flatten()[:5].cpu(), slopes)


# ---- what follows goes through the dispatcher, to the kernels where there are any ----

FUNCTIONS = {
    "mod_act": lambda v: ops.mod_act(*(v[k] for k in NAMES if k != "r")),
    "fir_mod_act": lambda v: ops.fir_mod_act(*(v[k] for k in NAMES if k != "r")),
    "mod_act_image": lambda v: ops.mod_act_image(*v.values()),
    "fir_mod_act_image": lambda v: ops.fir_mod_act_image(*v.values()),
    "last mod_act_image": lambda v: ops.mod_act_image(*(v | {"s_next": None}).values())[1],
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    build.load()
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives_of_mod_act(device, name):
    inputs = sample(PRESENT["image and style"], "fir" in name, (2, 3, 3, 4), device=device)
    wanted = [k for k in NAMES if k != "eps"]
    values = [inputs[k].requires_grad_() for k in wanted]

    def function(*values):
        return FUNCTIONS[name](inputs | dict(zip(wanted, values)))

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "function",
    [
        lambda c, b: ops.act_fir(c, b),
        lambda c, b: ops.act_fir(c, b, down=1),
        lambda c, b: ops.mod_act(c, b=b),
        lambda c, b: ops.fir(c, up=2),
        lambda c, b: ops.fir(c, down=2),
        lambda c, b: ops.fir(c, pad=2, gain=4.0),
    ],
    ids=["act_fir", "act_fir down=1", "bias", "fir up", "fir down", "fir"],
)
def test_first_and_second_derivatives(device, function):
    values = [rand(2, 3, 6, 5, device=device), rand(3, device=device)]
    values = [x.requires_grad_() for x in values]
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


class Critic(nn.Module):
    """A discriminator in small, with the package's ops or spelt out."""

    def __init__(self, plain: bool):
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.skip, self.plain = nn.Conv2d(2, 5, 1), plain
        self.bias0, self.bias1 = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            y = self.conv1(plain_act_fir(self.conv0(x), self.bias0, 2))
            y = plain_mod_act(False, y, None, None, None, self.bias1, None, None)[0]
            return (y + self.skip(plain_fir(x, 2))).square().sum((1, 2, 3))
        y = self.conv1(ops.act_fir(self.conv0(x), self.bias0))
        y = ops.mod_act(y, b=self.bias1)
        return (y + self.skip(ops.fir(x, down=2))).square().sum((1, 2, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_an_r1_penalty(device):
    torch.manual_seed(0)
    fused = Critic(plain=False).to(device, memory_format=torch.channels_last)
    plain = Critic(plain=True).to(device, torch.float64)
    plain.load_state_dict(fused.state_dict())
    x = rand(3, 2, 12, 12, device=device)

    def penalty(critic, x):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        grad.square().sum((1, 2, 3)).mean().backward()
        return [p.grad for p in critic.parameters()]

    for actual, expected in zip(penalty(fused, x.float()), penalty(plain, x), strict=True):
        if expected is not None:  # a last bias has no second derivative
            scale = expected.abs().max().item()
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("present", ["everything", "bias", "image", "image and style"])
@pytest.mark.parametrize("name", ["mod_act", "fir_mod_act"])
def test_mod_act_is_a_well_behaved_operator(device, name, present):
    blur = name == "fir_mod_act"
    inputs = sample(PRESENT[present], blur, (2, 8, 4, 6), torch.float32, device)
    values = list(inputs.values())
    y, image = getattr(torch.ops.cxrgan, name)(*values)
    gy, gimage = (rand(*o.shape).to(o) if o.numel() else None for o in (y, image))
    for tensor, key in zip(values, NAMES):
        if tensor is not None and key != "eps":
            tensor.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.cxrgan, name).default, tuple(values))
    bwd = getattr(torch.ops.cxrgan, f"{name}_bwd").default
    torch.library.opcheck(bwd, (gy, gimage, *values))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("down", [1, 2])
def test_act_fir_and_fir_are_well_behaved_operators(device, down):
    c = rand(2, 8, 6, 6, dtype=torch.float32, device=device).requires_grad_()
    b = rand(8, dtype=torch.float32, device=device).requires_grad_()
    g = torch.rand_like(ops.act_fir(c, b, down)).requires_grad_()
    torch.library.opcheck(torch.ops.cxrgan.act_fir.default, (c, b, down))
    torch.library.opcheck(torch.ops.cxrgan.act_fir_bwd.default, (g, c, b, down))
    torch.library.opcheck(torch.ops.cxrgan.fir.default, (c, down, False, 1, *g.shape[2:], 4.0))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(device):
    inputs = sample(PRESENT["image and style"], True, (2, 8, 8, 8), torch.float32, device)
    x = inputs["c"].requires_grad_()

    def function(x):
        y, image = ops.fir_mod_act_image(*(inputs | {"c": x}).values())
        return (ops.act_fir(y, inputs["b"]).sum() + ops.fir(image, up=2).square().sum()).sin()

    (expected,) = torch.autograd.grad(function(x), x)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_mixes_half_activations_with_wide_vectors(device):
    inputs = sample(PRESENT["image and style"], False, (2, 8, 4, 4), torch.float32, device)
    inputs["s_next"] = inputs["s_next"].bfloat16()  # what a linear layer gives under autocast
    values = {k: v if k == "eps" else v.requires_grad_() for k, v in inputs.items()}
    weight = rand(8, 8, 3, 3, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        c = F.conv2d(values["c"], weight, padding=1)
        y, image = ops.mod_act_image(*(values | {"c": c}).values())
        up = ops.fir(image, up=2)
    assert (y.dtype, image.dtype, up.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    (y.float().sum() + up.sum()).backward()  # and a gradient that is one number everywhere
    for name, value in values.items():
        if name != "eps":
            assert value.grad.dtype == value.dtype and value.grad.shape == value.shape
            assert value.grad.isfinite().all() and value.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_used_needs_a_gradient(device):
    inputs = sample(PRESENT["image and style"], True, (2, 4, 4, 4), device=device)
    inputs["b"].requires_grad_()
    y, image = ops.fir_mod_act_image(*inputs.values())
    (alone,) = torch.autograd.grad(image.sum(), inputs["b"], retain_graph=True)
    (both,) = torch.autograd.grad(image.sum() + 0 * y.sum(), inputs["b"])
    torch.testing.assert_close(alone, both)


def test_noise_that_asks_for_a_gradient_is_refused():
    inputs = sample(PRESENT["noise"], False, (1, 2, 3, 3))
    inputs["eps"].requires_grad_()
    with pytest.raises(NotImplementedError, match="eps"):
        FUNCTIONS["mod_act"](inputs).sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_one_noise_serves_a_whole_batch(device):
    inputs = sample(PRESENT["everything"], True, (3, 4, 5, 6), device=device)
    inputs["eps"] = inputs["eps"][:1]
    inputs["strength"].requires_grad_()
    results = []
    for eps in (inputs["eps"], inputs["eps"].expand(3, -1, -1, -1)):
        y = FUNCTIONS["fir_mod_act"](inputs | {"eps": eps})
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs["strength"])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch_gives_empty_images_and_zero_gradients(device):
    inputs = sample(PRESENT["image and style"], True, (0, 4, 6, 6), torch.float32, device)
    inputs["b"].requires_grad_()
    y, image = ops.fir_mod_act_image(*inputs.values())
    assert y.shape == (0, 4, 6, 6) and image.shape == (0, 1, 6, 6)
    (y.sum() + image.sum()).backward()
    assert not inputs["b"].grad.any()
    assert ops.act_fir(y, inputs["b"]).shape == (0, 4, 3, 3)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = sample(PRESENT["image and style"], True, (3, 24, 40, 40), torch.float32)
    inputs["c"].requires_grad_(), inputs["b"].requires_grad_(), inputs["strength"].requires_grad_()
    wanted = (inputs["c"], inputs["b"], inputs["strength"])

    def run(threads: int):
        torch.set_num_threads(threads)
        y, image = ops.fir_mod_act_image(*inputs.values())
        z = ops.act_fir(y, inputs["b"])
        return [z, image, *torch.autograd.grad([z, image], wanted, [z.detach(), image.detach()])]

    before = torch.get_num_threads()
    try:
        for one, two in zip(run(1), run(2)):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_of_the_wrong_size_are_refused(device):
    c = torch.zeros(2, 4, 6, 6, device=device)
    with pytest.raises(RuntimeError):
        ops.mod_act(c, b=torch.zeros(3, device=device))
    with pytest.raises(RuntimeError):
        ops.mod_act(c, d=torch.zeros(2, 5, device=device))
    with pytest.raises(RuntimeError):
        ops.fir_mod_act(c[:, :, :1, :1], b=torch.zeros(4, device=device))
