"""Everything in a row moves together, nothing is invented, and a row's draw depends on the row alone."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augment.fake_batch import make_batch

from sarjax.augment.geometry import View, apply_view, draw_view
from sarjax.augment.geometry import geometry as geometry_eager
from sarjax.config import Augment

geometry = jax.jit(geometry_eager, static_argnames="options")
OFF = {"flip": False, "rotate": False}


def coordinates(b, t, h, w):
    """A batch whose images, labels and hidden labels all name the pixel that they come from."""
    batch = make_batch(b, t, h, w)
    place = np.arange(h * w).reshape(h, w)
    for name in ("sar", "optical"):
        batch[name] = np.broadcast_to(place[None, None, ..., None], (b, t, h, w, 2)).astype(np.uint16)
        batch[f"{name}_valid"] = np.broadcast_to(place % 7 > 0, (b, t, h, w)).astype(np.uint8)
    batch["label"] = batch["hidden_label"] = np.broadcast_to(place % 251, (b, h, w)).astype(np.uint8)
    return batch


def same(a, b):
    return {name: np.array_equal(a[name], b[name]) for name in a}


def test_identity_is_bit_identity(batch, key):
    out = geometry_eager(batch, key, Augment(**OFF))
    assert all(out[name] is batch[name] for name in batch)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("options", [Augment(), Augment(crop=8, scale=0.5, swap_dates=True)])
def test_dtypes_and_untouched_keys(dtype, options, key):
    batch = make_batch(4, dtype=dtype)
    out = geometry(batch, key, options=options)
    assert {n: a.dtype for n, a in out.items()} == {n: a.dtype for n, a in batch.items()}
    assert all(np.array_equal(out[n], batch[n]) for n in ("id", "row", "row_valid"))


@pytest.mark.parametrize(("shape", "symmetries"), [((6, 6), 8), ((4, 6), 4)])
def test_every_symmetry_is_drawn_about_equally_often(shape, symmetries, key):
    batch = coordinates(160, 1, *shape)
    out = geometry(batch, key, options=Augment())
    seen = Counter(np.asarray(row).tobytes() for row in out["label"])
    assert len(seen) == symmetries
    assert min(seen.values()) > 160 / symmetries / 3


@pytest.mark.parametrize(
    ("options", "symmetries"),
    [(Augment(flip=True, rotate=False), 4), (Augment(flip=False, rotate=True), 4), (Augment(**OFF, crop=6), 1)],
)
def test_subgroups(options, symmetries, key):
    batch = coordinates(80, 1, 6, 6)
    out = geometry(batch, key, options=options)
    assert len({np.asarray(row).tobytes() for row in out["label"]}) == symmetries
    if options.rotate:
        turned = {np.rot90(batch["label"][0], k).tobytes() for k in range(4)}
        assert {np.asarray(row).tobytes() for row in out["label"]} == turned


def test_a_tile_that_is_not_square_turns_by_180_degrees_only(key):
    batch = coordinates(40, 1, 4, 6)
    out = geometry(batch, key, options=Augment(flip=False, rotate=True))
    allowed = {batch["label"][0].tobytes(), np.rot90(batch["label"][0], 2).tobytes()}
    assert {np.asarray(row).tobytes() for row in out["label"]} == allowed
    square = geometry(batch, key, options=Augment(flip=False, rotate=True, crop=3))
    assert square["label"].shape == (40, 3, 3)
    steps = {int(row[0, 1]) - int(row[0, 0]) for row in np.asarray(square["label"], int)}
    assert steps == {1, -1, 6, -6}


@pytest.mark.parametrize("options", [Augment(), Augment(crop=5), Augment(crop=5, swap_dates=True), Augment(crop=24)])
def test_everything_in_a_row_moves_together(options, key):
    batch = coordinates(32, 2, 12, 16)
    out = {k: np.asarray(v) for k, v in geometry(batch, key, options=options).items()}
    inside = out["label"] != 255
    place = out["sar"][:, 0, :, :, 0].astype(int)
    assert np.array_equal(out["label"][inside], (place % 251)[inside])
    assert np.array_equal(out["label"], out["hidden_label"])
    for name in ("sar", "optical"):
        assert np.array_equal(out[name], np.broadcast_to(place[:, None, :, :, None], out[name].shape))
        expected = ((place % 7 > 0) & inside)[:, None].repeat(2, axis=1)
        assert np.array_equal(out[f"{name}_valid"] > 0, expected)


def test_crops_reach_every_corner_and_stay_inside(key):
    batch = coordinates(200, 1, 6, 8)
    out = np.asarray(geometry(batch, key, options=Augment(**OFF, crop=5))["label"])
    assert (out != 255).all()
    assert {int(row[0, 0]) for row in out} == {y * 8 + x for y in range(2) for x in range(4)}


def test_a_view_larger_than_the_tile_is_filled_with_no_data(key):
    batch = make_batch(6, h=8, w=8)
    out = geometry(batch, key, options=Augment(**OFF, crop=12))
    for row in range(1, 6):
        # label 255 at one pixel of the tile itself
        assert np.sum(np.asarray(out["label"][row]) == 255) == 144 - 64 + 1
        assert np.sum(np.asarray(out["hidden_label"][row]) == 255) == 144 - 64
        assert np.sum(out["sar_valid"][row]) == np.sum(batch["sar_valid"][row])
        assert np.sum(np.asarray(out["sar"][row], int)) == np.sum(batch["sar"][row].astype(int))


def test_swapped_dates_are_swapped_everywhere(key):
    batch = make_batch(64)
    out = geometry(batch, key, options=Augment(**OFF, swap_dates=True))
    swapped = 0
    for row in range(3, 64):
        order = [1, 0] if np.array_equal(out["sar"][row], batch["sar"][row][::-1]) else [0, 1]
        swapped += order == [1, 0]
        for name in ("sar", "optical", "sar_valid", "optical_valid"):
            assert np.array_equal(out[name][row], batch[name][row][order])
    assert 15 < swapped < 46
    assert np.array_equal(out["label"], batch["label"])


def view(factor, y0, x0, rows, columns, h, w):
    y = y0 + (jnp.arange(rows) + 0.5) / factor - 0.5
    return View(y, x0 + (jnp.arange(columns) + 0.5) / factor - 0.5, *[jnp.bool_(False)] * 4)


def test_scaling_against_a_direct_computation(batch):
    """Four weighted neighbours, pixel by pixel, in float64."""
    row = {k: batch[k][3] for k in ("sar", "sar_valid", "label")}
    v = view(1.37, 2.3, -1.6, 9, 11, 16, 16)
    out = apply_view(row, v, Augment(scale=0.5))
    for i, y in enumerate(np.asarray(v.y, float)):
        for j, x in enumerate(np.asarray(v.x, float)):
            near = int(np.floor(y + 0.5)), int(np.floor(x + 0.5))
            inside = 0 <= near[0] < 16 and 0 <= near[1] < 16
            assert out["label"][i, j] == (row["label"][near] if inside else 255)
            for date in range(2):
                keep = inside and row["sar_valid"][(date, *near)]
                assert out["sar_valid"][date, i, j] == keep
                total, weight = np.zeros(2), 0.0
                for a in (int(np.floor(y)), int(np.floor(y)) + 1):
                    for b in (int(np.floor(x)), int(np.floor(x)) + 1):
                        if 0 <= a < 16 and 0 <= b < 16 and row["sar_valid"][date, a, b]:
                            share = (1 - abs(y - a)) * (1 - abs(x - b))
                            total, weight = total + share * row["sar"][date, a, b], weight + share
                expected = total / weight if keep else np.zeros(2)
                np.testing.assert_allclose(out["sar"][date, i, j], expected, atol=0.5001)


def test_scaled_labels_and_images_stay_aligned(key):
    """An image that is the label: after bilinear and nearest resampling they may differ by half a pixel at edges."""
    b, h = 16, 32
    y, x = np.mgrid[:h, :h]
    discs = np.stack([((y - 10 - r / 2) ** 2 + (x - 14 + r / 3) ** 2 < 40 + 5 * r) for r in range(b)])
    batch = make_batch(b, 1, h, h)
    batch["label"] = discs.astype(np.uint8)
    batch["sar"] = np.broadcast_to(200.0 * discs[:, None, ..., None], (b, 1, h, h, 2)).astype(np.float32)
    batch["sar_valid"] = np.ones((b, 1, h, h), np.uint8)
    out = {k: np.asarray(v) for k, v in geometry(batch, key, options=Augment(scale=0.7)).items()}
    inside = out["label"] != 255
    assert np.array_equal(inside, out["sar_valid"][:, 0] > 0)
    areas = (out["label"] == 1).sum((1, 2)) / discs.sum((1, 2))
    assert areas.min() < 0.7
    assert areas.max() > 1.4
    agreement = (out["sar"][:, 0, :, :, 0] > 100) == (out["label"] == 1)
    assert agreement[inside].mean() > 0.99
    soft = out["sar"][:, 0, :, :, 0] / 200
    for r in range(b):
        total = soft[r].sum()
        centre = [(soft[r] * g).sum() / total for g in (y, x)]
        hard = [((out["label"][r] == 1) * g).sum() / (out["label"][r] == 1).sum() for g in (y, x)]
        np.testing.assert_allclose(centre, hard, atol=0.35)


def test_no_class_is_invented_by_scaling(key):
    batch = make_batch(16)
    batch["label"] = np.where(batch["label"] == 1, 2, batch["label"]).astype(np.uint8)
    out = geometry(batch, key, options=Augment(scale=1.0, crop=12))
    assert set(np.unique(out["label"])) <= {0, 2, 255}
    invalid = np.asarray(out["sar_valid"])[..., None] == 0
    assert not np.any(np.asarray(out["sar"]) * invalid)
    assert not np.any(np.asarray(out["sar"][0]))


def test_what_is_stored_without_data_does_not_bleed_in(key):
    batch = make_batch(8, dtype="float32")
    batch["sar"][:] = 5.0
    poisoned = dict(batch, sar=np.where(batch["sar_valid"][..., None] > 0, batch["sar"], 1e30).astype(np.float32))
    out = geometry(poisoned, key, options=Augment(scale=0.8))
    shown = np.asarray(out["sar"])[np.asarray(out["sar_valid"]) > 0]
    np.testing.assert_allclose(shown, 5.0, rtol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours(batch, key):
    options = Augment(crop=10, scale=0.3, swap_dates=True)
    whole = geometry(batch, key, options=options)
    part = geometry({k: v[[5, 2]] for k, v in batch.items()}, key, options=options)
    assert all(np.array_equal(part[k], np.asarray(whole[k])[[5, 2]]) for k in batch)
    other = geometry(batch, jax.random.key(8), options=options)
    assert not np.array_equal(other["label"], whole["label"])


@pytest.mark.parametrize(("h", "w", "crop"), [(16, 16, 0), (16, 16, 8), (12, 20, 0), (12, 20, 16), (16, 16, 2)])
def test_a_region_lies_inside_the_tile(h, w, crop):
    """Its sides are shares in [region, 1] of the largest part of the view's proportions, and it gets everywhere."""
    options = Augment(crop=crop, region=0.25)
    views = jax.vmap(lambda k: draw_view(k, h, w, options))(jax.random.split(jax.random.key(0), 400))
    rows, columns = (crop, crop) if crop else (h, w)
    fits = max(rows / h, columns / w)
    for coordinates, view, size in ((views.y, rows, h), (views.x, columns, w)):
        coordinates = np.asarray(coordinates, float)
        side = np.abs(coordinates[:, -1] - coordinates[:, 0]) * view / (view - 1)
        shares = side * fits / view
        assert shares.min() == pytest.approx(0.25, abs=0.02)
        assert shares.max() == pytest.approx(1.0, abs=0.02)
        low, high = coordinates.min(1) - side / view / 2, coordinates.max(1) + side / view / 2
        assert low.min() >= -0.5 - 1e-4
        assert high.max() <= size - 0.5 + 1e-4
        assert low.min() < 0.2
        assert high.max() > size - 1.2


def test_a_region_shows_nothing_of_the_outside(key):
    batch = make_batch(16)
    batch["label"] = np.ones_like(batch["label"])
    batch["sar_valid"] = np.ones_like(batch["sar_valid"])
    for crop in (0, 6, 24):
        out = geometry(batch, key, options=Augment(crop=crop, region=0.3))
        assert np.all(np.asarray(out["label"]) == 1)
        assert np.all(np.asarray(out["sar_valid"]) == 1)
        assert out["label"].shape[1:] == ((crop, crop) if crop else batch["label"].shape[1:])


def test_the_whole_region_at_its_own_size_is_the_tile(batch, key):
    out = geometry(batch, key, options=Augment(region=1.0, **OFF))
    seen = {name: batch[name] * batch[f"{name}_valid"][..., None] for name in ("sar", "optical")}
    assert all(same(out, batch | seen).values())
