"""FRD's method: what a small network learns of a large one's two dates, and that it needs none of it afterwards."""

import dataclasses
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from methods.toy_frd import (
    DATA,
    KEY,
    NAMES,
    NOTHING,
    SMALL,
    WIDE,
    build,
    context_of,
    drawn,
    run,
    taught_by,
)

from sarjax.augment.inputs import network_inputs
from sarjax.config import Augment, Mesh
from sarjax.data.pipeline import Batches
from sarjax.errors import UserError
from sarjax.losses import relational
from sarjax.losses.distillation import logit_distillation
from sarjax.methods import build_method, streams
from sarjax.methods.frd import label_cells, nearest_stages, relations
from sarjax.methods.record import Rest, Teacher
from sarjax.models import build_network
from sarjax.models.resampling import resize_bilinear
from sarjax.options import (
    DLLR,
    Change,
    Distillation,
    FCSiamDiff,
    LabelReassignment,
    LANet,
    RelationalDistillation,
    Supervised,
)
from sarjax.train.collectives import collectives, totals
from sarjax.train.mesh import make_mesh, put_batch, replicated

PLAIN = {"channels": "all"}


@pytest.fixture(scope="module")
def whole():
    """Everything on, and what it gives."""
    made = build(logits=0.3, dice=0.5, bfdd_pixel=0.1, bfdd_category=0.2, ccrd_pixel=0.4, ccrd_cluster=0.8, **PLAIN)
    return *made, *run(*made)


def test_the_terms_by_hand(whole):
    method, variables, frozen, batch, found, outputs = whole
    plain = build_method(context_of(Supervised(dice=0.5)))
    theirs, plain_outputs = run(plain, variables, None, batch)
    for name in ("cross_entropy", "dice"):
        np.testing.assert_allclose(found[name].total, theirs[name].total, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), outputs.stats, plain_outputs.stats
    )

    context = context_of(Supervised())
    cut, seen = streams.augmented(batch["labelled"], KEY, context.experiment.augment, DATA.spec)
    where = (cut["optical_valid"] > 0).all(1) & (cut["sar_valid"] > 0).all(1)
    assert not where.all()
    image = network_inputs(seen, context.experiment.inputs, DATA.spec, DATA.statistics)
    ours = {"params": variables.params, "batch_stats": variables.stats}
    mine, _ = jax.jit(lambda v, x: build_network(SMALL, 2).apply(v, x, True, mutable=["batch_stats"]))(ours, image)
    inputs = dataclasses.replace(context.experiment.inputs, modalities=("sar", "optical"))
    image = network_inputs(cut, inputs, DATA.spec, DATA.statistics)
    his = {"params": frozen.params, "batch_stats": frozen.stats}
    lesson = jax.jit(lambda v, x: build_network(WIDE, 2).apply(v, x, False))(his, image)
    assert set(mine.by_date) == set(lesson.by_date) == {4, 8, 16, 32}
    for stride, f in mine.by_date.items():
        t, size = lesson.by_date[stride], f.shape[2:4]
        cells = label_cells(cut["label"], where, 2, size)
        shares = [relational.difference_shares(x, cells, sharpness=0.1) for x in (f, t)]
        expected = {
            "bfdd_pixel": relational.pixel_distance(f, t, cells),
            "bfdd_category": relational.category_distance(f, t, cells),
            "ccrd_pixel": relational.share_divergence(*shares, cells),
            "ccrd_cluster": relational.share_columns(*shares, cells),
        }
        for (name, pair), weight in zip(expected.items(), (0.1, 0.2, 0.4, 0.8), strict=True):
            term = found[f"{name}_stride_{stride}"]
            np.testing.assert_allclose(term.mean(), pair[0] / pair[1], rtol=2e-3, atol=2e-5, err_msg=f"{name} {stride}")
            assert term.factor == weight / 4, "the mean over stages has the weight"
    pair = logit_distillation(mine.logits, lesson.logits, where.astype(jnp.float32), temperature=4.0)
    np.testing.assert_allclose(found["logits"].mean(), pair[0] / pair[1], rtol=1e-3)
    assert found["logits"].factor == 0.3
    assert len(found) == 2 + 16 + 1
    assert method.couples == ("batch-norm", "Dice", "relations between classes")
    metrics = {name: float(term.mean()) for name, term in outputs.metrics.items()}
    assert 0 <= metrics["teacher_agreement"] <= 1
    assert metrics["teacher_counts"] == pytest.approx(float(where.mean()), abs=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "logits"])
