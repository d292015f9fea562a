"""The fused operations of the networks, in plain torch.

Each function is one pass over the activations in the native kernels' sense: everything a layer
does between two convolutions. `c` is a convolution's output `[N, C, H, W]`; optional arguments
left out leave their factor out.

The blur is the separable [1, 3, 3, 1] / 8 of Karras et al. 2019 (StyleGAN, section 2).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 0.2  # of every leaky ReLU
GAIN = math.sqrt(2)  # keeps the variance through a leaky ReLU
CLAMP = 256.0  # bounds half-precision activations


def mod_act(
    c: Tensor,
    d: Tensor | None = None,
    eps: Tensor | None = None,
    strength: Tensor | None = None,
    b: Tensor | None = None,
    s_next: Tensor | None = None,
) -> Tensor:
    """`s_next * clamp(gain * lrelu(c * d + strength * eps + b))`, a layer's whole epilogue.

    Parameters
    ----------
    c : [N, C, H, W], convolution output
    d : [N, C], demodulation (Karras et al. 2020, StyleGAN2, section 2.2)
    eps : [N, 1, H, W], unit Gaussian noise, scaled by the scalar `strength`
    b : [C], bias
    s_next : [N, C], the style of the layer that reads the result
    """
    if d is not None:
        c = c * d.to(c.dtype)[:, :, None, None]
    if eps is not None:
        c = c + (strength * eps).to(c.dtype)
    if b is not None:
        c = c + b.to(c.dtype)[None, :, None, None]
    y = (F.leaky_relu(c, SLOPE) * GAIN).clamp(-CLAMP, CLAMP)
    return y if s_next is None else y * s_next.to(y.dtype)[:, :, None, None]


def mod_act_image(
    c: Tensor,
    d: Tensor,
    eps: Tensor,
    strength: Tensor,
    b: Tensor,
    r: Tensor,
    s_next: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The end of a block: `mod_act`, and the activation's 1x1 convolution to a grey image.

    Parameters are those of `mod_act`, and
    r : [N, C], the image convolution's weight, modulated by its style

    Returns
    -------
    y * s_next : [N, C, H, W], or None without `s_next` (the last block)
    image : [N, 1, H, W], `sum_c r[n, c] * y[n, c]` in fp32
    """
    y = mod_act(c, d, eps, strength, b)
    n, _, h, w = y.shape
    flat = y.permute(0, 2, 3, 1).reshape(n, h * w, -1)
    image = torch.bmm(flat, r.to(y.dtype)[:, :, None]).view(n, 1, h, w).float()
    return (None if s_next is None else y * s_next.to(y.dtype)[:, :, None, None]), image


def fir(x: Tensor, up: int = 1, down: int = 1, gain: float = 1.0, pad: int = 1) -> Tensor:
    """Blur `x` [N, C, H, W] with [1, 3, 3, 1], resampling by 2 up or down.

    `up=2` and `down=2` keep the signal's mean and return 2H and H/2; `up=down=1` returns
    H + 2 pad - 3.
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype)
    kernel = torch.outer(taps, taps) * (gain * up * up / 64)
    kernel = kernel.expand(x.shape[1], 1, 4, 4)
    if up == 2:
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
    return F.conv2d(x, kernel, stride=down, padding=pad, groups=x.shape[1])


def fir_mod_act(c: Tensor, *epilogue: Tensor | None) -> Tensor:
    """`mod_act` of the blurred `c` [N, C, 2H + 1, 2W + 1], the output of a stride-2 transposed
    convolution; the result is [N, C, 2H, 2W]."""
    return mod_act(fir(c, gain=4.0), *epilogue)


def fir_mod_act_image(c: Tensor, *epilogue: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """`mod_act_image` of the blurred `c`, as in `fir_mod_act`."""
    return mod_act_image(fir(c, gain=4.0), *epilogue)


def act_fir(c: Tensor, b: Tensor, down: int = 2) -> Tensor:
    """`fir(gain * lrelu(c + b), down)`: [N, C, H, W] to [N, C, H / down, W / down]."""
    return fir(mod_act(c, b=b), down=down)
