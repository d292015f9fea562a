"""The figures of an explanation: a film's frames and a sheet of tiles, drawn with Pillow alone."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image

from cxr import UsageError
from cxr.canvas import FINE, MUTED, RULE, SURFACE, TEXT, Canvas, Colour, Vector, png
from cxr.files import replacing
from cxr.images import resize

HEALTHY, DISEASED = (86, 164, 255), (255, 96, 72)  # also less and more, in a signed heat map
GLOW = (255, 214, 64)
FILMS = ("gif", "webp", "mp4", "none")
REST, GREYS, CLEAR = 4, 64, 255  # frames that a film rests at its ends; of a GIF: greys, no colour
SIDE, GAP, LINE = 340, 16, 24  # of a panel: a tile, the space around it, a line of text
TILE, TOP, ROW = 224, 22, 286  # of a film: a tile, the upper edge, a row of tiles and their words
FOOT = TOP + ROW + TILE + 32
PLOT = (2 * GAP + TILE + 34, TOP + ROW + 42, 3 * (TILE + GAP) - 8, TOP + ROW + 200)
FILM = ("the original", "the original, changed", "as the GAN draws it")
FOOTER = "research only, no diagnosis; left and right as in the file"
TITLES = {
    "latent_ig": "latent IG",
    "difference": "difference",
    "gradient": "gradient",
    "integrated_gradients": "integrated gradients",
    "grad_cam": "Grad-CAM",
}

Tile = tuple[str, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Scene:
    """What a film shows beside what changes from frame to frame.

    original: uint8 [R, R]; before: its probability; heat: a map [R, R] laid over it; positive: the
    name of the diseased class; found: the dose at which the image itself was found, marked on the
    dose axis; banner: words in red above all.
    """

    original: np.ndarray
    before: float
    heat: np.ndarray
    positive: str = "pneumonia"
    found: float | None = None
    banner: str = ""


def film(
    scene: Scene,
    drawn: np.ndarray,
    overlaid: np.ndarray,
    doses: Sequence[float],
    probabilities: Sequence[tuple[float, float]],
) -> list[np.ndarray]:
    """The X-ray at each dose beside the original, with the CNN's answers so far: a figure per frame.

    drawn, overlaid: uint8 [F, R, R], the generator's frames and the path laid over the original;
    doses: F numbers in [0, 1]; probabilities: F pairs of them, the answer to either. Returns F
    figures, uint8 [H, W, 3], of the same size. What does not change is equal in all of them, to the
    pixel.
    """
    pictures = list(zip(overlaid, drawn, strict=True))
    points = [(dose, *pair) for dose, pair in zip(doses, probabilities, strict=True)]
    return [
        _film_frame(scene, pair, points[: count + 1])
        for count, (pair, _) in enumerate(zip(pictures, points, strict=True))
    ]


@dataclass(frozen=True)
class Sheet:
    """What a panel shows: a sentence, tiles, lines below, and a banner's words in red above all.

    A tile is (title of one or two lines, image uint8 [R, R], heat float [R, R] laid over it, or
    None). A heat with signs runs from blue (against the disease) to red (for it), one without from
    nothing to yellow, each scaled to its own 99.5 percentile, which its title may tell.
    """

    sentence: str
    large: Sequence[Tile]  # three of them, or none
    small: Sequence[Tile]
    lines: Sequence[str]
    banner: str = ""


def panel(sheet: Sheet) -> np.ndarray:
    """The panel as uint8 [H, W, 3]."""
    return _panel(sheet, Canvas).array()


def panel_svg(sheet: Sheet) -> str:
    """The panel as an SVG file, with its words and numbers as text."""
    return _panel(sheet, Vector).svg()


def _panel(sheet: Sheet, kind: type[Canvas]) -> Canvas:
    width = GAP + 3 * (SIDE + GAP)
    columns = 7 if sheet.large else 5
    side = (width - GAP) // columns - GAP
    head = textwrap.wrap(sheet.sentence, (width - 2 * GAP) // 10)
    words = [textwrap.wrap(line, (width - 2 * GAP) // 9) or [""] for line in sheet.lines]
    y = GAP + (2 * LINE if sheet.banner else 0)
    below = y + LINE * len(head) + (2 * LINE + 8 + SIDE + GAP if sheet.large else 0)
    rows = -(-len(sheet.small) // columns)
    bottom = below + rows * (side + 2 * LINE + GAP)
    height = bottom + LINE * (sum(map(len, words)) + 3) + GAP
    canvas = kind(width, height)
    canvas.banner(sheet.banner, 2 * LINE, 22)
    for text in head:
        canvas.text(GAP, y, text, 20, TEXT, width=width - 2 * GAP)
        y += LINE
    for place, tile in enumerate(sheet.large):
        _draw_tile(canvas, GAP + place * (SIDE + GAP), y + 2 * LINE + 8, tile, SIDE, 18)
    for place, tile in enumerate(sheet.small):
        row, column = divmod(place, columns)
        x, top = GAP + column * (side + GAP), below + row * (side + 2 * LINE + GAP)
        _draw_tile(canvas, x, top + 2 * LINE, tile, side, 14)
    y = bottom
    for text in (line for lines in words for line in lines):
        canvas.text(GAP, y, text, 16, TEXT, width=width - 2 * GAP)
        y += LINE
    if any(heat is not None for _, _, heat in (*sheet.large, *sheet.small)):
        _draw_legend(canvas, GAP, y)
    canvas.text(GAP, y + LINE + 4, FOOTER, 13, MUTED)
    return canvas


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


def _draw_tile(canvas: Canvas, x: int, y: int, tile: Tile, side: int, size: int) -> None:
    """The picture's corner is at (x, y); the title stands above, its last line next to it."""
    name, image, heat = tile
    signed = heat is not None and bool(np.min(heat) < 0)
    canvas.picture(x, y, overlay(image, heat, signed, side * FINE))
    lines = name.split("\n")
    for number, text in enumerate(lines):
        above = 6 + (size + 6) * (len(lines) - number)
        canvas.text(x, y - above, text, size, MUTED if number else TEXT, width=side)


