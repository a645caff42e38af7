"""The builders, run for real on fake files in the real formats: arrays come back equal, bad sources in one sentence."""

import shutil

import fake_data
import numpy as np
import pytest
from PIL import Image

from sarjax.data.build import build, builder_class, builders
from sarjax.errors import UserError
from sarjax.spec import IGNORE_LABEL


def all_tiles(dataset):
    return [
        (split, reader.name(i), reader[i])
        for split in dataset.splits
        for reader in [dataset.split(split)]
        for i in range(len(reader))
    ]


def damaged(source, path):
    """`path` under `source`, which must be there."""
    assert (source / path).exists()
    return source / path


class TestEveryBuilder:
    def test_folders_are_found(self):
        assert set(builders()) >= {"ombria", "whu_opt_sar"}

    @pytest.mark.parametrize("name", sorted(builders()))
    def test_it_declares_its_spec(self, name):
        cls = builder_class(name)
        for config in [c.name for c in cls.BUILDER_CONFIGS] or [""]:
            spec = cls.spec_of(config)
            assert spec.name == cls.name == name
            assert 2 <= spec.num_classes < IGNORE_LABEL
            assert spec.from_json(spec.to_json()) == spec

    def test_ids_are_unique_and_no_tile_is_in_two_splits(self, ombria, whu):
        for _, dataset in (ombria, whu):
            tiles = all_tiles(dataset)
            assert len({int(t["id"]) for _, _, t in tiles}) == len({name for _, name, _ in tiles}) == len(tiles)

    def test_no_data_is_zero_and_unseen_pixels_are_ignored(self, ombria, whu):
        for _, dataset in (ombria, whu):
            for _, _, tile in all_tiles(dataset):
                seen = np.zeros(tile["label"].shape, bool)
                for m in dataset.spec.modality_names:
                    assert set(np.unique(tile[f"{m}_valid"])) <= {0, 1}
                    assert not tile[m][tile[f"{m}_valid"] == 0].any()
                    seen |= tile[f"{m}_valid"].any(0)
                assert (tile["label"][~seen] == IGNORE_LABEL).all()

    def test_a_nan_is_no_data(self):
        from sarjax_datasets.builder import example

        from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec

        bands = (BandSpec("VV", "db"), BandSpec("VH", "db"))
        classes = (ClassSpec("a", (0, 0, 0)), ClassSpec("b", (1, 1, 1)))
        spec = DatasetSpec("x", (ModalitySpec("sar", bands, "float32"),), classes)
        image = np.full((1, 2, 2, 2), -12.5, np.float32)
        image[0, 0, 1, 1] = np.nan
        label = np.ones((2, 2), np.uint8)
        tile = example(spec, 7, "t", {"sar": image}, {"sar": np.ones((1, 2, 2), bool)}, label)
        assert tile["sar"].dtype == np.float32
        assert tile["sar"][0, 0, 1].tolist() == [0, 0]
        assert tile["sar_valid"][0].tolist() == [[1, 0], [1, 1]]
        assert tile["label"].tolist() == [[1, IGNORE_LABEL], [1, 1]]

    def test_a_pixel_seen_once_keeps_its_label(self):
        from sarjax_datasets.builder import example
        from sarjax_datasets.ombria.ombria_dataset_builder import SPEC

        images = {m.name: np.full((2, 1, 3, len(m.bands)), 9, np.uint8) for m in SPEC.modalities}
        valid = {m.name: np.zeros((2, 1, 3), bool) for m in SPEC.modalities}
        valid["sar"][1, 0, 0] = valid["optical"][0, 0, 1] = True
        tile = example(SPEC, 1, "t", images, valid, np.ones((1, 3), np.uint8))
        assert tile["label"].tolist() == [[1, 1, IGNORE_LABEL]]
        assert tile["sar"].sum() == 9
        assert tile["optical"].sum() == 27


