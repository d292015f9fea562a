"""The figures of an explanation: a film's frames and a sheet of tiles, drawn with Pillow alone."""

import textwrap
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxr.files import replacing
from cxr.images import resize

FINE = (
    2  # everything is drawn this many times larger, then averaged: smooth lines without a library
)
BACKGROUND, SURFACE, RULE = (16, 18, 23), (25, 28, 35), (62, 68, 80)
TEXT, MUTED = (236, 239, 244), (150, 158, 172)
HEALTHY, DISEASED = (86, 164, 255), (255, 96, 72)  # also less and more, in a signed heat map
GLOW, ALARM = (255, 214, 64), (190, 20, 20)
SIDE, GAP, LINE = 256, 16, 24  # of a panel: a tile, the space around it, a line of text
FILM = ("as the GAN draws it", "the original, changed where needed")
FOOTER = "research only, no diagnosis"
TITLES = {
    "latent_ig": "latent IG",
    "difference": "difference",
    "gradient": "gradient",
    "integrated_gradients": "integrated gradients",
    "grad_cam": "Grad-CAM",
}

Colour = tuple[int, int, int]
Tile = tuple[str, np.ndarray, np.ndarray | None, bool]


def film(
    drawn: np.ndarray,
    overlaid: np.ndarray,
    doses: Sequence[float],
    probabilities: Sequence[tuple[float, float]],
    positive: str = "pneumonia",
    found: float | None = None,
    banner: str = "",
) -> list[np.ndarray]:
    """The X-ray at each dose beside the CNN's response so far, one figure per frame.

    drawn, overlaid: uint8 [F, R, R], the generator's frames and the path laid over the original;
    doses: F numbers in [0, 1]; probabilities: F pairs of them, the response to either; positive:
    the name of the diseased class; found: the dose at which the explained image itself was found,
    marked on the dose axis; banner: words in red above all. Returns F figures, uint8 [H, W, 3], of
    the same size.
    """
    pictures = list(zip(drawn, overlaid, strict=True))
    points = [(dose, *pair) for dose, pair in zip(doses, probabilities, strict=True)]
    return [
        _film_frame(pair, points[: count + 1], positive, found, banner)
        for count, (pair, _) in enumerate(zip(pictures, points, strict=True))
    ]


def panel(tiles: Sequence[Tile], caption: str, banner: str = "") -> np.ndarray:
    """A sheet of titled tiles, five to a row, with the caption's lines below, and the banner's words
    in red above.

    Each tile is (title, image, heat, signed): the title may have two lines; image uint8 [R, R];
    heat float [R, R] laid over it, or None; a signed heat runs from blue (less) to red (more), an
    unsigned one from nothing to yellow. Each heat is scaled to its own 99.5 percentile. Returns
    uint8 [H, W, 3].
    """
    rows = [tiles[start : start + 5] for start in range(0, len(tiles), 5)]
    titles = [LINE * max(tile[0].count("\n") + 1 for tile in row) + 6 for row in rows]
    width = GAP + len(rows[0]) * (SIDE + GAP)
    wrap = (width - 2 * GAP) // 9  # letters to a line
    words = [part for text in caption.splitlines() for part in textwrap.wrap(text, wrap)]
    kinds = sorted({signed for _, _, heat, signed in tiles if heat is not None})
    y = GAP + (2 * LINE if banner else 0)
    tiled = y + sum(titles) + len(rows) * (SIDE + GAP)
    canvas = _Canvas(width, tiled + LINE * (len(words) + bool(kinds) + 1) + GAP)
    canvas.banner(banner, 2 * LINE, 22)
    for row, title in zip(rows, titles, strict=True):
        for column, tile in enumerate(row):
            _draw_tile(canvas, GAP + column * (SIDE + GAP), y + title, tile)
        y += title + SIDE + GAP
    for text in words:
        canvas.text(GAP, y, text, 17, TEXT)
        y += LINE
    if kinds:
        _draw_legend(canvas, GAP, y, kinds)
        y += LINE
    canvas.text(GAP, y + 4, FOOTER, 13, MUTED)
    return canvas.array()


