"""One CT-like phantom of the upper abdomen: body wall, lungs, skeleton, bowel and the thirteen organs of BTCV.

Organs are drawn from ellipsoids and tubes in the coordinates of a standard body (millimetres; x to the patient's left, y to
the back, z to the head, origin in front of the first lumbar vertebra). A subject is the same drawing seen through a warp of
its own, with organs of its own size, place and density. Densities are Hounsfield units in the portal venous phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.ndimage import gaussian_filter

SHAPE = (34, 98, 124)  # (z, y, x)
SLICE_MM = 6.0
PLANE_MM = 2.7  # for a body of standard width; larger bodies get a larger field of view

SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, GALLBLADDER, OESOPHAGUS, LIVER, STOMACH = range(1, 8)
AORTA, VENA_CAVA, VEINS, PANCREAS, RIGHT_ADRENAL, LEFT_ADRENAL = range(8, 14)

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Phantom:
    """One subject: `hu` int16 and `labels` uint8, both (z, y, x), voxel spacing (z, y, x) in mm.

    Indices rise towards the patient's left (x), back (y) and head (z).
    """

    hu: np.ndarray
    labels: np.ndarray
    spacing_mm: tuple[float, float, float]


def draw_phantom(rng: np.random.Generator) -> Phantom:
    """Draw one subject; the same generator state gives the same voxels."""
    body = _Body(rng)
    _wall(body, rng)
    _lungs_and_heart(body, rng)
    _bowel(body, rng)
    _skeleton(body)
    _vessels(body, rng)
    _adrenals(body, rng)
    _kidneys(body, rng)
    _liver_and_gallbladder(body, rng)
    _stomach_and_spleen(body, rng)
    _pancreas_and_veins(body, rng)
    _table(body)
    blurred = gaussian_filter(body.hu, sigma=(0.35, 0.6, 0.6))
    noise = gaussian_filter(rng.standard_normal(body.hu.shape, dtype=np.float32), sigma=(0.0, 0.7, 0.7))
    noise *= rng.uniform(10, 18) / noise.std()
    hu = np.clip(np.rint(blurred + noise), -1024, 3071).astype(np.int16)
    return Phantom(hu, body.labels, body.spacing_mm)


class _Body:
    """The canvas: coordinates of every voxel in the standard body, and what has been painted so far."""

    def __init__(self, rng: np.random.Generator) -> None:
        width, depth, height = rng.uniform(0.9, 1.12), rng.uniform(0.9, 1.12), rng.uniform(0.93, 1.07)
        plane_mm = round(PLANE_MM * max(width, depth), 2)
        self.spacing_mm = (SLICE_MM, plane_mm, plane_mm)
        z, y, x = np.meshgrid(
            *((np.arange(n, dtype=np.float32) - (n - 1) / 2) * s for n, s in zip(SHAPE, self.spacing_mm, strict=True)),
            indexing="ij",
        )
        self.bed_mm = y  # the table does not move with the patient
        self.bed_x_mm = x
        y = y + 8  # room for the table behind the back
        angle = np.deg2rad(rng.uniform(-4, 4))
        x, y = x + rng.uniform(-6, 6), y + rng.uniform(-4, 4)
        x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
        x, y, z = x / width, y / depth, (z + rng.uniform(-8, 8)) / height
        self.back_mm = 112 * depth - 8
        # A few long waves bend every surface a little, so that no organ is a perfect ellipsoid.
        waves = [rng.uniform(1.5, 3.0) * np.sin(self._phase(rng, x, y, z)) for _ in range(6)]
        self.x, self.y, self.z = x + waves[0] + waves[1], y + waves[2] + waves[3], z + waves[4] + waves[5]
        self.hu = np.full(SHAPE, -1000, dtype=np.float32)
        self.labels = np.zeros(SHAPE, dtype=np.uint8)
        # Surfaces that the drawing steps share; _wall, _lungs_and_heart and _vessels fill them.
        self.cavity = self.dome = np.zeros(SHAPE, dtype=np.float32)
        self.inside = np.zeros(SHAPE, dtype=bool)
        self.vein_hu = 0.0
        self._lowest, self._highest = self.z.min(axis=(1, 2)), self.z.max(axis=(1, 2))

    @staticmethod
    def _phase(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        direction = rng.standard_normal(3)
        direction *= 2 * np.pi / (rng.uniform(70, 140) * np.linalg.norm(direction))
        a, b, c = direction.astype(np.float32)
        return a * x + b * y + c * z + np.float32(rng.uniform(0, 2 * np.pi))

    def _slices(self, low: float, high: float) -> slice:
        """The slices that hold heights between `low` and `high`: small organs need not be compared with every voxel."""
        hit = np.flatnonzero((self._highest >= low) & (self._lowest <= high))
        return slice(hit[0], hit[-1] + 1) if hit.size else slice(0, 0)

    def ellipsoid(self, center: Point, radii: Point, tilt: float = 0.0) -> np.ndarray:
        """Voxels inside an ellipsoid; `tilt` moves its centre in x by that many mm per mm of z."""
        inside = np.zeros(SHAPE, dtype=bool)
        near = self._slices(center[2] - radii[2], center[2] + radii[2])
        z = self.z[near] - center[2]
        x = self.x[near] - center[0] - tilt * z
        y = self.y[near] - center[1]
        inside[near] = (x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2 < 1
        return inside

    def ring(self, center_y: float, half_width: float, half_depth: float) -> np.ndarray:
        """Distance from the body's axis as a share of a rounded rectangle: below 1 is inside."""
        power = 2.4
        across = np.abs(self.x / half_width) ** power + np.abs((self.y - center_y) / half_depth) ** power
        return across ** (1 / power)

    def tube(self, points: Sequence[Point], radii: Sequence[float]) -> np.ndarray:
        """Voxels inside a chain of tapered segments."""
        inside = np.zeros(SHAPE, dtype=bool)
        for (start, end), (r0, r1) in zip(pairwise(points), pairwise(radii), strict=True):
            wide = max(r0, r1)
            near = self._slices(min(start[2], end[2]) - wide, max(start[2], end[2]) + wide)
            axis = [float(b - a) for a, b in zip(start, end, strict=True)]
            length2 = sum(a * a for a in axis)
            dx, dy, dz = self.x[near] - start[0], self.y[near] - start[1], self.z[near] - start[2]
            along = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / length2, 0, 1)
            distance2 = (dx - along * axis[0]) ** 2 + (dy - along * axis[1]) ** 2 + (dz - along * axis[2]) ** 2
            inside[near] |= distance2 < (r0 + along * (r1 - r0)) ** 2
        return inside

    def paint(self, inside: np.ndarray, hu: float | np.ndarray, label: int = 0) -> None:
        """Fill voxels with a density and a label."""
        self.hu[inside] = hu[inside] if isinstance(hu, np.ndarray) else hu
        self.labels[inside] = label


