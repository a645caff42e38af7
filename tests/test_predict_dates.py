"""Maps of what changed between two dates: `sarjax predict RUN --t1 A --t2 B`."""

import dataclasses
import json

import numpy as np
import pytest
import rasterio
import toy_dates
from affine import Affine
from rasterio.crs import CRS
from scenes.scene_files import PLACE, pixels, stamps, trained
from verbs import fails, run

from sarjax import raster
from sarjax.errors import UserError
from sarjax.scenes.inputs import Reads, open_scene, pair_scenes

pytestmark = pytest.mark.usefixtures("session_devices")

SIZE = (120, 150)
SAR = Reads(toy_dates.SPEC, ("sar",), (0, 1))
BOTH = Reads(toy_dates.SPEC, ("sar", "optical"), (0, 1))
DEGREES = {"crs": CRS.from_epsg(4326), "transform": Affine(1e-4, 0, 12.0, 0, -1e-4, 48.0)}
WINDOWS = ("--window", 96, "--overlap", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_dates.trained(tmp_path_factory.mktemp("runs") / "change")


def write(path, seed=0, image=None, bands=1, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels(*SIZE, bands, seed) if image is None else image
    return raster.write(path, image, nodata=0, **(PLACE | profile))


def later():
    """The second date: what had no data at the first lies elsewhere here, in part."""
    return np.roll(pixels(*SIZE, 1, 1), 20, axis=1)


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "in" / "before.tif", 0), write(tmp_path / "in" / "after.tif", image=later())


def names(scenes):
    return {s.name: {m: [p and p.as_posix() for p in paths] for m, paths in s.files.items()} for s in scenes}


# --- what is accepted


def test_a_change_map(model, pair, tmp_path, capsys):
    out = tmp_path / "out"
    call = ("predict", model, "--t1", pair[0], "--t2", pair[1], "--out", out, *WINDOWS, "--json")
    capsys.readouterr()
    run(*call)
    (record,) = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in out.iterdir()) == [f"before_after.{end}" for end in ("json", "png", "tif")]
    with rasterio.open(out / "before_after.tif") as f:
        labels, palette, place = f.read(1), f.colormap(1), {"crs": f.crs, "transform": f.transform}
    assert place == PLACE
    assert [palette[i][:3] for i in range(3)] == list(toy_dates.SPEC.palette)
    assert [(i["sensor"], i["date"], i["file"]) for i in record["inputs"]] == [
        ("sar", 0, str(pair[0])),
        ("sar", 1, str(pair[1])),
    ]
    counts = {c: int((labels == i).sum()) for i, c in enumerate(toy_dates.SPEC.class_names)}
    assert record["pixels"] == counts
    assert record["area_m2"] == {c: 100 * n for c, n in counts.items()}
    seen = np.stack([pixels(*SIZE, 1), later()])[..., 0] > 0
    assert (seen[0] != seen[1]).any()
    np.testing.assert_array_equal(labels == 255, ~seen.any(0), "as for all scenes: nothing was seen at any date")

    before = stamps(out)
    run(*call)
    assert "is there already" in capsys.readouterr().err
    assert stamps(out) == before
    other = write(tmp_path / "other" / "before.tif", 2)
    assert f"was made from sar={pair[0]}, sar={pair[1]} (date 2), not from sar={other}" in fails(
        capsys, "predict", model, "--t1", other, "--t2", pair[1], "--out", out, *WINDOWS
    )
    assert stamps(out) == before


def test_a_change_map_at_once(model, pair, tmp_path):
    call = ("predict", model, "--t1", pair[0], "--t2", pair[1])
    run(*call, "--out", tmp_path / "windows")
    run(*call, "--out", tmp_path / "whole", "--mesh.space", 2)
    one, other = (raster.read(tmp_path / out / "before_after.tif") for out in ("windows", "whole"))
    np.testing.assert_array_equal(other == 255, one == 255)
    assert np.mean(other == one) > 0.999, "but for ties"


