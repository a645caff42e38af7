"""Exports: equal to the head they are of, run without sarjax, and refuse what they cannot take."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy

from sarjax.config import Experiment, Inputs, Mesh, Optimizer
from sarjax.errors import UserError
from sarjax.export import Artifact, export_head, export_run, load
from sarjax.methods import build_method
from sarjax.methods.record import Context, Schedule
from sarjax.models.context import FieldOfView
from sarjax.options import FCN, LANet, Supervised
from sarjax.spec import BandStatistics, Statistics
from sarjax.train import loop
from sarjax.train.mesh import make_mesh
from sarjax.train.run import restore_run

NARROW = 0.0625
BOTH = ("sar", "optical")


def spec_of(dates=1, **dtypes):
    """The toy data set with so many dates, and other dtypes of its modalities."""
    modalities = tuple(dataclasses.replace(m, dtype=dtypes.get(m.name, m.dtype)) for m in toy.SPEC.modalities)
    return dataclasses.replace(toy.SPEC, dates=dates, modalities=modalities)


def trained(spec, inputs, network, precision="float32"):
    """A head with random parameters, and running statistics other than 0 and 1."""
    bands = {
        m.name: BandStatistics((60.0, 80.0)[: len(m.bands)], (40.0, 30.0)[: len(m.bands)], (), (), 9)
        for m in spec.modalities
    }
    experiment = Experiment(inputs=inputs, network=network, precision=precision)
    statistics = Statistics(bands, (1, 1, 1), {}, {})
    method = build_method(Context(experiment, spec, statistics, Schedule(1, 1, 1)))
    variables = jax.jit(method.init)(jax.random.key(1))
    rng = np.random.default_rng(1)
    stats = jax.tree.map(lambda x: np.float32(rng.uniform(0.5, 1.5, x.shape)) * (1 + x), variables.stats)
    return method.heads["main"], variables.params, stats


def predicted(head, params, stats, batch):
    return np.asarray(jax.jit(head.predict)(params, stats, batch))


def batch_of(spec, names, b, h, w, seed=0):
    """Images with a strip and single pixels without data; a corner is without data in all of them."""
    rng = np.random.default_rng(seed)
    batch = {}
    for name in names:
        modality = spec.modality(name)
        image = rng.uniform(1, 200, (b, spec.dates, h, w, len(modality.bands))).astype(modality.dtype)
        valid = (rng.random((b, spec.dates, h, w)) > 0.05).astype(np.uint8)
        valid[:, :, h // 2 : h // 2 + 5] = 0
        valid[..., :9, :7] = 0
        if modality.dtype == "float32":
            image[valid == 0] = np.nan
        batch |= {name: image, f"{name}_valid": valid}
    return batch


CASES = {
    "uint8": (spec_of(), Inputs(), LANet(width=NARROW)),
    "float32, all kinds of channels": (
        spec_of(2, sar="float32", optical="uint16"),
        Inputs(BOTH, normalisation="tile", local_mean=7, date_difference=True, repeat=20),
        LANet(width=NARROW, residual=False),
    ),
    "some of the dates": (
        spec_of(3, sar="float32"),
        Inputs(dates=(2, 0), local_mean=4),
        LANet(width=NARROW, stages=4, low_window=4),
    ),
    "bottlenecks": (spec_of(), Inputs(("optical",)), FCN(width=NARROW, encoder="resnet50", output_stride=16)),
    "odd patches": (spec_of(), Inputs(), LANet(width=NARROW, low_window=6, output_stride=8)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_head(case):
    spec, inputs, network = CASES[case]
    head, params, stats = trained(spec, inputs, network)
    program = export_head(head, params, stats, spec, inputs)
    assert program.platforms == ("cpu", "cuda", "tpu")
    a = head.context.alignment
    for b, h, w in ((1, a, 2 * a), (3, 3 * a, a)):
        batch = batch_of(spec, inputs.modalities, b, h, w)
        ours = program.call(batch)
        expected = predicted(head, params, stats, batch)
        assert np.isfinite(expected).all()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours["logits"], expected, rtol=0, atol=1e-5 * scale)
        dates = range(spec.dates) if inputs.dates == "all" else inputs.dates
        seen = np.any([batch[f"{m}_valid"][:, d] > 0 for m in inputs.modalities for d in dates], 0)
        assert 0 < seen.sum() < seen.size
        assert ours["labels"].dtype == np.uint8
        np.testing.assert_array_equal(ours["labels"], np.where(seen, np.argmax(ours["logits"], -1), 255))
        assert (ours["labels"] == np.where(seen, expected.argmax(-1), 255)).mean() > 0.999


def test_half_precision_is_kept():
    """Rounding to 8 bits of mantissa makes nearby programs differ: only most labels are the same."""
    head, params, stats = trained(toy.SPEC, Inputs(), LANet(width=NARROW), "bfloat16")
    batch = batch_of(toy.SPEC, ("sar",), 1, 64, 64)
    program = export_head(head, params, stats, toy.SPEC, Inputs(), platforms=["cpu"])
    assert "bf16" in program.mlir_module()
    ours, expected = program.call(batch)["logits"], predicted(head, params, stats, batch)
    assert ours.dtype == np.float32
    assert (np.argmax(ours, -1) == expected.argmax(-1)).mean() > 0.97


def test_what_is_not_finite_is_no_data():
    spec = spec_of(sar="float32")
    head, params, stats = trained(spec, Inputs(), FCN(width=NARROW, stages=1))
    program = export_head(head, params, stats, spec, Inputs(), platforms=["cpu"])
    batch = batch_of(spec, ("sar",), 1, 16, 16)
    unmasked = batch | {"sar_valid": np.ones_like(batch["sar_valid"])}
    unmasked["sar"] = np.where(np.arange(16)[None, None, None, :, None] == 3, np.inf, batch["sar"])
    masked = batch | {"sar_valid": np.where(np.arange(16) == 3, 0, batch["sar_valid"]).astype(np.uint8)}
    for name, expected in program.call(masked).items():
        np.testing.assert_array_equal(program.call(unmasked)[name], expected)


def test_a_fixed_size_is_the_only_one():
    head, params, stats = trained(toy.SPEC, Inputs(), LANet(width=NARROW))
    program = export_head(head, params, stats, toy.SPEC, Inputs(), size=(32, 64), platforms=["cpu"])
    assert program.call(batch_of(toy.SPEC, ("sar",), 2, 32, 64))["labels"].shape == (2, 32, 64)
    with pytest.raises(ValueError, match=r"expected \(b, 1, 32, 64, 1\)"):
        program.call(batch_of(toy.SPEC, ("sar",), 1, 64, 64))
    program = export_head(head, params, stats, toy.SPEC, Inputs(), batch=2, platforms=["cpu"])
    assert program.call(batch_of(toy.SPEC, ("sar",), 2, 32, 32))["logits"].shape == (2, 32, 32, 3)
    with pytest.raises(ValueError, match=r"expected \(2, 1, 32\*h, 32\*w, 1\)"):
        program.call(batch_of(toy.SPEC, ("sar",), 1, 32, 32))
    with pytest.raises(ValueError, match="Division had remainder 8"):
        program.call(batch_of(toy.SPEC, ("sar",), 2, 32, 40))
    shape = (2, 1, 32, 2**15 + 32)
    wide = {"sar": jax.ShapeDtypeStruct((*shape, 1), np.uint8), "sar_valid": jax.ShapeDtypeStruct(shape, np.uint8)}
    with pytest.raises(ValueError, match="w <= 1024"):
        jax.eval_shape(program.call, wide)


def test_a_network_that_asks_for_its_size():
    head, params, stats = trained(toy.SPEC, Inputs(), FCN(width=NARROW, stages=1))

    def predict(params, stats, batch):
        return head.predict(params, stats, batch) * (2 if batch["sar"].shape[2] > 64 else 1)

    asking = head._replace(predict=predict)
    with pytest.raises(UserError, match=r"cannot be exported for any size.*a fixed size .* would be accepted"):
        export_head(asking, params, stats, toy.SPEC, Inputs())
    export_head(asking, params, stats, toy.SPEC, Inputs(), size=(32, 32), platforms=["cpu"])


def test_heads_of_something_else():
    head, params, stats = trained(toy.SPEC, Inputs(), FCN(width=NARROW, stages=1))
    with pytest.raises(UserError, match="this head reads mood; a head that reads images"):
        export_head(head._replace(requires=(*head.requires, "mood")), params, stats, toy.SPEC, Inputs())


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((100, 64), "96x64 or 128x64"),
        ((31, 200), "32x192 or 32x224"),
        ((0, 32), "32x32"),
        ((5, 7), "32x32"),
        ((-3, 96), "32x96"),
    ],
)
def test_the_nearest_sizes_are_named(size, nearest):
    head, params, stats = trained(toy.SPEC, Inputs(), FCN(width=NARROW))
    with pytest.raises(UserError, match=rf"size is {size[0]}x{size[1]}.* multiples of 32 pixels; {nearest} would be"):
        export_head(head, params, stats, toy.SPEC, Inputs(), size=size)
    aligned = head._replace(context=FieldOfView(48, None))
    with pytest.raises(UserError, match="multiples of 48 pixels; 48x96 or 96x96 would be"):
        export_head(aligned, params, stats, toy.SPEC, Inputs(), size=(64, 96))


# --- of runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained LANet whose running mean is far from its parameters."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    config = toy.config(
        Supervised(),
        network=LANet(width=NARROW),
        inputs=Inputs(BOTH, local_mean=3),
        optimizer=Optimizer(learning_rate=0.01, ema=0.9),
        steps=3,
    )
    loop.train(config, workdir, say=lambda line: None, dataset=toy.dataset())
    return workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    said = []
    file = export_run(run, tmp_path_factory.mktemp("exports") / "map.jax", say=said.append)
    assert any("map.jax" in line and "cpu, cuda, tpu" in line for line in said)
    return file


WITHOUT_SARJAX = """
import json, sys
import numpy as np
sys.modules.update(dict.fromkeys(("sarjax", "flax", "orbax", "optax")))  # importing one of these fails
exec(json.load(open("map.jax.json"))["python"])
assert labels.shape == (1, 256, 256) and logits.shape == (1, 256, 256, 3), (labels.shape, logits.shape)
np.savez("result.npz", **program(dict(np.load("batch.npz"))))
try:
    import sarjax