def _moved(rng: np.random.Generator, point: Point, by_mm: float) -> Point:
    x, y, z = rng.normal(0, by_mm / 2, 3)
    return (point[0] + x, point[1] + y, point[2] + z)


def _scaled(rng: np.random.Generator, radii: Point, by: float) -> Point:
    size = rng.uniform(1 - by, 1 + by)
    return (radii[0] * size * rng.uniform(0.95, 1.05), radii[1] * size, radii[2] * size * rng.uniform(0.93, 1.07))


def _mottled(body: _Body, rng: np.random.Generator, mean: float, spread: float) -> np.ndarray:
    """A density with coarse texture."""
    noise = gaussian_filter(rng.standard_normal(SHAPE, dtype=np.float32), sigma=(0.6, 1.2, 1.2))
    return np.float32(mean) + noise * np.float32(spread / noise.std())


def _wall(body: _Body, rng: np.random.Generator) -> None:
    fat = rng.uniform(-4, 6)  # thicker or thinner under the skin
    skin = body.ring(0, 150, 112)
    body.paint(skin < 1, 20)
    body.paint(skin < 0.985, _mottled(body, rng, -105, 6))
    body.paint(body.ring(1, 137 - fat, 100 - fat / 2) < 1, _mottled(body, rng, 55, 10))
    # Fat between the layers of the flank's muscles.
    flank = body.ring(-2, 129 - fat, 91 - fat / 2)
    body.paint((flank < 1.012) & (flank > 0.988) & (body.y < 60) & (np.abs(body.x) > 30), -60)
    body.cavity = body.ring(-12, 121 - fat, 80 - fat / 2)
    body.paint(body.cavity < 1, _mottled(body, rng, -103, 8))