def _draw_legend(canvas: Canvas, x: float, y: float) -> None:
    grey, ramp = np.full((64, 64), 96, np.uint8), np.linspace(0, 1, 64)[None].repeat(64, axis=0)
    for signed, low, high in (
        (True, "against the disease", "for it, as the classifier reads it"),
        (False, "nothing", "most, in a map without signs"),
    ):
        bar = overlay(grey, 2 * ramp - 1 if signed else ramp, signed, 96 * FINE)[: 10 * FINE]
        x = canvas.text(x, y + 4, low, 13, MUTED) + 8
        canvas.picture(round(x), y + 7, bar)
        x = canvas.text(round(x) + 96 + 8, y + 4, high, 13, MUTED) + 32


def _film_frame(
    scene: Scene,
    pictures: tuple[np.ndarray, np.ndarray],
    points: list[tuple[float, float, float]],
) -> np.ndarray:
    canvas = Canvas(GAP + 3 * (TILE + GAP), FOOT + 28)
    canvas.banner(scene.banner, 18, 13)
    dose, of_drawn, of_overlaid = points[-1]
    answers = (scene.before, of_overlaid, of_drawn)
    for column, (name, picture, p) in enumerate(
        zip(FILM, (scene.original, *pictures), answers, strict=True)
    ):
        x = GAP + column * (TILE + GAP)
        canvas.picture(x, TOP, overlay(picture, None, False, TILE * FINE))
        canvas.text(x, TOP + TILE + 5, name, 14, TEXT, width=TILE)
        answer = f"probability of {scene.positive}"
        end = canvas.text(x, TOP + TILE + 25, answer, 15, _response_colour(p), width=TILE - 40)
        canvas.text(end + 6, TOP + TILE + 25, f"{p:.2f}", 15, _response_colour(p))
    y = TOP + ROW
    canvas.picture(GAP, y, overlay(scene.original, scene.heat, True, TILE * FINE))
    canvas.text(GAP, y + TILE + 5, f"red for {scene.positive}, blue against", 14, TEXT, width=TILE)
    canvas.text(2 * GAP + TILE, y + 16, f"amount of disease drawn: {dose:.2f}", 18, TEXT, "ls")
    _draw_curves(canvas, points, scene.found)
    canvas.text(GAP, FOOT, FOOTER, 13, MUTED)
    return canvas.array()


def _draw_curves(
    canvas: Canvas, points: list[tuple[float, float, float]], found: float | None
) -> None:
    left, top, right, bottom = PLOT

    def place(dose: float, probability: float) -> tuple[float, float]:
        return left + min(dose, 1) * (right - left), bottom - probability * (bottom - top)

    canvas.box(left, top, right, bottom, SURFACE)
    for tick in (0, 0.5, 1):
        x, y = place(tick, tick)
        canvas.line([(left, y), (right, y)], RULE, 1, dash=6 if tick == 0.5 else 0)
        canvas.text(left - 8, y, f"{tick:g}", 14, MUTED, anchor="rm")
        name = {0: "0 healthy", 1: "1 diseased"}.get(tick, f"{tick:g}")
        canvas.text(x, bottom + 6, name, 14, MUTED, {0: "lt", 1: "rt"}.get(tick, "mt"))
    words = "colour: the original, changed; grey: as the GAN draws it"
    canvas.text((left + right) / 2, bottom + 26, words, 13, MUTED, anchor="mt")
    if found is not None:
        x = place(found, 0)[0]
        canvas.line([(x, top), (x, bottom)], TEXT, 1.5, dash=3)
        canvas.text(min(max(x, left + 34), right - 34), top - 5, "this image", 13, TEXT, "ms")
    drawn, curve = ([place(point[0], point[which]) for point in points] for which in (1, 2))
    for ends in pairwise(drawn):
        canvas.line(ends, MUTED, 2)
    for ends, (_, _, probability) in zip(pairwise(curve), points[1:], strict=True):
        canvas.line(ends, _response_colour(probability), 4)
    canvas.dot(*curve[-1], 7, _response_colour(points[-1][2]))


