"""The command line as a user meets it: each verb for real on tiny files, and one sentence for what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from verbs import SHRINK, fails, run

from sarjax.cli.common import devices
from sarjax.data.store import open_dataset
from sarjax.machine import visible_cores

pytestmark = pytest.mark.usefixtures("session_devices")


@pytest.fixture(scope="module")
def trained(fake_records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "ün run"
    run("train", "ombria_s1", "--workdir", workdir, "--data-dir", fake_records, *SHRINK)
    return workdir


def test_eval_prints_and_writes(trained, fake_records, capsys):
    capsys.readouterr()
    run("eval", trained)
    out = capsys.readouterr().out
    assert "flood" in out
    assert "kappa" in out
    names = {p.name for p in (trained / "eval").iterdir()}
    assert names == {"val-best.json", "val-best.csv", "val-best.png"}
    looks = json.loads((trained / "manifest.json").read_text()).get("test_looks", [])
    assert looks == []
    run("eval", trained, "--split", "test", "--checkpoint", "last", "--json")
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["pooled"]["macro"]["iou"] <= 1
    assert 0 < found["pooled"]["map"] <= 1
    assert found["step"] == 2
    assert "scores" not in found
    assert "scores" in json.loads((trained / "eval" / "test-last.json").read_text())
    looks = json.loads((trained / "manifest.json").read_text())["test_looks"]
    assert [look["checkpoint"] for look in looks] == ["checkpoints/2"]
    assert "kept no running mean" in fails(capsys, "eval", trained, "--ema")
    assert "main" in fails(capsys, "eval", trained, "--head", "man")


def test_show(trained, capsys):
    capsys.readouterr()
    run("show", trained)
    assert "ombria_s1" in capsys.readouterr().out
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    run("show", trained, "--json")
    assert json.loads(capsys.readouterr().out)["step"] == 2


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_heights_that_devices_do_not_divide(fake_records, tmp_path, capsys):
    odd = ("--workdir", tmp_path / "run", "--data-dir", fake_records, *SHRINK, "--mesh.space", 3)
    message = fails(capsys, "train", "ombria_s1", *odd)
    assert "execution.mesh.space is 3, which does not divide images of 64 lines" in message
    small = (*odd[:-2], "--mesh.data", 2, "--mesh.space", 2)
    message = fails(capsys, "train", "ombria_s1", *small)
    assert "images of 64 lines are too small to be cut into strips beside rows" in message


def test_the_same_command_again(trained, fake_records, capsys):
    capsys.readouterr()
    run("train", "ombria_s1", "--workdir", trained, "--data-dir", fake_records, *SHRINK)
    assert "trained to its last step" in capsys.readouterr().err


def test_the_written_config_runs_again(trained, fake_records, tmp_path, capsys):
    """config.json holds all of a run: another run from it is the same to the bit, on the same data only."""
    file = tmp_path / "config.json"
    shutil.copy(trained / "config.json", file)
    run("train", file, "--workdir", tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == file.read_bytes()
    assert losses(tmp_path / "again") == losses(trained)
    assert len(losses(trained)) > 0
    capsys.readouterr()
    run("train", file, "--workdir", trained)
    assert "trained to its last step" in capsys.readouterr().err
    other = json.loads(file.read_text())
    other["experiment"]["data"]["fingerprint"] = "0" * 16
    file.write_text(json.dumps(other))
    message = fails(capsys, "train", file, "--workdir", tmp_path / "other")
    assert "000000" in message
    assert "--data-dir" in message
    assert not (tmp_path / "other").exists()


def test_fields_change_what_a_config_says(trained, tmp_path):
    run("train", trained / "config.json", "--workdir", tmp_path / "run", "--seed", "5", "--steps", "1")
    experiment = json.loads((tmp_path / "run" / "config.json").read_text())["experiment"]
    assert (experiment["seed"], experiment["steps"], experiment["network"]["width"]) == (5, 1, 0.0625)


def test_a_config_that_cannot_be_used(trained, tmp_path, capsys):
    file = tmp_path / "config.json"
    assert str(file) in fails(capsys, "train", file, "--workdir", tmp_path / "x")
    for text in ("{", "[]", '{"experimnt": {}}'):
        file.write_text(text)
        assert str(file) in fails(capsys, "train", file, "--workdir", tmp_path / "x")
    shutil.copy(trained / "config.json", file)
    assert "takes none" in fails(capsys, "train", file, "--preset", "cpu", "--workdir", tmp_path / "x")
    for args, key in [(("--batch-size", "0"), "batch_size"), (("--host-devices", "-2"), "host_devices")]:
        assert key in fails(capsys, "train", file, "--workdir", tmp_path / "x", *args)
    assert not (tmp_path / "x").exists()


def test_the_fingerprint_is_no_option(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("train", "ombria_s1", "--help")
    out = capsys.readouterr().out
    assert "--data.labelled" in out
    assert "--data.fingerprint" not in out
    run("train", "--help")
    assert "config.json" in capsys.readouterr().out


def test_init_from_another_run(trained, fake_records, tmp_path, capsys):
    fresh, warm = tmp_path / "fresh", tmp_path / "warm"
    one = ["--data-dir", fake_records, *SHRINK, "--steps", "1", "--seed", "3"]
    run("train", "ombria_s1", "--workdir", fresh, *one)
    capsys.readouterr()
    run("train", "ombria_s1", "--workdir", warm, "--init-from", trained, *one)
    assert f"started from {trained}" in capsys.readouterr().err
    assert losses(warm) != losses(fresh)
    wider = fails(
        capsys, "train", "ombria_s1", "--workdir", tmp_path / "x", *one, "--network.width", "0.125", "--init-from", warm
    )
    assert "another network" in wider
    assert "--init-from" in fails(capsys, "train", "ombria_s1", "--workdir", tmp_path / "x", "--init-from", tmp_path)
    assert not (tmp_path / "x").exists()


def test_extend_steps(trained, fake_records, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    command = ["train", "ombria_s1", "--workdir", workdir, "--data-dir", fake_records, *SHRINK]
    for steps in ("1", "2"):
        assert f"--extend-steps {steps}" in fails(capsys, *command, "--extend-steps", steps)
    run(*command, "--extend-steps", "3")
    assert [step for step, _ in losses(workdir)][-1] == 3
    capsys.readouterr()
    run(*command)
    assert "trained to its last step, 3" in capsys.readouterr().err
    assert "--extend-steps 2" in fails(capsys, *command, "--extend-steps", "2")
    assert "no run" in fails(
        capsys,
        "train",
        "ombria_s1",
        "--workdir",
        tmp_path / "x",
        "--data-dir",
        fake_records,
        *SHRINK,
        "--extend-steps",
        "9",
    )


def test_events_and_manifest(fake_records, tmp_path):
    workdir = tmp_path / "run"
    shrink = [a for a in SHRINK if a != "--no-tensorboard"]
    run("train", "ombria_s1", "--workdir", workdir, "--data-dir", fake_records, *shrink)
    assert [p for p in (workdir / "events").iterdir() if p.name.startswith("events.out.tfevents")]
    (start,) = json.loads((workdir / "manifest.json").read_text())["starts"]
    assert start["cores"] == visible_cores()
    assert start["mesh"] == {"data": 1, "fsdp": 1, "space": 1}
    assert start["command"] == sys.argv
    assert start["step"] == 0


def test_damaged_files_are_named(trained, fake_records, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "manifest.json").write_text('{"host_devices": 1')
    again = ["train", "ombria_s1", "--workdir", workdir, "--data-dir", fake_records, *SHRINK]
    for command in (again, ["eval", workdir], ["show", workdir]):
        assert f"{workdir / 'manifest.json'} is damaged" in fails(capsys, *command)
    copy = shutil.copytree(fake_records, tmp_path / "records")
    shard = next(copy.glob("ombria/*/ombria-train*"))
    shard.write_bytes(shard.read_bytes()[:100_000])
    for command in (
        ["train", "ombria_s1", "--workdir", tmp_path / "new", "--data-dir", copy, *SHRINK],
        ["data", "show", "ombria", "--data-dir", copy, "--out", tmp_path / "sheet.png"],
    ):
        assert f"{shard} is damaged" in fails(capsys, *command)
    (shard.parent / "features.json").write_text("{")
    assert "features.json" in fails(capsys, "data", "show", "ombria", "--data-dir", copy)


def test_results_that_cannot_be_written(trained, tmp_path, capsys, monkeypatch):
    """Found before the look at the test split is noted, and before anything is evaluated."""
    workdir = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    (workdir / "eval").write_text("a file")
    before = (workdir / "manifest.json").read_bytes()
    monkeypatch.setattr("sarjax.train.feed.run_evaluation", None)
    message = fails(capsys, "eval", workdir, "--split", "test")
    assert f"cannot write to {workdir / 'eval'}" in message
    assert (workdir / "manifest.json").read_bytes() == before


def test_panels(trained, fake_records, tmp_path):
    from PIL import Image

    from sarjax.errors import UserError
    from sarjax.reports.run import draw_panels

    paths = [draw_panels({"prediction": trained}, tmp_path / f"{n}.png", split="test", tiles=n) for n in (1, 99)]
    one, all_of_them = (np.asarray(Image.open(p).convert("RGB")) for p in paths)
    assert all_of_them.shape[0] > 1.5 * one.shape[0], "there are two test tiles"
    assert all_of_them.shape[1] == one.shape[1]
    for colour in open_dataset("ombria", data_dir=fake_records).spec.palette:
        assert (one == colour).all(-1).any()
    with pytest.raises(UserError, match="did you mean 'test'"):
        draw_panels({"prediction": trained}, tmp_path / "x.png", split="tset")
    other = shutil.copytree(trained, tmp_path / "other")
    d = json.loads((other / "config.json").read_text())
    d["experiment"]["data"]["fingerprint"] = "0" * 16
    (other / "config.json").write_text(json.dumps(d))
    with pytest.raises(UserError, match=r"is not what .*other was trained on"):
        draw_panels({"prediction": other}, tmp_path / "x.png")


def test_data_show_and_stats(fake_records, tmp_path, capsys):
    run("data", "show", "ombria", "--data-dir", fake_records, "--out", tmp_path / "ä.png", "--tiles", "2")
    assert (tmp_path / "ä.png").read_bytes().startswith(b"\x89PNG")
    assert "flood" in capsys.readouterr().out
    folder = next((fake_records / "ombria").iterdir())
    before = (folder / "stats.json").read_bytes()
    run("data", "stats", folder)
    assert (folder / "stats.json").read_bytes() == before
    for wrong, message in [
        (("--split", "trian"), "did you mean 'train'"),
        (("--out", tmp_path / "a" / "b.png"), "cannot write"),
        (("--tiles", "0"), "at least 1"),
    ]:
        assert message in fails(capsys, "data", "show", "ombria", "--data-dir", fake_records, *wrong)


def test_models(capsys):
    run("models", "--json", "--size", "64")
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lanet_r18"]["parameters"] == 2_826_390
    run("models", "--size", "64")
    assert "2,826,390" in capsys.readouterr().out
    for what in ("size", "classes", "channels"):
        assert f"{what} is 0" in fails(capsys, "models", f"--{what}", "0")


def test_errors_are_one_sentence(fake_records, tmp_path, capsys, monkeypatch):
    assert "did you mean 'train'" in fails(capsys, "trian")
    assert "did you mean 'ombria_s1_plain'" in fails(capsys, "train", "ombria_s1_plan", "--workdir", tmp_path / "x")
    assert "did you mean 'cpu'" in fails(capsys, "train", "ombria_s1", "--preset", "cup", "--workdir", tmp_path)
    assert "did you mean 'ombria'" in fails(capsys, "data", "build", "ombra", "--source", tmp_path)
    assert "holds no run" in fails(capsys, "eval", tmp_path)
    assert "holds no run" in fails(capsys, "show", tmp_path / "nowhere")
    assert "WxH" in fails(capsys, "data", "synthesize", "--out", tmp_path / "s", "--size", "big")
    missing = fails(capsys, "train", "ombria_s1", "--workdir", tmp_path / "y", "--data-dir", tmp_path)
    assert "sarjax data build ombria" in missing
    assert not (tmp_path / "y").exists()
    other = fails(
        capsys, "train", "ombria_s1", "--workdir", tmp_path / "z", "--data-dir", fake_records, "--teacher", tmp_path
    )
    assert "--teacher" in other
    (tmp_path / "file").write_text("")
    unwritable = fails(
        capsys, "train", "ombria_s1", "--workdir", tmp_path / "file" / "run", "--data-dir", fake_records, *SHRINK
    )
    assert "cannot write" in unwritable


def test_negative_seeds_are_one_sentence(fake_records, tmp_path, capsys):
    command = ["train", "ombria_s1", "--workdir", tmp_path / "run", "--data-dir", fake_records, *SHRINK]
    for name in ("--seed", "--data.labelled-seed"):
        assert "is -1, but should be a whole number from 0" in fails(capsys, *command, name, "-1")
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("demo", "--out", tmp_path / "demo", "--seed", "-1")
    assert "seed of the scenes is -1" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "scenes").exists()


def test_unknown_field_suggests_the_nearest(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run("train", "ombria_s1", "--workdir", tmp_path / "x", "--optimizer.learning-rat", "1")
    assert e.value.code == 2
    assert "learning-rate" in "".join(capsys.readouterr())


def python(*args):
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)


def test_help_loads_nothing_heavy():
    code = (
        "import sys, sarjax; from sarjax import cli\n"
        "cli.main(['--help']); cli.main(['data', '--help']); cli.main(['recipes'])\n"
        "heavy = {'jax', 'flax', 'grain', 'matplotlib', 'tensorflow', 'tensorflow_datasets', 'rasterio', 'orbax'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "ombria_s1" in done.stdout


@pytest.mark.parametrize("asked", [None, "7.5"])
def test_every_program_is_kept_where_a_cache_is(monkeypatch, asked):
    """Not only those that took a second; unless the user says what is worth it."""
    options = {}
    monkeypatch.setattr(jax.config, "update", options.__setitem__)
    name = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.delenv(name.upper(), raising=False)
    if asked:
        monkeypatch.setenv(name.upper(), asked)
    devices(3)
    assert options["jax_num_cpu_devices"] == 3
    assert options.get(name) == (None if asked else 0)


def test_training_loads_neither_tensorflow_nor_rasterio(fake_records, tmp_path):
    code = (
        "import sys; from sarjax import cli\n"
        "cli.main(sys.argv[1:])\n"
        "assert not {'tensorflow', 'rasterio', 'matplotlib'} & set(sys.modules)\n"
        "assert 'jax' in sys.modules\n"
    )
    done = python("-c", code, "train", "ombria_s1", "--workdir", tmp_path / "r", "--data-dir", fake_records, *SHRINK)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["host_devices"] == min(visible_cores(), 2), "one per core, as far as the batch of 2 can be cut"
    refused = python(
        "-m",
        "sarjax",
        "train",
        "ombria_s1",
        "--workdir",
        tmp_path / "r",
        "--host-devices",
        "5",
        "--data-dir",
        fake_records,
        *SHRINK,
    )
    assert refused.returncode == 2
    assert "host devices since its first start" in refused.stderr


def test_real_imagery(shared_data, tmp_path, capsys):
    """From the published files to an evaluated network."""
    run("data", "build", "ombria", "--source", shared_data / "ombria", "--out", tmp_path)
    run("train", "ombria_s1", "--workdir", tmp_path / "run", "--data-dir", tmp_path, *SHRINK, "--evaluate-every", "9")
    capsys.readouterr()
    run("eval", tmp_path / "run", "--split", "test", "--json")
    found = json.loads(capsys.readouterr().out)
    assert len(found["per_tile"]) == 70
    assert found["classes"]["flood"]["pixels"] > 1_000_000
    assert 0 < found["classes"]["flood"]["ap"] < 1
    assert Path(tmp_path / "run" / "eval" / "test-best.png").is_file()
