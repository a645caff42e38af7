"""WHU-OPT-SAR, built from miniature scenes in its real format: complete, in parts, in every configuration."""

import dataclasses
import shutil

import fake_data
import numpy as np
import pytest
from sarjax_datasets import rows

from sarjax.data.build import build, builder_class
from sarjax.data.layout import Layout, Options, Scene
from sarjax.data.store import open_directory
from sarjax.errors import UserError


def counts(where):
    return [sum(s == split for s in where.values()) for split in ("train", "val", "test")]


def complete(config):
    """The layout of all published scenes and their sizes; eleven are 5555 pixels wide."""
    from sarjax_datasets.whu_opt_sar.whu_opt_sar_dataset_builder import CUTS, _official, split_of_scenes

    names = sorted(name.removesuffix(".tif") for name in _official())
    scenes = tuple(Scene(name, {}, None) for name in names)
    cut = CUTS[config]
    splits = {} if cut.random else split_of_scenes(names, cut.validation)[0]
    spec = builder_class("whu_opt_sar").spec_of(config)
    layout = Layout(spec, {}, scenes, splits, tile=cut.tile, cover=cut.cover, random=cut.random)
    return layout, [(3704, 5555 if i % 9 == 0 and i < 99 else 5556) for i in range(100)]


def test_every_tile_comes_back(whu):
    files, dataset = whu
    tiles = fake_data.all_tiles(dataset)
    assert len(tiles) == 4 * len(files)  # 600 x 530: two by two tiles of 256, the rest is left out
    for _, name, tile in tiles:
        stem, place = name.split("/")
        row, column = int(place[1:6]), int(place[7:])
        part = (slice(None), slice(row, row + 256), slice(column, column + 256))
        scene = files[f"{stem}.tif"]
        optical, sar, label = scene.optical[part], scene.sar[part], scene.label[part][0]
        np.testing.assert_array_equal(tile["optical"], optical)
        np.testing.assert_array_equal(tile["sar"][..., 0], sar)
        y, x = np.mgrid[row : row + 256, column : column + 256]
        no_sar = (x < 30) & ((y < 20) | ((y >= 60) & (y < 80)))
        no_optical = ((x < 30) & (y < 20)) | ((x == 41) & (y == 41))
        np.testing.assert_array_equal(tile["sar_valid"][0] == 0, no_sar)
        np.testing.assert_array_equal(tile["optical_valid"][0] == 0, no_optical)
        wanted = np.where(label == 0, 255, label // 10 - 1)
        np.testing.assert_array_equal(tile["label"], np.where(no_sar & no_optical, 255, wanted))


def test_splits_are_by_scene(whu):
    _, dataset = whu
    scenes = [{name.split("/")[0] for name in dataset.split(s).names} for s in ("train", "val", "test")]
    assert [len(s) for s in scenes] == [2, 1, 1]
    assert not scenes[0] & scenes[1] | scenes[0] & scenes[2] | scenes[1] & scenes[2]


def test_the_official_split():
    from sarjax_datasets.whu_opt_sar.whu_opt_sar_dataset_builder import _official, split_of_scenes

    names = sorted(name.removesuffix(".tif") for name in _official())
    where, problems = split_of_scenes(names)
    assert not problems
    assert counts(where) == [70, 10, 20]
    # A scene's split does not depend on which others could be downloaded.
    assert split_of_scenes(names[::3])[0] == {name: where[name] for name in names[::3]}
    official, _ = split_of_scenes(names, validation=False)
    assert counts(official) == [80, 0, 20]
    assert {n for n in names if official[n] == "test"} == {n for n in names if where[n] == "test"}


@pytest.mark.parametrize(("scenes", "wanted"), [(3, [1, 1, 1]), (10, [7, 1, 2]), (40, [28, 4, 8])])
def test_the_split_of_other_scenes(scenes, wanted):
    from sarjax_datasets.whu_opt_sar.whu_opt_sar_dataset_builder import split_of_scenes

    where, problems = split_of_scenes([f"{i}" for i in range(scenes)])
    assert not problems
    assert counts(where) == wanted
    train, val, test = wanted
    assert counts(split_of_scenes([f"{i}" for i in range(scenes)], validation=False)[0]) == [train + val, 0, test]


def test_a_second_date_that_is_not_read_is_mentioned(tmp_path):
    fake_data.write_whu(tmp_path / "s", names=("a.tif", "b.tif", "c.tif"), size=(256, 256), dates=2)
    said = []
    build("whu_opt_sar", tmp_path / "s", tmp_path / "o", say=said.append)
    assert said == [f"{tmp_path / 's'} holds a second date, which this build leaves out: --config dates2 reads both."]
    said.clear()
    build("whu_opt_sar", tmp_path / "s", tmp_path / "o", config="dates2", say=said.append)
    assert said == []


def test_the_release_of_2022_and_two_dates(tmp_path):
    files = fake_data.write_whu(tmp_path / "s", names=("a.tif", "b.tif", "c.tif"), size=(256, 300), dates=2)
    (tmp_path / "s" / "optical").rename(tmp_path / "s" / "image")
    dataset = open_directory(build("whu_opt_sar", tmp_path / "s", tmp_path / "o", config="dates2"))
    tile = dataset.split("train")[0]
    assert dataset.spec.dates == 2
    np.testing.assert_array_equal(tile["optical"], files["a.tif"].optical[:, :256])
    last = files["a.tif"].label[1, :256]
    ok = tile["optical_valid"].any(0) & (last > 0)
    np.testing.assert_array_equal(tile["label"][ok], last[ok] // 10 - 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: shutil.rmtree(s / "lbl"), "lbl is missing: the source holds optical/ or image/, sar/ and lbl/"),
        (
            lambda s: fake_data.write_tiff(s / "sar" / "b.tif", np.ones((300, 260), np.uint8)),
            "sar/b.tif is 260 x 300 pixels, but .*optical/b.tif is 261 x 300: they must agree",
        ),
        (
            lambda s: fake_data.write_tiff(s / "lbl" / "c.tif", np.full((300, 261), 80, np.uint8)),
            "lbl/c.tif holds the label 80: labels are 0, 10,",
        ),
        (
            lambda s: fake_data.write_tiff(s / "optical" / "c.tif", np.ones((300, 261, 3), np.uint8)),
            "optical/c.tif has 3 bands, but 4 of optical are expected: blue, green, red, nir",
        ),
        (
            lambda s: fake_data.write_tiff(s / "sar" / "c.tif", np.ones((300, 261), np.uint16)),
            "sar/c.tif holds uint16, but uint8 is expected for sar",
        ),
        (lambda s: [(s / f / "c.tif").unlink() for f in ("optical", "sar", "lbl")], "at least 3 are needed"),
        (
            lambda s: [p.unlink() for p in (s / "optical").iterdir()],
            "optical holds no scene of which all files are",
        ),
        (lambda s: [p.unlink() for p in s.rglob("*.tif")], "optical holds no scene: files like NH49E001013.tif"),
        (
            lambda s: (s / "sar" / "a.tif").write_bytes((s / "sar" / "a.tif").read_bytes()[:40_000]),
            "a.tif cannot be read",
        ),
        (
            lambda s: [(s / f / "a.tif").rename(s / f / "NH49E001014.tif") for f in ("optical", "sar", "lbl")],
            "b is no scene of WHU-OPT-SAR while NH49E001014 is one",
        ),
    ],
)
def test_a_bad_source_is_named(tmp_path, damage, message):
    source = tmp_path / "source"
    fake_data.write_whu(source, names=("a.tif", "b.tif", "c.tif"), size=(261, 300))
    damage(source)
    with pytest.raises(UserError, match=message) as e:
        build("whu_opt_sar", source, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not any((tmp_path / "out").iterdir())


def test_a_scene_smaller_than_a_tile(tmp_path):
    fake_data.write_whu(tmp_path / "s", size=(300, 255))
    with pytest.raises(UserError, match="is 300 x 255 pixels, smaller than a tile of 256"):
        build("whu_opt_sar", tmp_path / "s", tmp_path / "out")


def test_it_builds_from_what_is_there(tmp_path):
    files = fake_data.write_whu_official(tmp_path / "s")
    said = []
    dataset = open_directory(build("whu_opt_sar", tmp_path / "s", tmp_path / "o", say=said.append))
    scenes = {s: sorted({n.split("/")[0] + ".tif" for n in dataset.split(s).names}) for s in dataset.splits}
    assert scenes == {split: sorted(names) for split, names in fake_data.WHU_OFFICIAL.items()}
    assert {scene.sar.shape[2] for scene in files.values()} == {599, 600}
    assert said[0].endswith("sar/NH49E004021.tif is missing: scene NH49E004021 is left out.")
    assert "lacks 93 of the 100 published scenes: NH49E002012, NH49E002016, " in said[1]
    assert said[1].endswith(" and 83 more.")
    assert len(said) == 2


def test_only_the_train_split_has_to_hold_something(tmp_path):
    fake_data.write_whu(tmp_path / "s", names=fake_data.WHU_OFFICIAL["test"], size=(256, 256))
    with pytest.raises(UserError, match="the train split of whu_opt_sar is empty: add training data"):
        build("whu_opt_sar", tmp_path / "s", tmp_path / "o")
    assert not any((tmp_path / "o").iterdir())


def test_water_is_wetter_than_the_rest_only_where_labels_fit(whu):
    _, dataset = whu
    layout = builder_class("whu_opt_sar").layout
    water = layout(dataset.directory).water
    assert [dataset.spec.modality(water.modality).bands[i].name for i in (water.green, water.nir)] == [
        "green",
        "nir",
    ]
    assert dataset.spec.class_names[water.water] == "water"
    for shift, low, high in ((0, 0.15, 1.0), (40, -0.05, 0.05)):
        differences = []
        for tile in dataset.split("train"):
            image = tile["optical"][0].astype(np.float64)
            index = (image[..., 1] - image[..., 3]) / np.maximum(image[..., 1] + image[..., 3], 1)
            wet = np.roll(tile["label"], shift, (0, 1)) == water.water
            differences.append(index[wet].mean() - index[~wet].mean())
        assert low < np.mean(differences) < high


@pytest.mark.parametrize(
    ("config", "tile", "wanted", "last"),
    [
        ("scene", 256, 29_400, ("r03328c05120", 70 * 294, 10 * 294, 20 * 294)),
        ("scene_official", 256, 29_400, ("r03328c05120", 80 * 294, 0, 20 * 294)),
        ("scene_512", 512, 8_800, ("r03192c05043", 70 * 88, 10 * 88, 20 * 88)),
        ("scene_official_512", 512, 8_800, ("r03192c05043", 80 * 88, 0, 20 * 88)),
    ],
)
def test_the_tiles_of_all_scenes(config, tile, wanted, last):
    layout, sizes = complete(config)
    plan = rows.plan(layout, sizes)
    tiles = {split: [t for row in jobs for t in row.tiles] for split, jobs in plan.items()}
    every = [t for split in tiles.values() for t in split]
    assert layout.tile == tile
    assert len(every) == wanted == len({t.name for t in every}) == len({t.id for t in every})
    assert [len(tiles[s]) for s in ("train", "val", "test")] == list(last[1:])
    assert max(t.name.split("/")[1] for t in every if t.name.startswith("NH49E001013")) == last[0]
    # A row of tiles is as much as is read at a time.
    assert all(len({t.name[:18] for t in row.tiles}) == 1 for jobs in plan.values() for row in jobs)


@pytest.mark.parametrize("config", sorted(c.name for c in builder_class("whu_opt_sar").BUILDER_CONFIGS))
def test_no_two_tiles_have_one_id_or_name(config):
    every = [t for jobs in rows.plan(*complete(config)).values() for row in jobs for t in row.tiles]
    assert len(every) == len({t.id for t in every}) == len({t.name for t in every}) >= 8_800
    assert sorted(t.id for t in every) == list(range(len(every)))


def test_tiles_drawn_at_random():
    layout, sizes = complete("random_tile")
    where = {t.name: s for s, jobs in rows.plan(layout, sizes).items() for row in jobs for t in row.tiles}
    assert len(where) == 29_400
    shares = [list(where.values()).count(split) / 29_400 for split in ("train", "val", "test")]
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.2], atol=0.01)
    # A tile's split is its own, whichever scenes there are; one scene has tiles of all splits.
    part = dataclasses.replace(layout, scenes=layout.scenes[40:43])
    few = {t.name: s for s, jobs in rows.plan(part, sizes[:3]).items() for row in jobs for t in row.tiles}
    assert few == {name: where[name] for name in few}
    assert len(set(few.values())) == 3
    assert where["NH49E001013/r00000c00000"] == "test"
    assert where["NH49E001013/r00256c00000"] == "train"