def _response_colour(probability: float) -> Colour:
    blend = np.array(HEALTHY) + probability * np.subtract(DISEASED, HEALTHY)
    return tuple(int(value) for value in blend)


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 [H, W] or [H, W, 3] as PNG, whole or not at all. Raises CxrError."""
    with replacing(path) as temporary:
        temporary.write_bytes(png(image))


def check_film(kind: str) -> None:
    """Raises UsageError if films of this kind cannot be written here."""
    if kind not in FILMS:
        raise UsageError(f"a film is {', '.join(FILMS)}, not {kind!r}")
    if kind == "mp4" and not find_spec("imageio_ffmpeg"):
        raise UsageError("--film mp4 needs ffmpeg: pip install 'imageio[ffmpeg]', or take webp")


def write_film(path: str | Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """Write F frames, uint8 [H, W] or [H, W, 3], as the film that the path's suffix names: .gif, .webp
    or .mp4. It rests on the first and the last frame, and plays forth and back for ever; a GIF, to
    be small, forth alone. Raises CxrError."""
    frames = [np.array(Image.fromarray(frame).convert("RGB")) for frame in frames]
    kind = Path(path).suffix[1:]
    times = [1000 / fps] * len(frames)  # milliseconds
    times[0] = times[-1] = REST * 1000 / fps
    if kind != "gif":
        frames, times = frames + frames[-2:0:-1], times + times[-2:0:-1]
    with replacing(path) as temporary:
        if kind == "mp4":
            _write_mp4(temporary, frames, times, fps)
        else:
            first, *rest = map(Image.fromarray, frames) if kind == "webp" else _indexed(frames)
            options = {"quality": 80, "method": 4} if kind == "webp" else {"disposal": 1}
            first.save(
                *(temporary, kind.upper()),
                save_all=True,
                append_images=rest,
                loop=0,
                duration=[round(time) for time in times],
                **options,
            )


def _write_mp4(path: Path, frames: list[np.ndarray], times: list[float], fps: float) -> None:
    """Every frame as often as its time asks; the sides made even, as H.264 needs them."""
    shown = [f for f, time in zip(frames, times) for _ in range(round(time * fps / 1000))]
    height, width = (side - side % 2 for side in shown[0].shape[:2])
    codec = {"codec": "libx264", "macro_block_size": 1, "pixelformat": "yuv420p"}
    options = {"plugin": "FFMPEG", "extension": ".mp4", "fps": fps}
    path.write_bytes(
        imageio.imwrite("<bytes>", [f[:height, :width] for f in shown], **options, **codec)
    )


def _indexed(frames: Sequence[np.ndarray]) -> list[Image.Image]:
    """Frames uint8 [H, W, 3] as palette images: 64 greys, and the best 191 colours for the rest. A
    pixel that does not change is transparent from the second frame on: equal ones take no room.

    Pillow's own choices either drown a thin red curve in X-ray greys or tint the X-ray.
    """
    pixels = np.concatenate(frames)
    levels = np.rint(np.linspace(0, 255, GREYS)).astype(int)
    palette = levels.repeat(3).tolist()
    index = np.uint8(np.rint(pixels[..., 0] * ((GREYS - 1) / 255)))
    coloured = np.ptp(pixels, axis=-1) > 0
    if coloured.any():
        rest = Image.fromarray(pixels[coloured][None]).quantize(CLEAR - GREYS)  # one long row
        palette += rest.getpalette()[: 3 * (CLEAR - GREYS)]
        index[coloured] = GREYS + np.array(rest)[0]
    index = index.reshape(len(frames), *frames[0].shape[:2])
    same = index[1:] == index[:-1]
    index[1:][same] = CLEAR
    images = [Image.fromarray(one) for one in index]
    for image in images:
        image.putpalette(palette + [0] * (3 * (CLEAR + 1) - len(palette)))
        image.info["transparency"] = CLEAR
    return images


def grid(images: np.ndarray, heads: Sequence[str]) -> np.ndarray:
    """Images uint8 [rows, columns, R, R] -> one sheet uint8 [H, W, 3] with a head over each column;
    each is enlarged by a whole number to 128 pixels or more, so that all of its pixels stay alike."""
    rows, columns, size, _ = images.shape
    times = -(-128 // size)
    step = size * times + 2
    canvas = Canvas(columns * step - 2, rows * step - 2 + LINE)
    for column, head in enumerate(heads):
        middle = column * step + step / 2 - 1
        canvas.text(middle, LINE / 2, head, 13, TEXT, "mm", width=step - 6)
        for row in range(rows):
            tile = images[row, column].repeat(times * FINE, 0).repeat(times * FINE, 1)
            canvas.picture(column * step, LINE + row * step, tile[..., None].repeat(3, 2))
    return canvas.array()
