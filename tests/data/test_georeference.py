"""Which rasters lie on one grid, in what others differ, and the area of their pixels."""

import numpy as np
import pytest
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS

from sarjax.georeference import NOWHERE, Georeference, difference, row_areas, same_place


def test_what_lies_on_one_grid():
    grid = Affine(10, 0, 4e5, 0, -10, 5e6)
    utm, degrees = CRS.from_epsg(32633), CRS.from_epsg(4326)

    def same(crs, transform):
        a, b = Georeference(utm, grid), Georeference(crs, transform)
        assert same_place(a, b, 1000, 2000) == same_place(b, a, 1000, 2000)
        return same_place(a, b, 1000, 2000)

    assert same(utm, grid)
    assert same(None, grid)
    assert same(utm, None)
    assert same(utm, Affine(10, 0, 4e5 + 0.9, 0, -10, 5e6))
    assert not same(degrees, grid)
    assert not same(utm, Affine(10, 0, 4e5 + 1.1, 0, -10, 5e6))
    assert not same(utm, Affine(10, 0, 4e5, 0, -10, 5e6 - 10))
    assert not same(utm, Affine(10.001, 0, 4e5, 0, -10, 5e6)), "the far corners are two metres apart"


def test_what_differs():
    """Unlike `same_place`, it counts what only one of the two says."""
    grid = Affine(10, 0, 4e5, 0, -10, 5e6)
    here = Georeference(CRS.from_epsg(32633), grid)
    points = [GroundControlPoint(0, 0, 1.0, 2.0), GroundControlPoint(9, 9, 3.0, 4.0)]
    moved = [GroundControlPoint(0, 0, 1.0, 2.5), GroundControlPoint(9, 9, 3.0, 4.0)]
    for a, b, expected in (
        (here, here, ""),
        (NOWHERE, NOWHERE, ""),
        (here, here._replace(transform=Affine(10, 0, 4e5 + 0.9, 0, -10, 5e6)), ""),
        (Georeference(gcps=points), Georeference(gcps=list(points)), ""),
        (here, NOWHERE, "only one has a CRS"),
        (here, here._replace(transform=None), "only one has a transform"),
        (here, here._replace(crs=CRS.from_epsg(4326)), "CRS EPSG:32633 and EPSG:4326"),
        (
            here,
            here._replace(transform=Affine(10, 0, 4e5 + 1.1, 0, -10, 5e6)),
            "transform [400000.0, 10.0, 0.0, 5000000.0, 0.0, -10.0] and [400001.1, 10.0, 0.0, 5000000.0, 0.0, -10.0]",
        ),
        (Georeference(gcps=points), Georeference(gcps=moved), "ground control points"),
        (Georeference(gcps=points), NOWHERE, "only one has ground control points"),
    ):
        assert difference(a, b, 1000, 2000) == expected
        assert bool(difference(b, a, 1000, 2000)) == bool(expected)


FOOT = 1200 / 3937  # of the US survey, in metres


@pytest.mark.parametrize(("epsg", "area"), [(32633, 200.0), (3035, 200.0), (2263, 200 * FOOT**2), (None, None)])
def test_the_area_of_a_pixel_of_a_map(epsg, area):
    crs = None if epsg is None else CRS.from_epsg(epsg)
    turned = Affine(8, -6, 4e5, -12, -16, 5e6)
    for transform in (Affine(10, 0, 4e5, 0, -20, 5e6), turned):
        found = row_areas(Georeference(crs, transform), 3)
        assert found is None if area is None else found == pytest.approx([area] * 3)
    assert row_areas(Georeference(crs, None), 3) is None


def on_the_ellipsoid(south, north, width):
    """Square metres between two latitudes, `width` degrees wide, on WGS 84: the integral of its radii of curvature."""
    a, e2 = 6378137.0, 0.0066943799901413165
    phi = np.radians(np.linspace(south, north, 2001))
    s2 = np.sin(phi) ** 2
    strip = a**2 * (1 - e2) * np.cos(phi) / (1 - e2 * s2) ** 2
    return np.radians(width) * np.trapezoid(strip, phi)


def test_the_area_of_a_pixel_in_degrees():
    rows, step = 700, 0.1
    for west in (10.0, 179.97):
        found = row_areas(Georeference(CRS.from_epsg(4326), Affine(0.05, 0, west, 0, -step, 60.0)), rows)
        for row in (0, 1, 350, 599, 600, 699):
            north = 60 - step * row
            assert found[row] == pytest.approx(on_the_ellipsoid(north - step, north, 0.05), rel=1e-6)
    assert found[0] < 0.6 * found[600], "of a pixel at 60 degrees and at the equator"
    turned = Affine(0.1, 0.01, 10, 0.01, -0.1, 60)
    assert row_areas(Georeference(CRS.from_epsg(4326), turned), rows) is None
    beyond = Affine(0.1, 0, 10, 0, -0.1, 91)
    assert row_areas(Georeference(CRS.from_epsg(4326), beyond), 2) is None


def test_the_area_of_a_pixel_of_web_mercator():
    """At 60 degrees a metre of the map is about half a metre."""
    north = 6378137.0 * np.log(np.tan(np.pi / 4 + np.radians(60) / 2))
    (found,) = row_areas(Georeference(CRS.from_epsg(3857), Affine(10, 0, 0, 0, -10, north)), 1)
    assert found == pytest.approx(25, rel=0.01)
