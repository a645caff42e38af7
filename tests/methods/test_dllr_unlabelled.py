"""What DLLR learns from unlabelled rows: pseudo-labels, masks, the other sensor; and what it must not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from methods.toy_dllr import (
    BOTH,
    DATA,
    KEY,
    OFF,
    PLAIN,
    SMALL,
    build,
    context_of,
    gradient,
    run,
    same,
    seen_by,
)

from sarjax.augment.inputs import network_inputs
from sarjax.augment.keys import row_keys
from sarjax.augment.masking import asymmetric_masks
from sarjax.losses.pixel import cross_entropy
from sarjax.methods import build_method
from sarjax.methods.dllr import HEADS, ROLE, SENSORS, UNLABELLED
from sarjax.methods.dllr_terms import complementary_loss, withheld
from sarjax.methods.reassignment import cell_mass, pseudo_labels
from sarjax.models import build_network
from sarjax.models.segmenters import resized
from sarjax.options import LabelReassignment
from sarjax.spec import IGNORE_LABEL


def test_hidden_labels_teach_nothing():
    method, variables, batch = build()
    r = np.random.default_rng(0)
    gradients, memories = [], []
    for _ in range(2):
        noise = r.integers(0, 3, batch[UNLABELLED]["hidden_label"].shape).astype(np.uint8)
        noisy = batch | {UNLABELLED: batch[UNLABELLED] | {"hidden_label": noise}}
        gradients.append(gradient(method, variables, noisy))
        memories.append(run(method, variables, noisy)[1].memory)
    same(*gradients)
    same(*memories)


def alone_and_beside(variables, batch):
    """Views of unlabelled rows by themselves, and their logits beside labelled rows, under each batch's statistics."""
    network = build_network(SMALL, 3).clone(groups=((1, 2), (0,)))
    state = {"params": variables.params, "batch_stats": variables.stats}
    images = {k: network_inputs(batch[k], BOTH, DATA.spec, DATA.statistics) for k in ("labelled", UNLABELLED)}

    @jax.jit
    def views(x, present):
        return network.apply(state, x, True, present, method="views", mutable=["batch_stats"])[0]

    def present(*streams):
        return {m: np.concatenate([seen_by(batch[k])[m].any((1, 2)) for k in streams]) for m in SENSORS}

    alone = views(images[UNLABELLED], present(UNLABELLED))
    n = len(images["labelled"])
    both = views(np.concatenate(list(images.values())), present("labelled", UNLABELLED))
    return alone, {head: resized(y, (64, 64))[n:] for head, y in both.logits.items()}