def test_the_order_of_the_dates_counts(model, pair, tmp_path):
    maps = []
    for folder, (t1, t2) in (("a", pair), ("b", pair[::-1])):
        run("predict", model, "--t1", t1, "--t2", t2, "--out", tmp_path / folder, *WINDOWS, "--probabilities")
        (path,) = (tmp_path / folder).glob("*_probabilities.tif")
        maps.append(raster.read(path))
    run("predict", model, f"{pair[0]}+{pair[1]}", "--out", tmp_path / "c", *WINDOWS, "--probabilities")
    np.testing.assert_array_equal(raster.read(tmp_path / "c" / "before_probabilities.tif"), maps[0])
    assert np.nanmax(np.abs(maps[0] - maps[1])) > 1e-3


def test_areas_in_degrees_are_those_on_the_ground(model, tmp_path, capsys):
    """By hand: metres of a degree of latitude and of longitude at each row, on the ellipsoid of WGS 84."""
    paths = [write(tmp_path / "in" / f"{name}.tif", seed, **DEGREES) for seed, name in enumerate("ab")]
    capsys.readouterr()
    run("predict", model, "--t1", paths[0], "--t2", paths[1], "--out", tmp_path / "out", *WINDOWS, "--json")
    (record,) = json.loads(capsys.readouterr().out)
    labels = raster.read(tmp_path / "out" / "a_b.tif")[..., 0]
    phi = np.radians(48.0 - 1e-4 * (np.arange(SIZE[0]) + 0.5))
    s2, e2 = np.sin(phi) ** 2, 0.0066943799901413165
    north = 6378137.0 * (1 - e2) / (1 - e2 * s2) ** 1.5
    east = 6378137.0 / np.sqrt(1 - e2 * s2) * np.cos(phi)
    pixel = np.radians(1e-4) ** 2 * north * east
    for i, name in enumerate(toy_dates.SPEC.class_names):
        expected = ((labels == i) * pixel[:, None]).sum()
        assert record["area_m2"][name] == pytest.approx(expected, rel=1e-6)
    assert 80 < sum(record["area_m2"].values()) / sum(record["pixels"].values()) < 85, "11.1 m by 7.5 m"


def test_scenes_that_lie_nowhere_have_no_area(model, tmp_path, capsys):
    image = pixels(*SIZE, 1)
    paths = [raster.write(tmp_path / f"{name}.png", image) for name in "ab"]
    capsys.readouterr()
    run("predict", model, "--t1", paths[0], "--t2", paths[1], "--out", tmp_path / "out", *WINDOWS, "--json")
    (record,) = json.loads(capsys.readouterr().out)
    assert record["area_m2"] is None
    assert sum(record["pixels"].values()) + record["no_data_pixels"] == image.size