def test_every_part_is_a_switch(whole, name):
    """Traced: its terms alone are there, each with its share of the weight."""
    everything, taught = whole[4], taught_by()
    method, variables, frozen, batch = build(taught=taught, **NOTHING | {name: 0.5})
    found, _ = jax.eval_shape(lambda: run(method, variables, frozen, batch))
    wanted = {n for n in everything if n.startswith(name)}
    assert set(found) == {"cross_entropy", *wanted}
    assert ("relations between classes" in method.couples) == (name != "logits")


def test_every_part_teaches(whole):
    """By itself it moves the first convolution of the student, and nothing of the teacher."""
    method, variables, frozen, batch, everything, _ = whole

    def parts(kernel, bias):
        params = {**variables.params, "encoder": {**variables.params["encoder"], "conv1": {"kernel": kernel}}}
        theirs = {**frozen.params, "classifier": {**frozen.params["classifier"], "bias": bias}}
        found, _ = run(method, variables._replace(params=params), frozen._replace(params=theirs), batch)
        return {n: found[n].mean() for n in everything}

    kernel, bias = variables.params["encoder"]["conv1"]["kernel"], frozen.params["classifier"]["bias"]
    _, pull = jax.vjp(parts, kernel, bias)
    pull = jax.jit(jax.vmap(pull))
    slopes, none = pull({n: jnp.eye(len(everything))[i] for i, n in enumerate(everything)})
    for n, slope in zip(everything, slopes, strict=True):
        assert np.isfinite(slope).all(), n
        assert np.abs(slope).max() > 0, n
    assert not none.any()


# -------------------------------------------------------------------------------------------------- relations of arrays


