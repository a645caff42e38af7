"""Tiny data sets in the real on-disk formats, written without sarjax's raster code: they test the real readers."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

SIDE = 256
# 0003 and 0020 go to val, by their crc32; 0013 and 0018 are test tiles, in the real set too.
OMBRIA_TRAIN = ("0001", "0002", "0003", "0005", "0011", "0014", "0019", "0020")
OMBRIA_TEST = ("0013", "0018")
# Published names, some of each split; the first is a pixel narrower than the others, as eleven of the originals are.
WHU_OFFICIAL = {
    "train": ("NH49E001013.tif", "NH49E002014.tif", "NH49E004013.tif"),
    "val": ("NH49E006011.tif",),
    "test": ("NH49E001014.tif", "NH49E001017.tif"),
}
# A scene of which one file could not be downloaded.
WHU_INCOMPLETE = "NH49E004021.tif"
WHU_NAMES = tuple(f"NH49E9{i:02d}001.tif" for i in range(4))


class OmbriaTile(NamedTuple):
    """What a tile's files hold: sar (2, h, w), optical (2, h, w, 3), mask (h, w) of 0 and 255; no-data (2, h, w)."""

    sar: np.ndarray
    optical: np.ndarray
    mask: np.ndarray
    no_sar: np.ndarray
    no_optical: np.ndarray


class WhuScene(NamedTuple):
    """What a scene's files hold, per date: optical (t, h, w, 4), sar (t, h, w), label (t, h, w) of 0, 10, ..., 70."""

    optical: np.ndarray
    sar: np.ndarray
    label: np.ndarray


def blocks(rng: np.random.Generator, shape: tuple[int, int], high: int, side: int = 16) -> np.ndarray:
    """(h, w) of random whole numbers below `high`, constant in squares of `side`."""
    h, w = shape
    coarse = rng.integers(0, high, (h // side + 1, w // side + 1))
    return np.repeat(np.repeat(coarse, side, 0), side, 1)[:h, :w]


def ombria_tile(number: str, seed: int = 0) -> OmbriaTile:
    """One tile: saturated single pixels inside and at the border are real; odd numbers have no-data stripes."""
    rng = np.random.default_rng([seed, int(number)])
    sar = rng.integers(0, 250, (2, SIDE, SIDE), dtype=np.uint8)
    optical = rng.integers(1, 200, (2, SIDE, SIDE, 3), dtype=np.uint8)
    no_sar, no_optical = np.zeros((2, 2, SIDE, SIDE), bool)
    if int(number) % 2:
        no_sar[:, :, -5:] = True
        no_optical[:, :, -9:] = True
    sar[no_sar] = 255
    optical[no_optical] = 0
    sar[:, 100, 100] = 255
    sar[:, 0:2, 30] = 255
    optical[0, 50, 50] = (0, 7, 0)  # one dark band is no missing pixel
    mask = (blocks(rng, (SIDE, SIDE), 2) * 255).astype(np.uint8)
    return OmbriaTile(sar, optical, mask, no_sar, no_optical)


def write_ombria(root: Path, train=OMBRIA_TRAIN, test=OMBRIA_TEST, seed: int = 0) -> dict[str, OmbriaTile]:
    """Writes OMBRIA's folders under `root`; what they hold, by number."""
    tiles = {}
    for part, numbers in (("train", train), ("test", test)):
        for number in numbers:
            tile = tiles[number] = ombria_tile(number, seed)
            for sensor, images in ((1, tile.sar), (2, tile.optical)):
                for kind, image in (("before", images[0]), ("after", images[1]), ("mask", tile.mask)):
                    folder = root / f"OmbriaS{sensor}" / part / kind.upper()
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(folder / f"S{sensor}_{kind}_{number}.png")
    return tiles


def whu_scene(name: str, size: tuple[int, int] = (600, 530), dates: int = 1, seed: int = 0) -> WhuScene:
    """One scene of `size` = (width, height): a corner without data in both sensors, single dark pixels, all labels.

    Green is brighter than near infrared on water, and as often as not elsewhere.
    """
    w, h = size
    rng = np.random.default_rng([seed, *name.encode()])
    optical = rng.integers(1, 256, (dates, h, w, 4), dtype=np.uint8)
    sar = rng.integers(1, 256, (dates, h, w), dtype=np.uint8)
    label = np.stack([blocks(rng, (h, w), 8) * 10 for _ in range(dates)]).astype(np.uint8)
    green, nir = np.sort(optical[..., [1, 3]], -1)[..., ::-1].transpose(3, 0, 1, 2)
    optical[..., 1] = np.where(label == 40, green, optical[..., 1])
    optical[..., 3] = np.where(label == 40, nir, optical[..., 3])
    optical[:, :20, :30] = 0
    sar[:, :20, :30] = 0
    sar[:, 60:80, :30] = 0  # missing from the radar only
    sar[:, 40, 40] = 0  # a dark echo
    optical[:, 41, 41] = 0  # missing from the optical image only
    return WhuScene(optical, sar, label)


def write_tiff(path: Path, image: np.ndarray) -> None:
    """(h, w) or (h, w, c) as an LZW TIFF without georeference, as the originals are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image[..., None] if image.ndim == 2 else image
    h, w, c = image.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", height=h, width=w, count=c, dtype=image.dtype, compress="lzw"
        ) as f:
            f.write(np.moveaxis(image, -1, 0))


def write_whu(
    root: Path,
    names=WHU_NAMES,
    size: tuple[int, int] = (600, 530),
    dates: int = 1,
    optical: str = "optical",
    seed: int = 0,
    narrow=(),
) -> dict[str, WhuScene]:
    """Writes WHU-OPT-SAR's folders under `root` ("image" is the 2022 release's name of "optical"); what they hold.

    narrow: names of scenes that are a pixel less wide than the others.
    """
    scenes = {}
    for name in names:
        scene = scenes[name] = whu_scene(name, (size[0] - (name in narrow), size[1]), dates, seed)
        for t in range(dates):
            end = f"_{t + 1}" if t else ""
            write_tiff(root / f"{optical}{end}" / name, scene.optical[t])
            write_tiff(root / f"sar{end}" / name, scene.sar[t])
            write_tiff(root / f"lbl{end}" / name, scene.label[t])
    return scenes


def write_whu_official(root: Path, size: tuple[int, int] = (600, 530)) -> dict[str, WhuScene]:
    """Writes a part of WHU-OPT-SAR as it often is: one scene narrower, one without its radar image, most not there.

    What the complete scenes hold, by name; the others of the 100 published ones are missing.
    """
    names = [name for part in WHU_OFFICIAL.values() for name in part]
    scenes = write_whu(root, [*names, WHU_INCOMPLETE], size, narrow=names[:1])
    (root / "sar" / WHU_INCOMPLETE).unlink()
    (root / "optical" / f"._{names[0]}").write_bytes(b"what macOS leaves beside files")
    del scenes[WHU_INCOMPLETE]
    return scenes


def all_tiles(dataset) -> list[tuple[str, str, dict[str, np.ndarray]]]:
    """(split, name, tile) of every tile of a built data set."""
    return [
        (split, reader.name(i), reader[i])
        for split in dataset.splits
        for reader in [dataset.split(split)]
        for i in range(len(reader))
    ]


def contents(directory):
    """{name: bytes} of the files of a built data set."""
    return {p.name: p.read_bytes() for p in directory.iterdir()}
