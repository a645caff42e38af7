"""Several processes as one run: which launcher started this one, and joining the others.

jax finds the others itself (`jax.distributed.initialize`). Here is only whether to ask it, since it would take an
interactive allocation for a cluster and wait for processes that nobody started, and what it cannot know.
"""

import contextlib
import importlib.util
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sarjax.cli.common import note
from sarjax.errors import UserError

OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ACCEPTED = (
    f"a SLURM step, Open MPI, an indexed Kubernetes Job, a TPU slice, or {', '.join(OURS[:2])} and {OURS[2]} "
    "(launch/local.py)"
)


class Launcher(NamedTuple):
    """What started this process. process, processes: None where only jax finds out. here: processes on this machine.
    arguments: for jax.
    """

    name: str
    process: int | None = None
    processes: int | None = None
    here: int = 1
    arguments: Mapping[str, Any] = {}


class Place(NamedTuple):
    """Of this process in the run: its number, of how many, and how many of them are on this machine."""

    process: int = 0
    processes: int = 1
    here: int = 1


def detect(env: Mapping[str, str]) -> Launcher | None:
    """The launcher that the environment speaks of, in jax's own order; None = none. UserError where it is half said."""
    if any(name in env for name in OURS[1:]):
        missing = [name for name in OURS if name not in env]
        if missing:
            raise UserError(
                f"{missing[0]} is not set beside the others of {', '.join(OURS)}; all or none are accepted."
            )
        address, processes = env[OURS[0]], _number(env, OURS[1])
        here = processes if re.match(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]):", address) else 1
        known = {"process_id": _number(env, OURS[2]), "num_processes": processes, "coordinator_address": address}
        # What else the machine looks like, such as an allocation around the launcher, is not asked.
        known["cluster_detection_method"] = "deactivate"
        return Launcher(OURS[0], known["process_id"], processes, here, known)
    if "OMPI_COMM_WORLD_SIZE" in env:
        numbers = [_number(env, f"OMPI_COMM_WORLD_{what}") for what in ("RANK", "SIZE", "LOCAL_SIZE")]
        # Up to version 4 it says where the first process is; later ones leave that to MPI.
        how = {} if "OMPI_MCA_orte_hnp_uri" in env else {"cluster_detection_method": "mpi4py"}
        return Launcher("Open MPI", *numbers, how)
    if all(f"SLURM_{what}" in env for what in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")):
        # Of this step: an interactive one keeps the SLURM_NTASKS of its allocation and is one process all the same.
        processes = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
        arguments = {"num_processes": processes}
        return Launcher("SLURM", _number(env, "SLURM_PROCID"), processes, _slurm_tasks_here(env), arguments)
    if hosts := env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES"):
        count, slices = len(hosts.split(",")), _number(env, "MEGASCALE_NUM_SLICES", 1)
        process = _number(env, "MEGASCALE_SLICE_ID", 0) * count + _number(env, "TPU_WORKER_ID", 0)
        return Launcher("TPU", process, count * slices)
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return Launcher("Kubernetes", _number(env, "JOB_COMPLETION_INDEX"))
    if OURS[0] in env:
        raise UserError(f"{OURS[0]} is set, but neither {OURS[1]} and {OURS[2]} nor a launcher that says them.")
    return None


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} is {value!r}; a whole number is accepted.")
    return int(value)


def _slurm_tasks_here(env: Mapping[str, str]) -> int:
    """Of SLURM_STEP_TASKS_PER_NODE, such as "4(x2),3": four on the first two nodes and three on the next."""
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(nodes or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def own_gpus(launcher: Launcher, env: Mapping[str, str]) -> list[int] | None:
    """The visible GPUs that are this process's own, where jax would guess wrong; None = leave it to jax.

    Under SLURM and Open MPI jax gives process i of a machine the GPU i of those that it sees. That is wrong where a
    process has its machine to itself, and where the scheduler shows to each process its own GPUs alone.
    """
    visible = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    own = launcher.here == 1 or len(visible) == 1 or "SLURM_GPUS_PER_TASK" in env
    asked = "JAX_LOCAL_DEVICE_IDS" in env or launcher.name not in ("SLURM", "Open MPI")
    return list(range(len(visible))) if visible and own and not asked else None


def join(mode: str, env: Mapping[str, str] = os.environ) -> tuple[Place, Callable[[str], None]]:
    """This process's place in the run, having joined the others, and where its notices go: process 0 alone talks.

    mode: "auto" joins where more than one process was started, "on" insists, "off" never does. One line says what was
    found: at once where others were, else before the first notice. Has to come before any other computation of jax.
    """
    if mode == "off":
        return Place(), note
    import jax

    launcher = detect(env)
    # jax says so in the environment where there is no TPU; what else there is to know is at the cloud's own server.
    if launcher is None and importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in os.environ:
        launcher = Launcher("TPU")
    if launcher is None:
        if mode == "on":
            raise UserError(f"--distributed on finds no launcher here: {ACCEPTED} would be accepted.")
        return Place(), _after("distributed: none found, one process", note)
    if launcher.processes == 1 and mode == "auto":
        return Place(), _after(f"distributed: {launcher.name} with one process", note)
    for package, extra, needed in (
        ("kubernetes", "sarjax[gke]", launcher.name == "Kubernetes"),
        ("mpi4py", "mpi4py", launcher.arguments.get("cluster_detection_method") == "mpi4py"),
    ):
        if needed and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{launcher.name} started this process, and jax needs the package {package} to find the others: "
                f"`pip install '{extra}'`, or --distributed off to train in each alone."
            )
    try:
        jax.distributed.initialize(local_device_ids=own_gpus(launcher, env), **launcher.arguments)
    except (RuntimeError, ValueError, OSError, LookupError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise UserError(
            f"{launcher.name} started this process, but jax did not find the others ({reason}); --distributed off "
            "trains in each process alone."
        ) from e
    from jax._src.distributed import global_state as found  # the public functions would start the devices already

    place = Place(found.process_id, found.num_processes, launcher.here)
    name = "" if launcher.name == OURS[0] else f"{launcher.name}, "
    say = note if place.process == 0 else lambda text: None
    say(f"distributed: {name}process 0 of {place.processes}, coordinator {found.coordinator_address}")
    return place, say


def _after(line: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """`say`, with `line` before the first that is said: an error stays one line."""
    pending = [line]

    def speak(text: str) -> None:
        while pending:
            say(pending.pop())
        say(text)

    return speak


@contextlib.contextmanager
def said_once(args: tuple[str, ...], env: Mapping[str, str] = os.environ) -> Iterator[None]:
    """What every process finds wrong with the same command is said by the first alone; exit codes are as ever."""
    off = "--distributed=off" in args or ("--distributed", "off") in itertools.pairwise(args)
    launcher = None if off else detect(env)
    if launcher is None or launcher.processes == 1 or not launcher.process:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except UserError:
            sys.exit(2)


@contextlib.contextmanager
def ending_all(place: Place) -> Iterator[None]:
    """What ends one of several processes ends it at once, so that the others see it gone and end too.

    An ordinary exit waits at jax's barrier, for minutes, for processes that wait for this one in a collective.
    """
    try:
        yield
    except BaseException as error:
        if place.processes == 1:
            raise
        who, code = f"sarjax, process {place.process} of {place.processes}", 1
        if isinstance(error, UserError):
            note(f"{who}: {error}")
            code = 2
        elif isinstance(error, KeyboardInterrupt):
            note(f"{who}: interrupted")
            code = 130
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
