"""The doctor on every builder's files, in the real formats: what is found is what a build would stumble over."""

import fake_data
import numpy as np
import pytest
from PIL import Image
from toy_scenes import found

from sarjax.data.build import build
from sarjax.data.doctor import run
from sarjax.data.layout import Options
from sarjax.errors import UserError


@pytest.fixture
def whu_source(tmp_path):
    fake_data.write_whu(tmp_path / "whu", size=(300, 280))
    return tmp_path / "whu"


@pytest.fixture
def folder_source(tmp_path):
    """Ten scenes of one's own: radar in decibels with NaN, labels 1 and 2, and no files of splits."""
    source = tmp_path / "own"
    rng = np.random.default_rng(0)
    for i in range(10):
        sar = rng.normal(-12, 3, (64, 64, 2)).astype(np.float32)
        sar[:8] = np.nan
        fake_data.write_tiff(source / "sar" / f"s{i}.tif", sar)
        (source / "label").mkdir(exist_ok=True)
        Image.fromarray(fake_data.blocks(rng, (64, 64), 2).astype(np.uint8) + 1).save(source / "label" / f"s{i}.png")
    classes = '[[class]]\nname = "a"\nvalue = 1\n[[class]]\nname = "b"\nvalue = 2\n'
    (source / "dataset.toml").write_text(f'name = "own"\ntile = 32\n[sar]\nradiometry = "db"\n{classes}')
    return source


def refused(name, source, out, **options):
    """Whether a build stops."""
    try:
        build(name, source, out, **options)
    except UserError:
        return True
    return False


class TestOmbria:
    def test_sound(self, ombria_source, tmp_path):
        report = run("ombria", ombria_source)
        assert not report.problems
        assert report.files == 4 * 5
        assert report.tiles == {"train": 2, "val": 1, "test": 1}
        flood = np.count_nonzero(fake_data.ombria_tile("0013").mask)
        assert report.classes["test"] == (256**2 - flood, flood)
        # Odd numbers have stripes: of the four tiles 0001, 0003 and 0013 do.
        assert report.no_data["sar"] == pytest.approx(3 * 5 / 256 / 4, abs=1e-4)
        assert not refused("ombria", ombria_source, tmp_path / "out")

    def test_all_that_is_wrong(self, ombria_source, tmp_path):
        (ombria_source / "OmbriaS1/train/AFTER/S1_after_0002.png").unlink()
        cut = ombria_source / "OmbriaS2/train/BEFORE/S2_before_0001.png"
        cut.write_bytes(cut.read_bytes()[:5000])
        Image.fromarray(np.zeros((255, 256), np.uint8)).save(ombria_source / "OmbriaS1/test/BEFORE/S1_before_0013.png")
        mask = np.zeros((256, 256), np.uint8)
        mask[0, :5] = 128
        Image.fromarray(mask).save(ombria_source / "OmbriaS1/train/MASK/S1_mask_0003.png")
        report = run("ombria", ombria_source)
        assert found(report) == [
            ("unreadable", "S2_before_0001.png"),
            ("size", "S1_before_0013.png"),
            ("labels", "S1_mask_0003.png"),
            ("missing", "S1_after_0002.png"),
            ("absent class", "val"),
        ]
        assert [p.severity for p in report.problems] == ["fatal"] * 3 + ["warning"] * 2
        assert list(report.unknown.values()) == [{128: 5}]
        assert refused("ombria", ombria_source, tmp_path / "out")

    def test_no_such_source(self, tmp_path):
        with pytest.raises(UserError, match="is not a folder"):
            run("ombria", tmp_path / "gone")
        with pytest.raises(UserError, match="did you mean 'ombria'"):
            run("ombra", tmp_path)
        report = run("ombria", tmp_path)
        assert report.exit_code == 1
        assert {p.kind for p in report.problems} == {"missing"}