def test_cross_supervision_by_hand():
    """Each sensor by the other's reassigned labels, where both have data; its weight rises; what the metrics say."""
    options = OFF | PLAIN | {"cross": 0.6, "consistency": 0.4, "threshold": 0.4, "ramp": 0.5}
    options |= {"prediction": True, "mass": "hard", "iterations": 2, "momentum": 0.5}
    method, variables, batch = build(**options)
    batch[UNLABELLED]["sar_valid"][:, :, :20] = 0
    batch[UNLABELLED]["optical_valid"][:, :, :, -30:] = 0
    terms, outputs = run(method, variables, batch, step=5)
    rows, where = batch[UNLABELLED], seen_by(batch[UNLABELLED])
    alone, logits = alone_and_beside(variables, batch)
    memory, pseudo = outputs.memory, {}
    for head in HEADS:
        coarse = alone.logits[head]
        mass = cell_mass(where[head], coarse.shape[1:3])
        mean = jnp.einsum("bhwk,bhw->k", jax.nn.softmax(coarse), mass) / mass.sum()
        np.testing.assert_allclose(memory[f"queue/{head}"][0], mean, rtol=1e-4)
        how = LabelReassignment(**options)
        pseudo[head] = pseudo_labels(coarse, alone.embeddings[head], where[head], memory, head, how)
    assert 0.05 < (pseudo["sar"].label != pseudo["sar"].argmax).mean() < 0.95

    ramp = np.exp(-5 * (1 - 5 / 10) ** 2)
    expected = [(f"cross_{m}", m, other, 0.6) for m, other in zip(SENSORS, SENSORS[::-1], strict=True)]
    expected += [(f"consistency_{head}", head, "fused", 0.4 if head == "fused" else 0.2) for head in HEADS]
    for name, head, teacher, weight in expected:
        counts = np.where(where[head], pseudo[teacher].weight, 0)
        total, _ = cross_entropy(logits[head], pseudo[teacher].label, pixel_weights=counts)
        np.testing.assert_allclose(terms[name].total, total, rtol=3e-3, err_msg=name)
        assert terms[name].weight == (where[head] & where[teacher]).sum()
        np.testing.assert_allclose(terms[name].factor, weight * ramp, rtol=1e-5)
    assert rows["label"].min() == IGNORE_LABEL
    late, _ = run(method, variables, batch, step=10)
    np.testing.assert_allclose(late["cross_sar"].factor, 0.6)

    truth, found, metrics = rows["hidden_label"], pseudo["fused"], outputs.metrics
    known = where["fused"] & (truth < 3)
    for name, answer in (("argmax", found.argmax), ("reassigned", found.label)):
        np.testing.assert_allclose(metrics[f"pseudo_{name}"].mean(), (answer == truth)[known].mean(), atol=2e-3)
    np.testing.assert_allclose(metrics["pseudo_weight"].mean(), found.weight[where["fused"]].mean(), rtol=2e-3)
    shares = np.bincount(truth[known], minlength=3) / known.sum()
    np.testing.assert_allclose(metrics["mass_error"].mean(), np.abs(found.asked - shares).sum(), rtol=1e-3)
    errors = [float(p.error) for p in pseudo.values()]
    assert max(errors) > 1.1 * min(errors)
    np.testing.assert_allclose(metrics["transport_error"].mean(), max(errors), rtol=1e-2, atol=1e-6)


def test_masked_pixels_are_the_mean_and_labels_come_from_the_whole_image():
    """What is hidden from a sensor does not reach it, nor the statistics; labelled rows are never masked."""
    method, variables, batch = build(**OFF | PLAIN | {"cross": 1.0, "cell": 16, "mask_sar": 0.0, "mask_optical": 1.0})
    rows = batch[UNLABELLED]
    inverted = rows | {"optical": 255 - rows["optical"]}
    (one, first), (two, second) = (run(method, variables, batch | {UNLABELLED: x}) for x in (rows, inverted))
    same(one["cross_entropy_optical"], two["cross_entropy_optical"])
    same(first.stats, second.stats)
    assert one["cross_sar"].total != two["cross_sar"].total, "optical's labels come from the image that is not masked"

    labelled = batch["labelled"] | {"optical": 255 - batch["labelled"]["optical"]}
    other, _ = run(method, variables, batch | {"labelled": labelled})
    assert abs(other["cross_entropy_optical"].total / one["cross_entropy_optical"].total - 1) > 1e-3

    mean = np.broadcast_to(np.uint8([90, 100]), rows["optical"].shape)
    hidden, _ = run(*build(**OFF | {"complementary": 1.0, "cell": 16, "mask_sar": 0.0, "mask_optical": 1.0}))
    plain, _ = run(
        *(whole := build(**OFF | {"complementary": 1.0}))[:2], whole[2] | {UNLABELLED: rows | {"optical": mean}}
    )
    np.testing.assert_allclose(hidden["complementary_optical"].total, plain["complementary_optical"].total, rtol=1e-5)


def test_masks_reach_means_over_neighbours():
    """A pixel that is seen says nothing of a hidden one beside it."""
    options = OFF | PLAIN | {"complementary": 1.0, "cell": 16, "mask_sar": 0.0, "mask_optical": 0.5}
    inputs = dataclasses.replace(BOTH, local_mean=5, normalisation="tile")
    method = build_method(context_of(LabelReassignment(**options), inputs=inputs))
    _, _, batch = build(**options)
    variables = jax.jit(method.init)(jax.random.key(0))
    rows = batch[UNLABELLED]
    # The masks of this step, and another image under them with the same mean and spread.
    hide = row_keys(jax.random.fold_in(KEY, ROLE + 2), rows)
    seen = np.asarray(asymmetric_masks(hide, 64, 64, cell=16, optical=0.5, sar=0.0).optical)
    other = rows["optical"].copy()
    for image, mask in zip(other, seen, strict=True):
        image[:, ~mask] = image[:, ~mask][:, ::-1]
    assert (other != rows["optical"]).any()
    one, two = (
        run(method, variables, batch | {UNLABELLED: rows | {"optical": x}})[0] for x in (rows["optical"], other)
    )
    np.testing.assert_allclose(one["complementary_optical"].total, two["complementary_optical"].total, rtol=1e-5)


