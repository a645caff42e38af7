"""Scene clustering (Cheng et al.): contrastive instance and cluster objectives on pooled features, beside any method.

What the paper leaves open is ours: which views are paired, when neighbours are looked up, and that the projectors read
the global mean of the deepest features. METHOD: Li et al., "Contrastive Clustering" (AAAI 2021), for the losses.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sarjax.augment.geometry import geometry
from sarjax.augment.inputs import network_inputs
from sarjax.augment.radiometry import radiometry
from sarjax.config import Augment
from sarjax.errors import UserError
from sarjax.losses.contrastive import cluster_loss, instance_loss, unit
from sarjax.methods.neighbours import nearest, padded
from sarjax.methods.record import Batch, Context, Method, Outputs, Rest, Term, Tree, Variables
from sarjax.methods.supervised import SIZE_AT_INIT, supervised
from sarjax.options import Clustering, SceneClustering
from sarjax.spec import Stream

NAME = "scene_clustering"  # in params
PARTNER, BANK, NEIGHBOURS = "partner", "bank", "neighbours"  # stream and memory
ROLE = 0x5CE7E  # folded into keys


def scene_clustering(options: SceneClustering, context: Context) -> Method:
    """Supervised segmentation with the auxiliary objectives; with both weights 0 it is `supervised` itself."""
    return with_scene_clustering(supervised(options, context), options.clustering, context)


def with_scene_clustering(method: Method, options: Clustering, context: Context) -> Method:
    """`method` with `options.instance` L_ins + `options.cluster` L_clu added to its objective.

    h = global mean of the deepest features of `encode`; z = unit(mlp(h)), y = softmax(mlp(h)). A pair is two views of a
    tile of the first stream, or a view of it and one of a near neighbour. Both views go through `encode` in one pass
    under the batch's statistics; running statistics are those of the method's own pass.

    Memory: `bank` (n, d), the h of the unaugmented training tiles by position, and `neighbours` (n, k) int32, -1 =
    none, both rebuilt at an epoch's end from `options.warmup` epochs on.

    Raises:
      UserError: the first stream of `method` follows another.
      ValueError: `method` has something of a name that is used here.
    """
    if not (options.instance or options.cluster):
        return method
    experiment, spec, statistics = context.experiment, context.spec, context.statistics
    inputs, first = experiment.inputs, next(iter(method.streams))
    if method.streams[first].kind == "follow":
        raise UserError(f"stream {first!r} follows another, so its tiles have no neighbours of their own.")
    tiles = statistics.tiles["train"]
    views = Augment(
        crop=experiment.augment.crop, flip=True, rotate=True,
        region=options.region, jitter=options.jitter, speckle=options.speckle,
    )  # fmt: skip
    followed = options.positives == "knn"

    def init(key: jax.Array) -> Variables:
        # The method's own draws stay what they are without the auxiliary, so that runs of one seed can be compared.
        variables = method.init(key)
        batch = jax.eval_shape(functools.partial(blank, spec=spec))
        features = jax.eval_shape(
            lambda v, b: pooled(method.encode(v.params, v.stats, _image(b), False)), variables, batch
        )
        channels = features.shape[-1]
        for_instances, for_clusters = jax.random.split(jax.random.fold_in(key, ROLE))
        projectors = {}
        if options.instance:
            projectors["instance"] = _mlp_init(for_instances, channels, options.hidden, options.dimensions)
        if options.cluster:
            projectors["cluster"] = _mlp_init(for_clusters, channels, options.hidden, options.clusters)
        memory = {**variables.memory}
        if options.positives != "augmentation":
            rows = padded(tiles)
            memory = _joined(
                memory,
                {
                    BANK: jnp.zeros((rows, channels), jnp.float32),
                    NEIGHBOURS: jnp.full((rows, options.neighbours), -1, jnp.int32),
                },
            )
        return Variables(_joined(variables.params, {NAME: projectors}), variables.stats, memory)

    def _image(rows: Batch) -> Float[Array, "b h w c"]:
        return network_inputs(rows, inputs, spec, statistics)

    def view(rows: Batch, key: jax.Array) -> Float[Array, "b h w c"]:
        where, how = jax.random.split(key)
        return _image(radiometry(geometry(rows, where, views), how, views, spec))

    def loss(params: Tree, rest: Rest, batch: Tree, key: jax.Array, step: jax.Array):
        terms, outputs = method.loss(params, rest, batch, key, step)
        one, other, draw = jax.random.split(jax.random.fold_in(key, ROLE), 3)
        rows = batch[first]
        pair = view(rows, one), view(batch[PARTNER] if followed else rows, other)
        # Interleaved, so that both views of a row stay on the row's device.
        both = jnp.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:])
        h = pooled(method.encode(params, rest.stats, both, True)).reshape(len(pair[0]), 2, -1)
        a, b = h[:, 0], h[:, 1]
        if options.positives == "bank":
            b = _from_bank(rest.memory, rows, b, draw)
        y = {}
        projectors = params[NAME]
        if options.instance:
            z = [unit(_mlp(projectors["instance"], x)) for x in (a, b)]
            pairs = instance_loss(*z, temperature=options.instance_temperature, include_self=options.include_self)
            terms = _joined(terms, {"instance": Term(*pairs, options.instance)})
        if options.cluster:
            y = [jax.nn.softmax(_mlp(projectors["cluster"], x)) for x in (a, b)]
            pairs = cluster_loss(*y, temperature=options.cluster_temperature, include_self=options.include_self)
            terms = _joined(terms, {"cluster": Term(*pairs, options.cluster)})
        return terms, Outputs(outputs.stats, outputs.memory, _joined(outputs.metrics, _metrics(a, b, y)))

    def refresh(params: Tree, stats: Tree, memory: Tree, batches: Any, epoch: int) -> Tree:
        before = method.refresh(params, stats, memory, batches, epoch) if method.refresh else memory
        if epoch < options.warmup:
            return before
        bank, valid, start = before[BANK], jnp.zeros(padded(tiles), bool), 0
        for batch in batches:
            bank, valid = _deposit(bank, valid, batch, start, params, stats)
            start += len(batch["row_valid"])
        table = jax.jit(nearest, static_argnums=2)(bank, valid, options.neighbours)
        return before | {BANK: bank, NEIGHBOURS: table}

    @jax.jit
    def _deposit(bank, valid, batch, start, params, stats):
        h = pooled(method.encode(params, stats, _image(batch), False))
        where = start + jnp.arange(len(h))
        kept = batch["row_valid"] > 0
        where = jnp.where(kept, where, len(bank))  # rows that only fill up a batch are dropped
        return bank.at[where].set(h, mode="drop"), valid.at[where].set(True, mode="drop")

    def scenes(params: Tree, stats: Tree, batch: Batch) -> Float[Array, "b m"]:
        h = pooled(method.encode(params, stats, _image(batch), False))
        return jax.nn.softmax(_mlp(params[NAME]["cluster"], h))

    streams = dict(method.streams)
    if followed:
        streams = _joined(streams, {PARTNER: Stream("follow", method.streams[first].rows, first, NEIGHBOURS)})
    return method._replace(
        init=init,
        loss=loss,
        streams=streams,
        refresh=method.refresh if options.positives == "augmentation" else refresh,
        scenes=scenes if options.cluster else method.scenes,
        beside=(*method.beside, NAME),
        notes=(*method.notes, *_notes(options, context)),
        couples=(*method.couples, "contrastive negatives"),
    )


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both; ValueError where a name is in both, for one would silently stand for the other."""
    if shared := one.keys() & other.keys():
        raise ValueError(f"scene clustering and the method beside it both have {', '.join(sorted(shared))}")
    return {**one, **other}


