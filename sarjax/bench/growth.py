"""What grows with batch, image, devices and tiles, and how fast: `sarjax bench growth [RECIPE]`.

Memory and collectives are those of the step that the compiler makes of shapes, for host devices; nothing of it is run.
Seconds are measured: of the search for neighbours, of a method's refresh, of building records.
"""

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sarjax.bench import timing
from sarjax.bench.step import noise
from sarjax.config import Experiment, Mesh
from sarjax.data.declared import Described
from sarjax.errors import UserError, unknown
from sarjax.methods.neighbours import nearest, padded
from sarjax.methods.record import Teacher
from sarjax.train.collectives import totals
from sarjax.train.devices import KINDS
from sarjax.train.mesh import make_mesh
from sarjax.train.plan import Asked, least_sent, plan
from sarjax.train.program import Program, compile_step, device_bytes, part, planned_batch, planned_method

GIB = 2**30
CHANNELS, NEIGHBOURS = 512, 3  # of a bank of features
SCENE = 1024  # side of a made-up scene in pixels
MOST_TRIES = 6  # of a batch that fills a device
PARTS = ("batch", "size", "fsdp", "devices", "largest", "neighbours", "refresh", "build")

Say = Callable[[str], None]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Along what things grow.

    batches: rows on one device. sizes: sides of tiles in pixels. shards: devices along fsdp, of the largest of them in
    all. devices: along data, as many rows on each. memories: of a device, in GiB. tables: tiles among which neighbours
    are looked up. tiles: those that a refresh goes through. scenes: made-up ones, of which records are built.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8)
    sizes: tuple[int, ...] = (128, 256, 512)
    shards: tuple[int, ...] = (1, 2, 4, 8)
    devices: tuple[int, ...] = (1, 2, 4, 8)
    memories: tuple[float, ...] = (16, 80, 141)
    tables: tuple[int, ...] = (4096, 8192, 16384, 32768)
    tiles: tuple[int, ...] = (64, 128, 256, 512)
    scenes: tuple[int, ...] = (1, 2, 4, 8)


def bench_growth(
    experiment: Experiment,
    data: Described,
    *,
    parts: Sequence[str] = (),
    ranges: Ranges | None = None,
    teacher: Teacher | None = None,
    repetitions: int = timing.REPETITIONS,
    say: Say = print,
) -> dict[str, Any]:
    """Rows by part, and in `fits` how each part grows.

    batch, size: memory of a device against rows and pixels, beside a straight line through them all. fsdp: memory,
    and what a step sends, as the state is cut. devices: what a step sends as devices share more rows. largest: the
    largest batch of one device: by the line of `sarjax plan`, and that whose compiled step fills it. neighbours,
    refresh, build: seconds against tiles, whose `exponent` is the slope between logarithms.

    Args:
      experiment: what is trained.
      data: as a builder declares it.
      parts: of `PARTS`; () = all.
      ranges: None = those of `Ranges`.
      teacher: what a student learns from, where the method needs it.
      repetitions: timed calls of what is measured.

    Raises:
      UserError: an unknown part, ranges that are empty or not above 0, too few devices, rows that cannot be shared.
    """
    ranges = ranges or Ranges()
    timing.check(repetitions)
    for name in parts:
        if name not in PARTS:
            raise unknown("part", name, PARTS)
    for field in dataclasses.fields(ranges):
        if min(getattr(ranges, field.name), default=0) <= 0:
            raise UserError(f"{field.name} is {getattr(ranges, field.name)}; one number above 0 or more are accepted.")
    growth = _Growth(experiment, data, ranges, teacher, repetitions, say)
    rows: list[Row] = []
    fits: dict[str, Any] = {}
    for name in parts or PARTS:
        found, fit = getattr(growth, name)()
        rows += [{"part": name, **row} for row in found]
        fits |= {name: fit} if fit else {}
    return {
        "benchmark": "growth",
        "device": jax.devices()[0].device_kind,
        **timing.machine(),
        "network": f"{experiment.network.NAME} {experiment.network.encoder} x{experiment.network.width:g}",
        "method": experiment.method.NAME,
        "precision": experiment.precision,
        "optimizer": experiment.optimizer.name,
        "tile": list(data.tile),
        "fits": fits,
        "rows": rows,
    }


