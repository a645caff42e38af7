"""Made-up scenes in the file layout of WHU-OPT-SAR, for demonstrations and tests where no imagery may be had.

A scene is a landscape (fields in districts, forest, lakes and a river, roads between districts, villages, city blocks)
seen by two sensors. The optical bands separate the classes pixel by pixel. The radar amplitude does so only in part:
speckle, and means that lie close together (fields, forest, villages; water and roads), leave it to texture, shape and
context, so that a radar network has something to learn from examples, or from an optical teacher.

Layout: `optical/` (B, G, R, NIR), `sar/` (one band, amplitude) and `lbl/` (class * 10, 0 = background), LZW TIFF,
uint8, one name in all. With two dates our own extension: `optical_2/`, `sar_2/` and `lbl_2/` for the second date, and
`change/` (255 where the land cover changed, else 0). The fields' season changes between the dates everywhere, which is
no change of land cover; some parcels do change.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sarjax import raster
from sarjax.errors import UserError

BACKGROUND, FARMLAND, CITY, VILLAGE, WATER, FOREST, ROAD, OTHERS = range(8)
# Mean reflectance in 8 bit (B, G, R, NIR) and mean radar amplitude, by class.
REFLECTANCE = np.array(
    [
        [0, 0, 0, 0],
        [78, 90, 88, 120],
        [132, 130, 128, 116],
        [104, 104, 112, 108],
        [70, 76, 58, 34],
        [44, 60, 44, 128],
        [150, 152, 152, 138],
        [108, 120, 142, 150],
    ],
    np.float32,
)
SOIL = np.array([92, 100, 112, 118], np.float32)
CROP = np.array([56, 80, 56, 158], np.float32)
AMPLITUDE = np.array([0, 68, 112, 78, 24, 82, 30, 56], np.float32)
LOOKS = 4.0
# Share of pixels as in the real data set; roads follow from the districts' size.
SHARES = {WATER: 0.142, CITY: 0.047, VILLAGE: 0.058, OTHERS: 0.017, FOREST: 0.376}
DISTRICT, ROAD_HALF_WIDTH, VILLAGE_CELL = 330.0, 1.7, 120.0
BAND_ROWS = 256
MANIFEST = "synthesis.json"
FOLDERS = ("optical", "sar", "lbl")


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene: per date optical (h, w, 4), sar (h, w) and label (h, w), all uint8; labels are class * 10."""

    name: str
    optical: list[np.ndarray]
    sar: list[np.ndarray]
    label: list[np.ndarray]

    @property
    def change(self) -> np.ndarray:
        """(h, w) uint8: 255 where the first and last date differ in land cover."""
        return np.where(self.label[0] != self.label[-1], 255, 0).astype(np.uint8)


