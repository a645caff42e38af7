"""The builder of a folder of one's own; README.md says how to describe it."""

import contextlib
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from sarjax_datasets import builder
from sarjax_datasets.paired_folder import description as describing
from sarjax_datasets.paired_folder import files
from sarjax_datasets.paired_folder.description import Description, ModalityFiles
from sarjax_datasets.paired_folder.presets import PRESETS

from sarjax import raster
from sarjax.data.imagery import stored_dtype
from sarjax.data.layout import NO_OPTIONS, Layout, Options, Problem, Scene, without
from sarjax.errors import UserError, unknown
from sarjax.spec import BandSpec, DatasetSpec, ModalitySpec

FILE = "dataset.toml"


class Builder(builder.Builder):
    """The configuration is the data set's name, as its description says; those of published sets are built in."""

    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (what TFDS asks for)
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=f"The published data set {name}, see README.md.")
        for name in PRESETS
    ]
    HAS_DEFAULT = False
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The source is a folder of one's own, with a description in {FILE} (see README.md)."

    @classmethod
    def layout(cls, source: Path, config: str = "", options: Options = NO_OPTIONS) -> Layout:
        """See the base. UserError also for a description that is missing or wrong.

        Bands and dtypes that it does not say are those of the first scene whose header can be read; no other is opened.
        """
        described = describe(source, config, options.description)
        found, problems, known = files.scenes(source, described)
        scenes = without(found, options.exclude, known)
        splits, wrong, notice = files.splits(source, described, [scene.name for scene in scenes], known)
        spec, unfit = _spec(described, scenes)
        return Layout(
            spec,
            described.labels,
            scenes,
            splits if scenes else {},
            (*problems, *unfit, *(wrong if scenes else ())),
            described.tile,
            described.cover,
            notice=notice if scenes else "",
        )

    @classmethod
    def tfds_config(cls, config: str, layout: Layout) -> Any:
        name = layout.spec.name
        own = tfds.core.BuilderConfig(name=name, description="A folder of one's own.")
        return next((c for c in cls.BUILDER_CONFIGS if c.name == name), own)

    def _create_builder_config(self, builder_config: Any, version: Any) -> Any:
        return builder_config  # TFDS would warn of one that is not in its list


def describe(source: Path, config: str, own: Path | None) -> Description:
    """The description of the folder `source`: that in `own` or, where it is None, of its `dataset.toml`.

    config: a built-in one, which the file completes or changes, or the name that the file says ("" = any).
    """
    path = own or source / FILE
    if config not in PRESETS:
        if own is None and not path.is_file():
            raise UserError(
                f"{path} is missing: a description of the folder is needed there, or as --description FILE, or "
                f"--config with one of {', '.join(PRESETS)}."
            )
        content = describing.read(path)
        described = describing.parse(content, str(path), source, "split" in content)
        _check_name(described.name, config, str(path))
        if config and config != described.name:
            raise unknown("configuration of paired_folder", config, [described.name, *PRESETS])
        return described
    content = describing.read(path) if own or path.is_file() else {}
    where = f"{path} with the description of {config}" if content else f"the description of {config}"
    described = describing.parse(
        describing.merged(tomllib.loads(PRESETS[config]), content), where, source, "split" in content
    )
    _check_name(described.name, config, where)
    return described


def _check_name(name: str, config: str, where: str) -> None:
    """UserError where records of one's own would lie where those of a built-in description do."""
    if name in PRESETS and name != config:
        raise UserError(
            f"name in {where} is {name!r}, as a built-in description is called: --config {name} builds by that one, "
            f"and any other name than {', '.join(PRESETS)} is accepted."
        )


def _spec(described: Description, scenes: Sequence[Scene]) -> tuple[DatasetSpec, list[Problem]]:
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
