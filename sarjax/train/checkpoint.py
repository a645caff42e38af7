"""Checkpoints: written in the background, given digests once final, verified before they are trusted.

orbax does not checksum what it stores: a flipped byte would come back as a silently wrong number. So process 0
writes {file: [size, sha256]} beside every finished step, and restoring walks from the newest step to the oldest
until one is whole. The only importer of orbax.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sarjax.errors import UserError
from sarjax.files import file_digest, write_atomically

NO_STEP, NONE_WHOLE = -1, -2


def _write_first_copies() -> None:
    """What is on several devices is written by the first.

    By default each writes a part, which programs of their own, one a shape, cut out: the first checkpoint of a run
    would wait for their compilation, 1.5 s on two cores.
    """
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that this takes the place of another is meant
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    logger.setLevel(level)


_write_first_copies()


class Checkpoints:
    """The checkpoints in one directory.

    keep: how many of the newest stay. say: where one-line notices go.
    """

    def __init__(self, directory: Path, *, keep: int = 2, say: Callable[[str], None] = print, read_only: bool = False):
        self.directory, self.say = Path(directory).resolve(), say
        # Two managers that save at once must not wait at each other's barriers.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.directory.name)
        if read_only:
            how = {"save_interval_steps": 0, "create": False, "read_only": True}
        else:
            how = {"max_to_keep": keep, "cleanup_tmp_directories": True}
        options = ocp.CheckpointManagerOptions(multiprocessing_options=barriers, **how)
        handlers = {"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self._leader = jax.process_index() == 0 and not read_only

    def steps(self) -> list[int]:
        """Steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Begins to save; returns when the state may be overwritten. A step that is there already stays.

        UserError, now or in the calls below, where the files cannot be written.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        with self._writing():
            saved = self._manager.save(step, args=args)
        if not saved:
            raise RuntimeError(f"step {step} was not saved: {self.directory} holds {self.steps()}")

    def forget_after(self, step: int) -> None:
        """Deletes what is of later steps than `step`."""
        for later in [s for s in self.steps() if s > step]:
            self._manager.delete(later)

    def poll(self) -> None:
        """Writes the digests of what has become final since; cheap, meant for every step."""
        with self._writing():
            self._manager.check_for_errors()
        if self._leader and not self._manager.is_saving_in_progress():
            self._seal()

    def wait(self) -> None:
        """Returns when everything saved is final and has its digests."""
        with self._writing():
            self._manager.wait_until_finished()
        if self._leader:
            self._seal()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """Whether a scheduler's warning has reached all processes (they agree on the step)."""
        return self._manager.reached_preemption(step)

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (state, position); None where there is none at all.

        abstract: shapes, dtypes and today's shardings. Damaged steps are named and, but for a reader, moved to
        `damaged/` beside the directory; UserError when there are checkpoints but none is whole. All processes call it.
        """
        # One process looks and all follow it: what it sets aside would be there for some and gone for others.
        found = NO_STEP if jax.process_index() else self._newest_whole()
        step = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if not self._leader:
            self._manager.reload()
        if step == NONE_WHOLE:
            raise UserError(
                f"no checkpoint in {self.directory} is whole; remove the directory to start the run from step 0."
            )
        return None if step == NO_STEP else self.restore_step(step, abstract)

    def _newest_whole(self) -> int:
        """The newest step that is whole, NONE_WHOLE, or NO_STEP."""
        steps = self.steps()
        for step in reversed(steps):
            fault = self.fault(step)
            if fault is None:
                return step
            self.say(f"checkpoint {self.directory.name}/{step} is damaged: {fault}; trying the one before.")
            if self._leader:
                self._set_aside(step)
        return NONE_WHOLE if steps else NO_STEP

    def restore_step(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The checkpoint of one step, unverified; UserError where it does not fit `abstract`."""
        try:
            items = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
            )
        except ValueError as e:
            raise UserError(
                f"checkpoint {self.directory}/{step} does not fit this experiment's network: {str(e).splitlines()[0]}"
            ) from e
        return items["state"], items["position"]

    def position(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of a step, unverified."""
        return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]

    def stored(self, step: int) -> Any:
        """Shapes and dtypes of the saved state as plain nested dicts and lists, read from the files."""
        tree = self._manager.item_metadata(step).state.tree
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), tree)

    def fault(self, step: int) -> str | None:
        """What is wrong with the files of a step; None when they are as written."""
        try:
            digests = json.loads(self._digests(step).read_text())
        except FileNotFoundError:
            return "it was never finished (no digests)"
        except ValueError:
            return f"{self._digests(step).name} cannot be read"
        root = self.directory / str(step)
        for name, (size, digest) in digests.items():
            path = root / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if file_digest(path)[1] != digest:
                return f"the contents of {name} have changed"
        return None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What the operating system does not let orbax write is a UserError; other mistakes stay what they are."""
        try:
            yield
        except Exception as e:
            reason = e.strerror if isinstance(e, OSError) else _system_error(str(e))
            if reason is None:
                raise
            steps = [step for step in self.steps() if self.fault(step) is None]
            name = self.directory.name
            newest = f"{name}/{steps[-1]} is the newest that is whole" if steps else f"{name}/ has none that is whole"
            raise UserError(
                f"cannot save to {self.directory}: {reason}; {newest}, and with room to write the same command goes on."
            ) from e

    def _digests(self, step: int) -> Path:
        return self.directory / f"{step}.digests.json"

    def _seal(self) -> None:
        steps = self.steps()
        for step in steps:
            if not self._digests(step).exists():
                root = self.directory / str(step)
                files = sorted(p for p in root.rglob("*") if p.is_file())
                digests = {str(p.relative_to(root)): file_digest(p) for p in files}
                write_atomically(self._digests(step), json.dumps(digests, indent=0))
        for path in self.directory.glob("*.digests.json"):
            if int(path.name.split(".")[0]) not in steps:
                path.unlink()

    def _set_aside(self, step: int) -> None:
        aside = self.directory.parent / "damaged"
        aside.mkdir(exist_ok=True)
        target = aside / f"{self.directory.name}-{step}"
        shutil.rmtree(target, ignore_errors=True)
        (self.directory / str(step)).rename(target)
        self._digests(step).unlink(missing_ok=True)
        self._manager.reload()


def _system_error(text: str) -> str | None:
    """What the operating system said, of an error that tensorstore wraps in text; None for any other error."""
    before, mark, _ = text.partition("[os_error_code=")
    return before.strip().rsplit(": ", 1)[-1] if mark else None
