"""What a scene is on a command line, and one sentence for each that does not fit."""

import dataclasses

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS
from scenes.scene_files import PLACE, SPEC, pixels, write_scene

from sarjax import raster
from sarjax.errors import UserError
from sarjax.raster import Window
from sarjax.scenes.inputs import Reads, open_scene, parse_scenes, scene_statistics

SAR = Reads(SPEC, ("sar",), (0,))
BOTH = Reads(SPEC, ("sar", "optical"), (0,))
PAIR = dataclasses.replace(SPEC, dates=2)
TWO_DATES = Reads(PAIR, ("sar",), (0, 1))
FIRST = Reads(PAIR, ("sar",), (0,))
LAST = Reads(PAIR, ("sar",), (1,))


def names(scenes):
    return {s.name: {m: [p and p.name for p in paths] for m, paths in s.files.items()} for s in scenes}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty files: parsing opens nothing."""
    monkeypatch.chdir(tmp_path)
    for path in (
        "a.tif", "b.tif", "odd+name=x,y.tif", "flat/one.tif", "flat/two.PNG", "flat/note.txt", "flat/.hidden.tif",
        "deep/sar/p.tif", "deep/sar/q.tif", "deep/sar_2/p.tif", "deep/sar_2/q.tif", "deep/optical/p.jpg",
        "deep/optical/q.tif", "uneven/sar/p.tif", "uneven/optical/r.tif", "twice/a.tif", "twice/a.png",
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_what_is_accepted(folder):
    assert names(parse_scenes(["a.tif", "flat"], SAR)) == {
        "a": {"sar": ["a.tif"]},
        "one": {"sar": ["one.tif"]},
        "two": {"sar": ["two.PNG"]},
    }
    assert names(parse_scenes(["sar=a.tif"], SAR)) == {"a": {"sar": ["a.tif"]}}
    assert names(parse_scenes(["odd+name=x,y.tif"], SAR)) == {"odd+name=x,y": {"sar": ["odd+name=x,y.tif"]}}
    assert names(parse_scenes(["optical=b.tif,sar=a.tif"], BOTH)) == {"a": {"sar": ["a.tif"], "optical": ["b.tif"]}}
    assert names(parse_scenes(["sar=a.tif+b.tif"], TWO_DATES)) == {"a": {"sar": ["a.tif", "b.tif"]}}
    assert names(parse_scenes(["a.tif+b.tif"], TWO_DATES)) == {"a": {"sar": ["a.tif", "b.tif"]}}
    assert names(parse_scenes(["deep"], SAR)) == {"p": {"sar": ["p.tif"]}, "q": {"sar": ["q.tif"]}}
    assert names(parse_scenes(["deep"], BOTH))["p"] == {"sar": ["p.tif"], "optical": ["p.jpg"]}
    assert names(parse_scenes(["deep"], TWO_DATES))["q"] == {"sar": ["q.tif", "q.tif"]}


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_folders_are_searched_to_the_bottom(folder):
    touch(folder, "tree/top.tif", "tree/east/a.tif", "tree/west/far/a.TIF", "tree/.cache/b.tif", "tree/east/.b.tif")
    (tree,) = [parse_scenes(["tree"], SAR)]
    assert names(tree) == {
        "top": {"sar": ["top.tif"]},
        "east_a": {"sar": ["a.tif"]},
        "west_far_a": {"sar": ["a.TIF"]},
    }
    touch(folder, "both/sar/east/a.tif", "both/sar/b.tif", "both/optical/east/a.jpg", "both/optical/b.tif")
    assert names(parse_scenes(["both"], BOTH))["east_a"] == {"sar": ["a.tif"], "optical": ["a.jpg"]}
    touch(folder, "tree/east_a.tif")
    with pytest.raises(UserError, match=r"east/a.tif and .*east_a.tif would both become east_a.tif: other names are"):
        parse_scenes(["tree"], SAR)


def test_a_subfolder_called_image_is_optical(folder):
    touch(folder, "both/sar/a.tif", "both/image/a.tif")
    assert parse_scenes(["both"], BOTH)[0].files["optical"][0].parent.name == "image"
    touch(folder, "both/optical/a.tif")
    assert parse_scenes(["both"], BOTH)[0].files["optical"][0].parent.name == "optical"
    touch(folder, "odd/sar/a.tif", "odd/image/b.tif")
    with pytest.raises(UserError, match="odd holds 'a' in only one of the subfolders sar and image"):
        parse_scenes(["odd"], BOTH)


def test_what_is_left_aside_is_said(folder):
    said = []
    assert names(parse_scenes(["deep"], SAR, said.append)).keys() == {"p", "q"}
    assert not said
    touch(folder, "deep/loose.tif", "deep/note.txt", "deep/more.png")
    assert names(parse_scenes(["deep"], SAR, said.append)).keys() == {"p", "q"}
    assert said == ["deep: 2 raster(s) beside the subfolder sar are left aside"]


def test_maps_below_a_folder_are_no_scenes(folder):
    touch(folder, "s/a.tif", "s/maps/a.tif", "s/maps/a_probabilities.tif", "s/maps/a.png", "s/maps/a.jpg")
    (folder / "s" / "maps" / "a.json").write_text('{"made_by": "sarjax predict"}')
    said = []
    assert [s.paths[0].name for s in parse_scenes(["s"], SAR, said.append)] == ["a.tif", "a.jpg"]
    assert said == ["s: 3 file(s) of maps that were made before are left aside"]


def test_dates_that_are_not_read(folder):
    assert names(parse_scenes(["a.tif"], FIRST)) == {"a": {"sar": ["a.tif", None]}}
    assert names(parse_scenes(["a.tif"], LAST)) == {"a": {"sar": [None, "a.tif"]}}
    assert names(parse_scenes(["a.tif+b.tif"], LAST)) == {"b": {"sar": [None, "b.tif"]}}
    (scene,) = [s for s in parse_scenes(["deep"], LAST) if s.name == "p"]
    assert scene.paths == (folder.relative_to(folder) / "deep" / "sar_2" / "p.tif",)


@pytest.mark.parametrize(
    ("texts", "reads", "message"),
    [
        (["a.tif"], BOTH, r"'a.tif' lacks optical: sar=FILE,optical=FILE, or a folder with subfolders sar, optical is"),
        (["a.tif+b.tif"], SAR, r"dates in scene .* is 2, but should be 1: a raster file, or a folder of them"),
        (["a.tif"], TWO_DATES, r"dates in scene .* is 1, but should be 2: sar=FILE\+FILE, or a folder with"),
        (["a.tif+b.tif+a.tif"], FIRST, r"is 3, but should be 1 or 2"),
        (["optical=a.tif"], SAR, r"gives 'optical', but this network reads sar"),
        (["sra=a.tif"], SAR, r"gives 'sra', but this network reads sar"),
        (["sar=a.tif,optical"], BOTH, r"cannot be understood"),
        (["sar=a.tif,sar=b.tif"], BOTH, r"cannot be understood"),
        (["flat"], BOTH, r"flat has no subfolder sar"),
        (["uneven"], BOTH, r"uneven holds 'p' in only one of the subfolders sar and optical"),
        (["deep"], Reads(PAIR, ("sar", "optical"), (0, 1)), r"is 1, but should be 2"),
        (["empty"], SAR, r"empty holds no raster \(.tif"),
        (["twice"], SAR, r"a.png and .*a.tif differ by their ending only"),
        (["a.tif", "sar=twice/a.tif"], SAR, r"a.tif and twice/a.tif would both become a.tif"),
    ],
)
def test_what_is_refused(folder, texts, reads, message):
    with pytest.raises(UserError, match=message) as e:
        parse_scenes(texts, reads)
    assert str(e.value).count(". ") == 0, "one sentence"


def write(path, image, **profile):
    return raster.write(path, image, **(PLACE | profile))


@pytest.mark.parametrize(
    ("name", "image", "profile", "message"),
    [
        ("sar", pixels(40, 50, 3), {}, r"sar.tif has 3 bands, but 1 of sar are expected: VV"),
        ("sar", pixels(40, 50, 1).astype(np.uint16), {}, r"sar.tif holds uint16, but uint8 is expected for sar"),
        ("optical", pixels(30, 50, 2), {}, r"optical.tif is 50 x 30 pixels, but .*sar.tif is 50 x 40"),
        ("optical", pixels(40, 50, 2), {"crs": CRS.from_epsg(4326)}, r"optical.tif does not lie where .*sar.tif does"),
        ("optical", pixels(40, 50, 2), {"transform": Affine(10, 0, 0, 0, -10, 0)}, r"optical.tif does not lie where"),
    ],
)
def test_rasters_that_do_not_fit(tmp_path, name, image, profile, message):
    paths = write_scene(tmp_path, 40, 50)
    write(paths[name], image, **profile)
    (scene,) = parse_scenes([f"sar={paths['sar']},optical={paths['optical']}"], BOTH)
    with pytest.raises(UserError, match=message), open_scene(scene, BOTH):
        pass


def test_a_scene_lies_where_any_of_its_rasters_says(tmp_path):
    paths = write_scene(tmp_path, 40, 50)
    raster.write(paths["sar"], pixels(40, 50, 1))
    (scene,) = parse_scenes([f"sar={paths['sar']},optical={paths['optical']}"], BOTH)
    with open_scene(scene, BOTH) as source:
        assert source.georeference.transform == PLACE["transform"]


def test_windows_beyond_the_edge_and_dates_that_are_not_read(tmp_path):
    paths = write_scene(tmp_path, 40, 50)
    (scene,) = parse_scenes([str(paths["sar"])], LAST)
    image = pixels(40, 50, 1)
    with open_scene(scene, LAST) as source:
        batch, valid = source.read(Window(32, 32, 16, 32))
    assert batch["sar"].shape == (2, 16, 32, 1)
    assert batch["sar"].dtype == np.uint8
    assert not batch["sar"][0].any()
    assert not batch["sar_valid"][0].any()
    np.testing.assert_array_equal(batch["sar"][1, :8, :18], image[32:, 32:])
    assert not batch["sar"][1, 8:].any()
    np.testing.assert_array_equal(valid, batch["sar_valid"][1] > 0)
    np.testing.assert_array_equal(valid[:8, :18], image[32:, 32:, 0] > 0)
    assert not valid[8:].any()


def test_statistics_of_a_scene(tmp_path, monkeypatch):
    monkeypatch.setattr("sarjax.scenes.inputs.STRIDE", 17)
    paths = write_scene(tmp_path, 40, 50)
    (scene,) = parse_scenes([f"sar={paths['sar']},optical={paths['optical']}"], BOTH)
    said = []
    with open_scene(scene, BOTH) as source:
        found = scene_statistics(source, lambda *x: said.append(x))
    for m in SPEC.modalities:
        image = pixels(40, 50, len(m.bands)).astype(float)
        seen = image[(image != 0).any(-1)]
        np.testing.assert_allclose(found[f"{m.name}_mean"], seen.mean(0)[None], rtol=1e-6)
        np.testing.assert_allclose(found[f"{m.name}_std"], seen.std(0)[None], rtol=1e-6)
    assert said[-1] == (9, 9)