def _lungs_and_heart(body: _Body, rng: np.random.Generator) -> None:
    x, y, z = body.x, body.y, body.z
    breath = rng.uniform(-7, 7)
    right = 68 + breath - 0.0085 * (x + 66) ** 2 - 0.0055 * (y + 18) ** 2
    left = 57 + breath - 0.0085 * (x - 68) ** 2 - 0.0055 * (y + 14) ** 2
    body.dome = np.maximum(right, left)
    pleura = body.cavity < 0.985
    body.paint(pleura & (z > body.dome - 4) & (z < body.dome), 50)
    middle = (np.abs(x - 4) < 17 + 0.0045 * (y + 15) ** 2) & (y < 62)  # mediastinal fat, waisted at the hila
    body.paint(pleura & (z >= body.dome) & middle, -95)
    lung = pleura & (z >= body.dome) & ~middle
    body.paint(lung, _mottled(body, rng, -850, 45))
    for side in (-1, 1):
        for _ in range(5):  # pulmonary vessels fan out from the hilum
            end = (side * rng.uniform(50, 105), rng.uniform(-50, 50), rng.uniform(70, 110))
            body.paint(lung & body.tube([(side * 30, 5, 115), end], [4.5, 1.8]), 20)
    heart = body.ellipsoid(_moved(rng, (22, -42, 92 + breath), 5), _scaled(rng, (56, 42, 38), 0.08)) & (
        z > body.dome - 6
    )
    body.paint(heart & pleura, _mottled(body, rng, 135, 10))
    body.inside = (body.cavity < 0.985) & (z < body.dome - 3)  # where abdominal organs may lie


def _skeleton(body: _Body) -> None:
    x, y, z = body.x, body.y, body.z
    for side in (-1, 1):
        body.paint(body.ellipsoid((side * 34, 80, 0), (29, 17, 400)), 58)  # erector spinae
        body.paint(body.tube([(side * 24, 48, 15), (side * 44, 42, -110)], [7, 22]), 60)  # psoas
        body.paint(body.tube([(side * 12, 34, 110), (side * 16, 36, -15)], [5, 9]) & (z < 60), 55)  # crura
    body.paint((np.abs(x) < 3.5) & (y > 66) & (y < 100), -90)

    height = np.mod(z + 6, 34.0)
    disc = height < 7
    vertebra = (x / 24) ** 2 + ((y - 46) / 18) ** 2
    body.paint(
        vertebra < 1, np.where(disc, 75, np.where((vertebra > 0.72) | (height < 9.5) | (height > 31.5), 420, 190))
    )
    arch = (x / 21) ** 2 + ((y - 69) / 15) ** 2
    bony = (height > 8) & (height < 29)
    body.paint((arch < 1) & bony, 380)
    body.paint((arch < 1) & ~bony & (y < 76), -40)
    body.paint((np.abs(x) < 4) & (y > 78) & (y < 100) & (height > 8) & (height < 26), 330)
    body.paint((np.abs(y - 66) < 5) & (np.abs(x) < 44) & (np.abs(x) > 15) & (height > 13) & (height < 23), 300)
    canal = (x / 10) ** 2 + ((y - 68) / 8) ** 2
    body.paint(canal < 1, np.where(canal < 0.45, 40.0, 5.0))

    # Ribs run round the cavity from the spine, sinking towards the front; below the chest they end in the flank.
    round_ = np.abs(np.arctan2(x, y + 12))  # 0 at the back, pi at the front
    level = z + 42 * np.minimum(round_, 1.9) + 6
    nearest = np.abs(np.mod(level, 29.0) - 14.5)
    shell = body.cavity
    lowest = -20 + 62 * np.clip(round_ - 1.1, 0, None)
    rib = (shell > 1.0) & (shell < 1.085) & (nearest < 6) & (z > lowest) & (np.abs(x) > 26)
    body.paint(rib, np.where((nearest > 4) | (shell < 1.02) | (shell > 1.065), 480, 230))