def _notes(options: Clustering, context: Context) -> tuple[str, ...]:
    """What a run should say before it starts: that it is over before the first neighbours are looked up."""
    complete = context.schedule.epochs(context.schedule.steps - 1)  # before the last step, which may use neighbours
    if options.positives == "augmentation" or complete >= max(1, options.warmup):
        return ()
    return (
        f"no neighbours are looked up in this run, which ends within its warm-up of {options.warmup} epochs: the "
        "partner of a view is another view of its own tile",
    )


def pooled(features: dict[int, Array]) -> Float[Array, "b c"]:
    """The global mean of the deepest features, float32."""
    return features[max(features)].astype(jnp.float32).mean((1, 2))


def _from_bank(memory: Tree, rows: Batch, other: Float[Array, "b d"], key: jax.Array) -> Float[Array, "b d"]:
    """`other`, or, drawn evenly among it and the tile's neighbours, the feature that the bank holds of one of these.

    What the bank holds is of earlier parameters: no gradient goes through it.
    """
    table = memory[NEIGHBOURS][rows["position"]]
    chances = jax.vmap(lambda r: jax.random.uniform(jax.random.fold_in(key, r)))(rows["row"])
    known = (table >= 0).sum(1)
    drawn = jnp.minimum((chances * (known + 1)).astype(jnp.int32), known)
    chosen = jnp.take_along_axis(table, jnp.maximum(drawn - 1, 0)[:, None], axis=1)[:, 0]
    theirs = jax.lax.stop_gradient(memory[BANK][jnp.maximum(chosen, 0)])
    return jnp.where((drawn > 0)[:, None], theirs, other)


def _metrics(a: Array, b: Array, y: Any) -> dict[str, Term]:
    """How alike partners are before the projectors, and, of the clusters, how sure and how evenly filled they are."""
    rows = jnp.asarray(float(len(a)), jnp.float32)
    found = {"partners_cosine": Term(jnp.sum(unit(a) * unit(b)), rows)}
    if y:
        sure, share = jnp.sum(jnp.max(y[0], -1)), jnp.mean(y[0], 0)
        evenness = jnp.sum(jax.scipy.special.entr(share)) / jnp.log(float(len(share)))
        found |= {"cluster_sureness": Term(sure, rows), "cluster_evenness": Term(evenness * rows, rows)}
    return jax.lax.stop_gradient(found)


def _mlp_init(key: jax.Array, *sizes: int) -> Tree:
    """Linear, ReLU, linear; He initialisation, zero biases."""
    keys = jax.random.split(key, len(sizes) - 1)
    initial = jax.nn.initializers.he_normal()
    return {
        f"linear{i}": {"kernel": initial(k, (m, n), jnp.float32), "bias": jnp.zeros(n)}
        for i, (k, m, n) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def _mlp(params: Tree, x: Float[Array, "b d"]) -> Float[Array, "b k"]:
    for i in range(len(params)):
        layer = params[f"linear{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i + 1 < len(params) else x
    return x


def blank(spec: Any) -> Batch:
    """One empty tile: what `encode` gives for it says how many channels there are."""
    side, batch = SIZE_AT_INIT, {}
    for m in spec.modalities:
        batch[m.name] = jnp.zeros((1, spec.dates, side, side, len(m.bands)), m.dtype)
        batch[f"{m.name}_valid"] = jnp.ones((1, spec.dates, side, side), jnp.uint8)
    return batch
