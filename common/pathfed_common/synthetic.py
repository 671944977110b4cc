"""Painted tissue: H&E-like pictures made from nothing but a seed.

For demonstrations, for the trial of a base state (which must not touch a patient's tile) and for tests. No pixel comes from a patient.

The picture is painted as two concentrations, hematoxylin and eosin, and turned into RGB by the Beer-Lambert law with one absorption
vector per stain (Ruifrok & Johnston 2001, Anal Quant Cytol Histol 23:291). All lengths are pixels at 0.5 um/px. Every function is
deterministic in the random source passed in.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]

#: um/px the painter's lengths are meant for.
PAINTED_MPP = 0.5

_STEP = 1 / 96  # optical density of one step of the colour table
_OFFSET = 12  # steps below zero, so that glass can flicker both ways


@dataclass(frozen=True)
class Stain:
    """One laboratory's stain and scanner.

    Attributes:
        hematoxylin: optical density per unit of hematoxylin in R, G, B.
        eosin: the same for eosin.
        light: R, G, B of empty glass, 0 to 255.
    """

    hematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    light: tuple[float, float, float]


STAINS = (
    Stain((0.66, 0.72, 0.27), (0.06, 0.62, 0.22), (243, 242, 244)),
    Stain((0.78, 0.70, 0.20), (0.12, 0.60, 0.12), (240, 240, 247)),
    Stain((0.58, 0.74, 0.36), (0.04, 0.60, 0.36), (246, 241, 236)),
    Stain((0.72, 0.80, 0.30), (0.09, 0.78, 0.20), (236, 238, 240)),
    Stain((0.56, 0.60, 0.22), (0.05, 0.48, 0.18), (247, 246, 247)),
)


@dataclass(frozen=True)
class Anatomy:
    """What one patient's tissue is like; the slides of a patient share it.

    Attributes:
        glands: glands per million pixels.
        epithelium: share of the tissue that is sheets of epithelium, 0 to 1.
        crowding: distance between epithelial nuclei, pixels.
        nucleus: mean radius of an epithelial nucleus, pixels.
        inflammation: share of stromal places that hold a lymphocyte, 0 to 1.
    """

    glands: float
    epithelium: float
    crowding: float
    nucleus: float
    inflammation: float


def draw_anatomy(random: np.random.Generator) -> Anatomy:
    """A patient's tissue, at random."""
    return Anatomy(
        glands=float(random.uniform(4, 26)),
        epithelium=float(random.uniform(0.15, 0.6)),
        crowding=float(random.uniform(15, 23)),
        nucleus=float(random.uniform(5.0, 7.5)),
        inflammation=float(random.uniform(0.1, 0.7)),
    )


def draw_stain(random: np.random.Generator, laboratory: int) -> Stain:
    """The stain of a laboratory on one day: its own tone, a little stronger or weaker."""
    base = STAINS[laboratory % len(STAINS)]
    h, e = random.uniform(0.9, 1.1, 2)
    return Stain(_scaled(base.hematoxylin, float(h)), _scaled(base.eosin, float(e)), base.light)