class TestWhu:
    @pytest.mark.parametrize("config", ["scene", "random_tile", "scene_official"])
    def test_sound(self, whu_source, config):
        report = run("whu_opt_sar", whu_source, config)
        assert not report.problems
        assert sum(report.tiles.values()) == 4
        assert report.files == 12
        assert all(contrast > 0.18 for (contrast,) in report.ndwi.values())

    def test_two_dates(self, tmp_path):
        fake_data.write_whu(tmp_path, size=(256, 256), dates=2)
        report = run("whu_opt_sar", tmp_path, "dates2")
        assert report.files == 4 * 5
        assert {len(by_date) for by_date in report.ndwi.values()} == {2}

    def test_all_that_is_wrong(self, whu_source, tmp_path):
        names = fake_data.WHU_NAMES
        label = fake_data.whu_scene(names[0], (300, 280)).label[0]
        label[label == 30] = 35
        fake_data.write_tiff(whu_source / "lbl" / names[0], label)
        (whu_source / "sar" / names[1]).write_bytes(b"")
        label = fake_data.whu_scene(names[2], (300, 280)).label[0]
        fake_data.write_tiff(whu_source / "lbl" / names[2], np.roll(label, (100, 100), (0, 1)))
        optical = whu_source / "optical" / names[3]
        optical.write_bytes(optical.read_bytes()[: optical.stat().st_size // 2])
        report = run("whu_opt_sar", whu_source)
        assert found(report) == [
            ("unreadable", names[3]), ("unreadable", names[1]), ("labels", names[0]), ("alignment", names[2][:-4]),
        ]  # fmt: skip
        wrong = int((fake_data.whu_scene(names[0], (300, 280)).label[0] == 30).sum())
        assert list(report.unknown.values()) == [{35: wrong}]
        assert refused("whu_opt_sar", whu_source, tmp_path / "out")

    def test_bad_scenes_may_be_left_out(self, whu_source):
        (whu_source / "sar" / fake_data.WHU_NAMES[1]).write_bytes(b"")
        assert run("whu_opt_sar", whu_source).fatal
        report = run("whu_opt_sar", whu_source, options=Options(exclude=(fake_data.WHU_NAMES[1],)))
        assert not report.problems

    def test_too_few_scenes_are_read_all_the_same(self, tmp_path):
        fake_data.write_whu(tmp_path, names=fake_data.WHU_NAMES[:2], size=(256, 256))
        (tmp_path / "lbl" / fake_data.WHU_NAMES[0]).write_bytes(b"")
        kinds = [p.kind for p in run("whu_opt_sar", tmp_path).problems]
        assert kinds == ["unreadable", "split"]

    def test_an_unknown_configuration(self, whu_source):
        with pytest.raises(UserError, match="did you mean 'scene'"):
            run("whu_opt_sar", whu_source, "scen")


class TestPairedFolder:
    def test_sound(self, folder_source, tmp_path):
        report = run("paired_folder", folder_source)
        assert not report.problems
        assert report.dataset == "own"
        assert report.tiles == {"train": 28, "val": 4, "test": 8}
        assert report.no_data == {"sar": pytest.approx(1 / 8)}
        assert not refused("paired_folder", folder_source, tmp_path / "out")

    def test_all_that_is_wrong(self, folder_source, tmp_path):
        (folder_source / "label" / "s3.png").unlink()
        path = folder_source / "sar" / "s4.tif"
        path.write_bytes(path.read_bytes()[:-100])
        Image.fromarray(np.full((64, 64), 9, np.uint8)).save(folder_source / "label" / "s5.png")
        fake_data.write_tiff(folder_source / "sar" / "s6.tif", np.ones((64, 64, 2), np.uint16))
        fake_data.write_tiff(folder_source / "sar" / "s7.tif", np.full((64, 64, 2), np.nan, np.float32))
        report = run("paired_folder", folder_source)
        assert found(report) == [
            ("unreadable", "s4.tif"), ("dtype", "s6.tif"), ("labels", "s5.png"), ("missing", "s3.*"), ("no-data", "s7"),
        ]  # fmt: skip
        assert [p.severity for p in report.problems] == ["fatal"] * 3 + ["warning"] * 2
        assert report.empty_tiles == {"s7": 4}
        assert refused("paired_folder", folder_source, tmp_path / "out")
