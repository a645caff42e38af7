"""The description of a folder of one's own: TOML in, checked values out; README.md beside this is its reference."""

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sarjax.errors import UserError, unknown
from sarjax.spec import IGNORE_LABEL, RADIOMETRIES, ClassSpec, Transform

MODALITIES = ("sar", "optical")
SPLITS = ("train", "val", "test")
MOST_CLASSES = IGNORE_LABEL
DTYPES = ("uint8", "uint16", "float32")
# For classes without a colour of their own: distinct, and readable on white and on black.
COLOURS = (
    (68, 119, 170), (204, 187, 68), (34, 136, 51), (238, 102, 119), (102, 204, 238), (170, 51, 119), (187, 187, 187),
    (221, 119, 51), (17, 119, 51), (136, 34, 85), (153, 153, 51), (68, 170, 153),
)  # fmt: skip


class ModalityFiles(NamedTuple):
    """Where a sensor's files are, one folder and suffix per date, and what is in them.

    bands, dtype: None = as the files' headers say. radiometry: one for all bands, or one per band.
    """

    name: str
    folders: tuple[str, ...]
    suffixes: tuple[str, ...]
    bands: tuple[str, ...] | None
    radiometry: tuple[str, ...]
    dtype: str | None
    no_data: float | None
    smallest_gap: int
    transforms: tuple[Transform, ...]


class Description(NamedTuple):
    """What a folder holds. labels: {value in the files: class index or 255 = ignore}. split_files: {split: file}.

    label_folder: None = there are no labels. own_splits: the user named the files of the splits, so they have to be
    there.
    """

    name: str
    tile: int
    cover: bool
    modalities: tuple[ModalityFiles, ...]
    label_folder: str | None
    label_suffix: str
    classes: tuple[ClassSpec, ...]
    labels: Mapping[int, int]
    excluded: tuple[str, ...]
    split_files: Mapping[str, str]
    own_splits: bool


def read(path: Path) -> dict[str, Any]:
    """The TOML file at `path`; UserError where it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): a description of the data set is expected.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is no TOML: {e}.") from e


def merged(preset: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`preset` with what `own` says instead; tables key by key, lists as a whole."""
    tables = {
        key: merged(value, own[key])
        for key, value in preset.items()
        if isinstance(value, dict) and isinstance(own.get(key), dict)
    }
    return {**preset, **own, **tables}


def parse(content: Mapping[str, Any], where: str, source: Path, own_splits: bool) -> Description:
    """The description that `content` is; UserError, in one sentence, for a key or a value that is not accepted.

    where: what to call it in an error. source: the folder, which decides on sensors that are not mentioned.
    """
    top = _Table(content, where, "")
    name = top.take("name", _name, "a name of letters, digits, _ and -")
    tile = top.take("tile", _whole(8, 8192), "a whole number from 8 to 8192", 256)
    cover = top.take("cover", lambda v: v if isinstance(v, bool) else None, "true or false", False)
    ignore = top.take("ignore", _list(_whole()), "a list of whole numbers", ())
    excluded = top.take("excluded", _list(_text), "a list of class names", ())
    classes, labels = _classes(top, ignore)
    for other in excluded:
        if other not in [c.name for c in classes]:
            raise unknown(f"class in excluded of {where}", other, [c.name for c in classes])
    if {c.name for c in classes} <= set(excluded):
        raise UserError(f"excluded in {where} names all classes: averages need at least one that is not excluded.")
    mentioned = [m for m in MODALITIES if m in content] or [m for m in MODALITIES if (source / m).is_dir()]
    if not mentioned:
        raise UserError(f"{where} describes no images: a table [sar], [optical] or both is needed.")
    tables = {m: top.table(m) for m in MODALITIES}
    modalities = tuple(_modality(tables[m], m) for m in mentioned)
    if len({len(m.folders) for m in modalities}) > 1:
        numbers = " and ".join(f"{len(m.folders)} of {m.name}" for m in modalities)
        raise UserError(f"{where} lists folders of {numbers}: every sensor needs one for each date.")
    label, split = top.table("label"), top.table("split")
    folder = label.take("folder", _string, "a folder's name, or an empty text for none,", "label").strip() or None
    suffix = label.take("suffix", _string, "a text", "")
    files = {s: split.take(s, _text, "a text file's name", "" if own_splits else f"split/{s}.txt") for s in SPLITS}
    for table in (top, label, split, *tables.values()):
        table.end()
    return Description(
        name,
        tile,
        cover,
        modalities,
        folder,
        suffix,
        classes,
        labels,
        excluded,
        {s: file for s, file in files.items() if file},
        own_splits,
    )


