"""Small scenes as files, a network and a run for them, and what it gives on a whole image at once."""

import jax
import jax.numpy as jnp
import numpy as np
import toy
from affine import Affine
from models.toy_variables import random_variables
from rasterio.crs import CRS

from sarjax import raster
from sarjax.augment.inputs import network_inputs
from sarjax.config import Inputs
from sarjax.models import build_network
from sarjax.options import Supervised
from sarjax.reports.maps import predict_run
from sarjax.scenes.inputs import Reads
from sarjax.scenes.predict import Engine
from sarjax.scenes.windows import Windows
from sarjax.train import loop

PLACE = {"crs": CRS.from_epsg(32633), "transform": Affine(10, 0, 4e5, 0, -10, 5e6)}
SPEC = toy.SPEC


def pixels(height, width, bands, seed=0):
    """uint8 pixels that differ from place to place, with a corner and a hole without data (0)."""
    rng = np.random.default_rng(seed)
    shade = 60 + 50 * np.sin(np.add.outer(np.arange(height) / 17, np.arange(width) / 29))
    image = np.clip(shade[..., None] * rng.gamma(4, 0.25, (height, width, bands)), 1, 255).astype(np.uint8)
    image[: height // 5, : width // 4] = 0
    image[height // 2 : height // 2 + 9, width // 2 : width // 2 + 5] = 0
    return image


def write_scene(folder, height, width, seed=0, **profile):
    """{sensor: path} of a scene whose no-data value is declared by its files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for m in SPEC.modalities:
        image = pixels(height, width, len(m.bands), seed)
        paths[m.name] = raster.write(folder / f"{m.name}.tif", image, nodata=0, **(PLACE | profile))
    return paths


def quiet(*args):
    pass


def trained(folder, **experiment):
    """A run of two steps on the toy data set."""
    loop.train(toy.config(Supervised(), steps=2, **experiment), folder, dataset=toy.dataset(), say=quiet)
    return folder


def predict(run, scenes, out, **options):
    """(records, what was said) of `predict_run`, in small windows."""
    said = []
    options = {"window": 96, "overlap": 32, "say": said.append} | options
    return predict_run(run, [str(s) for s in scenes], out, **options), " ".join(said)


def stamps(out):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(out.iterdir())}


class Case:
    """A network with random weights, as an engine and on whole images."""

    def __init__(self, options, inputs=None, spec=SPEC):
        self.inputs = inputs or Inputs(modalities=("sar",))
        self.network = build_network(options, spec.num_classes)
        self.context = self.network.context.grown(self.inputs.local_mean // 2)
        self.statistics = toy.dataset(8).statistics
        dates = tuple(range(spec.dates)) if self.inputs.dates == "all" else self.inputs.dates
        self.reads = Reads(spec, self.inputs.modalities, dates)
        sample = {
            key: np.zeros(shape, np.uint8)
            for m in spec.modalities
            for key, shape in (
                (m.name, (1, spec.dates, 64, 64, len(m.bands))),
                (f"{m.name}_valid", (1, spec.dates, 64, 64)),
            )
        }
        image = network_inputs(sample, self.inputs, spec, self.statistics)
        variables = random_variables(self.network, image)

        def logits(batch):
            x = network_inputs(batch, self.inputs, spec, self.statistics)
            return self.network.apply(variables, x, train=False).logits

        # Random classifiers prefer one class everywhere: take its lead away, and let differences count.
        rng = np.random.default_rng(1)
        filled = {k: rng.integers(0, 120, v.shape, np.uint8) if v.ndim == 5 else v + 1 for k, v in sample.items()}
        found = logits(filled)
        mean, spread = found.mean((0, 1, 2)), (found - found.mean((0, 1, 2))).std()
        self.probabilities = jax.jit(lambda batch: jax.nn.softmax((logits(batch) - mean) / spread, -1))

    def engine(self, side, overlap, rows=2, apply=None):
        by_scene = self.inputs.normalisation == "tile"
        apply = apply or self.probabilities
        classify = jax.jit(lambda batch: jnp.argmax(apply(batch), -1).astype(jnp.uint8))
        return Engine(apply, self.reads, self.context, Windows(side, overlap), rows, by_scene, classify)

    def whole(self, images, apply=None):
        """(probabilities (h, w, k), valid (h, w)) of the padded image at once; images: {sensor: (t, h, w, c)}."""
        a, batch = self.context.alignment, {}
        for name, image in images.items():
            h, w = image.shape[1:3]
            padding = ((0, 0), (0, -h % a), (0, -w % a))
            batch[name] = np.pad(image, (*padding, (0, 0)))[None]
            batch[f"{name}_valid"] = np.pad((image != 0).any(-1), padding)[None].astype(np.uint8)
        seen = np.any([batch[f"{name}_valid"][0].any(0) for name in self.reads.modalities], 0)
        out = np.asarray((apply or self.probabilities)(jax.tree.map(jnp.asarray, batch)))[0]
        return out[:h, :w], seen[:h, :w]


def same_map(labels, probabilities, expected, seen, atol=1e-5):
    """A map and its probabilities are those of whole-image inference, labels up to ties."""
    np.testing.assert_array_equal(np.isnan(probabilities).any(-1), ~seen)
    np.testing.assert_allclose(probabilities[seen], expected[seen], atol=atol)
    np.testing.assert_array_equal(labels == 255, ~seen)
    top = np.sort(expected, -1)
    sure = seen & (top[..., -1] - top[..., -2] > 2 * atol)
    np.testing.assert_array_equal(labels[sure], expected.argmax(-1)[sure])
    assert sure.sum() > 0.9 * seen.sum(), "a test of ties says nothing"
