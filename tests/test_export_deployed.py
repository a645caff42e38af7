"""Exports as they go on board: one size, two dates, half precision, labels alone."""

import json

import jax
import numpy as np
import pytest
import toy
import toy_dates
from test_export import batch_of, predicted, trained
from verbs import fails, run

from sarjax.config import Inputs, Mesh
from sarjax.errors import UserError
from sarjax.export import export_head, export_run, held_weights, image_shapes, load
from sarjax.options import FCN, LANet
from sarjax.train.mesh import make_mesh
from sarjax.train.run import restore_run

pytestmark = pytest.mark.usefixtures("session_devices")

SIZE = (32, 64)


@pytest.fixture(scope="module")
def change(tmp_path_factory):
    """A run that compares two dates."""
    return toy_dates.trained(tmp_path_factory.mktemp("runs") / "change")


def restored(workdir, precision="float32"):
    return restore_run(workdir, make_mesh(Mesh(), jax.devices()[:1])).at_precision(precision)


def test_two_dates_in_one_size(change, tmp_path, capsys):
    capsys.readouterr()
    run("export", change, tmp_path / "change.jax", "--size", "32x64", "--batch", 1)
    assert capsys.readouterr().out.strip() == str(tmp_path / "change.jax")
    artifact = load(tmp_path / "change.jax")
    shapes = {x["name"]: x["shape"] for x in artifact.sidecar["inputs"]}
    assert shapes == {"sar": [1, 2, *SIZE, 1], "sar_valid": [1, 2, *SIZE]}
    batch = batch_of(toy_dates.SPEC, ("sar",), 1, *SIZE)
    of = restored(change)
    expected = predicted(of.method.heads["main"], of.params, of.stats, batch)
    found = artifact.program.call(batch)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5)
    seen = batch["sar_valid"].any(1)
    assert (np.asarray(found["labels"]) == np.where(seen, expected.argmax(-1), 255)).mean() > 0.999
    swapped = batch | {"sar": batch["sar"][:, ::-1], "sar_valid": batch["sar_valid"][:, ::-1]}
    assert np.abs(artifact.program.call(swapped)["logits"] - expected).max() > 1e-3, "the order of the dates counts"


def test_labels_alone_in_half_precision(change, tmp_path):
    options = {"size": SIZE, "batch": 1, "platforms": ["cpu"]}
    whole = load(export_run(change, tmp_path / "whole.jax", precision="bfloat16", **options))
    file = export_run(change, tmp_path / "lean.jax", precision="bfloat16", logits=False, **options)
    lean = load(file)
    assert [x["name"] for x in lean.sidecar["outputs"]] == ["labels"]
    assert lean.sidecar["precision"] == "bfloat16"
    assert "logits" not in lean.sidecar["python"]
    compile(lean.sidecar["python"], "example", "exec")
    batch = batch_of(toy_dates.SPEC, ("sar",), 1, *SIZE)
    found = lean.program.call(batch)
    assert set(found) == {"labels"}
    of = restored(change, "bfloat16")
    expected = predicted(of.method.heads["main"], of.params, of.stats, batch)
    for labels in (found["labels"], whole.program.call(batch)["labels"]):
        seen = batch["sar_valid"].any(1)
        assert (np.asarray(labels) == np.where(seen, expected.argmax(-1), 255)).mean() > 0.97
    with pytest.raises(UserError, match="precision is 'float16'; float32 or bfloat16 is accepted"):
        export_run(change, tmp_path / "odd.jax", precision="float16")


def test_the_command_line_passes_it_on(change, tmp_path, capsys):
    run("export", change, tmp_path / "x.jax", "--size", "32x32", "--precision", "bfloat16", "--no-logits")
    sidecar = json.loads((tmp_path / "x.jax.json").read_text())
    assert (sidecar["precision"], [x["name"] for x in sidecar["outputs"]]) == ("bfloat16", ["labels"])
    assert "16x20 or 16x24 would be" in fails(capsys, "export", change, tmp_path / "y.jax", "--size", "16x22")


def test_kernels_are_held_in_the_precision_that_computes_with_them():
    for precision, share in (("float32", 1.0), ("bfloat16", 0.6)):
        head, params, stats = trained(toy.SPEC, Inputs(), FCN(width=0.125, stages=1), precision)
        shapes = image_shapes(head, toy.SPEC, (16, 16), 1)
        held = held_weights(head, params, stats, shapes)
        sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (held, (params, stats))]
        assert sizes[0] <= share * sizes[1]
        kinds = {str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(held) if "kernel" in str(path)}
        assert kinds == {precision}
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(held[1])} == {"float32"}, "running statistics"
        batch = batch_of(toy.SPEC, ("sar",), 1, 16, 16)
        np.testing.assert_array_equal(predicted(head, *held, batch), predicted(head, params, stats, batch))


def test_a_leaf_that_something_else_reads_too_stays():
    head, params, stats = trained(toy.SPEC, Inputs(), LANet(width=0.0625), "bfloat16")

    def predict(params, stats, batch):
        return head.predict(params, stats, batch) + params["low_classifier"]["kernel"].sum()

    curious = head._replace(predict=predict)
    held, _ = held_weights(curious, params, stats, image_shapes(head, toy.SPEC, (64, 64), 1))
    assert held["low_classifier"]["kernel"].dtype == np.float32
    assert held["high_classifier"]["kernel"].dtype != np.float32
    export_head(curious, params, stats, toy.SPEC, Inputs(), size=(64, 64), platforms=["cpu"])