def _scaled(vector: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    r, g, b = vector
    return r * factor, g * factor, b * factor


def synthetic_tiles(count: int, px: int, seed: int) -> NDArray[np.uint8]:
    """Tiles that are all tissue, of changing stain and anatomy.

    Args:
        count: how many, at least 0.
        px: side, pixels.
        seed: equal seeds give equal tiles.

    Returns:
        uint8 RGB (count, px, px, 3).

    Raises:
        ValueError: a negative count or a side below 1.
    """
    if count < 0 or px < 1:
        raise ValueError(f"count must be at least 0 and px at least 1, got {count} and {px}")
    tiles = np.empty((count, px, px, 3), np.uint8)
    for index in range(count):
        random = np.random.default_rng([seed, index])
        stain = draw_stain(random, int(random.integers(len(STAINS))))
        tiles[index] = paint(px, px, random, stain, draw_anatomy(random), glass=False)
    return tiles


def paint(width: int, height: int, random: np.random.Generator, stain: Stain, anatomy: Anatomy, *, glass: bool = True) -> NDArray[np.uint8]:
    """One picture of tissue.

    Args:
        width: pixels.
        height: pixels.
        random: the source of everything random in it.
        stain: its colours.
        anatomy: what the tissue is like.
        glass: pieces of tissue with an irregular outline on empty glass; otherwise tissue everywhere.

    Returns:
        uint8 RGB (height, width, 3).
    """
    return paint_with_tissue(width, height, random, stain, anatomy, glass=glass)[0]


def paint_with_tissue(
    width: int, height: int, random: np.random.Generator, stain: Stain, anatomy: Anatomy, *, glass: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The picture that `paint` makes, and where its tissue is: what a segmentation can be held against.

    Args:
        width: pixels.
        height: pixels.
        random: the source of everything random in it.
        stain: its colours.
        anatomy: what the tissue is like.
        glass: as for `paint`.

    Returns:
        uint8 RGB (height, width, 3), and bool (height, width): inside the outline of the tissue, its own lumens and clefts included.
    """
    brush = _Brush(width, height, random, _material(*((512, 512) if max(width, height) <= 512 else (1280, 2048))))
    tissue = brush.outline() if glass else brush.flat(1)
    epithelium = brush.epithelium(anatomy)
    hematoxylin, eosin = brush.ground(tissue, epithelium)
    nuclei = brush.flat(0)
    brush.cells(nuclei, tissue, epithelium, anatomy)
    for _ in range(random.poisson(anatomy.glands * width * height / 1e6)):
        brush.gland(hematoxylin, eosin, nuclei, tissue, anatomy)
    eosin *= 1 - 0.55 * np.minimum(nuclei, 1)
    hematoxylin += nuclei
    hematoxylin += 0.02 * brush.window("grain") * (0.15 + tissue)
    eosin += 0.008 * brush.window("grain")
    return _developed(hematoxylin, eosin, stain), np.asarray(tissue > 0.5)


def _developed(hematoxylin: Plane, eosin: Plane, stain: Stain) -> NDArray[np.uint8]:
    """RGB of two concentrations, by a table over both: one gather instead of six exponentials a pixel."""
    index = _quantised(hematoxylin).astype(np.uint16)
    index <<= 8
    index |= _quantised(eosin)
    colours: NDArray[np.uint8] = np.take(_table(stain), index, axis=0)
    return colours


def _quantised(plane: Plane) -> NDArray[np.uint8]:
    return np.asarray(np.clip(plane * np.float32(1 / _STEP) + np.float32(_OFFSET), 0, 255), np.uint8)


@lru_cache(maxsize=8)
def _table(stain: Stain) -> NDArray[np.uint8]:
    amount = (np.arange(256) - _OFFSET) * _STEP
    density = amount[:, None, None] * np.array(stain.hematoxylin) + amount[None, :, None] * np.array(stain.eosin)
    return np.asarray(np.clip(np.round(np.array(stain.light) * 10.0**-density), 0, 255), np.uint8).reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class _Material:
    """Periodic textures and stamps every picture is cut from: made once, so that a picture costs no transform of its own."""

    size: int
    fields: dict[str, Plane]
    angle: Plane  # direction of the fibres, radians, at a quarter of the resolution
    round_nuclei: list[list[Plane]]  # of each size in _SIZES
    dark_nuclei: list[Plane]
    long_nuclei: list[Plane]  # one for each of _ANGLES directions


_ANGLES = 16
_SIZES = (0.75, 0.88, 1.0, 1.12, 1.25, 1.4)


@lru_cache(maxsize=2)
def _material(period: int, size: int) -> _Material:
    """Textures of a period, repeated up to a size."""
    random = np.random.default_rng(20_260_101)
    fields = {
        name: _noise(random, period, scale) for name, scale in (("long", 110), ("mid", 34), ("short", 9), ("fine", 3), ("grain", 0.8))
    }
    phase = 4.6 * _noise(random, period, 70) + 0.85 * _noise(random, period, 17) + 0.22 * _noise(random, period, 6)
    strength = np.clip(0.55 + 0.45 * _noise(random, period, 21), 0, 1.3)
    fibre = np.sin(np.float32(2 * np.pi) * phase) * strength + 0.5 * _noise(random, period, 4) + 0.3 * fields["mid"]
    fields["fibre"] = (fibre / fibre.std()).astype(np.float32)
    dy, dx = np.gradient(phase[::4, ::4])
    return _Material(
        size=size,
        fields={name: np.pad(field, (0, size - period), mode="wrap") for name, field in fields.items()},
        angle=np.arctan2(dx, -dy).astype(np.float32),
        round_nuclei=[
            [_nucleus(random, size, random.uniform(0.55, 0.98), random.uniform(0, np.pi), vesicular=True) for _ in range(40)]
            for size in _SIZES
        ],
        dark_nuclei=[
            _nucleus(random, random.uniform(0.52, 0.72), random.uniform(0.75, 1), random.uniform(0, np.pi), vesicular=False)
            for _ in range(32)
        ],
        long_nuclei=[_nucleus(random, random.uniform(1.0, 1.4), 0.3, np.pi * turn / _ANGLES, vesicular=False) for turn in range(_ANGLES)],
    )


def _noise(random: np.random.Generator, size: int, scale: float) -> Plane:
    """Periodic smooth noise, zero mean, unit variance; `scale` is the standard deviation of its blur in pixels."""
    spectrum = np.fft.rfft2(random.standard_normal((size, size), dtype=np.float32))
    for frequencies in (np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]):
        spectrum *= np.exp(-2 * (np.pi * scale * frequencies) ** 2).astype(np.float32)
    field = np.fft.irfft2(spectrum, s=(size, size))
    field -= field.mean()
    return np.asarray(field / field.std(), np.float32)


_UNIT = 6.0  # radius at which stamps are drawn, pixels


def _nucleus(random: np.random.Generator, size: float, roundness: float, angle: float, *, vesicular: bool) -> Plane:
    """Hematoxylin in one nucleus: a soft, slightly uneven ellipse; a vesicular one has a rim, clumped chromatin and a nucleolus."""
    half = 11
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    turn = np.arctan2(across, along)
    uneven = 1 + 0.06 * np.sin(2 * turn + random.uniform(0, 6)) + 0.05 * np.sin(3 * turn + random.uniform(0, 6))
    radius = np.hypot(along, across / roundness) / (_UNIT * size * uneven)
    inside = 1 / (1 + np.exp((radius - 1) * 9))
    if not vesicular:
        return np.asarray(inside * random.uniform(1.05, 1.4), np.float32)
    clumps = _blurred(random.standard_normal(inside.shape))
    ink = 0.62 + 0.42 * np.exp(-(((radius - 0.9) / 0.2) ** 2)) + 0.13 * clumps
    dx, dy = random.uniform(-2.2, 2.2, 2)
    ink = ink + 0.5 * np.exp(-((x - dx) ** 2 + (y - dy) ** 2) / 2.2) * (random.random() < 0.6)
    return np.asarray(inside * ink, np.float32)


def _blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    for axis in (0, 1):
        values = values + 0.7 * (np.roll(values, 1, axis) + np.roll(values, -1, axis))
    return np.asarray(values / values.std())


def _soft(field: Plane, edge: float) -> Plane:
    """0 below -edge, 1 above +edge, smooth between."""
    ramp = np.clip(field * np.float32(0.5 / edge) + np.float32(0.5), 0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp), np.float32)


class _Brush:
    """Paints one picture; holds its size, its random source and the shared material."""

    def __init__(self, width: int, height: int, random: np.random.Generator, material: _Material) -> None:
        self.width, self.height, self.random, self.material = width, height, random, material
        self._fibres = self._place()
        self._glands: list[tuple[int, int, float]] = []  # centre y, centre x, radius, pixels

    def flat(self, value: float) -> Plane:
        return np.full((self.height, self.width), value, np.float32)

    def _place(self) -> tuple[int, int]:
        size = self.material.size
        y, x = self.random.integers(0, [max(1, size - self.height), max(1, size - self.width)])
        return int(y), int(x)

    def window(self, name: str, place: tuple[int, int] | None = None) -> Plane:
        """The canvas-sized part of a texture at a place, by default a random one, then also mirrored at random."""
        field = self.material.fields[name]
        y, x = self._place() if place is None else place
        if max(self.height, self.width) > self.material.size:
            field = np.take(np.take(field, np.arange(y, y + self.height), 0, mode="wrap"), np.arange(x, x + self.width), 1, mode="wrap")
        else:
            field = field[y : y + self.height, x : x + self.width]
        if place is None:
            field = field[:: self._sign(), :: self._sign()]
        return field

    def _sign(self) -> int:
        return 1 if self.random.random() < 0.5 else -1

    def outline(self) -> Plane:
        """One to three pieces of tissue: ellipses whose edge is frayed by noise of several scales."""
        y = np.linspace(-1, 1, self.height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, self.width, dtype=np.float32)[None, :]
        field = self.flat(-9)
        pieces = int(self.random.integers(1, 4))
        for piece in range(pieces):
            spread = 0 if pieces == 1 else 0.42
            turn = 2 * np.pi * (piece + self.random.uniform(0, 0.6)) / pieces
            cy, cx = spread * np.sin(turn) + self.random.normal(0, 0.05), spread * np.cos(turn) + self.random.normal(0, 0.05)
            ry, rx = self.random.uniform(0.55, 0.8, 2) / (1 if pieces == 1 else 1.5)
            np.maximum(field, 1 - ((y - cy) / ry) ** 2 - ((x - cx) / rx) ** 2, out=field)
        field += 0.20 * self.window("long") + 0.10 * self.window("mid") + 0.045 * self.window("short")
        edge = np.minimum(1 - np.abs(y), 1 - np.abs(x)) - 0.06
        return _soft(np.minimum(field, edge * 6), 0.035)

    def epithelium(self, anatomy: Anatomy) -> Plane:
        """Where the tissue is sheets of epithelium rather than stroma, 0 to 1."""
        level = 2.4 * (anatomy.epithelium - 0.5)
        return _soft(0.75 * self.window("mid") + 0.55 * self.window("long") + 0.1 * self.window("short") + np.float32(level), 0.12)

    def ground(self, tissue: Plane, epithelium: Plane) -> tuple[Plane, Plane]:
        """Hematoxylin and eosin of stroma and cytoplasm."""
        fibre = self.window("fibre", self._fibres)
        cytoplasm = self.window("fine")
        tears = _soft(fibre + np.float32(0.55) * self.window("short") + np.float32(1.5), 0.3)  # pale clefts between bundles
        stroma = (0.44 + 0.13 * fibre) * tears
        eosin = tissue * (stroma + epithelium * (0.40 + 0.05 * cytoplasm - stroma))
        hematoxylin = tissue * (0.05 + epithelium * (0.13 + 0.045 * cytoplasm))
        return np.asarray(hematoxylin, np.float32), np.maximum(eosin, 0, dtype=np.float32)

    def cells(self, nuclei: Plane, tissue: Plane, epithelium: Plane, anatomy: Anatomy) -> None:
        """Nuclei on a jittered grid: round ones in epithelium, spindles along the fibres and lymphocytes in stroma."""
        step = anatomy.crowding
        ys, xs = np.mgrid[step / 2 : self.height : step, step / 2 : self.width : step]
        jitter = self.random.uniform(-0.42, 0.42, (2, *ys.shape)) * step
        y = np.clip(ys + jitter[0], 0, self.height - 1).astype(np.int64).ravel()
        x = np.clip(xs + jitter[1], 0, self.width - 1).astype(np.int64).ravel()
        chance = self.random.random((3, len(y)))
        nests = self.window("mid")[y, x] > 0.9 - anatomy.inflammation
        here = tissue[y, x] > 0.6
        sheet = here & (epithelium[y, x] > 0.5) & (chance[0] < 0.93)
        spindle = here & (epithelium[y, x] < 0.35) & (chance[0] < 0.2)
        lymph = here & (epithelium[y, x] < 0.35) & ~spindle & nests & (chance[1] < 0.75 * anatomy.inflammation)
        size = anatomy.nucleus / _UNIT
        for index in np.flatnonzero(sheet | spindle | lymph):
            if sheet[index]:
                stamp = self._sized(size)
            elif spindle[index]:
                stamp = self.material.long_nuclei[self._direction(y[index], x[index])]
            else:
                stamp = self._pick(self.material.dark_nuclei)
            _stamped(nuclei, stamp, int(y[index]), int(x[index]), 0.5 + 0.65 * float(chance[2, index]))

    def _sized(self, size: float) -> Plane:
        wanted = size * (1 + 0.16 * float(self.random.standard_normal()))
        return self._pick(self.material.round_nuclei[int(np.abs(np.subtract(_SIZES, wanted)).argmin())])

    def _pick(self, stamps: list[Plane]) -> Plane:
        return stamps[int(self.random.integers(len(stamps)))][:: self._sign(), :: self._sign()]

    def _direction(self, y: int, x: int) -> int:
        oy, ox = self._fibres
        angle = self.material.angle
        here = angle[(oy + y) // 4 % len(angle), (ox + x) // 4 % len(angle)] + self.random.normal(0, 0.15)
        return round(float(here) / np.pi * _ANGLES) % _ANGLES

    def gland(self, hematoxylin: Plane, eosin: Plane, nuclei: Plane, tissue: Plane, anatomy: Anatomy) -> None:
        """One gland: an open lumen, a ring of columnar cytoplasm, and nuclei along its outer edge. Left out where it would not fit."""
        outer = float(self.random.uniform(24, 66))
        half = int(outer * 1.35)
        if min(self.height, self.width) <= 2 * half + 2:
            return
        cy, cx = (int(v) for v in self.random.integers(half, [self.height - half, self.width - half]))
        if tissue[cy - half : cy + half : 8, cx - half : cx + half : 8].min() < 0.8:
            return
        if any(np.hypot(cy - y, cx - x) < 1.15 * (outer + size) for y, x, size in self._glands):
            return
        self._glands.append((cy, cx, outer))
        here = np.s_[cy - half : cy + half, cx - half : cx + half]
        y, x = np.mgrid[-half:half, -half:half].astype(np.float32)
        turn = np.arctan2(y, x)
        waves = [
            (k, float(self.random.normal(0, spread)), float(self.random.uniform(0, 6.28)))
            for k, spread in ((1, 0.07), (2, 0.16), (3, 0.07), (5, 0.03), (7, 0.02))
        ]
        rim = outer * (1 + sum(a * np.cos(k * turn + p) for k, a, p in waves))
        depth = rim - np.hypot(y, x)  # pixels inside the basement membrane
        thick = 2.6 * anatomy.nucleus
        ring, lumen = _soft(depth, 1.5), _soft(depth - np.float32(thick) + 1.5 * self.window("short")[here], 2.0)
        mucin = 0.10 + 0.04 * self.window("fine")[here]
        cell = 0.34 + 0.05 * self.window("fine")[here]
        for plane, body, hollow in ((eosin, cell, mucin * 0.6), (hematoxylin, 0.55 * cell, mucin * 0.5)):
            plane[here] += ring * (body + lumen * (hollow - body) - plane[here])
        nuclei[here] *= 1 - ring
        _clefted(eosin[here], depth)
        steps = int(2 * np.pi * outer / (1.75 * anatomy.nucleus))
        for angle in 2 * np.pi * (np.arange(steps) + self.random.uniform(-0.2, 0.2, steps)) / steps:
            edge = outer * (1 + sum(a * np.cos(k * angle + p) for k, a, p in waves)) - anatomy.nucleus * self.random.uniform(1.0, 1.5)
            stamp = self._sized(0.92 * anatomy.nucleus / _UNIT)
            _stamped(
                nuclei, stamp, cy + round(edge * np.sin(angle)), cx + round(edge * np.cos(angle)), float(self.random.uniform(0.85, 1.2))
            )


def _clefted(eosin: Plane, depth: Plane) -> None:
    """The pale gap that fixing leaves around a gland."""
    eosin *= 1 - 0.5 * np.exp(-(((depth + 2.5) / 2.0) ** 2))


def _stamped(plane: Plane, stamp: Plane, y: int, x: int, strength: float) -> None:
    """Lay a stamp centred on (y, x), where it is darker than what is there; cut off at the edges."""
    half = stamp.shape[0] // 2
    top, left = max(0, y - half), max(0, x - half)
    bottom, right = min(plane.shape[0], y + half + 1), min(plane.shape[1], x + half + 1)
    if top >= bottom or left >= right:
        return
    part = plane[top:bottom, left:right]
    np.maximum(part, stamp[top - y + half : bottom - y + half, left - x + half : right - x + half] * np.float32(strength), out=part)