_MISSING = object()


class _Table:
    """A table of the description, whose keys are taken one by one; `end` refuses what is left."""

    def __init__(self, content: Mapping[str, Any], where: str, title: str):
        self._content, self._where, self._title = content, where, title
        self._taken: list[str] = []

    @property
    def where(self) -> str:
        return f"{self._title} of {self._where}" if self._title else self._where

    def take(self, key: str, accept: Callable[[Any], Any], wanted: str, default: Any = _MISSING) -> Any:
        """What `accept` makes of the value of `key` (None = it is not accepted), or `default` where there is none."""
        self._taken.append(key)
        if key not in self._content:
            if default is _MISSING:
                raise UserError(f"{self.where} has no {key}: {wanted} is needed.")
            return default
        value = accept(self._content[key])
        if value is None:
            raise UserError(f"{key} in {self.where} is {self._content[key]!r}: {wanted} is accepted.")
        return value

    def table(self, key: str) -> "_Table":
        """The table called `key`, empty where there is none."""
        content = self.take(key, lambda v: v if isinstance(v, dict) else None, "a table", {})
        return _Table(content, self._where, f"[{key}]")

    def tables(self, key: str, title: str) -> list["_Table"]:
        """The tables in the list called `key`."""
        content = self.take(key, _list(lambda v: v if isinstance(v, dict) else None), f"a list of {title}", ())
        return [_Table(c, self._where, f"{title} number {i + 1}") for i, c in enumerate(content)]

    def end(self) -> None:
        for key in self._content:
            if key not in self._taken:
                raise unknown(f"key in {self.where}", key, self._taken)


def _classes(top: _Table, ignore: tuple[int, ...]) -> tuple[tuple[ClassSpec, ...], dict[int, int]]:
    """(classes, labels) of the [[class]] tables, in order."""
    classes: list[ClassSpec] = []
    labels = dict.fromkeys(ignore, IGNORE_LABEL)
    owners = dict.fromkeys(ignore, "ignore")
    tables = top.tables("class", "[[class]]")
    if not 2 <= len(tables) <= MOST_CLASSES:
        raise UserError(f"{top.where} has {len(tables)} [[class]] tables: 2 to {MOST_CLASSES} are accepted.")
    for i, table in enumerate(tables):
        name = table.take("name", _text, "a text")
        if name in [c.name for c in classes]:
            raise UserError(f"{top.where} has two classes called {name!r}: each needs a name of its own.")
        for value in table.take("value", _one_or_more(_whole()), "a whole number or a list of them"):
            if value in owners:
                raise UserError(
                    f"{top.where} has the value {value} in {owners[value]} and in class {name!r}: choose one."
                )
            labels[value], owners[value] = i, f"class {name!r}"
        colour = table.take("colour", _colour, "three whole numbers from 0 to 255", COLOURS[i % len(COLOURS)])
        classes.append(ClassSpec(name, colour))
        table.end()
    return tuple(classes), labels


