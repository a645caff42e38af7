"""The builder of a folder of one's own; README.md says how to describe it."""

import tomllib
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from sarjax_datasets import builder
from sarjax_datasets.paired_folder import description as describing
from sarjax_datasets.paired_folder import files, headers
from sarjax_datasets.paired_folder.description import Description
from sarjax_datasets.paired_folder.presets import PRESETS

from sarjax.data.layout import NO_OPTIONS, Layout, Options, without
from sarjax.errors import UserError, unknown

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
        spec, unfit = headers.spec(described, scenes)
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
