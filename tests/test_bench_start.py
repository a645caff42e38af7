"""`sarjax bench start`: complete results, a real first step told apart into its parts, and what is refused."""

import json
import os
import sys

import jax
import pytest
from verbs import fails, run

from sarjax import recipes
from sarjax.bench import start
from sarjax.errors import UserError


def test_rows(monkeypatch, capsys):
    """With commands that are cheap and first steps that are made up."""
    asked = []

    def first(arguments, **variables):
        cache = variables.get("JAX_COMPILATION_CACHE_DIR")
        asked.append((arguments[0], cache, os.path.isdir(cache) if cache else None))
        if cache:
            os.makedirs(cache, exist_ok=True)
        phases = {"imports": 1.0, "first_state": 2.0, "first_step": len(asked)} | ({"compile": 4.0} if cache else {})
        return phases | {"other": 0.5, "seconds": 9.5}

    monkeypatch.setattr(start, "_first", first)
    monkeypatch.setattr(start, "_records", lambda root, experiment: root / "records")
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(start, "COMMANDS", {"python": ("-c", "pass"), "import torch": ("-c", "import json")})
    run("bench", "start", "--repetitions", 2, "--json")
    (line,) = capsys.readouterr().out.splitlines()
    rows = {row["side"]: row for row in json.loads(line)["rows"]}
    assert list(rows) == ["python", "import torch", "train, cold", "train, warm", "torch, first step"]
    assert all(row["seconds"]["n"] == 2 for row in rows.values())
    assert 0 < rows["python"]["seconds"]["min"] < 5
    assert rows["train, warm"]["compile_seconds"] == 4
    assert rows["train, warm"]["first_step_seconds"] == 6.5  # of the fifth and the eighth, the second not counting
    assert "compile_seconds" not in rows["torch, first step"]
    cold, warm = ([one for one in asked if one[1] and one[1].endswith(name)] for name in ("cold", "warm"))
    assert len({folder for _, folder, _ in cold}) == 3
    assert [there for *_, there in cold] == [False] * 3
    assert len({folder for _, folder, _ in warm}) == 1
    assert [there for *_, there in warm] == [False, True, True]


def test_without_torch(monkeypatch, capsys):
    monkeypatch.setattr(start, "_first", lambda *arguments, **variables: {"seconds": 1.0, "other": 0.0})
    monkeypatch.setattr(start, "_records", lambda root, experiment: root / "records")
    monkeypatch.setattr(start, "COMMANDS", {"import torch": ("-c", "raise SystemExit(1)")})
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    run("bench", "start", "--repetitions", 1, "--json")
    out, err = capsys.readouterr()
    rows = {row["side"]: row["seconds"] for row in json.loads(out)["rows"]}
    assert err.count("torch is not installed") == 1
    assert (rows["import torch"], rows["torch, first step"]) == (None, None)
    assert rows["train, cold"]["median"] == 1


def test_a_first_step(tmp_path):
    """A real one, with programs that other tests have compiled perhaps."""
    records = start._records(tmp_path, recipes.find("synthetic_sar").experiment)
    asked = ["--network.width", "0.0625", "--augment.crop", "64", "--batch-size", "2", "--mesh.data", "1"]
    asked += ["--steps", "2", "--log-every", "1", "--data-dir", str(records), "--workdir", str(tmp_path / "run")]
    found = start._first(["synthetic_sar", *asked], JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir)
    assert set(found) == {*start.PHASES, "other", "seconds"}
    assert all(seconds > 0 for seconds in found.values())
    assert sum(found[phase] for phase in (*start.PHASES, "other")) == pytest.approx(found["seconds"])
    assert found["other"] < found["seconds"] / 4
    with pytest.raises(UserError, match=r"ended with exit code 2: .*no data set 'whu_opt_sar'"):
        start._first(["synthetic_sar", "--data-dir", str(tmp_path / "none"), "--workdir", str(tmp_path / "other")])


def test_a_first_step_of_torch():
    pytest.importorskip("torch")
    found = start._first(["torch", "synthetic_sar", "cpu", "2"])
    assert set(found) == {"imports", "first_state", "first_step", "other", "seconds"}
    assert found["seconds"] == pytest.approx(found["imports"] + found["first_state"] + found["first_step"])


def test_what_is_refused(capsys):
    assert "learns from ombria" in fails(capsys, "bench", "start", "ombria_s1")
    assert "unknown recipe 'synthetic_sa'" in fails(capsys, "bench", "start", "synthetic_sa")
    assert "repetitions is 0" in fails(capsys, "bench", "start", "--repetitions", 0)
    with pytest.raises(UserError, match=r"-c raise SystemExit\(3\) ended with exit code 3: it said nothing"):
        start._seconds([sys.executable, "-c", "raise SystemExit(3)"])
