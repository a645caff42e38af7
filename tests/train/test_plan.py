"""Plans of what is not there: exact where rules decide, near where a compiler does, and said to be estimates."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from verbs import fails, run

from sarjax import config, recipes
from sarjax.data.declared import TILES, described
from sarjax.data.pipeline import Batches
from sarjax.errors import UserError
from sarjax.methods import build_method
from sarjax.methods.record import Context, Schedule
from sarjax.train import mesh as meshes
from sarjax.train import plan as plans
from sarjax.train.devices import KINDS
from sarjax.train.mesh import abstract_batch, make_mesh
from sarjax.train.plan import Asked, fitting_batch, plan, small_mesh
from sarjax.train.program import Program, compile_step, device_bytes, planned_batch

DATA = toy.dataset()
QUIET = {"say": lambda line: None}


def axes(data, fsdp=1, space=1):
    return {"data": data, "fsdp": fsdp, "space": space}


@pytest.mark.parametrize(
    ("sizes", "limit", "small"),
    [
        (axes(256), 8, axes(8)),
        (axes(32, 8), 8, axes(2, 4)),
        (axes(64, 2, 2), 8, axes(2, 2, 2)),
        (axes(1, 256), 8, axes(1, 8)),
        (axes(3, 4), 8, axes(2, 4)),
        (axes(11), 8, axes(8)),
        (axes(5, 9), 8, axes(2, 3)),
        (axes(2, 4), 8, axes(2, 4)),
        (axes(8, 4, 8), 8, axes(2, 2, 2)),
    ],
)
def test_the_small_mesh_is_like_the_whole(sizes, limit, small):
    found = small_mesh(sizes, limit)
    assert found == small
    assert math.prod(found.values()) <= limit


@pytest.mark.parametrize("method", [None, toy.Toy()])
def test_a_batch_of_shapes_is_that_of_the_pipeline(method):
    mesh = make_mesh(config.Mesh())
    experiment = toy.config(method).experiment
    built = build_method(Context(experiment, DATA.spec, DATA.statistics, Schedule(6, 12, 8)))
    tables = {"neighbours": np.full((12, 2), -1)}
    batches = Batches(DATA.split("train", ("sar",)), built.streams, batch_size=8, seed=0, tables=tables)
    read, planned = abstract_batch(mesh, batches[0]), planned_batch(built, experiment, DATA, mesh)
    assert jax.tree.structure(read) == jax.tree.structure(planned)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(planned), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


@pytest.fixture(scope="module")
def toy_plan():
    """2 x 4 from 2 x 2, with everything cut that can be, and the step of the whole mesh."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "SMALL", 8)
        optimizer = config.Optimizer(name="adamw", ema=0.9)
        experiment = toy.config(toy.Toy(), optimizer=optimizer, batch_size=16).experiment
        said = []
        asked = Asked(experiment, DATA, axes(2, 4), KINDS["h100"], notes=("toys",))
        found = plan(asked, limit=4, say=said.append)
        return found, compile_step(experiment, DATA, make_mesh(config.Mesh(2, 4))), said


def test_a_plan_is_what_the_compiler_says(toy_plan):
    found, real, said = toy_plan
    assert said[0] == "toys"
    assert [line.split(",")[0] for line in said[1:]] == ["compiling the step for data 2 x fsdp 2"] * 2
    assert not found["compiled"]["exactly"]
    memory = found["memory"]
    for name, tree in {
        "parameters": real.state.params,
        "optimizer": real.state.opt_state,
        "mean": real.state.ema,
        "statistics": real.state.stats,
        "memory": real.state.memory,
        "batch": real.batch,
    }.items():
        assert memory[name] == device_bytes(tree), name
    assert memory["total"] == pytest.approx(real.peak, rel=0.05)
    whole = plans._sums(real)
    gathered = {k: v for k, v in whole.items() if k[0] == "parameters"}
    assert gathered
    planned = {(c["purpose"], c["kind"], tuple(c["axes"])): c["bytes"] for c in found["collectives"]}
    assert {k: planned[k] for k in gathered} == {k: v[1] for k, v in gathered.items()}
    assert sum(planned.values()) == pytest.approx(sum(size for _, size in whole.values()), rel=0.02)
    assert found["flops"] == pytest.approx(real.compiled.cost_analysis()["flops"], rel=0.05)