def overlay(image: np.ndarray, heat: np.ndarray | None, signed: bool, side: int) -> np.ndarray:
    """Greyscale uint8 [R, R] under a heat map [R, R] -> uint8 [side, side, 3]."""
    grey = resize(image, side).clip(0, 255)[..., None].repeat(3, axis=2)
    if heat is None:
        return np.uint8(grey)
    heat = np.asarray(heat, np.float32)
    scale = np.percentile(np.abs(heat), 99.5) or np.abs(heat).max() or 1
    strength = (resize(heat, side) / scale).clip(-1 if signed else 0, 1)[..., None]
    if signed:
        colour = np.where(strength > 0, DISEASED, HEALTHY)
    else:
        colour = DISEASED + strength * np.subtract(GLOW, DISEASED)
    cover = 0.85 * np.abs(strength)
    return np.uint8(grey * (1 - cover) + colour * cover)


def _draw_tile(canvas: "_Canvas", x: int, y: int, tile: Tile) -> None:
    """The picture's corner is at (x, y); the title stands above, its last line next to it."""
    name, image, heat, signed = tile
    canvas.picture(x, y, overlay(image, heat, signed, SIDE * FINE))
    lines = name.split("\n")
    for number, text in enumerate(lines):
        above = 6 + LINE * (len(lines) - number)
        canvas.text(x, y - above, text, 18, MUTED if number else TEXT, width=SIDE)


def _draw_legend(canvas: "_Canvas", x: float, y: float, kinds: list[bool]) -> None:
    grey, ramp = np.full((64, 64), 96, np.uint8), np.linspace(0, 1, 64)[None].repeat(64, axis=0)
    for signed in kinds:
        bar = overlay(grey, 2 * ramp - 1 if signed else ramp, signed, 96 * FINE)[: 10 * FINE]
        x = canvas.text(x, y + 4, "less" if signed else "none", 13, MUTED) + 8
        canvas.picture(round(x), y + 7, bar)
        x = canvas.text(round(x) + 96 + 8, y + 4, "more" if signed else "most", 13, MUTED) + 32


def _film_frame(
    pictures: tuple[np.ndarray, np.ndarray],
    points: list[tuple[float, float, float]],
    positive: str,
    found: float | None,
    banner: str,
) -> np.ndarray:
    canvas = _Canvas(1056, 404)
    canvas.banner(banner, 20, 14)
    dose, probability, _ = points[-1]
    for x, picture, name in zip((20, 356), pictures, FILM):
        canvas.picture(x, 20, overlay(picture, None, False, 320 * FINE))
        canvas.text(x, 348, name, 15, TEXT)
    end = canvas.text(702, 46, "dose", 28, TEXT, "ls")
    canvas.text(end + 8, 46, f"{dose:.2f}", 28, TEXT, "ls")
    colour = _response_colour(probability)
    end = canvas.text(702, 82, f"P({positive})", 28, colour, "ls", width=260)
    canvas.text(end + 8, 82, f"{probability:.2f}", 28, colour, "ls")
    _draw_curves(canvas, points, found)
    canvas.text(20, 376, FOOTER, 13, MUTED)
    return canvas.array()


def _draw_curves(
    canvas: "_Canvas", points: list[tuple[float, float, float]], found: float | None
) -> None:
    left, top, right, bottom = 738, 116, 1026, 318

    def place(dose: float, probability: float) -> tuple[float, float]:
        return left + min(dose, 1) * (right - left), bottom - probability * (bottom - top)

    canvas.box(left, top, right, bottom, SURFACE)
    for tick in (0, 0.5, 1):
        x, y = place(tick, tick)
        canvas.line([(left, y), (right, y)], RULE, 1, dash=6 if tick == 0.5 else 0)
        canvas.text(left - 8, y, f"{tick:g}", 15, MUTED, anchor="rm")
        canvas.text(x, bottom + 6, f"{tick:g}", 15, MUTED, anchor="mt")
    canvas.text((left + right) / 2, bottom + 26, "dose", 15, MUTED, anchor="mt")
    if found is not None:
        x = place(found, 0)[0]
        canvas.line([(x, top), (x, bottom)], TEXT, 1.5, dash=3)
        canvas.text(min(max(x, left + 34), right - 34), top - 7, "this image", 15, TEXT, "ms")
    laid, curve = ([place(point[0], point[which]) for point in points] for which in (2, 1))
    for ends in pairwise(laid):
        canvas.line(ends, MUTED, 2)
    for ends, (_, probability, _) in zip(pairwise(curve), points[1:], strict=True):
        canvas.line(ends, _response_colour(probability), 4)
    canvas.dot(*curve[-1], 7, _response_colour(points[-1][1]))
    canvas.text(702, 376, "coloured: the GAN's frames; grey: over the original", 13, MUTED)