def test_how_pairs_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (
        "x/a.tif", "y/a.tif", "y/b.tif", "x/o.tif", "y/o.tif", "t1/p.tif", "t1/deep/q.png", "t2/p.tif", "t2/deep/q.tif",
        "s1/sar/p.tif", "s1/optical/p.jpg", "s2/sar/p.tif", "s2/image/p.tif",
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert names(pair_scenes("x/a.tif", "y/b.tif", SAR)) == {"a_b": {"sar": ["x/a.tif", "y/b.tif"]}}
    assert names(pair_scenes("x/a.tif", "sar=y/a.tif", SAR)) == {"a": {"sar": ["x/a.tif", "y/a.tif"]}}
    assert names(pair_scenes("t1", "t2", SAR)) == {
        "p": {"sar": ["t1/p.tif", "t2/p.tif"]},
        "deep_q": {"sar": ["t1/deep/q.png", "t2/deep/q.tif"]},
    }
    several = pair_scenes("sar=x/a.tif,optical=x/o.tif", "optical=y/o.tif,sar=y/b.tif", BOTH)
    assert names(several) == {"a_b": {"sar": ["x/a.tif", "y/b.tif"], "optical": ["x/o.tif", "y/o.tif"]}}
    assert names(pair_scenes("s1", "s2", BOTH)) == {
        "p": {"sar": ["s1/sar/p.tif", "s2/sar/p.tif"], "optical": ["s1/optical/p.jpg", "s2/image/p.tif"]}
    }
    assert all(scene.strict for scene in several)
    outer = Reads(dataclasses.replace(toy_dates.SPEC, dates=3), ("sar",), (0, 2))
    assert names(pair_scenes("x/a.tif", "y/a.tif", outer)) == {"a": {"sar": ["x/a.tif", None, "y/a.tif"]}}


# --- what is refused


@pytest.mark.parametrize(
    ("t1", "t2", "reads", "message"),
    [
        ("a.tif", "b.tif", SAR._replace(dates=(1,)), r"two dates, but this one reads 1: a raster file, or a folder"),
        ("a.tif+b.tif", "b.tif", SAR, r"dates in scene 'a.tif\+b.tif' is 2, but should be 1: a raster file"),
        ("a.tif", "b.tif", BOTH, r"'a.tif' lacks optical: sar=FILE,optical=FILE, or a folder"),
        ("f", "b.tif", SAR, r"f is a folder and b.tif is none: two files, or two folders, are accepted"),
        ("f", "g", SAR, r"f holds 'q' and g does not: rasters of the same names are needed"),
        ("g", "f", SAR, r"f holds 'q' and g does not"),
        ("f", "empty", SAR, r"empty holds no raster"),
    ],
)  # fmt: skip
def test_pairs_that_are_none(tmp_path, monkeypatch, t1, t2, reads, message):
    monkeypatch.chdir(tmp_path)
    for path in ("a.tif", "b.tif", "f/p.tif", "f/q.tif", "g/p.tif"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as e:
        pair_scenes(t1, t2, reads)
    assert str(e.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"crs": CRS.from_epsg(32632)}, "CRS EPSG"),
        ({"transform": Affine(10, 0, 4e5 + 5, 0, -10, 5e6)}, "transform "),
        ({"crs": None}, "only one has a CRS"),
        ({"crs": None, "transform": None}, "only one has a CRS"),
        ({"transform": None}, "only one has a transform"),
        ({"image": pixels(60, 80, 1)}, "size "),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_dates_that_are_not_on_one_grid(tmp_path, other, what, later):
    good = write(tmp_path / "good.tif")
    odd = tmp_path / "odd.tif"
    if "image" in other:
        write(odd, **other)
    else:
        raster.write(odd, pixels(*SIZE, 1), nodata=0, **{k: v for k, v in (PLACE | other).items() if v is not None})
    t1, t2 = (good, odd) if later else (odd, good)
    (scene,) = pair_scenes(str(t1), str(t2), SAR)
    with pytest.raises(UserError, match=rf"{t1} and {t2} are not on one grid \({what}") as e, open_scene(scene, SAR):
        pass
    assert str(e.value).count(". ") == 0, "one sentence"


def test_every_sensor_has_to_lie_on_one_grid(tmp_path):
    """The other form, dates joined by "+", believes the one that says where it lies."""
    paths = [write(tmp_path / f"{name}.tif") for name in ("s1", "s2")]
    paths += [write(tmp_path / "o1.tif", bands=2), raster.write(tmp_path / "o2.tif", pixels(*SIZE, 2), nodata=0)]
    s1, s2, o1, o2 = paths
    (scene,) = pair_scenes(f"sar={s1},optical={o1}", f"sar={s2},optical={o2}", BOTH)
    with pytest.raises(UserError, match=r"o1.tif and .*o2.tif are not on one grid"), open_scene(scene, BOTH):
        pass
    with open_scene(scene._replace(strict=False), BOTH) as source:
        assert source.georeference.crs == PLACE["crs"]


def test_what_the_command_line_refuses(model, pair, tmp_path, capsys):
    def refused(*args, of=model):
        message = fails(capsys, "predict", of, *args, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return message

    a, b = pair
    assert "--t1 is given without --t2; both dates" in refused("--t1", a)
    assert "--t2 is given without --t1; both dates" in refused("--t2", b)
    assert f"{a} is given beside --t1 and --t2" in refused(a, "--t1", a, "--t2", b)
    assert "or --t1 and --t2 for two dates" in refused()
    odd = write(tmp_path / "in" / "odd.tif", **DEGREES)
    assert f"{a} and {odd} are not on one grid (CRS EPSG:32633 and EPSG:4326)" in refused("--t1", a, "--t2", odd)
    one = trained(tmp_path / "one date")
    assert "for a run that reads two dates, but this one reads 1" in refused("--t1", a, "--t2", b, of=one)
