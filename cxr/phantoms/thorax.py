"""A synthetic frontal chest: the anatomy as attenuation, and the X-ray film of it.

Everything is a function of continuous coordinates. The image frame is [-1, 1] x [-1, 1] (x to the
right, y down), and the pose maps it to the frame of the anatomy. Attenuations add up, and a film
curve turns them into an image. Area averaging gives any size, so a structure looks the same at all
sizes. The patient faces us: the patient's left side, with the heart, is on our right.
"""

from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import NamedTuple

import numpy as np

RIBS = 10
GRAIN = 256  # pixels of the film grain, on each side, whatever the size of the image


def _range(low: float, high: float) -> float:
    return field(metadata={"range": (low, high)})


@dataclass(frozen=True)
class Structure:
    """One healthy chest and its film. Lengths are in units of half the image's side."""

    # pose
    shift_x: float = _range(-0.06, 0.06)
    shift_y: float = _range(0.02, 0.16)
    tilt: float = _range(-0.07, 0.07)  # radians, in the image's plane
    scale: float = _range(1.16, 1.38)
    turn: float = _range(-0.035, 0.035)  # rotation: shift of the mediastinum in the rib cage
    # body
    width: float = _range(0.57, 0.68)  # half-width of the rib cage at its base
    apex: float = _range(-0.74, -0.62)  # height of the lungs' tips
    breath: float = _range(0.0, 1.0)  # 0 breathed out, 1 breathed in
    barrel: float = _range(2.4, 3.8)  # how fast the rib cage widens below the apex
    flesh: float = _range(0.04, 0.14)  # thickness of the chest wall outside the rib cage
    shoulder: float = _range(-0.05, 0.08)  # larger for lower shoulders
    arm: float = _range(0.05, 0.45)  # how far the arms are from the body
    chin: float = _range(-1.00, -0.76)  # height of its lower end
    # organs
    heart: float = _range(0.8, 1.2)
    heart_tilt: float = _range(0.35, 0.75)  # radians
    mediastinum: float = _range(0.09, 0.14)
    aorta: float = _range(0.04, 0.10)
    dome: float = _range(0.09, 0.18)  # how high the diaphragm arches
    dome_gap: float = _range(0.02, 0.08)  # how much higher the right half of the diaphragm is
    gas: float = _range(0.0, 0.12)  # radius of the stomach's bubble
    # bones
    rib_slope: float = _range(0.02, 0.22)
    rib_drop: float = _range(0.24, 0.33)  # how far a rib descends from the spine to the side
    rib_width: float = _range(0.020, 0.027)
    rib_density: float = _range(0.22, 0.44)
    spine_density: float = _range(0.18, 0.40)
    spine_bend: float = _range(-0.03, 0.03)
    clavicle_height: float = _range(-0.62, -0.50)
    clavicle_slope: float = _range(-0.05, 0.35)
    clavicle_density: float = _range(0.35, 0.60)
    # lung tissue
    vessel_density: float = _range(0.12, 0.26)
    # film
    exposure: float = _range(0.95, 1.35)  # attenuation that becomes mid-grey
    contrast: float = _range(1.6, 2.4)
    gamma: float = _range(0.85, 1.2)
    haze: float = _range(0.0, 0.10)  # scattered rays make black parts lighter
    vignette: float = _range(0.0, 0.35)
    heel: float = _range(-0.15, 0.15)  # heel effect: more exposure at one end of the body
    texture: float = _range(0.05, 0.13)
    grain: float = _range(0.005, 0.03)
    # the marker's place, if there is a marker
    marker_x: float = _range(-0.88, -0.78)
    marker_y: float = _range(-0.86, -0.70)
    # seeds of fine structures
    tree: int = _range(0, 2**31)
    noise: int = _range(0, 2**31)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Structure":
        """A random chest: every parameter is uniform in its range."""
        return cls(**{f.name: f.type(rng.uniform(*f.metadata["range"])) for f in fields(cls)})

    @property
    def base(self) -> float:
        """The height of the top of the diaphragm's right half."""
        return 0.26 + 0.24 * self.breath

    def cage(self, y: np.ndarray) -> np.ndarray:
        """The half-width of the inside of the rib cage at heights `y`."""
        rise = np.clip((y - self.apex + 0.06) / (self.base + 0.25 - self.apex), 0, 1)
        return self.width * (1 - (1 - rise) ** self.barrel) ** 0.62

    def bottom(self, x: np.ndarray) -> np.ndarray:
        """The height of the diaphragm at `x`. It has two domes; the left one is lower."""
        across = np.clip((np.abs(x) / self.width - 0.5) / 0.62, -0.97, 0.97)
        fall = 2 * self.dome * (1 - np.sqrt(1 - across**2))
        return self.base + fall + self.dome_gap * ramp(0.5 + 4 * x)

    def border(self, y: np.ndarray, left: bool) -> np.ndarray:
        """The half-width of mediastinum and heart at heights `y`, on one side."""
        rise = (y - self.apex) / (self.base - self.apex)
        heart = self.heart * (1.15 - 0.25 * self.breath)
        if not left:
            atrium = np.sin(np.pi * np.clip((rise - 0.45) / 0.65, 0, 1))
            return self.mediastinum - 0.01 + 0.08 * heart * atrium + self.turn
        knob = self.aorta * np.exp(-(((rise - 0.27) / 0.07) ** 2))
        swell = np.sin(0.64 * np.pi * np.clip((rise - 0.33) / 0.67, 0, 1.1))
        ventricle = 0.29 * heart * np.maximum(swell, 0) ** (1 + self.heart_tilt)
        return self.mediastinum - 0.02 + knob + ventricle - self.turn

    def place(self, side: int, across: float, down: float) -> tuple[float, float]:
        """Lung coordinates as (x, y) in the frame of the anatomy. across: 0 inside to 1 outside;
        down: 0 at the apex to 1 at the base."""
        y = self.apex + down * (self.base - self.apex)
        inner = self.border(y, left=side > 0)
        return side * (inner + across * (self.cage(y) - inner)), y


