"""The command line as a user meets it: each verb for real on tiny files, and one sentence for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_data
import jax
import pytest

from sarjax import cli, recipes


@pytest.fixture(autouse=True, scope="module")
def devices():
    """The eight devices of the session stay; a verb would ask for others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_devices", lambda host_devices=0: None)
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """OMBRIA and WHU-OPT-SAR built from fake files; the folder's name holds what paths stumble over."""
    root = tmp_path_factory.mktemp("füße und spaces")
    fake_data.write_ombria(root / "ombria source")
    fake_data.write_whu(root / "whu source")
    for name in ("ombria", "whu_opt_sar"):
        source = root / ("ombria source" if name == "ombria" else "whu source")
        cli.main(["data", "build", name, "--source", str(source), "--out", str(root / "records")])
    return root / "records"


SHRINK = [
    *("--steps", "2", "--batch-size", "2", "--augment.crop", "64", "--network.width", "0.0625"),
    *("--mesh.data", "1", "--no-tensorboard"),
]


def run(*args):
    cli.main([str(a) for a in args])


def fails(capsys, *args):
    """The one line that a user reads."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert e.value.code == 2
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    return err


@pytest.fixture(scope="module")
def trained(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "ün run"
    run("train", "ombria_s1", "--workdir", workdir, "--data-dir", records, *SHRINK)
    return workdir


@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES))
def test_every_recipe_runs(recipe, records, tmp_path):
    run("train", recipe, "--workdir", tmp_path / "run", "--data-dir", records, *SHRINK)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"] == recipe
    assert (recipes.RECIPES[recipe].__doc__ or "").count(f"sarjax train {recipe}") == 1, "says how it is run"


def test_preset_halves_and_shortens():
    full, small = recipes.find("ombria_s1").experiment, recipes.find("ombria_s1", "cpu").experiment
    assert small.network.width < full.network.width
    assert small.epochs < full.epochs


def test_eval_prints_and_writes(trained, records, capsys):
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
    assert found["step"] == 2
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


def test_the_written_config_runs_again(trained, records, tmp_path, capsys):
    """config.json holds all of a run: read back, it is the same experiment."""
    from sarjax.config import from_json, to_json

    text = (trained / "config.json").read_text()
    assert to_json(from_json(text)) == text
    run("train", "ombria_s1", "--workdir", trained, "--data-dir", records, *SHRINK)
    assert "trained to its last step" in capsys.readouterr().err


def test_data_show_and_stats(records, tmp_path, capsys):
    run("data", "show", "ombria", "--data-dir", records, "--out", tmp_path / "ä.png", "--tiles", "2")
    assert (tmp_path / "ä.png").read_bytes().startswith(b"\x89PNG")
    assert "flood" in capsys.readouterr().out
    folder = next((records / "ombria").iterdir())
    before = (folder / "stats.json").read_bytes()
    run("data", "stats", folder)
    assert (folder / "stats.json").read_bytes() == before


def test_models(capsys):
    run("models", "--json", "--size", "64")
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lanet_r18"]["parameters"] == 2_826_390
    run("models", "--size", "64")
    assert "2,826,390" in capsys.readouterr().out


def test_errors_are_one_sentence(records, tmp_path, capsys, monkeypatch):
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
        capsys, "train", "ombria_s1", "--workdir", tmp_path / "z", "--data-dir", records, "--teacher", tmp_path
    )
    assert "--teacher" in other
    (tmp_path / "file").write_text("")
    unwritable = fails(
        capsys, "train", "ombria_s1", "--workdir", tmp_path / "file" / "run", "--data-dir", records, *SHRINK
    )
    assert "cannot write" in unwritable


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


def test_training_loads_neither_tensorflow_nor_rasterio(records, tmp_path):
    code = (
        "import sys; from sarjax import cli\n"
        "cli.main(sys.argv[1:])\n"
        "assert not {'tensorflow', 'rasterio', 'matplotlib'} & set(sys.modules)\n"
        "assert 'jax' in sys.modules\n"
    )
    done = python("-c", code, "train", "ombria_s1", "--workdir", tmp_path / "r", "--data-dir", records, *SHRINK)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    cores = len(os.sched_getaffinity(0))
    assert manifest["host_devices"] == min(cores, 2), "one per core, as far as the batch of 2 can be cut"
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
        records,
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
    assert Path(tmp_path / "run" / "eval" / "test-best.png").is_file()
