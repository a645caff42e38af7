"""What a compiled program sends between devices, read from its text: which collectives, of what, among how many.

Names no array and measures nothing: `collectives(compiled.as_text())` says what the compiler has decided.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast", "reduce-scatter")
MOVES = ("all-gather", "all-to-all", "collective-permute", "collective-broadcast")  # values, not sums

_LINE = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = (?P<shape>\(.*?\)|\S+) (?:ragged-)?(?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
    r"(?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<dtype>pred|bf16|[sufc]\d+\w*)\[(?P<shape>[\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:(ENTRY) )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|called_computations|true_computation|false_computation)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\(\[(?P<ids>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r" \{(?P<used>[^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}")


class Collective(NamedTuple):
    """One array in one collective of a program.

    kind: of `KINDS`. dtype, shape: of the array that each device holds afterwards. size: its bytes. devices: how many
    take part in one group. groups: which do, by their position in the program's device assignment; of a permutation,
    the pairs (from, to). times: how often it runs in one run of the program, by the loops around it; 1 for a loop of
    unknown length. source: the operation of the traced program that it comes from ("" = the compiler's own).
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    devices: int
    groups: tuple[tuple[int, ...], ...]
    times: int = 1
    source: str = ""

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one run of the program, see `ring`."""
        return self.times * ring(self.kind, self.size, self.devices)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh {name: size}, in the order of its devices, along which it goes."""
        sizes = tuple(mesh.values())
        found: set[str] = set()
        for group in self.groups:
            places = np.stack(np.unravel_index(np.asarray(group), sizes), -1)
            found |= {name for name, column in zip(mesh, places.T, strict=True) if len(set(column.tolist())) > 1}
        return tuple(name for name in mesh if name in found)


def collectives(program: str) -> list[Collective]:
    """The collectives in a compiled program's text (`compiled.as_text()`), an entry for each array.

    One that the compiler has split into a start and an end counts once; one that a TPU's compiler has spread over
    several fusions (`chain_id`) is an entry in each. ValueError for a description of groups that is not known.
    """
    total, here, entry = _devices(program), "", ""
    found: list[tuple[str, Collective]] = []
    calls: dict[str, list[tuple[str, int]]] = {}  # {computation: (its caller, how often)}
    for line in program.splitlines():
        if opened := _COMPUTATION.match(line):
            here = opened[2]
            entry = here if opened[1] else entry
        elif match := _LINE.match(line):
            found += [(here, one) for one in _read(match, total)]
        else:
            trips = _TRIPS.search(line)
            branches = [name for names in _BRANCHES.findall(line) for name in re.findall(r"[\w.-]+", names)]
            for called in (*_CALLED.findall(line), *branches):
                calls.setdefault(called, []).append((here, int(trips[1]) if trips and " while(" in line else 1))

    @functools.cache
    def times(computation: str) -> int:
        callers = calls.get(computation, [])
        return 1 if computation == entry or not callers else sum(n * times(caller) for caller, n in callers)

    return [one._replace(times=times(computation)) for computation, one in found]


def ring(kind: str, size: int, devices: int) -> float:
    """Bytes that one of `devices` in a ring sends, of a collective whose result has `size` bytes: the least possible.

    All but its own part of what is gathered; twice that of what is summed up; all of what is passed on.
    """
    n = devices
    if n < 2:
        return 0.0
    part = {"all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "all-to-all": (n - 1) / n}
    return size * (part | {"reduce-scatter": n - 1.0}).get(kind, 1.0)


def totals(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """{kind: {"count" of arrays, "bytes" of results, "sent" by a device}}, in one run of the program."""
    sums: dict[str, dict[str, float]] = {}
    for one in found:
        of_kind = sums.setdefault(one.kind, {"count": 0, "bytes": 0, "sent": 0.0})
        of_kind["count"] += one.times
        of_kind["bytes"] += one.times * one.size
        of_kind["sent"] += one.sent
    return sums


def _devices(program: str) -> int:
    return math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", program.partition("\n")[0]))


def _read(match: re.Match[str], total: int) -> Iterator[Collective]:
    kind, rest = match["kind"], match["rest"]
    arrays = [(m["dtype"], tuple(map(int, m["shape"].split(","))) if m["shape"] else ()) for m in _arrays(match)]
    groups = _groups(rest, kind, total)
    devices = total if kind == "collective-permute" else max(map(len, groups))
    source = re.search(r'op_name="([^"]*)"', rest)
    for dtype, shape in arrays:
        size = math.prod(shape) * _itemsize(dtype)
        yield Collective(kind, dtype, shape, size, devices, groups, source=source[1] if source else "")


def _arrays(match: re.Match[str]) -> list[re.Match[str]]:
    """The arrays of the result; a start's are operands, results and then scalars of the compiler's own."""
    arrays = list(_ARRAY.finditer(match["shape"]))
    if not match["start"] or match["kind"] == "all-reduce":
        return arrays
    count = match["rest"].split(")")[0].count("%") or 1
    return arrays[count : 2 * count]


def _itemsize(dtype: str) -> int:
    if dtype == "pred":
        return 1
    bits = re.search(r"\d+", dtype)
    assert bits, dtype
    return max(1, int(bits[0]) // 8)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _groups(rest: str, kind: str, total: int) -> tuple[tuple[int, ...], ...]:
    if kind == "collective-permute":
        pairs = _PAIRS.search(rest)
        if not pairs:
            raise ValueError(f"a permutation without pairs: {rest[:200]}")
        flat = _numbers(pairs[1])
        return tuple(zip(flat[::2], flat[1::2], strict=True))
    if listed := _LISTED.search(rest):
        named = re.findall(r"\{([\d, ]+)\}", listed[1] or "")
        return tuple(tuple(_numbers(group)) for group in named) or (tuple(range(total)),)
    if iota := _IOTA.search(rest):
        shape, reshaped, order = (_numbers(part or "") for part in iota.groups())
        ids = np.arange(math.prod(reshaped)).reshape(reshaped)
        return _tuples((ids.transpose(order) if order else ids).reshape(-1, shape[-1]))
    if mesh := _MESH.search(rest):
        return _of_mesh(mesh)
    raise ValueError(f"groups of a collective that are not known: {rest[:200]}")


def _of_mesh(mesh: re.Match[str]) -> tuple[tuple[int, ...], ...]:
    """Of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: devices that differ in the named axes alone."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh["axes"])}
    sizes = list(axes.values())
    ids = np.arange(math.prod(sizes))
    if mesh["ids"]:
        ids = ids.reshape(_numbers(mesh["ids"]))
        ids = ids.transpose(_numbers(mesh["order"])) if mesh["order"] else ids
    # A part of an axis is 'a':(m)k: k of its places, with m places before them.
    cut: list[int] = []
    used: list[int] = []
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh["used"])
    for name, size in axes.items():
        pieces = sorted((int(before), int(own)) for part, before, own in parts if part == name and own)
        whole = any(part == name and not own for part, _, own in parts)
        at = 1
        for before, own in pieces:
            cut += [before // at, own]
            used.append(len(cut) - 1)
            at = before * own
        cut.append(size // at)
        if whole:
            used.append(len(cut) - 1)
    placed = ids.reshape(cut)
    kept = [i for i in range(len(cut)) if i not in used]
    count = math.prod(cut[i] for i in used)
    return _tuples(placed.transpose(kept + used).reshape(-1, count))


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in groups.tolist())