def features(seed=0, strides=(4, 8), channels=3, side=32):
    rng = np.random.default_rng(seed)
    shape = {s: (2, 2, side // s, side // s, channels) for s in strides}
    return {s: jnp.asarray(rng.normal(size=n), jnp.float32) for s, n in shape.items()}


def cells_of(size):
    label = np.random.default_rng(1).integers(0, 2, (2, 32, 32)) * (np.arange(32) > 20)
    return label_cells(label, np.ones(label.shape, bool), 2, size)


def values(student, teacher, key=KEY, **options):
    @jax.jit
    def means(student, teacher, key):
        found = relations(RelationalDistillation(**NOTHING | options), student, teacher, cells_of, key)
        return {name: term.mean() for name, term in found.items()}

    return {name: float(mean) for name, mean in means(student, teacher, key).items()}


def test_balance_and_temperatures_are_read():
    student, teacher = features(0), features(1, channels=5)
    plain = values(student, teacher, **dict.fromkeys(NAMES, 1.0), **PLAIN)
    for changed, names in (
        ({"balanced": False}, {"bfdd_pixel"}),
        ({"sharpness": 0.5}, {"ccrd_pixel", "ccrd_cluster"}),
        ({"cluster_temperature": 0.2}, {"ccrd_cluster"}),
    ):
        found = values(student, teacher, **dict.fromkeys(NAMES, 1.0), **PLAIN, **changed)
        assert {n.partition("_stride")[0] for n in found if found[n] != plain[n]} == names
        assert all(found[n] != plain[n] for n in found if n.startswith(tuple(names)))


def test_channels_are_drawn_anew_in_each_step_and_stage():
    """Those of the wider network, for both dates alike; of equal ones all are there."""
    bfdd = {"bfdd_pixel": 1.0, "bfdd_category": 1.0}
    for student, teacher in ((features(0), features(1, channels=5)), (features(1, channels=5), features(0))):
        draws = [values(student, teacher, key, **bfdd) for key in (KEY, KEY, *jax.random.split(KEY, 6))]
        assert draws[0] == draws[1]
        for name in draws[0]:
            assert len({draw[name] for draw in draws}) > 1, name
        # Each is one of the ten choices of three of five channels.
        wide = teacher if teacher[4].shape[-1] == 5 else student
        choices = []
        for chosen in combinations(range(5), 3):
            cut = {s: f[..., chosen] for s, f in wide.items()}
            choices.append(values(*((student, cut) if wide is teacher else (cut, teacher)), **bfdd, **PLAIN))
        # {name: which choice each draw was}
        which = {
            name: [[c[name] == pytest.approx(draw[name], rel=1e-4) for c in choices].index(True) for draw in draws]
            for name in draws[0]
        }
        assert which["bfdd_pixel_stride_4"] == which["bfdd_category_stride_4"], "one draw for both parts"
        assert which["bfdd_pixel_stride_4"] != which["bfdd_pixel_stride_8"], "and one for each stage"
    equal = (features(0), features(2))
    assert values(*equal, **bfdd) == values(*equal, **bfdd, **PLAIN)


@pytest.mark.parametrize(
    ("student", "teacher", "stages"),
    [
        ((4, 8, 16, 32), (4, 8), {4: 4, 8: 8, 16: 8, 32: 8}),
        ((4, 8, 16), (4, 8, 16, 32), {4: 4, 8: 8, 16: 16}),
        ((1, 2, 4, 8), (4, 8, 16, 32), {1: 4, 2: 4, 4: 4, 8: 8}),
        ((8,), (4, 16), {8: 4}),
    ],
)
def test_stages_of_other_strides(student, teacher, stages):
    """The nearest, of two the finer; resized without antialiasing."""
    ours, theirs = features(0, student), features(1, teacher, channels=4)
    assert nearest_stages(ours, theirs) == stages
    found = values(ours, theirs, **dict.fromkeys(NAMES, 1.0), **PLAIN)
    assert {int(n.rpartition("_")[2]) for n in found} == set(stages)
    for stride, other in stages.items():
        size = (32 // stride, 32 // stride)
        resized = jnp.stack([resize_bilinear(theirs[other][:, date], size) for date in range(2)], 1)
        alone = values({stride: ours[stride]}, {stride: resized}, **dict.fromkeys(NAMES, 1.0), **PLAIN)
        for name, wanted in alone.items():
            assert found[name] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    term = relations(RelationalDistillation(), ours, theirs, cells_of, KEY)[f"bfdd_pixel_stride_{student[0]}"]
    assert term.factor == 1 / len(student)


def test_a_classical_student_of_a_deeper_teacher():
    """Traced: FC-Siam-diff has strides 1 to 8."""
    method, variables, frozen, batch = build(
        FCSiamDiff(width=0.25), taught_by(Change(encoder="resnet50", width=1 / 64))
    )
    found, _ = jax.eval_shape(lambda: run(method, variables, frozen, batch))
    assert {n for n in found if n.startswith("ccrd_pixel")} == {f"ccrd_pixel_stride_{s}" for s in (1, 2, 4, 8)}


def test_the_draw_is_of_the_steps_key():
    """Without augmentation another key changes what is drawn, and nothing else."""
    teacher, frozen = taught_by(modalities=("sar",))
    context = context_of(RelationalDistillation(), teacher=teacher)
    experiment = dataclasses.replace(context.experiment, augment=Augment(flip=False, rotate=False))
    method = build_method(context._replace(experiment=experiment))
    variables = drawn(method)
    batch = Batches(DATA.split("train"), method.streams, batch_size=4, seed=0)[0]
    one, other = (run(method, variables, frozen, batch, jax.random.key(seed))[0] for seed in (1, 2))
    for name, term in one.items():
        assert (float(term.mean()) != float(other[name].mean())) == name.startswith("bfdd"), name


def test_relations_need_both_dates_in_the_student_too():
    """An optical teacher sees all; where SAR misses a date there is nothing to relate, only to classify."""
    taught = taught_by(SMALL, ("optical",))
    method, variables, frozen, batch = build(taught=taught, **PLAIN)
    rows = dict(batch["labelled"])
    rows["sar_valid"] = rows["sar_valid"].copy()
    rows["sar_valid"][:, 0] = 0
    found, _ = run(method, variables, frozen, {"labelled": rows})
    assert all((float(term.weight) == 0) == ("stride" in name) for name, term in found.items())


def test_eight_devices_gather_nothing(whole):
    """What they come to is in `train/test_layouts.py`."""
    method, variables, frozen, _, _, _ = whole
    batch = Batches(DATA.split("train"), method.streams, batch_size=8, seed=0)[0]

    def gradient(params, stats, frozen, batch):
        def value(params):
            terms, _ = method.loss(params, Rest(frozen, stats, {}), batch, KEY, jnp.zeros((), jnp.int32))
            return sum(t.factor * t.mean() for t in terms.values())

        return jax.grad(value)(params)

    mesh = make_mesh(Mesh())
    args = jax.device_put((variables.params, variables.stats, frozen), replicated(mesh))
    compiled = jax.jit(gradient).lower(*args, put_batch(mesh, batch)).compile()
    assert set(totals(collectives(compiled.as_text()))) == {"all-reduce"}


def test_cells_hold_the_shares_of_labelled_pixels():
    label = np.zeros((1, 4, 4), np.uint8)
    label[0, 0, 0], label[0, :2, 2:] = 1, 255
    where = np.ones((1, 4, 4), bool)
    where[0, 3] = False
    cells = np.asarray(label_cells(label, where, 2, (2, 2)))
    np.testing.assert_array_equal(cells[0], [[[0.75, 0.25], [0, 0]], [[0.5, 0], [0.5, 0]]])


# ----------------------------------------------------------------------------------------------------- what is refused


def test_networks_and_inputs_that_do_not_fit():
    teacher, _ = taught_by()
    options = RelationalDistillation()
    with pytest.raises(UserError, match=r"inputs.by_date is true, but network 'lanet' .* false fits"):
        build_method(context_of(options, LANet(width=0.125), teacher=teacher))
    with pytest.raises(UserError, match="compares dates, not 'lanet': change and fc_siam_diff are accepted"):
        build_method(context_of(options, LANet(width=0.125), teacher=teacher, by_date=False))
    with pytest.raises(UserError, match=r"inputs.by_date is false, but network 'change' .* true fits"):
        build_method(context_of(Supervised(), by_date=False))
    for dates in ((1,), (0, 0)):
        with pytest.raises(UserError, match=r"'change' compares 2 dates, but inputs.dates is .* data of 2 dates, or"):
            build_method(context_of(Supervised(), dates=dates))
    with pytest.raises(UserError, match=r"inputs.by_date is true, but network 'dllr'"):
        build_method(context_of(LabelReassignment(), DLLR(width=1 / 16), modalities=("sar", "optical")))
    with pytest.raises(UserError, match=r"the teacher compares dates 1 and 0, this run 0 and 1"):
        build_method(context_of(options, teacher=taught_by(dates=(1, 0))[0]))
    with pytest.raises(UserError, match=r"date_difference joins the dates that inputs.by_date keeps apart"):
        build_method(context_of(Supervised(), date_difference=True))
    with pytest.raises(UserError, match="needs a teacher"):
        build_method(context_of(options))
    one_image = Teacher(None, context_of(Supervised(), LANet(width=0.125), by_date=False).experiment, DATA.spec, None)
    method = build_method(context_of(Supervised(), LANet(width=0.125), by_date=False))
    with pytest.raises(UserError, match="the teacher's network 'lanet' sees all channels as one image"):
        build_method(context_of(options, teacher=one_image._replace(method=method)))
    other = dataclasses.replace(DATA.spec, classes=toy.SPEC.classes)
    with pytest.raises(
        UserError, match=r"the teacher knows the classes unchanged, changed, .* has land, water, absent"
    ):
        build_method(context_of(options, teacher=teacher, spec=other))
    for name, value in (("sharpness", 0.0), ("bfdd_pixel", -1.0), ("temperature", 0.0)):
        with pytest.raises(UserError, match=f"method.{name} is {value}, but should be"):
            build_method(context_of(RelationalDistillation(**{name: value}), teacher=teacher))


def test_a_change_network_learns_by_the_other_method_too():
    """DHFA's distillation compares its pyramid of differences."""
    teacher, frozen = taught_by(Change(width=1 / 32, encoder="resnet34"))
    method = build_method(context_of(Distillation(), teacher=teacher))
    variables = drawn(method)
    batch = Batches(DATA.split("train"), method.streams, batch_size=4, seed=0)[0]
    found, _ = jax.eval_shape(lambda: run(method, variables, frozen, batch))
    assert "features_stride_4" in found