def test_random_tiles_say_that_they_leak(tmp_path):
    fake_data.write_whu(tmp_path / "s", names=("a.tif",), size=(256 * 5, 256))
    said = []
    dataset = open_directory(build("whu_opt_sar", tmp_path / "s", tmp_path / "o", "random_tile", say=said.append))
    assert sum(dataset.statistics.tiles.values()) == 5
    assert len(said) == 1
    assert "scores will be too high" in said[0]
    config = next(c for c in builder_class("whu_opt_sar").BUILDER_CONFIGS if c.name == "random_tile")
    assert "neighbours of test tiles are trained on" in config.description


def test_tiles_of_512_cover_the_scene(tmp_path):
    files = fake_data.write_whu(tmp_path / "s", names=("a.tif", "b.tif", "c.tif"), size=(600, 530))
    dataset = open_directory(build("whu_opt_sar", tmp_path / "s", tmp_path / "o", "scene_512"))
    split = dataset.split("train")
    assert split.names == ("a/r00000c00000", "a/r00000c00088", "a/r00018c00000", "a/r00018c00088")
    np.testing.assert_array_equal(split[3]["optical"][0], files["a.tif"].optical[0, 18:, 88:])


def test_a_gap_is_found_across_the_border_of_tiles(tmp_path):
    scenes = fake_data.write_whu(tmp_path / "s", names=("a.tif", "b.tif", "c.tif"), size=(512, 256))
    sar = scenes["a.tif"].sar[0]
    sar[100:108, 251:259] = 0  # 64 pixels, 40 of them in the first tile
    sar[150:157, 252:261] = 0  # 63
    fake_data.write_tiff(tmp_path / "s" / "sar" / "a.tif", sar)
    tiles = open_directory(build("whu_opt_sar", tmp_path / "s", tmp_path / "o")).split("train")
    seen = np.concatenate([tiles[0]["sar_valid"][0], tiles[1]["sar_valid"][0]], 1)
    assert not seen[100:108, 251:259].any()
    assert seen[150:157, 252:261].all()


