"""What is known of a data set before its records are: for what looks at shapes alone."""

import os
from typing import Any, NamedTuple

from sarjax.data.build import builder_class, builders
from sarjax.data.store import find, open_directory
from sarjax.errors import UserError
from sarjax.spec import BandStatistics, DatasetSpec, Statistics

TILES = 20_000  # of WHU-OPT-SAR's 70 training scenes there are 20,580


class Described(NamedTuple):
    """As a `Dataset` that has no records. tile: (height, width). Of `statistics` only the number of tiles has a shape
    that depends on it; its bands are 0 +- 1.
    """

    spec: DatasetSpec
    statistics: Statistics
    tile: tuple[int, int]


def described(
    name: str, config: str = "", data_dir: str | os.PathLike | None = None, tiles: int = 0
) -> tuple[Any, str]:
    """(the built data set, or what its builder declares; a sentence that says which).

    tiles: training tiles where there are no records (0 = `TILES`). UserError where there are neither records nor a
    declaration: a folder of one's own says what it holds when it is built.
    """
    if name not in builders():
        builder_class(name)  # says which there are
    directory = find(name, config, data_dir)
    if directory is not None:
        return open_directory(directory), f"data: the records in {directory}"
    count = tiles or TILES
    found = declared(name, config, count)
    side, _ = found.tile
    where = (
        f"data: as the builder of {name} declares it, {side} x {side} pixels; {count:,} training tiles are assumed "
        "(--tiles), which only tables and banks of tiles depend on"
    )
    return found, where


def declared(name: str, config: str = "", tiles: int = TILES) -> Described:
    """What a builder declares of its records, wherever they are.

    tiles: training tiles. UserError where there is no such builder or where only its files say what it holds.
    """
    found = builder_class(name).declared(config)
    if found is None:
        raise UserError(
            f"no records of data set {name!r}{f' ({config})' if config else ''} were found, and only its files say "
            "what it holds: build it (`sarjax data build`), or --data-dir with its records, would be accepted."
        )
    spec, side = found
    bands = {
        m.name: BandStatistics(*(tuple([value] * len(m.bands)) for value in (0.0, 1.0, 0.0, 1.0)), 1)
        for m in spec.modalities
    }
    return Described(spec, Statistics(bands, (1,) * spec.num_classes, {"train": tiles}, {}), (side, side))
