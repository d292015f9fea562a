"""The fused operations of the networks: everything a layer does between two convolutions.

Each operation is one pass over the activations. Here are its schema, its reference in plain torch,
its fake and its autograd formula; a native kernel that `cxr.build` has loaded takes the reference's
place. Arithmetic is in fp32 (fp64 for fp64), whatever the storage type. The convolution's output is
saved for the backward pass; the rest is computed again from it. Results are channels_last.

The blur is the separable [1, 3, 3, 1] / 8 of Karras et al. 2019 (StyleGAN, section 2).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 0.2  # of every leaky ReLU
GAIN = math.sqrt(2)  # preserves the variance through a leaky ReLU
CLAMP = 256.0  # limit of the activations, for half precision


def mod_act(
    c: Tensor,
    d: Tensor | None = None,
    eps: Tensor | None = None,
    strength: Tensor | None = None,
    b: Tensor | None = None,
    s_next: Tensor | None = None,
) -> Tensor:
    """`s_next * clamp(gain * lrelu(c * d + strength * eps + b))`: all that follows a convolution.

    Without an optional argument, its factor or term is left out. `eps` gets no gradient.

    Parameters
    ----------
    c : [N, C, H, W], convolution output
    d : [N, C], demodulation (Karras et al. 2020, StyleGAN2, section 2.2)
    eps : [N, 1, H, W] or [1, 1, H, W], unit Gaussian noise, scaled by the scalar `strength`
    b : [C], bias
    s_next : [N, C], the style of the layer that reads the result
    """
    return torch.ops.cxrgan.mod_act(c, d, eps, strength, b, None, s_next)[0]


def mod_act_image(
    c: Tensor,
    d: Tensor,
    eps: Tensor,
    strength: Tensor,
    b: Tensor,
    r: Tensor,
    s_next: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The end of a block: `mod_act`, and a 1x1 convolution of the activation to a grey image.

    Parameters are those of `mod_act`, and
    r : [N, C], the weight of the convolution to the image, modulated by its style

    Returns
    -------
    y * s_next : [N, C, H, W], or None without `s_next` (the last block)
    image : [N, 1, H, W], `sum_c r[n, c] * y[n, c]` in fp32
    """
    y, image = torch.ops.cxrgan.mod_act(c, d, eps, strength, b, r, s_next)
    return (None if s_next is None else y), image


def fir_mod_act(
    c: Tensor,
    d: Tensor | None = None,
    eps: Tensor | None = None,
    strength: Tensor | None = None,
    b: Tensor | None = None,
    s_next: Tensor | None = None,
) -> Tensor:
    """`mod_act` of the blurred `c` [N, C, 2H + 1, 2W + 1], which is the output of a transposed
    convolution with stride 2. Returns [N, C, 2H, 2W]."""
    return torch.ops.cxrgan.fir_mod_act(c, d, eps, strength, b, None, s_next)[0]