def test_where_one_sensor_is_missing_the_other_is_not_masked():
    """A row without it, one from which it is withheld, and pixels without it."""
    masks = {"mask_optical": 1.0, "mask_sar": 0.0}
    for changes, blind in (({"dropout": 1.0}, {}), ({}, {"sar_valid": 0})):
        found = []
        for cell in (0, 16):
            method, variables, batch = build(**OFF | PLAIN | {"consistency": 1.0, "cell": cell} | masks | changes)
            rows = batch[UNLABELLED]
            rows |= {name: np.full_like(rows[name], value) for name, value in blind.items()}
            found.append(run(method, variables, batch | {UNLABELLED: rows})[0]["consistency_optical"].total)
        np.testing.assert_allclose(*found, rtol=1e-6)

    method, variables, batch = build(**OFF | {"complementary": 1.0, "cell": 16} | masks)
    rows = batch[UNLABELLED]
    rows["sar_valid"][:, :, :32] = 0
    totals = []
    for half in (slice(0, 0), slice(0, 32), slice(32, 64)):
        image = rows["optical"].copy()
        image[:, :, half] = 255 - image[:, :, half]
        found, _ = run(method, variables, batch | {UNLABELLED: rows | {"optical": image}})
        totals.append(found["complementary_optical"].total)
    assert totals[0] == totals[2] != totals[1]


def test_a_withheld_sensor_is_withheld_from_the_fused_head_alone():
    """Of either stream, where the other stream's rows have one sensor only and so nothing to withhold."""
    for stream, name in (("labelled", "cross_entropy"), (UNLABELLED, "consistency")):
        found = {}
        for dropout in (0.0, 1.0):
            method, variables, batch = build(**OFF | PLAIN | {"consistency": 1.0, "dropout": dropout})
            other = batch[UNLABELLED if stream == "labelled" else "labelled"]
            other["sar_valid"] = 0 * other["sar_valid"]
            found[dropout] = run(method, variables, batch)[0]
        for head in HEADS:
            off, on = (found[d][f"{name}_{head}"].total for d in (0.0, 1.0))
            assert (abs(on / off - 1) > 1e-4) == (head == "fused"), (name, head)
    # A pixel that the other sensor does not see, either, teaches it nothing.
    method, variables, batch = build(**OFF | PLAIN | {"consistency": 1.0, "dropout": 1.0})
    rows = batch["labelled"]
    rows["sar_valid"][:, :, :32] = rows["optical_valid"][:, :, 32:] = 0
    terms, _ = run(method, variables, batch)
    assert 0 < terms["cross_entropy_fused"].weight < 0.9 * (rows["label"] < 3).sum()


def test_complementary_loss_by_hand():
    r = np.random.default_rng(0)
    a, b = r.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
    a[0, 0, 0] = b[0, 0, 0]
    where = r.random((2, 8, 8)) < 0.7
    where[:, :2, :2] = True
    p, q = (np.exp(x - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))) for x in (a, b))
    weight = 0.5 * np.abs(p - q).sum(-1) * where.reshape(2, 4, 2, 4, 2).mean((2, 4))
    expected = (weight * (q * np.log(q / p)).sum(-1)).sum(), weight.sum()
    np.testing.assert_allclose(jax.jit(complementary_loss)(a, b, where), expected, rtol=1e-5)
    total = jax.grad(lambda a, b: complementary_loss(a, b, where)[0], argnums=(0, 1))
    own, others = jax.jit(total)(a, b)
    assert own.any()
    assert not others.any(), "the other one teaches"
    # d is a weight, not something to make small: the gradient is that of the divergence alone.
    np.testing.assert_allclose(own, weight[..., None] * (p - q), atol=1e-6)
    np.testing.assert_array_equal(jax.jit(complementary_loss)(a, a, where)[0], 0)


