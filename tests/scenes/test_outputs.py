"""Maps that are there: never called up to date by their name alone, never replaced or lost without being asked."""

import json
import shutil

import jax
import numpy as np
import pytest
import toy
from scenes.scene_files import pixels, predict, stamps, trained, write_scene

from sarjax import raster
from sarjax.errors import UserError
from sarjax.reports import maps
from sarjax.reports.run import evaluate_run
from sarjax.scenes.inputs import Scene
from sarjax.scenes.outputs import check_places, outputs_of, workplace
from sarjax.train import run as train_run

SIZE = (150, 170)
ALL = ["sar.json", "sar.png", "sar.tif", "sar_probabilities.tif"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture
def scene(tmp_path):
    return write_scene(tmp_path / "in", *SIZE)["sar"]


def damage(path):
    """Leaves the header whole, and some of the pixels."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_other_weights_under_the_same_names(run, scene, tmp_path, monkeypatch):
    predict(run, [scene], tmp_path / "out")
    restore = train_run.restore_run

    def changed(what):
        def call(*args, **options):
            restored = restore(*args, **options)
            tree = getattr(restored, what)
            leaves, shape = jax.tree.flatten(tree)
            leaves[-1] = leaves[-1] + 1
            return restored._replace(**{what: jax.tree.unflatten(shape, leaves)})

        return call

    for what in ("params", "stats"):
        monkeypatch.setattr("sarjax.train.run.restore_run", changed(what))
        before = stamps(tmp_path / "out")
        with pytest.raises(UserError, match=r"sar.tif was made with other weights of .* under the name best/2: --over"):
            predict(run, [scene], tmp_path / "out")
        assert stamps(tmp_path / "out") == before
    _, said = predict(run, [scene], tmp_path / "out", overwrite=True)
    assert "there already" not in said


def test_a_map_made_otherwise_is_refused(run, scene, tmp_path):
    out = tmp_path / "out"
    predict(run, [scene], out, probabilities=True)
    before = stamps(out)
    assert sorted(before) == ALL
    other = tmp_path / "other"
    shutil.copytree(run, other)
    elsewhere = tmp_path / "elsewhere" / "sar.tif"
    elsewhere.parent.mkdir()
    shutil.copy2(scene, elsewhere)
    new = raster.write(tmp_path / "in" / "new.tif", pixels(40, 40, 1))

    def refused(message, run=run, scenes=(scene,), **options):
        with pytest.raises(UserError, match=message) as e:
            predict(run, [new, *scenes], out, **options)
        assert str(e.value).count(". ") == 0, "one sentence"
        assert stamps(out) == before, "nothing is made, nor a scene before it"

    refused(r"sar.tif was made with run .*, not .*other: --overwrite makes it again, and another --out keeps it", other)
    refused(r"sar.tif was made with window 96, not 128", window=128)
    refused(r"sar.tif was made with overlap 32, not 8", overlap=8)
    refused(r"sar.tif was made with tta False, not True", tta=True)
    refused(r"sar.tif was made with checkpoint best/2, not checkpoints/2", checkpoint="last")
    refused(r"sar.tif was made from sar=.*/in/sar.tif, not from sar=.*/elsewhere/sar.tif", scenes=[elsewhere])
    predict(run, [scene], out, window=128, overwrite=True)
    after = stamps(out)
    assert sorted(after) == ALL, "a map that had probabilities has them again"
    assert not set(after.values()) & set(before.values())
    assert json.loads((out / "sar.json").read_text())["window"] == 128


def test_probabilities_are_added_and_kept(run, scene, tmp_path):
    out = tmp_path / "out"
    predict(run, [scene], out)
    predict(run, [scene], out, probabilities=True)
    before = stamps(out)
    predict(run, [scene], out)
    assert stamps(out) == before
    raster.write(scene, 255 - pixels(*SIZE, 1), nodata=255)
    predict(run, [scene], out)
    after = stamps(out)
    assert sorted(after) == ALL
    assert after["sar_probabilities.tif"] != before["sar_probabilities.tif"], "those of the older image are no use"
    (out / "sar_probabilities.tif").unlink()
    before = stamps(out)
    predict(run, [scene], out)
    assert stamps(out) == before, "who took them away does not get them again unasked"


@pytest.mark.parametrize("stage", ["reading", "look", "moving"])
def test_a_map_that_fails_leaves_the_older_one(run, scene, tmp_path, monkeypatch, stage):
    out = tmp_path / "out"
    predict(run, [scene], out, probabilities=True)
    before = stamps(out)

    def fail(*args, **options):
        raise UserError(f"no {stage} of {args[0]}.")

    if stage == "reading":
        damage(scene)
    else:
        raster.write(scene, 255 - pixels(*SIZE, 1), nodata=255)
        monkeypatch.setattr(maps, {"look": "look", "moving": "publish"}[stage], fail)
    with pytest.raises(UserError, match="sar.tif cannot be read" if stage == "reading" else f"no {stage} of") as e:
        predict(run, [scene], out)
    assert stamps(out) == before
    assert ".sarjax-predict" not in str(e.value), "it is gone"


def test_damaged_scenes_do_not_stop_the_others(run, tmp_path):
    (tmp_path / "in").mkdir()
    paths = [raster.write(tmp_path / "in" / f"{n}.tif", pixels(*SIZE, 1)) for n in "abcd"]
    damage(paths[0])
    damage(paths[2])
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of 4 scenes could not be mapped, .*a.tif cannot be .*c.tif cannot"):
            predict(run, [tmp_path / "in"], out)
        assert sorted(p.name for p in out.iterdir()) == sorted(
            f"{n}.{end}" for n in "bd" for end in ("json", "png", "tif")
        )
    raster.write(paths[0], pixels(*SIZE, 1))
    before, said = stamps(out), []
    with pytest.raises(UserError, match="1 of 4 scenes"):
        predict(run, [tmp_path / "in"], out, say=said.append)
    assert (out / "a.json").exists()
    assert before.items() <= stamps(out).items()
    assert any(line.startswith("no map of c: ") for line in said)


def test_a_scene_named_as_probabilities(run, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    x, named = (raster.write(folder / f"{n}.tif", pixels(40, 40, 1)) for n in ("x", "x_probabilities"))
    with pytest.raises(UserError, match=r"x_probabilities.tif would be written for scenes x and x_probabilities"):
        predict(run, [folder], out, probabilities=True)
    predict(run, [named], out)
    predict(run, [x], out)
    before = stamps(out)
    assert "x_probabilities.tif" in before, "the other scene's map"
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"x_probabilities.tif is the map of scene x_probabilities: another --out"):
            predict(run, [x], out, probabilities=True, **options)
    assert stamps(out) == before
    other = tmp_path / "other"
    predict(run, [x], other, probabilities=True)
    with pytest.raises(UserError, match=r"x_probabilities.tif holds the probabilities of scene x: another --out"):
        predict(run, [named], other, overwrite=True)


def test_probabilities_that_are_not_ours(run, scene, tmp_path):
    out = tmp_path / "out"
    predict(run, [scene], out)
    (out / "sar_probabilities.tif").write_bytes(b"mine")
    predict(run, [scene], out)
    predict(run, [scene], out, overwrite=True)
    assert (out / "sar_probabilities.tif").read_bytes() == b"mine"
    with pytest.raises(UserError, match=r"sar_probabilities.tif was not made by sarjax predict"):
        predict(run, [scene], out, probabilities=True)


def test_a_call_that_was_cut_off_while_moving(run, scene, tmp_path):
    out = tmp_path / "out"
    predict(run, [scene], out, probabilities=True)
    (out / "sar.json").unlink()
    predict(run, [scene], out, window=128)
    assert sorted(stamps(out)) == ["sar.json", "sar.png", "sar.tif"], "probabilities of nobody knows what are gone"


def test_a_workplace(tmp_path):
    out = tmp_path / "new" / "out"
    (out / ".sarjax-predict" / "killed").mkdir(parents=True)
    (out / ".sarjax-predict" / "killed" / "sar.tif").write_bytes(b"half")
    with workplace(out) as work:
        assert not any(work.iterdir())
        assert sorted(p.name for p in work.parent.iterdir()) == ["lock", work.name]
        with pytest.raises(UserError, match=r"another call is making maps in .*out: wait for it, or use another --out"):
            workplace(out).__enter__()
        assert work.is_dir()
    assert not any(out.iterdir())
    with workplace(out):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def nolock(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", nolock)
    with workplace(tmp_path) as one:
        with workplace(tmp_path) as two:
            assert one != two
        assert one.is_dir()
        assert not two.exists()


def test_checks_without_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tif").touch()
    scenes = [Scene(n, {"sar": (tmp_path / f"{n}.tif",)}) for n in "ab"]
    check_places(scenes, [outputs_of(tmp_path / "out", n) for n in "ab"], True, False)
    assert not (tmp_path / "out").exists()


def test_a_scene_that_failed_takes_no_room(run, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "ab":
        raster.write(tmp_path / "in" / f"{name}.tif", pixels(40, 40, 1))
    look, found = maps.look, []

    def fail_once(path, *args):
        found.append(sorted(p.name for p in path.parent.iterdir()))
        if len(found) == 1:
            raise UserError("no look.")
        return look(path, *args)

    monkeypatch.setattr(maps, "look", fail_once)
    with pytest.raises(UserError, match="1 of 2 scenes could not be mapped, the others are done: no look"):
        predict(run, [tmp_path / "in"], tmp_path / "out")
    assert found == [["a.tif"], ["b.tif"]]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("4096 requested and 0 written")])
def test_a_full_disk(run, scene, tmp_path, monkeypatch, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write to .*out: (No space left|no room is left \(4096 req)") as e:
        predict(run, [scene], tmp_path / "out")
    assert "None" not in str(e.value)
    assert not any((tmp_path / "out").iterdir())


def test_best_where_none_was_kept(run, scene, tmp_path):
    _, said = predict(run, [scene], tmp_path / "out")
    assert "best on val" not in said
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=lambda folder, names: ["best"] if "best" in names else [])
    _, said = predict(other, [scene], tmp_path / "other out")
    assert "other kept no checkpoint that was best on val: the last, checkpoints/2, is used" in said
    _, said = predict(other, [scene], tmp_path / "last", checkpoint="last")
    assert "best on val" not in said


def test_an_evaluation_says_so_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sarjax.reports.run.data_of", lambda *args: toy.dataset())
    for kept in (True, False):
        folder, said = tmp_path / str(kept), []
        shutil.copytree(run, folder)
        if not kept:
            shutil.rmtree(folder / "best")
        evaluate_run(folder, say=said.append)
        assert any("the last, checkpoints/2, is used" in line for line in said) == (not kept)
