"""Small batches that hold what goes wrong: ragged sizes, a tile without data, one valid pixel, ignored labels."""

import numpy as np

from sarjax.spec import BandSpec, ClassSpec, DatasetSpec, ModalitySpec


def make_spec(sar: str = "intensity", dtype: str = "uint8", dates: int = 2) -> DatasetSpec:
    return DatasetSpec(
        "toy",
        (
            ModalitySpec("sar", (BandSpec("VV", sar), BandSpec("VH", sar)), dtype),
            ModalitySpec("optical", tuple(BandSpec(b, "reflectance") for b in ("red", "green", "blue")), dtype),
        ),
        tuple(ClassSpec(name, (0, 0, 0)) for name in ("dry", "flood", "other")),
        dates,
    )


def make_batch(b: int = 8, t: int = 2, h: int = 16, w: int = 16, dtype: str = "uint8", seed: int = 0) -> dict:
    """Row 0 has no data at all, row 1 one valid SAR pixel, row 2 is constant; the rest has gaps."""
    r = np.random.default_rng(seed)
    batch = {}
    for name, bands in (("sar", 2), ("optical", 3)):
        image = r.integers(1, 250, (b, t, h, w, bands))
        batch[name] = (image if dtype.startswith("uint") else image / 7).astype(dtype)
        batch[f"{name}_valid"] = (r.random((b, t, h, w)) > 0.1).astype(np.uint8)
    batch["label"] = r.integers(0, 3, (b, h, w)).astype(np.uint8)
    batch["label"][:, 0, 0] = 255
    batch["hidden_label"] = r.integers(0, 3, (b, h, w)).astype(np.uint8)
    batch["sar_valid"][0], batch["optical_valid"][0], batch["label"][0] = 0, 0, 255
    if b > 2:
        batch["sar_valid"][1] = 0
        batch["sar_valid"][1, :, h // 2, w // 3] = 1
        batch["sar"][2] = 77
    batch |= {"id": np.arange(b, dtype=np.int32) + 100, "row": np.arange(b, dtype=np.int32)}
    batch["row_valid"] = np.ones(b, np.uint8)
    return batch