def test_complementary_learning_reads_what_the_other_sees():
    method, variables, batch = build(**OFF | {"complementary": 0.8, "cell": 16})
    assert variables.memory == {}
    terms, _ = run(method, variables, batch, step=20)
    early, _ = run(method, variables, batch, step=2)
    for m in SENSORS:
        np.testing.assert_allclose(terms[f"complementary_{m}"].factor, 0.4, rtol=1e-6)
        np.testing.assert_allclose(early[f"complementary_{m}"].factor, 0.4 * np.exp(-5 * 0.25), rtol=1e-5)
    rows = batch[UNLABELLED]
    gone, _ = run(method, variables, batch | {UNLABELLED: rows | {"sar_valid": 0 * rows["sar_valid"]}}, step=20)
    assert gone["complementary_optical"].weight == gone["complementary_sar"].weight == 0, "no SAR to learn from"
    hidden, _ = run(*build(**OFF | {"complementary": 0.8, "cell": 16, "mask_optical": 1.0, "mask_sar": 0.0}))
    assert hidden["complementary_sar"].weight == 0, "nothing of the optical image is seen"
    assert hidden["complementary_optical"].weight > 0


def test_sensors_are_withheld_only_where_both_are_there():
    n = 4000
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(np.arange(n))
    there = {"sar": np.arange(n) % 4 > 0, "optical": np.arange(n) % 5 > 0}
    found = withheld(there, keys, 0.3)
    both = there["sar"] & there["optical"]
    for m in SENSORS:
        assert not (found[m] & ~there[m]).any()
        same(found[m][~both], there[m][~both])
        np.testing.assert_allclose(1 - np.asarray(found[m])[both].mean(), 0.15, atol=0.02)
    assert (found["sar"] | found["optical"])[both].all()
    same(withheld(there, keys, 0.0), there)


def test_memory_is_what_labelled_and_unlabelled_rows_say():
    """The queue moves with unlabelled rows, prototypes and frequencies with labelled ones."""
    method, variables, batch = build(momentum=0.0)
    after = run(method, variables, batch)[1].memory
    label = batch["labelled"]["label"]
    known = np.bincount(label[label < 3], minlength=3)
    np.testing.assert_allclose(after["frequencies"], known / known.sum(), rtol=1e-4)
    for head in HEADS:
        np.testing.assert_array_equal(after[f"seen/{head}"], known > 0)
        np.testing.assert_allclose(after[f"queue/{head}"][0].sum(), 1, rtol=1e-5)
        assert not after[f"queue/{head}"][1:].any()
    blind = batch["labelled"] | {"label": np.full_like(label, IGNORE_LABEL)}
    kept = run(method, variables, batch | {"labelled": blind})[1].memory
    for name in ("frequencies", *(f"{what}/{h}" for h in HEADS for what in ("prototypes", "seen"))):
        assert not kept[name].any()
    assert kept["filled"] == 1


def test_what_a_sensor_does_not_see_is_not_remembered_of_it():
    method, variables, batch = build(momentum=0.5)
    rows = batch["labelled"]
    after = run(method, variables, batch | {"labelled": rows | {"sar_valid": 0 * rows["sar_valid"]}})[1].memory
    assert not after["prototypes/sar"].any()
    assert not after["seen/sar"].any()
    for head in ("optical", "fused"):
        assert after[f"seen/{head}"].any()
    one = run(method, variables, batch)[1].memory
    two = run(method, variables._replace(memory=one), batch)[1].memory
    np.testing.assert_allclose(two["frequencies"], 1.5 * one["frequencies"], rtol=1e-5)
    assert two["filled"] == 2


def test_unlabelled_rows_without_data_give_nothing():
    method, variables, batch = build(region=True)
    rows = batch[UNLABELLED]
    empty = rows | {f"{m}_valid": 0 * rows[f"{m}_valid"] for m in SENSORS}
    terms, outputs = run(method, variables, batch | {UNLABELLED: empty})
    for name, term in terms.items():
        if not name.startswith("cross_entropy"):
            assert (term.total, term.weight) == (0, 0), name
    assert outputs.memory["filled"] == 0
    assert jax.tree.all(
        jax.tree.map(lambda g: np.isfinite(g).all(), gradient(method, variables, batch | {UNLABELLED: empty}))
    )