class TestOmbria:
    def test_every_tile_comes_back(self, ombria):
        files, dataset = ombria
        tiles = all_tiles(dataset)
        assert sorted(name.split("/")[1] for _, name, _ in tiles) == sorted(files)
        for _, name, tile in tiles:
            file = files[name.split("/")[1]]
            assert int(tile["id"]) == int(name.split("/")[1])
            np.testing.assert_array_equal(tile["sar_valid"], ~file.no_sar)
            np.testing.assert_array_equal(tile["optical_valid"], ~file.no_optical)
            np.testing.assert_array_equal(tile["sar"][..., 0], np.where(file.no_sar, 0, file.sar))
            np.testing.assert_array_equal(tile["optical"], file.optical)
            unseen = (file.no_sar & file.no_optical).all(0)
            np.testing.assert_array_equal(tile["label"], np.where(unseen, 255, file.mask // 255))

    def test_splits(self, ombria):
        _, dataset = ombria
        names = {split: dataset.split(split).names for split in dataset.splits}
        assert names == {
            "train": tuple(f"train/{n}" for n in ("0001", "0002", "0005", "0011", "0014", "0019")),
            "val": ("train/0003", "train/0020"),
            "test": ("test/0013", "test/0018"),
        }

    def test_a_tile_keeps_its_split_whatever_else_is_there(self):
        from sarjax_datasets.ombria.ombria_dataset_builder import in_validation

        numbers = [f"{n:04d}" for n in range(1, 786)]
        assert 0.14 < np.mean([in_validation(n) for n in numbers]) < 0.19

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda s: shutil.rmtree(damaged(s, "OmbriaS2")), "has no folder OmbriaS2: .*holds OmbriaS1 and OmbriaS2"),
            (
                lambda s: damaged(s, "OmbriaS2/train/AFTER/S2_after_0002.png").unlink(),
                "S2_after_0002.png is missing while other images of tile 0002 are there",
            ),
            (
                lambda s: shutil.rmtree(damaged(s, "OmbriaS1/test/MASK")),
                "OmbriaS1/test/MASK is missing: .*S1_mask_NNNN",
            ),
            (
                lambda s: damaged(s, "OmbriaS1/train/BEFORE/S1_before_0001.png").write_bytes(b""),
                r"S1_before_0001.png is empty \(0 bytes\)",
            ),
            (
                lambda s: damaged(s, p := "OmbriaS1/train/BEFORE/S1_before_0001.png").write_bytes(
                    (s / p).read_bytes()[:9000]
                ),
                "S1_before_0001.png cannot be read: it is truncated",
            ),
            (
                lambda s: Image.new("L", (256, 255)).save(damaged(s, "OmbriaS1/train/AFTER/S1_after_0001.png")),
                "S1_after_0001.png is 256 x 255 with 1 bands of uint8, but 256 x 256 with 1",
            ),
            (
                lambda s: Image.new("L", (256, 256), 7).save(damaged(s, "OmbriaS1/train/MASK/S1_mask_0001.png")),
                r"S1_mask_0001.png holds the value 7: masks of OMBRIA are 0 \(dry\) and 255 \(flood\) only",
            ),
        ],
    )
    def test_a_bad_source_is_named(self, tmp_path, ombria_source, damage, message):
        damage(ombria_source)
        with pytest.raises(UserError, match=message) as e:
            build("ombria", ombria_source, tmp_path / "out")
        assert "\n" not in str(e.value)
        assert not any((tmp_path / "out").iterdir())

    def test_a_saturated_pixel_is_real_and_a_stripe_is_not(self):
        from sarjax_datasets.ombria.ombria_dataset_builder import stripes

        image = np.zeros((256, 256), np.uint8)
        image[0, 10:16] = 255  # six real echoes at the border: the most in the real images
        image[100:110, 100:110] = 255  # a bright town, off the border
        assert not stripes(image).any()
        image[:, 0] = 255
        assert stripes(image).sum() == 256

    def test_the_real_images(self, shared_data):
        from sarjax_datasets.ombria.ombria_dataset_builder import stripes

        from sarjax import raster

        paths = sorted((shared_data / "ombria" / "OmbriaS1" / "test").glob("[AB]*/*.png"))
        images = [raster.read(p)[..., 0] for p in paths]
        assert len(images) == 140
        no_data = np.stack([stripes(image) for image in images])
        saturated = np.stack([image == 255 for image in images])
        assert 0.001 < no_data.mean() < 0.01
        # What remains at 255 is a handful of echoes per image.
        assert (saturated & ~no_data).sum((1, 2)).max() < 20
        assert (saturated.sum((1, 2)) > 0).all()