def test_every_estimate_says_so_and_how(toy_plan):
    found, _, _ = toy_plan
    assert set(plans.EXACT).isdisjoint(found["estimates"])
    assert set(plans.EXACT) | {"temporaries", "total", "usable"} == set(found["memory"])
    assert all(how.startswith(("estimate: ", "model: ")) for how in found["estimates"].values())
    assert found["caveat"] == "Nothing of this was compared with a real pod or cluster."
    assert json.loads(json.dumps(found)) == found


def test_time_is_the_model_that_it_says(toy_plan):
    found, _, _ = toy_plan
    seconds, kind = found["seconds"], KINDS["h100"]
    assert seconds["computing"] == pytest.approx(found["flops"] / (0.3 * kind.float32))
    assert seconds["memory"] == pytest.approx(found["memory_traffic_bytes"] / kind.bandwidth)
    assert seconds["sending"] == pytest.approx(sum(c["sent"] for c in found["collectives"]) / kind.link, rel=1e-3)
    assert seconds["step"] == max(seconds["computing"], seconds["memory"]) + seconds["sending"]
    assert found["rows_per_second"] == 16 / seconds["step"]


def test_the_largest_batch_fits_and_one_row_more_does_not(toy_plan):
    found, _, _ = toy_plan
    largest, usable = found["largest_batch"], found["memory"]["usable"]
    assert largest["batch"] == largest["rows_per_device"] * 8
    at = lambda rows: largest["bytes_without_rows"] + rows * largest["bytes_per_row"]  # noqa: E731
    rows = largest["rows_per_device"]
    assert at(rows) <= usable * 1.001
    assert at(rows + 1) > usable * 0.999
    tight = plans._largest(found["memory"] | {"usable": 0}, 1.0, 2, 8, 1)
    assert (tight["rows_per_device"], tight["batch"]) == (0, 0)


def test_what_rows_see_of_each_other_grows_with_the_mesh():
    """A product of all rows with all rows: what a device holds, and gathers, is as long as the batch."""

    def program(devices):
        mesh = make_mesh(config.Mesh(data=devices), jax.devices()[:devices])
        rows = jax.ShapeDtypeStruct((4 * devices, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
        whole = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P()))
        compiled = jax.jit(lambda w, x: jnp.sum(jnp.tanh((x * w) @ x.T))).lower(whole, rows).compile()
        return Program(compiled, _State((whole,)), None, rows, axes(devices))

    two, four, eight = (program(n) for n in (2, 4, 8))
    assert plans._grows(two)
    gathered = lambda p: sum(c.size for c in p.collectives() if c.kind == "all-gather")  # noqa: E731
    assert plans._along(gathered, two, four, 8) == gathered(eight) == 8 * 4 * 64 * 4
    assert plans._along(gathered, two, None, 8) == gathered(two)
    later = list(plans._traffic(two, four, axes(8), _State(()), KINDS["v5e"]))
    assert sum(c["bytes"] for c in later if c["purpose"] == "rows") == gathered(eight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
    params: tuple


def test_groups_beyond_a_domain_take_the_network():
    kind = KINDS["h100"]._replace(domain=4)
    mesh = make_mesh(config.Mesh(4, 2))
    leaf = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def f(w, x):
        whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jnp.sum(x @ whole)

    program = Program(jax.jit(f).lower(leaf, x).compile(), _State((leaf,)), None, x, axes(4, 2))
    along = {tuple(c["axes"]): c for c in plans._traffic(program, None, axes(4, 2), program.state, kind)}
    near, far = along["fsdp",], along["data", "fsdp"]
    assert near["seconds"] == pytest.approx(near["sent"] / kind.link)
    assert far["seconds"] == pytest.approx(far["sent"] / kind.network)


def test_least_traffic():
    mesh = make_mesh(config.Mesh(4, 2))
    leaves = {
        "cut": jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))),
        "whole": jax.ShapeDtypeStruct((100,), jnp.float32, sharding=NamedSharding(mesh, P())),
    }
    size = 4 * 256 * 256
    expected = size / 2 + size / 2 + 2 * (3 / 4) * size / 2 + 2 * (7 / 8) * 400
    assert plans.least_sent(_State(leaves), axes(4, 2)) == expected