except ImportError:
    print(sorted(m for m in sys.modules if m.startswith("sarjax")))
"""


def test_another_process_runs_it_without_sarjax(run, exported, tmp_path):
    batch = batch_of(toy.SPEC, BOTH, 2, 64, 32)
    np.savez(tmp_path / "batch.npz", **batch)
    for file in (exported, exported.with_name("map.jax.json")):
        shutil.copy(file, tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA_", "JAX_"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_SARJAX],
        cwd=tmp_path,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['sarjax']", "the name that was blocked, and nothing else"
    result = np.load(tmp_path / "result.npz")
    restored = restore_run(run, make_mesh(Mesh(), jax.devices()[:1]))
    logits = predicted(restored.method.heads["main"], restored.params, restored.stats, batch)
    # Another XLA, of one device: weights moved by 1e-7 move these logits by 1e-6 of the largest.
    np.testing.assert_allclose(result["logits"], logits, atol=3e-6 * np.abs(logits).max())
    seen = (batch["sar_valid"] | batch["optical_valid"])[:, 0] > 0
    np.testing.assert_array_equal(result["labels"], np.where(seen, logits.argmax(-1), 255))


def test_the_sidecar_says_it_all(run, exported):
    sidecar = json.loads(exported.with_name("map.jax.json").read_text())
    assert sidecar["versions"] == {name: importlib.metadata.version(name) for name in ("sarjax", "jax", "jaxlib")}
    assert sidecar["sha256"] == hashlib.sha256(exported.read_bytes()).hexdigest()
    assert sidecar["bytes"] == exported.stat().st_size
    shapes = {x["name"]: (x["shape"], x["dtype"]) for x in sidecar["inputs"] + sidecar["outputs"]}
    sides = ["32*h", "32*w"]
    assert shapes == {
        "sar": (["b", 1, *sides, 1], "uint8"),
        "sar_valid": (["b", 1, *sides], "uint8"),
        "optical": (["b", 1, *sides, 2], "uint8"),
        "optical_valid": (["b", 1, *sides], "uint8"),
        "labels": (["b", *sides], "uint8"),
        "logits": (["b", *sides, 3], "float32"),
    }
    optical = next(x for x in sidecar["inputs"] if x["name"] == "optical")
    assert optical["bands"] == [{"name": n, "radiometry": "reflectance"} for n in ("red", "nir")]
    assert optical["normalisation"].startswith("inside the program")
    assert sidecar["classes"] == ["land", "water", "absent"]
    assert sidecar["palette"] == [[200, 180, 120], [0, 0, 255], [9, 9, 9]]
    facts = ("file", "platforms", "ignore_label", "alignment", "largest_side", "head", "run", "checkpoint", "ema")
    assert [sidecar[k] for k in facts] == [
        "map.jax", ["cpu", "cuda", "tpu"], 255, 32, 32768, "main", "first", "best/3", False,
    ]  # fmt: skip
    assert str(run.parent) not in json.dumps(sidecar), "it goes elsewhere: no folder of this machine"


def test_the_running_mean_and_one_size(run, exported, tmp_path):
    file = export_run(run, tmp_path / "ema.jax", ema=True, checkpoint="last", size=(32, 64), batch=2, platforms=["cpu"])
    artifact = load(file)
    assert isinstance(artifact, Artifact)
    assert artifact.program.platforms == ("cpu",)
    sidecar = artifact.sidecar
    assert (sidecar["ema"], sidecar["checkpoint"], sidecar["largest_side"]) == (True, "checkpoints/3", None)
    assert sidecar["inputs"][0]["shape"] == [2, 1, 32, 64, 1]
    batch = batch_of(toy.SPEC, BOTH, 2, 32, 64)
    restored = restore_run(run, make_mesh(Mesh(), jax.devices()[:1]), checkpoint="last", ema=True)
    expected = predicted(restored.method.heads["main"], restored.params, restored.stats, batch)
    np.testing.assert_allclose(artifact.program.call(batch)["logits"], expected, atol=1e-5)
    other = load(exported).program.call(batch)["logits"]
    assert np.abs(np.asarray(other) - expected).max() > 1e-2
    with pytest.raises(ValueError, match=r"(?i)platform"):
        load(export_run(run, tmp_path / "tpu.jax", platforms=["tpu"])).program.call(batch)


def test_any_head_by_name(tmp_path):
    loop.train(toy.config(toy.Toy(), steps=1), tmp_path / "run", say=lambda line: None, dataset=toy.dataset())
    batch = batch_of(toy.SPEC, ("sar",), 1, 5, 7)
    restored = restore_run(tmp_path / "run", make_mesh(Mesh(), jax.devices()[:1]))
    for name in ("", "other"):
        file = export_run(tmp_path / "run", tmp_path / "x.jax", head=name, platforms=["cpu", "cpu"])
        artifact = load(file)
        assert artifact.sidecar["head"] == (name or "main")
        head = restored.method.heads[name or "main"]
        expected = predicted(head, restored.params, restored.stats, batch)
        np.testing.assert_allclose(artifact.program.call(batch)["logits"], expected, atol=1e-5)
    with pytest.raises(UserError, match=r"unknown head of .*'mian': did you mean 'main'"):
        export_run(tmp_path / "run", tmp_path / "y.jax", head="mian")
    assert not (tmp_path / "y.jax").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch is 0; a number of images from 1"),
        ({"platforms": ()}, "no platform to export for; one or more of cpu, cuda, rocm and tpu"),
        ({"platforms": ("cpu", "gpu")}, "platform is 'gpu'; cpu, cuda, rocm and tpu are accepted"),
        ({"size": (100, 96)}, "96x96 or 128x96 would be accepted"),
        ({"checkpoint": "first"}, "best or last are accepted"),
    ],
)
def test_bad_arguments(run, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        export_run(run, tmp_path / "x.jax", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(run, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*/gone/x\.jax"):
        export_run(run, tmp_path / "gone" / "x.jax", platforms=["cpu"])
    with pytest.raises(UserError, match="holds no run"):
        export_run(tmp_path, tmp_path / "x.jax")


# --- damaged files


@pytest.fixture
def copy(exported, tmp_path):
    """Of the export, to be damaged; its description as a dictionary, and a function that writes that back."""
    file = tmp_path / "map.jax"
    for source in (exported, exported.with_name("map.jax.json")):
        shutil.copy(source, tmp_path)
    sidecar = tmp_path / "map.jax.json"
    return file, json.loads(sidecar.read_text()), lambda value: sidecar.write_text(json.dumps(value))


def test_a_flipped_byte_is_noticed(copy):
    file, _, _ = copy
    data = bytearray(file.read_bytes())
    assert load(file).program.platforms == ("cpu", "cuda", "tpu")
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"map\.jax is damaged, or of another export than map\.jax\.json"):
        load(file)


def test_what_is_missing_or_no_description(copy):
    file, sidecar, write = copy
    for broken in ({}, [], sidecar | {"format": "other"}, sidecar | {"versions": None}):
        write(broken)
        with pytest.raises(UserError, match=r"map\.jax\.json describes no export"):
            load(file)
    write(sidecar)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*map\.jax: No such file"):
        load(file)
    file.with_name("map.jax.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*map\.jax\.json: No such file"):
        load(file)


def test_another_jax_is_named(copy):
    file, sidecar, write = copy
    refused = rf"written by jax 0\.4\.99 .*jax {jax.__version__} does not read.*export the run again"
    old = sidecar | {"versions": sidecar["versions"] | {"jax": "0.4.99"}}
    for version in (3, 999):
        write(old | {"calling_convention_version": version})
        with pytest.raises(UserError, match=rf"calling convention {version}\).*"):
            load(file)
    with pytest.raises(UserError, match=refused):
        load(file)
    file.write_bytes(b"\x10\0\0\0not a program")
    write(old | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(UserError, match=refused):
        load(file)


def test_flatbuffers_is_asked_for(run, copy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for call in (lambda: load(copy[0]), lambda: export_run(run, tmp_path / "x.jax")):
        with pytest.raises(UserError, match=r"flatbuffers, which is not installed: pip install 'sarjax\[export\]'"):
            call()
