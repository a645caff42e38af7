"""What holds of every builder: specs, ids, and the house rules of no data."""

import fake_data
import numpy as np
import pytest

from sarjax.data.build import builder_class, builders
from sarjax.spec import IGNORE_LABEL


def test_folders_are_found():
    assert set(builders()) >= {"ombria", "whu_opt_sar"}


@pytest.mark.parametrize("name", sorted(set(builders()) - {"paired_folder"}))  # whose user declares it
def test_it_declares_its_spec(name):
    cls = builder_class(name)
    for config in [c.name for c in cls.BUILDER_CONFIGS] or [""]:
        spec = cls.spec_of(config)
        assert spec.name == cls.name == name
        assert 2 <= spec.num_classes < IGNORE_LABEL
        assert spec.from_json(spec.to_json()) == spec


def test_ids_are_unique_and_no_tile_is_in_two_splits(ombria, whu):
    for _, dataset in (ombria, whu):
        tiles = fake_data.all_tiles(dataset)
        assert len({int(t["id"]) for _, _, t in tiles}) == len({name for _, name, _ in tiles}) == len(tiles)


def test_no_data_is_zero_and_unseen_pixels_are_ignored(ombria, whu):
    for _, dataset in (ombria, whu):
        for _, _, tile in fake_data.all_tiles(dataset):
            seen = np.zeros(tile["label"].shape, bool)
            for m in dataset.spec.modality_names:
                assert set(np.unique(tile[f"{m}_valid"])) <= {0, 1}
                assert not tile[m][tile[f"{m}_valid"] == 0].any()
                seen |= tile[f"{m}_valid"].any(0)
            assert (tile["label"][~seen] == IGNORE_LABEL).all()


def test_a_nan_is_no_data():
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


def test_a_pixel_seen_once_keeps_its_label():
    from sarjax_datasets.builder import example
    from sarjax_datasets.ombria.ombria_dataset_builder import SPEC

    images = {m.name: np.full((2, 1, 3, len(m.bands)), 9, np.uint8) for m in SPEC.modalities}
    valid = {m.name: np.zeros((2, 1, 3), bool) for m in SPEC.modalities}
    valid["sar"][1, 0, 0] = valid["optical"][0, 0, 1] = True
    tile = example(SPEC, 1, "t", images, valid, np.ones((1, 3), np.uint8))
    assert tile["label"].tolist() == [[1, 1, IGNORE_LABEL]]
    assert tile["sar"].sum() == 9
    assert tile["optical"].sum() == 27
