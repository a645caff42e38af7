"""A trained run as somebody else's teacher: copied once, checked at every start, frozen, in no checkpoint.

It is also how a run starts from another run's parameters (`--init-from`).
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sarjax import config as configs
from sarjax.errors import UserError
from sarjax.evaluate.evaluator import on_host
from sarjax.files import file_digest, write_atomically
from sarjax.methods import build_method
from sarjax.methods.record import Context, Method, Schedule, Teacher, Tree, Variables
from sarjax.spec import DatasetSpec
from sarjax.train.mesh import flatten, infer_sharding, place
from sarjax.train.run import (
    Restored,
    make_schedule,
    newest_whole,
    read_config,
    read_data_description,
    read_manifest,
    restore_run,
    sync,
)

Say = Callable[[str], None]
FILES = ("config.json", "spec.json", "stats.json", "weights.safetensors")


def adopt(teacher_run: Path, workdir: Path, mesh: jax.sharding.Mesh, *, say: Say = print) -> None:
    """Copies the weights, configuration and data description of `teacher_run` into `workdir/teacher/`, once.

    From then on the copy is the teacher: what becomes of `teacher_run` does not matter, and where it has gone on, that
    is said. UserError when the copy is of another experiment, and when the run in `workdir` was taught by another one.
    """
    from safetensors.numpy import save_file

    target = workdir / "teacher"
    if target.exists():
        if (teacher_run / "config.json").exists():
            changed = configs.difference(read_config(target).experiment, read_config(teacher_run).experiment)
            if changed:
                raise UserError(
                    f"{target} is a copy of another teacher than {teacher_run} ({'; '.join(changed)}); another "
                    "--workdir, or the same teacher, would be accepted."
                )
            checkpoints, step = newest_whole(teacher_run, ("best", "checkpoints"), say)
            origin = read_origin(target)
            now, then = f"{checkpoints.directory.name}/{step}", origin["checkpoint"]
            if origin["run"] != str(teacher_run):
                say(f"{target} is a copy of {origin['run']}, not of {teacher_run}, and goes on teaching")
            elif now != then:
                say(f"{teacher_run} has {now} by now; its copy in {target}, of {then}, goes on teaching")
        return
    restored = restore_run(teacher_run, mesh, say=say)
    goal, (newest, step) = _goal(restored), newest_whole(teacher_run, ("checkpoints", "best"), say)
    if newest.directory.name == "checkpoints" and step < goal:  # a run that keeps its best alone may have gone on
        say(f"{teacher_run} is trained to step {step} of {goal} only, and teaches as it is")
    leaves = flatten({"params": restored.params, "stats": restored.stats})
    arrays = {name: on_host(leaf) for name, leaf in leaves.items()}
    if jax.process_index() == 0:
        temporary = workdir / ".teacher.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in FILES[:3]:
            shutil.copyfile(teacher_run / name, temporary / name)
        save_file(arrays, temporary / "weights.safetensors")
        found, known = fingerprint(temporary), read_manifest(workdir).get("teacher")
        if known not in (None, found):
            shutil.rmtree(temporary)
            raise UserError(
                f"{workdir} was taught by another teacher than {restored.checkpoint} of {teacher_run}; that one, put "
                f"back in {target}, or another --workdir would be accepted."
            )
        origin = {"fingerprint": found, "run": str(teacher_run), "checkpoint": restored.checkpoint}
        write_atomically(temporary / "origin.json", json.dumps(origin, indent=1) + "\n")
        temporary.rename(target)
    sync("teacher")


def fingerprint(folder: Path) -> str:
    """sha256 over the teacher's files."""
    digests = [file_digest(folder / name)[1] for name in FILES]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_origin(folder: Path) -> dict[str, str]:
    """Of a copy: its "fingerprint", and "run" and "checkpoint" that it was made of. UserError where it is damaged."""
    try:
        origin = json.loads((folder / "origin.json").read_text(encoding="utf-8"))
        return {name: origin[name] for name in ("fingerprint", "run", "checkpoint")}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise _damaged(folder) from e


def _damaged(folder: Path) -> UserError:
    return UserError(f"the teacher in {folder} is damaged: its files are not those that were copied; restore them.")


def _goal(run: Restored) -> int:
    """The last step of a run, as it was last asked for."""
    first = next(iter(run.method.streams.values()))
    steps = make_schedule(run.config.experiment, first, run.statistics.tiles["train"]).steps
    return read_manifest(run.workdir).get("extended_to") or steps