def fir_mod_act_image(
    c: Tensor,
    d: Tensor,
    eps: Tensor,
    strength: Tensor,
    b: Tensor,
    r: Tensor,
    s_next: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """`mod_act_image` of the blurred `c`, as in `fir_mod_act`."""
    y, image = torch.ops.cxrgan.fir_mod_act(c, d, eps, strength, b, r, s_next)
    return (None if s_next is None else y), image


def act_fir(c: Tensor, b: Tensor, down: int = 2) -> Tensor:
    """`fir(gain * lrelu(c + b), down)` of `c` [N, C, H, W]. Returns [N, C, H / 2, W / 2] for
    `down=2` and [N, C, H - 1, W - 1] for `down=1`."""
    return torch.ops.cxrgan.act_fir(c, b, down)


def fir(x: Tensor, up: int = 1, down: int = 1, gain: float = 1.0, pad: int = 1) -> Tensor:
    """Blur `x` [N, C, H, W] with [1, 3, 3, 1] and resample it by a factor of 2, up or down.

    The height of the result is 2H for `up=2`, H / 2 for `down=2`, and H + 2 pad - 3 for
    `up=down=1`; the width likewise. Resampling preserves the mean.
    """
    if up == 2:
        sizes = [2 * size for size in x.shape[2:]]
        return torch.ops.cxrgan.fir(x, 2, True, 1, *sizes, gain * 4)
    sizes = [(size + 2 * pad - 4) // down + 1 for size in x.shape[2:]]
    return torch.ops.cxrgan.fir(x, down, False, pad, *sizes, gain)


# ---- the references ----


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def channels_last(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).contiguous(memory_format=torch.channels_last)


def _per_pixel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector [N, C] or [C], reshaped so that it multiplies `like` [N, C, H, W] by channel."""
    return vector.to(like.dtype)[..., None, None]


def _fir(
    x: Tensor, factor: int, transposed: bool, pad: int, height: int, width: int, gain: float
) -> Tensor:
    """The blur with stride `factor`, or its transpose, to [N, C, height, width]."""
    i = torch.arange(4, device=x.device, dtype=wide(x[:0]).dtype)
    taps = 1 + i * (3 - i)  # 1, 3, 3, 1, made where x is: while a CUDA graph is recorded, no copy
    kernel = (torch.outer(taps, taps) * (gain / 64)).expand(x.shape[1], 1, 4, 4)
    with torch.autocast(x.device.type, enabled=False):
        if not transposed:
            y = F.conv2d(wide(x), kernel, None, factor, pad, groups=x.shape[1])
        else:
            sizes = zip((height, width), x.shape[2:])
            extra = [out - (size - 1) * factor - 4 + 2 * pad for out, size in sizes]
            y = F.conv_transpose2d(wide(x), kernel, None, factor, pad, extra, x.shape[1])
    return channels_last(y, x)


def _blur(x: Tensor) -> Tensor:
    """The blur of `fir_mod_act`."""
    return torch.ops.cxrgan.fir(x, 1, False, 1, x.shape[2] - 1, x.shape[3] - 1, 4.0)


def _argument(x: Tensor, d, eps, strength, b) -> Tensor:
    """The argument of the activation, from `x` in fp32."""
    if d is not None and b is not None:
        x = torch.addcmul(_per_pixel(b, x), x, _per_pixel(d, x))
    elif d is not None:
        x = x * _per_pixel(d, x)
    elif b is not None:
        x = x + _per_pixel(b, x)
    return x if eps is None else x + strength.to(x.dtype) * eps.to(x.dtype)


def _activate(x: Tensor) -> Tensor:
    return (F.leaky_relu(x, SLOPE) * GAIN).clamp(-CLAMP, CLAMP)


def _activate_bwd(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`g` times the derivative of `y = _activate(x)`, without the gain."""
    g = torch.ops.aten.hardtanh_backward(g, y, -CLAMP, CLAMP)
    return torch.ops.aten.leaky_relu_backward(g, x, SLOPE, False)


def _mod_act(c, d, eps, strength, b, r, s_next, blur: bool = False) -> tuple[Tensor, Tensor]:
    x = wide(c)
    a = _activate(_argument(_blur(x) if blur else x, d, eps, strength, b))
    y = a if s_next is None else a * _per_pixel(s_next, a)
    y = c.new_empty(0) if r is not None and s_next is None else channels_last(y, c)
    image = None if r is None else (a * _per_pixel(r, a)).sum(1, keepdim=True).contiguous()
    return y, a.new_empty(0) if image is None else image


def _mod_act_bwd(gy, gimage, c, d, eps, strength, b, r, s_next, blur: bool = False):
    x = _blur(wide(c)) if blur else wide(c)
    argument = _argument(x, d, eps, strength, b)
    a = _activate(argument)
    ga, dr, ds = 0, None, None
    if gy is not None:
        gy = wide(gy)
        ds = None if s_next is None else (gy * a).sum((2, 3))
        ga = gy * GAIN if s_next is None else gy * (_per_pixel(s_next, a) * GAIN)
    if gimage is not None:
        dr = (gimage * a).sum((2, 3))
        ga = ga + gimage * (_per_pixel(r, a) * GAIN)
    g = _activate_bwd(ga, argument, a)
    dd = None if d is None else (g * x).sum((2, 3))
    dstrength = None if eps is None else (g.sum(1, keepdim=True) * eps.to(g.dtype)).sum()
    db = None if b is None else g.sum((0, 2, 3))
    if d is not None:
        g = g * _per_pixel(d, g)
    if blur:
        g = torch.ops.cxrgan.fir(g, 1, True, 1, *c.shape[2:], 4.0)
    wanted = ((dd, d), (dstrength, strength), (db, b), (dr, r), (ds, s_next))
    return channels_last(g, c), *(_present(grad, of, x) for grad, of in wanted)


def _present(grad: Tensor | None, of: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of an input. An operator cannot return None, so the result is empty if there is
    no input, and zero if the result does not depend on the input."""
    if grad is not None:
        return grad
    return like.new_empty(0) if of is None else like.new_zeros(of.shape)


def _act_fir(c: Tensor, b: Tensor, down: int) -> Tensor:
    return channels_last(fir(_activate(_argument(wide(c), None, None, None, b)), down=down), c)


def _act_fir_bwd(g: Tensor, c: Tensor, b: Tensor, down: int) -> tuple[Tensor, Tensor]:
    g = torch.ops.cxrgan.fir(wide(g), down, True, 1, *c.shape[2:], 1.0)
    x = _argument(wide(c), None, None, None, b)
    g = _activate_bwd(g * GAIN, x, _activate(x))
    return channels_last(g, c), g.sum((0, 2, 3))


# ---- the fakes ----


def _image_like(c: Tensor, height: int, width: int) -> Tensor:
    empty = c.new_empty((*c.shape[:2], height, width))
    return empty.contiguous(memory_format=torch.channels_last)


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mod_act_fake(c, d, eps, strength, b, r, s_next, blur: bool = False):
    n, _, height, width = c.shape
    height, width = height - int(blur), width - int(blur)  # symbolic sizes take no bool
    y = _image_like(c, height, width)
    image = () if r is None else (n, 1, height, width)
    return (
        c.new_empty(0) if r is not None and s_next is None else y,
        c.new_empty(image or 0, dtype=wide_dtype(c)),
    )


def _mod_act_bwd_fake(gy, gimage, c, d, eps, strength, b, r, s_next):
    vectors = (
        c.new_empty(0 if of is None else of.shape, dtype=wide_dtype(c))
        for of in (d, strength, b, r, s_next)
    )
    return torch.empty_like(c, memory_format=torch.channels_last), *vectors


def _act_fir_fake(c: Tensor, b: Tensor, down: int) -> Tensor:
    return _image_like(c, *((size - 2) // down + 1 for size in c.shape[2:]))


def _act_fir_bwd_fake(g: Tensor, c: Tensor, b: Tensor, down: int) -> tuple[Tensor, Tensor]:
    bias = c.new_empty(c.shape[1], dtype=wide_dtype(c))
    return torch.empty_like(c, memory_format=torch.channels_last), bias


def _fir_fake(x, factor, transposed, pad, height, width, gain) -> Tensor:
    return _image_like(x, height, width)


# ---- autograd ----


def _save(ctx, inputs: Sequence, output) -> None:
    """Save an operation's inputs: tensors, which come first in every schema, and numbers."""
    tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.numbers = inputs[len(tensors) :]
    ctx.set_materialize_grads(isinstance(output, Tensor))  # no zeros for an unused output


def _like(grad: Tensor, of: Tensor | None) -> Tensor | None:
    return None if of is None else grad.to(of.dtype).view(of.shape)


def _mod_act_backward(ctx, gy, gimage, bwd: Callable):
    _, d, _, strength, b, r, s_next = ctx.saved_tensors
    if ctx.needs_input_grad[2]:
        raise NotImplementedError("mod_act has no gradient for eps")
    gy = None if r is not None and s_next is None else gy  # this output is empty
    gimage = None if r is None else gimage
    if gy is None and gimage is None:
        return (None,) * 7
    dc, dd, dstrength, db, dr, ds = bwd(gy, gimage, *ctx.saved_tensors)
    vectors = (_like(dd, d), None, _like(dstrength, strength), _like(db, b))
    return dc, *vectors, _like(dr, r), _like(ds, s_next)


def _act_fir_backward(ctx, g):
    dc, db = torch.ops.cxrgan.act_fir_bwd(g, *ctx.saved_tensors, *ctx.numbers)
    return dc, _like(db, ctx.saved_tensors[1]), None


def _fir_save(ctx, inputs: Sequence, output) -> None:
    ctx.size, ctx.numbers = inputs[0].shape[2:], inputs[1:]


def _fir_backward(ctx, g):
    factor, transposed, pad, _, _, gain = ctx.numbers
    return torch.ops.cxrgan.fir(g, factor, not transposed, pad, *ctx.size, gain), *[None] * 6


def _replay(ctx, *grads, reference: Callable):
    """The autograd formula of a `_bwd` operation: differentiate its reference.

    The reference gets aliases of the saved tensors, so that only this operation is differentiated.
    With `create_graph` the graph reaches its inputs, so derivatives of any order are right.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
        outputs = reference(*inputs, *ctx.numbers)
    pairs = [(y, g) for y, g in zip(outputs, grads) if g is not None and y.requires_grad]
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    gradients = {}
    if pairs and wanted:
        ys, gs = zip(*pairs)
        xs = [inputs[i] for i in wanted]
        grads = torch.autograd.grad(ys, xs, gs, create_graph=create_graph, allow_unused=True)
        gradients = dict(zip(wanted, grads))
    return tuple(gradients.get(i) for i in range(len(inputs) + len(ctx.numbers)))


# ---- registration ----

_library = torch.library.Library("cxrgan", "DEF")


def register(
    name: str,
    schema: str,
    reference: Callable,
    fake: Callable,
    backward: Callable,
    save: Callable = _save,
) -> None:
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cxrgan::{name}", fake, lib=_library)
    torch.library.register_autograd(f"cxrgan::{name}", backward, setup_context=save, lib=_library)


def _register_mod_act(name: str, blur: bool) -> None:
    inputs = (
        "Tensor c, Tensor? d, Tensor? eps, Tensor? strength, Tensor? b, Tensor? r, Tensor? s_next"
    )
    bwd_reference = partial(_mod_act_bwd, blur=blur)
    register(
        f"{name}_bwd",
        f"(Tensor? gy, Tensor? gimage, {inputs}) -> (Tensor dc, Tensor dd, Tensor dstrength,"
        " Tensor db, Tensor dr, Tensor ds_next)",
        bwd_reference,
        _mod_act_bwd_fake,
        partial(_replay, reference=bwd_reference),
    )
    register(
        name,
        f"({inputs}) -> (Tensor y, Tensor image)",
        partial(_mod_act, blur=blur),
        partial(_mod_act_fake, blur=blur),
        partial(_mod_act_backward, bwd=getattr(torch.ops.cxrgan, f"{name}_bwd")),
    )


_register_mod_act("mod_act", blur=False)
_register_mod_act("fir_mod_act", blur=True)
register(
    "act_fir",
    "(Tensor c, Tensor b, int down) -> Tensor",
    _act_fir,
    _act_fir_fake,
    _act_fir_backward,
)
register(
    "act_fir_bwd",
    "(Tensor g, Tensor c, Tensor b, int down) -> (Tensor dc, Tensor db)",
    _act_fir_bwd,
    _act_fir_bwd_fake,
    partial(_replay, reference=_act_fir_bwd),
)
register(
    "fir",
    "(Tensor x, int factor, bool transposed, int pad, SymInt height, SymInt width, float gain)"
    " -> Tensor",
    _fir,
    _fir_fake,
    _fir_backward,
    _fir_save,
)