# ---------------------------------------------------------------------------------------------
# Drawing: shapes as functions of coordinates


def ramp(t: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, and a smooth step between."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _chord(q: np.ndarray) -> np.ndarray:
    """The length of a ray inside a round body of radius 1, at distance `q` from its axis."""
    return np.sqrt(np.clip(1 - q * q, 0, None))


def _tube(distance: np.ndarray, radius: float) -> np.ndarray:
    """The amount of bone on a ray through a hollow bone, at `distance` from the bone's axis."""
    q = distance / radius
    return _chord(q) - 0.4 * _chord(q / 0.74)


def _capsule(x, y, x0, y0, x1, y1) -> np.ndarray:
    """The distance of (x, y) from the segment from (x0, y0) to (x1, y1)."""
    along_x, along_y = x1 - x0, y1 - y0
    t = ((x - x0) * along_x + (y - y0) * along_y) / (along_x**2 + along_y**2)
    t = np.clip(t, 0, 1)
    return np.hypot(x - x0 - t * along_x, y - y0 - t * along_y)


def _nearest(*distances: np.ndarray) -> np.ndarray:
    """A smooth minimum, which makes corners round."""
    return -np.log(sum(np.exp(np.clip(-30 * d, -60, 60)) for d in distances)) / 30


@lru_cache(maxsize=32)
def _spline(pixels: int, cells: int) -> np.ndarray:
    """Weights [pixels, cells + 3] of a uniform cubic B-spline at the centres of the pixels."""
    at = (np.arange(pixels) + 0.5) / pixels * cells
    q = np.abs(at[:, None] - np.arange(-1, cells + 2))
    near, far = 2 / 3 - q**2 + q**3 / 2, (2 - q) ** 3 / 6
    return np.where(q < 1, near, np.where(q < 2, far, 0)).astype(np.float32)


def clouds(rng: np.random.Generator, pixels: int, cells: int) -> np.ndarray:
    """Smooth noise [pixels, pixels] with a variance of about 1, the same for any image size."""
    weights = _spline(pixels, cells)
    knots = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    return weights @ knots @ weights.T / 0.48


@lru_cache(maxsize=4)
def _frame(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x [1, pixels] and y [pixels, 1] of the pixels' centres in the image frame."""
    at = ((np.arange(pixels) + 0.5) / pixels * 2 - 1).astype(np.float32)
    return at[None, :], at[:, None]


def shrink(fine: np.ndarray, size: int) -> np.ndarray:
    """A square array reduced to `size` by area averaging."""
    block = len(fine) // size
    return fine.reshape(size, block, size, block).mean(axis=(1, 3))


# ---------------------------------------------------------------------------------------------
# Anatomy: attenuation of each part


class Anatomy(NamedTuple):
    """A healthy chest before the film is taken; all arrays are [n, n]."""

    x: np.ndarray  # coordinates in the frame of the anatomy
    y: np.ndarray
    water: np.ndarray  # attenuation if the lungs were full of water
    air: np.ndarray  # air on each ray, as a share of the most that a lung holds


@lru_cache(maxsize=1)  # a phantom, its twin and its copies without a sign share it
def anatomy_of(s: Structure, n: int) -> Anatomy:
    """The anatomy of a healthy chest of this structure at n x n pixels."""
    rng = np.random.default_rng(s.noise)
    x, y = _frame(n)
    x, y = (x - s.shift_x) / s.scale, (y - s.shift_y) / s.scale
    cos, sin = np.cos(s.tilt, dtype=np.float32), np.sin(s.tilt, dtype=np.float32)
    x, y = cos * x + sin * y, cos * y - sin * x
    x = x + 0.012 * clouds(rng, n, 5)  # no body has exact curves
    y = y + 0.012 * clouds(rng, n, 5)
    middle = x - s.spine_bend * np.sin(3 * y)

    inside = _lung_distance(s, middle, y)
    air = np.where(inside > 0, 1 - np.exp(-np.clip(inside, 0, None) / 0.05), 0)
    air = air * _chord(middle / (s.width + s.flesh)) ** 0.6
    air = air * (1 - _vessels(s, n)) * (0.90 + 0.10 * np.clip(inside / 0.3, 0, 1))
    texture = sum(clouds(rng, n, 2**k + 3) / 2 ** (k / 2) for k in range(6))
    water = _flesh(s, x, y) * (1 + 0.3 * s.texture * texture)
    water = water + _organs(s, middle, y) + _ribs(s, middle, y) + _spine(s, middle, y)
    water = water + _shoulders(s, x, y)
    air = air * np.clip(1 - s.texture * (0.8 + 0.35 * texture), 0, 1)
    return Anatomy(x, y, water.astype(np.float32), air.astype(np.float32))


def _lung_distance(s: Structure, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The depth inside a lung: above 0 inside, below 0 outside, and steeper at sharp borders."""
    wide = np.abs(x)
    border = np.where(x > 0, s.border(y, left=True), s.border(y, left=False))
    tip = s.apex + 2.2 * (wide - 0.42 * s.width) ** 2
    return _nearest(s.cage(y) - wide, 2 * (wide - border), 2.5 * (s.bottom(x) - y), y - tip)


def _flesh(s: Structure, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The attenuation of trunk, neck, head and arms, as if they were all water."""
    wide = np.abs(x)
    side = s.width + s.flesh + 0.03 * np.cos(3 * y) + 0.16 * ramp((-0.30 - y) / 0.3)
    slope = -1.0 + s.shoulder + 0.42 * wide**1.5
    trunk = _chord(wide / side) ** 0.8 * np.sqrt(1 - np.exp(-np.clip(y - slope, 0, None) / 0.13))
    neck = 0.75 * _chord(wide / 0.24) * (y < slope + 0.5)
    elbow = s.width + s.flesh + s.arm
    arm = _capsule(wide, y, elbow - s.arm, -0.5 + s.shoulder, elbow, 0.75)
    arm = 0.75 * _chord(arm / 0.17)
    head = np.hypot(x / 0.36, (y - s.chin + 0.5) / 0.5)
    head = 0.6 * _chord(head)
    return 1.45 * (np.maximum(np.maximum(trunk, neck), arm) + head)


def _organs(s: Structure, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The attenuation that mediastinum, heart, abdomen, windpipe and the gas in the stomach add."""
    border = np.where(x > 0, s.border(y, left=True), s.border(y, left=False))
    below = y - s.bottom(x)
    trunk = np.abs(x) < s.width + s.flesh
    heart = 1 - np.exp(-np.clip(border - np.abs(x), 0, None) / 0.16)
    heart = heart * ramp((y - s.apex + 0.2) / 0.3)
    abdomen = trunk * (1 - np.exp(-np.clip(below, 0, None) / 0.18))
    pipe = np.exp(-((x / 0.045) ** 4)) * ramp((-0.22 - y) / 0.1)
    bubble = np.hypot((x - 0.33) / 1.4, y - s.bottom(np.float32(0.33)) - 0.06 - s.gas)
    bubble = ramp((s.gas - bubble) / 0.06)
    return 0.26 * heart + 0.34 * abdomen - 0.32 * pipe - 0.45 * bubble


def _ribs(s: Structure, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The attenuation of the ribs: tilted rings, which look like ellipses, bright at the back and
    faint at the front."""
    wide = np.abs(x)
    y = y - s.rib_slope * wide
    pitch = (s.base + 0.18 - s.apex) / (RIBS - 1.5)
    total = np.zeros_like(x)
    for rib in range(RIBS):
        half = s.rib_drop * (0.45 + 0.55 * min(rib / 4, 1))
        centre = s.apex - 0.04 + pitch * rib + half
        reach = float(s.cage(centre + s.rib_slope * 0.5 * s.width)) - 0.004
        u, v = wide / reach, (y - centre) / half
        steep = np.hypot(u / reach, v / half)
        distance = (u**2 + v**2 - 1) / (2 * steep + 1e-6)
        front = 0.55 * ramp((u - 0.42) / 0.15) * (rib < RIBS - 2)
        back = ramp(2 - 8 * v) * ramp((wide + 0.02) / 0.10)
        shade = (front + (1 - front) * back) * (1 + 0.5 * np.clip(u, 0, 1) ** 6)
        strength, thickness = (0.75, 0.85) if rib < 2 else (0.6, 1) if rib > 7 else (1, 1)
        total += strength * shade * _tube(distance, thickness * s.rib_width)
    return s.rib_density * total


def _spine(s: Structure, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The attenuation of the vertebrae, one for each pair of ribs, with fainter discs between."""
    pitch = (s.base + 0.18 - s.apex) / (RIBS - 1.5)
    phase = 2 * np.pi * (y - s.apex) / pitch
    body = np.exp(-((x / (0.085 + 0.012 * np.cos(phase))) ** 6))
    pedicle = np.exp(-(((np.abs(x) - 0.05) / 0.018) ** 2)) * np.clip(np.cos(phase - 0.5), 0, 1)
    spinous = np.exp(-((x / 0.016) ** 2)) * np.clip(np.cos(phase - 2), 0, 1)
    return s.spine_density * (body * (0.8 + 0.2 * np.cos(phase)) + 0.2 * pedicle + 0.25 * spinous)


def _shoulders(s: Structure, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The attenuation of collar bones, shoulder blades and upper arm bones."""
    wide = np.abs(x - 0.5 * s.turn)
    u = (wide - 0.07) / (s.width - 0.08)
    axis = s.clavicle_height - s.clavicle_slope * (wide - 0.08) + 0.05 * np.sin(2 * np.pi * u)
    bone = _tube((y - axis) * 0.93, 0.03 + 0.012 * np.abs(u - 0.5)) * ramp(20 * u + 0.5)
    clavicle = bone * ramp(15 * (1 - u))
    out = s.width + s.flesh
    blade = _capsule(wide, y, out - 0.08, -0.42, out - 0.12, -0.02)
    blade = 0.35 * _tube(blade, 0.05) + 0.25 * ramp((0.14 - blade) / 0.05)
    top = -0.5 + s.shoulder
    joint = ramp((0.10 - np.hypot(wide - out - 0.02, y - top)) / 0.07)
    shaft = _capsule(wide, y, out + 0.02, top, out + s.arm, 0.75)
    return s.clavicle_density * (clavicle + 0.7 * blade + 0.5 * joint + 0.6 * _tube(shaft, 0.055))


def _branches(s: Structure) -> np.ndarray:
    """Vessels [S, 5] of both lungs: start and end (in the frame of the anatomy) and radius."""
    rng = np.random.default_rng(s.tree)
    pieces = []
    for side in (-1, 1):
        root = np.array(s.place(side, 0.02, 0.50 if side < 0 else 0.46))
        angle = np.linspace(-1.35, 1.35, 7) + rng.uniform(-0.15, 0.15, 7)
        start = root + np.stack((np.zeros(7), 0.05 * np.sin(angle)), 1)
        radius, length = 0.020, 0.18
        for _ in range(4):
            step = length * rng.uniform(0.75, 1.2, len(angle))
            heading = np.stack((side * np.cos(angle), np.sin(angle)), 1)
            end = start + step[:, None] * heading
            width = radius * rng.uniform(0.7, 1.1, len(angle))
            pieces.append(np.column_stack((start, end, width)))
            angle = np.concatenate((angle - 0.35, angle + 0.35))
            angle = angle + rng.uniform(-0.2, 0.2, len(angle))
            start, radius, length = np.tile(end, (2, 1)), radius * 0.66, length * 0.78
    return np.concatenate(pieces)


def _vessels(s: Structure, n: int) -> np.ndarray:
    """The share [n, n] of the air that vessels displace, at most 0.6."""
    pieces = _branches(s)
    cos, sin = np.cos(s.tilt), np.sin(s.tilt)
    x, y = pieces[:, [0, 2]], pieces[:, [1, 3]]
    columns = ((s.shift_x + s.scale * (cos * x - sin * y)) + 1) * n / 2 - 0.5
    rows = ((s.shift_y + s.scale * (sin * x + cos * y)) + 1) * n / 2 - 0.5
    radii = pieces[:, 4] * s.scale * n / 2
    total, index = np.zeros((n, n), np.float32), np.arange(n, dtype=np.float32)
    for (x0, x1), (y0, y1), radius in zip(columns, rows, radii):
        blur = max(radius, 1.0)  # never thinner than pixels can show
        across = slice(max(int(min(x0, x1) - blur), 0), max(int(max(x0, x1) + blur) + 2, 0))
        down = slice(max(int(min(y0, y1) - blur), 0), max(int(max(y0, y1) + blur) + 2, 0))
        q = _capsule(index[None, across], index[down, None], x0, y0, x1, y1) / blur
        chord = np.clip(1 - q * q, 0, None) * (radius / blur) * (radius / n / 0.01) ** 0.5
        total[down, across] = np.maximum(total[down, across], chord)
    return np.minimum(1.6 * s.vessel_density * total, 0.6)


# ---------------------------------------------------------------------------------------------
# Film


def letter(s: Structure, n: int) -> np.ndarray:
    """A lead letter R [n, n] in the image frame: 1 on the letter, 0 elsewhere."""
    x, y = _frame(n)
    x, y = (x - s.marker_x) / 0.085, (y - s.marker_y) / 0.085
    strokes = ((-0.6, -1, -0.6, 1), (-0.6, -1, 0.3, -1), (0.3, -1, 0.6, -0.5), (0.6, -0.5, 0.3, 0))
    strokes += ((0.3, 0, -0.6, 0), (0.0, 0, 0.65, 1))
    distance = np.minimum.reduce([_capsule(x, y, *stroke) for stroke in strokes])
    return ramp((0.30 - distance) / 0.12)


def film(s: Structure, attenuation: np.ndarray, size: int) -> np.ndarray:
    """The film as uint8 [size, size]: a sigmoid of the log exposure, area averaging, and grain."""
    attenuation = attenuation.astype(np.float64)  # exp in float32 is not quite monotone
    x, y = _frame(len(attenuation))
    log_exposure = s.exposure - attenuation - s.vignette * 0.5 * (x**2 + y**2) ** 1.5 + s.heel * y
    grey = 1 / (1 + np.exp(s.contrast * log_exposure))
    black = 1 / (1 + np.exp(s.contrast * s.exposure))
    grey = s.haze + (1 - s.haze) * np.clip((grey - black) / (0.97 - black), 0, 1) ** s.gamma
    rng = np.random.default_rng((s.noise, 1))
    grain = s.grain * shrink(rng.standard_normal((GRAIN, GRAIN), dtype=np.float32), size)
    return np.clip(255 * (shrink(grey, size) + grain) + 0.5, 0, 255).astype(np.uint8)
