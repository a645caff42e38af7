"""What a description leaves open, bands and dtypes, as the headers of the files say."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sarjax_datasets.paired_folder.description import Description, ModalityFiles

from sarjax import raster
from sarjax.data.imagery import stored_dtype
from sarjax.data.layout import Problem, Scene
from sarjax.errors import UserError
from sarjax.spec import BandSpec, DatasetSpec, ModalitySpec


def spec(described: Description, scenes: Sequence[Scene]) -> tuple[DatasetSpec, list[Problem]]:
    """The spec, completed by the first header that can be read where the description leaves something open.

    What cannot be read is named where all headers are looked at.
    """
    modalities, problems = [], []
    for m in described.modalities:
        bands, dtype = m.bands, "float32" if m.transforms else m.dtype
        if not (bands and dtype):
            path, header = next(_headers(scene.images[m.name][0] for scene in scenes), (None, None))
            if header is not None:
                bands = bands or tuple(f"b{i + 1}" for i in range(header.bands))
                try:
                    dtype = dtype or stored_dtype(header.dtype)
                except UserError as e:
                    problems.append(Problem("fatal", "dtype", str(path), f"{path} does not fit: {e}"))
        modalities.append(_modality(m, bands or ("b1",), dtype or "uint8"))
    dates = len(described.modalities[0].folders)
    spec = DatasetSpec(described.name, tuple(modalities), described.classes, dates, described.excluded)
    return spec, problems


def _headers(paths: Iterable[Path]) -> Iterator[tuple[Path, raster.Info]]:
    for path in paths:
        with contextlib.suppress(UserError):
            yield path, raster.info(path)


def _modality(m: ModalityFiles, bands: tuple[str, ...], dtype: str) -> ModalitySpec:
    radiometry = m.radiometry * len(bands) if len(m.radiometry) == 1 else m.radiometry
    if len(radiometry) != len(bands):
        raise UserError(f"[{m.name}] has {len(radiometry)} radiometries for {len(bands)} bands: one, or one each.")
    specs = tuple(BandSpec(*pair) for pair in zip(bands, radiometry, strict=True))
    return ModalitySpec(m.name, specs, dtype, m.no_data, m.smallest_gap, m.transforms)
