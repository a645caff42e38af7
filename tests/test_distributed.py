"""Which launcher started a process is told from its environment; what all processes do alike is said once."""

import os

import pytest
from verbs import run

from sarjax.cli import distributed
from sarjax.cli.distributed import Place, detect, join, own_gpus
from sarjax.cli.training import _host_devices
from sarjax.config import Config, Execution, Experiment
from sarjax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[0-3]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "1,2(x2),3",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
}
# An interactive allocation of eight tasks, and a batch script's own shell, as SLURM 22.05 makes them.
INTERACTIVE = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
BATCH = {name: value for name, value in INTERACTIVE.items() if "STEP" not in name}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
ORTE = OMPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1:34911"}
TPU = {"TPU_WORKER_HOSTNAMES": "h0,h1", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
LOCAL = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:4000", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_")


@pytest.mark.parametrize(
    ("env", "name", "process", "processes", "here"),
    [
        (SLURM, "SLURM", 3, 8, 2),
        (INTERACTIVE, "SLURM", 0, 1, 1),
        (ORTE, "Open MPI", 1, 4, 2),
        (TPU, "TPU", 5, 6, 1),
        (TPU | POD | {"JOB_COMPLETION_INDEX": "1"}, "TPU", 5, 6, 1),
        (POD | {"JOB_COMPLETION_INDEX": "2"}, "Kubernetes", 2, None, 1),
        (LOCAL, "JAX_COORDINATOR_ADDRESS", 3, 4, 4),
        (LOCAL | INTERACTIVE, "JAX_COORDINATOR_ADDRESS", 3, 4, 4),
        (LOCAL | {"JAX_COORDINATOR_ADDRESS": "node0:4000"}, "JAX_COORDINATOR_ADDRESS", 3, 4, 1),
    ],
)
def test_launchers(env, name, process, processes, here):
    assert detect(env)[:4] == (name, process, processes, here)


def test_no_launcher():
    assert [detect(env) for env in ({}, BATCH, POD)] == [None, None, None]


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"JAX_COORDINATOR_ADDRESS": "node0:4000"}, "JAX_COORDINATOR_ADDRESS is set"),
        (LOCAL | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID is 'one'"),
    ],
)
def test_half_said(env, named):
    with pytest.raises(UserError, match=named):
        detect(env)


def test_what_jax_is_told():
    assert detect(SLURM).arguments == {"num_processes": 8}, "of the step"
    assert detect(ORTE).arguments == {}
    assert detect(OMPI).arguments == {"cluster_detection_method": "mpi4py"}, "Open MPI 5 says no address"
    assert detect(LOCAL).arguments["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("env", "gpus"),
    [
        (SLURM | {"SLURM_NODEID": "0", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, [0]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "2"}, [0, 1]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
        (SLURM, None),
        (LOCAL | {"CUDA_VISIBLE_DEVICES": "2,3"}, None),
    ],
)
def test_gpus_of_a_process(env, gpus):
    """A node to itself: all of it. Several tasks that see all GPUs: jax's rule. Its own shown alone: those."""
    assert own_gpus(detect(env), env) == gpus


@pytest.fixture
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def joined(clean):
    """The calls of jax.distributed.initialize, which does nothing."""
    calls = []
    clean.setattr("jax.distributed.initialize", lambda **arguments: calls.append(arguments))
    return calls


def test_joining_is_for_several(joined, capsys):
    """A single process, such as the shell of an interactive allocation, waits for nobody, unless it is told to."""
    for env, line in (
        (INTERACTIVE, "distributed: SLURM with one process"),
        ({}, "distributed: none found, one process"),
    ):
        place, say = join("auto", env)
        assert place == Place()
        assert capsys.readouterr().err == "", "an error is one line"
        say("a")
        say("b")
        assert capsys.readouterr().err.splitlines() == [line, "a", "b"]
    assert join("off", SLURM)[0] == Place()
    assert joined == []
    join("on", INTERACTIVE)
    join("auto", SLURM)
    assert [call["num_processes"] for call in joined] == [1, 8]
    with pytest.raises(UserError, match="--distributed on finds no launcher"):
        join("on", {})


def test_what_is_missing_is_said(joined, clean):
    clean.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    for env, package in ((POD | {"JOB_COMPLETION_INDEX": "0"}, "kubernetes"), (OMPI, "mpi4py")):
        with pytest.raises(UserError, match=package):
            join("auto", env)
    assert joined == []

    def refuses(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: too late.\nmore")

    clean.setattr("jax.distributed.initialize", refuses)
    with pytest.raises(UserError, match=r"SLURM started.*\(DEADLINE_EXCEEDED: too late\)"):
        join("auto", SLURM)


@pytest.mark.parametrize("args", [["nonsense"], ["ombria_s1", "--no-such-option"], ["ombria_s1", "--data", "x"]])
def test_a_wrong_command_is_said_once(args, clean, capsys):
    """By the first process alone; the others end with the same exit code."""
    for process, talks in (("0", True), ("1", False)):
        clean.setenv("SLURM_PROCID", process)
        for name, value in SLURM.items():
            clean.setenv(name, process if name == "SLURM_PROCID" else value)
        with pytest.raises(SystemExit) as e:
            run("train", *args)
        assert e.value.code == 2
        assert any(capsys.readouterr()) == talks
    with pytest.raises(SystemExit):
        run("train", *args, "--distributed", "off")
    assert any(capsys.readouterr()), "one that is alone talks"


def test_host_devices_of_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr("sarjax.machine.os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("sarjax.machine.os.cpu_count", lambda: 8)
    new = tmp_path / "new"
    config = Config(experiment=Experiment(batch_size=24))
    assert [_host_devices(new, config, Place(0, n, here)) for n, here in ((1, 1), (2, 1), (2, 2), (4, 4))] == [
        8,
        6,
        4,
        2,
    ]
    asked = Config(experiment=config.experiment, execution=Execution(host_devices=4))
    assert [_host_devices(new, asked, Place(0, n, n)) for n in (1, 2, 4)] == [4, 2, 1]
    (tmp_path / "manifest.json").write_text('{"host_devices": 4}')
    assert [_host_devices(tmp_path, config, Place(0, n, n)) for n in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match="3 processes cannot share 4 host devices"):
        _host_devices(tmp_path, config, Place(0, 3, 3))
