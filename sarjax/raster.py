"""Rasters by window: with `georeference`, the only importer of rasterio, and that only once a raster is opened.

Arrays are (h, w, c), as everywhere in this project; files are band-first, and that ends here.
Training from built records never comes here (a test holds that it imports no rasterio).
"""

import contextlib
import math
import os
import secrets
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarjax.errors import UserError
from sarjax.georeference import NOWHERE, Georeference

READABLE = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
# Beyond these a file is refused before anything is decoded: a few megabytes can unfold into terabytes.
MOST_PIXELS = 2**33  # $SARJAX_MAX_PIXELS instead, where it is set
MOST_BLOCK_BYTES = 2**30
BLOCK = 256
# Of decoded blocks, per process, in MB: enough for a row of windows of a wide scene stored in strips. By default GDAL
# takes 5 % of the machine's memory. GDAL reads it from the environment, once; as an option of rasterio it is in bytes.
os.environ.setdefault("GDAL_CACHEMAX", "256")
# One at a time: a thread that reads may push out blocks that another one is just writing to its own file, and parts of
# blocks that are shared by several bands were seen to be lost so.
_ONE = threading.RLock()
# First bytes, GDAL's name of the format, and what is found near the end of a whole file.
_FORMATS = (
    *((magic, "GTiff", b"") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"\x89PNG", "PNG", b"IEND"),
    (b"\xff\xd8\xff", "JPEG", b"\xff\xd9"),
)


class Window(NamedTuple):
    """Part of a raster: first row, first column, height and width in pixels."""

    row: int
    column: int
    height: int
    width: int


class Info(NamedTuple):
    """What a raster's header says. no_data: the value that the file declares as no-data, or None."""

    height: int
    width: int
    bands: int
    dtype: str
    no_data: float | None
    georeference: Georeference


class Reader:
    """An open raster: `info`, and `read` by window. Not to be shared between threads."""

    def __init__(self, path: Path, file: Any):
        self.path, self._file = path, file
        gcps, gcps_crs = file.gcps
        transform = None if file.transform.is_identity else file.transform
        self.info = Info(
            file.height,
            file.width,
            file.count,
            _dtype_of(path, file),
            file.nodata,
            Georeference(file.crs or gcps_crs, transform, gcps or None),
        )

    def read(self, window: Window | Sequence[int] | None = None) -> np.ndarray:
        """Pixels (h, w, c) of `window`, None = all, in the file's dtype; UserError where it reaches outside."""
        return np.ascontiguousarray(np.moveaxis(self._decode("read", window), 0, -1))

    def declared(self, window: Window | Sequence[int] | None = None) -> np.ndarray:
        """(h, w, c) bool: where the file itself (no-data value, mask or alpha band) says that there are data."""
        return np.moveaxis(self._decode("read_masks", window), 0, -1) > 0

    def tags(self) -> dict[str, str]:
        """Metadata of the file, as `create` writes them."""
        return dict(self._file.tags())

    def thumbnail(self, side: int) -> np.ndarray:
        """The whole raster (h, w, c), thinned out (not averaged) to at most `side` pixels a side."""
        scale = max(1.0, max(self.info.height, self.info.width) / side)
        shape = (self.info.bands, max(1, round(self.info.height / scale)), max(1, round(self.info.width / scale)))
        with _reading(self.path), _ONE:
            return np.moveaxis(self._file.read(out_shape=shape), 0, -1)

    def _decode(self, how: str, window: Window | Sequence[int] | None) -> np.ndarray:
        part = None
        if window is not None:
            from rasterio.windows import Window as Part

            row, column, height, width = window
            if row < 0 or column < 0 or row + height > self.info.height or column + width > self.info.width:
                raise UserError(
                    f"{self.path} is {self.info.width} x {self.info.height} pixels, too small for the window "
                    f"{tuple(window)}."
                )
            part = Part(column, row, width, height)
        with _reading(self.path), _ONE:
            return getattr(self._file, how)(window=part)