def _bowel(body: _Body, rng: np.random.Generator) -> None:
    for _ in range(52):  # loops of small bowel
        center = (rng.uniform(-75, 75), rng.uniform(-72, 5), rng.uniform(-112, -26))
        loop = body.ellipsoid(center, (rng.uniform(12, 26), rng.uniform(11, 16), rng.uniform(11, 18)))
        body.paint(loop & body.inside, rng.uniform(35, 80))
        if rng.random() < 0.35:
            core = body.ellipsoid(center, (8, 7, 8))
            body.paint(core & body.inside, -700 if rng.random() < 0.4 else 15)
    colon: tuple[list[Point], ...] = (
        [(-92, 8, -115), (-94, 2, -62), (-82, -30, -48)],
        [(-82, -30, -48), (-35, -72, -62), (30, -74, -58), (84, -35, -12)],
        [(92, 12, 0), (98, 22, -60), (92, 20, -115)],
    )
    for course in colon:
        path = [_moved(rng, point, 5) for point in course]
        wide = rng.uniform(15, 20)
        body.paint(body.tube(path, [wide] * len(path)) & body.inside, 45)
        lumen = body.tube(path, [wide - 4] * len(path)) & body.inside
        stool = _mottled(body, rng, 5, 70)
        body.paint(lumen, np.where(body.y < path[1][1] - 8, np.float32(-870), stool))


def _vessels(body: _Body, rng: np.random.Generator) -> None:
    aorta_hu, vein_hu = rng.uniform(150, 215), rng.uniform(135, 165)
    bend = rng.uniform(-3, 3)
    wide = rng.uniform(9.5, 12)
    course = [(19, 20, 115), (12 + bend, 16, 50), (9 - bend, 16, 0), (6 + bend, 17, -75), (5, 18, -115)]
    aorta = body.tube(course, [wide + 1.5, wide, wide - 0.5, wide - 1.5, wide - 2])
    body.paint(aorta, _mottled(body, rng, aorta_hu, 4), AORTA)
    mesenteric = body.tube([(9, 8, 2), (5, -6, -22), (2, -18, -75)], [4, 4, 3.5])
    body.paint(mesenteric & ~aorta, aorta_hu - 10)
    course = [(-16, -2, 84), (-22, 4, 58), (-22, 12, 20), (-21, 18, -30), (-19, 20, -115)]
    cava = body.tube([_moved(rng, point, 2) for point in course], [12, 11.5, 11, 10.5, 10.5]) & ~aorta
    body.paint(cava, _mottled(body, rng, vein_hu - 12, 4), VENA_CAVA)
    body.vein_hu = vein_hu


def _adrenals(body: _Body, rng: np.random.Generator) -> None:
    density = rng.uniform(75, 100)
    for side, base, label in ((-1, (-36, 22, 28), RIGHT_ADRENAL), (1, (38, 18, 22), LEFT_ADRENAL)):
        x, y, z = _moved(rng, base, 3)
        limbs = body.tube([(x, y - 9, z + 6), (x + side * 3, y + 13, z - 8)], [5.2, 4.2])
        limbs |= body.tube([(x, y - 7, z + 5), (x + side * 15, y + 10, z - 10)], [5.2, 4.0])
        body.paint(limbs & (body.labels == 0) & body.inside, density, label)