@pytest.mark.parametrize("names", [("NH49E001013", "NH49E001014.tif"), ("NH49E001013.tif", "NH49E001014")])
def test_scenes_are_left_out(tmp_path, names):
    fake_data.write_whu_official(tmp_path / "s", (256, 256))
    layout = builder_class("whu_opt_sar").layout(tmp_path / "s", options=Options((*names, "NH50E016002")))
    assert [scene.name for scene in layout.scenes] == ["NH49E001017", "NH49E002014", "NH49E004013", "NH49E006011"]
    assert "NH50E016002" not in layout.splits


def test_an_incomplete_scene_is_left_out(tmp_path):
    fake_data.write_whu(tmp_path / "s", names=("a.tif", "b.tif", "c.tif", "d.tif"), size=(256, 256))
    (tmp_path / "s" / "lbl" / "b.tif").unlink()
    layout = builder_class("whu_opt_sar").layout(tmp_path / "s", options=Options(("b",)))
    assert [scene.name for scene in layout.scenes] == ["a", "c", "d"]


def test_a_scene_to_exclude_that_is_unknown(tmp_path):
    fake_data.write_whu_official(tmp_path / "s", (256, 256))
    with pytest.raises(UserError, match="unknown scene to exclude 'NH49E00101': did you mean 'NH49E00101"):
        build("whu_opt_sar", tmp_path / "s", tmp_path / "o", options=Options(("NH49E00101",)))


def test_a_layout_of_nothing_raises_nothing(tmp_path):
    for name in ("whu_opt_sar", "ombria"):
        layout = builder_class(name).layout(tmp_path)
        assert layout.scenes == ()
        assert {p.severity for p in layout.problems} == {"fatal"}
        assert not set(layout.splits)
