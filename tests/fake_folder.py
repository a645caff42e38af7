"""A folder of one's own, as a user may have it, with its description."""

import fake_data
import numpy as np
from PIL import Image

CLASSES = """
[[class]]
name = "dry"
value = [0, 7]
[[class]]
name = "wet"
value = 1
"""
OWN = f"""
name = "own"
tile = 64
ignore = [-1]
[sar]
radiometry = "intensity"
{CLASSES}
"""
# The real chip's, which lies outside of its read-only folder.
SEN1FLOODS11 = """
name = "sen1floods11"
ignore = [-1]
[sar]
folder = "S1"
suffix = "_S1Hand"
bands = ["VV", "VH"]
radiometry = "db"
[label]
folder = "Labels"
suffix = "_LabelHand"
[[class]]
name = "dry"
value = 0
[[class]]
name = "water"
value = 1
colour = [0, 0, 255]
"""
RNG = np.random.default_rng(0)


def image(bands, dtype="uint8", size=(64, 64)):
    values = RNG.integers(1, 200, (*size, bands))
    return (values / 7 if dtype == "float32" else values).astype(dtype)


def write(path, array):
    """As the file's ending says."""
    if path.suffix == ".tif":
        fake_data.write_tiff(path, array)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path)


def write_own(root, names, bands=2, dtype="float32", size=(64, 64), toml=OWN):
    """A folder of SAR and label, {name: (image, label)}."""
    root.mkdir(parents=True, exist_ok=True)
    made = {}
    for name in names:
        sar, label = image(bands, dtype, size), RNG.choice([-1, 0, 1, 7], size).astype(np.int16)
        fake_data.write_tiff(root / "sar" / f"{name}.tif", sar)
        fake_data.write_tiff(root / "label" / f"{name}.tif", label)
        made[name] = sar, label
    (root / "dataset.toml").write_text(toml)
    return made


def indices(label):
    return np.select([label == -1, label == 1], [255, 1], 0)