@dataclasses.dataclass(frozen=True)
class _Growth:
    """One method per part: (rows, how it grows)."""

    experiment: Experiment
    data: Described
    ranges: Ranges
    teacher: Teacher | None
    repetitions: int
    say: Say
    programs: dict[Any, Program] = dataclasses.field(default_factory=dict)

    # ------------------------------------------------------------ what the compiler says

    def program(self, rows: int, side: int = 0, data: int = 1, fsdp: int = 1) -> Program:
        """The step with so many rows on each device. side: of the tiles (0 = as they are)."""
        key = rows, side or self.data.tile[0], data, fsdp
        if key not in self.programs:
            if data * fsdp > jax.device_count():
                raise UserError(
                    f"{data * fsdp} devices are asked for, but there are {jax.device_count()}; as many, or fewer, are "
                    "accepted."
                )
            self.say(f"compiling: {rows} rows a device of {key[1]} x {key[1]} pixels, data {data} x fsdp {fsdp}")
            mesh = make_mesh(Mesh(data, fsdp), jax.devices()[: data * fsdp])
            experiment, known = dataclasses.replace(self.experiment, batch_size=rows * data * fsdp), self.data
            if side:
                experiment = dataclasses.replace(experiment, augment=dataclasses.replace(experiment.augment, crop=0))
                known = known._replace(tile=(side, side))
            self.programs[key] = compile_step(experiment, known, mesh, self.teacher)
        return self.programs[key]

    def batch(self) -> tuple[list[Row], Row]:
        rows = [{"rows": n, **_memory(self.program(self._rows(n)))} for n in self.ranges.batches]
        return rows, _line(rows, "rows", "peak_bytes")

    def size(self) -> tuple[list[Row], Row]:
        least = self._rows(1)
        rows = [
            {"side": n, "pixels": n * n, "rows": least, **_memory(self.program(least, n))} for n in self.ranges.sizes
        ]
        return rows, _line(rows, "pixels", "peak_bytes")

    def fsdp(self) -> tuple[list[Row], Row]:
        most = max(self.ranges.shards)
        meshes = [(most // n, n) for n in self.ranges.shards]
        return self._sent(meshes), {}

    def devices(self) -> tuple[list[Row], Row]:
        rows = self._sent([(n, 1) for n in self.ranges.devices])
        return rows, {}

    def _sent(self, meshes: Sequence[tuple[int, int]]) -> list[Row]:
        return [
            {"data": data, "fsdp": fsdp, **_memory(program), **_sent(program)}
            for data, fsdp in meshes
            for program in [self.program(self._rows(1), data=data, fsdp=fsdp)]
        ]

    def _rows(self, wanted: int) -> int:
        """As many rows as each of a method's streams can have whole ones of, and microbatches can share."""
        streams = planned_method(self.experiment, self.data, self.teacher)[0].streams.values()
        units = [Fraction(s.rows).limit_denominator(1000) / self.experiment.accumulate for s in streams]
        return next(n for n in itertools.count(wanted) if all((n * unit).denominator == 1 for unit in units))

    def largest(self) -> tuple[list[Row], Row]:
        experiment = dataclasses.replace(self.experiment, batch_size=self._rows(max(self.ranges.batches)))
        one = {"data": 1, "fsdp": 1, "space": 1}
        kind = next(iter(KINDS.values()))  # what it is has no part in the line
        line = plan(Asked(experiment, self.data, one, kind, self.teacher), limit=1, say=self.say)["largest_batch"]
        fixed, each = line["bytes_without_rows"], line["bytes_per_row"]
        rows = []
        for gib in self.ranges.memories:
            memory = gib * GIB
            planned = self._whole((memory - fixed) / each)
            most, peak = self._filling(planned, memory, fixed)
            share = peak and peak / memory
            found = {"planned_batch": planned, "largest_batch": most, "peak_bytes": peak, "share": share}
            rows.append({"memory_gib": gib, **found})
        return rows, {"bytes_per_row": each, "bytes_without_rows": fixed}

    def _filling(self, rows: int, memory: float, fixed: float) -> tuple[int, int | None]:
        """(rows whose step fits into so many bytes and fills all but a hundredth of them, about; its peak)."""
        tried: dict[int, int] = {}
        while rows and rows not in tried:
            tried[rows] = self.program(rows).peak
            if 0.99 * memory <= tried[rows] <= memory or len(tried) == MOST_TRIES:
                break
            rows = self._whole(0.998 * rows * (memory - fixed) / (tried[rows] - fixed))
        return max(((n, peak) for n, peak in tried.items() if peak <= memory), default=(0, None))

    def _whole(self, rows: float) -> int:
        """As many rows, or the fewest less that streams and microbatches can share; 0 where none are left."""
        return next((n for n in range(int(rows), 0, -1) if self._rows(n) == n), 0)

    # ------------------------------------------------------------------- what is measured

    def neighbours(self) -> tuple[list[Row], Row]:
        find = jax.jit(nearest, static_argnums=2)

        def side(tiles: int) -> Callable[[], Any]:
            bank = np.random.default_rng(0).standard_normal((padded(tiles), CHANNELS), np.float32)
            arguments = jnp.asarray(bank), jnp.arange(padded(tiles)) < tiles
            return lambda: find(*arguments, NEIGHBOURS)

        return self._seconds({n: side(n) for n in self.ranges.tables}, "tiles")

    def refresh(self) -> tuple[list[Row], Row]:
        known = self.data._replace(statistics=self._with_tiles(max(self.ranges.tiles)))
        method, _ = planned_method(self.experiment, known, self.teacher)
        if method.refresh is None:
            self.say("refresh: left out, as this method keeps nothing that is rebuilt; the recipe cheng_both does")
            return [], {}
        refresh = method.refresh
        variables = jax.jit(method.init)(jax.random.key(0))
        mesh = make_mesh(Mesh(), jax.devices()[:1])
        made = noise(planned_batch(method, self.experiment, known, mesh), known.spec.num_classes)
        batch = jax.tree.map(jnp.asarray, next(iter(made.values())))
        rows = len(batch["row_valid"])

        def side(tiles: int) -> Callable[[], Any]:
            last = batch | {"row_valid": (jnp.arange(rows) < (tiles % rows or rows)).astype(jnp.uint8)}
            batches = [batch] * (math.ceil(tiles / rows) - 1) + [last]
            return lambda: refresh(variables.params, variables.stats, variables.memory, batches, 10**6)

        return self._seconds({n: side(n) for n in self.ranges.tiles}, "tiles")

    def _with_tiles(self, count: int) -> Any:
        return dataclasses.replace(self.data.statistics, tiles={"train": count})

    def build(self) -> tuple[list[Row], Row]:
        from sarjax.data.build import build
        from sarjax.data.store import open_directory
        from sarjax.data.synthesis import synthesize

        with tempfile.TemporaryDirectory() as folder:

            def side(scenes: int) -> tuple[int, Callable[[], None]]:
                self.say(f"build: {scenes} made-up scenes of {SCENE} x {SCENE} pixels")
                source = synthesize(Path(folder) / f"{scenes}", scenes, (SCENE, SCENE))

                def run() -> Path:
                    return build(
                        "whu_opt_sar", source, Path(folder) / f"records-{scenes}", "random_tile", overwrite=True
                    )

                return sum(open_directory(run()).statistics.tiles.values()), lambda: run() and None

            return self._seconds(dict(map(side, self.ranges.scenes)), "tiles")

    def _seconds(self, sides: Mapping[int, Callable[[], Any]], what: str) -> tuple[list[Row], Row]:
        found = timing.in_turns({str(n): side for n, side in sides.items()}, self.repetitions)
        rows = [{what: n, "seconds": found[str(n)], "seconds_each": found[str(n)]["median"] / n} for n in sides]
        return rows, _line(rows, what, "seconds") | {"exponent": _exponent(rows, what)}


def _memory(program: Program) -> Row:
    return {
        "peak_bytes": program.peak,
        "state_bytes": device_bytes(program.state),
        "temporaries_bytes": program.temporaries,
    }


def _sent(program: Program) -> Row:
    """What a device sends in a step, in rings, beside the least possible; host devices have no reduce-scatter."""
    found = program.collectives()
    sent, least = sum(one.sent for one in found), least_sent(program.state, program.sizes)
    by = {purpose: [one for one in found if program.purpose(one) == purpose] for purpose in ("parameters", "rows")}
    return {
        "collectives": {kind: round(n["count"]) for kind, n in sorted(totals(found).items())},
        "result_bytes": sum(one.times * one.size for one in found),
        "sent_bytes": round(sent),
        "least_bytes": least,
        "times_least": sent / least if least else None,
        "gathered_bytes": sum(one.times * one.size for one in by["parameters"]),
        "cut_bytes": sum(4 * x.size for x in jax.tree.leaves(program.state.params) if part(x) != x.shape),
        "rows_moved_bytes": sum(one.times * one.size for one in by["rows"]),
    }


def _line(rows: Sequence[Row], x: str, y: str) -> Row:
    """A straight line through all rows, by least squares of relative distances; notes how far each row is from it."""
    if len(rows) < 2:
        return {}
    at = np.array([row[x] for row in rows], float)
    value = np.array([row[y]["median"] if isinstance(row[y], dict) else row[y] for row in rows], float)
    slope, fixed = np.polyfit(at, value, 1, w=1 / value)
    off = (slope * at + fixed) / value - 1
    for row, one in zip(rows, off.tolist(), strict=True):
        row["line_off"] = one
    return {f"{y}_each": slope, f"{y}_fixed": fixed, "line_off_at_most": float(np.abs(off).max())}


def _exponent(rows: Sequence[Row], x: str) -> float | None:
    if len(rows) < 2:
        return None
    points = np.log([(row[x], row["seconds"]["median"]) for row in rows])
    return float(np.polyfit(points[:, 0], points[:, 1], 1)[0])