class TestWhuOptSar:
    def test_every_tile_comes_back(self, whu):
        files, dataset = whu
        tiles = all_tiles(dataset)
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

    def test_splits_are_by_scene(self, whu):
        _, dataset = whu
        scenes = [{name.split("/")[0] for name in dataset.split(s).names} for s in ("train", "val", "test")]
        assert [len(s) for s in scenes] == [2, 1, 1]
        assert not scenes[0] & scenes[1] | scenes[0] & scenes[2] | scenes[1] & scenes[2]

    def test_the_official_split(self):
        from sarjax_datasets.whu_opt_sar.whu_opt_sar_dataset_builder import _official, split_of_scenes

        names = sorted(_official())
        where = split_of_scenes(names)
        assert [sum(s == split for s in where.values()) for split in ("train", "val", "test")] == [70, 10, 20]
        # A scene's split does not depend on which others could be downloaded.
        assert split_of_scenes(names[::3]) == {name: where[name] for name in names[::3]}

    @pytest.mark.parametrize(("scenes", "wanted"), [(3, [1, 1, 1]), (10, [7, 1, 2]), (40, [28, 4, 8])])
    def test_the_split_of_other_scenes(self, scenes, wanted):
        from sarjax_datasets.whu_opt_sar.whu_opt_sar_dataset_builder import split_of_scenes

        where = split_of_scenes([f"{i}.tif" for i in range(scenes)])
        assert [sum(s == split for s in where.values()) for split in ("train", "val", "test")] == wanted

    def test_a_second_date_that_is_not_read_is_mentioned(self, tmp_path):
        fake_data.write_whu(tmp_path / "s", names=("a.tif", "b.tif", "c.tif"), size=(256, 256), dates=2)
        said = []
        build("whu_opt_sar", tmp_path / "s", tmp_path / "o", say=said.append)
        assert said == [
            f"{tmp_path / 's'} holds a second date, which this build leaves out: --config dates2 reads both."
        ]
        said.clear()
        build("whu_opt_sar", tmp_path / "s", tmp_path / "o", config="dates2", say=said.append)
        assert said == []

    def test_the_release_of_2022_and_two_dates(self, tmp_path):
        files = fake_data.write_whu(tmp_path / "s", names=("a.tif", "b.tif", "c.tif"), size=(256, 300), dates=2)
        (tmp_path / "s" / "optical").rename(tmp_path / "s" / "image")
        from sarjax.data.store import open_directory

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
            (lambda s: shutil.rmtree(s / "lbl"), "lbl is missing: the source holds optical/, sar/ and lbl/"),
            (lambda s: (s / "sar" / "b.tif").unlink(), "sar/b.tif is missing while .*optical/b.tif is there"),
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
                "optical/c.tif has 3 bands, but 4 are expected",
            ),
            (lambda s: [(s / f / "c.tif").unlink() for f in ("optical", "sar", "lbl")], "at least 3 are needed"),
            (lambda s: [p.unlink() for p in (s / "optical").iterdir()], "optical holds no scene"),
            (
                lambda s: (s / "sar" / "a.tif").write_bytes((s / "sar" / "a.tif").read_bytes()[:40_000]),
                "a.tif cannot be read",
            ),
            (
                lambda s: [(s / f / "a.tif").rename(s / f / "NH49E001014.tif") for f in ("optical", "sar", "lbl")],
                "b.tif is no scene of WHU-OPT-SAR while NH49E001014.tif is one",
            ),
        ],
    )
    def test_a_bad_source_is_named(self, tmp_path, damage, message):
        source = tmp_path / "source"
        fake_data.write_whu(source, names=("a.tif", "b.tif", "c.tif"), size=(261, 300))
        damage(source)
        with pytest.raises(UserError, match=message) as e:
            build("whu_opt_sar", source, tmp_path / "out")
        assert "\n" not in str(e.value)
        assert not any((tmp_path / "out").iterdir())

    def test_a_scene_smaller_than_a_tile(self, tmp_path):
        fake_data.write_whu(tmp_path / "s", size=(300, 255))
        with pytest.raises(UserError, match="is 300 x 255 pixels, smaller than a tile of 256"):
            build("whu_opt_sar", tmp_path / "s", tmp_path / "out")