@contextlib.contextmanager
def open_raster(path: str | os.PathLike) -> Iterator[Reader]:
    """The raster at `path`; UserError naming it when it is missing, empty, truncated, oversized or no raster."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: a raster file ({', '.join(READABLE)}) is expected there.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): download or copy it again.")
    driver = _driver(path)
    import rasterio

    with contextlib.ExitStack() as stack:
        # Quiet while it is opened only: filters of warnings belong to the process, and a scene stays open for long.
        with _reading(path), _quiet(), _ONE:
            file = stack.enter_context(rasterio.open(path, driver=driver))
            _check_size(path, file)
            reader = Reader(path, file)
        yield reader


def info(path: str | os.PathLike) -> Info:
    """What the header of the raster at `path` says; UserError if it cannot be opened."""
    with open_raster(path) as f:
        return f.info


def size(path: str | os.PathLike) -> tuple[int, int, int]:
    """(height, width, bands) of the raster at `path`, from its header; UserError if it cannot be opened."""
    return info(path)[:3]


def read(path: str | os.PathLike, window: Window | Sequence[int] | None = None) -> np.ndarray:
    """The pixels of `path`: (h, w, c) in the file's dtype.

    window: (row, column, height, width); must lie inside the raster. None = all of it.
    Raises UserError naming the file when it is missing, empty, truncated or no raster.
    """
    with open_raster(path) as f:
        return f.read(window)


class Writer:
    """A tiled GeoTIFF that is being written, by window, in any order."""

    def __init__(self, path: Path, file: Any):
        self._path, self._file = path, file

    def write(self, window: Window | Sequence[int], array: np.ndarray) -> None:
        """Writes (h, w) or (h, w, c) at `window`."""
        from rasterio.windows import Window as Part

        row, column, height, width = window
        array = array[..., None] if array.ndim == 2 else array
        with _writing(self._path), _ONE:
            self._file.write(np.moveaxis(array, -1, 0), window=Part(column, row, width, height))


@contextlib.contextmanager
def create(
    path: str | os.PathLike,
    height: int,
    width: int,
    bands: int,
    dtype: str,
    *,
    georeference: Georeference = NOWHERE,
    no_data: float | None = None,
    palette: Sequence[tuple[int, int, int]] = (),
    descriptions: Sequence[str] = (),
    tags: dict[str, str] | None = None,
) -> Iterator[Writer]:
    """A tiled, compressed GeoTIFF at `path` to write windows into; it appears when the block ends without an error.

    palette: colour of value 0, 1, ... of a single uint8 band. descriptions: a name per band. tags: metadata.
    Raises UserError when the folder is missing or cannot be written to.
    """
    import rasterio

    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    profile = {
        "driver": "GTiff", "height": height, "width": width, "count": bands, "dtype": dtype, "nodata": no_data,
        "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "interleave": "pixel", "BIGTIFF": "IF_SAFER",
        "compress": "deflate", "predictor": 3 if np.dtype(dtype).kind == "f" else 2, "num_threads": "all_cpus",
    }  # fmt: skip
    if georeference.transform is not None:
        profile["transform"] = georeference.transform
    if georeference.crs is not None and not georeference.gcps:
        profile["crs"] = georeference.crs
    try:
        with _writing(path), _quiet(), _ONE:
            file = rasterio.open(temporary, "w", **profile)
        try:
            with _writing(path), _ONE:
                if georeference.gcps:
                    file.gcps = georeference.gcps, georeference.crs
                if palette:
                    colours = {i: (*rgb, 255) for i, rgb in enumerate(palette)}
                    file.write_colormap(1, colours | ({int(no_data): (0, 0, 0, 0)} if no_data is not None else {}))
                for i, text in enumerate(descriptions):
                    file.set_band_description(i + 1, text)
                file.update_tags(**(tags or {}))
            yield Writer(path, file)
        finally:
            with _writing(path), _ONE:
                file.close()
        with _writing(path), _quiet(), _ONE:
            _check_whole(temporary, path)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_whole(written: Path, path: Path) -> None:
    """OSError unless every block of a file that was just written lies in it: closing says nothing of a full disk."""
    import rasterio

    room = f"its blocks are not all on the disk, which may be full ({written.stat().st_size} bytes are)"
    try:
        with rasterio.open(written, driver="GTiff") as f:
            down, across = (-(-n // BLOCK) for n in (f.height, f.width))
            for x, y in ((x, y) for y in range(down) for x in range(across)):
                start, length = (f.get_tag_item(f"BLOCK_{what}_{x}_{y}", "TIFF", bidx=1) for what in ("OFFSET", "SIZE"))
                if not start or not length or int(start) + int(length) > written.stat().st_size:
                    raise OSError(room)
    except rasterio.errors.RasterioError as e:
        raise OSError(room) from e


def write(path: str | os.PathLike, array: np.ndarray, **profile: Any) -> Path:
    """Writes `array` (h, w) or (h, w, c) as an LZW TIFF, or a PNG where `path` ends so; atomically.

    profile: passed on to rasterio (crs, transform, nodata, compress, ...). Returns `path`.
    Raises UserError when the folder is missing or cannot be written to.
    """
    import rasterio

    path = Path(path)
    array = np.asarray(array)[..., None] if np.ndim(array) == 2 else np.asarray(array)
    png = path.suffix.lower() == ".png"
    profile = {"driver": "PNG"} | profile if png else {"driver": "GTiff", "compress": "lzw"} | profile
    height, width, count = array.shape
    # The ending stays last: the PNG driver chooses by it what it writes beside the file.
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        with (
            _writing(path),
            _quiet(),
            rasterio.open(temporary, "w", height=height, width=width, count=count, dtype=array.dtype, **profile) as f,
        ):
            f.write(np.moveaxis(array, -1, 0))
        with _writing(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_name(temporary.name + ".aux.xml").unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    from rasterio.errors import RasterioError

    try:
        yield
    except RasterioError as e:
        raise UserError(
            f"{path} cannot be read ({_first_line(e)}): truncated, or not an image; download or copy it again."
        ) from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}.") from e


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    from rasterio.errors import RasterioError

    try:
        yield
    except (OSError, RasterioError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else _first_line(e)
        raise UserError(f"cannot write {path}: {reason}; a writable folder with room for it is needed.") from e


def _dtype_of(path: Path, file: Any) -> str:
    kinds = sorted(set(file.dtypes))
    if len(kinds) > 1 or np.dtype(kinds[0]).kind not in "uif":
        raise UserError(f"{path} holds {' and '.join(kinds)}: bands of one whole or real number type are accepted.")
    return kinds[0]


def _check_size(path: Path, file: Any) -> None:
    pixels, most = file.height * file.width * file.count, os.environ.get("SARJAX_MAX_PIXELS") or str(MOST_PIXELS)
    if not most.isdecimal():
        raise UserError(f"SARJAX_MAX_PIXELS is {most!r}, but should be a whole number of pixels.")
    if pixels > int(most):
        raise UserError(
            f"{path} declares {file.width} x {file.height} pixels in {file.count} bands, more than {most}: "
            "damaged or hostile; set SARJAX_MAX_PIXELS if it is neither."
        )
    together = file.count if file.interleaving is not None and file.interleaving.name == "pixel" else 1
    for (h, w), dtype in zip(file.block_shapes, file.dtypes, strict=True):
        # PNG and JPEG decode by line, whatever their size.
        if h * w * together * np.dtype(dtype).itemsize > MOST_BLOCK_BYTES:
            raise UserError(
                f"{path} is stored in blocks of {w} x {h} pixels, which do not fit in memory: tiles or strips of at "
                f"most {math.isqrt(MOST_BLOCK_BYTES)} pixels a side are accepted."
            )


def _driver(path: Path) -> str:
    """The one format that a file's first bytes say it is.

    GDAL would try all it knows, among them descriptions that point to other files and to the network. And it reads
    what there is of a truncated PNG or JPEG and fills up with zeros: so the format's own end is looked for.
    """
    with path.open("rb") as f:
        start = f.read(8)
        f.seek(-min(path.stat().st_size, 4096), os.SEEK_END)
        end = f.read()
    for magic, driver, last in _FORMATS:
        if start.startswith(magic):
            if last not in end:
                raise UserError(f"{path} cannot be read: it is truncated; download or copy it again.")
            return driver
    raise UserError(f"{path} cannot be read: it is no image; TIFF, PNG and JPEG are accepted.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Benchmark imagery is rarely georeferenced; the warning about it is noise here."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _first_line(e: Exception) -> str:
    return (str(e.__cause__ or e).splitlines() or [type(e).__name__])[0].rstrip(".")