def _kidneys(body: _Body, rng: np.random.Generator) -> None:
    density = rng.uniform(160, 205)
    for side, place, label in ((-1, (-61, 34, -30), RIGHT_KIDNEY), (1, (62, 32, -16), LEFT_KIDNEY)):
        center = _moved(rng, place, 6)
        radii = _scaled(rng, (28, 26, 54), 0.12)
        tilt = -side * rng.uniform(0.12, 0.22)  # upper poles lean towards the spine
        kidney = body.ellipsoid(center, radii, tilt) & body.inside & (body.labels == 0)
        core = body.ellipsoid(center, (radii[0] * 0.68, radii[1] * 0.68, radii[2] * 0.75), tilt)
        body.paint(kidney, _mottled(body, rng, density, 6), label)
        body.paint(kidney & core, _mottled(body, rng, density - 35, 8), label)
        hilum = (center[0] - side * 17, center[1] - 8, center[2])
        body.paint(body.ellipsoid(hilum, (17, 10, 20), tilt) & kidney, -80)
        vessel = body.tube([(hilum[0] + side * 8, hilum[1] + 2, hilum[2]), (side * 14, 14, center[2] + 10)], [4, 5])
        pelvis = body.ellipsoid((hilum[0] + side * 9, hilum[1] + 3, hilum[2] - 4), (6, 6, 11), tilt)
        free = kidney | (body.labels == 0)
        body.paint(vessel & free, body.vein_hu)
        body.paint(pelvis & free, 25)
        body.inside = body.inside & ~kidney  # its sinus is not room for liver or spleen


def _liver_and_gallbladder(body: _Body, rng: np.random.Generator) -> None:
    free = body.inside & (body.labels == 0)
    density = rng.uniform(98, 124)
    breath = float(np.max(body.dome)) - 68
    right = body.ellipsoid(_moved(rng, (-68, -6, 24 + breath), 6), _scaled(rng, (72, 80, 58), 0.07), tilt=0.15)
    right |= body.ellipsoid(_moved(rng, (-90, 4, -18 + breath), 8), _scaled(rng, (36, 58, 58), 0.12), tilt=-0.1)
    left = body.ellipsoid(_moved(rng, (-8, -52, 30 + breath), 6), _scaled(rng, (62, 34, 33), 0.12), tilt=0.25)
    under = body.ellipsoid((-12, 26, -22), (46, 54, 60))  # the hollow of the visceral surface
    liver = (right & ~under | left) & free & (body.cavity < 0.975)
    body.paint(liver, _mottled(body, rng, density, 7), LIVER)
    porta: Point = (-36, -12, 22)
    for end in ((-92, -22, 12), (-84, 22, 30), (-70, -38, 45), (-20, -50, 32)):
        branch = body.tube([porta, _moved(rng, end, 8)], [5, 2])
        body.paint(branch & liver, body.vein_hu, LIVER)
    for end in ((-95, 0, 38), (-58, -48, 42), (5, -50, 40)):  # hepatic veins meet below the heart
        body.paint(body.tube([(-22, 2, 62), _moved(rng, end, 8)], [5, 2.2]) & liver, body.vein_hu - 8, LIVER)
    center = _moved(rng, (-50, -52, -26), 7)
    full = rng.uniform(0.8, 1.2)
    bulb = body.ellipsoid(center, (14 * full, 16 * full, 23 * full), tilt=0.2)
    neck = body.tube([(center[0], center[1] + 4, center[2] + 12), (-40, -28, 6)], [9 * full, 4])
    gallbladder = (bulb | neck) & body.inside & ((body.labels == 0) | (body.labels == LIVER))
    body.paint(gallbladder, _mottled(body, rng, rng.uniform(5, 18), 3), GALLBLADDER)


