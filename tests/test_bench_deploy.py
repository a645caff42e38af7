"""What a run costs where it is deployed, beside its teacher: figures that are all there, and nothing left by a failure.

Nothing here asserts how fast anything is.
"""

import json
import math
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import toy
import toy_dates
from test_export import batch_of
from verbs import fails, run

from sarjax.augment.inputs import channel_count
from sarjax.bench import deploy, worker
from sarjax.bench.deploy import bench_deploy
from sarjax.config import Augment, Inputs
from sarjax.errors import UserError
from sarjax.machine import visible_cores
from sarjax.models import build_network
from sarjax.models.cost import count
from sarjax.options import FCN, Distillation, Supervised
from sarjax.train import loop

pytestmark = pytest.mark.usefixtures("session_devices")

DATA = {"dataset": toy.dataset(), "say": lambda line: None}
LARGE = FCN(width=0.125, stages=1)
SMALL = FCN(width=0.0625, stages=1)
PARTS = ("arguments_bytes", "outputs_bytes", "temporaries_bytes", "weights_bytes")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A run whose teacher reads other bands and is twice as wide; what projects its features is no part of it."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = toy.config(Supervised(), network=LARGE, steps=1, inputs=Inputs(modalities=("optical",)))
    loop.train(teacher, folder / "teacher", **DATA)
    config = toy.config(Distillation(), network=SMALL, steps=1)
    state = loop.train(config, folder / "student", teacher=folder / "teacher", **DATA)
    assert "hfdm" in state.params
    return folder / "student"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of two dates, without a teacher."""
    return toy_dates.trained(tmp_path_factory.mktemp("runs") / "plain", augment=Augment(crop=23))


def candidates(of, against=None, head=""):
    return deploy._candidates(of, against, head, "best", lambda line: None)


@pytest.fixture
def made_up(monkeypatch):
    """Figures as of an accelerator, in no time; what was asked for."""
    asked = []

    def work(cores, rounds, files, what, say):
        asked.append((cores, rounds, len(files)))
        program = {"xla_flops": 1e6, **dict.fromkeys(PARTS[:3], 10), "n": rounds, "p50_ms": 1.0, "p99_ms": 2.0}
        return {
            "platform": "gpu", "device": "Accelerator 9", "cores": 4, "rss_start_bytes": None, "rss_peak_bytes": None,
            "programs": [{"file": file, **program} for file in files],
        }  # fmt: skip

    monkeypatch.setattr(deploy, "_work", work)
    return asked


# --- what is found


def test_a_student_beside_its_teacher(student):
    """The one test in which other processes measure."""
    said = []
    found = bench_deploy(student, size=16, repetitions=2, say=said.append)
    assert json.loads((student / "bench" / "deploy.json").read_text()) == found
    assert sorted(p.name for p in (student / "bench").iterdir()) == ["deploy.json"]
    assert (found["size"], found["batch"], found["repetitions"], found["platform"]) == (16, 1, 2, "cpu")
    assert {"sarjax", "jax", "jaxlib"} <= found["versions"].keys()
    assert "host memory" in found["measured"]
    assert found["processor"]
    ours, theirs = found["networks"]
    assert (ours["role"], theirs["role"]) == ("run", "teacher")
    assert (ours["network"], ours["width"], theirs["width"]) == ("fcn", 0.0625, 0.125)
    assert (ours["sensors"], theirs["sensors"], ours["channels"], theirs["channels"]) == (["sar"], ["optical"], 1, 2)
    assert 0 < ours["flops_share"] == ours["flops"] / theirs["flops"] < 1
    for network, c in zip(found["networks"], candidates(student), strict=True):
        experiment, spec = c.restored.config.experiment, c.restored.spec
        counted = count(build_network(experiment.network, spec.num_classes), 16, channel_count(experiment.inputs, spec))
        assert (network["parameters"], network["flops"]) == (counted.parameters, counted.flops)
        assert list(network["precisions"]) == ["float32", "bfloat16"]
        for facts in network["precisions"].values():
            numbers = [facts[key] for key in (*PARTS, "artifact_bytes", "xla_flops", "xla_peak_bytes")]
            numbers += [facts["rss_start_bytes"], facts["rss_peak_bytes"]] if sys.platform == "linux" else []
            assert facts["xla_peak_bytes"] == sum(facts[part] for part in PARTS)
            assert facts["weights_bytes"] < facts["artifact_bytes"]
            threads = [latency["threads"] for latency in facts["latency"]]
            assert threads == sorted({1, visible_cores()}, reverse=True)
            for latency in facts["latency"]:
                assert latency["n"] == 2
                assert latency["p50_ms"] <= latency["p99_ms"]
                numbers += [latency["p50_ms"], latency["p99_ms"]]
            assert all(math.isfinite(number) and number > 0 for number in numbers), facts
        held = [network["precisions"][p]["weights_bytes"] for p in ("float32", "bfloat16")]
        assert (
            held[1] < held[0] == 4 * network["parameters"] + 4 * sum(x.size for x in jax.tree.leaves(c.restored.stats))
        )
    text = " ".join(said)
    for part in ("run, float32: exported", "teacher, bfloat16: exported", "teacher-bfloat16 compiled", "one thread"):
        assert part in text or (part == "one thread" and visible_cores() == 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_measured_gives_the_labels_of_the_head(student, tmp_path, precision):
    for c in candidates(student):
        file = tmp_path / c.role
        facts = deploy._export(c, precision, 32, file)
        assert facts["artifact_bytes"] == file.stat().st_size
        batch = batch_of(c.restored.spec, c.restored.config.experiment.inputs.modalities, 1, 32, 32)
        labels = np.asarray(jax.export.deserialize(bytearray(file.read_bytes())).call(batch)["labels"])
        restored = c.restored.at_precision(precision)
        logits = np.asarray(restored.method.heads[c.name].predict(restored.params, restored.stats, batch))
        seen = np.any([batch[k].any(1) for k in batch if k.endswith("_valid")], 0)
        assert (labels == np.where(seen, logits.argmax(-1), 255)).mean() > {"float32": 0.999, "bfloat16": 0.97}[
            precision
        ]


def test_a_table_of_an_accelerator(student, plain, made_up, capsys):
    """Threads do not count there: each program is measured once."""
    capsys.readouterr()
    run("bench", "deploy", student, "--against", plain, "--size", 16, "--repetitions", 7)
    out, err = capsys.readouterr()
    for text in ("on gpu (Accelerator 9)", "against", "fcn resnet18 x0.0625", "share of these", "1.00 / 2.00", "n = 7"):
        assert text in out
    assert out.count("latency, Accelerator 9, p50 / p99 ms") == 2, "one for each precision"
    assert "deploy.json" in err
    assert made_up == [(0, 1, 1)] * 4 + [(0, 7, 4)]
    capsys.readouterr()
    run("bench", "deploy", plain, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [n["role"] for n in found["networks"]] == ["run"]
    assert "flops_share" not in found["networks"][0]
    assert found["size"] == 24, "of the crop, as far as the network's alignment allows"
    assert found["networks"][0]["precisions"]["float32"]["latency"][0]["threads"] is None
    assert found == json.loads((plain / "bench" / "deploy.json").read_text())


def test_the_size_fits_all_networks(student, plain):
    both = candidates(student)
    assert deploy._side(student, both, 0) == 32, "of the tiles"
    far = both[1].restored.method.heads["main"]
    heads = {"main": far._replace(context=far.context._replace(alignment=12))}
    wide = both[1]._replace(restored=both[1].restored._replace(method=both[1].restored.method._replace(heads=heads)))
    assert deploy._side(student, [both[0], wide], 0) == 36
    with pytest.raises(UserError, match=r"size is 16, but these networks take multiples of 12 pixels; 12 or 24 would"):
        deploy._side(student, [both[0], wide], 16)
    assert deploy._side(plain, candidates(plain), 48) == 48


def test_heads_by_name(tmp_path, plain):
    loop.train(toy.config(toy.Toy(), steps=1), tmp_path / "toy", **DATA)
    assert [c.name for c in candidates(tmp_path / "toy", plain, "other")] == ["other", "main"]
    assert [c.name for c in candidates(tmp_path / "toy", tmp_path / "toy", "other")] == ["other", "other"]


def test_percentiles_are_calls_that_took_place():
    assert worker.summary([3.0, 1.0, 2.0]) == {"n": 3, "p50_ms": 2.0, "p99_ms": 3.0}
    assert worker.summary([float(n) for n in range(1001)])["p99_ms"] == 990


def test_inputs_are_stored_numbers():
    kinds = {"a": np.uint8, "b": np.uint16, "c": np.float32, "a_valid": np.uint8}
    batch = worker.stored_numbers({k: jax.ShapeDtypeStruct((1, 2, 8, 8), dtype) for k, dtype in kinds.items()})
    assert {k: v.dtype for k, v in batch.items()} == kinds
    assert batch["a_valid"].all()
    assert batch["b"].max() > 255
    assert np.isfinite(batch["c"]).all()


# --- what fails


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repetitions", 0), "repetitions is 0; a whole number from 1 is accepted"),
        (("--size", 22), "size is 22, but this network takes multiples of 4 pixels; 20 or 24 would be accepted"),
        (("--size", -4), "size is -4, but this network takes multiples of 4 pixels; 4 would be accepted"),
        (("--size", 2**20), "size is 1048576; a side of at most 32768 pixels is accepted"),
        (("--head", "mian"), "'mian': did you mean 'main'"),
        (("--against", "gone"), "gone holds no run"),
    ],
)
def test_bad_input(tmp_path_factory, plain, capsys, options, message):
    before = {p.name for p in plain.iterdir()}
    assert message in fails(capsys, "bench", "deploy", plain, *options)
    assert {p.name for p in plain.iterdir()} == before


def test_no_such_run(tmp_path, capsys):
    assert "holds no run" in fails(capsys, "bench", "deploy", tmp_path / "gone")
    assert "unknown verb of sarjax bench 'depoly': did you mean 'deploy'" in fails(capsys, "bench", "depoly")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('progress: soon', file=sys.stderr); sys.exit('E: no room.')", "exit code 1: E: no room;"),
        ("import os; os.kill(os.getpid(), 9)", "ended with signal 9: it said nothing; a smaller --size"),
        ("print('no result')", "exit code 0: it said nothing"),
    ],
)  # fmt: skip
def test_a_measuring_process_that_fails(plain, tmp_path, monkeypatch, code, message):
    path = tmp_path / "worker.py"
    path.write_text(code)
    monkeypatch.setattr(deploy, "WORKER", path)
    kept = plain / "bench" / "deploy.json"
    before = kept.read_bytes() if kept.exists() else None
    said = []
    with pytest.raises(UserError, match=message) as e:
        bench_deploy(plain, size=16, say=said.append)
    assert str(e.value).count(". ") == 0, "one sentence"
    assert ("  soon" in said) == ("soon" in code)
    assert (kept.read_bytes() if kept.exists() else None) == before
    assert kept.parent.exists() == (before is not None)


def test_a_worker_says_in_one_line_what_went_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", str(deploy.WORKER), "0", "1", str(tmp_path / "gone")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("FileNotFoundError: ")