def test_batches_that_a_mesh_can_share():
    experiment = dataclasses.replace(recipes.find("cheng_lanet").experiment, batch_size=32)
    assert [fitting_batch(experiment, axes(n)) for n in (8, 24, 256)] == [32, 48, 256]
    assert fitting_batch(dataclasses.replace(experiment, accumulate=3), axes(8)) == 48


def test_data_that_is_not_there(tmp_path, fake_records):
    for name in sorted(recipes.RECIPES):
        data = recipes.find(name).experiment.data
        declared, where = described(data.name, data.config, tmp_path)
        built, found = described(data.name, data.config, fake_records)
        assert (declared.spec, declared.tile) == (built.spec, built.tile), name
        assert "declares" in where
        assert f"{TILES:,}" in where
        assert str(fake_records) in found
    with pytest.raises(UserError, match="only its files say what it holds"):
        described("paired_folder", "", tmp_path)
    assert described("ombria", "", tmp_path, tiles=7)[0].statistics.tiles == {"train": 7}


def test_kinds_are_complete():
    for kind in KINDS.values():
        assert kind.sources
        assert all(source.startswith("https://") for source in kind.sources)
        assert 0 < kind.usable <= 1
        assert kind.network < kind.link < kind.bandwidth < kind.float32 <= kind.bfloat16


SMALL = [
    *("--network.width", "0.0625", "--network.stages", "1", "--augment.crop", "32", "--augment.no-flip"),
    *("--augment.no-rotate", "--optimizer.name", "adamw"),
]


@pytest.mark.usefixtures("session_devices")
def test_the_verb(tmp_path, capsys):
    """With records nowhere; what is planned for 256 devices comes from two programs of four."""
    args = ["plan", "whu_fcn", *SMALL, "--devices", "256", "--device-kind", "v5e", "--mesh.fsdp", "4"]
    run(*args, "--data-dir", tmp_path, "--compile-devices", "4", "--json")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["devices"], found["mesh"], found["batch"]) == (256, axes(64, 4), 256)
    assert [one["mesh"] for one in found["compiled"]["programs"]] == [axes(2, 2)] * 2
    assert "256 devices cannot share the recipe's 32 rows equally: 256 are planned" in err
    assert found["notes"][0] in err
    from sarjax.cli.plan import _print

    _print(found)
    out, _ = capsys.readouterr()
    for line in (
        "Nothing of this was compared",
        "estimate: ",
        "largest batch",
        "a model, never measured",
        "docs.cloud",
    ):
        assert line in out


@pytest.mark.usefixtures("session_devices")
def test_what_is_refused(tmp_path, capsys):
    ask = ["--devices", "8", "--device-kind", "h100", "--data-dir", tmp_path]
    assert "needs a recipe first" in fails(capsys, "plan")
    assert "did you mean 'whu_fcn'" in fails(capsys, "plan", "whu_fnc", *ask)
    assert "--devices is 0" in fails(capsys, "plan", "whu_fcn", "--devices", "0", "--device-kind", "h100")
    assert "sizes whose product is 8" in fails(capsys, "plan", "whu_fcn", *ask, "--mesh.fsdp", "3")
    assert "a multiple of 8 is accepted" in fails(capsys, "plan", "whu_fcn", *ask, "--batch-size", "12")
    assert "does not divide images of 256 lines" in fails(
        capsys,
        "plan",
        "whu_fcn",
        "--devices",
        "3",
        "--device-kind",
        "h100",
        "--mesh.space",
        "3",
        "--data-dir",
        tmp_path,
    )
    assert "--efficiency is 2" in fails(capsys, "plan", "whu_fcn", *ask, "--efficiency", "2")
    few = fails(capsys, "plan", "whu_fcn", *ask, "--mesh.fsdp", "4", "--compile-devices", "2")
    assert "--compile-devices is 2, too few for a mesh with the axes of data 2 x fsdp 4 x space 1; 4 or more" in few
    assert "--compile-devices is 0" in fails(capsys, "plan", "whu_fcn", *ask, "--compile-devices", "0")
    assert "needs a teacher" in fails(capsys, "plan", "dhfa_student", *ask, "--batch-size", "32")
    assert "neither a run's directory nor a recipe" in fails(
        capsys, "plan", "dhfa_student", *ask, "--teacher", tmp_path / "none"
    )