def _stomach_and_spleen(body: _Body, rng: np.random.Generator) -> None:
    free = body.inside & (body.labels == 0)
    center = _moved(rng, (92, 34, 22), 6)
    radii = _scaled(rng, (36, 50, 52), 0.14)
    hollow = body.ellipsoid((center[0] - 31, center[1] - 22, center[2]), (31, 42, 50))
    spleen = body.ellipsoid(center, radii, tilt=-0.1) & ~hollow & free & (body.cavity < 0.975)
    body.paint(spleen, _mottled(body, rng, rng.uniform(112, 138), 6), SPLEEN)

    free &= ~spleen
    fundus, trunk, antrum = _moved(rng, (54, 0, 40), 5), _moved(rng, (52, -36, 6), 6), _moved(rng, (14, -56, -18), 6)
    full = rng.uniform(0.85, 1.12)
    parts = ((fundus, (35, 36, 32)), (trunk, (29, 30, 36)), (antrum, (42, 20, 17)))
    stomach = np.zeros(SHAPE, dtype=bool)
    lumen = np.zeros(SHAPE, dtype=bool)
    for middle, (a, b, c) in parts:
        stomach |= body.ellipsoid(middle, (a * full, b * full, c * full))
        lumen |= body.ellipsoid(middle, (a * full - 5, b * full - 5, c * full - 5))
    stomach &= free
    body.paint(stomach, 70, STOMACH)
    body.paint(stomach & lumen, _mottled(body, rng, rng.uniform(10, 35), 8), STOMACH)
    air_level = rng.uniform(-66, -50)  # the patient lies on the back: gas rises to the front
    body.paint(stomach & lumen & (body.y < air_level), -960, STOMACH)

    course = [(5, 34, 115), (8, 30, 80), (16, 22, 58), (30, 12, 46)]
    oesophagus = body.tube([_moved(rng, point, 2) for point in course], [9, 9, 9, 8])
    oesophagus &= (body.labels == 0) & (body.hu > -500)
    body.paint(oesophagus, 50, OESOPHAGUS)
    body.paint(body.tube([course[0], course[1]], [3, 3]) & oesophagus, -350, OESOPHAGUS)


def _pancreas_and_veins(body: _Body, rng: np.random.Generator) -> None:
    shift = rng.normal(0, 2.5, 3)
    course = [(-32, -14, -34), (-24, -18, -14), (-4, -22, -2), (26, -14, 8), (56, 8, 16), (76, 22, 20)]
    path = [tuple(np.add(_moved(rng, point, 4), shift)) for point in course]
    free = (body.labels == 0) | ((body.labels == STOMACH) & (body.y > -24))
    thick = rng.uniform(0.88, 1.15)
    pancreas = body.tube(path, [13 * thick, 14 * thick, 10 * thick, 10.5 * thick, 9.5 * thick, 8 * thick]) & free
    body.paint(pancreas, _mottled(body, rng, rng.uniform(82, 108), 10), PANCREAS)
    # The splenic vein runs behind the pancreas, meets the mesenteric vein and enters the liver as the portal vein.
    behind = [(x, y + 11, z + 1) for x, y, z in path[2:]]
    splenic = body.tube(behind, [5.5] * len(behind))
    portal = body.tube([behind[0], (-22, -6, 10), (-38, -12, 24)], [7, 7.5, 7])
    mesenteric = body.tube([behind[0], (-8, -18, -40)], [6.5, 5.5])
    veins = (splenic | portal) & np.isin(body.labels, (0, PANCREAS, LIVER, STOMACH)) & (body.hu > -500)
    body.paint(mesenteric & (body.labels == 0), body.vein_hu)
    body.paint(veins, _mottled(body, rng, body.vein_hu, 4), VEINS)


def _table(body: _Body) -> None:
    surface = body.back_mm + 5 - 0.0009 * body.bed_x_mm**2  # the couch is a shallow trough
    depth = body.bed_mm - surface
    outside = body.hu < -900
    on_couch = outside & (np.abs(body.bed_x_mm) < 150)
    body.paint(on_couch & (depth > 0) & (depth < 22), -940)
    body.paint(on_couch & (((depth > 0) & (depth < 5)) | ((depth > 17) & (depth < 22))), -150)
