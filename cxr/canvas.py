"""Two sheets that figures are drawn on, with the same strokes: one of pixels, one of vectors."""

import base64
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from xml.sax.saxutils import escape

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FINE = 2  # everything is drawn so many times larger, then averaged: smooth lines
BACKGROUND, SURFACE, RULE = (16, 18, 23), (25, 28, 35), (62, 68, 80)
TEXT, MUTED, ALARM = (236, 239, 244), (150, 158, 172), (190, 20, 20)

Colour = tuple[int, int, int]


class Canvas:
    """Drawing in final pixels on a sheet FINE times larger."""

    def __init__(self, width: int, height: int):
        self.width = width
        self.sheet = Image.new("RGB", (width * FINE, height * FINE), BACKGROUND)
        self.pen = ImageDraw.Draw(self.sheet)

    def array(self) -> np.ndarray:
        return np.array(self.sheet.reduce(FINE))

    def picture(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Pixels are uint8 [h * FINE, w * FINE, 3]."""
        self.sheet.paste(Image.fromarray(pixels), (x * FINE, y * FINE))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.pen.rectangle([left * FINE, top * FINE, right * FINE, bottom * FINE], colour)

    def banner(self, words: str, height: int, size: int) -> None:
        """Words on a red strip along the upper edge; nothing where there are none."""
        if words:
            self.box(0, 0, self.width, height, ALARM)
            self.text(self.width / 2, height / 2, words.upper(), size, (255, 255, 255), "mm")

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self.pen.circle((x * FINE, y * FINE), radius * FINE, colour, TEXT, FINE)

    def line(
        self, ends: Sequence[tuple[float, float]], colour: Colour, width: float, dash: int = 0
    ) -> None:
        """A straight line with round ends, or in dashes of `dash` pixels."""
        (x0, y0), (x1, y1) = np.array(ends) * FINE
        thick = round(width * FINE)
        pieces = max(1, round(np.hypot(x1 - x0, y1 - y0) / (dash * FINE))) if dash else 1
        cuts = np.linspace(0, 1, pieces + 1)
        for start, end in list(pairwise(cuts))[::2]:
            a = (x0 + start * (x1 - x0), y0 + start * (y1 - y0))
            b = (x0 + end * (x1 - x0), y0 + end * (y1 - y0))
            self.pen.line([a, b], colour, thick)
            if not dash:
                for joint in (a, b):
                    self.pen.circle(joint, thick / 2, colour)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int,
        colour: Colour,
        anchor: str = "la",
        width: float | None = None,
    ) -> float:
        """Text, smaller where `width` asks for it, cut where even 11 is too large; returns its end.

        The end is the x at which left-aligned text stops.
        """
        words, size = fitted(words, size, width)
        self.pen.text((x * FINE, y * FINE), words, colour, font(size), anchor)
        return x + font(size).getlength(words) / FINE


class Vector(Canvas):
    """The strokes that a panel needs as SVG: words stay text, pictures are PNG files within it."""

    def __init__(self, width: int, height: int):
        self.width, self.height, self.parts = width, height, []
        self.box(0, 0, width, height, BACKGROUND)

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}"'
        view = f'viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} font-family="sans-serif">'
        return "\n".join([head, *self.parts, "</svg>\n"])

    def picture(self, x: int, y: int, pixels: np.ndarray) -> None:
        height, width = (side / FINE for side in pixels.shape[:2])
        small = np.array(Image.fromarray(pixels).reduce(FINE))
        data = base64.b64encode(png(small)).decode()
        place = f'x="{x}" y="{y}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<image {place} href="data:image/png;base64,{data}"/>')

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        place = f'x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"'
        self.parts.append(f'<rect {place} fill="rgb{colour}"/>')

    def text(self, x, y, words, size, colour, anchor="la", width=None) -> float:
        words, size = fitted(words, size, width)
        align = {"l": "start", "m": "middle", "r": "end"}[anchor[0]]
        down = {"a": size * 0.95, "m": size * 0.35, "t": size * 0.8, "s": 0}[anchor[1]]
        place = f'x="{x:g}" y="{y + down:g}" font-size="{size}" text-anchor="{align}"'
        self.parts.append(f'<text {place} fill="rgb{colour}">{escape(words)}</text>')
        return x + font(size).getlength(words) / FINE


def fitted(words: str, size: int, width: float | None) -> tuple[str, int]:
    """Words and their size, smaller where `width` asks for it, cut where even 11 is too large."""
    if width is not None:
        while size > 11 and font(size).getlength(words) > width * FINE:
            size -= 1
        while font(size).getlength(words) > width * FINE:
            words = words.removesuffix("...")[:-1] + "..."
    return words, size


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * FINE)


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] as the bytes of a PNG file."""
    return imageio.imwrite("<bytes>", image, extension=".png")
