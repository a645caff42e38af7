"""Rasters by window: the only importer of rasterio, and that only once a raster is opened.

Arrays are (h, w, c), as everywhere in this project; files are band-first, and that ends here.
Training from built records never comes here (a test holds that it imports no rasterio).
"""

import contextlib
import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarjax.errors import UserError

READABLE = (".tif", ".tiff", ".png", ".jpg", ".jpeg")


class Window(NamedTuple):
    """Part of a raster: first row, first column, height and width in pixels."""

    row: int
    column: int
    height: int
    width: int


def size(path: str | os.PathLike) -> tuple[int, int, int]:
    """(height, width, bands) of the raster at `path`, from its header; UserError if it cannot be opened."""
    with _open(path) as f:
        return f.height, f.width, f.count


def read(path: str | os.PathLike, window: Window | tuple[int, int, int, int] | None = None) -> np.ndarray:
    """The pixels of `path`: (h, w, c) in the file's dtype.

    window: (row, column, height, width); must lie inside the raster. None = all of it.
    Raises UserError naming the file when it is missing, empty, truncated or no raster.
    """
    with _open(path) as f:
        part = None
        if window is not None:
            from rasterio.windows import Window as Part

            row, column, height, width = window
            if row < 0 or column < 0 or row + height > f.height or column + width > f.width:
                raise UserError(f"{path} is {f.width} x {f.height} pixels, too small for the window {tuple(window)}.")
            part = Part(column, row, width, height)
        return np.ascontiguousarray(np.moveaxis(f.read(window=part), 0, -1))


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
            _quiet(),
            rasterio.open(temporary, "w", height=height, width=width, count=count, dtype=array.dtype, **profile) as f,
        ):
            f.write(np.moveaxis(array, -1, 0))
        os.replace(temporary, path)
    except (OSError, rasterio.errors.RasterioError) as e:
        raise UserError(f"cannot write {path}: {_first_line(e)}; the folder must exist and be writable.") from e
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_name(temporary.name + ".aux.xml").unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[Any]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: a raster file ({', '.join(READABLE)}) is expected there.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): download or copy it again.")
    _check_end(path)
    import rasterio

    try:
        with _quiet(), rasterio.open(path) as f:
            yield f
    except rasterio.errors.RasterioError as e:
        raise UserError(
            f"{path} cannot be read ({_first_line(e)}): truncated, or not an image; download or copy it again."
        ) from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}.") from e


def _check_end(path: Path) -> None:
    """GDAL reads what there is of a truncated PNG or JPEG and fills up with zeros: look for the format's own end."""
    with path.open("rb") as f:
        start = f.read(8)
        f.seek(-min(path.stat().st_size, 4096), os.SEEK_END)
        end = f.read()
    for magic, last in ((b"\x89PNG", b"IEND"), (b"\xff\xd8\xff", b"\xff\xd9")):
        if start.startswith(magic) and last not in end:
            raise UserError(f"{path} cannot be read: it is truncated; download or copy it again.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Benchmark imagery is rarely georeferenced; the warning about it is noise here."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _first_line(e: Exception) -> str:
    return (str(e.__cause__ or e).splitlines() or [type(e).__name__])[0].rstrip(".")