def _response_colour(probability: float) -> Colour:
    blend = np.array(HEALTHY) + probability * np.subtract(DISEASED, HEALTHY)
    return tuple(int(value) for value in blend)


class _Canvas:
    """Drawing in final pixels on a sheet FINE times larger."""

    def __init__(self, width: int, height: int):
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
            width = self.sheet.width // FINE
            self.box(0, 0, width, height, ALARM)
            self.text(width / 2, height / 2, words.upper(), size, (255, 255, 255), "mm")

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
        if width is not None:
            while size > 11 and _font(size).getlength(words) > width * FINE:
                size -= 1
            while _font(size).getlength(words) > width * FINE:
                words = words.removesuffix("...")[:-1] + "..."
        self.pen.text((x * FINE, y * FINE), words, colour, _font(size), anchor)
        return x + _font(size).getlength(words) / FINE


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * FINE)


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 [H, W] or [H, W, 3] as PNG, whole or not at all. Raises CxrError."""
    with replacing(path) as temporary:
        temporary.write_bytes(png(image))


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] as the bytes of a PNG file."""
    return imageio.imwrite("<bytes>", image, extension=".png")


def write_gif(path: str | Path, frames: Sequence[np.ndarray], seconds: float) -> None:
    """Write F frames, uint8 [H, W] or [H, W, 3], as a GIF that plays forth and back for ever.

    It holds 2F - 2 frames, each shown for `seconds`, and rests on the first and the last. One
    palette serves all frames, so that nothing flickers. Raises CxrError.
    """
    height, width = frames[0].shape[:2]
    strip = _indexed(np.array(Image.fromarray(np.concatenate(frames)).convert("RGB")))
    tops = range(0, strip.height, height)
    forth = [strip.crop((0, top, width, top + height)) for top in tops]
    shown = [round(1000 * seconds)] * len(forth)  # milliseconds
    shown[0] = shown[-1] = 4 * shown[0]
    first, *rest = forth + forth[-2:0:-1]
    times = shown + shown[-2:0:-1]
    with replacing(path) as temporary:
        first.save(
            temporary, "GIF", save_all=True, append_images=rest, duration=times, loop=0, disposal=1
        )


def _indexed(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, 3] -> a palette image: 128 exact greys, and the best 128 colours for the rest.

    Pillow's own choices either drown a thin red curve in X-ray greys or tint the X-ray.
    """
    levels = np.rint(np.linspace(0, 255, 128)).astype(int)
    palette = levels.repeat(3).tolist()
    index = np.uint8(np.rint(pixels[..., 0] * (127 / 255)))
    coloured = np.ptp(pixels, axis=-1) > 0
    if coloured.any():
        rest = Image.fromarray(pixels[coloured][None]).quantize(128)  # one long row
        palette += rest.getpalette()
        index[coloured] = 128 + np.array(rest)[0]
    image = Image.fromarray(index)
    image.putpalette(palette)
    return image


def grid(images: np.ndarray, gap: int = 2) -> np.ndarray:
    """Images uint8 [rows, columns, R, R] -> one sheet uint8, `gap` grey pixels between them."""
    rows, columns, side, _ = images.shape
    step = side + gap
    sheet = np.full((rows * step - gap, columns * step - gap), 64, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * step, column * step
            sheet[top : top + side, left : left + side] = images[row, column]
    return sheet
