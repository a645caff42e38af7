"""Which files an export may replace: those of an export, never those of a run, others when told to."""

import json
import os

import pytest
import toy

from sarjax.config import Inputs
from sarjax.errors import UserError
from sarjax.export import OF_A_RUN, export_run, load
from sarjax.options import LANet, Supervised
from sarjax.train import loop


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "first"
    config = toy.config(Supervised(), network=LANet(width=0.0625), inputs=Inputs(), steps=1)
    loop.train(config, workdir, say=lambda line: None, dataset=toy.dataset())
    return workdir


@pytest.fixture
def early(monkeypatch):
    """Files are looked at before anything else is done."""
    monkeypatch.setattr("sarjax.export.restore_run", lambda *a, **k: pytest.fail("the run was restored"))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    ["config.json", "config", "manifest", "metrics.jsonl", "checkpoints/1/x", "best/new", "report.html", "teacher"],
)
def test_what_belongs_to_the_run(run, tmp_path, early, name, overwrite):
    (run / "report.html").write_text("of the run")
    (run / "checkpoints/1").mkdir(parents=True, exist_ok=True)
    (run / "best").mkdir(exist_ok=True)
    link = tmp_path / "link"
    link.symlink_to(run)
    before = files(run)
    for folder in (run, link, run / ".." / run.name):
        with pytest.raises(UserError, match=r"belongs to the run .*first: a name of its own, or another folder"):
            export_run(run, folder / name, overwrite=overwrite)
    assert files(run) == before


def test_all_that_a_run_has_is_known(run):
    assert {p.name for p in run.iterdir()} - {"report.html"} <= set(OF_A_RUN)


@pytest.mark.parametrize("name", ["map.jax", "map.jax.json"])
@pytest.mark.parametrize("content", ["of the user", '{"format": "other"}', "[1]", '{"format": 3}'])
def test_files_of_a_user(run, tmp_path, early, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} is there and is no export: another name, or --overwrite for a file"):
        export_run(run, tmp_path / "map.jax")
    assert (tmp_path / name).read_text() == content


def test_what_may_be_replaced(run, tmp_path):
    file = tmp_path / "map.jax"
    file.write_text("of the user")
    export_run(run, file, platforms=["cpu"], overwrite=True)
    sidecar = file.with_name("map.jax.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"format": "sarjax export 99"}))
    export_run(run, file, platforms=["cpu"])
    assert load(file).program.platforms == ("cpu",)
    assert export_run(run, run / "map.jax", platforms=["cpu"]) == export_run(run, run / "map.jax", platforms=["cpu"])
    for name in ("map.jax", "map.jax.json"):
        (run / name).unlink()


def test_where_it_cannot_be_written(run, tmp_path, early, monkeypatch):
    (tmp_path / "map").mkdir()
    (tmp_path / "file").touch()
    for name in ("gone/x.jax", "file/x.jax"):
        with pytest.raises(UserError, match=rf"cannot write .*/{name}: .* is no folder that may be written to"):
            export_run(run, tmp_path / name)
    with pytest.raises(UserError, match="map is there and is no export: another name"):
        export_run(run, tmp_path / "map", overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"cannot write .*x\.jax: .* is no folder that may be written to"):
        export_run(run, tmp_path / "x.jax")


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_command_line_passes_it_on(monkeypatch, overwrite):
    from sarjax.cli import common, maps

    given = {}
    monkeypatch.setattr(common, "devices", lambda n: None)
    monkeypatch.setattr("sarjax.export.export_run", lambda run, file, **options: given.update(options))
    common.command("export", maps.export)(["run", "map.jax", *["--overwrite"] * overwrite])
    assert given["overwrite"] is overwrite
