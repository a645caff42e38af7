"""Where a raster lies on the ground, in what two such places differ, and the area of its pixels."""

from typing import Any, NamedTuple

import numpy as np

WEB_MERCATOR = 3857
EQUAL_AREA = 6933  # EPSG: cylindrical, of the ellipsoid of WGS 84, in metres, over the whole globe


class Georeference(NamedTuple):
    """Where a raster lies on the ground: rasterio's CRS, affine transform and ground control points; all may be None.

    An identity transform, which is what a file without any has, is None.
    """

    crs: Any = None
    transform: Any = None
    gcps: Any = None


NOWHERE = Georeference()


def same_place(a: Georeference, b: Georeference, height: int, width: int) -> bool:
    """Whether two rasters of height x width lie on one grid: the same CRS, corners apart by a tenth of a pixel at most.

    What only one of them says does not count; ground control points are not compared.
    """
    if a.crs is not None and b.crs is not None and a.crs != b.crs:
        return False
    return a.transform is None or b.transform is None or _same_grid(a.transform, b.transform, height, width)


def difference(a: Georeference, b: Georeference, height: int, width: int) -> str:
    """The first thing in which two rasters of height x width differ, in words, "" where they lie on one grid.

    Unlike `same_place`, what only one of them says is a difference.
    """
    for what, here, there in zip(("CRS", "transform", "ground control points"), a, b, strict=True):
        if here is None and there is None:
            continue
        if here is None or there is None:
            return f"only one has a {what}" if what != "ground control points" else f"only one has {what}"
        if what == "CRS" and here != there:
            return f"CRS {here} and {there}"
        if what == "transform" and not _same_grid(here, there, height, width):
            return f"transform {_written(here)} and {_written(there)}"
        if what == "ground control points" and _points(here) != _points(there):
            return what
    return ""


def _same_grid(a: Any, b: Any, height: int, width: int) -> bool:
    first, second = (np.array(transform, np.float64).reshape(-1, 3)[:2] for transform in (a, b))
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], np.float64)
    apart = np.abs(corners @ (first - second).T).max(0)
    return bool((apart <= 0.1 * np.abs(first[:, :2]).max(1)).all())


def _written(transform: Any) -> str:
    """As GDAL writes it: x, pixel width, row rotation, y, column rotation, pixel height."""
    return str([float(f"{value:.12g}") for value in transform.to_gdal()])


def _points(gcps: Any) -> list[tuple[float, ...]]:
    return [(p.row, p.col, p.x, p.y, p.z) for p in gcps]


def row_areas(georeference: Georeference, height: int) -> np.ndarray | None:
    """Square metres that a pixel of each row covers, (height,); None where that is not known.

    On a map projection it is what the transform says, as its users reckon (the projection's own distortion, up to .1 %
    in UTM, stays). Degrees, and Web Mercator, whose metres are those of the equator, are measured on the ellipsoid:
    row by row, since areas shrink towards the poles. None without CRS or transform, for these two on a turned grid, and
    for rows beyond a pole.
    """
    crs, transform = georeference.crs, georeference.transform
    if crs is None or transform is None:
        return None
    by_row = crs.is_geographic or crs.to_epsg() == WEB_MERCATOR
    if not by_row:
        if not crs.is_projected:
            return None
        metres = crs.linear_units_factor[1]
        return np.full(height, abs(transform.determinant) * metres**2)
    if transform.b or transform.d:
        return None
    from rasterio.warp import transform as reproject

    # The width of a pixel is the same at every longitude: at 0 no edge of the map is in the way.
    edges = transform.f + transform.e * np.arange(height + 1)
    if crs.is_geographic:
        pole = np.pi / 2 / crs.units_factor[1]
        if np.abs(edges).max() > pole + 0.5 * abs(transform.e):
            return None
        edges = edges.clip(-pole, pole)
    across = np.where(np.arange(height + 1) % 2, transform.a, 0.0)
    x, y = (np.array(values) for values in reproject(crs, f"EPSG:{EQUAL_AREA}", across, edges))
    return np.abs(np.diff(x) * np.diff(y))