def describe(folder: Path, precision: str) -> Teacher:
    """The teacher in `folder`, a run or the copy in `RUN/teacher`, without its weights.

    precision: the compute dtype of its student, in which it is run too.
    """
    experiment = dataclasses.replace(read_config(folder).experiment, precision=precision)
    spec, statistics = read_data_description(folder)
    method = build_method(Context(experiment, spec, statistics, Schedule(1, 1, 1)), for_inference=True)
    return Teacher(method, experiment, spec, statistics)


def restore(workdir: Path, mesh: jax.sharding.Mesh) -> Restored:
    """The teacher in `workdir/teacher/` as a run of its own, ready to predict; errors as for `load`."""
    folder = workdir / "teacher"
    config, variables = read_config(folder), load(workdir, mesh)
    teacher, checkpoint = describe(folder, config.experiment.precision), read_origin(folder)["checkpoint"]
    step = int(checkpoint.rpartition("/")[2])
    return Restored(
        folder,
        config,
        teacher.spec,
        teacher.statistics,
        teacher.method,
        variables.params,
        variables.stats,
        step,
        checkpoint,
    )


def load(workdir: Path, mesh: jax.sharding.Mesh) -> Variables:
    """The variables of the teacher in `workdir/teacher/`, sharded by the rules of the state.

    UserError when its files are not those that were adopted.
    """
    folder = workdir / "teacher"
    origin = read_origin(folder)
    try:
        found = fingerprint(folder)
    except OSError as e:
        raise _damaged(folder) from e
    if found != origin["fingerprint"] or found != read_manifest(workdir).get("teacher", found):
        raise UserError(f"the files in {folder} have changed since the run began; restore them or start a new run.")
    variables = read_weights(folder / "weights.safetensors")
    return jax.tree.map(place, variables, infer_sharding(mesh, variables))


def read_weights(path: Path) -> Variables:
    from safetensors.numpy import load_file

    tree: dict[str, Any] = {"params": {}, "stats": {}}
    for name, array in load_file(path).items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return Variables(tree["params"], tree["stats"], {})


def _without_inputs(kernel: Any) -> tuple[int, ...]:
    """The shape (height, width, in, out) of a convolution, but for the channels that it reads."""
    return (*kernel.shape[:2], *kernel.shape[3:])


def warm_start(state: Any, run: Path, method: Method, spec: DatasetSpec, mesh: jax.sharding.Mesh, say=print) -> Any:
    """`state` with the parameters and statistics of `run` wherever path and shape agree.

    method: of `state`. What a method has beside its network (`Method.beside`) stays fresh.

    spec: of this run's data. Where its classes have other names than those of `run`, the leaves whose last axis is the
    class count (the heads) keep their fresh values; so does an encoder's first convolution where it reads another
    number of channels (other sensors). Any other difference is a UserError that names the first leaf.
    """
    source = restore_run(run, mesh, say=say)
    classes = source.spec.num_classes
    same_classes = source.spec.class_names == spec.class_names
    fresh: list[str] = []
    beside = {*source.method.beside, *method.beside}

    def merge(new: Tree, old: Tree, what: str) -> Tree:
        old_leaves, new_leaves = (
            {name: leaf for name, leaf in flatten(tree).items() if name.split("/")[0] not in beside}
            for tree in (old, new)
        )
        for name in sorted(old_leaves.keys() ^ new_leaves.keys()):
            raise UserError(f"{run} has another network than this experiment: {what}/{name} is in only one of them.")

        def leaf(path: Any, value: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name.split("/")[0] in beside:
                fresh.append(name)
                return value
            theirs = old_leaves[name]
            head = theirs.shape[:-1] == value.shape[:-1] and theirs.shape[-1:] == (classes,)
            if theirs.shape == value.shape and (same_classes or not head):
                return jax.device_put(theirs, value.sharding)
            stem = name.endswith("encoder/conv1/kernel") and _without_inputs(theirs) == _without_inputs(value)
            if stem or (head and not same_classes and value.shape[-1] == spec.num_classes):
                fresh.append(name)
                return value
            raise UserError(
                f"{run} has another network than this experiment: {what}/{name} has shape {theirs.shape} there and "
                f"{value.shape} here."
            )

        return jax.tree_util.tree_map_with_path(leaf, new)

    params, stats = merge(state.params, source.params, "params"), merge(state.stats, source.stats, "stats")
    say(f"started from {run} ({source.checkpoint})" + (f"; fresh: {', '.join(fresh)}" if fresh else ""))
    ema = None if state.ema is None else jax.tree.map(lambda p: p.copy(), params)
    return state.replace(params=params, stats=stats, ema=ema)