def _modality(table: _Table, name: str) -> ModalityFiles:
    folders = table.take("folder", _one_or_more(_text), "a folder's name, or a list of one for each date", (name,))
    suffixes = table.take("suffix", _one_or_more(_string), "a text, or a list of one for each date", ("",))
    if len(suffixes) not in (1, len(folders)):
        raise UserError(f"{table.where} has {len(suffixes)} suffixes for {len(folders)} folders: one, or one each.")
    bands = table.take("bands", _one_or_more(_text), "a list of band names", None)
    if bands and len(set(bands)) < len(bands):
        raise UserError(f"bands in {table.where} are {', '.join(bands)}: each needs a name of its own.")
    kinds = f"one of {', '.join(RADIOMETRIES)}, or a list of one for each band"
    # What a radar image's numbers mean decides on its noise, and cannot be seen in the file.
    default = {"default": ("reflectance",)} if name == "optical" else {}
    radiometry = table.take("radiometry", _one_or_more(_among(RADIOMETRIES)), kinds, **default)
    if len(radiometry) > 1 and len(radiometry) != len(bands or radiometry):
        raise UserError(f"{table.where} has {len(radiometry)} radiometries for {len(bands)} bands: one, or one each.")
    dtype = table.take("dtype", _among(DTYPES), f"one of {', '.join(DTYPES)}", None)
    no_data = table.take("no_data", _number, "a number", None)
    smallest_gap = table.take("smallest_gap", _whole(1, 4096), "a whole number from 1 to 4096", 1)
    if smallest_gap > 1 and no_data is None:
        raise UserError(f"{table.where} has a smallest_gap but no no_data: it is the size of regions of that value.")
    transforms = tuple(map(_transform, table.tables("transforms", f"transform of [{name}]")))
    if transforms and dtype not in (None, "float32"):
        raise UserError(f"dtype in {table.where} is {dtype!r}: transforms give float32.")
    _check_transforms(table, transforms, radiometry)
    suffixes = suffixes * len(folders) if len(suffixes) == 1 else suffixes
    return ModalityFiles(name, folders, suffixes, bands, radiometry, dtype, no_data, smallest_gap, transforms)


def _transform(table: _Table) -> Transform:
    name = table.take("name", _among(("lee", "db")), "one of lee, db")
    quantity = table.take("quantity", _among(("intensity", "amplitude")), "one of intensity, amplitude")
    window, looks = 7, 1.0
    if name == "lee":
        window = table.take("window", _odd, "an odd number from 3 to 31", window)
        looks = table.take("looks", lambda v: _number(v) if _number(v) and v > 0 else None, "a number above 0", looks)
    table.end()
    return Transform(name, quantity, window, looks)


def _check_transforms(table: _Table, transforms: tuple[Transform, ...], radiometry: tuple[str, ...]) -> None:
    """Decibels are the end: what is stored is what `radiometry` says, and speckle is filtered before."""
    names = [t.name for t in transforms]
    if "db" in names[:-1]:
        raise UserError(f"transforms in {table.where} go on after db: it is the last one, on linear numbers.")
    for transform in transforms[-1:]:
        stored = "db" if transform.name == "db" else transform.quantity
        if set(radiometry) != {stored}:
            raise UserError(
                f"radiometry in {table.where} is {', '.join(radiometry)}, but its transforms give {stored}: say that."
            )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", value) else None


def _number(value: Any) -> float | None:
    """A finite number; NaN needs no declaration."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return float(value) if ok else None


def _whole(low: int = -(2**63), high: int = 2**63) -> Callable[[Any], int | None]:
    return lambda v: v if isinstance(v, int) and not isinstance(v, bool) and low <= v <= high else None


def _odd(value: Any) -> int | None:
    return value if _whole(3, 31)(value) is not None and value % 2 else None


def _among(known: tuple[str, ...]) -> Callable[[Any], str | None]:
    return lambda v: v if v in known else None


def _colour(value: Any) -> tuple[int, int, int] | None:
    colour = _list(_whole(0, 255))(value)
    return colour if colour is not None and len(colour) == 3 else None


def _list(accept: Callable[[Any], Any]) -> Callable[[Any], tuple | None]:
    def accepted(value: Any) -> tuple | None:
        items = tuple(map(accept, value)) if isinstance(value, list) else (None,)
        return None if any(item is None for item in items) else items

    return accepted


def _one_or_more(accept: Callable[[Any], Any]) -> Callable[[Any], tuple | None]:
    return lambda value: _list(accept)(value if isinstance(value, list) else [value]) or None
