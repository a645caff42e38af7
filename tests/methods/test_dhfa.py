"""DHFA-Net's method: what the student learns from whom, where, and that it needs SAR alone afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sarjax.augment.geometry import geometry
from sarjax.augment.inputs import network_inputs
from sarjax.augment.radiometry import radiometry
from sarjax.config import Augment, Data, Inputs
from sarjax.data.pipeline import Batches
from sarjax.errors import UserError
from sarjax.losses.distillation import feature_loss, logit_distillation
from sarjax.losses.pixel import cross_entropy, dice_loss
from sarjax.methods import build_method
from sarjax.methods.dhfa import NAME, augmented
from sarjax.methods.record import Context, Rest, Schedule, Teacher
from sarjax.models import build_network
from sarjax.models.resampling import adaptive_avg_pool
from sarjax.options import DHFA, FCN, Clustering, DeepLabV3, Distillation, LANet, Supervised
from sarjax.spec import IGNORE_LABEL

DATA = toy.dataset(size=64)
SMALL = DHFA(width=0.0625)
NOTHING = {"features": 0.0, "head": 0.0, "logits": 0.0}
AUGMENT = Augment(flip=True, rotate=True, speckle=3.0, jitter=0.3)
KEY = jax.random.key(1)


def context_of(options, network=SMALL, *, modalities=("sar",), teacher=None, labelled=1.0, spec=DATA.spec):
    experiment = toy.config(
        options,
        network=network,
        inputs=Inputs(modalities=modalities),
        augment=AUGMENT,
        data=Data("toy", labelled=labelled),
    ).experiment
    return Context(experiment, spec, DATA.statistics, Schedule(6, 12, 4), teacher)


def taught_by(network=SMALL, modalities=("optical",), spec=DATA.spec):
    """A teacher with fresh weights, and its variables."""
    context = context_of(Supervised(), network, modalities=modalities, spec=spec)
    method = build_method(context)
    variables = jax.jit(method.init)(jax.random.key(7))
    return Teacher(method, context.experiment, spec, DATA.statistics), variables


def build(network=SMALL, teacher=None, labelled=1.0, **options):
    teacher, frozen = teacher or taught_by()
    method = build_method(context_of(Distillation(**options), network, teacher=teacher, labelled=labelled))
    variables = jax.jit(method.init)(jax.random.key(0))
    batch = Batches(DATA.split("train"), method.streams, batch_size=4, seed=0, labelled=labelled)[0]
    return method, variables, frozen, batch


def run(method, variables, frozen, batch):
    rest = Rest(frozen, variables.stats, variables.memory)
    return jax.jit(method.loss)(variables.params, rest, batch, KEY, jnp.zeros((), jnp.int32))


def gradient(method, variables, frozen, batch):
    def value(params):
        rest = Rest(frozen, variables.stats, variables.memory)
        found, _ = method.loss(params, rest, batch, KEY, jnp.zeros((), jnp.int32))
        return sum(t.factor * t.mean() for t in found.values())

    return jax.jit(jax.grad(value))(variables.params)


def views(rows):
    """A labelled batch as the teacher sees it, and as the student does."""
    where, how = jax.random.split(KEY)
    cut = geometry(rows, where, AUGMENT)
    return cut, radiometry(cut, how, AUGMENT, DATA.spec)


def test_the_terms_by_hand():
    method, variables, frozen, batch = build(features=0.7, head=0.3, logits=0.2, temperature=3.0, dice=0.5)
    teacher, _ = taught_by()
    found, outputs = run(method, variables, frozen, batch)
    cut, seen = views(batch["labelled"])
    where = (cut["optical_valid"] > 0).all(1)
    assert not where.all()

    # The student under its batch's statistics: what `supervised` computes with the same draws, to the bit.
    plain = build_method(context_of(Supervised(dice=0.5)))
    theirs, plain_outputs = run(plain, variables, None, batch)
    for name in ("cross_entropy", "dice"):
        np.testing.assert_array_equal(found[name].total, theirs[name].total)
    base = {k: v for k, v in outputs.stats.items() if k != NAME}
    jax.tree.map(np.testing.assert_array_equal, base, {k: v for k, v in plain_outputs.stats.items() if k != NAME})

    network = build_network(SMALL, 3)
    image = network_inputs(seen, Inputs(modalities=("sar",)), DATA.spec, DATA.statistics)
    mine, _ = network.apply(
        {"params": variables.params, "batch_stats": variables.stats}, image, True, mutable=["batch_stats"]
    )
    image = network_inputs(cut, Inputs(modalities=("optical",)), DATA.spec, DATA.statistics)
    lesson = network.apply({"params": frozen.params, "batch_stats": frozen.stats}, image, False)

    total = 0.0
    for name, (ours, target) in {
        **{f"stride_{s}": (mine.pyramid[s], lesson.pyramid[s]) for s in (4, 8, 16, 32)},
        "embedding": (mine.embedding, lesson.embedding),
    }.items():
        cells = adaptive_avg_pool(where[..., None].astype(jnp.float32), ours.shape[1:3])[..., 0]
        pair = feature_loss(ours, target, cells)
        term = found[f"features_{name}"]
        assert float(term.mean()) == pytest.approx(float(pair[0] / pair[1]), rel=1e-4), name
        total += float(term.factor)
    assert total == pytest.approx(0.7), "the mean over levels has the weight"
    pair = logit_distillation(mine.logits, lesson.logits, where.astype(jnp.float32), temperature=3.0)
    assert float(found["logits"].mean()) == pytest.approx(float(pair[0] / pair[1]), rel=1e-4)
    scores = teacher.method.classify(frozen.params, frozen.stats, mine.embedding, cut["label"].shape[1:3])
    pair = cross_entropy(scores, jnp.where(where, cut["label"], IGNORE_LABEL))
    assert float(found["head"].mean()) == pytest.approx(float(pair[0] / pair[1]), rel=1e-4)
    assert [float(found[n].factor) for n in ("logits", "head")] == pytest.approx([0.2, 0.3])
    answer, known = lesson.logits.argmax(-1), where & (cut["label"] != IGNORE_LABEL)
    right = float((known & (answer == cut["label"])).sum() / known.sum())
    assert float(outputs.metrics["teacher_accuracy"].mean()) == pytest.approx(right, abs=1e-6)
    assert float(outputs.metrics["teacher_counts"].mean()) == pytest.approx(float(where.mean()), abs=1e-6)


def test_switches():
    names = {
        "features": {f"features_{n}" for n in ("stride_4", "stride_8", "stride_16", "stride_32", "embedding")},
        "head": {"head"},
        "logits": {"logits"},
        "hard": set(),
    }
    teacher = taught_by()
    for switch, wanted in names.items():
        method, variables, frozen, batch = build(teacher=teacher, **NOTHING | {switch: 0.5})
        found = jax.eval_shape(
            lambda v, f, b, m=method: m.loss(v.params, Rest(f, v.stats, v.memory), b, KEY, 0)[0],
            variables, frozen, batch,
        )  # fmt: skip
        assert set(found) == {"cross_entropy", *wanted, *({"hard"} if switch == "hard" else ())}
    method, variables, frozen, batch = build(teacher=teacher, logit_loss="channel", feature_loss="squared")
    found, _ = run(method, variables, frozen, batch)
    other, _ = run(*build(teacher=teacher)[0:2], frozen, batch)
    for name in ("logits", "features_embedding"):
        assert np.isfinite(found[name].total)
        assert float(found[name].mean()) != pytest.approx(float(other[name].mean()), rel=1e-3)


def test_the_student_needs_its_own_sensor_alone():
    method, variables, _, batch = build()
    assert set(method.requires) == {"sar", "sar_valid", "label", "optical", "optical_valid"}
    head = method.heads["main"]
    assert head.requires == ("sar", "sar_valid")
    rows = {k: batch["labelled"][k] for k in head.requires}
    logits = head.predict(variables.params, variables.stats, rows)
    alone = build_method(context_of(Distillation()), for_inference=True)
    np.testing.assert_array_equal(alone.heads["main"].predict(variables.params, variables.stats, rows), logits)
    assert alone.forward(variables.params, variables.stats, rows).logits.shape == logits.shape
    with pytest.raises(UserError, match="needs a teacher: give --teacher RUN"):
        build_method(context_of(Distillation()))


def test_the_teacher_is_frozen():
    method, variables, frozen, batch = build(**NOTHING | {"logits": 1.0})

    def value(theirs):
        rest = Rest(theirs, variables.stats, variables.memory)
        return method.loss(variables.params, rest, batch, KEY, 0)[0]["logits"].total

    gradients = jax.grad(lambda params: value(frozen._replace(params=params)))(frozen.params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))
    # In inference mode a row's lesson does not depend on the other rows; under batch statistics it would.
    teacher, _ = taught_by()
    rows = batch["labelled"]
    whole = teacher.method.forward(frozen.params, frozen.stats, rows).logits
    part = teacher.method.forward(frozen.params, frozen.stats, {k: v[:1] for k, v in rows.items()}).logits
    np.testing.assert_allclose(part, whole[:1], atol=1e-5)


def test_without_optical_data_nothing_is_learnt_from_the_teacher():
    teacher = taught_by()
    method, variables, frozen, batch = build(teacher=teacher, hard=1.0, dice=1.0)
    rows = batch["labelled"]
    dark = {"labelled": rows | {"optical_valid": np.zeros_like(rows["optical_valid"])}}
    found, _ = run(method, variables, frozen, dark)
    for name, term in found.items():
        if name not in ("cross_entropy", "dice"):
            assert float(term.total) == float(term.weight) == 0.0, name
    plain = build_method(context_of(Supervised(dice=1.0)))
    ours, theirs = gradient(method, variables, frozen, dark), gradient(plain, variables, None, dark)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), ours["encoder"], theirs["encoder"])
    # What lies under a pixel without data says nothing.
    holes = np.array(rows["optical_valid"])
    holes[:, :, :32] = 0
    dark, bright = (
        rows | {"optical_valid": holes, "optical": np.where(holes[..., None] > 0, rows["optical"], fill)}
        for fill in (0, 255)
    )
    first, second = (run(method, variables, frozen, {"labelled": shown})[0] for shown in (dark, bright))
    assert {k: float(t.mean()) for k, t in first.items()} == {k: float(t.mean()) for k, t in second.items()}


def test_few_labels_many_pairs():
    """Unlabelled rows stay with the labelled ones that they follow, and their truth is not learnt from."""
    teacher = taught_by()
    method, variables, frozen, batch = build(teacher=teacher, labelled=0.5, pairs=2, hard=0.5, dice=0.5)
    assert {k: (s.kind, s.rows) for k, s in method.streams.items()} == {
        "labelled": ("labelled", 1.0),
        "pairs": ("unlabelled", 2.0),
    }
    assert (batch["pairs"]["label"] == IGNORE_LABEL).all()
    found, _ = run(method, variables, frozen, batch)
    known = geometry(batch["labelled"], jax.random.split(KEY)[0], AUGMENT)["label"] != IGNORE_LABEL
    assert float(found["cross_entropy"].weight) == known.sum()
    assert float(found["logits"].weight) > 2 * 4 * 64 * 64 * 0.8
    assert float(found["hard"].weight) > 0
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 3, batch["pairs"]["hidden_label"].shape).astype(np.uint8)
    noisy = batch | {"pairs": batch["pairs"] | {"hidden_label": noise}}
    first, second = (gradient(method, variables, frozen, b) for b in (batch, noisy))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    # The labelled rows are those of the student alone, seen alike.
    rows, seen = augmented(batch, KEY, AUGMENT, DATA.spec)
    cut, shown = views(batch["labelled"])
    for name in ("label", "sar", "optical_valid"):
        np.testing.assert_array_equal(rows[name][::3], cut[name])
        np.testing.assert_array_equal(seen[name][::3], shown[name])
    assert (rows["label"][1::3] == IGNORE_LABEL).all()
    ids = rows["id"].reshape(4, 3)
    np.testing.assert_array_equal(ids[:, 0], batch["labelled"]["id"])
    np.testing.assert_array_equal(ids[:, 1:].ravel(), batch["pairs"]["id"])


def test_whom_to_trust():
    teacher = taught_by()
    _, _, frozen, batch = build(teacher=teacher)
    cut, _ = views(batch["labelled"])
    logits = teacher[0].method.forward(frozen.params, frozen.stats, cut).logits
    seen, label = (cut["optical_valid"] > 0).all(1), cut["label"]
    right = seen & ((label == IGNORE_LABEL) | (logits.argmax(-1) == label))
    bound = float(jnp.median(jax.nn.softmax(logits).max(-1)))
    sure = seen & (jax.nn.softmax(logits).max(-1) >= bound)
    for options, kept in (({"right": True}, right), ({"confidence": bound}, sure)):
        method, variables, _, _ = build(teacher=teacher, **options)
        found, _ = run(method, variables, frozen, batch)
        assert 0 < int(kept.sum()) < int(seen.sum())
        assert float(found["logits"].weight) == pytest.approx(int(kept.sum()), abs=2), options


@pytest.mark.parametrize(
    ("student", "teacher", "reading", "strides"),
    [
        (LANet(width=0.0625), DeepLabV3(encoder="resnet50", width=0.0625, output_stride=16), "direct", (4, 8, 16)),
        (DHFA(width=0.125), FCN(width=0.0625, stages=2), "hallucinate", (4, 8)),
        (DHFA(width=0.0625, fuse=True), SMALL, "direct", (4, 8, 16, 32)),
    ],
)
def test_any_teacher_any_student(student, teacher, reading, strides):
    method, variables, frozen, batch = build(student, taught_by(teacher), reading=reading)
    found, outputs = run(method, variables, frozen, batch)
    levels = {f"features_stride_{s}" for s in strides} | {"features_embedding"}
    assert {n for n in found if n.startswith("features")} == levels
    gradients = gradient(method, variables, frozen, batch)
    made = gradients.get(NAME, {})
    assert bool(made) == (student != DHFA(width=0.0625, fuse=True)), "a projection where channels differ"
    for leaf in jax.tree.leaves(made):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0 or leaf.ndim == 1  # a bias before a norm has no gradient
    if reading == "hallucinate":
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), outputs.stats[NAME], variables.stats[NAME])
        assert min(jax.tree.leaves(moved)) > 0, "its norms learn their statistics"


def test_scene_clustering_beside_it():
    clustering = Clustering(instance=1.0, cluster=1.0, clusters=3, positives="augmentation")
    method, variables, frozen, batch = build(clustering=clustering)
    found, _ = run(method, variables, frozen, batch)
    assert {"instance", "cluster", "logits", "head"} <= set(found)
    assert all(np.isfinite(float(t.mean())) for t in found.values())


def changed(**changes):
    return dataclasses.replace(DATA.spec, **changes)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (changed(classes=tuple(reversed(DATA.spec.classes)), excluded=()), "knows the classes absent, water, land"),
        (changed(dates=2), r"trained on 2 date\(s\), data set 'toy' has 1"),
        (
            changed(modalities=(DATA.spec.modalities[0], dataclasses.replace(DATA.spec.modalities[1], dtype="uint16"))),
            r"reads 'optical' as red, nir \(uint16\), data set 'toy' holds red, nir \(uint8\)",
        ),
        (
            changed(
                modalities=(
                    DATA.spec.modalities[0],
                    dataclasses.replace(DATA.spec.modalities[1], bands=DATA.spec.modalities[1].bands[::-1]),
                )
            ),
            r"reads 'optical' as nir, red \(uint8\), data set 'toy' holds red, nir \(uint8\)",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(spec, message):
    with pytest.raises(UserError, match=message):
        build(teacher=taught_by(spec=spec))


def test_hard_targets_by_hand():
    """The teacher's answers where nothing is labelled and it has data, with cross-entropy and Dice."""
    method, variables, frozen, batch = build(labelled=0.5, pairs=1, hard=0.7, dice=0.5, **NOTHING)
    teacher, _ = taught_by()
    found, _ = run(method, variables, frozen, batch)
    rows, seen = jax.jit(lambda b: augmented(b, KEY, AUGMENT, DATA.spec))(batch)
    image = network_inputs(seen, Inputs(modalities=("sar",)), DATA.spec, DATA.statistics)
    student = {"params": variables.params, "batch_stats": variables.stats}
    mine, _ = jax.jit(lambda v, x: build_network(SMALL, 3).apply(v, x, True, mutable=["batch_stats"]))(student, image)
    answer = jax.jit(teacher.method.forward)(frozen.params, frozen.stats, rows).logits.argmax(-1)
    open_to_it = (rows["label"] == IGNORE_LABEL) & (rows["optical_valid"] > 0).all(1)
    target = np.where(open_to_it, answer, IGNORE_LABEL)
    assert 0.3 < open_to_it.mean() < 0.7, "the pairs, and holes in labels; not all of them"
    for name, loss, factor in (("hard", cross_entropy, 0.7), ("hard_dice", dice_loss, 0.35)):
        np.testing.assert_allclose((found[name].total, found[name].weight), loss(mine.logits, target), rtol=2e-4)
        np.testing.assert_allclose(found[name].factor, factor)


def test_what_is_refused():
    with pytest.raises(UserError, match=r"'lanet' has no single classifier .* method.head 0 fits"):
        build(teacher=taught_by(LANet(width=0.0625)))
    build(teacher=taught_by(LANet(width=0.0625)), head=0.0)
    sar_only = changed(modalities=DATA.spec.modalities[:1])
    teacher, _ = taught_by()
    with pytest.raises(UserError, match="reads 'optical', which data set 'toy' does not hold: sar"):
        build_method(context_of(Distillation(), teacher=teacher, spec=sar_only))
    for name, value in (("pairs", -1), ("temperature", 0.0), ("features", -1.0), ("confidence", 1.5), ("dice", -0.5)):
        with pytest.raises(UserError, match=f"method.{name} is {value}, but should be "):
            build(**{name: value})