def synthesize(
    out: str | os.PathLike,
    scenes: int,
    size: tuple[int, int] = (1024, 1024),
    seed: int = 0,
    dates: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Writes `scenes` scenes of `size` = (width, height) pixels into the folder `out` and returns it.

    Scene i is a function of (seed, i, size, dates) alone. The folder appears in one move, when all is written.
    Raises UserError for impossible numbers and for a folder that holds anything else already.
    """
    width, height = size
    if scenes < 1 or dates not in (1, 2) or min(size) < 64:
        raise UserError(
            f"cannot make {scenes} scenes of {width}x{height} with {dates} dates: at least 1 scene of at least 64x64 "
            "pixels and 1 or 2 dates are needed."
        )
    if seed < 0:
        raise UserError(f"the seed of the scenes is {seed}, but should be a whole number from 0.")
    out = Path(out).expanduser().absolute()
    settings = {"scenes": scenes, "width": width, "height": height, "seed": seed, "dates": dates, "version": 1}
    if _is_there(out, settings):
        return out
    temporary = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for i in range(scenes):
            if progress:
                progress("scenes", i, scenes)
            _write(temporary, make_scene(seed, i, size, dates))
        (temporary / MANIFEST).write_text(json.dumps(settings) + "\n")
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
    except OSError as e:
        raise UserError(f"cannot write scenes to {out}: {e.strerror}; --out takes a new or empty folder.") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if progress:
        progress("scenes", scenes, scenes)
    return out


def make_scene(seed: int, index: int, size: tuple[int, int], dates: int = 1) -> Scene:
    """Scene `index` of a series; memory is that of its images and a band of rows."""
    width, height = size
    land = _Landscape(seed, index, width, height)
    optical = [np.empty((height, width, 4), np.uint8) for _ in range(dates)]
    sar = [np.empty((height, width), np.uint8) for _ in range(dates)]
    label = [np.empty((height, width), np.uint8) for _ in range(dates)]
    columns = np.arange(width)
    for first in range(0, height, BAND_ROWS):
        rows = np.arange(first, min(first + BAND_ROWS, height))
        ground = land.ground(rows, columns)
        for t in range(dates):
            cover = land.changed(ground) if t else ground.cover
            part = slice(first, first + len(rows))
            label[t][part] = cover * 10
            rng = np.random.default_rng([seed, index, t, first])
            optical[t][part], sar[t][part] = land.render(ground, cover, t, rows, columns, rng)
    return Scene(scene_name(index), optical, sar, label)


def scene_name(index: int) -> str:
    """A file name like the real ones, and never one of them: rows of real sheets end at 24."""
    return f"NH49E{900 + index // 24:03d}{index % 24 + 1:03d}.tif"


def _is_there(out: Path, settings: dict[str, int]) -> bool:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: --out takes a new or empty folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    manifest = out / MANIFEST
    if manifest.is_file() and json.loads(manifest.read_text()) == settings:
        return True
    raise UserError(f"{out} is not empty and does not hold these scenes: --out takes a new or empty folder.")


def _write(folder: Path, scene: Scene) -> None:
    for t in range(len(scene.label)):
        for name, images in zip(FOLDERS, (scene.optical, scene.sar, scene.label), strict=True):
            where = folder / (f"{name}_{t + 1}" if t else name)
            where.mkdir(exist_ok=True)
            raster.write(where / scene.name, images[t])
    if len(scene.label) > 1:
        (folder / "change").mkdir(exist_ok=True)
        raster.write(folder / "change" / scene.name, scene.change)


@dataclasses.dataclass(frozen=True)
class _Ground:
    """What lies at the pixels of some rows (h, w): land cover, hash of the parcel, and place in the district's grid."""

    cover: np.ndarray
    parcel: np.ndarray
    u: np.ndarray
    v: np.ndarray


class _Landscape:
    """Everything random about a scene's ground, as functions of place: any rows can be had by themselves."""

    def __init__(self, seed: int, index: int, width: int, height: int):
        rng = np.random.default_rng([seed, index])
        self.key = int(rng.integers(2**31))
        noise = lambda cell, octaves=3: _Noise(rng, width, height, cell, octaves)  # noqa: E731
        self.warp = noise(190, 2), noise(190, 2)
        self.scores = {WATER: noise(330, 4), CITY: noise(240), OTHERS: noise(110), FOREST: noise(230, 5)}
        self.edge = noise(24, 2)
        self.light, self.wind = noise(700, 1), noise(120, 2)
        self.clumps, self.grain = noise(5, 2), noise(2.2, 1)
        angle = rng.uniform(0, np.pi)
        self.river_axis = np.cos(angle), np.sin(angle)
        self.river_centre = width / 2 * self.river_axis[1] - height / 2 * self.river_axis[0]
        self.river_centre += rng.uniform(-0.3, 0.3) * min(width, height)
        self.river_waves = [(rng.uniform(25, 90), rng.uniform(260, 900), rng.uniform(0, 6.3)) for _ in range(3)]
        self.river_half = rng.uniform(5, 14) if rng.random() < 0.8 else 0.0
        wedge = rng.uniform(0.02, 0.12) if rng.random() < 0.25 else 0.0
        self.wedge = wedge, rng.uniform(0.15, 0.5), width, height
        self.season = float(rng.uniform(0.25, 0.45)), float(rng.uniform(0.6, 0.85))
        self.thresholds = self._thresholds(rng, width, height)

    def ground(self, rows: np.ndarray, columns: np.ndarray) -> _Ground:
        scores, water, road, _, u, v, parcel = self._fields(rows, columns)
        cover = np.full(u.shape, FARMLAND, np.uint8)
        for c in (FOREST, OTHERS, VILLAGE, CITY):
            cover[scores[c] > self.thresholds[c]] = c
        water |= scores[WATER] > self.thresholds[WATER]
        cover[water] = WATER
        cover[road & (scores[WATER] <= self.thresholds[WATER])] = ROAD
        cover[self._outside(rows, columns)] = BACKGROUND
        return _Ground(cover, parcel, u, v)

    def changed(self, ground: _Ground) -> np.ndarray:
        """The land cover at the second date: some parcels of fields and forest are built on, flooded or cleared."""
        draw, kind = _uniform(ground.parcel, 11), _uniform(ground.parcel, 12)
        after = np.select(
            [kind < 0.35, kind < 0.55, kind < 0.75], [np.uint8(VILLAGE), np.uint8(CITY), np.uint8(WATER)], OTHERS
        )
        cover = np.where((ground.cover == FARMLAND) & (draw < 0.08), after, ground.cover)
        return np.where((ground.cover == FOREST) & (draw < 0.05), FARMLAND, cover).astype(np.uint8)

    def render(self, ground, cover, date, rows, columns, rng) -> tuple[np.ndarray, np.ndarray]:
        """The two sensors' images of `cover`: optical (h, w, 4) and amplitude (h, w), uint8."""
        tone, greenness = _uniform(ground.parcel, 1) - 0.5, _uniform(ground.parcel, 2)
        clumps, grain = self.clumps.at(rows, columns), self.grain.at(rows, columns)
        green = np.clip(0.75 * greenness + self.season[date] - 0.25, 0, 1)
        rows_of_crop = np.sin(ground.u * (0.6 + 0.5 * _uniform(ground.parcel, 3))) * (greenness > 0.5)
        # Buildings stand in a grid; the radar looks along u: bright where walls face it, dark behind.
        side = np.where(cover == CITY, 9.0, 7.0).astype(np.float32)
        i, j = ground.u / side, ground.v / side
        building = _hash(ground.parcel, np.floor(i), np.floor(j))
        height, across = _uniform(building, 4), i - np.floor(i)
        in_city, in_village = cover == CITY, cover == VILLAGE
        house = (in_city & (height > 0.3)) | (in_village & (height > 0.62))
        garden = in_village & ~house

        optical = REFLECTANCE[cover]
        fields = cover == FARMLAND
        mix = green[fields][:, None]
        optical[fields] = SOIL * (1 - mix) + CROP * mix
        optical[garden] = 0.6 * optical[garden] + 0.4 * CROP
        gain = 1 + 0.06 * self.light.at(rows, columns) + 0.03 * grain
        gain += np.where(fields, 0.22 * tone + 0.03 * rows_of_crop, 0)
        gain += np.where(cover == FOREST, 0.11 * clumps, 0)
        gain += np.where(house, 0.5 * (height - 0.6) - 0.35 * (across > 0.8), 0)
        optical *= gain[..., None]
        optical += rng.standard_normal(optical.shape, np.float32) * 2.5

        amplitude = AMPLITUDE[cover]
        # Green fields scatter more: the season moves all fields, and no field's land cover.
        factor = np.where(fields, 0.72 + 0.5 * green + 0.45 * tone + 0.14 * rows_of_crop, 1)
        factor += np.where(cover == FOREST, 0.17 * clumps, 0) + np.where(cover == OTHERS, 0.2 * clumps + 0.1 * grain, 0)
        factor += np.where(cover == WATER, 0.16 * self.wind.at(rows, columns), 0)
        wall = np.where(across < 0.24, 3.4 * height * height, np.where(across > 0.78, -0.6, -0.1))
        factor += np.where(house, np.where(in_city, wall, 0.7 * wall), np.where(in_city | in_village, -0.25, 0))
        amplitude *= np.maximum(factor, 0.25)
        amplitude *= np.sqrt(rng.standard_gamma(LOOKS, amplitude.shape, np.float32) / LOOKS)
        seen = cover != BACKGROUND
        optical = np.clip(optical, 1, 255).astype(np.uint8) * seen[..., None]
        return optical, np.clip(amplitude, 1, 255).astype(np.uint8) * seen

    def _fields(self, rows, columns):
        """Scores by class, river and ponds, roads, district, place in its grid and parcel, at rows x columns."""
        dx, dy = (26 * w.at(rows, columns) for w in self.warp)
        x, y = columns[None, :].astype(np.float32) + dx, rows[:, None].astype(np.float32) + dy
        district, to_edge, pair = _cells(x, y, DISTRICT, self.key)
        road = (to_edge < ROAD_HALF_WIDTH) & (_uniform(pair, 5) < 0.62)
        angle = 3.1416 * _uniform(district, 6)
        cos, sin = np.cos(angle), np.sin(angle)
        # Fields and streets keep straighter than the districts that they lie in.
        x0, y0 = x - 0.7 * dx, y - 0.7 * dy
        u, v = x0 * cos + y0 * sin, y0 * cos - x0 * sin
        wide, long = 16 + 26 * _uniform(district, 7), 34 + 70 * _uniform(district, 8)
        j = np.floor(v / long)
        i = np.floor(u / wide + _uniform(_hash(district, j), 9))
        parcel = _hash(district, i, j)
        scores = {c: n.at(rows, columns) for c, n in self.scores.items()}
        edge = self.edge.at(rows, columns)
        village, distance, _ = _cells(x, y, VILLAGE_CELL, self.key + 1, nearest=True)
        scores[VILLAGE] = (0.35 + _uniform(village, 10)) * 30 - distance + 3 * edge
        scores[FOREST] = scores[FOREST] + 0.12 * edge
        ponds = (_uniform(district, 13) < 0.07) & (_uniform(parcel, 14) < 0.55)
        return scores, ponds | self._river(x, y), road, district, u, v, parcel

    def _river(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        cos, sin = self.river_axis
        along, across = x * cos + y * sin, x * sin - y * cos - self.river_centre
        slope = np.zeros_like(along)
        for height, length, phase in self.river_waves:
            across = across - height * np.sin(6.2832 * along / length + phase)
            slope += height * 6.2832 / length * np.cos(6.2832 * along / length + phase)
        return np.abs(across) < self.river_half * np.sqrt(1 + slope * slope)

    def _outside(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        depth, slant, width, height = self.wedge
        return columns[None, :] / width + slant * rows[:, None] / height < depth

    def _thresholds(self, rng: np.random.Generator, width: int, height: int) -> dict[int, float]:
        """Per class the score above which it is there, from a sparse sample, so that shares come out about right."""
        step = max(1, int(np.sqrt(width * height / 100_000)))
        scores, free, *_ = self._fields(np.arange(0, height, step), np.arange(0, width, step))
        free = ~free
        thresholds = {}
        for c in (WATER, CITY, VILLAGE, OTHERS, FOREST):
            share = SHARES[c] * np.exp(rng.normal(-0.02, 0.2))
            if c == WATER:
                share = max(share - (1 - free.mean()), 0.01)
            left = scores[c][free]
            thresholds[c] = float(np.quantile(left, 1 - min(share * free.size / max(left.size, 1), 0.9)))
            free &= scores[c] <= thresholds[c]
        return thresholds


class _Noise:
    """Smooth noise, mean 0 and deviation about 1, from random grids; every octave halves cell and weight."""

    def __init__(self, rng: np.random.Generator, width: int, height: int, cell: float, octaves: int):
        self.octaves = []
        for k in range(octaves):
            side = cell / 2**k
            shape = int(height / side) + 3, int(width / side) + 3
            self.octaves.append((side, 0.5**k, rng.standard_normal(shape, np.float32), rng.uniform(0, 1, 2)))
        # Interpolation between grid points takes about half of the variance in each direction.
        self.scale = 1.5 / np.sqrt(sum(weight**2 for _, weight, _, _ in self.octaves))

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """(len(rows), len(columns)) float32."""
        total = np.zeros((len(rows), len(columns)), np.float32)
        for side, weight, grid, (oy, ox) in self.octaves:
            (i, fi), (j, fj) = (_place(p / side + o) for p, o in ((rows, oy), (columns, ox)))
            lines = grid[i] * (1 - fi[:, None]) + grid[i + 1] * fi[:, None]
            total += (lines[:, j] * (1 - fj) + lines[:, j + 1] * fj) * np.float32(weight * self.scale)
        return total


def _place(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    i = np.floor(p).astype(np.int64)
    f = (p - i).astype(np.float32)
    return i, f * f * (3 - 2 * f)


def _cells(x, y, side: float, key: int, nearest: bool = False):
    """Voronoi cells around the jittered points of a grid: hash of the cell, distance to its border, hash of the border.

    nearest: distance to the cell's point instead.
    """
    cx, cy = np.floor(x / side), np.floor(y / side)
    first = np.full(x.shape, np.inf, np.float32)
    second, cell, other = first.copy(), np.zeros(x.shape, np.uint32), np.zeros(x.shape, np.uint32)
    points = np.zeros((4, *x.shape), np.float32)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            here = _hash(np.full(x.shape, key & 0xFFFFFFFF, np.uint32), cx + i, cy + j)
            px = (cx + i + 0.1 + 0.8 * _uniform(here, 20)) * side
            py = (cy + j + 0.1 + 0.8 * _uniform(here, 21)) * side
            d = (x - px) ** 2 + (y - py) ** 2
            closer, next_ = d < first, (d >= first) & (d < second)
            for a, b in ((second, first), (other, cell), (points[2], points[0]), (points[3], points[1])):
                a[closer] = b[closer]
            for a, b in ((first, d), (cell, here), (points[0], px), (points[1], py)):
                a[closer] = b[closer]
            for a, b in ((second, d), (other, here), (points[2], px), (points[3], py)):
                a[next_] = b[next_]
    if nearest:
        return cell, np.sqrt(first), None
    apart = np.hypot(points[0] - points[2], points[1] - points[3])
    pair = _hash(np.minimum(cell, other), np.maximum(cell, other).astype(np.int64))
    return cell, (second - first) / np.maximum(2 * apart, 1), pair


def _hash(h: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """uint32 hash of `h` uint32 and whole numbers of its shape: randomness by place, whatever is asked first."""
    for k in keys:
        h = (h ^ k.astype(np.int64).astype(np.uint32)) * np.uint32(0x9E3779B1)
        h = (h ^ (h >> 15)) * np.uint32(0x85EBCA6B)
        h = h ^ (h >> 13)
    return h


def _uniform(h: np.ndarray, salt: int) -> np.ndarray:
    """float32 in [0, 1) from a hash; another one for every salt."""
    h = (h ^ np.uint32((salt * 0xC2B2AE35) & 0xFFFFFFFF)) * np.uint32(0x27D4EB2F)
    h = (h ^ (h >> 15)) * np.uint32(0x85EBCA6B)
    return ((h ^ (h >> 16)) >> 8).astype(np.float32) * np.float32(2**-24)
